"""The device step for real: a tiny model here, and on a board that is an sshd of the test's own."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from edgeft import boards
from edgeft.boards import machine
from edgeft.boards.place import here
from edgeft.boards.program import program_for
from edgeft.boards.ssh import connected
from edgeft.errors import DataError, SetupError
from edgeft.llamacpp import decode, quantize, score
from edgeft.llamacpp.base_file import cut, read_base, write_base
from edgeft.parity.board import _paired

pytestmark = pytest.mark.slow

N_CTX = 64


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A quantized tiny model, the base file of the unquantized one, and this machine's scores."""
    import numpy as np

    folder = tmp_path_factory.mktemp("shipped")
    quantize.quantize(tiny(64), folder / "model.gguf", "Q8_0")
    windows = np.random.default_rng(5).integers(100, 40_000, (5, N_CTX)).tolist()
    with decode.Decoder(tiny(64), n_ctx=N_CTX, threads=1) as decoder:
        logits = (score.scored_logits(decoder, window) for window in windows)
        write_base(folder / "whole.kld", n_ctx=N_CTX, n_vocab=49152, chunks=windows, logits=logits)
    cut(folder / "whole.kld", folder / "domain.kld", 4)
    with decode.Decoder(folder / "model.gguf", n_ctx=N_CTX, threads=1) as decoder:
        scores = score.compare(folder / "domain.kld", decoder)
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 80)
    return boards.Shipped(
        model=folder / "model.gguf", bases={"domain": folder / "domain.kld"}, text=text
    ), scores


def moved(measured, scores):
    found = boards.step.stock.parse(measured.logs["domain"])
    return _paired([line.kld for line in found.running], found.kld, scores.kld)


def test_a_cut_base_file_holds_the_first_windows_bit_for_bit(made, tmp_path):
    base = made[0].bases["domain"]
    whole, few = read_base(base.with_name("whole.kld")), read_base(base)
    assert few.windows == whole.windows[:4] and (few.packed(3) == whole.packed(3)).all()
    with pytest.raises(DataError, match="has 5 windows, so 6 cannot"):
        cut(base.with_name("whole.kld"), tmp_path / "x.kld", 6)


def test_here_the_stock_tool_says_what_we_do_and_how_fast_and_how_large_it_was(made):
    shipped, scores = made
    with here() as place:
        there = machine.read(place.shell(machine.LOOK))
        found = boards.measure(place, there, program_for(there, own=True), shipped, threads=1)
        assert not list(place.folder.glob("log.*"))
    assert abs(moved(found, scores).mean) < 1e-5 and found.windows == {"domain": 4}
    assert found.prompt > 0 and found.decode > 0 and not found.emulated
    assert found.peak_scoring > shipped.model.stat().st_size and found.facts()["log_sha256"]


def test_a_zeroed_tensor_in_the_file_over_there_moves_the_divergence(made, tmp_path):
    from edgeft.llamacpp import header

    shipped, scores = made
    damaged = bytearray(shipped.model.read_bytes())
    found = header.read(shipped.model)
    tensor = next(t for t in found.tensors if t.name == "token_embd.weight")
    start = found.data_offset + tensor.offset
    damaged[start : start + tensor.bytes] = bytes(tensor.bytes)
    (tmp_path / "model.gguf").write_bytes(damaged)
    with here() as place:
        there = machine.read(place.shell(machine.LOOK))
        broken = replace(shipped, model=tmp_path / "model.gguf", text=None)
        measured = boards.measure(place, there, program_for(there, own=True), broken, threads=1)
    assert moved(measured, scores).low > 1e-2 and measured.decode is None


@pytest.fixture
def sshd(tmp_path):
    """An sshd of our own on localhost with a throw-away key; its URL and ssh's options."""
    if not (program := shutil.which("sshd", path="/usr/sbin:/usr/bin:/sbin")):
        pytest.skip("sshd is not installed: apt install openssh-server")
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "home").mkdir()
    (tmp_path / "conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/key.pub\n"
        f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\nSubsystem sftp internal-sftp\n"
        f"SetEnv HOME={tmp_path}/home\n"
    )
    public = (tmp_path / "host.pub").read_text().split()
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {public[0]} {public[1]}\n")
    with subprocess.Popen([program, "-D", "-f", tmp_path / "conf", "-E", tmp_path / "log"]) as server:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None:
                pytest.skip(f"sshd does not start here: {(tmp_path / 'log').read_text()[-300:]}")
            time.sleep(0.1)
        options = [
            f"IdentityFile={tmp_path}/key",
            "IdentitiesOnly=yes",
            f"UserKnownHostsFile={tmp_path}/known",
        ]
        yield f"ssh://{getpass.getuser()}@127.0.0.1:{port}", options, tmp_path
        server.terminate()


def test_who_does_not_let_us_in_is_named_with_what_to_do(sshd):
    url, options, _ = sshd
    for wrong, reason in (
        ([*options[:2], "UserKnownHostsFile=/dev/null"], "the host key of .* is not known yet"),
        (["IdentityFile=/dev/null", *options[1:]], "accepts none of your keys"),
    ):
        with pytest.raises(SetupError, match=reason), connected(url, options=wrong):
            pass
    with (
        pytest.raises(SetupError, match="nothing listens for ssh"),
        connected("ssh://127.0.0.1:1", options=options),
    ):
        pass


def test_a_cut_off_transfer_goes_on_damage_is_sent_again_and_the_board_is_left_clean(sshd, made):
    url, options, home = sshd
    path = made[0].model
    name, whole = boards.step._sha256(path), path.read_bytes()
    with connected(url, options=options, keep=True) as board:
        there = home / "home/.cache/edgeft-verify" / name
        there.write_bytes(whole[:100_000])
        assert board.missing({name: path}) == len(whole) - 100_000
        board.put({name: path})
        assert there.read_bytes() == whole and board.missing({name: path}) == 0
        before = there.stat().st_mtime_ns
        board.put({name: path})
        assert there.stat().st_mtime_ns == before  # what is there is not sent again
        there.write_bytes(b"\0" * len(whole))
        board.put({name: path})
        assert there.read_bytes() == whole
    assert there.is_file()
    with connected(url, options=options):
        pass
    assert not there.parent.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_over_ssh_the_step_gives_what_it_gives_here(sshd, made):
    url, options, home = sshd
    shipped, scores = made
    with connected(url, options=options) as board:
        there = machine.read(board.shell(machine.LOOK))
        from edgeft import runtimes
        from edgeft.boards.program import best_isa

        if not runtimes.for_device(there.arch, best_isa(replace(there, features=()))).built() and not (
            there.arch == "amd64" and runtimes.for_device("amd64", "x86-64-v3").built()
        ):
            pytest.skip("no runtime for this processor is compiled yet")
        program = program_for(there, "x86-64-v3" if there.arch == "amd64" else "")
        found = boards.measure(board, there, program, shipped, threads=1)
    assert found.where == "ssh" and found.decode > 0 and abs(moved(found, scores).mean) < 1e-3
    assert not (home / "home/.cache/edgeft-verify").exists()
