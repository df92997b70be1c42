"""fid.py against what it replaces, side by side in one run on the same inputs.

run:    python benchmarks/fid.py        (two threads; OMP_NUM_THREADS sets another number)
needs:  tests/requirements.txt; no network: both Inceptions get the same random weights
"""

import hashlib
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import pytorch_fid.inception
import torch
from pytorch_fid.fid_score import calculate_frechet_distance

import common
import fid


def fastest(*functions, repeat):
    """Seconds of each function, the fastest of `repeat` turns.

    They take turns, so that load from outside meets all of them alike.
    """
    best = [float("inf")] * len(functions)
    for _ in range(repeat):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def random_features(decades, shift, random, d=2048, n=6000):
    """n rows whose covariance has eigenvalues over so many powers of ten, along random axes."""
    square = torch.randn(d, d, generator=random, dtype=torch.float64)
    axes = torch.linalg.qr(square)[0]
    scale = torch.logspace(0, -decades / 2, d, dtype=torch.float64).unsqueeze(1)
    rows = torch.randn(n, d, generator=random, dtype=torch.float64)
    return rows @ (scale * axes) + shift


def compare_distances(decades):
    random = torch.Generator().manual_seed(0)
    x = random_features(decades, 0, random)
    random.manual_seed(0)
    y = random_features(decades, 0.01, random, n=7000)
    gaussians = [part.numpy() for z in (x, y) for part in (z.mean(0), torch.cov(z.T))]

    def theirs():
        return calculate_frechet_distance(*gaussians)

    def ours():
        return fid.frechet_distance(*gaussians)

    def from_features(x=x, y=y):
        return fid.distance_of_roots(*fid.mean_and_root(x), *fid.mean_and_root(y))

    difference = max(abs(ours() / theirs() - 1), abs(from_features() / theirs() - 1))
    seconds = fastest(theirs, ours, from_features, repeat=2)
    print(
        f"distance of 2048 features, eigenvalues over {decades} decades: "
        f"sqrtm {seconds[0]:.1f} s, fid.py {seconds[1]:.2f} s, "
        f"ratio {seconds[0] / seconds[1]:.1f}; with the roots from {len(x)} and {len(y)} images' "
        f"features {seconds[2]:.2f} s; relative difference {difference:.1e}",
        flush=True,
    )
    few = fastest(lambda: from_features(x[:500], y[:500]), repeat=3)
    print(f"the same from 500 images each: {few[0]:.2f} s", flush=True)


def compare_inceptions(folder, batch=8, repeat=5):
    from torchvision.models.inception import Inception3

    torch.manual_seed(0)
    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = folder / "random.pth"
    torch.save(network.state_dict(), path)
    fid.INCEPTION_SHA = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    state = network.state_dict()
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: state
    theirs = pytorch_fid.inception.InceptionV3().eval()
    ours = fid.inception_features(path, "", "legacy", torch.device("cpu"))
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        wanted, got = theirs(images / 255)[0].flatten(1), ours.compute(images)
        seconds = fastest(lambda: theirs(images / 255), lambda: ours.compute(images), repeat=repeat)
    difference = ((got - wanted).norm() / wanted.norm()).item()
    print(
        f"Inception, batch {batch}: pytorch-fid {batch / seconds[0]:.1f} images/s, "
        f"fid.py {batch / seconds[1]:.1f}; ratio {seconds[0] / seconds[1]:.2f}; "
        f"relative difference {difference:.1e}",
        flush=True,
    )


def score_twice(folder):
    train, test = common.load_data("digits", folder, image_channels=1, device="cpu")
    times = []
    for _ in range(2):
        start = time.perf_counter()
        scorer = fid.Scorer(train, features="classifier", num_images=1000)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    scorer(lambda index: torch.rand(len(index), 784) * 2 - 1)
    fake = time.perf_counter() - start
    print(
        f"scoring 1,000 images: the first time {times[0]:.1f} s for classifier and real images, "
        f"the second time {times[1]:.2f} s; the generated images {fake:.2f} s every time",
        flush=True,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    warnings.simplefilter("ignore")
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, numpy {np.__version__}, {threads} threads", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        compare_inceptions(Path(scratch))
        score_twice(Path(scratch))
        for decades in (2, 6, 10):
            compare_distances(decades)
