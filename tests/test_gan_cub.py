import csv
import functools
import hashlib
import io
import math
import os
import tarfile
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import common
import datasets
import fid
import gan_cub

SMALL = dict(feature_maps=8, latent_dim=4, batch_size=8, image_size=16, num_iterations=8, eval_every=4, d_steps=2,
             score_images=0)


@functools.lru_cache
def few_digits(channels, num_classes):
    splits, class_names = all_digits(channels, num_classes)
    return [[part[:size] for part in split] for split, size in zip(splits, (500, 100))], class_names


all_digits = datasets._digits


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fewer digits; and empty files for curves, which are common.py's and tested there."""
    monkeypatch.setattr(datasets, "_digits", few_digits)
    monkeypatch.setattr(common, "save_curves", lambda history, panels, title, path: common.write(path, b""))


@pytest.fixture
def tiny_cub(tiny):
    """tiny_cub(**overrides) -> the three dicts: this script counts iterations, not epochs."""

    def make(**overrides):
        settings = {"dataset_type": "digits", "score_features": "classifier", **SMALL, **overrides}
        # the fixture asks for keys that every other script has
        with mock.patch.dict(gan_cub.trainer_kwargs, num_epochs=0, sample_every=0):
            dicts = tiny(gan_cub, **settings)
        for key in ("num_epochs", "sample_every"):
            del dicts[2][key]
        return dicts

    return make


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_default_networks_are_the_described_ones():
    settings = gan_cub.model_kwargs
    assert count(gan_cub.Generator(**settings, image_size=32)) == 1_204_099
    assert count(gan_cub.Discriminator(settings["feature_maps"], 32, spectral_norm=False)) == 1_053_825
    plain = gan_cub.Discriminator(8, 32, spectral_norm=False)
    assert not [m for m in plain.modules() if isinstance(m, torch.nn.BatchNorm2d)], "the penalty is an image's own"


@pytest.mark.parametrize("size", [16, 32, 64])
def test_shapes_at_every_size(size):
    images = gan_cub.Generator(latent_dim=4, feature_maps=8, image_size=size)(torch.randn(2, 4))
    assert images.shape == (2, 3, size, size) and images.abs().max() <= 1
    for spectral_norm in (False, True):
        assert gan_cub.Discriminator(8, size, spectral_norm)(images).shape == (2,)


def test_only_the_pixels_are_not_rectified():
    for block in gan_cub.Discriminator(feature_maps=3, image_size=32, spectral_norm=False).blocks[1:-1]:
        assert isinstance(block.residual[1], torch.nn.ReLU)
    assert all(isinstance(block.residual[1], torch.nn.ReLU) for block in gan_cub.Generator(4, 3, 32).model[2:5])


def test_upsampling_is_nearest_neighbour_before_the_convolutions():
    x = torch.randn(2, 6, 5, 7)
    block = gan_cub.Generator(latent_dim=4, feature_maps=6, image_size=16).model[2].eval()
    norm1, _, conv1, norm2, _, _, conv2 = block.residual
    up = F.interpolate(norm2(conv1(norm1(x).relu())).relu(), scale_factor=2, mode="nearest")
    expected = conv2(up) + block.shortcut[0](F.interpolate(x, scale_factor=2, mode="nearest"))
    assert torch.allclose(block(x), expected, atol=1e-6)
    with torch.no_grad():  # alone: a shortcut that convolves nothing repeats each pixel four times, channel by channel
        block.shortcut[0].weight.copy_(torch.eye(6)[:, :, None, None])
        block.shortcut[0].bias.zero_()
    assert block.shortcut(x).equal(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_downsampling_is_the_mean_of_2x2_before_the_convolutions():
    first, block, flat_block = gan_cub.Discriminator(6, 32, spectral_norm=False).blocks[:3]
    x = torch.randn(2, 6, 8, 4)
    _, _, conv1, _, _, _, conv2 = block.residual
    mean = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))  # (N, C, H/2, 2, W/2, 2)
    assert torch.allclose(mean, F.avg_pool2d(x, 2), atol=1e-6)
    expected = conv2(F.avg_pool2d(conv1(x.relu()).relu(), 2)) + block.shortcut[1](mean)
    assert torch.allclose(block(x), expected, atol=1e-6)
    _, _, conv1, _, _, _, conv2 = flat_block.residual
    assert torch.allclose(flat_block(x), x + conv2(conv1(x.relu()).relu()), atol=1e-6)
    pixels = torch.rand(2, 3, 4, 4) - 1  # all below 0
    assert not torch.allclose(first.residual(pixels), first.residual(pixels / 2)), "dark pixels are seen"


def test_the_discriminator_sums_over_the_pixels():
    network = gan_cub.Discriminator(8, 32, spectral_norm=False)
    x = torch.randn(3, 3, 32, 32)
    features = network.blocks(x)
    assert features.shape == (3, 8, 8, 8) and features.min() >= 0
    by_hand = features.detach().numpy().sum((2, 3)) @ network.linear.weight.detach().numpy()[0]
    assert np.allclose(network(x).detach().numpy(), by_hand + network.linear.bias.item(), atol=1e-4)


@pytest.mark.parametrize("loss", gan_cub.LOSSES)
def test_losses_equal_the_papers_equations(loss):
    real, fake = np.random.RandomState(0).randn(2, 9) * 2

    def sigmoid(l):
        return 1 / (1 + np.exp(-l))

    expected = {
        "gan": (-np.log(sigmoid(real)).mean(), -np.log(1 - sigmoid(fake)).mean(), -np.log(sigmoid(fake)).mean()),
        "lsgan": (((real - 1)**2).mean() / 2, (fake**2).mean() / 2, ((fake - 1)**2).mean() / 2),
        "wgan-gp": (-real.mean(), fake.mean(), -fake.mean()),
        "hinge": (np.maximum(0, 1 - real).mean(), np.maximum(0, 1 + fake).mean(), -fake.mean()),
    }[loss]
    measured = [term(torch.from_numpy(logits)).mean().item() for term, logits in
                zip(gan_cub.LOSSES[loss], (real, fake, fake))]
    assert np.allclose(measured, expected)


@pytest.mark.parametrize("scale", [0.01, 1.0])  # a slope below 1 costs as one above does: the penalty has two sides
def test_penalty_of_a_linear_critic_is_known(scale):
    weight = scale * torch.randn(3, 8, 8, dtype=torch.float64)
    real, fake = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)
    penalty = gan_cub.gradient_penalty(lambda x: (x * weight).sum((1, 2, 3)), real, fake, torch.rand(5, 1, 1, 1))
    assert penalty.item() == pytest.approx((math.sqrt((weight.numpy()**2).sum()) - 1)**2, rel=1e-12)


def test_penalty_looks_between_one_real_and_one_generated_image():
    seen, epsilon = [], torch.tensor([0.25, 1.0, 0.0]).view(3, 1, 1, 1)
    fake_of = torch.ones(3, 1, 1, 1, requires_grad=True)  # stands for the generator
    real, fake = torch.randn(3, 2, 4, 4), fake_of * torch.randn(3, 2, 4, 4)
    scale = torch.ones((), requires_grad=True)

    def critic(x):
        seen.append(x)
        return scale * x.square().sum((1, 2, 3)) / 2  # its gradient at x is scale x

    penalty = gan_cub.gradient_penalty(critic, real, fake, epsilon)
    for i, share in enumerate([0.25, 1.0, 0.0]):
        assert torch.allclose(seen[0][i], share * real[i] + (1 - share) * fake[i])
    norms = np.sqrt((seen[0].detach().numpy()**2).sum((1, 2, 3)))  # over channels, rows and columns
    assert penalty.item() == pytest.approx(((norms - 1)**2).mean(), rel=1e-5)
    penalty.backward()
    assert scale.grad.item() == pytest.approx((2 * (norms - 1) * norms).mean(), rel=1e-4), "it teaches the critic"
    assert fake_of.grad is None, "its graph does not reach the generator"


def test_there_is_one_epsilon_an_image(tiny_cub, monkeypatch):
    trainer = gan_cub.main(*tiny_cub(num_iterations=0))
    seen, real_penalty = [], gan_cub.gradient_penalty
    monkeypatch.setattr(gan_cub, "gradient_penalty", lambda *a: seen.append(a) or real_penalty(*a))
    trainer.step(torch.rand(16, 3, 16, 16))
    assert len(seen) == 2
    for _, real, fake, epsilon in seen:
        assert epsilon.shape == (8, 1, 1, 1) and len(epsilon.unique()) == 8 and 0 <= epsilon.min() <= epsilon.max() < 1
        assert not fake.requires_grad and real.shape == fake.shape == (8, 3, 16, 16)


@pytest.mark.parametrize("loss", gan_cub.LOSSES)
def test_each_step_moves_its_own_network_alone(loss, tiny_cub):
    trainer = gan_cub.main(*tiny_cub(num_iterations=0, loss=loss))
    trainer.lr_now.fill_(1e-3)
    g, d = flat(trainer.generator), flat(trainer.discriminator)
    trainer.discriminator_step(torch.rand(8, 3, 16, 16))
    assert flat(trainer.generator).equal(g) and not flat(trainer.discriminator).equal(d)
    assert all(p.grad is None for p in trainer.generator.parameters())
    trainer.discriminator_optimizer.zero_grad()
    before = {name: value.clone() for name, value in trainer.discriminator.state_dict().items()}
    trainer.generator_step(8)
    assert not flat(trainer.generator).equal(g)
    assert all(value.equal(before[name]) for name, value in trainer.discriminator.state_dict().items()), \
        "nor do the spectral norms move"
    assert all(p.grad is None for p in trainer.discriminator.parameters()), "no gradient for D in G's step"


@pytest.mark.parametrize("loss", gan_cub.LOSSES)
def test_gradients_of_a_step_equal_those_written_out(loss, tiny_cub):
    """D's step in one pass over both kinds equals two passes and the loss by hand; in float32."""
    trainer = gan_cub.main(*tiny_cub(num_iterations=0, loss=loss))
    real = torch.rand(8, 3, 16, 16) * 2 - 1
    d, g = trainer.discriminator.eval(), trainer.generator  # eval: a spectral norm that stays, for the comparison
    trainer.discriminator_optimizer.step = lambda: None
    torch.manual_seed(5)
    trainer.discriminator_step(real)
    measured = [p.grad.clone() for p in d.parameters()]
    torch.manual_seed(5)
    fake = g(torch.randn(8, 4)).detach()
    epsilon = torch.rand(8, 1, 1, 1)
    r, f = d(real), d(fake)
    value = {"gan": F.binary_cross_entropy_with_logits(r, torch.ones(8))
             + F.binary_cross_entropy_with_logits(f, torch.zeros(8)),
             "lsgan": F.mse_loss(r, torch.ones(8)) / 2 + F.mse_loss(f, torch.zeros(8)) / 2,
             "wgan-gp": f.mean() - r.mean(), "hinge": F.relu(1 - r).mean() + F.relu(1 + f).mean()}[loss]
    if loss == "wgan-gp":
        x = (epsilon * real + (1 - epsilon) * fake).requires_grad_()
        grads = [torch.autograd.grad(d(x[i:i + 1]).sum(), x, create_graph=True)[0][i] for i in range(8)]
        value = value + 10 * torch.stack([(grad.square().sum().sqrt() - 1)**2 for grad in grads]).mean()
    for one, other in zip(measured, torch.autograd.grad(value, list(d.parameters()))):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-3)


def test_hinge_has_spectral_norms_of_one_and_no_other_loss_has(tiny_cub):
    trainer = gan_cub.main(*tiny_cub(num_iterations=0, loss="hinge"))
    for _ in range(30):
        trainer.discriminator(torch.randn(2, 3, 16, 16))
    layers = [m for m in trainer.discriminator.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    largest = [np.linalg.svd(m.weight.detach().flatten(1).numpy(), compute_uv=False)[0] for m in layers]
    assert len(layers) == 8 and np.allclose(largest, 1, atol=0.02)
    other = gan_cub.main(*tiny_cub(num_iterations=0, loss="wgan-gp"))
    assert not [name for name in other.discriminator.state_dict() if "parametrizations" in name]


def test_the_average_follows_its_formula(tiny_cub):
    trainer = gan_cub.main(*tiny_cub(num_iterations=0, ema_decay=0.3))
    trainer.lr_now.fill_(1e-3)
    expected = {name: value.clone() for name, value in trainer.ema_generator.state_dict().items()}
    for t in range(1, 5):
        trainer.step(torch.rand(16, 3, 16, 16))
        decay = min(0.3, (1 + t) / (10 + t))
        for name, value in trainer.generator.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in trainer.ema_generator.state_dict().items():
        assert "num_batches" in name or torch.allclose(value, expected[name], atol=1e-6), name


def test_generator_every_d_steps_and_learning_rate_falls_to_zero(tiny_cub, monkeypatch):
    rates, order = [], []
    d_step, g_step = gan_cub.Trainer.discriminator_step, gan_cub.Trainer.generator_step
    monkeypatch.setattr(gan_cub.Trainer, "discriminator_step", lambda self, real: order.append(len(real)) or
                        rates.append(self.discriminator_optimizer.param_groups[0]["lr"].item()) or d_step(self, real))
    monkeypatch.setattr(gan_cub.Trainer, "generator_step", lambda self, n: order.append("G") or g_step(self, n))
    gan_cub.main(*tiny_cub(num_iterations=12, eval_every=6, d_steps=3, lr=0.1))
    assert order == [8, 8, 8, "G"] * 4
    assert np.allclose(rates, np.repeat([0.1, 0.075, 0.05, 0.025], 3))


def test_stream_is_pass_after_pass_over_the_data():
    images, _ = datasets.load_data("digits", "", True, 50, True, 28, 1, "cpu")
    images.pixels, images.labels = images.pixels[:70], images.labels[:70]
    stream = datasets.Stream(images, batch_size=24, steps=4)
    assert len(stream) == 96
    steps = [step for period in (1, 2, 3) for step in stream.order(7, period)]
    assert [len(step) for step in steps] == [24] * 12
    index = torch.cat(steps)
    for number in range(4):
        assert sorted(index[70 * number:70 * (number + 1)].tolist()) == list(range(70)), "each image once a pass"
    assert not index[:70].equal(index[70:140])
    assert torch.cat(stream.order(7, 2)).equal(index[96:192]), "a function of seed and period alone"


def test_short_run_writes_the_promised_files(tiny_cub, tmp_path):
    trainer = gan_cub.main(*tiny_cub())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "history.csv", "checkpoint.pt", "train_loss_curve.png",  # no scores: no weights are called the best
        *(name.format(i) for i in (4, 8) for name in ("samples_{}.png", "interpolations_{}.png",
                                                      "weights_iteration_{}.pt"))}
    rows = list(csv.DictReader(open(tmp_path / "out" / "history.csv")))
    assert [row["iteration"] for row in rows] == ["4", "8"] and rows[0]["data"] == "digits"
    assert Image.open(tmp_path / "out" / "samples_8.png").size[0] == Image.open(
        tmp_path / "out" / "interpolations_8.png").size[0]
    generator, z = gan_cub.load_generator(tmp_path / "out" / "weights_iteration_8.pt"), torch.randn(3, 4)
    assert torch.allclose(generator(z), trainer.sample(z), atol=1e-5)
    assert not torch.allclose(trainer.generator.eval()(z), trainer.sample(z), atol=1e-4), "the average, not G itself"


def test_two_latents_are_swept_and_the_others_fixed(tiny_cub):
    plane = gan_cub.main(*tiny_cub(num_iterations=0)).plane.view(10, 10, 4)
    assert (plane[:, :, 2:] == plane[0, 0, 2:]).all()
    assert np.allclose(plane[:, 3, 0], np.linspace(-1, 1, 10)) and np.allclose(plane[3, :, 1], np.linspace(-1, 1, 10))


@pytest.mark.parametrize("loss", gan_cub.LOSSES)
def test_each_network_learns_against_the_other_as_it_stands(loss, tiny_cub):
    trainer = gan_cub.main(*tiny_cub(num_iterations=0, loss=loss))
    trainer.lr_now.fill_(2e-3)
    real = trainer.train.batch(torch.arange(32))[0]
    rows = [trainer.discriminator_step(real) for _ in range(30)]
    assert rows[-1]["discriminator loss"] < rows[0]["discriminator loss"] - 0.1
    assert rows[-1]["real logit"] > rows[-1]["fake logit"] + 0.5
    losses = [trainer.generator_step(32).item() for _ in range(30)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("loss", ["wgan-gp", "hinge"])
def test_continued_run_equals_an_uninterrupted_one(loss, tiny_cub, tmp_path, monkeypatch):
    gan_cub.main(*tiny_cub(output_dir=str(tmp_path / "whole"), loss=loss))
    step, calls = gan_cub.Trainer.step, []

    def stopping(self, real):
        calls.append(1)
        if len(calls) == 3:  # in the middle of the second period
            self.run.stopped_by = 2
        return step(self, real)

    parts = tiny_cub(output_dir=str(tmp_path / "parts"), loss=loss)
    monkeypatch.setattr(gan_cub.Trainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        gan_cub.main(*parts)
    assert not (tmp_path / "parts" / "weights_iteration_8.pt").exists() and len(calls) == 3
    gan_cub.main(*parts)
    for path in (tmp_path / "whole").iterdir():
        if path.name != "checkpoint.pt":  # it names its folder
            assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name


def test_more_iterations_are_another_schedule(tiny_cub):
    gan_cub.main(*tiny_cub())
    with pytest.raises(common.BadInput, match="num_iterations was 8, is 12"):
        gan_cub.main(*tiny_cub(num_iterations=12))


@pytest.mark.parametrize("wrong, message", [(dict(num_iterations=10), "eval_every 4 must divide num_iterations 10"),
                                            (dict(d_steps=3), "and d_steps 3 it"),
                                            (dict(loss="wgan"), "gan . lsgan . wgan-gp . hinge"),
                                            (dict(image_size=28), "16 . 32 . 64"), (dict(latent_dim=1), ">= 2")])
def test_bad_settings_end_before_any_work(wrong, message, tiny_cub, tmp_path):
    with pytest.raises(common.BadInput, match=message):
        gan_cub.main(*tiny_cub(**wrong))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def quick_classifier(monkeypatch):
    monkeypatch.setattr(fid, "CLASSIFIER_STEPS", 5)


def test_best_and_last_weights_are_kept(tiny_cub, tmp_path, monkeypatch, quick_classifier):
    scores = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(fid.Scorer, "__call__", lambda self, draw: len(draw(range(2))) == 2 and next(scores))
    gan_cub.main(*tiny_cub(num_iterations=12, score_images=20))
    weights = {path.stem: path.read_bytes() for path in (tmp_path / "out").glob("weights_*.pt")}
    assert weights["weights_best"] == weights["weights_iteration_8"] != weights["weights_iteration_12"]
    assert common.load(tmp_path / "out" / "weights_best.pt", "gan_cub", "generator")["data"] == "digits"
    assert (tmp_path / "out" / "fid_vs_iterations.png").exists()


def test_scoring_changes_nothing_else(tiny_cub, tmp_path, quick_classifier):
    plain = gan_cub.main(*tiny_cub(output_dir=str(tmp_path / "plain")))
    scored = gan_cub.main(*tiny_cub(score_images=20))
    first, second = scored.run.history["classifier distance"]
    assert first > 0 < second != first and "classifier distance" not in plain.run.history
    assert flat(plain.generator).equal(flat(scored.generator))


def test_without_inception_the_classifier_scores_and_says_so(tiny_cub, tmp_path, monkeypatch, capsys, quick_classifier):
    def offline(*_):
        raise OSError("offline")

    drawn = []
    monkeypatch.setattr(datasets, "_download", offline)
    monkeypatch.setattr(common, "save_curves", lambda history, panels, title, path: drawn.append((panels, path.name)))
    settings = dict(score_features="inception", score_images=20)
    gan_cub.main(*tiny_cub(**settings))
    error = capsys.readouterr().err
    assert error.count("NO FID") == 1 and "offline" in error and "classifier's distance" in error
    assert "classifier distance" in (tmp_path / "out" / "history.csv").read_text().splitlines()[0]
    for panels, name in drawn:
        assert panels["classifier distance (N 20)"] == ["classifier distance"] and name == "fid_vs_iterations.png"
        assert "FID" not in str(panels)
    with pytest.raises(common.BadInput, match="could not be downloaded"):
        gan_cub.main(*tiny_cub(allow_fallback=False, output_dir=str(tmp_path / "strict"), **settings))
    flat = tmp_path / "flat"  # no classes either: it is trained without scores
    for number in range(30):
        common.save_grid(torch.rand(1, 3, 16, 16), flat / f"{number}.png", 1, 0)
    mine = dict(dataset_type="folder", data_dir=str(flat), output_dir=str(tmp_path / "mine"), batch_size=9, **settings)
    trainer = gan_cub.main(*tiny_cub(**mine))
    assert "NO SCORES" in capsys.readouterr().err and not {"FID", "classifier distance"} & set(trainer.run.history)
    with pytest.raises(common.BadInput, match="could not be downloaded.*or leave the scores out with --score_images 0"):
        gan_cub.main(*tiny_cub(**mine, allow_fallback=False, resume=False))
    monkeypatch.setattr(fid.Scorer, "__init__", lambda self, *a, **k: self.__dict__.update(name="FID", n=20))
    with pytest.raises(common.BadInput, match="scored otherwise"):
        gan_cub.main(*tiny_cub(**settings))


def test_experiment_compares_the_losses(tiny_cub, tmp_path, quick_classifier, capsys):
    small = dict(experiment="losses", score_images=20, num_iterations=4, eval_every=2)
    trainers = gan_cub.main(*tiny_cub(**small))
    assert list(trainers) == ["gan", "lsgan", "wgan-gp", "hinge"] == [trainer.loss for trainer in trainers.values()]
    rows = list(csv.DictReader(open(tmp_path / "out" / "losses.csv")))
    assert [row["loss"] for row in rows] == list(trainers)
    for row, trainer in zip(rows, trainers.values()):
        assert float(row["best classifier distance"]) == pytest.approx(
            min(trainer.run.history["classifier distance"]), rel=1e-4)
    assert Image.open(tmp_path / "out" / "losses.png").size[0] > 1000
    before = (tmp_path / "out" / "losses.csv").read_bytes()
    capsys.readouterr()
    gan_cub.main(*tiny_cub(**small))
    assert capsys.readouterr().out.count("4 iterations are trained already") == 4
    assert (tmp_path / "out" / "losses.csv").read_bytes() == before


def test_fid_opens_its_weights(tiny_cub, tmp_path):
    gan_cub.main(*tiny_cub())
    source = fid.of_weights(str(tmp_path / "out" / "weights_iteration_8.pt"), 5, 0, torch.device("cpu"))
    images, _ = source.read(torch.arange(5))
    assert images[0].shape == (5, 3, 16, 16) and source.data == "digits"


def test_bfloat16_teaches_both_networks(tiny_cub):
    trainer = gan_cub.main(*tiny_cub(num_iterations=0, precision="bfloat16"))
    trainer.lr_now.fill_(1e-3)
    g, d = flat(trainer.generator), flat(trainer.discriminator)
    seen = []
    trainer.discriminator.blocks[0].residual[2].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    values = trainer.step(torch.rand(16, 3, 16, 16))
    assert {value.dtype for value in values.values()} == {torch.float32} and set(seen) == {torch.bfloat16}
    assert not flat(trainer.generator).equal(g) and not flat(trainer.discriminator).equal(d)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in trainer.generator.named_parameters()
               if "bias" not in name)
    with torch.autocast(**trainer.precision):
        assert trainer.discriminator(torch.ones(2, 3, 16, 16)).abs().min() > 0
        for p in trainer.discriminator.parameters():
            p.data.zero_()
        assert trainer.discriminator(torch.ones(2, 3, 16, 16)).abs().max() == 0, "a step sees the weights as they are"


# ------------------------------------------------------------------------------------------- the birds' archive


def photograph(seed, mode="RGB", size=(50, 40)):
    random = np.random.RandomState(seed)
    small = Image.fromarray(random.randint(0, 256, (5, 6, 3), dtype=np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer := io.BytesIO(), "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path):
    """A small CUB_200_2011.tgz in the real one's layout: 3 classes of 7 photographs, one of them grey."""
    path = tmp_path / "data" / "CUB_200_2011.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        def put(name, contents):
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))

        put("attributes.txt", b"1 has_bill_shape::curved")
        put("CUB_200_2011/README", b"birds")
        put("CUB_200_2011/images.txt", b"1 001.Wren/Wren_0001_1.jpg")
        for label, bird in enumerate(("Wren", "Mallard", "Ivory_Gull")):
            for i in range(7):
                mode = "L" if (label, i) == (1, 3) else "RGB"
                put(f"CUB_200_2011/images/{label + 1:03d}.{bird}/{bird}_{i:04d}_{label}{i}.jpg",
                    photograph(10 * label + i, mode, (50 + i, 40)))
    return path


def load(folder, **overrides):
    return datasets.load_data(**{**dict(dataset_type="cub", data_dir=str(folder), allow_fallback=False, batch_size=2,
                                        shuffle=True, image_size=32, channels=3, device="cpu"), **overrides})


def all_of(splits):
    return sorted(image.numpy().tobytes() for part in splits for image in part.pixels)


def test_cub_from_the_archive(archive, capsys):
    train, test = load(archive.parent)
    assert train.pixels.shape == (18, 3, 32, 32) and len(test) == 2 and train.pixels.dtype == torch.uint8
    assert train.name == "cub" and train.class_names == ["001.Wren", "002.Mallard", "003.Ivory_Gull"]
    error = capsys.readouterr().err
    assert "skipped 1 grey" in error and "Mallard_0003_13.jpg" in error
    files = sorted((archive.parent / "CUB_200_2011" / "images").rglob("*.jpg"))
    assert len(files) == 21 and not list(archive.parent.glob(".unpack_*"))
    assert {path.name for path in (archive.parent / "CUB_200_2011").iterdir()} == {"images"}, "no more than is used"
    expected = [np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1).tobytes()
                for path in files if path.name != "Mallard_0003_13.jpg"]  # whole: not cropped
    assert all_of((train, test)) == sorted(expected)
    archive.unlink()
    for path in files:  # from the cache: the files are listed, not opened
        stat = path.stat()
        path.write_bytes(b"x" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert all_of(load(archive.parent)) == sorted(expected)


def test_cub_jpeg_artefacts_are_an_option(archive):
    plain, worse = load(archive.parent), load(archive.parent, jpeg_quality=75)
    files = sorted((archive.parent / "CUB_200_2011" / "images").rglob("Wren*.jpg"))
    Image.open(files[0]).resize((32, 32), Image.Resampling.BICUBIC).save(buffer := io.BytesIO(), "JPEG", quality=75)
    assert np.asarray(Image.open(buffer)).transpose(2, 0, 1).tobytes() in all_of(worse)
    assert not set(all_of(plain)) & set(all_of(worse))


def test_cub_resized_before(tmp_path, capsys):
    folder = tmp_path / "CUB_200_2011_32"
    folder.mkdir()
    for i in range(6):
        bird = ("Ivory_Gull", "Wren")[i % 2]
        image = Image.open(io.BytesIO(photograph(i, "L" if i == 4 else "RGB", (32, 32))))
        image.save(folder / f"{bird}_000{i}_{i}.png")
    train, test = load(tmp_path, jpeg_quality=75)
    assert len(train) + len(test) == 5 and train.class_names == ["Ivory_Gull", "Wren"]
    assert "Ivory_Gull_0004_4.png (grey)" in capsys.readouterr().err
    as_they_are = [np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in folder.glob("*.png")
                   if "_4." not in path.name]
    assert all_of((train, test)) == sorted(as_they_are), "what is not resized is not compressed either"


@pytest.mark.parametrize("name", ["../escaped.jpg", "CUB_200_2011/images/../../../escaped.jpg", "{root}/escaped.jpg"])
def test_archives_with_paths_that_leave_the_folder_are_refused(name, archive, tmp_path):
    name = name.format(root=tmp_path)
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("CUB_200_2011/images/001.Wren/a.jpg"), io.BytesIO())
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(common.BadInput, match="leaves the folder"):
        load(archive.parent, allow_fallback=True)
    assert not list(tmp_path.rglob("escaped.jpg")) and list(archive.parent.iterdir()) == [archive]


def test_links_in_an_archive_are_not_followed(archive, tmp_path):
    (tmp_path / "outside").mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("CUB_200_2011/images/001.Wren")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside")
        tar.addfile(link)
        for i in range(4):
            member = tarfile.TarInfo(f"CUB_200_2011/images/001.Wren/Wren_{i:04d}_{i}.jpg")
            member.size = len(photograph(i))
            tar.addfile(member, io.BytesIO(photograph(i)))
    train, test = load(archive.parent)
    assert len(train) + len(test) == 4 and not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"no archive", lambda b: b""])
def test_damaged_archives_leave_nothing_behind(damage, archive):
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(common.BadInput, match="CUB_200_2011.tgz is damaged"):
        load(archive.parent)
    assert list(archive.parent.iterdir()) == [archive]


def test_cub_is_downloaded_checked_and_otherwise_replaced_with_a_warning(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "CUB", archive.rename(tmp_path / "CUB_200_2011.tgz").as_uri())
    monkeypatch.setattr(datasets, "CUB_SHA", "0" * 64)
    with pytest.raises(common.BadInput, match="cub is not in .* could not be downloaded .*CUB_200_2011_32"):
        load(tmp_path / "data")
    assert load(tmp_path / "data", allow_fallback=True)[0].name == "digits (bundled, in place of cub)"
    assert "THIS IS NOT CUB" in capsys.readouterr().err and not list((tmp_path / "data").iterdir())
    monkeypatch.setattr(datasets, "CUB_SHA", hashlib.sha256((tmp_path / "CUB_200_2011.tgz").read_bytes()).hexdigest())
    assert len(load(tmp_path / "data")[0]) == 18 and (tmp_path / "data" / "CUB_200_2011.tgz").exists()
