"""Variables that Accelerate reads from the environment do not change what is trained."""

import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DynamoBackend

from fasttrain import launch, runtime
from fasttrain.launch import LaunchError

SOURCE = Path(accelerate.__file__).parent
NAMES = re.compile(r"\b(?:ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_[A-Z0-9_]*")


def read_by_accelerate() -> set[str]:
    """The variables that the installed Accelerate reads or sets, and prefixes of such names."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        if "test_utils" not in path.parts:
            for quoted in re.findall(r"[\"']([^\"'\n]*)[\"']", path.read_text()):
                found |= {name for name in NAMES.findall(quoted) if name == quoted}
    return found - {"ACCELERATE_", "FSDP_PYTORCH_VERSION"}


@pytest.fixture
def fresh() -> Iterator[None]:
    """Lets Accelerate read the environment again."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_every_variable_of_the_installed_accelerate_is_in_a_table() -> None:
    known = {*launch.KEPT, *launch.REFUSED, *launch.NOT_USED, "ACCELERATE_TORCH_DEVICE"}
    unknown = {
        name for name in read_by_accelerate() - known if not name.startswith(launch.OF_THESE)
    }
    assert unknown == set()
    assert known - {"FORK_LAUNCHED"} <= read_by_accelerate()


@pytest.mark.parametrize("name", launch.REFUSED)
def test_other_ways_to_train_are_refused_in_one_line(name: str) -> None:
    for value in ("true", "True", "1", "yes"):
        with pytest.raises(LaunchError) as error:
            launch.settle({name: value}, "bf16")
        message = str(error.value)
        assert f"asks for {launch.REFUSED[name]} ({name} = {value}" in message
        assert "python fasttrain/train.py" in message and "\n" not in message
    off = {name: "false"}
    assert launch.settle(off, "bf16") == [] and name not in off


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ACCELERATE_TORCH_DEVICE": "cuda:1"}, "unset it; CUDA_VISIBLE_DEVICES chooses GPUs"),
        ({"PJRT_DEVICE": "TPU"}, "asks for a TPU, which fasttrain does not train on: launch witho"),
        ({"ACCELERATE_USE_CPU": "maybe"}, 'ACCELERATE_USE_CPU = "maybe" in the environment: expe'),
        ({"ACCELERATE_LOG_LEVEL": "loud"}, 'ACCELERATE_LOG_LEVEL = "loud" in the environment: ex'),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK = 0 in the environment, but no RANK, WORLD_SIZE, MASTER"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "WORLD_SIZE = 2 and MASTER_ADDR in the environment, but no LOCAL_RANK, as in a pod",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"MPI started 4 processes \(OMPI_COMM_WORLD_SIZE\), but"),
        (
            {"PMI_SIZE": "2"},
            r"MPI started 2 processes \(PMI_SIZE\), but fasttrain does not use MPI",
        ),
    ],
)
def test_launches_that_would_change_the_training_are_refused(
    environ: dict[str, str], message: str
) -> None:
    with pytest.raises(LaunchError, match=message):
        launch.settle(environ, "bf16")
        launch.check_processes(environ)


@pytest.mark.parametrize(
    ("name", "value", "remark"),
    [
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            "= 4 is not used: train.global_batch_size and train.micro_batch_size decide",
        ),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", ""),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "= 1.0 is not used: gradients are not clipped"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "not used: train.execution decides on compiling"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO", ""),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune", ""),
        ("ACCELERATE_CPU_AFFINITY", "1", "each process is bound to the CPUs of its GPU anyway"),
        ("ACCELERATE_DOWNCAST_BF16", "yes", "is not used: it is for TPUs"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "is not used: the recipe has train.precision = bf16"),
        ("ACCELERATE_MIXED_PRECISION", "no", ""),
        ("ACCELERATE_MIXED_PRECISION", "bf16", ""),
        ("ACCELERATE_FROM_THE_FUTURE", "1", "is not used: fasttrain does not know it"),
        ("ACCELERATE_USE_CPU", "", ""),
    ],
)
def test_the_recipe_wins_over_the_launcher_with_a_warning(
    name: str, value: str, remark: str
) -> None:
    remarks = launch.settle({name: value, "LANG": "C"}, "bf16")
    assert len(remarks) == bool(remark)
    assert not remark or (remarks[0].startswith(f"WARNING: {name} = ") and remark in remarks[0])


def test_a_plain_launch_gives_no_warning() -> None:
    launched = {
        "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
        "ACCELERATE_DYNAMO_USE_DYNAMIC": "False", "ACCELERATE_USE_CPU": "False",
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    }  # fmt: skip
    assert launch.settle(launched, "bf16") == []
    # Our own sign of the launcher, and the device.
    assert launched.keys() == {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "USE_TORCH_XLA"}


STRANGE = {
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "perhaps",
    "ACCELERATE_FP8_BACKEND": "NONE_SUCH",
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_CPU": "yes",
    "ACCELERATE_DEBUG_MODE": "no",
}


def test_accelerate_gets_nothing_but_the_recipes_settings(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        for name in read_by_accelerate() - launch.KEPT.keys() - launch.REFUSED.keys():
            if name != "ACCELERATE_TORCH_DEVICE":
                patch.setenv(name, "7")
        for name, value in STRANGE.items():
            patch.setenv(name, value)
        for name in ("USE_TORCH_XLA", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        environ: Any = os.environ
        assert len(launch.settle(environ, "no")) >= 3
        joined = runtime.accelerator_for("no", timedelta(minutes=1))
    assert (joined.mixed_precision, joined.gradient_accumulation_steps) == ("no", 1)
    assert joined.state.dynamo_plugin.backend == DynamoBackend.NO and joined.scaler is None
    assert joined.device.type == "cpu" and joined.num_processes == 1
    weight = torch.nn.Parameter(torch.ones(()))
    joined.backward(weight * 3)
    assert float(weight.grad or 0) == 3  # not divided by four


def test_the_settings_that_accelerate_took_are_checked(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(LaunchError, match="chose the device meta, which fasttrain does not"):
        runtime.accelerator_for("no")
