"""The gate's table."""

import pytest

from tclkit.cli._verdicts import show_verdicts
from tclkit.export.gates import THRESHOLDS, GateFigures, Verdict


def test_a_figure_stays_beside_its_threshold_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    figures = GateFigures(
        label_agreement=0.99991, mask_iou=0.99991, features_cosine=0.99991, images=4, prompts=2, background=True
    )
    verdict = Verdict(
        artefact="image-int8-448x448 in OpenVINO",
        precision="fp16",
        figures=figures,
        thresholds=THRESHOLDS["fp16"],
        ran_on="OpenVINO",
    )
    show_verdicts([verdict], title="tcl")
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for text in ("0.9999≥0.995", "0.9999≥0.98", "0.9999≥0.999"):
        assert text in shown
