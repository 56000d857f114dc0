"""The SQL that makes the inbox, for whoever runs it: `cdc-outbox migrate inbox`, Django's migrations, others' tools."""

import re

from cdc_outbox import shipped_sql
from cdc_outbox.inbox.table import beside
from cdc_outbox.transactions import quoted_table

#: What stands beside the inbox, named after it.
BESIDE = ("parked", "attempt", "version", "request")


def sql(table: str = "public.inbox", *, partitioned: bool = False) -> str:
    """One statement that may be run again: the files of sql/inbox/, for the table that is named.

    Of a partitioned one, run it daily: it makes the coming days' partitions. Raises ValueError for what is no name.
    """
    names = {"": quoted_table(table), **{f"_{name}": beside(table, name) for name in BESIDE}}
    if "$$" in names[""] or not names[""].isprintable():
        raise ValueError(f"{table!r} has two dollar signs or a line's end in it, which a script cannot hold")

    def named(found: re.Match[str]) -> str:
        name = names[found[2]]
        return "'" + name.replace("'", "''") + "'" if found[1] else name

    files = ("partitioned" if partitioned else "plain", *BESIDE)
    blocks = [shipped_sql.read(f"inbox/{file}.sql").replace("DO $$", "").replace(" $$;", ";") for file in files]
    script = "DO $$ BEGIN\n\n" + "\n".join(blocks) + "\nEND $$;\n"
    return re.sub(rf"('?)public\.inbox((?:_(?:{'|'.join(BESIDE)}))?)\1", named, script)
