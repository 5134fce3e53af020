"""Every mode of execution runs PyTorch's host code as on a GPU, over a stand-in for CUDA.

See standin/standin.cpp for what it forbids and counts, and standin/story.py for what is run.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, environment

STANDIN = REPO / "tests" / "standin"
LIMIT_S = 900  # of the modes that compile, on a busy machine
OTHERS = ["eager", "compile", "compile_graph", "compile_graph_fuse"]  # compiling takes minutes
MODES = ["graph", *(pytest.param(mode, marks=pytest.mark.slow) for mode in OTHERS)]
# Kernels, copies and fills of an update outside forward and backward, with the launch of
# the graph itself and with the 2 fills by which PyTorch hands a graph its seed.
MOST_LAUNCHES = {"eager": 45, "graph": 25, "compile": 45}
MOST_LAUNCHES |= {"compile_graph": 25, "compile_graph_fuse": 25}
OLD_TORCH = 30  # launches more: before 2.12 lists take more kernels, and the guard is not compiled


def headers() -> list[Path]:
    """Folders with CUDA's headers, which come with PyTorch and Triton, or with CUDA."""
    found = []
    for package, folder in (("nvidia", "cu13/include"), ("triton", "backends/nvidia/include")):
        if spec := importlib.util.find_spec(package):
            found += [Path(place) / folder for place in spec.submodule_search_locations or []]
    return [folder for folder in (*found, Path("/usr/local/cuda/include")) if folder.is_dir()]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiles the stand-in. Skips the test if that does not work."""
    if not (torch.version.cuda or "").startswith("13."):
        pytest.skip(f"PyTorch for CUDA {torch.version.cuda}: the stand-in is one for CUDA 13")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which the stand-in would hide; see the tests marked gpu")
    compiler, folders = shutil.which("g++"), headers()
    if not compiler:
        pytest.skip("no g++ to compile the stand-in for CUDA with")
    for needed in ("cuda_runtime_api.h", "crt/host_defines.h"):
        if not any((folder / needed).exists() for folder in folders):
            pytest.skip(f"no {needed} to compile the stand-in for CUDA with: install CUDA 13")
    # It is found under the driver's name too.
    built = tmp_path_factory.mktemp("standin") / "libcuda.so.1"
    included = [f"-I{folder}" for folder in folders]
    options = ["-O1", "-Wall", "-fPIC", "-shared", "-std=c++17", *included]
    command: list[str | Path] = [
        compiler,
        *options,
        "-Wl,-soname,libcuda.so.1",
        STANDIN / "standin.cpp",
        "-o",
        built,
    ]
    subprocess.run(command, check=True)
    return built


def story(library: Path, mode: str, folder: Path) -> dict[str, Any]:
    """The report of story.py about a mode."""
    return report(library, "story.py", mode, str(folder))


def report(library: Path, script: str, *words: str) -> dict[str, Any]:
    """What a script prints that runs on the stand-in."""
    changes = {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": f"{library.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "CUDA_VISIBLE_DEVICES": "0",
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "TRITON_LIBCUDA_PATH": str(library.parent),
    }
    done = subprocess.run(
        [sys.executable, STANDIN / script, *words],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_on_the_stand_in_for_cuda(
    library: Path, mode: str, tmp_path: Path
) -> None:
    """There is one test for each mode, because starting the process takes most of the time."""
    told = story(library, mode, tmp_path)

    # A run that is stopped and resumed makes no illegal call, and waits for log lines only.
    run = told["whole_run"]
    assert (run["mode"], run["warnings"]) == (mode, [])
    assert run["stopped"] and run["saved"] == ["step_00000013"] and run["resumed_at"] == 13
    assert run["done"] and run["steps"] == 22
    assert run["bad"] == [] and run["waits"] == []
    # Each micro-batch; for 2 networks at 2 starts a rehearsal, at 2 evaluations 2 full batches.
    assert run["evaluations"] == 2
    assert run["replays"] == (22 * 2 + 2 * 2 + 2 * 2 * 2 if "graph" in mode else 0)

    # Launches outside forward and backward are few, and all tensors stay channels-last.
    update = told["one_update"]
    most = MOST_LAUNCHES[mode] + (OLD_TORCH if torch.__version__ < "2.12" else 0)
    assert len(update["launches"]) <= most, "\n".join(update["launches"])
    lost = update["lost"]
    if "compile" in mode and torch.__version__ >= "2.12":
        # Inductor gives the backward of depthwise convolutions gradients in another layout (seen
        # with 2.14.1; not with 2.11.0).
        lost = [line for line in lost if "convolution_backward" not in line]
    assert lost == []

    # A trial gives its memory back.
    trial = told["trials"]
    assert trial["fault"] == "" and trial["tensors"] == 0
    assert trial["taken"] <= 4 << 20  # tensors that stay lie in other pieces of 2 MiB than before

    # A capture that fails is left, and the run continues in a simpler mode.
    if "graph" in mode:
        run = told["failing_capture"]
        assert run["mode"] == ("compile" if "compile" in mode else "eager")
        assert f"train.execution = {mode} failed: " in run["warnings"][0]
        assert "operation not permitted when stream is capturing" in run["warnings"][0]
        assert run["on_default_stream"]
        assert run["bad"] and not run["bad_later"] and run["done"]


@pytest.mark.slow
def test_layers_are_timed_on_the_stand_in(library: Path) -> None:
    """Our kernels and PyTorch's code are recorded as graphs, and launched without a fault."""
    told = report(library, "passes.py")
    # Of the first block, two layers; of the second one, three; each in two directions. Each pass is
    # recorded three times. Depthwise ones again, as their convolution alone is not slower.
    assert told == {"chosen": [[0] * 6] * 2, "said": ["", ""], "graphs": 10 * 3 + 4 * 3}
