"""Targets: what a program is built for and run on.

A target is this machine's own compiler and libc, or one Debian release of libc6 on one platform. The packages of such a
release are downloaded with a private apt configuration and unpacked beside each other in the cache; nothing is installed.
Knows apt, dpkg and where Debian puts things. Knows nothing of cases.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import lzma
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.needs import Missing

APT_TIMEOUT_SECONDS = 900
# Raised when packages are unpacked in another way.
UNPACKING = 5


class CannotMake(Missing):
    """A case cannot be made on this machine; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class Platform:
    """A Debian architecture, the compiler that builds for it, and the emulator it needs here."""

    debian: str
    machine: str
    triplet: str
    loader: str
    cc: str
    strip: str
    packages: tuple[str, ...]
    emulator: str | None = None
    emulator_packages: tuple[str, ...] = ()


AMD64 = Platform(
    debian="amd64",
    machine="x86_64",
    triplet="x86_64-linux-gnu",
    loader="ld-linux-x86-64.so.2",
    cc="x86_64-linux-gnu-gcc",
    strip="x86_64-linux-gnu-strip",
    packages=("gcc",),
)
I386 = Platform(
    debian="i386",
    machine="i386",
    triplet="i386-linux-gnu",
    loader="ld-linux.so.2",
    cc="i686-linux-gnu-gcc",
    strip="i686-linux-gnu-strip",
    packages=("gcc-i686-linux-gnu",),
)
ARM64 = Platform(
    debian="arm64",
    machine="aarch64",
    triplet="aarch64-linux-gnu",
    loader="ld-linux-aarch64.so.1",
    cc="aarch64-linux-gnu-gcc",
    strip="aarch64-linux-gnu-strip",
    packages=("gcc-aarch64-linux-gnu",),
    emulator="qemu-aarch64",
    emulator_packages=("qemu-user",),
)
PLATFORMS = (AMD64, I386, ARM64)


@dataclass(frozen=True, slots=True)
class Release:
    """A release of Debian and the suites that have its libc6, the first that answers counts.

    Suites move on: what is in experimental today is in unstable tomorrow.
    """

    name: str
    suites: tuple[str, ...]


# Oldest first: programs are built against the first one that can be had.
RELEASES = (
    Release("bullseye", ("bullseye",)),
    Release("bookworm", ("bookworm",)),
    Release("trixie", ("trixie",)),
    Release("forky", ("forky", "testing")),
    Release("experimental", ("experimental", "unstable")),
)


@dataclass(frozen=True, slots=True)
class Target:
    """A machine and libc to build and run for. Without `release` and `platform`: what `cc` links with on this machine."""

    name: str
    machine: str
    cc: str = "gcc"
    debian_packages: tuple[str, ...] = ("gcc", "libc6-dev")
    release: Release | None = None
    platform: Platform | None = None

    @property
    def is_emulated(self) -> bool:
        """Whether an emulator runs its programs, and writes their cores."""
        return self.platform is not None and self.platform.emulator is not None

    @property
    def is_32_bit(self) -> bool:
        """Whether its words have 4 bytes."""
        return self.platform is I386


NATIVE = Target(name="native", machine=platform.machine())
MUSL = Target(name="musl", machine=platform.machine(), cc="musl-gcc", debian_packages=("musl-tools",))


def _matrix_target(release: Release, where: Platform) -> Target:
    return Target(
        name=f"{release.name}-{where.debian}",
        machine=where.machine,
        cc=where.cc,
        debian_packages=where.packages,
        release=release,
        platform=where,
    )


MATRIX_TARGETS: Mapping[str, Target] = {
    target.name: target for target in (_matrix_target(release, where) for where in PLATFORMS for release in RELEASES)
}


# --------------------------------------------------------------------------------- what a target has


@dataclass(frozen=True, slots=True)
class TargetFiles:
    """The unpacked packages of one target.

    `libraries` is libc6 as packaged (stripped), `loader` its ld.so; both stand on a program's command line and so in the
    core. `sysroot` has the same files below their own absolute paths, as a sysroot must. `debug` is for
    `--debug-dir`. `build` has headers and static libraries.
    """

    version: str
    libraries: Path
    loader: Path
    sysroot: Path
    debug: Path
    build: Path

    def compiler_flags(self, where: Platform) -> tuple[str, ...]:
        """What makes a compiler of this machine use this libc alone."""
        include = _run([where.cc, "-print-file-name=include"]).strip()
        headers = (include, self.build / "usr/include" / where.triplet, self.build / "usr/include")
        return (
            f"--sysroot={self.build}",
            f"-B{self.build / 'usr/lib' / where.triplet}",
            "-nostdinc",
            *(f"-isystem{folder}" for folder in headers),
            "-static-libgcc",
        )

    @property
    def glibc(self) -> tuple[int, int]:
        """The upstream version."""
        # Debian's libc6 versions begin with glibc's.
        version = re.match(r"(\d+)\.(\d+)", self.version)
        assert version is not None, self.version
        return int(version[1]), int(version[2])


def files_of(target: Target, directory: Path) -> TargetFiles:
    """The files of a matrix target, downloaded and unpacked below `directory` if they are not there.

    Raises CannotMake when the registry does not have them.
    """
    assert target.release is not None
    assert target.platform is not None
    place = directory / "packages" / target.name
    done = place / "unpacked"
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / "packages.lock"):
        if not are_unpacked(target, directory):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            version = _download_and_unpack(target.release, target.platform, directory, place)
            done.write_text(f"{UNPACKING} {version}\n")
    return _files_in(place, target.platform, done.read_text().split()[1])


def build_files_of(target: Target, directory: Path) -> TargetFiles:
    """What dynamic programs for the target's platform are built against: the oldest release, at most its own."""
    # Only targets of the matrix get here, and they all have a platform.
    assert target.platform is not None
    for release in RELEASES:
        candidate = MATRIX_TARGETS[f"{release.name}-{target.platform.debian}"]
        if candidate.name == target.name:
            break
        try:
            return files_of(candidate, directory)
        except CannotMake:
            continue
    return files_of(target, directory)


def are_unpacked(target: Target, directory: Path) -> bool:
    """Whether the files of a matrix target are there, so that nothing would be downloaded."""
    done = directory / "packages" / target.name / "unpacked"
    return done.exists() and done.read_text().startswith(f"{UNPACKING} ")


def _files_in(place: Path, where: Platform, version: str) -> TargetFiles:
    libraries = next(
        folder
        for folder in (place / "root" / "lib" / where.triplet, place / "root" / "usr" / "lib" / where.triplet)
        if (folder / "libc.so.6").exists()
    )
    return TargetFiles(
        version=version,
        libraries=libraries,
        loader=place / "ld.so" / where.loader,
        sysroot=place / "sysroot",
        debug=place / "debug" / "usr" / "lib" / "debug",
        build=place / "build",
    )


def _download_and_unpack(release: Release, where: Platform, directory: Path, place: Path) -> str:
    registry = _registry(directory, where)
    suite, version = registry.find("libc6", release.suites)
    archives = place / "archives"
    archives.mkdir()
    wanted = dict.fromkeys(("libc6", "libc6-dbg", "libc6-dev"), version)
    # The kernel's headers hardly matter; old ones are small, and every compiler reads them.
    headers = registry.versions("linux-libc-dev")
    for headers_suite in (*RELEASES[0].suites, *RELEASES[1].suites, suite):
        if headers_suite in headers:
            wanted["linux-libc-dev"] = headers[headers_suite]
            break
    registry.download(wanted, archives)
    for name, roots in (
        ("libc6_", ("root", "build")),
        ("libc6-dbg_", ("debug",)),
        ("libc6-dev_", ("build",)),
        ("linux-libc-dev_", ("build",)),
    ):
        for root in roots:
            _unpack(archives, name, place / root)
    shutil.rmtree(archives)
    files = _files_in(place, where, version)
    if where is I386:
        _spare_pushes(files.build / "usr/lib" / where.triplet / "libc.a")
    _drop_debug_files_of_others(files)
    _link_loader(place / "root", files)
    _make_sysroot(files)
    return version


def _unpack(archives: Path, name: str, root: Path) -> None:
    (archive,) = archives.glob(f"{name}*.deb")
    _run(["dpkg", "-x", str(archive), str(root)])
    for path in root.rglob("*"):
        # Links from the root directory must not lead out of here.
        if path.is_symlink() and os.readlink(path).startswith("/"):
            inside = root / os.readlink(path).lstrip("/")
            path.unlink()
            path.symlink_to(os.path.relpath(inside, path.parent))


def _drop_debug_files_of_others(files: TargetFiles) -> None:
    """libc6-dbg is large, and most of it is for character sets."""
    notes = _run(["readelf", "-n", *(str(file) for file in files.libraries.glob("*.so*") if file.is_file())])
    digits = set(re.findall(r"Build ID: ([0-9a-f]+)", notes))
    for file in (files.debug / ".build-id").rglob("*.debug"):
        if file.parent.name + file.stem not in digits:
            file.unlink()


def _spare_pushes(library: Path) -> None:
    """Keep `push symbol@GOT(%reg)` out of the linker's hands, in a static library for i386.

    The linker of binutils 2.40 takes the instruction's first byte (ff) for that of an indirect jump and makes a jump of
    it, so that static programs crash (seen in pthread_create of glibc 2.43). R_386_GOT32X allows such a change,
    R_386_GOT32 does not and means the same otherwise.
    """
    got32, got32x, push, members = 3, 43, 0xFF, b"!<arch>\n"
    data = bytearray(library.read_bytes())
    place = len(members)
    while place + 60 <= len(data):
        size = int(data[place + 48 : place + 58])
        start = place + 60
        place = start + size + size % 2
        if data[start : start + 5] != b"\x7fELF\x01":
            continue
        (table,) = struct.unpack_from("<I", data, start + 0x20)
        entry_bytes, count = struct.unpack_from("<HH", data, start + 0x2E)
        sections = [struct.unpack_from("<10I", data, start + table + entry_bytes * i) for i in range(count)]
        for _, kind, _, _, offset, length, _, target, _, _ in sections:
            if kind != 9 or sections[target][1] != 1:  # SHT_REL of SHT_PROGBITS
                continue
            for entry in range(start + offset, start + offset + length, 8):
                where, info = struct.unpack_from("<II", data, entry)
                opcode = start + sections[target][4] + where - 2
                if info & 0xFF == got32x and data[opcode] == push and data[opcode + 1] >> 3 & 7 == 6:
                    struct.pack_into("<I", data, entry + 4, info & ~0xFF | got32)
    library.write_bytes(data)


def _link_loader(root: Path, files: TargetFiles) -> None:
    """ld.so by one name: releases keep it in different places, with links to absolute paths."""
    inside = [path for path in root.rglob("ld-[0-9l]*.so*") if path.is_file() and not path.is_symlink()]
    (loader,) = inside
    files.loader.parent.mkdir()
    files.loader.symlink_to(os.path.relpath(loader, files.loader.parent))


def _make_sysroot(files: TargetFiles) -> None:
    """The libraries again, below the path that is in the cores."""
    inside = files.sysroot / files.libraries.relative_to("/")
    inside.mkdir(parents=True)
    for file in files.libraries.iterdir():
        if file.is_symlink():
            (inside / file.name).symlink_to(os.readlink(file))
        elif file.is_file():
            os.link(file, inside / file.name)
    loader = files.loader.resolve()
    if loader.parent != files.libraries:
        other = files.sysroot / loader.relative_to("/")
        other.parent.mkdir(parents=True, exist_ok=True)
        os.link(loader, other)


# -------------------------------------------------------------------------------------- the registry


class _Registry:
    """Debian's packages for one platform by a private apt: its own lists, no installed packages, the machine's own mirror.

    A mirror that is just being brought up to date has lists that do not fit its release file: apt then refuses all of a suite. Such
    suites are read from the mirror's lists as they are, and only the packages' sums are checked.
    """

    def __init__(self, place: Path, where: Platform) -> None:
        self._place = place
        self._where = where
        self._options = (
            f"-oDir::Etc::SourceList={place / 'sources.list'}",
            "-oDir::Etc::SourceParts=/dev/null",
            f"-oDir::State::Lists={place / 'lists'}",
            f"-oDir::Cache={place / 'cache'}",
            f"-oDir::State::status={place / 'status'}",
            # Images of containers turn these caches off, and every question then takes ten seconds.
            "-oDir::Cache::pkgcache=pkgcache.bin",
            "-oDir::Cache::srcpkgcache=srcpkgcache.bin",
            f"-oAPT::Architecture={where.debian}",
            f"-oAPT::Architectures={where.debian}",
            "-oAPT::Sandbox::User=root",
            "-oAcquire::Languages=none",
            "-oAcquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
        )
        self._lists: dict[str, dict[str, _Listed]] = {}
        """By suite and package what the mirror's own lists have, of suites that apt refuses."""

    def update(self) -> None:
        """Fetch the lists of all suites; one that is not there is nothing to stop for."""
        for folder in ("lists", "cache"):
            (self._place / folder).mkdir(parents=True, exist_ok=True)
        (self._place / "status").touch()
        self._fetch([release.suites[0] for release in RELEASES])
        missing = [
            suite
            for release in RELEASES
            for suite in release.suites[1:]
            if release.suites[0] not in self._of_apt("libc6")
        ]
        if missing:
            self._fetch([*(release.suites[0] for release in RELEASES), *missing])
        known = self._of_apt("libc6")
        for release in RELEASES:
            if not known.keys() & set(release.suites):
                self._lists |= {suite: _listed_by_mirror(suite, self._where) for suite in release.suites}

    def _fetch(self, suites: Sequence[str]) -> None:
        lines = [f"deb {options}{uri} {suite} main\n" for uri, options in _mirrors() for suite in suites]
        (self._place / "sources.list").write_text("".join(lines))
        subprocess.run(
            ["apt-get", *self._options, "-qq", "update"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=APT_TIMEOUT_SECONDS,
        )

    def _of_apt(self, package: str) -> dict[str, str]:
        answer = _run(["apt-cache", *self._options, "madison", package])
        found: dict[str, str] = {}
        for line in answer.splitlines():
            # " libc6 | 2.31-13 | http://HOST/debian bullseye/main i386 Packages", newest first
            _, version, source = (field.strip() for field in line.split("|"))
            _, suite, architecture, *_ = source.split()
            if architecture == self._where.debian:
                found.setdefault(suite.split("/")[0], version)
        return found

    def versions(self, package: str) -> dict[str, str]:
        """The newest version of a package in each suite that has it."""
        found = self._of_apt(package)
        return found | {suite: listed[package].version for suite, listed in self._lists.items() if package in listed}

    def find(self, package: str, suites: Sequence[str]) -> tuple[str, str]:
        """The first suite that has the package, and its version there."""
        versions = self.versions(package)
        for suite in suites:
            if suite in versions:
                return suite, versions[suite]
        raise CannotMake(
            f"the package mirror of this machine has no {package}:{self._where.debian} in {' or '.join(suites)};"
            f" it has {versions or 'no Debian suite'}"
        )

    def download(self, wanted: Mapping[str, str], into: Path) -> None:
        """Put the archives of packages, by name and exact version, into a directory."""
        by_apt = []
        for package, version in wanted.items():
            listed = [packages.get(package) for packages in self._lists.values()]
            found = next((one for one in listed if one is not None and one.version == version), None)
            if found is None:
                by_apt.append(f"{package}={version}")
            else:
                _download_listed(found, into / f"{package}_{self._where.debian}.deb")
        if by_apt:
            _run(["apt-get", *self._options, "-qq", "download", *by_apt], into)


@dataclass(frozen=True, slots=True)
class _Listed:
    """A package in a mirror's list."""

    version: str
    url: str
    sha256: str


def _listed_by_mirror(suite: str, where: Platform) -> dict[str, _Listed]:
    """What a mirror lists of the packages of libc; nothing where it has no such list."""
    found: dict[str, _Listed] = {}
    for address, _ in _mirrors():
        try:
            text = lzma.decompress(_fetched(f"{address}dists/{suite}/main/binary-{where.debian}/Packages.xz")).decode()
        except (OSError, lzma.LZMAError):
            continue
        for package in ("libc6", "libc6-dbg", "libc6-dev", "linux-libc-dev"):
            for entry in re.findall(rf"^Package: {re.escape(package)}\n(?:.+\n)*", text, re.MULTILINE):
                fields = dict(
                    line.split(": ", 1) for line in entry.splitlines() if not line.startswith(" ") and ": " in line
                )
                found.setdefault(
                    package, _Listed(fields["Version"], f"{address}{fields['Filename']}", fields["SHA256"])
                )
    return found


def _download_listed(package: _Listed, into: Path) -> None:
    content = _fetched(package.url)
    if hashlib.sha256(content).hexdigest() != package.sha256:
        raise CannotMake(f"{package.url} is not what the mirror lists: its sum differs")
    into.write_bytes(content)


def _fetched(url: str) -> bytes:
    if not url.startswith(("http://", "https://")):
        raise CannotMake(f"{url} is no address that a list can be fetched from")
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read(1 << 28))


@cache
def _registry(directory: Path, where: Platform) -> _Registry:
    for tool in ("apt-get", "apt-cache", "dpkg", "readelf"):
        if shutil.which(tool) is None:
            raise CannotMake(f"no {tool}: the matrix is made of Debian's packages, so make it on Debian")
    # Half a gigabyte that is of no use tomorrow.
    place = tempfile.mkdtemp(prefix="apt-", dir=directory / "packages")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    registry = _Registry(Path(place), where)
    registry.update()
    return registry


def _mirrors() -> list[tuple[str, str]]:
    """Address and options of each Debian mirror in this machine's own apt configuration."""
    suites = {suite for release in RELEASES for suite in release.suites}
    suites |= {"sid", "stable", "oldstable", "oldoldstable"}
    answer = _run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"])
    entries = [line.split() for line in answer.splitlines()]
    addresses = dict.fromkeys(
        entry[0] for entry in entries if len(entry) == 3 and entry[1] in suites and entry[2] == "main"
    )
    if not addresses:
        raise CannotMake("apt on this machine knows no Debian mirror (/etc/apt/sources.list.d/debian.sources)")
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    options = f"[signed-by={keyring}] " if keyring.exists() else ""
    return [(address, options) for address in addresses]


def _run(command: Sequence[str], directory: Path | None = None) -> str:
    result = subprocess.run(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=APT_TIMEOUT_SECONDS,
    )
    if result.returncode != 0:
        raise CannotMake(f"{' '.join(command)} failed: {result.stderr[-1000:]}")
    return result.stdout


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file: processes and threads that make the same thing wait for each other."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
