"""Writes a trained network in each form. The bytes of a form go to a new file."""

import collections
import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from fasttrain import description
from fasttrain.description import Description

Write = Callable[[nn.Module, Description, Path], None]  # network, its description, the new file


def safetensors_file(network: nn.Module, described: Description, path: Path) -> None:
    """The tensors, and the description in the file's metadata."""
    path.write_bytes(safetensors_bytes(network, described))


def safetensors_bytes(network: nn.Module, described: Description) -> bytes:
    """The contents of a file of safetensors."""
    metadata = {"format": "pt", description.KEY: described.model_dump_json()}
    return safetensors.torch.save(network.state_dict(), metadata)


def pth_file(network: nn.Module, described: Description, path: Path) -> None:
    """A bare state dict under the published names, as d-li14/mobilenetv3.pytorch has it.

    The description is an attribute of the dict. So scripts see the tensors alone.
    """
    state = collections.OrderedDict(network.state_dict())
    setattr(state, description.KEY, described.model_dump_json())
    torch.save(state, path)


def onnx_file(network: nn.Module, described: Description, path: Path) -> None:
    """An ONNX model for batches of any size."""
    with quiet():
        program = torch.onnx.export(
            program_of(network, described),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[description.KEY] = described.model_dump_json()
    program.save(path, external_data=False)


def pt2_file(network: nn.Module, described: Description, path: Path) -> None:
    """A program of torch.export for batches of any size."""
    with quiet():
        program = program_of(network, described)
        extra = {description.KEY: described.model_dump_json()}
        torch.export.save(program, path, extra_files=extra)


def pte_file(network: nn.Module, described: Description, path: Path) -> None:
    """A program of ExecuTorch for one image. XNNPACK carries its layers out.

    The memory of a program is planned for its largest batch, and phones classify single images.
    """
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(
            program_of(network, described, batches=False),
            partitioner=[XnnpackPartitioner()],
            constant_methods={description.KEY: described.model_dump_json()},
        ).to_executorch()
    path.write_bytes(lowered.buffer)


FORMS: dict[str, Write] = {
    ".safetensors": safetensors_file,
    ".pth": pth_file,
    ".onnx": onnx_file,
    ".pt2": pt2_file,
    ".pte": pte_file,
}


def program_of(
    network: nn.Module, described: Description, batches: bool = True
) -> torch.export.ExportedProgram:
    """The network as a program of torch.export.

    Args:
        batches: for batches of any size; otherwise for one image.
    """
    px = described.preprocessing.crop_px
    images = torch.zeros(2 if batches else 1, 3, px, px)  # a batch of 1 would fix the size at 1
    shapes = ({0: torch.export.Dim("batch", min=1)},) if batches else None
    return torch.export.export(network, (images,), dynamic_shapes=shapes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporters' warnings and progress from the user. Errors still appear."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
