"""Rewards as functions of pictures: the checker, pixels, gradients, micro-batches, wrong weights, OCR."""

import itertools
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import rewards
import tiny
from gaussian import close
from helpers import TINY, Code, tiny_base, watch_attention
from small_rewards import (
    BLIP_SMALL,
    CLIP_SMALL,
    imagereward_state,
    one_reward,
    rand,
    shake,
    with_tokenizer,
)


# ----------------------------------------------------------------------------------------------- rewards and the tiny checker
def contradictions(row):
    """Captions of the same category that no picture of `row` satisfies: other objects, numbers or colours; last the opposite relation."""

    def things(r):
        return Counter((o["class"], o["count"], o.get("color")) for o in r["include"])

    other = [r for r in tiny.captions() if r["tag"] == row["tag"] and things(r) != things(row)]
    a, b = next(
        (
            (a, b)
            for a, b in zip(tiny.RELATIONS, ("right of", "left of", "below", "above"))
            if a in row["prompt"]
        ),
        (".", "."),
    )
    return other + [
        r
        for r in tiny.captions()
        if a in row["prompt"] and r["prompt"] == row["prompt"].replace(a, b)
    ]


def test_the_checker_accepts_true_pictures_after_the_vae_and_rejects_captions_that_contradict_them():
    rows, pipe, rng = tiny.captions() * 3, tiny_base().pipe, random.Random(0)
    torch.manual_seed(0)
    with torch.no_grad():
        latents = pipe.vae.encode(
            tiny.render(*tiny.scenes(rows, torch.arange(len(rows)))) * 2 - 1
        ).latent_dist.sample()
        drawn = tiny_base().decode(
            (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        )
    (checker,) = rewards.build("checker", torch.device("cpu"))

    def accepted(captions):
        return checker(drawn, [r["prompt"] for r in captions], captions).mean()

    assert accepted(rows) >= 0.98
    assert (
        accepted([rng.choice(contradictions(r)) for r in rows]) <= 0.05
        and accepted([contradictions(r)[-1] for r in rows]) <= 0.05
    )


def test_the_gradient_of_clipscore_is_that_of_finite_differences():
    """(f(x + h d) - f(x - h d)) / 2h in three directions d, float64, pictures that are resized and cropped on the way."""
    g = torch.Generator().manual_seed(0)
    (score,) = rewards.build(
        "clipscore:1", torch.device("cpu"), [f"clipscore={TINY}/clip"], torch.float64
    )

    def f(x):
        return score(x, ["a red circle", "two squares"], [{}, {}]).sum()

    x = (torch.rand(2, 3, 40, 48, generator=g, dtype=torch.float64) * 0.6 + 0.2).requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x)
    for direction in (gradient, *torch.randn(2, *x.shape, generator=g, dtype=torch.float64)):
        d = 1e-4 * direction / direction.norm()
        with torch.no_grad():
            assert (
                abs((f(x + d) - f(x - d)) / 2e-4 - (gradient * d).sum() / 1e-4)
                < 1e-5 * gradient.norm()
            )


@pytest.mark.parametrize("height, width", [(17, 23), (32, 32), (33, 47), (101, 32), (257, 63)])
def test_clip_pixels_takes_pictures_of_any_size(height, width):
    pixels = rewards.clip_pixels(torch.rand(1, 3, height, width), 32)
    assert pixels.shape == (1, 3, 32, 32) and torch.isfinite(pixels).all()
    grey = rewards.clip_pixels(torch.full((1, 3, height, width), 0.5), 32)[0].flatten(
        1
    )  # a constant stays that constant
    assert torch.allclose(
        grey,
        ((0.5 - torch.tensor(rewards.CLIP_MEAN)) / torch.tensor(rewards.CLIP_STD))[:, None],
        atol=1e-5,
    )


@pytest.mark.parametrize("side", [47, 224, 301])
def test_clip_pixels_is_clips_own_preprocessing(side):
    """transformers' CLIP processor works on bytes: it may be off by the rounding of one, 1/255 before the division by std."""
    from transformers import CLIPImageProcessor

    u = torch.linspace(0, 6, side)
    image = (
        (
            torch.stack(
                [u.sin() * u[:, None].cos(), u.cos() * u[:, None].sin(), (u + u[:, None]).sin()]
            )
            / 2
            + 0.5
        )
        * 255
    ).round()
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    )
    theirs = processor(
        Image.fromarray(image.byte().permute(1, 2, 0).numpy()), return_tensors="pt"
    ).pixel_values
    assert (rewards.clip_pixels(image[None] / 255, 64) - theirs).abs().max() < 1 / 255 / min(
        rewards.CLIP_STD
    )


@pytest.fixture(scope="module")
def photographs():
    data = pytest.importorskip("skimage.data")
    return [
        Image.fromarray(picture)
        for picture in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())
    ]


def tensor_of(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


# -------------------------------------------------------------------------------------- pre-processing, pictures and gradients
@pytest.mark.parametrize("size", [(512, 512), (333, 501), (640, 427), (100, 150), (224, 224)])
def test_clip_pixels_are_those_of_clips_published_processor_on_photographs(photographs, size):
    """PIL rounds to bytes (and saturates) after each of two passes. The sum of two roundings is a third of a byte's step off on average and a
    whole one at most: .005 and .015 of a normalised pixel. Saturation adds something at a few sharp edges."""
    processor = transformers.CLIPImageProcessor()
    for picture in photographs:
        picture = picture.resize(size[::-1])
        theirs = processor(picture, return_tensors="pt").pixel_values
        ours = rewards.clip_pixels(tensor_of(picture), 224)
        difference = (ours - theirs).abs().flatten()
        assert difference.mean() < 1 / 3 / 255 / min(rewards.CLIP_STD) and difference[::5].quantile(
            0.99
        ) < 1 / 255 / min(rewards.CLIP_STD)


@pytest.mark.parametrize("size", [(512, 512), (333, 501), (640, 427), (224, 224)])
def test_padded_pixels_are_pils_bicubic_on_a_black_square_on_photographs(photographs, size):
    for picture in photographs:
        picture = picture.resize(size[::-1])
        scale = 224 / max(picture.size)
        small = picture.resize(
            [round(side * scale) for side in picture.size], Image.Resampling.BICUBIC
        )
        square = Image.new("RGB", (224, 224))
        square.paste(small, ((224 - small.width) // 2, (224 - small.height) // 2))
        theirs, ours = (
            rewards.normalise(tensor_of(square)),
            rewards.padded_pixels(tensor_of(picture), 224),
        )
        difference = (ours - theirs).abs().flatten()
        assert difference.mean() < 1 / 3 / 255 / min(rewards.CLIP_STD) and difference[::5].quantile(
            0.99
        ) < 1 / 255 / min(rewards.CLIP_STD)


def test_the_rounding_of_the_processor_moves_the_score_of_a_random_vit_l_by_less_than_a_thousandth(
    photographs, tmp_path
):
    """ViT-L/14's vision tower at its true width and patch size, six blocks of it (24 take a minute), and photographs at 512."""
    config = transformers.CLIPConfig(
        projection_dim=768,
        vision_config=dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=6,
            num_attention_heads=16,
            patch_size=14,
            image_size=224,
        ),
        text_config=dict(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            vocab_size=570,
            max_position_embeddings=16,
            eos_token_id=569,
        ),
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(with_tokenizer(tmp_path))
    reward, processor = (
        one_reward("clipscore", f"clipscore={tmp_path}"),
        transformers.CLIPImageProcessor(),
    )
    vit = rewards.clip(str(tmp_path), "cpu", torch.float32)
    model = vit.model
    for picture in photographs[:2]:
        picture = picture.resize((512, 512))
        with torch.no_grad():
            ours = reward(tensor_of(picture), ["a circle"], [{}])
            theirs = model.visual_projection(
                model.vision_model(**processor(picture, return_tensors="pt")).pooler_output
            )
            theirs = (
                model.logit_scale.exp()
                / 100
                * (
                    torch.nn.functional.normalize(theirs, dim=-1) * vit.text_features(["a circle"])
                ).sum()
            )
        assert abs(ours - theirs) < 1e-3


@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    """A small model with random weights for each of the differentiable rewards -> their --reward_path flags."""
    t = tmp_path_factory.mktemp("small")
    for name, seed in (("clipscore", 0), ("pickscore", 1)):
        config = transformers.CLIPConfig(projection_dim=48, **CLIP_SMALL["hpsv2"][1])
        torch.manual_seed(seed)  # the same models whichever tests have run before
        shake(transformers.CLIPModel(config), seed).save_pretrained(with_tokenizer(t / name))
    head = {
        f"layers.{i}.{k}": v
        for i, (a, b) in zip((0, 2, 4, 6, 7), itertools.pairwise((48, 1024, 128, 64, 16, 1)))
        for k, v in shake(torch.nn.Linear(a, b), i).state_dict().items()
    }
    torch.save(head, t / "aesthetic.pth")
    torch.save(imagereward_state(), with_tokenizer(t / "imagereward") / "ImageReward.pt")
    return [
        f"clipscore={t}/clipscore",
        f"pickscore={t}/pickscore",
        f"aesthetic={t}/aesthetic.pth",
        f"imagereward={t}/imagereward",
    ]


DIFFERENTIABLE = ("clipscore", "pickscore", "aesthetic", "imagereward")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_finite_differences_through_resizing_and_cropping(
    name, small_models, monkeypatch
):
    """Central differences in float64 along the gradient and two other directions; their error is h^2, 1e-8, times a third derivative."""
    monkeypatch.setattr(rewards, "BLIP_L", BLIP_SMALL)
    reward, prompts = (
        one_reward(name, *small_models, dtype=torch.float64),
        ["a red circle", "two squares"],
    )
    assert reward.differentiable

    def f(x):
        return reward(x, prompts, [{}, {}])

    layouts = watch_attention(monkeypatch)
    x = (rand(2, 3, 71, 90).double() * 0.6 + 0.2).requires_grad_()
    (gradient,) = torch.autograd.grad(f(x).sum(), x)
    # what cuDNN needs (common.NOT_CUDNN); imagereward's attention is written out
    assert bool(layouts) == (name != "imagereward")
    assert all(len(seen) == 1 for seen in layouts.values())
    crop = round(90 - 90 * 71 / 90) // 2 - 4  # columns that the centre crop throws away
    assert (
        gradient.isfinite().all()
        and (gradient[..., crop + 4 : -crop - 4].flatten(1).norm(dim=1) > 0).all()
        and gradient[..., :crop].abs().max() == 0
    )
    for direction in (
        gradient,
        *torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    ):
        d = 1e-4 * direction / direction.norm()
        with torch.no_grad():
            assert (
                abs(((f(x + d) - f(x - d)).sum() / 2 - (gradient * d).sum()) / 1e-4)
                < 1e-5 * gradient.norm()
            )


def test_the_gradient_of_hpsv2s_padding_is_that_of_finite_differences():
    x, weight = (
        (rand(1, 3, 30, 50).double() * 0.6 + 0.2).requires_grad_(),
        rand(3, 28, 28, seed=1).double(),
    )

    def f(x):
        return (rewards.padded_pixels(x, 28) * weight).square().sum()

    (gradient,) = torch.autograd.grad(f(x), x)
    d = 1e-4 * gradient / gradient.norm()
    assert abs((f(x + d) - f(x - d)) / 2e-4 - gradient.norm()) < 1e-5 * gradient.norm()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_micro_batches_and_bf16_change_a_score_and_its_gradient_by_their_rounding_alone(
    name, small_models, monkeypatch
):
    monkeypatch.setattr(rewards, "BLIP_L", BLIP_SMALL)
    x, prompts = (
        rand(5, 3, 60, 60).requires_grad_(),
        ["a red circle", "two squares", "a circle", "a circle", "a square"],
    )

    def run(**more):
        return (lambda s: (s.detach(), torch.autograd.grad(s.sum(), x)[0]))(
            one_reward(name, *small_models, **more)(x, prompts, [{}] * 5)
        )

    (score, gradient), (s2, g2), (s16, _) = run(), run(batch=2), run(dtype=torch.bfloat16)
    close(s2, score, 1e-5), close(g2, gradient, 1e-4 * gradient.abs().max().item())
    assert (
        score.dtype == s16.dtype == torch.float32
        and 0 < (s16 - score).abs().max() < 0.05 * score.abs().max()
    )  # 2^-8 a step, a few dozen steps
    with torch.no_grad():
        close(one_reward(name, *small_models, batch=3)(x, prompts, [{}] * 5), score, 1e-5)


def test_each_prompt_is_read_once_and_models_can_be_moved(small_models):
    reward, calls = one_reward("pickscore", *small_models), []
    hook = reward.models[0].text_model.register_forward_hook(lambda *_: calls.append(1))
    for prompts in (["one", "two", "one"], ["two", "one", "one"]):
        reward(rand(3, 3, 56, 56), prompts, [{}] * 3)
    hook.remove()
    assert len(calls) == 2  # of six
    rewards.move([reward, reward], "meta")  # stands for another device
    assert {p.device.type for p in reward.models[0].parameters()} == {"meta"}
    rewards.clip.cache_clear()


@pytest.mark.parametrize(
    "images",
    [
        torch.full((2, 3, 32, 32), math.nan),
        torch.rand(2, 3, 32, 32) * 2,
        torch.rand(2, 3, 32, 32) - 0.1,
        torch.full((2, 3, 32, 32), math.inf),
        torch.rand(3, 32, 32),
        torch.rand(2, 1, 32, 32),
    ],
    ids=("nan", "above 1", "below 0", "inf", "no batch", "grey"),
)
def test_pictures_that_are_none_are_refused_in_one_line(images):
    with pytest.raises(
        ValueError,
        match=r"^reward clipscore: pictures must be \[B,3,H,W\] with finite numbers in \[0,1\], got .*$",
    ) as e:
        one_reward("clipscore", f"clipscore={TINY}/clip")(images, ["a", "b"], [{}, {}])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name, path, message",
    [
        ("beauty", None, "unknown reward 'beauty'"),
        ("hpsv2", None, "download xswu/HPSv2 and give --reward_path hpsv2="),
        ("hpsv3", None, "no directory given"),
        ("geneval2", None, "Qwen/Qwen3-VL-8B-Instruct"),
        ("imagereward", None, "zai-org/ImageReward"),
        ("geneval", None, "facebook/mask2former-swin-small-coco-instance"),
        ("aesthetic", None, "reward aesthetic"),
        ("clipscore", "code.pt", "reward clipscore"),
        ("hpsv2", "code.pt", "reward hpsv2"),
        ("imagereward", "code.pt", "reward imagereward"),
        ("imagereward", "other.pt", "cannot load"),
        ("hpsv2", "text.pt", "reward hpsv2"),
        ("clipscore", "blip", "reward clipscore"),
        ("geneval", str(TINY / "clip"), "reward geneval"),
        ("hpsv3", "blip", "data_collator_qwen.py"),
        ("geneval2", str(TINY / "clip"), "reward geneval2"),
    ],
)
def test_weights_that_are_missing_or_wrong_are_named_in_one_line_and_their_code_is_not_run(
    name, path, message, tmp_path
):
    torch.save(Code(tmp_path / "proof"), tmp_path / "code.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("<html>not found</html>")
    if path == "blip":
        transformers.BlipVisionModel(
            transformers.BlipVisionConfig(**BLIP_SMALL[0])
        ).save_pretrained(with_tokenizer(tmp_path / "blip"))
    with pytest.raises(ValueError, match=message) as e:
        one_reward(name, f"clipscore={TINY}/clip", *([f"{name}={tmp_path / path}"] if path else []))
    assert "\n" not in str(e.value) and not (tmp_path / "proof").exists()


# ---------------------------------------------------------------------------------------------- OCR, with its real weights
@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("rapidocr"), pytest.importorskip("onnxruntime")
    return one_reward("ocr")


def written(text, size, fill="black", paper="white", font=None):
    """A picture with text in the middle. font: a file among the system's DejaVu fonts, None for Pillow's own, a number for OpenCV's."""
    from PIL import ImageDraw, ImageFont

    picture = Image.new("RGB", (512, 512), paper)
    if isinstance(font, int):
        import cv2

        array = np.array(picture)
        for i, line in enumerate(text.split("\n")):
            cv2.putText(
                array,
                line,
                (60, 220 + 2 * i * size),
                font,
                size / 22,
                Image.new("RGB", (1, 1), fill).getpixel((0, 0)),
                2,
                cv2.LINE_AA,
            )
        return tensor_of(array)
    if font and not Path("/usr/share/fonts/truetype/dejavu", font).exists():
        pytest.skip(f"{font} is not on this machine")
    font = ImageFont.truetype(font, size) if font else ImageFont.load_default(size)
    ImageDraw.Draw(picture).multiline_text(
        (256, 256), text, fill, font, anchor="mm", align="center"
    )
    return tensor_of(picture)


@pytest.mark.parametrize(
    "font, size",
    [
        (None, 30),
        (2, 44),
        (3, 36),
        ("DejaVuSans-Bold.ttf", 24),
        ("DejaVuSerif.ttf", 72),
        ("DejaVuSansMono-Oblique.ttf", 40),
    ],
)
def test_ocr_reads_rendered_text(ocr, font, size):
    words = "Google\nToronto" if size > 40 else "Hello World\nfrom Google"
    assert (
        ocr(written(words, size, "white", "navy", font), [f'a sign with "{words}" on it'], [{}])
        > 0.9
    )


def test_wrong_text_scores_low_and_none_scores_0(ocr):
    images, blank = (
        written("Hello World", 60).expand(2, -1, -1, -1),
        torch.full((1, 3, 512, 512), 0.7),
    )
    wrong = ocr(
        torch.cat([images, blank]),
        [
            'a "zebra crossing" sign',
            "a storefront with 'Google Brain Toronto' written on it",
            'an "open" sign',
        ],
        [{}] * 3,
    )
    assert wrong[:2].max() < 0.4 and wrong[2] == 0


def test_the_ocr_score_is_one_minus_edit_distance_over_length(ocr):
    image = written("Hello", 80)
    for text, expected in (
        ("h el LO", 1),
        ("Hallo", 0.8),
        ("Help", 0.5),
        ("ell", 1),
        ("Hello you", 5 / 8),
    ):  # hello -> help: 2 changes in 4 letters
        assert ocr(image, [f'the word "{text}"'], [{}]).item() == pytest.approx(expected)
    for prompt, text in (
        ("a 'b c' d", "b c"),
        ('"x" and "y"', "x"),
        ("the cat's 'hat'", "hat"),
        ("it's a dog's life", None),
        ("plain", None),
    ):
        assert rewards.quoted(prompt) == text
    with pytest.raises(ValueError, match=r"^line 7 \('a cat'\): no text in quotes"):
        ocr.check(['a "b"', "a cat"], [{"line": 6}, {"line": 7}])
