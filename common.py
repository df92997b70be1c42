"""Plumbing that every script shares: settings, device and seed, files, pictures.

Nothing about a model is in here: no network, no loss, no optimiser step. A script can be understood without it.
"""
import argparse
import ast
import difflib
import gc
import importlib
import io
import math
import os
import random
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn import functional as F

# matplotlib, Pillow and tqdm are imported where they are used: --help and the first step need none of them.

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets these


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
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def say(line, status=None):
    """Print one line on stderr, in the first process only; returns `status`."""
    if RANK == 0:
        print(" ".join(line.split()), file=sys.stderr, flush=True)
    return status


def choose_device(device):
    """`auto` is cuda, else mps, else cpu. Returns a torch.device; raises BadInput if this machine has none such."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and PROCESSES > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # a GPU each
    try:
        torch.zeros(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}")


def set_precision(precision, device):
    """Whether networks compute in bfloat16: `precision` says, or if it is auto whether the device is fast at it.

    tf32 rounds what an NVIDIA GPU multiplies to 10 bits after the point (bfloat16: 7, float32: 23) and nothing else.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if precision == "auto" and device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "auto" and device.type == "cpu":  # older versions of torch cannot tell: float32
        features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return features.get("avx512_bf16", False) or features.get("amx_bf16", False)
    return precision == "bfloat16"


def seed_everything(seed):
    """One seed for torch (every device), numpy and Python."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ------------------------------------------------------------------------------------------------------- files


def write(path, data):
    """Write bytes under a temporary name, then rename: `path` holds the old bytes or the new ones, never half.

    Of several processes only the first writes.
    """
    if RANK:
        return
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
        raise BadInput(f"{path} holds no {part}: weights_*.pt is for sampling, checkpoint.pt for continuing")
    return contents


LOADERS = {"load_generator": ("a generator", "main_gan"), "load_model": ("an encoder and a decoder", "main_vae")}


def open_weights(path, *loaders):
    """(path, contents, load) of a weights file; load is the first of `loaders` that the script that wrote it has.

    path "": the newest weights_*.pt for which there is one, of the folders in the current one. Only scripts of
    this collection are imported. Raises BadInput.
    """
    wanted, train = LOADERS[loaders[0]]
    if not path:
        files = [*Path().glob("*/weights_*.pt"), *Path().glob("*/*/weights_*.pt")]  # an experiment's lie one deeper
        for found in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
            try:
                return open_weights(str(found), *loaders)
            except BadInput:
                continue  # of another kind, or damaged
        raise BadInput(f"no folder here holds a weights_*.pt with {wanted}; train first: python {train}.py")
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
    """Plot columns of a history against its first. panels: {label of the y axis: [columns]}, one beside another."""
    from matplotlib.figure import Figure

    unit = next(iter(history))  # epoch, or iteration
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.8 * across, 3.6 * down), layout="constrained")
    for place, (label, columns) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(down, across, place)
        for column in columns:  # a dashed line is the test split's
            points = [(x, y) for x, y in zip(history[unit], history[column]) if y == y]  # nan: not measured
            axes.plot(*(zip(*points) if points else ((), ())), "--" if column.startswith("test") else "-", label=column,
                      marker="o" if len(points) < 20 else None, markersize=3)
        values = [y for column in columns for y in history[column] if y == y]
        if values and 0 < 20 * min(values) < max(values):  # such as a KL that starts without a price
            axes.set_yscale("log")
        axes.set(xlabel=unit, ylabel=label, xlim=(0, history[unit][-1] + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    write(path, buffer.getvalue())
    gc.collect()  # a figure refers to itself: 20 epochs with 6 pictures grew by 2.5 % without this line, 1.2 % with it


def mean_distance(images):
    """Mean Euclidean distance between two of the images (N, C, H, W): 0 when all are alike."""
    return F.pdist(images.flatten(1).cpu()).mean().item()
