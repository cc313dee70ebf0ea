// The page: asks the daemon every two seconds, and shows what it says.

import { act, actor, afterActing, ask, hasToken, isBusy, opened, showBusy, sure } from "./act.js";
import { idButton } from "./explain.js";
import { all, lookAtLetters, noteLetters, showAll } from "./letters.js";
import { Lateness, Throughput, count, span } from "./plots.js";
import { Table, changed, once } from "./table.js";
import { byId, clock, local, make, moment, prose, say, sentence, set, setClock, setMoment, tick, users, visible } from "./words.js";

const EVERY = 2000;

// --- What is shown -----------------------------------------------------------------------------------------------------------

let overview = null;
let heardAt = null;
let failedAt = null;
const throughput = new Throughput(byId("throughput"));
const lateness = new Lateness(byId("lateness"));

const due = new Table("next", [
  (cell, row) => {
    const parts = once(cell, () => ({ time: cell.appendChild(moment("due", row.at)), more: cell.appendChild(make("div", "soft")) }));
    setMoment(parts.time, "due", row.at);
    const why = row.held ? "held until then, its deadline" : row.attempts ? `tried ${row.attempts} ${row.attempts === 1 ? "time" : "times"}` : "";
    say(parts.more, why);
    parts.more.hidden = !why;
  },
  (cell, row) => cell.replaceChildren(users("div", "strong", row.kind)),
  (cell, row) => cell.replaceChildren(
    row.key === null ? make("div", "soft", "none") : users("div", "", row.key),
    ...(row.subject === null ? [] : [users("div", "soft", `about ${row.subject}`)]),
  ),
  (cell, row) => cell.replaceChildren(idButton(row.id)),
]);

const kinds = new Table("kinds", [
  (cell, kind) => changed(cell, kind.kind, kind.summary) && cell.replaceChildren(
    users("div", "strong", kind.kind),
    ...(kind.summary ? [users("div", "soft", kind.summary)] : []),
  ),
  (cell, kind) => cell.replaceChildren(
    kind.plugin === null
      ? make("div", "soft", "none here")
      : make("div", "", users("span", "", kind.plugin), make("div", "soft", `generation ${kind.generation}, `, users("span", "", kind.file))),
  ),
  (cell, kind) => {
    if (!changed(cell, kind.breaker, kind.pause, kind.error, kind.errorAt)) return;
    const [style, text] = {
      closed: ["good-text", "well"],
      open: ["bad-text", "fails: rows wait until one succeeds"],
      probing: ["warn-text", "fails: one row is being tried"],
      none: ["warn-text", "not served by this daemon"],
    }[kind.breaker];
    cell.replaceChildren(make("div", `dot ${style}`, text));
    if (kind.pause) {
      const until = kind.pause.until === null ? "until somebody resumes it" : `until ${local(new Date(kind.pause.until))}`;
      const reason = kind.pause.reason === null ? "" : `: ${kind.pause.reason}`;
      cell.append(users("div", "warn-text", `paused by ${kind.pause.by} since ${local(new Date(kind.pause.since))}, ${until}${reason}`));
    }
    if (kind.error !== null) cell.append(prose("soft", `last error, at ${kind.errorAt}: ${kind.error}`));
  },
  (cell, kind) => cell.replaceChildren(
    ...(kind.plugin === null ? [make("div", "soft", "–")] : [
      make("div", "", `${count(kind.answered)} answered`),
      make("div", kind.failed ? "bad-text" : "soft", `${count(kind.failed)} failed`),
    ]),
  ),
  (cell, kind) => cell.replaceChildren(make("div", kind.held ? "warn-text" : "soft", `${count(kind.held)}${kind.heldMore ? " or more" : ""}`)),
  (cell, kind, row) => {
    const toggle = once(cell, () => {
      const press = (element) => (row.item.pause ? act(element, "Resuming", `api/kinds/${encodeURIComponent(row.item.kind)}/resume`, {}) : pause(element, row.item.kind));
      const toggle = actor("", "quiet", "", press);
      cell.append(make("div", "buttons", toggle));
      return toggle;
    });
    const text = kind.pause ? "Resume" : "Pause";
    if (!toggle.hasAttribute("aria-busy")) say(toggle, text);
    set(toggle, "aria-label", visible(`${text} the kind ${kind.kind}`));
  },
]);

async function pause(element, kind) {
  if (isBusy() || !(await hasToken())) return;
  say(byId("pause-title"), visible(`Pause the kind ${kind}`));
  byId("pause-for").value = "";
  byId("pause-reason").value = "";
  if (!(await opened(byId("pause-dialog")))) return;
  const [seconds, reason] = [byId("pause-for").value, byId("pause-reason").value.trim()];
  const body = { ...(seconds && { for_seconds: Number(seconds) }), ...(reason && { reason }) };
  await act(element, "Pausing", `api/kinds/${encodeURIComponent(kind)}/pause`, body);
}

const parked = new Table("parked", [
  (cell, row) => cell.replaceChildren(moment("ago", row.parked_at)),
  (cell, row) => cell.replaceChildren(users("div", "strong", row.kind), ...(row.key === null ? [] : [users("div", "", row.key)])),
  (cell, row) => cell.replaceChildren(prose("", row.reason), ...(row.plugin === null ? [] : [users("div", "soft", `by ${row.plugin}`)])),
  (cell, row) => cell.replaceChildren(idButton(row.id)),
  (cell, { id, kind, key }) => once(cell, () => {
    const what = `the row ${id} of the kind ${kind}${key === null ? "" : ` with the key ${key}`}`;
    cell.append(make("div", "buttons",
      actor("Retry", "quiet", `Retry ${what}`, (element) => act(element, "Retrying", `api/parked/${id}/retry`, {})),
      actor("Drop", "quiet drop", `Drop ${what}`, async (element) => {
        if (await sure("Drop 1 parked row for good?", `It is ${what}.`)) await act(element, "Dropping", `api/parked/${id}/drop`, {});
      }),
    ));
    return true;
  }),
]);

all("parked", { again: "Retry", doing: "Retrying", path: "parked", what: "parked rows" });

function show(said) {
  overview = said;
  document.body.classList.toggle("read-only", !said.actions);
  byId("read-only").hidden = said.actions;
  byId("unlock").hidden = !said.actions;
  const { database } = said;
  if (database) setClock(database.now);

  const alarm = byId("alarm");
  alarm.hidden = said.ready;
  say(byId("alarm-title"), said.ready ? "" : "Rows that fall due now are not delivered now");
  const reasons = JSON.stringify(said.reasons);
  if (alarm.dataset.reasons !== reasons) {
    alarm.dataset.reasons = reasons;
    byId("reasons").replaceChildren(...said.reasons.map((reason) => users("li", "", sentence(reason))));
  }

  showTiles(said);
  throughput.update(said.hour);
  lateness.update(said.hour);
  showKinds(said);
  if (database) {
    due.show(database.next.map((row) => [row.id, row]));
    const { rows, or_more: more, newest } = database.parked;
    parked.show(newest.map((row) => [row.id, row]));
    showAll("parked", newest.length, more ? `more than ${count(rows)}` : count(rows), "The last scheduled");
  }
  say(byId("footer"), `Tidings ${said.version} at ${said.daemon}, up for ${span(said.uptime_seconds)}. The plots, calls and generations are those of this daemon; all else is the same at every daemon.`);
  showBusy();
}

function figure(name, text, style, under) {
  const element = byId(`${name}-figure`);
  say(element, text);
  element.className = `figure ${style}`;
  if (under !== undefined) say(byId(`${name}-under`), under);
}

/** How many rows wait: above a thousand they are not counted but estimated. */
function waiting({ pending }) {
  return pending <= 1000 ? count(pending) : `about ${count(pending)}`;
}

function showTiles({ database, letters: counts, hour }) {
  if (database) {
    const next = database.next[0];
    if (next) {
      let time = byId("next-figure").querySelector("time");
      if (!time) byId("next-figure").replaceChildren((time = moment("due", next.at)));
      setMoment(time, "due", next.at);
      say(byId("next-under"), visible(next.key === null ? next.kind : `${next.kind} · ${next.key}`));
    } else {
      figure("next", "nothing", "", "no row waits for its time");
    }
    const late = database.late_seconds;
    if (late < 1) figure("late", "on time", "good", "nothing that is due still waits");
    else figure("late", span(late), late > 30 ? "bad" : "warn", "so long has the oldest row been due that nothing holds back");
    const held = database.held.reduce((sum, { rows }) => sum + rows, 0);
    const heldMore = database.held.some(({ or_more: more }) => more);
    const parts = [
      [held, `${count(held)}${heldMore ? " or more" : ""} held`],
      [database.parked.rows, `${count(database.parked.rows)}${database.parked.or_more ? " or more" : ""} parked`],
      [counts?.dead, `${count(counts?.dead ?? 0)} dead letters`],
      [counts?.parked, `${count(counts?.parked ?? 0)} parked letters`],
    ];
    figure("waiting", waiting(database), "", parts.filter(([rows]) => rows).map(([, text]) => text).join(" · ") || "none held, none parked, no dead letters");
  } else {
    figure("late", "unknown", "bad", "PostgreSQL does not answer");
  }
  const delivered = hour.minutes.reduce((sum, minute) => sum + minute.delivered, 0);
  const latest = Math.max(-1, ...hour.minutes.map(({ p99 }) => p99 ?? -1));
  figure("hour", count(delivered), "", latest < 0 ? "none yet by this daemon" : `p99 of the worst minute: ${span(latest)}`);
}

function showKinds({ plugins, database }) {
  const problems = plugins.filter(({ problem }) => problem !== null);
  const text = JSON.stringify(problems.map(({ file, problem, active }) => [file, problem, Boolean(active)]));
  const list = byId("problems");
  if (list.dataset.text !== text) {
    list.dataset.text = text;
    list.replaceChildren(...problems.map(({ file, problem, active }) => users("li", "", `${file} does not serve${active ? ", and the version before it goes on" : ""}: ${problem}`)));
  }
  const held = new Map((database?.held ?? []).map((entry) => [entry.kind, entry]));
  const pauses = new Map((database?.paused ?? []).map((entry) => [entry.kind, entry]));
  const rows = plugins.flatMap(({ file, active }) => (active?.kinds ?? []).map((kind) => ({
    ...kind,
    file,
    plugin: active.plugin,
    generation: active.generation,
    error: kind.last_error,
    errorAt: kind.last_error === null ? null : errorClock(active.generation, kind),
  })));
  for (const kind of [...held.keys(), ...pauses.keys()]) {
    if (rows.some((row) => row.kind === kind)) continue;
    rows.push({ kind, summary: "", plugin: null, breaker: "none", error: null });
  }
  rows.sort((one, other) => (one.kind < other.kind ? -1 : 1));
  kinds.show(rows.map((row) => {
    const { kind, summary, plugin, generation, file, breaker, answered, failed, error, errorAt } = row;
    const item = { kind, summary, plugin, generation, file, breaker, answered, failed, error, errorAt };
    return [kind, { ...item, held: held.get(kind)?.rows ?? 0, heldMore: held.get(kind)?.or_more ?? false, pause: pauses.get(kind) ?? null }];
  }));
}

// An error's age grows with every answer, and its time must not.
const errorTimes = new Map();
function errorClock(generation, { kind, failed, last_error_seconds_ago: ago }) {
  const key = `${generation} ${kind}`;
  if (errorTimes.get(key)?.failed !== failed) errorTimes.set(key, { failed, at: local(new Date(Date.now() - ago * 1000)) });
  return errorTimes.get(key).at;
}

// --- Staying up to date ------------------------------------------------------------------------------------------------------

let timer = null;
let polling = null;

function poll() {
  polling ??= pollOnce().finally(() => (polling = null));
  return polling;
}

async function pollOnce() {
  clearTimeout(timer);
  try {
    show(await ask("api/overview", { signal: AbortSignal.timeout(10000) }));
    [heardAt, failedAt] = [Date.now(), null];
    noteLetters(overview, document.body.dataset.busy === "true");
  } catch (error) {
    failedAt ??= Date.now();
    byId("main").dataset.error = error.message;
  }
  showState();
  if (!document.hidden) timer = setTimeout(poll, EVERY);
}

function showState() {
  const pill = byId("state");
  byId("main").classList.toggle("stale", failedAt !== null);
  if (failedAt !== null) {
    pill.className = "pill bad";
    say(pill, `the daemon has not answered since ${clock(new Date(failedAt))}`);
    say(byId("live"), heardAt === null ? "nothing is known yet" : `what is shown was so at ${clock(new Date(heardAt))}`);
  } else if (overview) {
    pill.className = `pill ${overview.ready ? "good" : "bad"}`;
    say(pill, overview.ready ? "ready" : "not ready");
    say(byId("live"), `live, as of ${clock(new Date(heardAt))}`);
  }
  const late = overview?.database?.late_seconds ?? 0;
  document.title = failedAt !== null ? "No answer · Tidings" : late >= 1 ? `Late by ${span(late)} · Tidings` : overview && !overview.ready ? "Not ready · Tidings" : "Tidings";
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else poll();
});

setInterval(() => {
  if (document.hidden) return;
  document.querySelectorAll("time[data-form]").forEach(tick);
}, 1000);

afterActing(async (path) => {
  // What was on its way was asked before.
  await polling;
  await poll();
  if (path.includes("dead") || path.includes("letters")) await lookAtLetters();
});

await poll();
document.body.dataset.loaded = "true";
