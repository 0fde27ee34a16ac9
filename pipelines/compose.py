"""`vislr compose`: several adapters in one picture, methods side by side; `vislr compose profile`: their spectra.

vislr compose --adapters style.safetensors:0.8 subject.safetensors --methods merge cmlora --prompts "a cat face"
vislr compose profile --adapters style.safetensors subject.safetensors --prompts "a cat face"
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vislr.core.arguments import dump_config, parse_config, plain_data
from vislr.core.cli_guard import run
from vislr.core.errors import ConfigError, ModelError
from vislr.core.files import check_output, write_json, write_picture, write_text
from vislr.pipelines.generate import adapter_file, slug


@dataclass
class ComposeConfig:
    """What to compose, and how."""

    model: str = "emoji-unet"
    """Name of an embedded pipeline, a diffusers folder or a hub id."""
    adapters: list[str] = field(default_factory=list)
    """Adapter files of any format, each with a weight behind a colon if it is not 1: style.safetensors:0.8. Their order
    is the order of turns and of the lead. Must be given."""
    methods: list[str] = field(default_factory=lambda: ["merge"])
    """merge, cat, svd, ties, dare, dare_ties, magnitude, switch, composite, cmlora, w_switch, w_composite; several are
    drawn side by side."""
    prompts: list[str] = field(default_factory=list)
    """Prompts; a picture is made for each method, prompt and seed. None: the plans and their costs alone."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds."""
    triggers: list[str] = field(default_factory=list)
    """Of w_switch and w_composite: for each adapter the part of the prompt that asks for it."""
    text_adapters: list[str] | None = None
    """Stems of the adapter files that are on in the text encoders; null: all."""
    density: float = 0.5
    """Of ties, dare, dare_ties, magnitude: share of the entries that stay."""
    rank: int | None = None
    """Of the merged methods: largest rank of the result; null: whole (svd: the largest of the adapters)."""
    merge_seed: int = 0
    """Of the entries that dare and dare_ties drop."""
    every: int = 5
    """Of switch: steps of a turn."""
    off_by_one: bool = False
    """Of switch: the first turn is a step longer, as the published code runs."""
    last: str | None = None
    """Of w_switch: stem of the adapter that has the last steps."""
    last_steps: int = 5
    """Of w_switch: how many these are."""
    high: list[str] | None = None
    """Of cmlora: stems of the adapters that lead first. null: by the profiles beside the files, if all have one, else
    everybody in turn."""
    mode: str = "offline"
    """Of cmlora: offline (the high phase is a share of the run) or online (it lasts while the latent has them)."""
    boundary: float = 6 / 11
    """Of cmlora, offline: share of the run that is the high phase."""
    threshold: float = 0.4
    """Of cmlora, online: share of high frequencies of the latent above which the phase is high."""
    beta: float | None = None
    """Of cmlora: weight of the leading adapter over another's; null: number of adapters less a half."""
    decay: str = "none"
    """Of cmlora: none, or geometric: beta falls at every refresh."""
    low_phase: str = "lo"
    """Of cmlora: who leads in the low phase: lo, or all_but_first, as the published code runs."""
    cache: str | None = "auto"
    """Of cmlora: auto, the name of a block where cached features enter, or null for no cache."""
    refresh_every: int | None = None
    """Of cmlora: steps between refreshes; null: 2 at both ends of a run and 3 between."""
    passes: str = "auto"
    """Of composite and cmlora: batched (several adapters in one forward), separate, or auto."""
    steps: int = 25
    """Denoising steps."""
    guidance: float = 4.0
    """Classifier-free guidance scale."""
    size: int | None = None
    """Side in pixels; null: the pipeline's own."""
    batch: int = 4
    """Pictures made at once."""
    conflicts: bool = True
    """Report where the adapters change the same weights (conflicts.txt, conflicts.png)."""
    device: str | None = None
    """cpu, cuda, mps; null: a GPU if there is one."""
    any_base: bool = False
    """Accept adapters that were trained on a base with other weights."""
    save: str | None = None
    """Folder for the pipeline with its adapters and the plan of the first method; `vislr.load` puts all of it back."""
    out: str = "runs/compose"
    """Folder for the pictures, grid.png, METHOD.json and report.txt with the plans and what they cost, and turns.png:
    who runs in which step."""

    def __post_init__(self) -> None:
        if not self.adapters:
            raise ConfigError("adapters is empty; give at least one file")
        if not self.methods or not self.seeds:
            raise ConfigError("methods and seeds must not be empty")
        if any(method.startswith("w_") for method in self.methods) and len(self.prompts) != 1:
            raise ConfigError(f"w_switch and w_composite weigh one prompt; {len(self.prompts)} given")
        for name in ("steps", "batch", "size", "refresh_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more")
        from vislr.compose.building import options_of  # knows the methods; slow to import, so last

        for method in self.methods:
            options_of(method)


@dataclass
class ProfileConfig:
    """Which adapters to profile, and on what."""

    model: str = "emoji-unet"
    """Name of an embedded pipeline, a diffusers folder or a hub id."""
    adapters: list[str] = field(default_factory=list)
    """Adapter files. Must be given. Each one's profile is written beside it as NAME.profile.json."""
    prompts: list[str] = field(default_factory=list)
    """Prompts that are drawn with each adapter alone. Must be given."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds; every prompt is drawn with each."""
    steps: int = 25
    """Denoising steps."""
    guidance: float = 4.0
    """Classifier-free guidance scale."""
    eta: float = 0.2
    """Share of the largest frequency above which is high."""
    log_amplitude: bool = False
    """Of log amplitudes in place of amplitudes."""
    device: str | None = None
    """cpu, cuda, mps; null: a GPU if there is one."""
    any_base: bool = False
    """Accept adapters that were trained on a base with other weights."""
    out: str = "runs/profile"
    """Folder for profiles.png."""

    def __post_init__(self) -> None:
        if not self.adapters or not self.prompts:
            raise ConfigError("adapters and prompts must be given")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr compose` or `vislr compose profile` with these arguments; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["profile"]:
        return profile(arguments[1:])
    config = parse_config(
        ComposeConfig,
        arguments,
        prog="vislr compose",
        description="Several adapters in one picture. `vislr compose profile --help`: which of them lead first.",
    )
    folder = check_output(config.out)
    from vislr import compose, folders, record
    from vislr.data import make_grid

    pipe, names, weights, files = _loaded(config)
    plans = {method: plan_of(config, pipe, method, names, weights, files) for method in config.methods}
    lines = []
    for method, plan in plans.items():
        report = record.apply(pipe, plan, name=method)
        lines.append(str(report))
        if config.save and method == config.methods[0]:
            folders.save(pipe, config.save)
            lines.append(f"pipeline with its adapters and this plan -> {config.save}")
        record.remove(pipe, report)
        write_json(folder / f"{method}.json", plan.to_dict())
    if config.conflicts and len(names) > 1:
        found = compose.conflicts(pipe, names)
        lines += found.lines()
        write_text(folder / "conflicts.txt", "\n".join(found.lines(len(found.layers))) + "\n")
        write_picture(folder / "conflicts.png", compose.conflict_picture(found), {"adapters": config.adapters})
    write_picture(folder / "turns.png", compose.turns_picture(list(plans.values())), plain_data(config))
    print("\n".join(lines))
    write_text(folder / "report.txt", "\n".join(lines) + "\n")
    dump_config(config, folder / "config.yaml")
    if config.prompts:
        rows = [_pictures(config, pipe, plan, folder) for plan in plans.values()]
        labels = [
            prompt if len(config.seeds) == 1 else f"{prompt}, seed {seed}"
            for seed in config.seeds
            for prompt in config.prompts
        ]
        cell = max(128, min(rows[0][0].width, 512))
        grid = make_grid(rows, row_labels=list(plans), column_labels=labels, cell=cell)
        write_picture(folder / "grid.png", grid, plain_data(config))
    print(f"{len(plans)} plans -> {folder}")
    return 0


def profile(argv: Sequence[str]) -> int:
    """Run `vislr compose profile` with these arguments; returns the exit code."""
    config = parse_config(
        ProfileConfig,
        argv,
        prog="vislr compose profile",
        description="How fast each adapter alone changes a picture's high frequencies: who leads first in cmlora.",
    )
    folder = check_output(config.out)
    from tqdm import tqdm

    from vislr import compose

    pipe, names, _, files = _loaded(config)
    with tqdm(total=len(names) * len(config.prompts) * len(config.seeds), desc="profiling", unit="run") as bar:
        found = compose.profile_adapters(
            pipe, names, config.prompts, config.seeds, steps=config.steps, guidance=config.guidance, eta=config.eta,
            log_amplitude=config.log_amplitude, progress=lambda name: bar.update(),
        )  # fmt: skip
    high, _ = compose.split_profiles(found)
    for one, file in zip(found, files, strict=True):
        path = compose.write_profile(one, file)
        print(
            f"{one.adapter}: mean change {one.score:.5f} a step, {'high' if one.adapter in high else 'low'} -> {path}"
        )
    write_picture(folder / "profiles.png", compose.profile_picture(found), plain_data(config))
    print(f"curves -> {folder / 'profiles.png'}")
    return 0


def _loaded(config: ComposeConfig | ProfileConfig) -> tuple[Any, list[str], list[float], list[Path]]:
    """The pipeline with the adapters on it, their names, weights and files."""
    import torch

    from vislr import folders, recipe
    from vislr.formats import default_name
    from vislr.train.prompts import check_prompts

    given = [adapter_file(text) for text in config.adapters]
    names = [default_name(path) for path, _ in given]
    if len(set(names)) != len(names):
        raise ConfigError(f"two adapter files have one name: {', '.join(sorted(names))}; rename one")
    pipe = folders.load(config.model)
    if not hasattr(pipe, "components"):
        raise ModelError(f"'{config.model}' is one model; expected a whole pipeline")
    check_prompts(pipe, [("prompts", prompt) for prompt in config.prompts])
    for name, (path, weight) in zip(names, given, strict=True):
        recipe.load_adapter(pipe, path, name=name, weight=weight, any_base=config.any_base)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from error
    return pipe, names, [weight for _, weight in given], [path for path, _ in given]


def plan_of(
    config: ComposeConfig, pipe: Any, method: str, names: list[str], weights: list[float], files: Sequence[Path | None]
) -> Any:
    """The ComposePlan of one method by the fields of `config` that the method knows.

    Args:
        pipe: with the adapters on it. names, weights: of the adapters. files: of each, whose profile lies beside it;
            None: it has none.
    """
    from vislr import compose

    options: dict[str, Any] = {
        "text_adapters": config.text_adapters, "steps": config.steps, "density": config.density, "rank": config.rank,
        "seed": config.merge_seed, "every": config.every, "off_by_one": config.off_by_one, "passes": config.passes,
        "mode": config.mode, "boundary": config.boundary, "threshold": config.threshold, "beta": config.beta,
        "decay": config.decay, "low_phase": config.low_phase, "last": config.last, "last_steps": config.last_steps,
        "triggers": config.triggers, "prompt": config.prompts[0] if config.prompts else "",
    }  # fmt: skip
    if method == "cmlora":
        options |= {"cache": config.cache, "refresh": config.refresh_every or "non-uniform", "high": config.high}
        profiles = [None if file is None else compose.read_profile(file) for file in files]
        if config.high is None and all(one is not None for one in profiles):
            found = zip(profiles, names, strict=True)
            options["profiles"] = [dataclasses.replace(one, adapter=name) for one, name in found if one is not None]
    known = compose.options_of(method)
    return compose.compose_plan(pipe, names, weights, method, **{k: v for k, v in options.items() if k in known})


def _pictures(config: ComposeConfig, pipe: Any, plan: Any, folder: Path) -> list[Any]:
    """One picture a prompt and seed by one plan, each with the plan in its metadata."""
    from tqdm import tqdm

    from vislr import compose
    from vislr.train import sample_images

    pairs = [(prompt, seed) for seed in config.seeds for prompt in config.prompts]
    with compose.composed(pipe, plan), tqdm(total=len(pairs), desc=plan.method, unit="picture") as bar:
        images = sample_images(
            pipe, [prompt for prompt, _ in pairs], [seed for _, seed in pairs], steps=config.steps,
            guidance=config.guidance, size=config.size, batch=config.batch, progress=bar.update,
        )  # fmt: skip
    made = plain_data(config) | {"plan": plan.to_dict()}
    for image, (prompt, seed) in zip(images, pairs, strict=True):
        path = folder / f"{plan.method}-{config.prompts.index(prompt):03d}-{slug(prompt)}-{seed}.png"
        write_picture(path, image, made | {"prompts": [prompt], "seeds": [seed]})
    return images


if __name__ == "__main__":
    sys.exit(run(main))
