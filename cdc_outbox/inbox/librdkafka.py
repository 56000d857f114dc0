"""How a confluent-kafka consumer was configured: its Python interface does not tell, the library below it does."""

import ctypes
from typing import Final

from confluent_kafka import Consumer, cimpl

_LONGEST_VALUE: Final = 4096


def setting(consumer: Consumer, name: str) -> str | None:
    """As librdkafka writes it; None if this version of the client does not let it be read.

    The consumer's object begins, after what every object of Python has, with librdkafka's handle: so in every 1.x and
    2.x. Source: rdkafka.h, rd_kafka_conf and rd_kafka_conf_get; confluent_kafka.h, Handle.
    """
    library = ctypes.CDLL(cimpl.__file__)
    try:
        conf, get = library.rd_kafka_conf, library.rd_kafka_conf_get
    except AttributeError:
        return None
    conf.restype, conf.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    get.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_size_t)]
    handle = ctypes.c_void_p.from_address(id(consumer) + object.__basicsize__).value
    if not handle:  # it was closed
        return None
    value, size = ctypes.create_string_buffer(_LONGEST_VALUE), ctypes.c_size_t(_LONGEST_VALUE)
    return None if get(conf(handle), name.encode(), value, ctypes.byref(size)) else value.value.decode()
