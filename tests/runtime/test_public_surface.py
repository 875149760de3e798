"""`tclkit.runtime` lists its public names, imports them when asked, and is quick to import itself."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tclkit.runtime

HEAVY = {"torch", "onnxruntime", "cv2", "PIL", "tokenizers", "ftfy", "numpy", "sqlite3", "tensorrt", "openvino"}


@pytest.mark.parametrize("name", tclkit.runtime.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(tclkit.runtime, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        assert inspect.getdoc(value)
        assert value.__module__.startswith("tclkit.runtime.")


def test_the_three_lists_agree() -> None:
    """__all__, the homes of the names, and what type checkers see."""
    tree = ast.parse(Path(tclkit.runtime.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    del seen["TYPE_CHECKING"], seen["lazy_names"]
    assert seen == {name: module for module, names in tclkit.runtime._HOMES.items() for name in names}
    assert sorted(seen) == sorted(tclkit.runtime.__all__)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'segmentor'"):
        tclkit.runtime.segmentor  # noqa: B018


def test_dir_lists_what_is_public() -> None:
    assert dir(tclkit.runtime) == sorted(tclkit.runtime.__all__)


_REPORT = """
import json, sys, time
start = time.process_time()
{imports}
print(json.dumps([time.process_time() - start, sorted({{name.split(".")[0] for name in sys.modules}})]))
"""


def modules_after(imports: str) -> tuple[float, set[str]]:
    script = _REPORT.format(imports=imports)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(run.stdout)
    return seconds, set(modules)


def test_importing_the_package_is_light() -> None:
    seconds, modules = modules_after("import tclkit.runtime")
    assert not modules & HEAVY
    assert seconds < 0.15


def test_bundles_and_the_list_of_backends_need_no_backend() -> None:
    imports = "import tclkit.runtime as r; r.list_bundles(); r.available_backends()"
    assert not modules_after(imports)[1] & {"torch", "onnxruntime", "cv2", "PIL", "tokenizers", "tensorrt", "openvino"}


def test_nothing_in_the_runtime_loads_torch() -> None:
    imports = "import tclkit.runtime as r; [getattr(r, name) for name in r.__all__]"
    assert not modules_after(imports)[1] & {"torch", "onnxruntime", "tensorrt", "openvino"}
