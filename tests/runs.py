"""Starts runs of the trainer in processes of their own, and compares what two runs left."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import CHECKOUT, TIMEOUT_S, environment, lines
from safetensors.torch import load_file

from fasttrain import checkpoint

# A recipe with everything that draws random numbers or has a state.
ALL: dict[str, dict[str, Any]] = {
    "data": {
        "augment": "trivial",
        "color_jitter": (0.4, 0.4, 0.4, 0.1),
        "erase": 0.5,
        "scales_px": (32, 40, 48),
    },
    "model": {"drop_path": 0.3},
    "optim": {"ema_decay": 0.9},
    "train": {
        "micro_batch_size": 4,
        "cpu_threads": 1,
        "label_smoothing": 0.1,
        "mixup_alpha": 0.2,
        "cutmix_alpha": 1.0,
    },
    "log": {"samples": True},
}
# Fields of log lines that differ between equal runs.
MEASURED = (
    *("images_per_s", "data_wait", "eval_s", "seconds", "limit", "loader", "time", "memory_gib"),
)


def launch(world: int) -> list[str]:
    """The words that launch a command on `world` processes. The launcher chooses a free port."""
    if world == 1:
        return ["accelerate", "launch"]
    several = ["--multi_gpu", "--num_processes", str(world), "--main_process_port", "0"]
    return ["accelerate", "launch", *several]


def start(recipe: Path, *settings: str, world: int = 1) -> subprocess.Popen[str]:
    """Starts a run on CPUs. Its output is one stream."""
    words = [word for setting in settings for word in ("--set", setting)]
    return subprocess.Popen(
        [*launch(world), "fasttrain/train.py", recipe, *words],
        cwd=CHECKOUT,
        env=environment(ACCELERATE_USE_CPU="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition: Callable[..., object], what: str) -> None:
    """Waits for a condition, at most TIMEOUT_S; `what` names it in the error."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def children_of(launcher: int) -> list[int]:
    """The ids of the processes that a process started; none if it has ended."""
    try:
        return [*map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())]
    except OSError:
        return []


def pid_of_trainer(launcher: int) -> int:
    """The id of the first process that a launcher started."""
    return children_of(launcher)[0]


def is_alive(pid: int) -> bool:
    """False if a process has ended, also if its parent has not waited for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def num_updates(folder: Path) -> int:
    """The number of finished updates, of a run that logs each of them."""
    path = folder / "metrics.jsonl"
    return len(lines(path, "train")) if path.exists() else 0


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, or 0."""
    return max((int(p.name[5:]) for p in checkpoint.find(folder / "checkpoints")), default=0)


def result_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[dict[str, Any]]]]:
    """Every tensor of the newest checkpoint, and every log line without its measured fields."""
    newest = checkpoint.find(folder / "checkpoints")[0]
    tensors = {
        f"{file.stem}.{name}": tensor
        for file in newest.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    training = torch.load(newest / "training.pt", weights_only=True)
    for number, values in training["optimizer"]["state"].items():
        tensors |= {f"{name}.{number}": value for name, value in values.items()}
    records = {
        path.name: [
            {key: value for key, value in record.items() if key not in MEASURED}
            for record in lines(path)
        ]
        for path in folder.glob("*.jsonl")
    }
    return tensors, records


def assert_same_result(a: Path, b: Path) -> None:
    """Two runs have the same log lines, and the same tensors bit for bit."""
    (tensors_a, records_a), (tensors_b, records_b) = result_of(a), result_of(b)
    assert records_a == records_b
    assert tensors_a.keys() == tensors_b.keys()
    for name, tensor in tensors_a.items():
        assert torch.equal(tensor, tensors_b[name]), name
