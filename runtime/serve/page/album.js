// The album: pictures that were asked about, found by words or by likeness. Knows no history, and stores nothing.

import { plain } from "./api.js";
import { byId, el } from "./dom.js";
import { dataUri, kindOf, readPicture } from "./pictures.js";

const FIRST_HITS = 60;
const MOST_HITS = 200;

export class AlbumView {
  /** actions: {ask(file), look(picture)} */
  constructor(api, actions) {
    Object.assign(this, { api, actions, facts: null, asked: {}, urls: [] });
    this.list = byId("album-hits");
    this.watch = new IntersectionObserver((entries) => this.seen(entries), { root: byId("scroll"), rootMargin: "400px" });
    byId("album-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.search({ words: byId("album-words").value.trim() });
    });
    byId("album-column").addEventListener("change", () => this.search({ words: byId("album-words").value.trim() }));
    byId("album-more").addEventListener("click", () => this.more());
  }

  /** Whether the server has an album, which is asked about once. */
  async offered() {
    if (!this.facts) this.offer(await this.api.album());
    return this.facts.name !== null;
  }

  offer(facts) {
    this.facts = facts;
    byId("album-title").textContent = facts.name ?? "";
    const columns = facts.columns.map(({ id, question }) => el("option", { value: id }, question));
    byId("album-column").replaceChildren(el("option", { value: "" }, "All questions"), ...columns);
    byId("album-column").hidden = columns.length < 2;
  }

  open() {
    if (!this.list.childElementCount) this.search({});
  }

  /** asked: {words}, {like: a hit}, {picture}, or nothing for all pictures in their order. */
  async search(asked, limit = FIRST_HITS) {
    this.wanted?.abort();
    const { signal } = (this.wanted = new AbortController());
    this.asked = asked;
    this.status(asked.picture ? `Looking at ${asked.picture.name}…` : "Searching…");
    this.list.setAttribute("aria-busy", "true");
    try {
      this.show(await this.api.albumSearch(this.body(asked, limit), signal), limit);
    } catch (error) {
      if (signal.aborted) return;
      this.clear();
      this.status(plain(error));
    }
    this.list.removeAttribute("aria-busy");
  }

  body({ words, like, picture }, limit) {
    const column = byId("album-column").value;
    if (picture) return { image_url: dataUri(picture), limit };
    if (like) return { like: like.id, limit };
    return { ...(words ? { words } : {}), ...(column ? { column: Number(column) } : {}), limit };
  }

  async more() {
    const shown = this.list.childElementCount;
    await this.search(this.asked, MOST_HITS);
    this.list.children[shown]?.querySelector("button").focus();
  }

  async alike(hit) {
    await this.search({ like: hit });
    this.list.querySelector("button")?.focus();
  }

  async like(file) {
    try {
      await this.search({ picture: await readPicture(file, "like") });
    } catch (error) {
      this.status(error.message);
    }
  }

  show(hits, limit) {
    this.clear();
    this.list.append(...hits.map((hit) => this.item(hit)));
    byId("album-more").hidden = limit >= MOST_HITS || hits.length < limit;
    const count = hits.length === 1 ? "1 picture" : `${hits.length} pictures`;
    const { like, picture, words } = this.asked;
    const source = like?.path ?? picture?.name;
    if (!hits.length) this.status(words ? "Nothing found. All words must be there; end one with * for its beginning." : "Nothing found.");
    else if (source) this.status(`${count} like ${source}, the most alike first`);
    else if (words) this.status(`${count}, the best first`);
    else this.status(`${hits.length} of ${this.facts.pictures.toLocaleString("en")} pictures`);
  }

  item(hit) {
    const image = el("img", { alt: hit.caption.slice(0, 250) || hit.path, "data-id": hit.id });
    this.watch.observe(image);
    const note = [hit.likeness === null ? null : hit.likeness.toFixed(3), hit.mark].filter(Boolean).join(" · ");
    const small = (label, text, work) =>
      el("button", { type: "button", class: "small", "aria-label": `${label} ${hit.path}`, onclick: work }, text);
    return el("li", {},
      el("button", { type: "button", class: "thumb", "aria-label": `Look at ${hit.path}`, onclick: () => this.look(hit) }, image),
      el("p", { class: "from" }, el("span", { class: "name", dir: "auto", title: hit.path }, hit.path), note && el("span", {}, note)),
      el("p", { class: "caption", dir: "auto", title: `${hit.question}\n${hit.caption}` }, hit.caption),
      el("div", { class: "row" },
        small("Ask about", "Ask about it", () => this.ask(hit)),
        small("Pictures like", "Alike", () => this.alike(hit))));
  }

  /** Thumbnails are fetched as they come into sight: <img> could not send a key. */
  seen(entries) {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      this.watch.unobserve(target);
      this.thumbnail(target, this.wanted.signal);
    }
  }

  async thumbnail(image, signal) {
    try {
      const url = URL.createObjectURL(await this.api.albumPicture("thumbnails", image.dataset.id, signal));
      this.urls.push(url);
      image.src = url;
    } catch {
      image.classList.add("unreadable");
    }
  }

  clear() {
    this.watch.disconnect();
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
    this.list.replaceChildren();
    byId("album-more").hidden = true;
  }

  async look(hit) {
    const blob = await this.original(hit);
    if (!blob) return;
    const bytes = await blob.arrayBuffer();
    const { name } = fileOf(hit, blob);
    this.actions.look({ id: `album ${hit.id}`, name, type: kindOf(bytes)?.type ?? blob.type, bytes });
  }

  async ask(hit) {
    const blob = await this.original(hit);
    if (blob) this.actions.ask(fileOf(hit, blob));
  }

  async original(hit) {
    try {
      return await this.api.albumPicture("pictures", hit.id);
    } catch (error) {
      this.status(plain(error));
      return null;
    }
  }

  status(words) {
    byId("album-status").textContent = words;
  }
}

const fileOf = (hit, blob) => new File([blob], hit.path.split("/").at(-1), { type: blob.type });
