// Takes pictures in and has them prepared while the question is typed. A picture's bytes are sent as they are: a
// canvas would scale and turn it in another way than the model's own preprocessing. Knows no history.

import { HEIC } from "./api.js";
import { byId, bytes as sizeText, el, iconButton } from "./dom.js";

export const MAX_BYTES = 20 << 20;
const IMAGE_SHARE = 0.3; // of the ring; evaluating a picture's tokens takes longer than encoding it
const POLL_MS = 200;

const ascii = (view, start, end) => String.fromCharCode(...view.subarray(start, end));
const KINDS = [
  { name: "PNG", type: "image/png", is: (view) => ascii(view, 1, 4) === "PNG" },
  { name: "JPEG", type: "image/jpeg", is: (view) => view[0] === 0xff && view[1] === 0xd8 && view[2] === 0xff },
  { name: "WebP", type: "image/webp", is: (view) => ascii(view, 0, 4) === "RIFF" && ascii(view, 8, 12) === "WEBP" },
  { name: "GIF", type: "image/gif", is: (view) => ascii(view, 0, 4) === "GIF8" },
  { name: "BMP", type: "image/bmp", is: (view) => ascii(view, 0, 2) === "BM" },
  { name: "TIFF", type: "image/tiff", is: (view) => ["II*\0", "MM\0*"].includes(ascii(view, 0, 4)) },
  { name: "AVIF", type: "image/avif", is: (view) => /^ftypavi[fs]/.test(ascii(view, 4, 12)) },
  { name: "HEIC", type: "image/heic", is: (view) => /^ftyp(he[iv]|mif1|msf1)/.test(ascii(view, 4, 12)) },
];

/** The format that a file's first bytes name; its name and the browser's type may be wrong. */
export function kindOf(buffer) {
  const view = new Uint8Array(buffer, 0, Math.min(16, buffer.byteLength));
  return KINDS.find((kind) => kind.is(view)) ?? null;
}

export function base64(buffer) {
  const view = new Uint8Array(buffer);
  const parts = [];
  for (let n = 0; n < view.length; n += 0x8000) parts.push(String.fromCharCode(...view.subarray(n, n + 0x8000)));
  return btoa(parts.join(""));
}

export const dataUri = (picture) => `data:${picture.type};base64,${base64(picture.bytes)}`;

/** {id, name, type, bytes} of a dropped, pasted or chosen file. Throws an Error whose message is for the reader. */
export async function readPicture(file, id) {
  const name = file.name || "Pasted picture";
  if (file.size > MAX_BYTES) {
    throw new Error(`${name} has ${sizeText(file.size)}. Up to 20 MB are sent, as they are: save it smaller.`);
  }
  const bytes = await file.arrayBuffer().catch(() => null);
  if (!bytes?.byteLength) throw new Error(`${name} could not be read. Is it empty, or a folder?`);
  const kind = kindOf(bytes);
  if (kind) return { id, name, type: kind.type, bytes };
  if (file.type === "image/svg+xml") throw new Error(`${name} is a drawing (SVG). Save it as PNG.`);
  throw new Error(`${name} is not a picture that the model can be shown: PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC.`);
}

/** Addresses under which <img> shows pictures, until cleared. */
export class Previews {
  constructor(api) {
    this.api = api;
    this.urls = new Map();
  }

  image(picture, attributes) {
    const image = el("img", { src: this.url(picture), ...attributes });
    // A browser that cannot read HEIC or TIFF shows what the model gets of it.
    image.addEventListener("error", () => this.replace(image, picture), { once: true });
    return image;
  }

  async replace(image, picture) {
    try {
      image.src = this.keep(picture.id, (await this.api.view(dataUri(picture))).blob);
    } catch {
      image.classList.add("unreadable");
    }
  }

  url(picture) {
    const { id, bytes, type } = picture;
    return this.urls.get(id) ?? this.keep(id, new Blob([bytes], { type }));
  }

  keep(id, blob) {
    URL.revokeObjectURL(this.urls.get(id) ?? "");
    this.urls.set(id, URL.createObjectURL(blob));
    return this.urls.get(id);
  }

  clear() {
    for (const url of this.urls.values()) URL.revokeObjectURL(url);
    this.urls.clear();
  }
}

/** The pictures of the question being typed, and how far the server is with them. */
export class Tray {
  /** messages(pictures): the conversation so far and a user turn that shows them. */
  constructor({ api, previews, messages, say, onchange }) {
    Object.assign(this, { api, previews, messages, say, onchange });
    this.list = byId("tray");
    this.status = byId("preparing");
    this.entries = [];
    this.work = null;
  }

  get pictures() {
    return this.entries.map((entry) => entry.picture);
  }

  add(pictures) {
    for (const picture of pictures) {
      const entry = { picture, state: "waiting", item: null };
      entry.item = this.chip(entry);
      this.entries.push(entry);
      this.list.append(entry.item);
    }
    this.changed();
  }

  remove(entry) {
    const place = this.entries.indexOf(entry);
    this.entries.splice(place, 1);
    entry.item.remove();
    const next = this.entries[Math.min(place, this.entries.length - 1)];
    (next ? next.item.querySelector("button") : byId("question")).focus();
    this.changed();
  }

  /** Hands the pictures over and empties the tray. The server goes on with what it has begun. */
  take() {
    const pictures = this.pictures;
    this.entries = [];
    this.list.replaceChildren();
    this.changed();
    return pictures;
  }

  chip(entry) {
    const { name } = entry.picture;
    return el("li", { "data-state": "waiting" },
      this.previews.image(entry.picture, { alt: name, title: name }),
      el("span", { class: "ring", "aria-hidden": "true" }),
      iconButton("close", `Remove ${name}`, () => this.remove(entry)),
    );
  }

  changed() {
    this.work?.abort();
    this.work = null;
    this.status.textContent = "";
    this.onchange();
    if (this.entries.length) this.prepare().catch((error) => this.failed(error));
  }

  async prepare() {
    const { signal } = (this.work = new AbortController());
    this.mark("waiting", 0);
    const id = await this.api.prepare(this.messages(this.pictures), signal);
    for (let wait = POLL_MS; id !== null && !signal.aborted; wait = Math.min(wait * 1.2, 1000)) {
      const { status, stage, done, total, error } = await this.api.preparation(id, signal);
      if (status === "failed") throw new Error(typeof error === "string" ? error : error?.message);
      if (status === "done") return this.ready();
      if (status === "cancelled") break;
      this.progress(stage, total ? done / total : 0);
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
    if (!signal.aborted) this.mark("idle", 0);
  }

  progress(stage, share) {
    const ring = stage === "prompt" ? IMAGE_SHARE + (1 - IMAGE_SHARE) * share : IMAGE_SHARE * share;
    this.mark("preparing", ring);
    const name = this.entries.length > 1 ? "pictures" : "picture";
    this.status.textContent = stage ? `Looking at the ${name}… ${Math.round(100 * ring)} %` : "Waiting in line…";
  }

  ready() {
    this.mark("ready", 1);
    this.status.textContent = this.entries.length > 1 ? "Pictures ready" : "Picture ready";
    this.say(this.status.textContent);
  }

  mark(state, share) {
    for (const { item } of this.entries) {
      if (item.dataset.state === "ready" && state !== "failed") continue;
      item.dataset.state = state;
      item.style.setProperty("--share", share);
    }
  }

  failed(error) {
    if (error.name === "AbortError") return;
    // Where there is no answer at all, the picture is not to blame.
    const isPicture = !(error instanceof TypeError);
    this.mark(isPicture ? "failed" : "idle", 0);
    this.status.textContent = !isPicture ? "" : /HEIC/.test(error.message) ? HEIC : error.message;
    this.say(this.status.textContent);
  }

  /** Prepares what could not be prepared while the model was being loaded. */
  resume() {
    if (this.entries.some(({ item }) => item.dataset.state === "idle")) this.changed();
  }
}
