"""What each trick of main_gan and main_dcgan is worth: the step with that one undone, over the step as it is.

run:    python benchmarks/tricks.py                 (three minutes on two cores; on an otherwise idle machine)
prints: medians over rounds in which the variants take turns; 1.10 means a step without the trick takes 10 % longer
"""
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import main_dcgan
import main_gan
from throughput import CASES, Pictures, build

UNDONE = {"data on the device": "a DataLoader with ToTensor and Normalize",
          "fused Adam": "torch.optim.Adam as it comes",
          "fakes detached for D": "D's loss computes the gradients of G's weights too",
          "no gradients of D's weights for G": "G's loss computes the gradients of D's weights too",
          "one pass of D over both halves": "real and generated images in passes of their own",
          "losses left on the device": "every loss read at every step",
          "the script's number of threads": "the other number, 1 or 2"}


def step(trainer, real, undo):
    """The step of main_gan and main_dcgan with one trick undone."""
    g, d, module = trainer.generator, trainer.discriminator, sys.modules[type(trainer).__module__]
    targets = getattr(trainer, "labels", ())
    fake = g(torch.randn(len(real), getattr(trainer, "latent_size", 0) or trainer.latent_dim))
    seen = fake if undo == "fakes detached for D" else fake.detach()
    if module is main_gan and undo != "one pass of D over both halves":
        real_logits, fake_logits = d(torch.cat([real, seen])).chunk(2)
    else:
        real_logits, fake_logits = d(real), d(seen)
    d_loss = module.discriminator_loss(real_logits, fake_logits, *targets)
    trainer.discriminator_optimizer.zero_grad()
    d_loss.backward(retain_graph=seen is fake)
    trainer.discriminator_optimizer.step()
    g_loss = module.generator_loss(d(fake))
    trainer.generator_optimizer.zero_grad()
    inputs = None if undo == "no gradients of D's weights for G" else list(g.parameters())
    g_loss.backward(inputs=inputs)
    trainer.generator_optimizer.step()
    if module is main_dcgan:
        trainer.average()
    values = d_loss, g_loss, real_logits.detach().sigmoid().mean(), fake_logits.detach().sigmoid().mean()
    if undo == "losses left on the device":
        [value.item() for value in values]


def measure(name, rounds=15):
    module, _, takes, side, channels, copies, steps, settings = CASES[name]
    undos = ["", *(undo for undo in UNDONE if module is main_gan or undo != "one pass of D over both halves")]
    times = {undo: [] for undo in undos}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {undo: build(module, side, channels, copies, settings, f"{folder}/{i}")
                    for i, undo in enumerate(undos)}
        threads = torch.get_num_threads()

        def batches(trainer, undo):
            while True:
                if undo == "data on the device":
                    yield from torch.utils.data.DataLoader(Pictures(trainer.train), trainer.train.batch_size, True)
                else:
                    yield from (trainer.train.batch(index) for index in trainer.train.order(0, 1))

        feeds = {undo: batches(trainer, undo) for undo, trainer in trainers.items()}
        for optimizer in ("generator_optimizer", "discriminator_optimizer"):
            for group in getattr(trainers["fused Adam"], optimizer).param_groups:
                group["fused"] = None
        for number in range(rounds + 1):
            for undo, trainer in trainers.items():
                torch.set_num_threads(3 - threads if undo == "the script's number of threads" else threads)
                begun = time.perf_counter()
                for _ in range(max(1, steps // 2)):
                    step(trainer, *takes(*next(feeds[undo])), undo)
                if number:  # the first round warms up
                    times[undo].append(time.perf_counter() - begun)
    print(f"{name}: {statistics.median(times['']) / max(1, steps // 2) * 1e3:.2f} ms a step with {threads} threads")
    for undo in undos[1:]:
        ratio = statistics.median(a / b for a, b in zip(times[undo], times[""]))
        print(f"  {ratio:5.2f}  without {undo}: {UNDONE[undo]}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores")
    measure("main_gan")
    measure("main_dcgan")
