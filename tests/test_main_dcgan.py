import pytest
import torch

import common
import main_dcgan

SMALL = dict(feature_maps=4, latent_dim=8)


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_at_every_size(size, channels):
    generator = main_dcgan.Generator(latent_dim=8, feature_maps=4, image_channels=channels, image_size=size)
    discriminator = main_dcgan.Discriminator(feature_maps=4, image_channels=channels, image_size=size)
    images = generator(torch.randn(2, 8))
    assert images.shape == (2, channels, size, size) and images.abs().max() <= 1
    assert discriminator(images).shape == (2,)


def test_the_default_networks_are_the_described_ones():
    generator = main_dcgan.Generator(100, 64, 3, 32)
    discriminator = main_dcgan.Discriminator(64, 3, 32)
    shapes = [tuple(m.weight.shape) for m in generator.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    assert shapes == [(100, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 4, 4)]
    shapes = [tuple(m.weight.shape) for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert shapes == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (1, 256, 4, 4)]
    assert abs(generator.model[0].weight.std() - 0.02) < 0.001 and abs(generator.model[1].weight.mean() - 1) < 0.01


@pytest.mark.parametrize("size", [20, -1, 33])
def test_impossible_sizes_name_the_legal_ones(size):
    with pytest.raises(common.BadInput, match="16, 28, 32 or 64"):
        main_dcgan.Generator(8, 4, 3, size)
    with pytest.raises(common.BadInput, match="16, 28, 32 or 64"):
        main_dcgan.Discriminator(4, 3, size)


def test_losses_equal_the_paper_s_logarithms():
    real, fake = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    by_hand = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    assert torch.allclose(main_dcgan.discriminator_loss(real, fake), by_hand)
    assert torch.allclose(main_dcgan.generator_loss(fake), -fake.sigmoid().log().mean())


def test_each_optimiser_moves_its_own_network_alone(tiny):
    trainer = main_dcgan.main(*tiny(main_dcgan, num_epochs=0, **SMALL))
    g, d = flat(trainer.generator), flat(trainer.discriminator)
    g_step, d_step = trainer.generator_optimizer.step, trainer.discriminator_optimizer.step
    trainer.generator_optimizer.step = lambda: None
    trainer.step(torch.rand(8, 3, 28, 28))
    assert flat(trainer.generator).equal(g) and not flat(trainer.discriminator).equal(d)
    d = flat(trainer.discriminator)
    trainer.generator_optimizer.step = g_step
    trainer.discriminator_optimizer.step = trainer.discriminator.zero_grad
    trainer.step(torch.rand(8, 3, 28, 28))
    assert not flat(trainer.generator).equal(g) and flat(trainer.discriminator).equal(d)
    assert all(p.grad is None for p in trainer.discriminator.parameters()), "no gradient for D in G's step"
    trainer.discriminator_optimizer.step = d_step


def test_the_average_follows_its_formula(tiny):
    trainer = main_dcgan.main(*tiny(main_dcgan, num_epochs=0, ema_decay=0.3, **SMALL))
    expected = {name: value.clone() for name, value in trainer.ema_generator.state_dict().items()}
    for t in range(1, 5):
        trainer.step(torch.rand(8, 3, 28, 28))
        decay = min(0.3, (1 + t) / (10 + t))
        for name, value in trainer.generator.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in trainer.ema_generator.state_dict().items():
        assert "num_batches" in name or torch.allclose(value, expected[name], atol=1e-6), name


def test_without_averaging_it_is_the_generator_itself(tiny):
    trainer = main_dcgan.main(*tiny(main_dcgan, num_epochs=0, ema_decay=0.0, **SMALL))
    trainer.step(torch.rand(8, 3, 28, 28))
    assert torch.allclose(flat(trainer.ema_generator), flat(trainer.generator))


def test_short_run_writes_the_promised_files_and_learns(tiny, tmp_path):
    trainer = main_dcgan.main(*tiny(main_dcgan, sample_every=2, **SMALL))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "history.csv", "checkpoint.pt", *(f"generated_image_epoch_{e}.png" for e in (1, 2)),
        *(f"train_loss_curve_{e}.png" for e in (1, 2)), *(f"weights_epoch_{e}.pt" for e in (1, 2))}
    history = trainer.run.history
    assert history["discriminator loss"][-1] < history["discriminator loss"][0] < 1.5
    assert history["D(x)"][-1] > 0.6 > 0.4 > history["D(G(z))"][-1]


def test_pictures_and_weights_are_of_the_averaged_generator_in_eval_mode(tiny, tmp_path):
    trainer = main_dcgan.main(*tiny(main_dcgan, num_epochs=1, **SMALL))
    generator, z = main_dcgan.load_generator(tmp_path / "out" / "weights_epoch_1.pt"), torch.randn(4, 8)
    assert torch.allclose(generator(z), trainer.sample(z))
    assert torch.allclose(trainer.sample(z)[:1], trainer.sample(z[:1]), atol=1e-6), "a batch of one gives the same"
    assert not torch.allclose(trainer.sample(z), trainer.generator.eval()(z), atol=1e-3)


def test_continued_run_equals_an_uninterrupted_one(tiny, tmp_path):
    flips = dict(horizontal_flip=True, **SMALL)
    main_dcgan.main(*tiny(main_dcgan, num_epochs=2, output_dir=str(tmp_path / "whole"), **flips))
    for epochs in (1, 2):
        main_dcgan.main(*tiny(main_dcgan, num_epochs=epochs, output_dir=str(tmp_path / "parts"), **flips))
    for name in ("weights_epoch_2.pt", "history.csv", "generated_image_epoch_2.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


def test_distances_are_logged_every_few_epochs_and_change_nothing_else(tiny, tmp_path, monkeypatch):
    import fid

    monkeypatch.setattr(fid, "CLASSIFIER_STEPS", 10)
    plain = main_dcgan.main(*tiny(main_dcgan, output_dir=str(tmp_path / "plain"), **SMALL))
    scored = main_dcgan.main(*tiny(main_dcgan, output_dir=str(tmp_path / "scored"), score_every=2, **SMALL))
    first, second = scored.run.history["classifier distance"]
    assert first != first and second > scored.score.floor > 0  # nan where it is not measured
    assert flat(plain.generator).equal(flat(scored.generator)), "the random numbers of training are left as they were"
    assert (tmp_path / "plain" / "weights_epoch_2.pt").read_bytes() \
        == (tmp_path / "scored" / "weights_epoch_2.pt").read_bytes()


@pytest.mark.parametrize("dataset_type, channels, size", [("mnist", 1, 28), ("cifar10", 3, 32), ("digits", 3, 28)])
def test_size_and_channels_follow_the_data(dataset_type, channels, size, tiny, monkeypatch, capsys):
    import datasets

    def offline(*_):
        raise OSError("offline")

    monkeypatch.setattr(datasets, "_torchvision", offline)
    trainer = main_dcgan.main(*tiny(main_dcgan, dataset_type=dataset_type, num_epochs=0, **SMALL))
    assert trainer.sample(torch.randn(1, 8)).shape == (1, channels, size, size)
    assert ("THIS IS NOT" in capsys.readouterr().err) == (dataset_type != "digits")
