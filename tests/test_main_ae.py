import csv
import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from helpers import grey_levels, read_history, read_png, tiles, write_mnist
from torch.distributions import Bernoulli, Normal, kl_divergence

import common
import main_ae

SMALL = {"latent_dim": 4, "feature_maps": 4, "batch_size": 500, "image_size": 8}
STANDARD = Normal(0.0, 1.0)


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def by_distributions(encoder, decoder, x, beta):
    """(loss, reconstruction, KL) of images x by torch.distributions alone."""
    mu, logvar = encoder(x)
    posterior = Normal(mu, (logvar / 2).exp())
    kl = kl_divergence(posterior, STANDARD).sum() / len(x)
    output = decoder(posterior.rsample())
    if x.shape[1] == 3:
        reconstruction = ((output - x) ** 2).sum() / len(x)
    else:
        coins = Bernoulli(logits=output, validate_args=False)
        reconstruction = -coins.log_prob(x).sum() / len(x)
    return reconstruction + beta * kl, reconstruction, kl


@pytest.fixture
def trainer(tiny):
    return main_ae.main(*tiny(main_ae, num_epochs=0, **SMALL))


@pytest.fixture
def without_curves(monkeypatch):
    """Figures of matplotlib take most of the time of a short run."""
    monkeypatch.setattr(common, "save_curves", lambda *inputs: None)


@pytest.mark.parametrize("size", [8, 24, 32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("model_type", ["ae", "vae"])
def test_shapes_at_every_size(model_type, channels, size):
    encoder, decoder = main_ae.make_networks(model_type, 5, 4, channels, size, "cpu")
    mu, logvar = encoder(torch.rand(2, channels, size, size))
    assert mu.shape == (2, 5)
    assert logvar is None if model_type == "ae" else logvar.shape == (2, 5)
    assert decoder(mu).shape == (2, channels, size, size)
    images = decoder.sample(1e4 * mu)
    lowest = 0 if channels == 1 else -1
    assert lowest <= images.min() < images.max() <= 1 and not images.requires_grad


def test_the_default_networks_are_the_described_ones():
    encoder, decoder = main_ae.make_networks("vae", 1024, 32, 3, 32, "cpu")
    shapes = [tuple(p.shape) for p in encoder.parameters() if p.ndim > 1]
    convolutions = [(32, 3, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3)]
    assert shapes == [*convolutions, (1024, 4096), (1024, 4096)]
    shapes = [tuple(p.shape) for p in decoder.parameters() if p.ndim > 1]
    convolutions = [(128, 128, 4, 4), (128, 64, 4, 4), (64, 32, 4, 4), (3, 32, 3, 3)]
    assert shapes == [(2048, 1024), *convolutions]
    for network, count in ((encoder, 3), (decoder, 4)):
        activations = [m for m in network.modules() if isinstance(m, torch.nn.ReLU)]
        assert len(activations) == count
    encoder, decoder = main_ae.make_networks("vae", 1024, 32, 1, 32, "cpu")
    shapes = [tuple(p.shape) for p in encoder.parameters() if p.ndim > 1]
    convolutions = [(32, 1, 3, 3), (64, 32, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4)]
    assert shapes == [*convolutions, (1024, 4096), (1024, 4096)]
    shapes = [tuple(p.shape) for p in decoder.parameters() if p.ndim > 1]
    convolutions = [(256, 128, 4, 4), (128, 64, 4, 4), (64, 32, 4, 4), (1, 32, 3, 3)]
    assert shapes == [(4096, 1024), *convolutions]
    for network, count in ((encoder, 4), (decoder, 3)):
        activations = [m for m in network.modules() if isinstance(m, torch.nn.LeakyReLU)]
        assert [m.negative_slope for m in activations] == [0.01] * count


def test_losses_equal_torch_distributions():
    mu, logvar = torch.randn(2, 7, 5, dtype=torch.float64)
    by_torch = kl_divergence(Normal(mu, (logvar / 2).exp()), STANDARD).sum(1).mean()
    assert torch.allclose(main_ae.kl_divergence(mu, logvar), by_torch)
    output, colour = torch.randn(2, 7, 3, 8, 8, dtype=torch.float64)
    # a normal density of variance 1/2, less its constant log(pi) / 2 a pixel
    density = -Normal(output, 0.5**0.5).log_prob(colour).sum((1, 2, 3)).mean()
    by_torch = density - 192 * math.log(math.pi) / 2
    assert torch.allclose(main_ae.reconstruction_loss(output, colour), by_torch)
    logits, grey = output[:, :1], colour[:, :1].sign() / 2 + 0.5
    by_torch = -Bernoulli(logits=logits).log_prob(grey).sum((1, 2, 3)).mean()
    assert torch.allclose(main_ae.reconstruction_loss(logits, grey), by_torch)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_of_an_image_does_not_depend_on_the_batch(channels, tiny, monkeypatch):
    trainer = main_ae.main(*tiny(main_ae, num_epochs=0, **SMALL, image_channels=channels))
    trainer.beta.fill_(0.7)
    networks = trainer.encoder, trainer.decoder
    # the same noise for every image
    monkeypatch.setattr(torch, "randn_like", lambda mu: torch.full_like(mu, 0.5))
    x = torch.rand(6, channels, 8, 8)
    losses = trainer.losses(*networks, x)
    for name, twice in trainer.losses(*networks, torch.cat([x, x])).items():
        assert torch.allclose(losses[name], twice)
    loss, reconstruction, kl = losses.values()
    assert torch.allclose(loss, reconstruction + 0.7 * kl) and kl > 0


def test_beta_0_with_z_at_mu_is_the_autoencoder(tiny, tmp_path, monkeypatch):
    vae = main_ae.main(*tiny(main_ae, num_epochs=0, **SMALL, beta=0.0))
    folder = str(tmp_path / "ae")
    ae = main_ae.main(*tiny(main_ae, num_epochs=0, **SMALL, model_type="ae", output_dir=folder))
    copied = ae.encoder.load_state_dict(vae.encoder.state_dict(), strict=False)
    assert copied.missing_keys == []
    ae.decoder.load_state_dict(vae.decoder.state_dict())
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    x, _ = vae.train.batch(torch.arange(50))
    for _ in range(3):
        of_vae, of_ae = vae.step(x), ae.step(x)
        assert torch.allclose(of_vae["loss"], of_ae["loss"])
        assert of_ae["loss"] == of_ae["reconstruction"] and of_ae["KL"] == 0
    weights = flat(ae.encoder)
    assert torch.allclose(flat(vae.encoder)[: len(weights)], weights, atol=1e-6)
    assert torch.allclose(flat(vae.decoder), flat(ae.decoder), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_step_is_the_textbook_s(channels, tiny):
    """The step against torch.distributions, plain Adam, and gradients shortened by hand."""
    trainer = main_ae.main(*tiny(main_ae, num_epochs=0, **SMALL, image_channels=channels))
    encoder, decoder = main_ae.make_networks("vae", 4, 4, channels, 8, "cpu")
    encoder.load_state_dict(trainer.encoder.state_dict())
    decoder.load_state_dict(trainer.decoder.state_dict())
    parameters = [*encoder.parameters(), *decoder.parameters()]
    adam = torch.optim.Adam(parameters, lr=0.001)
    x, _ = trainer.train.batch(torch.arange(20))
    trainer.beta.fill_(2)
    torch.manual_seed(1)
    for _ in range(3):
        losses = by_distributions(encoder, decoder, x, 2)
        adam.zero_grad()
        losses[0].backward()
        length = sum(p.grad.square().sum() for p in parameters).sqrt()
        assert length > 1
        for p in parameters:
            p.grad /= length
        adam.step()
    torch.manual_seed(1)
    for _ in range(3):
        values = trainer.step(x)
    assert list(values) == ["loss", "reconstruction", "KL"]
    for value, expected in zip(values.values(), losses):
        assert torch.allclose(value, expected, rtol=1e-3)
    assert torch.allclose(flat(trainer.decoder), flat(decoder), atol=1e-5)
    assert torch.allclose(flat(trainer.encoder), flat(encoder), atol=1e-5)


def test_evaluation_equals_an_independent_computation(trainer):
    """Of the averaged networks, on 600 images: a batch of 500 and one of 100."""
    with torch.no_grad():
        trainer.ema_decoder.model[0].weight.mul_(300)  # so that the noise in z matters
        for p in trainer.decoder.parameters():
            p.zero_()
    train = trainer.train
    trainer.test = dataclasses.replace(train, pixels=train.pixels[:600], labels=train.labels[:600])
    trainer.beta.fill_(0.3)
    x = trainer.test.pixels / 127.5 - 1
    torch.manual_seed(1)
    values = trainer.evaluate()
    networks = trainer.ema_encoder, trainer.ema_decoder
    torch.manual_seed(1)
    with torch.no_grad():
        first = torch.stack(by_distributions(*networks, x[:500], 0.3))
        second = torch.stack(by_distributions(*networks, x[500:], 0.3))
    expected = (first * 500 + second * 100) / 600
    names = ["test loss", "test reconstruction", "test KL"]
    assert list(values) == names
    assert [values[name] for name in names] == pytest.approx(expected.tolist(), rel=1e-4)


def test_mnist_is_grey_whatever_image_channels_says(tiny, tmp_path, monkeypatch, without_curves):
    write_mnist(tmp_path / "data", monkeypatch)
    settings = {**SMALL, "batch_size": 5, "image_size": 32, "image_channels": 3}
    trainer = main_ae.main(*tiny(main_ae, dataset_type="mnist", num_epochs=1, **settings))
    assert trainer.train.name == "mnist" and trainer.train.pixels.shape[1:] == (1, 32, 32)
    images, _ = trainer.train.batch(torch.arange(10))
    assert images.min() == 0 and images.max() == 1
    _, decoder = main_ae.load_model(tmp_path / "out" / "weights_epoch_1.pt")
    assert decoder.sample(torch.zeros(2, 4)).shape == (2, 1, 32, 32)


def test_tests_and_weights_are_of_the_average_over_the_last_steps(
    tiny, tmp_path, monkeypatch, without_curves
):
    seen, step = [], main_ae.Trainer.step

    def watched(trainer, x):
        seen.append(flat(trainer.decoder))
        return step(trainer, x)

    monkeypatch.setattr(main_ae.Trainer, "step", watched)
    settings = {**SMALL, "batch_size": 900, "ema_decay": 0.5}
    trainer = main_ae.main(*tiny(main_ae, num_epochs=2, **settings))
    seen.append(flat(trainer.decoder))
    average = seen[0]
    # from the start; a half is reached at the eighth of ten steps
    for t, weights in enumerate(seen[1:], 1):
        average = average + max(0.5, 9 / (10 + t)) * (weights - average)
    _, decoder = main_ae.load_model(tmp_path / "out" / "weights_epoch_2.pt")
    assert len(seen) == 11 and torch.allclose(flat(decoder), average, atol=1e-6)
    assert not torch.allclose(flat(decoder), seen[-1], atol=1e-4)


def test_beta_grows_linearly(tiny, tmp_path, without_curves):
    settings = {**SMALL, "batch_size": 4500, "beta": 2.0}
    schedule = {"beta_schedule": "linear", "beta_epochs": 2}
    trainer = main_ae.main(*tiny(main_ae, num_epochs=4, **settings, **schedule))
    history = read_history(tmp_path / "out")
    assert [float(row["beta"]) for row in history] == [0, 1, 2, 2]
    for row in history:
        total = float(row["reconstruction"]) + float(row["beta"]) * float(row["KL"])
        assert float(row["loss"]) == pytest.approx(total)
    assert trainer.beta == 2


@pytest.mark.parametrize(
    "overrides",
    [{"model_type": "ae"}, {"image_channels": 1, "latent_dim": 2}],
)
def test_a_short_run_writes_the_promised_files_and_learns(overrides, tiny, tmp_path):
    settings = {**SMALL, "batch_size": 50, "image_size": 16, "lr": 0.003, **overrides}
    trainer = main_ae.main(*tiny(main_ae, num_epochs=3, **settings))
    names = {"history.csv", "checkpoint.pt", "run.html"}
    for epoch in (1, 3):
        names |= {f"generated_image_epoch_{epoch}.png", f"reconstruction_epoch_{epoch}.png"}
        names |= {f"train_loss_curve_{epoch}.png", f"weights_epoch_{epoch}.pt"}
        if settings["latent_dim"] == 2:
            names.add(f"latent_space_epoch_{epoch}.png")
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    history = read_history(tmp_path / "out")
    columns = ["epoch", "data", "loss", "reconstruction", "KL"]
    columns += ["test loss", "test reconstruction", "test KL", "beta"]
    assert list(history[0]) == columns
    images, _ = trainer.test.batch(torch.arange(500))
    train_images, _ = trainer.train.batch(torch.arange(4500))
    mean = train_images.mean(0).expand_as(images)
    if images.shape[1] == 1:
        mean = mean.logit(eps=1e-6)
    blind = main_ae.reconstruction_loss(mean, images)
    errors = [float(row["test reconstruction"]) for row in history]
    assert errors[2] < blind, "better than the mean of all images"
    assert errors[0] > errors[2]
    encoder, decoder = main_ae.load_model(tmp_path / "out" / "weights_epoch_3.pt")
    assert flat(encoder).equal(flat(trainer.ema_encoder))
    assert flat(decoder).equal(flat(trainer.ema_decoder))
    assert not encoder.training and not decoder.training


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("model_type", ["ae", "vae"])
def test_pictures_show_what_the_decoder_draws(model_type, channels, tiny, tmp_path, monkeypatch):
    curves = []
    monkeypatch.setattr(common, "save_curves", lambda *inputs: curves.append(inputs))
    settings = {**SMALL, "model_type": model_type, "image_channels": channels}
    trainer = main_ae.main(*tiny(main_ae, num_epochs=2, **settings))
    folder, low = tmp_path / "out", -1.0 if channels == 3 else 0.0
    some = torch.linspace(0, 499, 36).long()
    originals, _ = trainer.test.batch(some)
    for epoch in (1, 2):
        encoder, decoder = main_ae.load_model(folder / f"weights_epoch_{epoch}.pt")
        shown = tiles(folder / f"reconstruction_epoch_{epoch}.png", 8, columns=12, count=72)
        assert (shown[0::2] == grey_levels(originals, low=low)).all()
        rebuilt = decoder.sample(encoder(originals)[0])
        assert (shown[1::2] == grey_levels(rebuilt, low=low)).all()
        shown = tiles(folder / f"generated_image_epoch_{epoch}.png", 8, columns=7, count=49)
        samples = decoder.sample(trainer.fixed_z)
        assert (shown == grey_levels(samples, low=low)).all()
        history, panels, title, path = curves[epoch - 1]
        assert history is trainer.run.history and f"({model_type}) on digits" in title
        assert path == folder / f"train_loss_curve_{epoch}.png"
        drawn = [column for columns in panels.values() for column in columns]
        kinds = ["reconstruction", "KL", "loss"] if model_type == "vae" else ["reconstruction"]
        assert sorted(drawn) == sorted(kinds + [f"test {kind}" for kind in kinds])


class Coordinates:
    """A decoder whose picture of z, 1 x 2 pixels of 1 or 3 channels, is z itself."""

    def __init__(self, channels):
        self.channels = channels

    def sample(self, z):
        return z.view(-1, 1, 1, 2).expand(-1, self.channels, -1, -1)


def test_the_plane_is_drawn_with_its_first_latent_to_the_right_and_its_second_upwards():
    low, high = torch.tensor([0.0, 10.0]), torch.tensor([1.0, 20.0])
    plane = main_ae.decode_plane(Coordinates(1), low, high, side=2)
    assert plane.shape == (2, 4, 1)  # (side * H, side * W, C)
    assert plane[0].flatten().tolist() == [0.25, 17.5, 0.75, 17.5]
    assert plane[1].flatten().tolist() == [0.25, 12.5, 0.75, 12.5]
    in_colour = main_ae.decode_plane(Coordinates(3), low, high, side=2)
    assert in_colour.shape == (2, 4, 3)  # and from [-1, 1] to [0, 1]
    assert in_colour[:, :, :1].equal(plane / 2 + 0.5)


def test_the_latent_space_shows_the_mu_of_every_test_image(tiny, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    points, shown = [], []
    scatter, imshow = Axes.scatter, Axes.imshow

    def note_points(axes, x, y, **options):
        points.append(torch.stack([torch.as_tensor(x), torch.as_tensor(y)], dim=1))
        return scatter(axes, x, y, **options)

    def note_picture(axes, image, **options):
        shown.append((torch.as_tensor(image), options["extent"]))
        return imshow(axes, image, **options)

    monkeypatch.setattr(Axes, "scatter", note_points)
    monkeypatch.setattr(Axes, "imshow", note_picture)
    settings = {**SMALL, "image_channels": 1, "latent_dim": 2}
    trainer = main_ae.main(*tiny(main_ae, num_epochs=0, **settings))
    path = tmp_path / "plane.png"
    encoder, decoder, test = trainer.ema_encoder, trainer.ema_decoder, trainer.test
    main_ae.draw_latent_space(encoder, decoder, test, path)
    assert read_png(path).shape == (550, 1210, 3)
    images, labels = test.batch(torch.arange(500))
    with torch.no_grad():
        mu, _ = encoder(images)
    assert len(points) == 10
    for digit in range(10):
        assert torch.allclose(points[digit], mu[labels == digit], atol=1e-5)
    [(picture, extent)] = shown
    left, right, bottom, top = extent
    horizontal, vertical = mu[:, 0].numpy(), mu[:, 1].numpy()
    assert (left, right) == pytest.approx(tuple(np.quantile(horizontal, [0.01, 0.99])), abs=1e-5)
    assert (bottom, top) == pytest.approx(tuple(np.quantile(vertical, [0.01, 0.99])), abs=1e-5)
    low, high = torch.tensor([left, bottom]), torch.tensor([right, top])
    assert torch.allclose(picture, main_ae.decode_plane(decoder, low, high), atol=1e-4)


@pytest.mark.parametrize("classes, legend", [(1, False), (200, False), (10, True)])
def test_the_latent_space_has_a_legend_if_it_fits(classes, legend, tiny, tmp_path, monkeypatch):
    drawn = []
    settings = {**SMALL, "image_channels": 1, "latent_dim": 2}
    trainer = main_ae.main(*tiny(main_ae, num_epochs=0, **settings))
    names = [f"class {label}" for label in range(classes)]
    test = dataclasses.replace(trainer.test, class_names=names)
    monkeypatch.setattr(common, "write", lambda path, figure: drawn.append(figure))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main_ae.draw_latent_space(trainer.ema_encoder, trainer.ema_decoder, test, "plane.png")
        drawn[0].draw_without_rendering()
    assert (drawn[0].axes[0].get_legend() is not None) == legend


def test_a_run_with_more_epochs_ends_as_one_that_was_not_stopped(tiny, tmp_path, without_curves):
    ends = {}
    for name, parts in (("whole", [3]), ("parts", [1, 3])):
        folder = tmp_path / name
        for epochs in parts:
            settings = {**SMALL, "beta_schedule": "linear", "output_dir": str(folder)}
            main_ae.main(*tiny(main_ae, num_epochs=epochs, **settings))
        names = ["history.csv", "weights_epoch_3.pt", "generated_image_epoch_3.png"]
        ends[name] = [(folder / file).read_bytes() for file in names]
    assert ends["whole"] == ends["parts"]


VAE = "VAE latent 4 beta"


@pytest.mark.parametrize(
    "experiment, settings",
    [
        ("latent_sizes", ["AE latent 16", "AE latent 128", "AE latent 1024"]),
        ("betas", [f"{VAE} 0.8 constant", f"{VAE} 1 constant", f"{VAE} 1.2 constant"]),
        ("schedule", [f"{VAE} 1 constant", f"{VAE} 1 linear"]),
        ("model_types", ["AE latent 4", f"{VAE} 1 constant", f"{VAE} 4 constant"]),
    ],
)
def test_an_experiment_trains_the_settings_of_its_name(experiment, settings, tiny):
    trainers = main_ae.main(*tiny(main_ae, num_epochs=0, **SMALL, experiment=experiment))
    assert list(trainers) == settings
    for setting, trainer in trainers.items():
        words = setting.split()
        assert trainer.fixed_z.shape == (49, int(words[2]))
        x, _ = trainer.train.batch(torch.arange(5))
        assert (trainer.encoder(x)[1] is None) == (words[0] == "AE")
        beta = float(words[4]) if words[0] == "VAE" else 1
        slow = words[-1] == "linear"
        expected = [0, beta / 20, beta] if slow else [beta] * 3
        assert [trainer.beta_of(epoch) for epoch in (1, 2, 21)] == expected


@pytest.mark.parametrize("experiment", ["latent_sizes", "schedule"])
def test_an_experiment_compares_its_settings_and_trains_nothing_twice(
    experiment, tiny, tmp_path, monkeypatch
):
    curves = []
    monkeypatch.setattr(common, "save_curves", lambda *inputs: curves.append(inputs))
    # also where a reader has made an experiment the default of the file
    monkeypatch.setattr(main_ae.main, "__defaults__", ({"experiment": experiment},))
    dicts = tiny(main_ae, num_epochs=2, **SMALL, experiment=experiment)
    settings = list(main_ae.main(*dicts))
    folder = tmp_path / "out"
    text = (folder / f"{experiment}.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["setting"] for row in rows] == settings
    history, panels, title, path = curves[-1]
    assert path == folder / f"{experiment}.png" and title == f"{experiment} on digits"
    kinds = ["reconstruction"] if experiment == "latent_sizes" else ["reconstruction", "KL"]
    assert list(panels) == [f"test {kind}" for kind in kinds]
    for kind in kinds:
        assert panels[f"test {kind}"] == [f"{setting}: {kind}" for setting in settings]
    assert [row["epoch"] for row in history] == [1, 2]
    for row in rows:
        setting = row.pop("setting")
        of_run = read_history(folder / setting.replace(" ", "_"))
        assert row.items() <= of_run[1].items() and row["epoch"] == "2"
        for curve, measured in zip(history, of_run):
            for kind in kinds:
                assert curve[f"{setting}: {kind}"] == float(measured[f"test {kind}"])
    monkeypatch.setattr(main_ae.Trainer, "step", None)  # a second command has nothing to train
    main_ae.main(*dicts)
    assert (folder / f"{experiment}.csv").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image_size": 28}, "image_size must be a multiple of 8"),
        ({"image_size": 0}, "image_size must be a multiple of 8"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"model_type": "gan"}, "model_type must be one of ae, vae"),
        ({"image_channels": 2}, "image_channels must be one of 1, 3"),
        ({"experiment": "all"}, "experiment must be one of none, latent_sizes"),
        ({"beta_epochs": 0}, "beta_epochs must be at least 1"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(wrong, message, tiny, tmp_path):
    with pytest.raises(common.BadInput, match=message):
        main_ae.main(*tiny(main_ae, **{**SMALL, **wrong}))
    assert not list(tmp_path.iterdir())
