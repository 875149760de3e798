"""Two real processes under gloo against the authors' two, against one process, and after an interruption."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tclkit.tcl.distributed import (
    Place,
    current_place,
    gather,
    gather_values,
    mean_over_processes,
    parallel,
    process_group,
)
from tclkit.tcl.official import our_name
from tclkit.tcl.world import WorldConfig
from tclkit.tcl.world_shards import write_world_shards

WORKER = Path(__file__).with_name("distributed_worker.py")
LOSSES = ("tcli_loss", "tclf_loss", "area_loss", "neg_area_loss", "tv_img_loss", "tv_mask_loss")
DEADLINE_S = 240


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tclkit_tests_distributed_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_two(mode: str, folder: Path, kill_at: int = -1) -> list[int]:
    """Run two workers to their end and return their exit codes; as one fails the other is killed."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    meeting = uuid.uuid4().hex
    logs = [(folder / f"{mode}-{rank}.txt").open("wb") for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), mode, str(folder), str(rank), "2", str(kill_at), meeting],
            env=environment,
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    deadline = time.monotonic() + DEADLINE_S
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.05)
    finally:
        for process, log in zip(processes, logs, strict=True):
            if process.poll() is None:
                process.kill()
            process.wait()
            log.close()
    return [process.returncode for process in processes]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have computed everything once."""
    folder = tmp_path_factory.mktemp("two")
    codes = run_two("parity", folder)
    logs = "\n".join((folder / f"parity-{rank}.txt").read_text() for rank in range(2))
    assert codes == [0, 0], logs
    return folder


@pytest.fixture(scope="module")
def ranks(two: Path) -> list[dict[str, np.ndarray]]:
    found = []
    for rank in range(2):
        with np.load(two / f"rank{rank}.npz") as file:
            found.append({key: file[key] for key in file.files})
    return found


def gradients(found: dict[str, np.ndarray], place: str) -> dict[str, np.ndarray]:
    prefix = f"{place}/grad/"
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def check_gradient(flat: np.ndarray, data: dict[str, np.ndarray], where: str, name: str, check) -> None:
    flat = flat.astype(np.float64).flatten()
    norm = float(data[f"{where}/gradnorm/{name}"])
    check("gradient norm", np.linalg.norm(flat), norm)
    check("gradient sums", flat.sum(), data[f"{where}/gradsum/{name}"], scale=norm)
    turned = float((flat * np.cos(0.37 * np.arange(flat.size))).sum())
    check("gradient sums", turned, data[f"{where}/graddot/{name}"], scale=norm)
    whole = data.get(f"{where}/grad/{name}")
    if whole is not None:
        check("gradients", flat, whole.flatten())
    else:
        places = np.linspace(0, flat.size - 1, 256).astype(np.int64)
        check("gradients", flat[places], data[f"{where}/gradsample/{name}"])


@pytest.mark.parametrize("tile", [0, 3])
@pytest.mark.parametrize("phase", ["ust", "full"])
def test_with_their_faults_each_process_has_the_authors_losses_and_gradients(phase, tile, ranks, arrays, check):
    data = arrays("train_dist2.npz")
    theirs = {our_name(str(name)): str(name) for name in data[f"{phase}/grad_names"]}
    for rank, found in enumerate(ranks):
        place = f"bugs/{tile}/{phase}"
        for name in LOSSES:
            check("losses", found[f"{place}/loss/{name}"], data[f"{phase}/rank{rank}/{name}"])
        ours = gradients(found, place)
        assert ours.keys() == theirs.keys()
        for name, grad in ours.items():
            check_gradient(grad, data, phase, theirs[name], check)


@pytest.mark.parametrize("tile", [0, 3])
def test_a_model_wrapped_too_early_has_the_authors_gradients_of_each_process(tile, ranks, arrays, check):
    data = arrays("train_dist2.npz")
    differ = 0
    for rank, found in enumerate(ranks):
        for official in (str(name) for name in data["full/grad_names"]):
            alone = f"full_ddp_built_in_ust/rank{rank}/gradnorm/{official}" in data
            differ += alone
            where = f"full_ddp_built_in_ust/rank{rank}" if alone else "full"
            ours = gradients(found, f"bugs/{tile}/full_ddp_built_in_ust")[our_name(official)]
            check_gradient(ours, data, where, official, check)
    assert differ == 2 * 12


@pytest.mark.parametrize("tile", [0, 3])
@pytest.mark.parametrize("phase", ["ust", "full"])
def test_without_faults_two_processes_are_one(phase, tile, ranks, arrays, check):
    data = arrays("train_B4.npz")
    place = f"exact/{tile}/{phase}"
    for name in LOSSES:
        mean = (ranks[0][f"{place}/loss/{name}"] + ranks[1][f"{place}/loss/{name}"]) / 2
        check("losses", mean, data[f"{phase}/{name}"])
    theirs = {our_name(str(name)): str(name) for name in data[f"{phase}/grad_names"]}
    for found in ranks:
        ours = gradients(found, place)
        assert ours.keys() == theirs.keys()
        for name, grad in ours.items():
            check_gradient(grad, data, phase, theirs[name], check)


def test_the_golden_tells_the_faulty_from_the_exact(ranks, arrays):
    data = arrays("train_dist2.npz")
    for rank, found in enumerate(ranks):
        faulty, exact = float(data[f"ust/rank{rank}/tclf_loss"]), float(found["exact/0/ust/loss/tclf_loss"])
        assert abs(exact - faulty) > 1e-3


def steps(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two_on_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have trained on the shards of the world that lie there."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    codes = run_two("pairs", folder)
    logs = "\n".join((folder / f"pairs-{rank}.txt").read_text() for rank in range(2))
    assert codes == [0, 0], logs
    return folder


def write_shards(folder: Path) -> None:
    write_world_shards(folder, WorldConfig(size=48), scenes=48, per_shard=12)


def test_twenty_steps_of_two_processes_are_those_of_one_with_the_double_batch(two, worker, tmp_path):
    worker.train(tmp_path, 6)
    check_same_course(two, tmp_path, worker)


def test_twenty_steps_of_two_processes_on_shards_are_those_of_one_with_a_batch_in_two_parts(
    two_on_shards, worker, tmp_path
):
    """Each part has a worker, which reads what a process of its own would have read."""
    worker.train(tmp_path, 3, shards=str(two_on_shards / "*.tar"), parts=2)
    check_same_course(two_on_shards, tmp_path, worker)


def check_same_course(two: Path, one: Path, worker: ModuleType) -> None:
    ours, alone = steps(two / "whole"), steps(one)
    assert [row["step"] for row in ours] == list(range(1, worker.STEPS + 1))
    for row, other in zip(ours, alone, strict=True):
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (row["step"], name)


@pytest.mark.parametrize("data", ["two", "two_on_shards"])
def test_an_interrupted_run_of_two_processes_ends_with_the_same_bits(data, request, worker):
    two = request.getfixturevalue(data)
    whole, cut = steps(two / "whole"), steps(two / "cut")
    assert [row["step"] for row in cut] == [*range(1, 13), *range(11, worker.STEPS + 1)]
    assert cut[:12] == whole[:12]
    assert cut[12:] == whole[10:]
    for rank in range(2):
        weights = torch.load(two / f"weights{rank}.pt", weights_only=True)
        for name, value in weights["whole"].items():
            assert torch.equal(value, weights["mended"][name]), name


def test_both_processes_end_with_the_same_weights(two):
    one, other = (torch.load(two / f"weights{rank}.pt", weights_only=True)["whole"] for rank in range(2))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "train-pairs"])
def test_a_killed_process_ends_the_run_which_then_goes_on(mode, worker, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        write_shards(folder)
    assert run_two(mode, whole) == [0, 0]
    codes = run_two(mode, broken, kill_at=12)
    assert codes[1] == -9
    assert codes[0] != 0
    assert run_two(mode, broken) == [0, 0]
    first, rest = steps(broken / "run")[:12], steps(broken / "run")[12:]
    assert first == steps(whole / "run")[:12]
    assert rest == steps(whole / "run")[10:]


def test_wrapping_a_model_warns_of_nothing(tmp_path):
    """torch says that one of its options is deprecated; the suite makes an error of a warning."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tclkit.tcl.distributed.current_place", lambda: Place(0, 2))
            wrapped = parallel(torch.nn.Linear(3, 3))
    finally:
        torch.distributed.destroy_process_group()
    assert wrapped(torch.ones(1, 3)).shape == (1, 3)


def test_alone_nothing_changes():
    x, model = torch.randn(2, 3, requires_grad=True), torch.nn.Linear(3, 3)
    assert current_place() == Place(0, 1)
    assert gather(x) is x
    assert parallel(model) is model
    assert gather_values(3) == [3]
    assert mean_over_processes({"a": torch.tensor(0.5)}) == {"a": 0.5}
    with process_group() as place:
        assert place.is_first
