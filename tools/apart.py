"""Jobs in processes of their own: measured with their memory, or run to fill the compiler's cache.

One that hangs, crashes or takes too much memory ends alone, and says so in its result.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel

LIMIT_S = 1800.0  # of one measurement: decoding on a GPU may hang
SAMPLE_S = 0.25  # between two looks at the memory
LAST_LINES = 8  # of an error that are kept
SCRIPT = Path(__file__).with_name("benchmark.py")

_running: set[subprocess.Popen[str]] = set()


def measure_apart(
    job: BaseModel,
    part: str = "input",
    limit_s: float = LIMIT_S,
    environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Measures in a fresh process, and watches the memory of it and its children meanwhile.

    Args:
        part: which of `benchmark.py measure`.
        environ: what is changed in the environment.
    Returns:
        What the process printed, with its peak memory; or `failed`, and the last lines of the
        error.
    """
    command = [sys.executable, str(SCRIPT), "measure", part, job.model_dump_json()]
    begun = time.monotonic()
    # In a process group of its own, so that workers that outlive it can be ended with it.
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, **(environ or {})},
    )  # fmt: skip
    _running.add(child)
    rss = pss = looks = 0
    out = err = ""
    try:
        while True:
            looks += 1
            try:
                out, err = child.communicate(timeout=SAMPLE_S)
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() - begun > limit_s:
                    return {"failed": f"no result within {limit_s:.0f} s"}
                # The kernel walks all pages for the PSS, so that is asked more rarely.
                now_rss, now_pss = memory_of(child.pid, with_pss=looks % 8 == 5)
                rss, pss = max(rss, now_rss), max(pss, now_pss)
    finally:
        end(child)
    if child.returncode:
        sys.stderr.write(err)
        code = child.returncode
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"failed": reason, "error": last_lines(err)}
    peaks = {"peak_rss_gib": rss / 2**30, "peak_pss_gib": pss / 2**30 or None}
    return json.loads(out.splitlines()[-1]) | peaks


def end(child: subprocess.Popen[str]) -> None:
    """Kills a process that leads a group, and its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    _running.discard(child)


def last_lines(text: str) -> str:
    return "\n".join(line[:300] for line in text.strip().splitlines()[-LAST_LINES:])


def memory_of(pid: int, with_pss: bool) -> tuple[int, int]:
    """Bytes of a process and all below it; in the first sum, what they share counts for each."""
    rss = pss = 0
    for process in family(pid):
        with contextlib.suppress(psutil.Error):
            rss += process.memory_info().rss
            pss += process.memory_full_info().pss if with_pss else 0
    return rss, pss


def family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def warm(
    jobs: Sequence[Any], slots: int, limit_s: float, say: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Runs each job's first update, several at a time, so that what they compile is kept.

    Measuring them afterwards, one at a time, then takes seconds where compiling takes a minute.

    Returns:
        The seconds that each took, or `failed`, in the order of the jobs.
    """
    share = max(1, len(os.sched_getaffinity(0)) // slots)
    environ = {"TORCHINDUCTOR_COMPILE_THREADS": str(share)}  # no part of the cache's key
    begun, began_at = time.monotonic(), time.time()

    def one(job: Any) -> dict[str, Any]:
        left_s = limit_s - (time.monotonic() - begun)
        if left_s < 1:
            return {"failed": "no time left"}
        result = measure_apart(job, "warm", left_s, environ)
        took = f"{result['warm_s']:.0f} s" if "warm_s" in result else result["failed"]
        say(f"compiled {job.name} {job.execution} {job.arch} {job.batch}: {took}")
        return result

    pool = ThreadPoolExecutor(slots)
    try:
        return list(pool.map(one, jobs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in [*_running]:  # where this was interrupted
            end(child)
        _forget_choices(began_at)


def _forget_choices(since: float) -> None:
    """Removes what the compiler chose by time while others used the device: it chooses again."""
    from fasttrain import caches

    caches.keep_compiled()
    for path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.best_config"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= since:
                path.unlink()
