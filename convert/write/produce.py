"""Planned bundles -> bundles: one pass over their common source, then each is verified, load-tested and published.

Knows the order of the steps; not where the plans come from (a checkpoint, or another bundle). Each bundle is made in
a staging folder, and none is published before all are verified.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from pocketllava.convert.plan.file_plan import FilePlan
from pocketllava.convert.read.source_reader import SourceReader
from pocketllava.convert.write.journal import Completed, Journal, identity
from pocketllava.convert.write.staging import check_target, publish, working_folder
from pocketllava.convert.write.verify import check_contracts, load_test, verify_file
from pocketllava.convert.write.writer import Output, Progress, write_together
from pocketllava.errors import DiskFull, PocketLlavaError
from pocketllava.models.bundle import MANIFEST, MMPROJ, MODEL, Bundle, Manifest, describe_file

DISK_MARGIN_BYTES = 16 << 20


@dataclass(frozen=True, eq=False)  # compared by identity: a key of dictionaries
class Job:
    """One bundle to make. `manifest` is bundle.json's content, its `files` still empty."""

    target: Path
    text: FilePlan
    mmproj: FilePlan
    manifest: Manifest

    @property
    def plans(self) -> dict[str, FilePlan]:
        """Both files, in the order in which they are written."""
        return {MODEL: self.text, MMPROJ: self.mmproj}

    @property
    def disk_bytes(self) -> int:
        """Disk that the bundle takes, headers included (to within some kilobytes)."""
        return sum(plan.n_bytes + plan.header_bytes for plan in self.plans.values())


@dataclass(frozen=True, kw_only=True)
class Run:
    """How bundles are made: threads that quantize, and the rest as in pipeline.convert."""

    force: bool
    threads: int
    progress: Progress | None = None
    resume: bool = False
    worker_command: Sequence[str] | None = None


def produce(jobs: Sequence[Job], run: Run) -> list[Bundle]:
    """Make bundles whose tensors come from the same sources in the same order; publish none before all are verified.

    With run.resume, bundles that an earlier run finished are left alone, and the others continue after the last
    tensor that is complete on disk.
    """
    todo = [job for job in jobs if not (run.resume and _is_finished(job))]
    for job in todo:
        check_target(job.target, run.force)
    with ExitStack() as stack:
        works = {job: stack.enter_context(working_folder(job.target, run.resume)) for job in todo}
        todo = [
            job for job in todo if not (run.resume and _is_finished(job))
        ]  # again: some may have been recovered
        for job in todo:
            check_target(job.target, run.force)
            check_contracts(job.text.header(job.target / MODEL), job.mmproj.header(job.target / MMPROJ))
        if todo:
            _check_disk({job: works[job] for job in todo})
            _make({job: works[job] for job in todo}, run)
        for job in todo:
            publish(works[job], job.target)
    return [Bundle.open(job.target) for job in jobs]


def _make(works: dict[Job, Path], run: Run) -> None:
    """Write, verify and load-test the files and manifests of all jobs in their staging folders."""
    jobs = list(works)
    source_bytes = sum(plan.source_bytes for plan in jobs[0].plans.values())
    advance = _Advance("convert", source_bytes, run.progress)
    journals = {job: Journal(works[job], identity(job.plans.values())) for job in jobs}
    digests: dict[Path, str] = {}
    with SourceReader() as reader, ExitStack() as stack:
        for outputs in _outputs(works, journals, stack):
            write_together(outputs, reader, run.threads, advance)
            digests |= {output.path: output.finish() for output in outputs}
    advance = _Advance("verify", sum(path.stat().st_size for path in digests), run.progress)
    for job, work in works.items():
        files = {}
        for name, plan in job.plans.items():
            header = verify_file(plan, work / name)
            files[name] = describe_file(header, digests[work / name])
            advance(header.file_bytes, name)
        load_test(work / MODEL, work / MMPROJ, run.worker_command)
        record = replace(job.manifest, files=files)
        manifest = json.dumps(record.to_json(), indent=2, ensure_ascii=False)
        (work / MANIFEST).write_text(manifest + "\n", "utf-8")


def _outputs(works: dict[Job, Path], journals: dict[Job, Journal], stack: ExitStack) -> list[list[Output]]:
    """The files to write together: all text models, then all mmprojs, each group after its last common tensor."""
    steps: dict[Job, dict[str, list[Completed]]] = {job: {} for job in works}
    for name in (MODEL, MMPROJ):
        for job, work in works.items():
            steps[job][name] = journals[job].confirmed(work / name)
        common = min(len(steps[job][name]) for job in works)
        for job in works:
            del steps[job][name][common:]
    for job, journal in journals.items():
        journal.begin(steps[job])

    def output(job: Job, name: str) -> Output:
        last = steps[job][name][-1] if steps[job][name] else None
        return stack.enter_context(Output(job.plans[name], works[job] / name, journals[job], last))

    return [[output(job, name) for job in works] for name in (MODEL, MMPROJ)]


class _Advance:
    """Adds up bytes and calls the caller's progress function."""

    def __init__(self, stage: str, total: int, progress: Progress | None) -> None:
        self.stage, self.total, self.progress, self.done = stage, total, progress, 0

    def __call__(self, n_bytes: int, name: str) -> None:
        self.done += n_bytes
        if self.progress:
            self.progress(self.stage, self.done, self.total, name)


def _is_finished(job: Job) -> bool:
    """Whether the target is already the bundle that this job would make."""
    try:
        manifest = Bundle.open(job.target).manifest
    except PocketLlavaError:
        return False
    return replace(manifest, files={}) == job.manifest


def _check_disk(works: dict[Job, Path]) -> None:
    """Raise DiskFull if what is still to be written of all bundles does not fit beside the first one's target."""
    folder = next(iter(works.values())).parent
    written = sum(p.stat().st_size for work in works.values() for p in work.iterdir() if p.suffix == ".gguf")
    needed = sum(job.disk_bytes for job in works) - written + DISK_MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFull(
            f"{folder}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed; free some space, choose"
            " another --out or a smaller --quant",
            needed,
            free,
        )
