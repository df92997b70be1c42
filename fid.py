"""Frechet Inception Distance (FID) and its relatives: how far generated images are from real ones.

paper:  Heusel et al. 2017, https://arxiv.org/abs/1706.08500; KID: Binkowski et al. 2018, arXiv 1801.01401;
        precision and recall: Kynkaanniemi et al. 2019, arXiv 1904.06991; resize `clean`: Parmar et al. 2022, 2104.11222
run:    python fid.py --generated mnist_GAN/weights_epoch_20.pt --features classifier
writes: scores/: {metric}_of_{generated}.json, .npz (statistics), .png (left generated, right the nearest real images);
        .fid/ beside the data: statistics of the real images, and the classifier, so that they are computed once
expect: main_gan on MNIST after 1, 5, 20 epochs: classifier distance 492, 149, 70.7 (floor 2.50), N 10,000; 40 s, 1 core
"""
import hashlib
import io
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import common
import datasets
import training
from common import BadInput

source_kwargs = {
    "generated": "",  # weights_epoch_{E}.pt, a folder, .npz of statistics, or such as mnist:test; empty: the newest .pt
    "real": "",  # the same kinds; empty: the training images of the data set that the weights were trained on
    "data_dir": "data",  # where the data sets lie or are downloaded to, and Inception's weights
    "num_images": 10000,  # >= 2; generated images; published values mostly take 50000, and fewer give a larger value
    "seed": 0,  # in [0, 4294967295]; of the latent vectors
}
metric_kwargs = {
    "features": "inception",  # inception | classifier; classifier: of a network trained here on the data's own labels
    "resize": "clean",  # clean | legacy; clean: antialiased bicubic, as clean-fid; legacy: bilinear, as pytorch-fid
    "inception_weights": "",  # pt_inception-2015-12-05-6726825d.pth; empty: the one in data_dir, downloaded once
    "batch_size": 50,  # >= 1; images a pass
    "output_dir": "scores",  # everything but the caches is written there
    "device": "auto",  # auto takes cuda, else mps, else cpu; or name one, such as cpu or cuda:1
}
INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA = "6726825d"  # the start of the file's SHA-256
KEPT = 20_480_000  # features are kept up to so many numbers: 10,000 images of 2048, 160,000 of 128
CLASSIFIER_STEPS = 1500  # of 128 images each: 3 epochs of MNIST


def root(covariance):
    """Some A (d, r) with A A^T = covariance (d, d) float64: Cholesky's, or where the rank is low, from eigenvectors."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        values, vectors = torch.linalg.eigh(covariance)
        kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]  # the rest is rounding noise
        factor = vectors[:, kept] * values[kept].sqrt()
    return factor


def frechet_distance(mu1, sigma1, mu2, sigma2, roots=None):
    """Squared Frechet distance of two Gaussians, |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)): Heusel et al., eq. (6).

    mu (d,), sigma (d, d); roots: both A of sigma = A A^T if known. A float, never below 0. Raises BadInput for NaN.
    """
    mu1, mu2, *parts = (torch.as_tensor(part, dtype=torch.float64) for part in (mu1, mu2, *(roots or (sigma1, sigma2))))
    if not all(part.isfinite().all() for part in (mu1, mu2, *parts)):
        raise BadInput("there are NaN or infinite features: look at the images, or at the network that drew them")
    root1, root2 = roots or map(root, parts)
    cross, apart = root1.T @ root2, sum(part.square().sum() for part in (mu1 - mu2, root1, root2))
    # the eigenvalues of S1 S2 are the squared singular values of cross: none is complex. As those of cross^T cross they
    # cost half, but rounding moves them by `noise`: only if large, and if the value moves by less than a millionth
    squares = torch.linalg.eigvalsh(cross.T @ cross if len(cross) > len(cross.T) else cross @ cross.T).clamp(min=0)
    noise, value = 2e-15 * squares[-1:].sum(), apart - 2 * squares.sqrt().sum()
    if len(squares) < 1000 or 2 * (noise / (squares.sqrt() + noise.sqrt())).nansum() > 1e-6 * value:
        value = apart - 2 * torch.linalg.svdvals(cross).sum()
    return max(0.0, value.item())


class Statistics:
    """Mean mu (d,) and covariance sigma (d, d) of features in float64, batch by batch; label says how they are made."""

    def __init__(self, label=""):
        self.label, self.n, self.mu, self.sigma = label, 0, 0.0, 0.0  # n stays 0 where it is not known
        self.kept, self.labels = torch.empty(0), torch.empty(0, dtype=torch.int64)  # the first features, for the rest

    def add(self, features, labels=None):
        """features (n, d), labels (n,) or None. Chan et al. 1979: an update that loses no digits."""
        batch, n, room = features.double(), len(features), max(0, KEPT // features.shape[1] - len(self.kept))
        mean, total = batch.mean(0), self.n + n
        gap, centred = mean - self.mu, batch - mean
        scatter = self.sigma * (self.n - 1) + centred.T @ centred + torch.outer(gap, gap) * (self.n * n / total)
        self.mu, self.sigma, self.n = self.mu + gap * (n / total), scatter / max(1, total - 1), total
        self.kept = torch.cat([self.kept, features[:room]]) if len(self.kept) else features[:room]
        self.labels = self.labels if labels is None else torch.cat([self.labels, labels[:room].cpu()])
        return self

    def distance(self, other):
        """Squared Frechet distance; straight from the features where they are fewer than their dimensions."""
        if len(self.mu) != len(other.mu) or self.label and other.label and self.label != other.label:
            raise BadInput(f"not comparable: {self.label or len(self.mu)} and {other.label or len(other.mu)}")
        roots = [(one.kept.double() - one.mu).T / math.sqrt(one.n - 1) if 0 < one.n == len(one.kept) <= len(one.mu)
                 else root(one.sigma) for one in (self, other)]
        return frechet_distance(self.mu, self.sigma, other.mu, other.sigma, roots)

    def class_distances(self, other):
        """{label: distance of the kept images of this class}, for the classes of which both have two images."""
        parts = {label: [Statistics().add(one.kept[one.labels == label]) for one in (self, other)]
                 for label in sorted({*self.labels.tolist()} & {*other.labels.tolist()})}
        return {label: a.distance(b) for label, (a, b) in parts.items() if min(a.n, b.n) > 1}


def distance_within_classes(images, labels):
    """{label: mean Euclidean distance of two of its images}, for classes of two images or more. (N, C, H, W), (N,)."""
    return {label: common.mean_distance(images[labels == label].float())
            for label, count in enumerate(labels.bincount().tolist()) if count > 1}


def obedience(features, statistics):
    """{label: share of its images in which the classifier behind the features sees this class}; {} without labels."""
    if not hasattr(features, "classify") or not len(statistics.labels):
        return {}
    right = features.classify(statistics.kept.to(features.device)).cpu() == statistics.labels
    return {label: right[statistics.labels == label].double().mean().item()
            for label in statistics.labels.unique().tolist()}


def kernel_distance(real, fake, blocks=10):
    """KID, the unbiased squared MMD for the kernel (x . y / d + 1)^3 (Binkowski et al.), and its standard error."""
    blocks = max(1, min(blocks, len(real) // 2, len(fake) // 2))
    size, values = min(len(real), len(fake)) // blocks, []  # disjoint blocks are independent: their spread is honest
    for x, y in zip(real[:blocks * size].double().split(size), fake[:blocks * size].double().split(size)):
        xx, yy, xy = (((a @ b.T) / a.shape[1] + 1)**3 for a, b in ((x, x), (y, y), (x, y)))
        pairs = xx.sum() - xx.trace() + yy.sum() - yy.trace()  # an image and itself are no pair
        values.append((pairs / (size * (size - 1)) - 2 * xy.mean()).item())
    return np.mean(values).item(), np.std(values, ddof=1).item() / math.sqrt(blocks) if blocks > 1 else math.nan


def precision_recall(real, fake, k=3):
    """Share of fake (m, d) on the manifold of real (n, d), and the reverse: Kynkaanniemi et al., eq. 1 and 2."""
    def covered(inside, points):
        reach = torch.cat([torch.cdist(part, points).kthvalue(min(k + 1, len(points)), dim=1).values
                           for part in points.split(1000)])  # radius of each ball: to the k-th; the 0th is the point
        return torch.cat([(torch.cdist(part, points) <= reach).any(1) for part in inside.split(1000)])

    return covered(fake, real).double().mean().item(), covered(real, fake).double().mean().item()


def resized(images, resize):
    """uint8 images (N, C, H, W) to what Inception is fed with: (N, 3, 299, 299) in [-1, 1]."""
    if resize == "legacy":  # as pytorch-fid: without antialiasing, so that much of a large image is passed over
        images = 2 * F.interpolate(images / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1
    else:  # as clean-fid: Pillow's bicubic on floats, and TensorFlow's (x - 128) / 128
        images = F.interpolate(images.float(), size=(299, 299), mode="bicubic", antialias=True).clamp_(0, 255)
        images = images.sub_(128).div_(128)
    return images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def inception(path):
    """FID's Inception (TensorFlow, 2015-12-05) with weights from `path`: (N, 3, 299, 299) in [-1, 1] -> (N, 2048)."""
    from torchvision.models.inception import BasicConv2d, Inception3
    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises half a dozen types here
        raise BadInput(f"{path} does not hold the weights of FID's Inception: {str(error).splitlines()[0]}")
    for conv in [module for module in network.modules() if isinstance(module, BasicConv2d)]:
        conv.conv, conv.bn = nn.utils.fuse_conv_bn_eval(conv.conv, conv.bn), nn.Identity()
    *blocks, last = [block for block in network.children() if hasattr(block, "branch_pool")]  # A, C and E
    for block in blocks:  # FID's averages do not count the padding; torchvision's divide by nine everywhere
        block.branch_pool.register_forward_pre_hook(
            lambda _, x: x[0] / F.avg_pool2d(torch.ones_like(x[0][:1, :1]), kernel_size=3, stride=1, padding=1))
    last.register_forward_pre_hook(lambda _, x: setattr(last, "x", x[0]))  # the last E takes the maximum instead
    last.branch_pool.register_forward_pre_hook(lambda *_: F.max_pool2d(last.x, kernel_size=3, stride=1, padding=1))
    network.fc = network.dropout = nn.Identity()
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


def inception_features(weights_path, data_dir, resize, device):
    """The 2048 features of FID; a distance in them is called FID only with the very weights that define it."""
    # features are a namespace: see (uint8 images (N, C, H, W) -> (N, d)), name, resize, metric (a distance's name)
    path = Path(weights_path or Path(data_dir) / Path(INCEPTION).name)
    if not weights_path and not path.is_file():
        try:  # into a scratch folder, checked by its hash, then moved
            datasets._download(lambda folder: torch.hub.download_url_to_file(
                INCEPTION, f"{folder}/{path.name}", INCEPTION_SHA, progress=False), path.parent)
        except OSError as error:
            raise BadInput(f"Inception's weights could not be downloaded ({error}); put {path.name} into {data_dir}/, "
                           "or measure with --features classifier, which gives no FID")
    network, found = inception(path).to(device), hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return SimpleNamespace(see=lambda images: network(resized(images.to(device), resize)), resize=resize,
                           name=f"inception {found}", metric="FID" if found == INCEPTION_SHA else "inception distance")


def classifier_features(train, test, data_dir, device):
    """128 features of a small classifier of `train`, Images with labels, trained once. No FID, and never called so."""
    channels, size = train.pixels.shape[1:3]
    path = Path(data_dir) / ".fid" / f"classifier_{fingerprint(train.pixels, train.labels)}.pt"

    def prepare(images):
        return datasets._fit(images.cpu(), size, channels).to(device).float().div_(127.5).sub_(1)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the caller's random numbers stay
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(channels, 32, kernel_size=3, stride=2, padding=1), nn.ReLU(),  # (N, 32, 14, 14)
            nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1), nn.ReLU(),  # (N, 64, 7, 7)
            nn.Flatten(), nn.Linear(64 * (-(-size // 4))**2, 128), nn.ReLU(),
            nn.Linear(128, len(train.class_names))).to(device)
        if path.is_file():
            saved = common.load(path, "fid", "network")
        elif len(train.class_names) < 2:
            raise BadInput(f"{train.name} has no classes to train a classifier on: measure in Inception's features")
        else:
            common.say(f"training a classifier of {train.name}, once")
            optimizer = torch.optim.Adam(network.parameters())
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.004, total_steps=CLASSIFIER_STEPS)
            for _ in range(CLASSIFIER_STEPS):
                index = torch.randint(len(train), (128,)).to(train.pixels.device)
                loss = F.cross_entropy(network(prepare(train.pixels[index])), train.labels[index].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                guesses = torch.cat([network(prepare(part)).argmax(1) for part in test.pixels.split(500)])
            saved = {"accuracy": (guesses.cpu() == test.labels.cpu()).double().mean().item(),
                     "network": network.state_dict()}
            cache(path, saved)
    network.load_state_dict(saved["network"])
    name = f"classifier of {train.name} {fingerprint(*saved['network'].values())} ({saved['accuracy']:.2%} right)"
    return SimpleNamespace(see=lambda images: network[:-1](prepare(images)), resize=f"{size}x{size}x{channels}",
                           name=name, metric="classifier distance", device=device,
                           classify=torch.no_grad()(lambda seen: network[-1](seen).argmax(1)))


def fingerprint(*tensors):
    return hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)).hexdigest()[:12]


def cache(path, contents):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        common.save(path, {"script": "fid", **contents})
    except OSError as error:  # such as a folder that cannot be written: the next run computes it again
        common.say(f"not cached: {error}")


def of_images(pair, split, data_dir):
    """One of (train, test), two Images of datasets.py, as a source; split: train or test."""
    # a source is a namespace: name, count, read (index -> [uint8 images (n, C, H, W), ...], one a size, and labels or
    # None), folder (where its statistics are cached, if anywhere), digest (of the images, to tell caches apart)
    images = pair[split == "test"]
    pixels, labels = images.pixels, images.labels.cpu()
    return SimpleNamespace(name=f"{images.name}:{split}", count=len(images), folder=Path(data_dir) / ".fid", pair=pair,
                           class_names=images.class_names,
                           read=lambda index: ([pixels[index.to(pixels.device)]], labels[index]),
                           digest=fingerprint(pixels, labels))


def of_folder(folder):
    """Every image below a folder as a source, in RGB and its own size. Sub-folders are classes."""
    paths = datasets.image_files(folder)
    names, class_names = datasets.folder_classes(folder, paths)
    labels = torch.tensor([class_names.index(name) for name in names])
    listing = repr([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths])
    return SimpleNamespace(name=str(folder), count=len(paths), folder=Path(folder) / ".fid",
                           read=lambda index: (datasets.read_images([paths[i] for i in index]),
                                               labels[index] if len(class_names) > 1 else None),
                           class_names=class_names, digest=hashlib.sha256(listing.encode()).hexdigest()[:12])


def of_generator(name, count, generate):
    """A source of what generate(index) draws: images in [-1, 1], (N, C, H, W) or flattened, or (images, labels)."""
    def read(index):
        images, labels = made if isinstance(made := generate(index), tuple) else (made, None)
        images = images.unflatten(1, (1, math.isqrt(images.shape[1]), -1)) if images.ndim == 2 else images
        return [((images + 1) * 127.5).round().clamp(0, 255).byte()], labels  # as they would be saved

    return SimpleNamespace(name=name, count=count, read=read, folder=None, digest="")


def of_weights(path, count, seed, device):
    """A weights file ("": the newest here) as a source: its generator or decoder, by the script that wrote it."""
    path, weights, load = common.open_weights(path, "load_generator", "load_model")
    kwargs, networks, random = weights["model_kwargs"], load(path), torch.Generator().manual_seed(seed)
    z = torch.randn(count, kwargs.get("latent_variable_size") or kwargs["latent_dim"], generator=random).to(device)
    if isinstance(networks, tuple):  # an encoder and a decoder, which gives grey images in [0, 1], coloured in [-1, 1]
        decoder, low = networks[1].to(device), 0 if kwargs.get("image_channels", 1) == 1 else -1
        source = of_generator(path, count, lambda index: (decoder.sample(z[index]) - low) / (1 - low) * 2 - 1)
    else:
        generator = networks.to(device)
        source = of_generator(path, count, lambda index: generator(z[index]))
    if classes := kwargs.get("num_classes"):
        labels = torch.arange(count, device=device) % classes
        source = of_generator(path, count, lambda index: (generator(z[index], labels[index]), labels[index]))
    compressed = re.search(r"JPEG quality (\d+)", weights["data"])
    source.data, source.num_classes, source.left_out = weights["data"], classes, datasets.left_out(weights["data"])
    source.jpeg_quality = int(compressed[1]) if compressed else 0
    return source


def open_source(text, count, seed, data_dir, device, like=None):
    """The source, or Statistics, of this name; a data set in the size of the images of `like`, else in its own."""
    if text.endswith(".npz"):
        try:
            with np.load(text) as file:  # this script's, or pytorch-fid's
                made = Statistics(str(file.get("label", "")))
                made.n, made.mu, made.sigma = int(file.get("n", 0)), *map(torch.from_numpy, (file["mu"], file["sigma"]))
            return made
        except Exception as error:  # numpy and zipfile raise half a dozen types here
            raise BadInput(f"{text} holds no statistics, mu and sigma ({error!r})")
    if text.endswith(".pt") or not text:
        return of_weights(text, count, seed, device)
    if Path(text).is_dir():
        return of_folder(text)
    name, _, split = text.partition(":")
    if name not in (*datasets.PLACES, "digits", "folder") or split not in ("train", "test"):
        names = ", ".join([*datasets.PLACES, "digits", "folder"])
        raise BadInput(f"{text!r} is no folder, .pt, .npz or {names} with :train or :test")
    channels, side = (like.read(torch.arange(2))[0][0].shape[1:3] if hasattr(like, "data")
                      else {"mnist": (1, 28), "digits": (1, 28), "sprites": (3, 16)}.get(name, (3, 32)))
    pair = datasets.load_data(name, data_dir, False, 1, False, side, channels, torch.device("cpu"),
                              num_classes=getattr(like, "num_classes", None),
                              jpeg_quality=getattr(like, "jpeg_quality", 0))
    if getattr(like, "left_out", None) is not None:
        for images in pair:
            images.leave_out(like.left_out)
    return of_images(pair, split, data_dir)


@torch.inference_mode()
def measure(source, features, count, batch_size):
    """Statistics of `count` images in a fixed random order, or of all if there are fewer; cached if they are data."""
    from tqdm import tqdm
    if isinstance(source, Statistics):
        return source
    if min(count, source.count) < 2:
        raise BadInput(f"{source.name} holds {source.count} images; two are the least")
    made = Statistics(f"features {features.name}  resize {features.resize}")
    made.index = torch.randperm(source.count, generator=torch.Generator().manual_seed(0))[:count]
    stem = re.sub(r"[^\w.]+", "_", f"{Path(source.name).name} {len(made.index)} {source.digest} {made.label}")
    path = source.folder and source.folder / f"{stem}.pt"
    if path and path.is_file():
        vars(made).update(common.load(path, "fid", "mu"))
    else:
        for part in tqdm(made.index.split(batch_size), source.name, leave=False, disable=not sys.stderr.isatty()):
            images, labels = source.read(part)
            made.add(torch.cat([features.see(each).float().cpu() for each in images]), labels)
        if path:
            cache(path, vars(made))
    return made


class Scorer:
    """The distance of n generated images from the images `train`, for use in training; the RNG is left as it was.

        score = fid.Scorer(train, test, 10000, "classifier", data_dir)       # two Images; once, before training
        run.end_epoch(**{score.name: score(lambda index: trainer.sample(torch.randn(len(index), 64)))})

    generate(index), of some numbers below n, gives as many images in [-1, 1], or (images, labels): then class_distances
    holds the last call's, by label, and obedience the share of each label's images in which the classifier sees this
    class ({} with other features).
    floor: the distance of n test images. fall_back: a classifier, with a warning, if Inception's weights cannot be had.
    """

    @training.first_process_first()  # what it trains or downloads, the other processes find
    def __init__(self, train, test, n, features, data_dir, resize="clean", fall_back=False):
        self.n, self.device = n, train.pixels.device
        try:
            self.features = (classifier_features(train, test, data_dir, self.device) if features == "classifier"
                             else inception_features("", data_dir, resize, self.device))
        except BadInput as error:
            if features == "classifier" or not fall_back:
                raise
            self.features = classifier_features(train, test, data_dir, self.device)
            common.say(f"WARNING: NO FID. {error}. Every score is a classifier's distance instead, and says so.")
        self.real, held_out = (measure(of_images((train, test), split, data_dir), self.features, most, 250)
                               for split, most in (("train", len(train)), ("test", n)))
        self.name, self.floor = self.features.metric, self.real.distance(held_out)

    def __call__(self, generate):
        state = torch.mps.get_rng_state() if self.device.type == "mps" else None
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)  # the same z each time, so that from call to call only the generator changes
            fake = measure(of_generator("generated", self.n, generate), self.features, self.n, 250)
        if state is not None:
            torch.mps.set_rng_state(state)
        value, self.class_distances = self.real.distance(fake), self.real.class_distances(fake)
        self.obedience = obedience(self.features, fake)
        return value

    def columns(self, generate):
        """{column: value} for a history, the classes' means and worst case too; all nan where generate is None."""
        value = self(generate) if generate else math.nan
        by_class = (self.class_distances, self.obedience) if value == value else ({}, {})
        distances, shares = ([*part.values()] or [math.nan] for part in by_class)
        return {self.name: value, "mean class distance": sum(distances) / len(distances),
                "asked class": sum(shares) / len(shares), "asked class, worst": min(shares)}


def save_neighbours(path, fakes, fake, reals, real):
    """The eight samples most like copies (nearest real image much closer than the seventh), each with its seven."""
    distances, nearest = torch.cdist(fake.kept[:2000], real.kept).topk(min(7, len(real.kept)), largest=False)
    tiles = []
    for row in (distances[:, 0] / distances[:, -1]).argsort()[:8]:
        copy, originals = fakes.read(fake.index[row:row + 1])[0], reals.read(real.index[nearest[row]])[0]
        for part in [*copy, torch.full((1, 1, 8, 8), 128), *originals]:
            part = F.interpolate(part.cpu().float(), size=(56, 56), mode="bicubic", antialias=True)
            tiles.append(part.expand(-1, 3, -1, -1))
    common.save_grid(torch.cat(tiles), path, columns=2 + nearest.shape[1], low=0, high=255)


def main(source_kwargs, metric_kwargs):
    """Measure as the settings say; prints a line, writes JSON and picture; returns what it wrote."""
    common.check(__file__, {**source_kwargs, **metric_kwargs})
    o = SimpleNamespace(**source_kwargs, **metric_kwargs)
    device = common.choose_device(o.device)
    fakes = open_source(o.generated, o.num_images, o.seed, o.data_dir, device)
    generated = o.generated or fakes.name
    if not o.real and not hasattr(fakes, "data"):
        raise BadInput(f"{generated} does not say what it was trained on: give --real, such as mnist:train or a folder")
    against = o.real or f"{datasets.check_folder(fakes.data, o.data_dir)}:train"
    reals = open_source(against, o.num_images, o.seed, o.data_dir, device, like=fakes)
    pair = getattr(reals, "pair", None)
    if o.features == "classifier" and not pair:
        raise BadInput("a classifier needs labels: --real mnist:train or the like; or --features inception")
    features = (classifier_features(*pair, o.data_dir, device) if o.features == "classifier"
                else inception_features(o.inception_weights, o.data_dir, o.resize, device))
    real = measure(reals, features, sys.maxsize, o.batch_size)
    fake = measure(fakes, features, o.num_images, o.batch_size)
    names, known = (getattr(source, "class_names", []) for source in (fakes, reals))
    if len(fake.labels) and known and not {"data", "pair"} & vars(fakes).keys():  # a folder: its classes go by name
        index = {key: label for label, name in enumerate(known) for key in (name.split(" - ")[0], name)}
        fake.labels = (torch.tensor([index[name] for name in names])[fake.labels] if {*names} <= {*index}
                       else fake.labels[:0])
    result = {features.metric: real.distance(fake), "N": fake.n or "unknown"}
    result.update({"features": features.name, "resize": features.resize})
    if pair:  # what a perfect generator would get
        other = of_images(pair, "test" if against.endswith("train") else "train", o.data_dir)
        other = measure(other, features, o.num_images, o.batch_size)
        result.update({"floor": real.distance(other), "floor's N": other.n})
    kept = min(len(real.kept), len(fake.kept), 10000)
    if kept > 1:
        kernel = "KID" if features.metric == "FID" else f"kernel {features.metric}"
        result[kernel], result["standard error"] = kernel_distance(real.kept[:kept], fake.kept[:kept])
        result["precision"], result["recall"] = precision_recall(real.kept[:kept], fake.kept[:kept])
    if classes := real.class_distances(fake):
        result["mean of classes"] = sum(classes.values()) / len(classes)
    by_class = {"asked class": obedience(features, fake)}
    if pair and classes and {"data", "pair"} & vars(fakes).keys():  # images of one size; in pixels, as they are seen
        made, data = (distance_within_classes(*map(torch.cat, zip(*(
            (images[0], labels) for images, labels in map(source.read, seen.index[:5000].split(500))))))
            for source, seen in ((fakes, fake), (reals, real)))
        by_class["diversity within class"] = {label: made[label] / data[label] for label in made if data.get(label)}
    for name, values in by_class.items():
        if values:
            result[name], result[f"{name}, worst"] = sum(values.values()) / len(values), min(values.values())
    result.update({"generated": generated, "real": against, "real's N": real.n or "unknown"})
    print("  ".join(f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in result.items()))
    for name, n in (generated, fake.n), (against, real.n):
        if n < len(fake.mu):
            common.say(f"warning: {name}: N {n or 'unknown'} is few for {len(fake.mu)} features: without full rank the "
                       "covariance makes the distance too large, the more so the fewer images; compare at equal N only")
    path = Path(o.output_dir) / re.sub(r"[^\w.]+", "_", f"{features.metric}_of_{' '.join(Path(generated).parts[-2:])}")
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write(f"{path}.json", json.dumps({**result, "classes": classes, "by class": by_class}, indent=1).encode())
    np.savez(buffer := io.BytesIO(), mu=fake.mu, sigma=fake.sigma, n=fake.n, label=fake.label)
    common.write(f"{path}.npz", buffer.getvalue())
    if hasattr(fakes, "read") and hasattr(reals, "read"):
        save_neighbours(f"{path}.png", fakes, fake, reals, real)
    return result


if __name__ == "__main__":
    common.run(main, source_kwargs, metric_kwargs)
