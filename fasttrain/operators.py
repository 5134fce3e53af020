"""The convolutions of a block, with BatchNorm and activation applied where tensors are loaded.

An update is bound by memory traffic. PyTorch writes and reads each activation several times: raw,
normalised, activated. These operators read the raw result of the convolution before, normalise and
activate it on the way, and return the sums that the next BatchNorm needs. So each tensor is written
once.

Each operator has two forms. `plain_...` is PyTorch code: it defines the result, and the compiler
can fuse it. The form without `plain_` is one node that the compiler does not look into. On a CPU it
runs the same PyTorch code, on a GPU a kernel of `depthwise_gpu` or `pointwise_gpu`. `tile`, 1 or 2,
says how the kernel cuts the work. Plain code does not use it.

Words of all operators. Images are channels-last `(B, C, H, W)`. "acc" is the dtype of sums: float32
for float16 and bfloat16 images, otherwise that of the images. A BatchNorm's table has four rows:
scale and shift map the raw value to the normalised one with weight and bias; rstd and nmean map it
to the one without, `x_hat = x * rstd + nmean`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NO_ACT, RELU, HARDSWISH = 0, 1, 2
SCALE, SHIFT, RSTD, NMEAN = range(4)  # rows of a BatchNorm's table


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over `x` are taken."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def column(x: Tensor) -> Tensor:
    """`(N, C)` as `(N, C, 1, 1)`, to be combined with images."""
    return x[:, :, None, None]


def normalised(x: Tensor, table: Tensor) -> Tensor:
    """`x * scale + shift`, acc, with the rows of `table`, acc `(N, 4, C)`; N is 1 or B."""
    return x.to(table.dtype) * column(table[:, SCALE]) + column(table[:, SHIFT])


def hat(x: Tensor, table: Tensor) -> Tensor:
    """`x * rstd + nmean`, acc, with the rows of `table`, acc `(N, 4, C)`; N is 1 or B."""
    return x.to(table.dtype) * column(table[:, RSTD]) + column(table[:, NMEAN])


def activate(z: Tensor, act: int) -> Tensor:
    """Applies the activation `act`: NO_ACT, RELU or HARDSWISH."""
    if act == RELU:
        return z.relu()
    return z * (z / 6 + 0.5).clamp(0, 1) if act == HARDSWISH else z


def through_activation(z: Tensor, grad: Tensor, act: int) -> Tensor:
    """The gradient of `z`, from the gradient of `activate(z, act)`."""
    if act == RELU:
        return torch.where(z > 0, grad, 0)
    if act == HARDSWISH:
        slope = torch.where(z <= -3, 0, torch.where(z >= 3, 1, z / 3 + 0.5))
        return slope * grad
    return grad


# --------------------------------------------------------------------------------------------------
# Plain PyTorch
# --------------------------------------------------------------------------------------------------


def _input(x: Tensor, table: Tensor | None, act: int) -> Tensor:
    """What the convolution multiplies, with the dtype of `x`."""
    return x if table is None else activate(normalised(x, table), act).to(x.dtype)


def raw_grad(grad: Tensor, y: Tensor, affine: Tensor) -> Tensor:
    """The gradient of a convolution's raw result: alpha * grad + beta + kappa * y, like y."""
    alpha, beta, kappa = (column(row) for row in affine.unbind(1))
    acc = affine.dtype
    return (alpha * grad.to(acc) + beta + kappa * y.to(acc)).to(y.dtype)


def conv_backward(
    dy: Tensor, a: Tensor, weight: Tensor, stride: int, groups: int
) -> tuple[Tensor, Tensor]:
    """The gradients of the input `a` and of the weight of a convolution, padded by K // 2."""
    pad = weight.shape[2] // 2
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, a, weight, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], groups,
        [True, True, False],
    )  # fmt: skip
    return dx, dw


def _input_grad(
    da: Tensor, x: Tensor, table: Tensor | None, act: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `x` from that of `_input`, its sums, and the sums of it times `hat(x)`."""
    if table is None:
        empty = da.new_empty(0, dtype=acc_dtype(x))
        return da, empty, torch.empty_like(empty)
    dx = through_activation(normalised(x, table), da.to(table.dtype), act)
    over = (2, 3) if len(table) > 1 else (0, 2, 3)
    sums, dots = dx.sum(over), (dx * hat(x, table)).sum(over)
    shape = (len(table), x.shape[1])
    return dx.to(x.dtype), sums.reshape(shape), dots.reshape(shape)


def _sums(y: Tensor, per_image: bool) -> tuple[Tensor, Tensor]:
    """Sums of `y`, acc `(B, C)` or `(1, C)`, and of its squares, acc `(C,)`."""
    y = y.to(acc_dtype(y))
    sums = y.sum((2, 3)) if per_image else y.sum((0, 2, 3))[None]
    return sums, y.square().sum((0, 2, 3))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def plain_depthwise(
    x: Tensor,
    table: Tensor | None,
    weight: Tensor,
    stride: int,
    act: int,
    per_image: bool,
    tile: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise convolution of `act(x * scale + shift)`, or of `x` where `table` is None.

    Args:
        x: `(B, C, H, W)`.
        table: acc `(1, 4, C)`, of the BatchNorm of `x`.
        weight: `(C, 1, K, K)`. The input is padded by K // 2 zeros.
        per_image: sum over each image by itself.
    Returns:
        y `(B, C, H / stride, W / stride)`; its sums, acc `(B, C)` if `per_image`, otherwise
        `(1, C)`; and the sums of its squares, acc `(C,)`.
    """
    a, weight = _input(x, table, act), weight.to(x.dtype)
    y = _channels_last(F.conv2d(a, weight, None, stride, weight.shape[2] // 2, 1, len(weight)))
    return y, *_sums(y, per_image)


def plain_depthwise_backward(
    grad: Tensor,
    y: Tensor,
    affine: Tensor,
    x: Tensor,
    table: Tensor | None,
    weight: Tensor,
    stride: int,
    act: int,
    tile: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `plain_depthwise`. The gradient of y is alpha * grad + beta + kappa * y.

    Args:
        grad: like `y`.
        affine: acc `(N, 3, C)`, rows alpha, beta and kappa; N is 1 or B.
    Returns:
        The gradient of x, that of weight (acc, `(C, 1, K, K)`), the sums of the first one, acc
        `(1, C)`, and the sums of it times x_hat, acc `(1, C)`; both empty where `table` is None.
    """
    dy, a = raw_grad(grad, y, affine), _input(x, table, act)
    da, dweight = conv_backward(dy, a, weight.to(x.dtype), stride, len(weight))
    dx, sums, dots = _input_grad(da, x, table, act)
    return _channels_last(dx), dweight.to(affine.dtype).contiguous(), sums, dots


def plain_pointwise(
    x: Tensor, table: Tensor | None, weight: Tensor, act: int, tile: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """1 x 1 convolution of `act(x * scale + shift)`, or of `x` where `table` is None.

    Args:
        x: `(B, C, H, W)`.
        table: acc `(N, 4, C)`. With squeeze-excite, scale and shift differ from image to image:
            N is B, otherwise 1.
        weight: `(D, C, 1, 1)`.
    Returns:
        y `(B, D, H, W)`, its sums, acc `(1, D)`, and the sums of its squares, acc `(D,)`.
    """
    y = _channels_last(F.conv2d(_input(x, table, act), weight.to(x.dtype)))
    return y, *_sums(y, per_image=False)


def plain_pointwise_backward(
    grad: Tensor,
    y: Tensor | None,
    affine: Tensor | None,
    x: Tensor,
    table: Tensor | None,
    weight: Tensor,
    act: int,
    skip: Tensor | None,
    tile: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `plain_pointwise`. The gradient of y is alpha * grad + beta + kappa * y.

    Args:
        grad: like the result of `plain_pointwise`.
        y: that result; None: `grad` is its gradient, and there is no `affine`.
        affine: acc `(N, 3, D)`, rows alpha, beta and kappa; N is 1 or B.
        skip: like `x`, is added to its gradient; only where `table` is None.
    Returns:
        The gradient of x, that of weight (acc, `(D, C, 1, 1)`), the sums of the first one over the
        images that share a row of `table`, acc `(N, C)`, and the sums of it times x_hat, acc
        `(N, C)`; both empty where `table` is None.
    """
    dy = grad if y is None or affine is None else raw_grad(grad, y, affine)
    a = _input(x, table, act)
    da, dweight = conv_backward(dy, a, weight.to(x.dtype), 1, 1)
    dx, sums, dots = _input_grad(da, x, table, act)
    dx = dx if skip is None else dx + skip
    return _channels_last(dx), dweight.to(acc_dtype(x)).contiguous(), sums, dots


# --------------------------------------------------------------------------------------------------
# Operators
# --------------------------------------------------------------------------------------------------

depthwise = torch.library.custom_op("fasttrain::depthwise", plain_depthwise, mutates_args=())
depthwise_backward = torch.library.custom_op(
    "fasttrain::depthwise_backward", plain_depthwise_backward, mutates_args=()
)
pointwise = torch.library.custom_op("fasttrain::pointwise", plain_pointwise, mutates_args=())
pointwise_backward = torch.library.custom_op(
    "fasttrain::pointwise_backward", plain_pointwise_backward, mutates_args=()
)


def _empty_images(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _forward_shapes(
    x: Tensor, shape: tuple[int, int, int, int], per_image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc = acc_dtype(x)
    sums = x.new_empty(shape[0] if per_image else 1, shape[1], dtype=acc)
    return _empty_images(x, shape), sums, x.new_empty(shape[1], dtype=acc)


def _backward_shapes(
    x: Tensor, table: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = acc_dtype(x)
    shape = (0,) if table is None else (len(table), x.shape[1])
    dweight = weight.new_empty(weight.shape, dtype=acc)
    sums = [x.new_empty(shape, dtype=acc) for _ in range(2)]
    return _empty_images(x, tuple(x.shape)), dweight, sums[0], sums[1]


# The forms below take the arguments of the operator that they belong to.


@depthwise.register_fake
def _(
    x: Tensor, table: Tensor | None, weight: Tensor, stride: int, act: int, per_image: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    return _forward_shapes(
        x, (batch, channels, -(-height // stride), -(-width // stride)), per_image
    )


@pointwise.register_fake
def _(x: Tensor, table: Tensor | None, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_shapes(x, (x.shape[0], weight.shape[0], x.shape[2], x.shape[3]), False)


@depthwise_backward.register_fake
@pointwise_backward.register_fake
def _(
    grad: Tensor,
    y: Tensor | None,
    affine: Tensor | None,
    x: Tensor,
    table: Tensor | None,
    weight: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward_shapes(x, table, weight)


# --------------------------------------------------------------------------------------------------
# Kernels of a GPU
# --------------------------------------------------------------------------------------------------

# Triton is imported where a kernel first runs. A CPU does not need it.


def pointwise_pays(x: Tensor, table: Tensor | None, weight: Tensor, backward: bool) -> bool:
    """True if `pointwise`, or its backward, should be the operator and not the plain code.

    The rule of `pointwise_gpu.fits` decides. On a CPU both are the same.
    """
    if x.device.type == "cpu":
        return True
    from fasttrain import pointwise_gpu

    return pointwise_gpu.fits(x, table, weight, backward)


def wants_output_gradient(table: Tensor | None, weight: Tensor) -> bool:
    """True if `pointwise_backward` should be given the gradient of its output, without y.

    Many programs read it where there are many input channels. Each would make it anew.
    """
    return table is not None and weight.shape[1] > 32


@pointwise.register_kernel("cuda")
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fasttrain import pointwise_gpu

    return pointwise_gpu.pointwise(*given)


@pointwise_backward.register_kernel("cuda")
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fasttrain import pointwise_gpu

    return pointwise_gpu.pointwise_backward(*given)


@depthwise.register_kernel("cuda")
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fasttrain import depthwise_gpu

    return depthwise_gpu.depthwise(*given)


@depthwise_backward.register_kernel("cuda")
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fasttrain import depthwise_gpu

    return depthwise_gpu.depthwise_backward(*given)
