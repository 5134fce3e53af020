"""The layers of the network that the project builds, with the sizes of their tensors."""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.model import Arch, InvertedResidual, MobileNetV3, SqueezeExcite, build_model

NUM_CLASSES = 1000
Kind = Literal["stem", "expand", "depthwise", "project", "head", "linear"]


class Layer(NamedTuple):
    """A convolution with the BatchNorm, squeeze-excite and activation that follow; or a matrix.

    Sizes are those of one image.
    """

    name: str  # of its weights in the network, without `.weight`
    kind: Kind
    kernel: int
    stride: int
    inputs: tuple[int, int]  # channels, side
    outputs: tuple[int, int]
    weights: int
    act: Literal["none", "relu", "hardswish"]
    gate: Literal["none", "before", "after"]  # squeeze-excite: before or after the activation
    begins_shortcut: bool  # its input is also added to the output of its block
    ends_shortcut: bool  # the input of its block is added to its output

    @property
    def read(self) -> int:
        """How many numbers of an image it reads."""
        return self.inputs[0] * self.inputs[1] ** 2

    @property
    def written(self) -> int:
        """How many numbers of an image it writes, before BatchNorm."""
        return self.outputs[0] * self.outputs[1] ** 2


class Network(NamedTuple):
    """What is counted of a network."""

    layers: tuple[Layer, ...]  # in the order of the forward pass
    parameters: int

    @property
    def convolutions(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.kind != "linear")


@cache
def network_of(arch: Arch, width: float, px: int) -> Network:
    """The layers for images of side `px`. Nothing is computed: the tensors have no memory."""
    with torch.device("meta"):
        network = build_model(arch, width, NUM_CLASSES, 0.0)
        shapes = _shapes(network, px)
    found = [*_chain("features.0", network.features[0], shapes)]
    for number, block in enumerate(network.features[1:], 1):
        assert isinstance(block, InvertedResidual)
        found += _of_block(f"features.{number}.conv", block, shapes)
    found += _chain("conv", network.conv, shapes)
    found += _matrices(network)
    return Network(tuple(found), sum(p.numel() for p in network.parameters()))


def _shapes(network: nn.Module, px: int) -> dict[nn.Module, tuple[torch.Size, torch.Size]]:
    """The shapes of what each convolution reads and writes."""
    found: dict[nn.Module, tuple[torch.Size, torch.Size]] = {}

    def see(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        found[layer] = given[0].shape, output.shape

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(see)
    network(torch.zeros(2, 3, px, px))  # two images: BatchNorm refuses one value per channel
    return found


def _chain(
    name: str,
    modules: nn.Module,
    shapes: dict[nn.Module, tuple[torch.Size, torch.Size]],
) -> Iterator[Layer]:
    """The layers of a sequence of modules: each begins with its convolution."""
    children = [*modules.children()]
    starts = [n for n, child in enumerate(children) if isinstance(child, nn.Conv2d)]
    for start, end in pairwise([*starts, len(children)]):
        conv, *following = children[start:end]
        assert isinstance(conv, nn.Conv2d)
        read, written = shapes[conv]
        act, gate = _what_follows(following)
        yield Layer(
            name=f"{name}.{start}",
            kind=_kind(conv, first=start == 0, named=name),
            kernel=conv.kernel_size[0],
            stride=conv.stride[0],
            inputs=(read[1], read[2]),
            outputs=(written[1], written[2]),
            weights=conv.weight.numel(),
            act=act,
            gate=gate,
            begins_shortcut=False,
            ends_shortcut=False,
        )


def _kind(conv: nn.Conv2d, first: bool, named: str) -> Kind:
    if conv.groups > 1:
        return "depthwise"
    if named == "conv":
        return "head"
    if conv.kernel_size[0] > 1:
        return "stem"
    return "expand" if first else "project"


def _what_follows(
    modules: list[nn.Module],
) -> tuple[Literal["none", "relu", "hardswish"], Literal["none", "before", "after"]]:
    """The activation of a layer, and where its squeeze-excite is."""
    act: Literal["none", "relu", "hardswish"] = "none"
    gate: Literal["none", "before", "after"] = "none"
    for module in modules:
        if isinstance(module, nn.ReLU):
            act = "relu"
        elif isinstance(module, nn.Hardswish):
            act = "hardswish"
        elif isinstance(module, SqueezeExcite):
            gate = "before" if act == "none" else "after"
    return act, gate


def _of_block(
    name: str,
    block: InvertedResidual,
    shapes: dict[nn.Module, tuple[torch.Size, torch.Size]],
) -> list[Layer]:
    """The two or three layers of a block, with the two ends of its shortcut."""
    layers = [*_chain(name, block.conv, shapes)]
    layers[0] = layers[0]._replace(begins_shortcut=block.shortcut)
    layers[-1] = layers[-1]._replace(ends_shortcut=block.shortcut)
    return layers


def _matrices(network: MobileNetV3) -> Iterator[Layer]:
    """The linear layers of the classifier."""
    for name, module in network.classifier.named_children():
        if isinstance(module, nn.Linear):
            yield Layer(
                name=f"classifier.{name}",
                kind="linear",
                kernel=1,
                stride=1,
                inputs=(module.in_features, 1),
                outputs=(module.out_features, 1),
                weights=module.weight.numel(),
                act="none",
                gate="none",
                begins_shortcut=False,
                ends_shortcut=False,
            )
