"""MixUp and CutMix: micro-batches whose images and labels are mixed in pairs, on the device."""

from collections.abc import Callable

from torch import Tensor

from fasttrain import config

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def build_mix(train: config.Train, num_classes: int) -> Mix | None:
    """Mixes images `(B, 3, S, S)` and labels `(B,)` int64; None where the settings ask for neither.

    Each image is mixed with the one before it, by one weight for the whole micro-batch; the labels
    become probabilities, float32 `(B, C)`. All is drawn from torch's generator on the CPU, so what
    is mixed does not depend on the device, and the host does not wait for it.

    Source: mixup, arXiv:1710.09412; CutMix, arXiv:1905.04899.
    """
    if not (train.mixup_alpha or train.cutmix_alpha):
        return None
    from torchvision.transforms import v2  # takes seconds to import

    chosen = []
    if train.mixup_alpha:
        chosen.append(v2.MixUp(alpha=train.mixup_alpha, num_classes=num_classes))
    if train.cutmix_alpha:
        chosen.append(v2.CutMix(alpha=train.cutmix_alpha, num_classes=num_classes))
    mix: Mix = v2.RandomChoice(chosen)
    return mix
