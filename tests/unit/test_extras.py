import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from cdc_outbox.extras import install_hint

SOURCES = [
    ('{"url": "file:///home/x/cdc%20outbox", "dir_info": {"editable": true}}', "'/home/x/cdc outbox[demo]'"),
    ('{"url": "https://example.org/cdc_outbox-1.whl"}', "'cdc-outbox[demo]'"),
    (None, "'cdc-outbox[demo]'"),
]


@pytest.mark.parametrize(("recorded", "shown"), SOURCES)
def test_an_extra_comes_from_where_we_came_from(
    monkeypatch: pytest.MonkeyPatch, recorded: str | None, shown: str
) -> None:
    found = SimpleNamespace(read_text=lambda _: recorded)
    monkeypatch.setattr("cdc_outbox.extras.distribution", lambda _: found)
    assert install_hint("demo") == f"{sys.executable} -m pip install {shown}"


def test_without_an_installation_it_is_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("cdc_outbox.extras.distribution", not_found)
    assert install_hint("otel").endswith("'cdc-outbox[otel]'")
