"""`benchmark.py record`: what a machine can tell of fasttrain, most important first, within a time.

Every stage measures in processes of its own and has a limit; one that fails does not end the rest.
What was measured is in OUT/record.jsonl as soon as it is known, and in OUT/record.md as tables.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal, NamedTuple

import apart
import benchmark
import probes
import rivals
import steps
import tables
from pydantic import BaseModel

from fasttrain import config, files, run_folder, runtime, schedule, sharding, shards, sources
from fasttrain.arguments import positive
from fasttrain.faults import ConfigError
from fasttrain.shards import Split

REPO = Path(__file__).resolve().parent.parent
LEAST_S = 4.0  # left for a measurement to be begun
STAGE_S = 30.0  # of a stage at the least, while there is time: a process imports for seconds
IMAGENETTE = "n01440764"  # a class that tells it, together with their number, ten
GOALS = (80.0, 90.0)  # top-1 on Imagenette, percent


class Record:
    """OUT/record.jsonl and OUT/record.md; goes on with what is there."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "record.jsonl"
        self.tables = out / "record.md"
        self.lines: list[dict[str, Any]] = []
        text = self.path.read_text() if self.path.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # a line that a kill has cut
                self.lines.append(json.loads(line))
        if text and not text.endswith("\n"):
            with self.path.open("a") as file:
                file.write("\n")

    def write(self, stage: str, **fields: Any) -> None:
        line = {"stage": stage, "time": datetime.now(UTC).isoformat(timespec="seconds"), **fields}
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        files.write_bytes(self.tables, tables.markdown(self.lines).encode())

    def of(self, stage: str, **fields: Any) -> list[dict[str, Any]]:
        """The lines of a stage that have these fields."""
        return [
            line for line in self.lines
            if line["stage"] == stage and fields.items() <= line.items()
        ]  # fmt: skip


@dataclass
class Run:
    """What the stages share."""

    arguments: argparse.Namespace
    record: Record
    stop_at: float  # of the current stage, by time.monotonic
    stage: str = ""

    @property
    def gpu(self) -> bool:
        return bool(self.arguments.device == "gpu")

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    def left_s(self) -> float:
        return self.stop_at - time.monotonic()

    def write(self, **fields: Any) -> None:
        self.record.write(self.stage, **fields)

    def apart(
        self, job: BaseModel, part: str, needed: bool = False, **about: Any
    ) -> dict[str, Any]:
        """Measures a job in a process, within the time left, and writes what came of it.

        Args:
            about: what the line says of the job.
        Raises:
            Failed: it is `needed`, and failed.
        """
        if self.left_s() < LEAST_S:
            result: dict[str, Any] = {"skipped": "no time left"}
        else:
            result = apart.measure_apart(job, part, self.left_s())
        rows = result.pop("rows", ())
        self.write(**{**about, **steps.rounded(result)})
        for row in rows:
            self.write(**row)
        outcome = result.get("failed") or result.get("skipped") or "done"
        say(f"{self.stage}: {' '.join(str(value) for value in about.values())}: {outcome}")
        if needed and outcome != "done":
            raise Failed
        return result


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main(arguments: argparse.Namespace) -> None:
    """Runs the stages that are asked for, one after the other, each in its share of the time."""
    data = [shards.open_split(root, "train") for root in arguments.data]  # or says what is wrong
    # As Ctrl-C: what runs is ended as well.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run_stages(arguments, data)
    finally:
        signal.signal(signal.SIGTERM, before)


def run_stages(arguments: argparse.Namespace, data: list[Split]) -> None:
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    run = Run(arguments, Record(arguments.out), 0.0)
    end = time.monotonic() + 60 * arguments.minutes
    chosen = [name for name in STAGES if name in arguments.stages]
    run.record.write("record", **about(arguments))
    for number, name in enumerate(chosen):
        shares = [STAGES[each].share for each in chosen[number:]]
        begun, run.stage = time.monotonic(), name
        share_s = (end - begun) * shares[0] / sum(shares)
        run.stop_at = min(end, begun + max(share_s, STAGE_S))
        say(f"{name}: at most {max(0, run.left_s()):.0f} s")
        try:
            if run.left_s() < LEAST_S:
                raise Skip("no time left")
            STAGES[name].measure(run, data)
            end_of = {"ended": "done"}
        except Skip as reason:
            end_of = {"ended": "skipped", "skipped": str(reason)}
        except Failed:
            end_of = {"ended": "failed"}
        except (KeyboardInterrupt, SystemExit):
            run.write(ended="stopped", seconds=round(time.monotonic() - begun, 1))
            raise
        except Exception as error:  # the next stage has its own chance
            text = f"{type(error).__name__}: {error}"
            end_of = {"ended": "failed", "failed": text.splitlines()[0], "error": text[-2000:]}
        run.write(**end_of, seconds=round(time.monotonic() - begun, 1))
        say(f"{name}: {end_of.get('failed') or end_of.get('skipped') or end_of['ended']}")
    sys.stdout.write(f"{run.record.tables}\n")


class Skip(Exception):
    """A stage has nothing to measure here; says why."""


class Failed(Exception):
    """A stage cannot go on, as what it needs has failed; that is in the record already."""


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """Versions, commit and command."""
    packages = ("torch", "triton", "torchvision", "timm", "accelerate", "numpy")
    versions = {
        each.name: each.version for each in metadata.distributions()
        if each.name in packages or each.name.startswith("nvidia-dali-cuda")
    }  # fmt: skip
    return {
        "versions": {"python": platform.python_version(), **dict(sorted(versions.items()))},
        "commit": runtime.commit(),
        "stages": arguments.stages,
        "minutes": arguments.minutes,
        "device": arguments.device,
    }


# --------------------------------------------------------------------------------------------------
# machine
# --------------------------------------------------------------------------------------------------


class MachineJob(BaseModel):
    """Where the machine is measured."""

    device: str
    scratch: Path
    data: Path | None


def stage_machine(run: Run, data: list[Split]) -> None:
    root = data[0].root if data else None
    job = MachineJob(device=run.device, scratch=run.arguments.scratch, data=root)
    run.apart(job, "machine", needed=True)


SMI = {
    "driver_version": "driver",
    "clocks.max.sm": "clock_mhz_at_most",
    "clocks.sm": "clock_mhz",
    "clocks.max.mem": "memory_clock_mhz",
    "power.limit": "power_limit_w",
    "pcie.link.gen.max": "pcie_generation",
}


def measure_machine(job: MachineJob) -> dict[str, Any]:
    """What the machine has, and the speed of its memory, its arithmetic and its storage."""
    import psutil
    import torch

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    found: dict[str, Any] = {
        "cpu": runtime.cpu_name(),
        "cpus": threads,
        "memory_gib": psutil.virtual_memory().total / 2**30,
    }
    found["copy_gb_per_s"] = steps.copy_bandwidth(job.device) / 1e9
    if job.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = properties.total_memory / 2**30
        found["gpu_processors"] = properties.multi_processor_count
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        found["upload_gb_per_s"] = upload_bandwidth() / 1e9
        query = probes.smi(f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits")
        answers = query.splitlines()[0].split(",") if query else []
        found |= {name: text.strip() for name, text in zip(SMI.values(), answers, strict=False)}
    found["matrix_tflops"] = matrix_rate(job.device) / 1e12
    file = job.scratch / "storage"
    begun = time.perf_counter()
    with file.open("wb") as opened:
        for _ in range(64):
            opened.write(os.urandom(2**20) * 4)
        opened.flush()
        os.fsync(opened.fileno())
    found["write_mb_per_s"] = file.stat().st_size / 1e6 / (time.perf_counter() - begun)
    file.unlink()
    if job.data:
        split = shards.open_split(job.data, "train")
        found |= probes.read_in_order(split) | probes.read_at_random(split, 8)
    return found


def upload_bandwidth() -> float:
    """Bytes/s of copying 256 MiB from pinned memory to the device."""
    import torch

    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    return len(source) / steps.seconds_of(lambda: target.copy_(source), "cuda")


def matrix_rate(device: str) -> float:
    """Operations/s, multiplications and additions, of a product of two square matrices."""
    import torch

    gpu = device == "cuda"
    size = 8192 if gpu else 1024
    # Of zeros or ones a GPU multiplies more in a second, as it takes less power.
    matrix = torch.randn(size, size, dtype=torch.bfloat16 if gpu else torch.float32, device=device)
    return float(2 * size**3 / steps.seconds_of(lambda: matrix @ matrix, device))


# --------------------------------------------------------------------------------------------------
# tests
# --------------------------------------------------------------------------------------------------

_TEST = re.compile(r"^(tests/\S+(?: \S+)*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.MULTILINE)


def stage_tests(run: Run, data: list[Split]) -> None:
    """`pytest -m gpu`, of the files that have such tests: others may need what is not installed."""
    if not run.gpu:
        raise Skip("needs a GPU")
    if not util.find_spec("pytest"):
        raise Skip("not installed: pip install pytest")
    files = [str(path) for path in sorted((REPO / "tests").glob("test_*.py"))
             if "mark.gpu" in path.read_text()]  # fmt: skip
    options = ["-o", "addopts=", "-m", "gpu", "-v", "--tb=short", "--continue-on-collection-errors"]
    options += ["-p", "share_tests", "-k", run.arguments.tests]
    number = max(1, min(TESTING, run.arguments.threads // benchmark.CPUS_TO_COMPILE))
    started = []
    for place in range(1, number + 1):
        log = run.arguments.out / f"tests-{place}.log"
        log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", *options, *files]
        # The summary cuts what failed to the width of the terminal.
        started.append(Logged(command, log, SHARE_OF_TESTS=f"{place}/{number}", COLUMNS="300"))
    codes = wait_for(started, run.left_s())
    text = "\n".join(each.log.read_text(errors="replace") for each in started)
    outcomes = {name: outcome.lower() for name, outcome in _TEST.findall(text)}
    counts = {
        kind: sum(outcome == kind for outcome in outcomes.values())
        for kind in ("passed", "failed", "error", "skipped")
    }
    ended = all(code is not None for code in codes)
    run.write(**counts, in_time=ended)
    summary = dict(re.findall(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", text, re.MULTILINE))
    bad = [name for name, outcome in outcomes.items() if outcome in ("failed", "error")]
    for name in dict.fromkeys([*bad, *summary]):
        run.write(test=name, failed=summary.get(name, "")[:300] or "see the logs of the tests")
    if not ended:
        raise RuntimeError(f"pytest: not all tests ended in time\n{apart.last_lines(text)}")
    if not outcomes:
        raise RuntimeError(f"pytest: {apart.last_lines(text)}")


TESTING = 5  # processes of pytest at the most
GRACE_S = 8.0  # after Ctrl-C, for what pytest says of the tests that failed


class Logged:
    """A command in the checkout, whose output goes to a file."""

    def __init__(self, command: Sequence[str], log: Path, **environ: str) -> None:
        self.log = log
        paths = [str(REPO), str(REPO / "tools"), os.environ.get("PYTHONPATH", "")]
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command, cwd=REPO, stdout=file, stderr=subprocess.STDOUT, text=True,
                start_new_session=True, env={**os.environ, **environ},
            )  # fmt: skip


def wait_for(
    started: Sequence[Logged], limit_s: float, look: Callable[[], object] = lambda: None
) -> list[int | None]:
    """The exit codes of commands, None of one that the limit ended.

    `look` is called several times a second meanwhile.
    """
    begun, processes = time.monotonic(), [each.process for each in started]
    codes: list[int | None] = [None] * len(started)
    try:
        while None in codes and time.monotonic() - begun < limit_s:
            time.sleep(0.1)
            look()
            codes = [process.poll() for process in processes]
        asked = time.monotonic()
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        while any(p.poll() is None for p in processes) and time.monotonic() - asked < GRACE_S:
            time.sleep(0.1)
        return codes
    finally:
        for process in processes:
            apart.end(process)


# --------------------------------------------------------------------------------------------------
# step, profile, loop
# --------------------------------------------------------------------------------------------------


def step_job(run: Run, name: str, mode: str, arch: str, batch: int) -> steps.StepJob:
    arguments = run.arguments
    return steps.StepJob.model_validate(
        {
            "name": name, "arch": arch, "width": arguments.width, "batch": batch,
            "px": arguments.crop_px, "precision": arguments.precision, "execution": mode,
            "layout": "channels_last", "device": run.device, "threads": arguments.threads,
            "seconds": arguments.seconds,
        }
    )  # fmt: skip


def contestants(run: Run, arch: str, batch: int) -> list[steps.StepJob]:
    """Ours and theirs, in the order of what they tell."""
    named = [("fasttrain", mode) for mode in run.arguments.modes]
    named += [
        (name, mode)
        for mode, name in itertools.product(run.arguments.rival_modes, run.arguments.rivals)
        if util.find_spec(name)
    ]
    # Ours in few ways and the best of theirs give the ratio; what else there is comes later.
    late = {("fasttrain", "compile"), ("fasttrain", "compile_fuse")}
    late |= {(name, "eager") for name in RIVALS} if run.gpu else set()
    ordered = [each for each in named if each not in late] + [e for e in named if e in late]
    return [step_job(run, name, mode, arch, batch) for name, mode in ordered]


def stage_step(run: Run, data: list[Split]) -> None:
    arguments, stop_at = run.arguments, run.stop_at
    settings = list(itertools.product(arguments.arch, arguments.batch))
    copied = copy_bandwidth(run)
    for number, (arch, batch) in enumerate(settings):
        run.stop_at = time.monotonic() + (stop_at - time.monotonic()) / (len(settings) - number)
        jobs = contestants(run, arch, batch)
        num_bytes = steps.bytes_moved(jobs[0])
        run.write(
            arch=arch, batch=batch, mb_per_image=round(num_bytes / batch / 1e6, 2),
            copy_gb_per_s=round(copied / 1e9, 1),
            bound_images_per_s=round(batch * copied / num_bytes),
        )  # fmt: skip
        compiling = [job for job in jobs if job.compiles]
        warmed = benchmark.warm_all(compiling, run.left_s() * WARM_SHARE)
        cold = []
        for job, found in zip(compiling, warmed, strict=True):
            run.write(**told(job), warmed=True, **steps.rounded(found))
            cold += [job] if "failed" in found else []
        jobs.sort(key=lambda job: job in cold)  # they may take all the time that there is
        for turn, job in itertools.product(range(arguments.repeats), jobs):
            run.apart(job, "step", **told(job), turn=turn)
    run.stop_at = stop_at


WARM_SHARE = 0.6  # of the time of a setting, in which all compile


def told(job: steps.StepJob) -> dict[str, Any]:
    return job.model_dump(include={"name", "arch", "batch", "px", "precision", "execution"})


def copy_bandwidth(run: Run) -> float:
    """Bytes/s of copying on the device, as this record has it, or measured now."""
    for line in reversed(run.record.lines):
        if "copy_gb_per_s" in line and line["stage"] in ("machine", "step"):
            return 1e9 * float(line["copy_gb_per_s"])
    job = MachineJob(device=run.device, scratch=run.arguments.scratch, data=None)
    found = apart.measure_apart(job, "machine", max(run.left_s() / 4, STAGE_S))
    if "failed" in found:
        run.write(name="copying", **found)
        return 0.0
    return 1e9 * float(found["copy_gb_per_s"])


def best_mode(run: Run, arch: str, batch: int) -> str:
    """The fastest of our modes in this record; else the one that is likely the fastest."""
    lines = [
        line for line in run.record.of("step", name="fasttrain", arch=arch, batch=batch)
        if line.get("images_per_s") and line["execution"] in run.arguments.modes
    ]  # fmt: skip
    if lines:
        return str(max(lines, key=lambda line: line["images_per_s"])["execution"])
    likely = ("compile_graph_fuse", "compile_graph", "graph", "compile", "eager")
    return next((mode for mode in likely if mode in run.arguments.modes), run.arguments.modes[0])


def stage_profile(run: Run, data: list[Split]) -> None:
    arch, batch = run.arguments.arch[0], run.arguments.batch[0]
    job = step_job(run, "fasttrain", best_mode(run, arch, batch), arch, batch)
    run.apart(job, "profile", needed=True, **told(job))


def stage_loop(run: Run, data: list[Split]) -> None:
    arch, batch = run.arguments.arch[0], run.arguments.batch[0]
    mode = best_mode(run, arch, batch)
    for turn in range(run.arguments.repeats):
        found: dict[str, Any] = {}
        for name in ("fasttrain", "fasttrain loop"):
            job = step_job(run, name, mode, arch, batch)
            found[name] = run.apart(job, "step", **told(job), turn=turn).get("images_per_s")
        if all(found.values()):
            run.write(loop_over_step=round(found["fasttrain loop"] / found["fasttrain"], 3))


# --------------------------------------------------------------------------------------------------
# input
# --------------------------------------------------------------------------------------------------

LOADS = (0.2, 0.35, 0.65, 0.0)  # hw_decoder_load


def stage_input(run: Run, data: list[Split]) -> None:
    arguments = run.arguments
    # What is known the least comes first: raw shards feed the fastest step.
    sets = sorted(data or [made_up(run)], key=lambda split: split.store != "raw")
    stop_at = run.stop_at
    for place, split in enumerate(sets):
        run.stop_at = time.monotonic() + (stop_at - time.monotonic()) / (len(sets) - place)
        batch = min(max(arguments.batch), split.num_samples)
        least = (64 if split.store == "raw" else 8) * batch  # a second or so
        number = max(arguments.images or 0, least) if run.gpu else arguments.images or 4 * batch
        kind = {"data": split.root.name, "store": split.store, **described(split)}
        for strategy, load, fancy in strategies(run, split):
            job = rivals.Job(
                name="fasttrain", shards=split.root, folder=None, threads=arguments.threads,
                batch=batch, crop_px=arguments.crop_px, images=number, decode=strategy,
                device="cuda:0" if run.gpu else "cpu", half=run.gpu, load=load,
                fancy=fancy,
            )  # fmt: skip
            about = {"decode": strategy, "load": load, "fancy": fancy, "batch": batch}
            run.apart(job, "input", **kind, **about)
        if split.store == "raw":
            run.apart(job, "packed", **kind, batch=batch)


def described(split: Split) -> dict[str, Any]:
    stored = benchmark.stored_shards(split)
    return {
        "kb_per_image": round(stored.bytes_per_image / 1e3, 1),
        "mpx_per_image": round(stored.mean_pixels / 1e6, 3),
    }


def strategies(run: Run, split: Split) -> Iterator[tuple[str, float | None, bool]]:
    """Ways to decode, each with its `hw_decoder_load` and `jpeg_fancy_upsampling`."""
    if split.store == "raw" or not run.gpu:
        yield "auto", None, False
        return
    for place, load in enumerate(LOADS):
        yield "gpu_full", load, False
        yield "gpu_window", load, False
        if place == 0:
            yield "cpu", None, False
            yield "gpu_full", load, True
            yield "gpu_window", load, True


def made_up(run: Run) -> Split:
    """Raw shards of made-up pictures, where no data set is given: their content does not matter."""
    root = run.arguments.scratch / "made-up"
    if not (root / shards.MANIFEST).exists():
        import numpy as np
        from PIL import Image

        number = 2048 if run.gpu else 4 * max(run.arguments.batch)
        classes, short = min(1000, number), round(run.arguments.crop_px * 256 / 224)
        folder = run.arguments.scratch / "pictures"
        rng = np.random.default_rng(0)
        pictures = []
        for _ in range(min(64, number)):
            noise = rng.integers(0, 256, (8, 10, 3)).astype(np.uint8)
            size = short * 4 // 3, short
            encoded = io.BytesIO()
            Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(encoded, "jpeg")
            pictures.append(encoded.getvalue())
        for split, images in (("train", number), ("val", classes)):
            for image in range(images):
                path = folder / split / f"{image % classes:04d}" / f"{image}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(pictures[image % len(pictures)])
        source = sources.scan(folder, "imagefolder", root, list, lambda text: None)
        root.mkdir(exist_ok=True)
        policy = sharding.Policy(store="raw")
        sharding.write_dataset(source, root, policy, workers=run.arguments.threads)
        shutil.rmtree(folder)
    return shards.open_split(root, "train")


# --------------------------------------------------------------------------------------------------
# train
# --------------------------------------------------------------------------------------------------


class Launched(NamedTuple):
    """A start of train.py."""

    code: int | None  # None where the time was over
    seconds: float
    stopping_s: float | None  # from the request to stop until it had ended


class Training:
    """A run of train.py, started as users start it, once or more."""

    def __init__(self, run: Run, recipe: config.Recipe, name: str) -> None:
        self.run = run
        self.folder = run.arguments.scratch / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        log = recipe.log.model_copy(update={"run_dir": self.folder / "run"})
        recipe = recipe.model_copy(update={"log": log})
        self.recipe = self.folder / "recipe.toml"
        self.recipe.write_text(config.dumps(recipe))
        self.log = self.folder / "train.log"
        self.metrics = self.folder / "run" / run_folder.METRICS

    def start(self, stop_when: Callable[[], bool] = lambda: False) -> Launched:
        """Launches train.py, and asks it to stop once `stop_when` says so."""
        begun, asked = time.monotonic(), 0.0

        def look() -> None:
            nonlocal asked
            if not asked and stop_when():
                (self.folder / "run" / run_folder.STOP).touch()
                asked = time.monotonic()

        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
        command = [*launcher, str(REPO / "fasttrain" / "train.py"), str(self.recipe)]
        environ = {} if self.run.gpu else {"ACCELERATE_USE_CPU": "true"}
        (code,) = wait_for([Logged(command, self.log, **environ)], self.run.left_s(), look)
        now = time.monotonic()
        return Launched(code, now - begun, now - asked if asked else None)

    def lines(self, event: str) -> list[dict[str, Any]]:
        text = self.metrics.read_text() if self.metrics.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        return [line for line in map(json.loads, whole.splitlines()) if line["event"] == event]

    def said(self) -> list[str]:
        """What the run said of its decoder, its mode and what limits it."""
        words = ("decode:", "execution:", "input:", "raw images:", "WARNING", "SKIPPED")
        lines = map(str.strip, self.log.read_text(errors="replace").splitlines())
        kept = [line[:500] for line in lines if line.startswith(words) or " was the limit" in line]
        return [*dict.fromkeys(kept)]

    def check(self, launched: Launched, stopped: bool = False) -> None:
        """Raises what is wrong with how a start ended."""
        if launched.code is None:
            raise RuntimeError(f"train.py: did not end in time\n{self.last_words()}")
        if launched.code and not (stopped and launched.stopping_s):
            raise RuntimeError(f"train.py: exit code {launched.code}\n{self.last_words()}")
        if stopped and launched.stopping_s is None:
            raise RuntimeError(f"train.py: ended before it was asked to stop\n{self.last_words()}")

    def last_words(self) -> str:
        """The last lines of train.py, without the traceback that its launcher adds."""
        text = self.log.read_text(errors="replace")
        launchers = text.rfind("Traceback (most recent call last)")
        if "CalledProcessError" in text[launchers:]:
            text = text[:launchers]
        return apart.last_lines(text)


def stage_train(run: Run, data: list[Split]) -> None:
    """train.py on raw shards: two sizes of image, evaluations, a stop and a resume."""
    arguments = run.arguments
    split = next((each for each in data if each.store == "raw"), None) or made_up(run)
    arch = arguments.arch[0]
    batch = min(arguments.batch[0], split.num_samples)
    mode = best_mode(run, arch, batch)
    recipe, small = train_recipe(run, split, arch, batch, mode)
    about_it = {"arch": arch, "batch": batch, "execution": mode, "data": split.root.name}
    job = step_job(run, "fasttrain", mode, arch, batch)
    job = job.model_copy(update={"classes": len(split.classes)})
    if job.compiles:
        sizes = [job.model_copy(update={"evaluates": True}), job.model_copy(update={"px": small})]
        for each, found in zip(
            sizes, benchmark.warm_all(sizes, run.left_s() * WARM_SHARE), strict=True
        ):
            run.write(**about_it, px=each.px, warmed=True, **steps.rounded(found))
    bare = run.apart(job, "step", **told(job)).get("images_per_s")
    training = Training(run, recipe, "train")
    spe = split.num_samples // batch
    last = recipe.train.epochs * spe
    at = last // 2
    first = training.start(lambda: any(x["step"] >= at for x in training.lines("train")))
    written = report_training(run, training, about_it, bare)
    training.check(first, stopped=True)
    stopped_at = training.lines("train")[-1]["step"]
    begun = time.monotonic()
    resumed_s: list[float] = []

    def resumed() -> bool:
        if not resumed_s and training.lines("train")[-1]["step"] > stopped_at:
            resumed_s.append(time.monotonic() - begun)
        return False

    second = training.start(resumed)
    report_training(run, training, about_it, bare, written)
    run.write(
        **about_it, first_start_s=round(first.seconds, 1),
        stopping_s=round(first.stopping_s or 0, 2),
        resumed_s=round(resumed_s[0], 1) if resumed_s else None,
        steps=training.lines("train")[-1]["step"] + 1, of_steps=last,
        said=training.said(),
    )  # fmt: skip
    training.check(second)


def train_recipe(
    run: Run, split: Split, arch: str, batch: int, mode: str
) -> tuple[config.Recipe, int]:
    """A run of some updates in two sizes of image, and the smaller of these sizes."""
    px = run.arguments.crop_px
    small = max(32, px * 3 // 4 // 16 * 16)
    per_epoch = split.num_samples // batch
    epochs = max(4, -(-run.arguments.updates // per_epoch))
    recipe = config.Recipe.model_validate(
        {
            "data": {
                "root": split.root, "crop_px": ((0, small), (epochs // 4, px)),
                "eval_crop_px": px, "eval_resize_px": round(px * 256 / 224),
                "threads": run.arguments.threads,
            },
            "model": {"arch": arch, "width": run.arguments.width},
            "optim": {"ema_decay": 0.999, "warmup_epochs": 1, "lr": 0.1, "warmup_lr": 0.01},
            "train": {
                "epochs": epochs, "global_batch_size": batch, "execution": mode,
                "precision": run.arguments.precision, "label_smoothing": 0.1,
                "eval_every_epochs": max(1, epochs // 2),
                "cpu_threads": 0 if run.gpu else run.arguments.threads,
            },
            "log": {"every_steps": max(1, epochs * per_epoch // 24)},
        }
    )  # fmt: skip
    return recipe, small


def report_training(
    run: Run, training: Training, about_it: dict[str, Any], bare: float | None, written: int = 0
) -> int:
    """Writes the speeds of a start from a line on; returns how many lines there are.

    The first line of a start holds what is slow at first, and one in which the size of the images
    changes holds both.
    """
    from statistics import median

    lines = training.lines("train")
    recipe = config.load(training.recipe)
    by_px: dict[int, list[dict[str, Any]]] = {}
    for before, line in itertools.pairwise(lines[written:]):
        first, last = (
            schedule.crop_px_at(each["epoch"], recipe.data.crop_px) for each in (before, line)
        )
        if first == last:
            by_px.setdefault(last, []).append(line)
    for px, group in by_px.items():
        speed = median(line["images_per_s"] for line in group)
        found = {
            "images_per_s": round(speed, 1),
            "data_wait": round(median(line["data_wait"] for line in group), 4),
            "loss": round(group[-1]["loss"], 4),
        }
        if bare and px == run.arguments.crop_px:
            found["over_bare_step"] = round(speed / bare, 3)
        run.write(**about_it, px=px, resumed=written > 0, **found)
    for line in training.lines("eval"):
        if line["step"] > (lines[written - 1]["step"] if written else -1):
            run.write(**about_it, eval_s=line["eval_s"], top1=line["top1"], step=line["step"])
    return len(lines)


# --------------------------------------------------------------------------------------------------
# imagenette
# --------------------------------------------------------------------------------------------------


def stage_imagenette(run: Run, data: list[Split]) -> None:
    """Minutes from the launch until an evaluation reaches 80 and 90 % top-1."""
    split = next(
        (each for each in data if len(each.classes) == 10 and IMAGENETTE in each.classes), None
    )
    if split is None:
        raise Skip("needs Imagenette's shards: name them with --data")
    changes: dict[str, Any] = {"data.root": str(split.root)}
    if run.gpu:  # a larger network learns more in the minutes that there are
        changes |= {
            "model.arch": "large", "model.width": 1.0, "train.epochs": 60,
            "train.precision": run.arguments.precision, "optim.ema_decay": 0.999,
        }  # fmt: skip
    recipe = config.load(REPO / "recipes" / "imagenette.toml").model_dump(mode="json")
    for key, value in changes.items():
        section, name = key.split(".")
        recipe[section][name] = value
    training = Training(run, config.Recipe.model_validate_json(json.dumps(recipe)), "imagenette")
    begun, reached = time.monotonic(), dict[float, float]()

    def reached_all() -> bool:
        best = max((top1_of(line) for line in training.lines("eval")), default=0.0)
        for goal in GOALS:
            if best >= goal and goal not in reached:
                reached[goal] = (time.monotonic() - begun) / 60
                run.write(goal=goal, minutes=round(reached[goal], 2), images=split.num_samples)
        return len(reached) == len(GOALS)

    launched = training.start(reached_all)
    reached_all()
    evaluations = training.lines("eval")
    best = max((top1_of(line) for line in evaluations), default=None)
    speeds = [line["images_per_s"] for line in training.lines("train")]
    run.write(
        best_top1=best, epochs=len(evaluations), minutes=round(launched.seconds / 60, 2),
        images_per_s=max(speeds, default=None), changes=changes | {"data.root": split.root.name},
        said=training.said(),
    )  # fmt: skip
    if not evaluations:
        raise RuntimeError(training.last_words())


def top1_of(line: dict[str, Any]) -> float:
    return float(max(line["top1"], line.get("ema_top1", 0.0)))


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """What is measured, and its part of the time beside the others'."""

    measure: Callable[[Run, list[Split]], None]
    share: float


STAGES = {
    "machine": Stage(stage_machine, 1),
    "tests": Stage(stage_tests, 4),
    "step": Stage(stage_step, 8),
    "profile": Stage(stage_profile, 2),
    "input": Stage(stage_input, 4),
    "loop": Stage(stage_loop, 2),
    "train": Stage(stage_train, 5),
    "imagenette": Stage(stage_imagenette, 4),
}
RIVALS: tuple[Literal["torchvision", "timm"], ...] = ("torchvision", "timm")


def add_arguments(part: argparse.ArgumentParser) -> None:
    words = benchmark.words
    part.add_argument("--out", type=Path, required=True, metavar="DIR", help="goes on with it")
    part.add_argument(
        "--scratch", type=Path, metavar="DIR", help="for pictures and runs (default: that of --out)"
    )
    part.add_argument("--minutes", type=benchmark.amount, default=10.0, metavar="N")
    part.add_argument(
        "--data", type=Path, nargs="+", action="extend", default=[], metavar="SHARDS",
        help="data sets; without, raw shards of made-up pictures",
    )  # fmt: skip
    lists: tuple[tuple[str, Sequence[str], str | None, str], ...] = (
        ("--stages", [*STAGES], ",".join(STAGES), "(default: all)"),
        ("--arch", ["large", "small"], "large,small", "(default: both)"),
        ("--modes", benchmark.MODES, None, "of fasttrain (default: all; CPU: eager)"),
        ("--rivals", [*RIVALS, "none"], ",".join(RIVALS), "(default: both)"),
        ("--rival-modes", ["eager", "compile"], None, "(default: both; CPU: eager)"),
    )
    for name, known, default, text in lists:
        part.add_argument(
            name, type=partial(words, known), default=default, metavar="A,B", help=text
        )
    part.add_argument("--tests", default="", metavar="EXPRESSION", help="as pytest's -k")
    numbers = (
        ("--crop-px", None, "side of the images (default: 224; CPU: 64)"),
        ("--threads", len(os.sched_getaffinity(0)), "of the CPU (default: %(default)s)"),
        ("--repeats", 1, "turns of step and loop (default: 1)"),
        ("--images", None, "timed in each measurement of the input"),
        ("--updates", None, "of train (default: 300; CPU: 24)"),
    )
    for name, number, text in numbers:
        part.add_argument(name, type=positive, default=number, metavar="N", help=text)
    part.add_argument("--batch", type=benchmark.counts, metavar="N,...",
                      help="(default: 1024,128; CPU: 16)")  # fmt: skip
    part.add_argument("--width", type=benchmark.amount, default=1.0, metavar="W")
    part.add_argument("--seconds", type=benchmark.amount, metavar="S",
                      help="of updates that are timed (default: 2)")  # fmt: skip
    part.add_argument("--precision", choices=["bf16", "no"], help="(default: bf16; CPU: no)")
    part.add_argument("--device", choices=["cpu", "gpu"], help="(default: a GPU if there is one)")


def settle(arguments: argparse.Namespace) -> None:
    """Fills in what depends on the device.

    Raises:
        ConfigError: the device lacks what is asked for.
    """
    import torch

    if arguments.device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("--device gpu: torch finds no GPU here; leave it out")
    arguments.device = arguments.device or ("gpu" if torch.cuda.is_available() else "cpu")
    gpu = arguments.device == "gpu"
    arguments.scratch = arguments.scratch or arguments.out
    arguments.crop_px = arguments.crop_px or (224 if gpu else 64)
    arguments.batch = arguments.batch or ([1024, 128] if gpu else [16])
    arguments.updates = arguments.updates or (300 if gpu else 24)
    arguments.seconds = arguments.seconds or 2.0
    arguments.precision = arguments.precision or ("bf16" if gpu else "no")
    arguments.modes = arguments.modes or ([*MOST_TELLING] if gpu else ["eager"])
    arguments.rival_modes = arguments.rival_modes or (["compile", "eager"] if gpu else ["eager"])
    arguments.rivals = [name for name in arguments.rivals if name != "none"]
    if not gpu and any("graph" in mode for mode in arguments.modes):
        raise ConfigError("--modes: a CUDA graph needs a GPU; use eager,compile")


# All modes: after eager, which the others are held against, those that are likely the fastest.
MOST_TELLING = sorted(benchmark.MODES, key=lambda mode: (mode != "eager", "graph" not in mode))
