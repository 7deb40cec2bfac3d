"""From the process's arguments to its exit code; every error ends here.

Knows: which kind of error gives which exit code. Does not know: what went wrong inside.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from coreheap.cli.arguments import Request, parse_arguments
from coreheap.cli.exit_codes import ExitCode
from coreheap.cli.messages import listen, say, say_defect, say_error
from coreheap.errors import CoreheapError, FailedHere, OutputNotWritten, UsageError, failure_here

VALUES_BETWEEN_COLLECTIONS = 500_000


def run_command(arguments: Sequence[str] | None) -> int:
    """Run coreheap and return its exit code. ``arguments`` None takes those of the process."""
    if arguments is None:
        # Reports are trees of many small values: hardly any is garbage, and looking for that takes a tenth of all time.
        gc.set_threshold(VALUES_BETWEEN_COLLECTIONS)
    code = _code_of(sys.argv[1:] if arguments is None else arguments)
    if arguments is None and not _is_flushed(is_told=code != ExitCode.DONE) and code == ExitCode.DONE:
        return ExitCode.USAGE
    return code


def _code_of(arguments: Sequence[str]) -> int:
    verbose = False
    try:
        request = _request(arguments)
        verbose = request.verbosity > 0
        listen(request.verbosity)
        # Imported here: numpy and all that follows is of no use to --help or to a mistake on the command line.
        from coreheap.cli.commands import run

        return run(request)
    except CoreheapError as error:
        return _told(error)
    except KeyboardInterrupt:
        say("coreheap: interrupted")
        return ExitCode.INTERRUPTED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except Exception as defect:  # noqa: BLE001 - the last resort: no input may end in a traceback
        failure = failure_here(defect)
        if failure is not None:
            return _told(failure)
        say_defect(defect, with_traceback=verbose)
        return ExitCode.DEFECT


def _request(arguments: Sequence[str]) -> Request:
    try:
        return parse_arguments(arguments)
    except BrokenPipeError:  # --help | head
        raise SystemExit(ExitCode.DONE) from None
    except OSError as error:  # help and version are printed where arguments are read
        raise _not_printed(error) from None


def _not_printed(error: OSError) -> OutputNotWritten:
    return OutputNotWritten(f"the result could not be written: {error.strerror}", where="standard output")


def _told(error: CoreheapError) -> ExitCode:
    """Shows an error; its exit code."""
    say_error(error)
    if isinstance(error, FailedHere):
        return ExitCode.FAILED_HERE
    return ExitCode.USAGE if isinstance(error, UsageError | OutputNotWritten) else ExitCode.INPUT_NOT_USABLE


def _is_flushed(is_told: bool) -> bool:
    """Whether standard output took all that was printed (--help, --version). Python itself would say so with a traceback."""
    if sys.stdout is None:
        return True
    try:
        sys.stdout.flush()
    except ValueError:  # closed
        return True
    except OSError as error:
        # What is still buffered goes nowhere, so that Python's own flush at exit succeeds.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        if isinstance(error, BrokenPipeError) or is_told:
            return isinstance(error, BrokenPipeError)
        say_error(_not_printed(error))
        return False
    return True
