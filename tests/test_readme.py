import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import common
import fid

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE_TEXTS = [re.sub(r"\\\n +", "", page.read_text(encoding="utf-8")).replace("$folder", "mnist_VAE_without_4")
              .replace("$digit", "4").replace("$latents", "2") for page in PAGES]
FENCED = [found for text in PAGE_TEXTS for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]
BLOCKS = [block for language, block in FENCED if not language]
INLINE = [" ".join(line.split()) for text in PAGE_TEXTS for line in re.findall(r"`((?:python|torchrun) [^`]+)`", text)]
COMMANDS = sorted({re.split(r"  +|#", line)[0].strip() for block in [*BLOCKS, *INLINE] for line in block.splitlines()
                   for line in line.strip().split(" && ") if line.startswith(("python ", "torchrun "))})
# what shrinks a command to seconds, where the script has the key; later options win
SMALL = {"num_epochs": 0, "num_iterations": 0, "num_images": 50, "num_points": 50, "num_train": 50, "batch_size": 50,
         "features": "classifier", "score_features": "classifier", "other_data": "none", "bootstrap": 20, "rows": 2,
         "steps": 3, "frames": 2, "stops": 2, "cells": 4, "num_threads": 1, "device": "cpu", "dataset_type": "digits"}


def dicts(script):
    return [value for name, value in vars(script).items() if name.endswith("_kwargs")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with pictures in it and, wherever a command names weights, weights of the script that it belongs to."""
    folder = tmp_path_factory.mktemp("readme")
    for i in range(60):
        for place in ("path/to/pictures", "data/CUB_200_2010_32"):
            common.save_grid(torch.rand(1, 3, 32, 32), folder / place / f"{i % 2}" / f"{i}.png", 1, 0)
    made = {}
    for text in PAGE_TEXTS:
        for path in re.findall(r'[ "](\w+/weights_\w+\.pt)', text):
            kind = path.split("/")[0].split("_", 1)[1].split("_without")[0]
            script = importlib.import_module({"GAN": "main_dcgan" if path.startswith("cifar10") else "main_gan",
                                              "DCGAN": "main_dcgan", "CGAN": "main_cgan", "VAE": "main_vae",
                                              "AE": "main_ae"}[kind] if "cub" not in path else "gan_cub")
            if script not in made:
                kwargs = [dict(d) for d in (script.model_kwargs, script.dataset_kwargs, script.trainer_kwargs)]
                small = {"hidden_size": 16, "feature_maps": 4, "dataset_type": "digits", "batch_size": 500,
                         "num_epochs": 1, "num_iterations": 5, "eval_every": 5, "score_images": 0, "iwae_samples": 0,
                         "device": "cpu", "num_threads": 1, "output_dir": str(folder / script.__name__)}
                for d in kwargs:
                    d.update({key: value for key, value in small.items() if key in d})
                script.main(*kwargs)
                made[script] = next((folder / script.__name__).glob("weights_*.pt")).read_bytes()
            common.write(folder / path, made[script])
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, folder, monkeypatch, capsys):
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")):]]
    if words[1] in ("-m", "-c"):
        return
    assert (ROOT / words[1]).is_file()
    if words[1].startswith("benchmarks/"):  # minutes of timing; what they import is what has to be there
        compile((ROOT / words[1]).read_text(encoding="utf-8"), words[1], "exec")
        return
    script = importlib.import_module(words[1].removesuffix(".py"))
    keys = {key for d in dicts(script) for key in d}
    small = [word for key, value in SMALL.items() if key in keys for word in (f"--{key}", str(value))
             if not (key == "dataset_type" and "folder" in words)]
    if script.__name__ == "fid" and "--real" not in words:
        small += ["--real", "digits:train"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(fid, "CLASSIFIER_STEPS", 5)
    monkeypatch.setattr(sys, "argv", [*words[1:], *small])
    if "--help" in words:
        with pytest.raises(SystemExit, match="^0$"):
            common.run(script.main, *dicts(script))
        return
    common.run(script.main, *dicts(script))  # ends in SystemExit where a key or value is wrong
    assert "Traceback" not in capsys.readouterr().err


def test_there_are_commands_for_every_script():
    assert sum(line.startswith("```") for text in PAGE_TEXTS for line in text.splitlines()) == 2 * len(FENCED)
    scripts = {path.name for path in ROOT.glob("*.py")} - {"common.py", "datasets.py", "training.py"}
    assert scripts <= {word for command in COMMANDS for word in command.split()}


def test_python_snippets_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    snippets = [block for language, block in FENCED if language == "python"]
    assert snippets
    for i, snippet in enumerate(snippets):
        for path in re.findall(r'"(\w+/weights_\w+\.pt)"', snippet):
            assert (folder / path).is_file(), f"no command in the pages makes {path}"
        exec(snippet, {})
        for picture in re.findall(r'"(\w+\.png)"', snippet):
            assert os.path.getsize(picture) > 100


def test_every_picture_and_link_is_there():
    for page, text in zip(PAGES, PAGE_TEXTS):
        for target in re.findall(r'src="([^"]+)"|\]\(([^)#]+)', text):
            target = target[0] or target[1]
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_settings_shown_are_the_scripts_own():
    shown = re.findall(r"^`(\w+)\.py` settings:\n\n```\n(.*?)^```", PAGE_TEXTS[0], re.DOTALL | re.MULTILINE)
    for name, block in shown:
        script, values = importlib.import_module(name), {}
        exec(block, values)
        for kwargs in ("model_kwargs", "dataset_kwargs", "trainer_kwargs"):
            assert values[kwargs] == getattr(script, kwargs), name
