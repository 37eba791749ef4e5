"""Starts an image in QEMU and asks it: no KVM, no way out of the emulated network, one port on this machine's loopback.

Without KVM, since a guest that hangs there says nothing (seen on a shared machine), and a speed that is nobody's tempts no one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from edgeft import progress
from edgeft.emulator import machines
from edgeft.errors import StageError
from edgeft.image import filesystems, units
from edgeft.image.kinds import KINDS, Kind
from edgeft.image.partitions import MIB
from edgeft.tool import Background, background, run

PATIENCE_S = 900
"""How long a start may take: emulated, on a busy machine, with three tries of a broken system before the good one."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is to be started, as an image's manifest says it."""

    kind: Kind
    isa: str
    name: str
    """The model's."""
    loopback: bool
    """The server answers its own machine alone."""
    port: int
    memory_mb: int
    """For the emulated machine."""
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Running:
    """A machine that answers."""

    spec: Spec
    port: int
    """On this machine's loopback."""
    program: Background
    boot_seconds: float
    """From power-on until the model was loaded and answered /health."""

    def ask(self, question: str, max_tokens: int = 256, timeout_s: float = 900) -> Answer:
        """One question through the OpenAI API, answered at temperature 0. Raises StageError with the server's words."""
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        begin = time.monotonic()
        try:
            status, said = _request(self.port, "/v1/chat/completions", self.spec.key, body, timeout_s)
        except (OSError, HTTPException) as error:
            raise self.program.failure(f"did not answer the question ({error})") from None
        if status != 200:
            hint = "--api-key" if status == 401 else ""
            raise StageError(f"the model answered with an error ({status}): {said.strip()}", hint=hint)
        found = json.loads(said)
        return Answer(
            text=found["choices"][0]["message"]["content"], tokens=int(found["usage"]["completion_tokens"]),
            seconds=time.monotonic() - begin,
        )  # fmt: skip

    def console(self) -> str:
        """What the machine has written on its serial console."""
        return "".join(self.program.lines)


def read_spec(manifest: Mapping[str, Any], *, memory_mb: int = 0, key: str = "") -> Spec:
    """From an image's image.json. `memory_mb` 0: what the model is predicted to take, and a system beside it."""
    target, serves = manifest["target"], manifest["serves"]
    need = manifest["predicted"]["memory_mb"]["total"]
    return Spec(
        kind=KINDS[manifest["image"]], isa=target["isa"], name=manifest["name"],
        loopback=serves["host"] in ("127.0.0.1", "localhost", "::1"), port=serves["port"],
        memory_mb=memory_mb or max(1024, round(1.25 * need / 128 + 5) * 128), key=key,
    )  # fmt: skip


@contextmanager
def booted(
    raw: Path, spec: Spec, *, snapshot: bool = True, patience_s: float = PATIENCE_S, slot: str = "a"
) -> Iterator[Running]:
    """The image `raw` (not compressed) as a running machine, once its model answers; shut down when the block is left.

    `snapshot`: nothing is written to the file. `slot`: which system a machine without its own firmware is handed.
    Raises SetupError when QEMU or its firmware is missing, StageError with the console's last lines when nothing answers.
    """
    machine = machines.of(spec.kind)
    machine.program.find()
    pair = machines.firmware(machine)
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="edgeft-boot-") as folder:
        scratch = Path(folder)
        start = _uefi(pair, scratch) if pair else _kernel(raw, spec, slot, scratch)
        control = scratch / "control"
        command = _command(machine, spec, raw, start, control, port, snapshot=snapshot)
        begin = time.monotonic()
        with background(command) as program:
            _wait(program, port, spec.key, begin, patience_s)
            yield Running(spec=spec, port=port, program=program, boot_seconds=time.monotonic() - begin)
            if machine.power_button:
                _power_off(control, program)


def _command(
    machine: machines.Machine,
    spec: Spec,
    raw: Path,
    start: list[str],
    control: Path,
    port: int,
    *,
    snapshot: bool,
) -> list[str]:
    cpu = machines.processor(machine, spec.isa)
    inside = units.FORWARD if spec.loopback else spec.port
    drive = f"file={_comma(raw)},format=raw,snapshot={'on' if snapshot else 'off'},"
    return [
        machine.program.find(), "-machine", machine.machine, "-accel", "tcg", *(("-cpu", cpu) if cpu else ()),
        *(() if machine.fixed_mb else ("-smp", str(min(4, os.cpu_count() or 1)), "-m", str(spec.memory_mb))),
        "-display", "none", "-monitor", "none", "-serial", *(("null", "-serial") if machine.fixed_mb else ()), "stdio",
        "-qmp", f"unix:{_comma(control)},server=on,wait=off",
        *start,
        "-drive", drive + ("if=none,id=disk" if machine.disk else "if=sd"), *machine.disk,
        # restrict: the guest reaches nothing, this machine included; only the forwarded port reaches the guest.
        "-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{inside}", *machine.network,
    ]  # fmt: skip


def _uefi(pair: tuple[Path, Path], scratch: Path) -> list[str]:
    """Firmware with variables of its own, and the credential that opens the port to a server on loopback."""
    code, variables = pair
    shutil.copyfile(variables, scratch / "variables.fd")
    return [
        "-drive", f"if=pflash,format=raw,readonly=on,file={code}",
        "-drive", f"if=pflash,format=raw,file={_comma(scratch / 'variables.fd')}",
        "-fw_cfg", f"name=opt/io.systemd.credentials/{units.CREDENTIAL},string=1",
        "-device", "virtio-rng-pci,romfile=",
    ]  # fmt: skip


def _kernel(raw: Path, spec: Spec, slot: str, scratch: Path) -> list[str]:
    """What a Raspberry Pi's firmware would do, which QEMU does not run: load kernel, initrd and device tree."""
    for name in ("vmlinuz", "initrd.img", "cmdline.txt", "bcm2837-rpi-3-b.dtb"):
        run(
            [filesystems.MCOPY.find(), "-n", "-i", f"{raw}@@{MIB}", f"::/{slot}/{name}", os.fspath(scratch / name)],
            env={"MTOOLS_SKIP_CHECK": "1"},
        )  # fmt: skip
    line = (scratch / "cmdline.txt").read_text(encoding="utf-8").strip()
    return [
        "-kernel", os.fspath(scratch / "vmlinuz"), "-initrd", os.fspath(scratch / "initrd.img"),
        "-dtb", os.fspath(scratch / "bcm2837-rpi-3-b.dtb"),
        # QEMU takes the start of this board's watchdog for the end of its time (hw/misc/bcm2835_powermgt.c).
        "-append", f"{line} systemd.watchdog_sec=off systemd.set_credential={units.CREDENTIAL}:1",
    ]  # fmt: skip


def _wait(program: Background, port: int, key: str, begin: float, patience_s: float) -> None:
    while time.monotonic() - begin < patience_s:
        if not program.running:
            raise program.failure("ended before the model answered")
        progress.report(
            f"start the machine (emulated): {_last(program.lines)}", time.monotonic() - begin, unit="s"
        )
        with suppress(OSError, HTTPException):
            if _request(port, "/health", key, None, 5)[0] == 200:
                return
        time.sleep(1)
    raise program.failure(f"did not answer within {patience_s:.0f} s")


def _power_off(control: Path, program: Background, patience_s: float = 120) -> None:
    """Press the power button, and wait until the machine has gone down (QMP: qapi/misc.json, system_powerdown)."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(10)
        channel.connect(os.fspath(control))
        for command in ("qmp_capabilities", "system_powerdown"):
            channel.recv(4096)
            channel.sendall(json.dumps({"execute": command}).encode())
        channel.recv(4096)
    begin = time.monotonic()
    while program.running and time.monotonic() - begin < patience_s:
        progress.report("shut the machine down", time.monotonic() - begin, unit="s")
        time.sleep(0.2)


def _request(port: int, path: str, key: str, body: object, timeout_s: float) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout_s)  # never through a proxy
    try:
        connection.request(
            "POST" if body else "GET", path, json.dumps(body) if body else None,
            {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
        )  # fmt: skip
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


def _last(lines: list[str]) -> str:
    """The console's last words, without what moves a cursor or gives it a colour (ECMA-48, control sequences)."""
    for line in reversed(lines[-5:]):
        plain = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", line)
        if text := "".join(c for c in plain if c.isprintable()).strip():
            return text[:60]
    return "firmware"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _comma(path: Path) -> str:
    """A path as QEMU's options take it."""
    return os.fspath(path).replace(",", ",,")
