"""Rewards: what a picture is worth. One function each, and `build` to load the ones that are asked for. Below them, the prompts.

A reward is a callable (images [B,3,H,W] float in [0,1], prompts [B], metadata [B]) -> scores [B] float32, with the attributes
`name`, `weight`, `differentiable` and `check(prompts, metadata)`, which raises ValueError for prompts that it cannot score. The
differentiable ones enter stage 2 twice, through SubGRPO and by back-propagation through the last step (Eq. 15); the others through
SubGRPO alone (App. L).

To add one: write a function `name(device, path) -> score(images, prompts, metadata)` and name it in REWARDS below.
"""
import json
import math
import os
import random

import torch
import torch.nn.functional as F

CLIP_MEAN, CLIP_STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)


def clip_pixels(images, size):
    """CLIP's own pre-processing, differentiable: shorter side to `size` (bicubic, anti-aliased), centre crop, normalise.
    [B,3,H,W] in [0,1] -> [B,3,size,size]"""
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    new = (max(size, round(height * scale)), max(size, round(width * scale)))
    if new != (height, width):
        images = F.interpolate(images, new, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    images = images[..., top:top + size, left:left + size]
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def clip_similarity(device, path):
    """-> score(images, prompts) = exp(logit_scale) * cosine, [B], from any CLIP directory or hub name; text features are kept."""
    from transformers import AutoTokenizer, CLIPModel
    model = CLIPModel.from_pretrained(path, dtype=torch.float32).to(device).requires_grad_(False).eval()
    tokenizer, known = AutoTokenizer.from_pretrained(path), {}

    def score(images, prompts):
        new = [p for p in dict.fromkeys(prompts) if p not in known]
        if new:
            if len(known) > 10000:
                known.clear()
                new = list(dict.fromkeys(prompts))
            ids = tokenizer(new, padding="max_length", truncation=True, max_length=model.config.text_config.max_position_embeddings,
                            return_tensors="pt").to(device)
            with torch.no_grad():
                known.update(zip(new, F.normalize(model.text_projection(model.text_model(**ids).pooler_output), dim=-1)))
        pixels = clip_pixels(images, model.config.vision_config.image_size)
        features = F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)
        return model.logit_scale.exp() * (features * torch.stack([known[p] for p in prompts])).sum(-1)
    return score


def clipscore(device, path):
    """CLIPScore: logits_per_image / 100, the cosine of picture and prompt under CLIP ViT-L/14."""
    similarity = clip_similarity(device, path)
    return lambda images, prompts, metadata: similarity(images, prompts) / 100


def pickscore(device, path):
    """PickScore v1: exp(logit_scale) * cosine / 26 under a CLIP ViT-H/14 tuned on people's choices."""
    similarity = clip_similarity(device, path)
    return lambda images, prompts, metadata: similarity(images, prompts) / 26


def checker(device, path):
    """tiny.py's exact checker of shapes, numbers, colours and places: 1 where the caption is satisfied, else 0."""
    import tiny
    known = {row["prompt"]: row for row in tiny.captions()}

    def rows_of(prompts, metadata):
        rows = [m if m and "include" in m else known.get(p) for p, m in zip(prompts, metadata)]
        for prompt, row in zip(prompts, rows):
            if row is None:
                raise ValueError(f"the checker knows only captions of tiny.py's world, not {prompt!r}")
            if not tiny.well_formed(row):
                raise ValueError(f"the metadata of {prompt!r}: \"include\" is not as tiny.captions() writes it")
        return rows

    def score(images, prompts, metadata):
        found = tiny.detect(images.detach())
        return torch.tensor([float(tiny.check(o, row)) for o, row in zip(found, rows_of(prompts, metadata))], device=images.device)
    score.check = rows_of
    return score


REWARDS = {  # name: (loader, differentiable, where its weights are)
    "clipscore": (clipscore, True, "openai/clip-vit-large-patch14"),
    "pickscore": (pickscore, True, "yuvalkirstain/PickScore_v1"),
    "judge": (clipscore, True, None),  # a second CLIP that nothing was trained on: --reward_path judge=DIR
    "checker": (checker, False, ""),
}


def parse_weights(text):
    """"clipscore:1,checker:0.5" -> {"clipscore": 1.0, "checker": 0.5}; a name alone weighs 1. ValueError says what is wrong."""
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


def build(weights, device, paths=()):
    """Load the rewards that are asked for -> list of callables (see the top of this file).

    weights: {"clipscore": 1.0, ...} or "clipscore:1,..."; paths: "name=DIRECTORY" strings that replace the hub names.
    ValueError, one line: unknown name, bad weight, model neither on the disk nor to be had from the hub.
    """
    weights, places = parse_weights(weights) if isinstance(weights, str) else weights, {}
    for item in paths:
        name, _, place = item.partition("=")
        if name not in REWARDS or not place:
            raise ValueError(f"a reward path must read name=DIRECTORY with a name of {', '.join(REWARDS)}; got {item!r}")
        places[name] = place
    rewards = []
    for name, weight in weights.items():
        load, differentiable, place = REWARDS[name]
        place = places.get(name, place)
        if place is None or name in places and not os.path.exists(place):
            raise ValueError(f"reward {name}: {place or 'no directory given'}: no such directory; give --reward_path {name}=DIRECTORY")
        try:
            score = load(device, place)
        except Exception as e:  # a directory can be wrong in a dozen ways
            raise ValueError(f"reward {name}: cannot load {place} ({str(e).splitlines()[0][:150]}); download it and give "
                             f"--reward_path {name}=DIRECTORY") from None
        score.name, score.weight, score.differentiable = name, weight, differentiable
        score.check = getattr(score, "check", lambda prompts, metadata: None)
        rewards.append(score)
    return rewards


# ------------------------------------------------------------- prompts in GenEval's form, for training without a download
COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking meter,
bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis,
snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table,
toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n", " ").split(", ")
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
PLURALS = {"person": "people", "bus": "buses", "sheep": "sheep", "skis": "skis", "knife": "knives", "sandwich": "sandwiches",
           "wine glass": "wine glasses", "couch": "couches", "scissors": "scissors", "toothbrush": "toothbrushes", "bench": "benches",
           "computer mouse": "computer mice"}


def geneval_prompts(count=20000, seed=0):
    """`count` prompts in GenEval's six categories over the 80 COCO classes -> [{"prompt", "metadata"}], metadata as GenEval writes it."""
    rng, rows = random.Random(f"geneval/{seed}"), []
    a = lambda words: f"a{'n' if words[0] in 'aeiou' else ''} {words}"
    one = lambda name, **more: {"class": name, "count": 1, **more}
    for i in range(count):
        tag = ("single_object", "two_object", "counting", "colors", "position", "color_attr")[i % 6]
        x, y = rng.sample(COCO, 2)
        c, d = rng.sample(COLORS, 2)
        more = {}
        if tag == "single_object":
            text, include = a(x), [one(x)]
        elif tag == "two_object":
            text, include = f"{a(x)} and {a(y)}", [one(x), one(y)]
        elif tag == "counting":
            n = rng.randint(2, 4)
            text = f"{('two', 'three', 'four')[n - 2]} {PLURALS.get(x, x + 's')}"
            include, more = [{"class": x, "count": n}], {"exclude": [{"class": x, "count": n + 1}]}
        elif tag == "colors":
            text, include = f"{a(c)} {x}", [one(x, color=c)]
        elif tag == "position":
            relation = rng.choice(("left of", "right of", "above", "below"))
            text, include = f"{a(x)} {relation} {a(y)}", [one(y), one(x, position=[relation, 0])]
        else:
            text, include = f"{a(c)} {x} and {a(d)} {y}", [one(x, color=c), one(y, color=d)]
        prompt = f"a photo of {text}"
        rows.append({"prompt": prompt, "metadata": {"tag": tag, "include": include, **more, "prompt": prompt}})
    return rows


def load_prompts(path):
    """-> list of {"prompt": str, "metadata": dict}. path: a prompt a line, or .jsonl with "prompt" and whatever a reward needs;
    "" gives geneval_prompts(). ValueError, one line, names the file and the line."""
    if not path:
        return geneval_prompts()
    try:
        with open(path, encoding="utf-8-sig") as f:
            lines = [(i, line.strip()) for i, line in enumerate(f.read().split("\n"), 1) if line.strip()]
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read --prompts {path}: {getattr(e, 'strerror', None) or 'it is not UTF-8 text'}") from None
    if not lines:
        raise ValueError(f"--prompts {path} is empty: it needs a prompt a line")
    rows = []
    for i, line in lines:
        row = {"prompt": line}
        if path.endswith(".jsonl"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"--prompts {path}, line {i}: not valid JSON") from None
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
                raise ValueError(f"--prompts {path}, line {i}: needs an object with a non-empty text under \"prompt\"")
            if row["prompt"].encode("utf-8", "ignore").decode() != row["prompt"]:
                raise ValueError(f"--prompts {path}, line {i}: the prompt holds half a surrogate pair, which is no text")
        rows.append({"prompt": row["prompt"], "metadata": row})
    return rows
