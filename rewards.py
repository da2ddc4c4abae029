"""Rewards: what a picture is worth. One function each, and `build` to load those that are asked for.

A reward is a callable (images [B,3,H,W] float in [0,1], prompts [B], metadata [B]) -> scores [B]
float32, with the attributes `name`, `weight`, `differentiable`, `models` (what to move when memory is
short) and `check(prompts, metadata)`, which raises ValueError for prompts that it cannot score. A
differentiable one also has its two parts (`in_two_parts`): `read`, which turns prompts into a tensor
and is never recorded, and `look`, which a GPU records.

To add one: a function (path, device, dtype, clip_l) -> score(images, prompts, metadata), like `ocr`
(with score.models if it has any, like `geneval2`). One with a gradient returns in_two_parts(...), like
`aesthetic`, or like `similarity` if it reads the prompt. Name it in REWARDS. path is what --reward_path
gives, clip_l where CLIP ViT-L/14 is, which several share. A gradient sees the raw score: see --margin.
If it cannot score every prompt: score.wrong, a function (prompt, metadata of it) -> what is wrong, or
None, as `ocr` has it.
"""

import ast
import contextlib
import functools
import math
import os
import re
import weakref

import numpy as np
import torch
import torch.nn.functional as F
import transformers  # loads its classes where they are first named
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import tiny
from common import die, shortened
from hub import files_on_hub, in_words, is_hub_id
from prompts import COCO, COLORS, NUMBERS, RELATIONS, each

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Its tokenizer serves every CLIP here: they all speak the same 49408 tokens.
CLIP_L = "openai/clip-vit-large-patch14"
VIT_H14 = dict(
    projection_dim=1024,
    vision_config=dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
        hidden_act="gelu",
    ),
    text_config=dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        hidden_act="gelu",
        # Pool where the token number is highest, as open_clip does; that is <|endoftext|>.
        eos_token_id=2,
    ),
)
BLIP_L = (  # picture, text
    dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=16,
        image_size=224,
        layer_norm_eps=1e-6,
    ),
    dict(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        encoder_hidden_size=1024,
        is_decoder=True,  # with cross attention
    ),
)


# ---- pictures, with gradient ---------------------------------------------------------------------
def resize(images, size):
    """Bicubic and anti-aliased, as PIL does it. [B,3,H,W] in [0,1] -> [B,3,*size] in [0,1]

    One product for the rows and one for the columns: PyTorch's own backward pass adds up in any order on
    a GPU, so that a seed would not give one result.
    """
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    rows = resizing(height, size[0], images.dtype, images.device)
    columns = resizing(width, size[1], images.dtype, images.device)
    resized = rows @ images @ columns.T
    return resized.clamp(0, 1)


@functools.cache
def resizing(length, new_length, dtype, device):
    """[new_length, length]: what resizing does to a side, read off from a picture of one 1 a row."""
    ones = torch.eye(length, dtype=dtype, device=device)[None, None]
    size = (new_length, length)
    return F.interpolate(ones, size, mode="bicubic", antialias=True, align_corners=False)[0, 0]


def normalise(images, mean=CLIP_MEAN, std=CLIP_STD):
    """Mean and standard deviation of each of the three channels to 0 and 1. [B,3,H,W]"""
    mean = of_channels(mean, images.dtype, images.device)
    std = of_channels(std, images.dtype, images.device)
    return (images - mean) / std


@functools.cache  # a copy to a GPU waits for what the GPU has to do before
def of_channels(values, dtype, device):
    """A number for each channel -> [3,1,1]"""
    return torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1)


def sent(tensor, device):
    """tensor.to(device), which does not wait for a GPU."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def clip_pixels(images, size):
    """CLIP's own pre-processing. [B,3,H,W] in [0,1] -> [B,3,size,size]

    Shorter side to `size`, centre crop, normalise; differentiable.
    """
    height, width = images.shape[-2:]
    shorter = min(height, width)
    images = resize(images, (size * height // shorter, size * width // shorter))
    top = (images.shape[-2] - size) // 2
    left = (images.shape[-1] - size) // 2
    return normalise(images[..., top : top + size, left : left + size])


def padded_pixels(images, size):
    """HPS v2's pre-processing. [B,3,H,W] in [0,1] -> [B,3,size,size]

    Longer side to `size`, black bars to a square, normalise; differentiable.
    """
    height, width = images.shape[-2:]
    longer = max(height, width)
    images = resize(images, (round(height * size / longer), round(width * size / longer)))
    down = size - images.shape[-2]
    right = size - images.shape[-1]
    bars = (right // 2, right - right // 2, down // 2, down - down // 2)
    return normalise(F.pad(images, bars))


def to_pil(images):
    """[B,3,H,W] in [0,1] -> PIL's pictures"""
    pixels = (images.detach() * 255).round().byte()
    return [Image.fromarray(x) for x in pixels.permute(0, 2, 3, 1).cpu().numpy()]


# ---- published checkpoints -----------------------------------------------------------------------
def published(path, file):
    """The tensors of a checkpoint. No code in it is run.

    path: the file itself, the directory it is in, or owner/repository on the hub.
    """
    if not os.path.exists(path):
        path = hf_hub_download(path, file)
    if os.path.isdir(path):
        path = os.path.join(path, file)
    if path.endswith(".safetensors"):
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def renamed(state, start, *table):
    """{name: tensor} of the names that begin with `start`, without it.

    table: (regular expression, replacement) pairs, by which the names are rewritten in turn.
    """
    result = {}
    for name, tensor in state.items():
        if name.startswith(start):
            name = name[len(start) :]
            for pattern, replacement in table:
                name = re.sub(pattern, replacement, name)
            result[name] = tensor
    return result


def load(model_class, path, dtype, **options):
    """A transformers model, frozen; from path or, if that is None, from options config and state_dict.

    ValueError unless all its weights are there.
    """
    model, info = model_class.from_pretrained(
        path, dtype=dtype, output_loading_info=True, **options
    )
    parameters = {name for name, _ in model.named_parameters()}
    missing = sorted(set(info["missing_keys"]) & parameters)
    strange = info["unexpected_keys"]
    if missing or (path is None and strange):
        first = [*missing, *strange][0]
        raise ValueError(
            f"not the weights of a {model_class.__name__}: {first} is missing or strange"
        )
    return model.requires_grad_(False).eval()


def linear_head(state, key, dtype, layers=(0, 2, 4, 6, 7)):
    """The linear layers of a published nn.Sequential, in at least float32.

    What lies between those of the default is dropout.
    """
    head = torch.nn.Sequential()
    for i in layers:
        outputs, inputs = state[f"{key}.{i}.weight"].shape
        layer = torch.nn.Linear(inputs, outputs)
        layer.load_state_dict(renamed(state, f"{key}.{i}."))
        head.append(layer)
    return head.to(torch.promote_types(dtype, torch.float32)).requires_grad_(False)


def tokenizer_of(*places):
    """The tokenizer in the first of these places that has one; ValueError where none has.

    A place is a directory, a file (which counts as its directory), or a hub name.
    """
    for place in places:
        if os.path.isfile(place):
            place = os.path.dirname(place) or "."
        try:
            return transformers.AutoTokenizer.from_pretrained(place)
        except Exception:  # none there, in one of a dozen ways
            pass
    raise ValueError(
        f"no tokenizer: put that of {places[-1]} (vocab*, merges*, tokenizer*) beside the weights"
    )


OPEN_CLIP_NAMES = (
    ("^(?!visual|logit)", "text_model."),
    ("^visual.", "vision_model."),
    ("transformer.resblocks", "encoder.layers"),
    (".ln_([12])", r".layer_norm\1"),
    ("c_fc", "fc1"),
    ("c_proj", "fc2"),
    (r"\.attn\.", ".self_attn."),
    ("ln_pre", "pre_layrnorm"),
    ("ln_post", "post_layernorm"),
    ("ln_final", "final_layer_norm"),
    (r"(class_emb|token_emb)", r"embeddings.\1"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("conv1", "embeddings.patch_embedding"),
    ("text_model.text_projection", "text_projection.weight"),
    ("vision_model.proj", "visual_projection.weight"),
)


def clip_from_open_clip(state, config, dtype):
    """open_clip's state dict of a CLIP -> transformers' CLIPModel with the same features.

    config: keywords of CLIPConfig.
    """
    state = renamed(state, "", *OPEN_CLIP_NAMES)
    packed = [name for name in state if "attn.in_proj_" in name]  # query, key and value
    for name in packed:
        for letter, part in zip("qkv", state.pop(name).chunk(3)):
            state[name.replace("in_proj_", f"{letter}_proj.")] = part.clone()
    state.pop("text_model.attn_mask", None)
    for name in ("text_projection.weight", "visual_projection.weight"):
        if name in state:
            state[name] = state[name].T.contiguous()
    return load(
        transformers.CLIPModel,
        None,
        dtype,
        config=transformers.CLIPConfig(**config),
        state_dict=state,
    )


# ---- CLIP ----------------------------------------------------------------------------------------
class LastPictures:
    """What was found out about the last pictures, for the next reward that asks about the same ones.

    The reference to them is weak: they are not kept in memory. Their version is looked at, since they
    may be changed in place.
    """

    def __init__(self):
        self.forget()

    def forget(self):
        self.images = None
        self.key = None
        self.answer = None

    def keep(self, images, answer, how=None):
        self.images = weakref.ref(images)
        self.key = (images._version, how)
        self.answer = answer

    def get(self, images, how=None):
        """The answer, or None if these pictures, or this way to look at them, are others."""
        if self.images is None or self.images() is not images:
            return None
        return self.answer if self.key == (images._version, how) else None


class Clip:
    """A CLIP model with its tokenizer; features have length 1.

    It looks at the same pictures once and reads each prompt once, whichever rewards ask.
    """

    def __init__(self, model, tokenizer, dtype):
        self.model = model
        self.tokenizer = tokenizer
        self.text_dtype = torch.promote_types(dtype, torch.float32)
        self.last = LastPictures()
        self.text_feature = functools.lru_cache(10000)(self.read)

    def image_features(self, images, pixels=clip_pixels):
        """[B,3,H,W] in [0,1] -> [B,D]. pixels: the pre-processing."""
        with_graph = torch.is_grad_enabled() and images.requires_grad
        known = self.last.get(images, pixels)
        if known is not None and not with_graph:
            return known
        size = self.model.config.vision_config.image_size
        inputs = pixels(images, size).to(self.model.dtype)
        pooled = self.model.vision_model(pixel_values=inputs).pooler_output
        features = self.model.visual_projection(pooled).to(images.dtype)
        features = F.normalize(features, dim=-1)
        if with_graph:
            self.last.forget()
        else:
            self.last.keep(images, features, pixels)
        return features

    def text_features(self, prompts):
        """[B] -> [B,D], without gradient."""
        return torch.stack([self.text_feature(prompt) for prompt in prompts])

    @torch.no_grad()
    def read(self, prompt):
        """One prompt -> [D].

        It is read alone: beside others its last bits would depend on them, and so would a run that
        goes on after a stop.
        """
        ids = self.tokenizer(
            prompt,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        # No mask: nothing that follows a prompt's last token reaches it. transformers would look at the
        # mask, which waits for all that a GPU has to do.
        ids = sent(ids.input_ids, self.model.device)
        pooled = self.model.text_model(input_ids=ids).pooler_output
        features = self.model.text_projection(pooled).to(self.text_dtype)
        return F.normalize(features, dim=-1)[0]


@functools.cache  # clipscore, aesthetic and geneval share one; so do rewards trained on and held-out ones
def clip(path, device, dtype, file=None):
    """The Clip at path, a directory or a hub name.

    file: path is what `published` takes, and this the name of a ViT-H/14 in open_clip's format.
    """
    if file:
        model = clip_from_open_clip(published(path, file), VIT_H14, dtype)
    else:
        model = load(transformers.CLIPModel, path, dtype)
    model = model.to(device)
    return Clip(model, tokenizer_of(path, CLIP_L), dtype)


# ---- differentiable ------------------------------------------------------------------------------
def read_nothing(prompts, metadata):
    """For rewards that do not look at the prompt. [B] -> [B,0]"""
    return torch.empty(len(prompts), 0)


def in_two_parts(look, models=(), read=read_nothing):
    """A differentiable score: look(images, read(prompts, metadata)).

    read(prompts [B], metadata [B]) -> a tensor with a row for each, without gradient, whose rows have
    the same shape whatever is read (pad to a fixed length). look(images, text) -> [B]: a function of
    tensors alone, which a GPU records: no `.item()` in it, and no tensor that is made of Python's
    numbers, but for one that is kept (`of_channels`). models: what to move when memory is short.
    """

    def score(images, prompts, metadata):
        return look(images, read(prompts, metadata).to(images.device))

    score.read = read
    score.look = look
    score.models = models
    return score


def similarity(vit, scale, pixels=clip_pixels):
    """The score scale * cosine of picture and prompt under a Clip."""

    def look(images, text):
        return scale * (vit.image_features(images, pixels) * text.to(images)).sum(-1)

    def read(prompts, metadata):
        return vit.text_features(prompts)

    return in_two_parts(look, [vit.model], read)


def clipscore(path, device, dtype, clip_l):
    """CLIPScore: logits_per_image / 100, the cosine of picture and prompt under CLIP ViT-L/14."""
    vit_l = clip(path, device, dtype)
    return similarity(vit_l, vit_l.model.logit_scale.exp().item() / 100)


def pickscore(path, device, dtype, clip_l):
    """PickScore v1: exp(logit_scale) * cosine / 26 under a CLIP ViT-H/14 tuned on people's choices."""
    vit_h = clip(path, device, dtype)
    return similarity(vit_h, vit_h.model.logit_scale.exp().item() / 26)


def hpsv2(path, device, dtype, clip_l):
    """HPS v2.1: cosine under another ViT-H/14 tuned on people's choices, in open_clip's format."""
    vit_h = clip(path, device, dtype, "HPS_v2.1_compressed.pt")
    return similarity(vit_h, 1, padded_pixels)


def aesthetic(path, device, dtype, clip_l):
    """LAION's aesthetic predictor, roughly 1 to 10, which does not look at the prompt.

    It is a linear head on CLIP-L's image embedding.
    """
    vit_l = clip(clip_l, device, dtype)
    head = linear_head(published(path, "aesthetic-model.pth"), "layers", dtype).to(device)

    def look(images, text):
        return head(vit_l.image_features(images)).squeeze(-1)

    return in_two_parts(look, [vit_l.model, head])


BLIP_VISION_NAMES = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("blocks", "encoder.layers"),
    (r"\.norm([12])", r".layer_norm\1"),
    ("^norm", "post_layernorm"),
    ("attn.proj", "attn.projection"),
    (r"\.attn", ".self_attn"),
)


def imagereward(path, device, dtype, clip_l):
    """ImageReward v1.0: a head on the first token of a text that looks at the picture, standardised.

    The text goes through BLIP's encoder, which looks by cross attention.
    """
    state = published(path, "ImageReward.pt")
    vision_state = renamed(state, "blip.visual_encoder.", *BLIP_VISION_NAMES)
    text_state = renamed(state, "blip.text_encoder.")
    text_state.pop("embeddings.position_ids", None)  # a buffer
    vision_config = transformers.BlipVisionConfig(**BLIP_L[0])
    text_config = transformers.BlipTextConfig(**BLIP_L[1])
    vision = load(
        transformers.BlipVisionModel, None, dtype, config=vision_config, state_dict=vision_state
    ).to(device)
    text = load(
        transformers.BlipTextModel,
        None,
        dtype,
        config=text_config,
        state_dict=text_state,
        add_pooling_layer=False,
    ).to(device)
    head = linear_head(state, "mlp.layers", dtype).to(device)
    tokenizer = tokenizer_of(path, "google-bert/bert-base-uncased")

    def read(prompts, metadata):
        ids = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )
        return sent(torch.stack([ids.input_ids, ids.attention_mask], 1), text.device)

    def look(images, ids_and_mask):
        pixels = clip_pixels(images, vision_config.image_size).to(vision.dtype)
        seen = vision(pixel_values=pixels).last_hidden_state
        ids, is_token = ids_and_mask.unbind(1)
        # The mask as attention adds it: at one of 0 and 1 transformers would look, which waits for all
        # that a GPU has to do.
        mask = torch.zeros(ids.shape, dtype=text.dtype, device=ids.device)
        mask = mask.masked_fill(is_token == 0, torch.finfo(text.dtype).min)
        hidden = text(
            input_ids=ids, attention_mask=mask[:, None, None], encoder_hidden_states=seen
        ).last_hidden_state
        first = hidden[:, 0].to(head[0].weight.dtype)
        return (head(first).squeeze(-1) - 0.16717362830052426) / 1.0333394966054072

    return in_two_parts(look, [vision, text, head], read)


# ---- GenEval: its rules --------------------------------------------------------------------------
def geneval_relations(a, b):
    """Where box a = (x0, y0, x1, y1) lies seen from b -> a subset of RELATIONS; empty when too near."""
    a = np.reshape(a, (2, 2))  # two corners
    b = np.reshape(b, (2, 2))
    offset = a.mean(0) - b.mean(0)
    too_near = 0.1 * (a[1] - a[0] + b[1] - b[0])  # a tenth of their sizes
    beyond = np.maximum(abs(offset) - too_near, 0) * np.sign(offset)
    x, y = beyond / max(np.linalg.norm(offset), 1e-9)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {relation for relation, there in zip(RELATIONS, holds) if there}


def geneval_objects(found, metadata):
    """What counts as seen -> {class: its objects, the most confident first}.

    found: (class, confidence, box, ...) in any order. The thresholds are GenEval's: a confidence above
    .3, in the counting category above .9. At most 16 objects of a class; overlapping ones all count
    (an NMS threshold of 1).
    """
    threshold = 0.9 if metadata.get("tag") == "counting" else 0.3
    objects = {}
    for thing in sorted(found, key=lambda thing: -thing[1]):
        name, confidence = thing[:2]
        same = objects.setdefault(name, [])
        if confidence > threshold and len(same) < 16:
            same.append(thing)
    return objects


def geneval_placed(place, these, matched):
    """Whether all pairs of `these` objects and those of the target stand in the relation -> bool.

    place: [relation, number of the target entry]; matched: the objects of each entry so far, none
    where it does not hold, so that nothing is in place beside a target that is missing or wrong.
    """
    relation, target = place
    others = matched[target]
    return bool(others) and all(
        relation in geneval_relations(a[2], b[2]) for a in these for b in others
    )


def geneval_verdict(found, metadata, colours):
    """GenEval's rules -> bool: every "include" and no "exclude" of the metadata holds.

    Only the most confident objects, as many as are asked for, are looked at, so that more of them do
    no harm. found: as in geneval_objects; colours(class, objects) -> a colour for each.
    """
    objects = geneval_objects(found, metadata)
    matched = []  # the objects of each "include", none where it does not hold
    for want in metadata["include"]:
        these = objects.get(want["class"], [])[: want["count"]]
        good = len(these) == want["count"]
        if good and "color" in want:
            good = colours(want["class"], these).count(want["color"]) == want["count"]
        if good and "position" in want:
            good = geneval_placed(want["position"], these, matched)
        matched.append(these if good else [])
    too_many = any(
        len(objects.get(out["class"], [])) >= out["count"] for out in metadata.get("exclude", [])
    )
    return all(matched) and not too_many


def geneval_credit(found, metadata, colours):
    """The soft form of GenEval's rules, which rewards being nearly right.

    -> a score of at most 1, without a lower bound

    It is the mean over all parts of all "include" entries: one for the number of objects, one for the
    colour and one for the place where these are asked for. The number is exact, unlike the verdict's:
    an object too many costs as much as one too few, which is why "exclude" plays no part. A wrong
    number makes colour and place 0, since nobody knows which objects are meant. A place is one part,
    however many pairs of objects it is about. Arguments: as in geneval_verdict.
    """
    objects = geneval_objects(found, metadata)
    parts = []
    matched = []  # as in geneval_verdict
    for want in metadata["include"]:
        these = objects.get(want["class"], [])
        asked = want["count"]
        counted = len(these) == asked
        of_this = [1 - abs(asked - len(these)) / asked]
        if "color" in want:
            right = colours(want["class"], these).count(want["color"]) if counted else 0
            of_this.append(1 - abs(asked - right) / asked)
        if "position" in want:
            of_this.append(float(counted and geneval_placed(want["position"], these, matched)))
        parts += of_this
        matched.append(these if min(of_this) == 1 else [])
    return sum(parts) / len(parts)


def geneval_wrong(prompt, row):
    """What is wrong with GenEval metadata, or None."""
    include = row.get("include")
    exclude = row.get("exclude", [])
    if not include or not isinstance(include, list) or not isinstance(exclude, list):
        return (
            'no GenEval metadata: it needs lists, "include" and maybe "exclude", as in GenEval\'s '
            "evaluation_metadata.jsonl (or leave geneval and geneval_soft out)"
        )
    for number, want in enumerate(include + exclude):
        reason = geneval_wrong_entry(want, number)
        if reason:
            return reason
    return None


def geneval_wrong_entry(want, number):
    """What is wrong with an entry of "include" or "exclude", the number-th of both, or None."""
    if not isinstance(want, dict):
        want = {}
    count = want.get("count")
    if want.get("class") not in COCO or type(count) is not int or count < 1:
        return (
            '"include" and "exclude" need objects with a "class" of COCO\'s 80 (as GenEval writes '
            f'them) and a "count" from 1, not {str(want)[:80]}'
        )
    if want.get("color", "red") not in COLORS:
        return f"no colour of GenEval's: {want['color']!r}"
    if "position" in want and not is_place(want["position"], number):
        return (
            f'"position" must be [relation, number of an object before], not {want["position"]!r}'
        )
    return None


def is_place(place, number):
    """Is this a place of the number-th entry: [relation, number of an entry before]?"""
    if not isinstance(place, list) or len(place) != 2:
        return False
    relation, target = place
    return relation in RELATIONS and type(target) is int and target in range(number)


# ---- GenEval: what is in a picture ---------------------------------------------------------------
def detect(detector, images):
    """What a Mask2Former sees in pictures [B,3,H,W] in [0,1].

    -> for each, [(class, confidence, (x0, y0, x1, y1), mask [H,W])]. Sizes and confidences are those of
    mmdet, with which GenEval runs it.
    """
    size = images.shape[-2:]
    scale = min(800 / min(size), 1333 / max(size))
    scaled = [int(side * scale + 0.5) for side in size]
    padded = [side + -side % 32 for side in scaled]
    pixels = F.interpolate(images, scaled, mode="bilinear")
    pixels = normalise(pixels, IMAGENET_MEAN, IMAGENET_STD)
    bars = (0, padded[1] - scaled[1], 0, padded[0] - scaled[0])
    out = detector(pixel_values=F.pad(pixels, bars))
    probabilities = out.class_queries_logits.float().softmax(-1)[..., :-1]  # the last: nothing
    found = []
    for probability, logits in zip(probabilities.cpu(), out.masks_queries_logits):
        here = []
        for query, label in (probability > 0.3).nonzero().tolist():  # the mask can only lower it
            logit = F.interpolate(logits[None, [query]], padded, mode="bilinear")
            logit = logit[..., : scaled[0], : scaled[1]]
            logit = F.interpolate(logit, size, mode="bilinear")[0, 0]
            mask = logit > 0
            if mask.any():
                confidence = probability[query, label].item() * logit.sigmoid()[mask].mean().item()
                here.append((COCO[label], confidence, box_of(mask), mask))
        found.append(here)
    return found


def box_of(mask):
    """The smallest box around a mask [H,W] -> (x0, y0, x1, y1), the last row and column outside."""
    first, last = mask.nonzero().aminmax(dim=0)
    y0, x0 = first.tolist()
    y1, x1 = last.tolist()
    return x0, y0, x1 + 1, y1 + 1


class GenevalEyes:
    """GenEval's detector, and its classifier of colours: CLIP without training."""

    TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")

    def __init__(self, detector, vit):
        self.detector = detector
        self.vit = vit
        self.last = LastPictures()

    def look(self, images):
        """What `detect` finds."""
        found = self.last.get(images)
        if found is None:
            found = detect(self.detector, images)
            self.last.keep(images, found)
        return found

    def colours(self, image, name, objects):
        """The colour of each of these objects of a class: of what is inside its mask, on grey."""
        texts = [template.format(color, name) for color in COLORS for template in self.TEMPLATES]
        features = self.vit.text_features(texts).view(len(COLORS), len(self.TEMPLATES), -1)
        classifier = F.normalize(features.mean(1), dim=-1).to(image)
        seen = []
        for _, _, (x0, y0, x1, y1), mask in objects:
            cut_out = torch.where(mask, image, 0.6)[None, :, y0:y1, x0:x1]
            seen.append(self.vit.image_features(cut_out))
        likeness = torch.cat(seen) @ classifier.T
        return [COLORS[number] for number in likeness.argmax(1).tolist()]


@functools.cache  # geneval and geneval_soft share one detector
def geneval_eyes(path, device, dtype, clip_l):
    """The eyes with the detector at path; ValueError where it does not know COCO's classes."""
    detector = load(transformers.Mask2FormerForUniversalSegmentation, path, torch.float32)
    detector = detector.to(device)
    eyes = GenevalEyes(detector, clip(clip_l, device, dtype))
    if detector.config.num_labels != len(COCO):
        raise ValueError(f"a detector of {detector.config.num_labels} classes, not COCO's 80")
    return eyes


def geneval_by(rule, eyes):
    """What the eyes find, judged by rule(found, metadata, colours) -> score."""

    def score(images, prompts, metadata):
        scores = []
        for image, row, found in zip(images, metadata, eyes.look(images)):
            colours = functools.partial(eyes.colours, image)
            scores.append(float(rule(found, row, colours)))
        return torch.tensor(scores, device=images.device)  # float32, as all scores are

    score.models = [eyes.detector, eyes.vit.model]
    score.wrong = geneval_wrong
    return score


def geneval(path, device, dtype, clip_l):
    """GenEval: 1 where the objects that Mask2Former finds are those asked for, else 0."""
    return geneval_by(geneval_verdict, geneval_eyes(path, device, dtype, clip_l))


def geneval_soft(path, device, dtype, clip_l):
    """GenEval's soft form, to train on: a picture that is nearly right scores more than a wrong one."""
    return geneval_by(geneval_credit, geneval_eyes(path, device, dtype, clip_l))


# ---- text in pictures ----------------------------------------------------------------------------
# Pairs of quotation marks, those that nothing else looks like first.
QUOTES = (
    r'"([^"]+)"',
    r"[\u201c\u201d\u201e]([^\u201c\u201d\u201e]+)[\u201c\u201d]",  # English, German, Polish
    r"\u00ab([^\u00bb]+)\u00bb|\u00bb([^\u00ab]+)\u00ab",  # French, Russian; Danish
    r"[\u300c\u300e]([^\u300d\u300f]+)[\u300d\u300f]",  # Japanese, Chinese
    r"\u2039([^\u203a]+)\u203a",
    # Single ones, which are apostrophes too: not within a word, not '90s, and not the 'n' of rock 'n' roll.
    r"(?<!\w)['\u2018](?!\d0s\b)(?![nN]['\u2019])(.+?)['\u2019](?!\w)",
)


def quoted(prompt):
    """The text that a prompt wants to see written, i.e. what it has in quotes first, or None."""
    for pattern in QUOTES:
        found = re.search(pattern, prompt)
        if found:
            return next(filter(None, found.groups()))
    return None


def letters(text):
    """The text without spaces and in small letters."""
    return "".join(text.lower().split())


def text_similarity(read, wanted):
    """1 - edit distance / length of what is wanted, not below 0; 1 if it stands among other text."""
    if wanted in read:
        return 1.0
    row = list(range(len(wanted) + 1))  # edit distances of what is read so far, to each beginning
    for i, letter in enumerate(read, 1):
        last = row
        row = [i]
        for j, other in enumerate(wanted):
            replaced = last[j] + (letter != other)
            row.append(min(last[j + 1] + 1, row[j] + 1, replaced))
    return max(0.0, 1 - row[-1] / len(wanted))


def ocr(path, device, dtype, clip_l):
    """How well the quoted text is written: text_similarity of what RapidOCR reads."""
    from rapidocr import RapidOCR

    options = {"Global.log_level": "critical"}
    if path:
        options["Global.model_root_dir"] = path
    engine = RapidOCR(params=options)

    def score(images, prompts, metadata):
        scores = []
        for image, prompt in zip(to_pil(images), prompts):
            bgr = np.asarray(image)[:, :, ::-1]
            read = letters("".join(engine(bgr).txts or ()))
            scores.append(text_similarity(read, letters(quoted(prompt))))
        return torch.tensor(scores, device=images.device)

    def wrong(prompt, row):
        if not letters(quoted(prompt) or ""):
            return "no text in quotes, which ocr looks for"
        return None

    score.wrong = wrong
    return score


# ---- models that are asked -----------------------------------------------------------------------
def qwen_inputs(tokenizer, eyes, questions, images):
    """Inputs of a Qwen-VL, one question about each picture.

    Not through its processor, which would need torchvision for videos.
    """
    seen = eyes(images=to_pil(images), return_tensors="pt")
    chats = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chats.append([{"role": "user", "content": content}])
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    pad = "<|image_pad|>"
    lengths = seen["image_grid_thw"].prod(1) // eyes.merge_size**2  # tokens of each picture
    texts = [text.replace(pad, pad * n, 1) for text, n in zip(texts, lengths.tolist())]
    read = tokenizer(texts, padding=True, return_tensors="pt")
    read["mm_token_type_ids"] = (read.input_ids == tokenizer.convert_tokens_to_ids(pad)).int()
    return {**seen.to(images.device), **read.to(images.device)}


def constants_of(path):
    """{name: value} of the constants in a Python file, which is read and not run."""
    with open(path, encoding="utf-8") as file:
        body = ast.parse(file.read()).body
    return {
        line.targets[0].id: line.value.value
        for line in body
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
    }


def hpsv3(path, device, dtype, clip_l):
    """HPSv3: the mean of a reward head on Qwen2-VL-7B at its token <|Reward|>.

    path: a directory with MizzenAI/HPSv3's HPSv3.safetensors, the files of Qwen/Qwen2-VL-7B-Instruct
    without its weights, and data_collator_qwen.py of their code, which has the wording.
    """
    wording = constants_of(os.path.join(path, "data_collator_qwen.py"))
    state = published(path, "HPSv3.safetensors")
    config = transformers.AutoConfig.from_pretrained(path)
    pixels = 256 * 28 * 28
    eyes = transformers.Qwen2VLImageProcessorPil.from_pretrained(
        path, size={"shortest_edge": pixels, "longest_edge": pixels}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="right")
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    token = tokenizer.convert_tokens_to_ids("<|Reward|>")
    head = linear_head(state, "rm_head", dtype, (0, 3, 5)).to(device)
    heads = ("rm_head", "lm_head")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
    language = (r"^model\.(?!visual|language)", "language_model.")
    state = renamed(state, "", language, (r"^model\.", ""))
    config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
    model = load(transformers.Qwen2VLModel, None, dtype, config=config, state_dict=state)
    model = model.to(device)

    def score(images, prompts, metadata):
        questions = []
        for prompt in prompts:
            instruction = wording["INSTRUCTION"].format(text_prompt=prompt)
            questions.append(instruction + wording["prompt_with_special_token"])
        inputs = qwen_inputs(tokenizer, eyes, questions, images)
        hidden = model(**inputs).last_hidden_state[inputs["input_ids"] == token]
        hidden = head[0](hidden.to(head[0].weight.dtype)).relu()
        mean_and_uncertainty = head[2](head[1](hidden).relu())
        return mean_and_uncertainty[:, 0]

    score.models = [model, head]
    return score


def first_tokens(tokenizer, answer):
    """The first token of each way to write an answer."""
    ways = {answer, answer.lower(), answer.capitalize()}
    if answer.lower() in NUMBERS:
        ways.add(str(NUMBERS.index(answer.lower())))
    tokens = set()
    for way in ways:
        for written in (way, f" {way}"):
            tokens.add(tokenizer.encode(written, add_special_tokens=False)[0])
    return sorted(tokens)


def is_question(pair):
    """Is this a [question, answer] pair?"""
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    return all(type(text) is str and text for text in pair)


def geneval2_wrong(prompt, row):
    """What is wrong with GenEval 2's metadata, or None."""
    pairs = row.get("vqa_list")
    if isinstance(pairs, list) and pairs and all(is_question(pair) for pair in pairs):
        return None
    return 'it needs GenEval 2\'s [question, answer] pairs under "vqa_list"'


def geneval2(path, device, dtype, clip_l):
    """GenEval 2's Soft-TIFA: Qwen3-VL's probability of the right answer.

    The geometric mean over the prompt's questions, "vqa_list" in its metadata.
    """
    model = load(transformers.Qwen3VLForConditionalGeneration, path, dtype).to(device)
    eyes = transformers.Qwen2VLImageProcessorPil.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")

    def score_of(image, pairs):
        questions = [f"{question} Answer in one word." for question, _ in pairs]
        same_image = image.expand(len(questions), -1, -1, -1)
        inputs = qwen_inputs(tokenizer, eyes, questions, same_image)
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]
        probabilities = logits.float().softmax(-1)
        right = []
        for probability, (_, answer) in zip(probabilities, pairs):
            right.append(probability[first_tokens(tokenizer, answer)].sum())
        return torch.stack(right).clamp(min=1e-12).log().mean().exp()

    def score(images, prompts, metadata):
        scores = [score_of(image, row["vqa_list"]) for image, row in zip(images, metadata)]
        return torch.stack(scores)

    score.models = [model]
    score.wrong = geneval2_wrong
    return score


# ---- the tiny world ------------------------------------------------------------------------------
def checker(path, device, dtype, clip_l):
    """tiny.py's exact checker of shapes, numbers, colours and places: 1 if all is right, else 0."""
    known = {row["prompt"]: row for row in tiny.captions()}

    def row_of(prompt, row):
        return row if "include" in row else known.get(prompt)

    def score(images, prompts, metadata):
        found = tiny.detect(images.detach())
        rows = [row_of(prompt, row) for prompt, row in zip(prompts, metadata)]
        right = [float(tiny.check(things, row)) for things, row in zip(found, rows)]
        return torch.tensor(right, device=images.device)

    def wrong(prompt, row):
        if tiny.well_formed(row_of(prompt, row)):
            return None
        return (
            'the checker knows only captions of tiny.py\'s world, with "include" as '
            "tiny.captions() writes it or without metadata; leave it out of the rewards"
        )

    score.wrong = wrong
    return score


# ---- all of them ---------------------------------------------------------------------------------
MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
AESTHETIC = "trl-lib/ddpo-aesthetic-predictor"  # its file is sac+logos+ava1-l14-linearMSE.pth
# Of the weights, None: only --reward_path says where they are; "": there are none to be loaded.
REWARDS = {  # name: (loader, differentiable, where its weights are: hub name, and for some the file there)
    "clipscore": (clipscore, True, CLIP_L),
    "pickscore": (pickscore, True, "yuvalkirstain/PickScore_v1"),
    "hpsv2": (hpsv2, True, "xswu/HPSv2"),  # HPS_v2.1_compressed.pt
    "imagereward": (imagereward, True, "zai-org/ImageReward"),  # ImageReward.pt
    "aesthetic": (aesthetic, True, AESTHETIC),  # aesthetic-model.pth
    "geneval": (geneval, False, MASK2FORMER),
    "geneval_soft": (geneval_soft, False, MASK2FORMER),
    "ocr": (ocr, False, ""),  # pip install rapidocr onnxruntime: the package brings its weights
    "hpsv3": (hpsv3, False, None),  # a directory that is put together by hand: see the function
    "geneval2": (geneval2, False, "Qwen/Qwen3-VL-8B-Instruct"),
    "judge": (clipscore, True, None),  # a second CLIP that nothing was trained on
    "checker": (checker, False, ""),
}
# A reward without a --reward_path of its own takes that of the other one.
SAME_WEIGHTS = {"geneval_soft": "geneval"}


def parse_weights(text):
    """ "clipscore:1,checker:0.5" -> {"clipscore": 1.0, "checker": 0.5}; a name alone weighs 1.

    ValueError says what is wrong.
    """
    weights = {}
    for item in text.split(","):
        name, _, weight = item.strip().partition(":")
        if name not in REWARDS:
            raise ValueError(f"unknown reward {name!r}; there are {', '.join(REWARDS)}")
        if name in weights:
            raise ValueError(f"reward {name!r} is named twice")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ValueError(f"the weight of reward {name!r} must be a number, got {weight!r}")
    return weights


def build(weights, device, paths=(), dtype=torch.float32, batch=0):
    """Load the rewards that are asked for -> list of callables (see the top of this file).

    weights: {"clipscore": 1.0, ...} or "clipscore:1,..."; paths: "name=PATH" strings that replace the
    hub names; dtype: of the models, scores are float32; batch: pictures a model looks at at once, 0:
    all. ValueError says in one line what cannot be; a GPU without room for a model ends the program.
    """
    if isinstance(weights, str):
        weights = parse_weights(weights)
    places = parse_paths(paths)
    clip_l = places.get("clipscore", CLIP_L)
    rewards = []
    for name, weight in weights.items():
        loader, differentiable, hub = REWARDS[name]
        given = places.get(name, places.get(SAME_WEIGHTS.get(name)))
        place = hub if given is None else given
        if place is None:
            raise ValueError(
                f"reward {name}: its model is not given; give --reward_path {name}=PATH"
            )
        if given is not None and not os.path.exists(place):
            raise ValueError(
                f"reward {name}: {place}: no such file or directory; give --reward_path {name}=PATH"
            )
        try:
            if given is None and is_hub_id(place):
                files_on_hub(place)  # once, before a library asks for file after file
            score = loader(place, str(device), dtype, clip_l)
        except torch.cuda.OutOfMemoryError as e:
            remedy = "give --reward_dtype bfloat16 or, in stage 2, --low_memory"
            die(f"reward {name}: no room for it on the GPU ({shortened(e)}); {remedy}", local=True)
        except Exception as e:  # a directory can be wrong in a dozen ways
            raise ValueError(cannot_load(name, place, hub, e)) from None
        rewards.append(ready(score, name, weight, differentiable, batch))
    return rewards


def build_for(rows, weights, device, paths=(), dtype=torch.float32):
    """As `build`, for these rows of prompts: each reward looks at their metadata, and is `guarded`."""
    rewards = build(weights, device, paths, dtype)
    prompts = [row["prompt"] for row in rows]
    metadata = [row["metadata"] for row in rows]
    for reward in rewards:
        reward.check(prompts, metadata)
    return [guarded(reward) for reward in rewards]


def parse_paths(paths):
    """["name=PATH"] -> {name: PATH}; ValueError where one is no such thing."""
    places = {}
    for item in paths:
        name, _, place = item.partition("=")
        places[name] = place
    if not all(name in REWARDS and place for name, place in places.items()):
        raise ValueError(
            "a reward path must read name=DIRECTORY (or FILE) with a name of "
            f"{', '.join(REWARDS)}; got {', '.join(paths)}"
        )
    return places


def paths_of(weights, paths):
    """Those of the "name=PATH" strings that the rewards in `weights` may use.

    clipscore's is always among them: others share its CLIP ViT-L.
    """
    used = {"clipscore", *weights}
    used.update(SAME_WEIGHTS[name] for name in weights if name in SAME_WEIGHTS)
    return [pair for pair in paths if pair.partition("=")[0] in used]


def cannot_load(name, place, hub, error):
    """Why a reward cannot be loaded, and what to do, in one line."""
    reason = in_words(error, place)
    if isinstance(error, KeyError):
        reason = f"no {error} in it"
    what = f"download {hub or 'it'} and give --reward_path {name}=PATH"
    if isinstance(error, ImportError):
        what = f"pip install {error.name or 'what it names'}"
    return f"reward {name}: cannot load {place or 'it'} ({reason}); {what}"


def ready(score, name, weight, differentiable, batch):
    """A loaded score as the training loop wants it.

    It checks the pictures, looks at `batch` of them at a time, and has its attributes.
    """
    wrong = getattr(score, "wrong", None)
    models = getattr(score, "models", [])
    if differentiable and not hasattr(score, "look"):
        raise ValueError(f"reward {name} is to be differentiable: let it be made by `in_two_parts`")
    if not differentiable:
        score = torch.no_grad()(score)

    def reward(images, prompts, metadata):
        check(prompts, metadata)
        if not reward.has_seen:  # the first ones alone: to look at them is to wait for the GPU
            check_pictures(images, name)
            reward.has_seen = True
        if not batch or len(images) <= batch:
            return score(images, prompts, metadata)
        with_graph = torch.is_grad_enabled() and images.requires_grad
        scores = []
        for i in range(0, len(images), batch):
            rows = slice(i, i + batch)
            part = (images[rows], prompts[rows], metadata[rows])
            if with_graph:  # one part's activations at a time: backward computes them again
                scores.append(checkpoint(score, *part, use_reentrant=False))
            else:
                scores.append(score(*part))
        return torch.cat(scores)

    def check(prompts, metadata):
        if wrong:
            each(prompts, metadata, wrong)

    reward.has_seen = False
    reward.name = name
    reward.weight = weight
    reward.differentiable = differentiable
    reward.models = models
    reward.check = check
    if differentiable:
        reward.read = score.read
        reward.look = score.look
    return reward


def check_pictures(images, name):
    """ValueError unless they are pictures [B,3,H,W] in [0,1]; nan is not."""
    values = images.detach()
    inside = (values >= 0) & (values <= 1)
    if images.dim() != 4 or images.shape[1] != 3 or not inside.all():
        raise ValueError(
            f"reward {name}: pictures must be [B,3,H,W] with finite numbers in [0,1], got "
            f"{list(images.shape)} in [{images.min().item():.3g}, {images.max().item():.3g}]"
        )


def guarded(reward):
    """The same reward, but one that fails ends the run with its name and, where it has them, the prompts.

    To fail is to raise, to give scores that are not one a picture, to change the pictures, which other
    rewards see, too, or to have no gradient where there should be one.
    """

    @functools.wraps(reward)
    def call(images, prompts, metadata):
        with ending_the_run(reward.name, prompts), as_it_was(images):
            return one_each(reward(images, prompts, metadata), images)

    def read(prompts, metadata):
        with ending_the_run(reward.name, prompts):
            return a_row_each(reward.read(prompts, metadata), prompts)

    def look(images, text):  # called text, whatever the reward calls it
        with ending_the_run(reward.name), as_it_was(images):
            scores = one_each(reward.look(images, text), images)
            if torch.is_grad_enabled() and images.requires_grad and not scores.requires_grad:
                raise ValueError("its scores have no gradient: say False in its line of REWARDS")
            return scores

    if reward.differentiable:
        call.read = read
        call.look = look
    return call


@contextlib.contextmanager
def ending_the_run(name, prompts=()):
    """With it an error ends the run with one line: which reward, and on which prompts."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise  # fewer pictures are the remedy: see common.peak and common.explain_full_memory
    except Exception as e:
        different = dict.fromkeys(repr(prompt[:80]) for prompt in prompts)
        some = ", ".join(list(different)[:9])
        where = f" on {some}" if some else ""
        remedy = ""
        recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if recording:  # not recorded, the same has run before
            remedy = (
                ". The GPU was recording its look, which must be a function of tensors alone, without "
                ".item() and .cpu(), say; --graphs 0 does without recording"
            )
        what = f"{type(e).__name__}: {shortened(e)}"
        die(f"reward {name} failed{where}: {what}{remedy}", status=1, local=True)


@contextlib.contextmanager
def as_it_was(images):
    """With it a change of the pictures in place is a ValueError."""
    before = images._version  # PyTorch's count of changes
    yield
    if images._version != before:
        raise ValueError("it changes the pictures in place, which other rewards see, too")


def one_each(scores, images):
    """The scores; ValueError unless they are a tensor with one a picture."""
    if not torch.is_tensor(scores):
        raise ValueError(f"its scores are no tensor, but {type(scores).__name__}")
    if scores.shape != (len(images),):
        raise ValueError(
            f"it gave scores of shape {tuple(scores.shape)} for {len(images)} pictures"
        )
    return scores


def a_row_each(text, prompts):
    """What was read; ValueError unless it is a tensor with a row for each prompt."""
    if not torch.is_tensor(text) or len(text) != len(prompts):
        what = f"of shape {tuple(text.shape)}" if torch.is_tensor(text) else type(text).__name__
        raise ValueError(
            f"its read must give a tensor with a row for each of {len(prompts)} prompts, gave {what}"
        )
    return text


def move(rewards, device):
    """All models of these rewards to a device."""
    for reward in rewards:
        for model in reward.models:
            model.to(device)


@contextlib.contextmanager
def brought(rewards, device, wait_on_cpu):
    """With it the models of these rewards are on the device, where they otherwise wait on the CPU.

    Nothing moves unless they do wait (--low_memory).
    """
    if not wait_on_cpu:
        yield
        return
    try:
        move(rewards, device)
        yield
    finally:  # there may be no room for them
        move(rewards, "cpu")
