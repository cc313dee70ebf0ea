// Text and times on the page. What users or plugins have written becomes text and never HTML; the page's Content-Security-Policy
// makes the browser enforce that.

import { formatSpan } from "./plots.js";

export const byId = (id) => document.getElementById(id);

// Control characters, and characters that reverse, hide or move the text around them.
const ODD = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb]/g;

/** A text of users, in which each invisible character is replaced by its code. */
export function makeVisible(text) {
  return String(text).replace(ODD, (char) => {
    if (char === "\n") return "\u21b5 ";
    return `\u2039U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u203a`;
  });
}

/** Sets the text of an element only if it has changed, so that screen readers and selections are not disturbed. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/** Makes an element with text or children. */
export function make(name, style, ...children) {
  const element = document.createElement(name);
  if (style) element.className = style;
  element.append(...children);
  return element;
}

/** Makes an element with a text of users, which has its own writing direction. */
export function userText(name, style, text) {
  const element = make(name, style, makeVisible(text));
  element.dir = "auto";
  return element;
}

/** The same for a text that may be long: a long one is folded. */
export function longUserText(style, text) {
  if (text.length <= 180) return userText("div", style, text);
  return make("details", `long ${style}`, userText("summary", "", `${text.slice(0, 160)} …`), userText("div", "", text));
}

export const formatClock = (at) => at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export function formatLocal(at) {
  const today = at.toDateString() === new Date().toDateString();
  return today ? formatClock(at) : at.toLocaleString([], { dateStyle: "medium", timeStyle: "medium" });
}

// --- Times: by the database's clock, which the browser's monotonic clock carries on ---------------------------------------

let databaseAhead = null;
let answeredAt = null;

/** Sets the database's time at which the current answer was made. */
export function setClock(text) {
  answeredAt = new Date(text).getTime();
  const ahead = answeredAt - performance.now();
  // An answer may be a second old, so a small step back is ignored. A step of 5 s or more is a change of the database's clock.
  const isOld = databaseAhead !== null && ahead < databaseAhead && databaseAhead - ahead < 5000;
  if (!isOld) databaseAhead = ahead;
}

const now = () => (databaseAhead === null ? Date.now() : performance.now() + databaseAhead);

/** Makes an element that shows how far away an instant is, and keeps it up to date. `form` is "due" or "ago". */
export function moment(form, text) {
  const element = document.createElement("time");
  setMoment(element, form, text);
  return element;
}

export function setMoment(element, form, text) {
  element.dataset.form = form;
  setAttribute(element, "datetime", text);
  const at = new Date(text);
  setAttribute(element, "title", `${formatLocal(at)}, ${at.toISOString()}`);
  refreshMoment(element);
}

/** Updates how far away the instant is. The lateness of a row is that at the time of the answer: the row may have been delivered
    since. */
export function refreshMoment(element) {
  const at = new Date(element.dateTime).getTime();
  const [seconds, late] = [(at - now()) / 1000, answeredAt === null ? 0 : (answeredAt - at) / 1000];
  if (element.dataset.form === "ago") setText(element, -seconds < 1 ? "now" : `${formatSpan(Math.floor(-seconds))} ago`);
  else if (late >= 1) setText(element, `late by ${formatSpan(Math.floor(late))}`);
  else setText(element, seconds >= 1 ? `in ${formatSpan(Math.floor(seconds))}` : "now");
  element.classList.toggle("bad-text", element.dataset.form === "due" && late > 30);
}

export function button(text, style, label, onPress) {
  const element = make("button", style, text);
  element.type = "button";
  element.setAttribute("aria-label", makeVisible(label));
  element.addEventListener("click", () => onPress(element));
  return element;
}

/** With a capital letter and a full stop. */
export const toSentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
