"""The files of sql/: they stand at the top level for DBAs, and travel inside the package. Standard library only."""

from importlib.resources import files
from pathlib import Path


def folder() -> Path:
    """Inside the package when installed, beside it in a checkout."""
    inside = Path(str(files("cdc_outbox"))) / "sql"
    return inside if inside.is_dir() else inside.parent.parent / "sql"


def read(name: str) -> str:
    return (folder() / name).read_text(encoding="utf-8")
