"""The policy between commit and dispatch, for the person who writes it: is a file in order, and what is suspicious."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cdc_outbox.errors import ConfigurationError
from cdc_outbox.relay.policy.document import MAX_BYTES, Mistake, PolicyError, read_policy
from cdc_outbox.relay.policy.lint import warnings_of


@dataclass(frozen=True, slots=True)
class Checked:
    """What is known of a policy file. It is in order if there are no mistakes."""

    file: str
    sha256: str
    rules: int
    mistakes: list[Mistake]
    warnings: list[Mistake]


def check(file: Path, source: bytes) -> Checked:
    sha256 = hashlib.sha256(source).hexdigest()
    try:
        policy = read_policy(source)
    except PolicyError as error:
        return Checked(str(file), sha256, 0, error.mistakes, [])
    return Checked(str(file), sha256, len(policy.rules), [], warnings_of(policy))


def read_source(file: Path) -> bytes:
    """Not more than one byte too much. Raises ConfigurationError."""
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"policy {file} cannot be read: {(error.strerror or str(error)).lower()}") from error
