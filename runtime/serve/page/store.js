// The history, in this browser's IndexedDB: conversations, and the original bytes of their pictures. Knows no server.
//
// conversation: {id, title, created, updated, thumbnail, exchanges}
// exchange:     {id, question, pictures: [picture id], answers: [answer], shown: index of an answer}
// answer:       {text, finish, timings, usage, error, sampled}
// picture:      {id, conversation, name, type, bytes}

import { base64, kindOf } from "./pictures.js";

const FORMAT = "pocketllava-history";
const VERSION = 1;
const THUMBNAIL = /^data:image\/(?:png|webp|jpeg);base64,[A-Za-z0-9+/=]*$/;

/** crypto.randomUUID exists in secure contexts only; a phone reaches the server over plain http. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export async function openStore() {
  try {
    return new Store(await opened());
  } catch {
    return new Store(null);
  }
}

function opened() {
  const request = indexedDB.open("pocketllava", VERSION);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("conversations", { keyPath: "id" });
    request.result.createObjectStore("pictures", { keyPath: "id" }).createIndex("conversation", "conversation");
  };
  return result(request);
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

class Store {
  /** database: null where the browser keeps nothing (some private windows). */
  constructor(database) {
    this.database = database;
  }

  get keeps() {
    return this.database !== null;
  }

  /** Runs work(conversations, pictures) in one transaction, and waits until it is on disk. */
  async write(work) {
    if (!this.keeps) return;
    const transaction = this.database.transaction(["conversations", "pictures"], "readwrite");
    const stored = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    await Promise.all([stored, work(transaction.objectStore("conversations"), transaction.objectStore("pictures"))]);
  }

  async read(name, ask) {
    return this.keeps ? result(ask(this.database.transaction(name).objectStore(name))) : undefined;
  }

  /** All conversations, the latest first. */
  async conversations() {
    const all = (await this.read("conversations", (store) => store.getAll())) ?? [];
    return all.sort((a, b) => b.updated - a.updated);
  }

  conversation(id) {
    return this.read("conversations", (store) => store.get(id));
  }

  async pictures(conversationId) {
    return (await this.read("pictures", (store) => store.index("conversation").getAll(conversationId))) ?? [];
  }

  /** Writes a conversation and its new pictures; pictures that it no longer shows are dropped. */
  save(conversation, pictures = []) {
    return this.write(async (conversations, store) => {
      conversations.put(conversation);
      for (const picture of pictures) store.put({ ...picture, conversation: conversation.id });
      const shown = new Set(conversation.exchanges.flatMap((exchange) => exchange.pictures));
      const ids = await result(store.index("conversation").getAllKeys(conversation.id));
      for (const id of ids) if (!shown.has(id)) store.delete(id);
    });
  }

  remove(id) {
    return this.write(async (conversations, pictures) => {
      conversations.delete(id);
      for (const key of await result(pictures.index("conversation").getAllKeys(id))) pictures.delete(key);
    });
  }

  clear() {
    return this.write((conversations, pictures) => {
      conversations.clear();
      pictures.clear();
    });
  }

  /** One JSON file. Its parts are joined by the Blob, so that no string has to hold them all. */
  async exported() {
    const parts = [`{"format":"${FORMAT}","version":${VERSION},"conversations":[`];
    const all = await this.conversations();
    parts.push(all.map((conversation) => JSON.stringify(conversation)).join(",\n"), '],"pictures":[');
    let comma = "";
    for (const { id } of all) {
      for (const { bytes, ...picture } of await this.pictures(id)) {
        parts.push(comma, JSON.stringify({ ...picture, base64: base64(bytes) }));
        comma = ",\n";
      }
    }
    return new Blob([...parts, "]}\n"], { type: "application/json" });
  }

  /** Adds an exported file's conversations; of two with one id the later stays. The number added. */
  async imported(file) {
    const { conversations, pictures } = checked(JSON.parse(await file.text()));
    let added = 0;
    for (const conversation of conversations) {
      const present = await this.conversation(conversation.id);
      if (present && present.updated >= conversation.updated) continue;
      await this.save(conversation, pictures.filter((picture) => picture.conversation === conversation.id));
      added += 1;
    }
    return added;
  }
}

/** What a file claims to hold, reduced to the fields and types of this page. Throws on anything else. */
function checked(file) {
  if (file?.format !== FORMAT || file.version !== VERSION) throw new TypeError(`not a ${FORMAT} file`);
  return { conversations: file.conversations.map(asConversation), pictures: file.pictures.map(asPicture) };
}

function asConversation(value) {
  return {
    id: text(value.id), title: text(value.title), created: number(value.created), updated: number(value.updated),
    thumbnail: THUMBNAIL.test(value.thumbnail) ? value.thumbnail : "",
    exchanges: value.exchanges.map((exchange) => ({
      id: text(exchange.id), question: text(exchange.question), pictures: exchange.pictures.map(text),
      answers: exchange.answers.map(asAnswer), shown: number(exchange.shown),
    })),
  };
}

function asAnswer(value) {
  return {
    text: text(value.text), finish: text(value.finish ?? ""), error: text(value.error ?? ""),
    sampled: Boolean(value.sampled), timings: numbers(value.timings), usage: numbers(value.usage),
  };
}

function asPicture(value) {
  const binary = atob(value.base64);
  const bytes = Uint8Array.from(binary, (character) => character.charCodeAt(0)).buffer;
  const type = text(kindOf(bytes)?.type); // what the file says of itself is not believed
  return { id: text(value.id), conversation: text(value.conversation), name: text(value.name), type, bytes };
}

function text(value) {
  if (typeof value !== "string") throw new TypeError(`found ${typeof value}, expected a text`);
  return value;
}

function number(value) {
  if (!Number.isFinite(value)) throw new TypeError("expected a number");
  return value;
}

/** Numbers and texts of an object, and of those in it; null for anything else. */
function numbers(value) {
  if (typeof value !== "object" || value === null) return null;
  const entries = Object.entries(value).map(([name, item]) => [name, typeof item === "object" ? numbers(item) : item]);
  return Object.fromEntries(entries.filter(([, item]) => ["number", "string", "object"].includes(typeof item)));
}
