"""The shipped recipes load, `--set` changes them, and each kind of fault gets its message."""

import re
from pathlib import Path
from typing import Literal

import pytest
from conftest import REPO, Refused, run

from fasttrain import config
from fasttrain.faults import ConfigError

RECIPES = sorted((REPO / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_survive_writing(path: Path, tmp_path: Path) -> None:
    recipe = config.load(path)
    assert recipe.log.run_dir == Path("runs") / path.stem
    copy = tmp_path / "copy.toml"
    for comments in (False, True):
        copy.write_text(config.dumps(recipe, comments=comments))
        assert config.load(copy) == recipe


@pytest.mark.parametrize(
    ("name", "arch", "width", "dropout", "smoothing"),
    [
        ("large", "large", 1.0, 0.2, 0.1),
        ("large_075", "large", 0.75, 0.2, 0.1),
        ("small", "small", 1.0, 0.2, 0.0),
        ("small_075", "small", 0.75, 0.1, 0.0),
    ],
)
def test_shipped_recipes_are_the_published_ones(
    name: str, arch: Literal["large", "small"], width: float, dropout: float, smoothing: float
) -> None:
    recipe = config.load(REPO / "recipes" / f"{name}.toml")
    assert recipe.model == config.Model(arch=arch, width=width, dropout=dropout)
    assert recipe.optim == config.Optim(
        lr=0.4, warmup_lr=0.1, warmup_epochs=5, final_lr=0, momentum=0.9, weight_decay=4e-5
    )
    train = recipe.train
    assert (train.epochs, train.global_batch_size, train.label_smoothing) == (150, 1024, smoothing)
    assert recipe.data.crop_area == (0.08, 1.0) and recipe.data.crop_ratio == (3 / 4, 4 / 3)
    assert (recipe.data.crop_px, recipe.data.eval_resize_px, recipe.data.eval_crop_px) == (
        224, 256, 224,
    )  # fmt: skip


@pytest.mark.parametrize("value", ["none", "digits"])
def test_a_run_folder_of_an_earlier_version_opens(value: str, tmp_path: Path) -> None:
    recipe = config.load(REPO / "recipes/demo.toml")
    path = tmp_path / "recipe.toml"
    path.write_text(config.dumps(recipe).replace("[data]", f'[data]\nprepare = "{value}"'))
    assert config.load(path, written_by_run=True) == recipe
    if value == "none":  # this value had no effect
        assert config.load(path) == recipe
    else:
        with pytest.raises(ConfigError, match=r"python tools/make_digits\.py"):
            config.load(path)


def test_set_changes_values_of_any_type() -> None:
    recipe = config.load(
        REPO / "recipes/large.toml",
        [
            "train.epochs=90",
            "log.run_dir=/tmp/a run",
            "data.crop_area=[0.5, 1]",
            "data.crop_px=[[0, 128], [60, 224]]",
            "optim.nesterov = true",
            "data.root=$HOME/x",
        ],
    )
    assert recipe.train.epochs == 90
    assert recipe.log.run_dir == Path("/tmp/a run")
    assert recipe.data.crop_area == (0.5, 1.0)
    assert recipe.data.crop_px == ((0, 128), (60, 224))
    assert config.Data(crop_px=((0, 128), (60, 224))).crop_px == ((0, 128), (60, 224))
    assert recipe.optim.nesterov is True
    assert recipe.data.root == Path.home() / "x"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.weight_decy=1", "[optim] weight_decy: unknown key; did you mean weight_decay?"),
        ('train.epochs="300"', '[train] epochs = "300": expected int, got str'),
        ("train.epochs=1.5", "[train] epochs = 1.5: expected int, got float"),
        ("train.epochs=0", "[train] epochs = 0: must be greater than or equal to 1"),
        ("model.arch=medium", "[model] arch = \"medium\": must be 'large' or 'small'"),
        ("data.flip=1", "[data] flip = 1: expected bool, got int"),
        ("data.crop_area=[0.5]", "[data] crop_area[1] = [0.5]: expected one more value"),
        (
            "data.crop_area=[0.9, 0.1]",
            "[data] crop_area = [0.9, 0.1]: needs 0 < smallest <= largest <= 1",
        ),
        ("data.crop_ratio=[2, 1]", "[data] crop_ratio = [2, 1]: needs 0 < smallest <= largest"),
        ("data.eval_crop_px=300", "[data] eval_crop_px = 300: larger than the resized image"),
        ("data.crop_px=16", "[data] crop_px = 16: must be at least 32 pixels"),
        ("data.crop_px=224.5", "[data] crop_px = 224.5: expected a number of pixels, or pairs"),
        ("data.crop_px=[[1, 128]]", "[data] crop_px = [[1, 128]]: epochs must start at 0 and rise"),
        ("data.crop_px=[[0, 64], [0, 96]]", "epochs must start at 0 and rise"),
        (
            "data.scales_px=[128]",
            "[data] scales_px = [128]: one size is no choice; use crop_px = 128",
        ),
        (
            "data.scales_px=[64, 16]",
            "[data] scales_px[1] = 16: must be greater than or equal to 32",
        ),
        (
            "data.scales_px=[64, 96, 64]",
            "[data] scales_px = [64, 96, 64]: names a size twice; all sizes are equally likely",
        ),
        ("data.augment_magnitude=31", "must be less than or equal to 30"),
        (
            "data.augment_ops=3",
            '[data] augment_ops = 3: only RandAugment uses it; set augment = "rand"',
        ),
        ("data.color_jitter=[0, 0, 0, 0.6]", "[data] color_jitter[3] = 0.6: the hue turns by"),
        ("data.color_jitter=[0, -1, 0, 0]", "[data] color_jitter[1] = -1: must be greater than or"),
        ("data.erase=1.5", "[data] erase = 1.5: must be less than or equal to 1"),
        ("train.mixup_alpha=-1", "[train] mixup_alpha = -1: must be greater than or equal to 0"),
        ("optim.lr=nan", "[optim] lr = NaN: must be a finite number"),
        (
            "optim.warmup_epochs=200",
            "[optim] warmup_epochs = 200: longer than the run ([train] epochs = 150); "
            "lower warmup_epochs or raise epochs",
        ),
        (
            "optim.betas=[0.9, 0.99]",
            '[optim] betas = [0.9, 0.99]: only adamw uses it; set name = "adamw", or delete betas',
        ),
        (
            "optim.name=adamw&optim.nesterov=true",
            '[optim] nesterov = true: only sgd uses it; set name = "sgd", or delete nesterov',
        ),
        (
            "optim.name=adamw&optim.lr=0.004",
            "[optim] warmup_lr = 0.1: larger than lr = 0.004; adamw needs a lower one, such as 0",
        ),
        ("optim.name=lamb", "[optim] name = \"lamb\": must be 'sgd' or 'adamw'"),
        (
            "optim.lr_batch=256",
            '[optim] lr_batch = 256: only lr_scaling uses it; set lr_scaling = "linear" or "sqrt"',
        ),
        ("optim.momentum=1", "[optim] momentum = 1: must be less than 1"),
        (
            "model.drop_path=0.1&train.kernels=force",
            "[train] kernels = force: the fused kernels have no stochastic depth; use kernels = "
            '"auto", or [model] drop_path = 0',
        ),
        ("checkpoint.keep=1", "[checkpoint] keep = 1: must be greater than or equal to 2"),
        (
            "data.prepare=digits",
            "[data] prepare: fasttrain no longer has this key; delete it; the demo's data "
            "set is now made by `python tools/make_digits.py`",
        ),
        (
            "distill.weight=0.5",
            "[distill] weight = 0.5: there is no teacher; set labels (python tools/label.py makes "
            "them) or teacher",
        ),
        ("distill.temperature=0", "[distill] temperature = 0: must be greater than 0"),
        ("distill.other_code=true", "[distill] other_code = true: no labels are read; set labels"),
        ("trian.epochs=1", "[trian]: unknown section; did you mean train?"),
        ("train=3", "--set train=3: expected section.key=value, for example train.epochs=90"),
        ("train.epochs", "--set train.epochs: expected section.key=value"),
    ],
)
def test_faults_name_the_place_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(REPO / "recipes/large.toml", override.split("&"))
    assert message in str(error.value)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf[train]\r\nepochs = 7\r\n")
    assert config.load(path).train.epochs == 7


def test_long_values_are_cut_short(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(REPO / "recipes/large.toml", [f"model.arch={'x' * 9999}"])
    assert "xxx...: must be 'large' or 'small'" in str(error.value)
    assert len(str(error.value)) < 500


def test_sizes_come_from_a_schedule_or_are_drawn() -> None:
    both = ["data.scales_px=[128, 224]", "data.crop_px=[[0, 128], [9, 224]]"]
    with pytest.raises(ConfigError) as error:
        config.load(REPO / "recipes/large.toml", both)
    assert str(error.value).endswith(
        "[data] scales_px = [128, 224]: crop_px is a schedule of sizes already; set scales_px = "
        "[], or crop_px to one size"
    )


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ConfigError, match="nesterov = true: needs momentum above 0"):
        config.load(REPO / "recipes/large.toml", ["optim.nesterov=true", "optim.momentum=0"])


def test_a_run_has_one_teacher_and_a_view_one_size() -> None:
    path = REPO / "recipes/large.toml"
    with pytest.raises(ConfigError) as error:
        config.load(path, ["distill.labels=a", "distill.teacher=b"])
    assert (
        "[distill] labels and teacher are both set: the labels are the answers of a teacher "
        "already; remove one of the two"
    ) in str(error.value)
    sizes = "data.crop_px=[[0, 128], [60, 224]]"
    with pytest.raises(ConfigError) as error:
        config.load(path, ["distill.views=50", sizes])
    assert (
        "[distill] views = 50: a view has one size, but [data] crop_px changes it from epoch to "
        "epoch; use one crop_px, or views = 0"
    ) in str(error.value)
    assert config.load(path, ["distill.labels=a", sizes]).distill.on
    scales = "data.scales_px=[128, 160]"
    with pytest.raises(ConfigError) as error:
        config.load(path, ["distill.labels=a", scales])
    assert (
        "[data] scales_px = [128, 160]: stored labels are of images of one size in an epoch; use "
        "crop_px, or a teacher in the run: [distill] teacher"
    ) in str(error.value)
    assert config.load(path, ["distill.teacher=a", scales]).distill.on


def test_all_faults_of_a_recipe_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('data = 3\n[train]\nepochs = "300"\nseed = -1\n[optim]\nlearning_rate = 1\n')
    with pytest.raises(ConfigError) as error:
        config.load(path)
    first, *faults = str(error.value).split("\n  ")
    assert first == f"{path}: 4 problems" and len(faults) == 4


def test_unreadable_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml: cannot read this recipe"):
        config.load(tmp_path / "nowhere.toml")
    path = tmp_path / "broken.toml"
    path.write_text("[train\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        config.load(path)


def test_differences_name_what_makes_another_run() -> None:
    path = REPO / "recipes/large.toml"
    old = config.load(path)
    new = config.load(path, ["train.seed=1", "log.every_steps=7", "train.max_steps=3"])
    assert config.differences(old, new) == ["train.seed: 0 -> 1"]


def test_marked_fields_may_vary_within_a_run() -> None:
    per_machine = {
        "data.root",
        "data.stage",
        "data.threads",
        "distill.labels",
        "distill.teacher",
        "log.run_dir",
        "train.cpu_threads",
    }
    on_resume = {
        *("data.stage_part", "data.stage_keep", "data.read", "data.read_ahead"),
        *("data.read_threads", "data.decode", "data.hw_decoder_load", "data.jpeg_fancy_upsampling"),
        *("data.verify", "data.on_bad_sample", "data.max_bad_samples", "data.queue_depth"),
        *("train.execution", "train.max_steps", "train.micro_batch_size", "train.hang_timeout_s"),
        *("train.deterministic", "train.max_skipped_steps", "train.kernels"),
        *("checkpoint.every_steps", "checkpoint.keep", "checkpoint.max_failures"),
        *("checkpoint.resume", "checkpoint.keep_best", "log.every_steps", "log.samples"),
        *("log.trackers", "distill.other_code"),
    }
    assert config.may_vary(per_machine=True) == per_machine
    assert config.may_vary() == per_machine | on_resume


def test_help_says_what_each_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    for command, said in (
        (config.load_or_exit, "Trains the network of a recipe"),
        (config.main, "Prints a recipe in full as TOML"),
    ):
        with pytest.raises(SystemExit):
            command(["--help"])
        assert said in capsys.readouterr().out


def test_command_line_prints_the_recipe_in_full(tmp_path: Path) -> None:
    done = run(["python", "-m", "fasttrain.config", "recipes/small.toml", "--set", "train.seed=5"])
    printed = tmp_path / "small.toml"
    printed.write_text(done.stdout)
    assert config.load(printed) == config.load(REPO / "recipes/small.toml", ["train.seed=5"])
    # tools/train.sbatch looks for such a line.
    assert re.findall(r'^run_dir = "(.*)"$', done.stdout, re.MULTILINE) == ["runs/small"]
    failed = run(["python", "-m", "fasttrain.config", "recipes/none.toml"], code=2)
    assert "recipes/none.toml: cannot read this recipe" in failed.stderr


def test_each_printed_field_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    config.main([str(REPO / "recipes/large.toml"), "--set", "data.erase=0.25"])
    printed = capsys.readouterr().out
    erased = "Fraction of the training images in which a random rectangle is erased"
    assert f"\n\n# {erased}. Default: 0.0.\nerase = 0.25\n\n" in printed
    assert "\n\n# Mirror each training image with probability 0.5.\nflip = true\n\n" in printed
    assert "\n# short_side is unset\n" in printed
    assert max(map(len, printed.splitlines())) <= 100
    blocks = [block.splitlines() for block in printed.split("\n\n") if block.strip()]
    fields = sum(
        len(type(table.default).model_fields) for table in config.Recipe.model_fields.values()
    )
    assert len(blocks) == fields + len(config.Recipe.model_fields)
    for *comments, field in blocks:
        assert all(line.startswith("# ") and line[2:].strip() for line in comments) and comments
        assert field.startswith(("[", "# ")) or " = " in field
        assert comments[-1].endswith((".", "]`."))


def test_two_recipes_are_compared(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, refused: Refused
) -> None:
    path = str(REPO / "recipes/large.toml")
    config.main(["--diff", path, path])
    assert capsys.readouterr().out == "The recipes have the same settings.\n"
    config.main(["--diff", path, path, "--set", "train.max_steps=3", "--set", "data.root=/data"])
    assert capsys.readouterr().out == (
        'data.root: "data/imagenet" -> "/data"    # may differ between the machines of a run\n'
        "train.max_steps: unset -> 3    # may change when a run resumes\n\n"
        "All of these may change within a run: a run of the first recipe can resume with the "
        "second one.\n"
    )
    config.main(["--diff", path, path, "--set", "train.seed=1", "--set", "log.samples=true"])
    assert capsys.readouterr().out == (
        "train.seed: 0 -> 1\n"
        "log.samples: false -> true    # may change when a run resumes\n\n"
        "A setting without a comment makes another run: a run of the first recipe cannot resume "
        "with the second one.\n"
    )
    refused(config.main, ["--diff", path, tmp_path / "none.toml"], "none.toml: cannot read this")
    refused(config.main, [path, "--diff", path, path], "name one recipe, or two after --diff")
    refused(config.main, [], "name one recipe, or two after --diff")
