"""Training speed of each script beside the textbook loop and the bare step, in one run.

All of them train the same networks on the same data in batches of the same size.

run:    python benchmarks/throughput.py [--quick] [SCRIPT ...]
        (on an otherwise idle machine; twenty minutes, or a few with --quick)
prints: a table of medians over rounds in which the loops take turns; it is also written to
        throughput.json
        textbook  a good tutorial's loop, as in github.com/pytorch/examples: DataLoader, ToTensor,
                  Normalize; one batch of fakes, which D sees detached; plain Adam; losses read at
                  every step; torch's own number of threads; float32
        script    the script's own loop: run.batches and run.train_step, at its default settings
        bare      Trainer.step on one batch that is there already: the ceiling for any loader
        fit       what an epoch of the script's `fit` takes beside its steps: measuring, history,
                  checkpoint, and the pictures of the epochs that have some
        batch     the share of a step that goes into its batch
        memory    the most that a process of its own held while it trained one step
        first     from the command to the end of the first step on the bundled digits, over the
                  time of `python -c "import torch, torchvision"`; help: the same for --help;
                  --quick leaves these three out
"""

import contextlib
import copy
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import gan_cub
import main_ae
import main_cgan
import main_dcgan
import main_gan
import main_vae

ROOT = Path(__file__).parent.parent
# runs a script up to the end of its first step, then prints the most memory it held
FIRST_STEP = """
import os, resource, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import training
def train_step(self, step, *inputs):
    for value in step(*inputs).values():
        value.item()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    sys.stdout.flush()
    os._exit(0)
training.Run.train_step = train_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Pictures(torch.utils.data.Dataset):
    """Gives an image as torchvision's MNIST and CIFAR10 do: array to Pillow, then transforms."""

    def __init__(self, images):
        self.arrays = images.pixels.permute(0, 2, 3, 1).squeeze(3).numpy()
        self.labels = images.labels.tolist()
        steps = [transforms.ToTensor()]
        if images.normalize:
            half = (0.5,) * images.pixels.shape[1]
            steps.append(transforms.Normalize(half, half))
        self.transform = transforms.Compose(steps)

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def gan_step(trainer):
    """The textbook's step of main_gan, main_dcgan and main_cgan, after pytorch/examples/dcgan.

    D sees the fakes detached; G's loss still computes gradients of D's weights.
    """
    g, d = trainer.generator, trainer.discriminator
    latent_dim = trainer.fixed_z.shape[1]
    real_label = getattr(trainer, "real_label", 1.0)
    fake_label = getattr(trainer, "fake_label", 0.0)
    g_adam = torch.optim.Adam(g.parameters(), lr=2e-4, betas=(0.5, 0.999))
    d_adam = torch.optim.Adam(d.parameters(), lr=2e-4, betas=(0.5, 0.999))
    bce = nn.BCEWithLogitsLoss()

    def step(real, *labels):
        n = len(real)
        fake = g(torch.randn(n, latent_dim), *labels)
        real_loss = bce(d(real, *labels), torch.full((n,), real_label))
        fake_loss = bce(d(fake.detach(), *labels), torch.full((n,), fake_label))
        d_loss = real_loss + fake_loss
        d_adam.zero_grad()
        d_loss.backward()
        d_adam.step()
        g_loss = bce(d(fake, *labels), torch.ones(n))
        g_adam.zero_grad()
        g_loss.backward()
        g_adam.step()
        d_loss.item(), g_loss.item()

    return step


def wgan_step(trainer):
    """The textbook's step of gan_cub.

    It is d_steps iterations of the critic with gradient penalty, then one of G.
    """
    g, d = trainer.generator, trainer.discriminator
    latent_dim = trainer.fixed_z.shape[1]
    g_adam = torch.optim.Adam(g.parameters(), lr=2e-4, betas=(0.0, 0.9))
    d_adam = torch.optim.Adam(d.parameters(), lr=2e-4, betas=(0.0, 0.9))

    def step(images):
        for real in images.chunk(trainer.d_steps):
            fake = g(torch.randn(len(real), latent_dim)).detach()
            epsilon = torch.rand(len(real), 1, 1, 1)
            mixed = (epsilon * real + (1 - epsilon) * fake).requires_grad_()
            logits = d(mixed)
            ones = torch.ones_like(logits)
            (gradient,) = torch.autograd.grad(logits, mixed, ones, create_graph=True)
            penalty = ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
            d_loss = d(fake).mean() - d(real).mean() + 10.0 * penalty
            d_adam.zero_grad()
            d_loss.backward()
            d_adam.step()
            d_loss.item(), penalty.item()
        g_loss = -d(g(torch.randn(len(real), latent_dim))).mean()
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
            total = F.mse_loss(output, x, reduction="sum")
        else:
            total = F.binary_cross_entropy(torch.sigmoid(output), x, reduction="sum")
        reconstruction = total / len(x)
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / len(x)
        loss = reconstruction + kl
        adam.zero_grad()
        loss.backward()
        if x.ndim == 4:
            nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
        adam.step()
        loss.item(), reconstruction.item(), kl.item()

    return step


# what a script's step takes of a batch


def flat(images, labels):
    return (images.flatten(1),)


def alone(images, labels):
    return (images,)


def both(images, labels):
    return images, labels


@dataclasses.dataclass
class Case:
    script: object
    textbook: object  # makes the textbook's step of a trainer
    takes: object  # what a step takes of a batch
    side: int  # of the images, in pixels
    channels: int
    copies: int  # of the bundled digits, which make up the size of the real data
    steps: int  # a round
    settings: dict = dataclasses.field(default_factory=dict)  # other than the defaults


FLOAT32 = {"precision": "float32"}
BATCH_16 = {"batch_size": 16}
GREY = {"image_channels": 1}
# at full size a step of gan_cub takes a minute
SMALL = {"feature_maps": 32, "batch_size": 32, "score_images": 0, "loss": "wgan-gp"}
SMALL["sample_every"] = 5  # iterations of an epoch, which are one step
CASES = {
    "main_gan": Case(main_gan, gan_step, flat, 28, 1, 14, 200),
    "main_vae": Case(main_vae, vae_step, flat, 28, 1, 14, 20),
    "main_vae, float32": Case(main_vae, vae_step, flat, 28, 1, 14, 20, FLOAT32),
    "main_vae, batch 16": Case(main_vae, vae_step, flat, 28, 1, 14, 60, BATCH_16),
    "main_dcgan": Case(main_dcgan, gan_step, alone, 32, 3, 12, 8),
    "main_dcgan, float32": Case(main_dcgan, gan_step, alone, 32, 3, 12, 8, FLOAT32),
    "main_cgan": Case(main_cgan, gan_step, both, 28, 1, 14, 12, GREY),
    "main_cgan, float32": Case(main_cgan, gan_step, both, 28, 1, 14, 12, {**GREY, **FLOAT32}),
    "main_ae": Case(main_ae, vae_step, alone, 32, 3, 12, 4),
    "main_ae, float32": Case(main_ae, vae_step, alone, 32, 3, 12, 4, FLOAT32),
    "gan_cub, small": Case(gan_cub, wgan_step, alone, 32, 3, 2, 1, SMALL),
}


def build(case, folder):
    """(trainer, training images) at the script's defaults, before the first step.

    The images are the bundled digits, repeated to the size of the real data.
    """
    script = case.script
    dicts = [copy.deepcopy(script.model_kwargs), copy.deepcopy(script.dataset_kwargs)]
    dicts += [copy.deepcopy(script.trainer_kwargs), copy.deepcopy(script.run_kwargs)]
    chosen = {"dataset_type": "digits", "device": "cpu", "output_dir": folder, **case.settings}
    for kwargs in dicts:
        for key in kwargs:
            kwargs[key] = chosen.get(key, kwargs[key])
    if "image_size" in script.dataset_kwargs:  # elsewhere it counts the pixels of an image
        dicts[1]["image_size"] = case.side
    with mock.patch.object(script.Trainer, "fit"):  # main makes everything, but does not train
        trainer = script.main(*dicts)
    pixels = trainer.train.pixels.repeat(case.copies, 1, 1, 1)
    labels = trainer.train.labels.repeat(case.copies)
    assert pixels.shape[1:] == (case.channels, case.side, case.side)
    return trainer, dataclasses.replace(trainer.train, pixels=pixels, labels=labels)


def textbook_loop(case, trainer, images):
    """Yield after each step of the textbook loop; it trains the trainer's own networks."""
    step = case.textbook(trainer)
    loader = torch.utils.data.DataLoader(Pictures(images), images.batch_size, shuffle=True)
    while True:
        for batch in loader:
            step(*case.takes(*batch))
            yield


def script_loop(case, trainer, images):
    """Yield after each step of the script's own loop, without its pictures."""
    run = trainer.run
    for _ in run.epochs(images, {}, num_epochs=10**6):
        for batch in run.batches():
            run.train_step(trainer.step, *case.takes(*batch))
            yield


def bare_loop(case, trainer, images):
    """Yield after each step on always the same batch."""
    batch = images.batch(torch.arange(images.batch_size))
    while True:
        trainer.step(*case.takes(*batch))
        yield


def batch_loop(case, trainer, images):
    """Yield after each batch, which nothing is trained on."""
    while True:
        for index in images.epoch_batches(seed=0, epoch=1):
            images.batch(index)
            yield


def fit_loop(case, trainer, images):
    """Yield after each epoch of the script's own `fit`, which is as long as a round.

    Each call of `fit` goes on with the next epoch of one long run.
    """
    run, count = trainer.run, case.steps * images.batch_size
    pixels, labels = images.pixels[:count], images.labels[:count]
    trainer.train = dataclasses.replace(images, pixels=pixels, labels=labels)
    if hasattr(trainer, "test"):  # as many as of MNIST and CIFAR-10
        pixels = trainer.test.pixels.repeat(20, 1, 1, 1)
        labels = trainer.test.labels.repeat(20)
        trainer.test = dataclasses.replace(trainer.test, pixels=pixels, labels=labels)
    all_epochs, started = run.epochs, []

    def next_epoch(train, state, num_epochs, **kwargs):
        if not started:
            started.append(all_epochs(train, state, 10**6, **kwargs))
        yield next(started[0])

    run.epochs = next_epoch
    trainer.draw_animation = lambda: None  # of main_cgan, once in a run
    try:
        while True:
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.fit()
            yield
    finally:
        started[0].close()


LOOPS = {"textbook": textbook_loop, "script": script_loop, "bare": bare_loop, "fit": fit_loop}
LOOPS["batch"] = batch_loop


def take_turns(case, rounds):
    """({loop: milliseconds a step in each round}, images a step, threads of the script)."""
    default_threads = torch.get_num_threads()
    loops, threads = {}, {}
    times = {loop: [] for loop in LOOPS}
    with tempfile.TemporaryDirectory() as folder:
        for loop, make in LOOPS.items():
            torch.set_num_threads(default_threads)
            trainer, images = build(case, f"{folder}/{loop}")
            loops[loop] = make(case, trainer, images)
            # building the trainer has set the script's own number
            threads[loop] = torch.get_num_threads() if loop != "textbook" else default_threads
        for number in range(rounds + 1):
            for loop, steps in loops.items():
                torch.set_num_threads(threads[loop])
                begun = time.perf_counter()
                for _ in range(1 if loop == "fit" else case.steps):
                    next(steps)
                took = time.perf_counter() - begun
                if number:  # the first round warms up
                    times[loop].append(took / case.steps * 1e3)
        torch.set_num_threads(default_threads)
        for steps in loops.values():
            steps.close()
    return times, images.batch_size, threads["script"]


def median_ratio(numerators, denominators):
    return statistics.median(a / b for a, b in zip(numerators, denominators))


def measure(case, quick):
    """Medians of a step's milliseconds in each loop, and of the ratios within a round."""
    times, batch_size, threads = take_turns(case, rounds=2 if quick else 9)
    row = {"batch": batch_size, "threads": threads}
    for loop in ("textbook", "script", "bare"):
        row[f"{loop}, ms"] = statistics.median(times[loop])
    row["textbook / script"] = median_ratio(times["textbook"], times["script"])
    row["bare / script"] = median_ratio(times["bare"], times["script"])
    real_size = {28: 60000, 32: 50000}[case.side]  # images of MNIST, of CIFAR-10
    real_steps = real_size / batch_size
    row["script, s an epoch"] = row["script, ms"] / 1e3 * real_steps
    pairs = zip(times["fit"], times["script"])
    row["fit, s an epoch beside it"] = statistics.median(
        (fit - steps) * case.steps / 1e3 for fit, steps in pairs
    )
    if not quick:
        row |= first(case.script)
    row["batch, % of script"] = 100 * median_ratio(times["batch"], times["script"])
    return row


def seconds(*command):
    """(seconds that Python took with these arguments, what it printed)."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return time.perf_counter() - begun, done.stdout


def first(script):
    """Peak memory of a process that trains one step; time to the first step and of --help.

    The times are given over that of the bare import.
    """
    path = f"{script.__name__}.py"
    small = ["--dataset_type", "digits", "--device", "cpu", "--output_dir"]
    imports, steps, helps, peak = [], [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(4):
            imports.append(seconds("-c", "import torch, torchvision")[0])
            took, output = seconds("-c", FIRST_STEP, str(ROOT / path), *small, f"{folder}/{number}")
            steps.append(took)
            helps.append(seconds(path, "--help")[0])
            unit = 2**20 if sys.platform == "darwin" else 2**10
            peak = max(peak, int(output.split()[-1]) / unit)
    return {
        "first step / import": median_ratio(steps[1:], imports[1:]),
        "help / import": median_ratio(helps[1:], imports[1:]),
        "memory, MiB": peak,
    }


def main():
    quick = "--quick" in sys.argv
    chosen = [argument for argument in sys.argv[1:] if argument != "--quick"] or list(CASES)
    if not set(chosen) <= set(CASES):
        sys.exit(f"{__doc__}\nscripts: {', '.join(CASES)}")
    head = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    head["cores"] = os.cpu_count()
    print(head)
    table = {}
    for name in chosen:
        table[name] = measure(CASES[name], quick)
        numbers = [f"{key} {value:.4g}" for key, value in table[name].items()]
        print(f"{name}\n  " + "  ".join(numbers), flush=True)
        Path("throughput.json").write_text(json.dumps({**head, "scripts": table}, indent=1))


if __name__ == "__main__":
    main()
