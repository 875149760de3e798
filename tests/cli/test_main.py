"""What all commands share: their options are frozen, and the script behaves as scripts do."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import Result

from tclkit.cli.main import app

OPTIONS = {
    "tclkit": "--version --debug",
    "demo": "--output -o --debug",
    "segment": "image prompts --bank --model -m --backend --precision --exact --output -o --json --threshold "
    "--background --no-background --pamr --kp --fit --flip --scales --contrast --debug",
    "pull": "name --checkpoint --clip --url --clip-url --sha256 --size --decoder --output -o --debug",
    "export": "checkpoint --output -o --size --clip --name --half-weights --kp-attention --decoder --debug",
    "build-engine": "--model -m --fp16 --int8 --bf16 --fp32 --device --decoder --calibration --calibration-images "
    "--seed --decoder-only --auto --ranges --smoothing --no-smoothing --prompts --min-agreement --min-iou --min-cosine "
    "--size --max-batch --max-prompts --workspace --timing-cache --hardware-compatible --version-compatible --dla "
    "--prepare-only --output -o --json --debug",
    "verify": "bundle --model -m --calibration --images --prompts --report --json --debug",
    "train": "--config -c --output -o --set --resume --dry-run --json --debug",
    "embed": "prompts --output -o --from --model -m --debug",
    "info": "--json --debug",
    "eval": "--benchmark -b --data --names --model -m --backend --precision --compare --torch --clip --pamr "
    "--threshold --kp --limit --workers --loaders --rank --world-size --windows --flip --scales --contrast --output -o "
    "--pictures --no-pictures --classes --json --debug",
    "bench": "--model -m --backend --precision --prompts --size --batch --against --image --rounds --warm-up --threads "
    "--seed --memory --no-memory --output -o --json --debug",
    "data": "--debug",
    "data prepare": "name --root --source --check --json --debug",
    "data world": "--output -o --scenes --per-shard --size --seed --colours --labelled --json --debug",
}


def all_commands() -> dict[str, Any]:
    """Commands by name; those of a group as "group command"."""
    group: Any = typer.main.get_command(app)
    found = {"tclkit": group, **group.commands}
    nested = {
        f"{name} {inner}": command
        for name, outer in group.commands.items()
        for inner, command in getattr(outer, "commands", {}).items()
    }
    return found | nested


def spellings(command: Any) -> Iterator[str]:
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)


def test_arguments_and_options_are_frozen() -> None:
    """They are an interface: adding to this list is a decision, removing from it breaks scripts."""
    assert {name: " ".join(spellings(command)) for name, command in all_commands().items()} == OPTIONS


def test_every_option_is_explained() -> None:
    for name, command in all_commands().items():
        assert command.help, name
        assert [parameter.name for parameter in command.params if not parameter.help] == [], name


Invoke = Callable[..., Result]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [(["--help"], 0), (["-h"], 0), (["--version"], 0), (["sgement"], 2), (["segment"], 2), (["segment", "a.png"], 2)],
    ids=str,
)
def test_exit_codes_of_the_script(run_process: Run, arguments: list[str], exit_code: int) -> None:
    assert run_process(*arguments).returncode == exit_code


def test_a_missing_image_is_one_line(run_process: Run) -> None:
    result = run_process("segment", "łódź.png", "🐶")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: łódź.png: no such file or folder\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_behind_the_output_is_an_error() -> None:
    """/dev/full takes nothing, as a full disk does."""
    command = [sys.executable, "-c", "from tclkit.cli import run; run()", "info", "--json"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr == "error: No space left on device\n"


@pytest.mark.parametrize("command", ["", "segment", "verify", "eval", "data", "data world"])
def test_help_shows_no_insides_of_typer(invoke: Invoke, command: str) -> None:
    shown = invoke(*command.split(), "--help").stdout
    for leak in ("[[", "<bool>", "BOOLEAN", "default: ("):
        assert leak not in shown


def test_a_wrong_choice_reads_well(invoke: Invoke) -> None:
    result = invoke("segment", "a.png", "red", "--backend", "foo")
    assert result.exit_code == 2
    assert "'foo' is not one of" in " ".join(result.stderr.replace("│", " ").split())
    assert "Value error" not in result.stderr
