"""MobileNetV3 Large and Small, written as the paper's tables.

All modules and their names are those of github.com/d-li14/mobilenetv3.pytorch, so that its
published weights load unchanged. The networks differ from torchvision's in two ways: squeeze-excite
comes *before* the activation of the depthwise convolution, and below width 1.0 the last hidden
layer keeps its 1280 (Large) or 1024 (Small) units.

Source: Searching for MobileNetV3, arXiv:1905.02244, tables 1 and 2.
"""

from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain import fused_block, operators
from fasttrain.depthwise import DepthwiseConv2d

Arch = Literal["large", "small"]
ARCHS: tuple[Arch, ...] = get_args(Arch)
STAGES = 5  # of both networks: each halves the side of its input
LAST_LAYER = "classifier.3"  # the layer whose rows are the classes


class Row(NamedTuple):
    """One block of the tables: `se` and `hardswish` are 0 or 1, `expansion` widens the input."""

    kernel: int
    expansion: float
    channels: int
    se: int
    hardswish: int
    stride: int


# fmt: off
LARGE = (
    #   k  exp    c  se hs  s
    Row(3, 1.0,  16, 0, 0, 1),
    Row(3, 4.0,  24, 0, 0, 2),
    Row(3, 3.0,  24, 0, 0, 1),
    Row(5, 3.0,  40, 1, 0, 2),
    Row(5, 3.0,  40, 1, 0, 1),
    Row(5, 3.0,  40, 1, 0, 1),
    Row(3, 6.0,  80, 0, 1, 2),
    Row(3, 2.5,  80, 0, 1, 1),
    Row(3, 2.3,  80, 0, 1, 1),
    Row(3, 2.3,  80, 0, 1, 1),
    Row(3, 6.0, 112, 1, 1, 1),
    Row(3, 6.0, 112, 1, 1, 1),
    Row(5, 6.0, 160, 1, 1, 2),
    Row(5, 6.0, 160, 1, 1, 1),
    Row(5, 6.0, 160, 1, 1, 1),
)
SMALL = (
    #   k  exp    c  se hs  s
    Row(3, 1.0,  16, 1, 0, 2),
    Row(3, 4.5,  24, 0, 0, 2),
    Row(3, 3.67, 24, 0, 0, 1),
    Row(5, 4.0,  40, 1, 1, 2),
    Row(5, 6.0,  40, 1, 1, 1),
    Row(5, 6.0,  40, 1, 1, 1),
    Row(5, 3.0,  48, 1, 1, 1),
    Row(5, 3.0,  48, 1, 1, 1),
    Row(5, 6.0,  96, 1, 1, 2),
    Row(5, 6.0,  96, 1, 1, 1),
    Row(5, 6.0,  96, 1, 1, 1),
)
# fmt: on


def round_channels(channels: float) -> int:
    """Nearest multiple of 8, at least 8, and never more than 10 % below `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def spatial_mean(x: Tensor) -> Tensor:
    """Mean over height and width: `(B, C, H, W)` to `(B, C)`.

    The gradient of `x.mean((2, 3))` would be NCHW. Each addition and BatchNorm before it would then
    read two layouts: 2.4 GB per update of Large at batch 1024. The gradient of this function is
    channels-last, like `x`.
    """
    return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


class SqueezeExcite(nn.Module):
    """Scales each channel of `(B, C, H, W)` by a gate computed from the spatial means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = round_channels(channels // 4)
        self.fc = nn.Sequential(
            nn.Linear(channels, squeezed),
            nn.ReLU(inplace=True),
            nn.Linear(squeezed, channels),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc(spatial_mean(x))  # (B, C)
        return x * gate[:, :, None, None]


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-excite, project; plus a shortcut if input and output shapes agree.

    Maps `(B, in_channels, H, W)` to `(B, out_channels, H / stride, W / stride)`.
    """

    kernels: bool = False  # train by `fused_block`: the same results but for rounding

    def __init__(self, in_channels: int, row: Row, width: float) -> None:
        super().__init__()
        hidden = round_channels(in_channels * row.expansion)
        self.out_channels = round_channels(row.channels * width)
        self.hidden = hidden
        self.shortcut = row.stride == 1 and in_channels == self.out_channels

        def act() -> nn.Module:
            return nn.Hardswish() if row.hardswish else nn.ReLU(inplace=True)

        se = SqueezeExcite(hidden) if row.se else nn.Identity()
        layers: list[nn.Module] = [
            DepthwiseConv2d(hidden, row.kernel, row.stride),
            nn.BatchNorm2d(hidden),
            # As in the published weights: SE comes last only in the block that does not expand.
            *((act(), se) if in_channels == hidden else (se, act())),
            nn.Conv2d(hidden, self.out_channels, 1, bias=False),
            nn.BatchNorm2d(self.out_channels),
        ]
        if in_channels != hidden:
            expand = nn.Conv2d(in_channels, hidden, 1, bias=False)
            layers = [expand, nn.BatchNorm2d(hidden), act(), *layers]
        self.conv = nn.Sequential(*layers)
        self.spec = fused_block.Spec(
            stride=row.stride,
            act=operators.HARDSWISH if row.hardswish else operators.RELU,
            expands=in_channels != hidden,
            gate_after=bool(row.se) and in_channels == hidden,
            shortcut=self.shortcut,
        )

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # TorchScript compiles no autograd function
            if self.kernels and self.training:
                return fused_block.run(self.spec, self._layers(), x)
        return x + self.conv(x) if self.shortcut else self.conv(x)

    @torch.jit.unused
    def _layers(self) -> fused_block.Layers:
        def of(kind: type) -> list[Any]:
            return [layer for layer in self.conv.modules() if isinstance(layer, kind)]

        return fused_block.Layers(of(nn.Conv2d), of(nn.BatchNorm2d), of(nn.Linear))


class StemConv2d(nn.Conv2d):
    """`nn.Conv2d` for images of three channels. On a GPU, zeros make them eight channels.

    cuDNN has no fast kernels for three channels in half precision: forward and weight gradient of
    Large's first convolution took 3.6 of an update's 39 ms (H200, batch 1024, torch 2.11).
    """

    CHANNELS = 8

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if x.is_cuda and x.dtype != torch.float32:
                return self.padded(x)
        return self._conv_forward(x, self.weight, self.bias)

    def padded(self, x: Tensor) -> Tensor:
        """The same result, from images and filters that are padded with channels of zeros."""
        zeros = (0, 0, 0, 0, 0, self.CHANNELS - self.in_channels)
        return self._conv_forward(F.pad(x, zeros), F.pad(self.weight, zeros), self.bias)


def _conv_bn_act(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Sequential:
    conv_type = StemConv2d if in_channels == 3 else nn.Conv2d
    conv = conv_type(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.Hardswish())


class MobileNetV3(nn.Module):
    """Maps normalised float images `(B, 3, H, W)` to logits `(B, num_classes)`.

    Channels-last images are the fastest. Build it by `mobilenetv3_large`, `mobilenetv3_small` or
    `build_model`.
    """

    about: str = "this network"  # its name in messages
    frozen_stages: int = 0  # how many of the first stages are frozen

    def __init__(
        self,
        rows: tuple[Row, ...],
        width: float,
        hidden_units: int,
        num_classes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        channels = round_channels(16 * width)
        layers: list[nn.Module] = [_conv_bn_act(3, channels, 3, 2)]
        for row in rows:
            block = InvertedResidual(channels, row, width)
            layers.append(block)
            channels = block.out_channels
        self.features = nn.Sequential(*layers)
        self.conv = _conv_bn_act(channels, block.hidden, 1, 1)
        if width > 1.0:
            hidden_units = round_channels(hidden_units * width)
        self.classifier = nn.Sequential(
            nn.Linear(block.hidden, hidden_units),
            nn.Hardswish(),
            nn.Dropout(dropout),
            nn.Linear(hidden_units, num_classes),
        )
        self.apply(_init_weights)

    def freeze(self, stages: int) -> None:
        """Freezes weights and BatchNorm statistics of the first `stages` of five stages.

        A stage begins at each layer that halves the image. The last stage includes the last
        convolution.
        """
        self.frozen_stages = stages
        for layer in self._frozen():
            layer.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but frozen stages stay in evaluation mode."""
        super().train(mode)
        for layer in self._frozen():
            layer.eval()
        return self

    @torch.jit.unused
    def _frozen(self) -> list[nn.Module]:
        """The layers of the frozen stages."""
        found: list[nn.Module] = []
        stage = 0
        for layer in self.features:
            halves = any(isinstance(m, nn.Conv2d) and m.stride[0] == 2 for m in layer.modules())
            stage += halves
            if stage <= self.frozen_stages:
                found.append(layer)
        return [*found, *([self.conv] if self.frozen_stages >= STAGES else [])]

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(self.features(images))  # (B, C, H/32, W/32)
        return self.classifier(spatial_mean(x))


def use_kernels(network: nn.Module, on: bool, pointwise: bool = False) -> None:
    """Makes blocks train by `fused_block`, or by PyTorch's layers. Evaluation stays as it is.

    Args:
        on: by `fused_block`, with its depthwise kernels.
        pointwise: with its 1 x 1 kernels too.
    """
    for layer in network.modules():
        if isinstance(layer, InvertedResidual):
            # `fused_block` applies a gate before the activation. Hard-swish does not allow that for
            # a gate that comes after it. No network of the tables has such a block.
            fits = not layer.spec.gate_after or layer.spec.act == operators.RELU
            layer.kernels = on and fits
            layer.spec = layer.spec._replace(pointwise_kernel=pointwise)


def _init_weights(module: nn.Module) -> None:
    """Draws the weights: Kaiming normal by fan-out for convolutions, std 0.01 for linear layers.

    BatchNorm keeps PyTorch's default, the identity.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.zeros_(module.bias)


def mobilenetv3_large(
    width: float = 1.0,
    num_classes: int | None = None,
    dropout: float = 0.2,
    weights: str | PathLike[str] | None = None,
    average: bool = True,
) -> MobileNetV3:
    """MobileNetV3-Large: 5,483,032 parameters, 216.59 M multiply-adds at 224 px for width 1.0.

    Args:
        width: multiplies the channels of every layer.
        num_classes: the number of logits; None: that of the weights, or 1,000 without weights.
        dropout: probability with which a unit of the last hidden layer is dropped in training.
        weights: a run folder, a checkpoint, a folder of `tools/export.py`, or a file of weights
            (.safetensors, .pth); None: random weights from torch's current seed.
        average: take the moving average of the weights where there is one.
    Returns:
        The network on the CPU, in training mode. Call `eval()` before you evaluate it.
    Raises:
        Fault: there are no usable weights, or they have another width or number of classes. It is
            a ValueError.
    """
    return _built("large", width, num_classes, dropout, weights, average)


def mobilenetv3_small(
    width: float = 1.0,
    num_classes: int | None = None,
    dropout: float = 0.2,
    weights: str | PathLike[str] | None = None,
    average: bool = True,
) -> MobileNetV3:
    """MobileNetV3-Small: 2,542,856 parameters, 56.51 M multiply-adds at 224 px for width 1.0.

    Arguments, result and errors are those of `mobilenetv3_large`.
    """
    return _built("small", width, num_classes, dropout, weights, average)


def _built(
    arch: Arch,
    width: float,
    num_classes: int | None,
    dropout: float,
    weights: str | PathLike[str] | None,
    average: bool,
) -> MobileNetV3:
    if weights is None:
        return build_model(arch, width, 1000 if num_classes is None else num_classes, dropout)
    # Imported late: what opens weights is above this module, and building a network needs none.
    from fasttrain import trained

    return trained.network_from(
        Path(weights), average, partial(build_model, arch, width, dropout=dropout), num_classes
    )


def build_model(arch: Arch, width: float, num_classes: int, dropout: float) -> MobileNetV3:
    """Builds the network that a recipe's `[model]` names, initialised from torch's current seed."""
    rows, hidden_units = (LARGE, 1280) if arch == "large" else (SMALL, 1024)
    network = MobileNetV3(rows, width, hidden_units, num_classes, dropout)
    network.about = f"MobileNetV3-{arch.capitalize()} {width:g} with {num_classes:,} classes"
    return network


def count_macs(model: nn.Module, image_px: int) -> int:
    """Counts the multiply-adds of convolutions and linear layers for one square image."""
    total = 0

    def add(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        # Each output element costs as many multiply-adds as one filter has weights.
        total += output.numel() * module.weight[0].numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, image_px, image_px))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return total
