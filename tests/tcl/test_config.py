from pathlib import Path

import pytest

from tclkit.runtime.errors import ConfigError
from tclkit.tcl.config import TrainConfig, load_config, shipped_configs
from tclkit.tcl.schedule import scaled_learning_rate


def test_every_shipped_config_loads_and_survives_a_round_trip() -> None:
    assert "tcl-shapes" in shipped_configs()
    for name in shipped_configs():
        config = load_config(name)
        assert config.name == name
        assert TrainConfig.from_dict(config.to_dict()) == config


def test_overrides_take_toml_values_and_bare_words() -> None:
    config = load_config(
        "tcl-shapes", ["grounder_training.steps=700", "losses.area=0", "precision=fp32", "name='mine'"]
    )
    assert config.grounder_training.steps == 700
    assert config.losses.area == 0
    assert config.precision == "fp32"
    assert config.name == "mine"


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    shipped = Path(load_config.__code__.co_filename).parent / "configs" / "tcl-shapes.toml"
    own = tmp_path / "own.toml"
    own.write_text(shipped.read_text().replace("seed = 0", "seed = 5", 1))
    assert load_config(own).seed == 5


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("clip_training.step=3", "unknown key 'step'.*did you mean 'steps'"),
        ("losses.arena=3", "did you mean 'area'"),
        ("wrold.size=3", "unknown key 'wrold'.*'world'"),
        ("precision=fp8", "choose fp32, bf16 or fp16"),
        ("device=tpu", "choose auto, cpu or cuda"),
        ("workers=-1", "workers"),
        ("grounder_training.accumulate=0", "accumulate"),
        ("grounder_training.ema=1.0", "below 1"),
        ("clip_training.accumulate=2", "grounder_training"),
        ("monitoring.keep_every=-1", "keep_every"),
        ("monitoring.validate_every=5", "name a benchmark"),
        ("monitoring.pictures_every=5", "tensorboard is false"),
        ('pairs.sources=["x.tar"]', "there is both"),
        ("clip_training.batch_size=1", "needs 2 or more"),
        ("clip_training.warmup_steps=99999", "warmup_steps"),
        ("world.size=60", "multiple of clip.patch_size"),
        ("evaluation.seed=0", "scenes it has seen"),
        ("evaluation.scenes=0", r"evaluation\.scenes is 0; it must be 1 or more"),
        ("evaluation.threshold_scenes=0", r"evaluation\.threshold_scenes is 0"),
        ("evaluation.batch_size=0", r"evaluation\.batch_size is 0"),
        ("evaluation.seed=-3", r"evaluation\.seed is -3; it must be 0 or more"),
        ("world.seed=-1", r"world\.seed is -1"),
        ("seed=-1", "seed is -1; it must be 0 or more"),
        ("curriculum.single_until=0.9", "single_until"),
        ("steps", "not of the form"),
        ("seed.more=1", "is a value, not a section"),
    ],
)
def test_wrong_values_are_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_config("tcl-shapes", [override])


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="tcl-shapes"):
        load_config("tcl-shape")


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("name = ")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("clip_training.steps=many", "steps in .* must be a whole number, not 'many'"),
        ("clip_training.steps=1.5", "steps in .* must be a whole number, not 1.5"),
        ("clip_training.steps=true", "steps in .* must be a whole number, not True"),
        ("clip_training.lr=fast", "lr in .* must be a number, not 'fast'"),
        ("clip.quick_gelu=1", "quick_gelu in .* must be true or false, not 1"),
        ("name=3", "name in .* must be a text, not 3"),
        ("world=5", "world in .* must be a section or nothing, not 5"),
        ("losses=true", "losses in .* must be a section, not True"),
        ("grounder_training=3", "grounder_training in .* must be a section, not 3"),
        ("clip.vision_layer_scale=true", "vision_layer_scale in .* must be a number or nothing, not True"),
        ("pairs.sources=shards.tar", "sources in .* must be a list, each of it a text, not 'shards.tar'"),
        ("pairs.sources=[1]", "sources in .* must be a list, each of it a text"),
        ('pairs={sources=["a"], weights=[true]}', "weights in .* must be a list, each of it a number"),
    ],
)
def test_values_of_the_wrong_type_are_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_config("tcl-shapes", [override])


def test_accumulated_batches_have_no_faults_to_reproduce() -> None:
    with pytest.raises(ConfigError, match="accumulate = 1"):
        load_config("tcl-shapes", ["losses.reference_bugs=true", "grounder_training.accumulate=2"])


def test_the_papers_recipe_is_the_authors() -> None:
    """The values of the configuration that the authors' own checkpoint holds, and of their learning rate's course."""
    config = load_config("tcl-vit-b-16")
    recipe = config.grounder_training
    assert (recipe.steps, recipe.warmup_steps, config.grounder.decoder_only_steps) == (50_000, 15_000, 30_000)
    assert (recipe.batch_size, recipe.weight_decay, recipe.clip_grad) == (64, 0.05, 5.0)
    assert scaled_learning_rate(recipe.lr, 1024) == pytest.approx(7.5e-5)
    assert scaled_learning_rate(recipe.min_lr, 1024) == pytest.approx(1e-5)
    losses = config.losses
    assert (losses.tcl, losses.area, losses.tv, losses.area_prior) == (0.1, 0.4, 1.0, 0.4)
    changed = config.augmentation
    assert (changed.size, changed.min_crop, changed.colour_jitter, changed.rand_augment) == (224, 0.08, 0.4, 9)
    assert config.precision == "fp16"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ('clip_checkpoint=""', "pairs need a CLIP"),
        ("clip_training={steps=3,batch_size=2,lr=1.0,min_lr=0.0,warmup_steps=0}", "not trained on"),
        ("pairs.sources=[]", "sources is empty"),
        ("world.size=64", "there is both"),
        ("augmentation.erase=2.0", "erase"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_config("tcl-vit-b-16", [override])


def test_a_configuration_of_pairs_comes_back_from_plain_values() -> None:
    config = load_config("tcl-vit-b-16")
    assert "world" not in config.to_dict()
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_a_value_that_a_section_refuses_is_told_with_the_section():
    with pytest.raises(ConfigError, match=r"steps \(-1\) does not hold \(in tcl-shapes, \[grounder_training\]\)"):
        load_config("tcl-shapes", ["grounder_training.steps=-1"])
