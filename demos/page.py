"""The page: where everything stands, and which handler each button calls."""

from __future__ import annotations

from typing import Any

import gradio as gr

from vislr.demos import view
from vislr.demos.handlers import Handlers
from vislr.demos.runs import MOST_COUNT, MOST_SIZE, MOST_STEPS, methods
from vislr.demos.session import MOST_ADAPTERS
from vislr.demos.studio import Studio
from vislr.formats.exchange import FORMATS
from vislr.formats.weights import WAYS

TITLE = "vislr studio"
# Chosen at first.
FIRST_METHODS = ("merge", "switch", "composite")


def build(studio: Studio, *, steps: int = 25, guidance: float = 4.0) -> gr.Blocks:
    """The page of this studio, not launched.

    Args:
        steps, guidance: what the page begins with.
    """
    # What lies in gradio's own cache (uploads, copies of pictures) goes an hour after it came.
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(f"<h1>{TITLE}</h1><p>adapters side by side: load, weigh, compare, merge</p>", elem_id="head")
        ui: dict[str, Any] = {"message": gr.HTML(elem_id="message")}
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=2, min_width=320):
                _adapters(ui, studio)
                _methods(ui, steps, guidance)
            with gr.Column(scale=3, min_width=320):
                _results(ui)
        _wire(page, ui, Handlers(studio, ui))
    return page


def _adapters(ui: dict[str, Any], studio: Studio) -> None:
    ui["model"] = gr.Dropdown(
        studio.offered(), value=studio.model, label="Pipeline", elem_id="model",
        allow_custom_value=studio.typed_paths,
        info="an embedded name, a diffusers folder, or a hub id" if studio.typed_paths else None,
    )  # fmt: skip
    ui["adapters"] = gr.HTML(elem_id="adapters")
    ui["slots"] = []
    for number in range(MOST_ADAPTERS):
        with gr.Row(visible=False, elem_classes="slot", elem_id=f"slot-{number}") as row:
            weight = gr.Slider(-2, 2, 1, step=0.05, label="weight", scale=5, min_width=180)
            trigger = gr.Textbox(
                label="trigger", placeholder="words in the prompt", scale=3, min_width=120, max_lines=1, visible=False
            )
            remove = gr.Button("✕", size="sm", scale=0, min_width=38, elem_classes="remove")
        ui["slots"].append((row, weight, trigger, remove))
    ui["upload"] = gr.UploadButton("Upload adapter files", file_count="multiple", size="md", elem_id="upload")
    with gr.Accordion("From a folder, or of another base", open=studio.folder is not None):
        ui["folder"] = gr.Textbox(
            str(studio.folder or "") if studio.typed_paths else "", label="Folder of this machine",
            visible=studio.typed_paths, max_lines=1,
            info="Enter lists its files",
        )  # fmt: skip
        ui["library"] = gr.Dropdown(
            sorted(studio.library()), multiselect=True, label="Adapters in the folder", elem_id="library"
        )
        ui["add"] = gr.Button("Add them", size="md", elem_id="add")
        ui["any_base"] = gr.Checkbox(False, label="accept adapters that were made on other base weights")


def _methods(ui: dict[str, Any], steps: int, guidance: float) -> None:
    known = methods()
    ui["methods"] = gr.CheckboxGroup(
        list(known), value=[name for name in FIRST_METHODS if name in known], label="Methods, side by side",
        elem_id="methods",
    )  # fmt: skip
    with gr.Row():
        ui["steps"] = gr.Number(steps, label="Steps", precision=0, minimum=1, maximum=MOST_STEPS, min_width=60)
        ui["guidance"] = gr.Number(guidance, label="Guidance", minimum=0, maximum=50, min_width=60)
        ui["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=60)
        ui["count"] = gr.Number(1, label="Pictures", precision=0, minimum=1, maximum=MOST_COUNT, min_width=60)
    with gr.Accordion("More settings, and what the methods are", open=False):
        ui["negative"] = gr.Textbox(label="Negative prompt", max_lines=2)
        with gr.Row():
            ui["size"] = gr.Number(
                0, label="Size", precision=0, minimum=0, maximum=MOST_SIZE, min_width=110, info="pixels; 0: its own"
            )
            ui["every"] = gr.Number(5, label="Switch every", precision=0, minimum=1, min_width=110, info="steps")
        with gr.Row():
            ui["density"] = gr.Number(
                0.5, label="Density", minimum=0, maximum=1, step=0.05, min_width=110, info="ties, dare, magnitude"
            )
            ui["refresh"] = gr.Number(
                0, label="Refresh", precision=0, minimum=0, min_width=110, info="cmlora, steps; 0: uneven"
            )
        gr.HTML(view.method_lines(known))


def _results(ui: dict[str, Any]) -> None:
    ui["prompt"] = gr.Textbox(label="Prompt", placeholder="a red car", lines=2, elem_id="prompt")
    with gr.Row():
        ui["generate"] = gr.Button("Generate", variant="primary", min_width=90, elem_id="generate")
        ui["skip"] = gr.Button("Skip", interactive=False, min_width=80, elem_id="skip")
        ui["stop"] = gr.Button("Stop", variant="stop", interactive=False, min_width=70, elem_id="stop")
    with gr.Tabs():
        with gr.Tab("Pictures"):
            ui["progress"] = gr.HTML(elem_id="lines")
            ui["grid"] = _gallery("grid")
            with gr.Row():
                ui["save_grid"] = gr.Button("Save the grid", size="sm", min_width=130, elem_id="save-grid")
                ui["picture_file"] = _download("picture")
            ui["picked"] = _details()
            ui["grid_file"] = gr.File(label="Grid", visible=False, interactive=False)
        with gr.Tab("Profiles"):
            gr.Markdown(
                "How the share of high frequencies moves while each adapter draws alone, with the prompt, steps and "
                "seeds of the left side. CMLoRA takes its two groups from here once every adapter has a profile."
            )
            ui["profile"] = gr.Button("Profile the adapters", size="sm", elem_id="profile")
            ui["profile_lines"] = gr.HTML()
            ui["profile_picture"] = _plot()
        with gr.Tab("Conflicts"):
            gr.Markdown("Where the adapters change the same weights, layer by layer.")
            ui["conflict"] = gr.Button("Compare the adapters", size="sm", elem_id="conflict")
            ui["conflict_picture"] = _plot()
            ui["conflict_lines"] = gr.HTML()
        with gr.Tab("History"):
            ui["history"] = _gallery("history")
            with gr.Row():
                ui["again"] = gr.Button(
                    "Use its settings", size="sm", min_width=130, interactive=False, elem_id="again"
                )
                ui["history_file"] = _download("history")
            ui["remembered"] = _details()
        with gr.Tab("Save"):
            gr.Markdown("With the weights of the left side. Files go when the page is closed: download them.")
            with gr.Row():
                ui["name"] = gr.Textbox("merged", label="Name", min_width=120, max_lines=1)
                ui["way"] = gr.Dropdown(list(WAYS), value="sum", label="Merge by", min_width=100)
                ui["format"] = gr.Dropdown(list(FORMATS), value="vislr", label="Format", min_width=100)
                ui["rank"] = gr.Number(0, label="Largest rank", precision=0, minimum=0, min_width=100, info="0: exact")
            with gr.Row():
                ui["save_adapter"] = gr.Button("Save one adapter", size="sm", elem_id="save-adapter")
                ui["save_pipeline"] = gr.Button("Save the pipeline with them in it", size="sm", elem_id="save-pipeline")
            ui["saved_lines"] = gr.HTML()
            ui["saved"] = gr.File(label="File", visible=False, interactive=False, elem_id="saved")


def _gallery(name: str) -> gr.Gallery:
    return gr.Gallery(
        show_label=False, columns=3, height="auto", object_fit="contain", format="png", elem_id=name,
        buttons=["download", "fullscreen"], interactive=False, elem_classes="pictures",
    )  # fmt: skip


def _plot() -> gr.Image:
    return gr.Image(
        show_label=False, interactive=False, visible=False, format="png", buttons=["download", "fullscreen"]
    )


def _download(name: str) -> gr.DownloadButton:
    label = "Save the chosen picture"
    return gr.DownloadButton(label, size="sm", min_width=130, interactive=False, elem_id=f"save-{name}")


def _details() -> gr.HTML:
    with gr.Accordion("How it was made", open=False):
        return gr.HTML(view.note("choose a picture"))


def _wire(page: gr.Blocks, ui: dict[str, Any], do: Handlers) -> None:
    # Not an interface for programs: only the page itself calls these.
    hidden: dict[str, Any] = {"api_visibility": "private"}
    shown = do.outputs()
    settings = [ui[name] for name in do.SETTINGS]
    values = [part for _, weight, trigger, _ in ui["slots"] for part in (weight, trigger)]
    at_once = {**hidden, "queue": False, "show_progress": "hidden"}

    page.load(do.enter, None, shown, **hidden)
    page.unload(do.leave)
    ui["model"].input(do.choose, [ui["model"]], shown, **hidden)
    ui["upload"].upload(do.upload, [ui["upload"], ui["any_base"]], shown, **hidden)
    ui["folder"].submit(do.list_folder, [ui["folder"]], [ui["library"], ui["message"]], **hidden)
    ui["add"].click(do.add, [ui["folder"], ui["library"], ui["any_base"]], shown, **hidden)
    triggers = [trigger for _, _, trigger, _ in ui["slots"]]
    ui["methods"].change(do.needs_triggers, [ui["methods"]], triggers, **at_once)
    for number, (_, _, _, remove) in enumerate(ui["slots"]):
        remove.click(do.remover(number), None, shown, **hidden)

    long = {**hidden, "show_progress": "hidden", "concurrency_limit": None}
    drawn = [ui[name] for name in do.DRAWN]
    gr.on([ui["generate"].click, ui["prompt"].submit], do.generate, settings + values, drawn, **long)
    ui["skip"].click(do.skip, None, None, **at_once)
    ui["stop"].click(do.stop, None, None, **at_once)
    ui["grid"].select(do.pick, None, [ui["picked"], ui["picture_file"]], **hidden)
    ui["save_grid"].click(do.save_grid, None, [ui["grid_file"], ui["message"]], **hidden)

    profiled = [ui[name] for name in ("profile_lines", "profile_picture", "message", "stop")]
    ui["profile"].click(do.profile, settings + values, profiled, **long)
    compared = [ui["conflict_picture"], ui["conflict_lines"], ui["message"]]
    ui["conflict"].click(do.conflicts, None, compared, **long)

    ui["history"].select(do.recall, None, [ui["remembered"], ui["history_file"], ui["again"]], **hidden)
    ui["again"].click(do.again, None, [*settings, *values, ui["message"]], **hidden)
    saving = [ui[name] for name in ("name", "way", "format", "rank", "density")]
    saved = [ui["saved"], ui["saved_lines"], ui["message"]]
    ui["save_adapter"].click(do.save_adapter, saving + values, saved, **long)
    ui["save_pipeline"].click(do.save_pipeline, [ui["name"], *values], saved, **long)
