"""How a run is asked to stop, and how a process ends with its launcher."""

import contextlib
import ctypes
import os
import signal
import stat
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import distributed

STOP_FILE_STATUS = 75  # of a run that a file asked to stop: sysexits.h's "try again later"
ORPHAN_S = 45.0  # that a process has to save and end once its launcher is gone, and some updates
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # and SIGHUP, of a terminal that closes
KILLED_S = 30  # after which torch's launcher kills what it has asked to stop, if nobody says more


def leave(status: int, text: str = "") -> NoReturn:
    """Ends the process at once, from any thread, and leaves a usable terminal behind."""
    with contextlib.suppress(OSError, ValueError):
        if os.isatty(1):
            os.write(1, b"\n\x1b[?25h")  # the live view hides the cursor
        os.write(2, text.encode())
    os._exit(status)


class _StandardError:
    """Speaks before there is a display."""

    def say(self, text: str) -> None:
        os.write(2, f"{text}\n".encode())

    def quiet(self) -> None:
        pass


def _lose_terminal() -> None:
    """Points output to nowhere where it went to a terminal that is closed: writing would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for file in (1, 2):
        if stat.S_ISCHR(os.fstat(file).st_mode):
            os.dup2(nowhere, file)
    os.close(nowhere)


class Patience:
    """How long this process may work on without its launcher."""

    def __init__(self) -> None:
        self.slowest_s = 0.0  # longest time from one update, or batch of an evaluation, to the next

    def seconds(self) -> float:
        """Time for some updates and a save."""
        return ORPHAN_S + 3 * self.slowest_s


class Speaker(Protocol):
    """What shows the run on a terminal: `display.TrainDisplay`."""

    def say(self, text: str) -> None:
        """Prints lines."""

    def quiet(self) -> None:
        """Ends the live view."""


class StopRequest:
    """A request to stop by SIGTERM, SIGINT, SIGUSR1, SIGHUP or a file. All ranks agree on it.

    Before the first update is done there is nothing to save, and a signal ends the process at once.
    So does a second Ctrl-C.
    """

    def __init__(
        self,
        world_size: int,
        file: Path | None,
        timeout: timedelta = timedelta(hours=1),
        patience: Patience | None = None,
        speaker: Speaker | None = None,
    ) -> None:
        """
        Args:
            file: asks to stop when it exists. Only rank 0 has it: it looks for the file, and speaks
                for all ranks.
            timeout: that ranks wait for each other.
            patience: learns how long updates take.
            speaker: prints on standard error if unset.
        """
        self.file = file
        self.file_seen_at = 0.0  # when it was last looked for
        self.received = 0  # the exit status that this process was asked for
        self.decision = 0  # and that all agreed on
        self.interrupted = False  # by Ctrl-C
        self.asked_at = 0.0  # when all were last asked
        self.patience = patience or Patience()
        self.warned = False
        self.unsaved = False  # True once there is something to save
        self.speaker = speaker or _StandardError()
        self.group: Any = None
        if world_size > 1:
            self.group = distributed.new_group(backend="gloo", timeout=timeout)
        self.pending: tuple[torch.Tensor, Any] | None = None
        # Python would call a handler only when a call of torch's returns: after a whole backward
        # pass, for one. The number of a signal goes to a thread at once.
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, lambda *_: None)

    def _listen(self, pipe: int) -> None:
        while numbers := os.read(pipe, 16):
            for number in numbers:
                if number in (*SIGNALS, signal.SIGHUP):
                    self.receive(signal.Signals(number))

    def receive(self, number: signal.Signals) -> None:
        """Notes that a signal asks to stop, and says so; or leaves at once."""
        status = 128 + number
        if number == signal.SIGHUP:
            _lose_terminal()
        if not self.unsaved or (number == signal.SIGINT and self.interrupted):
            leave(status, f"stopped by {number.name}, without saving\n")
        known = self.received
        if number == signal.SIGINT or not self.interrupted:  # whose launcher ends of it, too
            self.received = status
        self.interrupted |= number == signal.SIGINT
        if self.file and not known:
            self.speaker.quiet()
            self.speaker.say(
                f"{number.name}: stopping when this update has ended{self._usual()}, then saving; "
                f"process {os.getpid()} works until then, a second Ctrl-C ends it at once"
            )

    def _usual(self) -> str:
        slowest_s = self.patience.slowest_s
        return f", which took up to {slowest_s:.0f} s so far" if slowest_s >= 2 else ""

    def agreed(self, unsaved: bool) -> int:
        """The exit status that all ranks agreed to stop with, or 0. To be called once a step.

        Several ranks know it one step later: the all-reduce runs on the CPU beside the step, so
        that nothing waits for the device.

        Args:
            unsaved: True if an update is done, which a signal from now on must not lose.
        """
        self.unsaved = unsaved
        now = time.monotonic()
        if self.asked_at:
            self.patience.slowest_s = max(self.patience.slowest_s, now - self.asked_at)
            self._warn_of_launcher()
        self.asked_at = now
        if self.file and now - self.file_seen_at > 1:  # not to trouble a shared file system
            self.file_seen_at = now
            if self.file.exists():
                self.received = self.received or STOP_FILE_STATUS
        if self.group is None:
            self.decision = self.received
            return self.decision
        previous = self.pending
        flag = torch.tensor([self.received])
        work = distributed.all_reduce(
            flag, distributed.ReduceOp.MAX, group=self.group, async_op=True
        )
        self.pending = (flag, work)
        if previous is None:
            return 0
        previous[1].wait()
        self.decision = int(previous[0])
        return self.decision

    def _warn_of_launcher(self) -> None:
        """Says once that torch's launcher would kill the run before two updates have ended."""
        limit = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(KILLED_S))
        elastic = self.file and "TORCHELASTIC_RUN_ID" in os.environ and limit.isdecimal()
        slowest_s = self.patience.slowest_s
        if not elastic or self.warned or 2 * slowest_s < int(limit):
            return
        self.warned = True
        self.speaker.say(
            f"WARNING: updates take up to {slowest_s:.0f} s, and the launcher kills processes "
            f"{limit} s after a Ctrl-C or SIGTERM, before they could save: stop this run by "
            f"touch {self.file}, or launch it with TORCH_ELASTIC_SHUTDOWN_TIMEOUT="
            f"{10 * round(slowest_s)}"
        )


class Follower:
    """Ends this process with `accelerate launch`, which does not pass signals on.

    The kernel sends SIGTERM when the launcher ends. A process that does not react to it, as it
    waits in a collective that never ends, is ended when its patience is over.
    """

    def __init__(self, environ: Mapping[str, str], patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        if "ACCELERATE_MIXED_PRECISION" not in environ:
            return
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        self.parent = os.getppid()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(1)
        gone_at = time.monotonic()
        while (waited_s := time.monotonic() - gone_at) < self.patience.seconds():
            time.sleep(1)
        leave(
            128 + signal.SIGTERM,
            f"process {os.getpid()}: the launcher is gone, and no update has ended in "
            f"{waited_s:.0f} s: stopped without saving\n",
        )
