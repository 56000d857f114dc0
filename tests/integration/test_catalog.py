"""The checks that `run` makes, each made to fail for real."""

import pytest

from cdc_outbox.errors import ConfigurationError, OperatorNeeded
from cdc_outbox.postgres import catalog
from cdc_outbox.postgres.connection import connect
from cdc_outbox.postgres.publication import check_publication, wasteful
from cdc_outbox.postgres.slots import check_slot
from support.world import World


def test_everything_is_there(every_world: World) -> None:
    world = every_world
    world.migrate()
    catalog.check_server(world.db)
    table = catalog.find_table(world.db, "outbox")
    assert str(table) == "public.outbox"
    assert list(table.columns)[:3] == ["id", "aggregate_type", "aggregate_id"]
    assert wasteful(check_publication(world.db, "cdc_outbox", table).publication) == []
    slot = check_slot(world.db, world.slot)
    assert slot.lag_bytes is not None
    assert slot.retained_bytes is not None
    assert slot.safe_bytes is None


@pytest.mark.parametrize("name", ["nope", "app.nope", "pg_catalog.pg_stat_activity", "some.app.outbox"])
def test_a_table_that_is_not_there(every_world: World, name: str) -> None:
    with pytest.raises(OperatorNeeded, match=f"table {name} does not exist"):
        catalog.find_table(every_world.db, name)


@pytest.mark.parametrize("name", ["a..b", "a b", "", "a.", '"a', "a; DROP TABLE b"])
def test_a_name_that_is_none(every_world: World, name: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a table name"):
        catalog.find_table(every_world.db, name)


def test_names_are_read_as_in_sql(every_world: World) -> None:
    every_world.db.execute('CREATE SCHEMA "App"; CREATE TABLE "App"."Out.box" (x int); CREATE TABLE lower (y int)')
    assert str(catalog.find_table(every_world.db, '"App"."Out.box"')) == "App.Out.box"
    assert str(catalog.find_table(every_world.db, "Public.LOWER")) == "public.lower"
    assert catalog.find_table(every_world.db, "lower").columns == {"y": 23}


def test_publications(every_world: World) -> None:
    world = every_world
    world.migrate()
    table = catalog.find_table(world.db, "outbox")
    with pytest.raises(OperatorNeeded, match="publication 'nope' does not exist"):
        check_publication(world.db, "nope", table)
    world.db.execute("CREATE PUBLICATION empty WITH (publish = 'insert')")
    with pytest.raises(OperatorNeeded, match=r"'empty' does not list table public\.outbox") as caught:
        check_publication(world.db, "empty", table)
    assert 'ALTER PUBLICATION "empty" ADD TABLE "public"."outbox"' in caught.value.hint
    world.db.execute("CREATE PUBLICATION deletes FOR TABLE outbox WITH (publish = 'delete')")
    with pytest.raises(OperatorNeeded, match="does not publish inserts"):
        check_publication(world.db, "deletes", table)
    world.db.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    (waste,) = wasteful(check_publication(world.db, "everything", table).publication)
    assert "more than inserts" in waste


def test_a_partitioned_outbox_needs_its_root(every_world: World) -> None:
    world = every_world
    world.db.execute("CREATE TABLE parted (id int) PARTITION BY RANGE (id)")
    world.db.execute("CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10)")
    table = catalog.find_table(world.db, "parted")
    world.db.execute("CREATE PUBLICATION leaves FOR TABLE parted")
    with pytest.raises(OperatorNeeded, match="under the names of its partitions") as caught:
        check_publication(world.db, "leaves", table)
    assert "publish_via_partition_root" in caught.value.hint
    world.db.execute("ALTER PUBLICATION leaves SET (publish = 'insert', publish_via_partition_root = true)")
    assert wasteful(check_publication(world.db, "leaves", table).publication) == []


def test_a_foreign_partition_and_a_temporary_child(every_world: World) -> None:
    world = every_world
    world.db.execute("CREATE TABLE plain (id int); CREATE PUBLICATION plain FOR TABLE plain WITH (publish = 'insert')")
    world.db.execute("CREATE TEMPORARY TABLE child () INHERITS (plain)")
    check_publication(world.db, "plain", catalog.find_table(world.db, "plain"))
    world.db.execute("CREATE TABLE parted (id int) PARTITION BY RANGE (id)")
    world.db.execute("CREATE PUBLICATION parted FOR TABLE parted WITH (publish_via_partition_root)")
    world.db.execute("CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing")
    world.db.execute("CREATE FOREIGN TABLE far PARTITION OF parted DEFAULT SERVER nowhere")
    with pytest.raises(OperatorNeeded, match=r"table public\.far, of public\.parted, is a foreign table"):
        check_publication(world.db, "parted", catalog.find_table(world.db, "parted"))


def test_slots(every_world: World) -> None:
    world = every_world
    with pytest.raises(OperatorNeeded, match="'nope' does not exist"):
        check_slot(world.db, "nope")
    physical, decoding = f"{world.name}_p", f"{world.name}_d"
    world.db.execute("SELECT pg_create_physical_replication_slot(%s)", [physical])
    try:
        with pytest.raises(OperatorNeeded, match="uses physical replication, not pgoutput"):
            check_slot(world.db, physical)
    finally:
        world.db.execute("SELECT pg_drop_replication_slot(%s)", [physical])
    world.db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [decoding])
    check_slot(world.db, decoding)
    with connect(world.admin_dsn) as other, pytest.raises(OperatorNeeded, match="belongs to database"):
        check_slot(other, decoding)
