"""fid.py against what it replaces, side by side in one run on the same inputs.

run:    python benchmarks/fid.py                    (two threads; OMP_NUM_THREADS sets another number)
needs:  tests/requirements.txt; no network: both Inceptions get the same random weights
"""
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

import datasets
import fid


def fastest(*functions, repeat):
    """Seconds of each function, the fastest of `repeat` turns taken alternately: load from outside meets all alike."""
    times = [[] for _ in functions]
    for _ in range(repeat):
        for function, seconds in zip(functions, times):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [min(seconds) for seconds in times]


def distance(decades, d=2048, n=6000):
    """Covariances of n samples; the true eigenvalues fall over so many powers of ten, along random axes."""
    random = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64))[0]
    scale = torch.logspace(0, -decades / 2, d, dtype=torch.float64).unsqueeze(1)
    sets = [torch.randn(n, d, generator=random, dtype=torch.float64) @ (scale * axes) + shift for shift in (0, 0.01)]
    inputs = [part.numpy() for x in sets for part in (x.mean(0), torch.cov(x.T))]
    values = [calculate_frechet_distance(*inputs), fid.frechet_distance(*inputs)]
    theirs, ours = fastest(lambda: calculate_frechet_distance(*inputs), lambda: fid.frechet_distance(*inputs), repeat=2)
    print(f"distance of {d} features, eigenvalues over {decades} decades: sqrtm {theirs:.1f} s, fid.py {ours:.2f} s, "
          f"ratio {theirs / ours:.1f}; relative difference {abs(values[1] / values[0] - 1):.1e}", flush=True)
    few = [fid.Statistics().add(x[:500]) for x in sets]
    seconds, = fastest(lambda: few[0].distance(few[1]), repeat=3)
    print(f"the same from 500 images each, straight from the features: {seconds:.2f} s", flush=True)


def inception(folder, batch=8, repeat=5):
    from torchvision.models.inception import Inception3

    torch.manual_seed(0)
    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), folder / "random.pth")
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: network.state_dict()
    theirs = pytorch_fid.inception.InceptionV3().eval()
    ours = fid.inception_features(folder / "random.pth", "", "legacy", torch.device("cpu"))
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        wanted, got = theirs(images / 255)[0].flatten(1), ours.see(images)
        seconds = fastest(lambda: theirs(images / 255), lambda: ours.see(images), repeat=repeat)
    print(f"Inception, batch {batch}: pytorch-fid {batch / seconds[0]:.1f} images/s, fid.py {batch / seconds[1]:.1f}; "
          f"ratio {seconds[0] / seconds[1]:.2f}; relative difference "
          f"{((got - wanted).norm() / wanted.norm()).item():.1e}", flush=True)


def second_time(folder):
    train, test = datasets.load_data("digits", "", False, 1, False, 28, 1, torch.device("cpu"))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        score = fid.Scorer(train, test, 1000, "classifier", folder)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    score(lambda n: torch.rand(n, 784) * 2 - 1)
    fake = time.perf_counter() - start
    print(f"scoring 1,000 images: the first time {times[0]:.1f} s for classifier and real images, the second time "
          f"{times[1]:.2f} s; the generated images {fake:.2f} s every time", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, numpy {np.__version__}, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        inception(Path(scratch))
        second_time(Path(scratch))
        for decades in (2, 6, 10):
            distance(decades)
