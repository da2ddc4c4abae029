"""Models of true size and architecture with random weights: to measure without a download.

Speed and memory do not depend on the weights. `python -m tools.make_tiny --random sd35m DIR` writes
the pipeline of SD3.5-M into DIR, in bf16; flux1, klein4b and klein9b are FLUX.1-dev and the two
FLUX.2-klein. `--random rewards DIR` writes the models of four rewards. The tokenizers know few words
(tools/tiny_tokenizers.py), their limits are the true ones.
"""

import contextlib
import os

import diffusers  # loads its classes where they are first named, as transformers does
import torch
import transformers

from prompts import COCO
from rewards import VIT_H14
from tiny import captions
from tools.tiny_tokenizers import qwen_tokenizer, tokenizers

# ---- sizes: of transformers as their repositories' config.json says them
SD35M = dict(
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=24,
    attention_head_dim=64,
    num_attention_heads=24,
    joint_attention_dim=4096,
    caption_projection_dim=1536,
    pooled_projection_dim=2048,
    pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)),
    qk_norm="rms_norm",
)
FLUX1 = dict(
    patch_size=1,
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
    axes_dims_rope=(16, 56, 56),
)
KLEIN4B = dict(
    patch_size=1,
    in_channels=128,
    num_layers=5,
    num_single_layers=20,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=3 * 2560,  # three hidden states of the text encoder
    timestep_guidance_channels=256,
    mlp_ratio=3.0,
    axes_dims_rope=(32, 32, 32, 32),
    rope_theta=2000,
    guidance_embeds=False,
)
KLEIN9B = {
    **KLEIN4B,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 3 * 4096,
}
# of their text encoders
CLIP_L = dict(hidden_size=768, num_hidden_layers=12, hidden_act="quick_gelu")
CLIP_G = dict(hidden_size=1280, num_hidden_layers=32, hidden_act="gelu")
T5_XXL = dict(
    vocab_size=32128,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
    pad_token_id=0,
    eos_token_id=1,
)
QWEN3_4B = dict(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rope_parameters=dict(rope_type="default", rope_theta=1e6),
    tie_word_embeddings=True,
)
QWEN3_8B = {
    **QWEN3_4B,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}
# and of their VAEs: SD3's and FLUX.1's differ in scale and shift alone
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=1024,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
VAE_16 = dict(**VAE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
VAE_32 = dict(**VAE, latent_channels=32, use_quant_conv=True, use_post_quant_conv=True)
# The shift that counts is the dynamic one.
FLUX_SCHEDULER = dict(
    use_dynamic_shifting=True,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
    shift=3.0,
)
CLIP_LENGTH = 77
TEXT_LENGTH = 512  # T5's and Qwen's


# ---- base models
@contextlib.contextmanager
def in_bf16(device):
    """What is built here is built on the device and in bf16: nothing is held twice."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def sd35m(out_dir, device):
    """SD3.5-M's pipeline, 16 GB: transformer of 2.2 B parameters, VAE, CLIP-L, CLIP-G, T5-XXL."""
    clip, t5 = tokenizers(captions(), CLIP_LENGTH, TEXT_LENGTH)
    with_projection = transformers.CLIPTextModelWithProjection
    with in_bf16(device):
        transformer = diffusers.SD3Transformer2DModel(**SD35M)
        vae = diffusers.AutoencoderKL(**VAE_16, scaling_factor=1.5305, shift_factor=0.0609)
        text_encoder_3 = transformers.T5EncoderModel(transformers.T5Config(**T5_XXL))
        text_encoder = with_projection(clip_text(CLIP_L, clip))
        text_encoder_2 = with_projection(clip_text(CLIP_G, clip))
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip,
        text_encoder_2=text_encoder_2,
        tokenizer_2=clip,
        text_encoder_3=text_encoder_3,
        tokenizer_3=t5,
    )
    pipe.save_pretrained(out_dir)


def flux1(out_dir, device):
    """FLUX.1-dev's pipeline, 34 GB: transformer of 11.9 B parameters, VAE, CLIP-L, T5-XXL."""
    clip, t5 = tokenizers(captions(), CLIP_LENGTH, TEXT_LENGTH)
    with in_bf16(device):
        transformer = diffusers.FluxTransformer2DModel(**FLUX1)
        vae = diffusers.AutoencoderKL(**VAE_16, scaling_factor=0.3611, shift_factor=0.1159)
        text_encoder = transformers.CLIPTextModel(clip_text(CLIP_L, clip))
        text_encoder_2 = transformers.T5EncoderModel(transformers.T5Config(**T5_XXL))
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5,
    )
    pipe.save_pretrained(out_dir)


def klein4b(out_dir, device):
    """FLUX.2-klein-base-4B's pipeline, 16 GB: transformer of 3.9 B parameters, VAE, Qwen3-4B."""
    klein(out_dir, device, KLEIN4B, QWEN3_4B)


def klein9b(out_dir, device):
    """FLUX.2-klein-base-9B's pipeline, 35 GB: transformer of 9.1 B parameters, VAE, Qwen3-8B."""
    klein(out_dir, device, KLEIN9B, QWEN3_8B)


def klein(out_dir, device, transformer_sizes, qwen_sizes):
    """A pipeline of FLUX.2-klein."""
    with in_bf16(device):
        transformer = diffusers.Flux2Transformer2DModel(**transformer_sizes)
        vae = diffusers.AutoencoderKLFlux2(**VAE_32)
        text_encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**qwen_sizes))
    pipe = diffusers.Flux2KleinPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=qwen_tokenizer(TEXT_LENGTH),
    )
    pipe.save_pretrained(out_dir)


def clip_text(sizes, tokenizer):
    """The configuration of a CLIP text encoder of a published size."""
    width = sizes["hidden_size"]
    return transformers.CLIPTextConfig(
        **sizes,
        vocab_size=49408,
        intermediate_size=4 * width,
        num_attention_heads=width // 64,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


# ---- rewards
VIT_L14 = dict(
    projection_dim=768,
    vision_config=dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
    ),
    text_config=dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    ),
)
# transformers' name of a part of a CLIP -> open_clip's, in which HPS v2 was published.
OPEN_CLIP_NAMES = (
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.embeddings.", ""),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.embeddings.", "visual."),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("visual_projection.weight", "visual.proj"),
    (".layer_norm", ".ln_"),
    (".self_attn.", ".attn."),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


def reward_models(out_dir, device):
    """Those of clipscore, pickscore, hpsv2 and geneval_soft: two kinds of CLIP, and Mask2Former."""
    tokenizer, _ = tokenizers(captions(), CLIP_LENGTH, TEXT_LENGTH)
    for name, parts in (("clip_l", VIT_L14), ("pickscore", VIT_H14)):
        with torch.device(device):
            model = transformers.CLIPModel(clip_config(parts, tokenizer))
        model.save_pretrained(os.path.join(out_dir, name))
        tokenizer.save_pretrained(os.path.join(out_dir, name))
    folder = os.path.join(out_dir, "hpsv2")
    tokenizer.save_pretrained(folder)
    state = in_open_clips_names(model.state_dict())
    torch.save({"state_dict": state}, os.path.join(folder, "HPS_v2.1_compressed.pt"))
    backbone = transformers.SwinConfig(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=len(COCO))
    detector = transformers.Mask2FormerForUniversalSegmentation(config)
    detector.save_pretrained(os.path.join(out_dir, "mask2former"))


def clip_config(parts, tokenizer):
    """The configuration of a CLIP whose text ends as this tokenizer says."""
    text = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **parts["text_config"],
    }
    return transformers.CLIPConfig(**{**parts, "text_config": text})


def in_open_clips_names(state):
    """The state dict of transformers' CLIPModel as open_clip would have saved it."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, other in OPEN_CLIP_NAMES:
            name = name.replace(theirs, other)
        transposed = name in ("text_projection", "visual.proj")
        renamed[name] = tensor.T.contiguous() if transposed else tensor
    for name in [name for name in renamed if ".q_proj." in name]:
        parts = [renamed.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
        renamed[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return renamed


# ---- what --random knows
WRITERS = {
    "sd35m": sd35m,
    "flux1": flux1,
    "klein4b": klein4b,
    "klein9b": klein9b,
    "rewards": reward_models,
}


def write(name, out_dir, device):
    """Write the models of this name."""
    torch.manual_seed(0)
    WRITERS[name](out_dir, device)
