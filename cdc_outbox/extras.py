"""Extras: how to install one, which depends on how we were installed ourselves."""

import shlex
import sys
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote, urlparse

import orjson


def install_hint(extra: str) -> str:
    """The command that adds ``extra`` to this very installation."""
    what = shlex.quote(f"{_source()}[{extra}]")
    return f"{shlex.quote(sys.executable)} -m pip install {what}"


def _source() -> str:
    """A folder, where we were installed from one (PEP 610, direct_url.json); else our name."""
    try:
        recorded = distribution("cdc-outbox").read_text("direct_url.json")
    except PackageNotFoundError:
        recorded = None
    url = urlparse(orjson.loads(recorded)["url"]) if recorded else None
    return unquote(url.path) if url and url.scheme == "file" else "cdc-outbox"
