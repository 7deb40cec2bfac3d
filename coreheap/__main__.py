"""``python -m coreheap``: the same as the ``coreheap`` command."""

import sys

from coreheap.cli import main

sys.exit(main())
