"""The caller's own transaction: one statement in it, through each driver.

``outbox`` and ``inbox`` say what is to be run; a module here, one a driver, runs it on the connection that it is given,
and refuses where there is no transaction. Nothing is opened, committed or kept. This file needs the standard library
only; each module imports its driver and nothing else.

A statement has at most one parameter, a text that holds a JSON document. PostgreSQL reads the values out of it with its
own input functions. So it does not matter how a driver would pass on a UUID, an array or JSON, nor which type a column
has.
"""

import re
import string
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

Rows: TypeAlias = list[tuple[Any, ...]]
R = TypeVar("R")

#: A name as SQL takes it: quoted, or letters, digits, underscores and dollar signs.
_NAME: Final = re.compile(r'"((?:[^"\0]|"")+)"|([^\W\d][\w$]*)')
#: PostgreSQL folds these letters and no others.
_LOWER: Final = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


class NoTransaction(RuntimeError):
    """The connection commits each statement by itself: what is written now would not stand or fall with the change."""

    def __init__(self, hint: str) -> None:
        super().__init__(f"no transaction is open on this connection, and it commits each statement by itself; {hint}")


class OpenTransaction(RuntimeError):
    """A transaction is open, and what was asked needs several, each committed at once."""

    def __init__(self) -> None:
        super().__init__("a transaction is open on this connection; commit or roll it back first, or use another one")


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL before and after its parameter; ``after`` is None if there is none. ``returns``: it has rows to fetch."""

    before: str
    after: str | None = None
    returns: bool = False

    def text(self, placeholder: str, *, escape: str = "") -> str:
        """``escape``: a character that the driver reads as its own, and that it takes literally when doubled."""
        before, after = self.before, self.after
        if after is None:
            return before
        if escape:
            before, after = before.replace(escape, 2 * escape), after.replace(escape, 2 * escape)
        return f"{before}{placeholder}{after}"


#: First in a transaction. Its later statements then see what others have committed before each of them.
READ_COMMITTED: Final = Statement("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")

#: What is to be run next, and with which parameter; is sent the rows of each, and returns what they mean.
Steps: TypeAlias = Generator[tuple[Statement, str | None], Rows, R]


def run_each(steps: Steps[R], run: Callable[[Statement, str | None], Rows]) -> R:
    """Run them one after the other."""
    try:
        step = next(steps)
        while True:
            step = steps.send(run(*step))
    except StopIteration as end:
        result: R = end.value
        return result


async def run_each_async(steps: Steps[R], run: Callable[[Statement, str | None], Awaitable[Rows]]) -> R:
    """As ``run_each``."""
    try:
        step = next(steps)
        while True:
            step = steps.send(await run(*step))
    except StopIteration as end:
        result: R = end.value
        return result


def sqlstate(error: BaseException) -> str:
    """The server's code of it, five characters, however the driver tells it; empty for what is not the server's.

    Source: the manual's appendix A, PostgreSQL Error Codes.
    """
    for told in (error, getattr(error, "orig", None), error.__cause__):  # SQLAlchemy wraps a driver's error, Django too
        code = getattr(told, "sqlstate", None) or getattr(told, "pgcode", None)
        arguments = getattr(told, "args", ())
        if not code and arguments and isinstance(arguments[0], dict):  # pg8000's
            code = arguments[0].get("C")
        if isinstance(code, str):
            return code
    return ""


def quoted(name: str) -> str:
    """An identifier for SQL."""
    return '"' + name.replace('"', '""') + '"'


def quoted_table(name: str) -> str:
    """A table named as in SQL (``app.outbox``, ``"Odd Name"``), quoted; in schema public if no other is named.

    Raises ValueError if it is not such a name.
    """
    return ".".join(map(quoted, parse_table(name)))


def parse_table(name: str) -> tuple[str, str]:
    """Schema and table. Raises ValueError."""
    parts: list[str] = []
    at = 0
    while found := _NAME.match(name, at):
        parts.append(found[1].replace('""', '"') if found[1] else found[2].translate(_LOWER))
        at = found.end()
        if at == len(name) and len(parts) <= 2:
            return ("public", parts[0]) if len(parts) == 1 else (parts[0], parts[1])
        if name[at : at + 1] != ".":
            break
        at += 1
    raise ValueError(f'{name!r} is not a table name; write it as in SQL: schema.table, or "Schema"."Table"')
