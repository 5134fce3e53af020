"""BatchNorm's statistics are those of whole batches of training images, with the final weights."""

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
from fasttrain import config, loaders, precise_bn, shards
from fasttrain.batch import Placement

CPU = Placement(torch.device("cpu"), half=False, threads=2)


def test_statistics_are_means_over_batches_of_evaluation_images(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precise_bn, "BATCH", 10)
    split = shards.open_split(dataset, "train")
    data = config.Data(root=dataset, eval_resize_px=40, eval_crop_px=32)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3)).eval()
    weights = {name: value.clone() for name, value in network.named_parameters()}
    batches = [b.images.clone() for b in loaders.eval_loader(split, data, 10, 0, 1, CPU)]
    assert [len(images) for images in batches] == [10, 10, 10, 10, 5]

    assert precise_bn.measure(network, split, data, CPU, 1000) == 40
    outputs = [network[0](images) for images in batches[:4]]
    for name, expected in (
        ("running_mean", torch.stack([x.mean((0, 2, 3)) for x in outputs]).mean(0)),
        ("running_var", torch.stack([x.var((0, 2, 3)) for x in outputs]).mean(0)),
    ):
        torch.testing.assert_close(getattr(network[1], name), expected)
    assert all(torch.equal(value, weights[name]) for name, value in network.named_parameters())
    assert not network.training and network[1].momentum == 0.3

    # A part of the images comes from all of the split.
    assert precise_bn.measure(network, split, data, CPU, 15) == 20
    expected = torch.stack([outputs[number].mean((0, 2, 3)) for number in (0, 2)]).mean(0)
    torch.testing.assert_close(network[1].running_mean, expected)
