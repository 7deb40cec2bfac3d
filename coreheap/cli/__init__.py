"""The command line: arguments, progress, exit codes. The only place of coreheap that prints or exits.

Knows: users and their terminals. Does not know: heaps; it asks ``coreheap.analysis`` and hands on to ``render``.
"""

from coreheap.cli.application import main

__all__ = ["main"]
