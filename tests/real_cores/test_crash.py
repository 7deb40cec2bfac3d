"""Crashes of known kinds, of programs that said in advance where: what lies there, who called whom, and one signature a kind.

The backtraces of gdb, which reads the same cores with debug information, are held against ours: every frame that we call certain
must be gdb's.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import coreheap
from coreheap.analysis import AnalysisOptions
from coreheap.corefile import Core, ElfFile
from coreheap.corefile.stacks import find_stacks
from coreheap.corefile.unwinding import unwind
from coreheap.crash import AbortKind, CrashContext, FaultKind, FrameSource
from coreheap.crashes import find_crash
from tests.conftest import calls_of, require_tool
from tests.real_cores import cores
from tests.real_cores.cases import CPLUSPLUS, MATRIX, Case, Linking
from tests.real_cores.conftest import core_or_skip
from tests.real_cores.crash_cores import Crash, crash_of
from tests.real_cores.targets import MATRIX_TARGETS, files_of

FLAGS = ("-fPIE", "-pie", "-fomit-frame-pointer", "-fstack-protector-all", "-D_FORTIFY_SOURCE=2")
CRASH_KINDS = Case("crash_kinds", "crash_kinds", linking=Linking("crash", FLAGS), log_bytes=0, support=())
PROGRAMS = {
    "native": CRASH_KINDS,
    **{
        name: replace(CRASH_KINDS, target=MATRIX_TARGETS[name])
        for name in ("bookworm-i386", "trixie-amd64", "bookworm-arm64")
    },
}
BY_KERNEL = ("native", "bookworm-i386", "trixie-amd64")


Make = Callable[..., Crash]


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``crashed(kind, program, *arguments)``: a core of that kind; made anew where ``run`` differs."""
    made: dict[tuple[object, ...], Crash] = {}

    def make(kind: str, program: str = "native", *arguments: str, run: int = 0) -> Crash:
        key = (kind, program, arguments, run)
        if key not in made:
            made[key] = crash_of(PROGRAMS[program], (kind, *arguments), tmp_path_factory.mktemp(kind))
        return made[key]

    return make


def functions(crash: CrashContext) -> list[str]:
    return [frame.symbol or "" for frame in crash.frames]


FAULTS = {
    "null": FaultKind.NULL,
    "below_null": FaultKind.NULL,
    "call_null": FaultKind.NULL,
    "call_live": FaultKind.LIVE_CHUNK,
    "call_freed": FaultKind.FREED_CHUNK,
    "unmapped": FaultKind.UNMAPPED,
    "past_mmapped": FaultKind.PAST_CHUNK_END,
    "past_heap": FaultKind.PAST_CHUNK_END,
    "read_only": FaultKind.READ_ONLY,
    "register_freed": FaultKind.NULL,
}


@pytest.mark.parametrize("program", BY_KERNEL)
@pytest.mark.parametrize("kind", FAULTS)
def test_fault_is_named_for_what_lies_there(crashed: Make, kind: str, program: str) -> None:
    made = crashed(kind, program)
    crash = made.context()
    assert (crash.signal_name, crash.signal) == ("SIGSEGV", 11)
    assert crash.signal_code_name in ("SEGV_MAPERR", "SEGV_ACCERR")
    assert crash.fault is not None
    assert crash.fault.address == made.truth["fault"]
    assert crash.fault.kind is FAULTS[kind], crash.fault
    assert crash.sender_pid is None
    assert crash.inside_malloc is False or kind.startswith("call_")
    assert (crash.wrong_free, crash.stale_use) == (None, None)
    if kind in ("call_live", "call_freed", "past_mmapped"):
        chunk = crash.fault.chunk
        assert chunk is not None
        assert chunk.payload_address == made.truth["chunk"]
        assert crash.fault.offset == made.truth["fault"] - made.truth["chunk"]


@pytest.mark.parametrize("program", ["native", "trixie-amd64"])
def test_general_protection_is_explained_by_the_instruction(crashed: Make, program: str) -> None:
    """The kernel tells no address for what is no address."""
    made = crashed("non_canonical", program)
    crash = made.context()
    assert crash.signal_code_name == "SI_KERNEL"
    assert crash.fault is not None
    assert (crash.fault.kind, crash.fault.address) == (FaultKind.NON_CANONICAL, 0x4141414141414141)


@pytest.mark.parametrize("arguments", [(), ("thread",)])
@pytest.mark.parametrize("program", BY_KERNEL)
def test_stack_overflow_is_seen_in_its_guard(crashed: Make, program: str, arguments: tuple[str, ...]) -> None:
    crash = crashed("stack_overflow", program, *arguments).context()
    assert crash.fault is not None
    assert crash.fault.kind is FaultKind.STACK_GUARD
    assert "overflowed" in crash.fault.description
    assert crash.frames_end == "limit"
    assert len(crash.frames) == 128
    assert all(frame.is_certain for frame in crash.frames)
    assert set(functions(crash)) == {"overflow"}


@pytest.mark.parametrize("program", BY_KERNEL)
def test_register_into_a_freed_chunk_is_noted(crashed: Make, program: str) -> None:
    made = crashed("register_freed", program)
    notes = [note for note in made.context().registers if note.place.address == made.truth["register"]]
    assert {note.name for note in notes} & {"rbx", "esi"}
    assert all(note.place.kind is FaultKind.FREED_CHUNK for note in notes)
    assert all(note.place.offset == 40 for note in notes)


ABORTS = {
    # The stack is overwritten: who called is not known.
    "smash": (AbortKind.STACK_SMASHING, "stack smashing detected", None),
    "fortify": (AbortKind.FORTIFY, "buffer overflow detected", False),
    "assert": (AbortKind.ASSERTION, "behind == NULL", False),
    "double_free": (AbortKind.MALLOC, "double free", True),
}


@pytest.mark.parametrize("program", BY_KERNEL)
@pytest.mark.parametrize("kind", ABORTS)
def test_last_words_and_who_said_them(crashed: Make, kind: str, program: str) -> None:
    expected, words, inside_malloc = ABORTS[kind]
    crash = crashed(kind, program).context()
    assert crash.signal_name == "SIGABRT"
    assert crash.fault is None
    assert crash.abort_message is not None
    assert crash.abort_message.kind is expected
    assert words in crash.abort_message.text
    assert crash.inside_malloc is inside_malloc
    assert crash.stale_use is None
    assert (crash.wrong_free is not None) == (kind == "double_free")
    assert ({"smash"} if kind == "smash" else {"crash", "first", "main"}) <= set(functions(crash))


@pytest.mark.parametrize("program", BY_KERNEL)
def test_sender_of_a_signal_is_named(crashed: Make, program: str) -> None:
    made = crashed("kill", program)
    report = made.report()
    assert report.crash is not None
    assert (report.crash.signal_code_name, report.crash.fault) == ("SI_USER", None)
    assert report.crash.sender_pid == report.process.pid


@pytest.mark.parametrize("program", BY_KERNEL)
def test_signal_handlers_are_followed_back_to_what_was_interrupted(crashed: Make, program: str) -> None:
    crash = crashed("handled_overflow", program).context()
    names = functions(crash)
    assert names.index("abort") < names.index("on_segv") < names.index("overflow")
    interrupted = [frame for frame in crash.frames if frame.is_interrupted]
    assert [frame.symbol for frame in interrupted] == ["overflow"]
    assert all(frame.is_certain for frame in crash.frames)
    # The core's signal is the handler's own; what happened is what it was called for.
    assert (crash.signal_name, crash.handled_signal_name) == ("SIGABRT", "SIGSEGV")
    assert crash.fault is not None
    assert crash.fault.kind is FaultKind.STACK_GUARD
    assert crash.signature_parts[3:] == ("frame crash_kinds overflow",)


STABLE = ("null", "call_freed", "past_mmapped", "double_free", "smash", "assert", "stack_overflow", "kill")


@pytest.mark.parametrize("program", BY_KERNEL)
def test_one_signature_for_one_kind_of_crash(crashed: Make, program: str) -> None:
    """Two runs: other addresses, another process."""
    signatures = {kind: [crashed(kind, program, run=run).context() for run in range(2)] for kind in STABLE}
    for kind, (one, other) in signatures.items():
        assert one.signature == other.signature, (kind, one.signature_parts, other.signature_parts)
        assert one.lwp != other.lwp
        assert len(one.signature) == 16
    assert len({one.signature for one, _ in signatures.values()}) == len(STABLE)


def test_signatures_say_the_same_without_randomised_addresses_and_threads(crashed: Make) -> None:
    in_thread = [crashed("null", "native", "thread", run=run).context() for run in range(2)]
    assert in_thread[0].signature == in_thread[1].signature
    assert in_thread[0].signature_parts[:3] == crashed("null").context().signature_parts[:3]


@pytest.mark.parametrize("arguments", [(), ("thread",)])
@pytest.mark.parametrize("program", BY_KERNEL)
def test_a_frame_larger_than_the_rest_of_the_stack_is_an_overflow(
    crashed: Make, program: str, arguments: tuple[str, ...]
) -> None:
    """The access is below the guard as well, where other memory or none lies."""
    fault = crashed("large_frame", program, *arguments).context().fault
    assert fault is not None
    assert fault.kind is FaultKind.STACK_GUARD
    assert "no room: it has overflowed" in fault.description
    size = int(fault.description.split("frame of ")[1].split()[0])
    assert 64 << 20 <= size < (64 << 20) + 4096


@pytest.mark.parametrize("program", BY_KERNEL)
def test_a_recursion_is_one_kind_whichever_function_meets_the_end(crashed: Make, program: str) -> None:
    made = [crashed("ring_overflow", program, run=run).context() for run in range(6)]
    assert {crash.signature for crash in made} == {made[0].signature}
    ring = {"frame crash_kinds atom", "frame crash_kinds expression", "frame crash_kinds term"}
    assert {part for part in made[0].signature_parts if part.startswith("frame")} == ring
    assert made[0].signature != crashed("stack_overflow", program).context().signature


@pytest.mark.parametrize("program", BY_KERNEL)
def test_calls_to_nowhere_are_told_apart_by_who_called(crashed: Make, program: str) -> None:
    one, other = crashed("call_null", program).context(), crashed("call_elsewhere", program).context()
    assert (functions(one)[:2], functions(other)[:2]) == (["", "crash"], ["", "call_elsewhere"])
    assert [frame.source for frame in other.frames[:2]] == [FrameSource.REGISTERS, FrameSource.RETURN_ADDRESS]
    assert not other.frames[1].is_certain
    assert one.signature_parts[:2] == other.signature_parts[:2]
    assert one.signature != other.signature
    assert other.frames_end == "complete"


@pytest.mark.parametrize("program", BY_KERNEL)
def test_a_call_to_nowhere_is_followed_back_behind_its_handler(crashed: Make, program: str) -> None:
    names = functions(crashed("handled_call_null", program).context())
    assert names.index("on_segv") < names.index("call_elsewhere") < names.index("crash") < names.index("main")


@pytest.mark.parametrize("program", BY_KERNEL)
def test_a_file_that_was_cut_short_is_said_to_be(crashed: Make, program: str) -> None:
    made = crashed("past_file", program)
    crash = made.context()
    assert (crash.signal_name, crash.signal_code_name) == ("SIGBUS", "BUS_ADRERR")
    assert crash.fault is not None
    assert (crash.fault.kind, crash.fault.address) == (FaultKind.OTHER_MEMORY, made.truth["fault"])
    assert f", {made.truth['offset']} bytes into it" in crash.fault.description
    assert "cut short" in crash.fault.description


UNCAUGHT = {
    name: Case("uncaught", "uncaught", linking=linking, log_bytes=0, support=())
    for name, linking in {
        "static_library": CPLUSPLUS,
        "shared_library": replace(CPLUSPLUS, name="c++_shared", libraries=("-lstdc++",)),
    }.items()
}


@pytest.mark.parametrize("linking", UNCAUGHT)
def test_exceptions_that_nobody_catches_are_told_apart_by_who_threw(tmp_path: Path, linking: str) -> None:
    """All of them die in the same functions of libstdc++ and libc."""
    crashes: dict[tuple[str, ...], CrashContext] = {}
    kinds = ("parse", "connect", "look_up", "forget_thread", "close_all")
    for arguments in [(kind, *handler) for kind in kinds for handler in ((), ("handler",))]:
        folder = tmp_path / "_".join(arguments)
        folder.mkdir()
        crashes[arguments] = crash_of(UNCAUGHT[linking], arguments, folder).context()
    assert len({crash.signature for crash in crashes.values()}) >= len(kinds)
    for (kind, *_), crash in crashes.items():
        named = [part for part in crash.signature_parts if part.startswith("frame uncaught ") and kind in part]
        assert named, crash.signature_parts
        assert not any("last_words" in part for part in crash.signature_parts)
    for kind in kinds:
        assert (
            len({crash.signature for (name, *_), crash in crashes.items() if name != kind} & {crashes[kind,].signature})
            == 0
        )


# ------------------------------------------------------------------------------------------------- against gdb

GDB_SCRIPT = """
import gdb
frame = gdb.newest_frame()
while frame is not None:
    if frame.type() in (gdb.NORMAL_FRAME, gdb.SIGTRAMP_FRAME):
        print("PC", hex(frame.pc()))
    frame = frame.older()
"""


def gdb_frames(core: Core, folder: Path) -> list[int]:
    """Program counters of gdb's backtrace, without frames of inlined functions; told where every module is."""
    script = folder / "backtrace.py"
    script.write_text(GDB_SCRIPT)
    commands = ["set confirm off", f"core-file {core.path}"]
    commands += [
        f"add-symbol-file {module.elf_file.path} -o {module.load_bias:#x}"
        for module in core.modules
        if module.elf_file is not None and module.load_bias is not None
    ]
    commands += [
        "set backtrace past-main on",
        "set backtrace past-entry on",
        "set backtrace limit 200",
        f"source {script}",
    ]
    first = ["-iex", "set auto-load off", "-iex", "set debuginfod enabled off", "-iex", "set sysroot /nonexistent"]
    arguments = [argument for command in commands for argument in ("-ex", command)]
    done = subprocess.run(
        [require_tool("gdb", "apt-get install gdb"), "-nx", "-batch", *first, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return [int(line.split()[1], 16) for line in done.stdout.splitlines() if line.startswith("PC ")]


def assert_as_gdb(core: Core, folder: Path, *, whole: bool = True) -> None:
    """Every frame that is certain is gdb's; ``whole``: and no frame of gdb's is missing."""
    steps, end = unwind(core, core.threads[0])
    certain = [step.program_counter for step in steps if step.is_certain]
    theirs = gdb_frames(core, folder)
    assert certain == theirs[: len(certain)]
    if whole:
        assert end in ("complete", "limit")
        assert len(certain) == min(len(theirs), 128)


MATRIX_CASES = [
    f"{target}/{case}"
    for target in MATRIX_TARGETS
    if not target.endswith("arm64")
    for case in (
        "crash_in_malloc_top",
        "crash_in_malloc_unsorted",
        "verdicts@altstack",
        "threads_kept@segv",
        "static_exe",
    )
]


@pytest.mark.parametrize("program", BY_KERNEL)
@pytest.mark.parametrize("kind", ["null", "double_free", "smash", "fortify", "handled_overflow", "kill", "divide"])
@pytest.mark.parametrize("arguments", [(), ("thread",)])
def test_certain_frames_are_those_of_gdb(
    crashed: Make, tmp_path: Path, kind: str, program: str, arguments: tuple[str, ...]
) -> None:
    with crashed(kind, program, *arguments).open() as core:
        # Behind an overwritten stack gdb goes on with rubbish.
        assert_as_gdb(core, tmp_path, whole=kind != "smash")


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_certain_frames_are_those_of_gdb_for_every_release(tmp_path: Path, name: str) -> None:
    paths = core_or_skip(name)
    sysroot = cores.default_directory() / "packages" / MATRIX[name].target.name / "sysroot"
    with coreheap.open(paths.core, sysroot=sysroot, executable=paths.executable) as core:
        assert_as_gdb(core, tmp_path)


@pytest.mark.parametrize("target", [name for name in MATRIX_TARGETS if name.endswith("arm64")])
@pytest.mark.parametrize(
    "case", ["crash_in_malloc_top", "crash_in_malloc_unsorted", "verdicts@altstack", "threads_kept@segv"]
)
def test_two_ways_agree_on_arm64(case: str, target: str) -> None:
    """qemu saves no build-ids, so files are not believed; frame pointers lead, which Debian's arm64 libraries keep. Told which
    files they are, call frame information leads the same way, with certainty."""
    paths = core_or_skip(f"{target}/{case}")
    libraries = files_of(MATRIX[f"{target}/{case}"].target, cores.default_directory()).libraries
    with coreheap.open(paths.core, sysroot=Path("/nonexistent")) as core:
        guessed, end = unwind(core, core.threads[0])
        assert end == "frame_pointers_end"
        guesses = (FrameSource.REGISTERS, FrameSource.FRAME_POINTER)
        assert all(step.source in guesses for step in guessed)
        assert [step.is_certain for step in guessed] == [True] + [False] * (len(guessed) - 1)
        for module in core.modules:
            places = (Path(module.path), libraries / module.name, paths.executable.with_name(module.name))
            module.elf_file = next((ElfFile.open(place) for place in places if place.is_file()), None)
        steps, _ = unwind(core, core.threads[0])
    followed = [step for step in steps if step.is_certain]
    assert len(followed) > 4
    assert [step.program_counter for step in followed] == [step.program_counter for step in guessed][: len(followed)]
    assert len(followed) == len(guessed)


# ------------------------------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize("program", BY_KERNEL)
def test_without_files_little_is_certain_and_nothing_invented(crashed: Make, tmp_path: Path, program: str) -> None:
    made = crashed("double_free", program)
    with made.open() as core:
        steps, _ = unwind(core, core.threads[0])
    with coreheap.open(made.core, sysroot=tmp_path) as core:
        crash = coreheap.analyze(core, AnalysisOptions(leaks=False)).crash
    assert crash is not None
    truth = [step.program_counter for step in steps]
    certain = [frame.program_counter for frame in crash.frames if frame.is_certain]
    assert certain == truth[: len(certain)]
    # The vDSO's own information is in every core: i386 enters the kernel through it.
    assert len(certain) <= 2
    assert crash.inside_malloc is None
    assert crash.abort_message is not None
    assert crash.abort_message.kind is AbortKind.MALLOC


def test_a_process_that_lived_has_no_crash() -> None:
    with coreheap.open(core_or_skip("threads_kept@gcore").core) as core:
        assert find_crash(core, None, find_stacks(core)) is None


def test_a_crash_without_files_costs_little(tmp_path: Path) -> None:
    """Nothing is imported for it that opens with a wait, and few functions are called."""
    path = core_or_skip("crash_in_malloc_top").core
    script = f"""
import sys, coreheap
from pathlib import Path
from coreheap.corefile.stacks import find_stacks
from coreheap.crashes import find_crash
with coreheap.open({str(path)!r}, sysroot=Path({str(tmp_path)!r})) as core:
    assert find_crash(core, None, find_stacks(core)) is not None
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert not {"capstone", "lief", "rich"} & set(done.stdout.split())
    with coreheap.open(path, sysroot=tmp_path) as core:
        stacks = find_stacks(core)
        crash, calls = calls_of(lambda: find_crash(core, None, stacks))
    assert crash is not None
    assert calls < 20_000  # 6,600 were


def test_arm64_crashes_of_every_kind_are_told_without_siginfo(crashed: Make) -> None:
    """qemu writes no NT_SIGINFO: no fault address; the frames and the message are there."""
    crash = crashed("double_free", "bookworm-arm64").context()
    assert crash.signal == signal.SIGABRT
    assert crash.signal_code is None
    assert crash.abort_message is not None
    assert crash.abort_message.kind is AbortKind.MALLOC
    assert len(crash.frames) > 5
