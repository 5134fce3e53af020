"""Small data sets of real and made-up JPEGs, and a way to run the commands."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

# Tests that run in this process use the CPU, and one thread each, as these are tiny networks.
os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
# What is measured and compiled stays out of the user's caches, and Accelerate finds no settings.
os.environ |= {"FASTTRAIN_TESTS": tempfile.mkdtemp(prefix="fasttrain-tests-")}
os.environ |= {
    name: os.path.join(os.environ["FASTTRAIN_TESTS"], name.lower())
    for name in ("XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "TRITON_CACHE_DIR")
}

from fasttrain import config, forecast, sharding, shards, sources, train

Refused = Callable[..., None]  # what the fixture `refused` gives
Interpreter = Callable[[str], ModuleType]  # what the fixture `interpreter` gives

REPO = Path(__file__).parent.parent
SCRATCH = Path(os.environ["FASTTRAIN_TESTS"])
CHECKOUT = SCRATCH / "fasttrain"  # where commands run: what they leave there goes with the tests
STEP = Path("checkpoints", "step_00000002")  # the checkpoint of the fixture `trained`
TIMEOUT_S = 240  # of a command that takes seconds: the machines of a test run can be very busy

# A recipe that trains in seconds on a CPU. Each test changes what it is about.
TINY: dict[str, dict[str, Any]] = {
    "data": {"crop_px": 32, "eval_resize_px": 36, "eval_crop_px": 32, "threads": 1},
    "model": {"arch": "small", "width": 0.35},
    "optim": {"lr": 0.05, "warmup_lr": 0.01, "warmup_epochs": 1},
    "train": {
        "epochs": 3,
        "global_batch_size": 8,
        "precision": "no",
        "cpu_threads": 1,
        "execution": "eager",  # `auto` times updates first
    },
    "checkpoint": {"every_steps": 4},
    "log": {"every_steps": 3},
}


@pytest.fixture(scope="session", autouse=True)
def scratch() -> Iterator[None]:
    """Makes tests work in a copy of the checkout without the user's `data` and `runs`."""
    CHECKOUT.mkdir()
    for path in REPO.iterdir():
        if path.name not in ("data", "runs", ".git"):
            (CHECKOUT / path.name).symlink_to(path)
    os.chdir(CHECKOUT)
    yield
    os.chdir(REPO)
    shutil.rmtree(SCRATCH)


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """An image of smooth waves and a little noise, as compressible as a photograph."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = []
    for _ in range(3):
        fx, fy, phase = rng.uniform(0.02, 0.2), rng.uniform(0.02, 0.2), rng.uniform(0, 6)
        channels.append(127 + 90 * np.sin(fx * x + fy * y + phase) + rng.normal(0, 4, x.shape))
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of 3 classes: 45 images to train on, 13 to validate on, of many sizes."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for split, count in (("train", 45), ("val", 13)):
        for number in range(count):
            width, height = rng.integers(30, 90, 2).tolist()
            image = photograph(rng, width, height)
            if number % 7 == 3:
                image = image.convert("L")
            path = root / split / "abc"[number % 3] / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=90, subsampling=number % 3)
    return root


@pytest.fixture(scope="session")
def dataset(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `folder` as shards, four of them for training."""
    root = tmp_path_factory.mktemp("dataset") / "shards"
    shard(folder, root, shard_size=11)
    return root


@pytest.fixture(scope="session")
def split(dataset: Path) -> shards.Split:
    """The training split of `dataset`: 45 JPEGs."""
    return shards.open_split(dataset, "train")


@pytest.fixture(scope="session")
def raw(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `folder` as shards of raw pixels, five of them for training."""
    root = tmp_path_factory.mktemp("raw") / "shards"
    shard(folder, root, sharding.Policy(store="raw"), shard_size=11)
    return root


@pytest.fixture
def copied(dataset: Path, tmp_path: Path) -> Path:
    """A copy of `dataset` for one test to damage."""
    return Path(shutil.copytree(dataset, tmp_path / "shards"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a user clones, without data and runs."""
    root = tmp_path_factory.mktemp("clone") / "fasttrain"
    ignored = shutil.ignore_patterns("data", "runs", ".git", "__pycache__", "*.egg-info")
    return Path(shutil.copytree(REPO, root, ignore=ignored))


def ignore(text: str) -> None:
    """Drops a message."""


def listed(root: Path, spool: Path | None = None) -> sources.Source:
    """The source at `root`, recognised and listed."""
    return sources.scan(
        root, sources.recognise(root), spool or root, lambda tasks: [t() for t in tasks], ignore
    )


def shard(
    root: Path,
    out: Path,
    policy: sharding.Policy | None = None,
    on_progress: Callable[[sharding.Progress], None] = lambda progress: None,
    **build: Any,
) -> dict[str, Any] | None:
    """Makes a data set of the source at `root`; `build` are fields of `sharding.Build`."""
    out.mkdir(parents=True, exist_ok=True)
    source, policy, how = listed(root, out), policy or sharding.Policy(), sharding.Build(**build)
    return sharding.write_dataset(source, out, policy, how, on_progress)


def write_recipe(path: Path, dataset: Path, run_dir: Path, **changes: dict[str, Any]) -> Path:
    """Writes TINY for a data set and a run folder, changed by `section={key: value}`."""
    sections = {name: dict(table) for name, table in TINY.items()}
    sections["data"]["root"] = str(dataset)
    sections["log"]["run_dir"] = str(run_dir)
    for section, table in changes.items():
        sections.setdefault(section, {}).update(table)
    path.write_text(config.dumps(config.Recipe.model_validate_json(json.dumps(sections))))
    return path


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives runs in this process a rate of their input, so that they do not measure it.

    Runs in processes of their own still measure it.
    """
    monkeypatch.setattr(forecast, "recall_rate", lambda key: forecast.Rate(1000.0))


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes benchmarks measure their contestants in the test's own process, which saves time."""
    import benchmark
    import torch
    from benchmarks import own_process

    def measure(job: own_process.Job, part: str, *_: Any) -> own_process.Result:
        return benchmark.measured(part, job.model_dump_json())

    threads = torch.get_num_threads()
    monkeypatch.setattr(own_process, "measure", measure)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(dataset: Path, tmp_path: Path, known_rates: None) -> Callable[..., Path]:
    """Writes a tiny recipe, changed by `section={key: value}`; its run folder is in tmp_path."""

    def write(name: str = "tiny", **changes: dict[str, Any]) -> Path:
        return write_recipe(tmp_path / f"{name}.toml", dataset, tmp_path / "run", **changes)

    return write


@pytest.fixture(scope="session")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of 2 updates, with one checkpoint; tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder / "tiny.toml", dataset, folder / "run", train={"max_steps": 2})
    train.main([str(recipe)])
    return folder / "run"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Calls an entry point. It must end with exit code 2 and print these texts as errors."""

    def check(main: Callable[..., object], words: Sequence[object], *said: str) -> None:
        given = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["tool", *given])
        with pytest.raises(SystemExit) as status:
            # A tool's main() reads sys.argv; the trainer's main(words) takes them.
            main(*[given][: main.__code__.co_argcount])
        output = capsys.readouterr().err
        assert status.value.code == 2, output
        for text in said:
            assert text in output
        assert "Traceback" not in output

    return check


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Interpreter:
    """Loads a module of fasttrain whose kernels Triton's interpreter runs, on tensors of the CPU.

    In this test, the module stands in for the one that others import.
    """
    # Before the variable is set: the functions of Triton's own library must stay compiled ones.
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.runtime import interpreter

    import fasttrain

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is defined
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # Triton 3.6 makes no number of a scalar with NumPy 2.4.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)

    def load(name: str) -> ModuleType:
        if name != "triton_parts":
            parts = load("triton_parts")  # kernels call its functions
            # It adds up an array at once only if it sees Triton's own function.
            monkeypatch.setattr(
                parts, "_plus", sys.modules["triton.language"].standard._sum_combine
            )
        spec = importlib.util.find_spec(f"fasttrain.{name}")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, f"fasttrain.{name}", module)
        monkeypatch.setattr(fasttrain, name, module, raising=False)
        return module

    return load


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets Accelerate use the GPU in this process, in full float32. Skips the test without a GPU.

    With TensorFloat-32, the momenta of two modes would differ too much after five updates.
    """
    import torch
    from accelerate.state import AcceleratorState

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command: on the CPU, and without what a test run leaves there."""
    ours = ("ACCELERATE", "OMP", "PYTEST")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "PATH": command_path()} | changes


def command_path() -> str:
    """PATH with the commands of this Python first, as in an activated environment."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(
    command: Sequence[object], code: int = 0, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in the tests' checkout, and checks its exit code."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=CHECKOUT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def lines(path: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The records of a JSON lines file, of one event or all."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if event in (None, record["event"])]
