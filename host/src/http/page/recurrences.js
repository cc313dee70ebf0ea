// The recurrences: when the next occurrence of each is due, why there is none, and buttons to pause and stop it.

import { act, actionButton, confirmDrop } from "./act.js";
import { formatCount } from "./plots.js";
import { Table, hasChanged, buildOnce } from "./table.js";
import { byId, make, moment, longUserText, setAttribute, setText, userText, makeVisible } from "./words.js";

// A name may have slashes, so it is encoded as one part of the path.
const actionPath = (name, action) => `api/recurrences/${encodeURIComponent(name)}/${action}`;

function nextOccurrence({ due_at: at, problem, paused, ended }) {
  if (paused) return make("div", "warn-text", "paused");
  if (ended) return make("div", "soft", "ended");
  if (at !== null) return moment("due", at);
  return problem === null ? make("div", "soft", "not computed yet") : make("div", "bad-text", "none");
}

const recurrences = new Table("recurrences", [
  (cell, recurrence) => cell.replaceChildren(nextOccurrence(recurrence)),
  (cell, { name, kind, subject }) => hasChanged(cell, kind, subject) && cell.replaceChildren(
    userText("div", "strong", name),
    userText("div", "", kind),
    ...(subject === null ? [] : [userText("div", "soft", `about ${subject}`)]),
  ),
  (cell, { rule, words, time_zone: zone, problem }) => hasChanged(cell, rule, words, zone, problem) && cell.replaceChildren(
    make("div", "", words ?? "not readable"),
    make("div", "soft", userText("span", "id", rule), ", ", userText("span", "", zone)),
    ...(problem === null ? [] : [longUserText("bad-text", problem)]),
  ),
  (cell, { count, max_count: most, last_at: last }) => cell.replaceChildren(
    make("div", "", most === null ? formatCount(count) : `${formatCount(count)} of ${formatCount(most)}`),
    ...(last === null ? [] : [make("div", "soft", "last: ", moment("ago", last))]),
  ),
  (cell, { name, paused }, row) => {
    const toggle = buildOnce(cell, () => {
      const onToggle = (element) => (row.item.paused ? act(element, "Resuming", actionPath(name, "resume"), {}) : act(element, "Pausing", actionPath(name, "pause"), {}));
      const toggle = actionButton("", "quiet", "", onToggle);
      const stop = actionButton("Stop", "quiet drop", `Stop the recurrence ${name}`, async (element) => {
        const text = `It is ${name}. Its occurrences that wait are removed too.`;
        if (await confirmDrop("Stop 1 recurrence for good?", text, "Stop for good")) await act(element, "Stopping", actionPath(name, "stop"), {});
      });
      cell.append(make("div", "buttons", toggle, stop));
      return toggle;
    });
    const text = paused ? "Resume" : "Pause";
    if (!toggle.hasAttribute("aria-busy")) setText(toggle, text);
    setAttribute(toggle, "aria-label", makeVisible(`${text} the recurrence ${name}`));
  },
]);

/** Shows the recurrences of an overview. There is no section for them while there are none. */
export function showRecurrences({ all, or_more: more, problems, list }) {
  const total = more ? `more than ${formatCount(all)}` : formatCount(all);
  const shown = list.length >= all && !more ? `${total} in all` : `The first ${formatCount(list.length)} of ${total}`;
  setText(byId("recurrences-caption"), problems ? `${shown}, ${formatCount(problems)} with a problem` : shown);
  recurrences.show(list.map((recurrence) => [recurrence.name, recurrence]));
  const section = byId("recurrences-section");
  // The focus would be lost with the section.
  if (!list.length && section.contains(document.activeElement)) byId("kinds-title").focus();
  section.hidden = !list.length;
}
