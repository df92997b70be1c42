import copy

import helpers
import numpy as np
import pytest
import torch

import common
import main_gan


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def mean_distance(images):
    """Of all pairs, one after another."""
    images = images.flatten(1).double().numpy()
    pairs = [np.linalg.norm(images[i] - images[j]) for i in range(len(images)) for j in range(i)]
    return np.mean(pairs)


@pytest.fixture
def trainer(tiny):
    return main_gan.main(*tiny(main_gan, num_epochs=0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer after two epochs, whose files are in its folder."""
    folder = tmp_path_factory.mktemp("gan") / "out"
    small = dict(batch_size=100, output_dir=str(folder), dataset_type="digits", image_size=784)
    return main_gan.main(*helpers.small_dicts(main_gan, **small))


def test_sizes_of_the_default_networks(trainer):
    assert flat(trainer.generator).numel() == 283_920
    assert flat(trainer.discriminator).numel() == 267_009
    images = trainer.generator(torch.randn(5, 64))
    assert images.shape == (5, 784) and images.abs().max() <= 1
    assert trainer.discriminator(images).shape == (5,)
    assert trainer.sample(torch.randn(3, 64)).shape == (3, 1, 28, 28)


def test_losses_equal_the_paper_s_logarithms():
    real, fake = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    d_real, d_fake = real.sigmoid(), fake.sigmoid()
    # eq. (1) of Goodfellow et al. 2014 with hard targets, then with smoothed ones
    by_hand = -(d_real.log().mean() + (1 - d_fake).log().mean())
    assert torch.allclose(main_gan.discriminator_loss(real, fake, 1.0, 0.0), by_hand)
    real_part = 0.9 * d_real.log() + 0.1 * (1 - d_real).log()
    fake_part = 0.1 * d_fake.log() + 0.9 * (1 - d_fake).log()
    by_hand = -(real_part + fake_part).mean()
    assert torch.allclose(main_gan.discriminator_loss(real, fake, 0.9, 0.1), by_hand)
    # the heuristic loss of section 3
    assert torch.allclose(main_gan.generator_loss(fake), -d_fake.log().mean())
    far = torch.tensor([-200.0, 200.0])
    assert main_gan.discriminator_loss(far, far, 0.9, 0.1).isfinite()
    assert main_gan.generator_loss(far).isfinite()


def test_a_hundred_steps_are_the_textbook_s(tiny):
    """Separate passes, all gradients, plain Adam, and for each network a rate of its own."""
    small = dict(generator_hidden_size=32, discriminator_hidden_size=32, num_epochs=0)
    rates = dict(generator_lr=0.0005, discriminator_lr=0.0001)
    labels = dict(real_label=0.8, fake_label=0.05)
    trainer = main_gan.main(*tiny(main_gan, **small, **rates, **labels))
    g, d = copy.deepcopy(trainer.generator), copy.deepcopy(trainer.discriminator)
    g_adam = torch.optim.Adam(g.parameters(), lr=0.0005, betas=(0.5, 0.999))
    d_adam = torch.optim.Adam(d.parameters(), lr=0.0001, betas=(0.5, 0.999))
    batches = torch.arange(1600).split(16)
    bce = torch.nn.BCEWithLogitsLoss()
    torch.manual_seed(1)
    for index in batches:
        real = trainer.train.pixels[index].flatten(1) / 127.5 - 1
        fake = g(torch.randn(16, 64))
        d_adam.zero_grad()
        d_loss = bce(d(real), torch.full((16,), 0.8)) + bce(
            d(fake.detach()), torch.full((16,), 0.05)
        )
        d_loss.backward()
        d_adam.step()
        g_adam.zero_grad()
        g_loss = bce(d(fake), torch.ones(16))
        g_loss.backward()
        g_adam.step()
    torch.manual_seed(1)
    for index in batches:
        values = trainer.step(trainer.train.batch(index)[0].flatten(1))
    assert torch.allclose(flat(trainer.discriminator), flat(d), atol=1e-5)
    assert torch.allclose(flat(trainer.generator), flat(g), atol=1e-5)
    assert values["discriminator loss"].item() == pytest.approx(d_loss.item(), abs=1e-5)
    assert values["generator loss"].item() == pytest.approx(g_loss.item(), abs=1e-5)


def test_each_optimiser_moves_its_own_network_alone(trainer):
    g, d = flat(trainer.generator), flat(trainer.discriminator)
    trainer.generator_optimizer.step = lambda: None
    trainer.step(torch.rand(8, 784))
    assert flat(trainer.generator).equal(g) and not flat(trainer.discriminator).equal(d)
    d = flat(trainer.discriminator)
    trainer.discriminator.zero_grad()
    # what G's step adds to D's gradients would be seen
    trainer.discriminator_optimizer.step = trainer.discriminator.zero_grad
    trainer.generator_optimizer.step = lambda: torch.optim.Adam.step(trainer.generator_optimizer)
    trainer.step(torch.rand(8, 784))
    assert not flat(trainer.generator).equal(g) and flat(trainer.discriminator).equal(d)
    assert all(p.grad is None for p in trainer.discriminator.parameters())


def test_a_short_run_learns(tiny, monkeypatch):
    monkeypatch.setattr(common, "save_curves", lambda *_: None)
    trainer = main_gan.main(*tiny(main_gan, num_epochs=2, batch_size=30, sample_every=99))
    assert trainer.run.history[0]["discriminator loss"] < 1.35  # 1.386 for a D that knows nothing
    # the generator has learnt where a digit's ground is: the corners are black
    samples = trainer.sample(trainer.fixed_z)
    assert samples[:, :, :3, :3].mean() < -0.9 < samples[:, :, 10:18, 10:18].mean()
    assert trainer.run.history[-1]["diversity"] > 0.3


def test_the_promised_files_and_columns(trained):
    both = ["generated_image_epoch_{}.png", "train_loss_curve_{}.png", "weights_epoch_{}.pt"]
    named = {name.format(epoch) for name in both for epoch in (1, 2)}
    found = {path.name for path in trained.folder.iterdir()}
    assert found == {"history.csv", "checkpoint.pt", "run.html", *named}
    columns = ["epoch", "data", "discriminator loss", "generator loss", "D(x)", "D(G(z))"]
    rows = helpers.read_history(trained.folder)
    assert [list(row) for row in rows] == 2 * [[*columns, "diversity"]]
    assert [row["epoch"] for row in rows] == ["1", "2"] and rows[0]["data"] == "digits"
    kept = [{column: str(value) for column, value in row.items()} for row in trained.run.history]
    assert rows == kept


@pytest.mark.parametrize("epoch", [1, 2])
def test_pictures_show_the_same_latents_in_every_epoch(epoch, trained):
    generator = main_gan.load_generator(trained.folder / f"weights_epoch_{epoch}.pt")
    assert not generator.training
    images = generator(trained.fixed_z[:16]).detach().view(16, 1, 28, 28)
    shown = helpers.tiles(trained.folder / f"generated_image_epoch_{epoch}.png", 28, 4, 16)
    assert np.abs(shown.astype(int) - helpers.grey_levels(images)).max() <= 1
    assert shown.std() > 10


def test_diversity_is_the_samples_mean_distance_over_the_data_s(trained):
    samples = trained.sample(trained.fixed_z)
    real = trained.train.batch(torch.arange(500))[0]
    of_samples, of_real = (torch.cdist(x.flatten(1), x.flatten(1)) for x in (samples, real))
    expected = of_samples.sum().item() / of_real.sum().item()  # as many pairs in both
    assert trained.run.history[-1]["diversity"] == pytest.approx(expected, rel=1e-4)
    assert abs(expected - 1) > 0.001  # or the inverse would do as well
    assert main_gan.mean_distance(samples[:60]) == pytest.approx(mean_distance(samples[:60]), 1e-4)
    assert main_gan.mean_distance(samples[:1].expand(5, -1, -1, -1)) == 0


def test_the_weights_say_what_is_needed_to_go_on_with_them(trained):
    weights = torch.load(trained.folder / "weights_epoch_2.pt", weights_only=True)
    assert weights["script"] == "main_gan" and weights["epoch"] == 2
    assert weights["model_kwargs"] == trained.run.model_kwargs
    data = weights["data"]
    assert (data["name"], data["dataset_type"], data["images"]) == ("digits", "digits", 4500)
    assert (data["shape"], data["normalize"]) == ([1, 28, 28], True)
    assert data["class_names"] == list("0123456789")
    with pytest.raises(common.BadInput, match="there is no file .* python main_gan.py"):
        main_gan.load_generator(trained.folder / "nothing.pt")
    with pytest.raises(common.BadInput, match="checkpoint.pt holds no generator"):
        main_gan.load_generator(trained.folder / "checkpoint.pt")


def test_other_sizes_are_squares(tiny):
    trainer = main_gan.main(*tiny(main_gan, num_epochs=0, image_size=256))
    assert trainer.sample(torch.randn(2, 64)).shape == (2, 1, 16, 16)
