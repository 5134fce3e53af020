"""Blocks trained by the fused function give the results of PyTorch's layers."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Interpreter
from torch import Tensor, nn
from torch.nn import functional as F
from updates import assert_same, batches_for, carry_out, plan_for, recipe_for

from fasttrain import fused_block, layer_trials, operators
from fasttrain.fused_block import Own
from fasttrain.model import (
    ARCHS,
    LARGE,
    SMALL,
    InvertedResidual,
    MobileNetV3,
    Row,
    build_model,
    mobilenetv3_small,
    use_kernels,
)

CHANNELS_LAST = torch.channels_last


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=CHANNELS_LAST)


def kinds() -> list[tuple[int, Row]]:
    """One narrow block, with its number of input channels, for each kind that the tables have."""
    found: dict[tuple[int, Row], None] = {}
    for rows in (LARGE, SMALL):
        channels = 16
        for row in rows:
            shortcut = row.stride == 1 and channels == row.channels
            expansion = 1.0 if row.expansion == 1 else 2.0
            narrow = row._replace(expansion=expansion, channels=8 if shortcut else 16)
            found[8, narrow] = None
            channels = row.channels
    return list(found)


def gradients(block: Any, z: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The block's result, the gradients of input and weights, and the statistics, by name."""
    z = z.clone().requires_grad_()
    block.zero_grad()
    out = block(z)
    out.backward(grad)
    assert z.grad is not None
    found = {"out": out.detach(), "z": z.grad}
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found | {name: value.clone() for name, value in block.named_buffers()}


def compare(block: InvertedResidual, z: Tensor, by_operators: bool) -> None:
    """Asserts that the fused function gives the block's result and gradients, in float64."""
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.4)
    fused = copy.deepcopy(block)
    use_kernels(fused, True)
    assert fused.kernels
    fused.spec = fused.spec._replace(depthwise_kernel=by_operators, pointwise_kernel=by_operators)
    grad = torch.randn_like(copy.deepcopy(block)(z))
    expected, found = gradients(block, z, grad), gradients(fused, z, grad)
    for name, value in expected.items():
        # PyTorch's hard-sigmoid multiplies its gradient by 1/6 in float32: 3e-8 off.
        error = float((found[name] - value).double().norm() / (value.double().norm() + 1e-9))
        assert error < 1e-7, (name, error)


@pytest.mark.parametrize(("channels", "row"), kinds())
def test_every_gradient_of_each_kind_of_block_is_that_of_pytorchs_layers(
    channels: int, row: Row
) -> None:
    torch.manual_seed(0)
    block = InvertedResidual(channels, row, 1.0).double().train().to(memory_format=CHANNELS_LAST)
    z = images(3, channels, 5, 7)
    for by_operators in (False, True):
        compare(block, z, by_operators)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1.0, 0.75])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_gradient_of_every_block_of_the_four_networks(arch: Any, width: float) -> None:
    torch.manual_seed(0)
    network = build_model(arch, width, 10, 0.0).double().train().to(memory_format=CHANNELS_LAST)
    channels = network.features[0][0].out_channels  # type: ignore[index]
    for block in network.features[1:]:
        assert isinstance(block, InvertedResidual)
        compare(block, images(2, channels, 4, 5), by_operators=False)
        channels = block.out_channels


def operator_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Each operator with arguments, with and without BatchNorm before it."""
    x, y, wide = images(2, 8, 5, 6), images(2, 8, 3, 3), images(2, 16, 5, 6)
    taps, weight = torch.randn(8, 1, 3, 3).double(), torch.randn(16, 8, 1, 1).double()
    affine, per_image = torch.randn(1, 3, 8).double(), torch.randn(2, 3, 16).double()
    for groups in (1, 2):
        table = torch.randn(groups, 4, 8).double()
        yield operators.pointwise, (x, table, weight, operators.HARDSWISH)
        yield (
            operators.pointwise_backward,
            (wide, wide, per_image, x, table, weight, operators.RELU, None),
        )
    table = torch.randn(1, 4, 8).double()
    for maybe in (None, table):
        yield operators.depthwise, (x, maybe, taps, 2, operators.RELU, maybe is None)
        yield (
            operators.depthwise_backward,
            (y, y, affine, x, maybe, taps, 2, operators.HARDSWISH),
        )
    yield operators.pointwise, (x, None, weight, operators.NO_ACT, 2)
    yield (
        operators.pointwise_backward,
        (wide, wide, per_image, x, None, weight, operators.NO_ACT, x),
    )


def test_operators_are_registered_as_pytorch_wants_them() -> None:
    torch.manual_seed(0)
    for operator, arguments in operator_calls():
        torch.library.opcheck(operator, arguments)


def small(on: bool) -> nn.Module:
    torch.manual_seed(0)
    network = MobileNetV3(SMALL[:5], 0.35, 16, 4, 0.0).to(memory_format=CHANNELS_LAST)
    use_kernels(network, on)
    return network.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "row", [Row(3, 2.0, 8, 1, 1, 1), Row(5, 1.0, 8, 0, 0, 1), Row(3, 2.0, 16, 0, 1, 2)], ids=str
)
def test_a_block_compiles_as_one_graph_with_the_same_gradients(
    row: Row, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    block = InvertedResidual(8, row, 1.0).train()
    use_kernels(block, True, pointwise=True)
    layer_trials.apply(block, [Own(1, 0, 0, 2, 0, 2)])
    z = images(2, 8, 4, 4, dtype=dtype)
    grad = torch.randn_like(copy.deepcopy(block)(z))
    expected = gradients(copy.deepcopy(block), z, grad)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    found = gradients(compiled, z, grad)
    for name, value in expected.items():
        torch.testing.assert_close(found.get(name, found.get(f"_orig_mod.{name}")), value)


def five_blocks() -> nn.Module:
    torch.manual_seed(0)
    return MobileNetV3(SMALL[:5], 0.35, 16, 4, 0.2).to(memory_format=CHANNELS_LAST)


def compare_updates(mode: str, network: nn.Module, px: int, atol: float = 1e-4) -> None:
    """Trains 20 updates, with gradient accumulation, EMA and guard."""
    recipe = recipe_for(global_batch_size=16, micro_batch_size=8)
    plan = plan_for(recipe)
    batches = batches_for(plan, 20, (px,))
    expected, theirs = carry_out(mode, recipe, plan, batches, copy.deepcopy(network))
    found, ours = carry_out(f"{mode}+kernels", recipe, plan, batches, network)
    assert found == pytest.approx(expected, rel=1e-4)
    assert_same(ours, theirs, atol=atol)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_twenty_updates_with_kernels_are_those_without(mode: str) -> None:
    compare_updates(mode, five_blocks(), 32)


@pytest.mark.slow
def test_twenty_updates_of_a_whole_network_with_kernels_are_those_without() -> None:
    torch.manual_seed(0)
    network = mobilenetv3_small(0.35, num_classes=4, dropout=0.2).to(memory_format=CHANNELS_LAST)
    compare_updates("eager", network, 64, atol=1e-3)  # rounding moves a value across ReLU's kink


def test_an_update_that_the_guard_rejects_changes_nothing() -> None:
    recipe = recipe_for(max_skipped_steps=5)
    plan = plan_for(recipe)
    images_, labels = batches_for(plan, 1)[0]
    bad = (torch.full_like(images_, torch.inf), labels)
    mode = "eager+kernels"
    _, before = carry_out(mode, recipe, plan, [(images_, labels)], five_blocks())
    _, after = carry_out(mode, recipe, plan, [(images_, labels), bad], five_blocks())
    assert_same(after, before, rtol=0, atol=0)


def test_bfloat16_gives_the_loss_of_pytorchs_layers() -> None:
    x, labels = images(8, 3, 32, 32, dtype=torch.float32), torch.arange(8) % 4
    losses = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(small(on)(x), labels)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_evaluation_and_networks_without_kernels_use_pytorchs_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("the fused function was called")

    monkeypatch.setattr(fused_block, "run", refuse)
    x = images(2, 3, 32, 32, dtype=torch.float32)
    small(on=True).eval()(x)
    small(on=False)(x)
    with pytest.raises(AssertionError, match="the fused function was called"):
        small(on=True)(x)


def test_one_value_per_channel_is_an_error_as_in_batchnorm() -> None:
    block = InvertedResidual(8, Row(3, 2.0, 8, 0, 0, 1), 1.0).train()
    use_kernels(block, True)
    with pytest.raises(ValueError, match="more than one value per channel"):
        block(images(1, 8, 1, 1, dtype=torch.float32))


def test_a_network_with_kernels_can_be_scripted_and_exported() -> None:
    network = small(on=True).eval()
    x = images(2, 3, 32, 32, dtype=torch.float32)
    scripted = torch.jit.script(network)
    torch.testing.assert_close(scripted(x), network(x))


@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
@pytest.mark.parametrize("row", [Row(3, 2.0, 8, 1, 1, 1), Row(5, 1.0, 16, 1, 0, 2)], ids=str)
def test_a_block_with_kernels_of_a_gpu(
    interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch, row: Row, kind: str
) -> None:
    """Triton's interpreter runs them, within the whole block."""
    torch.manual_seed(0)
    block = InvertedResidual(8, row, 1.0).train()
    fused = copy.deepcopy(block)
    use_kernels(fused, True, pointwise=True)
    kernels = interpreter(f"{kind}_gpu")
    for name in (kind, f"{kind}_backward"):
        monkeypatch.setattr(operators, name, getattr(kernels, name))
    z = images(2, 8, 3, 4, dtype=torch.float32)
    grad = torch.randn_like(copy.deepcopy(block)(z))
    expected, found = gradients(block, z, grad), gradients(fused, z, grad)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHS)
def test_a_network_on_a_gpu_gives_the_loss_and_gradients_of_pytorchs_layers(
    gpu: None, arch: Any
) -> None:
    """In bfloat16. The layers in float32 say what rounding alone changes."""
    torch.manual_seed(0)
    network = build_model(arch, 1.0, 10, 0.0).cuda().to(memory_format=CHANNELS_LAST).train()
    x = torch.randn(32, 3, 224, 224, device="cuda").contiguous(memory_format=CHANNELS_LAST)
    labels = torch.arange(32, device="cuda") % 10

    def trained(bf16: bool, kernels: bool, pointwise: bool = False) -> tuple[float, Tensor]:
        copied = copy.deepcopy(network)
        use_kernels(copied, kernels, pointwise)
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(copied(x), labels)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in copied.parameters()])  # type: ignore[union-attr]

    exact, right = trained(bf16=False, kernels=False)
    loss, theirs = trained(bf16=True, kernels=False)
    for pointwise in (False, True):
        our_loss, ours = trained(bf16=True, kernels=True, pointwise=pointwise)
        assert abs(our_loss - exact) < max(2 * abs(loss - exact), 1e-3 * exact)
        assert (ours - right).norm() < 1.5 * (theirs - right).norm()
