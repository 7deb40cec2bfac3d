"""From the process's arguments to its exit code; every error ends here.

Knows: which kind of error gives which exit code. Does not know: what went wrong inside.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from coreheap.cli.arguments import parse_arguments
from coreheap.cli.exit_codes import ExitCode
from coreheap.cli.messages import listen, say, say_defect, say_error
from coreheap.errors import CoreheapError, OutputNotWritten, UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run coreheap and return its exit code. ``arguments`` None takes those of the process."""
    if arguments is None:
        arguments = sys.argv[1:]
        signal.signal(signal.SIGTERM, _end)
    verbose = False
    try:
        request = parse_arguments(arguments)
        verbose = request.verbosity > 0
        listen(request.verbosity)
        # Imported here: numpy and all that follows is of no use to --help or to a mistake on the command line.
        from coreheap.cli.commands import run

        return run(request)
    except CoreheapError as error:
        say_error(error)
        return ExitCode.USAGE if isinstance(error, UsageError | OutputNotWritten) else ExitCode.INPUT_NOT_USABLE
    except KeyboardInterrupt:
        say("coreheap: interrupted")
        return ExitCode.INTERRUPTED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except Exception as defect:  # noqa: BLE001 - the last resort: no input may end in a traceback
        say_defect(defect, with_traceback=verbose)
        return ExitCode.DEFECT


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    """Leave on SIGTERM the way an exception does, so that no half-written file stays behind."""
    raise SystemExit(128 + signal.SIGTERM)
