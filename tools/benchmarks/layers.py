"""The layers of the network that the project builds, with the sizes of their tensors."""

from functools import cache
from itertools import pairwise
from typing import Literal, NamedTuple

from torch import nn

from fasttrain.model import Arch, InvertedResidual, SqueezeExcite, build_model

NUM_CLASSES = 1000
Kind = Literal["stem", "expand", "depthwise", "project", "head", "linear"]
Act = Literal["none", "relu", "hardswish"]
Gate = Literal["none", "before", "after"]  # squeeze-excite: before or after the activation


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
    act: Act = "none"
    gate: Gate = "none"
    begins_shortcut: bool = False  # its input is also added to the output of its block
    ends_shortcut: bool = False  # the input of its block is added to its output

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
    """The layers of a network for square images of side `px`.

    The network is not built on the device "meta": its initialisation there imports for seconds.
    """
    network = build_model(arch, width, NUM_CLASSES, 0.0)
    found = _layers("features.0", network.features[0], px)
    for number, block in enumerate(network.features[1:], 1):
        assert isinstance(block, InvertedResidual)
        found += _of_block(f"features.{number}.conv", block, found[-1].outputs[1])
    found += _layers("conv", network.conv, found[-1].outputs[1])
    for name, module in network.classifier.named_children():
        if isinstance(module, nn.Linear):
            found.append(_of_matrix(f"classifier.{name}", module))
    return Network(tuple(found), sum(p.numel() for p in network.parameters()))


def _of_block(name: str, block: InvertedResidual, px: int) -> list[Layer]:
    """The two or three layers of a block, with the two ends of its shortcut."""
    layers = _layers(name, block.conv, px)
    layers[0] = layers[0]._replace(begins_shortcut=block.shortcut)
    layers[-1] = layers[-1]._replace(ends_shortcut=block.shortcut)
    return layers


def _layers(name: str, modules: nn.Module, px: int) -> list[Layer]:
    """The layers of a sequence of modules: each begins with its convolution.

    Args:
        px: side of the images that the first of them reads.
    """
    children = [*modules.children()]
    starts = [n for n, child in enumerate(children) if isinstance(child, nn.Conv2d)]
    found: list[Layer] = []
    for start, end in pairwise([*starts, len(children)]):
        conv, *following = children[start:end]
        assert isinstance(conv, nn.Conv2d) and isinstance(conv.padding[0], int)
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        out_px = (px + 2 * conv.padding[0] - kernel) // stride + 1
        found.append(
            Layer(
                name=f"{name}.{start}",
                kind=_kind(conv, name, first=start == 0),
                kernel=kernel,
                stride=stride,
                inputs=(conv.in_channels, px),
                outputs=(conv.out_channels, out_px),
                weights=conv.weight.numel(),
                act=_act(following),
                gate=_gate(following),
            )
        )
        px = out_px
    return found


def _of_matrix(name: str, linear: nn.Linear) -> Layer:
    return Layer(
        name=name,
        kind="linear",
        kernel=1,
        stride=1,
        inputs=(linear.in_features, 1),
        outputs=(linear.out_features, 1),
        weights=linear.weight.numel(),
    )


def _kind(conv: nn.Conv2d, sequence: str, first: bool) -> Kind:
    """The kind of a convolution in a sequence of modules."""
    if conv.groups > 1:
        return "depthwise"
    if sequence == "conv":
        return "head"
    if conv.kernel_size[0] > 1:
        return "stem"
    return "expand" if first else "project"


def _act(modules: list[nn.Module]) -> Act:
    """The activation among the modules that follow a convolution."""
    if any(isinstance(module, nn.Hardswish) for module in modules):
        return "hardswish"
    return "relu" if any(isinstance(module, nn.ReLU) for module in modules) else "none"


def _gate(modules: list[nn.Module]) -> Gate:
    """Where squeeze-excite is among the modules that follow a convolution."""
    kinds = [type(module) for module in modules]
    if SqueezeExcite not in kinds:
        return "none"
    follows = kinds[: kinds.index(SqueezeExcite)]
    return "after" if nn.ReLU in follows or nn.Hardswish in follows else "before"
