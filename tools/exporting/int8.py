"""Quantises a network to 8-bit integers, and measures what this costs in accuracy.

torchao's PT2E quantisation: weights per channel, activations per tensor with ranges that
calibration images give.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporting.forms import program_of, quiet
from fasttrain import batch, config, display, loaders, matching, metrics, runtime, shards, trained
from fasttrain.description import Description
from fasttrain.faults import ConfigError
from fasttrain.matching import Known

BATCH = 16  # images in a batch of calibration or evaluation

Logits = Callable[[Tensor], Tensor]


def on_cpu(root: Path, described: Description) -> tuple[config.Data, batch.Placement]:
    """How a data set's images are read and placed for a network on the CPU."""
    data = trained.recipe_of(described).data.model_copy(update={"root": root, "decode": "cpu"})
    return data, batch.Placement(torch.device("cpu"), False, runtime.data_threads(data, {}))


class Images:
    """Images of a data set with the pixels of an evaluation, and their labels."""

    def __init__(self, root: Path, described: Description) -> None:
        """
        Raises:
            Fault: there is no such data set, or the network lacks classes of it.
        """
        shards.check_unchanged(root)
        self.described = described
        self.data, self.place = on_cpu(root, described)
        self.train, self.val = (shards.open_split(root, name) for name in shards.SPLITS)
        known = Known(described.num_classes, described.classes)
        self.rows = matching.to_evaluate(known, self.val.classes).rows

    def for_calibration(self, number: int) -> list[Tensor]:
        """Batches of at least `number` training images, from the whole split."""
        batches = loaders.spread_batches(self.train, self.data, BATCH, number, self.place)
        return [made.images.contiguous().clone() for made in batches]

    def accuracies(self, networks: Sequence[Logits]) -> list[dict[str, Any]]:
        """`top1`, `top5`, `loss` and `seen` of each network on the validation images."""
        sums = [metrics.EvalSums(torch.device("cpu")) for _ in networks]
        with display.progress(self.val.num_samples, "evaluating") as advance, torch.no_grad():
            for made in loaders.eval_loader(self.val, self.data, BATCH, 0, 1, self.place):
                images = made.images.contiguous()
                for logits, total in zip(networks, sums, strict=True):
                    total.add(logits(images)[:, self.rows], made.labels)
                advance(len(images), 0)
        return [total.result() for total in sums]


def quantised(
    network: nn.Module, described: Description, images: Sequence[Tensor], form: str
) -> nn.Module:
    """The network with 8-bit weights and activations.

    Args:
        images: batches to calibrate on.
        form: the suffix of the file to write. It decides which operations are quantised.
    Raises:
        ConfigError: there are no images.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    if not images:
        raise ConfigError("--int8: the data set has no training images to calibrate on")
    batches = form != ".pte"
    with quiet(), torch.no_grad():
        program: Any = program_of(network, described, batches).module()
        prepared = prepare_pt2e(program, _quantizer(form))
        for some in images:
            for part in [some] if batches else some.split(1):
                prepared(part)
        return _without_unused(convert_pt2e(prepared))


def _quantizer(form: str) -> Any:
    """torchao's rule for the operations of a form's runtime."""
    if form == ".pte":
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack

        symmetric = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
        return xnnpack.XNNPACKQuantizer().set_global(symmetric)
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())


def _without_unused(program: Any) -> nn.Module:
    """Removes the float weights, which the program no longer reads, so that files are small."""
    used = {node.target for node in program.graph.nodes if node.op == "get_attr"}
    for name, _ in [*program.named_parameters(), *program.named_buffers()]:
        if name not in used:
            owner, _, own = name.rpartition(".")
            delattr(program.get_submodule(owner), own)
    return program
