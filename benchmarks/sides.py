"""One side of against_peers.py, in the process that measures it: pocketllava, the stock handler, or llama-server.

Knows what each is asked and how its first token is noticed; not how often, nor what is made of the figures.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pocketllava import Llava, Message, Options
from pocketllava.llamacpp.devices import cores
from pocketllava.measure.speed import FIRST, MORE, SECOND, peak_bytes
from pocketllava.models import Bundle

CONTEXT = 2048
ENOUGH_TOKENS = 32  # to compare decoding speeds
START_S = 600.0  # for llama-server to load
SERVER = "LLAMA_SERVER"
OURS, STOCK, THEIRS = "pocketllava", "stock handler", "llama-server"
FEWER = "pocketllava, fewer image tokens"
PICTURES = ("warm", "a", "b", "prepared")
TURNS, TURN_TOKENS = 5, 24  # of the conversation that every side has


@dataclass(frozen=True)
class Times:
    """Of one answer: seconds to the first token, how many followed it in how many seconds, its prompt, its text."""

    first_s: float
    n_after: int
    after_s: float
    prompt_tokens: int
    text: str = ""


Texts = list[str]  # question, answer, question, ...: a conversation about one picture, a question last
Ask = Callable[[bytes, Texts, int], Times]  # picture, texts, tokens at most
Found = dict[str, Any]  # a row's name -> its value


@dataclass(frozen=True)
class Asked:
    """What a side is to do. image_tokens: of pocketllava only; short: fewer questions."""

    tokens: int
    n_ctx: int = CONTEXT
    image_tokens: int | None = None
    short: bool = False


def measure(ask: Ask, pictures: dict[str, bytes], tokens: int, *, short: bool = False) -> Found:
    """What every side is asked, in this order. short: a new picture's first token and decoding only."""
    ask(pictures["warm"], [FIRST], 4)
    cold = ask(pictures["a"], [FIRST], 1)
    found = {"cold": cold.first_s, "prompt": cold.prompt_tokens}
    if not short:
        found["second"] = ask(pictures["a"], [SECOND], 1).first_s
        ask(pictures["b"], [FIRST], 1)
    back = ask(pictures["a"], [FIRST], tokens)
    decoded = [back]
    for question in (SECOND, *MORE, *MORE):  # where answers end early
        if sum(times.n_after for times in decoded) >= min(ENOUGH_TOKENS, tokens - 1):
            break
        decoded.append(ask(pictures["a"], [question], tokens))
    n, seconds = sum(t.n_after for t in decoded), sum(t.after_s for t in decoded)
    if not short:
        found["back"] = back.first_s
    return {**found, "decoding": n / seconds} if seconds else found


def converse(ask: Ask, picture: bytes) -> Found:
    """A conversation of TURNS turns about a picture that was seen, each side with its own answers."""
    texts: Texts = []
    first_s = []
    for question in (FIRST, SECOND, *MORE, *MORE)[:TURNS]:
        times = ask(picture, [*texts, question], TURN_TOKENS)
        texts += [question, times.text.strip()]
        first_s.append(times.first_s)
    return {"turns": sum(first_s[1:]) / (TURNS - 1)}


def our_side(bundle: Bundle, pictures: dict[str, bytes], asked: Asked) -> Found:
    """Llava, as a program uses it."""
    with Llava.load(bundle.folder, n_ctx=asked.n_ctx, image_tokens=asked.image_tokens) as llava:

        def ask(picture: bytes, texts: Texts, n: int) -> Times:
            return our_times(llava, picture, texts, n)

        found = measure(ask, pictures, asked.tokens, short=asked.short)
        if not asked.short:
            found |= converse(ask, pictures["a"])
            start = time.perf_counter()
            llava.prepare(pictures["prepared"]).wait()
            found["preparing"] = time.perf_counter() - start
            found["prepared"] = ask(pictures["prepared"], [FIRST], 1).first_s
        return {**found, "peak": peak_bytes() / 1e9}


def our_times(llava: Llava, picture: bytes, texts: Texts, n: int) -> Times:
    """From the call to its first chunk, by the clock; what follows as Llava counts it."""
    messages = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    messages[0] = Message("user", texts[0], [picture])
    start, first_s, n_tokens, answer = time.perf_counter(), 0.0, 0, ""
    for chunk in llava.stream(messages, options=Options(max_tokens=n)):
        first_s = first_s or time.perf_counter() - start
        n_tokens += len(chunk.token_ids)
        answer += chunk.text
    assert chunk.timings is not None  # stream's promise
    n_after = n_tokens - (chunk.finish_reason != "stop")
    return Times(first_s, n_after, chunk.timings.decode_s, chunk.timings.prompt_tokens, answer)


def seen_side(bundle: Bundle, picture: bytes, cache: str, keep: bool) -> Found:
    """A new process that is shown a picture which another one, with the same cache folder, was shown."""
    with Llava.load(bundle.folder, n_ctx=CONTEXT, cache_dir=cache, keep_prefixes=keep) as llava:
        timings = llava.ask(picture, FIRST, options=Options(max_tokens=1)).timings
    if keep:
        return {"kept": timings.first_token_s}
    return {"seen": timings.first_token_s, "seen_encode": timings.encode_s}


def stock_side(bundle: Bundle, pictures: dict[str, bytes], asked: Asked) -> Found:
    """llama_cpp.Llama with its own handler. Tokens are noted as they are sampled, since some have no text."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    handler = Llava15ChatHandler(clip_model_path=str(bundle.mmproj), verbose=False)
    llama = Llama(
        str(bundle.model), chat_handler=handler, n_ctx=asked.n_ctx, n_threads=cores(), n_threads_batch=cores(),
        n_gpu_layers=-1, verbose=False,
    )  # fmt: skip
    generate, moments, prompt = llama.generate, [0.0], [0]

    def noted(ids: list[int], *args: Any, **kwargs: Any) -> Iterator[int]:
        prompt[0] = len(ids)
        for token in generate(ids, *args, **kwargs):
            moments.append(time.perf_counter())
            yield token

    llama.generate = noted  # type: ignore[method-assign, assignment]

    def ask(picture: bytes, texts: Texts, n: int) -> Times:
        messages: Any = openai_messages(picture, texts)
        moments[:] = [time.perf_counter()]
        llama.create_chat_completion(messages, max_tokens=n, temperature=0.0, repeat_penalty=1.0)
        return Times(moments[1] - moments[0], len(moments) - 2, moments[-1] - moments[1], prompt[0])

    return {**measure(ask, pictures, asked.tokens, short=asked.short), "peak": peak_bytes() / 1e9}


def server_side(bundle: Bundle, pictures: dict[str, bytes], asked: Asked) -> Found:
    """llama-server with one slot, over its OpenAI endpoint."""
    with llama_server(bundle, asked.n_ctx) as (port, process):

        def ask(picture: bytes, texts: Texts, n: int) -> Times:
            return server_times(port, picture, texts, n)

        found = measure(ask, pictures, asked.tokens, short=asked.short)
        if not asked.short:
            found |= converse(ask, pictures["a"])
        return {**found, "peak": server_peak(process.pid) / 1e9}


def server_times(port: int, picture: bytes | None, texts: Texts, n: int) -> Times:
    """From sending a request, about no picture too, to the first line of the stream with a token and to its last."""
    body = json.dumps({
        "messages": openai_messages(picture, texts), "max_tokens": n, "temperature": 0,
        "stream": True, "cache_prompt": True, "timings_per_token": True, "ignore_eos": True,
    })  # fmt: skip
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.connect()
        start = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"llama-server: status {response.status}: {response.read(300)!r}")
        first_s = last_s = 0.0
        answer = ""
        timings: dict[str, Any] = {}
        for line in response:
            if not line.startswith(b"data: {"):
                if line.startswith(b"error"):
                    raise SystemExit(f"llama-server: {line!r}")
                continue
            last_s = time.perf_counter() - start
            chunk = json.loads(line[len(b"data: ") :])
            timings = chunk.get("timings", timings)
            answer += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
            if not first_s and timings:  # tokens that had no text yet were sampled predicted_ms ago
                first_s = last_s - (timings["predicted_ms"] / 1000 if timings["predicted_n"] > 1 else 0.0)
            first_s = first_s or last_s
    n_after = int(timings["predicted_n"]) - 1
    n_prompt = int(timings["cache_n"] + timings["prompt_n"])
    return Times(first_s, n_after, last_s - first_s, n_prompt, answer)


@contextmanager
def llama_server(bundle: Bundle, n_ctx: int, slots: int = 1) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A running server's port and process; killed in any case. n_ctx: of each slot."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [
        os.environ[SERVER], "-m", bundle.model, "--mmproj", bundle.mmproj, "-c", n_ctx * slots, "-t", cores(),
        "-tb", cores(), "--parallel", slots, "--host", "127.0.0.1", "--port", port, "--offline",
    ]  # fmt: skip
    settings = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*map(str, command)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=settings
        )
        try:
            wait_until_healthy(process, port)
            yield port, process
        except BaseException:
            log.seek(0)
            print(log.read()[-3000:].decode("utf-8", "replace"), file=sys.stderr)
            raise
        finally:
            process.kill()
            process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    """Until the server has loaded its model."""
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"llama-server: not ready, exit code {process.poll()}")


def server_peak(pid: int) -> int:
    """The most memory that it had resident, where the system tells of other processes; else what it has now."""
    status = Path(f"/proc/{pid}/status")
    memory = psutil.Process(pid).memory_info()
    return peak_bytes(status) if status.exists() else int(getattr(memory, "peak_wset", memory.rss))


def openai_messages(picture: bytes | None, texts: Texts) -> list[dict[str, Any]]:
    """A conversation about a picture as OpenAI's clients send it."""
    later = [
        {"role": "assistant" if i % 2 == 0 else "user", "content": text} for i, text in enumerate(texts[1:])
    ]
    return [{"role": "user", "content": content(picture, texts[0])}, *later]


def content(picture: bytes | None, question: str) -> list[dict[str, Any]]:
    """A question about a picture, or about none, as OpenAI's clients send it."""
    if picture is None:
        return [{"type": "text", "text": question}]
    url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]


MEASURES = {OURS: our_side, FEWER: our_side, STOCK: stock_side, THEIRS: server_side}
