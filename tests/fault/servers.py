"""The servers of the fault suite: one PostgreSQL and one Kafka of its own, each also behind a proxy."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cdc_outbox.demo.kafka import EmbeddedKafka, fetch_kafka
from cdc_outbox.demo.ports import wait_for_port
from cdc_outbox.demo.postgres import EmbeddedPostgres
from cdc_outbox.demo.stack import running, server_folder
from fault.broker_settings import BrokerPorts, make_certificates, make_user, settings
from fault.proxy import Proxy


@dataclass(slots=True)
class Servers:
    postgres: EmbeddedPostgres
    kafka: EmbeddedKafka
    postgres_proxy: Proxy
    kafka_proxy: Proxy
    broker_ports: BrokerPorts
    broker_ca: Path

    def restore(self) -> None:
        """Whatever a scenario left behind, the next one finds all of it well."""
        self.postgres_proxy.restore()
        self.kafka_proxy.restore()
        self.postgres_proxy.target = self.postgres.port
        for server in (self.postgres, self.kafka):
            if not wait_for_port(server.port, timeout_seconds=0.5):
                server.start()


@contextmanager
def start_servers() -> Iterator[Servers]:
    with ExitStack() as stack:
        folder = stack.enter_context(server_folder())
        keystore, ca = make_certificates(folder)
        ports = BrokerPorts()
        postgres = EmbeddedPostgres(folder / "postgres")
        kafka = EmbeddedKafka(folder / "kafka", fetch_kafka(), settings=settings(ports, keystore))
        stack.enter_context(running(postgres, kafka))
        make_user(kafka.bootstrap_servers)
        postgres_proxy = stack.enter_context(Proxy(postgres.port))
        kafka_proxy = stack.enter_context(Proxy(ports.proxied, port=ports.proxy))
        yield Servers(postgres, kafka, postgres_proxy, kafka_proxy, ports, ca)
