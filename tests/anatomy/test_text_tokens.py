"""The length of the text that counts are made for is that of the pipeline's own runs."""

import pytest
import tiny

import vislr
from vislr import zoo
from vislr.anatomy import denoiser_of, sample_of, skeleton
from vislr.anatomy.text import note_text_tokens
from vislr.cache.running import run_once

PIPELINES = {
    "sd": tiny.tiny_sd_pipeline,
    "sdxl": tiny.tiny_sdxl_pipeline,
    "sd3": tiny.tiny_sd3_pipeline,
    "flux": tiny.tiny_flux_pipeline,
    "pixart": tiny.tiny_pixart_pipeline,
    "emoji-unet": lambda: vislr.load("emoji-unet"),
    "emoji-mmdit": lambda: vislr.load("emoji-mmdit"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_counts_are_made_for_as_many_text_tokens_as_the_pipeline_gives(name):
    pipe = PIPELINES[name]()
    denoiser = denoiser_of(pipe)[1]
    note_text_tokens(pipe)
    seen = []
    handle = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    run_once(pipe, "noto style, a cat face", 0, steps=2, guidance=1.0)
    handle.remove()
    assert set(seen) == {sample_of(denoiser)["tokens"]}
    # What is asked for stands above it.
    assert sample_of(denoiser, {"tokens": 5})["tokens"] == 5


@pytest.mark.parametrize(("name", "tokens"), [("emoji-unet", 16), ("emoji-mmdit", 32)])
def test_embedded_pipelines_say_their_length_when_loaded(name, tokens):
    assert sample_of(denoiser_of(vislr.load(name))[1])["tokens"] == tokens
    # Without weights it is read from the tokenizers' configs.
    assert sample_of(skeleton(name, {name: zoo.pipeline_folder(name)}))["tokens"] == tokens
