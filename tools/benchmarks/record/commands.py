"""Commands in the checkout whose output goes to a file, and that may be stopped."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import own_process
from benchmarks.record.journal import REPO

GRACE_S = 8.0  # after Ctrl-C, in which pytest lists the tests that failed


class Logged:
    """A command that runs in the checkout, and whose output goes to a file."""

    def __init__(self, command: Sequence[str], log: Path, **environ: str) -> None:
        self.log = log
        paths = [str(REPO), str(REPO / "tools"), os.environ.get("PYTHONPATH", "")]
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command, cwd=REPO, stdout=file, stderr=subprocess.STDOUT, text=True,
                start_new_session=True, env={**os.environ, **environ},
            )  # fmt: skip


def wait_for(
    started: Sequence[Logged], limit_s: float, look: Callable[[], object] = lambda: None
) -> list[int | None]:
    """Waits for commands; after `limit_s` seconds, sends them Ctrl-C and then kills them.

    `look` is called several times a second meanwhile.

    Returns:
        The exit code of each command; None for one that the limit ended.
    """
    begun, processes = time.monotonic(), [each.process for each in started]
    codes: list[int | None] = [None] * len(started)
    try:
        while None in codes and time.monotonic() - begun < limit_s:
            time.sleep(0.1)
            look()
            codes = [process.poll() for process in processes]
        ended = time.monotonic()
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        while any(p.poll() is None for p in processes) and time.monotonic() - ended < GRACE_S:
            time.sleep(0.1)
        return codes
    finally:
        for process in processes:
            own_process.end(process)
