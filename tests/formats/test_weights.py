"""Merging and resizing adapters without a model: every layer against the dense computation in float64."""

import pytest
import torch

from vislr.core.errors import AdapterError, ConfigError
from vislr.core.merging import elected_mean, keep_largest, merge_deltas
from vislr.formats.canonical import CanonicalAdapter, Entry
from vislr.formats.weights import merge_adapters, resize

CONV, LINEAR = (12, 8, 3, 3), (10, 14)
NAMES = {"unet.conv_in": CONV, "unet.mid_block.attentions.0.proj_in": LINEAR}


class Draw:
    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape):
        return torch.randn(*shape, generator=self.generator)


def lora(shape, r, alpha, seed, **more):
    draw = Draw(seed)
    tensors = {
        "lora_down.weight": draw(r, *shape[1:]),
        "lora_up.weight": draw(shape[0], r, *(1,) * (len(shape) - 2)),
        "alpha": torch.tensor(float(alpha)),
    }
    return Entry("lora", {**tensors, **more}, shape)


def other(kind, shape, seed):
    """An entry of the kind on a weight of this shape."""
    draw = Draw(seed)
    out, inside, *kernel = shape
    taps = int(torch.tensor(kernel).prod()) if kernel else 1
    alpha = {"alpha": torch.tensor(3.0)}
    if kind == "tucker":
        return Entry("lora", {"lora_down.weight": draw(3, inside, 1, 1), "lora_mid.weight": draw(4, 3, *kernel),
                              "lora_up.weight": draw(out, 4, 1, 1), **alpha}, shape)  # fmt: skip
    if kind == "loha":
        a, b = (draw(out, 2), draw(out, 2)), (draw(2, inside * taps), draw(2, inside * taps))
        return Entry(
            "loha", {"hada_w1_a": a[0], "hada_w1_b": b[0], "hada_w2_a": a[1], "hada_w2_b": b[1], **alpha}, shape
        )
    if kind == "lokr":
        return Entry("lokr", {"lokr_w1": draw(2, 2), "lokr_w2_a": draw(out // 2, 2),
                              "lokr_w2_b": draw(2, inside // 2 * taps), **alpha}, shape)  # fmt: skip
    if kind == "convlora":
        return Entry("convlora", {"convlora_A": draw(6, inside * 3), "convlora_B": draw(out * 3, 6), **alpha}, shape)
    if kind == "flora":
        factors = {f"flora_k{n + 1}": draw(k, 2) for n, k in enumerate(kernel)}
        core = draw(3, 2, *(2,) * len(kernel))
        return Entry("flora", {"flora_core": core, "flora_out": draw(out, 3), "flora_in": draw(inside, 2), **factors,
                               **alpha}, shape)  # fmt: skip
    if kind == "sara":
        size = out * inside * taps
        index = torch.tensor([0, 5, size - 1, size, size + out - 1], dtype=torch.int32)
        return Entry("sara", {"sara_index": index, "sara_delta": draw(5).double(),
                              "sara_shape": torch.tensor(shape)}, shape)  # fmt: skip
    return Entry("diff", {"diff": draw(*shape), "diff_b": draw(out)}, shape)


def adapter(entries, family="sd15"):
    return CanonicalAdapter(dict(entries), family)


def small(seed, r, alpha):
    return adapter((name, lora(shape, r, alpha, seed + i)) for i, (name, shape) in enumerate(NAMES.items()))


def dense(entries, weights, base=None):
    parts = [w * e.delta(base, dtype=torch.float64) for e, w in zip(entries, weights, strict=True)]
    return torch.stack(parts).sum(0)


def close(entry, expected, tolerance=1e-6):
    return float((entry.delta(dtype=torch.float64).reshape(expected.shape) - expected).norm()) <= tolerance * max(
        1.0, float(expected.norm())
    )


def test_a_sum_of_differing_ranks_and_alphas_is_exact_and_stays_low_rank():
    # alpha * sqrt(r): what readers make of rsLoRA.
    a, b, c = small(0, 2, 3), small(10, 4, 8 * 4**0.5), small(20, 1, 0.5)
    outcome = merge_adapters([a, b, c], [0.7, -1.5, 2.0])
    for name in NAMES:
        entry = outcome.adapter.entries[name]
        assert entry.kind == "lora"
        assert entry.rank == 7
        assert entry.scale == 1.0
        assert close(entry, dense([x.entries[name] for x in (a, b, c)], [0.7, -1.5, 2.0]))
    assert outcome.errors == {}
    assert outcome.error == 0.0


def test_ranks_above_the_layer_are_brought_down_to_it_exactly():
    loras = [small(seed, 6, 3) for seed in (0, 10, 20)]
    outcome = merge_adapters(loras)
    entry = outcome.adapter.entries["unet.mid_block.attentions.0.proj_in"]
    assert entry.rank == 10
    assert close(entry, dense([x.entries["unet.mid_block.attentions.0.proj_in"] for x in loras], [1, 1, 1]))
    assert outcome.error < 1e-12


@pytest.mark.parametrize("kind", ["tucker", "loha", "lokr", "convlora", "flora", "sara", "diff"])
def test_kinds_merge_with_lora(kind):
    first = adapter([("unet.conv_in", lora(CONV, 3, 2, 1))])
    second = adapter([("unet.conv_in", other(kind, CONV, 2))])
    entries = [first.entries["unet.conv_in"], second.entries["unet.conv_in"]]
    expected = dense(entries, [0.5, -2])
    exact = merge_adapters([first, second], [0.5, -2])
    assert exact.adapter.entries["unet.conv_in"].kind == ("diff" if kind in ("sara", "diff") else "lora")
    assert close(exact.adapter.entries["unet.conv_in"], expected, 2e-6)
    assert any("diff" in note for note in exact.notes) == (kind in ("sara", "diff"))
    bias = entries[1].bias_delta()
    if bias is not None:
        assert torch.equal(exact.adapter.entries["unet.conv_in"].bias_delta(), -2 * bias)
    cut = merge_adapters([first, second], [0.5, -2], "svd", rank=2)
    entry = cut.adapter.entries["unet.conv_in"]
    singular = torch.linalg.svdvals(expected.flatten(1))
    assert entry.rank == 2
    assert cut.errors["unet.conv_in"] == pytest.approx(float(singular[2:].norm() / singular.norm()), rel=1e-5)
    left = (entry.delta(dtype=torch.float64) - expected).norm() / expected.norm()
    assert float(left) == pytest.approx(cut.error, rel=1e-5)
    assert cut.norms["unet.conv_in"] == pytest.approx(float(expected.norm()), rel=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "dare", "ties", "dare_ties"])
def test_sparse_methods_are_the_dense_ones_layer_by_layer(method):
    a, b = small(0, 2, 3), small(10, 4, 1)
    outcome = merge_adapters([a, b], [1.0, 0.6], method, density=0.4, rank=20)
    again = merge_adapters([a, b], [1.0, 0.6], method, density=0.4, rank=20)
    for name in NAMES:
        deltas = [x.entries[name].delta() for x in (a, b)]
        made = outcome.adapter.entries[name].delta(dtype=torch.float64)
        assert torch.equal(made, again.adapter.entries[name].delta(dtype=torch.float64))
        if method in ("magnitude", "ties"):
            trimmed = [keep_largest(delta, 0.4) for delta in deltas]
            scaled = [trimmed[0], 0.6 * trimmed[1]]
            expected = elected_mean(scaled) if method == "ties" else scaled[0] + scaled[1]
            assert torch.allclose(made, expected.double(), atol=1e-5)
    assert outcome.error < 1e-6


def test_what_is_dropped_depends_on_seed_and_layer_not_on_order():
    a, b = small(0, 2, 3), small(10, 4, 1)
    backwards = [adapter(reversed(x.entries.items())) for x in (a, b)]
    one = merge_adapters([a, b], method="dare", density=0.4, rank=20)
    two = merge_adapters(backwards, method="dare", density=0.4, rank=20)
    other_seed = merge_adapters([a, b], method="dare", density=0.4, rank=20, seed=1)
    for name in NAMES:
        assert torch.equal(one.adapter.entries[name].delta(), two.adapter.entries[name].delta())
        assert not torch.allclose(one.adapter.entries[name].delta(), other_seed.adapter.entries[name].delta())


def test_default_rank_of_ties_is_the_largest_given():
    outcome = merge_adapters([small(0, 2, 3), small(10, 4, 1)], method="ties", density=0.4)
    for name in NAMES:
        entry, error = outcome.adapter.entries[name], outcome.errors[name]
        assert entry.rank == 4
        expected = merge_deltas(
            [x.entries[name].delta() for x in (small(0, 2, 3), small(10, 4, 1))], [1, 1], "ties", 0.4
        )
        lost = (entry.delta() - expected).norm() / expected.norm()
        assert float(lost) == pytest.approx(error, rel=1e-4)
        assert error > 0.01


def test_one_minus_itself_is_nothing_and_minus_another_undoes_a_sum():
    a, b = small(0, 2, 3), small(10, 4, 1)
    for entry in merge_adapters([a, a], [1, -1], rank=4).adapter.entries.values():
        assert float(entry.delta().norm()) < 1e-5
    both = merge_adapters([a, b]).adapter
    back = merge_adapters([both, b], [1, -1], rank=2)
    assert back.error < 1e-6
    for name in NAMES:
        assert close(back.adapter.entries[name], a.entries[name].delta(dtype=torch.float64), 1e-5)


def test_layers_of_some_adapters_only():
    a = small(0, 2, 3)
    b = adapter([("unet.conv_in", lora(CONV, 4, 1, 9)), ("text_encoder.x", lora(LINEAR, 4, 1, 8))])
    outcome = merge_adapters([a, b], [2, 3])
    assert list(outcome.adapter.entries) == [*NAMES, "text_encoder.x"]
    assert close(outcome.adapter.entries["text_encoder.x"], 3 * b.entries["text_encoder.x"].delta(dtype=torch.float64))


@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora_is_merged_as_what_it_does_to_the_base(axis):
    weight = Draw(5)(*CONV)
    magnitude = Draw(6)(12, 1, 1, 1).abs() if axis == "out" else Draw(6)(1, 8, 1, 1).abs()
    entry = lora(CONV, 2, 3, 1, dora_scale=magnitude)
    plain = lora(CONV, 3, 2, 4)
    first, second = adapter([("unet.conv_in", entry)]), adapter([("unet.conv_in", plain)])
    with pytest.raises(AdapterError, match="is DoRA, whose change depends on the base"):
        merge_adapters([first, second])
    with pytest.raises(AdapterError, match=r"the base has no weight 'unet.conv_in'"):
        merge_adapters([first, second], base={})
    with pytest.raises(AdapterError, match=r"changes a weight \(12, 8, 3, 3\); the base's is \(12, 8\)"):
        merge_adapters([first, second], base={"unet.conv_in": weight[..., 0, 0]})
    merged = merge_adapters([first, second], [0.5, 1], base={"unet.conv_in": weight})
    changed = weight.double() + entry.product(torch.float64)
    others = [0, 2, 3] if axis == "in" else [1, 2, 3]
    effect = magnitude.double() * changed / changed.square().sum(others, keepdim=True).sqrt() - weight.double()
    expected = 0.5 * effect + plain.delta(dtype=torch.float64)
    assert close(merged.adapter.entries["unet.conv_in"], expected)
    assert "dora_scale" not in merged.adapter.entries["unet.conv_in"].tensors


def test_norms_and_biases_are_merged_too():
    norm = Entry("norm", {"w_norm": torch.tensor([1.0, 2.0]), "b_norm": torch.tensor([3.0, -1.0])}, (2,))
    a, b = adapter([("unet.n", norm)]), adapter([("unet.n", norm)])
    merged = merge_adapters([a, b], [2, -0.5]).adapter.entries["unet.n"]
    assert torch.equal(merged.tensors["w_norm"], torch.tensor([1.5, 3.0]))
    assert torch.equal(merged.tensors["b_norm"], torch.tensor([4.5, -1.5]))


def test_resize_by_rank_and_by_energy():
    given = small(0, 6, 3)
    given.metadata = {"ss_network_dim": "6", "modelspec.title": "x", "sshs_model_hash": "1"}
    for rank in (1, 3, 6, 50):
        outcome = resize(given, rank)
        for name in NAMES:
            expected = given.entries[name].delta(dtype=torch.float64)
            singular = torch.linalg.svdvals(expected.flatten(1))
            assert outcome.adapter.entries[name].rank == min(rank, 6)
            lost = float((outcome.adapter.entries[name].delta(dtype=torch.float64) - expected).norm())
            assert lost == pytest.approx(float(singular[rank:].norm()), abs=1e-5)
            assert outcome.errors[name] == pytest.approx(float(singular[rank:].norm() / singular.norm()), abs=1e-6)
    assert outcome.adapter.metadata == {"modelspec.title": "x"}
    for energy in (0.5, 0.9, 0.99):
        outcome = resize(given, energy=energy)
        for name in NAMES:
            squares = torch.linalg.svdvals(given.entries[name].delta(dtype=torch.float64).flatten(1)).square()
            rank = outcome.adapter.entries[name].rank
            assert squares[:rank].sum() >= energy * squares.sum()
            assert squares[: rank - 1].sum() < energy * squares.sum()


def test_resizing_keeps_what_has_no_rank():
    norm = Entry("norm", {"w_norm": torch.ones(2)}, (2,))
    statistics = Entry("adabn", {"adabn_mean": torch.ones(2), "adabn_var": torch.ones(2)}, (2,))
    magnitude = torch.rand(10, 1)
    given = adapter([("a", lora(LINEAR, 4, 2, 0, dora_scale=magnitude)), ("b", norm), ("c", statistics)], family="timm")
    outcome = resize(given, 2)
    assert list(outcome.adapter.entries) == ["a", "b", "c"]
    assert outcome.adapter.entries["b"] is norm
    assert outcome.adapter.entries["c"] is statistics
    assert outcome.adapter.entries["a"].rank == 2
    assert outcome.adapter.entries["a"].tensors["dora_scale"] is magnitude
    assert outcome.notes[0] == "2 layers have no rank and stay as they are"
    assert "magnitudes" in outcome.notes[1]
    assert given.entries["a"].rank == 4


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda a: merge_adapters([a], method="tie"), ConfigError, "'tie'; did you mean 'ties'"),
        (lambda a: merge_adapters([a], [1, 2]), ConfigError, "1 adapters and 2 weights"),
        (lambda a: merge_adapters([a], [float("nan")]), ConfigError, "finite"),
        (lambda a: merge_adapters([a], rank=0), ConfigError, "rank is 0"),
        (lambda a: merge_adapters([a], density=0), ConfigError, "density is 0"),
        (lambda a: resize(a), ConfigError, "rank, or the energy"),
        (lambda a: resize(a, energy=0), ConfigError, "energy is 0"),
        (lambda a: merge_adapters([a, adapter(a.entries, "sdxl")]), AdapterError, "different families.*sd15, sdxl"),
        (
            lambda a: merge_adapters([a, adapter([("unet.conv_in", lora((12, 9, 3, 3), 2, 1, 0))])]),
            AdapterError,
            r"'unet.conv_in' has the shapes \(12, 9, 3, 3\) and \(12, 8, 3, 3\)|\(12, 8, 3, 3\) and \(12, 9, 3, 3\)",
        ),
        (
            lambda a: merge_adapters([adapter([("n", Entry("adabn", {"adabn_mean": torch.ones(2)}))])]),
            AdapterError,
            "'n' is of kind 'adabn'",
        ),
    ],
)
def test_what_cannot_be_merged_is_named(call, error, said):
    with pytest.raises(error, match=said):
        call(small(0, 2, 1))
