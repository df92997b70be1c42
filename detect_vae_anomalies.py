"""Can a VAE tell what it was not trained on? Scores of single images, judged on anomalies from easy to hard.

paper:  An and Cho 2015, Variational Autoencoder based Anomaly Detection using Reconstruction Probability, Special
        Lecture on IE, Seoul National University (that probability is E log p(x|z); the negative ELBO adds the KL to it)
        Davis and Goadrich 2006, The Relationship Between Precision-Recall and ROC Curves, ICML (no straight PR lines)
run:    python detect_vae_anomalies.py              (the newest weights with an encoder; any key below is an option)
        python main_vae.py --exclude_class 4 --output_dir mnist_VAE_without_4       (then also judged on that digit)
writes: beside the weights: reconstruction_error_distribution.png, anomalies_at_threshold.png, anomaly_detection.csv
expect: MNIST, one digit left out, mean AUROC of the ten, 10 epochs: 32 latents: reconstruction 0.706, latent distance
        0.923; 2 latents: 0.773 and 0.457; pixel distance, without a network: 0.852; a minute each of one AMD EPYC core
"""
import io
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

import common
import datasets

source_kwargs = {
    "weights_path": "",  # weights_epoch_{E}.pt of main_vae or main_ae; empty: the newest in a folder here
    "output_dir": "",  # everything is written there; empty: beside the weights
    "data_dir": "data",  # where the images lie that the encoder was trained on
}
detection_kwargs = {
    "other_data": "auto",  # auto | mnist | cifar10 | digits | none; as anomalies; auto: cifar10 for digits, else mnist
    "num_images": 1000,  # >= 1; anomalies of each kind; of a class left out of training all there are
    "num_train": 60000,  # >= 1; training images among which the nearest is looked for
    "elbo_samples": 8,  # >= 1; samples of z behind the negative ELBO
    "percentile": 95.0,  # in (0, 100); of clean images' scores: what lies above is called an anomaly
    "bootstrap": 1000,  # >= 1; resamples behind the intervals, which hold the middle 95 % of them
    "seed": 0,  # in [0, 4294967295]; of noise, splits and resamples
    "device": "auto",  # auto takes cuda, else mps, else cpu; or name one, such as cpu or cuda:1
}
SCORES = ["reconstruction", "negative ELBO", "KL", "latent distance", "pixel distance"]


def corrupted(x, random):
    """Images x (N, C, H, W) in [0, 1] -> {kind of anomaly: images like x}."""
    kinds, side, noise = {}, x.shape[-1], torch.randn(x.shape, generator=random)
    for sigma in (0.4, 0.2, 0.1, 0.05):
        kinds[f"Gaussian noise {sigma:g}"] = (x + sigma * noise).clamp(0, 1)
    place, salt = torch.rand(2, len(x), 1, *x.shape[2:], generator=random)
    for share in (0.2, 0.05, 0.01):
        kinds[f"salt and pepper {share:.0%}"] = torch.where(place < share, (salt < 0.5).float(), x)
    kinds["inverted"] = 1 - x
    kinds["rotated by 90 degrees"] = x.rot90(1, (2, 3))
    cosine, sine = torch.tensor(torch.pi / 6).cos(), torch.tensor(torch.pi / 6).sin()
    turn = torch.tensor([[cosine, -sine, 0], [sine, cosine, 0]]).expand(len(x), -1, -1)
    kinds["rotated by 30 degrees"] = F.grid_sample(x, F.affine_grid(turn, list(x.shape), align_corners=False),
                                                   padding_mode="border", align_corners=False)
    corner = torch.randint(side // 8, side - side // 3 - side // 8 + 1, (2, len(x), 1, 1), generator=random)
    along = torch.arange(side)
    down, across = ((along.view(shape) >= at) & (along.view(shape) < at + side // 3)
                    for shape, at in (((-1, 1), corner[0]), ((1, -1), corner[1])))
    kinds["a square blacked out"] = x.masked_fill((down & across)[:, None], 0)
    bell = torch.exp(-0.5 * torch.arange(-2.0, 3).square())
    bell = (bell / bell.sum()).expand(x.shape[1], 1, 1, -1)  # the same on every channel
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    kinds["blurred"] = F.conv2d(F.conv2d(padded, bell, groups=x.shape[1]), bell.mT, groups=x.shape[1])
    return kinds


def reconstruction_error(output, x):
    """-log p(x|z) up to a constant, summed over the pixels of each image: (N,).

    Grey, x in [0, 1]: cross-entropy of one coin a pixel, from logits. Colour, x in [-1, 1]: squared error.
    """
    if x.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(output, x, reduction="none").flatten(1).sum(1)
    return (output - x).square().flatten(1).sum(1)


def nearest_distance(points, others):
    """Euclidean distance from each of points (N, D) to the nearest of others (M, D): (N,)."""
    return torch.cat([torch.cdist(part, others).amin(1) for part in points.split(250)])


class Scorer:
    """The scores of single images: the higher, the stranger. Reconstruction is from z = mu: it has no noise in it."""

    @torch.inference_mode()
    def __init__(self, encoder, decoder, train, samples):
        self.encoder, self.decoder, self.samples = encoder, decoder, samples
        self.scale = (2, -1) if train.normalize else (1, 0)  # from [0, 1] to what the networks take
        self.pixels = train.pixels.flatten(1).float() / 255
        self.codes = torch.cat([encoder(train.batch(index)[0])[0]
                                for index in torch.arange(len(train), device=self.pixels.device).split(500)])

    @torch.inference_mode()
    def rebuild(self, images):
        """images (N, C, H, W) in [0, 1] -> their reconstructions from mu, likewise."""
        made = self.decoder.sample(self.encoder(images * self.scale[0] + self.scale[1])[0]).view_as(images)
        return (made - self.scale[1]) / self.scale[0]

    @torch.inference_mode()
    def __call__(self, images):
        """images (N, C, H, W) in [0, 1] -> {score: (N,) float64}; an autoencoder has no KL and no ELBO."""
        parts = [self.score(part.to(self.pixels.device)) for part in images.split(500)]
        return {name: torch.cat([part[name] for part in parts]).cpu().double() for name in parts[0]}

    def score(self, images):
        x = images * self.scale[0] + self.scale[1]
        mu, logvar = self.encoder(x)

        def error(z):
            return reconstruction_error(self.decoder(z).view_as(x), x)

        scores = {"reconstruction": error(mu)}
        if logvar is not None:
            scores["KL"] = 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(1)
            drawn = [error(mu + (0.5 * logvar).exp() * torch.randn_like(mu)) for _ in range(self.samples)]
            scores["negative ELBO"] = sum(drawn) / self.samples + scores["KL"]
        scores["latent distance"] = nearest_distance(mu, self.codes)  # to the nearest training image's mu
        scores["pixel distance"] = nearest_distance(images.flatten(1), self.pixels)  # to the nearest training image
        return scores


def areas(clean, anomalous):
    """AUROC and AUPRC from how often each score occurs, (..., U) both, in ascending order of the U scores.

    AUROC is the probability that an anomaly scores higher than a clean image, ties counting half. AUPRC is average
    precision: at each distinct score as threshold, precision times the recall that it adds, so ties are taken together.
    """
    below = clean.cumsum(-1) - clean
    totals = clean.sum(-1), anomalous.sum(-1)
    auroc = (anomalous * (below + 0.5 * clean)).sum(-1) / (totals[0] * totals[1])
    hits, alarms = (counts.flip(-1).cumsum(-1) for counts in (anomalous, clean))
    precision = hits / (hits + alarms).clamp(min=1)  # a resample may lack the highest scores
    return auroc, (anomalous.flip(-1) * precision).sum(-1) / totals[1]


def judge(clean, anomalous, threshold, resamples, seed):
    """{measure: (value, low, high)} of scores (N,) and (M,): AUROC, AUPRC, and rates of scores above the threshold.

    low and high bound the middle 95 % of `resamples` bootstrap samples, clean and anomalous drawn each by itself.
    """
    random = torch.Generator().manual_seed(seed)
    values, places = torch.cat([clean, anomalous]).double().unique(return_inverse=True)
    rows, above = [], (values > threshold).double()
    for size in [0, *[min(100, resamples - done) for done in range(0, resamples, 100)]]:  # 0: the sample itself
        counts = []
        for part in places.split([len(clean), len(anomalous)]):
            drawn = part[torch.randint(len(part), (size, len(part)), generator=random)] if size else part[None]
            ones = torch.ones(1, dtype=torch.float64).expand(drawn.shape)
            counts.append(torch.zeros(max(1, size), len(values), dtype=torch.float64).scatter_add_(1, drawn, ones))
        rates = [count @ above / count.sum(1) for count in counts]
        rows.append(torch.stack([*areas(*counts), *rates], dim=1))  # (resamples, 4)
    middle = torch.quantile(torch.cat(rows[1:]), torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    names = ["AUROC", "AUPRC", "false positives", "true positives"]
    return dict(zip(names, zip(rows[0][0].tolist(), *middle.tolist())))


def save_histograms(clean, anomalous, threshold, results, title, path):
    """clean (N,), anomalous {kind: (M,)}: a panel for each kind, with the reconstruction errors of both."""
    from matplotlib.figure import Figure

    columns = min(4, len(anomalous))
    rows = -(-len(anomalous) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.3 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (kind, errors) in zip(panels, anomalous.items()):
        both = torch.cat([clean, errors])
        bins = torch.linspace(both.min(), both.quantile(0.995), 50).numpy()
        for part, colour, name in ((clean, "#3f90da", "clean"), (errors, "#bd1f01", "anomalous")):
            panel.hist(part.clamp(max=bins[-1]).numpy(), bins, density=True, alpha=0.6, color=colour, label=name)
        panel.axvline(threshold, color="black", linestyle="--", linewidth=1, label="threshold")
        auroc, found = results[kind]["AUROC"][0], results[kind]["true positives"][0]
        panel.set_title(f"{kind}\nAUROC {auroc:.3f}, {found:.0%} found", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.set_yticks([])
    for panel in panels[len(anomalous):]:
        panel.axis("off")
    panels[0].legend(fontsize=8)
    figure.supxlabel("reconstruction error of an image (the last bar holds everything beyond)", fontsize=9)
    figure.supylabel("density", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(buffer := io.BytesIO(), dpi=100)
    common.write(path, buffer.getvalue())


def save_borderline(groups, scorer, threshold, path):
    """groups {name: (images, errors)}: of each the eight images just below the threshold and the eight just above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.25 * 2 * len(groups)), layout="constrained")
    panels = iter(figure.subplots(2 * len(groups), 1))
    for name, (images, errors) in groups.items():
        order = errors.argsort()
        split = int((errors <= threshold).sum())
        for side, chosen in (("accepted", order[max(0, split - 8):split]), ("rejected", order[split:split + 8])):
            panel = next(panels)
            panel.axis("off")
            if not len(chosen):
                panel.set_title(f"{name}: none is {side}", fontsize=10)
                continue
            x = images[chosen].to(scorer.pixels.device)
            pair = F.pad(torch.stack([x, scorer.rebuild(x)]).cpu(), (0, 1, 0, 1), value=1)  # (2, n, C, H, W)
            picture = pair.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (2 H, n W, C)
            panel.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            panel.set_title(f"{name}, {side}: errors {errors[chosen[0]]:.1f} to {errors[chosen[-1]]:.1f}, "
                            f"threshold {threshold:.1f}", fontsize=10)
    figure.suptitle("just on either side of the threshold: images, and below them their reconstructions", fontsize=11)
    figure.savefig(buffer := io.BytesIO(), dpi=90)
    common.write(path, buffer.getvalue())


def load_others(kind, trained_on, train, o, device):
    """{name: at most num_images test images of another data set, like those of `train`, in [0, 1]}, if it is there."""
    if kind == "auto":
        kind = "cifar10" if trained_on in ("mnist", "digits") else "mnist"
    if kind == "none":
        return {}
    side, channels = train.pixels.shape[2], train.pixels.shape[1]
    try:
        others = datasets.load_data(kind, o.data_dir, False, 1, False, side, channels, device)[1]
    except common.BadInput as error:
        common.say(f"left out: {error}")
        return {}
    return {f"{kind} instead": others.pixels[:o.num_images].cpu() / 255}


def main(source_kwargs, detection_kwargs):
    """Write pictures and table; returns {(kind of anomaly, score): {measure: (value, low, high)}}."""
    common.check(__file__, {**source_kwargs, **detection_kwargs})
    o = SimpleNamespace(**source_kwargs, **detection_kwargs)
    device = common.choose_device(o.device)
    path, weights, load = common.open_weights(o.weights_path, "load_model")
    encoder, decoder = (network.to(device) for network in load(path))
    train, test = datasets.load_again(weights, o.data_dir, device)
    common.seed_everything(o.seed)
    random, anomalies = torch.Generator().manual_seed(o.seed), {}
    pixels = test.pixels.cpu() / 255
    left_out = datasets.left_out(weights["data"])
    if left_out is not None:
        is_clean = test.labels.cpu() != left_out
        anomalies[f"{test.class_names[left_out]}, never trained on"] = pixels[~is_clean]
        train.leave_out(left_out)
        pixels = pixels[is_clean]
    if len(pixels) < 30:
        raise common.BadInput(f"{weights['data']} has {len(pixels)} test images; 30 are the least: ten each to set the "
                              "threshold, to judge it, and to be made anomalous")
    # three parts, so that no image sets the threshold on which it is judged, nor meets a distorted copy of itself
    held_out, judged, spoilt = pixels[torch.randperm(len(pixels), generator=random)].tensor_split(3)
    anomalies.update(load_others(o.other_data, weights["data"].split()[0], train, o, device))
    anomalies.update(corrupted(spoilt[:o.num_images], random))
    some = torch.linspace(0, len(train) - 1, min(o.num_train, len(train))).round().long().to(device)
    train.pixels, train.labels = train.pixels[some], train.labels[some]

    score = Scorer(encoder, decoder, train, o.elbo_samples)
    thresholds = {name: torch.quantile(values, o.percentile / 100) for name, values in score(held_out).items()}
    clean, strange = score(judged), {kind: score(images) for kind, images in anomalies.items()}
    results = {(kind, name): judge(clean[name], values, thresholds[name], o.bootstrap, o.seed)
               for kind, scores in strange.items() for name, values in scores.items()}

    names = [name for name in SCORES if name in thresholds]
    lines = [["anomaly", "score", "clean", "anomalous", "threshold"]]
    lines[0] += [f"{measure}{bound}" for measure in next(iter(results.values())) for bound in ("", " low", " high")]
    for (kind, name), result in results.items():
        lines.append([f'"{kind}"', name, len(judged), len(anomalies[kind]), f"{thresholds[name]:.6g}"])
        lines[-1] += [f"{value:.4f}" for values in result.values() for value in values]
    folder = Path(o.output_dir or Path(path).parent)
    common.write(folder / "anomaly_detection.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())
    title = (f"{weights['script']} on {weights['data']}, epoch {weights['epoch']}: {len(judged):,} clean test images; "
             f"threshold: the {o.percentile:g}th percentile of {len(held_out):,} others")
    best_first = sorted(anomalies, key=lambda kind: -results[kind, "reconstruction"]["AUROC"][0])
    save_histograms(clean["reconstruction"], {kind: strange[kind]["reconstruction"] for kind in best_first},
                    thresholds["reconstruction"], {kind: results[kind, "reconstruction"] for kind in best_first}, title,
                    folder / "reconstruction_error_distribution.png")
    shown = next(iter(anomalies)) if left_out is not None else best_first[-1]
    save_borderline({"clean": (judged, clean["reconstruction"]),
                     shown: (anomalies[shown], strange[shown]["reconstruction"])}, score,
                    thresholds["reconstruction"], folder / "anomalies_at_threshold.png")
    print(f"{path}: {title}; {len(train):,} training images for the distances")
    print(f"{'AUROC (95 % interval)':28}", *(f"{name:>22}" for name in names))
    for kind in best_first:
        cells = [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in
                 (results[kind, name]["AUROC"] for name in names)]
        print(f"{kind:28}", *(f"{cell:>22}" for cell in cells))
    print(f"{'clean, above the threshold':28}",
          *(f"{results[shown, name]['false positives'][0]:>22.3f}" for name in names))
    return results


if __name__ == "__main__":
    common.run(main, source_kwargs, detection_kwargs)
