"""What a network predicts for each image of an evaluation, and the files that say so.

FOLDER/predictions.csv    one line per image, in the order of the split
FOLDER/per_class.csv      images and accuracy of each class
FOLDER/confusions.csv     pairs of a label and a wrong prediction, with the number of their images
FOLDER/evaluation.json    the result, with the contents of the previous two; written last
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from fasttrain import files
from fasttrain.batch import Batch

SUMMARY = "evaluation.json"


class Predictions(NamedTuple):
    """The predictions for all images of a split, in its order. Each array has shape `(N,)`."""

    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    in_top5: NDArray[np.bool_]  # True if the label is among the five classes of highest logit
    confidence: NDArray[np.float32]  # softmax probability of the predicted class
    label_probability: NDArray[np.float32]  # softmax probability of the label


class Collector:
    """Collects the predictions for this rank's images. Only `gather` waits for the device."""

    def __init__(self) -> None:
        self.ids = [np.empty(0, np.int64)]
        self.whole: list[Tensor] = []  # label, predicted class and top-5 hit, int64 (B, 3)
        self.probabilities: list[Tensor] = []  # of the predicted class and the label, (B, 2)

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Adds a batch of a loader, with its logits `(B, C)` of any float dtype."""
        assert batch.draw
        logits, labels = logits.float(), batch.labels[:, None]
        top = logits.topk(min(5, logits.shape[1])).indices  # as in metrics.EvalSums
        hit = (top == labels).any(1, keepdim=True)
        self.ids.append(batch.draw.ids)
        self.whole.append(torch.cat([labels, top[:, :1], hit], 1))
        chosen = torch.cat([top[:, :1], labels], 1)
        self.probabilities.append(logits.softmax(1).gather(1, chosen))

    def gather(self, num_samples: int) -> Predictions:
        """Gathers the predictions of all ranks. Every rank must call this.

        Raises:
            RuntimeError: the ranks together do not have each of `num_samples` images once.
        """
        whole = torch.cat([torch.empty(0, 3, dtype=torch.int64), *(t.cpu() for t in self.whole)])
        probabilities = torch.cat([torch.empty(0, 2), *(t.cpu() for t in self.probabilities)])
        part = np.concatenate(self.ids), whole.numpy(), probabilities.numpy()
        parts = zip(*gather_object([part]), strict=True)
        ids, integers, floats = (np.concatenate(arrays) for arrays in parts)
        order = ids.argsort()
        if not np.array_equal(ids[order], np.arange(num_samples)):
            raise RuntimeError(f"{len(ids):,} predictions are not one for each of {num_samples:,}")
        label, predicted, hit = integers[order].T
        return Predictions(label, predicted, hit.astype(bool), *floats[order].T)


def per_class(found: Predictions, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Images and accuracy of each class, in the order of the labels.

    Returns:
        `class`, `images`, and `top1` and `top5` in percent with 6 decimals. The accuracy of a class
        without images is None.
    """

    def count(hits: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(found.label[hits], minlength=len(classes))

    counts = [count(np.ones_like(found.in_top5)), count(found.predicted == found.label)]
    columns = [column.tolist() for column in (*counts, count(found.in_top5))]
    return [
        {
            "class": name,
            "images": images,
            "top1": round(100 * top1 / images, 6) if images else None,
            "top5": round(100 * top5 / images, 6) if images else None,
        }
        for name, images, top1, top5 in zip(classes, *columns, strict=True)
    ]


def confusions(found: Predictions, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs of a label and a wrong prediction, with most images first, then in label order."""
    wrong = found.predicted != found.label
    pairs = np.stack([found.label[wrong], found.predicted[wrong]], 1)
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)  # sorted by label
    order = np.argsort(-counts, kind="stable")
    return [
        {"label": classes[label], "predicted": classes[predicted], "images": images}
        for (label, predicted), images in zip(
            kinds[order].tolist(), counts[order].tolist(), strict=True
        )
    ]


def write(folder: Path, about: dict[str, Any], found: Predictions, classes: Sequence[str]) -> None:
    """Writes the files of an evaluation into an existing folder, and replaces earlier ones.

    Args:
        about: the first entries of `evaluation.json`.
    Raises:
        OSError: the file system refused. Then there is no `evaluation.json`.
    """
    by_class, pairs = per_class(found, classes), confusions(found, classes)
    files.clear(folder)
    (folder / SUMMARY).unlink(missing_ok=True)  # it belongs to the files of an earlier evaluation
    table = zip(
        range(len(found.label)),
        [classes[label] for label in found.label.tolist()],
        [classes[label] for label in found.predicted.tolist()],
        [f"{value:.4f}" for value in found.confidence.tolist()],
        [f"{value:.4f}" for value in found.label_probability.tolist()],
        strict=True,
    )
    names = ["sample", "label", "predicted", "confidence", "label_probability"]
    _write_csv(folder / "predictions.csv", names, table)
    names = ["class", "images", "top1", "top5"]
    _write_csv(folder / "per_class.csv", names, (entry.values() for entry in by_class))
    names = ["label", "predicted", "images"]
    _write_csv(folder / "confusions.csv", names, (entry.values() for entry in pairs))
    summary = about | {"classes": by_class, "confusions": pairs}
    files.write_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")


def _write_csv(path: Path, names: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    files.write_text(path, text.getvalue())
