"""The terminal: what data says on it, which may be of any length and hold anything."""

import base64
import re
from collections.abc import Mapping
from typing import Any, Final

import click
import orjson

#: Control characters but for tab and newline.
_OBEYED: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(content: bytes | str) -> str:
    text = content.decode(errors="backslashreplace") if isinstance(content, bytes) else content
    return _OBEYED.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def print_field(name: str, value: object) -> None:
    """One of many. Not in a table: a value of megabytes would take a table half a minute."""
    click.echo(f"{name:>16}  {printable(value if isinstance(value, bytes) else str(value))}")


def portable(content: bytes | None) -> dict[str, str] | None:
    """Bytes in JSON: as text where they are text, else in base64."""
    if content is None:
        return None
    try:
        return {"text": content.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def print_event(event: Mapping[str, Any], *, as_json: bool) -> None:
    """One that is kept whole: its columns, of which key and payload are bytes, headers a list of names and values."""
    if as_json:
        click.echo(orjson.dumps({**event, **{column: portable(event[column]) for column in ("key", "payload")}}))
        return
    for column, value in event.items():
        if column == "headers":
            for name, content in value or []:
                print_field("header", f"{name}: {content}")
        elif value is not None:
            print_field(column, value)
