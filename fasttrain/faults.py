"""Faults that a user can correct. They end a process with one message and exit code 2."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

FIRST_S = 20.0  # time for the first process of a node to print the message for all


class Fault(Exception):
    """A fault that a user can correct. The message says what is wrong, where, and what to do."""

    # True if every rank raises it; then one rank per node prints it.
    raised_on_every_rank = False


class ConfigError(Fault, ValueError):
    """A setting in the recipe, the run folder or the environment is wrong."""


def stop(message: str, *, everywhere: bool = False) -> NoReturn:
    """Prints a message and ends the process with exit code 2.

    Under torch's launcher (torchrun, accelerate launch) the message goes into the launcher's error
    file, and the launcher prints it at the end of its report. The first process of a node prints
    for all. The others wait until the launcher ends them. If they ended by themselves, the launcher
    would list each of them as failed.

    Args:
        everywhere: True: every process prints its message. False: only the first of each node.
    """
    under_launcher = "TORCHELASTIC_RUN_ID" in os.environ
    if not everywhere and os.environ.get("LOCAL_RANK", "0") != "0":
        _end_silently(under_launcher)
    rank = os.environ.get("RANK", "0")
    text = message if rank == "0" else f"rank {rank}: {message}"
    if not _told_launcher(text) or everywhere:
        sys.stderr.write(f"{text}\n")
        if not under_launcher and "ACCELERATE_MIXED_PRECISION" in os.environ:
            sys.stderr.write("(the rest is Accelerate's traceback, which says no more)\n")
    raise SystemExit(2)


def _end_silently(under_launcher: bool) -> None:
    """Ends a process whose message the first process of the node prints.

    Under torch's launcher, returns after `FIRST_S` if the first process has not failed.
    """
    if not under_launcher:
        raise SystemExit(2)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    time.sleep(FIRST_S)


def _told_launcher(text: str) -> bool:
    """Writes a message into the error file of torch's launcher. Returns False if it cannot."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    try:
        Path(path).write_text(json.dumps({"message": text, "timestamp": str(int(time.time()))}))
    except OSError:
        return False
    return True
