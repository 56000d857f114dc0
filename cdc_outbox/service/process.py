"""The process: its signals, its HTTP server, and the relay in it."""

import gc

from cdc_outbox.config import Config
from cdc_outbox.service.http import HttpServer
from cdc_outbox.service.metrics import Metrics
from cdc_outbox.service.relay import Relay
from cdc_outbox.service.shutdown import Shutdown


def serve(config: Config) -> None:
    """Returns when a shutdown was requested.

    Raises what only an operator can fix; ConfigurationError before anything is connected.
    """
    shutdown = Shutdown(config.service.shutdown_timeout_seconds)
    metrics = Metrics(canary_topic=config.canary.topic)
    relay = Relay(config, shutdown, metrics)
    shutdown.install()
    if address := config.http.address():
        HttpServer(address, relay.health, metrics).start()
    gc.freeze()  # what was made since the verb was loaded stays, too
    relay.run()
