"""An inverted residual block in training as one autograd function, which moves fewer bytes.

PyTorch keeps each activation several times: raw, normalised, activated. This function keeps the raw
results of the three convolutions alone. What is between them is applied where they are read:

    forward    expand     reads z       writes ye    and its sums for BatchNorm
               depthwise  reads ye      writes yd    ... of each image, for squeeze-excite too
               project    reads yd      writes yp
               out        reads yp, z   writes z'
    backward   sums       reads g, yp                g is the gradient of z'
               project    reads g, yp, yd     writes q, and its sums
               depthwise  reads q, yd, ye     writes de, and its sums
               expand     reads de, ye, z, g  writes dz

Two identities make this possible. The gradient of a raw result y is affine: alpha * grad + beta +
kappa * y, where alpha, beta and kappa follow from two sums of the gradient before. And squeeze-
excite stands between BatchNorm and activation, so its mean is an affine function of the mean of yd,
and its gate scales BatchNorm's scale and shift.

Small's first block has squeeze-excite after ReLU. There the gate may be applied before ReLU, as it
is never negative. Its mean and the gradient of its mean take one more pass each over yd.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from fasttrain import operators
from fasttrain.operators import NMEAN, RSTD, SCALE, SHIFT, acc_dtype, column, hat, normalised

Grad = Tensor | None


class Own(NamedTuple):
    """What runs each pass through a block: 0 PyTorch's code, 1 or 2 our kernel with that tile."""

    expand: int
    expand_backward: int
    project: int
    project_backward: int
    depthwise: int = 1
    depthwise_backward: int = 1


class Spec(NamedTuple):
    """What a block is, beside its weights."""

    stride: int
    act: int  # operators.RELU or HARDSWISH
    expands: bool
    gate_after: bool  # squeeze-excite comes after the activation
    shortcut: bool
    depthwise_kernel: bool = True  # one operator, not code that the compiler may fuse
    pointwise_kernel: bool = False  # the same, for expand and project
    # None: the first tile, for 1 x 1 layers by the rule of `operators.pointwise_pays`
    own: Own | None = None


class Layers(NamedTuple):
    """The modules of a block."""

    convolutions: list[nn.Conv2d]  # expand, if there is one; depthwise; project
    norms: list[nn.BatchNorm2d]  # after each of them
    fc: list[nn.Linear]  # the two layers of squeeze-excite, or nothing

    @property
    def weights(self) -> list[Tensor]:
        """Weight, BatchNorm's weight and bias of each convolution; before project those of `fc`."""
        found: list[Tensor] = []
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            found += [convolution.weight, norm.weight, norm.bias]
        small = [tensor for linear in self.fc for tensor in (linear.weight, linear.bias)]
        return [*found[:-3], *small, *found[-3:]]


def run(spec: Spec, layers: Layers, z: Tensor) -> Tensor:
    """Runs a block in training mode, and updates the running statistics of its BatchNorms.

    Args:
        z: `(B, C, H, W)`, with the dtype in which the block multiplies.
    Returns:
        `(B, D, H / stride, W / stride)`, channels-last.
    Raises:
        ValueError: a BatchNorm would have a single value per channel.
    """
    norms = layers.norms
    out, *moments = _Block.apply(spec, [norm.eps for norm in norms], z, *layers.weights)
    positions = out.shape[0] * out.shape[2] * out.shape[3]
    if positions == 1:
        raise ValueError(f"BatchNorm needs more than one value per channel: {tuple(z.shape)}")
    counts = [z.shape[0] * z.shape[2] * z.shape[3]] if spec.expands else []
    counts += [positions, positions]
    with torch.no_grad():
        for norm, count, mean, variance in zip(
            norms, counts, moments[::2], moments[1::2], strict=True
        ):
            _track(norm, mean, variance * (count / (count - 1)))
    return out


def _track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Moves the running statistics, as BatchNorm does."""
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.momentum is not None
    # Weights and statistics may be views of one tensor (`flat`). Autograd would then take a change
    # of the statistics for a change of the weights that it has saved. It does not see changes made
    # through `data`.
    norm.running_mean.data.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.data.lerp_(variance.to(norm.running_var.dtype), norm.momentum)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


# --------------------------------------------------------------------------------------------------
# BatchNorm and squeeze-excite: small tensors
# --------------------------------------------------------------------------------------------------


class _Moments(NamedTuple):
    """A BatchNorm's table, acc `(1, 4, C)`, and its batch statistics `(C,)`."""

    table: Tensor
    mean: Tensor
    variance: Tensor


def _moments(
    sums: Tensor, squares: Tensor, count: int, affine: tuple[Tensor, Tensor], eps: float
) -> _Moments:
    """A BatchNorm from the sums of its input.

    Args:
        sums: acc `(N, C)`, of N groups.
        squares: acc `(C,)`.
        count: number of values per channel.
        affine: weight and bias, `(C,)`.
    """
    # The difference of two large numbers needs float64. These tensors are small.
    mean = sums.double().sum(0) / count
    variance = (squares.double() / count - mean.square()).clamp_min(0)
    rstd = (variance + eps).rsqrt()
    scale = affine[0] * rstd
    table = torch.stack([scale, affine[1] - mean * scale, rstd, -mean * rstd])
    return _Moments(table[None].to(sums.dtype), mean.to(sums.dtype), variance.to(sums.dtype))


def _norm_backward(table: Tensor, sums: Tensor, dots: Tensor, count: int) -> Tensor:
    """The rows alpha, beta, kappa, acc `(1, 3, C)`, of a BatchNorm's backward.

    Args:
        sums: of the gradient of its result, acc `(C,)`.
        dots: of that gradient times x_hat, acc `(C,)`.
    """
    scale, _, rstd, nmean = table[0]
    beta = -scale * (sums + nmean * dots) / count
    return torch.stack([scale, beta, -scale * dots / count * rstd])[None]


def _gate(pooled: Tensor, fc: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The hidden units of squeeze-excite after ReLU, and the inputs of its hard-sigmoid.

    Args:
        pooled: acc `(B, C)`.
        fc: weight and bias of two linear layers.
    """
    w1, b1, w2, b2 = (tensor.to(pooled.dtype) for tensor in fc)
    hidden = torch.addmm(b1, pooled, w1.t()).relu()
    return hidden, torch.addmm(b2, hidden, w2.t())


def _gate_backward(
    dgate: Tensor, small: tuple[Tensor, Tensor, Tensor], fc: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of the pooled values and of the four tensors of `fc`.

    Args:
        dgate: gradient of the gate, acc `(B, C)`.
        small: pooled values, hidden units and the inputs of hard-sigmoid.
    """
    pooled, hidden, before = small
    w1, _, w2, _ = (tensor.to(pooled.dtype) for tensor in fc)
    dbefore = torch.where((before > -3) & (before < 3), dgate / 6, 0)
    dhidden = torch.where(hidden > 0, dbefore @ w2, 0)
    grads = [dhidden.t() @ pooled, dhidden.sum(0), dbefore.t() @ hidden, dbefore.sum(0)]
    return dhidden @ w1, grads


# --------------------------------------------------------------------------------------------------
# The function
# --------------------------------------------------------------------------------------------------


class _Weights(NamedTuple):
    """The tensors of `Layers.weights`, by layer."""

    expand: list[Tensor]
    depthwise: list[Tensor]
    fc: list[Tensor]
    project: list[Tensor]


def _by_layer(spec: Spec, weights: list[Tensor]) -> _Weights:
    at = 3 if spec.expands else 0
    return _Weights(weights[:at], weights[at : at + 3], weights[at + 3 : -3], weights[-3:])


def _autocast_device(x: Tensor) -> str:
    """The device type of `x` for autocast, which does not know tensors without data."""
    return "cuda" if x.is_meta else x.device.type


class _Block(Function):
    """See the module. Returns the result, then mean and variance of each BatchNorm's input."""

    @staticmethod
    def forward(
        ctx: Any, spec: Spec, eps: list[float], z: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        # The small matrices of squeeze-excite stay in the dtype of sums.
        with torch.autocast(_autocast_device(z), enabled=False):
            return _forward(ctx, spec, eps, z, list(weights))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Grad, ...]:
        with torch.autocast(_autocast_device(grad), enabled=False):
            return _backward(ctx, grad)


def _forward(
    ctx: Any, spec: Spec, eps: list[float], z: Tensor, weights: list[Tensor]
) -> tuple[Tensor, ...]:
    z = z.contiguous(memory_format=torch.channels_last)
    by = _by_layer(spec, weights)
    moments: list[_Moments] = []
    ye, table_e = z, None
    if spec.expands:
        w, *affine = by.expand
        ye, sums, squares = pointwise(spec, z, None, w)
        moments.append(_moments(sums, squares, ye[:, 0].numel(), (affine[0], affine[1]), eps[0]))
        table_e = moments[0].table
    w, *affine = by.depthwise
    yd, image_sums, squares = depthwise(spec, ye, table_e, w, len(by.fc) > 0)
    count = yd[:, 0].numel()
    moments.append(_moments(image_sums, squares, count, (affine[0], affine[1]), eps[-2]))
    table_d = moments[-1].table
    table_g, gating = table_d, []
    if by.fc:
        pooled = _pooled(spec, yd, image_sums, table_d)
        gating = [pooled, *_gate(pooled, by.fc)]
        table_g = _gated(table_d, F.hardsigmoid(gating[-1]))
    w, *affine = by.project
    yp, sums, squares = pointwise(spec, yd, table_g, w)
    moments.append(_moments(sums, squares, count, (affine[0], affine[1]), eps[-1]))
    table_p = moments[-1].table
    out = normalised(yp, table_p)
    out = out + z if spec.shortcut else out
    if out.dtype != z.dtype:
        # Not where it changes nothing: torch 2.11's compiler would see two results that are one
        # tensor, and would give a gradient of zeros.
        out = out.to(z.dtype)
    tables = ([] if table_e is None else [table_e], table_d, table_p)
    raw = (z, ye, yd, yp) if spec.expands else (z, yd, yp)
    ctx.save_for_backward(*raw, *tables[0], table_d, table_p, image_sums, *gating, *weights)
    ctx.spec, ctx.gates = spec, len(gating)
    statistics = [tensor for found in moments for tensor in (found.mean, found.variance)]
    ctx.mark_non_differentiable(*statistics)
    return out, *statistics


def depthwise(
    spec: Spec, x: Tensor, table: Tensor | None, weight: Tensor, per_image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The depthwise convolution: see `operators.plain_depthwise`."""
    act = operators.NO_ACT if table is None else spec.act
    if tile := _depthwise_tile(spec, backward=False):
        return operators.depthwise(x, table, weight, spec.stride, act, per_image, tile)
    return operators.plain_depthwise(x, table, weight, spec.stride, act, per_image)


def depthwise_backward(
    spec: Spec,
    of_y: tuple[Tensor, Tensor, Tensor],
    given: tuple[Tensor, Tensor | None, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `depthwise`.

    Args:
        of_y: grad, y and affine of `operators.plain_depthwise_backward`.
        given: x, table and weight that `depthwise` was given.
    """
    act = operators.NO_ACT if given[1] is None else spec.act
    if tile := _depthwise_tile(spec, backward=True):
        return operators.depthwise_backward(*of_y, *given, spec.stride, act, tile)
    return operators.plain_depthwise_backward(*of_y, *given, spec.stride, act)


def _depthwise_tile(spec: Spec, backward: bool) -> int:
    """The tile of the kernel; 0 for PyTorch's code."""
    if spec.own is None or not spec.depthwise_kernel:
        return int(spec.depthwise_kernel)
    return spec.own.depthwise_backward if backward else spec.own.depthwise


def pointwise(
    spec: Spec, x: Tensor, table: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Project, or expand where `table` is None: see `operators.plain_pointwise`."""
    act = operators.NO_ACT if table is None else spec.act
    if tile := _pointwise_tile(spec, x, table, weight, backward=False):
        return operators.pointwise(x, table, weight, act, tile)
    return operators.plain_pointwise(x, table, weight, act)


def pointwise_backward(
    spec: Spec,
    of_y: tuple[Tensor, Tensor, Tensor],
    given: tuple[Tensor, Tensor | None, Tensor],
    skip: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `pointwise`.

    Args:
        of_y: grad, y and affine of `operators.plain_pointwise_backward`.
        given: x, table and weight that `pointwise` was given.
    """
    x, table, weight = given
    act = operators.NO_ACT if table is None else spec.act
    tile = _pointwise_tile(spec, x, table, weight, backward=True)
    if not tile:
        return operators.plain_pointwise_backward(*of_y, x, table, weight, act, skip)
    if operators.wants_output_gradient(table, weight):
        dy = operators.raw_grad(*of_y)
        return operators.pointwise_backward(dy, None, None, x, table, weight, act, skip, tile)
    return operators.pointwise_backward(*of_y, x, table, weight, act, skip, tile)


def _pointwise_tile(
    spec: Spec, x: Tensor, table: Tensor | None, weight: Tensor, backward: bool
) -> int:
    """The tile of the kernel; 0 for PyTorch's code."""
    if spec.own is None or not spec.pointwise_kernel:
        pays = spec.pointwise_kernel and operators.pointwise_pays(x, table, weight, backward)
        return int(pays)
    if table is None:
        return spec.own.expand_backward if backward else spec.own.expand
    return spec.own.project_backward if backward else spec.own.project


def _pooled(spec: Spec, yd: Tensor, image_sums: Tensor, table: Tensor) -> Tensor:
    """What squeeze-excite takes the gate from: means over positions, acc `(B, C)`."""
    if spec.gate_after:
        return operators.activate(normalised(yd, table), spec.act).mean((2, 3))
    mean = image_sums / (yd.shape[2] * yd.shape[3])
    return mean * table[:, SCALE] + table[:, SHIFT]


def _gated(table: Tensor, gate: Tensor) -> Tensor:
    """The table `(B, 4, C)` of a BatchNorm whose result is multiplied by `gate`, `(B, C)`."""
    rows = table.expand(len(gate), 4, table.shape[2])
    return torch.stack(
        [gate * rows[:, SCALE], gate * rows[:, SHIFT], rows[:, RSTD], rows[:, NMEAN]], 1
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Grad, ...]:
    spec: Spec = ctx.spec
    z, ye, yd, yp, table_e, table_d, table_p, image_sums, gating, weights = _unpack(ctx)
    by = _by_layer(spec, weights)
    grad = grad.contiguous(memory_format=torch.channels_last)
    count = yp[:, 0].numel()
    # Project: its BatchNorm, then its convolution.
    wide = grad.to(acc_dtype(grad))
    sums, dots = wide.sum((0, 2, 3)), (wide * hat(yp, table_p)).sum((0, 2, 3))
    grads = [dots, sums]
    affine = _norm_backward(table_p, sums, dots, count)
    gate = F.hardsigmoid(gating[-1]) if gating else None
    table_g = table_d if gate is None else _gated(table_d, gate)
    of_project = (yd, table_g, by.project[0])
    q, dw, sums, dots = pointwise_backward(spec, (grad, yp, affine), of_project, None)
    grads = [dw, *grads]
    # Squeeze-excite, and the BatchNorm of the depthwise convolution.
    if gate is None:
        sums, dots = sums[0], dots[0]
        affine = _norm_backward(table_d, sums, dots, count)
    else:
        dgate = by.depthwise[1] * dots + by.depthwise[2] * sums
        dpooled, fc_grads = _gate_backward(dgate, gating, by.fc)
        grads = [*fc_grads, *grads]
        dmean = dpooled / (yd.shape[2] * yd.shape[3])
        parts = (q, sums, dots, gate, dmean)
        backward = _after_backward if spec.gate_after else _before_backward
        q, sums, dots, affine = backward(parts, yd, table_d, image_sums)
    grads = [dots, sums, *grads]
    # The depthwise convolution, then expand.
    of_depthwise = (ye, table_e, by.depthwise[0])
    dz, dw, sums, dots = depthwise_backward(spec, (q, yd, affine), of_depthwise)
    grads = [dw, *grads]
    if table_e is not None:
        sums, dots = sums[0], dots[0]
        affine = _norm_backward(table_e, sums, dots, ye[:, 0].numel())
        skip = grad if spec.shortcut else None
        of_expand = (z, None, by.expand[0])
        dz, dw, _, _ = pointwise_backward(spec, (dz, ye, affine), of_expand, skip)
        grads = [dw, dots, sums, *grads]
    elif spec.shortcut:
        dz = dz + grad
    return None, None, dz, *map(_as_gradient, grads, weights)


def _unpack(ctx: Any) -> tuple[Any, ...]:
    """What `_forward` saved: four images, three tables, the sums per image, gating, weights."""
    saved = list(ctx.saved_tensors)
    expands = ctx.spec.expands
    z = saved.pop(0)
    ye = saved.pop(0) if expands else z
    yd, yp = saved.pop(0), saved.pop(0)
    table_e = saved.pop(0) if expands else None
    table_d, table_p, image_sums = saved[:3]
    weights_at = 3 + ctx.gates
    gating, weights = tuple(saved[3:weights_at]), saved[weights_at:]
    return z, ye, yd, yp, table_e, table_d, table_p, image_sums, gating, weights


_Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_Found = tuple[Tensor, Tensor, Tensor, Tensor]


def _before_backward(parts: _Parts, yd: Tensor, table: Tensor, image_sums: Tensor) -> _Found:
    """BatchNorm's backward where its result is gated before the activation.

    The gradient of its result is gate * q + dmean. So its sums follow from those of q.

    Args:
        parts: q, its sums and its sums with x_hat per image; the gate; the gradient of the mean,
            divided by the positions.
    Returns:
        q, the sums of the gradient of the result, and of it times x_hat, `(C,)`; alpha, beta and
        kappa `(B, 3, C)`.
    """
    q, sums, dots, gate, dmean = parts
    positions = yd.shape[2] * yd.shape[3]
    hat_sums = image_sums * table[:, RSTD] + positions * table[:, NMEAN]
    sums = (gate * sums + dmean * positions).sum(0)
    dots = (gate * dots + dmean * hat_sums).sum(0)
    affine = _norm_backward(table, sums, dots, len(q) * positions)
    alpha, beta, kappa = affine[:, 0], affine[:, 1], affine[:, 2]
    rows = [alpha * gate, alpha * dmean + beta, kappa.expand_as(gate)]
    return q, sums, dots, torch.stack(rows, 1)


def _after_backward(parts: _Parts, yd: Tensor, table: Tensor, _: Tensor) -> _Found:
    """The same where the gate comes after ReLU: the mean's gradient passes through ReLU."""
    q, _, _, gate, dmean = parts
    passes = normalised(yd, table) > 0
    wide = q.to(table.dtype) * column(gate) + torch.where(passes, column(dmean), 0)
    sums, dots = wide.sum((0, 2, 3)), (wide * hat(yd, table)).sum((0, 2, 3))
    return wide.to(q.dtype), sums, dots, _norm_backward(table, sums, dots, yd[:, 0].numel())


def _as_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """`grad` with the dtype and the strides of `weight`, which DistributedDataParallel wants.

    For these weights, contiguous and channels-last are the same order in memory: depthwise filters
    have one input channel, and the others one position.
    """
    return grad.to(weight.dtype).contiguous().as_strided(weight.shape, weight.stride())
