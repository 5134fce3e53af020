"""Handles requests to stop a run, and ends a process whose launcher has ended."""

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

STOP_FILE_STATUS = 75  # exit status after a stop file: EX_TEMPFAIL of sysexits.h, "try again later"
ORPHAN_S = 45.0  # time to save and end after the launcher has ended; three updates are added
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # and SIGHUP, when a terminal closes
KILLED_S = 30  # default time from SIGTERM to SIGKILL of torch's launcher


def leave(status: int, text: str = "") -> NoReturn:
    """Ends the process at once, from any thread, and restores the terminal's cursor."""
    with contextlib.suppress(OSError, ValueError):
        if os.isatty(1):
            os.write(1, b"\n\x1b[?25h")  # the live view hides the cursor
        os.write(2, text.encode())
    os._exit(status)


class _StandardError:
    """A `Speaker` for the time before there is a display."""

    def say(self, text: str) -> None:
        os.write(2, f"{text}\n".encode())

    def quiet(self) -> None:
        pass


def _lose_terminal() -> None:
    """Redirects output from a closed terminal to /dev/null, because writing to it would fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    for file in (1, 2):
        if stat.S_ISCHR(os.fstat(file).st_mode):
            os.dup2(null, file)
    os.close(null)


class Patience:
    """How long this process may continue after its launcher has ended."""

    def __init__(self) -> None:
        self.slowest_s = 0.0  # longest time from one update or evaluation batch to the next

    def seconds(self) -> float:
        """The time for three updates and a save."""
        return ORPHAN_S + 3 * self.slowest_s


class Speaker(Protocol):
    """What prints to the user: `display.TrainDisplay`, or standard error."""

    def say(self, text: str) -> None:
        """Prints lines."""

    def quiet(self) -> None:
        """Ends the live view."""


class StopRequest:
    """Receives requests to stop: SIGTERM, SIGINT, SIGUSR1, SIGHUP or a file. All ranks agree.

    Before the first update there is nothing to save, so a signal ends the process at once. A second
    Ctrl-C always ends it at once.
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
            file: the run stops when this file exists. Only rank 0 has the path: it looks for the
                file, and prints for all ranks.
            timeout: how long ranks wait for each other.
            patience: is updated with the time of the slowest update.
            speaker: prints messages; by default on standard error.
        """
        self.file = file
        self.looked_at = 0.0  # time when the file was last looked for
        self.received = 0  # exit status of a request that this rank received; 0 for none
        self.decision = 0  # exit status that all ranks agreed on; 0 to continue
        self.interrupted = False  # True after a Ctrl-C
        self.called_at = 0.0  # time of the last call of `agreed`
        self.patience = patience or Patience()
        self.warned = False
        self.unsaved = False  # True once there is something to save
        self.speaker = speaker or _StandardError()
        self.group: Any = None
        if world_size > 1:
            self.group = distributed.new_group(backend="gloo", timeout=timeout)
        self.pending: tuple[torch.Tensor, Any] | None = None
        # Python calls a signal handler only after a call into torch has returned, for example after
        # a whole backward pass. Through this pipe, a thread gets the signal's number at once.
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(signal.SIGHUP, lambda *_: None)

    def _listen(self, pipe: int) -> None:
        while numbers := os.read(pipe, 16):
            for number in numbers:
                if number in (*SIGNALS, signal.SIGHUP):
                    self.receive(signal.Signals(number))

    def receive(self, number: signal.Signals) -> None:
        """Handles a signal, and prints that the run stops. Exits at once if nothing is unsaved."""
        status = 128 + number
        if number == signal.SIGHUP:
            _lose_terminal()
        if not self.unsaved or (number == signal.SIGINT and self.interrupted):
            leave(status, f"stopped by {number.name}, without saving\n")
        is_first = not self.received
        # After a Ctrl-C the launcher ends too and sends SIGTERM; the status of the Ctrl-C counts.
        if number == signal.SIGINT or not self.interrupted:
            self.received = status
        self.interrupted |= number == signal.SIGINT
        if self.file and is_first:
            self.speaker.quiet()
            self.speaker.say(
                f"{number.name}: stopping after this update{self._slowest()}, then saving; "
                f"process {os.getpid()} runs until then, a second Ctrl-C ends it at once"
            )

    def _slowest(self) -> str:
        slowest_s = self.patience.slowest_s
        return f" (updates took up to {slowest_s:.0f} s so far)" if slowest_s >= 2 else ""

    def agreed(self, unsaved: bool) -> int:
        """Returns the exit status with which all ranks stop, or 0. Every rank calls it once a step.

        With several ranks the answer is one step late. The all-reduce runs on the CPU during the
        step, so that nothing waits for the device.

        Args:
            unsaved: True if there are updates that are not saved, so that a signal must not end
                the process at once.
        """
        self.unsaved = unsaved
        now = time.monotonic()
        if self.called_at:
            self.patience.slowest_s = max(self.patience.slowest_s, now - self.called_at)
            self._warn_of_launcher()
        self.called_at = now
        if self.file and now - self.looked_at > 1:  # spares a shared file system
            self.looked_at = now
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
        """Warns once if torch's launcher would kill the run before it could save.

        A stop takes up to two updates, because the ranks agree one step late.
        """
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
    """Ends this process after `accelerate launch` has ended.

    `accelerate launch` does not pass signals on. So the kernel sends SIGTERM when the launcher
    ends. A process that hangs in a collective cannot react to that, so a thread ends the process
    after `Patience.seconds`.
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
