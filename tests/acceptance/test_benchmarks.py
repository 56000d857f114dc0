"""The benchmark harness in its quick form: that it works, not how fast anything is."""

import json
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.arena import open_arena
from benchmarks.drain import Incomplete, drain
from benchmarks.lane import Backlog, Lane
from benchmarks.peers.process import running
from benchmarks.peers.relay import Relay

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.alone


def test_every_scenario_and_the_peers_that_need_no_java(postgres: str, kafka: str, tmp_path: Path) -> None:
    arguments = ["--quick", f"--postgres={postgres}", f"--kafka={kafka}", "--json=-"]
    command = [sys.executable, "-m", "benchmarks", *arguments, f"--charts={tmp_path}"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=170, check=False)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"it stands at the last of these: {error.stderr!r}")
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert report["conditions"]["cores"]
    for scenario in ("drain-bulk", "drain-single", "drain-bulk-jsonb"):
        ran = {run["peer"] for run in report["drains"][scenario]} | set(report["left_out"])
        assert ran == {"cdc-outbox", "pg_recvlogical", "polling relay", "mq-bridge"}
    for name, count in {
        "latency": 3,
        "start": 1,
        "crash": 1,
        "huge": 1,
        "idle": 1,
        "growth": 6,
        "emit": 2,
        "inbox": 4,
        "consume": 2,
    }.items():
        assert len(report[name]) == count, name
    assert report["crash"][0]["lost"] == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".svg"}


class LosingRelay(Relay):
    name = "a relay that drops a row"

    def start(self, lane: Lane) -> AbstractContextManager[subprocess.Popen[bytes]]:
        environment = {**self.environment(lane), "PYTHONPATH": str(ROOT / "tests")}
        return running([sys.executable, "-m", "fault.broken_relay", "drops_a_row"], environment)


def test_what_failed_is_told_and_charts_show_the_rest(
    postgres: str, kafka: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.__main__.make_peer", lambda _: LosingRelay())
    servers = [f"--postgres={postgres}", f"--kafka={kafka}"]
    arguments = ["--quick", *servers, "--scenario=drain-bulk", "--peer=cdc-outbox", f"--charts={tmp_path}"]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, "1 missing" in result.output) == (4, True), result.output


class LosingPeer(LosingRelay):
    name = "polling relay"


def test_a_peer_that_loses_an_event_is_left_out(
    postgres: str, kafka: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.__main__.make_peer", lambda _: LosingPeer())
    servers = [f"--postgres={postgres}", f"--kafka={kafka}"]
    result = CliRunner().invoke(
        main, ["--quick", *servers, "--scenario=drain-bulk", "--peer=polling relay", f"--charts={tmp_path}"]
    )
    assert (result.exit_code, "left out: polling relay" in result.output) == (0, True), result.output


def test_no_figure_for_a_relay_that_loses_an_event(postgres: str, kafka: str) -> None:
    with open_arena(postgres, kafka) as arena, pytest.raises(Incomplete, match="1 missing"):
        drain(arena, LosingRelay(), Backlog(500, 100))
