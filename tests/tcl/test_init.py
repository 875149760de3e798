"""The package's surface: complete, and lazy."""

import subprocess
import sys

import pytest

import tclkit.tcl


def test_every_public_name_is_there():
    for name in tclkit.tcl.__all__:
        assert getattr(tclkit.tcl, name).__name__ == name
    assert dir(tclkit.tcl) == sorted(tclkit.tcl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tclkit.tcl.nothing


def test_importing_the_package_loads_no_torch():
    code = "import sys, tclkit.tcl; assert not {'torch', 'open_clip'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
