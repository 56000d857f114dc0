"""An event's place in the stream: with slot and server, its identity."""

from typing import NamedTuple


class Position(NamedTuple):
    """Grows along the stream. Two sessions that are sent the same transaction give its events the same positions."""

    #: start of the commit record; it orders transactions, and is never confirmed
    commit_lsn: int
    #: which Insert of its transaction it is, counted from 1, whichever table each went into
    ordinal: int
