"""Updates under power cuts, damage, wrong keys, wrong bases, older files, full disks and models that do not answer.

    python benchmarks/update_torture.py 600 [--seed 1]

Each run is a device of its own in a folder: the shipped agent and start script, update files signed with real keys, and a
server that answers with the sha256 of what it loaded (tests/agent/standin.py). After each run the old or the new model must
answer, and every file on the device must have every byte of its version. Exits with 1 if one does not. `cut` goes through
every step of every kind of change with every kind of loss before it repeats itself: 484 runs.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edgeft.export import agent
from tests.agent import torture
from tests.agent.power import LOSSES
from tests.agent.torture import KINDS, cut, killed, one, out_of_room

SHARES = {
    "power cut at a step": 40, "kill -9 at a random instant": 20, "damaged file": 12, "disk full from a step on": 8,
    "file system really full": 6, "wrong key": 4, "wrong base": 2, "wrong model": 2, "downgrade": 3, "no answer": 3,
}  # fmt: skip
Attack = Callable[[torture.Run], str]


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("runs", type=int)
    arguments.add_argument("--seed", type=int, default=1)
    given = arguments.parse_args()
    chance = random.Random(given.seed)
    table: dict[str, collections.Counter[str]] = {what: collections.Counter() for what in SHARES}
    spent: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "edgeft-update"
        program.write_bytes(agent.zipapp())
        makers = attacks([sys.executable, os.fspath(program)], chance)
        for what, share in SHARES.items():
            wanted = max(1, round(given.runs * share / 100))
            start = time.monotonic()
            if what == "file system really full":
                for ended in torture.in_own_mounts(wanted, chance.randrange(1 << 30)) or [
                    "not possible here"
                ]:
                    table[what][ended] += 1
            for _ in range(0 if what == "file system really full" else wanted):
                kind, quality, attack = next(makers[what])
                seed = chance.randrange(1 << 30)
                try:
                    table[what][
                        one(
                            attack, seed, what=kind, quality=quality, again=what.startswith(("power", "kill"))
                        )
                    ] += 1
                except AssertionError as error:
                    table[what]["FAILED"] += 1
                    sys.stderr.write(f"{what}, {kind}, seed {seed}: {error}\n")
            spent[what] = round(time.monotonic() - start)
            print(
                f"{what:28} {sum(table[what].values()):5} runs {spent[what]:5} s  {dict(table[what])}",
                flush=True,
            )
    total = sum(table.values(), collections.Counter())
    print(f"{'all':28} {sum(total.values()):5} runs {sum(spent.values()):5} s  {dict(total)}")
    return 1 if total["FAILED"] else 0


@lru_cache
def _seconds(program: tuple[str, ...], what: str) -> float:
    found: list[float] = []

    def attack(run: torture.Run) -> str:
        start = time.monotonic()
        subprocess.run([*program, "--root", run.device.root, *run.arguments], check=True, capture_output=True)
        found.append(time.monotonic() - start)
        return run.survived()

    one(attack, 0, what=what)
    return found[0]


def undisturbed(run: torture.Run, program: list[str]) -> float:
    """How long this kind of change takes from start to end on this machine, as busy as it is; measured once."""
    return _seconds(tuple(program), run.what)


def attacks(program: list[str], chance: random.Random) -> dict[str, Iterator[tuple[str, str, Attack]]]:
    """For each row of the table, without end: kind of change, quality of the new model, and what is done to it."""
    steps = {kind: range(1, 18 if kind == "rollback" else 40) for kind in KINDS}
    cuts = [(kind, step, loss) for kind in KINDS for step in steps[kind] for loss in LOSSES]
    chance.shuffle(cuts)
    room = [(kind, step) for kind in ("full", "adapter", "delta") for step in range(1, 40)]
    chance.shuffle(room)

    def always(
        attack: Attack, *kinds: str, qualities: tuple[str, ...] = ("good",)
    ) -> Iterator[tuple[str, str, Attack]]:
        return ((k, q, attack) for k, q in cycle([(k, q) for q in qualities for k in kinds]))

    return {
        "power cut at a step": ((k, "good", lambda run, s=s, loss=loss: cut(run, s, loss)) for k, s, loss in cycle(cuts)),
        "kill -9 at a random instant": always(lambda run: killed(run, program, 1.2 * undisturbed(run, program)), *KINDS),
        "damaged file": always(torture.damaged, "full", "adapter", "delta"),
        "disk full from a step on": ((k, "good", lambda run, s=s: out_of_room(run, s)) for k, s in cycle(room)),
        "wrong key": always(torture.wrong_key, "full", "adapter"),
        "wrong base": always(torture.wrong_base, "adapter", "delta"),
        "wrong model": always(torture.wrong_model, "full"),
        "downgrade": always(torture.downgrade, "full", "delta"),
        "no answer": always(torture.no_answer, "full", qualities=("crash", "mute", "empty", "broken")),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
