"""Every ordered pair of changes on every family: on, run, loaded in a new process, off; or refused by name."""

import functools
import os
import subprocess
import sys

import pairs
import pytest
import together
import torch

from vislr.core.errors import VislrError

SLOW = ("flux",)
families = pytest.mark.parametrize(
    "family", [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in pairs.FAMILIES]
)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """Family -> its Matrix; one thread, here and in the new process, so that sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield functools.cache(lambda family: together.run_pairs(family, tmp_path_factory.mktemp(family)))
    torch.set_num_threads(before)


@families
def test_pairs_work_or_are_refused_by_name(matrix, family):
    found = matrix(family)
    assert found.outcomes.keys() == {(first, second) for first in pairs.KINDS for second in pairs.KINDS}
    wrong = []
    for (first, second), outcome in found.outcomes.items():
        alone = pairs.carries(family, first) or pairs.carries(family, second)
        rule = alone or pairs.rule_for(first, second)
        expected = "" if rule is None else rule.error
        name = "" if outcome.error is None else type(outcome.error).__name__
        if name != expected or (expected and rule.match not in str(outcome.error)):
            wrong.append(f"{first} then {second}: {outcome.error!r}, expected {expected or 'none'}")
        elif expected:
            assert isinstance(outcome.error, VislrError)
        elif outcome.changes != (rule is None):
            wrong.append(f"{first} then {second}: the second {'changes' if outcome.changes else 'does not change'} it")
        if not outcome.undone:
            wrong.append(f"{first} then {second}: off again, something is left of the second")
    wrong += [f"{first}: off again, something is left" for first, clean in found.base.items() if not clean]
    assert wrong == []


@families
def test_folders_make_the_same_in_a_new_process(matrix, family):
    made = {f"{first}-{second}": one.digest for (first, second), one in matrix(family).outcomes.items() if one.digest}
    done = subprocess.run(
        [sys.executable, together.__file__, str(matrix(family).folder)], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert len(made) >= 9
    assert {name: found.get(name) for name in made} == made


def test_the_page_says_what_the_test_says():
    text = pairs.PAGE.read_text()
    assert pairs.split(text)[1].strip() == pairs.render(), "write it anew: python tests/support/pairs.py"
    for name in pairs.KINDS.values():
        assert text.count(f"| **{name}** |") >= 1
    assert "docs/together.md" in (pairs.PAGE.parents[1] / "README.md").read_text()
