"""Reads files of weights safely, compares them with a network, and loads them.

A file's first bytes tell its format, because its name may be wrong. No file can run a program:
torch's safe reader accepts tensors and the few harmless types that scripts save with them.
"""

import argparse
import contextlib
import hashlib
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fasttrain import description, matching
from fasttrain.description import Description
from fasttrain.faults import Fault
from fasttrain.matching import Known
from fasttrain.model import ARCHS, LAST_LAYER, Arch, build_model, round_channels

SHOWN = 3  # names of tensors in a message
# Keys under which training scripts keep the network, its moving average and its class names.
NETWORK = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights")
AVERAGE = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema")
NAMES = ("classes", "class_names", "class_to_idx")
BESIDE = ("n_averaged", "total_ops", "total_params")  # tools add these to a state dict
COUNTS = "num_batches_tracked"  # old versions of torch leave these out of a state dict
WIDTHS = (1.0, 0.75, 0.5, 0.35, 1.25, 1.5, 2.0)  # widths that a message can name


class WeightsError(Fault, ValueError):
    """A file of weights cannot be used. The message says why, and what to do."""

    raised_on_every_rank = True


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a network by name, and its class names if they are known."""

    path: Path
    tensors: dict[str, Tensor]  # on the CPU
    names: tuple[str, ...] | None = None
    has_average: bool = False  # True if the file also holds the moving average
    average: bool = False  # True if these are the moving average
    description: Description | None = None  # if `tools/export.py` wrote the file

    @property
    def known(self) -> Known:
        """The number of classes, 0 if the last layer is missing, and their names."""
        last = self.tensors.get(f"{LAST_LAYER}.weight")
        return Known(0 if last is None else len(last), self.names)

    def digest(self) -> str:
        """Returns 12 hex digits that are equal only for equal tensors and class names."""
        found = hashlib.sha256(repr(self.names).encode())
        for name, tensor in sorted(self.tensors.items()):
            found.update(name.encode())
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()[:12]


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read(path: Path, average: bool | None = False) -> Weights:
    """Reads the weights in a file of safetensors or torch. The file may hold other values too.

    Args:
        average: read the moving average instead of the network; None: if the file holds one.
    Raises:
        WeightsError: the file cannot be read, or it holds no weights that can be read safely.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if start[8:9] == b"{":  # safetensors: the length of a header, and the header
        content, text = _safetensors(path)
    else:
        content = _torch(path, start)
        text = getattr(content, description.KEY, None)
    has_average = _find(content, AVERAGE) is not None
    average = has_average if average is None else average
    tensors = _find(content, AVERAGE if average else NETWORK)
    if tensors is None and not average:
        tensors = _tensors(content)
    if not tensors:
        what = "no moving average; leave out --ema" if average else f"no network ({_kind(content)})"
        raise WeightsError(f"{path}: holds {what}")
    tensors = _without_prefix(path, tensors)
    told = description.parse(text, path) if isinstance(text, str) else None
    known = (told.classes if told else None) or _names(content, tensors)
    averaged = average or (told is not None and told.average)
    return Weights(path, tensors, known, has_average and not average, averaged, told)


def with_names(weights: Weights, names: tuple[str, ...]) -> Weights:
    """Returns the weights with these class names, in the order of the last layer's rows.

    Raises:
        WeightsError: the network has another number of classes.
    """
    if weights.known.number != len(names):
        raise WeightsError(
            f"{weights.path}: the network has {weights.known.number:,} classes, the list names "
            f"{len(names):,}; name each class once"
        )
    return replace(weights, names=names)


def _safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Reads the tensors of a file, and the text of its description."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
            text = (file.metadata() or {}).get(description.KEY)
    except Exception as error:  # a damaged header can raise exceptions of many types
        raise WeightsError(
            f"{path}: is damaged or cut short ({_first_line(error)}); copy it again"
        ) from None
    return found, text


def _torch(path: Path, start: bytes) -> Any:
    """Reads a file of `torch.save` that begins with the bytes `start`."""
    if reason := _no_weights(start):
        raise WeightsError(f"{path}: {reason}")
    try:
        with (
            path.open("rb") as file,  # given a path, torch would judge by its suffix
            torch.serialization.safe_globals(_harmless()),
            warnings.catch_warnings(action="ignore"),
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises exceptions of many types
        # Torch's message advises to load the file unsafely. It must not reach a user.
        reason = _unsafe(path, error) or "is damaged or not a file of weights; copy it again"
        raise WeightsError(f"{path}: {reason}") from None


def _no_weights(start: bytes) -> str:
    """Recognises a file that people mistake for weights. Returns the fault; "" if there is none."""
    if not start:
        return "is empty; copy it again"
    if start.startswith(b"version h"):
        return "is a pointer of Git LFS, not the weights; fetch them with git lfs pull"
    if start.lstrip().startswith(b"<"):
        return "is a web page, not weights; download the file itself"
    return ""


def _unsafe(path: Path, error: Exception) -> str:
    """Says which unsafe contents torch's reader refused; "" if it failed for another reason."""
    if "TorchScript" in str(error):
        return (
            "is a TorchScript program; where it was made, save the network's state_dict() instead"
        )
    kinds = set(re.findall(r"GLOBAL (\S+)", str(error)))  # only the first unsafe type
    if not kinds:
        return ""
    with contextlib.suppress(Exception):  # lists all types, but only in torch's current format
        kinds |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - _harmless_names()
    return (
        f"holds Python objects ({_some(sorted(kinds))}) beside tensors, and loading those could "
        "run any program\nwhere it was made, save only the tensors: "
        'torch.save(model.state_dict(), "weights.pth")'
    )


@cache
def _harmless() -> list[Any]:
    """Types that only hold values: a script's arguments, paths, NumPy's values."""
    numbers = [kind for name, kind in vars(np.dtypes).items() if name.endswith("DType")]
    makers = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
    # A file may have NumPy 1's or NumPy 2's names for these. The installed version does not matter.
    numpys = [
        (f, f"numpy.{c}.multiarray.{n}") for n, f in makers.items() for c in ("core", "_core")
    ]
    return [argparse.Namespace, PosixPath, np.dtype, np.ndarray, *numbers, *numpys]


def _harmless_names() -> set[str]:
    return {
        kind[1] if isinstance(kind, tuple) else f"{kind.__module__}.{kind.__name__}"
        for kind in _harmless()
    }


def _find(content: Any, keys: Sequence[str]) -> dict[str, Tensor] | None:
    """Finds the tensors under the first of these keys that has some, also deeper in its value."""
    if not isinstance(content, Mapping):
        return None
    for key in keys:
        inner = content.get(key)
        if isinstance(inner, Mapping) and (found := _find(inner, NETWORK) or _tensors(inner)):
            return found
    return None


def _tensors(content: Any) -> dict[str, Tensor]:
    """Returns the tensors of a state dict without those in `BESIDE`."""
    if not isinstance(content, Mapping):
        return {}
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str)
        and isinstance(value, Tensor)
        and name.rpartition(".")[2] not in BESIDE
    }


def _without_prefix(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefix that a wrapper put before the names, such as `module.`."""
    anchor = "features.0.0.weight"  # the first tensor of our networks
    prefixes = [name.removesuffix(anchor) for name in tensors if name.endswith(anchor)]
    if len(prefixes) > 1:
        raise WeightsError(
            f"{path}: holds {len(prefixes)} networks, under {_some(prefixes)}; save only the one "
            "to use"
        )
    if not prefixes or not prefixes[0]:
        return tensors
    return {name.removeprefix(prefixes[0]): value for name, value in tensors.items()}


def _names(content: Any, tensors: Mapping[str, Tensor]) -> tuple[str, ...] | None:
    """Returns the class names that a file holds, if there is one for each row of the last layer."""
    last = tensors.get(f"{LAST_LAYER}.weight")
    for key in NAMES if isinstance(content, Mapping) and last is not None else ():
        names = content.get(key)
        if isinstance(names, Mapping) and all(isinstance(row, int) for row in names.values()):
            names = sorted(names, key=names.__getitem__)
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            continue
        if last is not None and len(set(names)) == len(names) == len(last):
            return tuple(names)
    return None


def _kind(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"its keys: {_some([str(key) for key in content])}" if content else "it is empty"
    return f"but a {type(content).__name__}"


# --------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------


def load(weights: Weights, module: nn.Module, rule: matching.Rule | None = None) -> str:
    """Loads weights into a network, in place.

    Args:
        rule: maps the rows of the last layer by class. A row without a counterpart keeps the
            network's values. Without a rule, the last layers must have the same shape.
    Returns:
        A remark on the classes for the user; "" if there is none.
    Raises:
        WeightsError: the weights are of another network.
        ClassError: the rule refuses the classes.
    """
    check(weights, module, any_classes=rule is not None)
    own = module.state_dict()
    tensors = _with_counts(weights.tensors, own)
    said = ""
    if rule:
        rows, said = rule(weights.known)
        for name in _last_layer(own):
            tensors[name] = _take_rows(tensors.get(name), own[name], rows)
    module.load_state_dict(tensors)
    return said


def check(weights: Weights, module: nn.Module, any_classes: bool) -> None:
    """Checks that weights have the names and shapes of a network.

    Args:
        module: may be on the device "meta".
        any_classes: the numbers of classes may differ, and the last layer may be missing.
    Raises:
        WeightsError: the weights are of another network.
    """
    own = module.state_dict()
    tensors = _with_counts(weights.tensors, own)
    if faults := list(_faults(tensors, own, _last_layer(own) if any_classes else set())):
        raise WeightsError(
            f"{weights.path}: these weights do not fit {getattr(module, 'about', 'this network')}: "
            + "; ".join(faults)
            + _advice(weights.tensors, own)
        )


def _with_counts(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds the network's own batch counts where a file of an old torch has none."""
    return {name: value for name, value in own.items() if name.endswith(COUNTS)} | dict(tensors)


def _last_layer(own: Mapping[str, Tensor]) -> set[str]:
    return {name for name in own if name.rpartition(".")[0] == LAST_LAYER}


def _take_rows(source: Tensor | None, own: Tensor, rows: Sequence[int | None]) -> Tensor:
    """Copies a last layer's tensor `(C, ...)`, with some rows from `source`.

    Args:
        source: the tensor `(D, ...)` of the file; None if it is missing.
        own: the tensor `(C, ...)` of the network.
        rows: for each of the C rows, the row of `source` that replaces it, or None.
    """
    taken = own.detach().clone()
    pairs = [(target, row) for target, row in enumerate(rows) if row is not None]
    if source is not None and pairs:
        targets, found = (
            torch.tensor(column, device=own.device) for column in zip(*pairs, strict=True)
        )
        taken[targets] = source.to(taken)[found]
    return taken


def _faults(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], last: set[str]
) -> Iterator[str]:
    """Yields the reasons why tensors cannot be loaded, each with a count and the first names."""
    missing = [name for name in own if name not in tensors and name not in last]
    if missing:
        yield f"{len(missing)} of its {len(own)} tensors are missing ({_some(missing)})"
    foreign = [name for name in tensors if name not in own]
    if foreign:
        yield f"{len(foreign)} tensors are not the network's ({_some(foreign)})"
    misshaped = _misshaped(tensors, own, last)
    if misshaped:
        first = misshaped[0]
        found, wanted = tuple(tensors[first].shape), tuple(own[first].shape)
        yield f"{len(misshaped)} have another shape ({first}: {found} instead of {wanted})"


def _misshaped(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], last: set[str]
) -> list[str]:
    """Names the tensors whose shapes differ. In the layer `last`, the number of rows may differ."""
    return [
        name
        for name, wanted in own.items()
        if name in tensors
        and (
            tensors[name].ndim != wanted.ndim
            or tensors[name].shape[name in last :] != wanted.shape[name in last :]
        )
    ]


def network_of(tensors: Mapping[str, Tensor]) -> tuple[Arch, float] | None:
    """The network whose tensors these are, and its width; None if it is none of `WIDTHS`."""
    stem = len(tensors.get("features.0.0.weight", ()))
    for arch, width in itertools.product(ARCHS, WIDTHS):
        if stem != round_channels(16 * width):  # saves the time to build the network
            continue
        with torch.device("meta"):
            network = build_model(arch, width, 1, 0.0).state_dict()
        if same_shapes(tensors, network):
            return arch, width
    return None


def same_shapes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """True if `own` has all tensors but those of the last layer, with the same shapes."""
    shapes = {n: t.shape for n, t in tensors.items() if not n.startswith(LAST_LAYER)}
    return all(n in own and own[n].shape == shape for n, shape in shapes.items())


def _advice(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Says of which network the weights are, and what the user can do."""
    rows = len(tensors.get(f"{LAST_LAYER}.weight", ()))
    if same_shapes(tensors, own):
        return (
            "\na network with other classes can start from them in a new run: --set "
            "model.weights=..., with another log.run_dir"
        )
    if found := network_of(tensors):
        arch, width = found
        return (
            f"\nthey are of MobileNetV3-{arch.capitalize()} {width:g} with {rows:,} classes: "
            f'set [model] arch = "{arch}", width = {width:g} in the recipe'
        )
    return (
        "\nonly weights of fasttrain and of github.com/d-li14/mobilenetv3.pytorch fit; torchvision "
        "and timm have other networks"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
