"""A length of time on the command line, as people write it: 90s, 15m, 12h, 7d; and how long a verb waits."""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import click

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_FORM: Final = re.compile(r"(\d{1,9})([smhd])", re.ASCII)


class Duration(click.ParamType[timedelta]):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        matched = _FORM.fullmatch(value)
        if matched is None:
            self.fail(f"{value!r} is not a length of time; write a number and s, m, h or d, e.g. 90s or 7d", param, ctx)
        return timedelta(**{_UNITS[matched[2]]: int(matched[1])})


def waiting(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a verb that asks somebody who runs for something, and waits for the outcome."""
    timeout = click.option(
        "--timeout", type=Duration(), default="30s", show_default=True, help="How long to wait for the outcome."
    )
    return timeout(click.option("--no-wait", is_flag=True, help="Ask, and do not wait.")(command))
