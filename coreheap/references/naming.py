"""Names for chunks and for places outside of the heap that hold pointers.

Knows: how to say what an address is: a thread's stack, a module's variable, a register. Does not know: why it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from coreheap.corefile import Core
from coreheap.heap import NO_INDEX, ChunkState
from coreheap.kernels import CHUNK_MASK, RootReferences, chunk_extents
from coreheap.leaks import ChunkTypes, ChunkView, Place, RootKind, Verdict
from coreheap.references.graph import HeldByValue, ReferenceGraph
from coreheap.references.roots import RootValues, name_of_value

Int64s = npt.NDArray[np.int64]
UInt32s = npt.NDArray[np.uint32]


class Namer:
    """Names places and chunks of one graph."""

    def __init__(self, graph: ReferenceGraph, types: ChunkTypes | None = None) -> None:
        self._graph = graph
        self._core: Core = graph.core
        self._types = types

    def chunk(self, chunk: int) -> ChunkView:
        """One chunk in full."""
        graph, table = self._graph, self._graph.heap.chunks
        header, chunk_bytes = (int(column[0]) for column in chunk_extents(graph.index, np.array([chunk], np.int64)))
        is_mmapped = chunk >= graph.index.region_chunks
        state = ChunkState(int(graph.index.state[chunk]))
        overhead = table.mmapped_overhead_bytes if is_mmapped else table.word_bytes
        usable = 0 if state in (ChunkState.FENCEPOST, ChunkState.DAMAGED) else chunk_bytes - overhead
        arena: int | None = None
        if not is_mmapped:
            region = int(np.searchsorted(graph.index.region_first_chunk, chunk, side="right")) - 1
            arena = table.regions[region].arena
        return ChunkView(
            chunk=chunk,
            header_address=header,
            payload_address=header + graph.index.geometry.header_bytes,
            chunk_bytes=chunk_bytes,
            usable_bytes=usable,
            state=state.label,
            is_mmapped=is_mmapped,
            arena=None if arena == NO_INDEX else arena,
            verdict=Verdict(int(graph.verdict[chunk])),
            type=(self._types.names[int(self._types.code[chunk])] or None) if self._types is not None else None,
        )

    def place(self, address: int) -> Place:
        """A place outside of all chunks."""
        found = self._graph.roots.ranges.at(address)
        kind, thread = found if found is not None else (RootKind.ANONYMOUS, None)
        return Place(kind, address, self._words(kind, address, thread), thread)

    def register(self, values: RootValues, row: int) -> Place:
        """A register, or a word of the thread library."""
        thread = int(values.thread[row])
        name = name_of_value(self._core, values, row)
        kind = RootKind.TLS if int(values.note[row]) == 0 else RootKind.REGISTER
        return Place(kind, None, f"thread {thread} {name}", thread)

    def symbol_at(self, address: int) -> str | None:
        """``libfoo.so cache+16``, ``libfoo.so+0x4010`` without a symbol; None outside of all modules."""
        module = self._core.module_at(address)
        if module is None:
            return None
        found = module.symbol_containing(address)
        if found is None:
            return f"{module.name}+{address - module.start:#x}"
        symbol, distance = found
        return f"{module.name} {symbol.name}" + (f"+{distance:#x}" if distance else "")

    def _words(self, kind: RootKind, address: int, thread: int | None) -> str:
        """A place in words."""
        if kind is RootKind.MODULE_DATA:
            return self.symbol_at(address) or "module data"
        who = "" if thread is None else f"thread {thread} "
        if kind is RootKind.MAPPED_FILE:
            region = self._core.memory.region_index(address)
            row = int(self._core.memory.region_file_index[region]) if region is not None else -1
            path = self._core.memory.mapped_files[row].path if row >= 0 else ""
            return f"mapped file {path}" if path else "mapped file"
        words: dict[RootKind, str] = {
            RootKind.STACK: "stack",
            RootKind.OLD_STACK: "old stack",
            RootKind.TLS: "TLS",
            RootKind.ANONYMOUS: "anonymous memory",
            RootKind.HEAP_REMAINDER: "heap memory without chunks",
        }
        return who + words.get(kind, kind.label)

    def root_holders(self, chunk: int) -> list[tuple[Place, int]]:
        """The first root of each kind that leads to a chunk, strong ones first, each with the word in the place's kind of
        reference (as in Edges)."""
        return [
            (name(row), word)
            for rows, words, name in self._roots_of(np.array([chunk], np.int64))
            for row, word in zip(rows.tolist(), words.tolist(), strict=True)
        ]

    def typical_holders(self, samples: Sequence[Int64s]) -> list[str | None]:
        """For each group of chunks: what holds the first of them that a root holds directly; None where chunks hold them
        all. Goes through all roots once, however many groups there are.
        """
        first_root: dict[int, tuple[Callable[[int], Place], int]] = {}
        for rows, words, name in self._roots_of(np.concatenate([np.empty(0, np.int64), *samples])):
            chunks, first = np.unique(words & np.uint32(CHUNK_MASK), return_index=True)
            for chunk, row in zip(chunks.tolist(), rows[first].tolist(), strict=True):
                first_root.setdefault(chunk, (name, row))
        names: list[str | None] = []
        for group in samples:
            found = next((first_root[chunk] for chunk in group.tolist() if chunk in first_root), None)
            names.append(found[0](found[1]).name if found is not None else None)
        return names

    def direct_holders(self, chunks: Int64s, most: int) -> tuple[int, list[tuple[int, str]]]:
        """How many of some chunks a root leads to directly, and for about ``most`` of these, spread evenly, the chunk and the
        place of the first such root, strong ones first."""
        is_held = np.zeros(self._graph.index.chunk_count, np.bool_)
        parts: list[tuple[Int64s, Int64s, Callable[[int], Place]]] = []
        for rows, words, name in self._roots_of(chunks):
            held, first = np.unique(words & np.uint32(CHUNK_MASK), return_index=True)
            new = ~is_held[held]
            is_held[held[new]] = True
            parts.append((held[new].astype(np.int64), rows[first[new]], name))
        total = sum(len(held) for held, _, _ in parts)
        step = -(-total // most) or 1
        return total, [
            (chunk, name(row).name)
            for held, rows, name in parts
            for chunk, row in zip(held[::step].tolist(), rows[::step].tolist(), strict=True)
        ]

    def _roots_of(self, chunks: Int64s) -> Iterator[tuple[Int64s, UInt32s, Callable[[int], Place]]]:
        """For each kind of root reference, strong ones first: rows that lead to some of the chunks, their words (as in
        Edges), and what names a row's place."""
        graph = self._graph
        asked_for = np.zeros(graph.index.chunk_count, np.bool_)
        asked_for[chunks] = True
        kinds: list[tuple[UInt32s, Callable[[int], Place]]] = [
            (references.target, partial(self._place_of, references)) for references in (graph.strong, graph.weak)
        ]
        for values, held in ((graph.roots.thread_words, graph.thread_words), (graph.roots.registers, graph.registers)):
            kinds.append((held.target, partial(self._register_of, values, held)))
        for target, name in kinds:
            rows = np.flatnonzero(asked_for[target & np.uint32(CHUNK_MASK)])
            yield rows, target[rows], name

    def _place_of(self, references: RootReferences, row: int) -> Place:
        return self.place(int(references.holder_address[row]))

    def _register_of(self, values: RootValues, held: HeldByValue, row: int) -> Place:
        return self.register(values, int(held.row[row]))
