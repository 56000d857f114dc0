"""What a decision is bound to: the exact bytes that Kafka would get, never a second serialisation of them."""

import hashlib

from cdc_outbox.relay.router import Record

_NULL = (2**64 - 1).to_bytes(8, "big")


def event_sha256(record: Record) -> bytes:
    """SHA-256 over topic, key, value, and each header's name and value, each with its length before it.

    A length has eight bytes, big-endian; that of a NULL has every bit set.
    """
    digest = hashlib.sha256()
    headers = [part for name, value in record.headers for part in (name.encode(), value)]
    for part in (record.topic.encode(), record.key, record.value, *headers):
        digest.update(_NULL if part is None else len(part).to_bytes(8, "big") + part)
    return digest.digest()
