"""What several test files share: scripts as subprocesses, and data sets in their own formats."""

import copy
import csv
import gzip
import hashlib
import importlib
import itertools
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import common

ROOT = Path(__file__).parent.parent
ANALYSIS = ["fid", "latent_space_interpolation", "latent_space_vae", "detect_vae_anomalies"]

# Options with which a training script runs in about a second, on a folder of a hundred small
# pictures: two epochs of nine steps, or in gan_cub two rounds of ten iterations.
SMALL = {
    "main_gan": {"generator_hidden_size": 16, "discriminator_hidden_size": 16, "image_size": 256},
    "main_dcgan": {"feature_maps": 4, "image_channels": 1, "image_size": 16},
    "main_cgan": {"feature_maps": 4, "image_channels": 1, "image_size": 16},
    "main_vae": {"hidden_size": 16, "iwae_samples": 2, "image_size": 256},
    "main_ae": {"feature_maps": 4, "latent_dim": 8, "image_channels": 1, "image_size": 16},
    "gan_cub": {
        "feature_maps": 4,
        "image_size": 16,
        "num_iterations": 20,
        "sample_every": 10,
        "score_images": 0,
    },
}
SHARED = {
    "dataset_type": "folder",
    "data_dir": "",  # where write_pictures has put them
    "device": "cpu",
    "num_threads": 1,
    "batch_size": 10,
    "num_epochs": 2,
    "precision": "float32",
    "output_dir": "out",
}


def find_browser():
    """Chromium on PATH, or None. On a machine that ought to have it, CI_BROWSER is set."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return shutil.which(name)
    return None


def keys_of(script):
    """{key: default} of all dicts of a module, in the order of the file."""
    found = {}
    for name, kwargs in vars(script).items():
        if name.endswith("_kwargs"):
            found.update(kwargs)
    return found


def dicts_of(script):
    """Copies of a module's dicts, in the order of the file."""
    return [copy.deepcopy(kw) for name, kw in vars(script).items() if name.endswith("_kwargs")]


def small_dicts(script, **overrides):
    """The dicts of a small run of a training script."""
    settings = {**SHARED, **SMALL[script.__name__], **overrides}
    dicts = dicts_of(script)
    return [{key: settings.get(key, kw[key]) for key in kw} for kw in dicts]


def small_options(name, **overrides):
    """The command line of a small run of the script of this name."""
    known = keys_of(importlib.import_module(name))
    settings = {**SHARED, **SMALL[name], **overrides}
    pairs = [(f"--{key}", str(value)) for key, value in settings.items() if key in known]
    return [word for pair in pairs for word in pair]


def run_here(script, *options):
    """The exit status of a module's command line with these options, in this process."""
    with patch.object(sys, "argv", [f"{script.__name__}.py", *map(str, options)]):
        try:
            common.run_script(script.main, *dicts_of(script))
        except SystemExit as stop:
            return stop.code
    return 0


@contextmanager
def after_optimiser_steps(number, action):
    """Call `action` after so many steps of all optimisers together."""
    count = itertools.count(1)

    def look(*_):
        if next(count) == number:
            action()

    hook = register_optimizer_step_post_hook(look)
    try:
        yield
    finally:
        hook.remove()


def state_dicts(trainer):
    """{name: tensors} of all networks that a trainer holds."""
    parts = vars(trainer).items()
    return {name: part.state_dict() for name, part in parts if isinstance(part, torch.nn.Module)}


def five_steps_of_main_gan():
    """The networks after five steps, in double precision, of which each process takes its share.

    However many processes there are, together they see the same images and draw the same noise.
    """
    script = importlib.import_module("main_gan")
    small = dict(num_epochs=0, output_dir="five_steps", generator_lr=0.01, discriminator_lr=0.01)
    trainer = script.main(*small_dicts(script, **small))
    trainer.generator.double()
    trainer.discriminator.double()
    noise = torch.Generator().manual_seed(5)
    count, rank, randn = common.PROCESSES, common.RANK, torch.randn

    def shared(n, size, device):
        return randn(n * count, size, generator=noise).double().chunk(count)[rank]

    with patch.object(torch, "randn", shared):
        for index in torch.arange(80).split(16):
            real = trainer.train.batch(index)[0].flatten(1).double()
            trainer.step(real.chunk(count)[rank])
    return state_dicts(trainer)


def wait_for(process):
    """(stdout, stderr) when it has ended; one that does not end is stopped, and what it started."""
    try:
        return process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then stops its own processes
        output, errors = process.communicate(timeout=60)
        raise AssertionError(f"{process.args} did not end: {output} {errors}")


def open_terminal():
    """Both ends of a pseudo-terminal of 24 lines and 200 columns."""
    import fcntl
    import pty
    import termios

    own_end, its_end = pty.openpty()
    size = struct.pack("4H", 24, 200, 0, 0)  # termios.tcsetwinsize is new in Python 3.11
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, size)
    return own_end, its_end


class Process:
    """Any script as a subprocess, with `python SCRIPT.py options` as its command line.

    terminal: its stderr is a pseudo-terminal, so that the progress bar runs.
    prelude: Python code that is run before the script.
    """

    def __init__(self, script, options, *, cwd, terminal=False, prelude=""):
        command = [sys.executable]
        path = str(Path(ROOT, f"{script}.py"))
        if prelude:
            start = f"import sys, runpy; {prelude}; sys.argv[0] = {path!r}"
            command += ["-c", f"{start}; runpy.run_path({path!r}, run_name='__main__')"]
        else:
            command += [path]
        own_end, its_end = open_terminal() if terminal else (None, subprocess.PIPE)
        cwd.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [*command, *map(str, options)],
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=its_end,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        self.shown = []
        self.reader = None
        if terminal:
            os.close(its_end)
            self.reader = threading.Thread(target=self.read_terminal, args=[own_end])
            self.reader.start()

    def read_terminal(self, own_end):
        try:
            while part := os.read(own_end, 4096):
                self.shown.append(part)
        except OSError:
            pass  # Linux's way of saying that the other end was closed
        os.close(own_end)

    def finish(self):
        """(exit status, stdout, stderr) when it has ended."""
        output, errors = wait_for(self.process)
        if self.reader:
            self.reader.join()
            errors = b"".join(self.shown).decode()
        return self.process.returncode, output, errors


def differences(one, other, place="contents"):
    """Where two contents of .pt files differ: dicts, lists, tensors and numbers."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(f"{place}.{key}", one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)) and len(one) == len(other):
        pairs = [(f"{place}[{i}]", *both) for i, both in enumerate(zip(one, other))]
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [place]
    else:
        return [] if one == other else [f"{place}: {one!r} and {other!r}"]
    return [found for path, a, b in pairs for found in differences(a, b, path)]


def read_history(folder):
    """The rows of history.csv, as text."""
    with open(Path(folder, "history.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_pictures(folder):
    """A hundred pictures of 16 x 16 in two classes; 90 of them are for training."""
    images = OwnDataset(count=100, size=16)
    for number in range(100):
        image, label = images[number]
        path = Path(folder, images.classes[label], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    SHARED["data_dir"] = str(folder)


def read_png(path):
    """A picture's pixels (height, width, 3)."""
    return np.asarray(Image.open(path).convert("RGB"))


def tiles(path, size, columns, count):
    """The pictures of a grid of save_grid, (count, size, size, 3), without zoom and margins."""
    pixels = read_png(path)
    zoom = pixels.shape[1] // (columns * (size + 2) + 2)
    pixels = pixels[::zoom, ::zoom]
    found = []
    for number in range(count):
        top = 2 + number // columns * (size + 2)
        left = 2 + number % columns * (size + 2)
        found.append(pixels[top : top + size, left : left + size])
    return np.stack(found)


def grey_levels(images, low=-1.0, high=1.0):
    """Images (N, C, H, W) as the pixels that a picture of them must have: (N, H, W, 3)."""
    levels = ((images.clamp(low, high) - low) / (high - low) * 255).round().byte()
    return levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def cut_off_network(monkeypatch):
    """Downloads fail at once."""
    from torchvision import datasets

    dead = "http://127.0.0.1:9/"
    monkeypatch.setattr(datasets.MNIST, "mirrors", [dead])
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [dead])
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{dead}cifar-10-python.tar.gz")


def write_mnist(folder, monkeypatch, name="MNIST"):
    """MNIST or FashionMNIST in its own format, ten images a split, gzipped.

    Returns {"train": (pixels (10, 28, 28), labels (10,)), "t10k": ...}.
    """
    from torchvision import datasets

    raw = Path(folder, name, "raw")
    raw.mkdir(parents=True, exist_ok=True)
    resources, written = [], {}
    for seed, split in enumerate(("train", "t10k")):
        random = np.random.RandomState(seed)
        images = random.randint(0, 256, (10, 28, 28), dtype=np.uint8)
        labels = random.permutation(10).astype(np.uint8)
        written[split] = images, labels
        for kind, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
            header = np.array([magic, *array.shape], dtype=">i4").tobytes()
            path = raw / f"{split}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes()))
            resources.append((path.name, hashlib.md5(path.read_bytes()).hexdigest()))
    monkeypatch.setattr(getattr(datasets, name), "resources", resources)
    return written


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10_CLASSES += ["dog", "frog", "horse", "ship", "truck"]


def write_cifar10(folder, monkeypatch):
    """CIFAR-10's archive in its own format, with two images a batch.

    Returns {"train": (pixels (10, 32, 32, 3), labels), "test": (pixels (2, 32, 32, 3), labels)}.
    """
    from torchvision import datasets

    random = np.random.RandomState(0)
    inside = Path(folder, "cifar-10-batches-py")
    inside.mkdir(parents=True)
    names = [f"data_batch_{number}" for number in range(1, 6)]
    written, sums = {}, {}
    for split, files in (("train", names), ("test", ["test_batch"])):
        pixels, labels = [], []
        for file in files:
            images = random.randint(0, 256, (2, 32, 32, 3), dtype=np.uint8)
            numbers = random.randint(0, 10, 2).tolist()
            planes = images.transpose(0, 3, 1, 2).reshape(2, 3072)  # red, green, blue
            with open(inside / file, "wb") as batch:
                pickle.dump({"data": planes, "labels": numbers}, batch)
            pixels.append(images)
            labels += numbers
        written[split] = np.concatenate(pixels), labels
    with open(inside / "batches.meta", "wb") as meta:
        pickle.dump({"label_names": CIFAR10_CLASSES}, meta)
    for path in inside.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    archive = Path(folder, "cifar-10-python.tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(inside, inside.name)
    for path in inside.iterdir():
        path.unlink()
    inside.rmdir()
    cifar10 = datasets.CIFAR10
    monkeypatch.setattr(cifar10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar10, "train_list", [[name, sums[name]] for name in names])
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(cifar10, "meta", meta)
    return written


class OwnDataset(torch.utils.data.Dataset):
    """A user's data set: colour pictures whose brightness tells the class."""

    classes = ["dark", "bright"]

    def __init__(self, count=40, size=8):
        random = np.random.RandomState(0)
        self.labels = [number % 2 for number in range(count)]
        shades = np.array(self.labels).reshape(-1, 1, 1, 1) * 128
        self.pixels = (shades + random.randint(0, 128, (count, size, size, 3))).astype(np.uint8)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        return Image.fromarray(self.pixels[number]), self.labels[number]
