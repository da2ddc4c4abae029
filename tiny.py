"""Stage 0: a Stable Diffusion 3 small enough for a laptop, and a world in which right and wrong can be decided exactly.

Nothing in the other files knows about this one's world: they take a directory (`--pretrained assets/tiny`) exactly as they
take SD3.5-M. What this file makes, in reading order:
  1. the world    32x32 pictures of circles, squares and triangles with captions in GenEval's six categories
  2. the checker  finds the objects of a picture and compares them with the caption: the tiny GenEval (not differentiable)
  3. the models   VAE, two CLIPs (one is a reward, one a held-out judge), text encoders, SD3 transformer trained by flow matching

  python tiny.py                          # trains everything into out/tiny_pipeline (GPU: full quality, CPU: reduced, <= 15 min)
  python tiny.py --random_sd35m DIR       # a random-weight pipeline of SD3.5-M's true architecture, for speed and memory work
"""

import argparse
import json
import math
import os
import time

import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------------ 1. the world
SIZE = 32
SHAPES = ["circle", "square", "triangle"]
COLORS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.15, 0.66, 0.25),
    "blue": (0.18, 0.33, 0.88),
    "yellow": (0.96, 0.82, 0.18),
}
BACKGROUND = 0.92
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ["left of", "right of", "above", "below"]
CATEGORIES = [
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attr",
]  # GenEval's own names


def captions(split="all"):
    """The world's captions as GenEval metadata: {"prompt", "tag", "include": [{"class", "count", "color"?, "position"?}]}.

    split "train" is what every stage trains on; "test" is what the scoreboard draws: the captions held out of every stage
    (2 of 12 colours, and 12 of 72 colour bindings whose mirror image is trained on: "a blue square and a red circle" is new, the scene
    is not), and for categories too small to hold any out, all of them.
    """
    rows, held = [], set()

    def add(tag, prompt, *include, hold=False):
        rows.append({"prompt": prompt, "tag": tag, "include": list(include)})
        if hold:
            held.add(prompt)

    one = lambda shape, color=None, **kw: {
        "class": shape,
        "count": 1,
        **({"color": color} if color else {}),
        **kw,
    }
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    for a in SHAPES:
        add("single_object", f"a {a}", one(a))
    for a, b in pairs:
        add("two_object", f"a {a} and a {b}", one(a), one(b))
    for n, word in NUMBERS.items():
        for a in SHAPES:
            add("counting", f"{word} {a}s", {"class": a, "count": n})
    for i, (a, c) in enumerate((a, c) for a in SHAPES for c in COLORS):
        add("colors", f"a {c} {a}", one(a, c), hold=i % 6 == 5)
    for a, b in pairs:
        for relation in RELATIONS:
            add("position", f"a {a} {relation} a {b}", one(a, position=[relation, 1]), one(b))
    for i, (s, t, c, d) in enumerate(
        (s, t, c, d) for s, t in pairs[:2] + pairs[3:4] for c in COLORS for d in COLORS if c != d
    ):
        add("color_attr", f"a {c} {s} and a {d} {t}", one(s, c), one(t, d), hold=i % 6 == 1)
        add("color_attr", f"a {d} {t} and a {c} {s}", one(t, d), one(s, c), hold=i % 6 == 4)
    with_held = {r["tag"] for r in rows if r["prompt"] in held}
    return [
        r
        for r in rows
        if split == "all"
        or (r["prompt"] in held) == (split == "test")
        or (split == "test" and r["tag"] not in with_held)
    ]


def scenes(rows, index):
    """Random scenes for captions rows[index]. index [B] -> shape, color [B,4] (-1 = no object), x, y, r [B,4] in pixels."""
    B, device = len(index), index.device
    flat = [[o for o in r["include"] for _ in range(o["count"])] for r in rows]
    color_names = list(COLORS)
    table = lambda f: torch.tensor(
        [[f(o) for o in objects] + [-1] * (4 - len(objects)) for objects in flat], device=device
    )[index]
    shape, named = (
        table(lambda o: SHAPES.index(o["class"])),
        table(lambda o: color_names.index(o["color"]) if "color" in o else -1),
    )
    color = torch.where(
        named >= 0, named, torch.randint(4, (B, 4), device=device)
    )  # what the caption leaves open is uniform
    color = torch.where(shape >= 0, color, -1)
    cell = torch.rand(B, 9, device=device).argsort(1)[
        :, :4
    ]  # four different cells of the 3x3 layout
    # for "a left of b": any two cells with column(a) < column(b); the other relations are its mirror images
    left = torch.tensor(
        [
            (3 * r1 + c1, 3 * r2 + c2)
            for r1 in range(3)
            for r2 in range(3)
            for c1 in range(3)
            for c2 in range(c1 + 1, 3)
        ]
    )
    transpose = left % 3 * 3 + left // 3
    allowed = torch.stack([left, left.flip(1), transpose, transpose.flip(1)]).to(device)
    relation = torch.tensor(
        [
            next((RELATIONS.index(o["position"][0]) for o in objects if "position" in o), -1)
            for objects in flat
        ],
        device=device,
    )[index]
    placed = allowed[relation.clamp(min=0), torch.randint(27, (B,), device=device)]
    cell[:, :2] = torch.where(relation[:, None] >= 0, placed, cell[:, :2])
    jitter = lambda: (torch.rand(B, 4, device=device) * 2 - 1) * 0.7
    x, y = (cell % 3 + 0.5) * SIZE / 3 + jitter(), (cell // 3 + 0.5) * SIZE / 3 + jitter()
    return shape, color, x, y, 3.2 + 0.8 * torch.rand(B, 4, device=device)


def coverage(shape, x, y, r):
    """How much of each pixel a shape covers. shape, x, y, r [...] -> [..., 32, 32] in [0,1], anti-aliased over one pixel."""
    pixel = torch.arange(SIZE, device=x.device) + 0.5
    dx, dy = pixel - x[..., None, None], pixel[:, None] - y[..., None, None]
    shape, r = shape[..., None, None], r[..., None, None]
    rho = 0.62 * r  # the triangle's inner radius; its bounding box is centred on (x, y)
    ty = dy - rho / 2
    distance = torch.where(
        shape == 0,
        (dx * dx + dy * dy).sqrt() - r,
        torch.where(
            shape == 1,
            torch.maximum(dx.abs(), dy.abs()) - 0.88 * r,
            torch.maximum(ty - rho, dx.abs() * (3**0.5 / 2) - ty / 2 - rho),
        ),
    )
    return (0.5 - distance).clamp(0, 1)


def render(shape, color, x, y, r):
    """Scene tensors [B,4] -> images [B,3,32,32] in [0,1]."""
    palette = torch.tensor(list(COLORS.values()), device=x.device)
    alpha = coverage(shape, x, y, r) * (shape >= 0)[..., None, None]
    image = torch.full((len(x), 3, SIZE, SIZE), BACKGROUND, device=x.device)
    for i in range(shape.shape[1]):
        a = alpha[:, i, None]
        image = image * (1 - a) + palette[color[:, i].clamp(min=0)][..., None, None] * a
    return image


# ---------------------------------------------------------------------------------------------------------- 2. the checker
def detect(images, min_iou=0.7):
    """Find the objects. images [B,3,32,32] in [0,1] -> per image a list of (shape, color, x, y, iou); shape is None for a blob
    that fits no template to min_iou (soft intersection over union) or debris of 3 pixels and more."""
    B, device = len(images), images.device
    images = images.float()
    axis = torch.tensor(list(COLORS.values()), device=device) - BACKGROUND
    delta = images - BACKGROUND
    along = (
        torch.einsum("bchw,kc->bkhw", delta, axis) / axis.square().sum(1)[:, None, None]
    )  # opacity if the pixel is of color k
    cosine = (
        along * axis.norm(dim=1)[:, None, None] / delta.norm(dim=1, keepdim=True).clamp(min=1e-6)
    )
    alpha = along.clamp(0, 1) * F.one_hot(cosine.argmax(1), 4).permute(
        0, 3, 1, 2
    )  # by direction: anti-aliased edges keep their color
    mask = alpha > 0.5
    label = (
        torch.arange(1, SIZE * SIZE + 1, device=device, dtype=torch.float32).view(1, 1, SIZE, SIZE)
        * mask
    )
    while True:  # connected components: the largest label floods its 4-neighbourhood
        grown = (
            torch.maximum(
                F.max_pool2d(label, (3, 1), 1, (1, 0)), F.max_pool2d(label, (1, 3), 1, (0, 1))
            )
            * mask
        )
        if torch.equal(grown, label):
            break
        label = grown
    area = torch.zeros(B, 4, SIZE * SIZE + 1, device=device).scatter_add_(
        2, label.flatten(2).long(), mask.flatten(2).float()
    )
    area[..., 0] = 0
    b, k, which = (area >= 3).nonzero(as_tuple=True)
    own = (label[b, k] == which[:, None, None]).float()
    soft = alpha[b, k] * F.max_pool2d(own[:, None], 3, 1, 1)[:, 0]  # with its anti-aliased rim
    size = soft.sum((1, 2))
    pixel = torch.arange(SIZE, device=device) + 0.5
    x, y = (soft.sum(1) * pixel).sum(1) / size, (soft.sum(2) * pixel).sum(1) / size
    r = torch.stack(
        [(size / math.pi).sqrt(), size.sqrt() / 1.76, (size / (3**1.5 * 0.62**2)).sqrt()], 1
    )  # same area
    cy = torch.stack(
        [y, y, y - 0.62 * r[:, 2] / 2], 1
    )  # from centroid to the centre of the bounding box
    template = coverage(
        torch.arange(3, device=device).expand(len(b), 3), x[:, None].expand(-1, 3), cy, r
    )
    iou = torch.minimum(template, soft[:, None]).sum((2, 3)) / torch.maximum(
        template, soft[:, None]
    ).sum((2, 3))
    iou, shape = iou.max(1) if len(b) else (x, x)
    found, names = [[] for _ in range(B)], list(COLORS)
    for i, j, q, s, xx, yy, n in zip(*(v.tolist() for v in (b, k, iou, shape, x, y, size))):
        found[i].append((SHAPES[int(s)] if q >= min_iou and n >= 12 else None, names[j], xx, yy, q))
    return found


def well_formed(metadata):
    """Is this metadata that `check` can decide?"""
    try:
        return all(
            o["class"] in SHAPES
            and 1 <= o["count"] <= 4
            and o.get("color", "red") in COLORS
            and (
                "position" not in o
                or (
                    o["position"][0] in RELATIONS
                    and 0 <= o["position"][1] < len(metadata["include"])
                )
            )
            for o in metadata["include"]
        )
    except (TypeError, KeyError, IndexError, AttributeError):
        return False


def check(objects, metadata):
    """Do the detected objects satisfy the caption exactly: nothing missing, nothing extra, colours and places right? -> bool"""
    wanted = [o for o in metadata["include"] for _ in range(o["count"])]
    if len(objects) != len(wanted) or any(o[0] is None for o in objects):
        return False
    matched = []
    for w in wanted:  # shapes in one caption differ or are alike without colours, so the first match is the only match
        fit = [
            o
            for o in objects
            if o not in matched and o[0] == w["class"] and w.get("color", o[1]) == o[1]
        ]
        if not fit:
            return False
        matched.append(fit[0])
    for w, o in zip(wanted, matched):
        if "position" in w:
            relation, other = w["position"][0], matched[w["position"][1]]
            dx, dy = o[2] - other[2], o[3] - other[3]
            if {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[
                relation
            ] < 3:  # pixels; neighbouring cells are > 9 apart
                return False
    return True


# ----------------------------------------------------------------------------------------------------------- 3. the models
TEXT_LENGTH = 10  # CLIP tokens, start and end included: the longest caption has seven words


def tokenizers(rows):
    """A CLIP BPE tokenizer and a T5 Unigram tokenizer in which every word of the captions is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer, T5TokenizerFast

    words = sorted({w for r in rows for w in r["prompt"].split()})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=2000,
            min_frequency=1,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    vocab = alphabet + [a + "</w>" for a in alphabet]
    vocab += sorted({a + b for a, b in merges} - set(vocab)) + ["<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(
        vocab={w: i for i, w in enumerate(vocab)}, merges=merges, model_max_length=TEXT_LENGTH
    )
    pieces = ["▁" + w for w in words] + ["▁"] + [chr(c) for c in range(ord("a"), ord("z") + 1)]
    t5 = T5TokenizerFast(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        + [(p, -1.0 - len(p) / 100) for p in pieces],
        extra_ids=0,
        model_max_length=64,
    )
    assert all(len(clip.tokenize(w)) == len(t5.tokenize(w)) == 1 for w in words)
    return clip, t5


def optimise(parameters, loss_of_step, steps, lr, name, ema=None):
    """AdamW with warm-up and cosine decay; loss_of_step(i) -> loss. ema: decay of an average that ends up in the parameters."""
    from tqdm import tqdm

    parameters = list(parameters)
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.99), fused=device.type == "cuda"
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (
            min(1, (i + 1) / (0.02 * steps + 1))
            * (0.5 + 0.5 * math.cos(math.pi * min(1, i / steps)))
        ),
    )
    average = [p.detach().clone() for p in parameters] if ema else None
    bar = tqdm(range(steps), desc=name, mininterval=5, disable=None)
    start = time.time()
    for i in bar:
        loss = loss_of_step(i)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if ema:
            torch._foreach_lerp_(
                average, [p.detach() for p in parameters], 1 - min(ema, (1 + i) / (10 + i))
            )
        if i % 100 == 99 or i == steps - 1:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    print(
        f"{name}: {steps} steps, {time.time() - start:.0f} s, last loss {loss.item():.4f}",
        flush=True,
    )
    if ema:
        torch._foreach_copy_([p.detach() for p in parameters], average)


def train_vae(rows, steps, batch, device):
    """AutoencoderKL with factor 2: 3x32x32 pictures <-> 4x16x16 latents, normalised by the config's shift and scale."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ).to(device)
    picture = lambda n: render(*scenes(rows, torch.randint(len(rows), (n,), device=device))) * 2 - 1

    def loss(i):
        x = picture(batch)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        return (x - y).abs().mean() + 4 * F.mse_loss(x, y) + 1e-4 * posterior.kl().mean() / 1024

    optimise(vae.parameters(), loss, steps, 3e-3, "vae", ema=0.99)
    with torch.no_grad():
        z = vae.encode(picture(512)).latent_dist.sample()
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    return vae.eval()


def train_clip(rows, tokenizer, steps, batch, device, width, patch):
    """CLIPModel by contrast over all captions and all pictures of a batch; other captions that happen to be true of a picture are
    masked out of the contrast. An auxiliary loss, dropped afterwards, asks each patch which shape and colour covers its centre."""
    from transformers import CLIPConfig, CLIPModel
    from rewards import clip_pixels

    ids = tokenizer(
        [r["prompt"] for r in rows],
        padding="max_length",
        max_length=TEXT_LENGTH,
        return_tensors="pt",
    ).to(device)
    special = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    clip = CLIPModel(
        CLIPConfig(
            text_config=dict(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=TEXT_LENGTH,
                projection_dim=64,
                **special,
            ),
            vision_config=dict(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=SIZE,
                patch_size=patch,
                projection_dim=64,
            ),
            projection_dim=64,
        )
    ).to(device)
    head = torch.nn.Linear(width, 13, device=device)
    column = lambda f: torch.tensor([f(r["include"]) for r in rows], device=device)
    count = torch.stack(
        [column(lambda o: sum(p["count"] for p in o if p["class"] == s)) for s in SHAPES], 1
    )
    ends = [
        (
            column(lambda o: SHAPES.index(o[e]["class"])),
            column(lambda o: list(COLORS).index(o[e]["color"]) if "color" in o[e] else -1),
        )
        for e in (0, -1)
    ]
    relation = column(lambda o: RELATIONS.index(o[0]["position"][0]) if "position" in o[0] else -1)
    centre = torch.arange(SIZE // patch, device=device) * patch + patch // 2

    def loss(i):
        index = torch.randint(len(rows), (batch,), device=device)
        shape, color, x, y, r = scenes(rows, index)
        image, pair = render(shape, color, x, y, r), torch.where(shape >= 0, shape * 4 + color, 12)
        true = (torch.stack([(shape == s).sum(1) for s in range(3)], 1)[:, None] == count).all(
            2
        )  # [batch, captions]
        at = lambda v: torch.stack(
            [(v * (shape == s)).sum(1) for s in range(3)], 1
        )  # of the one object of each shape, where it is one
        for which, named in ends:
            true &= (named < 0) | (at(color)[:, which] == named)
        dx, dy = (at(v)[:, ends[0][0]] - at(v)[:, ends[1][0]] for v in (x, y))
        true &= (relation < 0) | (
            torch.stack([-dx, dx, -dy, dy]).gather(0, relation.clamp(min=0).expand(1, batch, -1))[0]
            > 3
        )
        noisy = (
            image + torch.randn_like(image) * 0.05 * torch.rand(batch, 1, 1, 1, device=device)
        ).clamp(0, 1)
        out = clip.vision_model(pixel_values=clip_pixels(noisy, SIZE))
        v = F.normalize(clip.visual_projection(out.pooler_output), dim=-1)
        t = F.normalize(clip.text_projection(clip.text_model(**ids).pooler_output), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * v @ t.T  # [batch, captions]
        own = F.one_hot(index, len(rows)).bool()
        to_text = F.cross_entropy(logits.masked_fill(true & ~own, -1e4), index)
        columns = logits[:, index].T.masked_fill(
            true[:, index].T & ~torch.eye(batch, dtype=torch.bool, device=device), -1e4
        )
        to_image = F.cross_entropy(columns, torch.arange(batch, device=device))
        cover = (coverage(shape, x, y, r) * (shape >= 0)[..., None, None])[:, :, centre][
            ..., centre
        ]
        depth, top = cover.max(1)
        target = torch.where(depth > 0.5, pair.gather(1, top.flatten(1)).view_as(top), 12)
        aux = F.cross_entropy(head(out.last_hidden_state[:, 1:]).flatten(0, 1), target.flatten())
        return to_text + to_image + aux

    optimise([*clip.parameters(), *head.parameters()], loss, steps, 1e-3, "clip")
    clip.logit_scale.data.fill_(
        math.log(100)
    )  # so that logits_per_image / 100 is the cosine, as for OpenAI's CLIP
    return clip.eval()


def train_transformer(rows, vae, embeds, pooled, steps, batch, bank, device):
    """Flow matching (rectified flow, velocity eps - x0), caption dropout 10 %, time: logit-normal, then SD3's shift 3."""
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=128,
        caption_projection_dim=96,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    ).to(device)
    with torch.no_grad():  # the pictures are encoded once
        which, latents = torch.randint(len(rows), (bank,), device=device), []
        for index in which.split(1024):
            latents.append(vae.encode(render(*scenes(rows, index)) * 2 - 1).latent_dist.sample())
        latents = (torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor
    cuda = device.type == "cuda"
    forward = (
        torch.compile(transformer) if cuda else transformer
    )  # at this size a GPU waits for kernel launches

    def loss(i):
        j = torch.randint(bank, (batch,), device=device)
        x0, caption = (
            latents[j],
            which[j].masked_fill(torch.rand(batch, device=device) < 0.1, len(rows)),
        )
        u = torch.sigmoid(torch.randn(batch, device=device))
        t, eps = 3 * u / (1 + 2 * u), torch.randn_like(x0)
        tt = t.view(-1, 1, 1, 1)
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            v = forward(
                hidden_states=(1 - tt) * x0 + tt * eps,
                encoder_hidden_states=embeds[caption],
                pooled_projections=pooled[caption],
                timestep=1000 * t,
                return_dict=False,
            )[0]
        return F.mse_loss(v.float(), eps - x0)

    optimise(
        transformer.parameters(),
        loss,
        steps,
        2e-3,
        "transformer",
        ema=0.9995 if steps > 5000 else 0.99,
    )
    return transformer.eval()


def make_pipeline(out_dir, quality, seed, device):
    """Train all models and write a StableDiffusion3Pipeline directory, with clip/, judge/ and the two prompt files beside it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    rows = captions("train")
    clip_tokenizer, t5_tokenizer = tokenizers(captions("all"))
    fresh = lambda offset, make, *inputs, **options: (
        torch.manual_seed(seed + offset),
        make(*inputs, **options),
    )[1]  # a seed each
    vae = fresh(0, train_vae, rows, *quality["vae"], device)
    # The rewards see every caption (as real reward models do); the generator's stages see only the train split.
    clip = fresh(
        0, train_clip, captions("all"), clip_tokenizer, *quality["clip"], device, width=96, patch=4
    )
    judge = fresh(
        1, train_clip, captions("all"), clip_tokenizer, *quality["clip"], device, width=64, patch=8
    )
    text = CLIPTextModelWithProjection(clip.config.text_config).to(device)
    text.text_model.load_state_dict(clip.text_model.state_dict())
    text.text_projection.load_state_dict(clip.text_projection.state_dict())
    t5 = fresh(
        0,
        T5EncoderModel,
        T5Config(
            vocab_size=64,
            d_model=128,
            d_kv=32,
            d_ff=128,
            num_layers=1,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=1,
            feed_forward_proj="gated-gelu",
        ),
    ).to(device)  # random: words stay apart
    pipe = StableDiffusion3Pipeline(
        transformer=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text.eval(),
        text_encoder_2=text,
        text_encoder_3=t5.eval(),
        tokenizer=clip_tokenizer,
        tokenizer_2=clip_tokenizer,
        tokenizer_3=t5_tokenizer,
    )
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(
            [r["prompt"] for r in rows] + [""],
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=8,
        )
    pipe.register_modules(
        transformer=fresh(
            0, train_transformer, rows, vae, embeds, pooled, *quality["transformer"], device
        )
    )
    pipe.to(torch.float16).save_pretrained(out_dir)
    for name, model in (("clip", clip), ("judge", judge)):
        model.half().save_pretrained(os.path.join(out_dir, name))
        clip_tokenizer.save_pretrained(os.path.join(out_dir, name))
    for split in ("train", "test"):
        with open(os.path.join(out_dir, f"prompts_{split}.jsonl"), "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in captions(split))


QUALITY = {  # (steps, batch) of each model; the transformer's third number is the size of its bank of encoded pictures
    "cuda": {"vae": (4000, 256), "clip": (2500, 512), "transformer": (7000, 1024, 1 << 20)},
    "cpu": {"vae": (400, 64), "clip": (500, 128), "transformer": (2500, 128, 1 << 14)},
}


def random_sd35m(out_dir, device):
    """A pipeline directory with SD3.5-M's true architecture (2.2 B transformer, VAE, CLIP-L, CLIP-G, T5-XXL; 16 GB in bf16) and random
    weights, to measure speed and memory without a download. Its tokenizers are the tiny ones."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip_tokenizer, t5_tokenizer = tokenizers(captions())
    clip_tokenizer.model_max_length = 77
    clip = lambda width, layers, act: CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            hidden_act=act,
            projection_dim=width,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
        )
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        transformer = SD3Transformer2DModel(
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
        vae = AutoencoderKL(
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
        t5 = T5EncoderModel(
            T5Config(
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
        one, two = clip(768, 12, "quick_gelu"), clip(1280, 32, "gelu")
    torch.set_default_dtype(torch.float32)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=one,
        tokenizer=clip_tokenizer,
        text_encoder_2=two,
        tokenizer_2=clip_tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    ).save_pretrained(out_dir)


def arguments():
    from common import die, parse

    parser = argparse.ArgumentParser(
        description="Stage 0: make the tiny SD3 pipeline.", allow_abbrev=False
    )
    add, parser.error, parser.preset = parser.add_argument, die, {}
    add("--out_dir", default="out/tiny_pipeline", help="where the trained pipeline directory goes")
    add("--seed", type=int, default=0, help="one seed, one result")
    add("--device", default="auto", help="cuda: full quality; cpu or mps: reduced")
    add(
        "--random_sd35m",
        metavar="DIR",
        help="write a random-weight pipeline of SD3.5-M's true architecture",
    )
    args = parse(parser)
    args.out_dir = args.out_dir if args.random_sd35m is None else args.random_sd35m
    return args


def main():
    from common import setup

    args = arguments()
    device, *_ = setup(args, training=False)
    if args.random_sd35m:
        random_sd35m(args.random_sd35m, device)
    else:
        make_pipeline(args.out_dir, QUALITY.get(device.type, QUALITY["cpu"]), args.seed, device)


if __name__ == "__main__":
    main()
