"""A folder for the Hugging Face Hub: weights, description and model card; and its upload."""

import json
from pathlib import Path
from typing import Any

from torch import nn

import fasttrain
from exporting.forms import safetensors_bytes
from fasttrain import config, files
from fasttrain.description import Description
from fasttrain.faults import ConfigError, Fault
from fasttrain.trained import CONFIG, MODEL, Trained

CARD = "README.md"
NAMES = {CONFIG, MODEL, CARD}
# Settings that name places on the machine that trained.
PLACES = ("data.root", "data.stage", "log.run_dir", "model.weights", "checkpoint.resume")


class PushError(Fault, RuntimeError):
    """The Hub did not take the folder. The message says why, and what to do."""


def write(trained: Trained, network: nn.Module, folder: Path, repo: str | None) -> None:
    """Writes the folder, which appears with all its files at once. It must not exist.

    Args:
        repo: its name on the Hub, USER/NAME, for the card; None if it is not known.
    Raises:
        OSError: the file system refused.
    """
    described = trained.description
    settings = {"library_name": "fasttrain", **described.model_dump(mode="json")}
    contents = {
        CONFIG: json.dumps(settings, indent=1).encode() + b"\n",
        MODEL: safetensors_bytes(network, described),
        CARD: card(described, trained.recipe, repo or folder.name).encode(),
    }
    files.write_folder(folder, contents)


def remove(folder: Path) -> None:
    """Removes an earlier export.

    Raises:
        ConfigError: the folder holds other files too.
    """
    others = sorted({path.name for path in folder.iterdir()} - NAMES)
    if others:
        raise ConfigError(
            f"{folder} holds files that are not of an export ({', '.join(others[:3])}), so "
            "--overwrite does not remove it; choose another folder"
        )
    files.remove_folder(folder)


def card(described: Description, recipe: config.Recipe | None, repo: str) -> str:
    """The model card, in Markdown.

    Args:
        recipe: the recipe that trained the network, if it is known.
        repo: where the network is loaded from: USER/NAME on the Hub, or a folder.
    """
    return f"---\n{_front_matter(described, recipe, repo)}\n---\n\n{_text(described, recipe, repo)}"


def _front_matter(described: Description, recipe: config.Recipe | None, repo: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    options: dict[str, Any] = {}
    if described.top1 is not None and recipe:
        measured = EvalResult(
            task_type="image-classification",
            dataset_type=recipe.data.root.name,
            dataset_name=recipe.data.root.name,
            metric_type="accuracy",
            metric_name="top-1",
            metric_value=round(described.top1 / 100, 6),
        )
        options = {"eval_results": [measured], "model_name": repo.rpartition("/")[2]}
    tags = ["mobilenetv3", "image-classification", "pytorch"]
    found = ModelCardData(
        library_name="fasttrain", pipeline_tag="image-classification", tags=tags, **options
    )
    return str(found.to_yaml())


def _text(described: Description, recipe: config.Recipe | None, repo: str) -> str:
    how = described.preprocessing
    kind = "moving average of the weights" if described.average else "weights of the last update"
    accuracy = "not known"
    if described.top1 is not None and described.top5 is not None:
        accuracy = f"{described.top1:.2f} % / {described.top5:.2f} % on the validation images"
    rows = [
        ("network", f"{described.network}, modules and names of d-li14/mobilenetv3.pytorch"),
        ("classes", f"{described.num_classes:,}{_first_names(described)}"),
        ("weights", kind),
        ("top-1 / top-5", accuracy),
    ]
    if recipe:
        rows.append(("data", f"`{recipe.data.root.name}`"))
        rows.append(("epochs", f"{recipe.train.epochs:,}"))
    table = "\n".join(f"| {name} | {text} |" for name, text in rows)
    width = "" if described.width == 1 else f"{described.width:g}, "
    call = f"mobilenetv3_{described.arch}({width}weights=folder)"
    source = f'snapshot_download("{repo}")' if "/" in repo else f'"{repo}"'
    imports = ["from huggingface_hub import snapshot_download"] if "/" in repo else []
    code = "\n".join(
        [
            *imports,
            f"from fasttrain.model import mobilenetv3_{described.arch}",
            "",
            f"folder = {source}",
            f"network = {call}.eval()",
        ]
    )
    parts = [
        f"# {described.network}",
        f"Trained with fasttrain {fasttrain.__version__}.",
        f"| | |\n|---|---|\n{table}",
        "## Preprocessing",
        f"Decode to RGB without EXIF rotation. Resize the shorter side to {how.resize_px} pixels "
        f"({how.interpolation}, with antialiasing). Cut the central {how.crop_px} x {how.crop_px} "
        "pixels. Divide by 255, subtract the mean and divide by the standard deviation:\n\n"
        f"    mean = {list(how.mean)}\n    std = {list(how.std)}",
        "## How to load it",
        f"```python\n{code}\n```",
        "To classify images: `python tools/predict.py FOLDER IMAGE`, in a checkout of fasttrain.",
        "timm's networks of this name have tensors of the same shapes, but other logits: timm "
        "applies squeeze-excite after the activation, this network before it.",
    ]
    if recipe:
        settings = config.dumps(recipe, leave_out=PLACES).strip()
        parts += ["## Recipe", f"```toml\n{settings}\n```"]
    return "\n\n".join(parts) + "\n"


def _first_names(described: Description) -> str:
    if described.classes is None:
        return " without names"
    shown = ", ".join(f"`{name}`" for name in described.classes[:5])
    more = ", and so on" if len(described.classes) > 5 else ""
    return f": {shown}{more} (`{CONFIG}` lists all)"


def check_name(repo: str) -> None:
    """Checks a name on the Hub.

    Raises:
        ConfigError: it is not USER/NAME.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo}: {error}") from None
    if "/" not in repo:
        raise ConfigError(f"--push {repo}: expected USER/NAME, such as me/mobilenetv3")


def push(folder: Path, repo: str, private: bool, api: Any = None) -> str:
    """Uploads the folder as the repository USER/NAME, which is made if there is none.

    Args:
        private: make a new repository private.
        api: replaces `huggingface_hub.HfApi()`, which finds the user's token by itself.
    Returns:
        The address of the upload.
    Raises:
        PushError: the Hub refused.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Export of fasttrain"
        )
    except Exception as error:  # of the network, of the token, of the Hub
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PushError(
            f"--push {repo}: the Hub did not take the folder ({reason}); {folder} is complete. "
            "Log in with `hf auth login`, or set HF_TOKEN, and push again with --overwrite"
        ) from None
    return str(done)
