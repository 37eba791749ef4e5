"""A device in a folder: the shipped start script, a stand-in for llama-server, real keys, real update files."""

from __future__ import annotations

import datetime
import hashlib
import http.client
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Role, Root, TargetFile, Targets

from edgeft.export import service

NAME = "tiny"
QUESTION = json.dumps(
    {
        "messages": [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        "max_tokens": 24,
        "temperature": 0,
    }
)
NEVER = datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC)
RUN = b"""#!/bin/sh
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
lora=
[ ! -e "$here/adapter.gguf" ] || lora="--lora $here/adapter.gguf"
exec "$LLAMA_SERVER" --model "$here/model.gguf" $lora "$@"
"""
STANDIN = f"""#!/bin/sh
exec {sys.executable} -I -S {Path(__file__).with_name("standin.py")} "$@"
"""
RESTART = """#!/bin/sh
# Ends the old server and starts the new one, as an init script does.
set -eu
R=$1; shift
if [ -s "$R/server.pid" ]; then
    pid=$(cat "$R/server.pid")
    kill -9 "$pid" 2>/dev/null || :
    while kill -0 "$pid" 2>/dev/null && ! grep -q "^State:.*Z" "/proc/$pid/status"; do sleep 0.01; done
fi
set -a; . "$R/etc/edgeft/$1.env"; set +a
setsid "$R/usr/lib/edgeft/serve" "$1" >>"$R/server.log" 2>&1 </dev/null &
echo $! >"$R/server.pid"
"""


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Keys:
    """An owner: root keys, targets keys, and the chain of root metadata that was ever published."""

    root: list[CryptoSigner] = field(default_factory=lambda: [CryptoSigner.generate_ed25519()])
    targets: list[CryptoSigner] = field(default_factory=lambda: [CryptoSigner.generate_ed25519()])
    threshold: int = 1
    chain: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.chain:
            self.publish(self.root)

    def publish(self, signers: list[CryptoSigner]) -> None:
        """The next root, signed by `signers`."""
        root = Root(version=len(self.chain) + 1, expires=NEVER, consistent_snapshot=False)
        for key in self.root:
            root.add_key(key.public_key, "root")
        for key in self.targets:
            root.add_key(key.public_key, "targets")
        root.roles["targets"] = Role([k.public_key.keyid for k in self.targets], self.threshold)
        metadata = Metadata(root)
        for signer in signers:
            metadata.sign(signer, append=True)
        self.chain.append(metadata.to_bytes())


def described(sequence: int, parts: Mapping[str, object], **more: object) -> dict[str, object]:
    """update.json. Each part: bytes of a whole file, ("base", bytes), or ("delta", base, result, delta)."""
    files: dict[str, object] = {}
    base: dict[str, str] = {}
    for name, part in parts.items():
        result = part if isinstance(part, bytes) else part[2] if part[0] == "delta" else part[1]
        entry = {
            "bytes": len(result),
            "sha256": sha(result),
            "how": "whole",
            "executable": name.endswith(".sh"),
        }
        if isinstance(part, tuple):
            entry["how"] = part[0]
            base[name] = sha(part[1])
        if entry["how"] != "base":
            entry["target"] = ("delta/" if entry["how"] == "delta" else "files/") + name
        files[name] = entry
    return {"format": 1, "name": NAME, "sequence": sequence, "label": f"v{sequence}", "kind": "full",
            "base": base, "files": files, **more}  # fmt: skip


def update(
    path: Path,
    keys: Keys,
    sequence: int,
    parts: Mapping[str, object],
    *,
    version: int = 0,
    signers=None,
    add=(),
    **more,
) -> Path:
    """Write an update file with tuf and tarfile, independently of edgeft.updates."""
    about = described(sequence, parts, **more)
    payload = {"update.json": json.dumps(about).encode()}
    for name, part in parts.items():
        if target := about["files"][name].get("target"):
            payload[target] = part if isinstance(part, bytes) else part[3]
    targets = Targets(version=version or sequence, expires=NEVER)
    for name, content in payload.items():
        targets.targets[name] = TargetFile(len(content), {"sha256": sha(content)}, name)
    metadata = Metadata(targets)
    for signer in keys.targets if signers is None else signers:
        metadata.sign(signer, append=True)
    members = {f"metadata/{i}.root.json": root for i, root in enumerate(keys.chain, 1)}
    members["metadata/targets.json"] = metadata.to_bytes()
    members |= {f"payload/{name}": content for name, content in payload.items()}
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in add:
            tar.addfile(info)
    return path


@dataclass
class Device:
    """Folder `root` is the device's `/`. `packaged`: the model came with a package, else with an image."""

    root: Path
    keys: Keys
    packaged: bool = False
    key: str = ""
    patience: float = 3
    """Seconds that a server may take to start."""

    @property
    def model(self) -> Path:
        return self.root / "var/lib/edgeft/models" / NAME

    @property
    def factory(self) -> Path:
        return self.root / "usr/share/edgeft" / NAME if self.packaged else self.model / "versions/0"

    def make(self, files: Mapping[str, bytes]) -> Device:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        for folder in ("etc/edgeft/trust", "usr/lib/edgeft", "var/lib/edgeft/models"):
            (self.root / folder).mkdir(parents=True)
        (self.root / "etc/edgeft/trust/root.json").write_bytes(self.keys.chain[0])
        env = f"EDGEFT_HOST={'127.0.0.2' if self.key else '127.0.0.1'}\nEDGEFT_PORT={self.port}\nEDGEFT_OPTIONS=\n"
        (self.root / f"etc/edgeft/{NAME}.env").write_text(env)
        if self.key:
            (self.root / "var/lib/edgeft/api-key").write_text(self.key)
        restart = [str(self.root / "restart"), str(self.root), "{name}"]
        times = {"restart": restart, "start_seconds": self.patience, "answer_seconds": 60}
        (self.root / "etc/edgeft/agent.json").write_text(json.dumps(times))
        agent = f'#!/bin/sh\nexec {shlex.join(self.command())} "$@"\n'
        programs = {"edgeft-update": agent, "llama-server": STANDIN, "serve": self.shipped("serve"), "recover": self.shipped("recover")}  # fmt: skip
        for name, text in {
            "restart": RESTART,
            **{f"usr/lib/edgeft/{n}": t for n, t in programs.items()},
        }.items():
            (self.root / name).write_text(text)
            (self.root / name).chmod(0o755)
        self.factory.mkdir(parents=True)
        for name, content in files.items():
            (self.factory / name).write_bytes(content)
            (self.factory / name).chmod(0o755 if name.endswith(".sh") else 0o644)
        if not self.packaged:
            (self.model / "current").symlink_to("versions/0")
        return self

    def shipped(self, name: str) -> str:
        """A script as it is shipped, with this folder before every absolute path."""
        content = service.shared()[f"usr/lib/edgeft/{name}"].content
        assert isinstance(content, bytes)
        return re.sub(r"(?<=[\s\"=-])/(?=usr/|var/)", f"{self.root}/", content.decode())

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "edgeft.agent", "--root", str(self.root), *map(str, arguments)]

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, check=False, timeout=120
        )

    def start(self) -> None:
        subprocess.run([self.root / "restart", self.root, NAME], check=True, timeout=30)

    def stop(self) -> None:
        """As a power loss: the server is gone."""
        with suppress(OSError, ValueError):
            number = int((self.root / "server.pid").read_text())
            os.kill(number, signal.SIGKILL)
            while "Z" not in Path(f"/proc/{number}/stat").read_text().rpartition(")")[2]:
                time.sleep(0.01)  # it holds the port until it is gone
        (self.root / "server.pid").unlink(missing_ok=True)

    def asks(self, seconds: float = 10) -> str:
        """What the server answers; "" when nothing does."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                there = http.client.HTTPConnection(
                    "127.0.0.2" if self.key else "127.0.0.1", self.port, timeout=60
                )
                there.request(
                    "POST", "/v1/chat/completions", QUESTION, {"Authorization": f"Bearer {self.key}"}
                )
                return json.load(there.getresponse())["choices"][0]["message"]["content"]
            except (OSError, http.client.HTTPException):
                time.sleep(0.02)
        return ""

    def state(self) -> dict[str, object]:
        return json.loads(self.run("status", "--json").stdout)["models"][0]


def answer(files: Mapping[str, bytes]) -> str:
    """What the stand-in says when it has loaded these."""
    text = "model " + sha(files["model.gguf"])
    return text + (" adapter " + sha(files["adapter.gguf"]) if "adapter.gguf" in files else "")


def content(kind: str, size: int = 20000) -> bytes:
    """A model of its own."""
    return kind.encode() + b"\n" + os.urandom(size)
