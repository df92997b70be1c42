"""What every script shares: settings from the command line, data sets, pictures, weights files.

Nothing about a model is in here: no network, no loss, no optimiser step.
"""

import argparse
import csv
import difflib
import gc
import hashlib
import importlib
import io
import json
import math
import os
import random
import re
import socket
import sys
import tarfile
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed

# matplotlib, Pillow, torchvision and tqdm are imported where they are used,
# because --help and the first step need none of them.

# torchrun sets these two variables in each of its processes
RANK = int(os.environ.get("RANK", "0"))
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


# ----------------------------------------------------------------------- settings


class BadInput(ValueError):
    """Something that the user can put right: one line on stderr, exit status 2."""


class BrokenOff(RuntimeError):
    """A run that cannot go on: one line on stderr, exit status 1."""


def require(condition, sentence):
    """Raise BadInput unless the condition holds. The sentence names what is legal."""
    if not condition:
        raise BadInput(sentence)


def warn(line):
    """Print one line on stderr, in the first process only."""
    if RANK == 0:
        print(" ".join(line.split()), file=sys.stderr, flush=True)


def read_comments(script):
    """{key: comment} of the lines `"key": value,  # comment`. Only --help shows them."""
    text = Path(script).read_text(encoding="utf-8")
    return dict(re.findall(r'^ +"(\w+)": .*?  # (.+)$', text, re.MULTILINE))


# argparse makes "invalid float value" and the like of a ValueError
def boolean(text):
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def finite(text):
    if not math.isfinite(float(text)):
        raise ValueError(text)
    return float(text)


# the names that argparse shows
boolean.__name__ = "true|false"
finite.__name__ = "float"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def parse_command_line(script, description, dicts):
    """Copies of the script's dicts, with the values that `--KEY VALUE` gives."""
    parser = Parser(
        prog=script.name,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comments = read_comments(script)
    readers = {bool: boolean, int: int, float: finite, str: str}
    for kwargs in dicts:
        for key, default in kwargs.items():
            if type(default) not in readers:
                continue  # such as a Dataset, which can be changed only in the file
            parser.add_argument(
                f"--{key}",
                type=readers[type(default)],
                default=default,
                metavar="true|false" if isinstance(default, bool) else type(default).__name__,
                help=f"{comments.get(key, '')} (default: {default})".replace("%", "%%"),
            )
    chosen, unknown = parser.parse_known_args()
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-"), vars(chosen), n=1)
        advice = f"did you mean --{near[0]}?" if near else "see --help"
        raise BadInput(f"unknown key {unknown[0]}; {advice}")
    changed = []
    for kwargs in dicts:
        changed.append({key: getattr(chosen, key, kwargs[key]) for key in kwargs})
    return changed


def run_script(main, *dicts):
    """Call `main` with the script's dicts, changed as the command line says.

    Exit status: 0 done; 1 the run broke off (a loss is not finite, the disk is full);
    2 bad input; 130 Ctrl-C; 143 SIGTERM.
    """
    script = Path(main.__code__.co_filename)
    try:
        main(*parse_command_line(script, main.__globals__["__doc__"], dicts))
    except BadInput as error:
        warn(f"{script.name}: {error}")
        sys.exit(2)
    except (BrokenOff, OSError) as error:
        warn(f"{script.name}: {error}")
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        # torch has no exception of its own for a CPU's memory
        if not full and "DefaultCPUAllocator" not in str(error):
            raise
        has_batches = any("batch_size" in kwargs for kwargs in dicts)
        advice = "; give a smaller --batch_size" if has_batches else ""
        warn(f"{script.name}: out of memory{advice}")
        sys.exit(1)
    except KeyboardInterrupt as error:
        warn(f"{script.name}: {str(error) or 'interrupted'}")
        sys.exit(130)


def choose_device(device):
    """A torch.device; `auto` takes cuda, else mps, else cpu.

    Raises BadInput for one that cannot be used, and for fewer GPUs than processes.
    """
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available() and PROCESSES == 1:  # torchrun cannot use mps
            device = "mps"
        else:
            device = "cpu"
    if device == "cuda" and PROCESSES > 1:  # each process has a GPU of its own
        wanted, there = os.environ.get("LOCAL_WORLD_SIZE", "1"), torch.cuda.device_count()
        few = f"{wanted} processes need {wanted} GPUs, not {there}; or give --device cpu"
        require(int(wanted) <= there, few)
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        torch.zeros(1, device=device).item()  # meta has no values
    except Exception as error:  # each kind of device has its own
        reason = str(error).partition("\n")[0]
        raise BadInput(f"device {device!r} cannot be used here: {reason}")
    return torch.device(device)


def use_bfloat16(precision, device):
    """Whether networks are to compute in bfloat16. `auto`: where the device is fast at it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # new in torch 2.10
        found = torch.cpu.get_capabilities()
        return found.get("avx512_bf16", False) or found.get("amx_bf16", False)
    return False


def seed_everything(seed):
    """Seed torch (on every device), numpy and Python."""
    require(0 <= seed < 2**32, "seed must be between 0 and 4294967295")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# -------------------------------------------------------------------------- files


def write(path, content):
    """Write bytes, a matplotlib figure (as PNG), or a table: a list of rows {column: value}.

    It goes to a temporary name that is then renamed, so `path` never holds half a file. Of
    several processes only the first one writes. Raises OSError.
    """
    if RANK:
        return
    if isinstance(content, list):
        columns = dict.fromkeys(column for row in content for column in row)
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(content)
        content = text.getvalue().encode()
    elif not isinstance(content, bytes):
        buffer = io.BytesIO()
        content.savefig(buffer, dpi=110)
        content = buffer.getvalue()
        gc.collect()  # a figure refers to itself; else memory would grow with every figure
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error.strerror}; the old file is untouched")


def fill_page(name, data):
    """A template of pages/ with `data` filled in, and network.js if it asks for it, as bytes.

    NaN becomes null.
    """
    pages = Path(__file__).parent / "pages"
    template = (pages / name).read_text(encoding="utf-8")
    network = (pages / "network.js").read_text(encoding="utf-8")
    plain = json.loads(json.dumps(data), parse_constant=lambda number: None)
    text = json.dumps(plain).replace("<", "\\u003c")  # no name can end the script element
    return template.replace("@NETWORK@", network).replace("@DATA@", text).encode()


def save_tensors(path, contents):
    """torch.save by way of `write`."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write(path, buffer.getvalue())


def cache(path, script, **contents):
    """Keep what was computed, if the folder can be written; load_weights reads it."""
    try:
        save_tensors(path, {"script": script, **contents})
    except OSError as error:
        warn(f"not cached: {error}")


def load_weights(path, script, part):
    """Read a .pt file that `script` wrote (None: any) and that holds `part`, onto the CPU.

    script: a name, or __file__. No code in the .pt is run (weights_only). Raises BadInput for
    every other file.
    """
    script = Path(script).stem if script else None
    advice = f"; train first: python {script}.py" if script else ""
    require(Path(path).is_file(), f"there is no file {path}{advice}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types here
        holds_code = "GLOBAL" in str(error)
        why = "holds code, which is not run" if holds_code else "is damaged or no .pt file"
        raise BadInput(f"{path} {why}")
    if not isinstance(contents, dict) or "script" not in contents:
        raise BadInput(f"{path} was not written by this collection")
    written_by = contents["script"]
    if script and written_by != script:
        raise BadInput(f"{path} was written by {written_by}.py, not by {script}.py")
    of_a_cache = written_by in ("common", "fid")  # such a file holds no model
    if "dataset_kwargs" not in contents and not of_a_cache:
        raise BadInput(
            f"{path} was written by an older version of this collection, which did not record "
            "the data; train again, or use that version"
        )
    kinds = "weights_*.pt is for sampling, checkpoint.pt for continuing"
    require(part in contents, f"{path} holds no {part} (it is of {written_by}.py); {kinds}")
    return contents


def newest_weights(part=None):
    """The newest weights_*.pt that holds `part` (None: any), below the current folder.

    If there is none, a copy of the collection's own weights/main_vae.pt, which is made here.
    """
    copy = Path("shipped_VAE/weights_main_vae.pt")
    files = {*Path().glob("*/weights_*.pt"), *Path().glob("*/*/weights_*.pt")} - {copy}
    files = sorted(files)  # so that of equally new ones always the same is taken
    for path in sorted(files, key=os.path.getmtime, reverse=True):
        try:
            load_weights(path, None, part or "model_kwargs")
            return str(path)
        except BadInput:
            continue  # of another kind, old or damaged
    shipped = Path(__file__).parent / "weights" / "main_vae.pt"
    trained = f"no {part}" if part else "nothing"
    warn(f"{trained} was trained here: taking the collection's own weights, as {copy}")
    write(copy, shipped.read_bytes())
    return str(copy)


def script_of(weights):
    """The module of the script that wrote these weights; only the collection's own are imported."""
    own = [path.stem for path in Path(__file__).parent.glob("*.py")]
    name = weights["script"]
    require(name in own, f"the weights are of {name}.py, which is no script of this collection")
    return importlib.import_module(name)


# ---------------------------------------------------------------------- data sets


@dataclass
class Images:
    """One split of a data set: a single uint8 tensor on the device, without a DataLoader.

    pixels (N, C, H, W) uint8, labels (N,) int64. name is for titles and for the history.
    dataset_type is what was really loaded, and data_dir where it was read from.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    class_names: list
    name: str
    dataset_type: str
    data_dir: str
    batch_size: int = 1
    shuffle: bool = False
    normalize: bool = True  # batches are in [-1, 1]; without it in [0, 1]
    horizontal_flip: bool = False

    def __len__(self):
        return len(self.pixels)

    @property
    def device(self):
        return self.pixels.device

    def to(self, device):
        """The same images on another device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def record(self):
        """What weights and checkpoints record of the data."""
        return {
            "name": self.name,
            "dataset_type": self.dataset_type,
            "images": len(self),
            "shape": list(self.pixels.shape[1:]),
            "normalize": self.normalize,
            "class_names": self.class_names,
        }

    def batch(self, index):
        """index (N,) -> images (N, C, H, W) float32 in [-1, 1] or [0, 1], and labels (N,)."""
        images = self.pixels.index_select(0, index).float()
        images = images.mul_(2 / 255).sub_(1) if self.normalize else images.div_(255)
        if self.horizontal_flip:
            mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
            images = torch.where(mirrored, images.flip(3), images)
        return images, self.labels.index_select(0, index)

    def epoch_batches(self, seed, epoch, steps=None):
        """The indices of this process's batches in an epoch (from 1), in an order by the seed.

        An epoch is a pass over the data, or, with `steps`, that many full batches, cut from
        an endless row of passes. Of 100 images and 4 steps of 30 it has the first pass and
        the first 20 of the second. Processes share each step's images evenly, so that a pass
        leaves out at most PROCESSES - 1 of them.
        """
        images_a_pass = len(self) // PROCESSES * PROCESSES
        images_a_step = self.batch_size * PROCESSES
        length = steps * images_a_step if steps else images_a_pass
        start = (epoch - 1) * length  # in the endless row
        first_pass, last_pass = start // images_a_pass, (start + length - 1) // images_a_pass
        passes = []
        for number in range(first_pass, last_pass + 1):
            passes.append(self.one_pass(seed, number)[:images_a_pass])
        offset = start % images_a_pass  # where the epoch begins in its first pass
        index = torch.cat(passes)[offset : offset + length].to(self.device)
        return [step.chunk(PROCESSES)[RANK] for step in index.split(images_a_step)]

    def one_pass(self, seed, number):
        """Indices of all images in the order of pass `number` (from 0)."""
        if not self.shuffle:
            return torch.arange(len(self))
        # so far apart that no two seeds below 4,000 have a pass in common
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number + 1)
        return torch.randperm(len(self), generator=generator)


@contextmanager
def first_process_first():
    """The others wait until the first process is done, and then find what it downloaded."""
    if PROCESSES > 1 and RANK:
        distributed.barrier()  # here the others wait ...
    try:
        yield
    finally:
        if PROCESSES > 1 and not RANK:
            distributed.barrier()  # ... until the first process comes here


DOWNLOAD_TIMEOUT = 15  # seconds without an answer
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
DATASET_TYPES = (*TORCHVISION, "cub", "sprites", "folder", "digits")
OWN_SIZE = {"mnist": 28, "fashion_mnist": 28, "digits": 28, "sprites": 16}  # others: 32
PLACES = {
    "mnist": "MNIST/raw/*-ubyte.gz",
    "fashion_mnist": "FashionMNIST/raw/*-ubyte.gz",
    "cifar10": "cifar-10-python.tar.gz or, unpacked, cifar-10-batches-py/",
    "cub": "CUB_200_2011.tgz or, unpacked, CUB_200_2011/images/",
    "sprites": "sprites_1788_16x16.npy and sprite_labels_nc_1788_16x16.npy (deeplearning.ai, How "
    "Diffusion Models Work) or sprites.npy and sprites_labels.npy (Kaggle, "
    "ebrahimelgazar/pixel-art)",
}
CUB = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_SHA256 = "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"
SPRITES = {  # file of the images: file of their labels
    "sprites_1788_16x16.npy": "sprite_labels_nc_1788_16x16.npy",
    "sprites.npy": "sprites_labels.npy",
}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def open_data_set(dataset_type, data_dir, size, channels, jpeg_quality):
    """([(pixels, labels) to train, (pixels, labels) to test], class names).

    pixels (N, C, H, W) uint8, of some kinds not yet of this size; labels (N,) int64. Raises
    OSError for data that are neither there nor downloadable, BadInput for files that hold
    something else.
    """
    if not isinstance(dataset_type, str):
        return load_dataset(dataset_type, size, channels)
    if dataset_type == "folder":
        return load_folder(data_dir, size, channels)
    if dataset_type == "digits":
        return load_digits(channels)
    if dataset_type == "cub":
        return load_cub(data_dir, size, channels, jpeg_quality)
    if dataset_type == "sprites":
        return load_sprites(data_dir)
    return load_torchvision(dataset_type, data_dir)


def warn_of_fallback(name, why):
    frame = "!" * 80
    warn(frame)
    warn(f"WARNING: THIS IS NOT {name.upper()}. {why}.")
    warn("Going on with the 5,000 bundled digits instead; every result will say so.")
    warn(frame)


@first_process_first()
def load_data(
    dataset_type,
    data_dir,
    *,
    image_channels,
    device,
    image_size=0,
    allow_fallback=True,
    jpeg_quality=0,
    exclude_class=-1,
    batch_size=1,
    shuffle=False,
    normalize=True,
    horizontal_flip=False,
):
    """Load a data set as (train, test), two `Images` on the device. Raises BadInput.

    See `read_data_set` for what can be read, and `Images` for the last four keys.
    allow_fallback: whether the bundled digits may stand in. jpeg_quality: cub's images are
    compressed with it and read again; 0: they are not. exclude_class: a label that is left
    out; -1 keeps all.
    """
    require(batch_size >= 1, "batch_size must be at least 1")
    require(exclude_class >= -1, "exclude_class must be a label, or -1 to keep all")
    device = choose_device(device)
    train, test = read_data_set(
        dataset_type, data_dir, image_channels, image_size, jpeg_quality, allow_fallback
    )
    if exclude_class >= 0:
        labels = train.labels.unique().tolist()
        wrong = f"exclude_class {exclude_class} must be a label, and there must be others"
        require(exclude_class in labels and len(labels) > 1, wrong)
        train, test = leave_out(train, exclude_class), leave_out(test, exclude_class)
        require(len(test) > 0, f"exclude_class {exclude_class} leaves no image to test on")
    most = f"batch_size must be at most {len(train)}, all images of {train.name}"
    require(batch_size <= len(train), most)
    batches = dict(batch_size=batch_size, shuffle=shuffle, normalize=normalize)
    train = replace(train.to(device), **batches, horizontal_flip=horizontal_flip)
    return train, replace(test.to(device), **batches)


def kind_of(dataset_type):
    """The name of a data set, or that of the class of a torch Dataset from Python.

    Raises BadInput for an unknown name.
    """
    if not isinstance(dataset_type, str):
        return type(dataset_type).__name__
    legal = f"dataset_type must be one of {', '.join(DATASET_TYPES)}, not {dataset_type!r}"
    require(dataset_type in DATASET_TYPES, legal)
    return dataset_type


def read_data_set(dataset_type, data_dir, channels, image_size, jpeg_quality, allow_fallback):
    """Read a data set as (train, test), two `Images` on the CPU.

    dataset_type: mnist, fashion_mnist, cifar10 and cub are read from data_dir, or else
    downloaded; sprites are only read. Where that fails, the bundled digits stand in, with a
    warning. folder: the images in data_dir, whose sub-folders, if it has any, are the
    classes. digits: 5,000 of MNIST, in random colours for 3 channels. Or a torch Dataset of
    (image, label). A fixed tenth is held out where there is no test split. image_size: 0 is
    the data set's own, or 32 if it has none.
    """
    loaded = kind_of(dataset_type)
    require(image_size >= 0, "image_size must be at least 1, or 0 for the data set's own")
    require(channels in (1, 3), "image_channels must be 1 (grey) or 3 (colour)")
    require(0 <= jpeg_quality <= 100, "jpeg_quality must be between 0 and 100")
    size = image_size or OWN_SIZE.get(loaded, 32)
    name = f"folder {Path(data_dir).resolve().name}" if loaded == "folder" else loaded
    try:
        splits, classes = open_data_set(dataset_type, data_dir, size, channels, jpeg_quality)
    except OSError as error:
        if name not in PLACES:
            raise
        why = f"{name} could be neither read from {data_dir}/ nor downloaded ({error})"
        why = f"{why}; put {PLACES[name]} there, in place of what is there"
        require(allow_fallback, why)
        warn_of_fallback(name, why)
        splits, classes = load_digits(channels)
        name, loaded = f"digits (bundled, in place of {name})", "digits"
    both = []
    for pixels, labels in splits:
        pixels = resize(pixels, size, channels).contiguous()
        both.append(Images(pixels, labels, list(classes), name, loaded, str(data_dir)))
    return both


def leave_out(images, label):
    """The Images without this class."""
    kept = images.labels != label
    name = f"{images.name} without {label}"
    return replace(images, pixels=images.pixels[kept], labels=images.labels[kept], name=name)


def load_again(weights, data_dir, device, exclude_class=-1):
    """(train, test) that these weights were trained on, in the same shape and range.

    data_dir "": where the data were in training. A class that was left out is there again,
    unless exclude_class says otherwise. Nothing stands in for missing data, except for the
    weights that come with the collection, where the bundled digits do. Raises BadInput.
    """
    data, kwargs = weights["data"], weights["dataset_kwargs"]
    kind = data["dataset_type"]
    if kind not in DATASET_TYPES:
        raise BadInput(f"the weights are of a Dataset from Python ({kind}), which is not here")
    channels, size, _ = data["shape"]
    train, test = load_data(
        kind,
        data_dir or kwargs["data_dir"],
        image_channels=channels,
        image_size=size,
        normalize=data["normalize"],
        jpeg_quality=kwargs.get("jpeg_quality", 0),
        allow_fallback=weights.get("shipped", False),
        exclude_class=exclude_class,
        device=device,
    )
    if kind == "folder" and train.class_names != data["class_names"]:
        raise BadInput(f"{train.data_dir} holds other classes than the weights were trained on")
    return train, test


def describe_source(weights, images):
    """For titles: which script's weights these are, what they learnt, and what is shown."""
    script, data = weights["script"], weights["data"]
    learnt = data["name"]
    same_kind = images.dataset_type == data["dataset_type"]
    if images.name == learnt or (same_kind and images.dataset_type != "folder"):
        return f"{script} on {learnt}"
    return f"{script}, trained on {learnt}; images of {images.name}"


def resize(pixels, size, channels):
    """(N, C, H, W) uint8 -> (N, channels, size, size), squeezed by bicubic interpolation.

    Only 28 to 32 is padded: with black, or in colour with the colours of the edge.
    """
    from torchvision.transforms import functional as TF

    if pixels.shape[1] > channels:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # luma, ITU-R BT.601
        pixels = (pixels * weights).sum(1, keepdim=True).round().byte()
    pixels = pixels.expand(-1, channels, -1, -1)
    if pixels.shape[2:] == (28, 28) and size == 32:
        return TF.pad(pixels, [2], padding_mode="edge" if channels == 3 else "constant")
    if pixels.shape[2:] == (size, size):
        return pixels
    return TF.resize(pixels, [size, size], TF.InterpolationMode.BICUBIC, antialias=True)


def hold_out_a_tenth(pixels, labels):
    """[(pixels, labels) to train, (pixels, labels) to test]: always the same tenth for testing."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([max(1, len(order) // 10)])
    return [(pixels[part], labels[part]) for part in (train, test)]


@contextmanager
def downloading():
    """Inside, a server that does not answer times out, and every failure is an OSError."""
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    except Exception as error:  # torchvision and urllib raise half a dozen types here
        raise OSError(" ".join(str(error).split()) or repr(error))
    finally:
        socket.setdefaulttimeout(None)  # Python's default


def load_torchvision(name, data_dir):
    """MNIST, FashionMNIST or CIFAR-10. Raises OSError if neither found nor downloadable."""
    from torchvision import datasets

    dataset = getattr(datasets, TORCHVISION[name])
    with downloading():
        parts = [dataset(data_dir, train=train, download=True) for train in (True, False)]
    splits = []
    for part in parts:
        pixels = torch.as_tensor(part.data)  # (N, H, W), or (N, H, W, C) in colour
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        splits.append((pixels, torch.as_tensor(part.targets)))
    return splits, parts[0].classes


def load_dataset(dataset, size, channels):
    """Any torch Dataset of (image, label). Raises BadInput.

    An image is Pillow's, or a tensor (C, H, W): uint8, or floats in [0, 1].
    """
    from torchvision.transforms.functional import pil_to_tensor

    pixels, labels = [], []
    for i in range(len(dataset)):
        image, label = dataset[i]
        if not isinstance(image, torch.Tensor):
            kind = type(image).__name__
            wrong = f"image {i} of the Dataset must be Pillow's or a tensor, not {kind}"
            require(hasattr(image, "mode"), wrong)
            deep = image.mode[0] in "IF"  # more than 8 bits a channel
            require(not deep, f"image {i} of the Dataset has mode {image.mode}; bring it to 8 bits")
            image = pil_to_tensor(flatten_image(image, channels))
        if image.is_floating_point():
            inside = image.min() >= 0 and image.max() <= 1
            require(inside, f"image {i} of the Dataset must be uint8, or floats in [0, 1]")
            image = (255 * image).round().byte()
        good = image.dtype == torch.uint8 and image.shape[0] in (1, 3)
        require(good, f"image {i} of the Dataset must be uint8 or floats, (1 or 3, H, W)")
        pixels.append(resize(image[None], size, channels))
        labels.append(int(label))
    require(len(labels) > 1, "the Dataset must hold two images or more")
    names = getattr(dataset, "classes", None)  # those of torchvision have it
    if names is None or len(names) == 0:
        names = range(max(labels) + 1)
    named = min(labels) >= 0 and max(labels) < len(names)
    require(named, f"labels of the Dataset must be from 0 to {len(names) - 1}, one for each class")
    class_names = [str(name) for name in names]  # plain words, even if they are numpy's
    return hold_out_a_tenth(torch.cat(pixels), torch.tensor(labels)), class_names


def load_digits(channels):
    """The bundled digits: grey, or for 3 channels each in a random colour on another one."""
    splits = []
    with np.load(Path(__file__).parent / "data" / "mnist_5k.npz") as packed:
        for seed, split in enumerate(("train", "test")):
            pixels = torch.from_numpy(packed[f"{split}_images"]).unsqueeze(1)
            labels = torch.from_numpy(packed[f"{split}_labels"])
            # the file is sorted by class, so they are shuffled, always in the same way
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
            pixels, labels = pixels[order], labels[order]
            if channels == 3:
                generator = torch.Generator().manual_seed(seed)
                ground = torch.rand(len(pixels), 3, 1, 1, generator=generator)
                # half the range away in each channel, give or take 0.15: every digit is seen
                ink = ground + 0.35 + 0.3 * torch.rand(ground.shape, generator=generator)
                ink = ink % 1
                pixels = (255 * ground + pixels * (ink - ground)).round().byte()
            splits.append((pixels, labels))
    return splits, [str(digit) for digit in range(10)]


def load_sprites(data_dir):
    """Pixel art (N, H, W, 3) uint8 with labels (N,) or one-hot (N, classes), duplicates removed.

    Raises OSError where there are no such files, BadInput where they hold something else.
    """
    found = [name for name in SPRITES if (Path(data_dir) / name).is_file()]
    if not found:
        raise OSError("its download needs an account")
    path, labels_path = Path(data_dir) / found[0], Path(data_dir) / SPRITES[found[0]]
    try:
        pixels, labels = np.load(path), np.load(labels_path)
    except Exception as error:  # numpy raises half a dozen types here
        raise BadInput(f"{path} and {labels_path} cannot be read ({error})")
    if labels.ndim == 2:  # one-hot
        labels = labels.argmax(1)
    good = pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[3] == 3
    found_there = f"{pixels.dtype} {pixels.shape}"
    require(good, f"{path} must hold uint8 (N, height, width, 3), not {found_there}")
    integers = labels.dtype.kind in "iu" and labels.shape == (len(pixels),)
    wanted = "a whole number from 0, or a one-hot row, for each image"
    require(integers and labels.min() >= 0, f"{labels_path} must hold {wanted}")
    # the published file holds each picture about 50 times
    first = np.unique(pixels.reshape(len(pixels), -1), axis=0, return_index=True)[1]
    kept = np.sort(first)
    copies = f"{len(pixels) - len(kept):,} exact duplicates removed"
    warn(f"{path}: {len(pixels):,} images, {copies}")
    names = [str(i) for i in range(labels.max() + 1)]
    if found[0] == "sprites_1788_16x16.npy":
        names = ["hero", "non-hero", "food", "spell", "side-facing"]
    pixels = torch.from_numpy(pixels[kept]).permute(0, 3, 1, 2)
    return hold_out_a_tenth(pixels, torch.from_numpy(labels[kept]).long()), names


def download(url, path, sha256):
    """Download a file, which is kept only if its SHA-256 begins so. Raises OSError."""
    with downloading():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())


def load_cub(data_dir, size, channels, jpeg_quality):
    """CUB-200-2011: whole photographs, squeezed to size x size; grey ones are left out.

    From CUB_200_2011/images/ in data_dir, else from CUB_200_2011.tgz, else downloaded. Raises
    OSError where that fails, BadInput for a damaged archive.
    """
    images = Path(data_dir) / "CUB_200_2011" / "images"
    archive = Path(data_dir) / "CUB_200_2011.tgz"
    if not images.is_dir():
        if not archive.is_file():
            download(CUB, archive, CUB_SHA256)
        with tempfile.TemporaryDirectory(dir=data_dir) as scratch:
            try:
                with tarfile.open(archive) as tar:
                    tar.extractall(scratch, filter="data")  # refuses paths that lead out of it
                images.parent.mkdir(exist_ok=True)
                os.replace(Path(scratch) / "CUB_200_2011" / "images", images)
            except Exception as error:  # tarfile, gzip and zlib raise half a dozen types here
                raise BadInput(
                    f"{archive} cannot be unpacked ({error}); if it is damaged, delete it"
                )
    return load_folder(images, size, channels, whole=True, jpeg_quality=jpeg_quality)


def image_files(folder):
    """The image files in a folder and below it, sorted; hidden ones are left out.

    Raises BadInput if they are fewer than two.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"there is no folder {folder}")
    paths = []
    for place, _, names in os.walk(folder, followlinks=True):  # a class may be a linked folder
        for name in names:
            path = Path(place, name)
            hidden = any(name.startswith(".") for name in path.relative_to(folder).parts)
            if path.suffix.lower() in SUFFIXES and path.is_file() and not hidden:
                paths.append(path)
    require(len(paths) > 1, f"{folder} holds {len(paths)} images; two are the least")
    return sorted(paths)


def class_of(path, folder):
    """The sub-folder of `folder` that an image is in, at any depth, or "" if it is in none."""
    parts = Path(path).relative_to(folder).parts
    return parts[0] if len(parts) > 1 else ""


def flatten_image(image, channels):
    """A Pillow image of 8 bits a channel as RGB or L: upright, white where it is transparent."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB" if channels == 3 else "L")


def read_picture(path, size, channels, whole, jpeg_quality):
    """A file as an array of size x size pixels: its middle, or if `whole` all of it, squeezed.

    None if it cannot be read, or is grey of more than 8 bits; if `whole`, also if grey.
    """
    from PIL import Image, ImageOps

    bicubic = Image.Resampling.BICUBIC  # Pillow's is antialiased
    try:
        with Image.open(path) as file:
            deep = file.mode[0] in "IF"  # grey of more than 8 bits, which would be cut off
            if deep or (whole and file.mode == "L"):
                return None
            image = flatten_image(file, channels)
        image = image.resize((size, size), bicubic) if whole else image
        if jpeg_quality:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=jpeg_quality)
            image = Image.open(buffer)
        return np.asarray(ImageOps.fit(image, (size, size), bicubic))  # as it is, if `whole`
    except Exception:  # a decoder may raise anything; the file is named by the caller
        return None


def read_folder(folder, paths, **options):
    """(pixels of the readable ones, which of the paths they are), cached in the folder."""
    from tqdm import tqdm

    listing = [(str(path), path.stat().st_mtime_ns) for path in paths]
    digest = hashlib.sha256(repr(["2", options, listing]).encode()).hexdigest()
    path = folder / f".cache_{options['size']}.pt"
    if path.is_file():
        cached = load_weights(path, "common", "pixels")
        if cached["digest"] == digest:
            return cached["pixels"], cached["kept"]
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter lock
        pictures = pool.map(partial(read_picture, **options), paths)
        pictures = list(tqdm(pictures, f"reading {folder}", len(paths), disable=None))
    kept = [picture is not None for picture in pictures]
    readable = [picture for picture in pictures if picture is not None]
    require(len(readable) > 1, f"{folder}: {len(readable)} images can be read; two are the least")
    pixels = torch.from_numpy(np.stack(readable))
    cache(path, "common", pixels=pixels, kept=kept, digest=digest)
    return pixels, kept


def load_folder(folder, size, channels, whole=False, jpeg_quality=0):
    """All images in a folder and below it; its sub-folders are the classes.

    A tenth is held out. whole, jpeg_quality: see `read_picture`.
    """
    folder, paths = Path(folder), image_files(folder)
    pixels, kept = read_folder(
        folder, paths, size=size, channels=channels, whole=whole, jpeg_quality=jpeg_quality
    )
    skipped = [path.name for path, good in zip(paths, kept) if not good]
    if skipped:
        why = "grey or unreadable" if whole else "unreadable (or not of 8 bits)"
        warn(f"{folder}: left out {len(skipped)} {why} images, such as {', '.join(skipped[:10])}")
    classes = [class_of(path, folder) for path, good in zip(paths, kept) if good]
    class_names = sorted(set(classes))
    labels = torch.tensor([class_names.index(name) for name in classes])
    pixels = pixels.view(len(labels), size, size, channels)
    return hold_out_a_tenth(pixels.permute(0, 3, 1, 2), labels), class_names


# ----------------------------------------------------------------------- pictures


def save_grid(images, path, *, columns, low=-1.0, high=1.0):
    """Write images (N, C, H, W) as a PNG grid on a fixed scale: low is black, high is white."""
    from torchvision.utils import save_image

    width = min(columns, len(images)) * (images.shape[3] + 2)
    zoom = math.ceil(480 / width)  # small pictures are enlarged by whole pixels
    images = images.float().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    scale = dict(normalize=True, value_range=(low, high), pad_value=0.5)
    buffer = io.BytesIO()
    save_image(images, buffer, "PNG", nrow=columns, padding=2 * zoom, **scale)
    write(path, buffer.getvalue())


def new_figure(width, height):
    """An empty matplotlib figure, its size in inches, which draws without a screen."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a folder may have $ in its name
    return Figure(figsize=(width, height), layout="constrained")


def save_curves(history, panels, title, path):
    """Plot columns of a history (a list of rows) against its first column.

    panels: {label of the y axis: [columns]}, three beside one another. Cells that a row does
    not have, or that are NaN, are not drawn. Columns of test images are dashed; where values
    span a factor of 20 the axis is logarithmic.
    """
    unit = next(iter(history[0]))  # epoch or iteration
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = new_figure(4.8 * across, 3.6 * down)
    for place, (label, columns) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(down, across, place)
        drawn = []
        for column in columns:
            rows = [row for row in history if not math.isnan(row.get(column, math.nan))]
            x, y = [row[unit] for row in rows], [row[column] for row in rows]
            line = "--" if column.startswith("test") else "-"
            dots = "o" if len(x) < 20 else None
            axes.plot(x, y, line, label=column, marker=dots, markersize=3)
            drawn += y
        if drawn and 0 < 20 * min(drawn) < max(drawn):
            axes.set_yscale("log")
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's own would be in TeX
            axes.yaxis.set_minor_formatter("")
        axes.set(xlabel=unit, ylabel=label, xlim=(0, history[-1][unit] + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    write(path, figure)
