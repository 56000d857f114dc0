"""Alert rules, dashboard and runbook: that what they speak of exists, and that the alerts do what they say."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from cdc_outbox.service.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "cdc-outbox.rules.yml"
DASHBOARD = DEPLOY / "grafana" / "cdc-outbox.json"


def rules() -> list[dict[str, Any]]:
    content = yaml.safe_load(RULES.read_text())
    return [rule for group in content["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def queries() -> Iterator[tuple[str, str]]:
    """Where it stands, and the expression as Prometheus would get it."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m").replace("$job", ".*")


def exported() -> set[str]:
    """Every series that /metrics can have."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}
    return {
        family.name + suffix for family in Metrics().registry.collect() for suffix in suffixes.get(family.type, [""])
    }


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    found: list[promql_parser.VectorSelector] = []

    def visit(node: object) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


@pytest.mark.parametrize(("place", "expression"), list(queries()))
def test_every_query_asks_for_series_that_are_there(place: str, expression: str) -> None:
    names = {selector.name for selector in selectors(expression)}
    assert names
    assert names <= exported(), place


def test_every_alert_links_to_a_heading_of_the_runbook() -> None:
    text = (DEPLOY / "runbook.md").read_text()
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for rule in rules():
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert path == "deploy/runbook.md"
        assert anchor in headings, rule["alert"]
        section = re.search(
            rf"^## {anchor.replace('-', ' ')}\n(.*?)(?=^#)", text, re.MULTILINE | re.DOTALL | re.IGNORECASE
        )
        assert section
        assert all(word in section[1] for word in ("**Cause.**", "**Look.**", "**Fix.**")), anchor


def test_the_alerts_that_are_asked_for_are_there() -> None:
    assert {rule["labels"]["severity"] for rule in rules()} == {"critical", "warning"}
    tested = yaml.safe_load((RULES.parent / "cdc-outbox.test.yml").read_text())["tests"]
    fire = {case["alertname"] for test in tested for case in test["alert_rule_test"] if case.get("exp_alerts")}
    silent = {case["alertname"] for test in tested for case in test["alert_rule_test"] if not case.get("exp_alerts")}
    assert fire == {rule["alert"] for rule in rules()}
    assert fire == silent


def test_the_alerts_fire_when_they_should() -> None:
    promtool = shutil.which("promtool", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if promtool is None:
        pytest.skip("no promtool on the PATH; .ci/run fetches it where Debian's archive can be reached")
    done = subprocess.run(
        [promtool, "test", "rules", "cdc-outbox.test.yml"],
        cwd=RULES.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
