"""Pipelines of FLUX.1's and FLUX.2-klein's architecture that a CPU runs in seconds, with random weights."""

import diffusers
import torch
import transformers

from helpers import TINY
from tools.random_models import FLUX_SCHEDULER
from tools.tiny_tokenizers import qwen_tokenizer

BLOCKS = dict(
    block_out_channels=(16, 16),
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=32,
    mid_block_add_attention=False,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    use_quant_conv=False,
    use_post_quant_conv=False,
    latent_channels=4,
)
TRANSFORMER = dict(
    in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2
)


def loud(module):
    """Weights so large that every input matters, also through gates that begin at 0."""
    for p in module.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.08)
    return module.eval()


def flux1(folder, guidance=True):
    """Without guidance as FLUX.1-schnell, whose time shift is one number, too."""
    torch.manual_seed(0)
    clip_tokenizer = transformers.CLIPTokenizer.from_pretrained(f"{TINY}/tokenizer")
    t5_tokenizer = transformers.T5TokenizerFast.from_pretrained(f"{TINY}/tokenizer_3")
    clip = transformers.CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=clip_tokenizer.model_max_length,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
    )
    t5 = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    transformer = diffusers.FluxTransformer2DModel(
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(8, 12, 12),
        **TRANSFORMER,
    )
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            **{**FLUX_SCHEDULER, "use_dynamic_shifting": guidance}
        ),
        vae=diffusers.AutoencoderKL(scaling_factor=0.3611, shift_factor=0.1159, **BLOCKS),
        text_encoder=loud(transformers.CLIPTextModel(clip)),
        tokenizer=clip_tokenizer,
        text_encoder_2=loud(transformers.T5EncoderModel(t5)),
        tokenizer_2=t5_tokenizer,
        transformer=loud(transformer),
    ).save_pretrained(folder)
    return str(folder)


def klein(folder):
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(512)
    qwen = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=28,  # the pipeline reads hidden states 9, 18 and 27
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformer = diffusers.Flux2Transformer2DModel(
        joint_attention_dim=3 * 32,
        timestep_guidance_channels=32,
        guidance_embeds=False,
        axes_dims_rope=(8, 8, 8, 8),
        **TRANSFORMER,
    )
    vae = diffusers.AutoencoderKLFlux2(**BLOCKS)
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.5, 2)
    diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
        vae=vae,
        text_encoder=loud(transformers.Qwen3ForCausalLM(qwen)),
        tokenizer=tokenizer,
        transformer=loud(transformer),
    ).save_pretrained(folder)
    return str(folder)
