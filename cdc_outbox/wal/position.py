"""An event's place in the stream: with slot and server, its identity."""

from typing import NamedTuple


class Position(NamedTuple):
    """Grows along the stream. Two sessions that are sent the same transaction give its events the same positions."""

    #: start of the commit record; it orders transactions, and is never confirmed
    commit_lsn: int
    #: the how manieth Insert of its transaction, from 1, whichever table it went into
    ordinal: int
