"""The packages are the same bytes twice, install into a root without running anything foreign, and open no door unasked."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from edgeft.errors import RecipeError, SetupError
from edgeft.export import deb, service
from edgeft.export.deb import Package
from edgeft.stages import export_deb
from edgeft.stages.export_deb import Deb
from tests.agent.device import Keys

pytestmark = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")


@pytest.fixture(scope="module")
def built(job):
    done = job("one", Deb())
    return done, export_deb.run(done)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A root with both packages; read only."""
    done, _ = built
    return root_with(tmp_path_factory.mktemp("root"), done.out / "runtime.deb", done.out / "model.deb")


def root_with(folder, *packages):
    """The packages installed into an empty root, as an image is made; dpkg runs their scripts outside, under DPKG_ROOT."""
    for name in ("info", "updates", "triggers"):
        (folder / "var/lib/dpkg" / name).mkdir(parents=True)
    for name in ("status", "available"):
        (folder / "var/lib/dpkg" / name).touch()
    dpkg(folder, "-i", *packages)
    return folder


def dpkg(root, *arguments):
    command = [
        "dpkg",
        f"--root={root}",
        "--force-script-chrootless",
        "--force-architecture",
        f"--log={root}/log",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def served(root, settings, environment):
    """What the start script tells llama-server, or what it says and its exit status when it refuses."""
    script = (root / "usr/lib/edgeft/serve").read_text()
    for folder in ("usr", "var"):
        script = script.replace(f"=/{folder}/", f"={root}/{folder}/")
    command = ["sh", "-c", script, "serve", "tiny-model"]
    return subprocess.run(
        command,
        check=False,
        env={"PATH": os.environ["PATH"], **settings, **environment},
        capture_output=True,
        text=True,
    )


def test_two_builds_give_the_same_packages(job, built):
    first, facts = built
    second = job("two", Deb())
    again = export_deb.run(second)
    for name in ("runtime.deb", "model.deb"):
        assert (first.out / name).read_bytes() == (second.out / name).read_bytes()
    assert facts == again
    assert sorted(p.name for p in first.out.iterdir()) == ["model.deb", "runtime.deb"]


def test_the_packages_install_into_a_root_of_another_architecture_and_leave_it_again(built, tmp_path):
    done, facts = built
    root = root_with(tmp_path / "root", done.out / "runtime.deb", done.out / "model.deb")
    link = root / "etc/systemd/system/multi-user.target.wants/edgeft-tiny-model.service"
    assert str(link.readlink()) == "/usr/lib/systemd/system/edgeft-tiny-model.service"
    there = root / "usr/share/edgeft/tiny-model"
    assert (there / "model.gguf").read_bytes() == (
        done.inputs["quantize/gguf"].path / "model.gguf"
    ).read_bytes()
    assert "apache-2.0" in (root / "usr/share/doc/edgeft-tiny-model/copyright").read_text()
    assert dpkg(root, "--verify") == ""
    assert {p["architecture"] for p in facts["packages"]} == {"arm64", "all"}
    link.unlink()  # as `systemctl disable` does; an update shall leave it so
    dpkg(root, "-i", done.out / "model.deb")
    assert not link.is_symlink()
    dpkg(root, "-P", *(p["package"] for p in facts["packages"]))
    assert not [p for p in root.rglob("*edgeft*") if "dpkg" not in p.parts]


def test_the_programs_say_who_may_update_the_device_and_ask_for_python_without_demanding_it(
    job, built, tmp_path
):
    trust = tmp_path / "root.json"
    trust.write_bytes(Keys().chain[0])
    done = job("trusting", Deb(trust=trust))
    facts = export_deb.run(done)
    root = root_with(tmp_path / "root", done.out / "runtime.deb", done.out / "model.deb")
    assert (root / "etc/edgeft/trust/root.json").read_bytes() == trust.read_bytes()
    assert facts["packages"][0]["version"] != built[1]["packages"][0]["version"]
    about = subprocess.run(
        ["dpkg-deb", "-f", done.out / "runtime.deb"], capture_output=True, text=True, check=True
    ).stdout
    assert "Recommends: python3, python3-cryptography\n" in about and "Depends" not in about
    said = subprocess.run([root / "usr/lib/edgeft/edgeft-update", "--root", root, "status"],
                          capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]}).stdout  # fmt: skip
    assert "updates are signed under root of trust 1" in said and "tiny-model: version 0" in said


def test_an_update_is_served_in_place_of_what_the_package_installed_and_goes_with_it(built, tmp_path):
    done, facts = built
    root = root_with(tmp_path / "root", done.out / "runtime.deb", done.out / "model.deb")
    models = root / "var/lib/edgeft/models/tiny-model"
    (models / "versions/3").mkdir(parents=True)
    for name in ("model.gguf", "run.sh"):
        shutil.copy(root / "usr/share/edgeft/tiny-model" / name, models / "versions/3")
    (models / "current").symlink_to("versions/3")
    options = served(root, {}, {}).stdout.split("\n")
    assert options[options.index("--model") + 1] == f"{models}/versions/3/model.gguf"  # not through the link
    assert "an update is served" in dpkg(root, "-i", done.out / "model.deb")
    dpkg(root, "-P", *(p["package"] for p in facts["packages"]))
    assert not models.exists()


def test_nothing_but_this_machine_is_answered_unless_the_settings_say_so_and_then_with_a_key(
    installed, tmp_path
):
    root = installed
    settings = dict(line.split("=", 1) for line in (root / "etc/edgeft/tiny-model.env").read_text().splitlines()
                    if not line.startswith("#"))  # fmt: skip
    options = served(root, settings, {}).stdout.split("\n")
    assert options[options.index("--model") + 1] == f"{root}/usr/share/edgeft/tiny-model/model.gguf"
    assert options[-5:-1] == ["--host", "127.0.0.1", "--port", "8080"] and "--api-key-file" not in options

    open_to_all = {**settings, "EDGEFT_HOST": "0.0.0.0"}
    refused = served(root, open_to_all, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert refused.returncode == 78 and "no key" in refused.stderr and refused.stdout == ""
    (tmp_path / "api-key").write_text("secret")
    options = served(root, open_to_all, {"CREDENTIALS_DIRECTORY": str(tmp_path)}).stdout.split("\n")
    assert options[options.index("--api-key-file") + 1] == f"{tmp_path}/api-key"


def test_options_in_the_settings_do_not_open_another_address(installed):
    options = served(installed, {"EDGEFT_OPTIONS": "--host 0.0.0.0 --verbose"}, {}).stdout.split()
    assert "--verbose" in options
    assert options[-4:] == ["--host", "127.0.0.1", "--port", "8080"]  # llama-server takes the last


def test_the_unit_keeps_the_service_within_the_prediction_and_its_log_bounded(built, installed, tmp_path):
    _, facts = built
    root = installed
    unit = (root / "usr/lib/systemd/system/edgeft-tiny-model.service").read_text()
    limit = facts["memory_max_mb"]
    assert facts["memory_mb"]["total"] < limit <= 1.25 * facts["memory_mb"]["total"] + 1
    assert f"MemoryMax={limit * 10**6}\n" in unit and "DynamicUser=yes\n" in unit
    assert "SystemMaxUse=16M" in (root / "usr/lib/systemd/journald@edgeft.conf.d/edgeft.conf").read_text()
    if shutil.which("systemd-analyze"):
        for path in (root / "usr/lib/systemd/system").iterdir():  # with the programs where this root has them
            (tmp_path / path.name).write_text(
                path.read_text().replace("ExecStart=/usr", f"ExecStart={root}/usr")
            )
        command = ["systemd-analyze", "verify", *tmp_path.glob("*.service")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_gpu_stays_visible_to_the_service(tmp_path):
    from dataclasses import replace

    from tests.test_bundle import SETTINGS

    units = [service.of_model(replace(SETTINGS, gpu=gpu), memory_max_mb=100) for gpu in (True, False)]
    with_gpu, without = (u["usr/lib/systemd/system/edgeft-tiny.service"].content for u in units)
    assert (
        b"PrivateDevices" not in with_gpu.replace(b"no PrivateDevices", b"") and b"DeviceAllow=" in with_gpu
    )
    assert b"PrivateDevices=yes" in without and b"DeviceAllow" not in without


def test_memory_is_never_promised_beyond_the_board():
    assert service.memory_limit_mb(1000, 3000) == 1250
    assert service.memory_limit_mb(1000, 1100) == 1100
    assert service.memory_limit_mb(1000, 900) == 1000  # a prediction beyond the board was refused before


def test_a_machine_without_dpkg_deb_is_told_what_to_do(tmp_path, monkeypatch):
    package = Package(
        name="x", version="1", architecture="all", maintainer="a <a@b>", summary="x", description=(), files={}
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="dpkg-deb is not installed") as error:
        deb.build(package, tmp_path / "x.deb")
    assert "apt install dpkg" in error.value.hint


@pytest.mark.parametrize("version", ["", "v1", "1-2", "1 2"])
def test_a_version_that_debian_does_not_take_is_refused(tmp_path, version):
    package = Package(
        name="x",
        version=version,
        architecture="all",
        maintainer="a <a@b>",
        summary="x",
        description=(),
        files={},
    )
    with pytest.raises(RecipeError, match="must start with a digit"):
        deb.build(package, tmp_path / "x.deb")
