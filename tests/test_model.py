"""The networks equal an independent implementation of their description."""

import math
import warnings
from pathlib import Path
from typing import Literal

import pytest
import reference_model as reference
import torch
from torch import nn

from fasttrain.model import (
    ARCHS,
    LARGE,
    SMALL,
    InvertedResidual,
    Row,
    StemConv2d,
    build_model,
    count_macs,
    mobilenetv3_large,
    mobilenetv3_small,
    use_kernels,
)

Arch = Literal["large", "small"]
NETWORKS = {
    ("large", 1.0): (5_483_032, 216.59),
    ("large", 0.75): (3_993_528, 154.56),
    ("small", 1.0): (2_542_856, 56.51),
    ("small", 0.75): (2_041_872, 43.40),
}


@pytest.mark.parametrize(("arch", "width"), NETWORKS)
def test_networks_have_the_published_size(arch: Arch, width: float) -> None:
    parameters, mmacs = NETWORKS[arch, width]
    model = build_model(arch, width, 1000, 0.2)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(count_macs(model, 224) / 1e6, 2) == mmacs


@pytest.mark.parametrize("arch", ["large", "small"])
@pytest.mark.parametrize("width", [1.0, 0.75, 0.5, 1.25])
def test_names_and_shapes_are_the_published_ones(arch: Arch, width: float) -> None:
    state = build_model(arch, width, 1000, 0.2).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == reference.shapes(arch, width)
    assert list(state) == list(reference.shapes(arch, width))


@pytest.mark.parametrize(("arch", "width"), [*NETWORKS, ("large", 1.25), ("small", 0.5)])
def test_logits_equal_the_reference(arch: Arch, width: float) -> None:
    values = {k: reference.formula(k, s) for k, s in reference.shapes(arch, width).items()}
    images = reference.formula_images(2, 64)
    expected = torch.from_numpy(reference.logits(arch, width, values, images))
    model = build_model(arch, width, 1000, 0.2).double().eval()
    state = {k: torch.as_tensor(v) for k, v in values.items()}
    model.load_state_dict(state)
    channels_last = model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        found = channels_last(
            torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
        )
    # float64, because in float32 a flipped kernel would hide in the rounding
    assert (found - expected).abs().max() < 1e-10
    assert expected.abs().max() > 0.1
    assert (expected[0] - expected[1]).abs().max() > 1e-7


def test_squeeze_excite_stands_before_the_activation() -> None:
    block = mobilenetv3_large().features[11].conv
    assert isinstance(block, nn.Sequential)
    kinds = [type(layer).__name__ for layer in block]
    assert kinds == [
        *("Conv2d", "BatchNorm2d", "Hardswish", "DepthwiseConv2d", "BatchNorm2d"),
        *("SqueezeExcite", "Hardswish", "Conv2d", "BatchNorm2d"),
    ]


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = mobilenetv3_large()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)
            assert module.weight.eq(1).all() and module.bias.eq(0).all()
        elif isinstance(module, nn.Linear):
            assert module.bias.eq(0).all()
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.15)
        elif isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.15)


def test_head_follows_the_data() -> None:
    model = mobilenetv3_small(0.75, num_classes=10, dropout=0.1)
    assert model.classifier[3].out_features == 10
    assert model.classifier[0].out_features == 1024
    assert model.classifier[2].p == 0.1
    assert model(torch.zeros(2, 3, 40, 48)).shape == (2, 10)


@pytest.mark.parametrize("arch", ["large", "small"])
def test_stages_begin_where_the_image_is_halved(arch: Arch) -> None:
    model = build_model(arch, 0.35, 4, 0.2)
    blocks = {"large": (2, 4, 7, 13, 16), "small": (1, 2, 4, 9, 12)}[arch]
    for stages, number in enumerate(blocks, start=1):
        model.freeze(stages)
        model.eval()
        model.train()
        for place, layer in enumerate(model.features):
            frozen = place < number
            assert layer.training != frozen
            assert all(p.requires_grad != frozen for p in layer.parameters())
        assert model.conv.training == model.conv[0].weight.requires_grad == (stages < 5)
        assert model.classifier.training and model.classifier[0].weight.requires_grad


def test_stochastic_depth_grows_with_depth_and_needs_a_shortcut() -> None:
    for arch, rows in zip(ARCHS, (LARGE, SMALL), strict=True):
        with torch.device("meta"):
            model = build_model(arch, 1.0, 4, 0.2, drop_path=0.28)
            plain = build_model(arch, 1.0, 4, 0.2)
        blocks = [layer for layer in model.features if isinstance(layer, InvertedResidual)]
        found = [block.drop_path.p if block.drop_path else None for block in blocks]
        channels = [16, *(row.channels for row in rows)]
        expected = [
            0.28 * number / (len(rows) - 1)
            if row.stride == 1 and row.channels == channels[number] and number
            else None
            for number, row in enumerate(rows)
        ]
        assert found == pytest.approx(expected) and found[-1] == pytest.approx(0.28)
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert all(block.drop_path is None for block in plain.features[1:])


def test_a_block_is_left_out_for_some_images_and_scaled_for_the_others() -> None:
    torch.manual_seed(0)
    block = InvertedResidual(16, Row(3, 4.0, 16, 1, 1, 1), 1.0, drop_path=0.25)
    block.conv.eval()  # fixed statistics, so that the block does not depend on the other images
    x = torch.randn(4000, 16, 2, 2)
    with torch.no_grad():
        added = block(x) - x
        whole = block.conv(x)
        assert torch.equal(block.eval()(x), x + whole)
    left_out = added.flatten(1).abs().amax(1) == 0
    torch.testing.assert_close(added[~left_out], whole[~left_out] / 0.75, rtol=1e-4, atol=1e-5)
    assert left_out.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_blocks_with_stochastic_depth_train_by_pytorchs_layers() -> None:
    model = build_model("small", 0.35, 4, 0.2, drop_path=0.1)
    use_kernels(model, True)
    for block in model.features[1:]:
        assert block.kernels == (block.drop_path is None)


@pytest.mark.slow
@pytest.mark.parametrize("drop_path", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_scripted_traced_and_exported_with_the_same_logits(
    drop_path: float, tmp_path: Path
) -> None:
    model = mobilenetv3_small(0.35, num_classes=4, drop_path=drop_path).eval()
    images = torch.randn(2, 3, 32, 32)  # the last blocks see images smaller than their kernels
    expected = model(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is old
        for form in (torch.jit.script(model), torch.jit.trace(model, images)):
            form.save(tmp_path / "form.pt")
            torch.testing.assert_close(torch.jit.load(tmp_path / "form.pt")(images), expected)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
    for size in (2, 5):
        images = torch.randn(size, 3, 32, 32)
        torch.testing.assert_close(exported(images), model(images))


def test_padding_the_channels_of_images_changes_no_result() -> None:
    """On a GPU, the first convolution works with eight channels."""
    torch.manual_seed(0)
    conv = StemConv2d(3, 16, 3, 2, 1, bias=False).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 33, 32).contiguous(memory_format=torch.channels_last)
    results = [conv(images), conv.padded(images)]
    assert results[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(results[1], results[0])
    grads = [torch.autograd.grad(y.square().sum(), conv.weight)[0] for y in results]
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[1].shape == conv.weight.shape
