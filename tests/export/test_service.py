"""What the packages and images share: start script, repair at boot, units, and whom the device trusts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from edgeft.errors import RecipeError
from edgeft.export import agent, service
from tests.agent.device import Keys
from tests.test_bundle import SETTINGS


def text(name, **given):
    return service.shared(**given)[name].content.decode()


def test_a_device_has_its_agent_and_trusts_whom_it_was_told_to():
    files = service.shared(b"root")
    assert files["usr/lib/edgeft/edgeft-update"].mode == files["usr/sbin/edgeft-update"].mode == 0o755
    assert files[service.TRUST].content == b"root" and service.TRUST not in service.shared()
    assert "StateDirectoryMode=0711" in text(
        "usr/lib/systemd/system/edgeft-key.service"
    )  # the model is read by no one's user


def test_what_is_no_root_of_trust_is_refused_before_it_is_shipped(tmp_path):
    (tmp_path / "root.json").write_bytes(Keys().chain[0])
    agent.check_trust(tmp_path / "root.json")
    (tmp_path / "root.json").write_text("{}")
    with pytest.raises(RecipeError, match="no root of trust") as error:
        agent.check_trust(tmp_path / "root.json")
    assert "edgeft keys new" in error.value.hint


def test_the_repair_comes_before_the_model_and_the_question_with_it():
    unit = service.of_model(SETTINGS, memory_max_mb=9)[
        "usr/lib/systemd/system/edgeft-tiny.service"
    ].content.decode()
    after = re.search("^After=(.*)$", unit, re.MULTILINE)[1].split()
    wants = re.search("^Wants=(.*)$", unit, re.MULTILINE)[1].split()
    assert "edgeft-recover.service" in after and wants == [
        "edgeft-recover.service",
        "edgeft-health@tiny.timer",
    ]
    assert service.enabled("tiny") == ("edgeft-tiny.service",)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_understands_the_units(tmp_path):
    there = tmp_path / "usr/lib/systemd/system"
    there.mkdir(parents=True)
    for name, entry in {**service.shared(), **service.of_model(SETTINGS, memory_max_mb=9)}.items():
        if name.startswith("usr/lib/systemd/system/"):
            program = entry.content.decode().replace("ExecStart=/usr/lib/edgeft", f"ExecStart={tmp_path}")
            (there / name.rpartition("/")[2]).write_text(program)
    for name in ("serve", "recover", "edgeft-update"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    instances = []
    for name in ("edgeft-health@.service", "edgeft-health@.timer"):
        instances.append(there / name.replace("@", "@tiny"))
        instances[-1].write_text((there / name).read_text())
    units = [there / "edgeft-tiny.service", there / "edgeft-recover.service", *instances]
    command = ["systemd-analyze", "verify", *units]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env={**os.environ, "SYSTEMD_UNIT_PATH": f"{there}:"})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("left", "repairs"),
    [
        ({}, False),
        ({"state.json": '{\n "highest": 2,\n "trial": null,\n}'}, False),
        ({"state.json": '{\n "trial": {\n  "place": "versions/3"\n }\n}'}, True),
        ({"state.json": ""}, True),
        ({"state.json.tmp": ""}, True),
        ({"versions/3.tmp/model.gguf": ""}, True),
    ],
    ids=["nothing", "a journal", "a trial", "a lost journal", "half a journal", "half a version"],
)
@pytest.mark.parametrize("packaged", [False, True])
def test_a_boot_waits_for_the_agent_only_when_there_is_something_to_repair(tmp_path, left, repairs, packaged):
    model = tmp_path / "var/lib/edgeft/models/tiny"
    whole = tmp_path / "usr/share/edgeft/tiny" if packaged else model / "versions/0"
    files = {
        whole / "model.gguf": "x",
        tmp_path / "usr/lib/edgeft/edgeft-update": "#!/bin/sh\necho repaired\n",
    }
    for path, content in {**files, **{model / name: content for name, content in left.items()}}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "usr/lib/edgeft/edgeft-update").chmod(0o755)
    model.mkdir(exist_ok=True, parents=True)
    if not packaged:
        (model / "current").symlink_to("versions/0")
    script = re.sub(r'(?<=[\s"])/(?=usr|var)', f"{tmp_path}/", text("usr/lib/edgeft/recover"))
    run = ["sh", "-c", script]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == (
        "repaired\n" if repairs else ""
    )
    if not packaged:
        (model / "current").unlink()
        assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "repaired\n"
