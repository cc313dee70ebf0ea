// Tables whose rows are kept as long as what they show is there, so that focus and selection stay.

import { byId, make } from "./words.js";

/** Cells are made once for a row, and filled whenever what it shows has changed. */
export class Table {
  constructor(id, columns) {
    this.table = byId(id);
    this.body = this.table.tBodies[0];
    this.empty = byId(`${id}-empty`);
    this.title = byId(`${id}-title`);
    this.columns = columns;
    this.rows = new Map();
    this.labels = [...this.table.tHead.rows[0].cells].map((cell) => cell.textContent);
  }

  /** Shows `items`, each `[key, item]`. */
  show(items) {
    const focused = document.activeElement?.closest("tr");
    const at = focused && this.body.contains(focused) ? [...this.body.rows].indexOf(focused) : -1;
    const which = at < 0 ? 0 : [...focused.querySelectorAll("button")].indexOf(document.activeElement);
    const keys = new Set(items.map(([key]) => key));
    for (const [key, row] of this.rows) {
      if (keys.has(key)) continue;
      row.element.remove();
      this.rows.delete(key);
    }
    items.forEach(([key, item], index) => {
      let row = this.rows.get(key);
      if (!row) this.rows.set(key, (row = this.row()));
      if (this.body.rows[index] !== row.element) this.body.insertBefore(row.element, this.body.rows[index] ?? null);
      const text = JSON.stringify(item);
      if (row.text === text) return;
      row.text = text;
      row.item = item;
      this.columns.forEach((fill, column) => fill(row.cells[column], item, row));
    });
    this.table.classList.toggle("empty-table", !items.length);
    if (this.empty) this.empty.hidden = items.length > 0;
    // What had the focus is gone: the same button of the next row has it, or the title.
    if (at >= 0 && !focused.isConnected) {
      const next = this.body.rows[Math.min(at, items.length - 1)];
      (next?.querySelectorAll("button")[which] ?? this.title).focus();
    }
  }

  row() {
    const element = make("tr");
    element.setAttribute("role", "row");
    const cells = this.columns.map((_, column) => {
      const cell = make("td", this.table.tHead.rows[0].cells[column].className);
      cell.setAttribute("role", "cell");
      cell.dataset.label = this.labels[column];
      element.append(cell);
      return cell;
    });
    return { element, cells };
  }
}

/** Whether what a cell shows has changed: what a person has opened in it must stay open otherwise. */
export function changed(cell, ...values) {
  const text = JSON.stringify(values);
  if (cell.shown === text) return false;
  cell.shown = text;
  return true;
}

/** Fills a cell once, and lets `update` do the rest. */
export function once(cell, build) {
  cell.parts ??= build(cell);
  return cell.parts;
}
