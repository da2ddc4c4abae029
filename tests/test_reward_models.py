"""Each reward model gives what the package that it was published with gives."""

import math
import shutil
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import rewards
from gaussian import close
from helpers import CPU, TINY
from small_rewards import (
    BLIP_SMALL,
    CLIP_SMALL,
    calls_of,
    imagereward_state,
    one_reward,
    rand,
    shake,
    with_tokenizer,
)


def tokens_of(prompts, length):
    """[B] -> [B,length], of the tiny CLIP's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "clip")
    read = tokenizer(prompts, padding="max_length", truncation=True, max_length=length)
    return torch.tensor(read.input_ids)


def unit(features):
    return F.normalize(features, dim=-1)


def largest(tensor):
    return tensor.abs().max()


@pytest.fixture(scope="module")
def open_clip():
    """open_clip without torchvision.

    It needs torchvision for nothing but reading picture files; and torchvision fits one build of
    torch only.
    """
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


# ---- CLIP: the same features and scores after conversion -----------------------------------------
@pytest.mark.parametrize("name", CLIP_SMALL)
def test_a_clip_in_open_clips_format_gives_the_same_features_after_conversion(open_clip, name):
    theirs, ours = CLIP_SMALL[name]
    config = dict(projection_dim=48, **ours)
    model = shake(open_clip.model.CLIP(embed_dim=48, **theirs))
    converted = rewards.clip_from_open_clip(model.state_dict(), config, torch.float32)
    side = theirs["vision_cfg"]["image_size"]
    pixels = torch.randn(3, 3, side, side)
    ids = tokens_of(["a red circle", "two squares above a green triangle"], 12)
    # open_clip pads with 0, where pooling must not look.
    after_the_end = torch.arange(12) > ids.argmax(1)[:, None]
    ids = ids.masked_fill(after_the_end, 0)

    seen = converted.vision_model(pixel_values=pixels).pooler_output
    image = unit(converted.visual_projection(seen))
    read = converted.text_model(input_ids=ids).pooler_output
    text = unit(converted.text_projection(read))
    assert largest(image - model.encode_image(pixels, normalize=True)) < 1e-5
    assert largest(text - model.encode_text(ids, normalize=True)) < 1e-5
    assert converted.logit_scale == model.logit_scale
    assert largest(text[0] - text[1]) > 0.01

    lost = model.state_dict()
    del lost["visual.transformer.resblocks.1.ln_2.weight"]
    with pytest.raises(ValueError, match="layer_norm2"):
        rewards.clip_from_open_clip(lost, config, torch.float32)


def test_hpsv2_scores_as_open_clip_does_from_the_published_file(open_clip, tmp_path, monkeypatch):
    theirs, ours = CLIP_SMALL["hpsv2"]
    model = shake(open_clip.model.CLIP(embed_dim=48, **theirs))
    file = with_tokenizer(tmp_path) / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, file)
    monkeypatch.setattr(rewards, "VIT_H14", dict(projection_dim=48, **ours))
    prompts = ["a red circle", "two squares"]
    images = rand(2, 3, 60, 40)
    pixels = rewards.padded_pixels(images, 56)
    image_features = model.encode_image(pixels, normalize=True)
    text_features = model.encode_text(tokens_of(prompts, 12), normalize=True)
    expected = (image_features * text_features).sum(-1)
    for place in (file, tmp_path):  # the file, or its directory
        scores = one_reward("hpsv2", f"hpsv2={place}")(images, prompts, [{}, {}])
        assert largest(scores - expected) < 1e-5
    torch.save({"state_dict": {"conv.weight": torch.zeros(3)}}, tmp_path / "wrong.pt")
    message = "reward hpsv2: cannot load .*wrong.pt.*download xswu/HPSv2"
    with pytest.raises(ValueError, match=message):
        one_reward("hpsv2", f"hpsv2={tmp_path}/wrong.pt")


# ---- ImageReward ---------------------------------------------------------------------------------
def attend(query, key, value, heads, bias=0):
    """Attention of several heads, written out. [B,L,D] -> [B,L,D]"""
    query = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    key = key.unflatten(-1, (heads, -1)).transpose(1, 2)
    value = value.unflatten(-1, (heads, -1)).transpose(1, 2)
    likeness = query @ key.mT / query.shape[-1] ** 0.5
    weights = (likeness + bias).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


class BlipByHand:
    """ImageReward's forward pass, written out from its weights under their published names."""

    def __init__(self, state):
        self.state = state

    def linear(self, x, key):
        return F.linear(x, self.state[key + ".weight"], self.state[key + ".bias"])

    def norm(self, x, key, eps):
        weight = self.state[key + ".weight"]
        bias = self.state[key + ".bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def mlp(self, x, wide, narrow):
        """Two linear layers, under these names, with gelu between."""
        return self.linear(F.gelu(self.linear(x, wide)), narrow)

    def see(self, pixels):
        """The vision tower. [B,3,H,W] -> [B,L,D]"""
        tower = "blip.visual_encoder."
        kernel = self.state[tower + "patch_embed.proj.weight"]
        bias = self.state[tower + "patch_embed.proj.bias"]
        patches = F.conv2d(pixels, kernel, bias, stride=16).flatten(2).mT
        first = self.state[tower + "cls_token"].expand(len(patches), -1, -1)
        x = torch.cat([first, patches], 1) + self.state[tower + "pos_embed"]
        for i in range(2):
            block = f"{tower}blocks.{i}."
            normed = self.norm(x, block + "norm1", 1e-6)
            query, key, value = self.linear(normed, block + "attn.qkv").chunk(3, -1)
            attended = attend(query, key, value, heads=2)
            x = x + self.linear(attended, block + "attn.proj")
            normed = self.norm(x, block + "norm2", 1e-6)
            x = x + self.mlp(normed, block + "mlp.fc1", block + "mlp.fc2")
        return self.norm(x, tower + "norm", 1e-6)

    def attention(self, hidden, source, layer, bias):
        """One attention of the text tower, which looks at `source`, with residual and norm."""
        query = self.linear(hidden, layer + "self.query")
        key = self.linear(source, layer + "self.key")
        value = self.linear(source, layer + "self.value")
        attended = attend(query, key, value, heads=1, bias=bias)
        hidden = hidden + self.linear(attended, layer + "output.dense")
        return self.norm(hidden, layer + "output.LayerNorm", 1e-12)

    def read(self, ids, mask, seen):
        """The text tower, which looks at what is seen. [B,L] -> [B,L,D]"""
        tower = "blip.text_encoder."
        words = self.state[tower + "embeddings.word_embeddings.weight"]
        places = self.state[tower + "embeddings.position_embeddings.weight"]
        hidden = words[ids] + places[: ids.shape[1]]
        hidden = self.norm(hidden, tower + "embeddings.LayerNorm", 1e-12)
        hide = (1.0 - mask)[:, None, None] * -1e9
        for i in range(2):
            layer = f"{tower}encoder.layer.{i}."
            hidden = self.attention(hidden, hidden, layer + "attention.", bias=hide)
            hidden = self.attention(hidden, seen, layer + "crossattention.", bias=0)
            more = self.mlp(hidden, layer + "intermediate.dense", layer + "output.dense")
            hidden = self.norm(hidden + more, layer + "output.LayerNorm", 1e-12)
        return hidden

    def score(self, pixels, ids, mask):
        """The standardised score. -> [B]"""
        hidden = self.read(ids, mask, self.see(pixels))
        x = hidden[:, 0]
        for i in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{i}")
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_imagereward_is_its_published_network(tmp_path, monkeypatch):
    state = imagereward_state()
    file = with_tokenizer(tmp_path) / "ImageReward.pt"
    torch.save(state, file)
    monkeypatch.setattr(rewards, "BLIP_L", BLIP_SMALL)
    prompts = ["a red circle", "two squares above a green triangle", "a circle " * 20]
    images = rand(3, 3, 64, 64)
    ids = tokens_of(prompts, 35)  # which cuts off the third
    # <|endoftext|> pads here too: tokens after the first one are hidden.
    length = ids.argmax(1)[:, None]
    mask = (torch.arange(35) <= length).float()
    expected = BlipByHand(state).score(rewards.normalise(images), ids, mask)
    reward = one_reward("imagereward", f"imagereward={tmp_path}")
    scores = reward(images, prompts, [{}] * 3)
    assert largest(scores - expected) < 1e-5 * largest(expected)
    assert expected.std() > 1
    lost = {name: x for name, x in state.items() if "crossattention.self.key" not in name}
    torch.save(lost, file)
    with pytest.raises(ValueError, match="imagereward"):
        one_reward("imagereward", f"imagereward={tmp_path}")


# ---- LAION's aesthetic predictor -----------------------------------------------------------------
def test_the_aesthetic_score_is_a_linear_head_on_the_unit_image_embedding_that_clipscore_shares(
    tmp_path,
):
    layers = torch.nn.Sequential(
        torch.nn.Linear(64, 1024),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(1024, 128),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    )
    file = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save({"layers." + name: x for name, x in layers.state_dict().items()}, file)
    paths = [f"clipscore={TINY}/clip", f"aesthetic={file}"]
    clipscore, aesthetic = rewards.build("clipscore,aesthetic", CPU, paths)
    assert clipscore.models[0] is aesthetic.models[0]

    images = rand(4, 3, 32, 32)
    prompts = ["a circle"] * 4
    metadata = [{}] * 4
    model = transformers.CLIPModel.from_pretrained(TINY / "clip", dtype=torch.float32)
    pixels = rewards.clip_pixels(images, 32)
    features = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    looks, hook = calls_of(clipscore.models[0].vision_model)
    with torch.no_grad():
        clipscore(images, prompts, metadata)
        scores = aesthetic(images, prompts, metadata)
        assert len(looks) == 1  # the same pictures are looked at once
        # The same tensor with other numbers in it is not mistaken for them, nor is another one.
        images.mul_(0.5)
        aesthetic(images, prompts, metadata)
        assert len(looks) == 2
        aesthetic(images + 0, prompts, metadata)
        assert len(looks) == 3
    hook.remove()
    length = features.norm(dim=-1, keepdim=True)
    expected = layers.eval()(features / length).flatten().detach()
    close(scores, expected, 1e-5)


# ---- the two that ask a language model -----------------------------------------------------------
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def chat_of(question, picture_tokens):
    """What the model reads when it is asked a question about one picture of so many tokens."""
    return (
        "<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * picture_tokens
        + f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.fixture(scope="module")
def qwen_files(tmp_path_factory):
    """A tokenizer of single bytes with Qwen's special tokens and chat template.

    -> its directory, {special token: number}
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("qwen")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(numbers, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder, {text: fast.convert_tokens_to_ids(text) for text in SPECIAL}


def tensor_to_pil(image):
    pixels = (image * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


HPSV3_CODE = '''\
import nothing_of_that_name
open({proof!r}, "w")
INSTRUCTION = """
Rate it.
Textual prompt - {{text_prompt}}
"""
prompt_with_special_token = """
Rating: <|Reward|>

END
"""
'''


def hpsv3_head():
    layers = torch.nn.Sequential(
        torch.nn.Linear(32, 1024),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.05),
        torch.nn.Linear(1024, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 2),
    )
    return shake(layers)


def hpsv3_state(model, head):
    """The weights under the names of HPSv3.safetensors, older than today's transformers."""
    state = {}
    for name, tensor in model.state_dict().items():
        state[name.replace("language_model.", "model.")] = tensor
    for name, tensor in head.state_dict().items():
        state["rm_head." + name] = tensor
    state["lm_head.weight"] = torch.zeros(3, 3)
    return state


def test_hpsv3_is_the_published_head_on_qwen2_vl_at_its_token(qwen_files, tmp_path):
    """The weights have their published names; the wording is in a Python file that is not run."""
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
    head = hpsv3_head()
    save_file(hpsv3_state(model, head), tmp_path / "HPSv3.safetensors")
    # That of the published config: the checkpoint has one token more than the tokenizer.
    config.text_config.vocab_size = 9999
    config.save_pretrained(tmp_path)
    transformers.Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
    proof = tmp_path / "proof"
    (tmp_path / "data_collator_qwen.py").write_text(HPSV3_CODE.format(proof=str(proof)))

    images = rand(2, 3, 448, 448)
    prompts = ["a cat", "a longer prompt about dogs"]
    scores = one_reward("hpsv3", f"hpsv3={tmp_path}")(images, prompts, [{}, {}])
    assert not proof.exists()

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    pixels = 256 * 784
    eyes = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": pixels, "longest_edge": pixels}
    )
    for image, prompt, score in zip(images, prompts, scores):  # one at a time, so without padding
        question = f"\nRate it.\nTextual prompt - {prompt}\n\nRating: <|Reward|>\n\nEND\n"
        text = chat_of(question, picture_tokens=256)
        ids = tokenizer(text, return_tensors="pt").input_ids
        of_pictures = (ids == special["<|image_pad|>"]).int()
        seen = eyes(tensor_to_pil(image), return_tensors="pt")
        out = model(input_ids=ids, mm_token_type_ids=of_pictures, **seen)
        hidden = out.last_hidden_state[ids == 256 + 6]
        close(score, head(hidden)[0, 0], 1e-4)
    assert abs(scores[0] - scores[1]) > 1e-3


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
        patch_size=16,
        size={"shortest_edge": 1024, "longest_edge": 64 * 1024},
    )
    eyes.save_pretrained(tmp_path)
    reward = one_reward("geneval2", f"geneval2={tmp_path}")
    image = rand(1, 3, 64, 64)
    pairs = [
        ["How many cats are in the image?", "two"],
        ["Are the cats green?", "Yes"],
        ["Is a dog there?", "No"],
    ]
    score = reward(image, ["two green cats"], [{"vqa_list": pairs}])

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    seen = eyes(tensor_to_pil(image[0]), return_tensors="pt")
    first_letters = ("2tT ", "yY ", "nN ")  # this tokenizer's tokens are single bytes
    right = []
    for (question, _), letters in zip(pairs, first_letters):
        text = chat_of(f"{question} Answer in one word.", picture_tokens=4)
        ids = tokenizer(text, return_tensors="pt").input_ids
        of_pictures = (ids == special["<|image_pad|>"]).int()
        logits = model(input_ids=ids, mm_token_type_ids=of_pictures, **seen).logits
        probabilities = logits[0, -1].softmax(-1)
        firsts = [tokenizer(letter).input_ids[0] for letter in letters]
        right.append(probabilities[firsts].sum().item())
    geometric_mean = math.prod(right) ** (1 / 3)
    assert score.item() == pytest.approx(geometric_mean, rel=1e-4)
    assert 0 < score < 1
    for wrong in (
        {},
        {"vqa_list": []},
        {"vqa_list": [["Is it?"]]},
        {"vqa_list": [["Is it?", 2]]},
        {"vqa_list": "Is it?"},
    ):
        with pytest.raises(ValueError, match=r"^line 3 .*vqa_list"):
            reward.check(["a"], [{**wrong, "line": 3}])
