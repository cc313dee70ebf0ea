// The page: asks the daemon for the overview every two seconds, and shows it.

import { act, actionButton, afterAction, ask, hasToken, isBusy, openDialog, showBusy, confirmDrop } from "./act.js";
import { idButton } from "./explain.js";
import { showIntakes } from "./intakes.js";
import { addBulkButtons, listLetters, refreshLetters, showCount } from "./letters.js";
import { Lateness, Throughput, formatCount, formatSpan } from "./plots.js";
import { showRecurrences } from "./recurrences.js";
import { Table, hasChanged, buildOnce } from "./table.js";
import { byId, formatClock, formatLocal, make, moment, longUserText, setText, toSentence, setAttribute, setClock, setMoment, refreshMoment, userText, makeVisible } from "./words.js";

const POLL_INTERVAL_MS = 2000;

// --- The tables and figures --------------------------------------------------------------------------------------------------

let overview = null;
let answeredAt = null;
let failedAt = null;
const throughput = new Throughput(byId("throughput"));
const lateness = new Lateness(byId("lateness"));

const due = new Table("next", [
  (cell, row) => {
    const parts = buildOnce(cell, () => ({ time: cell.appendChild(moment("due", row.at)), more: cell.appendChild(make("div", "soft")) }));
    setMoment(parts.time, "due", row.at);
    const note = row.held ? "held; this is its deadline" : row.attempts ? `tried ${row.attempts} ${row.attempts === 1 ? "time" : "times"}` : "";
    setText(parts.more, note);
    parts.more.hidden = !note;
  },
  (cell, row) => cell.replaceChildren(userText("div", "strong", row.kind)),
  (cell, row) => cell.replaceChildren(
    row.recurrence !== null ? userText("div", "", `${row.recurrence}/…`) : row.key === null ? make("div", "soft", "none") : userText("div", "", row.key),
    ...(row.subject === null ? [] : [userText("div", "soft", `about ${row.subject}`)]),
  ),
  (cell, row) => cell.replaceChildren(row.id === null ? make("div", "soft", "not made yet") : idButton(row.id)),
]);

const kinds = new Table("kinds", [
  (cell, kind) => hasChanged(cell, kind.kind, kind.summary) && cell.replaceChildren(
    userText("div", "strong", kind.kind),
    ...(kind.summary ? [userText("div", "soft", kind.summary)] : []),
  ),
  (cell, kind) => cell.replaceChildren(
    kind.plugin === null
      ? make("div", "soft", "none here")
      : make("div", "", userText("span", "", kind.plugin), make("div", "soft", `generation ${kind.generation}, `, userText("span", "", kind.file))),
  ),
  (cell, kind) => {
    if (!hasChanged(cell, kind.breaker, kind.pause, kind.limit, kind.error, kind.errorAt)) return;
    const [style, text] = {
      closed: ["good-text", "well"],
      open: ["bad-text", "fails: rows wait until one succeeds"],
      probing: ["warn-text", "fails: one row is being tried"],
      none: ["warn-text", "not served by this daemon"],
    }[kind.breaker];
    cell.replaceChildren(make("div", `dot ${style}`, text));
    if (kind.pause) {
      const until = kind.pause.until === null ? "until somebody resumes it" : `until ${formatLocal(new Date(kind.pause.until))}`;
      const reason = kind.pause.reason === null ? "" : `: ${kind.pause.reason}`;
      cell.append(userText("div", "warn-text", `paused by ${kind.pause.by} since ${formatLocal(new Date(kind.pause.since))}, ${until}${reason}`));
    }
    if (kind.limit) {
      const { count, per_seconds: per, burst, by_subject: bySubject, waiting, lines } = kind.limit;
      const limit = `at most ${formatCount(count)} in ${per} s${bySubject ? " of each subject" : ""}${burst > 1 ? `, ${formatCount(burst)} at once` : ""}`;
      const end = bySubject || waiting === 0 ? "" : `, until ${formatLocal(new Date(Date.now() + (waiting * per * 1000) / count))}${waiting > 100000 ? " or later" : ""}`;
      const rows = waiting === 0 ? "none waits for its turn" : `${formatCount(waiting)}${waiting > 100000 ? " or more" : ""} wait for their turn${bySubject ? ` in ${formatCount(lines)} lines` : ""}${end}`;
      cell.append(make("div", waiting ? "warn-text" : "soft", `${limit}; ${rows}`));
    }
    if (kind.error !== null) cell.append(longUserText("soft", `last error, at ${kind.errorAt}: ${kind.error}`));
  },
  (cell, kind) => cell.replaceChildren(
    ...(kind.plugin === null ? [make("div", "soft", "–")] : [
      make("div", "", `${formatCount(kind.answered)} answered`),
      make("div", kind.failed ? "bad-text" : "soft", `${formatCount(kind.failed)} failed`),
    ]),
  ),
  (cell, kind) => cell.replaceChildren(make("div", kind.held ? "warn-text" : "soft", `${formatCount(kind.held)}${kind.heldMore ? " or more" : ""}`)),
  (cell, kind, row) => {
    const toggle = buildOnce(cell, () => {
      const onPress = (element) => (row.item.pause ? act(element, "Resuming", `api/kinds/${encodeURIComponent(row.item.kind)}/resume`, {}) : pause(element, row.item.kind));
      const toggle = actionButton("", "quiet", "", onPress);
      cell.append(make("div", "buttons", toggle));
      return toggle;
    });
    const text = kind.pause ? "Resume" : "Pause";
    if (!toggle.hasAttribute("aria-busy")) setText(toggle, text);
    setAttribute(toggle, "aria-label", makeVisible(`${text} the kind ${kind.kind}`));
  },
]);

async function pause(element, kind) {
  if (isBusy() || !(await hasToken())) return;
  setText(byId("pause-title"), makeVisible(`Pause the kind ${kind}`));
  byId("pause-for").value = "";
  byId("pause-reason").value = "";
  if (!(await openDialog(byId("pause-dialog")))) return;
  const [seconds, reason] = [byId("pause-for").value, byId("pause-reason").value.trim()];
  const body = { ...(seconds && { for_seconds: Number(seconds) }), ...(reason && { reason }) };
  await act(element, "Pausing", `api/kinds/${encodeURIComponent(kind)}/pause`, body);
}

const parked = new Table("parked", [
  (cell, row) => cell.replaceChildren(moment("ago", row.parked_at)),
  (cell, row) => cell.replaceChildren(userText("div", "strong", row.kind), ...(row.key === null ? [] : [userText("div", "", row.key)])),
  (cell, row) => cell.replaceChildren(longUserText("", row.reason), ...(row.plugin === null ? [] : [userText("div", "soft", `by ${row.plugin}`)])),
  (cell, row) => cell.replaceChildren(idButton(row.id)),
  (cell, { id, kind, key }) => buildOnce(cell, () => {
    const row = `the row ${id} of the kind ${kind}${key === null ? "" : ` with the key ${key}`}`;
    cell.append(make("div", "buttons",
      actionButton("Retry", "quiet", `Retry ${row}`, (element) => act(element, "Retrying", `api/parked/${id}/retry`, {})),
      actionButton("Drop", "quiet drop", `Drop ${row}`, async (element) => {
        if (await confirmDrop("Drop 1 parked row for good?", `It is ${row}.`)) await act(element, "Dropping", `api/parked/${id}/drop`, {});
      }),
    ));
    return true;
  }),
]);

addBulkButtons("parked", { again: "Retry", doing: "Retrying", path: "parked", things: "parked rows" });

function show(answer) {
  overview = answer;
  document.body.classList.toggle("read-only", !answer.actions);
  byId("read-only").hidden = answer.actions;
  byId("unlock").hidden = !answer.actions;
  const { database } = answer;
  if (database) setClock(database.now);

  const alarm = byId("alarm");
  alarm.hidden = answer.ready;
  setText(byId("alarm-title"), answer.ready ? "" : "Rows that fall due now are not delivered now");
  const reasons = JSON.stringify(answer.reasons);
  if (alarm.dataset.reasons !== reasons) {
    alarm.dataset.reasons = reasons;
    byId("reasons").replaceChildren(...answer.reasons.map((reason) => userText("li", "", toSentence(reason))));
  }

  showTiles(answer);
  throughput.update(answer.hour);
  lateness.update(answer.hour);
  showKinds(answer);
  if (database) {
    // An occurrence of a recurrence has no id until it is a row.
    due.show(database.next.map((row) => [row.id ?? `${row.due_at} ${row.recurrence}`, row]));
    if (database.recurrences) showRecurrences(database.recurrences);
    const { rows, or_more: more, newest } = database.parked;
    parked.show(newest.map((row) => [row.id, row]));
    showCount("parked", newest.length, more ? `more than ${formatCount(rows)}` : formatCount(rows), "The last scheduled");
  }
  showIntakes(answer.intakes);
  setText(byId("footer"), `Tidings ${answer.version} at ${answer.daemon}, up for ${formatSpan(answer.uptime_seconds)}. The plots, calls, generations and intakes are those of this daemon; all else is the same at every daemon.`);
  showBusy();
}

function figure(name, text, style, under) {
  const element = byId(`${name}-figure`);
  setText(element, text);
  element.className = `figure ${style}`;
  if (under !== undefined) setText(byId(`${name}-under`), under);
}

/** The number of rows that wait. Above 1000 it is an estimate. */
function waiting({ pending }) {
  return pending <= 1000 ? formatCount(pending) : `about ${formatCount(pending)}`;
}

function showTiles({ database, letters: counts, hour }) {
  if (database) {
    const next = database.next[0];
    if (next) {
      let time = byId("next-figure").querySelector("time");
      if (!time) byId("next-figure").replaceChildren((time = moment("due", next.at)));
      setMoment(time, "due", next.at);
      const key = next.key ?? next.recurrence;
      setText(byId("next-under"), makeVisible(key === null ? next.kind : `${next.kind} · ${key}`));
    } else {
      figure("next", "nothing", "", "no row waits for its time");
    }
    const late = database.late_seconds;
    if (late < 1) figure("late", "on time", "good", "no row that is due is waiting");
    else figure("late", formatSpan(late), late > 30 ? "bad" : "warn", "since the oldest row that nothing holds back was due");
    const held = database.held.reduce((sum, { rows }) => sum + rows, 0);
    const heldMore = database.held.some(({ or_more: more }) => more);
    const parts = [
      [held, `${formatCount(held)}${heldMore ? " or more" : ""} held`],
      [database.parked.rows, `${formatCount(database.parked.rows)}${database.parked.or_more ? " or more" : ""} parked`],
      [counts?.dead, `${formatCount(counts?.dead ?? 0)} dead letters`],
      [counts?.parked, `${formatCount(counts?.parked ?? 0)} parked letters`],
    ];
    figure("waiting", waiting(database), "", parts.filter(([rows]) => rows).map(([, text]) => text).join(" · ") || "none held, none parked, no dead letters");
  } else {
    figure("late", "unknown", "bad", "PostgreSQL does not answer");
  }
  const delivered = hour.minutes.reduce((sum, minute) => sum + minute.delivered, 0);
  const latest = Math.max(-1, ...hour.minutes.map(({ p99 }) => p99 ?? -1));
  figure("hour", formatCount(delivered), "", latest < 0 ? "none yet by this daemon" : `p99 of the worst minute: ${formatSpan(latest)}`);
}

function showKinds({ plugins, database }) {
  const problems = plugins.filter(({ problem }) => problem !== null);
  const text = JSON.stringify(problems.map(({ file, problem, active }) => [file, problem, Boolean(active)]));
  const list = byId("problems");
  if (list.dataset.text !== text) {
    list.dataset.text = text;
    list.replaceChildren(...problems.map(({ file, problem, active }) => userText("li", "", `${file} does not serve${active ? ", and the version before it goes on" : ""}: ${problem}`)));
  }
  const held = new Map((database?.held ?? []).map((entry) => [entry.kind, entry]));
  const pauses = new Map((database?.paused ?? []).map((entry) => [entry.kind, entry]));
  const limits = new Map((database?.limits ?? []).map((entry) => [entry.kind, entry]));
  const rows = plugins.flatMap(({ file, active }) => (active?.kinds ?? []).map((kind) => ({
    ...kind,
    file,
    plugin: active.plugin,
    generation: active.generation,
    error: kind.last_error,
    errorAt: kind.last_error === null ? null : errorClock(active.generation, kind),
  })));
  for (const kind of [...held.keys(), ...pauses.keys(), ...limits.keys()]) {
    if (rows.some((row) => row.kind === kind)) continue;
    rows.push({ kind, summary: "", plugin: null, breaker: "none", error: null });
  }
  rows.sort((first, second) => (first.kind < second.kind ? -1 : 1));
  kinds.show(rows.map((row) => {
    const { kind, summary, plugin, generation, file, breaker, answered, failed, error, errorAt } = row;
    const item = { kind, summary, plugin, generation, file, breaker, answered, failed, error, errorAt };
    return [kind, { ...item, held: held.get(kind)?.rows ?? 0, heldMore: held.get(kind)?.or_more ?? false, pause: pauses.get(kind) ?? null, limit: limits.get(kind) ?? null }];
  }));
}

// The daemon tells the age of an error, which differs in every answer. The time that is shown must stay the same.
const errorTimes = new Map();
function errorClock(generation, { kind, failed, last_error_seconds_ago: ago }) {
  const key = `${generation} ${kind}`;
  if (errorTimes.get(key)?.failed !== failed) errorTimes.set(key, { failed, at: formatLocal(new Date(Date.now() - ago * 1000)) });
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
    [answeredAt, failedAt] = [Date.now(), null];
    refreshLetters(overview, document.body.dataset.busy === "true");
  } catch (error) {
    failedAt ??= Date.now();
    byId("main").dataset.error = error.message;
  }
  showState();
  if (!document.hidden) timer = setTimeout(poll, POLL_INTERVAL_MS);
}

function showState() {
  const pill = byId("state");
  byId("main").classList.toggle("stale", failedAt !== null);
  if (failedAt !== null) {
    pill.className = "pill bad";
    setText(pill, `the daemon has not answered since ${formatClock(new Date(failedAt))}`);
    setText(byId("live"), answeredAt === null ? "nothing is known yet" : `the page shows the state at ${formatClock(new Date(answeredAt))}`);
  } else if (overview) {
    pill.className = `pill ${overview.ready ? "good" : "bad"}`;
    setText(pill, overview.ready ? "ready" : "not ready");
    setText(byId("live"), `live, as of ${formatClock(new Date(answeredAt))}`);
  }
  const late = overview?.database?.late_seconds ?? 0;
  document.title = failedAt !== null ? "No answer · Tidings" : late >= 1 ? `Late by ${formatSpan(late)} · Tidings` : overview && !overview.ready ? "Not ready · Tidings" : "Tidings";
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else poll();
});

setInterval(() => {
  if (document.hidden) return;
  document.querySelectorAll("time[data-form]").forEach(refreshMoment);
}, 1000);

afterAction(async (path) => {
  // An answer that is still on its way may be older than the action: ask again.
  await polling;
  await poll();
  if (path.includes("dead") || path.includes("letters")) await listLetters();
});

await poll();
document.body.dataset.loaded = "true";
