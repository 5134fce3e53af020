"""Compares the speeds of input and updates, and names what limits a run. Needs no torch."""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttrain import config, measured
from fasttrain.shards import Split

STALLED = 0.03  # if updates wait for data in this fraction of the time, the input may be the limit
HEADROOM = 1.2  # the input should be faster than the updates by this factor, because both vary
LONG_S = 20.0  # an epoch's speed is kept for later runs if the epoch took at least so long
FRESH_S = 30 * 86_400.0  # a kept speed that is older is measured again


@dataclass(slots=True)
class Stages:
    """How a loader's thread spent its time, in seconds, and how many images it made."""

    storage_s: float = 0.0  # waiting for bytes
    decode_s: float = 0.0  # waiting for pixels
    full_s: float = 0.0  # waiting because its queue of batches was full
    thread_s: float = 0.0  # CPU time of the thread, partly while it holds the interpreter's lock
    images: int = 0

    def since(self, previous: "Stages") -> "Stages":
        """Returns what was added since `previous`."""
        return Stages(*(getattr(self, name) - getattr(previous, name) for name in self.__slots__))


class Rate(NamedTuple):
    """A speed in images/s, and when it was measured."""

    images_per_s: float
    measured_at: float | None = None  # seconds since 1970; None if measured in this run

    def when(self) -> str:
        if self.measured_at is None:
            return "measured now"
        return f"measured {_age(time.time() - self.measured_at)} ago"


def _age(seconds: float) -> str:
    """`5 minutes`, `3 hours` or `12 days`."""
    for name, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        number = round(seconds / length)
        if number:
            return f"{number} {name}{'s' if number > 1 else ''}"
    return "less than a minute"


@dataclass(slots=True)
class Forecast:
    """Compares the speed of the input with that of the updates, and prints the result.

    It compares at the start if an earlier run has measured the updates, else after the first
    updates of this run. It also prints what limited an epoch if that has changed. Only the speeds
    of whole epochs are kept for later runs, because the first updates may be disturbed.
    """

    input: Rate  # of all ranks together
    step: Rate | None  # of the updates without waits for data; None if no run has measured it
    stages: Stages
    advice: Mapping[str, str]  # how to raise the input's rate, by the stage that limits it
    say: Callable[[str], None]
    remember: Callable[[str, float], None]  # keeps images/s of "input" or "step" for later runs
    limit: str | None = None  # of the last epoch
    previous: Stages = field(default_factory=Stages)  # at the end of the last epoch

    def start(self, about: str) -> None:
        """Prints the speed of the input. `about` describes the shards and the decoder."""
        speed = f"{self.input.images_per_s:,.0f} images/s, {self.input.when()}"
        self.say(f"input: {speed}, from {about}")
        if self.step:
            self._compare(self.step)

    def lap(self, images_per_s: float, data_wait: float) -> None:
        """Compares after the first updates, if no earlier run has measured them.

        Args:
            images_per_s: speed of the updates, waits included; 0 if it is not known yet.
            data_wait: fraction of the time that they waited for data.
        """
        if self.step or images_per_s == 0:
            return
        self.step = Rate(images_per_s / (1 - min(data_wait, 0.99)))
        self._compare(self.step)

    def _compare(self, step: Rate) -> None:
        input_rate, step_rate = self.input.images_per_s, step.images_per_s
        if input_rate >= HEADROOM * step_rate:
            verdict = f"the input is {input_rate / step_rate:.1f} times faster"
        else:
            verdict = f"the input is the limit, or close to it; {self.advice['decode']}"
        self.say(f"updates: {step_rate:,.0f} images/s, {step.when()}: {verdict}")

    def epoch(self, epoch: int, images_per_s: float, data_wait: float) -> dict[str, Any]:
        """Finds what limited an epoch, and prints it if it changed.

        Args:
            epoch: from 0.
            images_per_s: speed of the epoch; 0 if no update of it was timed.
            data_wait: fraction of its time spent waiting for data.
        Returns:
            The fields of a `limit` record; those of `loader` are fractions of the loader's time.
        """
        spent = self.stages.since(self.previous)
        self.previous = replace(self.stages)
        loader_s = spent.storage_s + spent.decode_s + spent.full_s
        total = max(loader_s, 1e-9)
        limit = "compute"
        # If the queue is mostly full, the loader is not the limit, even if updates waited.
        if data_wait >= STALLED and spent.full_s < total / 2:
            limit = "storage" if spent.storage_s > spent.decode_s else "decode"
        if limit != self.limit and images_per_s:
            remedy = f"; {self.advice[limit]}" if limit in self.advice else ""
            self.say(
                f"epoch {epoch + 1}: {limit} is the limit: {images_per_s:,.0f} images/s, "
                f"{data_wait:.0%} of the time spent waiting for data{remedy}"
            )
            self.limit = limit
        if loader_s >= LONG_S and images_per_s:
            self.remember("step", images_per_s / (1 - min(data_wait, 0.99)))
            if limit != "compute" or images_per_s > self.input.images_per_s:
                self.remember("input", images_per_s)
        return {
            "limit": limit,
            "images_per_s": round(images_per_s, 1),
            "data_wait": round(data_wait, 4),
            "loader": {
                "storage": round(spent.storage_s / total, 4),
                "decode": round(spent.decode_s / total, 4),
                "idle": round(spent.full_s / total, 4),
                "thread_us_per_image": round(1e6 * spent.thread_s / max(spent.images, 1), 1),
            },
        }


def describe(split: Split, decode: str, threads: int, world_size: int) -> str:
    """Describes the input: `these shards (JPEG, 112 KB and 198,920 pixels an image), decoded on...`

    Args:
        decode: the strategy of `makers.decoder_of`.
        threads: the threads of each process that decode.
    """
    num_bytes = sum(split.shard_bytes)
    per_image = num_bytes / split.num_samples
    some = slice(None, None, max(1, split.num_samples // 10_000))  # about 10,000 samples suffice
    pixels = (split.width[some].astype(float) * split.height[some]).mean()
    kind = "pixels" if split.store == "raw" else "JPEG"
    where = {"cpu": "decoded on the CPU", "raw": "nothing to decode"}.get(decode, f"by {decode}")
    fits = num_bytes < 0.8 * available_bytes()
    memory = "fit into the free memory" if fits else "are more than the free memory"
    return (
        f"these shards ({kind}, {per_image / 1e3:,.0f} KB and {pixels:,.0f} pixels an image), "
        f"{where}, {world_size} x {threads} CPU threads; their {num_bytes / 1e6:,.0f} MB {memory}"
    )


def advice_for(split: Split, decode: str, threads: int) -> dict[str, str]:
    """Says how to raise the input's rate, by the stage that limits it ("decode", "storage")."""
    remedies = []
    if split.store == "jpeg":
        short = float((split.width[:10_000].clip(max=split.height[:10_000])).mean())
        if short > 300:
            remedies.append(
                "make_shards.py --short-side 256, which changes the training images (1.6 times as "
                "fast on the CPU that we measured), or --store raw with it (2.4 times)"
            )
        else:
            remedies.append(
                "make_shards.py --store raw (1.4 times as fast on the CPU that we measured)"
            )
    if not decode.startswith("gpu"):
        remedies.append(f"more than {threads} CPU cores per process")
    elif split.store == "jpeg":
        remedies.append(
            "raw shards: a GPU's JPEG decoders reach only several thousand images/s, raw shards "
            f"need none, and with --short-side 256 they take {raw_gb(split, 256):,.3g} GB"
        )
    return {
        "decode": f"to make the input faster: {'; '.join(remedies)}",
        "storage": "to make the input faster: a copy of the shards on a local disk or in /dev/shm, "
        'more data.read_threads and data.read_ahead, or data.shuffle = "blocks"',
    }


def raw_gb(split: Split, short_side: int) -> float:
    """Size in GB of a split as raw shards whose images are shrunk to `short_side` pixels."""
    some = slice(None, None, max(1, split.num_samples // 10_000))
    sizes = np.stack([split.width[some], split.height[some]]).astype(float)
    sizes *= np.minimum(1, short_side / sizes.min(0))
    return 3 * float(sizes.prod(0).mean()) * split.num_samples / 1e9


def available_bytes() -> int:
    """Memory in bytes that this machine can still use, including the page cache; 0 if unknown."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


# --------------------------------------------------------------------------------------------------
# What earlier runs measured
# --------------------------------------------------------------------------------------------------


def recall_rate(key: str) -> Rate | None:
    """Returns the rate kept under `key`; None if there is none, or it is older than `FRESH_S`."""
    kept = measured.recall(key)
    try:
        found = Rate(float(kept["images_per_s"]), float(kept["measured_at"]))
    except (TypeError, KeyError, ValueError):
        return None
    return found if time.time() - found.measured_at < FRESH_S else None  # type: ignore[operator]


def remember_rate(key: str, images_per_s: float) -> None:
    """Keeps a rate in images/s under `key`, with the current time."""
    measured.remember(key, {"images_per_s": images_per_s, "measured_at": time.time()})


def input_key(split: Split, data: config.Data, *more: Any) -> str:
    """The key of the input's speed: it depends on the shards, the settings and the machine.

    Args:
        more: JSON values on which the speed also depends.
    """
    settings = data.model_dump(mode="json", exclude={"root"})
    return measured.key_of("input", split.digest, settings, os.uname().nodename, *more)
