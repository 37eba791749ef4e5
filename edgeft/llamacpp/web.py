"""llama-server's own web chat, built once from the pinned source by npm. Optional: the server answers without it."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from edgeft import progress
from edgeft.errors import SetupError, ToolError
from edgeft.llamacpp.source import home, llama_cpp_tree, locked
from edgeft.tool import Tool, run

log = logging.getLogger(__name__)

NPM = Tool(name="npm", hint="install Node.js 20 or newer, which brings npm; or serve without the web page")


def built_web() -> Path | None:
    """The folder of static files for llama-server --path, when it has been built."""
    return folder if (folder := home() / "web").is_dir() else None


def ensure_web() -> Path:
    """Build the web chat if it is not there yet: about 1,060 npm packages, 700 MB while it runs, 10 MB kept.

    Measured: 3 CPU-minutes. Raises SetupError without npm, ToolError when npm fails.
    """
    if folder := built_web():
        return folder
    NPM.find()
    sources = llama_cpp_tree() / "tools" / "ui"
    if not (sources / "package-lock.json").is_file():
        raise SetupError(f"the pinned llama.cpp carries no web chat in {sources}")
    with locked():
        return built_web() or _build(sources)


def _build(sources: Path) -> Path:
    aside = home() / "web.part"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        shutil.copytree(sources, aside / "ui")
        progress.report("fetch the web chat's npm packages")
        NPM("ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=aside / "ui")
        progress.report("build the web chat")
        # The version ends up in the page; a source package has none.
        settings = {
            "LLAMA_UI_OUT_DIR": os.fspath(aside / "dist"),
            "LLAMA_UI_VERSION": "b0",
            "LLAMA_BUILD_NUMBER": "0",
        }
        run([NPM.find(), "run", "build"], cwd=aside / "ui", env=settings)
        if not (aside / "dist" / "index.html").is_file():
            raise ToolError("npm built the web chat without an index.html")
        os.sync()
        (aside / "dist").rename(home() / "web")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return home() / "web"
