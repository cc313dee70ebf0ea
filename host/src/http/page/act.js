// What is asked of the daemon, and what a person does by hand: with the token, one thing at a time.

import { span } from "./plots.js";
import { button, byId, make, say, sentence, set, users, visible } from "./words.js";

/** What the daemon answers, or throws its sentence. */
export async function ask(path, options = {}) {
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

let afterwards = async () => {};

/** From now on `look` is awaited after whatever was done, with its path. */
export function afterActing(look) {
  afterwards = look;
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
export function opened(dialog) {
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

/** Says what came of something, until it is closed or something else is said. */
export function notice(text, list = [], bad = false) {
  const box = make("div", bad ? "bad-notice" : "");
  const body = make("div", "", users("span", "", sentence(text)));
  if (list.length) body.append(make("ul", "", ...list.map(({ id, why }) => users("li", "", `${id ?? "one without an id"}: ${why}`))));
  const close = button("Close", "", "Close this message", () => byId("notice").replaceChildren());
  box.append(body, close);
  byId("notice").replaceChildren(box);
}

/** Whether something is being done; then it is said. */
export function isBusy() {
  if (busy) notice(`${busy}: one thing at a time`);
  return busy !== null;
}

/** Whether there is a token, asked for if need be. */
export async function hasToken() {
  return token !== null || askToken();
}

/** Does something by hand: with the token, one thing at a time, and says what came of it. */
export async function act(element, doing, path, body) {
  if (isBusy()) return;
  if (!(await hasToken())) return;
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
  await afterwards(path);
}

export function showBusy() {
  for (const element of document.querySelectorAll("button[data-acts]")) set(element, "aria-disabled", busy ? "true" : null);
}

export function actor(text, style, label, press) {
  const element = button(text, style, label, press);
  element.dataset.acts = "true";
  return element;
}

/** Asks before anything is dropped. */
export async function sure(title, text) {
  if (isBusy()) return false;
  say(byId("drop-title"), title);
  say(byId("drop-text"), visible(text));
  return opened(byId("drop-dialog"));
}

/** Says whether there is a token. */
function showToken() {
  const unlock = byId("unlock");
  say(unlock, token === null ? "Give the token" : "Forget the token");
}

byId("unlock").addEventListener("click", async () => {
  if (token !== null) return keepToken(null);
  if (await askToken()) notice("the token is right; now you can act");
});

showToken();
