"""Rewards of pictures: the checker, pixels, gradients, micro-batches, wrong weights, OCR."""

import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont
from torch.utils._python_dispatch import TorchDispatchMode

import rewards
import tiny
from gaussian import close
from helpers import CPU, TINY, Code, on_a_gpu, tiny_base, watch_attention
from model import graphed
from small_rewards import (
    BLIP_SMALL,
    CLIP_SMALL,
    calls_of,
    head_layers,
    imagereward_state,
    one_reward,
    rand,
    shake,
    with_tokenizer,
)

TINY_CLIP = f"clipscore={TINY}/clip"


# ---- the tiny checker ----------------------------------------------------------------------------
def things_of(row):
    """The objects that a caption asks for, with their numbers and colours, in any order."""
    things = [(entry["class"], entry["count"], entry.get("color")) for entry in row["include"]]
    return Counter(things)


def with_opposite_relation(prompt):
    """The prompt with its relation turned round, or None where it has no relation."""
    opposites = ("right of", "left of", "below", "above")
    for relation, opposite in zip(tiny.RELATIONS, opposites):
        if relation in prompt:
            return prompt.replace(relation, opposite)
    return None


def contradictions(row):
    """Captions of the same category that no picture of `row` satisfies.

    They have other objects, numbers or colours; the last one has the opposite relation.
    """
    same_category = [other for other in tiny.captions() if other["tag"] == row["tag"]]
    other_things = [other for other in same_category if things_of(other) != things_of(row)]
    turned = with_opposite_relation(row["prompt"])
    turned_round = [other for other in tiny.captions() if other["prompt"] == turned]
    return other_things + turned_round


@torch.no_grad()
def through_the_vae(base, pictures):
    """Pictures [B,3,H,W] in [0,1], encoded with the VAE's noise and decoded."""
    vae = base.pipe.vae
    latents = vae.encode(pictures * 2 - 1).latent_dist.sample()
    return base.decode((latents - vae.config.shift_factor) * vae.config.scaling_factor)


def test_the_checker_accepts_true_pictures_after_the_vae_and_rejects_captions_that_contradict_them():
    rows = tiny.captions() * 3
    base = tiny_base()
    rng = random.Random(0)
    torch.manual_seed(0)
    scenes = tiny.scenes(rows, torch.arange(len(rows)))
    drawn = through_the_vae(base, tiny.render(*scenes))
    (checker,) = rewards.build("checker", CPU)

    def accepted(captions):
        prompts = [caption["prompt"] for caption in captions]
        return checker(drawn, prompts, captions).mean()

    some_contradiction = [rng.choice(contradictions(row)) for row in rows]
    last_contradiction = [contradictions(row)[-1] for row in rows]
    assert accepted(rows) >= 0.98
    assert accepted(some_contradiction) <= 0.05
    assert accepted(last_contradiction) <= 0.05


# ---- gradients by finite differences -------------------------------------------------------------
def directions_of(gradient, seeded_rng):
    """The gradient's own direction and two random ones."""
    random_ones = torch.randn(2, *gradient.shape, generator=seeded_rng, dtype=torch.float64)
    return (gradient, *random_ones)


@torch.no_grad()
def slope_error(function, x, gradient, direction):
    """|(f(x + h d) - f(x - h d)) / 2h - gradient . d| with h = 1e-4 and d of length 1.

    The values of f are added up.
    """
    step = 1e-4 * direction / direction.norm()
    difference = (function(x + step) - function(x - step)).sum() / 2
    predicted = (gradient * step).sum()
    return abs(difference - predicted) / 1e-4


def test_the_gradient_of_clipscore_is_that_of_finite_differences():
    """In float64 and three directions; pictures are resized and cropped on the way."""
    seeded_rng = torch.Generator().manual_seed(0)
    (score,) = rewards.build("clipscore:1", CPU, [TINY_CLIP], torch.float64)

    def total(images):
        return score(images, ["a red circle", "two squares"], [{}, {}]).sum()

    noise = torch.rand(2, 3, 40, 48, generator=seeded_rng, dtype=torch.float64)
    images = (noise * 0.6 + 0.2).requires_grad_()
    (gradient,) = torch.autograd.grad(total(images), images)
    for direction in directions_of(gradient, seeded_rng):
        error = slope_error(total, images, gradient, direction)
        assert error < 1e-5 * gradient.norm()


# ---- pre-processing ------------------------------------------------------------------------------
# One step of a byte, in pixels that are normalised.
ONE_BYTE = 1 / 255 / min(rewards.CLIP_STD)


@pytest.mark.parametrize(
    "height, width",
    [
        (17, 23),
        (32, 32),
        (33, 47),
        (101, 32),
        (257, 63),
    ],
)
def test_clip_pixels_takes_pictures_of_any_size(height, width):
    pixels = rewards.clip_pixels(torch.rand(1, 3, height, width), 32)
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.isfinite(pixels).all()
    grey = torch.full((1, 3, height, width), 0.5)
    channels = rewards.clip_pixels(grey, 32)[0].flatten(1)
    mean = torch.tensor(rewards.CLIP_MEAN)
    std = torch.tensor(rewards.CLIP_STD)
    # A constant stays that constant.
    assert torch.allclose(channels, ((0.5 - mean) / std)[:, None], atol=1e-5)


@pytest.mark.parametrize("side", [47, 224, 301])
def test_clip_pixels_is_clips_own_preprocessing(side):
    """transformers' CLIP processor works on bytes.

    It may be off by the rounding of one, 1/255 before the division by std.
    """
    x = torch.linspace(0, 6, side)
    y = x[:, None]
    red = x.sin() * y.cos()
    green = x.cos() * y.sin()
    blue = (x + y).sin()
    waves = torch.stack([red, green, blue])  # in [-1,1]
    image = ((waves / 2 + 0.5) * 255).round()
    picture = Image.fromarray(image.byte().permute(1, 2, 0).numpy())
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
    )
    theirs = processor(picture, return_tensors="pt").pixel_values
    ours = rewards.clip_pixels(image[None] / 255, 64)
    assert (ours - theirs).abs().max() < ONE_BYTE


@pytest.fixture(scope="module")
def photographs():
    data = pytest.importorskip("skimage.data")
    arrays = (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())
    return [Image.fromarray(array) for array in arrays]


def tensor_of(picture):
    """PIL's picture, or an array of bytes -> [1,3,H,W] in [0,1]"""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


def assert_only_rounded(ours, theirs):
    """Normalised pixels differ by no more than PIL's rounding.

    PIL rounds to bytes (and saturates) after each of two passes. The sum of two roundings is a
    third of a byte's step off on average and a whole one at most: .005 and .015 of a normalised
    pixel.
    Saturation adds something at a few sharp edges.
    """
    difference = (ours - theirs).abs().flatten()
    assert difference.mean() < ONE_BYTE / 3
    assert difference[::5].quantile(0.99) < ONE_BYTE


@pytest.mark.parametrize(
    "size",
    [
        (512, 512),
        (333, 501),
        (640, 427),
        (100, 150),
        (224, 224),
    ],
)
def test_clip_pixels_are_those_of_clips_published_processor_on_photographs(photographs, size):
    processor = transformers.CLIPImageProcessor()
    for photograph in photographs:
        picture = photograph.resize(size[::-1])
        theirs = processor(picture, return_tensors="pt").pixel_values
        ours = rewards.clip_pixels(tensor_of(picture), 224)
        assert_only_rounded(ours, theirs)


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (20, 90), (28, 64)])
def test_resizing_and_its_gradient_are_pytorchs_own(size):
    """To 28 x 64: smaller, larger, and one side as it is."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *size, generator=rng, dtype=torch.float64).requires_grad_()
    ours = rewards.resize(images, (28, 64))
    theirs = F.interpolate(images, (28, 64), mode="bicubic", antialias=True, align_corners=False)
    assert (ours - theirs.clamp(0, 1)).abs().max() < 1e-12
    slope = torch.randn(ours.shape, generator=rng, dtype=torch.float64)
    (our_gradient,) = torch.autograd.grad(ours, images, slope)
    (their_gradient,) = torch.autograd.grad(theirs.clamp(0, 1), images, slope)
    assert (our_gradient - their_gradient).abs().max() < 1e-12


def on_a_black_square(picture, side):
    """The longer side to `side` by PIL's bicubic, in the middle of a black square."""
    scale = side / max(picture.size)
    small_size = [round(edge * scale) for edge in picture.size]
    small = picture.resize(small_size, Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side))
    corner = ((side - small.width) // 2, (side - small.height) // 2)
    square.paste(small, corner)
    return square


@pytest.mark.parametrize(
    "size",
    [
        (512, 512),
        (333, 501),
        (640, 427),
        (224, 224),
    ],
)
def test_padded_pixels_are_pils_bicubic_on_a_black_square_on_photographs(photographs, size):
    for photograph in photographs:
        picture = photograph.resize(size[::-1])
        theirs = rewards.normalise(tensor_of(on_a_black_square(picture, 224)))
        ours = rewards.padded_pixels(tensor_of(picture), 224)
        assert_only_rounded(ours, theirs)


def test_the_rounding_of_the_processor_moves_the_score_of_a_random_vit_l_by_less_than_a_thousandth(
    photographs, tmp_path
):
    """ViT-L/14's vision tower at its true width and patch size, on photographs at 512.

    It has six blocks: 24 take a minute.
    """
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
    reward = one_reward("clipscore", f"clipscore={tmp_path}")
    processor = transformers.CLIPImageProcessor()
    vit = rewards.clip(str(tmp_path), "cpu", torch.float32)
    model = vit.model

    @torch.no_grad()
    def score_by_hand(picture):
        pixels = processor(picture, return_tensors="pt")
        pooled = model.vision_model(**pixels).pooler_output
        feature = F.normalize(model.visual_projection(pooled), dim=-1)
        cosine = (feature * vit.text_features(["a circle"])).sum()
        return model.logit_scale.exp() / 100 * cosine

    for photograph in photographs[:2]:
        picture = photograph.resize((512, 512))
        with torch.no_grad():
            ours = reward(tensor_of(picture), ["a circle"], [{}])
        assert abs(ours - score_by_hand(picture)) < 1e-3


# ---- gradients and micro-batches of all that have a gradient -------------------------------------
@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    """A small random model for each differentiable reward -> their --reward_path flags."""
    folder = tmp_path_factory.mktemp("small")
    for name, seed in (("clipscore", 0), ("pickscore", 1)):
        config = transformers.CLIPConfig(projection_dim=48, **CLIP_SMALL["hpsv2"][1])
        torch.manual_seed(seed)  # the same models whichever tests have run before
        model = shake(transformers.CLIPModel(config), seed)
        model.save_pretrained(with_tokenizer(folder / name))
    head = {}
    for number, inputs, outputs in head_layers(48):
        layer = shake(torch.nn.Linear(inputs, outputs), number)
        for name, tensor in layer.state_dict().items():
            head[f"layers.{number}.{name}"] = tensor
    torch.save(head, folder / "aesthetic.pth")
    torch.save(imagereward_state(), with_tokenizer(folder / "imagereward") / "ImageReward.pt")
    return [
        f"clipscore={folder}/clipscore",
        f"pickscore={folder}/pickscore",
        f"aesthetic={folder}/aesthetic.pth",
        f"imagereward={folder}/imagereward",
    ]


DIFFERENTIABLE = ("clipscore", "pickscore", "aesthetic", "imagereward")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_finite_differences_through_resizing_and_cropping(
    name, small_models, monkeypatch
):
    """Central differences in float64 along the gradient and two other directions.

    Their error is h^2, 1e-8, times a third derivative.
    """
    monkeypatch.setattr(rewards, "BLIP_L", BLIP_SMALL)
    reward = one_reward(name, *small_models, dtype=torch.float64)
    assert reward.differentiable

    def score(images):
        return reward(images, ["a red circle", "two squares"], [{}, {}])

    layouts = watch_attention(monkeypatch)
    images = (rand(2, 3, 71, 90).double() * 0.6 + 0.2).requires_grad_()
    (gradient,) = torch.autograd.grad(score(images).sum(), images)
    # cuDNN needs one layout (common.NOT_CUDNN); imagereward's attention is written out.
    assert bool(layouts) == (name != "imagereward")
    assert all(len(seen) == 1 for seen in layouts.values())
    crop = round(90 - 90 * 71 / 90) // 2 - 4  # columns that the centre crop throws away
    kept = gradient[..., crop + 4 : -crop - 4]
    assert gradient.isfinite().all()
    assert (kept.flatten(1).norm(dim=1) > 0).all()
    assert gradient[..., :crop].abs().max() == 0
    seeded_rng = torch.Generator().manual_seed(1)
    for direction in directions_of(gradient, seeded_rng):
        error = slope_error(score, images, gradient, direction)
        assert error < 1e-5 * gradient.norm()


def test_the_gradient_of_hpsv2s_padding_is_that_of_finite_differences():
    images = (rand(1, 3, 30, 50).double() * 0.6 + 0.2).requires_grad_()
    weight = rand(3, 28, 28, seed=1).double()

    def total(images):
        return (rewards.padded_pixels(images, 28) * weight).square().sum()

    (gradient,) = torch.autograd.grad(total(images), images)
    error = slope_error(total, images, gradient, direction=gradient)
    assert error < 1e-5 * gradient.norm()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_micro_batches_and_bf16_change_a_score_and_its_gradient_by_their_rounding_alone(
    name, small_models, monkeypatch
):
    monkeypatch.setattr(rewards, "BLIP_L", BLIP_SMALL)
    images = rand(5, 3, 60, 60).requires_grad_()
    prompts = ["a red circle", "two squares", "a circle", "a circle", "a square"]
    metadata = [{}] * 5

    def score_and_gradient(**options):
        reward = one_reward(name, *small_models, **options)
        score = reward(images, prompts, metadata)
        (gradient,) = torch.autograd.grad(score.sum(), images)
        return score.detach(), gradient

    score, gradient = score_and_gradient()
    score_in_twos, gradient_in_twos = score_and_gradient(batch=2)
    score_in_bf16, _ = score_and_gradient(dtype=torch.bfloat16)
    close(score_in_twos, score, 1e-5)
    close(gradient_in_twos, gradient, 1e-4 * gradient.abs().max().item())
    assert score.dtype == score_in_bf16.dtype == torch.float32
    rounding = (score_in_bf16 - score).abs().max()
    assert 0 < rounding < 0.05 * score.abs().max()  # 2^-8 a step, a few dozen steps
    reward_in_threes = one_reward(name, *small_models, batch=3)
    with torch.no_grad():
        score_in_threes = reward_in_threes(images, prompts, metadata)
    close(score_in_threes, score, 1e-5)


def test_each_prompt_is_read_once_and_models_can_be_moved(small_models):
    reward = one_reward("pickscore", *small_models)
    model = reward.models[0]
    readings, hook = calls_of(model.text_model)
    for prompts in (["one", "two", "one"], ["two", "one", "one"]):
        reward(rand(3, 3, 56, 56), prompts, [{}] * 3)
    hook.remove()
    assert len(readings) == 2  # of six
    rewards.move([reward, reward], "meta")  # stands for another device
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    rewards.clip.cache_clear()


def test_a_prompt_is_padded_behind_its_last_token_whatever_the_tokenizer_says(monkeypatch):
    """Nothing hides the padding, and before the prompt it would be read."""
    vit = rewards.clip(str(TINY / "clip"), "cpu", torch.float32)
    feature = vit.read("a red circle")
    monkeypatch.setattr(vit.tokenizer, "padding_side", "left")
    assert torch.equal(vit.read("a red circle"), feature)


class Looks(TorchDispatchMode):
    """With it, operations that hand a value to Python, for which a GPU has to finish, are noted."""

    NAMES = {"aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal"}

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation.overloadpacket)
        if name in self.NAMES:
            self.noted.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_after_the_first_pictures_a_score_waits_for_no_value(name, small_models, monkeypatch):
    """Python then prepares scores and gradient of an epoch while the GPU still draws its pictures."""
    monkeypatch.setattr(rewards, "BLIP_L", BLIP_SMALL)
    reward = one_reward(name, *small_models)
    images = rand(2, 3, 60, 40).requires_grad_()
    with Looks() as first:
        reward(images, ["a circle", "a square"], [{}] * 2).sum().backward()
    with Looks() as second:
        reward(images, ["a new one", "and another"], [{}] * 2).sum().backward()
    assert first.noted  # the first pictures are looked at: are they pictures at all?
    assert second.noted == []


@on_a_gpu
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_on_a_gpu_a_recorded_score_and_its_gradient_are_the_plain_ones(
    name, small_models, monkeypatch
):
    monkeypatch.setattr(rewards, "BLIP_L", BLIP_SMALL)
    device = torch.device("cuda")
    (reward,) = rewards.build(name, device, small_models)

    def score_pass(images, text):
        images = images.detach().requires_grad_()
        score = reward.look(images, text)
        (gradient,) = torch.autograd.grad(score.sum(), images)
        return score.detach(), gradient

    (recorded,) = graphed(True, device, score_pass)
    for seed, prompts in enumerate([["a circle"], ["two squares"], ["a red circle"], [""]]):
        images = rand(3, 3, 60, 40, seed=seed).to(device)
        text = reward.read(prompts * 3, [{}] * 3).to(device)
        score, gradient = score_pass(images, text)
        recorded_score, recorded_gradient = recorded(images, text)
        close(recorded_score, score, 1e-6)
        close(recorded_gradient, gradient, 1e-6 * gradient.abs().max().item())


@pytest.mark.parametrize("waits, devices", [(True, ["meta", "cpu"]), (False, [])])
def test_models_that_wait_on_the_cpu_go_back_there_after_an_error_too(waits, devices):
    moves = []
    model = SimpleNamespace(to=moves.append)
    reward = SimpleNamespace(models=[model])
    with pytest.raises(MemoryError), rewards.brought([reward], "meta", waits):
        assert moves == devices[:1]
        raise MemoryError
    assert moves == devices


# ---- what is refused -----------------------------------------------------------------------------
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
    message = (
        r"^reward clipscore: pictures must be \[B,3,H,W\] "
        r"with finite numbers in \[0,1\], got .*$"
    )
    with pytest.raises(ValueError, match=message) as error:
        one_reward("clipscore", TINY_CLIP)(images, ["a", "b"], [{}, {}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, path, message",
    [
        ("beauty", None, "unknown reward 'beauty'"),
        ("hpsv2", None, "download xswu/HPSv2 and give --reward_path hpsv2="),
        ("hpsv3", None, "its model is not given"),
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
    proof = tmp_path / "proof"
    torch.save(Code(proof), tmp_path / "code.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("<html>not found</html>")
    if path == "blip":
        config = transformers.BlipVisionConfig(**BLIP_SMALL[0])
        model = transformers.BlipVisionModel(config)
        model.save_pretrained(with_tokenizer(tmp_path / "blip"))
    paths = [TINY_CLIP]
    if path:
        paths.append(f"{name}={tmp_path / path}")
    with pytest.raises(ValueError, match=message) as error:
        one_reward(name, *paths)
    assert "\n" not in str(error.value)
    assert not proof.exists()


# ---- OCR, with its real weights ------------------------------------------------------------------
@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return one_reward("ocr")


def write_with_opencv(picture, text, size, fill, font):
    """The picture as an array, with text in a font of OpenCV's, which has a number."""
    import cv2

    array = np.array(picture)
    color = Image.new("RGB", (1, 1), fill).getpixel((0, 0))
    for i, line in enumerate(text.split("\n")):
        cv2.putText(
            img=array,
            text=line,
            org=(60, 220 + 2 * i * size),
            fontFace=font,
            fontScale=size / 22,
            color=color,
            thickness=2,
            lineType=cv2.LINE_AA,
        )
    return array


def font_of_pillow(file, size):
    """A font: a file among the system's DejaVu fonts, or None for Pillow's own."""
    if file is None:
        return ImageFont.load_default(size)
    if not Path("/usr/share/fonts/truetype/dejavu", file).exists():
        pytest.skip(f"{file} is not on this machine")
    return ImageFont.truetype(file, size)


def written(text, size, fill="black", paper="white", font=None):
    """A picture with text in the middle -> [1,3,512,512]

    font: a file among the system's DejaVu fonts, None for Pillow's own, a number for OpenCV's.
    """
    picture = Image.new("RGB", (512, 512), paper)
    if isinstance(font, int):
        return tensor_of(write_with_opencv(picture, text, size, fill, font))
    ImageDraw.Draw(picture).multiline_text(
        xy=(256, 256),
        text=text,
        fill=fill,
        font=font_of_pillow(font, size),
        anchor="mm",
        align="center",
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
    picture = written(words, size, fill="white", paper="navy", font=font)
    score = ocr(picture, [f'a sign with "{words}" on it'], [{}])
    assert score > 0.9


def test_wrong_text_scores_low_and_none_scores_0(ocr):
    two_with_text = written("Hello World", 60).expand(2, -1, -1, -1)
    blank = torch.full((1, 3, 512, 512), 0.7)
    prompts = [
        'a "zebra crossing" sign',
        "a storefront with 'Google Brain Toronto' written on it",
        'an "open" sign',
    ]
    scores = ocr(torch.cat([two_with_text, blank]), prompts, [{}] * 3)
    assert scores[:2].max() < 0.4
    assert scores[2] == 0


def test_the_ocr_score_is_one_minus_edit_distance_over_length(ocr):
    image = written("Hello", 80)
    for text, expected in (
        ("h el LO", 1),
        ("Hallo", 0.8),
        ("Help", 0.5),  # hello -> help: 2 changes in 4 letters
        ("ell", 1),
        ("Hello you", 5 / 8),
    ):
        score = ocr(image, [f'the word "{text}"'], [{}])
        assert score.item() == pytest.approx(expected)
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
