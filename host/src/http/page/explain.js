// The search for a row: shows where it is, and why.

import { ask } from "./act.js";
import { button, byId, formatLocal, make, moment, toSentence, userText, makeVisible } from "./words.js";

export async function explain(which, scroll) {
  const place = byId("explained");
  if (scroll) {
    byId("which").value = which;
    byId("explain-title").scrollIntoView({ block: "center" });
    byId("explain-title").focus({ preventScroll: true });
  }
  place.replaceChildren(make("p", "soft", "looking …"));
  try {
    const row = await ask(`api/rows?${new URLSearchParams({ which })}`);
    const facts = make("dl", "facts");
    const fact = (name, ...value) => facts.append(make("dt", "", name), make("dd", "", ...value));
    fact("row", userText("span", "id", row.id));
    fact("kind", userText("span", "", row.kind));
    if (row.key !== null) fact("key", userText("span", "", row.key));
    if (row.subject !== null) fact("subject", userText("span", "", row.subject));
    fact("due", `${formatLocal(new Date(row.due_at))} (`, moment(row.finished_at ? "ago" : "due", row.due_at), ")");
    if (row.expires_at !== null) fact("expires", formatLocal(new Date(row.expires_at)));
    place.replaceChildren(userText("p", "verdict", toSentence(row.explanation)), facts);
  } catch (error) {
    place.replaceChildren(userText("p", "verdict", toSentence(error.message)));
  }
}

byId("explain").addEventListener("submit", (event) => {
  event.preventDefault();
  const which = byId("which").value.trim();
  if (which) explain(which, false);
});

/** A button with the short form of an id, which explains its row. */
export function idButton(id) {
  const short = id.length > 16 ? `${id.slice(0, 8)}…${id.slice(-6)}` : id;
  const element = button(makeVisible(short), "bare id", `Explain ${id}`, () => explain(id, true));
  element.title = makeVisible(id);
  return element;
}
