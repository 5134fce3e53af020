"""Opens a trained network: a run folder, a checkpoint, an exported folder, or a file of weights."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fasttrain import checkpoint, config, weights
from fasttrain.description import Description, preprocessing_of
from fasttrain.faults import ConfigError
from fasttrain.model import MobileNetV3, build_model
from fasttrain.weights import Weights, WeightsError

CONFIG, MODEL = "config.json", "model.safetensors"  # files of an exported folder


class Trained(NamedTuple):
    """The weights of a network and their description."""

    weights: Weights
    description: Description
    recipe: config.Recipe | None  # None if no recipe is known


def open_trained(
    path: Path, average: bool, recipe: config.Recipe | None, say: Callable[[str], None]
) -> Trained:
    """Reads the weights at `path` and describes their network.

    Args:
        path: a run folder, a checkpoint, a folder of `tools/export.py`, or a file of weights.
        average: take the moving average of the weights where there is one.
        recipe: describes the network, in place of what `path` says.
        say: receives a line for each damaged checkpoint that is skipped.
    Raises:
        Fault: there are no usable weights at `path`, or nothing describes their network.
    """
    found, own = read(path, average, say)
    chosen = recipe or own
    if chosen:
        # With another recipe, the accuracy may be another one.
        last_eval = checkpoint.last_evaluation(found) if own and not recipe else {}
        prefix = "ema_" if found.average else ""
        described = Description(
            arch=chosen.model.arch,
            width=chosen.model.width,
            num_classes=found.known.number,
            classes=found.names,
            preprocessing=preprocessing_of(chosen.data),
            average=found.average,
            top1=last_eval.get(f"{prefix}top1"),
            top5=last_eval.get(f"{prefix}top5"),
        )
    elif found.description:
        described = found.description
    else:
        raise ConfigError(
            f"{path} is a file of weights that does not describe its network: give a recipe of "
            "the network and of the image size, such as --recipe recipes/large.toml"
        )
    return Trained(found, described, chosen)


def read(
    path: Path, average: bool, say: Callable[[str], None]
) -> tuple[Weights, config.Recipe | None]:
    """Reads weights, and the recipe that trained them, if it is known.

    Args:
        path, average, say: see `open_trained`.
    Raises:
        Fault: there are no usable weights at `path`.
    """
    found, recipe = checkpoint.open_weights(file_in(path), None if average else False, say)
    if not found.known.number:
        raise WeightsError(
            f"{found.path}: the weights have no last layer, so they have no classes; train one, "
            "starting from these weights (recipes/finetune.toml)"
        )
    return found, recipe


def weights_and_recipe(
    path: Path, average: bool, given: config.Recipe | None, say: Callable[[str], None]
) -> tuple[Weights, config.Recipe | None]:
    """Reads weights, and a recipe of their network: the given one, theirs, or a described one.

    Args:
        path, say: see `open_trained`.
        average: read the moving average of the weights; it must be there.
    Returns:
        The weights, and the recipe; None if there is none.
    Raises:
        Fault: there are no usable weights at `path`.
    """
    found, own = checkpoint.open_weights(file_in(path), average, say)
    described = recipe_of(found.description) if found.description else None
    return found, given or own or described


def file_in(path: Path) -> Path:
    """The file of weights if `path` is a folder of `tools/export.py`; otherwise `path`."""
    is_exported = (path / CONFIG).is_file() and (path / MODEL).is_file()
    return path / MODEL if is_exported else path


def recipe_of(described: Description) -> config.Recipe:
    """A recipe with the network and the evaluation of a description."""
    how = described.preprocessing
    return config.Recipe(
        model=config.Model(arch=described.arch, width=described.width),
        data=config.Data(
            eval_resize_px=how.resize_px,
            eval_crop_px=how.crop_px,
            interpolation=how.interpolation,
        ),
    )


def build(trained: Trained) -> MobileNetV3:
    """Builds the network with its weights, on the CPU, ready to evaluate.

    Raises:
        WeightsError: the weights do not fit the description.
    """
    described = trained.description
    network = build_model(described.arch, described.width, trained.weights.known.number, 0.0)
    weights.load(trained.weights, network)
    return network.eval().requires_grad_(False)


def network_from(
    path: Path,
    average: bool,
    make: Callable[[int], MobileNetV3],
    num_classes: int | None,
) -> MobileNetV3:
    """Reads weights, and gives them to a network that is made for them.

    Args:
        path, average: see `open_trained`.
        make: makes the network, given its number of classes.
        num_classes: the number that the weights must have; None: any.
    Raises:
        WeightsError: there are no usable weights, or they are of another network.
    """
    found, _ = read(path, average, lambda text: None)
    number = found.known.number
    if num_classes is not None and number != num_classes:
        raise WeightsError(
            f"{found.path}: the weights have {number:,} classes, but num_classes = "
            f"{num_classes:,}; leave num_classes out, or train a network with other classes that "
            "starts from these weights (recipes/finetune.toml)"
        )
    network = make(number)
    fits = weights.same_shapes(found.tensors, network.state_dict())
    if not fits and (other_network := weights.network_of(found.tensors)):
        arch, width = other_network
        other = "" if width == 1 else f"width={width:g}, "
        raise WeightsError(
            f"{found.path}: these weights are of MobileNetV3-{arch.capitalize()} {width:g} with "
            f"{number:,} classes, not of {network.about}; call mobilenetv3_{arch}({other}"
            'weights="...")'
        )
    weights.load(found, network)
    return network
