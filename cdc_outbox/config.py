"""The configuration: a TOML file, over it environment variables. Every key, its default and what is allowed.

Unknown keys and bad values are errors that name the key, the value and what is allowed; secrets are never repeated.
Knows no driver: whether a DSN or a librdkafka key is right is found out at its edge.
"""

import json
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from cdc_outbox.errors import ConfigurationError

ENV_PREFIX: Final = "CDC_OUTBOX_"
DEFAULT_FILE: Final = Path("cdc-outbox.toml")
#: Variables with our prefix that are not keys: the command line reads them, and the pytest plugin.
_OTHER_VARIABLES: Final = frozenset(
    {
        "CDC_OUTBOX_CONFIG",
        "CDC_OUTBOX_LOG_FORMAT",
        "CDC_OUTBOX_LOG_LEVEL",
        "CDC_OUTBOX_TEST_POSTGRES_DSN",
        "CDC_OUTBOX_TEST_KAFKA_BOOTSTRAP_SERVERS",
    }
)
#: What Kubernetes, and Docker's links, inject beside a service whose name begins as ours; a port has a value like tcp://.
_INJECTED: Final = re.compile(
    rf"{ENV_PREFIX[:-1]}(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_INJECTED_PORT: Final = re.compile(rf"{ENV_PREFIX[:-1]}(_\w+)?_PORT=(tcp|udp|sctp)://.*")
#: A key with one of these in its name holds a secret.
_SECRET_WORDS: Final = ("dsn", "password", "secret", "key.pem", "token", "sasl.oauthbearer.config", "sasl.jaas.config")


def _flatten(value: Any) -> Any:
    """librdkafka's keys have dots, which TOML reads as tables and a shell does not take in a variable's name.

    So ``{"linger": {"ms": 5}}`` and ``{"linger_ms": 5}`` are both ``linger.ms = 5``.
    """
    return dict(_leaves(value)) if isinstance(value, dict) else value


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = prefix + key.lower().replace("_", ".")
        if isinstance(value, dict):
            yield from _leaves(value, name + ".")
        else:
            yield name, value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PostgresConfig(_Section):
    dsn: SecretStr
    slot: str = "cdc_outbox"
    publication: str = "cdc_outbox"


class KafkaConfig(_Section):
    #: required by `run` only; the other verbs do without Kafka
    bootstrap_servers: str | None = None
    topic: str = "outbox.{aggregate_type}"
    topic_pattern: str | None = None
    create_topics: bool = False
    headers: Literal["plain", "cloudevents", "debezium"] = "plain"
    producer: Annotated[dict[str, bool | int | float | str], BeforeValidator(_flatten)] = {}

    def require_bootstrap_servers(self) -> str:
        """Raises ConfigurationError."""
        if not self.bootstrap_servers:
            raise ConfigurationError("kafka.bootstrap_servers is required", hint=_how_to_set("kafka.bootstrap_servers"))
        return self.bootstrap_servers


def _read_names(value: Any) -> Any:
    """One name, or a list of them; in a variable the list is written as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.startswith("[") else [value] if value else []
    except json.JSONDecodeError as error:
        raise ValueError('wanted a name, or a list of names as JSON, e.g. ["a", "b"]') from error


#: Columns of one field, the first that the table has: older rows may have been written under another name.
Names = Annotated[
    tuple[str, ...],
    NoDecode,
    BeforeValidator(_read_names),
    Field(min_length=1),
    PlainSerializer(lambda names: names[0] if len(names) == 1 else names, when_used="json"),
]


class ColumnsConfig(_Section):
    id: Names = ("id",)
    aggregate_type: Names = ("aggregate_type",)
    aggregate_id: Names = ("aggregate_id",)
    event_type: Names = ("event_type",)
    payload: Names = ("payload",)
    headers: Names = ("headers",)

    def of(self, table_columns: Collection[str]) -> dict[str, str]:
        """Field to the column that a table has for it; where it has none, to the first that could be."""
        return {
            field: next((name for name in names if name in table_columns), names[0])
            for field, names in self.model_dump().items()
        }

    def mapping(self) -> dict[str, tuple[str, ...]]:
        """Field to columns; without the fields that nobody mapped and that may be missing."""
        columns = self.model_dump()
        if "headers" not in self.model_fields_set:
            del columns["headers"]
        return columns


class OutboxConfig(_Section):
    table: str = "public.outbox"
    columns: ColumnsConfig = ColumnsConfig()
    #: tables that the publication lists one by one and that hold no events
    ignore_tables: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_read_names)] = ()


OnPoison = Literal["stop", "dead-letter"]


class RelayConfig(_Section):
    max_in_flight: int = Field(default=8_000, ge=1, le=10_000_000)
    on_poison: OnPoison = "stop"


class CanaryConfig(_Section):
    #: 0: never
    every_seconds: float = Field(default=0, ge=0, le=3600)
    topic: str = Field(default="cdc-outbox.canary", pattern=r"^[A-Za-z0-9._-]{1,249}$")


class TracingConfig(_Section):
    #: a span for each event; where to is OpenTelemetry's own configuration (OTEL_...)
    enabled: bool = False


class HttpConfig(_Section):
    listen: str = "127.0.0.1:9646"

    @field_validator("listen")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if value and not (host and port.isascii() and port.isdigit() and int(port) < 65536):
            raise ValueError("wanted host:port, e.g. 127.0.0.1:9646, or nothing to turn it off")
        return value

    def address(self) -> tuple[str, int] | None:
        host, _, port = self.listen.rpartition(":")
        return (host.strip("[]"), int(port)) if self.listen else None


class ServiceConfig(_Section):
    shutdown_timeout_seconds: float = Field(default=30, gt=0, le=3600)


class Config(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
    )

    postgres: PostgresConfig
    kafka: KafkaConfig = KafkaConfig()
    outbox: OutboxConfig = OutboxConfig()
    relay: RelayConfig = RelayConfig()
    canary: CanaryConfig = CanaryConfig()
    tracing: TracingConfig = TracingConfig()
    http: HttpConfig = HttpConfig()
    service: ServiceConfig = ServiceConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic's
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `load_config` hands the file's content in as the init settings: the environment goes over it.
        return env_settings, init_settings


def load_config(path: Path | None) -> Config:
    """Read ``path``, else ./cdc-outbox.toml if it is there, and the environment over it. Raises ConfigurationError."""
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
    content = _read_file(path) if path else {}
    _refuse_unknown_variables()
    try:
        return Config(**content)
    except ValidationError as error:
        raise _explain(error) from None  # pydantic's own text would repeat the value, secret or not
    except SettingsError as error:
        # its text names the section and repeats no value
        raise ConfigurationError(f"environment: {error}", hint=f"write {ENV_PREFIX}<SECTION>__<KEY>=value") from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"configuration file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"configuration file {path} is not TOML: {error}") from error


def _refuse_unknown_variables() -> None:
    """A variable with our prefix that names no section would be passed over without a word."""
    for name, value in os.environ.items():
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in _OTHER_VARIABLES:
            if _INJECTED.fullmatch(name) or _INJECTED_PORT.fullmatch(f"{name}={value}"):
                continue
            section, _, key = name[len(ENV_PREFIX) :].lower().partition("__")
            if section not in Config.model_fields or not key:
                raise ConfigurationError(
                    f"environment variable {name} names no key of the configuration",
                    hint=f"write {ENV_PREFIX}<SECTION>__<KEY> with two underscores; sections: {_names(Config)}",
                )


def _explain(error: ValidationError) -> ConfigurationError:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "missing":
        if key == "postgres":
            key = "postgres.dsn"
        return ConfigurationError(f"{key} is required", hint=_how_to_set(key))
    if first["type"] == "extra_forbidden":
        return ConfigurationError(f"unknown key {key}", hint=f"allowed here: {_names(_section(path[:-1]))}")
    value = "" if is_secret(key) or len(path) == 1 else f" = {first['input']!r}"  # a whole section may hold secrets
    return ConfigurationError(f"{key}{value}: {first['msg'].removeprefix('Value error, ')}")


def is_secret(key: str) -> bool:
    return any(word in key.lower() for word in _SECRET_WORDS)


def _section(path: list[str]) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for name in path:
        field = model.model_fields[name].annotation
        assert isinstance(field, type)
        model = field
    return model


def _names(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _how_to_set(key: str) -> str:
    return f"set {ENV_PREFIX}{key.upper().replace('.', '__')}, or {key} in {DEFAULT_FILE}"


def redacted(config: Config) -> dict[str, Any]:
    """Every key, dotted, with its value; secrets as ***."""
    return {
        key: "***" if is_secret(key) else value
        for key, value in _dotted(config.model_dump(mode="json"), "")
        if value is not None
    }


def _dotted(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
