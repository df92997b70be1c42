"""benchmarks/gpu_check.py on a CPU, where the plain loop takes the place of the CUDA graph."""

import importlib
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import helpers
import pytest
import torch

import gan_cub
import main_gan
import training


@pytest.fixture
def gpu_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(helpers.ROOT / "benchmarks")
    yield importlib.import_module("gpu_check")
    torch.use_deterministic_algorithms(False)


def check_on_a_cpu(gpu_check, *options):
    """(exit status, rows of the table as they are in the file)."""
    status = gpu_check.main(["--device", "cpu", "--quick", *options])
    return status, json.loads(Path("gpu_check.json").read_text())["rows"]


def test_every_row_passes(gpu_check, capsys):
    status, rows = check_on_a_cpu(gpu_check)
    printed = capsys.readouterr().out
    assert "NO" not in printed.split()
    assert status == 0
    assert {row["pass"] for row in rows} == {True, None}
    for row in rows:
        assert row["what"] in printed
        assert ("needs CUDA" in row["seen"]) == (row["pass"] is None)
    passed = [row["what"] for row in rows if row["pass"]]
    compared = [what for what in passed if "graph as plain loop" in what]
    for name in [*helpers.SMALL, *gan_cub.LOSSES]:
        assert any(name in what for what in compared), name
    for name in helpers.ANALYSIS:
        assert any(f"{name} on" in what for what in passed), name


def test_a_script_that_is_broken(gpu_check, monkeypatch, capsys):
    """No two of its runs are equal."""
    count, step = itertools.count(), main_gan.Trainer.step

    def broken_step(trainer, real):
        values = step(trainer, real)
        values["generator loss"] += next(count) * 1e-6
        return values

    monkeypatch.setattr(main_gan.Trainer, "step", broken_step)
    monkeypatch.setattr(gpu_check, "CASES", {"main_gan": {}})
    status, rows = check_on_a_cpu(gpu_check, "--only", "check_graph")
    assert status == 1
    assert [row["pass"] for row in rows] == [False]
    assert "differs by" in rows[0]["seen"]
    assert "NO" in capsys.readouterr().out.split()


def test_an_error_is_a_row_that_did_not_pass(gpu_check, monkeypatch):
    monkeypatch.setattr(main_gan.Trainer, "step", lambda *_: 1 / 0)
    status, rows = check_on_a_cpu(gpu_check, "--only", "check_graph")
    assert status == 1
    assert [row["pass"] for row in rows] == [False]
    assert "ZeroDivisionError" in rows[0]["seen"]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([{"data": "digits", "loss": 2.0}], [{"data": "digits", "loss": 2.0}], 0.0),
        ([{"loss": 2.0, "more": 3.0}], [{"loss": 1.0}], 0.5),
        ([{"loss": 1.0}], [{"loss": 1.0}, {"loss": 1.0}], float("inf")),
        ([{"loss": float("nan")}], [{"loss": 1.0}], float("inf")),
    ],
)
def test_the_difference_of_two_histories(gpu_check, one, other, expected):
    assert gpu_check.difference(one, other) == expected


def test_a_step_that_reads_a_number_goes_well_without_a_graph(gpu_check, tmp_path):
    """On CUDA this very run has to break off."""
    check = gpu_check.Check("cpu", True, tmp_path)
    words = gpu_check.as_options(*check.dicts("main_gan", "reading"))
    with patch.object(sys, "argv", ["-c", "main_gan", *words]), pytest.raises(SystemExit) as end:
        gpu_check.run_disturbed(gpu_check.read_within_the_step, False)
    assert end.value.code == 0
    assert training.Run.train_step is gpu_check.plain_train_step


def test_the_step_that_reads_a_number_is_always_the_same(gpu_check, monkeypatch):
    """A graph refuses another step than the one that it has recorded."""
    steps, run = [], SimpleNamespace()
    monkeypatch.setattr(gpu_check, "plain_train_step", lambda run, step: steps.append(step))
    for _ in range(2):
        gpu_check.read_within_the_step(run, print)
    assert steps[0] is steps[1]


def test_without_a_gpu_it_says_so(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert not Path("gpu_check.json").exists()
