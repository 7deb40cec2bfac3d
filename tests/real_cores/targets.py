"""Targets: what a program is built for and run on.

A target is this machine's own compiler and libc, or one Debian release of libc6 on one platform. The packages of such a
release are downloaded with a private apt configuration and unpacked beside each other in the cache; nothing is installed.
Knows apt, dpkg and where Debian puts things. Knows nothing of cases.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

APT_TIMEOUT_SECONDS = 900
# Raised when packages are unpacked in another way.
UNPACKING = 5


class CannotMake(Exception):
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
    registry = _registry(directory)
    suite, version = registry.find("libc6", where, release.suites)
    archives = place / "archives"
    archives.mkdir()
    wanted = [f"{name}:{where.debian}={version}" for name in ("libc6", "libc6-dbg", "libc6-dev")]
    # The kernel's headers hardly matter; old ones are small, and every compiler reads them.
    for headers_suite in (*RELEASES[0].suites, *RELEASES[1].suites, suite):
        found = registry.versions("linux-libc-dev", where).get(headers_suite)
        if found is not None:
            wanted.append(f"linux-libc-dev:{where.debian}={found}")
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
    """Debian's packages by a private apt: its own lists, no installed packages, the machine's own mirror."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._options: tuple[str, ...] = (
            f"-oDir::Etc::SourceList={place / 'sources.list'}",
            "-oDir::Etc::SourceParts=/dev/null",
            f"-oDir::State::Lists={place / 'lists'}",
            f"-oDir::Cache={place / 'cache'}",
            f"-oDir::State::status={place / 'status'}",
            # Images of containers turn these caches off, and every question then takes ten seconds.
            "-oDir::Cache::pkgcache=pkgcache.bin",
            "-oDir::Cache::srcpkgcache=srcpkgcache.bin",
            "-oAPT::Architecture=amd64",
            f"-oAPT::Architectures={','.join(where.debian for where in PLATFORMS)}",
            "-oAPT::Sandbox::User=root",
            "-oAcquire::Languages=none",
            "-oAcquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
        )

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
            if release.suites[0] not in self.versions("libc6", AMD64)
        ]
        if missing:
            self._fetch([*(release.suites[0] for release in RELEASES), *missing])

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

    def versions(self, package: str, where: Platform) -> dict[str, str]:
        """The newest version of a package in each suite that has it."""
        answer = _run(["apt-cache", *self._options, "madison", f"{package}:{where.debian}"])
        found: dict[str, str] = {}
        for line in answer.splitlines():
            # " libc6:i386 | 2.31-13 | http://HOST/debian bullseye/main i386 Packages", newest first
            _, version, source = (field.strip() for field in line.split("|"))
            _, suite, architecture, *_ = source.split()
            if architecture == where.debian:
                found.setdefault(suite.split("/")[0], version)
        return found

    def find(self, package: str, where: Platform, suites: Sequence[str]) -> tuple[str, str]:
        """The first suite that has the package, and its version there."""
        versions = self.versions(package, where)
        for suite in suites:
            if suite in versions:
                return suite, versions[suite]
        raise CannotMake(
            f"the package mirror of this machine has no {package}:{where.debian} in {' or '.join(suites)};"
            f" it has {versions or 'no Debian suite'}"
        )

    def download(self, wanted: Sequence[str], into: Path) -> None:
        """Put the archives of exact package versions into a directory."""
        _run(["apt-get", *self._options, "-qq", "download", *wanted], into)


@cache
def _registry(directory: Path) -> _Registry:
    for tool in ("apt-get", "apt-cache", "dpkg", "readelf"):
        if shutil.which(tool) is None:
            raise CannotMake(f"no {tool}: the matrix is made of Debian's packages, so make it on Debian")
    # Half a gigabyte that is of no use tomorrow.
    place = tempfile.mkdtemp(prefix="apt-", dir=directory / "packages")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    registry = _Registry(Path(place))
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
