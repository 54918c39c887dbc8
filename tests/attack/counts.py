"""What came of the cases of one attack."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counts:
    """Numbers of cases by outcome; `failures` has one line for each case that went wrong."""

    cases: int = 0
    refused: int = 0
    accepted: int = 0
    crashes: int = 0
    hangs: int = 0
    tracebacks: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)
