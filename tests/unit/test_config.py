from pathlib import Path

import pytest

from cdc_outbox.config import Config, load_config, redacted
from cdc_outbox.errors import ConfigurationError
from support.kubelet import injected


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a file nor variables but those of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDC_OUTBOX_POSTGRES__DSN", "host=h password=hunter2")


def test_defaults_are_those_of_the_contract() -> None:
    config = load_config(None)
    assert redacted(config) == {
        "postgres.dsn": "***",
        "postgres.slot": "cdc_outbox",
        "postgres.publication": "cdc_outbox",
        "kafka.topic": "outbox.{aggregate_type}",
        "kafka.create_topics": False,
        "kafka.headers": "plain",
        "outbox.table": "public.outbox",
        **{
            f"outbox.columns.{field}": field
            for field in ("id", "aggregate_type", "aggregate_id", "event_type", "payload", "headers")
        },
        "outbox.ignore_tables": [],
        "relay.max_in_flight": config.relay.max_in_flight,
        "relay.on_poison": "stop",
        "canary.every_seconds": 0,
        "canary.topic": "cdc-outbox.canary",
        "tracing.enabled": False,
        "http.listen": "127.0.0.1:9646",
        "service.shutdown_timeout_seconds": 30,
    }


def test_environment_goes_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.toml"
    path.write_text(
        """
        [postgres]
        dsn = "host=file"
        slot = "from_file"
        publication = "from_file"
        [outbox.columns]
        headers = "meta"
        [kafka.producer]
        linger.ms = 7
        "sasl.password" = "hunter2"
        """
    )
    monkeypatch.setenv("CDC_OUTBOX_POSTGRES__SLOT", "from_environment")
    monkeypatch.setenv("CDC_OUTBOX_KAFKA__PRODUCER__SECURITY_PROTOCOL", "SASL_SSL")
    config = load_config(path)
    assert (config.postgres.slot, config.postgres.publication) == ("from_environment", "from_file")
    assert config.postgres.dsn.get_secret_value() == "host=h password=hunter2"
    assert config.kafka.producer == {"linger.ms": 7, "sasl.password": "hunter2", "security.protocol": "SASL_SSL"}
    assert config.outbox.columns.mapping()["headers"] == ("meta",)
    assert "hunter2" not in str(redacted(config)) + repr(config.postgres)


@pytest.mark.parametrize(
    ("value", "names"), [("subject", ("subject",)), ('["subject", "aggregate_id"]', ("subject", "aggregate_id"))]
)
def test_a_field_may_have_several_columns(monkeypatch: pytest.MonkeyPatch, value: str, names: tuple[str, ...]) -> None:
    monkeypatch.setenv("CDC_OUTBOX_OUTBOX__COLUMNS__AGGREGATE_ID", value)
    columns = load_config(None).outbox.columns
    assert columns.mapping()["aggregate_id"] == names
    assert columns.of({"id", "aggregate_id"})["aggregate_id"] == names[-1] if len(names) > 1 else "subject"


@pytest.mark.parametrize("value", ["[]", "[1]", "[subject", ""])
def test_columns_that_are_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CDC_OUTBOX_OUTBOX__COLUMNS__AGGREGATE_ID", value)
    with pytest.raises(ConfigurationError, match=r"outbox\.columns\.aggregate_id"):
        load_config(None)


def test_the_file_beside_us_is_read(tmp_path: Path) -> None:
    (tmp_path / "cdc-outbox.toml").write_text("[kafka]\nbootstrap_servers = 'b:1'")
    assert load_config(None).kafka.require_bootstrap_servers() == "b:1"


def test_unmapped_headers_are_optional() -> None:
    assert "headers" not in load_config(None).outbox.columns.mapping()


@pytest.mark.parametrize("service", ["", "_POSTGRES", "_SERVICE", "_2"])
def test_what_kubernetes_injects_is_passed_over(monkeypatch: pytest.MonkeyPatch, service: str) -> None:
    """Of services called cdc-outbox, cdc-outbox-postgres and so on."""
    monkeypatch.setenv("CDC_OUTBOX_POSTGRES__DSN", "host=h")
    plain = load_config(None)
    for name, value in injected(f"CDC_OUTBOX{service}").items():
        monkeypatch.setenv(name, value)
    assert load_config(None) == plain


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HTTP_PORT", "9646", "CDC_OUTBOX_HTTP_PORT names no key"),
        ("SERVICE_SHUTDOWN_TIMEOUT_SECONDS", "5", "CDC_OUTBOX_SERVICE_SHUTDOWN_TIMEOUT_SECONDS names no key"),
        ("POSTGRES_SERVICE_HOSTS", "h", "CDC_OUTBOX_POSTGRES_SERVICE_HOSTS names no key"),
        ("PORT_9646_TCP_NAME", "h", "CDC_OUTBOX_PORT_9646_TCP_NAME names no key"),
        ("POSTGRES__SLOTT", "x", "unknown key postgres.slott"),
        ("OUTBOX__COLUMNS__IDD", "x", "unknown key outbox.columns.idd"),
        ("NOPE__X", "x", "CDC_OUTBOX_NOPE__X names no key"),
        ("POSTGRES_DSN", "x", "CDC_OUTBOX_POSTGRES_DSN names no key"),
        ("KAFKA__HEADERS", "fancy", "kafka.headers = 'fancy': Input should be 'plain', 'cloudevents' or 'debezium'"),
        ("RELAY__MAX_IN_FLIGHT", "0", "relay.max_in_flight = '0': Input should be greater than or equal to 1"),
        ("RELAY__MAX_IN_FLIGHT", "many", "relay.max_in_flight = 'many': Input should be a valid integer"),
        ("SERVICE__SHUTDOWN_TIMEOUT_SECONDS", "0", "service.shutdown_timeout_seconds = '0'"),
        ("HTTP__LISTEN", "9646", "http.listen = '9646': wanted host:port"),
        ("HTTP__LISTEN", "h:99999", "http.listen = 'h:99999': wanted host:port"),
        ("KAFKA__PRODUCER", "x", "environment: error parsing value"),
    ],
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(f"CDC_OUTBOX_{name}", value)
    with pytest.raises(ConfigurationError) as caught:
        load_config(None)
    assert message in caught.value.message
    assert caught.value.message.startswith((message, "environment variable"))


def test_the_missing_dsn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CDC_OUTBOX_POSTGRES__DSN")
    with pytest.raises(ConfigurationError, match=r"postgres\.dsn is required") as caught:
        load_config(None)
    assert "CDC_OUTBOX_POSTGRES__DSN" in caught.value.hint


def test_missing_bootstrap_servers_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"kafka\.bootstrap_servers is required"):
        load_config(None).kafka.require_bootstrap_servers()


@pytest.mark.parametrize("content", ["postgres = 'hunter2'", "[postgres]\ndsn = ['hunter2']"])
def test_a_secret_at_the_wrong_place_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.delenv("CDC_OUTBOX_POSTGRES__DSN")
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match="postgres") as caught:
        load_config(path)
    assert "hunter2" not in caught.value.message + caught.value.hint + repr(caught.value.__cause__)


@pytest.mark.parametrize(("content", "message"), [("[", "is not TOML"), (None, "cannot be read")])
def test_a_bad_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "bad.toml"
    if content:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=f"bad.toml {message}"):
        load_config(path)


def test_http_address() -> None:
    dsn = {"dsn": "x"}
    assert Config.model_validate({"postgres": dsn, "http": {"listen": "[::1]:80"}}).http.address() == ("::1", 80)
    assert Config.model_validate({"postgres": dsn, "http": {"listen": ""}}).http.address() is None


def test_the_example_names_every_key_with_its_default() -> None:
    example = load_config(Path(__file__).parents[2] / "deploy" / "cdc-outbox.toml")
    assert example.kafka.bootstrap_servers
    assert {**redacted(example), "kafka.bootstrap_servers": None} == {
        **redacted(load_config(None)),
        "kafka.bootstrap_servers": None,
    }
