"""The embedded pipeline: small, stock, and it draws what the caption says in the style that it says."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from vislr import zoo
from vislr.core.errors import ModelError
from vislr.zoo.emoji_net import emoji_net
from vislr.zoo.retraining_nets import unseen
from vislr.zoo.vocabulary import check_words


@pytest.fixture(scope="module")
def pipe():
    loaded = zoo.pipeline("emoji-unet")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def mmdit():
    loaded = zoo.pipeline("emoji-mmdit")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe, caption, seed=0, **options):
    call = {"num_inference_steps": 10, "guidance_scale": 3.0, **options}
    return np.asarray(pipe(caption, generator=torch.Generator().manual_seed(seed), **call).images[0]) / 255


def test_it_is_small_and_of_stock_classes(pipe):
    assert zoo.pipeline_names() == ["emoji-mmdit", "emoji-unet"]
    weights = zoo.pipeline_folder("emoji-unet").parent
    # What the MMDiT shares is a link, and counted once.
    stored = {f.resolve() for f in weights.rglob("*") if f.is_file()}
    assert sum(f.stat().st_size for f in stored) < 20_000_000
    assert [type(pipe.components[n]).__name__ for n in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")] == [
        "AutoencoderKL", "CLIPTextModel", "CLIPTokenizer", "UNet2DConditionModel", "DDIMScheduler"
    ]  # fmt: skip
    assert sum(p.numel() for p in pipe.unet.parameters()) == 3_906_708
    assert all(p.dtype == torch.float32 for p in pipe.unet.parameters())
    assert pipe.tokenizer.model_max_length == 16
    for picture in zoo.images()[::50]:
        check_words(pipe.tokenizer, picture.caption)


def test_the_transformer_is_of_stock_classes_and_shares_its_parts(mmdit):
    assert type(mmdit.transformer).__name__ == "SD3Transformer2DModel"
    assert mmdit.transformer.config.num_layers == 13
    assert sum(p.numel() for p in mmdit.transformer.parameters()) == 3_013_008
    folder = zoo.pipeline_folder("emoji-mmdit")
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        other = zoo.pipeline_folder("emoji-unet") / part.removesuffix("_2")
        for file in other.iterdir():
            assert (folder / part / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["emoji-unet", "emoji-mmdit"])
def test_stock_diffusers_draws_the_same_bits(name, request):
    pipe = request.getfixturevalue("pipe" if name == "emoji-unet" else "mmdit")
    absent = {} if name == "emoji-unet" else {"text_encoder_3": None, "tokenizer_3": None}
    stock = DiffusionPipeline.from_pretrained(zoo.pipeline_folder(name), dtype=torch.float32, **absent)
    stock.set_progress_bar_config(disable=True)
    # Stock SD3 makes 256 zero tokens of the absent T5 unless told; ours tells.
    options = {} if name == "emoji-unet" else {"max_sequence_length": 16}
    assert np.array_equal(draw(stock, "noto style, a bus", **options), draw(pipe, "noto style, a bus"))


@pytest.mark.parametrize("name", ["pipe", "mmdit"])
def test_pictures_follow_their_captions(name, request):
    pipe = request.getfixturevalue(name)
    apple, book = draw(pipe, "noto style, a red apple"), draw(pipe, "noto style, a blue book")
    face = draw(pipe, "twemoji style, a grinning face")
    assert apple.shape == (64, 64, 3)
    centre = (slice(20, 44), slice(20, 44))
    red, green, blue = (apple[centre][..., i].mean() for i in range(3))
    assert red > green + 0.2
    assert red > blue + 0.2
    assert book[centre][..., 2].mean() > book[centre][..., 0].mean()
    assert face[centre][..., :2].min(-1).mean() > face[centre][..., 2].mean() + 0.2, "yellow: red and green above blue"
    assert np.median(face[[0, 0, -1, -1], [0, -1, 0, -1]]) > 0.9, "white ground"


def test_the_autoencoder_keeps_concepts_that_it_never_saw(pipe):
    pictures = zoo.images(style="noto", split="held-out")[::8]
    x = torch.stack([torch.from_numpy(np.asarray(p.image()).copy()) for p in pictures])
    x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    error = ((x - y) / 2).pow(2).flatten(1).mean(1)
    assert float((-10 * error.log10()).mean()) > 28


def test_the_judge_finds_captions_and_styles():
    """The figures of its record, on a part of the pictures: far above chance, less so where it has seen nothing."""
    judge = emoji_net()
    everything = zoo.images(style="noto")
    captions = [p.caption for p in everything]
    texts = judge.texts(captions)
    found = {}
    for kind in (False, True):
        chosen = [p for p in everything if unseen(p.codepoint, "noto") == kind][:100]
        best = (judge.images(chosen) @ texts.T).topk(5, 1).indices
        own = torch.tensor([captions.index(p.caption) for p in chosen])
        found[kind] = float((best == own[:, None]).any(1).float().mean())
    assert found[False] > 0.9
    assert found[True] > 0.8
    pictures = zoo.images(style="twemoji")[::30]
    right = judge.alignment(pictures, [p.caption for p in pictures])
    for word in ("noto", "fluent", "outline"):
        wrong = judge.alignment(pictures, [f"{word} style, {p.phrase}" for p in pictures])
        assert float((right > wrong).float().mean()) > 0.9


@pytest.mark.parametrize("name", ["emoji-vit", "emoji-conv"])
def test_the_classifiers_name_the_category_of_concepts_that_they_never_saw(name):
    net = zoo.classifier(name)
    names = net.pretrained_cfg["label_names"]
    pictures = zoo.images(style="twemoji", split="held-out")
    x = torch.stack([torch.from_numpy(np.asarray(p.image()).copy()) for p in pictures]).permute(0, 3, 1, 2)
    with torch.no_grad():
        answers = net(x.float() / 127.5 - 1).argmax(1)
    share = np.mean([names[int(a)] == p.category for a, p in zip(answers, pictures, strict=True)])
    commonest = max(sum(p.category == n for p in pictures) for n in names) / len(pictures)
    assert share > commonest + 0.15


def test_an_unknown_name_is_refused():
    with pytest.raises(ModelError, match="emoji-unet"):
        zoo.pipeline("emoji-net")
