"""Training speed of the scripts beside the textbook loop and the bare step: same networks, batch, data, one run.

run:    python benchmarks/throughput.py             (two minutes on two cores; on an otherwise idle machine)
prints: milliseconds a step and ratios, medians over rounds in which the loops take turns
        textbook  DataLoader, ToTensor, Normalize; D's loss runs back into G and G's loss into D's weights; plain
                  Adam; losses read at every step; torch's own number of threads
        careful   the same, but fakes are shared by both losses and detached for D's
        script    the script's own loop: Run.batches, Trainer.step, Run.log, at its default number of threads
        all       the same at torch's own number of threads
        bare      Trainer.step on one batch that is there already: the ceiling for any loader
        batch     the script's share of a step that goes into its batch
"""
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import main_dcgan
import main_gan


class Pictures(torch.utils.data.Dataset):
    """Gives an image as torchvision's MNIST and CIFAR10 do: array to Pillow, then the transforms."""

    def __init__(self, pixels):
        self.arrays = pixels.permute(0, 2, 3, 1).squeeze(3).numpy()
        half = (0.5,) * pixels.shape[1]
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(half, half)])

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.arrays[index])), 0


def textbook(trainer, latent, flatten, labels, careful):
    """Yield after each step of the textbook loop; it trains the trainer's own networks."""
    g, d = trainer.generator, trainer.discriminator
    g_adam = torch.optim.Adam(g.parameters(), lr=2e-4, betas=(0.5, 0.999))
    d_adam = torch.optim.Adam(d.parameters(), lr=2e-4, betas=(0.5, 0.999))
    bce = nn.BCEWithLogitsLoss()
    loader = torch.utils.data.DataLoader(Pictures(trainer.train.pixels), trainer.train.batch_size, shuffle=True)
    while True:
        for real, _ in loader:
            real = real.flatten(1) if flatten else real
            fake = g(torch.randn(len(real), latent))
            real_target, fake_target = torch.full((len(real),), labels[0]), torch.full((len(real),), labels[1])
            d_loss = bce(d(real), real_target) + bce(d(fake.detach() if careful else fake), fake_target)
            d_adam.zero_grad()
            d_loss.backward()
            d_adam.step()
            fake = fake if careful else g(torch.randn(len(real), latent))
            g_loss = bce(d(fake), torch.ones(len(real)))
            g_adam.zero_grad()
            g_loss.backward()
            g_adam.step()
            d_loss.item(), g_loss.item()
            yield


def script(trainer, flatten):
    """Yield after each step of the script's own loop, without its pictures."""
    trainer.run.num_epochs = 10**6
    for _ in trainer.run.epochs(trainer.train, {"generator": trainer.generator}):
        for images, _ in trainer.run.batches():
            trainer.run.log(trainer.step(images.flatten(1) if flatten else images))
            yield


def bare(trainer, flatten):
    images, _ = trainer.train.batch(torch.arange(trainer.train.batch_size))
    while True:
        trainer.step(images.flatten(1) if flatten else images)
        yield


def batch(trainer):
    while True:
        for index in trainer.train.order(0, 1):
            trainer.train.batch(index)
            yield


def build(module, folder):
    """A trainer at the script's defaults, on the bundled digits repeated to the size of the real data."""
    size, channels, copies = {"main_gan": (28, 1, 14), "main_dcgan": (32, 3, 12)}[module.__name__]
    dataset_kwargs = {**module.dataset_kwargs, "dataset_type": "digits"}
    if "image_size" in dataset_kwargs:
        dataset_kwargs["image_size"] = size
    trainer_kwargs = {**module.trainer_kwargs, "num_epochs": 0, "device": "cpu", "output_dir": folder}
    trainer = module.main(module.model_kwargs, dataset_kwargs, trainer_kwargs)
    trainer.train.pixels = trainer.train.pixels.repeat(copies, 1, 1, 1)
    trainer.train.labels = trainer.train.labels.repeat(copies)
    return trainer


def measure(module, steps, rounds):
    flatten = module is main_gan
    latent, labels = (64, (0.9, 0.1)) if flatten else (100, (1.0, 0.0))
    default_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        loops, threads = {}, {}
        for name in ("textbook", "careful", "script", "all", "bare", "batch"):
            torch.set_num_threads(default_threads)
            trainer = build(module, f"{folder}/{name}")
            loops[name] = {"textbook": lambda t: textbook(t, latent, flatten, labels, careful=False),
                           "careful": lambda t: textbook(t, latent, flatten, labels, careful=True),
                           "script": lambda t: script(t, flatten), "all": lambda t: script(t, flatten),
                           "bare": lambda t: bare(t, flatten), "batch": batch}[name](trainer)
            own = name in ("script", "bare", "batch")
            threads[name] = torch.get_num_threads() if own else default_threads
        times = {name: [] for name in loops}
        for number in range(rounds + 1):
            for name, loop in loops.items():
                torch.set_num_threads(threads[name])
                begun = time.perf_counter()
                for _ in range(steps):
                    next(loop)
                if number:  # the first round warms up
                    times[name].append((time.perf_counter() - begun) / steps * 1e3)
        torch.set_num_threads(default_threads)
        for loop in loops.values():
            loop.close()

    def ratio(a, b):
        return statistics.median(x / y for x, y in zip(times[a], times[b]))

    milliseconds = "  ".join(f"{name} {statistics.median(values):.3f}" for name, values in times.items())
    print(f"{module.__name__}, batch {trainer.train.batch_size}, threads {threads}\n"
          f"  ms a step: {milliseconds}\n"
          f"  script is {ratio('textbook', 'script'):.2f} x textbook, {ratio('careful', 'script'):.2f} x careful, "
          f"{ratio('bare', 'script'):.2f} of bare; all is {ratio('textbook', 'all'):.2f} x textbook; "
          f"batch is {100 * ratio('batch', 'script'):.1f} % of a step", flush=True)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads by default")
    measure(main_gan, steps=200, rounds=15)
    measure(main_dcgan, steps=6, rounds=7)
