"""Encodings: how the text of a database is stored, and how it gets to be UTF-8.

A database in UTF8 sends what it checked when it was written. In SQL_ASCII nothing was checked, and in others some
bytes mean nothing: the server's own conversion to UTF-8 ends the walsender at such a row, each time it is sent.
So text is asked for as it is stored, and converted here: the row is poison, and the rest flows. Encodings that Python
reads in another way than PostgreSQL (EUC_JP, EUC_KR, EUC_TW and their like) are left to the server.
Source: PostgreSQL manual, "Character Set Support".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cdc_outbox.errors import MalformedStream

#: Python's codec for each, by the server's name of the encoding.
_CODECS: Final[Mapping[str, str]] = {
    "SQL_ASCII": "utf-8",  # nobody says what it is; UTF-8 or nothing
    **{f"LATIN{number}": f"iso8859_{part}" for number, part in enumerate((1, 2, 3, 4, 9, 10, 13, 14, 15, 16), start=1)},
    **{f"ISO_8859_{part}": f"iso8859_{part}" for part in (5, 6, 7, 8)},
    **{f"WIN{page}": f"cp{page}" for page in (866, 874, *range(1250, 1259))},
    "EUC_CN": "gb2312",
    "KOI8R": "koi8_r",
    "KOI8U": "koi8_u",
}


@dataclass(frozen=True, slots=True)
class Encoding:
    """``codec`` is what values arrive in; None if the server sends UTF-8."""

    codec: str | None = None

    def to_utf8(self, value: bytes | None) -> bytes | None:
        """Raises MalformedStream for bytes that are no text."""
        if value is None or value.isascii() or self.codec is None:
            return value
        try:
            return value.decode(self.codec).encode()
        except UnicodeDecodeError as error:
            raise MalformedStream(
                f"a value is not {self.codec}: byte {value[error.start]:#04x} at {error.start}",
                hint="correct what writes the row",
            ) from error

    def text(self, value: bytes) -> str:
        """With what is no text escaped: for names, and for people."""
        return value.decode(self.codec or "utf-8", errors="backslashreplace")


UTF8: Final = Encoding()


def encoding_named(server_encoding: str) -> Encoding:
    """By PostgreSQL's name, as the server reports it when a connection is made (``server_encoding``)."""
    return Encoding(_CODECS.get(server_encoding))
