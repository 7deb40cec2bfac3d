"""The command line: arguments, progress, exit codes. The only place of coreheap that prints or exits.

Knows: users and their terminals. Does not know: heaps; it asks ``coreheap.analysis`` and hands on to ``render``.
"""

from __future__ import annotations

# Not imported from typing: nothing is imported here before signals are listened to.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run coreheap and return its exit code. ``arguments`` None takes those of the process.

    The process's own command ends at Ctrl-C from here on, whatever is imported or done at that moment.
    """
    if arguments is None:
        try:
            from coreheap.cli.signals import end_on_signals

            end_on_signals()
        except KeyboardInterrupt:
            from os import _exit

            _exit(130)
    from coreheap.cli.application import run_command

    return run_command(arguments)
