"""A package archive on this machine stands behind these tests: apt itself runs, and no network is needed."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass
class Repository:
    """A directory of packages with an index; ``publish`` after every change."""

    root: Path
    index: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, version: str, files: Mapping[str, bytes], depends: str = "") -> Path:
        tree = self.root / "tree"
        for path, data in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(data)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: t <t@t>\n"
        control += f"Depends: {depends}\n" * bool(depends) + "Description: test\n"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(control)
        deb = self.root / f"{name}_{version}_amd64.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, deb], check=True, capture_output=True)
        shutil.rmtree(tree)
        digest = hashlib.sha256(deb.read_bytes()).hexdigest()
        self.index[f"{name}_{version}"] = (
            f"{control}Filename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {digest}\n"
        )
        return deb

    def add_kernel(
        self, version: str, content: bytes = b"kernel", modules: Mapping[str, bytes] | None = None
    ) -> Path:
        release = f"{version}-cloud-amd64"
        folder = f"lib/modules/{release}/kernel"
        files = {f"boot/vmlinuz-{release}": content, "boot/config": b"CONFIG=y"}
        files |= {
            f"{folder}/{name}": data
            for name, data in (modules or {"drivers/acpi/button.ko": b"button"}).items()
        }
        self.add("linux-image-cloud-amd64", version, {}, f"linux-image-{release} (= {version}), other")
        return self.add(f"linux-image-{release}", version, files)

    def add_source(self, name: str, version: str, files: Mapping[str, str]) -> Path:
        """Add the source package of a program: its upstream tarball, with everything in one folder."""
        tarball = self.root / f"{name}_{version}.orig.tar.xz"
        with tarfile.open(tarball, "w:xz") as archive:
            for path, text in files.items():
                member = tarfile.TarInfo(f"{name}-{version}/{path}")
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
        digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
        listed = f"{digest} {tarball.stat().st_size} {tarball.name}"
        md5 = f"{hashlib.md5(tarball.read_bytes()).hexdigest()} {tarball.stat().st_size} {tarball.name}"
        self.sources[f"{name}_{version}"] = (
            f"Package: {name}\nBinary: {name}\nVersion: {version}-1\nMaintainer: t <t@t>\nArchitecture: any\n"
            f"Format: 3.0 (quilt)\nDirectory: .\nFiles:\n {md5}\nChecksums-Sha256:\n {listed}\n"
        )
        return tarball

    def publish(self) -> None:
        (self.root / "Packages").write_text("\n".join(self.index.values()))
        (self.root / "Sources").write_text("\n".join(self.sources.values()))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """Give an archive with a kernel and busybox, and show apt and the cache only directories of ours."""
    if shutil.which("apt-get") is None:
        pytest.skip("this machine has no apt")
    repository = Repository(tmp_path / "archive")
    repository.root.mkdir()
    repository.add_kernel("6.1")
    repository.add("busybox-static", "1.35", {"bin/busybox": b"busybox"})
    repository.publish()
    sources, empty, config = tmp_path / "sources.list", tmp_path / "empty", tmp_path / "apt.conf"
    sources.write_text(f"deb [trusted=yes] copy:{repository.root} ./\n")
    empty.mkdir()
    config.write_text(f'Dir::Etc::sourcelist "{sources}";\nDir::Etc::sourceparts "{empty}";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    monkeypatch.setenv("AIOKVM_CACHE", str(tmp_path / "cache"))
    return repository
