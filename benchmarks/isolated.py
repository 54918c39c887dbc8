"""What the child process and HTTP cost over a model in this process: milliseconds a request, percent of decoding.

    python benchmarks/isolated.py BUNDLE [--image FILE] [--runs N] [--tokens N]

The same question about the same picture, which all three have seen, answered with one token and with many: the first
is a request's own time, the difference that of decoding. The sides take turns; medians. Needs the extra `serve`. Run
it on a quiet machine, with a small model: what is measured does not grow with it.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from arguments import about, arguments, image_part

from pocketllava import Llava, Options

QUESTION = "What is this?"
SCHEMA = {"type": "string", "minLength": 2000}  # no answer ends by itself
CTX = 2048
RESTS_S = 4.0  # uvicorn closes a connection without requests after 5
Ask = Callable[[int], None]


def main() -> None:
    """Measure, and print a table."""
    ap = arguments(__doc__)
    ap.add_argument("--tokens", type=int, default=200)
    a = ap.parse_args()
    picture = Path(a.image).read_bytes()
    with ExitStack() as stack:
        sides: dict[str, Ask] = {
            name: _of_model(stack.enter_context(Llava.load(a.bundle, n_ctx=CTX, isolated=isolated)), picture)
            for name, isolated in (("in process", False), ("child process", True))
        }
        sides["HTTP"] = stack.enter_context(_served(a.bundle, picture))
        seconds = _measured(sides, a.runs, a.tokens)
    print(about(runs=a.runs, tokens=a.tokens))
    print(
        "\n| | one token, ms | over in process, ms | a token, ms | over in process |\n|---|---|---|---|---|"
    )
    first, each = seconds["in process"]
    for name, (one, token) in seconds.items():
        print(
            f"| {name} | {one * 1e3:.2f} | {(one - first) * 1e3:+.2f} | {token * 1e3:.3f} | {token / each - 1:+.1%} |"
        )


def _measured(sides: dict[str, Ask], runs: int, tokens: int) -> dict[str, tuple[float, float]]:
    """(seconds of a request for one token, seconds of each further token) a side."""
    for ask in sides.values():
        ask(tokens)
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, ask in sides.items():
            took[name].append((_seconds(ask, 1), _seconds(ask, tokens)))
    return {
        name: (
            statistics.median(one for one, _ in pairs),
            statistics.median(many - one for one, many in pairs) / (tokens - 1),
        )
        for name, pairs in took.items()
    }


def _seconds(ask: Ask, tokens: int) -> float:
    start = time.perf_counter()
    ask(tokens)
    return time.perf_counter() - start


def _of_model(model: Llava, picture: bytes) -> Ask:
    def ask(tokens: int) -> None:
        answer = model.ask(picture, QUESTION, options=Options(max_tokens=tokens, schema=SCHEMA))
        assert answer.timings.answer_tokens == tokens

    return ask


@contextmanager
def _served(bundle: str, picture: bytes) -> Iterator[Ask]:
    """Over one connection, as clients keep it; one that rests while the other sides are asked is opened anew."""
    command = [sys.executable, "-m", "pocketllava", "serve", bundle, "--port", "0", "--ctx", str(CTX)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    lines = [process.stdout.readline() for _ in range(3)]  # the third comes with the model
    connection = http.client.HTTPConnection("127.0.0.1", int(lines[0].rsplit(":", 1)[1]), timeout=600)
    content = [{"type": "text", "text": QUESTION}, image_part(picture)]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    used_s = 0.0

    def ask(tokens: int) -> None:
        nonlocal used_s
        if time.monotonic() - used_s > RESTS_S:
            connection.close()
        body = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "response_format": form,
        }
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        usage = json.loads(connection.getresponse().read())["usage"]
        assert usage["completion_tokens"] == tokens
        used_s = time.monotonic()

    try:
        yield ask
    finally:
        connection.close()
        process.terminate()
        process.communicate(timeout=20)


if __name__ == "__main__":
    main()
