"""The version of coreheap; setup.cfg reads it from here.

Not asked of the installed metadata: ``importlib.metadata`` brings email's parsers with it, a hundredth of a second.
"""

VERSION = "0.1.0"
