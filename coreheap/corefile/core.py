"""A core file, opened: the one object to ask for threads, memory and modules.

Knows: how the parts of this package fit together, and what of the file is missing. Does not know:
malloc.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from coreheap.corefile import elf
from coreheap.corefile.compression import Progress, UnpackedCore, unpack
from coreheap.corefile.elf import Bytes
from coreheap.corefile.file_guard import FileGuard
from coreheap.corefile.foreign import refuse_foreign_core
from coreheap.corefile.holes import FileExtents, HoleMeaning
from coreheap.corefile.image import CoreImage, read_image
from coreheap.corefile.local_files import FileFinder
from coreheap.corefile.mapped_files import MappedFiles, read_mapped_files
from coreheap.corefile.memory import AddressSpace
from coreheap.corefile.modules import Module, fetch_symbols, file_bytes_of, find_modules, rights_by_headers
from coreheap.corefile.notes import DAMAGED_NOTES, read_notes, text_of, writer_of
from coreheap.corefile.process import (
    AT_EXECFN,
    AT_PAGESZ,
    InitialStack,
    ProcessFacts,
    complete_auxv,
    read_auxv,
    read_initial_stack,
    read_process,
)
from coreheap.corefile.regions import regions_of
from coreheap.corefile.streams import compression_of
from coreheap.corefile.threads import Thread, ThreadTable, read_threads, threads_of
from coreheap.errors import InputNotUsable, MemoryFault, UsageError, failure_here
from coreheap.evidence import Gap

if TYPE_CHECKING:
    from coreheap.corefile.debuginfod import DebuginfodClient

DEFAULT_PAGE_BYTES: Final = 4096


class Core:
    """An ELF core of one Linux process. A context manager: ``close`` lets go of the file.

    Everything that could not be known or was left out is in ``gaps``.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int,
        file_bytes: int,
        compression: str | None,
        bytes_on_disk: int,
        finder: FileFinder,
        gaps: Sequence[Gap],
    ) -> None:
        self.path = path
        self.compression = compression
        """"zst", "lz4", "xz", "gz", or None."""
        self._descriptor = descriptor
        self._finder = finder
        self._mapping = mmap.mmap(descriptor, file_bytes, access=mmap.ACCESS_READ)
        self._guard = FileGuard(self._mapping, descriptor, os.fspath(path))
        data: Bytes = np.frombuffer(self._mapping, np.uint8)
        self.image: CoreImage = read_image(data, os.fspath(path))
        self.machine = self.image.machine
        """"x86_64", "i386" or "aarch64"."""
        self.word_bytes = self.image.header.word_bytes
        self.file_bytes = file_bytes
        """Size of the core; of a compressed one, unpacked."""
        self.bytes_on_disk = bytes_on_disk
        """Size of the file that was opened."""
        self._gaps = [*gaps, *self.image.gaps]
        segments = self.image.segments
        note_rows = segments.rows_of_kind(elf.PT_NOTE)
        places = zip(
            segments.file_offset[note_rows].tolist(),
            segments.file_bytes[note_rows].tolist(),
            strict=True,
        )
        notes = read_notes(data, self._mapping, list(places), self._gaps)
        notes_are_whole = not any(gap.cause in DAMAGED_NOTES for gap in self._gaps)
        refuse_foreign_core(notes, segments, self.image.header.bits, notes_are_whole, os.fspath(path))
        self.made_by = writer_of(notes, self.image.header.section_header_count)
        """"kernel", "gdb", "qemu" or "unknown"."""
        self.thread_table: ThreadTable = read_threads(data, self.machine, notes, self._gaps)
        """The threads as columns."""
        self.auxv: Mapping[int, int] = read_auxv(data, notes, self.word_bytes, self._gaps)
        """type -> value of the auxiliary vector; ``AUXV_NAMES`` has the names."""
        self._process = read_process(data, self.machine, notes, self.thread_table, self._gaps)
        files = read_mapped_files(data, notes, self.word_bytes, self._gaps)
        self.memory = self._address_space(data, files)
        self.auxv = complete_auxv(self.memory, self.auxv, self._gaps)
        self.page_bytes = self.memory.page_bytes = self._page_bytes()
        self.memory.use_file_bytes(lambda: file_bytes_of(self.modules))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; views of its memory that are still held keep it mapped."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        self.memory.release()
        # A view may still be held somewhere; Python unmaps the file with the last of them.
        with contextlib.suppress(BufferError):
            self._mapping.close()
            self._guard.release()

    def check_files(self) -> None:
        """Raises InputNotUsable where the core, or a file of a module, lost bytes since it was opened."""
        self._guard.check()
        self._finder.check_files()

    @property
    def change(self) -> str:
        """What happened to the core's file since it was opened, in words; "" for nothing that shows."""
        return self._guard.change_since(self._descriptor)

    @cached_property
    def threads(self) -> tuple[Thread, ...]:
        """The threads in the order of the core, first the one that it was written for."""
        return threads_of(self.thread_table)

    @cached_property
    def process(self) -> ProcessFacts:
        """What is known of the process."""
        return replace(self._process, executable=self._executable_path())

    @cached_property
    def initial_stack(self) -> InitialStack | None:
        """Arguments and environment at the start of the program; None when not in the core."""
        return read_initial_stack(self.memory, self.auxv)

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """The ELF objects in the process, found on first use."""
        # While modules are looked for, memory is the core's alone: bytes of files need modules first.
        self.memory.use_file_bytes(tuple)
        found = find_modules(self.memory, self.auxv, self._finder, self._gaps)
        self.memory.use_file_bytes(lambda: file_bytes_of(found))
        self.memory.region_flags = rights_by_headers(self.memory, found)
        return found

    def fetch_symbols(self, module: Module) -> None:
        """Ask debuginfod servers for files of a module that are not on this machine.

        Does nothing unless the core was opened with ``debuginfod``. For modules whose symbols an analysis needs, and
        no others: what is asked for leaves this machine.
        """
        if fetch_symbols(module, self._finder, self._gaps):
            self.memory.use_file_bytes(lambda: file_bytes_of(self.modules))

    @property
    def main_module(self) -> Module | None:
        """The program's own module."""
        return next((module for module in self.modules if module.is_executable), None)

    def module_at(self, address: int) -> Module | None:
        """The module whose range holds an address."""
        for module in self.modules:
            if module.start <= address < module.end:
                return module
        return None

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """All that is missing or contradictory, modules included."""
        _ = self.modules
        return tuple(self._gaps)

    @property
    def saved_bytes(self) -> int:
        """Bytes of memory in the core."""
        return self.memory.saved_bytes

    @property
    def coverage(self) -> float:
        """Share of the bytes promised by program headers that the file has; 1.0 if whole."""
        return self.image.coverage

    @property
    def truncated(self) -> bool:
        return self.image.truncated

    def _executable_path(self) -> str:
        main = self.main_module
        if main is not None and main.path:
            return main.path
        try:
            return text_of(self.memory.read_text(self.auxv.get(AT_EXECFN, 0)))
        except MemoryFault:
            return ""

    def _page_bytes(self) -> int:
        page_bytes = self.auxv.get(AT_PAGESZ, 0)
        if 4096 <= page_bytes <= 1 << 20 and page_bytes & (page_bytes - 1) == 0:
            return page_bytes
        self._gaps.append(
            Gap(
                "page_size_unknown",
                f"no usable AT_PAGESZ; pages are taken to be {DEFAULT_PAGE_BYTES} bytes",
            )
        )
        return DEFAULT_PAGE_BYTES

    def _address_space(self, data: Bytes, files: MappedFiles) -> AddressSpace:
        image = self.image
        bits = image.header.bits
        regions, runs, gaps = regions_of(image.segments, files, self.file_bytes, bits)
        self._gaps += gaps
        if image.truncated:
            missing = image.promised_bytes - image.present_bytes
            self._gaps.append(
                Gap(
                    "core_truncated",
                    f"the file ends {missing} bytes before the core does; that memory is unknown",
                )
            )
        meaning = HoleMeaning.ZERO_PAGES
        if self.made_by == "kernel" and self.compression is None:
            meaning = HoleMeaning.NEVER_POPULATED
        return AddressSpace(
            data,
            regions,
            runs,
            files,
            machine=self.machine,
            word_bytes=self.word_bytes,
            page_bytes=DEFAULT_PAGE_BYTES,
            extents=FileExtents(self._descriptor, self.file_bytes, meaning),
        )


def open_core(
    path: str | os.PathLike[str],
    *,
    executable: Path | None = None,
    sysroot: Path | None = None,
    debug_directories: Sequence[Path] = (),
    debuginfod: bool = False,
    progress: Progress | None = None,
    unpacked_limit: int | None = None,
) -> Core:
    """Open a core, unpacking it first where it is compressed.

    With ``debuginfod`` the servers in the environment's DEBUGINFOD_URLS are asked for symbols that
    the analysis needs and no local file gives; without it nothing is ever asked of a network. A compressed core may
    unpack to ``unpacked_limit`` bytes; None: to what compressed cores of real processes unpack to at most.

    Raises UsageError with ``debuginfod`` where DEBUGINFOD_URLS names no server, InputNotUsable when
    the file is missing, unreadable, no core, or a compressed core that cannot be unpacked,
    UnsupportedCore for a core of a machine or system that coreheap does not know, and FailedHere where this machine has
    not the room, memory or files that it takes.
    """
    client = _debuginfod_client() if debuginfod else None
    where = os.fspath(path)
    descriptor = _open_regular_file(where)
    gaps: list[Gap] = []
    compression: str | None = None
    try:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            compression = compression_of(file)
        file_bytes = bytes_on_disk = os.fstat(descriptor).st_size
        if compression is not None:
            unpacked = _unpack(descriptor, compression, where, progress, unpacked_limit)
            os.close(descriptor)
            descriptor, file_bytes = unpacked.descriptor, unpacked.file_bytes
            if unpacked.damage:
                gaps.append(
                    Gap(
                        "compressed_stream_damaged",
                        f"{unpacked.damage}; what came before is analysed",
                    )
                )
            if unpacked.padding.byte_count:
                content = "zeros" if unpacked.padding.is_zeros else "bytes"
                gaps.append(
                    Gap(
                        "compressed_stream_padded",
                        f"{unpacked.padding.byte_count} {content} after the end of the {compression} stream are no part of"
                        " it; the core before them is whole",
                    )
                )
        before_fetch = (lambda: progress("asking debuginfod", 0, None)) if progress else (lambda: None)
        finder = FileFinder(executable, sysroot, debug_directories, client, before_fetch)
        core = Core(Path(where), descriptor, file_bytes, compression, bytes_on_disk, finder, gaps)
        core.check_files()
        return core
    except BaseException:
        os.close(descriptor)
        raise


def _debuginfod_client() -> DebuginfodClient:
    # Only now: it imports Python's HTTP client, which few need.
    from coreheap.corefile.debuginfod import client_from

    client = client_from(os.environ)
    if client is None:
        raise UsageError(
            "debuginfod was asked for and DEBUGINFOD_URLS names no server",
            expected="DEBUGINFOD_URLS with addresses of servers, separated by spaces",
            found=repr(os.environ.get("DEBUGINFOD_URLS", "")),
            next_step="export DEBUGINFOD_URLS=https://SERVER (the documentation of the process's distribution names"
            " its own), or use --debug-dir with local debug files",
        )
    return client


def _unpack(
    descriptor: int, compression: str, where: str, progress: Progress | None, limit: int | None
) -> UnpackedCore:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        return unpack(file, compression, where, progress=progress, unpacked_limit=limit)


def _open_regular_file(where: str) -> int:
    """A descriptor of the file; never waits for a fifo and opens no device."""
    try:
        status = os.stat(where)
        kind = _kind_of_file(status.st_mode)
        if kind:
            raise InputNotUsable(
                "this is not a file that can hold a core",
                where=where,
                expected="a regular file",
                found=kind,
                next_step="name the core file itself",
            )
        if status.st_size == 0:
            raise InputNotUsable(
                "the file is empty",
                where=where,
                expected="an ELF core",
                found="0 bytes",
                next_step="the core was not written: check the disk's free space and ulimit -c",
            )
        return os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        problem, step = "no such file", "check the path; coredumpctl list shows what systemd keeps"
    except PermissionError:
        problem, step = "no permission to read it", "run as the file's owner, or copy the core"
    except (OSError, ValueError) as error:
        failure = failure_here(error, where)
        if failure is not None:
            raise failure from None
        problem, step = (
            getattr(error, "strerror", None) or str(error),
            "check the path and the disk",
        )
    raise InputNotUsable(
        "the core cannot be opened",
        where=where,
        expected="a readable file",
        found=problem,
        next_step=step,
    )


def _kind_of_file(mode: int) -> str:
    """ "" for a regular file, else what it is."""
    if stat.S_ISREG(mode):
        return ""
    for test, name in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a fifo"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return name
    return "a special file"
