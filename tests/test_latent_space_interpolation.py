import math

import pytest
import torch
from PIL import Image
from torch import nn

import common
import latent_space_interpolation as walks
import main_ae
import main_dcgan
import main_gan
import main_vae

FILES = {"latent_space_interpolation.png", "latent_space_interpolation.csv", "latent_space_walk.gif"}
SCRIPTS = {"main_gan": (main_gan, {}), "main_dcgan": (main_dcgan, dict(feature_maps=4, image_size=16)),
           "main_vae": (main_vae, dict(hidden_size=16, latent_dim=6, iwae_samples=0)),
           "main_ae": (main_ae, dict(feature_maps=4, latent_dim=6, image_size=16)),
           "ae": (main_ae, dict(feature_maps=4, latent_dim=6, image_size=16, model_type="ae")),
           "grey": (main_ae, dict(feature_maps=4, latent_dim=6, image_size=16, image_channels=1))}


def draw(path, out="", **overrides):
    """The script's main with defaults; returns its result and the panels of the picture."""
    panels = {}
    save = walks.save_picture
    walks.save_picture = lambda shown, *rest: (panels.update(shown), save(shown, *rest))
    try:
        kwargs = {**walks.picture_kwargs, "device": "cpu", "rows": 3, "steps": 4, "stops": 3, "frames": 4, **overrides}
        result = walks.main({"weights_path": str(path), "output_dir": str(out), "data_dir": "nowhere"}, kwargs)
    finally:
        walks.save_picture = save
    return result, {name: images for name, (images, *_) in panels.items()}


@pytest.mark.parametrize("between", [walks.lerp, walks.slerp])
def test_ends_are_exact(between):
    start, end = torch.randn(2, 50, 7)
    points = between(start, end, torch.linspace(0, 1, 10))
    assert points.shape == (50, 10, 7) and points[:, 0].equal(start) and points[:, -1].equal(end)


def test_slerp_keeps_the_norm_of_ends_of_equal_norm_and_turns_evenly():
    start, end = nn.functional.normalize(torch.randn(2, 50, 7, dtype=torch.float64), dim=2) * 3
    points = walks.slerp(start, end, torch.linspace(0, 1, 10, dtype=torch.float64))
    assert torch.allclose(points.norm(dim=2), torch.full((50, 10), 3.0).double())
    cosines = nn.functional.cosine_similarity(points[:, 1:], points[:, :-1], dim=2)
    whole = nn.functional.cosine_similarity(start, end, dim=1).acos()
    assert torch.allclose(cosines.acos(), whole[:, None].expand(-1, 9) / 9, atol=1e-6)
    # in two dimensions it is a rotation
    t = torch.tensor([0.25])
    quarter = walks.slerp(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), t)
    assert torch.allclose(quarter, torch.tensor([[[2 * math.cos(math.pi / 8), 2 * math.sin(math.pi / 8)]]]))
    assert walks.lerp(start, end, torch.tensor([0.5]).double()).norm(dim=2).max() < 2.99


@pytest.mark.parametrize("factor", [1, 1 + 1e-7, 2, -1, -1 - 1e-6])
def test_slerp_is_a_straight_line_between_parallel_and_opposite_ends(factor):
    start = torch.randn(20, 9)
    t = torch.linspace(0, 1, 5)
    assert torch.allclose(walks.slerp(start, factor * start, t), walks.lerp(start, factor * start, t), atol=1e-6)
    assert walks.slerp(torch.zeros(1, 9), torch.randn(1, 9), t).isfinite().all()


def test_slerp_has_no_seam_where_the_straight_line_takes_over():
    start, across = torch.tensor([[1.0, 0]]).double(), torch.tensor([[0, 1.0]]).double()
    t = torch.tensor([0.3]).double()
    near, far, farther = (walks.slerp(start, angle.cos() * start + angle.sin() * across, t) for angle in
                          torch.tensor([0.000999, 0.001001, 0.002]).double())
    assert (near - far).abs().max() < 1e-6
    assert abs(farther.norm() - 1) < 1e-12 and 1e-8 < 1 - near.norm() < 1e-6


def test_a_closed_walk_passes_every_point_and_ends_where_it_began():
    points = torch.randn(4, 6)
    walk = walks.closed_walk(points, 5)
    assert walk.shape == (20, 6) and torch.allclose(walk[::5], points)
    assert torch.allclose(walk[15:], walks.slerp(points[3:], points[:1], torch.arange(5) / 5)[0])


def test_evenness_of_a_cross_fade_of_a_leap_and_of_nothing():
    first, last = torch.rand(2, 3, 1, 1, 4, 4)
    fade = first + torch.linspace(0, 1, 6).view(1, 6, 1, 1, 1) * (last - first)
    assert torch.allclose(walks.evenness(fade), torch.ones(3, 5), atol=1e-5)
    leap = torch.cat([first.expand(-1, 2, -1, -1, -1), last.expand(-1, 4, -1, -1, -1)], dim=1)
    assert torch.allclose(walks.evenness(leap), torch.tensor([0, 5.0, 0, 0, 0]).expand(3, -1), atol=1e-5)
    assert walks.evenness(torch.rand(30, 6, 1, 4, 4)).mean(1).min() >= 1
    assert walks.evenness(first.expand(-1, 6, -1, -1, -1)).eq(0).all()


@pytest.fixture(params=SCRIPTS)
def trained(request, tiny):
    script, small = SCRIPTS[request.param]
    trainer = script.main(*tiny(script, num_epochs=1, **{"batch_size": 500, **small}))
    return script, trainer.run.folder / "weights_epoch_1.pt"


def test_first_and_last_column_are_the_plain_samples(trained, tmp_path):
    script, path = trained
    result, panels = draw(path)
    random, straight = torch.Generator().manual_seed(0), panels[list(panels)[0]]
    if hasattr(script, "load_generator"):
        generator, low = script.load_generator(path), -1
        z = torch.randn(6, 64 if script is main_gan else 100, generator=random)
    else:
        encoder, decoder = script.load_model(path)
        kwargs = torch.load(path, weights_only=True)["model_kwargs"]
        colour, generator = kwargs.get("image_channels") == 3, decoder.sample
        low = -1 if colour else 0
        z = torch.randn(6, 6, generator=random)
        test = walks.datasets.load_again(torch.load(path, weights_only=True), "nowhere", "cpu")[1]
        if kwargs.get("model_type") == "ae":
            index = torch.randint(len(test), (6,), generator=torch.Generator().manual_seed(0))
            z = encoder(test.batch(index)[0])[0]
        # the outer columns of this panel are test images, and the next to them their reconstructions
        real = panels["straight lines between test images"]
        same = [(test.pixels / 255 - image).abs().flatten(1).amax(1).argmin() for image in real[:, 0]]
        x, _ = test.batch(torch.stack(same))
        assert torch.allclose((x - low) / (1 - low), real[:, 0], atol=1e-6) and real.shape[1] == 6
        rebuilt = decoder.sample(encoder(x)[0]).view_as(x)
        assert torch.allclose((rebuilt - low) / (1 - low), real[:, 1], atol=1e-5)
    with torch.no_grad():
        wanted = ((generator(z) - low) / (1 - low)).view(6, *straight.shape[2:])
    for images in list(panels.values())[:2]:
        assert torch.allclose(images[:, 0], wanted[:3], atol=1e-5)
        assert torch.allclose(images[:, -1], wanted[3:], atol=1e-5)
        assert images.shape[:2] == (3, 4) and images.min() >= 0 and images.max() <= 1
    assert result["straight lines"].equal(walks.evenness(straight))

    # the files lie beside the weights, or where they are asked for
    assert FILES <= {each.name for each in path.parent.iterdir()}
    draw(path, tmp_path / "elsewhere", seed=1)
    assert {each.name for each in (tmp_path / "elsewhere").iterdir()} == FILES
    for folder in (path.parent, tmp_path / "elsewhere"):
        with Image.open(folder / "latent_space_walk.gif") as gif:
            assert gif.n_frames == 12 and gif.info["loop"] == 0
        assert (folder / "latent_space_walk.gif").stat().st_size < 500_000
        table = (folder / "latent_space_interpolation.csv").read_text().splitlines()
        assert table[0].startswith("walk,") and table[1].split(",")[0] == "straight lines"
        assert float(table[1].split(",")[1]) >= 1
    png = "latent_space_interpolation.png"
    assert (path.parent / png).read_bytes() != (tmp_path / "elsewhere" / png).read_bytes()


def test_the_sweep_moves_two_latents_and_no_other(tiny, monkeypatch):
    trainer = main_gan.main(*tiny(main_gan, num_epochs=1, batch_size=500))
    asked, plain = [], walks.Artist.draw
    monkeypatch.setattr(walks.Artist, "draw", lambda self, z, *rest: (asked.append(z), plain(self, z, *rest))[1])
    draw(trainer.run.folder / "weights_epoch_1.pt", sweep=1.5)
    z, t = asked[2].view(4, 4, 64), 1.5 * torch.tensor([-1, -1 / 3, 1 / 3, 1])
    assert torch.allclose(z[:, :, 0], t.expand(4, 4)) and torch.allclose(z[:, :, 1], t[:, None].expand(4, 4))
    assert z[:, :, 2:].equal(asked[0][0, 2:].expand(4, 4, -1))


def test_a_conditional_generator_is_walked_between_its_classes(tmp_path, monkeypatch):
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer = nn.Embedding(3, 5), nn.Linear(9, 16)

        def forward(self, z, labels):
            return self.layer(torch.cat([z, self.embedding(labels)], 1)).tanh().view(-1, 1, 4, 4)

    torch.manual_seed(0)
    whole = Conditional()
    state = whole.state_dict()

    def load(path):
        copy = Conditional()
        copy.load_state_dict(state)
        return copy

    monkeypatch.setattr(main_gan, "load_generator", load)
    common.save(tmp_path / "w.pt", {"script": "main_gan", "data": "digits", "epoch": 1,
                                    "model_kwargs": {"latent_dim": 4, "num_classes": 3}})
    result, panels = draw(tmp_path / "w.pt", rows=4)
    assert set(result) == {"straight lines", "great circles", "between classes"}
    z, labels = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        first, after, last = (whole(part, label) / 2 + 0.5 for part, label in
                              ((z[:4], labels), (z[:4], (labels + 1) % 3), (z[4:], labels)))
    classes, straight = panels["straight lines from a class to the next"], panels[list(panels)[0]]
    assert torch.allclose(classes[:, 0], first, atol=1e-6) and torch.allclose(classes[:, -1], after, atol=1e-6)
    assert torch.allclose(straight[:, 0], first, atol=1e-6) and torch.allclose(straight[:, -1], last, atol=1e-6)


def test_what_cannot_be_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common.save(tmp_path / "odd.pt", {"script": "common", "model_kwargs": {}})
    for options, words in (([], "no folder here holds a weights_*.pt with a generator; train first"),
                           (["--weights_path", "none.pt"], "there is no file none.pt"),
                           (["--weights_path", "odd.pt"], "common.py is no script of this collection that has a gen"),
                           (["--steps", "1"], "steps is 1; legal: >= 2"), (["--sweep", "0"], "legal: > 0"),
                           (["--row", "3"], "did you mean --rows?")):
        monkeypatch.setattr("sys.argv", ["latent_space_interpolation.py", *options])
        with pytest.raises(SystemExit) as stop:
            common.run(walks.main, walks.source_kwargs, walks.picture_kwargs)
        told = capsys.readouterr().err
        assert stop.value.code == 2 and words in told and told.count("\n") == 1
        assert told.startswith("latent_space_interpolation.py: ")
    assert [each.name for each in tmp_path.iterdir()] == ["odd.pt"]
