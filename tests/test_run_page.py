"""run.html, the page of a run, in a real browser."""

import os
import shutil

import helpers
import pytest
from playwright.sync_api import sync_playwright

import main_ae

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(
    not CHROMIUM and "CI_BROWSER" not in os.environ,
    reason="needs a browser: apt-get install chromium",
)


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "CI_BROWSER is set, but chromium is not on PATH"
    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of two epochs, beside each other: out and other."""
    folder = tmp_path_factory.mktemp("runs")
    pictures = folder / "pictures"
    helpers.write_pictures(pictures)
    for name, lr in (("out", 0.001), ("other", 0.01)):
        small = dict(data_dir=str(pictures), output_dir=str(folder / name), lr=lr, sample_every=1)
        main_ae.main(*helpers.small_dicts(main_ae, **small))
    return folder


@pytest.fixture
def page(browser, runs):
    """run.html, opened from the disk; it reports nothing wrong and asks nobody for anything."""
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    wrong, asked = [], []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((runs / "out" / "run.html").as_uri())
    yield page
    page.close()
    assert not wrong
    assert all(url.startswith(runs.as_uri()) for url in asked)


def is_shown(page):
    """The file name of the picture that is shown, if the browser could read it."""
    loaded = "image => image.decode().then(() => image.naturalWidth > 0)"
    assert page.locator("#picture").evaluate(loaded)
    return page.locator("#picture").get_attribute("src").split("?")[0]


def test_the_slider_goes_through_the_pictures_of_each_kind(page):
    assert is_shown(page) == "generated_image_epoch_2.png"
    page.locator("#when").press("ArrowLeft")
    assert is_shown(page) == "generated_image_epoch_1.png"
    page.get_by_role("radio", name="reconstruction").check()
    assert is_shown(page) == "reconstruction_epoch_2.png"
    page.locator("#when").press("Home")
    page.reload()
    assert is_shown(page) == "reconstruction_epoch_1.png", "a reading again forgets nothing"


def test_the_curves_say_the_history_s_values(page, runs):
    history = helpers.read_history(runs / "out")
    caption = page.locator("figcaption", has_text="reconstruction")
    ours, test = (float(history[1][key]) for key in ("reconstruction", "test reconstruction"))
    assert f"{ours:.4g}, test {test:.4g} at epoch 2" in caption.inner_text()
    canvas = page.locator("figure", has=caption).locator("canvas")
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] / 2, "y": 60})
    assert f"{float(history[0]['reconstruction']):.4g}" in caption.inner_text()
    assert "at epoch 1" in caption.inner_text()
    canvas.press("ArrowRight")
    assert "at epoch 2" in caption.inner_text()


def test_another_run_is_laid_over(page, runs):
    page.set_input_files("#other", runs / "other" / "history.csv")
    other = float(helpers.read_history(runs / "other")[1]["KL"])
    caption = page.locator("figcaption", has_text="KL")
    caption.filter(has_text=f"other run {other:.4g}").wait_for(timeout=5000)  # the file is read
    canvas = page.locator("figure", has=caption).locator("canvas")
    orange = canvas.evaluate(
        """canvas => {
            const context = canvas.getContext("2d");
            const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
            let count = 0;
            for (let i = 0; i < pixels.length; i += 4)
                count += pixels[i] > 180 && pixels[i + 1] < 120 && pixels[i + 2] < 80;
            return count;
        }"""
    )
    assert orange > 50


def test_settings_and_state_are_told(page):
    assert page.locator("#state").inner_text() == "epoch 2 of 2; finished"
    table = page.locator("#settings").inner_text()
    classes = "class_names\tbright, dark"
    for words in ("latent_dim\t8", "seed\t0", "images\t90", "torch\t2.", classes):
        assert words in table


def test_a_run_that_goes_on_is_read_again(page, runs):
    path = runs / "out" / "unfinished.html"
    text = (runs / "out" / "run.html").read_text(encoding="utf-8")
    assert '"goal": 2' in text
    path.write_text(text.replace('"goal": 2', '"goal": 3').replace("5000", "200"), encoding="utf-8")
    page.goto(path.as_uri())
    assert "epoch 2 of 3; this page" in page.locator("#state").inner_text()
    path.write_text(text, encoding="utf-8")
    page.locator("#state", has_text="epoch 2 of 2; finished").wait_for(timeout=5000)
