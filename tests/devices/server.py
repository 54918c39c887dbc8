"""A server is started, asked about a picture as OpenAI's clients ask, and ended. Knows HTTP; not what answers."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

ADDRESS = re.compile(r"http://[\d.]+:\d+")
NO_ANSWER = 1


def asked_of_a_server(
    program: list[str], photo: Path, environment: dict[str, str], folder: Path, limit_s: float
) -> tuple[int, str, str]:
    """(exit status, the answer, messages). A server that ended before it was told to gives its own status."""
    with (folder / "messages").open("w+") as messages:
        child = subprocess.Popen(
            program, stdout=subprocess.PIPE, stderr=messages, env=environment, cwd=folder, text=True
        )
        try:
            status, text = _asked(child, photo, limit_s)
            early = child.poll()
        finally:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(30)
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
        messages.seek(0)
        said = messages.read()
    if early is not None:
        return early, "", said
    return (0, text, said) if status == 200 else (NO_ANSWER, "", f"{said}error: {text}\n")


def _asked(child: subprocess.Popen[str], photo: Path, limit_s: float) -> tuple[int, str]:
    """Status and text, or status and error, of one question."""
    assert child.stdout is not None
    found = ADDRESS.search(child.stdout.readline())
    if found is None:
        return NO_ANSWER, "no address"
    # It answers before the model is loaded, and keeps the question until then.
    status, reply = _post(f"{found[0]}/v1/chat/completions", _question(photo), limit_s)
    if status == 200:
        return status, str(reply["choices"][0]["message"]["content"])
    return status, str(reply.get("error", reply)).replace("\n", " ")


def _question(photo: Path) -> dict[str, Any]:
    uri = "data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What is it?"}]
    return {
        "model": "llava",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 2,
        "temperature": 0,
    }


def _post(address: str, body: dict[str, Any], timeout_s: float) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"{}")
    except OSError as error:
        return NO_ANSWER, {"error": f"the connection ended: {error}"}
