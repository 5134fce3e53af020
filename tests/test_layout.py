"""Imports point down, file names are safe, and the lists of dependencies agree."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import CHECKOUT, REPO, SCRATCH, environment

PACKAGES = {"fasttrain", "benchmarks", "benchmarks.record", "exporting", "reporting"}
MODULES = {path.stem: path for path in (REPO / "fasttrain").glob("*.py")}
# Imports point down: a module knows those of the rows below its own.
ROWS = (
    {"train"},
    {"session"},
    {"deployed"},
    {"loop", "decoding", "modes", "trained"},
    {"checkpoint", "execution", "layer_trials"},
    {"evaluator", "guard", "kernel_build", "photos", "precise_bn", "weights"},
    {"description", "loaders"},
    {"alike", "compiling", "learner"},
    {
        "display",
        "distilling",
        "graphs",
        "makers",
        "metrics",
        "mixing",
        "predictions",
        "runtime",
        "trackers",
    },
    {"determinism", "gpus", "optim"},
    {"feed", "gather", "pipeline", "resize_gpu"},
    {"batch", "order", "pictures"},
    {"flat", "heartbeat", "lane", "model", "reading", "resize", "settled", "stopping"},
    {"augment", "depthwise", "fused_block", "run_folder", "staging", "teacher_labels"},
    {"forecast"},
    {"measured"},
    {"sampling"},
    {"sharding"},
    {"sources"},
    {"folders", "parquet", "wds"},
    {"classes", "splits"},
    {"imagenet", "spool"},
    {"archives"},
    {"listing"},
    {"decoder"},
    {"shards", "schedule", "launch", "matching", "settings_page"},
    {"caches", "config", "files", "operators", "rng"},
    {"arguments", "commands", "depthwise_gpu", "digests", "faults", "pointwise_gpu", "trials"},
    {"triton_parts"},
    {"__init__"},
)
# What a module imports only inside a function, from a row above its own.
LATE = {"model": {"trained"}}  # a network that is built with weights opens them
TORCH_FREE = {"train", "config", "rng", "schedule", "shards", "sampling", "run_folder"}
TORCH_FREE |= {"archives", "classes", "folders", "imagenet", "listing", "matching", "splits", "wds"}
TORCH_FREE |= {"sharding", "sources", "parquet", "spool", "reading"}
TORCH_FREE |= {"forecast", "decoding", "staging", "launch", "caches", "feed", "order"}
TORCH_FREE |= {
    "arguments",
    "commands",
    "faults",
    "decoder",
    "digests",
    "files",
    "measured",
    "settings_page",
    "settled",
    "teacher_labels",
    "trackers",
    "trials",
}


def imports_of(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports: `from fasttrain import x` as fasttrain.x."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: relative import"
            names = {alias.name for alias in node.names}
            package = node.module in PACKAGES
            found |= {f"{node.module}.{name}" for name in names} if package else {node.module}
    return found


def ours_of(path: Path, top_level_only: bool = False) -> set[str]:
    """Names of our modules that a file imports."""
    found = imports_of(path, top_level_only)
    return {name.split(".")[1] for name in found if name.startswith("fasttrain.")}


def test_every_module_has_its_row() -> None:
    assert set().union(*ROWS) == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    row = next(number for number, row in enumerate(ROWS) if name in row)
    below = set().union(*ROWS[row + 1 :])
    late = LATE.get(name, set())
    assert not late & ours_of(MODULES[name], top_level_only=True)
    assert ours_of(MODULES[name]) - late <= below


def test_dali_is_imported_for_the_pipeline_only() -> None:
    found = {n for n, p in MODULES.items() if any("dali" in m for m in imports_of(p))}
    assert found == {"augment", "pipeline"}


def reached_from(path: Path, at_start: bool = False) -> set[str]:
    """All that a file imports, directly or through our modules."""
    found, left = set[str](), [path]
    while left:
        for name in imports_of(left.pop(), top_level_only=at_start) - found:
            found.add(name)
            file = f"{name.replace('.', '/')}.py"
            left += [path for path in (REPO / file, REPO / "tools" / file) if path.exists()]
    return found


def test_loaders_import_dali_only_when_a_batch_needs_it() -> None:
    # Raw shards on a GPU need none.
    found = reached_from(MODULES["loaders"], at_start=True)
    assert {"fasttrain.makers", "torch"} <= found
    assert not any("dali" in name for name in found)
    assert any("dali" in name for name in reached_from(MODULES["loaders"]))


STEPS = "tools/benchmarks/steps.py"


@pytest.mark.parametrize("path", ["fasttrain/loop.py", STEPS, "tests/test_loop.py"])
def test_the_loop_reaches_no_dali(path: str) -> None:
    found = reached_from(REPO / path)
    assert "fasttrain.batch" in found and "fasttrain.loaders" not in found
    assert not any("dali" in name for name in found)


@pytest.mark.parametrize("name", sorted(TORCH_FREE))
def test_login_node_modules_need_no_torch(name: str) -> None:
    heavy = {"torch", "accelerate", "nvidia", "torchvision", "safetensors"}
    top = {m.split(".")[0] for m in imports_of(MODULES[name], top_level_only=True)}
    assert not top & heavy


def test_no_module_hides_another() -> None:
    # `accelerate launch fasttrain/train.py` puts fasttrain/ first on the import path.
    hidden = set(MODULES) & (sys.stdlib_module_names | {"datasets", "models", "utils"})
    assert hidden <= {"__init__"}


def test_cuda_12_differs_in_dali_alone() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    cuda13 = project["project"]["dependencies"]
    cuda12 = project["dependency-groups"]["cuda12"]
    assert [d.replace("cuda120", "cuda130") for d in cuda12] == cuda13


def test_the_top_level_has_only_known_files() -> None:
    allowed = {"pyproject.toml", "fasttrain", "tools", "recipes", "tests", "README.md"}
    allowed |= {"LICENSE", "CHANGELOG.md"}
    ignored = {"data", "runs", "build"} | {p.name for p in REPO.glob("*.egg-info")}
    found = {p.name for p in REPO.iterdir() if not p.name.startswith((".", "__"))}
    assert found - ignored <= allowed


def test_the_list_of_modules_is_complete() -> None:
    """fasttrain/README.md lists every module once, and marks those that import no torch."""
    page = (REPO / "fasttrain" / "README.md").read_text()
    listed = re.findall(r"^(\w+)\.py +(\*| ) \S", page, re.M)
    assert sorted(name for name, _ in listed) == sorted(set(MODULES) - {"__init__"})
    assert {name for name, mark in listed if mark == "*"} == TORCH_FREE


def test_tests_cannot_reach_what_the_user_keeps() -> None:
    """Tests cannot reach the user's data, runs and caches."""
    assert Path.cwd() == CHECKOUT and (CHECKOUT / "fasttrain" / "train.py").exists()
    assert not (CHECKOUT / "data").is_symlink() and not (CHECKOUT / "runs").is_symlink()
    assert not CHECKOUT.is_relative_to(REPO)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "TRITON_CACHE_DIR"):
        assert environment()[name].startswith(str(SCRATCH))
