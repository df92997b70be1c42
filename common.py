"""Plumbing that every script shares: settings, device and seed, files, pictures, and the frame of a training run.

Nothing about a model is in here: no network, no loss, no optimiser step. A script can be understood without it.
"""
import argparse
import ast
import csv
import difflib
import importlib
import io
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

# matplotlib, Pillow and tqdm are imported where they are used: --help and the first step need none of them.

REFRESH_SECONDS = 1.0  # between two looks at the losses; each look makes the host wait for the device once
FREE_TO_CHANGE = {"num_epochs", "output_dir", "data_dir", "device", "resume", "allow_fallback"}  # when continuing


class BadInput(ValueError):
    """Something that the user can put right: one line on stderr and exit status 2, before any work."""


# ---------------------------------------------------------------------------------------------------- settings


def describe(script):
    """Read a script's dicts from lines of the form `"key": default,  # comment`: {key: (default, comment)}."""
    lines = re.findall(r'^    "(\w+)": (.+?),(?: +# (.+))?$', Path(script).read_text(encoding="utf-8"), re.MULTILINE)
    return {key: (ast.literal_eval(default), comment) for key, default, comment in lines}


def check(script, settings):
    """Hold {key: value} against the script's defaults and comments. Raises BadInput.

    A comment may open with the legal values, ended by a semicolon: `a | b | c;`, `>= 1;`, `> 0;` or `in [0, 1);`.
    """
    described = describe(script)
    for key, value in settings.items():
        default, comment = described.get(key, (value, ""))
        legal = comment.partition(";")[0] if ";" in comment else ""
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise BadInput(f"{key} takes a value of type {type(default).__name__}, not {value!r}")
        fits = not isinstance(value, float) or math.isfinite(value)
        if bound := re.fullmatch(r"(>=?) (\S+)", legal):
            fits = fits and (value > float(bound[2]) or (bound[1] == ">=" and value == float(bound[2])))
        elif bound := re.fullmatch(r"in ([\[(])(\S+), (\S+)([\])])", legal):
            low, high = float(bound[2]), float(bound[3])
            fits = low < value < high or (value == low and bound[1] == "[") or (value == high and bound[4] == "]")
        elif " | " in legal:
            fits = str(value) in legal.split(" | ")
        if not fits:
            raise BadInput(f"{key} is {value!r}; legal: {legal or 'a finite number'}")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def run(main, *dicts):
    """Call `main` with the script's dicts and the command line's `--KEY VALUE` put into them.

    Exit status: 0 done; 1 the run broke off (loss not finite, disk full); 2 bad input; 130 Ctrl-C; 143 SIGTERM.
    """
    script = Path(main.__code__.co_filename)
    parser = _Parser(prog=script.name, description=main.__globals__["__doc__"], allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    described = describe(script)
    for key, value in (item for kwargs in dicts for item in kwargs.items()):
        kind = type(value)
        help_line = f"{described.get(key, (value, ''))[1]} (default: {value})"
        parser.add_argument(f"--{key}", type=boolean if kind is bool else kind, default=argparse.SUPPRESS,
                            metavar="true|false" if kind is bool else kind.__name__, help=help_line.replace("%", "%%"))
    try:
        chosen, unknown = parser.parse_known_args()
        if unknown:
            near = difflib.get_close_matches(unknown[0].lstrip("-"), vars(chosen).keys() | described.keys(), n=1)
            raise BadInput(f"unknown key {unknown[0]}" + (f"; did you mean --{near[0]}?" if near else "; see --help"))
        main(*({key: getattr(chosen, key, value) for key, value in kwargs.items()} for kwargs in dicts))
    except BadInput as error:
        sys.exit(say(f"{script.name}: {error}", 2))
    except (FloatingPointError, OSError) as error:
        sys.exit(say(f"{script.name}: {error}", 1))
    except KeyboardInterrupt as error:
        sys.exit(say(f"{script.name}: {str(error) or 'interrupted'}", 130))


def say(line, status=None):
    """Print one line on stderr; returns `status`."""
    print(" ".join(line.split()), file=sys.stderr, flush=True)
    return status


def choose_device(device):
    """`auto` is cuda, else mps, else cpu. Returns a torch.device; raises BadInput if this machine has none such."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}")


def seed_everything(seed):
    """One seed for torch (every device), numpy and Python."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ------------------------------------------------------------------------------------------------------- files


def write(path, data):
    """Write bytes under a temporary name, then rename: `path` holds the old bytes or the new ones, never half."""
    path, part = Path(path), Path(f"{path}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # a folder tidied away during a run costs no epoch
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if part.is_file():
            part.unlink()
        raise OSError(f"could not write {path}: {error.strerror}; what was there before is untouched")


def save(path, contents):
    """torch.save, atomically, and equal bytes for equal contents (hence no file name in them, and `_plain`)."""
    buffer = io.BytesIO()
    torch.save(_plain(contents), buffer)
    write(path, buffer.getvalue())


def _plain(part):
    """A copy in which equal strings are one object and containers are not shared: pickle tells these apart."""
    if isinstance(part, dict):
        return {_plain(key): _plain(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return type(part)(_plain(value) for value in part)
    return sys.intern(part) if isinstance(part, str) else part


def load(path, script, part):
    """Read a .pt file of `script` (None: any) that holds `part`, onto the CPU. No code in it runs. Raises BadInput."""
    if not Path(path).is_file():
        raise BadInput(f"there is no file {path}" + (f"; train first: python {script}.py" if script else ""))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types here
        why = "holds code, which is not run" if "GLOBAL" in str(error) else "is damaged or no .pt file"
        raise BadInput(f"{path} {why}")
    if not isinstance(contents, dict) or "script" not in contents:
        raise BadInput(f"{path} was not written by this collection")
    if script and contents["script"] != script:
        raise BadInput(f"{path} was written by {contents['script']}.py, not by {script}.py")
    if part not in contents:
        raise BadInput(f"{path} holds no {part}: weights_epoch_E.pt is for sampling, checkpoint.pt for continuing")
    return contents


LOADERS = {"load_generator": ("a generator", "main_gan"), "load_model": ("an encoder and a decoder", "main_vae")}


def open_weights(path, *loaders):
    """(path, contents, load) of a weights file; load is the first of `loaders` that the script that wrote it has.

    path "": the newest weights_epoch_{E}.pt for which there is one, of the folders in the current one. Only scripts of
    this collection are imported. Raises BadInput.
    """
    wanted, train = LOADERS[loaders[0]]
    if not path:
        for found in sorted(Path().glob("*/weights_*.pt"), key=lambda file: file.stat().st_mtime, reverse=True):
            try:
                return open_weights(str(found), *loaders)
            except BadInput:
                continue  # of another kind, or damaged
        raise BadInput(f"no folder here holds a weights_epoch_E.pt with {wanted}; train first: python {train}.py")
    contents, own = load(path, None, "model_kwargs"), Path(__file__).parent.glob("*.py")
    script = contents["script"]
    module = importlib.import_module(script) if script in [file.stem for file in own] else None
    for name in loaders:
        if hasattr(module, name):
            return path, contents, getattr(module, name)
    raise BadInput(f"{path}: {script}.py is no script of this collection that has {wanted}; train one that has: "
                   f"python {train}.py")


# ---------------------------------------------------------------------------------------------------- pictures


def save_grid(images, path, columns, low=-1.0, high=1.0):
    """Write images (N, C, H, W) as a PNG grid. The scale is fixed (low is black, high white), never stretched."""
    from PIL import Image

    images = ((images.detach().float().cpu() - low) * (255 / (high - low))).round().clamp(0, 255).byte()
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    grid = torch.full((channels, rows * (height + 2) + 2, columns * (width + 2) + 2), 128, dtype=torch.uint8)
    for i, image in enumerate(images):
        y, x = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        grid[:, y:y + height, x:x + width] = image
    zoom = max(1, round(480 / grid.shape[2]))  # small pictures by whole pixels, so that they can be seen
    grid = grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    buffer = io.BytesIO()
    Image.fromarray(grid.squeeze(0).numpy() if channels == 1 else grid.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    write(path, buffer.getvalue())


def save_curves(history, panels, title, path):
    """Plot columns of a history against epochs. panels: {label of the y axis: [columns]}, one panel beside another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(panels), 3.6), layout="constrained")
    for axes, (label, columns) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for column in columns:  # a dashed line is the test split's
            points = [(x, y) for x, y in zip(history["epoch"], history[column]) if y == y]  # nan: not measured
            axes.plot(*(zip(*points) if points else ((), ())), "--" if column.startswith("test") else "-", label=column,
                      marker="o" if len(points) < 20 else None, markersize=3)
        axes.set(xlabel="epoch", ylabel=label, xlim=(0, history["epoch"][-1] + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    write(path, buffer.getvalue())


def mean_distance(images):
    """Mean Euclidean distance between two of the images (N, C, H, W): 0 when all are alike."""
    return F.pdist(images.flatten(1).cpu()).mean().item()


# --------------------------------------------------------------------------------------------------------- run


class Run:
    """The frame of a training: checks settings, sets seed, device and threads, keeps history and checkpoints.

        for epoch in run.epochs(train, state):          # state: {name: module or optimiser}, saved and restored
            for images, labels in run.batches():
                run.log(step(images))                   # a dict of scalars on the device
            run.end_epoch(diversity=...)                # a row of the history
            if run.sampling: ...                        # this epoch's pictures and weights

    After each epoch history.csv and, last of all, checkpoint.pt are written: what it says is done is on the disk.
    Order of the data and noise depend on the seed alone, so a continued run ends as an uninterrupted one does.
    """

    def __init__(self, script, model_kwargs, dataset_kwargs, *, num_epochs, output_dir, sample_every, seed, device,
                 num_threads, resume, **trainer_kwargs):
        self.settings = {**model_kwargs, **dataset_kwargs, **trainer_kwargs, "num_epochs": num_epochs,
                         "output_dir": output_dir, "sample_every": sample_every, "seed": seed, "device": device,
                         "num_threads": num_threads, "resume": resume}
        check(script, self.settings)
        self.script, self.model_kwargs, self.trainer_kwargs = Path(script).stem, dict(model_kwargs), trainer_kwargs
        self.num_epochs, self.sample_every, self.seed, self.folder = num_epochs, sample_every, seed, Path(output_dir)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise BadInput(f"output_dir {output_dir} cannot be written: {error.strerror}")
        self.device = choose_device(device)
        if num_threads:
            torch.set_num_threads(min(num_threads, os.cpu_count()))
        self.epoch = self.start = self.stopped_by = 0
        self.history, self.checkpoint, self.path = {}, None, self.folder / "checkpoint.pt"
        if self.path.is_file() and resume:
            try:
                self.checkpoint = load(self.path, self.script, "settings")
            except BadInput as error:
                raise BadInput(f"{error}; give another --output_dir, or start over with --resume false")
            self._compare(self.checkpoint["settings"], self.settings)
        seed_everything(seed)

    def _compare(self, old, new):
        changed = [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in sorted({*old, *new} - FREE_TO_CHANGE)
                   if old.get(key) != new.get(key)]
        if changed:
            raise BadInput(f"{self.folder}/checkpoint.pt was trained with other settings ({'; '.join(changed)}); "
                           "give another --output_dir, or start over with --resume false")

    def epochs(self, train, state):
        """Yield the epochs (from 1) that are still to be trained on `train`, an Images."""
        self.train, self.state, self.names, self.rows = train, state, [], None
        if self.checkpoint:
            self._restore(self.checkpoint)
        if self.epoch >= self.num_epochs:
            print(f"{self.folder}: {self.epoch} epochs are trained already; more with --num_epochs", flush=True)
        weights = sum(t.numel() * t.element_size() for network in self._networks() for t in network.parameters())
        need, free = 8 * weights, shutil.disk_usage(self.folder).free  # weights, two moments and the rest, old and new
        if need > free:
            raise BadInput(f"{self.folder} has {free / 2**20:.0f} MiB free; checkpoints need {need / 2**20:.0f} MiB")
        if self.path.is_file() and not self.checkpoint:
            os.replace(self.path, self.folder / "checkpoint_before.pt")  # starting over loses nothing either
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.num_epochs * len(train), initial=self.epoch * len(train), unit=" images",
                            unit_scale=True, dynamic_ncols=True)
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for self.epoch in range(self.epoch + 1, self.num_epochs + 1):
                self.sampling = self.epoch in (1, self.num_epochs) or self.epoch % self.sample_every == 0
                yield self.epoch
                self._write_history()
                self._save(self.epoch, step=0)
                self.start = 0
                self._give_way()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self.bar:
                self.bar.close()

    def batches(self):
        """Yield (images, labels) of the epoch. Losses are looked at about once a second, for the bar and for NaN."""
        self.step, self.begun = self.start, time.monotonic()
        looked = self.begun
        for index in self.train.order(self.seed, self.epoch)[self.start:]:
            yield self.train.batch(index)
            self.step += 1
            if self.stopped_by:
                self._look()
                self._save(self.epoch - 1, self.step)
                self._give_way()
            if time.monotonic() - looked > REFRESH_SECONDS:
                self._look()
                looked = time.monotonic()

    def log(self, values):
        """Keep one step's scalars, {name in words: tensor}, on the device: nothing waits for them."""
        if self.rows is None:
            self.names, self.rows = list(values), torch.zeros(self._steps(), len(values), device=self.device)
        with torch.no_grad():
            torch.stack(tuple(values.values()), out=self.rows[self.step])

    def end_epoch(self, **extra):
        """Add a row to the history: the epoch's means of what was logged, and `extra` numbers (_ reads as a blank)."""
        rows = self._look()
        if not all(p.isfinite().all() for network in self._networks() for p in network.parameters()):
            raise FloatingPointError(f"weights are no longer finite after epoch {self.epoch}; {self._last_good()}; "
                                     "try a lower learning rate")
        sizes = torch.full((len(rows), 1), self.train.batch_size, dtype=torch.float64)
        sizes[-1] = len(self.train) - self.train.batch_size * (len(rows) - 1)
        means = ((rows.double() * sizes).sum(0) / len(self.train)).tolist()
        row = {"epoch": self.epoch, "data": self.train.name, **dict(zip(self.names, means)),
               **{name.replace("_", " "): value for name, value in extra.items()}}
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        if not self.bar:
            each = (time.monotonic() - self.begun) / max(1, self.step - self.start)  # seconds a step
            left = round((self.num_epochs - self.epoch) * self._steps() * each)
            numbers = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float))
            print(f"epoch {self.epoch}/{self.num_epochs}  {numbers}  {self.train.batch_size / each:,.0f} images/s  "
                  f"{left // 60}:{left % 60:02d} min left", flush=True)

    def save_weights(self, **networks):
        """Write weights_epoch_{E}.pt: what sampling and analysis need."""
        save(self.folder / f"weights_epoch_{self.epoch}.pt",
             {"script": self.script, "model_kwargs": self.model_kwargs, "data": self.train.name, "epoch": self.epoch,
              **{name: network.state_dict() for name, network in networks.items()}})

    def _networks(self):
        return [part for part in self.state.values() if isinstance(part, torch.nn.Module)]

    def _steps(self):
        return math.ceil(len(self.train) / self.train.batch_size)

    def _last_good(self):
        return (f"{self.folder}/checkpoint.pt still holds epoch {self.epoch - 1}" if self.epoch > 1
                else "no epoch was finished")

    def _look(self):
        """Read the epoch's losses so far; stop at the first that is not finite."""
        rows = self.rows[:self.step].cpu()
        for step, column in (~rows.isfinite()).nonzero().tolist()[:1]:
            raise FloatingPointError(f"{self.names[column]} became {rows[step, column].item()} at epoch {self.epoch}, "
                                     f"step {step + 1}; {self._last_good()}; try a lower learning rate")
        if self.bar:
            self.bar.set_description(f"epoch {self.epoch}/{self.num_epochs}", refresh=False)
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in zip(self.names, rows[-1].tolist())}, False)
            done = min(self.step * self.train.batch_size, len(self.train))
            self.bar.update((self.epoch - 1) * len(self.train) + done - self.bar.n)
        return rows

    def _write_history(self):
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(self.history)
        table.writerows(zip(*self.history.values()))
        write(self.folder / "history.csv", text.getvalue().encode())

    def _save(self, epoch, step):
        name, numbers, *rest = np.random.get_state()
        rng = {"torch": torch.get_rng_state(), "numpy": [name, numbers.tolist(), *rest], "python": random.getstate()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            rng["mps"] = torch.mps.get_rng_state()
        save(self.path,
             {"script": self.script, "model_kwargs": self.model_kwargs, "settings": self.settings,
              "data": self.train.name, "epoch": epoch, "step": step, "names": self.names,
              "rows": self.rows[:step].clone(), "history": self.history, "rng": rng,
              "state": {name: part.state_dict() for name, part in self.state.items()}})

    def _restore(self, old):
        self._compare({"data": old["data"]}, {"data": self.train.name})
        for name, part in self.state.items():
            part.load_state_dict(old["state"][name])
        self.epoch, self.start, self.history, self.names = old["epoch"], old["step"], old["history"], old["names"]
        self.rows = torch.zeros(self._steps(), len(self.names), device=self.device)
        self.rows[:self.start] = old["rows"]
        torch.set_rng_state(old["rng"]["torch"])
        np.random.set_state(tuple(old["rng"]["numpy"]))
        random.setstate(old["rng"]["python"])
        if self.device.type == "cuda" and "cuda" in old["rng"]:
            torch.cuda.set_rng_state(old["rng"]["cuda"], self.device)
        elif self.device.type == "mps" and "mps" in old["rng"]:
            torch.mps.set_rng_state(old["rng"]["mps"])

    def _stop(self, number, frame):
        if self.stopped_by:
            raise KeyboardInterrupt(f"stopped at once; {self._last_good()}")
        self.stopped_by = number  # the step under way is finished first

    def _give_way(self):
        if self.stopped_by == signal.SIGTERM:
            sys.exit(say(f"{self.script}.py: stopped and saved; run the same command again to continue", 143))
        if self.stopped_by:
            raise KeyboardInterrupt("stopped and saved; run the same command again to continue")
