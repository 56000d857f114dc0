"""The topic template: from the values of a row's columns to the name of a topic, and what data may name.

Pure.
"""

import re
from string import Formatter
from typing import Final

from cdc_outbox.errors import ConfigurationError, PoisonEvent

_LONGEST_TOPIC: Final = 249
#: What Kafka takes as a topic's name at all (org.apache.kafka.common.internals.Topic), but for "." and "..".
_LEGAL_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")


class TopicTemplate:
    """``outbox.{aggregate_type}``: literal text and column names in braces.

    ``pattern`` is what every resulting topic must match as a whole. The default allows any legal characters where the
    template has a placeholder, so that data chooses only what the template lets it choose.
    Raises ConfigurationError for a template or pattern that cannot be read.
    """

    def __init__(self, template: str, pattern: str | None = None) -> None:
        try:
            parts = list(Formatter().parse(template))
        except ValueError as error:
            raise ConfigurationError(f"kafka.topic = {template!r}: {error}") from error
        if not template or any(name == "" or spec or conversion for _, name, spec, conversion in parts):
            raise ConfigurationError(
                f"kafka.topic = {template!r} is not a template",
                hint="write column names in braces, e.g. outbox.{aggregate_type}",
            )
        if not _is_legal("".join(literal + ("x" if name else "") for literal, name, _, _ in parts)):
            raise ConfigurationError(
                f"kafka.topic = {template!r} makes no topic that Kafka would take",
                hint=f"use letters, digits, dots, underscores and hyphens, at most {_LONGEST_TOPIC}",
            )
        self.text = template
        self.fields = tuple(name for _, name, _, _ in parts if name)
        self._format = "".join(_escape(literal) + ("{}" if name else "") for literal, name, _, _ in parts)
        derived = "".join(re.escape(literal) + ("[A-Za-z0-9._-]+" if name else "") for literal, name, _, _ in parts)
        try:
            self._pattern = re.compile(pattern or derived)
        except re.error as error:
            raise ConfigurationError(f"kafka.topic_pattern = {pattern!r}: {error}") from error

    def render(self, values: tuple[bytes | None, ...]) -> str:
        """The topic for the values of ``fields``. Raises PoisonEvent if data would name a topic it must not."""
        topic = self.fill_in(values)
        if topic is None:
            raise PoisonEvent(
                f"column {self.fields[values.index(None)]} is NULL, but kafka.topic is {self.text!r}",
                reason="topic_unknown",
            )
        self.check(topic)
        return topic

    def allows(self, topic: str) -> bool:
        """Whether data may name it."""
        return _is_legal(topic) and self._pattern.fullmatch(topic) is not None

    def check(self, topic: str) -> None:
        """Raises PoisonEvent unless ``topic`` is one that data may name."""
        if not self.allows(topic):
            shown = repr(topic[:_LONGEST_TOPIC])
            why = f"does not match {self._pattern.pattern!r}" if _is_legal(topic) else "is no name that Kafka takes"
            raise PoisonEvent(
                f"topic {shown} {why}",
                reason="topic_not_allowed",
                hint="correct what writes the row, or widen kafka.topic_pattern",
            )

    def fill_in(self, values: tuple[bytes | None, ...]) -> str | None:
        """The topic as the data would have it, allowed or not; None if a value is missing."""
        if None in values:
            return None
        return self._format.format(*(value.decode(errors="replace") for value in values if value is not None))


def _is_legal(topic: str) -> bool:
    return _LEGAL_TOPIC.fullmatch(topic) is not None and topic not in (".", "..")


def _escape(literal: str) -> str:
    return literal.replace("{", "{{").replace("}", "}}")
