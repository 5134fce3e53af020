"""A run that a signal or a file asks to stop saves a checkpoint and ends."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TIMEOUT_S
from runs import (
    assert_same_result,
    is_alive,
    num_updates,
    pid_of_trainer,
    start,
    wait_until,
)

from fasttrain import checkpoint, stopping, train


@pytest.fixture
def endless(tiny: Callable[..., Path]) -> Path:
    """A recipe that does not end before a request to stop comes, and logs each update."""
    return tiny(
        train={"epochs": 200, "eval_every_epochs": 200},
        checkpoint={"every_steps": 1000},
        log={"every_steps": 1},
    )


@pytest.mark.parametrize(
    "number",
    ["SIGTERM", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGINT", "SIGKILL"))],
)
def test_a_signal_to_the_launcher_saves_and_the_same_command_resumes(
    endless: Path, tmp_path: Path, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`kill` sends SIGTERM to the launcher alone, and Ctrl-C sends SIGINT to the trainer too.

    SIGKILL leaves the launcher no time to end its trainer, and no orphan may stay.
    """
    folder = tmp_path / "run"
    launched = start(endless)
    wait_until(lambda: num_updates(folder) > 5, "a few updates")
    trainer = pid_of_trainer(launched.pid)
    os.kill(launched.pid, signal.Signals[number])
    if number == "SIGINT":
        os.kill(trainer, signal.SIGINT)
    wait_until(lambda: not Path(f"/proc/{trainer}").exists(), "the trainer's end")
    output = launched.communicate()[0]
    assert launched.returncode != 0
    (saved,) = checkpoint.find(folder / "checkpoints")
    assert f"stopped and saved as {saved}" in output
    step = checkpoint.read_state(saved).state.step
    assert 6 <= step < 1000 and not (folder / "DONE").exists()

    end = ["--set", f"train.max_steps={step + 3}"]
    train.main([str(endless), *end])
    finished = capsys.readouterr().out
    assert f"resuming from {saved}" in finished
    done = json.loads(finished.splitlines()[-1])
    assert done["step"] == step + 2 and done == json.loads((folder / "DONE").read_text())
    train.main([str(endless), *end, "--set", f"log.run_dir={tmp_path}/straight"])
    assert_same_result(folder, tmp_path / "straight")


def test_sigusr1_and_the_stop_file_have_a_status_of_their_own(
    endless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM sends SIGUSR1 before the time limit; the file's status means "try again later"."""
    folder = tmp_path / "run"
    requests: dict[int, Callable[[], None]] = {
        128 + signal.SIGUSR1: lambda: os.kill(os.getpid(), signal.SIGUSR1),
        stopping.STOP_FILE_STATUS: (folder / "stop").touch,
    }
    for expected, request in requests.items():
        enough = num_updates(folder) + 5

        def ask(request: Callable[[], None] = request, enough: int = enough) -> None:
            wait_until(lambda: num_updates(folder) > enough, "a few updates")
            request()

        asking = threading.Thread(target=ask)
        asking.start()
        with pytest.raises(SystemExit) as status:
            train.main([str(endless)])
        asking.join()
        assert status.value.code == expected
        saved = checkpoint.find(folder / "checkpoints")[0]
        assert f"stopped and saved as {saved}" in capsys.readouterr().out
    assert len(checkpoint.find(folder / "checkpoints")) == 2
    assert not (folder / "stop").exists() and not (folder / "DONE").exists()


def test_a_stop_file_that_was_there_before_the_start_stops_the_run(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, stop = str(tiny(train={"max_steps": 2})), tmp_path / "run" / "stop"
    stop.parent.mkdir()
    stop.touch()
    with pytest.raises(SystemExit) as status:
        train.main([recipe])
    assert status.value.code == 75 and not stop.exists()
    assert "stopped before the first update; the same command resumes" in capsys.readouterr().out
    train.main([recipe])
    assert (tmp_path / "run" / "DONE").exists()


def fork(work: Callable[[], object]) -> int:
    """Starts a process that has imported everything already, and ends it after `work`."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(99)
    return child


@pytest.mark.parametrize("training", [False, True])
def test_the_first_ctrl_c_with_nothing_to_save_or_the_second_ends_the_process(
    training: bool, tmp_path: Path
) -> None:
    """Before the first update, the first Ctrl-C ends the process; later, the second does."""

    def work() -> None:
        os.dup2(os.open(tmp_path / "errors", os.O_WRONLY | os.O_CREAT), 2)
        stop = stopping.StopRequest(1, tmp_path / "stop")
        stop.speaker = SimpleNamespace(say=lambda text: None, quiet=lambda: None)
        if training:
            assert stop.agreed(unsaved=True) == 0
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
                wait_until(
                    lambda number=number: stop.agreed(unsaved=True) == 128 + number, "the signal"
                )
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(TIMEOUT_S)

    assert os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1]) == 130
    assert (tmp_path / "errors").read_text() == "stopped by SIGINT, without saving\n"


def test_a_process_that_ignores_sigterm_ends_after_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that waits in a collective that never ends behaves like this."""
    monkeypatch.setattr(stopping, "ORPHAN_S", 1)
    file = tmp_path / "pid"

    def trainer() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stopping.Follower({"ACCELERATE_MIXED_PRECISION": "no"})
        file.write_text(str(os.getpid()))
        time.sleep(TIMEOUT_S)

    launcher = fork(lambda: os.waitpid(fork(trainer), 0))
    wait_until(lambda: file.exists() and file.read_text(), "a start")
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    pid = int(file.read_text())
    assert is_alive(pid)
    wait_until(lambda: not is_alive(pid), "the end of an orphan")
