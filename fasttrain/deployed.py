"""Opens a trained network in any form for inference: PyTorch, ONNX, torch.export, ExecuTorch.

.onnx                   onnxruntime
.pt2                    a program of torch.export
.pte                    a program of ExecuTorch, for one image at a time
anything else           weights, which PyTorch's layers use: see `trained`
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain import config, description, trained
from fasttrain.description import Description
from fasttrain.faults import ConfigError, Fault

PTE_METHOD = "forward"
# The packages that a form needs, and the extra that installs them.
PACKAGES = {
    ".onnx": (("onnx", "onnxscript", "onnxruntime"), "export"),
    ".pte": (("executorch",), "executorch"),
    "int8": (("torchao",), "export"),
    "hub": (("huggingface_hub",), "export"),
}


class FormError(Fault, ValueError):
    """A file of an exported network cannot be used. The message says why, and what to do."""


class Deployed(NamedTuple):
    """A network that is ready for inference."""

    path: Path
    form: str  # `weights`, or the suffix of the file
    description: Description
    logits: Callable[[Tensor], Tensor]  # float32 (B, 3, S, S) to (B, num_classes), on the CPU


def need(what: str) -> None:
    """Checks that the packages for a key of `PACKAGES` are installed.

    Raises:
        ConfigError: one is missing.
    """
    packages, extra = PACKAGES.get(what, ((), ""))
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs {', '.join(missing)}, which is not installed here: "
            f"pip install -e '.[{extra}]'"
        )


def open_network(
    path: Path, average: bool, recipe: config.Recipe | None, say: Callable[[str], None]
) -> Deployed:
    """Opens a network for inference.

    Args:
        path: a file of any form, a run folder, a checkpoint or an exported folder.
        average: of weights, take the moving average where there is one.
        recipe: describes the network of weights that do not describe it.
        say: receives a line for each damaged checkpoint that is skipped.
    Raises:
        Fault: it cannot be opened, or nothing describes its classes and pixels.
    """
    read = {".onnx": _onnx, ".pt2": _pt2, ".pte": _pte}.get(path.suffix)
    if read is None or path.is_dir():
        found = trained.open_trained(path, average, recipe, say)
        network = trained.build(found)
        return Deployed(path, "weights", found.description, network)
    if not path.is_file():
        raise FormError(f"{path}: there is no such file")
    need(path.suffix)
    try:
        text, logits = read(path)
    except Fault:
        raise
    except Exception as error:  # the runtimes raise exceptions of many types
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise FormError(
            f"{path}: cannot be opened ({first}); export the network again or copy it again"
        ) from None
    if not text:
        raise FormError(
            f"{path}: does not say its classes and its preprocessing; export the network with "
            "tools/export.py"
        )
    return Deployed(path, path.suffix, description.parse(text, path), logits)


Read = tuple[str | None, Callable[[Tensor], Tensor]]  # the description's text, and the network


def _onnx(path: Path) -> Read:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    (name,) = [each.name for each in session.get_inputs()]

    def logits(images: Tensor) -> Tensor:
        (found,) = session.run(None, {name: images.numpy()})
        return torch.from_numpy(found)

    return session.get_modelmeta().custom_metadata_map.get(description.KEY), logits


def _pt2(path: Path) -> Read:
    # Defines the operators of quantised programs.
    from torch.ao.quantization.fx import _decomposed  # noqa: F401

    extra: dict[str, Any] = {description.KEY: ""}
    network = torch.export.load(path, extra_files=extra).module()
    return extra[description.KEY], torch.no_grad()(network)


def _pte(path: Path) -> Read:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    text = None
    if description.KEY in program.method_names:
        (text,) = program.load_method(description.KEY).execute([])
    method = program.load_method(PTE_METHOD)

    def logits(images: Tensor) -> Tensor:
        assert program  # the method uses its memory
        singles = images.contiguous().split(1)  # it misreads other layouts
        # A result lies in memory that the next call overwrites.
        return torch.cat([method.execute([image])[0].clone() for image in singles])

    return text, logits
