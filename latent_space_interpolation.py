"""Walks through the latent space of a trained generator or decoder:
what lies between two images?

paper:  White 2016, Sampling Generative Networks,
        https://arxiv.org/abs/1609.04468 (why great circles);
        their formula, slerp, is from Shoemake 1985, Animating
        Rotation with Quaternion Curves, SIGGRAPH
run:    python latent_space_interpolation.py        (takes the newest weights in the folders here)
writes: beside the weights: latent_space_interpolation.png,
        latent_space_interpolation.csv (how long the walks
        are, and their largest step), latent_space_walk.gif
        (closed walks), latent_space.html (the network itself
        in a page, with samples, sliders and walks to try; it
        is one file and needs no network connection)
expect: main_vae on MNIST, 50 epochs, walks of 10 images: a step
        changes the pixels 1.27 times as much as a step of a plain
        cross-fade on straight lines, 1.31 times on great circles,
        1.38 times between test images. That says how far a walk
        goes in pixels, and not how good its images are. 5 s on
        one core of an AMD EPYC; a page of 5.1 MB that draws 630
        images a second in a browser there (main_dcgan: 2.9 MB, 46
        a second)
"""

import base64
import gzip
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import common

source_kwargs = {
    "weights_path": "",  # of any script; empty: the newest below this folder
    "output_dir": "",  # everything is written there; empty: beside the weights
    "data_dir": "",  # the folder of an encoder's data; empty: that of training
}
picture_kwargs = {
    "rows": 8,  # walks of each kind
    "steps": 10,  # images of a walk, at least 2; the sweep is steps x steps
    "sweep": 1.0,  # standard deviations that two latents go either way
    "stops": 5,  # points that the animation passes through, at least 2
    "frames": 12,  # pictures of the animation from one point to the next
    "seed": 0,  # of the points
    "device": "auto",  # auto: cuda, else mps, else cpu; or one by name: cuda:1
}
MOST_BYTES = 8_000_000  # a larger page is made again with 11 bits a weight, not 16, then 8


def check_settings(settings):
    """Refuse impossible values in one line, before any work. settings: {key: value}."""
    for key in ("rows", "frames"):
        common.require(settings[key] >= 1, f"{key} must be at least 1")
    for key in ("steps", "stops"):
        common.require(settings[key] >= 2, f"{key} must be at least 2")
    common.require(settings["sweep"] > 0, "sweep must be above 0")
    seeds = "seed must be between 0 and 4294967295"
    common.require(0 <= settings["seed"] < 2**32, seeds)


def lerp(start, end, t):
    """The straight line: start, end (N, D), t (T,) in [0, 1] -> (N, T, D)."""
    return torch.lerp(start[:, None], end[:, None], t[:, None])


def slerp(start, end, t):
    """The great circle, with shapes as in lerp:

        (sin((1 - t) w) start + sin(t w) end) / sin w

    w is the angle between start and end. If both have the same
    norm, so has every point between. In many dimensions D nearly
    all of N(0, I) lies at sqrt(D) from 0, and two points drawn
    from it are nearly at right angles. So the middle of the
    straight line between them lies at sqrt(D / 2), where training
    has hardly ever been. Where the ends are nearly parallel or
    opposite, sin w vanishes, and the walk is the straight line.
    """
    cosine = F.cosine_similarity(start, end, dim=1).clamp(-1, 1)
    angle = cosine.acos()[:, None, None]  # (N, 1, 1)
    # nearly parallel: line and circle differ by less than a
    # millionth; nearly opposite: many circles join the ends
    near = angle.sin() < 1e-3
    sine = torch.where(near, 1, angle.sin())
    start_share = ((1 - t[:, None]) * angle).sin() / sine  # (N, T, 1)
    end_share = (t[:, None] * angle).sin() / sine
    circle = start_share * start[:, None] + end_share * end[:, None]  # (N, T, D)
    return torch.where(near, lerp(start, end, t), circle)


def closed_walk(points, frames):
    """points (S, D) -> (S * frames, D): on great circles from
    each to the next, and from the last to the first.
    """
    t = torch.arange(frames, device=points.device) / frames  # not 1, which is the next one's 0
    following = points.roll(-1, 0)  # after the last comes the first
    return slerp(points, following, t).flatten(0, 1)


def evenness(images):
    """images (N, T, C, H, W) -> (at most N, T - 1):
    how much each step changes, in units of a cross-fade.

    The change is the mean of |x' - x| over the pixels. A
    cross-fade from the first image to the last has 1 everywhere,
    and is as short as a walk between its ends can be. So the mean
    of a row, the length of the walk over that of the cross-fade,
    is never below 1. The ends have to differ: a closed walk has
    no such length, and a walk from an image to itself is left out
    (if all are such walks, they are kept: 0 everywhere). If all
    the change happens in one step, that step is T - 1 times the
    mean.
    """
    change = images.diff(dim=1).abs().flatten(2).mean(2)  # (N, T - 1)
    whole = (images[:, -1] - images[:, 0]).abs().flatten(1).mean(1)  # (N,)
    fade = whole / change.shape[1]
    steps = change / fade.clamp(min=1e-9)[:, None]
    differ = whole > 1e-6  # (N,)
    return steps[differ] if differ.any() else steps


class Artist:
    """Draws images from z, with the generator of a weights file,
    or with its decoder; then there is its encoder, too.
    """

    def __init__(self, weights_path, data_dir, device):
        weights = common.load_weights(weights_path, None, "model_kwargs")
        script = common.script_of(weights)
        kwargs, data = weights["model_kwargs"], weights["data"]
        self.script = weights["script"]
        source = f"{self.script} on {data['name']}"
        self.device = device
        self.shape = data["shape"]  # of an image: [C, H, W]
        self.black = -1 if data["normalize"] else 0  # white is 1
        self.latent_dim = kwargs.get("latent_dim") or kwargs["latent_variable_size"]
        self.has_prior = kwargs.get("model_type") != "ae"
        self.class_names = data["class_names"]
        self.encoder = None
        self.class_vectors = None  # (classes, E), of a conditional generator
        if "generator" in weights:
            self.network = script.load_generator(weights_path).to(device)
            if hasattr(self.network, "embedding"):
                self.class_vectors = self.network.embedding.weight.detach()
        else:
            encoder, decoder = script.load_model(weights_path)
            self.encoder = encoder.to(device)
            self.network = decoder.to(device)
            _, self.test = common.load_again(weights, data_dir, device)
            source = common.describe_source(weights, self.test)
        self.title = f"{source}: {Path(weights_path).name}"

    @torch.inference_mode()
    def draw(self, z, vectors=None):
        """z (rows, columns, D) -> images (rows, columns, C, H, W) in [0, 1].

        vectors (rows, columns, E) is what a conditional generator
        takes in place of labels. Without it the first row is of
        the first class, the next row of the next class.
        """
        points = z.flatten(0, 1)  # (N, D)
        if self.encoder is not None:
            images = self.network.sample(points)
        elif self.class_vectors is None:
            images = self.network(points)
        else:
            if vectors is None:
                labels = torch.arange(len(z)) % len(self.class_vectors)
                vectors = self.class_vectors[labels][:, None].expand(-1, z.shape[1], -1)
            # the vectors stand in for the embedding's
            # table, and each point looks up its own
            table = {"embedding.weight": vectors.flatten(0, 1)}
            labels = torch.arange(len(points), device=self.device)
            images = torch.func.functional_call(self.network, table, (points, labels))
        images = images.view(*z.shape[:2], *self.shape)
        return (images - self.black) / (1 - self.black)

    @torch.inference_mode()
    def encode(self, index):
        """index (N,) of test images -> their mu (N, D)."""
        means = []
        for part in index.split(500):  # all at once would not fit every memory
            images, _ = self.test.batch(part)
            mu, _ = self.encoder(images)
            means.append(mu)
        return torch.cat(means)

    def choose_images(self, count):
        """The indices of `count` test images at random: (count,)."""
        return torch.randint(len(self.test), (count,)).to(self.device)

    def choose_points(self, count):
        """z (count, D) ~ N(0, I);
        of an autoencoder, which has no prior, codes of test images.
        """
        if self.has_prior:
            return torch.randn(count, self.latent_dim).to(self.device)
        return self.encode(self.choose_images(count))

    def spread(self):
        """Mean and standard deviation of each latent, (D,) both: of
        test images' codes, or without an encoder of N(0, I).
        """
        if self.encoder is None:
            return torch.zeros(self.latent_dim), torch.ones(self.latent_dim)
        mu = self.encode(torch.arange(min(1000, len(self.test)), device=self.device))
        return mu.mean(0), mu.std(0, correction=0)


@dataclass
class Panel:
    """A part of the picture. A row of it is a walk."""

    title: str
    images: torch.Tensor  # (rows, columns, C, H, W) in [0, 1]
    x_label: str
    y_label: str = ""
    change: torch.Tensor | None = None  # (rows, steps - 1) by `evenness`, if it is to be shown


def test_image_panel(artist, rows, t):
    """Walks between the codes of test images.
    The images themselves stand at the ends.

    For images of your choice set index to 2 * rows numbers of
    test images, the starts first: tensor([3, 8, ...]).
    """
    index = artist.choose_images(2 * rows)
    images = artist.test.pixels[index][:, None] / 255  # (2 rows, 1, C, H, W)
    first, last = images.chunk(2)
    start, end = artist.encode(index).chunk(2)  # (rows, D) each
    between = artist.draw(lerp(start, end, t))
    shown = torch.cat([first, between, last], dim=1)
    x_label = "image, reconstruction  ...  image"
    return Panel("between test images", shown, x_label, change=evenness(between))


def class_panel(artist, z, t):
    """Walks from the vector of a class to that of
    the next, while z (rows, D) stays as it is.
    """
    vectors = artist.class_vectors
    labels = torch.arange(len(z)) % len(vectors)
    following = (labels + 1) % len(vectors)
    between = lerp(vectors[labels], vectors[following], t)  # (rows, T, E)
    images = artist.draw(z[:, None].expand(-1, len(t), -1), between)
    x_label = "from a class to the next, at the same z"
    return Panel("between classes", images, x_label, change=evenness(images))


def sweep_panel(artist, z, t, sweep):
    """The two latents that vary most are swept,
    one across and one down; the others are those of z (D,).

    A VAE may leave latents unused, and those would show nothing.
    A generator's all vary alike, so its first two are taken.
    """
    mean, deviation = artist.spread()
    order = deviation.argsort(descending=True, stable=True)[:2].tolist()
    across, down = order[0], order[-1]  # the same one, if there is only one latent
    way = sweep * (2 * t - 1)  # (T,) from -sweep to sweep
    points = z.repeat(len(t), len(t), 1)  # (T, T, D)
    points[:, :, across] = mean[across] + deviation[across] * way
    points[:, :, down] = mean[down] + deviation[down] * way[:, None]
    images = artist.draw(points.view(1, -1, len(z)))  # as one row, which is of one class
    images = images.view(len(t), len(t), *artist.shape)
    x_label = f"latent {across + 1}, {sweep:g} s.d. to both sides"
    y_label = f"latent {down + 1}, {sweep:g} s.d. to both sides"
    return Panel("two latents swept", images, x_label, y_label)


def mosaic(images):
    """images (rows, columns, C, H, W) in [0, 1]
    -> one Pillow image, grey or in colour.
    """
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    grid = make_grid(images.flatten(0, 1), nrow=images.shape[1], padding=1, pad_value=1)
    grid = grid[: images.shape[2]]  # make_grid gives grey images three equal channels
    return to_pil_image((255 * grid).round().byte().cpu())


def save_picture(panels, title, path):
    """The panels, and how much each step of their walks changes."""
    across = 2 if len(panels) < 4 else 3
    figure = common.new_figure(4.6 * across, 8.4)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(2, across, place)
        axes.imshow(mosaic(panel.images).convert("RGB"), interpolation="nearest")
        axes.set(xticks=[], yticks=[], xlabel=panel.x_label, ylabel=panel.y_label)
        axes.set_title(panel.title, fontsize=10)
    axes = figure.add_subplot(2, across, len(panels) + 1)
    for panel in panels:
        if panel.change is not None:
            mean = panel.change.mean(0).cpu()  # (steps - 1,)
            axes.plot(range(1, len(mean) + 1), mean, "o-", markersize=4, label=panel.title)
    axes.axhline(1, color="gray", linewidth=1, label="a cross-fade of the ends")
    axes.set(xlabel="step", ylabel="change of the pixels (cross-fade = 1)", ylim=(0, None))
    axes.set_title("change from step to step (mean over rows)", fontsize=10)
    axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    common.write(path, figure)


def save_animation(images, path):
    """images (T, rows, columns, C, H, W) in [0, 1] -> a GIF of 80 ms a frame, without end."""
    from PIL import Image, ImageOps

    frames = []
    for image in images:
        frame = mosaic(image)
        zoom = max(1, 150 // frame.width)  # small pictures are enlarged by whole pixels
        frames.append(ImageOps.scale(frame, zoom, Image.Resampling.NEAREST))
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=80, loop=0)
    common.write(path, buffer.getvalue())


def save_table(panels, title, path):
    """A row for each kind of walk. title: whose walks they are."""
    table = []
    for panel in panels:
        if panel.change is not None:
            mean, largest = panel.change.mean().item(), panel.change.max().item()
            row = {"walk": panel.title, "mean step (cross-fade = 1)": round(mean, 3)}
            row |= {"largest step": round(largest, 3), "model": title}
            print(f"{panel.title}: mean step {mean:.3f} of a cross-fade's, largest {largest:.3f}")
            table.append(row)
    common.write(path, table)


class Weights:
    """Tensors as bytes, end to end; the page is told where each begins.

    Vectors are stored exactly. Every other tensor is stored as
    whole numbers of `bits` bits, times a factor for each output.
    """

    def __init__(self, bits):
        self.bits, self.data = bits, bytearray()

    def append(self, kind, length, content):
        place = {"kind": kind, "start": len(self.data), "length": length}
        self.data += content.numpy().tobytes()
        return place

    def add(self, tensor):
        """tensor: a vector (outputs,), or (..., outputs)."""
        values = tensor.detach().float().cpu()
        if values.ndim == 1:
            return self.append("float32", len(values), values)
        # the largest entry of each output becomes the largest number of so many bits
        largest = values.flatten(0, -2).abs().amax(0).clamp(min=1e-30)  # (outputs,)
        scales = largest / (2 ** (self.bits - 1) - 1)
        whole = (values / scales).round().to(torch.int16)
        # All low bytes, then all high ones. With 11 bits the high
        # ones have only 8 values, and gzip makes them small.
        halves = torch.stack([whole & 255, whole >> 8 & 255]).to(torch.uint8)
        place = self.append("int16", whole.numel(), halves)
        return {**place, "scales": self.add(scales)}

    def as_text(self):
        """All bytes, compressed, as characters."""
        return base64.b64encode(gzip.compress(self.data, 6, mtime=0)).decode()


def export_plain(layer):
    """A layer without weights as pages/network.js
    takes it, or None if it is unknown there.
    """
    name = type(layer).__name__
    types = {"ReLU": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid", "Flatten": "flatten"}
    if name in types:
        return {"type": types[name]}
    if name == "LeakyReLU":
        return {"type": "leakyRelu", "slope": layer.negative_slope}
    if name == "Upsample" and layer.mode == "nearest" and layer.scale_factor in range(1, 17):
        return {"type": "upsample", "factor": int(layer.scale_factor)}
    if name == "AvgPool2d" and layer.stride == layer.kernel_size and layer.padding == 0:
        return {"type": "averagePool", "size": layer.kernel_size}
    if name == "Unflatten":
        channels, height, width = layer.unflattened_size
        return {"type": "unflatten", "channels": channels, "height": height, "width": width}
    return None


def export_conv(layer, weights):
    """A convolution, transposed or not, or None
    if it is of a kind that the page cannot run.
    """
    sides = (layer.kernel_size, layer.stride, layer.padding)
    square = all(side[0] == side[1] for side in sides)
    usual = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    if not square or not usual or layer.output_padding != (0, 0):
        return None
    order = (2, 3, 0, 1) if layer.transposed else (2, 3, 1, 0)
    weight = layer.weight.permute(order)  # (kernel, kernel, inputs, outputs)
    bias = torch.zeros(layer.out_channels) if layer.bias is None else layer.bias
    return {
        "type": "convTranspose" if layer.transposed else "conv",
        "weight": weights.add(weight),
        "bias": weights.add(bias),
        "kernel": layer.kernel_size[0],
        "stride": layer.stride[0],
        "padding": layer.padding[0],
    }


def export(module, weights):
    """The layers of a module as a list, as pages/network.js takes it.
    Their weights are added to `weights`, a Weights.

    Raises BadInput, which names the layer, if the page cannot run it.
    """
    if isinstance(module, nn.Sequential):
        layers = []
        for child in module:
            layers += export(child, weights)
        return layers
    if hasattr(module, "residual"):  # a block of gan_cub; without a shortcut, x itself is added
        shortcut = getattr(module, "shortcut", nn.Sequential())
        branches = [export(module.residual, weights), export(shortcut, weights)]
        return [{"type": "residual", "branches": branches}]
    if isinstance(module, nn.Linear):
        bias = torch.zeros(module.out_features) if module.bias is None else module.bias
        weight = weights.add(module.weight.T)  # (inputs, outputs)
        return [{"type": "linear", "weight": weight, "bias": weights.add(bias)}]
    if isinstance(module, nn.BatchNorm2d):
        # in eval mode it multiplies each channel by a number and adds another
        factor = module.weight / (module.running_var + module.eps).sqrt()
        shift = module.bias - factor * module.running_mean
        return [{"type": "scale", "weight": weights.add(factor), "bias": weights.add(shift)}]
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        layer = export_conv(module, weights)
    else:
        layer = export_plain(module)
    common.require(layer is not None, f"pages/network.js cannot run the layer {module}")
    return [layer]


def export_network(artist, weights):
    """The layers from z (of a conditional generator
    followed by the class's vector) to [0, 1].
    """
    layers = export(artist.network.model, weights)
    # what the scripts compute outside of their modules
    if artist.script == "gan_cub":
        layers.append({"type": "tanh"})
    if artist.encoder is not None and artist.black == 0:
        layers.append({"type": "sigmoid"})  # decoders of [0, 1] return logits
    # "brightness" maps black to 0 and white to 1, and clamps,
    # as the decoder of colour images in main_ae does
    layers.append({"type": "brightness", "black": artist.black})
    return layers


def strongest_directions(artist, count):
    """The directions in z along which the image changes most, as the page takes them.

    They are those of a linear map in the generator's place. Least
    squares over N samples gives the map W of z (D) to the pixels
    (P) that fits best: images = z W^T. With W = U S V^T,
    the rows of V^T are orthogonal directions in z, and a step
    along one of them changes the image by its singular value.
    Where the latents are uncorrelated, the squares of all of these
    add up to the variance that the map gives to the pixels. z is
    in units of its standard deviations, which are those of the
    prior, or, without one, of the samples.
    """
    number = max(2000, 4 * artist.latent_dim)
    points = artist.choose_points(number)  # (N, D)
    drawn = [artist.draw(part[:, None]).flatten(1) for part in points.split(500)]
    images = torch.cat(drawn).float().cpu()  # (N, pixels)
    points = points.float().cpu()
    mean, deviation = torch.zeros(artist.latent_dim), torch.ones(artist.latent_dim)
    if not artist.has_prior:
        mean, deviation = points.mean(0), points.std(0).clamp(min=1e-6)
    z = (points - mean) / deviation
    z, images = z - z.mean(0), images - images.mean(0)
    transposed = torch.linalg.lstsq(z, images).solution  # W^T (D, P)
    squares, vectors = torch.linalg.eigh(transposed @ transposed.T)  # S^2, ascending, and V
    directions = vectors.T.flip(0)[:count]  # (count, D)
    shares = squares.flip(0)[:count] / squares.sum().clamp(min=1e-12)
    # an eigenvector and its opposite serve equally
    # well: the largest entry is made positive
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))  # (count, 1)
    return {
        "samples": number,
        "mean": rounded(mean),
        "deviation": rounded(deviation),
        "directions": rounded(directions * largest.sign()),
        "shares": rounded(shares),
    }


def page_data(artist, seed):
    """All that the page needs besides its network."""
    data = {
        "title": artist.title,
        "shape": artist.shape,
        "seed": seed,
        "has_prior": artist.has_prior,
        "classes": [],
        "vectors": [],
        **strongest_directions(artist, 8),
    }
    if artist.class_vectors is not None:
        data["classes"] = artist.class_names
        data["vectors"] = rounded(artist.class_vectors)
    return data


def rounded(tensor):
    """Numbers with six decimals, which are enough for a page."""
    return tensor.cpu().double().mul(1e6).round().div(1e6).tolist()


def save_page(artist, seed, path):
    """Write the page, unless the network has a
    layer that cannot run there: then a warning.
    """
    data = page_data(artist, seed)
    for bits in (16, 11, 8):
        weights = Weights(bits)
        try:
            data["layers"] = export_network(artist, weights)
        except common.BadInput as error:
            common.warn(f"{path} is left out: {error}")
            return
        data["weights"] = weights.as_text()
        data["bits"] = bits
        page = common.fill_page("latent_space.html", data)
        if len(page) < MOST_BYTES:
            break
    common.write(path, page)
    print(f"{path}: {len(page) / 1e6:.2f} MB")


def explore(weights_path, output_dir, data_dir, *, rows, steps, sweep, stops, frames, seed, device):
    """Write picture, table, animation and page; returns the panels of the picture.

    A walk of your own is one more Panel in the list `panels`,
    whose picture has room for one more; with `change` it is also
    in the table. Draw nothing at random for it, since animation
    and page take the random numbers that follow.
    """
    device = common.choose_device(device)
    path = weights_path or common.newest_weights()
    artist = Artist(path, data_dir, device)
    print(f"{path}: {artist.title}")
    folder = Path(output_dir or Path(path).parent)
    torch.manual_seed(seed)
    t = torch.linspace(0, 1, steps, device=device)
    start, end = artist.choose_points(2 * rows).chunk(2)  # (rows, D) each
    ends = "between random points" if artist.has_prior else "between codes of test images"
    lines = artist.draw(lerp(start, end, t))
    circles = artist.draw(slerp(start, end, t))
    panels = [
        Panel("straight lines", lines, ends, change=evenness(lines)),
        Panel("great circles", circles, "between the same points", change=evenness(circles)),
    ]
    if artist.encoder is not None:
        panels.append(test_image_panel(artist, rows, t))
    if artist.class_vectors is not None:
        panels.append(class_panel(artist, start, t))
    panels.append(sweep_panel(artist, start[0], t, sweep))
    save_picture(panels, artist.title, folder / "latent_space_interpolation.png")
    save_table(panels, artist.title, folder / "latent_space_interpolation.csv")

    walkers = torch.stack([closed_walk(artist.choose_points(stops), frames) for _ in range(4)])
    images = artist.draw(walkers).transpose(0, 1)  # (T, 4, C, H, W)
    save_animation(images.unflatten(1, (2, 2)), folder / "latent_space_walk.gif")
    save_page(artist, seed, folder / "latent_space.html")
    print(f"all of it is in {folder}/")
    return panels


def main(source_kwargs, picture_kwargs):
    """Draw with the given settings;
    returns the panels of the picture, with all their images.
    """
    check_settings(picture_kwargs)
    return explore(**source_kwargs, **picture_kwargs)


if __name__ == "__main__":
    common.run_script(main, source_kwargs, picture_kwargs)
