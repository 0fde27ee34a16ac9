"""Speed of quantised layers and models against bf16 and fp32, and against torchao, sdnq and quanto where they are.

    python benchmarks/quant_speed.py --dtype bfloat16 --compile
    python benchmarks/quant_speed.py --dtype float32 --only sd15-1024 embedded
    python benchmarks/quant_speed.py --compile --only sd15-step sdxl-step --kinds 'W8A8 static' --rounds 3

Linears of SD1.5's and SDXL's shapes with M = 1024 to 8192 rows: W8A8 (dynamic and static), W8A7, W4A8, W4A16, in every
way that vislr has here, against the float linear in float32 and in --dtype; a step of SD1.5's and SDXL's UNets with
random weights at 512 pixels, one sample, compiled block by block; and a call of an embedded denoiser, compiled
as a whole, and its pipeline from caption to picture: each layer in its fastest way, and those that would be slower left
in --dtype. Every shape is a case of its own, kept in the folder and not measured again. The log names the peers'
versions, and which are absent. Writes a record when all cases are there.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import io
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from prune_latency import built
from torch import nn

import vislr
from vislr import measure
from vislr.anatomy import denoiser_of, sample_inputs
from vislr.core.errors import ConfigError
from vislr.core.files import read_json, write_json
from vislr.measure import Measurement
from vislr.quantize import (
    Trajectories,
    choose_ways,
    ptq_plan,
    quant_layers,
    sizes,
    weight_only_plan,
    without_slower,
)
from vislr.quantize.layers import WAYS, Spec, quantized
from vislr.quantize.trajectories import quiet, watching_calls

# name -> (rows, inputs, outputs): projections and feed-forwards of a level at 512 and 1024 pixels.
LINEARS = {
    "sd15-4096": (4096, 320, 320),
    "sd15-4096-ff": (4096, 320, 2560),
    "sd15-1024": (1024, 640, 640),
    "sd15-1024-ff": (1024, 640, 5120),
    "sdxl-4096": (4096, 640, 640),
    "sdxl-4096-ff": (4096, 640, 5120),
    "sdxl-1024": (1024, 1280, 1280),
    "sdxl-1024-ff": (1024, 1280, 10240),
    "sdxl-8192": (8192, 640, 640),
    "text-154": (154, 2048, 1280),
    "time-2": (2, 1280, 1280),
}
# name -> architecture, with random weights.
STEPS = {"sd15-step": "sd15", "sdxl-step": "sdxl"}
KINDS = {
    "W8A8 dynamic": Spec(8, 8, "dynamic", None, "uniform", True, 0),
    "W8A8 static": Spec(8, 8, "static", None, "uniform", True, 1),
    "W8A7 static": Spec(8, 7, "static", None, "uniform", True, 1),
    "W4A8 static": Spec(4, 8, "static", None, "uniform", False, 1),
    "W4A16 groups": Spec(4, 16, "none", 64, "uniform", False, 0),
    "W8A16": Spec(8, 16, "none", None, "uniform", True, 0),
}
# Packages. sdnq multiplies int8 by OpenVINO on a CPU where that is installed, and many times slower without.
PEERS = ("torchao", "sdnq", "openvino", "optimum-quanto")
PROMPT = "noto style, a cat face"


def installed(package: str) -> str:
    """The version of a peer, or nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def peers(linear: nn.Linear) -> dict[str, nn.Module]:
    """The same linear, quantised by other packages that are installed."""
    found: dict[str, nn.Module] = {}
    if installed("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

        for name, config in (
            ("torchao W8A8 dynamic", Int8DynamicActivationInt8WeightConfig()),
            ("torchao W8A16", Int8WeightOnlyConfig()),
        ):
            holder = nn.Sequential(copy.deepcopy(linear))
            quantize_(holder, config)
            found[name] = holder
    if installed("sdnq"):
        from sdnq import SDNQConfig
        from sdnq.quantizer import sdnq_quantize_layer

        for name, product in (("sdnq W8A16", False), ("sdnq W8A8 dynamic", True)):
            config = SDNQConfig(weights_dtype="int8", use_quantized_matmul=product, quantization_device="cpu")
            found[name] = sdnq_quantize_layer(copy.deepcopy(linear), config)[0]
    if installed("optimum-quanto"):
        from optimum.quanto import freeze, qint8, quantize

        holder = nn.Sequential(copy.deepcopy(linear))
        quantize(holder, weights=qint8)
        freeze(holder)
        found["quanto W8A16"] = holder
    return found


def model_peers(model: Any) -> dict[str, nn.Module]:
    """A denoiser with its linears quantised by other packages that are installed."""
    found: dict[str, nn.Module] = {}
    if installed("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        found["torchao W8A8 dynamic"] = twin(model, model.dtype)
        quantize_(found["torchao W8A8 dynamic"], Int8DynamicActivationInt8WeightConfig())
    if installed("sdnq"):
        from sdnq.quantizer import sdnq_post_load_quant

        # Its limits on size would leave most of a small model as it is.
        found["sdnq W8A8 dynamic"] = sdnq_post_load_quant(
            twin(model, model.dtype), weights_dtype="int8", use_quantized_matmul=True, minimum_allowed_numel=0,
            minimum_allowed_channel_size=1, quantization_device="cpu",
        )  # fmt: skip
    if installed("optimum-quanto"):
        from optimum.quanto import freeze, qint8, quantize

        found["quanto W8A16"] = twin(model, model.dtype)
        quantize(found["quanto W8A16"], weights=qint8)
        freeze(found["quanto W8A16"])
    return found


def stored(model: nn.Module) -> float:
    """Megabytes of the state that torch stores of a model."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


def caller(module: Callable[[Any], Any], x: torch.Tensor, compiled: bool) -> Callable[[], Any]:
    run = torch.compile(module, dynamic=False) if compiled else module

    def call() -> Any:
        with torch.no_grad():
            return run(x)

    return call


def failure(call: Callable[[], Any]) -> str:
    """What a first call raises, in a line; empty if it runs."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return ""


def linear_case(
    name: str, dtype: torch.dtype, compiled: bool, rounds: int, device: str, kinds: Collection[str]
) -> dict[str, Any]:
    rows, inside, out = LINEARS[name]
    torch.manual_seed(0)
    plain = nn.Linear(inside, out).to(device)
    x = torch.randn(rows, inside, device=device)
    low = copy.deepcopy(plain).to(dtype)
    calls: dict[str, Callable[[], Any]] = {str(dtype).removeprefix("torch."): caller(low, x.to(dtype), compiled)}
    if dtype != torch.float32:
        calls["float32"] = caller(plain, x, compiled)
    notes = []
    for kind in kinds:
        spec = KINDS[kind]
        made = quantized(plain, spec, "minmax")
        if spec.entries:
            made.set_input(torch.tensor(8 / 2**spec.input_bits), torch.tensor(2.0 ** (spec.input_bits - 1)))
        for way in made.ways():
            if way == "kept" or (way == "packed" and dtype == torch.float32 and spec.bits == 8):
                continue
            layer = copy.deepcopy(made).to(dtype)
            layer.way = way
            calls[f"vislr {kind}, {way}"] = caller(layer, x.to(dtype), compiled)
    for other, module in peers(low).items():
        call = caller(module, x.to(dtype), compiled)
        failed = failure(call)
        if failed:
            notes.append(f"{other} does not run: {failed}")
            continue
        calls[other] = call
    figures = measure.interleaved(calls, rounds=rounds, warmup=2, device=device)
    return {"figures": {key: one.to_dict() for key, one in figures.items()}, "notes": notes}


def subject(name: str, device: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    """What is quantised and by what source, the denoiser itself, and inputs of one call; all in float32."""
    if name in STEPS:
        unet = built(STEPS[name], torch.float32, device)
        inputs = sample_inputs(unet, {"height": 64, "width": 64}, device=device)
        return unet, [inputs], unet, inputs
    pipe = vislr.load(name).to(device)
    runs, denoiser, seen = Trajectories(("",), 1, 1, 4), denoiser_of(pipe)[1], list[dict[str, Any]]()
    # The pipeline's own tensors: of other strides, or with another form of the answer, it would be compiled again.
    with watching_calls(denoiser, seen.append):
        runs.run(pipe, 0)
    return pipe, runs, denoiser, seen[0] | {"return_dict": False}


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() and key != "timestep" else value
        for key, value in inputs.items()
    }


def twin(model: nn.Module, dtype: torch.dtype) -> Any:
    """A copy in `dtype`; of a model that has it already only structure is copied."""
    if next(model.parameters()).dtype == dtype:
        return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})
    return copy.deepcopy(model).to(dtype)


def compile_model(model: nn.Module, by_block: bool) -> None:
    """Compile a denoiser in place: whole, or its resnets and transformer blocks, of which equal ones compile once."""
    blocks = [one for one in model.modules() if isinstance(one, (ResnetBlock2D, BasicTransformerBlock))]
    for part in blocks if by_block else [model]:
        part.compile(dynamic=False)


def pipeline_calls(name: str, models: dict[str, Any], device: str) -> dict[str, Callable[[], Any]]:
    """From a caption to a picture: the embedded pipeline with each of the denoisers in its place."""
    pipes = {}
    calls = {}
    for key, model in models.items():
        if model.dtype not in pipes:
            pipes[model.dtype] = vislr.load(name, dtype=model.dtype).to(device)
        # Text encoder and decoder are shared.
        pipe = copy.copy(pipes[model.dtype])
        pipe.register_modules(**{denoiser_of(pipe)[0]: model})

        def call(pipe: Any = pipe) -> Any:
            rng = torch.Generator().manual_seed(0)
            with quiet(pipe):
                return pipe(PROMPT, num_inference_steps=20, guidance_scale=4.0, generator=rng)

        calls[key] = call
    return calls


def model_case(
    name: str, dtype: torch.dtype, compiled: bool, rounds: int, device: str, kinds: Collection[str], ways: Path,
    eager_ways: bool, way: str | None,
) -> dict[str, Any]:  # fmt: skip
    """A call of a denoiser, float and quantised, each layer in its fastest way. Embedded ones under guidance."""
    step = name in STEPS
    whole, runs, plain, inputs = subject(name, device)
    plain.to(memory_format=torch.channels_last)
    half = in_dtype(inputs, dtype)
    notes = []
    plans = {}
    for kind, bits in (("W8A8 static", 8), ("W8A7 static", 7)):
        if kind in kinds:
            plans[kind] = ptq_plan(whole, 8, bits, source=runs)
    if "W8A8 dynamic" in kinds:
        plans["W8A8 dynamic"] = ptq_plan(whole, 8, 8, inputs="dynamic")
    if "W8A16" in kinds:
        plans["W8A16"] = weight_only_plan(whole, 8, group=None, ends=True)
    if not step and "W4A16 groups" in kinds:
        plans["W4A16 groups"] = weight_only_plan(whole, 4)
    models: dict[str, tuple[Any, Any]] = {}
    if step:
        # Two copies of SDXL in float32 are more than a small machine has.
        plain.to(dtype)
        models[str(dtype).removeprefix("torch.")] = (plain, half)
    else:
        models[str(dtype).removeprefix("torch.")] = (twin(plain, dtype), half)
        if dtype != torch.float32:
            models["float32"] = (plain, inputs)
    megabytes = sizes(plain).total / 1e6
    for kind, plan in plans.items():
        for faster in (False, True):
            model = twin(plain, dtype)
            vislr.apply(model, plan)
            for layer in quant_layers(model).values():
                # Of these the first forward is soonest done, which shows `choose_ways` the layers' inputs.
                quick = (way, "dequantise") if way is not None else ("integer", "packed", "dequantise")
                layer.way = next(one for one in quick if one in layer.ways())
            size = f"{megabytes:.2f} -> {sizes(model).total / 1e6:.2f} MB"
            if way is not None:
                notes.append(f"{name} {kind}, all {way}: {size}")
                models[f"vislr {kind}, all {way}"] = (model, half)
                break
            found = choose_ways(model, half, cache=ways, rounds=3, compile=compiled and not eager_ways)
            title = f"{kind}, slower layers left out" if faster else kind
            notes += [f"{name} {title}: {note}" for note in found.notes()]
            notes.append(f"{name} {title}: {size}")
            models[f"vislr {title}"] = (model, half)
            try:
                plan = without_slower(plan, found)
            except ConfigError as error:
                notes.append(f"{name} {kind}: {error}")
                break
            if len(plan.layers) == len(found.layers):
                break
            if step and not faster:
                # A minute a call: only what one would ship is timed.
                del models[f"vislr {title}"]
    others = model_peers(models[str(dtype).removeprefix("torch.")][0])
    models |= {other: (model, half) for other, model in others.items()}

    def call(model: Any, kwargs: dict[str, Any]) -> Callable[[], Any]:
        def once() -> Any:
            with torch.no_grad():
                return model(**kwargs)

        return once

    calls = {}
    for key, (model, kwargs) in models.items():
        if compiled:
            compile_model(model, step)
        calls[key] = call(model, kwargs)
        # The first call compiles, and is the warm-up of steps that take a minute.
        if key not in others:
            calls[key]()
        elif failed := failure(calls[key]):
            del calls[key]
            notes.append(f"{name}: {key} does not run: {failed}")
        else:
            notes.append(f"{name} {key}: {megabytes:.2f} -> {stored(model):.2f} MB")
    figures = measure.interleaved(calls, rounds=rounds, warmup=0 if step else 2, device=device)
    if not step:
        whole_calls = pipeline_calls(name, {key: models[key][0] for key in calls}, device)
        timed = measure.interleaved(whole_calls, rounds=rounds, warmup=2, device=device)
        figures |= {f"pipeline {key}": one for key, one in timed.items()}
    return {"figures": {key: one.to_dict() for key, one in figures.items()}, "notes": notes}


def main() -> None:
    # Every case compiles the same classes anew; after eight versions torch would leave them as they are.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 20
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile every layer and model")
    parser.add_argument("--eager-ways", action="store_true", help="choose ways uncompiled: a hundred compilations less")
    parser.add_argument(
        "--way", choices=WAYS, help="one way for all layers of a model: nothing is timed to choose, none is left out"
    )
    parser.add_argument("--only", nargs="*", default=[*LINEARS, "embedded"], help="cases; embedded: --models")
    parser.add_argument("--kinds", nargs="*", choices=tuple(KINDS), default=list(KINDS), help="what is quantised to")
    parser.add_argument("--models", nargs="*", default=["emoji-unet"], help="pipelines whose denoiser is timed")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=None, help="where cases are kept")
    parser.add_argument("--name", default="quant-speed", help="of the record")
    a = parser.parse_args()
    how = f"{a.dtype}-{a.device}{'-compiled' if a.compile else ''}"
    folder = a.folder or Path("runs") / f"quant-speed-{how}"
    dtype = getattr(torch, a.dtype)
    cases = [name for name in a.only if name != "embedded"]
    unknown = [name for name in cases if name not in LINEARS and name not in STEPS]
    if unknown:
        parser.error(f"no case '{unknown[0]}'; choose from {', '.join([*LINEARS, *STEPS, 'embedded'])}")
    cases += a.models if "embedded" in a.only else []
    log = f"peers: {', '.join(name + ' ' + (installed(name) or 'absent') for name in PEERS)}\n"
    figures: dict[str, Measurement] = {}
    for name in cases:
        path = folder / f"{name}.json"
        if not path.is_file():
            if name in LINEARS:
                case = linear_case(name, dtype, a.compile, a.rounds, a.device, a.kinds)
            else:
                case = model_case(
                    name, dtype, a.compile, a.rounds, a.device, a.kinds, folder / "ways.json", a.eager_ways, a.way
                )
            write_json(path, case)
        case = read_json(path)
        for key, value in case["figures"].items():
            one = Measurement.from_dict(value | {"settings": value["settings"] | {"compiled": a.compile}})
            figures[f"{name} {key}"] = one
            ratio = f", {one.parts['speedup']}" if "speedup" in one.parts else ""
            line = f"{name} {key}: {one}{ratio}"
            log += line + "\n"
            print(line, flush=True)
        log += "".join(note + "\n" for note in case["notes"])
        print("\n".join(case["notes"]), flush=True)
    command = f"python benchmarks/quant_speed.py --dtype {a.dtype} --device {a.device} --rounds {a.rounds}"
    command += f"{' --compile' if a.compile else ''} --only {' '.join(a.only)} --models {' '.join(a.models)}"
    command += " --eager-ways" if a.eager_ways else ""
    command += f" --way {a.way}" if a.way else ""
    if a.kinds != list(KINDS):
        command += " --kinds " + " ".join(f"'{kind}'" for kind in a.kinds)
    print(measure.write_record(f"{a.name}-{how}", figures, log=log, command=command, seed=0))


if __name__ == "__main__":
    main()
