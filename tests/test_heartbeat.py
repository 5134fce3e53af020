"""A run whose processes stop making progress is ended, and the process at fault is named."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import children_of, is_alive, num_updates, start, wait_until
from torch import distributed

from fasttrain import heartbeat
from fasttrain.heartbeat import Heartbeat, Sign, culprits

TIMEOUT = 0.5


def sign(rank: int, steps: int = 7, ticks: int = 3) -> Sign:
    return Sign(steps, ticks, f"rank {rank} on node{rank // 2}", f"update {steps}")


def test_the_ranks_that_others_wait_for_are_named() -> None:
    all_well = {rank: sign(rank) for rank in range(4)}
    later = {rank: sign(rank, ticks=9) for rank in range(4)}
    named, why = culprits(all_well, later | {2: sign(2, steps=6, ticks=9)}, 4)
    assert named == {2: "rank 2 on node1, last at update 6"} and "stuck" in why
    named, why = culprits(all_well, later | {2: sign(2), 3: sign(3)}, 4)
    assert list(named) == [2, 3] and "no sign of life" in why
    named, why = culprits(all_well, later, 4)
    assert len(named) == 4 and "in the same step; one is stuck" in why
    del later[3]
    named, why = culprits(all_well, later, 4)
    assert named == {3: "rank 3"} and "not started" in why


@pytest.fixture
def store() -> Iterator[Callable[[], Any]]:
    """Connects to a store in this process. In a run the launcher holds the store."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = distributed.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    environ = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    yield lambda: heartbeat.launcher_store(environ)
    del server


def started(store: Callable[[], Any], ended: list[int], number: int = 3) -> list[Heartbeat]:
    def end(rank: int) -> Callable[[], None]:
        return lambda: ended.append(rank)

    return [Heartbeat(rank, number, TIMEOUT, store, end(rank)) for rank in range(number)]


def wait_for(ended: list[int], number: int) -> None:
    deadline = time.monotonic() + 30
    while len(ended) < number and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(ended) == number


def test_a_stuck_process_is_named_and_shows_where(
    store: Callable[[], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    beats = started(store, ended)
    for _ in range(20):  # longer than the timeout, with all of them moving
        for beat in beats:
            beat.step("update 1")
        time.sleep(TIMEOUT / 10)
    assert not ended
    for beat in (beats[0], beats[2]):  # rank 1 waits for its batch, they for its gradients
        assert next(beat.counted(iter("batch"))) == "b"
    wait_for(ended, 3)
    time.sleep(TIMEOUT)  # as their threads still use the store
    said = capfd.readouterr().err
    assert re.search(
        r"rank 0 on \S+: no step for \d+ s: these ranks are stuck, and all others", said
    )
    assert re.search(r"\n  rank 1 on \S+, last at update 1\n", said)
    assert (
        "the other ranks are waiting for this one, which is here:" in said
        and "test_heartbeat.py" in said
    )


def test_processes_end_when_the_machine_of_rank_0_is_gone(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refused() -> Any:
        raise ConnectionError

    ended: list[int] = []
    started(refused, ended, 2)  # before the first step, for which there would be an hour
    wait_for(ended, 2)
    assert "the machine of rank 0 is gone, or the network to it" in capfd.readouterr().err


def test_no_progress_is_expected_before_the_first_step_and_after_the_end(
    store: Callable[[], Any],
) -> None:
    ended: list[int] = []
    beats = started(store, ended)
    time.sleep(2 * TIMEOUT)
    for beat in beats:
        beat.step("update 1")
        beat.close()
    time.sleep(2 * TIMEOUT)
    assert not ended


def test_a_frozen_process_ends_the_run(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny(
        train={"epochs": 200, "global_batch_size": 6, "hang_timeout_s": 3.0},
        checkpoint={"every_steps": 1000},
        log={"every_steps": 1},
    )
    launched = start(recipe, world=2)
    wait_until(lambda: num_updates(tmp_path / "run") > 5, "a few updates")
    frozen = next(pid for pid in children_of(launched.pid) if is_rank(pid, 1))
    os.kill(frozen, signal.SIGSTOP)
    stopped_at = time.monotonic()
    others = set(children_of(launched.pid)) - {frozen}
    wait_until(lambda: not any(map(is_alive, others)), "the end of rank 0")
    took = time.monotonic() - stopped_at
    os.kill(frozen, signal.SIGKILL)  # which its launcher would do half a minute later
    output = launched.communicate(timeout=60)[0]
    assert re.search(
        r"these ranks give no sign of life.*\n  rank 1 on \S+, last at update \d+\n", output
    )
    assert launched.returncode == 1 and took < 20


def is_rank(pid: int, rank: int) -> bool:
    return f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0")
