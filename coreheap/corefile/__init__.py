"""ELF cores of Linux processes: threads, memory and modules, and nothing of malloc.

``open_core(path)`` gives a ``Core``. What was not saved is never read as zero: it raises
MemoryFault.
"""

from coreheap.corefile.core import Core, open_core
from coreheap.corefile.holes import HoleMeaning
from coreheap.corefile.mapped_files import MappedFile, MappedFiles
from coreheap.corefile.memory import AddressSpace, Region
from coreheap.corefile.modules import Module
from coreheap.corefile.notes import Note
from coreheap.corefile.process import AUXV_NAMES, InitialStack, ProcessFacts
from coreheap.corefile.regions import Backing
from coreheap.corefile.symbols import ElfFile, Symbol
from coreheap.corefile.threads import Thread, ThreadTable

__all__ = [
    "AUXV_NAMES",
    "AddressSpace",
    "Backing",
    "Core",
    "ElfFile",
    "HoleMeaning",
    "InitialStack",
    "MappedFile",
    "MappedFiles",
    "Module",
    "Note",
    "ProcessFacts",
    "Region",
    "Symbol",
    "Thread",
    "ThreadTable",
    "open_core",
]
