"""The tensors of a network as views of a few flat ones, so that one operation reaches them all."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Flat(NamedTuple):
    """What a network learns. Its parameters and the buffers of BatchNorm are views of these."""

    weights: Tensor  # float32 (P,), in the order of `module.parameters()`
    statistics: Tensor  # float32 (S + 1,): running means and variances, and one spare value
    counts: Tensor  # int64 (L,): `num_batches_tracked` of each BatchNorm layer

    @property
    def averaged(self) -> Tensor:
        """Weights and statistics in one tensor: they lie one after the other. A view."""
        end = self.statistics.storage_offset() + self.statistics.numel() - 1
        return self.weights.as_strided((end,), (1,))


@torch.no_grad()
def flatten(module: nn.Module) -> Flat:
    """Makes the parameters and the buffers of BatchNorm views of flat tensors.

    Values, shapes, strides and names stay. The optimizer has to be built afterwards or keep the
    parameters themselves, which stay the same objects.
    """
    parameters = list(module.parameters())
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    num_weights = sum(p.numel() for p in parameters)
    # The compiler copies an input whose address is no multiple of 16 bytes.
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
    """Views of a flat tensor, one after the other, with the shapes and strides of `like`."""
    views, start = [], flat.storage_offset()
    for tensor in like:
        views.append(flat.as_strided(tensor.shape, tensor.stride(), start))
        start += tensor.numel()
    return views


def lines(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor as one dimension, in the order in which the memory of its `like` lies.

    A view where the tensor lies in that order already, as nearly all do; else a copy. So the
    operations on lists (`torch._foreach_...`) find equal strides, and take a few kernels instead of
    one for each tensor.
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
    """The strides that matter: those of dimensions of more than one element."""
    return [s for s, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _move_buffers(layers: list[_BatchNorm], names: tuple[str, ...], flat: Tensor) -> None:
    """Makes the buffers of those names views of `flat`, in the order of the layers."""
    placed = [(layer, name) for layer in layers for name in names]
    buffers: list[Tensor] = [getattr(layer, name) for layer, name in placed]
    for (layer, name), buffer, view in zip(placed, buffers, views_of(flat, buffers), strict=True):
        view.copy_(buffer)
        setattr(layer, name, view)
