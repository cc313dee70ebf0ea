// Tables that keep the element of a row as long as its item is shown, so that focus and selection stay.

import { byId, make } from "./words.js";

/** The cells of a row are made once, and filled again when its item has changed. */
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
    const focusedRow = focused && this.body.contains(focused) ? [...this.body.rows].indexOf(focused) : -1;
    const focusedButton = focusedRow < 0 ? 0 : [...focused.querySelectorAll("button")].indexOf(document.activeElement);
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
    // If the focused row was removed, the focus moves to the same button of the next row, or else to the title.
    if (focusedRow >= 0 && !focused.isConnected) {
      const next = this.body.rows[Math.min(focusedRow, items.length - 1)];
      (next?.querySelectorAll("button")[focusedButton] ?? this.title).focus();
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

/** Whether the values of a cell have changed. A cell without changes is not filled again, so that details in it stay open. */
export function hasChanged(cell, ...values) {
  const text = JSON.stringify(values);
  if (cell.shown === text) return false;
  cell.shown = text;
  return true;
}

/** Builds the contents of a cell the first time, and returns them. */
export function buildOnce(cell, build) {
  cell.parts ??= build(cell);
  return cell.parts;
}
