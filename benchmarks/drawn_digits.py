"""How many digits that are drawn in the page of latent_space_vae.py get the right neighbours?

run:    python latent_space_vae.py --weights_path weights/main_vae.pt --output_dir out
        python benchmarks/drawn_digits.py weights/main_vae.pt out/latents_space_2d.html
        (needs MNIST in data/, Chromium, and `pip install playwright`)
expect: 19, 20 and 19 of 20 with the seeds 0, 1 and 2; 20 s each on one core of an AMD EPYC

Each digit is a list of strokes that were written down by hand, not an image of MNIST. It is drawn
twice with the mouse in the page's box, each time turned, slanted, scaled and shaken differently.
The page centres and encodes it. Its class is that of most of the 10 nearest codes of the test
images.
"""

import argparse
import math
import random
import sys
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import main_vae


def arc(x, y, across, down, start, end):
    """15 points of an ellipse round (x, y), from one angle in degrees to another."""
    points = []
    for i in range(15):
        angle = math.radians(start + (end - start) * i / 14)
        points.append((x + across * math.cos(angle), y + down * math.sin(angle)))
    return points


# {digit: its strokes}; right and down, in parts of the box's side
DIGITS = {
    0: [arc(0.5, 0.5, 0.22, 0.34, -90, 270)],
    1: [[(0.52, 0.15), (0.48, 0.85)]],
    2: [[*arc(0.5, 0.33, 0.2, 0.18, -170, 40), (0.3, 0.82), (0.74, 0.82)]],
    3: [arc(0.47, 0.33, 0.2, 0.17, -150, 90) + arc(0.47, 0.67, 0.23, 0.18, -80, 150)],
    4: [[(0.36, 0.18), (0.28, 0.52), (0.72, 0.52)], [(0.66, 0.2), (0.62, 0.86)]],
    5: [[(0.7, 0.17), (0.36, 0.17), (0.33, 0.47), *arc(0.48, 0.64, 0.22, 0.2, -120, 140)]],
    6: [[(0.62, 0.15), (0.42, 0.38), *arc(0.48, 0.66, 0.18, 0.19, -160, 190)]],
    7: [[(0.27, 0.2), (0.72, 0.2), (0.45, 0.85)]],
    8: [arc(0.5, 0.32, 0.15, 0.16, 90, -270) + arc(0.5, 0.67, 0.19, 0.19, -90, 270)],
    9: [[*arc(0.5, 0.34, 0.18, 0.18, 0, -340), (0.68, 0.32), (0.6, 0.86)]],
}


def wobble(strokes):
    """The same strokes by another hand."""
    turn, slant = random.uniform(-0.15, 0.15), random.uniform(-0.1, 0.25)
    scale = random.uniform(0.75, 1.05)
    right, down = random.uniform(-0.05, 0.05), random.uniform(-0.05, 0.05)
    shaken = []
    for stroke in strokes:
        points = []
        for x, y in stroke:
            x, y = x - 0.5 - slant * (y - 0.5), y - 0.5
            across = x * math.cos(turn) - y * math.sin(turn)
            along = x * math.sin(turn) + y * math.cos(turn)
            x = 0.5 + scale * across + right + random.gauss(0, 0.01)
            y = 0.5 + scale * along + down + random.gauss(0, 0.01)
            points.append((x, y))
        shaken.append(points)
    return shaken


def draw(page, strokes):
    """Draw in an empty box; returns mu (D,) and the error."""
    page.click("#clear")
    page.evaluate("box.scrollIntoView()")
    box = page.locator("#box").bounding_box()
    for stroke in strokes:
        for i, (x, y) in enumerate(stroke):
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
            if i == 0:
                page.mouse.down()
        page.mouse.up()
    while page.evaluate("asked + queues > 0 || own === null"):
        page.wait_for_timeout(10)
    mu, error = page.evaluate("[Array.from(own.latent), own.error]")
    return torch.tensor(mu), error


def count_right(page, codes, labels):
    """Draw each digit twice; returns how many of the twenty have the right class."""
    right = 0
    for digit, strokes in 2 * list(DIGITS.items()):
        mu, error = draw(page, wobble(strokes))
        nearest = (codes - mu).norm(dim=1).topk(10, largest=False).indices
        found = torch.bincount(labels[nearest]).argmax().item()
        right += found == digit
        print(f"drawn {digit}, found {found}, error {error:.1f}")
    return right


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights_path")
    parser.add_argument("page")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    options = parser.parse_args()
    random.seed(options.seed)
    encoder, _ = main_vae.load_model(options.weights_path)
    weights = common.load_weights(options.weights_path, "main_vae", "encoder")
    _, test = common.load_again(weights, "", "cpu")
    with torch.no_grad():
        codes, _ = encoder(test.pixels / 255)
    with sync_playwright() as playwright:
        launch = dict(executable_path=options.browser, args=["--no-sandbox"])
        browser = playwright.chromium.launch(**launch)
        page = browser.new_page()
        page.goto(Path(options.page).resolve().as_uri())
        right = count_right(page, codes, test.labels)
        browser.close()
    print(f"{right} of 20 right, by the codes of {len(test)} images of {test.name}")


if __name__ == "__main__":
    main()
