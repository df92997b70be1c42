"""Does training on a GPU do what the plain loop does? One program, and one table of answers.

run:    python benchmarks/gpu_check.py            (an NVIDIA GPU; --quick is the short form)
        python benchmarks/gpu_check.py --device cpu --quick
        python benchmarks/gpu_check.py --only resume    (the checks with this word in their name)
writes: a row for each check: what, expected, passed, seen; the same in gpu_check.json. The exit
        status is 1 if a row did not pass.
needs:  no network; all is trained on the bundled digits

Without a GPU it says so and ends. On a CPU small networks are trained on a few digits, the plain
loop takes the place of the CUDA graph, and what makes sense on CUDA only does not count.

Two runs with the same seed are compared by their histories, under deterministic algorithms.
Linear layers must give equal numbers, to the last bit. Convolutions may differ by three times
what two plain runs differ by: two runs are a small sample. Where these are equal, the third has
to be equal too.
"""

import argparse
import contextlib
import copy
import functools
import gc
import importlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

# cuBLAS reads this when CUDA starts; without it its sums are not deterministic
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import common
import fid
import gan_cub
import main_ae
import main_cgan
import main_dcgan
import main_gan
import main_vae
import training

SPREADS = 3  # how many spreads of two plain runs a third run may be away
LINEAR = (main_gan, main_vae)  # without convolutions
SCRIPTS = (*LINEAR, main_dcgan, main_cgan, main_ae)
# {name: (script, settings other than the script's own)}
CASES = {script.__name__: (script, {}) for script in SCRIPTS}
CASES["main_cgan, concat"] = main_cgan, {"conditioning": "concat"}
CASES["main_ae, linear"] = main_ae, {"beta_schedule": "linear"}
CASES["main_ae, ae, grey"] = main_ae, {"model_type": "ae", "image_channels": 1}
CASES |= {f"gan_cub, {loss}": (gan_cub, {"loss": loss}) for loss in gan_cub.LOSSES}
CUB = list(CASES)[-2]  # one of its losses

BASE = {"dataset_type": "digits", "score_features": "classifier", "score_images": 0}
# an epoch of gan_cub is sample_every iterations; the others draw in the first and the last
QUICK = {"num_epochs": 2, "num_iterations": 60, "sample_every": 30}
WHOLE = {"num_epochs": 6, "num_iterations": 600, "sample_every": 100}
FEWER = 15  # on a CPU one in so many digits
TINY = {"batch_size": 55, "num_threads": 1, "feature_maps": 4, "latent_dim": 4, "hidden_size": 16}
TINY |= {"generator_hidden_size": 16, "discriminator_hidden_size": 16, "iwae_samples": 2}
TINY |= {"d_steps": 2, "num_iterations": 16, "sample_every": 8}
ANALYSES = {  # name: (the kinds of files it writes, options, options on a CPU)
    "latent_space_interpolation": (".csv .gif .png", {}, {"rows": 2, "steps": 3, "frames": 2}),
    "latent_space_vae": (".csv .html .png", {}, {"cells": 3}),
    "detect_vae_anomalies": (".csv .png", {"other_data": "none"}, {"bootstrap": 20}),
    "fid": (".json .png", {"features": "classifier"}, {"num_images": 300}),
}


def dicts_of(script):
    """Copies of a script's dicts of settings, in the order in which they stand in the file."""
    names = [name for name in vars(script) if name.endswith("_kwargs")]
    return [copy.deepcopy(getattr(script, name)) for name in names]


def as_options(*dicts):
    """Dicts {key: value} as the words of a command line."""
    words = []
    for kwargs in dicts:
        for key, value in kwargs.items():
            words += [f"--{key}", str(value)]
    return words


def run_command(script, words):
    """The exit status of `python SCRIPT.py words`, which is run in this process."""
    with mock.patch.object(sys, "argv", [f"{script.__name__}.py", *words]):
        try:
            common.run_script(script.main, *dicts_of(script))
        except SystemExit as stop:
            return stop.code
    return 0


def difference(history, plain):
    """The largest relative difference of a number in `plain` from that in `history`."""
    largest = 0.0 if len(history) == len(plain) else math.inf
    for row, plain_row in zip(history, plain):
        for column, expected in plain_row.items():
            seen = row[column]
            if seen != expected:
                apart = abs(seen - expected) / max(abs(seen), abs(expected))
                largest = math.inf if math.isnan(apart) else max(largest, apart)
    return largest


class Check:
    """What all checks share: the device, a folder for what they write, and the table."""

    def __init__(self, device, quick, folder):
        self.device, self.quick, self.folder = device, quick, Path(folder)
        self.cuda = device.startswith("cuda")
        self.rows, self.histories = [], {}
        self.table, self.log = sys.stdout, io.StringIO()  # the log takes what scripts print

    def row(self, what, expected, seen, passed):
        """Add a row to the table. passed: True, False, or None if it does not count."""
        self.rows.append({"what": what, "expected": expected, "seen": seen, "pass": passed})
        word = {True: "yes", False: "NO", None: "-"}[passed]
        print(f"{what:<42} {expected:<42} {word:<4} {seen}", file=self.table, flush=True)

    def dicts(self, name, label, **changes):
        """The dicts of a run of this case, as its script's main takes them."""
        script, settings = CASES[name]
        chosen = {**BASE, **(QUICK if self.quick else WHOLE), "device": self.device}
        if not self.cuda:
            chosen |= {**TINY, "image_size": 256 if script in LINEAR else 16}  # pixels, or a side
        chosen |= {"output_dir": str(self.folder / label / name), "data_dir": str(self.folder)}
        chosen |= {**settings, **changes}
        dicts = dicts_of(script)
        for kwargs in dicts:
            for key in kwargs:
                kwargs[key] = chosen.get(key, kwargs[key])
        return dicts

    def main(self, name, label, **changes):
        """What a script's main returns, of a run in a folder of this label; on CUDA with graph."""
        dicts = self.dicts(name, label, **changes)
        # pictures are drawn on the CPU, which is slow and not checked
        with mock.patch.object(common, "save_curves"), mock.patch.object(common, "save_grid"):
            return CASES[name][0].main(*dicts)

    def plain(self, name):
        """Two histories of the plain loop, which runs once where two runs have to be equal."""
        if name not in self.histories:
            runs = [self.main(name, "plain", cuda_graph=False).run.history]
            if self.cuda and CASES[name][0] not in LINEAR:
                runs.append(self.main(name, "plain again", cuda_graph=False).run.history)
            self.histories[name] = runs[0], runs[-1]
        return self.histories[name]

    def compare(self, what, trainer, plain, note="", good=True):
        """A row on whether a run with the graph has the history of the plain runs.

        plain: two histories. note, good: what else was seen, and whether it was right.
        """
        one, two = plain
        history, allowed = trainer.run.history, SPREADS * difference(one, two)
        apart = min(difference(history, one), difference(history, two))
        seen = f"differs by {apart:.1e}" if apart else "equal"
        if self.cuda and not (trainer.run.graph and trainer.run.graph.graph):
            seen, good = f"{seen}, but no graph was recorded", False
        expected = f"within {allowed:.1e}" if allowed else "equal to the last bit"
        self.row(what, expected, seen + note, good and apart <= allowed < math.inf)


def run_apart(check, name, train_step):
    """(exit status, lines on stderr) of a run with another Run.train_step, in a new process."""
    words = as_options(*check.dicts(name, train_step.__name__))
    code = f"import gpu_check as g; g.run_disturbed(g.{train_step.__name__}, {check.cuda})"
    done = subprocess.run(
        [sys.executable, "-c", code, CASES[name][0].__name__, *words],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr.strip().splitlines()


def run_disturbed(train_step, cuda):
    """In the new process: the command line of a script, whose name is sys.argv[1]."""
    script = importlib.import_module(sys.argv[1])
    torch.use_deterministic_algorithms(True, warn_only=True)
    with small_unless(cuda), mock.patch.object(training.Run, "train_step", train_step):
        sys.exit(run_command(script, sys.argv[2:]))


plain_train_step = training.Run.train_step


def stop_in_the_middle(run, step, *inputs):
    """After the third step of the second epoch comes the signal of `kill`."""
    plain_train_step(run, step, *inputs)
    if run.epoch == 2 and run.step == 2:
        signal.raise_signal(signal.SIGTERM)


def read_within_the_step(run, step, *inputs):
    """A number is read within the step: the host waits, which no CUDA graph can record."""

    def reading_step(*inputs):
        values = step(*inputs)
        next(iter(values.values())).item()
        return values

    plain_train_step(run, reading_step, *inputs)


def check_graph(check):
    """Every script, every loss."""
    for name in CASES:
        trainer = check.main(name, "graph")
        check.compare(f"{name}: graph as plain loop", trainer, check.plain(name))


def check_short_batch(check):
    """A short last batch is not replayed. It comes after the recording, or within the warm-up."""
    images = 4500 if check.cuda else 4500 // FEWER
    for steps in (5, 3):
        changes = {"batch_size": images * 2 // (2 * steps - 1), "num_epochs": 3}
        plain = check.main("main_gan", f"{steps} plain", cuda_graph=False, **changes)
        trainer = check.main("main_gan", f"{steps} graph", **changes)
        sizes = trainer.run.sizes
        note = f", steps of {sizes} images"
        good = sizes[-1] < sizes[0] and len(sizes) == steps
        both = plain.run.history, plain.run.history
        check.compare("main_gan: a short last batch", trainer, both, note, good)


def check_scorer(check):
    """Scores between epochs, which must not change the training."""
    for name in ["main_dcgan"] if check.quick else ["main_dcgan", "main_cgan", CUB]:
        trainer = check.main(name, "scorer", score_every=1, score_images=2000)
        scores = [row.get("classifier distance", math.nan) for row in trainer.run.history]
        good = all(map(math.isfinite, scores))
        note = f", scores {scores[0]:.5g} to {scores[-1]:.5g}"
        check.compare(f"{name}: scored each epoch", trainer, check.plain(name), note, good)


def check_resume(check):
    """A run that was continued ends as one that was never stopped."""
    between = ["main_vae", "main_dcgan"]
    within = ["main_vae"]
    if not check.quick:
        between += ["main_gan", "main_cgan", "main_ae"]
        within += ["main_dcgan", CUB]
    for name in between:
        check.main(name, "between", num_epochs=1)
        trainer = check.main(name, "between")
        check.compare(f"{name}: continued between epochs", trainer, check.plain(name))
    for name in within:
        status, _ = run_apart(check, name, stop_in_the_middle)
        path = check.folder / "stop_in_the_middle" / name / "checkpoint.pt"
        step = common.load_weights(path, None, "step")["step"]
        trainer = check.main(name, "stop_in_the_middle")
        note = f", exit status {status} after step {step} of epoch 2"
        good = (status, step) == (143, 3)
        check.compare(f"{name}: SIGTERM within an epoch", trainer, check.plain(name), note, good)


def check_failing_capture(check):
    """A step that cannot be recorded ends in one line that says what to do."""
    what, expected = "main_gan: a capture that fails", "exit status 1, names --cuda_graph false"
    if not check.cuda:
        return check.row(what, expected, "needs CUDA", None)
    status, lines = run_apart(check, "main_gan", read_within_the_step)
    passed = status == 1 and len(lines) == 1 and "--cuda_graph false" in lines[0]
    seen = f"exit status {status}, {len(lines)} lines: {' '.join(lines[-1:])}"
    check.row(what, expected, seen, passed)


def check_experiment(check):
    """Several graphs in one process."""
    for loss, trainer in check.main(CUB, "experiment", experiment="losses").items():
        check.compare(f"--experiment losses: {loss}", trainer, check.plain(f"gan_cub, {loss}"))


def analyse(check, script, name, device):
    """(exit status, kinds of files written, their folder) of an analysis of a case's weights."""
    _, options, small = ANALYSES[script]
    check.main(name, "graph")  # what was trained before is only read
    weights = sorted((check.folder / "graph" / name).glob("weights_*.pt"), key=os.path.getmtime)
    folder = check.folder / script / f"{name} {device}"
    options = {**options, "output_dir": folder, "device": device}
    options["generated" if script == "fid" else "weights_path"] = weights[-1]
    if not check.cuda:
        options |= small
    status = run_command(importlib.import_module(script), as_options(options))
    written = sorted({path.suffix for path in folder.glob("*")})
    return status, " ".join(written), folder


def check_analysis(check):
    """Every analysis script on weights that were just trained."""
    for script, (kinds, _, _) in ANALYSES.items():
        names = ["main_vae", "main_ae"]
        if script in ("fid", "latent_space_interpolation"):
            names += ["main_gan", "main_dcgan", "main_cgan", CUB]
        for name in names[:1] if check.quick else names:
            status, written, _ = analyse(check, script, name, check.device)
            seen, expected = f"exit status {status}, {written}", f"exit status 0, {kinds}"
            passed = seen == expected
            if status:  # what the script has said last
                seen = f"{seen}: {check.log.getvalue().strip().splitlines()[-1]}"
            check.row(f"{script} on {name}", expected, seen, passed)


def check_fid(check):
    """A distance on the GPU is the CPU's; only rounding in the generator may be seen."""
    what, expected = "fid: main_dcgan on GPU and CPU", "within 1 %"
    if not check.cuda:
        return check.row(what, expected, "needs CUDA", None)
    distances = []
    for device in (check.device, "cpu"):
        (path,) = analyse(check, "fid", "main_dcgan", device)[2].glob("*.json")
        distances.append(json.loads(path.read_text())["classifier distance"])
    seen = f"{distances[0]:.6g} and {distances[1]:.6g}"
    check.row(what, expected, seen, math.isclose(*distances, rel_tol=0.01))


def inputs_of_step(trainer):
    """What a step takes: always the same full batch."""
    train, name = trainer.train, trainer.run.script
    images, labels = train.batch(torch.arange(train.batch_size, device=train.device))
    if name == "main_cgan":
        return images, labels
    return (images.flatten(1) if name in ("main_gan", "main_vae") else images,)


def time_and_memory(check, name, graph):
    """(milliseconds a step, MiB of the GPU's memory that torch held) of a short run."""
    if check.cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = check.main(name, f"speed {graph}", cuda_graph=graph, num_epochs=1)
    inputs, step = inputs_of_step(trainer), trainer.run.graph or trainer.step
    count = 200 if check.cuda else 2
    for _ in range(2):  # the first time warms up
        begun = time.perf_counter()
        for _ in range(count):
            values = step(*inputs)
        next(iter(values.values())).item()  # waits for the last step
        took = time.perf_counter() - begun
    peak = torch.cuda.max_memory_reserved() / 2**20 if check.cuda else 0
    return took / count * 1e3, peak


def check_speed(check):
    """Time of a step and peak memory with and without the graph, by the algorithms users get."""
    for name in CASES:
        if check.quick and "," in name and name != CUB:
            continue  # one case of each script will do
        # warm-up, graph and the rest of the run keep a cache of memory each
        what, expected = f"{name}: time and memory", "graph no slower, MiB below 4 x plain + 256"
        plain, plain_peak = time_and_memory(check, name, graph=False)
        if not check.cuda:
            check.row(what, expected, f"plain {plain:.3g} ms a step; graph needs CUDA", None)
            continue
        graph, graph_peak = time_and_memory(check, name, graph=True)
        seen = f"plain {plain:.3g} ms a step, {plain_peak:.0f} MiB"
        seen = f"{seen}; graph {graph:.3g} ms, {graph_peak:.0f} MiB"
        passed = graph < 1.1 * plain and graph_peak < 4 * plain_peak + 256
        check.row(what, expected, seen, passed)


CHECKS = [check_graph, check_short_batch, check_scorer, check_resume, check_failing_capture]
CHECKS += [check_experiment, check_analysis, check_fid, check_speed]


@contextlib.contextmanager
def small_unless(cuda):
    """Inside, unless on CUDA, there are few digits, and classifiers learn for a few steps."""
    if cuda:
        yield
        return
    load_digits = common.load_digits

    @functools.cache
    def few_digits(channels):
        splits, classes = load_digits(channels)
        return [(pixels[::FEWER], labels[::FEWER]) for pixels, labels in splits], classes

    digits = mock.patch.object(common, "load_digits", few_digits)
    with digits, mock.patch.object(fid, "CLASSIFIER_STEPS", 20):
        yield


def run_check(check, run_rows):
    """All rows of one check. An error becomes a row that did not pass."""
    # where there is no deterministic algorithm, the usual one only warns
    torch.use_deterministic_algorithms(run_rows is not check_speed, warn_only=True)
    stdout, stderr = contextlib.redirect_stdout, contextlib.redirect_stderr
    try:
        with stdout(check.log), stderr(check.log):
            run_rows(check)
    except (Exception, SystemExit) as error:
        seen = " ".join(f"{type(error).__name__}: {error}".split())
        check.row(run_rows.__name__, "no error", seen, False)
    finally:
        torch.use_deterministic_algorithms(False)


def main(words=None):
    """Returns the exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    names = ", ".join(check.__name__.removeprefix("check_") for check in CHECKS)
    parser.add_argument("--only", default="", help=f"one of {names}, or a part of such a name")
    chosen = parser.parse_args(words)
    cuda = chosen.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        print("there is no NVIDIA GPU here, so nothing was checked; --device cpu checks the rest")
        return 0
    begun = time.monotonic()
    head = {"torch": torch.__version__, "device": chosen.device, "quick": chosen.quick}
    head["gpu"] = torch.cuda.get_device_name(chosen.device) if cuda else "none"
    print(head)
    print(f"{'what':<42} {'expected':<42} pass seen")
    with tempfile.TemporaryDirectory() as folder, small_unless(cuda):
        check = Check(chosen.device, chosen.quick, folder)
        for run_rows in CHECKS:
            if chosen.only in run_rows.__name__:
                run_check(check, run_rows)
    head["seconds"] = round(time.monotonic() - begun)
    Path("gpu_check.json").write_text(json.dumps({**head, "rows": check.rows}, indent=1))
    results = [row["pass"] for row in check.rows]
    passed, failed, uncounted = (results.count(kind) for kind in (True, False, None))
    print(f"{passed} passed, {failed} did not, {uncounted} did not count; {head['seconds']} s")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
