"""run.html, the page of a run, in a real browser."""

import json
import os
import re
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
    page = browser.new_page(viewport={"width": 1000, "height": 800}, has_touch=True)
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
    assert page.locator("#pictures .shown").evaluate(loaded)
    return page.locator("#pictures .shown").get_attribute("src").split("?")[0]


def test_the_slider_goes_through_the_pictures_of_each_kind(page):
    assert page.locator("#kinds").inner_text().split() == ["generated", "image", "reconstruction"]
    assert is_shown(page) == "generated_image_epoch_2.png"
    page.locator("#when").press("ArrowLeft")
    assert is_shown(page) == "generated_image_epoch_1.png"
    curves = page.locator("#charts").bounding_box()["y"]
    page.get_by_role("radio", name="reconstruction").check()
    assert is_shown(page) == "reconstruction_epoch_1.png", "the same epoch of the other kind"
    assert page.locator("#which").inner_text() == "epoch 1, 1 of 2 pictures"
    assert page.locator("#charts").bounding_box()["y"] == curves, "nothing jumps"
    page.reload()
    assert is_shown(page) == "reconstruction_epoch_1.png", "a reading again forgets nothing"


def test_the_curves_say_the_history_s_values(page, runs):
    history = helpers.read_history(runs / "out")
    caption = page.locator("figcaption", has_text="reconstruction")
    ours, test = (float(history[1][key]) for key in ("reconstruction", "test reconstruction"))
    assert f"at epoch 2: {ours:.4g}, test {test:.4g}" in caption.inner_text()
    canvas = page.locator("figure", has=caption).locator("canvas")
    box = canvas.bounding_box()
    canvas.tap(position={"x": box["width"] / 2, "y": 60})
    assert "at epoch 1" in caption.inner_text(), "it stays when the finger is lifted"
    page.locator("#title").tap()
    assert "at epoch 2" in caption.inner_text()
    canvas.hover(position={"x": box["width"] / 2, "y": 60})
    assert f"{float(history[0]['reconstruction']):.4g}" in caption.inner_text()
    assert "at epoch 1" in caption.inner_text()
    canvas.press("ArrowRight")
    assert "at epoch 2" in caption.inner_text()
    canvas.press("Home")
    assert "at epoch 1" in caption.inner_text()
    canvas.press("End")
    assert "at epoch 2" in caption.inner_text()


def test_a_line_that_the_keys_have_set_is_told_and_let_go(page, runs):
    caption = page.locator("figcaption", has_text="reconstruction")
    canvas = page.locator("figure", has=caption).locator("canvas")
    canvas.press("Home")
    assert canvas.get_attribute("role") == "slider"
    assert canvas.get_attribute("aria-valuetext").startswith("at epoch 1: ")
    values = [canvas.get_attribute(f"aria-value{name}") for name in ("min", "now", "max")]
    assert values == ["1", "1", "2"]
    page.keyboard.press("Tab")
    assert "at epoch 2" in caption.inner_text()
    canvas.dispatch_event("pointermove", {"pointerType": "touch", "clientX": 70, "clientY": 0})
    assert "at epoch 1" in caption.inner_text()
    canvas.dispatch_event("pointercancel", {"pointerType": "touch"})  # the finger scrolls the page
    assert "at epoch 2" in caption.inner_text()


def test_a_picture_may_have_any_name(page, runs):
    name = 'top 5% of "a"'
    shutil.copy(runs / "out" / "reconstruction_epoch_1.png", runs / "out" / f"{name}.png")
    path = runs / "out" / "named.html"
    text = (runs / "out" / "run.html").read_text(encoding="utf-8")
    head, _, rest = text.partition('"pictures": [')
    text = f'{head}"pictures": [{json.dumps(name + ".png")}, {rest}'
    path.write_text(text, encoding="utf-8")
    page.goto(path.as_uri())
    page.get_by_role("radio").first.check()
    page.reload()
    assert page.get_by_role("radio").first.is_checked()
    assert page.locator("#settings").inner_text()


def test_another_run_is_laid_over(page, runs):
    lines = (runs / "other" / "history.csv").read_text(encoding="utf-8").splitlines()
    (runs / "short.csv").write_text("\n".join(lines[:2]), encoding="utf-8")
    page.set_input_files("#other", runs / "short.csv")
    ends = "other run ends at epoch 1"
    page.locator("figcaption", has_text="KL").filter(has_text=ends).wait_for(timeout=5000)
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
    (runs / "bad.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    for wrong in (runs / "bad.csv", runs / "out" / "reconstruction_epoch_1.png"):
        page.set_input_files("#other", wrong)
        words = f'{wrong.name} has no column "epoch"'
        page.locator("#said", has_text=words).wait_for(timeout=5000)
        assert f"other run {other:.4g}" in caption.inner_text(), "the run that was laid over stays"
    page.get_by_role("button", name="remove the other run").click()
    assert "other run" not in caption.inner_text()
    assert not page.locator("#remove").is_visible() and not page.locator("#said").inner_text()


def test_settings_and_state_are_told(page):
    state = r"epoch 2 of 2, written at \d\d:\d\d on \d{4}-\d\d-\d\d; finished"
    assert re.fullmatch(state, page.locator("#state").inner_text())
    table = page.locator("#settings").inner_text()
    classes = "class_names\tbright, dark"
    for words in ("latent_dim\t8", "seed\t0", "images\t90", "torch\t2.", classes):
        assert words in table


def test_a_run_that_goes_on_is_read_again(page, runs):
    path = runs / "out" / "unfinished.html"
    text = (runs / "out" / "run.html").read_text(encoding="utf-8")
    assert '"goal": 2' in text
    path.write_text(text.replace('"goal": 2', '"goal": 3'), encoding="utf-8")
    # the timer's function is called here, and not by the clock
    page.add_init_script("window.setInterval = (run, pause) => { window.timer = {run, pause}; }")
    page.goto(path.as_uri())
    state = page.locator("#state")
    following = "the folder is read again every five seconds"
    assert "epoch 2 of 3" in state.inner_text() and following in state.inner_text()
    assert page.evaluate("timer.pause") == 5000
    page.evaluate("document.before = true")  # it is gone after a reload

    def stays():
        page.evaluate("timer.run()")
        page.wait_for_timeout(200)
        return page.evaluate("document.before")

    # who chooses a file, holds the slider or uses the keys is not disturbed
    with page.expect_file_chooser():
        page.locator("#other").click()
    assert "not read again while a file is chosen" in state.inner_text() and stays()
    page.locator("#other").dispatch_event("cancel")
    assert following in state.inner_text()
    page.locator("#when").dispatch_event("pointerdown")
    assert "the slider is held" in state.inner_text() and stays()
    page.locator("#when").dispatch_event("pointerup")
    page.keyboard.press("Tab")
    state.filter(has_text="while the keyboard has the focus").wait_for(timeout=5000)
    assert stays()
    page.evaluate("document.activeElement.blur()")
    with page.expect_navigation():
        page.evaluate("timer.run()")
    assert not page.evaluate("document.before") and following in state.inner_text()
    path.write_text(text, encoding="utf-8")
    with page.expect_navigation():
        page.evaluate("timer.run()")
    assert "finished" in state.inner_text()
