"""The files that turn extracted packages into a system: what maintainer scripts and an installer would have written.

Everything is fixed when the image is made. The root is read-only; what a device must remember lies in /var.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeft.export.files import Entry
from edgeft.image import accounts
from edgeft.image.initramfs import DATA_LABEL

BOOT_LABEL = "EDGEFT"
VAR: Mapping[str, int] = {
    "lib": 0o755, "lib/edgeft": 0o711, "lib/edgeft/models": 0o755, "lib/edgeft/settings": 0o755, "log": 0o755, "tmp": 0o1777,
}  # fmt: skip
"""Folders of the data partition, with their modes; the rest of /var is made by systemd-tmpfiles at every boot."""
MASKED = (
    # Questions at the first start, and what cannot work, or has nothing to do, on a read-only root.
    "systemd-firstboot.service", "systemd-hwdb-update.service", "systemd-machine-id-commit.service", "systemd-sysusers.service",
    "ldconfig.service", "systemd-boot-update.service", "systemd-boot-system-token.service", "systemd-remount-fs.service",
    "proc-sys-fs-binfmt_misc.automount", "proc-sys-fs-binfmt_misc.mount", "systemd-binfmt.service",
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
    # Nobody logs in at a console: it is a screen and a keyboard, or a serial line, that anyone can reach.
    "getty@.service", "serial-getty@.service", "autovt@.service", "console-getty.service", "container-getty@.service",
    "debug-shell.service",
    # Boots must not wait for a network, and nothing asks anyone for the time.
    "systemd-networkd-wait-online.service", "systemd-time-wait-sync.service",
)  # fmt: skip
ENABLED = ("systemd-networkd.service", "edgeft-grow.service")


def files(model: str, hostname: str, ssh_keys: Sequence[str]) -> dict[str, Entry]:
    """What is written into every root; with `ssh_keys` also what lets their holders in."""
    grow = "usr/lib/edgeft/grow"
    return {
        **accounts.files(),
        "etc/hostname": _text(hostname),
        "etc/hosts": _text("127.0.0.1 localhost", f"127.0.1.1 {hostname}", "::1 localhost ip6-localhost"),
        # Empty: the word "uninitialized" would start systemd-firstboot. The initramfs lays the device's own over it.
        "etc/machine-id": Entry(content=b""),
        "etc/resolv.conf": _text("# This system looks up no names."),
        "etc/nsswitch.conf": _text(
            "passwd: files", "group: files", "shadow: files", "hosts: files", "networks: files",
            "protocols: files", "services: files",
        ),
        "etc/fstab": _text(
            "# The initramfs mounts / (squashfs, read-only) and /var (the data partition).",
            "tmpfs /tmp tmpfs mode=1777,nosuid,nodev,size=25% 0 0",
            f"LABEL={BOOT_LABEL} /boot vfat umask=0077,nosuid,nodev,noexec,nofail,x-systemd.device-timeout=5min 0 0",
        ),
        "etc/apt/sources.list": _text("# This system is replaced as a whole; it installs no packages."),
        "etc/adjtime": _text("0.0 0 0.0", "0", "UTC"),
        "etc/environment": Entry(content=b""),
        "etc/default/locale": _text("LANG=C.UTF-8"),
        "etc/issue": _text(f"edgeft: {model}"),
        "etc/systemd/network/80-edgeft.network": _text(
            "[Match]", "Type=ether", "", "[Network]", "DHCP=yes", "LLMNR=no", "MulticastDNS=no", "",
            "# By the card's address, so that a card that is written anew keeps its lease.",
            "[DHCPv4]", "ClientIdentifier=mac", "UseDNS=no", "UseNTP=no", "UseHostname=no",
        ),
        "etc/systemd/system.conf.d/edgeft.conf": _text(
            "[Manager]",
            "# Where there is a hardware watchdog. A Raspberry Pi's counts to 15 s and no further.",
            "RuntimeWatchdogSec=15s", "RebootWatchdogSec=2min", "DefaultTimeoutStopSec=20s", "CrashReboot=yes",
        ),
        "etc/systemd/journald.conf.d/edgeft.conf": _text(
            "[Journal]", "Storage=persistent", "SystemMaxUse=32M", "SystemMaxFileSize=4M", "RuntimeMaxUse=16M",
            "ForwardToSyslog=no",
        ),
        "etc/systemd/system/var.mount.d/edgeft.conf": _text(
            "[Unit]", "# Left to systemd-shutdown, which unmounts it when nothing writes a log any more.", "DefaultDependencies=no",
        ),
        "etc/sysctl.d/80-edgeft.conf": _text(
            "# A kernel that has failed starts again; the boot loader counts.",
            "kernel.panic = 10", "kernel.panic_on_oops = 1", "kernel.sysrq = 0",
        ),
        **{f"etc/systemd/system/{name}.service": _text(*_instead_of_a_shell(name)) for name in ("emergency", "rescue")},
        "usr/lib/systemd/system/edgeft-grow.service": _text(*_grow_unit(grow)),
        grow: Entry(content=_GROW.encode(), mode=0o755),
        "usr/lib/tmpfiles.d/edgeft.conf": _text("d /var/lib/edgeft 0711 root root", *(_TMPFILES if ssh_keys else ())),
        **(_ssh(ssh_keys) if ssh_keys else {}),
    }  # fmt: skip


def links(model: str) -> dict[str, str]:
    """Symbolic links of every root: name -> target."""
    return {
        **{f"etc/systemd/system/{name}": "/dev/null" for name in MASKED},
        f"etc/edgeft/{model}.env": f"/var/lib/edgeft/settings/{model}.env",
        "etc/tmpfiles.d/home.conf": "/dev/null",
        "etc/mtab": "../proc/self/mounts",
        "etc/os-release": "../usr/lib/os-release",
        "usr/bin/sh": "dash",
        "home": "var/home",
    }


def preset(enable: Sequence[str]) -> bytes:
    """A preset file: these units are enabled, every other one that could be is not."""
    return ("".join(f"enable {unit}\n" for unit in enable) + "disable *\n").encode()


def _text(*lines: str) -> Entry:
    return Entry(content=("\n".join(lines) + "\n").encode())


def _instead_of_a_shell(name: str) -> tuple[str, ...]:
    return (
        "[Unit]", f"Description=Restart in place of the {name} shell", "DefaultDependencies=no", "Conflicts=shutdown.target",
        "Before=shutdown.target", "", "[Service]", "Type=oneshot",
        # The journal may not be there to hand it on.
        "ExecStart=/bin/sh -c 'echo \"edgeft: the system did not come up; restarting in 30 s\" >/dev/console; sleep 30'",
        "ExecStopPost=/bin/systemctl --force reboot",
    )  # fmt: skip


def _grow_unit(program: str) -> tuple[str, ...]:
    return (
        "[Unit]", "Description=Let the data partition take the rest of the disk", "DefaultDependencies=no",
        "After=local-fs.target", "Before=shutdown.target", "Conflicts=shutdown.target", "",
        "[Service]", "Type=oneshot", f"ExecStart=/{program}", "TimeoutStartSec=15min", "StandardOutput=journal+console", "",
        "[Install]", "WantedBy=multi-user.target",
    )  # fmt: skip


_GROW = f"""\
#!/bin/sh
# Extends the partition under /var to the end of its disk, and its file system with it. Changes nothing when both fit.
set -eu
device=$(blkid -c /dev/null -t LABEL={DATA_LABEL} -o device | while read -r one; do
    [ "$(stat -c %t:%T "$one")" = "$(printf %x:%x $(mountpoint -d /var | tr : ' '))" ] && echo "$one"
done || true)
[ -n "$device" ] || {{ echo "edgeft-grow: /var is no partition {DATA_LABEL}"; exit 0; }}
part=$(readlink -f "/sys/class/block/${{device##*/}}")
if [ -e "$part/partition" ]; then
    disk=${{part%/*}}
    number=$(cat "$part/partition")
    start=$(cat "$part/start")
    end=$((start + $(cat "$part/size")))
    for other in "$disk"/*/start; do
        if [ "$(cat "$other")" -gt "$start" ]; then
            echo "edgeft-grow: $device is not the last partition"
            exit 0
        fi
    done
    # Less than 16 MiB is not worth a write to the partition table.
    if [ $(($(cat "$disk/size") - end)) -gt 32768 ]; then
        echo ', +' | sfdisk --quiet --no-reread --no-tell-kernel -N "$number" "/dev/${{disk##*/}}"
        partx --update --nr "$number" "/dev/${{disk##*/}}"
        echo "edgeft-grow: $device now takes $(($(cat "$part/size") / 2048)) MiB"
    fi
fi
resize2fs "$device" 2>&1
"""

_TMPFILES = ("d /var/home 0755 root root", "d /var/home/edgeft 0700 edgeft edgeft")


def _ssh(keys: Sequence[str]) -> dict[str, Entry]:
    """A server that lets in one user, with these keys alone. Whoever holds one owns the device: sudo asks for nothing."""
    make = (
        "rm -rf /var/lib/edgeft/ssh.new; mkdir -m 700 /var/lib/edgeft/ssh.new; "
        'ssh-keygen -q -t ed25519 -N "" -C "" -f /var/lib/edgeft/ssh.new/ssh_host_ed25519_key; '
        "sync; mv /var/lib/edgeft/ssh.new /var/lib/edgeft/ssh; sync"
    )
    return {
        "etc/ssh/sshd_config": _text(
            "HostKey /var/lib/edgeft/ssh/ssh_host_ed25519_key", "AuthorizedKeysFile /etc/ssh/authorized_keys/%u",
            "AllowUsers edgeft", "PermitRootLogin no", "PasswordAuthentication no", "KbdInteractiveAuthentication no",
            "UsePAM yes", "X11Forwarding no", "AllowAgentForwarding no", "UseDNS no", "PrintMotd no",
            "Subsystem sftp /usr/lib/openssh/sftp-server",
        ),
        "etc/ssh/authorized_keys/edgeft": _text(*(key.strip() for key in keys)),
        "etc/sudoers.d/edgeft": Entry(content=b"edgeft ALL=(ALL:ALL) NOPASSWD: ALL\n", mode=0o440),
        "usr/lib/systemd/system/edgeft-ssh-keys.service": _text(
            "[Unit]", "Description=Host key of this device, made once", "ConditionPathExists=!/var/lib/edgeft/ssh",
            "Before=ssh.service", "",
            "[Service]", "Type=oneshot", "RemainAfterExit=yes", f"ExecStart=/bin/sh -ec '{make}'",
        ),
        "etc/systemd/system/ssh.service.d/edgeft.conf": _text(
            "[Unit]", "Requires=edgeft-ssh-keys.service", "After=edgeft-ssh-keys.service",
        ),
    }  # fmt: skip
