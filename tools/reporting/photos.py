"""Small pictures of validation images, read from the shards."""

import base64
import io
from pathlib import Path

from PIL import Image

from fasttrain import reading, shards
from reporting.evaluations import Prediction, Result
from reporting.runs import Run

SIDE_PX = 128  # of a thumbnail; the page shows it at 96 px, so it is sharp on fine displays
QUALITY = 80


class Photos:
    """The validation images of an evaluation, as data URLs of small JPEGs.

    `fault` says why there are none; it is empty if there are.
    """

    def __init__(self, run: Run, result: Result) -> None:
        """Opens the split that was evaluated, at the place of the evaluation or of the recipe."""
        self.split: shards.Split | None = None
        self.fault = ""
        for root in dict.fromkeys([result.data, run.recipe.data.root]):
            try:
                self._open(root, result)
            except shards.ShardError as error:
                # The rest of the message says how to make shards.
                self.fault = self.fault or str(error).partition(";")[0].partition("\n")[0]
            if self.split:
                self.fault = ""
                return

    def _open(self, root: Path, result: Result) -> None:
        split = shards.open_split(root, result.split)
        if split.num_samples != result.seen or not {c.name for c in result.classes} <= {
            *split.classes
        }:
            raise shards.ShardError(f"the images at {root} are not those that were evaluated")
        self.split = split

    def show(self, shown: Prediction) -> str:
        """Returns a thumbnail as a data URL; "" if the image is not there, or is another one."""
        split, sample = self.split, shown.sample
        if split is None or not 0 <= sample < split.num_samples:
            return ""
        if split.classes[split.label[sample]] != shown.label:
            return ""
        try:
            with split.shard_paths[split.shard[sample]].open("rb") as file:
                file.seek(int(split.offset[sample]))
                data = file.read(int(split.size[sample]))
            if reading.faults_of(split, [sample], [memoryview(data)]):
                return ""
            return thumbnail(data)
        except (OSError, Image.DecompressionBombError):
            return ""


def thumbnail(data: bytes) -> str:
    """Shrinks an image to SIDE_PX.

    Args:
        data: the bytes of an image file.
    Returns:
        A data URL of a JPEG.
    Raises:
        OSError: this is no image.
    """
    with Image.open(io.BytesIO(data)) as opened:
        opened.draft("RGB", (2 * SIDE_PX, 2 * SIDE_PX))  # decodes a large JPEG in less detail
        image = opened.convert("RGB")
    image.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return data_url("image/jpeg", buffer.getvalue())


def data_url(kind: str, data: bytes) -> str:
    """Returns a file as a URL that holds it, for use within a page."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
