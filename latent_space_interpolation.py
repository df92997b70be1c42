"""Walks through the latent space of a trained generator or decoder: what lies between two images that it draws?

paper:  White 2016, Sampling Generative Networks, https://arxiv.org/abs/1609.04468 (why spherical); slerp itself is
        Shoemake's, Animating Rotation with Quaternion Curves, SIGGRAPH 1985
run:    python latent_space_interpolation.py        (the newest weights here; any key below is an option)
writes: beside the weights: latent_space_interpolation.png and .csv (length of the walks, and their largest step),
        latent_space_walk.gif (a closed walk through several points)
expect: main_vae on MNIST, 50 epochs: mean step 1.27 times a cross-fade's on straight lines, 1.31 on great circles, 1.38
        between test images; 5 s of one AMD EPYC core
"""
import io
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import common
import datasets

source_kwargs = {
    "weights_path": "",  # weights_epoch_{E}.pt of any script that draws images; empty: the newest in a folder here
    "output_dir": "",  # everything is written there; empty: beside the weights
    "data_dir": "data",  # where the images lie that an encoder was trained on; generators need none
}
picture_kwargs = {
    "rows": 8,  # >= 1; walks of each kind
    "steps": 10,  # >= 2; images a walk, and points a side of the sweep
    "sweep": 1.0,  # > 0; two latents go so many standard deviations to both sides, the others stay
    "stops": 5,  # >= 2; points that the animation passes
    "frames": 12,  # >= 1; pictures of the animation from one point to the next
    "seed": 0,  # in [0, 4294967295]; of the points
    "device": "auto",  # auto takes cuda, else mps, else cpu; or name one, such as cpu or cuda:1
}
MOST_BYTES = 500_000  # of the animation: its pixels are enlarged as far as that allows


def lerp(start, end, t):
    """The straight line: start, end (N, D), t (T,) in [0, 1] -> (N, T, D), exactly start and end at 0 and 1."""
    return (1 - t)[:, None] * start[:, None] + t[:, None] * end[:, None]


def slerp(start, end, t):
    """The great circle, (sin((1 - t) w) start + sin(t w) end) / sin w, w the angle between them; shapes as in lerp.

    It keeps the norm of ends of equal norm. Nearly all of N(0, I) in D dimensions lies sqrt(D) from 0; the middle of a
    straight line between two of its points lies sqrt(D / 2) from 0, where training has hardly been. Near parallel or
    opposite ends sin w vanishes, and it is the straight line.
    """
    cosine = nn.functional.cosine_similarity(start, end, dim=1).clamp(-1, 1)
    angle = cosine.acos()[:, None, None]  # (N, 1, 1)
    near = angle.sin() < 1e-3  # there the two differ by less than a millionth, or no great circle is the right one
    sine, t = torch.where(near, 1, angle.sin()), t[:, None]  # (N, 1, 1), (T, 1)
    circle = (((1 - t) * angle).sin() * start[:, None] + (t * angle).sin() * end[:, None]) / sine
    return torch.where(near | (t == 0) | (t == 1), lerp(start, end, t[:, 0]), circle)  # no rounding at the ends


def closed_walk(points, frames):
    """points (S, D) -> (S * frames, D): from each to the next and from the last to the first, on great circles."""
    t = torch.arange(frames, device=points.device) / frames  # without 1: that is the next one's 0
    return slerp(points, points.roll(-1, 0), t).flatten(0, 1)


def evenness(images):
    """images (N, T, C, H, W) -> (N, T - 1): how much each step changes the pixels, as a multiple of a cross-fade's.

    The change is the mean of |x' - x| over pixels. A cross-fade from the first image to the last, uniform in pixels,
    has 1 everywhere. The mean of a row is the length of its walk over the shortest there is: never below 1. A leap
    shows as a step of up to T - 1 times that.
    """
    change = images.diff(dim=1).abs().flatten(2).mean(2)
    fade = (images[:, -1] - images[:, 0]).abs().flatten(1).mean(1) / change.shape[1]
    return change / fade.clamp(min=1e-9)[:, None]  # 0 where nothing changes at all


class Artist:
    """The generator or decoder of a weights file, and the encoder if there is one.

    latents: how many numbers a point z has; vectors (K, E): what a conditional generator takes in place of K labels.
    """

    def __init__(self, weights_path, data_dir, device):
        self.path, weights, load = common.open_weights(weights_path, "load_generator", "load_model")
        kwargs, networks, self.device = weights["model_kwargs"], load(self.path), device
        when = Path(self.path).stem.removeprefix("weights_").replace("_", " ")  # such as epoch 20
        self.title = f"{weights['script']} on {weights['data']}, {when}"
        self.latents = kwargs.get("latent_variable_size") or kwargs["latent_dim"]
        self.encoder, self.vectors, self.low, self.has_prior = None, None, -1, kwargs.get("model_type") != "ae"
        self.mean, self.deviation = torch.zeros(self.latents), torch.ones(self.latents)  # of z
        if isinstance(networks, nn.Module):
            self.paint = networks.to(device)
            if kwargs.get("num_classes"):  # it looks labels up in its embedding, and is given the vectors here instead
                self.vectors, networks.embedding = networks.embedding.weight.detach(), nn.Identity()
        else:
            self.encoder, decoder = (network.to(device) for network in networks)
            self.paint, self.test = decoder.sample, datasets.load_again(weights, data_dir, device)[1]
            self.low = -1 if self.test.normalize else 0
            codes = self.encode(torch.arange(min(1000, len(self.test)), device=device))[1]
            self.mean, self.deviation = codes.mean(0).cpu(), codes.std(0, correction=0).cpu()

    @torch.inference_mode()
    def draw(self, z, vectors=None):
        """z (N, latents), vectors (N, E) if there are any -> images (N, C, H, W) in [0, 1]."""
        inputs = [z] if vectors is None else [z, vectors]
        images = torch.cat([self.paint(*parts) for parts in zip(*(each.split(500) for each in inputs))])
        images = images.unflatten(1, (1, math.isqrt(images.shape[1]), -1)) if images.ndim == 2 else images
        return (images - self.low) / (1 - self.low)

    @torch.inference_mode()
    def encode(self, index):
        """index (N,) of test images -> the images (N, C, H, W) in [0, 1], and their z (N, latents)."""
        images = self.test.batch(index)[0]
        return (images - self.low) / (1 - self.low), self.encoder(images)[0]

    def choose_images(self, count, random):
        """As encode, of `count` test images at random."""
        return self.encode(torch.randint(len(self.test), (count,), generator=random).to(self.device))

    def choose_points(self, count, random):
        """z (count, latents) ~ N(0, I); for an autoencoder, which has no prior, codes of test images."""
        if not self.has_prior:
            return self.choose_images(count, random)[1]
        return torch.randn(count, self.latents, generator=random).to(self.device)


def mosaic(images):
    """images (rows, columns, C, H, W) -> one picture (C, height, width) with a white line between any two."""
    images = nn.functional.pad(images, (0, 1, 0, 1), value=1)
    return images.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[:, :-1, :-1]


def save_picture(panels, steps, title, path):
    """panels {title: (images (rows, columns, C, H, W), x label, y label)}; steps {walk: evenness (rows, T - 1)}."""
    from matplotlib.figure import Figure

    columns = 2 if len(panels) < 4 else 3
    rows = -(-(len(panels) + 1) // columns)
    figure = Figure(figsize=(4.6 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns).flatten()
    for one, (name, (images, x, y)) in zip(axes, panels.items()):
        one.imshow(mosaic(images.cpu()).permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        one.set(xticks=[], yticks=[], xlabel=x, ylabel=y)
        one.set_title(name, fontsize=10)
    curves, *spare = axes[len(panels):]
    for style, (name, change) in zip(("o-", "s--", "^:"), steps.items()):
        curves.plot(range(1, change.shape[1] + 1), change.mean(0).cpu(), style, markersize=4, label=name)
    curves.axhline(1, color="gray", linewidth=1, label="a cross-fade of the ends")
    curves.set(xlabel="step", ylabel="change of the pixels (cross-fade = 1)", ylim=(0, None))
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.set_title("change from step to step (mean over rows)", fontsize=10)
    curves.legend(fontsize=8)
    for one in spare:
        one.axis("off")
    figure.suptitle(title, fontsize=11)
    figure.savefig(buffer := io.BytesIO(), dpi=100)
    common.write(path, buffer.getvalue())


def save_animation(images, path):
    """images (T, rows, columns, C, H, W) in [0, 1] -> a GIF that repeats for ever."""
    from PIL import Image

    frames = [(255 * mosaic(each)).round().byte().cpu() for each in images]
    for zoom in (5, 4, 3, 2, 1):
        large = [frame.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2) for frame in frames]
        first, *rest = [Image.fromarray((one[0] if len(one) == 1 else one.permute(1, 2, 0)).numpy()) for one in large]
        first.save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=rest, duration=80, loop=0)
        if len(buffer.getvalue()) < MOST_BYTES:
            break
    common.write(path, buffer.getvalue())


def main(source_kwargs, picture_kwargs):
    """Draw the pictures; returns {kind of walk: its evenness, (rows, steps - 1)}."""
    common.check(__file__, {**source_kwargs, **picture_kwargs})
    o = SimpleNamespace(**source_kwargs, **picture_kwargs)
    device = common.choose_device(o.device)
    artist = Artist(o.weights_path, o.data_dir, device)
    folder, vectors = Path(o.output_dir or Path(artist.path).parent), artist.vectors
    random, t = torch.Generator().manual_seed(o.seed), torch.linspace(0, 1, o.steps, device=device)

    def walk(z, labels=None):  # (rows, steps, latents) -> (rows, steps, C, H, W), a row a class where there are classes
        if vectors is not None and labels is None:
            labels = vectors[torch.arange(len(z)) % len(vectors)][:, None].expand(-1, z.shape[1], -1)
        images = artist.draw(z.flatten(0, 1), labels if labels is None else labels.flatten(0, 1))
        return images.unflatten(0, z.shape[:2])

    start, end = artist.choose_points(2 * o.rows, random).chunk(2)
    walks = {"straight lines": walk(lerp(start, end, t)), "great circles": walk(slerp(start, end, t))}
    points = "random points" if artist.has_prior else "codes of test images"
    panels = {f"{name} between {ends}": (walks[name], "from one to the other", "pairs")
              for name, ends in (("straight lines", points), ("great circles", f"the same {points}"))}
    if artist.encoder:
        (first, last), ends = (each.chunk(2) for each in artist.choose_images(2 * o.rows, random))
        walks["between test images"] = between = walk(lerp(*ends, t))
        panels["straight lines between test images"] = (
            torch.cat([first[:, None], between, last[:, None]], 1), "image, reconstruction  ...  image", "pairs")
    if vectors is not None:
        labels = torch.arange(o.rows) % len(vectors)
        between = lerp(vectors[labels], vectors[(labels + 1) % len(vectors)], t)
        walks["between classes"] = walk(start[:, None].expand(-1, o.steps, -1), between)
        panels["straight lines from a class to the next"] = (walks["between classes"], "z stays as it is", "classes")
    z = start[0].repeat(o.steps, o.steps, 1)  # (rows, columns, latents)
    across, *down = artist.deviation.argsort(descending=True, stable=True)[:2].tolist()  # a VAE's others may be idle
    for latent, way in [(across, t)] + [(latent, t[:, None]) for latent in down]:
        z[:, :, latent] = artist.mean[latent] + artist.deviation[latent] * o.sweep * (2 * way - 1)
    panels["two latents swept, the others fixed"] = (
        walk(z, vectors if vectors is None else vectors[0].expand(o.steps, o.steps, -1)),
        *(f"latent {latent + 1}, {o.sweep:g} s.d. to both sides" for latent in (across, *down, across)[:2]))
    steps = {name: evenness(images) for name, images in walks.items()}
    save_picture(panels, steps, artist.title, folder / "latent_space_interpolation.png")

    walkers = [closed_walk(artist.choose_points(o.stops, random), o.frames) for _ in range(4)]  # 4 of (T, latents)
    images = walk(torch.stack(walkers)).transpose(0, 1).unflatten(1, (2, 2))  # (T, 2, 2, C, H, W)
    save_animation(images, folder / "latent_space_walk.gif")

    lines = ["walk,mean step (cross-fade = 1),largest step"]
    lines += [f"{name},{change.mean():.4g},{change.max():.4g}" for name, change in steps.items()]
    common.write(folder / "latent_space_interpolation.csv", "\n".join([*lines, ""]).encode())
    print(f"{artist.path}: {artist.title}", *lines, sep="\n")
    return steps


if __name__ == "__main__":
    common.run(main, source_kwargs, picture_kwargs)
