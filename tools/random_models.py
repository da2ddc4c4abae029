"""Models of true size and architecture with random weights: to measure without a download.

Speed and memory do not depend on the weights. `python -m tools.make_tiny --random sd35m DIR` writes
the pipeline of SD3.5-M into DIR, in bf16. `--random rewards DIR` writes the models of four rewards.
Their tokenizers are the tiny world's.
"""

import os

import diffusers  # loads its classes where they are first named, as transformers does
import torch
import transformers

from prompts import COCO
from rewards import VIT_H14


def sd35m(out_dir, device, tokenizer, tokenizer_3):
    """SD3.5-M's pipeline, 16 GB: transformer of 2.2 B parameters, VAE, CLIP-L, CLIP-G, T5-XXL."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        transformer = diffusers.SD3Transformer2DModel(
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
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            sample_size=1024,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        t5 = transformers.T5EncoderModel(
            transformers.T5Config(
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
        )
        clip_l = clip_text(tokenizer, 768, 12, "quick_gelu")
        clip_g = clip_text(tokenizer, 1280, 32, "gelu")
    torch.set_default_dtype(torch.float32)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip_l,
        tokenizer=tokenizer,
        text_encoder_2=clip_g,
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=tokenizer_3,
    )
    pipe.save_pretrained(out_dir)


def clip_text(tokenizer, width, layers, activation):
    """A CLIP text encoder of a published size."""
    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return transformers.CLIPTextModelWithProjection(config)


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


def reward_models(out_dir, device, tokenizer, tokenizer_3):
    """Those of clipscore, pickscore, hpsv2 and geneval_soft: two kinds of CLIP, and Mask2Former."""
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


WRITERS = {"sd35m": sd35m, "rewards": reward_models}


def write(name, out_dir, device, tokenizer, tokenizer_3):
    """Write the models of this name."""
    tokenizer.model_max_length = 77
    tokenizer_3.model_max_length = 512
    torch.manual_seed(0)
    WRITERS[name](out_dir, device, tokenizer, tokenizer_3)
