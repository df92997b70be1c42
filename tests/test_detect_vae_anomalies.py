import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import cut_off_network, dicts_of, read_png, run_here
from PIL import Image
from scipy import stats
from torch.nn import functional as F

import common
import detect_vae_anomalies as detect
import main_ae
import main_gan
import main_vae

FILES = {
    "reconstruction_error_distribution.png",
    "anomalies_at_threshold.png",
    "anomaly_detection.csv",
}
DISTANCES = ["latent distance", "feature distance", "pixel distance"]
SIX = ["reconstruction", "negative ELBO", "KL", *DISTANCES]
FOUR = ["reconstruction", *DISTANCES]  # of an autoencoder
CORRUPTIONS = 12
MEASURES = ["AUROC", "AUPRC", "false positives", "true positives"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights of a VAE that has seen no 3."""
    folder = tmp_path_factory.mktemp("vae")
    changes = {
        "dataset_type": "digits",
        "batch_size": 500,
        "hidden_size": 32,
        "latent_dim": 4,
        "num_epochs": 1,
        "iwae_samples": 0,
        "exclude_class": 3,
        "precision": "float32",
        "device": "cpu",
        "num_threads": 1,
        "data_dir": str(folder),
        "output_dir": str(folder),
    }
    dicts = []
    for kwargs in dicts_of(main_vae):
        dicts.append({key: changes.get(key, value) for key, value in kwargs.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save_curves", lambda *_: None)
        main_vae.main(*dicts)
    return folder / "weights_epoch_1.pt"


@pytest.fixture
def vae(trained, tmp_path):
    """The same in a folder of its own."""
    (tmp_path / "vae").mkdir()
    return Path(shutil.copy(trained, tmp_path / "vae"))


@pytest.fixture
def no_pictures(monkeypatch):
    """No picture is drawn; the groups that the last one would have shown, for each run."""
    shown = []
    monkeypatch.setattr(common, "save_curves", lambda *_: None)
    monkeypatch.setattr(detect, "save_histograms", lambda *_: None)
    monkeypatch.setattr(detect, "save_borderline", lambda groups, *_: shown.append(groups))
    return shown


def run(path, out="", **overrides):
    """main with few images and resamples."""
    source, kwargs = dicts_of(detect)
    small = {"device": "cpu", "other_data": "none", "num_images": 40, "bootstrap": 20}
    kwargs.update({**small, "num_train": 200, "elbo_samples": 2, **overrides})
    return detect.main({**source, "weights_path": str(path), "output_dir": str(out)}, kwargs)


def read_table(folder):
    with open(folder / "anomaly_detection.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------- judgment


def by_definition(clean, anomalous):
    """AUROC from all pairs and from trapezoids, and average precision from all thresholds."""
    wins = anomalous[:, None] > clean
    ties = anomalous[:, None] == clean
    pairs = (wins + 0.5 * ties).mean()
    points, precision = [(0.0, 0.0)], 0.0
    for threshold in sorted({*clean, *anomalous}, reverse=True):
        hits, alarms = sum(anomalous >= threshold), sum(clean >= threshold)
        precision += (hits / len(anomalous) - points[-1][1]) * hits / (hits + alarms)
        points.append((alarms / len(clean), hits / len(anomalous)))
    across, up = np.array(points).T
    return pairs, np.trapezoid(up, across), precision


@pytest.mark.parametrize("levels", [2, 5, 30, None])  # of scores: many ties, few, none
def test_measures_equal_their_definitions(levels):
    random = np.random.default_rng(0)
    clean, anomalous = random.normal(0, 1, 83), random.normal(0.7, 1.5, 57)
    if levels:
        clean, anomalous = (np.floor((part + 4) * levels / 8) for part in (clean, anomalous))
    threshold = np.quantile(clean, 0.9)
    result = detect.measure(clean, anomalous, threshold)
    pairs, trapezoids, precision = by_definition(clean, anomalous)
    statistic = stats.mannwhitneyu(anomalous, clean).statistic / (83 * 57)
    for area in (pairs, trapezoids, statistic):
        assert result["AUROC"] == pytest.approx(area, abs=1e-12)
    assert result["AUPRC"] == pytest.approx(precision, abs=1e-12)
    assert result["false positives"] == (clean > threshold).mean() < 0.15
    assert result["true positives"] == (anomalous > threshold).mean()


@pytest.mark.parametrize(
    "clean, anomalous, wanted",
    [
        ([0, 1, 2, 3, 4], [10, 11, 12, 13], [1, 1, 0, 1]),
        ([10, 11, 12, 13], [0, 1], [0, (1 / 5 + 2 / 6) / 2, 1, 0]),
        ([1, 1, 1, 1, 1], [1, 1, 1, 1], [0.5, 4 / 9, 0, 0]),
        # the 5 beats both, the other 2 beats one and ties with one
        ([1, 2], [2, 5], [(2 + 1.5) / 4, (1 + 2 / 3) / 2, 0, 0.5]),
        ([7], [7, 7, 8], [2 / 3, (1 + 3 / 4 + 3 / 4) / 3, 1, 1]),
    ],
)
def test_measures_by_hand(clean, anomalous, wanted):
    result = detect.measure(np.array(clean), np.array(anomalous), 4.5)
    assert list(result) == MEASURES
    assert list(result.values()) == pytest.approx(wanted, abs=1e-15)


def test_intervals_are_those_of_scipy_and_of_the_binomial():
    random = np.random.default_rng(1)
    clean, anomalous = np.round(random.normal(0, 1, 80), 1), np.round(random.normal(1, 1, 40), 1)

    def judge(seed):
        return detect.judge(clean, anomalous, 1.0, 1500, np.random.default_rng(seed))

    result = judge(0)
    assert result == judge(0) != judge(1)
    assert set(result) == {f"{name}{end}" for name in MEASURES for end in ("", " low", " high")}

    def auroc(clean, anomalous):
        return stats.mannwhitneyu(anomalous, clean).statistic / (80 * 40)

    def average_precision(clean, anomalous):
        return by_definition(clean, anomalous)[2]

    for name, statistic, resamples in (("AUROC", auroc, 999), ("AUPRC", average_precision, 200)):
        samples, method = (clean, anomalous), "percentile"
        wanted = stats.bootstrap(samples, statistic, n_resamples=resamples, method=method)
        low, high = result[f"{name} low"], result[f"{name} high"]
        assert low < result[name] < high
        assert [low, high] == pytest.approx(wanted.confidence_interval, abs=0.25 * (high - low))
    for name, part in (("false positives", clean), ("true positives", anomalous)):
        width = result[f"{name} high"] - result[f"{name} low"]
        value = result[name]
        deviation = (value * (1 - value) / len(part)) ** 0.5
        assert width == pytest.approx(2 * 1.96 * deviation, rel=0.2)


def test_intervals_hold_the_truth_nineteen_times_in_twenty():
    """Of two normal distributions a distance d apart, the AUROC is Phi(d / sqrt(2))."""
    random = np.random.default_rng(0)
    truth = stats.norm.cdf(1 / 2**0.5)
    held = 0
    for _ in range(100):
        clean, anomalous = random.normal(0, 1, 100), random.normal(1, 1, 100)
        result = detect.judge(clean, anomalous, 1.0, 100, random)
        held += result["AUROC low"] < truth < result["AUROC high"]
    assert 88 <= held <= 99  # 95 wanted; three standard deviations are 7


# ---------------------------------------------------------------------- anomalies


@pytest.mark.parametrize("channels, side", [(1, 28), (3, 16)])
def test_anomalies_are_what_they_are_called(channels, side):
    x = 0.25 + 0.5 * torch.rand(40, channels, side, side)
    before = x.clone()
    kinds = detect.corrupt(x)
    assert len(kinds) == CORRUPTIONS and x.equal(before)
    for images in kinds.values():
        assert images.shape == x.shape and images.dtype == x.dtype
        assert images.min() >= 0 and images.max() <= 1
    for sigma in (0.05, 0.1):
        change = kinds[f"Gaussian noise {sigma:g}"] - x
        assert change.std().item() == pytest.approx(sigma, rel=0.03) and abs(change.mean()) < 0.003
    for share in (0.2, 0.05, 0.01):
        spoilt = kinds[f"salt and pepper {share:.0%}"]
        hit = (spoilt != x).any(1)
        values = spoilt.transpose(0, 1)[:, hit]
        assert hit.float().mean().item() == pytest.approx(share, rel=0.2)
        assert ((values == 0) | (values == 1)).all() and (
            values == values[:1]
        ).all()  # whole pixels
        assert values.mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.allclose(kinds["inverted"] + x, torch.ones_like(x))
    assert kinds["rotated by 90 degrees"].equal(torch.rot90(x, 1, (2, 3)))
    assert kinds["blurred"].std() < 0.6 * x.std()
    assert abs(kinds["blurred"].mean() - x.mean()) < 0.01


def test_a_black_square_is_one():
    x = 0.25 + 0.5 * torch.rand(200, 1, 28, 28)
    spoilt = detect.corrupt(x)["a square blacked out"]
    black = (spoilt == 0)[:, 0]
    assert (black.flatten(1).sum(1) == 9 * 9).all()
    tops, lefts = set(), set()
    for image in black:
        rows, columns = image.any(1).nonzero(), image.any(0).nonzero()
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == 8
        tops.add(rows[0].item())
        lefts.add(columns[0].item())
    # a margin of 3: every place from 3 on to 28 - 9 - 3
    assert tops == lefts == set(range(3, 17))
    assert spoilt[~black[:, None]].equal(x[~black[:, None]])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_point_is_turned_and_blurred(channels):
    point = torch.zeros(2, channels, 33, 33)
    point[1, 0, 16, 26] = 1  # the first image stays black, and so do other channels
    kinds = detect.corrupt(point)
    along = torch.arange(33) - 16.0
    ys, xs = torch.meshgrid(along, along, indexing="ij")
    for kind in ("blurred", "rotated by 30 degrees"):
        spoilt = kinds[kind]
        assert spoilt[0].abs().max() == 0 and spoilt[1, 1:].abs().sum() == 0
    blurred = kinds["blurred"][1, 0]
    bell = torch.exp(-0.5 * ((xs - 10).square() + ys.square())) / (2 * torch.pi)
    assert torch.allclose(blurred, bell, atol=5e-4)
    # 10 to the right of the middle, turned by 30 degrees, is 8.7 to the right and 5 up
    turned = kinds["rotated by 30 degrees"][1, 0]
    assert (turned * xs).sum() / turned.sum() == pytest.approx(8.66, abs=0.3)
    assert (turned * ys).sum() / turned.sum() == pytest.approx(-5, abs=0.3)
    ones = detect.corrupt(torch.ones(1, channels, 33, 33))
    assert ones["rotated by 30 degrees"].min() > 0.999  # no black corners
    assert ones["blurred"].min() > 0.999


# ------------------------------------------------------------------------- scores


def open_scorer(path, num_train=70, elbo_samples=3):
    return detect.AnomalyScorer(path, "", torch.device("cpu"), num_train, elbo_samples)


@torch.no_grad()
def test_scores_of_single_images_equal_the_losses_of_training(vae, monkeypatch):
    encoder, decoder = main_vae.load_model(vae)
    train, test = common.load_data("digits", "", image_channels=1, device="cpu")
    seen = train.pixels[train.labels != 3].flatten(1) / 255
    some = torch.linspace(0, len(seen) - 1, 70).round().long()
    seen = seen[some]
    codes, _ = encoder(seen)
    features = encoder.model(seen)
    images = test.pixels[:9] / 255
    scorer = open_scorer(vae)
    monkeypatch.setattr(torch, "randn_like", lambda mu: torch.full_like(mu, 0.5))
    scores = scorer(images)
    assert list(scores) == SIX
    for i, x in enumerate(images.flatten(1)[:, None]):
        mu, logvar = encoder(x)
        kl = main_vae.kl_divergence(mu, logvar)
        noisy = decoder(mu + (0.5 * logvar).exp() / 2)
        cosines = F.cosine_similarity(features, encoder.model(x))
        wanted = {
            "reconstruction": main_vae.reconstruction_loss(decoder(mu), x),
            "negative ELBO": main_vae.reconstruction_loss(noisy, x) + kl,
            "KL": kl,
            "latent distance": (codes - mu).norm(dim=1).min(),
            "feature distance": (1 - cosines).sort().values[:10].mean(),
            "pixel distance": (seen - x).norm(dim=1).min(),
        }
        for name, value in wanted.items():
            assert scores[name][i] == pytest.approx(value.item(), rel=1e-4, abs=1e-3), name
    rebuilt = decoder(encoder(images)[0]).sigmoid().view_as(images)
    assert torch.allclose(scorer.rebuild(images), rebuilt, atol=1e-6)


@torch.inference_mode()
def test_three_training_images_are_enough_and_ink_does_not_count_in_features(vae):
    scorer = open_scorer(vae, num_train=3)
    x = scorer.train_pixels.view(3, 1, 28, 28)
    features = scorer.features(x)
    assert torch.allclose(features.norm(dim=1), torch.ones(3))
    mean = (features @ features.T).mean(1)
    assert torch.allclose(scorer.feature_distance(x), 1 - mean, atol=1e-6)
    # without biases half the ink gives half of every feature, and the direction stays
    for layer in scorer.encoder.model[::2]:
        layer.bias.data.zero_()
    assert torch.allclose(scorer.features(x / 2), scorer.features(x), atol=1e-6)


def test_the_elbo_is_a_mean_over_samples_and_images_are_scored_in_parts(vae):
    _, test = common.load_data("digits", "", image_channels=1, device="cpu")
    images = test.pixels[:1].expand(1200, -1, -1, -1) / 255
    spreads = []
    for elbo_samples in (1, 16):
        scores = open_scorer(vae, elbo_samples=elbo_samples)(images)
        assert all(part.shape == (1200,) for part in scores.values())
        assert np.ptp(scores["reconstruction"]) < 1e-3  # no noise in it
        spreads.append(scores["negative ELBO"].std())
    assert spreads[0] / spreads[1] == pytest.approx(4, rel=0.15)


def test_colour_is_scored_in_the_range_of_the_networks(tiny, no_pictures):
    settings = {"num_epochs": 1, "batch_size": 4500, "model_type": "ae", "image_size": 8}
    trainer = main_ae.main(*tiny(main_ae, **settings, feature_maps=4, latent_dim=3))
    path = trainer.folder / "weights_epoch_1.pt"
    encoder, decoder = main_ae.load_model(path)
    images = trainer.train.pixels[:5] / 255
    x, _ = trainer.train.batch(torch.arange(5))  # in [-1, 1]
    scorer = open_scorer(path, num_train=5000)
    scores = scorer(images)
    assert list(scores) == FOUR
    output = decoder(encoder(x)[0]).detach()
    every, _ = trainer.train.batch(torch.arange(len(trainer.train)))
    features = encoder.model(every).detach()
    for i in range(5):
        cosines = F.cosine_similarity(features, features[i : i + 1])
        nearest = (1 - cosines).sort().values[:10].mean().item()
        assert scores["feature distance"][i] == pytest.approx(nearest, rel=1e-3, abs=1e-6)
        wanted = F.mse_loss(output[i], x[i], reduction="sum").item()
        assert scores["reconstruction"][i] == pytest.approx(wanted, rel=1e-5)
    assert scores["pixel distance"].max() < 0.02  # they are among the training images
    assert torch.allclose(scorer.rebuild(images), output.clamp(-1, 1) / 2 + 0.5, atol=1e-6)
    rows = run(path)
    assert len(rows) == CORRUPTIONS * 4


# ----------------------------------------------------------------- the whole script


def test_a_left_out_class_is_judged_and_nothing_is_judged_by_itself(vae, monkeypatch, no_pictures):
    seen = []
    score = detect.AnomalyScorer.__call__

    def look(scorer, images):
        seen.append(images)
        return score(scorer, images)

    monkeypatch.setattr(detect.AnomalyScorer, "__call__", look)
    rows = run(vae)
    sets = []
    for images in seen:
        bytes_of = {(255 * image).round().byte().numpy().tobytes() for image in images}
        sets.append(bytes_of)
    held_out, judged, left_out = sets[:3]
    clean, shown = no_pictures[0]
    assert clean.images.equal(seen[1]) and shown.images.equal(seen[2])
    assert len(held_out) == len(judged) == 150 and not held_out & judged
    inverted = {(255 - 255 * image).round().byte().numpy().tobytes() for image in seen[10]}
    assert len(inverted) == 40 and not inverted & (held_out | judged)
    _, test = common.load_data("digits", "", image_channels=1, device="cpu")
    of_three = test.pixels[test.labels == 3]
    assert left_out == {image.numpy().tobytes() for image in of_three}
    others = test.pixels[test.labels != 3]
    assert not held_out <= {image.numpy().tobytes() for image in others[:300]}  # shuffled
    assert held_out | judged | inverted <= {image.numpy().tobytes() for image in others}

    kinds = list(dict.fromkeys(row["anomaly"] for row in rows))
    assert len(kinds) == CORRUPTIONS + 1 and len(rows) == len(kinds) * 6
    assert [row["score"] for row in rows] == SIX * len(kinds)
    scorer = open_scorer(vae, 200, 2)
    clean, strange = scorer(seen[1])["reconstruction"], scorer(seen[2])["reconstruction"]
    row = next(row for row in rows if row["anomaly"] == "3, never trained on")
    assert (row["clean"], row["anomalous"]) == (150, 50)
    threshold = np.percentile(scorer(seen[0])["reconstruction"], 95)
    assert row["threshold"] == pytest.approx(threshold, rel=1e-6)
    for name, value in detect.measure(clean, strange, threshold).items():
        assert row[name] == pytest.approx(value, abs=1e-9)
        assert row[f"{name} low"] <= row[name] <= row[f"{name} high"]
    inverted = [row["AUROC"] for row in rows if row["anomaly"] == "inverted"]
    assert inverted[0] > 0.99


def test_a_rare_class_without_a_test_image_is_judged_by_its_other_images(
    tiny, tmp_path, no_pictures
):
    """Of 340 images of class "good" and 4 of "rare" a tenth is held out, none of them rare."""
    folder = tmp_path / "mine"
    for name, count, level in (("good", 340, 0), ("rare", 4, 255)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = Image.new("L", (8, 8), level)
            image.putpixel((number % 8, number // 8 % 8), 128)
            image.save(folder / name / f"{number}.png")
    settings = dict(dataset_type="folder", data_dir=str(folder), image_size=64, exclude_class=1)
    small = dict(num_epochs=1, hidden_size=4, iwae_samples=0, batch_size=300)
    trainer = main_vae.main(*tiny(main_vae, **settings, **small))
    _, test = common.load_data("folder", str(folder), image_channels=1, image_size=8, device="cpu")
    assert 1 not in test.labels and len(trainer.train) == 306
    rows = run(tmp_path / "out" / "weights_epoch_1.pt")
    row = next(row for row in rows if row["anomaly"] == "rare, never trained on")
    assert row["anomalous"] == 4 and row["AUROC"] == 1


def test_the_table_says_what_main_returns_and_a_second_run_the_same(vae, tmp_path, capsys):
    rows = run(vae)
    shown = capsys.readouterr().out
    table = read_table(vae.parent)
    columns = ["anomaly", "score", "clean", "anomalous", "threshold"]
    for name in MEASURES:
        columns += [name, f"{name} low", f"{name} high"]
    assert list(table[0]) == [*columns, "model"] and len(table) == len(rows)
    assert {row["model"] for row in table} == {"main_vae on digits without 3, epoch 1"}
    for written, row in zip(table, rows):
        assert (written["anomaly"], written["score"]) == (row["anomaly"], row["score"])
        for name in columns[2:]:
            assert float(written[name]) == row[name], name
    lines = shown.splitlines()
    assert len({len(line) for line in lines[1:]}) == 1  # columns stand below their names
    assert lines[1].split("  ")[0] == "AUROC (95 % interval)" and lines[1].endswith(SIX[-1])
    assert lines[0].startswith(f"{vae}: main_vae on digits without 3, epoch 1; threshold: the 95th")
    for number, line in enumerate(lines[2:]):
        of_one = rows[6 * number : 6 * number + 6]
        assert line.startswith(of_one[0]["anomaly"])
        words = line[28:].replace("(", "").replace(")", "").replace("to", "").split()
        wanted = []
        for row in of_one:
            wanted += [row["AUROC"], row["AUROC low"], row["AUROC high"]]
        assert [float(word) for word in words] == pytest.approx(wanted, abs=6e-4)
    assert len(lines) == 2 + CORRUPTIONS + 1
    again = tmp_path / "again"
    run(vae, again)
    assert {path.name for path in again.iterdir()} == FILES
    for name in FILES:
        assert (again / name).read_bytes() == (vae.parent / name).read_bytes()


@pytest.fixture
def figures(monkeypatch):
    """The figures that were written."""
    seen = []
    write = common.write

    def look(path, figure):
        seen.append(figure)
        write(path, figure)

    monkeypatch.setattr(common, "write", look)
    return seen


def test_pictures_show_both_sides_of_the_threshold(trained, tmp_path, figures):
    scorer = open_scorer(trained)
    _, test = common.load_data("digits", "", image_channels=1, device="cpu")
    images = test.pixels[:24] / 255
    errors = scorer(images)["reconstruction"]
    order = errors.argsort()
    middle = errors[order[11]]  # twelve are below or at it, twelve above
    clean = detect.Group("clean", images, {"reconstruction": errors})
    far = detect.Group("far", images, {"reconstruction": errors + 1e6})
    detect.save_borderline([clean, far], scorer, middle, tmp_path)
    rebuilt = scorer.rebuild(images)
    wanted = {
        "clean, accepted: errors ": order[4:12],
        "clean, rejected: errors ": order[12:20],
        "far: none is accepted": [],
        "far, rejected: errors ": order[:8],
    }
    assert len(figures[0].axes) == 4
    for axes, (title, chosen) in zip(figures[0].axes, wanted.items()):
        assert axes.get_title().startswith(title)
        assert axes.get_title().endswith(f"threshold {middle:.1f}")
        assert len(axes.get_images()) == (len(chosen) > 0)
        for place, number in enumerate(chosen):
            shown = axes.get_images()[0].get_array()  # (59, 233, 3), with lines of one pixel
            left = 1 + 29 * place
            for top, image in ((1, images[number, 0]), (30, rebuilt[number, 0])):
                tile = shown[top : top + 28, left : left + 28, 0]
                assert np.abs(tile - image.numpy()).max() < 1e-6
    first, last = errors[order[4]], errors[order[11]]
    assert f"errors {first:.1f} to {last:.1f}," in figures[0].axes[0].get_title()
    picture = read_png(tmp_path / "anomalies_at_threshold.png")
    assert picture.min() == 0 and picture.max() == 255


def test_histograms_show_clean_and_anomalous_in_every_panel(tmp_path, figures):
    x = torch.zeros(200, 1, 2, 2)
    clean = detect.Group("clean", x, {"reconstruction": np.linspace(0, 1, 200)})
    groups = []
    for shift in (5, 0.5, 0.0, 1, 2):
        scores = {"reconstruction": np.linspace(shift, 1 + shift, 200)}
        groups.append(detect.Group(f"shifted by {shift}", x, scores))
    detect.save_histograms(clean, groups, 0.9, "a title", tmp_path)
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == [
        "shifted by 5\nAUROC 1.000, 100% found",
        "shifted by 0.5\nAUROC 0.874, 60% found",
        "shifted by 0.0\nAUROC 0.500, 10% found",
        "shifted by 1\nAUROC 1.000, 100% found",
        "shifted by 2\nAUROC 1.000, 100% found",
    ]
    for axes, group in zip(panels, groups):
        for outline in axes.patches:
            part = {"clean": clean, "anomalous": group}[outline.get_label()]
            values = part.scores["reconstruction"]
            across, up = outline.get_xy().T
            assert abs(np.trapezoid(up, across)) == pytest.approx(1)
            # the last bar holds all beyond
            *_, start, end = np.unique(across)
            height = np.mean(values >= start) / (end - start)
            assert up[across == end].max() == pytest.approx(height)
        assert axes.get_lines()[0].get_xdata() == [0.9, 0.9]
    picture = read_png(tmp_path / "reconstruction_error_distribution.png").astype(int)
    blue, red = picture[..., 2] - picture[..., 0] > 60, picture[..., 0] - picture[..., 2] > 60
    assert blue.sum() > 2000 and red.sum() > 2000


def test_the_class_that_was_left_out_is_what_is_shown_else_the_hardest(vae, no_pictures):
    weights = torch.load(vae, weights_only=True)
    for label in (0, -1):
        weights["dataset_kwargs"]["exclude_class"] = label
        torch.save(weights, vae)
        rows = run(vae)
        kinds = {row["anomaly"] for row in rows}
        assert ("0, never trained on" in kinds) == (label == 0)
    names = [[group.name for group in groups] for groups in no_pictures]
    assert names == [["clean", "0, never trained on"], ["clean", rows[-1]["anomaly"]]]
    errors = [row["AUROC"] for row in rows if row["score"] == "reconstruction"]
    assert errors[0] > 0.99 and errors[-1] < 0.75  # the easy kinds first


def test_another_data_set_is_brought_into_shape_or_left_out(vae, capsys, monkeypatch, no_pictures):
    rows = run(vae, other_data="digits")
    of_digits = [row for row in rows if row["anomaly"] == "digits instead"]
    row = of_digits[SIX.index("pixel distance")]
    assert row["AUROC"] < 0.9 and row["anomalous"] == 40
    assert no_pictures[0][1].name == "3, never trained on"
    cut_off_network(monkeypatch)
    rows = run(vae, other_data="auto")
    told = capsys.readouterr().err
    assert "left out: cifar10 could be neither" in told and told.count("\n") == 1
    assert len(rows) == 6 * (CORRUPTIONS + 1)


def test_no_other_data_set_is_put_among_ones_own_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cut_off_network(monkeypatch)
    pixels, labels = torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.zeros(2).long()
    train = common.Images(pixels, labels, ["a"], "folder mine", "folder", "mine")
    assert detect.load_others("auto", train, 10) == {}
    assert "left out: mnist could be neither read from data/" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_what_cannot_be_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, tiny, no_pictures):
    monkeypatch.chdir(tmp_path)
    main_gan.main(*tiny(main_gan, num_epochs=1, batch_size=4500))
    (tmp_path / "few").mkdir()
    for i in range(20):
        Image.new("L", (28, 28), i).save(tmp_path / "few" / f"{i}.png")
    settings = {"num_epochs": 1, "batch_size": 18, "hidden_size": 4, "iwae_samples": 0}
    folder = {"dataset_type": "folder", "data_dir": "few", "output_dir": "of_few"}
    main_vae.main(*tiny(main_vae, **settings, **folder))
    few = ["--weights_path", "of_few/weights_epoch_1.pt"]
    capsys.readouterr()
    wrong = [
        (few, "has 2 test images; 30 are the least"),
        ([*few, "--data_dir", "nowhere"], "there is no folder nowhere"),
        (["--weights_path", "out/weights_epoch_1.pt"], "holds no encoder"),
        (["--weights_path", "no.pt"], "there is no file no.pt"),
        (["--percentile", "100"], "percentile must be above 0 and below 100"),
        (["--percentile", "0"], "percentile must be above 0 and below 100"),
        (["--bootstrap", "0"], "bootstrap must be at least 1"),
        (["--num_images", "0"], "num_images must be at least 1"),
        (["--num_train", "-1"], "num_train must be at least 1"),
        (["--elbo_samples", "0"], "elbo_samples must be at least 1"),
        (["--other_data", "sprites"], "other_data must be one of auto, mnist"),
        ([*few, "--seed", "-1"], "seed must be between"),
    ]
    for options, words in wrong:
        assert run_here(detect, *options) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1, told
        assert told.startswith("detect_vae_anomalies.py: ")
    assert not list(tmp_path.glob("**/anomal*"))
