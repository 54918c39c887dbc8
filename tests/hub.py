"""A hub on loopback: the Hugging Face hub's routes for files in memory, with the faults that a network has.

/api/models/ID/revision/REV lists, /ID/resolve/COMMIT/FILE redirects large files to a second port with ETags, as the
hub redirects to its CDN. `faults` are used up in their order, one a request for bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1 << 12  # bytes from which a file is in LFS


@dataclass(frozen=True)
class Fault:
    """What one answer does wrong: cut, stall after `bytes`; a status; other bytes; other lengths."""

    kind: str
    bytes: int = 0
    status: int = 503
    seconds: float = 0.0


@dataclass
class Request:
    """A request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    on_cdn: bool


@dataclass
class LocalHub:
    """Repositories by id, each a dictionary of files."""

    repos: dict[str, dict[str, bytes]]
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    hashes: bool = True  # in the listing; mirrors leave them out
    bytes_per_s: float = 0.0
    endpoint: str = ""
    cdn: str = ""
    etag: str = "e1"
    moved: dict[str, str] = field(default_factory=dict)  # ids of repositories that have another now
    sent: int = 0

    def bytes_of(self, repo: str, name: str) -> bytes:
        return self.repos[repo][name]

    def for_bytes(self) -> list[Request]:
        """The requests that reached the CDN."""
        return [request for request in self.requests if request.on_cdn and request.method == "GET"]


@contextmanager
def serving(hub: LocalHub) -> Iterator[LocalHub]:
    """The hub on one port, its CDN on another."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, on_cdn)) for on_cdn in (False, True)]
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True) for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.daemon_threads = True
        server.block_on_close = False
        thread.start()
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def _handler(hub: LocalHub, on_cdn: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:  # the client was killed
                self.close_connection = True

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(Request(self.command, self.path, self.sent_headers(), on_cdn))
            old = next((old for old in hub.moved if f"/{old}/" in path), None)
            if old is not None:
                self.plain(307, b"", {"Location": self.path.replace(old, hub.moved[old])})
            elif on_cdn:
                self.bytes(*path.lstrip("/").split("/files/", 1))
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
                self.listing(match[1], match[2])
            elif match := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
                self.resolve(match[1], match[2])
            else:
                self.plain(404, b"not found")

        def sent_headers(self) -> dict[str, str]:
            return {name.title(): value for name, value in self.headers.items()}

        def listing(self, repo: str, revision: str) -> None:
            if repo == "private/model" and self.headers.get("Authorization") != "Bearer hf_right":
                return self.plain(401, b"no")
            if repo not in hub.repos or revision not in ("main", COMMIT, "v1"):
                return self.plain(404, b"no")
            files = [entry(name, data, hub.hashes) for name, data in hub.repos[repo].items()]
            return self.plain(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": files}).encode())

        def resolve(self, repo: str, name: str) -> None:
            data = hub.repos.get(repo, {}).get(name)
            if data is None:
                return self.plain(404, b"no")
            if len(data) < LARGE:
                return self.plain(200, data, {"ETag": f'"{git_sha1(data)}"'})
            self.send_response(302)
            self.send_header("Location", f"{hub.cdn}/{repo}/files/{name}?signature=secret")
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        def bytes(self, repo: str, name: str) -> None:
            data = hub.repos[repo][name]
            fault = hub.faults.pop(0) if hub.faults else Fault("none")
            if fault.kind == "status":
                return self.plain(fault.status, b"busy", {"Retry-After": "0"})
            start = self.start()
            if fault.kind == "no ranges":
                start = 0
            if fault.kind == "wrong bytes":
                data = bytes(255 - byte for byte in data)
            if fault.kind == "longer":
                data += b"more"
            if fault.kind == "shorter":
                data = data[:-5]
            if start >= len(data) > 0:
                return self.plain(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            self.send_response(206 if start else 200)
            if start:
                shown = start - 1 if fault.kind == "other range" else start
                self.send_header("Content-Range", f"bytes {shown}-{len(data) - 1}/{len(data)}")
            self.send_header("ETag", f'"{hub.etag}"')
            if fault.kind == "no length":
                self.send_header("Connection", "close")
                self.close_connection = True
            else:
                self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            return self.body(data[start:], fault)

        def start(self) -> int:
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            known = self.headers.get("If-Range")
            return int(match[1]) if match and known in (None, f'"{hub.etag}"') else 0

        def body(self, data: bytes, fault: Fault) -> None:
            end = min(fault.bytes, len(data)) if fault.kind in ("cut", "stall") else len(data)
            for offset in range(0, end, 1 << 14):
                block = data[offset : min(offset + (1 << 14), end)]
                self.wfile.write(block)
                hub.sent += len(block)
                if hub.bytes_per_s:
                    time.sleep(len(block) / hub.bytes_per_s)
            self.wfile.flush()
            if fault.kind == "stall":
                time.sleep(fault.seconds)
            if fault.kind in ("cut", "stall"):
                self.close_connection = True

        def plain(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    return Handler


def entry(name: str, data: bytes, hashes: bool) -> dict[str, Any]:
    """A file in a listing, as ?blobs=true gives it."""
    if not hashes:
        return {"rfilename": name}
    about: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
    if len(data) >= LARGE:
        about["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return about


def git_sha1(data: bytes) -> str:
    """git's hash of a blob."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
