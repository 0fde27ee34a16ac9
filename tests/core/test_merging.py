"""Merges against definitions written out entry by entry; truncations against the singular values left out."""

import itertools
import math

import pytest
import torch

from vislr.core.errors import ConfigError
from vislr.core.merging import (
    METHODS,
    drop_randomly,
    elected_mean,
    keep_largest,
    low_rank_of,
    low_rank_sum,
    merge_deltas,
    rank_for,
    resized,
    svd_of_factors,
)


def draws(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def trim_by_sorting(values, density):
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
    kept = set(order[: max(1, round(density * len(values)))])
    return [value if i in kept else 0.0 for i, value in enumerate(values)]


def ties_by_hand(lists, weights, density):
    scaled = [[w * v for v in trim_by_sorting(values, density)] for values, w in zip(lists, weights, strict=True)]
    merged = []
    for column in zip(*scaled, strict=True):
        total = sum(column)
        agreeing = [v for v in column if v * total > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return merged


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1, 1, 1), (0.8, -0.5, 2)])
def test_ties_and_magnitude_are_their_definitions(density, weights):
    deltas = draws((6, 5), (6, 5), (6, 5))
    lists = [delta.flatten().tolist() for delta in deltas]
    ties = merge_deltas(deltas, weights, "ties", density)
    assert torch.allclose(ties.flatten(), torch.tensor(ties_by_hand(lists, weights, density)).double(), atol=1e-12)
    trimmed = [torch.tensor(trim_by_sorting(values, density)).double() for values in lists]
    expected = sum(w * t for w, t in zip(weights, trimmed, strict=True))
    assert torch.allclose(merge_deltas(deltas, weights, "magnitude", density).flatten(), expected, atol=1e-6)


def test_ties_example_of_three_entries():
    deltas = [torch.tensor([3.0, -1.0, 0.0]), torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-2.0, 4.0, 0.0])]
    assert torch.equal(elected_mean(deltas), torch.tensor([2.0, 3.0, 0.0]))


def test_dare_drops_and_rescales():
    (delta,) = draws((400, 500))
    kept = drop_randomly(delta, 0.3, torch.Generator().manual_seed(5))
    mask = kept != 0
    assert torch.allclose(kept[mask], delta[mask] / 0.3)
    # 6 standard deviations of a mean of 200,000 draws.
    assert abs(float(mask.double().mean()) - 0.3) < 6 * math.sqrt(0.3 * 0.7 / delta.numel())
    a, b = draws((30, 20), (30, 20), seed=1)
    merged = merge_deltas([a, b], [2, -1], "dare", 0.4, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(merged, 2 * drop_randomly(a, 0.4, generator) - drop_randomly(b, 0.4, generator))
    tied = merge_deltas([a, b], [2, -1], "dare_ties", 0.4, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    parts = [2 * drop_randomly(a, 0.4, generator), -drop_randomly(b, 0.4, generator)]
    assert torch.equal(tied, elected_mean(parts))


@pytest.mark.parametrize("method", METHODS)
def test_of_one_delta_at_full_density_every_method_is_the_delta(method):
    (delta,) = draws((4, 3, 2, 2))
    assert torch.equal(merge_deltas([delta], [1.0], method), delta)
    assert torch.equal(merge_deltas([delta], [-0.5], method), -0.5 * delta)


@pytest.mark.parametrize("method", ["sum", "magnitude", "ties"])
def test_a_delta_of_weight_zero_has_no_say(method):
    a, b, c = draws((7, 7), (7, 7), (7, 7), seed=2)
    three = merge_deltas([a, b, c], [1.0, 0.0, 0.5], method, 0.5)
    assert torch.allclose(three, merge_deltas([a, c], [1.0, 0.5], method, 0.5), atol=1e-15)


def test_arguments_stay_and_half_precision_is_widened():
    delta = torch.randn(8, 8).half()
    before = delta.clone()
    for method in METHODS:
        assert merge_deltas([delta, delta], [1, 1], method, 0.5).dtype == torch.float32
    assert keep_largest(delta, 1.0).dtype == torch.float32
    assert torch.equal(delta, before)


def test_low_rank_sum_is_the_sum():
    up1, down1, up2, down2 = draws((6, 2), (2, 9), (6, 3), (3, 9))
    up, down = low_rank_sum([(up1, down1), (up2, down2)], [0.5, -2])
    assert up.shape == (6, 5)
    assert torch.allclose(up @ down, 0.5 * up1 @ down1 - 2 * up2 @ down2, atol=1e-13)


@pytest.mark.parametrize(("out", "inside", "r"), [(12, 9, 4), (9, 12, 4), (3, 20, 5), (20, 3, 5), (5, 5, 5)])
def test_truncation_error_is_the_discarded_singular_values(out, inside, r):
    up, down = draws((out, r), (r, inside), seed=out)
    dense = up @ down
    _, exact, _ = torch.linalg.svd(dense, full_matrices=False)
    u, s, vh = svd_of_factors(up, down)
    assert torch.allclose((u * s) @ vh, dense, atol=1e-12)
    assert torch.allclose(s, exact[: len(s)], atol=1e-12)
    for rank, way in itertools.product(range(1, min(out, inside, r)), ("factors", "dense")):
        cut = resized(up, down, rank) if way == "factors" else low_rank_of(dense, rank)
        assert cut.down.shape == (rank, inside)
        left = (cut.up @ cut.down - dense).norm()
        assert torch.allclose(left, exact[rank:].norm(), atol=1e-12)
        assert cut.error == pytest.approx(float(exact[rank:].norm() / exact.norm()), abs=1e-12)
        assert cut.norm == pytest.approx(float(exact.norm()), rel=1e-9)


def test_energy_keeps_the_fewest_ranks_that_hold_it():
    singular = torch.tensor([3.0, 2.0, 1.0, 1e-9])
    assert [rank_for(singular, energy=e) for e in (0.5, 9 / 14, 0.65, 13 / 14, 0.93, 0.999999)] == [1, 1, 2, 2, 3, 3]
    assert rank_for(singular, 2, 0.99) == 2
    assert rank_for(singular, 50) == 3  # the last one is rounding
    assert rank_for(torch.zeros(4), 3) == 1
    up, down = draws((30, 8), (8, 30))
    assert resized(up, down, energy=0.9).error <= math.sqrt(0.1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda a: merge_deltas([a], [1], "tie"), "'tie'; did you mean 'ties'"),
        (lambda a: merge_deltas([a], [1, 2]), "1 deltas and 2 weights"),
        (lambda a: merge_deltas([], []), "at least one"),
        (lambda a: merge_deltas([a, a[:1]], [1, 1]), "different shapes"),
        (lambda a: keep_largest(a, 0), "density is 0"),
        (lambda a: drop_randomly(a, 1.5), "density is 1.5"),
        (lambda a: low_rank_of(a, 0), "rank is 0"),
        (lambda a: low_rank_of(a, energy=2), "energy is 2"),
    ],
)
def test_impossible_arguments_are_named(call, said):
    with pytest.raises(ConfigError, match=said):
        call(torch.randn(4, 4))
