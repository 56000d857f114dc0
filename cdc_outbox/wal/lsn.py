"""Log sequence numbers: byte positions in the write-ahead log.

The hot loop works on plain ints; everything that is shown or kept is an LSN.
Source: PostgreSQL manual, "pg_lsn Type".
"""

from typing import Self

from cdc_outbox.errors import MalformedStream

_MAX = 2**64 - 1


class LSN(int):
    """An LSN; prints as PostgreSQL prints it: ``0/16B3748``."""

    def __new__(cls, value: int = 0) -> Self:
        if not 0 <= value <= _MAX:
            raise MalformedStream(f"not an LSN: {value}")
        return super().__new__(cls, value)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``XXX/YYY`` (hexadecimal). Raises MalformedStream."""
        high, slash, low = text.partition("/")
        try:
            if slash and 1 <= len(high) <= 8 and 1 <= len(low) <= 8:
                return cls(int(high, 16) << 32 | int(low, 16))
        except ValueError:
            pass
        raise MalformedStream(f"not an LSN: {text!r}")

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"LSN({str(self)!r})"
