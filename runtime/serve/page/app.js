// The page: what happens when a picture lands, a question is asked, a conversation is opened. Its parts know less:
// api.js the server, store.js the history, pictures.js what is attached, album.js an album's pictures, view.js and
// viewer.js what is shown.

import { AlbumView } from "./album.js";
import { Api, ApiError, plain } from "./api.js";
import { Announcer, byId, el, iconButton, opened } from "./dom.js";
import { base64, dataUri, Previews, readPicture, Tray } from "./pictures.js";
import { newId, openStore } from "./store.js";
import { ConversationView, shownAnswer, showHistory } from "./view.js";
import { Viewer } from "./viewer.js";

const DEFAULT_QUESTION = "Describe the image.";
const SUGGESTIONS = [DEFAULT_QUESTION, "What text is in the image?", "What is unusual about this image?"];
const EXAMPLE_SUGGESTIONS = ["What's the content of the image?", "What is at the center?", "What color is the heart?"];
const FREER = { temperature: 0.8, top_p: 0.95 }; // greedy decoding would repeat itself
const RETRIES = 5;
const SAVE_MS = 1000;
const THUMBNAIL_PIXELS = 96;
const ALBUM = "#album"; // of the address
const HEALTH_MS = { ready: 15_000, asleep: 15_000, away: 2000 };

const state = {
  conversation: null, // the one shown
  deleted: new Set(), // ids: an answer that was on its way must not bring its conversation back
  pictures: new Map(), // its pictures by id
  run: null, // {conversation, exchange, controller, phase} of the answer on its way
  model: null,
  health: { state: "unknown", queue: 0, text: "" },
};
const api = new Api(askKey);
const previews = new Previews(api);
const announcer = new Announcer(byId("announcer"));
const viewer = new Viewer(api, previews);
const store = await openStore();
const question = byId("question");
const view = new ConversationView(byId("conversation"), previews, {
  look: (picture, part) => viewer.open(picture, part),
  edit: editAndAsk,
  again: (exchange) => run(exchange, true),
  choose: (exchange, n) => {
    exchange.shown = n;
    view.update(exchange);
    save(state.conversation);
  },
  context: () => state.model?.max_model_len ?? 0,
});
const album = new AlbumView(api, {
  ask: (file) => { startNew(); takeIn([file]); },
  look: (picture) => viewer.open(picture, "original"),
});
const tray = new Tray({
  api, previews, say: (text) => announcer.say(text), onchange: controls,
  messages: (pictures) => messages(state.conversation.exchanges, { question: "", pictures: pictures.map((p) => p.id) }, pictures),
});

// ---------------------------------------------------------------- asking

/** The conversation as OpenAI's messages, up to and with the exchange given; its answer is what is asked for. */
function messages(earlier, exchange, attached = []) {
  const pictures = new Map([...state.pictures, ...attached.map((picture) => [picture.id, picture])]);
  const turns = earlier.flatMap((turn) => {
    const text = shownAnswer(turn)?.text;
    return [userTurn(turn, pictures), ...(text ? [{ role: "assistant", content: text }] : [])];
  });
  return [...turns, userTurn(exchange, pictures)];
}

function userTurn(exchange, pictures) {
  const shown = exchange.pictures.map((id) => pictures.get(id)).filter(Boolean);
  const images = shown.map((picture) => ({ type: "image_url", image_url: { url: dataUri(picture) } }));
  return { role: "user", content: images.length ? [...images, { type: "text", text: exchange.question }] : exchange.question };
}

function ask() {
  const text = question.value.trim() || (tray.entries.length ? DEFAULT_QUESTION : "");
  if (!text || state.run) return;
  const pictures = tray.take();
  for (const picture of pictures) state.pictures.set(picture.id, picture);
  const exchange = { id: newId(), question: text, pictures: pictures.map((picture) => picture.id), answers: [], shown: 0 };
  const { conversation } = state;
  if (!conversation.exchanges.length) conversation.title = text;
  conversation.exchanges.push(exchange);
  question.value = "";
  grow();
  view.add(exchange, state.pictures);
  showing();
  run(exchange, false, pictures);
  question.focus();
}

function editAndAsk(exchange, text) {
  if (state.run) return;
  const { conversation } = state;
  const place = conversation.exchanges.indexOf(exchange);
  conversation.exchanges.length = place + 1;
  Object.assign(exchange, { question: text, answers: [], shown: 0 });
  if (place === 0) conversation.title = text;
  view.show(conversation, state.pictures);
  run(exchange, false);
  question.focus();
}

/** Asks for an answer to an exchange of the conversation shown, and shows it as it comes. */
async function run(exchange, isSampled, newPictures = []) {
  if (state.run) return;
  const { conversation } = state;
  const answer = { text: "", finish: "", timings: null, usage: null, error: "", sampled: isSampled };
  const earlier = conversation.exchanges.slice(0, conversation.exchanges.indexOf(exchange));
  const body = { messages: messages(earlier, exchange), ...(isSampled ? { ...FREER, seed: randomSeed() } : {}) };
  if (!shownAnswer(exchange)?.text) exchange.answers = [];
  exchange.shown = exchange.answers.push(answer) - 1;
  state.run = { conversation, exchange, answer, controller: new AbortController(), phase: { stage: "thinking" }, saved: 0 };
  controls();
  view.update(exchange, state.run.phase);
  follow(true);
  if (newPictures.length) conversation.thumbnail ||= await thumbnail(newPictures[0]);
  await save(conversation, newPictures);
  await answered(body, state.run);
  announcer.flush();
  state.run = null;
  if (answer.error) announcer.say(answer.error);
  view.update(exchange);
  controls();
  follow();
  await save(conversation);
}

/** Fills the answer; waits for a model that is being loaded, and again for a full line. Never throws. */
async function answered(body, { answer, exchange, controller: { signal } }) {
  for (let tries = 0; ; tries++) {
    try {
      await modelReady(signal);
      for await (const event of api.chat({ model: state.model?.id, ...body }, signal)) taken(event, answer, exchange);
      return;
    } catch (error) {
      if (signal.aborted) answer.finish = "stopped";
      else if (tries < RETRIES && !answer.text && mayRetry(error)) {
        await retryTime(error, signal).catch(() => {});
        continue;
      } else answer.error = plain(error);
      return;
    }
  }
}

const mayRetry = (error) => error instanceof ApiError && (error.status === 429 || (error.status === 503 && error.retry));

async function retryTime(error, signal) {
  if (error.status !== 429) return checkHealth().then(() => pause(500, signal));
  const wait = Math.min(error.retryAfter || 3, 30);
  for (let left = wait; left > 0; left--) {
    phase({ stage: "queue", text: `The line is full. Asking again in ${left} s` });
    await pause(1000, signal);
  }
}

function taken(event, answer, exchange) {
  if (event.text) {
    answer.text = answer.text ? answer.text + event.text : event.text.trimStart();
    announcer.push(event.text);
    phase({ stage: "answering" });
    saveNowAndThen();
  }
  if (event.progress) phase(event.progress);
  if (event.finish) Object.assign(answer, { finish: event.finish, timings: event.timings ?? answer.timings });
  if (event.usage) answer.usage = event.usage;
}

/** Shows how far the answer is, once a frame: a fast model writes faster than a screen is drawn. */
function phase(value) {
  const { run } = state;
  if (!run) return;
  const isDue = run.frame === undefined;
  run.phase = value.ahead === undefined ? value : { stage: "queue", text: `Waiting in line, ${value.ahead} before this` };
  if (!isDue) return;
  run.frame = requestAnimationFrame(() => {
    run.frame = undefined;
    if (state.run !== run) return;
    view.progress(run.exchange, run.phase);
    follow();
  });
}

function stop() {
  if (!state.run) return;
  state.run.controller.abort();
  question.focus();
}

/** Waits while the model is being loaded or the engine restarts, and says so. A sleeping one wakes with the question. */
async function modelReady(signal) {
  if (state.health.state === "unknown" || state.health.state === "away") await checkHealth();
  while (state.health.state === "loading" || state.health.state === "restarting") {
    phase({ stage: state.health.state });
    await pause(400, signal);
    await checkHealth();
  }
  if (state.health.state === "away") throw new TypeError("no answer");
  if (!state.model) await loadModel();
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    }, { once: true });
  });
}

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;

// ---------------------------------------------------------------- the server's state

async function checkHealth() {
  const before = state.health.state;
  state.health = await api.health();
  showHealth();
  if (state.health.state === "ready" && before !== "ready") tray.resume();
}

async function watchHealth() {
  for (;;) {
    if (document.visibilityState === "visible") {
      await checkHealth();
      if (!state.model && state.health.state !== "away") await loadModel().catch(() => {});
    }
    await pause(HEALTH_MS[state.health.state] ?? 1000);
  }
}

async function loadModel() {
  [state.model] = await api.models();
  showHealth();
  album.offered().then((isOffered) => { byId("open-album").hidden = !isOffered; }, () => {});
}

function showHealth() {
  const name = state.model?.id ?? "Ready";
  const { state: now, queue } = state.health;
  const words = {
    ready: queue > 1 ? `${name} · ${queue} in line` : name,
    asleep: `${name} · asleep`,
    loading: "Loading the model…",
    restarting: "Engine restarting…",
    away: "Server not reachable",
  }[now] ?? "Connecting…";
  byId("status").dataset.state = now;
  if (byId("status-text").textContent !== words) byId("status-text").textContent = words;
}

async function askKey(isWrong) {
  const text = byId("key-text");
  text.value = "";
  byId("key-error").textContent = isWrong ? "That key was not accepted." : "";
  return (await opened(byId("key"))) === "ok" ? text.value.trim() : null;
}

// ---------------------------------------------------------------- the history

async function save(conversation, pictures = []) {
  if (state.deleted.has(conversation.id)) return;
  conversation.updated = Date.now();
  try {
    await store.save(conversation, pictures);
  } catch (error) {
    note(`This browser could not keep the conversation: ${error?.message ?? "it is out of room"}. Export or delete older ones.`);
  }
  await listHistory();
}

function saveNowAndThen() {
  const { run } = state;
  if (Date.now() - run.saved < SAVE_MS) return;
  run.saved = Date.now();
  save(run.conversation);
}

async function listHistory() {
  showHistory(byId("conversations"), await store.conversations(), state.conversation.id, { open, remove });
}

function startNew() {
  const now = Date.now();
  show({ id: newId(), title: "", created: now, updated: now, thumbnail: "", exchanges: [] }, []);
  history.replaceState(null, "", location.pathname);
  question.focus();
}

async function open(id) {
  // The answer on its way goes on being written into the object that is shown.
  const conversation = state.run?.conversation.id === id ? state.run.conversation : await store.conversation(id);
  if (!conversation) return startNew();
  show(conversation, await store.pictures(id));
  if (state.run?.conversation === conversation) view.update(state.run.exchange, state.run.phase);
  follow(true);
  byId("scroll").focus();
}

function show(conversation, pictures) {
  tray.take();
  previews.clear();
  leaveAlbum();
  state.conversation = conversation;
  state.pictures = new Map(pictures.map((picture) => [picture.id, picture]));
  view.show(conversation, state.pictures);
  showing();
  listHistory();
  closeHistory();
}

function openAlbum() {
  document.body.classList.add("in-album");
  byId("album").hidden = false;
  byId("open-album").setAttribute("aria-current", "true");
  byId("conversations").querySelector("[aria-current]")?.removeAttribute("aria-current");
  byId("title").textContent = "Album";
  document.title = "Album – pocketllava";
  history.replaceState(null, "", ALBUM);
  byId("scroll").scrollTop = 0;
  closeHistory();
  album.open();
  if (!isCoarse.matches) byId("album-words").focus();
}

function leaveAlbum() {
  if (!isInAlbum()) return;
  document.body.classList.remove("in-album");
  byId("album").hidden = true;
  byId("open-album").removeAttribute("aria-current");
  history.replaceState(null, "", location.pathname);
  if (state.conversation) showing();
}

const isInAlbum = () => document.body.classList.contains("in-album");

/** What depends on whether the conversation has begun. */
function showing() {
  const { id, title, exchanges } = state.conversation;
  byId("empty").hidden = exchanges.length > 0;
  byId("title").textContent = title || "New conversation";
  document.title = title ? `${title} – pocketllava` : "pocketllava";
  if (exchanges.length) history.replaceState(null, "", `#${id}`);
  controls();
}

async function remove(id) {
  const [conversation, pictures] = [await store.conversation(id), await store.pictures(id)];
  if (state.run?.conversation.id === id) stop();
  state.deleted.add(id);
  await store.remove(id);
  if (state.conversation.id === id) startNew();
  await listHistory();
  (byId("conversations").querySelector("button") ?? byId("new")).focus();
  note(`Deleted “${conversation.title}”.`, { text: "Undo", act: async () => {
    state.deleted.delete(id);
    await store.save(conversation, pictures);
    await listHistory();
  } });
}

async function clearAll() {
  const all = await store.conversations();
  const count = all.length;
  if (!count) return note("There is nothing to delete.");
  byId("confirm-title").textContent = count === 1 ? "Delete the conversation?" : `Delete all ${count} conversations?`;
  byId("confirm-text").textContent = "Their pictures go as well. An export, made before, can be imported again.";
  byId("confirm-ok").textContent = "Delete all";
  if ((await opened(byId("confirm"))) !== "ok") return;
  stop();
  for (const { id } of all) state.deleted.add(id);
  await store.clear();
  startNew();
}

async function exportAll() {
  const url = URL.createObjectURL(await store.exported());
  el("a", { href: url, download: `pocketllava-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function importFile(file) {
  try {
    const added = await store.imported(file);
    await listHistory();
    note(added === 1 ? "1 conversation imported." : `${added} conversations imported.`);
  } catch (error) {
    note(`${file.name} could not be imported: ${error.message}`);
  }
}

/** A small picture for the list of the history. It is never sent. */
async function thumbnail(picture) {
  try {
    const bitmap = await createImageBitmap(new Blob([picture.bytes], { type: picture.type }));
    const side = Math.min(bitmap.width, bitmap.height);
    const canvas = new OffscreenCanvas(THUMBNAIL_PIXELS, THUMBNAIL_PIXELS);
    const [left, top] = [(bitmap.width - side) / 2, (bitmap.height - side) / 2];
    canvas.getContext("2d").drawImage(bitmap, left, top, side, side, 0, 0, THUMBNAIL_PIXELS, THUMBNAIL_PIXELS);
    const blob = await canvas.convertToBlob({ type: "image/png" });
    return `data:image/png;base64,${base64(await blob.arrayBuffer())}`;
  } catch {
    return "";
  }
}

// ---------------------------------------------------------------- taking pictures in

async function takeIn(files) {
  const read = await Promise.allSettled([...files].map((file) => readPicture(file, newId())));
  for (const { reason } of read) if (reason) note(reason.message);
  const pictures = read.filter(({ value }) => value).map(({ value }) => value);
  if (!pictures.length) return;
  leaveAlbum();
  tray.add(pictures);
  suggest(SUGGESTIONS);
  question.focus();
}

async function takeExample() {
  const blob = await (await fetch("example.png")).blob();
  await takeIn([new File([blob], "example.png", { type: blob.type })]);
  suggest(EXAMPLE_SUGGESTIONS);
}

function suggest(questions) {
  const buttons = questions.map((text) => el("button", { type: "button", onclick: () => {
    question.value = text;
    ask();
  } }, text));
  byId("suggestions").replaceChildren(...buttons);
  controls();
}

/** Shows a message above the question, with something to do about it. */
function note(text, action = null) {
  const close = () => item.remove();
  const item = el("div", { class: "note" }, el("p", { dir: "auto" }, text),
    action && el("button", { type: "button", class: "small", onclick: () => { close(); action.act(); } }, action.text),
    iconButton("close", "Dismiss", close));
  byId("notes").append(item);
  while (byId("notes").childElementCount > 3) byId("notes").firstElementChild.remove();
  setTimeout(close, 15_000);
}

// ---------------------------------------------------------------- the frame

function controls() {
  const hasPictures = tray?.entries.length > 0;
  const isRunning = state.run !== null;
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  document.body.classList.toggle("has-pictures", hasPictures);
  byId("send").disabled = !hasPictures && !question.value.trim();
  byId("suggestions").hidden = !hasPictures || isRunning || question.value !== "";
  question.placeholder = hasPictures ? DEFAULT_QUESTION : state.conversation?.exchanges.length ? "Ask another question" : "Ask about a picture";
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

/** Keeps the end in sight while an answer grows, unless the reader has scrolled up or is elsewhere. */
function follow(isForced = false) {
  if (isInAlbum() || (state.run && state.run.conversation !== state.conversation)) return;
  const box = byId("scroll");
  const isNear = box.scrollHeight - box.scrollTop - box.clientHeight < 160;
  if (isForced || isNear) box.scrollTop = box.scrollHeight;
}

function openHistory() {
  document.body.classList.add("history-open");
  byId("open-history").setAttribute("aria-expanded", "true");
  narrowed();
  byId("close-history").focus();
}

function closeHistory() {
  if (!document.body.classList.contains("history-open")) return;
  document.body.classList.remove("history-open");
  byId("open-history").setAttribute("aria-expanded", "false");
  narrowed();
  byId("open-history").focus();
}

const isNarrow = matchMedia("(max-width: 860px)");
const isCoarse = matchMedia("(pointer: coarse)");

/** On a narrow screen the history lies over the page: what is out of sight cannot be reached by Tab either. */
function narrowed() {
  const isOpen = document.body.classList.contains("history-open");
  byId("history").inert = isNarrow.matches && !isOpen;
  byId("page").inert = isNarrow.matches && isOpen;
}

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  question.addEventListener("input", () => { grow(); controls(); });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    if (isCoarse.matches && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    ask();
  });
  byId("stop").addEventListener("click", stop);
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (document.body.classList.contains("history-open")) closeHistory();
    else stop();
  });
  for (const id of ["new", "new-short"]) byId(id).addEventListener("click", startNew);
  byId("open-album").addEventListener("click", openAlbum);
  byId("open-history").addEventListener("click", openHistory);
  for (const id of ["close-history", "scrim"]) byId(id).addEventListener("click", closeHistory);
  isNarrow.addEventListener("change", narrowed);
  byId("export").addEventListener("click", exportAll);
  byId("clear").addEventListener("click", clearAll);
  byId("example").addEventListener("click", takeExample);
  listenForFiles();
  listenInDialogs();
}

function listenForFiles() {
  chooser("pick", "picker", takeIn);
  chooser("photo", "camera", takeIn);
  chooser("like", "like-file", ([file]) => album.like(file));
  byId("import").addEventListener("click", () => byId("import-file").click());
  onFiles("import-file", ([file]) => importFile(file));
  addEventListener("paste", (event) => {
    if (!event.clipboardData?.files.length) return;
    event.preventDefault();
    takeIn(event.clipboardData.files);
  });
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    byId("drop").hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) byId("drop").hidden = true;
  });
  addEventListener("drop", (event) => {
    byId("drop").hidden = true;
    if (!hasFiles(event)) return;
    event.preventDefault();
    takeIn(event.dataTransfer.files);
  });
}

function chooser(act, input, work) {
  for (const button of document.querySelectorAll(`[data-act="${act}"]`)) {
    button.addEventListener("click", () => byId(input).click());
  }
  onFiles(input, work);
}

function onFiles(input, work) {
  byId(input).addEventListener("change", async ({ target }) => {
    if (target.files.length) await work([...target.files]);
    target.value = ""; // the same file may be chosen again
  });
}

function listenInDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close();
    });
  }
}

async function start() {
  listen();
  narrowed();
  if (!store.keeps) note("This browser keeps no history here: a reload starts anew.");
  const wantsAlbum = location.hash === ALBUM;
  if (location.hash && !wantsAlbum) await open(location.hash.slice(1));
  else startNew();
  if (!isCoarse.matches) question.focus();
  if (wantsAlbum && (await album.offered().catch(() => false))) openAlbum();
  watchHealth();
}

await start();
