"""tools/random_models.py, with models a hundredth of their size."""

import torch
import transformers

import rewards
from helpers import CPU
from small_rewards import CLIP_SMALL
from tools import random_models


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
