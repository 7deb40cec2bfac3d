"""The errors that coreheap raises on purpose.

Knows: what went wrong, where, what was expected, what was found and what to do next.
Does not know: exit codes, colours, or how a message is printed (``cli`` does that at one place).
"""

from __future__ import annotations

from coreheap.quantities import format_address


class CoreheapError(Exception):
    """Root of every error that coreheap raises on purpose.

    ``where`` names a file or an address, ``next_step`` says what the user can do; each may be empty.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str = "",
        expected: str = "",
        found: str = "",
        next_step: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.expected = expected
        self.found = found
        self.next_step = next_step

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.message}" if self.where else self.message]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.found:
            parts.append(f"found {self.found}")
        return "; ".join(parts)


class UsageError(CoreheapError):
    """The caller asked for something that does not exist or does not fit together."""


class InputNotUsable(CoreheapError):
    """The input cannot be analysed at all: not a core, of no known kind, or unreadable."""


class UnsupportedCore(InputNotUsable):
    """A well-formed core of a kind that coreheap does not analyse (byte order, machine)."""


class OutputNotWritten(CoreheapError):
    """The result could not be written; nothing half-written is left behind."""


class MemoryFault(CoreheapError):
    """Bytes were asked for that the core does not hold. They are unknown, not zero.

    ``address`` is the first byte that is missing, ``cause`` one of ``corefile.memory.Backing``'s names
    in lower case, or ``unmapped``.
    """

    def __init__(self, address: int, cause: str, byte_count: int = 1) -> None:
        super().__init__(
            f"memory at {format_address(address)} is not in the core ({cause})",
            where=format_address(address),
            expected=f"{byte_count} saved bytes",
            found=cause,
        )
        self.address = address
        self.cause = cause
