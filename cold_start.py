"""Stage 1, the cold start: AC-DMD distils a multi-step teacher into a 4-step generator (Sec. 3.1).

One frozen transformer plays three roles, told apart by the LoRA adapter that is switched on:

    teacher    no adapter    the multi-step model with classifier-free guidance; never trained
    student    "generator"   draws a picture in 4 CPS steps; learns to draw what the teacher draws
    fake       "fake"        the velocity of what the student draws at the moment (the "fake score")

A step of training (Algorithm 1, first half): the student draws k of its 4 steps, to x_s at noise
level s. Every step, fake learns to denoise x_s. Every 10 steps the student moves x_s to where the
teacher, not fake, would have put it.

Read from top to bottom: flags, losses, loop. The sampler is in cps.py, the transformer and its
adapters in model.py; common.py and checkpoint.py are plumbing.

    torchrun --nproc_per_node=8 cold_start.py     # SD3.5-M, 512 px: the recipe of the authors' release
    python cold_start.py --preset tiny            # the laptop model in assets/tiny, minutes on a CPU
"""

import os

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import load_checkpoint, save_or_stop
from common import (
    Log,
    StepRandom,
    Sums,
    checked,
    data_order,
    distance,
    make_parser,
    parse,
    setup,
    shard,
    update,
)
from cps import ambient_target, cps_step, per_sample, renoise, rollout, sigmas
from model import (
    adapter,
    add_adapter,
    check_levels,
    evaluated,
    graphed,
    load_pipeline,
    note_prompts,
    play,
    preview,
    text_encoder,
    train_only,
)
from prompts import load_prompts, note_templates

HERE = os.path.dirname(os.path.abspath(__file__))
PRESETS = {  # defaults that differ; everything else is the same for every model
    "sd35m": dict(pretrained="stabilityai/stable-diffusion-3.5-medium"),
    "sd3m": dict(
        pretrained="stabilityai/stable-diffusion-3-medium-diffusers",
        resolution=1024,
        cfg=7.0,
        micro_batch=2,
    ),
    "tiny": dict(
        pretrained=os.path.join(HERE, "assets/tiny"),
        prompts=os.path.join(HERE, "assets/tiny/prompts_train.jsonl"),
        device="auto",
        resolution=32,
        max_sequence_length=8,
        cfg=2.0,
        steps=800,
        batch_size=64,
        micro_batch=64,
        lr=1e-3,
        fake_lr=1e-3,
        generator_every=2,
        ema=0.99,
        sample_every=200,
        save_every=200,
        compile=0,
    ),
}
PAPER = dict(
    lora_rank=64,
    lora_alpha=32,
    renoise_std="printed",
    consistency_times="steps",
    dm_gradient="score",
)  # --paper: its letter (README)


def arguments():
    parser, add = make_parser(
        "Stage 1: AC-DMD, from a multi-step teacher to a 4-step generator.",
        PRESETS,
        "out/cold_start",
        PAPER,
    )
    add("--steps", type=int, default=15000, help="optimiser steps of the fake score")
    add("--generator_every", type=int, default=10, help="update the generator every so many steps")
    add(
        "--batch_size",
        type=int,
        default=72,
        help="pictures a step over all GPUs together; does not depend on the number of GPUs",
    )
    add(
        "--micro_batch",
        type=int,
        default=3,
        help="pictures a GPU handles at once; gradients are accumulated over them",
    )
    add("--lr", type=float, default=3e-5, help="learning rate of the generator")
    add("--fake_lr", type=float, default=3e-5, help="learning rate of the fake score")
    add(
        "--ema",
        type=float,
        default=0.99,
        help="decay of the generator's average, applied after every step",
    )
    add("--lora_init_std", type=float, help="std of a fresh adapter's A; None: 1/rank, peft's own")
    add(
        "--dmd2",
        action="store_true",
        help="DMD2-style training: the last executed step goes to level 0 whichever it is, and its x-prediction is "
        "re-noised over [0, 1] (give --gamma 0 too)",
    )
    args = parse(parser)
    check_levels(args)
    return args


# -------------------------------------------------------------------------------------------------
# Losses. A velocity function is v(x [B,C,H,W], sigma float or [B]) -> [B,C,H,W]. A loss is one number
# a picture, [B].


def renoise_time(s, u):
    """Where in the sub-interval to compare: t ~ U[s + 0.01, 1] clamped to [0.02, 0.98].

    s float, u [B] uniform in [0,1] -> [B].
    """
    return (s + 0.01 + (1 - s - 0.01) * u).clamp(0.02, 0.98)


def ambient_loss(v_fake, v_target, sig):
    """Denoising score matching from a start that is noisy itself (Eq. 10, Prop. D.1) -> [B].

    v_target grows like 1 / sig as t -> s: sig keeps the loss finite.
    """
    weight = (1 / sig**2).clamp(0, 10)
    return (weight * (sig * v_fake - sig * v_target) ** 2).flatten(1).mean(1)


def consistency_loss(fake, x_t, v_t, t, t_below, noise1, noise2, eta):
    """fake's prediction of x0 must not drift, on average, along fake's own path (Eq. 11) -> [B].

    v_t = fake(x_t, t); t, t_below [B]. The squared average drift is estimated by a product of two
    independent drifts; the square of one would add its variance (Eq. 22, App. F).
    """
    x1, _, _ = cps_step(x_t, v_t.detach(), t, t_below, eta, noise1)
    x2, _, _ = cps_step(x_t, v_t.detach(), t, t_below, eta, noise2)
    v1, v2 = fake(torch.cat([x1, x2]), torch.cat([t_below, t_below])).chunk(2)  # one pass for both
    x0 = x_t - per_sample(t, x_t) * v_t
    drift1 = (x1 - per_sample(t_below, x1) * v1) - x0
    drift2 = (x2 - per_sample(t_below, x2) * v2) - x0
    return (drift1 * drift2).flatten(1).mean(1)


def fake_score_loss(
    fake, x_s, s, t, noise, back, noise1, noise2, gamma, eta, std="exact", after=None
):
    """The fake score's loss (Eq. 12) -> (loss, ambient, consistency), each [B].

    x_s [B,C,H,W]: generator samples at noise level s (0 for finished pictures); t [B] > s: where to
    score them; back [B] in (0, 0.2]: how far below t the consistency looks; the noises are like x_s.
    std: see cps.renoise. after: the paper's letter for the consistency, from x_s itself at
    t' = s = t_k to t'' = after = t_{k+1}.
    """
    x_t = renoise(x_s, s, t, noise, std)
    v_t = fake(x_t, t)
    ambient = ambient_loss(v_t, *ambient_target(x_s, s, t, noise, std))
    if gamma == 0:
        return ambient, ambient, torch.zeros_like(ambient)
    t_below = (t - back).clamp(min=0)
    if after is not None:
        x_t = x_s
        t_below = torch.zeros_like(t) + after
        t = torch.zeros_like(t) + s
        v_t = fake(x_t, t)
    consistency = consistency_loss(fake, x_t, v_t, t, t_below, noise1, noise2, eta)
    return ambient + gamma * consistency, ambient, consistency


def generator_loss(
    x_s, s, t, noise, noise_back, teacher, fake, eta, std="exact", gradient="transition"
):
    """The distribution-matching term (Eq. 9) -> [B]. Stage 2 imports it as its anchor: that is Eq. 7.

    Teacher (with guidance) and fake both look at x_s re-noised to t. Each takes one CPS step back to
    s with the same noise. Where they land differs by the difference of their scores. The loss's
    gradient with respect to x_s is (y_fake - y_teacher) / mean |x_s - y_teacher|, averaged over the
    elements. gradient "score" is the paper's letter: the gradient of the KL divergence itself,
    (score_fake - score_teacher)(x_t) dx_t/dx_s, which adds up over the elements, as log pi does.
    """
    with torch.no_grad():
        x_t = renoise(x_s, s, t, noise, std)
        v_teacher = teacher(x_t, t)
        v_fake = fake(x_t, t)
        if gradient == "score":
            a = per_sample((1 - t) / (1 - s), x_t)
            t = per_sample(t, x_t)
            difference = a * (1 - t) / t * (v_teacher - v_fake)  # score = -(x + (1-t) v) / t, Eq. 2
        else:
            y_teacher, _, _ = cps_step(x_t, v_teacher, t, s, eta, noise_back)
            y_fake, _, _ = cps_step(x_t, v_fake, t, s, eta, noise_back)
            size = (x_s - y_teacher).abs().flatten(1).mean(1).view(-1, 1, 1, 1)
            # 0 / 0 where both agree; any other nan stays one, so that `update` skips it
            difference = torch.where(size == 0, 0, (y_fake - y_teacher) / size)
        target = x_s - difference
    loss = 0.5 * (x_s - target).square().flatten(1)
    return loss.sum(1) if gradient == "score" else loss.mean(1)


def no_laps(part):
    """Where the time goes is measured with --bench alone."""


# -------------------------------------------------------------------------------------------------
# Algorithm 1, lines of stage 1
def main():
    args = arguments()
    device, rank, world = setup(args)
    rows = checked(load_prompts, args.prompts)
    note_templates(rows, args)

    # One frozen transformer, and an adapter for each of the two roles that learn.
    pipe = load_pipeline(args, device)
    transformer = pipe.transformer
    encode = text_encoder(pipe, args, [row["prompt"] for row in rows])
    dtype = getattr(torch, args.adapter_dtype)
    for name in ("generator", "fake"):
        add_adapter(transformer, name, args, args.lora_init_std, dtype)
    student_params, fake_params = train_only(transformer, "generator", "fake")
    fused = device.type == "cuda"
    student_opt = torch.optim.AdamW(student_params, lr=args.lr, weight_decay=0, fused=fused)
    fake_opt = torch.optim.AdamW(fake_params, lr=args.fake_lr, weight_decay=0, fused=fused)
    ema = [p.detach().clone() for p in student_params]

    # All that a checkpoint has to hold, since random numbers are functions of (seed, step).
    state = {
        "generator": student_params,
        "fake": fake_params,
        "ema": ema,
        "G_opt": student_opt,
        "F_opt": fake_opt,
        "keys": list(adapter(transformer, "fake")),
    }
    args.start = load_checkpoint(args, state, rows, transformer)
    note_prompts(pipe, rows, args)
    levels = sigmas(args.num_steps, args.shift)
    empty_text = encode([""])
    n_pictures = args.batch_size
    my_rows = shard(n_pictures, rank, world)  # of the whole batch, those of this GPU
    n_mine = my_rows.stop - my_rows.start
    micro_batches = [slice(i, i + args.micro_batch) for i in range(0, n_mine, args.micro_batch)]
    if rank == 0:
        size = sum(p.numel() for p in student_params) / 1e6
        print(
            f"AC-DMD: {args.steps} steps of {n_pictures} pictures on {world} x {device.type}, "
            f"{len(rows)} prompts, {size:.1f} M parameters an adapter",
            flush=True,
        )

    # The three roles: velocity functions of one transformer.
    def student(text):
        return play(transformer, ["generator"], text)

    def fake(text):
        return play(transformer, ["fake"], text)

    def teacher(text):
        return play(transformer, [], text, empty_text, args.cfg)

    # The work on one micro-batch: functions of tensors alone, which a GPU records once and replays.
    # Losses are divided by the whole batch, so that micro-batches and GPUs simply add up.
    def student_pass(x, s, *text):
        return student(text)(x, s)

    def fake_pass(x_s, s, t, noise, steps_back, noise1, noise2, s_after, *text):
        s_after = s_after if args.consistency_times == "steps" else None
        losses = fake_score_loss(
            fake(text), x_s, s, t, noise, steps_back, noise1, noise2,
            args.gamma, args.eta, args.renoise_std, s_after,
        )  # fmt: skip
        (losses[0].sum() / n_pictures).backward()
        return torch.stack([loss.sum() for loss in losses]).detach()

    def generator_pass(x, s_before, s, step_noise, t, noise, noise_back, *text):
        x_s, _, _ = cps_step(x, student(text)(x, s_before), s_before, s, args.eta, step_noise)
        loss = generator_loss(
            x_s, s, t, noise, noise_back, teacher(text), fake(text),
            args.eta, args.renoise_std, args.dm_gradient,
        ).sum()  # fmt: skip
        (loss / n_pictures).backward()
        return loss.detach()

    student_pass, fake_pass, generator_pass = graphed(
        args.graphs, device, student_pass, fake_pass, generator_pass
    )
    silent = None if rank == 0 else True
    bar = tqdm(range(args.start, args.steps), initial=args.start, total=args.steps, disable=silent)
    log = Log(args)
    lap = no_laps
    if args.bench:
        from report import stopwatch

        lap = stopwatch(args, transformer, n_pictures, 2 * args.generator_every, evaluated)
    skipped = {"generator": 0, "fake": 0}  # updates in a row that were not finite

    for step in bar:
        # ---- draw. k is the same for all pictures and ranks, so that ranks stay in step (Eq. 8)
        draw = StepRandom(args.seed, step, n_pictures, my_rows, pipe.latent_shape, device)
        k = draw.scalars.randint(1, args.num_steps)
        grid = levels[:k] + [0.0] if args.dmd2 else levels  # DMD2's last step goes all the way
        s = grid[k]
        x_start = draw.normal()
        step_noise = [draw.normal() for _ in range(k)]
        places = data_order(len(rows), step * n_pictures, n_pictures, args.seed)[my_rows]
        prompts = [rows[place]["prompt"] for place in places]
        texts = [encode(prompts[b]) for b in micro_batches]
        sums = Sums(device, "loss_fake", "loss_ambient", "loss_consistency")
        norms = {}
        lap("text")

        # ---- roll out: the first k steps of the student, without gradient (Eq. 8)
        x_before = torch.empty_like(x_start)
        x_s = torch.empty_like(x_start)
        with torch.no_grad():
            for b, text in zip(micro_batches, texts):

                def velocity(x, level, text=text):
                    return student_pass(x, x.new_full((len(x),), level), *text)

                noise_of_steps = [noise[b] for noise in step_noise]
                path = rollout(velocity, x_start[b], grid, k, args.eta, noise_of_steps)
                x_before[b] = path[k - 1]
                x_s[b] = path[k]
        s_before_of_each = x_start.new_full((n_mine,), grid[k - 1])
        s_of_each = x_start.new_full((n_mine,), s)
        s_after_of_each = x_start.new_full((n_mine,), grid[min(k + 1, len(grid) - 1)])
        lap("rollout")

        # ---- fake follows the student, every step (Eq. 10-12)
        t = renoise_time(s, draw.uniform())
        noise = draw.normal()
        steps_back = (1 + (200 * draw.uniform()).floor()) / 1000  # U{1..200} / 1000
        noise1, noise2 = draw.normal(), draw.normal()
        for b, text in zip(micro_batches, texts):
            loss, ambient, consistency = fake_pass(
                x_s[b], s_of_each[b], t[b], noise[b], steps_back[b], noise1[b], noise2[b],
                s_after_of_each[b], *text,
            )  # fmt: skip
            sums.add(loss_fake=loss, loss_ambient=ambient, loss_consistency=consistency)
        loss = sums["loss_fake"]
        norms["grad_fake"] = update(fake_params, fake_opt, args, skipped, "fake", loss)
        lap("fake")

        # ---- the student follows the teacher, now and then, through its last step alone (Eq. 9)
        if (step + 1) % args.generator_every == 0:
            t = renoise_time(s, draw.uniform())
            noise, noise_back = draw.normal(), draw.normal()
            loss = torch.zeros((), device=device)
            for b, text in zip(micro_batches, texts):
                loss += generator_pass(
                    x_before[b], s_before_of_each[b], s_of_each[b], step_noise[k - 1][b],
                    t[b], noise[b], noise_back[b], *text,
                )  # fmt: skip
            sums.of["loss_generator"] = loss
            norms["grad_generator"] = update(
                student_params, student_opt, args, skipped, "generator", loss
            )
            lap("generator")
        torch._foreach_lerp_(ema, [p.detach() for p in student_params], 1 - args.ema)

        # ---- log, look, save
        losses = sums.over_ranks(lambda total: total / n_pictures)
        moved = distance(student_params, ema)
        log(bar, n_pictures, step=step, k=k, **losses, **norms, ema_drift=moved)
        lap("step")
        if args.sample_every and (step + 1) % args.sample_every == 0:
            preview(pipe, ["generator"], encode, rows, args, f"step_{step + 1}")
        save_or_stop(args, state, step + 1, args.steps)

    if rank == 0:
        print(
            f"done: {args.out_dir}/generator_ema.pt (the generator), {args.out_dir}/fake.pt "
            "(stage 2 starts from both)",
            flush=True,
        )
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
