import copy
import csv

import numpy as np
import pytest
import torch
import torchvision
from conftest import dicts_of
from PIL import Image
from torch import nn

import common
import fid
import main_cgan

SMALL = dict(feature_maps=4, latent_dim=8, embedding_dim=4)
QUICK = dict(generator_lr=0.001, discriminator_lr=0.001, **SMALL)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Two classes of noisy pictures that are quick to learn: 0 is red, 1 is blue."""
    folder, random = tmp_path_factory.mktemp("colours"), np.random.RandomState(0)
    labels = np.arange(400) % 2
    pixels = random.randint(0, 90, (400, 16, 16, 3), dtype=np.uint8)
    pixels[np.arange(400), :, :, 2 * labels] += random.randint(90, 160, (400, 1, 1), dtype=np.uint8)
    np.save(folder / "sprites.npy", pixels)
    np.save(folder / "sprites_labels.npy", np.eye(2)[labels])
    return dict(dataset_type="sprites", data_dir=str(folder), **QUICK)


def redness(images):
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def rows(folder):
    with open(folder / "history.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def mean_of_pairs(images):
    """Mean distance of two different images, by all n (n - 1) ordered pairs."""
    points = images.flatten(1).double()
    lengths = points.square().sum(1)
    squares = lengths[:, None] + lengths - 2 * points @ points.T
    count = len(points)
    return squares.clamp(min=0).sqrt().fill_diagonal_(0).sum().item() / (count * (count - 1))


def networks(size=16, channels=3, conditioning="projection", classes=5):
    generator = main_cgan.Generator(8, 4, 4, channels, size, classes)
    return generator, main_cgan.Discriminator(4, conditioning, channels, size, classes)


@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("channels, conditioning", [(1, "concat"), (3, "projection")])
@pytest.mark.parametrize("classes", [2, 11])
def test_shapes_at_every_size(size, channels, conditioning, classes):
    generator, discriminator = networks(size, channels, conditioning, classes)
    labels = torch.tensor([0, classes - 1])
    images = generator(torch.randn(2, 8), labels)
    assert images.shape == (2, channels, size, size) and images.abs().max() <= 1
    assert discriminator(images, labels).shape == (2,)


@pytest.mark.parametrize(
    "key, values",
    [
        ("image_size", (20, -1, 33)),
        ("image_channels", (0, 2)),
        ("latent_dim", (0,)),
        ("embedding_dim", (0,)),
        ("feature_maps", (0,)),
        ("conditioning", ("none",)),
        ("num_epochs", (-1,)),
        ("generator_lr", (0.0,)),
        ("discriminator_lr", (-0.1,)),
        ("ema_decay", (1.0, -0.1)),
        ("precision", ("half", "float16")),
        ("score_every", (-1,)),
        ("score_features", ("resnet",)),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(key, values, tiny, tmp_path):
    for value in values:
        with pytest.raises(common.BadInput, match=f"{key} must be") as caught:
            main_cgan.main(*tiny(main_cgan, **{key: value}))
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_projection_is_the_paper_s_formula():
    _, discriminator = networks()
    discriminator.eval()
    x, labels = torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 2])
    phi = discriminator.phi(x)
    for i, label in enumerate(labels):  # eq. (3): psi(phi(x)) + y^T V phi(x), y one-hot
        y = torch.zeros(5)
        y[label] = 1
        psi = (discriminator.psi.weight * phi[i]).sum() + discriminator.psi.bias
        by_hand = psi + y @ discriminator.directions.weight @ phi[i].flatten()
        assert torch.allclose(discriminator(x, labels)[i], by_hand.squeeze(), atol=1e-6)


def test_concat_shows_the_label_as_constant_channels():
    _, discriminator = networks(conditioning="concat")
    x, labels, seen = torch.rand(3, 3, 16, 16), torch.tensor([4, 0, 2]), []
    discriminator.phi[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    discriminator(x, labels)
    assert seen[0].shape == (3, 8, 16, 16) and seen[0][:, :3].equal(x)
    for shown, label in zip(seen[0][:, 3:], labels):
        assert shown.unique().tolist() == [0, 1]
        assert (shown[label] == 1).all() and shown.sum() == 256


@pytest.mark.parametrize("conditioning", ["concat", "projection"])
def test_the_label_counts_for_both_networks(conditioning):
    generator, discriminator = networks(conditioning=conditioning)
    generator.eval(), discriminator.eval()
    z, ones = torch.randn(4, 8), torch.ones(4, dtype=torch.long)
    for first, second in zip(generator(z, ones), generator(z, 2 * ones)):
        assert not first.equal(second)
    x = torch.rand(4, 3, 16, 16)
    assert (discriminator(x, ones) != discriminator(x, 2 * ones)).all()


def test_losses_equal_the_paper_s_logarithms():
    real, fake = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    by_hand = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    assert torch.allclose(main_cgan.discriminator_loss(real, fake), by_hand)
    assert torch.allclose(main_cgan.generator_loss(fake), -fake.sigmoid().log().mean())


@pytest.mark.parametrize("conditioning", ["concat", "projection"])
def test_a_step_is_the_textbook_s(conditioning, tiny, colours):
    """Plain Adam with a rate for each network, all gradients, and the losses as logarithms."""
    rates = dict(generator_lr=0.004, discriminator_lr=0.001, conditioning=conditioning)
    trainer = main_cgan.main(*tiny(main_cgan, num_epochs=0, **{**colours, **rates}))
    g, d = copy.deepcopy(trainer.generator), copy.deepcopy(trainer.discriminator)
    g_adam = torch.optim.Adam(g.parameters(), lr=0.004, betas=(0.5, 0.999))
    d_adam = torch.optim.Adam(d.parameters(), lr=0.001, betas=(0.5, 0.999))
    real, labels = torch.rand(8, 3, 16, 16) * 2 - 1, torch.tensor([0, 1, 1, 0, 1, 1, 1, 0])
    torch.manual_seed(1)
    for _ in range(3):
        fake = g(torch.randn(8, 8), labels)
        d_adam.zero_grad()
        real_logits, fake_logits = d(real, labels), d(fake.detach(), labels)
        d_loss = -(real_logits.sigmoid().log() + (1 - fake_logits.sigmoid()).log()).mean()
        d_loss.backward()
        d_adam.step()
        g_adam.zero_grad()
        g_loss = -d(fake, labels).sigmoid().log().mean()
        g_loss.backward()
        g_adam.step()
    torch.manual_seed(1)
    for _ in range(3):
        values = trainer.step(real, labels)
    for ours, theirs in ((trainer.generator, g), (trainer.discriminator, d)):
        expected = theirs.state_dict()
        for name, value in ours.state_dict().items():
            assert torch.allclose(value.float(), expected[name].float(), atol=2e-5), name
    assert torch.allclose(values["discriminator loss"], d_loss)
    assert torch.allclose(values["generator loss"], g_loss)
    assert torch.allclose(values["D(x)"], real_logits.sigmoid().mean())
    assert torch.allclose(values["D(G(z))"], fake_logits.sigmoid().mean())


@pytest.mark.parametrize("conditioning", ["concat", "projection"])
def test_each_optimiser_moves_its_own_network_alone(conditioning, tiny, colours):
    settings = tiny(main_cgan, num_epochs=0, conditioning=conditioning, **colours)
    trainer = main_cgan.main(*settings)
    batch = torch.rand(10, 3, 16, 16), torch.arange(10) % 2
    g, d = flat(trainer.generator), flat(trainer.discriminator)
    g_step = trainer.generator_optimizer.step
    trainer.generator_optimizer.step = lambda: None
    trainer.step(*batch)
    assert flat(trainer.generator).equal(g) and not flat(trainer.discriminator).equal(d)
    d = flat(trainer.discriminator)
    trainer.generator_optimizer.step = g_step
    # so that gradients which G's step would add to D are seen below
    trainer.discriminator_optimizer.step = trainer.discriminator.zero_grad
    before = {name: p.detach().clone() for name, p in trainer.generator.named_parameters()}
    trainer.step(*batch)
    assert flat(trainer.discriminator).equal(d)
    for name, p in trainer.generator.named_parameters():  # the embedding is learned too
        assert not p.equal(before[name]), name
    assert all(p.grad is None for p in trainer.discriminator.parameters())


def test_generated_images_are_judged_under_the_labels_they_were_drawn_for(tiny, colours):
    trainer = main_cgan.main(*tiny(main_cgan, num_epochs=0, **colours))
    drawn, judged, labels = [], [], torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 1, 1])
    trainer.generator.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[1]))
    trainer.discriminator.register_forward_pre_hook(lambda _, inputs: judged.append(inputs[1]))
    trainer.step(torch.rand(10, 3, 16, 16), labels)
    assert len(drawn) == 1 and len(judged) == 3
    assert all(seen.equal(labels) for seen in drawn + judged)


def test_labels_travel_with_their_images(tiny, colours, monkeypatch):
    """In a shuffled epoch every step gets red pictures under 0 and blue ones under 1."""
    step, seen = main_cgan.Trainer.step, []

    def watched(trainer, real, labels):
        assert (redness(real) > 0).equal(labels == 0)
        seen.extend(labels.tolist())
        return step(trainer, real, labels)

    monkeypatch.setattr(main_cgan.Trainer, "step", watched)
    main_cgan.main(*tiny(main_cgan, num_epochs=1, batch_size=50, horizontal_flip=True, **colours))
    assert len(seen) == 360 and set(seen) == {0, 1}, "a tenth is held out"


@pytest.fixture(scope="module")
def obedient(colours, tmp_path_factory):
    """A trainer that has learnt the two colours."""
    settings = dict(batch_size=20, num_epochs=12, sample_every=12, ema_decay=0.9, **colours)
    settings |= dict(device="cpu", num_threads=1, precision="float32")
    settings |= dict(output_dir=str(tmp_path_factory.mktemp("obedient")))
    dicts = dicts_of(main_cgan)
    for kwargs in dicts:
        for key in kwargs:
            kwargs[key] = settings.get(key, kwargs[key])
    return main_cgan.main(*dicts)


def test_the_label_decides_the_class_and_z_does_not(obedient):
    z, ones = torch.randn(200, 8), torch.ones(200, dtype=torch.long)
    red, blue = obedient.sample(z, 0 * ones), obedient.sample(z, ones)
    assert (redness(red) > 0.3).all() and (redness(blue) < -0.3).all()
    assert (red - blue).abs().mean((1, 2, 3)).min() > 0.1
    assert main_cgan.mean_distance(red) > 0.5, "but z changes the picture"


def test_a_picture_does_not_depend_on_its_batch(obedient):
    z, labels = torch.randn(64, 8), torch.arange(64) % 2
    together = obedient.sample(z, labels)
    for i in (0, 1, 63):
        alone = obedient.sample(z[i : i + 1], labels[i : i + 1])[0]
        assert torch.allclose(alone, together[i], atol=1e-6)


def test_sampling_by_label_from_a_weights_file(obedient):
    generator = main_cgan.load_generator(obedient.folder / "weights_epoch_12.pt")
    z, labels = torch.randn(3, 8), torch.tensor([0, 1, 1])
    with torch.no_grad():
        assert generator(z, labels).equal(obedient.sample(z, labels))
    assert (redness(generator.sample([0] * 50)) > 0).all()
    assert (redness(generator.sample([1] * 50)) < 0).all()
    assert not generator.sample([0]).equal(generator.sample([0])), "z is drawn anew"


@pytest.mark.parametrize("labels", [[2], [-1], [0, 5, 1], [0.5], 1, [[0, 1]], []])
def test_bad_labels_are_refused_in_one_line(labels, obedient):
    with pytest.raises(common.BadInput, match="whole numbers from 0 to 1") as caught:
        obedient.ema_generator.sample(labels)
    assert "\n" not in str(caught.value)


def test_what_is_scored_are_all_classes_in_turn(obedient):
    images, labels = obedient.generate(torch.tensor([7, 0, 5, 2]))
    assert labels.tolist() == [1, 0, 1, 0]
    assert (redness(images) > 0).equal(labels == 0)


def test_short_run_writes_the_promised_files_and_learns(tiny, colours, tmp_path):
    settings = tiny(main_cgan, num_epochs=4, sample_every=2, batch_size=20, **colours)
    main_cgan.main(*settings)
    names = {"history.csv", "checkpoint.pt", "run.html", "training.gif"}
    for epoch in (1, 2, 4):
        names |= {f"generated_image_epoch_{epoch}.png", f"train_loss_curve_{epoch}.png"}
        names |= {f"weights_epoch_{epoch}.pt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert Image.open(tmp_path / "out" / "training.gif").n_frames == 3
    history = rows(tmp_path / "out")
    columns = ["discriminator loss", "generator loss", "D(x)", "D(G(z))"]
    columns += ["diversity within class", "diversity within class, worst"]
    assert list(history[0]) == ["epoch", "data", *columns]
    losses = [float(row["discriminator loss"]) for row in history]
    assert losses[3] < losses[0] < 1.5
    assert float(history[3]["D(x)"]) > 0.6 > 0.4 > float(history[3]["D(G(z))"])


def test_distance_within_classes_leaves_out_classes_of_one_image():
    points = torch.tensor([0.0, 3.0, 10.0, 11.0, 13.0, 7.0]).view(6, 1, 1, 1)
    labels = torch.tensor([0, 0, 2, 2, 2, 1])
    assert main_cgan.distance_within_classes(points, labels) == {0: 3.0, 2: 2.0}


def test_diversity_is_that_of_samples_over_that_of_real_images_class_by_class(
    tiny, colours, tmp_path
):
    trainer = main_cgan.main(*tiny(main_cgan, num_epochs=1, batch_size=90, **colours))
    generator = main_cgan.load_generator(tmp_path / "out" / "weights_epoch_1.pt")
    reals, shares = trainer.train.pixels / 127.5 - 1, []
    for label in (0, 1):
        z = trainer.fixed_z[label::2]
        with torch.no_grad():
            samples = generator(z, torch.full((500,), label))
        same = reals[trainer.train.labels == label]
        shares.append(mean_of_pairs(samples) / mean_of_pairs(same))
    assert max(shares) < 0.5, "else the test might not tell it from its inverse"
    row = trainer.run.history[0]
    assert row["diversity within class"] == pytest.approx(sum(shares) / 2, rel=1e-4)
    assert row["diversity within class, worst"] == pytest.approx(min(shares), rel=1e-4)


def test_the_grid_has_a_row_a_class_and_a_column_a_z(obedient):
    """The pixels of the picture are those that the saved generator draws."""
    generator = main_cgan.load_generator(obedient.folder / "weights_epoch_12.pt")
    page = np.asarray(Image.open(obedient.folder / "generated_image_epoch_12.png"))
    # each of the grid's 2 rows of 10 pictures of 16 x 16 pixels, 2 pixels apart, is tripled
    grid = torch.from_numpy(page[-3 * 38 :: 3, -3 * 182 :: 3].copy()).permute(2, 0, 1)
    for label in (0, 1):
        for column in range(10):
            z = obedient.fixed_z[column : column + 1]
            with torch.no_grad():
                expected = (generator(z, torch.tensor([label]))[0] + 1) * 127.5
            y, x = 2 + 18 * label, 2 + 18 * column
            assert (grid[:, y : y + 16, x : x + 16] - expected).abs().max() < 1


def test_no_name_beside_the_grid_is_cut_off(tmp_path):
    names = ["a", "a class with quite a long name", "gjpqy"]
    images = torch.zeros(30, 1, 16, 16)
    main_cgan.save_named_grid(images, names, "title", tmp_path / "grid.png")
    page = np.asarray(Image.open(tmp_path / "grid.png"))
    height, width = 3 * 56, 3 * 182  # of the grid
    assert np.isin(page[-height:, -width:], [127, 128]).all(), "its pixels are left alone"
    margin = page[:, :-width]
    assert (margin[:, :3] == 255).all() and (margin[:, -3:] == 255).all()
    assert (page[:2] == 255).all()
    for row in range(3):  # there is ink beside each row
        top = 24 + row * height // 3
        assert (margin[top : top + height // 3] < 128).any()


@pytest.mark.parametrize("conditioning", ["concat", "projection"])
def test_bfloat16_is_for_the_networks_in_training_alone(conditioning, tiny, colours, tmp_path):
    """Weights, averages, losses and pictures stay float32, and the history has the same columns."""
    columns, dtypes = [], []
    for precision in ("float32", "bfloat16"):
        settings = dict(precision=precision, num_epochs=1, batch_size=100, **colours)
        settings["conditioning"] = conditioning
        folder = tmp_path / precision
        trainer = main_cgan.main(*tiny(main_cgan, output_dir=str(folder), **settings))
        columns.append(list(rows(folder)[0]))
        found = set()
        networks = (trainer.generator, trainer.ema_generator, trainer.discriminator)
        for network in networks:
            assert {p.dtype for p in network.parameters()} == {torch.float32}
            for module in network.modules():
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    module.register_forward_hook(lambda m, x, y, found=found: found.add(y.dtype))
        real, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 2
        values = trainer.step(real, labels)
        assert {value.dtype for value in values.values()} == {torch.float32}
        dtypes.append(found.copy())
        found.clear()
        assert trainer.sample(trainer.fixed_z, trainer.fixed_labels).dtype == torch.float32
        assert found == {torch.float32}, "pictures are not rounded"
    assert columns[0] == columns[1]
    assert dtypes == [{torch.float32}, {torch.bfloat16}]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_generator_is_judged_by_the_weights_that_d_has_just_learnt(precision, tiny, colours):
    settings = dict(precision=precision, num_epochs=0, **colours)
    trainer = main_cgan.main(*tiny(main_cgan, **settings))
    trainer.discriminator_lr.fill_(0.02)
    before, drawn = copy.deepcopy(trainer.discriminator), []
    trainer.generator.register_forward_hook(lambda _, inputs, output: drawn.append(output))
    real, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 2
    loss = trainer.step(real, labels)["generator loss"].item()
    with trainer.autocast(), torch.no_grad():
        by_new = main_cgan.generator_loss(trainer.discriminator(drawn[0], labels)).item()
        by_old = main_cgan.generator_loss(before(drawn[0], labels)).item()
    assert drawn[0].dtype == torch.float32
    assert loss == pytest.approx(by_new, rel=1e-4)
    assert loss != pytest.approx(by_old, rel=0.01)


def test_continued_run_equals_an_uninterrupted_one(tiny, colours, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = dict(horizontal_flip=True, conditioning="concat", sample_every=5, **colours)
    main_cgan.main(*tiny(main_cgan, num_epochs=3, output_dir=str(whole), **settings))
    for epochs in (2, 3):  # the second epoch's picture is left behind, but is not in the GIF
        main_cgan.main(*tiny(main_cgan, num_epochs=epochs, output_dir=str(parts), **settings))
    names = ["weights_epoch_3.pt", "history.csv", "generated_image_epoch_3.png", "training.gif"]
    for name in names:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_scores_come_every_few_epochs_and_change_nothing_else(tiny, colours, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "CLASSIFIER_STEPS", 10)
    plain, scored = tmp_path / "plain", tmp_path / "scored"
    for folder, every in ((plain, 0), (scored, 2)):
        scores = dict(output_dir=str(folder), score_every=every)
        main_cgan.main(*tiny(main_cgan, **scores, **colours))
    first, second = rows(scored)
    assert first["classifier distance"] == first["asked class"] == ""
    # each class has a mean of its own to miss
    assert float(second["classifier distance"]) < float(second["mean class distance"])
    assert 0 <= float(second["asked class, worst"]) <= float(second["asked class"]) <= 1
    for name in ("weights_epoch_2.pt", "generated_image_epoch_2.png", "training.gif"):
        assert (plain / name).read_bytes() == (scored / name).read_bytes(), name


@pytest.mark.parametrize(
    "dataset_type, channels, size",
    [("mnist", 1, 28), ("fashion_mnist", 1, 28), ("cifar10", 3, 32), ("sprites", 3, 16)],
)
def test_size_and_channels_follow_the_data(
    dataset_type, channels, size, tiny, tmp_path, monkeypatch, capsys
):
    nowhere = "http://127.0.0.1:9/"
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [nowhere])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [nowhere])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", nowhere)
    small = dict(num_epochs=1, batch_size=4500, **SMALL)
    main_cgan.main(*tiny(main_cgan, dataset_type=dataset_type, **small))
    assert "THIS IS NOT" in capsys.readouterr().err
    generator = main_cgan.load_generator(tmp_path / "out" / "weights_epoch_1.pt")
    assert generator.sample([0, 9]).shape == (2, channels, size, size)
    with pytest.raises(common.BadInput):
        generator.sample([10])


def write_pictures(folder, classes, numbers):
    for label in classes:
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(numbers):
            shade = (50 * len(label), number if label else 60 * number, 9)
            Image.new("RGB", (16, 16), shade).save(folder / label / f"{number}.png")


def test_the_animation_holds_no_file_open(tiny, colours, tmp_path, monkeypatch):
    """A run of many epochs has more pictures than a program may have files open."""
    opened, most, real_open = [], [], Image.open

    def watched(path):
        opened.append(real_open(path))
        most.append(sum(picture.fp is not None for picture in opened))
        return opened[-1]

    monkeypatch.setattr(Image, "open", watched)
    main_cgan.main(*tiny(main_cgan, **colours, num_epochs=3, sample_every=1))
    assert most == [1, 1, 1]


def test_a_class_of_equal_pictures_does_no_harm(tiny, tmp_path):
    write_pictures(tmp_path / "mine", ["a", "bb"], 4)
    (tmp_path / "mine" / "ccc").mkdir()
    for number in range(4):
        path = tmp_path / "mine" / "ccc" / f"{number}.png"
        Image.new("RGB", (16, 16), (150, 0, 9)).save(path)
    settings = dict(dataset_type="folder", data_dir=str(tmp_path / "mine"), batch_size=4)
    trainer = main_cgan.main(*tiny(main_cgan, num_epochs=1, **settings, **SMALL))
    assert trainer.run.history[0]["diversity within class"] > 0


def test_a_folder_needs_a_sub_folder_a_class(tiny, tmp_path):
    write_pictures(tmp_path / "mine", [""], 4)
    settings = dict(dataset_type="folder", data_dir=str(tmp_path / "mine"), batch_size=2)
    with pytest.raises(common.BadInput, match="sub-folder") as caught:
        main_cgan.main(*tiny(main_cgan, num_epochs=0, **settings, **SMALL))
    assert "\n" not in str(caught.value)
