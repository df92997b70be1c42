import copy

import pytest
import torch
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

import common
import main_vae

SMALL = dict(hidden_size=32, latent_dim=6, iwae_samples=0)


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


@pytest.fixture
def trainer(tiny):
    return main_vae.main(*tiny(main_vae, num_epochs=0, **SMALL))


def test_sizes_of_the_default_networks():
    kwargs = main_vae.model_kwargs
    encoder, decoder = main_vae.Encoder(**kwargs), main_vae.Decoder(**kwargs)
    shapes = [tuple(p.shape) for p in encoder.parameters() if p.ndim == 2]
    assert shapes == [(1024, 784), (1024, 1024), (32, 1024), (32, 1024)]
    assert [tuple(p.shape) for p in decoder.parameters() if p.ndim == 2] == [(1024, 32), (1024, 1024), (784, 1024)]
    mu, logvar = encoder(torch.rand(3, 784))
    assert mu.shape == logvar.shape == (3, 32) and decoder(mu).shape == (3, 784)
    assert abs(encoder.fc_mean.weight.std() / (2 / 1024) ** 0.5 - 1) < 0.02 and encoder.fc_mean.bias.eq(0).all()
    images = decoder.sample(10 * mu)
    assert images.min() >= 0 and images.max() <= 1 and not images.requires_grad


def test_kl_and_reconstruction_equal_torch_distributions():
    mu, logvar = torch.randn(2, 7, 5, dtype=torch.float64)
    by_torch = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert torch.allclose(main_vae.kl_divergence(mu, logvar), by_torch)
    assert main_vae.kl_divergence(torch.zeros(2, 5), torch.zeros(2, 5)) == 0
    logits = torch.randn(7, 12, dtype=torch.float64)
    x = torch.randint(0, 2, (7, 12)).double()
    assert torch.allclose(main_vae.reconstruction_loss(logits, x), -Bernoulli(logits=logits).log_prob(x).sum(1).mean())
    assert main_vae.reconstruction_loss(torch.full((1, 1), 500.0), torch.zeros(1, 1)) == 500  # not clamped at 100


def test_a_sample_has_the_mean_and_the_deviation_it_is_asked_for():
    mu, logvar = torch.full((100_000, 1), 3.0, requires_grad=True), torch.full((100_000, 1), -2.0, requires_grad=True)
    z = main_vae.reparameterize(mu, logvar)
    assert abs(z.mean() - 3) < 0.01 and abs(z.std() - torch.tensor(-1.0).exp()) < 0.01
    z.sum().backward()
    assert mu.grad.eq(1).all() and torch.allclose(logvar.grad, (z - mu) / 2, atol=1e-5)  # dz/dlogvar = sigma noise / 2


def test_the_loss_of_an_image_does_not_depend_on_the_batch(trainer, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", lambda mu: torch.full_like(mu, 0.5))  # the same noise for every image
    x = torch.rand(6, 784)
    for one, twice in zip(trainer.losses(x), trainer.losses(torch.cat([x, x]))):
        assert torch.allclose(one, twice)
    loss, reconstruction, kl = trainer.losses(x)
    assert torch.allclose(loss, reconstruction + kl) and loss > 300  # 784 log 2 = 543 before training


def test_train_and_test_losses_agree_on_the_same_images(trainer):
    with torch.no_grad():  # away from the start, so that the noise in z matters
        trainer.decoder.model[0].weight.mul_(3)
    trainer.test = copy.copy(trainer.test)
    trainer.test.pixels, trainer.test.labels = trainer.train.pixels[:600], trainer.train.labels[:600]
    x = trainer.train.batch(torch.arange(600))[0].flatten(1)
    with torch.no_grad():
        repeats = torch.stack([torch.stack(trainer.losses(x)) for _ in range(20)])
        around_mu = main_vae.reconstruction_loss(trainer.decoder(trainer.encoder(x)[0]), x)
    values = trainer.evaluate()
    mean, spread = repeats.mean(0), repeats.std(0)
    assert abs(values["test_loss"] - mean[0]) < 5 * spread[0] and values["test_KL"] == pytest.approx(mean[2].item())
    assert abs(values["test_reconstruction"] - mean[1]) < 5 * spread[1]
    assert mean[1] - around_mu > 10 * spread[1], "z is sampled in both"


def test_active_latents_are_those_whose_mu_varies(trainer):
    with torch.no_grad():
        trainer.encoder.fc_mean.weight[:4] *= 1e-4
        trainer.encoder.fc_mean.weight[4:] *= 1e2
    assert trainer.evaluate()["active_latents"] == 2


def test_importance_weighted_bound_against_a_linear_gaussian_model():
    """p(z) = N(0, I), p(x|z) = N(W z + b, s^2 I): p(x) = N(b, W W' + s^2 I) and p(z|x) are known."""
    torch.manual_seed(0)
    w, b, s = torch.randn(4, 2).double(), torch.randn(4).double(), 0.7
    x = b + torch.randn(50, 2).double() @ w.T + s * torch.randn(50, 4).double()
    exact = MultivariateNormal(b, w @ w.T + s**2 * torch.eye(4).double()).log_prob(x)

    def log_likelihood(z):
        return Normal(b + z @ w.T, s).log_prob(x).sum(1)

    precision = torch.eye(2).double() + w.T @ w / s**2
    mean = (x - b) @ w / s**2 @ precision.inverse()
    # q is the posterior's mean with a diagonal variance, one half too wide: no longer exact
    logvar = (1.5 * precision.inverse().diagonal()).log().expand(50, 2)
    bounds = [torch.stack([main_vae.importance_weighted_bound(mean, logvar, log_likelihood, k)
                           for _ in range(repeats)]).mean() for k, repeats in ((1, 300), (5, 60), (1000, 1))]
    elbo = exact.mean() - kl_divergence(MultivariateNormal(mean, torch.diag_embed(logvar.exp())),
                                        MultivariateNormal(mean, precision.inverse())).mean()
    assert abs(bounds[0] - elbo) < 0.1  # k = 1 is the evidence lower bound
    assert bounds[0] < bounds[1] < bounds[2] and abs(bounds[2] - exact.mean()) < 0.01
    # where q is the posterior itself, a single sample gives log p(x) exactly: here with orthogonal columns
    w = torch.linalg.qr(w)[0] * torch.tensor([2.0, 0.5]).double()
    x = b + torch.randn(50, 4).double()
    variance = 1 / (1 + w.square().sum(0) / s**2)
    mean = (x - b) @ w / s**2 * variance
    exact = MultivariateNormal(b, w @ w.T + s**2 * torch.eye(4).double()).log_prob(x)
    bound = main_vae.importance_weighted_bound(mean, variance.log().expand(50, 2), log_likelihood, 1)
    assert torch.allclose(bound, exact)


def test_the_optimiser_moves_both_networks_and_the_rate_halves(tiny):
    trainer = main_vae.main(*tiny(main_vae, num_epochs=0, **SMALL))
    encoder, decoder = flat(trainer.encoder), flat(trainer.decoder)
    trainer.step(torch.rand(8, 784))
    assert all((a != b).any() for a, b in [(encoder, flat(trainer.encoder)), (decoder, flat(trainer.decoder))])
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.encoder.parameters())
    trainer = main_vae.main(*tiny(main_vae, num_epochs=3, lr_half_life=1.0, batch_size=500, **SMALL))
    assert trainer.optimizer.param_groups[0]["lr"].item() == pytest.approx(0.001 / 4)
    trainer = main_vae.main(*tiny(main_vae, num_epochs=2, lr_half_life=0.0, resume=False, batch_size=500, **SMALL))
    assert trainer.optimizer.param_groups[0]["lr"].item() == pytest.approx(0.001)


def test_a_short_run_writes_the_promised_files_and_learns(tiny, tmp_path):
    trainer = main_vae.main(*tiny(main_vae, num_epochs=3, sample_every=2, **{**SMALL, "iwae_samples": 5}))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "history.csv", "checkpoint.pt", "log_likelihood.csv", *(f"{name}_{epoch}.{kind}" for epoch in (1, 2, 3)
        for name, kind in [("generated_image_epoch", "png"), ("reconstruction_epoch", "png"),
                           ("train_loss_curve", "png"), ("weights_epoch", "pt")])}
    history = trainer.run.history
    assert list(history) == ["epoch", "data", "loss", "reconstruction", "KL", "test loss", "test reconstruction",
                             "test KL", "active latents"]
    assert history["loss"][0] > history["loss"][1] > history["loss"][2]
    assert history["test loss"][-1] < 215 and history["test loss"][0] - history["test loss"][-1] > 2
    bound = float((tmp_path / "out" / "log_likelihood.csv").read_text().splitlines()[1].split(",")[2])
    assert -history["test loss"][-1] < bound < -history["test loss"][-1] + 30
    encoder, decoder = main_vae.load_model(tmp_path / "out" / "weights_epoch_3.pt")
    x = trainer.test.batch(torch.arange(4))[0]
    assert encoder(x)[0].equal(encoder(x.flatten(1))[0])  # flat or not
    assert decoder.sample(encoder(x.flatten(1))[0]).equal(trainer.decoder.sample(trainer.encoder(x.flatten(1))[0]))
    assert not encoder.training and not decoder.training


def test_a_class_left_out_of_training_is_recorded(tiny, tmp_path):
    trainer = main_vae.main(*tiny(main_vae, num_epochs=1, exclude_class=4, batch_size=500, **SMALL))
    for images, share in ((trainer.train, 450), (trainer.test, 50)):
        assert images.labels.bincount().tolist() == [share] * 4 + [0] + [share] * 5
    assert trainer.run.history["data"] == ["digits without 4"]
    assert common.load(tmp_path / "out" / "weights_epoch_1.pt", "main_vae", "decoder")["data"] == "digits without 4"
    with pytest.raises(common.BadInput, match="exclude_class was 4, is -1"):
        main_vae.main(*tiny(main_vae, num_epochs=2, batch_size=500, **SMALL))
    everything = main_vae.main(*tiny(main_vae, num_epochs=0, resume=False, **SMALL))
    assert everything.train.name == "digits" and len(everything.train) == 4500


def test_a_continued_run_ends_with_the_bytes_of_an_uninterrupted_one(tiny, tmp_path, monkeypatch):
    for folder, parts in (("whole", [3]), ("parts", [1, 3])):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        for epochs in parts:  # iwae_samples: its noise comes between the parts
            main_vae.main(*tiny(main_vae, num_epochs=epochs, output_dir="out", data_dir="data", batch_size=500,
                                **{**SMALL, "iwae_samples": 3}))
    for name in ["history.csv", "checkpoint.pt", "log_likelihood.csv", "weights_epoch_3.pt"]:
        assert (tmp_path / "whole/out" / name).read_bytes() == (tmp_path / "parts/out" / name).read_bytes(), name


@pytest.mark.parametrize("wrong, message", [(dict(image_size=785), "785 is no square number"),
                                            (dict(normalize=True), "legal: false"), (dict(latent_dim=0), ">= 1"),
                                            (dict(iwae_samples=-1), ">= 0"), (dict(lr_half_life=-1.0), ">= 0"),
                                            (dict(dataset_type="sprites"), "mnist | cifar10"),
                                            (dict(exclude_class=10), "digits has no images of label 10")])
def test_what_cannot_be_is_refused(wrong, message, tiny):
    with pytest.raises(common.BadInput, match=message):
        main_vae.main(*tiny(main_vae, **{**SMALL, **wrong}))
    with pytest.raises(common.BadInput, match="there is no file"):
        main_vae.load_model("nothing.pt")
