"""A few seeds of the random schedule; `python -m fault.soak` plays longer ones."""

import pytest

from fault.schedule import play
from fault.stage import Stage


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_schedule(stage: Stage, seed: int) -> None:
    play(stage, seed, seconds=20, say=print)
    stage.close(f"random schedule, seed {seed}", recovers_within_seconds=20)
