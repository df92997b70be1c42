import errno
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

import common
import gan_cub
import main_ae
import main_cgan
import main_dcgan
import main_gan
import main_vae

SCRIPTS = [main_gan, main_dcgan]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("script", [main_vae, main_ae, gan_cub, main_cgan])
def test_a_seed_that_numpy_cannot_take_is_refused_everywhere(script, command_line, tmp_path):
    status, error = command_line(script, "--seed", 2**32, "--output_dir", tmp_path / "out")
    assert status == 2 and "seed is 4294967296; legal: in [0, 4294967295]" in error and error.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("options, words", [
    (["--num_epoch", "5"], "did you mean --num_epochs"),
    (["--num_epochs", "many"], "int"),
    (["--num_epochs", "-1"], ">= 0"),
    (["--generator_lr", "nan"], "> 0"),
    (["--generator_lr", "inf"], "> 0"),
    (["--shuffle", "perhaps"], "boolean"),
    (["--dataset_type", "imagenet"], "mnist | cifar10"),
    (["--image_size", "20"], "legal: "),
    (["--batch_size", "0"], ">= 1"),
    (["--seed", str(2**32)], "in [0, 4294967295]"),
    (["--batch_size", "4501"], "larger than the 4500 training images"),
    (["--device", "cuda:77"], "cannot be used here"),
    (["--dataset_type", "folder", "--data_dir", "no/such"], "there is no folder no/such"),
    (["--dataset_type", "folder", "--data_dir", "tests"], "holds 0 images"),
    (["--output_dir", "README.md"], "cannot be written"),
    (["--output_dir", "README.md/inside"], "cannot be written"),
])
def test_bad_input_is_one_line_and_status_2(script, options, words, command_line, tmp_path):
    base = ["--dataset_type", "digits", "--num_epochs", "1"]
    if "--output_dir" not in options:
        base += ["--output_dir", tmp_path / "out"]
    status, error = command_line(script, *base, *options)
    assert status == 2 and words in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out/*")), "nothing is written"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def test_damaged_foreign_and_dangerous_checkpoints_are_refused(command_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    whole = {"script": "main_gan", "settings": {}}
    torch.save(whole, tmp_path / "whole.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "stranger.pt")
    torch.save({"script": "main_gan", "bomb": Bomb()}, tmp_path / "bomb.pt")
    for content, words in [(b"these are words", "is damaged"),
                           (b"", "is damaged"),
                           ((tmp_path / "whole.pt").read_bytes()[:-100], "is damaged"),
                           ((tmp_path / "stranger.pt").read_bytes(), "not written by this collection"),
                           ((tmp_path / "bomb.pt").read_bytes(), "holds code"),
                           (pickle.dumps(Bomb(), protocol=2), "holds code"),
                           (pickle.dumps(Bomb(), protocol=4), "is damaged"),
                           ((tmp_path / "whole.pt").read_bytes(), "written by main_gan.py, not by main_dcgan.py")]:
        checkpoint.write_bytes(content)
        status, error = command_line(main_dcgan, "--dataset_type", "digits", "--output_dir", "out")
        assert status == 2 and words in error and error.count("\n") == 1
        assert checkpoint.read_bytes() == content and not (tmp_path / "bomb").exists()


def test_help_lists_every_key_with_default_and_comment(command_line, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["main_gan.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        common.run(main_gan.main, main_gan.model_kwargs, main_gan.dataset_kwargs, main_gan.trainer_kwargs)
    text = " ".join(capsys.readouterr().out.split())
    described = common.describe(main_gan.__file__)
    keys = [*main_gan.model_kwargs, *main_gan.dataset_kwargs, *main_gan.trainer_kwargs]
    assert stop.value.code == 0 and keys == list(described)
    for key, (default, comment) in described.items():
        assert f"--{key}" in text and f"{comment} (default: {default})" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_key_has_a_comment_and_no_signature_a_default(script):
    described = common.describe(script.__file__)
    for kwargs in (script.model_kwargs, script.dataset_kwargs, script.trainer_kwargs):
        assert all(described[key] == (value, described[key][1]) and described[key][1] for key, value in kwargs.items())
    for function in (script.main, script.Trainer.__init__, script.Generator.__init__, script.Discriminator.__init__):
        assert not function.__defaults__ and not function.__kwdefaults__


def test_misspelt_key_in_a_dict_is_an_error(tiny):
    model, data, trainer = tiny(main_gan)
    for kwargs in (data, trainer):
        with pytest.raises(TypeError, match="learning_rat"):
            main_gan.main(model, {**data, **({"learning_rat": 1} if kwargs is data else {})},
                          {**trainer, **({"learning_rat": 1} if kwargs is trainer else {})})


def test_command_line_reaches_the_dicts_and_leaves_the_defaults_alone(monkeypatch):
    seen, trainer_kwargs = [], {"num_epochs": 3, "resume": True, "generator_lr": 1e-4}
    monkeypatch.setattr("sys.argv", ["x.py", "--num_epochs", "7", "--resume", "false", "--generator_lr", "1"])
    common.run(lambda kwargs: seen.append(kwargs), trainer_kwargs)
    assert seen == [{"num_epochs": 7, "resume": False, "generator_lr": 1.0}]
    assert trainer_kwargs["num_epochs"] == 3


def test_same_seed_same_bytes_and_another_seed_others(tiny, tmp_path, monkeypatch):
    results = []
    for number, seed in enumerate((3, 3, 4)):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))  # the folder's name is among the settings that are saved
        main_gan.main(*tiny(main_gan, seed=seed, output_dir="out", data_dir="data"))
        results.append(files(tmp_path / str(number) / "out"))
    assert len(results[0]) == 8 and results[0] == results[1]
    assert results[0]["weights_epoch_2.pt"] != results[2]["weights_epoch_2.pt"]


def test_changed_settings_are_refused_with_the_difference_and_epochs_may_grow(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    main_gan.main(*tiny(main_gan, num_epochs=1))
    before = files(tmp_path / "out")
    with pytest.raises(common.BadInput, match="batch_size was 50, is 60; seed was 0, is 1.*--resume false"):
        main_gan.main(*tiny(main_gan, batch_size=60, seed=1))
    assert files(tmp_path / "out") == before
    assert main_gan.main(*tiny(main_gan, num_epochs=3)).run.history["epoch"] == [1, 2, 3]
    # how it is computed may change, what is computed not
    assert main_gan.main(*tiny(main_gan, num_epochs=4, num_threads=2, sample_every=1)).run.start == 0
    assert (tmp_path / "out" / "weights_epoch_4.pt").is_file()


def test_other_data_than_before_are_refused(tiny, monkeypatch):
    import datasets

    def offline(*_):
        raise OSError("offline")

    monkeypatch.setattr(datasets, "_torchvision", offline)
    main_gan.main(*tiny(main_gan, dataset_type="mnist", num_epochs=1))
    monkeypatch.setattr(datasets, "_torchvision", lambda *_: datasets._digits(1, 10))
    with pytest.raises(common.BadInput, match="data was 'digits .bundled, in place of mnist.', is 'mnist'"):
        main_gan.main(*tiny(main_gan, dataset_type="mnist", num_epochs=2))
    (train, test), names = datasets._digits(1, 10)
    monkeypatch.setattr(datasets, "_digits", lambda *_: ([[part[:-1] for part in train], test], names))
    monkeypatch.setattr(datasets, "_torchvision", offline)
    with pytest.raises(common.BadInput, match="images was 4500, is 4499"):
        main_gan.main(*tiny(main_gan, dataset_type="mnist", num_epochs=2))


def test_resume_false_starts_over_and_keeps_the_old_checkpoint(tiny, tmp_path):
    main_gan.main(*tiny(main_gan, num_epochs=2))
    old = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    assert main_gan.main(*tiny(main_gan, num_epochs=1, resume=False)).run.history["epoch"] == [1]
    assert (tmp_path / "out" / "checkpoint_before_1.pt").read_bytes() == old
    new = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    main_gan.main(*tiny(main_gan, num_epochs=0, resume=False))
    with pytest.raises(common.BadInput):
        main_gan.main(*tiny(main_gan, resume=False, image_size=20))
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == new, "a refused start moves nothing, nor a mere check"
    main_gan.main(*tiny(main_gan, num_epochs=1, resume=False))
    assert (tmp_path / "out" / "checkpoint_before_1.pt").read_bytes() == old
    assert (tmp_path / "out" / "checkpoint_before_2.pt").read_bytes() == new


@pytest.mark.parametrize("change", ["loss", "weights"])
def test_non_finite_loss_stops_and_leaves_the_last_good_checkpoint(change, tiny, tmp_path, monkeypatch):
    main_gan.main(*tiny(main_gan, num_epochs=1))
    good = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    step, count = main_gan.Trainer.step, iter(range(1000))

    def broken(trainer, real):
        values, number = step(trainer, real), next(count)
        if change == "loss" and number >= 6:
            values["generator loss"] = values["generator loss"] * float("nan")
        if change == "weights" and number == 89:  # the last of the epoch: no loss will tell
            trainer.generator.model[0].weight.data[0, 0] = float("inf")
        return values

    monkeypatch.setattr(main_gan.Trainer, "step", broken)
    words = {"loss": "generator loss became nan at epoch 2, step 7",
             "weights": "no longer finite after epoch 2"}[change]
    with pytest.raises(FloatingPointError, match=f"{words}.*still holds epoch 1"):
        main_gan.main(*tiny(main_gan, num_epochs=3))
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == good


def test_failed_write_keeps_the_old_file_and_says_so(tmp_path, monkeypatch):
    common.write(tmp_path / "tidied" / "away" / "b", b"new")
    assert files(tmp_path / "tidied" / "away") == {"b": b"new"}
    tmp_path = tmp_path / "full"
    common.write(tmp_path / "a", b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        common.write(tmp_path / "a", b"new")
    assert files(tmp_path) == {"a": b"old"}


def test_full_disk_is_said_before_training(tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
    # 283,920 + 267,009 weights of 4 bytes, as weights and two moments and a little more, in two files: 8 times
    with pytest.raises(common.BadInput, match="1 MiB free; checkpoints need 17 MiB"):
        main_gan.main(*tiny(main_gan))


def test_history_holds_the_mean_over_images_of_what_was_logged(tiny, tmp_path):
    trainer = main_gan.main(*tiny(main_gan, num_epochs=0, batch_size=1000))  # batches of 1000, 1000, 1000, 1000, 500
    run = trainer.run
    for _ in run.epochs(trainer.train, {"g": trainer.generator, "o": trainer.generator_optimizer}):
        pass  # num_epochs is 0
    run.num_epochs = 1
    for _ in run.epochs(trainer.train, {"g": trainer.generator, "o": trainer.generator_optimizer}):
        sizes = []
        for images, _ in run.batches():
            run.log({"size": torch.tensor(float(len(images)))})
            sizes.append(len(images))
        run.end_epoch(own_number=2.5)
    assert sizes == [1000] * 4 + [500]
    assert run.history == {"epoch": [1], "data": ["digits"], "size": [(4 * 1000**2 + 500**2) / 4500],
                           "own number": [2.5]}
    assert (tmp_path / "out" / "history.csv").read_text().splitlines()[0] == "epoch,data,size,own number"


def test_grid_is_on_a_fixed_scale(tmp_path):
    from PIL import Image

    images = torch.stack([torch.full((1, 4, 4), value) for value in (-0.5, 0.0, 0.5, 3.0)])
    common.save_grid(images, tmp_path / "grid.png", columns=3)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    zoom = pixels.shape[1] // 20
    assert pixels.shape == (14 * zoom, 20 * zoom)
    centres = [pixels[y * zoom, x * zoom] for y, x in ((4, 4), (4, 10), (4, 16), (10, 4))]
    assert centres == [64, 128, 191, 255]


@pytest.mark.parametrize("values, scale", [([2000.0, 70.0], "log"), ([90.0, 5.0], "linear"), ([2000.0, 0.0], "linear"),
                                           ([math.nan, math.nan], "linear")])
def test_curves_over_a_wide_range_are_logarithmic(values, scale, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure.axes[0].get_yscale()))
    common.save_curves({"epoch": [1, 2], "KL": values}, {"KL": ["KL"]}, "title", tmp_path / "x.png")
    assert drawn == [scale]


def test_mean_distance_is_that_of_all_pairs():
    images = torch.randn(6, 3, 4, 4)
    pairs = [(images[i] - images[j]).square().sum().sqrt().item() for i in range(6) for j in range(i)]
    assert abs(common.mean_distance(images) - np.mean(pairs)) < 1e-5
    assert common.mean_distance(images[:1].expand(5, -1, -1, -1)) == 0


@pytest.mark.parametrize("features, fast", [({"avx512_bf16": True, "avx2": True}, True), ({"amx_bf16": True}, True),
                                            ({"avx512_bf16": False, "avx512_f": True}, False), ({}, False)])
def test_auto_takes_bfloat16_where_the_processor_has_it(features, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    cpu = torch.device("cpu")
    assert common.set_precision("auto", cpu) == fast
    assert common.set_precision("bfloat16", cpu) and not common.set_precision("float32", cpu)
    assert not common.set_precision("auto", torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not common.set_precision("auto", torch.device("cuda"))
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not common.set_precision("auto", cpu), "a torch that cannot tell"


def test_tf32_is_a_faster_float32_of_gpus_and_lasts_for_one_run():
    assert not common.set_precision("tf32", torch.device("cpu"))  # not bfloat16
    assert torch.get_float32_matmul_precision() == "high"
    common.set_precision("auto", torch.device("mps"))
    assert torch.get_float32_matmul_precision() == "highest"


def test_one_seed_covers_torch_numpy_and_python():
    import random

    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    common.seed_everything(5)
    first = draw()
    common.seed_everything(5)
    assert draw() == first


def test_weights_are_opened_by_the_script_that_wrote_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.BadInput, match="no folder here holds .* with an encoder and a decoder; .* main_vae.py"):
        common.open_weights("", "load_model")
    written = [("c", "main_gan"), ("b", "main_vae"), ("a", "main_gan"), ("d", "stranger")]
    for age, (folder, script) in enumerate(written):
        common.save(tmp_path / folder / "weights_epoch_1.pt", {"script": script, "model_kwargs": {"age": age}})
        os.utime(tmp_path / folder / "weights_epoch_1.pt", (0, age))
    os.renames("b/weights_epoch_1.pt", "experiment/b/weights_epoch_1.pt")
    os.rename("a/weights_epoch_1.pt", "a/weights_best.pt")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "weights_epoch_2.pt").write_bytes(b"damaged")
    (tmp_path / "stranger.py").write_text("load_generator = 1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    # the newest that fits, and the first function asked for that its script has
    path, contents, load = common.open_weights("", "load_generator")
    assert path == "a/weights_best.pt" and contents["model_kwargs"]["age"] == 2 and load is main_gan.load_generator
    assert common.open_weights("", "load_model")[0] == "experiment/b/weights_epoch_1.pt"
    assert common.open_weights("c/weights_epoch_1.pt", "load_model", "load_generator")[2] is main_gan.load_generator
    for folder, words in (("a", "main_gan.py is no script .* an encoder and a decoder; .*: python main_vae.py"),
                          ("d", "stranger.py is no script of this collection")):
        with pytest.raises(common.BadInput, match=words):
            common.open_weights(str(next((tmp_path / folder).iterdir())), "load_model")
