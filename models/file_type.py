"""The quantization type that a GGUF file says it has, by its key general.file_type. Knows nothing of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FILE_TYPE = "general.file_type"


def type_name(keys: Mapping[str, Any]) -> str:
    """Such as "Q4_K_M", by a file's keys, whose values may be texts as llama_cpp gives them; "unknown" without one."""
    from gguf import LlamaFileType

    try:
        kind = LlamaFileType(int(keys[FILE_TYPE]))
    except (KeyError, OverflowError, TypeError, ValueError):
        return "unknown"
    return str(kind.name).removeprefix("MOSTLY_").removeprefix("ALL_")
