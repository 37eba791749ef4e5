"""Draws a certificate: one HTML file without network or scripts, and a table for a terminal."""

from edgeft.parity.page.document import render

__all__ = ["render"]
