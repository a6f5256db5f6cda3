"""What a Debian root file system of ours holds beside its packages, and how it becomes an ext4 image."""

from __future__ import annotations

import io
import tarfile
from typing import IO

from aiokvm.errors import ImageError

EPOCH = 1_700_000_000
"""The time of all that is newer: two builds of the same packages are the same image (SOURCE_DATE_EPOCH)."""

PACKAGES = ("acpid", "busybox", "kmod", "passwd", "systemd-sysv", "udhcpc")
"""Beside Debian's essential packages: the power button, modules, an init, a DHCP client and small tools (ip,
wget, httpd). No udev: it makes a boot longer."""

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
exec /sbin/agetty "$@" --keep-baud 115200,57600,38400,9600 - "$TERM"
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
_FILES = {
    "etc/hostname": "debian\n",
    # The host's, which a guest cannot use.
    "etc/resolv.conf": "",
    "etc/acpi/events/power": "event=button/power\naction=/bin/systemctl poweroff\n",
    "etc/systemd/journald.conf.d/aiokvm.conf": "[Journal]\nStorage=volatile\n",
    "etc/systemd/system/serial-getty@.service": _GETTY,
    "usr/local/sbin/aiokvm-getty": _LOGIN,
    "etc/systemd/system/aiokvm-dhcp.service": _DHCP,
    "usr/local/sbin/aiokvm-dhcp": _DHCP_SCRIPT,
    # A prompt that is only what it says, for those who wait for it.
    "root/.inputrc": "set enable-bracketed-paste off\n",
}
# What waits for hardware that is not there, writes to the disk unasked, needs udev or D-Bus, or mounts what
# few need. Each costs a slow machine a tenth of a second or more.
_MASKED = (
    *("dpkg-db-backup.timer", "fstrim.timer", "systemd-tmpfiles-clean.timer"),
    *("getty-static.service", "getty@tty1.service", "systemd-logind.service"),
    *("modprobe@.service", "kmod-static-nodes.service", "systemd-journal-flush.service"),
    *("systemd-pstore.service", "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service"),
    *("dev-hugepages.mount", "dev-mqueue.mount", "proc-sys-fs-binfmt_misc.automount"),
    *("sys-fs-fuse-connections.mount", "sys-kernel-config.mount"),
    *("sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
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


def hooks(overlay: str, release: str) -> list[str]:
    """Return mmdebstrap's hooks: unpack the archive ``overlay`` over the root, and settle in."""
    return [
        f"tar-in {overlay} /",
        f'chroot "$1" depmod {release}',
        # Whose they are depends on who builds.
        'rm -rf "$1"/var/cache/apt/archives "$1"/var/lib/apt/lists',
        r'sed -i "s/^root:[^:]*:/root::/" "$1/etc/shadow"',
    ]


def write_overlay(kernel_tar: IO[bytes], overlay: IO[bytes]) -> str:
    """Write a kernel package's modules and our own files as an archive; return the kernel's release.

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
                _add(archive, name, text.encode())
            for name in _MASKED:
                _link(archive, f"etc/systemd/system/{name}", "/dev/null")
            _link(archive, "etc/systemd/system/default.target", "/lib/systemd/system/multi-user.target")
            wants = "etc/systemd/system/multi-user.target.wants"
            _link(archive, f"{wants}/aiokvm-dhcp.service", "../aiokvm-dhcp.service")
    except tarfile.TarError as error:
        raise ImageError(f"the kernel package's archive is damaged: {error}") from error
    if not release:
        raise ImageError("the kernel's package holds no modules")
    return release


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(data), EPOCH, 0o755 if data.startswith(b"#!") else 0o644
    archive.addfile(member, io.BytesIO(data))


def _link(archive: tarfile.TarFile, name: str, target: str) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mtime, member.mode = tarfile.SYMTYPE, target, EPOCH, 0o777
    archive.addfile(member)
