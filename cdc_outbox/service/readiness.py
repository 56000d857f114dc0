"""Asking a running relay what it is doing, over HTTP."""

from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import orjson


def ask_readyz(address: str, *, timeout_seconds: float) -> dict[str, Any] | None:
    """The report of the relay that listens at ``address`` (host:port); None if none answers."""
    try:
        with _get_readyz(address, timeout_seconds) as answer:
            body = answer.read()
    except (OSError, HTTPException):
        return None
    try:
        report = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return report if isinstance(report, dict) else None


def _get_readyz(address: str, timeout_seconds: float) -> Any:
    try:
        return urlopen(f"http://{address}/readyz", timeout=timeout_seconds)
    except HTTPError as answer:  # 503 is an answer too
        return answer
