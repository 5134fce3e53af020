"""Two machines that are launched by hand, as the README says, train one network.

Needs root and iproute2: python -m pytest -n 0 -s -m slow tests/test_two_machines.py
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT, TIMEOUT_S, environment, lines, run
from safetensors.torch import load_file

from fasttrain import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.getuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2"
    ),
]
FIRST = "10.77.0.1"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces with a link between them, whose interfaces are called eth-ft."""
    names = [f"ft-{os.getpid()}-{number}" for number in (0, 1)]
    for name in names:
        ip("netns", "add", name)
    try:
        here, there = ("link", "add", "eth-ft", "netns", names[0]), ("eth-ft", "netns", names[1])
        ip(*here, "type", "veth", "peer", "name", *there)
        for number, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth-ft")
            ip("-n", name, "link", "set", "eth-ft", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


def launch(machine: str, number: int, recipe: Path, *words: str) -> subprocess.Popen[str]:
    command = (
        f"ip netns exec {machine} accelerate launch --multi_gpu --rdzv_backend static "
        f"--num_machines 2 --machine_rank {number} --main_process_ip {FIRST} "
        f"--main_process_port 29500 --num_processes 4 fasttrain/train.py {recipe}"
    )
    return subprocess.Popen(
        [*command.split(), *words],
        cwd=CHECKOUT,
        env=environment(ACCELERATE_USE_CPU="1", GLOO_SOCKET_IFNAME="eth-ft"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(launched: list[subprocess.Popen[str]]) -> list[str]:
    return [each.communicate(timeout=TIMEOUT_S)[0] for each in launched]


def test_two_machines_give_the_weights_of_one(
    machines: list[str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny(data={"stage": str(tmp_path / "stage")})
    outputs = ended([launch(name, number, recipe) for number, name in enumerate(machines)])
    assert (tmp_path / "run" / "DONE").exists(), outputs
    assert "4 x cpu" in outputs[0] and "on 2 nodes" in outputs[0]
    here = tmp_path / "here"
    command = ["accelerate", "launch", "--multi_gpu", "--num_processes", "4"]
    words = ["--main_process_port", "0", "fasttrain/train.py", recipe]
    run([*command, *words, "--set", f"log.run_dir={here}"], ACCELERATE_USE_CPU="1")
    ours, expected = (
        load_file(checkpoint.find(folder / "checkpoints")[0] / "model.safetensors")
        for folder in (tmp_path / "run", here)
    )
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_machines_that_differ_are_refused(
    machines: list[str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    launched = [
        launch(name, number, tiny(), "--set", f"train.seed={number}")
        for number, name in enumerate(machines)
    ]
    outputs = ended(launched)
    assert all(each.returncode for each in launched)
    assert re.search(r"train\.seed: 1 for rank 2 on \S+, but rank 0 on \S+: 0", outputs[0])
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_a_broken_network_ends_both_machines(
    machines: list[str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny(
        train={"epochs": 300, "hang_timeout_s": 5.0},
        checkpoint={"every_steps": 5},
        log={"every_steps": 1},
    )
    launched = [launch(name, number, recipe) for number, name in enumerate(machines)]
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + TIMEOUT_S
    while not (metrics.exists() and len(lines(metrics, "train")) > 10):
        assert time.monotonic() < deadline and launched[0].poll() is None
        time.sleep(0.1)
    ip("-n", machines[0], "link", "set", "eth-ft", "down")
    cut_at = time.monotonic()
    outputs = ended(launched)
    print(f"ended {time.monotonic() - cut_at:.0f} s after the cut")
    silent = r"rank 0 on \S+: no step for \d+ s: these ranks give no sign of life; they are"
    assert re.search(silent + r".*\n  rank 2 on \S+, last at update \d+\n  rank 3 on", outputs[0])
    assert "has not answered for" in outputs[1] and "machine of rank 0 is gone" in outputs[1]
    assert checkpoint.find(tmp_path / "run" / "checkpoints")
