"""Training of the embedded models: exact resume, and from stages to folders that stock diffusers loads."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from vislr import zoo
from vislr.core.arguments import parse_config
from vislr.core.errors import ConfigError, ModelError
from vislr.zoo import architectures, checkpoints, retraining
from vislr.zoo.emoji_net import EmojiNet, EmojiNetConfig, Judge, tokenise
from vislr.zoo.freezing import freeze, note_gates
from vislr.zoo.retraining import RetrainConfig, Run, learning_rate, retrain

STAGES = ("vae", "unet", "mmdit", "net", "vit", "conv")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_config(stage):
    config = parse_config(RetrainConfig, ["--config", f"zoo/{stage}.yaml"], prog="x", description="x")
    assert config.stage == stage
    assert config.text_steps == RetrainConfig.text_steps  # one text model for all stages


def test_an_unknown_stage_is_refused():
    with pytest.raises(ConfigError, match="stage 'clip'"):
        RetrainConfig("clip", 10)


def test_the_learning_rate_rises_holds_and_falls():
    rates = [learning_rate(step, 1000, 2.0) for step in (0, 99, 500, 799, 900, 999)]
    assert rates == pytest.approx([0.02, 2.0, 2.0, 2.0, 1.01, 0.0299])


def _train(folder, start, stop):
    """Steps of a conv in channels_last, the layout that the optimiser's state has to take over."""
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    run = Run(RetrainConfig("conv", 6, out=folder), {"net": net})
    assert run.step == start
    while run.step < stop:
        run.update(net(torch.randn(2, 3, 8, 8, generator=run.draw())).square().mean())
    run.save()
    return [t.clone() for t in (*run.values, *run.ema)], run.losses


def test_resume_is_exact(tmp_path):
    whole, _ = _train(tmp_path / "a", 0, 6)
    _train(tmp_path / "b", 0, 3)
    parts, _ = _train(tmp_path / "b", 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All stages with a few steps on a few pictures: wrong as models, right as files."""
    out, folder = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("weights")
    few = zoo.images(style="noto", split="train")[::200]
    patch = pytest.MonkeyPatch()
    patch.setattr(retraining, "base_pictures", lambda: few)
    for stage in STAGES:
        retrain(RetrainConfig(stage, 3, batch=8, text_steps=2, scenes=6, out=out))
    for stage in STAGES[1:]:
        freeze(out, folder, f"emoji-{stage}", "a test")
    patch.setattr(checkpoints, "WEIGHTS", folder)
    yield out, folder
    patch.undo()


def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    return pipe("noto style, a bus", num_inference_steps=2, generator=rng, output_type="np", **options).images


def test_the_text_model_is_frozen_after_its_steps(trained):
    out, _ = trained
    stored = load_file(out / "unet-state" / "3.safetensors")
    frozen = load_file(out / "text_encoder" / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    assert torch.equal(stored[f"raw.text_encoder.{name}"], frozen[name])
    assert torch.equal(frozen["text_projection.weight"], torch.eye(64))


def test_pipelines_share_their_parts_and_load(trained):
    out, folder = trained
    assert (folder / "emoji-mmdit" / "vae").is_symlink()
    files = [f for f in folder.rglob("*.safetensors") if not any(p.is_symlink() for p in f.parents)]
    # The autoencoder and the text model once, two denoisers, three nets.
    assert len(files) == 7
    pipe = zoo.pipeline("emoji-mmdit")
    stock = StableDiffusion3Pipeline.from_pretrained(
        folder / "emoji-mmdit", text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    image = draw(pipe)
    assert image.shape == (1, 64, 64, 3)
    assert np.array_equal(image, draw(stock, max_sequence_length=16))
    assert not np.array_equal(image, draw(stock))
    # The gates judge a training folder before it is frozen: with as many tokens.
    unfrozen = retraining.assemble(out, "emoji-mmdit")
    assert np.array_equal(draw(unfrozen), draw(unfrozen, max_sequence_length=16))
    pipe.save_pretrained(folder.parent / "again")
    assert json.loads((folder.parent / "again" / "model_index.json").read_text())["_class_name"] == (
        "StableDiffusion3Pipeline"
    )
    assert draw(zoo.pipeline("emoji-unet")).shape == (1, 64, 64, 3)


def test_both_denoisers_have_their_sizes():
    assert sum(p.numel() for p in architectures.make_unet().parameters()) == 3_906_708
    assert sum(p.numel() for p in architectures.make_mmdit().parameters()) == 3_013_008


def test_classifiers_are_stock_timm_folders(trained):
    import timm

    _, folder = trained
    for stage in ("vit", "conv"):
        net = timm.create_model(f"local-dir:{folder / f'emoji-{stage}'}", pretrained=True).eval()
        own = zoo.classifier(f"emoji-{stage}")
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(net(x), own(x))
        assert len(own.pretrained_cfg["label_names"]) == own.num_classes
        stored = load_file(folder / f"emoji-{stage}" / "model.safetensors")
        assert all(torch.equal(v.half(), stored[k]) for k, v in net.state_dict().items() if v.is_floating_point())
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, net.num_classes)


def test_an_unknown_classifier_is_refused(trained):
    with pytest.raises(ModelError, match="no embedded classifier is called 'emoji-vitt'; did you mean 'emoji-vit'"):
        zoo.classifier("emoji-vitt")


def test_verify_names_a_changed_file(trained, tmp_path, monkeypatch):
    _, folder = trained
    assert zoo.verify() == []
    changed = tmp_path / "weights"
    shutil.copytree(folder, changed, symlinks=True)
    monkeypatch.setattr(checkpoints, "WEIGHTS", changed)
    (changed / "emoji-conv" / "model.safetensors").unlink()
    (problem,) = zoo.verify()
    assert problem.startswith("emoji-conv/model.safetensors: absent")


def test_the_judge_prefers_what_it_learned():
    """The loss pulls a picture to its own caption: a few steps on four pairs order all of them."""
    tokenizer = zoo.pipeline("emoji-unet").tokenizer
    torch.manual_seed(0)
    pictures = zoo.images(style="noto")[::400][:4]
    captions = [p.caption for p in pictures]
    net = EmojiNet(EmojiNetConfig(len(tokenizer)))
    x = retraining.pixels(pictures).float().div(127.5).sub(1)
    tokens = tokenise(tokenizer, captions)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(30):
        logits = net.image_features(x) @ net.text_features(tokens, tokenizer.eos_token_id).T / 0.1
        torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    net.train()  # statistics of the batch: thirty steps do not settle the running ones
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = None
            m.reset_running_stats()
    with torch.no_grad():
        net.image_features(x)
    judge = Judge(net, tokenizer)
    scores = judge.images(pictures) @ judge.texts(captions).T
    assert scores.argmax(1).tolist() == [0, 1, 2, 3]
    assert torch.allclose(judge.alignment(pictures, captions), scores.diagonal(), atol=1e-6)


def test_figures_of_a_record_go_into_the_card_and_its_page(trained, tmp_path):
    _, folder = trained
    place = shutil.copytree(folder / "emoji-net", tmp_path / "emoji-net")
    record = tmp_path / "2026-01-01-gates"
    record.mkdir()
    figure = {"value": 0.123456, "interval": [0.1, 0.2]}
    (record / "record.json").write_text(json.dumps({"measurements": {"top-1": figure}}))
    note_gates(place, record)
    card = json.loads((place / "card.json").read_text())
    assert card["gates"] == {"top-1": [0.1235, 0.1, 0.2]}
    assert card["record"] == "2026-01-01-gates"
    page = (place / "README.md").read_text()
    assert "| top-1 | 0.1235 | 0.1 to 0.2 |" in page
    assert "Microsoft" in page, "the net has seen Fluent Emoji"
    assert "Microsoft" not in (folder / "emoji-vit" / "README.md").read_text()
    assert card["weights"]["model.safetensors"][:16] in page
