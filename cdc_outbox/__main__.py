"""The installed command, and `python -m cdc_outbox`: the command line, and the end of the process.

The process ends without the interpreter's and the C library's own cleaning up. Threads of librdkafka and libpq may
still be in the middle of a TLS handshake, and OpenSSL, which clears itself away at exit, takes what they work on from
under them: a segmentation fault in place of the exit code (one start in 90, at a broker whose certificate is refused).
"""

import atexit
import gc
import os
import sys
import traceback
from contextlib import suppress
from typing import NoReturn


def run() -> NoReturn:
    gc.disable()  # nothing that is loaded now is garbage; whoever loads the verb turns it on again
    from cdc_outbox.cli.main import main

    try:
        code = main(prog_name="cdc-outbox")
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - a defect of ours
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # noqa: SLF001 - what libraries want to have done, such as sending the last spans
    with suppress(OSError):  # whatever is printed has been flushed, or its failure was reported
        sys.stdout.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    run()
