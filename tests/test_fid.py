import copy
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn

import common
import datasets
import fid
import main_ae
import main_dcgan
import main_gan
import main_vae


def covariance(random, d, condition=1.0, rank=None):
    vectors = np.linalg.qr(random.standard_normal((d, d)))[0]
    values = np.geomspace(1, 1 / condition, d)
    values[rank or d:] = 0
    return vectors * values @ vectors.T


def by_sqrtm(mu1, sigma1, mu2, sigma2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # singular, and complex where it should be real: what it is known for
        middle = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return ((mu1 - mu2)**2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(middle).real


@pytest.mark.parametrize("condition", [1e1, 1e6, 1e12, 1e15])
@pytest.mark.parametrize("d, rank", [(2, None), (2, 1), (48, None), (48, 20)])
def test_distance_equals_the_one_with_a_matrix_root(d, rank, condition):
    random = np.random.default_rng(d)
    mu1, mu2 = random.standard_normal((2, d))
    sigma1, sigma2 = covariance(random, d, condition, rank), 3 * covariance(random, d, condition, rank)
    value = fid.frechet_distance(mu1, sigma1, mu2, sigma2)
    assert value == pytest.approx(by_sqrtm(mu1, sigma1, mu2, sigma2), rel=1e-6)
    assert value == pytest.approx(fid.frechet_distance(mu2, sigma2, mu1, sigma1), rel=1e-12)
    assert fid.frechet_distance(mu1, sigma1, mu1, sigma1) < 1e-8


def test_many_features_are_measured_quickly_or_else_exactly(monkeypatch):
    random, mu = np.random.default_rng(0), np.zeros(1024)
    sigma1, sigma2 = (np.cov(random.standard_normal((1024, 3000))) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svdvals", lambda _: pytest.fail("the slow way"))
        assert fid.frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(by_sqrtm(mu, sigma1, mu, sigma2), rel=1e-9)
    # nearly equal and ill-conditioned: there the rounding of the quick way would show
    axes = np.linalg.qr(random.standard_normal((1024, 1024)))[0]
    sigma, scale = axes * np.geomspace(1, 1e-8, 1024) @ axes.T, 1 + 2e-6
    wanted = (scale - 1)**2 * np.trace(sigma)
    assert fid.frechet_distance(mu, sigma, mu, scale**2 * sigma) == pytest.approx(wanted, rel=3e-4)


def test_closed_forms_are_met_exactly():
    zero = np.zeros(3)
    # one dimension: (m1 - m2)^2 + (s1 - s2)^2; diagonal matrices: the sum over the dimensions
    assert fid.frechet_distance([1.0], [[4.0]], [4.0], [[25.0]]) == pytest.approx(18, rel=1e-14)
    variances = np.array([1.0, 4.0, 0.0]), np.array([9.0, 0.0, 0.0])
    assert fid.frechet_distance(zero, np.diag(variances[0]), zero, np.diag(variances[1])) == pytest.approx(8, rel=1e-14)
    # two lines at an angle: u u^T and v v^T overlap by |u . v|
    u, v = np.array([1.0, 2.0, 2.0]), np.array([3.0, 0.0, 4.0])
    assert fid.frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(9 + 25 - 2 * 11, rel=1e-13)
    assert fid.frechet_distance(zero, 0 * np.eye(3), zero, 0 * np.eye(3)) == 0
    for broken in (np.nan, np.inf):
        with pytest.raises(common.BadInput, match="NaN or infinite"):
            fid.frechet_distance(zero, np.diag([1, 1, broken]), zero, np.eye(3))
        with pytest.raises(common.BadInput, match="NaN or infinite"):
            fid.frechet_distance(zero + broken, np.eye(3), zero, np.eye(3))


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_streaming_equals_all_at_once_far_from_zero(batch, monkeypatch):
    monkeypatch.setattr(fid, "KEPT", 20 * 5)  # of 300 images 20 are kept
    features = 1000 + torch.randn(300, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    made = fid.Statistics()
    for part in features.split(batch):
        made.add(part, torch.zeros(len(part), dtype=torch.int64))
    assert made.n == 300 and len(made.kept) == len(made.labels) == 20
    np.testing.assert_allclose(made.mu, features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(made.sigma, np.cov(features.numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_two_images_are_measured_exactly():
    x, y = torch.randn(2, 32, dtype=torch.float64), torch.randn(40, 32, dtype=torch.float64)
    u, sigma = (x[0] - x[1]) / 2**0.5, torch.cov(y.T)  # the covariance of x is u u^T, so the trace is known
    wanted = (x.mean(0) - y.mean(0)).square().sum() + u @ u + sigma.trace() - 2 * (u @ sigma @ u).sqrt()
    value = fid.Statistics().add(x).distance(fid.Statistics().add(y))
    assert value == pytest.approx(wanted.item(), rel=1e-13)


@pytest.mark.parametrize("n", [16, 31, 32, 33, 100])  # below, at and above the number of features
def test_few_images_are_measured_exactly(n):
    from pytorch_fid.fid_score import calculate_frechet_distance

    random = np.random.default_rng(n)
    x, y = random.standard_normal((n, 32)), 0.5 + random.standard_normal((40, 32)) * np.linspace(0, 2, 32)
    value = fid.Statistics().add(torch.tensor(x)).distance(fid.Statistics().add(torch.tensor(y)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = calculate_frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert value == pytest.approx(theirs, rel=1e-6)
    # what was kept, or only the covariance: the same
    assert value == pytest.approx(fid.frechet_distance(x.mean(0), np.cov(x, rowvar=False),
                                                       y.mean(0), np.cov(y, rowvar=False)), rel=1e-7)


def test_kernel_distance_equals_its_definition_and_torch_fidelity():
    from torch_fidelity.metric_kid import kid_features_to_metric

    random = np.random.default_rng(0)
    x, y = random.standard_normal((12, 6)), 0.3 + random.standard_normal((14, 6))

    def kernel(a, b):
        return (a @ b / 6 + 1)**3

    def by_definition(x, y):  # eq. (4) of Binkowski et al.: over all pairs of different images
        m = len(x)
        within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(m) for j in range(m) if i != j)
        return within / (m * (m - 1)) - 2 * sum(kernel(a, b) for a in x for b in y) / m**2

    value, error = fid.kernel_distance(torch.tensor(x), torch.tensor(y), blocks=1)
    assert value == pytest.approx(by_definition(x, y[:12]), rel=1e-12) and np.isnan(error)
    theirs = kid_features_to_metric(torch.tensor(x), torch.tensor(y[:12]), kid_subsets=1, kid_subset_size=12,
                                    verbose=False)["kernel_inception_distance_mean"]
    assert value == pytest.approx(theirs, rel=1e-10)
    parts = [by_definition(x[i:i + 4], y[i:i + 4]) for i in (0, 4, 8)]
    value, error = fid.kernel_distance(torch.tensor(x), torch.tensor(y), blocks=3)
    assert value == pytest.approx(np.mean(parts)) and error == pytest.approx(np.std(parts, ddof=1) / 3**0.5)


def test_kernel_distance_is_unbiased_and_its_error_honest():
    draw = torch.Generator().manual_seed(0)
    values, errors = zip(*(fid.kernel_distance(torch.randn(100, 4, generator=draw), torch.randn(100, 4, generator=draw))
                           for _ in range(200)))
    spread = np.std(values, ddof=1)
    assert abs(np.mean(values)) < 4 * spread / 200**0.5  # zero in the mean for equal distributions
    assert np.mean(np.square(errors))**0.5 == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("shift", [0.0, 1.0, 50.0])
def test_precision_and_recall_equal_their_definition_and_torch_fidelity(shift):
    from torch_fidelity.metric_prc import prc_features_to_metric

    random = np.random.default_rng(1)
    real, fake = random.standard_normal((60, 3)), shift + 0.5 * random.standard_normal((50, 3))

    def inside(point, points, k=3):  # f of Kynkaanniemi et al., eq. (1)
        return any(np.linalg.norm(point - one) <= np.sort(np.linalg.norm(points - one, axis=1))[k] for one in points)

    precision, recall = fid.precision_recall(torch.tensor(real), torch.tensor(fake))
    assert precision == np.mean([inside(point, real) for point in fake])
    assert recall == np.mean([inside(point, fake) for point in real])
    theirs = prc_features_to_metric(torch.tensor(fake), torch.tensor(real), verbose=False)
    assert precision == pytest.approx(theirs["precision"]) and recall == pytest.approx(theirs["recall"])


@pytest.mark.parametrize("height, width", [(28, 28), (32, 32), (65, 40), (299, 299), (400, 310)])
def test_clean_resize_equals_pillow_s_on_floats(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = fid.resized(torch.from_numpy(pixels).permute(2, 0, 1)[None], "clean")[0]
    for channel in range(3):
        image = Image.fromarray(pixels[:, :, channel].astype(np.float32), mode="F")
        theirs = np.asarray(image.resize((299, 299), Image.BICUBIC)).clip(0, 255)
        assert np.abs((ours[channel].numpy() * 128 + 128) / 255 - theirs / 255).max() < 1e-4


@pytest.fixture(scope="module")
def inceptions(tmp_path_factory):
    """pytorch-fid's network and ours with the same random weights, the latter as a path."""
    import pytorch_fid.inception
    from torchvision.models.inception import Inception3

    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            for part in (module.bias, module.running_mean):
                nn.init.normal_(part, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: network.state_dict())
        theirs = pytorch_fid.inception.InceptionV3().eval()
    return theirs, path, fid.inception_features(path, "", "legacy", torch.device("cpu"))


def write_images(folder, shapes, seed, modes=("RGB",)):
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i, (height, width) in enumerate(shapes):
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((width, height)).convert(modes[i % len(modes)]).save(folder / f"{i}.png")
    return folder


def test_inception_equals_pytorch_fid_s(inceptions):
    theirs, _, ours = inceptions
    for shape in (2, 3, 32, 32), (1, 1, 28, 28), (1, 3, 61, 43):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        with torch.no_grad():
            wanted = theirs(images.expand(-1, 3, -1, -1) / 255)[0].flatten(1)
            got = ours.see(images)
        assert got.shape == (shape[0], 2048)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().mean().item())


@pytest.mark.parametrize("modes, size", [(("RGB",), (32, 32)), (("L", "RGB"), (45, 33))])
def test_distance_of_two_folders_equals_pytorch_fid_s(modes, size, inceptions, tmp_path):
    from pytorch_fid import fid_score

    theirs, path, ours = inceptions
    folders = [write_images(tmp_path / f"{n}", [size] * n, n, modes) for n in (4, 3)]
    activations = [fid_score.get_activations(sorted(folder.glob("*.png")), theirs, batch_size=3, num_workers=0)
                   for folder in folders]
    # an orthonormal basis of the few images' span changes no distance, and spares a matrix root of 2048 x 2048
    basis = np.linalg.qr(np.concatenate(activations).T)[0]
    a, b = (rows @ basis for rows in activations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = fid_score.calculate_frechet_distance(a.mean(0), np.cov(a, rowvar=False),
                                                      b.mean(0), np.cov(b, rowvar=False))
    result = measure(tmp_path, generated=folders[0], real=folders[1], inception_weights=path, resize="legacy",
                     batch_size=3)
    assert result["inception distance"] == pytest.approx(wanted, rel=1e-3) and "FID" not in result


def measure(tmp_path, **overrides):
    dicts = [copy.deepcopy(fid.source_kwargs), copy.deepcopy(fid.metric_kwargs)]
    values = {"data_dir": tmp_path / "data", "output_dir": tmp_path / "scores", "device": "cpu", **overrides}
    for kwargs in dicts:
        kwargs.update({key: str(values[key]) if isinstance(kwargs[key], str) else values[key]
                       for key in kwargs if key in values})
    return fid.main(*dicts)


def test_folders_of_mixed_sizes_by_class(inceptions, tmp_path, capsys):
    sizes = [(32, 32), (20, 41)]
    for name, seed in ("real", 0), ("fake", 1):
        for label in "xy":
            write_images(tmp_path / name / label, sizes, seed)
    kwargs = {"generated": tmp_path / "fake", "real": tmp_path / "real", "inception_weights": inceptions[1]}
    result = measure(tmp_path, **kwargs)
    assert result["N"] == result["real's N"] == 4 and result["mean of classes"] > 0
    told = capsys.readouterr()
    assert "N 4" in told.out and "resize clean" in told.out and "features inception" in told.out
    assert "FID" not in told.out  # these weights are not its own
    assert "N 4 is few for 2048 features" in told.err
    again = measure(tmp_path, **kwargs, batch_size=1)  # one by one as in a batch: each is resized from its own size
    assert again["inception distance"] == pytest.approx(result["inception distance"])
    assert {path.suffix for path in (tmp_path / "scores").iterdir()} == {".json", ".npz", ".png"}


def test_folders_that_cannot_be_measured_are_named(inceptions, tmp_path):
    kwargs = {"inception_weights": inceptions[1], "real": write_images(tmp_path / "good", [(8, 8)] * 2, 0)}
    for name, n in ("empty", 0), ("single", 1):
        folder = write_images(tmp_path / name, [(8, 8)] * n, 0)
        with pytest.raises(common.BadInput, match=f"{name} holds {n} images.*two are the least"):
            measure(tmp_path, generated=folder, **kwargs)
    folder = write_images(tmp_path / "torn", [(8, 8)] * 2, 0)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])
    with pytest.raises(common.BadInput, match="1.png cannot be read"):
        measure(tmp_path, generated=folder, **kwargs)
    with pytest.raises(common.BadInput, match="'nowhere' is no folder.*mnist"):
        measure(tmp_path, generated="nowhere", **kwargs)


def test_inception_s_weights_are_checked(tmp_path, monkeypatch):
    torch.save({"some": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(common.BadInput, match="does not hold the weights of FID's Inception"):
        fid.inception_features(tmp_path / "other.pth", "", "clean", torch.device("cpu"))

    source = tmp_path / "served.pth"  # what the server sends is not what was asked for: nothing may stay
    source.write_bytes(b"a login page")
    monkeypatch.setattr(fid, "INCEPTION", source.as_uri().replace("served.pth", "pt_inception-2015-12-05-6726825d.pth"))
    source.rename(source.with_name("pt_inception-2015-12-05-6726825d.pth"))
    with pytest.raises(common.BadInput, match="could not be downloaded.*invalid hash"):
        fid.inception_features("", tmp_path / "data", "clean", torch.device("cpu"))
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def shared_data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def quick(monkeypatch, shared_data):
    """A classifier of few steps; its value is a data_dir where it is trained only once."""
    monkeypatch.setattr(fid, "CLASSIFIER_STEPS", 60)
    return shared_data


@pytest.fixture
def digits():
    return datasets.load_data("digits", "", False, 1, False, 28, 1, torch.device("cpu"))


def test_classifier_learns_once_and_never_calls_itself_fid(quick, digits, tmp_path, capsys):
    state = torch.get_rng_state()
    features = fid.classifier_features(*digits, tmp_path, torch.device("cpu"))
    assert float(features.name.split("(")[1].split("%")[0]) > 80
    assert features.see(digits[1].pixels[:3]).shape == (3, 128)
    assert "once" in capsys.readouterr().err
    again = fid.classifier_features(*digits, tmp_path, torch.device("cpu"))
    assert again.name == features.name and capsys.readouterr().err == ""
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(again.see(digits[1].pixels[:3]), features.see(digits[1].pixels[:3]))
    torch.manual_seed(1)  # it depends on the data alone
    assert fid.classifier_features(*digits, tmp_path / "other", torch.device("cpu")).name == features.name
    assert "FID" not in features.name + features.metric


def test_a_data_set_against_itself(quick, tmp_path, capsys, monkeypatch):
    kwargs = {"generated": "digits:test", "real": "digits:train", "features": "classifier", "num_images": 400,
              "data_dir": quick}
    result = measure(tmp_path, **kwargs)
    out = capsys.readouterr().out
    assert out.startswith("classifier distance ") and "FID" not in out and "KID" not in out and out.count("\n") == 1
    assert "N 400" in out and "resize 28x28x1" in out and "features classifier of digits" in out
    assert result["floor"] == result["classifier distance"] and result["floor's N"] == 400
    assert 0.5 < result["precision"] <= 1 and abs(result["kernel classifier distance"]) < 10 * result["standard error"]
    names = sorted(path.name for path in (tmp_path / "scores").iterdir())
    assert names == [f"classifier_distance_of_digits_test.{end}" for end in ("json", "npz", "png")]
    stored = json.loads((tmp_path / "scores" / names[0]).read_text())
    assert stored["floor"] == result["floor"] and len(stored["classes"]) == 10
    # once more: nothing is looked at again, not even by the classifier
    monkeypatch.setattr(fid.Statistics, "add", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(fid.Statistics, "class_distances", lambda *_: {})
    assert measure(tmp_path, **kwargs)["floor"] == result["floor"]


def test_the_same_images_are_at_distance_zero(quick, tmp_path):
    result = measure(tmp_path, generated="digits:test", real="digits:test", features="classifier", data_dir=quick)
    assert result["classifier distance"] < 1e-8


def test_saved_statistics_are_sources_and_other_labels_are_refused(quick, tmp_path, inceptions):
    kwargs = {"generated": "digits:test", "real": "digits:train", "features": "classifier", "data_dir": quick}
    first = measure(tmp_path, **kwargs)
    saved = tmp_path / "scores" / "classifier_distance_of_digits_test.npz"
    again = measure(tmp_path, **{**kwargs, "generated": saved})
    assert again["classifier distance"] == pytest.approx(first["classifier distance"], rel=1e-9) and again["N"] == 500
    with np.load(saved) as file:  # as pytorch-fid writes them, without a word about their making
        np.savez(tmp_path / "bare.npz", mu=file["mu"], sigma=file["sigma"])
    bare = measure(tmp_path, **{**kwargs, "generated": tmp_path / "bare.npz"})
    assert bare["classifier distance"] == pytest.approx(first["classifier distance"], rel=1e-9)
    assert bare["N"] == "unknown"
    folder = write_images(tmp_path / "few", [(28, 28)] * 2, 0)
    with pytest.raises(common.BadInput, match="not comparable: .*inception.* and .*classifier of digits"):
        measure(tmp_path, generated=saved, real=folder, inception_weights=inceptions[1])
    (tmp_path / "torn.npz").write_bytes(b"PK")
    with pytest.raises(common.BadInput, match="torn.npz holds no statistics"):
        measure(tmp_path, **{**kwargs, "generated": tmp_path / "torn.npz"})


@pytest.fixture
def trained(tiny, tmp_path):
    main_gan.main(*tiny(main_gan, num_epochs=1))
    return tmp_path / "out" / "weights_epoch_1.pt"


def test_a_folder_s_classes_go_by_name(quick, tmp_path, monkeypatch):
    test = datasets.load_data("digits", "", False, 1, False, 28, 1, "cpu")[1]
    for name, label in ("7", 7), ("3", 3):
        for number, image in enumerate(test.pixels[test.labels == label][:30]):
            common.save_grid(image[None].float(), tmp_path / "made" / name / f"{number}.png", 1, 0, 255)
    kwargs = {"generated": tmp_path / "made", "real": "digits:train", "features": "classifier", "data_dir": quick}
    assert measure(tmp_path, **kwargs)["asked class"] > 0.8
    assert set(json.loads(next((tmp_path / "scores").glob("*.json")).read_text())["classes"]) == {"3", "7"}
    monkeypatch.setattr(datasets, "_torchvision", lambda *_: (
        datasets._digits(1, 10)[0], [f"{digit} - its name" for digit in range(10)]))
    assert measure(tmp_path, **{**kwargs, "real": "mnist:train"})["asked class"] > 0.8
    (tmp_path / "made" / "7").rename(tmp_path / "made" / "second run")
    assert "asked class" not in measure(tmp_path, **kwargs)


def test_weights_without_a_class_are_compared_with_images_without_it(tiny, tmp_path):
    main_vae.main(*tiny(main_vae, num_epochs=1, hidden_size=8, latent_dim=2, iwae_samples=0, exclude_class=4))
    weights = fid.of_weights(str(tmp_path / "out" / "weights_epoch_1.pt"), 9, 0, "cpu")
    assert 4 not in fid.open_source("digits:train", 9, 0, "data", "cpu", weights).pair[0].labels


def test_a_weights_file_is_rebuilt_and_sampled(quick, trained, tmp_path, monkeypatch, capsys):
    kwargs = {"features": "classifier", "num_images": 300, "data_dir": quick}
    result = measure(tmp_path, generated=trained, **kwargs)
    assert result["real"] == "digits:train" and result["classifier distance"] > 2 * result["floor"]
    # the same seed gives the same images, however they are batched; another seed does not
    assert measure(tmp_path, generated=trained, **kwargs, batch_size=7)["classifier distance"] == pytest.approx(
        result["classifier distance"], rel=1e-6)
    other = measure(tmp_path, generated=trained, **kwargs, seed=1)
    assert other["classifier distance"] != result["classifier distance"]
    monkeypatch.chdir(tmp_path)  # without a name it is the newest below the current folder
    assert measure(tmp_path, **kwargs)["generated"] == "out/weights_epoch_1.pt"
    source = fid.of_weights(str(trained), 4, 0, torch.device("cpu"))
    z = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    wanted = (127.5 * (main_gan.load_generator(trained)(z) + 1)).round().byte().view(4, 1, 28, 28)
    assert torch.equal(source.read(torch.tensor([2, 0]))[0][0], wanted[[2, 0]])

    contents = torch.load(trained, weights_only=True)
    for script in ("os", "common"):
        common.save(tmp_path / "strange.pt", {**contents, "script": script})
        with pytest.raises(common.BadInput, match=f"{script}.py is no script of this collection that has a generator"):
            measure(tmp_path, generated=tmp_path / "strange.pt", **kwargs)


@pytest.mark.parametrize("script, low, small", [(main_vae, 0, dict(hidden_size=16, iwae_samples=0)),
                                                (main_ae, -1, dict(feature_maps=4, image_size=16, batch_size=500))])
def test_a_decoder_is_a_generator_too(script, low, small, tiny, tmp_path):
    trainer = script.main(*tiny(script, num_epochs=1, latent_dim=4, **small))
    path = str(tmp_path / "out" / "weights_epoch_1.pt")
    decoder = script.load_model(path)[1]
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    wanted = ((decoder.sample(z) - low) / (1 - low) * 255).round().byte().view(6, *trainer.train.pixels.shape[1:])
    source = fid.of_weights(path, 6, 3, torch.device("cpu"))
    assert torch.equal(source.read(torch.arange(6))[0][0], wanted) and source.data == "digits"


def test_weights_of_a_folder_are_compared_with_the_pixels_of_training(tiny, tmp_path, quick):
    folder, inner = tmp_path / "mine$1$", tmp_path / "mine$1$" / "a $x_$"
    inner.mkdir(parents=True)
    for number in range(40):
        size = (30 + number, 20)  # wider than high: training sees the middle
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), np.uint8)).save(
            (folder if number % 2 else inner) / f"{number}.png")
    trainer = main_dcgan.main(*tiny(main_dcgan, num_epochs=1, dataset_type="folder", data_dir=str(folder), batch_size=9,
                                    feature_maps=2, image_size=16))
    assert trainer.train.name == "folder mine_1_" and trainer.train.class_names == ["", "a _x__"]
    weights = str(tmp_path / "out" / "weights_epoch_1.pt")
    seen = fid.open_source("folder:train", 9, 0, folder, torch.device("cpu"), fid.of_weights(weights, 9, 0, "cpu"))
    assert torch.equal(seen.pair[0].pixels, trainer.train.pixels)
    result = measure(tmp_path, generated=weights, features="classifier", num_images=20, data_dir=folder)
    assert result["real"] == "folder:train" and result["real's N"] == 36
    with pytest.raises(common.BadInput, match="trained on a folder mine_1_: say where it is with --data_dir"):
        measure(tmp_path, generated=weights, features="classifier", data_dir=tmp_path)


def test_the_jpeg_quality_of_training_is_found_again(tmp_path, monkeypatch):
    asked = {}

    def load(*args, **kwargs):
        asked.update(kwargs)
        raise common.BadInput("no birds here")

    monkeypatch.setattr(datasets, "load_data", load)
    monkeypatch.setattr(main_gan, "load_generator", lambda path: nn.Linear(2, 784).eval())
    for name, quality in (("cub (JPEG quality 75)", 75), ("cub", 0)):
        common.save(tmp_path / "w.pt", {"script": "main_gan", "data": name, "model_kwargs": {"latent_dim": 2}})
        with pytest.raises(common.BadInput, match="no birds here"):
            measure(tmp_path, generated=tmp_path / "w.pt", num_images=2)
        assert asked["jpeg_quality"] == quality


def test_conditional_generators_are_asked_for_every_class(tmp_path, monkeypatch):
    class Conditional(nn.Module):
        def forward(self, z, labels):
            return (labels / 4 - 1).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)

    monkeypatch.setattr(main_gan, "load_generator", lambda path: Conditional())
    common.save(tmp_path / "w.pt", {"script": "main_gan", "data": "digits",
                                    "model_kwargs": {"latent_dim": 2, "num_classes": 5}})
    images, labels = fid.of_weights(str(tmp_path / "w.pt"), 10, 0, torch.device("cpu")).read(torch.arange(7))
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert images[0][:, 0, 0, 0].tolist() == [0, 32, 64, 96, 128, 0, 32]


def test_scoring_in_training_leaves_the_random_numbers_alone(quick, digits, tmp_path):
    train, test = digits
    score = fid.Scorer(train, test, 300, "classifier", quick)
    assert score.name == "classifier distance" and 0 < score.floor < 100

    asked = []

    def generate(index):  # real images, with their labels
        asked.extend(index.tolist())
        return train.batch(torch.randint(len(train), index.shape))

    state = torch.get_rng_state()
    first = score(generate)
    assert sorted(asked) == list(range(300)), "so that classes can take turns whatever the size of a batch"
    assert torch.equal(state, torch.get_rng_state())
    torch.randn(5)
    assert score(generate) == first < 2 * score.floor  # the same noise in every call
    assert sorted(score.class_distances) == list(range(10))
    assert score(lambda i: torch.randn(len(i), 784).clamp(-1, 1)) > 10 * score.floor and score.class_distances == {}


def test_neighbours_show_a_memorised_image(quick, digits, tmp_path, monkeypatch):
    train, _ = digits
    features = fid.classifier_features(*digits, quick, torch.device("cpu"))
    copied = 17

    def generate(index):  # noise, but for one training image
        images = torch.rand(len(index), 1, 28, 28, generator=torch.Generator().manual_seed(int(index[0]))) * 2 - 1
        images[index == 3] = train.batch(torch.tensor([copied]))[0]
        return images

    reals, fakes = fid.of_images(digits, "train", quick), fid.of_generator("copier", 20, generate)
    shown = []
    monkeypatch.setattr(common, "save_grid", lambda images, path, columns, **_: shown.append((images, columns)))
    fid.save_neighbours("", fakes, fid.measure(fakes, features, 20, 5), reals, fid.measure(reals, features, 5000, 500))
    (images, columns), = shown
    assert images.shape == (8 * 9, 3, 56, 56) and columns == 9
    assert torch.equal(images[0], images[2])  # the copy comes first, beside its original


def test_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    for options, words in ((["--features", "vgg"], "features is 'vgg'; legal: inception | classifier"),
                           (["--num_images", "1"], "num_images is 1; legal: >= 2"),
                           (["--generated", "digits:test", "--features", "classifier"],
                            "digits:test does not say what it was trained on: give --real"),
                           (["--generated", str(tmp_path / "none.pt")], "there is no file"),
                           ([], "no folder here holds a weights_*.pt with a generator; train first: "
                                "python main_gan.py")):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["fid.py", *options])
        with pytest.raises(SystemExit) as stop:
            common.run(fid.main, fid.source_kwargs, fid.metric_kwargs)
        told = capsys.readouterr().err
        assert stop.value.code == 2 and words in told and told.count("\n") == 1


def test_classes_are_told_apart_and_labels_compared():
    x, y, labels = torch.randn(60, 4), torch.randn(60, 4), torch.arange(60) % 2
    a, b = fid.Statistics("one way").add(x, labels), fid.Statistics("one way").add(y, labels)
    by_hand = fid.Statistics().add(x[labels == 1]).distance(fid.Statistics().add(y[labels == 1]))
    assert a.class_distances(b)[1] == pytest.approx(by_hand, rel=1e-9)
    b.label = "another way"
    with pytest.raises(common.BadInput, match="not comparable: one way and another way"):
        a.distance(b)


def test_other_images_under_the_same_name_are_measured_anew(digits, tmp_path):
    features = SimpleNamespace(see=lambda images: images[:, 0, 10:12, 14].float(), name="two pixels", resize="none",
                               metric="distance")
    before = fid.measure(fid.of_images(digits, "test", tmp_path), features, 100, 50)
    digits[1].pixels.copy_(255 - digits[1].pixels)
    after = fid.measure(fid.of_images(digits, "test", tmp_path), features, 100, 50)
    torch.testing.assert_close(after.mu, 255 - before.mu)


def test_code_of_others_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("load_generator = 1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    common.save(tmp_path / "w.pt", {"script": "stranger", "data": "digits", "model_kwargs": {}})
    with pytest.raises(common.BadInput, match="stranger.py is no script of this collection"):
        fid.of_weights(str(tmp_path / "w.pt"), 4, 0, torch.device("cpu"))
