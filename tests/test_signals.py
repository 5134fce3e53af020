"""A run that is told to stop, by a signal or a file, saves and ends."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHECKOUT, environment, lines, run
from runs import (
    assert_same_result,
    num_updates,
    pid_of_trainer,
    start,
    wait_until,
)

from fasttrain import checkpoint, train


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_goes_on(
    tiny: Callable[..., Path],
    tmp_path: Path,
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGTERM goes to the launcher, as `kill` would send it; SIGINT to both, as Ctrl-C does; and
    of a launcher that is killed outright no orphan is left."""
    recipe = tiny(
        train={"epochs": 12, "eval_every_epochs": 12},
        checkpoint={"every_steps": 1000},
        log={"every_steps": 1},
    )
    folder = tmp_path / "run"
    launched = start(recipe)
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(lines(metrics, "train")) > 5, "a few updates")
    trainer = pid_of_trainer(launched.pid)
    os.kill(launched.pid, number)
    if number == signal.SIGINT:
        os.kill(trainer, number)
    wait_until(lambda: not Path(f"/proc/{trainer}").exists(), "the trainer's end")
    output = launched.communicate()[0]
    assert launched.returncode != 0
    (saved,) = checkpoint.find(folder / "checkpoints")
    assert f"stopped and saved as {saved}" in output
    step = checkpoint.read_state(saved).state.step
    assert 6 <= step < 60 and not (folder / "DONE").exists()
    if number != signal.SIGTERM:
        return

    train.main([str(recipe)])
    finished = capsys.readouterr().out
    assert f"going on from {saved}" in finished
    done = json.loads(finished.splitlines()[-1])
    assert done["step"] == 59 and done == json.loads((folder / "DONE").read_text())
    train.main([str(recipe), "--set", f"log.run_dir={tmp_path}/b"])
    assert_same_result(folder, tmp_path / "b")


def test_a_file_and_a_signal_stop_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The file by a status that says "try again"; SIGUSR1 as SLURM sends it before the limit."""
    recipe = tiny(
        train={"epochs": 200, "eval_every_epochs": 200},
        checkpoint={"every_steps": 1000},
        log={"every_steps": 1},
    )
    folder = tmp_path / "run"
    trainer = subprocess.Popen(
        [sys.executable, "fasttrain/train.py", recipe],
        cwd=CHECKOUT,
        env=environment(ACCELERATE_USE_CPU="1"),
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: num_updates(folder) > 5, "a few updates")
    trainer.send_signal(signal.SIGUSR1)
    output = trainer.communicate()[0]
    assert trainer.returncode == 128 + signal.SIGUSR1
    (saved,) = checkpoint.find(folder / "checkpoints")
    assert f"stopped and saved as {saved}" in output

    def touch_later() -> None:
        some = num_updates(folder) + 5
        wait_until(lambda: num_updates(folder) > some, "a few updates")
        (folder / "stop").touch()

    threading.Thread(target=touch_later).start()
    with pytest.raises(SystemExit) as status:
        train.main([str(recipe)])
    assert status.value.code == 75
    assert len(checkpoint.find(folder / "checkpoints")) == 2
    assert not (folder / "stop").exists() and not (folder / "DONE").exists()


def test_a_file_that_is_there_before_the_start_counts(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, stop = str(tiny(train={"max_steps": 2})), tmp_path / "run" / "stop"
    stop.parent.mkdir()
    stop.touch()
    with pytest.raises(SystemExit) as status:
        train.main([recipe])
    assert status.value.code == 75 and not stop.exists()
    assert "stopped before the first update; the same command goes on" in capsys.readouterr().out
    train.main([recipe])
    assert (tmp_path / "run" / "DONE").exists()


def test_before_the_first_update_a_signal_ends_it_at_once(tmp_path: Path) -> None:
    program = """
import os, signal, sys, time
from pathlib import Path
from fasttrain import stopping
stop = stopping.StopRequest(1, Path("stop"))
stop.say = lambda text: None
if "training" in sys.argv:
    stop.unsaved = lambda: True
    assert stop.agreed() == 0
    for number in (signal.SIGTERM, signal.SIGINT):  # the first of them
        os.kill(os.getpid(), number)
        time.sleep(0.3)
        assert stop.agreed() == 128 + number
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
    for words in ([], ["training"]):
        ended = run([sys.executable, "-c", program, *words], code=130)
        assert ended.stderr == "stopped by SIGINT, without saving\n"


def test_a_process_that_hears_nothing_ends_after_its_launcher(tmp_path: Path) -> None:
    """As one that waits in an exchange that will never end."""
    deaf = (
        "import os, signal, time\n"
        "from fasttrain import stopping\n"
        "stopping.ORPHAN_S = 1\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "stopping.Follower({'ACCELERATE_MIXED_PRECISION': 'no'})\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run(['python', '-c', {deaf!r}])"],
        cwd=CHECKOUT,
        env=environment(),
    )
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "a start")
    process = Path(f"/proc/{(tmp_path / 'pid').read_text()}")
    launcher.kill()
    launcher.wait()
    assert process.exists()
    wait_until(lambda: not process.exists(), "the end of an orphan")
