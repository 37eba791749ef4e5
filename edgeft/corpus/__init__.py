"""Formats in, conversations out: reading, filters, splits, rendering with the chat template, the data card."""

from edgeft.corpus.rows import Row, load_rows

__all__ = ["Row", "load_rows"]
