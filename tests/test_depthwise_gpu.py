"""The depthwise kernels give the float64 results, and compile to fast code for GPUs."""

import itertools
import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from ahead import compiled
from conftest import Interpreter
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.depthwise import DepthwiseConv2d
from fasttrain.model import ARCHS, InvertedResidual, SqueezeExcite, build_model

ACTS = (nn.Identity(), nn.ReLU(), nn.Hardswish())


class Layer(NamedTuple):
    """A depthwise layer with what comes before and after it."""

    channels: int
    kernel: int
    stride: int
    act: int | None  # None: no table
    per_image: bool = False  # squeeze-excite follows: sums and affine for each image

    def __str__(self) -> str:
        act = "raw" if self.act is None else ("none", "relu", "hswish")[self.act]
        return f"{self.channels}-{self.kernel}-{self.stride}-{act}" + "-se" * self.per_image


def layers_of(network: nn.Module) -> Iterator[tuple[Layer, int]]:
    """All depthwise layers of a network, each with the side of its images at 224 px."""
    side, act = 112, nn.Hardswish()  # the stem's
    for block in network.modules():
        if isinstance(block, InvertedResidual):
            parts = list(block.conv)
            at = next(n for n, part in enumerate(parts) if isinstance(part, DepthwiseConv2d))
            conv = parts[at]
            assert isinstance(conv, DepthwiseConv2d)
            before = parts[at - 1] if at else act
            gated = any(isinstance(part, SqueezeExcite) for part in parts)
            number = 2 if isinstance(before, nn.Hardswish) else 1
            yield Layer(block.hidden, conv.kernel_size[0], conv.stride[0], number, gated), side
            side = -(-side // conv.stride[0])


LAYERS = dict.fromkeys(
    pair
    for arch, width in itertools.product(ARCHS, (1.0, 0.75))
    for pair in layers_of(build_model(arch, width, 10, 0.2))
)
KINDS = sorted({layer for layer, _ in LAYERS})


# --------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch did not write holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def by_channel(values: Tensor) -> Tensor:
    """`(N, C)` as `(N, C, 1, 1)`, in float64."""
    return values.double()[:, :, None, None]


def apart(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of what is expected."""
    assert found.shape == expected.shape
    expected = expected.detach()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def check(
    module: ModuleType,
    layer: Layer,
    images: tuple[int, int, int],
    dtype: torch.dtype,
    tile: int,
    device: str = "cpu",
) -> None:
    """Compares both directions with float64, on fresh random inputs.

    Args:
        images: their number, height and width.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(repr((layer, images)).encode()))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def images_of(*shape: int) -> Tensor:
        return random(*shape).to(dtype, memory_format=torch.channels_last)

    channels, side, stride, act, per_image = layer
    number, height, width = images
    x = images_of(number, channels, height, width)
    weight = 0.3 * random(channels, 1, side, side)
    table = None
    z = x.double()
    if act is not None:
        table = random(1, 4, channels)
        z = z * by_channel(table[:, 0]) + by_channel(table[:, 1])
    z.requires_grad_()
    weight64 = weight.double().requires_grad_()
    expected = F.conv2d(ACTS[act or 0](z), weight64, None, stride, side // 2, groups=channels)
    y, sums, squares = module.depthwise(x, table, weight, stride, act or 0, per_image, tile)
    dims = (2, 3) if per_image else (0, 2, 3)
    errors = {
        "y": apart(y, expected),
        "sums": apart(sums, expected.sum(dims).view(-1, channels)),
        "squares": apart(squares, expected.square().sum((0, 2, 3))),
    }

    affine = random(number if per_image else 1, 3, channels)
    grad, y = images_of(*y.shape), images_of(*y.shape)
    alpha, beta, kappa = (by_channel(affine[:, row]) for row in range(3))
    expected.backward(alpha * grad.double() + beta + kappa * y.double())
    assert z.grad is not None and weight64.grad is not None
    dx, dweight, sums, dots = module.depthwise_backward(
        grad, y, affine, x, table, weight, stride, act or 0, tile
    )
    errors |= {"dx": apart(dx, z.grad), "dweight": apart(dweight, weight64.grad)}
    if table is None:
        assert sums.shape == dots.shape == (0,)
    else:
        xhat = x.double() * by_channel(table[:, 2]) + by_channel(table[:, 3])
        errors["dx sums"] = apart(sums, z.grad.sum((0, 2, 3))[None])
        errors["dots"] = apart(dots, (z.grad * xhat).sum((0, 2, 3))[None])
    for name, error in errors.items():
        rounded = name in ("y", "dx") and dtype != torch.float32
        assert error < (1e-2 if rounded else 1e-5), (name, errors)
    for image in (y, dx):
        assert image.dtype == dtype and image.is_contiguous(memory_format=torch.channels_last)
    for table in (squares, dweight, sums, dots):
        assert table.dtype == torch.float32 and table.is_contiguous()


@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize(
    ("layer", "images"),
    [
        (Layer(8, 3, 1, 2, True), (2, 2, 2)),
        (Layer(8, 3, 2, None), (1, 3, 5)),
        (Layer(16, 5, 1, 1), (1, 2, 3)),
        (Layer(8, 5, 2, 2), (1, 3, 4)),
    ],
    ids=str,
)
def test_results_are_those_of_float64(
    interpreter: Interpreter, poisoned: None, layer: Layer, images: tuple[int, int, int], tile: int
) -> None:
    check(interpreter("depthwise_gpu"), layer, images, torch.float32, tile)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", [None, 0, 1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_results_of_many_sizes_are_those_of_float64(
    interpreter: Interpreter,
    poisoned: None,
    kernel: int,
    stride: int,
    act: int | None,
    dtype: torch.dtype,
    tile: int,
) -> None:
    module = interpreter("depthwise_gpu")
    sizes = [(1, 1, 1), (3, 2, 1), (2, 1, 9), (2, 7, 7), (1, 6, 8), (5, 4, 11)]
    for number, images in enumerate(sizes):
        channels = (8, 24, 72, 40, 96, 16)[number]  # most strips do not fill a program
        per_image = (number + kernel + stride) % 2 == 0
        check(module, Layer(channels, kernel, stride, act, per_image), images, dtype, tile)


def test_nan_is_not_hidden(interpreter: Interpreter) -> None:
    """The guard against bad updates must see NaN; a plain maximum with 0 would hide it."""
    x = torch.ones(1, 8, 2, 2).to(memory_format=torch.channels_last)
    x[0, 3, 0, 0] = torch.nan
    table = torch.ones(1, 4, 8)
    y, sums, _ = interpreter("depthwise_gpu").depthwise(
        x, table, torch.ones(8, 1, 3, 3), 1, 1, False
    )
    expected = torch.arange(8) == 3
    assert (y.isnan().flatten(2).all(2)[0] == expected).all()
    assert (sums.isnan()[0] == expected).all()


def test_what_the_kernels_do_not_take_is_refused() -> None:
    module = pytest.importorskip("fasttrain.depthwise_gpu")

    def images(channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(1, channels, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)

    for x, weight, stride, message in [
        (images(8), torch.zeros(8, 1, 7, 7), 1, "must be 3 x 3 or 5 x 5"),
        (images(8), torch.zeros(8, 1, 3, 3), 3, "must be 3 x 3 or 5 x 5"),
        (images(12), torch.zeros(12, 1, 3, 3), 1, "12 channels"),
        (images(8, torch.float64), torch.zeros(8, 1, 3, 3), 1, "float64"),
        (torch.zeros(1, 8, 4, 4), torch.zeros(8, 1, 3, 3), 1, "channels-last"),
    ]:
        with pytest.raises(ValueError, match=message):
            module.depthwise(x, None, weight, stride, 0, False)
    with pytest.raises(ValueError, match="dtype float32"):
        table = torch.zeros(1, 4, 8, dtype=torch.float64)
        module.depthwise(images(8), table, torch.zeros(8, 1, 3, 3), 1, 0, False)


# --------------------------------------------------------------------------------------------------
# Machine code
# --------------------------------------------------------------------------------------------------

# Limits of the instructions of the loop over rows with the first tile, for ReLU and for hard-swish,
# by kernel size and stride. Backward, the loop of 5 x 5 with stride 1 takes five rows at a time.
# Triton 3.6 and 3.8 stay a little below them on sm_80 and sm_90.
FORWARD = {(3, 1): (420, 510), (3, 2): (250, 280), (5, 1): (615, 640), (5, 2): (640, 690)}
BACKWARD = {(3, 1): (400, 440), (3, 2): (400, 440), (5, 1): (1900, 1960), (5, 2): (580, 620)}
# How many times as many instructions the second tile may take for a column and a channel. Narrow
# strips have fewer columns that share loads.
NARROW = {(3, 1): 1.3, (3, 2): 1.2, (5, 1): 1.3, (5, 2): 1.2}


def check_code(layer: Layer, forward: bool, capability: int, number: int) -> None:
    """Compiles one direction of a layer, and checks its machine code."""
    module = pytest.importorskip("fasttrain.depthwise_gpu")
    images = ("x", "y") if forward else ("x", "y", "grad", "dx")
    types = dict.fromkeys((*images, "weight"), "*bf16")
    types |= {"table": "*fp32", "partial": "*fp32"} | dict.fromkeys("BHW", "i32")
    key = layer.kernel, layer.stride
    if forward:
        tiles = module.FORWARD_TILES[key]
    else:
        tiles = module.backward_tiles(*key, layer.channels)
    tile = tiles[number - 1]
    constants = {
        "C": layer.channels, "K": layer.kernel, "STRIDE": layer.stride, "ACT": layer.act,
        "S": tile.columns, "BLOCK": module.BLOCK,
    }  # fmt: skip
    if not forward:
        types["affine"] = types["of_sums"] = "*fp32"
        constants["PER_IMAGE"] = layer.per_image
        constants["UNROLL"] = tile.unroll
    elif layer.per_image:
        types["of_images"] = "*fp32"
    else:
        constants["of_images"] = None
    kernel = module._forward if forward else module._backward
    code = compiled(kernel, types, constants, capability, tile.warps, None, tile.registers)
    print(layer, forward, capability, tile, code)
    assert code.spills <= (1 if number == 1 else 2 * tile.unroll) and code.registers <= 255
    assert code.narrow == 0 or tile.warps == 8  # one channel of two bytes
    assert layer.act in (1, 2)
    most = (FORWARD if forward else BACKWARD)[key][layer.act - 1]
    if number == 2:
        most *= tile.columns / tiles[0].columns * 4 / tile.warps * NARROW[key]
    assert code.loop <= most


@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
def test_machine_code_is_fast(forward: bool, tile: int) -> None:
    layer = Layer(72, 3, 1, 1)
    assert layer in KINDS
    check_code(layer, forward, 90, tile)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("layer", KINDS, ids=str)
def test_machine_code_of_all_layers_is_fast(
    layer: Layer, forward: bool, capability: int, tile: int
) -> None:
    check_code(layer, forward, capability, tile)


# --------------------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize(("layer", "side"), LAYERS, ids=str)
def test_results_of_a_gpu_are_those_of_float64(
    gpu: None, poisoned: None, layer: Layer, side: int, tile: int
) -> None:
    from fasttrain import depthwise_gpu

    check(depthwise_gpu, layer, (8, side, side), torch.bfloat16, tile, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layer", [Layer(72, 3, 1, None), Layer(72, 5, 2, 1, True)], ids=str)
def test_all_dtypes_work_on_a_gpu(
    gpu: None, poisoned: None, layer: Layer, dtype: torch.dtype
) -> None:
    from fasttrain import depthwise_gpu

    check(depthwise_gpu, layer, (8, 27, 30), dtype, 1, "cuda")


@pytest.mark.gpu
def test_other_sizes_compile_nothing_anew(gpu: None) -> None:
    from fasttrain import depthwise_gpu

    def count() -> int:
        kernels = (depthwise_gpu._forward, depthwise_gpu._backward)
        return sum(len(kernel.device_caches[0][0]) for kernel in kernels)

    layer = Layer(88, 3, 1, 1)
    check(depthwise_gpu, layer, (8, 28, 28), torch.bfloat16, 1, "cuda")
    before = count()
    assert before >= 2
    for images in ((1, 1, 1), (16, 16, 16), (5, 27, 31)):
        check(depthwise_gpu, layer, images, torch.bfloat16, 1, "cuda")
    assert count() == before


@pytest.mark.gpu
def test_results_of_a_gpu_repeat_bit_for_bit(gpu: None) -> None:
    from fasttrain import depthwise_gpu

    x = torch.randn(300, 72, 28, 28, device="cuda").to(memory_format=torch.channels_last)
    tables = torch.randn(1, 4, 72, device="cuda"), torch.randn(1, 3, 72, device="cuda")
    weight = torch.randn(72, 1, 5, 5, device="cuda")

    def both() -> list[Tensor]:
        forward = depthwise_gpu.depthwise(x, tables[0], weight, 1, 2, False)
        return [
            *forward,
            *depthwise_gpu.depthwise_backward(x, forward[0], tables[1], x, tables[0], weight, 1, 2),
        ]

    first = both()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, both(), strict=True))
