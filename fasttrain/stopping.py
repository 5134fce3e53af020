"""How a run is asked to stop, and how a process ends with its launcher."""

import contextlib
import ctypes
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

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


def _lose_terminal() -> None:
    """Points output to nowhere where it went to a terminal that is closed: writing would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for file in (1, 2):
        if stat.S_ISCHR(os.fstat(file).st_mode):
            os.dup2(nowhere, file)
    os.close(nowhere)


class StopRequest:
    """SIGTERM, SIGINT, SIGUSR1, SIGHUP or a file: all processes agree at the next update.

    Where no update is done yet, so that there is nothing to save, a signal ends the process; as
    does a second Ctrl-C.
    """

    def __init__(
        self, world_size: int, file: Path | None, timeout: timedelta = timedelta(hours=1)
    ) -> None:
        """`file` asks to stop as well; for one process, which looks for it and speaks for all."""
        self.file = file
        self.file_seen_at = 0.0  # when it was last looked for
        self.received = 0  # the exit status that this process was asked for
        self.decision = 0  # and that all agreed on
        self.interrupted = False  # by Ctrl-C
        self.asked_at = 0.0  # when all were last asked
        self.slowest_s = 0.0  # longest time from one update, or batch of an evaluation, to the next
        self.warned = False
        self.unsaved: Callable[[], bool] = lambda: False  # whether there is something to save
        self.on_step: Callable[[], Any] = lambda: None
        self.quiet: Callable[[], Any] = lambda: None  # ends the live view
        self.say: Callable[[str], Any] = lambda text: os.write(2, f"{text}\n".encode())
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
        if not self.unsaved() or (number == signal.SIGINT and self.interrupted):
            leave(status, f"stopped by {number.name}, without saving\n")
        known = self.received
        if number == signal.SIGINT or not self.interrupted:  # whose launcher ends of it, too
            self.received = status
        self.interrupted |= number == signal.SIGINT
        if self.file and not known:
            self.quiet()
            self.say(
                f"{number.name}: stopping when this update has ended{self._usual()}, then saving; "
                f"process {os.getpid()} works until then, a second Ctrl-C ends it at once"
            )

    def _usual(self) -> str:
        return f", which took up to {self.slowest_s:.0f} s so far" if self.slowest_s >= 2 else ""

    def patience_s(self) -> float:
        """Seconds that this process may work on without its launcher: some updates, and a save."""
        return ORPHAN_S + 3 * self.slowest_s

    def agreed(self) -> int:
        """The exit status that all processes agreed to stop with, or 0; call it once a step.

        Over several processes it is known one step later: the exchange runs on the CPU beside the
        step, and nothing waits for the device.
        """
        now = time.monotonic()
        if self.asked_at:
            self.on_step()
            self.slowest_s = max(self.slowest_s, now - self.asked_at)
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
        if not elastic or self.warned or 2 * self.slowest_s < int(limit):
            return
        self.warned = True
        self.say(
            f"WARNING: updates take up to {self.slowest_s:.0f} s, and the launcher kills processes "
            f"{limit} s after a Ctrl-C or SIGTERM, before they could save: stop this run by "
            f"touch {self.file}, or launch it with TORCH_ELASTIC_SHUTDOWN_TIMEOUT="
            f"{10 * round(self.slowest_s)}"
        )


class Follower:
    """Ends this process with `accelerate launch`, which does not pass signals on.

    By the kernel's SIGTERM; where that is not heard, say in an exchange that never ends, for good.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.patience_s: Callable[[], float] = lambda: ORPHAN_S
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
        while (waited_s := time.monotonic() - gone_at) < self.patience_s():
            time.sleep(1)
        leave(
            128 + signal.SIGTERM,
            f"process {os.getpid()}: the launcher is gone, and no update has ended in "
            f"{waited_s:.0f} s: stopped without saving\n",
        )
