// The page: asks the daemon every two seconds, shows what it says, and does what a person asks for. Whatever users or plugins
// have written (keys, reasons, errors) is set as text and never as HTML; the page's policy forbids the browser any other way.

import { Lateness, Throughput, count, span } from "./plots.js";

const EVERY = 2000;
const LETTERS_EVERY = 10000;
const byId = (id) => document.getElementById(id);

// --- Text ---------------------------------------------------------------------------------------------------------------

// Control characters, and those that turn, hide or move the text around them.
const ODD = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb]/g;

/** What anybody may have written, with a sign in the place of each character that does not show. */
function visible(text) {
  return String(text).replace(ODD, (char) => {
    if (char === "\n") return "\u21b5 ";
    return `\u2039U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u203a`;
  });
}

/** Sets text where it has changed, so that nothing is announced or selected anew. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function set(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/** An element with text, or with children. */
function make(name, style, ...children) {
  const element = document.createElement(name);
  if (style) element.className = style;
  element.append(...children);
  return element;
}

/** Users' text in an element of its own, which goes in its own direction. */
function users(name, style, text) {
  const element = make(name, style, visible(text));
  element.dir = "auto";
  return element;
}

/** The same, where a long one is opened by who wants to read it. */
function prose(style, text) {
  if (text.length <= 180) return users("div", style, text);
  const details = make("details", `long ${style}`, users("summary", "", `${text.slice(0, 160)} …`), users("div", "", text));
  return details;
}

const clock = (at) => at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });

function local(at) {
  const today = at.toDateString() === new Date().toDateString();
  return today ? clock(at) : at.toLocaleString([], { dateStyle: "medium", timeStyle: "medium" });
}

// --- Time: that of the database, carried on by the browser's own steady clock ---------------------------------------------

let databaseAhead = null;
const now = () => (databaseAhead === null ? Date.now() : performance.now() + databaseAhead);

/** An instant that keeps saying how far it is away: "due" or "ago". */
function moment(form, text) {
  const element = document.createElement("time");
  setMoment(element, form, text);
  return element;
}

function setMoment(element, form, text) {
  element.dataset.form = form;
  set(element, "datetime", text);
  const at = new Date(text);
  set(element, "title", `${local(at)}, ${at.toISOString()}`);
  tick(element);
}

function tick(element) {
  const seconds = (new Date(element.dateTime).getTime() - now()) / 1000;
  const whole = (value) => (value >= 1 ? span(Math.floor(value)) : "now");
  if (element.dataset.form === "ago") say(element, -seconds < 1 ? "now" : `${span(Math.floor(-seconds))} ago`);
  else if (seconds > -1) say(element, seconds >= 1 ? `in ${whole(seconds)}` : "now");
  else say(element, `late by ${whole(-seconds)}`);
  element.classList.toggle("bad-text", element.dataset.form === "due" && seconds < -30);
}

// --- Tables: rows are kept as long as what they show is there, so that focus and selection stay --------------------------

/** Cells are made once for a row, and filled whenever what it shows has changed. */
class Table {
  constructor(id, columns) {
    this.table = byId(id);
    this.body = this.table.tBodies[0];
    this.empty = byId(`${id}-empty`);
    this.title = byId(`${id}-title`);
    this.columns = columns;
    this.rows = new Map();
    this.labels = [...this.table.tHead.rows[0].cells].map((cell) => cell.textContent);
  }

  /** Shows `items`, each `[key, item]`. */
  show(items) {
    const focused = document.activeElement?.closest("tr");
    const at = focused && this.body.contains(focused) ? [...this.body.rows].indexOf(focused) : -1;
    const which = at < 0 ? 0 : [...focused.querySelectorAll("button")].indexOf(document.activeElement);
    const keys = new Set(items.map(([key]) => key));
    for (const [key, row] of this.rows) {
      if (keys.has(key)) continue;
      row.element.remove();
      this.rows.delete(key);
    }
    items.forEach(([key, item], index) => {
      let row = this.rows.get(key);
      if (!row) this.rows.set(key, (row = this.row()));
      if (this.body.rows[index] !== row.element) this.body.insertBefore(row.element, this.body.rows[index] ?? null);
      const text = JSON.stringify(item);
      if (row.text === text) return;
      row.text = text;
      row.item = item;
      this.columns.forEach((fill, column) => fill(row.cells[column], item, row));
    });
    this.table.classList.toggle("empty-table", !items.length);
    if (this.empty) this.empty.hidden = items.length > 0;
    // What had the focus is gone: the same button of the next row has it, or the title.
    if (at >= 0 && !focused.isConnected) {
      const next = this.body.rows[Math.min(at, items.length - 1)];
      (next?.querySelectorAll("button")[which] ?? this.title).focus();
    }
  }

  row() {
    const element = make("tr");
    element.setAttribute("role", "row");
    const cells = this.columns.map((_, column) => {
      const cell = make("td", this.table.tHead.rows[0].cells[column].className);
      cell.setAttribute("role", "cell");
      cell.dataset.label = this.labels[column];
      element.append(cell);
      return cell;
    });
    return { element, cells };
  }
}

/** Whether what a cell shows has changed: what a person has opened in it must stay open otherwise. */
function changed(cell, ...values) {
  const text = JSON.stringify(values);
  if (cell.shown === text) return false;
  cell.shown = text;
  return true;
}

/** Fills a cell once, and lets `update` do the rest. */
function once(cell, build) {
  cell.parts ??= build(cell);
  return cell.parts;
}

function button(text, style, label, press) {
  const element = make("button", style, text);
  element.type = "button";
  element.setAttribute("aria-label", visible(label));
  element.addEventListener("click", () => press(element));
  return element;
}

/** The short form of an id, which explains its row. */
function idButton(id) {
  const short = id.length > 16 ? `${id.slice(0, 8)}…${id.slice(-6)}` : id;
  const element = button(visible(short), "bare id", `Explain ${id}`, () => explain(id, true));
  element.title = visible(id);
  return element;
}

// --- Asking and acting -----------------------------------------------------------------------------------------------------

/** What the daemon answers, or throws its sentence. */
async function ask(path, options = {}) {
  const answer = await fetch(path, { credentials: "omit", cache: "no-store", redirect: "error", ...options });
  let body;
  try {
    body = await answer.json();
  } catch {
    throw Object.assign(new Error(`an answer that is not the daemon's (status ${answer.status})`), { status: answer.status });
  }
  if (!answer.ok) throw Object.assign(new Error(body.error ?? `status ${answer.status}`), { status: answer.status });
  return body;
}

let token = sessionStorage.getItem("tidings-token");
let busy = null;

function keepToken(value) {
  token = value;
  if (value === null) sessionStorage.removeItem("tidings-token");
  else sessionStorage.setItem("tidings-token", value);
  showToken();
}

function post(path, body) {
  return ask(path, {
    method: "POST",
    headers: { Authorization: `Bearer ${token}`, "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
}

/** Opens a dialog; whether it was submitted. */
function opened(dialog) {
  return new Promise((done) => {
    const form = dialog.querySelector("form");
    let submitted = false;
    const submit = (event) => {
      event.preventDefault();
      submitted = true;
      dialog.close();
    };
    const cancel = () => dialog.close();
    form.addEventListener("submit", submit);
    dialog.querySelector("[data-cancel]").addEventListener("click", cancel);
    dialog.addEventListener("close", () => {
      form.removeEventListener("submit", submit);
      dialog.querySelector("[data-cancel]").removeEventListener("click", cancel);
      done(submitted);
    }, { once: true });
    dialog.showModal();
  });
}

/** Asks for the token until it is right or nobody wants to any more. */
async function askToken(wrong = "") {
  for (;;) {
    say(byId("token-wrong"), wrong);
    byId("token").value = "";
    if (!(await opened(byId("token-dialog")))) return false;
    const given = byId("token").value.trim();
    byId("token").value = "";
    if (!/^[\x21-\x7e]+$/.test(given)) {
      wrong = "The token is wrong: it has no spaces, and only letters, digits and signs of ASCII.";
      continue;
    }
    keepToken(given);
    try {
      await post("api/token", {});
      return true;
    } catch (error) {
      keepToken(null);
      if (error.status !== 401) return notice(`Not done: ${error.message}`, [], true), false;
      wrong = sentence(error.message);
    }
  }
}

const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

/** Says what came of something, until it is closed or something else is said. */
function notice(text, list = [], bad = false) {
  const box = make("div", bad ? "bad-notice" : "");
  const body = make("div", "", users("span", "", sentence(text)));
  if (list.length) body.append(make("ul", "", ...list.map(({ id, why }) => users("li", "", `${id ?? "one without an id"}: ${why}`))));
  const close = button("Close", "", "Close this message", () => byId("notice").replaceChildren());
  box.append(body, close);
  byId("notice").replaceChildren(box);
}

/** Does something by hand: with the token, one thing at a time, and says what came of it. */
async function act(element, doing, path, body) {
  if (busy) return notice(`${busy}: one thing at a time`);
  if (token === null && !(await askToken())) return;
  busy = doing;
  const label = element.textContent;
  const began = performance.now();
  const progress = () => say(element, performance.now() - began < 1500 ? `${doing} …` : `${doing} … ${span(Math.floor((performance.now() - began) / 1000))}`);
  progress();
  const timer = setInterval(progress, 500);
  element.setAttribute("aria-busy", "true");
  document.body.dataset.busy = "true";
  showBusy();
  try {
    for (;;) {
      try {
        const { says, stay = [] } = await post(path, body);
        notice(says, stay, stay.length > 0);
        break;
      } catch (error) {
        if (error.status === 401) {
          keepToken(null);
          if (await askToken(sentence(error.message))) continue;
        } else {
          const unknown = error.status === undefined ? ". Whether it was done is not known: look at the list" : "";
          notice(`Not done: ${error.message}${unknown}`, [], true);
        }
        break;
      }
    }
  } finally {
    clearInterval(timer);
    busy = null;
    element.removeAttribute("aria-busy");
    say(element, label);
    delete document.body.dataset.busy;
    showBusy();
  }
  // What was on its way was asked before.
  await polling;
  await poll();
  if (path.includes("dead") || path.includes("letters")) await lookAtLetters();
}

function showBusy() {
  for (const element of document.querySelectorAll("button[data-acts]")) set(element, "aria-disabled", busy ? "true" : null);
}

function actor(text, style, label, press) {
  const element = button(text, style, label, press);
  element.dataset.acts = "true";
  return element;
}

/** Asks before anything is dropped. */
async function sure(title, text) {
  if (busy) return notice(`${busy}: one thing at a time`), false;
  say(byId("drop-title"), title);
  say(byId("drop-text"), visible(text));
  return opened(byId("drop-dialog"));
}

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
  if (busy) return notice(`${busy}: one thing at a time`);
  if (token === null && !(await askToken())) return;
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

function letterTable(id, { path, again, doing, one }) {
  return new Table(id, [
    (cell, letter) => cell.replaceChildren(letter.died_at === null ? make("div", "soft", "unknown") : moment("ago", letter.died_at)),
    (cell, letter) => cell.replaceChildren(letter.kind === null ? make("div", "soft", "not said") : users("div", "strong", letter.kind)),
    (cell, letter) => cell.replaceChildren(
      letter.queue === null ? make("div", "soft", "no queue") : users("div", "", letter.queue),
      prose("soft", `${letter.reason ?? "no reason is known"}${letter.replays > 0 ? `; replayed ${count(letter.replays)} ${letter.replays === 1 ? "time" : "times"} before` : ""}`),
    ),
    (cell, letter) => cell.replaceChildren(letter.id === null ? make("div", "soft", "without an id") : idButton(letter.id)),
    (cell, { id: message }) => once(cell, () => {
      if (message === null) return cell.append(make("div", "soft", "only all at once")), true;
      cell.append(make("div", "buttons",
        actor(again, "quiet", `${again} the ${one} ${message}`, (element) => act(element, doing, `api/${path}/${again.toLowerCase()}`, { ids: [message] })),
        actor("Drop", "quiet drop", `Drop the ${one} ${message}`, async (element) => {
          if (await sure(`Drop 1 ${one} for good?`, `It is the message ${message}.`)) await act(element, "Dropping", `api/${path}/drop`, { ids: [message] });
        }),
      ));
      return true;
    }),
  ]);
}
const dead = letterTable("dead", { path: "dead", again: "Replay", doing: "Replaying", one: "dead letter" });
const letters = letterTable("letters", { path: "parked-letters", again: "Retry", doing: "Retrying", one: "parked letter" });

/** The buttons for all of them. */
function all(id, { again, doing, path, what }) {
  const place = byId(`${id}-all`);
  const counted = () => place.dataset.count ?? "";
  place.append(
    actor(`${again} all`, "quiet", `${again} all ${what}`, (element) => act(element, doing, `api/${path}/${again.toLowerCase()}`, { all: true })),
    actor("Drop all", "quiet drop", `Drop all ${what}`, async (element) => {
      if (await sure(`Drop ${counted()} ${what} for good?`, "All that lie there when it is done are dropped, shown here or not.")) await act(element, "Dropping", `api/${path}/drop`, { all: true });
    }),
  );
}
all("parked", { again: "Retry", doing: "Retrying", path: "parked", what: "parked rows" });
all("dead", { again: "Replay", doing: "Replaying", path: "dead", what: "dead letters" });
all("letters", { again: "Retry", doing: "Retrying", path: "parked-letters", what: "parked letters" });

/** How many there are, and how many of them are shown. */
function showAll(id, shown, total, order) {
  byId(`${id}-all`).hidden = total === "0";
  byId(`${id}-all`).dataset.count = total;
  say(byId(`${id}-caption`), count(shown) === total ? `${total} in all` : `${order} ${shown} of ${total}`);
}

function show(said) {
  overview = said;
  document.body.classList.toggle("read-only", !said.actions);
  byId("read-only").hidden = said.actions;
  showToken();
  const { database } = said;
  if (database) databaseAhead = new Date(database.now).getTime() - performance.now();

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
  if (!said.letters && !dead.rows.size) say(byId("dead-empty"), "RabbitMQ does not answer, so nobody can look at them.");
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
    const { pending } = database;
    figure("waiting", pending < 1000 ? count(pending) : `about ${count(pending)}`, "", parts.filter(([rows]) => rows).map(([, text]) => text).join(" · ") || "none held, none parked, no dead letters");
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

// --- Letters: looked at when their number has changed, since that is to fetch them ------------------------------------------

let lookedAt = -LETTERS_EVERY;
let lookedFor = null;
let looking = null;
say(byId("dead-empty"), "Looking …");

function lookAtLetters() {
  looking ??= look().finally(() => (looking = null));
  return looking;
}

async function look() {
  lookedAt = performance.now();
  try {
    const found = await ask("api/letters");
    lookedFor = `${found.dead.waiting} ${found.parked.waiting}`;
    for (const [id, table, { waiting, letters: shown }] of [["dead", dead, found.dead], ["letters", letters, found.parked]]) {
      const seen = new Map();
      table.show(shown.map((letter) => {
        // An id may occur twice.
        const times = (seen.get(letter.id) ?? 0) + 1;
        seen.set(letter.id, times);
        return [`${letter.id} ${times}`, letter];
      }));
      showAll(id, shown.length, count(waiting), "The first");
    }
    say(byId("dead-empty"), `None. What a consumer rejects comes here, if its queue has x-dead-letter-exchange = ${visible(overview?.exchange ?? "tidings")}.dlx.`);
    showBusy();
  } catch (error) {
    if (!dead.rows.size) {
      byId("dead-empty").hidden = false;
      say(byId("dead-empty"), visible(`They cannot be looked at now: ${error.message}.`));
    }
    lookedFor = null;
  }
}

// --- Explaining ----------------------------------------------------------------------------------------------------------------

async function explain(which, go) {
  const place = byId("explained");
  if (go) {
    byId("which").value = which;
    byId("explain-title").scrollIntoView({ block: "center" });
    byId("explain-title").focus({ preventScroll: true });
  }
  place.replaceChildren(make("p", "soft", "looking …"));
  try {
    const row = await ask(`api/rows?${new URLSearchParams({ which })}`);
    const facts = make("dl", "facts");
    const fact = (name, ...value) => facts.append(make("dt", "", name), make("dd", "", ...value));
    fact("row", users("span", "id", row.id));
    fact("kind", users("span", "", row.kind));
    if (row.key !== null) fact("key", users("span", "", row.key));
    if (row.subject !== null) fact("subject", users("span", "", row.subject));
    fact("due", `${local(new Date(row.due_at))} (`, moment(row.finished_at ? "ago" : "due", row.due_at), ")");
    if (row.expires_at !== null) fact("expires", local(new Date(row.expires_at)));
    place.replaceChildren(users("p", "verdict", sentence(row.explanation)), facts);
  } catch (error) {
    place.replaceChildren(users("p", "verdict", sentence(error.message)));
  }
}

byId("explain").addEventListener("submit", (event) => {
  event.preventDefault();
  const which = byId("which").value.trim();
  if (which) explain(which, false);
});

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
    const counts = overview.letters && `${overview.letters.dead} ${overview.letters.parked}`;
    if (!busy && counts !== null && counts !== lookedFor && performance.now() - lookedAt >= (lookedFor === null ? 5000 : LETTERS_EVERY)) lookAtLetters();
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

function showToken() {
  const unlock = byId("unlock");
  unlock.hidden = !overview?.actions;
  say(unlock, token === null ? "Give the token" : "Forget the token");
}

byId("unlock").addEventListener("click", async () => {
  if (token !== null) return keepToken(null);
  if (await askToken()) notice("the token is right; now you can act");
});

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else poll();
});

setInterval(() => {
  if (document.hidden) return;
  document.querySelectorAll("time[data-form]").forEach(tick);
}, 1000);

await poll();
showToken();
document.body.dataset.loaded = "true";
