// Requests to the daemon, and the actions of a person: with the token, one at a time.

import { formatSpan } from "./plots.js";
import { button, byId, make, setText, toSentence, setAttribute, userText, makeVisible } from "./words.js";

/** Sends a request and returns the daemon's answer; throws an error with the daemon's sentence if it refuses. */
export async function ask(path, options = {}) {
  const answer = await fetch(path, { credentials: "omit", cache: "no-store", redirect: "error", ...options });
  let body;
  try {
    body = await answer.json();
  } catch {
    throw Object.assign(new Error(`the answer does not come from the daemon (status ${answer.status})`), { status: answer.status });
  }
  if (!answer.ok) throw Object.assign(new Error(body.error ?? `status ${answer.status}`), { status: answer.status });
  return body;
}

let afterActionHook = async () => {};

/** Sets the function that is awaited after each action, with the action's path. */
export function afterAction(hook) {
  afterActionHook = hook;
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

/** Opens a dialog, and returns whether it was submitted. */
export function openDialog(dialog) {
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

/** Asks for the token until it is right or the person cancels; returns whether there is one. */
async function askToken(wrong = "") {
  for (;;) {
    setText(byId("token-wrong"), wrong);
    byId("token").value = "";
    if (!(await openDialog(byId("token-dialog")))) return false;
    const given = byId("token").value.trim();
    byId("token").value = "";
    if (!/^[\x21-\x7e]+$/.test(given)) {
      wrong = "The token is wrong: a token has only printable ASCII characters, and no spaces.";
      continue;
    }
    keepToken(given);
    try {
      await post("api/token", {});
      return true;
    } catch (error) {
      keepToken(null);
      if (error.status !== 401) return notice(`Not done: ${error.message}`, [], true), false;
      wrong = toSentence(error.message);
    }
  }
}

/** Shows a message until it is closed or another one is shown. `list` has the things with which the action could not be done. */
export function notice(text, list = [], bad = false) {
  const box = make("div", bad ? "bad-notice" : "");
  const body = make("div", "", userText("span", "", toSentence(text)));
  if (list.length) body.append(make("ul", "", ...list.map(({ id, why }) => userText("li", "", `${id ?? "a message without an id"}: ${why}`))));
  const close = button("Close", "", "Close this message", () => byId("notice").replaceChildren());
  box.append(body, close);
  byId("notice").replaceChildren(box);
}

/** Whether an action is running; if so, a message says it. */
export function isBusy() {
  if (busy) notice(`${busy} has not ended yet: one action at a time`);
  return busy !== null;
}

/** Whether there is a token; asks for it if there is none. */
export async function hasToken() {
  return token !== null || askToken();
}

/** Does an action with the token, and shows its result. Does nothing while another action is running. */
export async function act(element, doing, path, body) {
  if (isBusy()) return;
  if (!(await hasToken())) return;
  busy = doing;
  const label = element.textContent;
  const began = performance.now();
  const progress = () => setText(element, performance.now() - began < 1500 ? `${doing} …` : `${doing} … ${formatSpan(Math.floor((performance.now() - began) / 1000))}`);
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
          if (await askToken(toSentence(error.message))) continue;
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
    setText(element, label);
    delete document.body.dataset.busy;
    showBusy();
  }
  await afterActionHook(path);
}

export function showBusy() {
  for (const element of document.querySelectorAll("button[data-acts]")) setAttribute(element, "aria-disabled", busy ? "true" : null);
}

export function actionButton(text, style, label, onPress) {
  const element = button(text, style, label, onPress);
  element.dataset.acts = "true";
  return element;
}

/** Asks for confirmation before something is dropped. `answer` is on the button that confirms. */
export async function confirmDrop(title, text, answer = "Drop for good") {
  if (isBusy()) return false;
  setText(byId("drop-title"), title);
  setText(byId("drop-text"), makeVisible(text));
  setText(byId("drop-dialog").querySelector("button.danger"), answer);
  return openDialog(byId("drop-dialog"));
}

/** Shows whether there is a token. */
function showToken() {
  const unlock = byId("unlock");
  setText(unlock, token === null ? "Give the token" : "Forget the token");
}

byId("unlock").addEventListener("click", async () => {
  if (token !== null) return keepToken(null);
  if (await askToken()) notice("the token is right; now you can act");
});

showToken();
