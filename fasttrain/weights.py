"""Files of weights, ours and those of others: read safely, unwrapped, compared, loaded.

A file is recognised by its first bytes, as names deceive. Nothing that could run a program is
read: beside tensors, torch's own reader is allowed the few harmless kinds of object that training
scripts leave beside them.
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
from safetensors.torch import load_file
from torch import Tensor, nn

from fasttrain import matching
from fasttrain.faults import Fault
from fasttrain.matching import Known
from fasttrain.model import ARCHS, LAST_LAYER, build_model

SHOWN = 3  # names of tensors in a message
# Under which keys training scripts keep the network, and its moving average.
NETWORK = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights")
AVERAGE = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema")
NAMES = ("classes", "class_names", "class_to_idx")
# What tools and old versions of torch add to a state dict, or leave out of it.
BESIDE = ("n_averaged", "total_ops", "total_params")
COUNTS = "num_batches_tracked"
WIDTHS = (1.0, 0.75, 0.5, 0.35, 1.25, 1.5, 2.0)  # that a message can name


class WeightsError(Fault, ValueError):
    """A file of weights cannot be used; says why, and what to do."""

    raised_on_every_rank = True


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a network, by name, and its class names where they are known."""

    path: Path
    tensors: dict[str, Tensor]  # on the CPU
    names: tuple[str, ...] | None = None
    has_average: bool = False  # beside these

    @property
    def known(self) -> Known:
        """The classes of the network: none of them where its last layer was left out."""
        last = self.tensors.get(f"{LAST_LAYER}.weight")
        return Known(0 if last is None else len(last), self.names)

    def digest(self) -> str:
        """Twelve digits that are alike only for equal tensors and class names."""
        found = hashlib.sha256(repr(self.names).encode())
        for name, tensor in sorted(self.tensors.items()):
            found.update(name.encode())
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()[:12]


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read(path: Path, average: bool = False) -> Weights:
    """The weights in a file: of safetensors, or saved by torch, bare or beside other things.

    Args:
        average: take the moving average that the file holds beside the network.
    Raises:
        WeightsError: there is no such file, or it holds none that can be read safely.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if start[8:9] == b"{":  # safetensors: the length of a header, and the header
        content = _safetensors(path)
    else:
        content = _torch(path, start)
    tensors = _find(content, AVERAGE if average else NETWORK)
    if tensors is None and not average:
        tensors = _tensors(content)
    if not tensors:
        what = "no moving average; leave out --ema" if average else f"no network ({_kind(content)})"
        raise WeightsError(f"{path}: holds {what}")
    tensors = _without_prefix(path, tensors)
    known = _names(content, tensors)
    return Weights(path, tensors, known, not average and _find(content, AVERAGE) is not None)


def with_names(weights: Weights, names: tuple[str, ...]) -> Weights:
    """The same weights with these class names, in the order of the network's rows.

    Raises:
        WeightsError: the network has another number of classes.
    """
    if weights.known.number != len(names):
        raise WeightsError(
            f"{weights.path}: the network has {weights.known.number:,} classes, the list names "
            f"{len(names):,}; name each class once"
        )
    return replace(weights, names=names)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(path)
    except Exception as error:  # of a header by anybody
        raise WeightsError(
            f"{path}: is damaged or cut short ({_first_line(error)}); copy it anew"
        ) from None
    return found


def _torch(path: Path, start: bytes) -> Any:
    """What `torch.save` wrote."""
    if reason := _no_weights(start):
        raise WeightsError(f"{path}: {reason}")
    try:
        with (
            path.open("rb") as file,  # of a path, torch goes by the suffix
            torch.serialization.safe_globals(_harmless()),
            warnings.catch_warnings(action="ignore"),
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises of every kind
        # Its own message advises to load the file unsafely: that must not reach a user.
        reason = _unsafe(path, error) or "is damaged or no file of weights; copy it anew"
        raise WeightsError(f"{path}: {reason}") from None


def _no_weights(start: bytes) -> str:
    """What a file is that begins like this, if it is one that people take for weights."""
    if not start:
        return "is empty; copy it anew"
    if start.startswith(b"version h"):
        return "is a pointer of Git LFS, not the weights; fetch them with git lfs pull"
    if start.lstrip().startswith(b"<"):
        return "is a web page, not weights; download the file itself"
    return ""


def _unsafe(path: Path, error: Exception) -> str:
    """Why torch's safe reader refuses a file, if it is for what the file holds."""
    if "TorchScript" in str(error):
        return (
            "is a TorchScript program; where it was made, save the network's state_dict() instead"
        )
    kinds = set(re.findall(r"GLOBAL (\S+)", str(error)))  # the first that it met
    if not kinds:
        return ""
    with contextlib.suppress(Exception):  # all of them; only of today's format
        kinds |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - _harmless_names()
    return (
        f"holds Python objects ({_some(sorted(kinds))}) beside tensors, and loading those could "
        "run any program\nwhere it was made, save the tensors alone: "
        'torch.save(model.state_dict(), "weights.pth")'
    )


@cache
def _harmless() -> list[Any]:
    """Kinds of object that hold values alone: a script's arguments, paths, NumPy's values."""
    numbers = [kind for name, kind in vars(np.dtypes).items() if name.endswith("DType")]
    makers = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
    # Under the names of NumPy 1 and 2, whichever is here.
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
    """The tensors under the first of these keys, at the top or one level below."""
    if not isinstance(content, Mapping):
        return None
    for key in keys:
        inner = content.get(key)
        if isinstance(inner, Mapping) and (found := _find(inner, NETWORK) or _tensors(inner)):
            return found
    return None


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, but for those that tools leave in it."""
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
    """Names as the network itself has them: wrappers put `module.` and the like before them."""
    anchor = "features.0.0.weight"  # the first tensor of a network of ours
    prefixes = [name.removesuffix(anchor) for name in tensors if name.endswith(anchor)]
    if len(prefixes) > 1:
        raise WeightsError(
            f"{path}: holds {len(prefixes)} networks, under {_some(prefixes)}; save the one to use "
            "alone"
        )
    if not prefixes or not prefixes[0]:
        return tensors
    return {name.removeprefix(prefixes[0]): value for name, value in tensors.items()}


def _names(content: Any, tensors: Mapping[str, Tensor]) -> tuple[str, ...] | None:
    """The class names that a file gives beside its tensors, if there is one for each row."""
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
        rule: maps the rows of the last layer by class; rows without a class keep what the network
            has there. Without a rule, the last layer must have the network's shape.
    Returns:
        What a person should know of the classes; empty where there is nothing.
    Raises:
        WeightsError: they are of another network.
        ClassError: as the rule says.
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
    """Compares names and shapes; `module` may lie on the device "meta".

    Args:
        any_classes: the numbers of classes may differ, and the last layer may be left out.
    Raises:
        WeightsError: they are of another network.
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
    """The tensors, and the network's own counts of batches where old versions of torch had none."""
    return {name: value for name, value in own.items() if name.endswith(COUNTS)} | dict(tensors)


def _last_layer(own: Mapping[str, Tensor]) -> set[str]:
    return {name for name in own if name.rpartition(".")[0] == LAST_LAYER}


def _take_rows(source: Tensor | None, own: Tensor, rows: Sequence[int | None]) -> Tensor:
    """The rows `(C, ...)` of the network's own tensor, replaced where `source` has one for them."""
    taken = own.detach().clone()
    pairs = [(place, row) for place, row in enumerate(rows) if row is not None]
    if source is not None and pairs:
        places, found = (
            torch.tensor(column, device=own.device) for column in zip(*pairs, strict=True)
        )
        taken[places] = source.to(taken)[found]
    return taken


def _faults(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], last: set[str]
) -> Iterator[str]:
    """What keeps tensors from being loaded: counts, and the first names."""
    missing = [name for name in own if name not in tensors and name not in last]
    if missing:
        yield f"{len(missing)} of its {len(own)} tensors are missing ({_some(missing)})"
    foreign = [name for name in tensors if name not in own]
    if foreign:
        yield f"{len(foreign)} tensors are not the network's ({_some(foreign)})"
    others = _of_another_size(tensors, own, last)
    if others:
        first = others[0]
        found, wanted = tuple(tensors[first].shape), tuple(own[first].shape)
        yield f"{len(others)} have another size ({first}: {found} instead of {wanted})"


def _of_another_size(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], last: set[str]
) -> list[str]:
    """Names of the tensors whose shapes differ; in the last layer the rows may."""
    return [
        name
        for name, wanted in own.items()
        if name in tensors
        and (
            tensors[name].ndim != wanted.ndim
            or tensors[name].shape[name in last :] != wanted.shape[name in last :]
        )
    ]


def _advice(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What the weights are of, and what to do."""
    rows = len(tensors.get(f"{LAST_LAYER}.weight", ()))
    shapes = {n: t.shape for n, t in tensors.items() if not n.startswith(LAST_LAYER)}
    if all(n in own and own[n].shape == shape for n, shape in shapes.items()):
        return (
            "\na network of other classes can start from them in a new run: --set "
            "model.weights=..., with another log.run_dir"
        )
    for arch, width in itertools.product(ARCHS, WIDTHS):
        with torch.device("meta"):
            network = build_model(arch, width, max(rows, 1), 0.0).state_dict()
        if all(n in network and network[n].shape == shape for n, shape in shapes.items()):
            return (
                f"\nthey are of MobileNetV3-{arch.capitalize()} {width:g} with {rows:,} classes: a "
                f'recipe for it says [model] arch = "{arch}", width = {width:g}'
            )
    return (
        "\nonly weights of fasttrain and of github.com/d-li14/mobilenetv3.pytorch fit; torchvision "
        "and timm build their networks otherwise"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
