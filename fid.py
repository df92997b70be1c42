"""Frechet Inception Distance (FID) and its relatives: how far samples are from data.

A network turns each image into a vector of features. A Gaussian
is fitted to those of the real images and another to those of the
generated ones, and the distance of the two Gaussians is taken:
less is better. Two sets with equal means and covariances cannot
be told apart by it; KID, precision and recall look further.

paper:  Heusel et al. 2017, https://arxiv.org/abs/1706.08500
        KID: Binkowski et al. 2018,
        https://arxiv.org/abs/1801.01401
        precision and recall: Kynkaanniemi et al. 2019,
        https://arxiv.org/abs/1904.06991
        resize `clean`: Parmar et al. 2022,
        https://arxiv.org/abs/2104.11222
run:    python fid.py --generated mnist_GAN/weights_epoch_20.pt --features classifier
        python fid.py --generated my_samples/ --real my_photos/   (two folders of images)
writes: scores/: {metric}_of_{generated}.json (with --real:
        _from_{real}), and .png (generated images above the
        real images nearest to them); .fid/ in the data's folder:
        features of data sets and folders, and the classifier, so
        that they are computed once
expect: main_gan on MNIST after 1, 5, 20 epochs: classifier
        distance 492, 149, 70.7, N 10,000, 40 s each on one core.
        The floor, the distance of MNIST's own test images, is
        2.50: a perfect generator would get that
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import common
import training
from common import BadInput, require

source_kwargs = {
    "generated": "",  # weights, a folder, .npz, or mnist:test; "": newest weights
    "real": "",  # the same kinds; "": what the generator was trained on
    "data_dir": "",  # the data's folder; "": as in training, or else data
    "num_images": 10000,  # generated ones; papers take 50000, and fewer score worse
    "seed": 0,  # of the latent vectors, for weights
}
metric_kwargs = {
    "features": "inception",  # inception | classifier, which is trained here
    "resize": "clean",  # clean, as clean-fid | legacy, as pytorch-fid; for inception
    "inception_weights": "",  # the .pth file; "": in data_dir or data, or downloaded
    "batch_size": 50,  # images that pass the network together
    "output_dir": "scores",  # everything but the caches is written there
    "device": "auto",  # auto: cuda, else mps, else cpu; or name one: cuda:1
}

INCEPTION = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA = "6726825d"  # the start of the file's SHA-256
CLASSIFIER_STEPS = 1500  # of 128 images each: 3 epochs of MNIST


def check_settings(settings):
    """Refuse impossible values in one line, before any work."""
    known = settings["features"] in ("inception", "classifier")
    require(known, "features must be inception or classifier")
    known = settings["resize"] in ("clean", "legacy")
    require(known, "resize must be clean or legacy")
    require(settings["num_images"] >= 2, "num_images must be at least 2")
    require(settings["batch_size"] >= 1, "batch_size must be at least 1")
    require(0 <= settings["seed"] < 2**32, "seed must be between 0 and 4294967295")


# ------------------------------------------------------ distances


def square_root(sigma):
    """A root (d, r) of the covariance sigma (d, d) = root @ root.T, in float64."""
    values, vectors = torch.linalg.eigh(torch.as_tensor(sigma, dtype=torch.float64))
    # An eigenvalue as small as the rounding errors of the
    # largest, which is the last, is no variance.
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]
    kept = values > rounding
    return vectors[:, kept] * values[kept].sqrt()


def mean_and_root(features):
    """features (n, d) -> mean (d,), and a root (d, r) of the covariance, in float64."""
    mu = features.mean(0, dtype=torch.float64)
    # features - mu = Q R, where Q drops out of
    # the covariance R^T R / (n - 1). This is
    # exact even for fewer images than features.
    factor = torch.linalg.qr(features - mu, mode="r").R
    return mu, factor.T / math.sqrt(len(features) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians, eq. (6) of Heusel et al.:

        |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))

    mu (d,), sigma (d, d); it is computed in float64, and never
    below 0. The script itself keeps roots of the covariances, for
    which there is the function below.
    """
    mu1 = torch.as_tensor(mu1, dtype=torch.float64)
    mu2 = torch.as_tensor(mu2, dtype=torch.float64)
    return distance_of_roots(mu1, square_root(sigma1), mu2, square_root(sigma2))


def distance_of_roots(mu1, root1, mu2, root2):
    """The same distance, from roots (d, r) of the covariances.

    Let S1 = R1 R1^T, S2 = R2 R2^T and M = R1^T R2. Then S1 S2 has
    the nonzero eigenvalues of M^T M, since A B and B A share
    theirs, and these are the squared singular values of M. So the
    trace of (S1 S2)^(1/2), the sum of their square roots, is the
    sum of the singular values. No number becomes complex, as it
    may in the square root of a matrix, and small eigenvalues keep
    their precision.
    """
    traces = root1.square().sum() + root2.square().sum()
    apart = (mu1 - mu2).square().sum() + traces
    require(apart.isfinite(), "there are NaN or infinite features: look at the images")
    overlap = torch.linalg.svdvals(root1.T @ root2).sum()
    return max(0.0, (apart - 2 * overlap).item())


def kernel_distance(real, fake, blocks=10):
    """KID of features (n, d) and (m, d), and its standard error (NaN from one block).

    With the kernel k(x, y) = (x . y / d + 1)^3 it is the mean of
    k over pairs of real images, plus that over pairs of generated
    ones, minus twice that over pairs of one real and one
    generated image: the squared maximum mean discrepancy, eq. (4)
    of Binkowski et al. Unlike the distance above it does not grow
    with fewer images, and chance may make it a little less than 0.
    It is a mean over blocks that share no image, whose spread
    gives the standard error. Images that fill no block are left
    out.
    """
    smaller = min(len(real), len(fake))
    blocks = min(blocks, smaller // 2)
    size = smaller // blocks
    d = real.shape[1]
    values = []
    for x, y in zip(real.double().split(size)[:blocks], fake.double().split(size)):
        within = (x @ x.T / d + 1) ** 3 + (y @ y.T / d + 1) ** 3  # (size, size)
        across = (x @ y.T / d + 1) ** 3
        pairs = within.sum() - within.trace()  # an image and itself are no pair
        values.append(pairs / (size * (size - 1)) - 2 * across.mean())
    values = torch.stack(values)
    spread = values.std().item() if blocks > 1 else math.nan
    return values.mean().item(), spread / math.sqrt(blocks)


def share_covered(points, others, k=3):
    """The share of points (m, d) that lie in the manifold of others (n, d).

    The manifold is the union of balls around the others, each of
    which reaches to the k-th nearest of them, eq. (1) of
    Kynkaanniemi et al. Precision is the share of generated images
    in the manifold of the real ones, recall the reverse.
    """
    nth = min(k + 1, len(others))  # the first is the point itself
    reach = torch.cdist(others, others).kthvalue(nth).values  # (n,)
    inside = torch.cdist(points, others) <= reach  # (m, n)
    return inside.any(1).double().mean().item()


def mean_distance(images):
    """Mean Euclidean distance between any two of the images (N, ...)."""
    # on the CPU, since not every device has pdist
    return F.pdist(images.flatten(1).float().cpu()).mean().item()


# ------------------------------------------------------- networks


@dataclass
class FeatureNetwork:
    """What turns images into the features in which a distance is measured.

    A network of your own is another function that returns this;
    it is chosen in `choose_network`, and its name is made legal
    in `check_settings`.
    """

    name: str  # another one for other weights: it names the cached features
    metric: str  # what a distance is called
    resize: str  # how images are brought to the network's size
    compute: Callable  # uint8 images (N, C, H, W) -> features (N, d)
    classify: Callable | None = None  # features (N, d) on the CPU -> logits


def resized(images, resize):
    """uint8 (N, C, H, W) -> Inception's input (N, 3, 299, 299) in [-1, 1]."""
    size = 299, 299
    if resize == "legacy":
        # as pytorch-fid: without antialiasing many
        # pixels of a large image are never looked at
        images = 2 * F.interpolate(images / 255, size, mode="bilinear") - 1
    else:
        # as clean-fid: Pillow's bicubic on
        # floats, and TensorFlow's (x - 128) / 128
        images = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
        images = (images.clamp(0, 255) - 128) / 128
    return images.expand(-1, 3, -1, -1)


class InceptionBlock(nn.Module):
    """A block of torchvision's Inception with another pooling in its last branch."""

    def __init__(self, block, pool):
        super().__init__()
        self.block, self.pool = block, pool

    def forward(self, x):
        # branch_pool is the convolution that follows the pooling
        pooled = self.block.branch_pool(self.pool(x))
        # The block computes all its branches. The pooled one's
        # channels come last, and `pooled` takes their place.
        return torch.cat([self.block(x)[:, : -pooled.shape[1]], pooled], dim=1)


def load_inception(path):
    """FID's Inception (TensorFlow, 2015-12-05): (N, 3, 299, 299) -> (N, 2048)."""
    from torchvision.models import Inception3

    # to build it draws random weights, which the file's replace
    with seeded(torch.device("cpu")):
        # the file's last layer, which is not used, has 1008 outputs
        network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # FID's averages do not count the padding, while
    # torchvision's divide by nine everywhere; and
    # FID's last block takes the maximum.
    average = nn.AvgPool2d(kernel_size=3, stride=1, padding=1, count_include_pad=False)
    for name, block in list(network.named_children()):
        if hasattr(block, "branch_pool"):  # the blocks A, C and E
            setattr(network, name, InceptionBlock(block, average))
    network.Mixed_7c.pool = nn.MaxPool2d(kernel_size=3, stride=1, padding=1)
    network.fc = nn.Identity()
    # on a CPU this memory format is a third faster
    return network.eval().to(memory_format=torch.channels_last)


def inception_features(weights_path, data_dir, resize, device):
    """The 2048 features of FID, computed with the original weights.

    Raises OSError if these cannot be downloaded.
    """
    path = Path(weights_path or Path(data_dir) / Path(INCEPTION).name)
    if not weights_path and not path.is_file():
        common.download(INCEPTION, path, INCEPTION_SHA)
    require(path.is_file(), f"there is no file {path}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    wrong = f"{path} does not hold the weights of FID's Inception"
    require(found.startswith(INCEPTION_SHA), f"{wrong}: its SHA-256 is a different one")
    network = load_inception(path).to(device)

    def compute(images):
        # on Apple's GPUs torch has no antialiased bicubic before 2.8
        images = images.to(device) if device.type == "cuda" else images.cpu()
        return network(resized(images, resize).to(device))

    return FeatureNetwork(f"inception {INCEPTION_SHA}", "FID", resize, compute)


def prepared(images, train):
    """uint8 images in the size of those of `train`, in [-1, 1], for its classifier."""
    channels, size, _ = train.pixels.shape[1:]
    images = common.resize(images.cpu(), size, channels).to(train.device)
    return images.float() / 127.5 - 1


def new_classifier(channels, size, classes):
    """Images (N, C, H, W) -> logits (N, classes), through 128 features.

    Shapes are for 28 pixels. After a change delete .fid/, where
    the old network is kept.
    """
    side = math.ceil(size / 4)
    return nn.Sequential(
        nn.Conv2d(channels, 32, kernel_size=3, stride=2, padding=1),  # (N, 32, 14, 14)
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),  # (N, 64, 7, 7)
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * side**2, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def train_classifier(network, train):
    """CLASSIFIER_STEPS steps of Adam on the images `train`."""
    common.warn(f"training a classifier of {train.name}, once")
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.004, total_steps=CLASSIFIER_STEPS
    )
    for _ in range(CLASSIFIER_STEPS):
        index = torch.randint(len(train), (128,)).to(train.device)
        logits = network(prepared(train.pixels[index], train))
        loss = F.cross_entropy(logits, train.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def classifier_features(train):
    """128 features of a small classifier of `train`, trained once.

    A distance between them is no FID, and compares only with
    others by the same classifier.
    """
    classes = len(train.class_names)
    require(classes > 1, f"{train.name} has no classes that a classifier could learn")
    channels, size, _ = train.pixels.shape[1:]
    path = cache_path(train, f"classifier of {CLASSIFIER_STEPS} steps")
    with seeded(train.device):
        network = new_classifier(channels, size, classes).to(train.device)
        if path.is_file():
            saved = common.load_weights(path, "fid", "network")
            network.load_state_dict(saved["network"])
        else:
            train_classifier(network, train)
            common.cache(path, "fid", network=network.state_dict())
    network.requires_grad_(False)

    def compute(images):
        return network[:-1](prepared(images, train))

    version = fingerprint(nn.utils.parameters_to_vector(network.parameters()))
    name = f"classifier of {train.name} {version}"
    shape = f"{size}x{size}x{channels}"
    return FeatureNetwork(name, "classifier distance", shape, compute, network[-1].cpu())


@contextmanager
def seeded(device):
    """Inside, random numbers are those of seed 0; afterwards they are as before."""
    before = training.random_state(device)
    torch.manual_seed(0)
    try:
        yield
    finally:
        training.set_random_state(device, before)


# ------------------------------------------------------ measuring


def fingerprint(tensor):
    """A short hash of what the tensor holds."""
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()[:12]


def cache_path(images, what):
    """The file beside the data that keeps what was computed from exactly these images."""
    digest = f"{fingerprint(images.pixels)} {fingerprint(images.labels)}"
    return Path(images.data_dir) / ".fid" / f"{what} {digest}.pt"


@dataclass
class Statistics:
    """The mean of some images' features and their covariance, root @ root.T."""

    n: int  # images; 0 where that is not known
    mu: torch.Tensor  # (d,) float64
    root: torch.Tensor  # (d, r) float64
    features: torch.Tensor | None = None  # (n, d) float32; not in an .npz
    images: common.Images | None = None  # what was measured; not in an .npz

    def distance(self, other):
        """Squared Frechet distance. Raises BadInput for another number of features."""
        sizes = f"{len(self.mu)} and {len(other.mu)} features"
        require(len(self.mu) == len(other.mu), f"{sizes} cannot be compared")
        return distance_of_roots(self.mu, self.root, other.mu, other.root)


def shuffled(count):
    """0 to count - 1 in a random order, which is always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # a GPU and a CPU then agree
def measure(images, network, count, batch_size):
    """Statistics of `count` images, or of all if there are fewer.

    They are taken in a random order, so that
    the first of them are a fair sample.
    """
    from tqdm import tqdm

    index = shuffled(len(images))[:count]
    require(len(index) > 1, f"{images.name} holds one image; a covariance needs two")
    labels = images.labels.cpu()[index]
    images = replace(images, pixels=images.pixels[index], labels=labels)
    path = cache_path(images, f"features {network.name}  resize {network.resize}")
    if path.is_file():
        features = common.load_weights(path, "fid", "features")["features"]
    else:
        features = []
        quiet = not sys.stderr.isatty()
        batches = images.pixels.split(batch_size)
        for part in tqdm(batches, images.name, leave=False, disable=quiet):
            features.append(network.compute(part).float().cpu())
        features = torch.cat(features)
        if images.data_dir:  # a data set or a folder, which may be measured again
            common.cache(path, "fid", features=features)
    mu, root = mean_and_root(features)
    return Statistics(len(images), mu, root, features, images)


@torch.inference_mode()
def draw(generate, count, data, device):
    """`count` images that generate(index) draws in [-1, 1], as common.Images.

    generate may also return (images, labels). data: a dict with
    shape and class_names.
    """
    pixels, labels = [], []
    order = shuffled(count)  # so that a batch has images of all classes
    for index in order.split(250):
        made = generate(index.to(device))
        labelled = isinstance(made, tuple)
        # where there are no labels, the numbers fill their place, unread
        images, part = made if labelled else (made, index)
        images = images.reshape(len(index), *data["shape"])
        images = ((images + 1) * 127.5).round().clamp(0, 255)  # as if they were saved
        pixels.append(images.byte())
        labels.append(part)
    back = order.argsort()  # it undoes the shuffle: image i comes i-th again
    class_names = data["class_names"] if labelled else []
    pixels, labels = torch.cat(pixels)[back], torch.cat(labels)[back]
    return common.Images(
        pixels, labels, class_names, name="generated", dataset_type="", data_dir=""
    )


def compare_classes(real, fake, network, in_pixels):
    """{column: {label: value}} for the classes of which both have two images.

    "asked class" is the share of generated images that the
    classifier puts into the class that was asked for. in_pixels:
    also how far two generated images of a class are apart,
    divided by the same of real ones ("diversity within class").
    """
    distances, asked, diversity = {}, {}, {}
    for label in fake.images.labels.unique().tolist():
        ours = real.images.labels == label
        theirs = fake.images.labels == label
        if min(ours.sum(), theirs.sum()) < 2:
            continue
        made = fake.features[theirs]
        mu, root = mean_and_root(real.features[ours])
        distances[label] = distance_of_roots(mu, root, *mean_and_root(made))
        if network.classify:
            right = network.classify(made).argmax(1) == label
            asked[label] = right.double().mean().item()
        # of the first 5,000 images, since the distances of all pairs fill the memory
        made = fake.images.pixels[:5000][theirs[:5000]]
        data = real.images.pixels[:5000][ours[:5000]]
        if in_pixels and min(len(made), len(data)) > 1:
            real_distance = mean_distance(data)
            if real_distance > 0:  # else the real images of the class are all the same
                diversity[label] = mean_distance(made) / real_distance
    return {
        "mean class distance": distances,
        "asked class": asked,
        "diversity within class": diversity,
    }


def summarise(classes):
    """{column: value}: means over the classes, and the least where more is better."""
    columns = {}
    for column, values in classes.items():
        if values:
            columns[column] = sum(values.values()) / len(values)
            if column != "mean class distance":
                columns[f"{column}, worst"] = min(values.values())
    return columns


def choose_network(features, train, data_dir, device, resize="clean", weights_path=""):
    """The FeatureNetwork of these settings; a classifier is trained on `train`.

    features: inception, classifier, or, for a Scorer, auto.
    """
    if features != "classifier":
        try:
            return inception_features(weights_path, data_dir, resize, device)
        except OSError as error:
            why = f"Inception's weights could not be downloaded ({error})"
            name = Path(INCEPTION).name
            advice = f"put {name} into {data_dir}, or take classifier in place of inception"
            if features != "auto":
                raise BadInput(f"{why}; {advice}")
            common.warn(f"WARNING: NO FID. {why}. It is a classifier's distance instead.")
    labels = "--real mnist:train or the like, or a folder with a sub-folder for each class"
    require(train, f"a classifier needs labels: {labels}")
    return classifier_features(train)


class Scorer:
    """The distance of generated images from the images `train`, for use in training:

        def generate(index):
            return generator(torch.randn(len(index), 100))

        train, _ = common.load_data("mnist", "data", image_channels=1, device="cpu")
        scorer = fid.Scorer(train, features="classifier", num_images=10000)
        print(scorer(generate))

    index (n,) holds numbers of images, 0 to num_images - 1, and
    generate returns as many images in [-1, 1], (n, C, H, W) or
    flattened. A conditional one chooses their classes by these
    numbers, and returns (images, labels). scorer.name is the
    column of the distance of all images. features: inception,
    classifier, or auto: Inception's if its weights can be
    downloaded, else the classifier's with a warning. Raises
    BadInput if there is neither.
    """

    @common.first_process_first()  # the others then find what it trained or downloaded
    def __init__(self, train, features, num_images):
        self.num_images, self.train = num_images, train
        self.network = choose_network(features, train, train.data_dir, train.device)
        self.name = self.network.metric
        self.real = measure(train, self.network, len(train), batch_size=250)

    def __call__(self, generate):
        """{column: value} for the history. It leaves random numbers as they were."""
        device = self.train.device
        with seeded(device):  # the same noise each time: only the generator changes
            images = draw(generate, self.num_images, self.train.record(), device)
        fake = measure(images, self.network, self.num_images, batch_size=250)
        columns = {self.name: self.real.distance(fake)}
        if images.class_names:
            classes = compare_classes(self.real, fake, self.network, in_pixels=False)
            columns |= summarise(classes)
        return columns


# ----------------------------------------------- the command line


@dataclass
class Source:
    """What a name on the command line stands for: images, or their statistics."""

    name: str
    images: common.Images | None = None
    train: common.Images | None = None  # labelled images to train a classifier on
    other: common.Images | None = None  # a data set's other split, for the floor
    weights: dict | None = None  # of a weights file: what it holds
    statistics: Statistics | None = None  # of an .npz


def of_weights(path, count, seed, device):
    """What the generator or decoder of a weights file draws."""
    weights = common.load_weights(path, None, "model_kwargs")
    script = common.script_of(weights)
    kwargs, data = weights["model_kwargs"], weights["data"]
    latent_dim = kwargs.get("latent_variable_size") or kwargs["latent_dim"]
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(count, latent_dim, generator=random).to(device)
    if "decoder" in weights:
        sample = script.load_model(path)[1].to(device).sample
    else:
        sample = script.load_generator(path).to(device)

    def generate(index):
        if "embedding_dim" in kwargs:  # conditional: every class in turn; always in [-1, 1]
            labels = index % len(data["class_names"])
            return sample(z[index], labels), labels
        images = sample(z[index])
        return images if data["normalize"] else 2 * images - 1

    return Source(path, draw(generate, count, data, device), weights=weights)


def of_statistics(path):
    """Mean `mu` and covariance `sigma` in an .npz of pytorch-fid or of clean-fid."""
    try:
        with np.load(path) as file:
            mu = torch.as_tensor(file["mu"], dtype=torch.float64)
            root = square_root(file["sigma"])
    except Exception as error:  # numpy and zipfile raise half a dozen types here
        raise BadInput(f"{path} holds no statistics, mu and sigma ({error!r})")
    return Source(path, statistics=Statistics(0, mu, root))


def width_of_first(folder):
    """The width in pixels of the first image in
    a folder that can be read. Raises BadInput.
    """
    from PIL import Image, ImageOps

    for path in common.image_files(folder):
        try:
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).width
        except Exception:
            # a decoder may raise anything;
            # `load_folder` names the file
            continue
    raise BadInput(f"{folder} holds no image that can be read")


def of_folder(folder, device):
    """The images in a folder and below it, in colour; its sub-folders are classes.

    All become squares as wide as the first; of an
    image that is not square the middle is taken.
    """
    width = width_of_first(folder)
    (train, test), class_names = common.load_folder(folder, width, 3)
    pixels = torch.cat([train[0], test[0]])
    labels = torch.cat([train[1], test[1]])
    images = common.Images(
        pixels, labels, class_names, name=folder, dataset_type="folder", data_dir=folder
    )
    train = None
    if len(class_names) > 1:  # a classifier of them needs no more than 64 pixels a side
        train = replace(images, pixels=common.resize(pixels, min(width, 64), 3)).to(device)
    return Source(folder, images, train)


def of_data_set(name, data_dir, weights, device, size=0):
    """A split of one of common.DATASET_TYPES, such as mnist:test.

    weights: what it is compared with. If they are of the same
    data set, it has their images' size. size: of cub, which
    has none of its own, in pixels; 0 is 32.
    """
    kind, _, split = name.partition(":")
    legal = "no folder, .pt, .npz, or data set such as mnist:train or mnist:test"
    require(split in ("train", "test"), f"{name!r} is {legal}")
    if weights and kind == weights["data"]["dataset_type"]:
        left_out = weights["dataset_kwargs"].get("exclude_class", -1)
        train, test = common.load_again(weights, data_dir, device, left_out)
    else:
        channels = 1 if kind in ("mnist", "fashion_mnist", "digits") else 3
        train, test = common.load_data(
            kind,
            data_dir or "data",
            image_channels=channels,
            image_size=size if kind == "cub" else 0,
            allow_fallback=False,
            device=device,
        )
    images, other = (train, test) if split == "train" else (test, train)
    return Source(f"{images.name}:{split}", images, train, other)


def open_source(name, data_dir, num_images, seed, weights, device, size=0):
    """The source of this name. weights, size: see `of_data_set`."""
    if name.endswith(".npz"):
        return of_statistics(name)
    if name.endswith(".pt"):
        return of_weights(name, num_images, seed, device)
    if Path(name).is_dir():
        return of_folder(name, device)
    return of_data_set(name, data_dir, weights, device, size)


def open_sources(generated, real, data_dir, num_images, seed, *, device):
    """The sources of the generated and of the real images."""
    generated = generated or common.newest_weights()
    fakes = open_source(generated, data_dir, num_images, seed, None, device)
    if not real:
        unknown = f"{generated} does not say what it was trained on"
        require(fakes.weights, f"{unknown}: give --real, such as mnist:train")
        real = fakes.weights["data"]["dataset_type"] + ":train"
    size = fakes.images.pixels.shape[3] if fakes.images else 0
    return fakes, open_source(real, data_dir, num_images, seed, fakes.weights, device, size)


# ------------------------------------------------ what is written


def compare_features(real, fake, metric):
    """KID, precision and recall, of at most 10,000 images of each.

    A measure of your own is a line in what is returned.
    """
    kept = min(real.n, fake.n, 10000)
    ours, theirs = real.features[:kept], fake.features[:kept]
    value, error = kernel_distance(ours, theirs)
    return {
        "KID" if metric == "FID" else f"kernel {metric}": value,
        "standard error": error,
        "precision": share_covered(theirs, ours),
        "recall": share_covered(ours, theirs),
    }


def compare_images(real, fake, network):
    """The columns of all images, and {column: {label: value}} if class names are equal."""
    columns = compare_features(real, fake, network.metric)
    made, data = fake.images, real.images
    if len(data.class_names) < 2 or made.class_names != data.class_names:
        return columns, {}
    same_shape = made.pixels.shape[1:] == data.pixels.shape[1:]
    classes = compare_classes(real, fake, network, same_shape)
    return columns | summarise(classes), classes


def save_neighbours(path, real, fake):
    """The eight images most like copies, each above the seven nearest real images.

    Most like a copy: the nearest real image is much closer than the seventh.
    """
    distances = torch.cdist(fake.features[:2000], real.features)
    distances, nearest = distances.topk(min(7, real.n), largest=False)
    closeness = distances[:, 0] / distances[:, -1]
    most = closeness.argsort()[:8]
    copies = fake.images.pixels[most]
    originals = real.images.pixels[nearest[most].T.flatten()]
    tiles = [common.resize(images.cpu(), 56, 3) for images in (copies, originals)]
    common.save_grid(torch.cat(tiles), path, columns=len(most), low=0, high=255)


def print_result(result, statistics):
    """Print a line, and a warning for each of {name: Statistics} with too few images."""
    words = []
    for key, value in result.items():
        short = f"{value:.5g}" if isinstance(value, float) else value
        words.append(f"{key} {short}")
    print("  ".join(words))
    for name, one in statistics.items():
        if 0 < one.n <= len(one.mu):
            common.warn(
                f"warning: {name}: N {one.n} is few for {len(one.mu)} "
                "features: the covariance lacks full rank, which makes the distance too "
                "large, the more so the fewer images; compare at equal N only"
            )


def main(source_kwargs, metric_kwargs):
    """Measure, print a line, and write what was found. Returns what was printed."""
    settings = {**source_kwargs, **metric_kwargs}
    check_settings(settings)
    device = common.choose_device(settings["device"])
    fakes, reals = open_sources(**source_kwargs, device=device)
    network = choose_network(
        settings["features"],
        reals.train,
        settings["data_dir"] or "data",
        device,
        settings["resize"],
        settings["inception_weights"],
    )
    count, batch_size = settings["num_images"], settings["batch_size"]
    real = reals.statistics or measure(reals.images, network, sys.maxsize, batch_size)
    fake = fakes.statistics or measure(fakes.images, network, count, batch_size)
    result = {network.metric: real.distance(fake), "N": fake.n or "unknown"}
    result |= {"features": network.name, "resize": network.resize}
    # what a perfect generator would get
    if reals.other and len(reals.other) > 1:
        other = measure(reals.other, network, count, batch_size)
        result |= {"floor": real.distance(other), "floor's N": other.n}
    words = [network.metric, "of", *Path(fakes.name).parts[-2:]]
    if settings["real"]:
        words += ["from", *Path(reals.name).parts[-2:]]
    stem = re.sub(r"[^\w.]+", "_", " ".join(words))
    path = Path(settings["output_dir"]) / stem
    classes = {}
    if fake.images and real.images:
        columns, classes = compare_images(real, fake, network)
        result |= columns
        save_neighbours(f"{path}.png", real, fake)
    result |= {"generated": fakes.name, "real": reals.name, "real's N": real.n or "unknown"}
    print_result(result, {fakes.name: fake, reals.name: real})
    text = json.dumps({**result, "classes": classes}, indent=1)
    common.write(f"{path}.json", text.encode())
    return result


if __name__ == "__main__":
    common.run_script(main, source_kwargs, metric_kwargs)
