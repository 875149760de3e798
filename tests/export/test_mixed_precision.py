"""The search for the most INT8 that passes."""

import dataclasses
import math
from collections.abc import Sequence

import pytest

from tclkit.export.gates import GateFigures, GateThresholds
from tclkit.export.layers import Layer
from tclkit.export.mixed_precision import WORST_LOSS, choose_layers

THRESHOLDS = GateThresholds(label_agreement=0.97, mask_iou=0, features_cosine=0)


def layer(name: str, multiplications: int = 100) -> Layer:
    return Layer(
        name=name,
        node=name,
        activation=f"{name}.in",
        weight=f"{name}.w",
        channel_axis=1,
        multiplications=multiplications,
    )


def additive_judge(losses: dict[str, float], calls: list[list[str]] | None = None):
    """Each layer costs this much agreement, and all costs add up."""

    def judge(choice: Sequence[Layer]) -> GateFigures:
        if calls is not None:
            calls.append([one.name for one in choice])
        loss = sum(losses[one.name] for one in choice)
        return GateFigures(
            label_agreement=1 - loss, mask_iou=1, features_cosine=1 - loss, images=1, prompts=1, background=True
        )

    return judge


LOSSES = {"trunk.0.a": 0.001, "trunk.0.b": 0.001, "trunk.1.a": 0.05, "trunk.2.a": 0.02, "trunk.3.a": 0.009}


def names(chosen: Sequence[Layer]) -> list[str]:
    return [one.name for one in chosen]


def test_all_blocks_that_pass_together_are_chosen_in_the_given_order() -> None:
    chosen, sensitivities = choose_layers([layer(n) for n in LOSSES], additive_judge(LOSSES), THRESHOLDS)
    assert names(chosen) == ["trunk.0.a", "trunk.0.b", "trunk.3.a"]  # 0.011; with trunk.2 it would be 0.031
    assert [one.block for one in sensitivities] == ["trunk.0", "trunk.3", "trunk.2", "trunk.1"]
    assert [one.chosen for one in sensitivities] == [True, True, False, False]
    assert sum(one.share for one in sensitivities) == pytest.approx(1)


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 5), (1.0, 0)])
def test_everything_or_nothing(loss: float, expected: int) -> None:
    chosen, _ = choose_layers([layer(n) for n in LOSSES], additive_judge(dict.fromkeys(LOSSES, loss)), THRESHOLDS)
    assert len(chosen) == expected


@pytest.mark.parametrize("spoilt", ["trunk.0.a", "trunk.2.a", "trunk.3.a"])
def test_features_that_are_no_numbers_are_the_worst(spoilt: str) -> None:
    sound = additive_judge(LOSSES | {spoilt: 0.0})

    def judge(choice: Sequence[Layer]) -> GateFigures:
        figures = sound(choice)
        return dataclasses.replace(figures, features_cosine=math.nan) if spoilt in names(choice) else figures

    chosen, sensitivities = choose_layers([layer(n, 1 + 10**9 * (n == spoilt)) for n in LOSSES], judge, THRESHOLDS)
    assert (sensitivities[-1].layers[0].name, sensitivities[-1].loss) == (spoilt, WORST_LOSS)
    assert spoilt not in names(chosen)
    assert len(chosen) >= 2
    assert all(math.isfinite(one.loss) for one in sensitivities)


def test_work_counts_large_blocks_come_first() -> None:
    layers = [layer("trunk.0.a", 10), layer("grounder.decoder.0.a", 10_000)]
    losses = {"trunk.0.a": 0.01, "grounder.decoder.0.a": 0.025}
    chosen, _ = choose_layers(layers, additive_judge(losses), THRESHOLDS)
    assert names(chosen) == ["grounder.decoder.0.a"]


def test_a_block_behind_the_first_failure_still_gets_its_chance() -> None:
    layers = [layer("trunk.0.a", 100), layer("trunk.1.a", 1000), layer("trunk.2.a", 10)]
    losses = {"trunk.0.a": 0.02, "trunk.1.a": 0.25, "trunk.2.a": 0.005}
    chosen, sensitivities = choose_layers(layers, additive_judge(losses), THRESHOLDS)
    assert [one.block for one in sensitivities] == ["trunk.0", "trunk.1", "trunk.2"]
    assert names(chosen) == ["trunk.0.a", "trunk.2.a"]


def test_progress_counts_every_measurement_and_never_more_than_it_said() -> None:
    seen: list[tuple[str, int, int]] = []
    calls: list[list[str]] = []
    layers = [layer(f"trunk.{i}.a") for i in range(12)]
    losses = {one.name: 0.004 * i for i, one in enumerate(layers)}
    choose_layers(layers, additive_judge(losses, calls), THRESHOLDS, progress=lambda *step: seen.append(step))
    assert len(seen) == len(calls) + 1
    assert [done for _, done, _ in seen[:-1]] == list(range(len(calls)))
    assert len(calls) <= seen[0][2]
    assert seen[-1][1] == seen[-1][2]
    assert seen[0][0] == "INT8 search: sensitivity of trunk.0"
