"""Ends a run of several processes that has stopped moving, and names the one all others wait for.

Every process leaves a sign of life in the launcher's key-value store: how many steps it has done,
and a number that its thread raises. Nobody reads them until its own steps stop. Then the one whose
thread is silent is frozen or gone with its machine; else the one that has done the fewest steps is
stuck, and shows where. Timeouts of NCCL and gloo name nobody, or the process that waited.
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

STATUS = 124  # of a run that was ended so; as of the command `timeout`
START_S = 3600.0  # allowed up to the end of the first step, for compiling and slow storage
LOST_S = 300.0  # without a step or an answer of the store, after which rank 0's machine is lost
INTERVAL_S = 5.0  # between two signs of life, at most; a tenth of the timeout if that is less


class Sign(NamedTuple):
    """What a process has left in the store."""

    steps: int  # that it has done, and batches that it has got
    ticks: int  # of its thread
    place: str  # `rank 3 on node2`
    where: str  # `update 1234`


class Heartbeat:
    """The signs of life of this process, and its eye on those of the others."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout_s: float,
        connect: Callable[[], Any],
        end: Callable[[], Any] = lambda: os._exit(STATUS),
    ) -> None:
        """Begins at once, in two threads, as one that uses the store may be held up there; of a
        process alone nothing is expected.

        Args:
            timeout_s: seconds without a step, after the first, until the run is ended.
            connect: gives a connection to the store, for a thread alone.
            end: ends the process.
        """
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.connect, self.end = connect, end
        self.interval_s = min(INTERVAL_S, timeout_s / 10)
        self.where = "before the first update"
        self.place = f"rank {rank} on {os.uname().nodename}"
        self.steps = 0
        self.asked = False  # `step` was called
        self.started = False  # the first update, which may compile, is done
        self.stepped_at = self.answered_at = time.monotonic()
        self.seen: list[dict[int, Sign]] = []  # by rank; each time the store was asked
        self.closed = threading.Event()
        for target in (self._give_signs, self._watch) if world_size > 1 else ():
            threading.Thread(target=target, daemon=True).start()

    def step(self, where: str) -> None:
        """Counts a step of this rank, and notes where it is, such as `update 1234`.

        All ranks call it equally often; the first time before the first update, which may compile.
        """
        self.started, self.asked = self.asked, True
        self.where = where
        self._move()

    def _move(self) -> None:
        self.steps += 1
        self.stepped_at = time.monotonic()

    def counted(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Counts each received batch as progress.

        So a rank that waits for its own input can be told from ranks that wait for it in a
        collective.
        """
        for batch in batches:
            self._move()
            yield batch

    def close(self) -> None:
        """From here on nothing is expected."""
        self.closed.set()

    def _limit_s(self) -> float:
        return self.timeout_s if self.started else max(START_S, self.timeout_s)

    def _give_signs(self) -> None:
        store, ticks, known = None, 0, set[int]()
        while not self.closed.wait(self.interval_s if ticks else 0):
            ticks += 1
            try:
                store = store or self.connect()
                sign = Sign(self.steps, ticks, self.place, self.where)
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
            except Exception:  # `_watch` knows when it was last answered
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
        known = len(self.seen) > 1
        if lost or (not known and silent_s > 3 * self.interval_s):
            self._say(
                f"no step for {still_s:.0f} s, and the launcher's store has not answered for "
                f"{silent_s:.0f} s: the machine of rank 0 is gone, or the network to it"
            )
            return
        if not known:
            self._say(f"no step for {still_s:.0f} s, and the launcher's store tells too little")
            return
        at_fault, why = culprits(self.seen[0], self.seen[-1], self.world_size)
        speaker = min(set(range(self.world_size)) - at_fault.keys(), default=self.rank)
        if self.rank == speaker:
            names = "\n  ".join(at_fault.values())
            self._say(f"no step for {still_s:.0f} s: {why}\n  {names}")
        if self.rank in at_fault and len(at_fault) < self.world_size:
            self._say("is what the others wait for, and is here:")
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{self.place}: {text}\n")
        sys.stderr.flush()


def culprits(
    before: Mapping[int, Sign], now: Mapping[int, Sign], world_size: int
) -> tuple[dict[int, str], str]:
    """The processes that the others wait for, described, and in what way they fail.

    Args:
        before: the first signs after the steps stopped, by rank.
        now: the last ones.
    """
    absent = set(range(world_size)) - now.keys()
    if absent:
        return {rank: f"rank {rank}" for rank in sorted(absent)}, "these have not begun at all:"
    frozen = {rank for rank in now if rank in before and now[rank].ticks == before[rank].ticks}
    if frozen and len(before) == world_size:
        why = "these give no sign of life; frozen, or gone with their machine:"
    else:
        fewest = min(sign.steps for sign in now.values())
        frozen = {rank for rank, sign in now.items() if sign.steps == fewest}
        why = "these are stuck, and all others wait for them:"
        if len(frozen) == world_size:
            why = "all are alive and in the same step; one never ends it, or the network fails:"
    return {rank: f"{now[rank].place}, last at {now[rank].where}" for rank in sorted(frozen)}, why


def launcher_store(environ: Mapping[str, str]) -> Any:
    """A connection to the store through which the launcher's processes found each other."""
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    return distributed.TCPStore(
        address, port, timeout=timedelta(seconds=30), wait_for_workers=False
    )


def _key(rank: int) -> str:
    return f"fasttrain/signs/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def _has(store: Any, rank: int) -> bool:
    return bool(store.check([_key(rank)]))
