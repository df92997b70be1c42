"""Settings, histories, checkpoints, files, grids and curves: what all scripts have in common."""

import gc
import math
import os
import pickle
import random
import signal
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import differences, read_history, run_here, small_dicts

import common
import main_dcgan
import main_gan
import main_vae
import training


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, and no curves, which take half a second each."""
    monkeypatch.setattr(common, "save_curves", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def gan(here):
    """gan(**overrides) trains a small main_gan on the bundled digits, in out/."""
    digits = dict(dataset_type="digits", data_dir="data", image_size=784, batch_size=500)
    return lambda **overrides: main_gan.main(*small_dicts(main_gan, **{**digits, **overrides}))


# ------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    "options, words",
    [
        (["--num_epoch", "5"], "did you mean --num_epochs"),
        (["--xyzzy", "5"], "see --help"),
        (["--num_epochs", "many"], "int"),
        (["--generator_lr", "inf"], "float"),
        (["--batch_size", "4501"], "4500"),
        (["--dataset_type", "imagenet"], "mnist, fashion_mnist, cifar10"),
        (["--dataset_type", "folder", "--data_dir", "no/such"], "there is no folder no/such"),
        (["--dataset_type", "folder", "--data_dir", ".", "--output_dir", "../out"], "0 images"),
        (["--device", "cuda:77"], "cannot be used here"),
        (["--device", "meta"], "cannot be used here"),
    ],
)
def test_a_refusal_says_what_is_legal(options, words, here, capsys):
    assert run_here(main_gan, "--dataset_type", "digits", *options) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_command_line_reaches_the_dicts_and_leaves_the_defaults_alone(monkeypatch):
    seen = []
    first = {"num_epochs": 3, "resume": True, "generator_lr": 1e-4}
    second = {"data_dir": "a", "shuffle": False, "dataset_type": helpers.OwnDataset()}

    def main(*dicts):
        seen.extend(dicts)

    options = "--num_epochs 7 --resume false --generator_lr 1 --shuffle true --data_dir b/c"
    monkeypatch.setattr("sys.argv", ["x.py", *options.split()])
    common.run_script(main, first, second)
    assert seen[0] == {"num_epochs": 7, "resume": False, "generator_lr": 1.0}
    assert seen[1] == {"data_dir": "b/c", "shuffle": True, "dataset_type": second["dataset_type"]}
    assert first["num_epochs"] == 3 and second["data_dir"] == "a"


# ------------------------------------------------------------------ seeds and precision


def test_same_seed_same_bytes_and_another_seed_others(gan, here):
    for folder, seed in (("one", 3), ("two", 3), ("other", 4)):
        (here / folder).mkdir()
        os.chdir(here / folder)  # the folder's name is among the settings that are saved
        gan(seed=seed)
    one, two, other = (files(here / folder / "out") for folder in ("one", "two", "other"))
    assert len(one) == 7 and one == two
    assert not set(one.values()) & set(other.values())


def test_one_seed_covers_torch_numpy_and_python():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    common.seed_everything(5)
    first = draw()
    common.seed_everything(5)
    assert draw() == first
    common.seed_everything(6)
    assert not set(draw()) & set(first)


@pytest.mark.parametrize(
    "found, fast",
    [
        ({"avx512_bf16": True, "avx2": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": False, "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_auto_takes_bfloat16_where_the_device_is_fast_at_it(found, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert common.use_bfloat16("auto", cpu) == fast
    assert common.use_bfloat16("bfloat16", cpu) and not common.use_bfloat16("float32", cpu)
    assert not common.use_bfloat16("auto", torch.device("mps"))
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert common.use_bfloat16("auto", cuda) == (capability >= (8, 0))
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not common.use_bfloat16("auto", cpu), "a torch that cannot tell"


# --------------------------------------------------------------- continuing, or refusing to

OTHER_VALUES = {
    "latent_variable_size": 65,
    "discriminator_hidden_size": 17,
    "generator_hidden_size": 17,
    "image_size": 256,
    "dataset_type": "mnist",
    "batch_size": 600,
    "shuffle": False,
    "generator_lr": 0.1,
    "discriminator_lr": 0.1,
    "real_label": 1.0,
    "fake_label": 0.0,
    "seed": 1,
}
FREE = {"device": "auto", "num_threads": 2, "cuda_graph": False, "sample_every": 1}
FREE |= {"data_dir": "elsewhere", "allow_fallback": False}


def test_what_is_computed_may_not_change_and_how_it_is_computed_may(gan, here, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    gan(num_epochs=1)
    before = files(here / "out")
    known = helpers.keys_of(main_gan)
    others = {"num_epochs", "output_dir", "resume"}  # each has a test of its own
    assert {*OTHER_VALUES, *FREE, *others} == set(known)
    for key, value in OTHER_VALUES.items():
        with pytest.raises(common.BadInput, match=f"{key} was .*, is .*--resume false"):
            gan(num_epochs=2, **{key: value})
        assert files(here / "out") == before
    with pytest.raises(common.BadInput, match="batch_size was 500, is 600; seed was 0, is 1;?"):
        gan(batch_size=600, seed=1)
    for number, (key, value) in enumerate(FREE.items(), start=2):
        history = gan(num_epochs=number, **{key: value}).run.history
        assert [row["epoch"] for row in history] == list(range(1, number + 1))


def test_0_threads_are_all_of_them_whatever_an_earlier_run_took(gan, monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(training, "ALL_THREADS", 7)
    gan(num_epochs=0, num_threads=1)
    gan(num_epochs=0, num_threads=0)
    assert taken == [1, 7]


def test_a_misspelt_data_set_is_told_from_another_one(gan, here):
    gan(num_epochs=1)
    with pytest.raises(common.BadInput, match="^dataset_type must be one of .*, not 'minst'$"):
        gan(dataset_type="minst")


def test_other_data_than_before_are_refused(gan, here, monkeypatch):
    """MNIST is there in the first run; in the second one it is gone, and digits stand in."""
    helpers.cut_off_network(monkeypatch)
    helpers.write_mnist(here / "data", monkeypatch)
    settings = dict(dataset_type="mnist", batch_size=5)
    gan(num_epochs=1, **settings)
    for path in (here / "data").rglob("*ubyte*"):
        path.unlink()
    before = files(here / "out")
    with pytest.raises(common.BadInput, match="images was 10, is 4500; name was 'mnist', is 'dig"):
        gan(num_epochs=2, **settings)
    assert files(here / "out") == before


def test_more_epochs_go_on_and_as_many_do_nothing(gan, here, capsys):
    whole = gan(num_epochs=3, output_dir="whole").run.history
    gan(num_epochs=1)
    assert gan(num_epochs=3).run.history == whole
    before = files(here / "out")
    capsys.readouterr()
    gan(num_epochs=3)
    assert "out: epoch 3 is trained already" in capsys.readouterr().out
    assert files(here / "out") == before


def test_resume_false_starts_over_and_keeps_the_old_run(gan, here):
    gan(num_epochs=2)
    (here / "out" / "latent_space.html").write_text("made from the weights")
    before = {path.name: path.read_bytes() for path in (here / "out").iterdir()}
    (here / "out" / "holiday.png").write_text("of somebody else")
    old = (here / "out" / "checkpoint.pt").read_bytes()
    gan(num_epochs=0, resume=False)  # a mere check moves nothing
    with pytest.raises(common.BadInput):
        gan(resume=False, image_size=20)
    assert (here / "out" / "checkpoint.pt").read_bytes() == old
    history = gan(num_epochs=1, resume=False).run.history
    assert [row["epoch"] for row in history] == [1]
    assert (here / "out" / "checkpoint.pt").read_bytes() != old
    # the old run lies in a folder of its own, and the new one has none of its pictures
    (kept,) = (here / "out").glob("run_of_*")
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert len(before) == 8 and not list((here / "out").glob("*_epoch_2.*"))
    assert "epoch_2" not in (here / "out" / "run.html").read_text(encoding="utf-8")
    assert (here / "out" / "holiday.png").is_file()
    # and can be continued there
    moved = f"out/{kept.name}"
    assert len(gan(num_epochs=3, output_dir=moved).run.history) == 3
    gan(num_epochs=1, resume=False)
    assert len(list((here / "out").glob("run_of_*"))) == 2


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def saved(here, contents):
    torch.save(contents, here / "saved.pt")
    return (here / "saved.pt").read_bytes()


def test_damaged_foreign_and_dangerous_checkpoints_are_refused(here, capsys):
    checkpoint = here / "out" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    whole = saved(here, {"script": "main_gan", "settings": {}, "dataset_kwargs": {}})
    contents = [
        (b"these are words", "is damaged"),
        (b"", "is damaged"),
        (whole[:-100], "is damaged"),
        (saved(here, {"weights": torch.zeros(3)}), "not written by this collection"),
        (saved(here, {"script": "main_gan", "bomb": Bomb()}), "holds code"),
        (pickle.dumps(Bomb(), protocol=2), "holds code"),
        (pickle.dumps(Bomb(), protocol=4), "is damaged"),
        (whole, "written by main_gan.py, not by main_dcgan.py"),
    ]
    for content, words in contents:
        checkpoint.write_bytes(content)
        assert run_here(main_dcgan, "--dataset_type", "digits", "--output_dir", "out") == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and "--output_dir" in error
        assert checkpoint.read_bytes() == content and not (here / "bomb").exists()


# ----------------------------------------------------------------------------- history


def test_history_holds_the_mean_over_images_of_what_the_steps_returned(gan, here, monkeypatch):
    monkeypatch.setattr(main_gan.Trainer, "step", lambda _, real: {"size": torch.tensor(len(real))})
    trainer = gan(num_epochs=1, batch_size=1000)  # batches of 1000, 1000, 1000, 1000 and 500
    row = trainer.run.history[0]
    assert list(row) == ["epoch", "data", "size", "diversity"]
    assert row["size"] == pytest.approx((4 * 1000**2 + 500**2) / 4500)
    assert read_history("out") == [{column: str(value) for column, value in row.items()}]


@pytest.mark.parametrize("in_mid_epoch", [False, True])
def test_a_history_keeps_its_rows_when_a_column_is_added(in_mid_epoch, gan, here, monkeypatch):
    """A reader adds a scalar to the step and another to the epoch, and runs the command again."""
    if in_mid_epoch:

        def stop():
            os.kill(os.getpid(), 2)

        with helpers.after_optimiser_steps(22, stop), pytest.raises(KeyboardInterrupt):
            gan(num_epochs=2)  # in step 2 of epoch 2
    else:
        gan(num_epochs=1)
    first = read_history("out")
    assert len(first) == 1 and "real mean" not in first[0]
    # a kill after the checkpoint was written leaves the table a row behind: it is made again
    before = (here / "out" / "history.csv").read_bytes()
    (here / "out" / "history.csv").unlink()
    gan(num_epochs=1)
    assert (here / "out" / "history.csv").read_bytes() == before
    step, end_epoch = main_gan.Trainer.step, training.Run.end_epoch
    seen = []

    def step_with_more(trainer, real):
        seen.append(real.mean().item())
        return {**step(trainer, real), "real mean": real.mean()}

    def end_with_more(run, measured):
        return end_epoch(run, {**measured, "answer": 42.0 + run.epoch})

    monkeypatch.setattr(main_gan.Trainer, "step", step_with_more)
    monkeypatch.setattr(training.Run, "end_epoch", end_with_more)
    history = gan(num_epochs=3).run.history
    rows = read_history("out")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {column: rows[0][column] for column in first[0]} == first[0]
    assert [row["real mean"] == "" for row in rows] == [True, False, False]
    assert [row["answer"] for row in rows] == ["", "44.0", "45.0"]
    count = 7 if in_mid_epoch else 9  # of the steps that measured it
    assert len(seen) == count + 9
    assert history[1]["real mean"] == pytest.approx(np.mean(seen[:count]), rel=1e-4)
    monkeypatch.setattr(main_gan.Trainer, "step", step)
    monkeypatch.setattr(training.Run, "end_epoch", end_epoch)
    whole = gan(num_epochs=3, output_dir="whole").run.history
    for row, expected in zip(history, whole):
        # the epoch that was interrupted is measured from there on
        if row["epoch"] != 2 or not in_mid_epoch:
            assert {column: row[column] for column in expected} == expected
    # and a column that goes leaves its rows as well
    rows = gan(num_epochs=4) and read_history("out")
    assert [row["answer"] for row in rows] == ["", "44.0", "45.0", ""]


@pytest.mark.parametrize("key, value", [("generator_lr", np.float64(1e-3)), ("data_dir", Path())])
def test_what_could_be_saved_but_never_loaded_again_is_refused(key, value, gan, here):
    with pytest.raises(common.BadInput, match=f"{key} must be a plain number, bool or str"):
        gan(num_epochs=1, **{key: value})
    assert not (here / "out").exists()


def test_another_network_than_the_checkpoint_s_is_refused_in_one_line(gan, here, monkeypatch):
    gan(num_epochs=1)
    before = (here / "out" / "checkpoint.pt").read_bytes()

    class Edited(main_gan.Generator):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.more = torch.nn.Linear(2, 2)

    with monkeypatch.context() as patch:
        patch.setattr(main_gan, "Generator", Edited)
        with pytest.raises(
            common.BadInput, match="another generator than the script has"
        ) as caught:
            gan(num_epochs=2)
    assert "--resume false" in str(caught.value) and "\n" not in str(caught.value)
    assert (here / "out" / "checkpoint.pt").read_bytes() == before


def test_a_measured_value_may_be_of_torch_or_numpy(gan, here, monkeypatch, capsys):
    end_epoch = training.Run.end_epoch
    more = {"rate": torch.tensor(0.0002), "largest": np.float32(3), "count": 71234}
    monkeypatch.setattr(training.Run, "end_epoch", lambda run, row: end_epoch(run, row | more))
    for number in (1, 2):  # continued, too
        row = gan(num_epochs=number).run.history[-1]
        assert [row["rate"], row["largest"], row["count"]] == [pytest.approx(0.0002), 3.0, 71234]
    assert [row["count"] for row in read_history("out")] == ["71234", "71234"]
    assert capsys.readouterr().out.count("rate 0.0002  largest 3  count 71234  ") == 2


def test_a_scalar_that_cannot_be_kept_is_named(gan, here, monkeypatch):
    monkeypatch.setattr(main_gan.Trainer, "step", lambda _, real: {"size": len(real)})
    with pytest.raises(
        TypeError, match=r"'size': `step` must return tensors of shape \(\), not 500"
    ):
        gan(num_epochs=1)
    monkeypatch.setattr(main_gan.Trainer, "step", lambda _, real: {"pixels": real[0]})
    with pytest.raises(TypeError, match="'pixels': `step` must return tensors of shape"):
        gan(num_epochs=1)
    names = iter(["loss", "loss", "penalty"])
    monkeypatch.setattr(main_gan.Trainer, "step", lambda _, real: {next(names): real.mean()})
    with pytest.raises(TypeError, match="the same columns at each step"):
        gan(num_epochs=1)
    monkeypatch.setattr(main_gan.Trainer, "step", lambda _, real: {"diversity": real.mean()})
    with pytest.raises(common.BadInput, match="diversity: `step` and end_epoch may not"):
        gan(num_epochs=1)


@pytest.mark.parametrize("change", ["loss", "weights", "weights, stopped"])
def test_what_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(
    change, gan, here, monkeypatch
):
    gan(num_epochs=1)
    good = (here / "out" / "checkpoint.pt").read_bytes()
    step = main_gan.Trainer.step
    calls = []

    def broken(trainer, real):
        values = step(trainer, real)
        calls.append(1)
        if change == "loss" and len(calls) >= 3:
            values["generator loss"] = values["generator loss"] * float("nan")
        # the last step of the epoch, or before Ctrl-C: no loss will tell
        if (change, len(calls)) in (("weights", 9), ("weights, stopped", 4)):
            trainer.generator.model[0].weight.data[0, 0] = float("inf")
        if (change, len(calls)) == ("weights, stopped", 4):
            trainer.run.on_signal(signal.SIGINT, None)
        return values

    monkeypatch.setattr(main_gan.Trainer, "step", broken)
    words = {
        "loss": "generator loss became nan at epoch 2, step 3",
        "weights": "no longer finite after epoch 2, step 9",
        "weights, stopped": "no longer finite after epoch 2, step 4",
    }
    with pytest.raises(common.BrokenOff, match=f"{words[change]}.*still holds epoch 1"):
        gan(num_epochs=3)
    assert (here / "out" / "checkpoint.pt").read_bytes() == good


@pytest.mark.parametrize("seconds, steps", [(0, 3), (1, 3), (2, 6)])
def test_losses_are_looked_at_once_a_second(seconds, steps, gan, monkeypatch):
    """A run whose third step is not finite does not train to the end of a long epoch.

    A step takes 0.4 s by this clock. So a look every second is one after every third step, and
    a look every two seconds one after every sixth.
    """
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(training, "LOOK_SECONDS", seconds)
    calls = []

    def step(trainer, real):
        calls.append(1)
        clock[0] += 0.4
        return {"loss": torch.tensor(math.nan if len(calls) >= 3 else 1.0)}

    monkeypatch.setattr(main_gan.Trainer, "step", step)
    with pytest.raises(common.BrokenOff, match="loss became nan at epoch 1, step 3; no epoch"):
        gan(num_epochs=1, batch_size=50)  # of 90 steps
    assert len(calls) == steps


def test_the_default_is_a_look_a_second():
    assert training.LOOK_SECONDS == 1


@pytest.mark.parametrize(
    "error, words",
    [
        (common.BrokenOff("the loss became nan"), "the loss became nan"),
        (OSError("could not write a.pt: no space"), "could not write a.pt: no space"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "out of memory; give a smaller --batch_size",
        ),
    ],
)
def test_a_run_that_breaks_off_says_so_in_one_line(error, words, monkeypatch, capsys, tmp_path):
    def step(trainer, real):
        raise error

    monkeypatch.setattr(main_gan.Trainer, "step", step)
    options = ["--dataset_type", "digits", "--num_epochs", "1", "--device", "cpu"]
    options += ["--output_dir", str(tmp_path)]  # mnist_GAN/ may hold a run of the user's
    assert helpers.run_here(main_gan, *options) == 1
    assert capsys.readouterr().err == f"main_gan.py: {words}\n"


@pytest.mark.parametrize("numbers, full", [(2**55, True), (-1, False)])
def test_a_full_memory_is_told_in_one_line_on_a_cpu_too(
    numbers, full, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(main_gan.Trainer, "step", lambda trainer, real: torch.empty(numbers))
    options = ["--dataset_type", "digits", "--num_epochs", "1", "--device", "cpu"]
    options += ["--output_dir", str(tmp_path)]
    if full:
        assert helpers.run_here(main_gan, *options) == 1
        told = "main_gan.py: out of memory; give a smaller --batch_size\n"
        assert capsys.readouterr().err == told
    else:  # a mistake in the script keeps its traceback
        with pytest.raises(RuntimeError, match="negative dimension"):
            helpers.run_here(main_gan, *options)


# ------------------------------------------------------------------------------- files


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_failed_write_keeps_the_old_file_and_says_so(tmp_path):
    common.write(tmp_path / "tidied" / "away" / "b", b"new")
    assert files(tmp_path / "tidied" / "away") == {"b": b"new"}
    common.write(tmp_path / "full" / "a", b"old")
    os.symlink("/dev/full", tmp_path / "full" / "a.part")
    with pytest.raises(OSError, match="full/a: No space left on device; the old file is untouched"):
        common.write(tmp_path / "full" / "a", b"new")
    assert (tmp_path / "full" / "a").read_bytes() == b"old"
    common.write(tmp_path / "full" / "a", b"new")
    assert files(tmp_path / "full") == {"a": b"new"}


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RANK", 1)
    common.write(tmp_path / "a", b"new")
    assert not list(tmp_path.iterdir())


def test_a_table_has_a_column_for_everything_that_a_row_holds(tmp_path):
    common.write(tmp_path / "table.csv", [{"a": 1, "b, c": "x"}, {"a": 2, "d": 0.5}])
    assert (tmp_path / "table.csv").read_bytes() == b'a,"b, c",d\n1,x,\n2,,0.5\n'


def test_weights_are_found_and_opened_by_the_script_that_wrote_them(here, monkeypatch):
    written = [
        ("c/weights_epoch_1.pt", "main_gan", "generator"),
        ("experiment/b/weights_epoch_1.pt", "main_vae", "encoder"),
        ("a/weights_best.pt", "gan_cub", "generator"),
        ("d/weights_epoch_1.pt", "stranger", "other"),
    ]
    for age, (path, script, part) in enumerate(written):
        contents = {"script": script, "dataset_kwargs": {}, part: {}}
        common.save_tensors(path, contents)
        os.utime(path, (0, age))
    (here / "e").mkdir()
    (here / "e" / "weights_epoch_2.pt").write_bytes(b"damaged")
    (here / "stranger.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(here)
    assert common.newest_weights("generator") == "a/weights_best.pt"
    assert common.newest_weights("encoder") == "experiment/b/weights_epoch_1.pt"
    weights = common.load_weights("c/weights_epoch_1.pt", None, "generator")
    assert common.script_of(weights) is main_gan
    weights = common.load_weights("experiment/b/weights_epoch_1.pt", "main_vae", "encoder")
    assert common.script_of(weights) is main_vae
    stranger = common.load_weights("d/weights_epoch_1.pt", None, "other")
    with pytest.raises(common.BadInput, match="stranger.py, which is no script of this"):
        common.script_of(stranger)
    with pytest.raises(common.BadInput, match="written by main_gan.py, not by main_vae.py"):
        common.load_weights("c/weights_epoch_1.pt", "main_vae", "generator")


# ---------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("low, levels", [(-1.0, [64, 128, 191, 255]), (0.0, [0, 0, 128, 255])])
def test_grid_is_on_a_fixed_scale(low, levels, tmp_path):
    images = torch.stack([torch.full((1, 4, 4), value) for value in (-0.5, 0.0, 0.5, 3.0)])
    common.save_grid(images, tmp_path / "grid.png", columns=3, low=low)
    pixels = helpers.read_png(tmp_path / "grid.png")
    assert pixels.shape[0] * 20 == pixels.shape[1] * 14  # two rows of three, with margins
    tiles = helpers.tiles(tmp_path / "grid.png", 4, 3, 4)
    assert [tile.mean() for tile in tiles] == levels
    assert [tile.std() for tile in tiles] == [0] * 4


def test_grid_is_red_green_and_blue_in_this_order_and_not_turned(tmp_path):
    image = torch.full((2, 3, 6, 6), -1.0)
    image[0, 0, 0, :] = 1  # the top row is red
    image[0, 1, :, 5] = 1  # the last column is green, or with red yellow
    image[0, 2, 5, 0] = 1  # one corner is blue
    common.save_grid(image, tmp_path / "grid.png", columns=2)
    tile = helpers.tiles(tmp_path / "grid.png", 6, 2, 1)[0]
    assert tile[0, 2].tolist() == [255, 0, 0] and tile[3, 5].tolist() == [0, 255, 0]
    assert tile[5, 0].tolist() == [0, 0, 255] and tile[0, 5].tolist() == [255, 255, 0]
    assert tile[2, 2].tolist() == [0, 0, 0]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written."""
    figures = []
    monkeypatch.setattr(common, "write", lambda path, content: figures.append(content))
    return figures


def test_curves_show_the_columns_that_they_are_named_after(drawn, tmp_path):
    history = [
        {"epoch": 1, "data": "digits", "loss": 3.0, "test loss": 4.0},
        {"epoch": 2, "data": "digits", "loss": 2.0, "score": 7.0},
        {"epoch": 3, "data": "digits", "loss": 1.0, "test loss": 3.5, "score": math.nan},
    ]
    panels = {"nats": ["loss", "test loss"], "distance": ["score"]}
    common.save_curves(history, panels, "a title", tmp_path / "x.png")
    nats, distance = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in nats.lines}
    assert lines["loss"] == [[1, 3], [2, 2], [3, 1]]
    assert lines["test loss"] == [[1, 4], [3, 3.5]]
    assert [line.get_linestyle() for line in nats.lines] == ["-", "--"]
    assert distance.lines[0].get_xydata().tolist() == [[2, 7]]
    assert (nats.get_ylabel(), distance.get_ylabel()) == ("nats", "distance")
    assert nats.get_xlabel() == "epoch" and drawn[0].get_suptitle() == "a title"
    assert [text.get_text() for text in nats.get_legend().get_texts()] == ["loss", "test loss"]


@pytest.mark.parametrize(
    "values, scale",
    [
        ([2000.0, 70.0], "log"),
        ([90.0, 5.0], "linear"),
        ([2000.0, 0.0], "linear"),
        ([math.nan, math.nan], "linear"),
    ],
)
def test_curves_over_a_wide_range_are_logarithmic(values, scale, drawn, tmp_path):
    history = [{"epoch": number, "KL": value} for number, value in enumerate(values, start=1)]
    common.save_curves(history, {"KL": ["KL"]}, "title", tmp_path / "x.png")
    assert drawn[0].axes[0].get_yscale() == scale


def test_figures_do_not_pile_up_in_memory(tmp_path):
    from matplotlib.figure import Figure

    def alive():
        return sum(type(thing) is Figure for thing in gc.get_objects())

    gc.collect()
    before = alive()
    gc.disable()  # what Python does on its own comes too late for pictures
    try:
        for number in range(3):
            figure = common.new_figure(1, 1)
            common.write(tmp_path / f"{number}.png", figure)
        assert alive() - before <= 1
    finally:
        gc.enable()
    assert (tmp_path / "2.png").read_bytes().startswith(b"\x89PNG")


def test_the_comparison_of_contents_sees_a_difference():
    """Of the helper that other tests lean on."""
    one = {"a": [torch.zeros(2), 1], "b": {"c": (1.5, "x")}}
    assert not differences(one, {"a": [torch.zeros(2), 1], "b": {"c": (1.5, "x")}})
    others = [
        {"a": [torch.tensor([0.0, 1e-9]), 1], "b": {"c": (1.5, "x")}},
        {"a": [torch.zeros(2)], "b": {"c": (1.5, "x")}},
        {"a": [torch.zeros(2), 1]},
        {"a": [torch.zeros(2), 1], "b": {"c": (1.5, "y")}},
    ]
    found = [differences(one, other)[0].partition(":")[0] for other in others]
    assert found == ["contents.a[0]", "contents.a", "contents", "contents.b.c[1]"]


def test_the_ticks_of_a_logarithmic_axis_are_plain_numbers(monkeypatch):
    figures = []
    monkeypatch.setattr(common, "write", lambda path, figure: figures.append(figure))
    history = [{"epoch": 1, "loss": 6.0}, {"epoch": 2, "loss": 0.2}]
    common.save_curves(history, {"loss (nats)": ["loss"]}, "two epochs", "curves.png")
    (axes,) = figures[0].axes
    figures[0].canvas.draw()
    assert axes.get_yscale() == "log"
    shown = [label.get_text() for label in axes.get_yticklabels(which="both")]
    assert {"0.5", "1", "2", "5"} <= set(shown)
    assert "".join(shown).replace(".", "").isdigit()
