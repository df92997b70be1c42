"""load_data: every kind of data, from real files in miniature, without a network."""

import socket
import threading

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import common


def load(dataset_type="digits", data_dir="nowhere", **overrides):
    settings = dict(image_channels=1, image_size=28, device="cpu", batch_size=2, shuffle=True)
    return common.load_data(dataset_type, str(data_dir), **{**settings, **overrides})


def all_pixels(splits):
    return torch.cat([split.pixels for split in splits])


def labelled(splits):
    """{the bytes of an image (H, W, C): its label} of both splits."""
    found = {}
    for split in splits:
        for image, label in zip(split.pixels, split.labels.tolist()):
            found[image.permute(1, 2, 0).contiguous().numpy().tobytes()] = label
    return found


# ------------------------------------------------------------------------------ digits


def test_bundled_digits_are_split_and_stratified():
    train, test = load()
    assert train.pixels.shape == (4500, 1, 28, 28) and test.pixels.shape == (500, 1, 28, 28)
    assert train.pixels.dtype == torch.uint8 and train.pixels.max() == 255
    assert train.labels.bincount().tolist() == [450] * 10
    assert test.labels.bincount().tolist() == [50] * 10
    assert len(train.labels[:100].unique()) == 10, "the first images are of all classes"
    known = {image.numpy().tobytes() for image in train.pixels}
    assert not any(image.numpy().tobytes() in known for image in test.pixels)
    assert train.class_names == list("0123456789") and train.name == "digits"


def test_coloured_digits_are_the_same_every_time_and_never_lose_the_digit():
    train, _ = load(image_channels=3)
    grey, _ = load()
    again, _ = load(image_channels=3)
    assert train.pixels.shape == (4500, 3, 28, 28) and torch.equal(train.pixels, again.pixels)
    assert torch.equal(train.labels, grey.labels)
    # not every digit has full ink
    full = (grey.pixels == 255).flatten(1).any(1).nonzero().squeeze(1)[:50]
    for colour, image in zip(train.pixels[full].int(), grey.pixels[full, 0]):
        ground = colour[:, image == 0].T.unique(dim=0)
        ink = colour[:, image == 255].T.unique(dim=0)
        assert len(ground) == 1 and len(ink) == 1
        assert (ground - ink).abs().min() >= 88  # 0.35 of 255, less rounding


def test_a_class_that_is_left_out_is_gone_and_named():
    whole = load()
    for split, before in zip(load(exclude_class=4), whole):
        assert split.name == "digits without 4"
        assert split.pixels.equal(before.pixels[before.labels != 4])
        assert split.labels.equal(before.labels[before.labels != 4])
        assert split.class_names == before.class_names
    train, _ = load(exclude_class=0)
    assert torch.cat(train.epoch_batches(0, 1)).max() == 4049
    with pytest.raises(common.BadInput, match="exclude_class 10 must be a label, and there must"):
        load(exclude_class=10)
    # of few images the held-out tenth may have none of the class
    few = Pictures([torch.zeros(1, 8, 8)] * 20, [0] * 18 + [1] * 2)
    sizes = [len(split) for split in load(few, image_size=8, batch_size=1, exclude_class=1)]
    assert sum(sizes) == 18
    last = Pictures([torch.zeros(1, 8, 8)] * 9, [1] + [0] * 7 + [1])  # the ninth is held out
    with pytest.raises(common.BadInput, match="exclude_class 1 leaves no image to test on"):
        load(last, image_size=8, batch_size=1, exclude_class=1)


def test_batches_scale_flip_and_order():
    train, _ = load(batch_size=7, shuffle=False)
    assert torch.cat(train.epoch_batches(0, 1)).tolist() == list(range(4500))
    images, labels = train.batch(torch.tensor([3, 5]))
    assert torch.allclose(images, train.pixels[[3, 5]] / 127.5 - 1, atol=1e-6)
    assert labels.equal(train.labels[[3, 5]])
    plain, _ = load(normalize=False)
    images, _ = plain.batch(torch.tensor([3]))
    assert torch.allclose(images, train.pixels[[3]] / 255, atol=1e-7)
    shuffled, _ = load(batch_size=7)
    first, second = (torch.cat(shuffled.epoch_batches(0, epoch)) for epoch in (1, 2))
    assert sorted(first.tolist()) == list(range(4500)) and not first.equal(second)
    assert first.equal(torch.cat(shuffled.epoch_batches(0, 1)))
    assert not first.equal(torch.cat(shuffled.epoch_batches(1, 1)))
    flipping, unflipped = load(horizontal_flip=True)
    images, _ = flipping.batch(torch.zeros(200, dtype=torch.long))
    mirrored = sum(image.equal(images[0].flip(2)) for image in images)
    assert mirrored + sum(image.equal(images[0]) for image in images) == 200
    assert 60 < mirrored < 140
    images, _ = unflipped.batch(torch.zeros(200, dtype=torch.long))
    assert all(image.equal(images[0]) for image in images)


def test_an_epoch_of_so_many_steps_goes_on_where_the_last_one_ended():
    train, _ = load(batch_size=400)
    batches = [index for epoch in (1, 2, 3) for index in train.epoch_batches(0, epoch, steps=9)]
    assert [len(index) for index in batches] == [400] * 27
    drawn = torch.cat(batches)  # 10,800 images: two passes over 4,500, and a part of the third
    for start in (0, 4500):
        assert sorted(drawn[start : start + 4500].tolist()) == list(range(4500))
    assert len(drawn[9000:].unique()) == 1800


# ---------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("channels", [1, 3])
def test_28_pixels_are_padded_to_32_with_what_lies_at_the_edge(channels):
    _, own = load(image_channels=channels)
    _, padded = load(image_channels=channels, image_size=32)
    assert torch.equal(padded.pixels[:, :, 2:-2, 2:-2], own.pixels)
    corner = own.pixels[:, :, :1, :1]
    assert torch.equal(padded.pixels[:, :, :2, :2], corner.expand(-1, -1, 2, 2))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 64])
def test_other_sizes_are_those_of_pillow_s_antialiased_bicubic(size, channels):
    """A second implementation, in floats, so that it neither rounds nor cuts off on the way."""
    _, own = load(image_channels=channels)
    _, resized = load(image_channels=channels, image_size=size)
    assert resized.pixels.shape == (500, channels, size, size)
    for image, smaller in zip(own.pixels[:20].flatten(0, 1), resized.pixels[:20].flatten(0, 1)):
        picture = Image.fromarray(image.float().numpy())
        expected = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
        assert np.abs(smaller.numpy() - expected.clip(0, 255)).max() <= 1.01


class Pictures(torch.utils.data.Dataset):
    """A Dataset of these images."""

    def __init__(self, images, labels=None):
        self.images, self.labels = images, labels or [0] * len(images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.images[number], self.labels[number]


def test_overshoot_of_bicubic_does_not_wrap_around():
    edge = torch.zeros(1, 8, 8, dtype=torch.uint8)
    edge[:, :, 4:] = 255  # the bright side overshoots beyond 255, the dark side below 0
    pixels = all_pixels(load(Pictures([edge] * 4), image_size=32))
    left, right = pixels[..., :10], pixels[..., 22:]
    assert left.max() < 30 and right.min() > 225


def test_grey_is_luma():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    images = [Image.new("RGB", (8, 8), colour) for colour in colours]
    pixels = all_pixels(load(Pictures(images), image_size=8))
    levels = sorted(image.unique().item() for image in pixels)
    expected = [29, 76, 150, 255]  # 0.114, 0.299, 0.587 and 1 of 255; whether rounded or cut off
    assert levels == pytest.approx(expected, abs=1)


# ------------------------------------------------------------------------- own datasets


def test_a_dataset_of_one_s_own_is_split_and_keeps_its_labels_and_classes():
    images = helpers.OwnDataset(count=40, size=8)
    splits = load(images, image_channels=3, image_size=8)
    assert [len(split) for split in splits] == [36, 4]
    expected = {image.tobytes(): label for image, label in zip(images.pixels, images.labels)}
    assert labelled(splits) == expected
    assert (splits[0].name, splits[0].class_names) == ("OwnDataset", ["dark", "bright"])


@pytest.mark.parametrize(
    "classes, names",
    [
        (list(np.array(["cat", "dog"])), ["cat", "dog"]),
        (np.array(["cat", "dog"]), ["cat", "dog"]),
        (list(np.array([3, 7])), ["3", "7"]),
        ([3, 7], ["3", "7"]),
        ((), ["0", "1"]),
        (None, ["0", "1"]),
    ],
)
def test_classes_of_a_dataset_become_plain_words(classes, names):
    """Of numpy's words a checkpoint could be written, but not be read again."""
    images = helpers.OwnDataset(count=40, size=8)
    images.classes = classes
    found = load(images, image_channels=3, image_size=8)[0].class_names
    assert found == names and {type(name) for name in found} == {str}


def test_labels_of_a_dataset_need_names():
    images = helpers.OwnDataset(count=40, size=8)
    images.classes = ["only one"]
    with pytest.raises(common.BadInput, match="labels of the Dataset must be from 0 to 0"):
        load(images, image_channels=3, image_size=8)
    pixels = [Image.new("L", (8, 8), level) for level in range(4)]
    with pytest.raises(common.BadInput, match="labels of the Dataset must be from 0 to 1"):
        load(Pictures(pixels, [0, 1, -1, 1]), image_size=8)


def test_tensors_of_a_dataset_are_bytes_or_shares_of_one():
    ramp = torch.arange(192).view(3, 8, 8).byte()
    both = Pictures([ramp, ramp.float() / 255], [3, 3])
    splits = load(both, image_channels=3, image_size=8, batch_size=1)
    assert [split.pixels.equal(ramp[None]) for split in splits] == [True, True]
    assert splits[0].labels.tolist() == [3] and splits[0].class_names == ["0", "1", "2", "3"]
    for wrong in (ramp.float(), ramp / 127.5 - 1):
        with pytest.raises(common.BadInput, match=r"image 1 .* floats in \[0, 1\]"):
            load(Pictures([ramp, wrong]), image_channels=3)
    with pytest.raises(common.BadInput, match="image 1 .* has mode F; bring it to 8 bits"):
        load(Pictures([ramp, Image.new("F", (8, 8), 0.5)]), image_channels=3)
    with pytest.raises(common.BadInput, match="image 0 .* or a tensor, not ndarray"):
        load(Pictures([ramp.numpy(), ramp]), image_channels=3)
    for wrong in (ramp.short(), ramp[:2]):
        with pytest.raises(common.BadInput, match=r"image 1 .* must be uint8 or floats, \(1 or 3"):
            load(Pictures([ramp, wrong]), image_channels=3)
    with pytest.raises(common.BadInput, match="two images"):
        load(Pictures([ramp]), image_channels=3)


@pytest.mark.parametrize("mode", ["P", "RGBA", "L"])
def test_pillow_s_images_of_a_dataset_may_have_any_mode(mode):
    image = Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode)
    splits = load(Pictures([image, image]), image_channels=3, image_size=8, batch_size=1)
    expected = [76, 76, 76] if mode == "L" else [255, 0, 0]
    assert splits[0].pixels[0, :, 4, 4].tolist() == expected
    grey, _ = load(Pictures([image, image]), image_channels=1, image_size=8, batch_size=1)
    assert grey.pixels.unique().tolist() == [76]


# ----------------------------------------------------------------------------- folders


@pytest.fixture
def pictures(tmp_path):
    """A folder with two classes: sizes, modes and suffixes mixed, and files of other kinds."""
    noise = np.random.RandomState(0)
    kinds = [
        ("RGB", ".png", (40, 30)),
        ("L", ".PNG", (28, 28)),
        ("RGBA", ".png", (20, 50)),
        ("P", ".gif", (33, 33)),
        ("CMYK", ".JPG", (64, 40)),
        ("1", ".bmp", (31, 29)),
        ("LA", ".png", (30, 30)),
        ("RGB", ".webp", (30, 30)),
    ]
    for number, (mode, suffix, size) in enumerate(kinds):
        folder = tmp_path / "birds" / ("robin" if number % 2 else "wren")
        folder.mkdir(parents=True, exist_ok=True)
        array = noise.randint(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(array).convert(mode).save(folder / f"{number}{suffix}")
    (folder / "broken.jpg").write_bytes(b"not a picture")
    (folder / "album.png").mkdir()
    (folder / "notes.txt").write_text("not a picture either")
    (folder / "._0.png").write_bytes(b"left by another system")
    return tmp_path / "birds"


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_of_mixed_images(pictures, channels, capsys, monkeypatch):
    splits = load("folder", pictures, image_channels=channels, image_size=16)
    train, test = splits
    assert train.pixels.shape == (7, channels, 16, 16) and len(test) == 1
    assert train.class_names == ["robin", "wren"] and train.name == "folder birds"
    error = capsys.readouterr().err
    assert "1 unreadable" in error and "broken.jpg" in error
    assert "notes" not in error and "album" not in error

    def forbidden(*_):
        raise AssertionError("the second start reads the cache")

    monkeypatch.setattr(Image, "open", forbidden)
    again = load("folder", pictures, image_channels=channels, image_size=16)
    assert labelled(again) == labelled(splits)
    assert "broken.jpg" in capsys.readouterr().err


def test_a_folder_s_images_keep_their_labels_and_their_colours(tmp_path):
    """Every image has a colour of its own, which tells its class. One class is a linked folder."""
    images = tmp_path / "images"
    expected = {}
    for label, name in enumerate(("ant", "bee", "cat")):
        (images / name).mkdir(parents=True)
        for number in range(10):
            colour = (40 * label + 3 * number, 200 - 7 * number, 90 * label + 1)
            Image.new("RGB", (9, 9), colour).save(images / name / f"{number}.png")
            expected[colour] = label
    (images / "bee").rename(tmp_path / "elsewhere")
    (images / "bee").symlink_to(tmp_path / "elsewhere")
    splits = load("folder", images, image_channels=3, image_size=9)
    assert [len(split) for split in splits] == [27, 3]
    found = {}
    for split in splits:
        for image, label in zip(split.pixels, split.labels.tolist()):
            assert image.flatten(1).unique(dim=1).shape == (3, 1)
            found[tuple(image[:, 0, 0].tolist())] = label
    assert found == expected
    assert splits[0].class_names == ["ant", "bee", "cat"]


def test_pictures_of_sixteen_bits_are_left_out_and_not_cut_off(pictures, capsys):
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(deep).save(pictures / "wren" / "deep.png")
    train, test = load("folder", pictures, image_channels=1, image_size=16)
    assert len(train) + len(test) == 8
    error = capsys.readouterr().err
    assert "left out 2 unreadable (or not of 8 bits) images" in error and "deep.png" in error


def test_folder_is_read_again_when_a_file_changes(pictures):
    load("folder", pictures)
    Image.new("RGB", (50, 50), "red").save(pictures / "robin" / "new.png")
    before = labelled(load("folder", pictures))
    assert len(before) == 9
    bitmap = next(pictures.rglob("*.bmp"))  # black and white, so that the file's size stays
    Image.new("1", Image.open(bitmap).size).save(bitmap)
    after = labelled(load("folder", pictures))
    assert len(after) == 9 and after != before


def test_folder_images_keep_their_shape_and_transparency_becomes_white(tmp_path):
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 255  # the middle third is what a centre crop leaves
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "b.png")
    splits = load("folder", tmp_path, image_size=10, batch_size=1)
    assert all_pixels(splits).min() > 200 and splits[0].class_names == [""]


def test_a_photograph_is_turned_upright(tmp_path):
    """A camera held upright writes the picture lying down, and its turn into the EXIF."""
    upright = np.zeros((20, 20, 3), dtype=np.uint8)
    upright[:10] = 255  # the sky is above
    lying = Image.fromarray(np.rot90(upright))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to show it
    for name in "ab":
        lying.save(tmp_path / f"{name}.png", exif=exif)
    pixels = all_pixels(load("folder", tmp_path, image_size=20, batch_size=1))
    assert (pixels[:, :, :9] > 250).all() and (pixels[:, :, 11:] < 5).all()


def test_folder_without_readable_images(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(common.BadInput, match="0 images can be read"):
        load("folder", tmp_path)
    with pytest.raises(common.BadInput, match="there is no folder"):
        load("folder", tmp_path / "nothing")


@pytest.mark.parametrize("grey_files", [0, 1])
def test_cub_is_squeezed_and_compressed_and_its_grey_photographs_go(grey_files, tmp_path, capsys):
    folder = tmp_path / "CUB_200_2011" / "images" / "001.Tern"
    folder.mkdir(parents=True)
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 30:] = 255, 0, 0
    for name in "abc":
        Image.fromarray(wide).save(folder / f"{name}.png")
    for number in range(grey_files):
        Image.new("L", (20, 20)).save(folder / f"grey{number}.png")
    splits = load("cub", tmp_path, image_channels=3, image_size=16, batch_size=1)
    pixels = all_pixels(splits)
    assert len(pixels) == 3 and splits[0].class_names == ["001.Tern"]
    assert (pixels[..., :7] < 5).all() and (pixels[:, 0, :, 9:] > 250).all()
    assert ("1 grey" in capsys.readouterr().err) == bool(grey_files)
    coarse = load("cub", tmp_path, image_channels=3, image_size=16, batch_size=1, jpeg_quality=5)
    assert 2 < (all_pixels(coarse).float() - pixels.float()).abs().mean() < 60


# ---------------------------------------------------------------------------- archives


@pytest.mark.parametrize("name, kind", [("MNIST", "mnist"), ("FashionMNIST", "fashion_mnist")])
def test_mnist_s_archives_are_used_without_a_network(name, kind, monkeypatch, tmp_path):
    helpers.cut_off_network(monkeypatch)
    written = helpers.write_mnist(tmp_path, monkeypatch, name)
    for _ in range(2):  # from the archives, then from what was unpacked
        splits = load(kind, tmp_path)
        for split, (pixels, labels) in zip(splits, (written["train"], written["t10k"])):
            assert (split.name, split.dataset_type) == (kind, kind)
            assert split.pixels.equal(torch.from_numpy(pixels)[:, None])
            assert split.labels.tolist() == labels.tolist()
    assert len(splits[0].class_names) == 10
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_cifar10_s_archive_is_used_without_a_network(monkeypatch, tmp_path):
    helpers.cut_off_network(monkeypatch)
    written = helpers.write_cifar10(tmp_path, monkeypatch)
    splits = load("cifar10", tmp_path, image_channels=3, image_size=32)
    for split, (pixels, labels) in zip(splits, (written["train"], written["test"])):
        assert (split.name, split.dataset_type) == ("cifar10", "cifar10")
        assert split.pixels.equal(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert split.labels.tolist() == labels
    assert splits[0].class_names == helpers.CIFAR10_CLASSES
    (tmp_path / "cifar-10-python.tar.gz").unlink()  # what was unpacked is enough
    assert labelled(load("cifar10", tmp_path, image_channels=3, image_size=32)) == labelled(splits)


@pytest.fixture(autouse=True)
def usual_timeout():
    """Downloads set one, and take it back."""
    yield
    assert socket.getdefaulttimeout() is None


@pytest.fixture
def silent_server():
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def accept():
            for _ in range(9):
                held.append(server.accept())

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"


def test_download_without_an_answer_is_given_up(silent_server, monkeypatch, tmp_path, capsys):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", [silent_server])
    monkeypatch.setattr(common, "DOWNLOAD_TIMEOUT", 0.3)
    train, _ = load("mnist", tmp_path)
    assert train.name == "digits (bundled, in place of mnist)" and len(train) == 4500
    assert train.dataset_type == "digits"
    warning = capsys.readouterr().err
    assert "THIS IS NOT MNIST" in warning and "MNIST/raw" in warning
    with pytest.raises(common.BadInput, match="mnist could be neither read .*; put MNIST/raw"):
        load("mnist", tmp_path, allow_fallback=False)


def test_damaged_files_are_not_trained_on(monkeypatch, tmp_path, capsys):
    helpers.cut_off_network(monkeypatch)
    helpers.write_mnist(tmp_path, monkeypatch)
    archive = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:-50])
    train, _ = load("mnist", tmp_path)
    assert train.name == "digits (bundled, in place of mnist)"
    assert "THIS IS NOT MNIST" in capsys.readouterr().err


# ----------------------------------------------------------------------------- sprites


def write_sprites(folder, labels, names=("sprites.npy", "sprites_labels.npy")):
    """As many pictures as labels; the last two are the first once more. Returns the pixels."""
    pixels = np.random.RandomState(0).randint(0, 256, (len(labels), 16, 16, 3), dtype=np.uint8)
    pixels[-2:] = pixels[0]
    for name, array in zip(names, (pixels, labels)):
        np.save(folder / name, array)
    return pixels


def sprites(folder, **overrides):
    return load("sprites", folder, image_channels=3, image_size=16, **overrides)


SPRITE_LABELS = np.array([0, 1, 2, 3, 4] * 4 + [0, 0])


def test_sprites_are_read_split_and_named_and_duplicates_go_first(tmp_path, capsys):
    pixels = write_sprites(tmp_path, np.eye(5)[SPRITE_LABELS])
    splits = sprites(tmp_path)
    assert [len(split) for split in splits] == [18, 2]
    error = capsys.readouterr().err
    assert "22 images" in error and "2 exact duplicates" in error
    assert splits[0].name == "sprites" and splits[0].class_names == list("01234")
    expected = {image.tobytes(): label for image, label in zip(pixels[:20], SPRITE_LABELS)}
    assert len(expected) == 20 and labelled(splits) == expected


@pytest.mark.parametrize("labels", [SPRITE_LABELS, SPRITE_LABELS.astype(np.uint8)])
def test_one_hot_and_integer_labels_are_the_same(labels, tmp_path):
    write_sprites(tmp_path, np.eye(5)[SPRITE_LABELS])
    one_hot = sprites(tmp_path)
    write_sprites(tmp_path, labels)
    integers = sprites(tmp_path)
    assert labelled(one_hot) == labelled(integers)
    assert one_hot[0].labels.dtype == integers[0].labels.dtype == torch.int64
    assert one_hot[0].class_names == integers[0].class_names


def test_sprites_under_their_other_names(tmp_path):
    names = ("sprites_1788_16x16.npy", "sprite_labels_nc_1788_16x16.npy")
    pixels = write_sprites(tmp_path, SPRITE_LABELS, names)
    first = sprites(tmp_path)
    assert first[0].class_names == ["hero", "non-hero", "food", "spell", "side-facing"]
    expected = {image.tobytes(): label for image, label in zip(pixels[:20], SPRITE_LABELS)}
    assert labelled(first) == expected


@pytest.mark.parametrize(
    "labels",
    [
        SPRITE_LABELS - 1,
        SPRITE_LABELS + 0.5,
        SPRITE_LABELS[:-1],
        SPRITE_LABELS.astype(str),
    ],
)
def test_bad_sprite_labels_are_refused(labels, tmp_path):
    write_sprites(tmp_path, SPRITE_LABELS)
    np.save(tmp_path / "sprites_labels.npy", labels)
    with pytest.raises(common.BadInput, match="sprites_labels.npy") as caught:
        sprites(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_sprites_their_source_is_named_and_coloured_digits_stand_in(tmp_path, capsys):
    train, _ = sprites(tmp_path)
    warning = capsys.readouterr().err
    assert "deeplearning.ai" in warning and "ebrahimelgazar/pixel-art" in warning
    assert "THIS IS NOT SPRITES" in warning and train.pixels.shape == (4500, 3, 16, 16)
    with pytest.raises(common.BadInput, match="sprites_labels.npy"):
        sprites(tmp_path, allow_fallback=False)
    write_sprites(tmp_path, SPRITE_LABELS)
    (tmp_path / "sprites_labels.npy").unlink()
    # half a data set is a mistake
    with pytest.raises(common.BadInput, match="sprites_labels.npy cannot be read"):
        sprites(tmp_path)


# ------------------------------------------------------------------------ loading again


def recorded(split, data_dir, **kwargs):
    """What a weights file says of the data that it was trained on."""
    kwargs = {"data_dir": str(data_dir), **kwargs}
    return {"data": split.record(), "dataset_kwargs": kwargs}


def test_what_an_encoder_was_trained_on_is_found_again(tmp_path, monkeypatch, capsys):
    helpers.cut_off_network(monkeypatch)
    (tmp_path / "faces" / "ann").mkdir(parents=True)
    (tmp_path / "faces" / "bob").mkdir()
    for i in range(12):
        name = "ann" if i % 3 else "bob"
        Image.new("RGB", (9, 9), (20 * i, 0, 0)).save(tmp_path / f"faces/{name}/{i}.png")
    cases = [
        ("digits", tmp_path, dict(image_size=32, normalize=False)),
        ("digits", tmp_path, dict(image_size=16, image_channels=3)),
        ("mnist", tmp_path, dict(exclude_class=4)),  # digits, in its place
        ("folder", tmp_path / "faces", dict(image_size=8, image_channels=3)),
    ]
    for kind, data_dir, settings in cases:
        train, _ = load(kind, data_dir, **settings)
        _, whole_test = load(kind, data_dir, **{**settings, "exclude_class": -1})
        weights = recorded(train, data_dir)
        for where in ("", str(data_dir)):
            _, test = common.load_again(weights, where, "cpu")
            assert labelled([test]) == labelled([whole_test])
            assert test.normalize == train.normalize
    train, test = common.load_again(recorded(load()[0], "."), "", "cpu", exclude_class=3)
    assert 3 not in train.labels and 3 not in test.labels and len(test) == 450


def test_what_is_not_there_any_more_is_said(tmp_path, monkeypatch):
    helpers.cut_off_network(monkeypatch)
    helpers.write_mnist(tmp_path, monkeypatch)
    weights = recorded(load("mnist", tmp_path)[0], tmp_path)
    # and no digits in its place
    with pytest.raises(common.BadInput, match="mnist could be neither"):
        common.load_again(weights, str(tmp_path / "elsewhere"), "cpu")
    own = recorded(load(helpers.OwnDataset())[0], tmp_path)
    with pytest.raises(common.BadInput, match=r"of a Dataset from Python \(OwnDataset\)"):
        common.load_again(own, "", "cpu")
    for folder, names in (("one", "ab"), ("other", "ac")):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / folder / name / "1.png")
    weights = recorded(load("folder", tmp_path / "one", batch_size=1)[0], tmp_path / "one")
    with pytest.raises(common.BadInput, match="other holds other classes"):
        common.load_again(weights, str(tmp_path / "other"), "cpu")
