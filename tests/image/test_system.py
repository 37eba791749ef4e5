"""What maintainer scripts would have done, done from outside: accounts, units, links, nothing of the build machine."""

from __future__ import annotations

import os
import stat

import pytest

from edgeft.errors import StageError
from edgeft.export.files import Entry
from edgeft.image import settings, system
from edgeft.image.system import Wanted

UNIT = b"[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"


@pytest.fixture
def root(tmp_path):
    """As little of Debian as the work needs."""
    for name, text in {
        "usr/share/base-passwd/passwd.master": "root:*:0:0:root:/root:/bin/bash\nnobody:*:65534:65534:nobody:/:/usr/sbin/nologin\n",
        "usr/share/base-passwd/group.master": "root:*:0:\nadm:*:4:\nshadow:*:42:\nnogroup:*:65534:\n",
        "usr/lib/systemd/system/systemd-networkd.service": UNIT.decode(),
        "usr/lib/systemd/system/ssh.service": UNIT.decode(),
        "usr/lib/systemd/system/other.service": UNIT.decode(),
        "usr/lib/systemd/system/multi-user.target": "[Unit]\nDescription=x\n[Install]\nAlias=default.target\n",
        "usr/lib/sysusers.d/x.conf": "u messagebus - \"bus\" /nonexistent\n",
        "usr/bin/dash": "",
        "etc/fstab": "# of the build machine",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def wanted(**changes) -> Wanted:
    files = {"usr/lib/systemd/system/edgeft-m.service": Entry(content=UNIT)}
    return Wanted(
        **{"arch": "amd64", "model": "m", "files": files, "enable": ("edgeft-m.service",), **changes}
    )


def enabled(root) -> set[str]:
    return {path.name for path in (root / "etc/systemd/system/multi-user.target.wants").iterdir()}


def test_wanted_units_start_and_no_other_does(root):
    system.configure(root, wanted())
    assert enabled(root) == {"systemd-networkd.service", "edgeft-grow.service", "edgeft-m.service"}
    assert (root / "etc/systemd/system/default.target").readlink().name == "multi-user.target"
    masked = root / "etc/systemd/system/serial-getty@.service"
    assert str(masked.readlink()) == "/dev/null"
    assert str((root / "etc/edgeft/m.env").readlink()) == "/var/lib/edgeft/settings/m.env"


def test_without_a_key_nobody_can_log_in(root):
    system.configure(root, wanted())
    shadow = (root / "etc/shadow").read_text().splitlines()
    assert all(line.split(":")[1].startswith("!") for line in shadow)
    assert {line.split(":")[2] for line in shadow} == {"18262"}, "the day of the build is in the image"
    assert "edgeft" not in (root / "etc/passwd").read_text() and not (root / "etc/sudoers.d").exists()
    assert "messagebus" in (root / "etc/passwd").read_text()
    assert stat.S_IMODE((root / "etc/shadow").stat().st_mode) & 0o077 == 0


def test_with_a_key_one_user_is_let_in_by_it_alone(root):
    system.configure(root, wanted(ssh_keys=("ssh-ed25519 AAAA me\n",)))
    assert (root / "etc/ssh/authorized_keys/edgeft").read_text() == "ssh-ed25519 AAAA me\n"
    sshd = (root / "etc/ssh/sshd_config").read_text()
    assert (
        "PasswordAuthentication no" in sshd and "PermitRootLogin no" in sshd and "AllowUsers edgeft" in sshd
    )
    assert "ssh.service" in enabled(root)
    assert stat.S_IMODE((root / "etc/sudoers.d/edgeft").stat().st_mode) == 0o440
    assert {"openssh-server", "sudo"} <= set(system.packages(wanted(ssh_keys=("k",)))) - set(
        system.packages(wanted())
    )


def test_the_machine_id_is_an_empty_file_and_the_build_machine_leaves_nothing(root):
    system.configure(root, wanted(hostname="kitchen"))
    assert (root / "etc/machine-id").read_bytes() == b""
    assert (root / "etc/hostname").read_text() == "kitchen\n"
    text = "".join(p.read_text() for p in (root / "etc").rglob("*") if p.is_file() and not p.is_symlink())
    assert os.uname().nodename not in text.split() and "build machine" not in text and "http" not in text


def test_a_unit_that_is_not_there_cannot_be_enabled(root):
    with pytest.raises(StageError, match=r"missing\.service"):
        system.configure(root, wanted(enable=("missing.service",)))


def test_two_roots_are_configured_alike(root, tmp_path_factory):
    import shutil

    other = tmp_path_factory.mktemp("other") / "root"
    shutil.copytree(root, other)
    for each in (root, other):
        system.configure(each, wanted(ssh_keys=("k",)))

    def contents(folder):
        return {
            str(p.relative_to(folder)): (stat.S_IMODE(p.lstat().st_mode), p.read_bytes() if p.is_file() else b"")
            for p in folder.rglob("*") if not p.is_symlink()
        }  # fmt: skip

    assert contents(root) == contents(other)


def test_nothing_asks_the_network_for_anything():
    files = settings.files("m", "edgeft", ["k"])
    network = files["etc/systemd/network/80-edgeft.network"].content.decode()
    assert (
        "UseDNS=no" in network
        and "UseNTP=no" in network
        and "LLMNR=no" in network
        and "MulticastDNS=no" in network
    )
    asked = system.packages(wanted(ssh_keys=("k",)))
    assert not {"systemd-timesyncd", "systemd-resolved", "apt", "unattended-upgrades", "ntp"} & set(asked)


def test_what_the_boot_partition_wants_is_taken_by_name_and_pattern(tmp_path):
    root, boot = tmp_path / "r", tmp_path / "b"
    for name in ("usr/lib/x/a.dtb", "usr/lib/x/b.dtb", "usr/lib/efi/l.efi"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    system._take(root, {"EFI/BOOT/BOOTX64.EFI": "usr/lib/efi/*.efi", "dtb/": "usr/lib/x/*.dtb"}, boot)
    assert (boot / "EFI/BOOT/BOOTX64.EFI").read_text() == "usr/lib/efi/l.efi"
    assert sorted(p.name for p in (boot / "dtb").iterdir()) == ["a.dtb", "b.dtb"]
    for files in ({"one": "usr/lib/x/*.dtb"}, {"none/": "usr/lib/y/*"}):
        with pytest.raises(StageError, match="boot partition"):
            system._take(root, files, boot)
