"""Teachers for label.py: networks of fasttrain, torchvision and timm, as one kind of module.

A teacher maps the images of a run to one logit for each class of the data.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain import classes, matching, resize, session, weights
from fasttrain.config import Recipe
from fasttrain.distilling import Teacher
from fasttrain.faults import ConfigError
from fasttrain.matching import Known
from fasttrain.weights import Weights

FOREIGN = re.compile(r"(torchvision|timm):(.+)")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line says about the teacher."""

    name: str  # torchvision:NAME, timm:NAME or a path
    weights: Path | None  # of torchvision:NAME and timm:NAME; None: those of the package
    classes: Path | None  # its class names
    px: int | None  # side to which it resizes the images; None: as they are


class Foreign(NamedTuple):
    """A network of another package, and the statistics by which it normalises images."""

    module: nn.Module
    mean: Sequence[float] = resize.MEAN
    std: Sequence[float] = resize.STD


class Adapted(nn.Module):
    """Gives a teacher the images of a run as it expects them, and picks the logits of the data."""

    scale: Tensor
    shift: Tensor
    rows: Tensor | None

    def __init__(self, network: Foreign, px: int | None, interpolation: str) -> None:
        """
        Args:
            px: side to which images are resized; None: they stay as they are.
        """
        super().__init__()
        self.module, self.px, self.interpolation = network.module, px, interpolation
        ours_mean, ours_std, mean, std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (resize.MEAN, resize.STD, network.mean, network.std)
        )
        self.other = not torch.equal(ours_mean, mean) or not torch.equal(ours_std, std)
        self.register_buffer("scale", ours_std / std)
        self.register_buffer("shift", (ours_mean - mean) / std)
        self.register_buffer("rows", None)  # the network's class for each class of the data

    def forward(self, images: Tensor) -> Tensor:
        """Maps images `(B, 3, S, S)` to logits `(B, C)`."""
        if self.px and self.px != images.shape[-1]:
            size = (self.px, self.px)
            images = F.interpolate(images.float(), size, mode=self.interpolation, antialias=True)
        if self.other:
            images = images * self.scale + self.shift
        logits: Tensor = self.module(images)
        return logits if self.rows is None else logits[:, self.rows]


def fasttrain_teacher(
    given: tuple[Weights, Recipe], wanted: Wanted, recipe: Recipe, names: tuple[str, ...]
) -> Teacher:
    """The teacher whose weights fasttrain can read.

    Args:
        given: its weights, and the recipe of its network.
        recipe: of the run.
        names: the class names of the data.
    Raises:
        Fault: the weights are of another network, or the teacher lacks classes of the data.
    """
    found, own = given
    if wanted.classes:
        found = weights.with_names(found, classes.read_list(wanted.classes))
    teacher = session.teacher_from(found, own, names)
    adapted = Adapted(Foreign(teacher.module), wanted.px, recipe.data.interpolation)
    return Teacher(teacher.name, teacher.digest, adapted)


def foreign_teacher(wanted: Wanted, recipe: Recipe, names: tuple[str, ...]) -> Teacher:
    """The teacher of torchvision or timm.

    Args:
        recipe: of the run.
        names: the class names of the data.
    Raises:
        ConfigError: there is no such network, or its weights cannot be had.
        ClassError: the teacher lacks classes of the data.
    """
    match = FOREIGN.fullmatch(wanted.name)
    assert match
    package, name = match.groups()
    own = classes.read_list(wanted.classes) if wanted.classes else None
    # A network of the package has as many classes as its pretrained weights.
    sizes = {"num_classes": len(own)} if own and wanted.weights else {}
    network = {"torchvision": _torchvision, "timm": _timm}[package](name, wanted.weights, sizes)
    network.module.eval().requires_grad_(False)
    found = Weights(Path(wanted.name), dict(network.module.state_dict()))
    adapted = Adapted(network, wanted.px, recipe.data.interpolation)
    px = recipe.data.crop_px if isinstance(recipe.data.crop_px, int) else recipe.data.crop_px[0][1]
    number = _try(adapted, wanted, px)
    if own and len(own) != number:
        raise ConfigError(
            f"--classes {wanted.classes}: names {len(own):,} classes, but {wanted.name} has "
            f"{number:,}; name each class once"
        )
    rows = matching.to_evaluate(Known(number, own), names).rows
    chosen = [row for row in rows if row is not None]
    adapted.rows = torch.tensor(chosen)
    return Teacher(wanted.name, found.digest(), adapted)


def _try(teacher: nn.Module, wanted: Wanted, px: int) -> int:
    """Gives the teacher one image of `px` pixels. Returns the number of its classes."""
    try:
        with torch.inference_mode():
            return int(teacher(torch.zeros(1, 3, px, px)).shape[1])
    except Exception as error:  # each network has its own
        raise ConfigError(
            f"{wanted.name} does not take images of {wanted.px or px} px ({_first_line(error)}); "
            "give the size that it takes: --teacher-px 224"
        ) from None


def _torchvision(name: str, file: Path | None, sizes: dict[str, int]) -> Foreign:
    from torchvision import models

    if name not in (known := models.list_models(module=models)):
        raise ConfigError(f"torchvision:{name}: there is no such network{_close(name, known)}")
    if file:
        return Foreign(_loaded(models.get_model(name, weights=None, **sizes), file))
    chosen = models.get_model_weights(name).DEFAULT
    module = _pretrained(f"torchvision:{name}", lambda: models.get_model(name, weights=chosen))
    images = chosen.transforms()
    return Foreign(module, images.mean, images.std)


def _timm(name: str, file: Path | None, sizes: dict[str, int]) -> Foreign:
    try:
        import timm
    except ModuleNotFoundError:
        raise ConfigError(
            f"timm:{name}: timm is not installed; pip install -e '.[distill]'"
        ) from None
    if not timm.is_model(name.partition(".")[0]):
        close = _close(name, timm.list_models())
        raise ConfigError(f"timm:{name}: there is no such network{close}")
    if file:
        module = _loaded(timm.create_model(name, **sizes), file)
    else:
        module = _pretrained(f"timm:{name}", lambda: timm.create_model(name, pretrained=True))
    images = timm.data.resolve_model_data_config(module)
    return Foreign(module, images["mean"], images["std"])


def _pretrained(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Builds a network with the weights of its package, which are cached or downloaded."""
    try:
        return make()
    except Exception as error:  # of many libraries
        raise ConfigError(
            f"{name}: its weights are not in the package's cache, and could not be downloaded "
            f"({_first_line(error)}); copy them to this machine, and give --teacher-weights FILE"
        ) from None


def _loaded(module: nn.Module, file: Path) -> nn.Module:
    """Loads a file of weights into a network of another package."""
    tensors = weights.read(file).tensors
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        fault = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ConfigError(
            f"--teacher-weights {file}: these weights are of another network ({fault[:200]})"
        ) from None
    return module


def _close(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
