"""What a training run needs, before it starts: memory by part, file sizes, time, and what to change if it does not fit.

Shapes come from the meta device: no weights are read and none fit anywhere. Time comes from one real step.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from vislr.adapters import attach
from vislr.anatomy import meta_copy, sample_inputs
from vislr.train.adapted import trainable_parameters
from vislr.train.config import TrainConfig
from vislr.train.memory_trace import Trace, trace_forward, trace_step
from vislr.train.optimizers import OPTIMIZERS, parameter_groups

# Bytes of a weight: nf4 has 4 bits and a float32 scale for 64 values, int8 a scale for each row.
_STORED = {"fp8": 1.0, "int8": 1.01, "nf4": 0.5 + 4 / 64}
# What libraries keep beside tensors: allocator, threads, code that is loaded with the first step.
_OVERHEAD = {"cpu": 0.2 * 2**30, "cuda": 0.7 * 2**30}
# Of the live bytes of a step, what glibc's heap holds beside them because small tensors that live keep large freed
# blocks from being returned. Fitted on SD1.5-shaped UNets of 64 and 128 channels, checked on the one of 320.
_HEAP = 0.68


@dataclass
class Estimate:
    """What a run needs.

    Attributes:
        trainable: parameters. parts: bytes of memory on the device by part, in the order in which they come.
        adapter_bytes: size of the adapter's file. run_bytes: of the run's folder, at most.
        available: bytes of the device; None: not known.
        step_seconds: of one step; None: not timed, `notes` says why.
        steps: of the run.
        advice: changes, each with the bytes that would be needed with it and all before it.
        notes: what the figures leave out.
    """

    trainable: int
    parts: dict[str, float]
    adapter_bytes: int
    run_bytes: int
    available: int | None
    step_seconds: float | None
    steps: int
    advice: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Bytes of memory on the device."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """Whether it fits the device; None: not known."""
        return None if self.available is None else self.total <= self.available

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return vars(self) | {"total": self.total, "fits": self.fits}

    def __str__(self) -> str:
        lines = [f"trained    {self.trainable:,} parameters"]
        lines += [f"{name:<24}{_size(value):>12}" for name, value in self.parts.items()]
        lines.append(f"{'memory of the device':<24}{_size(self.total):>12}")
        if self.available is not None:
            verdict = "fits" if self.fits else "does not fit"
            lines.append(f"{verdict}: {_size(self.available)} are there")
        lines.append(f"adapter's file {_size(self.adapter_bytes)}, run's folder at most {_size(self.run_bytes)}")
        if self.step_seconds is not None:
            whole = self.step_seconds * self.steps
            lines.append(f"{self.step_seconds:.2f} s a step, {_time(whole)} for {self.steps} steps")
        lines += [f"with {change}: {_size(value)}" for change, value in self.advice.items()]
        return "\n".join([*lines, *self.notes])


def _size(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**29 else f"{value / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device now; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def estimate_run(
    models: Mapping[str, nn.Module], others: Mapping[str, nn.Module], config: TrainConfig, *, size: Mapping[str, int],
    device: torch.device, head: nn.Module | None = None, timed: bool = True, available: int | None = None,
    entries: Mapping[str, int] | None = None, run_bytes: Callable[[int], int] = lambda trainable: 0,
) -> Estimate:  # fmt: skip
    """Estimate a run.

    Args:
        models: prefix -> module on the meta device that carries the adapter; the denoiser or classifier under "".
        others: name -> further modules of the pipeline, on the meta device.
        config: the run.
        size: "height" and "width" of what the denoiser sees: latents, or a classifier's pixels.
        device: that the run is for.
        head: of a classifier.
        timed: make one real step on `device`, with random weights, if they fit.
        available: bytes of memory; None: what is free on the device now.
        entries: of SaRA, which is not attached: layer of the denoiser -> entries that are trained.
        run_bytes: trainable parameters -> bytes of the run's folder.

    Raises:
        ModelError: the denoiser is of no family that is known.
        TargetError: `optim.block_lr` fits nothing.
    """
    trainable: dict[str, nn.Parameter] = {}
    if entries is None:
        trainable = trainable_parameters(models, config.adapter.name, also=head)
        parameter_groups(trainable, config.optim)
        count = sum(value.numel() for value in trainable.values() if value.requires_grad)
        adapter_bytes = 4 * count + 512 * len(trainable)
    else:
        models[""].requires_grad_(False)
        whole = [] if head is None else list(head.requires_grad_(True).parameters())
        count = sum(entries.values()) + sum(value.numel() for value in whole)
        # A value and its place.
        adapter_bytes = 8 * count + 512 * len(entries)
    available = available_memory(device) if available is None else available
    parts = _parts(models, others, config, count, size, device, entries)
    result = Estimate(
        trainable=count, parts=parts, adapter_bytes=adapter_bytes, run_bytes=run_bytes(count),
        available=available, step_seconds=None, steps=config.steps,
    )  # fmt: skip
    result.notes.append("held-out losses and sample pictures come on top of the time")
    if config.adapter.text_encoders:
        result.notes.append("activations of text encoders are not counted")
    if timed and (result.fits is not False):
        if config.model.storage in ("int8", "nf4"):
            result.notes.append(f"not timed: {config.model.storage} needs the real weights")
        else:
            result.step_seconds = _timed_step(models[""], trainable, config, size, device, entries)
    elif timed:
        result.notes.append("not timed: it does not fit")
    if result.fits is False:
        result.advice = _advice(models, others, config, count, size, device, available or 0, entries)
    return result


def _parts(
    models: Mapping[str, nn.Module], others: Mapping[str, nn.Module], config: TrainConfig, count: int,
    size: Mapping[str, int], device: torch.device, entries: Mapping[str, int] | None,
) -> dict[str, float]:  # fmt: skip
    """Bytes by part."""
    model = models[""]
    trained = {id(value) for module in models.values() for value in module.parameters() if value.requires_grad}
    kept = _STORED.get(config.model.storage)
    base = 0.0
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is None or id(value) in trained:
                continue
            small = kept is not None and name == "weight" and isinstance(module, nn.Linear | nn.Conv2d)
            base += value.numel() * (kept if small and kept is not None else value.element_size())
    encoders = sum(_module_bytes(module, trained) for name, module in {**models, **others}.items() if name)
    if config.model.offload == "encoders" and device.type != "cpu" and not config.adapter.text_encoders:
        encoders = 0.0
    optimizer = OPTIMIZERS[config.optim.optimizer].state_bytes * count
    trace = _trace(model, config, size, device, entries or {})
    # Of SaRA's entries, beside values and optimiser: place, value of the base, and the gradient, which is not traced.
    place = 0.0 if entries is None else 8.0 + getattr(torch, config.model.dtype).itemsize
    heap = _HEAP * trace.peak if device.type == "cpu" else 0.0
    parts = {
        "denoiser's weights" if others else "weights": base,
        "encoders' weights": encoders,
        "adapter": 4.0 * count,
        "entries' places, gradient": place * count,
        "optimiser": float(optimizer),
        "moving average": 4.0 * count if config.optim.ema else 0.0,
        "activations, gradients": float(trace.peak),
        "working space": float(trace.workspace),
        "heap that is not returned": heap,
        "sample pictures": max(
            0.0, _preview(model, others.get("vae"), config, size, device) - trace.peak - trace.workspace - heap
        ),
        "libraries": _OVERHEAD.get(device.type, _OVERHEAD["cuda"]),
    }
    if config.model.storage in ("int8", "nf4"):
        # One layer's weights at a time are there in full.
        parts["working space"] += max(p.numel() * p.element_size() for p in model.parameters())
    return {name: value for name, value in parts.items() if value}


def _module_bytes(module: nn.Module, trained: set[int]) -> float:
    tensors = {id(value): value for value in (*module.parameters(), *module.buffers()) if id(value) not in trained}
    return float(sum(value.numel() * value.element_size() for value in tensors.values()))


def _call(
    model: nn.Module, config: TrainConfig, size: Mapping[str, int], batch: int | None = None
) -> Callable[[Callable[..., Any]], Any]:
    inputs = sample_inputs(model, {**size, "batch": batch or config.optim.batch}, device="cpu")

    def moved(value: Any, onto: Callable[[torch.Tensor], Any]) -> Any:
        if torch.is_tensor(value):
            return onto(value)
        return {key: moved(one, onto) for key, one in value.items()} if isinstance(value, dict) else value

    def call(onto: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        out = model(**{key: moved(value, onto) for key, value in inputs.items()})
        out = out if torch.is_tensor(out) else out[0]
        return out.float().square().mean()

    return call


def _trace(
    model: nn.Module, config: TrainConfig, size: Mapping[str, int], device: torch.device, entries: Mapping[str, int]
) -> Trace:
    twin: Any = meta_copy(model)
    sparse = [twin.get_submodule(site) for site in entries]
    for layer in sparse:
        layer.requires_grad_(True)
    if config.model.checkpointing and hasattr(twin, "enable_gradient_checkpointing"):
        twin.enable_gradient_checkpointing()
    mixed = None if config.precision == "fp32" else {"bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    call = _call(twin, config, size)

    def step(onto: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        # SaRA lets a layer's dense gradient go as soon as its entries are gathered.
        for value in (value for layer in sparse for value in layer.parameters()):
            value.register_post_accumulate_grad_hook(lambda value: setattr(value, "grad", None))
        return call(onto)

    return trace_step(twin, step, device, mixed)


def _preview(
    model: nn.Module, vae: nn.Module | None, config: TrainConfig, size: Mapping[str, int], device: torch.device
) -> float:
    """Most bytes while sample pictures are drawn: the denoiser with guidance, then the VAE with one picture."""
    if vae is None:
        return 0.0
    pictures = 2 * min(config.optim.batch, len(config.sample.prompts) or 6)
    drawn = trace_forward(twin := meta_copy(model), _call(twin, config, size, pictures), device)
    decoder: Any = meta_copy(vae)
    latents = torch.empty(1, decoder.config.latent_channels, size["height"], size["width"], dtype=decoder.dtype)
    decoded = trace_forward(decoder, lambda onto: decoder.decode(onto(latents)), device)
    needs = [float(part.peak + part.workspace) for part in (drawn, decoded)]
    # The heap of a CPU still holds what the denoiser freed when the VAE asks for its large blocks.
    return sum(needs) if device.type == "cpu" else max(needs)


def _timed_step(
    model: nn.Module, trainable: Mapping[str, nn.Parameter], config: TrainConfig, size: Mapping[str, int],
    device: torch.device, entries: Mapping[str, int] | None,
) -> float:  # fmt: skip
    """Seconds of one step, the second of two, on a copy with random weights."""
    real: Any = copy.deepcopy(model).to_empty(device=device)
    with torch.no_grad():
        for value in (*real.parameters(), *real.buffers()):
            if value.is_floating_point():
                # Small numbers that are no denormals: zeros and subnormals would have speeds of their own.
                value.normal_(std=0.02) if value.dim() > 1 else value.fill_(0.5)
            else:
                value.zero_()
    if any(isinstance(module, nn.Conv2d) for module in real.modules()):
        real.to(memory_format=torch.channels_last)
    if config.model.checkpointing and hasattr(real, "enable_gradient_checkpointing"):
        real.enable_gradient_checkpointing()
    if entries is not None:
        change = replace(config.adapter, threshold=None, fraction=None, count=sum(entries.values())).to_change()
        attach(real, change, config.adapter.name)
    names = {name for name in trainable if not name.startswith("text_encoder")}
    own = [value for name, value in real.named_parameters() if name in names or (entries and value.requires_grad)]
    optimizer = torch.optim.AdamW(own, fused=True)
    call = _call(real, config, size)
    mixed = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for _ in range(config.optim.accumulation):
            with torch.autocast(device.type, mixed, enabled=mixed is not None):
                loss = call(lambda value: value.to(device))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return seconds


def _advice(
    models: Mapping[str, nn.Module], others: Mapping[str, nn.Module], config: TrainConfig, count: int,
    size: Mapping[str, int], device: torch.device, available: int, entries: Mapping[str, int] | None,
) -> dict[str, float]:  # fmt: skip
    """Changes, one after the other until it fits, each with what is then needed."""
    found: dict[str, float] = {}
    changes: list[tuple[str, Callable[[TrainConfig], TrainConfig]]] = [
        ("model.checkpointing true", lambda c: replace(c, model=replace(c.model, checkpointing=True))),
        ("model.offload encoders", lambda c: replace(c, model=replace(c.model, offload="encoders"))),
        (f"optim.batch 1, optim.accumulation {config.optim.batch * config.optim.accumulation}",
         lambda c: replace(c, optim=replace(c.optim, batch=1, accumulation=c.optim.batch * c.optim.accumulation))),
        ("optim.optimizer adamw8bit", lambda c: replace(c, optim=replace(c.optim, optimizer="adamw8bit"))),
        ("model.storage fp8", lambda c: replace(c, model=replace(c.model, storage="fp8"))),
        ("model.storage nf4", lambda c: replace(c, model=replace(c.model, storage="nf4"))),
    ]  # fmt: skip
    best, base = config, float("inf")
    for name, change in changes:
        if config.adapter.kind == "sara" and "storage" in name:
            continue
        changed = change(best)
        if changed == best:
            continue
        total = sum(_parts(models, others, changed, count, size, device, entries).values())
        if total < base - 2**20:
            found[name] = total
            best, base = changed, total
        if total <= available:
            break
    return found
