// The two plots of the last hour, as SVG that is built here. Each can be read with the pointer, with the arrow keys, and as a
// table. They show only numbers, never text of users.

const SVG = "http://www.w3.org/2000/svg";

/** The outcomes of attempts, from the bottom of a bar to its top: the field, and its name. */
export const OUTCOMES = [
  ["delivered", "delivered"],
  ["skipped", "skipped"],
  ["expired", "expired"],
  ["again", "tried again later"],
  ["parked", "parked"],
  ["held", "held"],
];

const number = new Intl.NumberFormat("en");

/** Writes a count for people. */
export const formatCount = (value) => number.format(value);

/** Writes a time in seconds for people, with two or three digits. */
export function formatSpan(seconds) {
  const digits = (value) => String(Number(value.toPrecision(value < 10 ? 2 : 3)));
  if (seconds <= 0) return "0 s";
  if (seconds < 0.001) return "under 1 ms";
  if (seconds < 0.9995) return `${digits(seconds * 1000)} ms`;
  if (seconds < 59.95) return `${digits(seconds)} s`;
  const whole = Math.round(seconds);
  const two = (large, word, small, next) => (small ? `${large} ${word} ${small} ${next}` : `${large} ${word}`);
  if (whole < 3600) return two(Math.floor(whole / 60), "min", whole % 60, "s");
  const minutes = Math.round(seconds / 60);
  if (minutes < 1440) return two(Math.floor(minutes / 60), "h", minutes % 60, "min");
  const hours = Math.round(seconds / 3600);
  if (hours < 24 * 365) return two(Math.floor(hours / 24), "d", hours % 24, "h");
  const days = Math.round(seconds / 86400);
  return two(Math.floor(days / 365), "y", days % 365, "d");
}

function draw(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function make(parent, name, attributes = {}, text) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

/** Rounds up to 1, 2, 4, 5 or 10 times a power of ten. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 4, 5, 10].map((step) => step * power).find((step) => step >= value);
}

/** Names the minute that was `ago` minutes before `ended`. */
function minuteName(ago, ended) {
  const clock = new Date(ended - ago * 60000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  return ago === 0 ? "This minute" : `${ago} min ago (${clock})`;
}

const LEFT = 58;
const RIGHT = 10;
const TOP = 12;
const BOTTOM = 24;

class Plot {
  constructor(figure, { title, legend, columns }) {
    this.columns = columns;
    this.minutes = [];
    this.at = null;
    const caption = make(figure, "figcaption");
    const name = make(caption, "h2", { id: `${figure.id}-title` }, title);
    const keys = make(caption, "p", { class: "legend", "aria-hidden": "true" });
    for (const [style, text] of legend) make(keys, "span", { class: style }, text);
    this.svg = draw(figure, "svg", {
      role: "slider",
      tabindex: "0",
      "aria-labelledby": name.id,
      "aria-orientation": "horizontal",
      "aria-valuemin": "-60",
      "aria-valuemax": "0",
    });
    this.readout = make(figure, "output", { class: "readout", "aria-live": "off" });
    this.details = make(figure, "details");
    make(this.details, "summary", {}, "As a table");
    this.tabular = make(this.details, "div", { tabindex: "0", role: "region", "aria-label": `${title}, as a table` });
    this.details.addEventListener("toggle", () => this.tabulate());

    this.svg.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerdown", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.choose(null));
    this.svg.addEventListener("blur", () => this.choose(null));
    this.svg.addEventListener("keydown", (event) => {
      const last = this.minutes.length - 1;
      const now = this.at ?? last;
      const to = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, PageUp: now + 10, PageDown: now - 10, Home: 0, End: last }[event.key];
      if (event.key === "Escape") this.choose(null);
      if (to === undefined) return;
      event.preventDefault();
      this.choose(Math.max(0, Math.min(last, to)));
    });
    new ResizeObserver(() => this.render()).observe(this.svg);
  }

  update(hour) {
    this.minutes = hour.minutes;
    this.ended = Date.now();
    this.render();
    this.tabulate();
  }

  x(index) {
    return LEFT + ((index + 0.5) * (this.width - LEFT - RIGHT)) / this.minutes.length;
  }

  point(x) {
    const index = Math.floor(((x - LEFT) * this.minutes.length) / (this.width - LEFT - RIGHT));
    this.choose(index >= 0 && index < this.minutes.length ? index : null);
  }

  choose(index) {
    if (index === this.at) return;
    this.at = index;
    this.render();
  }

  render() {
    this.width = this.svg.clientWidth;
    this.height = this.svg.clientHeight;
    if (!this.width || !this.minutes.length) return;
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.svg.replaceChildren();
    this.paint();
    const base = this.height - BOTTOM;
    for (const ago of [60, 45, 30, 15, 0]) {
      const x = this.x(this.minutes.length - 1 - ago);
      const text = ago === 0 ? "now" : ago === 60 ? (this.width > 420 ? "60 min ago" : "60 min") : String(ago);
      draw(this.svg, "text", { x: ago === 60 ? LEFT : x, y: base + 17, "text-anchor": { 60: "start", 0: "end" }[ago] ?? "middle" }, text);
    }
    if (this.at !== null) {
      const x = this.x(this.at);
      draw(this.svg, "line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: base });
    }
    const last = this.minutes.length - 1;
    const index = this.at ?? last;
    const says = `${minuteName(last - index, this.ended)}: ${this.say(this.minutes[index])}`;
    this.svg.setAttribute("aria-valuenow", String(index - last));
    this.svg.setAttribute("aria-valuetext", says);
    const shown = this.at === null ? this.sum() : says;
    if (this.readout.textContent !== shown) this.readout.textContent = shown;
  }

  /** Draws a horizontal line with its label. */
  level(y, text) {
    draw(this.svg, "line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y });
    draw(this.svg, "text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, text);
  }

  nothing(text) {
    const middle = { x: (LEFT + this.width - RIGHT) / 2, y: this.height / 2, "text-anchor": "middle", class: "nothing" };
    draw(this.svg, "text", middle, text);
  }

  tabulate() {
    if (!this.details.open) return;
    const table = document.createElement("table");
    const head = make(make(table, "thead"), "tr");
    for (const [title] of [["Minute"], ...this.columns]) make(head, "th", { scope: "col" }, title);
    const body = make(table, "tbody");
    const last = this.minutes.length - 1;
    for (let index = last; index >= 0; index -= 1) {
      const row = make(body, "tr");
      make(row, "td", {}, minuteName(last - index, this.ended));
      for (const [, show] of this.columns) make(row, "td", {}, show(this.minutes[index]));
    }
    this.tabular.replaceChildren(table);
  }
}

/** The rows per minute, by outcome. */
export class Throughput extends Plot {
  constructor(figure) {
    super(figure, {
      title: "Rows per minute",
      legend: OUTCOMES,
      columns: OUTCOMES.map(([field, name]) => [name, (minute) => formatCount(minute[field])]),
    });
  }

  paint() {
    const total = (minute) => OUTCOMES.reduce((sum, [field]) => sum + minute[field], 0);
    const most = Math.max(...this.minutes.map(total));
    const top = roundUp(most);
    const base = this.height - BOTTOM;
    const y = (value) => base - ((base - TOP) * value) / top;
    for (const part of top === 1 ? [0, 1] : [0, 0.25, 0.5, 0.75, 1]) {
      if (Number.isInteger(top * part) || part === 0.5) this.level(y(top * part), formatCount(top * part));
    }
    if (most === 0) this.nothing("Nothing was due in this hour");
    const width = Math.max(1.5, ((this.width - LEFT - RIGHT) / this.minutes.length) * 0.76);
    this.minutes.forEach((minute, index) => {
      let below = 0;
      for (const [field] of OUTCOMES) {
        if (!minute[field]) continue;
        const high = y(below + minute[field]);
        // A small number among large ones must still be visible.
        const tall = Math.max(y(below) - high, 1.5);
        draw(this.svg, "rect", { class: field, x: this.x(index) - width / 2, y: y(below) - tall, width, height: tall });
        below += minute[field];
      }
    });
  }

  say(minute) {
    const parts = OUTCOMES.filter(([field]) => minute[field]).map(([field, name]) => `${formatCount(minute[field])} ${name}`);
    return parts.join(", ") || "nothing";
  }

  sum() {
    const sums = Object.fromEntries(
      OUTCOMES.map(([field]) => [field, this.minutes.reduce((sum, minute) => sum + minute[field], 0)]),
    );
    return `In the hour: ${this.say(sums)}. The last bar is the minute that has begun.`;
  }
}

const LEVELS = [
  [0.001, "1 ms"], [0.01, "10 ms"], [0.1, "100 ms"], [1, "1 s"], [10, "10 s"], [60, "1 min"], [600, "10 min"],
  [3600, "1 h"], [36000, "10 h"], [864000, "10 d"], [31536000, "1 y"], [315360000, "10 y"],
];

/** The lateness of delivered rows. */
export class Lateness extends Plot {
  constructor(figure) {
    const time = (value) => (value === null ? "–" : formatSpan(value));
    super(figure, {
      title: "Lateness",
      legend: [["p50", "half of them (p50)"], ["p99", "99 in 100 (p99)"]],
      columns: [["p50", (minute) => time(minute.p50)], ["p99", (minute) => time(minute.p99)], ["latest", (minute) => time(minute.max)]],
    });
  }

  paint() {
    const values = this.minutes.flatMap(({ p50, p99 }) => [p50, p99]).filter((value) => value !== null);
    const most = Math.max(0.1, ...values);
    const least = Math.min(0.01, ...values);
    const last = LEVELS.findIndex(([value]) => value >= most);
    const levels = LEVELS.slice(
      Math.max(0, LEVELS.findLastIndex(([value]) => value <= least)),
      last < 0 ? LEVELS.length : last + 1,
    );
    const low = Math.log10(levels[0][0]);
    const high = Math.log10(levels.at(-1)[0]);
    const base = this.height - BOTTOM;
    const y = (value) => {
      const part = (Math.log10(Math.max(value, levels[0][0])) - low) / (high - low);
      return base - (base - TOP) * Math.min(1, part);
    };
    for (const [value, text] of levels) this.level(y(value), text);
    if (!values.length) this.nothing("Nothing was delivered in this hour");
    for (const field of ["p50", "p99"]) {
      let run = [];
      const end = () => {
        if (run.length === 1) draw(this.svg, "circle", { class: field, cx: run[0][0], cy: run[0][1], r: 3 });
        if (run.length > 1) draw(this.svg, "polyline", { class: field, points: run.map((point) => point.join(",")).join(" ") });
        run = [];
      };
      this.minutes.forEach((minute, index) => {
        if (minute[field] === null) end();
        else run.push([this.x(index), y(minute[field])]);
      });
      end();
    }
  }

  say({ p50, p99, max, delivered }) {
    if (p50 === null) return "nothing was delivered";
    return `half of ${formatCount(delivered)} within ${formatSpan(p50)}, 99 in 100 within ${formatSpan(p99)}, the latest ${formatSpan(max)}`;
  }

  sum() {
    const latest = Math.max(-1, ...this.minutes.map(({ max }) => max ?? -1));
    return latest < 0 ? "From the due time to the confirm." : `From the due time to the confirm. The latest of the hour: ${formatSpan(latest)}.`;
  }
}
