"""A hub's repository as a list of files with their sizes and hashes, and the requests that are worth a second try.

Knows the hub's routes (/api/models, /resolve), its headers and HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE; writes no file.
What a hub says is a stranger's: names, sizes and hashes are checked before they are believed.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from pocketllava.errors import DownloadError, InputError, ModelNotFound, UnsupportedOption
from pocketllava.version import __version__

if TYPE_CHECKING:
    import requests  # late: urllib3 opens a socket when it is imported, and offline none is opened

ENDPOINT = "https://huggingface.co"
MAX_LISTING_BYTES = 32 << 20
MAX_FILE_BYTES, MAX_FILES = 1 << 44, 100_000
BUSY = (408, 425, 429, 500, 502, 503, 504)  # a later try may succeed
FORBIDDEN = (401, 403)
MAX_WAIT_S = 60.0  # of what a server asks for in Retry-After
_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Patience:
    """How long a silent server is waited for, and how often it is asked again without having sent a byte."""

    connect_s: float = 15.0
    read_s: float = 45.0
    tries: int = 6
    pause_s: float = 1.0

    def wait(self, failures: int, asked_s: float = 0.0) -> None:
        """Sleep before the next try: twice as long each time, or as long as the server asked for."""
        time.sleep(min(MAX_WAIT_S, max(asked_s, self.pause_s * 2.0 ** (failures - 1))))


class TryAgain(Exception):
    """A failure that the next try may not have. Its text is the reason."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. sha256 is that of large files; the others have git's hash of a blob, a SHA-1."""

    name: str
    bytes: int
    sha256: str | None
    sha1: str | None

    @property
    def key(self) -> str:
        """A file name for its content."""
        return f"sha256-{self.sha256}" if self.sha256 else f"sha1-{self.sha1}"


@dataclass(frozen=True)
class Listing:
    """A repository at one commit."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]

    def named(self, name: str) -> HubFile | None:
        """The file of that name."""
        return next((file for file in self.files if file.name == name), None)


@dataclass(frozen=True)
class Hub:
    """A hub at its endpoint."""

    endpoint: str
    patience: Patience = Patience()

    @classmethod
    def default(cls) -> Hub:
        """HF_ENDPOINT, or huggingface.co. Raises InputError where HF_HUB_OFFLINE is set."""
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise InputError(
                "HF_HUB_OFFLINE is set, so nothing is downloaded; unset it, or give a model that is here"
            )
        endpoint = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        if not endpoint.startswith(("https://", "http://")):
            raise InputError(
                f"HF_ENDPOINT: found {endpoint!r}, expected an address that begins with https://"
            )
        return cls(endpoint)

    @cached_property
    def session(self) -> requests.Session:
        """Sends the token to the endpoint; requests drops it where a redirect leads to another host or port."""
        try:
            import requests
            from huggingface_hub import get_token
        except ImportError as error:
            raise UnsupportedOption(
                f'pull: needs {error.name}; install it with pip install "pocketllava[convert]"'
            ) from error
        session = requests.Session()
        session.headers["User-Agent"] = f"pocketllava/{__version__}"
        if token := get_token():
            if not token.isascii() or not token.isprintable():
                raise InputError("HF_TOKEN: found characters that no token has; set it again")
            session.headers["Authorization"] = f"Bearer {token}"
        session.headers["Accept-Encoding"] = "identity"  # ranges and hashes are of the files' own bytes
        return session

    def close(self) -> None:
        """Close connections that are kept for a next request."""
        if "session" in vars(self):
            self.session.close()

    def url(self, listing: Listing, name: str) -> str:
        """Where a file's bytes are."""
        return f"{self.endpoint}/{listing.repo}/resolve/{listing.commit}/{quote(name)}"

    def listing(self, repo: str, revision: str | None) -> Listing:
        """What a repository holds. Raises ModelNotFound, DownloadError."""
        path = f"{self.endpoint}/api/models/{repo}/revision/{quote(revision or 'main', safe='')}?blobs=true"
        about = f"{repo}@{revision}" if revision else repo
        answer = self._patiently(about, lambda: self._json(path, about))
        commit, siblings = answer.get("sha"), answer.get("siblings")
        if not isinstance(commit, str) or not _SHA1.fullmatch(commit) or not isinstance(siblings, list):
            raise DownloadError(f"{about}: {self.endpoint} answered with no list of files; check HF_ENDPOINT")
        files = [file for entry in siblings[:MAX_FILES] if (file := _file(entry)) is not None]
        return Listing(repo, commit, tuple(files))

    def measured(self, listing: Listing, file: HubFile) -> HubFile:
        """The file with size and hash, which mirrors leave out of the listing, from its headers."""
        if file.bytes >= 0 and (file.sha256 or file.sha1):
            return file
        about = f"{listing.repo}/{file.name}"
        headers = self._patiently(about, lambda: self._head(self.url(listing, file.name), about))
        etag = headers.get("X-Linked-Etag", headers.get("ETag", "")).removeprefix("W/").strip('"').lower()
        size = headers.get("X-Linked-Size", headers.get("Content-Length", ""))
        sha256, sha1 = _matching(_SHA256, etag), _matching(_SHA1, etag)
        if not size.isdecimal() or int(size) > MAX_FILE_BYTES or not (sha256 or sha1):
            raise DownloadError(
                f"{about}: {self.endpoint} gives no size and hash, so it could not be checked"
            )
        return replace(file, bytes=int(size), sha256=sha256, sha1=sha1)

    @contextmanager
    def get(
        self, url: str, about: str, headers: Mapping[str, str] | None = None
    ) -> Iterator[requests.Response]:
        """An open answer of status 200, 206 or 416. Raises TryAgain, ModelNotFound, DownloadError."""
        timeout = (self.patience.connect_s, self.patience.read_s)
        with (
            translated(self.patience),
            self.session.get(url, headers=headers, stream=True, timeout=timeout) as response,
        ):
            _check(response, about)
            yield response

    def _patiently(self, about: str, ask: Any) -> Any:
        for failures in range(1, self.patience.tries + 1):
            try:
                return ask()
            except TryAgain as error:
                if failures == self.patience.tries:
                    raise DownloadError(
                        f"{about}: {self.endpoint} gave nothing ({error}); try again later"
                    ) from error
                self.patience.wait(failures, error.wait_s)
        raise AssertionError

    def _json(self, url: str, about: str) -> dict[str, Any]:
        with self.get(url, about) as response:
            body = b""
            for block in response.iter_content(1 << 16):
                body += block
                if len(body) > MAX_LISTING_BYTES:
                    raise DownloadError(
                        f"{about}: a list of more than {MAX_LISTING_BYTES} bytes; check HF_ENDPOINT"
                    )
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise TryAgain("no JSON") from None
        return answer if isinstance(answer, dict) else {}

    def _head(self, url: str, about: str) -> Mapping[str, str]:
        timeout = (self.patience.connect_s, self.patience.read_s)
        with (
            translated(self.patience),
            self.session.head(url, timeout=timeout, allow_redirects=False) as response,
        ):
            _check(response, about)
            return response.headers


@contextmanager
def translated(patience: Patience) -> Iterator[None]:
    """Turn what requests raises into a reason of a few words: its own texts hold whole addresses, keys included."""
    from requests import exceptions

    try:
        yield
    except (exceptions.ConnectTimeout, exceptions.ReadTimeout) as error:
        raise TryAgain(f"silent for {patience.read_s:g} s") from error
    except exceptions.SSLError as error:
        raise TryAgain("its certificate is not trusted") from error
    except exceptions.ConnectionError as error:
        stalled = "timed out" in str(error)
        raise TryAgain(f"silent for {patience.read_s:g} s" if stalled else "no connection") from error
    except exceptions.RequestException as error:
        raise TryAgain(f"the connection broke, {type(error).__name__}") from error


def _check(response: requests.Response, about: str) -> None:
    status = response.status_code
    host = urlsplit(response.url).hostname
    if status in FORBIDDEN:
        raise ModelNotFound(
            f"{about}: {host} refuses it ({status}): there is no such repository, or it is private or gated; check the"
            " name, accept its terms on the hub, and set HF_TOKEN"
        )
    if status in (404, 410):
        raise ModelNotFound(f"{about}: {host} has no such repository, revision or file; check the name")
    if status in BUSY:
        asked = response.headers.get("Retry-After", "")
        raise TryAgain(f"HTTP status {status}", float(asked) if asked.isdecimal() else 0.0)
    if status not in (200, 206, 416) and not 300 <= status < 400:
        raise DownloadError(f"{about}: {host} answered with HTTP status {status}, expected 200")


def _file(entry: Any) -> HubFile | None:
    """An entry of a listing; None for what is no file's."""
    name = entry.get("rfilename") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        return None
    lfs = entry["lfs"] if isinstance(entry.get("lfs"), dict) else {}
    size = lfs.get("size", entry.get("size"))
    size = size if type(size) is int and 0 <= size <= MAX_FILE_BYTES else -1
    sha256 = _matching(_SHA256, lfs.get("sha256"))
    return HubFile(name, size, sha256, None if lfs else _matching(_SHA1, entry.get("blobId")))


def _matching(pattern: re.Pattern[str], value: Any) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None
