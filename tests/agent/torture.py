"""What an update may meet, run after run: power loss at every step and at random instants, damage, other people's keys,
other bases, older files, full disks, models that do not answer. After each the device must be whole: `survived`.

`python -m tests.agent.torture full-disk N` is the part that needs a mount of its own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgeft.agent import disk, main
from edgeft.updates import delta
from tests.agent.device import NAME, RUN, Device, Keys, answer, content, update
from tests.agent.power import LOSSES, Power

KINDS = ("full", "adapter", "delta", "rollback")
KEYS, OTHERS = Keys(), Keys()


@dataclass
class Run:
    """A device with its old version, and the update that is to be installed."""

    folder: Path
    rng: random.Random
    what: str = "full"
    quality: str = "good"
    packaged: bool = False
    files: dict[int, dict[str, bytes]] = field(default_factory=dict)
    patience: float = 30

    def __post_init__(self) -> None:
        old = {"model.gguf": content("good"), "run.sh": RUN, "settings.json": os.urandom(200)}
        if self.what == "adapter":
            old["adapter.gguf"] = content("lora", 3000)
        self.device = Device(root=self.folder / "device", keys=KEYS, packaged=self.packaged).make(old)
        self.device.start()
        self.old, self.new = 0, 7
        self.files[0] = old
        self.files[7], parts = self.changed(old)
        self.update = update(self.folder / "update.edgeft", KEYS, 7, parts)
        if self.what == "rollback":  # from 7, which is in place, back to 0
            self.go("install", self.update, code=0)
            self.old, self.new = 7, 0

    def changed(self, old: Mapping[str, bytes]) -> tuple[dict[str, bytes], dict[str, object]]:
        """The new version's files, and the parts of an update that makes them."""
        new = {**old, "settings.json": os.urandom(200)}
        parts: dict[str, object] = {"run.sh": RUN, "settings.json": new["settings.json"]}
        if self.what == "adapter":
            new["adapter.gguf"] = content("lora", 3000)
            parts |= {"model.gguf": ("base", old["model.gguf"]), "adapter.gguf": new["adapter.gguf"]}
        elif self.what == "delta":
            new["model.gguf"] = old["model.gguf"][:5000] + os.urandom(2000) + old["model.gguf"][7000:]
            for name in ("old", "new"):
                (self.folder / name).write_bytes({"old": old, "new": new}[name]["model.gguf"])
            delta.make(self.folder / "old", self.folder / "new", self.folder / "delta")
            parts["model.gguf"] = (
                "delta",
                old["model.gguf"],
                new["model.gguf"],
                (self.folder / "delta").read_bytes(),
            )
        else:
            parts["model.gguf"] = new["model.gguf"] = content(self.quality)
        return new, parts

    @property
    def arguments(self) -> list[str]:
        return ["rollback", NAME] if self.what == "rollback" else ["install", str(self.update)]

    def go(self, *arguments: object, code: int | None = None, **power: object) -> int:
        """Run the agent in a process of its own, which may not live to its end. Returns its exit code, negative for the
        signal that ended it."""
        log = self.folder / "log"
        child = os.fork()
        if not child:
            _child(self.device.root, [str(a) for a in arguments], log, self.folder / "scratch", power)
        found = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert found != 1, log.read_text()
        assert code is None or found == code, f"{arguments} ended with {found}: {log.read_text()}"
        return found

    def steps(self) -> int:
        """How many steps the change has, counted by doing it."""
        self.go(*self.arguments, code=0, count=True)
        return int((self.folder / "scratch/steps").read_text())

    def survived(self, *, boot: bool = True, cut: int = 0) -> str:
        """Boot the device, and look at everything: "old" or "new" if that version is whole and answers. `cut`: the power
        goes again, at that step of the repair."""
        device = self.device
        if boot:
            device.stop()
            if cut:
                self.go("recover", at=cut, loss=self.rng.choice(LOSSES), seed=self.rng.random())
            if self.rng.random() < 0.3:  # as systemd does it
                subprocess.run([device.root / "usr/lib/edgeft/recover"], check=True, capture_output=True)
            else:
                self.go("recover", code=0)
            device.start()
        said = device.asks(self.patience)
        answers = {answer(self.files[n]): n for n in (self.new, self.old)}
        assert said in answers, f"it says {said!r}; {(self.folder / 'log').read_text()}"
        self.whole(answers[said])
        return "new" if answers[said] == self.new else "old"

    def whole(self, served: int) -> None:
        """Nothing on the device is half: every folder with a number has every byte of its version, nothing else lies there."""
        link = self.device.model / "current"
        assert (str(link.readlink()) if link.is_symlink() else "versions/0") == f"versions/{served}"
        versions = self.device.model / "versions"
        for folder in versions.iterdir() if versions.exists() else ():
            assert folder.name in ("0", "7"), folder
            found = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "update.json"}
            assert found == self.files[int(folder.name)], f"{folder} is not what was signed"
        names = {p.name for p in self.device.model.iterdir()} if self.device.model.exists() else set()
        assert names <= {"versions", "current", "state.json"}, names
        if self.packaged:
            assert {p.name: p.read_bytes() for p in self.device.factory.iterdir()} == self.files[0]

    def again(self, now: str) -> None:
        """The device is not stuck: the change can be made after all, or is not made twice."""
        if self.what == "rollback":
            return
        self.go("install", self.update, code=6 if now == "new" else 0)
        assert self.survived(boot=False) == "new"


def _child(root: Path, arguments: list[str], log: Path, scratch: Path, power: dict[str, object]) -> None:
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        if power.pop("blind", False):
            disk.RESERVE, disk.free = 0, lambda folder: 1 << 40
        if room := power.pop("room", 0):  # what is free, beside what the version before the current one holds
            held = disk.held
            disk.RESERVE = 0
            disk.free = lambda folder: room + (0 if (folder / "0").exists() else 20_000)
            disk.held = lambda folder: held(folder) and 20_000
        careless, count = power.pop("careless", False), power.pop("count", False)
        cutter = Power(root / "var", scratch, **power) if power or count else None
        if careless:
            os.fsync = lambda handle: None
        code = main.main(["--root", str(root), *arguments])
        if cutter and count:
            (scratch / "steps").write_text(str(cutter.steps))
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:  # noqa: BLE001  as Python would, and then out, past pytest
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def cut(run: Run, step: int, loss: str = "", *, careless: bool = False) -> str:
    """The power goes at one step. `careless`: the agent waits for no disk."""
    run.patience = 1 if careless else run.patience
    loss = "bytes" if careless else loss or run.rng.choice(LOSSES)
    code = run.go(*run.arguments, at=step, loss=loss, seed=run.rng.random(), careless=careless)
    assert code in (0, -signal.SIGKILL)
    again = run.rng.randint(1, 20) if run.rng.random() < 0.4 and not careless else 0
    return run.survived(cut=again)


def killed(run: Run, program: list[str], seconds: float) -> str:
    """kill -9 of the shipped program at a random instant, and of the server; nothing else is lost."""
    process = subprocess.Popen([*program, "--root", run.device.root, *run.arguments], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    time.sleep(run.rng.uniform(0, seconds))
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL)
    return run.survived()


def damaged(run: Run) -> str:
    """Bytes of the file change, or its end is missing. It may go unnoticed where nothing depends on them."""
    found = bytearray(run.update.read_bytes())
    if run.rng.random() < 0.2:
        del found[run.rng.randrange(len(found) - 10240) :]
    else:
        for _ in range(run.rng.choice((1, 1, 2, 8))):
            found[run.rng.randrange(len(found))] ^= 1 << run.rng.randrange(8)
    run.update.write_bytes(found)
    code = run.go("install", run.update)
    assert code in (0, 3, 4, 5), code
    ended = run.survived(boot=False)
    assert (ended == "new") == (code == 0)
    return ended


def refused(run: Run, code: int, **more: object) -> str:
    """A file that is whole, and not for this device."""
    _, parts = run.changed(run.files[0])
    keys, sequence = more.pop("keys", KEYS), more.pop("sequence", 7)
    run.go("install", update(run.update, keys, sequence, more.pop("parts", parts), **more), code=code)
    return run.survived(boot=False)


def wrong_key(run: Run) -> str:
    """Signed by others, by one of ours that is not for it, by nobody, or with others' root of trust slipped in."""
    choice = run.rng.randrange(4)
    if choice == 3:
        chain = Keys(root=OTHERS.root, targets=OTHERS.targets, chain=[KEYS.chain[0]])
        chain.publish(OTHERS.root)
        return refused(run, 3, keys=chain)
    return refused(run, 3, signers=[OTHERS.targets, KEYS.root, []][choice])


def wrong_base(run: Run) -> str:
    other = dict(run.files[0], **{"model.gguf": content("good")})
    saved, run.files[0] = run.files[0], other
    parts = run.changed(other)[1]
    run.files[0] = saved
    return refused(run, 5, parts=parts)


def wrong_model(run: Run) -> str:
    return refused(run, 5, name="another")


def downgrade(run: Run) -> str:
    """First the update, then one with its number or a lower one, whole and well signed."""
    run.go("install", run.update, code=0)
    if run.rng.random() < 0.5:  # a rollback by hand opens no way for older files
        run.go("rollback", NAME, code=0)
    before = run.survived(boot=False)
    parts = {**run.files[0], "model.gguf": content("good")}
    run.go("install", update(run.update, KEYS, run.rng.randint(1, 7), parts), code=6)
    assert run.survived(boot=False) == before
    return before


def no_answer(run: Run) -> str:
    """The new version is what was signed, and does not work. `run.quality` says how."""
    run.go("install", run.update, code=8)
    ended = run.survived(boot=False)
    assert ended == "old" and not (run.device.model / "versions/7").exists()
    return ended


def out_of_room(run: Run, step: int) -> str:
    """From one step on the disk takes nothing more, whatever it said before."""
    code = run.go(*run.arguments, at=step, full=True)
    assert code in (0, 7), code
    run.go("recover", code=0)
    ended = run.survived(boot=False)
    assert (ended == "new") == (code == 0)
    return ended


def full_disk(run: Run) -> str:
    """A file system of its own for the device's data, with little left: refused before, or in the middle."""
    data = run.device.root / "var/lib/edgeft"
    pages = os.statvfs(data).f_bavail
    blind = run.rng.random() < 0.8
    leave = run.rng.randint(0, 14)
    with (data / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, 4096 * max(1, pages - leave))
    code = run.go(*run.arguments, **({"blind": True} if blind else {}))
    assert code in ((0, 7) if blind else (7,)), code
    ended = run.survived(boot=False)
    assert (ended == "new") == (code == 0)
    (data / "filler").unlink()
    run.again(run.survived())
    return ended


def one(attack: Callable[[Run], str], seed: int, *, what: str = "full", quality: str = "good", again: bool = False,
        under: Path | None = None, mount: bool = False) -> str:  # fmt: skip
    """One run in a folder of its own. Returns which version it ended with."""
    rng = random.Random(seed)
    folder = Path(tempfile.mkdtemp(dir=under, prefix=f"run-{seed}-"))
    run = None
    try:
        if mount:
            data = folder / "device/var/lib/edgeft"
            data.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", data], check=True)
        run = Run(folder, rng, what, quality, packaged=rng.random() < 0.5 and not mount)
        ended = attack(run)
        if again:
            run.again(ended)
        return ended
    finally:
        if run:
            run.device.stop()
        if mount:
            subprocess.run(["umount", "-l", folder / "device/var/lib/edgeft"], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def in_own_mounts(runs: int, seed: int = 0) -> list[str] | None:
    """`full_disk` that many times, in a mount namespace of its own; None where the system allows none."""
    wrap = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    if (
        not shutil.which("unshare")
        or subprocess.run([*wrap, "true"], capture_output=True, check=False).returncode
    ):
        return None
    command = [*wrap, sys.executable, "-m", "tests.agent.torture", "full-disk", str(runs), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout))


if __name__ == "__main__":
    count, first = int(sys.argv[2]), int(sys.argv[3])
    kinds = ("full", "adapter", "delta")
    sys.stdout.write(
        json.dumps([one(full_disk, first + i, what=kinds[i % 3], mount=True) for i in range(count)])
    )
