"""Rewards: what a picture is worth. One function each, and `build` to load the ones that are asked for.

A reward is a callable (images [B,3,H,W] float in [0,1], prompts [B], metadata [B]) -> scores [B] float32, with the attributes
`name`, `weight`, `differentiable`, `models` (what to move when memory is short) and `check(prompts, metadata)`, which raises ValueError
for prompts that it cannot score.

To add a tenth: copy `aesthetic`, a function (path, device, dtype, clip_l) -> score(images, prompts, metadata) with score.models, and name
it in REWARDS. path is what --reward_path gives, clip_l where CLIP ViT-L/14 is, which several share. A gradient sees the raw score: see
--margin. Picky about prompts: score.wrong, as `ocr` has it.
"""

import ast
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

from common import die
from prompts import COCO, COLORS, NUMBERS, RELATIONS, each

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_L = "openai/clip-vit-large-patch14"  # its tokenizer serves every CLIP here: they all speak the same 49408 tokens
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
        eos_token_id=2,
    ),
)  # 2: pool where the token number is highest, as open_clip does; that is <|endoftext|>
BLIP_L = (
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
        is_decoder=True,
    ),
)  # i.e. cross attention


# ---------------------------------------------------------------------------------------------- pictures, with gradient
def resize(images, new):
    """Bicubic and anti-aliased, as PIL does it. [B,3,H,W] in [0,1] -> [B,3,*new] in [0,1]"""
    return (
        images
        if images.shape[-2:] == new
        else F.interpolate(images, new, mode="bicubic", antialias=True, align_corners=False).clamp(
            0, 1
        )
    )


def normalise(images, mean=CLIP_MEAN, std=CLIP_STD):
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


def clip_pixels(images, size):
    """CLIP's own pre-processing, differentiable: shorter side to `size`, centre crop, normalise. [B,3,H,W] in [0,1] -> [B,3,size,size]"""
    height, width = images.shape[-2:]
    images = resize(
        images, (size * height // min(height, width), size * width // min(height, width))
    )
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return normalise(images[..., top : top + size, left : left + size])


def padded_pixels(images, size):
    """HPS v2's: longer side to `size`, black bars to a square, normalise. [B,3,H,W] in [0,1] -> [B,3,size,size]"""
    height, width = images.shape[-2:]
    images = resize(
        images,
        (round(height * size / max(height, width)), round(width * size / max(height, width))),
    )
    down, right = size - images.shape[-2], size - images.shape[-1]
    return normalise(F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2)))


def to_pil(images):
    return [
        Image.fromarray(x)
        for x in (images.detach() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    ]


# --------------------------------------------------------------------------------------------- published checkpoints
def published(path, file):
    """The tensors of a checkpoint. path: the file itself, the directory it is in, or owner/repository on the hub. No code in it is run."""
    path = path if os.path.exists(path) else hf_hub_download(path, file)
    path = os.path.join(path, file) if os.path.isdir(path) else path
    state = (
        load_file(path)
        if path.endswith(".safetensors")
        else torch.load(path, map_location="cpu", weights_only=True)
    )
    return state.get("state_dict", state)


def renamed(state, start, *table):
    """{name: tensor} of the names that begin with `start`, the rest rewritten by the (regular expression, replacement) pairs in turn."""
    rename = lambda name: functools.reduce(lambda n, pair: re.sub(*pair, n), table, name)
    return {rename(k[len(start) :]): v for k, v in state.items() if k.startswith(start)}


def load(model_class, path, dtype, **options):
    """A transformers model, frozen; from path, or (None) from options config and state_dict. ValueError unless all its weights are there."""
    model, info = model_class.from_pretrained(
        path, dtype=dtype, output_loading_info=True, **options
    )
    missing = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing or path is None and info["unexpected_keys"]:
        raise ValueError(
            f"not the weights of a {model_class.__name__}: {[*missing, *info['unexpected_keys']][0]} is missing or strange"
        )
    return model.requires_grad_(False).eval()


def linear_head(state, key, dtype, layers=(0, 2, 4, 6, 7)):
    """The linear layers of a published nn.Sequential, in at least float32. What lies between those of the default is dropout."""
    linear = [torch.nn.Linear(*reversed(state[f"{key}.{i}.weight"].shape)) for i in layers]
    for i, layer in zip(layers, linear):
        layer.load_state_dict(renamed(state, f"{key}.{i}."))
    return (
        torch.nn.Sequential(*linear)
        .to(torch.promote_types(dtype, torch.float32))
        .requires_grad_(False)
    )


def tokenizer_of(*places):
    """The tokenizer in the first of these directories (a file counts as its directory) or hub names that has one. ValueError."""
    for place in places:
        try:
            return transformers.AutoTokenizer.from_pretrained(
                os.path.dirname(place) or "." if os.path.isfile(place) else place
            )
        except Exception:  # none there, in one of a dozen ways
            pass
    raise ValueError(
        f"no tokenizer: put that of {places[-1]} (vocab*, merges*, tokenizer*) beside the weights"
    )


def clip_from_open_clip(state, config, dtype):
    """open_clip's state dict of a CLIP -> transformers' CLIPModel with the same features. config: keywords of CLIPConfig."""
    state = renamed(
        state,
        "",
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
    for key in [k for k in state if "attn.in_proj_" in k]:  # query, key and value in one matrix
        for letter, part in zip("qkv", state.pop(key).chunk(3)):
            state[key.replace("in_proj_", f"{letter}_proj.")] = part.clone()
    state.pop("text_model.attn_mask", None)
    state.update(
        {
            k: v.T.contiguous()
            for k, v in state.items()
            if k in ("text_projection.weight", "visual_projection.weight")
        }
    )
    return load(
        transformers.CLIPModel,
        None,
        dtype,
        config=transformers.CLIPConfig(**config),
        state_dict=state,
    )


@functools.cache  # clipscore, aesthetic and geneval share one CLIP-L; so do rewards trained on and held-out ones
def clip(path, device, dtype, file=None):
    """-> (model, image_features(images, pixels=clip_pixels) [B,D], text_features(prompts) [B,D]); features have length 1. path: a CLIP's
    directory or hub name; with `file`, what `published` takes: a ViT-H/14 in open_clip's format."""
    model = (
        clip_from_open_clip(published(path, file), VIT_H14, dtype)
        if file
        else load(transformers.CLIPModel, path, dtype)
    )
    model, tokenizer, last = model.to(device), tokenizer_of(path, CLIP_L), []

    def image_features(images, pixels=clip_pixels):
        graph = torch.is_grad_enabled() and images.requires_grad
        if not graph and last and last[0]() is images and last[1:3] == [images._version, pixels]:
            return last[3]  # another reward has just asked about the same pictures
        inputs = pixels(images, model.config.vision_config.image_size).to(model.dtype)
        features = F.normalize(
            model.visual_projection(model.vision_model(pixel_values=inputs).pooler_output).to(
                images.dtype
            ),
            dim=-1,
        )
        last[:] = [] if graph else [weakref.ref(images), images._version, pixels, features]
        return features

    @functools.lru_cache(10000)
    @torch.no_grad()
    def text_feature(
        prompt,
    ):  # each once, and alone: beside others its last bits would depend on them, and so would a resumed run
        ids = tokenizer(
            prompt,
            padding="max_length",
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(model.device)
        features = model.text_projection(model.text_model(**ids).pooler_output).to(
            torch.promote_types(dtype, torch.float32)
        )
        return F.normalize(features, dim=-1)[0]

    return (
        model,
        image_features,
        lambda prompts: torch.stack([text_feature(prompt) for prompt in prompts]),
    )


# ------------------------------------------------------------------------------------------------------- differentiable
def similarity(parts, scale, pixels=clip_pixels):
    """scale * cosine of picture and prompt under a CLIP. parts: as `clip` gives them."""
    model, image_features, text_features = parts
    score = lambda images, prompts, metadata: (
        scale * (image_features(images, pixels) * text_features(prompts).to(images)).sum(-1)
    )
    score.models = [model]
    return score


def clipscore(path, device, dtype, clip_l):
    """CLIPScore: logits_per_image / 100, the cosine of picture and prompt under CLIP ViT-L/14."""
    parts = clip(path, device, dtype)
    return similarity(parts, parts[0].logit_scale.exp().item() / 100)


def pickscore(path, device, dtype, clip_l):
    """PickScore v1: exp(logit_scale) * cosine / 26 under a CLIP ViT-H/14 tuned on people's choices."""
    parts = clip(path, device, dtype)
    return similarity(parts, parts[0].logit_scale.exp().item() / 26)


def hpsv2(path, device, dtype, clip_l):
    """HPS v2.1: cosine under another ViT-H/14 tuned on people's choices, published in open_clip's format."""
    return similarity(clip(path, device, dtype, "HPS_v2.1_compressed.pt"), 1, padded_pixels)


def aesthetic(path, device, dtype, clip_l):
    """LAION's aesthetic predictor, roughly 1 to 10: a linear head on CLIP-L's image embedding. It does not look at the prompt."""
    model, image_features, _ = clip(clip_l, device, dtype)
    head = linear_head(published(path, "aesthetic-model.pth"), "layers", dtype).to(device)
    score = lambda images, prompts, metadata: head(image_features(images)).squeeze(-1)
    score.models = [model, head]
    return score


def imagereward(path, device, dtype, clip_l):
    """ImageReward v1.0: BLIP's text encoder looks at the picture by cross attention; a head on its first token; standardised."""
    state = published(path, "ImageReward.pt")
    vision = renamed(
        state,
        "blip.visual_encoder.",
        ("cls_token", "embeddings.class_embedding"),
        ("pos_embed", "embeddings.position_embedding"),
        ("patch_embed.proj", "embeddings.patch_embedding"),
        ("blocks", "encoder.layers"),
        (r"\.norm([12])", r".layer_norm\1"),
        ("^norm", "post_layernorm"),
        ("attn.proj", "attn.projection"),
        (r"\.attn", ".self_attn"),
    )
    text = {
        k: v
        for k, v in renamed(state, "blip.text_encoder.").items()
        if not k.endswith("position_ids")
    }
    see, read = transformers.BlipVisionConfig(**BLIP_L[0]), transformers.BlipTextConfig(**BLIP_L[1])
    vision = load(transformers.BlipVisionModel, None, dtype, config=see, state_dict=vision).to(
        device
    )
    text = load(
        transformers.BlipTextModel,
        None,
        dtype,
        config=read,
        state_dict=text,
        add_pooling_layer=False,
    ).to(device)
    head, tokenizer = (
        linear_head(state, "mlp.layers", dtype).to(device),
        tokenizer_of(path, "google-bert/bert-base-uncased"),
    )

    def score(images, prompts, metadata):
        seen = vision(
            pixel_values=clip_pixels(images, see.image_size).to(vision.dtype)
        ).last_hidden_state
        ids = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        ).to(images.device)
        first = text(
            input_ids=ids.input_ids, attention_mask=ids.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state[:, 0]
        return (
            head(first.to(head[0].weight.dtype)).squeeze(-1) - 0.16717362830052426
        ) / 1.0333394966054072

    score.models = [vision, text, head]
    return score


# --------------------------------------------------------------------------------------------------- not differentiable
def geneval_relations(a, b):
    """Where box a = (x0, y0, x1, y1) lies seen from b -> a subset of {"left of", "right of", "above", "below"}; empty when too near."""
    a, b = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))  # two corners each
    offset = a.mean(0) - b.mean(0)
    beyond = np.maximum(abs(offset) - 0.1 * (a[1] - a[0] + b[1] - b[0]), 0) * np.sign(
        offset
    )  # a tenth of their sizes
    x, y = beyond / max(np.linalg.norm(offset), 1e-9)
    return {name for name, there in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)) if there}


def geneval_objects(found, metadata):
    """What counts as seen -> {class: its objects, the most confident first}.

    found: (class, confidence, box, ...) in any order. The thresholds are GenEval's: a confidence above .3, in the counting
    category above .9. At most 16 objects of a class; overlapping ones all count (an NMS threshold of 1).
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
    """Whether all pairs of `these` objects and those of the target entry stand in the relation that is asked for -> bool.

    place: [relation, number of the target entry]; matched: the objects of each entry so far, none where it does not hold,
    so that nothing is in place beside a target that is missing or wrong.
    """
    relation, target = place
    others = matched[target]
    return bool(others) and all(
        relation in geneval_relations(a[2], b[2]) for a in these for b in others
    )


def geneval_verdict(found, metadata, colours):
    """GenEval's rules -> bool: every "include" and no "exclude" of the metadata holds.

    Only the most confident objects, as many as are asked for, are looked at, so that more of them do no harm.
    found: as in geneval_objects; colours(class, objects) -> a colour for each.
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
    """The soft form of GenEval's rules, which rewards being nearly right -> a score of at most 1, without a lower bound.

    It is the mean over all parts of all "include" entries: one for the number of objects, one for the colour and one for the
    place where these are asked for. The number is exact, unlike the verdict's: an object too many costs as much as one too
    few, which is why "exclude" plays no part. A wrong number makes colour and place 0, since nobody knows which objects are
    meant. A place is one part, however many pairs of objects it is about. Arguments: as in geneval_verdict.
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
    include, exclude = row.get("include"), row.get("exclude", [])
    if not include or not isinstance(include, list) or not isinstance(exclude, list):
        return 'no GenEval metadata: it needs lists, "include" and maybe "exclude", as in GenEval\'s evaluation_metadata.jsonl (or leave geneval and geneval_soft out)'
    for i, want in enumerate(include + exclude):
        want = want if isinstance(want, dict) else {}
        place = want.get("position")
        if want.get("class") not in COCO or type(want.get("count")) is not int or want["count"] < 1:
            return f'"include" and "exclude" need objects with a "class" of COCO\'s 80 (as GenEval writes them) and a "count" from 1, not {str(want)[:80]}'
        if want.get("color", "red") not in COLORS:
            return f"no colour of GenEval's: {want['color']!r}"
        if "position" in want and not (
            isinstance(place, list)
            and len(place) == 2
            and place[0] in RELATIONS
            and type(place[1]) is int
            and place[1] in range(i)
        ):
            return f'"position" must be [relation, number of an object before], not {place!r}'


def detect(detector, images):
    """What a Mask2Former sees in pictures [B,3,H,W] in [0,1] -> for each, [(class, confidence, (x0, y0, x1, y1), mask [H,W])]. Sizes and
    confidences are those of mmdet, with which GenEval runs it."""
    size = images.shape[-2:]
    scale = min(800 / min(size), 1333 / max(size))
    new = [int(side * scale + 0.5) for side in size]
    whole = [side + -side % 32 for side in new]
    pixels = normalise(
        F.interpolate(images, new, mode="bilinear"), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    out, all_found = (
        detector(pixel_values=F.pad(pixels, (0, whole[1] - new[1], 0, whole[0] - new[0]))),
        [],
    )
    for logits, masks in zip(
        out.class_queries_logits.float().softmax(-1)[..., :-1].cpu(), out.masks_queries_logits
    ):
        all_found.append([])
        for query, label in (
            (logits > 0.3).nonzero().tolist()
        ):  # the mask can only lower the confidence
            mask = F.interpolate(masks[None, [query]], whole, mode="bilinear")[
                ..., : new[0], : new[1]
            ]
            mask = F.interpolate(mask, size, mode="bilinear")[0, 0]
            inside = mask > 0
            if inside.any():
                (y0, x0), (y1, x1) = (end.tolist() for end in inside.nonzero().aminmax(dim=0))
                confidence = logits[query, label].item() * mask.sigmoid()[inside].mean().item()
                all_found[-1].append((COCO[label], confidence, (x0, y0, x1 + 1, y1 + 1), inside))
    return all_found


@functools.cache  # geneval and geneval_soft share one detector
def geneval_eyes(path, device, dtype, clip_l):
    """Detector and colour classifier -> (models, look(images) -> what `detect` finds, colours(image, class, objects) -> [colour])."""
    detector = load(transformers.Mask2FormerForUniversalSegmentation, path, torch.float32).to(
        device
    )
    model, image_features, text_features = clip(clip_l, device, dtype)
    if detector.config.num_labels != len(COCO):
        raise ValueError(f"a detector of {detector.config.num_labels} classes, not COCO's 80")
    last = []  # the pictures that were looked at last, and what was found

    def look(images):
        if last and last[0]() is images and last[1] == images._version:
            return last[2]  # the other of the two rewards has just asked about the same pictures
        found = detect(detector, images)
        last[:] = [weakref.ref(images), images._version, found]
        return found

    def colours(image, name, objects):  # the object cut out on grey
        templates = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
        texts = [template.format(color, name) for color in COLORS for template in templates]
        classifier = F.normalize(text_features(texts).view(len(COLORS), 3, -1).mean(1), dim=-1).to(
            image
        )
        cut = [
            torch.where(mask, image, 0.6)[None, :, y0:y1, x0:x1]
            for _, _, (x0, y0, x1, y1), mask in objects
        ]
        return [
            COLORS[i]
            for i in (torch.cat([image_features(c) for c in cut]) @ classifier.T).argmax(1).tolist()
        ]

    return [detector, model], look, colours


def geneval_by(rule, path, device, dtype, clip_l):
    """GenEval's detector and colour classifier, their findings judged by rule(found, metadata, colours) -> score."""
    models, look, colours = geneval_eyes(path, device, dtype, clip_l)

    def score(images, prompts, metadata):
        scores = []
        for image, row, found in zip(images, metadata, look(images)):
            scores.append(float(rule(found, row, functools.partial(colours, image))))
        return torch.tensor(scores, device=images.device)  # float32, as all scores are

    score.models = models
    score.wrong = geneval_wrong
    return score


def geneval(path, device, dtype, clip_l):
    """GenEval: 1 where the objects that Mask2Former finds are those asked for, else 0. GenEval's rules; colours by zero-shot CLIP-L."""
    return geneval_by(geneval_verdict, path, device, dtype, clip_l)


def geneval_soft(path, device, dtype, clip_l):
    """GenEval's soft form, to train on: a picture that is nearly right scores more than one that is all wrong."""
    return geneval_by(geneval_credit, path, device, dtype, clip_l)


def quoted(prompt):
    """The text that a prompt wants to see written, i.e. what it has in quotes first, or None."""
    found = re.search(
        r"\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|(?<!\w)['\u2018](.+?)['\u2019](?!\w)", prompt
    )
    return next(filter(None, found.groups())) if found else None


def ocr(path, device, dtype, clip_l):
    """How well the quoted text is written: 1 - edit distance / length (not below 0), 1 if it stands among other text; case and spaces free."""
    from rapidocr import RapidOCR

    engine = RapidOCR(
        params={"Global.log_level": "critical", **({"Global.model_root_dir": path} if path else {})}
    )
    letters = lambda text: "".join(text.lower().split())

    def similar(read, want):
        row = list(range(len(want) + 1))
        for i, a in enumerate(read, 1):
            row, last = [i], row
            for j, b in enumerate(want):
                row.append(min(last[j + 1] + 1, row[j] + 1, last[j] + (a != b)))
        return 1.0 if want in read else max(0, 1 - row[-1] / len(want))

    def score(images, prompts, metadata):
        read = [
            letters("".join(engine(np.asarray(image)[:, :, ::-1]).txts or ()))
            for image in to_pil(images)
        ]
        return torch.tensor(
            [similar(r, letters(quoted(p))) for r, p in zip(read, prompts)], device=images.device
        )

    score.wrong = lambda prompt, row: (
        None if letters(quoted(prompt) or "") else "no text in quotes, which ocr looks for"
    )
    return score


def asked(tokenizer, eyes, questions, images):
    """Inputs of a Qwen-VL, one question about each picture. Not through its processor, which would need torchvision for videos."""
    seen, pad = eyes(images=to_pil(images), return_tensors="pt"), "<|image_pad|>"
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        for question in questions
    ]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    tokens = (seen["image_grid_thw"].prod(1) // eyes.merge_size**2).tolist()  # of each picture
    read = tokenizer(
        [text.replace(pad, pad * n, 1) for text, n in zip(texts, tokens)],
        padding=True,
        return_tensors="pt",
    )
    read["mm_token_type_ids"] = (read.input_ids == tokenizer.convert_tokens_to_ids(pad)).int()
    return {**seen.to(images.device), **read.to(images.device)}


def hpsv3(path, device, dtype, clip_l):
    """HPSv3: the mean of a reward head on Qwen2-VL-7B at its token <|Reward|>. path: a directory with MizzenAI/HPSv3's HPSv3.safetensors, the
    files of Qwen/Qwen2-VL-7B-Instruct without its weights, and data_collator_qwen.py of their code: its wording is read, it is not run."""
    with open(os.path.join(path, "data_collator_qwen.py"), encoding="utf-8") as f:
        lines = [
            line
            for line in ast.parse(f.read()).body
            if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
        ]
    words = {line.targets[0].id: line.value.value for line in lines}
    state, config, pixels = (
        published(path, "HPSv3.safetensors"),
        transformers.AutoConfig.from_pretrained(path),
        256 * 28 * 28,
    )
    eyes = transformers.Qwen2VLImageProcessorPil.from_pretrained(
        path, size={"shortest_edge": pixels, "longest_edge": pixels}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="right")
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    token, head = (
        tokenizer.convert_tokens_to_ids("<|Reward|>"),
        linear_head(state, "rm_head", dtype, (0, 3, 5)).to(device),
    )
    state = {k: v for k, v in state.items() if not k.startswith(("rm_head", "lm_head"))}
    state = renamed(
        state, "", (r"^model\.(?!visual|language)", "language_model."), (r"^model\.", "")
    )
    config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
    model = load(transformers.Qwen2VLModel, None, dtype, config=config, state_dict=state).to(device)

    def score(images, prompts, metadata):
        ask = [
            words["INSTRUCTION"].format(text_prompt=p) + words["prompt_with_special_token"]
            for p in prompts
        ]
        inputs = asked(tokenizer, eyes, ask, images)
        hidden = (
            model(**inputs).last_hidden_state[inputs["input_ids"] == token].to(head[0].weight.dtype)
        )
        return head[2](head[1](head[0](hidden).relu()).relu())[
            :, 0
        ]  # mean; the other output is its uncertainty

    score.models = [model, head]
    return score


def geneval2(path, device, dtype, clip_l):
    """GenEval 2's Soft-TIFA: Qwen3-VL's probability of the right answer, geometric mean over the prompt's questions ("vqa_list")."""
    model = load(transformers.Qwen3VLForConditionalGeneration, path, dtype).to(device)
    eyes = transformers.Qwen2VLImageProcessorPil.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")

    def tokens(answer):  # the first token of each way to write it
        ways = {
            answer,
            answer.lower(),
            answer.capitalize(),
            *([str(NUMBERS.index(answer.lower()))] if answer.lower() in NUMBERS else []),
        }
        return sorted(
            {
                tokenizer.encode(space + way, add_special_tokens=False)[0]
                for way in ways
                for space in ("", " ")
            }
        )

    def score(images, prompts, metadata):
        scores = []
        for image, row in zip(images, metadata):
            questions = [f"{question} Answer in one word." for question, _ in row["vqa_list"]]
            inputs = asked(tokenizer, eyes, questions, image.expand(len(questions), -1, -1, -1))
            p = model(**inputs, logits_to_keep=1).logits[:, -1].float().softmax(-1)
            p = torch.stack(
                [p[i, tokens(answer)].sum() for i, (_, answer) in enumerate(row["vqa_list"])]
            )
            scores.append(p.clamp(min=1e-12).log().mean().exp())
        return torch.stack(scores)

    def wrong(prompt, row):
        pairs = row.get("vqa_list")
        if not (
            pairs
            and isinstance(pairs, list)
            and all(
                isinstance(p, list) and list(map(type, p)) == [str, str] and all(p) for p in pairs
            )
        ):
            return 'it needs GenEval 2\'s [question, answer] pairs under "vqa_list"'

    score.models, score.wrong = [model], wrong
    return score


def checker(path, device, dtype, clip_l):
    """tiny.py's exact checker of shapes, numbers, colours and places: 1 where the caption is satisfied, else 0."""
    import tiny

    known = {row["prompt"]: row for row in tiny.captions()}
    row_of = lambda prompt, row: row if "include" in row else known.get(prompt)

    def score(images, prompts, metadata):
        right = [
            float(tiny.check(found, row_of(*which)))
            for found, *which in zip(tiny.detect(images.detach()), prompts, metadata)
        ]
        return torch.tensor(right, device=images.device)

    def wrong(prompt, row):
        if not tiny.well_formed(row_of(prompt, row)):
            return 'the checker knows only captions of tiny.py\'s world, with "include" as tiny.captions() writes it or without metadata'

    score.wrong = wrong
    return score


REWARDS = {  # name: (loader, differentiable, where its weights are: hub name, and for some the file there)
    "clipscore": (clipscore, True, CLIP_L),
    "pickscore": (pickscore, True, "yuvalkirstain/PickScore_v1"),
    "hpsv2": (hpsv2, True, "xswu/HPSv2"),  # HPS_v2.1_compressed.pt
    "imagereward": (imagereward, True, "zai-org/ImageReward"),  # ImageReward.pt
    "aesthetic": (
        aesthetic,
        True,
        "trl-lib/ddpo-aesthetic-predictor",
    ),  # aesthetic-model.pth, which is sac+logos+ava1-l14-linearMSE.pth
    "geneval": (geneval, False, "facebook/mask2former-swin-small-coco-instance"),
    "geneval_soft": (geneval_soft, False, "facebook/mask2former-swin-small-coco-instance"),
    "ocr": (ocr, False, ""),  # pip install rapidocr onnxruntime: the package brings its weights
    "hpsv3": (hpsv3, False, None),  # a directory that is put together by hand: see the function
    "geneval2": (geneval2, False, "Qwen/Qwen3-VL-8B-Instruct"),
    "judge": (clipscore, True, None),  # a second CLIP that nothing was trained on
    "checker": (checker, False, ""),
}
SAME_WEIGHTS = {
    "geneval_soft": "geneval"
}  # a reward without a --reward_path of its own takes that of the other one


def parse_weights(text):
    """ "clipscore:1,checker:0.5" -> {"clipscore": 1.0, "checker": 0.5}; a name alone weighs 1. ValueError says what is wrong."""
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
    """Load the rewards that are asked for -> list of callables (see the top of this file). ValueError says in one line what cannot be.

    weights: {"clipscore": 1.0, ...} or "clipscore:1,..."; paths: "name=PATH" strings that replace the hub names; dtype: of the models, scores
    are float32; batch: pictures a model looks at at once, 0: all.
    """
    weights = parse_weights(weights) if isinstance(weights, str) else weights
    places, rewards = dict(item.partition("=")[::2] for item in paths), []
    if not all(name in REWARDS and place for name, place in places.items()):
        raise ValueError(
            f"a reward path must read name=DIRECTORY (or FILE) with a name of {', '.join(REWARDS)}; got {', '.join(paths)}"
        )
    for name, weight in weights.items():
        load, differentiable, hub = REWARDS[name]
        given = places.get(name, places.get(SAME_WEIGHTS.get(name)))
        place = hub if given is None else given
        if place is None or given is not None and not os.path.exists(place):
            raise ValueError(
                f"reward {name}: {place or 'no directory given'}: no such directory; give --reward_path {name}=DIRECTORY"
            )
        try:
            score = load(place, str(device), dtype, places.get("clipscore", CLIP_L))
        except Exception as e:  # a directory can be wrong in a dozen ways
            reason = f"no {e} in it" if isinstance(e, KeyError) else " ".join(str(e).split())[:150]
            what = (
                f"pip install {e.name or 'what it names'}"
                if isinstance(e, ImportError)
                else f"download {hub or 'it'} and give --reward_path {name}=PATH"
            )
            raise ValueError(
                f"reward {name}: cannot load {place or 'it'} ({reason}); {what}"
            ) from None
        rewards.append(ready(score, name, weight, differentiable, batch))
    return rewards


def ready(score, name, weight, differentiable, batch):
    """A loaded score as the training loop wants it: pictures checked, `batch` of them at a time, with its attributes."""
    score, wrong = (
        score if differentiable else torch.no_grad()(score),
        getattr(score, "wrong", None),
    )

    def reward(images, prompts, metadata):
        reward.check(prompts, metadata)
        if (
            images.dim() != 4
            or images.shape[1] != 3
            or not ((images.detach() >= 0) & (images.detach() <= 1)).all()
        ):  # nan is neither
            raise ValueError(
                f"reward {name}: pictures must be [B,3,H,W] with finite numbers in [0,1], got {list(images.shape)} in "
                f"[{images.min().item():.3g}, {images.max().item():.3g}]"
            )
        if not batch or len(images) <= batch:
            return score(images, prompts, metadata)
        parts = [
            (images[i : i + batch], prompts[i : i + batch], metadata[i : i + batch])
            for i in range(0, len(images), batch)
        ]
        if (
            torch.is_grad_enabled() and images.requires_grad
        ):  # keep one part's activations at a time: backward computes them again
            return torch.cat(
                [
                    torch.utils.checkpoint.checkpoint(score, *part, use_reentrant=False)
                    for part in parts
                ]
            )
        return torch.cat([score(*part) for part in parts])

    reward.name, reward.weight, reward.differentiable, reward.models = (
        name,
        weight,
        differentiable,
        getattr(score, "models", []),
    )
    reward.check = lambda prompts, metadata: each(prompts, metadata, wrong) if wrong else None
    return reward


def guarded(reward):
    """The same reward, but one that raises, or whose scores are not one a picture, ends the run with its name and the prompts."""

    @functools.wraps(reward)
    def call(images, prompts, metadata):
        try:
            scores = reward(images, prompts, metadata)
            if scores.shape != (len(images),):
                raise ValueError(
                    f"it gave scores of shape {tuple(scores.shape)} for {len(images)} pictures"
                )
            return scores
        except Exception as e:
            each = dict.fromkeys(repr(prompt[:80]) for prompt in prompts)
            die(
                f"reward {reward.name} failed on {', '.join(list(each)[:9])}: {type(e).__name__}: {str(e)[:200]}",
                status=1,
                local=True,
            )

    return call


def move(rewards, device):
    """All models of these rewards to a device: to the CPU between scoring and update (--offload_rewards), and back; None: nowhere."""
    for model in {id(m): m for r in rewards if device for m in r.models}.values():
        model.to(device)
