"""llama-server's own web chat, built once from the pinned source by npm. Optional: the server answers without it.

The page is one file. The pinned llama-server gives a browser without the key nothing but "/", so scripts and style sheets
beside the page would never reach it (server-http.cpp, `get_public_endpoints`). vendor/web/ holds the settings that differ from
upstream's. Where the build runs does not show in its bytes: tests compare two.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

from edgeft import progress, resources
from edgeft.errors import SetupError, ToolError
from edgeft.llamacpp.pin import load
from edgeft.llamacpp.source import home, llama_cpp_tree, locked
from edgeft.llamacpp.web_notices import notices
from edgeft.tool import Tool, run

log = logging.getLogger(__name__)

_HINT = "install Node.js 22 or newer, which brings npm; or do without the web page"
NPM = Tool(name="npm", hint=_HINT)
NODE = Tool(name="node", hint=_HINT)
PAGE = ("_app/version.json", "build.json", "index.html")
"""All that the browser may ask for."""
LICENCES = "LICENSES.txt"
_LEFT_BY_BUILD = ("_app/immutable/assets/", "recommended-mcp/")
"""Style sheets for rendering on a server, and logos of companies whose cards are not in the page."""
_OVERLAY = {
    "svelte.config.js": "svelte.config.js",
    "vite.config.ts": "edgeft.vite.config.ts",
    "app.html": "edgeft.app.html",
}
"""Files of vendor/web and their names among upstream's."""
_VERSION = 1
"""Raise it when the same sources and settings give other files."""
_INSIDE = ("data:", "#")


def pin() -> str:
    """Which page it is: the source package, whose lock file fixes every npm package, and our settings."""
    whole = hashlib.sha256(f"{_VERSION} {load().sha256}".encode())
    for name in sorted(_OVERLAY):
        whole.update((resources.folder("vendor") / "web" / name).read_bytes())
    return whole.hexdigest()[:12]


def built_web() -> Path | None:
    """The folder of static files for llama-server --path, when it has been built and is as it was."""
    folder = home() / f"web-{pin()}"
    try:
        said = folder.with_suffix(".sha256").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    if folder.is_dir() and digest(folder) == said:
        return folder
    log.warning("the web chat in %s is not what was built; it will be built again", folder)
    return None


def buildable() -> None:
    """Raises SetupError when the page is not there and cannot be built: no npm, or a Node.js that is too old."""
    if built_web():
        return
    NPM.find()
    found = NODE("--version").strip()
    version = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    # What Vite 7 says in its package.json; npm would say it too, but in the middle of the export.
    if not ((20, 19) <= version < (21,) or version >= (22, 12)):
        raise SetupError(f"Node.js is {found}, and the web chat needs v20.19, or v22.12 or newer", hint=_HINT)


def ensure_web() -> Path:
    """Build the web chat if it is not there yet: 1,060 npm packages, 650 MB while it runs, 10 MB kept.

    Measured: 2 CPU-minutes. Raises SetupError without npm, ToolError when npm fails or the page is not what it should be.
    """
    if folder := built_web():
        return folder
    buildable()
    sources = llama_cpp_tree() / "tools" / "ui"
    if not (sources / "package-lock.json").is_file():
        raise SetupError(f"the pinned llama.cpp carries no web chat in {sources}")
    with locked("web.lock"):
        if folder := built_web():
            return folder
        folder = home() / f"web-{pin()}"
        aside = home() / "web.part"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            page = build(sources, aside)
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()
            page.rename(folder)
            folder.with_suffix(".sha256").write_text(f"{digest(folder)}\n", encoding="ascii")
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def build(sources: Path, aside: Path) -> Path:
    """Build the page of llama.cpp's tools/ui in the folder `aside`; returns the folder of PAGE and LICENCES.

    Raises ToolError when npm fails, when something lies beside the page, when the page names another host to load from, this
    folder, or when a package in it says nothing about its licence.
    """
    ui, made, page = aside / "ui", aside / "made", aside / "page"
    shutil.copytree(sources, ui)
    (ui / "svelte.config.js").rename(ui / "upstream.svelte.config.js")
    for name, there in _OVERLAY.items():
        shutil.copyfile(resources.folder("vendor") / "web" / name, ui / there)
    # Tailwind looks for class names in what git does not ignore; a repository around the cache has no say in that.
    (ui / ".git").mkdir()
    progress.report("fetch the web chat's npm packages")
    NPM(
        "ci", "--include=dev", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", cwd=ui
    )  # fmt: skip
    progress.report("build the web chat")
    settings = {
        "LLAMA_UI_OUT_DIR": os.fspath(made),
        "LLAMA_BUILD_NUMBER": "0",  # a source package has none
        "EDGEFT_WEB_VERSION": pin(),
        "VITE_PUBLIC_APP_NAME": "llama-ui",
    }
    vite = ["exec", "--offline", "--no", "--", "vite", "build", "--config", "edgeft.vite.config.ts"]
    run([NPM.find(), *vite], cwd=ui, env=settings)
    _keep(made, page)
    _check(page / "index.html", os.fspath(aside))
    files = json.loads((ui / "contents.json").read_text(encoding="utf-8"))
    text = notices(ui, files, licence=llama_cpp_tree() / "LICENSE")
    (page / LICENCES).write_text(text, encoding="utf-8")
    return page


def digest(folder: Path) -> str:
    """The sha256 of every file in the folder with its name."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    whole = hashlib.sha256()
    for name in names:
        whole.update(f"{name}\0{hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def outside(page: str) -> list[str]:
    """What the browser would load beside this HTML before any script runs: addresses in src, href of anything but an
    anchor, srcset, action, and in style sheets. Data URLs and parts of the page are inside."""
    finder = _Finder()
    finder.feed(page)
    finder.close()
    return finder.found


def _keep(made: Path, page: Path) -> None:
    files = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    left = {name for name in files if name.startswith(_LEFT_BY_BUILD)}
    if files - left != set(PAGE):
        odd = ", ".join(sorted((files - left) ^ set(PAGE)))
        raise ToolError(
            f"the web chat is no longer one page: {odd}",
            hint="the settings in vendor/web no longer fit the pinned llama.cpp",
        )
    for name in PAGE:
        (page / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made / name, page / name)


def _check(index: Path, built_in: str) -> None:
    text = index.read_text(encoding="utf-8")
    if found := outside(text):
        raise ToolError(f"the web chat loads from elsewhere: {', '.join(found[:5])}")
    if built_in in text:
        raise ToolError(f"the web chat names the folder it was built in, {built_in}")
    policy, script = text.find('http-equiv="Content-Security-Policy"'), text.find("<script")
    if not 0 <= policy < script:
        raise ToolError("the web chat's scripts are not under its security policy")


class _Finder(HTMLParser):
    """Collects addresses. A script's text is not parsed: what it asks for is the security policy's to allow."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._style = tag == "style"
        for name, value in attrs:
            loads = name in ("src", "srcset", "action", "poster", "data") or (name == "href" and tag != "a")
            if value and loads and not value.startswith(_INSIDE):
                self.found.append(value)
            if value and name == "style":
                self._sheet(value)

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if self._style:
            self._sheet(data)

    def _sheet(self, text: str) -> None:
        for pattern in (
            r"url\(\s*(?:\"([^\"]*)|'([^']*)|([^\"')\s]+))",
            r"@import\s+(?:\"([^\"]*)|'([^']*))",
        ):
            found = ("".join(groups) for groups in re.findall(pattern, text))
            self.found += (address for address in found if not address.startswith(_INSIDE))
