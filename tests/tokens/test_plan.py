"""The plan as data: JSON there and back, and what is refused."""

import json

import pytest
from tiny import tiny_conv_net, tiny_unet

import vislr
from vislr.core.errors import ConfigError, ModelError, TargetError, UndoError
from vislr.tokens import Cut, Span, TokenPlan, at_edm_plan, attach, detach, tome_plan
from vislr.tokens.handler import put_hooks


def test_plans_are_plain_json(family):
    plan = at_edm_plan(family.model, keep=0.4)
    data = json.loads(json.dumps(plan.to_dict()))
    assert TokenPlan.from_dict(data) == plan
    assert hash(TokenPlan.from_dict(data)) == hash(plan)
    put_hooks(family.model, TokenPlan.from_dict(data))


GOOD = {"late": [{"cuts": [{"after": "a", "keep": 0.5}], "until": "b"}]}
WRONG = {
    "no mapping": ([], "list"),
    "unknown key": (GOOD | {"critereon": "g-wpr"}, "did you mean 'criterion'"),
    "no late": ({}, "'late'"),
    "spans no list": ({"late": {}}, "expected a list"),
    "cut without keep": ({"late": [{"cuts": [{"after": "a"}], "until": None}]}, "'keep'"),
    "cuts empty": ({"late": [{"cuts": [], "until": None}]}, "without cuts"),
    "keep zero": ({"late": [{"cuts": [{"after": "a", "keep": 0}], "until": None}]}, "above 0"),
    "keep nan": ({"late": [{"cuts": [{"after": "a", "keep": float("nan")}], "until": None}]}, "no number"),
    "keep text": ({"late": [{"cuts": [{"after": "a", "keep": "half"}], "until": None}]}, "expected float"),
    "keep truth": ({"late": [{"cuts": [{"after": "a", "keep": True}], "until": None}]}, "expected float"),
    "keep rises": (
        {"late": [{"cuts": [{"after": "a", "keep": 0.3}, {"after": "b", "keep": 0.5}], "until": None}]}, "rises"),
    "two cuts, one block": (
        {"late": [{"cuts": [{"after": "a", "keep": 0.5}, {"after": "a", "keep": 0.5}], "until": None}]}, "two cuts"),
    "inside without parts": ({"late": [{"cuts": [{"after": "a", "keep": 0.5}], "until": "a"}]}, "parts"),
    "parts no names": (
        {"late": [{"cuts": [{"after": "a", "keep": 0.5}], "until": "a", "parts": [1]}]}, "names of modules"),
    "criterion": (GOOD | {"criterion": "tomes"}, "did you mean 'tome'"),
    "recovery": (GOOD | {"recovery": "copies"}, "did you mean 'copy'"),
    "unit": (GOOD | {"unit": "window"}, "token"),
    "iterations": (GOOD | {"iterations": 0}, "1 to 100"),
    "early without boundary": (GOOD | {"early_share": 0.3}, "boundary"),
    "nothing": ({"late": []}, "no span"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan_is_refused_by_name(case):
    data, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        TokenPlan.from_dict(data)


def plan(after="down_blocks.1.attentions.0.transformer_blocks.0", until=None, **options) -> TokenPlan:
    return TokenPlan(late=(Span((Cut(after, 0.5),), after if until is None else until, ("attn2", "ff")),), **options)


MISFITS = {
    "block": (plan("down_blocks.1.attentions.0.transformer_blocks.7"), TargetError, "transformer_blocks.0'"),
    "until": (plan(until="up_blocks.0.attentions.0.transformer_blocks.0"), ConfigError, "one run"),
    "part": (
        TokenPlan(late=(Span((Cut("mid_block.attentions.0.transformer_blocks.0", 0.5),),
                             "mid_block.attentions.0.transformer_blocks.0", ("mlp",)),)), TargetError, "no part 'mlp'"),
    "own attention": (
        TokenPlan(late=(Span((Cut("mid_block.attentions.0.transformer_blocks.0", 0.5),),
                             "mid_block.attentions.0.transformer_blocks.0", ("attn1",)),)), ConfigError, "ranks them"),
    "cross": (plan(ranking="cross"), ConfigError, "attn2"),
    "cross of another criterion": (plan(ranking="cross", criterion="stride"), ConfigError, "criterion"),
    "twice": (TokenPlan(late=plan().late * 2), ConfigError, "meet"),
    "never back": (
        TokenPlan(late=(Span((Cut("mid_block.attentions.0.transformer_blocks.0", 0.5),), None),)),
        ConfigError, "until"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_plan_that_does_not_fit_leaves_the_model_alone(case):
    unet = tiny_unet()
    own = {name: dict(vars(module)) for name, module in unet.named_modules()}
    wrong, error, message = MISFITS[case]
    with pytest.raises(error, match=message):
        attach(unet, wrong)
    assert {name: dict(vars(module)) for name, module in unet.named_modules()} == own


def test_one_plan_at_a_time_and_none_comes_off_twice():
    unet = tiny_unet()
    attached = attach(unet, plan())
    assert attached.change == {"kind": "tokens", "plan": plan().to_dict()}
    assert attached.sites == ("down_blocks.1.attentions.0.transformer_blocks.0",)
    with pytest.raises(ConfigError, match="already"):
        attach(unet, plan())
    detach(unet, attached)
    with pytest.raises(UndoError):
        detach(unet, attached)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, "no budget"),
        ({"keep": 0.5, "speedup": 1.2}, "speedup and keep"),
        ({"keep": 0.0}, "above 0"),
        ({"flops_saved": 1.0}, "below 1"),
        ({"speedup": 1.0}, "above 1"),
        ({"keep": 0.5, "criterion": "tome"}, "ranks no attention"),
        ({"keep": 0.5, "prune_after": ()}, "prune_after"),
        ({"keep": 0.5, "early": 2.0}, "from 0 to 1"),
    ],
)
def test_wrong_wishes(wish, message):
    with pytest.raises(ConfigError, match=message):
        at_edm_plan(tiny_unet(), **wish)


def test_models_without_tokens():
    with pytest.raises(ModelError, match="no tokens"):
        at_edm_plan(tiny_conv_net(), keep=0.5)
    with pytest.raises(ModelError, match="no tokens"):
        tome_plan(tiny_conv_net(), keep=0.5)


def test_a_plan_that_saves_nothing_says_so():
    unet = tiny_unet()
    report = vislr.apply(unet, at_edm_plan(unet, keep=1.0))
    assert any("saves nothing" in note for note in report.notes)
