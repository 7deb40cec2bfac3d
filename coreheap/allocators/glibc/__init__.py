"""glibc's malloc (ptmalloc2), 2.12 to 2.44."""

from coreheap.allocators.glibc.snapshot import GlibcAllocator

__all__ = ["GlibcAllocator"]
