import base64
import io
import json
import os
import re
import select
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image

import common
import latent_space_vae as page
import main_ae
import main_gan
import main_vae

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FILES = {"latents_space_2d.png", "latents_space_2d.html", "latents_space_2d.csv"}


def look(path, out="", data_dir="nowhere", **overrides):
    kwargs = {**page.plane_kwargs, "device": "cpu", "num_points": 120, "cells": 5, **overrides}
    return page.main({"weights_path": str(path), "output_dir": str(out), "data_dir": str(data_dir)}, kwargs)


def read(path):
    """The data of a page, its sprites decoded to uint8 arrays (N, H, W) or (N, H, W, 3)."""
    text = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    for name, columns in (("images", data["columns"]), ("rebuilt", data["columns"]), ("grid", data["cells"])):
        kind, encoded = re.fullmatch(r"data:image/(png|jpeg);base64,([\w+/]+=*)", data[name]).groups()
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=[kind]))
        rows = np.split(sheet, sheet.shape[0] // data["side"], axis=0)
        data[name] = np.stack([tile for row in rows for tile in np.split(row, columns, axis=1)])
    for name in ("x", "y", "labels"):
        data[name] = np.frombuffer(base64.b64decode(data[name]), "<u2")
    return data


@pytest.fixture
def vae(tiny):
    trainer = main_vae.main(*tiny(main_vae, num_epochs=1, batch_size=500, hidden_size=32, latent_dim=6, iwae_samples=0))
    return trainer.run.folder / "weights_epoch_1.pt"


def test_principal_axes_equal_a_full_decomposition():
    torch.manual_seed(0)
    points = torch.randn(300, 8) @ torch.randn(8, 8) + 5
    mean, axes, shares = page.principal_axes(points)
    whole = points.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(whole.T))
    assert np.allclose(shares, values[::-1][:2] / values.sum(), rtol=1e-10) and np.allclose(mean, whole.mean(0))
    assert np.allclose(np.abs(np.sum(axes.numpy() * vectors[:, ::-1][:, :2].T, axis=1)), 1, atol=1e-10)
    scores = (points.double() - mean) @ axes.T
    u, s, _ = np.linalg.svd(whole - whole.mean(0), full_matrices=False)
    assert np.allclose(np.abs(scores.numpy()), np.abs(u[:, :2] * s[:2]), atol=1e-8)
    assert torch.allclose(axes @ axes.T, torch.eye(2).double())
    # the signs do not depend on the solver's: a rotation by 180 degrees of the points turns the picture, no more
    assert (axes.gather(1, axes.abs().argmax(1, keepdim=True)) > 0).all()
    assert torch.allclose(page.principal_axes(-points)[1], axes)
    assert page.principal_axes(torch.ones(9, 4))[2].isfinite().all()


def test_nearest_neighbours_equal_a_count_by_hand():
    torch.manual_seed(0)
    train, test = torch.randn(80, 3).double(), torch.randn(60, 3).double()
    train_labels, test_labels = torch.randint(4, (80,)), torch.randint(4, (60,))
    right = 0
    for x, label in zip(test, test_labels):
        nearest = sorted(range(80), key=lambda i: sum((train[i] - x) ** 2))[:7]
        votes = [sum(train_labels[i] == kind for i in nearest) for kind in range(4)]
        right += votes.index(max(votes)) == label.item()
    assert page.neighbours_accuracy(train, train_labels, test, test_labels, 7) == pytest.approx(right / 60, abs=1e-12)


def test_linear_accuracy_finds_what_lines_can_part_and_no_more():
    torch.manual_seed(0)
    points, labels = torch.randn(900, 2).double(), torch.arange(900) % 3
    angle = labels * 2.1
    points[:, 0] += 9 * angle.cos()
    points[:, 1] += 9 * angle.sin()
    assert page.linear_accuracy(points[:600], labels[:600], 100 * points[600:] / 100, labels[600:]) == 1
    inside = (points.norm(dim=1) > points.norm(dim=1).median()).long()  # a ring around a disc: no line does it
    assert page.linear_accuracy(points[:600], inside[:600], points[600:], inside[600:]) < 0.7
    near, linear = page.tell_classes_apart(points, torch.randint(3, (900,)), 1, 0)
    assert near < 0.5 and linear < 0.5  # labels without meaning: judged on points that were not learnt from


def test_the_page_holds_the_images_their_reconstructions_and_the_plane(vae, tmp_path):
    result = look(vae)
    assert set(result) == {"6 latents", "plane"} and all(0.1 < one <= 1 for pair in result.values() for one in pair)
    data = read(vae.parent / "latents_space_2d.html")
    test = page.datasets.load_again(torch.load(vae, weights_only=True), "nowhere", "cpu")[1]
    assert len(data["x"]) == 120 and data["numbers"][0] == 0 and data["numbers"][-1] == 499
    assert (data["images"][:120] == test.pixels[data["numbers"], 0].numpy()).all()  # PNG: to the byte
    assert (data["labels"] == test.labels[data["numbers"]].numpy()).all() and data["classes"] == list("0123456789")
    encoder, decoder = main_vae.load_model(vae)
    with torch.no_grad():
        codes = encoder(test.pixels.float() / 255)[0]
        mean, axes, shares = page.principal_axes(codes)
        plane = ((codes - mean) @ axes.T)[data["numbers"]]
        rebuilt = decoder.sample(codes[data["numbers"]]).view(-1, 28, 28) * 255
        assert np.abs(data["rebuilt"][:120] - rebuilt.numpy()).max() <= 0.51
        low, high = np.array(data["low"]), np.array(data["high"])
        shown = low + np.stack([data["x"], data["y"]], 1) / 65535 * (high - low)
        assert np.abs(shown - plane.numpy()).max() < (high - low).max() / 65535
        for cell in (0, 7, 24):  # from left to right, the bottom row first
            middle = low + (np.array([cell % 5, cell // 5]) + 0.5) / 5 * (high - low)
            wanted = decoder.sample((mean + torch.from_numpy(middle) @ axes).float()[None]).view(28, 28) * 255
            assert np.abs(data["grid"][cell] - wanted.numpy()).max() <= 0.51
    assert [f"{share:.1%}" in words for share, words in zip(shares, data["axes"])] == [True, True]

    before = (vae.parent / "latents_space_2d.html").read_bytes()
    look(vae, tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == FILES
    assert (tmp_path / "again" / "latents_space_2d.html").read_bytes() == before  # the same every time
    table = [line.split(",") for line in (tmp_path / "again" / "latents_space_2d.csv").read_text().splitlines()]
    assert [row[0] for row in table] == ["where", "6 latents", "plane"] and float(table[1][1]) == 1
    assert float(table[2][1]) == pytest.approx(shares.sum().item(), abs=1e-4)


@pytest.mark.parametrize("model_type", ["ae", "vae"])
def test_colour_and_autoencoders_and_names_that_are_markup(model_type, tiny, tmp_path):
    faces = tmp_path / "faces"
    for name, colour in (("<b>", (250, 10, 10)), ("&lt;!--", (10, 10, 250)), ("plain", (9, 200, 9))):
        (faces / name).mkdir(parents=True)
        for i in range(60):
            Image.new("RGB", (16, 16), tuple(abs(c - 2 * i) for c in colour)).save(faces / name / f"{i}.png")
    trainer = main_ae.main(*tiny(main_ae, num_epochs=1, batch_size=50, feature_maps=4, latent_dim=3, image_size=16,
                                 model_type=model_type, dataset_type="folder", data_dir=str(faces)))
    look(trainer.run.folder / "weights_epoch_1.pt", tmp_path / "page", faces)
    text = (tmp_path / "page" / "latents_space_2d.html").read_text()
    data = read(tmp_path / "page" / "latents_space_2d.html")
    assert data["classes"] == ["&lt;!--", "<b>", "plain"] and "<b>" not in text and "https:" not in text
    assert len(data["x"]) == 18 and data["images"].shape[1:] == (16, 16, 3)
    wanted = trainer.test.pixels[data["numbers"]].permute(0, 2, 3, 1).numpy()
    assert np.abs(data["images"][:18].astype(int) - wanted).mean() < 4  # JPEG


def test_a_page_that_would_be_too_large_is_packed_tighter(monkeypatch):
    images = torch.rand(400, 1, 28, 28)
    points = (torch.rand(400, 2).double(), torch.zeros(400).long(), torch.arange(400), ["a"], images, images)
    rest = (torch.rand(4, 1, 28, 28), torch.zeros(2).double(), torch.ones(2).double())
    large = page.make_page(*points, *rest, title="t", facts="f", axes=["x", "y"])
    assert b"image/png" in large and b"image/jpeg" not in large
    monkeypatch.setattr(page, "MOST_BYTES", len(large) * 3 // 5)
    small = page.make_page(*points, *rest, title="t", facts="f", axes=["x", "y"])
    assert b"image/jpeg" in small and len(small) < len(large) * 3 // 5


def test_5000_points_stay_below_5_mb():
    train = page.datasets.load_data("digits", "", False, 1, False, 28, 1, "cpu")[0]
    images = train.pixels[torch.arange(5000) % 4500] / 255
    made = page.make_page(torch.rand(5000, 2).double(), train.labels[torch.arange(5000) % 4500], torch.arange(5000),
                          train.class_names, images, images, images[:1024], torch.zeros(2).double(),
                          torch.ones(2).double(), title="t", facts="f", axes=["x", "y"])
    assert len(made) < 5_000_000 and b"image/png" in made


class Browser:
    """Headless Chromium with one page, driven over its debugging pipe by real mouse, touch and key events."""

    def __init__(self, folder, url):
        (inward, self.out), (self.back, outward) = os.pipe(), os.pipe()
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   "--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}",
                   "--remote-debugging-pipe"]
        self.process = subprocess.Popen(["bash", "-c", f'exec "$@" 3<&{inward} 4>&{outward}', "bash", *command],
                                        pass_fds=(inward, outward), stderr=subprocess.DEVNULL)
        os.close(inward)
        os.close(outward)
        self.events, self.number, self.rest, self.session = [], 0, b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=1000, height=700, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setTouchEmulationEnabled", enabled=True)
        self.call("Page.navigate", url=url)
        while self.js("document.readyState + Object.values(sheets ?? {}).every(one => one.complete)") != "completetrue":
            time.sleep(0.05)
        self.frame()

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
        answer = self.call("Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True)
        return answer["result"].get("value")

    def frame(self):
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 20))))")

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
        return self.js(f"toScreen(place({i})).map((at, k) => at + plane.getBoundingClientRect()['xy'[k]])")

    def seen(self, canvas):
        """The pixels of a canvas: (height, width), its red channel."""
        width, values = self.js(f"[{canvas}.width, Array.from({canvas}.getContext('2d').getImageData(0, 0, "
                                f"{canvas}.width, {canvas}.height).data)]")
        return np.array(values).reshape(-1, width, 4)[:, :, 0]

    def close(self):
        self.session = {}
        self.call("Browser.close")
        self.process.wait(30)
        os.close(self.out)
        os.close(self.back)


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium: apt-get install chromium")
def test_the_page_in_a_browser(vae, tmp_path):
    look(vae, tmp_path, num_points=60)
    data = read(tmp_path / "latents_space_2d.html")
    browser = Browser(tmp_path / "profile", (tmp_path / "latents_space_2d.html").as_uri())
    try:
        drive(browser, data)
        told = [json.dumps(event) for event in browser.events if event["method"] in
                ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")]
        assert not [line for line in told if "will-read-frequently" not in line]  # that is about seen(), above
        asked = {event["params"]["request"]["url"].split(":")[0] for event in browser.events
                 if event["method"] == "Network.requestWillBeSent"}
        assert asked == {"file", "data"}
        # and were the page to ask, its policy would not let it
        assert browser.js("fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"
        assert any("Content Security Policy" in json.dumps(event) for event in browser.events)
    finally:
        browser.close()


def drive(browser, data):
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
    assert (browser.seen("left") == data["images"][i]).all() and (browser.seen("right") == data["rebuilt"][i]).all()
    # empty ground: what the decoder draws there, and no image
    box = browser.js("(box => [box.x, box.y, box.width, box.height])(plane.getBoundingClientRect())")
    for cell in (0, 14, 24):
        low, high = np.array([data["low"], data["high"]])
        at = (low + (np.array([cell % 5, cell // 5]) + 0.5) / 5 * (high - low)).tolist()
        browser.js("shown.fill(false)")  # so that no point is in the way
        px, py = browser.js(f"toScreen({at})")
        browser.mouse("Moved", box[0] + px, box[1] + py)
        assert "empty ground" in browser.js("said.textContent") and "no image" in browser.js("left_name.textContent")
        assert (browser.seen("right") == data["grid"][cell]).all() and not browser.seen("left").any()
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
    ink = "plane.getContext('2d').getImageData(0, 0, plane.width, plane.height).data.filter(byte => byte).length"
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
    assert browser.js("chosen") == order[1] and f"image {data['numbers'][order[1]]}," in browser.js("said.textContent")
    before = browser.js("({...view})")
    browser.key("+")
    browser.key("ArrowRight")
    after = browser.js("({...view})")
    assert after["scale"] > before["scale"] and after["x"] > before["x"] and browser.js("middle") is True
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


def test_what_cannot_be_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.chdir(tmp_path)
    main_gan.main(*tiny(main_gan, num_epochs=1, batch_size=4500))
    weights = {"script": "main_vae", "data": "digits", "epoch": 1,
               "model_kwargs": {"hidden_size": 4, "latent_dim": 1, "image_size": 784}}
    networks = main_vae.Encoder(**weights["model_kwargs"]), main_vae.Decoder(**weights["model_kwargs"])
    common.save("line.pt", {**weights, "encoder": networks[0].state_dict(), "decoder": networks[1].state_dict()})
    (tmp_path / "few").mkdir()
    for i in range(20):
        Image.new("L", (28, 28), i).save(tmp_path / "few" / f"{i}.png")
    weights["model_kwargs"]["latent_dim"] = 2
    networks = main_vae.Encoder(**weights["model_kwargs"]), main_vae.Decoder(**weights["model_kwargs"])
    common.save("few.pt", {**weights, "data": "folder few", "encoder": networks[0].state_dict(),
                           "decoder": networks[1].state_dict()})
    for options, words in (([], "a weights_*.pt with an encoder and a decoder; train first: python main_vae.py"),
                           (["--weights_path", "out/weights_epoch_1.pt"], "main_gan.py is no script of this collection "
                            "that has an encoder and a decoder; train one that has: python main_vae.py"),
                           (["--weights_path", "line.pt"], "line.pt: 1 latents, 500 test images; a plane takes 2"),
                           (["--weights_path", "few.pt", "--data_dir", "few"], "2 latents, 2 test images; a plane"),
                           (["--cells", "0"], "cells is 0; legal: >= 1")):
        monkeypatch.setattr("sys.argv", ["latent_space_vae.py", *options])
        with pytest.raises(SystemExit) as stop:
            common.run(page.main, page.source_kwargs, page.plane_kwargs)
        told = capsys.readouterr().err
        assert stop.value.code == 2 and words in told and told.count("\n") == 1
        assert told.startswith("latent_space_vae.py: ")
    assert not list(tmp_path.glob("**/latents*"))
