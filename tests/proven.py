"""The page docs/proven.md: what is proven on which release and machine, read off the lists that the tests run by.

``scripts/verify_layouts --table`` prints it; tests/unit/allocators/test_layouts.py compares it with the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType

from coreheap.allocators.glibc.layouts import GENERATIONS
from tests import glibc_facts, proven_campaign
from tests.real_cores import targets
from tests.real_cores.cases import CASES, EXCLUSIONS, MATRIX
from tests.unit.allocators import test_built_heaps
from tests.unit.allocators.built_process import releases

MACHINES = {"x86_64": ("x86-64", "amd64"), "i386": ("i386", "i386"), "aarch64": ("aarch64", "arm64")}
"""Of cores, to what the page and what Debian call them."""

PAGE = """\
# What is proven on what

Written by `scripts/verify_layouts --table` from the lists that the tests run by, and compared with them by a test. Nothing here
is a promise that no test holds.

| word | what was done |
|---|---|
| built | A core of a whole process, its heap written chunk by chunk in the exact layout that `fixtures/facts` has for the release and machine, by builders that share no constant with coreheap (`tests/heap_builder.py`, `tests/unit/allocators/built_process.py`). With the core alone coreheap must name the group of releases, find the sets of blocks in use and of every other state, every list, arena, sub-heap and mmapped chunk, to the byte, with confidence certain and no anomaly or gap. Each twice: one thread and the main arena; three threads, a chain of sub-heaps, aligned mmapped chunks |
| real | Our programs (`fixtures/programs`) ran on that Debian package and died; what the process had recorded outside of its dumped memory must come out, by equality of sets, three times: with libc's file and symbols, with the stripped file, with the core alone. arm64 ran under qemu-user |
| DWARF | Sizes and field offsets of all structures equal that package's libc6-dbg, and malloc's globals and thread-local variables are where it says (`scripts/verify_layouts`) |
| 8, 16 | MALLOC_ALIGNMENT on i386 |

Every row of `layouts.py` is also held against all {entries} entries of the facts, x32 and 32-bit ports with 8-byte
alignment among them; coreheap does not open cores of these two.

## Releases

A group is a set of releases whose heaps look alike in a core. Release branches are named where they differ from their tag;
*stock* is 2.12-2.14 without PER_THREAD, *no-tunables* a build with `--disable-tunables`.

{releases}

{alike} differ in one field of sub-heap headers: in a core without sub-heaps, and on i386, both are named.

## Less usual built heaps

{unusual}

## Real cores

{real}

The packages are those that Debian's mirrors had when the facts were measured; a newer one of the same release is used as it
comes, and `scripts/verify_layouts` prints which.

## Not made, and why

{exclusions}

{campaign}
## What nothing here proves

Releases without *real* in their row rest on built heaps and the facts: no package of them can be had any more. Not proven
at all: aarch64 on its own hardware (its cores come from qemu-user, whose notes differ from a kernel's), and libcs that a
distribution patched in malloc's structures.
"""


def page() -> str:
    """The whole page."""
    return PAGE.format(
        entries=sum(1 for _ in glibc_facts.entries()),
        releases="\n".join(_release_rows()),
        alike=" and ".join(sorted(test_built_heaps.ALIKE)),
        unusual="\n".join(_unusual_rows()),
        real="\n".join(_real_rows()),
        exclusions="\n".join(_exclusion_rows()),
        campaign=proven_campaign.sections(),
    )


def _packages() -> dict[str, str]:
    """Package version of each target of the matrix, as the facts were measured on it."""
    return {
        name: row["package"].removeprefix("libc6_").rsplit("_", 1)[0]
        for name, row in glibc_facts.document()["debian_libc"].items()
    }


def _built() -> set[tuple[str, str]]:
    """(release, machine) of every whole built heap."""
    return {(param.values[0], param.values[1]) for param in test_built_heaps.every_release()}


def _release_rows() -> Iterator[str]:
    yield "| release | group | x86-64 | i386 | aarch64 |"
    yield "|---|---|---|---|---|"
    built, packages = _built(), _packages()
    by_machine = {machine: {item.name: item for item in releases(machine)} for machine in MACHINES}
    names = [entry.release for entry in glibc_facts.entries() if entry.machine == "amd64"]
    # In the order of the releases, a tag before its branch and its other builds.
    for name in sorted(names, key=lambda name: int(name.removeprefix("2.").partition("-")[0])):
        (group,) = [generation.name for generation in GENERATIONS if name in generation.releases]
        cells = []
        for machine, (_, debian) in MACHINES.items():
            item = by_machine[machine].get(name)
            words = []
            if (name, machine) in built and item is not None:
                words.append(f"built, {item.machine.alignment}" if machine == "i386" else "built")
            words += [
                f"real and DWARF: {target.partition('-')[0]} {version}"
                for target, version in packages.items()
                if target.endswith(f"-{debian}") and target in targets.MATRIX_TARGETS and _upstream(version) == name
            ]
            cells.append("; ".join(words) or "-")
        yield f"| {name} | {group.removeprefix('glibc ')} | {' | '.join(cells)} |"


def _upstream(version: str) -> str:
    return version.partition("-")[0]


def _unusual_rows() -> Iterator[str]:
    yield "| what | x86-64 | i386 | aarch64 |"
    yield "|---|---|---|---|"
    for name, function in vars(test_built_heaps).items():
        if not name.startswith("test_") or not isinstance(function, FunctionType):
            continue
        if function is test_built_heaps.test_heap_of_every_release_is_read_in_full:
            continue
        held: dict[str, list[str]] = {machine: [] for machine in MACHINES}
        for release, machine in _releases_of(function):
            if release not in held[machine]:
                held[machine].append(release)
        if any(held.values()):
            cells = (", ".join(names) or "-" for names in held.values())
            yield f"| {name.removeprefix('test_').replace('_', ' ')} | {' | '.join(cells)} |"


def _releases_of(function: FunctionType) -> Iterator[tuple[str, str]]:
    """(release, machine) of every run of a test that is parametrized by them."""
    for mark in getattr(function, "pytestmark", ()):
        if mark.name == "parametrize" and tuple(mark.args[0])[:2] == ("name", "machine_name"):
            for param in mark.args[1]:
                yield param.values[0], param.values[1]


def _real_rows() -> Iterator[str]:
    yield "| Debian | glibc | cores on amd64 | on i386 | on arm64 |"
    yield "|---|---|---|---|---|"
    packages = _packages()
    for release in targets.RELEASES:
        cells = []
        for where in targets.PLATFORMS:
            target = f"{release.name}-{where.debian}"
            count = sum(case.target.name == target for case in MATRIX.values())
            cells.append(str(count))
        version = packages[f"{release.name}-{targets.PLATFORMS[0].debian}"]
        yield f"| {release.name} | {version} | {' | '.join(cells)} |"
    native = sum(1 for case in CASES.values() if not case.slow)
    yield ""
    yield f"The {len(CASES)} cases are in `fixtures/README.md`; {native} are also made by the libc of the machine that runs the tests."


def _exclusion_rows() -> Iterator[str]:
    yield "| case | target | reason |"
    yield "|---|---|---|"
    for exclusion in EXCLUSIONS:
        yield f"| `{exclusion.case}` | `{exclusion.target}` | {exclusion.reason} |"
