"""How a message, a value or an error is kept in a row, so that it comes back as it was.

Values are bytes where the client gave bytes, text or JSON where its deserializer made that. What has no form that every
database takes (a NUL, half a character, a letter that a LATIN1 database does not have) travels as base64.
"""

import base64
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from cdc_outbox.inbox.message import Message

_LONGEST_ERROR: Final = 8_000


def stored_value(value: Any) -> tuple[str, str | None]:
    """Its kind, and its bytes in base64. Raises TypeError for what is no bytes, text or JSON."""
    if value is None:
        return "none", None
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes", _base64(bytes(value))
    if isinstance(value, str):
        return "text", _base64(value.encode(errors="surrogatepass"))
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"a {type(value).__name__} cannot be kept: it is no bytes, text or JSON ({error})") from error
    if json.loads(text) != value:  # a tuple, a key that is a number
        raise TypeError(f"a {type(value).__name__} cannot be kept: as JSON it would come back as something else")
    return "json", _base64(text.encode())


def value_of(kind: str, content: str | None) -> Any:
    if content is None:
        return None
    value = base64.b64decode(content)
    if kind == "bytes":
        return value
    return value.decode(errors="surrogatepass") if kind == "text" else json.loads(value)


def stored_message(message: Message) -> dict[str, Any]:
    """Raises TypeError for a value that cannot be kept."""
    kind, value = stored_value(message.value)
    # text in ASCII, and not JSON in JSON: the server never reads the escapes in it
    details = {"kind": kind, "type": message.type, "sequence": message.sequence, "headers": dict(message.headers)}
    return {
        "source": message.source,
        "id": message.id,
        "committed_at": message.committed_at and message.committed_at.isoformat(),
        "topic": message.topic,
        "partition": message.partition,
        "offset": message.offset,
        "key": None if message.key is None else _base64(message.key.encode(errors="surrogatepass")),
        "value": value,
        "details": json.dumps(details),
    }


def message_of(row: Mapping[str, Any]) -> Message:
    details = row["details"]
    committed_at = row["committed_at"]
    return Message(
        row["id"],
        committed_at and datetime.fromisoformat(committed_at),
        key=value_of("text", row["key"]),
        value=value_of(details["kind"], row["value"]),
        type=details["type"],
        source=row["source"],
        sequence=details["sequence"],
        topic=row["topic"],
        partition=row["partition"],
        offset=row["offset"],
        headers=details["headers"],
    )


def stored_error(error: object) -> dict[str, str]:
    """For a database in UTF-8, and for all the others."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    text = text[:_LONGEST_ERROR].replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="backslashreplace").decode()
    return {"error": _base64(text.encode()), "error_in_ascii": text.encode("ascii", "backslashreplace").decode()}


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
