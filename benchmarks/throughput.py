"""Training speed of the scripts beside the textbook loop and the bare step: same networks, batch, data, one run.

run:    python benchmarks/throughput.py [--quick] [SCRIPT ...]        (on an otherwise idle machine; ten minutes or one)
prints: a table of medians over rounds in which the loops take turns, and writes it to throughput.json
        textbook  DataLoader, ToTensor, Normalize; losses that also compute the gradients nobody uses; plain Adam;
                  losses read at every step; torch's own number of threads; float32
        script    the script's own loop: Run.batches, Trainer.step, Run.log, at its default settings
        bare      Trainer.step on one batch that is there already: the ceiling for any loader
        batch     the share of a step that goes into its batch
        memory    the most that a process of its own held while it trained one step
        first     from the command to the end of the first step on the bundled digits, over the time of
                  `python -c "import torch, torchvision"`; help: the same for --help; --quick leaves these three out
"""
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import gan_cub
import main_ae
import main_cgan
import main_dcgan
import main_gan
import main_vae
import training

FIRST_STEP = """
import os, resource, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import training
def log(self, values):
    [value.item() for value in values.values()]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    sys.stdout.flush()
    os._exit(0)
training.Run.log = log
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Pictures(torch.utils.data.Dataset):
    """Gives an image as torchvision's MNIST and CIFAR10 do: array to Pillow, then the transforms."""

    def __init__(self, images):
        self.arrays, self.labels = images.pixels.permute(0, 2, 3, 1).squeeze(3).numpy(), images.labels.tolist()
        half = (0.5,) * images.pixels.shape[1]
        normalize = [transforms.Normalize(half, half)] if images.normalize else []
        self.transform = transforms.Compose([transforms.ToTensor(), *normalize])

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def gan_step(trainer):
    """The textbook's step of main_gan, _dcgan, _cgan: D's loss runs back into G, G's loss into D's weights."""
    g, d = trainer.generator, trainer.discriminator
    latent = getattr(trainer, "latent_size", 0) or getattr(trainer, "latent_dim", 0) or g.latent_dim
    real_label, fake_label = getattr(trainer, "labels", (1.0, 0.0))
    g_adam, d_adam = (torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999)) for network in (g, d))
    bce = nn.BCEWithLogitsLoss()

    def step(real, *labels):
        fake = g(torch.randn(len(real), latent), *labels)
        d_loss = (bce(d(real, *labels), torch.full((len(real),), real_label)) +
                  bce(d(fake, *labels), torch.full((len(real),), fake_label)))
        d_adam.zero_grad()
        d_loss.backward()
        d_adam.step()
        g_loss = bce(d(g(torch.randn(len(real), latent), *labels), *labels), torch.ones(len(real)))
        g_adam.zero_grad()
        g_loss.backward()
        g_adam.step()
        d_loss.item(), g_loss.item()

    return step


def wgan_step(trainer):
    """The textbook's step of gan_cub: d_steps iterations of the critic with gradient penalty, then one of G."""
    g, d = trainer.generator, trainer.discriminator
    g_adam, d_adam = (torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.0, 0.9)) for network in (g, d))

    def step(images):
        for real in images.chunk(trainer.d_steps):
            fake = g(torch.randn(len(real), trainer.latent_dim))
            epsilon = torch.rand(len(real), 1, 1, 1)
            mixed = (epsilon * real + (1 - epsilon) * fake.detach()).requires_grad_()
            logits = d(mixed)
            gradient, = torch.autograd.grad(logits, mixed, torch.ones_like(logits), create_graph=True)
            penalty = ((gradient.flatten(1).norm(2, dim=1) - 1)**2).mean()
            d_loss = d(fake).mean() - d(real).mean() + trainer.gp_weight * penalty
            d_adam.zero_grad()
            d_loss.backward()
            d_adam.step()
            d_loss.item(), penalty.item()
        g_loss = -d(g(torch.randn(len(real), trainer.latent_dim))).mean()
        g_adam.zero_grad()
        g_loss.backward()
        g_adam.step()
        g_loss.item()

    return step


def vae_step(trainer):
    """The textbook's step of main_vae and main_ae."""
    encoder, decoder = trainer.encoder, trainer.decoder
    parameters = [*encoder.parameters(), *decoder.parameters()]
    adam = torch.optim.Adam(parameters, lr=1e-3)

    def step(x):
        mu, logvar = encoder(x)
        std = torch.exp(0.5 * logvar)
        output = decoder(mu + std * torch.randn_like(std))
        if x.ndim == 4 and x.shape[1] == 3:
            reconstruction = F.mse_loss(output, x, reduction="sum") / len(x)
        else:
            reconstruction = F.binary_cross_entropy(torch.sigmoid(output), x, reduction="sum") / len(x)
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / len(x)
        loss = reconstruction + kl
        adam.zero_grad()
        loss.backward()
        if x.ndim == 4:
            nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
        adam.step()
        loss.item(), reconstruction.item(), kl.item()

    return step


def flat(images, labels):
    return images.flatten(1),


def alone(images, labels):
    return images,


def both(images, labels):
    return images, labels


# script: (the textbook's step, what a step takes, side, channels, copies of the digits that make up the real size,
#          steps a round, settings other than the defaults)
SMALL = {"feature_maps": 32, "batch_size": 32, "score_images": 0}  # at full size a step of gan_cub takes a minute
CASES = {
    "main_gan": (main_gan, gan_step, flat, 28, 1, 14, 200, {}),
    "main_vae": (main_vae, vae_step, flat, 28, 1, 14, 20, {}),
    "main_vae, float32": (main_vae, vae_step, flat, 28, 1, 14, 20, {"precision": "float32"}),
    "main_vae, batch 16": (main_vae, vae_step, flat, 28, 1, 14, 60, {"batch_size": 16}),
    "main_dcgan": (main_dcgan, gan_step, alone, 32, 3, 12, 8, {}),
    "main_cgan": (main_cgan, gan_step, both, 28, 1, 14, 12, {"image_channels": 1}),
    "main_ae": (main_ae, vae_step, alone, 32, 3, 12, 4, {}),
    "main_ae, float32": (main_ae, vae_step, alone, 32, 3, 12, 4, {"precision": "float32"}),
    "gan_cub, small": (gan_cub, wgan_step, alone, 32, 3, 2, 1, SMALL),
}


def build(module, side, channels, copies, settings, folder):
    """A trainer at the script's defaults, on the bundled digits repeated to the size of the real data."""
    dicts = [dict(kwargs) for kwargs in (module.model_kwargs, module.dataset_kwargs, module.trainer_kwargs)]
    chosen = {"dataset_type": "digits", "image_size": side, "num_epochs": 0, "num_iterations": 0, "device": "cpu",
              "output_dir": folder, **settings}
    for kwargs in dicts:
        kwargs.update({key: value for key, value in chosen.items() if key in kwargs and type(value) is type(kwargs[key])
                       and not (key == "image_size" and kwargs[key] > 100)})
    trainer = module.main(*dicts)
    images = getattr(trainer.train, "images", trainer.train)
    assert images.pixels.shape[1:] == (channels, side, side)
    images.pixels, images.labels = images.pixels.repeat(copies, 1, 1, 1), images.labels.repeat(copies)
    return trainer


def textbook_loop(trainer, textbook, takes):
    """Yield after each step of the textbook loop; it trains the trainer's own networks."""
    step, images = textbook(trainer), getattr(trainer.train, "images", trainer.train)
    loader = torch.utils.data.DataLoader(Pictures(images), trainer.train.batch_size, shuffle=True)
    while True:
        for batch in loader:
            step(*takes(*batch))
            yield


def script_loop(trainer, takes):
    """Yield after each step of the script's own loop, without its pictures."""
    trainer.run.num_epochs = 10**6
    for _ in trainer.run.epochs(trainer.train, {}):
        for batch in trainer.run.batches():
            trainer.run.log(trainer.step(*takes(*batch)))
            yield


def bare_loop(trainer, takes):
    batch = trainer.train.batch(torch.arange(trainer.train.batch_size))
    while True:
        trainer.step(*takes(*batch))
        yield


def batch_loop(trainer):
    while True:
        for index in trainer.train.order(0, 1):
            trainer.train.batch(index)
            yield


def hand_back_freed_memory():
    """Undo training.keep_freed_memory: the textbook has glibc's own settings, at the end of their adaptation."""
    libc = ctypes.CDLL(None)
    for option, value in ((-4, 65536), (-3, 32 * 2**20), (-1, 64 * 2**20)):
        libc.mallopt(option, value)


def measure(name, quick):
    """Milliseconds a step of each loop, medians over 2 or 9 rounds, and medians of the ratios within a round."""
    module, textbook, takes, side, channels, copies, steps, settings = CASES[name]
    real = {28: 60000, 32: 50000}[side]  # images of MNIST, of CIFAR-10
    default_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        loops, threads = {}, {}
        for loop in ("textbook", "script", "bare", "batch"):
            torch.set_num_threads(default_threads)
            trainer = build(module, side, channels, copies, settings, f"{folder}/{loop}")
            loops[loop] = {"textbook": lambda t: textbook_loop(t, textbook, takes),
                           "script": lambda t: script_loop(t, takes), "bare": lambda t: bare_loop(t, takes),
                           "batch": batch_loop}[loop](trainer)
            threads[loop] = default_threads if loop == "textbook" else torch.get_num_threads()
        times = {loop: [] for loop in loops}
        for number in range(3 if quick else 10):
            for loop, generator in loops.items():
                if module is main_ae and sys.platform == "linux":
                    training.keep_freed_memory() if loop != "textbook" else hand_back_freed_memory()
                torch.set_num_threads(threads[loop])
                begun = time.perf_counter()
                for _ in range(steps):
                    next(generator)
                if number:  # the first round warms up
                    times[loop].append((time.perf_counter() - begun) / steps * 1e3)
        torch.set_num_threads(default_threads)
        for generator in loops.values():
            generator.close()

    def ratio(a, b):
        return statistics.median(x / y for x, y in zip(times[a], times[b]))

    row = {"batch": trainer.train.batch_size, "threads": threads["script"],
           **{f"{loop}, ms": statistics.median(values) for loop, values in times.items()},
           "textbook / script": ratio("textbook", "script"), "bare / script": ratio("bare", "script"),
           "script, s an epoch": statistics.median(times["script"]) / 1e3 * real / trainer.train.batch_size,
           **({} if quick else first(module))}
    del row["batch, ms"]
    row["batch, % of script"] = 100 * ratio("batch", "script")
    return row


def seconds(*command):
    begun = time.perf_counter()
    output = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return time.perf_counter() - begun, output


def first(module):
    """Peak memory of a process that trains one step; time to the first step and of --help, over the bare import's."""
    path, imports, steps, helps, peak = f"{module.__name__}.py", [], [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(4):
            imports.append(seconds("-c", "import torch, torchvision")[0])
            took, output = seconds("-c", FIRST_STEP, str(ROOT / path), "--dataset_type", "digits", "--device", "cpu",
                                   "--output_dir", f"{folder}/{number}")
            steps.append(took)
            helps.append(seconds(path, "--help")[0])
            peak = max(peak, int(output.split()[-1]) / (2**20 if sys.platform == "darwin" else 2**10))
    return {"first step / import": statistics.median(s / i for s, i in zip(steps[1:], imports[1:])),
            "help / import": statistics.median(h / i for h, i in zip(helps[1:], imports[1:])), "memory, MiB": peak}


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    chosen = [argument for argument in sys.argv[1:] if argument != "--quick"] or list(CASES)
    if not set(chosen) <= set(CASES):
        sys.exit(f"{__doc__}\nscripts: {', '.join(CASES)}")
    head = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    print(head)
    table = {}
    for name in chosen:
        table[name] = measure(name, quick)
        print(f"{name}\n  " + "  ".join(f"{key} {value:.4g}" for key, value in table[name].items()), flush=True)
        Path("throughput.json").write_text(json.dumps({**head, "scripts": table}, indent=1))
