"""What each trick of main_gan and main_dcgan is worth.

It is the time of the step with that one trick undone, over the time of the step as it is.

run:    python benchmarks/tricks.py     (three minutes on two cores; on an otherwise idle machine)
prints: medians over rounds in which the variants take turns; 1.10 means that a step without the
        trick takes 10 % longer
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from throughput import CASES, Pictures, build, median_ratio

import main_dcgan
import main_gan

UNDONE = {
    "data on the device": "a DataLoader with ToTensor and Normalize",
    "fused Adam": "torch.optim.Adam as it comes",
    "fakes detached for D": "D's loss computes the gradients of G's weights too",
    "no gradients of D's weights for G": "G's loss computes the gradients of D's weights too",
    "one pass of D over both halves": "real and generated images in passes of their own",
    "losses left on the device": "every loss read at every step",
    "the script's number of threads": "the other number, 1 or 2",
}


def step(trainer, real, undo):
    """The step of main_gan and main_dcgan with one trick undone."""
    g, d = trainer.generator, trainer.discriminator
    script = sys.modules[type(trainer).__module__]
    fake = g(torch.randn(len(real), trainer.fixed_z.shape[1]))
    seen = fake if undo == "fakes detached for D" else fake.detach()
    if script is main_gan and undo != "one pass of D over both halves":
        real_logits, fake_logits = d(torch.cat([real, seen])).chunk(2)
    else:
        real_logits, fake_logits = d(real), d(seen)
    targets = (trainer.real_label, trainer.fake_label) if script is main_gan else ()
    d_loss = script.discriminator_loss(real_logits, fake_logits, *targets)
    trainer.discriminator_optimizer.zero_grad()
    d_loss.backward(retain_graph=seen is fake)
    trainer.discriminator_optimizer.step()
    g_loss = script.generator_loss(d(fake))
    trainer.generator_optimizer.zero_grad()
    inputs = list(g.parameters())
    if undo == "no gradients of D's weights for G":
        inputs = None
    g_loss.backward(inputs=inputs)
    trainer.generator_optimizer.step()
    if script is main_dcgan:
        trainer.update_ema()
    real_mean = real_logits.detach().sigmoid().mean()
    fake_mean = fake_logits.detach().sigmoid().mean()
    if undo == "losses left on the device":
        for value in (d_loss, g_loss, real_mean, fake_mean):
            value.item()


def batches(images, undo):
    """Yield (images, labels) without end."""
    loader = torch.utils.data.DataLoader(Pictures(images), images.batch_size, shuffle=True)
    while True:
        if undo == "data on the device":
            yield from loader
        else:
            for index in images.epoch_batches(seed=0, epoch=1):
                yield images.batch(index)


def undo_fused(trainer):
    """Let both optimisers choose by themselves, as a plain torch.optim.Adam does."""
    for optimizer in (trainer.generator_optimizer, trainer.discriminator_optimizer):
        for group in optimizer.param_groups:
            group["fused"] = None


def measure(name, rounds=15):
    case = CASES[name]
    # the step below is the script's in float32
    case = dataclasses.replace(case, settings={**case.settings, "precision": "float32"})
    steps = max(1, case.steps // 2)
    undos = ["", *UNDONE]
    if case.script is not main_gan:
        undos.remove("one pass of D over both halves")
    times = {undo: [] for undo in undos}
    trainers, feeds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, undo in enumerate(undos):
            trainers[undo], images = build(case, f"{folder}/{number}")
            feeds[undo] = batches(images, undo)
        threads = torch.get_num_threads()
        undo_fused(trainers["fused Adam"])
        for number in range(rounds + 1):
            for undo, trainer in trainers.items():
                other = undo == "the script's number of threads"
                others = 1 if threads > 1 else 2
                torch.set_num_threads(others if other else threads)
                begun = time.perf_counter()
                for _ in range(steps):
                    (real,) = case.takes(*next(feeds[undo]))
                    step(trainer, real, undo)
                if number:  # the first round warms up
                    times[undo].append(time.perf_counter() - begun)
    milliseconds = statistics.median(times[""]) / steps * 1e3
    print(f"{name}: {milliseconds:.2f} ms a step with {threads} threads")
    for undo in undos[1:]:
        ratio = median_ratio(times[undo], times[""])
        print(f"  {ratio:5.2f}  without {undo}: {UNDONE[undo]}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores")
    measure("main_gan")
    measure("main_dcgan")
