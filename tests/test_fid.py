import copy
import hashlib
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn

import common
import fid
import main_ae
import main_dcgan
import main_gan
import main_vae


def covariance(random, d, condition=1.0, rank=None):
    vectors = np.linalg.qr(random.standard_normal((d, d)))[0]
    values = np.geomspace(1, 1 / condition, d)
    values[rank or d :] = 0
    return vectors * values @ vectors.T


def by_sqrtm(mu1, sigma1, mu2, sigma2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # singular, and complex where it should be real
        middle = scipy.linalg.sqrtm(sigma1 @ sigma2)
    traces = np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(middle).real
    return ((mu1 - mu2) ** 2).sum() + traces


def statistics(features):
    mu, root = fid.mean_and_root(torch.as_tensor(features))
    return fid.Statistics(len(features), mu, root)


# ----------------------------------------------------------------------- distances


@pytest.mark.parametrize("condition", [1e1, 1e6, 1e12, 1e15])
@pytest.mark.parametrize("d, rank", [(2, None), (2, 1), (48, None), (48, 20)])
def test_distance_equals_the_one_with_a_matrix_root(d, rank, condition):
    random = np.random.default_rng(d)
    mu1, mu2 = random.standard_normal((2, d))
    sigma1 = covariance(random, d, condition, rank)
    sigma2 = 3 * covariance(random, d, condition, rank)
    value = fid.frechet_distance(mu1, sigma1, mu2, sigma2)
    assert value == pytest.approx(by_sqrtm(mu1, sigma1, mu2, sigma2), rel=1e-6)
    assert value == pytest.approx(fid.frechet_distance(mu2, sigma2, mu1, sigma1), rel=1e-12)
    assert fid.frechet_distance(mu1, sigma1, mu1, sigma1) < 1e-8


def test_closed_forms_are_met_exactly():
    zero = np.zeros(3)
    # one dimension: (m1 - m2)^2 + (s1 - s2)^2; diagonal matrices: the sum over the dimensions
    assert fid.frechet_distance([1.0], [[4.0]], [4.0], [[25.0]]) == pytest.approx(18, rel=1e-14)
    one, other = np.diag([1.0, 4.0, 0.0]), np.diag([9.0, 0.0, 0.0])
    assert fid.frechet_distance(zero, one, zero, other) == pytest.approx(8, rel=1e-14)
    # two lines at an angle: u u^T and v v^T overlap by |u . v|
    u, v = np.array([1.0, 2.0, 2.0]), np.array([3.0, 0.0, 4.0])
    value = fid.frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v))
    assert value == pytest.approx(9 + 25 - 2 * 11, rel=1e-13)
    assert fid.frechet_distance(zero, 0 * np.eye(3), zero, 0 * np.eye(3)) == 0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(broken):
    features = torch.randn(20, 3)
    features[4, 1] = broken
    with pytest.raises(common.BadInput, match="NaN or infinite"):
        statistics(features).distance(statistics(torch.randn(20, 3)))
    with pytest.raises(common.BadInput, match="NaN or infinite"):
        fid.frechet_distance(np.zeros(3) + broken, np.eye(3), np.zeros(3), np.eye(3))


def test_mean_and_root_give_the_covariance_far_from_zero():
    spread = torch.randn(5, 5, dtype=torch.float64)
    features = 1000 + torch.randn(300, 5, dtype=torch.float64) @ spread
    mu, root = fid.mean_and_root(features)
    np.testing.assert_allclose(mu, features.numpy().mean(0), rtol=1e-12)
    wanted = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(root @ root.T, wanted, rtol=1e-10, atol=1e-12)


def test_two_images_are_measured_exactly():
    x, y = torch.randn(2, 32, dtype=torch.float64), torch.randn(40, 32, dtype=torch.float64)
    # the covariance of x is u u^T, so the trace is known
    u, sigma = (x[0] - x[1]) / 2**0.5, torch.cov(y.T)
    wanted = (x.mean(0) - y.mean(0)).square().sum() + u @ u + sigma.trace()
    wanted -= 2 * (u @ sigma @ u).sqrt()
    assert statistics(x).distance(statistics(y)) == pytest.approx(wanted.item(), rel=1e-13)


@pytest.mark.parametrize("n", [16, 31, 32, 33, 100])  # below, at and above the features
def test_few_images_are_measured_exactly(n):
    from pytorch_fid.fid_score import calculate_frechet_distance

    random = np.random.default_rng(n)
    x = random.standard_normal((n, 32))
    y = 0.5 + random.standard_normal((40, 32)) * np.linspace(0, 2, 32)
    gaussians = x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
    value = statistics(x).distance(statistics(y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = calculate_frechet_distance(*gaussians)
    assert value == pytest.approx(theirs, rel=1e-6)
    # from the features, or only from the covariance: the same
    assert value == pytest.approx(fid.frechet_distance(*gaussians), rel=1e-7)


def test_another_number_of_features_is_refused():
    with pytest.raises(common.BadInput, match="4 and 5 features cannot be compared"):
        statistics(torch.randn(60, 4)).distance(statistics(torch.randn(60, 5)))


def test_kernel_distance_equals_its_definition_and_torch_fidelity():
    from torch_fidelity.metric_kid import kid_features_to_metric

    random = np.random.default_rng(0)
    x, y = random.standard_normal((12, 6)), 0.3 + random.standard_normal((14, 6))

    def kernel(a, b):
        return (a @ b / 6 + 1) ** 3

    def by_definition(x, y):  # eq. (4) of Binkowski et al.: over all pairs of different images
        m, within = len(x), 0
        for z in (x, y):
            for i in range(m):
                within += sum(kernel(z[i], z[j]) for j in range(m) if i != j)
        return within / (m * (m - 1)) - 2 * sum(kernel(a, b) for a in x for b in y) / m**2

    x_tensor, y_tensor = torch.tensor(x), torch.tensor(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one block has no spread
        value, error = fid.kernel_distance(x_tensor, y_tensor, blocks=1)
    assert value == pytest.approx(by_definition(x, y[:12]), rel=1e-12) and np.isnan(error)
    theirs = kid_features_to_metric(
        x_tensor, y_tensor[:12], kid_subsets=1, kid_subset_size=12, verbose=False
    )
    assert value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    parts = [by_definition(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
    value, error = fid.kernel_distance(x_tensor, y_tensor, blocks=3)
    assert value == pytest.approx(np.mean(parts))
    assert error == pytest.approx(np.std(parts, ddof=1) / 3**0.5)


def test_kernel_distance_is_unbiased_and_its_error_honest():
    values, errors = [], []
    for _ in range(200):
        value, error = fid.kernel_distance(torch.randn(100, 4), torch.randn(100, 4))
        values.append(value)
        errors.append(error)
    spread = np.std(values, ddof=1)
    assert abs(np.mean(values)) < 4 * spread / 200**0.5  # zero for equal distributions
    assert np.mean(np.square(errors)) ** 0.5 == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("shift", [0.0, 1.0, 50.0])
def test_shares_covered_equal_their_definition_and_torch_fidelity(shift):
    from torch_fidelity.metric_prc import prc_features_to_metric

    random = np.random.default_rng(1)
    real = random.standard_normal((60, 3))
    fake = shift + 0.5 * random.standard_normal((50, 3))

    def inside(point, points, k=3):  # f of Kynkaanniemi et al., eq. (1)
        for one in points:
            reach = np.sort(np.linalg.norm(points - one, axis=1))[k]
            if np.linalg.norm(point - one) <= reach:
                return True
        return False

    precision = fid.share_covered(torch.tensor(fake), torch.tensor(real))
    recall = fid.share_covered(torch.tensor(real), torch.tensor(fake))
    assert precision == np.mean([inside(point, real) for point in fake])
    assert recall == np.mean([inside(point, fake) for point in real])
    theirs = prc_features_to_metric(torch.tensor(fake), torch.tensor(real), verbose=False)
    assert precision == pytest.approx(theirs["precision"])
    assert recall == pytest.approx(theirs["recall"])


# ----------------------------------------------------------------------- Inception


@pytest.mark.parametrize("height, width", [(28, 28), (65, 40), (299, 299), (400, 310)])
def test_clean_resize_equals_pillow_s_on_floats(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = fid.resized(torch.from_numpy(pixels).permute(2, 0, 1)[None], "clean")[0]
    for channel in range(3):
        image = Image.fromarray(pixels[:, :, channel].astype(np.float32), mode="F")
        theirs = np.asarray(image.resize((299, 299), Image.BICUBIC)).clip(0, 255)
        assert np.abs((ours[channel].numpy() * 128 + 128) / 255 - theirs / 255).max() < 1e-4


@pytest.fixture(scope="module")
def inceptions(tmp_path_factory):
    """pytorch-fid's network and ours with the same random weights, and the path of these."""
    import pytorch_fid.inception
    from torchvision.models.inception import Inception3

    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    with pytest.MonkeyPatch.context() as patch:
        load = "load_state_dict_from_url"
        patch.setattr(pytorch_fid.inception, load, lambda *_, **__: network.state_dict())
        theirs = pytorch_fid.inception.InceptionV3().eval()
        patch.setattr(fid, "INCEPTION_SHA", sha)
        ours = fid.inception_features(path, "", "legacy", torch.device("cpu"))
    return theirs, ours, path, sha


def write_images(folder, count, size, seed, mode="RGB"):
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((size, size)).convert(mode).save(folder / f"{i}.png")
    return folder


def test_inception_equals_pytorch_fid_s(inceptions):
    theirs, ours, _, _ = inceptions
    for shape in (1, 1, 28, 28), (2, 3, 61, 43):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        with torch.no_grad():
            wanted = theirs(images.expand(-1, 3, -1, -1) / 255)[0].flatten(1)
            got = ours.compute(images)
        assert got.shape == (shape[0], 2048)
        allowed = 1e-4 * wanted.abs().mean().item()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=allowed)


def test_loading_inception_leaves_the_random_numbers_alone(inceptions):
    """Scoring by it changes no training; torchvision draws weights even if it need not."""
    before = torch.get_rng_state()
    fid.load_inception(inceptions[2])
    assert torch.get_rng_state().equal(before)


def test_distance_of_two_folders_equals_pytorch_fid_s(inceptions, tmp_path, monkeypatch, capsys):
    from pytorch_fid import fid_score

    theirs, _, path, sha = inceptions
    folders = [write_images(tmp_path / f"{n}", n, 40, n) for n in (3, 2)]
    activations = []
    for folder in folders:
        files = sorted(folder.glob("*.png"))
        activations.append(fid_score.get_activations(files, theirs, batch_size=3, num_workers=0))
    # an orthonormal basis of the few images' span changes no distance, and spares a matrix root
    # of 2048 x 2048
    basis = np.linalg.qr(np.concatenate(activations).T)[0]
    a, b = (rows @ basis for rows in activations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = fid_score.calculate_frechet_distance(
            a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
        )
    monkeypatch.setattr(fid, "INCEPTION_SHA", sha)
    result = measure(
        tmp_path,
        generated=folders[0],
        real=folders[1],
        inception_weights=path,
        resize="legacy",
        batch_size=3,
    )
    assert result["FID"] == pytest.approx(wanted, rel=1e-3)
    assert result["N"] == 3 and result["real's N"] == 2 and "KID" in result
    told = capsys.readouterr()
    assert "N 3" in told.out and "resize legacy" in told.out and "features inception" in told.out
    assert "N 3 is few for 2048 features" in told.err
    endings = {file.suffix for file in (tmp_path / "scores").iterdir()}
    assert endings == {".json", ".png"}


def test_inception_s_weights_are_checked(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    torch.save({"some": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(common.BadInput, match="does not hold the weights of FID's Inception"):
        fid.inception_features(tmp_path / "other.pth", "", "clean", cpu)
    # what the server sends is not what was asked for: nothing may stay, and the user is told
    served = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    served.write_bytes(b"a login page")
    monkeypatch.setattr(fid, "INCEPTION", served.as_uri())
    with pytest.raises(common.BadInput, match="could not be downloaded.*invalid hash"):
        fid.choose_network("inception", None, tmp_path / "data", cpu)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


# ---------------------------------------------------------------------- classifier


@pytest.fixture(scope="module")
def shared_data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def quick(monkeypatch, shared_data):
    """A classifier of few steps; its value is a data_dir where it is trained only once."""
    monkeypatch.setattr(fid, "CLASSIFIER_STEPS", 40)
    return shared_data


@pytest.fixture
def digits(quick):
    return common.load_data("digits", str(quick), image_channels=1, device="cpu")


def test_classifier_learns_once_and_never_calls_itself_fid(quick, tmp_path, capsys):
    train, test = common.load_data("digits", tmp_path, image_channels=1, device="cpu")
    state = torch.get_rng_state()
    network = fid.classifier_features(train)
    assert "once" in capsys.readouterr().err
    features = network.compute(test.pixels)
    assert features.shape == (500, 128)
    right = network.classify(features).argmax(1) == test.labels
    assert right.double().mean() > 0.8
    again = fid.classifier_features(train)
    assert again.name == network.name and capsys.readouterr().err == ""
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(again.compute(test.pixels[:3]), features[:3])
    torch.manual_seed(1)  # it depends on the data alone
    other, _ = common.load_data("digits", tmp_path / "b", image_channels=1, device="cpu")
    assert fid.classifier_features(other).name == network.name
    assert "FID" not in network.name + network.metric


def measure(tmp_path, **overrides):
    """fid.main with these settings; checks that the JSON says what was returned."""
    dicts = [copy.deepcopy(fid.source_kwargs), copy.deepcopy(fid.metric_kwargs)]
    values = {"output_dir": tmp_path / "scores", "device": "cpu", **overrides}
    for kwargs in dicts:
        for key in set(kwargs) & set(values):
            value = values[key]
            kwargs[key] = str(value) if isinstance(value, Path) else value
    result = fid.main(*dicts)
    written = sorted((tmp_path / "scores").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    stored = json.loads(written[-1].read_text(encoding="utf-8"))
    result["classes"] = stored.pop("classes")
    shown = {key: value for key, value in result.items() if key != "classes"}
    assert json.dumps(stored) == json.dumps(shown)
    return result


def test_two_folders_by_a_classifier_of_their_classes(quick, tmp_path, capsys):
    for folder, shift in (("one", 0), ("two", 9)):
        for number in range(40):
            path = tmp_path / folder / ("dark" if number % 2 else "bright") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng(number + shift)
            pixels = rng.integers(0, 128, (16, 16, 3), np.uint8) + (0 if number % 2 else 127)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    folders = {"generated": tmp_path / "one", "real": tmp_path / "two", "features": "classifier"}
    result = measure(tmp_path, **folders)
    assert result["N"] == result["real's N"] == 40 and "asked class" in result
    assert result["classifier distance"] > 0
    # and against other real images: both results stay
    measure(tmp_path, **{**folders, "real": tmp_path / "one"})
    assert len(list((tmp_path / "scores").glob("*.json"))) == 2
    for number in range(40):
        path = tmp_path / "flat" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(path)
    with pytest.raises(common.BadInput, match="a folder with a sub-folder for each class"):
        measure(tmp_path, **{**folders, "real": tmp_path / "flat"})


def test_a_classifier_of_large_photographs_looks_at_small_ones(tmp_path):
    for number in range(4):
        path = tmp_path / "photographs" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((200, 300, 3), 60 * number, np.uint8)).save(path)
    source = fid.of_folder(str(tmp_path / "photographs"), torch.device("cpu"))
    assert source.images.pixels.shape == (4, 3, 300, 300)
    assert source.train.pixels.shape == (4, 3, 64, 64)


def test_a_folder_is_as_wide_as_its_first_picture_that_can_be_read(tmp_path, capsys):
    (tmp_path / "00.png").write_bytes(b"no picture")
    for number in range(1, 5):
        Image.new("RGB", (20 + number, 30), (number, 0, 0)).save(tmp_path / f"0{number}.png")
    source = fid.of_folder(str(tmp_path), torch.device("cpu"))
    assert source.images.pixels.shape == (4, 3, 21, 21)
    assert "left out 1 unreadable" in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "bad" / name).write_bytes(b"no picture")
    with pytest.raises(common.BadInput, match="bad holds no image that can be read"):
        fid.of_folder(str(tmp_path / "bad"), torch.device("cpu"))


def test_a_data_set_against_itself(digits, quick, tmp_path, capsys, monkeypatch):
    kwargs = {
        "generated": "digits:test",
        "real": "digits:train",
        "features": "classifier",
        "num_images": 400,
        "data_dir": quick,
    }
    result = measure(tmp_path, **kwargs)
    out = capsys.readouterr().out
    assert out.startswith("classifier distance ") and out.count("\n") == 1
    assert "FID" not in out and "KID" not in out
    assert "N 400" in out and "resize 28x28x1" in out and "features classifier of digits" in out
    assert result["floor"] == result["classifier distance"] and result["floor's N"] == 400
    assert result["real's N"] == 4500
    value, error = result["kernel classifier distance"], result["standard error"]
    assert 0.5 < result["precision"] <= 1 and abs(value) < 10 * error
    names = sorted(path.name for path in (tmp_path / "scores").iterdir())
    stem = "classifier_distance_of_digits_test_from_digits_train"
    assert names == [f"{stem}.{end}" for end in ("json", "png")]
    classes = result["classes"]
    for column in ("mean class distance", "asked class", "diversity within class"):
        values = list(classes[column].values())
        assert len(values) == 10 and result[column] == pytest.approx(np.mean(values))
        if column != "mean class distance":
            assert result[f"{column}, worst"] == min(values)
    assert 0.8 < result["diversity within class"] < 1.2 and result["asked class"] > 0.8

    # once more: no image is looked at again
    def see_again(*_):
        pytest.fail("measured again")

    monkeypatch.setattr(fid, "prepared", see_again)
    assert measure(tmp_path, **kwargs)["floor"] == result["floor"]


def test_the_same_images_are_at_distance_zero(quick, tmp_path):
    result = measure(
        tmp_path,
        generated="digits:test",
        real="digits:test",
        features="classifier",
        data_dir=quick,
    )
    assert result["classifier distance"] < 1e-8
    assert result["diversity within class"] == pytest.approx(1)


def test_statistics_of_other_programs_are_sources(quick, digits, tmp_path, capsys):
    """They are an .npz with mu and sigma, as pytorch-fid and clean-fid publish it."""
    kwargs = {"real": "digits:train", "features": "classifier", "data_dir": quick}
    first = measure(tmp_path, generated="digits:test", **kwargs)
    network = fid.classifier_features(digits[0])
    features = network.compute(digits[1].pixels).numpy()
    sigma = np.cov(features, rowvar=False)
    np.savez(tmp_path / "theirs.npz", mu=features.mean(0), sigma=sigma)
    capsys.readouterr()
    theirs = measure(tmp_path, generated=tmp_path / "theirs.npz", **kwargs)
    assert "is few" not in capsys.readouterr().err  # how many images they are of is not known
    assert theirs["classifier distance"] == pytest.approx(first["classifier distance"], rel=1e-5)
    assert theirs["N"] == "unknown"
    np.savez(tmp_path / "few.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(common.BadInput, match="128 and 5 features cannot be compared"):
        measure(tmp_path, generated=tmp_path / "few.npz", **kwargs)
    (tmp_path / "torn.npz").write_bytes(b"PK")
    with pytest.raises(common.BadInput, match="torn.npz holds no statistics"):
        measure(tmp_path, generated=tmp_path / "torn.npz", **kwargs)


def write_digits(digits, folder, wanted, count=30):
    """So many test images of each class in `wanted`, {class: the sub-folder's name}."""
    _, test = digits
    for label, name in wanted.items():
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(test.pixels[test.labels == label][:count]):
            Image.fromarray(image[0].numpy()).save(folder / name / f"{number}.png")
    return folder


def test_a_folder_s_sub_folders_are_classes(digits, quick, tmp_path):
    kwargs = {"real": "digits:train", "features": "classifier", "data_dir": quick}
    named = {label: str(label) for label in range(10)}
    right = write_digits(digits, tmp_path / "right", named)
    result = measure(tmp_path, generated=right, **kwargs)
    shares = result["classes"]["asked class"]
    assert list(shares) == [str(label) for label in range(10)]
    assert result["N"] == 300 and result["asked class, worst"] > 0.6
    # two classes the wrong way round: just these two are not recognised
    swapped = write_digits(digits, tmp_path / "swapped", {**named, 3: "7", 7: "3"})
    classes = measure(tmp_path, generated=swapped, **kwargs)["classes"]
    assert classes["asked class"]["3"] < 0.2 and classes["asked class"]["7"] < 0.2
    assert classes["asked class"]["1"] == pytest.approx(shares["1"])
    distances, before = classes["mean class distance"], result["classes"]["mean class distance"]
    assert distances["3"] > 2 * before["3"] and distances["1"] == pytest.approx(before["1"])
    # other names are other classes, of which nothing is said
    other = write_digits(digits, tmp_path / "other", {**named, 7: "seven"})
    assert "asked class" not in measure(tmp_path, generated=other, **kwargs)


def test_diversity_within_class_is_that_of_generated_images_over_real_ones(digits, quick, tmp_path):
    _, test = digits
    faint = tmp_path / "faint"
    for number, (image, label) in enumerate(zip(test.pixels, test.labels.tolist())):
        (faint / str(label)).mkdir(parents=True, exist_ok=True)
        half = Image.fromarray((image[0] // 2).numpy())  # half the contrast, half the distances
        half.save(faint / str(label) / f"{number}.png")
    folder = write_digits(digits, tmp_path / "full", {c: str(c) for c in range(10)}, count=500)
    for nine in (folder / "9").iterdir():  # all the same: there is no distance to divide by
        nine.write_bytes((folder / "9" / "0.png").read_bytes())
    kwargs = {"real": folder, "features": "inception", "data_dir": quick}
    network = fid.FeatureNetwork("few pixels", "distance", "none", few_pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "choose_network", lambda *_: network)
        result = measure(tmp_path, generated=faint, **kwargs)
    assert result["diversity within class"] == pytest.approx(0.5, rel=0.01)
    assert list(result["classes"]["diversity within class"]) == [str(c) for c in range(9)]


def few_pixels(images):
    return images[:, 0, 10:12, 14].float()


def test_precision_and_recall_are_not_swapped(digits, quick, tmp_path):
    # two classes of real digits: each is plausible, but most of the data is not covered
    folder = write_digits(digits, tmp_path / "few", {0: "0", 1: "1"}, count=40)
    kwargs = {"real": "digits:test", "features": "classifier", "data_dir": quick}
    result = measure(tmp_path, generated=folder, **kwargs)
    assert result["precision"] > 0.85 and result["recall"] < 0.7


# ------------------------------------------------------------------------- sources


@pytest.fixture
def trained(tiny, tmp_path):
    main_gan.main(*tiny(main_gan, num_epochs=1, discriminator_hidden_size=8, batch_size=500))
    return tmp_path / "out" / "weights_epoch_1.pt"


def test_a_weights_file_is_rebuilt_and_sampled(quick, trained, tmp_path, monkeypatch):
    kwargs = {"features": "classifier", "num_images": 300, "data_dir": quick}
    result = measure(tmp_path, generated=trained, **kwargs)
    assert result["real"] == "digits:train"
    distance = result["classifier distance"]
    assert distance > 2 * result["floor"]
    assert "asked class" not in result and result["classes"] == {}
    # the same seed gives the same images, however they are batched; another seed does not
    batched = measure(tmp_path, generated=trained, batch_size=7, **kwargs)
    assert batched["classifier distance"] == pytest.approx(distance, rel=1e-6)
    other = measure(tmp_path, generated=trained, seed=1, **kwargs)
    assert other["classifier distance"] != distance
    monkeypatch.chdir(tmp_path)  # without a name it is the newest below the current folder
    assert measure(tmp_path, **kwargs)["generated"] == "out/weights_epoch_1.pt"
    source = fid.of_weights(str(trained), 4, 0, torch.device("cpu"))
    z = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = main_gan.load_generator(trained)(z)
    wanted = (127.5 * (images + 1)).round().byte().view(4, 1, 28, 28)
    assert torch.equal(source.images.pixels, wanted)


@pytest.mark.parametrize(
    "script, low, small",
    [
        (main_vae, 0, dict(hidden_size=8, iwae_samples=0)),
        (main_ae, -1, dict(feature_maps=2, image_size=16)),
    ],
)
def test_a_decoder_is_a_generator_too(script, low, small, tiny, tmp_path):
    trainer = script.main(*tiny(script, num_epochs=1, latent_dim=4, batch_size=1500, **small))
    path = str(tmp_path / "out" / "weights_epoch_1.pt")
    decoder = script.load_model(path)[1]
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        images = decoder.sample(z)
    wanted = ((images - low) / (1 - low) * 255).round().byte()
    source = fid.of_weights(path, 6, 3, torch.device("cpu"))
    assert torch.equal(source.images.pixels.flatten(1), wanted.flatten(1))
    assert source.images.pixels.shape[1:] == trainer.train.pixels.shape[1:]


def test_weights_without_a_class_are_compared_with_images_without_it(tiny, tmp_path):
    small = dict(hidden_size=8, latent_dim=2, iwae_samples=0, exclude_class=4, batch_size=1500)
    main_vae.main(*tiny(main_vae, num_epochs=1, **small))
    weights = common.load_weights(tmp_path / "out" / "weights_epoch_1.pt", "main_vae", "decoder")
    source = fid.of_data_set("digits:train", "", weights, "cpu")
    assert 4 not in source.images.labels and 4 not in source.other.labels
    assert len(source.images) == weights["data"]["images"]


def test_weights_of_a_folder_are_compared_with_the_pixels_of_training(tiny, tmp_path, quick):
    folder = tmp_path / "mine$1$"
    inner = folder / "a $x_$"
    inner.mkdir(parents=True)
    for number in range(40):
        shape = (20, 30 + number, 3)  # wider than high: training sees the middle
        pixels = np.random.default_rng(number).integers(0, 255, shape, np.uint8)
        Image.fromarray(pixels).save((folder if number % 2 else inner) / f"{number}.png")
    small = dict(dataset_type="folder", data_dir=str(folder), feature_maps=2, image_size=16)
    trainer = main_dcgan.main(*tiny(main_dcgan, num_epochs=1, batch_size=9, **small))
    path = str(tmp_path / "out" / "weights_epoch_1.pt")
    weights = common.load_weights(path, "main_dcgan", "generator")
    source = fid.of_data_set("folder:train", "", weights, "cpu")
    assert torch.equal(source.images.pixels, trainer.train.pixels)
    result = measure(tmp_path, generated=path, features="classifier", num_images=20)
    assert result["real"] == "folder mine$1$:train" and result["real's N"] == 36


@pytest.mark.parametrize("count, floor", [(15, False), (25, True)])
def test_where_a_single_image_is_held_out_there_is_no_floor(
    count, floor, tiny, tmp_path, quick, capsys
):
    for number in range(count):
        path = tmp_path / "mine" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    small = dict(dataset_type="folder", data_dir=str(tmp_path / "mine"), feature_maps=2)
    main_dcgan.main(*tiny(main_dcgan, num_epochs=1, batch_size=9, image_size=16, **small))
    path = str(tmp_path / "out" / "weights_epoch_1.pt")
    settings = dict(generated=path, features="classifier", num_images=20)
    result = measure(tmp_path, **settings)
    assert math.isfinite(result["classifier distance"]) and ("floor" in result) == floor
    if not floor:
        with pytest.raises(common.BadInput, match="mine holds one image; a covariance needs two"):
            measure(tmp_path, **settings, real="folder:test")


@pytest.mark.parametrize("generated, asked", [("pictures", 24), ("weights", 16), ("npz", 0)])
def test_birds_are_asked_for_in_the_size_of_what_is_compared(
    generated, asked, tmp_path, monkeypatch, tiny
):
    if generated == "pictures":
        for number in range(2):
            Image.new("RGB", (24, 24), (number, 0, 0)).save(tmp_path / f"{number}.png")
        name = str(tmp_path)
    elif generated == "weights":
        small = dict(image_size=16, feature_maps=2, batch_size=1500)
        main_dcgan.main(*tiny(main_dcgan, num_epochs=1, **small))
        name = str(tmp_path / "out" / "weights_epoch_1.pt")
    else:
        name = str(tmp_path / "statistics.npz")
        np.savez(name, mu=np.zeros(3), sigma=np.eye(3))
    sizes = []

    def look(kind, data_dir, *, image_size, **others):
        sizes.append(image_size)
        raise common.BadInput("no birds here")

    monkeypatch.setattr(common, "load_data", look)
    for real in ("cub:train", "cifar10:train"):
        with pytest.raises(common.BadInput, match="no birds here"):
            fid.open_sources(name, real, "", 4, 0, device=torch.device("cpu"))
    assert sizes == [asked, 0]


def test_the_jpeg_quality_of_training_is_asked_for_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(common, "load_cub", lambda *arguments: asked.append(arguments) or 1 / 0)
    data = {"dataset_type": "cub", "shape": [3, 32, 32], "normalize": True}
    weights = {"data": data, "dataset_kwargs": {"data_dir": "birds", "jpeg_quality": 75}}
    with pytest.raises(ZeroDivisionError):
        fid.of_data_set("cub:train", "", weights, "cpu")
    assert asked == [("birds", 32, 3, 75)]


class Conditional(nn.Module):
    def forward(self, z, labels):
        return (labels / 4 - 1).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_conditional_generators_are_asked_for_every_class(tmp_path, monkeypatch):
    monkeypatch.setattr(main_gan, "load_generator", lambda path: Conditional())
    contents = {
        "script": "main_gan",
        "model_kwargs": {"latent_dim": 2, "embedding_dim": 3},
        "dataset_kwargs": {},
        "data": {"shape": [3, 4, 4], "class_names": list("abcde"), "normalize": True},
        "generator": {},
    }
    common.save_tensors(tmp_path / "w.pt", contents)
    images = fid.of_weights(str(tmp_path / "w.pt"), 7, 0, torch.device("cpu")).images
    assert images.labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 32, 64, 96, 128, 0, 32]
    assert images.class_names == list("abcde")


def test_code_of_others_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("load_generator = 1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    contents = {"script": "stranger", "model_kwargs": {}, "dataset_kwargs": {}, "data": {}}
    common.save_tensors(tmp_path / "w.pt", contents)
    with pytest.raises(common.BadInput, match="stranger.py, which is no script of this collection"):
        fid.of_weights(str(tmp_path / "w.pt"), 4, 0, torch.device("cpu"))


# ------------------------------------------------------------------------ training


def test_scoring_in_training_leaves_the_random_numbers_alone(digits):
    train, test = digits
    scorer = fid.Scorer(train, features="classifier", num_images=300)
    assert scorer.name == "classifier distance" and scorer.num_images == 300
    asked = []

    def generate(index):  # real images, with their labels
        asked.extend(index.tolist())
        return train.batch(torch.randint(len(train), index.shape))

    def noise(index):
        return torch.randn(len(index), 784).clamp(-1, 1)

    state = torch.get_rng_state()
    first = scorer(generate)
    assert sorted(asked) == list(range(300))  # so that classes can take turns
    assert torch.equal(state, torch.get_rng_state())
    torch.randn(5)
    assert scorer(generate) == first  # the same noise in every call
    columns = [scorer.name, "mean class distance", "asked class", "asked class, worst"]
    assert list(first) == columns and first["asked class"] > 0.8
    assert list(scorer(noise)) == [scorer.name]
    assert scorer(noise)[scorer.name] > 10 * first[scorer.name]


def test_the_scorer_s_distance_is_the_frechet_distance_of_the_features(digits):
    train, test = digits
    scorer = fid.Scorer(train, features="classifier", num_images=500)
    wanted = []
    for images in (train, test):
        features = scorer.network.compute(images.pixels).double().numpy()
        wanted += [features.mean(0), np.cov(features, rowvar=False)]
    value = scorer(lambda index: test.batch(index)[0])[scorer.name]
    assert value == pytest.approx(by_sqrtm(*wanted), rel=1e-6)


def test_the_scorer_takes_the_classifier_where_inception_cannot_be_had(
    digits, quick, monkeypatch, capsys
):
    missing = quick / "no such server" / "pt_inception-2015-12-05-6726825d.pth"
    monkeypatch.setattr(fid, "INCEPTION", missing.as_uri())
    assert fid.Scorer(digits[0], features="auto", num_images=9).name == "classifier distance"
    assert "WARNING: NO FID" in capsys.readouterr().err
    with pytest.raises(common.BadInput, match="could not be downloaded"):
        fid.Scorer(digits[0], features="inception", num_images=9)


def test_neighbours_show_memorised_images(digits, tmp_path):
    train, _ = digits
    network = fid.classifier_features(train)

    def generate(index):  # noise, but for two training images
        generator = torch.Generator().manual_seed(int(index[0]))
        images = torch.rand(len(index), 1, 28, 28, generator=generator) * 2 - 1
        images[index == 3] = train.batch(torch.tensor([17]))[0]
        images[index == 8] = train.batch(torch.tensor([29]))[0]
        return images

    made = fid.draw(generate, 20, train.record(), torch.device("cpu"))
    fake = fid.measure(made, network, 20, 5)
    real = fid.measure(train, network, len(train), 500)
    fid.save_neighbours(tmp_path / "n.png", real, fake)
    with Image.open(tmp_path / "n.png") as file:
        picture = np.asarray(file.convert("L"))[::2, ::2]  # it is enlarged to twice the size
    assert picture.shape == (8 * 58 + 2, 8 * 58 + 2)  # eight columns, 2 pixels between
    seen = []
    for left in (2, 60):  # the copies come first, each above its original
        copy, original = picture[2:58, left : left + 56], picture[60:116, left : left + 56]
        np.testing.assert_array_equal(copy, original)
        seen.append(copy.tolist())
    for number in (17, 29):
        assert common.resize(train.pixels[number, None], 56, 1)[0, 0].tolist() in seen


def test_other_images_under_the_same_name_are_measured_anew(digits, tmp_path):
    _, test = common.load_data("digits", str(tmp_path), image_channels=1, device="cpu")
    network = fid.FeatureNetwork("few pixels", "distance", "none", few_pixels)
    before = fid.measure(test, network, 100, 50)
    test.pixels.copy_(255 - test.pixels)
    after = fid.measure(test, network, 100, 50)
    torch.testing.assert_close(after.mu, 255 - before.mu)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--features", "vgg"], "features must be inception or classifier"),
        (["--resize", "none"], "resize must be clean or legacy"),
        (["--num_images", "1"], "num_images must be at least 2"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--seed", "-1"], "seed must be between 0 and 4294967295"),
        (
            ["--generated", "digits:test", "--features", "classifier"],
            "digits:test does not say what it was trained on: give --real",
        ),
        (["--generated", "nowhere"], "'nowhere' is no folder, .pt, .npz"),
        (["--generated", "nowhere:test"], "dataset_type must be one of mnist"),
        (["--generated", "none.pt"], "there is no file none.pt"),
        (["--generated", "empty"], "empty holds 0 images; two are the least"),
    ],
)
def test_command_line_refuses_in_one_line(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    monkeypatch.setattr("sys.argv", ["fid.py", *options])
    with pytest.raises(SystemExit) as stop:
        common.run_script(fid.main, fid.source_kwargs, fid.metric_kwargs)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and words in told and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
