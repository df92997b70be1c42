import dataclasses

import pytest
import torch
from helpers import grey_levels, read_history, tiles
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

import common
import main_vae

SMALL = {"hidden_size": 32, "latent_dim": 6, "iwae_samples": 0, "batch_size": 500}
STANDARD = Normal(0.0, 1.0)


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def by_distributions(encoder, decoder, x):
    """(loss, reconstruction, KL) of images x (N, pixels), by torch.distributions alone."""
    mu, logvar = encoder(x)
    posterior = Normal(mu, (logvar / 2).exp())
    kl = kl_divergence(posterior, STANDARD).sum(1)
    coins = Bernoulli(logits=decoder(posterior.rsample()), validate_args=False)
    reconstruction = -coins.log_prob(x).sum(1)
    return (reconstruction + kl).mean(), reconstruction.mean(), kl.mean()


@pytest.fixture
def trainer(tiny):
    return main_vae.main(*tiny(main_vae, num_epochs=0, **SMALL))


@pytest.fixture
def without_curves(monkeypatch):
    """Figures of matplotlib take most of the time of a short run."""
    monkeypatch.setattr(common, "save_curves", lambda *inputs: None)


def test_sizes_of_the_default_networks():
    kwargs = main_vae.model_kwargs
    encoder, decoder = main_vae.Encoder(**kwargs), main_vae.Decoder(**kwargs)
    shapes = [tuple(p.shape) for p in encoder.parameters() if p.ndim == 2]
    assert shapes == [(1024, 784), (1024, 1024), (32, 1024), (32, 1024)]
    shapes = [tuple(p.shape) for p in decoder.parameters() if p.ndim == 2]
    assert shapes == [(1024, 32), (1024, 1024), (784, 1024)]
    mu, logvar = encoder(torch.rand(3, 784))
    assert mu.shape == logvar.shape == (3, 32) and decoder(mu).shape == (3, 784)
    assert abs(encoder.fc_mean.weight.std() / (2 / 1024) ** 0.5 - 1) < 0.02
    assert encoder.fc_mean.bias.eq(0).all()
    images = decoder.sample(10 * mu)
    assert images.min() >= 0 and images.max() <= 1 and not images.requires_grad


def test_kl_and_reconstruction_equal_torch_distributions():
    mu, logvar = torch.randn(2, 7, 5, dtype=torch.float64)
    by_torch = kl_divergence(Normal(mu, (logvar / 2).exp()), STANDARD).sum(1).mean()
    assert torch.allclose(main_vae.kl_divergence(mu, logvar), by_torch)
    assert main_vae.kl_divergence(torch.zeros(2, 5), torch.zeros(2, 5)) == 0
    logits = torch.randn(7, 12, dtype=torch.float64)
    x = torch.randint(0, 2, (7, 12)).double()
    by_torch = -Bernoulli(logits=logits).log_prob(x).sum(1).mean()
    assert torch.allclose(main_vae.reconstruction_loss(logits, x), by_torch)
    far = main_vae.reconstruction_loss(torch.full((1, 1), 500.0), torch.zeros(1, 1))
    assert far == 500  # not clamped at 100


def test_a_sample_has_the_mean_and_the_deviation_it_is_asked_for():
    mu = torch.full((100_000, 1), 3.0, requires_grad=True)
    logvar = torch.full((100_000, 1), -2.0, requires_grad=True)
    z = main_vae.reparameterize(mu, logvar)
    assert abs(z.mean() - 3) < 0.01 and abs(z.std() - torch.tensor(-1.0).exp()) < 0.01
    z.sum().backward()
    assert mu.grad.eq(1).all()
    # dz / dlogvar = sigma noise / 2
    assert torch.allclose(logvar.grad, (z - mu) / 2, atol=1e-5)


def test_the_loss_of_an_image_does_not_depend_on_the_batch(trainer, monkeypatch):
    # the same noise for every image
    monkeypatch.setattr(torch, "randn_like", lambda mu: torch.full_like(mu, 0.5))
    x = torch.rand(6, 784)
    losses = trainer.losses(x)
    for name, twice in trainer.losses(torch.cat([x, x])).items():
        assert torch.allclose(losses[name], twice)
    loss, reconstruction, kl = losses.values()
    assert torch.allclose(loss, reconstruction + kl)
    assert loss > 300  # 784 log 2 = 543 before training


def test_a_step_is_the_textbook_s(trainer):
    """The step against torch.distributions and plain Adam."""
    encoder = main_vae.Encoder(32, 6, 784)
    decoder = main_vae.Decoder(32, 6, 784)
    encoder.load_state_dict(trainer.encoder.state_dict())
    decoder.load_state_dict(trainer.decoder.state_dict())
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.001)
    x = torch.rand(8, 784)
    torch.manual_seed(1)
    for _ in range(3):
        losses = by_distributions(encoder, decoder, x)
        adam.zero_grad()
        losses[0].backward()
        adam.step()
    torch.manual_seed(1)
    for _ in range(3):
        values = trainer.step(x)
    assert list(values) == ["loss", "reconstruction", "KL"]
    for value, expected in zip(values.values(), losses):
        assert torch.allclose(value, expected, rtol=1e-4)
    assert torch.allclose(flat(trainer.encoder), flat(encoder), atol=1e-5)
    assert torch.allclose(flat(trainer.decoder), flat(decoder), atol=1e-5)


def test_the_learning_rate_halves(tiny, without_curves):
    for half_life, rate in ((2.0, 0.0005), (0.0, 0.001)):
        dicts = tiny(main_vae, num_epochs=3, lr_half_life=half_life, resume=False, **SMALL)
        groups = main_vae.main(*dicts).optimizer.param_groups
        assert groups[0]["lr"].item() == pytest.approx(rate)


def test_evaluation_equals_an_independent_computation(trainer):
    with torch.no_grad():  # away from the start, so that the noise in z matters
        trainer.decoder.model[0].weight.mul_(3)
        # two latents vary by more than 0.1 over the images, the others hardly
        trainer.encoder.fc_mean.weight[:4] *= 1e-4
        trainer.encoder.fc_mean.weight[4:] *= 1e2
    train = trainer.train  # 600 images make two batches, of 500 and of 100
    trainer.test = dataclasses.replace(train, pixels=train.pixels[:600], labels=train.labels[:600])
    x = trainer.test.pixels.flatten(1) / 255
    torch.manual_seed(1)
    values = trainer.evaluate()
    torch.manual_seed(1)
    with torch.no_grad():
        first = torch.stack(by_distributions(trainer.encoder, trainer.decoder, x[:500]))
        second = torch.stack(by_distributions(trainer.encoder, trainer.decoder, x[500:]))
    expected = (first * 500 + second * 100) / 600
    names = ["test loss", "test reconstruction", "test KL", "active latents"]
    assert list(values) == names
    assert [values[name] for name in names] == pytest.approx([*expected.tolist(), 2], rel=1e-4)


def test_importance_weighted_bound_against_a_linear_gaussian_model():
    """p(z) = N(0, I), p(x|z) = N(W z + b, s^2 I): p(x) = N(b, W W' + s^2 I), p(z|x) is known."""
    w, b, s = torch.randn(4, 2).double(), torch.randn(4).double(), 0.7
    x = b + torch.randn(50, 2).double() @ w.T + s * torch.randn(50, 4).double()
    exact = MultivariateNormal(b, w @ w.T + s**2 * torch.eye(4).double()).log_prob(x)

    def log_likelihood(z):
        return Normal(b + z @ w.T, s).log_prob(x).sum(1)

    precision = torch.eye(2).double() + w.T @ w / s**2
    mean = (x - b) @ w / s**2 @ precision.inverse()
    # q is the posterior's mean with a diagonal variance, one half too wide: no longer exact
    logvar = (1.5 * precision.inverse().diagonal()).log().expand(50, 2)
    bounds = []
    for k, repeats in ((1, 300), (5, 60), (1000, 1)):
        total = 0
        for _ in range(repeats):
            draw = main_vae.importance_weighted_bound(mean, logvar, log_likelihood, k)
            assert draw.shape == (50,)
            total += draw.mean()
        bounds.append(total / repeats)
    q = MultivariateNormal(mean, torch.diag_embed(logvar.exp()))
    posterior = MultivariateNormal(mean, precision.inverse())
    elbo = exact.mean() - kl_divergence(q, posterior).mean()
    assert abs(bounds[0] - elbo) < 0.1  # k = 1 is the evidence lower bound
    assert bounds[0] < bounds[1] < bounds[2] and abs(bounds[2] - exact.mean()) < 0.01
    # where q is the posterior itself, which is diagonal for orthogonal columns, a single sample
    # gives log p(x) exactly
    w = torch.linalg.qr(w)[0] * torch.tensor([2.0, 0.5]).double()
    x = b + torch.randn(50, 4).double()
    variance = 1 / (1 + w.square().sum(0) / s**2)
    mean = (x - b) @ w / s**2 * variance
    exact = MultivariateNormal(b, w @ w.T + s**2 * torch.eye(4).double()).log_prob(x)
    logvar = variance.log().expand(50, 2)
    bound = main_vae.importance_weighted_bound(mean, logvar, log_likelihood, 1)
    assert torch.allclose(bound, exact)


def test_the_bound_of_the_test_images_equals_an_independent_computation(tiny):
    dicts = tiny(main_vae, num_epochs=0, **{**SMALL, "iwae_samples": 4})
    trainer = main_vae.main(*dicts)
    x = trainer.test.pixels.flatten(1) / 255
    torch.manual_seed(1)
    before = torch.get_rng_state()
    bound = trainer.estimate_log_likelihood()
    assert torch.get_rng_state().equal(before)
    log_weights = []
    with torch.no_grad():
        mu, logvar = trainer.encoder(x)
        q = Normal(mu, (logvar / 2).exp())
        for _ in range(4):
            z = q.sample()
            coins = Bernoulli(logits=trainer.decoder(z), validate_args=False)
            ratio = STANDARD.log_prob(z) - q.log_prob(z)
            log_weights.append(coins.log_prob(x).sum(1) + ratio.sum(1))
    expected = torch.stack(log_weights).double().logsumexp(0).mean() - torch.tensor(4.0).log()
    assert bound == pytest.approx(expected.item(), rel=1e-5)


def test_a_short_run_writes_the_promised_files_and_learns(tiny, tmp_path, capsys):
    settings = {**SMALL, "iwae_samples": 5, "batch_size": 50}
    trainer = main_vae.main(*tiny(main_vae, num_epochs=4, **settings))
    names = {"history.csv", "checkpoint.pt", "run.html"}
    for epoch in (1, 4):
        names |= {f"generated_image_epoch_{epoch}.png", f"reconstruction_epoch_{epoch}.png"}
        names |= {f"train_loss_curve_{epoch}.png", f"weights_epoch_{epoch}.pt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    history = read_history(tmp_path / "out")
    columns = ["epoch", "data", "loss", "reconstruction", "KL", "test loss", "test reconstruction"]
    columns += ["test KL", "active latents", "bound on log p(x)"]
    assert list(history[0]) == columns
    losses = [float(row["loss"]) for row in history]
    test_losses = [float(row["test loss"]) for row in history]
    assert losses == sorted(losses, reverse=True)
    assert test_losses[3] < 215 and test_losses[0] - test_losses[3] > 2
    bounds = [row["bound on log p(x)"] for row in history]
    assert bounds[:3] == ["", "", ""]
    assert -test_losses[3] < float(bounds[3]) < -test_losses[3] + 30
    assert f"log p(x) >= {float(bounds[3]):.3f} nats" in capsys.readouterr().out
    encoder, decoder = main_vae.load_model(tmp_path / "out" / "weights_epoch_4.pt")
    assert flat(encoder).equal(flat(trainer.encoder))
    assert flat(decoder).equal(flat(trainer.decoder))
    x, _ = trainer.test.batch(torch.arange(4))
    assert encoder(x)[0].equal(encoder(x.flatten(1))[0])  # flat or not
    assert not encoder.training and not decoder.training


def test_pictures_show_what_the_decoder_draws(tiny, tmp_path, monkeypatch):
    curves = []
    monkeypatch.setattr(common, "save_curves", lambda *inputs: curves.append(inputs))
    trainer = main_vae.main(*tiny(main_vae, num_epochs=2, **SMALL))
    folder = tmp_path / "out"
    some = torch.linspace(0, 499, 50).long()
    originals = trainer.test.pixels[some] / 255
    for epoch in (1, 2):
        encoder, decoder = main_vae.load_model(folder / f"weights_epoch_{epoch}.pt")
        shown = tiles(folder / f"reconstruction_epoch_{epoch}.png", 28, columns=10, count=100)
        rows = shown.reshape(5, 2, 10, 28, 28, 3)
        upper, lower = rows[:, 0].reshape(50, 28, 28, 3), rows[:, 1].reshape(50, 28, 28, 3)
        assert (upper == grey_levels(originals, low=0.0)).all()
        rebuilt = decoder.sample(encoder(originals)[0]).unflatten(1, (1, 28, 28))
        assert (lower == grey_levels(rebuilt, low=0.0)).all()
        shown = tiles(folder / f"generated_image_epoch_{epoch}.png", 28, columns=10, count=100)
        samples = decoder.sample(trainer.fixed_z).unflatten(1, (1, 28, 28))
        assert (shown == grey_levels(samples, low=0.0)).all()
        history, panels, title, path = curves[epoch - 1]
        assert history is trainer.run.history and "digits" in title
        assert path == folder / f"train_loss_curve_{epoch}.png"
        drawn = [column for columns in panels.values() for column in columns]
        kinds = ["loss", "reconstruction", "KL"]
        assert sorted(drawn) == sorted(kinds + [f"test {kind}" for kind in kinds])


def test_a_class_left_out_of_training_is_recorded(tiny, tmp_path, without_curves):
    trainer = main_vae.main(*tiny(main_vae, num_epochs=1, exclude_class=4, **SMALL))
    for images, share in ((trainer.train, 450), (trainer.test, 50)):
        assert images.labels.bincount().tolist() == [share] * 4 + [0] + [share] * 5
    assert read_history(tmp_path / "out")[0]["data"] == "digits without 4"
    weights = torch.load(tmp_path / "out" / "weights_epoch_1.pt", weights_only=True)
    assert weights["dataset_kwargs"]["exclude_class"] == 4
    with pytest.raises(common.BadInput, match="exclude_class was 4, is -1"):
        main_vae.main(*tiny(main_vae, num_epochs=2, **SMALL))


def test_the_bound_changes_nothing_and_a_continued_run_ends_as_one_that_was_not_stopped(
    tiny, tmp_path, without_curves
):
    ends = {}
    for name, parts, samples in (("whole", [3], 3), ("parts", [1, 3], 3), ("without", [3], 0)):
        folder = tmp_path / name
        settings = {**SMALL, "iwae_samples": samples, "output_dir": str(folder)}
        for epochs in parts:
            main_vae.main(*tiny(main_vae, num_epochs=epochs, **settings))
        rows = read_history(folder)
        bounds = [row.pop("bound on log p(x)", "") for row in rows]
        weights = (folder / "weights_epoch_3.pt").read_bytes()
        ends[name] = rows, weights, bounds
    assert ends["whole"][:2] == ends["parts"][:2] == ends["without"][:2]
    assert [bool(bound) for bound in ends["whole"][2]] == [False, False, True]
    assert [bool(bound) for bound in ends["parts"][2]] == [True, False, True]
    assert ends["whole"][2][2] == ends["parts"][2][2]
    assert ends["without"][2] == ["", "", ""]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image_size": 785}, "image_size must be a square number"),
        ({"normalize": True}, "normalize must be false"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"iwae_samples": -1}, "iwae_samples must be at least 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"precision": "half"}, "precision must be one of auto"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(wrong, message, tiny, tmp_path):
    with pytest.raises(common.BadInput, match=message):
        main_vae.main(*tiny(main_vae, **{**SMALL, **wrong}))
    assert not list(tmp_path.iterdir())
