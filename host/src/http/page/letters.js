// The dead letters, and the parked ones. They are listed only when their number has changed, since RabbitMQ must deliver them for
// that.

import { act, actionButton, ask, showBusy, confirmDrop } from "./act.js";
import { idButton } from "./explain.js";
import { formatCount } from "./plots.js";
import { Table, buildOnce } from "./table.js";
import { byId, make, moment, longUserText, setText, userText, makeVisible } from "./words.js";

const MIN_INTERVAL_MS = 10000;
const RETRY_INTERVAL_MS = 5000;

function letterTable(id, { path, again, doing, thing }) {
  return new Table(id, [
    (cell, letter) => cell.replaceChildren(letter.died_at === null ? make("div", "soft", "unknown") : moment("ago", letter.died_at)),
    (cell, letter) => cell.replaceChildren(letter.kind === null ? make("div", "soft", "unknown") : userText("div", "strong", letter.kind)),
    (cell, letter) => cell.replaceChildren(
      letter.queue === null ? make("div", "soft", "no queue") : userText("div", "", letter.queue),
      longUserText("soft", `${letter.reason ?? "no reason is known"}${letter.replays > 0 ? `; replayed ${formatCount(letter.replays)} ${letter.replays === 1 ? "time" : "times"} before` : ""}`),
    ),
    (cell, letter) => cell.replaceChildren(letter.id === null ? make("div", "soft", "without an id") : idButton(letter.id)),
    (cell, { id: message }) => buildOnce(cell, () => {
      if (message === null) return cell.append(make("div", "soft", "use the buttons for all")), true;
      cell.append(make("div", "buttons",
        actionButton(again, "quiet", `${again} the ${thing} ${message}`, (element) => act(element, doing, `api/${path}/${again.toLowerCase()}`, { ids: [message] })),
        actionButton("Drop", "quiet drop", `Drop the ${thing} ${message}`, async (element) => {
          if (await confirmDrop(`Drop 1 ${thing} for good?`, `It is the message ${message}.`)) await act(element, "Dropping", `api/${path}/drop`, { ids: [message] });
        }),
      ));
      return true;
    }),
  ]);
}
const dead = letterTable("dead", { path: "dead", again: "Replay", doing: "Replaying", thing: "dead letter" });
const letters = letterTable("letters", { path: "parked-letters", again: "Retry", doing: "Retrying", thing: "parked letter" });

/** Adds the buttons that act on all things of a table. */
export function addBulkButtons(id, { again, doing, path, things }) {
  const place = byId(`${id}-all`);
  const total = () => place.dataset.count ?? "";
  place.append(
    actionButton(`${again} all`, "quiet", `${again} all ${things}`, (element) => act(element, doing, `api/${path}/${again.toLowerCase()}`, { all: true })),
    actionButton("Drop all", "quiet drop", `Drop all ${things}`, async (element) => {
      if (await confirmDrop(`Drop ${total()} ${things} for good?`, "This drops all that are there at that moment, also those that are not shown here.")) await act(element, "Dropping", `api/${path}/drop`, { all: true });
    }),
  );
}
addBulkButtons("dead", { again: "Replay", doing: "Replaying", path: "dead", things: "dead letters" });
addBulkButtons("letters", { again: "Retry", doing: "Retrying", path: "parked-letters", things: "parked letters" });

/** Shows how many things there are, and how many of them are in the table. */
export function showCount(id, shown, total, order) {
  byId(`${id}-all`).hidden = total === "0";
  byId(`${id}-all`).dataset.count = total;
  setText(byId(`${id}-caption`), formatCount(shown) === total ? `${total} in all` : `${order} ${shown} of ${total}`);
}

let listedAt = -MIN_INTERVAL_MS;
let listedCounts = null;
let exchange = "tidings";
let listing = null;
setText(byId("dead-empty"), "Looking …");

export function listLetters() {
  listing ??= list().finally(() => (listing = null));
  return listing;
}

async function list() {
  listedAt = performance.now();
  try {
    const found = await ask("api/letters");
    listedCounts = `${found.dead.waiting} ${found.parked.waiting}`;
    for (const [id, table, { waiting, letters: shown }] of [["dead", dead, found.dead], ["letters", letters, found.parked]]) {
      const seen = new Map();
      table.show(shown.map((letter) => {
        // Two dead letters may have the same id.
        const times = (seen.get(letter.id) ?? 0) + 1;
        seen.set(letter.id, times);
        return [`${letter.id} ${times}`, letter];
      }));
      showCount(id, shown.length, formatCount(waiting), "The first");
    }
    setText(byId("dead-empty"), `None. A message that a consumer rejects comes here if its queue has x-dead-letter-exchange = ${makeVisible(exchange)}.dlx.`);
    showBusy();
  } catch (error) {
    if (!dead.rows.size) {
      byId("dead-empty").hidden = false;
      setText(byId("dead-empty"), makeVisible(`They cannot be listed now: ${error.message}.`));
    }
    listedCounts = null;
  }
}

/** Lists the dead letters again if the counts in the overview have changed. */
export function refreshLetters(overview, busy) {
  exchange = overview.exchange;
  if (!overview.letters) {
    if (!dead.rows.size) setText(byId("dead-empty"), "RabbitMQ does not answer, so they cannot be listed.");
    return;
  }
  const counts = `${overview.letters.dead} ${overview.letters.parked}`;
  const isTime = performance.now() - listedAt >= (listedCounts === null ? RETRY_INTERVAL_MS : MIN_INTERVAL_MS);
  if (!busy && counts !== listedCounts && isTime) listLetters();
}
