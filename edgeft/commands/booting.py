"""boot: a built image in an emulator, and a question to it."""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import console
from edgeft.commands.building import read
from edgeft.emulator.boot import booted, read_spec
from edgeft.errors import DataError, EdgeftError, RecipeError
from edgeft.image.disk import unpack
from edgeft.plan import plan as make_plan
from edgeft.stages.export_image import IMAGE, MANIFEST
from edgeft.store import Store

GROWN = 1 << 30
"""A multiple of this is the emulated disk's size: a card is larger than the image, and the data partition grows into it."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command's options."""

    target: str = ""
    variant: str = ""
    question: str = ""
    max_tokens: int = 64
    patience_s: float = 900
    memory_mb: int = 0
    """0: as the model needs."""
    api_key: str = ""
    keep: bool = False


def boot(what: Path, store_dir: Path, asked: Asked) -> None:
    """Start the image that a recipe built, or an image.img.zst beside its image.json; ask; shut down.

    Raises RecipeError when the recipe makes no image, EdgeftError when it is not built, and what edgeft.emulator raises.
    """
    image = (
        what
        if what.name.endswith(".img.zst")
        else _built(what, asked.target, asked.variant, Store(store_dir))
    )
    spec = read_spec(_manifest(image), memory_mb=asked.memory_mb, key=asked.api_key)
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="edgeft-image-") as folder, console.watching("boot"):
        raw = Path(folder) / "image.img"
        seconds["unpack"] = _timed(lambda: unpack(image, raw))
        _grow(raw)
        with booted(raw, spec, patience_s=asked.patience_s) as machine:
            _say(f"{spec.name} answers after {machine.boot_seconds:.0f} s (emulated: no promise)")
            if asked.question:
                answer = machine.ask(asked.question, asked.max_tokens)
                _say(answer.text)
                rate = answer.tokens / answer.seconds
                _say(
                    f"{answer.tokens} tokens in {answer.seconds:.1f} s, {rate:.1f} a second with the question (emulated: no promise)"
                )
            if asked.keep:
                _say(f"http://127.0.0.1:{machine.port}  OpenAI API under /v1; Ctrl-C shuts down")
                _wait(lambda: machine.program.running)
            begin = time.monotonic()
        seconds["shut down"] = time.monotonic() - begin
    times = ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items())
    _say(f"{spec.kind.name}, {spec.memory_mb} MB, no network; {times}")


def _say(text: str) -> None:
    console.out.print(text, markup=False, highlight=False, soft_wrap=True)


def _built(recipe: Path, target: str, variant: str, store: Store) -> Path:
    steps = [s for s in make_plan(*read(recipe, target)) if s.stage.id == "export/image"]
    steps = [s for s in steps if variant in ("", s.variant)]
    if not steps:
        raise RecipeError(
            f"{recipe} with this target makes no image",
            hint='[[export]] kind = "image" in the target file, or --target arm64-uefi',
        )
    for step in steps:
        if artifact := store.get(step):
            return artifact.path / IMAGE
    more = f" --target {shlex.quote(target)}" if target else ""
    raise EdgeftError(
        f"the image of {recipe} is not built in {store.root}",
        hint=f"edgeft build {shlex.quote(str(recipe))}{more}",
    )


def _manifest(image: Path) -> dict[str, Any]:
    path = image.with_name(MANIFEST)
    if not image.is_file():
        raise EdgeftError(f"{image} does not exist")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})", hint="it belongs beside the image") from None
    if found.get("format") != 1:
        raise DataError(f"{path} is not the manifest of an image that this edgeft knows")
    return found


def _grow(raw: Path) -> None:
    """To a power of two of GiB, which is what QEMU's SD card demands."""
    size = GROWN
    while size < raw.stat().st_size:
        size *= 2
    with raw.open("r+b") as file:
        file.truncate(size)


def _timed(work: Callable[[], None]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def _wait(running: Callable[[], bool]) -> None:
    try:
        while running():
            time.sleep(0.5)
    except KeyboardInterrupt:
        return
