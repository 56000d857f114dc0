import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_outbox.errors import MalformedStream
from cdc_outbox.wal.frames import read_keepalive, standby_status_update
from support import frames


@given(st.integers(0, 2**64 - 1), st.booleans())
def test_keepalive(wal_end: int, reply: bool) -> None:  # noqa: FBT001 - hypothesis gives it
    assert read_keepalive(frames.keepalive(wal_end, reply=reply)) == (wal_end, reply)


@given(st.binary(max_size=40))
def test_any_other_bytes_are_refused_or_are_a_keepalive(data: bytes) -> None:
    try:
        read_keepalive(data)
    except MalformedStream:
        return
    assert len(data) == 18
    assert data[:1] == b"k"


def test_status_update_is_laid_out_as_the_manual_says() -> None:
    # byte 'r', three times the LSN, microseconds since 2000, reply byte
    update = standby_status_update(42, unix_seconds=946_684_801.5, request_reply=True)
    assert update == b"r" + struct.pack("!QQQqB", 42, 42, 42, 1_500_000, 1)


@pytest.mark.parametrize("cut", range(18))
def test_a_keepalive_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(MalformedStream):
        read_keepalive(frames.keepalive(1)[:cut])
