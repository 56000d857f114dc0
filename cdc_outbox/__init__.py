"""cdc-outbox: carries committed outbox rows from PostgreSQL's write-ahead log to Kafka.

The folders are the architecture: ``postgres`` reads the log, ``relay`` decides (pure), ``kafka`` publishes,
``service`` keeps the three running, ``cli`` opens the door. README.md walks one event through them. Applications have
``outbox`` (emit), ``inbox`` (once) and ``testing``, which import none of these.
"""

__version__ = "0.1.0"
