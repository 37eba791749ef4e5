"""Who is believed: the anchor, and whomever its keys' owners named since; nobody else, and no earlier file."""

from __future__ import annotations

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, TargetFile, Targets

from edgeft.agent import trust
from edgeft.agent.errors import NotTrusted
from edgeft.agent.places import Places
from tests.agent.device import NEVER, Keys


@pytest.fixture
def places(tmp_path):
    return Places(root=tmp_path)


def anchored(places, keys):
    places.anchor.parent.mkdir(parents=True, exist_ok=True)
    places.anchor.write_bytes(keys.chain[0])


def targets(*signers, version=7):
    metadata = Metadata(
        Targets(version=version, expires=NEVER, targets={"a": TargetFile(1, {"sha256": "0" * 64}, "a")})
    )
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


def chain(keys):
    return list(enumerate(keys.chain, 1))


def fresh():
    return CryptoSigner.generate_ed25519()


def test_what_the_targets_keys_signed_is_believed_and_nothing_else(places):
    keys, others = Keys(), Keys()
    anchored(places, keys)
    signed = trust.verified(places, chain(keys), targets(*keys.targets))
    assert (signed.version, signed.files) == (7, {"a": (1, "0" * 64)})
    for wrong in (
        targets(*others.targets),
        targets(*keys.root),
        targets(),
        keys.chain[0],
        b"",
        b"{}",
        b"\xff" * 100,
    ):
        with pytest.raises(NotTrusted):
            trust.verified(places, chain(keys), wrong)
    with pytest.raises(NotTrusted):
        trust.verified(places, chain(others), targets(*others.targets))  # a root of their own brings nothing


def test_a_device_without_a_root_of_trust_says_so(places):
    with pytest.raises(NotTrusted, match="takes no updates"):
        trust.newest(places)
    places.anchor.parent.mkdir(parents=True)
    for content in (b"", b"{}", targets(fresh())):
        places.anchor.write_bytes(content)
        with pytest.raises(NotTrusted, match="no root of trust"):
            trust.newest(places)


def test_a_threshold_of_two_needs_two_keys(places):
    keys = Keys(targets=[fresh(), fresh(), fresh()], threshold=2)
    anchored(places, keys)
    one, two, _ = keys.targets
    with pytest.raises(NotTrusted):
        trust.verified(places, [], targets(one))
    with pytest.raises(NotTrusted):
        trust.verified(places, [], targets(one, one))
    assert trust.verified(places, [], targets(one, two)).threshold == 2


def test_a_rotated_key_is_believed_and_stays_so_while_the_old_one_is_not(places):
    keys = Keys()
    anchored(places, keys)
    old = keys.targets
    keys.targets = [fresh()]
    keys.publish(keys.root)
    assert trust.verified(places, chain(keys), targets(*keys.targets)).version == 7
    assert trust.newest(places).version == 2
    with pytest.raises(NotTrusted):  # an old file brings the old chain
        trust.verified(places, chain(keys)[:1], targets(*old, version=99))


def test_a_new_root_key_must_be_named_by_the_old_one_and_sign_itself(places):
    keys = Keys()
    anchored(places, keys)
    old, keys.root = keys.root, [fresh()]
    for signers in (keys.root, old, []):
        keys.publish(signers)
        with pytest.raises(NotTrusted, match="not signed as root 1 demands"):
            trust.verified(places, chain(keys), targets(*keys.targets))
        keys.chain.pop()
    assert trust.newest(places).version == 1
    keys.publish([*old, *keys.root])
    trust.verified(places, chain(keys), targets(*keys.targets))
    old, keys.root = keys.root, [fresh()]
    keys.publish([*old, *keys.root])
    trust.verified(places, chain(keys), targets(*keys.targets))
    assert trust.newest(places).version == 3


def test_versions_of_the_root_follow_one_another(places):
    keys = Keys()
    anchored(places, keys)
    keys.publish(keys.root)
    keys.publish(keys.root)
    with pytest.raises(NotTrusted, match="missing"):
        trust.verified(places, chain(keys)[2:], targets(*keys.targets))
    with pytest.raises(NotTrusted, match="version 3"):  # the third under the second's name
        trust.verified(places, [(2, keys.chain[2])], targets(*keys.targets))


def test_a_root_that_was_verified_stays_even_if_the_update_is_refused(places):
    keys = Keys()
    anchored(places, keys)
    lost, keys.targets = keys.targets, [fresh()]
    keys.publish(keys.root)
    with pytest.raises(NotTrusted):
        trust.verified(places, chain(keys), targets(*lost))
    assert trust.newest(places).version == 2


def test_another_anchor_of_the_owner_wins_over_what_updates_had_brought(places):
    keys, others = Keys(), Keys()
    anchored(places, keys)
    keys.publish(keys.root)
    trust.verified(places, chain(keys), targets(*keys.targets))
    anchored(places, others)
    assert trust.newest(places).version == 1
    trust.verified(places, chain(others), targets(*others.targets))
    with pytest.raises(NotTrusted):
        trust.verified(places, chain(keys), targets(*keys.targets))


def test_numbers_begin_again_only_when_the_old_keys_can_sign_nothing_any_more(places):
    a, b, c, d = (fresh() for _ in range(4))
    keys = Keys(targets=[a, b], threshold=2)
    anchored(places, keys)
    before = trust.verified(places, [], targets(a, b)).signers
    keys.targets = [b, c]
    keys.publish(keys.root)
    assert trust.outlived(before, trust.verified(places, chain(keys), targets(b, c)))
    keys.targets = [a, b, d]
    keys.publish(keys.root)
    assert not trust.outlived(before, trust.verified(places, chain(keys), targets(a, b)))
    assert not trust.outlived((), trust.verified(places, chain(keys), targets(a, b)))
