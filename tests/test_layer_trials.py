"""The layers that run kernels, and the tiles of these kernels, are chosen by their durations."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fasttrain import kernel_build, layer_trials
from fasttrain.fused_block import Own, Spec
from fasttrain.layer_trials import Pass
from fasttrain.model import SMALL, MobileNetV3, use_kernels

CPU = torch.device("cpu")
ALL, SECOND, NONE = (Own(*[tile] * 6) for tile in (1, 2, 0))


def network(rows: int = 4) -> MobileNetV3:
    torch.manual_seed(0)
    found = MobileNetV3(SMALL[:rows], 0.35, 16, 4, 0.2).train()
    use_kernels(found, True, pointwise=True)
    return found


def passes_of(net: nn.Module, images: tuple[int, int]) -> list[Pass]:
    blocks = kernel_build.blocks_of(net, images[1])
    return [each for _, block, side in blocks for each in layer_trials._passes(block, 2, side)]


def kernel_calls(net: MobileNetV3) -> list[list[Any]]:
    return kernel_build.calls_of(net, (2, 32), (torch.bfloat16, torch.bfloat16))


def test_passes_have_the_shapes_of_an_update() -> None:
    net = network()
    layer_trials.apply(net, [ALL] * 4)
    found = {
        (each.x, each.weight, each.backward)
        for number, each in enumerate(passes_of(net, (2, 32)))
        if number > 1  # the first block does not expand
    }
    shapes = set()
    for name, *arguments in kernel_calls(net):
        backward = name.endswith("_backward")
        x, _, weight = arguments[3:6] if backward else arguments[:3]
        shapes.add((tuple(x["shape"]), tuple(weight["shape"]), backward))
    assert found == shapes and len(found) > 16


@pytest.mark.parametrize("number", range(2, 12))  # the first block does not expand
def test_all_contestants_compute_the_pass(number: int) -> None:
    each = passes_of(network(2), (2, 32))[number]
    torch.manual_seed(number)
    function, arguments = layer_trials._call(each, CPU, torch.float32)
    specs = [each.spec._replace(pointwise_kernel=True, own=own) for own in (NONE, ALL, SECOND)]
    plain, *ours = (function(spec, *copy.deepcopy(arguments)) for spec in specs)
    for found in ours:
        torch.testing.assert_close(found, plain)


Durations = tuple[list[float], float]  # of both tiles, and of PyTorch's code


def test_a_kernel_is_used_where_it_is_five_percent_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Pass] = []

    def durations(each: Pass, *others: Any) -> Durations:
        timed.append(each)
        if each.gated:
            others[-1].extend(["RuntimeError: out of shared memory"] * 2)
            return [math.inf, math.inf], 1.0
        if each.layer == "depthwise":
            return [1.1, 1.0], 1.06
        return [1.0, 1.0], 1.04 if each.backward else 1.06

    monkeypatch.setattr(layer_trials, "_durations", durations)
    net = layer_trials.candidates(network())[0]
    net.get_submodule("features.3").eval()  # a frozen block
    found, said = layer_trials.choose(net, (2, 32), torch.bfloat16, None)
    # The first block is gated, and does not expand. The third is frozen, the fourth is gated.
    assert found == [NONE, Own(1, 0, 1, 0, 2, 2), NONE, Own(1, 0, 0, 0, 0, 0)]
    assert len({each.key for each in timed}) == len(timed)
    gated = sum(each.gated for each in timed)
    assert said == (
        f"WARNING: {2 * gated} trials of {len(timed)} passes through layers failed, the first of "
        "them with RuntimeError: out of shared memory"
    )


Timed = Callable[[str, dict[str, float]], tuple[Durations, list[str]]]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    """Times the forward pass of a layer with made-up durations, and says which calls were made.

    A call is named by its tile, and "alone" is the bare convolution. It fails without a duration.
    """

    def name_of(call: Any) -> str:
        spec = call.args[0]
        return str(spec.own.expand) if isinstance(spec, Spec) and spec.own else "alone"

    def times(layer: str, seconds: dict[str, float]) -> tuple[Durations, list[str]]:
        launched: list[str] = []

        def launch(call: Any) -> float:
            launched.append(name_of(call))
            if launched[-1] not in seconds:
                raise RuntimeError("out of resource\nshared memory")
            return seconds[launched[-1]]

        monkeypatch.setattr(layer_trials, "launch", launch)
        monkeypatch.setattr(layer_trials, "duration", lambda second: second)
        monkeypatch.setattr(layer_trials, "CACHE_BYTES", 8)
        faults: list[str] = []
        passes = passes_of(network(2), (2, 32))[6:]  # of the second block
        each = next(each for each in passes if each.layer == layer)
        found = layer_trials._durations(each, CPU, torch.float32, None, faults)
        failed = sum(name not in seconds for name in launched)
        assert faults == ["RuntimeError: out of resource"] * failed
        return found, launched

    return times


def test_a_trial_that_fails_does_not_end_the_others(timed: Timed) -> None:
    assert timed("expand", {"0": 2.0, "2": 1.0}) == (([math.inf, 1.0], 2.0), ["1", "2", "0"])
    assert timed("expand", {"1": 2.0}) == (([2.0, math.inf], math.inf), ["1", "2", "0"])


def test_pytorchs_code_is_compiled_only_if_it_may_win(timed: Timed) -> None:
    tiles = {"1": 1.0, "2": 2.0}
    assert timed("depthwise", tiles | {"alone": 1.1}) == (([1.0, 2.0], 1.1), ["1", "2", "alone"])
    found, launched = timed("depthwise", tiles | {"alone": 1.01, "0": 1.2})
    assert (found, launched) == (([1.0, 2.0], 1.2), ["1", "2", "alone", "1", "2", "0"])


@pytest.mark.parametrize("backward", [False, True])
def test_the_bare_convolution_is_that_of_the_layer(backward: bool) -> None:
    each = next(e for e in passes_of(network(2), (2, 32))[10:] if e.backward == backward)
    assert each.layer == "depthwise"
    _, arguments = layer_trials._call(each, CPU, torch.float32)
    found: Any = layer_trials._convolution(each, arguments)()
    if backward:
        assert [tuple(part.shape) for part in found] == [each.x, each.weight]
    else:
        assert found.shape == (2, each.x[1], each.x[2] // 2, each.x[3] // 2)


def test_a_machine_without_kernels_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = pytest.importorskip("fasttrain.triton_parts", reason="Triton is not installed")

    def fold(partial: torch.Tensor, first: int) -> None:
        raise RuntimeError("Failed to find C compiler.\nInstall one.")

    monkeypatch.setattr(parts, "fold", fold)
    assert layer_trials.fault(CPU) == "RuntimeError: Failed to find C compiler."


def test_equal_layers_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Pass] = []

    def durations(each: Pass, *_: Any) -> Durations:
        timed.append(each)
        return [1.0, 1.0], 2.0

    monkeypatch.setattr(layer_trials, "_durations", durations)
    net = MobileNetV3((SMALL[4],) * 3, 0.35, 16, 4, 0.2).train()
    use_kernels(net, True, pointwise=True)
    layer_trials.apply(net, [ALL] * 3)
    assert layer_trials.choose(net, (2, 32), torch.bfloat16, None) == ([ALL] * 3, "")
    different = [each.key for each in passes_of(net, (2, 32))]
    assert len(timed) == len(set(different)) < len(different)


def test_the_choice_decides_what_runs_and_is_read_back() -> None:
    net = network()
    assert layer_trials.chosen_in(net) is None
    chosen = [NONE, Own(1, 0, 0, 0, 0, 0), NONE, Own(0, 0, 0, 2, 0, 2)]
    layer_trials.apply(net, [[*own] for own in chosen])
    assert layer_trials.chosen_in(net) == chosen
    calls = kernel_calls(net)
    kernels = ["depthwise_backward", "pointwise", "pointwise_backward"]
    assert sorted(call[0] for call in calls) == kernels
    assert {call[0]: call[-1] for call in calls if call[-1] == 2}.keys() == {*kernels[::2]}
    assert layer_trials.chosen_in(copy.deepcopy(net)) == chosen
    layer_trials.apply(net, None)
    assert layer_trials.chosen_in(net) is None


def test_there_is_no_kernel_for_wide_gradients() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    net = MobileNetV3(SMALL, 1.0, 16, 4, 0.2)
    found = layer_trials.with_kernels(net, 2)
    assert found[0] == Own(0, 0, 2, 2, 2, 2)  # does not expand
    assert found[1] == SECOND
    assert found[-1] == Own(2, 0, 2, 2, 2, 2)  # expands to 576 channels


def test_a_checkpoint_of_an_earlier_version_has_first_tiles() -> None:
    net = network(2)
    layer_trials.apply(net, [[False, False, True, False]] * 2)
    assert layer_trials.chosen_in(net) == [Own(0, 0, 1, 0, 1, 1)] * 2


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_gpu_times_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Durations] = []
    measure = layer_trials._durations

    def kept(*arguments: Any) -> Durations:
        found.append(measure(*arguments))
        return found[-1]

    monkeypatch.setattr(layer_trials, "_durations", kept)
    net, _ = layer_trials.candidates(MobileNetV3(SMALL[:3], 1.0, 16, 4, 0.2).cuda())
    passes = len({each.key for each in passes_of(net, (64, 64))[2:]})  # the first has no expand
    options = {"fallback_random": True}
    assert layer_trials.fault(torch.device("cuda")) == ""
    chosen, said = layer_trials.choose(net, (64, 64), torch.bfloat16, options)
    assert len(found) == passes
    assert all(1e-6 < seconds < 1 for ours, plain in found for seconds in (*ours, plain))
    assert len(chosen) == 3 and said == ""
