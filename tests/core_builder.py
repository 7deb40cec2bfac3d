"""Builds ELF cores in memory for tests, from constants of its own.

Shares no table, layout or constant with coreheap: what both get wrong in the same way no test would
find. Numbers here were written down from the ELF specification and from the kernel's headers
(elfcore.h, ptrace.h), not from the product.

    builder = CoreBuilder()
    builder.add_segment(0x10000, b"content" * 100, memory_bytes=8192)
    builder.add_thread(lwp=7, stack_pointer=0x10100)
    path = builder.write(tmp_path / "core")
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Content = bytes | bytearray | memoryview

_MACHINES = {"x86_64": 62, "i386": 3, "aarch64": 183}
_PAGE = 4096

# Register order of elf_gregset_t: arch/x86/include/asm/user_64.h, user_32.h, arm64 uapi ptrace.h.
_X86_64_NAMES = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss "
    "fs_base gs_base ds es fs gs"
)
_I386_NAMES = "ebx ecx edx esi edi ebp eax ds es fs gs orig_eax eip cs eflags esp ss"
_REGISTERS = {
    "x86_64": _X86_64_NAMES.split(),
    "i386": _I386_NAMES.split(),
    "aarch64": [f"x{number}" for number in range(31)] + ["sp", "pc", "pstate"],
}
_STACK_POINTER = {"x86_64": "rsp", "i386": "esp", "aarch64": "sp"}
_PROGRAM_COUNTER = {"x86_64": "rip", "i386": "eip", "aarch64": "pc"}
_I386_GS = 0x33


@dataclass
class _Segment:
    kind: int
    flags: int
    address: int
    memory_bytes: int
    content: Content
    file_bytes: int | None
    """What p_filesz claims; None for the truth."""
    file_offset: int | None
    """What p_offset claims; None for the truth."""
    physical: int
    """p_paddr."""


class CoreBuilder:
    """One core. Every ``add_`` method gives the builder back, so that calls can be chained."""

    def __init__(self, elf_class: int = 64, machine: str = "x86_64", page_bytes: int = _PAGE) -> None:
        self.elf_class = elf_class
        self.machine = machine
        self.word_bytes = elf_class // 8
        self.word = "Q" if elf_class == 64 else "I"
        self.elf_type = 4
        self.elf_data = 1
        self.os_abi = 0
        self.machine_number = _MACHINES.get(machine, 0)
        self.program_header_entry_bytes: int | None = None
        self.section_header_count: int | None = None
        self.force_extended_count = False
        self.page_bytes = page_bytes
        self.auxv: dict[int, int] = {6: page_bytes}
        self.pid, self.parent_pid, self.uid = 4242, 1, 1000
        self.name, self.arguments = b"program", b"program --option value"
        self.signal, self.signal_code, self.fault_address = 6, -6, 0
        self.with_process_info = True
        self.with_signal_info = True
        self.with_auxv = True
        self.writer = "kernel"
        self._segments: list[_Segment] = []
        self._bulk: list[tuple[np.ndarray, np.ndarray, int]] = []
        self._threads: list[bytes] = []
        self._files: list[tuple[int, int, int, bytes]] = []
        self._notes: list[bytes] = []

    # What is in the core

    def add_segment(
        self,
        address: int,
        data: Content | None = None,
        memory_bytes: int | None = None,
        flags: str = "rw-",
        *,
        file_bytes: int | None = None,
        file_offset: int | None = None,
        kind: int = 1,
        physical: int = 0,
    ) -> CoreBuilder:
        """A PT_LOAD: ``data`` is what is saved of it, ``memory_bytes`` its size (default: the
        data's).

        ``file_bytes`` and ``file_offset`` make the program header lie.
        """
        content = b"" if data is None else data
        size = len(content) if memory_bytes is None else memory_bytes
        bits = sum(bit for letter, bit in (("r", 4), ("w", 2), ("x", 1)) if letter in flags)
        self._segments.append(_Segment(kind, bits, address, size, content, file_bytes, file_offset, physical))
        return self

    def add_empty_segments(self, addresses: np.ndarray, memory_bytes: np.ndarray, flags: int = 6) -> CoreBuilder:
        """Many segments at once, none of them saved, as columns."""
        self._bulk.append((addresses, memory_bytes, flags))
        return self

    def add_thread(
        self,
        lwp: int = 4242,
        *,
        registers: Mapping[str, int] | None = None,
        stack_pointer: int = 0,
        program_counter: int = 0,
        thread_pointer: int | None = None,
        signal: int = 0,
        extra_notes: Sequence[tuple[bytes, int, bytes]] = (),
        floating_point: bool = True,
    ) -> CoreBuilder:
        """A thread; the first one carries the signal and, as the kernel does it, the notes of the
        process."""
        values = dict(registers or {})
        values.setdefault(_STACK_POINTER[self.machine], stack_pointer)
        values.setdefault(_PROGRAM_COUNTER[self.machine], program_counter)
        rest: list[tuple[bytes, int, bytes]] = []
        if floating_point:
            rest.append((b"CORE", 2, bytes(512)))
        if thread_pointer is not None:
            if self.machine == "x86_64":
                values.setdefault("fs_base", thread_pointer)
            elif self.machine == "aarch64":
                rest.append((b"LINUX", 0x401, struct.pack("<Q", thread_pointer)))
            else:
                values.setdefault("gs", _I386_GS)
                entries = ((_I386_GS >> 3, thread_pointer, 0xFFFFF, 0x51), (7, 0, 0, 0x28))
                rest.append((b"LINUX", 0x200, b"".join(struct.pack("<4I", *row) for row in entries)))
        status = note(b"CORE", 1, self.status(lwp, signal or self._signal_of_next(), values))
        self._threads.append(status)
        self._threads.append(b"".join(note(*row) for row in (*rest, *extra_notes)))
        return self

    def add_threads(self, count: int, first_lwp: int = 10_000) -> CoreBuilder:
        """Many threads at once: lwp counts up, the stack pointer is 16 times the lwp, fs_base 256
        times."""
        if not self._threads:
            self.add_thread(
                first_lwp,
                stack_pointer=first_lwp * 16,
                registers={"fs_base": first_lwp * 256} if self.machine == "x86_64" else None,
            )
            first_lwp, count = first_lwp + 1, count - 1
        plain = note(b"CORE", 1, self.status(0, 0, {})) + note(b"CORE", 2, bytes(512))
        rows = np.tile(np.frombuffer(plain, np.uint8), (count, 1))
        body = 12 + 8
        lwp = np.arange(first_lwp, first_lwp + count, dtype="<u4")
        pid_at = 32 if self.word_bytes == 8 else 24
        registers_at = 112 if self.word_bytes == 8 else 72
        names = _REGISTERS[self.machine]

        def put(at: int, values: np.ndarray) -> None:
            raw = values.view(np.uint8).reshape(count, -1)
            rows[:, body + at : body + at + raw.shape[1]] = raw

        word = "<u8" if self.word_bytes == 8 else "<u4"
        put(pid_at, lwp)
        stack = names.index(_STACK_POINTER[self.machine])
        put(registers_at + stack * self.word_bytes, (lwp.astype(word) * 16).astype(word))
        if self.machine == "x86_64":
            at = registers_at + names.index("fs_base") * 8
            put(at, lwp.astype(word) * 256)
        self._threads.append(rows.tobytes())
        return self

    def add_file_mapping(self, start: int, end: int, file_offset: int, path: str | bytes) -> CoreBuilder:
        """A row of NT_FILE; ``file_offset`` in bytes."""
        raw = path.encode() if isinstance(path, str) else path
        self._files.append((start, end, file_offset, raw))
        return self

    def add_note(self, owner: bytes, kind: int, descriptor: bytes) -> CoreBuilder:
        """Any other note, behind all others."""
        self._notes.append(note(owner, kind, descriptor))
        return self

    def add_raw_notes(self, raw: bytes) -> CoreBuilder:
        """Bytes as they are, behind all notes."""
        self._notes.append(raw)
        return self

    # The pieces

    def status(self, lwp: int, signal: int, registers: Mapping[str, int]) -> bytes:
        """struct elf_prstatus."""
        names = _REGISTERS[self.machine]
        unknown = set(registers) - set(names)
        assert not unknown, f"no such registers: {unknown}"
        mask = (1 << self.elf_class) - 1
        values = [registers.get(name, 0) & mask for name in names]
        head = struct.pack("<3ih", signal, 0, 0, signal)
        head += bytes(-len(head) % self.word_bytes)
        head += struct.pack(f"<2{self.word}4i", 0, 0, lwp, self.parent_pid, lwp, lwp)
        head += bytes(8 * self.word_bytes)
        tail = struct.pack("<i", 1)
        body = head + struct.pack(f"<{len(values)}{self.word}", *values) + tail
        return body + bytes(-len(body) % self.word_bytes)

    def process_info(self) -> bytes:
        """struct elf_prpsinfo; 16-bit user ids on i386."""
        ids = struct.pack("<2I" if self.elf_class == 64 else "<2H", self.uid & 0xFFFFFFFF, 0)
        head = bytes(self.word_bytes) + bytes(self.word_bytes) + ids
        head += struct.pack("<4i", self.pid, self.parent_pid, self.pid, self.pid)
        return head + self.name[:16].ljust(16, b"\0") + self.arguments[:80].ljust(80, b"\0")

    def signal_info(self) -> bytes:
        """siginfo_t of the signal that killed the process."""
        head = struct.pack("<3i", self.signal, 0, self.signal_code)
        head += bytes(4 if self.elf_class == 64 else 0)
        return (head + struct.pack(f"<{self.word}", self.fault_address)).ljust(128, b"\0")

    def auxiliary_vector(self) -> bytes:
        pairs = [*self.auxv.items(), (0, 0)]
        return b"".join(struct.pack(f"<2{self.word}", tag, value) for tag, value in pairs)

    def file_table(self) -> bytes:
        """The descriptor of NT_FILE."""
        rows = [struct.pack(f"<2{self.word}", len(self._files), self.page_bytes)]
        for start, end, offset, _ in self._files:
            rows.append(struct.pack(f"<3{self.word}", start, end, offset // self.page_bytes))
        return b"".join(rows) + b"".join(path + b"\0" for *_, path in self._files)

    def notes(self) -> bytes:
        """The content of PT_NOTE in the order of ``writer``: "kernel", "gdb", "qemu"."""
        info = note(b"CORE", 3, self.process_info()) if self.with_process_info else b""
        signal = note(b"CORE", 0x53494749, self.signal_info()) if self.with_signal_info else b""
        auxv = note(b"CORE", 6, self.auxiliary_vector()) if self.with_auxv else b""
        files = note(b"CORE", 0x46494C45, self.file_table()) if self._files else b""
        others = b"".join(self._notes)
        if self.writer == "gdb":
            return info + b"".join(self._threads) + signal + auxv + files + others
        if self.writer == "qemu":
            return b"".join(self._threads[:1]) + info + auxv + b"".join(self._threads[2:]) + others
        process = info + signal + auxv + files
        if not self._threads:
            return process + others
        return self._threads[0] + process + b"".join(self._threads[1:]) + others

    # The file

    def parts(self) -> Iterator[tuple[int, Content]]:
        """(file offset, content) of all that is in the file, in order; what lies between is
        zero."""
        header_bytes = 64 if self.elf_class == 64 else 52
        entry_bytes = 56 if self.elf_class == 64 else 32
        notes = self.notes()
        bulk = sum(len(addresses) for addresses, _, _ in self._bulk)
        count = 1 + len(self._segments) + bulk
        notes_at = header_bytes + count * entry_bytes
        position = _aligned(notes_at + len(notes), self.page_bytes)
        first_data = position
        headers = [self._program_header(4, 0, notes_at, 0, len(notes), 0)]
        contents: list[tuple[int, Content]] = []
        for segment in self._segments:
            offset = position
            stored = len(segment.content)
            headers.append(
                self._program_header(
                    segment.kind,
                    segment.flags,
                    offset if segment.file_offset is None else segment.file_offset,
                    segment.address,
                    stored if segment.file_bytes is None else segment.file_bytes,
                    segment.memory_bytes,
                    segment.physical,
                )
            )
            if stored:
                contents.append((offset, segment.content))
                position = _aligned(offset + stored, self.page_bytes)
        headers += [self._bulk_headers(*columns, first_data) for columns in self._bulk]
        extended = count >= 0xFFFF or self.force_extended_count
        sections_at = 0
        if extended:
            sections_at = contents[-1][0] + len(contents[-1][1]) if contents else notes_at + len(notes)
        yield 0, self._header(count, extended, sections_at)
        yield header_bytes, b"".join(headers)
        yield notes_at, notes
        yield from contents
        if extended:
            info_at = 44 if self.elf_class == 64 else 28
            section = bytearray(64 if self.elf_class == 64 else 40)
            section[info_at : info_at + 4] = struct.pack("<I", count)
            yield sections_at, bytes(section)

    def build(self) -> bytes:
        """The core as bytes."""
        parts = list(self.parts())
        core = bytearray(max(offset + len(content) for offset, content in parts))
        for offset, content in parts:
            core[offset : offset + len(content)] = content
        return bytes(core)

    def write(self, path: Path, *, sparse: bool = False) -> Path:
        """Write the core to a file, ``sparse`` leaves out whole pages of zeros as the kernel
        does."""
        with open(path, "wb") as file:
            end = 0
            for offset, content in self.parts():
                end = offset + len(content)
                if not sparse:
                    file.seek(offset)
                    file.write(content)
                    continue
                raw = memoryview(content)
                for at in range(0, len(raw), _PAGE):
                    page = raw[at : at + _PAGE]
                    if np.frombuffer(page, np.uint8).any():
                        file.seek(offset + at)
                        file.write(page)
            file.truncate(end)
        return path

    def _header(self, count: int, extended: bool, sections_at: int) -> bytes:
        word = self.word
        identity = b"\x7fELF" + bytes([2 if self.elf_class == 64 else 1, self.elf_data, 1, self.os_abi])
        header_bytes = 64 if self.elf_class == 64 else 52
        entry_bytes = 56 if self.elf_class == 64 else 32
        section_count = self.section_header_count
        if section_count is None:
            section_count = 1 if extended else 0
        return identity.ljust(16, b"\0") + struct.pack(
            f"<2HI3{word}I6H",
            self.elf_type,
            self.machine_number,
            1,
            0,
            header_bytes,
            sections_at,
            0,
            header_bytes,
            self.program_header_entry_bytes or entry_bytes,
            0xFFFF if extended else count,
            (64 if self.elf_class == 64 else 40) if extended else 0,
            section_count,
            0,
        )

    def _program_header(
        self, kind: int, flags: int, offset: int, address: int, file_bytes: int, memory_bytes: int, physical: int = 0
    ) -> bytes:
        alignment = 4 if kind == 4 else self.page_bytes
        if self.elf_class == 64:
            return struct.pack("<2I6Q", kind, flags, offset, address, physical, file_bytes, memory_bytes, alignment)
        return struct.pack("<8I", kind, offset, address, physical, file_bytes, memory_bytes, flags, alignment)

    def _bulk_headers(self, addresses: np.ndarray, memory_bytes: np.ndarray, flags: int, offset: int) -> bytes:
        names64 = "kind:u4 flags:u4 offset:u8 address:u8 physical:u8 file:u8 memory:u8 align:u8"
        names32 = "kind:u4 offset:u4 address:u4 physical:u4 file:u4 memory:u4 flags:u4 align:u4"
        fields: list[Any] = [
            (name, f"<{kind}")
            for name, _, kind in (
                field.partition(":") for field in (names64 if self.elf_class == 64 else names32).split()
            )
        ]
        table = np.zeros(len(addresses), np.dtype(fields))
        table["kind"], table["flags"], table["offset"] = 1, flags, offset
        table["address"], table["memory"], table["align"] = addresses, memory_bytes, self.page_bytes
        return table.tobytes()

    def _signal_of_next(self) -> int:
        return self.signal if not self._threads else 0


def note(owner: bytes, kind: int, descriptor: bytes) -> bytes:
    """One ELF note with its padding."""
    name = owner + b"\0"
    return b"".join(
        (
            struct.pack("<3I", len(name), len(descriptor), kind),
            name + bytes(-len(name) % 4),
            descriptor + bytes(-len(descriptor) % 4),
        )
    )


def elf_image(
    *,
    elf_class: int = 64,
    machine: str = "x86_64",
    build_id: bytes | None = b"\x11" * 20,
    base: int = 0,
    text: bytes = b"",
    symbols: Mapping[str, int] | None = None,
    elf_type: int = 3,
    total_bytes: int = 2 * _PAGE,
    data_bytes: int = _PAGE,
    bss_bytes: int = 0,
) -> bytes:
    """A small shared library as a file: a read-only load segment with header and build-id, then a
    writable one.

    ``text`` lies at 0x800 of the first segment. ``symbols`` become a .symtab of functions, named
    and with values. The writable segment of ``data_bytes`` follows at ``total_bytes - data_bytes``,
    in file and memory alike, but for ``bss_bytes`` that it has in memory only.
    """
    word = "Q" if elf_class == 64 else "I"
    header_bytes, entry_bytes = (64, 56) if elf_class == 64 else (52, 32)
    notes = note(b"GNU", 3, build_id) if build_id is not None else b""
    notes_at = 0x400
    split = total_bytes - data_bytes

    def program_header(kind: int, flags: int, offset: int, size: int, more: int = 0) -> bytes:
        if elf_class == 64:
            return struct.pack(
                "<2I6Q",
                kind,
                flags,
                offset,
                base + offset,
                0,
                size,
                size + more,
                _PAGE if kind == 1 else 4,
            )
        alignment = _PAGE if kind == 1 else 4
        return struct.pack("<8I", kind, offset, base + offset, 0, size, size + more, flags, alignment)

    headers = [program_header(1, 5, 0, split), program_header(1, 6, split, data_bytes, bss_bytes)]
    if notes:
        headers.append(program_header(4, 4, notes_at, len(notes)))
    image = bytearray(total_bytes)
    image[notes_at : notes_at + len(notes)] = notes
    image[0x800 : 0x800 + len(text)] = text
    sections_at = section_count = 0
    tail = b""
    if symbols:
        strings = b"\0" + b"".join(name.encode() + b"\0" for name in symbols)
        offset, rows = 1, []
        rows.append(bytes(24 if elf_class == 64 else 16))
        for name, value in symbols.items():
            if elf_class == 64:
                rows.append(struct.pack("<IBBHQQ", offset, 0x12, 0, 1, value, 16))
            else:
                rows.append(struct.pack("<IIIBBH", offset, value, 16, 0x12, 0, 1))
            offset += len(name) + 1
        table = b"".join(rows)
        table_at, strings_at = total_bytes, total_bytes + len(table)
        sections_at = _aligned(strings_at + len(strings), 8)
        section_count = 3

        def section(kind: int, at: int, size: int, link: int, entry: int) -> bytes:
            return struct.pack(f"<2I4{word}2I2{word}", 0, kind, 0, 0, at, size, link, 0, 1, entry)

        tail = table + strings
        tail += bytes(sections_at - total_bytes - len(tail))
        tail += section(0, 0, 0, 0, 0)
        tail += section(2, table_at, len(table), 2, 24 if elf_class == 64 else 16)
        tail += section(3, strings_at, len(strings), 0, 0)
    header = b"\x7fELF" + bytes([2 if elf_class == 64 else 1, 1, 1]) + bytes(9)
    header += struct.pack(
        f"<2HI3{word}I6H",
        elf_type,
        _MACHINES[machine],
        1,
        0,
        header_bytes,
        sections_at,
        0,
        header_bytes,
        entry_bytes,
        len(headers),
        64 if elf_class == 64 else 40,
        section_count,
        0,
    )
    table_bytes = b"".join(headers)
    image[: len(header)] = header
    image[len(header) : len(header) + len(table_bytes)] = table_bytes
    return bytes(image) + tail


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
