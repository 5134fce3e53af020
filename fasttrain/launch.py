"""Checks the environment variables of launchers, and removes those that a run ignores.

The recipe decides what is trained. `accelerate launch` passes its options and its config file on as
environment variables, and Accelerate reads these and more when it starts. Each variable is in one
of these tables: `KEPT`; `REFUSED`; or `NOT_USED` and `OF_THESE`, which are removed before
Accelerate is imported. This module needs no torch.
"""

import sys
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from fasttrain.faults import ConfigError, Fault

TRUE, FALSE = ("1", "true", "yes", "y", "on", "t"), ("0", "false", "no", "n", "off", "f")
LEVELS = ("debug", "info", "warning", "warn", "error", "critical", "fatal", "notset")
# These variables do not change what is trained. Each has the values that Accelerate can read; any
# value if the tuple is empty. ACCELERATE_MIXED_PRECISION only tells that `accelerate launch` was
# used: Accelerate gets the recipe's precision.
KEPT: dict[str, tuple[str, ...]] = {
    "ACCELERATE_USE_CPU": TRUE + FALSE,
    "ACCELERATE_DEBUG_MODE": TRUE + FALSE,
    "ACCELERATE_ENABLE_RICH": TRUE + FALSE,
    "ACCELERATE_LOG_LEVEL": LEVELS,
    "FORK_LAUNCHED": TRUE + FALSE,
    "ACCELERATE_MIXED_PRECISION": (),
}
# Ways to train that fasttrain does not have.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism",
}


class Unused(NamedTuple):
    """A variable that is removed. The user is warned unless its value is harmless."""

    harmless: tuple[str, ...]
    instead: str  # the reason, or what decides in its place


NOT_USED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": Unused(
        ("1",), "train.global_batch_size and train.micro_batch_size decide on accumulation"
    ),
    "ACCELERATE_GRADIENT_CLIPPING": Unused(("none",), "gradients are not clipped"),
    "ACCELERATE_DYNAMO_BACKEND": Unused(("no",), "train.execution decides on compiling"),
    "ACCELERATE_CPU_AFFINITY": Unused(FALSE, "each process is bound to the CPUs of its GPU anyway"),
    "ACCELERATE_DOWNCAST_BF16": Unused(FALSE, "it is for TPUs"),
}
# Prefixes of variables that matter only together with one of the above, or to programs that load
# large models in parts. `accelerate launch` always sets some of them.
OF_THESE = (
    "ACCELERATE_DYNAMO_", "ACCELERATE_FP8_", "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_",
    "ACCELERATE_SAGEMAKER_", "ACCELERATE_ALLOW_CP_", "ACCELERATE_BYPASS_DEVICE_MAP",
    "ACCELERATE_INIT_INCLUDE_BUFFERS", "ACCELERATE_IN_TPU_POD", "ACCELERATE_NUM_PROCESSES",
    "ACCELERATE_DEBUG_RDV_FILE", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_",
)  # fmt: skip
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")


class LaunchError(Fault, RuntimeError):
    """The launch is wrong. The message says how to launch. All ranks of a node raise it."""

    raised_on_every_rank = True


def number_in(environ: Mapping[str, str], name: str, default: int) -> int:
    """Reads a whole number that a launcher set in the environment.

    Args:
        default: the value of a variable that is not set, and the smallest value allowed.
    Raises:
        ConfigError: the value is not a whole number, or it is too small.
    """
    text = environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal()) or int(text) < default:
        raise ConfigError(
            f'{name} = "{text}" in the environment: expected a whole number, at least {default}; '
            "unset it, or let the launcher set it"
        )
    return int(text)


def on_cpu(environ: Mapping[str, str]) -> bool:
    """True if the launch forbids Accelerate to use a GPU."""
    return environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment without the launchers' variables, for a process without a launch."""
    launchers = ("RANK", "WORLD", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "GROUP_")
    return {key: value for key, value in environ.items() if not key.startswith(launchers)}


def settle(environ: MutableMapping[str, str], precision: str) -> list[str]:
    """Removes the variables that Accelerate must not read, and checks the others.

    Call it before Accelerate is imported.

    Args:
        environ: is changed.
        precision: `train.precision` of the recipe.
    Returns:
        A warning for each variable whose value is ignored.
    Raises:
        LaunchError: the launch asks for something that fasttrain does not do.
    """
    check_kind(environ)
    remarks = []
    for name in sorted(environ):
        known = NOT_USED.get(name)
        silent = name.startswith(OF_THESE) or name in REFUSED
        if name in KEPT or not (known or silent or name.startswith("ACCELERATE_")):
            continue
        value = environ.pop(name)
        if known and value.lower() not in ("", *known.harmless):
            remarks.append(f"WARNING: {name} = {value} is not used: {known.instead}")
        elif not (known or silent):
            remarks.append(f"WARNING: {name} = {value} is not used: fasttrain does not know it")
    for name, allowed in KEPT.items():
        value = environ.get(name, "").strip().lower()
        if not value:
            environ.pop(name, None)  # Accelerate fails on an empty value
        elif allowed and value not in allowed:
            raise LaunchError(
                f'{name} = "{environ[name]}" in the environment: expected {allowed[0]} or '
                f"{allowed[len(TRUE)] if allowed[0] == '1' else allowed[1]}; correct or unset it"
            )
    launched = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched.lower() not in ("no", precision):  # "no" is the launcher's default
        remarks.append(
            f"WARNING: ACCELERATE_MIXED_PRECISION = {launched} (of accelerate launch or its config "
            f"file) is not used: the recipe has train.precision = {precision}"
        )
    environ["USE_TORCH_XLA"] = "0"  # otherwise Accelerate uses torch_xla wherever it is installed
    return remarks


def check_kind(environ: Mapping[str, str]) -> None:
    """Checks that fasttrain has the kind of training and the device that the launch asks for.

    Raises:
        LaunchError: fasttrain does not have them.
    """
    for name, kind in REFUSED.items():
        sagemaker_off = (
            name == "ACCELERATE_USE_SAGEMAKER"
            and environ.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "").upper() == "NO"
        )
        if environ.get(name, "").lower() in TRUE and not sagemaker_off:
            raise LaunchError(
                f"the launch asks for {kind} ({name} = {environ[name]}, from Accelerate's config "
                "file or the environment), which fasttrain does not have: pass --multi_gpu "
                "--num_processes N to accelerate launch, or start one process with python "
                "fasttrain/train.py; if the variable is exported, unset it"
            )
    if environ.get("ACCELERATE_TORCH_DEVICE"):
        raise LaunchError(
            f"ACCELERATE_TORCH_DEVICE = {environ['ACCELERATE_TORCH_DEVICE']}: unset it; "
            "CUDA_VISIBLE_DEVICES chooses GPUs, and ACCELERATE_USE_CPU=1 the CPU"
        )
    tpu = "torch_xla" in sys.modules or environ.get("PJRT_DEVICE", "").upper() == "TPU"
    if tpu and not on_cpu(environ):
        raise LaunchError(
            "the launch asks for a TPU, which fasttrain does not train on: launch without --tpu "
            "and PJRT_DEVICE on a machine with NVIDIA GPUs, or set ACCELERATE_USE_CPU=1"
        )


def check_processes(environ: Mapping[str, str]) -> None:
    """Checks that the launched processes can find each other.

    Raises:
        LaunchError: each would train alone, or wait for processes that never join.
        ConfigError: a variable should be a whole number, and is not.
    """
    size = number_in(environ, "WORLD_SIZE", 1)
    if size != 1 and not environ.get("MASTER_ADDR"):
        raise LaunchError(
            f"WORLD_SIZE = {size} in the environment, but no MASTER_ADDR: start processes with "
            "accelerate launch, or unset it for one process"
        )
    together = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in together if not environ.get(name)]
    if environ.get("LOCAL_RANK", "-1") != "-1" and missing:  # Accelerate takes -1 as not set
        raise LaunchError(
            f"LOCAL_RANK = {environ['LOCAL_RANK']} in the environment, but no "
            f"{', '.join(missing)}: start processes with accelerate launch, or unset LOCAL_RANK "
            "for one process"
        )
    # With ACCELERATE_USE_CPU, Accelerate needs no LOCAL_RANK.
    if size != 1 and not on_cpu(environ) and not environ.get("LOCAL_RANK"):
        raise LaunchError(
            f"WORLD_SIZE = {size} and MASTER_ADDR in the environment, but no LOCAL_RANK, as in a "
            "pod of Kubernetes: each process would train alone; start the processes of each "
            "machine with accelerate launch --multi_gpu, as the README says for several machines"
        )
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in environ and tasks != "1":
        raise LaunchError(
            f"SLURM started {tasks} tasks, but no launcher connects their processes: each would "
            "train alone; use tools/train.sbatch, or accelerate launch "
            "--multi_gpu with --machine_rank $SLURM_NODEID in one task a node"
        )
    for name in MPI_SIZES:
        if "WORLD_SIZE" not in environ and environ.get(name, "1") != "1":
            raise LaunchError(
                f"MPI started {environ[name]} processes ({name}), but fasttrain does not use MPI: "
                "each would train alone; start with accelerate launch --multi_gpu "
                "--num_processes N instead of mpirun"
            )
