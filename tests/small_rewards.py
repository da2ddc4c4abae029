"""Reward models that fit into a test.

No pretrained weights here. Small models with random weights are saved under the names that the
published files use. Through rewards.py they must give what the package they were published with
gives, or what an independent few lines compute.
"""

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


def one_reward(name, *paths, **options):
    """The reward of this name. paths: "name=PATH", as --reward_path takes them."""
    return rewards.build(name, CPU, [str(path) for path in paths], **options)[0]


def rand(*shape, seed=0):
    """Uniform numbers in [0,1) that do not depend on the tests before."""
    seeded_rng = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=seeded_rng)


def shake(model, seed=0):
    """Random weights everywhere, also where a fresh model has 0 or 1.

    A tensor put in the wrong place shows.
    """
    seeded_rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=seeded_rng)
    return model.eval().requires_grad_(False)


def calls_of(module):
    """-> a list that grows by one at each forward pass of the module, and the hook to remove."""
    calls = []

    def count(module, inputs, output):
        calls.append(1)

    return calls, module.register_forward_hook(count)


def with_tokenizer(folder):
    """The folder, made if need be, with the tiny CLIP's tokenizer in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "clip" / file, folder)
    return folder


def head_layers(inputs):
    """(number, inputs, outputs) of each linear layer of a published head; the rest is dropout."""
    numbers = (0, 2, 4, 6, 7)
    widths = (inputs, 1024, 128, 64, 16, 1)
    return list(zip(numbers, widths[:-1], widths[1:]))


def imagereward_shapes():
    """{name: shape} of ImageReward.pt, but for the width and depth.

    imagereward_state draws in this order.
    """
    see = "blip.visual_encoder."
    read = "blip.text_encoder."
    shapes = {
        see + "cls_token": (1, 1, 128),
        see + "pos_embed": (1, 17, 128),
    }

    def weight_and_bias(name, *shape):
        shapes[name + ".weight"] = shape
        shapes[name + ".bias"] = shape[:1]

    weight_and_bias(see + "patch_embed.proj", 128, 3, 16, 16)
    weight_and_bias(see + "norm", 128)
    weight_and_bias(read + "embeddings.LayerNorm", 64)
    shapes[read + "embeddings.word_embeddings.weight"] = (570, 64)
    shapes[read + "embeddings.position_embeddings.weight"] = (64, 64)
    for i in range(2):
        block = f"{see}blocks.{i}."
        weight_and_bias(block + "norm1", 128)
        weight_and_bias(block + "norm2", 128)
        weight_and_bias(block + "attn.qkv", 384, 128)
        weight_and_bias(block + "attn.proj", 128, 128)
        weight_and_bias(block + "mlp.fc1", 256, 128)
        weight_and_bias(block + "mlp.fc2", 128, 256)
        layer = f"{read}encoder.layer.{i}."
        for part, width in (("attention.", 64), ("crossattention.", 128)):
            weight_and_bias(layer + part + "self.query", 64, 64)
            weight_and_bias(layer + part + "self.key", 64, width)
            weight_and_bias(layer + part + "self.value", 64, width)
            weight_and_bias(layer + part + "output.dense", 64, 64)
            weight_and_bias(layer + part + "output.LayerNorm", 64)
        weight_and_bias(layer + "intermediate.dense", 128, 64)
        weight_and_bias(layer + "output.dense", 64, 128)
        weight_and_bias(layer + "output.LayerNorm", 64)
    for number, inputs, outputs in head_layers(64):
        weight_and_bias(f"mlp.layers.{number}", outputs, inputs)
    return shapes


def loudness(name):
    """How large the weights of this name are, so that every token of a prompt matters."""
    if "mlp" in name:
        return 3
    if "self.query" in name or "self.key" in name:
        return 4
    return 1


def imagereward_state(seed=0):
    """Random tensors with the names of ImageReward.pt and, but for width and depth, its shapes."""
    seeded_rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in imagereward_shapes().items():
        quietness = shape[-1] ** 0.5 if len(shape) > 1 else 3
        state[name] = loudness(name) * torch.randn(shape, generator=seeded_rng) / quietness
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    state["blip.vision_proj.weight"] = torch.zeros(3, 3)
    return state
