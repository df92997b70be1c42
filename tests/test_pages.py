"""The pages of the latent space in a real browser, with small networks.

More of the page of latent_space_vae.py, the map, is in test_latent_space_vae.py.
"""

import base64
import io
import json
import os
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, dicts_of, find_browser
from PIL import Image
from torch import nn

import common
import gan_cub
import latent_space_interpolation as walks
import latent_space_vae as maps
import main_ae
import main_cgan
import main_dcgan
import main_gan
import main_vae

needs_browser = pytest.mark.skipif(
    not find_browser() and "CI_BROWSER" not in os.environ,
    reason="needs a browser: apt-get install chromium",
)
SMALL = {
    "dataset_type": "digits",
    "batch_size": 500,
    "num_epochs": 1,
    "device": "cpu",
    "num_threads": 1,
    "precision": "float32",
    "generator_hidden_size": 16,
    "discriminator_hidden_size": 16,
    "hidden_size": 16,
    "iwae_samples": 0,
    "feature_maps": 4,
    "latent_dim": 6,
    "num_iterations": 1,
    "sample_every": 1,
    "d_steps": 1,
    "score_images": 0,
    "image_size": 16,
}
MODELS = {
    "main_gan": (main_gan, dict(image_size=256)),
    "main_dcgan": (main_dcgan, {}),
    "main_cgan": (main_cgan, dict(image_channels=1)),
    "main_vae": (main_vae, dict(image_size=256)),
    "main_ae": (main_ae, {}),
    "ae": (main_ae, dict(model_type="ae")),
    "grey": (main_ae, dict(image_channels=1)),
    "gan_cub": (gan_cub, {}),
}


def train(script, folder, settings):
    """The path of weights after one step, in which every layer then gets something to do.

    At the start all images are grey, and a batch norm hardly changes anything.
    """
    settings = {**SMALL, "output_dir": str(folder), **settings}
    dicts = dicts_of(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Images, "epoch_batches", lambda *_, **__: [torch.arange(40)])
        patch.setattr(common, "save_curves", lambda *_: None)
        script.main(*[{key: settings.get(key, kwargs[key]) for key in kwargs} for kwargs in dicts])
    (path,) = folder.glob("weights_*_1.pt")
    weights = torch.load(path, weights_only=True)
    for name, tensor in weights.get("generator", weights.get("decoder")).items():
        if tensor.ndim > 1:
            # the sums of gan_cub's residual blocks grow by themselves
            variance = (1 if script is gan_cub else 2) / tensor[0].numel()
            tensor.copy_(torch.randn(tensor.shape) * variance**0.5)
        elif tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5) if "var" in name else tensor.add_(0.3 * torch.randn(()))
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def artist_of(tmp_path_factory):
    """artist_of(name) -> (Artist of a small network, the path of its page); made once."""
    known = {}

    def make(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            script, settings = MODELS[name]
            artist = walks.Artist(train(script, folder, settings), "", torch.device("cpu"))
            walks.save_page(artist, 3, folder / "latent_space.html")
            known[name] = artist, folder / "latent_space.html"
        return known[name]

    return make


def save_map(weights_path, folder):
    """The path of the map of these weights."""
    settings = {**maps.plane_kwargs, "num_points": 30, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "save_scatter", lambda *_: None)
        maps.survey(str(weights_path), str(folder), "", **settings)
    return folder / "latents_space_2d.html"


@pytest.fixture(scope="module")
def small_vae(artist_of, tmp_path_factory):
    """(path of the weights of a small VAE, path of its map)."""
    _, path = artist_of("main_vae")
    (weights_path,) = path.parent.glob("weights_*_1.pt")
    return weights_path, save_map(weights_path, tmp_path_factory.mktemp("map"))


@pytest.fixture(scope="module")
def browser():
    assert find_browser(), "CI_BROWSER is set, but chromium is not on PATH"
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium
        browser = chromium.launch(executable_path=find_browser(), args=[*options, "--no-first-run"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(path) -> the page. In the end no error was told and nothing outside asked for."""
    told, asked = [], []
    context = browser.new_context(has_touch=True, viewport={"width": 1200, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])

    def open_page(path):
        page = context.new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        wait(page)
        return page

    yield open_page
    context.close()
    assert told == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def wait(page):
    """Until all is drawn that was begun, in either page."""
    of_walks = "drawing || wished || shownCorners !== cornersWanted()"
    of_map = "asked + queues > 0 || queued"
    end = time.monotonic() + 20
    while page.evaluate(f"typeof queues === 'undefined' ? {of_walks} : {of_map}"):
        assert time.monotonic() < end, "the page does not come to rest"
        time.sleep(0.01)


def drawn(page, z):
    """What the page draws at z (N, D): (N, values) in [0, 1], rows first, channels last."""
    found = [
        page.evaluate("async z => Array.from(await explore.draw(z))", one) for one in z.tolist()
    ]
    return np.array(found)


def expected(artist, z, vector=None):
    """The same by torch, as images (N, H, W, C)."""
    vectors = None if vector is None else vector.expand(1, len(z), -1)
    return artist.draw(z[None], vectors)[0].clamp(0, 1).permute(0, 2, 3, 1).numpy()


def now(page):
    """(z that is shown, the pixels of the canvas in [0, 1])."""
    wait(page)
    z = torch.tensor([page.evaluate("Array.from(explore.latent)")])
    return z, seen(page, "canvas")


def seen(page, canvas):
    """The pixels of a canvas in [0, 1]: (H, W, 3), as they look on the white page."""
    _, encoded = page.evaluate(f"{canvas}.toDataURL()").split(",")
    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB")) / 255


@needs_browser
@pytest.mark.parametrize("name", MODELS)
def test_the_page_draws_what_torch_draws(name, artist_of, visit):
    artist, path = artist_of(name)
    page = visit(path)
    z = torch.randn(5, artist.latent_dim)
    vector = None
    if name == "main_cgan":
        vector = artist.class_vectors[4]
        page.evaluate("show({from: 4, share: 0}, 'button')")
    wanted = expected(artist, z, vector)
    assert wanted.std() > 0.05  # these are no grey pictures, which would hide every mistake
    assert np.abs(drawn(page, z) - wanted.reshape(5, -1)).max() < 1 / 255
    z, pixels = now(page)
    assert np.abs(pixels - expected(artist, z, vector)[0]).max() < 2 / 255  # rounded to bytes
    assert page.title() == artist.title


class Block(nn.Module):
    """A residual block without a shortcut of its own."""

    def __init__(self):
        super().__init__()
        self.residual = nn.Sequential(nn.ReLU(), nn.Conv2d(5, 5, kernel_size=1))

    def forward(self, x):
        return x + self.residual(x)


def every_layer():
    """A network of all layers that the page knows, with settings that no script uses."""
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Linear(6, 60, bias=False),
        nn.Unflatten(1, (3, 5, 4)),
        nn.BatchNorm2d(3),
        nn.LeakyReLU(0.3),
        nn.ConvTranspose2d(3, 4, kernel_size=3, stride=2, padding=1, bias=False),  # (4, 9, 7)
        nn.Tanh(),
        nn.Upsample(scale_factor=3, mode="nearest"),  # (4, 27, 21)
        nn.AvgPool2d(2),  # (4, 13, 10)
        nn.Conv2d(4, 5, kernel_size=4, stride=2, padding=1),  # (5, 6, 5)
        Block(),
        gan_cub.ResBlockUp(5),  # (5, 12, 10)
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(600, 12),
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_var):
                tensor.uniform_(0.3, 2)
            module.running_mean.uniform_(-1, 1)
    return network.eval().requires_grad_(False)


@needs_browser
def test_every_layer_of_the_page_is_torchs(artist_of, visit):
    network, z = every_layer(), torch.randn(3, 6)
    weights = walks.Weights(16)
    layers = walks.export(network, weights)
    kinds = {layer["type"] for layer in layers}
    page = visit(artist_of("main_gan")[1])
    assert kinds == set(re.findall(r"\w+", layers_of_the_page())) - {"brightness", "relu"}
    page.evaluate(
        "([layers, text]) => worker.postMessage({layers, packed: "
        "Uint8Array.from(atob(text), letter => letter.charCodeAt())})",
        [layers, weights.as_text()],
    )
    assert np.abs(drawn(page, z) - network(z).numpy()).max() < 0.005


def layers_of_the_page():
    """The names of the layers in pages/network.js."""
    text = (ROOT / "pages" / "network.js").read_text(encoding="utf-8")
    return re.search(r"LAYERS = \{(.*?)\}", text, re.DOTALL)[1]


@needs_browser
def test_a_page_that_would_be_too_large_takes_11_bits_or_8(artist_of, visit, tmp_path, monkeypatch):
    artist, path = artist_of("main_gan")
    exact = path.stat().st_size
    z = torch.randn(20, artist.latent_dim)
    for bits, most, allowed in ((11, exact - 500, 2 / 255), (8, 1, 10 / 255)):
        monkeypatch.setattr(walks, "MOST_BYTES", most)
        walks.save_page(artist, 3, tmp_path / "small.html")
        page = visit(tmp_path / "small.html")
        assert f" {bits} bits each" in page.inner_text("#facts")
        difference = np.abs(drawn(page, z) - expected(artist, z).reshape(20, -1))
        assert 1e-5 < difference.mean() < difference.max() < allowed
        assert (tmp_path / "small.html").stat().st_size < exact


@needs_browser
def test_a_page_whose_weights_are_damaged_says_so(artist_of, browser, tmp_path):
    _, path = artist_of("main_gan")
    text = path.read_text(encoding="utf-8")
    damaged = tmp_path / "damaged.html"
    damaged.write_text(re.sub(r'"weights": "[^"]{400}', '"weights": "', text), encoding="utf-8")
    page = browser.new_page()
    page.goto(damaged.as_uri())
    page.locator("#said", has_text="The network cannot run here").wait_for(timeout=5000)
    page.close()


@needs_browser
@pytest.mark.parametrize("bits, share, allowed", [(11, 1, 2), (8, 1, 20), (16, 0.9, 1)])
def test_a_map_that_would_be_too_large_is_less_precise(
    bits, share, allowed, small_vae, visit, tmp_path, monkeypatch
):
    weights_path, exact = small_vae
    # the first is too large, and the last is taken whatever its size is
    monkeypatch.setattr(maps, "PRECISIONS", [(16, 1), (bits, share)])
    monkeypatch.setattr(maps, "MOST_BYTES", exact.stat().st_size)
    path = save_map(weights_path, tmp_path)
    # six latents are too few for narrow layers to be smaller
    assert (path.stat().st_size < exact.stat().st_size) == (bits < 16)
    page = visit(path)
    assert f"weights have {bits} bits" in page.inner_text("#help")
    assert ("90 % of their variance" in page.inner_text("#help")) == (share < 1)
    encoder, decoder = main_vae.load_model(weights_path)
    _, test = common.load_again(torch.load(weights_path, weights_only=True), "", "cpu")
    images, _ = test.batch(torch.arange(20))
    with torch.no_grad():
        mu, _ = encoder(images)
        rebuilt = decoder.sample(mu)
        if share < 1:  # what is left out is left out here too
            codes, _ = maps.encode(encoder, decoder, test)
            to_mu, narrow = maps.narrow(encoder.fc_mean, decoder.model, codes, share)
            assert len(to_mu[0].weight) < 6
            mu = to_mu(encoder.model(images.flatten(1)))
            rebuilt = narrow(mu).sigmoid()
    asked = "async pixels => Array.from(await encode(pixels))"
    found = np.array([page.evaluate(asked, one) for one in images.flatten(1).tolist()])
    assert 0 < np.abs(found - mu.numpy()).max() < allowed / 1000 * mu.abs().max()
    difference = np.abs(drawn(page, torch.from_numpy(found)) - rebuilt.flatten(1).numpy())
    assert 1e-6 < difference.mean() < difference.max() < allowed / 255


def test_codes_in_few_directions_pass_through_narrow_layers_unchanged():
    """Where all variance lies in three directions of twenty, nothing is lost."""
    torch.manual_seed(0)
    to_mu = nn.Linear(50, 20)
    to_mu.weight.data = torch.randn(20, 3) @ torch.randn(3, 50)
    decoder = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    hidden = torch.randn(200, 50)
    with torch.no_grad():
        codes = to_mu(hidden)
        to_mu_narrow, decoder_narrow = maps.narrow(to_mu, decoder, codes.double(), 0.9999)
        assert [tuple(layer.weight.shape) for layer in to_mu_narrow] == [(3, 50), (20, 3)]
        assert [tuple(layer.weight.shape) for layer in decoder_narrow[0]] == [(3, 20), (30, 3)]
        assert torch.allclose(to_mu_narrow(hidden), codes, atol=1e-4)
        assert torch.allclose(decoder_narrow(codes), decoder(codes), atol=1e-4)
        assert maps.narrow(to_mu, decoder, hidden @ torch.randn(50, 20), 0.9999)[0] is to_mu
        # and what does not vary is taken for its mean
        beside = codes + torch.linalg.qr(codes.T, mode="complete").Q[:, -1]
        assert torch.allclose(decoder_narrow(beside), decoder(codes), atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ELU(),
        nn.Conv2d(4, 4, kernel_size=3, groups=2),
        nn.Conv2d(4, 4, kernel_size=(1, 3)),
        nn.ConvTranspose2d(4, 4, kernel_size=3, stride=2, output_padding=1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(size=8),
        nn.AvgPool2d(3, stride=2),
    ],
)
def test_a_layer_that_the_page_does_not_know_leaves_it_out(layer, artist_of, tmp_path, capsys):
    artist, _ = artist_of("main_gan")
    network = SimpleNamespace(model=nn.Sequential(*artist.network.model, layer))
    other = SimpleNamespace(**{**vars(artist), "network": network}, draw=artist.draw)
    other.choose_points = artist.choose_points
    capsys.readouterr()
    walks.save_page(other, 0, tmp_path / "latent_space.html")
    told = capsys.readouterr().err
    assert "latent_space.html is left out" in told
    assert type(layer).__name__ in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_prior", [True, False])
def test_the_directions_are_the_singular_vectors_of_a_linear_network(has_prior):
    slope = torch.linalg.qr(torch.randn(20, 5))[0] * torch.tensor([3.0, 2, 1, 0.5, 0])
    axes = torch.linalg.qr(torch.randn(5, 5))[0]  # columns
    spread = torch.ones(5) if has_prior else torch.tensor([1.0, 2, 3, 4, 5])

    def draw(z):  # (N, 1, 5) -> (N, 1, 1, 4, 5)
        units = (z - 1 + 1 * has_prior) / spread
        return (0.3 + units @ axes @ slope.T).unflatten(2, (1, 4, 5))

    artist = SimpleNamespace(latent_dim=5, has_prior=has_prior, draw=draw)
    noise = torch.randn(2000, 5)
    noise = (noise - noise.mean(0)) / noise.std(0)
    artist.choose_points = lambda count: noise[:count] * spread + (0 if has_prior else 1)
    found = walks.strongest_directions(artist, 4)
    expected = axes.T[:4] * axes.T[:4].gather(1, axes.T[:4].abs().argmax(1, keepdim=True)).sign()
    assert torch.allclose(torch.tensor(found["directions"]), expected, atol=1e-3)
    shares = torch.tensor([9, 4, 1, 0.25]) / 14.25
    assert torch.allclose(torch.tensor(found["shares"]), shares, atol=1e-4)
    assert torch.allclose(torch.tensor(found["deviation"]), spread, atol=1e-4)
    assert torch.allclose(torch.tensor(found["mean"]), torch.full((5,), 1.0 - has_prior), atol=1e-4)
    assert found["samples"] == 2000


@needs_browser
def test_the_square_by_mouse_keyboard_and_touch(artist_of, visit):
    artist, path = artist_of("main_vae")
    page = visit(path)
    corners = torch.tensor(page.evaluate("state.corners"))  # (4, D)
    box = page.locator("#pad").bounding_box()

    def at(x, y):
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def mixed(between, x, y):
        top = between(corners[:1], corners[1:2], torch.tensor([x]))[0]
        bottom = between(corners[2:3], corners[3:], torch.tensor([x]))[0]
        return between(top, bottom, torch.tensor([y]))[0]

    assert torch.allclose(now(page)[0], corners[:1])
    page.mouse.move(*at(0.9, 0.9))
    page.mouse.down()
    page.mouse.move(*at(1.1, 1.1))  # the dot stays in the corner
    page.mouse.up()
    page.click("#round")  # at a corner that changes nothing
    page.keyboard.press("Space")
    for x in (0.5, 0.7):
        page.mouse.click(*at(x, 0.9))
    page.mouse.move(*at(0.9, 0.9))
    page.mouse.down()
    page.mouse.move(*at(0.4, 0.5))
    page.mouse.move(*at(0.25, 0.5))
    page.mouse.up()
    page.mouse.move(*at(0.5, 0.5))  # the button is up: nothing moves
    z, pixels = now(page)
    assert torch.allclose(z, mixed(walks.slerp, 0.25, 0.5), atol=0.02)
    assert np.abs(pixels - expected(artist, z)[0]).max() < 2 / 255
    page.focus("#pad")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
    assert torch.allclose(now(page)[0], mixed(walks.slerp, 0.3, 0.55), atol=0.02)
    time.sleep(1.1)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    page.click("#round")
    assert torch.allclose(now(page)[0], mixed(walks.lerp, 0.25, 0.6), atol=0.02)
    # the way back: the kind of mix, two bursts of keys, a drag, two clicks, a drag
    places = [(0.25, 0.6), (0.3, 0.55), (0.25, 0.5), (0.7, 0.9), (0.5, 0.9), (1.0, 1.0), (0.0, 0.0)]
    for x, y in places:
        page.click("#back")
        assert page.is_checked("#round")
        assert torch.allclose(now(page)[0], mixed(walks.slerp, x, y), atol=0.02)
    assert page.is_disabled("#back")
    page.touchscreen.tap(*at(0.99, 0.01))
    assert torch.allclose(now(page)[0], corners[1:2], atol=0.2)
    for corner, i in zip(expected(artist, corners), range(4)):
        pixels = seen(page, f"thumbnails[{i}]")
        assert np.abs(pixels - corner).max() < 2 / 255


@needs_browser
def test_the_seed_the_walk_and_the_way_back(artist_of, visit):
    page = visit(artist_of("main_gan")[1])
    first, _ = now(page)
    assert page.input_value("#seed") == "3"
    assert page.is_disabled("#back")
    page.fill("#seed", "12")
    page.keyboard.press("Enter")
    twelfth, _ = now(page)
    assert not torch.allclose(first, twelfth)
    assert torch.allclose(twelfth, torch.tensor(page.evaluate("samples(12)[0]")))
    for refused in ("-1", "2.5", "", "4294967296"):
        page.evaluate("refresh()")
        assert page.inner_text("#seed_said") == "The same seed gives the same four samples."
        page.fill("#seed", refused)
        page.keyboard.press("Enter")
        assert page.input_value("#seed") == "12"
        assert page.inner_text("#seed_said") == "A seed is a whole number from 0 to 4294967295."
    assert torch.equal(now(page)[0], twelfth)
    page.click("#random")
    other, _ = now(page)
    assert not torch.allclose(other, twelfth)
    page.focus("#play")
    page.keyboard.press("Enter")
    assert page.inner_text("#play") == "Stop the walk"
    time.sleep(0.3)
    page.click("#play")
    halted, pixels = now(page)
    assert not torch.allclose(halted, other)
    time.sleep(0.1)
    assert torch.equal(now(page)[0], halted)
    page.press("#random", "Enter")
    assert not torch.allclose(now(page)[0], halted)
    page.press("#back", "Enter")
    assert torch.equal(now(page)[0], halted)
    for wanted in (other, twelfth, first):
        page.click("#back")
        assert torch.equal(now(page)[0], wanted)
    assert page.is_disabled("#back")
    draws = page.evaluate("[...Array(500).keys()].flatMap(seed => samples(seed).flat())")
    assert abs(np.mean(draws)) < 0.02
    assert abs(np.std(draws) - 1) < 0.02


@needs_browser
def test_a_walk_goes_round_the_square_and_anything_else_ends_it(artist_of, visit):
    page = visit(artist_of("main_gan")[1])
    places = []
    for seconds in (0, 1.5, 3, 6, 9, 12):
        begun = f"performance.now() - {1000 * seconds}"
        page.evaluate(f"playing = true; walk({begun}); playing = false")
        places.append(page.evaluate("[state.x, state.y]"))
    wanted = [[0, 0], [0.5, 0], [1, 0], [1, 1], [0, 1], [0, 0]]
    assert np.abs(np.array(places) - wanted).max() < 0.05
    page.click("#play")
    page.focus("#pad")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("playing") is False
    page.click("#play")
    page.keyboard.press("Escape")
    assert page.inner_text("#play") == "Walk round the corners"
    assert page.evaluate("playing") is False


@needs_browser
def test_a_direction_moves_z_along_it_alone(artist_of, visit):
    artist, path = artist_of("ae")  # whose latents have a spread of their own
    page = visit(path)
    data = page.evaluate("data")
    directions, spread = torch.tensor(data["directions"]), torch.tensor(data["deviation"])
    before, _ = now(page)
    slider = page.locator("#directions input").nth(1)
    start = float(slider.input_value())
    slider.focus()
    page.keyboard.press("ArrowRight")
    z, pixels = now(page)
    step = ((z - before) / spread)[0]
    assert torch.allclose(step, directions[1] * 0.01, atol=0.006)  # the slider's own steps
    assert np.abs(pixels - expected(artist, z)[0]).max() < 2 / 255
    page.keyboard.press("Home")
    assert slider.input_value() == "-4"
    slider.click()  # in its middle
    z, _ = now(page)
    step = ((z - before) / spread)[0]
    assert torch.allclose(step, -start * directions[1], atol=0.1)
    places = [float(text) for text in page.locator("#directions output").all_inner_texts()]
    wanted = directions @ ((z[0] - torch.tensor(data["mean"])) / spread)
    assert torch.allclose(torch.tensor(places), wanted, atol=0.01)
    hollow = page.locator("#dot.hollow")
    assert hollow.count() == 1
    assert "moved away from this mix by the sliders" in page.inner_text("#pad_help")
    page.click("#round")  # which is no way to lose what the sliders did
    assert torch.equal(now(page)[0], z)
    page.click("#unmove")
    assert torch.allclose(now(page)[0], before)
    assert hollow.count() == 0
    assert "Drag the dot" in page.inner_text("#pad_help")
    page.click("#back")
    assert torch.equal(now(page)[0], z)
    assert hollow.count() == 1
    names = page.locator("#directions span").all_inner_texts()
    shares = data["shares"]
    assert names[0] == f"direction 1 ({100 * shares[0]:.1f} %)"
    assert sorted(shares, reverse=True) == shares
    assert "An autoencoder has no prior" in page.inner_text("#prior")


@needs_browser
def test_the_classes_and_the_way_between_two(artist_of, visit):
    artist, path = artist_of("main_cgan")
    page = visit(path)
    vectors = artist.class_vectors

    def check(vector):
        z, pixels = now(page)
        assert np.abs(pixels - expected(artist, z, vector)[0]).max() < 2 / 255

    check(vectors[0])
    page.locator("#classes button").nth(7).click()
    check(vectors[7])
    assert page.locator("[aria-pressed=true]").all_inner_texts() == ["7"]
    page.select_option("#to", "4")
    check(vectors[7])
    page.focus("#share")
    page.keyboard.press("End")
    check(vectors[4])
    page.click("#share")  # in its middle
    share = page.evaluate("state.share")
    assert abs(share - 0.5) < 0.03
    check(torch.lerp(vectors[7], vectors[4], share))
    page.click("#back")
    check(vectors[4])
    page.click("#share")
    page.focus("#classes button >> nth=2")
    page.keyboard.press("Enter")
    check(torch.lerp(vectors[2], vectors[4], share))
    percent = round(100 * share)
    assert f"{100 - percent} % 2, {percent} % 4" in page.inner_text("#class_said")
    page.locator("#classes button").nth(4).click()  # they change places
    check(torch.lerp(vectors[4], vectors[2], share))
    assert page.locator("#to option:disabled").all_inner_texts() == ["4"]
    page.focus("#share")
    page.keyboard.press("Home")
    check(vectors[4])
    assert "To mix in 2, raise its share above 0" in page.inner_text("#class_said")


@needs_browser
def test_z_is_copied_and_the_image_saved(artist_of, visit, tmp_path):
    artist, path = artist_of("main_dcgan")
    page = visit(path)
    z, _ = now(page)
    name = re.sub(r"\W+", "_", artist.title.removesuffix(".pt"))
    large = expected(artist, z)[0].repeat(16, axis=0).repeat(16, axis=1)  # 256 pixels a side
    for press in (page.click, lambda button: page.press(button, "Enter")):
        page.evaluate("said.textContent = ''; navigator.clipboard.writeText('nothing')")
        press("#copy")
        page.locator("#said", has_text="Copied").wait_for()
        copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
        assert torch.allclose(torch.tensor([copied]), z, atol=1e-4)
        with page.expect_download(timeout=5000) as saved:
            press("#save")
        assert saved.value.suggested_filename == f"{name}_seed_3.png"
        saved.value.save_as(tmp_path / "saved.png")
        pixels = np.asarray(Image.open(tmp_path / "saved.png").convert("RGB")) / 255
        assert np.abs(pixels - large).max() < 2 / 255


@needs_browser
@pytest.mark.parametrize("width", [1200, 400])
def test_everything_fits_into_the_window_and_has_a_name(width, artist_of, visit):
    page = visit(artist_of("main_cgan")[1])
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for control in page.locator("button, input, select, #pad").all():
        named = "one => one.ariaLabel || one.labels?.[0]?.innerText || one.innerText"
        assert control.evaluate(named)
        box = control.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def draw_with_a_finger(page, *places):
    """One stroke; places in parts of the box's side."""
    screen = page.context.new_cdp_session(page)
    box = page.locator("#box").bounding_box()
    for i, (x, y) in enumerate(places):
        at = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
        kind = "touchMove" if i else "touchStart"
        screen.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [at]})
    screen.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    screen.detach()


@needs_browser
@pytest.mark.parametrize("width", [1200, 400])
def test_a_digit_drawn_with_a_finger(width, small_vae, visit):
    weights_path, path = small_vae
    page = visit(path)
    page.set_viewport_size({"width": width, "height": 700})
    page.locator("#box").scroll_into_view_if_needed()
    scrolled = page.evaluate("document.querySelector('aside').scrollTop")
    draw_with_a_finger(page, (0.2, 0.2), (0.5, 0.2), (0.8, 0.2), (0.6, 0.5), (0.4, 0.9))
    draw_with_a_finger(page, (0.4, 0.5), (0.5, 0.5), (0.8, 0.5))
    wait(page)
    assert page.evaluate("strokes.map(stroke => stroke.length)") == [5, 3]
    assert page.evaluate("document.querySelector('aside').scrollTop") == scrolled
    box = seen(page, "box")
    side = len(box)
    for x, y in ((0.5, 0.2), (0.6, 0.5), (0.4, 0.9), (0.7, 0.5)):
        assert box[round(y * side), round(x * side)].min() == 1
    assert box[side // 3, side // 3].max() == 0
    # the mark: the star is in a black ring of radius 15
    x, y = [round(at) for at in page.evaluate("toScreen(own.place)")]
    row = seen(page, "plane")[y].max(axis=1)
    assert row[x - 16 : x - 13].min() < 0.2
    assert row[x + 14 : x + 17].min() < 0.2
    # the reconstruction and its error
    _, decoder = main_vae.load_model(weights_path)
    mu, pixels = page.evaluate("[own.latent, own.pixels].map(values => Array.from(values))")
    with torch.no_grad():
        logits = decoder(torch.tensor([mu]))
    rebuilt = seen(page, "element('own_rebuilt')")
    assert np.abs(rebuilt[:, :, 0] - logits.sigmoid().view(16, 16).numpy()).max() < 2 / 255
    error = main_vae.reconstruction_loss(logits.flatten(1), torch.tensor([pixels])).item()
    shown = re.match(
        r"error ([\d.]+) nats, (below|above) the threshold", page.inner_text("#verdict")
    )
    assert float(shown[1]) == pytest.approx(error, rel=2e-3, abs=0.05)


@needs_browser
def test_the_policy_of_the_page_refuses_requests(artist_of, browser):
    page = browser.new_page()
    page.goto(artist_of("main_gan")[1].as_uri())
    asked = "fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')"
    told = []
    page.on("console", lambda message: told.append(message.text))
    assert page.evaluate(asked) == "refused"
    assert "Content Security Policy" in told[0]
    page.close()
