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


@torch.no_grad()
def flatten(module: nn.Module) -> Flat:
    """Makes the parameters and the buffers of BatchNorm views of flat tensors.

    Values, shapes, strides and names stay. The optimizer has to be built afterwards or keep the
    parameters themselves, which stay the same objects.
    """
    parameters = list(module.parameters())
    device = parameters[0].device
    weights = torch.empty(sum(p.numel() for p in parameters), device=device)
    for parameter, view in zip(parameters, views_of(weights, parameters), strict=True):
        view.copy_(parameter)
        parameter.data = view
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    statistics = _flat_buffers(layers, ("running_mean", "running_var"), torch.zeros(1), device)
    none = torch.zeros(0, dtype=torch.int64)
    return Flat(weights, statistics, _flat_buffers(layers, ("num_batches_tracked",), none, device))


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


def _flat_buffers(
    layers: list[_BatchNorm], names: tuple[str, ...], spare: Tensor, device: torch.device
) -> Tensor:
    """One tensor of the buffers of those names, which become views of it, and of `spare`."""
    places = [(layer, name) for layer in layers for name in names]
    buffers: list[Tensor] = [getattr(layer, name) for layer, name in places]
    flat = torch.cat([*(buffer.flatten() for buffer in buffers), spare.to(device)])
    for (layer, name), view in zip(places, views_of(flat, buffers), strict=True):
        setattr(layer, name, view)
    return flat
