import csv
import math

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

import common
import main_ae

SMALL = dict(latent_dim=4, feature_maps=4, batch_size=500, image_size=8)


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


@pytest.fixture
def trainer(tiny):
    return main_ae.main(*tiny(main_ae, num_epochs=0, **SMALL))


@pytest.mark.parametrize("size", [8, 24, 32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("model_type", ["ae", "vae"])
def test_shapes_at_every_size(model_type, channels, size):
    kwargs = dict(model_type=model_type, latent_dim=5, feature_maps=4, image_channels=channels, image_size=size)
    encoder, decoder = main_ae.Encoder(**kwargs), main_ae.Decoder(**kwargs)
    mu, logvar = encoder(torch.rand(2, channels, size, size))
    assert mu.shape == (2, 5) and (logvar is None if model_type == "ae" else logvar.shape == (2, 5))
    assert decoder(mu).shape == (2, channels, size, size)
    images = decoder.sample(1e4 * mu)
    assert images.max() <= 1 and images.min() >= (0 if channels == 1 else -1) and not images.requires_grad


def test_the_default_networks_are_the_described_ones():
    kwargs = dict(model_type="vae", latent_dim=1024, feature_maps=32, image_channels=3, image_size=32)
    shapes = [tuple(p.shape) for p in main_ae.Encoder(**kwargs).parameters() if p.ndim > 1]
    assert shapes == [(32, 3, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (1024, 4096), (1024, 4096)]
    shapes = [tuple(p.shape) for p in main_ae.Decoder(**kwargs).parameters() if p.ndim > 1]
    assert shapes == [(2048, 1024), (128, 128, 4, 4), (128, 64, 4, 4), (64, 32, 4, 4), (3, 32, 3, 3)]
    grey = main_ae.Encoder(**{**kwargs, "image_channels": 1})
    assert [m.kernel_size for m in grey.modules() if isinstance(m, torch.nn.Conv2d)] == [(3, 3), *[(4, 4)] * 3]
    assert {m.negative_slope for m in grey.modules() if isinstance(m, torch.nn.LeakyReLU)} == {0.01}


def test_losses_equal_torch_distributions():
    mu, logvar = torch.randn(2, 7, 5, dtype=torch.float64)
    by_torch = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert torch.allclose(main_ae.kl_divergence(mu, logvar), by_torch)
    assert main_ae.kl_divergence(mu, None) == 0
    output, colour = torch.randn(2, 7, 3, 8, 8, dtype=torch.float64)
    # a normal density of variance 1/2, less its constant log(pi) / 2 a pixel
    by_torch = -Normal(output, 0.5**0.5).log_prob(colour).sum((1, 2, 3)).mean() - 192 * math.log(math.pi) / 2
    assert torch.allclose(main_ae.reconstruction_loss(output, colour), by_torch)
    logits, grey = output[:, :1], colour[:, :1].sign() / 2 + 0.5
    by_torch = -Bernoulli(logits=logits).log_prob(grey).sum((1, 2, 3)).mean()
    assert torch.allclose(main_ae.reconstruction_loss(logits, grey), by_torch)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_of_an_image_does_not_depend_on_the_batch(channels, tiny, monkeypatch):
    trainer = main_ae.main(*tiny(main_ae, num_epochs=0, **SMALL, image_channels=channels))
    trainer.beta.fill_(0.7)
    networks = trainer.encoder, trainer.decoder
    monkeypatch.setattr(torch, "randn_like", lambda mu: torch.full_like(mu, 0.5))  # the same noise for every image
    x = torch.rand(6, channels, 8, 8)
    for one, twice in zip(trainer.losses(*networks, x), trainer.losses(*networks, torch.cat([x, x]))):
        assert torch.allclose(one, twice)
    loss, reconstruction, kl = trainer.losses(*networks, x)
    assert torch.allclose(loss, reconstruction + 0.7 * kl) and kl > 0


def test_beta_0_with_z_at_mu_is_the_autoencoder(tiny, tmp_path, monkeypatch):
    vae = main_ae.main(*tiny(main_ae, num_epochs=0, **SMALL, beta=0.0))
    ae = main_ae.main(*tiny(main_ae, num_epochs=0, **SMALL, model_type="ae", output_dir=str(tmp_path / "ae")))
    assert ae.encoder.load_state_dict(vae.encoder.state_dict(), strict=False).missing_keys == []
    ae.decoder.load_state_dict(vae.decoder.state_dict())
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    vae.beta.zero_()
    x = vae.train.batch(torch.arange(50))[0]
    for _ in range(3):
        values = [trainer.step(x) for trainer in (vae, ae)]
        assert torch.allclose(values[0]["loss"], values[1]["loss"]) and values[1]["KL"] == 0
    weights = flat(ae.encoder)
    assert torch.allclose(flat(vae.encoder)[:len(weights)], weights, atol=1e-6)
    assert torch.allclose(flat(vae.decoder), flat(ae.decoder), atol=1e-6)


def test_a_step_is_the_textbook_s(trainer, monkeypatch):
    """The step against separate passes, plain Adam, and a gradient shortened to length 1 by hand."""
    encoder, decoder = (getattr(main_ae, name)(**trainer.run.model_kwargs) for name in ("Encoder", "Decoder"))
    encoder.load_state_dict(trainer.encoder.state_dict())
    decoder.load_state_dict(trainer.decoder.state_dict())
    parameters = [*encoder.parameters(), *decoder.parameters()]
    adam = torch.optim.Adam(parameters, lr=0.001)
    x = trainer.train.batch(torch.arange(20))[0]
    trainer.beta.fill_(2)
    torch.manual_seed(1)
    for _ in range(3):
        mu, logvar = encoder(x)
        z = Normal(mu, (logvar / 2).exp()).rsample()
        loss = ((decoder(z) - x) ** 2).sum() / 20 + 2 * kl_divergence(Normal(mu, (logvar / 2).exp()),
                                                                      Normal(0.0, 1.0)).sum() / 20
        adam.zero_grad()
        loss.backward()
        length = sum(p.grad.square().sum() for p in parameters).sqrt()
        assert length > 1
        for p in parameters:
            p.grad /= length
        adam.step()
    torch.manual_seed(1)
    for _ in range(3):
        values = trainer.step(x)
    assert torch.allclose(values["loss"], loss, rtol=1e-4)
    assert torch.allclose(flat(trainer.decoder), flat(decoder), atol=1e-5)
    assert torch.allclose(flat(trainer.encoder), flat(encoder), atol=1e-5)


def test_pixel_art_is_drawn_in_its_own_size(tiny, tmp_path):
    np.savez(tmp_path / "sprites.npz", images=np.random.RandomState(0).randint(0, 255, (200, 16, 16, 3), np.uint8),
             labels=np.arange(200) % 5)
    trainer = main_ae.main(*tiny(main_ae, dataset_type="sprites", data_dir=str(tmp_path), image_size=16, latent_dim=4,
                                 feature_maps=4, num_epochs=0, batch_size=50))
    assert trainer.train.name == "sprites" and trainer.ema_decoder(torch.zeros(2, 4)).shape == (2, 3, 16, 16)


def test_train_and_test_losses_agree_on_the_same_images(trainer):
    with torch.no_grad():  # away from the start, so that the noise in z matters
        trainer.ema_decoder.input_layer.weight.mul_(300)
    trainer.test.pixels, trainer.test.labels = trainer.train.pixels[:600], trainer.train.labels[:600]
    trainer.beta.fill_(0.3)
    x = trainer.train.batch(torch.arange(600))[0]
    with torch.no_grad():
        repeats = torch.stack([torch.stack(trainer.losses(trainer.ema_encoder, trainer.ema_decoder, x))
                               for _ in range(20)])
        around_mu = main_ae.reconstruction_loss(trainer.ema_decoder(trainer.ema_encoder(x)[0]), x)
    mean, spread, values = repeats.mean(0), repeats.std(0), trainer.evaluate()
    assert abs(values["test_loss"] - mean[0]) < 5 * spread[0]
    assert abs(values["test_reconstruction"] - mean[1]) < 5 * spread[1]
    assert values["test_KL"] == pytest.approx(mean[2].item(), rel=1e-4)
    assert values["test_loss"] == pytest.approx(values["test_reconstruction"] + 0.3 * values["test_KL"])
    assert mean[1] - around_mu > 10 * spread[1], "z is sampled in both"


def test_tests_and_weights_are_of_the_average_over_the_last_steps(tiny, tmp_path, monkeypatch):
    seen, step = [], main_ae.Trainer.step

    def watched(trainer, x):
        seen.append(flat(trainer.decoder))
        return step(trainer, x)

    monkeypatch.setattr(main_ae.Trainer, "step", watched)
    trainer = main_ae.main(*tiny(main_ae, num_epochs=2, ema_decay=0.5, **{**SMALL, "batch_size": 900}))
    seen.append(flat(trainer.decoder))
    average = seen[0]
    for t, weights in enumerate(seen[1:], 1):  # from the start; a half is reached at the eighth of ten steps
        average = average + max(0.5, 9 / (10 + t)) * (weights - average)
    weights = common.load(tmp_path / "out" / "weights_epoch_2.pt", "main_ae", "decoder")["decoder"]
    saved = torch.cat([value.flatten() for value in weights.values()])
    assert len(seen) == 11 and torch.allclose(saved, average, atol=1e-6)
    assert not torch.allclose(saved, seen[-1], atol=1e-4)
    with torch.no_grad():
        for p in [*trainer.ema_encoder.parameters(), *trainer.ema_decoder.parameters()]:
            p.zero_()
    images = trainer.test.batch(torch.arange(500))[0]
    assert abs(trainer.evaluate()["test_reconstruction"] / images.square().sum() * 500 - 1) < 1e-4


def test_linear_schedule(tiny):
    trainer = main_ae.main(*tiny(main_ae, num_epochs=4, **{**SMALL, "batch_size": 4500}, beta=2.0,
                                 beta_schedule="linear", beta_epochs=2))
    assert trainer.run.history["beta"] == [0, 1, 2, 2]


@pytest.mark.parametrize("overrides", [dict(model_type="ae"),
                                       dict(image_channels=1, latent_dim=2, precision="bfloat16")])
def test_a_short_run_writes_the_promised_files_and_learns(overrides, tiny, tmp_path):
    trainer = main_ae.main(*tiny(main_ae, num_epochs=3, sample_every=2,
                                 lr=0.003, **{**SMALL, "batch_size": 50, "image_size": 16, **overrides}))
    kinds = ["generated_image_epoch_{}.png", "reconstruction_epoch_{}.png", "train_loss_curve_{}.png",
             "weights_epoch_{}.pt", *(["latent_space_epoch_{}.png"] if "image_channels" in overrides else [])]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "history.csv", "checkpoint.pt", *(kind.format(epoch) for kind in kinds for epoch in (1, 2, 3))}
    history = trainer.run.history
    assert list(history) == ["epoch", "data", "loss", "reconstruction", "KL", "test loss", "test reconstruction",
                             "test KL", "beta"]
    images = trainer.test.batch(torch.arange(500))[0]
    mean = trainer.train.batch(torch.arange(4500))[0].mean(0).expand_as(images)
    blind = main_ae.reconstruction_loss(mean if images.shape[1] == 3 else mean.logit(eps=1e-6), images)
    assert history["test reconstruction"][2] < blind, "better than the mean of all images"
    assert history["test reconstruction"][0] > history["test reconstruction"][2]
    encoder, decoder = main_ae.load_model(tmp_path / "out" / "weights_epoch_3.pt")
    rebuilt = trainer.ema_decoder.sample(trainer.ema_encoder(images)[0])
    assert torch.allclose(decoder.sample(encoder(images)[0]), rebuilt, atol=1e-5)
    assert not encoder.training and not decoder.training


def test_a_continued_run_ends_with_the_bytes_of_an_uninterrupted_one(tiny, tmp_path, monkeypatch):
    for folder, parts in (("whole", [3]), ("parts", [1, 3])):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        for epochs in parts:
            main_ae.main(*tiny(main_ae, num_epochs=epochs, output_dir="out", data_dir="data", beta_schedule="linear",
                               **SMALL))
    for name in ["history.csv", "checkpoint.pt", "weights_epoch_3.pt", "generated_image_epoch_3.png"]:
        assert (tmp_path / "whole/out" / name).read_bytes() == (tmp_path / "parts/out" / name).read_bytes(), name


@pytest.mark.parametrize("experiment, labels", [
    ("latent_sizes", ["AE latent 16", "AE latent 128", "AE latent 1024"]),
    ("betas", ["VAE latent 4 beta 0.8 constant", "VAE latent 4 beta 1 constant", "VAE latent 4 beta 1.2 constant"]),
    ("schedule", ["VAE latent 4 beta 1 constant", "VAE latent 4 beta 1 linear"]),
    ("model_types", ["AE latent 4", "VAE latent 4 beta 1 constant", "VAE latent 4 beta 4 constant"])])
def test_an_experiment_trains_the_settings_of_its_name(experiment, labels, tiny):
    trainers = main_ae.main(*tiny(main_ae, num_epochs=0, **SMALL, experiment=experiment))
    assert list(trainers) == labels
    for label, trainer in trainers.items():
        words = dict(zip(label.split()[1::2], label.split()[2::2]))
        assert trainer.run.model_kwargs["latent_dim"] == int(words["latent"])
        assert (trainer.encoder.fc_logvar is None) == label.startswith("AE")
        assert trainer.target_beta == float(words.get("beta", 1))
        assert bool(trainer.beta_epochs) == label.endswith("linear")


@pytest.mark.parametrize("experiment", ["latent_sizes", "schedule"])
def test_an_experiment_compares_its_settings_and_trains_nothing_twice(experiment, tiny, tmp_path, monkeypatch):
    settings = tiny(main_ae, num_epochs=2, **SMALL, experiment=experiment)
    labels = list(main_ae.main(*settings))
    text = (tmp_path / "out" / f"{experiment}.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["setting"] for row in rows] == labels and {row["epoch"] for row in rows} == {"2"}
    assert (tmp_path / "out" / f"{experiment}.png").stat().st_size > 5000
    for row in rows:
        folder = tmp_path / "out" / f"digits_{row['setting'].replace(' ', '_')}"
        last = list(csv.DictReader((folder / "history.csv").read_text().splitlines()))[-1]
        assert float(row["test loss"]) == pytest.approx(float(last["test loss"]), rel=1e-5)
    monkeypatch.setattr(main_ae.Trainer, "step", None)  # a second command has nothing to train
    main_ae.main(*settings)
    assert (tmp_path / "out" / f"{experiment}.csv").read_text() == text


@pytest.mark.parametrize("wrong, message", [(dict(image_size=28), "multiples of 8"), (dict(beta=-1.0), ">= 0"),
                                            (dict(model_type="gan"), "ae | vae"), (dict(image_channels=2), "1 | 3"),
                                            (dict(experiment="all"), "latent_sizes"), (dict(beta_epochs=0), ">= 1")])
def test_what_cannot_be_is_refused(wrong, message, tiny):
    with pytest.raises(common.BadInput, match=message):
        main_ae.main(*tiny(main_ae, **{**SMALL, **wrong}))
    with pytest.raises(common.BadInput, match="there is no file"):
        main_ae.load_model("nothing.pt")
