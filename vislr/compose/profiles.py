"""Fourier profiles of adapters: which make high frequencies early, and so lead first in CMLoRA.

H_eta of the latent is followed along a run with one adapter alone; |Delta H| is how fast its share of high
frequencies changes. Those whose mean |Delta H| over the first half of a run is at least the median are the high
set (arXiv 2502.04923; the published code looks the set up by names in place of measuring it).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.anatomy import denoiser_of
from vislr.anatomy.wrapping import unwrapped
from vislr.cache.running import run_once
from vislr.compose.building import merge_plan
from vislr.compose.fourier import latent_share
from vislr.compose.handler import channels_of, composed
from vislr.core.arguments import plain_data
from vislr.core.context import remove_step_context, step_context
from vislr.core.errors import ConfigError, FormatError
from vislr.core.files import read_json, write_json
from vislr.core.plain import from_plain

if TYPE_CHECKING:
    from PIL import Image

OWNER = "profile"


@dataclass(frozen=True)
class Profile:
    """How one adapter's latents behave along a run.

    Attributes:
        adapter: its name.
        curve: H_eta of what the denoiser gets at every step, averaged over prompts and seeds; the first
            value is the noise's.
        eta, log_amplitude: of H_eta.
        runs: how many runs were averaged.
    """

    adapter: str
    curve: tuple[float, ...]
    eta: float = 0.2
    log_amplitude: bool = False
    runs: int = 1

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return len(self.curve)

    @property
    def changes(self) -> tuple[float, ...]:
        """|Delta H| from each step to the next."""
        return tuple(abs(b - a) for a, b in zip(self.curve, self.curve[1:], strict=False))

    @property
    def score(self) -> float:
        """Mean |Delta H| over the first half of the run."""
        half = self.changes[: max(1, len(self.changes) // 2)]
        return sum(half) / len(half)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return plain_data(self)

    @classmethod
    def from_dict(cls, data: Any) -> Profile:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown key or a wrong type, or a curve of fewer than two steps.
        """
        profile = from_plain(cls, data, "the profile")
        if len(profile.curve) < 2:
            raise ConfigError(f"the profile of '{profile.adapter}' has {len(profile.curve)} steps; expected at least 2")
        return profile


def profile_adapters(
    pipe: Any,
    names: Sequence[str],
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    steps: int = 25,
    guidance: float = 4.0,
    eta: float = 0.2,
    log_amplitude: bool = False,
    progress: Callable[[str], Any] | None = None,
    **call: Any,
) -> tuple[Profile, ...]:
    """One profile an adapter, each from runs with it alone at weight 1.

    Args:
        pipe: a pipeline with the adapters on it; it is as before afterwards.
        prompts, seeds: every pair is run once for every adapter.
        steps, guidance: of a run.
        eta: share of the largest frequency above which is "high".
        log_amplitude: of log(|F| + 1e-8) in place of |F|.
        progress: called with an adapter's name after each of its runs.
        call: further arguments of the pipeline's call.

    Raises:
        AdapterError: an adapter is not there. ConfigError: no prompts, no seeds, fewer than 2 steps, eta outside
            0 to 1.
    """
    if not prompts or not seeds or steps < 2 or not 0 <= eta <= 1:
        raise ConfigError(
            f"{len(prompts)} prompts, {len(seeds)} seeds, {steps} steps, eta {eta}; expected at least one prompt and "
            "seed, 2 steps, and eta from 0 to 1"
        )
    module = unwrapped(denoiser_of(pipe)[1])
    plans = [merge_plan(pipe, [name]) for name in names]
    profiles = []
    for name, plan in zip(names, plans, strict=True):
        curves = []
        for prompt, seed in ((prompt, seed) for prompt in prompts for seed in seeds):
            with composed(pipe, plan), _watching(module, eta, log_amplitude) as curve:
                run_once(pipe, prompt, seed, steps=steps, guidance=guidance, **call)
            curves.append(list(curve.values()))
            if progress is not None:
                progress(name)
        mean = tuple(sum(values) / len(values) for values in zip(*curves, strict=True))
        profiles.append(Profile(name, mean, eta, log_amplitude, len(curves)))
    return tuple(profiles)


@contextmanager
def _watching(module: Any, eta: float, log_amplitude: bool) -> Iterator[dict[float, float]]:
    """While inside, H_eta of the latent of every step is noted, by timestep."""
    curve: dict[float, float] = {}
    context = step_context(module, OWNER)
    channels = channels_of(module)

    def note(timestep: Any) -> str:
        # Where guidance takes two calls, both get the same latent.
        now = float(timestep.flatten()[0])
        if now not in curve:
            curve[now] = latent_share(context.inputs, channels, eta, log_amplitude)
        return "watched"

    context.schedules[OWNER] = note
    try:
        yield curve
    finally:
        remove_step_context(module, OWNER)


def split_profiles(profiles: Sequence[Profile]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(high, low) names, in the given order: high is a score of at least the median."""
    if not profiles:
        return (), ()
    middle = statistics.median(profile.score for profile in profiles)
    high = tuple(profile.adapter for profile in profiles if profile.score >= middle)
    return high, tuple(profile.adapter for profile in profiles if profile.score < middle)


def profile_path(adapter_file: str | os.PathLike) -> Path:
    """Where the profile of an adapter's file lies: beside it, `NAME.profile.json`."""
    path = Path(adapter_file)
    return path.with_name(f"{path.stem if path.suffix else path.name}.profile.json")


def write_profile(profile: Profile, adapter_file: str | os.PathLike) -> Path:
    """Write a profile beside an adapter's file or folder; returns its path.

    Raises:
        OutputError: it cannot be written.
    """
    path = profile_path(adapter_file)
    write_json(path, profile.to_dict())
    return path


def read_profile(adapter_file: str | os.PathLike) -> Profile | None:
    """The profile beside an adapter's file; None: there is none.

    Raises:
        FormatError: it is damaged.
    """
    path = profile_path(adapter_file)
    if not path.is_file():
        return None
    try:
        return Profile.from_dict(read_json(path))
    except (ValueError, ConfigError) as error:
        raise FormatError(f"'{path}' is no profile: {error}") from error


def profile_picture(profiles: Sequence[Profile]) -> Image.Image:
    """The curves of H_eta over the steps; high adapters solid, low ones dashed, scores in the legend."""
    from io import BytesIO

    from matplotlib.figure import Figure
    from PIL import Image

    low = split_profiles(profiles)[1]
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for profile in profiles:
        style = "--" if profile.adapter in low else "-"
        label = f"{profile.adapter} ({'low' if profile.adapter in low else 'high'}, {profile.score:.4f})"
        left.plot(range(profile.steps), profile.curve, style, label=label)
        right.plot(range(1, profile.steps), profile.changes, style)
    eta = profiles[0].eta if profiles else 0.2
    for axes, title in ((left, f"$H_{{{eta:g}}}$: share of high frequencies"), (right, "its change from step to step")):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("denoising step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")
