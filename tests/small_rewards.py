"""Reward models that fit into a test.

No pretrained weights here: small models with random weights, saved under the names that the published files use, must
give through rewards.py what the package they were published with gives, or what an independent few lines compute.
"""

import itertools
import shutil

import torch

import rewards
from helpers import CPU, TINY

CLIP_SMALL = {  # name: open_clip's configuration, transformers' configuration
    "hpsv2": (
        dict(
            vision_cfg=dict(layers=2, width=160, head_width=80, patch_size=14, image_size=56),
            text_cfg=dict(context_length=12, vocab_size=570, width=64, heads=1, layers=2),
        ),
        dict(
            vision_config=dict(
                hidden_size=160,
                intermediate_size=640,
                num_hidden_layers=2,
                num_attention_heads=2,
                patch_size=14,
                image_size=56,
                hidden_act="gelu",
            ),
            text_config=dict(
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=1,
                vocab_size=570,
                max_position_embeddings=12,
                hidden_act="gelu",
                eos_token_id=2,
            ),
        ),
    ),
    "vit-l": (
        dict(
            vision_cfg=dict(layers=3, width=128, patch_size=8, image_size=32),
            text_cfg=dict(context_length=12, vocab_size=570, width=64, heads=1, layers=2),
            quick_gelu=True,
        ),
        dict(
            vision_config=dict(
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=3,
                num_attention_heads=2,
                patch_size=8,
                image_size=32,
                hidden_act="quick_gelu",
            ),
            text_config=dict(
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=1,
                vocab_size=570,
                max_position_embeddings=12,
                hidden_act="quick_gelu",
                eos_token_id=2,
            ),
        ),
    ),
}

BLIP_SMALL = (
    dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=16,
        image_size=64,
        layer_norm_eps=1e-6,
    ),
    dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        vocab_size=570,
        max_position_embeddings=64,
        encoder_hidden_size=128,
        is_decoder=True,
    ),
)


def one_reward(name, *paths, **more):
    return rewards.build(name, CPU, [str(p) for p in paths], **more)[0]


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def shake(model, seed=0):
    """Random weights everywhere, also where a fresh model has 0 or 1, so that a tensor put in the wrong place shows."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    return model.eval().requires_grad_(False)


def with_tokenizer(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "clip" / file, folder)
    return folder


def imagereward_state(seed=0):
    """Random tensors with the names and, but for the width and depth, the shapes of ImageReward.pt."""
    g, shapes = (
        torch.Generator().manual_seed(seed),
        {
            "blip.visual_encoder.cls_token": (1, 1, 128),
            "blip.visual_encoder.pos_embed": (1, 17, 128),
        },
    )
    see, read = "blip.visual_encoder.", "blip.text_encoder."

    def both(name, *shape):
        return shapes.update({name + ".weight": shape, name + ".bias": shape[:1]})

    (
        both(see + "patch_embed.proj", 128, 3, 16, 16),
        both(see + "norm", 128),
        both(read + "embeddings.LayerNorm", 64),
    )
    shapes.update(
        {
            read + "embeddings.word_embeddings.weight": (570, 64),
            read + "embeddings.position_embeddings.weight": (64, 64),
        }
    )
    for i in range(2):
        for name, *shape in (
            ("norm1", 128),
            ("norm2", 128),
            ("attn.qkv", 384, 128),
            ("attn.proj", 128, 128),
            ("mlp.fc1", 256, 128),
            ("mlp.fc2", 128, 256),
        ):
            both(f"{see}blocks.{i}.{name}", *shape)
        for part, width in (("attention", 64), ("crossattention", 128)):
            layer = f"{read}encoder.layer.{i}.{part}."
            (
                both(layer + "self.query", 64, 64),
                both(layer + "self.key", 64, width),
                both(layer + "self.value", 64, width),
            )
            both(layer + "output.dense", 64, 64), both(layer + "output.LayerNorm", 64)
        layer = f"{read}encoder.layer.{i}."
        (
            both(layer + "intermediate.dense", 128, 64),
            both(layer + "output.dense", 64, 128),
            both(layer + "output.LayerNorm", 64),
        )
    for i, (wide, narrow) in zip((0, 2, 4, 6, 7), itertools.pairwise((64, 1024, 128, 64, 16, 1))):
        both(f"mlp.layers.{i}", narrow, wide)

    def loud(k):
        return (
            3 if "mlp" in k else 4 if "self.query" in k or "self.key" in k else 1
        )  # so that every token of a prompt matters

    state = {
        k: loud(k) * torch.randn(s, generator=g) / (s[-1] ** 0.5 if len(s) > 1 else 3)
        for k, s in shapes.items()
    }
    return {
        **state,
        "blip.text_encoder.embeddings.position_ids": torch.arange(64)[None],
        "blip.vision_proj.weight": torch.zeros(3, 3),
    }
