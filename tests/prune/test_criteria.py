"""Criteria: the knapsack against brute force, output losses, positions, lists; every plan keeps its ratio."""

import itertools
import json
import math

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import vislr
from vislr.anatomy import sample_inputs, skeleton
from vislr.core.errors import ConfigError, DataError, ModelError
from vislr.prune import (
    Contribution,
    Inventory,
    LayerPlan,
    Magnitude,
    OutputLoss,
    PrototypeQuality,
    Random,
    SsdOrder,
    UniformDepth,
    Unit,
    additivity,
    bk_sdm_plan,
    block_range,
    draw_additivity,
    draw_plan,
    hierarchical_plan,
    keep_score,
    laptop_plan,
    plan_layers,
    scoring_cost,
    ssd_1b_plan,
    units_of,
    with_latency,
)
from vislr.prune.hierarchical import hybrid_cut, removed_blocks
from vislr.prune.removal import attach, detach
from vislr.prune.solve import greedy, knapsack, needed_for
from vislr.prune.units import Bonus


def size(model):
    return sum(p.numel() for p in model.parameters())


def random_case(seed):
    """Up to 12 units with ties in costs and weights, some of them in holders with a bonus."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 13))
    weights = rng.integers(1, 10 if seed % 2 else 10**9, count)
    costs = rng.integers(0, 6, count) / 4 if seed % 3 == 0 else rng.random(count) ** 3
    units = tuple(Unit(f"b{i // 3}.u{i}", "X", i, int(w), 0) for i, w in enumerate(weights))
    groups = [[u.name for u in units if u.name.startswith(f"b{g}.")] for g in range(count // 3)]
    bonuses = tuple(Bonus(f"b{g}", tuple(names), int(rng.integers(0, 12)), 0) for g, names in enumerate(groups))
    total = sum(u.parameters for u in units) + sum(b.parameters for b in bonuses) + 5
    inventory = Inventory("x", "block", units, bonuses if seed % 2 else (), total, 0, {})
    return inventory, {u.name: float(c) for u, c in zip(units, costs, strict=True)}, rng


def brute_force(inventory, costs, needed):
    names = [unit.name for unit in inventory.units]
    best = math.inf
    for chosen in itertools.product((False, True), repeat=len(names)):
        some = [name for name, on in zip(names, chosen, strict=True) if on]
        if inventory.saved(some) >= needed:
            best = min(best, sum(costs[name] for name in some))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_the_knapsack_is_brute_force_and_greedy_is_no_better(seed):
    inventory, costs, rng = random_case(seed)
    last = 0.0
    for share in sorted(rng.random(3)):
        needed = int(share * inventory.most())
        chosen = knapsack(inventory, costs, needed)
        assert inventory.saved(chosen) >= needed
        value = sum(costs[name] for name in chosen)
        assert value == pytest.approx(brute_force(inventory, costs, needed), abs=1e-9)
        assert value >= last - 1e-9, "the optimum grows with the ratio"
        last = value
        quick = greedy(inventory, costs, needed)
        assert inventory.saved(quick) >= needed
        assert sum(costs[name] for name in quick) >= value - 1e-9


def test_the_ends_of_the_ratio():
    inventory, costs, _ = random_case(1)
    assert knapsack(inventory, costs, 0) == []
    everything = [unit.name for unit in inventory.units]
    assert knapsack(inventory, costs, inventory.most()) == everything
    for solver in (knapsack, greedy):
        with pytest.raises(ConfigError, match=rf"all {len(everything)} units at granularity 'block' are 0\.\d+"):
            solver(inventory, costs, inventory.most() + 1)
    assert needed_for(inventory, 0.3) == math.ceil(0.3 * inventory.parameters)


def test_a_target_that_doubles_cannot_tell_apart_is_met_exactly():
    """Weights whose sum misses the target by one part in 10^17."""
    units = tuple(Unit(f"u{i}", "X", i, w, 0) for i, w in enumerate((10**17 - 1, 10**17, 2)))
    inventory = Inventory("x", "block", units, (), 3 * 10**17, 0, {})
    chosen = knapsack(inventory, {"u0": 1.0, "u1": 1.5, "u2": 0.1}, 10**17)
    assert inventory.saved(chosen) >= 10**17
    assert chosen == ["u0", "u2"]


def calibration(model, count=2, batch=2):
    sample = {"tokens": 16, "batch": batch}
    batches = []
    for seed in range(count):
        rng = torch.Generator().manual_seed(seed)
        inputs = sample_inputs(model, sample, device="cpu")
        inputs["timestep"] = torch.randint(0, 1000, (batch,), generator=rng)
        inputs = {k: torch.randn(v.shape, generator=rng) if v.is_floating_point() else v for k, v in inputs.items()}
        batches.append(inputs)
    return batches


def test_output_losses_are_those_of_removed_units_and_a_silent_unit_goes_first():
    torch.manual_seed(0)
    unet = tiny.tiny_unet()
    silent = unet.up_blocks[0].resnets[1]
    nn.init.zeros_(silent.conv2.weight)
    nn.init.zeros_(silent.conv2.bias)
    silent_name = "up_blocks.0.resnets.1"
    data = calibration(unet)
    inventory = units_of(unet)
    scores = OutputLoss(data, progress=False).score(unet, inventory)
    assert scores[silent_name] == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        base = [unet(**batch).sample for batch in data]
        for unit in inventory.units[:3]:
            report = vislr.apply(unet, LayerPlan((unit.name,)))
            errors = [(unet(**batch).sample - out).square().mean() for batch, out in zip(data, base, strict=True)]
            assert scores[unit.name] == pytest.approx(float(sum(errors) / len(errors)), rel=1e-5)
            vislr.remove(unet, report)
    small = min(unit.parameters for unit in inventory.units if unit.name == silent_name) / inventory.parameters
    plan = laptop_plan(unet, data, small / 2, progress=False)
    assert plan.removed == (silent_name,)


def test_constant_orthogonal_branches_add_up_exactly():
    """Joint loss == sum of c for branches whose outputs are constant and orthogonal (resnets of a stock UNet)."""
    torch.manual_seed(0)
    unet = tiny.tiny_unet()
    names = [f"up_blocks.1.resnets.{i}" for i in (0, 1)]
    # The last stage's two resnets add constants in different channels, and everything after is linear.
    for channel, name in enumerate(names):
        resnet = unet.get_submodule(name)
        nn.init.zeros_(resnet.conv2.weight)
        with torch.no_grad():
            resnet.conv2.bias.zero_()
            resnet.conv2.bias[channel] = 1.0
    first, second = (unet.get_submodule(name) for name in names)
    nn.init.zeros_(second.conv_shortcut.weight)
    with torch.no_grad():
        for i in range(second.conv_shortcut.weight.shape[0]):
            second.conv_shortcut.weight[i, i] = 1.0
        second.conv_shortcut.bias.zero_()
    unet.conv_norm_out, unet.conv_act = nn.Identity(), nn.Identity()
    nn.init.zeros_(unet.conv_out.weight)
    with torch.no_grad():
        for i in range(4):
            unet.conv_out.weight[i, i, 1, 1] = 1.0
    assert first.out_channels == second.out_channels
    data = calibration(unet, 1)
    inventory = units_of(unet)
    losses = OutputLoss(data, progress=False)
    some = Inventory(
        inventory.family, "block", tuple(u for u in inventory.units if u.name in names), (), inventory.parameters,
        inventory.flops, inventory.sample,
    )  # fmt: skip
    scores = losses.score(unet, some)
    with torch.no_grad():
        base = unet(**data[0]).sample
        vislr.apply(unet, LayerPlan(tuple(names)))
        joint = float((unet(**data[0]).sample - base).square().mean())
    assert joint == pytest.approx(sum(scores.values()), rel=1e-4)
    assert joint == pytest.approx(2 / 4, rel=1e-4)


@pytest.mark.parametrize("budget", ["parameters", "flops", "latency"])
def test_a_plan_keeps_its_ratio_and_says_how(budget, tmp_path):
    torch.manual_seed(0)
    pipe = tiny.tiny_sdxl_pipeline()
    data = [sample_inputs(pipe.unet, {"tokens": 16, "batch": 2}, device="cpu")]
    inventory = units_of(pipe, "sub")
    if budget == "latency":
        inventory = with_latency(pipe, inventory, data[0], rounds=2, warmup=1)
        assert sum(unit.latency for unit in inventory.units) < inventory.latency
        assert all(unit.latency > 0 for unit in inventory.units)
    plan = laptop_plan(pipe, data, 0.4, budget=budget, inventory=inventory, progress=False)
    assert plan.saved >= 0.4 * plan.total == 0.4 * getattr(inventory, budget)
    assert plan.settings["samples"] == 2
    assert plan.settings["granularity"] == "sub"
    assert len(plan.settings["calibration"]) == len(plan.base) == 64
    assert set(plan.scores) == {unit.name for unit in inventory.units}
    assert plan.component == "unet"
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    report = vislr.apply(pipe, plan, name="laptop")
    before, after = report.parameters if budget == "parameters" else report.flops
    if budget != "latency":
        assert before - after == plan.saved or budget == "flops"
    draw_plan(plan, inventory, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ModelError, match=r"other names or shapes|has no"):
        vislr.apply(tiny.tiny_unet(cross_attention_dim=8), plan)


def test_scoring_resumes_and_refuses_other_scores(tmp_path, capsys):
    unet = tiny.tiny_unet()
    data, inventory = calibration(unet, 1), units_of(unet)
    whole = OutputLoss(data, folder=tmp_path).score(unet, inventory)
    assert "12 units, 13 forwards" in capsys.readouterr().err
    path = tmp_path / "scores-0.json"
    stored = json.loads(path.read_text())
    assert stored["values"] == whole
    dropped = list(whole)[-1]
    del stored["values"][dropped]
    stored["values"][next(iter(whole))] = 77.0
    path.write_text(json.dumps(stored))
    again = OutputLoss(data, folder=tmp_path, progress=False).score(unet, inventory)
    assert again[dropped] == whole[dropped], "what was missing is measured"
    assert again[next(iter(whole))] == 77.0, "what was there is not measured again"
    with pytest.raises(ConfigError, match="another model, data or settings"):
        OutputLoss(calibration(unet, 2), folder=tmp_path, progress=False).score(unet, inventory)


def test_bad_calibration_is_named():
    unet = tiny.tiny_unet()
    for data, message in (([], "no calibration data"), ([3], "got a int")):
        with pytest.raises(DataError, match=message):
            laptop_plan(unet, data, 0.2, progress=False)
    bad = calibration(unet, 1)
    bad[0]["sample"].fill_(float("nan"))
    with pytest.raises(DataError, match=r"scored '.*' nan"):
        laptop_plan(unet, bad, 0.2, progress=False)
    with pytest.raises(ConfigError, match=r"beyond what can be removed: all 12 units at granularity 'block' are 0\.90"):
        laptop_plan(unet, calibration(unet, 1), 0.95, progress=False)
    with pytest.raises(ConfigError, match="ratio is 2"):
        plan_layers(unet, Random(), 2)
    with pytest.raises(ConfigError, match="no budget 'memory'"):
        plan_layers(unet, Random(), 0.2, budget="memory")
    with pytest.raises(ConfigError, match="needs measured units"):
        plan_layers(unet, Random(), 0.2, budget="latency")
    with pytest.raises(ConfigError, match="no granularity 'blocks'; did you mean 'block'"):
        plan_layers(unet, Random(), 0.2, granularity="blocks")


def test_additivity_is_measured(tmp_path):
    torch.manual_seed(0)
    unet = tiny.tiny_unet()
    data, inventory = calibration(unet, 1), units_of(unet)
    scores = OutputLoss(data, progress=False).score(unet, inventory)
    report = additivity(unet, data, scores, inventory, subsets=6, progress=False)
    assert len(report.points) == 6
    sums, joint = np.array(report.points)[:, 1:].T
    assert report.pearson.value == pytest.approx(np.corrcoef(sums, joint)[0, 1])
    assert report.slope.value == pytest.approx((sums * joint).sum() / (sums**2).sum())
    assert report.pearson.interval[0] <= report.pearson.interval[1]
    draw_additivity(report, tmp_path / "additivity.png")
    assert (tmp_path / "additivity.png").stat().st_size > 1000
    with pytest.raises(DataError, match="three or more"):
        additivity(unet, data, scores, inventory, subsets=2)


@pytest.mark.parametrize("criterion", [Magnitude(), Random(3), UniformDepth()])
@pytest.mark.parametrize("build", [tiny.tiny_sd3_transformer, tiny.tiny_vit, tiny.tiny_conv_net, tiny.tiny_unet])
def test_baselines_reach_the_ratio_on_every_family(criterion, build):
    model = build()
    plan = plan_layers(model, criterion, 0.25)
    assert plan.saved >= 0.25 * size(model)
    assert plan.criterion == criterion.name
    before = size(model)
    vislr.apply(model, plan)
    assert before - size(model) == plan.saved
    with pytest.raises(ConfigError, match="beyond what can be removed"):
        plan_layers(model, criterion, 1.0)


def test_baselines_do_what_they_say():
    model = tiny.tiny_sd3_transformer(num_layers=8)
    inventory = units_of(model)
    scores = Magnitude().score(model, inventory)
    # The last block has fewer parameters; compare two equal ones.
    with torch.no_grad():
        for p in model.transformer_blocks[3].parameters():
            p.mul_(0.5)
    assert Magnitude().score(model, inventory)["transformer_blocks.3"] == pytest.approx(
        scores["transformer_blocks.3"] / 2
    )
    order = UniformDepth().score(model, inventory)
    first = sorted(order, key=order.__getitem__)[:3]
    places = sorted(int(name.rpartition(".")[2]) for name in first)
    assert places[0] in (1, 2)
    assert places[1] in (3, 4)
    assert places[2] in (5, 6)
    assert Random(1).score(model, inventory) == Random(1).score(model, inventory) != Random(2).score(model, inventory)
    with torch.device("meta"), pytest.raises(ModelError, match="meta"):
        Magnitude().score(tiny.tiny_sd3_transformer(), units_of(tiny.tiny_sd3_transformer()))


# --- true sizes, on meta ----------------------------------------------------------------------------------------

# Units, and parameters in them: from the specification's table, computed elsewhere.
COUNTS = {
    ("sd15", "transformer"): (38, 781.7e6),
    ("sd15", "sub"): (70, None),
    ("sdxl", "transformer"): (28, 2523.7e6),
    ("sdxl", "block"): (87, None),
    ("sdxl", "sub"): (227, None),
    ("sd35-large", "block"): (38, None),
    ("flux-schnell", "block"): (57, 19 * 339.8e6 + 38 * 141.6e6),
}


_FAST = (("sd15", "transformer"), ("sdxl", "block"), ("sd35-large", "block"))


@pytest.mark.parametrize(
    ("name", "granularity"), [case if case in _FAST else pytest.param(*case, marks=pytest.mark.slow) for case in COUNTS]
)
def test_units_at_true_size(name, granularity):
    count, parameters = COUNTS[name, granularity]
    model = skeleton(name)
    inventory = units_of(model, granularity)
    assert len(inventory.units) == count
    if parameters is not None:
        assert inventory.most() == pytest.approx(parameters, rel=1e-3)
    if name == "sdxl" and granularity == "block":
        cost = scoring_cost(inventory, samples=256, batch=4)
        assert (cost.units, cost.forwards) == (87, 64 * 88)
        # Every forward but the first leaves one unit out.
        assert cost.flops == 256 * (88 * inventory.flops - sum(unit.flops for unit in inventory.units))
        assert "87 units, 5632 forwards" in str(cost)
    if name == "flux-schnell":
        assert inventory.parameters == pytest.approx(11.891e9, rel=1e-4)
        assert inventory.units[0].parameters == pytest.approx(339.8e6, rel=1e-3)
        assert inventory.units[-1].parameters == pytest.approx(141.6e6, rel=1e-3)
    if name == "sdxl":
        assert inventory.parameters == pytest.approx(2567.5e6, rel=1e-4)
    if name == "sd15":
        assert inventory.parameters == pytest.approx(859.5e6, rel=1e-4)
    if name == "sd35-large":
        assert inventory.parameters == pytest.approx(8.057e9, rel=1e-4)
        assert inventory.units[0].parameters == pytest.approx(213.0e6, rel=1e-3)
        assert inventory.units[-1].parameters == pytest.approx(136.1e6, rel=1e-3)


def test_published_cuts_of_sd35_large():
    """Moderate: 8 of 38 blocks leave 78.85 %; hybrid: 15 more parts leave 70.48 % (HierarchicalPrune)."""
    model = skeleton("sd35-large")
    total = size(model)
    eight = block_range("25-29,31-35", inclusive=False)
    assert eight == [25, 26, 27, 28, 31, 32, 33, 34]
    assert len(block_range("25-29,31-35")) == 10
    blocks = [f"transformer_blocks.{i}" for i in eight]
    parts = units_of(model, "part")
    inside = [u.name for u in parts.units if any(u.name.startswith(f"transformer_blocks.{i}.") for i in range(13, 19))]
    candidates = [name for name in inside if not name.endswith(".attn")]
    norms, feeds = ([n for n in candidates if ("norm" in n) is wanted] for wanted in (True, False))
    # Three norms come first by their scores, then feed-forwards: the reference's 15 units have this make-up.
    scores = {name: float(i) for i, name in enumerate([*norms[:3], *feeds, *norms[3:]])}
    removed = hybrid_cut(model, blocks, parts, scores, 0.29)
    assert len(removed) == 8 + 15
    attached = attach(model, LayerPlan(tuple(removed)))
    assert size(model) / total == pytest.approx(0.7048, abs=5e-5)
    detach(model, attached)
    plan = LayerPlan(tuple(blocks))
    assert removed_blocks(model, plan) == eight
    attach(model, plan)
    assert size(model) / total == pytest.approx(0.7885, abs=5e-5)


@pytest.mark.slow
def test_published_lists():
    unet = skeleton("sd15")
    for variant, published in (("base", 0.58e9), ("small", 0.49e9), ("tiny", 0.33e9)):
        plan = bk_sdm_plan(unet, variant)
        left = plan.total - plan.saved
        assert 0.995 * published < left < 1.12 * published, variant
    with pytest.raises(ConfigError, match="no variant 'tny'; did you mean 'tiny'"):
        bk_sdm_plan(unet, "tny")
    sdxl = skeleton("sdxl")
    plan = ssd_1b_plan(sdxl)
    attach(sdxl, plan)
    assert size(sdxl) == plan.total - plan.saved == pytest.approx(1.33e9, rel=0.005)
    # The rule at the list's ratio: the same middle, and three quarters of the parameters in the same units.
    rule = plan_layers(skeleton("sdxl"), SsdOrder(), plan.saved / plan.total)
    assert {name for name in plan.removed if name.startswith("mid")} <= set(rule.removed)
    shared = units_of(skeleton("sdxl")).saved(sorted(set(plan.removed) & set(rule.removed)))
    assert shared >= 0.75 * plan.saved
    for wrong in (bk_sdm_plan, ssd_1b_plan):
        with pytest.raises(ModelError, match="for"):
            wrong(tiny.tiny_sd3_transformer())


# --- HierarchicalPrune ------------------------------------------------------------------------------------------


def test_position_decides_between_equal_drops():
    for kappa in (0.5, 1.0, 3.0):
        scores = [keep_score(0.3, i, 10, kappa) for i in range(10)]
        assert scores == sorted(scores, reverse=True), "later first"
        helps = [keep_score(-0.3, i, 10, kappa) for i in range(10)]
        assert helps == sorted(helps, reverse=True)
        assert max(helps) < 0 < min(scores)
    assert [keep_score(d, 3, 10, 0.0) for d in (-0.2, 0.0, 0.5)] == [-0.2, 0.0, 0.5]
    assert keep_score(0.3, 5, 10) == pytest.approx(0.3 / math.exp(-0.5))


@pytest.mark.parametrize(
    ("text", "message"), [("3-", "no block"), ("a", "no block"), ("5-3", "empty"), ("1,,2", "no block")]
)
def test_wrong_ranges(text, message):
    with pytest.raises(ConfigError, match=message):
        block_range(text)
    assert block_range("1, 4-5,4") == [1, 4, 5]


class Darkness:
    """A quality that costs nothing: how dark the pictures are. Counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, images, prompts):
        self.calls += 1
        assert len(images) == len(prompts)
        return -float(np.mean([np.asarray(image).mean() for image in images])) / 255


PICTURES = {"steps": 1, "guidance": 1.0, "progress": False, "options": {"max_sequence_length": 16, "height": 32,
                                                                        "width": 32}}  # fmt: skip


def test_hierarchical_cuts(tmp_path):
    torch.manual_seed(0)
    pipe = tiny.tiny_sd3_pipeline()
    pipe.transformer = None
    pipe.register_modules(transformer=tiny.tiny_sd3_transformer(num_layers=4))
    quality = Darkness()
    plan = hierarchical_plan(pipe, ["a cat face"], 0.2, quality, folder=tmp_path, **PICTURES)
    assert quality.calls == 5
    drops = plan.settings["drops"]
    assert set(drops) == {f"transformer_blocks.{i}" for i in range(4)}
    for i, (name, drop) in enumerate(drops.items()):
        assert plan.scores[name] == keep_score(drop, i, 4)
    assert plan.removed[0] == min(plan.scores, key=plan.scores.__getitem__)
    again = hierarchical_plan(pipe, ["a cat face"], 0.2, quality, folder=tmp_path, **PICTURES)
    assert (again.removed, again.scores) == (plan.removed, plan.scores)
    assert quality.calls == 5, "drops were kept"
    few = hierarchical_plan(pipe, ["a cat face"], 0.1, quality, eligible=[2, 3], **PICTURES)
    assert set(few.scores) == {"transformer_blocks.2", "transformer_blocks.3"}
    hybrid = hierarchical_plan(pipe, ["a cat face"], 0.4, quality, cut="hybrid", block_ratio=0.15, **PICTURES)
    assert hybrid.saved >= 0.4 * hybrid.total
    whole = [name for name in hybrid.removed if name.count(".") == 1]
    assert whole
    assert not any(name.endswith("attn") for name in hybrid.removed)
    before = size(pipe.transformer)
    vislr.apply(pipe, hybrid)
    assert before - size(pipe.transformer) == hybrid.saved
    for wrong, message in (({"cut": "deep"}, "no cut 'deep'"), ({"eligible": [9]}, "block 9 is eligible")):
        with pytest.raises(ConfigError, match=message):
            hierarchical_plan(tiny.tiny_sd3_pipeline(), ["a cat face"], 0.1, quality, **PICTURES, **wrong)
    with pytest.raises(ConfigError, match="the 1 eligible units"):
        hierarchical_plan(tiny.tiny_sd3_pipeline(), ["a cat face"], 0.6, quality, eligible=[0], **PICTURES)
    with pytest.raises(ModelError, match="expected a pipeline"):
        Contribution(["x"], quality).score(tiny.tiny_unet(), units_of(tiny.tiny_unet()))


def test_hierarchical_reads_a_unet_s_resnets_and_blocks_in_the_order_of_its_forward(capsys):
    pipe = tiny.tiny_sd_pipeline()
    options = {"steps": 1, "guidance": 3.0, "batch": 2, "options": {"height": 32, "width": 32}}
    plan = hierarchical_plan(pipe, ["a cat face", "a pizza", "a car"], 0.2, Darkness(), **options)
    assert "12 units, 26 forwards" in capsys.readouterr().err, "2 batches of pictures, 13 times"
    assert list(plan.scores) == [unit.name for unit in units_of(pipe).units]
    assert plan.saved >= 0.2 * plan.total
    hybrid = hierarchical_plan(
        pipe, ["a cat face"], 0.4, Darkness(), cut="hybrid", block_ratio=0.1, **options | {"progress": False}
    )
    assert hybrid.saved >= 0.4 * hybrid.total
    assert not any(name.endswith(("attn1", "attn2")) for name in hybrid.removed)
    before = size(pipe.unet)
    vislr.apply(pipe, hybrid)
    assert before - size(pipe.unet) == hybrid.saved


def test_drops_by_another_quality_are_not_taken_up(tmp_path):
    pipe = tiny.tiny_sd_pipeline()
    quality = Darkness()
    options = {"steps": 1, "guidance": 1.0, "progress": False, "options": {"height": 32, "width": 32}}
    hierarchical_plan(pipe, ["a cat face"], 0.2, quality, folder=tmp_path, **options)
    quality.hash = "another gallery"
    with pytest.raises(ConfigError, match="another model, data or settings"):
        hierarchical_plan(pipe, ["a cat face"], 0.2, quality, folder=tmp_path, **options)


def test_prototype_quality_prefers_the_right_pictures():
    from vislr import measure, zoo

    cats, cars = (
        [p for p in zoo.images() if p.name == name][:3] for name in (zoo.images()[0].name, zoo.images()[40].name)
    )
    gallery = measure.prototypes([*cats[1:], *cars[1:]])
    quality = PrototypeQuality({"one": cats[0].name, "two": cars[0].name}, gallery)
    right = quality([cats[0].image(), cars[0].image()], ["one", "two"])
    wrong = quality([cars[0].image(), cats[0].image()], ["one", "two"])
    assert right > wrong
    with pytest.raises(DataError, match="no concept 'nothing'"):
        PrototypeQuality({"x": "nothing"}, gallery)
