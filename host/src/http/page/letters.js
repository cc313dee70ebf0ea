// The letters, dead and parked. They are looked at when their number has changed, since that is to fetch them.

import { act, actor, ask, showBusy, sure } from "./act.js";
import { idButton } from "./explain.js";
import { count } from "./plots.js";
import { Table, once } from "./table.js";
import { byId, make, moment, prose, say, users, visible } from "./words.js";

const EVERY = 10000;

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
export function all(id, { again, doing, path, what }) {
  const place = byId(`${id}-all`);
  const counted = () => place.dataset.count ?? "";
  place.append(
    actor(`${again} all`, "quiet", `${again} all ${what}`, (element) => act(element, doing, `api/${path}/${again.toLowerCase()}`, { all: true })),
    actor("Drop all", "quiet drop", `Drop all ${what}`, async (element) => {
      if (await sure(`Drop ${counted()} ${what} for good?`, "All that lie there when it is done are dropped, shown here or not.")) await act(element, "Dropping", `api/${path}/drop`, { all: true });
    }),
  );
}
all("dead", { again: "Replay", doing: "Replaying", path: "dead", what: "dead letters" });
all("letters", { again: "Retry", doing: "Retrying", path: "parked-letters", what: "parked letters" });

/** How many there are, and how many of them are shown. */
export function showAll(id, shown, total, order) {
  byId(`${id}-all`).hidden = total === "0";
  byId(`${id}-all`).dataset.count = total;
  say(byId(`${id}-caption`), count(shown) === total ? `${total} in all` : `${order} ${shown} of ${total}`);
}

let lookedAt = -EVERY;
let lookedFor = null;
let exchange = "tidings";
let looking = null;
say(byId("dead-empty"), "Looking …");

export function lookAtLetters() {
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
    say(byId("dead-empty"), `None. What a consumer rejects comes here, if its queue has x-dead-letter-exchange = ${visible(exchange)}.dlx.`);
    showBusy();
  } catch (error) {
    if (!dead.rows.size) {
      byId("dead-empty").hidden = false;
      say(byId("dead-empty"), visible(`They cannot be looked at now: ${error.message}.`));
    }
    lookedFor = null;
  }
}

/** Looks at them if they are others than before. `said` is the overview. */
export function noteLetters(said, busy) {
  exchange = said.exchange;
  if (!said.letters) {
    if (!dead.rows.size) say(byId("dead-empty"), "RabbitMQ does not answer, so nobody can look at them.");
    return;
  }
  const counts = `${said.letters.dead} ${said.letters.parked}`;
  const due = performance.now() - lookedAt >= (lookedFor === null ? 5000 : EVERY);
  if (!busy && counts !== lookedFor && due) lookAtLetters();
}
