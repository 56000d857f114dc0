"""What data says, on a terminal: it may be of any length and hold anything, also what a terminal obeys."""

import re
from typing import Final

#: Control characters but for tab and newline.
_OBEYED: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(content: bytes | str) -> str:
    text = content.decode(errors="backslashreplace") if isinstance(content, bytes) else content
    return _OBEYED.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
