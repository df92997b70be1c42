"""The weights that come with the collection: as described, small, and found by whoever has none."""

import hashlib
import runpy
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_here, small_dicts

import common
import fid
import latent_space_interpolation
import latent_space_vae
import main_gan

FOLDER = ROOT / "weights"
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
# a row is: file, command, what it was trained on, what came out, spread, SHA-256
ROWS = [
    [cell.strip(" `") for cell in line.split("|")[1:-1]]
    for line in TEXT.splitlines()
    if line.startswith("| `")
]


def test_every_file_has_a_row_and_together_they_are_small():
    files = sorted(FOLDER.glob("*.pt"))
    assert [path.name for path in files] == sorted(row[0] for row in ROWS)
    assert sum(path.stat().st_size for path in files) < 10e6


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_file_draws_what_its_row_says(row):
    path = FOLDER / row[0]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == row[-1]
    weights = common.load_weights(path, None, "model_kwargs")
    assert row[1].startswith(f"python {weights['script']}.py")
    samples = fid.of_weights(str(path), 500, 0, torch.device("cpu")).images
    assert list(samples.pixels.shape) == [500, *weights["data"]["shape"]]
    spread = fid.mean_distance(samples.pixels / 255)
    assert spread == pytest.approx(float(row[-2]), rel=0.05)


@pytest.mark.parametrize("script", [latent_space_interpolation, latent_space_vae])
def test_without_own_weights_those_of_the_collection_are_taken(
    script, tmp_path, monkeypatch, capsys
):
    """Where MNIST is not there either, its bundled digits are looked at, and it is said."""

    def no_network(name, data_dir):
        raise OSError("no network in this test")

    monkeypatch.setattr(common, "load_torchvision", no_network)
    monkeypatch.chdir(tmp_path)
    assert run_here(script, "--device", "cpu") == 0
    told_out, told = capsys.readouterr()
    assert "was trained here: taking the collection's own weights" in told and "NOT MNIST" in told
    # what is shown is no MNIST, and every result says so
    digits = "digits (bundled, in place of mnist)"
    assert f"trained on mnist; images of {digits}" in told_out
    for table in Path("shipped_VAE").glob("l*.csv"):
        assert digits in table.read_text(encoding="utf-8")
    assert {path.suffix for path in Path("shipped_VAE").iterdir()} >= {".pt", ".png", ".csv"}


def test_a_title_tells_other_images_from_those_of_training():
    pixels, labels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2).long()
    digits = common.Images(pixels, labels, ["0"], "digits", "digits", "data")
    data = {"name": "digits (bundled, in place of mnist)", "dataset_type": "digits"}
    weights = {"script": "main_vae", "data": data}
    assert common.describe_source(weights, digits) == f"main_vae on {data['name']}"
    weights["data"] = {"name": "mnist", "dataset_type": "mnist"}
    told = "main_vae, trained on mnist; images of digits"
    assert common.describe_source(weights, digits) == told
    weights["data"] = {"name": "folder a", "dataset_type": "folder"}
    other = common.Images(pixels, labels, ["0"], "folder b", "folder", "b")
    assert "trained on folder a; images of folder b" in common.describe_source(weights, other)


def test_own_weights_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common.save_tensors(
        "a/weights_1.pt", {"script": "main_gan", "dataset_kwargs": {}, "model_kwargs": {}}
    )
    assert common.newest_weights() == str(Path("a/weights_1.pt"))
    assert common.newest_weights("encoder") == "shipped_VAE/weights_main_vae.pt"
    # the copy is newer now, but was not trained here
    assert common.newest_weights() == str(Path("a/weights_1.pt"))


def test_packing_halves_the_size_and_keeps_the_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = dict(dataset_type="digits", batch_size=500, num_epochs=1, image_size=784)
    main_gan.main(*small_dicts(main_gan, **digits, generator_hidden_size=64))
    pack = ROOT / "weights" / "pack.py"
    monkeypatch.setattr("sys.argv", [str(pack), "out/weights_epoch_1.pt", "packed.pt"])
    runpy.run_path(str(pack), run_name="__main__")
    whole, half = Path("out/weights_epoch_1.pt"), Path("packed.pt")
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    z = torch.randn(9, 64)
    with torch.no_grad():
        difference = main_gan.load_generator(whole)(z) - main_gan.load_generator(half)(z)
    assert difference.abs().max() < 0.01
