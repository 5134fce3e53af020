"""Chooses the fastest decoder that works on this GPU, by trials before the run.

A decoder that crashes ends its process, so a fresh interpreter tries each strategy. It uses the
split's real images and the run's batch size, precision and threads, and compares the pixels with
the CPU's. On each node, the first process tries; the others wait and read its results. Later runs
reuse the results of the strategies that worked.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fasttrain import config, decoder, files, launch, measured, reading
from fasttrain.decoder import Decoder
from fasttrain.faults import Fault
from fasttrain.shards import Split
from fasttrain.trials import fastest

if TYPE_CHECKING:
    from torch import Tensor

    from fasttrain.batch import Placement

STRATEGIES = ("gpu_window", "gpu_full", "cpu")
TIMEOUT_S = 180  # for one strategy
LOADS_S = 20.0  # for one strategy; after this time, no further `hw_decoder_load` is tried
MEASURED_S = 2.0  # for one measurement of speed
CHECKED = 2  # batches whose pixels are compared with the CPU's
# Limits for the difference from the CPU's pixels, in steps of 1/255, as a mean over an image. GPUs
# round differently. Unless `jpeg_fancy_upsampling` is set, they also repeat colours between pixels.
# Over 197 photographs of ImageNet, that alone makes 0.9 on average and 6.2 in the worst image
# (computed with Pillow). A wrong photograph makes 50 or more.
MEAN_TOLERANCE = 4.0  # for the mean over all images
IMAGE_TOLERANCE = 12.0  # for a single image


class DecodeError(Fault, RuntimeError):
    """No strategy can decode here, or the recipe's strategy cannot."""

    raised_on_every_rank = True


class Job(NamedTuple):
    """What a process of the run needs from its decoder."""

    gpu: bool  # images are made on a GPU
    threads: int  # CPU threads
    batch_size: int  # images in a micro-batch
    half: bool  # images are float16, not float32


@dataclass(frozen=True, slots=True)
class DecoderTrial:
    """The result of trying one strategy."""

    strategy: str
    images_per_s: float  # 0 if it failed
    difference: float  # mean difference from the CPU's pixels, in steps of 1/255
    fault: str = ""
    load: float | None = None  # the fastest `hw_decoder_load`, if the GPU decodes

    def __str__(self) -> str:
        if self.fault:
            return f"{self.strategy}: {self.fault}"
        load = "" if self.load is None else f" with hw_decoder_load {self.load:g}"
        return (
            f"{self.strategy}: {self.images_per_s:,.0f} images/s{load}, "
            f"{self.difference:.2f}/255 from the CPU's pixels"
        )


def choose_decoder(
    split: Split,
    data: config.Data,
    job: Job,
    environ: Mapping[str, str],
    attempt: Callable[[str], DecoderTrial] | None = None,
) -> tuple[Decoder, str]:
    """Chooses the decoder of a run. Returns it with one sentence that gives the reason.

    This process itself does not use the GPU.

    Args:
        attempt: tries one strategy; by default in a fresh interpreter.
    Raises:
        DecodeError: the recipe needs a GPU and there is none, or no strategy works.
    """
    named = decoder.as_recipe_says(data)
    if split.store == "raw":
        return named, "decode: nothing to decode, the shards hold pixels"
    if not job.gpu:
        if data.decode.startswith("gpu"):
            raise DecodeError(
                f"[data] decode = {data.decode}: this process has no GPU; use cpu or auto"
            )
        return replace(named, strategy="cpu"), "decode: cpu, because there is no GPU"
    if data.decode != "auto":
        return named, f"decode: {data.decode}, as the recipe says"

    def trial(strategy: str) -> DecoderTrial:
        return try_in_a_process(split, data, strategy, job, environ)

    tried = _trials_of_this_node(split, data, job, attempt or trial)
    best = fastest(tried)
    if best is None:
        faults = "\n  ".join(str(trial) for trial in tried)
        raise DecodeError(f"[data] decode = auto: no way of decoding works here:\n  {faults}")
    load = named.load if best.load is None else best.load
    why = f"decode: {best.strategy} ({'; '.join(str(trial) for trial in tried)})"
    return Decoder(best.strategy, load), why


def _trials_of_this_node(
    split: Split, data: config.Data, job: Job, attempt: Callable[[str], DecoderTrial]
) -> list[DecoderTrial]:
    """The trials of all strategies: stored ones, and new ones by one process per node."""
    gpu, versions = _gpu(), _versions()
    settings = (
        data.crop_px, data.scales_px, data.interpolation, data.hw_decoder_load,
        data.jpeg_fancy_upsampling, data.augment, data.color_jitter, data.erase, data.queue_depth,
    )  # fmt: skip
    key = measured.key_of("decode", gpu, versions, split.digest, settings, job)
    lock = Path(tempfile.gettempdir()) / f"fasttrain-{os.getuid()}-{key}.lock"
    with files.locked(lock):
        known = measured.recall(key) if gpu else None
        trials = {found["strategy"]: DecoderTrial(**found) for found in known or ()}
        tried = [trials.get(strategy) or attempt(strategy) for strategy in STRATEGIES]
        # The next run tries failed strategies again: another process may have held the memory.
        measured.remember(key, [asdict(trial) for trial in tried if not trial.fault])
        return tried


def _gpu() -> str:
    """Names and driver version of the GPUs, without using them; empty if nvidia-smi fails."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _versions() -> dict[str, str]:
    names = [d.name for d in metadata.distributions() if d.name.startswith("nvidia-")]
    return {n: metadata.version(n) for n in sorted(names) if "dali" in n or "nvimgcodec" in n}


def try_in_a_process(
    split: Split, data: config.Data, strategy: str, job: Job, environ: Mapping[str, str]
) -> DecoderTrial:
    """Tries one strategy in a fresh interpreter."""
    where = [str(split.root), split.name]
    command = [sys.executable, "-m", "fasttrain.decoding", strategy, *where, json.dumps(job)]
    try:
        done = subprocess.run(
            [*command, data.model_dump_json()],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=launch.without_launcher(environ),
        )
    except subprocess.TimeoutExpired:
        return DecoderTrial(strategy, 0.0, 0.0, f"no answer in {TIMEOUT_S} s")
    if done.returncode < 0:
        return DecoderTrial(strategy, 0.0, 0.0, f"crashed with signal {-done.returncode}")
    last = (done.stdout if not done.returncode else done.stderr).strip().splitlines()[-1:]
    if done.returncode or not last:
        reason = last[0] if last else "no message"
        return DecoderTrial(strategy, 0.0, 0.0, f"failed: {reason}"[:300])
    return DecoderTrial(**json.loads(last[0]))


# --------------------------------------------------------------------------------------------------
# In the fresh interpreter
# --------------------------------------------------------------------------------------------------


def verdict(differences: Sequence[float]) -> str:
    """Describes the fault of decoded pixels; empty if they are right.

    Args:
        differences: each image's mean difference from the CPU's pixels, in steps of 1/255.
    """
    mean, worst = sum(differences) / len(differences), max(differences)
    if mean <= MEAN_TOLERANCE and worst <= IMAGE_TOLERANCE:
        return ""
    many = sum(difference > IMAGE_TOLERANCE for difference in differences)
    return (
        f"wrong pixels: {mean:.1f}/255 from the CPU's on average over {len(differences)} images, "
        f"{worst:.1f} in the worst, more than {IMAGE_TOLERANCE:g} in {many}"
    )


def differences_of(ours: "Tensor", theirs: "Tensor") -> list[float]:
    """Each image's mean difference between two normalised batches `(B, 3, S, S)`.

    The unit is a step of 1/255. NaN in a batch makes the difference infinite.
    """
    import torch

    from fasttrain import resize

    std = 255 * torch.tensor(resize.STD).view(1, 3, 1, 1)
    far = ((ours.float().cpu() - theirs.float().cpu()) * std).abs().mean((1, 2, 3))
    return [float(each) for each in far.nan_to_num(nan=float("inf"))]


def loads_to_try(settings: config.Data, threads: int) -> list[float]:
    """The recipe's `hw_decoder_load`; for `auto` the estimate, half of it and twice as much."""
    load = decoder.as_recipe_says(settings).load_for(threads)
    if settings.hw_decoder_load != "auto":
        return [load]
    return [load, round(load / 2, 2), min(0.9, round(2 * load, 2))]


def fastest_load(loads: Sequence[float], rate_of: Callable[[float], float]) -> tuple[float, float]:
    """The load with the most images/s, and that speed.

    The first load is always tried. The others are tried only until `LOADS_S` have passed.
    """
    end = time.monotonic() + LOADS_S
    found: list[tuple[float, float]] = []
    for load in loads:
        if found and time.monotonic() > end:
            break
        found.append((rate_of(load), load))
    rate, load = max(found)
    return load, rate


def try_here(split: Split, settings: config.Data, job: Job, placement: "Placement") -> DecoderTrial:
    """Tries the decoder of `placement` in this process. A bad decoder may crash the process."""
    import torch

    from fasttrain import loaders, schedule
    from fasttrain.batch import Placement

    batch_size = min(job.batch_size, split.num_samples)
    train = config.Train(global_batch_size=batch_size, epochs=1000)
    plan = schedule.make_plan(train, config.Optim(), split.num_samples, 1)
    assert placement.decoder
    strategy = placement.decoder.strategy
    on_cpu = Placement(torch.device("cpu"), False, job.threads, Decoder("cpu"))
    # Augmented images would differ more: the operations round differently on a GPU.
    plain: dict[str, Any] = {"augment": "none", "color_jitter": (0, 0, 0, 0), "erase": 0.0}
    unchanged = settings.model_copy(update=plain)
    pair = [
        loaders.train_batches(split, unchanged, plan, 0, where, 0) for where in (placement, on_cpu)
    ]
    differences: list[float] = []
    for _ in range(CHECKED):
        found, expected = map(next, pair)
        differences += differences_of(found.images, expected.images)
    for batches in pair:
        batches.close()  # type: ignore[attr-defined]
    mean = sum(differences) / len(differences)
    if fault := verdict(differences):
        return DecoderTrial(strategy, 0.0, mean, fault)

    def rate_of(load: float) -> float:
        loaded = placement._replace(decoder=Decoder(strategy, load))
        return loaders.measure(split, settings, plan, 0, loaded, seconds=MEASURED_S)[0]

    on_gpu = strategy.startswith("gpu") and placement.device.type == "cuda"
    loads = loads_to_try(settings, job.threads) if on_gpu else [0.0]
    load, rate = fastest_load(loads, rate_of)
    return DecoderTrial(strategy, rate, mean, load=load if on_gpu else None)


def _main(argv: list[str]) -> None:
    """The program of the fresh interpreter.

    Args:
        argv: the strategy, the data set's folder, the split's name, the job and the recipe's
            section [data], both as JSON.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash would dump gigabytes of core
    import torch

    from fasttrain import shards
    from fasttrain.batch import Placement

    reading.raise_file_limit()
    strategy, root, name, job_text, data_text = argv
    job, data = Job(*json.loads(job_text)), config.Data.model_validate_json(data_text)
    device = torch.device("cuda", 0) if job.gpu else torch.device("cpu")
    chosen = replace(decoder.as_recipe_says(data), strategy=strategy)
    placement = Placement(device, job.half, job.threads, chosen)
    trial = try_here(shards.open_split(Path(root), name), data, job, placement)
    sys.stdout.write(json.dumps(asdict(trial)) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
