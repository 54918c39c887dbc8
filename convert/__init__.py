"""Hugging Face checkpoint -> Bundle, without torch. `pipeline.plan` says what a conversion would do."""

from pocketllava.convert.pipeline import ConvertPlan, convert
from pocketllava.convert.requantize import requantize

__all__ = ["ConvertPlan", "convert", "requantize"]
