"""`vislr demo`: the studio, a page in the browser where adapters are tried, compared and merged.

vislr demo
vislr demo --model path/to/pipeline --adapters path/to/adapters --port 7861
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vislr.core.arguments import parse_config
from vislr.core.cli_guard import run
from vislr.core.errors import ConfigError, DataError, LaunchError


@dataclass
class DemoConfig:
    """What the page begins with, and who may do what."""

    model: str = "emoji-unet"
    """The first pipeline: the name of an embedded one, a diffusers folder or a hub id."""
    models: list[str] = field(default_factory=list)
    """Other pipelines to choose from, beside the embedded ones."""
    adapters: str | None = None
    """A folder whose adapter files (and peft folders) are offered; null: none."""
    steps: int = 25
    """Denoising steps that the page begins with."""
    guidance: float = 4.0
    """Classifier-free guidance that the page begins with."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; null: a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the pipelines."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets everybody in who can reach this machine."""
    port: int = 7860
    """Port; 0: the first free one from 7860 on."""
    typed_paths: bool | None = None
    """Users may name any folder of this machine and any hub id; null: only if host is this machine alone."""
    upload_mib: int = 512
    """The largest file that is taken, in MiB."""
    idle_minutes: int = 60
    """A user who did nothing for so long is forgotten."""
    browser: bool = False
    """Open the page in a browser."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, 200), ("port", 0, 65535), ("upload_mib", 1, 2**16), ("idle_minutes", 1, 10**5),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected {low} to {high}")
        if self.adapters is not None and not Path(self.adapters).is_dir():
            raise DataError(f"there is no folder '{self.adapters}'; adapters must name one")

    @property
    def local(self) -> bool:
        """Whether only programs of this machine reach the page."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def start(config: DemoConfig, *, wait: bool = True) -> tuple[Any, Any, str]:
    """Load the first pipeline and serve the page.

    Args:
        wait: until the server is stopped; otherwise return at once.

    Returns:
        studio, page, address. Without `wait` the caller calls `page.close()` and `studio.close_all()`.

    Raises:
        ConfigError: gradio is missing, or the device cannot be used. ModelError: no such pipeline.
        LaunchError: the port is taken.
    """
    # Before gradio is imported: it asks its maker's server for news otherwise.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError("the studio needs gradio; pip install 'vislr[demo]'") from error
    import torch

    from vislr.demos import page as pages
    from vislr.demos import view
    from vislr.demos.studio import Studio

    studio = Studio(
        model=config.model,
        models=tuple(config.models),
        folder=None if config.adapters is None else Path(config.adapters),
        typed_paths=config.local if config.typed_paths is None else config.typed_paths,
        device=config.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=config.dtype,
        upload_bytes=config.upload_mib * 2**20,
        idle_seconds=60.0 * config.idle_minutes,
    )
    try:
        studio.open()
        page = pages.build(studio, steps=config.steps, guidance=config.guidance)
        page.queue(default_concurrency_limit=8, max_size=256)
        _, address, _ = page.launch(
            server_name=config.host,
            server_port=config.port or None,
            max_file_size=studio.upload_bytes,
            theme=gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=view.CSS,
            inbrowser=config.browser,
            share=False,
            quiet=True,
            show_error=False,
            prevent_thread_lock=True,
            footer_links=[],
            ssr_mode=False,
        )
    except OSError as error:
        studio.close_all()
        raise LaunchError(f"port {config.port} of {config.host} cannot be used: {error}; give another, or 0") from error
    except BaseException:
        studio.close_all()
        raise
    print(f"the studio is at {address}" + ("" if config.local else ", open to everybody who can reach this machine"))
    if wait:
        try:
            page.block_thread()
        finally:
            page.close()
            studio.close_all()
    return studio, page, address


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr demo` with these arguments; returns the exit code."""
    config = parse_config(
        DemoConfig, argv, prog="vislr demo", description="A page in the browser: adapters side by side. Ctrl-C ends it."
    )
    start(config)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
