"""Hugging Face checkpoint -> Bundle, without torch. `convert` does all of it; `plan` says what it would do."""

from pocketllava.convert.pipeline import ConvertPlan, convert, execute, plan

__all__ = ["ConvertPlan", "convert", "execute", "plan"]
