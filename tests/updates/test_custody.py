"""Keys are made once, kept to their owner, and replaced so that a device which trusts the old ones follows."""

from __future__ import annotations

import json
import os
import stat

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType
from typer.testing import CliRunner

from edgeft.cli import app
from edgeft.errors import DataError, SetupError
from edgeft.updates import custody, ledger, metadata
from edgeft.updates import keys as private
from tests.updates.conftest import no_passphrase

SECRET = b"correct horse"


def roots(folder):
    return [
        path.read_bytes()
        for path in sorted((folder / "metadata").glob("*.root.json"), key=lambda p: int(p.name.split(".")[0]))
    ]


def follows(chain):
    """Whether python-tuf's own client goes from the first root to the last."""
    client = TrustedMetadataSet(chain[0], EnvelopeType.METADATA)
    for root in chain[1:]:
        client.update_root(root)
    return client.root.version


def test_new_keys_are_their_owners_alone_and_root_1_is_signed(tmp_path):
    made = custody.new(tmp_path / "keys")
    assert made.version == 1 and made.thresholds == {"root": 1, "targets": 1} and not made.unused
    assert [key.role for key in made.keys] == ["root", "targets"]
    for key in made.keys:
        assert (
            key.path
            and stat.S_IMODE(key.path.stat().st_mode) == 0o600
            and not key.exposed
            and not key.encrypted
        )
    assert stat.S_IMODE((tmp_path / "keys/private").stat().st_mode) == 0o700
    assert follows(roots(tmp_path / "keys")) == 1
    assert (tmp_path / "keys/root.json").read_bytes() == roots(tmp_path / "keys")[0]


def test_nothing_is_overwritten(keys):
    before = {path: path.read_bytes() for path in keys.rglob("*") if path.is_file()}
    with pytest.raises(SetupError, match="not empty"):
        custody.new(keys)
    assert {path: path.read_bytes() for path in keys.rglob("*") if path.is_file()} == before


def test_a_threshold_that_cannot_be_reached_makes_nothing(tmp_path):
    with pytest.raises(SetupError, match="3 of 2"):
        custody.new(tmp_path / "keys", threshold=3, roots=2, offline=[tmp_path / "stick"])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("role", ["root", "targets"])
def test_a_device_follows_a_rotation(role, keys):
    before = {key.role: key.keyid for key in custody.show(keys).keys}
    made = custody.rotate(keys, role, no_passphrase)
    after = {key.role: key.keyid for key in made.keys}
    assert made.version == 2 and after[role] != before[role] and len(made.unused) == 1
    other = {"root": "targets", "targets": "root"}[role]
    assert after[other] == before[other]
    custody.rotate(keys, other, no_passphrase)
    custody.rotate(keys, role, no_passphrase)
    assert follows(roots(keys)) == 4
    assert (keys / "root.json").read_bytes() == roots(keys)[-1]


def test_a_root_that_the_old_keys_did_not_sign_is_followed_by_nobody(keys, tmp_path):
    custody.rotate(keys, "root", no_passphrase)
    stranger = custody.new(tmp_path / "stranger").folder
    custody.rotate(stranger, "root", no_passphrase)
    with pytest.raises(RepositoryError):
        follows([roots(keys)[0], roots(stranger)[1]])
    (keys / "metadata/2.root.json").write_bytes(roots(stranger)[1])
    with pytest.raises(DataError, match=r"2\.root\.json is no root that can be trusted"):
        custody.show(keys)


def test_two_of_three_root_keys_sign_and_a_lost_one_is_replaced(tmp_path):
    sticks = [tmp_path / name for name in ("a", "b", "c")]
    folder = tmp_path / "keys"
    made = custody.new(folder, threshold=2, roots=3, offline=sticks)
    assert [key.path.parent for key in made.keys if key.role == "root"] == sticks
    assert not list((folder / "private").glob("root-*"))
    with pytest.raises(SetupError, match="0 of the 2 root keys"):
        custody.rotate(folder, "targets", no_passphrase)
    with pytest.raises(SetupError, match="1 of the 2 root keys"):
        custody.rotate(folder, "targets", no_passphrase, offline=sticks[:1])
    assert custody.rotate(folder, "targets", no_passphrase, offline=sticks[1:]).version == 2
    lost = next(key for key in made.keys if key.path.parent == sticks[0])
    lost.path.unlink()
    with pytest.raises(SetupError, match="a folder of its own"):
        custody.rotate(folder, "root", no_passphrase, key=lost.keyid[:12], offline=sticks[1:])
    sticks.append(tmp_path / "d")
    after = custody.rotate(folder, "root", no_passphrase, key=lost.keyid[:12], offline=sticks[1:])
    assert len({key.path.parent for key in after.keys}) == 4
    assert after.version == 3 and lost.keyid not in {key.keyid for key in after.keys}
    assert all(key.path for key in after.keys) and after.thresholds["root"] == 2
    assert follows(roots(folder)) == 3


def test_a_rotation_that_fails_leaves_no_key_and_no_root(tmp_path):
    sticks = [tmp_path / "a", tmp_path / "b"]
    folder = custody.new(tmp_path / "keys", threshold=2, roots=2, offline=sticks).folder
    before = sorted(tmp_path.rglob("*"))
    for role, key in (("root", "beef"), ("snapshot", ""), ("root", "")):
        with pytest.raises(SetupError):
            custody.rotate(folder, role, no_passphrase, key=key, offline=sticks[:1])
    assert sorted(tmp_path.rglob("*")) == before


def test_the_keys_of_snapshot_and_timestamp_are_nobodys(keys):
    document = json.loads((keys / "root.json").read_text())["signed"]
    assert document["roles"]["snapshot"]["keyids"] == document["roles"]["timestamp"]["keyids"] == []
    assert document["expires"].startswith("9999") and document["spec_version"] == metadata.SPECIFICATION


def test_a_passphrase_is_needed_and_checked(tmp_path):
    folder = custody.new(tmp_path / "keys", passphrase=SECRET).folder
    assert all(key.encrypted for key in custody.show(folder).keys)
    assert b"ENCRYPTED" in next((folder / "private").iterdir()).read_bytes()
    assert custody.targets_signer(folder, lambda path: SECRET)
    with pytest.raises(SetupError, match="passphrase is wrong") as refused:
        custody.targets_signer(folder, lambda path: b"wrong horse")
    assert "horse" not in str(refused.value)
    with pytest.raises(SetupError, match="the key in its place would not be"):
        custody.rotate(folder, "targets", lambda path: SECRET)
    made = custody.rotate(folder, "targets", lambda path: SECRET, passphrase=b"another")
    assert custody.targets_signer(folder, lambda path: b"another") and made.version == 2


def test_a_file_with_another_key_in_it_is_refused(keys, tmp_path):
    mine = next(key for key in custody.show(keys).keys if key.role == "targets")
    theirs = next(key for key in custody.new(tmp_path / "b").keys if key.role == "targets")
    mine.path.write_bytes(theirs.path.read_bytes())
    with pytest.raises(SetupError, match="another key than its name says"):
        custody.targets_signer(keys, no_passphrase)
    mine.path.write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    with pytest.raises(SetupError, match="damaged"):
        custody.targets_signer(keys, no_passphrase)
    mine.path.unlink()
    with pytest.raises(SetupError, match="no private key that may sign"):
        custody.targets_signer(keys, no_passphrase)


def test_targets_signed_by_a_stranger_or_changed_afterwards_are_refused(keys, tmp_path):
    root = custody.roots(keys)[-1][1]
    files = {"update.json": (3, "ab" * 32)}
    good = metadata.targets(7, files, custody.targets_signer(keys, no_passphrase))
    assert metadata.verified_targets(good, root).version == 7
    for bad in (
        metadata.targets(7, files, CryptoSigner.generate_ed25519()), good.replace(b'"version":7', b'"version":8'),
        good.replace(b'"length":3', b'"length":4'), roots(keys)[0], b"{}", b"not json",
    ):  # fmt: skip
        with pytest.raises(DataError, match="not signed by a key of root 1"):
            metadata.verified_targets(bad, root)


def test_the_ledger_gives_a_number_to_one_contents_only(keys):
    with ledger.held(keys) as issued:
        assert issued.sequence("m", "aa") == 1
        issued.note("m", 1, {"contents": "aa"})
        assert issued.sequence("m", "aa") == 1 and issued.sequence("m", "bb") == 2
        assert issued.sequence("m", "bb", above=9) == 10 and issued.sequence("m", "aa", above=1) == 2
        assert issued.sequence("other", "aa") == 1
    with ledger.held(keys) as issued:
        assert issued.sequence("m", "bb", wanted=5) == 5
        with pytest.raises(SetupError, match="sequence 1 of m was given to other contents"):
            issued.sequence("m", "bb", wanted=1)
    (keys / ledger.FILE).write_text('{"m": {"x": 1}}')
    with pytest.raises(DataError, match="damaged"), ledger.held(keys):
        pass


def run(*arguments, **environment):
    return CliRunner().invoke(app, ["keys", *map(str, arguments)], env=environment)


def test_the_commands_say_who_may_sign_and_never_a_secret(tmp_path, caplog):
    folder, stick = tmp_path / "keys", tmp_path / "stick"
    said = run("new", folder, "--offline", stick, "--passphrase-env", "PASS", PASS=SECRET.decode())
    assert said.exit_code == 0, said.output
    pems = [path.read_text() for path in tmp_path.rglob("*.pem")]
    assert len(pems) == 2 and all("ENCRYPTED" in pem for pem in pems)
    more = [
        run("show", folder), run("show", folder, "--offline", stick),
        run("rotate", folder, "--role", "targets", "--offline", stick, "--passphrase-env", "PASS", PASS=SECRET.decode()),
    ]  # fmt: skip
    assert [r.exit_code for r in more] == [0, 0, 0], more[2].output
    assert "private key not here" in more[0].output and "root 2" in more[2].output
    whole = said.output + "".join(r.output for r in more) + caplog.text
    secrets = [SECRET.decode(), *(line for pem in pems for line in pem.splitlines()[1:-1])]
    assert not [s for s in secrets if s in whole]


def test_an_encrypted_key_without_anybody_to_ask_is_a_sentence(tmp_path):
    custody.new(tmp_path / "keys", passphrase=SECRET)
    refused = run("rotate", tmp_path / "keys", "--role", "root")
    assert isinstance(refused.exception, SetupError) and "nobody to ask" in str(refused.exception)
    refused = run("rotate", tmp_path / "keys", "--role", "root", "--passphrase-env", "EMPTY", EMPTY="")
    assert "EMPTY is empty" in str(refused.exception)


def test_a_key_that_others_can_read_is_pointed_out(keys):
    path = custody.show(keys).keys[0].path
    os.chmod(path, 0o644)  # noqa: PTH101
    assert custody.show(keys).keys[0].exposed and "OTHERS CAN READ IT" in run("show", keys).output


def test_a_new_key_never_takes_the_place_of_a_file(tmp_path, monkeypatch):
    one = CryptoSigner.generate_ed25519()
    private.file_of(tmp_path, "root", one.public_key.keyid).write_text("mine")
    monkeypatch.setattr(
        "cryptography.hazmat.primitives.asymmetric.ed25519.Ed25519PrivateKey.generate",
        lambda: one._private_key,
    )
    with pytest.raises(SetupError, match="cannot be written"):
        private.new(tmp_path, "root")
    assert private.file_of(tmp_path, "root", one.public_key.keyid).read_text() == "mine"
