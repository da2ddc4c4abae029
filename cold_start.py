"""Stage 1, the cold start: AC-DMD distils a multi-step teacher into a 4-step generator (Sec. 3.1).

One frozen transformer plays three roles, told apart by the LoRA adapter that is switched on:

    teacher    no adapter    the multi-step model with classifier-free guidance; never trained
    student    "generator"   draws a picture in 4 CPS steps; learns to draw what the teacher draws
    fake       "fake"        the velocity of what the student draws at the moment (the "fake score")

A step of training (Algorithm 1, first half): the student draws k of its 4 steps, to x_s at noise
level s. Every step, fake learns the velocity of x_s noised further, to a level t > s. Every 10 steps
the student moves x_s to where the teacher, not fake, would have put it.

Read from top to bottom: flags, losses, loop. The sampler is in cps.py, the transformer and its
adapters in model.py; common.py and checkpoint.py are plumbing.

    torchrun --nproc_per_node=8 cold_start.py     # SD3.5-M, 512 px: the recipe of the authors' release
    python cold_start.py --preset tiny            # the laptop model in assets/tiny, minutes on a CPU
"""

import os
import random

import torch
import torch.distributed as dist
from tqdm import tqdm

import cps
import variants
from checkpoint import Run
from common import (
    Log,
    Parser,
    StepRandom,
    Sums,
    checked,
    data_order,
    die,
    distance,
    micro_batch,
    parse,
    resolution,
    say,
    setup,
    shard,
    share,
    update,
)
from cps import ambient_target, cps_step, per_sample, renoise, rollout
from model import graphed, load_base, preview
from prompts import load_prompts, note_templates
from text import note_prompts

HERE = os.path.dirname(os.path.abspath(__file__))
PRESETS = {  # defaults that differ; everything else is the same for every model
    "sd35m": dict(pretrained="stabilityai/stable-diffusion-3.5-medium"),
    "sd3m": dict(
        pretrained="stabilityai/stable-diffusion-3-medium-diffusers",
        resolution=1024,
        cfg=7.0,
    ),
    "flux1": dict(pretrained="black-forest-labs/FLUX.1-dev", cfg=3.5),
    "klein4b": dict(
        pretrained="black-forest-labs/FLUX.2-klein-base-4B",
        generator_pretrained="black-forest-labs/FLUX.2-klein-4B",
        cfg=4.0,
        lr=1e-6,
        fake_lr=1e-6,
    ),
    "klein9b": dict(
        pretrained="black-forest-labs/FLUX.2-klein-base-9B",
        generator_pretrained="black-forest-labs/FLUX.2-klein-9B",
        cfg=4.0,
        lr=1e-6,
        fake_lr=1e-6,
    ),
    "tiny": dict(
        pretrained=os.path.join(HERE, "assets/tiny"),
        prompts=os.path.join(HERE, "assets/tiny/prompts_train.jsonl"),
        device="auto",
        resolution=32,
        cfg=2.0,
        steps=800,
        batch_size=64,
        micro_batch=64,
        lr=1e-3,
        fake_lr=1e-3,
        generator_every=2,
        sample_every=200,
        save_every=200,
        compile=0,
    ),
}
# --paper: its letter, where the authors' release differs from it (docs/paper_vs_release.md).
PAPER = dict(lora_rank=64, lora_alpha=32, variant="printed_std,step_consistency,score_gradient")


def arguments():
    parser = Parser("Stage 1: AC-DMD, from a multi-step teacher to a 4-step generator.")
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="sd35m", help="set of default flags")
    add("--paper", action="store_true", help="the paper's letter, in place of the authors' release")
    add("--variant", default="", metavar="NAME,...", help="other functions, see variants.py")
    # base model and prompts
    add("--pretrained", help="diffusers directory or hub id of the base model")
    add("--generator_pretrained", default="", metavar="DIR", help="the generator's own base model")
    add("--prompts", default="", help="file: a prompt a line, JSON lines or a JSON list")
    add("--resolution", type=resolution, default=512, help="side, or height x width as 768x512")
    add("--cfg", type=float, default=4.5, help="guidance scale of the teacher")
    # the adapters
    add("--lora_rank", type=int, default=32, help="rank of the adapters")
    add("--lora_alpha", type=float, default=64, help="their product is scaled by alpha / rank")
    # the algorithm
    add("--num_steps", type=int, default=4, help="sampling steps K of the generator")
    add(
        "--eta", type=float, default=0.9, help="new noise of a step: 0 Euler, 1 consistency sampler"
    )
    add("--gamma", type=float, default=0.01, help="weight of the consistency loss; 0 is A-DMD")
    add(
        "--consistency_share",
        type=share,
        default=1.0,
        help="ask for consistency on a random share of the pictures, 1/3 for speed",
    )
    add(
        "--reuse_rollouts",
        action="store_true",
        help="learn from all states of a roll-out until the generator changes, for speed",
    )
    add("--generator_every", type=int, default=10, help="update the generator every so many steps")
    # optimisation
    add("--steps", type=int, default=15000, help="optimiser steps of the fake score")
    add("--batch_size", type=int, default=72, help="pictures a step, over all GPUs together")
    add(
        "--micro_batch",
        type=int,
        default=0,
        help="pictures a GPU handles at once: memory and speed; 0: as many as it holds",
    )
    add("--lr", type=float, default=3e-5, help="learning rate of the generator")
    add("--fake_lr", type=float, default=3e-5, help="learning rate of the fake score")
    add(
        "--anneal",
        type=float,
        default=0.0,
        help="share of the steps, the last ones, over which both fall to 0",
    )
    add("--ema", type=float, default=0.99, help="decay of the generator's average, a step")
    # the machine
    add("--seed", type=int, default=0, help="one seed, one result, on any number of GPUs")
    add("--device", default="cuda", help="cuda, cpu, mps, or auto: the best there is")
    add("--compile", type=int, choices=(0, 1), default=1, help="on a GPU: compile the blocks")
    add(
        "--graphs",
        type=int,
        choices=(0, 1),
        default=1,
        help="on a GPU: record passes as CUDA graphs",
    )
    add(
        "--cache_text", action="store_true", help="encode all prompts first, free the text encoders"
    )
    add("--low_memory", action="store_true", help="for 24 GB: --cache_text, fewer activations")
    # output
    add("--start_from", default="", metavar="DIR", help="a run whose weights a new run begins with")
    add("--out_dir", default="out/cold_start", help="a run that is in there goes on")
    add("--sample_every", type=int, default=500, help="save a picture grid every so many steps")
    add("--save_every", type=int, default=500, help="save a checkpoint every so many steps")
    add("--keep_every", type=int, default=0, help="keep generator_ema_N.pt every so many steps")
    add("--wandb", default="", metavar="PROJECT", help="log to Weights & Biases, too")
    args = parse(parser, PRESETS, PAPER)
    if args.reuse_rollouts and "dmd2" in args.variant.split(","):
        die("--reuse_rollouts: with --variant dmd2 each step's roll-out has its own levels")
    return args


# -------------------------------------------------------------------------------------------------
# Losses. A velocity function is v(x [B,C,H,W], sigma float or [B]) -> [B,C,H,W]. A loss is one number
# a picture, [B].


def renoise_time(s, u):
    """Where in the sub-interval to compare: t ~ U[s + 0.01, 1] clamped to [0.02, 0.98].

    s float, u [B] uniform in [0,1] -> [B].
    """
    return (s + 0.01 + (1 - s - 0.01) * u).clamp(0.02, 0.98)


def steps_back(u):
    """How far below t the consistency looks: U{1..200} / 1000, from u [B] uniform in [0,1) -> [B]."""
    return (1 + (200 * u).floor()) / 1000


def ambient_loss(v_fake, v_target, sig):
    """Denoising score matching from a start that is noisy itself (Eq. 10, Prop. D.1) -> [B].

    v_target grows like 1 / sig as t -> s: sig keeps the loss finite. With the release's weight it is
    min(1, 10 sig^2) (v_fake - v_target)^2.
    """
    weight = (1 / sig**2).clamp(0, 10)
    return (weight * (sig * v_fake - sig * v_target) ** 2).flatten(1).mean(1)


def consistency_loss(fake, x_t, v_t, t, t_below, noise1, noise2, eta):
    """fake's prediction of x0 must not drift, on average, along fake's own path (Eq. 11) -> [B].

    v_t = fake(x_t, t); t, t_below [B]. The gradient goes through all three predictions of x0, and not
    through the steps between them. The squared average drift is estimated by a product of two
    independent drifts; the square of one would add its variance (Eq. 22, App. F).
    """
    x1, _, _ = cps_step(x_t, v_t.detach(), t, t_below, eta, noise1)
    x2, _, _ = cps_step(x_t, v_t.detach(), t, t_below, eta, noise2)
    v1, v2 = fake(torch.cat([x1, x2]), torch.cat([t_below, t_below])).chunk(2)  # one pass for both
    x0 = x_t - per_sample(t, x_t) * v_t
    drift1 = (x1 - per_sample(t_below, x1) * v1) - x0
    drift2 = (x2 - per_sample(t_below, x2) * v2) - x0
    return (drift1 * drift2).flatten(1).mean(1)


def consistency_path(fake, x_s, s, s_next, x_t, v_t, t, back):
    """Where Eq. 11 is asked for -> (x_t, fake's velocity there, t', t''): from t to up to 0.2 below it.

    (fake, x_s, s and s_next, the generator's next level, serve the paper's letter alone: variants.py.)
    """
    return x_t, v_t, t, (t - back).clamp(min=0)


def fake_score_loss(
    fake, x_s, s, s_next, t, noise, back, noise1, noise2, gamma, eta, some=None, share=1.0
):
    """The fake score's loss (Eq. 12) -> (loss, ambient, consistency), each [B].

    x_s [B,C,H,W]: generator samples at noise level s (0 for finished pictures); t [B] > s: where to
    score them; back [B] in (0, 0.2]: how far below t the consistency looks; the noises are like
    x_s. some: places of a random share of the pictures, which alone are asked for consistency and
    weigh 1 / share, so that the expectation stays what it is; None: all.
    """
    x_t = renoise(x_s, s, t, noise)
    v_t = fake(x_t, t)
    ambient = ambient_loss(v_t, *ambient_target(x_s, s, t, noise))
    none = torch.zeros_like(ambient)
    if gamma == 0 or (some is not None and len(some) == 0):
        return ambient, ambient, none
    if some is None:
        path = consistency_path(fake, x_s, s, s_next, x_t, v_t, t, back)
        consistency = consistency_loss(fake, *path, noise1, noise2, eta)
    else:

        def fake_there(x, sigma):
            return fake(x, sigma, some)

        tensors = (x_s, s, s_next, x_t, v_t, t, back)
        path = consistency_path(fake_there, *(tensor[some] for tensor in tensors))
        there = consistency_loss(fake_there, *path, noise1[some], noise2[some], eta)
        consistency = none.index_add(0, some, there / share)
    return ambient + gamma * consistency, ambient, consistency


def generator_loss(x_s, s, t, noise, noise_back, teacher, fake, eta):
    """The distribution-matching term (Eq. 9) -> [B]. Stage 2 imports it as its anchor: that is Eq. 7.

    Teacher (with guidance) and fake both look at x_s re-noised to t. Each takes one CPS step back to
    s with the same noise. Where they land differs by a positive multiple of the difference of their
    scores. The loss's gradient with respect to x_s is (y_fake - y_teacher) / mean |x_s - y_teacher|,
    divided by the number of elements.
    """
    with torch.no_grad():
        x_t = renoise(x_s, s, t, noise)
        y_teacher, _, _ = cps_step(x_t, teacher(x_t, t), t, s, eta, noise_back)
        y_fake, _, _ = cps_step(x_t, fake(x_t, t), t, s, eta, noise_back)
        size = (x_s - y_teacher).abs().flatten(1).mean(1).view(-1, 1, 1, 1)
        # 0 / 0 where both agree; any other nan stays one, so that `update` skips it
        target = x_s - torch.where(size == 0, 0, (y_fake - y_teacher) / size)
    return 0.5 * step_weight(s) * (x_s - target).square().flatten(1).mean(1)


def step_weight(s):
    """Weight of Eq. 9 after a step that ends at level s: 1, although the last step then leads.

    docs/paper.md has the sizes of the gradients.
    """
    return 1.0


def executed_levels(levels, k):
    """Noise levels of the k steps that are executed: from 1 to s. (A function for DMD2: variants.py.)"""
    return levels[: k + 1]


def state_of_a_rollout(step, args):
    """--reuse_rollouts: the step whose roll-out this one learns from, and which of its states k.

    A roll-out of all K steps serves up to K updates of fake, each with another k, in random order; but
    none after the generator has changed. Every k is as likely as before.
    """
    since_change = step % args.generator_every
    place = since_change % args.num_steps
    order = list(range(1, args.num_steps + 1))
    random.Random(f"{args.seed}/rollout/{step - place}").shuffle(order)
    return step - place, order[place]


def set_rates(student_opt, fake_opt, step, args):
    """Learning rates of a step: constant, then on a straight line to 0 over the last --anneal."""
    share = 1.0
    if args.anneal > 0:
        share = min(1.0, (args.steps - step) / (args.anneal * args.steps))
    for optimizer, rate in ((student_opt, args.lr), (fake_opt, args.fake_lr)):
        for group in optimizer.param_groups:
            group["lr"] = share * rate


# -------------------------------------------------------------------------------------------------
# Algorithm 1, lines of stage 1
def main():
    args = arguments()
    variants.swap(args.variant, 1, vars(cps), globals())
    device, rank, world = setup(args)
    rows = checked(load_prompts, args.prompts)
    note_templates(rows, args)

    # One frozen transformer, and an adapter for each of the two roles that learn.
    base = load_base(args, device, [row["prompt"] for row in rows])
    levels = base.levels(args.num_steps)  # 1, .9, .75, .5, 0
    for name in ("generator", "fake"):
        base.add_adapter(name, args.lora_rank, args.lora_alpha, args.seed)
    student_params, fake_params = base.train_only("generator", "fake")  # all weights in one tensor
    fused = device.type == "cuda"
    student_opt = torch.optim.AdamW([student_params], lr=args.lr, weight_decay=0, fused=fused)
    fake_opt = torch.optim.AdamW([fake_params], lr=args.fake_lr, weight_decay=0, fused=fused)
    ema = student_params.detach().clone()

    # All that a checkpoint has to hold, since random numbers are functions of (seed, step).
    state = {
        "generator": student_params,
        "fake": fake_params,
        "ema": ema,
        "G_opt": student_opt,
        "F_opt": fake_opt,
        "shapes": {key: p.shape for key, p in base.adapter("fake").items()},
    }
    run = Run(args, state, rows, base.transformers())
    note_prompts(base, rows)

    # The batch, over all GPUs together, of which this one has its rows, some at a time.
    n_pictures = args.batch_size
    my_rows = shard(n_pictures, rank, world)
    n_mine = my_rows.stop - my_rows.start
    if rank == 0:
        say(
            f"AC-DMD: {args.steps} steps of {n_pictures} pictures on {world} x {device.type}, "
            f"{len(rows)} prompts, {student_params.numel() / 1e6:.1f} M parameters an adapter"
        )

    # The three roles: velocity functions of one transformer.
    def student(text):
        return base.velocity(["generator"], text)

    def fake(text):
        return base.velocity(["fake"], text)

    def teacher(text):
        return base.velocity([], text, args.cfg)

    # The work on one micro-batch: functions of tensors alone, which a GPU records once and replays.
    # Losses are divided by the whole batch, so that micro-batches and GPUs simply add up.
    def student_pass(x, s, *text):
        return student(text)(x, s)

    def fake_pass(x_s, s, s_next, t, noise, back, noise1, noise2, some, *text):
        weights = (args.gamma, args.eta, some, args.consistency_share)
        losses = fake_score_loss(
            fake(text), x_s, s, s_next, t, noise, back, noise1, noise2, *weights
        )
        (losses[0].sum() / n_pictures).backward()
        return torch.stack([loss.sum() for loss in losses]).detach()

    def generator_pass(x, s_before, s, step_noise, t, noise, noise_back, *text):
        x_s, _, _ = cps_step(x, student(text)(x, s_before), s_before, s, args.eta, step_noise)
        losses = generator_loss(x_s, s, t, noise, noise_back, teacher(text), fake(text), args.eta)
        loss = losses.sum()
        (loss / n_pictures).backward()
        return loss.detach()

    def largest_passes(n):
        x = torch.zeros(n, *base.latent_shape, device=device)
        half = torch.full((n,), 0.5, device=device)
        some = torch.arange(n, device=device)
        text = base.encode([rows[0]["prompt"]] * n)
        fake_pass(x, half, half, half + 0.1, x, half / 10, x, x, some, *text)
        generator_pass(x, half + 0.1, half, x, half + 0.1, x, x, *text)

    # Compiled and recorded, the passes were seen to take .64 (SD3.5-M) and .78 (FLUX.1) of that memory.
    at_once = micro_batch(args, n_mine, device, largest_passes, compiled=0.8)
    student_params.grad.zero_()
    fake_params.grad.zero_()
    micro_batches = [slice(i, i + at_once) for i in range(0, n_mine, at_once)]
    student_pass, fake_pass, generator_pass = graphed(
        args.graphs, device, student_pass, fake_pass, generator_pass
    )

    def drawn_in(step):
        return StepRandom(args.seed, step, n_pictures, my_rows, base.latent_shape, device)

    def velocity_of(text):
        return lambda x, level: student_pass(x, x.new_full((len(x),), level), *text)

    silent = None if rank == 0 else True  # None: no bar where there is no terminal
    bar = tqdm(range(run.start, args.steps), initial=run.start, total=args.steps, disable=silent)
    log = Log(args, run.start, device)
    skipped = {"generator": 0, "fake": 0}  # updates in a row that were not finite
    path = None  # of the last roll-out: its states, from noise path[0] on

    for step in bar:
        log.begin()

        # ---- draw. k is the same for all pictures and ranks, so that ranks stay in step (Eq. 8)
        draw = drawn_in(step)
        k = draw.scalars.randint(1, args.num_steps)
        some = draw.some(args.consistency_share, micro_batches)
        first, depth = step, k  # the step whose roll-out is used, and how far that goes
        if args.reuse_rollouts:
            first, k = state_of_a_rollout(step, args)
            depth = args.num_steps
        executed = executed_levels(levels, depth)
        s_before, s = executed[k - 1 : k + 1]
        sums = Sums(device, "loss_fake", "loss_ambient", "loss_consistency")
        norms = {}
        set_rates(student_opt, fake_opt, step, args)

        # ---- roll out: the first k steps of the student, without gradient (Eq. 8)
        if first == step or path is None:  # None: a run that goes on amid a roll-out repeats it
            its = draw if first == step else drawn_in(first)
            path = [its.normal()]
            step_noise = [its.normal() for _ in range(depth)]
            places = data_order(len(rows), first * n_pictures, n_pictures, args.seed)[my_rows]
            prompts = [rows[place]["prompt"] for place in places]
            texts = [base.encode(prompts[b]) for b in micro_batches]
            log.lap("text")
            path += [torch.empty_like(path[0]) for _ in range(depth)]
            for b, text in zip(micro_batches, texts):
                noises = [noise[b] for noise in step_noise]
                with torch.no_grad():
                    states = rollout(
                        velocity_of(text), path[0][b], executed, depth, args.eta, noises
                    )
                for whole, state_of_b in zip(path, states):
                    whole[b] = state_of_b
        x_before, x_s = path[k - 1 : k + 1]
        log.lap("rollout")

        # ---- fake follows the student, every step (Eq. 10-12)
        levels_before = x_s.new_full((n_mine,), s_before)
        levels_here = x_s.new_full((n_mine,), s)
        levels_next = x_s.new_full((n_mine,), levels[min(k + 1, args.num_steps)])
        t = renoise_time(s, draw.uniform())
        noise, back = draw.normal(), steps_back(draw.uniform())
        noise1, noise2 = draw.normal(), draw.normal()
        for b, chosen, text in zip(micro_batches, some, texts):
            loss, ambient, consistency = fake_pass(
                x_s[b], levels_here[b], levels_next[b], t[b], noise[b], back[b],
                noise1[b], noise2[b], chosen, *text,
            )  # fmt: skip
            sums.add(loss_fake=loss, loss_ambient=ambient, loss_consistency=consistency)
        norms["grad_fake"] = update(fake_params, fake_opt, skipped, "fake", sums["loss_fake"])
        log.lap("fake")

        # ---- the student follows the teacher, now and then, through its k-th step alone (Eq. 9)
        if (step + 1) % args.generator_every == 0:
            t = renoise_time(s, draw.uniform())
            noise, noise_back = draw.normal(), draw.normal()
            loss = torch.zeros((), device=device)
            for b, text in zip(micro_batches, texts):
                loss += generator_pass(
                    x_before[b], levels_before[b], levels_here[b], step_noise[k - 1][b],
                    t[b], noise[b], noise_back[b], *text,
                )  # fmt: skip
            sums.of["loss_generator"] = loss
            norms["grad_generator"] = update(
                student_params, student_opt, skipped, "generator", loss
            )
            log.lap("generator")
        ema.lerp_(student_params.detach(), 1 - args.ema)

        # ---- log, look, save
        losses = sums.over_ranks(lambda total: total / n_pictures)
        moved = distance(student_params, ema)
        log(bar, n_pictures, step=step, k=k, **losses, **norms, ema_drift=moved)
        if args.sample_every and (step + 1) % args.sample_every == 0:
            log.show(preview(base, ["generator"], rows, args, f"step_{step + 1}"), step)
        run.save_or_stop(step + 1, args.steps)

    if rank == 0:
        say(
            f"done: {args.out_dir}/generator_ema.pt (the generator), {args.out_dir}/fake.pt "
            "(stage 2 starts from both)"
        )
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
