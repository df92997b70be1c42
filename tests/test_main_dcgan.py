import copy
import csv

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import common
import fid
import main_dcgan

SMALL = dict(feature_maps=4, latent_dim=8, image_size=16)


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def rows(folder):
    with open(folder / "history.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def mean_of_pairs(images):
    """Mean distance of two different images, by all n (n - 1) ordered pairs."""
    points = images.flatten(1).double()
    lengths = points.square().sum(1)
    squares = lengths[:, None] + lengths - 2 * points @ points.T
    count = len(points)
    return squares.clamp(min=0).sqrt().fill_diagonal_(0).sum().item() / (count * (count - 1))


@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_at_every_size(size, channels):
    generator = main_dcgan.Generator(8, 4, channels, size)
    discriminator = main_dcgan.Discriminator(4, channels, size)
    images = generator(torch.randn(2, 8))
    assert images.shape == (2, channels, size, size) and images.abs().max() <= 1
    assert discriminator(images).shape == (2,)


def test_the_default_networks_are_the_described_ones():
    generator = main_dcgan.Generator(100, 64, 3, 32)
    discriminator = main_dcgan.Discriminator(64, 3, 32)
    ups = [m for m in generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    downs = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    shapes = [tuple(m.weight.shape) for m in ups]
    assert shapes == [(100, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 4, 4)]
    shapes = [tuple(m.weight.shape) for m in downs]
    assert shapes == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (1, 256, 4, 4)]
    # batch norm after all layers but the last of G, and after all but the first and last of D
    assert sum(isinstance(m, nn.BatchNorm2d) for m in generator.modules()) == 3
    assert sum(isinstance(m, nn.BatchNorm2d) for m in discriminator.modules()) == 2
    assert [m.bias is None for m in ups] == [True, True, True, True]
    assert [m.bias is None for m in downs] == [False, True, True, False]
    assert abs(generator.model[0].weight.std() - 0.02) < 0.001
    assert abs(generator.model[1].weight.mean() - 1) < 0.01


@pytest.mark.parametrize(
    "key, values",
    [
        ("image_size", (20, -1, 33)),
        ("image_channels", (0, 2, 4)),
        ("latent_dim", (0,)),
        ("feature_maps", (0,)),
        ("num_epochs", (-1,)),
        ("generator_lr", (0.0, -0.1)),
        ("discriminator_lr", (0.0,)),
        ("ema_decay", (1.0, -0.1)),
        ("precision", ("half", "float16")),
        ("score_every", (-1,)),
        ("score_features", ("resnet",)),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(key, values, tiny, tmp_path):
    for value in values:
        with pytest.raises(common.BadInput, match=f"{key} must be") as caught:
            main_dcgan.main(*tiny(main_dcgan, **{key: value}))
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_losses_equal_the_paper_s_logarithms():
    real, fake = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    by_hand = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    assert torch.allclose(main_dcgan.discriminator_loss(real, fake), by_hand)
    assert torch.allclose(main_dcgan.generator_loss(fake), -fake.sigmoid().log().mean())
    far = torch.tensor([-200.0, 200.0])
    assert main_dcgan.discriminator_loss(far, far).isfinite()
    assert main_dcgan.generator_loss(far).isfinite()


def test_a_step_is_the_textbook_s(tiny):
    """Plain Adam with a rate for each network, all gradients, and the losses as logarithms."""
    rates = dict(generator_lr=0.004, discriminator_lr=0.001)
    trainer = main_dcgan.main(*tiny(main_dcgan, num_epochs=0, **rates, **SMALL))
    g, d = copy.deepcopy(trainer.generator), copy.deepcopy(trainer.discriminator)
    g_adam = torch.optim.Adam(g.parameters(), lr=0.004, betas=(0.5, 0.999))
    d_adam = torch.optim.Adam(d.parameters(), lr=0.001, betas=(0.5, 0.999))
    real = torch.rand(8, 3, 16, 16) * 2 - 1
    torch.manual_seed(1)
    for _ in range(3):
        fake = g(torch.randn(8, 8))
        d_adam.zero_grad()
        real_logits, fake_logits = d(real), d(fake.detach())
        d_loss = -(real_logits.sigmoid().log() + (1 - fake_logits.sigmoid()).log()).mean()
        d_loss.backward()
        d_adam.step()
        g_adam.zero_grad()
        g_loss = -d(fake).sigmoid().log().mean()
        g_loss.backward()
        g_adam.step()
    torch.manual_seed(1)
    for _ in range(3):
        values = trainer.step(real)
    for ours, theirs in ((trainer.generator, g), (trainer.discriminator, d)):
        expected = theirs.state_dict()
        for name, value in ours.state_dict().items():
            assert torch.allclose(value.float(), expected[name].float(), atol=2e-5), name
    assert torch.allclose(values["discriminator loss"], d_loss)
    assert torch.allclose(values["generator loss"], g_loss)
    assert torch.allclose(values["D(x)"], real_logits.sigmoid().mean())
    assert torch.allclose(values["D(G(z))"], fake_logits.sigmoid().mean())


def test_each_optimiser_moves_its_own_network_alone(tiny):
    trainer = main_dcgan.main(*tiny(main_dcgan, num_epochs=0, **SMALL))
    g, d = flat(trainer.generator), flat(trainer.discriminator)
    g_step = trainer.generator_optimizer.step
    trainer.generator_optimizer.step = lambda: None
    trainer.step(torch.rand(8, 3, 16, 16))
    assert flat(trainer.generator).equal(g) and not flat(trainer.discriminator).equal(d)
    d = flat(trainer.discriminator)
    trainer.generator_optimizer.step = g_step
    # so that gradients which G's step would add to D are seen below
    trainer.discriminator_optimizer.step = trainer.discriminator.zero_grad
    trainer.step(torch.rand(8, 3, 16, 16))
    assert not flat(trainer.generator).equal(g) and flat(trainer.discriminator).equal(d)
    assert all(p.grad is None for p in trainer.discriminator.parameters())


def test_the_learning_rate_can_be_changed_in_training(tiny):
    trainer = main_dcgan.main(*tiny(main_dcgan, num_epochs=0, **SMALL))
    trainer.generator_lr.fill_(0)
    g, d = flat(trainer.generator), flat(trainer.discriminator)
    trainer.step(torch.rand(8, 3, 16, 16))
    assert flat(trainer.generator).equal(g) and not flat(trainer.discriminator).equal(d)


def test_the_average_follows_its_formula(tiny):
    trainer = main_dcgan.main(*tiny(main_dcgan, num_epochs=0, ema_decay=0.3, **SMALL))
    expected = {k: value.clone() for k, value in trainer.ema_generator.state_dict().items()}
    for t in range(1, 5):
        trainer.step(torch.rand(8, 3, 16, 16))
        decay = min(0.3, (1 + t) / (10 + t))
        for name, value in trainer.generator.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in trainer.ema_generator.state_dict().items():
        assert "num_batches" in name or torch.allclose(value, expected[name], atol=1e-6), name


def test_without_averaging_it_is_the_generator_itself(tiny):
    trainer = main_dcgan.main(*tiny(main_dcgan, num_epochs=0, ema_decay=0.0, **SMALL))
    trainer.step(torch.rand(8, 3, 16, 16))
    assert torch.allclose(flat(trainer.ema_generator), flat(trainer.generator))


def test_short_run_writes_the_promised_files_and_learns(tiny, tmp_path):
    main_dcgan.main(*tiny(main_dcgan, num_epochs=3, sample_every=5, batch_size=100, **SMALL))
    names = {"history.csv", "checkpoint.pt", "run.html"}
    for epoch in (1, 3):
        names |= {f"generated_image_epoch_{epoch}.png", f"train_loss_curve_{epoch}.png"}
        names |= {f"weights_epoch_{epoch}.pt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    history = rows(tmp_path / "out")
    columns = ["discriminator loss", "generator loss", "D(x)", "D(G(z))", "diversity"]
    assert list(history[0]) == ["epoch", "data", *columns]
    losses = [float(row["discriminator loss"]) for row in history]
    assert losses[2] < losses[0] < 1.5
    assert float(history[2]["D(x)"]) > 0.6 > 0.4 > float(history[2]["D(G(z))"])


def test_pictures_are_of_the_saved_generator_at_the_same_latents_in_every_epoch(tiny, tmp_path):
    trainer = main_dcgan.main(*tiny(main_dcgan, batch_size=200, **SMALL))
    z = trainer.fixed_z[:64]
    for epoch in (1, 2):
        generator = main_dcgan.load_generator(tmp_path / "out" / f"weights_epoch_{epoch}.pt")
        with torch.no_grad():
            expected = (generator(z) + 1) * 127.5  # (64, 3, 16, 16)
        page = np.asarray(Image.open(tmp_path / "out" / f"generated_image_epoch_{epoch}.png"))
        page = torch.from_numpy(page[::4, ::4].copy()).permute(2, 0, 1)  # each pixel is 4 x 4
        assert page.shape == (3, 146, 146)
        for i in range(64):
            y, x = 2 + 18 * (i // 8), 2 + 18 * (i % 8)
            tile = page[:, y : y + 16, x : x + 16]
            assert (tile - expected[i]).abs().max() < 1, f"epoch {epoch}, sample {i}"


def test_diversity_is_the_distance_of_samples_over_that_of_real_images(tiny, tmp_path):
    trainer = main_dcgan.main(*tiny(main_dcgan, num_epochs=1, batch_size=500, **SMALL))
    generator = main_dcgan.load_generator(tmp_path / "out" / "weights_epoch_1.pt")
    with torch.no_grad():
        samples = generator(trainer.fixed_z)
    reals = trainer.train.pixels[:500] / 127.5 - 1
    expected = mean_of_pairs(samples) / mean_of_pairs(reals)
    assert expected < 0.5, "else the test might not tell it from its inverse"
    assert trainer.run.history[0]["diversity"] == pytest.approx(expected, rel=1e-4)


def test_samples_are_of_the_averaged_generator_in_eval_mode(tiny, tmp_path):
    trainer = main_dcgan.main(*tiny(main_dcgan, num_epochs=1, batch_size=100, **SMALL))
    generator = main_dcgan.load_generator(tmp_path / "out" / "weights_epoch_1.pt")
    z = torch.randn(4, 8)
    assert torch.allclose(generator(z), trainer.sample(z)) and not generator.training
    assert torch.allclose(trainer.sample(z)[:1], trainer.sample(z[:1]), atol=1e-6)
    assert not torch.allclose(trainer.sample(z), trainer.generator.eval()(z), atol=1e-3)
    with pytest.raises(common.BadInput, match="checkpoint.pt holds no generator"):
        main_dcgan.load_generator(tmp_path / "out" / "checkpoint.pt")


def test_bfloat16_is_for_the_networks_in_training_alone(tiny, tmp_path):
    """Weights, averages, losses and pictures stay float32, and the history has the same columns."""
    columns, dtypes = [], []
    for precision in ("float32", "bfloat16"):
        settings = dict(precision=precision, num_epochs=1, batch_size=100, **SMALL)
        folder = tmp_path / precision
        trainer = main_dcgan.main(*tiny(main_dcgan, output_dir=str(folder), **settings))
        columns.append(list(rows(folder)[0]))
        found = set()
        networks = (trainer.generator, trainer.ema_generator, trainer.discriminator)
        for network in networks:
            assert {p.dtype for p in network.parameters()} == {torch.float32}
            for module in network.modules():
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    module.register_forward_hook(lambda m, x, y, found=found: found.add(y.dtype))
        real = torch.rand(8, 3, 16, 16)
        values = trainer.step(real)
        assert {value.dtype for value in values.values()} == {torch.float32}
        dtypes.append(found.copy())
        found.clear()
        assert trainer.sample(trainer.fixed_z).dtype == torch.float32
        assert found == {torch.float32}, "pictures are not rounded"
    assert columns[0] == columns[1]
    assert dtypes == [{torch.float32}, {torch.bfloat16}]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_generator_is_judged_by_the_weights_that_d_has_just_learnt(precision, tiny):
    settings = dict(precision=precision, num_epochs=0, **SMALL)
    trainer = main_dcgan.main(*tiny(main_dcgan, **settings))
    trainer.discriminator_lr.fill_(0.02)
    before, drawn = copy.deepcopy(trainer.discriminator), []
    trainer.generator.register_forward_hook(lambda _, inputs, output: drawn.append(output))
    real = torch.rand(8, 3, 16, 16)
    loss = trainer.step(real)["generator loss"].item()
    with trainer.autocast(), torch.no_grad():
        by_new = main_dcgan.generator_loss(trainer.discriminator(drawn[0])).item()
        by_old = main_dcgan.generator_loss(before(drawn[0])).item()
    assert drawn[0].dtype == torch.float32
    assert loss == pytest.approx(by_new, rel=1e-4)
    assert loss != pytest.approx(by_old, rel=0.01)


def test_continued_run_equals_an_uninterrupted_one(tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flips = dict(horizontal_flip=True, batch_size=200, **SMALL)
    main_dcgan.main(*tiny(main_dcgan, num_epochs=2, output_dir=str(whole), **flips))
    for epochs in (1, 2):
        main_dcgan.main(*tiny(main_dcgan, num_epochs=epochs, output_dir=str(parts), **flips))
    for name in ("weights_epoch_2.pt", "history.csv", "generated_image_epoch_2.png"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_scores_come_every_few_epochs_and_change_nothing_else(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "CLASSIFIER_STEPS", 10)
    plain, scored = tmp_path / "plain", tmp_path / "scored"
    for folder, every in ((plain, 0), (scored, 2)):
        scores = dict(output_dir=str(folder), score_every=every)
        main_dcgan.main(*tiny(main_dcgan, batch_size=500, **scores, **SMALL))
    first, second = rows(scored)
    assert first["classifier distance"] == "" and float(second["classifier distance"]) > 0
    for name in ("weights_epoch_2.pt", "generated_image_epoch_2.png"):
        assert (plain / name).read_bytes() == (scored / name).read_bytes(), name


@pytest.mark.parametrize(
    "dataset_type, channels, size",
    [("mnist", 1, 28), ("fashion_mnist", 1, 28), ("cifar10", 3, 32), ("digits", 3, 28)],
)
def test_size_and_channels_follow_the_data(
    dataset_type, channels, size, tiny, tmp_path, monkeypatch, capsys
):
    nowhere = "http://127.0.0.1:9/"
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [nowhere])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [nowhere])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", nowhere)
    small = dict(feature_maps=4, latent_dim=8, num_epochs=1, batch_size=4500)
    settings = tiny(main_dcgan, dataset_type=dataset_type, **small)
    trainer = main_dcgan.main(*settings)
    assert trainer.sample(torch.randn(1, 8)).shape == (1, channels, size, size)
    generator = main_dcgan.load_generator(tmp_path / "out" / "weights_epoch_1.pt")
    assert generator(torch.randn(1, 8)).shape == (1, channels, size, size)
    assert ("THIS IS NOT" in capsys.readouterr().err) == (dataset_type != "digits")
