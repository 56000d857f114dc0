"""`cdc-outbox topics list|create`: the topics that events ask for, and making those that are missing."""

from dataclasses import asdict

import click
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cdc_outbox.cli.main import Settings
from cdc_outbox.cli.terminal import printable
from cdc_outbox.errors import ConfigurationError
from cdc_outbox.operations.topics import WantedTopic, create_topics, find_topics
from cdc_outbox.service.logs import say

_types = click.argument("aggregate_types", nargs=-1, metavar="[AGGREGATE_TYPE]...")


@click.group()
def command() -> None:
    """Topics that events ask for: see them, and create those that are missing."""


@command.command("list")
@_types
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def list_(settings: Settings, *, aggregate_types: tuple[str, ...], as_json: bool) -> None:
    """List the topics that kafka.topic makes of the outbox's rows, or of AGGREGATE_TYPEs, and which are there.

    Without types it reads the outbox, and needs a role with SELECT on it.
    """
    topics = find_topics(settings.config, aggregate_types)
    if as_json:
        click.echo(orjson.dumps([asdict(topic) for topic in topics]))
        return
    if not topics:
        click.echo("no row of the outbox asks for a topic")
        return
    table = Table("topic", "there", "rows")
    for topic in topics:
        table.add_row(Text(printable(topic.name)), _there(topic), str(topic.waiting or ""))
    Console().print(table)


@command.command()
@_types
@click.option("--partitions", type=click.IntRange(min=1), help="Of each; the broker's default if not given.")
@click.option("--replication-factor", type=click.IntRange(min=1), help="Of each; the broker's default if not given.")
@click.pass_obj
def create(
    settings: Settings, *, aggregate_types: tuple[str, ...], partitions: int | None, replication_factor: int | None
) -> None:
    """Create the topics that `list` shows as missing."""
    topics = find_topics(settings.config, aggregate_types)
    for topic in topics:
        if topic.refusal and aggregate_types:
            raise ConfigurationError(topic.refusal, hint="narrow or widen kafka.topic_pattern, or name another type")
        if topic.refusal:
            say(f"passed over: {topic.refusal}")
    created = 0
    for topic in create_topics(settings.config, topics, partitions=partitions, replication_factor=replication_factor):
        created += 1
        click.echo(f"created {topic.name}")
    if not created:
        click.echo("nothing to do")


def _there(topic: WantedTopic) -> str:
    if topic.refusal:
        return "[yellow]not allowed[/]"
    if topic.partitions is None:
        return "[yellow]missing[/]"
    return f"{topic.partitions} partition{'s' if topic.partitions > 1 else ''}"
