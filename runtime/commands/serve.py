"""`pocketllava serve`: a server for OpenAI's and Ollama's clients, and a page in the browser."""

from __future__ import annotations

import socket
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketllava.commands.common import Place, load_options, pair_of
from pocketllava.commands.completion import Model
from pocketllava.commands.exporting import ALBUM_SUFFIX
from pocketllava.errors import InputError, UnsupportedOption
from pocketllava.models.files import expanded

if TYPE_CHECKING:
    from pocketllava.llava import Llava
    from pocketllava.models import Bundle

ANYWHERE = ("0.0.0.0", "::")
MIN_KEY = 8  # characters


@click.command()
@click.argument("model", metavar="BUNDLE", type=Model())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; all but loopback need a key.")
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one."
)
@click.option(
    "--alias", "aliases", multiple=True, metavar="NAME", help="A further name of the model; repeatable."
)
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="The key clients must send."
)
@click.option("--origin", "origins", multiple=True, metavar="ORIGIN", help="A page that may ask; repeatable.")
@click.option(
    "--allow-host", "hosts", multiple=True, metavar="NAME", help="The server's further names; repeatable."
)
@click.option(
    "--queue", default=8, show_default=True, type=click.IntRange(1, 1000), help="Requests that may wait."
)
@click.option(
    "--idle", type=click.FloatRange(0, min_open=True), metavar="MINUTES", help="Then free the model."
)
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
@click.option(
    "--album",
    metavar="FILE",
    type=Place(),
    help="An album for the page to show, or the folder of its pictures.",
)
@load_options
def serve(
    model: str,
    host: str,
    port: int,
    aliases: tuple[str, ...],
    api_key_file: Path | None,
    origins: tuple[str, ...],
    hosts: tuple[str, ...],
    queue: int,
    idle: float | None,
    open_page: bool,
    album: str | None,
    load: dict[str, Any],
) -> None:
    """Serve a model on this machine: OpenAI's API, Ollama's, and a page.

    BUNDLE is a folder made by `convert`, or the name `demo`. The address of the page is printed; OpenAI's clients
    take the same address with /v1. It answers before the model is loaded.
    """
    try:
        import uvicorn

        from pocketllava.serve.app import build
        from pocketllava.serve.connection import config
        from pocketllava.serve.guard import Access, is_loopback
        from pocketllava.serve.served import DEFAULT_ALIASES, DEFAULT_CTX, Served
        from pocketllava.serve.supervisor import Supervisor
    except ImportError as error:
        raise UnsupportedOption(
            f"serve: needs {error.name or error}; install the extra: pip install 'pocketllava[serve]'"
        ) from error
    from pocketllava.album.gallery import Gallery
    from pocketllava.names import open_bundle

    key = _key(api_key_file)
    if key is None and not is_loopback(host):
        raise click.UsageError(f"--host {host} is open to other machines: give --api-key-file FILE as well")
    gallery = Gallery(_album_of(expanded(album))) if album is not None else None
    bundle = open_bundle(model, **pair_of(load))
    loading = partial(_load, model, Path(model).name or model, bundle, load)
    supervisor = Supervisor(loading, queue=queue, idle_s=idle * 60 if idle else None)
    served = Served(
        Path(model).name or model,
        bundle,
        tuple(dict.fromkeys((*aliases, *DEFAULT_ALIASES))),
        load["n_ctx"] or DEFAULT_CTX,
    )
    names = (*hosts, *([host] if host not in ANYWHERE else [socket.gethostname()]))
    app = build(supervisor, served, Access(key, origins, names), gallery)
    with listening(host, port) as listener:
        address = _address(host, listener.getsockname()[1])
        _announce(address, key)
        if open_page:
            click.launch(address)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config(app)).run([listener])


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; the connections wait there until the server takes them. Raises InputError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()  # IPv4's addresses as well
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{host}:{port}: cannot listen there ({reason}); take another --port") from error
    # asyncio turns Nagle's algorithm off only where the protocol is said; with it, answers of one packet after another
    # wait 40 ms for the client's acknowledgement.
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, listener.detach())


def _album_of(path: Path) -> Path:
    """An album's file; of a folder of pictures, the one that `caption` puts beside it."""
    if not path.is_dir():
        return path
    folder = path.resolve()
    return folder.with_name(folder.name + ALBUM_SUFFIX)


def _announce(address: str, key: str | None) -> None:
    """Two lines at once: where, and for whom. The third follows when the model is loaded."""
    click.echo(f"page: {address}")
    click.echo(
        f"clients: OpenAI {address}/v1, Ollama {address}; {'with the API key' if key else 'no API key'}"
    )


def _load(model: str, name: str, bundle: Bundle, load: dict[str, Any]) -> Llava:
    """The model in a child process, and the third line: what is loaded, and where."""
    from pocketllava.serve.supervisor import load_engine

    llava = load_engine(model, load)
    types, devices = bundle.manifest.types, " + ".join(dict.fromkeys(llava.devices))
    with suppress(OSError):  # nobody reads it any more
        click.echo(f"model: {name} ({types.model} + {types.mmproj}) on {devices}, context {llava.n_ctx}")
    return llava


def _address(host: str, port: int) -> str:
    shown = "localhost" if host in ANYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def _key(path: Path | None) -> str | None:
    """The key in a file. Raises InputError."""
    if path is None:
        return None
    try:
        key = path.expanduser().read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read as an API key ({reason})") from error
    if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"{path}: found no API key, expected one line of at least {MIN_KEY} ASCII characters"
        )
    return key
