"""llama-server's web chat beside it: for exporters that bring the server, where `web_chat` asks for it."""

from __future__ import annotations

from typing import Annotated

from pydantic import PlainSerializer

from edgeft.export.files import Entry
from edgeft.export.service import PROGRAMS
from edgeft.llamacpp import web

FOLDER = f"{PROGRAMS}/web"
"""On the device; llama-server is started with --path on it where it is there."""

WebChat = Annotated[
    bool,
    PlainSerializer(lambda wanted: wanted and web.pin(), when_used="json", return_type=str | bool),
]
"""The parameter of an exporter. Hashed as which page it is, so that another page is another result."""


def check(wanted: bool) -> None:
    """Raises SetupError when the page is wanted, is not there, and cannot be built on this machine."""
    if wanted:
        web.buildable()


def entries(wanted: bool) -> dict[str, Entry]:
    """The page and the licences of what it was made of, below FOLDER; nothing when it is not wanted.

    Builds the page when it is not in the cache (two CPU-minutes). Raises SetupError and ToolError as `web.ensure_web`.
    """
    if not wanted:
        return {}
    page = web.ensure_web()
    return {f"{FOLDER}/{name}": Entry(content=page / name) for name in sorted((*web.PAGE, web.LICENCES))}
