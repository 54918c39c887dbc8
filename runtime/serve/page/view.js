// Shows conversations, where an answer's time went, and the list of the history. Knows no server and stores nothing.

import { bytes, el, icon, iconButton, richText, seconds } from "./dom.js";

const DAY_MS = 86_400_000;
const PHASES = {
  loading: "The model is being loaded",
  restarting: "The engine is starting again",
  queue: "Waiting in line",
  image: "Looking at the picture",
  encode: "Looking at the picture",
  prompt: "Reading",
  thinking: "Thinking",
};
const STEPS = [
  ["queue", "Waiting in line", "queue_ms"],
  ["image", "Opening the picture", "image_ms"],
  ["encode", "Encoding it", "encode_ms"],
  ["prompt", "Reading the prompt", "prompt_ms"],
  ["answer", "Answering", "predicted_ms"],
];

export const shownAnswer = (exchange) => exchange.answers[Math.min(exchange.shown, exchange.answers.length - 1)] ?? null;

/** A conversation as cards: a card begins where pictures are shown, and holds the questions that follow. */
export class ConversationView {
  /** actions: {look(picture, what), edit(exchange, text), again(exchange), choose(exchange, n), context} */
  constructor(root, previews, actions) {
    Object.assign(this, { root, previews, actions });
    this.boxes = new Map();
  }

  show(conversation, pictures) {
    this.root.replaceChildren();
    this.boxes.clear();
    for (const exchange of conversation.exchanges) this.add(exchange, pictures);
  }

  add(exchange, pictures) {
    const shown = exchange.pictures.map((id) => pictures.get(id)).filter(Boolean);
    if (shown.length || !this.root.lastElementChild) this.root.append(this.card(shown));
    const box = el("section", { class: "exchange", "aria-label": "Question and answer" });
    this.root.lastElementChild.querySelector(".exchanges").append(box);
    this.boxes.set(exchange.id, { box, images: [...this.root.lastElementChild.querySelectorAll(".thumb img")], shown });
    this.update(exchange);
    return box;
  }

  card(shown) {
    const exchanges = el("div", { class: "exchanges" });
    if (!shown.length) return el("article", { class: "card" }, exchanges);
    const figures = shown.map((picture, n) => this.figure(picture, shown.length > 1 ? n + 1 : null));
    return el("article", { class: "card with-pictures" },
      el("div", { class: "pictures", "data-count": Math.min(figures.length, 4) }, el("div", { class: "figures" }, figures)),
      exchanges,
    );
  }

  figure(picture, number) {
    const caption = el("span", { class: "size" }, bytes(picture.bytes.byteLength));
    const image = this.previews.image(picture, { alt: picture.name });
    image.addEventListener("load", () => {
      caption.textContent = `${image.naturalWidth} × ${image.naturalHeight} · ${bytes(picture.bytes.byteLength)}`;
    }, { once: true });
    return el("figure", {},
      el("button", { type: "button", class: "thumb", "aria-label": `Look at ${picture.name}`, onclick: () => this.actions.look(picture, "original") },
        image, number && el("span", { class: "number" }, String(number))),
      el("figcaption", {}, el("span", { class: "name", dir: "auto", title: picture.name }, picture.name), caption),
      el("button", { type: "button", class: "small", onclick: () => this.actions.look(picture, "model") },
        icon("eye"), "What the model sees"),
    );
  }

  /** Shows an exchange anew. phase: {stage, share, text} while its answer is on its way, null otherwise. */
  update(exchange, phase = null) {
    const entry = this.boxes.get(exchange.id);
    if (!entry) return;
    const isOpen = entry.box.querySelector("details")?.open ?? false;
    const answer = shownAnswer(exchange);
    const answerBox = el("div", { class: "answer", "aria-busy": phase ? "true" : "false" });
    entry.box.replaceChildren(this.question(exchange, phase), answerBox);
    entry.text = answerBox.appendChild(el("div", { class: "text" }));
    entry.phase = answerBox.appendChild(el("div", { class: "phase" }));
    if (answer) this.fill(entry, exchange, answer, phase);
    if (answer && !phase) answerBox.append(this.foot(exchange, answer, isOpen));
  }

  /** Shows what has changed of an answer on its way; the elements around it stay. */
  progress(exchange, phase) {
    const entry = this.boxes.get(exchange.id);
    if (entry) this.fill(entry, exchange, shownAnswer(exchange), phase);
  }

  fill(entry, exchange, answer, phase) {
    entry.text.replaceChildren(...richText(answer.text));
    entry.phase.replaceChildren(...(phase ? [waiting(phase, answer.text !== "")] : ending(answer)));
    for (const [n, image] of entry.images.entries()) {
      if (entry.shown[n] && answer.text) image.alt = `${entry.shown[n].name}: ${answer.text}`.slice(0, 250);
    }
  }

  question(exchange, phase) {
    const edit = iconButton("edit", "Edit and ask again", () => this.edit(exchange), { hidden: phase !== null });
    return el("div", { class: "question" }, el("h3", { dir: "auto" }, exchange.question), edit);
  }

  edit(exchange) {
    const { box } = this.boxes.get(exchange.id);
    const text = el("textarea", { rows: 2, dir: "auto", "aria-label": "Edited question" });
    text.value = exchange.question;
    const close = () => {
      this.update(exchange);
      box.querySelector('[aria-label="Edit and ask again"]').focus();
    };
    const form = el("form", { class: "edit", onsubmit: (event) => {
      event.preventDefault();
      if (text.value.trim()) this.actions.edit(exchange, text.value.trim());
    } },
      text,
      el("p", { class: "hint" }, "The answer, and what comes after it, is replaced."),
      el("div", { class: "row end" },
        el("button", { type: "button", onclick: close }, "Cancel"),
        el("button", { type: "submit", class: "primary" }, "Ask again")),
    );
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
      event.stopPropagation();
    });
    box.querySelector(".question").replaceWith(form);
    text.focus();
    text.setSelectionRange(text.value.length, text.value.length);
  }

  foot(exchange, answer, isOpen) {
    const tools = el("div", { class: "row tools" },
      exchange.answers.length > 1 && this.variants(exchange),
      answer.text && navigator.clipboard && copyButton(answer.text),
      iconButton("again", answer.text ? "Another answer" : "Ask again", () => this.actions.again(exchange)),
    );
    return el("footer", {}, answer.timings && timing(answer, isOpen, this.actions.context()), tools);
  }

  variants(exchange) {
    const { shown, answers } = exchange;
    const step = (name, label, n) =>
      iconButton(name, label, () => this.actions.choose(exchange, n), { disabled: n < 0 || n >= answers.length });
    return el("span", { class: "variants row", role: "group", "aria-label": "Answers" },
      step("back", "Previous answer", shown - 1), `${shown + 1} of ${answers.length}`, step("next", "Next answer", shown + 1));
  }
}

function waiting(phase, hasText) {
  if (hasText) return el("span", { class: "cursor", "aria-hidden": "true" });
  const words = phase.text ?? PHASES[phase.stage] ?? PHASES.thinking;
  const bar = el("progress", { max: 1, "aria-label": words });
  if (phase.share !== undefined) bar.value = phase.share;
  return el("div", { class: "waiting" },
    el("span", {}, `${words}…${phase.share === undefined ? "" : ` ${Math.round(100 * phase.share)} %`}`), bar);
}

function ending(answer) {
  if (answer.error) return [el("p", { class: "error" }, answer.error)];
  const words = {
    stopped: "Stopped.",
    length: "The answer was cut at the most tokens it may have.",
    "": "This answer was interrupted.",
  }[answer.finish ?? ""];
  return words ? [el("p", { class: "ending" }, words)] : [];
}

function copyButton(text) {
  const button = iconButton("copy", "Copy the answer", async () => {
    await navigator.clipboard.writeText(text);
    button.replaceChildren(icon("done"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** What the server counted of one answer: {prompt, cached, image, isKept}. */
function counts({ timings, usage }) {
  const details = usage?.prompt_tokens_details ?? {};
  const cached = details.cached_tokens ?? timings.cache_n ?? 0;
  const image = details.image_tokens ?? 0;
  const prompt = usage?.prompt_tokens ?? (timings.prompt_n ?? 0) + cached;
  return { prompt, cached, image, isKept: image > 0 && cached >= image };
}

function timing(answer, isOpen, context) {
  const steps = STEPS.map(([name, label, field]) => ({ name, label, ms: answer.timings[field] ?? 0 }));
  const count = counts(answer);
  const bar = () => el("span", { class: "bar", "aria-hidden": "true" },
    steps.filter((step) => step.ms > 0).map((step) => segment(step.name, step.ms)));
  return el("details", { class: "timing", open: isOpen },
    el("summary", {}, bar(), el("span", { class: "summary" }, summary(answer.timings, count))),
    bar(),
    el("table", {},
      el("caption", { class: "sr" }, "Where the time went"),
      el("tbody", {}, steps.map((step) => row(step, answer, count)))),
    tokens(answer, count, context),
    device(answer),
  );
}

function segment(name, amount) {
  const part = el("span", { class: `part ${name}` });
  part.style.setProperty("--amount", amount);
  return part;
}

function summary(timings, count) {
  const parts = [];
  if (timings.first_token_ms) parts.push(`First word after ${seconds(timings.first_token_ms)}`);
  if (timings.predicted_per_second) parts.push(`${speed(timings.predicted_per_second)} tokens/s`);
  if (count.isKept) parts.push("picture kept");
  else if (count.cached) parts.push(`${count.cached} of ${count.prompt} tokens kept`);
  return parts.join(" · ");
}

const speed = (rate) => rate.toFixed(rate < 10 ? 1 : 0);

function row(step, { timings, usage }, count) {
  const notes = {
    encode: step.ms === 0 && count.image > 0 ? "kept from before" : "",
    prompt: count.cached ? `${count.prompt - count.cached} tokens new, ${count.cached} kept` : `${count.prompt} tokens`,
    answer: `${usage?.completion_tokens ?? timings.predicted_n ?? 0} tokens`,
  };
  return el("tr", {},
    el("th", { scope: "row" }, el("span", { class: `part ${step.name}`, "aria-hidden": "true" }), step.label),
    el("td", { class: "number" }, seconds(step.ms)),
    el("td", {}, notes[step.name] ?? ""));
}

/** A second bar: the context's tokens, those kept, those evaluated, those of the answer. */
function tokens({ timings, usage }, count, context) {
  const answered = usage?.completion_tokens ?? timings.predicted_n ?? 0;
  const used = count.prompt + answered;
  if (!context) return null;
  const bar = el("span", { class: "bar", "aria-hidden": "true" },
    segment("kept", count.cached), segment("prompt", count.prompt - count.cached),
    segment("answer", answered), segment("free", Math.max(0, context - used)));
  const words = `${used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens of context`;
  return el("div", { class: "tokens" }, bar, el("span", {}, count.cached ? `${words}, ${count.cached} kept from before` : words));
}

function device({ timings, sampled }) {
  const { device: text, vision_device: vision } = timings;
  const where = text && (vision && vision !== text ? `Text model on ${text}, vision tower on ${vision}` : `On ${text}`);
  const how = sampled ? "Sampled: asking again gives another answer" : "Greedy: the model's likeliest answer";
  return el("p", { class: "device" }, [where, how].filter(Boolean).join(" · "));
}

/** The history: a button for each conversation, by day. actions: {open(id), remove(id)} */
export function showHistory(root, conversations, current, actions) {
  root.replaceChildren();
  let list = null;
  let shownDay = "";
  for (const conversation of conversations) {
    const day = dayOf(conversation.updated);
    if (day !== shownDay) {
      list = el("ul");
      root.append(el("h2", {}, day), list);
      shownDay = day;
    }
    list.append(historyItem(conversation, conversation.id === current, actions));
  }
  if (!conversations.length) root.append(el("p", { class: "none" }, "What you ask will be listed here."));
}

function historyItem({ id, title, thumbnail }, isCurrent, actions) {
  return el("li", {},
    el("button", { type: "button", class: "open", "aria-current": isCurrent && "true", onclick: () => actions.open(id) },
      thumbnail ? el("img", { src: thumbnail, alt: "" }) : el("span", { class: "no-picture" }),
      el("span", { dir: "auto" }, title)),
    iconButton("delete", `Delete ${title}`, () => actions.remove(id)));
}

function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY_MS) return "Yesterday";
  return new Date(time).toLocaleDateString(undefined, { month: "long", year: "numeric" });
}
