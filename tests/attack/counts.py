"""What a campaign of hostile inputs counted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counts:
    """Cases by how they ended. `failures` names each case that ended wrongly, with how to repeat it."""

    cases: int = 0
    refused: int = 0
    accepted: int = 0
    crashes: int = 0
    hangs: int = 0
    tracebacks: int = 0
    leaks: int = 0  # memory, descriptors or processes that stayed
    wrong: int = 0
    failures: list[str] = field(default_factory=list)
