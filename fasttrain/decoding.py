"""Which way of decoding works on this GPU, and is the fastest: tried before the run.

A decoder that crashes takes its process along, so each strategy is tried by a fresh interpreter, on
real images of the split and against the pixels of the CPU. Once a node: the first process tries,
the others wait for it and read what it found; later runs remember it.
"""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from fasttrain import config, forecast
from fasttrain.shards import Split

STRATEGIES = ("gpu_window", "gpu_full", "cpu")
TIMEOUT_S = 120  # of one strategy
TOLERANCE = 4.0  # mean difference from the CPU's pixels, in steps of 1/255: GPUs round otherwise


class DecodeError(config.Fault, RuntimeError):
    """No strategy, or not the one that the recipe names, can decode here."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of trying one strategy."""

    strategy: str
    images_per_s: float  # 0 where it failed
    difference: float  # mean, from the CPU's pixels, in steps of 1/255
    fault: str = ""

    def __str__(self) -> str:
        if self.fault:
            return f"{self.strategy}: {self.fault}"
        return (
            f"{self.strategy}: {self.images_per_s:,.0f} images/s, "
            f"{self.difference:.2f}/255 from the CPU's pixels"
        )


def choose(
    split: Split,
    data: config.Data,
    gpu: bool,
    threads: int,
    environ: Mapping[str, str],
    attempt: Callable[[str], Trial] | None = None,
) -> tuple[str, str]:
    """The `data.decode` to use, and one sentence on why. Asks for no GPU in this process.

    Args:
        gpu: whether images are made on a GPU.
        threads: CPU threads of this process for decoding.
        attempt: tries one strategy; by default in a fresh interpreter.
    Raises:
        DecodeError: the recipe asks for a GPU that is not there, or nothing works.
    """
    if split.store == "raw":
        return data.decode, "decode: nothing to decode, the shards hold pixels"
    if not gpu:
        if data.decode.startswith("gpu"):
            raise DecodeError(
                f"[data] decode = {data.decode}: this process has no GPU; use cpu or auto"
            )
        return "cpu", "decode: cpu, as there is no GPU"
    if data.decode != "auto":
        return data.decode, f"decode: {data.decode}, as the recipe says"

    def trial(strategy: str) -> Trial:
        return try_in_a_process(split, data, strategy, threads, "cuda", environ)

    trials = _once_a_node(split, data, threads, attempt or trial)
    working = [trial for trial in trials if not trial.fault]
    if not working:
        faults = "\n  ".join(str(trial) for trial in trials)
        raise DecodeError(f"no way of decoding works here:\n  {faults}")
    best = max(working, key=lambda trial: trial.images_per_s)
    return best.strategy, f"decode: {best.strategy} ({'; '.join(str(trial) for trial in trials)})"


def agree(chosen: Sequence[str]) -> str:
    """The strategy for all processes of a run, of those that each of them chose: the surest."""
    return min(chosen, key=("cpu", "gpu_full", "gpu_window", "auto").index)


def _once_a_node(
    split: Split, data: config.Data, threads: int, attempt: Callable[[str], Trial]
) -> list[Trial]:
    gpu, versions = _gpu(), _versions()
    settings = (data.crop_px, data.interpolation, data.hw_decoder_load)
    key = forecast.key_of("decode", gpu, versions, split.digest, settings, threads)
    lock = Path(tempfile.gettempdir()) / f"fasttrain-{os.getuid()}-{key}.lock"
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        known = forecast.recall(key) if gpu else None
        if known:
            return [Trial(**trial) for trial in known]
        trials = [attempt(strategy) for strategy in STRATEGIES]
        forecast.remember(key, [asdict(trial) for trial in trials])
        return trials


def _gpu() -> str:
    """Names and driver of the GPUs, without touching them; empty where it cannot be told."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _versions() -> dict[str, str]:
    names = [d.name for d in metadata.distributions() if d.name.startswith("nvidia-")]
    return {n: metadata.version(n) for n in sorted(names) if "dali" in n or "nvimgcodec" in n}


def alone(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a launcher says of other processes."""
    launchers = ("RANK", "WORLD", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "GROUP_")
    return {key: value for key, value in environ.items() if not key.startswith(launchers)}


def try_in_a_process(
    split: Split,
    data: config.Data,
    strategy: str,
    threads: int,
    device: str,
    environ: Mapping[str, str],
) -> Trial:
    """Tries one strategy in a fresh interpreter, and says what became of it."""
    settings = data.model_copy(update={"decode": strategy, "root": split.root})
    command = [sys.executable, "-m", "fasttrain.decoding", settings.model_dump_json()]
    try:
        done = subprocess.run(
            [*command, split.name, str(threads), device],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=alone(environ),
        )
    except subprocess.TimeoutExpired:
        return Trial(strategy, 0.0, 0.0, f"no answer in {TIMEOUT_S} s")
    if done.returncode < 0:
        return Trial(strategy, 0.0, 0.0, f"crashed with signal {-done.returncode}")
    last = (done.stdout if not done.returncode else done.stderr).strip().splitlines()[-1:]
    if done.returncode or not last:
        reason = last[0] if last else "nothing said"
        return Trial(strategy, 0.0, 0.0, f"failed: {reason}"[:300])
    found = json.loads(last[0])
    if found["difference"] > TOLERANCE:
        fault = f"wrong pixels: {found['difference']:.1f}/255 from the CPU's"
        return Trial(strategy, 0.0, found["difference"], fault)
    return Trial(strategy, found["images_per_s"], found["difference"])


def _try(argv: list[str]) -> None:
    """What the fresh interpreter does: settings as JSON, split, number of threads, device."""
    import torch

    from fasttrain import data, resize, runtime, schedule, shards

    runtime.raise_file_limit()
    text, name, threads, kind = argv
    settings = config.Data.model_validate_json(text)
    split = shards.open_split(settings.root, name)
    train = config.Train(global_batch_size=min(64, split.num_samples), epochs=1000)
    plan = schedule.make_plan(train, config.Optim(), split.num_samples, 1)
    on_cpu = data.Placement(torch.device("cpu"), half=False, threads=int(threads))
    place = on_cpu._replace(device=torch.device("cuda", 0)) if kind == "cuda" else on_cpu
    plain = settings.model_copy(update={"decode": "cpu"})
    found, expected = (
        data.train_batches(split, each, plan, 0, where, 0)
        for each, where in ((settings, place), (plain, on_cpu))
    )
    std = torch.tensor(resize.STD).view(1, 3, 1, 1)
    differences = []
    for _ in range(4):
        ours, theirs = next(found).images.float().cpu(), next(expected).images
        differences.append(255 * ((ours - theirs) * std).abs().mean().item())
    for batches in (found, expected):
        batches.close()  # type: ignore[attr-defined]
    images_per_s = data.measure(split, settings, plan, 0, place, seconds=2.0)
    result = {"images_per_s": images_per_s, "difference": max(differences)}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    _try(sys.argv[1:])
