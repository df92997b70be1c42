"""Does training on a GPU do what the plain loop does? One program, and one table of answers.

run:    python benchmarks/gpu_check.py --quick    (an NVIDIA GPU; without --quick more of it)
        python benchmarks/gpu_check.py --device cpu --quick    (small networks, few digits; the
        plain loop in place of the CUDA graph; what needs CUDA does not count)
writes: gpu_check.json, the table; the exit status is 1 if a row of it did not pass

Two runs with the same seed are compared by their histories, under deterministic algorithms.
Linear layers must give equal numbers, to the last bit. Convolutions may differ by three times
what two plain runs differ by: two are a small sample. If these are equal, so must be the third.
"""

import argparse
import contextlib
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
import training

SPREADS = 3  # how many spreads of two plain runs a third run may be away
LINEAR = ("main_gan", "main_vae")  # without convolutions
# {script, and perhaps a comma and a word: settings other than the script's own}
CASES = {name: {} for name in (*LINEAR, "main_dcgan", "main_cgan", "main_ae")}
CASES["main_cgan, concat"] = {"conditioning": "concat"}
CASES["main_ae, linear"] = {"beta_schedule": "linear"}
CASES["main_ae, ae, grey"] = {"model_type": "ae", "image_channels": 1}
CASES |= {f"gan_cub, {loss}": {"loss": loss} for loss in gan_cub.LOSSES}
CUB = "gan_cub, wgan-gp"

BASE = {"dataset_type": "digits", "score_features": "classifier", "score_images": 0}
# an epoch of gan_cub is sample_every iterations; the others draw in the first and the last
QUICK = {"num_epochs": 2, "num_iterations": 60, "sample_every": 30}
WHOLE = {"num_epochs": 6, "num_iterations": 300, "sample_every": 50}
FEWER = 15  # on a CPU one in so many digits
TINY = {"batch_size": 55, "num_threads": 1, "feature_maps": 4, "latent_dim": 4, "hidden_size": 16}
TINY |= {"generator_hidden_size": 16, "discriminator_hidden_size": 16, "iwae_samples": 2}
TINY |= {"d_steps": 1, "num_iterations": 8, "sample_every": 4}
plain_train_step = training.Run.train_step
ANALYSES = {  # name: (the kinds of files it writes, options, options on a CPU)
    "latent_space_interpolation": (
        ".csv .gif .html .png",
        {},
        {"rows": 2, "steps": 3, "frames": 2},
    ),
    "latent_space_vae": (".csv .html .png", {}, {"num_points": 300}),
    "detect_vae_anomalies": (".csv .png", {"other_data": "none"}, {"bootstrap": 20}),
    "fid": (".json .png", {"features": "classifier"}, {"num_images": 300}),
}


def script_of(name):
    """The module of a case, or of a script."""
    return importlib.import_module(name.partition(",")[0])


def dicts_of(script):
    """Copies of a script's dicts of settings, in the order in which they stand in the file."""
    return [dict(kwargs) for name, kwargs in vars(script).items() if name.endswith("_kwargs")]


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
        """The dicts of a run of this case in a folder of this label; on CUDA with the graph."""
        chosen = {**BASE, **(QUICK if self.quick else WHOLE), "device": self.device}
        if not self.cuda:
            chosen |= {**TINY, "image_size": 256 if name in LINEAR else 16}  # pixels, or a side
        chosen |= {"output_dir": str(self.folder / label / name), "data_dir": str(self.folder)}
        chosen |= {**CASES[name], **changes}
        dicts = dicts_of(script_of(name))
        for kwargs in dicts:
            for key in kwargs:
                kwargs[key] = chosen.get(key, kwargs[key])
        return dicts

    def main(self, name, label, **changes):
        """What a script's main returns; without pictures, which the CPU draws, and slowly."""
        dicts = self.dicts(name, label, **changes)
        with mock.patch.object(common, "save_curves"), mock.patch.object(common, "save_grid"):
            return script_of(name).main(*dicts)

    def plain(self, name):
        """Two histories of the plain loop, which runs once where two runs have to be equal."""
        if name not in self.histories:
            runs = [self.main(name, "plain", cuda_graph=False).run.history]
            if self.cuda and name not in LINEAR:
                runs.append(self.main(name, "plain again", cuda_graph=False).run.history)
            self.histories[name] = runs[0], runs[-1]
        return self.histories[name]

    def compare(self, what, trainer, plain, note="", good=True):
        """A row: has a run with the graph one of two plain histories? good: all else is right."""
        allowed = SPREADS * difference(*plain)
        apart = min(difference(trainer.run.history, history) for history in plain)
        seen = f"differs by {apart:.1e}" if apart else "equal"
        if self.cuda and not (trainer.run.graph and trainer.run.graph.graph):
            seen, good = f"{seen}, but no graph was recorded", False
        expected = f"within {allowed:.1e}" if allowed else "equal to the last bit"
        self.row(what, expected, seen + note, good and apart <= allowed < math.inf)


def run_apart(check, name, train_step):
    """(exit status, lines on stderr) of a run with another Run.train_step, in a new process."""
    words = as_options(*check.dicts(name, train_step.__name__))
    code = f"import gpu_check as g; g.run_disturbed(g.{train_step.__name__}, {check.cuda})"
    command = [sys.executable, "-c", code, script_of(name).__name__, *words]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.returncode, done.stderr.strip().splitlines()


def run_disturbed(train_step, cuda):
    """In the new process: the command line of a script, whose name is sys.argv[1]."""
    script = script_of(sys.argv[1])
    torch.use_deterministic_algorithms(True, warn_only=True)
    with small_unless(cuda), mock.patch.object(training.Run, "train_step", train_step):
        sys.exit(run_command(script, sys.argv[2:]))


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

    if not hasattr(run, "reading_step"):  # always the same function, as train_step asks
        run.reading_step = reading_step
    plain_train_step(run, run.reading_step, *inputs)


def check_graph(check):
    """Every script and every loss."""
    for name in CASES:
        trainer = check.main(name, "graph")
        check.compare(f"{name}: graph as plain loop", trainer, check.plain(name))


def check_experiment(check):
    """Several graphs in one process."""
    for loss, trainer in check.main(CUB, "experiment", experiment="losses").items():
        check.compare(f"--experiment losses: {loss}", trainer, check.plain(f"gan_cub, {loss}"))


def check_short_batch(check):
    """A short last batch is not replayed. It comes after the recording, or within the warm-up."""
    images = 4500 if check.cuda else 4500 // FEWER
    for steps in (5, 3):
        changes = {"batch_size": images * 2 // (2 * steps - 1), "num_epochs": 3}
        plain = check.main("main_gan", f"{steps} plain", cuda_graph=False, **changes)
        trainer = check.main("main_gan", f"{steps} graph", **changes)
        sizes, both = trainer.run.sizes, [plain.run.history] * 2
        good = sizes[-1] < sizes[0] and len(sizes) == steps
        check.compare("a short last batch", trainer, both, f", steps of {sizes} images", good)


def check_scorer(check):
    """Scores between epochs, which must not change the training."""
    for name in ["main_dcgan"] if check.quick else ["main_dcgan", "main_cgan", CUB]:
        trainer = check.main(name, "scorer", score_every=1, score_images=2000)
        history = trainer.run.history
        scores = [round(row.get("classifier distance", math.nan), 2) for row in history]
        note, good = f", scores {scores}", all(map(math.isfinite, scores))
        check.compare(f"{name}: scored each epoch", trainer, check.plain(name), note, good)


def check_resume(check):
    """A run that was continued ends as one that was never stopped."""
    between = ["main_vae", "main_dcgan", "main_gan", "main_cgan", "main_ae"]
    within = ["main_vae", "main_dcgan", CUB]
    if check.quick:
        between, within = between[:2], within[:1]
    for name in between:
        check.main(name, "between", num_epochs=1)
        trainer = check.main(name, "between")
        check.compare(f"{name}: continued between epochs", trainer, check.plain(name))
    for name in within:
        status, _ = run_apart(check, name, stop_in_the_middle)
        folder = check.folder / "stop_in_the_middle" / name
        step = common.load_weights(folder / "checkpoint.pt", None, "step")["step"]
        trainer = check.main(name, "stop_in_the_middle")
        note, good = f", exit status {status} after step {step}", (status, step) == (143, 3)
        check.compare(f"{name}: SIGTERM within an epoch", trainer, check.plain(name), note, good)


def check_failing_capture(check):
    """A step that cannot be recorded ends in one line that says what to do."""
    status, lines = run_apart(check, "main_gan", read_within_the_step)
    passed = status == 1 and len(lines) == 1 and "--cuda_graph false" in lines[0]
    seen = f"exit status {status}, {len(lines)} lines: {' '.join(lines[-1:])}"
    check.row("a capture that fails", "exit status 1, names --cuda_graph false", seen, passed)


def analyse(check, script, name, device):
    """(what an analysis of a case's weights does and writes, in words; its folder)."""
    _, options, small = ANALYSES[script]
    check.main(name, "graph")  # what was trained before is only read
    weights = sorted((check.folder / "graph" / name).glob("weights_*.pt"), key=os.path.getmtime)
    folder = check.folder / script / f"{name} {device}"
    options = {**options, **({} if check.cuda else small), "output_dir": folder, "device": device}
    options["generated" if script == "fid" else "weights_path"] = weights[-1]
    status = run_command(script_of(script), as_options(options))
    kinds = sorted({path.suffix for path in folder.glob("*")})
    said = check.log.getvalue().strip().splitlines()[-1] if status else ""
    return f"exit status {status}, {' '.join(kinds)} {said}".rstrip(), folder


def check_analysis(check):
    """Every analysis script on weights that were just trained."""
    for script, (kinds, _, _) in ANALYSES.items():
        names = ["main_vae", "main_ae"]
        if script in ("fid", "latent_space_interpolation"):
            names += ["main_gan", "main_dcgan", "main_cgan", CUB]
        for name in names[:1] if check.quick else names:
            seen, _ = analyse(check, script, name, check.device)
            expected = f"exit status 0, {kinds}"
            check.row(f"{script} on {name}", expected, seen, seen == expected)


def check_fid(check):
    """A distance on the GPU is the CPU's; only rounding in the generator may be seen."""
    distances = []
    for device in (check.device, "cpu"):
        (path,) = analyse(check, "fid", "main_dcgan", device)[1].glob("*.json")
        distances.append(json.loads(path.read_text())["classifier distance"])
    passed = math.isclose(*distances, rel_tol=0.01)
    check.row("fid: main_dcgan on GPU and CPU", "within 1 %", str(distances), passed)


def time_and_memory(check, name, graph):
    """(milliseconds a step, MiB of the GPU's memory that torch held) of a short run."""
    if check.cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = check.main(name, f"speed {graph}", cuda_graph=graph, num_epochs=1)
    index = torch.arange(trainer.train.batch_size, device=trainer.train.device)
    images, labels = trainer.train.batch(index)
    images = images.flatten(1) if name in LINEAR else images
    inputs = (images, labels) if "main_cgan" in name else (images,)
    step = trainer.run.graph or trainer.step
    count = 30 if check.cuda else 1
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
        plain, plain_peak = time_and_memory(check, name, graph=False)
        seen, passed = f"plain {plain:.3g} ms a step; graph needs CUDA", None
        if check.cuda:
            graph, graph_peak = time_and_memory(check, name, graph=True)
            passed = graph < 1.1 * plain and graph_peak < 4 * plain_peak + 256
            seen = f"plain {plain:.3g} ms a step, {plain_peak:.0f} MiB"
            seen = f"{seen}; graph {graph:.3g} ms, {graph_peak:.0f} MiB"
        # warm-up, graph and the rest of the run keep a cache of memory each
        check.row(f"{name}: time and memory", "no slower, MiB < 4 x plain + 256", seen, passed)


CHECKS = [check_graph, check_experiment, check_short_batch, check_scorer, check_resume]
CHECKS += [check_failing_capture, check_analysis, check_fid, check_speed]
ON_CUDA = [check_failing_capture, check_fid]


@contextlib.contextmanager
def small_unless(cuda):
    """Inside, unless on CUDA, there are few digits, and classifiers learn for a few steps."""
    load_digits, part = common.load_digits, 1 if cuda else FEWER
    steps = fid.CLASSIFIER_STEPS if cuda else 20

    @functools.cache
    def few_digits(channels):
        splits, classes = load_digits(channels)
        return [(pixels[::part], labels[::part]) for pixels, labels in splits], classes

    digits = mock.patch.object(common, "load_digits", few_digits)
    with digits, mock.patch.object(fid, "CLASSIFIER_STEPS", steps):
        yield


def run_check(check, rows_of):
    """All rows of one check. An error becomes a row that did not pass."""
    name = rows_of.__name__
    if rows_of in ON_CUDA and not check.cuda:
        return check.row(name, "", "needs CUDA", None)
    # where there is no deterministic algorithm, the usual one only warns
    torch.use_deterministic_algorithms(rows_of is not check_speed, warn_only=True)
    try:
        with contextlib.redirect_stdout(check.log), contextlib.redirect_stderr(check.log):
            rows_of(check)
    except (Exception, SystemExit) as error:
        check.row(name, "no error", repr(error), False)
    finally:
        torch.use_deterministic_algorithms(False)


def main(words=None):
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=[check.__name__ for check in CHECKS])
    chosen = parser.parse_args(words)
    cuda = chosen.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        print("there is no NVIDIA GPU here, so nothing was checked; --device cpu checks the rest")
        return 0
    begun = time.monotonic()
    head = {"torch": torch.__version__, "device": chosen.device, "quick": chosen.quick}
    head["gpu"] = torch.cuda.get_device_name(chosen.device) if cuda else None
    print(f"{head}\n{'what':<42} {'expected':<42} pass seen")
    with tempfile.TemporaryDirectory() as folder, small_unless(cuda):
        check = Check(chosen.device, chosen.quick, folder)
        for rows_of in CHECKS:
            if chosen.only in (None, rows_of.__name__):
                run_check(check, rows_of)
    head["seconds"] = round(time.monotonic() - begun)
    Path("gpu_check.json").write_text(json.dumps({**head, "rows": check.rows}, indent=1))
    results = [row["pass"] for row in check.rows]
    passed, failed, uncounted = (results.count(kind) for kind in (True, False, None))
    print(f"{passed} passed, {failed} did not, {uncounted} did not count; {head['seconds']} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
