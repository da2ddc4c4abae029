"""Each reward model gives what the package that it was published with gives."""

import math
import shutil
import sys
from unittest import mock

import pytest
import torch
import transformers
from PIL import Image

import rewards
from gaussian import close
from helpers import CPU, TINY
from small_rewards import (
    BLIP_SMALL,
    CLIP_SMALL,
    imagereward_state,
    one_reward,
    rand,
    shake,
    with_tokenizer,
)


def tokens_of(prompts, length):
    return torch.tensor(
        transformers.AutoTokenizer.from_pretrained(TINY / "clip")(
            prompts, padding="max_length", truncation=True, max_length=length
        ).input_ids
    )


@pytest.fixture(scope="module")
def open_clip():
    """open_clip without torchvision, which it needs for nothing but reading picture files, and which fits one build of torch only."""
    pytest.importorskip("ftfy")
    names = (
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.functional",
        "torchvision.ops",
        "torchvision.ops.misc",
    )
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in names}):
        return pytest.importorskip("open_clip")


# ------------------------------------------------------------------------------- conversions: the same features and scores
@pytest.mark.parametrize("name", CLIP_SMALL)
def test_a_clip_in_open_clips_format_gives_the_same_features_after_conversion(open_clip, name):
    theirs, ours = CLIP_SMALL[name]
    model = shake(open_clip.model.CLIP(embed_dim=48, **theirs))
    converted = rewards.clip_from_open_clip(
        model.state_dict(), dict(projection_dim=48, **ours), torch.float32
    )
    pixels, ids = (
        torch.randn(3, 3, *[theirs["vision_cfg"]["image_size"]] * 2),
        tokens_of(["a red circle", "two squares above a green triangle"], 12),
    )
    ids = ids.masked_fill(
        torch.arange(12) > ids.argmax(1)[:, None], 0
    )  # open_clip pads with 0, where pooling must not look

    def unit(x):
        return torch.nn.functional.normalize(x, dim=-1)

    image = unit(
        converted.visual_projection(converted.vision_model(pixel_values=pixels).pooler_output)
    )
    text = unit(converted.text_projection(converted.text_model(input_ids=ids).pooler_output))
    assert (image - model.encode_image(pixels, normalize=True)).abs().max() < 1e-5 and (
        text - model.encode_text(ids, normalize=True)
    ).abs().max() < 1e-5
    assert converted.logit_scale == model.logit_scale and (text[0] - text[1]).abs().max() > 0.01
    lost = model.state_dict()
    del lost["visual.transformer.resblocks.1.ln_2.weight"]
    with pytest.raises(ValueError, match="layer_norm2"):
        rewards.clip_from_open_clip(lost, dict(projection_dim=48, **ours), torch.float32)


def test_hpsv2_scores_as_open_clip_does_from_the_published_file(open_clip, tmp_path, monkeypatch):
    theirs, ours = CLIP_SMALL["hpsv2"]
    model, file = (
        shake(open_clip.model.CLIP(embed_dim=48, **theirs)),
        with_tokenizer(tmp_path) / "HPS_v2.1_compressed.pt",
    )
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, file)
    monkeypatch.setattr(rewards, "VIT_H14", dict(projection_dim=48, **ours))
    prompts, images = ["a red circle", "two squares"], rand(2, 3, 60, 40)
    expected = (
        model.encode_image(rewards.padded_pixels(images, 56), True)
        * model.encode_text(tokens_of(prompts, 12), True)
    ).sum(-1)
    for place in (file, tmp_path):  # the file, or its directory
        assert (
            one_reward("hpsv2", f"hpsv2={place}")(images, prompts, [{}, {}]) - expected
        ).abs().max() < 1e-5
    with pytest.raises(
        ValueError, match="reward hpsv2: cannot load .*wrong.pt.*download xswu/HPSv2"
    ):
        torch.save({"state_dict": {"conv.weight": torch.zeros(3)}}, tmp_path / "wrong.pt")
        one_reward("hpsv2", f"hpsv2={tmp_path}/wrong.pt")


def blip_by_hand(state, pixels, ids, mask):
    """ImageReward's forward pass, written out from its weights under their published names."""
    F = torch.nn.functional

    def linear(x, key):
        return F.linear(x, state[key + ".weight"], state[key + ".bias"])

    def norm(x, key, eps):
        return F.layer_norm(x, x.shape[-1:], state[key + ".weight"], state[key + ".bias"], eps)

    def attend(q, k, v, heads, bias=0):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return ((q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)

    see = "blip.visual_encoder."
    x = (
        F.conv2d(
            pixels,
            state[see + "patch_embed.proj.weight"],
            state[see + "patch_embed.proj.bias"],
            stride=16,
        )
        .flatten(2)
        .mT
    )
    x = (
        torch.cat([state[see + "cls_token"].expand(len(x), -1, -1), x], 1)
        + state[see + "pos_embed"]
    )
    for i in range(2):
        block = f"{see}blocks.{i}."
        x = x + linear(
            attend(*linear(norm(x, block + "norm1", 1e-6), block + "attn.qkv").chunk(3, -1), 2),
            block + "attn.proj",
        )
        x = x + linear(
            F.gelu(linear(norm(x, block + "norm2", 1e-6), block + "mlp.fc1")), block + "mlp.fc2"
        )
    x, read, hide = (
        norm(x, see + "norm", 1e-6),
        "blip.text_encoder.",
        (1.0 - mask)[:, None, None] * -1e9,
    )
    h = (
        state[read + "embeddings.word_embeddings.weight"][ids]
        + state[read + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    )
    h = norm(h, read + "embeddings.LayerNorm", 1e-12)
    for i in range(2):
        for part, source, bias in (("attention", None, hide), ("crossattention", x, 0)):
            layer = f"{read}encoder.layer.{i}.{part}."
            q, k, v = (
                linear(h if name == "query" or source is None else source, f"{layer}self.{name}")
                for name in ("query", "key", "value")
            )
            h = norm(
                h + linear(attend(q, k, v, 1, bias), layer + "output.dense"),
                layer + "output.LayerNorm",
                1e-12,
            )
        layer = f"{read}encoder.layer.{i}."
        h = norm(
            h + linear(F.gelu(linear(h, layer + "intermediate.dense")), layer + "output.dense"),
            layer + "output.LayerNorm",
            1e-12,
        )
    h = h[:, 0]
    for i in (0, 2, 4, 6, 7):
        h = linear(h, f"mlp.layers.{i}")
    return (h[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_imagereward_is_its_published_network(tmp_path, monkeypatch):
    state = imagereward_state()
    torch.save(state, with_tokenizer(tmp_path) / "ImageReward.pt")
    monkeypatch.setattr(rewards, "BLIP_L", BLIP_SMALL)
    prompts, images = (
        ["a red circle", "two squares above a green triangle", "a circle " * 20],
        rand(3, 3, 64, 64),
    )
    ids = tokens_of(prompts, 35)  # which cuts off the third
    length = ids.argmax(1)[
        :, None
    ]  # of <|endoftext|>, which pads here too: tokens after the first are hidden
    expected = blip_by_hand(
        state, rewards.normalise(images), ids, (torch.arange(35) <= length).float()
    )
    reward = one_reward("imagereward", f"imagereward={tmp_path}")
    assert (
        reward(images, prompts, [{}] * 3) - expected
    ).abs().max() < 1e-5 * expected.abs().max() and expected.std() > 1
    with pytest.raises(ValueError, match="imagereward"):
        torch.save(
            {k: v for k, v in state.items() if "crossattention.self.key" not in k},
            tmp_path / "ImageReward.pt",
        )
        one_reward("imagereward", f"imagereward={tmp_path}")


def test_the_aesthetic_score_is_a_linear_head_on_the_unit_image_embedding_that_clipscore_shares(
    tmp_path,
):
    layers = torch.nn.Sequential(
        *[
            torch.nn.Linear(a, b) if b else torch.nn.Dropout(0.2)
            for a, b in (
                (64, 1024),
                (0, 0),
                (1024, 128),
                (0, 0),
                (128, 64),
                (0, 0),
                (64, 16),
                (16, 1),
            )
        ]
    )
    torch.save(
        {"layers." + k: v for k, v in layers.state_dict().items()},
        tmp_path / "sac+logos+ava1-l14-linearMSE.pth",
    )
    clipscore, aesthetic = rewards.build(
        "clipscore,aesthetic",
        CPU,
        [f"clipscore={TINY}/clip", f"aesthetic={tmp_path}/sac+logos+ava1-l14-linearMSE.pth"],
    )
    assert clipscore.models[0] is aesthetic.models[0]
    images, seen, vision = rand(4, 3, 32, 32), [], clipscore.models[0].vision_model
    model = transformers.CLIPModel.from_pretrained(TINY / "clip", dtype=torch.float32)
    features = model.visual_projection(
        model.vision_model(pixel_values=rewards.clip_pixels(images, 32)).pooler_output
    )
    hook = vision.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        clipscore(images, ["a circle"] * 4, [{}] * 4)
        scores = aesthetic(images, ["a circle"] * 4, [{}] * 4)
        assert len(seen) == 1  # the same pictures are looked at once
        (
            aesthetic(images + 0, ["a circle"] * 4, [{}] * 4),
            images.mul_(0.5),
            aesthetic(images, ["a circle"] * 4, [{}] * 4),
        )
        assert (
            len(seen) == 3
        )  # others are not mistaken for them, nor the same tensor with other numbers in it
    hook.remove()
    close(
        scores,
        layers.eval()(features / features.norm(dim=-1, keepdim=True)).flatten().detach(),
        1e-5,
    )


# ------------------------------------------------------------------------------------------- the two that ask a language model
@pytest.fixture(scope="module")
def qwen_files(tmp_path_factory):
    """A tokenizer of single bytes with Qwen's special tokens and chat template, and its image processor."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder, special = (
        tmp_path_factory.mktemp("qwen"),
        [
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|image_pad|>",
        ],
    )
    tokenizer = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in special])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|>"
        "<|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
    )
    fast.save_pretrained(folder)
    return folder, {s: fast.convert_tokens_to_ids(s) for s in special}


def test_hpsv3_is_the_published_head_on_qwen2_vl_at_its_token(qwen_files, tmp_path):
    """Weights under the names of HPSv3.safetensors (older than today's transformers), the wording out of a Python file that is not run."""
    from safetensors.torch import save_file

    folder, special = qwen_files
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = transformers.Qwen2VLConfig(
        text_config=dict(
            vocab_size=256 + 7,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4),
        ),
        vision_config=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2),
        image_token_id=special["<|image_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = shake(transformers.Qwen2VLModel(config))
    head = shake(
        torch.nn.Sequential(
            torch.nn.Linear(32, 1024),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.05),
            torch.nn.Linear(1024, 16),
            torch.nn.ReLU(),
            torch.nn.Linear(16, 2),
        )
    )
    state = {k.replace("language_model.", "model."): v for k, v in model.state_dict().items()}
    save_file(
        {
            **state,
            **{"rm_head." + k: v for k, v in head.state_dict().items()},
            "lm_head.weight": torch.zeros(3, 3),
        },
        tmp_path / "HPSv3.safetensors",
    )
    config.text_config.vocab_size = 9999  # of the config that is published: the checkpoint has one token more than the tokenizer
    config.save_pretrained(tmp_path)
    transformers.Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
    (tmp_path / "data_collator_qwen.py").write_text(
        f'import nothing_of_that_name\nopen({str(tmp_path / "proof")!r}, "w")\nINSTRUCTION = """\nRate it.\n'
        'Textual prompt - {text_prompt}\n"""\nprompt_with_special_token = """\nRating: <|Reward|>\n\nEND\n"""\n'
    )
    images, prompts = rand(2, 3, 448, 448), ["a cat", "a longer prompt about dogs"]
    scores, seen = one_reward("hpsv3", f"hpsv3={tmp_path}")(images, prompts, [{}, {}]), 256
    assert not (tmp_path / "proof").exists()
    for image, prompt, score in zip(images, prompts, scores):  # one at a time, so without padding
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
        text = (
            "<|im_start|>user\n<|vision_start|>"
            + "<|image_pad|>" * seen
            + f"<|vision_end|>\nRate it.\nTextual prompt - {prompt}\n\nRating: <|Reward|>\n\nEND\n"
            "<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer(text, return_tensors="pt").input_ids
        pixels = transformers.Qwen2VLImageProcessorPil(
            size={"shortest_edge": 256 * 784, "longest_edge": 256 * 784}
        )(tensor_to_pil(image), return_tensors="pt")
        hidden = model(
            input_ids=ids, mm_token_type_ids=(ids == special["<|image_pad|>"]).int(), **pixels
        ).last_hidden_state
        close(score, head(hidden[ids == 256 + 6])[0, 0], 1e-4)
    assert abs(scores[0] - scores[1]) > 1e-3


def tensor_to_pil(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def test_geneval2_is_the_geometric_mean_of_the_probabilities_of_the_right_answers(
    qwen_files, tmp_path
):
    folder, special = qwen_files
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = transformers.Qwen3VLConfig(
        text_config=dict(
            vocab_size=256 + 6,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4),
        ),
        vision_config=dict(
            depth=1,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=32,
            deepstack_visual_indexes=[0],
            num_position_embeddings=16,
        ),
        image_token_id=special["<|image_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = shake(transformers.Qwen3VLForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    eyes = transformers.Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": 1024, "longest_edge": 64 * 1024}
    )
    eyes.save_pretrained(tmp_path)
    reward, image = one_reward("geneval2", f"geneval2={tmp_path}"), rand(1, 3, 64, 64)
    questions = [
        ["How many cats are in the image?", "two"],
        ["Are the cats green?", "Yes"],
        ["Is a dog there?", "No"],
    ]
    score, p = reward(image, ["two green cats"], [{"vqa_list": questions}]), []
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for (question, _), firsts in zip(
        questions, ("2tT ", "yY ", "nN ")
    ):  # this tokenizer's tokens are single bytes
        text = (
            "<|im_start|>user\n<|vision_start|>"
            + "<|image_pad|>" * 4
            + f"<|vision_end|>{question} Answer in one word.<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer(text, return_tensors="pt").input_ids
        logits = model(
            input_ids=ids,
            mm_token_type_ids=(ids == special["<|image_pad|>"]).int(),
            **eyes(tensor_to_pil(image[0]), return_tensors="pt"),
        ).logits
        p.append(
            logits[0, -1].softmax(-1)[[tokenizer(c).input_ids[0] for c in firsts]].sum().item()
        )
    assert score.item() == pytest.approx(math.prod(p) ** (1 / 3), rel=1e-4) and 0 < score < 1
    for wrong in (
        {},
        {"vqa_list": []},
        {"vqa_list": [["Is it?"]]},
        {"vqa_list": [["Is it?", 2]]},
        {"vqa_list": "Is it?"},
    ):
        with pytest.raises(ValueError, match=r"^line 3 .*vqa_list"):
            reward.check(["a"], [{**wrong, "line": 3}])
