import copy
import functools
import os

# Two workers on two cores: a second thread would only wait. It has to be said before numpy loads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import pytest
import torch

# Everything is tested on the CPU, and a hosted Mac has a GPU that refuses every allocation.
# torch wants a cached function here, whose __wrapped__ torch._dynamo looks at.
torch.backends.mps.is_available = functools.cache(lambda: False)
torch.set_num_threads(1)  # small networks; and two threads on a busy machine wait for each other


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers, however the tests are dealt to workers."""
    torch.manual_seed(0)
    numpy.random.seed(0)


def dicts_of(script):
    """Copies of a script's dicts, in the order in which they stand in the file."""
    names = [name for name in vars(script) if name.endswith("_kwargs")]
    return [copy.deepcopy(getattr(script, name)) for name in names]


@pytest.fixture
def tiny(tmp_path):
    """tiny(script, **overrides) -> the script's dicts, shrunk and on the bundled digits."""

    def make(script, **overrides):
        small = {
            "batch_size": 50,
            "dataset_type": "digits",
            "num_epochs": 2,
            "sample_every": 10,
            "num_threads": 1,
            "device": "cpu",
            "precision": "float32",  # equal numbers on every machine
            "output_dir": str(tmp_path / "out"),
            "data_dir": str(tmp_path / "data"),
        }
        dicts = dicts_of(script)
        known = {key for kwargs in dicts for key in kwargs}
        assert set(overrides) <= known, f"{script.__name__} has no key {set(overrides) - known}"
        for kwargs in dicts:
            for key in kwargs:
                kwargs[key] = overrides.get(key, small.get(key, kwargs[key]))
        return dicts

    return make
