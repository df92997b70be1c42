import copy
import os
import signal
from pathlib import Path

import pytest
import torch

import common
import main_gan
import training


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


@pytest.fixture
def trainer(tiny):
    return main_gan.main(*tiny(main_gan, num_epochs=0))


def test_sizes_of_the_default_networks(trainer):
    assert flat(trainer.generator).numel() == 283_920 and flat(trainer.discriminator).numel() == 267_009
    images = trainer.generator(torch.randn(5, 64))
    assert images.shape == (5, 784) and images.abs().max() <= 1
    assert trainer.discriminator(images).shape == (5,)
    assert trainer.sample(torch.randn(3, 64)).shape == (3, 1, 28, 28)


def test_losses_equal_the_paper_s_logarithms():
    real, fake = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    d_real, d_fake = real.sigmoid(), fake.sigmoid()
    # eq. (1) of Goodfellow et al. 2014 with hard targets, then with smoothed ones; the heuristic loss of section 3
    by_hand = -(d_real.log().mean() + (1 - d_fake).log().mean())
    assert torch.allclose(main_gan.discriminator_loss(real, fake, 1.0, 0.0), by_hand)
    by_hand = -(0.9 * d_real.log() + 0.1 * (1 - d_real).log() + 0.1 * d_fake.log() + 0.9 * (1 - d_fake).log()).mean()
    assert torch.allclose(main_gan.discriminator_loss(real, fake, 0.9, 0.1), by_hand)
    assert torch.allclose(main_gan.generator_loss(fake), -d_fake.log().mean())
    far = torch.tensor([-200.0, 200.0])
    assert main_gan.discriminator_loss(far, far, 0.9, 0.1).isfinite() and main_gan.generator_loss(far).isfinite()


def test_a_step_is_d_then_g_each_moved_by_its_own_loss_alone(trainer):
    """The step against the textbook's: separate passes, all gradients, plain Adam."""
    g, d = copy.deepcopy(trainer.generator), copy.deepcopy(trainer.discriminator)
    g_adam = torch.optim.Adam(g.parameters(), lr=0.0002, betas=(0.5, 0.999))
    d_adam = torch.optim.Adam(d.parameters(), lr=0.0002, betas=(0.5, 0.999))
    real = torch.rand(8, 784) * 2 - 1
    bce = torch.nn.BCEWithLogitsLoss()
    torch.manual_seed(1)
    for _ in range(3):
        fake = g(torch.randn(8, 64))
        d_adam.zero_grad()
        d_loss = bce(d(real), torch.full((8,), 0.9)) + bce(d(fake.detach()), torch.full((8,), 0.1))
        d_loss.backward()
        d_adam.step()
        g_adam.zero_grad()
        g_loss = bce(d(fake), torch.ones(8))
        g_loss.backward()
        g_adam.step()
    torch.manual_seed(1)
    for _ in range(3):
        values = trainer.step(real)
    assert torch.allclose(flat(trainer.discriminator), flat(d), atol=1e-6)
    assert torch.allclose(flat(trainer.generator), flat(g), atol=1e-6)
    assert torch.allclose(values["discriminator loss"], d_loss) and torch.allclose(values["generator loss"], g_loss)


def test_each_optimiser_moves_its_own_network_alone(trainer):
    g, d = flat(trainer.generator), flat(trainer.discriminator)
    trainer.generator_optimizer.step = lambda: None
    trainer.step(torch.rand(8, 784))
    assert flat(trainer.generator).equal(g) and not flat(trainer.discriminator).equal(d)
    d = flat(trainer.discriminator)
    trainer.discriminator.zero_grad()
    trainer.discriminator_optimizer.step = trainer.discriminator.zero_grad  # so that what G's step adds would be seen
    trainer.generator_optimizer.step = lambda: torch.optim.Adam.step(trainer.generator_optimizer)
    trainer.step(torch.rand(8, 784))
    assert not flat(trainer.generator).equal(g) and flat(trainer.discriminator).equal(d)
    assert all(p.grad is None for p in trainer.discriminator.parameters()), "no gradient for D in G's step"


def test_short_run_writes_the_promised_files_and_learns(tiny, tmp_path):
    trainer = main_gan.main(*tiny(main_gan, num_epochs=3, sample_every=2, batch_size=16))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "history.csv", "checkpoint.pt", *(f"generated_image_epoch_{e}.png" for e in (1, 2, 3)),
        *(f"train_loss_curve_{e}.png" for e in (1, 2, 3)), *(f"weights_epoch_{e}.pt" for e in (1, 2, 3))}
    history = trainer.run.history
    assert list(history) == ["epoch", "data", "discriminator loss", "generator loss", "D(x)", "D(G(z))", "diversity"]
    assert history["data"] == ["digits"] * 3
    assert history["discriminator loss"][0] < 1.35  # 1.386 for a D that knows nothing
    # the generator has learnt where a digit's ground is: the corners are black
    samples = trainer.sample(trainer.fixed_z)
    assert samples[:, :, :3, :3].mean() < -0.9 < samples[:, :, 10:18, 10:18].mean()
    assert history["diversity"][-1] > 0.3


def test_weights_give_the_same_samples(tiny, tmp_path):
    trainer = main_gan.main(*tiny(main_gan, num_epochs=1))
    generator = main_gan.load_generator(tmp_path / "out" / "weights_epoch_1.pt")
    z = torch.randn(4, 64)
    assert generator(z).unflatten(1, (1, 28, 28)).equal(trainer.sample(z)) and not generator.training
    with pytest.raises(common.BadInput, match="there is no file"):
        main_gan.load_generator(tmp_path / "nothing.pt")
    with pytest.raises(common.BadInput, match="checkpoint.pt holds no generator"):
        main_gan.load_generator(tmp_path / "out" / "checkpoint.pt")


def test_other_sizes_are_squares(tiny):
    trainer = main_gan.main(*tiny(main_gan, num_epochs=0, image_size=256))
    assert trainer.sample(torch.randn(2, 64)).shape == (2, 1, 16, 16)
    with pytest.raises(common.BadInput, match="785 is no square number"):
        main_gan.main(*tiny(main_gan, image_size=785))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_stopped_in_mid_epoch_it_continues_to_the_same_bytes(number, status, tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    main_gan.main(*tiny(main_gan, num_epochs=2, output_dir="out", data_dir="data"))
    monkeypatch.chdir(tmp_path / "parts")
    step, count = main_gan.Trainer.step, iter(range(1000))

    def interrupted(trainer, real):
        if next(count) in (7, 100):  # in the first epoch of 90 steps, and again in the second
            os.kill(os.getpid(), number)
        return step(trainer, real)

    monkeypatch.setattr(main_gan.Trainer, "step", interrupted)
    before = signal.getsignal(number)
    for resume in (False, True):
        with pytest.raises(status) as stopped:
            main_gan.main(*tiny(main_gan, num_epochs=2, output_dir="out", data_dir="data", resume=resume))
        told = f"{stopped.value} {capsys.readouterr().err}"
        assert "the same command again" in told and ("without --resume false" in told) == (not resume)
        assert signal.getsignal(number) == before
    main_gan.main(*tiny(main_gan, num_epochs=2, output_dir="out", data_dir="data"))
    names = ["history.csv", "checkpoint.pt", "weights_epoch_2.pt", "generated_image_epoch_2.png"]
    for name in names:
        whole, parts = ((tmp_path / run / "out" / name).read_bytes() for run in ("whole", "parts"))
        assert whole == parts, name


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_stays_flat(tiny, monkeypatch):
    resident, end_epoch = [], training.Run.end_epoch

    def end(run, **extra):
        end_epoch(run, **extra)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]))

    monkeypatch.setattr(training.Run, "end_epoch", end)
    main_gan.main(*tiny(main_gan, num_epochs=20, batch_size=1500, sample_every=4, generator_hidden_size=8,
                        discriminator_hidden_size=8))
    assert len(resident) == 20
    assert resident[-1] < 1.02 * resident[1]
