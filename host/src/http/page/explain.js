// Where a row is, and why.

import { ask } from "./act.js";
import { button, byId, local, make, moment, sentence, users, visible } from "./words.js";

export async function explain(which, go) {
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

/** The short form of an id, which explains its row. */
export function idButton(id) {
  const short = id.length > 16 ? `${id.slice(0, 8)}…${id.slice(-6)}` : id;
  const element = button(visible(short), "bare id", `Explain ${id}`, () => explain(id, true));
  element.title = visible(id);
  return element;
}
