"""Scores of tokens: what the page rank is, with and without the map, and what it must not do."""

import itertools

import pytest
import torch

from vislr.kernels.attention import attention_with_lse
from vislr.tokens.ranking import (
    best,
    combine_heads,
    cross_maps,
    evenly,
    g_wpr,
    g_wpr_cross,
    g_wpr_scores,
    random_scores,
)


def maps(*shape: int, seed: int = 0, sharpness: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * sharpness).softmax(-1)


@pytest.mark.parametrize("iterations", [1, 3])
def test_scores_sum_to_one_are_positive_and_follow_a_permutation(iterations):
    a = maps(2, 3, 24, 24)
    s = combine_heads(g_wpr(a, iterations))
    assert torch.allclose(s.sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-12)
    assert (s > 0).all()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    permuted = combine_heads(g_wpr(a[..., order, :][..., order], iterations))
    assert torch.allclose(permuted, s[:, order], atol=1e-12)


def test_a_doubly_stochastic_map_ranks_all_alike():
    circulant = torch.stack([maps(16).roll(i) for i in range(16)])
    assert torch.allclose(circulant.sum(0), torch.ones(16, dtype=torch.float64))
    assert torch.allclose(g_wpr(circulant, 7), torch.full((16,), 1 / 16, dtype=torch.float64), atol=1e-12)


def test_the_fixed_point_is_the_left_eigenvector():
    a = maps(32, 32, sharpness=2.0)
    values, vectors = torch.linalg.eig(a.T)
    perron = vectors[:, values.abs().argmax()].real
    perron = perron / perron.sum()
    found = g_wpr(a, iterations=200, tolerance=1e-12)
    assert (found - perron).abs().max() < 1e-6


def test_the_tolerance_stops_early():
    a = maps(32, 32)
    coarse, fine = g_wpr(a, 100, tolerance=1e-2), g_wpr(a, 100, tolerance=1e-12)
    steps = [g_wpr(a, n) for n in range(1, 12)]
    moved = [(after - before).abs().sum() for before, after in itertools.pairwise(steps)]
    enough = next(n for n, one in enumerate(moved) if one < 1e-2) + 1
    assert torch.equal(coarse, steps[enough])
    assert (g_wpr(a, 1000) - fine).abs().sum() < 1e-11


def test_rows_that_all_look_at_one_token_give_it_everything():
    a = torch.zeros(12, 12, dtype=torch.float64)
    a[:, 5] = 1
    s = g_wpr(a, 3)
    assert s[5] == 1
    assert s.sum() == 1


@pytest.mark.parametrize("words", [1, 5])
def test_cross_attention_ranks_without_nan_even_on_one_word(words):
    s = g_wpr_cross(maps(2, 3, 20, words), iterations=2)
    assert torch.isfinite(s).all()
    assert torch.allclose(s.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    if words == 1:
        assert torch.allclose(s, torch.full_like(s, 1 / 20)), "with one word all rows are alike"


def test_a_spread_row_counts_less_than_a_sharp_one():
    a = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64)
    s = g_wpr_cross(a)
    assert s[1] > s[0]


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_scores_without_a_map_are_those_of_the_map(iterations, scale):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 50, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    _, lse = attention_with_lse(q, k, v, scale)
    dense = (q @ k.mT * (8**-0.5 if scale is None else scale)).softmax(-1)
    assert torch.allclose(
        g_wpr_scores(q, k, lse, iterations, scale), combine_heads(g_wpr(dense, iterations)), atol=1e-10
    )


def test_maps_on_text_alone_and_as_part_of_a_joint_attention():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 10, 8, generator=generator), torch.randn(1, 2, 14, 8, generator=generator)
    joint = (q @ k.mT * 8**-0.5).softmax(-1)
    _, lse = attention_with_lse(q, k, k)
    assert torch.allclose(cross_maps(q, k[:, :, 10:], lse), joint[..., 10:], atol=1e-6)
    alone = (q @ k[:, :, 10:].mT * 8**-0.5).softmax(-1)
    assert torch.allclose(cross_maps(q, k[:, :, 10:]), alone, atol=1e-6)
    mask = torch.tensor([True, True, False, True])
    assert cross_maps(q, k[:, :, 10:], mask=mask)[..., 2].max() == 0
    bias = torch.tensor([0.0, 0.0, -10000.0, 0.0])
    assert torch.allclose(cross_maps(q, k[:, :, 10:], mask=bias), cross_maps(q, k[:, :, 10:], mask=mask), atol=1e-6)


def test_random_scores_are_a_function_of_their_arguments():
    t = torch.tensor(500)
    device = torch.device("cpu")
    first = random_scores(3, 100, 7, t, device)
    assert torch.equal(first, random_scores(3, 100, 7, t, device))
    assert ((first >= 0) & (first < 1)).all()
    assert abs(first.mean() - 0.5) < 0.1
    for other in (random_scores(3, 100, 8, t, device), random_scores(3, 100, 7, torch.tensor([480, 480]), device)):
        assert (first != other).any(dim=-1).all()
    assert not torch.equal(first[0], first[1])


def test_best_and_evenly_keep_exactly_as_many_as_asked_in_order():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.4, 0.1, 0.1, 0.1]])
    assert best(scores, 2).tolist()[0] == [1, 3]
    assert best(scores, 2)[1, 0] == 0
    for tokens in (7, 16, 64):
        for count in range(1, tokens + 1):
            places = evenly(2, tokens, count, torch.device("cpu"))
            assert places.shape == (2, count)
            gaps = places[0].diff()
            assert count == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
            assert 0 <= places.min() <= places.max() < tokens
