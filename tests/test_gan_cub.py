import csv
import functools
import hashlib
import io
import math
import os
import signal
import tarfile

import numpy as np
import pytest
import torch
from conftest import dicts_of
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import common
import fid
import gan_cub

SMALL = {
    "feature_maps": 8,
    "latent_dim": 4,
    "batch_size": 8,
    "image_size": 16,
    "num_iterations": 8,
    "sample_every": 4,
    "d_steps": 2,
    "score_images": 0,
    "score_features": "classifier",
    "num_threads": 1,
    "device": "cpu",
    "precision": "float32",
}


@functools.lru_cache
def few_digits():
    """300 of the bundled digits, small and coloured, as a Dataset from Python."""
    train, _ = common.load_data("digits", "", image_channels=3, image_size=16, device="cpu")
    return TensorDataset(train.pixels[::15], train.labels[::15])


def small_dicts(folder, **overrides):
    """The script's five dicts, shrunk; everything is written below `folder`."""
    places = {"output_dir": str(folder / "out"), "data_dir": str(folder / "data")}
    settings = {**SMALL, **places, "dataset_type": few_digits(), **overrides}
    dicts = dicts_of(gan_cub)
    known = {key for kwargs in dicts for key in kwargs}
    assert set(settings) <= known
    for kwargs in dicts:
        for key in kwargs:
            kwargs[key] = settings.get(key, kwargs[key])
    return dicts


def save_nothing(history, panels, title, path):
    common.write(path, b"")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Empty files for curves: save_curves is common.py's and is tested there."""
    monkeypatch.setattr(common, "save_curves", save_nothing)


@pytest.fixture
def make(tmp_path):
    """make(**overrides) -> an untrained Trainer, whose next steps have learning rate 0.001."""

    def make_trainer(**overrides):
        trainer = gan_cub.main(*small_dicts(tmp_path, **{"num_iterations": 0, **overrides}))
        trainer.lr.fill_(1e-3)
        return trainer

    return make_trainer


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def count(network):
    return sum(p.numel() for p in network.parameters())


def random_images(number):
    return torch.rand(number, 3, 16, 16) * 2 - 1


# ---------------------------------------------------------------------------- networks


def test_default_networks_are_the_described_ones():
    assert count(gan_cub.Generator(128, 128, 3, 32)) == 1_204_099
    discriminator = gan_cub.Discriminator(128, 3, 32)
    assert count(discriminator) == 1_053_825
    norms = [m for m in discriminator.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not norms, "the penalty is on an image's own gradient"


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_at_every_size(size, channels):
    images = gan_cub.Generator(4, 8, channels, size)(torch.randn(2, 4))
    assert images.shape == (2, channels, size, size)
    assert images.abs().max() <= 1
    discriminator = gan_cub.Discriminator(8, channels, size)
    assert discriminator(images).shape == (2,)
    assert discriminator.blocks(images).shape == (2, 8, 8, 8), "8 x 8 at every size"


def test_upsampling_is_nearest_neighbour_before_the_convolutions():
    block = gan_cub.ResBlockUp(6).eval()
    norm1, _, conv1, norm2, _, _, conv2 = block.residual
    x = torch.randn(2, 6, 5, 7)
    inner = norm2(conv1(norm1(x).relu())).relu()
    residual = conv2(F.interpolate(inner, scale_factor=2, mode="nearest"))
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(block(x), residual + block.shortcut[0](repeated), atol=1e-6)


def test_downsampling_is_the_mean_of_2x2_before_the_convolutions():
    x = torch.randn(2, 6, 8, 4)
    mean = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))  # (N, C, H/2, 2, W/2, 2)
    down = gan_cub.ResBlockDown(6)
    _, conv1, _, _, conv2 = down.residual
    residual = conv2(F.avg_pool2d(conv1(x.relu()).relu(), 2))
    assert torch.allclose(down(x), residual + down.shortcut[1](mean), atol=1e-6)
    first = gan_cub.FirstResBlock(6, 5)
    conv1, _, _, conv2 = first.residual
    residual = conv2(F.avg_pool2d(conv1(x).relu(), 2))  # no ReLU first: dark pixels are seen
    assert torch.allclose(first(x), residual + first.shortcut[1](mean), atol=1e-6)


def test_a_block_that_keeps_the_size_adds_to_its_input():
    x = torch.randn(2, 6, 8, 4)
    block = gan_cub.ResBlock(6)
    _, conv1, _, conv2 = block.residual
    assert torch.allclose(block(x), x + conv2(conv1(x.relu()).relu()), atol=1e-6)


def test_the_discriminator_sums_over_the_pixels():
    network = gan_cub.Discriminator(8, 3, 32)
    x = torch.randn(3, 3, 32, 32)
    features = network.blocks(x).detach()
    assert features.min() >= 0
    weight = network.linear.weight.detach().numpy()[0]
    by_hand = features.numpy().sum((2, 3)) @ weight + network.linear.bias.item()
    assert np.allclose(network(x).detach().numpy(), by_hand, atol=1e-4)


# ------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("loss", gan_cub.LOSSES)
def test_losses_equal_the_papers_equations(loss):
    real, fake = np.random.RandomState(0).randn(2, 9) * 2

    def sigmoid(logits):
        return 1 / (1 + np.exp(-logits))

    d_loss, g_loss = {
        "gan": (
            -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean(),
            -np.log(sigmoid(fake)).mean(),
        ),
        "lsgan": (
            ((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2,
            ((fake - 1) ** 2).mean() / 2,
        ),
        "wgan-gp": (fake.mean() - real.mean(), -fake.mean()),
        "r3gan": (
            -np.log(sigmoid(real - fake)).mean(),
            -np.log(sigmoid(fake - real)).mean(),
        ),
    }[loss]
    discriminator_loss, generator_loss = gan_cub.LOSSES[loss]
    real, fake = torch.from_numpy(real), torch.from_numpy(fake)
    assert discriminator_loss(real, fake).item() == pytest.approx(d_loss)
    seen = (real, fake) if loss == "r3gan" else (fake,)
    assert generator_loss(*seen).item() == pytest.approx(g_loss)


@pytest.mark.parametrize("scale", [0.01, 1.0])  # a slope below 1 costs, as one above does
def test_penalty_of_a_linear_critic_is_known(scale):
    weight = scale * torch.randn(3, 8, 8, dtype=torch.float64)
    real, fake = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)

    def critic(x):
        return (x * weight).sum((1, 2, 3))

    penalty = gan_cub.gradient_penalty(critic, real, fake, torch.rand(5, 1, 1, 1))
    slope = math.sqrt((weight.numpy() ** 2).sum())
    assert penalty.item() == pytest.approx((slope - 1) ** 2, rel=1e-12)


def test_zero_centred_penalty_of_a_linear_critic_is_known():
    weight = torch.randn(3, 8, 8, dtype=torch.float64)
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    penalty = gan_cub.zero_centred_penalty(images, (images * weight).sum((1, 2, 3)) + 5)
    assert penalty.item() == pytest.approx((weight.numpy() ** 2).sum(), rel=1e-12)


def test_zero_centred_penalty_is_half_of_r1_and_r2_and_teaches_the_critic():
    images = torch.randn(6, 3, 4, 4, requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    logits = scale * images.square().sum((1, 2, 3)) / 2  # its gradient at x is scale x
    penalty = gan_cub.zero_centred_penalty(images, logits)
    squares = (images.detach().numpy() ** 2).sum((1, 2, 3))
    r1, r2 = squares[:3].mean(), squares[3:].mean()
    assert penalty.item() == pytest.approx((r1 + r2) / 2, rel=1e-5)
    (slope,) = torch.autograd.grad(penalty, scale)
    assert slope.item() == pytest.approx(r1 + r2, rel=1e-5)


def test_penalty_looks_between_one_real_and_one_generated_image():
    shares = [0.25, 1.0, 0.0]
    of_generator = torch.ones(3, 1, 1, 1, requires_grad=True)
    real, fake = torch.randn(3, 2, 4, 4), of_generator * torch.randn(3, 2, 4, 4)
    scale = torch.ones((), requires_grad=True)
    seen = []

    def critic(x):
        seen.append(x)
        return scale * x.square().sum((1, 2, 3)) / 2  # its gradient at x is scale x

    penalty = gan_cub.gradient_penalty(critic, real, fake, torch.tensor(shares).view(3, 1, 1, 1))
    for i, share in enumerate(shares):
        assert torch.allclose(seen[0][i], share * real[i] + (1 - share) * fake[i])
    norms = np.sqrt((seen[0].detach().numpy() ** 2).sum((1, 2, 3)))
    assert penalty.item() == pytest.approx(((norms - 1) ** 2).mean(), rel=1e-5)
    penalty.backward()
    by_hand = (2 * (norms - 1) * norms).mean()
    assert scale.grad.item() == pytest.approx(by_hand, rel=1e-4), "it teaches the critic"
    assert of_generator.grad is None, "its graph does not reach the generator"


def test_there_is_one_epsilon_an_image(make, monkeypatch):
    trainer = make()
    seen = []

    def penalty(critic, real, fake, epsilon):
        seen.append((fake.requires_grad, real.shape, fake.shape, epsilon))
        return critic(real).sum()

    monkeypatch.setattr(gan_cub, "gradient_penalty", penalty)
    trainer.step(random_images(16))
    assert len(seen) == 2
    for requires_grad, real_shape, fake_shape, epsilon in seen:
        assert not requires_grad
        assert real_shape == fake_shape == (8, 3, 16, 16)
        assert epsilon.shape == (8, 1, 1, 1)
        assert len(epsilon.unique()) == 8
        assert 0 <= epsilon.min() <= epsilon.max() < 1


# --------------------------------------------------------------------------- the steps


@pytest.mark.parametrize("loss", gan_cub.LOSSES)
def test_each_optimiser_moves_only_its_own_network(loss, make):
    trainer = make(loss=loss)
    g, d = flat(trainer.generator), flat(trainer.discriminator)
    trainer.discriminator_step(random_images(8))
    assert flat(trainer.generator).equal(g)
    assert not flat(trainer.discriminator).equal(d)
    assert all(p.grad is None for p in trainer.generator.parameters())
    trainer.discriminator_optimizer.zero_grad()
    d = flat(trainer.discriminator)
    trainer.generator_step(random_images(8))
    assert not flat(trainer.generator).equal(g)
    assert flat(trainer.discriminator).equal(d)
    assert all(p.grad is None for p in trainer.discriminator.parameters()), "no gradient for D"


def test_processes_share_the_gradients_of_every_step(make, monkeypatch):
    trainer = make()
    shared = []
    monkeypatch.setattr(gan_cub.training, "all_reduce_gradients", shared.append)
    trainer.step(random_images(16))
    d, g = trainer.discriminator_optimizer, trainer.generator_optimizer
    assert [optimizer is d for optimizer in shared] == [True, True, False]
    assert shared[2] is g


def loss_by_hand(loss, real_logits, fake_logits):
    ones, zeros = torch.ones(8), torch.zeros(8)
    if loss == "gan":
        real_loss = F.binary_cross_entropy(real_logits.sigmoid(), ones)
        return real_loss + F.binary_cross_entropy(fake_logits.sigmoid(), zeros)
    if loss == "lsgan":
        return F.mse_loss(real_logits, ones) / 2 + F.mse_loss(fake_logits, zeros) / 2
    if loss == "r3gan":
        return F.binary_cross_entropy((real_logits - fake_logits).sigmoid(), ones)
    return fake_logits.mean() - real_logits.mean()


def squared_slopes(critic, images):
    """The squared norm of the critic's gradient at each image, one image at a time."""
    slopes = []
    for image in images.split(1):
        x = image.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        slopes.append(gradient.square().sum())
    return torch.stack(slopes)


@pytest.mark.parametrize("penalty_weight", [0.0, 3.0])
@pytest.mark.parametrize("loss", gan_cub.LOSSES)
def test_gradients_of_a_step_equal_those_written_out(loss, penalty_weight, make):
    """D's step in one pass over both kinds equals two passes and the loss by hand."""
    trainer = make(loss=loss, penalty_weight=penalty_weight)
    real = random_images(8)
    d = trainer.discriminator
    trainer.lr.fill_(0)
    torch.manual_seed(5)
    values = trainer.discriminator_step(real)
    assert ("gradient penalty" in values) == (penalty_weight > 0)
    measured = [p.grad.clone() for p in d.parameters()]
    torch.manual_seed(5)
    fake = trainer.generator(torch.randn(8, 4)).detach()
    value = loss_by_hand(loss, d(real), d(fake))
    if loss == "wgan-gp":
        epsilon = torch.rand(8, 1, 1, 1)
        squares = squared_slopes(d, epsilon * real + (1 - epsilon) * fake)
        value = value + penalty_weight * (squares.sqrt() - 1).square().mean()
    else:
        r1 = penalty_weight / 2 * squared_slopes(d, real).mean()
        r2 = penalty_weight / 2 * squared_slopes(d, fake).mean()
        value = value + r1 + r2
    expected = torch.autograd.grad(value, list(d.parameters()))
    for one, other in zip(measured, expected):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-3)


def test_the_generator_of_r3gan_is_compared_with_the_real_images(make):
    trainer = make(loss="r3gan")
    real = random_images(8)
    trainer.lr.fill_(0)
    torch.manual_seed(5)
    measured = trainer.generator_step(real)
    torch.manual_seed(5)
    d, fake = trainer.discriminator, trainer.generator(torch.randn(8, 4))
    by_hand = torch.log(1 + torch.exp(d(real) - d(fake))).mean()
    assert measured.item() == pytest.approx(by_hand.item(), rel=1e-5)
    expected = torch.autograd.grad(by_hand, list(trainer.generator.parameters()))
    for p, gradient in zip(trainer.generator.parameters(), expected):
        assert torch.allclose(p.grad, gradient, atol=1e-5, rtol=1e-3)


def test_the_generator_sees_the_last_real_batch_of_the_step(make, monkeypatch):
    trainer = make(d_steps=2)
    real, seen = random_images(16), []
    generator_step = gan_cub.Trainer.generator_step

    def look(self, images):
        seen.append(images.clone())
        return generator_step(self, images)

    monkeypatch.setattr(gan_cub.Trainer, "generator_step", look)
    trainer.step(real)
    assert len(seen) == 1 and seen[0].equal(real[8:])


@pytest.mark.parametrize(
    "loss, d_steps, penalty_weight",
    [("gan", 5, 0), ("lsgan", 5, 0), ("wgan-gp", 5, 10), ("r3gan", 1, 1)],
)
def test_each_loss_has_settings_of_its_own_which_a_key_changes(loss, d_steps, penalty_weight, make):
    asked = dict(loss=loss, sample_every=30)
    trainer = make(**asked, d_steps=0, penalty_weight=-1.0)
    assert (trainer.d_steps, trainer.penalty_weight) == (d_steps, penalty_weight)
    assert trainer.train.batch_size == 8 * d_steps
    trainer = make(**asked, d_steps=3, penalty_weight=-1.0)
    assert (trainer.d_steps, trainer.penalty_weight) == (3, penalty_weight)
    trainer = make(**asked, d_steps=0, penalty_weight=0.0)
    assert (trainer.d_steps, trainer.penalty_weight) == (d_steps, 0)


def test_a_loss_that_suits_itself_is_the_default():
    defaults = gan_cub.trainer_kwargs
    assert (defaults["d_steps"], defaults["penalty_weight"]) == (0, -1)
    assert list(gan_cub.LOSS_DEFAULTS) == list(gan_cub.LOSSES)


def test_adam_has_no_momentum_and_second_moments_of_0_9(make):
    """Two steps of each network equal Adam written out with betas 0 and 0.9."""
    trainer = make()
    steps = {
        "discriminator": lambda: trainer.discriminator_step(random_images(8)),
        "generator": lambda: trainer.generator_step(random_images(8)),
    }
    for name, step in steps.items():
        network = getattr(trainer, name)
        expected = flat(network)
        second_moment = torch.zeros_like(expected)
        for t in (1, 2):
            step()
            gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
            second_moment = 0.9 * second_moment + 0.1 * gradient**2
            expected -= 1e-3 * gradient / ((second_moment / (1 - 0.9**t)).sqrt() + 1e-8)
        assert torch.allclose(flat(network), expected, atol=1e-6), name


def test_the_average_follows_its_formula(make):
    trainer = make(ema_decay=0.3, num_iterations=0)
    averaged = trainer.ema_generator.state_dict()
    expected = {name: value.clone() for name, value in averaged.items()}
    for t in range(1, 5):
        trainer.lr.fill_(1e-3)
        trainer.step(random_images(16))
        decay = min(0.3, (1 + t) / (10 + t))
        for name, value in trainer.generator.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in averaged.items():
        assert "num_batches" in name or torch.allclose(value, expected[name], atol=1e-6), name


@pytest.mark.parametrize("loss", gan_cub.LOSSES)
def test_each_network_learns_against_the_other_as_it_stands(loss, make):
    trainer = make(loss=loss)
    trainer.lr.fill_(2e-3)
    real, _ = trainer.train.batch(torch.arange(32))
    rows = [trainer.discriminator_step(real) for _ in range(30)]
    assert rows[-1]["discriminator loss"] < rows[0]["discriminator loss"] - 0.1
    assert rows[-1]["real logit"] > rows[-1]["fake logit"] + 0.5
    losses = [trainer.generator_step(real).item() for _ in range(30)]
    assert losses[-1] < losses[0] - 0.1


def dtypes_of_a_step(trainer):
    """The types that the convolutions of both networks give out during a step."""
    seen = set()

    def look(module, inputs, output):
        seen.add(output.dtype)

    for network in (trainer.generator, trainer.discriminator):
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(look)
    values = trainer.step(random_images(16))
    assert {value.dtype for value in values.values()} == {torch.float32}
    return seen


def test_bfloat16_is_used_when_asked_for_and_teaches_both_networks(make):
    assert dtypes_of_a_step(make()) == {torch.float32}
    trainer = make(precision="bfloat16", resume=False)
    g, d = flat(trainer.generator), flat(trainer.discriminator)
    assert dtypes_of_a_step(trainer) == {torch.bfloat16}
    assert not flat(trainer.generator).equal(g)
    assert not flat(trainer.discriminator).equal(d)
    with trainer.autocast():
        assert trainer.discriminator(torch.ones(2, 3, 16, 16)).abs().min() > 0
        for p in trainer.discriminator.parameters():
            p.data.zero_()
        after = trainer.discriminator(torch.ones(2, 3, 16, 16))
        assert after.abs().max() == 0, "a step sees the weights as they are"


# --------------------------------------------------------------------------- whole runs


def read_history(folder):
    with open(folder / "history.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def record_steps(monkeypatch, interrupt_at=None):
    """A list of (images, rate) for each step of D and ("G", images) for G's; perhaps a Ctrl-C."""
    events = []
    d_step, g_step = gan_cub.Trainer.discriminator_step, gan_cub.Trainer.generator_step

    def discriminator_step(self, real):
        rate = self.discriminator_optimizer.param_groups[0]["lr"].item()
        assert rate == self.generator_optimizer.param_groups[0]["lr"].item()
        events.append((len(real), round(rate, 6)))
        return d_step(self, real)

    def generator_step(self, real):
        events.append(("G", len(real)))
        if len(events) == interrupt_at:
            signal.raise_signal(signal.SIGINT)
        return g_step(self, real)

    monkeypatch.setattr(gan_cub.Trainer, "discriminator_step", discriminator_step)
    monkeypatch.setattr(gan_cub.Trainer, "generator_step", generator_step)
    return events


SCHEDULE = []  # of the run below: three steps of D for one of G, at rates that fall to 0
for rate in (0.1, 0.075, 0.05, 0.025):
    SCHEDULE += [(8, rate)] * 3 + [("G", 8)]


def test_generator_every_d_steps_and_learning_rate_falls_to_zero(tmp_path, monkeypatch):
    events = record_steps(monkeypatch)
    settings = dict(num_iterations=12, sample_every=6, d_steps=3, lr=0.1)
    trainer = gan_cub.main(*small_dicts(tmp_path, **settings))
    assert events == SCHEDULE
    assert trainer.lr.item() == 0


@pytest.mark.parametrize("loss", ["wgan-gp", "r3gan"])
def test_continued_run_equals_an_uninterrupted_one(loss, tmp_path, monkeypatch):
    settings = dict(num_iterations=12, sample_every=6, d_steps=3, lr=0.1, loss=loss)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    gan_cub.main(*small_dicts(whole, **settings))
    with monkeypatch.context() as patch:
        events = record_steps(patch, interrupt_at=12)  # in the middle of the second period
        with pytest.raises(KeyboardInterrupt):
            gan_cub.main(*small_dicts(parts, **settings))
        assert not (parts / "out" / "weights_iteration_12.pt").exists()
        gan_cub.main(*small_dicts(parts, **settings))
    assert events == SCHEDULE, "no step is lost, and none is taken twice"
    for path in (whole / "out").iterdir():
        other = parts / "out" / path.name
        if path.suffix in (".csv", ".png"):
            assert path.read_bytes() == other.read_bytes(), path.name
        elif path.name.startswith("weights"):
            one = common.load_weights(path, "gan_cub", "generator")["generator"]
            two = common.load_weights(other, "gan_cub", "generator")["generator"]
            assert all(value.equal(two[name]) for name, value in one.items()), path.name


def test_the_schedule_may_not_change_when_a_run_is_continued(tmp_path):
    gan_cub.main(*small_dicts(tmp_path))
    with pytest.raises(common.BadInput, match="num_iterations was 8, is 12"):
        gan_cub.main(*small_dicts(tmp_path, num_iterations=12))
    with pytest.raises(common.BadInput, match="steps an epoch was 2, is 4"):
        gan_cub.main(*small_dicts(tmp_path, sample_every=8))


def test_short_run_writes_the_promised_files(tmp_path):
    trainer = gan_cub.main(*small_dicts(tmp_path))
    assert trainer.train.shuffle
    out = tmp_path / "out"
    expected = {"history.csv", "checkpoint.pt", "run.html", "train_loss_curve.png"}
    for i in (4, 8):
        expected |= {f"samples_{i}.png", f"interpolations_{i}.png", f"weights_iteration_{i}.pt"}
    assert {path.name for path in out.iterdir()} == expected, "without scores none is the best"
    rows = read_history(out)
    assert list(rows[0])[0] == "iteration"
    assert [row["iteration"] for row in rows] == ["4", "8"]
    assert "gradient penalty" in rows[0]
    generator, z = gan_cub.load_generator(out / "weights_iteration_8.pt"), torch.randn(3, 4)
    assert torch.allclose(generator(z), trainer.sample(z), atol=1e-5)
    plain = trainer.generator.eval()(z)
    assert not torch.allclose(plain, trainer.sample(z), atol=1e-4), "the average, not G itself"
    some = trainer.train.batch(torch.arange(100))[0]
    diversity = gan_cub.mean_distance(trainer.sample(trainer.fixed_z)) / gan_cub.mean_distance(some)
    assert float(rows[1]["diversity"]) == pytest.approx(diversity, rel=1e-4)
    assert_pictures_show(out, trainer)


def assert_pictures_show(out, trainer):
    """The first picture holds the fixed samples, the second a plane swept from -1 to 1."""
    plane = trainer.fixed_z[:1].repeat(100, 1).view(10, 10, 4)
    plane[:, :, 0] = torch.linspace(-1, 1, 10)[:, None]
    plane[:, :, 1] = torch.linspace(-1, 1, 10)[None, :]
    drawn = {"samples": trainer.fixed_z, "interpolations": plane.view(100, 4)}
    for name, z in drawn.items():
        common.save_grid(trainer.sample(z), out / "expected.png", columns=10)
        expected = np.asarray(Image.open(out / "expected.png"), dtype=int)
        picture = np.asarray(Image.open(out / f"{name}_8.png"), dtype=int)
        assert np.abs(picture - expected).max() <= 1, name


def test_grey_data_are_trained_on_in_grey(tmp_path, monkeypatch):
    load_data = common.load_data

    def bundled(dataset_type, data_dir, **settings):
        return load_data("digits", data_dir, **settings)

    monkeypatch.setattr(common, "load_data", bundled)
    settings = dict(dataset_type="mnist", num_iterations=4)
    trainer = gan_cub.main(*small_dicts(tmp_path, **settings))
    assert trainer.train.pixels.shape[1:] == (1, 16, 16)
    generator = gan_cub.load_generator(tmp_path / "out" / "weights_iteration_4.pt")
    assert generator(torch.randn(2, 4)).shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("num_iterations", 10, "num_iterations must be a multiple of sample_every, 4"),
        ("num_iterations", -4, "num_iterations must be at least 0"),
        ("d_steps", 3, "sample_every must be a multiple of d_steps, 3"),
        ("d_steps", -1, "d_steps must be at least 1, or 0 for the loss's own"),
        ("sample_every", 0, "sample_every must be at least 1"),
        ("loss", "wgan", "loss must be one of gan, lsgan, wgan-gp, r3gan"),
        ("image_size", 28, "image_size must be 16, 32 or 64"),
        ("latent_dim", 1, "latent_dim must be at least 2"),
        ("feature_maps", 0, "feature_maps must be at least 1"),
        ("lr", 0.0, "lr must be above 0"),
        ("penalty_weight", -0.5, "penalty_weight must be at least 0, or -1"),
        ("ema_decay", 1.0, "ema_decay must be at least 0 and below 1"),
        ("precision", "half", "precision must be one of"),
        ("score_features", "vgg", "score_features must be one of"),
        ("score_images", 1, "score_images must be at least 2, or 0"),
        ("experiment", "all", "experiment must be one of none, losses, r3gan"),
    ],
)
def test_bad_settings_end_before_any_work(key, value, message, tmp_path):
    with pytest.raises(common.BadInput, match=message):
        gan_cub.main(*small_dicts(tmp_path, **{key: value}))
    assert not (tmp_path / "out").exists()


def test_the_d_steps_of_a_loss_must_fit_too(tmp_path):
    """sample_every is 4 here, which the five steps of wgan-gp do not divide."""
    with pytest.raises(common.BadInput, match="sample_every must be a multiple of d_steps, 5"):
        gan_cub.main(*small_dicts(tmp_path, d_steps=0))


# ------------------------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder and the trainers of a small experiment, which are scored by a classifier."""
    folder = tmp_path_factory.mktemp("losses")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "CLASSIFIER_STEPS", 5)
        patch.setattr(common, "save_curves", save_nothing)
        dicts = small_dicts(folder, experiment="losses", score_images=20)
        return folder, gan_cub.main(*dicts)


def test_experiment_compares_the_losses(compared):
    folder, trainers = compared
    assert list(trainers) == ["gan", "lsgan", "wgan-gp", "r3gan"]
    with open(folder / "out" / "losses.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    for row, (loss, trainer) in zip(table, trainers.items()):
        assert row["setting"] == trainer.loss == loss
        history = read_history(folder / "out" / loss)
        scores = {float(line["classifier distance"]): line["iteration"] for line in history}
        assert float(row["best classifier distance"]) == pytest.approx(min(scores))
        assert row["at iteration"] == scores[min(scores)]
        assert float(row["last classifier distance"]) == list(scores)[-1]
    picture = np.asarray(Image.open(folder / "out" / "losses.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20_000, "it shows the samples"


def test_the_ablation_takes_the_halves_of_r3gan_apart(tmp_path):
    trainers = gan_cub.main(*small_dicts(tmp_path, experiment="r3gan", num_iterations=0))
    settings = {}
    for name, trainer in trainers.items():
        settings[name] = (trainer.loss, trainer.penalty_weight, trainer.d_steps)
    assert settings == {
        "pairs": ("r3gan", 0, 1),
        "penalties": ("gan", 1, 1),
        "both": ("r3gan", 1, 1),
    }


def test_an_experiment_that_is_done_is_only_drawn_again(compared, capsys, monkeypatch):
    monkeypatch.setattr(fid, "CLASSIFIER_STEPS", 5)  # the classifier of the fixture
    folder, _ = compared
    before = (folder / "out" / "losses.csv").read_bytes()
    dicts = small_dicts(folder, experiment="losses", score_images=20)
    gan_cub.main(*dicts)
    assert capsys.readouterr().out.count("iteration 8 is trained already") == 4
    assert (folder / "out" / "losses.csv").read_bytes() == before


def test_scoring_changes_nothing_else(compared, tmp_path):
    _, trainers = compared
    plain = gan_cub.main(*small_dicts(tmp_path))
    assert "classifier distance" not in plain.run.history[-1]
    assert "classifier distance" in trainers["wgan-gp"].run.history[-1]
    assert flat(plain.generator).equal(flat(trainers["wgan-gp"].generator))


class GivenScores:
    """In place of fid.Scorer: a score without features, the next one of a list."""

    name, num_images = "FID", 20
    scores = []

    def __init__(self, train, features, num_images):
        self.scores = list(GivenScores.scores)

    def __call__(self, generate):
        images = generate(torch.arange(20))
        assert images.shape == (20, 3, 16, 16)
        return {"FID": self.scores.pop(0)}


def test_best_and_last_weights_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "Scorer", GivenScores)
    monkeypatch.setattr(GivenScores, "scores", [5.0, 3.0, 4.0])
    gan_cub.main(*small_dicts(tmp_path, num_iterations=12, score_images=20))
    out = tmp_path / "out"
    epochs = {}
    for name in ("weights_best.pt", "weights_iteration_8.pt", "weights_iteration_12.pt"):
        epochs[name] = common.load_weights(out / name, "gan_cub", "generator")["generator"]
    best = epochs["weights_best.pt"]
    for name, value in epochs["weights_iteration_8.pt"].items():
        assert value.equal(best[name])
    assert not epochs["weights_iteration_12.pt"]["model.0.weight"].equal(best["model.0.weight"])
    assert [row["FID"] for row in read_history(out)] == ["5.0", "3.0", "4.0"]
    assert (out / "fid_vs_iterations.png").exists()


def test_a_run_that_was_scored_otherwise_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "Scorer", GivenScores)
    monkeypatch.setattr(GivenScores, "scores", [5.0, 3.0])
    settings = dict(score_images=20, d_steps=1, score_features="auto")
    with monkeypatch.context() as patch:
        record_steps(patch, interrupt_at=10)  # in the second period
        with pytest.raises(KeyboardInterrupt):
            gan_cub.main(*small_dicts(tmp_path, **settings))
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    has = GivenScores.name
    with monkeypatch.context() as patch:
        patch.setattr(GivenScores, "name", "classifier distance")
        with pytest.raises(common.BadInput, match="classifier distance; choose by --score_feat"):
            gan_cub.main(*small_dicts(tmp_path, **settings))
        patch.setattr(gan_cub, "make_scorer", lambda *_: None)  # Inception is out of reach
        with pytest.raises(common.BadInput, match=f"has the {has} so far.*go on with no score"):
            gan_cub.main(*small_dicts(tmp_path, **settings))
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before
    # chosen by name it may go on, although it began with auto
    gan_cub.main(*small_dicts(tmp_path, **{**settings, "score_features": "inception"}))
    assert [row[has] for row in read_history(tmp_path / "out")] == ["5.0", "5.0"]


def test_a_run_that_began_without_scores_goes_on_without(tmp_path, monkeypatch):
    """As on a folder without classes, when Inception could not be downloaded at first."""
    settings = dict(score_images=20, d_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(gan_cub, "make_scorer", lambda *_: None)
        record_steps(patch, interrupt_at=10)
        with pytest.raises(KeyboardInterrupt):
            gan_cub.main(*small_dicts(tmp_path, **settings))
    monkeypatch.setattr(fid, "Scorer", GivenScores)
    trainer = gan_cub.main(*small_dicts(tmp_path, **settings))
    assert trainer.scorer is None and len(trainer.run.history) == 2
    assert "FID" not in trainer.run.history[1]


def test_an_experiment_checks_the_steps_of_its_own_settings(tmp_path):
    settings = dict(num_iterations=0, sample_every=4, d_steps=0)
    trainers = gan_cub.main(*small_dicts(tmp_path, experiment="r3gan", **settings))
    assert {trainer.d_steps for trainer in trainers.values()} == {1}
    with pytest.raises(common.BadInput, match="sample_every must be a multiple of d_steps, 5"):
        gan_cub.main(*small_dicts(tmp_path, experiment="losses", **settings))


def test_only_auto_goes_on_without_scores(tmp_path, monkeypatch, capsys):
    def impossible(train, features, num_images):
        raise common.BadInput("there are no classes")

    monkeypatch.setattr(fid, "Scorer", impossible)
    settings = dict(score_images=20, num_iterations=4)
    for features in ("inception", "classifier"):
        with pytest.raises(common.BadInput, match="no classes"):
            gan_cub.main(*small_dicts(tmp_path, score_features=features, **settings))
    trainer = gan_cub.main(*small_dicts(tmp_path, score_features="auto", **settings))
    assert "WARNING: NO SCORES. there are no classes" in capsys.readouterr().err
    assert len(trainer.run.history) == 1


# ------------------------------------------------------------------ the birds' archive


def photograph(seed, mode="RGB", size=(50, 40)):
    """The bytes of a smooth random picture as a JPEG file."""
    random = np.random.RandomState(seed)
    small = Image.fromarray(random.randint(0, 256, (5, 6, 3), dtype=np.uint8))
    large = small.resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def put(tar, name, contents):
    member = tarfile.TarInfo(name)
    member.size = len(contents)
    tar.addfile(member, io.BytesIO(contents))


@pytest.fixture
def archive(tmp_path):
    """A small CUB_200_2011.tgz laid out like the real one: 21 photographs, one of them grey."""
    path = tmp_path / "data" / "CUB_200_2011.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        put(tar, "attributes.txt", b"1 has_bill_shape::curved")
        put(tar, "CUB_200_2011/README", b"birds")
        for label, bird in enumerate(("Wren", "Mallard", "Ivory_Gull")):
            for i in range(7):
                mode = "L" if (label, i) == (1, 3) else "RGB"
                name = f"{label + 1:03d}.{bird}/{bird}_{i:04d}_{label}{i}.jpg"
                contents = photograph(10 * label + i, mode, (50 + i, 40))
                put(tar, f"CUB_200_2011/images/{name}", contents)
    return path


def load(folder, **overrides):
    settings = dict(allow_fallback=False, image_size=32, image_channels=3, device="cpu")
    return common.load_data("cub", str(folder), **{**settings, **overrides})


def all_of(splits):
    return sorted(image.numpy().tobytes() for part in splits for image in part.pixels)


def squeezed(image):
    """The bytes of a picture at 32 x 32, whole, as (3, 32, 32)."""
    image = image.resize((32, 32), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1).tobytes()


def test_cub_from_the_archive(archive, capsys):
    train, test = load(archive.parent)
    assert train.pixels.shape == (18, 3, 32, 32)
    assert len(test) == 2
    assert train.name == "cub"
    assert train.class_names == ["001.Wren", "002.Mallard", "003.Ivory_Gull"]
    error = capsys.readouterr().err
    assert "left out 1 grey" in error
    assert "Mallard_0003_13.jpg" in error
    folder = archive.parent / "CUB_200_2011"
    assert {path.name for path in folder.iterdir()} == {"images"}, "no more than is used"
    files = sorted(folder.rglob("*.jpg"))
    assert len(files) == 21
    kept = [path for path in files if path.name != "Mallard_0003_13.jpg"]
    expected = sorted(squeezed(Image.open(path)) for path in kept)
    assert all_of((train, test)) == expected
    archive.unlink()
    for path in files:  # from the cache now: the files are listed, but not opened
        stat = path.stat()
        path.write_bytes(b"x" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert all_of(load(archive.parent)) == expected


def test_cub_jpeg_artefacts_are_an_option(archive):
    plain, worse = load(archive.parent), load(archive.parent, jpeg_quality=75)
    wren = sorted((archive.parent / "CUB_200_2011").rglob("Wren*.jpg"))[0]
    small = Image.open(wren).resize((32, 32), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=75)
    assert squeezed(Image.open(buffer)) in all_of(worse)
    assert not set(all_of(plain)) & set(all_of(worse))


OUTSIDE = ["../escaped.jpg", "CUB_200_2011/images/../../../escaped.jpg", "link"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_archives_that_lead_out_of_the_folder_are_refused(name, archive, tmp_path):
    with tarfile.open(archive, "w:gz") as tar:
        put(tar, "CUB_200_2011/images/001.Wren/a.jpg", photograph(0))
        if name == "link":
            link = tarfile.TarInfo("CUB_200_2011/images/002.Gull")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            tar.addfile(link)
        else:
            put(tar, name, photograph(1))
    with pytest.raises(common.BadInput, match="cannot be unpacked"):
        load(archive.parent, allow_fallback=True)
    assert not list(tmp_path.rglob("escaped.jpg"))
    assert not (archive.parent / "CUB_200_2011" / "images").exists()


def test_a_damaged_archive_is_refused(archive):
    contents = archive.read_bytes()
    for damaged in (contents[: len(contents) // 2], b"no archive", b""):
        archive.write_bytes(damaged)
        with pytest.raises(common.BadInput, match="CUB_200_2011.tgz cannot be unpacked"):
            load(archive.parent)
        assert not list(archive.parent.rglob("*.jpg"))


def test_cub_is_downloaded(archive, tmp_path, monkeypatch):
    there = archive.rename(tmp_path / "CUB_200_2011.tgz")
    monkeypatch.setattr(common, "CUB", there.as_uri())
    monkeypatch.setattr(common, "CUB_SHA256", hashlib.sha256(there.read_bytes()).hexdigest())
    assert len(load(tmp_path / "data")[0]) == 18


def test_a_download_with_another_hash_is_not_used(archive, tmp_path, monkeypatch, capsys):
    there = archive.rename(tmp_path / "CUB_200_2011.tgz")
    monkeypatch.setattr(common, "CUB", there.as_uri())
    monkeypatch.setattr(common, "CUB_SHA256", "0" * 64)
    with pytest.raises(common.BadInput, match="cub could be neither"):
        load(tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.jpg"))
    fallback, _ = load(tmp_path / "data", allow_fallback=True)
    assert fallback.name == "digits (bundled, in place of cub)"
    assert "THIS IS NOT CUB" in capsys.readouterr().err
