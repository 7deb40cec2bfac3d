"""How malloc and a JVM were set, read out of a core: ``read_settings``."""

from coreheap.knobs.malloc import read_settings

__all__ = ["read_settings"]
