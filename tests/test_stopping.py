"""Requests to stop are obeyed, and a process ends soon after its launcher."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from fasttrain import stopping
from fasttrain.stopping import StopRequest


class Left(Exception):
    """Stands in for the end of the process."""


@pytest.fixture
def stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StopRequest]:
    """The request to stop of a run on one process."""
    numbers = (*stopping.SIGNALS, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]

    def leave(status: int, text: str = "") -> NoReturn:
        raise Left(status, text)

    monkeypatch.setattr(stopping, "leave", leave)
    yield StopRequest(1, tmp_path / "stop")
    signal.set_wakeup_fd(-1)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_before_the_first_update_a_signal_ends_the_run_without_saving(stop: StopRequest) -> None:
    stop.agreed(unsaved=False)  # training begins
    with pytest.raises(Left) as left:
        stop.receive(signal.SIGINT)
    assert left.value.args == (130, "stopped by SIGINT, without saving\n")


def test_a_request_is_reported_at_once_and_a_second_ctrl_c_ends_the_process(
    stop: StopRequest,
) -> None:
    said: list[str] = []
    stop.unsaved, stop.patience.slowest_s = True, 61.0
    stop.speaker = SimpleNamespace(say=said.append, quiet=lambda: said.append("quiet"))
    stop.receive(signal.SIGINT)
    assert said[0] == "quiet" and said[1].startswith(
        "SIGINT: stopping after this update (updates took up to 61 s so far), then saving; "
        f"process {os.getpid()} runs until then"
    )
    stop.receive(signal.SIGTERM)  # of the launcher's end
    assert stop.agreed(unsaved=True) == 130 and len(said) == 2
    with pytest.raises(Left):
        stop.receive(signal.SIGINT)


def test_signals_are_heard_while_torch_computes(stop: StopRequest) -> None:
    """A long call delays Python's signal handlers, as a backward pass does."""
    stop.unsaved, heard = True, threading.Event()
    stop.speaker = SimpleNamespace(say=lambda text: heard.set(), quiet=lambda: None)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert heard.wait(20) and stop.agreed(unsaved=True) == 128 + signal.SIGUSR1


def test_slow_updates_are_waited_for(stop: StopRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    stop.agreed(unsaved=True)
    assert stop.patience.seconds() == stopping.ORPHAN_S
    for seconds in (70, 50):
        now += seconds
        stop.agreed(unsaved=True)
    assert stop.patience.slowest_s == 70 and stop.patience.seconds() > 3 * 70


def test_a_run_whose_launcher_would_kill_it_gives_a_warning(
    stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    stop.speaker, now = SimpleNamespace(say=said.append), 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for seconds in (0, 10, 20, 20):
        now += seconds
        stop.agreed(unsaved=True)
    (warning,) = said
    assert "updates take up to 20 s, and the launcher kills processes 30 s after" in warning
    assert f"touch {stop.file}" in warning and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=200" in warning
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "200")
    stop.warned = False
    stop.agreed(unsaved=True)
    assert len(said) == 1


def test_the_end_of_the_process_shows_the_cursor_again() -> None:
    """The live view hides the cursor of the terminal."""
    ours, theirs = os.openpty()
    process = os.fork()
    if process == 0:
        os.dup2(theirs, 1)
        os.dup2(theirs, 2)
        stopping.leave(7, "stopped\n")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7
    assert os.read(ours, 100) == b"\r\n\x1b[?25hstopped\r\n"
    for file in (ours, theirs):
        os.close(file)


def test_a_terminal_that_closes_lets_the_run_save() -> None:
    """A broken SSH connection closes the terminal in this way."""
    ours, theirs = os.openpty()
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(ours)
            os.dup2(theirs, 1)
            os.dup2(theirs, 2)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
            stop = StopRequest(1, None)
            stop.unsaved = True
            os.kill(os.getpid(), signal.SIGHUP)
            ends = time.monotonic() + 60
            while not stop.received and time.monotonic() < ends:
                time.sleep(0.01)
            os.write(1, b"goes nowhere")
            os.write(write, str(stop.agreed(unsaved=True)).encode())
        finally:
            os._exit(0)
    os.close(ours)
    os.waitpid(process, 0)
    os.close(write)
    assert os.read(read, 10) == b"129"
    for file in (theirs, read):
        os.close(file)


def test_under_nohup_the_end_of_the_terminal_is_ignored() -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    heard = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        StopRequest(1, None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, heard)
        for number, handler in zip(stopping.SIGNALS, before, strict=True):
            signal.signal(number, handler)
