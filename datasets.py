"""The data sets: each loaded once as one uint8 tensor on the device. No DataLoader, no Python per image.

`load_data` gives (train, test), two `Images`; every `dataset_type` of the scripts is explained there.
"""
import hashlib
import io
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from common import BadInput, say, write

STALL_SECONDS = 15  # a download that grows by no byte for so long is given up
PLACES = {"mnist": "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz",
          "cifar10": "cifar-10-python.tar.gz (or, unpacked, cifar-10-batches-py/)"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class Images:
    """A data set as one uint8 tensor on the device; a batch is an index, a cast and a scale.

    pixels (N, C, H, W) uint8, labels (N,) int64. Batches are float32 in [-1, 1], or in [0, 1] without `normalize`.
    """

    def __init__(self, pixels, labels, name, class_names, batch_size, shuffle, normalize, horizontal_flip, device):
        self.pixels, self.labels = pixels.contiguous().to(device), labels.to(device)
        self.name, self.class_names = name, class_names
        self.batch_size, self.shuffle, self.normalize, self.flip = batch_size, shuffle, normalize, horizontal_flip

    def __len__(self):
        return len(self.pixels)

    def order(self, seed, epoch):
        """Indices of every batch of an epoch; a function of seed and epoch alone, so that a run can be continued."""
        index = torch.arange(len(self))
        if self.shuffle:
            index = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        return index.to(self.pixels.device).split(self.batch_size)

    def leave_out(self, label):
        """Drop every image of this label; the name says so from now on: `mnist without 4`."""
        keep = self.labels != label
        if keep.all() or not keep.any():
            raise BadInput(f"{self.name} has no images of label {label} beside others, so it cannot be left out")
        self.pixels, self.labels, self.name = self.pixels[keep], self.labels[keep], f"{self.name} without {label}"

    def batch(self, index):
        """index (N,) -> images (N, C, H, W) float32, labels (N,)."""
        images = self.pixels.index_select(0, index).float()
        images = images.mul_(2 / 255).sub_(1) if self.normalize else images.div_(255)
        if self.flip:
            mirror = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
            images = torch.where(mirror, images.flip(3), images)
        return images, self.labels.index_select(0, index)


def load_data(dataset_type, data_dir, allow_fallback, batch_size, shuffle, image_size, channels, device,
              normalize=True, horizontal_flip=False, num_classes=None):
    """Load `dataset_type` as (train, test), two `Images` of image_size x image_size pixels and 1 or 3 channels.

    dataset_type: mnist, cifar10 (files in data_dir, else a download, else the bundled digits with a warning),
    folder (data_dir is a directory of images: flat, or one sub-folder a class; a fixed tenth is the test split),
    digits (the bundled 4,500 + 500). Raises BadInput where there is nothing to load or it does not fit in memory.
    """
    name = dataset_type
    if dataset_type == "folder":
        name = f"folder {Path(data_dir).name}"
        splits, class_names = _folder(data_dir, image_size, channels, device)
    elif dataset_type == "digits":
        splits, class_names = _digits(channels, num_classes)
    else:
        try:
            splits, class_names = _torchvision(dataset_type, data_dir)
        except OSError as error:
            why = (f"{dataset_type} is not in {data_dir}/ and could not be downloaded ({error}); "
                   f"put {PLACES[dataset_type]} there")
            if not allow_fallback:
                raise BadInput(why)
            print("\n".join(["!" * 80, f"WARNING: THIS IS NOT {dataset_type.upper()}.", f"{why}.",
                             "Going on with the 5,000 bundled digits instead; every result will say so.", "!" * 80]),
                  file=sys.stderr, flush=True)
            name = f"digits (bundled, in place of {dataset_type})"
            splits, class_names = _digits(channels, num_classes)
    _check_memory(sum(len(labels) for _, labels in splits), channels, image_size, device)
    train, test = (Images(_fit(pixels, image_size, channels), labels, name, class_names, batch_size, shuffle,
                          normalize, horizontal_flip and split == 0, device)
                   for split, (pixels, labels) in enumerate(splits))
    if batch_size > len(train):
        raise BadInput(f"batch_size {batch_size} is larger than the {len(train)} training images of {name}")
    return train, test


def load_again(weights, data_dir, device):
    """(train, test) that an encoder was trained on, in the shape and range of its images; never a fallback.

    weights: the contents of its weights_epoch_{E}.pt. A class that was left out is there again. Raises BadInput.
    """
    kwargs, (kind, *name) = weights["model_kwargs"], weights["data"].split(" without ")[0].split(maxsplit=1)
    if kind == "folder" and Path(data_dir).name != name[0]:
        raise BadInput(f"the weights were trained on a folder {name[0]}: say where it is with --data_dir")
    channels = kwargs.get("image_channels", 1)  # the fully connected networks are grey, and give the number of pixels
    side = kwargs["image_size"] if "image_channels" in kwargs else math.isqrt(kwargs["image_size"])
    return load_data(kind, data_dir, False, 1, False, side, channels, device, normalize=channels == 3)


def _fit(pixels, size, channels):
    """(N, C, H, W) uint8 to the asked size and channels; 28 to 32 pads, everything else is an antialiased resize."""
    if len(pixels) > 4096:  # by parts: floats take four times the memory
        return torch.cat([_fit(part, size, channels) for part in pixels.split(4096)])
    if pixels.shape[1] > channels:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # luma, ITU-R BT.601
        pixels = (pixels * weights).sum(1, keepdim=True).round().byte()
    elif pixels.shape[1] < channels:
        pixels = pixels.expand(-1, channels, -1, -1)
    if pixels.shape[2] == 28 and size == 32:
        return F.pad(pixels, (2, 2, 2, 2), value=0) if channels == 1 else F.pad(pixels, (2, 2, 2, 2), mode="replicate")
    if pixels.shape[2] != size:
        pixels = F.interpolate(pixels.float(), size=(size, size), mode="bicubic", antialias=True)
        pixels = pixels.clamp_(0, 255).round_().byte()
    return pixels


def _check_memory(count, channels, size, device):
    """Refuse, with both numbers, what would not fit on the device."""
    device, need = torch.device(device), count * channels * size * size
    free = float("inf")  # unknown: macOS and Windows have no plain way to ask
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif Path("/proc/meminfo").is_file():
        free = 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
    if need > free:
        raise BadInput(f"{count:,} images of {channels}x{size}x{size} need {need / 2**30:.1f} GiB, and {device} has "
                       f"{free / 2**30:.1f} GiB free; choose a smaller image_size")


def _digits(channels, num_classes):
    """The bundled digits: grey as they are, or for 3 channels each in a random colour on a ground of another."""
    with np.load(Path(__file__).parent / "data" / "mnist_5k.npz") as packed:
        splits = [[torch.from_numpy(packed[f"{split}_{part}"]) for part in ("images", "labels")]
                  for split in ("train", "test")]
    for seed, split in enumerate(splits):
        pixels = split[0].unsqueeze(1)
        if channels == 3:
            draw = torch.Generator().manual_seed(seed)
            ground = torch.rand(len(pixels), 3, 1, 1, generator=draw)
            # half the range away in each channel, give or take 0.15: no digit is lost on its ground
            ink = (ground + 0.35 + 0.3 * torch.rand(ground.shape, generator=draw)) % 1
            pixels = (255 * ground + pixels * (ink - ground)).round().byte()
        split[0] = pixels
        split[1] = split[1] % (num_classes or 10)
    return splits, [str(digit) for digit in range(num_classes or 10)]


def _torchvision(dataset_type, data_dir):
    """MNIST or CIFAR-10 through torchvision's loaders. Raises OSError if neither found nor downloadable."""
    from torchvision import datasets

    dataset = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[dataset_type]
    try:
        parts = [dataset(data_dir, train=train) for train in (True, False)]
    except (RuntimeError, OSError, ValueError, EOFError, AssertionError):  # not there, or damaged
        _download(lambda folder: dataset(folder, download=True), Path(data_dir))
        parts = [dataset(data_dir, train=train) for train in (True, False)]
    pixels = [torch.as_tensor(part.data) for part in parts]
    pixels = [p.unsqueeze(1) if p.ndim == 3 else p.permute(0, 3, 1, 2) for p in pixels]
    return [(p, torch.as_tensor(part.targets)) for p, part in zip(pixels, parts)], list(parts[0].classes)


def _download(fetch, data_dir):
    """Run `fetch(folder)` in a scratch folder inside data_dir and move over what it brought: all of it or nothing.

    Archives that lie in data_dir already are taken along, so torchvision checks and unpacks them without a network.
    Raises OSError when nothing arrives for STALL_SECONDS or the download fails.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".download_", dir=data_dir))
    failure = []

    def work():
        try:
            fetch(str(scratch))
        except Exception as error:  # whatever urllib, tarfile or torchvision raise: it is reported below
            failure.append(str(error) or type(error).__name__)

    def size():
        return sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())

    try:
        for archive in [*data_dir.glob("MNIST/raw/*.gz"), *data_dir.glob("*.tar.gz")]:
            (scratch / archive.relative_to(data_dir)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(archive, scratch / archive.relative_to(data_dir))
        thread = threading.Thread(target=work, daemon=True)  # a daemon: a hanging connection cannot hold up the exit
        thread.start()
        seen, since = size(), time.monotonic()
        while thread.is_alive():
            thread.join(0.2)
            if (now := size()) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > STALL_SECONDS:
                raise OSError(f"no answer for {STALL_SECONDS} s")
        if failure:
            raise OSError(failure[0].splitlines()[-1])
        for path in scratch.rglob("*"):
            if path.is_file():
                (data_dir / path.relative_to(scratch)).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, data_dir / path.relative_to(scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def image_files(folder):
    """The image files below a folder, sorted; nothing hidden. Raises BadInput where there are fewer than two."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if len(paths) < 2:
        raise BadInput(f"{folder} holds {len(paths)} images ({' '.join(sorted(SUFFIXES))}); two are the least")
    return paths


def _folder(folder, size, channels, device):
    """Images of any sizes and modes under `folder`: shortest side to `size`, centre crop; cached in the folder."""
    from concurrent.futures import ThreadPoolExecutor
    from PIL import Image, ImageOps

    folder, paths = Path(folder), image_files(folder)
    _check_memory(len(paths), channels, size, device)
    listing = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    stem = f".cache_{size}x{size}x{channels}_"
    cache = folder / f"{stem}{hashlib.sha256(repr(listing).encode()).hexdigest()[:16]}.npz"

    def read(path):
        try:
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I") or image.mode == "F":  # 16 bits a pixel and more
                    array = np.asarray(image, dtype=np.float64)
                    image = Image.fromarray((array * (255 / max(array.max(), 255))).astype(np.uint8))
                if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                image = image.convert("RGB" if channels == 3 else "L")
                return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
        except Exception as error:  # a decoder may raise anything; the file is named
            return f"{path.relative_to(folder)} ({type(error).__name__})"

    if cache.is_file():
        with np.load(cache) as packed:
            pixels, keep, broken = packed["pixels"], packed["keep"], packed["broken"].tolist()
    else:
        from tqdm import tqdm

        with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter lock while it decodes and resizes
            arrays = list(tqdm(pool.map(read, paths), f"reading {folder}", len(paths), unit="img", leave=False,
                               disable=not sys.stderr.isatty()))
        keep = np.array([not isinstance(array, str) for array in arrays])
        broken = [array for array in arrays if isinstance(array, str)]
        pixels = np.stack([array for array in arrays if not isinstance(array, str)]) if keep.any() else None
    if broken:
        say(f"{folder}: skipped {len(broken)} unreadable: {', '.join(broken[:10])}{' ...' if broken[10:] else ''}")
    if keep.sum() < 2:
        raise BadInput(f"{folder}: {keep.sum()} of {len(paths)} image files can be read; two are the least")
    if not cache.is_file():
        try:
            buffer = io.BytesIO()
            np.savez(buffer, pixels=pixels, keep=keep, broken=np.array(broken, dtype=str))
            for stale in folder.glob(f"{stem}*.npz"):
                stale.unlink()
            write(cache, buffer.getvalue())
        except OSError:
            pass  # a read-only folder is read again each time
    parents = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths]
    class_names = sorted(set(parents))
    labels = torch.tensor([class_names.index(parent) for parent, good in zip(parents, keep) if good])
    pixels = torch.from_numpy(pixels).view(len(labels), size, size, channels).permute(0, 3, 1, 2)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:max(1, len(order) // 10)], order[max(1, len(order) // 10):]
    return [(pixels[train], labels[train]), (pixels[test], labels[test])], class_names


def read_images(paths):
    """Image files as they are: uint8 RGB (n, 3, H, W), one tensor a size in the files' order. Raises BadInput."""
    from PIL import Image

    images = []
    for path in paths:
        try:
            images.append(torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None])
        except Exception as error:  # a decoder may raise anything; the file is named
            raise BadInput(f"{path} cannot be read ({type(error).__name__})")
    return [torch.cat(images)] if len({image.shape for image in images}) == 1 else images
