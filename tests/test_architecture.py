"""The rules that keep the five rooms apart, light and complete; none of them is left to memory."""

import ast
import fnmatch
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT: dict[str, set[str]] = {
    "runtime": set(),
    "calib": {"runtime"},
    "tcl": {"calib", "runtime"},
    "export": {"tcl", "calib", "runtime"},
    "cli": {"tcl", "export", "calib", "runtime"},
}
TORCH = {"torch", "torchvision", "open_clip", "timm"}
HEAVY = TORCH | {"onnxruntime", "onnx", "tensorrt", "openvino", "cv2", "PIL", "tokenizers", "ftfy"}
TOP_LEVEL = {
    *MAY_IMPORT,
    "tests",
    "docs",
    ".ci",
    ".dev",
    ".gitignore",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
}


def modules_of(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import, also those inside functions; a relative one as its dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "." * node.level
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


ALL_MODULES = [
    pytest.param(package, path, id=f"{package}/{path.name}") for package in MAY_IMPORT for path in modules_of(package)
]


@pytest.mark.parametrize(("package", "path"), ALL_MODULES)
def test_imports_follow_the_arrows(package: str, path: Path) -> None:
    wrong = []
    for line, name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "tclkit" and parts[1] not in MAY_IMPORT[package] and name != f"tclkit.{package}":
            wrong.append(f"{path.name}:{line} imports {name}")
        if parts[0] in MAY_IMPORT:
            wrong.append(f"{path.name}:{line} imports {name}: a second module object of tclkit.{name}")
        if name.startswith(".."):
            wrong.append(f"{path.name}:{line} reaches out of its package: import tclkit.<package> instead")
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "path"), [module for module in ALL_MODULES if module.values[0] in {"runtime", "calib"}]
)
def test_the_device_side_never_imports_torch(package: str, path: Path) -> None:
    assert [name for _, name in imports_of(path) if name.split(".")[0] in TORCH] == []


def modules_after(*arguments: str) -> set[str]:
    """Top-level names in sys.modules at the end of a python process with these arguments."""
    report = "import atexit, json, sys; atexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules))))\n"
    run = subprocess.run(
        [sys.executable, "-c", report + arguments[0], *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return {name.split(".")[0] for name in json.loads(run.stdout.splitlines()[-1])}


def test_importing_the_runtime_is_light() -> None:
    assert modules_after("import tclkit.runtime") & (HEAVY | {"rich", "typer"}) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["segment", "--help"], ["train", "--help"]])
def test_asking_for_help_is_light(arguments: list[str]) -> None:
    assert modules_after("from tclkit.cli.main import run; run()", *arguments) & (HEAVY | {"numpy"}) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "arguments", "limit_s"),
    [("import tclkit.runtime", [], 0.15), ("from tclkit.cli.main import run; run()", ["--help"], 0.3)],
    ids=["import tclkit.runtime", "tclkit --help"],
)
def test_start_up_time(code: str, arguments: list[str], limit_s: float) -> None:
    """Best of five, in CPU seconds of the process, so that a busy machine does not decide."""
    took = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=True)
        after = os.times()
        took.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert min(took) < limit_s


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_ships_in_the_wheel() -> None:
    setuptools = project()["tool"]["setuptools"]
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)
    assert {name.removeprefix("tclkit.") for name in setuptools["packages"]} == folders
    assert setuptools["package-dir"] == {f"tclkit.{folder}": folder for folder in folders}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_are_flat(package: str) -> None:
    """A sub-package missing from `packages` works in an editable install and is silently absent from the wheel."""
    assert list((ROOT / package).glob("*/**/*.py")) == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_every_data_file_ships_in_the_wheel(package: str) -> None:
    patterns = project()["tool"]["setuptools"]["package-data"][f"tclkit.{package}"]
    files = [path.relative_to(ROOT / package).as_posix() for path in (ROOT / package).rglob("*") if path.is_file()]
    data = [file for file in files if not file.endswith(".py") and "__pycache__" not in file]
    assert "py.typed" in data
    assert [file for file in data if not any(_matches(file, pattern) for pattern in patterns)] == []


def _matches(file: str, pattern: str) -> bool:
    """As setuptools does: a star does not cross a folder."""
    parts, wanted = file.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_public_names_are_listed_exist_and_are_documented(package: str) -> None:
    module = importlib.import_module(f"tclkit.{package}")
    assert inspect.getdoc(module)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), f"tclkit.{package}.{name} has no docstring"


def test_python_and_version_are_stated_once() -> None:
    """What the README, the CI script and the changelog say about versions agrees with pyproject.toml."""
    settings = project()["project"]
    assert f"[{settings['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    minimum = settings["requires-python"].removeprefix(">=")
    assert re.search(rf"Python {re.escape(minimum)}\b", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_the_top_level_holds_nothing_else() -> None:
    assert top_level_entries() - TOP_LEVEL == set()


def top_level_entries() -> set[str]:
    """Tracked entries; in a copy without git, all that .gitignore does not name."""
    git = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if git.returncode == 0 and git.stdout:
        return {line.split("/")[0] for line in git.stdout.splitlines()}
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    return {
        path.name
        for path in ROOT.iterdir()
        if path.name != ".git" and not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in ignored)
    }
