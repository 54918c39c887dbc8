"""Hugging Face checkpoint -> Bundle, without torch. `convert` does all of it; `plan` says what it would do."""

from pocketllava.convert.pipeline import ConvertPlan, convert, execute, execute_all, plan
from pocketllava.convert.requantize import requantize

__all__ = ["ConvertPlan", "convert", "execute", "execute_all", "plan", "requantize"]
