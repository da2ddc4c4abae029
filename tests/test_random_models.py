"""tools/random_models.py: the true sizes without memory, and what is written with a hundredth of them."""

import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from safetensors import safe_open

import backbones
import lora
import rewards
from helpers import CPU, tiny_base
from small_rewards import CLIP_SMALL
from tools import bench, random_models

FAMILIES = {
    "sd35m": (backbones.StableDiffusion3, diffusers.SD3Transformer2DModel),
    "flux1": (backbones.Flux1, diffusers.FluxTransformer2DModel),
    "klein4b": (backbones.Klein, diffusers.Flux2Transformer2DModel),
    "klein9b": (backbones.Klein, diffusers.Flux2Transformer2DModel),
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def transformer(name):
    """The transformer of true size, which takes no memory."""
    _, module = FAMILIES[name]
    with torch.device("meta"):
        return module(**getattr(random_models, name.upper()))


# ---- true sizes
@pytest.mark.parametrize(
    "name, size, adapted",
    [
        ("sd35m", 2_243_171_520 + 384**2 * 1536, 24 * 8 - 1),  # and a table of places
        ("flux1", 11_901_408_320, 19 * 8 + 38 * 3),
        ("klein4b", 3_875_544_576, 5 * 8 + 20 * 2),
        ("klein9b", 9_078_581_248, 8 * 8 + 24 * 2),
    ],
)
def test_the_transformers_have_the_published_size_and_matrices_to_adapt(name, size, adapted):
    model = transformer(name)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == size
    lora.add_adapter(model, "generator", 4, 8, 0)
    assert len(lora.adapter(model, "generator")) == 2 * adapted


def test_the_text_encoders_have_the_published_sizes():
    tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=1)
    clip_l = random_models.clip_text(random_models.CLIP_L, tokenizer)
    clip_g = random_models.clip_text(random_models.CLIP_G, tokenizer)
    with torch.device("meta"):
        t5 = transformers.T5EncoderModel(transformers.T5Config(**random_models.T5_XXL))
        assert parameters(t5) == 4_762_310_656
        assert parameters(transformers.CLIPTextModel(clip_l)) == 123_060_480
        assert parameters(transformers.CLIPTextModelWithProjection(clip_g)) == 694_659_840
        for sizes, size in (
            (random_models.QWEN3_4B, 4_022_468_096),
            (random_models.QWEN3_8B, 8_190_735_360),
        ):
            qwen = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
            assert parameters(qwen) == size


def test_the_vaes_have_the_published_sizes():
    with torch.device("meta"):
        assert parameters(diffusers.AutoencoderKL(**random_models.VAE_16)) == 83_819_683
        assert parameters(diffusers.AutoencoderKLFlux2(**random_models.VAE_32)) == 84_046_115


def test_what_does_not_show_in_the_size_is_as_in_the_first_model_of_the_family():
    """diffusers' defaults are FLUX.1's and FLUX.2's: what differs from them is said here."""
    smaller = {
        "num_layers", "num_single_layers", "num_attention_heads", "joint_attention_dim", "guidance_embeds"
    }  # fmt: skip
    for module, sizes, differs in (
        (diffusers.FluxTransformer2DModel, random_models.FLUX1, {"guidance_embeds"}),
        (diffusers.Flux2Transformer2DModel, random_models.KLEIN4B, smaller),
        (diffusers.Flux2Transformer2DModel, random_models.KLEIN9B, smaller),
        (diffusers.AutoencoderKLFlux2, random_models.VAE_32, set()),
    ):
        defaults = inspect.signature(module.__init__).parameters
        for name in sizes.keys() - differs:
            assert sizes[name] == defaults[name].default, name


@pytest.mark.parametrize(
    "name, width, blocks, matrices", [("flux1", 3072, 57, 12), ("klein4b", 3072, 25, 13)]
)
def test_the_operations_of_a_picture_of_512_px_in_closed_form(name, width, blocks, matrices):
    """A token passes 12 matrices of width x width a block, 13 where the feed-forward part is gated.

    In a double block queries, keys, values and output are four, the feed-forward part two of four
    times the width or three of three times; a single block has as many. The rest is below 1 %.
    """
    limit = SimpleNamespace(model_max_length=512)
    pipe = SimpleNamespace(
        transformer=transformer(name), vae_scale_factor=8, tokenizer=limit, tokenizer_2=limit
    )
    pipe.tokenizer_max_length = 77
    tokens = 32 * 32 + 512
    products = 2 * tokens * matrices * width**2
    attention = 2 * 2 * tokens**2 * width
    family, _ = FAMILIES[name]
    counted = bench.forward_flops(family(pipe, 512))
    assert 1 < counted / (blocks * (products + attention)) < 1.01


# ---- what is written
def shrunk(monkeypatch):
    """The same architectures, but narrow and of few blocks; how many tells them apart."""

    def change(name, **smaller):
        sizes = {**getattr(random_models, name), **smaller}
        monkeypatch.setattr(random_models, name, sizes)

    heads = dict(num_attention_heads=2)
    text = dict(joint_attention_dim=128, pooled_projection_dim=64)
    change("SD35M", num_layers=2, dual_attention_layers=(0,), caption_projection_dim=128, **heads)
    change("SD35M", joint_attention_dim=128, pooled_projection_dim=128, pos_embed_max_size=32)
    change("FLUX1", num_layers=1, num_single_layers=2, **heads, **text)
    change("KLEIN4B", num_layers=2, num_single_layers=1, joint_attention_dim=3 * 32, **heads)
    change("KLEIN9B", num_layers=3, num_single_layers=1, joint_attention_dim=3 * 48, **heads)
    change("CLIP_L", hidden_size=64, num_hidden_layers=1)
    change("CLIP_G", hidden_size=64, num_hidden_layers=2)
    change("T5_XXL", d_model=128, d_kv=32, d_ff=64, num_layers=1, num_heads=2)
    heads["num_key_value_heads"] = 1
    change("QWEN3_4B", hidden_size=32, intermediate_size=64, head_dim=16, **heads)
    change("QWEN3_8B", hidden_size=48, intermediate_size=64, head_dim=16, **heads)
    for name in ("VAE_16", "VAE_32"):
        change(name, block_out_channels=(32,) * 4, layers_per_block=1)


@pytest.fixture(params=FAMILIES)
def written(request, tmp_path, monkeypatch):
    """(name, the base model that was written, the directory)"""
    shrunk(monkeypatch)
    random_models.write(request.param, str(tmp_path), CPU)
    return request.param, tiny_base(tmp_path), tmp_path


BLOCKS = {"sd35m": (2, 0), "flux1": (1, 2), "klein4b": (2, 1), "klein9b": (3, 1)}
WIDTHS = {
    "sd35m": [(77 + 128, 128), (128,)],
    "flux1": [(512, 128), (64,)],
    "klein4b": [(512, 3 * 32)],
    "klein9b": [(512, 3 * 48)],
}
SCALES = {"sd35m": (1.5305, 0.0609), "flux1": (0.3611, 0.1159)}
SHIFTS = {"sd35m": 3.0, "flux1": 1.878, "klein4b": 7.619, "klein9b": 7.619}


def test_a_base_model_loads_and_draws(written):
    name, base, _ = written
    assert (type(base.backbone), type(base.transformer)) == FAMILIES[name]
    single = getattr(base.transformer, "single_transformer_blocks", [])
    assert (len(base.transformer.transformer_blocks), len(single)) == BLOCKS[name]
    text = base.encode(["a red circle"])
    assert [tensor.shape[1:] for tensor in text] == WIDTHS[name]
    x = torch.randn(1, *base.latent_shape)
    velocity = base.velocity([], text, cfg=2.0)(x, 0.5)
    assert velocity.isfinite().all()
    assert base.decode(velocity).shape == (1, 3, 32, 32)


def test_scale_of_the_latents_and_time_shift_are_the_families(written):
    name, base, _ = written
    config = base.pipe.vae.config
    if name in SCALES:
        assert (config.scaling_factor, config.shift_factor) == SCALES[name]
    base.backbone.tokens = 32 * 32  # a picture of 512 px
    assert base.backbone.shift(4) == pytest.approx(SHIFTS[name], abs=1e-3)


def test_the_files_are_in_bf16(written):
    *_, folder = written
    files = [*folder.rglob("*.safetensors")]
    assert files
    for file in files:
        with safe_open(file, "pt") as weights:
            names = [name for name in weights.keys() if name.endswith(".weight")]  # noqa: SIM118
            assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert torch.get_default_dtype() == torch.float32


def test_open_clips_names_are_those_that_the_reward_reads():
    _, small = CLIP_SMALL["hpsv2"]
    config = dict(projection_dim=48, **small)
    model = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    state = random_models.in_open_clips_names(model.state_dict())
    assert "visual.transformer.resblocks.1.attn.in_proj_weight" in state
    back = rewards.clip_from_open_clip(state, config, torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor), name


def test_the_four_default_rewards_load_from_what_is_written(tmp_path, monkeypatch):
    _, small = CLIP_SMALL["hpsv2"]
    text = {**small["text_config"], "vocab_size": 49408}
    config = dict(projection_dim=48, vision_config=small["vision_config"], text_config=text)
    for place, name in (
        (random_models, "VIT_L14"),
        (random_models, "VIT_H14"),
        (rewards, "VIT_H14"),
    ):
        monkeypatch.setattr(place, name, config)
    random_models.write("rewards", str(tmp_path), CPU)
    paths = [
        f"clipscore={tmp_path}/clip_l",
        f"pickscore={tmp_path}/pickscore",
        f"hpsv2={tmp_path}/hpsv2",
        f"geneval_soft={tmp_path}/mask2former",
    ]
    images, prompts = torch.rand(1, 3, 64, 64), ["a photo of a cat"]
    metadata = [{"include": [{"class": "cat", "count": 1}]}]
    weights = "clipscore:1,pickscore:1,hpsv2:1,geneval_soft:1"
    monkeypatch.setattr(rewards, "CLIP_L", f"{tmp_path}/clip_l")
    for reward in rewards.build(weights, CPU, paths):
        assert reward(images, prompts, metadata).isfinite().all()
