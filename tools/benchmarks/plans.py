"""Ways to carry out an update on a GPU, and the bytes of memory that each moves and keeps.

    eager         each operation of PyTorch is a kernel of its own
    compile       as Inductor schedules it (torch 2.14.1): chains of elementwise operations are one
                  kernel; BatchNorm's sums, and what convolutions read and write, go through memory
    compile_fuse  the same with the options of the modes `..._fuse`
    depthwise     the blocks with our depthwise kernels. They apply BatchNorm and activation to what
                  they read, and sum what they write. All else is as in compile_fuse
    project       the same, and our kernels for the 1x1 convolutions that end the blocks
    expand        the same, and our kernels for the 1x1 convolutions that begin the blocks

project and expand count kernels of ours for all these layers. A run leaves some of them to cuBLAS
(`pointwise_gpu.fits`), and makes the gradient of project's output in a pass of its own. So it moves
more.

A tensor that a kernel reads or writes counts once. What caches serve counts nothing: the borders
that neighbours share, and a tensor that several columns of blocks read. Not counted, because at
batch 1024 they are below one thousandth: what the fully connected layers of squeeze-excite move,
what follows the classifier's matrices, the loss, partial sums, and values per channel that all
images share. Not counted either are copies that torch 2.14 makes in compile and compile_fuse: in
the backward pass it gives depthwise convolutions another layout, and copies their input and the
gradient of their output before and after (15 MB an image of Large at 224 px).
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

from benchmarks.layers import Layer, Network, network_of
from fasttrain.model import Arch

Plan = Literal["eager", "compile", "compile_fuse", "depthwise", "project", "expand"]
PLANS: tuple[Plan, ...] = get_args(Plan)
OURS: dict[Plan, tuple[str, ...]] = {  # the layers of blocks that have kernels of ours
    "depthwise": ("depthwise",),
    "project": ("depthwise", "project"),
    "expand": ("depthwise", "project", "expand"),
}
# Kinds of kernels, as far as their speeds differ.
Kind = Literal["depthwise", "convolution", "elementwise", "ours"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# With more weights, an expansion's weight gradient does not fit in registers beside the rest.
WEIGHTS_OF_ONE_KERNEL = 16_000
SIZES = {"bf16": 2, "fp16": 2, "no": 4}  # bytes of a number
ACC = 4  # bytes of a float32, in which sums and weights are kept


class Setting(NamedTuple):
    """The update that is counted."""

    arch: Arch
    width: float
    px: int
    batch: int
    precision: str  # a key of SIZES

    @property
    def network(self) -> Network:
        return network_of(self.arch, self.width, self.px)


class Pass(NamedTuple):
    """The bytes that one kernel, or a few that belong together, move in an update."""

    layer: str
    kind: Kind
    forward: bool
    read: int
    written: int

    @property
    def moved(self) -> int:
        return self.read + self.written


Moves = Iterator[tuple[Kind, int, int]]  # kind of kernel, bytes read, bytes written


class Sizes:
    """Bytes of a layer's tensors in an update."""

    def __init__(self, layer: Layer, setting: Setting) -> None:
        size, batch = SIZES[setting.precision], setting.batch
        self.x = size * batch * layer.read
        self.y = size * batch * layer.written
        self.y_float32 = ACC * batch * layer.written
        self.weight = size * layer.weights
        self.weight_float32 = ACC * layer.weights
        self.is_cast = size < ACC
        # The loader gives float16, which bfloat16 does not take.
        self.images_cast = self.x if setting.precision == "bf16" else 0
        self.per_image = ACC * batch * layer.outputs[0]  # a float32 per image and channel


def plan_of(mode: str) -> Plan:
    """The plan by which a mode of `train.execution` carries out updates."""
    if mode in PLANS:
        return mode
    if "+" in mode:
        return "expand" if mode.endswith("+kernels") else "depthwise"
    if "fuse" in mode:
        return "compile_fuse"
    return "compile" if "compile" in mode else "eager"


def passes(plan: Plan, setting: Setting) -> list[Pass]:
    """All passes of an update: those of the layers in their order, then the optimizer's."""
    found = []
    for layer in setting.network.layers:
        sizes = Sizes(layer, setting)
        for forward in (True, False):
            for kind, read, written in _moves(plan, layer, sizes, forward):
                found.append(Pass(layer.name, kind, forward, read, written))
    return [*found, _optimizer(setting.network.parameters)]


def moved(plan: Plan, setting: Setting) -> int:
    """Bytes that an update reads and writes."""
    return sum(each.moved for each in passes(plan, setting))


def by_kind(found: Sequence[Pass]) -> dict[Kind, int]:
    """Bytes of each kind of kernel, without kinds that have none."""
    totals = {kind: sum(each.moved for each in found if each.kind == kind) for kind in KINDS}
    return {kind: total for kind, total in totals.items() if total}


def _optimizer(parameters: int) -> Pass:
    """Guard's norm, SGD with momentum, and the moving average.

    The norm reads the gradients. SGD reads weights, gradients and momentum, and writes weights and
    momentum. The average reads itself and the weights, and writes itself.
    """
    return Pass("optimizer", "elementwise", False, 6 * ACC * parameters, 3 * ACC * parameters)


def _moves(plan: Plan, layer: Layer, sizes: Sizes, forward: bool) -> Moves:
    """The passes of one layer in one direction."""
    ours = OURS.get(plan, ())
    if layer.kind in ours:
        yield from _our_convolution(layer, sizes, forward)
    else:
        yield from _convolution(layer, sizes, forward)
    if layer.kind == "linear":
        return
    if ours and layer.kind in OURS["expand"]:
        between = _between_ours_forward if forward else _between_ours_backward
        yield from between(layer, sizes, ours)
    elif plan == "eager":
        yield from _between_eager(layer, sizes, forward)
    elif forward:
        yield from _between_compiled_forward(layer, sizes, plan != "compile")
    else:
        yield from _between_compiled_backward(layer, sizes, plan != "compile")


# --------------------------------------------------------------------------------------------------
# Convolutions and matrices
# --------------------------------------------------------------------------------------------------


def _convolution(layer: Layer, sizes: Sizes, forward: bool) -> Moves:
    """A kernel of cuDNN or cuBLAS for the output, and one for each of the two gradients."""
    x, y, weight = sizes.x, sizes.y, sizes.weight
    kind: Kind = "depthwise" if layer.kind == "depthwise" else "convolution"
    if sizes.is_cast:  # autocast: weights to half precision, their gradients back
        given, made = sizes.weight_float32, weight
        yield "elementwise", *((given, made) if forward else (made, given))
    if forward and layer.kind == "stem" and sizes.images_cast:
        yield "elementwise", x, x
    if forward:
        yield kind, x + weight, y
        return
    if layer.kind != "stem":  # the images need no gradient
        yield kind, y + weight, x
    yield kind, y + x, weight


def _our_convolution(layer: Layer, sizes: Sizes, forward: bool) -> Moves:
    """A kernel of ours; backward it makes both gradients from what it reads.

    Backward, the gradient of y follows from y and from the gradient of what BatchNorm and
    activation make of it, so that both are read.
    """
    x, y, weight = sizes.x, sizes.y, sizes.weight
    if forward:
        if sizes.is_cast:
            yield "elementwise", sizes.weight_float32, weight
        yield "ours", x + weight, y
        return
    shortcut = x if layer.kind == "expand" and layer.begins_shortcut else 0  # its gradient
    if layer.kind == "expand" and layer.weights > WEIGHTS_OF_ONE_KERNEL:
        yield "ours", 2 * y + weight + shortcut, x
        yield "ours", 2 * y + x, sizes.weight_float32
    else:
        yield "ours", 2 * y + x + weight + shortcut, x + sizes.weight_float32


# --------------------------------------------------------------------------------------------------
# BatchNorm, activation, squeeze-excite and shortcuts between the convolutions
# --------------------------------------------------------------------------------------------------


def _between_eager(layer: Layer, sizes: Sizes, forward: bool) -> Moves:
    """Each operation by itself. y: output of the convolution, or any tensor of its size."""
    y = sizes.y
    act, gate = layer.act != "none", layer.gate != "none"
    if forward:
        yield "elementwise", 2 * y, y  # BatchNorm: its sums; its result
        if gate:
            yield "elementwise", y + y, y  # mean; product
        if act:
            yield "elementwise", y, y
        if layer.ends_shortcut:
            yield "elementwise", 2 * y, y
        if layer.kind == "head":
            yield "elementwise", y, 0  # mean over positions
        return
    if layer.kind == "head":
        yield "elementwise", 0, y
    if act:
        yield "elementwise", 2 * y, y
    if gate:
        yield "elementwise", y, y  # gradient of the scaled tensor
        yield "elementwise", 3 * y, y  # gradient of the gate: a product, and its sum
        yield "elementwise", 2 * y, 2 * y  # gradient of the mean, written and added
    yield "elementwise", 4 * y, y  # BatchNorm: its sums; its result
    if layer.begins_shortcut:
        yield "elementwise", 2 * sizes.x, sizes.x  # the two gradients are added


def _between_compiled_forward(layer: Layer, sizes: Sizes, fuse: bool) -> Moves:
    """BatchNorm's sums are one pass, all else is another; squeeze-excite needs more."""
    y = sizes.y
    yield "elementwise", y, 0
    if layer.gate == "none":
        yield "elementwise", y + (y if layer.ends_shortcut else 0), y
    else:
        if not fuse:
            yield "elementwise", y, y  # BatchNorm's result, from which mean and product follow
        yield "elementwise", y, 0  # mean
        product = y if layer.act == "hardswish" else 0  # is kept for the backward pass
        yield "elementwise", y, y + product
    if layer.kind == "head":
        yield "elementwise", y, 0


def _between_compiled_backward(layer: Layer, sizes: Sizes, fuse: bool) -> Moves:
    """BatchNorm's sums are one pass, and its result is another.

    Both read the gradient, y, and what the activation's slope follows from.
    """
    y, anew = sizes.y, sizes.y_float32
    slope = y if layer.act == "relu" or layer.gate != "none" else 0  # the activation's result
    if layer.gate != "none":
        yield "elementwise", 3 * y, 0  # gradient of the gate
    if layer.act != "hardswish" or fuse:
        yield "elementwise", 2 * y + slope, 0
        yield "elementwise", 2 * y + slope, y
    elif layer.gate != "none":
        yield "elementwise", 2 * y, y  # gradient before the activation
        yield "elementwise", 2 * y, 0
        yield "elementwise", 2 * y, y
    else:
        yield "elementwise", y, anew  # BatchNorm's result anew, in float32
        yield "elementwise", 2 * y + anew, 0
        yield "elementwise", 2 * y + anew, y
    if layer.begins_shortcut:  # the layer before reads both gradients of its output, twice
        yield "elementwise", 2 * sizes.x, 0


def _between_ours_forward(layer: Layer, sizes: Sizes, ours: Sequence[str]) -> Moves:
    """What our kernels leave to others. They apply what stands before them, and sum y."""
    y = sizes.y
    if layer.kind not in ours:
        yield "elementwise", y, 0  # BatchNorm's sums
    if layer.gate != "none":
        # Kernels write sums of each image. BatchNorm and gate become four rows for the next kernel.
        yield "elementwise", (1 + 4) * sizes.per_image, (1 + 4) * sizes.per_image
    if layer.gate == "after":
        yield "elementwise", y, 0  # the mean after the activation does not follow from sums of y
    if layer.kind == "depthwise" and "project" not in ours:
        yield "elementwise", y, y  # the input of the next convolution
    if layer.kind == "project":
        yield "elementwise", y + (y if layer.ends_shortcut else 0), y  # the block's output


def _between_ours_backward(layer: Layer, sizes: Sizes, ours: Sequence[str]) -> Moves:
    """What our kernels leave to others."""
    y = sizes.y
    if layer.kind == "project":
        yield "elementwise", 2 * y, 0  # BatchNorm's sums
    if layer.kind == "depthwise" and "project" not in ours:
        yield "elementwise", y, y  # the input of the next convolution anew
        yield "elementwise", 2 * y, y  # through the activation, with BatchNorm's sums
    if layer.gate == "after":  # the mean's gradient is added, and sums do not follow from others
        yield "elementwise", 2 * y, 0
        yield "elementwise", 2 * y, y
    if layer.gate != "none":  # four rows read, two sums written; three rows of the gradient of y
        yield "elementwise", (4 + 2 + 3) * sizes.per_image, (2 + 3) * sizes.per_image
    if layer.kind not in ours:
        yield "elementwise", 2 * y, y  # gradient of y
    if layer.begins_shortcut and not (layer.kind == "expand" and "expand" in ours):
        yield "elementwise", 2 * sizes.x, sizes.x  # the two gradients are added


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------


def kept(plan: Plan, setting: Setting) -> int:
    """Bytes of images' tensors that the forward pass keeps for the backward pass.

    Weights, values per channel and the classifier's tensors are not counted.
    """
    size = SIZES[setting.precision]
    images = size * setting.batch * 3 * setting.px**2
    return images + sum(
        Sizes(layer, setting).y * _times_kept(plan, layer) for layer in setting.network.convolutions
    )


def _times_kept(plan: Plan, layer: Layer) -> int:
    """How many tensors of the size of its output a layer keeps."""
    if plan in OURS and layer.kind in ("expand", "depthwise"):
        return 1  # what follows within the block is computed anew
    gate, hardswish = layer.gate != "none", layer.act == "hardswish"
    result = layer.kind != "head"  # the next layer's input; the head's result is not read again
    if plan == "eager":  # what is scaled, and what enters hard-swish
        return 1 + gate + hardswish + result
    return 1 + (gate and hardswish) + result
