"""Where a trained encoder puts the test images: its latent means in two dimensions, as a picture and as a page.

paper:  Pearson 1901, On lines and planes of closest fit, Phil. Mag. 2 (principal components);
        colours: Petroff 2021, https://arxiv.org/abs/2107.02270, told apart by colour-blind readers too
run:    python latent_space_vae.py                  (the newest weights with an encoder; any key below is an option)
writes: beside the weights: latents_space_2d.png; latents_space_2d.html (open it: one file, offline, move the mouse);
        latents_space_2d.csv (how well the classes can be told apart)
expect: main_vae on MNIST, 50 epochs: 10 nearest neighbours 96.2 % right on 32 latents, 33.5 % on the plane; a page of
        3.4 MB for 5,000 images; 8 s of one AMD EPYC core
"""
import base64
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

import common
import datasets

source_kwargs = {
    "weights_path": "",  # weights_epoch_{E}.pt of main_vae or main_ae; empty: the newest in a folder here
    "output_dir": "",  # everything is written there; empty: beside the weights
    "data_dir": "data",  # where the images lie that the encoder was trained on
}
plane_kwargs = {
    "num_points": 5000,  # >= 1; test images on the page; the picture and the figures take them all
    "cells": 32,  # >= 1; the page shows what the decoder draws at so many places to each side of the plane
    "neighbours": 10,  # >= 1; of the nearest-neighbour classifier
    "seed": 0,  # in [0, 4294967295]; of the images that the classifiers are judged on
    "device": "auto",  # auto takes cuda, else mps, else cpu; or name one, such as cpu or cuda:1
}
COLOURS = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"]
MARKERS = "os^DvPX*<p"  # colour alone never tells two classes apart
MOST_BYTES = 5_000_000  # of the page


def principal_axes(points):
    """points (N, D) -> mean (D,), axes (2, D), shares (2,) of the variance, all float64: the plane of most variance.

    Eigenvectors of the covariance, exact and not by a random solver; an axis and its opposite serve equally, so the
    largest entry is made positive. The same points give the same picture every time.
    """
    points = points.double()
    mean = points.mean(0)
    values, vectors = torch.linalg.eigh((points - mean).T @ (points - mean) / max(1, len(points) - 1))  # ascending
    axes = vectors[:, -2:].T.flip(0)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return mean, axes, values[-2:].flip(0) / values.sum().clamp(min=1e-300)


def neighbours_accuracy(train, train_labels, test, test_labels, k):
    """Share of test (M, D) whose class most of the k nearest of train (N, D) have; a tie goes to the lower label."""
    votes = torch.cat([train_labels[torch.cdist(part, train).topk(min(k, len(train)), largest=False).indices]
                       for part in test.split(500)])
    return (F.one_hot(votes).sum(1).argmax(1) == test_labels).double().mean().item()


def linear_accuracy(train, train_labels, test, test_labels):
    """Share of test (M, D) that a multinomial logistic regression on train (N, D) puts into the right class.

    It is convex, so L-BFGS from zero finds the same answer every time; a small penalty makes it the only one.
    """
    mean, scale = train.mean(0), train.std(0).clamp(min=1e-9)
    train, test = (F.pad((part - mean) / scale, (0, 1), value=1) for part in (train, test))
    weights = torch.zeros(train.shape[1], int(train_labels.max()) + 1, dtype=train.dtype, device=train.device,
                          requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(train @ weights, train_labels) + 1e-4 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return ((test @ weights).argmax(1) == test_labels).double().mean().item()


def tell_classes_apart(points, labels, neighbours, seed):
    """(nearest neighbours' accuracy, linear accuracy) of points (N, D), judged on a fifth of them."""
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed)).to(points.device)
    judged, learnt = order[:len(order) // 5], order[len(order) // 5:]
    parts = points[learnt].double(), labels[learnt], points[judged].double(), labels[judged]
    return neighbours_accuracy(*parts, neighbours), linear_accuracy(*parts)


def save_scatter(plane, labels, class_names, axes, title, path):
    """plane (N, 2), labels (N,): one colour and one mark a class; its name stands in its middle if there is room."""
    from matplotlib import patheffects
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 7), layout="constrained")
    one = figure.subplots()
    for start in range(20):  # every class a little at a time, so that none covers the others
        for label in labels.unique().tolist():
            style = dict(color=COLOURS[label % 10], marker=MARKERS[(label + label // 10) % 10], s=9, linewidths=0)
            one.scatter(*plane[labels == label][start::20].T, label="" if start else class_names[label], **style)
    size, taken = plane.amax(0) - plane.amin(0), []
    middles = {label: plane[labels == label].median(0).values for label in labels.unique().tolist()}
    for label in sorted(middles, key=lambda label: -(middles[label] - plane.mean(0)).norm()):  # the outermost first
        if all(((middles[label] - other).abs() > size * torch.tensor([0.12, 0.04])).any() for other in taken):
            one.annotate(class_names[label].split()[0], middles[label], ha="center", va="center", weight="bold",
                         fontsize=12, path_effects=[patheffects.withStroke(linewidth=3, foreground="white")])
            taken.append(middles[label])
    one.set(xlabel=axes[0], ylabel=axes[1], aspect="equal")
    one.set_title(title, fontsize=10)
    one.legend(markerscale=2.5, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(buffer := io.BytesIO(), dpi=110)
    common.write(path, buffer.getvalue())


def sprites(images, columns, quality):
    """images (N, C, H, W) in [0, 1] side by side in one picture, as a data URI; quality 0 is a PNG, else a JPEG."""
    from PIL import Image

    count, channels, height, width = images.shape
    sheet = torch.zeros(-(-count // columns) * columns, channels, height, width)
    sheet[:count] = images
    sheet = sheet.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).reshape(-1, columns * width, channels)
    pixels = (255 * sheet).round().byte().numpy()
    kind, settings = ("PNG", {}) if not quality else ("JPEG", dict(quality=quality, subsampling=0))
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(buffer := io.BytesIO(), kind, **settings)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def make_page(plane, labels, numbers, class_names, images, rebuilt, grid, low, high, **words):
    """The page: points (N, 2) with labels and numbers (N,), two pictures (N, C, H, W) each; grid (cells^2, C, H, W).

    The grid goes from low (2,) to high (2,), the bottom row first. words: title, facts and axes. Returns bytes.
    """
    def pack(values):
        return base64.b64encode(values.numpy().astype("<u2").tobytes()).decode()

    columns, (x, y) = math.isqrt(len(plane) - 1) + 1, ((plane - low) / (high - low) * 65535).round().long().T
    data = dict(words, x=pack(x), y=pack(y), labels=pack(labels), numbers=numbers.tolist(), low=low.tolist(),
                high=high.tolist(), classes=class_names, colours=[COLOURS[i % 10] for i in range(len(class_names))],
                shapes=[(i + i // 10) % 10 for i in range(len(class_names))], side=images.shape[-1], columns=columns,
                cells=math.isqrt(len(grid)))
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    for quality in [0] * (images.shape[1] == 1) + [85, 70, 50, 30, 15]:  # exact pixels if they fit
        data.update(images=sprites(images, columns, quality), rebuilt=sprites(rebuilt, columns, quality),
                    grid=sprites(grid, data["cells"], quality))
        text = json.dumps(data).replace("<", "\\u003c")  # so that no class name can end the script element
        if len(page := template.replace("@DATA@", text).encode()) < MOST_BYTES:
            break
    return page


def main(source_kwargs, plane_kwargs):
    """Write picture, page and table; returns {where: (nearest neighbours' accuracy, linear accuracy)}."""
    common.check(__file__, {**source_kwargs, **plane_kwargs})
    o = SimpleNamespace(**source_kwargs, **plane_kwargs)
    device = common.choose_device(o.device)
    path, weights, load = common.open_weights(o.weights_path, "load_model")
    encoder, decoder = (network.to(device) for network in load(path))
    test = datasets.load_again(weights, o.data_dir, device)[1]
    latents, low, folder = weights["model_kwargs"]["latent_dim"], -1 if test.normalize else 0, o.output_dir
    if latents < 2 or len(test) < 10:
        raise common.BadInput(f"{path}: {latents} latents, {len(test)} test images; a plane takes 2, and 10 to fill it")

    def batches():
        for index in torch.arange(len(test), device=device).split(500):
            yield test.batch(index)[0]

    def draw(z):  # (N, latents) -> (N, C, H, W) in [0, 1]
        images = torch.cat([decoder.sample(part.to(device)) for part in z.float().split(500)])
        return (images.cpu().view(-1, *test.pixels.shape[1:]) - low) / (1 - low)

    with torch.inference_mode():
        codes, labels = torch.cat([encoder(x)[0] for x in batches()]).cpu(), test.labels.cpu()  # mu, not a sample
        mean, axes, shares = principal_axes(codes)
        plane = (codes - mean) @ axes.T  # (N, 2), float64
        width = (plane.amax(0) - plane.amin(0)).clamp(min=1e-6)
        edges = plane.amin(0) - 0.03 * width, plane.amax(0) + 0.03 * width
        middles = (torch.arange(o.cells) + 0.5) / o.cells  # of the cells, from left to right in the bottom row first
        grid = draw(mean + (edges[0] + torch.cartesian_prod(middles, middles).flip(1) * 1.06 * width) @ axes)
        some = torch.linspace(0, len(test) - 1, min(o.num_points, len(test))).round().long()
        rebuilt = draw(codes[some])

    results, names = {}, test.class_names
    for where, points in ((f"{latents} latents", codes), ("plane", plane)) if len(labels.unique()) > 1 else ():
        results[where] = tell_classes_apart(points, labels, o.neighbours, o.seed)
    title = f"{len(test):,} test images: {weights['script']} on {weights['data']}, epoch {weights['epoch']}"
    facts = "\n".join(f"{where}: {o.neighbours} nearest neighbours {near:.1%} right, linear {linear:.1%}"
                      for where, (near, linear) in results.items())
    words = [f"{which} principal component ({share:.1%} of the variance)"
             for which, share in zip(("first", "second"), shares)]
    folder = Path(folder or Path(path).parent)
    save_scatter(plane, labels, names, words, f"{title}\n{facts}", folder / "latents_space_2d.png")
    images = test.pixels.cpu()[some] / 255
    page = make_page(plane[some], labels[some], some, names, images, rebuilt, grid, *edges, title=title, axes=words,
                     facts=f"{len(some):,} of them on this page\n{facts}")
    common.write(folder / "latents_space_2d.html", page)
    lines = ["where,share of the variance,nearest neighbours' accuracy,linear accuracy"]
    lines += [f"{where},{share:.4f},{near:.4f},{linear:.4f}"
              for (where, (near, linear)), share in zip(results.items(), (1, shares.sum().item()))]
    common.write(folder / "latents_space_2d.csv", "\n".join([*lines, ""]).encode())
    print(f"{path}: {title}", *lines, f"{folder}/latents_space_2d.html: {len(page) / 1e6:.2f} MB", sep="\n")
    return results


if __name__ == "__main__":
    common.run(main, source_kwargs, plane_kwargs)
