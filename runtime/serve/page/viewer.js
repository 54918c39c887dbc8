// Shows one picture large: its original, or the square that the vision tower gets, with its patches. Stores nothing.

import { plain } from "./api.js";
import { byId, opened } from "./dom.js";
import { dataUri } from "./pictures.js";

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Viewer {
  constructor(api, previews) {
    Object.assign(this, { api, previews, dialog: byId("viewer"), stage: byId("stage"), image: byId("viewer-image") });
    this.views = new Map();
    byId("show-original").addEventListener("click", () => this.show("original"));
    byId("show-model").addEventListener("click", () => this.show("model"));
    byId("show-grid").addEventListener("change", () => this.drawGrid());
    this.stage.addEventListener("pointermove", (event) => this.point(event));
    this.stage.addEventListener("pointerleave", () => this.mark(null));
    this.stage.addEventListener("keydown", (event) => this.step(event));
  }

  async open(picture, part) {
    this.picture = picture;
    byId("viewer-title").textContent = picture.name;
    const closed = opened(this.dialog);
    this.show(part);
    await closed;
    this.wanted?.abort();
    this.image.removeAttribute("src");
  }

  async show(part) {
    this.wanted?.abort();
    this.grid = null;
    this.stage.dataset.of = part;
    byId("show-original").setAttribute("aria-pressed", String(part === "original"));
    byId("show-model").setAttribute("aria-pressed", String(part === "model"));
    this.image.alt = part === "original" ? this.picture.name : `${this.picture.name} as the model sees it`;
    if (part === "original") {
      this.image.src = this.previews.url(this.picture);
      this.caption("The original. It is sent as it is.");
    } else {
      await this.showModel();
    }
    this.drawGrid();
  }

  async showModel() {
    const { signal } = (this.wanted = new AbortController());
    const { picture } = this;
    this.image.removeAttribute("src");
    this.caption("Asking the model…");
    this.stage.setAttribute("aria-busy", "true");
    try {
      if (!this.views.has(picture.id)) this.views.set(picture.id, await this.api.view(dataUri(picture), signal));
      const { blob, columns, rows } = this.views.get(picture.id);
      this.image.src = this.previews.keep(`view of ${picture.id}`, blob);
      await this.image.decode();
      // LLaVA-1.6's tiles lie beside each other: no one grid covers them.
      const isSquare = this.image.naturalWidth === this.image.naturalHeight;
      this.image.classList.toggle("wide", !isSquare);
      if (columns && rows && isSquare) this.grid = { columns, rows };
      this.caption(this.words());
    } catch (error) {
      if (!signal.aborted) this.caption(plain(error));
    } finally {
      if (!signal.aborted) this.stage.removeAttribute("aria-busy");
    }
  }

  words() {
    if (!this.grid) return "All that the model gets of this picture.";
    const { columns, rows } = this.grid;
    return `All that the model gets: ${columns} × ${rows} patches, ${(columns * rows).toLocaleString("en")} tokens.`;
  }

  drawGrid() {
    byId("grid-switch").hidden = this.grid === null;
    const isShown = this.grid !== null && byId("show-grid").checked;
    byId("grid").hidden = !isShown;
    this.stage.toggleAttribute("tabindex", isShown);
    if (isShown) this.stage.tabIndex = 0;
    this.mark(null);
    if (!isShown) return;
    byId("grid").style.setProperty("--columns", this.grid.columns);
    byId("grid").style.setProperty("--rows", this.grid.rows);
  }

  point(event) {
    if (byId("grid").hidden) return;
    const box = byId("grid").getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.grid.columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.grid.rows);
    const isInside = column >= 0 && row >= 0 && column < this.grid.columns && row < this.grid.rows;
    this.mark(isInside ? { column, row } : null);
  }

  step(event) {
    const arrow = ARROWS[event.key];
    if (!arrow || byId("grid").hidden) return;
    event.preventDefault();
    const { columns, rows } = this.grid;
    const from = this.patch ?? { column: columns >> 1, row: rows >> 1 };
    const clamp = (value, most) => Math.max(0, Math.min(most - 1, value));
    this.mark({ column: clamp(from.column + arrow[0], columns), row: clamp(from.row + arrow[1], rows) });
  }

  mark(patch) {
    this.patch = patch;
    byId("patch").hidden = patch === null;
    if (patch === null) {
      if (this.grid) this.caption(this.words());
      return;
    }
    byId("patch").style.setProperty("--column", patch.column);
    byId("patch").style.setProperty("--row", patch.row);
    const number = patch.row * this.grid.columns + patch.column + 1;
    this.caption(`Patch ${number} of ${this.grid.columns * this.grid.rows}: row ${patch.row + 1}, column ${patch.column + 1}. One token.`);
  }

  caption(words) {
    byId("viewer-caption").textContent = words;
  }
}
