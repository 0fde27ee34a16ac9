"""The composition testbed's sets are fixed, complete and can be asked for."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

from vislr.zoo.vocabulary import MAX_TOKENS, words_of


@pytest.fixture(scope="module")
def testbed():
    path = Path(__file__).parents[2] / "benchmarks" / "compose_testbed.py"
    spec = importlib.util.spec_from_file_location("compose_testbed", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_hundred_sets_of_two_to_five(testbed):
    sets = testbed.sets()
    assert Counter(len(one.parts) for one in sets) == {2: 25, 3: 25, 4: 25, 5: 25}
    assert sets[:20] == testbed.sets(20)
    used = Counter(part.adapter for one in sets for part in one.parts)
    assert set(used) == {part.adapter for part in testbed.parts()}
    assert min(used.values()) >= 5
    assert len({one.scene.caption for one in sets}) == 100
    for one in sets:
        kinds = Counter(part.kind for part in one.parts)
        assert kinds["style"] <= 1
        assert kinds["ground"] <= 1
        assert kinds["concept"] <= 3
        assert len(words_of(one.scene.caption)) <= MAX_TOKENS - 2
        for part in one.parts:
            assert part.trigger in one.scene.caption


def test_every_element_has_its_wrong_answers(testbed):
    referee = testbed.Referee.__new__(testbed.Referee)
    for one in testbed.sets(20):
        for part in one.parts:
            choices = referee.choices(part, one.scene)
            assert choices[0] == one.scene
            assert len(choices) == {"style": 7, "ground": 9, "concept": 10}[part.kind]
            assert len({(c.style, c.pattern, tuple(e.codepoint for e in c.elements)) for c in choices}) == len(choices)
