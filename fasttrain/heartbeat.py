"""Ends a run of several processes that hangs, and names the rank that the others are waiting for.

Every rank writes signs of life into the launcher's key-value store: the number of its steps, and a
tick count that its thread increments. A rank reads the signs of the others only when its own steps
stop. A rank without new ticks is frozen, or its machine is gone. If all ranks tick, the rank with
the fewest steps is stuck, and it prints its stack. The timeouts of NCCL and gloo name no rank, or
only a rank that waited.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from torch import distributed

Item = TypeVar("Item")

STATUS = 124  # exit status of a run that hung; the command `timeout` uses the same
START_S = 3600.0  # limit for the first step, which includes compiling and slow storage
LOST_S = 300.0  # without a step or an answer from the store for so long, rank 0's machine is lost
INTERVAL_S = 5.0  # the most time between two signs of life; with a short timeout, a tenth of it


class Sign(NamedTuple):
    """A sign of life in the store. The order of the fields is the format there."""

    steps: int  # steps done plus batches received
    ticks: int  # increments by the thread that writes the signs
    process: str  # `rank 3 on node2`
    position: str  # `update 1234`


class Heartbeat:
    """Writes the signs of life of this rank, and watches those of the others."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout_s: float,
        connect: Callable[[], Any],
        end: Callable[[], Any] = lambda: os._exit(STATUS),
    ) -> None:
        """Starts two threads, because the one that uses the store may be blocked there. Starts none
        if the world size is 1.

        Args:
            timeout_s: seconds without a step after which the run is ended. The first step has at
                least `START_S`.
            connect: returns a new connection to the store, which one thread uses.
            end: ends the process.
        """
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.connect, self.end = connect, end
        self.interval_s = min(INTERVAL_S, timeout_s / 10)
        self.position = "before the first update"
        self.process = f"rank {rank} on {os.uname().nodename}"
        self.steps = 0
        self.called = False  # True after the first call of `step`
        self.started = False  # True after the first update, which may compile
        self.stepped_at = self.answered_at = time.monotonic()
        self.seen: list[dict[int, Sign]] = []  # the signs by rank, one item per read of the store
        self.closed = threading.Event()
        for target in (self._give_signs, self._watch) if world_size > 1 else ():
            threading.Thread(target=target, daemon=True).start()

    def step(self, position: str) -> None:
        """Counts a step of this rank. All ranks call this equally often.

        The first call comes before the first update.

        Args:
            position: where this rank is, such as `update 1234`.
        """
        self.started, self.called = self.called, True
        self.position = position
        self._count_progress()

    def _count_progress(self) -> None:
        self.steps += 1
        self.stepped_at = time.monotonic()

    def counted(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Counts each received batch as progress.

        This distinguishes a rank that waits for its own input from the ranks that wait for it in a
        collective.
        """
        for batch in batches:
            self._count_progress()
            yield batch

    def close(self) -> None:
        """Stops watching."""
        self.closed.set()

    def _limit_s(self) -> float:
        return self.timeout_s if self.started else max(START_S, self.timeout_s)

    def _give_signs(self) -> None:
        store, ticks, known = None, 0, set[int]()
        while not self.closed.wait(self.interval_s if ticks else 0):
            ticks += 1
            try:
                store = store or self.connect()
                sign = Sign(self.steps, ticks, self.process, self.position)
                store.set(_key(self.rank), json.dumps(sign))
                if time.monotonic() - self.stepped_at > self._limit_s() / 2:
                    known |= {r for r in set(range(self.world_size)) - known if _has(store, r)}
                    ranks = sorted(known)
                    found = store.multi_get([_key(rank) for rank in ranks])
                    signs = (Sign(*json.loads(text)) for text in found)
                    self.seen.append(dict(zip(ranks, signs, strict=True)))
                else:
                    self.seen.clear()
                self.answered_at = time.monotonic()
            except Exception:  # `_watch` acts if the store does not answer for too long
                store = None

    def _watch(self) -> None:
        while not self.closed.wait(self.interval_s):
            still_s = time.monotonic() - self.stepped_at
            silent_s = time.monotonic() - self.answered_at
            lost = min(still_s, silent_s) > min(LOST_S, self.timeout_s)
            if lost or still_s > self._limit_s():
                self._report(still_s, silent_s, lost)
                self.close()
                self.end()

    def _report(self, still_s: float, silent_s: float, lost: bool) -> None:
        """Prints which ranks are at fault, once per run where that is possible."""
        known = len(self.seen) > 1
        if lost or (not known and silent_s > 3 * self.interval_s):
            self._say(
                f"no step for {still_s:.0f} s, and the launcher's store has not answered for "
                f"{silent_s:.0f} s: the machine of rank 0 is gone, or the network to it failed"
            )
            return
        if not known:
            self._say(
                f"no step for {still_s:.0f} s, and the launcher's store answered too rarely to "
                "tell which rank is at fault"
            )
            return
        at_fault, why = culprits(self.seen[0], self.seen[-1], self.world_size)
        speaker = min(set(range(self.world_size)) - at_fault.keys(), default=self.rank)
        if self.rank == speaker:
            names = "\n  ".join(at_fault.values())
            self._say(f"no step for {still_s:.0f} s: {why}\n  {names}")
        if self.rank in at_fault and len(at_fault) < self.world_size:
            self._say("the other ranks are waiting for this one, which is here:")
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{self.process}: {text}\n")
        sys.stderr.flush()


def culprits(
    first: Mapping[int, Sign], last: Mapping[int, Sign], world_size: int
) -> tuple[dict[int, str], str]:
    """Finds the ranks that the others are waiting for.

    Args:
        first: the signs that were read first after the steps stopped, by rank.
        last: the signs that were read last.
    Returns:
        A description of each rank at fault, and a sentence on what is wrong with them.
    """
    absent = set(range(world_size)) - last.keys()
    if absent:
        return {rank: f"rank {rank}" for rank in sorted(absent)}, "these ranks have not started:"
    found = {rank for rank in last if rank in first and last[rank].ticks == first[rank].ticks}
    if found and len(first) == world_size:
        why = "these ranks give no sign of life; they are frozen, or their machine is gone:"
    else:
        fewest = min(sign.steps for sign in last.values())
        found = {rank for rank, sign in last.items() if sign.steps == fewest}
        why = "these ranks are stuck, and all others are waiting for them:"
        if len(found) == world_size:
            why = "all ranks are alive and in the same step; one is stuck, or the network fails:"
    described = {rank: f"{last[rank].process}, last at {last[rank].position}" for rank in found}
    return dict(sorted(described.items())), why


def launcher_store(environ: Mapping[str, str]) -> Any:
    """Connects to the key-value store with which the launcher's processes found each other."""
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    return distributed.TCPStore(
        address, port, timeout=timedelta(seconds=30), wait_for_workers=False
    )


def _key(rank: int) -> str:
    return f"fasttrain/signs/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def _has(store: Any, rank: int) -> bool:
    return bool(store.check([_key(rank)]))
