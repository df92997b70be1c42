import csv
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import dicts_of, run_here
from PIL import Image
from torch.nn import functional as F

import common
import latent_space_interpolation as walks
import main_ae
import main_cgan
import main_dcgan
import main_gan
import main_vae

FILES = {
    "latent_space_interpolation.png",
    "latent_space_interpolation.csv",
    "latent_space_walk.gif",
    "latent_space.html",
}
SMALL = {
    "dataset_type": "digits",
    "batch_size": 4500,
    "num_epochs": 1,
    "device": "cpu",
    "num_threads": 1,
    "precision": "float32",
    "generator_hidden_size": 16,
    "discriminator_hidden_size": 16,
    "hidden_size": 16,
    "iwae_samples": 0,
    "feature_maps": 4,
}


def train(script, folder, **settings):
    """Train for an epoch, of one step if the batch size is not given; the path of the weights."""
    settings = {**SMALL, "output_dir": str(folder), **settings}
    dicts = dicts_of(script)
    script.main(*[{key: settings.get(key, kwargs[key]) for key in kwargs} for kwargs in dicts])
    return folder / "weights_epoch_1.pt"


GREY = dict(image_size=16, image_channels=1)
MODELS = {
    "main_gan": (main_gan, {}),
    "main_dcgan": (main_dcgan, dict(image_size=16)),
    "main_cgan": (main_cgan, dict(GREY, latent_dim=4, score_every=0)),
    "main_vae": (main_vae, dict(latent_dim=6)),
    "line": (main_vae, dict(latent_dim=1)),
    "main_ae": (main_ae, dict(image_size=16, latent_dim=8)),
    "ae": (main_ae, dict(image_size=16, latent_dim=8, model_type="ae")),
    "grey": (main_ae, dict(GREY, latent_dim=8)),
}


def draw(path, out="", **overrides):
    """The panels of the picture, by their titles."""
    small = {"device": "cpu", "rows": 3, "steps": 4, "stops": 3, "frames": 4}
    source_kwargs = {"weights_path": str(path), "output_dir": str(out), "data_dir": ""}
    panels = walks.main(source_kwargs, {**walks.picture_kwargs, **small, **overrides})
    return {panel.title: panel for panel in panels}


@dataclass
class Model:
    script: ModuleType
    path: Path  # of its weights, after one short epoch
    panels: dict  # drawn with the defaults of `draw`

    @property
    def weights(self):
        return torch.load(self.path, weights_only=True)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """model_of(name) -> a Model, which is trained and drawn once for all tests."""
    known = {}

    def make(name):
        if name not in known:
            script, settings = MODELS[name]
            path = train(script, tmp_path_factory.mktemp(name), **settings)
            known[name] = Model(script, path, draw(path))
        return known[name]

    return make


@pytest.mark.parametrize("between", [walks.lerp, walks.slerp])
def test_a_walk_goes_from_its_start_to_its_end(between):
    start, end = torch.randn(2, 50, 7)
    points = between(start, end, torch.linspace(0, 1, 10))
    assert points.shape == (50, 10, 7)
    assert torch.allclose(points[:, 0], start, atol=1e-5)
    assert torch.allclose(points[:, -1], end, atol=1e-5)


def test_slerp_keeps_the_norm_of_ends_of_equal_norm_and_turns_evenly():
    start, end = F.normalize(torch.randn(2, 50, 7, dtype=torch.float64), dim=2) * 3
    points = walks.slerp(start, end, torch.linspace(0, 1, 10, dtype=torch.float64))
    assert torch.allclose(points.norm(dim=2), torch.full((50, 10), 3.0).double())
    turned = F.cosine_similarity(points[:, 1:], points[:, :-1], dim=2).acos()
    whole = F.cosine_similarity(start, end, dim=1).acos()
    assert torch.allclose(turned, whole[:, None].expand(-1, 9) / 9, atol=1e-6)
    # in two dimensions it is a rotation
    quarter = walks.slerp(
        torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([0.25])
    )
    angle = math.pi / 8
    assert torch.allclose(quarter, 2 * torch.tensor([[[math.cos(angle), math.sin(angle)]]]))
    # the straight line does cut the corner
    middle = walks.lerp(start, end, torch.tensor([0.5]).double())
    assert torch.allclose(middle[:, 0], (start + end) / 2)
    assert middle.norm(dim=2).max() < 2.99


@pytest.mark.parametrize("factor", [1, 1 + 1e-7, 2, -1, -1 - 1e-6])
def test_slerp_is_a_straight_line_between_parallel_and_opposite_ends(factor):
    start = torch.randn(20, 9)
    t = torch.linspace(0, 1, 5)
    line = start[:, None] * (1 + t * (factor - 1))[:, None]
    assert torch.allclose(walks.slerp(start, factor * start, t), line, atol=1e-5)
    assert walks.slerp(torch.zeros(1, 9), torch.randn(1, 9), t).isfinite().all()


def test_slerp_has_no_seam_where_the_straight_line_takes_over():
    start, across = torch.eye(2, dtype=torch.float64)[:, None]

    def point(angle):
        angle = torch.tensor(angle).double()
        end = angle.cos() * start + angle.sin() * across
        return walks.slerp(start, end, torch.tensor([0.3]).double())

    near, far, farther = point(0.000999), point(0.001001), point(0.002)
    assert (near - far).abs().max() < 1e-6
    assert abs(farther.norm() - 1) < 1e-12
    assert 1e-8 < 1 - near.norm() < 1e-6


def test_a_closed_walk_passes_every_point_and_ends_where_it_began():
    points = torch.randn(4, 6)
    walk = walks.closed_walk(points, 5)
    assert walk.shape == (20, 6)
    assert torch.allclose(walk[::5], points, atol=1e-6)
    back = walks.slerp(points[3:], points[:1], torch.arange(5) / 5)
    assert torch.allclose(walk[15:], back[0])


def test_evenness_of_a_cross_fade_of_a_leap_and_of_nothing():
    first, last = torch.rand(2, 3, 1, 1, 4, 4)
    fade = first + torch.linspace(0, 1, 6).view(1, 6, 1, 1, 1) * (last - first)
    assert torch.allclose(walks.evenness(fade), torch.ones(3, 5), atol=1e-5)
    leap = torch.cat([first.expand(-1, 2, -1, -1, -1), last.expand(-1, 4, -1, -1, -1)], dim=1)
    expected = torch.tensor([0, 5.0, 0, 0, 0]).expand(3, -1)
    assert torch.allclose(walks.evenness(leap), expected, atol=1e-5)
    assert walks.evenness(torch.rand(30, 6, 1, 4, 4)).mean(1).min() >= 1
    assert walks.evenness(first.expand(-1, 6, -1, -1, -1)).eq(0).all()
    # walks from an image to itself would pull the mean below 1
    still = first.expand(-1, 6, -1, -1, -1)
    assert walks.evenness(torch.cat([still, fade, still])).equal(walks.evenness(fade))


def test_images_are_encoded_in_parts_of_500_and_the_codes_keep_their_order(tmp_path):
    path = train(main_ae, tmp_path, image_size=16, latent_dim=8)
    artist = walks.Artist(path, "", torch.device("cpu"))
    index = torch.arange(1100) % len(artist.test)
    sizes, encoder = [], artist.encoder

    def watched(images):
        sizes.append(len(images))
        return encoder(images)

    artist.encoder = watched
    codes = artist.encode(index)
    assert sizes == [500, 500, 100]
    with torch.inference_mode():
        whole, _ = encoder(artist.test.batch(index)[0])
    torch.testing.assert_close(codes, whole)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"main_cgan", "line"}))
def test_the_ends_of_the_walks_are_what_the_model_draws_at_these_points(name, model_of):
    model = model_of(name)
    low = 0 if name in ("main_vae", "grey") else -1
    if hasattr(model.script, "load_generator"):
        generator = model.script.load_generator(model.path)
        torch.manual_seed(0)
        z = torch.randn(6, 64 if name == "main_gan" else 100)
        expected = generator(z)
    else:
        encoder, decoder = model.script.load_model(model.path)
        torch.manual_seed(0)
        z = torch.randn(6, model.weights["model_kwargs"]["latent_dim"])
        if name == "ae":  # it has no prior
            _, test = common.load_again(model.weights, "", "cpu")
            torch.manual_seed(0)
            z = encoder(test.batch(torch.randint(len(test), (6,)))[0])[0]
        expected = decoder.sample(z)
    expected = expected.detach().view(6, *model.weights["data"]["shape"])
    expected = (expected - low) / (1 - low)
    for title in ("straight lines", "great circles"):
        images = model.panels[title].images
        assert images.shape[:2] == (3, 4)
        assert torch.allclose(images[:, 0], expected[:3], atol=1e-5)
        assert torch.allclose(images[:, -1], expected[3:], atol=1e-5)
        assert model.panels[title].change.equal(walks.evenness(images))


def test_between_the_ends_one_walk_is_straight_and_the_other_round(model_of):
    model = model_of("main_gan")
    generator = main_gan.load_generator(model.path)
    torch.manual_seed(0)
    start, end = torch.randn(6, 64).chunk(2)
    t = torch.tensor([1 / 3])
    for title, between in (("straight lines", walks.lerp), ("great circles", walks.slerp)):
        with torch.no_grad():
            expected = generator(between(start, end, t)[:, 0]).view(3, 1, 28, 28) / 2 + 0.5
        assert torch.allclose(model.panels[title].images[:, 1], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["main_vae", "main_ae"])
def test_a_walk_between_test_images_shows_them_and_their_reconstructions(name, model_of):
    model = model_of(name)
    panel = model.panels["between test images"]
    encoder, decoder = model.script.load_model(model.path)
    _, test = common.load_again(model.weights, "", "cpu")
    low = -1 if test.normalize else 0
    assert panel.images.shape[:2] == (3, 6)
    assert panel.change.equal(walks.evenness(panel.images[:, 1:-1]))
    for shown, beside in ((0, 1), (-1, -2)):
        images = panel.images[:, shown]
        distances = [(test.pixels / 255 - image).abs().flatten(1).amax(1) for image in images]
        assert max(distance.min() for distance in distances) < 1e-6
        same = torch.stack([distance.argmin() for distance in distances])
        assert len(same.unique()) > 1
        with torch.no_grad():
            mu, _ = encoder(test.batch(same)[0])
            rebuilt = decoder.sample(mu).view_as(images)
        rebuilt = (rebuilt - low) / (1 - low)
        assert torch.allclose(panel.images[:, beside], rebuilt, atol=1e-5)


def picture_in(folder):
    return np.asarray(Image.open(folder / "latent_space_interpolation.png"))


def test_the_files_lie_beside_the_weights_or_where_they_are_asked_for(model_of, tmp_path):
    model = model_of("main_gan")
    beside = model.path.parent
    assert {file.name for file in beside.iterdir()} >= FILES
    draw(model.path, tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").iterdir()} == FILES
    assert np.array_equal(picture_in(beside), picture_in(tmp_path / "again"))
    draw(model.path, tmp_path / "other", seed=1)
    assert not np.array_equal(picture_in(beside), picture_in(tmp_path / "other"))


def test_the_table_holds_the_mean_and_the_largest_step(model_of):
    model = model_of("main_vae")
    with open(model.path.parent / "latent_space_interpolation.csv", newline="") as file:
        table = list(csv.DictReader(file))
    walked = ["straight lines", "great circles", "between test images"]
    assert [row["walk"] for row in table] == walked
    for row in table:
        change = model.panels[row["walk"]].change
        mean = float(row["mean step (cross-fade = 1)"])
        assert mean == pytest.approx(change.mean().item(), abs=0.001)
        assert float(row["largest step"]) == pytest.approx(change.max().item(), abs=0.001)


def test_the_animation_shows_the_closed_walks(model_of):
    model = model_of("main_gan")
    generator = main_gan.load_generator(model.path)
    torch.manual_seed(0)
    torch.randn(6, 64)  # the points of the picture
    points = torch.randn(3, 64)  # those of the first walk
    with torch.no_grad():
        expected = 255 * (generator(points).view(3, 28, 28) / 2 + 0.5)
    with Image.open(model.path.parent / "latent_space_walk.gif") as gif:
        assert gif.n_frames == 12
        assert gif.info["loop"] == 0
        assert gif.size == (118, 118)  # 2 * (28 + 1) + 1 pixels, twice
        for stop in range(3):
            gif.seek(4 * stop)
            pixels = np.asarray(gif.convert("L"))[2:58:2, 2:58:2]  # the upper left picture
            assert np.abs(pixels - expected[stop].numpy()).max() <= 1


def test_the_picture_holds_the_panels_pixels():
    images = torch.rand(2, 3, 1, 4, 4)
    pixels = np.asarray(walks.mosaic(images)) / 255
    assert pixels.shape == (2 * 5 + 1, 3 * 5 + 1)
    assert (pixels[::5] == 1).all()
    assert (pixels[:, ::5] == 1).all()
    assert np.abs(pixels[6:10, 11:15] - images[1, 2, 0].numpy()).max() < 0.5 / 255
    colours = np.asarray(walks.mosaic(images.expand(-1, -1, 3, -1, -1)))
    assert colours.shape == (11, 16, 3)


def test_the_sweep_moves_two_latents_and_no_other(model_of, tmp_path):
    model = model_of("main_gan")
    swept = draw(model.path, tmp_path, sweep=1.5)["two latents swept"]
    torch.manual_seed(0)
    z = torch.randn(6, 64)[0].repeat(4, 4, 1)
    places = 1.5 * torch.tensor([-1, -1 / 3, 1 / 3, 1])
    z[:, :, 0] = places
    z[:, :, 1] = places[:, None]
    with torch.no_grad():
        expected = main_gan.load_generator(model.path)(z.view(16, 64)) / 2 + 0.5
    assert torch.allclose(swept.images, expected.view(4, 4, 1, 28, 28), atol=1e-5)
    assert "latent 1, 1.5 s.d." in swept.x_label
    assert "latent 2, 1.5 s.d." in swept.y_label


def test_the_sweep_takes_the_latents_that_vary_most_around_their_means(model_of):
    model = model_of("main_vae")
    swept = model.panels["two latents swept"]
    encoder, decoder = main_vae.load_model(model.path)
    _, test = common.load_again(model.weights, "", "cpu")
    with torch.no_grad():
        codes, _ = encoder(test.pixels / 255)
        deviation = codes.std(0, correction=0)
        across, down = deviation.argsort(descending=True)[:2].tolist()
        torch.manual_seed(0)
        z = torch.randn(6, 6)[0]
        z[across] = codes[:, across].mean() + deviation[across]
        z[down] = codes[:, down].mean() - deviation[down]
        expected = decoder.sample(z[None]).view(1, 28, 28)
    assert torch.allclose(swept.images[0, 3], expected, atol=1e-5)
    assert swept.x_label.startswith(f"latent {across + 1},")
    assert swept.y_label.startswith(f"latent {down + 1},")


def test_a_single_latent_is_swept_alone(model_of):
    swept = model_of("line").panels["two latents swept"]
    assert swept.x_label == swept.y_label == "latent 1, 1 s.d. to both sides"
    assert torch.allclose(swept.images[:, 0], swept.images[:, 3])
    assert not torch.allclose(swept.images[0], swept.images[3])


def test_a_conditional_generator_is_walked_between_its_classes(model_of, tmp_path):
    path = model_of("main_cgan").path
    panels = draw(path, tmp_path, rows=11, steps=3)
    generator = main_cgan.load_generator(path)
    torch.manual_seed(0)
    start, end = torch.randn(22, 4).chunk(2)
    labels = torch.arange(11) % 10
    following = (labels + 1) % 10
    z = start[:1].clone()
    z[:, :2] = 0
    with torch.no_grad():
        first = generator(start, labels) / 2 + 0.5
        last = generator(end, labels) / 2 + 0.5
        next_class = generator(start, following) / 2 + 0.5
        middle = generator(z, labels[:1])[0] / 2 + 0.5
    for title in ("straight lines", "great circles"):
        assert torch.allclose(panels[title].images[:, 0], first, atol=1e-5)
        assert torch.allclose(panels[title].images[:, -1], last, atol=1e-5)
    classes = panels["between classes"]
    assert torch.allclose(classes.images[:, 0], first, atol=1e-5)
    assert torch.allclose(classes.images[:, -1], next_class, atol=1e-5)
    assert classes.change.equal(walks.evenness(classes.images))
    # the sweep is of the first class everywhere
    assert torch.allclose(panels["two latents swept"].images[1, 1], middle, atol=1e-5)


def test_without_a_path_the_newest_weights_of_either_kind_are_taken(
    model_of, tmp_path, monkeypatch
):
    gan, vae = model_of("main_gan").path, model_of("main_vae").path
    monkeypatch.chdir(tmp_path)
    for name, path, made in (("gan", gan, 2), ("vae", vae, 1)):
        (tmp_path / name).mkdir()
        copied = shutil.copy(path, tmp_path / name)
        os.utime(copied, (made, made))
    assert "between test images" not in draw("")
    os.utime(tmp_path / "vae" / "weights_epoch_1.pt", (3, 3))
    assert "between test images" in draw("")
    for name in ("gan", "vae"):
        assert {file.name for file in (tmp_path / name).iterdir()} >= FILES


@pytest.mark.parametrize(
    "options, words",
    [
        (["--weights_path", "none.pt"], "there is no file none.pt"),
        (["--weights_path", "odd.pt"], "odd.pt was not written by this collection"),
        (["--rows", "0"], "rows must be at least 1"),
        (["--frames", "0"], "frames must be at least 1"),
        (["--steps", "1"], "steps must be at least 2"),
        (["--stops", "1"], "stops must be at least 2"),
        (["--sweep", "0"], "sweep must be above 0"),
        (["--seed", "-1"], "seed must be between 0 and"),
        (["--device", "nonsense"], "device 'nonsense' cannot be used here"),
        (["--row", "3"], "did you mean --rows?"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": 1}, "odd.pt")
    assert run_here(walks, *options) == 2
    told = capsys.readouterr().err
    assert told.startswith("latent_space_interpolation.py: ")
    assert words in told
    assert told.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["odd.pt"]
