"""The installed command, and `python -m cdc_outbox`: the command line, and the end of the process.

The process ends without the clean-up of the interpreter and of C libraries. A thread of librdkafka or libpq may still
be in a TLS handshake when OpenSSL frees its own state at exit. The process then ends with a segmentation fault instead
of its exit code (seen once in 90 starts at a broker whose certificate is refused).
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
