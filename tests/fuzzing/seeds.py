"""The sound cores that fuzzing starts from: the committed fixtures, and small ones of every target that the cache has."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import zstandard

from tests.fuzzing.structures import SoundCore, packed_core, sound_core

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures" / "cores"
CACHED = ("plain_small", "abort_double_free")
LARGEST_FILE_BYTES = 12 << 20


@dataclass(frozen=True, slots=True)
class Seed:
    """One sound core: its file, perhaps packed, and the files of its target if they are here."""

    name: str
    path: Path
    sysroot: Path | None


def cache_folder() -> Path:
    """Where scripts/make_cores puts cores, unless told otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "coreheap" / "cores"


def available() -> list[Seed]:
    """All seeds that are here, by name."""
    found = [Seed(f"fixture/{path.name.split('.')[0]}", path, None) for path in FIXTURES.glob("*.core.zst")]
    packed = FIXTURES / "abort_double_free.core.zst"
    found.append(Seed("packed/abort_double_free", packed, None))
    for case in CACHED:
        for path in cache_folder().glob(f"*-*/{case}.core"):
            sysroot = cache_folder() / "packages" / path.parent.name / "sysroot"
            if path.stat().st_size <= LARGEST_FILE_BYTES:
                found.append(Seed(f"{path.parent.name}/{case}", path, sysroot if sysroot.is_dir() else None))
    return sorted(found, key=lambda seed: seed.name)


def loaded(seed: Seed) -> SoundCore:
    """The core with its structures."""
    if seed.name.startswith("packed/"):
        return packed_core(seed.name, seed.path)
    if seed.path.suffix != ".zst":
        return sound_core(seed.name, seed.path, seed.sysroot)
    with tempfile.NamedTemporaryFile(suffix=".core") as file:
        file.write(unpacked(seed))
        file.flush()
        return sound_core(seed.name, Path(file.name), None)


def unpacked(seed: Seed) -> bytes:
    """The core's content."""
    content = seed.path.read_bytes()
    if seed.path.suffix != ".zst":
        return content
    return zstandard.ZstdDecompressor().decompressobj().decompress(content)
