from types import ModuleType

import numpy as np
import pytest

from tclkit.calib import draw_chart
from tclkit.calib.bench_chart import _STAGE_COLOURS, _linear_ticks, _log_ticks, _public, _sweeps
from tclkit.runtime.errors import InputError


def longest_run(picture: np.ndarray, colour: tuple[int, int, int], number: int) -> int:
    """Pixels of the colour in the `number`-th bar from above; legends have fewer in a row."""
    rows = (picture == np.array(colour, np.uint8)).all(axis=2).sum(axis=1)
    bars = np.split(np.flatnonzero(rows > 25), np.flatnonzero(np.diff(np.flatnonzero(rows > 25)) > 1) + 1)
    return int(rows[bars[number]].max())


def test_bars_are_as_long_as_their_stages(made_up: ModuleType) -> None:
    rows = [made_up.made_up_row("onnxruntime fp32", 45.0), made_up.made_up_row("torch fp32", 135.0)]
    picture = draw_chart(made_up.made_up_result(rows))
    first, second = (longest_run(picture, _STAGE_COLOURS["image graph"], number) for number in (0, 1))
    assert first / second == pytest.approx(45 / 135, rel=0.02)


def test_a_contender_more_is_a_bar_more(made_up: ModuleType) -> None:
    row = made_up.made_up_row("onnxruntime fp32", 45.0)
    one, two = (draw_chart(made_up.made_up_result([row], problems)) for problems in ({}, {"tensorrt fp16": "x" * 999}))
    assert one.shape[1:] == two.shape[1:] == (1200, 3)
    assert two.shape[0] > one.shape[0]


@pytest.mark.parametrize(
    ("works", "panels"),
    [
        ([{}], []),
        ([{}, {"prompts": 1}], ["prompts"]),
        ([{}, {"batch": 2}, {"batch": 8}], ["images at once"]),
        ([{}, {"size": 896}, {"prompts": 1}, {"batch": 2}], ["prompts", "pixels", "images at once"]),
        ([{"gflop": None}, {"prompts": 1, "gflop": None}], ["prompts"]),
        ([{"batch": 2}, {"batch": 4}], ["images at once"]),
    ],
    ids=["none", "prompts", "batches", "all", "nothing counted", "batches alone"],
)
def test_a_panel_for_each_sweep(made_up: ModuleType, works: list[dict[str, int]], panels: list[str]) -> None:
    names = [f"backend{number} fp32" for number in range(9)]
    rows = [made_up.made_up_row(name, 40.0 + 9 * n, **work) for work in works for n, name in enumerate(names)]
    result = made_up.made_up_result(rows)
    assert [sweep.axis for sweep in _sweeps(result)] == panels
    assert (draw_chart(result).shape[0] > draw_chart(made_up.made_up_result(rows[:9])).shape[0]) == bool(panels)


def test_dotted_lines_grow_as_the_arithmetic(made_up: ModuleType) -> None:
    works = [{}, {"size": 896, "gflop": 400.0}, {"batch": 2}]
    rows = [made_up.made_up_row("onnxruntime fp32", 95.0, **work) for work in works]
    by_size, by_batch = _sweeps(made_up.made_up_result(rows))
    assert by_size.lines["onnxruntime fp32"] == ((0, 100.0, 100.0), (1, 100.0, 400.0))
    assert by_batch.lines["onnxruntime fp32"] == ((0, 96.0, 96.0), (1, 95.5, 96.0))


def test_nothing_to_draw_is_refused(made_up: ModuleType) -> None:
    with pytest.raises(InputError, match="no contender ran"):
        draw_chart(made_up.made_up_result([], {"tensorrt fp16": "why"}))


@pytest.mark.parametrize("highest", [0.003, 0.9, 1.0, 7.0, 49.9, 50.0, 1999.0, 123456.0])
def test_linear_ticks_hold_the_highest(highest: float) -> None:
    step, last = _linear_ticks(highest)
    assert last - step < highest <= last * (1 + 1e-9)
    assert 3 <= round(last / step) <= 10


@pytest.mark.parametrize(("lowest", "highest"), [(3.0, 3.0), (1.0, 1.0), (0.02, 900.0), (99.0, 101.0), (200.0, 5000.0)])
def test_logarithmic_ticks_hold_both_ends(lowest: float, highest: float) -> None:
    ticks = _log_ticks(lowest, highest)
    assert ticks[0] <= lowest
    assert highest <= ticks[-1]
    assert len(ticks) >= 2
    assert ticks == sorted(ticks)


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        ("mine has no graph in int8, only in fp32. Make it: tclkit build-engine --model /home/me/mine", None),
        ("/home/me/models/mine/engines/a.engine is damaged", "a.engine is damaged"),
    ],
)
def test_a_picture_to_share_holds_no_paths(problem: str, shown: str | None) -> None:
    assert _public(problem) == (shown or "mine has no graph in int8, only in fp32")
