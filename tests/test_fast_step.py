import contextlib
import copy
import types

import pytest
import torch

import main_ae
import main_dcgan
import main_gan
import main_vae
import training


class Recorder:
    """Stands in for CUDA graphs on a machine without a GPU: recording leaves no trace, replaying does the step."""

    def __init__(self, monkeypatch, trainer, fast):
        self.recorded = self.replayed = 0
        self.step, self.fast, self.parts = trainer.step, fast, [*fast.run.state.values()]
        nothing = types.SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: nothing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: nothing)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def graph(self, graph):
        self.recorded += 1
        before, rng = copy.deepcopy([part.state_dict() for part in self.parts]), torch.get_rng_state()
        yield
        for part, state in zip(self.parts, before):
            part.load_state_dict(state)
        torch.set_rng_state(rng)

    def replay(self):
        self.replayed += 1
        for name, value in self.step(*self.fast.inputs).items():
            self.fast.values[name].data.copy_(value.data)


def train(trainer, state, batches, step):
    rows = []
    for batch in batches:
        values = step(batch)
        rows.append([value.item() for value in values.values()])
    return rows, [p.clone() for part in state.values() if isinstance(part, torch.nn.Module) for p in part.parameters()]


def prepare(tiny, device="cpu"):
    trainer = main_gan.main(*tiny(main_gan, num_epochs=0, device=device))
    state = {name: getattr(trainer, name) for name in ("generator", "discriminator", "generator_optimizer",
                                                       "discriminator_optimizer")}
    trainer.run.state = state
    torch.manual_seed(1)
    trainer.run.sizes = [50, 50, 50, 20]
    shapes = [50] * 3 + [20] + [50] * 5  # after three steps of warm-up, an epoch's short last batch
    index = torch.arange(sum(shapes), device=trainer.run.device).split(shapes)
    return trainer, state, [trainer.train.batch(part)[0].flatten(1) for part in index]


def test_recorded_steps_are_the_plain_steps(tiny, monkeypatch):
    trainer, state, batches = prepare(tiny)
    rows, weights = train(trainer, state, batches, trainer.step)
    trainer, state, batches = prepare(tiny)
    fast = training._Graph(trainer.step, trainer.run)
    recorder = Recorder(monkeypatch, trainer, fast)
    fast_rows, fast_weights = train(trainer, state, batches, fast)
    assert (recorder.recorded, recorder.replayed) == (1, 5)  # nine steps: three of warm-up, one short
    assert fast_rows == rows
    assert all(torch.equal(a, b) for a, b in zip(weights, fast_weights))


def test_a_step_that_cannot_be_recorded_runs_as_it_is(tiny, monkeypatch, capsys):
    trainer, state, batches = prepare(tiny)
    rows, _ = train(trainer, state, batches, trainer.step)
    trainer, state, batches = prepare(tiny)
    fast = training._Graph(trainer.step, trainer.run)
    recorder = Recorder(monkeypatch, trainer, fast)

    @contextlib.contextmanager
    def refuse(graph):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    assert train(trainer, state, batches, fast)[0] == rows
    assert recorder.replayed == 0
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "try --cuda_graph false): operation not permitted when stream" in errors


def test_without_a_gpu_or_switched_off_it_is_the_plain_step(tiny):
    run = main_gan.main(*tiny(main_gan, num_epochs=0)).run
    step = object()
    assert run.fast_step(step) is step
    run.device = torch.device("cuda")
    run.cuda_graph = False
    assert run.fast_step(step) is step
    run.cuda_graph = True
    assert isinstance(run.fast_step(step), training._Graph)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("script", [main_gan, main_dcgan, main_vae, main_ae])
def test_on_a_gpu_the_graph_trains_as_the_plain_loop_does(script, tiny, tmp_path):
    histories = []
    for graph in (True, False):
        trainer = script.main(*tiny(script, device="cuda", cuda_graph=graph, output_dir=str(tmp_path / str(graph)),
                                    batch_size=64))
        histories.append(trainer.run.history)
    for name, values in histories[0].items():
        if name != "data":
            assert values == pytest.approx(histories[1][name], rel=0.05), name
