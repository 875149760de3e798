from types import ModuleType

import pytest

from tclkit.calib.bench_tables import TextTable, lines_from_result, tables_from_result


def cells(table: TextTable, column: str) -> list[str]:
    return [row[table.columns.index(column)] for row in table.rows]


def by_title(tables: list[TextTable], start: str) -> TextTable:
    return next(table for table in tables if table.title.startswith(start))


@pytest.fixture
def tables(made_up: ModuleType) -> list[TextTable]:
    """Two contenders in sweeps, and one that did not run."""
    rows = [
        made_up.made_up_row(name, ms, **work)
        for work in ({}, {"prompts": 1}, {"batch": 4}, {"size": 896, "gflop": 400.0})
        for name, ms in (("onnxruntime fp32", 95.0), ("torch fp32", 195.0))
    ]
    return tables_from_result(made_up.made_up_result(rows, {"tensorrt fp16": "it is not [installed]"}))


def test_frames_are_compared_with_torch(tables: list[TextTable]) -> None:
    frames = by_title(tables, "Frames")
    assert frames.title.endswith("speed against torch fp32")
    assert cells(frames, "size") == ["448x448"] * 4 + ["896x896"] * 2
    assert cells(frames, "ms")[:2] == ["100", "200"]
    assert cells(frames, "times")[:2] == ["2.00", "1.00"]
    assert cells(frames, "img/s")[:2] == ["10.0", "5.00"]
    assert cells(frames, "of peak")[0] == "50 %"


def test_who_did_not_run_is_named(tables: list[TextTable]) -> None:
    assert by_title(tables, "Did not run").rows == (("tensorrt fp16", "it is not [installed]"),)


def test_stages_and_the_share_of_new_prompts(tables: list[TextTable]) -> None:
    stages = by_title(tables, "Where the time goes (448x448, 20 prompts)")
    assert stages.rows[0] == ("onnxruntime fp32", "1.00", "1.00", "95.0", *["1.00"] * 3, "2.00", "2.0 %")


def test_memory_is_compared_with_torch(tables: list[TextTable]) -> None:
    text = by_title(tables, "20 prompts x 9 templates")
    assert text.rows[0] == ("onnxruntime fp32", "30.0", "3.00", "200", "50 %")


def test_batches(tables: list[TextTable]) -> None:
    batches = by_title(tables, "Images at once")
    assert cells(batches, "batch") == ["1", "1", "4", "4"]
    assert cells(batches, "ms")[2] == "381"
    assert cells(batches, "ms an image")[2] == "95.2"


def test_growth_beside_the_arithmetics(tables: list[TextTable]) -> None:
    growth = by_title(tables, "How both graphs grow")
    assert cells(growth, "with")[:3] == ["1 prompt", "batch 4", "896x896"]
    assert cells(growth, "time")[:3] == ["1.00", "3.97", "1.00"]
    assert cells(growth, "arithmetic")[:3] == ["1.00", "4.00", "4.00"]


def test_one_contender_is_compared_with_none(made_up: ModuleType) -> None:
    tables = tables_from_result(made_up.made_up_result([made_up.made_up_row("onnxruntime fp32", 95.0, gflop=None)]))
    frames = by_title(tables, "Frames")
    assert "times" not in frames.columns
    assert "size" not in frames.columns
    assert (cells(frames, "GFLOP"), cells(frames, "of peak")) == (["-"], ["-"])
    assert {table.title.split()[0] for table in tables} == {"Frames", "Where", "20", "Matrix"}


def test_none_ran(made_up: ModuleType) -> None:
    result = made_up.made_up_result([], {"tensorrt fp16": "why"})
    assert [table.title for table in tables_from_result(result)] == [
        "Did not run",
        "Matrix multiplication on this machine, best of the run",
    ]
    assert len(lines_from_result(result)) == 3


def test_the_reference_is_stated(made_up: ModuleType) -> None:
    lines = lines_from_result(made_up.made_up_result([made_up.made_up_row("onnxruntime fp32", 95.0)]))
    assert lines[-1].endswith("reference 130 GFLOP; the graph of onnxruntime fp32 takes 100")
    assert "load before and after: 0 and 1" in lines[1]


def test_markdown() -> None:
    table = TextTable(title="T", columns=("a", "b"), right=("b",), rows=(("x", "1"), ("y", "2")))
    assert table.to_markdown() == "T\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |\n"
