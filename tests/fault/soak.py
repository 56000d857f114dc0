"""Random schedules for as long as you like: `cd tests && python -m fault.soak --minutes 60`.

Every round prints its seed first; `--seed N --rounds 1` plays that one again. Ends with 1 at the first broken promise.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import click

from fault.schedule import play
from fault.servers import start_servers
from fault.stage import Outcome, make_stage


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fault.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="begin no round after so many (default 10)")
    parser.add_argument("--rounds", type=int, default=sys.maxsize, help="at most so many")
    parser.add_argument("--seconds", type=float, default=60, help="of faults in a round (default 60)")
    parser.add_argument("--seed", type=int, default=None, help="of the first round (default: by chance)")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1_000_000)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers and relays go, whoever ends it
    end = time.monotonic() + arguments.minutes * 60
    outcomes: list[Outcome] = []
    with start_servers() as servers, tempfile.TemporaryDirectory() as folder:
        for number in range(seed, seed + arguments.rounds):
            if time.monotonic() > end:
                break
            click.echo(f"seed {number}")
            place = Path(folder) / str(number)
            place.mkdir()
            with make_stage(servers, place, outcomes, []) as stage:
                try:
                    play(stage, number, seconds=arguments.seconds, say=lambda faults: click.echo(f"  {faults}"))
                    stage.close(f"seed {number}", recovers_within_seconds=30)
                except AssertionError as error:
                    click.echo(f"broken with seed {number}: {error}")
                    return 1
            click.echo("  " + " | ".join(outcomes[-1].cells()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
