"""The gate's table."""

import pytest

from tclkit.cli._verdicts import show_verdicts
from tclkit.export.gates import THRESHOLDS, GateFigures, Verdict


@pytest.mark.parametrize(
    ("artefact", "text"),
    [
        ("image.cpu.int8.onnx", "0.9999≥0.995"),
        ("image-int8-448x448 in OpenVINO", " ≥0.995 "),
        ("image-fp16-448x448-trt10.13.3.9-sm110.engine", " ≥0.995 "),
    ],
)
def test_names_and_figures_stay_whole_in_80_columns(
    capsys: pytest.CaptureFixture[str], artefact: str, text: str
) -> None:
    figures = GateFigures(
        label_agreement=0.99991, mask_iou=0.99991, features_cosine=0.99991, images=4, prompts=2, background=True
    )
    thresholds = THRESHOLDS["fp16"]
    verdict = Verdict(artefact=artefact, precision="fp16", figures=figures, thresholds=thresholds, ran_on="a simulator")
    show_verdicts([verdict], title="tcl")
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert f"{artefact}  " in shown
    assert text in shown
    assert "passed" in shown
    assert shown.count("0.9999") == 3
