from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tclkit.calib.datasets import FolderDataset, open_own_data
from tclkit.calib.evaluation import EvaluationSettings, evaluate
from tclkit.calib.gallery import find_extremes


@pytest.fixture
def dataset(mini: ModuleType, tmp_path: Path) -> FolderDataset:
    """Five pictures, each with more of its truth wrong than the one before."""
    folder = tmp_path / "own"
    mini.write_own(folder)
    for number in range(5):
        image, index = mini.scene((64, 64), ("car", "sky"), 0)
        index[: 8 * number] = 0
        Image.fromarray(image).save(folder / f"images/shot-{number}.png")
        Image.fromarray((index + 1).astype(np.uint8)).save(folder / f"labels/shot-{number}.png")
    return open_own_data(folder)


@pytest.fixture
def settings(class_bundle_folder: Path) -> EvaluationSettings:
    return EvaluationSettings(model=str(class_bundle_folder), threads=1, kp_w=0.0)


@pytest.mark.parametrize(
    ("count", "best", "worst"), [(1, [0], [4]), (2, [0, 1], [4, 3]), (4, [0, 1, 2], [4, 3]), (9, [0, 1, 2], [4, 3])]
)
def test_best_first_worst_first_none_twice(
    dataset: FolderDataset, settings: EvaluationSettings, tmp_path: Path, count: int, best: list[int], worst: list[int]
) -> None:
    evaluation = evaluate(dataset, settings, folder=tmp_path)
    found = find_extremes(evaluation, dataset, settings, "all", count=count)
    for items, expected in ((found.best, best), (found.worst, worst)):
        assert [item.caption.split(":")[0] for item in items] == [f"shot-{number}" for number in expected]
    mious = dict(evaluation.results["fp32"]["all"].images)
    assert found.best[0].caption == f"shot-0: mIoU {mious[0] * 100:.1f} %"
    assert (found.best[0].predicted == found.best[0].truth).mean() > 0.98


def test_an_image_that_went_away_is_passed_over(
    dataset: FolderDataset, settings: EvaluationSettings, tmp_path: Path
) -> None:
    evaluation = evaluate(dataset, replace(settings, limit=3), folder=tmp_path)
    dataset.samples[0].image.unlink()
    found = find_extremes(evaluation, dataset, settings, "all", count=1)
    assert (len(found.best), len(found.worst)) == (0, 1)
