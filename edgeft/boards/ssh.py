"""A board that is reached over ssh, with the system's own ssh and sftp: their configuration, agent and known hosts hold.

One connection is opened and shared by all commands. Nothing ever asks for a password. Files lie in the work folder
under their sha256, are sent on from where a cut-off transfer stopped, and count when `sha256sum` on the board agrees.
sftp's own resume does what rsync would, and is there wherever sshd is.
"""

from __future__ import annotations

import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from edgeft import progress
from edgeft.errors import EdgeftError, SetupError, ToolError
from edgeft.tool import Background, Tool, background, run

FOLDER = ".cache/edgeft-verify"
"""The work folder on the board, below the user's home."""
SSH = Tool(name="ssh", hint="sudo apt install openssh-client")
SFTP = Tool(name="sftp", hint="sudo apt install openssh-client")
OPTIONS = ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4")
REASONS = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "{to} shows another host key than it used to",
     "if the board was set up anew: ssh-keygen -R {host}, then connect once by hand; else somebody stands in between"),
    ("Host key verification failed", "the host key of {to} is not known yet",
     "connect once by hand, compare the fingerprint, and say yes: ssh {flags}{to}"),
    ("Permission denied", "{to} accepts none of your keys", "ssh-copy-id {flags}{to}"),
    ("Too many authentication failures", "{to} gave up before the right key was offered",
     "name the key: --ssh-option IdentityFile=PATH --ssh-option IdentitiesOnly=yes"),
    ("Connection refused", "nothing listens for ssh at {to}", "is sshd running there, and the port right?"),
    ("Could not resolve hostname", "there is no machine called {host}", "give its address"),
    ("timed out", "{to} does not answer", "is it switched on, and in this network?"),
    ("No route to host", "{to} cannot be reached", "is it switched on, and in this network?"),
)  # fmt: skip
"""What OpenSSH's client says, what that means, and what to do."""


class Lost(ToolError):
    """The connection ended; what runs on the board without it goes on."""


@dataclass(frozen=True, kw_only=True)
class Ssh:
    """An open connection."""

    destination: str
    options: tuple[str, ...]
    """For ssh and sftp alike."""
    folder: str
    """On the board, absolute."""
    where: str = "ssh"
    before: tuple[str, ...] = ()

    def shell(self, script: str, watch: Callable[[str], None] = lambda line: None) -> str:
        return _shell(
            self.destination, self.options, f"cd {shlex.quote(self.folder)} || exit\n{script}", watch
        )

    def put(self, files: Mapping[str, Path]) -> None:
        """Send what is not there yet. Raises ToolError when the connection ends or what arrives is not what was sent."""
        for name, path in files.items():
            for _ in range(2):
                if self._intact(name, path.stat().st_size):
                    break
                self._send(name, path)
            else:
                if not self._intact(name, path.stat().st_size):
                    raise ToolError(
                        f"{path.name} arrived twice with another sha256 than it was sent with: the board's disk may be broken"
                    )

    def missing(self, files: Mapping[str, Path]) -> int:
        """Bytes of the files that are still to be sent."""
        sizes = self._sizes(files)
        return sum(max(0, path.stat().st_size - sizes.get(name, 0)) for name, path in files.items())

    def clear(self, names: Sequence[str] = ()) -> None:
        """Delete files from the work folder, and the folder when nothing else is in it; all of them without names."""
        which = " ".join(map(shlex.quote, names)) or "*"
        self.shell(f"rm -f -- {which}; cd / && rmdir {shlex.quote(self.folder)} 2>/dev/null; true")

    def _sizes(self, names: Mapping[str, Path]) -> dict[str, int]:
        listed = " ".join(map(shlex.quote, names))
        said = self.shell(f'for f in {listed}; do [ -f "$f" ] && echo "edgeft $f=$(wc -c <"$f")"; done; true')
        return {
            name: int(size) for name, size in re.findall(r"^edgeft (\S+)=\s*(\d+)\s*$", said, re.MULTILINE)
        }

    def _intact(self, name: str, size: int) -> bool:
        """Whether a whole file of this sha256 is there; a file that is as long and another is deleted."""
        there = self._sizes({name: Path()}).get(name, -1)
        if there < size:
            return False
        progress.report("check what lies on the board")
        said = self.shell(
            f"command -v sha256sum >/dev/null || echo edgeft none\nsha256sum {shlex.quote(name)}; true"
        )
        if "edgeft none" in said:
            raise SetupError(
                "the board has no sha256sum, so what is sent there cannot be checked",
                hint="apt install coreutils",
            )
        if name in (line.split(" ", 1)[0] for line in said.splitlines()):
            return True
        self.shell(f"rm -f -- {shlex.quote(name)}")
        return False

    def _send(self, name: str, path: Path) -> None:
        size = path.stat().st_size
        self.shell(f": >>{shlex.quote(name)}")  # sftp goes on only with a file that is there
        with tempfile.NamedTemporaryFile("w", suffix=".sftp") as batch:
            batch.write(f"put -a {_quoted(str(path.resolve()))} {_quoted(f'{self.folder}/{name}')}\n")
            batch.flush()
            command = [SFTP.find(), "-q", *self.options, "-b", batch.name, self.destination]
            with background(command) as sending:
                while sending.running:
                    with suppress(EdgeftError):
                        progress.report(
                            f"send {path.name}",
                            self._sizes({name: path}).get(name, 0) / 1e6,
                            size / 1e6,
                            unit="MB",
                        )
                    with suppress(Exception):
                        sending.process.wait(1.0)
                if sending.process.returncode:
                    raise _failed(
                        sending, f"could not send {path.name}; the same command goes on from where it stopped"
                    )


@contextmanager
def connected(
    url: str, *, options: Sequence[str] = (), folder: str = "", keep: bool = False, usual: str = FOLDER
) -> Iterator[Ssh]:
    """A board by its URL, `ssh://user@host:port`, while the block lasts.

    `options` are ssh's (`IdentityFile=…`). The work folder is emptied afterwards unless `keep`, and unless the
    connection was lost: then what was sent stays for the next try. `usual` is the folder below the user's home that is
    taken where no `folder` is given. Raises SetupError for a URL that is none, and with
    what to do when the board does not let us in.
    """
    destination, port, host = _parts(url)
    chosen = tuple(f"-o{option}" for option in (*options, *OPTIONS, *([f"Port={port}"] if port else [])))
    with tempfile.TemporaryDirectory(prefix="edgeft-ssh-") as private:  # short: a socket's path has 107 bytes
        socket = f"{private}/s"
        shared = (*chosen, f"-oControlPath={socket}")
        with background([SSH.find(), "-M", "-N", *shared, destination]) as master:
            _wait(master, Path(socket), destination, port, host)
            wanted = shlex.quote(folder) if folder else f'"$HOME"/{usual}'
            said = _shell(
                destination,
                shared,
                f'mkdir -p {wanted} && chmod 700 {wanted} && cd {wanted} && echo "edgeft at $(pwd)"',
            )
            if not (at := re.search(r"^edgeft at (/.*)$", said, re.MULTILINE)):
                raise SetupError(f"no work folder could be made on {destination}: {said.strip()[-300:]}")
            board = Ssh(destination=destination, options=shared, folder=at[1].strip())
            try:
                yield board
            finally:
                if not keep and master.running:
                    with suppress(EdgeftError):
                        board.clear()


def _parts(url: str) -> tuple[str, int | None, str]:
    try:
        found = urlsplit(url)
        host, port = found.hostname or "", found.port
    except ValueError as e:
        raise SetupError(
            f"{url!r} is no address of a board: {e}", hint="ssh://user@board or ssh://user@board:port"
        ) from None
    if found.password:
        raise SetupError(
            "an ssh address holds no password: keys only", hint="ssh-copy-id puts your key on the board"
        )
    user = f"{found.username}@" if found.username else ""
    if found.scheme != "ssh" or not re.fullmatch(r"[\w.:%-]+", host) or f"{user}{host}".startswith("-") \
            or found.path.strip("/") or not re.fullmatch(r"([\w.-]+@)?", user):  # fmt: skip
        raise SetupError(
            f"{url!r} is no address of a board", hint="ssh://user@board or ssh://user@board:port"
        )
    return f"{user}{host}", port, host


def _wait(master: Background, socket: Path, destination: str, port: int | None, host: str) -> None:
    """Until the connection stands. Raises SetupError with the reason when it does not."""
    deadline = time.monotonic() + 60
    while not socket.exists():
        if not master.running or time.monotonic() > deadline:
            said = str(master.failure("ended"))
            words = {"to": destination, "host": host, "flags": f"-p {port} " if port else ""}
            for sign, meaning, hint in REASONS:
                if sign in said:
                    raise SetupError(meaning.format(**words), hint=hint.format(**words))
            raise SetupError(
                f"no connection to {destination}: {''.join(master.lines[-3:]).strip() or 'no answer'}"
            )
        time.sleep(0.05)


def _shell(
    destination: str, options: Sequence[str], script: str, watch: Callable[[str], None] = lambda line: None
) -> str:
    try:
        return run([SSH.find(), *options, destination, f"exec sh -c {shlex.quote(script)}"], watch=watch)
    except ToolError as e:
        if "exited with 255" in str(e):  # ssh's own status
            raise Lost(
                f"the connection to {destination} was lost", hint="what was sent is kept there; run it again"
            ) from e
        raise


def _failed(sending: Background, why: str) -> ToolError:
    said = "".join(sending.lines)
    if "subsystem request failed" in said:
        return ToolError("the board has no sftp server", hint="apt install openssh-sftp-server")
    if "Connection closed" in said or "Broken pipe" in said:
        return Lost(f"{why}: the connection was lost")
    if "No space left" in said or "Failure" in said:
        return ToolError(f"{why}: the board's disk may be full")
    return sending.failure(why)


def _quoted(text: str) -> str:
    """As sftp's own command line takes a path: in quotes, with a backslash before what it would expand."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
