"""Whatever the bytes are: a core that opens, or InputNotUsable. No traceback, no hang, no flood of memory."""

from __future__ import annotations

import gzip
import lzma
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coreheap.corefile import Core, open_core
from coreheap.corefile.stacks import find_stacks
from coreheap.crashes.abort_message import find_abort_message
from coreheap.errors import InputNotUsable, MemoryFault
from tests.conftest import calls_of
from tests.core_builder import CoreBuilder, elf_image, note

PAGE = 4096
many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MACHINES = [(64, "x86_64"), (32, "i386"), (64, "aarch64")]


def rich_core(elf_class: int, machine: str) -> bytes:
    """A core that has one of everything."""
    builder = CoreBuilder(elf_class, machine)
    image = elf_image(elf_class=elf_class, machine=machine, text=b"text")
    builder.add_thread(100, stack_pointer=0x50010, thread_pointer=0x50020)
    builder.add_thread(101, stack_pointer=0x50040, thread_pointer=0x50080)
    builder.auxv = {6: PAGE, 9: 0x10800, 25: 0x50100, 31: 0x50200, 33: 0x60000}
    builder.add_segment(0x10000, image[:PAGE], PAGE, "r-x")
    builder.add_segment(0x11000, image[PAGE:], 2 * PAGE, "rw-")
    builder.add_segment(0x50000, b"\x01\x02\x03\x04" * 1024)
    builder.add_segment(0x60000, image, flags="r-x")
    builder.add_segment(0x70000, None, PAGE, "---")
    builder.add_file_mapping(0x10000, 0x11000, 0, "/no/such/program")
    builder.add_file_mapping(0x11000, 0x12000, PAGE, "/no/such/program")
    return builder.build()


CORES = {machine: rich_core(elf_class, machine) for elf_class, machine in MACHINES}


def use_everything(core: Core) -> None:
    """Ask a core all that the rest of coreheap asks."""
    memory = core.memory
    assert 0.0 <= core.coverage <= 1.0
    assert core.truncated == (core.coverage < 1.0)
    assert core.saved_bytes <= 2 * core.file_bytes
    assert (memory.region_end > memory.region_start).all()
    assert (memory.region_start[1:] >= memory.region_end[:-1]).all()
    assert (memory.run_end > memory.run_start).all()
    lengths = memory.run_end - memory.run_start
    assert (memory.run_file_offset + lengths <= np.uint64(core.file_bytes)).all()
    _ = core.process, core.gaps, core.initial_stack, core.made_by
    for thread in core.threads[:50]:
        _ = thread.registers, thread.notes, memory.cause_missing(thread.stack_pointer)
    for module in core.modules[:50]:
        _ = module.symbol_address("malloc"), module.name, module.mapped_ranges
    for index in range(min(memory.region_count, 50)):
        region = memory.region(index)
        try:
            memory.view(region.start, min(region.end, region.start + 64))
            memory.read_word(region.end - 1)
        except MemoryFault as fault:
            causes = {fault.cause, memory.cause_missing(fault.address)}
            if len(causes) > 1:
                pytest.fail(f"two causes for {fault.address:#x}: {causes}")
    for start, end in memory.saved_runs_within(0, 1 << 64)[:50]:
        assert memory.is_saved(start, end)
        memory.populated_bytes(start, end)
        memory.populated_extents(start, end)


def try_to_open(path: Path, content: bytes) -> bool:
    """Whether it opened; everything is asked of it then."""
    path.write_bytes(content)
    try:
        with open_core(path, unpacked_limit=1 << 24) as core:
            use_everything(core)
    except InputNotUsable:
        return False
    return True


def test_the_cores_themselves_are_sound(tmp_path: Path) -> None:
    for content in CORES.values():
        assert try_to_open(tmp_path / "core", content)


@many
@given(machine=st.sampled_from(list(CORES)), cut=st.floats(0, 1, exclude_max=True))
def test_every_truncation_opens_partly_or_is_refused(tmp_path: Path, machine: str, cut: float) -> None:
    content = CORES[machine]
    kept = content[: int(len(content) * cut)]
    path = tmp_path / "core"
    path.write_bytes(kept)
    try:
        with open_core(path) as core:
            assert core.coverage < 1.0
            assert core.truncated
            use_everything(core)
    except InputNotUsable:
        # Only what ends before the first whole program header tells nothing at all.
        header_bytes = 64 + 56 if machine != "i386" else 52 + 32
        assert len(kept) < header_bytes


@pytest.mark.parametrize("machine", list(CORES))
def test_truncation_at_every_byte_of_the_headers(tmp_path: Path, machine: str) -> None:
    content = CORES[machine]
    for size in range(0, 1200, 1):
        try_to_open(tmp_path / "core", content[:size])


@many
@given(st.binary(max_size=2000))
def test_random_bytes(tmp_path: Path, content: bytes) -> None:
    try_to_open(tmp_path / "core", content)


@many
@given(st.sampled_from(list(CORES)), st.binary(max_size=3000))
def test_random_bytes_behind_a_header(tmp_path: Path, machine: str, content: bytes) -> None:
    try_to_open(tmp_path / "core", CORES[machine][:64] + content)


@many
@given(
    st.sampled_from(list(CORES)),
    st.lists(st.tuples(st.integers(0, 3500), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_changed_bytes_in_headers_and_notes(tmp_path: Path, machine: str, changes: list[tuple[int, int]]) -> None:
    content = bytearray(CORES[machine])
    for position, value in changes:
        content[position % len(content)] = value
    try_to_open(tmp_path / "core", bytes(content))


@many
@given(
    st.sampled_from(list(CORES)),
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.integers(0, 7),
            st.sampled_from([0, 1, 0xFFF, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_extreme_numbers_in_program_headers(tmp_path: Path, machine: str, changes: list[tuple[int, int, int]]) -> None:
    content = bytearray(CORES[machine])
    for row, field, value in changes:
        if machine == "i386":
            struct.pack_into("<I", content, 52 + 32 * row + 4 * field, value & 0xFFFFFFFF)
        else:
            struct.pack_into("<Q", content, 64 + 56 * row + 8 * (field % 7), value)
    try_to_open(tmp_path / "core", bytes(content))


@many
@given(
    st.sampled_from(list(CORES)),
    st.lists(st.tuples(st.integers(0, 2 * PAGE - 1), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_changed_bytes_in_a_module_of_the_core(tmp_path: Path, machine: str, changes: list[tuple[int, int]]) -> None:
    content = bytearray(CORES[machine])
    start = content.index(b"\x7fELF", 64)
    for position, value in changes:
        # Half of the changes into its header and program headers.
        content[start + (position % 256 if position % 2 else position)] = value
    content[start : start + 4] = b"\x7fELF"
    try_to_open(tmp_path / "core", bytes(content))


@many
@given(st.binary(max_size=400), st.sampled_from([1, 2, 3, 6, 0x200, 0x401, 0x46494C45, 0x53494749]))
def test_random_descriptors(tmp_path: Path, descriptor: bytes, kind: int) -> None:
    builder = CoreBuilder(32, "i386") if kind == 0x200 else CoreBuilder()
    builder.with_auxv = builder.with_process_info = builder.with_signal_info = False
    builder.add_raw_notes(note(b"CORE", kind, descriptor)).add_thread()
    builder.add_note(b"LINUX", kind, descriptor)
    assert try_to_open(tmp_path / "core", builder.add_segment(0x10000, b"x" * 100).build())


@many
@given(st.sampled_from([gzip.compress, lzma.compress]), st.floats(0, 1), st.integers(0, 255))
def test_changed_bytes_in_a_compressed_core(tmp_path: Path, pack: object, place: float, value: int) -> None:
    assert callable(pack)
    content = bytearray(pack(CORES["x86_64"]))
    content[int(place * (len(content) - 1))] = value
    try_to_open(tmp_path / "core", bytes(content))


@many
@given(
    st.binary(max_size=500),
    st.sampled_from([b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"\xfd7zXZ\0", b"\x1f\x8b\x08"]),
)
def test_random_bytes_behind_a_magic(tmp_path: Path, content: bytes, magic: bytes) -> None:
    try_to_open(tmp_path / "core", magic + content)


def test_a_million_tiny_notes(tmp_path: Path) -> None:
    tiny = struct.pack("<3I", 0, 0, 77)
    builder = CoreBuilder().add_thread().add_raw_notes(tiny * 1_200_000)
    path = builder.add_segment(0x10000, b"x").write(tmp_path / "core")
    with open_core(path) as core:
        assert "notes_too_many" in [gap.cause for gap in core.gaps]
        assert len(core.threads) == 1


def test_many_note_segments_over_the_same_bytes(tmp_path: Path) -> None:
    builder = CoreBuilder().add_thread().add_raw_notes(struct.pack("<3I", 0, 0, 77) * 10_000)
    for _ in range(2000):
        builder.add_segment(0, None, 0, kind=4, file_bytes=100_000, file_offset=PAGE * 30)
    with open_core(builder.add_segment(0x10000, b"x").write(tmp_path / "core")) as core:
        use_everything(core)


def test_the_whole_file_as_program_headers(tmp_path: Path) -> None:
    """More than image.SEGMENT_LIMIT of them: the file is sparse, the table would be 130 MiB."""
    raw = bytearray(CoreBuilder().add_segment(0x10000, b"x").add_thread().build()[:64])
    raw[56:58] = b"\xff\xff"
    sections_at = 2_400_000 * 56
    struct.pack_into("<Q", raw, 40, sections_at)
    path = tmp_path / "core"
    with open(path, "wb") as file:
        file.write(raw)
        file.seek(sections_at + 44)
        file.write(struct.pack("<I", 0xFFFFFFFF))
        file.truncate(sections_at + 64)
    with open_core(path) as core:
        assert len(core.image.segments) < 2_400_000
        assert "program_headers_cut" in [gap.cause for gap in core.gaps]


def test_text_of_the_process_is_never_a_path_outside_of_the_sysroot(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(elf_image(text=b"secret"))
    image = elf_image()
    builder = CoreBuilder().add_thread().add_segment(0x10000, image[:0x600], PAGE, "r-x")
    builder.add_file_mapping(0x10000, 0x11000, 0, "/../secret")
    path = builder.write(tmp_path / "core")
    with open_core(path, sysroot=root) as core:
        assert [module.file for module in core.modules] == [None]


def test_pointers_that_may_lead_to_last_words_cost_little(tmp_path: Path) -> None:
    """Data full of pointers to pages: every word of every library might be __abort_msg."""
    builder, target, parts = CoreBuilder(), 0x7000_0000_0000, 8
    builder.add_segment(target, bytes(PAGE))
    builder.add_segment(target + (1 << 30), None, 1 << 29)
    pages = target + (1 << 30) + np.arange((2 << 20) // parts // 8, dtype=np.uint64) * np.uint64(PAGE)
    for number in range(4):
        start, path = 0x7F00_0000_0000 + number * (16 << 20), f"/lib/lib{number}.so"
        builder.add_segment(start, elf_image(build_id=bytes([number]) * 20)[:PAGE], flags="r--")
        builder.add_file_mapping(start, start + PAGE, 0, path)
        for part in range(parts):
            words = np.full(len(pages), target, "<u8") if part % 2 else pages
            place = start + PAGE + part * (words.nbytes + PAGE)
            builder.add_segment(place, words.tobytes())
            builder.add_file_mapping(place, place + words.nbytes, PAGE, path)
    builder.add_thread(stack_pointer=target)
    with open_core(builder.write(tmp_path / "core")) as core:
        assert len(core.modules) >= 4
        message, calls = calls_of(lambda: find_abort_message(core))
    assert message is None
    # A million words, of which each was followed; now each target is, and so many of them at most.
    assert calls < 1_500_000


def test_stacks_full_of_what_may_be_descriptors_cost_little(tmp_path: Path) -> None:
    """Every word of the stacks might begin a descriptor's three, and no thread pointer says where to look."""
    builder = CoreBuilder()
    builder.add_segment(0x1000, bytes(PAGE))
    words = np.full((1 << 20) // 8, 0x1000, "<u8").tobytes()
    for number in range(8):
        start = 0x7000_0000_0000 + number * (4 << 20)
        builder.add_segment(start, words)
        builder.add_thread(100 + number, stack_pointer=start, thread_pointer=0)
    with open_core(builder.write(tmp_path / "core")) as core:
        _, calls = calls_of(lambda: find_stacks(core))
    assert calls < 200_000  # 5 million were
