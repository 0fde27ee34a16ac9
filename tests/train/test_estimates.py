"""What `vislr estimate` says: counts exact, memory against what tensors really take, advice, exit codes."""

from __future__ import annotations

import json

import pytest
import timm
import tiny
import torch
from diffusers import StableDiffusionPipeline

from vislr.adapters import attach as attach_config
from vislr.core.errors import ConfigError, ModelError
from vislr.pipelines import estimate
from vislr.pipelines.training_setup import attach
from vislr.train import AdapterSection, DataConfig, ModelConfig, OptimConfig, OutputConfig, TrainConfig
from vislr.train.estimates import _call, estimate_run
from vislr.train.memory_trace import _live, trace_forward, trace_step

GIVEN = ["--data.folder", "pictures", "--output.folder", "out", "--device", "cpu", "--timed", "false"]


def said(capsys, *argv):
    """Exit code and the figures."""
    code = estimate.main([*GIVEN, "--json", *argv])
    return code, json.loads(capsys.readouterr().out)


def test_counts_are_those_of_the_run(sd_folder, capsys):
    adapter = ["--adapter.kind", "lora", "--adapter.r", "2", "--adapter.text_encoders", "text_encoder"]
    code, found = said(capsys, "--model.base", str(sd_folder), *adapter)
    config = TrainConfig(
        data=DataConfig(folder="x"), output=OutputConfig(folder="y"),
        adapter=AdapterSection(kind="lora", r=2, text_encoders=["text_encoder"]),
    )  # fmt: skip
    pipe = tiny.tiny_sd_pipeline()
    reports = attach(config, pipe)
    assert found["trainable"] == sum(report.trainable for report in reports)
    assert found["parts"]["denoiser's weights"] == 4 * sum(p.numel() for p in tiny.tiny_sd_pipeline().unet.parameters())
    assert found["parts"]["optimiser"] == 8 * found["trainable"]
    assert code == 0
    assert found["fits"]
    assert found["total"] == sum(found["parts"].values())


def test_storage_optimiser_and_batch_change_their_parts(sd_folder, capsys):
    base = ["--model.base", str(sd_folder)]
    plain = said(capsys, *base)[1]["parts"]
    small = said(capsys, *base, "--model.storage", "nf4", "--adapter.kind", "lora")[1]["parts"]
    assert small["denoiser's weights"] < 0.3 * plain["denoiser's weights"]
    eight = said(capsys, *base, "--optim.optimizer", "adamw8bit", "--optim.ema", "0.9")[1]["parts"]
    assert eight["optimiser"] == plain["optimiser"] / 4
    assert eight["moving average"] == plain["adapter"]
    half = said(capsys, *base, "--optim.batch", "8")[1]["parts"]
    assert 1.7 < plain["activations, gradients"] / half["activations, gradients"] < 2.1


def test_what_does_not_fit_gets_advice_and_exit_code_1(sd_folder, capsys):
    code, found = said(capsys, "--model.base", str(sd_folder), "--optim.batch", "64", "--memory_gb", "0.21")
    assert code == 1
    assert not found["fits"]
    assert "model.checkpointing true" in found["advice"]
    totals = list(found["advice"].values())
    assert totals == sorted(totals, reverse=True)
    assert totals[0] < found["total"]


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (["--model.base", "emoji-unt"], ModelError, "'emoji-unt' is no diffusers folder and no embedded name; did you"),
        (
            ["--adapter.kind", "sara", "--adapter.count", "9", "--adapter.text_encoders", "text_encoder"],
            ConfigError,
            "sara on text encoders cannot be estimated",
        ),
        (
            ["--model.base", "timm/resnet10t", "--adapter.kind", "sara", "--adapter.threshold", "0.01"],
            ConfigError,
            "the weights of 'timm/resnet10t' are not here to compare with adapter.threshold",
        ),
        (["--device", "gpu"], ConfigError, "device 'gpu' is none that torch knows"),
        (["--adapter.text_encoders", "text_encoder_3"], ConfigError, "a StableDiffusionPipeline has none"),
    ],
)
def test_wrong_estimates_fail_by_name(argv, error, message):
    with pytest.raises(error, match=message):
        estimate.main([*GIVEN, *argv])


def test_dora_counts_its_magnitudes(sd_folder, capsys):
    def trainable(kind):
        return said(capsys, "--model.base", str(sd_folder), "--adapter.kind", kind, "--adapter.r", "2")[1]["trainable"]

    unet = tiny.tiny_sd_pipeline().unet
    rows = sum(m.weight.shape[0] for m in unet.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
    assert 0 < trainable("dora") - trainable("lora") <= rows


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_products_of_peft_are_traced_as_they_train(sd_folder, capsys, kind):
    argv = ["--model.base", str(sd_folder), "--adapter.kind", kind, "--adapter.r", "2", "--timed", "true"]
    found = said(capsys, *argv)[1]
    config = TrainConfig(
        data=DataConfig(folder="x"), output=OutputConfig(folder="y"), adapter=AdapterSection(kind=kind, r=2)
    )
    pipe = tiny.tiny_sd_pipeline()
    assert found["trainable"] == attach(config, pipe)[0].trainable
    assert found["step_seconds"] is not None
    # The same counting on tensors with values, in training mode.
    side = pipe.unet.config.sample_size
    live = _live(pipe.unet.train())
    with live:
        # As long as the pipeline's tokenizer makes its text.
        _call(pipe.unet, config, {"height": side, "width": side, "tokens": 16})(torch.clone).backward()
    assert found["parts"]["activations, gradients"] == pytest.approx(live.trace.peak, rel=0.02)


@pytest.mark.parametrize("how", [("fraction", "0.1"), ("threshold", "0.02"), ("count", "1000")], ids=lambda how: how[0])
def test_sara_is_counted_without_the_model(sd_folder, capsys, how):
    kind, value = how
    argv = ["--model.base", str(sd_folder), "--adapter.kind", "sara", f"--adapter.{kind}", value]
    found = said(capsys, *argv)[1]
    config = TrainConfig(
        data=DataConfig(folder="x"), output=OutputConfig(folder="y"),
        adapter=AdapterSection(kind="sara", **{kind: json.loads(value)}),
    )  # fmt: skip
    pipe = StableDiffusionPipeline.from_pretrained(sd_folder)
    assert found["trainable"] == attach(config, pipe)[0].trainable
    assert found["parts"]["optimiser"] == 8 * found["trainable"]
    assert found["parts"]["entries' places, gradient"] == 12 * found["trainable"]
    assert found["parts"]["denoiser's weights"] == 4 * sum(p.numel() for p in tiny.tiny_sd_pipeline().unet.parameters())


def test_saras_dense_gradients_go_as_they_come():
    # Two tokens: next to nothing but weights and their gradients.
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=16)
    config = TrainConfig(
        data=DataConfig(folder="x"), output=OutputConfig(folder="y"), optim=OptimConfig(batch=1),
        adapter=AdapterSection(kind="sara", fraction=0.5),
    )  # fmt: skip
    entries = estimate.sparse_entries(model, config)
    size = {"height": 16, "width": 16}
    found = estimate_run({"": model}, {}, config, size=size, device=torch.device("cpu"), timed=False, entries=entries)
    weights = sum(p.numel() for p in model.parameters())
    assert abs(found.trainable - 0.5 * weights) < 0.01 * weights
    largest = max(p.numel() for p in model.parameters())
    # Twice the largest gradient: one arrives where the one before has just gone. All of them would be 4 * weights.
    assert 4 * largest < found.parts["activations, gradients"] < 0.15 * 4 * weights


def test_a_timed_step_and_classifiers(capsys):
    argv = ["--model.base", "timm/resnet10t", "--model.pretrained", "false", "--data.size", "32", "--optim.batch", "2"]
    code = estimate.main([*GIVEN, *argv, "--timed", "true"])
    text = capsys.readouterr().out
    assert code == 0
    assert " s a step" in text
    assert "fits:" in text


class Layers(torch.nn.Module):
    """Three linears with ReLUs: what is kept for the backward pass is known by heart."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64, bias=False) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


def test_the_trace_counts_live_bytes():
    with torch.device("meta"):
        model = Layers()
    activation = 128 * 64 * 4

    def call(onto):
        return model(onto(torch.empty(128, 64))).square().mean()

    # Made by the forward and still alive: the input, three outputs of ReLUs, the loss's scalar.
    trace = trace_step(model, call, torch.device("cpu"))
    assert trace.kept == pytest.approx(4 * activation, rel=0.02)
    # In the backward pass: those, a gradient that comes in and one that goes out, gradients of three weights.
    assert 5 * activation < trace.peak < 9 * activation
    with torch.device("meta"):
        model = Layers()
    # Without gradients never more than a layer's input, its product and its ReLU, and the input held by the caller.
    free = trace_forward(model, lambda onto: model(onto(torch.empty(128, 64))), torch.device("cpu"))
    assert free.peak == 4 * activation


def test_checkpointing_keeps_less():
    from vislr.anatomy.skeletons import skeleton

    def total(checkpointing):
        with torch.device("meta"):
            model = tiny.tiny_sd3_transformer(num_layers=8)
        config = TrainConfig(
            model=ModelConfig(checkpointing=checkpointing),
            data=DataConfig(folder="x"),
            output=OutputConfig(folder="y"),
            optim=OptimConfig(batch=8), adapter=AdapterSection(kind="lora"),
        )  # fmt: skip
        attach_config(model, config.adapter.to_change())
        size = {"height": 8, "width": 8}
        found = estimate_run({"": model}, {}, config, size=size, device=torch.device("cpu"), timed=False)
        return found.parts["activations, gradients"]

    assert total(True) < 0.5 * total(False)
    # True sizes are looked at without a byte of weights.
    assert skeleton("flux-dev").device.type == "meta"
