"""The recipe is settled once, with one sentence for each field that changes."""

import pytest

from fasttrain import settled
from fasttrain.config import Checkpoint, Data, Recipe, Train
from fasttrain.faults import ConfigError


def test_a_recipe_that_fits_stays_as_it_is() -> None:
    for recipe in (Recipe(), Recipe(checkpoint=Checkpoint(resume="anew"))):
        assert settled.for_training(recipe, {}) == (recipe, [])
    assert settled.for_evaluation(Recipe(), None, has_gpu=False) == (Recipe(), [])


def test_a_job_that_slurm_starts_again_resumes() -> None:
    recipe = Recipe(checkpoint=Checkpoint(resume="anew"))
    found, (remark,) = settled.for_training(recipe, {"SLURM_RESTART_COUNT": "2"})
    assert found == Recipe()
    assert remark.startswith('checkpoint.resume = "anew" becomes "auto": SLURM has started')
    assert settled.for_training(Recipe(), {"SLURM_RESTART_COUNT": "2"}) == (Recipe(), [])
    with pytest.raises(ConfigError, match='SLURM_RESTART_COUNT = "many"'):
        settled.for_training(recipe, {"SLURM_RESTART_COUNT": "many"})


def test_a_deterministic_run_decodes_on_the_cpu() -> None:
    train = Train(deterministic=True)
    found, (remark,) = settled.for_training(Recipe(train=train), {})
    assert found == Recipe(train=train, data=Data(decode="cpu"))
    assert remark.startswith('data.decode = "auto" becomes "cpu": train.deterministic is true')
    for decode in ("cpu", "gpu_full"):  # what a user asks for is checked elsewhere
        recipe = Recipe(train=train, data=Data(decode=decode))
        assert settled.for_training(recipe, {}) == (recipe, [])


def test_an_evaluation_may_run_on_another_machine() -> None:
    recipe = Recipe(train=Train(precision="fp16"), data=Data(decode="gpu_window"))
    found, remarks = settled.for_evaluation(recipe, None, has_gpu=False)
    assert (found.train.precision, found.data.decode) == ("no", "auto")
    assert remarks == [
        'data.decode = "gpu_window" becomes "auto": this machine may be another one',
        'train.precision = "fp16" becomes "no": fp16 needs a GPU',
    ]
    found, remarks = settled.for_evaluation(recipe, "bf16", has_gpu=True)
    assert found.train.precision == "bf16" and len(remarks) == 1
