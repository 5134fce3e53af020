"""The 1 x 1 layers that run kernels are chosen by their durations."""

import copy
from typing import Any

import pytest
import torch

from fasttrain import kernel_build, layer_trials
from fasttrain.fused_block import Own
from fasttrain.layer_trials import Pass
from fasttrain.model import SMALL, MobileNetV3, use_kernels

CPU = torch.device("cpu")
ALL, NONE = Own(True, True, True, True), Own(False, False, False, False)


def network(rows: int = 4) -> MobileNetV3:
    torch.manual_seed(0)
    found = MobileNetV3(SMALL[:rows], 0.35, 16, 4, 0.2).train()
    use_kernels(found, True, pointwise=True)
    return found


def passes_of(net: MobileNetV3, images: tuple[int, int]) -> list[Pass]:
    blocks = kernel_build.blocks_of(net, images[1])
    return [each for _, block, side in blocks for each in layer_trials._passes(block, 2, side)]


def pointwise_calls(net: MobileNetV3) -> list[list[Any]]:
    calls = kernel_build.calls_of(net, (2, 32), (torch.bfloat16, torch.bfloat16))
    return [call for call in calls if call[0].startswith("pointwise")]


def test_passes_have_the_shapes_of_an_update() -> None:
    net = network()
    layer_trials.apply(net, [ALL] * 4)
    found = {
        (*each.x, each.filters, each.backward)
        for number, each in enumerate(passes_of(net, (2, 32)))
        if number > 1  # the first block does not expand
    }
    shapes = set()
    for name, *arguments in pointwise_calls(net):
        backward = name == "pointwise_backward"
        x, _, weight = arguments[3:6] if backward else arguments[:3]
        shapes.add((*x["shape"], weight["shape"][0], backward))
    assert found == shapes and len(found) > 8


@pytest.mark.parametrize("number", range(8))
def test_both_contestants_compute_the_pass(number: int) -> None:
    each = passes_of(network(2), (2, 32))[number]
    torch.manual_seed(number)
    function, arguments = layer_trials._call(each, CPU, torch.float32)
    specs = [each.spec._replace(pointwise_kernel=True, own=own) for own in (ALL, NONE)]
    ours, plain = (function(spec, *copy.deepcopy(arguments)) for spec in specs)
    assert isinstance(ours, tuple) and isinstance(plain, tuple)
    torch.testing.assert_close(ours, plain)


def test_a_kernel_is_used_where_it_is_five_percent_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Pass] = []

    def seconds(each: Pass, *_: Any) -> tuple[float, float]:
        timed.append(each)
        if each.gated:
            raise RuntimeError("out of shared memory")
        return 1.0, 1.04 if each.backward else 1.06

    monkeypatch.setattr(layer_trials, "_seconds", seconds)
    net = network()
    net.features[3].eval()  # a frozen block
    layer_trials.apply(net, layer_trials.with_kernels(net))
    said: list[str] = []
    found = layer_trials.choose(net, (2, 32), torch.bfloat16, None, said.append)
    # Of the first block, project alone, and it is gated. The third is frozen.
    assert found == [NONE, Own(True, False, True, False), NONE, Own(True, False, False, False)]
    assert len({each.key for each in timed}) == len(timed)
    assert said == [
        f"WARNING: 4 of {len(timed)} passes of 1 x 1 layers could not be timed: RuntimeError: out "
        "of shared memory"
    ]


def test_equal_layers_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Pass] = []

    def seconds(each: Pass, *_: Any) -> tuple[float, float]:
        timed.append(each)
        return 1.0, 2.0

    monkeypatch.setattr(layer_trials, "_seconds", seconds)
    net = MobileNetV3((SMALL[4],) * 3, 0.35, 16, 4, 0.2).train()
    use_kernels(net, True, pointwise=True)
    layer_trials.apply(net, [ALL] * 3)
    assert layer_trials.choose(net, (2, 32), torch.bfloat16, None, print) == [ALL] * 3
    different = [each.key for each in passes_of(net, (2, 32))]
    assert len(timed) == len(set(different)) < len(different)


def test_the_choice_decides_what_runs_and_is_read_back() -> None:
    net = network()
    assert layer_trials.chosen_in(net) is None
    chosen = [NONE, Own(True, False, False, False), NONE, Own(False, False, False, True)]
    layer_trials.apply(net, [[*own] for own in chosen])
    assert layer_trials.chosen_in(net) == chosen
    calls = pointwise_calls(net)
    assert sorted(call[0] for call in calls) == ["pointwise", "pointwise_backward"]
    assert layer_trials.chosen_in(copy.deepcopy(net)) == chosen
    layer_trials.apply(net, None)
    assert layer_trials.chosen_in(net) is None


def test_there_is_no_kernel_for_wide_gradients() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    net = MobileNetV3(SMALL, 1.0, 16, 4, 0.2)
    found = layer_trials.with_kernels(net)
    assert found[0] == Own(False, False, True, True)  # does not expand
    assert found[1] == ALL
    assert found[-1] == Own(True, False, True, True)  # expands to 576 channels


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_gpu_times_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[float, float]] = []
    measure = layer_trials._seconds

    def kept(*arguments: Any) -> tuple[float, float]:
        found.append(measure(*arguments))
        return found[-1]

    monkeypatch.setattr(layer_trials, "_seconds", kept)
    net = MobileNetV3(SMALL[:3], 1.0, 16, 4, 0.2).cuda().train()
    use_kernels(net, True, pointwise=True)
    layer_trials.apply(net, layer_trials.with_kernels(net))
    passes = len({each.key for each in passes_of(net, (64, 64))[2:]})  # the first has no expand
    options = {"fallback_random": True}
    chosen = layer_trials.choose(net, (64, 64), torch.bfloat16, options, print)
    assert len(found) == passes and all(1e-6 < seconds < 1 for pair in found for seconds in pair)
    assert len(chosen) == 3
