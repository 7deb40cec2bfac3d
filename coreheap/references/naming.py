"""Names for chunks and for places outside of the heap that hold pointers.

Knows: how to say what an address is: a thread's stack, a module's variable, a register. Does not know: why it is asked.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from coreheap.corefile import Core
from coreheap.heap import NO_INDEX, ChunkState
from coreheap.kernels import CHUNK_MASK, chunk_extents
from coreheap.leaks import ChunkTypes, ChunkView, Place, RootKind, Verdict
from coreheap.references.graph import ReferenceGraph
from coreheap.references.roots import RootValues, name_of_value


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
        graph = self._graph
        found: list[tuple[Place, int]] = []
        for references in (graph.strong, graph.weak):
            for row in np.flatnonzero((references.target & np.uint32(CHUNK_MASK)) == chunk).tolist():
                found.append((self.place(int(references.holder_address[row])), int(references.target[row])))
        for values, held in ((graph.roots.thread_words, graph.thread_words), (graph.roots.registers, graph.registers)):
            for row in np.flatnonzero((held.target & np.uint32(CHUNK_MASK)) == chunk).tolist():
                found.append((self.register(values, int(held.row[row])), int(held.target[row])))
        return found

    def typical_holder(self, samples: npt.NDArray[np.int64]) -> str | None:
        """What holds the first of some chunks that a root holds directly; None where chunks hold them all."""
        for chunk in samples.tolist():
            found = self.root_holders(chunk)
            if found:
                return found[0][0].name
        return None
