import socket
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import common
import datasets


def load(dataset_type="digits", data_dir="nowhere", **overrides):
    settings = dict(dataset_type=dataset_type, data_dir=str(data_dir), allow_fallback=True, batch_size=2, shuffle=True,
                    image_size=28, channels=1, device="cpu")
    return datasets.load_data(**{**settings, **overrides})


def test_bundled_digits_are_split_and_stratified():
    train, test = load()
    assert train.pixels.shape == (4500, 1, 28, 28) and test.pixels.shape == (500, 1, 28, 28)
    assert train.pixels.dtype == torch.uint8 and train.pixels.max() == 255
    assert train.labels.bincount().tolist() == [450] * 10 and test.labels.bincount().tolist() == [50] * 10
    known = {image.numpy().tobytes() for image in train.pixels}
    assert not any(image.numpy().tobytes() in known for image in test.pixels)


def test_coloured_digits_are_the_same_every_time_and_never_lose_the_digit():
    train, test = load(channels=3, image_size=32, num_classes=5)
    again, _ = load(channels=3, image_size=32, num_classes=5)
    grey, _ = load(image_size=32)
    assert train.pixels.shape == (4500, 3, 32, 32) and torch.equal(train.pixels, again.pixels)
    assert train.labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert train.class_names == ["0 or 5", "1 or 6", "2 or 7", "3 or 8", "4 or 9"]
    full = (grey.pixels == 255).flatten(1).any(1).nonzero().squeeze(1)[:50]  # not every digit has full ink
    for colour, image in zip(train.pixels[full].int(), grey.pixels[full, 0]):
        ground, ink = colour[:, image == 0].T.unique(dim=0), colour[:, image == 255].T.unique(dim=0)
        assert len(ground) == 1 and len(ink) == 1 and (ground - ink).abs().min() >= 88  # 0.35 of 255, less rounding


def test_a_class_that_is_left_out_is_gone_and_named():
    train, whole = load()[0], load()[0]
    train.leave_out(4)
    assert train.name == "digits without 4" and train.pixels.equal(whole.pixels[whole.labels != 4])
    assert train.labels.equal(whole.labels[whole.labels != 4]) and len(train) == 4050
    assert torch.cat(train.order(0, 1)).max() == 4049
    for label in (4, 10):  # gone already, never there
        with pytest.raises(common.BadInput, match=f"digits without 4 has no images of label {label} beside others"):
            train.leave_out(label)
    train.pixels, train.labels = train.pixels[:1], train.labels[:1]
    with pytest.raises(common.BadInput, match="beside others"):
        train.leave_out(train.labels.item())


def test_what_an_encoder_was_trained_on_is_found_again(tmp_path, monkeypatch):
    def again(data, **kwargs):
        weights = {"data": data, "model_kwargs": kwargs}
        return datasets.load_again(weights, tmp_path / "faces" if "folder" in data else tmp_path, "cpu")

    for data in ("digits", "digits (bundled, in place of mnist)", "digits without 4"):
        test = again(data, image_size=1024)[1]  # a number of pixels
        assert test.pixels.equal(load(image_size=32)[1].pixels) and not test.normalize and len(test) == 500
    test = again("digits", image_size=16, image_channels=3)[1]  # a side
    assert test.pixels.equal(load(image_size=16, channels=3)[1].pixels) and test.normalize
    assert not again("digits", image_size=16, image_channels=1)[1].normalize
    (tmp_path / "faces").mkdir()
    for i in range(12):
        Image.new("RGB", (9, 9), (20 * i, 0, 0)).save(tmp_path / f"faces/{i}.png")
    assert again("folder faces", image_size=8, image_channels=3)[0].name == "folder faces"
    monkeypatch.chdir(tmp_path / "faces")  # the folder's name is found however it is written
    assert datasets.load_again({"data": "folder faces", "model_kwargs": {"image_size": 8, "image_channels": 3}}, ".",
                               "cpu")[0].name == "folder faces"
    assert datasets.left_out("mnist without 4") == 4 and datasets.left_out("folder dogs without tails") is None
    assert datasets.check_folder("folder dogs without tails", "dogs without tails") == "folder"
    with pytest.raises(common.BadInput, match="trained on a folder birds: say where it is with --data_dir"):
        again("folder birds", image_size=8, image_channels=3)


@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_and_both_channel_counts(size, channels):
    train, _ = load(image_size=size, channels=channels)
    assert train.pixels.shape == (4500, channels, size, size)
    if size == 32 and channels == 1:  # padded, not resampled
        assert torch.equal(train.pixels[:, :, 2:-2, 2:-2], load()[0].pixels)


def test_batches_scale_flip_and_order():
    train, _ = load(batch_size=7, shuffle=False)
    assert torch.cat(train.order(0, 1)).tolist() == list(range(4500))
    images, labels = train.batch(torch.tensor([3, 5]))
    assert torch.allclose(images, train.pixels[[3, 5]] / 127.5 - 1, atol=1e-6) and labels.equal(train.labels[[3, 5]])
    plain, _ = load(normalize=False)
    assert torch.allclose(plain.batch(torch.tensor([3]))[0], train.pixels[[3]] / 255, atol=1e-7)
    shuffled, _ = load(batch_size=7)
    first, second = torch.cat(shuffled.order(0, 1)), torch.cat(shuffled.order(0, 2))
    assert sorted(first.tolist()) == list(range(4500)) and not first.equal(second)
    assert first.equal(torch.cat(shuffled.order(0, 1)))
    flipping, plain_test = load(horizontal_flip=True)
    images, _ = flipping.batch(torch.zeros(200, dtype=torch.long))
    mirrored = sum(image.equal(images[0].flip(2)) for image in images)
    assert mirrored + sum(image.equal(images[0]) for image in images) == 200 and 60 < mirrored < 140
    assert not plain_test.flip


def test_batch_size_larger_than_the_data():
    with pytest.raises(common.BadInput, match="batch_size 4501 is larger than the 4500"):
        load(batch_size=4501)


@pytest.fixture
def pictures(tmp_path):
    """A folder with two classes: sizes, modes and suffix cases mixed, one broken file, some that are no pictures."""
    random = np.random.RandomState(0)
    for number, (mode, suffix, size) in enumerate([("RGB", ".png", (40, 30)), ("L", ".PNG", (28, 28)),
                                                   ("RGBA", ".png", (20, 50)), ("P", ".gif", (33, 33)),
                                                   ("CMYK", ".JPG", (64, 40)), ("1", ".bmp", (31, 29)),
                                                   ("LA", ".png", (30, 30)), ("I;16", ".tiff", (30, 30))]):
        folder = tmp_path / "birds" / ("robin" if number % 2 else "wren")
        folder.mkdir(parents=True, exist_ok=True)
        array = random.randint(0, 255, (*size[::-1], 3), dtype=np.uint8)
        image = Image.fromarray(array) if mode != "I;16" else Image.fromarray(array[..., 0].astype(np.uint16) * 257)
        (image if mode == "I;16" else image.convert(mode)).save(folder / f"{number}{suffix}")
    (folder / "broken.jpg").write_bytes(b"not a picture")
    (folder / "notes.txt").write_text("not a picture either")
    (folder / "._0.png").write_bytes(b"left by another system")
    return tmp_path / "birds"


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_of_mixed_images(pictures, channels, capsys, monkeypatch):
    train, test = load("folder", pictures, channels=channels, image_size=16)
    assert train.pixels.shape == (7, channels, 16, 16) and len(test) == 1 and train.class_names == ["robin", "wren"]
    error = capsys.readouterr().err
    assert "skipped 1 unreadable" in error and "broken.jpg" in error and "notes" not in error

    def forbidden(*_):
        raise AssertionError("the second start reads the cache")

    monkeypatch.setattr(Image, "open", forbidden)
    again, _ = load("folder", pictures, channels=channels, image_size=16)
    assert torch.equal(again.pixels, train.pixels) and torch.equal(again.labels, train.labels)
    assert "broken.jpg" in capsys.readouterr().err


def test_folder_is_read_again_when_a_file_changes(pictures):
    load("folder", pictures)
    Image.new("RGB", (50, 50), "red").save(pictures / "robin" / "new.png")
    assert sum(map(len, load("folder", pictures))) == 9
    before = sorted(image.numpy().tobytes() for split in load("folder", pictures) for image in split.pixels)
    bitmap = next(pictures.rglob("*.bmp"))  # black and white, so that the file's size stays
    Image.new("1", Image.open(bitmap).size).save(bitmap)
    after = sorted(image.numpy().tobytes() for split in load("folder", pictures) for image in split.pixels)
    assert len(after) == 9 and after != before
    assert len(list(pictures.glob(".cache_*"))) == 1


def test_folder_images_keep_their_shape_and_transparency_becomes_white(tmp_path):
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 255  # the middle third is what a centre crop leaves
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "b.png")
    deep = np.full((20, 20), 255 * 257, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "c.png")
    train, test = load("folder", tmp_path, image_size=10, batch_size=1)
    assert torch.cat([train.pixels, test.pixels]).min() > 200 and train.class_names == [""]


@pytest.mark.parametrize("pixels, seen", [(np.float32([[0, 0.2, 1]]), [0, 51, 255]),
                                          (np.float32([[0, 51, 200]]), [0, 51, 200]),
                                          (np.uint16([[0, 400, 257]]), [0, 1, 1]),
                                          (np.uint16([[0, 51 * 257, 65535]]), [0, 51, 255]),
                                          (np.int32([[0, 51, 200]]), [0, 51, 200]),
                                          (np.float32([[-1, 0, 131072]]), [0, 0, 255])])
def test_pixels_of_more_than_8_bits_are_seen_on_their_own_scale(pixels, seen, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "deep.tiff")
    assert datasets.read_images([tmp_path / "deep.tiff"])[0][0, :, 0].tolist() == 3 * [seen]


def test_images_are_measured_as_they_are_trained_on(pictures):
    paths = [path for path in datasets.image_files(pictures) if path.name != "broken.jpg"]
    for path in paths:
        Image.open(path).resize((20, 20)).save(path)
    train, test = load("folder", pictures, channels=3, image_size=20, batch_size=1)
    trained = sorted(image.numpy().tobytes() for image in torch.cat([train.pixels, test.pixels]))
    assert trained == sorted(image.numpy().tobytes() for image in datasets.read_images(paths)[0])


def test_folder_without_readable_images(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(common.BadInput, match="0 of 2 image files can be read"):
        load("folder", tmp_path)


def test_what_does_not_fit_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(datasets.Path, "read_text", lambda _: "MemTotal: 9 kB\nMemAvailable: 1024 kB\n")
    with pytest.raises(common.BadInput, match=r"5,000 images of 3x64x64 need 0.1 GiB, and cpu has 0.0 GiB free"):
        load(channels=3, image_size=64)


@pytest.fixture
def silent_server():
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []
        threading.Thread(target=lambda: [held.append(server.accept()) for _ in range(9)], daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"


@pytest.fixture
def mnist_from(monkeypatch):
    from torchvision.datasets import MNIST

    return lambda url: monkeypatch.setattr(MNIST, "mirrors", [url])


def test_download_without_an_answer_is_given_up(silent_server, mnist_from, monkeypatch, tmp_path, capsys):
    mnist_from(silent_server)
    monkeypatch.setattr(datasets, "STALL_SECONDS", 0.5)
    train, _ = load("mnist", tmp_path)
    assert train.name == "digits (bundled, in place of mnist)" and len(train) == 4500
    warning = capsys.readouterr().err
    assert "THIS IS NOT MNIST" in warning and "no answer for 0.5 s" in warning and "train-images" not in warning
    assert not list(tmp_path.iterdir())
    with pytest.raises(common.BadInput, match="put MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz there"):
        load("mnist", tmp_path, allow_fallback=False)


def test_broken_download_leaves_nothing_behind(mnist_from, tmp_path):
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Rubbish(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"half a file")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Rubbish) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mnist_from(f"http://127.0.0.1:{server.server_port}/")
        train, _ = load("mnist", tmp_path)
        server.shutdown()
    assert "in place of mnist" in train.name and not list(tmp_path.iterdir())


def write_mnist(folder, monkeypatch):
    """Ten tiny digits a split in MNIST's own format, gzipped; torchvision is told their checksums."""
    import gzip
    import hashlib
    from torchvision.datasets import MNIST

    (folder / "MNIST" / "raw").mkdir(parents=True)
    resources = []
    for split, value in (("train", 10), ("t10k", 20)):
        images = np.full((10, 28, 28), value, dtype=np.uint8)
        for kind, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, np.arange(10, dtype=np.uint8))):
            header = np.array([magic, *array.shape], dtype=">i4").tobytes()
            path = folder / "MNIST" / "raw" / f"{split}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes()))
            resources.append((path.name, hashlib.md5(path.read_bytes()).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)


def test_archives_in_data_dir_are_used_without_a_network(mnist_from, monkeypatch, tmp_path):
    mnist_from("http://127.0.0.1:9/")
    write_mnist(tmp_path, monkeypatch)
    for _ in range(2):  # from the archives, then from what was unpacked
        train, test = load("mnist", tmp_path)
        assert train.name == "mnist" and len(train) == len(test) == 10
        assert (train.pixels == 10).all() and (test.pixels == 20).all()  # the test split is the test split
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MNIST"]


def test_damaged_files_are_not_trained_on(mnist_from, monkeypatch, tmp_path, capsys):
    mnist_from("http://127.0.0.1:9/")
    write_mnist(tmp_path, monkeypatch)
    load("mnist", tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-50])
    train, _ = load("mnist", tmp_path)  # unpacked once more from the archive, whose checksum is right
    assert train.name == "mnist" and len(train) == 10


def write_sprites(folder, labels, names=("sprites.npy", "sprites_labels.npy")):
    """As many pictures as labels; the last two are the first once more. Returns the pixels."""
    pixels = np.random.RandomState(0).randint(0, 256, (len(labels), 16, 16, 3), dtype=np.uint8)
    pixels[-2:] = pixels[0]
    for name, array in zip(names, (pixels, labels)):
        np.save(folder / name, array)
    return pixels


SPRITE_LABELS = np.array([0, 1, 2, 3, 4] * 4 + [0, 0])


def test_sprites_are_read_split_and_named_and_duplicates_go_first(tmp_path, capsys):
    pixels = write_sprites(tmp_path, np.eye(5)[SPRITE_LABELS])
    splits = load("sprites", tmp_path, channels=3, image_size=16)
    assert [len(split) for split in splits] == [18, 2] and "22 images, 2 of them removed" in capsys.readouterr().err
    assert splits[0].name == "sprites" and splits[0].class_names == list("01234")
    expected = {image.tobytes(): label for image, label in zip(pixels[:20], SPRITE_LABELS)}
    found = {np.ascontiguousarray(image.permute(1, 2, 0)).tobytes(): label
             for split in splits for image, label in zip(split.pixels, split.labels.tolist())}
    assert len(found) == 20 and found == expected


@pytest.mark.parametrize("labels", [SPRITE_LABELS, SPRITE_LABELS[:, None], SPRITE_LABELS.astype(np.float32)])
def test_one_hot_and_integer_labels_are_the_same(labels, tmp_path):
    write_sprites(tmp_path, np.eye(5)[SPRITE_LABELS])
    one_hot = load("sprites", tmp_path, channels=3, image_size=16)[0]
    write_sprites(tmp_path, labels)
    integers = load("sprites", tmp_path, channels=3, image_size=16)[0]
    assert one_hot.labels.equal(integers.labels) and one_hot.pixels.equal(integers.pixels)
    assert one_hot.labels.dtype == integers.labels.dtype == torch.int64 and one_hot.class_names == integers.class_names


def test_sprites_under_their_other_names(tmp_path):
    pixels = write_sprites(tmp_path, SPRITE_LABELS, ("sprites_1788_16x16.npy", "sprite_labels_nc_1788_16x16.npy"))
    first = load("sprites", tmp_path, channels=3, image_size=16)[0]
    (tmp_path / "packed").mkdir()
    np.savez(tmp_path / "packed" / "sprites.npz", images=pixels, labels=SPRITE_LABELS, class_names=list("abcde"))
    packed = load("sprites", tmp_path / "packed", channels=3, image_size=16)[0]
    assert first.pixels.equal(packed.pixels) and first.labels.equal(packed.labels)
    assert packed.class_names == list("abcde")


@pytest.mark.parametrize("labels", [SPRITE_LABELS - 1, SPRITE_LABELS + 0.5, np.eye(5)[SPRITE_LABELS] * 2,
                                    1 - np.eye(5)[SPRITE_LABELS], SPRITE_LABELS[:-1], SPRITE_LABELS.astype(str)])
def test_bad_sprite_labels_are_refused(labels, tmp_path):
    write_sprites(tmp_path, SPRITE_LABELS)
    np.save(tmp_path / "sprites_labels.npy", labels)
    with pytest.raises(common.BadInput, match="sprites_labels.npy") as caught:
        load("sprites", tmp_path, channels=3, image_size=16)
    assert "\n" not in str(caught.value)


def test_without_sprites_their_source_is_named_and_coloured_digits_stand_in(tmp_path, capsys):
    train, _ = load("sprites", tmp_path, channels=3, image_size=16)
    warning = capsys.readouterr().err
    assert "deeplearning.ai" in warning and "ebrahimelgazar/pixel-art" in warning and "THIS IS NOT SPRITES" in warning
    assert train.pixels.shape == (4500, 3, 16, 16) and train.labels.unique().tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(common.BadInput, match="sprites_labels.npy"):
        load("sprites", tmp_path, channels=3, image_size=16, allow_fallback=False)
    write_sprites(tmp_path, SPRITE_LABELS)
    (tmp_path / "sprites_labels.npy").unlink()
    with pytest.raises(common.BadInput, match="sprites_labels.npy cannot be read"):  # half a data set is a mistake
        load("sprites", tmp_path, channels=3, image_size=16)
