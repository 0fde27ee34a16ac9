"""Which picture comes when: a pure function of (seed, batch), every picture as often as it should."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vislr.core.errors import ConfigError
from vislr.data import DataConfig, FolderConfig, open_pool, sample_at
from vislr.data.order import Lane, Order
from vislr.data.source import _divide


def order(counts, sizes, seed=0, batch=4, **options):
    """Lanes of consecutive pictures: (number of pictures, arrivals in an epoch) each."""
    lanes, start = [], 0
    for pictures, arrivals in counts:
        lanes.append(Lane(np.arange(start, start + pictures), arrivals, **options))
        start += pictures
    return Order(lanes, np.asarray(sizes), seed, batch)


def test_one_folder_of_one_size_has_the_order_of_sample_at():
    made = order([(10, 10)], [0] * 10, seed=7, batch=4)
    assert [made.pictures(b) for b in range(20)] == [[sample_at(7, b * 4 + i, 10) for i in range(4)] for b in range(20)]


@pytest.mark.parametrize("sizes", [[0] * 37, [i % 5 for i in range(37)], [0] * 30 + [1] * 7])
def test_any_batch_can_be_asked_for_first(sizes):
    one, other = order([(37, 37)], sizes), order([(37, 37)], sizes)
    forward = [one.pictures(number) for number in range(60)]
    assert [other.pictures(number) for number in (59, 3, 40, 0)] == [forward[number] for number in (59, 3, 40, 0)]
    assert order([(37, 37)], sizes, seed=1).pictures(0) != forward[0]


def test_batches_are_full_of_one_size_and_every_picture_comes_once_an_epoch():
    sizes = np.array([0] * 25 + [1] * 13 + [2] * 3 + [3])
    made = order([(42, 42)], sizes, batch=4)
    epochs = 40
    batches = [made.pictures(number) for number in range(42 * epochs // 4 - 4)]
    assert all(len(batch) == 4 and len(set(sizes[batch])) == 1 for batch in batches)
    seen = Counter(picture for batch in batches for picture in batch)
    # Of each size fewer than a batch waits, and of what has come in four batches are not looked at yet.
    assert sum(epochs - seen[picture] for picture in range(42)) <= 4 * 3 + 4 * 4
    assert max(seen.values()) <= epochs
    # Within a size the passes are whole: nothing comes a third time before all came twice.
    for size in range(4):
        members = np.flatnonzero(sizes == size)
        run = [picture for batch in batches for picture in batch if sizes[picture] == size]
        for start in range(0, len(run) - len(members) + 1, len(members)):
            assert sorted(run[start : start + len(members)]) == members.tolist()


def test_epochs_differ_and_mix_their_sizes():
    made = order([(64, 64)], [0] * 32 + [1] * 32, batch=4)
    epochs = [[made.pictures(16 * epoch + number) for number in range(16)] for epoch in range(3)]
    assert epochs[0] != epochs[1]
    kinds = [batch[0] >= 32 for batch in epochs[0]]
    assert sum(a != b for a, b in itertools.pairwise(kinds)) > 2


def test_lanes_keep_their_shares_in_every_epoch():
    # 100 pictures at weight 1, 10 at weight 3: an epoch of 110 has 28 (27.5) and 82 (82.5) of them.
    counts = _divide(110, [1.0, 3.0])
    assert sum(counts) == 110
    assert counts in ([28, 82], [27, 83])
    made = order([(100, counts[0]), (10, counts[1])], [0] * 110, batch=10)
    total = Counter()
    for epoch in range(5):
        run = [picture for number in range(11) for picture in made.pictures(epoch * 11 + number)]
        assert sum(picture < 100 for picture in run) == counts[0]
        each = Counter(picture for picture in run if picture >= 100)
        assert sum(each.values()) == counts[1]
        total += each
    # 5 x 82 arrivals of ten pictures, or 5 x 83.
    assert max(total.values()) - min(total.values()) <= 1
    # The large folder is gone through before anything in it comes again.
    large = [p for number in range(55) for p in made.pictures(number) if p < 100][:100]
    assert sorted(large) == list(range(100))


def test_shards_stay_together_and_neighbours_are_shuffled():
    shards = np.repeat(np.arange(10), 20)
    made = order([(200, 200)], [0] * 200, batch=10, groups=shards, window=40)
    run = [picture for number in range(20) for picture in made.pictures(number)]
    assert sorted(run) == list(range(200))
    for start in range(0, 200, 40):
        inside = run[start : start + 40]
        assert len({picture // 20 for picture in inside}) == 2  # a window reads two shards
        assert inside != sorted(inside)
    again = [picture for number in range(20, 40) for picture in made.pictures(number)]
    assert sorted(again) == list(range(200))
    assert [p // 20 for p in again] != [p // 20 for p in run]


def test_division_gives_every_share_something():
    assert _divide(10, [1, 1, 1]) in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert _divide(7, [0, 2, 0]) == [0, 7, 0]
    assert _divide(5, [0.0, 0.0]) == [0, 0]
    assert min(_divide(10, [1e9, 1e-9])) == 1


def fill(folder, count, size=(16, 16)):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size, (i, 0, 0)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"{folder.name} {i}")
    return str(folder)


def counted(source, batch=1):
    items = [item for items in source.batches(0, len(source) // batch, batch) for item in items]
    return Counter((source.pool.trigger(source._part(item.index)), item.prior) for item in items), items


def test_repeats_weights_triggers_and_a_regularisation_set(tmp_path):
    a, b, prior = fill(tmp_path / "a", 6), fill(tmp_path / "b", 2), fill(tmp_path / "prior", 3)
    folders = [FolderConfig(a), FolderConfig(b, repeats=5, trigger="sks")]
    config = DataConfig(folders=folders, prior_folder=prior, prior_weight=0.5, trigger="tok")
    source = open_pool(config).at(16)
    assert (len(source), source.count) == (32, 11)
    counts, items = counted(source)
    assert counts == {("tok", False): 6, ("sks", False): 10, ("", True): 16}
    assert {item.weight for item in items if item.prior} == {0.5}
    assert {item.weight for item in items if not item.prior} == {1.0}
    assert {item.caption for item in items if item.prior} == {"prior 0", "prior 1", "prior 2"}
    assert {item.caption for item in items} >= {"tok, a 0", "sks, b 1"}
    assert set(source.captions()) == {item.caption for item in items}
    weighted = [FolderConfig(a, weight=1), FolderConfig(b, weight=1)]
    counts, _ = counted(open_pool(DataConfig(folders=weighted, trigger="tok")).at(16))
    assert counts == {("tok", False): 8}
    items = [i.index for b in open_pool(DataConfig(folders=weighted)).at(16).batches(0, 8, 1) for i in b]
    assert (sum(i < 6 for i in items), sum(i >= 6 for i in items)) == (4, 4)


def test_held_out_pictures_are_no_regularisation_pictures(tmp_path):
    a, prior = fill(tmp_path / "a", 20), fill(tmp_path / "prior", 5)
    pool = open_pool(DataConfig(folder=a, prior_folder=prior))
    train, held = pool.split(0.2)
    assert (len(train), len(held)) == (21, 4)
    assert {picture.caption.split()[0] for picture in held.pictures()} == {"a"}
    assert len(held.at(16)) == 4
    assert len(train.at(16)) == 32


def test_folders_named_like_kohya_s(tmp_path):
    fill(tmp_path / "img" / "3_cat", 2)
    fill(tmp_path / "img" / "1_a dog", 4)
    (tmp_path / "img" / "1_a dog" / "00.txt").unlink()
    plain = open_pool(DataConfig(folder=str(tmp_path / "img")))
    assert [str(p) for p in plain.problems if not p.fatal] == [
        "1_a dog: is named like a folder of repeats; data.repeats_from_names counts it as one"
    ]
    assert len(plain.at(16)) == len(plain) == 5
    pool = open_pool(DataConfig(folder=str(tmp_path / "img"), repeats_from_names=True))
    source = pool.at(16)
    assert (len(source), source.count) == (2 * 3 + 4, 6)
    items = [item for batch in source.batches(0, 10, 1) for item in batch]
    captions = Counter(item.caption for item in items)
    assert captions == {"3_cat 0": 3, "3_cat 1": 3, "a dog": 1, "1_a dog 1": 1, "1_a dog 2": 1, "1_a dog 3": 1}
    # A pass over the folder's own pictures is whole before it begins again.
    assert sorted(Counter(i.index for b in source.batches(1, 2, 10) for i in b).values()) == [1, 1, 1, 1, 3, 3]


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (4, 1), (2, 2)])
def test_processes_share_a_step_without_changing_it(tmp_path, world, accumulation):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(str(i))
        Image.new("RGB", (32, 16) if i % 3 else (16, 32)).save(tmp_path / f"{i}.png")
    config = DataConfig(folder=str(tmp_path), buckets=True, bucket_step=8)
    one = list(open_pool(config).at(32).batches(0, 12, 3, world * accumulation))
    assert len({(item.width, item.height) for batch in one for item in batch}) == 2
    ranks = [list(open_pool(config).at(32).batches(0, 12, 3, accumulation, rank, world)) for rank in range(world)]
    for step in range(12):
        whole = one[step * world * accumulation : (step + 1) * world * accumulation]
        shared = [ranks[rank][step * accumulation + micro] for micro in range(accumulation) for rank in range(world)]
        assert shared == whole
    # Going on from any step is the same as never having stopped.
    assert list(open_pool(config).at(32).batches(7, 12, 3, accumulation, 1, world)) == ranks[1][7 * accumulation :]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"folders": [{"path": "a", "weight": 1.0}, {"path": "b"}]}, "'b' has no weight and 'a' has; give all or none"),
        ({"folders": [{"path": "a"}], "folder": "b"}, "exclude each other"),
        ({"folders": [{"path": "a", "prior": True}]}, "holds regularisation sets alone"),
        ({"folders": [{"path": "a", "masks": "m"}]}, "has masks, and data.masks is none"),
        ({"tag_dropout": 1.0}, "data.tag_dropout is 1.0; expected 0 or more and less than 1"),
        ({"max_aspect": 0.5}, "data.max_aspect is 0.5; expected 1 or more"),
        ({"cache_limit_gb": 0}, "data.cache_limit_gb is 0; expected more than 0"),
        ({"caption_suffix": "txt"}, "data.caption_suffix is 'txt'; expected a dot"),
        ({"window": 0}, "data.window is 0; expected 1 or more"),
        ({"prior_weight": -1.0}, "data.prior_weight is -1.0"),
        ({"folders": [{"path": ""}]}, "an entry without a path"),
        ({"folders": [{"path": "a", "repeats": 0}]}, "repeats is 0 for 'a'"),
        ({"folders": [{"path": "a", "weight": 0.0}]}, "weight is 0.0 for 'a'"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(values, message):
    def make():
        folders = [FolderConfig(**entry) for entry in values.get("folders", [])]
        return DataConfig(**{**values, "folders": folders})

    with pytest.raises(ConfigError, match=message):
        make()


def test_folders_are_read_from_yaml(tmp_path):
    from vislr.core.arguments import dump_config, parse_config

    @dataclasses.dataclass
    class Outer:
        """A config."""

        data: DataConfig = dataclasses.field(default_factory=DataConfig)
        """The pictures."""

    (tmp_path / "c.yaml").write_text("data:\n  folders:\n  - path: a\n    repeats: 10\n  - {path: b, prior: true}\n")
    config = parse_config(Outer, ["--config", str(tmp_path / "c.yaml")], prog="x", description="")
    assert config.data.folders == [FolderConfig("a", repeats=10), FolderConfig("b", prior=True)]
    dump_config(config, tmp_path / "d.yaml")
    assert parse_config(Outer, ["--config", str(tmp_path / "d.yaml")], prog="x", description="") == config
    (tmp_path / "e.yaml").write_text("data:\n  folders:\n  - {path: a, repeat: 10}\n")
    with pytest.raises(ConfigError, match="repeat"):
        parse_config(Outer, ["--config", str(tmp_path / "e.yaml")], prog="x", description="")
