"""The pinned llama.cpp: fetched and built once a machine, and everything edgeft asks of it."""

from edgeft.llamacpp.build import CONVERTER, LIBRARY, PERPLEXITY, PORTABLE, SERVER, Part, built, ensure
from edgeft.llamacpp.pin import Pin, load
from edgeft.llamacpp.quantize import TYPES
from edgeft.llamacpp.runtime import activate, gguf, native

__all__ = [
    "CONVERTER", "LIBRARY", "PERPLEXITY", "PORTABLE", "SERVER", "TYPES", "Part", "Pin", "activate", "built", "ensure",
    "gguf", "load", "native",
]  # fmt: skip
