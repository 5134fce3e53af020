"""Pictures have the exact pixels of a loader's images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_layout import imports_of

from fasttrain import pictures, shards
from fasttrain.reading import BadSamples
from fasttrain.resize import MEAN, STD


def normalised(tiles: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Images uint8 `(B, S, S, 3)` as a loader gives them."""
    values = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((values - mean) / std).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_value_of_a_pixel_is_recovered(dtype: torch.dtype) -> None:
    tiles = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    found = pictures.pixels(normalised(tiles, dtype))
    assert found.dtype == np.uint8 and (found == tiles).all()
    channels_last = normalised(tiles, dtype).contiguous(memory_format=torch.channels_last)
    assert (pictures.pixels(channels_last) == tiles).all()


@pytest.mark.parametrize(("px", "factor"), [(32, 5), (200, 1)])
def test_a_grid_has_each_image_with_its_label(px: int, factor: int) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (5, px, px, 3), np.uint8)
    images = normalised(tiles, torch.float32)
    found = pictures.grid(images, ["ant", "bee", "cat", "Käse", "a name that is far too long " * 9])
    side = factor * px
    assert found.dtype == np.uint8 and found.shape == (2 * (side + 30) + 8, 3 * (side + 8) + 8, 3)
    for number, tile in enumerate(tiles):
        x, y = 8 + number % 3 * (side + 8), 8 + number // 3 * (side + 30)
        shown = found[y : y + side, x : x + side]
        assert (shown[::factor, ::factor] == tile).all()
        assert (shown[factor - 1 :: factor, factor - 1 :: factor] == tile).all()
        caption = found[y + side : y + side + 30, x : x + side]
        assert caption.min() < 100  # there is ink
        assert (found[y + side : y + side + 30, x + side : x + side + 8] == 255).all()
    with pytest.raises(ValueError, match="5 images need as many labels, not 1"):
        pictures.grid(images, ["ant"])


def test_originals_are_read_from_jpeg_and_raw_shards(dataset: Path, raw: Path) -> None:
    for root in (dataset, raw):
        split = shards.open_split(root, "train")
        for sample in (0, 17, 44):
            found = pictures.original(split, sample)
            assert found.mode == "RGB"
            assert found.size == (split.width[sample], split.height[sample])
    jpeg, pixels = (pictures.original(shards.open_split(r, "train"), 5) for r in (dataset, raw))
    assert np.array_equal(np.asarray(jpeg), np.asarray(pixels))


def test_a_damaged_original_is_named(copied: Path) -> None:
    split = shards.open_split(copied, "train")
    path = split.shard_paths[split.shard[3]]
    data = bytearray(path.read_bytes())
    start = int(split.offset[3])
    data[start : start + 20] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(BadSamples) as error:
        pictures.original(split, 3)
    assert f"sample 3, {path}, key 000000003" in str(error.value)
    assert "tools/verify_shards.py" in str(error.value)


def test_text_is_shortened_and_broken_to_a_width() -> None:
    text = "every word of this long sentence is kept in one of the lines"
    lines = pictures.lines_of(text, 15, 120)
    assert " ".join(lines) == text and len(lines) > 2
    assert all(pictures.font(15).getlength(line) <= 120 for line in lines)
    canvas = pictures.blank(200, 20)
    pictures.write(canvas, (0, 0), text, width=100)
    ink = np.asarray(canvas.convert("L")) < 200
    assert ink[:, :100].any() and not ink[:, 101:].any()


def test_pillow_is_imported_only_where_something_is_drawn() -> None:
    found = imports_of(Path(pictures.__file__), top_level_only=True)
    assert "torch" in found and not any("PIL" in name for name in found)
