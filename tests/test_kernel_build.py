"""The kernels of a network are compiled ahead, by processes that need no GPU."""

import os
from pathlib import Path

import pytest
import torch

from fasttrain import kernel_build
from fasttrain.kernel_build import Target, build, calls_of
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


def test_kernels_are_compiled_once_into_tritons_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    calls = [call for call in calls_of(network(), (64, 224), BF16) if call[0] == "pointwise"][:2]
    build(calls, Target(90, 132))
    compiled = {path.name for path in tmp_path.rglob("*.cubin")}
    assert compiled == {"_forward.cubin", "_fold.cubin"}
    before = sorted(os.listdir(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(kernel_build.subprocess, "Popen", refuse)
    build(calls, Target(90, 132))
    assert sorted(os.listdir(tmp_path)) == before


def test_kernels_that_fail_to_compile_are_left_to_their_first_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    image = {"shape": [2, 12, 4, 4], "dtype": "bfloat16"}  # not a multiple of 8 channels
    weight = {"shape": [16, 12, 1, 1], "dtype": "bfloat16"}
    build([["pointwise", image, None, weight, 0]], Target(90, 132))
    assert not [*tmp_path.iterdir()]
