"""The stage `tests`: the tests that need a GPU, in several processes of pytest."""

import re
import sys
from importlib import util

from benchmarks import own_process
from benchmarks.record.commands import Logged, wait_for
from benchmarks.record.journal import REPO, Run, Skip
from benchmarks.step import CPUS_TO_COMPILE
from fasttrain.shards import Split

PROCESSES = 5  # of pytest at the most
_TEST = re.compile(r"^(tests/\S+(?: \S+)*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.MULTILINE)
_SUMMARY = re.compile(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", re.MULTILINE)


def stage(run: Run, data: list[Split]) -> None:
    """Runs `pytest -m gpu`, and writes the counts and each test that failed.

    Raises:
        Skip: there is no GPU or no pytest.
        RuntimeError: no test ran, or not all ended in time.
    """
    if not run.gpu:
        raise Skip("needs a GPU")
    if not util.find_spec("pytest"):
        raise Skip("not installed: pip install pytest")
    started = start(run)
    codes = wait_for(started, run.left_s())
    ended = all(code is not None for code in codes)
    text = "\n".join(each.log.read_text(errors="replace") for each in started)
    outcomes = {name: outcome.lower() for name, outcome in _TEST.findall(text)}
    report(run, text, outcomes, ended)
    if not ended:
        raise RuntimeError(f"pytest: not all tests ended in time\n{own_process.last_lines(text)}")
    if not outcomes:
        raise RuntimeError(f"pytest: {own_process.last_lines(text)}")


def start(run: Run) -> list[Logged]:
    """Starts several processes of pytest that share the tests."""
    # Only the files that have such tests, because others may import what is not installed.
    files = [str(path) for path in sorted((REPO / "tests").glob("test_*.py"))
             if "mark.gpu" in path.read_text()]  # fmt: skip
    options = ["-o", "addopts=", "-m", "gpu", "-v", "--tb=short", "--continue-on-collection-errors"]
    options += ["-p", "benchmarks.record.share_tests", "-k", run.arguments.tests]
    number = max(1, min(PROCESSES, run.arguments.threads // CPUS_TO_COMPILE))
    started = []
    for part in range(1, number + 1):
        log = run.arguments.out / f"tests-{part}.log"
        log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", *options, *files]
        # pytest cuts the lines of its summary to the width of the terminal.
        started.append(Logged(command, log, SHARE_OF_TESTS=f"{part}/{number}", COLUMNS="300"))
    return started


def report(run: Run, text: str, outcomes: dict[str, str], ended: bool) -> None:
    """Writes the counts, and a line for each test that failed, from what pytest printed."""
    counts = {
        kind: sum(outcome == kind for outcome in outcomes.values())
        for kind in ("passed", "failed", "error", "skipped")
    }
    run.write(**counts, in_time=ended)
    reasons = dict(_SUMMARY.findall(text))
    bad = [name for name, outcome in outcomes.items() if outcome in ("failed", "error")]
    for name in dict.fromkeys([*bad, *reasons]):
        run.write(test=name, failed=reasons.get(name, "")[:300] or "see the logs of the tests")
