"""The data sets: each loaded once as one uint8 tensor on the device. No DataLoader, no Python per image.

`load_data` gives (train, test), two `Images`; every `dataset_type` of the scripts is explained there.
"""
import gzip
import hashlib
import io
import math
import os
import re
import shutil
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from common import PROCESSES, RANK, BadInput, say, write
from training import first_process_first

STALL_SECONDS = 15  # a download that grows by no byte for so long is given up
PLACES = {"mnist": "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz",
          "cifar10": "cifar-10-python.tar.gz (or, unpacked, cifar-10-batches-py/)",
          "cub": "CUB_200_2011.tgz (or, unpacked, CUB_200_2011/images/; or, resized, such as CUB_200_2011_32/)",
          "sprites": "sprites_1788_16x16.npy and sprite_labels_nc_1788_16x16.npy (deeplearning.ai, How Diffusion "
                     "Models Work) or sprites.npy and sprites_labels.npy (Kaggle, ebrahimelgazar/pixel-art)"}
CUB = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"  # 1,150,585,339 bytes
CUB_SHA = "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"  # SHA-256
SPRITES = {"sprites_1788_16x16.npy": "sprite_labels_nc_1788_16x16.npy", "sprites.npy": "sprites_labels.npy",
           "sprites.npz": "sprites.npz"}  # images: labels; .npz holds `images`, `labels` and, if need be, `class_names`
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
        """Indices of every batch of an epoch; a function of seed and epoch alone, so that a run can be continued.

        N processes share the N * batch_size images of a step, batch_size each; what an epoch's end cannot share out
        evenly, at most N - 1 images, is left for another epoch.
        """
        index = torch.arange(len(self))
        if self.shuffle:
            index = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        index = index[:len(index) // PROCESSES * PROCESSES].to(self.pixels.device)
        return [part.chunk(PROCESSES)[RANK] for part in index.split(self.batch_size * PROCESSES)]

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


class Stream:
    """`images` without end, pass after pass, cut into periods of `steps` steps: what training.Run takes for epochs."""

    def __init__(self, images, batch_size, steps):
        self.images, self.batch_size, self.steps = images, batch_size, steps  # batch_size: images a step
        self.name, self.batch = images.name, images.batch

    def __len__(self):
        return self.steps * self.batch_size * PROCESSES

    def order(self, seed, period):
        """Indices of every step of a period (from 1); a function of seed and period alone, and no step is short."""
        length, count = self.steps * self.batch_size, len(self.images) // PROCESSES  # of this process
        start = (period - 1) * length
        passes = range(start // count, (start + length - 1) // count + 1)
        index = torch.cat([part for number in passes for part in self.images.order(seed, number)])
        return index[start % count:][:length].split(self.batch_size)


@first_process_first()  # what it downloads or caches, the other processes find
def load_data(dataset_type, data_dir, allow_fallback, batch_size, shuffle, image_size, channels, device,
              normalize=True, horizontal_flip=False, num_classes=None, jpeg_quality=0):
    """Load `dataset_type` as (train, test), two `Images` of image_size x image_size pixels and 1 or 3 channels.

    dataset_type: mnist, cifar10, cub (files in data_dir, else a download, else the bundled digits with a warning),
    sprites (the same without the download: pixel art in five classes; a fixed tenth is the test split),
    folder (data_dir is a directory of images: flat, or one sub-folder a class; a fixed tenth is the test split),
    digits (the bundled 4,500 + 500). Raises BadInput where there is nothing to load or it does not fit in memory.
    """
    name = dataset_type
    if dataset_type == "folder":
        name = f"folder {_name(data_dir)}"
        splits, class_names = _folder(data_dir, image_size, channels, device)
    elif dataset_type == "digits":
        splits, class_names = _digits(channels, num_classes)
    else:
        try:
            splits, class_names = (_cub(data_dir, image_size, channels, device, jpeg_quality) if name == "cub" else
                                   _sprites(data_dir) if name == "sprites" else _torchvision(name, data_dir))
            name += f" (JPEG quality {jpeg_quality})" if jpeg_quality and name == "cub" else ""
        except OSError as error:
            why = (f"{dataset_type} is not in {data_dir}/ and could not be downloaded ({error}); "
                   f"put {PLACES[dataset_type]} there")
            if not allow_fallback:
                raise BadInput(why)
            print("\n".join(["!" * 80, f"WARNING: THIS IS NOT {dataset_type.upper()}.", f"{why}.",
                             "Going on with the 5,000 bundled digits instead; every result will say so.", "!" * 80]),
                  file=sys.stderr, flush=True)
            name = f"digits (bundled, in place of {dataset_type})"
            splits, class_names = _digits(channels, num_classes or (5 if dataset_type == "sprites" else 10))
    _check_memory(sum(len(labels) for _, labels in splits), channels, image_size, device)
    train, test = (Images(_fit(pixels, image_size, channels), labels, name, class_names, batch_size, shuffle,
                          normalize, horizontal_flip and split == 0, device)
                   for split, (pixels, labels) in enumerate(splits))
    if batch_size > len(train):
        raise BadInput(f"batch_size {batch_size} is larger than the {len(train)} training images of {name}")
    return train, test


def left_out(name):
    """The label that Images of this name, such as `mnist without 4`, were trained without; else None."""
    found = re.search(r" without (\d+)$", name)
    return int(found[1]) if found else None


def check_folder(name, data_dir):
    """The dataset_type of Images of this name; raises BadInput if that is a folder, and data_dir another one."""
    kind, *folder = re.sub(r" without \d+$", "", name).split(maxsplit=1)
    if kind == "folder" and _name(data_dir) != folder[0]:
        raise BadInput(f"the weights were trained on a folder {folder[0]}: say where it is with --data_dir")
    return kind


def _name(folder):
    return Path(folder).resolve().name.replace("$", "_") or "root"  # between two $ matplotlib would set mathematics


def load_again(weights, data_dir, device):
    """(train, test) that an encoder was trained on, in the shape and range of its images; never a fallback.

    weights: the contents of its weights_epoch_{E}.pt. A class that was left out is there again. Raises BadInput.
    """
    kwargs, kind = weights["model_kwargs"], check_folder(weights["data"], data_dir)
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
    classes = range(num_classes or 10)  # of five, `0 or 5` is the first
    return splits, [" or ".join(map(str, range(first, 10, len(classes)))) or str(first) for first in classes]


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


def _sprites(data_dir):
    """Small pictures (N, H, W, 3) uint8 with labels (N,) or one-hot (N, classes), without repetitions.

    Raises OSError where there are no such files, and BadInput where they hold something else.
    """
    path = next((path for name in SPRITES if (path := Path(data_dir) / name).is_file()), None)
    if not path:
        raise OSError("those who publish it ask for an account")
    beside, names = path.with_name(SPRITES[path.name]), None
    try:
        if path == beside:
            with np.load(path) as packed:
                pixels, labels = packed["images"], packed["labels"]
                names = packed["class_names"].tolist() if "class_names" in packed else None
        else:
            pixels, labels = np.load(path), np.load(beside)
    except Exception as error:  # numpy and zipfile raise half a dozen types here
        raise BadInput(f"{path} and {beside} cannot be read ({error})")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or len(pixels) < 2:
        raise BadInput(f"{path} holds {pixels.dtype} {pixels.shape}; legal: uint8 (N, height, width, 3)")
    one_hot = labels.ndim == 2 and labels.shape[1] > 1
    if one_hot and ((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all():
        count, labels = labels.shape[1], labels.argmax(1)
    elif not one_hot and labels.size == len(labels) and (labels == labels.astype(np.int64)).all() and labels.min() >= 0:
        labels = labels.reshape(-1).astype(np.int64)
        count = labels.max() + 1
    else:
        raise BadInput(f"{beside} holds {labels.dtype} {labels.shape}; legal: whole numbers >= 0, or rows with one 1")
    if len(labels) != len(pixels):
        raise BadInput(f"{path} holds {len(pixels)} images, {beside} {len(labels)} labels")
    first = {}  # the course's file has each of its 1,788 pictures about 50 times
    for i, image in enumerate(pixels):
        first.setdefault(image.tobytes(), i)
    keep = torch.tensor(list(first.values()))
    say(f"{path}: {len(pixels):,} images, {len(pixels) - len(keep):,} of them removed as exact duplicates")
    if not names or len(names) < count:  # an .npy names none; 89,400 images are the course's
        names = ["hero", "non-hero", "food", "spell", "side-facing"] if len(pixels) == 89400 else map(str, range(count))
    pixels, labels = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels)
    order = keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(0))]
    test, train = order[:max(1, len(order) // 10)], order[max(1, len(order) // 10):]
    return [(pixels[train], labels[train]), (pixels[test], labels[test])], list(names)


def _cub(data_dir, size, channels, device, jpeg_quality):
    """CUB-200-2011: whole photographs, squeezed to size x size; grey ones left out; a fixed tenth is the test split.

    From what is found first in data_dir: CUB_200_2011_{size}/ (resized before; any folders), CUB_200_2011/images/,
    CUB_200_2011.tgz; else a download. Raises OSError where that fails, BadInput for an archive that is no good.
    """
    resized, images, archive = (Path(data_dir) / name for name in
                                (f"CUB_200_2011_{size}", "CUB_200_2011/images", Path(CUB).name))
    if not resized.is_dir() and not images.is_dir():
        if not archive.is_file():  # into a scratch folder, checked by its hash, then moved
            _download(lambda folder: torch.hub.download_url_to_file(CUB, f"{folder}/{archive.name}", CUB_SHA,
                                                                    progress=sys.stderr.isatty()), archive.parent)
        _unpack(archive)
    return _folder(resized if resized.is_dir() else images, size, channels, device, whole=True,
                   jpeg_quality=jpeg_quality)


def _unpack(archive):
    """Unpack CUB_200_2011/images/ beside the archive: all of it or nothing. Raises BadInput.

    Only plain files are written, only below a scratch folder (no links, so none can lead out of it), and an archive
    with a path that leaves it is refused. That is tarfile's filter "data", which Python before 3.10.12 does not have.
    """
    from tqdm import tqdm

    scratch = Path(tempfile.mkdtemp(prefix=".unpack_", dir=archive.parent)).resolve()
    try:
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, f"unpacking {archive}", unit=" files", leave=False,
                               disable=not sys.stderr.isatty()):
                target = (scratch / member.name).resolve()
                if not target.is_relative_to(scratch):
                    raise BadInput(f"{archive}: {member.name} leaves the folder; nothing was unpacked")
                if member.isfile():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with open(target, "wb") as file:
                        shutil.copyfileobj(tar.extractfile(member), file)
        if not (scratch / "CUB_200_2011" / "images").is_dir():
            raise BadInput(f"{archive} holds no CUB_200_2011/images/")
        (archive.parent / "CUB_200_2011").mkdir(exist_ok=True)
        os.replace(scratch / "CUB_200_2011" / "images", archive.parent / "CUB_200_2011" / "images")
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise BadInput(f"{archive} is damaged ({error}); without it, it will be downloaded")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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


def _folder(folder, size, channels, device, whole=False, jpeg_quality=0):
    """Images of any sizes and modes under `folder`: shortest side to `size`, centre crop; cached in the folder.

    whole, for CUB: no crop, nothing grey, and the classes of a flat folder are in the names, Mallard_0130_76836.jpg.
    jpeg_quality: if above 0, what is resized is then compressed so.
    """
    from concurrent.futures import ThreadPoolExecutor
    from PIL import Image, ImageOps

    folder, paths = Path(folder), image_files(folder)
    _check_memory(len(paths), channels, size, device)
    listing = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    stem = f".cache_{f'whole{jpeg_quality}_' if whole else ''}{size}x{size}x{channels}_"
    cache = folder / f"{stem}{hashlib.sha256(repr(listing).encode()).hexdigest()[:16]}.npz"

    def read(path):
        try:
            with Image.open(path) as image:
                if whole and image.mode == "L":
                    return f"{path.relative_to(folder)} (grey)"
                image = _decode(image, "RGB" if channels == 3 else "L")
                if whole and image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling.BICUBIC)  # Pillow's is antialiased
                    if jpeg_quality:
                        image.save(buffer := io.BytesIO(), "JPEG", quality=jpeg_quality)
                        image = Image.open(buffer)
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
        say(f"{folder}: skipped {len(broken)} {'grey or ' * whole}unreadable: "
            f"{', '.join(broken[:10])}{' ...' if broken[10:] else ''}")
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
    names, class_names = folder_classes(folder, paths, whole)
    labels = torch.tensor([class_names.index(name) for name, good in zip(names, keep) if good])
    pixels = torch.from_numpy(pixels).view(len(labels), size, size, channels).permute(0, 3, 1, 2)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:max(1, len(order) // 10)], order[max(1, len(order) // 10):]
    return [(pixels[train], labels[train]), (pixels[test], labels[test])], class_names


def folder_classes(folder, paths, named_by_file=False):
    """(the class of each path, all classes in order): the sub-folder that it is in; "" if it is in none.

    named_by_file: a file in no sub-folder is of the class in its name, as Black_Tern in Black_Tern_0079_143998.jpg.
    """
    names = [path.relative_to(folder).parts[0] if path.parent != Path(folder)
             else path.stem.rsplit("_", 2)[0] if named_by_file else "" for path in paths]
    names = [name.replace("$", "_") for name in names]  # see _name
    return names, sorted(set(names))


def _decode(image, mode):
    """A Pillow image of any mode as RGB or L: upright, white where it is transparent, with 8 bits a pixel."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image, dtype=np.float64)
        ranges = [white for white in (1, 255, 65535) if array.max() <= white and (white > 1 or image.mode == "F")]
        image = Image.fromarray((array * (255 / min(ranges, default=array.max()))).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def read_images(paths):
    """Image files in their own size: uint8 RGB (n, 3, H, W), one tensor a size in the files' order. Raises BadInput."""
    from PIL import Image

    images = []
    for path in paths:
        try:
            images.append(torch.from_numpy(np.array(_decode(Image.open(path), "RGB"))).permute(2, 0, 1)[None])
        except Exception as error:  # a decoder may raise anything; the file is named
            raise BadInput(f"{path} cannot be read ({type(error).__name__})")
    return [torch.cat(images)] if len({image.shape for image in images}) == 1 else images
