"""Stage 1, the cold start: AC-DMD distils a multi-step teacher into a 4-step generator (Sec. 3.1, App. B, D, E, F).

Three roles are played by ONE frozen transformer with two LoRA adapters (the roles' names are visible at every call):
    generator   G, adapter "generator", trained: 4 CPS steps from noise to picture, no CFG
    fake        F, adapter "fake", trained: the velocity of what G currently makes (the "fake score")
    teacher     no adapter: the multi-step model with classifier-free guidance, never changed

Read in this order: `rollout`, `fake_score_loss`, `generator_loss` (the mathematics: tensors and velocity functions only), then
`main` (Algorithm 1, first half), then the plumbing, which stage 2 (rtdmd_rl.py) imports. The sampler is in cps.py.

    torchrun --nproc_per_node=8 cold_start.py           # SD3.5-M, 512 px, the recipe of the authors' release
    python cold_start.py --preset tiny                  # the laptop model in assets/tiny, minutes on a CPU
"""
import argparse
import contextlib
import functools
import gc
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from datetime import timedelta
from importlib.metadata import version

import torch
import torch.distributed as dist
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging as diffusers_logging, make_image_grid
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters on one base is what we want

from checkpoint import find_weights, read, read_adapter, settled_alpha
from common import checked, die, note
from cps import ambient_target, at_least_float32, cps_step, renoise, sigmas
from rewards import load_prompts

HERE = os.path.dirname(os.path.abspath(__file__))
TARGETS = ["attn." + name for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
PRESETS = {  # defaults that differ; everything else is the same for every model
    "sd35m": dict(pretrained="stabilityai/stable-diffusion-3.5-medium"),
    "sd3m": dict(pretrained="stabilityai/stable-diffusion-3-medium-diffusers", resolution=1024, cfg=7.0, micro_batch=2),
    "tiny": dict(pretrained=os.path.join(HERE, "assets/tiny"), prompts=os.path.join(HERE, "assets/tiny/prompts_train.jsonl"), device="auto",
                 resolution=32, max_sequence_length=8, cfg=2.0, steps=800, batch_size=64, micro_batch=64, lr=1e-3, fake_lr=1e-3,
                 generator_every=2, ema=.99, sample_every=200, save_every=200, compile=0),
}
PAPER = dict(lora_rank=64, lora_alpha=32, renoise_std="printed", consistency_times="steps", dm_gradient="score")  # --paper: its letter (README)


def arguments():
    parser, add = make_parser("Stage 1: AC-DMD, from a multi-step teacher to a 4-step generator.", PRESETS, "out/cold_start", PAPER)
    add("--steps", type=int, default=15000, help="optimiser steps of the fake score")
    add("--generator_every", type=int, default=10, help="update the generator every so many steps")
    add("--batch_size", type=int, default=72, help="pictures a step over all GPUs together; does not depend on the number of GPUs")
    add("--micro_batch", type=int, default=3, help="pictures a GPU handles at once; gradients are accumulated over them")
    add("--lr", type=float, default=3e-5, help="learning rate of the generator")
    add("--fake_lr", type=float, default=3e-5, help="learning rate of the fake score")
    add("--ema", type=float, default=.99, help="decay of the generator's average, applied after every step")
    add("--lora_init_std", type=float, help="std of a fresh adapter's A (default: 1/rank)")
    add("--dmd2", action="store_true", help="DMD2-style training: the last executed step goes to level 0 whichever it is, and its x-prediction is "
        "re-noised over [0, 1] (give --gamma 0 too)")
    return parse(parser)


# ------------------------------------------------------------------------------------------------------- 1. the mathematics
# A velocity function is v(x [B,C,H,W], sigma float or [B]) -> [B,C,H,W]. Losses are per sample, [B].
def rollout(G, x, levels, k, eta, noises):
    """Run the generator's first k CPS steps from noise x (Eq. 8) -> [x_0, ..., x_k]; x_i is at noise level levels[i].

    noises: one tensor like x for each step, or an iterator over them. Gradients follow torch's grad mode.
    """
    path = [x]
    for (s, t), noise in zip(list(zip(levels, levels[1:]))[:k], noises):
        path.append(cps_step(path[-1], G(path[-1], s), s, t, eta, noise)[0])
    return path


def renoise_time(s, u):
    """Where in the sub-interval to compare: t ~ U[s + 0.01, 1] clamped to [0.02, 0.98]. s float, u [B] in [0,1] -> [B]."""
    return (s + .01 + (1 - s - .01) * u).clamp(.02, .98)


def fake_score_loss(F, x_s, s, t, noise, back, noise1, noise2, gamma, eta, std="exact", after=None):
    """Ambient consistency loss of the fake score, Eq. 10-11 -> (loss [B], ambient [B], consistency [B]).

    x_s [B,C,H,W]: generator samples at noise level s (a float; 0 for finished pictures); t [B] > s: where to score them;
    back [B] in (0, 0.2]: how far below t the consistency looks; the noises are like x_s. std: see cps.renoise.
    after: the paper's letter for the consistency, from x_s itself at t' = s = t_k to t'' = after = t_{k+1}.
    """
    x_t = renoise(x_s, s, t, noise, std)
    v_target, sig = ambient_target(x_s, s, t, noise, std)
    v = F(x_t, t)
    # ambient denoising score matching in velocity form (Eq. 10, Prop. D.1); sig keeps it finite as t -> s
    ambient = ((1 / sig ** 2).clamp(0, 10) * (sig * v - sig * v_target) ** 2).flatten(1).mean(1)
    if gamma == 0:
        return ambient, ambient, torch.zeros_like(ambient)
    # consistency: h(x,t) = E[x0 | x_t] must be a martingale along F's own reverse process (Eq. 11). Two independent transitions
    # and a product make the squared violation unbiased (Eq. 22, App. F): the square of one would add its variance.
    column, t2 = lambda a: a.view(-1, 1, 1, 1), (t - back).clamp(min=0)
    if after is not None:
        x_t, t, t2 = x_s, torch.zeros_like(t) + s, torch.zeros_like(t) + after
        v = F(x_t, t)
    anchor = x_t - column(t) * v
    x1, x2 = (cps_step(x_t, v.detach(), t, t2, eta, n)[0] for n in (noise1, noise2))
    v1, v2 = F(torch.cat([x1, x2]), torch.cat([t2, t2])).chunk(2)  # one pass for both
    h1, h2 = x1 - column(t2) * v1, x2 - column(t2) * v2
    consistency = ((h1 - anchor) * (h2 - anchor)).flatten(1).mean(1)
    return ambient + gamma * consistency, ambient, consistency


def generator_loss(x_s, s, t, noise, back_noise, teacher, F, eta, std="exact", gradient="transition"):
    """The distribution-matching term, Eq. 9 -> loss [B]. Its gradient with respect to x_s is (y_fake - y_real) / mean |x_s - y_real|,
    averaged over the elements.

    Teacher (with CFG) and fake score both look at x_s re-noised to t; each prediction takes one CPS transition back to s with the
    same noise. What is left of the difference is the difference of the scores. Stage 2 imports this function: that is Eq. 7.
    gradient "score" is the paper's letter: the gradient of the KL itself, (score_fake - score_real)(x_t) dx_t/dx_s.
    """
    with torch.no_grad():
        x_t = renoise(x_s, s, t, noise, std)
        if gradient == "score":
            a, t = ((1 - t) / (1 - s)).view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
            difference = a * (1 - t) / t * (teacher(x_t, t.flatten()) - F(x_t, t.flatten()))  # score = -(x + (1-t) v) / t, Eq. 2
        else:
            y_real, y_fake = (cps_step(x_t, v(x_t, t), t, s, eta, back_noise)[0] for v in (teacher, F))
            scale = (x_s - y_real).abs().flatten(1).mean(1).view(-1, 1, 1, 1)
            difference = torch.where(scale == 0, 0, (y_fake - y_real) / scale)  # a nan stays one, so that `update` skips it
        target = x_s - difference
    loss = .5 * (x_s - target).square().flatten(1)
    return loss.sum(1) if gradient == "score" else loss.mean(1)  # a KL adds up over the elements, as log pi does


# ------------------------------------------------------------------------------------------- 2. Algorithm 1, lines of stage 1
def main():
    args = arguments()
    device, rank, world = setup(args)
    rows = checked(load_prompts, args.prompts)
    note_templates(rows, args)
    pipe = load_pipeline(args, device)
    transformer, encode, shape = pipe.transformer, text_encoder(pipe, args, [row["prompt"] for row in rows]), pipe.latent_shape
    roles = {"generator": ["generator"], "fake": ["fake"], "teacher": []}
    for name in ("generator", "fake"):
        add_adapter(transformer, name, args, args.lora_init_std, getattr(torch, args.adapter_dtype))
    G_params, F_params = train_only(transformer, "generator", "fake")
    G_opt = torch.optim.AdamW(G_params, lr=args.lr, betas=(.9, .999), weight_decay=0, fused=device.type == "cuda")
    F_opt = torch.optim.AdamW(F_params, lr=args.fake_lr, betas=(.9, .999), weight_decay=0, fused=device.type == "cuda")
    ema = [p.detach().clone() for p in G_params]
    state = {"generator": G_params, "fake": F_params, "ema": ema, "G_opt": G_opt, "F_opt": F_opt, "keys": list(adapter(transformer, "fake"))}
    args.start = load_checkpoint(args, state, rows, transformer)
    note_prompts(pipe, rows, args)
    levels, negative = sigmas(args.num_steps, args.shift), encode([""])
    N, mine = args.batch_size, shard(args.batch_size, rank, world)
    if rank == 0:
        print(f"AC-DMD: {args.steps} steps of {N} pictures on {world} x {device.type}, {len(rows)} prompts, "
              f"{sum(p.numel() for p in G_params) / 1e6:.1f} M parameters an adapter", flush=True)

    # What a step asks of the transformer, for one micro-batch: functions of tensors alone, which `graphed` records on a GPU. The two
    # that are called with gradient add to the .grad of their adapter.
    level = lambda s, x: torch.full((len(x),), s, device=device)

    def velocity(x, s, *text):
        return play(transformer, roles["generator"], text)(x, s)

    def fake_pass(x_s, s, t, noise, back, noise1, noise2, after, *text):
        loss = fake_score_loss(play(transformer, roles["fake"], text), x_s, s, t, noise, back, noise1, noise2, args.gamma, args.eta,
                               args.renoise_std, after if args.consistency_times == "steps" else None)
        (loss[0].sum() / N).backward()
        return torch.stack([each.sum() for each in loss]).detach()

    def generator_pass(x, s_before, s, step_noise, t, noise, back_noise, *text):
        G, F = (play(transformer, roles[role], text) for role in ("generator", "fake"))
        teacher = play(transformer, roles["teacher"], text, negative, args.cfg)
        x_s = cps_step(x, G(x, s_before), s_before, s, args.eta, step_noise)[0]
        loss = generator_loss(x_s, s, t, noise, back_noise, teacher, F, args.eta, args.renoise_std, args.dm_gradient).sum()
        (loss / N).backward()
        return loss.detach()
    velocity, fake_pass, generator_pass = graphed(args.graphs, device, velocity, fake_pass, generator_pass)

    bar, log = tqdm(range(args.start, args.steps), initial=args.start, total=args.steps, disable=None if rank == 0 else True), make_log(args)
    part = lambda name: None
    if args.bench:
        from report import stopwatch
        part = stopwatch(args, transformer, N, 2 * args.generator_every, evaluated)
    skipped = {"generator": 0, "fake": 0}  # updates in a row that were not finite
    for step in bar:
        # All random numbers of a step come from (seed, step) and are drawn for the whole batch, of which each rank keeps its rows:
        # the same run on any number of GPUs, and a resumed one needs no generator state. k is shared, so that ranks stay in step.
        rng, g = random.Random(f"{args.seed}/{step}"), generator(device, args.seed, step)
        k = rng.randint(1, args.num_steps)
        grid = levels[:k] + [0.0] if args.dmd2 else levels  # DMD2: the last executed step goes all the way
        s, after = grid[k], grid[min(k + 1, len(grid) - 1)]
        normal = lambda: torch.randn(N, *shape, generator=g, device=device)[mine].split(args.micro_batch)
        uniform = lambda: torch.rand(N, generator=g, device=device)[mine].split(args.micro_batch)
        x_K, step_noise = normal(), [normal() for _ in range(k)]
        u_F, noise_F, back, noise1, noise2 = uniform(), normal(), uniform(), normal(), normal()
        prompts = [rows[i]["prompt"] for i in data_order(len(rows), step * N, N, args.seed)][mine]
        texts = [encode(prompts[i:i + args.micro_batch]) for i in range(0, len(prompts), args.micro_batch)]
        sums, paths = torch.zeros(4, device=device), []
        part("text")

        for i, text in enumerate(texts):  # every step: the fake score follows the generator
            with torch.no_grad():
                paths.append(rollout(lambda x, s: velocity(x, level(s, x), *text), x_K[i], grid, k, args.eta, [noise[i] for noise in step_noise]))
            part("rollout")
            x_s, steps_back = paths[i][k], (1 + (200 * back[i]).floor()) / 1000  # U{1..200}/1000
            sums[:3] += fake_pass(x_s, level(s, x_s), renoise_time(s, u_F[i]), noise_F[i], steps_back, noise1[i], noise2[i], level(after, x_s), *text)
            part("fake")
        numbers = {"grad_fake": update(F_params, F_opt, args, skipped, "fake", sums[0])}

        if (step + 1) % args.generator_every == 0:  # the generator follows the teacher: gradient through the last executed step only
            u_G, noise_G, back_G = uniform(), normal(), normal()
            for i, text in enumerate(texts):
                x = paths[i][k - 1]
                sums[3] += generator_pass(x, level(grid[k - 1], x), level(s, x), step_noise[k - 1][i], renoise_time(s, u_G[i]), noise_G[i], back_G[i], *text)
                part("generator")
            numbers["grad_generator"] = update(G_params, G_opt, args, skipped, "generator", sums[3])
        torch._foreach_lerp_(ema, [p.detach() for p in G_params], 1 - args.ema)

        losses = dict(zip(("loss_fake", "loss_ambient", "loss_consistency", "loss_generator"), (all_reduce(sums) / N).tolist()))
        if "grad_generator" not in numbers:
            del losses["loss_generator"]
        log(bar, N, step=step, k=k, **losses, **numbers, ema_drift=distance(G_params, ema))
        part("step")
        if args.sample_every and (step + 1) % args.sample_every == 0:
            preview(pipe, roles["generator"], encode, rows, args, f"step_{step + 1}")
        save_or_stop(args, state, step + 1, args.steps)
    if rank == 0:
        print(f"done: {args.out_dir}/generator_ema.pt (the generator), {args.out_dir}/fake.pt (stage 2 starts from both)", flush=True)
    if world > 1:
        dist.destroy_process_group()


# ----------------------------------------------------------------------------- 3. plumbing, shared with stage 2 and sample.py
def make_parser(description, presets, out_dir, paper):
    """Parser with the flags that stage 1 and stage 2 share; the values of the preset, and with --paper those of `paper`, become defaults
    -> (parser, parser.add_argument)"""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="sd35m")
    first.add_argument("--paper", action="store_true")
    first.error = die
    early = first.parse_known_args()[0]
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.error, parser.preset, add = die, {**presets.get(early.preset, {}), **(paper if early.paper else {})}, parser.add_argument
    add("--preset", choices=list(presets), default="sd35m", help="set of default flags")
    add("--paper", action="store_true", help="default flags by the paper's letter wherever the authors' release differs from it: "
        + ", ".join(f"--{k} {v}" for k, v in paper.items()))
    add("--pretrained", help="diffusers directory or hub id of the Stable Diffusion 3 model")
    add("--out_dir", default=out_dir, help="where checkpoints, log.jsonl and samples/ go")
    add("--prompts", default="", help="file with a prompt a line, or jsonl with \"prompt\"; default: the preset's own prompts")
    add("--seed", type=int, default=0, help="one seed, one result")
    add("--device", default="cuda", help="cuda, cpu, mps, or auto: the best there is")
    add("--resume", action="store_true", help="continue the run in out_dir; if there is none, start one")
    add("--resolution", type=int, default=512, help="height and width of the pictures in pixels")
    add("--max_sequence_length", type=int, default=128, help="T5 tokens of a prompt")
    add("--num_steps", type=int, default=4, help="sampling steps K of the generator")
    add("--shift", type=float, default=3.0, help="SD3 time shift of the sampling grid")
    add("--eta", type=float, default=.9, help="stochasticity of CPS steps: 0 Euler, 1 consistency-model sampler")
    add("--cfg", type=float, default=4.5, help="guidance scale of the teacher")
    add("--gamma", type=float, default=.01, help="weight of the fake score's consistency loss; 0 is A-DMD")
    add("--renoise_std", choices=("exact", "printed"), default="exact", help="std of the sub-interval kernel: exact, or (t-s)/(1-s) as App. B "
        "prints it, which gives the wrong marginal and a biased fake score (the tests prove it); the fake target is then Eq. 2 of that kernel's score")
    add("--consistency_times", choices=("near", "steps"), default="near", help="near: t' = the re-noise time, t'' up to 0.2 below it; steps: the paper's "
        "t' = t_k, t'' = t_{k+1}, read as from the generator's own state x_{t_k} to its next level (0 where that is 0)")
    add("--dm_gradient", choices=("transition", "score"), default="transition", help="AC-DMD's gradient: difference of two CPS transitions over "
        "their mean size, or the paper's difference of scores, read as the KL's own gradient, summed over elements")
    add("--lora_rank", type=int, default=32, help="rank of the adapters")
    add("--lora_alpha", type=float, default=64, help="alpha of the new adapters; their product is scaled by alpha / rank")
    add("--adapter_dtype", choices=("float32", "bfloat16"), default="float32", help="precision of adapters, gradients, Adam's moments and "
        "average; bfloat16 is the release's, in which updates below half a step of bf16 are lost")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--max_skipped", type=int, default=20, help="stop after so many updates in a row with a loss or gradient that is not finite")
    add("--gradient_checkpointing", action="store_true", help="trade a third of the speed for most of the activations' memory")
    add("--cache_text", action="store_true", help="encode all prompts once, before training, into a file in out_dir, and free the text encoders")
    add("--low_memory", action="store_true", help="for a 24 GB card: --gradient_checkpointing, --cache_text, --offload_rewards, decoding "
        "picture by picture, --micro_batch 4 at most")
    add("--compile", type=int, choices=(0, 1), help="compile each transformer block and the decoder; 1 on a GPU unless said, else 0")
    add("--graphs", type=int, choices=(0, 1), default=1, help="on a GPU: record each pass as a CUDA graph and replay it")
    add("--wandb", default="", metavar="PROJECT", help="send the numbers of log.jsonl to Weights & Biases, too (pip install wandb)")
    add("--bench", type=int, default=0, help="measure so many steps after a warm-up, print one JSON line, and stop; nothing is saved")
    add("--sample_every", type=int, default=500, help="save a picture grid every so many steps; 0: never")
    add("--save_every", type=int, default=500, help="save a checkpoint every so many steps")
    add("--save_minutes", type=float, default=20, help="and after so many minutes without one; 0: never")
    return parser, add

RANGES = {"eta": (0, 1), "ema": (0, 1), "lora_init_std": (1e-6, 1e6), "shift": (.01, 100), "seed": (0, 2 ** 63 - 1), "group_size": (2, 10 ** 6), **dict.fromkeys((
    "batch_size", "micro_batch", "steps", "epochs", "num_steps", "generator_every", "resolution", "lora_rank", "save_every", "prompts_per_epoch",
    "ema_every", "max_sequence_length", "max_skipped", "num_images", "eval_every", "eval_images"), (1, 10 ** 9))}
FREE = {"out_dir", "resume", "device", "micro_batch", "steps", "epochs", "start", "cache_text", "preset", "gradient_checkpointing", "sample_every",
        "save_every", "save_minutes", "saved_at", "max_skipped", "made_with", "reward_batch", "offload_rewards", "eval_rewards", "eval_every",
        "eval_prompts", "eval_images", "compile", "graphs", "wandb", "low_memory", "bench"}  # may change on --resume: the result is the same, but for its length
stop = {"asked": False, "agreed": False}  # a signal has come to this process; all processes know of one (see `update`)

def parse(parser):
    """Parse the command line; every number must lie in its range (not negative, where RANGES has none), or die."""
    parser.set_defaults(**parser.preset)
    args = parser.parse_args()
    for name, value in vars(args).items():
        low, high = RANGES.get(name, (0, math.inf))
        if isinstance(value, (int, float)) and not low <= value <= high:  # also nan
            die(f"--{name} must lie in [{low}, {high}], got {value}")
    if not args.out_dir:
        die("--out_dir must not be empty")
    if getattr(args, "low_memory", False):
        args.gradient_checkpointing = args.cache_text = args.offload_rewards = True
        args.micro_batch = min(args.micro_batch, 4)
    if getattr(args, "bench", 0) and hasattr(args, "save_every"):  # the stages: an endless run that `stopwatch` ends
        args.out_dir, args.resume, args.steps, args.epochs = f"{args.out_dir}/bench_{os.getppid()}", False, 10 ** 9, 10 ** 9
    if hasattr(args, "num_steps") and sigmas(args.num_steps, args.shift)[1] > .96:
        die(f"--num_steps {args.num_steps} with --shift {args.shift:g}: the first step ends above noise level .96, which leaves no room to re-noise")
    return args

def setup(args, training=True):
    """Device, output directory and process group -> (device, rank, world size); dies where a run could not end well."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        die("no CUDA GPU found; to try everything on this machine: --preset tiny, or insist with --device cpu")
    try:
        device = torch.device(args.device, local) if args.device == "cuda" else torch.device(args.device)
        there = device.type in ("cuda", "cpu") or device.type == "mps" and torch.backends.mps.is_available()
    except RuntimeError:
        there = False
    if not there:
        die(f"--device must be cuda, cpu, mps or auto, and be there; got {args.device!r}")
    if training and not args.resume and any(os.path.exists(f"{args.out_dir}/{name}") for name in ("ckpt.pt", "ckpt.prev.pt")):
        die(f"{args.out_dir} holds a run already: add --resume to continue it, or choose another --out_dir")
    try:
        os.makedirs(f"{args.out_dir}/samples" if training else args.out_dir, exist_ok=True)
        test = f"{args.out_dir}/.write_test_{rank}"
        open(test, "w").close(), os.remove(test)
    except OSError as e:
        die(f"cannot write to --out_dir {args.out_dir}: {e.strerror}")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            die(f"a process for GPU {device.index}, but this machine has {torch.cuda.device_count()}: give torchrun a smaller --nproc_per_node", local=True)
        torch.cuda.set_device(device)
    if training:  # the step under way is finished, then save_or_stop. A second signal changes nothing: torchrun passes on what the terminal sent too
        stop.update(asked=False, agreed=False)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(name, lambda *_: stop.update(asked=True))
    if training and world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return device, rank, world

def load_pipeline(args, device):
    """The diffusers pipeline, frozen; bf16 on a GPU, float32 elsewhere."""
    for logging in (transformers_logging, diffusers_logging):  # diffusers would print what the tokenizers cut off, prompt by prompt
        logging.set_verbosity_error(), logging.disable_progress_bar()
    from diffusers import StableDiffusion3Pipeline
    try:
        index = StableDiffusion3Pipeline.load_config(args.pretrained)  # some come without T5, which has to be said
        none = {name: None for name in ("text_encoder_3", "tokenizer_3") if not (index.get(name) or [None])[0]}
        pipe = StableDiffusion3Pipeline.from_pretrained(args.pretrained, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, **none)
        for module in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
            if module is not None:
                later = module is pipe.transformer and getattr(args, "cache_text", False)  # when `text_encoder` has made room for it
                module.requires_grad_(False).eval().to("cpu" if later else device)
    except Exception as e:  # a directory can be wrong in a dozen ways
        die(f"--pretrained {args.pretrained} cannot be loaded; it must be a pipeline directory or a hub id ({str(e).splitlines()[0][:200]})",
            local=isinstance(e, torch.cuda.OutOfMemoryError))
    unit, most = pipe.vae_scale_factor * pipe.transformer.config.patch_size, pipe.transformer.config.pos_embed_max_size
    if args.resolution % unit or args.resolution > unit * most:
        die(f"--resolution {args.resolution} must be divisible by {unit} and at most {unit * most} for this model's VAE and patches")
    if args.compile or args.compile is None and device.type == "cuda":
        # Block by block: one graph serves all blocks of a kind. A role, a batch size, with or without gradient: a graph each, compiled when
        # first met, and never a slower one for "any size" in their place.
        torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = 1000  # since torch 2.7 also "recompile_limit"
        for module in (*pipe.transformer.transformer_blocks, pipe.vae.decoder):
            module.compile(dynamic=False)
        pipe.vae.to(memory_format=torch.channels_last)
    pipe.low_memory, pipe.transformer.lora_layers = getattr(args, "low_memory", False), []
    pipe.latent_shape = (pipe.transformer.config.in_channels, *[args.resolution // pipe.vae_scale_factor] * 2)
    if getattr(args, "gradient_checkpointing", False):
        def checkpoint(block, *inputs):  # recompute with the adapter of the forward pass, whichever is active by then
            adapters = pipe.transformer.lora_layers[0]._active_adapter
            run = lambda *inputs: (set_adapters(pipe.transformer, adapters), block(*inputs))[1]
            return torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
        pipe.transformer.enable_gradient_checkpointing(checkpoint)
    return pipe

def add_adapter(transformer, name, args, init_std=None, dtype=torch.float32):
    """Put a fresh LoRA under `name`; it changes nothing yet, since its B is 0.

    init_std: A ~ N(0, init_std^2); None leaves peft's own gaussian, N(0, 1/rank^2). It matters: B
    moves by lr an update whatever its gradient, so that the weights move by lr times A.
    """
    from peft import LoraConfig
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{args.seed}/{name}".encode()).digest()[:4], "big"))  # the same on all ranks
    transformer.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, init_lora_weights="gaussian", target_modules=TARGETS), name)
    adopt_layers(transformer)
    for key, p in adapter(transformer, name).items():
        p.data = p.data.to(dtype)
        if init_std is not None and ".lora_A." in key:
            p.data *= init_std * args.lora_rank

def load_adapter(transformer, name, path, given_alpha=None, assumed_alpha=64.0):
    """Put the adapter in a file under `name`, in float32: with the file's own modules and ranks, TARGETS or not.

    given_alpha: the user's own word, which wins; assumed_alpha: what is taken where nothing beside the file
    says it. Dies with one line if a single module has no place in this transformer; says in one line which
    of the modules that our stages train the file leaves out.
    """
    from peft import LoraConfig

    file = read_adapter(path)
    check_places(transformer, file)
    alpha = settled_alpha(file, given_alpha, assumed_alpha)
    usual = file.usual_rank
    usual_alpha = alpha.of("", usual)
    alphas = {module: alpha.of(module, rank) for module, rank in file.ranks.items()}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual_alpha,
        rank_pattern={module: rank for module, rank in file.ranks.items() if rank != usual},
        alpha_pattern={module: value for module, value in alphas.items() if value != usual_alpha},
        target_modules=list(file.weights),
    )
    transformer.add_adapter(config, name)
    adopt_layers(transformer)
    for module, (A, B) in file.weights.items():
        layer = transformer.get_submodule(module)
        for matrix, values in ((layer.lora_A[name].weight, A), (layer.lora_B[name].weight, B)):
            matrix.data = at_least_float32(values).to(matrix.device, copy=True)

def check_places(transformer, file):
    """Die unless every module of an AdapterFile is a matrix of this transformer, of the same shape. A note where it leaves some out."""
    matrices = {}  # {name: [out, in]}; a matrix that has an adapter already keeps its own name
    for module_name, module in transformer.named_modules():
        matrix = getattr(module, "base_layer", module)
        if isinstance(matrix, torch.nn.Linear) and ".lora_" not in module_name:
            matrices[module_name] = list(matrix.weight.shape)
    lost = [module for module in file.weights if module not in matrices]
    if lost:
        die(f"{file.path}: {len(lost)} of its {len(file.weights)} modules are not in this model, first: {lost[0]}. Is it of another model?")
    for module, (A, B) in file.weights.items():
        if [B.shape[0], A.shape[1]] != matrices[module]:
            die(f"{file.path}: {module} is {B.shape[0]} x {A.shape[1]} there and {matrices[module][0]} x {matrices[module][1]} in this model. "
                "Is it of another model?")
    usual = [module for module in matrices if module.endswith(tuple("." + target for target in TARGETS))]
    missing = [module for module in usual if module not in file.weights]
    if missing:
        note(f"{file.path} adapts {len(file.weights)} modules and leaves {len(missing)} of the usual {len(usual)} as they are, first: {missing[0]}")

def adopt_layers(transformer):
    """Give every adapted matrix our forward, and the transformer a list of them."""
    from peft.tuners.lora import LoraLayer

    transformer.lora_layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    for layer in transformer.lora_layers:
        layer.__class__ = lora_linear()

@functools.cache
def lora_linear():
    """peft's class of an adapted matrix, W x + sum of scaling B A x over the active adapters, with one pair of small products for all of them
    in place of one each: stage 2's stacked adapters cost no more than one. (A class, not a function for each layer: the compiler's graph of
    a block serves all blocks like it.) Called under `play`'s autocast; peft's flags for disabled and merged adapters are not looked at."""
    from peft.tuners.lora import Linear

    class LoraLinear(Linear):
        fixed = {}  # {adapters: their pair}, where it no longer changes (sample.py)

        def present(self, names):
            """Those of the adapters that this matrix has: files may adapt other matrices than our flags do."""
            return [name for name in names if name in self.lora_A]

        def pair(self, names):
            names = self.present(names)
            return (torch.cat([self.lora_A[name].weight for name in names]),
                    torch.cat([self.scaling[name] * self.lora_B[name].weight for name in names], 1))

        def forward(self, x):
            y, names = self.base_layer(x), self._active_adapter
            if not self.present(names):
                return y
            A, B = self.fixed.get(tuple(names)) or self.pair(names)
            A, B = A.to(x.dtype), B.to(x.dtype)  # bf16 adapters in a float32 model; autocast rounds as before
            return y + torch.nn.functional.linear(torch.nn.functional.linear(x, A), B)
    return LoraLinear

def train_only(transformer, *names):
    """Freeze everything but these adapters -> one list of parameters for each, with a .grad of zeros that stays where it is."""
    transformer.requires_grad_(False)
    lists = [[p.requires_grad_(True) for p in adapter(transformer, name).values()] for name in names]
    for p in sum(lists, []):
        p.grad = torch.zeros_like(p)
    return lists

def adapter(transformer, name):
    """{key in the published format: parameter} of one adapter, e.g. transformer_blocks.0.attn.to_q.lora_A.default.weight"""
    mark = f".{name}.weight"
    return {k[:-len(mark)] + ".default.weight": p for k, p in transformer.named_parameters() if k.endswith(mark) and ".lora_" in k}

def set_adapters(transformer, adapters):
    """Which LoRAs add to the base from now on. Unlike peft's set_adapter it leaves requires_grad alone: flipping that between
    forward and backward makes the gradient zero without any error."""
    for layer in transformer.lora_layers:
        layer._active_adapter = adapters

evaluated = [0]  # forwards of the transformer so far, in pictures; with gradient they count twice, for the backward pass. For --bench

def play(transformer, adapters, text, negative=None, cfg=1.0):
    """The velocity function of the transformer in one role: v(x [B,C,H,W], sigma float or [B]) -> float32 like x.

    text, negative: (prompt_embeds [B or 1,L,D], pooled [B or 1,P]); with negative, classifier-free guidance in one call.
    """
    def velocity(x, sigma):
        set_adapters(transformer, adapters)
        n = len(x)
        embeds, pooled = (e if len(e) == n else e.repeat(n // len(e), *[1] * (e.dim() - 1)) for e in text)
        timestep = 1000 * at_least_float32(sigma).expand(n) if torch.is_tensor(sigma) else torch.full((n,), 1000 * sigma, device=x.device)
        if negative is not None:
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
            embeds, pooled = (torch.cat([e.expand(n, *e.shape[1:]), p]) for e, p in zip(negative, (embeds, pooled)))
        evaluated[0] += len(x) * (2 if torch.is_grad_enabled() else 1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            v = transformer(hidden_states=x.to(embeds.dtype), encoder_hidden_states=embeds, pooled_projections=pooled,
                            timestep=timestep, return_dict=False)[0]
        v = at_least_float32(v)
        if negative is not None:
            without, with_text = v.chunk(2)
            v = without + cfg * (with_text - without)
        return v
    return velocity

def graphed(on, device, *functions):
    """On a GPU, functions of tensors -> the same as CUDA graphs: one launch in place of thousands, so that the GPU does not wait for Python.
    Elsewhere the functions themselves. They give back a tensor or a tuple of tensors.

    For each set of shapes the first call is a plain one (it compiles), the second is recorded, all others are replayed. So whatever the
    function reads besides its inputs, weights and .grad, must stay where it is, and its Python is not run again.
    """
    if not on or device.type != "cuda":
        return functions
    pool = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time, and results are copied before the next one runs

    def graph_of(function):
        graphs = {}

        def call(*inputs):
            key = tuple((x.shape, x.dtype) for x in inputs)
            if key not in graphs:
                graphs[key] = None
                return function(*inputs)
            if graphs[key] is None:
                static, graph, before = [x.clone() for x in inputs], torch.cuda.CUDAGraph(), evaluated[0]
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL's thread may go on
                    output = function(*static)
                graphs[key], evaluated[0] = (graph, static, output, evaluated[0] - before), before
            graph, static, output, count = graphs[key]
            torch._foreach_copy_(static, inputs)
            graph.replay()
            evaluated[0] += count
            return output.clone() if torch.is_tensor(output) else tuple(o.clone() for o in output)
        return call
    return [graph_of(function) for function in functions]

def text_encoder(pipe, args, prompts=()):
    """-> encode(prompts) -> (prompt_embeds [B,L,D], pooled [B,P]), each prompt encoded once; of the last 256 the result is kept.

    With --cache_text all `prompts` are encoded now, into a file in out_dir that the processes of a machine share (1.7 MB a prompt for
    SD3.5-M), and the encoders, most of which is T5-XXL's 9 GB, are freed.
    """
    cache, device = {}, pipe.vae.device

    @torch.no_grad()
    def fresh(prompts):
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=False,
                                                  max_sequence_length=args.max_sequence_length)
        return embeds, pooled

    def encode(prompts):
        new = [p for p in dict.fromkeys(prompts) if p not in cache]
        n = 32 if device.type == "cuda" else 1  # one by one, a prompt's embedding does not depend on its company: a resumed run is exact
        for i in range(0, len(new), n):
            cache.update(zip(new[i:i + n], zip(*fresh(new[i:i + n]))))
        embeds, pooled = (torch.stack(e) for e in zip(*(cache[p] for p in prompts)))
        for p in list(cache)[:max(0, len(cache) - 256)]:
            del cache[p]
        return embeds, pooled
    if not getattr(args, "cache_text", False):
        return encode

    rows, (embeds, pooled) = {p: i for i, p in enumerate(dict.fromkeys([*prompts, ""]))}, fresh([""])
    size, path = embeds.numel() + pooled.numel(), f"{args.out_dir}/text.bin"
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "rb") as f:  # all of it now: a memory map over a full disk ends in a bus error
            os.posix_fallocate(f.fileno(), 0, len(rows) * size * embeds.element_size())
    except OSError as e:
        die(f"--cache_text needs {len(rows) * size * embeds.element_size() / 1e9:.1f} GB in {args.out_dir} ({e.strerror})")
    table = torch.from_file(path, shared=True, size=len(rows) * size, dtype=embeds.dtype).view(len(rows), size)
    local, of = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    todo = list(rows)[local::of]
    for i in tqdm(range(0, len(todo), 32), desc="text", disable=None if local == 0 else True):
        embeds, pooled = fresh(todo[i:i + 32])
        table[[rows[p] for p in todo[i:i + 32]]] = torch.cat([embeds.flatten(1), pooled], 1).cpu()
    all_reduce(torch.zeros(1, device=device)).item()  # wait, on the host too, for the others' shares
    shape, split = embeds.shape[1:], embeds[0].numel()
    pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None
    gc.collect(), torch.cuda.empty_cache()
    try:
        pipe.transformer.to(device)
    except torch.cuda.OutOfMemoryError as e:
        die(f"--pretrained {args.pretrained}: no room for its transformer ({str(e).splitlines()[0][:200]})", local=True)

    def look_up(prompts):
        found = table[[rows[p] for p in prompts]].to(device)
        return found[:, :split].unflatten(1, shape), found[:, split:]
    return look_up

def generator(device, *key):
    """A random generator seeded by its key, e.g. (seed, step): stateless, so that resuming needs nothing but the step."""
    return torch.Generator(device).manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))

def shard(n, rank, world):
    """This rank's rows of a batch of n; sizes differ by one at most where world does not divide n."""
    return slice(rank * n // world, (rank + 1) * n // world)

def data_order(length, first, count, seed):
    """Places first ... first+count-1 of an endless sequence of shuffled passes over `length` prompts."""
    return [shuffled(length, f"{seed}/pass/{i // length}")[i % length] for i in range(first, first + count)]

@functools.lru_cache(2)
def shuffled(length, key):
    """A permutation of range(length)."""
    return random.Random(key).sample(range(length), length)

def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Sum (or another op) over ranks, in place; nothing to do for one process."""
    if dist.is_initialized():
        try:
            dist.all_reduce(tensor, op)
        except RuntimeError as e:  # another rank has died; torchrun ends this one too, if it does not end by itself
            die(f"lost the other processes ({str(e).splitlines()[0][:120]}); go on from the last checkpoint with --resume", status=1, local=True)
    return tensor

def update(parameters, optimizer, args, skipped, name, loss):
    """One optimiser step on gradients summed over ranks in one flat all-reduce -> gradient norm. If that or the loss is not finite,
    nothing changes but skipped[name], and nan is returned; args.max_skipped of them in a row end the run."""
    grads = [p.grad for p in parameters]
    flat = all_reduce(torch.cat([*map(torch.flatten, grads), torch.stack([loss, torch.full_like(loss, stop["asked"])])]))  # so ranks agree on when to stop
    norm, loss, asked = torch.stack([flat[:-2].norm(), *flat[-2:]]).tolist()
    stop["agreed"] |= asked > 0
    finite = math.isfinite(norm) and math.isfinite(loss)
    skipped[name] = 0 if finite else skipped[name] + 1
    if finite:
        flat *= min(1, args.max_grad_norm / (norm + 1e-6))
        torch._foreach_copy_(grads, [g.view_as(p) for p, g in zip(parameters, flat[:-2].split([p.numel() for p in parameters]))])
        optimizer.step()
    elif skipped[name] >= args.max_skipped:
        die(f"{skipped[name]} updates in a row of the {name} adapter were not finite; the last good checkpoint is in {args.out_dir}", status=1)
    torch._foreach_zero_(grads)
    return norm if finite else math.nan

def distance(parameters, ema):
    """How far the weights have run from their average: |p - ema| / |ema|, over all together."""
    norm = lambda tensors: torch.stack(torch._foreach_norm(tensors)).norm()
    return (norm(torch._foreach_sub([p.detach() for p in parameters], ema)) / norm(ema)).item()

def guarded(reward):
    """The same reward, but one that raises, or whose scores are not one a picture, ends the run with its name and the prompts."""
    @functools.wraps(reward)
    def call(images, prompts, metadata):
        try:
            scores = reward(images, prompts, metadata)
            if scores.shape != (len(images),):
                raise ValueError(f"it gave scores of shape {tuple(scores.shape)} for {len(images)} pictures")
            return scores
        except Exception as e:
            each = dict.fromkeys(repr(prompt[:80]) for prompt in prompts)
            die(f"reward {reward.name} failed on {', '.join(list(each)[:9])}: {type(e).__name__}: {str(e)[:200]}", status=1, local=True)
    return call

def note_prompts(pipe, rows, args):
    """Say how many prompts are longer than what the text encoders read, and how many are repeated; rank 0 only."""
    if os.environ.get("RANK", "0") != "0":
        return
    prompts, most = [row["prompt"] for row in rows], (pipe.tokenizer_max_length, args.max_sequence_length)
    over = [[len(ids) > limit for ids in tokenizer(prompts).input_ids] for tokenizer, limit in zip((pipe.tokenizer, pipe.tokenizer_3), most)
            if tokenizer and prompts]
    long, repeated = sum(map(any, zip(*over))), len(prompts) - len(set(prompts))
    for count, what in (long, f"longer than CLIP's {most[0]} or T5's {most[1]} tokens: the rest is not read"), (repeated, "repeated: each counts"):
        if count:
            print(f"note: {count} of {len(prompts)} prompts are {what}", file=sys.stderr, flush=True)

def note_templates(rows, args):
    """Say so where stage 1 has nothing but the built-in prompts to learn from; rank 0 only.

    The generator learns to draw what it was asked for in training, and those ask for objects of 80 kinds and nothing else.
    """
    if args.prompts or os.environ.get("RANK", "0") != "0":
        return
    print(f"note: no --prompts, so the generator learns from {len(rows)} built-in ones in GenEval's form (\"{rows[0]['prompt']}\"): "
          "good for a try and for GenEval; to draw anything else, give --prompts FILE as under \"The real recipe\" in the README",
          file=sys.stderr, flush=True)

def make_log(args):
    """-> log(bar, images, **numbers): a line in out_dir/log.jsonl and the same numbers in the progress bar; rank 0 only."""
    if os.environ.get("RANK", "0") != "0":
        return lambda *_, **__: None
    path, last, flat = f"{args.out_dir}/log.jsonl", [time.time()], [0]
    if args.resume and os.path.exists(path):  # forget what came after the checkpoint
        try:
            with open(path, encoding="utf-8") as f:
                write_atomically({path: "".join(line for line in f if line.endswith("\n") and json.loads(line)["step"] < args.start).encode()})
        except (ValueError, KeyError, TypeError):
            die(f"{path} is damaged; move it away to go on")
    file, board = open(path, "ab" if args.resume else "wb", buffering=0), None
    if args.wandb:
        try:
            import wandb
            board = wandb.init(project=args.wandb, name=os.path.basename(args.out_dir), dir=args.out_dir, config=vars(args))
        except Exception as e:  # not installed, not logged in, no network
            die(f"--wandb {args.wandb}: {str(e).splitlines()[0][:200]}; pip install wandb, wandb login, or leave it out: log.jsonl has the same numbers")

    def log(bar, images, **numbers):
        now, peak = time.time(), torch.cuda.max_memory_allocated() / 2 ** 30 if torch.cuda.is_available() else 0
        speed = {"seconds": round(now - last[0], 4), "images_per_s": round(images / (now - last[0]), 2), **({"peak_gib": round(peak, 2)} if peak else {})}
        last[0], flat[0] = now, flat[0] + 1 if numbers.get("flat_groups") == 1 else 0
        if flat[0] == 20:
            print("warning: 20 epochs in a row all pictures of a prompt scored the same: SubGRPO learns nothing", file=sys.stderr, flush=True)
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}  # JSON knows no nan
        numbers["skipped"] = sum(v is None for k, v in numbers.items() if k.startswith("grad_"))
        try:
            file.write((json.dumps({**numbers, **speed}) + "\n").encode())
        except OSError as e:
            die(f"cannot write {path} ({e.strerror}); make room, and go on from the last checkpoint with --resume", status=1)
        if board:
            board.log({**numbers, **speed}, step=numbers["step"])
        bar.set_postfix({k: f"{v:.3g}" for k, v in {**numbers, **speed}.items() if k != "step" and isinstance(v, (int, float))}, refresh=False)
    return log

def sync(path):
    """Flush a file, or a directory's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor), os.close(descriptor)

def as_bytes(save, *inputs, **options):
    """What save(*inputs, file, **options) writes. In memory first: on a full disk torch.save fails in a way that cannot be caught."""
    save(*inputs, buffer := io.BytesIO(), **options)
    return buffer.getbuffer()

def write_atomically(files):
    """files {path: bytes}: all are on disk under a temporary name before the first is renamed. A kill leaves old files or new ones,
    never half of one; a full disk leaves the old ones. What was ckpt.pt becomes ckpt.prev.pt."""
    try:
        for path, content in files.items():
            with open(path + ".tmp", "wb") as f:
                f.write(content)
            sync(path + ".tmp")
    except OSError as e:
        [os.remove(path + ".tmp") for path in files if os.path.exists(path + ".tmp")]
        die(f"cannot write {path} ({e.strerror}); make room: what was saved before is intact, and a run goes on with --resume", status=1)
    for path in files:
        if path.endswith("/ckpt.pt") and os.path.exists(path):
            os.replace(path, path[:-3] + ".prev.pt")
        os.replace(path + ".tmp", path)
    with contextlib.suppress(OSError):  # some network file systems cannot
        sync(os.path.dirname(path) or ".")

def save_or_stop(args, state, step, last):
    """Save if it is time to. After SIGTERM, SIGINT or SIGHUP also say how to go on, and exit with status 0: all ranks, at the same step."""
    stopping = stop["agreed"] and step < last
    if step % args.save_every == 0 or step == last or stopping or 0 < 60 * args.save_minutes < time.time() - args.saved_at:
        save_checkpoint(args, state, step)
        args.saved_at = time.time()
    if stopping:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped by a signal and saved after {step} of {last}; the same command with --resume goes on", flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(0)

def save_checkpoint(args, state, step):
    """generator_ema.pt and fake.pt (flat, published format) and ckpt.pt, from which --resume goes on exactly: random numbers and the order
    of the prompts are functions of (seed, step), so that the step is all there is to save of them. Rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        content = {k: v.state_dict() if hasattr(v, "state_dict") else [p.detach().cpu() for p in v] for k, v in state.items() if k != "keys"}
        things = {"generator_ema.pt": dict(zip(state["keys"], content["ema"])), "fake.pt": dict(zip(state["keys"], content["fake"])),
                  "ckpt.pt": {**content, "step": step, "flags": vars(args)}}
        if os.path.exists(f"{args.out_dir}/log.jsonl"):
            sync(f"{args.out_dir}/log.jsonl")  # it must not be behind the checkpoint
        write_atomically({f"{args.out_dir}/{name}": as_bytes(torch.save, thing) for name, thing in things.items()})

def load_checkpoint(args, state, rows, transformer):
    """With --resume put the last checkpoint into state -> the step to go on with; 0 if there is none. Dies if it is damaged, or of another
    program, model, prompts or flags; and in any case if the disk has no room for checkpoints."""
    paths = [p for p in (f"{args.out_dir}/ckpt.pt", f"{args.out_dir}/ckpt.prev.pt") if os.path.exists(p)]
    # 3 lists of weights and 4 of moments in ckpt.pt, 2 beside it; all that under temporary names, and once more for ckpt.prev.pt
    need, room = (3 - len(paths)) * 9 * 4 * sum(p.numel() for p in state["generator"]), shutil.disk_usage(args.out_dir).free
    if room < need:
        die(f"--out_dir {args.out_dir} has {room / 1e9:.2f} GB free, the checkpoints need {need / 1e9:.2f}")
    # what the flags do not show: the frozen weights (the first 64 of each, as bf16 rounds them on any device) and the prompts
    frozen = [(k, p.flatten()[:64].bfloat16().tolist()) for k, p in transformer.named_parameters() if not p.requires_grad]
    for name, content in ("pretrained or cold_start content", frozen), ("prompts content", rows):
        setattr(args, name, hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12])
    args.made_with = {**{name: version(name) for name in ("torch", "diffusers", "peft", "transformers")}, "device": args.device,
                      "processes": int(os.environ.get("WORLD_SIZE", 1))}
    args.saved_at = time.time()
    found = [all_reduce(torch.tensor(float(bool(paths)), device=transformer.device), op).item() for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX)]
    if found[0] != found[1]:
        die(f"some processes see a checkpoint in --out_dir {args.out_dir} and some do not: it must lie on a file system that all machines share")
    if not args.resume or not paths:
        return 0
    hint = f"; delete {paths[0]} to go on from the one before it" if paths[1:] else ""
    saved, names = read(paths[0], "checkpoint", hint), set(vars(args)) - FREE
    flags = saved.get("flags") if isinstance(saved, dict) and "step" in saved else None
    if not isinstance(flags, dict) or set(flags) - FREE != names:
        die(f"{paths[0]} is not a checkpoint of this program, or of another version of it{hint}")
    changed = [f"--{k} {flags[k]} -> {v}" for k, v in vars(args).items() if k in names and flags[k] != v]
    if changed:
        die(f"{paths[0]} was made with other flags ({', '.join(changed)}): repeat them, or choose another --out_dir")
    for name in set(state) - {"keys"}:
        if hasattr(state[name], "load_state_dict"):
            state[name].load_state_dict(saved[name])
        else:
            torch._foreach_copy_([p.data for p in state[name]], saved[name])
    if os.environ.get("RANK", "0") == "0":
        changed = ", ".join(f"{k} {flags['made_with'].get(k)} -> {v}" for k, v in args.made_with.items() if flags["made_with"].get(k) != v)
        print(f"going on from {paths[0]}, step {saved['step']}{changed and f'; changed since ({changed}): the same results up to rounding'}"
              + ", but for the random numbers, which are each device's own" * ("device" in changed), flush=True)
    return saved["step"]

def decode(pipe, latents):
    """Latents [B,C,h,w] -> pictures [B,3,H,W] in [0,1], float32, differentiable."""
    config = pipe.vae.config
    latents = (latents / config.scaling_factor + config.shift_factor).to(pipe.vae.dtype)
    if pipe.low_memory:  # one by one, and again in the backward pass: the activations of one picture at a time
        run = lambda z: pipe.vae.decode(z).sample
        pictures = torch.cat([torch.utils.checkpoint.checkpoint(run, z, use_reentrant=False, preserve_rng_state=False) for z in latents.split(1)])
    else:
        pictures = pipe.vae.decode(latents).sample
    return (at_least_float32(pictures) / 2 + .5).clamp(0, 1)

def save_grid(pictures, path, columns=8):
    """[B,3,H,W] in [0,1] -> one PNG; small pictures are magnified to 64 pixels."""
    images = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pictures.detach().float()))
    columns, size = min(columns, len(images)), images[0].size
    images += [Image.new("RGB", size, "white")] * (-len(images) % columns)
    grid = make_image_grid(images, len(images) // columns, columns, resize=max(64, size[0]))
    write_atomically({path: as_bytes(grid.save, format="png")})

@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # not worth compiling for eight pictures
def preview(pipe, adapters, encode, rows, args, name):
    """Eight fixed prompts and seeds through the generator as it is now -> out_dir/samples/name.png; rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        device, levels = pipe.transformer.device, sigmas(args.num_steps, args.shift)
        g, text = generator(device, "preview", args.seed), encode([rows[i * len(rows) // 8]["prompt"] for i in range(8)])
        noise = [torch.randn(8, *pipe.latent_shape, generator=g, device=device) for _ in levels]
        x = rollout(play(pipe.transformer, adapters, text), noise[0], levels, args.num_steps, args.eta, noise[1:])[-1]
        save_grid(decode(pipe, x), f"{args.out_dir}/samples/{name}.png")


if __name__ == "__main__":
    main()
