"""Precise BN: measures BatchNorm's statistics anew, on training images, with the final weights.

In training they are moving averages over the last batches, while the weights still changed. See
"Rethinking 'Batch' in BatchNorm" (arXiv:2105.07576), section 3.
"""

from collections.abc import Iterator
from contextlib import nullcontext

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fasttrain import config, display, loaders, shards
from fasttrain.batch import Placement

BATCH = 128  # images whose statistics are averaged


def measure(
    network: nn.Module,
    split: shards.Split,
    data: config.Data,
    placement: Placement,
    number: int,
    show: bool = True,
) -> int:
    """Replaces the statistics of each BatchNorm by their means over batches of training images.

    The images have the size and the centre crop of the evaluation.

    Args:
        network: on the placement's device, without dropout. Its weights stay as they are.
        split: the training images.
        data: the size of the evaluation's images, and how they are decoded.
        number: how many images to use, rounded up to whole batches; at most the whole split.
        show: show the progress on standard error.
    Returns:
        The number of images that were used.
    """
    number = min(number, split.num_samples)
    batch = min(BATCH, number)
    used = 0

    def images() -> Iterator[Tensor]:
        nonlocal used
        shown = display.progress(number, "measuring BatchNorm's statistics")
        with shown if show else nullcontext(lambda *_: None) as advance:
            for made in loaders.spread_batches(split, data, batch, number, placement):
                if len(made.images) < batch:  # its mean would count as much as that of a whole one
                    continue
                yield made.images
                used += batch
                advance(batch, 0)

    update_bn(images(), network)
    return used
