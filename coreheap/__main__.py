"""``python -m coreheap``: the same as the ``coreheap`` command."""

try:
    import sys

    from coreheap.cli import main
except KeyboardInterrupt:
    from os import _exit

    _exit(130)

sys.exit(main())
