"""Planned bundles -> bundles: one pass over their common source, then each is verified and put in its place.

Knows the order of the steps; not where the plans come from (a checkpoint, or another bundle). One folder is
written beside each final one, which takes its name when all of the bundles are whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketllava.convert.plan.file_plan import FilePlan, SourceReader
from pocketllava.convert.write.journal import Journal, identity
from pocketllava.convert.write.staging import check_target, put_in_place, working_folder
from pocketllava.convert.write.verify import load_test, verify_file
from pocketllava.convert.write.writer import Output, Progress, write_together
from pocketllava.errors import DiskFull, PocketLlavaError
from pocketllava.models.bundle import MANIFEST, MMPROJ, MODEL, Bundle, describe_file

DISK_MARGIN_BYTES = 16 << 20


@dataclass(frozen=True, eq=False)  # each is itself: a key of dictionaries
class Job:
    """One bundle to make. `manifest` is bundle.json's content without `files`."""

    target: Path
    text: FilePlan
    mmproj: FilePlan
    manifest: Mapping[str, Any]

    @property
    def plans(self) -> dict[str, FilePlan]:
        """Both files, in the order in which they are written."""
        return {MODEL: self.text, MMPROJ: self.mmproj}

    @property
    def disk_bytes(self) -> int:
        """Disk that the bundle takes, headers included (to within some kilobytes)."""
        return sum(plan.n_bytes + plan.header_bytes for plan in self.plans.values())


def produce(
    jobs: Sequence[Job], *, force: bool, threads: int, progress: Progress | None, resume: bool
) -> list[Bundle]:
    """Make the bundles, whose tensors come from the same sources in the same order; none before all are whole.

    resume: leave alone what an earlier run finished, and go on from the last tensor that is whole on disk.
    """
    todo = [job for job in jobs if not (resume and _finished(job))]
    for job in todo:
        check_target(job.target, force)
    with ExitStack() as stack:
        works = {job: stack.enter_context(working_folder(job.target, resume)) for job in todo}
        todo = [job for job in todo if not (resume and _finished(job))]  # again: some may have been recovered
        for job in todo:
            check_target(job.target, force)
        if todo:
            _check_disk({job: works[job] for job in todo})
            _make({job: works[job] for job in todo}, threads, progress)
        for job in todo:
            put_in_place(works[job], job.target)
    return [Bundle.open(job.target) for job in jobs]


def _make(works: dict[Job, Path], threads: int, progress: Progress | None) -> None:
    """Write, verify and load-test the files and manifests of all jobs in their working folders."""
    jobs = list(works)
    advance = _Advance(
        "convert", sum(p.source_bytes for p in jobs[0].plans.values()) if jobs else 0, progress
    )
    journals = {job: Journal(works[job], identity(job.plans.values())) for job in jobs}
    digests: dict[Path, str] = {}
    with SourceReader() as reader, ExitStack() as stack:
        for outputs in _outputs(works, journals, stack):
            write_together(outputs, reader, threads, advance)
            digests |= {output.path: output.finish() for output in outputs}
    advance = _Advance("verify", sum(path.stat().st_size for path in digests), progress)
    for job, work in works.items():
        for name, plan in job.plans.items():
            verify_file(plan, work / name)
            advance((work / name).stat().st_size, name)
        load_test(work / MODEL, work / MMPROJ)
        files = {name: describe_file(work / name, digests[work / name]) for name in job.plans}
        manifest = json.dumps({**job.manifest, "files": files}, indent=2, ensure_ascii=False)
        (work / MANIFEST).write_text(manifest + "\n", "utf-8")


def _outputs(works: dict[Job, Path], journals: dict[Job, Journal], stack: ExitStack) -> list[list[Output]]:
    """The files to write together: all text models, then all mmprojs, each group from its last common tensor."""
    kept: dict[Job, dict[str, Any]] = {job: {} for job in works}
    for name in (MODEL, MMPROJ):
        for job, work in works.items():
            kept[job][name] = journals[job].whole(work / name)
        common = min((len(kept[job][name]) for job in works), default=0)
        for job in works:
            kept[job][name] = kept[job][name][:common]
    for job, journal in journals.items():
        journal.begin(kept[job])
    return [
        [
            stack.enter_context(
                Output(job.plans[name], work / name, journals[job], (kept[job][name] or [None])[-1])
            )
            for job, work in works.items()
        ]
        for name in (MODEL, MMPROJ)
    ]


class _Advance:
    """Adds up bytes and tells the caller."""

    def __init__(self, stage: str, total: int, progress: Progress | None) -> None:
        self.stage, self.total, self.progress, self.done = stage, total, progress, 0

    def __call__(self, n_bytes: int, name: str) -> None:
        self.done += n_bytes
        if self.progress:
            self.progress(self.stage, self.done, self.total, name)


def _finished(job: Job) -> bool:
    """Whether the bundle that this job would make is there, whole."""
    try:
        manifest = Bundle.open(job.target).manifest
    except PocketLlavaError:
        return False
    return {k: v for k, v in manifest.items() if k != "files"} == {
        k: v for k, v in json.loads(json.dumps(job.manifest)).items() if k != "files"
    }


def _check_disk(works: dict[Job, Path]) -> None:
    """Raise DiskFull if all bundles, less what is there of them, do not fit beside the first one's target."""
    folder = next(iter(works)).target.parent
    there = sum(p.stat().st_size for work in works.values() for p in work.iterdir() if p.suffix == ".gguf")
    needed = sum(job.disk_bytes for job in works) - there + DISK_MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFull(
            f"{folder}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed; free some space, choose"
            " another --out or a smaller --quant",
            needed,
            free,
        )
