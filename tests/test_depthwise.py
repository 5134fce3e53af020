"""The depthwise convolution has the values and gradients of `nn.Conv2d`."""

import pytest
import torch
from torch import nn

from fasttrain.depthwise import DepthwiseConv2d


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2), (3, 4), (4, 3), (4, 4), (5, 5), (9, 6)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_depthwise_convolution_equals_conv2d(
    kernel: int, stride: int, size: tuple[int, int], layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    ours = DepthwiseConv2d(8, kernel, stride).double()
    reference = nn.Conv2d(8, 8, kernel, stride, kernel // 2, groups=8, bias=False).double()
    reference.load_state_dict(ours.state_dict())
    images = torch.randn(3, 8, *size, dtype=torch.float64).contiguous(memory_format=layout)
    results = []
    for layer in (ours, reference):
        x = images.clone().requires_grad_()
        y = layer(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        assert x.grad is not None and layer.weight.grad is not None
        results.append((y.detach(), x.grad, layer.weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
