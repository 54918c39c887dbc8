// Talks to the server this page came from, and to no other. Knows its routes and its errors; builds no elements.

const KEY = "pocketllava-key";
const STATES = { ok: "ready", loading: "loading", restarting: "restarting", idle: "asleep", unloaded: "asleep" };

export class ApiError extends Error {
  constructor(status, body, headers) {
    const error = body?.error ?? {};
    super((typeof error === "string" ? error : error.message) || `the server answered ${status}`);
    this.status = status;
    this.code = error.code ?? "";
    this.type = error.type ?? "";
    this.retry = headers?.get("x-should-retry") !== "false";
    this.retryAfter = Number(headers?.get("retry-after")) || 0;
  }

  get overflows() {
    return this.code === "context_length_exceeded" || this.type === "exceed_context_size_error";
  }
}

/** An error in the words of someone who runs no server. */
export function plain(error) {
  if (!(error instanceof ApiError)) return "The server cannot be reached. Is pocketllava serve still running?";
  if (error.overflows) {
    return `This conversation no longer fits the model. Start a new one, or show fewer pictures. (${error.message})`;
  }
  if (error.status === 429) return "Others are asking too, and the line is full. Ask again in a moment.";
  if (error.status === 503 && !error.retry) {
    return "The engine stopped while it answered this question, and is starting again. Another picture or question may work.";
  }
  if (error.status === 503) return `The model is not ready: ${error.message}`;
  if (error.status === 413) return "That is more than this server takes at once. Show fewer or smaller pictures.";
  if (error.status === 403) return `This server does not accept questions from here: ${error.message}`;
  if (error.status === 401) return "Without its key, this server does not answer.";
  if (/HEIC/.test(error.message)) return HEIC;
  if (error.status === 404) return `The server does not know this: ${error.message}`;
  if (error.status >= 500) return `Something went wrong on the server: ${error.message}`;
  return `The server refused this: ${error.message}`;
}

export const HEIC =
  "This is a HEIC photo, and this server cannot read those. Save it as JPEG, or install pocketllava[heic] on the server.";

export class Api {
  /** askKey(isWrong): resolves to a key, or null when nobody gives one. */
  constructor(askKey) {
    this.askKey = askKey;
    this.asking = null;
  }

  async models() {
    return (await json(await this.request("v1/models"))).data ?? [];
  }

  /** {state: ready | loading | restarting | asleep | away, queue, text}; never throws, never wakes the model. */
  async health() {
    let response;
    try {
      response = await fetch("health", { cache: "no-store", headers: this.headers() });
    } catch {
      return { state: "away", queue: 0, text: "" };
    }
    const body = await response.json().catch(() => ({}));
    const text = body.error?.message ?? body.message ?? "";
    const named = STATES[body.status] ?? (/restart/i.test(`${body.status} ${text}`) ? "restarting" : "loading");
    return { state: response.ok && named !== "asleep" ? "ready" : named, queue: body.queue ?? 0, text };
  }

  /** Starts encoding and evaluating ahead; an id to ask about, or null where the server is too busy to. */
  async prepare(messages, signal) {
    const response = await this.post("v1/prepare", { messages }, signal);
    if ([404, 405, 429, 503].includes(response.status)) return null;
    return (await json(response)).id;
  }

  async preparation(id, signal) {
    return json(await this.request(`v1/prepare/${encodeURIComponent(id)}`, { signal, cache: "no-store" }));
  }

  /** {blob, columns, rows}: a picture as the vision tower gets it. */
  async view(imageUrl, signal) {
    const response = await this.post("v1/view", { image_url: imageUrl }, signal);
    if (!response.ok) await json(response);
    const [columns, rows] = (response.headers.get("x-grid") ?? "").split("x").map(Number);
    return { blob: await response.blob(), columns: columns || 0, rows: rows || 0 };
  }

  /** {name, pictures, columns: [{id, question, model}]}; no name where no album is served. */
  async album() {
    return json(await this.request("v1/album"));
  }

  /** Pictures of the album: [{id, path, caption, question, mark, likeness}]. */
  async albumSearch(body, signal) {
    return (await json(await this.post("v1/album/search", body, signal))).data;
  }

  /** A blob. kind: "pictures" as they are, or "thumbnails". */
  async albumPicture(kind, id, signal) {
    const response = await this.request(`v1/album/${kind}/${id}`, { signal });
    if (!response.ok) await json(response);
    return response.blob();
  }

  /** Yields {text}, {progress: {stage, share}}, {finish, timings} and {usage} as they come. */
  async *chat(body, signal) {
    const options = { stream: true, stream_options: { include_usage: true }, return_progress: true };
    const response = await this.post("v1/chat/completions", { ...body, ...options }, signal);
    if (!response.ok) await json(response);
    let finished = false;
    for await (const event of serverEvents(response.body)) {
      if (event.comment !== undefined) {
        const progress = commentProgress(event.comment);
        if (progress) yield { progress };
      } else if (event.data === "[DONE]") {
        return;
      } else {
        for (const part of chunkParts(JSON.parse(event.data))) {
          finished ||= part.finish !== undefined;
          yield part;
        }
      }
    }
    if (!finished) throw new TypeError("the answer broke off");
  }

  post(path, body, signal) {
    const headers = { "content-type": "application/json" };
    return this.request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  }

  async request(path, options = {}) {
    for (let isWrong = this.key !== null; ; isWrong = true) {
      const sent = this.key;
      const response = await fetch(path, { ...options, headers: { ...options.headers, ...this.headers() } });
      if (response.status !== 401) return response;
      // Another request may have asked for the key in the meantime.
      if (this.key === sent && !(await this.newKey(isWrong))) return response;
    }
  }

  async newKey(isWrong) {
    this.asking ??= this.askKey(isWrong).finally(() => (this.asking = null));
    const key = await this.asking;
    if (key) sessionStorage.setItem(KEY, key);
    return Boolean(key);
  }

  get key() {
    return sessionStorage.getItem(KEY);
  }

  headers() {
    return this.key === null ? {} : { authorization: `Bearer ${this.key}` };
  }
}

async function json(response) {
  const body = await response.json().catch(() => null);
  if (!response.ok) throw new ApiError(response.status, body, response.headers);
  return body;
}

/** Server-sent events: {data} or {comment}. EventSource can neither post nor send a key. */
async function* serverEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield { data: line.slice(5).trim() };
        else if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function* chunkParts(chunk) {
  if (chunk.error) throw new ApiError(chunk.error.status ?? 500, chunk, null);
  const progress = chunk.prompt_progress;
  if (progress?.total) {
    yield { progress: { stage: progress.stage ?? "prompt", share: progress.processed / progress.total } };
  }
  const choice = chunk.choices?.[0];
  if (choice?.delta?.content) yield { text: choice.delta.content };
  if (choice?.finish_reason) yield { finish: choice.finish_reason, timings: chunk.timings ?? null };
  if (chunk.usage) yield { usage: chunk.usage };
}

/** "image 40%", "prompt 7%", "queue 2": what keep-alive comments say. */
function commentProgress(comment) {
  const share = /^(\w+) (\d+)\s*%/.exec(comment);
  if (share) return { stage: share[1], share: Number(share[2]) / 100 };
  const place = /^queued?\D*(\d+)/.exec(comment);
  return place ? { stage: "queue", ahead: Number(place[1]) } : null;
}
