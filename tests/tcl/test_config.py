from pathlib import Path

import pytest

from tclkit.runtime.errors import ConfigError
from tclkit.tcl.config import TrainConfig, load_config, shipped_configs


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
        ("precision=fp16", "choose fp32 or bf16"),
        ("clip_training.batch_size=1", "needs 2 or more"),
        ("clip_training.warmup_steps=99999", "warmup_steps"),
        ("world.size=60", "multiple of clip.patch_size"),
        ("evaluation.seed=0", "scenes it has seen"),
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
    ],
)
def test_values_of_the_wrong_type_are_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_config("tcl-shapes", [override])
