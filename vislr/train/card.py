"""The model card of a result: what it is, what it was made of, how it is used where people use such files."""

from __future__ import annotations

from vislr.train.classifiers import is_classifier
from vislr.train.config import TrainConfig
from vislr.train.loop import Result


def model_card(config: TrainConfig, result: Result, *, kind: str, pictures: int, held_out: int, components: int) -> str:
    """README.md of a result's folder.

    Args:
        kind: of the adapter. pictures, held_out: their numbers. components: that carry the adapter.
    """
    base = config.model.base
    lines = [
        "---",
        f"base_model: {base}",
        f"tags: [vislr, {kind}]",
        *([f"license: {config.output.license}"] if config.output.license else []),
        "---",
        f"# {kind} adapter for {base}",
        "",
        "![before and after](before_after.png)",
        "",
        f"- Base: `{base}`",
        f"- Method: {kind}, {result.trainable:,} trained parameters, {result.steps} steps, seed {config.seed}",
        f"- Data: {pictures} pictures ({held_out} more held out)",
        *_figures(config, result),
        f"- Licence: {config.output.license or 'not stated; that of the pictures and of the base apply'}",
        "",
        "## Use",
        "",
    ]
    lines += _classifier(config, result) if is_classifier(base) else _pipeline(config, result, kind, components)
    return "\n".join([*lines, ""])


def _figures(config: TrainConfig, result: Result) -> list[str]:
    lines = []
    source, history = result.task.train.source, result.history
    if source.pool.classes:
        lines.append(f"- Classes: {', '.join(source.pool.classes)}")
    else:
        lines.append(f"- Trigger words: {config.data.trigger or 'none; write prompts like the captions'}")
        lines.append(f"- A caption: `{source.item(0).caption}`")
    curve = history.held_out.get("loss")
    if curve:
        points = dict(curve)
        lines.append(f"- Held-out loss: {curve[0][1]:.4f} before, {points.get(result.kept, curve[-1][1]):.4f} after")
    if result.kept != result.steps:
        lines.append(f"- Weights: those of step {result.kept}, where the held-out loss was lowest")
    drift = history.last("held_out").get("drift")
    if drift is not None:
        lines.append(f"- Drift: predictions differ from the base's by {drift:.1%} of their size")
    alike = history.last("samples")
    if alike:
        lines.append(
            f"- Similarity of samples to the nearest training picture: {alike['similarity']:.2f} on average, "
            f"{alike['highest similarity']:.2f} at most; among training pictures "
            f"{alike['similarity among training pictures']:.2f}"
        )
    return lines


def _classifier(config: TrainConfig, result: Result) -> list[str]:
    classes = len(result.task.train.source.pool.classes)
    return [
        "```python",
        "import vislr",
        "from safetensors.torch import load_file",
        "from vislr.train.classifiers import load_classifier",
        "",
        f'model, _ = load_classifier("{config.model.base}", {classes}, pretrained={config.model.pretrained})',
        'model.load_state_dict(load_file("head.safetensors"), strict=False)',
        'vislr.load_adapter(model, "adapter.safetensors")',
        "```",
    ]


def _pipeline(config: TrainConfig, result: Result, kind: str, components: int) -> list[str]:
    base, source = config.model.base, result.task.train.source
    labelled = bool(source.pool.classes)
    prompt = (config.sample.prompts or [source.pool.classes[0] if labelled else source.item(0).caption])[0]
    # Made on the same base, kept in fewer bits: its hash is another.
    options = "" if config.model.storage == "plain" else ", any_base=True"
    call = f'pipe(class_labels=pipe.get_label_ids(["{prompt}"]))' if labelled else f'pipe("{prompt}")'
    ours = ["import vislr", "", f'pipe = vislr.load("{base}")',
            f'vislr.load_adapter(pipe, "adapter.safetensors"{options})', f"image = {call}.images[0]"]  # fmt: skip
    lines = ["With vislr:", "", "```python", *ours, "```", ""]
    form = config.output.format
    if components > 1 and form == "vislr":
        lines += ["The file holds text encoders, too: for other tools convert it as below.", ""]
    lines += _other_tools(kind, form)
    lines.append(f"Trained{_with(config)}.")
    if config.objective.zero_terminal_snr:
        how = "`rescale_betas_zero_snr=True` and trailing timesteps"
        lines += ["", f"Trained to start from pure noise: sample with {how}."]
    if not labelled:
        command = f'vislr generate --model {base} --adapter adapter.safetensors --prompts "{prompt}"'
        lines += ["", "```", command, "```"]
    return lines


def _other_tools(kind: str, form: str) -> list[str]:
    """How the adapter gets into diffusers and ComfyUI, from a file in format `form`."""
    if kind == "oft":
        return ["Files of other tools have no form for OFT: this one is for vislr alone.", ""]
    convert = "vislr convert adapter.safetensors adapter-{0}.safetensors --format {0}"
    lines = []
    if kind == "sara":
        lines += [
            "For diffusers alone: no LoRA holds this change, so it goes into the weights: `vislr.fuse(pipe)`, then "
            "`pipe.save_pretrained(folder)`.", "",
        ]  # fmt: skip
    elif form == "diffusers":
        lines += ["With diffusers alone:", "", "```python", 'pipe.load_lora_weights("adapter.safetensors")', "```", ""]
    else:
        lines += ["For diffusers alone (`pipe.load_lora_weights`), write it in its format:", ""]
        lines += ["```", convert.format("diffusers"), "```", ""]
    if form in ("kohya", "comfy"):
        return [*lines, "With ComfyUI: put `adapter.safetensors` into `models/loras` and add a LoraLoader node.", ""]
    lines += ["For ComfyUI, write it in its format, put it into `models/loras` and add a LoraLoader node:", ""]
    return [*lines, "```", convert.format("kohya"), "```", ""]


def _with(config: TrainConfig) -> str:
    storage = "" if config.model.storage == "plain" else f", base kept in {config.model.storage}"
    return f" by {config.optim.optimizer} at a rate of {config.optim.lr:g}, {config.precision}{storage}"
