// The intakes: what waits in their queues, and what this daemon takes and refuses.

import { formatCount } from "./plots.js";
import { Table, hasChanged, buildOnce } from "./table.js";
import { byId, make, longUserText, setText, userText } from "./words.js";

function takers(daemons) {
  if (daemons === null) return make("div", "soft", "RabbitMQ does not say");
  if (daemons === 0) return make("div", "warn-text", "no daemon takes them");
  return make("div", "soft", daemons === 1 ? "1 daemon takes them" : `${formatCount(daemons)} daemons take them`);
}

function formatRate(rate) {
  if (rate > 0 && rate < 0.1) return "under 0.1 a second";
  return `${formatCount(Number(rate.toFixed(rate < 10 ? 1 : 0)))} a second`;
}

const intakes = new Table("intakes", [
  (cell, { from, to, queue, problem }) => hasChanged(cell, to, queue, problem) && cell.replaceChildren(
    make("div", "strong", userText("span", "", from), " → ", userText("span", "", to)),
    make("div", "soft", "queue ", userText("span", "id", queue)),
    ...(problem === null ? [] : [longUserText("bad-text", `this daemon takes no messages: ${problem}`)]),
  ),
  (cell, { waiting, daemons }) => hasChanged(cell, waiting, daemons) && cell.replaceChildren(
    make("div", "", waiting === null ? "–" : formatCount(waiting)),
    takers(daemons),
  ),
  (cell, { taken, rate }) => hasChanged(cell, taken, rate) && cell.replaceChildren(
    make("div", "", formatCount(taken)),
    make("div", "soft", formatRate(rate)),
  ),
  (cell, { refused, last_refusal: reason }) => {
    // Built once, so that the link keeps the focus while the number grows.
    const parts = buildOnce(cell, () => {
      const link = make("a", "", "see the parked letters");
      link.href = "#letters-title";
      const parts = { count: make("div"), reason: make("div"), link, place: make("div", "", link) };
      cell.append(parts.count, parts.reason, parts.place);
      return parts;
    });
    setText(parts.count, formatCount(refused));
    parts.count.className = refused ? "warn-text" : "";
    if (hasChanged(parts.reason, reason)) parts.reason.replaceChildren(...(reason === null ? [] : [longUserText("soft", `last: ${reason}`)]));
    parts.reason.hidden = reason === null;
    // A daemon that starts again has refused nothing yet. The focus would be lost with the link.
    if (!refused && document.activeElement === parts.link) byId("intakes-title").focus();
    parts.place.hidden = !refused;
  },
]);

/** Shows the intakes of an overview. There is no section for them while there are none. */
export function showIntakes(list) {
  intakes.show(list.map((intake) => [intake.from, intake]));
  const section = byId("intakes-section");
  // The focus would be lost with the section. The title before it may be hidden, so it moves to the one after it.
  if (!list.length && section.contains(document.activeElement)) byId("parked-title").focus();
  section.hidden = !list.length;
}
