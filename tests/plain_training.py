"""A plain training script: the reference for the accuracy and the time of fasttrain.

It is what a short script of PyTorch looks like: torchvision's ImageFolder and transforms, a
DataLoader, SGD and one loop. Of fasttrain, it uses the recipe and the network alone.

    python tests/plain_training.py FOLDER recipes/demo.toml

FOLDER holds train/<class>/ and val/<class>/. The script prints one JSON line for each evaluation:
`epoch` from 0, `top1` and `top5` in percent, `loss` of the validation images, and `seconds` since
the start.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fasttrain import config
from fasttrain.model import build_model

KNOWN = {
    "data": "root crop_px crop_area crop_ratio flip eval_resize_px eval_crop_px threads",
    "model": "arch width dropout",
    "optim": "lr warmup_lr warmup_epochs final_lr momentum nesterov weight_decay",
    "train": "epochs eval_every_epochs global_batch_size label_smoothing precision seed "
    "cpu_threads",
    "distill": "",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def unknown_settings(recipe: config.Recipe) -> list[str]:
    """The settings of a recipe that are not the defaults, and that this script does not have."""
    found = ["train.precision"] if recipe.train.precision != "no" else []
    found += [] if isinstance(recipe.data.crop_px, int) else ["data.crop_px"]  # a schedule
    for section, keys in KNOWN.items():
        ours, default = getattr(recipe, section), getattr(config.Recipe(), section)
        for key in type(ours).model_fields:
            if key not in keys.split() and getattr(ours, key) != getattr(default, key):
                found.append(f"{section}.{key}")
    return found


def transforms(data: config.Data) -> tuple[v2.Compose, v2.Compose]:
    """What is done to an image for training and for validation."""
    assert isinstance(data.crop_px, int)
    ending = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    crop = v2.RandomResizedCrop(data.crop_px, data.crop_area, data.crop_ratio)
    train = [crop, v2.RandomHorizontalFlip(0.5 if data.flip else 0.0), *ending]
    val = [v2.Resize(data.eval_resize_px), v2.CenterCrop(data.eval_crop_px), *ending]
    return v2.Compose(train), v2.Compose(val)


def learning_rate(step: int, epoch_steps: int, recipe: config.Recipe) -> float:
    """A linear warm-up, then a cosine; `step` counts updates from 0."""
    optim, warmup = recipe.optim, round(recipe.optim.warmup_epochs * epoch_steps)
    if step < warmup:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup
    progress = (step - warmup) / (recipe.train.epochs * epoch_steps - warmup)
    return optim.final_lr + (optim.lr - optim.final_lr) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def evaluate(model: nn.Module, batches: DataLoader[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Top-1 and top-5 in percent, and the mean cross-entropy, of all validation images."""
    model.eval()
    first = five = loss = seen = 0.0
    for images, labels in batches:
        logits = model(images.to(memory_format=torch.channels_last))
        hits = logits.topk(5, 1).indices == labels[:, None]
        first += hits[:, 0].sum().item()
        five += hits.sum().item()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        seen += len(labels)
    model.train()
    return {"top1": 100 * first / seen, "top5": 100 * five / seen, "loss": loss / seen}


def train(folder: Path, recipe: config.Recipe, workers: int) -> None:
    """Trains as the recipe says, and prints a line after each evaluation."""
    start = time.perf_counter()
    torch.manual_seed(recipe.train.seed)
    if recipe.train.cpu_threads:
        torch.set_num_threads(recipe.train.cpu_threads)
    for_train, for_val = transforms(recipe.data)
    train_set = ImageFolder(str(folder / "train"), for_train)
    val_set = ImageFolder(str(folder / "val"), for_val)
    batch = recipe.train.global_batch_size
    loader = DataLoader(
        train_set, batch, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    val_loader = DataLoader(val_set, batch, num_workers=workers)

    model = build_model(
        recipe.model.arch, recipe.model.width, len(train_set.classes), recipe.model.dropout
    ).to(memory_format=torch.channels_last)
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in model.parameters() if p.ndim > 1],
            "weight_decay": recipe.optim.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.ndim <= 1]},  # biases and BatchNorm
    ]
    optimizer = torch.optim.SGD(
        groups, momentum=recipe.optim.momentum, nesterov=recipe.optim.nesterov
    )
    step = 0
    for epoch in range(recipe.train.epochs):
        for images, labels in loader:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(loader), recipe)
            logits = model(images.to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.train.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        done = epoch + 1
        if done % recipe.train.eval_every_epochs and done < recipe.train.epochs:
            continue
        result = evaluate(model, val_loader)
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps({"epoch": epoch, **result, "seconds": seconds}), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="the ImageFolder")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    args = parser.parse_args(argv)
    recipe = config.load(args.recipe, args.set)
    if unknown := unknown_settings(recipe):
        parser.error(f"this script does not have the settings {', '.join(unknown)}")
    train(args.folder, recipe, args.workers)


if __name__ == "__main__":
    main()
