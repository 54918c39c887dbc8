"""Huge pages for what llama.cpp allocates, or Linux's usual ones: loading, loading again, decoding.

    python benchmarks/huge_pages.py BUNDLE [-n 4]

Each run is a process of its own (this script with --side), in turn; medians. The first loading also pays for memory
that a virtual machine's host has to hand out; the second, of a model just closed, does not. Shows a difference
where /sys/kernel/mm/transparent_hugepage/enabled says "madvise". Run it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time

from arguments import arguments, compare

from pocketllava import Llava, Message, Options
from pocketllava.llamacpp import text_model

ROWS = {
    "load": "loading, first model of a process, s",
    "system": "of that, the kernel's work, s of CPU",
    "again": "loading again, s",
    "again_system": "of that, the kernel's work, s of CPU",
    "token": "decoding a text, ms a token",
}
QUESTION, TOKENS = "Describe a day at the sea.", 60


def one_side(a: argparse.Namespace) -> dict[str, float]:
    """In a child process."""
    if a.side == "usual":
        text_model.huge_pages = contextlib.nullcontext  # type: ignore[assignment]
    found: dict[str, float] = {}
    for load, system in (("load", "system"), ("again", "again_system")):
        start, before = time.perf_counter(), os.times().system
        with Llava.load(a.bundle, n_ctx=2048) as llava:
            found |= {load: time.perf_counter() - start, system: os.times().system - before}
            if load == "again":
                timings = llava.chat([Message("user", QUESTION)], options=Options(max_tokens=TOKENS)).timings
                found["token"] = 1000 / timings.tokens_per_s
    return found


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    compare(parser, __file__, one_side, ("huge", "usual"), ROWS, "pages")


if __name__ == "__main__":
    main()
