import base64
import csv
import io
import json
import os
import re
import select
import subprocess
import time
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import dicts_of, find_browser, run_here
from PIL import Image

import common
import latent_space_vae as page
import main_ae
import main_gan
import main_vae

FILES = {"latents_space_2d.png", "latents_space_2d.html", "latents_space_2d.csv"}


SMALL = {
    "dataset_type": "digits",
    "batch_size": 4500,
    "num_epochs": 1,
    "device": "cpu",
    "num_threads": 1,
    "precision": "float32",
    "image_channels": 3,
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


def look(path, out="", data_dir="", **overrides):
    """The table."""
    kwargs = {**page.plane_kwargs, "device": "cpu", "num_points": 120, **overrides}
    source_kwargs = {"weights_path": str(path), "output_dir": str(out), "data_dir": str(data_dir)}
    return page.main(source_kwargs, kwargs)


def read(path):
    """The data of a page, its images decoded to a uint8 array (N, H, W) or (N, H, W, 3)."""
    text = path.read_text(encoding="utf-8")
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    data = json.loads(data[1])
    kind, encoded = re.fullmatch(
        r"data:image/(webp|jpeg);base64,([\w+/]+=*)", data["images"]
    ).groups()
    raw = io.BytesIO(base64.b64decode(encoded, validate=True))
    sheet = Image.open(raw, formats=[kind])
    sheet = np.asarray(sheet.convert("L" if data["shape"][0] == 1 else "RGB"))
    tiles = []
    for row in np.split(sheet, sheet.shape[0] // data["shape"][1], axis=0):
        tiles += np.split(row, data["columns"], axis=1)
    data["images"] = np.stack(tiles)
    for name in ("x", "y", "labels"):
        data[name] = np.frombuffer(base64.b64decode(data[name]), "<u2")
    return data


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The path of a small VAE's weights."""
    return train(main_vae, tmp_path_factory.mktemp("vae"), batch_size=500, latent_dim=6)


@pytest.fixture(scope="module")
def table(vae):
    """The table of that VAE; picture and page lie beside the weights."""
    return look(vae)


def test_principal_axes_equal_a_full_decomposition():
    points = torch.randn(300, 8).double() @ torch.randn(8, 8).double() + 5
    mean, axes, shares = page.principal_axes(points)
    whole = points.numpy()
    values, vectors = np.linalg.eigh(np.cov(whole.T))
    assert np.allclose(shares, values[::-1][:2] / values.sum(), rtol=1e-10)
    assert np.allclose(mean, whole.mean(0))
    aligned = np.sum(axes.numpy() * vectors[:, ::-1][:, :2].T, axis=1)
    assert np.allclose(np.abs(aligned), 1, atol=1e-10)
    places = (points - mean) @ axes.T
    u, s, _ = np.linalg.svd(whole - whole.mean(0), full_matrices=False)
    assert np.allclose(np.abs(places.numpy()), np.abs(u[:, :2] * s[:2]), atol=1e-8)
    # the signs are not the solver's: points turned by 180 degrees turn the picture, no more
    assert (axes.gather(1, axes.abs().argmax(1, keepdim=True)) > 0).all()
    assert torch.allclose(page.principal_axes(-points)[1], axes)
    assert page.principal_axes(torch.ones(9, 4).double())[2].isfinite().all()


def test_nearest_neighbours_equal_a_count_by_hand():
    train, test = torch.randn(80, 3).double(), torch.randn(60, 3).double()
    train_labels, test_labels = torch.randint(4, (80,)), torch.randint(4, (60,))
    right = 0
    for x, label in zip(test, test_labels):
        distances = (train - x).square().sum(1).tolist()
        nearest = sorted(range(80), key=distances.__getitem__)[:7]
        votes = [train_labels[nearest].tolist().count(kind) for kind in range(4)]
        right += votes.index(max(votes)) == label.item()
    found = page.neighbours_accuracy(train, train_labels, test, test_labels, 7)
    assert found == pytest.approx(right / 60, abs=1e-12)
    assert page.neighbours_accuracy(train, train_labels, train, train_labels, 1) == 1


def test_linear_accuracy_equals_a_regression_that_is_trained_by_hand():
    points, labels = torch.randn(300, 4).double(), torch.randint(3, (300,))
    points[:, 0] += labels  # they overlap
    weights = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        loss = torch.nn.functional.cross_entropy(points[:200] @ weights, labels[:200])
        loss = loss + 1e-4 * weights.square().sum()
        (gradient,) = torch.autograd.grad(loss, weights)
        weights.data -= gradient
    assert gradient.abs().max() < 1e-6
    expected = ((points[200:] @ weights).argmax(1) == labels[200:]).double().mean().item()
    found = page.linear_accuracy(points[:200], labels[:200], points[200:], labels[200:])
    assert found == pytest.approx(expected, abs=0.011)  # one image, if it lies on the border


def test_classes_are_told_apart_where_they_can_be_and_nowhere_else():
    labels = torch.arange(900) % 3
    points = torch.randn(900, 2).double()
    points[:, 0] += 9 * labels  # one class lies between the others: the regression needs its bias
    assert page.tell_classes_apart(points, labels, 10, 0) == (1, 1)
    centred = points - points.mean(0)
    ring = (centred[:, 0] > centred[:, 0].median()).long()
    ring = ring ^ (centred[:, 1] > centred[:, 1].median()).long()  # no line parts these
    near, linear = page.tell_classes_apart(torch.rand(900, 2).double(), ring, 10, 0)
    assert near < 0.65
    assert linear < 0.65
    # labels without meaning: the judged points are not those that were learnt from
    near, linear = page.tell_classes_apart(points, torch.randint(3, (900,)), 1, 0)
    assert near < 0.5
    assert linear < 0.5


def test_the_page_holds_the_images_the_plane_and_the_errors(vae, table):
    data = read(vae.parent / "latents_space_2d.html")
    weights = torch.load(vae, weights_only=True)
    _, test = common.load_again(weights, "", "cpu")
    numbers = data["numbers"]
    assert len(data["x"]) == len(numbers) == 120
    assert [numbers[0], numbers[-1]] == [0, 499]
    assert (data["images"][:120] == test.pixels[numbers, 0].numpy()).all()  # PNG: to the byte
    assert (data["labels"] == test.labels[numbers].numpy()).all()
    assert data["classes"] == list("0123456789")
    encoder, decoder = main_vae.load_model(vae)
    x = test.pixels / 255
    with torch.no_grad():
        codes = encoder(x)[0].double()
        errors = []
        for image, logits in zip(x, decoder(codes.float())):
            errors.append(main_vae.reconstruction_loss(logits[None], image.flatten(1)).item())
    mean, axes, shares = page.principal_axes(codes)
    places = ((codes - mean) @ axes.T)[numbers].numpy()
    low, high = np.array(data["low"]), np.array(data["high"])
    shown = low + np.stack([data["x"], data["y"]], 1) / 65535 * (high - low)
    assert np.abs(shown - places).max() < (high - low).max() / 65535
    assert np.allclose(data["mean"], mean, atol=1e-6)
    assert np.allclose(data["axes"], axes, atol=1e-6)
    assert np.allclose(data["errors"], errors, atol=0.01)
    assert data["threshold"] == pytest.approx(np.percentile(errors, 95), rel=1e-5)
    assert [f"{share:.1%}" in words for share, words in zip(shares, data["axis_names"])] == [
        True,
        True,
    ]
    assert data["title"] == "main_vae on digits: weights_epoch_1.pt"


def test_the_table_tells_how_well_the_classes_can_be_told_apart(vae, table):
    encoder, _ = main_vae.load_model(vae)
    _, test = common.load_again(torch.load(vae, weights_only=True), "", "cpu")
    with torch.no_grad():
        codes = encoder(test.pixels / 255)[0].double()
    mean, axes, shares = page.principal_axes(codes)
    expected = []
    for points, share in ((codes, 1), ((codes - mean) @ axes.T, shares.sum().item())):
        near, linear = page.tell_classes_apart(points, test.labels, 10, 0)
        expected.append([pytest.approx(value, abs=1e-4) for value in (share, near, linear)])
    with open(vae.parent / "latents_space_2d.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("space") for row in rows] == ["6 latents", "plane"]
    assert [row.pop("data") for row in rows] == ["digits", "digits"]
    assert list(rows[0]) == [
        "share of the variance",
        "10 nearest neighbours right",
        "linear classifier right",
    ]
    assert [[float(value) for value in row.values()] for row in rows] == expected
    assert [list(row.values())[1:] for row in table] == expected


def test_the_files_are_the_same_every_time(vae, table, tmp_path):
    look(vae, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (vae.parent / name).read_bytes()


def test_a_class_that_was_left_out_of_training_is_on_the_map(tmp_path):
    path = train(main_vae, tmp_path, batch_size=2000, exclude_class=4)
    look(path, num_points=500)
    data = read(tmp_path / "latents_space_2d.html")
    assert len(data["labels"]) == 500
    assert set(data["labels"]) == set(range(10))


@pytest.mark.parametrize("model_type", ["ae", "vae"])
def test_colour_and_autoencoders_and_names_that_are_markup(model_type, tmp_path, monkeypatch):
    faces = tmp_path / "faces"
    colours = {"<b>": (250, 10, 10), "&lt;!--": (10, 10, 250), "plain": (9, 200, 9)}
    for name, colour in colours.items():
        (faces / name).mkdir(parents=True)
        for i in range(60):
            shade = tuple(abs(c - 2 * i) for c in colour)
            Image.new("RGB", (16, 16), shade).save(faces / name / f"{i}.png")
    data = dict(dataset_type="folder", data_dir=str(faces), image_size=16, batch_size=50)
    path = train(main_ae, tmp_path / "out", **data, model_type=model_type, latent_dim=3)
    _, test = common.load_again(torch.load(path, weights_only=True), "", "cpu")
    exact = tmp_path / "exact"
    look(path, exact)  # the data lie where they lay in training
    text = (exact / "latents_space_2d.html").read_text()
    data = read(exact / "latents_space_2d.html")
    assert data["classes"] == ["&lt;!--", "<b>", "plain"]
    assert "<b>" not in text
    assert "https:" not in text
    wanted = test.pixels[data["numbers"]].permute(0, 2, 3, 1).numpy()
    assert (data["images"][:18] == wanted).all()
    encoder, decoder = main_ae.load_model(path)
    with torch.no_grad():
        x, _ = test.batch(torch.arange(1))
        error = main_ae.reconstruction_loss(decoder(encoder(x)[0]), x).item()
    assert data["errors"][0] == pytest.approx(error, abs=0.01)
    faces.rename(tmp_path / "moved")
    monkeypatch.setattr(page, "MOST_PICTURES", 1)  # as tight as can be
    look(path, tmp_path / "tight", tmp_path / "moved")
    data = read(tmp_path / "tight" / "latents_space_2d.html")
    assert data["images"].shape[1:] == (16, 16, 3)
    assert 0 < np.abs(data["images"][:18].astype(int) - wanted).mean() < 9  # JPEG


def test_images_of_one_class_have_a_map_too(tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(120):
        Image.new("L", (28, 28), 2 * i).save(tmp_path / "flat" / f"{i}.png")
    data = dict(dataset_type="folder", data_dir=str(tmp_path / "flat"), batch_size=50)
    table = look(train(main_vae, tmp_path, **data, latent_dim=2))
    assert [list(row) for row in table] == 2 * [["space", "share of the variance"]]
    assert {path.name for path in tmp_path.iterdir()} >= FILES


def test_the_codes_are_of_a_thousand_points_and_of_none_where_they_would_be_many_numbers():
    codes = torch.randn(2500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    told = page.describe_codes(codes)
    levels = np.frombuffer(base64.b64decode(told["codes"]), np.uint8).reshape(-1, 3)
    assert told["code_step"] == 3 and len(levels) == 834
    span = (told["code_high"] - told["code_low"]) / 255
    assert np.abs(told["code_low"] + span * levels - codes[::3].numpy()).max() <= 0.51 * span
    assert page.describe_codes(torch.ones(20, 65))["codes"] == ""


def test_images_that_would_be_too_large_are_packed_tighter(monkeypatch):
    images = torch.rand(400, 1, 28, 28)
    large = page.describe_images(images)["images"]
    assert large.startswith("data:image/webp")
    monkeypatch.setattr(page, "MOST_PICTURES", len(large) * 3 // 5)
    small = page.describe_images(images)["images"]
    assert small.startswith("data:image/jpeg")
    assert len(small) < len(large) * 3 // 5


def test_5000_digits_are_packed_without_loss():
    train, _ = common.load_data("digits", "", image_channels=1, device="cpu")
    pixels = train.pixels[torch.arange(5000) % 4500]
    made = page.describe_images(pixels / 255)
    assert made["images"].startswith("data:image/webp")
    assert np.array_equal(open_uri(made["images"])[28:56, 56:84, 0], pixels[73, 0])


def test_a_picture_too_wide_for_webp_is_packed_without_loss():
    wide = torch.randint(256, (1, 3, 1, 16384))
    packed = page.data_uri(wide / 255, 1, 0)
    assert packed.startswith("data:image/png")
    assert np.array_equal(open_uri(packed), wide[0].permute(1, 2, 0))


def open_uri(uri):
    """The pixels of a picture that is written into the page."""
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    return np.asarray(picture)


def test_a_layer_that_the_page_does_not_know_leaves_it_out(vae, tmp_path, monkeypatch, capsys):
    encoder, decoder = main_vae.load_model(vae)
    encoder.model.append(torch.nn.ELU())
    monkeypatch.setattr(main_vae, "load_model", lambda path: (encoder, decoder))
    look(vae, tmp_path)
    told = capsys.readouterr().err
    assert "latents_space_2d.html is left out" in told
    assert "ELU" in told
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"latents_space_2d.html"}


class Browser:
    """Headless Chromium with one page: real mouse, touch and key events, by its debugging pipe."""

    def __init__(self, folder):
        (inward, self.out), (self.back, outward) = os.pipe(), os.pipe()
        command = [
            find_browser(),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            f"--user-data-dir={folder}",
            "--remote-debugging-pipe",
        ]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{inward} 4>&{outward}', "bash", *command],
            pass_fds=(inward, outward),
            stderr=subprocess.DEVNULL,
        )
        os.close(inward)
        os.close(outward)
        self.events, self.number, self.rest, self.session = [], 0, b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(1000)
        self.call("Emulation.setTouchEmulationEnabled", enabled=True)

    def resize(self, width):
        size = dict(width=width, height=700, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def visit(self, path):
        """Open a page; what the former one told and asked for is forgotten."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        loaded = "document.readyState === 'complete' && globalThis.sheet !== null"
        while not self.js(f"{loaded} && sheet.complete && sheet.naturalWidth > 0"):
            time.sleep(0.02)
        self.rest_of_work()

    def rest_of_work(self):
        """Until what was begun is drawn."""
        self.frame()
        end = time.monotonic() + 20
        while self.js("asked + queues > 0"):
            assert time.monotonic() < end, "the page does not come to rest"
            time.sleep(0.01)
        self.frame()

    def check_quiet(self):
        """No error was told, and nothing outside was asked for."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        told = [json.dumps(event) for event in self.events if event["method"] in kinds]
        # that is about seen(), below
        assert not [line for line in told if "will-read-frequently" not in line]
        asked = set()
        for event in self.events:
            if event["method"] == "Network.requestWillBeSent":
                asked.add(event["params"]["request"]["url"].split(":")[0])
        assert {"file"} <= asked <= {"file", "data", "blob"}

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                assert select.select([self.back], [], [], 60)[0], f"no answer to {method}"
                part = os.read(self.back, 1 << 20)
                assert part, "chromium has ended"
                self.rest += part
            one, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(one)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def js(self, text):
        answer = self.call(
            "Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True
        )
        return answer["result"].get("value")

    def frame(self):
        wait = "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 20)))"
        self.js(f"new Promise(done => {wait})")

    def mouse(self, kind, x, y, **more):
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)
        self.frame()

    def touch(self, kind, *fingers):
        points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(fingers)]
        self.call("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=points)
        self.frame()

    def key(self, key, **more):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **more)
        self.frame()

    def place(self, i):
        """Where point i is drawn, in the window; whole pixels."""
        return self.js(
            f"toScreen(place({i})).map((at, k) => at + plane.getBoundingClientRect()['xy'[k]])"
        )

    def seen(self, canvas):
        """The pixels of a canvas: (height, width), its red channel."""
        width, values = self.js(
            f"[{canvas}.width, Array.from({canvas}.getContext('2d').getImageData(0, 0, "
            f"{canvas}.width, {canvas}.height).data)]"
        )
        return np.array(values).reshape(-1, width, 4)[:, :, 0]

    def close(self):
        self.session = {}
        self.call("Browser.close")
        self.process.wait(30)
        os.close(self.out)
        os.close(self.back)


needs_browser = pytest.mark.skipif(
    not find_browser() and "CI_BROWSER" not in os.environ,
    reason="needs a browser: apt-get install chromium",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert find_browser(), "CI_BROWSER is set, but chromium is not on PATH"
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@needs_browser
def test_the_page_in_a_browser(vae, tmp_path, browser):
    look(vae, tmp_path, num_points=60)
    data = read(tmp_path / "latents_space_2d.html")
    browser.visit(tmp_path / "latents_space_2d.html")
    drive(browser, data, main_vae.load_model(vae))
    browser.check_quiet()
    # were the page to ask, its policy would not let it
    request = "fetch('https://example.org/').then(() => 'sent', () => 'refused')"
    assert browser.js(request) == "refused"
    assert any("Content Security Policy" in json.dumps(event) for event in browser.events)


def drive(browser, data, networks):
    encoder, decoder = networks

    def rebuilt(z):
        return decoder.sample(z.float()[None]).view(28, 28).numpy() * 255

    def alone():
        """A point with no other near, and its place; and an empty place."""
        places = np.array([browser.place(i) for i in range(60)])
        apart = np.linalg.norm(places[:, None] - places, axis=2) + 1e9 * np.eye(60)
        i = int(apart.min(1).argmax())
        return i, places[i]

    assert browser.js("document.title") == data["title"] == browser.js("title.textContent")
    assert browser.js("count") == 60 and len(browser.js("facts.textContent")) > 40
    # hover: image, reconstruction and class
    i, (x, y) = alone()
    browser.mouse("Moved", x, y)
    said = browser.js("said.textContent")
    assert f"class {data['classes'][data['labels'][i]]}, test image {data['numbers'][i]}," in said
    assert f"error {data['errors'][data['numbers'][i]]:.1f} nats" in said
    browser.rest_of_work()
    assert (browser.seen("left") == data["images"][i]).all()
    with torch.no_grad():
        mu, _ = encoder(torch.from_numpy(data["images"][i].copy())[None] / 255)
    assert np.abs(browser.seen("right") - rebuilt(mu[0])).max() < 2  # rounded to whole numbers
    # empty ground: what the decoder draws at this very place, also far out and from near
    mean, axes = torch.tensor(data["mean"]), torch.tensor(data["axes"])
    box = browser.js("['x', 'y', 'width'].map(key => plane.getBoundingClientRect()[key])")
    browser.js("shown.fill(false)")  # so that no point is in the way
    for px, py, scale in ((9, 9, 1), (200, 300, 1), (201, 300, 150)):
        browser.js(f"view.scale = {scale} * fitting()")
        browser.mouse("Moved", box[0] + px, box[1] + py)
        at = torch.tensor(browser.js(f"toPlane({px}, {py})"))
        assert "empty ground" in browser.js("said.textContent")
        assert "no image" in browser.js("left_name.textContent")
        browser.rest_of_work()
        z = mean + at @ axes
        assert np.allclose(browser.js("Array.from(explore.latent)"), z, atol=1e-3)
        assert np.abs(browser.seen("right") - rebuilt(z)).max() < 2
        assert not browser.seen("left").any()
    browser.js("showWhole()")
    browser.frame()
    browser.js("shown.fill(true)")
    # zoom: the place under the mouse stays
    browser.mouse("Wheel", round(x), round(y), deltaX=0, deltaY=-300)
    assert browser.js("view.scale / fitting()") > 1.2
    assert np.abs(np.array(browser.place(i)) - (x, y)).max() < 2
    # drag: everything moves along
    a, b = browser.place(i)
    browser.mouse("Moved", 300, 300)
    browser.mouse("Pressed", 300, 300, button="left", buttons=1)
    browser.mouse("Moved", 270, 320, button="left", buttons=1)
    browser.mouse("Released", 270, 320, button="left")
    assert np.abs(np.array(browser.place(i)) - (a - 30, b + 20)).max() < 1
    # a class switched off is neither drawn nor found; its box is a real one
    browser.js("document.getElementById('whole').click()")
    browser.frame()
    x, y = browser.place(i)
    pixels = "plane.getContext('2d').getImageData(0, 0, plane.width, plane.height).data"
    ink = f"{pixels}.filter(byte => byte).length"
    inked = browser.js(ink)
    label = data["labels"][i]
    browser.js(f"document.querySelectorAll('#classes input')[{label}].click()")
    browser.frame()
    assert browser.js(ink) < inked
    browser.mouse("Moved", x, y)
    assert "empty ground" in browser.js("said.textContent")
    browser.js("document.getElementById('none').click()")
    assert browser.js("shown.some(one => one)") is False
    browser.js("document.getElementById('all').click()")
    browser.mouse("Moved", x, y)
    assert "test image" in browser.js("said.textContent")
    # keyboard
    browser.js("plane.focus()")
    order = sorted(range(60), key=lambda k: (data["x"][k], data["y"][k]))
    browser.js("chosen = -1")
    for wanted in order[:3]:
        browser.key("n")
        assert browser.js("chosen") == wanted
    browser.key("p")
    assert browser.js("chosen") == order[1] and f"image {data['numbers'][order[1]]}," in browser.js(
        "said.textContent"
    )
    before = browser.js("({...view})")
    browser.key("+")
    browser.key("ArrowRight")
    after = browser.js("({...view})")
    assert (
        after["scale"] > before["scale"]
        and after["x"] > before["x"]
        and browser.js("middle") is True
    )
    browser.key("0")
    assert browser.js("view.scale / fitting()") == 1
    # touch: a tap finds, two fingers zoom, one moves
    x, y = browser.place(i)
    browser.touch("Start", (x + 6, y))
    browser.touch("End")
    assert browser.js("chosen") == i and browser.js("pointers.size") == 0
    browser.touch("Start", (300, 300), (400, 300))
    browser.touch("Move", (250, 300), (450, 300))
    browser.touch("End")
    assert 1.8 < browser.js("view.scale / fitting()") < 2.2
    a, b = browser.place(i)
    browser.touch("Start", (400, 300))
    browser.touch("Move", (430, 310))
    browser.touch("End")
    assert np.abs(np.array(browser.place(i)) - (a + 30, b + 10)).max() < 1


def liven(path):
    """Give every layer of these weights something to do, as if they had been trained for long.

    The latents then spread widely, and no mean is the same for every image.
    """
    weights = torch.load(path, weights_only=True)
    for part in ("encoder", "decoder"):
        for tensor in weights[part].values():
            if tensor.ndim > 1:
                tensor.copy_(torch.randn(tensor.shape) * (2 / tensor[0].numel()) ** 0.5)
            else:
                tensor.add_(0.1 * torch.randn(tensor.shape))
    torch.save(weights, path)
    return path


MODELS = {
    "main_vae": (main_vae, dict(latent_dim=6)),
    "grey": (main_ae, dict(latent_dim=5, image_channels=1)),
    "colour": (main_ae, dict(latent_dim=7, image_size=16)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> (weights, path of the page, test images) of a small model; made once."""
    known = {}

    def make(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            script, settings = MODELS[name]
            # one small step, and no pictures: they take time, and none is looked at
            with pytest.MonkeyPatch.context() as patch:
                batches = [torch.arange(40)]
                patch.setattr(common.Images, "epoch_batches", lambda *_, **__: batches)
                patch.setattr(common, "save_curves", lambda *_: None)
                patch.setattr(common, "save_grid", lambda *_, **__: None)
                patch.setattr(page, "save_scatter", lambda *_: None)
                path = liven(train(script, folder, **settings))
                look(path, num_points=30)
            _, test = common.load_again(torch.load(path, weights_only=True), "", "cpu")
            known[name] = path, folder / "latents_space_2d.html", test
        return known[name]

    return make


def stroke(browser, *places):
    """A line in the box with the mouse's button down; places in parts of the box's side."""
    corner = "['x', 'y', 'width'].map(key => box.getBoundingClientRect()[key])"
    browser.js("box.scrollIntoView()")
    x, y, side = browser.js(corner)
    for i, (across, down) in enumerate(places):
        kind = "Moved" if i else "Pressed"
        at = x + across * side, y + down * side
        browser.mouse(kind, *at, button="left", buttons=1)
    browser.mouse("Released", *at, button="left")
    browser.rest_of_work()


def own(browser):
    """(pixels as the networks' images, mu, place, error) of the user's own image."""
    parts = "[own.pixels, own.latent, own.place].map(part => Array.from(part))"
    pixels, mu, place = browser.js(parts)
    pixels = torch.tensor(pixels).view(*browser.js("[height, width, channels]"))
    return pixels.permute(2, 0, 1)[None], mu, place, browser.js("own.error")


@needs_browser
@pytest.mark.parametrize("name", MODELS)
def test_the_networks_of_the_page_are_torchs(name, made, browser):
    path, html, test = made(name)
    script, _ = MODELS[name]
    encoder, decoder = script.load_model(path)
    browser.visit(html)
    x, _ = test.batch(torch.arange(3))
    z = torch.randn(3, encoder.fc_mean.out_features)
    with torch.no_grad():
        mu, _ = encoder(x)
        drawn = decoder.sample(z).view(x.shape)
    drawn = (drawn + 1) / 2 if test.normalize else drawn
    pixels = test.pixels[:3].permute(0, 2, 3, 1).flatten(1) / 255
    encode = "explore.encode({}).then(values => Array.from(values))"
    found = np.array([browser.js(encode.format(image.tolist())) for image in pixels])
    # a weight of 16 bits is off by up to 2^-11 of itself, and so are sums of a few layers
    assert np.abs(found - mu.numpy()).max() < 2e-3 * np.abs(mu.numpy()).max()
    draw = "explore.draw({}).then(values => Array.from(values))"
    found = np.array([browser.js(draw.format(one.tolist())) for one in z])
    wanted = drawn.permute(0, 2, 3, 1).flatten(1).numpy()
    assert wanted.std() > 0.05  # these are no grey pictures, which would hide every mistake
    assert np.abs(found - wanted).max() < 0.5 / 255  # which no eye can see
    browser.check_quiet()


@needs_browser
@pytest.mark.parametrize("name", ["main_vae", "grey"])
def test_a_drawing_is_centred_encoded_and_judged(name, made, browser):
    path, html, test = made(name)
    script, _ = MODELS[name]
    encoder, decoder = script.load_model(path)
    browser.visit(html)
    data = read(html)
    assert "95 % of the test images" in browser.js("verdict()")
    stroke(browser, (0.1, 0.1), (0.1, 0.4), (0.2, 0.4))
    x, mu, place, error = own(browser)
    ink = x[0, 0].numpy()
    side = len(ink)
    rows, columns = np.nonzero(ink > 0.02)
    assert np.ptp(rows) + 1 in (20, 21)  # a height that fills the square, between two pixels too
    middle = np.arange(side) + 0.5
    assert (ink.sum(0) @ middle / ink.sum()) == pytest.approx(side / 2, abs=0.1)
    assert (ink.sum(1) @ middle / ink.sum()) == pytest.approx(side / 2, abs=0.1)
    assert ink[:, : columns.min() + 2].sum() > 3 * ink[:, columns.max() - 2 :].sum()  # an L
    with torch.no_grad():
        wanted, _ = encoder(x)
        output = decoder(torch.tensor([mu]))
        loss = script.reconstruction_loss(output.flatten(1), x.flatten(1))
        if name == "grey":
            loss = script.reconstruction_loss(output, x)
    assert np.allclose(mu, wanted[0], rtol=0.01, atol=0.01 * wanted.abs().max())
    on_plane = np.array(data["axes"]) @ (np.array(mu) - data["mean"])
    assert np.allclose(place, on_plane, rtol=1e-4)
    assert error == pytest.approx(loss.item(), rel=2e-3)
    rebuilt = browser.seen("document.getElementById('own_rebuilt')")
    assert np.abs(rebuilt - output.sigmoid().view(side, side).numpy() * 255).max() < 2
    # the same stroke, smaller and elsewhere, is the same image
    first = ink
    browser.js("document.getElementById('clear').click()")
    browser.rest_of_work()
    assert browser.js("own") is None
    stroke(browser, (0.6, 0.5), (0.6, 0.65), (0.65, 0.65))
    assert np.abs(own(browser)[0][0, 0].numpy() - first).max() < 0.2
    # keys: a second stroke is taken back, and Delete clears
    before = own(browser)[1]
    stroke(browser, (0.1, 0.1))
    assert own(browser)[1] != before
    browser.js("box.focus()")
    browser.key("Backspace")
    browser.rest_of_work()
    assert own(browser)[1] == before
    browser.key("Delete")
    browser.rest_of_work()
    assert browser.js("own") is None
    browser.check_quiet()


@needs_browser
def test_the_mark_and_the_verdict_of_a_drawing(made, browser):
    path, html, test = made("main_vae")
    browser.visit(html)
    browser.js("Object.assign(view, {x: low[0], y: low[1], scale: 200 * fitting()})")
    stroke(browser, (0.3, 0.2), (0.7, 0.2), (0.4, 0.8))
    # a threshold just above its error, and one just below
    error, judged = browser.js("own.error"), "verdict()"
    browser.js("globalThis.given = data.threshold; data.threshold = own.error + 1")
    words = f"error {error:.1f} nats, below the threshold {error + 1:.1f}: nothing unusual"
    assert browser.js(judged) == words
    browser.js("data.threshold = own.error - 1")
    words = f"error {error:.1f} nats, above the threshold {error - 1:.1f}: "
    words += "it would be called an anomaly"
    assert browser.js(judged) == words
    browser.js("data.threshold = given")
    shown = browser.js("document.getElementById('verdict').textContent")
    assert shown == browser.js(judged + " + likeness()")
    # the classes of the ten nearest, counted in all latents
    data = read(html)
    levels = np.frombuffer(base64.b64decode(data["codes"]), np.uint8).reshape(-1, 6)
    codes = data["code_low"] + levels * (data["code_high"] - data["code_low"]) / 255
    images, labels = test.batch(torch.tensor(data["numbers"])[:: data["code_step"]])
    with torch.no_grad():
        true, _ = main_vae.load_model(path)[0](images)
    assert len(codes) == len(true)
    assert np.abs(codes - true.numpy()).max() <= (data["code_high"] - data["code_low"]) / 509
    distances = ((codes - np.array(browser.js("Array.from(own.latent)"))) ** 2).sum(1)
    nearest = [test.class_names[labels[i]] for i in distances.argsort()[:10]]
    assert browser.js("neighbours(own.latent)") == nearest
    name, number = Counter(nearest).most_common(1)[0]
    assert f"by all 6 latents: {number} of class {name}" in shown
    assert browser.js("bins.reduce((sum, one) => sum + one)") >= 0.99 * browser.js(
        "data.errors.length"
    )
    # the mark is drawn at its place, is in the window again, and can be pointed at
    corner = browser.js("['x', 'y'].map(key => plane.getBoundingClientRect()[key])")
    x, y = browser.js("toScreen(own.place)")
    assert 0 <= x <= browser.js("plane.clientWidth")
    assert 0 <= y <= browser.js("plane.clientHeight")
    along = browser.seen("plane")[round(y), round(x) :]  # from its middle to the right
    assert along[12] == along[18] == 255  # the white edges of its ring
    assert along[15] == 0
    browser.mouse("Moved", corner[0] + x, corner[1] + y)
    browser.rest_of_work()
    assert browser.js("said.textContent").startswith("yours, at ")
    assert browser.js("Array.from(explore.latent)") == browser.js("Array.from(own.latent)")
    shown = own(browser)[0][0, 0].numpy() * 255
    assert np.abs(browser.seen("left") - shown).max() < 1
    # a right click opens the browser's menu, which may swallow its end: it neither drags nor draws
    for place in ("plane", "box"):
        x, y = browser.js(f"['x', 'y'].map(key => {place}.getBoundingClientRect()[key] + 30)")
        browser.mouse("Pressed", x, y, button="right", buttons=2)
        assert browser.js("pointers.size + pens.size") == 0
        browser.mouse("Released", x, y, button="right")
    # a mark that lies far from all others is brought into the window too
    browser.js("globalThis.far = [3 * high[0] - 2 * low[0], low[1]]; makeRoomFor(far)")
    x, y = browser.js("toScreen(far)")
    assert 0 <= x <= browser.js("plane.clientWidth")
    assert 0 <= y <= browser.js("plane.clientHeight")


@needs_browser
def test_a_colour_model_takes_an_image_from_a_file(made, browser):
    path, html, test = made("colour")
    encoder, decoder = main_ae.load_model(path)
    browser.visit(html)
    assert browser.js("box.hidden") and not browser.js("document.getElementById('chooser').hidden")
    buffer = io.BytesIO()
    pixels = test.pixels[7].permute(1, 2, 0).numpy()
    wide = np.pad(pixels, ((0, 0), (8, 8), (0, 0)))  # its middle square is the image
    Image.fromarray(wide).save(buffer, "PNG")
    browser.js(f"""(() => {{
        const file = document.getElementById("file"), chosen = new DataTransfer();
        const bytes = Uint8Array.from({list(buffer.getvalue())});
        chosen.items.add(new File([bytes], "a.png", {{type: "image/png"}}));
        file.files = chosen.files;
        file.dispatchEvent(new Event("change"));
    }})()""")
    end = time.monotonic() + 20
    while browser.js("own") is None and time.monotonic() < end:
        time.sleep(0.02)
    x, mu, place, error = own(browser)
    assert (x[0] * 255 - test.pixels[7]).abs().max() < 0.01
    with torch.no_grad():
        wanted, _ = encoder(2 * x - 1)
        loss = main_ae.reconstruction_loss(decoder(torch.tensor([mu])), 2 * x - 1).item()
    assert np.allclose(mu, wanted[0], rtol=0.01, atol=0.005 * wanted.abs().max())
    assert error == pytest.approx(loss, rel=2e-3)
    browser.check_quiet()


@needs_browser
@pytest.mark.parametrize("width", [1000, 400])
def test_everything_fits_into_the_window_and_has_a_name(width, made, browser):
    browser.visit(made("main_vae")[1])
    browser.resize(width)
    try:
        assert browser.js("document.documentElement.scrollWidth") <= width
        controls = "[...document.querySelectorAll('button, input, #plane, #box')].filter(one => "
        controls += "one.offsetParent && !one.ariaLabel && !one.labels?.[0]?.innerText"
        assert browser.js(f"{controls} && !one.innerText).map(one => one.id)") == []
        assert browser.js("Math.max(...[box, plane].map(one => one.offsetWidth))") <= width
    finally:
        browser.resize(1000)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--weights_path", "out/weights_epoch_1.pt"], "weights_epoch_1.pt holds no encoder"),
        (
            ["--weights_path", "line/weights_epoch_1.pt"],
            "1 latents, 500 test images; a plane takes",
        ),
        (["--weights_path", "few/weights_epoch_1.pt"], "2 latents, 2 test images; a plane takes"),
        (["--weights_path", "none.pt"], "there is no file none.pt"),
        (["--num_points", "0"], "num_points must be at least 1"),
        (["--neighbours", "0"], "neighbours must be at least 1"),
        (["--seed", "-1"], "seed must be between 0 and 4294967295"),
        (["--neighbour", "3"], "did you mean --neighbours?"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "out/" in str(options):
        train(main_gan, tmp_path / "out")
    if "line/" in str(options):
        train(main_vae, tmp_path / "line", latent_dim=1)
    if "few/" in str(options):
        (tmp_path / "images").mkdir()
        for i in range(20):
            Image.new("L", (28, 28), i).save(tmp_path / "images" / f"{i}.png")
        data = dict(dataset_type="folder", data_dir="images", batch_size=9)
        train(main_vae, tmp_path / "few", **data, latent_dim=2)
    capsys.readouterr()
    assert run_here(page, *options) == 2
    told = capsys.readouterr().err
    assert told.startswith("latent_space_vae.py: ")
    assert words in told
    assert told.count("\n") == 1
    assert not list(tmp_path.glob("**/latents*"))


def test_names_of_classes_that_lie_in_one_place_do_not_cover_one_another():
    """Three classes lie on one point, a fourth at the far corner, where its name stays."""
    places = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [10.0, 10.0]])
    found = page.places_of_names(places, torch.arange(4), [0, 1, 2, 3])
    heights = sorted(found[label][1] for label in (0, 1, 2))
    assert heights[0] == 0.0
    assert heights[1] - heights[0] >= 0.27
    assert heights[2] - heights[1] >= 0.27
    assert found[3] == (10.0, 10.0)


@pytest.mark.parametrize("classes, legend", [(1, False), (2, True), (60, False)])
def test_a_legend_that_would_not_fit_is_left_out(classes, legend, monkeypatch):
    drawn = []
    monkeypatch.setattr(common, "write", lambda path, figure: drawn.append(figure))
    places, labels = torch.randn(120, 2), torch.arange(120) % classes
    names = [f"class {label}" for label in range(classes)]
    page.save_scatter(places, labels, names, ["x", "y"], "title", "map.png")
    assert (drawn[0].axes[0].get_legend() is not None) == legend
    drawn[0].draw_without_rendering()
    assert drawn[0].axes[0].get_position().height > 0.7  # the map fills the picture


def test_a_long_thin_cloud_leaves_room_for_the_names_of_its_classes(monkeypatch):
    drawn = []
    monkeypatch.setattr(common, "write", lambda path, figure: drawn.append(figure))
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(200, 2, generator=generator) * torch.tensor([4, 0.1])
    labels, names = torch.arange(200) % 10, list("0123456789")
    page.save_scatter(places, labels, names, ["x", "y"], "title", "map.png")
    drawn[0].draw_without_rendering()
    axes = drawn[0].axes[0]
    low, high = axes.get_ylim()
    heights = [name.xy[1] for name in axes.texts]
    assert len(heights) == 10 and low < min(heights) and max(heights) < high
