// Builds elements and reads answers aloud. Text becomes text nodes, never markup; knows no server and no history.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** el("button", {class: "plain", onclick: f}, "Stop"): attributes, listeners, children; null and false are left out. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => (child ?? false) !== false));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick, attributes = {}) {
  return el("button", { type: "button", class: "plain", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}

const BULLET = /^\s*[-*•]\s+(.*)$/;
const NUMBER = /^\s*(\d{1,3})[.)]\s+(.*)$/;

/** The blocks of an answer: paragraphs with their line breaks, lists, **bold**. LLaVA writes little else. */
export function richText(text) {
  const blocks = [];
  let list = null;
  for (const line of text.replace(/\r\n?/g, "\n").split("\n")) {
    const bullet = BULLET.exec(line);
    const number = NUMBER.exec(line);
    if (bullet || number) {
      const tag = bullet ? "UL" : "OL";
      if (list?.tagName !== tag) {
        list = el(tag, number && number[1] !== "1" ? { start: number[1] } : {});
        blocks.push(list);
      }
      list.append(el("li", {}, ...inline(bullet ? bullet[1] : number[2])));
    } else {
      const last = blocks.at(-1);
      if (line.trim() === "") blocks.push(null);
      else if (last && last !== list) last.append(el("br"), ...inline(line));
      else blocks.push(el("p", { dir: "auto" }, ...inline(line)));
      list = null;
    }
  }
  return blocks.filter(Boolean);
}

function inline(line) {
  return line.split(/\*\*(\S(?:.*?\S)?)\*\*/).map((part, n) => (n % 2 ? el("strong", {}, part) : part));
}

/** Hands a growing answer to a screen reader one sentence at a time: a word at a time would be chatter. */
export class Announcer {
  static SENTENCE = /^[\s\S]*?(?:[.!?…。！？]["'”’)\]]*\s|\n)/;

  constructor(log) {
    this.log = log;
    this.pending = "";
  }

  push(text) {
    this.pending += text;
    for (let end; (end = Announcer.SENTENCE.exec(this.pending)); ) {
      this.pending = this.pending.slice(end[0].length);
      this.say(end[0]);
    }
  }

  flush() {
    this.say(this.pending);
    this.pending = "";
  }

  say(text) {
    if (!text.trim()) return;
    this.log.append(el("p", {}, text.trim()));
    while (this.log.childElementCount > 50) this.log.firstElementChild.remove();
  }
}

/** Opens a <dialog> and resolves once it closes: its return value, "" when it was dismissed. */
export function opened(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

export function seconds(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  return `${(ms / 1000).toFixed(ms < 10_000 ? 1 : 0)} s`;
}

export function bytes(n) {
  if (n < 1000) return `${n} B`;
  return n < 1e6 ? `${Math.round(n / 1e3)} kB` : `${(n / 1e6).toFixed(1)} MB`;
}
