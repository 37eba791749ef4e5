"""What a machine says of itself, asked by one script that any POSIX shell runs, and what speaks against running there."""

from __future__ import annotations

from dataclasses import dataclass

from edgeft.errors import SetupError

LOOK = r"""
say() { [ -n "$2" ] && printf 'edgeft %s=%s\n' "$1" "$2"; }
say machine "$(uname -m)"
say kernel "$(cat /proc/sys/kernel/arch 2>/dev/null)"
say system "$(uname -sr)"
say board "$(tr -d '\000' 2>/dev/null </proc/device-tree/model)"
say model "$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say part "$(sed -n 's/^CPU part[[:space:]]*: //p' /proc/cpuinfo 2>/dev/null | sort -u | tr '\n' ' ')"
say features "$(sed -n 's/^\(flags\|Features\)[[:space:]]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say cores "$(getconf _NPROCESSORS_ONLN 2>/dev/null || nproc 2>/dev/null)"
say memory_kb "$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo 2>/dev/null)"
say free_kb "$(sed -n 's/^MemAvailable: *\([0-9]*\).*/\1/p' /proc/meminfo 2>/dev/null)"
say disk_kb "$(df -Pk . 2>/dev/null | awk 'NR == 2 { print $4 }')"
"""
"""Run in the work folder. Lines that do not begin with `edgeft ` are somebody else's (a login message)."""

CORES = {"0xd03": "Cortex-A53", "0xd05": "Cortex-A55", "0xd08": "Cortex-A72", "0xd0b": "Cortex-A76", "0xd41": "Cortex-A78",
         "0xd42": "Cortex-A78AE"}  # fmt: skip
"""ARM's part numbers (MIDR_EL1) of the cores in boards that have a target here; aarch64 kernels print no name."""
ARM_FEATURES = {
    "dotprod": "asimddp",
    "fp16": "asimdhp",
    "i8mm": "i8mm",
    "sve": "sve",
    "sve2": "sve2",
    "bf16": "bf16",
}
"""What compilers call a feature, and what the kernel calls it in /proc/cpuinfo."""
X86_LEVELS = {
    "x86-64": (), "x86-64-v2": ("sse4_2", "popcnt", "ssse3"), "x86-64-v3": ("avx2", "fma", "f16c", "bmi2", "movbe"),
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}  # fmt: skip
"""Features that tell a level from the one before it (x86-64 psABI, "Micro-Architecture Levels")."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Sizes are bytes; what the machine did not say is empty or None."""

    machine: str
    """As `uname -m` has it."""
    system: str = ""
    processor: str = ""
    """For people: the board's model and the processor's name. Never the machine's own name."""
    features: tuple[str, ...] = ()
    """As /proc/cpuinfo names them, sorted."""
    cores: int | None = None
    memory: int | None = None
    free: int | None = None
    """Memory that programs can still take."""
    disk: int | None = None
    """Free space where the files go."""
    emulated: bool = False
    """Its kernel is another processor's, so an emulator runs its programs (qemu-user). A whole emulated machine does not
    show."""

    @property
    def arch(self) -> str:
        """As targets name it: "arm64", "amd64"; "" for anything else."""
        return {"aarch64": "arm64", "arm64": "arm64", "x86_64": "amd64"}.get(self.machine, "")


def read(said: str) -> Machine:
    """What `LOOK` printed. Raises SetupError when the machine did not answer as a Linux does."""
    found = told(said)
    if "machine" not in found:
        raise SetupError("that machine did not say what it is", hint="is it a Linux with a POSIX shell?")
    parts = " and ".join(CORES.get(part, f"ARM core {part}") for part in found.get("part", "").split())
    names = [found.get("board", ""), found.get("model", "") or parts]
    emulated = _emulated(found["machine"], found.get("kernel", ""), found.get("features", ""))
    processor = ", ".join(filter(None, names))
    return Machine(
        machine=found["machine"], system=found.get("system", ""), emulated=emulated,
        processor=f"emulated {found['machine']}" if emulated else processor,
        features=() if emulated else tuple(sorted(found.get("features", "").split())), cores=_number(found, "cores"),
        memory=_number(found, "memory_kb", 1024), free=_number(found, "free_kb", 1024), disk=_number(found, "disk_kb", 1024),
    )  # fmt: skip


def told(said: str) -> dict[str, str]:
    """The `edgeft name=value` lines of a script's output; of two with one name the last."""
    lines = (line.removeprefix("edgeft ") for line in said.splitlines() if line.startswith("edgeft "))
    return {name: value.strip() for name, _, value in (line.partition("=") for line in lines)}


def missing(isa: str, machine: Machine) -> list[str]:
    """Features of `isa` (as targets have it: "armv8.2-a+dotprod+fp16", "x86-64-v3") that the processor lacks.

    Empty when it lacks none, and when it does not say what it has, as emulated processors may not.
    """
    base, *extra = isa.split("+")
    have = set(machine.features)
    if machine.arch == "amd64":
        levels = list(X86_LEVELS)
        wanted = (
            [f for level in levels[: levels.index(base) + 1] for f in X86_LEVELS[level]]
            if base in levels
            else []
        )
    else:
        wanted = [ARM_FEATURES[f] for f in extra if f in ARM_FEATURES]
    return [f for f in wanted if f not in have] if have else []


def refuse(machine: Machine, isa: str, *, memory: int, disk: int) -> None:
    """Raise SetupError when a program for `isa` cannot run there, or there is no room.

    `memory` and `disk` are the bytes that it needs.
    """
    if lacks := missing(isa, machine):
        raise SetupError(
            f"the processor there ({machine.processor or machine.machine}) lacks {', '.join(lacks)}, which the program for "
            f"{isa} uses: it would die of an illegal instruction",
            hint="give the target that the board is: --target",
        )
    if machine.disk is not None and machine.disk < disk:
        raise SetupError(
            f"{disk / 1e6:,.0f} MB are to be sent, and {machine.disk / 1e6:,.0f} MB are free there",
            hint="fewer windows (--windows), or a folder on another disk (--folder)",
        )
    if machine.free is not None and machine.free < memory:
        raise SetupError(
            f"scoring needs about {memory / 1e6:,.0f} MB of memory, and {machine.free / 1e6:,.0f} MB are free there",
            hint="stop what else runs there, or choose a smaller file (--variant)",
        )


def _emulated(machine: str, kernel: str, features: str) -> bool:
    """Whether programs for `machine` run on another processor's kernel: /proc/sys/kernel/arch (Linux 6.1) names it, or
    /proc/cpuinfo lists its features."""
    if machine not in ("aarch64", "arm64"):
        return False
    return kernel not in ("", "aarch64") or bool(features and not {"asimd", "fp"} & set(features.split()))


def _number(found: dict[str, str], name: str, unit: int = 1) -> int | None:
    value = found.get(name, "")
    return int(value) * unit if value.isdigit() else None
