import json
import subprocess
import sys

import pytest

import tclkit.calib

HEAVY = {"onnx", "onnxruntime", "cv2", "PIL", "numpy", "torch"}


def test_importing_calib_is_light() -> None:
    code = "import json, sys, tclkit.calib; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert HEAVY.isdisjoint(json.loads(run.stdout))


def test_names_are_found_and_others_are_not() -> None:
    assert set(dir(tclkit.calib)) == set(tclkit.calib.__all__)
    assert all(hasattr(tclkit.calib, name) for name in tclkit.calib.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'gone'"):
        tclkit.calib.gone  # noqa: B018


def test_names_keep_their_meaning_after_their_modules_are_imported() -> None:
    """A module named like a function of the package would take its place."""
    import tclkit.calib.activations
    import tclkit.calib.calibration_images

    assert callable(tclkit.calib.activation_ranges)
    assert callable(tclkit.calib.select_images)
