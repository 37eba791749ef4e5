"""Cuts the power of a process at a chosen step, and takes from the disk what had not been made safe by then.

A step is a call that changes the file system, or waits for it. What a real disk may lose is modelled more harshly than
ext4 has it: a file's bytes are safe after its own fsync, a name (made, moved, deleted) after an fsync of its folder, and
what is not safe may be lost name by name, folder by folder. Writing inside a step is cut in the middle.
"""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LOSSES = ("none", "all", "some", "bytes")
"""What is lost of the unsafe: nothing (the process was killed), everything, whatever chance wills, or the contents of files
whose names and sizes are there (a journal keeps these alone)."""


class Power:
    """Replaces functions of `os` in this process, for good: make one in a process of its own."""

    def __init__(
        self, root: Path, scratch: Path, *, at: int = 0, loss: str = "none", seed: int = 0, full: bool = False
    ):
        self.root, self.scratch, self.at, self.loss, self.full = os.fspath(root), scratch, at, loss, full
        self.steps = 0
        self.chance = random.Random(seed)
        self.names: list[tuple[int, Callable[[], None]]] = []  # inode of the folder, what undoes the change
        self.dirty: dict[int, Path] = {}  # inode of a file -> another name of it
        self.real = {name: getattr(os, name) for name in
                     ("open", "write", "fsync", "rename", "replace", "symlink", "link", "unlink", "mkdir", "rmdir")}  # fmt: skip
        self.real_open = io.open
        scratch.mkdir(exist_ok=True)
        for name in self.real:
            setattr(os, name, getattr(self, "_" + name))
        io.open = self._io_open  # what pathlib calls

    def _step(self, path: object, *, needs_room: bool = True) -> bool:
        """Whether the path is the device's; does not return at the step where the power is cut."""
        if not os.fspath(path).startswith(self.root):
            return False
        self.steps += 1
        if self.full:
            if self.at and self.steps >= self.at and needs_room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
        elif self.steps == self.at:
            self._cut()
        return True

    def _cut(self) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)
        io.open = self.real_open
        for place in self.dirty.values() if self.loss != "none" else ():
            size = place.stat().st_size
            keep = 0 if self.loss == "all" else self.chance.randint(0, size)
            os.truncate(place, keep)
            if self.loss == "bytes":
                os.truncate(place, size)  # zeros from there on
        if self.loss in ("all", "some"):
            count = {folder: 0 for folder, _ in self.names}
            for folder, _ in self.names:
                count[folder] += 1
            lose = {f: n if self.loss == "all" else self.chance.randint(0, n) for f, n in count.items()}
            for folder, undo in reversed(self.names):
                if lose[folder]:
                    lose[folder] -= 1
                    with suppress(FileNotFoundError, NotADirectoryError):
                        undo()
        os.kill(os.getpid(), signal.SIGKILL)

    def _changed(self, path: object, undo: Callable[[], None]) -> None:
        self.names.append((Path(os.fspath(path)).parent.stat().st_ino, undo))

    def _keep(self, path: object) -> Path:
        """Another name for what is at `path`, from which it can be put back."""
        place = self.scratch / f"{os.getpid()}-{self.steps}-{len(self.names)}"
        self.real["link"](path, place, follow_symlinks=False)
        return place

    def _soil(self, path: object) -> None:
        inode = Path(os.fspath(path)).stat().st_ino
        if inode not in self.dirty:
            self.dirty[inode] = self._keep(path)

    def _made(self, path: object) -> None:
        self._changed(path, lambda: self.real["unlink"](path))

    def _open(self, path, flags, mode=0o777, **more):
        new = flags & os.O_CREAT and not os.path.lexists(path) and self._step(path)
        handle = self.real["open"](path, flags, mode, **more)
        if new:
            self._made(path)
            self._soil(path)
        return handle

    def _io_open(self, file, mode="r", *args, **more):
        writes = "w" in mode and not isinstance(file, int) and self._step(file)
        new = writes and not os.path.lexists(file)
        opened = self.real_open(file, mode, *args, **more)
        if writes:
            if new:
                self._made(file)
            self._soil(file)
        return opened

    def _write(self, handle, content):
        path = str(Path(f"/proc/self/fd/{handle}").readlink())
        if path.startswith(self.root):
            if not self.full and self.steps + 1 == self.at:
                self.real["write"](handle, content[: len(content) // 2])
            self._step(path)
            self._soil(path)
        return self.real["write"](handle, content)

    def _fsync(self, handle):
        self._step(str(Path(f"/proc/self/fd/{handle}").readlink()), needs_room=False)
        self.real["fsync"](handle)
        inode = os.fstat(handle).st_ino
        self.dirty.pop(inode, None)
        self.names = [n for n in self.names if n[0] != inode]

    def _rename(self, source, target, **more):
        if self._step(target, needs_room=False):
            kept = self._keep(target) if os.path.lexists(target) and not Path(target).is_dir() else None

            def undo():
                self.real["rename"](target, source)
                if kept:
                    self.real["link"](kept, target, follow_symlinks=False)

            self.real["rename"](source, target, **more)
            self._changed(target, undo)
        else:
            self.real["rename"](source, target, **more)

    _replace = _rename

    def _symlink(self, source, target, *args, **more):
        ours = self._step(target)
        self.real["symlink"](source, target, *args, **more)
        if ours:
            self._made(target)

    def _link(self, source, target, **more):
        ours = self._step(target)
        self.real["link"](source, target, **more)
        if ours:
            self._made(target)

    def _unlink(self, path, **more):
        if os.path.lexists(path) and self._step(path, needs_room=False):
            kept = self._keep(path)
            self._changed(path, lambda: self.real["link"](kept, path, follow_symlinks=False))
        self.real["unlink"](path, **more)

    def _mkdir(self, path, *args, **more):
        ours = self._step(path)
        self.real["mkdir"](path, *args, **more)
        if ours:
            self._changed(path, lambda: shutil.rmtree(path))

    def _rmdir(self, path, **more):
        if self._step(path, needs_room=False):
            self._changed(path, lambda: self.real["mkdir"](path))
        self.real["rmdir"](path, **more)
