"""The commands, snippets, links and pictures of README.md, docs/ and data/ are all good.

Every command is parsed by the script that it names, and its values are checked. One command of
each script is also run, with options behind it that make it small.
"""

import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import dicts_of
from PIL import Image

import common
import fid

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md"]
TRAINING = ["main_gan", "main_dcgan", "main_cgan", "main_vae", "main_ae", "gan_cub"]
ANALYSIS = ["latent_space_interpolation", "latent_space_vae", "detect_vae_anomalies", "fid"]
# options of other programs than the scripts
FOREIGN_OPTIONS = {"help", "quick", "check", "nproc_per_node", "index", "dist"}
# what makes a command of a script small, where the script has the key
SMALL = {
    "dataset_type": "digits",
    "num_epochs": 1,
    "num_iterations": 5,
    "sample_every": 5,
    "batch_size": 100,
    "hidden_size": 16,
    "feature_maps": 4,
    "iwae_samples": 2,
    "score_every": 0,
    "score_images": 0,
    "num_images": 50,
    "num_points": 50,
    "num_train": 50,
    "features": "classifier",
    "other_data": "none",
    "bootstrap": 20,
    "rows": 2,
    "steps": 3,
    "frames": 2,
    "stops": 2,
    "cells": 4,
    "num_threads": 1,
    "device": "cpu",
    "precision": "float32",
}


def text_of(page):
    """The page, with lines that end in a backslash joined and the shell's variables put in."""
    text = re.sub(r"\\\n +", "", page.read_text(encoding="utf-8"))
    text = text.replace("${digit}", "4").replace("$digit", "4").replace("$latents", "2")
    return text.replace("$folder", "mnist_VAE_without_4_latents_2")


TEXTS = {page: text_of(page) for page in PAGES}


def fenced_blocks():
    """[(language, text)] of all blocks between ``` and ```."""
    found = []
    for text in TEXTS.values():
        # inside a list they are indented
        blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
        found += [(language, textwrap.dedent(block)) for language, block in blocks]
    return found


def all_commands():
    """Every command line of the pages, once: in blocks, then in the text between backticks."""
    lines = []
    for language, block in fenced_blocks():
        if not language:
            lines += block.splitlines()
    for text in TEXTS.values():
        for inline in re.findall(r"`((?:python|pip|torchrun) [^`]+)`", text):
            lines.append(" ".join(inline.split()))
    commands = []
    for line in lines:
        for command in line.strip().split(" && "):
            if command.startswith(("python ", "pip ", "torchrun ")):
                commands.append(command.strip())
    return list(dict.fromkeys(commands))


COMMANDS = all_commands()


def split_command(command):
    """(what is run, its arguments): a script's name without .py, a path, `-m`, or pip."""
    program, *words = shlex.split(command)
    if program == "pip":
        return program, words
    while program == "torchrun" and words[0].startswith("--"):
        words = words[1:]
    return words[0].removesuffix(".py"), words[1:]


def parse(command, monkeypatch):
    """(script, the settings {key: value} that a command of it asks for). Raises BadInput."""
    name, arguments = split_command(command)
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    dicts = common.parse_command_line(Path(script.__file__), script.__doc__, dicts_of(script))
    settings = {}
    for kwargs in dicts:
        settings |= kwargs
    return script, settings


def commands_of(*scripts):
    return [command for command in COMMANDS if split_command(command)[0] in scripts]


@pytest.mark.parametrize("command", commands_of(*TRAINING, *ANALYSIS))
def test_a_script_understands_its_command(command, monkeypatch, capsys):
    if "--help" in command:
        with pytest.raises(SystemExit, match="^0$"):
            parse(command, monkeypatch)
        assert "(default: " in capsys.readouterr().out
        return
    script, settings = parse(command, monkeypatch)
    script.check_settings(settings)
    if "dataset_type" in settings:
        assert settings["dataset_type"] in common.DATASET_TYPES


OTHERS = [command for command in COMMANDS if command not in commands_of(*TRAINING, *ANALYSIS)]


@pytest.mark.parametrize("command", OTHERS)
def test_a_command_of_no_script_works(command, tmp_path):
    name, arguments = split_command(command)
    if name == "pip":
        assert arguments[:2] == ["install", "-r"]
        assert (ROOT / arguments[2]).is_file()
    elif name == "-c":
        exec(arguments[0], {})
    elif name == "-m":  # pytest: it reads its options, and finds no test in an empty folder
        assert arguments[0] == "pytest"
        words = [sys.executable, "-m", *arguments, "--collect-only"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert "no tests collected" in done.stdout, done.stderr
    else:
        assert name.startswith("benchmarks/"), "no script of this collection"
        assert (ROOT / f"{name}.py").is_file()


@pytest.mark.parametrize("name", ["throughput", "tricks"])
def test_a_benchmark_takes_steps(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    throughput = importlib.import_module("throughput")
    case = throughput.CASES["main_gan"]
    monkeypatch.setattr(case, "steps", 2)
    monkeypatch.setattr(case, "copies", 1)
    if name == "throughput":
        times, batch_size, threads = throughput.take_turns(case, rounds=1)
        assert sorted(times) == ["bare", "batch", "fit", "script", "textbook"]
        assert (batch_size, threads) == (16, 1)
        assert times["textbook"][0] > times["batch"][0] > 0
    else:
        importlib.import_module("tricks").measure("main_gan", rounds=1)
        assert capsys.readouterr().out.count("without") == 7


def test_every_script_has_a_command():
    # a script of the user's own, which may lie beside them, does not count
    files = [path for path in ROOT.glob("*.py") if "common.run_script(" in path.read_text("utf-8")]
    scripts = {path.stem for path in files}
    assert scripts == {*TRAINING, *ANALYSIS}
    for script in scripts:
        assert commands_of(script), f"{script}.py is in no command"
    fences = sum(text.count("```") for text in TEXTS.values())
    assert fences == 2 * len(fenced_blocks())


def test_a_band_reaches_from_the_lowest_run_to_the_highest(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    normal_runs = importlib.import_module("normal_runs")
    folder = ROOT / "docs" / "histories"
    assert {path.name.split("_seed_")[0] for path in folder.iterdir()} == set(normal_runs.PANELS)
    for name in normal_runs.PANELS:  # the histories are of one kind and whole
        for rows in normal_runs.read_histories(folder, name):
            assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(len(rows))]
            assert rows[0]["data"] in ("mnist", "cifar10", "digits")
    runs = [[{"epoch": str(e), "x": str(e * factor)} for e in (1, 2)] for factor in (1, 2, 6)]
    axes = common.new_figure(3, 3).add_subplot()
    normal_runs.draw_bands(axes, runs, ["x"])
    assert axes.lines[0].get_ydata().tolist() == [3, 6]
    (band,) = axes.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 1), (1, 6), (2, 2), (2, 12)}
    normal_runs.main(folder, tmp_path / "bands.png")
    assert Image.open(tmp_path / "bands.png").size == (1320, 1716)


def test_every_option_in_the_text_exists():
    known = set(FOREIGN_OPTIONS)
    for name in [*TRAINING, *ANALYSIS]:
        for kwargs in dicts_of(importlib.import_module(name)):
            known |= set(kwargs)
    for page, text in TEXTS.items():
        unknown = set(re.findall(r"(?<![\w-])--(\w+)", text)) - known
        assert not unknown, f"{page.name}: {unknown}"


def shortened(command):
    """The command's words for sys.argv, and options behind them that make it small."""
    name, arguments = split_command(command)
    script = importlib.import_module(name)
    keys = set()
    for kwargs in dicts_of(script):
        keys |= set(kwargs)
    small = []
    for key, value in SMALL.items():
        if key in keys:
            small += [f"--{key}", str(value)]
    if name in TRAINING and "image_size" in script.dataset_kwargs:  # elsewhere it counts pixels
        small += ["--image_size", "16"]
    return [str(ROOT / f"{name}.py"), *arguments, *small]


def run_shortened(command):
    """Run a command as Python runs a file, in this process."""
    before = sys.argv
    sys.argv = shortened(command)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before


def weights_in(text):
    """The weights files that a text names."""
    return sorted(set(re.findall(r'[ "`](\w+/weights_\w+\.pt)', text)))


def writers():
    """{weights file: script} of all training commands in the pages."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for command in commands_of(*TRAINING):
            if "--help" not in command:
                script, settings = parse(command, patch)
                number = settings.get("num_epochs", settings.get("num_iterations"))
                unit = "epoch" if "num_epochs" in settings else "iteration"
                path = f"{settings['output_dir']}/weights_{unit}_{number}.pt"
                found[path] = script.__name__
    return found


def test_the_weights_that_are_named_are_written_by_a_command():
    named = set()
    for text in TEXTS.values():
        named |= set(weights_in(text))
    assert len(named) > 3
    assert named <= writers().keys()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(script) -> the folder in which the first command in the pages of it was run.

    The folder also holds all weights files of this script that the pages name.
    """
    folder = tmp_path_factory.mktemp("readme")

    def train(script):
        results = folder / f"first_{script}"
        if not results.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                alone = [one for one in commands_of(script) if "--experiment" not in one]
                run_shortened(f"{alone[0]} --output_dir {results}")
            for path, writer in writers().items():
                if writer == script:
                    (folder / path).parent.mkdir(exist_ok=True)
                    shutil.copy(next(results.glob("weights_*.pt")), folder / path)
        return folder

    return train


@pytest.fixture
def offline(monkeypatch):
    """No download is tried, and the classifier of a score is trained for a moment only."""

    def no_network(name, data_dir):
        raise OSError("no network in this test")

    monkeypatch.setattr(common, "load_torchvision", no_network)
    monkeypatch.setattr(fid, "CLASSIFIER_STEPS", 5)


@pytest.mark.parametrize("script", TRAINING)
def test_a_short_command_trains(trained, script):
    results = trained(script) / f"first_{script}"
    history = (results / "history.csv").read_text().splitlines()
    assert len(history) == 2 and "digits" in history[1]
    assert list(results.glob("weights_*.pt"))
    assert list(results.glob("*.png"))


@pytest.mark.parametrize("script", ANALYSIS)
def test_a_short_command_looks_at_weights(trained, script, offline, monkeypatch):
    command = commands_of(script)[0]
    named = weights_in(command)
    folder = trained(writers()[named[0]] if named else "main_vae")
    monkeypatch.chdir(folder)
    before = set(folder.rglob("*.png"))
    if script == "fid":  # a file that is run anew would train its classifier for long
        monkeypatch.setattr(sys, "argv", shortened(command))
        common.run_script(fid.main, *dicts_of(fid))
    else:
        run_shortened(command)
    assert set(folder.rglob("*.png")) - before


def draw_birds(place):
    """Forty pictures in two sub-folders, the classes."""
    for i in range(40):
        path = place / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)


SNIPPETS = [text for language, text in fenced_blocks() if language == "python"]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_python_snippet_runs(snippet, trained, offline, tmp_path, monkeypatch):
    main_gan = importlib.import_module("main_gan")
    monkeypatch.setitem(main_gan.trainer_kwargs, "num_epochs", 2)
    monkeypatch.setitem(main_gan.dataset_kwargs, "batch_size", 900)
    folder = tmp_path
    for path in weights_in(snippet):
        folder = trained(writers()[path])
    if "sys.argv" in snippet:
        folder = trained("main_dcgan")
        weights = [str(path) for path in folder.glob("first_main_dcgan/weights_*.pt")]
        monkeypatch.setattr(sys, "argv", ["-", *weights])
    if "CUB_200_2010_32" in snippet:
        draw_birds(folder / "data" / "CUB_200_2010_32")
    if '"weights/' in snippet:
        (folder / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(folder)
    before = set(folder.rglob("*"))
    exec(snippet, {})
    for picture in re.findall(r'"(\w+\.png)"', snippet):
        assert (folder / picture).is_file()
    assert set(folder.rglob("*")) - before  # a picture, a run, or what was measured


def anchors(text):
    """The places in a page that a link can go to, as GitHub names them."""
    names = set()
    for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", title.lower())
        names.add(kept.replace(" ", "-"))
    return names


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_link_and_picture_is_there(page):
    targets = re.findall(r'src="([^"]+)"', TEXTS[page])
    targets += re.findall(r"\]\(([^)]+)\)", TEXTS[page])
    assert targets
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(TEXTS[other]), target
