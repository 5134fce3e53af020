"""Makes a network's tensors views of a few flat ones, so that one operation reaches them all."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Flat(NamedTuple):
    """What a network learns. Its parameters and BatchNorm buffers are views of these tensors."""

    weights: Tensor  # float32 (P,), in the order of `module.parameters()`
    statistics: Tensor  # float32 (S + 1,): running means and variances, and one spare value
    counts: Tensor  # int64 (L,): `num_batches_tracked` of each BatchNorm layer

    @property
    def averaged(self) -> Tensor:
        """A view of weights and statistics as one tensor: they are adjacent in memory."""
        end = self.statistics.storage_offset() + self.statistics.numel() - 1
        return self.weights.as_strided((end,), (1,))


@torch.no_grad()
def flatten(module: nn.Module) -> Flat:
    """Makes the parameters and the BatchNorm buffers views of flat tensors.

    Values, shapes, strides and names stay. The parameters stay the same objects. So an optimizer
    that was built before remains valid, if it refers to the parameters and not to their data.
    """
    parameters = list(module.parameters())
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    num_weights = sum(p.numel() for p in parameters)
    # Align the statistics: the compiler copies an input that is not aligned to 16 bytes.
    begin = -(-num_weights // 4) * 4
    num_statistics = 2 * sum(layer.num_features for layer in layers) + 1
    whole = torch.zeros(begin + num_statistics, device=parameters[0].device)
    weights, statistics = whole[:num_weights], whole[begin:]
    for parameter, view in zip(parameters, views_of(weights, parameters), strict=True):
        view.copy_(parameter)
        parameter.data = view
    _move_buffers(layers, ("running_mean", "running_var"), statistics)
    counts = torch.zeros(len(layers), dtype=torch.int64, device=whole.device)
    _move_buffers(layers, ("num_batches_tracked",), counts)
    return Flat(weights, statistics, counts)


def views_of(flat: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """Adjacent views of a flat tensor, with the shapes and strides of `like`."""
    views, start = [], flat.storage_offset()
    for tensor in like:
        views.append(flat.as_strided(tensor.shape, tensor.stride(), start))
        start += tensor.numel()
    return views


def to_1d(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Flattens each tensor to one dimension, in the memory order of its partner in `like`.

    The result is a view if the tensor has that order already, as nearly all have; otherwise a copy.
    With equal strides, `torch._foreach_...` takes a few kernels instead of one for each tensor.
    """
    found = []
    for tensor, other in zip(tensors, like, strict=True):
        if _order(tensor) != _order(other):
            tensor = torch.empty_strided(
                other.shape, other.stride(), dtype=tensor.dtype, device=tensor.device
            ).copy_(tensor)
        found.append(tensor.as_strided((tensor.numel(),), (1,)))
    return found


def _order(tensor: Tensor) -> list[int]:
    """The strides of the dimensions with more than one element: only these matter."""
    return [s for s, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _move_buffers(layers: list[_BatchNorm], names: tuple[str, ...], flat: Tensor) -> None:
    """Makes the buffers with these names views of `flat`, in the order of the layers."""
    owners = [(layer, name) for layer in layers for name in names]
    buffers: list[Tensor] = [getattr(layer, name) for layer, name in owners]
    for (layer, name), buffer, view in zip(owners, buffers, views_of(flat, buffers), strict=True):
        view.copy_(buffer)
        setattr(layer, name, view)
