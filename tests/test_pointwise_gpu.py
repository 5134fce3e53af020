"""The kernels of 1 x 1 convolutions give the float64 results, and compile to fast code for GPUs."""

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

from fasttrain.model import ARCHS, InvertedResidual, SqueezeExcite, build_model
from fasttrain.operators import activate, column, hat, normalised, wants_output_gradient

ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of images, relative


class Layer(NamedTuple):
    """A 1 x 1 convolution with what comes before and after it."""

    channels: int
    filters: int
    act: int | None  # None: no table
    per_image: bool = False  # squeeze-excite comes before: a row of the table for each image
    skip: bool = False

    def __str__(self) -> str:
        act = "raw" if self.act is None else ("none", "relu", "hswish")[self.act]
        extra = "-se" * self.per_image + "-skip" * self.skip
        return f"{self.channels}-{self.filters}-{act}{extra}"


def layers_of(network: nn.Module) -> Iterator[tuple[Layer, int]]:
    """The 1 x 1 layers of a network's blocks, each with the side of its images at 224 px."""
    side = 112
    for block in network.modules():
        if isinstance(block, InvertedResidual):
            inner = block.hidden
            if block.spec.expands:
                first = block.conv[0]
                assert isinstance(first, nn.Conv2d)
                yield Layer(first.in_channels, inner, None, False, block.shortcut), side
            side = -(-side // block.spec.stride)
            gated = any(isinstance(part, SqueezeExcite) for part in block.conv)
            yield Layer(inner, block.out_channels, block.spec.act, gated), side


LAYERS = dict.fromkeys(
    pair
    for arch, width in itertools.product(ARCHS, (1.0, 0.75))
    for pair in layers_of(build_model(arch, width, 10, 0.2))
)
KINDS = sorted({layer for layer, _ in LAYERS}, key=str)


# --------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch did not write holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def interpreted(interpreter: Interpreter) -> ModuleType:
    """`pointwise_gpu`, run by Triton's interpreter."""
    return interpreter("pointwise_gpu")


class Inputs:
    """Fresh random inputs of a layer.

    Args:
        images: their number, height and width.
    """

    def __init__(
        self,
        layer: Layer,
        images: tuple[int, int, int],
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator(device).manual_seed(zlib.crc32(repr((layer, images)).encode()))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        def images_of(channels: int) -> Tensor:
            values = random(images[0], channels, *images[1:])
            return values.to(dtype, memory_format=torch.channels_last)

        channels, filters, act, per_image, skip = layer
        self.x = images_of(channels)
        self.table = None if act is None else random(images[0] if per_image else 1, 4, channels)
        # Rounded to the dtype of the images, as the kernels round them.
        self.weight = (channels**-0.5 * random(filters, channels, 1, 1)).to(dtype).float()
        self.act = act or 0
        self.grad, self.y = images_of(filters), images_of(filters)
        self.affine = random(1, 3, filters)
        self.skip = images_of(channels) if skip else None


def apart(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of what is expected."""
    assert found.shape == expected.shape
    expected = expected.detach()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def activated(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """In float64: the values before the activation, and those that the weights multiply."""
    z = inputs.x.double()
    if inputs.table is not None:
        z = normalised(inputs.x, inputs.table.double())
    z.requires_grad_()
    return z, activate(z, inputs.act)


def check_forward(module: ModuleType, inputs: Inputs, tile: int = 1) -> None:
    """Compares the forward kernel with float64."""
    x, weight = inputs.x, inputs.weight
    y, sums, squares = module.pointwise(x, inputs.table, weight, inputs.act, tile)
    expected = torch.einsum("bchw,dc->bdhw", activated(inputs)[1], weight.double()[:, :, 0, 0])
    limit = ERROR[x.dtype]
    assert apart(y, expected) < limit
    # The inputs of the product are rounded, and these errors do not add up.
    assert apart(sums, expected.sum((0, 2, 3))[None]) < limit
    assert apart(squares, expected.square().sum((0, 2, 3))) < limit
    check_form([y], [sums, squares], x.dtype)


def check_backward(module: ModuleType, inputs: Inputs, tile: int = 1) -> None:
    """Compares the backward kernel with float64."""
    x, table, weight, affine = inputs.x, inputs.table, inputs.weight, inputs.affine.double()
    dx, dweight, sums, dots = module.pointwise_backward(
        inputs.grad, inputs.y, inputs.affine, x, table, weight, inputs.act, inputs.skip, tile
    )
    z, a = activated(inputs)
    alpha, beta, kappa = (column(row) for row in affine.unbind(1))
    dy = alpha * inputs.grad.double() + beta + kappa * inputs.y.double()
    dw = torch.einsum("bdhw,bchw->dc", dy, a)
    of_a = torch.einsum("bdhw,dc->bchw", dy, weight.double()[:, :, 0, 0])
    (da,) = torch.autograd.grad(a, z, of_a) if a is not z else (of_a,)
    limit = ERROR[x.dtype]
    expected = da if inputs.skip is None else da + inputs.skip.double()
    assert apart(dx, expected) < limit
    assert apart(dweight, dw[:, :, None, None]) < limit
    if table is None:
        assert sums.shape == dots.shape == (0,)
    else:
        over = (2, 3) if len(table) > 1 else (0, 2, 3)
        assert apart(sums, da.sum(over).view(len(table), -1)) < limit
        with_hat = da * hat(x, table.double())
        assert apart(dots, with_hat.sum(over).view(len(table), -1)) < limit
    check_form([dx], [dweight, sums, dots], x.dtype)
    # The same, where the gradient of the output is given.
    grad = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    found = module.pointwise_backward(
        grad, None, None, x, table, weight, inputs.act, inputs.skip, tile
    )
    for one, other in zip(found, (dx, dweight, sums, dots), strict=True):
        assert apart(one, other.double()) < limit


def check_form(images: list[Tensor], tables: list[Tensor], dtype: torch.dtype) -> None:
    for image in images:
        assert image.dtype == dtype and image.is_contiguous(memory_format=torch.channels_last)
    for table in tables:
        assert table.dtype == torch.float32 and table.is_contiguous()


# Channels that fill no block, more than one block of input and of output channels, images that
# fill no tile and more than one.
FEW = [
    (Layer(24, 40, None, skip=True), (2, 5, 7)),
    (Layer(72, 16, 2), (1, 9, 8)),
    (Layer(40, 136, 1, True), (2, 3, 5)),
]


@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize(("layer", "images"), FEW, ids=str)
def test_results_are_those_of_float64(
    interpreted: ModuleType, poisoned: None, layer: Layer, images: tuple[int, int, int], tile: int
) -> None:
    inputs = Inputs(layer, images)
    check_forward(interpreted, inputs, tile)
    check_backward(interpreted, inputs, tile)


def test_second_tiles_of_other_gpus_give_the_results_of_float64(
    interpreted: ModuleType, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward, they are other tiles than those of an H200."""
    monkeypatch.setattr(interpreted, "capability_of", lambda x: 8)
    check_backward(interpreted, Inputs(Layer(40, 136, 1, True), (2, 3, 5)), 2)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [8, 9])
@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("act", [None, 0, 1, 2])
def test_results_of_many_sizes_are_those_of_float64(
    interpreted: ModuleType,
    poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
    act: int | None,
    per_image: bool,
    dtype: torch.dtype,
    tile: int,
    capability: int,
) -> None:
    """The interpreter multiplies bfloat16 wrongly, so it is left out."""
    monkeypatch.setattr(interpreted, "capability_of", lambda x: capability)
    sizes = [(1, 1, 1), (3, 2, 1), (2, 13, 10), (2, 7, 7), (5, 4, 11), (3, 16, 16)]
    channels = [(8, 8), (16, 64), (64, 24), (144, 200), (320, 168), (136, 128)]
    for number, images in enumerate(sizes):
        layer = Layer(*channels[number], act, per_image and act is not None, number % 2 == 0)
        inputs = Inputs(layer, images, dtype)
        check_forward(interpreted, inputs, tile)
        check_backward(interpreted, inputs, tile)


def test_an_affine_map_of_each_image_is_applied(interpreted: ModuleType) -> None:
    """Whether the table has a row for each image too or not, and where there is none."""
    for layer in (Layer(8, 16, 1), Layer(8, 16, 2, True), Layer(8, 16, None)):
        inputs = Inputs(layer, (2, 2, 3))
        inputs.affine = torch.cat([inputs.affine, -0.5 * inputs.affine])
        check_backward(interpreted, inputs)


def test_nan_is_not_hidden(interpreted: ModuleType) -> None:
    """The guard against bad updates must see NaN. A plain maximum with 0 would hide it."""
    inputs = Inputs(Layer(8, 8, 1), (1, 2, 2))
    inputs.x[0, 3, 0, 0] = torch.nan
    y, sums, _ = interpreted.pointwise(inputs.x, inputs.table, inputs.weight, 1)
    assert (y.isnan().flatten(1).sum(), sums.isnan().sum()) == (8, 8)


def test_what_the_kernels_do_not_take_is_refused() -> None:
    module = pytest.importorskip("fasttrain.pointwise_gpu")

    def images(channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(2, channels, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)

    def weight(filters: int, channels: int) -> Tensor:
        return torch.zeros(filters, channels, 1, 1)

    for x, table, weights, message in [
        (images(12), None, weight(8, 12), "12 channels"),
        (images(8), None, weight(12, 8), "12 filters"),
        (images(8), None, weight(8, 16), "for images of 8"),
        (images(8, torch.float64), None, weight(8, 8), "float64"),
        (torch.zeros(2, 8, 4, 4), None, weight(8, 8), "channels-last"),
        (images(8), torch.zeros(1, 4, 8).double(), weight(8, 8), "dtype float32"),
        (images(8), torch.zeros(3, 4, 8), weight(8, 8), "3 rows of a table for 2 images"),
    ]:
        with pytest.raises(ValueError, match=message):
            module.pointwise(x, table, weights, 0)
    x, y, affine = images(8), images(264), torch.zeros(1, 3, 264)
    with pytest.raises(ValueError, match="at most 256"):
        module.pointwise_backward(y, y, affine, x, None, weight(264, 8), 0, None)


def test_what_fits() -> None:
    module = pytest.importorskip("fasttrain.pointwise_gpu")

    def fits(
        channels: int,
        filters: int,
        side: int,
        rows: int = 1,
        table: bool = True,
        dtype: torch.dtype = torch.bfloat16,
    ) -> tuple[bool, bool]:
        x = torch.empty(2, channels, side, side, dtype=dtype)
        weight = torch.empty(filters, channels, 1, 1)
        given = torch.empty(rows, 4, channels) if table else None
        return module.fits(x, given, weight, False), module.fits(x, given, weight, True)

    assert fits(16, 16, 112) == (True, True)
    assert fits(672, 112, 14, rows=2) == (True, True)
    assert fits(960, 160, 7, rows=2) == (False, False)  # small images
    assert fits(240, 288, 14) == (True, False)  # backward has too many weights
    assert fits(16, 64, 112, table=False) == (True, True)
    assert fits(80, 480, 14, table=False) == (False, False)  # many wide programs
    assert fits(40, 288, 28, table=False) == (True, False)
    assert fits(12, 16, 14) == (False, False)
    assert fits(16, 64, 112, dtype=torch.float32) == (False, False)


def test_the_compiler_traces_what_fits() -> None:
    """A block asks while it is traced, and must stay one graph."""
    module = pytest.importorskip("fasttrain.pointwise_gpu")

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x: Tensor, table: Tensor, weight: Tensor) -> Tensor:
        return x + 1 if module.fits(x, table, weight, True) else x

    x, table, weight = torch.zeros(2, 16, 14, 14), torch.zeros(2, 4, 16), torch.zeros(8, 16, 1, 1)
    assert (traced(x, table, weight) == 0).all()
    assert (traced(x.bfloat16(), table, weight) == 1).all()


# --------------------------------------------------------------------------------------------------
# Machine code
# --------------------------------------------------------------------------------------------------


def check_code(layer: Layer, forward: bool, capability: int, number: int = 1) -> None:
    """Compiles one direction of a layer, and checks its machine code."""
    module = pytest.importorskip("fasttrain.pointwise_gpu")
    channels, filters, act, per_image, skip = layer
    images = ("x", "y", "weight") if forward else ("x", "y", "grad", "dx", "weight")
    types = dict.fromkeys(images, "*bf16") | dict.fromkeys(("runs", "length"), "i32")
    types["partial"] = "*fp32"
    table = None if act is None else torch.empty(1, 4, channels)
    ready = wants_output_gradient(table, torch.empty(filters, channels, 1, 1))
    given = channels, filters, capability // 10, act is not None
    if forward:
        tile = module.forward_tile(*given, number)
    else:
        tile = module.backward_tile(*given, ready, number)
    constants = {
        "C": channels, "D": filters, "ACT": act or 0, "PER_IMAGE": per_image, "TILE": tile.rows,
        "C_BLOCK": tile.inputs, "D_BLOCK": tile.outputs,
        "FOLD": module._folds(tile.outputs if forward else tile.inputs, tile),
    }  # fmt: skip
    if not forward:
        types["dweight"] = "*fp32"
        constants |= {"TABLES": per_image, "AFFINES": False}
        if ready:
            del types["y"]
            constants |= {"y": None, "affine": None}
        else:
            types["affine"] = "*fp32"
        if skip:
            types["skip"] = "*bf16"
        else:
            constants["skip"] = None
        if act is None:
            del types["partial"]
            constants["partial"] = None
    if act is None:
        constants["table"] = None
    else:
        types["table"] = "*fp32"
    kernel = module._forward if forward else module._backward
    code = compiled(kernel, types, constants, capability, tile.warps, tile.stages, tile.registers)
    print(layer, forward, capability, tile, code)
    assert code.spills == 0 and code.narrow == 0 and code.products > 0
    assert code.registers <= 255 and code.shared <= {80: 163, 90: 227}[capability] * 1024


def fits_somewhere(layer: Layer, backward: bool) -> bool:
    """True if the kernel is used for the layer's images of one of the four networks."""
    module = pytest.importorskip("fasttrain.pointwise_gpu")
    table = None if layer.act is None else torch.empty(1, 4, layer.channels)
    weight = torch.empty(layer.filters, layer.channels, 1, 1)
    return any(
        module.fits(torch.empty(1, layer.channels, side, side).bfloat16(), table, weight, backward)
        for other, side in LAYERS
        if other == layer
    )


@pytest.mark.parametrize(
    ("layer", "forward"),
    [(Layer(72, 40, 1, True), True), (Layer(24, 72, None, False, True), False)],
    ids=str,
)
def test_machine_code_is_fast(layer: Layer, forward: bool) -> None:
    assert layer in KINDS
    for tile in (1, 2):
        check_code(layer, forward, 90, tile)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("layer", KINDS, ids=str)
def test_forward_code_of_all_layers_is_fast(layer: Layer, capability: int, tile: int) -> None:
    if not fits_somewhere(layer, backward=False):
        pytest.skip("cuBLAS is the better way")
    check_code(layer, True, capability, tile)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("layer", KINDS, ids=str)
def test_backward_code_of_all_layers_is_fast(layer: Layer, capability: int, tile: int) -> None:
    if not fits_somewhere(layer, backward=True):
        pytest.skip("cuBLAS is the better way")
    check_code(layer, False, capability, tile)


# --------------------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize(("layer", "side"), LAYERS, ids=str)
def test_results_of_a_gpu_are_those_of_float64(
    gpu: None, poisoned: None, layer: Layer, side: int, tile: int
) -> None:
    from fasttrain import pointwise_gpu

    inputs = Inputs(layer, (8, side, side), torch.bfloat16, "cuda")
    check_forward(pointwise_gpu, inputs, tile)
    if layer.filters <= 256:
        check_backward(pointwise_gpu, inputs, tile)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layer", [Layer(24, 72, None), Layer(72, 40, 1, True)], ids=str)
def test_all_dtypes_work_on_a_gpu(
    gpu: None, poisoned: None, layer: Layer, dtype: torch.dtype
) -> None:
    from fasttrain import pointwise_gpu

    inputs = Inputs(layer, (8, 27, 30), dtype, "cuda")
    check_forward(pointwise_gpu, inputs)
    check_backward(pointwise_gpu, inputs)


@pytest.mark.gpu
def test_other_sizes_compile_nothing_anew(gpu: None) -> None:
    from fasttrain import pointwise_gpu

    def count() -> int:
        kernels = (pointwise_gpu._forward, pointwise_gpu._backward)
        return sum(len(kernel.device_caches[0][0]) for kernel in kernels)

    def both(*images: int) -> None:
        inputs = Inputs(Layer(88, 24, 1), (images[0], images[1], images[2]), device="cuda")
        check_forward(pointwise_gpu, inputs)
        check_backward(pointwise_gpu, inputs)

    both(8, 28, 28)
    before = count()
    assert before >= 2
    for images in ((1, 1, 1), (16, 16, 16), (5, 27, 31)):
        both(*images)
    assert count() == before


@pytest.mark.gpu
def test_results_of_a_gpu_repeat_bit_for_bit(gpu: None) -> None:
    from fasttrain import pointwise_gpu

    inputs = Inputs(Layer(72, 40, 1, True), (300, 28, 28), torch.bfloat16, "cuda")

    def both() -> list[Tensor]:
        x, table, weight = inputs.x, inputs.table, inputs.weight
        return [
            *pointwise_gpu.pointwise(x, table, weight, 1),
            *pointwise_gpu.pointwise_backward(
                inputs.grad, inputs.y, inputs.affine, x, table, weight, 1, None
            ),
        ]

    first = both()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, both(), strict=True))
