"""The SQL that makes the inbox, for whoever runs it: `cdc-outbox migrate inbox`, Django's migrations, others' tools."""

import re

from cdc_outbox import shipped_sql
from cdc_outbox.transactions import quoted_table


def sql(table: str = "public.inbox", *, partitioned: bool = False) -> str:
    """A script that may run again: sql/inbox/plain.sql or partitioned.sql, for the table that is named.

    Of a partitioned one, run it daily: it makes the coming days' partitions. Raises ValueError for what is no name.
    """
    name = quoted_table(table)
    if "$$" in name or not name.isprintable():
        raise ValueError(f"{table!r} has two dollar signs or a line's end in it, which a script cannot hold")
    literal = "'" + name.replace("'", "''") + "'"
    text = shipped_sql.read("inbox/partitioned.sql" if partitioned else "inbox/plain.sql")
    return re.sub(r"('?)public\.inbox\1", lambda found: literal if found[1] else name, text)
