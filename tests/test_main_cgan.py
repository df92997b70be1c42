import numpy as np
import pytest
import torch
from PIL import Image

import common
import fid
import main_cgan

SMALL = dict(feature_maps=4, latent_dim=8, embedding_dim=4, generator_lr=0.001, discriminator_lr=0.001)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A folder with two classes of noisy pictures that are quick to learn: red ones and blue ones."""
    folder, random = tmp_path_factory.mktemp("colours"), np.random.RandomState(0)
    labels = np.arange(400) % 2
    pixels = random.randint(0, 90, (400, 16, 16, 3), dtype=np.uint8)
    pixels[np.arange(400), :, :, 2 * labels] += random.randint(90, 160, (400, 1, 1), dtype=np.uint8)
    np.savez(folder / "sprites.npz", images=pixels, labels=labels, class_names=["red", "blue"])
    return dict(dataset_type="sprites", data_dir=str(folder), **SMALL)


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def networks(size=16, channels=3, conditioning="projection", classes=5):
    generator = main_cgan.Generator(latent_dim=8, embedding_dim=4, feature_maps=4, image_channels=channels,
                                    image_size=size, num_classes=classes)
    return generator, main_cgan.Discriminator(feature_maps=4, conditioning=conditioning, image_channels=channels,
                                              image_size=size, num_classes=classes)


@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("conditioning", ["concat", "projection"])
@pytest.mark.parametrize("classes", [2, 11])
def test_shapes_at_every_size(size, channels, conditioning, classes):
    generator, discriminator = networks(size, channels, conditioning, classes)
    labels = torch.tensor([0, classes - 1])
    images = generator(torch.randn(2, 8), labels)
    assert images.shape == (2, channels, size, size) and images.abs().max() <= 1
    assert discriminator(images, labels).shape == (2,)


@pytest.mark.parametrize("size", [20, -1, 33])
def test_impossible_sizes_name_the_legal_ones(size):
    with pytest.raises(common.BadInput, match="16, 28, 32 or 64"):
        networks(size)


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


def test_concat_shows_the_label_as_constant_channels(monkeypatch):
    _, discriminator = networks(conditioning="concat")
    x, labels, seen = torch.rand(3, 3, 16, 16), torch.tensor([4, 0, 2]), []
    discriminator.phi[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    discriminator(x, labels)
    assert seen[0].shape == (3, 8, 16, 16) and seen[0][:, :3].equal(x)
    for shown, label in zip(seen[0][:, 3:], labels):
        assert shown.unique().tolist() == [0, 1] and (shown[label] == 1).all() and shown.sum() == 256


@pytest.mark.parametrize("conditioning", ["concat", "projection"])
def test_the_label_counts_for_both_networks(conditioning):
    generator, discriminator = networks(conditioning=conditioning)
    generator.eval(), discriminator.eval()
    z, ones = torch.randn(4, 8), torch.ones(4, dtype=torch.long)
    assert not any(a.equal(b) for a, b in zip(generator(z, ones), generator(z, 2 * ones)))
    x = torch.rand(4, 3, 16, 16)
    assert (discriminator(x, ones) != discriminator(x, 2 * ones)).all()


def test_losses_equal_the_paper_s_logarithms():
    real, fake = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    by_hand = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    assert torch.allclose(main_cgan.discriminator_loss(real, fake), by_hand)
    assert torch.allclose(main_cgan.generator_loss(fake), -fake.sigmoid().log().mean())


@pytest.mark.parametrize("conditioning", ["concat", "projection"])
def test_each_optimiser_moves_its_own_network_alone(conditioning, tiny, colours):
    trainer = main_cgan.main(*tiny(main_cgan, num_epochs=0, conditioning=conditioning, **colours))
    batch = torch.rand(10, 3, 16, 16), torch.arange(10) % 2
    g, d = flat(trainer.generator), flat(trainer.discriminator)
    g_step = trainer.generator_optimizer.step
    trainer.generator_optimizer.step = lambda: None
    trainer.step(*batch)
    assert flat(trainer.generator).equal(g) and not flat(trainer.discriminator).equal(d)
    d = flat(trainer.discriminator)
    trainer.generator_optimizer.step = g_step
    trainer.discriminator_optimizer.step = trainer.discriminator.zero_grad
    before = {name: p.detach().clone() for name, p in trainer.generator.named_parameters()}
    trainer.step(*batch)
    assert flat(trainer.discriminator).equal(d)
    for name, p in trainer.generator.named_parameters():  # the embedding too is learned
        assert not p.equal(before[name]), name
    assert all(p.grad is None for p in trainer.discriminator.parameters()), "no gradient for D in G's step"


def test_generated_images_are_judged_under_the_labels_they_were_drawn_for(tiny, colours):
    trainer = main_cgan.main(*tiny(main_cgan, num_epochs=0, **colours))
    drawn, judged, labels = [], [], torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 1, 1])
    trainer.generator.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[1]))
    trainer.discriminator.register_forward_pre_hook(lambda _, inputs: judged.append(inputs[1]))
    trainer.step(torch.rand(10, 3, 16, 16), labels)
    assert len(drawn) == 1 and len(judged) == 3 and all(seen.equal(labels) for seen in drawn + judged)


@pytest.fixture(scope="module")
def obedient(colours, tmp_path_factory):
    """A trainer that has learnt the two colours."""
    settings = dict(colours, batch_size=20, num_epochs=12, sample_every=12, device="cpu", num_threads=1, ema_decay=0.9,
                    output_dir=str(tmp_path_factory.mktemp("obedient")))
    return main_cgan.main(*({key: settings.get(key, value) for key, value in kwargs.items()} for kwargs in
                            (main_cgan.model_kwargs, main_cgan.dataset_kwargs, main_cgan.trainer_kwargs)))


def redness(images):
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def test_the_label_decides_the_class_and_z_does_not(obedient):
    z = torch.randn(200, 8)
    red, blue = (obedient.sample([label] * 200, z) for label in (0, 1))
    assert (redness(red) > 0.3).all() and (redness(blue) < -0.3).all(), "whatever z is, the class is the asked one"
    assert (red - blue).abs().mean((1, 2, 3)).min() > 0.1, "the same z under another label is another picture"
    assert common.mean_distance(red) > 0.5, "but z changes the picture"


def test_a_picture_does_not_depend_on_its_batch(obedient):
    z, labels = torch.randn(64, 8), torch.arange(64) % 2
    together = obedient.sample(labels, z)
    for i in (0, 1, 63):
        assert torch.allclose(obedient.sample(labels[i:i + 1], z[i:i + 1])[0], together[i], atol=1e-6)


def test_sampling_by_label_from_a_weights_file(obedient):
    generator, z = main_cgan.load_generator(obedient.run.folder / "weights_epoch_12.pt"), torch.randn(3, 8)
    assert generator.sample([0, 1, 1], z).equal(obedient.sample(torch.tensor([0, 1, 1]), z))
    assert (redness(generator.sample([0] * 50)) > 0).all() and (redness(generator.sample([1] * 50)) < 0).all()
    assert not generator.sample([0]).equal(generator.sample([0])), "z is drawn anew"


@pytest.mark.parametrize("labels", [[2], [-1], [0, 5, 1], [0.5], 1, [[0, 1]], []])
def test_bad_labels_are_refused_in_one_line(labels, obedient):
    with pytest.raises(common.BadInput, match="whole numbers from 0 to 1") as caught:
        obedient.sample(labels)
    assert "\n" not in str(caught.value)


def test_fid_measures_a_conditional_generator_class_by_class(obedient, colours, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "CLASSIFIER_STEPS", 30)
    result = fid.main({**fid.source_kwargs, "generated": str(obedient.run.folder / "weights_epoch_12.pt"),
                       "data_dir": colours["data_dir"], "num_images": 200},
                      {**fid.metric_kwargs, "features": "classifier", "output_dir": str(tmp_path), "device": "cpu"})
    assert result["asked class"] == result["asked class, worst"] == 1 and 0 < result["diversity within class"] < 2
    # every other picture under the wrong name of class 0: half of it is seen as asked
    wrong = fid.Statistics("").add(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([0, 0, 1, 1]))
    sign = fid.SimpleNamespace(classify=lambda seen: (seen[:, 0] < 0).long(), device="cpu")
    assert fid.obedience(sign, wrong) == {0: 0.5, 1: 0.5}
    points = torch.tensor([0.0, 3.0, 10.0, 11.0, 13.0, 7.0]).view(6, 1, 1, 1)
    assert fid.distance_within_classes(points, torch.tensor([0, 0, 2, 2, 2, 1])) == {0: 3.0, 2: 2.0}


def test_fid_compares_a_stand_in_s_five_classes_with_the_same_five(tiny):
    trainer = main_cgan.main(*tiny(main_cgan, dataset_type="sprites", num_epochs=0, **SMALL))  # there are no sprites
    trainer.run.save_weights(generator=trainer.ema_generator)
    fakes = fid.of_weights(trainer.run.folder / "weights_epoch_0.pt", 50, 0, "cpu")
    assert fakes.data.startswith("digits ") and fakes.read(torch.arange(50))[1].unique().tolist() == [0, 1, 2, 3, 4]
    reals = fid.open_source("digits:train", 50, 0, "nowhere", "cpu", like=fakes)
    assert len(reals.pair[0].class_names) == 5 and reals.pair[0].labels.max() == 4
    assert reals.read(torch.arange(1))[0][0].shape == (1, 3, 16, 16)


def test_short_run_writes_the_promised_files_and_learns(tiny, colours, tmp_path):
    trainer = main_cgan.main(*tiny(main_cgan, sample_every=1, batch_size=20, **colours))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "history.csv", "checkpoint.pt", "training.gif", *(f"generated_image_epoch_{e}.png" for e in (1, 2)),
        *(f"train_loss_curve_{e}.png" for e in (1, 2)), *(f"weights_epoch_{e}.pt" for e in (1, 2))}
    history = trainer.run.history
    assert history["discriminator loss"][-1] < history["discriminator loss"][0] < 1.5
    assert history["D(x)"][-1] > 0.6 > 0.4 > history["D(G(z))"][-1]
    assert 0 < history["diversity within class, worst"][-1] <= history["diversity within class"][-1]
    assert torch.load(tmp_path / "out" / "weights_epoch_2.pt")["model_kwargs"]["num_classes"] == 2


def test_the_grid_has_a_row_a_class_and_a_column_a_z(tiny, colours, monkeypatch):
    drawn = []
    monkeypatch.setattr(main_cgan, "save_named_grid", lambda images, names, *_: drawn.append((images, names)))
    trainer = main_cgan.main(*tiny(main_cgan, num_epochs=1, **colours))
    (images, names), = drawn
    assert names == ["red", "blue"] and len(images) == 20
    for row, column in ((0, 0), (0, 7), (1, 9)):
        expected = trainer.sample([row], trainer.fixed_z[column:column + 1])[0]
        assert torch.allclose(images[10 * row + column], expected, atol=1e-6)


def test_no_name_beside_the_grid_is_cut_off(tmp_path):
    names = ["a", "a class with quite a long name", "gjpqy"]
    main_cgan.save_named_grid(torch.zeros(30, 1, 16, 16), names, "title", tmp_path / "grid.png")
    page = np.asarray(Image.open(tmp_path / "grid.png"))
    common.save_grid(torch.zeros(30, 1, 16, 16), tmp_path / "bare.png", columns=10)
    bare = np.asarray(Image.open(tmp_path / "bare.png"))
    height, width = bare.shape
    assert (page[-height:, -width:] == bare).all(), "the pixels of the grid are left alone"
    margin = page[:, :-width]
    assert (margin[:, :3] == 255).all() and (margin[:, -3:] == 255).all() and (page[:2] == 255).all()
    for row in range(3):  # ink in the middle of each row
        assert (margin[24 + row * height // 3:24 + (row + 1) * height // 3] < 128).any()


@pytest.mark.parametrize("conditioning", ["concat", "projection"])
def test_continued_run_equals_an_uninterrupted_one(conditioning, tiny, colours, tmp_path):
    settings = dict(horizontal_flip=True, conditioning=conditioning, sample_every=1, **colours)
    main_cgan.main(*tiny(main_cgan, num_epochs=3, output_dir=str(tmp_path / "whole"), **settings))
    for epochs in (1, 3):
        main_cgan.main(*tiny(main_cgan, num_epochs=epochs, output_dir=str(tmp_path / "parts"), **settings))
    for name in ("weights_epoch_3.pt", "history.csv", "generated_image_epoch_3.png", "training.gif"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    assert Image.open(tmp_path / "parts" / "training.gif").n_frames == 3


def test_distances_are_logged_every_few_epochs_and_change_nothing_else(tiny, colours, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "CLASSIFIER_STEPS", 10)
    plain = main_cgan.main(*tiny(main_cgan, output_dir=str(tmp_path / "plain"), **colours))
    scored = main_cgan.main(*tiny(main_cgan, output_dir=str(tmp_path / "scored"), score_every=2, **colours))
    history, classes = scored.run.history, scored.score.class_distances
    assert all(history[name][0] != history[name][0] for name in ("classifier distance", "asked class"))
    assert sorted(classes) == [0, 1] and history["mean class distance"][1] == sum(classes.values()) / 2
    assert history["classifier distance"][1] < history["mean class distance"][1], "each class has its own mean to miss"
    assert 0 <= history["asked class, worst"][1] <= history["asked class"][1] <= 1
    assert flat(plain.generator).equal(flat(scored.generator)), "the random numbers of training are left as they were"


@pytest.mark.parametrize("dataset_type, classes, channels, size", [
    ("mnist", 10, 1, 28), ("cifar10", 10, 3, 32), ("sprites", 5, 3, 16), ("digits", 10, 3, 28)])
def test_size_channels_and_classes_follow_the_data(dataset_type, classes, channels, size, tiny, monkeypatch, capsys):
    import datasets

    def offline(*_):
        raise OSError("offline")

    monkeypatch.setattr(datasets, "_torchvision", offline)
    trainer = main_cgan.main(*tiny(main_cgan, dataset_type=dataset_type, num_epochs=0, **SMALL))
    assert trainer.sample([classes - 1]).shape == (1, channels, size, size)
    with pytest.raises(common.BadInput):
        trainer.sample([classes])
    assert ("THIS IS NOT" in capsys.readouterr().err) == (dataset_type != "digits")


def test_every_class_is_scored_equally_often_and_one_of_equal_pictures_does_no_harm(tiny, tmp_path):
    for label in range(3):
        for number in range(4):
            shade = 50 * label + (number if label else 0)
            (tmp_path / "mine" / f"{label}").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (shade, shade, 9)).save(tmp_path / "mine" / f"{label}" / f"{number}.png")
    trainer = main_cgan.main(*tiny(main_cgan, dataset_type="folder", data_dir=str(tmp_path / "mine"), batch_size=4,
                                   num_epochs=1, **SMALL))
    assert trainer.run.history["diversity within class"][0] > 0
    assert trainer.draw(torch.tensor([7, 0, 5]))[1].tolist() == [1, 0, 2]


def test_a_folder_needs_a_sub_folder_a_class(tmp_path, command_line):
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    status, error = command_line(main_cgan, "--dataset_type", "folder", "--data_dir", tmp_path, "--batch_size", 2,
                                 "--output_dir", tmp_path / "out", "--device", "cpu", "--num_epochs", 0)
    assert status == 2 and "sub-folder" in error and len(error.splitlines()) == 1
