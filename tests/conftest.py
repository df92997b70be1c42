import copy
import sys

import pytest
import torch

import common

torch.set_num_threads(1)  # small networks; and two threads on a busy machine wait for each other


@pytest.fixture
def tiny(tmp_path):
    """tiny(script) -> the script's three dicts, shrunk and on the bundled digits; keys can be overridden by name."""

    def make(script, **overrides):
        small = {"batch_size": 50, "dataset_type": "digits", "num_epochs": 2, "sample_every": 10, "num_threads": 1,
                 "device": "cpu", "output_dir": str(tmp_path / "out"), "data_dir": str(tmp_path / "data"), **overrides}
        if "precision" in script.trainer_kwargs:  # equal numbers on every machine
            small.setdefault("precision", "float32")
        dicts = [copy.deepcopy(getattr(script, name)) for name in ("model_kwargs", "dataset_kwargs", "trainer_kwargs")]
        for kwargs in dicts:
            kwargs.update({key: small.pop(key) for key in list(small) if key in kwargs})
        assert not small, f"{script.__name__} has no key {small}"
        return dicts

    return make


@pytest.fixture
def command_line(monkeypatch, capsys):
    """command_line(script, *options) -> (exit status, stderr) of the script run in this process."""

    def call(script, *options):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
        status = 0
        try:
            common.run(script.main, script.model_kwargs, script.dataset_kwargs, script.trainer_kwargs)
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().err

    return call
