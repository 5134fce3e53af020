"""MixUp and CutMix, which mix the images and labels of a micro-batch in pairs, on the device."""

from collections.abc import Callable

from torch import Tensor

from fasttrain import config, determinism
from fasttrain.rng import Stream

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def build_mix(train: config.Train, num_classes: int, taught: bool = False) -> Mix | None:
    """Builds the function that mixes a micro-batch.

    It mixes each image with the previous one, with one weight for the whole micro-batch. It draws
    from torch's generator on the CPU. So the result does not depend on the device, and the host
    does not wait for the device.

    Args:
        taught: the labels are those of `distilling.join`, float32 `(B, 2 C)`, and stay so.
    Returns:
        A function of images `(B, 3, S, S)` and labels int64 `(B,)`. It returns the mixed images and
        the labels as probabilities, float32 `(B, C)`. None if the settings ask for neither method.

    Source: mixup, arXiv:1710.09412; CutMix, arXiv:1905.04899.
    """
    if not (train.mixup_alpha or train.cutmix_alpha):
        return None
    from torchvision.transforms import v2  # takes seconds to import

    chosen = []
    num_classes *= 2 if taught else 1
    if train.mixup_alpha:
        chosen.append(v2.MixUp(alpha=train.mixup_alpha, num_classes=num_classes))
    if train.cutmix_alpha:
        chosen.append(v2.CutMix(alpha=train.cutmix_alpha, num_classes=num_classes))
    mix: Mix = v2.RandomChoice(chosen)
    return mix


def mix_at(
    mix: Mix, images: Tensor, labels: Tensor, place: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Mixes a micro-batch of a run, in the way that its place in the run decides.

    Args:
        place: the seed of the run, the update, and the micro-batch's index in the global batch.
    """
    seed, step, group = place
    determinism.seed_torch(seed, Stream.MIX, step, group)
    return mix(images, labels)
