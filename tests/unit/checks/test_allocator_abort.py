"""ALLOCATOR-ABORT finds glibc's own last words, by symbol or by their shape, and nothing that only resembles them."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import pytest

from coreheap.checks.allocator_abort import findings
from coreheap.evidence import Confidence
from coreheap.report import Severity
from tests.core_builder import elf_image
from tests.heap_builder import PAGE
from tests.unit.allocators.built_process import BuiltProcess, build_process, release
from tests.unit.checks.conftest import CaseOf

MESSAGE = 0x7FFF_F7E0_0000
LIBC_PATH = "opt/built/lib/libc.so.6"
ABORT_MSG_OFFSET = 0x2000 + 0x1F00
"""Of the pointer in libc's file; in the process the data segment follows the text as in the file."""


def aborted(text: bytes, *, signal: int = 6, length: int = PAGE, lead: int = 0) -> BuiltProcess:
    """A process whose __abort_msg points to a mapping with a message, made of the mapping's length and the text."""
    process = build_process(release("2.36"))
    process.signal = signal
    process.builder.memory.add(MESSAGE, PAGE)[: 4 + len(text)] = struct.pack("<I", length) + text
    libc = next(start for start, _, offset, path in process.files if path.endswith("libc.so.6") and offset == 0)
    process.put(libc + ABORT_MSG_OFFSET, MESSAGE + lead)
    return process


@pytest.mark.parametrize(
    "text",
    [
        b"malloc(): corrupted top size\n",
        b"free(): invalid pointer\n",
        b"double free or corruption (!prev)\n",
        b"corrupted size vs. prev_size\n",
        b"*** Error in `./program': free(): invalid next size (fast): 0x0804b008 ***\n",
        b"malloc_consolidate(): unaligned fastbin chunk detected\n",
        b"program: malloc.c:2394: sysmalloc: Assertion `(old_top == initial_top (av))' failed.\n",
    ],
)
def test_message_of_malloc_is_found_by_its_shape(case_of: CaseOf, text: bytes) -> None:
    (finding,) = findings(case_of(aborted(text)))
    assert finding.code == "ALLOCATOR-ABORT"
    assert finding.severity is Severity.ERROR
    assert finding.confidence is Confidence.STRONG
    assert finding.subject == "malloc"
    assert finding.quantity("message") == text.decode().strip()
    assert finding.quantity("message_address") == MESSAGE
    assert finding.quantity("locked_arenas") == 0


def test_locked_arenas_are_counted(case_of: CaseOf) -> None:
    process = aborted(b"malloc(): corrupted top size\n")
    process.put(process.main_arena, 1, 4)
    (finding,) = findings(case_of(process))
    assert finding.quantity("locked_arenas") == 1


def libc_file(folder: Path) -> Path:
    """A sysroot with the file of the built libc, whose symbol table tells where __abort_msg is."""
    path = folder / "sysroot" / LIBC_PATH
    path.parent.mkdir(parents=True)
    path.write_bytes(
        elf_image(
            build_id=b"\x22" * 20, total_bytes=0x4000, data_bytes=0x2000, symbols={"__abort_msg": ABORT_MSG_OFFSET}
        )
    )
    return folder / "sysroot"


@pytest.mark.parametrize(
    ("text", "severity", "subject"),
    [
        (b"malloc(): corrupted top size\n", Severity.ERROR, "malloc"),
        (b"*** stack smashing detected ***: terminated\n", Severity.WARNING, "glibc"),
    ],
)
def test_message_at_the_symbol_is_certain(
    case_of: CaseOf, tmp_path: Path, text: bytes, severity: Severity, subject: str
) -> None:
    (finding,) = findings(case_of(aborted(text), sysroot=libc_file(tmp_path)))
    assert finding.confidence is Confidence.CERTAIN
    assert (finding.severity, finding.subject) == (severity, subject)


def test_nothing_that_only_resembles_a_message_is_one(case_of: CaseOf) -> None:
    sound = b"malloc(): corrupted top size\n"
    assert len(findings(case_of(aborted(sound)))) == 1
    assert findings(case_of(aborted(sound, signal=11))) == ()
    assert findings(case_of(aborted(sound, length=PAGE + 4))) == ()
    assert findings(case_of(aborted(sound, length=0))) == ()
    assert findings(case_of(aborted(sound, length=1 << 30))) == ()
    assert findings(case_of(aborted(sound, lead=16))) == ()
    # By shape alone only malloc's own words count.
    assert findings(case_of(aborted(b"*** stack smashing detected ***: terminated\n"))) == ()
    assert findings(case_of(aborted(b"nothing that anybody knows\n"))) == ()
    assert findings(case_of(build_process(release("2.36")))) == ()


def test_unprintable_text_is_not_shown(case_of: CaseOf) -> None:
    assert findings(case_of(aborted(b"free(): \x1b[31minvalid pointer\n"))) == ()


def test_message_that_was_not_saved_says_nothing(case_of: CaseOf, tmp_path: Path) -> None:
    process = aborted(b"malloc(): corrupted top size\n")
    assert findings(case_of(process, (MESSAGE,))) == ()
    assert findings(case_of(process, (MESSAGE,), sysroot=libc_file(tmp_path))) == ()


def test_without_a_heap_the_message_stays(case_of: CaseOf) -> None:
    case = case_of(aborted(b"malloc(): corrupted top size\n"))
    (finding,) = findings(dataclasses.replace(case, heap=None))
    assert finding.quantity("locked_arenas") == 0
