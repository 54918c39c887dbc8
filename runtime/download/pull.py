"""A repository of the hub -> a model of the store: downloaded, converted if it is a checkpoint, then given its name.

Knows the steps; which files is in choice.py, their bytes are transfer.py's, the folder is the store's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketllava.convert import convert
from pocketllava.convert.pair import join
from pocketllava.convert.plan.quantize import MMPROJ_TYPES, TEXT_TYPES, known
from pocketllava.convert.read import original
from pocketllava.convert.read.config import LlavaConfig
from pocketllava.convert.read.sources import read_json
from pocketllava.convert.repair import examine, repair
from pocketllava.download import choice
from pocketllava.download.choice import DEFAULT_TYPE
from pocketllava.download.hub import Hub, HubFile, Listing
from pocketllava.download.transfer import Downloads
from pocketllava.errors import BundleError, DiskFull, DownloadError, InputError, ModelNotFound
from pocketllava.models.bundle import MANIFEST, MMPROJ, MODEL, Bundle
from pocketllava.models.files import atomic_write, move
from pocketllava.models.manifest import Source
from pocketllava.models.store import DOWNLOADS, Store, parsed

CHECKPOINT = "checkpoint"  # a model's checkpoint, with keep
SPARE_BYTES = 64 << 20  # left free on the disk
BITS_KEPT = 0.45  # of a checkpoint's 16 bits, in a text model of 6 bits and a vision tower of 16
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Pulled:
    """A model of the store. fresh: it was not there before. files: the hub's, of which it was made."""

    name: str
    bundle: Bundle
    fresh: bool
    files: tuple[HubFile, ...] = ()


def pull(
    source: str,
    *,
    quant: str | None = None,
    mmproj: str | None = None,
    name: str | None = None,
    keep: bool = False,
    store: Store | None = None,
    hub: Hub | None = None,
    progress: Progress = lambda *_: None,
) -> Pulled:
    """Download a model into the store; a checkpoint is converted.

    A run that was stopped is continued by the next one. Two processes may pull at once, the same model too.

    Args:
        source: owner/name[@revision][:TYPE], with or without hf://.
        quant: Type of the text model: the file's in a GGUF repository, what to convert to otherwise.
        mmproj: Type of the vision tower.
        name: The store's name; the repository's and the type otherwise.
        keep: Keep the checkpoint, in the model's folder.
        store, hub: Where to and where from; the user's own by default.
        progress: Called with a stage, bytes done, bytes in all, and a file's or tensor's name.

    Raises:
        InputError: A source, type or name that cannot be used, or a name that is taken.
        ModelNotFound: The hub has no such repository, or refuses it.
        DownloadError: The hub did not give a file, or not the one that it named.
        DiskFull: Both files do not fit on the disk.
        ConvertError: The checkpoint cannot be converted, or the GGUF files are no LLaVA.
    """
    wanted = choice.source(source)
    if name is not None:
        parsed(name)  # refused before anything is asked for
    if wanted.quant and quant and wanted.quant != choice.known_type(quant):
        raise InputError(f"{source}: found two types, {wanted.quant} and {quant}; give one of them")
    quant = wanted.quant or (choice.known_type(quant) if quant else None)
    hub, store = hub or Hub.default(), store or Store.default()
    with closing(hub):
        listing = hub.listing(wanted.repo, wanted.revision)
        job = _Job(listing, quant, choice.known_type(mmproj) if mmproj else None, keep, store, hub, progress)
        return job.run(name)


@dataclass(frozen=True)
class _Job:
    """One pull."""

    listing: Listing
    quant: str | None
    mmproj: str | None
    keep: bool
    store: Store
    hub: Hub
    progress: Progress

    @property
    def downloads(self) -> Downloads:
        return Downloads(self.store.root / DOWNLOADS, self.hub)

    def run(self, name: str | None) -> Pulled:
        pair = choice.pair(self.listing, self.quant, self.mmproj)
        files = self._measured(pair.files if pair else choice.checkpoint(self.listing))
        kind = (
            choice.type_of(pair.model) if pair else known(self.quant or DEFAULT_TYPE, TEXT_TYPES, "--quant")
        )
        full = _full_name(name, self.listing.repo, kind)
        if (there := self._there(full, kind, files)) is not None:
            return there
        self._check_disk(files, converted=pair is None)
        try:
            with self.store.create(full, wait=True) as staging:
                if pair:
                    self._join(staging, files)
                else:
                    self._convert(staging, files, kind)
        except InputError:  # taken meanwhile, by this very model perhaps
            if (there := self._there(full, kind, files)) is None:
                raise
            return there
        except OSError as error:
            place = error.filename or self.store.root
            raise DownloadError(f"{place}: cannot be written ({error.strerror or error})") from error
        self.downloads.discard(files)
        return Pulled(full, Bundle.open(self.store.folder(full)), True, files)

    def _measured(self, files: Iterable[HubFile]) -> tuple[HubFile, ...]:
        return tuple(self.hub.measured(self.listing, file) for file in files)

    def _there(self, name: str, kind: str, files: Sequence[HubFile]) -> Pulled | None:
        """The model, where the store has the same one already."""
        try:
            bundle = Bundle.open(self.store.folder(name)) if self.store.has(name) else None
        except (BundleError, ModelNotFound):
            return None
        if bundle is None or bundle.manifest.source.id != self.listing.repo:
            return None
        manifest = bundle.manifest
        weights = {file.sha256 for file in files}
        same = manifest.source.revision == self.listing.commit and manifest.types.model == kind
        return Pulled(name, bundle, False) if same or manifest.files[MODEL].sha256 in weights else None

    def _check_disk(self, files: Sequence[HubFile], *, converted: bool) -> None:
        """Raises DiskFull before the first byte is asked for."""
        self.store.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.store.root).free
        needed = self.downloads.missing_bytes(files) + SPARE_BYTES
        if converted:
            needed += int(sum(file.bytes for file in files) * BITS_KEPT)
        if needed > free:
            raise DiskFull(
                f"{self.store.root}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed for {self.listing.repo};"
                " make room, or set POCKETLLAVA_HOME to a folder on another disk",
                needed,
                free,
            )

    def _get(self, files: Sequence[HubFile], n: int, target: Path) -> None:
        """Download the n-th file and put it into the target."""
        file, before = files[n], sum(file.bytes for file in files[:n])
        total = sum(file.bytes for file in files)

        def progress(n_bytes: int) -> None:
            self.progress("download", before + n_bytes, total, file.name)

        whole = self.downloads.get(file, self.hub.url(self.listing, file.name), progress)
        try:
            target.hardlink_to(whole)  # should this run be killed, the next one finds it whole
        except OSError:  # a file system without links
            move(whole, target)

    def _join(self, staging: Path, files: Sequence[HubFile]) -> None:
        self._get(files, 0, staging / MMPROJ)
        repaired = _mended(staging / MMPROJ)
        self._get(files, 1, staging / MODEL)
        bundle = join(staging / MODEL, staging / MMPROJ)
        for record, file in ((MMPROJ, files[0]), (MODEL, files[1])):
            if file.sha256 and not (repaired and record == MMPROJ):
                _check_digest(bundle, record, file.sha256)
        self._sign(bundle, staging)

    def _convert(self, staging: Path, files: Sequence[HubFile], kind: str) -> None:
        checkpoint, made = staging / CHECKPOINT, staging / "bundle"
        checkpoint.mkdir()
        for n, file in enumerate(files):
            self._get(files, n, checkpoint / file.name)
            if file.name == "config.json":
                _check_config(checkpoint / file.name)
        vision = known(self.mmproj or "F16", MMPROJ_TYPES, "--mmproj-type")
        bundle = convert(checkpoint, made, quant=kind, mmproj=vision, progress=self.progress)
        self._sign(bundle, staging)
        for name in (MODEL, MMPROJ):
            move(made / name, staging / name)
        shutil.rmtree(made)
        if not self.keep:
            shutil.rmtree(checkpoint)

    def _sign(self, bundle: Bundle, staging: Path) -> None:
        """Write bundle.json with the hub's id and commit."""
        origin = Source(self.listing.repo, self.listing.commit, bundle.manifest.source.weights)
        values: dict[str, Any] = replace(bundle.manifest, source=origin).to_json()
        with atomic_write(staging / MANIFEST) as part:
            part.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _full_name(name: str | None, repo: str, kind: str) -> str:
    """The name that was said, or the repository's; the type is the tag of one that has none."""
    name = name or choice.default_name(repo)
    return parsed(name if ":" in name or not kind else f"{name}:{kind}")


def _mended(mmproj: Path) -> bool:
    """Rewrite an mmproj of llama.cpp's first scripts, whose keys today's llama.cpp needs. Raises ConvertError."""
    plan = examine(mmproj)
    if not plan.faults:
        return False
    mended = repair(plan, mmproj.with_name("mended.gguf"))
    move(mended, mmproj)
    return True


def _check_digest(bundle: Bundle, name: str, sha256: str) -> None:
    found = bundle.manifest.files[name].digest
    if found != sha256:
        raise DownloadError(
            f"{name}: SHA-256 is {found[:12]}... on this disk, expected {sha256[:12]}...; check the disk, pull"
            " again"
        )


def _check_config(path: Path) -> None:
    """Refuse a checkpoint that cannot be converted before its weights are asked for. Raises ConvertError."""
    config = read_json(path)
    if original.text_kind(config) is None:
        LlavaConfig.from_json(config)
    else:
        original.hub_config(config, None)
