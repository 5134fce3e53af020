"""The kernels of a network are compiled ahead, by processes that need no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttrain import kernel_build, layer_trials
from fasttrain.kernel_build import Target, build, calls_of, compile_side_by_side
from fasttrain.model import SMALL, MobileNetV3, use_kernels

BF16 = (torch.bfloat16, torch.bfloat16)


def network(pointwise: bool = True) -> MobileNetV3:
    found = MobileNetV3(SMALL[:3], 0.35, 16, 4, 0.2).train()
    use_kernels(found, True, pointwise)
    return found


def test_the_calls_are_those_of_an_update() -> None:
    calls = calls_of(network(), (64, 224), BF16)
    names = [call[0] for call in calls]
    assert {*names} == {
        *("depthwise", "depthwise_backward", "pointwise", "pointwise_backward"),
    }
    assert names[0] == "depthwise_backward"  # the slowest first
    assert {name for name, *_ in calls_of(network(pointwise=False), (64, 224), BF16)} == {
        *("depthwise", "depthwise_backward"),
    }
    assert len({str(call) for call in calls}) == len(calls)
    x = next(call[1] for call in calls if call[0] == "depthwise")
    assert x["dtype"] == "bfloat16" and x["shape"][0] == 64
    frozen = network().eval()
    assert calls_of(frozen, (64, 224), BF16) == []


def test_kernels_are_compiled_into_tritons_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    calls = [call for call in calls_of(network(), (64, 224), BF16) if call[0] == "pointwise"][:2]
    assert compile_side_by_side(calls, Target(90, 132))
    assert {path.name for path in tmp_path.rglob("*.cubin")} == {"_forward.cubin", "_fold.cubin"}
    image = {"shape": [2, 12, 4, 4], "dtype": "bfloat16"}  # not a multiple of 8 channels
    weight = {"shape": [16, 12, 1, 1], "dtype": "bfloat16"}
    assert not compile_side_by_side([["pointwise", image, None, weight, 0]], Target(90, 132))


def test_a_network_is_built_once_and_again_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    compiled: list[int] = []

    def compile_them(calls: list[kernel_build.Call], target: Target) -> bool:
        compiled.append(len(calls))
        return len(compiled) > 1  # the first attempt fails

    monkeypatch.setattr(kernel_build, "compile_side_by_side", compile_them)
    for _ in range(3):
        build([network()], (64, 224), BF16, Target(90, 132))
    assert len(compiled) == 2 and compiled[0] > 0
    build([network()], (64, 160), BF16, Target(90, 132))
    build([network()], (64, 224), BF16, Target(80, 108))
    assert len(compiled) == 4
    build(layer_trials.candidates(network()), (64, 224), BF16, Target(90, 132))
    assert compiled[4] == 2 * compiled[0]  # each kernel with both tiles


SCRIPT = """
import os, pathlib, torch
from torch.nn import functional as F
from fasttrain.kernel_build import build, target_of
from fasttrain.model import build_model, use_kernels

def compiled():
    found = pathlib.Path(os.environ["TRITON_CACHE_DIR"]).rglob("*ward.cubin")
    return len([*found])

network = build_model("small", 1.0, 10, 0.0).cuda().to(memory_format=torch.channels_last).train()
use_kernels(network, True, pointwise=True)
build([network], (64, 224), (torch.bfloat16, torch.float32), target_of("cuda"))
print(compiled())
with torch.autocast("cuda", torch.bfloat16):
    images = torch.randn(64, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    loss = F.cross_entropy(network(images), torch.zeros(64, dtype=torch.int64, device="cuda"))
loss.backward()
print(compiled())
"""


@pytest.mark.gpu
def test_a_gpu_finds_the_kernels_that_were_compiled(gpu: None, tmp_path: Path) -> None:
    environ = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    out = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    before, after = map(int, out.split())
    assert before == after > 0
