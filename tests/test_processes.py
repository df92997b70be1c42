import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import datasets
import main_gan

ROOT = Path(__file__).parent.parent
SMALL = ["--dataset_type", "digits", "--batch_size", "50", "--sample_every", "10", "--num_threads", "1",
         "--device", "cpu"]
TWENTY_STEPS = """
import sys
import torch
import common, main_gan

dicts = [dict(d) for d in (main_gan.model_kwargs, main_gan.dataset_kwargs, main_gan.trainer_kwargs)]
dicts[1].update(dataset_type="digits", batch_size=64 // common.PROCESSES)
dicts[2].update(num_epochs=0, output_dir=sys.argv[1], device="cpu")
trainer = main_gan.main(*dicts)
networks = trainer.generator.double(), trainer.discriminator.double()
trainer.run.num_epochs = 1
state = {"generator": networks[0], "discriminator": networks[1]}
noise, randn = torch.Generator().manual_seed(5), torch.randn
torch.randn = lambda n, d, device: randn(n * common.PROCESSES, d, generator=noise).double().chunk(common.PROCESSES)[
    common.RANK]  # one process draws the noise of both
for epoch in trainer.run.epochs(trainer.train, state):
    for images, _ in trainer.run.batches():
        trainer.run.log(trainer.step(images.flatten(1).double()))
        if trainer.run.step == 20:
            break
    break
if common.RANK == 0:
    torch.save([p.detach() for network in networks for p in network.parameters()] + [trainer.run.rows[:20]],
               sys.argv[1] + ".pt")
"""


def launch(*command, processes=2):
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 \
        else [sys.executable]
    return subprocess.Popen([*torchrun, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def finish(process):
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return output


def test_each_process_gets_its_own_share_of_every_batch(monkeypatch):
    images = datasets.Images(torch.zeros(103, 1, 4, 4, dtype=torch.uint8), torch.zeros(103), "x", [], 10, True, True,
                             False, "cpu")
    monkeypatch.setattr(datasets, "PROCESSES", 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(datasets, "RANK", rank)
        shares.append(images.order(seed=3, epoch=2))
    assert [[len(part) for part in share] for share in shares] == [[10, 10, 5]] * 4
    together = torch.cat([part for share in shares for part in share])
    assert len(together.unique()) == len(together) == 100  # 3 of 103 cannot be shared out evenly
    monkeypatch.setattr(datasets, "PROCESSES", 1)
    monkeypatch.setattr(datasets, "RANK", 0)
    images.batch_size = 40
    alone = images.order(seed=3, epoch=2)
    assert [sorted(torch.cat(step).tolist()) for step in zip(*shares)][:2] == [sorted(p.tolist()) for p in alone[:2]]


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(tmp_path):
    (tmp_path / "twenty.py").write_text(TWENTY_STEPS)
    running = [launch(tmp_path / "twenty.py", tmp_path / str(n), processes=n) for n in (1, 2)]
    for process in running:
        finish(process)
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    # in double precision: Adam's first steps are g / |g|, which turns the last bit of a float32 gradient into a step
    assert max((a - b).abs().max() for a, b in zip(one, two)) < 1e-5
    assert one[0].abs().max() > 0.1


def test_a_run_of_two_processes_is_continued_as_if_never_stopped(tmp_path):
    def command(folder):
        return [ROOT / "main_gan.py", *SMALL, "--num_epochs", 2, "--output_dir", tmp_path / folder]

    whole = finish(launch(*command("whole")))
    assert len(re.findall("epoch 1/2", whole)) == 1  # only the first process speaks
    stopped = launch(*command("stopped"))
    while not (tmp_path / "stopped" / "checkpoint.pt").exists():
        assert stopped.poll() is None, stopped.communicate()[0]
        time.sleep(0.005)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=120)
    old = common.load(tmp_path / "stopped" / "checkpoint.pt", "main_gan", "step")
    assert (old["epoch"], len(old["rng"])) == (1, 2)
    assert not torch.equal(old["rng"][0]["torch"], old["rng"][1]["torch"])  # noise of its own for each
    finish(launch(*command("stopped")))
    for name in ("history.csv", "weights_epoch_2.pt", "generated_image_epoch_2.png"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list(tmp_path.glob("*/*.part"))
    with pytest.raises(common.BadInput, match="processes was 2, is None"):
        dicts = [dict(d) for d in (main_gan.model_kwargs, main_gan.dataset_kwargs, main_gan.trainer_kwargs)]
        dicts[1].update(dataset_type="digits", batch_size=50)
        dicts[2].update(num_epochs=2, sample_every=10, num_threads=1, output_dir=str(tmp_path / "whole"))
        main_gan.main(*dicts)
