// Text and time, as they are shown. Whatever users or plugins have written becomes text and never HTML; the page's policy
// forbids the browser any other way.

import { span } from "./plots.js";

export const byId = (id) => document.getElementById(id);

// Control characters, and those that turn, hide or move the text around them.
const ODD = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb]/g;

/** What anybody may have written, with a sign in the place of each character that does not show. */
export function visible(text) {
  return String(text).replace(ODD, (char) => {
    if (char === "\n") return "\u21b5 ";
    return `\u2039U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u203a`;
  });
}

/** Sets text where it has changed, so that nothing is announced or selected anew. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function set(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/** An element with text, or with children. */
export function make(name, style, ...children) {
  const element = document.createElement(name);
  if (style) element.className = style;
  element.append(...children);
  return element;
}

/** Users' text in an element of its own, which goes in its own direction. */
export function users(name, style, text) {
  const element = make(name, style, visible(text));
  element.dir = "auto";
  return element;
}

/** The same, where a long one is opened by who wants to read it. */
export function prose(style, text) {
  if (text.length <= 180) return users("div", style, text);
  const details = make("details", `long ${style}`, users("summary", "", `${text.slice(0, 160)} …`), users("div", "", text));
  return details;
}

export const clock = (at) => at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export function local(at) {
  const today = at.toDateString() === new Date().toDateString();
  return today ? clock(at) : at.toLocaleString([], { dateStyle: "medium", timeStyle: "medium" });
}

// --- Time: that of the database, carried on by the browser's own steady clock ---------------------------------------------

let databaseAhead = null;
let answeredAt = null;

/** Notes what the database's clock said when the answer that is shown now was made. */
export function setClock(text) {
  answeredAt = new Date(text).getTime();
  const ahead = answeredAt - performance.now();
  // An answer may be a second old when it comes: the clock is never behind the newest that came. A larger step is the clock's own.
  const isOld = databaseAhead !== null && ahead < databaseAhead && databaseAhead - ahead < 5000;
  if (!isOld) databaseAhead = ahead;
}

const now = () => (databaseAhead === null ? Date.now() : performance.now() + databaseAhead);

/** An instant that keeps saying how far it is away: "due" or "ago". */
export function moment(form, text) {
  const element = document.createElement("time");
  setMoment(element, form, text);
  return element;
}

export function setMoment(element, form, text) {
  element.dataset.form = form;
  set(element, "datetime", text);
  const at = new Date(text);
  set(element, "title", `${local(at)}, ${at.toISOString()}`);
  tick(element);
}

/** Says anew how far away the instant is. A row is late only by as much as it was when the answer was made: since then it may
    have been delivered. */
export function tick(element) {
  const at = new Date(element.dateTime).getTime();
  const [seconds, late] = [(at - now()) / 1000, answeredAt === null ? 0 : (answeredAt - at) / 1000];
  if (element.dataset.form === "ago") say(element, -seconds < 1 ? "now" : `${span(Math.floor(-seconds))} ago`);
  else if (late >= 1) say(element, `late by ${span(Math.floor(late))}`);
  else say(element, seconds >= 1 ? `in ${span(Math.floor(seconds))}` : "now");
  element.classList.toggle("bad-text", element.dataset.form === "due" && late > 30);
}

export function button(text, style, label, press) {
  const element = make("button", style, text);
  element.type = "button";
  element.setAttribute("aria-label", visible(label));
  element.addEventListener("click", () => press(element));
  return element;
}

/** With a capital letter and a full stop. */
export const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
