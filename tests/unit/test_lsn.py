import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_outbox.errors import MalformedStream
from cdc_outbox.wal.lsn import LSN


def test_prints_as_postgresql_does() -> None:
    assert str(LSN(0x16B3748)) == "0/16B3748"
    assert str(LSN(0x1_0000_002A)) == "1/2A"
    assert repr(LSN(0)) == "LSN('0/0')"


@given(st.integers(0, 2**64 - 1))
def test_what_is_printed_can_be_read(value: int) -> None:
    assert LSN.parse(str(LSN(value))) == value


@pytest.mark.parametrize("text", ["", "0", "0/", "/0", "0/0/0", "g/0", "0/123456789", "-1/0"])
def test_refuses_what_is_no_lsn(text: str) -> None:
    with pytest.raises(MalformedStream):
        LSN.parse(text)


@pytest.mark.parametrize("value", [-1, 2**64])
def test_refuses_what_does_not_fit(value: int) -> None:
    with pytest.raises(MalformedStream):
        LSN(value)
