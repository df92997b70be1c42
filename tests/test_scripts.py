"""What holds for every script: its command line, its exit status, its files, its way on."""

import importlib
import inspect
import io
import os
import re
import runpy
import signal
import sys
import time
import tokenize
from pathlib import Path

import helpers
import pytest
import torch
from helpers import ANALYSIS, ROOT, SMALL, Process, run_here, small_options

import common
import fid
import main_gan

TRAINING = list(SMALL)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_files(folder, expected):
    """Whether the folder holds what the other one holds, to the bit."""
    for path in expected.iterdir():
        if path.name == "checkpoint.pt":
            one, other = (torch.load(p, weights_only=True) for p in (path, folder / path.name))
            assert not helpers.differences(one, other)
        elif path.name != "run.html":  # it lists the curves, too, which not all tests draw
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    return True


@pytest.fixture(scope="module", autouse=True)
def small_pictures(tmp_path_factory):
    helpers.write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def no_curves(monkeypatch):
    """Curves take half a second each: they are drawn where a test is about them."""
    monkeypatch.setattr(common, "save_curves", lambda *_: None)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


# ------------------------------------------------------------------------- a whole run

# of the epoch under way, after 15 steps of all optimisers
STEPS = {"main_gan": 8, "main_dcgan": 8, "main_cgan": 8, "main_vae": 6, "main_ae": 6, "gan_cub": 1}


@pytest.mark.parametrize("name", TRAINING)
def test_stopped_in_mid_epoch_a_script_goes_on_as_if_never_stopped(
    name, tmp_path, monkeypatch, capsys, no_curves
):
    """Ctrl-C here, in mid-epoch; the same command then finishes in a process with a terminal."""
    script = importlib.import_module(name)
    options = small_options(name)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    monkeypatch.chdir(whole)
    assert run_here(script, *options) == 0
    parts.mkdir()
    monkeypatch.chdir(parts)
    before = signal.getsignal(signal.SIGINT)
    capsys.readouterr()
    with helpers.after_optimiser_steps(15, interrupt):
        assert run_here(script, *options) == 130
    assert signal.getsignal(signal.SIGINT) == before
    told = capsys.readouterr().err
    assert told == f"{name}.py: stopped and saved; run the same command again to continue\n"
    checkpoint = torch.load("out/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == STEPS[name]

    look_at_every_step = "import training; training.LOOK_SECONDS = 0"
    process = Process(name, options, cwd=parts, terminal=True, prelude=look_at_every_step)
    status, output, shown = process.finish()
    assert status == 0, shown
    unit = "iteration 20" if name == "gan_cub" else "epoch 2"
    assert f"{unit}:" in shown and "loss=" in shown and "steps/s" in shown  # the bar
    assert same_files(parts / "out", whole / "out")
    assert not list(tmp_path.rglob("*.part"))
    last = sorted(path.name for path in (parts / "out").glob("weights_*_*.pt"))[-1]
    advice = [
        f"python latent_space_interpolation.py --weights_path out/{last}",
        f"python fid.py --features classifier --generated out/{last}",
    ]
    assert [line.strip() for line in output.splitlines()[-2:]] == advice
    for line in advice:
        other = importlib.import_module(line.split()[1].removesuffix(".py"))
        keys = set(re.findall(r"--(\w+)", line))
        assert keys and keys <= set(helpers.keys_of(other))


def test_processes_that_were_stopped_and_killed_end_as_one_that_was_not(
    tmp_path, monkeypatch, no_curves
):
    """SIGTERM and SIGKILL at moments that nobody chose."""
    endings = {signal.SIGTERM: 143, signal.SIGKILL: -9}
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    options = small_options("main_gan", num_epochs=100_000, sample_every=1_000_000)
    checkpoint = parts / "out" / "checkpoint.pt"
    written = 0
    for number, ending in endings.items():
        running = Process("main_gan", options, cwd=parts)
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == written:
            assert running.process.poll() is None, running.finish()
            time.sleep(0.005)
        running.process.send_signal(number)
        status, _, errors = running.finish()
        assert status == ending
        if number != signal.SIGKILL:
            assert errors.count("\n") == 1 and "the same command again" in errors
        written = checkpoint.stat().st_mtime_ns
    reached = torch.load(checkpoint, weights_only=True)["epoch"]
    options = small_options("main_gan", num_epochs=reached + 2, sample_every=1_000_000)
    whole.mkdir()
    for folder in (parts, whole):
        monkeypatch.chdir(folder)
        assert run_here(main_gan, *options) == 0
    assert same_files(parts / "out", whole / "out")
    assert not list(tmp_path.rglob("*.part"))


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch, capsys, no_curves):
    monkeypatch.chdir(tmp_path)

    def twice():
        interrupt()
        interrupt()

    with helpers.after_optimiser_steps(30, twice):
        assert run_here(main_gan, *small_options("main_gan")) == 130
    assert "stopped at once; out/checkpoint.pt still holds epoch 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*TRAINING, "no room"])
def test_a_run_that_breaks_off_ends_with_status_1(name, tmp_path, monkeypatch, capsys, no_curves):
    monkeypatch.chdir(tmp_path)
    options, words = [], " became "
    if name == "no room":
        name, words = "main_gan", "No space left on device"
        if not os.path.exists("/dev/full"):
            pytest.skip("needs a device that is always full")
        (tmp_path / "out").mkdir()
        os.symlink("/dev/full", tmp_path / "out" / "checkpoint.pt.part")
    else:
        keys = helpers.keys_of(importlib.import_module(name))
        rates = [key for key in keys if key.endswith("lr")]
        options = [word for key in rates for word in (f"--{key}", "1e30")]
    script = importlib.import_module(name)
    assert run_here(script, *small_options(name), *options) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{name}.py: ") and error.count("\n") == 1 and words in error
    assert not list(tmp_path.glob("out/checkpoint.pt"))


# ------------------------------------------------------------------------ command line


@pytest.mark.parametrize("name", [*TRAINING, *ANALYSIS])
def test_the_file_itself_prints_help_and_refuses_a_wrong_key(name, tmp_path, monkeypatch, capsys):
    path = str(ROOT / f"{name}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(path, run_name="__main__")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    script = importlib.import_module(name)
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    for key, default in helpers.keys_of(script).items():
        line = next(line for line in source.splitlines() if line.startswith(f'    "{key}": '))
        comment = line.partition("  # ")[2]
        assert len(comment) > 5, f"{key} has no comment"
        assert f"{comment} (default: {default})" in text
    monkeypatch.setattr(sys, "argv", [path, "--devise", "cpu"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(path, run_name="__main__")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error == f"{name}.py: unknown key --devise; did you mean --device?\n"
    assert not list(tmp_path.iterdir())


def without_comments(path):
    """The source of a script without comments, with another dict and a default that is computed."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    source = tokenize.untokenize(token for token in tokens if token.type != tokenize.COMMENT)
    source = re.sub(r'("device"): "auto"', r'\1: "au" + "to"', source)
    source = re.sub(r'("seed"): 0', r"\1: 3 - 3", source)
    source = re.sub(r'(lr"): 0.0002', r"\1: 2 * 1e-4", source)
    other = 'DECOY = {\n    "seed": 5,\n    "num_epochs": "five",\n}\n\n\n'
    assert "#" not in re.sub(r'"[^"]*"', "", source) and "3 - 3" in source
    return re.sub(r"^(def|class) ", rf"{other}\1 ", source, count=1, flags=re.MULTILINE)


@pytest.mark.parametrize("name", [*TRAINING, *ANALYSIS])
def test_comments_change_nothing(name, tmp_path, monkeypatch, capsys):
    copy = tmp_path / f"{name}.py"
    copy.write_text(without_comments(ROOT / f"{name}.py"), encoding="utf-8")

    def status(*options):
        monkeypatch.setattr(sys, "argv", [str(copy), *options])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(copy), run_name="__main__")
        return stop.value.code

    monkeypatch.chdir(tmp_path)
    assert status("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for key, default in helpers.keys_of(importlib.import_module(name)).items():
        assert f"--{key} " in text and f"(default: {default})" in text
    value_of_seed = "-1" if name in TRAINING else "many"
    wrong = [("--seed", value_of_seed), ("--seed", "1.5"), ("--output_dirr", "x")]
    for options in [*wrong, ("--latent_dim", "0")] if name in TRAINING[1:] else wrong:
        assert status(*options) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and options[0].strip("-")[:10] in error
    assert not list(tmp_path.rglob("*.pt"))


AT_LEAST_1 = [0, -1, 1.5]
AT_LEAST_0 = [-1, "many"]
TRUTH = ["perhaps", 1]
RATE = [0, -0.001, "nan", "inf", "fast"]
SHARE = [-0.1, 1, "nan"]
SIDES = [20, -1, 8, 128]
WRONG = {
    "latent_variable_size": AT_LEAST_1,
    "discriminator_hidden_size": AT_LEAST_1,
    "generator_hidden_size": AT_LEAST_1,
    "hidden_size": AT_LEAST_1,
    "latent_dim": AT_LEAST_1,
    "embedding_dim": AT_LEAST_1,
    "feature_maps": AT_LEAST_1,
    "image_channels": [0, 2, 4],
    "conditioning": ["none", ""],
    "model_type": ["gan", "VAE"],
    "dataset_type": ["imagenet", "MNIST", ""],
    "batch_size": [*AT_LEAST_1, 91],
    "shuffle": TRUTH,
    "normalize": [*TRUTH, True],
    "data_dir": [],  # any text
    "allow_fallback": TRUTH,
    "horizontal_flip": TRUTH,
    "exclude_class": [-2, 10, "cat"],
    "jpeg_quality": [-1, 101],
    "num_epochs": AT_LEAST_0,
    "num_iterations": [*AT_LEAST_0, 25],  # no multiple of sample_every, which is 10
    "generator_lr": RATE,
    "discriminator_lr": RATE,
    "lr": RATE,
    "lr_half_life": [-0.5, "nan", "inf"],
    "real_label": [-0.1, 1.1, "nan"],
    "fake_label": [-0.1, 1.1, "nan"],
    "ema_decay": SHARE,
    "beta": [-0.1, "nan", "inf"],
    "beta_schedule": ["cosine"],
    "beta_epochs": AT_LEAST_1,
    "precision": ["float16", "half", ""],
    "iwae_samples": AT_LEAST_0,
    "score_every": AT_LEAST_0,
    "score_features": ["fid", ""],
    "score_images": [-1, 1],
    "loss": ["wgan", "WGAN-GP"],
    "d_steps": [-1, 1.5, 3],  # 3 does not divide sample_every
    "penalty_weight": [-2, -0.5, "nan"],
    "experiment": ["all", ""],
    "output_dir": [ROOT / "README.md", ROOT / "README.md" / "inside"],
    "seed": [-1, 2**32, 0.5],
    "device": ["cuda:77", "gpu", ""],
    "num_threads": [-1, 1.5],
    "cuda_graph": TRUTH,
    "resume": TRUTH,
    "sample_every": AT_LEAST_1,
}
WRONG_IN = {
    "main_gan": {"image_size": [0, -784, 785, 1.5]},
    "main_vae": {"image_size": [0, -784, 785, 1.5]},
    "main_dcgan": {"image_size": SIDES},
    "main_cgan": {"image_size": SIDES},
    "main_ae": {"image_size": [0, -8, 4, 20]},
    "gan_cub": {"image_size": [0, 28, 128], "latent_dim": [0, 1], "sample_every": [0, 7]},
}


@pytest.mark.parametrize("name", TRAINING)
def test_every_wrong_value_is_refused_in_one_line(name, tmp_path, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    wrong = {**WRONG, **WRONG_IN[name]}
    tried = 0
    for key in helpers.keys_of(script):
        for value in wrong[key]:
            status = run_here(script, *small_options(name), f"--{key}={value}")
            error = capsys.readouterr().err
            assert status == 2, f"--{key} {value} gives {status}"
            assert error.count("\n") == 1 and error.startswith(f"{name}.py: "), error
            # a sentence about something else would be one by chance
            assert key in error, error
            assert "true|false" in error or wrong[key] is not TRUTH, error
            written = list(tmp_path.iterdir())
            assert not written, f"--{key} {value} wrote {written}"
            tried += 1
    assert tried > 40


@pytest.mark.parametrize("name", TRAINING)
def test_no_signature_hides_a_default_and_a_misspelt_key_is_an_error(name):
    script = importlib.import_module(name)
    signature = inspect.getfullargspec(script.Trainer.__init__)
    assert set(signature.kwonlyargs) >= {*script.model_kwargs, *script.trainer_kwargs}
    assert not signature.defaults and not signature.kwonlydefaults and not signature.varkw


@pytest.mark.parametrize("group", ["dataset", "trainer", "run"])
@pytest.mark.parametrize("name", TRAINING)
def test_a_misspelt_key_in_a_dict_is_an_error(name, group, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    dicts = helpers.small_dicts(script, num_epochs=0, num_iterations=0)
    names = [key for key in vars(script) if key.endswith("_kwargs")]
    dicts[names.index(f"{group}_kwargs")]["learning_rat"] = 1
    with pytest.raises(TypeError, match="learning_rat"):
        script.main(*dicts)


@pytest.mark.parametrize("name", ["main_dcgan", "main_cgan", "gan_cub"])
def test_no_scorer_is_trained_where_only_settings_are_checked(name, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "Scorer", None)
    scored = dict(score_every=1, score_images=10, score_features="classifier")
    dicts = helpers.small_dicts(script, num_epochs=0, num_iterations=0, **scored)
    assert script.main(*dicts).scorer is None
    with pytest.raises(TypeError, match="NoneType"):
        script.main(*helpers.small_dicts(script, num_epochs=1, num_iterations=10, **scored))


@pytest.mark.parametrize("name", ["main_dcgan", "main_cgan", "main_vae", "main_ae", "gan_cub"])
def test_precision_reaches_the_arithmetic(name, tmp_path, monkeypatch, no_curves):
    """The networks' layers return bfloat16 if asked to, and float32 otherwise."""
    script = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    for precision, expected in (("bfloat16", {torch.bfloat16}), ("float32", {torch.float32})):
        found = set()

        def note(module, inputs, output, found=found):
            if torch.is_grad_enabled() and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                found.add(output.dtype)

        hook = torch.nn.modules.module.register_module_forward_hook(note)
        small = {"num_epochs": 1, "num_iterations": 10}
        dicts = helpers.small_dicts(script, precision=precision, output_dir=precision, **small)
        script.main(*dicts)
        hook.remove()
        assert found == expected


# ---------------------------------------------------------------- files of older versions


def old_checkpoint(settings):
    """A checkpoint.pt as the version before wrote it."""
    return {
        "script": "main_gan",
        "settings": settings,
        "data": "digits",
        "images": 4500,
        "epoch": 1,
        "step": 0,
        "names": ["discriminator loss"],
        "rows": torch.zeros(0, 1),
        "history": {"epoch": [1], "data": ["digits"], "discriminator loss": [1.2]},
        "rng": [{"torch": torch.get_rng_state()}],
        "state": {},
    }


def old_weights(script):
    """A weights_epoch_1.pt as the version before wrote it."""
    return {
        "script": script,
        "model_kwargs": {"latent_dim": 4},
        "data": "digits (bundled, in place of mnist)",
        "epoch": 1,
        "generator": {"weight": torch.zeros(3)},
        "encoder": {"weight": torch.zeros(3)},
        "decoder": {"weight": torch.zeros(3)},
    }


def test_an_older_version_s_checkpoint_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    torch.save(old_checkpoint({"batch_size": 500}), "out/checkpoint.pt")
    before = files(tmp_path / "out")
    assert run_here(main_gan, *small_options("main_gan")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "older version" in error and "--resume false" in error
    assert files(tmp_path / "out") == before
    assert run_here(main_gan, *small_options("main_gan", num_epochs=1), "--resume", "false") == 0
    kept = [path.read_bytes() for path in (tmp_path / "out").glob("run_of_*/checkpoint.pt")]
    assert kept == list(before.values())


@pytest.mark.parametrize("name", TRAINING)
def test_an_older_version_s_weights_are_refused_in_one_line(name, tmp_path):
    torch.save(old_weights(name), tmp_path / "weights_epoch_1.pt")
    script = importlib.import_module(name)
    load = getattr(script, "load_generator", None) or script.load_model
    with pytest.raises(common.BadInput, match="older version") as caught:
        load(tmp_path / "weights_epoch_1.pt")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- own data


@pytest.mark.parametrize("name", TRAINING)
def test_every_script_takes_a_data_set_of_one_s_own(name, tmp_path, monkeypatch, no_curves, capsys):
    script = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    images = helpers.OwnDataset(size=16)
    trainer = script.main(
        *helpers.small_dicts(
            script, dataset_type=images, batch_size=12, num_epochs=1, num_iterations=10
        )
    )
    train = trainer.train
    assert (train.name, train.class_names, len(train)) == ("OwnDataset", ["dark", "bright"], 36)
    bright = train.pixels.float().mean((1, 2, 3)) > 128
    assert train.labels.equal(bright.long())
    assert helpers.read_history("out")[0]["data"] == "OwnDataset"
    # the data cannot be loaded from the command line, but generators need none
    said = capsys.readouterr().out
    assert ("latent_space_interpolation.py" in said) == (name not in ("main_vae", "main_ae"))
    assert "pictures and weights are in out/" in said and "fid.py" not in said
    weights = torch.load(next(tmp_path.glob("out/weights_*.pt")), weights_only=True)
    assert weights["data"]["dataset_type"] == "OwnDataset"
    assert weights["data"]["shape"] == list(train.pixels.shape[1:])
    load = getattr(script, "load_generator", None) or script.load_model
    load(next(tmp_path.glob("out/weights_*.pt")))


@pytest.mark.parametrize("name", ["main_gan", "main_dcgan", "gan_cub"])
def test_images_that_are_all_alike_can_be_learnt_too(name, tmp_path, monkeypatch, no_curves):
    """One picture, repeated, is a usual check of a network; its diversity is not defined."""
    script = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    images = helpers.OwnDataset(size=16)
    images.pixels[:] = images.pixels[0]
    settings = dict(dataset_type=images, batch_size=12, num_epochs=1, num_iterations=10)
    script.main(*helpers.small_dicts(script, **settings))
    assert helpers.read_history("out")[0]["diversity"] == "nan"
    assert '"diversity": null' in Path("out", "run.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("inside", [".", "out", "deep/out"])
def test_a_run_is_not_written_among_its_own_data(inside, tmp_path, monkeypatch, capsys):
    """Its pictures would be images of the next run."""
    monkeypatch.chdir(tmp_path)
    data = Path(helpers.SHARED["data_dir"])
    before = sorted(data.rglob("*"))
    options = small_options("main_gan", output_dir=data / inside)
    assert run_here(main_gan, *options) == 2
    error = capsys.readouterr().err
    assert "must lie outside data_dir" in error and error.count("\n") == 1
    assert sorted(data.rglob("*")) == before
    beside = small_options("main_gan", output_dir=data.with_name("beside"), num_epochs=0)
    assert run_here(main_gan, *beside) == 0


# ------------------------------------------------------------------------ a copy of one's own


@pytest.mark.parametrize("name", TRAINING)
def test_a_copy_under_another_name_reads_the_weights_that_it_wrote(name, tmp_path):
    copy = tmp_path / "mine.py"
    copy.write_bytes((ROOT / f"{name}.py").read_bytes())
    names = runpy.run_path(str(copy))
    load = names.get("load_generator") or names["load_model"]
    shipped = ROOT / "weights" / f"{name}.pt"
    with pytest.raises(common.BadInput, match=f"was written by {name}.py, not by mine.py"):
        load(shipped)
    weights = torch.load(shipped, weights_only=True)
    torch.save({**weights, "script": "mine"}, tmp_path / "weights_epoch_1.pt")
    load(tmp_path / "weights_epoch_1.pt")
