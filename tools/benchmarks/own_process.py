"""Runs a contestant in its own process, to measure it and its memory, or to compile ahead of time.

A process that hangs, crashes or needs too much memory ends alone, and its result says so. The
process is `tools/benchmark.py measure PART JOB`, where JOB is a pydantic model as JSON.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pydantic import BaseModel

LIMIT_S = 1800.0  # for one measurement, because decoding on a GPU may hang
SAMPLE_S = 0.25  # between two looks at the memory
PSS_EVERY = 8  # looks, because the kernel walks all pages to tell the PSS
LAST_LINES = 8  # the lines of an error that are kept
SCRIPT = Path(__file__).parent.parent / "benchmark.py"

Result = dict[str, Any]


class Job(BaseModel, frozen=True):
    """What a process measures; each benchmark adds its settings."""

    name: str  # of the contestant

    @property
    def label(self) -> str:
        """What a line of progress calls the job."""
        return self.name


AnyJob = TypeVar("AnyJob", bound=Job)

_running: set[subprocess.Popen[str]] = set()


def take_turns(
    jobs: Sequence[AnyJob],
    part: str,
    repeats: int,
    prepare: Callable[[AnyJob], Result] = lambda job: {},
) -> dict[AnyJob, list[Result]]:
    """Measures every job `repeats` times, one after the other in turns.

    If the machine slows down, all jobs become slower alike. `prepare` is called before each
    measurement, and its result is added.

    Returns:
        The results by job (see `measure`), in the order of the turns.
    """
    turns: dict[AnyJob, list[Result]] = {job: [] for job in jobs}
    for repeat, job in itertools.product(range(repeats), jobs):
        prepared = prepare(job)
        turns[job].append(measure(job, part) | prepared)
        sys.stderr.write(f"{repeat + 1}/{repeats} {job.label}\n")
    return turns


def measure(
    job: BaseModel, part: str, limit_s: float = LIMIT_S, environ: Mapping[str, str] | None = None
) -> Result:
    """Measures a job in a new process, and watches the memory of its process tree meanwhile.

    Args:
        part: what `benchmark.py measure` does with the job.
        limit_s: seconds after which the process is killed.
        environ: variables that are added to the environment.
    Returns:
        What the process printed, with its peak memory in GiB; or `failed` with the reason, and
        `error` with the last lines of standard error.
    """
    child = start(job, part, environ or {})
    memory = Memory(child.pid)
    deadline = time.monotonic() + limit_s
    try:
        while True:
            try:
                out, err = child.communicate(timeout=SAMPLE_S)
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    return {"failed": f"no result within {limit_s:.0f} s"}
                memory.look()
    finally:
        end(child)
    if child.returncode:
        sys.stderr.write(err)
        code = child.returncode
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"failed": reason, "error": last_lines(err)}
    return json.loads(out.splitlines()[-1]) | memory.peaks()


def start(job: BaseModel, part: str, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    """Starts the process of a job, in a new process group so that its workers can be killed."""
    command = [sys.executable, str(SCRIPT), "measure", part, job.model_dump_json()]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **environ},
    )
    _running.add(child)
    return child


def end(child: subprocess.Popen[str]) -> None:
    """Kills a process that leads a process group, and its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    _running.discard(child)


def last_lines(text: str) -> str:
    """The last lines of an error message, each cut to 300 characters."""
    return "\n".join(line[:300] for line in text.strip().splitlines()[-LAST_LINES:])


class Memory:
    """The peak memory of a process and all processes below it.

    The RSS counts shared pages once for each process, the PSS counts them once in all.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.looks = self.rss = self.pss = 0  # rss and pss in bytes

    def look(self) -> None:
        """Reads the memory now."""
        self.looks += 1
        with_pss = self.looks % PSS_EVERY == 5
        rss = pss = 0
        for process in family(self.pid):
            with contextlib.suppress(psutil.Error):
                rss += process.memory_info().rss
                pss += process.memory_full_info().pss if with_pss else 0
        self.rss, self.pss = max(self.rss, rss), max(self.pss, pss)

    def peaks(self) -> Result:
        """The peaks in GiB; the PSS is None where the process ended before it was read."""
        return {"peak_rss_gib": self.rss / 2**30, "peak_pss_gib": self.pss / 2**30 or None}


def family(pid: int) -> list[psutil.Process]:
    """A process and all processes below it; empty if it has ended."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


# --------------------------------------------------------------------------------------------------
# Compiling ahead of the measurements
# --------------------------------------------------------------------------------------------------


def warm(
    jobs: Sequence[Any], slots: int, limit_s: float, say: Callable[[str], object]
) -> list[Result]:
    """Runs the first update of each job, `slots` at a time, so that what they compile is kept.

    Measuring a job afterwards takes seconds, where compiling takes a minute.

    Returns:
        For each job `warm_s`, the seconds that it took, or `failed`.
    """
    share = max(1, len(os.sched_getaffinity(0)) // slots)
    environ = {"TORCHINDUCTOR_COMPILE_THREADS": str(share)}  # is not part of the cache's key
    begun, began_at = time.monotonic(), time.time()

    def one(job: Any) -> Result:
        left_s = limit_s - (time.monotonic() - begun)
        if left_s < 1:
            return {"failed": "no time left"}
        result = measure(job, "warm", left_s, environ)
        took = f"{result['warm_s']:.0f} s" if "warm_s" in result else result["failed"]
        say(f"compiled {job.name} {job.execution} {job.arch} {job.batch}: {took}")
        return result

    pool = ThreadPoolExecutor(slots)
    try:
        return list(pool.map(one, jobs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in [*_running]:  # some are left if this was interrupted
            end(child)
        _forget_choices(began_at)


def _forget_choices(since: float) -> None:
    """Removes what the compiler has chosen by timing since then, because the device was shared."""
    from fasttrain import caches

    caches.keep_compiled()
    for path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.best_config"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= since:
                path.unlink()
