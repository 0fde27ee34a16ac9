"""Short sequences and the way back."""

import pytest
import torch

from vislr.kernels.attention import attention_with_lse, recover
from vislr.tokens.selection import (
    Selection,
    cells,
    interpolated,
    kept_count,
    merge_similar,
    pick,
    put_back,
    shorten,
    similar,
)


def qkv(tokens=30, heads=2, size=8, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, tokens, size, generator=generator) for _ in range(3)]


def test_kept_count_rounds_and_keeps_one():
    assert [kept_count(k, 64) for k in (1.0, 0.5, 0.37, 0.001)] == [64, 32, 24, 1]


@pytest.mark.parametrize("symmetric", [False, True])
def test_sources_are_the_most_similar_kept_tokens_of_the_mean_map(symmetric):
    q, k, v = qkv()
    _, lse = attention_with_lse(q, k, v)
    keep = torch.stack([torch.arange(0, 30, 3), torch.arange(1, 30, 3)])
    source = similar(q, k, lse, keep, symmetric=symmetric)
    dense = (q @ k.mT * 8**-0.5).softmax(-1).mean(1)
    if symmetric:
        dense = dense + dense.mT
    wanted = dense.gather(2, keep[:, None].expand(-1, 30, -1)).argmax(-1)
    places = torch.arange(keep.shape[1])
    for b in range(2):
        wanted[b, keep[b]] = places
    assert torch.equal(source, wanted)


def test_recovery_copies_kept_rows_and_leaves_them_alone():
    q, k, v = qkv()
    _, lse = attention_with_lse(q, k, v)
    x = torch.randn(2, 30, 5)
    keep = torch.stack([torch.arange(0, 30, 2), torch.arange(15)])
    source = similar(q, k, lse, keep)
    full = recover(pick(x, keep), source)
    assert full.shape == x.shape
    for b in range(2):
        assert torch.equal(full[b, keep[b]], x[b, keep[b]])
        rows = {tuple(row.tolist()) for row in x[b, keep[b]]}
        assert all(tuple(row.tolist()) in rows for row in full[b])


def test_a_pruned_twin_gets_its_twin():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(1, 1, 16, 32, generator=generator), dim=-1) * 6
    features[:, :, 11] = features[:, :, 4]
    _, lse = attention_with_lse(features, features, features)
    keep = torch.tensor([[1, 4, 7, 9]])
    source = similar(features, features, lse, keep)
    assert keep[0, source[0, 11]] == 4


@pytest.mark.parametrize(("grid", "count"), [((6, 8), 12), ((6, 8), 30), ((5, 7), 20), (None, 14), ((6, 8), 48)])
def test_merging_keeps_exactly_as_many_and_averages(grid, count):
    tokens = 48 if grid is None else grid[0] * grid[1]
    x = torch.randn(3, tokens, 6, generator=torch.Generator().manual_seed(0))
    chosen = merge_similar(x, count, grid, seed=1, timestep=torch.tensor(10))
    assert chosen.keep.shape == (3, count)
    assert (chosen.keep.diff() > 0).all()
    short = shorten(x, chosen)
    for b in range(3):
        for place, token in enumerate(chosen.keep[b]):
            group = chosen.source[b] == place
            assert group[token]
            assert torch.allclose(short[b, place], x[b, group].mean(0), atol=1e-6)
    assert torch.equal(chosen.keep, merge_similar(x, count, grid, 1, torch.tensor(10)).keep)
    if count == tokens:
        assert torch.equal(short, x)


def test_merging_joins_the_most_similar_pair():
    x = torch.nn.functional.normalize(torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    every = merge_similar(x, 4, (4, 4), 0, None).keep[0]
    destination = int(every[0])
    twin = next(i for i in range(16) if i not in every.tolist())
    x[0, twin] = x[0, destination]
    chosen = merge_similar(x, 15, (4, 4), 0, None)
    gone = set(range(16)) - set(chosen.keep[0].tolist())
    assert gone == {twin}
    assert chosen.keep[0, chosen.source[0, twin]] == destination


def test_cells_that_cannot_leave():
    assert cells(48, (6, 8)) == 12
    assert cells(35, (5, 7)) == 6
    assert cells(48, None) == 12


def test_plain_shortening_picks():
    x = torch.randn(2, 9, 4)
    keep = torch.tensor([[0, 3], [4, 8]])
    assert torch.equal(shorten(x, Selection(keep, None)), torch.stack([x[0, [0, 3]], x[1, [4, 8]]]))


def test_interpolation_is_exact_on_constants_and_on_kept_tokens():
    keep = torch.tensor([[0, 3, 9, 14, 15], [1, 2, 5, 8, 11]])
    short = torch.randn(2, 5, 3)
    full = interpolated(short, keep, (4, 4))
    for b in range(2):
        assert torch.equal(full[b, keep[b]], short[b])
    assert torch.allclose(interpolated(torch.ones(2, 5, 3), keep, (4, 4)), torch.ones(2, 16, 3))
    assert torch.allclose(full.amax(), short.amax())


def test_put_back_replaces_only_the_kept_rows():
    full, short = torch.zeros(1, 5, 2), torch.ones(1, 2, 2)
    assert put_back(full, short, torch.tensor([[1, 4]]))[0, :, 0].tolist() == [0, 1, 0, 0, 1]
