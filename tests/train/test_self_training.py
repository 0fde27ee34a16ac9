"""Domain adaptation by self-training: its losses, choice and figures; adapters that travel; exact resume."""

from __future__ import annotations

import copy
import json
import os
import signal

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

import vislr
from vislr.adapters import ConvLoraConfig, attach
from vislr.adapters.inject import exactly, tuner_layers
from vislr.core.errors import Interrupted, ModelError, OutputError, TargetError, TrainingError
from vislr.formats import read_adapter
from vislr.measure import dice, surface_dice
from vislr.train.self_training import adapt_domain, batches, self_training_loss
from vislr.train.self_training_config import (
    AdaptConfig,
    DomainConfig,
    EarlyHeadConfig,
    NetConfig,
    SelfTrainingConfig,
    ShiftAdapterConfig,
    ShiftOutputConfig,
    SourceTrainingConfig,
    StatisticsConfig,
)
from vislr.train.self_training_data import Domain
from vislr.train.self_training_figures import agreement, outcome, verdict
from vislr.train.self_training_models import (
    EarlySegmentationHead,
    Net,
    ResidualUNet,
    build_net,
    module_at,
    sites_before,
)

SIZE = 16


def discs(volumes, gain=1.0, offset=0.2, seed=0, size=SIZE):
    """Volumes of noisy discs of other brightness: a domain whose masks are the discs."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"))
    x, y, keys = [], [], []
    for volume in range(volumes):
        for _ in range(10):
            centre, radius = rng.uniform(6, 10, (2, 1, 1)), rng.uniform(3, 6)
            mask = np.hypot(*(grid - centre)) < radius
            x.append(offset + gain * mask + 0.1 * rng.random((size, size)))
            y.append(mask)
            keys.append(f"volume {volume}")
    inputs = torch.tensor(np.stack(x), dtype=torch.float32)[:, None]
    spacing = tuple((key, (1.0, 1.0, 1.0)) for key in dict.fromkeys(keys))
    return Domain("discs", inputs, torch.tensor(np.stack(y)), tuple(keys), spacing=spacing)


def stripes(count, gain=1.0, offset=0.0, seed=0, labels=True):
    """Pictures with horizontal, vertical or no stripes."""
    rng = np.random.default_rng(seed)
    wave = np.sin(np.arange(32) * 1.6)
    patterns = [np.tile(wave[:, None], (1, 32)), np.tile(wave, (32, 1)), np.zeros((32, 32))]
    truth = np.arange(count) % 3
    x = np.stack([offset + gain * (patterns[t] * 50 + 120) + rng.normal(0, 8, (32, 32)) for t in truth])
    inputs = torch.tensor(x.clip(0, 255), dtype=torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()
    keys = tuple(f"{i}.png" for i in range(count))
    half = (0.5,) * 3
    classes = ("rows", "columns", "plain")
    return Domain("stripes", inputs, torch.tensor(truth) if labels else None, keys, classes, half, half)


def settings(folder, task="segmentation", **changes):
    base = "unet" if task == "segmentation" else "timm/resnet10t"
    defaults = {
        "task": task,
        "model": NetConfig(base=base, pretrained=False, size=SIZE),
        "source": DomainConfig(["here"], held_out=0.3),
        "target": DomainConfig(["there"], held_out=0.3),
        "training": SourceTrainingConfig(epochs=2),
        "early_head": EarlyHeadConfig(epochs=2),
        "adaptation": SelfTrainingConfig(epochs=2, lr=1e-3),
        "statistics": StatisticsConfig(examples=8),
        "output": ShiftOutputConfig(str(folder)),
        "batch": 8,
        "device": "cpu",
    }
    return AdaptConfig(**(defaults | changes))


class Segmenter(nn.Module):
    """Three convs with BatchNorm, and a logit."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 8, 2, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.out = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x):
        x = self.enter(x)
        return self.out(torch.cat([x, self.up(self.down(x))], 1))


def small_segmenter(seed=0):
    torch.manual_seed(seed)
    return Net(Segmenter(), None, "down", (0.0,), (1.0,))


def small_classifier(seed=0):
    model = tiny.tiny_conv_net(classes=3, seed=seed)
    return Net(model, model.get_classifier(), "layer2", (0.5,) * 3, (0.5,) * 3)


def save(model, name, path, aux):
    vislr.save_adapter(model, path, name=name, aux=aux)


def adapt(config, net, source, target, **options):
    return adapt_domain(config, net, source, target, save_adapter=save, quiet=True, **options)


# The pieces.


def test_the_unet_is_that_of_the_specification():
    """52 BatchNorms with 6,338 parameters, 55 convs, and the published counts of ConvLoRA with r = 2 on its encoder."""
    with torch.device("meta"):
        net = ResidualUNet()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    convs = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]
    assert (len(norms), sum(p.numel() for norm in norms for p in norm.parameters())) == (52, 6_338)
    assert len(convs) == 55
    assert sum(p.numel() for p in net.parameters()) == 2_434_771
    real = ResidualUNet()
    for layer, sites, count in (
        ("init_path", 7, 3_762),
        ("down1", 14, 11_058),
        ("down2", 21, 25_650),
        ("down3", 28, 54_834),
    ):
        found = sites_before(real, layer, torch.rand(1, 1, 16, 16))
        assert len(found) == sites
        model = copy.deepcopy(net)
        attach(model, ConvLoraConfig(r=2, target_modules=exactly(found)), "a")
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_early_heads_of_every_level_have_the_published_size():
    counts = [sum(p.numel() for p in EarlySegmentationHead(16 * 2**level).parameters()) for level in range(4)]
    assert counts == [2_725, 4_453, 7_909, 14_821]
    head = EarlySegmentationHead(5).eval()
    assert head(torch.rand(2, 5, 4, 6), (32, 48)).shape == (2, 1, 32, 48)


@pytest.mark.parametrize("shape", [(4, 1, 3, 5), (4, 7)])
def test_the_loss_at_agreement_is_the_entropy_and_the_target_is_detached(shape):
    torch.manual_seed(0)
    full = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    early = full.detach().clone().requires_grad_()
    loss = self_training_loss(early, full)
    if len(shape) == 4:
        p = full.detach().sigmoid()
        entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    else:
        p = full.detach().softmax(1)
        entropy = -(p * p.log()).sum(1).mean()
    assert torch.allclose(loss, entropy, rtol=1e-12)
    loss.backward()
    assert full.grad is None
    assert early.grad.abs().max() < 1e-12  # agreement is where the early head wants to be
    self_training_loss(early, full, detach_pseudo_label=False).backward()
    assert full.grad.abs().max() > 1e-3


def test_dice_and_surface_dice_by_hand():
    a, b = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    a[2:6, 2:6] = True
    b[2:6, 3:7] = True  # one column further
    assert dice(a, b) == 2 * 12 / 32
    assert surface_dice(a, a) == dice(a, a) == 1
    assert surface_dice(a, b, tolerance=1) == 1
    # Within 0: the boundaries' common elements, rows 2 and 5 at columns 3 to 5, of 12 each.
    assert surface_dice(a, b, tolerance=0) == (6 + 6) / 24
    # Columns are 2 mm apart now: the far sides are 2 mm off.
    assert surface_dice(a, b, spacing=(1, 2), tolerance=1) < 1 == surface_dice(a, b, spacing=(1, 2), tolerance=2)
    empty = np.zeros_like(a)
    assert (dice(empty, empty), surface_dice(empty, empty)) == (1, 1)
    assert (dice(a, empty), surface_dice(a, empty)) == (0, 0)
    with pytest.raises(vislr.VislrError, match=r"shapes \(9, 9\) and \(4, 4\)"):
        dice(a, np.zeros((4, 4)))
    with pytest.raises(vislr.VislrError, match="expected 2 sizes"):
        surface_dice(a, b, spacing=(1,))


def test_two_empty_masks_are_no_agreement():
    domain = discs(2)
    nothing = torch.zeros_like(domain.truth)
    assert agreement(nothing, nothing, domain) == 0
    assert agreement(domain.truth, domain.truth, domain) == 1
    half = domain.truth.clone()
    half[:10] = False
    assert agreement(domain.truth, half, domain) == 0.5
    pictures = stripes(6)
    assert agreement(pictures.truth, torch.tensor([0, 1, 2, 2, 2, 2]), pictures) == pytest.approx(4 / 6)


def test_figures_and_verdicts():
    domain = stripes(60)

    class Trial:
        def __init__(self, decided, agrees):
            self.outcome, self.agreement, self.epoch = outcome(decided, domain, 1.0), [agrees], 0

    right = domain.truth.clone()
    wrong = (right + 1) % 3
    half = torch.where(torch.arange(60) < 30, right, wrong)
    base = Trial(half, 0.5)
    assert base.outcome.figures == {"accuracy": 0.5}
    said = {
        name: verdict(name, Trial(decided, 0.4), base, 0)
        for name, decided in (("up", right), ("down", wrong), ("same", half))
    }
    assert {name: each.word for name, each in said.items()} == {
        "up": "better",
        "down": "worse",
        "same": "no clear difference",
    }
    assert said["down"].gain == -0.5
    assert said["down"].interval[1] < 0
    assert "down: WORSE THAN THE SOURCE MODEL: accuracy 0.500 -> 0.000" in said["down"].line
    domain = stripes(60, labels=False)
    base = Trial(half, 0.5)
    assert base.outcome.figures == {}
    assert "WORSE AGREEMENT" in verdict("x", Trial(wrong, 0.4), base, 0).line
    assert verdict("x", Trial(wrong, 0.6), base, 0).word == "unknown"


def test_domains_split_by_key_and_equal_names_fall_on_the_same_side():
    domain, other = discs(4), discs(4, seed=3)
    train, test, shared = domain.split(0.3)
    assert not shared
    assert set(train.keys).isdisjoint(test.keys)
    assert (len(train), len(test)) == (30, 10)
    assert set(other.split(0.3)[1].keys) == set(test.keys)
    assert dict(test.spacing)  # of all volumes: it is looked up by key
    for share, one in ((0.0, domain), (0.5, discs(1))):
        train, test, shared = one.split(share)
        assert shared
        assert len(train) == len(test) == len(one)
    assert domain.fingerprint() == discs(4).fingerprint() != other.fingerprint()


def test_batches_are_a_function_of_the_key():
    assert batches(10, 4, 0, "x", 1) == batches(10, 4, 0, "x", 1) != batches(10, 4, 0, "x", 2)
    assert sorted(i for part in batches(10, 4, 0, "x", 1) for i in part) == list(range(10))
    assert batches(9, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]  # figures see every example
    assert [len(part) for part in batches(9, 4, 0)] == [4, 4]  # a batch of one gives BatchNorm no variance
    assert batches(1, 4, 0) == [[0]]


# Whole runs.


@pytest.mark.parametrize("mode", ["exact", "ema"])
def test_a_shift_of_brightness_and_contrast_is_undone_by_statistics(mode, tmp_path):
    """The synthetic shift of the specification's test 9: AdaBN alone recovers most of the drop."""
    source, target = discs(4), discs(3, gain=0.25, offset=0.7, seed=1)
    net = small_segmenter()
    config = settings(
        tmp_path, training=SourceTrainingConfig(epochs=12, lr=1e-2), statistics=StatisticsConfig(mode, 0),
        early_head=EarlyHeadConfig(epochs=4, lr=1e-2),
    )  # fmt: skip
    before = list(dict(net.model.named_modules()))
    result = adapt(config, net, source, target)
    dices = {name: trial.outcome.figures["dice"] for name, trial in result.trials.items()}
    assert result.source.figures["dice"] > 0.8
    assert dices["source"] < 0.6 * result.source.figures["dice"]
    lost = result.source.figures["dice"] - dices["source"]
    # Three batches take running averages a quarter of the way only.
    assert dices["adabn"] > dices["source"] + (0.5 * lost if mode == "exact" else 0)
    assert verdict("adabn", result.trials["adabn"], result.trials["source"], 0).word == "better"
    # The model comes back as the source model.
    assert list(dict(net.model.named_modules())) == before
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == net.model.state_dict().keys()
    assert all(torch.equal(stored[key], value) for key, value in net.model.state_dict().items())
    # The epoch kept is the best by agreement, the first of equals.
    for trial in result.trials.values():
        assert trial.epoch == trial.agreement.index(max(trial.agreement))
    assert len(result.trials["both"].agreement) == 3
    assert len(result.trials["adabn"].agreement) == 1


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_adapters_travel_with_statistics_and_early_head(task, tmp_path):
    if task == "segmentation":
        source, target, net, fresh = discs(3), discs(2, 0.5, 0.5, seed=2), small_segmenter(), small_segmenter(1)
        head = {"layers.0.weight", "layers.1.running_mean", "layers.6.bias"}
    else:
        source, target, net, fresh = stripes(30), stripes(30, 0.5, 60, seed=2), small_classifier(), small_classifier(1)
        head = {"linear.weight", "linear.bias"}
    config = settings(tmp_path, task)
    result = adapt(config, net, source, target)
    test = target.split(0.3)[1]
    fresh.model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for name, kind in (("adabn", "adabn"), ("convlora", "convlora"), ("both", "convlora")):
        file = read_adapter(tmp_path / f"{name}.safetensors")
        assert file.kind == kind
        assert head <= file.aux.keys()
        assert (file.statistics is not None) == (name == "both")
        assert not any(key.startswith("aux") for key in file.tensors)
        report = vislr.load_adapter(fresh.model, tmp_path / f"{name}.safetensors")
        fresh.model.eval()
        with torch.no_grad():
            logits = torch.cat([fresh.model(test.batch(part, torch.device("cpu"))) for part in batches(len(test), 8)])
        decided = logits[:, 0] > 0 if task == "segmentation" else logits.argmax(1)
        assert torch.equal(decided, result.trials[name].outcome.decided)
        vislr.remove(fresh.model, report)
    trained = sites_before(net.model, net.layer, source.batch([0, 1], torch.device("cpu")))
    assert sorted(read_adapter(tmp_path / "convlora.safetensors").tensors) == sorted(trained)
    assert result.trials["convlora"].sites == len(trained)
    assert set(tmp_path.iterdir()) >= {tmp_path / "stages"}


def test_self_training_moves_the_adapter_alone_and_lowers_its_loss(tmp_path):
    source, target = stripes(36), stripes(36, 0.6, 50, seed=1)
    net = small_classifier()
    config = settings(
        tmp_path, "classification", adaptation=SelfTrainingConfig(["source", "convlora"], 6, 1e-2),
        training=SourceTrainingConfig(epochs=8, lr=1e-2), early_head=EarlyHeadConfig(epochs=8, lr=1e-2),
    )  # fmt: skip
    result = adapt(config, net, source, target)
    trial = result.trials["convlora"]
    assert trial.losses[-1] < 0.9 * trial.losses[0]
    assert trial.parameters == sum(
        value.numel()
        for parts in read_adapter(trial.file).tensors.values()
        for key, value in parts.items()
        if key != "alpha"
    )
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[key], value) for key, value in net.model.state_dict().items())


def test_without_labels_nothing_is_judged_and_nothing_changes(tmp_path):
    source = stripes(24)
    files = {}
    for name, labels in (("with", True), ("without", False)):
        result = adapt(
            settings(tmp_path / name, "classification"), small_classifier(), source, stripes(24, 0.6, 50, labels=labels)
        )
        assert bool(result.trials["both"].outcome.figures) == labels
        files[name] = load_file(tmp_path / name / "both.safetensors")
    # Labels of the target decide nothing.
    assert files["with"].keys() == files["without"].keys()
    assert all(torch.equal(value, files["without"][key]) for key, value in files["with"].items())


@pytest.mark.parametrize("stop", [("source", 1), ("early-head", 2), ("convlora", 1), ("both", 1)])
def test_a_stopped_run_goes_on_bit_for_bit(stop, tmp_path):
    source, target = discs(3), discs(2, 0.5, 0.5, seed=2)

    def config(name, **more):
        return settings(tmp_path / name, output=ShiftOutputConfig(str(tmp_path / name), **more))

    whole = adapt(config("whole"), small_segmenter(), source, target)
    with pytest.raises(Interrupted, match=f"stage '{stop[0]}' after epoch {stop[1]} of 2; go on"):
        adapt(config("parts"), small_segmenter(), source, target, stop=lambda stage, epoch: (stage, epoch) == stop)
    with pytest.raises(OutputError, match="a run that stopped"):
        adapt(config("parts"), small_segmenter(), source, target)
    again = adapt(config("parts", resume=True), small_segmenter(), source, target)
    for name in ("model", "adabn", "convlora", "both"):
        one, other = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "parts"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert again.histories == whole.histories
    assert {n: t.agreement for n, t in again.trials.items()} == {n: t.agreement for n, t in whole.trials.items()}
    with pytest.raises(vislr.VislrError, match=r"cannot resume: adaptation\.lr"):
        adapt(
            settings(
                tmp_path / "parts", adaptation=SelfTrainingConfig(epochs=2, lr=5e-4),
                output=ShiftOutputConfig(str(tmp_path / "parts"), resume=True),
            ),
            small_segmenter(), source, target,
        )  # fmt: skip
    with pytest.raises(vislr.VislrError, match="cannot resume: data"):
        adapt(config("parts", resume=True), small_segmenter(), source, discs(2, 0.4, 0.5, seed=2))


def test_a_signal_leaves_and_keeps_what_is_done(tmp_path):
    source, target = discs(3), discs(2, 0.5, 0.5, seed=2)
    handler = signal.getsignal(signal.SIGTERM)

    def kill(stage, epoch):
        if (stage, epoch) == ("convlora", 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    with pytest.raises(Interrupted, match="the epochs made so far are kept; go on"):
        adapt(settings(tmp_path), small_segmenter(), source, target, stop=kill)
    assert signal.getsignal(signal.SIGTERM) is handler
    again = adapt(
        settings(tmp_path, output=ShiftOutputConfig(str(tmp_path), resume=True)), small_segmenter(), source, target
    )
    assert len(again.trials["convlora"].losses) == 2


def test_a_head_is_trained_on_source_statistics(tmp_path):
    source, target = stripes(30, 0.5, 90), stripes(30)
    net = small_classifier()
    weights = {key: value.clone() for key, value in net.model.state_dict().items()}
    config = settings(
        tmp_path, "classification", training=SourceTrainingConfig("head", 3, 1e-2),
        adaptation=SelfTrainingConfig(["source"]), statistics=StatisticsConfig(examples=0),
    )  # fmt: skip
    adapt(config, net, source, target)
    changed = {key for key, value in net.model.state_dict().items() if not torch.equal(value, weights[key])}
    assert {key for key in changed if not key.startswith("fc.")} == {
        key for key in weights if key.endswith(("running_mean", "running_var"))
    }
    seen = []
    handle = net.model.bn1.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        train = source.split(0.3)[0]
        net.model.eval()(train.batch(range(len(train)), torch.device("cpu")))
    handle.remove()
    assert torch.allclose(net.model.bn1.running_mean, seen[0].mean((0, 2, 3)), atol=1e-5)


# What cannot be.


def test_a_model_without_batch_norm_is_refused_for_adabn_before_any_work(tmp_path):
    model = tiny.tiny_vit(3)
    net = Net(model, model.get_classifier(), "blocks.0", (0.5,) * 3, (0.5,) * 3)
    source, target = stripes(24), stripes(24, 0.5, seed=1)
    modules = list(dict(model.named_modules()))
    with pytest.raises(vislr.VislrError, match=r"has no BatchNorm.*5 LayerNorm"):
        adapt(settings(tmp_path, "classification"), net, source, target)
    assert list(dict(model.named_modules())) == modules
    assert not (tmp_path / "stages").exists()
    # ConvLoRA alone goes: its linears are plain LoRA.
    config = settings(tmp_path, "classification", adaptation=SelfTrainingConfig(["source", "convlora"], 1))
    assert adapt(config, net, source, target).trials["convlora"].sites > 0


def test_what_does_not_fit_the_model(tmp_path):
    source, target = discs(2), discs(2, seed=1)
    with pytest.raises(TargetError, match=r"no layer 'down9'.*'down'.*early_head.layer"):
        adapt(settings(tmp_path, early_head=EarlyHeadConfig("down9")), small_segmenter(), source, target)
    with pytest.raises(TargetError, match="down9"):
        adapt(
            settings(tmp_path, adapter=ShiftAdapterConfig(target_modules=["down9"])), small_segmenter(), source, target
        )
    with pytest.raises(vislr.VislrError, match="rank 50 is larger"):
        adapt(settings(tmp_path, adapter=ShiftAdapterConfig(r=50)), small_segmenter(), source, target)
    broken = small_segmenter()
    with torch.no_grad():
        broken.model.enter[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(vislr.VislrError, match=r"'enter\.0' has NaN"):
        adapt(settings(tmp_path), broken, source, target)
    assert not any(tuner_layers(broken.model))
    with pytest.raises(TargetError, match="no default layer"):
        module_at(small_segmenter().model, "")
    with pytest.raises(TrainingError, match="the loss of stage 'source' is"):
        adapt(settings(tmp_path, training=SourceTrainingConfig(lr=1e30, epochs=9)), small_segmenter(), source, target)
    for base in ("resnet18", "timmy/resnet18"):
        with pytest.raises(ModelError, match=f"no model '{base}'"):
            build_net(NetConfig(base=base), 3, 3)


def test_default_layers():
    assert build_net(NetConfig("unet"), 0, 1).layer == "down3"
    for base, layer in (
        ("timm/resnet18", "layer3"),
        ("torchvision/resnet18", "layer3"),
        ("timm/vit_tiny_patch16_224", "blocks.8"),
    ):
        assert build_net(NetConfig(base, pretrained=False, size=32), 3, 3).layer == layer


def test_the_report_is_plain_json(tmp_path):
    from vislr.pipelines.adapt_domain import write_result

    source, target = discs(3), discs(2, 0.5, 0.5, seed=2)
    config = settings(tmp_path)
    verdicts = write_result(config, adapt(config, small_segmenter(), source, target), source, target)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["trials"]) == ["source", "adabn", "convlora", "both"]
    for name, said in verdicts.items():
        assert (report["trials"][name]["verdict"] == "worse") == (name in report["worse"]) == (said.word == "worse")
    assert report["chosen_without_labels"] in report["trials"]
    assert report["stages"]["source"][0]["loss"] > 0
    assert (tmp_path / "overview.png").stat().st_size > 10_000
