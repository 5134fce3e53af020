"""Resizing on the CPU gives PIL's pixels, and memory is not reused too early."""

import gc

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from fasttrain.resize import MEAN, STD, Recycler, Resizer

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("out_px", [32, 97, 224])
def test_resized_pixels_equal_pils(interpolation: str, out_px: int) -> None:
    photo = load_sample_images().images[0]  # 427 x 640
    places = [(0, 0, 640, 427), (3, 5, 100, 100), (200, 100, 60, 300), (17, 400, 500, 27)]
    places += [(1, 2, 1, 1), (9, 9, out_px, out_px)]
    windows = [photo[y : y + h, x : x + w] for x, y, w, h in places]
    flips = np.arange(len(windows)) % 2 == 1
    resizer = Resizer(2, interpolation)
    images = resizer.start(windows, flips, out_px).result()
    resizer.close()
    assert images.shape == (len(windows), 3, out_px, out_px)
    assert images.is_contiguous(memory_format=torch.channels_last)
    found = (images.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)) * 255
    for window, flip, image in zip(windows, flips, found, strict=True):
        expected = Image.fromarray(window).resize((out_px, out_px), FILTERS[interpolation])
        if flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        difference = np.abs(image.numpy() - np.asarray(expected, np.float32))
        # In steps of 1/255. Torch rounds a bicubic image once more in between.
        assert difference.mean() < 0.4
        assert difference.max() < (1.01 if interpolation == "bilinear" else 10)


def test_memory_is_reused_when_nobody_holds_it() -> None:
    recycler = Recycler()
    first = recycler.empty(4, 8)
    first.fill_(1)
    address, view = first.data_ptr(), first.view(2, 16)[1:]
    del first
    gc.collect()
    second = recycler.empty(4, 8)  # a view of the first is still held
    assert second.data_ptr() != address and bool((view == 1).all())
    del view
    gc.collect()
    assert recycler.empty(4, 8).data_ptr() == address
    weight = torch.ones(8, 8, requires_grad=True)
    third = recycler.empty(4, 8).fill_(3)
    address, loss = third.data_ptr(), (third @ weight).sum()
    del third
    gc.collect()
    assert recycler.empty(4, 8).data_ptr() != address  # autograd holds it
    loss.backward()
    assert weight.grad is not None and bool((weight.grad == 12).all())


def test_other_sizes_use_other_memory() -> None:
    recycler = Recycler()
    for size in (8, 16, 4, 64, 8):
        tensor = recycler.empty(size, size)
        assert tensor.shape == (size, size) and tensor.dtype == torch.float32
        tensor.fill_(size)
        del tensor
    assert len(recycler.free) == 1


def test_threads_of_torch_stay_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        resizer = Resizer(4, "bilinear")
        assert torch.get_num_threads() == 3
        found = list(resizer.pool.map(lambda _: torch.get_num_threads(), range(20)))
        assert set(found) == {1}
        resizer.close()
    finally:
        torch.set_num_threads(before)
