"""In half an hour of training, evaluating, saving and random kills, nothing grows."""

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHECKOUT, environment, lines

SOAK_S = float(os.environ.get("FASTTRAIN_SOAK_S", "1800"))
WARM_UP = 3  # evaluations of each life before it is measured
WARM_UP_S = 300  # at the most


def usage(pid: int) -> tuple[float, int, int]:
    """Resident memory in MiB, open files, threads."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"])


def evaluations(folder: Path) -> int:
    """The number of evaluations that the run has reported."""
    metrics = folder / "metrics.jsonl"
    return len(lines(metrics, "eval")) if metrics.exists() else 0


def warm_up(trainer: subprocess.Popen[bytes], folder: Path) -> None:
    """Waits for imports, first updates, evaluations and saves, however slow the machine is."""
    before, deadline = evaluations(folder), time.monotonic() + WARM_UP_S
    while evaluations(folder) < before + WARM_UP:
        assert trainer.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.slow
def test_memory_files_and_threads_stay_flat(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """`FASTTRAIN_SOAK_S` is the duration. Each process lives for 1 to 5 minutes."""
    folder, moments = tmp_path / "run", random.Random(0)
    recipe = tiny(
        train={
            "epochs": 1_000_000,
            "eval_every_epochs": 5,
            "mixup_alpha": 0.2,
            "execution": "eager",  # or it would try to compile first, in so long a run
        },
        data={"augment": "trivial", "erase": 0.5, "threads": 2},
        optim={"ema_decay": 0.9},
        checkpoint={"every_steps": 50},
    )
    begun, lives = time.monotonic(), 0
    while time.monotonic() - begun < SOAK_S:
        lives += 1
        life_s = min(moments.uniform(60, 300), max(60, SOAK_S - (time.monotonic() - begun)))
        with (tmp_path / "log").open("ab") as log:
            trainer = subprocess.Popen(
                [sys.executable, "fasttrain/train.py", recipe],
                cwd=CHECKOUT,
                env=environment(ACCELERATE_USE_CPU="1"),
                stdout=log,
                stderr=log,
            )
        warm_up(trainer, folder)
        seen = []
        until = time.monotonic() + life_s
        while time.monotonic() < until:
            assert trainer.poll() is None, (tmp_path / "log").read_text()[-2000:]
            seen.append(usage(trainer.pid))
            time.sleep(0.5)
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        third = len(seen) // 3
        early, late = (
            [statistics.median(column) for column in zip(*part, strict=True)]
            for part in (seen[:third], seen[-third:])
        )
        step = lines(folder / "metrics.jsonl", "train")[-1]["step"]
        print(
            f"life {lives}: {life_s:.0f} s, update {step:,}; MiB, files, threads: "
            f"{early} -> {late}, most {[max(column) for column in zip(*seen, strict=True)]}",
            flush=True,
        )
        assert late[0] < 1.05 * early[0] + 5, "memory grows"
        assert late[1] <= early[1] and late[2] <= early[2], "files or threads grow"
    assert len(list((folder / "checkpoints").iterdir())) <= 4
