import csv

import numpy as np
import pytest
import torch
from PIL import Image

import common
import datasets
import detect_vae_anomalies as detect
import main_ae
import main_gan
import main_vae

FILES = {"reconstruction_error_distribution.png", "anomalies_at_threshold.png", "anomaly_detection.csv"}


def run(path, out="", data_dir="nowhere", **overrides):
    kwargs = {**detect.detection_kwargs, "device": "cpu", "other_data": "none", "num_images": 40, "bootstrap": 20,
              "num_train": 200, "elbo_samples": 2, **overrides}
    return detect.main({"weights_path": str(path), "output_dir": str(out), "data_dir": str(data_dir)}, kwargs)


@pytest.fixture
def vae(tiny):
    trainer = main_vae.main(*tiny(main_vae, num_epochs=1, batch_size=500, hidden_size=32, latent_dim=4, iwae_samples=0,
                                  exclude_class=3))
    return trainer.run.folder / "weights_epoch_1.pt"


def test_a_zero_that_was_left_out_is_what_is_shown(tiny, tmp_path, monkeypatch):
    main_vae.main(*tiny(main_vae, num_epochs=1, batch_size=500, hidden_size=8, latent_dim=2, iwae_samples=0,
                        exclude_class=0))
    shown = []
    monkeypatch.setattr(detect, "save_borderline", lambda rows, *_: shown.extend(rows))
    run(tmp_path / "out" / "weights_epoch_1.pt")
    assert shown == ["clean", "0, never trained on"]


def by_definition(clean, anomalous):
    """AUROC from all pairs and from trapezoids, and average precision, from loops over the thresholds."""
    pairs = np.mean([(a > c) + 0.5 * (a == c) for a in anomalous for c in clean])
    points, precision = [(0.0, 0.0)], 0.0
    for threshold in sorted({*clean, *anomalous}, reverse=True):
        hits, alarms = sum(anomalous >= threshold), sum(clean >= threshold)
        precision += (hits / len(anomalous) - points[-1][1]) * hits / (hits + alarms)
        points.append((alarms / len(clean), hits / len(anomalous)))
    trapezoids = sum((x - u) * (y + v) / 2 for (u, v), (x, y) in zip(points, points[1:]))
    return pairs, trapezoids, precision


@pytest.mark.parametrize("levels", [2, 5, 30, None])  # how many scores there are: many ties, few, none
def test_areas_and_rates_equal_their_definitions(levels):
    random = np.random.default_rng(0)
    clean, anomalous = random.normal(0, 1, 83), random.normal(0.7, 1.5, 57)
    if levels:
        clean, anomalous = (np.floor((part + 4) * levels / 8) for part in (clean, anomalous))
    threshold = np.quantile(clean, 0.9)
    result = detect.judge(torch.from_numpy(clean), torch.from_numpy(anomalous), torch.tensor(threshold), 5, 0)
    pairs, trapezoids, precision = by_definition(clean, anomalous)
    assert abs(result["AUROC"][0] - pairs) < 1e-12 and abs(result["AUROC"][0] - trapezoids) < 1e-12
    assert abs(result["AUPRC"][0] - precision) < 1e-12
    assert abs(result["false positives"][0] - (clean > threshold).mean()) < 1e-12
    assert abs(result["true positives"][0] - (anomalous > threshold).mean()) < 1e-12


def test_areas_of_what_is_known_exactly():
    low, high = torch.arange(5.0), torch.arange(10.0, 14)

    def of(a, b):
        result = detect.judge(a, b, torch.tensor(4.5), 3, 0)
        return [result[name][0] for name in ("AUROC", "AUPRC", "false positives", "true positives")]

    assert of(low, high) == [1, 1, 0, 1] and of(high, low)[0] == 0
    assert of(torch.ones(5), torch.ones(4)) == [0.5, pytest.approx(4 / 9, abs=1e-15), 0, 0]


def test_intervals_are_those_of_a_bootstrap_in_a_loop_and_of_the_binomial():
    random = np.random.default_rng(1)
    clean, anomalous = np.round(random.normal(0, 1, 80), 1), np.round(random.normal(1, 1, 40), 1)
    parts = [torch.from_numpy(part) for part in (clean, anomalous)]
    result = detect.judge(*parts, torch.tensor(1.0), 2000, 0)
    again, other = (detect.judge(*parts, torch.tensor(1.0), 2000, seed) for seed in (0, 1))
    assert result == again != other
    loop = np.array([by_definition(random.choice(clean, 80), random.choice(anomalous, 40))[1:] for _ in range(250)])
    for name, column in (("AUROC", 0), ("AUPRC", 1)):
        value, low, high = result[name]
        wanted = np.quantile(loop[:, column], [0.025, 0.975])
        assert low < value < high and np.abs(np.array([low, high]) - wanted).max() < 0.25 * (high - low)
    for name, part in (("false positives", clean), ("true positives", anomalous)):
        value, low, high = result[name]
        assert high - low == pytest.approx(2 * 1.96 * (value * (1 - value) / len(part)) ** 0.5, rel=0.2)


@torch.no_grad()
def test_scores_of_single_images_equal_those_of_training(tiny, monkeypatch):
    trainer = main_vae.main(*tiny(main_vae, num_epochs=0, hidden_size=16, latent_dim=3, iwae_samples=0))
    trainer.encoder.fc_logvar.weight.mul_(3)
    trainer.train.pixels, trainer.train.labels = trainer.train.pixels[:70], trainer.train.labels[:70]
    scorer = detect.Scorer(trainer.encoder, trainer.decoder, trainer.train, 3)
    images = trainer.test.pixels[:9] / 255
    monkeypatch.setattr(torch, "randn_like", lambda mu: torch.full_like(mu, 0.5))
    scores = scorer(images)
    assert sorted(scores) == sorted(detect.SCORES) and all(part.shape == (9,) for part in scores.values())
    codes = trainer.encoder(trainer.train.pixels.flatten(1) / 255)[0]
    for i, x in enumerate(images.flatten(1)[:, None]):
        mu, logvar = trainer.encoder(x)
        kl = main_vae.kl_divergence(mu, logvar)
        noisy = trainer.decoder(mu + (0.5 * logvar).exp() / 2)
        wanted = {"reconstruction": main_vae.reconstruction_loss(trainer.decoder(mu), x), "KL": kl,
                  "negative ELBO": main_vae.reconstruction_loss(noisy, x) + kl,
                  "latent distance": (codes - mu).norm(dim=1).min(),
                  "pixel distance": (trainer.train.pixels.flatten(1) / 255 - x).norm(dim=1).min()}
        for name, value in wanted.items():
            assert scores[name][i].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-3), name


@torch.no_grad()
def test_colour_is_scored_in_the_range_of_the_networks(tiny):
    trainer = main_ae.main(*tiny(main_ae, num_epochs=0, model_type="ae", feature_maps=4, latent_dim=3, image_size=8))
    scorer = detect.Scorer(trainer.encoder, trainer.decoder, trainer.test, 3)
    images, x = trainer.test.pixels[:5] / 255, trainer.test.batch(torch.arange(5))[0]
    scores = scorer(images)
    assert sorted(scores) == ["latent distance", "pixel distance", "reconstruction"]  # there is no KL
    output = trainer.decoder(trainer.encoder(x)[0])
    for i in range(5):
        wanted = main_ae.reconstruction_loss(output[i:i + 1], x[i:i + 1]).item()
        assert scores["reconstruction"][i].item() == pytest.approx(wanted, rel=1e-5)
    assert scores["pixel distance"].abs().max() < 0.02  # they are among those it compares with
    assert torch.allclose(scorer.rebuild(images), output.clamp(-1, 1) / 2 + 0.5, atol=1e-6)


@pytest.mark.parametrize("channels, side", [(1, 28), (3, 16)])
def test_anomalies_are_what_they_are_called(channels, side):
    random = torch.Generator().manual_seed(0)
    x = 0.25 + 0.5 * torch.rand(40, channels, side, side, generator=random)
    kinds = detect.corrupted(x, random)
    assert all(images.shape == x.shape and images.min() >= 0 and images.max() <= 1 for images in kinds.values())
    for sigma in (0.05, 0.1):
        change = kinds[f"Gaussian noise {sigma:g}"] - x
        assert change.std().item() == pytest.approx(sigma, rel=0.03) and abs(change.mean()) < 0.003
    for share in (0.2, 0.05, 0.01):
        hit = (kinds[f"salt and pepper {share:.0%}"] != x).any(1)
        values = kinds[f"salt and pepper {share:.0%}"].transpose(0, 1)[:, hit]
        assert hit.float().mean().item() == pytest.approx(share, rel=0.2) and ((values == 0) | (values == 1)).all()
        assert values.mean().item() == pytest.approx(0.5, abs=0.1) and (values == values[:1]).all()  # whole pixels
    assert torch.allclose(kinds["inverted"] + x, torch.ones_like(x))
    assert kinds["rotated by 90 degrees"].equal(torch.rot90(x, 1, (2, 3)))
    black = (kinds["a square blacked out"] == 0).all(1)
    assert (black.flatten(1).sum(1) == (side // 3) ** 2).all() and black.float().mean(0).max() < 1
    for one in black:
        rows, columns = one.any(1).nonzero(), one.any(0).nonzero()
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == side // 3 - 1
    assert kinds["a square blacked out"][~black[:, None].expand_as(x)].equal(x[~black[:, None].expand_as(x)])
    assert kinds["blurred"].std() < 0.6 * x.std() and abs(kinds["blurred"].mean() - x.mean()) < 0.01
    point = torch.zeros(1, channels, 33, 33)
    point[:, :, 16, 26] = 1
    blurred = detect.corrupted(point, random)["blurred"][0, 0]
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5) and (blurred > 0).sum() == 25
    # a point 10 to the right of the middle, turned by 30 degrees, is 8.7 to the right and 5 up (or down)
    weight = detect.corrupted(point, random)["rotated by 30 degrees"][0, 0]
    ys, xs = torch.meshgrid(torch.arange(33) - 16.0, torch.arange(33) - 16.0, indexing="ij")
    assert (weight * xs).sum() / weight.sum() == pytest.approx(8.66, abs=0.3)
    assert abs((weight * ys).sum() / weight.sum()) == pytest.approx(5, abs=0.3)


def test_a_left_out_class_is_judged_and_nothing_is_judged_by_itself(vae, tmp_path, monkeypatch):
    seen, plain, trains = [], detect.Scorer.__call__, []
    start = detect.Scorer.__init__
    monkeypatch.setattr(detect.Scorer, "__call__", lambda self, images: (seen.append(images), plain(self, images))[1])
    monkeypatch.setattr(detect.Scorer, "__init__", lambda self, encoder, decoder, train, samples: (
        trains.append(train), start(self, encoder, decoder, train, samples))[1])
    results = run(vae)
    assert FILES <= {path.name for path in vae.parent.iterdir()}
    held_out, judged, left_out, *_ = [{image.numpy().tobytes() for image in images} for images in seen]
    assert len(held_out) == len(judged) == 150 and not held_out & judged and len(left_out) == 50
    inverted = {(255 - 255 * image).round().byte().numpy().tobytes() for image in seen[-5]}
    assert len(inverted) == 40 and "inverted" == list(dict.fromkeys(kind for kind, _ in results))[-5]
    clean = {(255 * image).round().byte().numpy().tobytes() for images in seen[:2] for image in images}
    assert not inverted & clean  # what is distorted is none of the clean
    test = datasets.load_data("digits", "", False, 1, False, 28, 1, "cpu")[1]
    assert left_out == {(image / 255).numpy().tobytes() for image in test.pixels[test.labels == 3]}
    assert (trains[0].labels != 3).all() and len(trains[0]) == 200

    with open(vae.parent / "anomaly_detection.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results) == 13 * 5
    for row in rows:
        result = results[row["anomaly"], row["score"]]
        assert [float(row[f"{name}{end}"]) for name in result for end in ("", " low", " high")] == pytest.approx(
            [value for values in result.values() for value in values], abs=1e-4)
    first = rows[0]
    assert (first["anomaly"], first["clean"], first["anomalous"]) == ("3, never trained on", "150", "50")
    scores = plain(detect.Scorer(*main_vae.load_model(vae), trains[0], 2), seen[0])
    assert float(first["threshold"]) == pytest.approx(scores["reconstruction"].quantile(0.95).item(), rel=1e-3)
    assert results["inverted", "reconstruction"]["AUROC"][0] > 0.99

    run(vae, tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == FILES
    for name in FILES:  # the same every time
        assert (tmp_path / "again" / name).read_bytes() == (vae.parent / name).read_bytes()


def test_another_data_set_is_brought_into_shape_or_left_out(vae, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(detect, "save_histograms", lambda *_: None)
    results = run(vae, tmp_path, other_data="digits")
    assert results["digits instead", "pixel distance"]["AUROC"][0] < 0.9
    monkeypatch.setattr(datasets, "_torchvision", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    results = run(vae, tmp_path, other_data="auto", data_dir=tmp_path)
    told = capsys.readouterr().err
    assert "left out: cifar10 is not in" in told and not any("cifar10" in kind for kind, _ in results)


def test_what_cannot_be_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.chdir(tmp_path)
    main_gan.main(*tiny(main_gan, num_epochs=1, batch_size=4500))
    weights = {"script": "main_vae", "data": "folder few", "epoch": 1,
               "model_kwargs": {"hidden_size": 4, "latent_dim": 2, "image_size": 784}}
    networks = main_vae.Encoder(**weights["model_kwargs"]), main_vae.Decoder(**weights["model_kwargs"])
    common.save("few.pt", {**weights, "encoder": networks[0].state_dict(), "decoder": networks[1].state_dict()})
    (tmp_path / "few").mkdir()
    for i in range(20):
        Image.new("L", (28, 28), i).save(tmp_path / "few" / f"{i}.png")
    for options, words in (([], "with an encoder and a decoder; train first: python main_vae.py"),
                           (["--weights_path", "out/weights_epoch_1.pt"], "main_gan.py is no script of this collec"),
                           (["--weights_path", "few.pt"], "a folder few: say where it is with --data_dir"),
                           (["--weights_path", "few.pt", "--data_dir", "few"], "has 2 test images; 30 are the least"),
                           (["--percentile", "100"], "legal: in (0, 100)"), (["--bootstrap", "0"], "legal: >= 1")):
        monkeypatch.setattr("sys.argv", ["detect_vae_anomalies.py", *options])
        with pytest.raises(SystemExit) as stop:
            common.run(detect.main, detect.source_kwargs, detect.detection_kwargs)
        told = capsys.readouterr().err
        assert stop.value.code == 2 and words in told and told.count("\n") == 1
        assert told.startswith("detect_vae_anomalies.py: ")
    assert not list(tmp_path.glob("**/anomal*"))
