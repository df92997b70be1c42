"""A map of where a trained encoder puts the test
images, as a picture and as a page to explore.

paper:  Pearson 1901, On lines and planes of closest fit to
        systems of points in space, Philosophical Magazine 2
        (principal components)
        Petroff 2021, https://arxiv.org/abs/2107.02270
        (colours that colour-blind readers tell apart, too)
run:    python latent_space_vae.py          (takes the newest weights with an encoder)
writes: beside the weights: latents_space_2d.png,
        latents_space_2d.csv (how well the classes can be told
        apart), latents_space_2d.html (encoder and decoder
        themselves in a page: point at any place for what is drawn
        there, or draw a digit, and see where it lies and whether
        its error would give it away as an anomaly; it is one file
        and needs no connection)
expect: main_vae on MNIST, 50 epochs, hidden_size 400: 10 nearest
        neighbours are 96.2 % right on 32 latents and 35.2 % on
        the plane; of 20 digits drawn in the page 19 are right; a
        page of 3.7 MB for 5,000 images, which encodes and decodes
        in 0.8 ms; 8 s on one core of an AMD EPYC
"""

import base64
import io
import math
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import nn
from torch.nn import functional as F

import common
from detect_vae_anomalies import reconstruction_error
from latent_space_interpolation import Weights, export, rounded

source_kwargs = {
    "weights_path": "",  # of main_vae or main_ae; empty: the newest below this folder
    "output_dir": "",  # everything is written there; empty: beside the weights
    "data_dir": "",  # the data's folder; empty: that of training
}
plane_kwargs = {
    "num_points": 5000,  # test images on the page; picture and table take all
    "neighbours": 10,  # of the nearest-neighbour classifier
    "seed": 0,  # of the images that the classifiers are judged on
    "device": "auto",  # auto: cuda, else mps, else cpu; or one by name: cuda:1
}
COLOURS = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"]
COLOURS += ["#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"]
MARKERS = "os^DvPX*<p"  # of ten classes, no two differ in colour alone
MOST_PICTURES = 3_000_000  # bytes of the page's pictures; more of them are packed tighter
MOST_BYTES = 8_000_000  # of the page; a larger one takes the next of PRECISIONS
# (bits of a weight, share of the codes' variance that is kept)
PRECISIONS = [(16, 1), (11, 1), (16, 0.9999), (11, 0.9999), (11, 0.999), (8, 1), (8, 0.99)]


def check_settings(settings):
    """Refuse impossible values in one line, before any work. settings: {key: value}."""
    for key in ("num_points", "neighbours"):
        common.require(settings[key] >= 1, f"{key} must be at least 1")
    seeds = "seed must be between 0 and 4294967295"
    common.require(0 <= settings["seed"] < 2**32, seeds)


def principal_axes(points):
    """The plane of most variance:
    points (N, D) -> mean (D,), axes (2, D), shares (2,) of it.

    The axes are eigenvectors of the covariance. An axis and its
    opposite serve equally well, so the largest entry is made
    positive: the same points give the same picture every time.
    For another projection return another mean, and other axes
    of length 1 at right angles: the page goes back by them.
    """
    values, vectors = torch.linalg.eigh(torch.cov(points.T))  # ascending
    axes = vectors[:, -2:].T.flip(0)  # (2, D)
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))  # (2, 1)
    shares = values[-2:].flip(0) / values.sum().clamp(min=1e-300)
    return points.mean(0), axes * largest.sign(), shares


def neighbours_accuracy(train, train_labels, test, test_labels, k):
    """Share of test (M, D) whose class is the most frequent among the k nearest of train (N, D).

    A tie goes to the lower label.
    """
    distances = torch.cdist(test, train)  # (M, N)
    nearest = distances.topk(min(k, len(train)), largest=False).indices  # (M, k)
    votes = F.one_hot(train_labels[nearest]).sum(1)  # (M, classes)
    return (votes.argmax(1) == test_labels).double().mean().item()


def linear_accuracy(train, train_labels, test, test_labels):
    """Share of test (M, D) that a logistic regression
    on train (N, D) puts into the right class.

    Its loss is the cross-entropy, which is convex. The
    small penalty makes it strictly so: there is one best
    answer, and every optimiser finds it.
    """
    x = train.numpy()
    targets = F.one_hot(train_labels).numpy()  # (N, classes)
    shape = x.shape[1], targets.shape[1]

    def loss_and_gradient(flat):
        weights = flat.reshape(shape)
        log_p = log_softmax(x @ weights, axis=1)  # (N, classes)
        loss = -(targets * log_p).sum() / len(x) + 1e-4 * (weights**2).sum()
        gradient = x.T @ (np.exp(log_p) - targets) / len(x) + 2e-4 * weights
        return loss, gradient.ravel()

    start = np.zeros(shape).ravel()
    found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B")
    logits = test.numpy() @ found.x.reshape(shape)  # (M, classes)
    return (logits.argmax(1) == test_labels.numpy()).mean().item()


def tell_classes_apart(points, labels, neighbours, seed):
    """(accuracy of the nearest neighbours, of
    the regression) on a fifth of points (N, D).
    """
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    judged, learnt = order.tensor_split([len(order) // 5])
    near = neighbours_accuracy(
        points[learnt], labels[learnt], points[judged], labels[judged], neighbours
    )
    scaled = (points - points.mean(0)) / points.std(0).clamp(min=1e-9)
    scaled = F.pad(scaled, (0, 1), value=1)  # (N, D + 1): 1 is for the bias
    linear = linear_accuracy(scaled[learnt], labels[learnt], scaled[judged], labels[judged])
    return near, linear


def describe_space(name, points, share, labels, neighbours, seed):
    """A row of the table:
    how well points (N, D) part the classes, if there are several.
    """
    row = {"space": name, "share of the variance": round(share, 4)}
    if len(labels.unique()) > 1:
        near, linear = tell_classes_apart(points, labels, neighbours, seed)
        row[f"{neighbours} nearest neighbours right"] = round(near, 4)
        row["linear classifier right"] = round(linear, 4)
    return row


def look_of(label):
    """Colour and number of the mark of a class.
    No two of the first 100 classes look alike.
    """
    return COLOURS[label % 10], (label + label // 10) % 10


def places_of_names(places, labels, present):
    """{label: (x, y)}: the middle of each class, or a
    little above it where another name would be covered.
    """
    extent = (places.max(0).values - places.min(0).values).max().item()
    width, height = 0.12 * extent, 0.028 * extent  # of a name
    middles = []
    for label in present:
        x, y = places[labels == label].median(0).values.tolist()
        middles.append((y, x, label))
    names = []
    for y, x, label in sorted(middles):
        for other_y, other_x, _ in sorted(names):
            if abs(x - other_x) < width and abs(y - other_y) < height:
                y = other_y + height
        names.append((y, x, label))
    return {label: (x, y) for y, x, label in names}


def save_scatter(places, labels, class_names, axis_names, title, path):
    """places (N, 2), labels (N,):
    one colour and one mark a class, and its name in its middle.
    """
    from matplotlib.patheffects import withStroke

    figure = common.new_figure(8.6, 7)
    axes = figure.add_subplot()
    present = labels.unique().tolist()
    for start in range(20):  # a little of every class at a time, so that none covers the others
        for label in present:
            x, y = places[labels == label][start::20].T
            colour, shape = look_of(label)
            name = "" if start else class_names[label]
            axes.scatter(x, y, s=9, color=colour, marker=MARKERS[shape], linewidths=0, label=name)
    outline = [withStroke(linewidth=3, foreground="white")]
    named = present[:20]  # more names would hide the marks
    for label, place in places_of_names(places, labels, named).items():
        axes.annotate(class_names[label], place, ha="center", weight="bold", path_effects=outline)
    axes.set(xlabel=axis_names[0], ylabel=axis_names[1])
    axes.set_aspect("equal", adjustable="datalim")  # a long thin cloud still has room for names
    axes.set_title(title, fontsize=10)
    if 1 < len(present) <= 30:  # a longer legend would leave no room; the page has all names
        axes.legend(markerscale=2.5, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    common.write(path, figure)


def data_uri(images, columns, quality):
    """images (N, C, H, W) in [0, 1] as one picture:
    a JPEG of this quality, or exact for 0.
    """
    from PIL import features
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    sheet = make_grid(images, nrow=columns, padding=0)
    sheet = sheet[: images.shape[1]]  # make_grid gives grey images three equal channels
    picture = to_pil_image((255 * sheet).round().byte())
    buffer, kind = io.BytesIO(), "jpeg"
    if quality:
        picture.save(buffer, kind, quality=quality, subsampling=0)
    else:
        # exact WebP is a tenth smaller than PNG,
        # but has at most 16,383 pixels a side
        webp = features.check("webp") and max(picture.size) <= 16383
        kind = "webp" if webp else "png"
        picture.save(buffer, kind, lossless=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pack(values):
    """Whole numbers below 65536 as text, two bytes each."""
    return base64.b64encode(values.numpy().astype("<u2").tobytes()).decode()


def describe_points(places, labels, numbers, class_names):
    """What the page knows of its points: places (N, 2), labels (N,).

    numbers (N,) are theirs among the test images.
    """
    margin = 0.03 * (places.amax(0) - places.amin(0)).clamp(min=1e-6)
    low, high = places.amin(0) - margin, places.amax(0) + margin  # (2,) each
    at = (places - low) / (high - low)  # (N, 2) in [0, 1]
    x, y = (65535 * at).round().long().T
    looks = [look_of(label) for label in range(len(class_names))]
    return {
        "x": pack(x),
        "y": pack(y),
        "labels": pack(labels),
        "numbers": numbers.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "classes": class_names,
        "colours": [colour for colour, _ in looks],
        "shapes": [shape for _, shape in looks],
    }


def describe_codes(codes):
    """mu of at most a thousand points, so that the page
    can tell which are nearest to a drawing.

    Of codes (N, D) it is every code_step-th, as bytes between
    code_low and code_high; and none where D is above 64, since
    the page would grow too large.
    """
    step = math.ceil(len(codes) / 1000)
    low, high = codes.min().item(), codes.max().item()
    levels = (255 * (codes[::step] - low) / max(high - low, 1e-9)).round().to(torch.uint8)
    if codes.shape[1] > 64:
        levels = levels[:0]
    text = base64.b64encode(levels.numpy().tobytes()).decode()
    return {"codes": text, "code_step": step, "code_low": low, "code_high": high}


def describe_errors(errors):
    """What the page knows of the reconstruction errors (N,) of the test images.

    An image with an error above the threshold would be
    called an anomaly: 5 % of the test images are above it.
    """
    threshold = np.percentile(errors.numpy(), 95)
    short = [round(error, 2) for error in errors.tolist()]
    return {"errors": short, "threshold": round(float(threshold), 6)}


def make_linear(weight, bias):
    """A linear layer with this weight (outputs, inputs) and bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight, bias
    return layer


def narrow(to_mu, decoder, codes, share):
    """The layers that give and take a code, each as two narrow ones, for a smaller page.

    codes (N, D) of the test images are nearly mean + V c with few
    columns in V (D, K): the directions that hold `share` of
    their variance. So mu = W h + b becomes mean + V c with
    c = V^T (W h + b - mean), and the decoder's first layer,
    A z + a, becomes A V c + (A mean + a) with c = V^T (z - mean).
    Where that would not make the weights fewer, the layers stay.
    """
    mean = codes.mean(0).float()
    values, vectors = torch.linalg.eigh(torch.cov(codes.T))  # ascending
    held = values.cumsum(0) > (1 - share) * values.sum()
    held[-2:] = True  # the plane
    basis = vectors[:, held].float()  # V (D, K)
    latents, kept = basis.shape
    if kept * (to_mu.in_features + latents) >= to_mu.in_features * latents:
        return to_mu, decoder
    weight, bias = to_mu.weight.cpu(), to_mu.bias.cpu()
    down = make_linear(basis.T @ weight, basis.T @ (bias - mean))
    to_mu = nn.Sequential(down, make_linear(basis, mean))
    weight, bias = decoder[0].weight.cpu(), decoder[0].bias.cpu()
    down = make_linear(basis.T, -basis.T @ mean)
    first = nn.Sequential(down, make_linear(weight @ basis, weight @ mean + bias))
    return to_mu, nn.Sequential(first, *decoder[1:])


def describe_networks(hidden, to_mu, decoder, channels, black, bits):
    """Encoder and decoder for the page, and their weights as text.

    The encoder goes from brightness in [0, 1] through `hidden`
    and `to_mu`; the head that gives logvar is left out. black is
    what it takes for black; white is 1. The decoder's output is
    its script's own, logits for grey images: the page computes
    both the picture and the error from it.
    """
    weights = Weights(bits)
    factor = weights.add(torch.full((channels,), 1.0 - black))
    shift = weights.add(torch.full((channels,), float(black)))
    encoder = [{"type": "scale", "weight": factor, "bias": shift}]
    if isinstance(hidden[0], nn.Linear):  # it takes flat images
        encoder.append({"type": "flatten"})
    encoder += export(hidden, weights) + export(to_mu, weights)
    layers = {"encoder": encoder, "decoder": export(decoder, weights)}
    return {"layers": layers, "weights": weights.as_text(), "bits": bits}


def describe_images(images):
    """A picture (N, C, H, W) for each point.
    Those that would be too large are packed tighter.
    """
    columns = math.isqrt(len(images) - 1) + 1
    for quality in (0, 85, 70, 50, 30, 15):  # 0 is exact
        sheet = data_uri(images, columns, quality)
        if len(sheet) < MOST_PICTURES:
            break
    return {"images": sheet, "columns": columns, "shape": list(images.shape[1:])}


@torch.inference_mode()
def encode(encoder, decoder, test):
    """mu (N, D) of all test images and the
    errors (N,) of their reconstructions, float64.

    The reconstruction is from mu: that of a sample of
    q(z|x) would be noisier, and usually a worse one.
    """
    # to the CPU before .double(), since Apple's GPUs have no float64
    means, errors = [], []
    for index in torch.arange(len(test), device=test.device).split(500):
        images, _ = test.batch(index)
        mu, _ = encoder(images)
        error = reconstruction_error(decoder(mu), images)
        means.append(mu.cpu().double())
        errors.append(error.cpu().double())
    return torch.cat(means), torch.cat(errors)


def save_page(data, encoder, decoder, test, codes, path):
    """Write the page, unless a network has a
    layer that cannot run there: then a warning.
    """
    some = data["numbers"]
    images = test.pixels.cpu()[some] / 255
    digits = test.dataset_type in ("mnist", "digits")
    data = {**data, **describe_images(images), "digits": digits}
    black = -1 if test.normalize else 0
    for bits, share in PRECISIONS:
        to_mu, drawer = encoder.fc_mean, decoder.model
        if share < 1:
            to_mu, drawer = narrow(to_mu, drawer, codes, share)
        try:
            networks = describe_networks(encoder.model, to_mu, drawer, images.shape[1], black, bits)
        except common.BadInput as error:
            common.warn(f"{path} is left out: {error}")
            return
        page = common.fill_page("latent_space_vae.html", {**data, **networks, "share": share})
        if len(page) < MOST_BYTES:
            break
    common.write(path, page)
    print(f"{path}: {len(page) / 1e6:.2f} MB")


def survey(weights_path, output_dir, data_dir, *, num_points, neighbours, seed, device):
    """Write table, picture and page; returns the table's rows."""
    device = common.choose_device(device)
    path = weights_path or common.newest_weights("encoder")
    folder = Path(output_dir or Path(path).parent)
    weights = common.load_weights(path, None, "encoder")
    encoder, decoder = common.script_of(weights).load_model(path)
    _, test = common.load_again(weights, data_dir, device)
    codes, errors = encode(encoder.to(device), decoder.to(device), test)  # (N, D), (N,)
    count, latent_dim = codes.shape
    few = f"{path}: {latent_dim} latents, {count} test images; a plane takes 2, and 10 to fill it"
    common.require(latent_dim >= 2 and count >= 10, few)

    labels, class_names = test.labels.cpu(), test.class_names
    mean, axes, shares = principal_axes(codes)
    places = (codes - mean) @ axes.T  # (N, 2)
    table = [
        describe_space(f"{latent_dim} latents", codes, 1.0, labels, neighbours, seed),
        describe_space("plane", places, shares.sum().item(), labels, neighbours, seed),
    ]
    rows = [{**row, "data": test.name} for row in table]
    common.write(folder / "latents_space_2d.csv", rows)
    title = f"{common.describe_source(weights, test)}: {Path(path).name}"
    facts = "\n".join(in_words(row) for row in table)
    print(f"{path}: {title}\n{facts}")
    of_all = [f"principal component ({share:.1%} of the variance)" for share in shares]
    axis_names = [f"first {of_all[0]}", f"second {of_all[1]}"]
    picture = folder / "latents_space_2d.png"
    save_scatter(places, labels, class_names, axis_names, f"{title}\n{facts}", picture)

    some = torch.linspace(0, count - 1, min(num_points, count)).round().long()
    data = describe_points(places[some], labels[some], some, class_names)
    data |= {"title": title, "facts": facts, "axis_names": axis_names}
    data |= describe_codes(codes[some])
    # the page computes place = axes (mu - mean) and z = mean + axes^T place
    data |= {"mean": rounded(mean), "axes": rounded(axes), **describe_errors(errors)}
    save_page(data, encoder, decoder, test, codes, folder / "latents_space_2d.html")
    print(f"all of it is in {folder}/")
    return table


def in_words(row):
    """Such as: plane, 15.2% of the variance: 10 nearest neighbours right 35.2%."""
    (_, space), (_, share), *accuracies = row.items()
    right = ", ".join(f"{column} {value:.1%}" for column, value in accuracies)
    return f"{space}, {share:.1%} of the variance" + (f": {right}" if right else "")


def main(source_kwargs, plane_kwargs):
    """Survey with the given settings; returns the table."""
    check_settings(plane_kwargs)
    return survey(**source_kwargs, **plane_kwargs)


if __name__ == "__main__":
    common.run_script(main, source_kwargs, plane_kwargs)
