"""The address space: what is saved, what is not and why, and that nothing unsaved is ever zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreheap.corefile import Backing, Core, open_core
from coreheap.corefile.elf import ProgramHeaders
from coreheap.corefile.mapped_files import NO_MAPPED_FILES
from coreheap.corefile.regions import regions_of
from coreheap.errors import MemoryFault
from tests.conftest import skip_unless_ci
from tests.core_builder import CoreBuilder

PAGE = 4096


def opened(builder: CoreBuilder, tmp_path: Path) -> Core:
    return open_core(builder.add_thread().write(tmp_path / "core"))


def rows(core: Core) -> list[tuple[int, int, int, str, int]]:
    memory = core.memory
    return [
        (r.start, r.end, r.flags, r.backing.name, r.file_index) for r in map(memory.region, range(memory.region_count))
    ]


def causes(core: Core) -> list[str]:
    return [gap.cause for gap in core.gaps]


class TestRegions:
    def test_a_partly_saved_segment_is_split(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_segment(0x10000, b"x" * PAGE, 3 * PAGE, "r-x")
        assert rows(opened(builder, tmp_path)) == [
            (0x10000, 0x11000, 5, "SAVED", -1),
            (0x11000, 0x13000, 5, "NOT_SAVED", -1),
        ]

    def test_unsorted_segments_come_out_sorted(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_segment(0x30000, b"3" * PAGE).add_segment(0x10000, b"1" * PAGE)
        core = opened(builder, tmp_path)
        assert [row[0] for row in rows(core)] == [0x10000, 0x30000]
        assert core.memory.region_segment.tolist() == [2, 1]
        assert core.memory.read(0x30000, 1) == b"3"

    def test_a_mapped_file_that_is_not_saved(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_segment(0x10000, b"E" * PAGE, 3 * PAGE, "r-x")
        builder.add_segment(0x20000, None, PAGE, "---")
        builder.add_file_mapping(0x10000, 0x13000, 0, "/lib/a.so")
        builder.add_file_mapping(0x40000, 0x41000, PAGE, "/data")
        core = opened(builder, tmp_path)
        assert rows(core) == [
            (0x10000, 0x11000, 5, "SAVED", 0),
            (0x11000, 0x13000, 5, "MAPPED_FILE", 0),
            (0x20000, 0x21000, 0, "NOT_SAVED", -1),
            (0x40000, 0x41000, 0, "MAPPED_FILE", 1),
        ]
        assert core.memory.region_segment.tolist() == [1, 1, 2, -1]
        assert core.memory.mapped_files[1].path == "/data"
        assert core.memory.mapped_files[1].file_offset == PAGE

    def test_a_file_that_covers_part_of_a_segment(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_segment(0x10000, b"x" * 3 * PAGE)
        builder.add_file_mapping(0x11000, 0x12000, 0, "/part")
        core = opened(builder, tmp_path)
        assert [(row[0], row[4]) for row in rows(core)] == [
            (0x10000, -1),
            (0x11000, 0),
            (0x12000, -1),
        ]
        assert len(core.memory.run_start) == 1

    def test_overlapping_segments_the_earlier_one_wins(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_segment(0x11000, b"b" * 2 * PAGE).add_segment(0x10000, b"a" * 2 * PAGE)
        core = opened(builder, tmp_path)
        assert core.memory.read(0x10000, 3 * PAGE) == b"a" * 2 * PAGE + b"b" * PAGE
        assert "segments_overlap" in causes(core)

    def test_a_segment_inside_another_is_dropped(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_segment(0x10000, b"a" * 3 * PAGE).add_segment(0x11000, b"b" * PAGE)
        core = opened(builder, tmp_path)
        assert rows(core) == [(0x10000, 0x13000, 6, "SAVED", -1)]

    def test_segments_without_size_are_dropped(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_segment(0x10000, None, 0).add_segment(0x20000, b"x")
        assert len(rows(opened(builder, tmp_path))) == 1

    def test_addresses_do_not_wrap(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_segment(0x10000, b"a" * PAGE).add_segment((1 << 64) - PAGE, b"x" * PAGE, 1 << 63)
        core = opened(builder, tmp_path)
        assert "segment_wraps" in causes(core)
        assert core.memory.read((1 << 64) - PAGE, 10) == b"x" * 10
        assert core.memory.region_index(0) is None

    def test_regions_of_many_addresses_are_those_of_each(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_segment(0x10000, b"a" * PAGE).add_segment(0x20000, None, PAGE)
        memory = opened(builder.add_segment((1 << 64) - PAGE, b"x" * PAGE), tmp_path).memory
        asked = [0, 0xFFFF, 0x10000, 0x10FFF, 0x11000, 0x1FFFF, 0x20800, 0x21000, (1 << 63), (1 << 64) - 1]
        found = memory.region_indices(np.array(asked, np.uint64)).tolist()
        assert found == [-1 if (row := memory.region_index(address)) is None else row for address in asked]
        assert len(set(found)) > 2

    def test_of_the_kernels_half_only_its_own_pages_are_seen_and_never_writable(self, tmp_path: Path) -> None:
        builder = (
            CoreBuilder().add_segment(0xFFFFFFFFFF600000, b"v" * PAGE).add_segment(0x93A5850EA4C94000, b"x" * PAGE)
        )
        core = opened(builder.add_segment(0x10000, b"a" * PAGE), tmp_path)
        assert "segment_wraps" in causes(core)
        assert rows(core) == [
            (0x10000, 0x11000, 6, "SAVED", -1),
            (0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, 4, "SAVED", -1),
        ]

    def test_a_segment_up_to_the_end_of_a_32_bit_address_space(self, tmp_path: Path) -> None:
        builder = CoreBuilder(32, "i386").add_segment(0xFFFFF000, b"x" * PAGE)
        core = opened(builder, tmp_path)
        assert rows(core) == [(0xFFFFF000, 1 << 32, 6, "SAVED", -1)]
        assert "segment_wraps" not in causes(core)

    def test_impossible_file_offsets(self, tmp_path: Path) -> None:
        builder = CoreBuilder()
        builder.add_segment(0x10000, b"x" * PAGE, file_offset=(1 << 64) - 1)
        builder.add_segment(0x20000, b"x" * PAGE, file_bytes=(1 << 64) - 1)
        core = opened(builder, tmp_path)
        assert core.truncated
        assert 0 < core.coverage < 1
        assert core.memory.cause_missing(0x10000) == "truncated"
        assert core.memory.is_saved(0x20000, 0x21000)

    def test_segments_that_share_their_bytes_count_once(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_segment(0x10000, b"x" * 16 * PAGE)
        for index in range(1, 100):
            builder.add_segment(0x100000 * index, None, 16 * PAGE, file_bytes=16 * PAGE, file_offset=2 * PAGE)
        core = opened(builder, tmp_path)
        assert core.saved_bytes <= 2 * core.file_bytes
        assert "segments_share_bytes" in causes(core)

    def test_mapped_files_that_contradict_each_other(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_segment(0x10000, b"x" * PAGE)
        builder.add_file_mapping(0x20000, 0x20000, 0, "/empty")
        builder.add_file_mapping(0x30000, 0x2F000, 0, "/backwards")
        builder.add_file_mapping(0x10000, 0x11000, 0, "/one").add_file_mapping(0x10000, 0x11000, 0, "/two")
        core = opened(builder, tmp_path)
        assert rows(core) == [(0x10000, 0x11000, 6, "SAVED", 2)]
        assert "mapped_files_contradict" in causes(core)

    @given(
        st.lists(
            st.tuples(st.integers(0, 40), st.integers(0, 12), st.integers(0, 14), st.integers(0, 60)),
            max_size=12,
        )
    )
    def test_regions_equal_a_byte_by_byte_model(self, segments: list[tuple[int, int, int, int]]) -> None:
        file_bytes = 50
        model: dict[int, tuple[str, int]] = {}
        for start, memory, in_file, offset in sorted(segments, key=lambda row: row[0]):
            for position in range(memory):
                if start + position in model:
                    continue
                if position >= in_file:
                    model[start + position] = ("NOT_SAVED", 0)
                elif offset + position >= file_bytes:
                    model[start + position] = ("TRUNCATED", 0)
                else:
                    model[start + position] = ("SAVED", offset + position)
        total = sum(min(memory, in_file, max(file_bytes - offset, 0)) for _, memory, in_file, offset in segments)
        columns = np.array(segments, np.uint64).reshape(-1, 4).T
        count = len(segments)
        headers = ProgramHeaders(
            np.ones(count, np.uint32),
            np.full(count, 6, np.uint32),
            columns[3],
            columns[0],
            np.zeros(count, np.uint64),
            columns[2],
            columns[1],
            np.ones(count, np.uint64),
        )
        regions, runs, _ = regions_of(headers, NO_MAPPED_FILES, file_bytes, 64)
        assert (regions.start[1:] >= regions.end[:-1]).all()
        assert (runs.start[1:] >= runs.end[:-1]).all()
        found = {
            address: Backing(backing).name
            for start, end, backing in zip(
                regions.start.tolist(), regions.end.tolist(), regions.backing.tolist(), strict=True
            )
            for address in range(start, end)
        }
        assert set(found) == set(model)
        if total > 2 * file_bytes:
            return  # shared bytes of the file are taken away then
        assert found == {address: backing for address, (backing, _) in model.items()}
        places = {
            start + step: offset + step
            for start, end, offset in zip(
                runs.start.tolist(), runs.end.tolist(), runs.file_offset.tolist(), strict=True
            )
            for step in range(end - start)
        }
        assert places == {a: place for a, (backing, place) in model.items() if backing == "SAVED"}


class TestUnsavedMemory:
    def test_bytes_beyond_the_file_size_are_not_zero(self, tmp_path: Path) -> None:
        memory = opened(CoreBuilder().add_segment(0x10000, b"x" * PAGE, 2 * PAGE), tmp_path).memory
        with pytest.raises(MemoryFault) as caught:
            memory.read(0x10FF0, 64)
        assert caught.value.address == 0x11000
        assert caught.value.cause == "not_saved"
        with pytest.raises(MemoryFault):
            memory.view(0x11000, 0x11001)
        with pytest.raises(MemoryFault):
            memory.read_word(0x10FFC)
        with pytest.raises(MemoryFault):
            memory.read_words(0x10FF8, 2)

    def test_nothing_is_mapped_there(self, tmp_path: Path) -> None:
        memory = opened(CoreBuilder().add_segment(0x10000, b"x" * PAGE), tmp_path).memory
        for address in (0, 0xFFFF, 0x11000, (1 << 64) - 1, 1 << 64, -1):
            with pytest.raises(MemoryFault) as caught:
                memory.read(address, 8)
            assert caught.value.cause == "unmapped"
            assert memory.cause_missing(address) == "unmapped"

    def test_a_truncated_core_says_so(self, tmp_path: Path) -> None:
        raw = CoreBuilder().add_segment(0x10000, b"x" * 4 * PAGE).add_thread().build()
        (tmp_path / "core").write_bytes(raw[: -3 * PAGE])
        with open_core(tmp_path / "core") as core:
            assert core.truncated
            assert 0 < core.coverage < 1
            assert "core_truncated" in causes(core)
            assert core.memory.read(0x10000, PAGE) == b"x" * PAGE
            assert core.memory.cause_missing(0x11000) == "truncated"
            with pytest.raises(MemoryFault):
                core.memory.read(0x10000, PAGE + 1)


class TestReading:
    @pytest.fixture
    def core(self, tmp_path: Path) -> Core:
        """Two runs that touch in memory but not in the file, a gap, a third run."""
        builder = CoreBuilder()
        builder.add_segment(0x11000, bytes(range(256)) * 16)
        builder.add_segment(0x10000, bytes(reversed(range(256))) * 16)
        builder.add_segment(0x20000, b"text\0more", 2 * PAGE)
        return opened(builder, tmp_path)

    def test_a_view_of_one_run_is_no_copy(self, core: Core) -> None:
        view = core.memory.view(0x11000, 0x12000)
        assert np.shares_memory(view, core.memory.file)
        assert not view.flags.writeable

    def test_a_view_across_runs_is_joined(self, core: Core) -> None:
        assert len(core.memory.run_start) == 3
        view = core.memory.view(0x10FFE, 0x11002)
        assert view.tolist() == [1, 0, 0, 1]
        assert core.memory.read(0x10FFE, 4) == bytes([1, 0, 0, 1])
        assert core.memory.read_word(0x10FFC) == 0x0302010000010203
        assert core.memory.read_words(0x10FFC, 1).tolist() == [0x0302010000010203]

    def test_an_empty_view(self, core: Core) -> None:
        assert len(core.memory.view(0x30000, 0x30000)) == 0
        assert core.memory.read(0x30000, 0) == b""

    def test_saved_runs(self, core: Core) -> None:
        memory = core.memory
        assert memory.saved_runs_within(0, 1 << 64) == [
            (0x10000, 0x11000),
            (0x11000, 0x12000),
            (0x20000, 0x20009),
        ]
        assert memory.saved_runs_within(0x10800, 0x11001) == [
            (0x10800, 0x11000),
            (0x11000, 0x11001),
        ]
        assert memory.saved_runs_within(0x12000, 0x20000) == []
        assert memory.saved_runs_within(0x13000, 0x12000) == []
        assert memory.saved_bytes_within(0x10800, 0x20004) == 0x1800 + 4
        assert memory.is_saved(0x10000, 0x12000)
        assert not memory.is_saved(0x10000, 0x12001)
        assert not memory.is_saved(0xFFFF, 0x10001)

    def test_words_need_not_be_aligned(self, core: Core) -> None:
        assert core.memory.read_word(0x11001) == 0x0807060504030201
        assert core.memory.read_words(0x11001, 2).tolist() == [
            0x0807060504030201,
            0x100F0E0D0C0B0A09,
        ]

    def test_text_ends_at_a_nul_or_where_memory_ends(self, core: Core) -> None:
        assert core.memory.read_text(0x20000) == b"text"
        assert core.memory.read_text(0x20005) == b"more"
        assert core.memory.read_text(0x20000, 2) == b"te"
        with pytest.raises(MemoryFault):
            core.memory.read_text(0x20009)

    def test_words_of_32_bits(self, tmp_path: Path) -> None:
        builder = CoreBuilder(32, "i386").add_segment(0x10000, bytes(range(64)))
        memory = opened(builder, tmp_path).memory
        assert memory.read_word(0x10000) == 0x03020100
        assert memory.read_words(0x10004, 2).tolist() == [0x07060504, 0x0B0A0908]
        assert memory.read_words(0x10004, 2).dtype == np.uint64

    def test_tags_are_taken_off_aarch64_pointers_only(self, tmp_path: Path) -> None:
        arm = opened(CoreBuilder(64, "aarch64").add_segment(0x10000, b"x"), tmp_path).memory
        assert arm.untagged(0xB400_007F_1234_5678) == 0x7F_1234_5678
        assert arm.untagged(0x00FF_FFFF_1234_5678) == 0xFFFF_FFFF_1234_5678
        x86 = opened(CoreBuilder().add_segment(0x10000, b"x"), tmp_path).memory
        assert x86.untagged(0xB400_007F_1234_5678) == 0xB400_007F_1234_5678


class TestHoles:
    def content(self) -> bytes:
        return b"".join((b"a" * PAGE, bytes(4 * PAGE), b"b" * PAGE, bytes(2 * PAGE)))

    def core(self, tmp_path: Path, *, sparse: bool) -> Core:
        builder = CoreBuilder().add_segment(0x100000, self.content()).add_segment(0x200000, b"c" * PAGE)
        path = builder.add_thread().write(tmp_path / "core", sparse=sparse)
        if sparse and path.stat().st_blocks * 512 >= path.stat().st_size:
            skip_unless_ci("no holes on this file system; to run this test: set TMPDIR to ext4, xfs, btrfs or tmpfs")
        return open_core(path)

    def test_holes_are_pages_that_were_never_populated(self, tmp_path: Path) -> None:
        memory = self.core(tmp_path, sparse=True).memory
        assert memory.holes_known
        assert memory.hole_meaning.value == "never_populated"
        assert memory.populated_extents(0x100000, 0x108000) == [
            (0x100000, 0x101000),
            (0x105000, 0x106000),
        ]
        assert memory.populated_extents(0x100800, 0x105800) == [
            (0x100800, 0x101000),
            (0x105000, 0x105800),
        ]
        assert memory.populated_bytes(0x100000, 0x108000) == 2 * PAGE
        assert memory.populated_bytes(0x100800, 0x105800) == PAGE
        assert memory.populated_bytes(0x100000, 0x103000) == PAGE
        assert memory.populated_bytes(0x102000, 0x103000) == 0
        assert memory.populated_bytes(0, 1 << 40) == 3 * PAGE
        assert memory.populated_bytes(0x300000, 0x400000) == 0
        assert memory.read(0x101000, 8) == bytes(8)

    def test_a_core_without_holes_tells_nothing(self, tmp_path: Path) -> None:
        memory = self.core(tmp_path, sparse=False).memory
        if memory.holes_known:
            skip_unless_ci("this file system makes holes by itself; to run this test: set TMPDIR to another one")
        assert memory.populated_extents(0x100000, 0x108000) == [(0x100000, 0x108000)]
        assert memory.populated_bytes(0x100000, 0x108000) == 8 * PAGE
