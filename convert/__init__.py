"""Hugging Face checkpoint -> Bundle, without torch. `pipeline.plan` plans a conversion without doing it."""

from pocketllava.convert.pipeline import ConvertPlan, convert
from pocketllava.convert.requantize import requantize

__all__ = ["ConvertPlan", "convert", "requantize"]
