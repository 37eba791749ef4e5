"""One update after another on a device: what is installed answers, what is refused leaves the old one answering."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.agent import torture
from tests.agent.device import NAME, RUN, Device, Keys, answer, content, update
from tests.agent.torture import Run

OLD = {"model.gguf": content("good"), "run.sh": RUN}


@pytest.fixture(scope="module")
def keys():
    return Keys()


@pytest.fixture
def device(tmp_path, keys, request):
    packaged = getattr(request, "param", False)
    made = Device(root=tmp_path / "device", keys=keys, packaged=packaged, key="secret", patience=1.5).make(
        OLD
    )
    made.start()
    yield made
    made.stop()


def said(done, code=0):
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def there(device):
    return sorted(p.name for p in (device.model / "versions").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("device", [False, True], ids=["image", "package"], indirect=True)
def test_a_device_goes_through_a_life_of_updates(device, keys, tmp_path):
    full = {
        "model.gguf": content("good"),
        "adapter.gguf": content("lora"),
        "run.sh": RUN,
        "notices/base/LICENSE": b"free",
    }
    file = update(tmp_path / "2.edgeft", keys, 2, full)
    said(device.run("install", file))
    assert device.asks() == answer(full)
    state = device.state()
    assert (state["sequence"], state["label"], state["highest_sequence"], state["trial"]) == (
        2,
        "v2",
        2,
        None,
    )
    assert state["previous"] == {"sequence": 0, "label": ""} and set(state["files"]) == set(full)

    tuned = {**full, "adapter.gguf": content("lora")}
    parts = {**tuned, "model.gguf": ("base", full["model.gguf"])}
    stick = tmp_path / "stick"
    stick.mkdir()
    update(stick / "5.edgeft", keys, 5, parts, kind="adapter")
    said(device.run("install", stick))  # a folder with one update in it
    assert device.asks() == answer(tuned)
    versions = device.model / "versions"
    assert (versions / "2/model.gguf").samefile(versions / "5/model.gguf")  # not copied
    assert there(device) == ["2", "5"]  # 0 was neither current nor the one before

    assert "5 of tiny" in said(device.run("install", file), 6)
    said(device.run("rollback", NAME))
    assert device.asks() == answer(full) and device.state()["sequence"] == 2
    assert "had number 5" in said(device.run("install", update(stick / "5.edgeft", keys, 4, full)), 6)
    said(device.run("rollback", NAME))
    assert device.asks() == answer(tuned)
    (versions / "5/adapter.gguf").write_bytes(tuned["adapter.gguf"][:-1] + b"?")
    assert "is not what was installed" in said(device.run("status", "--check"), 12)
    said(device.run("rollback", NAME, "--factory"), 0 if device.packaged else 11)
    if device.packaged:
        assert device.asks() == answer(OLD) and not (device.model / "current").is_symlink()


@pytest.mark.slow
def test_health_restarts_a_server_that_is_gone_and_says_when_that_does_not_help(device):
    assert "answers" in said(device.run("health", NAME))
    device.stop()
    assert "restarting it" in said(device.run("health", NAME)) and device.asks() == answer(OLD)
    device.stop()
    (device.root / "usr/lib/edgeft/llama-server").unlink()
    assert "after a restart either" in said(device.run("health", NAME), 9)


@pytest.mark.slow
def test_an_agent_that_is_stopped_puts_the_old_version_back(device, keys, tmp_path):
    mute = update(tmp_path / "u", keys, 3, {"model.gguf": content("mute"), "run.sh": RUN})
    process = subprocess.Popen(device.command("install", mute), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    while "asking" not in process.stdout.readline():
        pass
    time.sleep(0.3)
    assert "another edgeft-update" in said(device.run("rollback", NAME), 10)
    assert "being installed" in said(device.run("health", NAME))
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # somebody in a hurry
    assert process.wait(20) == 128 + signal.SIGTERM
    assert device.asks() == answer(OLD) and device.state()["last"]["result"] == "did not answer"
    assert there(device) == ["0"]


@pytest.mark.slow
def test_what_a_killed_agent_left_on_trial_is_undone_by_the_next_health_check(device, keys, tmp_path):
    mute = update(tmp_path / "u", keys, 3, {"model.gguf": content("mute"), "run.sh": RUN})
    process = subprocess.Popen(device.command("install", mute), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    while "asking" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.kill()
    process.wait()
    assert device.state()["trial"] == 3
    assert "had not been found good" in said(device.run("health", NAME))
    assert device.asks() == answer(OLD) and device.state()["trial"] is None


@pytest.mark.slow
def test_where_three_versions_have_no_room_the_one_before_the_current_goes_first(keys, tmp_path):
    run = Run(tmp_path, random.Random(1))
    try:
        run.go("install", run.update, code=0)
        third = {**run.files[7], "model.gguf": content("good")}
        for number, room, code in ((8, 10_000, 7), (9, 30_000, 0)):
            file = update(tmp_path / "third", torture.KEYS, number, third)
            run.go("install", file, code=code, room=room)
        assert run.device.asks() == answer(third)
        assert there(run.device) == ["7", "9"]
    finally:
        run.device.stop()


@pytest.mark.slow
def test_a_new_key_ends_the_numbers_of_one_that_was_lost(tmp_path):
    keys = Keys()
    device = Device(root=tmp_path / "device", keys=keys).make(OLD)
    device.start()
    try:
        thief = {"model.gguf": content("good"), "run.sh": RUN}
        said(device.run("install", update(tmp_path / "u", keys, 1 << 50, thief)))
        keys.targets = Keys().targets
        keys.publish(keys.root)
        said(device.run("install", update(tmp_path / "u", keys, 1, OLD)))
        assert device.asks() == answer(OLD) and device.state()["highest_sequence"] == 1
        assert json.loads(device.run("status", "--json").stdout)["trusted_root"] == 2
    finally:
        device.stop()


@pytest.mark.slow
def test_a_device_whose_only_model_is_damaged_is_saved_by_an_update(device, keys, tmp_path):
    (device.factory / "model.gguf").unlink()
    device.stop()
    assert "tiny has no version that is whole" in said(device.run("health", NAME), 9)
    new = {"model.gguf": content("good"), "run.sh": RUN}
    said(device.run("install", update(tmp_path / "u", keys, 1, new)))
    assert device.asks() == answer(new) and there(device) == ["1"]


def test_without_systemd_and_without_a_command_nothing_is_begun(keys, tmp_path):
    device = Device(root=tmp_path / "device", keys=keys).make(OLD)
    (device.root / "etc/edgeft/agent.json").unlink()
    file = update(tmp_path / "u", keys, 1, OLD)
    assert "agent.json must say how" in said(device.run("install", file), 13)
    assert there(device) == ["0"]


def test_the_exit_codes_are_in_the_help():
    from edgeft.agent import errors

    command = [sys.executable, "-m", "edgeft.agent", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(f"{e.code:3}  {e.meaning}" in text for e in errors.ALL)
    assert len({e.code for e in errors.ALL}) == len(errors.ALL)
