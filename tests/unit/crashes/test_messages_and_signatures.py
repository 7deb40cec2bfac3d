"""Kinds of abort messages, the pointers that old releases name in them, and what signatures are made of."""

from __future__ import annotations

import pytest

from coreheap.crash import AbortKind, AbortMessage, FaultKind, Frame, FrameSource, PlaceNote
from coreheap.crashes.abort_message import kind_of, plain_message, pointer_in
from coreheap.crashes.backtrace import is_malloc_function
from coreheap.crashes.signals import code_name, signal_name
from coreheap.crashes.signature import signature_of, signature_parts, telling_frames
from coreheap.evidence import Confidence

MESSAGES = [
    ("free(): invalid pointer", AbortKind.MALLOC, None, "free(): invalid pointer"),
    (
        "*** glibc detected *** ./a.out: double free or corruption (!prev): 0x0000000001c0f010 ***",
        AbortKind.MALLOC,
        0x1C0F010,
        "double free or corruption (!prev)",
    ),
    (
        "*** Error in `/opt/my: program': free(): invalid next size (fast): 0x0804b008 ***",
        AbortKind.MALLOC,
        0x804B008,
        "free(): invalid next size (fast)",
    ),
    (
        "*** stack smashing detected ***: terminated",
        AbortKind.STACK_SMASHING,
        None,
        "*** stack smashing detected ***: terminated",
    ),
    (
        "*** buffer overflow detected ***: ./a.out terminated",
        AbortKind.FORTIFY,
        None,
        "*** buffer overflow detected ***: ./a.out terminated",
    ),
    (
        "a.out: malloc.c:2394: sysmalloc: Assertion `(old_top == initial_top (av))' failed.",
        AbortKind.MALLOC,
        None,
        "malloc.c:2394: sysmalloc: Assertion `(old_top == initial_top (av))' failed.",
    ),
    (
        "a.out: main.c:12: main: Assertion `left == right' failed.",
        AbortKind.ASSERTION,
        None,
        "main.c:12: main: Assertion `left == right' failed.",
    ),
    ("Fatal glibc error: malloc assertion failure in sysmalloc: (old_size == 0)", AbortKind.MALLOC, None, None),
    ("Fatal glibc error: malloc.c:2599 (sysmalloc): assertion failed: (old_size == 0)", AbortKind.MALLOC, None, None),
    (
        "Fatal glibc error: tpp.c:83 (__pthread_tpp_change_priority): assertion failed: x",
        AbortKind.ASSERTION,
        None,
        None,
    ),
    ("The futex facility returned an unexpected error code.", AbortKind.OTHER, None, None),
    ("something at 0x1234", AbortKind.OTHER, None, None),
]


@pytest.mark.parametrize(("text", "kind", "pointer", "plain"), MESSAGES)
def test_messages_of_all_releases(text: str, kind: AbortKind, pointer: int | None, plain: str | None) -> None:
    assert kind_of(text) is kind
    assert pointer_in(text) == pointer
    assert plain_message(text) == (text if plain is None else plain)


def frame(
    number: int, module: str, symbol: str | None, source: FrameSource = FrameSource.CALL_FRAME_INFORMATION
) -> Frame:
    base = 0x7F00_0000_0000 + number * 0x10_0000
    certain = source is FrameSource.CALL_FRAME_INFORMATION
    return Frame(number, base + 0x1234, module, 0x1234, symbol, 4 if symbol else None, source, certain)


def message(text: str) -> AbortMessage:
    return AbortMessage(text, kind_of(text), 0x7000, "symbol", Confidence.CERTAIN, pointer_in(text))


ABORT = [("libc.so.6", None), ("libc.so.6", "raise"), ("libc.so.6", "abort"), ("libc.so.6", None)]


@pytest.mark.parametrize(
    ("stack", "kept"),
    [
        ([*ABORT, ("libc.so.6", None), ("libc.so.6", "free"), ("app", "f"), ("app", "g")], ["free", "f", "g"]),
        ([*ABORT, ("app", "f")], [None, "f"]),
        ([("[vdso]", "__kernel_vsyscall"), *ABORT[:3], ("app", "f")], ["abort", "f"]),
        # A static program: all in one module.
        (
            [
                ("app", "raise"),
                ("app", "abort"),
                ("app", "malloc_printerr"),
                ("app", "_int_free"),
                ("app", "__libc_free"),
                ("app", "f"),
            ],
            ["__libc_free", "f"],
        ),
        # libc, but nothing of abort or malloc: where it crashed matters.
        ([("libc.so.6", "memcpy"), ("app", "f")], ["memcpy", "f"]),
        ([("libc.so.6", None), ("libc.so.6", "printf"), ("app", "f")], [None, "printf", "f"]),
        ([("app", name) for name in "abcdefgh"], list("abcde")),
    ],
)
def test_frames_that_tell(stack: list[tuple[str, str | None]], kept: list[str | None]) -> None:
    frames = [frame(number, *row) for number, row in enumerate(stack)]
    assert [one.symbol for one in telling_frames(frames)] == kept


CXX = [("libstdc++.so.6.0.30", None), ("libstdc++.so.6.0.30", "_ZSt9terminatev")]
THROWN = [*ABORT[:3], *CXX, ("libstdc++.so.6.0.30", "__cxa_throw")]


@pytest.mark.parametrize(
    ("stack", "kept"),
    [
        ([*THROWN, ("app", "f"), ("app", "g")], ["__cxa_throw", "f", "g"]),
        ([*THROWN, ("libstdc++.so.6.0.30", None), ("app", "f")], [None, "f"]),
        ([*ABORT[:3], *CXX, ("app", "f")], ["_ZSt9terminatev", "f"]),
        # Through libgcc, as for a destructor that throws.
        ([*THROWN[:4], ("libgcc_s.so.1", None), *THROWN[5:], ("app", "f")], ["__cxa_throw", "f"]),
        # The program's own handler, which is the same for all.
        ([*ABORT[:3], ("app", "handler"), *THROWN[3:], ("app", "f")], ["__cxa_throw", "f"]),
        # A static program.
        (
            [
                ("app", "raise"),
                ("app", "abort"),
                ("app", "_ZN9__gnu_cxx27__verbose_terminate_handlerEv.cold"),
                ("app", "_ZN10__cxxabiv111__terminateEPFvvE"),
                ("app", "_ZSt9terminatev"),
                ("app", "__cxa_throw"),
                ("app", "_ZSt20__throw_out_of_rangePKc"),
                ("app", "f"),
            ],
            ["_ZSt20__throw_out_of_rangePKc", "f"],
        ),
        # No abort: the library crashed with what it was given.
        ([("libc.so.6", "memcpy"), ("libstdc++.so.6.0.30", "_ZNSs6assignEPKc"), ("app", "f")], None),
    ],
)
def test_an_exception_that_nobody_caught_is_known_by_who_threw(
    stack: list[tuple[str, str | None]], kept: list[str | None] | None
) -> None:
    frames = [frame(number, *row) for number, row in enumerate(stack)]
    wanted = [name for _, name in stack] if kept is None else kept
    assert [one.symbol for one in telling_frames(frames)] == wanted


def overflow(*names: str) -> tuple[str, ...]:
    frames = [frame(number, "app", name) for number, name in enumerate(names)]
    place = PlaceNote(0x7FFC_0000_0000, FaultKind.STACK_GUARD, "below the stack")
    return signature_parts("SIGSEGV", place, None, (), frames, {})


def test_a_recursion_is_known_by_its_functions_in_whatever_order() -> None:
    ring = ["expression", "term", "atom"]
    kinds = {
        overflow(*top, *ring[first:], *(ring * 40)) for first in range(3) for top in ((), ("memset",), ("malloc",))
    }
    assert kinds == {
        ("signal SIGSEGV", "fault stack_guard", "frame app atom", "frame app expression", "frame app term")
    }


def test_an_overflow_without_recursion_is_known_by_its_frames() -> None:
    assert overflow("fill", "walk", "walk", "main")[2:] == (
        "frame app fill",
        "frame app walk",
        "frame app walk",
        "frame app main",
    )


def test_where_no_frame_names_a_module_the_program_does() -> None:
    nowhere = Frame(0, 0, None, None, None, None, FrameSource.REGISTERS, True)
    parts = {
        signature_parts("SIGSEGV", None, None, (), [nowhere], {}, program=name)[1:] for name in ("one", "other", "one")
    }
    assert parts == {("frame outside of modules", f"program {name}") for name in ("one", "other")}
    called = [nowhere, frame(1, "app", "f", FrameSource.RETURN_ADDRESS)]
    parts = {signature_parts("SIGSEGV", None, None, (), called, {}, program=name)[1:] for name in ("one", "other")}
    assert parts == {("frame outside of modules", "frame app f")}


def test_words_that_look_like_return_addresses_are_no_part_of_a_signature() -> None:
    frames = [frame(0, "app", "f"), frame(1, "app", "g", FrameSource.STACK_SCAN), frame(2, "app", "h")]
    assert [one.symbol for one in telling_frames(frames)] == ["f"]


def test_addresses_and_process_numbers_do_not_change_a_signature() -> None:
    texts = [
        "*** Error in `a': free(): invalid pointer: 0x0804b008 ***",
        "*** Error in `a': free(): invalid pointer: 0x09aab008 ***",
    ]
    parts = [signature_parts("SIGABRT", None, message(text), (), [frame(0, "app", "f")], {}) for text in texts]
    assert parts[0] == parts[1]
    texts = ["request 0x55aa00 of process 123456 failed", "request 0x7f of process 98765 failed"]
    parts = [signature_parts("SIGABRT", None, message(text), (), [], {}) for text in texts]
    assert parts[0] == parts[1]
    assert signature_of(parts[0]) == signature_of(parts[1])


def test_a_frame_without_a_function_is_known_by_its_build() -> None:
    frames = [frame(0, "app", None)]
    one = signature_parts("SIGSEGV", None, None, (), frames, {"app": "aa" * 20})
    other = signature_parts("SIGSEGV", None, None, (), frames, {"app": "bb" * 20})
    assert one[1] == "frame " + "aa" * 20 + "+0x1234"
    assert signature_of(one) != signature_of(other)


@pytest.mark.parametrize(
    "name", ["malloc", "__libc_malloc", "_int_free", "cfree", "__libc_free.part.0", "malloc_consolidate"]
)
def test_names_of_malloc(name: str) -> None:
    assert is_malloc_function(name)


@pytest.mark.parametrize("name", ["my_malloc", "mallocate", "free_list", "__freelocale", "memcpy", "xmalloc", "_free"])
def test_names_that_only_resemble(name: str) -> None:
    assert not is_malloc_function(name)


def test_names_of_signals_and_codes() -> None:
    assert (signal_name(11), code_name(11, 1), code_name(11, 2)) == ("SIGSEGV", "SEGV_MAPERR", "SEGV_ACCERR")
    assert (code_name(11, 128), code_name(11, 0), code_name(6, -6)) == ("SI_KERNEL", "SI_USER", "SI_TKILL")
    assert (code_name(7, 2), code_name(8, 1)) == ("BUS_ADRERR", "FPE_INTDIV")
    assert (signal_name(31), code_name(31, 1), code_name(31, 2)) == ("SIGSYS", "SYS_SECCOMP", "SYS_USER_DISPATCH")
    assert (code_name(11, 77), code_name(6, 1), signal_name(200), code_name(None, 1)) == (None, None, None, None)
