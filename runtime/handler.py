"""The chat handler's old place: `from pocketllava.handler import LlavaChatHandler` goes on working."""

from pocketllava.integrations.llama_cpp import LlavaChatHandler

__all__ = ["LlavaChatHandler"]
