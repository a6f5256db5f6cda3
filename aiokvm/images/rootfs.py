"""What a Debian root file system of ours holds beside its packages, and how it becomes an ext4 image."""

from __future__ import annotations

import io
import shlex
import tarfile
from typing import IO, TYPE_CHECKING

from aiokvm.errors import ImageError
from aiokvm.images.initramfs import TTY

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

EPOCH = 1_700_000_000
"""The time of all that is newer: two builds of the same packages are the same image (SOURCE_DATE_EPOCH)."""

PACKAGES = ("acpid", "busybox", "dbus", "iproute2", "kmod", "passwd", "systemd-sysv", "udev", "udhcpc")
"""Beside Debian's essential packages: the power button, modules, an init, names for devices, a DHCP client
and small tools (ip; of busybox wget and httpd). dbus is what poweroff asks."""
SSH_SERVER = "openssh-server"

# The getty that Debian has waits for udev to announce the terminal.
_GETTY = """\
[Unit]
Description=Getty on %I
After=systemd-user-sessions.service getty-pre.target
Before=getty.target
IgnoreOnIsolate=yes

[Service]
ExecStart=-/usr/local/sbin/aiokvm-getty
Type=simple
Restart=always
UtmpIdentifier=%I
StandardInput=tty
StandardOutput=tty
TTYPath=/dev/%I
TTYReset=yes
TTYVHangup=yes
IgnoreSIGPIPE=no
SendSIGHUP=yes

[Install]
WantedBy=getty.target
"""
_LOGIN = """\
#!/bin/sh
read -r cmdline </proc/cmdline
case " $cmdline " in
    *" aiokvm.autologin "*) set -- --autologin root ;;
esac
# How large the terminal is on which the first serial port is shown, and what it has become.
for word in $cmdline; do
    case $(tty):$word in
        /dev/ttyS0:aiokvm.tty=*x*)
            size=${word#*=} rows=${size%x*} cols=${size#*x}
            [ -r /run/aiokvm.tty ] && read -r rows cols </run/aiokvm.tty
            stty rows "$rows" cols "$cols"
            ;;
    esac
done
exec /sbin/agetty "$@" --keep-baud 115200,57600,38400,9600 - "$TERM"
"""
_TTY = """\
[Unit]
Description=Size of the terminal that shows the first serial port
ConditionKernelCommandLine=aiokvm.tty

[Service]
ExecStart=/usr/local/sbin/aiokvm-tty
"""
# networkd waits for udev to announce the adapters.
_DHCP = """\
[Unit]
Description=An address for every network adapter, by DHCP
ConditionPathExistsGlob=/sys/class/net/eth*
ConditionKernelCommandLine=!aiokvm.nodhcp
Before=network-online.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/aiokvm-dhcp
"""
_DHCP_SCRIPT = """\
#!/bin/sh
busybox ip link set lo up
for adapter in /sys/class/net/eth*; do
    adapter=${adapter##*/}
    busybox ip link set "$adapter" up
    udhcpc -i "$adapter" -t 4 -T 1 -A 5 -b -S
done
"""
# Keys are made where they are used: those of the image would be everybody's.
_SSH_KEYS = """\
[Unit]
Description=Host keys of the SSH server
ConditionPathExists=/usr/bin/ssh-keygen
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key
ConditionPathIsReadWrite=/etc/ssh
Before=ssh.service ssh.socket

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key
"""
# As above, for other packages.
_OWN_FILES = """\
[Unit]
Description=Files of this machine's own
ConditionPathExists=|/usr/sbin/make-ssl-cert
ConditionPathExists=|/usr/bin/newaliases
ConditionPathIsReadWrite=/etc
Before=network.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/aiokvm-own
"""
_OWN_SCRIPT = """\
#!/bin/sh
[ -x /usr/sbin/make-ssl-cert ] && [ ! -e /etc/ssl/private/ssl-cert-snakeoil.key ] &&
    make-ssl-cert generate-default-snakeoil
[ -x /usr/bin/newaliases ] && [ -e /etc/aliases ] && [ ! -e /etc/aliases.db ] && newaliases
exit 0
"""
# What is plugged in later is named as it comes. At boot only what has names by udev is looked at, for each of
# Linux's many terminals costs a process.
_TRIGGER = """\
[Service]
ExecStart=
ExecStart=-udevadm trigger --action=add --subsystem-match=block --subsystem-match=net \
    --subsystem-match=virtio-ports
"""
_FILES = {
    "etc/hostname": "debian\n",
    # The host's, which a guest cannot use.
    "etc/resolv.conf": "",
    "etc/acpi/events/power": "event=button/power\naction=/bin/systemctl start poweroff.target "
    "--no-block --job-mode=replace-irreversibly\n",
    "etc/systemd/journald.conf.d/aiokvm.conf": "[Journal]\nStorage=volatile\n",
    "etc/systemd/system/serial-getty@.service": _GETTY,
    "usr/local/sbin/aiokvm-getty": _LOGIN,
    "etc/systemd/system/aiokvm-tty.service": _TTY,
    "usr/local/sbin/aiokvm-tty": TTY.read_text(),
    "etc/systemd/system/aiokvm-dhcp.service": _DHCP,
    "etc/systemd/system/aiokvm-ssh-keys.service": _SSH_KEYS,
    "etc/systemd/system/systemd-udev-trigger.service.d/aiokvm.conf": _TRIGGER,
    "usr/local/sbin/aiokvm-dhcp": _DHCP_SCRIPT,
    "etc/systemd/system/aiokvm-own.service": _OWN_FILES,
    "usr/local/sbin/aiokvm-own": _OWN_SCRIPT,
    # A prompt that is only what it says, for those who wait for it.
    "root/.inputrc": "set enable-bracketed-paste off\n",
}
# What waits for hardware that is not there, writes to the disk unasked, or mounts what few need. Each costs a
# slow machine a tenth of a second or more.
_MASKED = (
    *("dpkg-db-backup.timer", "fstrim.timer", "systemd-tmpfiles-clean.timer"),
    *("getty-static.service", "getty@tty1.service", "systemd-hwdb-update.service"),
    *("modprobe@.service", "kmod-static-nodes.service", "systemd-journal-flush.service"),
    *("systemd-pstore.service", "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service"),
    *("dev-hugepages.mount", "dev-mqueue.mount", "proc-sys-fs-binfmt_misc.automount"),
    *("sys-fs-fuse-connections.mount", "sys-kernel-config.mount"),
    *("sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
)

_OWN = (
    *("etc/ssh/ssh_host_*", "var/lib/systemd/random-seed", "var/lib/dbus/machine-id"),
    *("etc/ssl/private/ssl-cert-snakeoil.key", "etc/ssl/certs/ssl-cert-snakeoil.pem", "etc/aliases.db"),
    *("var/log/apt", "var/log/dpkg.log", "var/log/bootstrap.log", "var/log/alternatives.log"),
    *("var/cache/ldconfig/aux-cache", "var/cache/debconf/*-old", "var/lib/dpkg/*-old", "etc/*-"),
)

DPKG_OPTIONS = (
    "force-unsafe-io",
    *(f"path-exclude=/usr/share/{folder}/*" for folder in ("doc", "info", "locale", "man")),
    "path-include=/usr/share/doc/*/copyright",
)

# debugfs sets the times that mke2fs takes from files or the clock, which none of its options changes. Nodes
# in /dev are left out: only root may make them, and the kernel makes its own.
_SCRIPT = """
set -e
exec 3>&1 >&2
umask 022
PATH=$PATH:/usr/sbin:/sbin
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' TERM INT HUP
tar -C "$folder" -x --numeric-owner --exclude='./dev/*'
touch -d "@$SOURCE_DATE_EPOCH" "$folder"
mke2fs -q -F -t ext4 -b 4096 -I 256 -m 0 -U "$1" -E "hash_seed=$1,root_owner=0:0,$3" -O "none,$4" \
    -d "$folder" /proc/self/fd/3 "$2"
cd "$folder"
find . -printf 'sif "%p" atime @'"$SOURCE_DATE_EPOCH"'\nsif "%p" ctime @'"$SOURCE_DATE_EPOCH"'\n' \
    -printf 'sif "%p" crtime @'"$SOURCE_DATE_EPOCH"'\nsif "%p" atime_extra 0\nsif "%p" ctime_extra 0\n' \
    -printf 'sif "%p" crtime_extra 0\n' |
    debugfs -w -f - /proc/self/fd/3 >/dev/null
"""
_UUID = "6b766d00-0000-4000-8000-64656269616e"
# A new file is all zeros.
_EXTENDED = "lazy_itable_init=0,lazy_journal_init=0,assume_storage_prezeroed=1"
# All that this kernel and the next know, whatever the mke2fs of this machine would take.
_FEATURES = (
    "has_journal,resize_inode,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,metadata_csum"
)


def image_command(size_bytes: int) -> list[str]:
    """Return the command that makes an ext4 image, on standard output, of a tar archive, on standard input.

    Standard output has to be an empty regular file that the command may open anew.
    """
    return ["sh", "-c", _SCRIPT, "sh", _UUID, f"{size_bytes // 1024}k", _EXTENDED, _FEATURES]


def hooks(overlay: str, release: str, enable: Sequence[str] = ()) -> list[str]:
    """Return mmdebstrap's hooks: unpack the archive ``overlay`` over the root, and settle in.

    ``enable`` are names of systemd's units.
    """
    return [
        f"tar-in {overlay} /",
        f'chroot "$1" depmod {release}',
        *(f'chroot "$1" systemctl enable --quiet -- {shlex.quote(unit)}' for unit in enable),
        # What is to be each machine's own, or tells when and where the image was built.
        f'cd "$1" && rm -rf {" ".join(_OWN)}',
        # Whose they are depends on who builds.
        'rm -rf "$1"/var/cache/apt/archives "$1"/var/lib/apt/lists',
        r'sed -i "s/^root:[^:]*:/root::/" "$1/etc/shadow"',
    ]


def write_overlay(
    kernel_tar: IO[bytes], overlay: IO[bytes], files: Iterable[tuple[str, bytes, int]] = ()
) -> str:
    """Write a kernel package's modules and our own files as an archive; return the kernel's release.

    Of the recipe's ``files`` each has a path, a content and a mode.

    Raises ``ImageError`` if the archive of the kernel's package is damaged or holds no modules.
    """
    release = ""
    try:
        with (
            tarfile.open(fileobj=kernel_tar, mode="r:") as package,
            tarfile.open(fileobj=overlay, mode="w", format=tarfile.GNU_FORMAT) as archive,
        ):
            for member in package:
                # /lib is a link to /usr/lib: an archive that has it as a directory would replace the link.
                name = member.name.removeprefix("./").removeprefix("usr/")
                parts = name.split("/")
                if parts[:2] != ["lib", "modules"] or len(parts) < 3:
                    continue
                release = parts[2]
                member.name = f"usr/{name}"
                archive.addfile(member, package.extractfile(member) if member.isfile() else None)
            for name, text in _FILES.items():
                _add(archive, name, text.encode(), 0o755 if text.startswith("#!") else 0o644)
            for name in _MASKED:
                _link(archive, f"etc/systemd/system/{name}", "/dev/null")
            _link(archive, "etc/systemd/system/default.target", "/lib/systemd/system/multi-user.target")
            wants = "etc/systemd/system/multi-user.target.wants"
            for name in ("dhcp", "own", "ssh-keys", "tty"):
                _link(archive, f"{wants}/aiokvm-{name}.service", f"../aiokvm-{name}.service")
            # D-Bus starts it when somebody asks for it.
            _link(archive, f"{wants}/systemd-logind.service", "/dev/null")
            # Adapters are eth0, eth1 and so on, in the order of the machine's.
            _link(archive, "etc/systemd/network/99-default.link", "/dev/null")
            for name, data, mode in files:
                _add(archive, name.lstrip("/"), data, mode)
    except tarfile.TarError as error:
        raise ImageError(f"the kernel package's archive is damaged: {error}") from error
    if not release:
        raise ImageError("the kernel's package holds no modules")
    return release


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(data), EPOCH, mode
    archive.addfile(member, io.BytesIO(data))


def _link(archive: tarfile.TarFile, name: str, target: str) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mtime, member.mode = tarfile.SYMTYPE, target, EPOCH, 0o777
    archive.addfile(member)
