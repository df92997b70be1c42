"""Several processes, as torchrun starts them: one message a step, equal networks, one voice."""

import os
import subprocess
import sys
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import ROOT, SMALL

import common
import main_gan
import training

# Two processes run this. It trains every script for an epoch and saves each process's tensors.
EVERY_SCRIPT = """
import atexit, importlib, os, signal, sys, traceback
import torch
import common, helpers, training
from common import RANK

# the first that is registered runs last: by then the processes must have parted
atexit.register(lambda: torch.distributed.is_initialized() and os._exit(1))
common.save_curves = lambda *_: None
folder = sys.argv[1]
helpers.SHARED["data_dir"] = f"{folder}/pictures"

def stopped(script):
    # only the second process is told to stop; both stop at the same step
    number = 23 if RANK else 10**9
    with helpers.after_optimiser_steps(number, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        try:
            script.main(*helpers.small_dicts(script, num_epochs=3, batch_size=5))
        except SystemExit as stop:
            return stop.code

if RANK == 0:
    for name in ("whole", "parts"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
torch.save(helpers.five_steps_of_main_gan(), f"{folder}/five_steps_{RANK}.pt")
for name in helpers.SMALL:
    os.chdir(folder)
    try:
        script = importlib.import_module(name)
        short = dict(num_epochs=1, num_iterations=10, output_dir=name, loss="r3gan")
        trainer = script.main(*helpers.small_dicts(script, **short))
        torch.save(helpers.state_dicts(trainer), f"{folder}/{name}_{RANK}.pt")
    except Exception:
        traceback.print_exc()
script = importlib.import_module("main_gan")
os.chdir(f"{folder}/whole")
script.main(*helpers.small_dicts(script, num_epochs=3, batch_size=5))
os.chdir(f"{folder}/parts")
status = stopped(script)
torch.distributed.barrier()  # the first process has written the checkpoint that both now read
middle = torch.load("out/checkpoint.pt", weights_only=True) if RANK == 0 else {}
script.main(*helpers.small_dicts(script, num_epochs=3, batch_size=5))
torch.save([status, middle], f"{folder}/stopped_{RANK}.pt")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder in which two processes have left what they trained."""
    folder = tmp_path_factory.mktemp("processes")
    helpers.write_pictures(folder / "pictures")
    driver = folder / "every_script.py"
    driver.write_text(EVERY_SCRIPT, encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, *torchrun, str(driver), str(folder)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
    output, errors = helpers.wait_for(running)
    assert running.returncode == 0, output + errors
    (folder / "output.txt").write_text(output, encoding="utf-8")
    (folder / "errors.txt").write_text(errors, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", list(SMALL))
def test_two_processes_end_with_equal_networks(name, trained):
    """Each has images and noise of its own, so that without averaging they would differ."""
    one, two = trained / f"{name}_0.pt", trained / f"{name}_1.pt"
    assert one.is_file() and two.is_file(), (trained / "errors.txt").read_text(encoding="utf-8")
    first, second = torch.load(one), torch.load(two)
    assert len(first) >= 2
    for network, state in first.items():
        for key, tensor in state.items():
            assert torch.equal(tensor, second[network][key]), f"{network}.{key}"
    rows = helpers.read_history(trained / name)
    assert len(rows) == 1


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(trained, monkeypatch):
    """In double precision: Adam's first steps turn the last bit of a gradient into a step."""
    one, two = (torch.load(trained / f"five_steps_{rank}.pt") for rank in (0, 1))
    monkeypatch.chdir(trained)
    alone = helpers.five_steps_of_main_gan()
    moved = 0
    for network, state in alone.items():
        for key, tensor in state.items():
            assert (tensor - one[network][key]).abs().max() < 1e-9
            assert torch.equal(one[network][key], two[network][key])
            moved = max(moved, tensor.abs().max().item())
    assert moved > 0.1


def test_two_processes_that_were_stopped_go_on_as_if_they_were_not(trained):
    (status, middle), (other_status, _) = (torch.load(trained / f"stopped_{n}.pt") for n in (0, 1))
    assert status == other_status == 143
    assert middle["step"] > 0  # in the middle of an epoch
    first, second = middle["random_states"]
    assert helpers.differences(first, second)  # noise of its own for each
    whole, parts = trained / "whole" / "out", trained / "parts" / "out"
    names = ["history.csv", "weights_epoch_3.pt", "generated_image_epoch_3.png"]
    for name in names:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    one, two = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, parts))
    assert not helpers.differences(one, two)
    assert not list(trained.rglob("*.part"))


def test_only_the_first_process_speaks(trained):
    output = (trained / "output.txt").read_text(encoding="utf-8")
    assert output.count("epoch 1/1 ") == 5 and output.count("iteration 10/10 ") == 1


def test_one_process_does_not_go_on_with_what_two_have_trained(trained, monkeypatch):
    monkeypatch.chdir(trained)
    small = dict(output_dir="main_gan", data_dir=f"{trained}/pictures", num_epochs=2)
    with pytest.raises(common.BadInput, match=r"\(processes was 2, is 1\)"):
        main_gan.main(*helpers.small_dicts(main_gan, **small))


def test_each_process_gets_its_own_share_of_every_batch(monkeypatch):
    pixels, labels = torch.zeros(103, 1, 4, 4, dtype=torch.uint8), torch.zeros(103).long()
    images = common.Images(pixels, labels, ["x"], "x", "digits", ".", batch_size=10, shuffle=True)
    monkeypatch.setattr(common, "PROCESSES", 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(common, "RANK", rank)
        shares.append(images.epoch_batches(seed=3, epoch=2))
    assert [[len(part) for part in share] for share in shares] == [[10, 10, 5]] * 4
    together = torch.cat([part for share in shares for part in share])
    # 3 of 103 cannot be shared out evenly
    assert len(together.unique()) == len(together) == 100
    monkeypatch.setattr(common, "PROCESSES", 1)
    monkeypatch.setattr(common, "RANK", 0)
    images.batch_size = 40
    alone = images.epoch_batches(seed=3, epoch=2)
    for number in range(2):
        step = torch.cat([share[number] for share in shares])
        assert sorted(step.tolist()) == sorted(alone[number].tolist())


@pytest.mark.parametrize(
    "rank, own_clock, first_clock, looks",
    [(0, True, 0.5, True), (0, False, 0.0, False), (1, True, 0.0, False), (1, False, 0.5, True)],
)
def test_all_processes_look_at_losses_when_the_first_one_does(
    rank, own_clock, first_clock, looks, monkeypatch
):
    """By clocks of their own one might leave before the first one can say why."""
    sent = []

    def mean(tensors):
        sent.append(tensors[-1].tolist())
        tensors[-1].copy_(torch.tensor([0.0, first_clock]))  # half of the processes say so

    monkeypatch.setattr(training, "RANK", rank)
    monkeypatch.setattr(training, "all_reduce_mean", mean)
    run = SimpleNamespace(
        device=torch.device("cpu"), networks=[], rows=[torch.zeros(1)], stop_signal=0
    )
    assert training.Run.agree(run, own_clock) == looks
    assert sent == [[0.0, float(own_clock and rank == 0)]] and run.stop_signal == 0


@pytest.mark.parametrize("rank", ["0", "1"])
def test_each_process_has_a_gpu_of_its_own(rank, monkeypatch):
    asked = []

    def zeros(size, device):
        asked.append(str(device))
        return torch.ones(size)

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(common, "PROCESSES", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # so that the first process says it, too
    with pytest.raises(
        common.BadInput, match="3 processes need 3 GPUs, not 2; or give --device cpu"
    ):
        common.choose_device("auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert common.choose_device("auto") == common.choose_device("cuda")
    assert common.choose_device("auto") == torch.device(f"cuda:{rank}")
    assert common.choose_device("cuda:3") == torch.device("cuda:3")
    assert common.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(common, "PROCESSES", 1)
    assert common.choose_device("auto") == torch.device("cuda")
    assert set(asked) == {f"cuda:{rank}", "cuda:3", "cpu", "cuda"}


@pytest.mark.parametrize(
    "cuda, mps, chosen",
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_device_that_there_is(cuda, mps, chosen, monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert common.choose_device("auto") == torch.device(chosen)
    monkeypatch.setattr(common, "PROCESSES", 2)  # which cannot talk to each other on mps
    several = {"cuda": "cuda:0", "mps": "cpu", "cpu": "cpu"}[chosen]
    assert common.choose_device("auto") == torch.device(several)
