"""Unsupervised domain adaptation by self-training with ConvLoRA and AdaBN.

Source: ConvLoRA (arXiv 2402.04964). A model and a small early head, which reads a feature in the middle of it, are
trained on a labelled source. On an unlabelled target the model's own output is the label that the early
head must reproduce; what moves is an adapter on the layers before the early head, and the statistics of
BatchNorms. The epoch whose early and full outputs agree best is kept; labels of the target decide nothing.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from vislr.adapters import AdaBnConfig, ConvLoraConfig, adapt_statistics, adapter_parameters, attach, detach
from vislr.adapters.adabn_layer import AdaBnLayer
from vislr.adapters.inject import exactly, tuner_layers
from vislr.adapters.targets import batch_norms
from vislr.core.arguments import plain_data
from vislr.core.errors import Interrupted, ModelError, OutputError, TrainingError
from vislr.core.files import write_tensors
from vislr.core.hashing import content_hash
from vislr.core.registry import Attached
from vislr.data import generator, key_seed
from vislr.train.checkpoints import check_same_run, checkpoints_in, load_checkpoint, save_checkpoint
from vislr.train.self_training_config import AdaptConfig, Variant
from vislr.train.self_training_data import Domain
from vislr.train.self_training_figures import Outcome, agreement, outcome
from vislr.train.self_training_models import (
    EarlyClassHead,
    EarlySegmentationHead,
    Net,
    module_at,
    pooled,
    reading,
    sites_before,
)

# Examples of the target on which the epoch is chosen: every fifth, of those that are not held out.
_CHOICE = 5


@dataclass
class Trial:
    """What one variant gave.

    Attributes:
        outcome: on the target's held-out examples.
        agreement: of early and full output on unlabelled target examples, before training and after every epoch.
        losses: mean self-training loss of every epoch.
        epoch: the one that was kept, 0 = before training.
        sites, parameters: layers of the adapter, and what was trained.
        file: of the adapter; None of the source model.
    """

    outcome: Outcome
    agreement: list[float]
    losses: list[float] = field(default_factory=list)
    epoch: int = 0
    sites: int = 0
    parameters: int = 0
    file: Path | None = None


@dataclass
class Adapted:
    """What `adapt_domain` gives.

    Attributes:
        trials: variant -> what it gave.
        source: figures of the source model on the source's held-out examples.
        transductive: the target's figures are taken on the examples adapted to.
        source_shared: the source's figures are taken on the examples trained on.
        model_hash: of the source model's weights.
        histories: stage -> values of every epoch.
        seconds: since the start or the resume.
    """

    trials: dict[str, Trial]
    source: Outcome
    transductive: bool
    source_shared: bool
    model_hash: str
    histories: dict[str, list[dict[str, float]]]
    seconds: float


def self_training_loss(early: torch.Tensor, full: torch.Tensor, detach_pseudo_label: bool = True) -> torch.Tensor:
    """Cross entropy of the early head's logits against the model's own soft output.

    Where both agree it is the entropy of that output.

    Args:
        early, full: logits (N, classes), or (N, 1, H, W) of a binary segmentation.
        detach_pseudo_label: no gradient through `full`.
    """
    if detach_pseudo_label:
        full = full.detach()
    if full.dim() == 4:
        return F.binary_cross_entropy_with_logits(early, full.sigmoid())
    return F.cross_entropy(early, full.softmax(1))


def supervised_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross entropy with classes (N,) or masks (N, H, W)."""
    if logits.dim() == 4:
        return F.binary_cross_entropy_with_logits(logits[:, 0], truth.float())
    return F.cross_entropy(logits, truth)


def batches(count: int, size: int, *key: int | str) -> list[list[int]]:
    """The examples of an epoch in an order drawn by `key`; a last batch of one is dropped if it is not the only one."""
    order = torch.randperm(count, generator=generator(*key)).tolist() if key else list(range(count))
    parts = [order[i : i + size] for i in range(0, count, size)]
    return parts[:-1] if len(parts) > 1 and len(parts[-1]) == 1 and key else parts


class Stages:
    """Epochs by stage, each kept on disk when it is done, so that an interrupted run goes on with the next one.

    Args:
        folder: of the run. config: of the run; a resume with another one is refused.
        data: hash of the data.
        stop: asked after each epoch with stage and epochs made; True leaves.
    """

    def __init__(
        self, folder: Path, config: AdaptConfig, data: str, stop: Callable[[str, int], bool] | None, quiet: bool
    ) -> None:
        self.folder, self.resume, self.stop, self.quiet = folder, config.output.resume, stop, quiet
        self.config = plain_data(config) | {"data": data}
        self.histories: dict[str, list[dict[str, float]]] = {}

    def run(
        self, name: str, tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, epochs: int,
        steps: int, epoch: Callable[[int, Callable[[float], None]], dict[str, float]],
    ) -> list[dict[str, float]]:  # fmt: skip
        """Run what is left of a stage.

        Args:
            tensors: all that the stage changes, the optimiser's parameters first, in its order.
            steps: batches of an epoch.
            epoch: called with the epoch's number and a function to be told each batch's loss; gives its values.

        Raises:
            Interrupted: `stop` said so. TrainingError: a loss is not finite.
        """
        folder = self.folder / "stages" / name
        history: list[dict[str, float]] = []
        found = checkpoints_in(folder)
        if found and self.resume:
            state = load_checkpoint(found[-1], tensors, optimizer)  # type: ignore[arg-type]
            check_same_run(state["config"], self.config)
            history = state["history"]
        self.histories[name] = history
        bar = tqdm(total=epochs * steps, initial=len(history) * steps, desc=name, unit="batch", disable=self.quiet)
        with bar:
            for number in range(len(history), epochs):

                def told(loss: float) -> None:
                    if not math.isfinite(loss):
                        raise TrainingError(f"the loss of stage '{name}' is {loss}; expected a number: lower its lr")
                    bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                    bar.update()

                history.append(epoch(number, told))
                state = {"config": self.config, "history": history}
                save_checkpoint(folder, number + 1, tensors, optimizer, state, keep=1)
                if self.stop is not None and self.stop(name, number + 1):
                    raise Interrupted(f"stopped in stage '{name}' after epoch {number + 1} of {epochs}; {GO_ON}")
        return history


GO_ON = "go on with the same command and --output.resume"


class _Run:
    """One domain adaptation: model, early head, domains."""

    def __init__(
        self, config: AdaptConfig, net: Net, source: Domain, target: Domain, stages: Stages, device: torch.device
    ) -> None:
        self.config, self.net, self.stages, self.device = config, net, stages, device
        self.model = net.model.to(device)
        self.layer = config.early_head.layer or net.layer
        self.tap = module_at(self.model, self.layer)
        self.source, self.source_test, self.source_shared = source.split(config.source.held_out)
        unlabelled, self.target_test, self.transductive = target.split(config.target.held_out)
        self.choice = unlabelled.take(range(0, len(unlabelled), _CHOICE))
        # With few examples the choice is made on those that are trained on.
        rest = [i for i in range(len(unlabelled)) if i % _CHOICE]
        self.target = unlabelled.take(rest) if len(rest) >= config.batch else unlabelled
        self.early = self._early_head()

    def _early_head(self) -> nn.Module:
        """The early head with random weights, of the width that the layer's output has.

        Raises:
            ModelError: the output is nothing that a head can read.
        """
        with torch.no_grad(), reading(self.tap) as seen:
            self.model.eval()
            self.model(self.source.batch([0, 0], self.device))
        if not seen or not torch.is_tensor(seen[0]) or seen[0].dim() < 2:
            raise ModelError(f"'{self.layer}' gives nothing that an early head can read; set early_head.layer")
        torch.manual_seed(key_seed(self.config.seed, "early head"))
        if self.config.task == "segmentation":
            if seen[0].dim() != 4:
                raise ModelError(f"'{self.layer}' gives {tuple(seen[0].shape)}; expected maps (N, C, h, w)")
            return EarlySegmentationHead(seen[0].shape[1]).to(self.device)
        return EarlyClassHead(pooled(seen[0]).shape[1], len(self.source.classes)).to(self.device)

    def features(self, domain: Domain, module: nn.Module, *, inputs: bool = False) -> torch.Tensor:
        """What `module` gives (or is given) for every example, on the CPU; pooled for classification."""
        rows = []
        self.model.eval()
        with torch.no_grad(), reading(module, inputs=inputs) as seen:
            for part in batches(len(domain), self.config.batch):
                self.model(domain.batch(part, self.device))
                rows.append((seen[0] if self.config.task == "segmentation" else pooled(seen[0])).float().cpu())
        return torch.cat(rows)

    # Stages on the source.

    def train_source(self) -> None:
        """Train the model, or its classifier alone, on the labelled source."""
        training, source = self.config.training, self.source
        assert source.truth is not None
        truth, parts = source.truth, batches(len(source), self.config.batch, self.config.seed, "source", 0)
        if training.train == "head":
            assert self.net.head is not None
            head = self.net.head
            self._source_statistics()
            held = self.features(source, head, inputs=True)
            self._supervised("source", head, head, lambda part: held[part].to(self.device), truth, training, parts)
        else:
            self._supervised(
                "source", self.model, self.model, lambda part: source.batch(part, self.device), truth, training, parts
            )
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def _source_statistics(self) -> None:
        """Give a frozen model's BatchNorms the source's statistics: those of its pretraining are a third domain's."""
        if not batch_norms(self.model):
            return
        attached = attach(self.model, AdaBnConfig(mode=self.config.statistics.mode), "source")
        adapt_statistics(self.model, self._parts(self.source.spread(self.config.statistics.examples)))
        layers = [layer for _, layer in tuner_layers(self.model) if isinstance(layer, AdaBnLayer)]
        found: list[tuple[Any, Any]] = [(layer.get_base_layer(), layer.statistics("source")) for layer in layers]
        detach(self.model, attached)
        for norm, statistics in found:
            norm.running_mean.copy_(statistics.mean)
            norm.running_var.copy_(statistics.var)

    def _parts(self, domain: Domain) -> list[torch.Tensor]:
        return [domain.batch(part, self.device) for part in batches(len(domain), self.config.batch)]

    def train_early(self) -> None:
        """Train the early head on the labelled source; the model is frozen."""
        assert self.source.truth is not None
        held = self.features(self.source, self.tap)
        size = (self.config.model.size,) * 2
        parts = batches(len(self.source), self.config.batch, self.config.seed, "early head", 0)
        self._supervised(
            "early head", self.early, lambda x: self.early(x, size), lambda part: held[part].to(self.device),
            self.source.truth, self.config.early_head, parts,
        )  # fmt: skip
        self.early.eval().requires_grad_(False)

    def _supervised(
        self, name: str, trained: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor],
        inputs: Callable[[list[int]], torch.Tensor], truth: torch.Tensor, settings: Any, parts: list[list[int]],
    ) -> None:  # fmt: skip
        parameters = dict(trained.named_parameters())
        buffers = {key: value for key, value in trained.named_buffers() if key in trained.state_dict()}
        optimizer = torch.optim.Adam(parameters.values(), lr=settings.lr)

        def epoch(number: int, told: Callable[[float], None]) -> dict[str, float]:
            trained.train()
            total = 0.0
            torch.manual_seed(key_seed(self.config.seed, name, number))
            for part in batches(len(truth), self.config.batch, self.config.seed, name, number):
                loss = supervised_loss(forward(inputs(part)), truth[part].to(self.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item()
                told(loss.item())
            return {"loss": total / len(parts)}

        self.stages.run(name.replace(" ", "-"), parameters | buffers, optimizer, settings.epochs, len(parts), epoch)
        trained.eval()

    # On the target.

    @torch.no_grad()
    def outputs(self, domain: Domain) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model and the early head say of every example: classes (n,), or masks (n, H, W)."""
        full, early = [], []
        self.model.eval()
        with reading(self.tap) as seen:
            for part in batches(len(domain), self.config.batch):
                x = domain.batch(part, self.device)
                logits = self.model(x)
                full.append(_decided(logits).cpu())
                early.append(_decided(self._early(seen[0], x)).cpu())
        return torch.cat(full), torch.cat(early)

    def _early(self, features: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.config.task == "classification":
            features = pooled(features)
        return self.early(features, tuple(x.shape[2:]))

    def judged(self, domain: Domain) -> Outcome:
        """Figures on a domain; without labels only what was decided."""
        return outcome(self.outputs(domain)[0], domain, self.config.slices.tolerance)

    def agrees(self) -> float:
        """How far early and full output agree on target examples that are not held out."""
        return agreement(*self.outputs(self.choice), self.choice)

    def attach(self, variant: Variant) -> list[Attached]:
        """Put the adapter of a variant on the model; nothing changes yet."""
        attached: list[Attached] = []
        if variant in ("convlora", "both"):
            adapter = self.config.adapter
            targets: Any = adapter.target_modules
            if targets is None:
                targets = exactly(sites_before(self.model, self.layer, self.source.batch([0, 0], self.device)))
            torch.manual_seed(key_seed(self.config.seed, "adapter"))
            change = ConvLoraConfig(r=adapter.r, alpha=adapter.alpha, target_modules=targets)
            attached.append(attach(self.model, change, "target"))
        if variant in ("adabn", "both"):
            attached.append(attach(self.model, AdaBnConfig(mode=self.config.statistics.mode), "target"))
        return attached

    def adapt_to(self, variant: Variant, attached: list[Attached]) -> Trial:
        """Adapt to the target; the model carries the adapter at its best epoch afterwards."""
        parts = self._parts(self.target.spread(self.config.statistics.examples))
        norms = [layer for _, layer in tuner_layers(self.model) if isinstance(layer, AdaBnLayer)]
        parameters = adapter_parameters(self.model, "target")
        moving = _state(parameters, norms)
        if norms:
            adapt_statistics(self.model, parts, name="target")
        curve = [self.agrees()]
        losses: list[float] = []
        if parameters:
            history = self._self_train(variant, parameters, moving, norms, parts)
            curve += [values["agreement"] for values in history]
            losses = [values["loss"] for values in history]
        epoch = max(range(len(curve)), key=lambda number: (curve[number], -number))
        return Trial(
            self.judged(self.target_test), curve, losses, epoch, sum(len(each.sites) for each in attached),
            sum(value.numel() for value in parameters.values()),
        )  # fmt: skip

    def _self_train(
        self, variant: str, parameters: Mapping[str, nn.Parameter], moving: dict[str, torch.Tensor],
        norms: list[AdaBnLayer], statistics: list[torch.Tensor],
    ) -> list[dict[str, float]]:  # fmt: skip
        settings, target = self.config.adaptation, self.target
        optimizer = torch.optim.Adam(parameters.values(), lr=settings.lr)
        best = {f"best/{key}": value.detach().clone() for key, value in moving.items()}
        # A checkpoint holds the best so far too, and how good it was.
        best["best agreement"] = torch.tensor(self.agrees(), dtype=torch.float64)
        steps = len(batches(len(target), self.config.batch, 0))
        ema = self.config.statistics.mode == "ema"

        def epoch(number: int, told: Callable[[float], None]) -> dict[str, float]:
            self.model.eval()
            for layer in norms:
                layer.get_base_layer().training = ema
            total = 0.0
            with reading(self.tap) as seen:
                for part in batches(len(target), self.config.batch, self.config.seed, variant, number):
                    x = target.batch(part, self.device)
                    full = self.model(x)
                    loss = self_training_loss(self._early(seen[0], x), full, settings.detach_pseudo_label)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += loss.item()
                    told(loss.item())
            self.model.eval()
            if norms and not ema:
                adapt_statistics(self.model, statistics, name="target")
            now = self.agrees()
            if now > float(best["best agreement"]):
                best["best agreement"].fill_(now)
                for key, value in moving.items():
                    best[f"best/{key}"].copy_(value.detach())
            return {"loss": total / steps, "agreement": now}

        history = self.stages.run(variant, moving | best, optimizer, settings.epochs, steps, epoch)
        with torch.no_grad():
            for key, value in moving.items():
                value.copy_(best[f"best/{key}"])
        self.model.eval()
        return history


def _decided(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 0] > 0 if logits.dim() == 4 else logits.argmax(1)


def _state(parameters: Mapping[str, nn.Parameter], norms: list[AdaBnLayer]) -> dict[str, torch.Tensor]:
    """All that self-training changes: the adapter's parameters, then its statistics."""
    state: dict[str, torch.Tensor] = dict(parameters)
    for number, layer in enumerate(norms):
        held = layer.statistics("target")
        state |= {f"statistics.{number}.{key}": getattr(held, key) for key in ("mean", "var", "count")}
    return state


def adapt_domain(
    config: AdaptConfig,
    net: Net,
    source: Domain,
    target: Domain,
    *,
    trained: bool = False,
    save_adapter: Callable[[nn.Module, str, Path, dict[str, torch.Tensor]], Any] | None = None,
    stop: Callable[[str, int], bool] | None = None,
    quiet: bool = False,
) -> Adapted:
    """Train on the source, adapt to the target in every variant asked for, and take figures.

    Every random draw follows from (seed, stage, epoch): a run that stops and resumes gives the bits of one that
    does not. The model comes back as the source model, without adapters.

    Args:
        config: the run. State is kept in `config.output.folder`.
        net: the model, as `build_net` gives it or the caller's own.
        source: labelled. target: its labels, if it has any, are only looked at for figures.
        trained: the model is trained on the source already.
        save_adapter: called with model, adapter name, path and the early head's tensors, for every variant but the
            source's.
        stop: asked after each epoch with stage and number; True leaves, and a resume goes on there.
        quiet: no progress bars.

    Raises:
        TargetError, AdapterError: early head, adapter or statistics do not fit the model; before any work.
        TrainingError: a loss is not finite. Interrupted: Ctrl-C, SIGTERM or `stop`.
    """
    began = time.perf_counter()
    folder = Path(config.output.folder)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    stages = Stages(folder, config, f"{source.fingerprint()} {target.fingerprint()}", stop, quiet)
    if not config.output.resume and any((folder / "stages").glob("*/checkpoints/*")):
        raise OutputError(f"'{folder}' holds a run that stopped; expected output.resume, or output.overwrite")
    run = _Run(config, net, source, target, stages, device)
    check_variants(run)
    with _interruptible():
        if not trained:
            run.train_source()
        run.model.eval().requires_grad_(False)
        run.train_early()
        write_tensors(folder / "model.safetensors", run.model.state_dict())
        adapted = Adapted(
            {}, run.judged(run.source_test), run.transductive, run.source_shared,
            content_hash(run.model.state_dict()), stages.histories, 0.0,
        )  # fmt: skip
        for variant in config.adaptation.variants:
            adapted.trials[variant] = _trial(run, variant, folder, save_adapter)
    adapted.seconds = time.perf_counter() - began
    return adapted


def _trial(
    run: _Run, variant: Variant, folder: Path,
    save_adapter: Callable[[nn.Module, str, Path, dict[str, torch.Tensor]], Any] | None,
) -> Trial:  # fmt: skip
    if variant == "source":
        return Trial(run.judged(run.target_test), [run.agrees()])
    attached = run.attach(variant)
    try:
        trial = run.adapt_to(variant, attached)
        if save_adapter is not None:
            trial.file = folder / f"{variant}.safetensors"
            save_adapter(run.model, "target", trial.file, dict(run.early.state_dict()))
    finally:
        for each in reversed(attached):
            detach(run.model, each)
        run.model.requires_grad_(False)
    return trial


def check_variants(run: _Run) -> None:
    """Put every adapter on and off once: what does not fit is named before any work.

    Raises:
        TargetError, AdapterError: as `attach`.
    """
    for variant in run.config.adaptation.variants:
        for each in reversed(run.attach(variant)):
            detach(run.model, each)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM become `Interrupted`; whole epochs are on disk already."""

    def leave(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, leave) if main else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; the epochs made so far are kept; {GO_ON}") from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
