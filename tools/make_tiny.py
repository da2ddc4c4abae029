"""Stage 0: train a Stable Diffusion 3 small enough for a laptop, on the world of tiny.py.

A VAE, two CLIPs (one is a reward, the other a held-out judge), text encoders, and an SD3 transformer
by flow matching. The result is a directory as SD3.5-M's is one: `--pretrained out/tiny_pipeline`.

    python -m tools.make_tiny                       # all into out/tiny_pipeline; on a CPU with less effort
    python -m tools.make_tiny --random sd35m DIR    # or a model of true size with random weights
"""

import json
import math
import os
import time

import diffusers  # loads its classes where they are first named, as transformers does
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from common import Parser, die, parse, setup
from rewards import clip_pixels
from tiny import (
    COLORS,
    MIN_DISTANCE,
    SHAPES,
    SIZE,
    captions,
    color_of,
    coverage,
    relation_of,
    render,
    scenes,
)
from tools import random_models
from tools.tiny_tokenizers import tokenizers

# (steps, batch) of each model; the transformer's third number: how many pictures are encoded for it.
QUALITY = {
    "cuda": {"vae": (4000, 256), "clip": (2500, 512), "transformer": (7000, 1024, 1 << 20)},
    "cpu": {"vae": (400, 64), "clip": (500, 128), "transformer": (2500, 128, 1 << 14)},
}
TEXT_LENGTH = 10  # CLIP tokens, start and end included: the longest caption has seven words
T5_LENGTH = 8  # T5 tokens, the end included
CAPTION_DROPOUT = 0.1
SHIFT = 3.0  # SD3's


# ---- training ------------------------------------------------------------------------------------
def optimise(parameters, loss_of_step, steps, lr, name, ema=None):
    """AdamW with warm-up and cosine decay on loss_of_step() -> a scalar.

    ema: the decay of an average of the parameters, which they are set to at the end.
    """
    parameters = list(parameters)
    fused = parameters[0].device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.99), fused=fused
    )

    def factor(step):
        warm = min(1, (step + 1) / (0.02 * steps + 1))
        return warm * (0.5 + 0.5 * math.cos(math.pi * min(1, step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    average = [p.detach().clone() for p in parameters]
    bar = tqdm(range(steps), desc=name, mininterval=5, disable=None)
    start = time.time()
    for i in bar:
        loss = loss_of_step()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if ema:
            decay = min(ema, (1 + i) / (10 + i))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        if i % 100 == 99 or i == steps - 1:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    seconds = time.time() - start
    print(f"{name}: {steps} steps, {seconds:.0f} s, last loss {loss.item():.4f}", flush=True)
    if ema:
        torch._foreach_copy_([p.detach() for p in parameters], average)


def train_vae(rows, steps, batch, device):
    """AutoencoderKL with factor 2: 3x32x32 pictures <-> 4x16x16 latents.

    Its config's shift and scale make latents of mean 0 and standard deviation 1.
    """
    vae = diffusers.AutoencoderKL(
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
    )
    vae.to(device)

    def pictures(count):
        index = torch.randint(len(rows), (count,), device=device)
        return render(*scenes(rows, index)) * 2 - 1

    def loss():
        images = pictures(batch)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        distance = (images - decoded).abs().mean() + 4 * F.mse_loss(images, decoded)
        return distance + 1e-4 * posterior.kl().mean() / 1024

    optimise(vae.parameters(), loss, steps, 3e-3, "vae", ema=0.99)
    with torch.no_grad():
        latents = vae.encode(pictures(512)).latent_dist.sample()
    shift = latents.mean().item()
    scale = 1 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return vae.eval()


class Facts:
    """What captions say, as tensors over captions. A colour or relation that is left open is -1."""

    def __init__(self, rows, device):
        includes = [row["include"] for row in rows]

        def tensor(numbers):
            return torch.tensor(list(numbers), device=device)

        self.count = tensor(self.counts(include) for include in includes)  # [C,3]
        self.relation = tensor(relation_of(row) for row in rows)
        self.first_shape = tensor(SHAPES.index(include[0]["class"]) for include in includes)
        self.last_shape = tensor(SHAPES.index(include[-1]["class"]) for include in includes)
        self.first_color = tensor(color_of(include[0]) for include in includes)
        self.last_color = tensor(color_of(include[-1]) for include in includes)

    @staticmethod
    def counts(include):
        """How many objects of each shape."""
        count = [0] * len(SHAPES)
        for entry in include:
            count[SHAPES.index(entry["class"])] += entry["count"]
        return count

    def true_of(self, shape, color, x, y):
        """Which captions are true of scenes [B,4] -> bool [B,C]"""

        def of_shape(values):
            """A value of each shape's object, which means something where there is one of it: [B,3]"""
            each = [(values * (shape == number)).sum(1) for number in range(len(SHAPES))]
            return torch.stack(each, 1)

        count = of_shape(torch.ones_like(shape))
        true = (count[:, None] == self.count).all(2)
        colors = of_shape(color)
        for which, named in (
            (self.first_shape, self.first_color),
            (self.last_shape, self.last_color),
        ):
            true &= (named < 0) | (colors[:, which] == named)
        columns = of_shape(x)
        lines = of_shape(y)
        dx = columns[:, self.first_shape] - columns[:, self.last_shape]
        dy = lines[:, self.first_shape] - lines[:, self.last_shape]
        distances = torch.stack([-dx, dx, -dy, dy])  # in the order of RELATIONS
        asked = self.relation.clamp(min=0).expand(1, len(shape), -1)
        far = distances.gather(0, asked)[0] > MIN_DISTANCE
        return true & ((self.relation < 0) | far)


def tiny_clip(tokenizer, width, patch):
    """A CLIPModel with random weights."""
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=patch,
        projection_dim=64,
    )
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    )


def train_clip(rows, tokenizer, steps, batch, device, width, patch):
    """A CLIPModel by contrast over all captions and all pictures of a batch.

    Other captions that happen to be true of a picture are masked out of the contrast. An auxiliary
    loss, whose head is dropped afterwards, asks each patch what covers its centre.
    """
    prompts = [row["prompt"] for row in rows]
    ids = tokenizer(prompts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    ids = ids.to(device)
    clip = tiny_clip(tokenizer, width, patch).to(device)
    nothing = len(SHAPES) * len(COLORS)  # the class of a patch beside the objects
    head = torch.nn.Linear(width, nothing + 1, device=device)
    facts = Facts(rows, device)
    centre = torch.arange(SIZE // patch, device=device) * patch + patch // 2

    def contrast(pooled, index, true):
        """Cross entropy of pictures over captions, and of captions over pictures."""
        image = F.normalize(clip.visual_projection(pooled), dim=-1)
        text = clip.text_projection(clip.text_model(**ids).pooler_output)
        text = F.normalize(text, dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T  # [B,C]
        other_captions = true & ~F.one_hot(index, len(rows)).bool()
        to_text = F.cross_entropy(logits.masked_fill(other_captions, -1e4), index)
        here = torch.arange(batch, device=device)
        other_pictures = true[:, index].T & (here[:, None] != here)
        to_image = F.cross_entropy(logits[:, index].T.masked_fill(other_pictures, -1e4), here)
        return to_text + to_image

    def patches(hidden, shape, color, x, y, radius):
        """Cross entropy of the object that covers each patch's centre."""
        there = shape >= 0
        kind = torch.where(there, shape * len(COLORS) + color, nothing)
        cover = coverage(shape, x, y, radius) * there[..., None, None]
        cover = cover[:, :, centre][..., centre]
        most, which = cover.max(1)
        covering = kind.gather(1, which.flatten(1)).view_as(which)
        target = torch.where(most > 0.5, covering, nothing)
        return F.cross_entropy(head(hidden).flatten(0, 1), target.flatten())

    def loss():
        index = torch.randint(len(rows), (batch,), device=device)
        shape, color, x, y, radius = scenes(rows, index)
        images = render(shape, color, x, y, radius)
        noise = torch.randn_like(images) * 0.05
        noise = noise * torch.rand(batch, 1, 1, 1, device=device)
        pixels = clip_pixels((images + noise).clamp(0, 1), SIZE)
        out = clip.vision_model(pixel_values=pixels)
        true = facts.true_of(shape, color, x, y)
        hidden = out.last_hidden_state[:, 1:]  # the first is CLIP's class token
        return contrast(out.pooler_output, index, true) + patches(
            hidden, shape, color, x, y, radius
        )

    optimise([*clip.parameters(), *head.parameters()], loss, steps, 1e-3, "clip")
    # As OpenAI's CLIP has it: logits_per_image / 100 is the cosine.
    clip.logit_scale.data.fill_(math.log(100))
    return clip.eval()


@torch.no_grad()
def encoded_pictures(rows, vae, count, device):
    """-> (the captions' numbers [count], latents [count,4,16,16] as the transformer sees them)"""
    index = torch.randint(len(rows), (count,), device=device)
    latents = []
    for part in index.split(1024):
        pictures = render(*scenes(rows, part)) * 2 - 1
        latents.append(vae.encode(pictures).latent_dist.sample())
    latents = torch.cat(latents)
    return index, (latents - vae.config.shift_factor) * vae.config.scaling_factor


def train_transformer(rows, vae, embeds, pooled, steps, batch, bank, device):
    """SD3's transformer by flow matching: velocity eps - x0, time logit-normal, then SD3's shift.

    embeds, pooled: of the captions, and last of the empty text, which takes the place of dropped ones.
    bank: how many pictures are encoded, once.
    """
    transformer = diffusers.SD3Transformer2DModel(
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
    )
    transformer.to(device)
    captions_of, latents = encoded_pictures(rows, vae, bank, device)
    on_gpu = device.type == "cuda"
    # At this size a GPU waits for kernel launches.
    forward = torch.compile(transformer) if on_gpu else transformer

    def loss():
        chosen = torch.randint(bank, (batch,), device=device)
        x0 = latents[chosen]
        dropped = torch.rand(batch, device=device) < CAPTION_DROPOUT
        caption = captions_of[chosen].masked_fill(dropped, len(rows))
        u = torch.sigmoid(torch.randn(batch, device=device))
        t = SHIFT * u / (1 + (SHIFT - 1) * u)
        eps = torch.randn_like(x0)
        level = t.view(-1, 1, 1, 1)
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            (velocity,) = forward(
                hidden_states=(1 - level) * x0 + level * eps,
                encoder_hidden_states=embeds[caption],
                pooled_projections=pooled[caption],
                timestep=1000 * t,
                return_dict=False,
            )
        return F.mse_loss(velocity.float(), eps - x0)

    ema = 0.9995 if steps > 5000 else 0.99
    optimise(transformer.parameters(), loss, steps, 2e-3, "transformer", ema)
    return transformer.eval()


# ---- the pipeline --------------------------------------------------------------------------------
def make_pipeline(out_dir, quality, seed, device):
    """Train all models and write a StableDiffusion3Pipeline directory.

    clip/, judge/ and the two prompt files lie in it, too. quality: a value of QUALITY. Every model has
    a seed of its own, so that none changes with the length of another's training.
    """
    rows = captions("train")
    # The rewards see every caption, as real reward models do; the generator sees the train split.
    all_rows = captions("all")
    tokenizer, tokenizer_3 = tokenizers(all_rows, TEXT_LENGTH, T5_LENGTH)
    torch.manual_seed(seed)
    vae = train_vae(rows, *quality["vae"], device)
    torch.manual_seed(seed)
    clip = train_clip(all_rows, tokenizer, *quality["clip"], device, width=96, patch=4)
    torch.manual_seed(seed + 1)
    judge = train_clip(all_rows, tokenizer, *quality["clip"], device, width=64, patch=8)
    text_encoder = text_half(clip).to(device)
    torch.manual_seed(seed)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder,
        text_encoder_3=random_t5().to(device),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
    )
    embeds, pooled = encoded_texts(pipe, [*(row["prompt"] for row in rows), ""], device)
    torch.manual_seed(seed)
    transformer = train_transformer(rows, vae, embeds, pooled, *quality["transformer"], device)
    pipe.register_modules(transformer=transformer)
    pipe.to(torch.float16).save_pretrained(out_dir)
    for name, model in (("clip", clip), ("judge", judge)):
        folder = os.path.join(out_dir, name)
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for split in ("train", "test"):
        with open(os.path.join(out_dir, f"prompts_{split}.jsonl"), "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in captions(split))


def text_half(clip):
    """The text encoder of a CLIPModel as SD3's pipeline takes it."""
    text = transformers.CLIPTextModelWithProjection(clip.config.text_config)
    text.text_model.load_state_dict(clip.text_model.state_dict())
    text.text_projection.load_state_dict(clip.text_projection.state_dict())
    return text.eval()


def random_t5():
    """A T5 encoder with random weights, which keep words apart."""
    config = transformers.T5Config(
        vocab_size=64,
        d_model=128,
        d_kv=32,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config).eval()


@torch.no_grad()
def encoded_texts(pipe, prompts, device):
    """-> (embeddings [B,L,128], pooled [B,128])"""
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts,
        None,
        None,
        device=device,
        do_classifier_free_guidance=False,
        max_sequence_length=T5_LENGTH,
    )
    return embeds, pooled


# ---- the program ---------------------------------------------------------------------------------
def arguments():
    """The flags; dies where they are no good."""
    parser = Parser("Stage 0: make the tiny SD3 pipeline.")
    add = parser.add_argument
    add("--out_dir", default="out/tiny_pipeline", help="where the pipeline directory goes")
    add("--seed", type=int, default=0, help="one seed, one result")
    add("--device", default="auto", help="cuda: full quality; cpu or mps: less")
    add(
        "--random",
        nargs=2,
        metavar=("NAME", "DIR"),
        help=f"write {' or '.join(random_models.WRITERS)} with random weights into DIR instead",
    )
    args = parse(parser)
    if args.random:
        name, args.out_dir = args.random
        if name not in random_models.WRITERS:
            die(f"--random knows {', '.join(random_models.WRITERS)}, not {name!r}")
        if not args.out_dir:
            die("--random NAME DIR: DIR must not be empty")
    return args


def main():
    """One of the two pipelines."""
    args = arguments()
    device, _, _ = setup(args, training=False)
    if args.random:
        name, _ = args.random
        random_models.write(name, args.out_dir, device)
    else:
        quality = QUALITY.get(device.type, QUALITY["cpu"])
        make_pipeline(args.out_dir, quality, args.seed, device)


if __name__ == "__main__":
    main()
