"""CUDA graphs, on a machine without a GPU: a stand-in for torch.cuda, below run.train_step."""

import contextlib
import importlib

import helpers
import pytest
import torch

import common
import training


class CudaDevice(str):
    """A device that says it is a GPU, whose tensors lie on the CPU."""

    type, index = "cuda", None


class StandIn:
    """What torch.cuda does for a training step: recording leaves no trace, replaying does it.

    A number that was a Python number when the step was recorded stays as it was then. With
    `fails`, the step breaks off while it is recorded, as at an .item().
    """

    def __init__(self, monkeypatch, script, fails=False):
        self.recorded = self.replayed = self.plain = 0
        self.recording, self.fails = False, fails
        self.plain_step = script.Trainer.step
        stand_in = self

        def step(trainer, *inputs):
            return stand_in.step(trainer, *inputs)

        class Stream:
            def wait_stream(self, other):
                assert isinstance(other, Stream)

        monkeypatch.setattr(script.Trainer, "step", step)
        monkeypatch.setattr(common, "choose_device", lambda device: CudaDevice("cpu"))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)

    def step(self, trainer, *inputs):
        if not self.recording:
            self.plain += 1
            return self.plain_step(trainer, *inputs)
        parts = [part for part in vars(trainer).values() if hasattr(part, "state_dict")]
        optimizers = [part for part in parts if hasattr(part, "param_groups")]
        assert all(group["capturable"] for part in optimizers for group in part.param_groups)
        tensors = []
        for part in parts:
            if part in optimizers:
                tensors += [t for state in part.state.values() for t in state.values()]
            else:
                tensors += [*part.parameters(), *part.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        noise = torch.get_rng_state()
        values = self.plain_step(trainer, *inputs)
        with torch.no_grad():
            for tensor, old in zip(tensors, before):
                tensor.copy_(old)
        torch.set_rng_state(noise)
        if self.fails:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        groups = [group for part in optimizers for group in part.param_groups]
        self.rates = [(group, group["lr"]) for group in groups]
        self.trainer, self.inputs, self.values = trainer, inputs, values
        return values

    @contextlib.contextmanager
    def graph(self, graph):
        self.recording = True
        try:
            yield
            self.recorded += 1
        finally:
            self.recording = False

    def replay(self):
        self.replayed += 1
        for group, rate in self.rates:
            group["lr"] = rate
        values = self.plain_step(self.trainer, *self.inputs)
        for name, value in values.items():
            self.values[name].data.copy_(value.data)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(script, folder, **overrides) -> (history, weights), with a short last step an epoch."""
    monkeypatch.setattr(common, "save_curves", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    helpers.write_pictures(tmp_path / "pictures")

    def run(script, folder, **overrides):
        small = {"batch_size": 14, "output_dir": folder, **overrides}
        trainer = script.main(*helpers.small_dicts(script, **small))
        weights = torch.load(f"{folder}/checkpoint.pt", weights_only=True)["state"]
        return trainer.run.history, weights

    return run


@pytest.mark.parametrize("name", ["main_gan", "main_vae"])
def test_recorded_steps_are_the_plain_steps(name, train, monkeypatch):
    """main_vae's learning rate halves with every epoch, which a recorded number would not."""
    script = importlib.import_module(name)
    history, weights = train(script, "plain", lr_half_life=1.0)
    stand_in = StandIn(monkeypatch, script)
    fast_history, fast_weights = train(script, "fast", lr_half_life=1.0)
    # fourteen steps: three of warm-up, and two short ones
    assert (stand_in.plain, stand_in.recorded, stand_in.replayed) == (5, 1, 9)
    assert fast_history == history
    for part, state in weights.items():
        if "optimizer" not in part:
            assert not helpers.differences(fast_weights[part], state)


def test_a_step_that_breaks_off_while_it_is_recorded(train, monkeypatch):
    """CUDA may then refuse everything: no other step is tried, and one line says what to do."""
    script = importlib.import_module("main_gan")
    stand_in = StandIn(monkeypatch, script, fails=True)
    with pytest.raises(common.BrokenOff) as stop:
        train(script, "fast")
    assert (stand_in.plain, stand_in.replayed) == (3, 0)
    assert "--cuda_graph false" in str(stop.value)
    assert "operation not permitted" in str(stop.value)


def test_a_second_step_is_refused_since_the_first_would_be_replayed(train, monkeypatch):
    script = importlib.import_module("main_gan")
    StandIn(monkeypatch, script)
    train_step = training.Run.train_step

    def alternate(run, step, *inputs):
        train_step(run, step, *inputs)
        train_step(run, lambda *inputs: step(*inputs), *inputs)

    monkeypatch.setattr(training.Run, "train_step", alternate)
    with pytest.raises(TypeError, match="has recorded another `step`; give --cuda_graph false"):
        train(script, "two", num_epochs=1)


def test_what_a_recorded_step_returns_holds_no_graph_of_gradients(train, monkeypatch):
    script = importlib.import_module("main_gan")
    StandIn(monkeypatch, script)
    kept = []
    train_step = training.Run.train_step

    def look(run, step, *inputs):
        train_step(run, step, *inputs)
        kept.append(run.graph.values if run.graph.graph else {})

    monkeypatch.setattr(training.Run, "train_step", look)
    train(script, "fast", num_epochs=1)
    replayed = kept[3]
    assert len(replayed) == 4
    assert not any(value.requires_grad for value in replayed.values())


@pytest.mark.parametrize("length, restored", [(16, True), (44, False)])
def test_random_numbers_of_another_kind_of_gpu_are_left_where_they_are(
    length, restored, monkeypatch
):
    saved, known = [], torch.zeros(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: known)
    monkeypatch.setattr(torch.cuda, "set_rng_state", saved.append)
    of_the_gpu = torch.ones(length, dtype=torch.uint8)
    training.set_random_state(torch.device("cuda"), [torch.get_rng_state(), of_the_gpu])
    assert len(saved) == restored


def test_switched_off_it_is_the_plain_step(train, monkeypatch):
    script = importlib.import_module("main_gan")
    stand_in = StandIn(monkeypatch, script)
    train(script, "off", num_epochs=1, cuda_graph=False)
    assert (stand_in.plain, stand_in.recorded) == (7, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", list(helpers.SMALL))
def test_on_a_gpu_the_graph_trains_as_the_plain_loop_does(name, train):
    script = importlib.import_module(name)
    graph, plain = (
        train(script, str(graph), device="cuda", cuda_graph=graph)[0] for graph in (True, False)
    )
    for one, other in zip(graph, plain):
        assert one.keys() == other.keys()
        for column, value in one.items():
            if column not in ("data", "active latents"):
                assert value == pytest.approx(other[column], rel=0.05), column
