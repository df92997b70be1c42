"""Can a VAE tell what it was not trained on? Six scores of single images are judged.

reconstruction     the error of the decoder's picture from mu
negative ELBO      the loss of training (beta 1), from sampled z
KL                 its second part
latent distance    from mu to the nearest training image's
pixel distance     the same in pixels, without a network
feature distance   1 - cosine to the ten nearest, a mean, in
                   the encoder's last hidden layer

paper:  An and Cho 2015, Variational Autoencoder based Anomaly
        Detection using Reconstruction Probability, Special
        Lecture on IE, Seoul National University (their score is
        E log p(x|z); the negative ELBO is the KL minus it)
        Davis and Goadrich 2006, The Relationship Between
        Precision-Recall and ROC Curves, ICML (why points of a
        precision-recall curve are not joined by straight lines)
        Sun et al. 2022, Out-of-Distribution Detection with Deep
        Nearest Neighbors, https://arxiv.org/abs/2204.06507
        (as here, feature vectors have length 1; they take the
        k-th nearest training image, by a classifier's features)
run:    python main_vae.py --exclude_class 4 --hidden_size 512 --num_epochs 10
            --output_dir mnist_VAE_not_4
        (train first; that digit is then one of the anomalies)
        python detect_vae_anomalies.py      (takes the newest weights with an encoder)
writes: beside the weights: reconstruction_error_distribution.png,
        anomalies_at_threshold.png, anomaly_detection.csv
expect: MNIST, ten models, each trained as above without one
        digit; mean AUROC of that digit (0.5 is guessing):
        with 32 latents reconstruction 0.705, latent distance
        0.923, feature distance 0.953; with --latent_dim 2
        reconstruction 0.773, latent distance 0.457; pixel
        distance 0.852; a minute for training and judging a model
        on one core of an AMD EPYC. With 32 latents the decoder
        can put a strange digit together from strokes that it
        knows. With 2 every place of the plane is some digit's,
        so that no code is far from all others
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

import common

source_kwargs = {
    "weights_path": "",  # of main_vae or main_ae; empty: the newest below this folder
    "output_dir": "",  # everything is written there; empty: beside the weights
    "data_dir": "",  # the data's folder; empty: that of training
}
detection_kwargs = {
    "other_data": "auto",  # auto | mnist | fashion_mnist | cifar10 | digits | none
    "num_images": 1000,  # anomalies of each kind; a left-out class is used whole
    "num_train": 60000,  # training images among which the nearest are sought
    "elbo_samples": 8,  # samples of z behind the negative ELBO
    "percentile": 95.0,  # of clean images' scores: what lies above is called an anomaly
    "bootstrap": 1000,  # resamples behind the 95 % intervals
    "seed": 0,  # of noise, splits and resamples
    "device": "auto",  # auto: cuda, else mps, else cpu; or one by name: cuda:1
}

NEIGHBOURS = 10  # nearest training images over which the feature distance is a mean


def check_settings(settings):
    """Refuse impossible values in one line, before any work. settings: {key: value}."""
    legal = ("auto", "mnist", "fashion_mnist", "cifar10", "digits", "none")
    one_of = f"other_data must be one of {', '.join(legal)}"
    common.require(settings["other_data"] in legal, one_of)
    for key in ("num_images", "num_train", "elbo_samples", "bootstrap"):
        common.require(settings[key] >= 1, f"{key} must be at least 1")
    inside = "percentile must be above 0 and below 100"
    common.require(0 < settings["percentile"] < 100, inside)


# ------------------------------------------------------ anomalies


def black_out(x):
    """A square of a third of the side is black in each image, away from the edge.

    At the edge a digit's image is black anyway.
    """
    spoilt = x.clone()
    side = x.shape[-1]
    size, margin = side // 3, side // 8
    for image in spoilt:  # (C, H, W)
        top, left = torch.randint(margin, side - size - margin + 1, (2,)).tolist()
        image[:, top : top + size, left : left + size] = 0
    return spoilt


def corrupt(x):
    """Images x (N, C, H, W) in [0, 1] -> {kind of anomaly: images like x}.

    One of your own is one more line here: as many images, of the
    same shape, in [0, 1].
    """
    kinds = {}
    noise = torch.randn_like(x)  # one for all strengths, so that only these differ
    for sigma in (0.4, 0.2, 0.1, 0.05):
        kinds[f"Gaussian noise {sigma:g}"] = (x + sigma * noise).clamp(0, 1)
    place = torch.rand_like(x[:, :1])  # (N, 1, H, W): a pixel is hit in all its channels
    salt = torch.rand_like(place).round()  # 0 or 1
    for share in (0.2, 0.05, 0.01):
        kinds[f"salt and pepper {share:.0%}"] = torch.where(place < share, salt, x)
    kinds["inverted"] = 1 - x
    kinds["rotated by 90 degrees"] = x.rot90(1, (2, 3))
    # order 1 interpolates linearly, and "nearest"
    # repeats the last pixel beyond the edge
    pixels = x.numpy()
    turned = ndimage.rotate(pixels, 30, axes=(2, 3), reshape=False, order=1, mode="nearest")
    kinds["rotated by 30 degrees"] = torch.from_numpy(turned)
    kinds["a square blacked out"] = black_out(x)
    blurred = ndimage.gaussian_filter(pixels, sigma=(0, 0, 1, 1), mode="nearest")
    kinds["blurred"] = torch.from_numpy(blurred)
    return kinds


def load_others(kind, like, num_images):
    """{name: test images of another data set in [0, 1]}, or {}.

    They have the shape of `like`, the model's own test images.
    auto: cifar10 for a model of digits, else mnist.
    """
    if kind == "auto":
        kind = "cifar10" if like.dataset_type in ("mnist", "digits") else "mnist"
    if kind == "none":
        return {}
    _, channels, side, _ = like.pixels.shape
    own_folder = like.dataset_type == "folder"  # download nothing into it
    try:
        _, others = common.load_data(
            kind,
            "data" if own_folder else like.data_dir,
            image_channels=channels,
            image_size=side,
            allow_fallback=False,
            device="cpu",
        )
    except common.BadInput as error:
        common.warn(f"left out: {error}")
        return {}
    return {f"{kind} instead": others.pixels[:num_images] / 255}


# --------------------------------------------------------- scores


def reconstruction_error(output, x):
    """-log p(x|z) up to a constant, summed over the pixels of each image x (N, C, H, W): (N,).

    Grey, x in [0, 1]: each pixel is a coin, and output its
    logits; a grey pixel costs something even where it is
    matched. Colour, x in [-1, 1]: the squared error, which is
    -log p of a Gaussian of variance 1/2. output may be flat.
    """
    output = output.view_as(x)
    if x.shape[1] == 1:
        error = F.binary_cross_entropy_with_logits(output, x, reduction="none")
    else:
        error = F.mse_loss(output, x, reduction="none")
    return error.flatten(1).sum(1)


class AnomalyScorer:
    """The encoder and decoder of a weights file give each image six scores.

    A higher score is meant to mark a more unusual image. The
    reconstruction is from z = mu, so that there is no noise in
    its error. The feature distance is 1 - cosine between vectors
    of the encoder's last hidden layer, a mean over the ten
    nearest training images. The vectors' lengths do not count,
    since they grow with the ink, and distances with them: images
    with little ink would all be close to one another. An
    autoencoder, which has no KL, gives four scores.

    A score of your own is a line in `score`; what it needs of the
    training images is kept in __init__. Threshold and table
    follow by themselves; the pictures show the reconstruction
    error only.
    """

    @torch.inference_mode()
    def __init__(self, weights_path, data_dir, device, num_train, elbo_samples):
        self.device, self.elbo_samples = device, elbo_samples
        weights = common.load_weights(weights_path, None, "encoder")
        encoder, decoder = common.script_of(weights).load_model(weights_path)
        self.weights = weights
        self.encoder = encoder.to(device)
        self.decoder = decoder.to(device)
        self.left_out = weights["dataset_kwargs"].get("exclude_class", -1)
        train, _ = common.load_again(weights, data_dir, device, exclude_class=self.left_out)
        self.train = train
        self.black = -1 if train.normalize else 0  # the networks' value for black; white is 1
        count = min(num_train, len(train))
        index = torch.linspace(0, len(train) - 1, count, device=device).round().long()
        self.train_pixels = train.pixels[index].flatten(1) / 255  # (count, C H W)
        codes, features = [], []
        for part in index.split(500):
            images, _ = train.batch(part)
            mu, _ = self.encoder(images)
            codes.append(mu)
            features.append(self.features(images))
        self.train_codes = torch.cat(codes)  # (count, D)
        self.train_features = torch.cat(features)  # (count, F)

    def to_networks(self, images):
        """images in [0, 1] -> in the range that the networks were trained on, on the device."""
        return images.to(self.device) * (1 - self.black) + self.black

    def features(self, x):
        """x (N, C, H, W), as the networks take it -> (N, F), the last hidden layer.

        It is what encoder.model gives; mu and logvar are made of it.
        Each vector is brought to length 1.
        """
        if isinstance(self.encoder.model[0], nn.Linear):  # it takes flat images
            x = x.flatten(1)
        return F.normalize(self.encoder.model(x))

    def feature_distance(self, x):
        """x (N, C, H, W) -> (N,): the mean of 1 - cosine over the ten nearest."""
        cosines = self.features(x) @ self.train_features.T  # (N, count)
        count = min(NEIGHBOURS, len(self.train_features))
        return 1 - cosines.topk(count).values.mean(1)

    @torch.inference_mode()
    def rebuild(self, images):
        """images (N, C, H, W) in [0, 1] -> their reconstructions, in [0, 1] too."""
        mu, _ = self.encoder(self.to_networks(images))
        # `sample` draws nothing at random: it makes pixels of the decoder's output
        rebuilt = self.decoder.sample(mu).cpu().view_as(images)
        return (rebuilt - self.black) / (1 - self.black)

    def score(self, x):
        """x (N, C, H, W), as the networks take it -> {score: (N,)}."""
        mu, logvar = self.encoder(x)
        scores = {"reconstruction": reconstruction_error(self.decoder(mu), x)}
        if logvar is not None:  # an autoencoder has no KL
            kl = 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(1)
            total = torch.zeros_like(kl)
            for _ in range(self.elbo_samples):
                z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
                total += reconstruction_error(self.decoder(z), x)
            scores["negative ELBO"] = total / self.elbo_samples + kl
            scores["KL"] = kl
        pixels = (x - self.black) / (1 - self.black)
        code_distances = torch.cdist(mu, self.train_codes)  # (N, count)
        pixel_distances = torch.cdist(pixels.flatten(1), self.train_pixels)
        scores["latent distance"] = code_distances.amin(1)
        scores["feature distance"] = self.feature_distance(x)
        scores["pixel distance"] = pixel_distances.amin(1)
        return scores

    @torch.inference_mode()
    def __call__(self, images):
        """images (N, C, H, W) in [0, 1] -> {score: (N,) numpy}."""
        parts = [self.score(self.to_networks(part)) for part in images.split(500)]
        joined = {}
        for name in parts[0]:
            scores = torch.cat([part[name] for part in parts])
            # in this order, since Apple's GPUs have no float64
            joined[name] = scores.cpu().double().numpy()
        return joined


@dataclass
class Group:
    """Images that are judged together: the clean ones, or one kind of anomaly."""

    name: str
    images: torch.Tensor  # (N, C, H, W) in [0, 1]
    scores: dict  # {score: (N,) numpy}

    def median_error(self):
        return np.median(self.scores["reconstruction"])


# ------------------------------------------------------- judgment


def measure(clean, anomalous, threshold):
    """How well scores tell clean (N,) from anomalous (M,): {measure: value}.

    AUROC is the probability that an anomaly scores higher
    than a clean image, where a tie counts half. AUPRC is
    average precision: the score of each anomaly is taken as a
    threshold in turn. Its precision is the share of anomalies
    among all images that score at least as high, and the mean
    of these precisions is taken. Guessing gets the share of
    anomalies among the images. The last two measures are
    the shares of clean and of anomalous images that score
    above the given threshold.
    """
    clean, anomalous = np.sort(clean), np.sort(anomalous)
    # for each anomaly: how many clean images score lower, and
    # how many not higher; the mean of both counts a tie half
    lower = np.searchsorted(clean, anomalous, "left")
    not_higher = np.searchsorted(clean, anomalous, "right")
    # how many score at least as high
    alarms = len(clean) - lower
    hits = len(anomalous) - np.searchsorted(anomalous, anomalous, "left")
    return {
        "AUROC": (lower + not_higher).mean() / (2 * len(clean)),
        "AUPRC": (hits / (hits + alarms)).mean(),
        "false positives": (clean > threshold).mean(),
        "true positives": (anomalous > threshold).mean(),
    }


def judge(clean, anomalous, threshold, resamples, random):
    """The measures and their 95 % intervals: {"AUROC": value, "AUROC low": ..., ...}.

    The intervals are by the bootstrap: a resample draws as many
    scores as there are, with replacement, from the clean ones and
    from the anomalous ones. An interval holds the middle 95 % of
    what is measured on the resamples. The model and the threshold
    stay as they are.
    """
    resampled = []
    for _ in range(resamples):
        some_clean = random.choice(clean, len(clean))
        some_anomalous = random.choice(anomalous, len(anomalous))
        resampled.append(measure(some_clean, some_anomalous, threshold))
    result = {}
    for name, value in measure(clean, anomalous, threshold).items():
        column = [row[name] for row in resampled]
        low, high = np.quantile(column, [0.025, 0.975])
        result[name] = value
        result[f"{name} low"] = low
        result[f"{name} high"] = high
    return result


# ------------------------------------------------------- pictures


def save_histograms(clean, groups, threshold, title, folder):
    """A panel for each kind of anomaly: its reconstruction errors and those of clean images."""
    across = min(4, len(groups))
    down = math.ceil(len(groups) / across)
    figure = common.new_figure(3.3 * across, 2.3 * down + 0.6)
    normal = clean.scores["reconstruction"]
    for place, group in enumerate(groups, start=1):
        strange = group.scores["reconstruction"]
        end = np.quantile(np.concatenate([normal, strange]), 0.995)
        bins = np.linspace(min(normal.min(), strange.min()), end, 50)
        axes = figure.add_subplot(down, across, place)
        axes.hist(
            [normal.clip(max=end), strange.clip(max=end)],
            bins,
            density=True,
            alpha=0.6,
            histtype="stepfilled",
            color=["#3f90da", "#bd1f01"],
            label=["clean", "anomalous"],
        )
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label="threshold")
        result = measure(normal, strange, threshold)
        found = f"AUROC {result['AUROC']:.3f}, {result['true positives']:.0%} found"
        axes.set_title(f"{group.name}\n{found}", fontsize=9)
        axes.set_yticks([])
        if place == 1:
            axes.legend(fontsize=8)
    label = "reconstruction error of an image (the last bar holds all beyond)"
    figure.supxlabel(label, fontsize=9)
    figure.supylabel("density", fontsize=9)
    figure.suptitle(title, fontsize=10)
    common.write(folder / "reconstruction_error_distribution.png", figure)


def save_borderline(groups, scorer, threshold, folder):
    """Of each group the eight images just below the threshold, and the eight just above it."""
    from torchvision.utils import make_grid

    figure = common.new_figure(9, 4.5 * len(groups))
    place = 0
    for group in groups:
        errors = group.scores["reconstruction"]
        order = errors.argsort()
        split = (errors <= threshold).sum()
        sides = {"accepted": order[:split][-8:], "rejected": order[split:][:8]}
        for side, chosen in sides.items():
            place += 1
            axes = figure.add_subplot(2 * len(groups), 1, place)
            axes.axis("off")
            title = f"{group.name}: none is {side}"
            if len(chosen):
                images = group.images[chosen]
                both = torch.cat([images, scorer.rebuild(images)])  # (2 n, C, H, W)
                grid = make_grid(both, nrow=len(chosen), padding=1, pad_value=1)
                axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
                first, last = errors[chosen[0]], errors[chosen[-1]]
                title = f"{group.name}, {side}: errors {first:.1f} to {last:.1f}"
            axes.set_title(f"{title}, threshold {threshold:.1f}", fontsize=10)
    title = "just on either side of the threshold: images, and below them their reconstructions"
    figure.suptitle(title, fontsize=11)
    common.write(folder / "anomalies_at_threshold.png", figure)


# ------------------------------------------------------- together


def choose_images(scorer, other_data, num_images):
    """Test images in [0, 1]: (held out, to be judged, {kind of anomaly: images}).

    The clean ones are cut in three, so that no image sets the
    threshold on which it is judged, nor meets a distorted
    copy of itself. If a class was left out of training, it is
    the first kind of anomaly. To judge images of your own, add
    {name: images (N, C, H, W) in [0, 1]} to the dict returned.
    """
    # here with the class that was left out of training, if there is one
    train, test = common.load_again(scorer.weights, scorer.train.data_dir, "cpu")
    pixels = test.pixels / 255  # (N, C, H, W)
    left_out = scorer.left_out
    clean = pixels[test.labels != left_out]
    least = "30 are the least: ten each to set the threshold, to be judged, and to be distorted"
    common.require(len(clean) >= 30, f"{test.name} has {len(clean)} test images; {least}")
    held_out, judged, spoilt = clean[torch.randperm(len(clean))].tensor_split(3)
    unseen = {}
    if left_out >= 0:
        name = f"{test.class_names[left_out]}, never trained on"
        unseen[name] = pixels[test.labels == left_out]
        if len(unseen[name]) == 0:  # a rare class may have no test image
            unseen[name] = train.pixels[train.labels == left_out] / 255
    others = load_others(other_data, test, num_images)
    return held_out, judged, {**unseen, **others, **corrupt(spoilt[:num_images])}


def judge_all(clean, groups, thresholds, resamples, seed, source):
    """Print the AUROCs; returns the rows of the table, one for each kind of anomaly and score.

    clean: a Group; groups: one for each kind; thresholds: {score: threshold}.
    source: whose scores they are.
    """
    random = np.random.default_rng(seed)
    rows = []
    heading = f"{'AUROC (95 % interval)':28}"
    for score in thresholds:
        heading += f"{score:>24}"
    print(heading)
    for group in groups:
        line = f"{group.name:28}"
        for score, threshold in thresholds.items():
            normal, strange = clean.scores[score], group.scores[score]
            result = judge(normal, strange, threshold, resamples, random)
            row = {
                "anomaly": group.name,
                "score": score,
                "clean": len(clean.images),
                "anomalous": len(group.images),
                "threshold": threshold,
                **result,
                "model": source,
            }
            rows.append(row)
            interval = f"({result['AUROC low']:.3f} to {result['AUROC high']:.3f})"
            line += f"{result['AUROC']:>7.3f} {interval}"
        print(line)
    return rows


def detect(
    weights_path,
    output_dir,
    data_dir,
    *,
    other_data,
    num_images,
    num_train,
    elbo_samples,
    percentile,
    bootstrap,
    seed,
    device,
):
    """Write pictures and table; returns the rows of the table."""
    path = weights_path or common.newest_weights("encoder")
    device = common.choose_device(device)
    scorer = AnomalyScorer(path, data_dir, device, num_train, elbo_samples)
    common.seed_everything(seed)
    held_out, judged, anomalies = choose_images(scorer, other_data, num_images)
    thresholds = {}
    for score, values in scorer(held_out).items():
        thresholds[score] = np.quantile(values, percentile / 100)
    threshold = thresholds["reconstruction"]
    clean = Group("clean", judged, scorer(judged))
    groups = [Group(name, images, scorer(images)) for name, images in anomalies.items()]
    easy_first = sorted(groups, key=Group.median_error, reverse=True)
    shown = groups[0] if scorer.left_out >= 0 else easy_first[-1]  # left out, or the hardest

    weights, count = scorer.weights, len(held_out)
    source = f"{common.describe_source(weights, scorer.train)}, epoch {weights['epoch']}"
    title = f"{source}; threshold: the {percentile:g}th percentile of {count:,} clean test images"
    folder = Path(output_dir or Path(path).parent)
    print(f"{path}: {title}; written to {folder}/")
    save_histograms(clean, easy_first, threshold, title, folder)
    save_borderline([clean, shown], scorer, threshold, folder)
    rows = judge_all(clean, easy_first, thresholds, bootstrap, seed, source)
    common.write(folder / "anomaly_detection.csv", rows)
    return rows


def main(source_kwargs, detection_kwargs):
    """Judge with the given settings; returns the rows of the table."""
    check_settings(detection_kwargs)
    return detect(**source_kwargs, **detection_kwargs)


if __name__ == "__main__":
    common.run_script(main, source_kwargs, detection_kwargs)
