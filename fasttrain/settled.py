"""Settles the recipe once, at the start. Nothing changes it later. Needs no torch.

Some fields depend on each other or on the environment. Each function returns the final recipe, and
one sentence for each field that it changed.
"""

from collections.abc import Mapping

from fasttrain import launch, run_folder
from fasttrain.config import Recipe


def for_training(recipe: Recipe, environ: Mapping[str, str]) -> tuple[Recipe, list[str]]:
    """Returns the recipe for a run that starts in this environment.

    Raises:
        ConfigError: `SLURM_RESTART_COUNT` is not a number.
    """
    remarks = []
    restarts = launch.number_in(environ, "SLURM_RESTART_COUNT", 0)
    resume = run_folder.resume_of(recipe)
    kept = resume.after_restart if restarts else resume
    if kept != resume:
        remarks.append(
            f'checkpoint.resume = "{resume.text}" becomes "{kept.text}": SLURM has started '
            f"this job again (SLURM_RESTART_COUNT = {restarts}), and its work is kept"
        )
        recipe = _with(recipe, "checkpoint", resume=kept.text)
    if recipe.train.deterministic and recipe.data.decode == "auto":
        remarks.append(
            'data.decode = "auto" becomes "cpu": train.deterministic is true, and decoding on a '
            "GPU is not known to repeat"
        )
        recipe = _with(recipe, "data", decode="cpu")
    return recipe, remarks


def for_evaluation(
    recipe: Recipe, precision: str | None, has_gpu: bool
) -> tuple[Recipe, list[str]]:
    """Returns the recipe of a trained network for an evaluation on this machine.

    Args:
        precision: replaces `train.precision`; None keeps it.
        has_gpu: True if this machine has a GPU.
    """
    remarks = []
    if recipe.data.decode != "auto":
        remarks.append(
            f'data.decode = "{recipe.data.decode}" becomes "auto": this machine may be another one'
        )
        recipe = _with(recipe, "data", decode="auto")
    if precision:
        recipe = _with(recipe, "train", precision=precision)
    elif recipe.train.precision == "fp16" and not has_gpu:
        remarks.append('train.precision = "fp16" becomes "no": fp16 needs a GPU')
        recipe = _with(recipe, "train", precision="no")
    return recipe, remarks


def _with(recipe: Recipe, section: str, **values: object) -> Recipe:
    changed = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update={section: changed})
