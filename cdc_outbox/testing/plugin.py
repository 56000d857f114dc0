"""The pytest plugin: the assertions as fixtures, and a stack to test against. pytest loads it where we are installed.

def test_order(connection, assert_emitted): ...
def test_handler(assert_idempotent): ...
def test_end_to_end(cdc_outbox_stack): ...
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from cdc_outbox import testing

if TYPE_CHECKING:
    from cdc_outbox.testing.stack import Stack


@pytest.fixture
def assert_emitted() -> Any:
    """``cdc_outbox.testing.assert_emitted``."""
    return testing.assert_emitted


@pytest.fixture
def assert_emitted_async() -> Any:
    """``cdc_outbox.testing.assert_emitted_async``."""
    return testing.assert_emitted_async


@pytest.fixture
def assert_idempotent() -> Any:
    """``cdc_outbox.testing.assert_idempotent``."""
    return testing.assert_idempotent


@pytest.fixture
def assert_idempotent_async() -> Any:
    """``cdc_outbox.testing.assert_idempotent_async``."""
    return testing.assert_idempotent_async


@pytest.fixture(scope="session")
def cdc_outbox_settings() -> Mapping[str, str]:
    """Settings of the stack's relay, as environment variables: override this fixture to give it yours."""
    return {}


@pytest.fixture(scope="session")
def cdc_outbox_stack(
    cdc_outbox_settings: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator["Stack"]:
    """PostgreSQL with outbox and inbox, Kafka, and a relay that runs: once for all tests, gone at the end.

    Real servers: those that CDC_OUTBOX_TEST_POSTGRES_DSN (a superuser's, wal_level = logical) and
    CDC_OUTBOX_TEST_KAFKA_BOOTSTRAP_SERVERS name, else the embedded ones of the extra ``demo``. The database is its own,
    and so are the topics: ``cdc_outbox_stack.topic("order")``.
    """
    try:
        from cdc_outbox.errors import CdcOutboxError
        from cdc_outbox.testing.stack import running_stack
    except ImportError as error:
        pytest.fail(f"cdc_outbox_stack needs the whole of cdc-outbox, not --no-deps: {error}", pytrace=False)
    try:
        with running_stack(cdc_outbox_settings, tmp_path_factory.mktemp("cdc-outbox")) as stack:
            yield stack
    except CdcOutboxError as error:
        pytest.fail(f"cdc_outbox_stack: {error.message}{error.hint and f'; {error.hint}'}", pytrace=False)
