"""What a user of a trained network must know: network, classes, pixels, accuracy.

Every form that `tools/export.py` writes holds a description, as JSON under the name `KEY`.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fasttrain import config, matching
from fasttrain.faults import Fault
from fasttrain.model import Arch
from fasttrain.resize import MEAN, STD

KEY = "fasttrain"


class DescriptionError(Fault, ValueError):
    """The description in a file cannot be used. The message says why, and what to do."""


class Preprocessing(BaseModel):
    """How the pixels of an image become the network's input, as in an evaluation."""

    model_config = ConfigDict(frozen=True)

    resize_px: int = Field(ge=32)  # shorter side after resizing
    crop_px: int = Field(ge=32)  # side of the centre crop
    interpolation: Literal["bilinear", "bicubic"]  # with antialiasing
    mean: tuple[float, float, float] = MEAN  # of RGB in [0, 1]
    std: tuple[float, float, float] = STD


class Description(BaseModel):
    """Describes a trained network. `top1` and `top5` are in percent, on the validation images."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1  # of this format
    arch: Arch
    width: float
    num_classes: int
    classes: tuple[str, ...] | None = None  # by logit; None if the weights do not name them
    preprocessing: Preprocessing
    average: bool = False  # True: the weights are a moving average
    top1: float | None = None
    top5: float | None = None

    @property
    def network(self) -> str:
        """The network's name, such as `MobileNetV3-Small 0.75`."""
        return f"MobileNetV3-{self.arch.capitalize()} {self.width:g}"


def preprocessing_of(data: config.Data) -> Preprocessing:
    """The preprocessing of a recipe's evaluations."""
    return Preprocessing(
        resize_px=data.eval_resize_px,
        crop_px=data.eval_crop_px,
        interpolation=data.interpolation,
    )


def parse(text: str, place: object) -> Description:
    """Reads the JSON of a description.

    Args:
        place: the file that holds it, for messages.
    Raises:
        DescriptionError: the text is no description of this version.
    """
    try:
        return Description.model_validate_json(text)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"])
        raise DescriptionError(
            f"{place}: its description is not what this fasttrain writes ({key}: {detail['msg']}); "
            "export the network again"
        ) from None


def readable(classes: tuple[str, ...] | None) -> dict[str, str]:
    """English names by class name, if the classes are ImageNet's; otherwise nothing."""
    if classes is None or not set(classes) <= set(matching.imagenet()):
        return {}
    from torchvision.models import MobileNet_V3_Large_Weights

    names = MobileNet_V3_Large_Weights.IMAGENET1K_V1.meta["categories"]
    return dict(zip(matching.imagenet(), names, strict=True))
