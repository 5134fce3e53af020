"""Reads what evaluate.py wrote about classes and mistakes, and chooses what is worth a look."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from fasttrain import matching
from fasttrain.faults import ConfigError
from reporting.runs import Run

FOLDER = "evaluation"  # inside the run folder
RESULT = "evaluation.json"
PREDICTIONS = "predictions.csv"


class ClassResult(BaseModel):
    """The accuracy of a class, in percent."""

    name: str = Field(alias="class")
    images: int
    top1: float
    top5: float


class Confusion(BaseModel):
    """A pair of classes that the network confused."""

    label: str
    predicted: str
    images: int


class Result(BaseModel):
    """The contents of `evaluation.json`."""

    weights: Path
    average: bool  # True if these are the moving average of the weights
    data: Path
    split: str
    crop_px: int
    resize_px: int
    flip: bool
    top1: float
    top5: float
    loss: float | None
    seen: int
    classes: list[ClassResult]
    confusions: list[Confusion]


class Prediction(BaseModel):
    """A line of `predictions.csv`."""

    sample: int  # the id in the split
    label: str
    predicted: str
    confidence: float  # probability of the predicted class
    label_probability: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation of a run on one data set."""

    folder: Path
    result: Result
    mistakes: list[Prediction]  # the most confident first

    @property
    def ranked(self) -> list[ClassResult]:
        """The classes that have images, the best first."""
        seen = [one for one in self.result.classes if one.images]
        return sorted(seen, key=lambda one: (-one.top1, -one.top5, one.name))

    def confusions(self, most: int, examples: int) -> list[tuple[Confusion, list[Prediction]]]:
        """The pairs of classes with the most mistakes, each with its most confident ones."""
        chosen = self.result.confusions[:most]
        found = defaultdict[tuple[str, str], list[Prediction]](list)
        for one in self.mistakes:
            found[one.label, one.predicted].append(one)
        return [(pair, found[pair.label, pair.predicted][:examples]) for pair in chosen]

    def images_of(self, label: str) -> int:
        """The number of images of a class."""
        return next((one.images for one in self.result.classes if one.name == label), 0)


def read(run: Run) -> list[Evaluation]:
    """Reads the evaluations of a run: one for each data set, none if there are none.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    folder = run.folder / FOLDER
    found = sorted([*folder.glob(RESULT), *folder.glob(f"*/{RESULT}")])
    return [_read(path.parent, run.evaluate_command) for path in found]


def _read(folder: Path, command: str) -> Evaluation:
    path = folder / RESULT
    try:
        result = Result.model_validate_json(path.read_bytes())
        path = folder / PREDICTIONS
        with path.open(newline="", encoding="utf-8") as file:
            rows = [Prediction.model_validate(row) for row in csv.DictReader(file)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} {_fault(error)}; make it again with\n    {command}") from None
    return Evaluation(folder, result, _by_confidence(rows))


def _fault(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    if not isinstance(error, ValidationError):
        return f"is damaged ({error})"
    detail = error.errors()[0]
    where = ".".join(map(str, detail["loc"])) or "the file"
    return f"is damaged ({where}: {detail['msg']})"


def _by_confidence(rows: Iterable[Prediction]) -> list[Prediction]:
    wrong = [row for row in rows if row.predicted != row.label]
    return sorted(wrong, key=lambda row: (-row.confidence, row.sample))


def words_for(classes: Sequence[str]) -> dict[str, str]:
    """Maps ImageNet's class names, such as n01440764, to words: `tench`. Other names map to "".

    The words are torchvision's. Its import takes seconds, so only ImageNet's classes pay for it.
    """
    if not set(classes) <= set(matching.imagenet()):
        return dict.fromkeys(classes, "")
    from torchvision.models import MobileNet_V3_Small_Weights

    words = MobileNet_V3_Small_Weights.DEFAULT.meta["categories"]
    found = dict(zip(matching.imagenet(), words, strict=True))
    return {name: found[name] for name in classes}
