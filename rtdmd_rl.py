"""Stage 2: RTDMD reinforces the 4-step generator (Sec. 3.2, App. G, H, I). Minimising the KL to the teacher tilted by exp(reward)
(Eq. 7, 13) splits into terms, each of which is a few lines below:

    SubGRPO          on the stochastic steps: advantages times log-probabilities, on a random subset of steps (Eq. 14, 16, 17)
    back-propagation through the deterministic last step, for the differentiable rewards (Eq. 15)
    AC-DMD           stage 1's distribution-matching term, imported from cold_start.py, as the anchor to the teacher (Eq. 9)

What GRPO usually has and is not here: no reference model and no KL penalty (AC-DMD is the anchor), and one update an epoch, so
that every update is exactly on-policy. One epoch = roll out, one step of F, score, one step of G.

Read in this order: `advantages`, `policy_loss`, `shared_noise`, then `main` (Algorithm 1, second half).

    torchrun --nproc_per_node=8 rtdmd_rl.py                       # SD3.5-M on stage 1's result in out/cold_start
    python rtdmd_rl.py --preset tiny                              # the laptop model
"""

import math
import os

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import DEFAULT_PLACES, find_weights, load_checkpoint, save_or_stop
from cold_start import HERE, fake_score_loss, generator_loss, no_laps, renoise_time
from cold_start import PAPER as PAPER_COLD
from common import (
    Log,
    StepRandom,
    Sums,
    all_reduce,
    checked,
    data_order,
    die,
    distance,
    generator,
    is_rank_0,
    make_parser,
    parse,
    setup,
    shard,
    update,
)
from cps import at_least_float32, cps_step, log_prob, rollout, sigmas
from model import (
    adapter,
    add_adapter,
    check_levels,
    decode,
    evaluated,
    graphed,
    load_adapter,
    load_pipeline,
    note_prompts,
    play,
    preview,
    save_grid,
    text_encoder,
    train_only,
)
from prompts import load_prompts
from rewards import build, guarded, move, parse_weights

PRESETS = {
    "sd35m": dict(pretrained="stabilityai/stable-diffusion-3.5-medium", sample_every=25),
    "sd3m": dict(
        pretrained="stabilityai/stable-diffusion-3-medium-diffusers",
        resolution=1024,
        cfg=7.0,
        prompts_per_epoch=32,
        group_size=16,
        micro_batch=2,
        sample_every=25,
    ),  # micro_batch: half of SD3.5-M's, since a picture has four times the tokens
    "tiny": dict(
        pretrained=os.path.join(HERE, "assets/tiny"),
        prompts=os.path.join(HERE, "assets/tiny/prompts_train.jsonl"),
        device="auto",
        resolution=32,
        max_sequence_length=8,
        cfg=2.0,
        epochs=340,
        prompts_per_epoch=8,
        group_size=8,
        micro_batch=64,
        lr=1.6e-5,
        fake_lr=3.2e-5,
        ema=0.998,
        ema_every=1,
        rewards="clipscore:1,checker:1",
        reward_path=[f"clipscore={HERE}/assets/tiny/clip"],
        det_weight=0.2,
        dm_weight=0.2,
        sample_every=85,
        save_every=85,
        compile=0,
    ),
}
PAPER = dict(
    PAPER_COLD,
    log_prob="gaussian",
    advantage_std="group",
    subset_factor=1,
    det_weight=1.0,
    dm_weight=1.0,
    margin=100.0,
    dm_steps="drawn",
)


def arguments():
    parser, add = make_parser(
        "Stage 2: RTDMD, reinforcement of the 4-step generator.", PRESETS, "out/rtdmd", PAPER
    )
    add(
        "--cold_start",
        default=DEFAULT_PLACES["cold_start"],
        help="stage 1's out_dir, an export, a release's checkpoint-N, an adapter file, a hub repository",
    )
    add("--epochs", type=int, default=1000, help="epochs; one update of G and of F each")
    add("--prompts_per_epoch", type=int, default=48, help="prompts an epoch over all GPUs together")
    add(
        "--group_size",
        type=int,
        default=24,
        help="pictures of each prompt; they may lie on any GPUs",
    )
    add(
        "--micro_batch",
        type=int,
        default=4,
        help="pictures a GPU decodes, and F learns from, at once; in the other passes twice as many",
    )
    add("--lr", type=float, default=3e-6, help="learning rate of the generator")
    add(
        "--weight_decay",
        type=float,
        default=1e-4,
        help="AdamW's weight decay of the generator's adapter",
    )
    add("--fake_lr", type=float, default=3e-5, help="learning rate of the fake score")
    add(
        "--lora_init_std",
        type=float,
        default=1.0,
        help="std of a fresh adapter's A; stage 1's is 1/rank",
    )
    add(
        "--ema",
        type=float,
        default=0.9,
        help="decay of the generator's average, applied 16 times; see `average_decay`",
    )
    add("--ema_every", type=int, default=8, help="update the average every so many epochs")
    add(
        "--rewards",
        default="clipscore:1,pickscore:1,hpsv2:1,geneval_soft:1",
        help="name:weight,... (see rewards.py)",
    )
    add(
        "--reward_path",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="local directory or file of a reward's model",
    )
    add(
        "--reward_dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision of the reward models; scores are float32",
    )
    add(
        "--reward_batch",
        type=int,
        default=0,
        help="pictures a reward model looks at at once, with gradient then computed twice; 0: micro_batch",
    )
    add(
        "--offload_rewards",
        action="store_true",
        help="keep the reward models in the CPU's memory while they do not score",
    )
    add(
        "--eval_rewards",
        default="",
        help="name,...: held-out rewards that nothing is trained on, so that hacking the others is seen",
    )
    add(
        "--eval_every",
        type=int,
        default=50,
        help="score them every so many epochs (and after the first), on fixed prompts and seeds",
    )
    add(
        "--eval_prompts",
        default="",
        help="file with their prompts, as --prompts; default: spread over the training prompts",
    )
    add("--eval_images", type=int, default=64, help="how many of those prompts, a picture each")
    add(
        "--subset",
        type=int,
        default=2,
        help="M: how many of the K-1 stochastic steps are reinforced an epoch (Eq. 16); K-1 is GRPO",
    )
    add(
        "--shared_noise",
        type=int,
        choices=(0, 1),
        default=1,
        help="1: steps outside the subset share their noise within a prompt's group",
    )
    add(
        "--subset_factor",
        type=int,
        choices=(0, 1),
        default=0,
        help="0: sum over the M steps of S (release); "
        "1: (K-1)/M times that sum (Eq. 17), in expectation the sum over all K-1 steps",
    )
    add("--policy_weight", type=float, default=1.0, help="weight of SubGRPO; 0 leaves it out")
    add(
        "--det_weight",
        type=float,
        default=1e-4,
        help="weight of back-propagation through the last step; 0 leaves it out",
    )
    add(
        "--dm_weight",
        type=float,
        default=1e-3,
        help="weight of AC-DMD; 0 leaves it out (watch the reward being hacked)",
    )
    add(
        "--dm_steps",
        choices=("last", "drawn"),
        default="last",
        help="where AC-DMD and F work: on the last step's pictures, or, the paper's Eq. 9 being "
        "an expectation over all steps, at one step drawn for each epoch, as in stage 1",
    )
    add(
        "--margin",
        type=float,
        default=3.0,
        help="back-propagation stops where the weighted rewards exceed this (--paper: beyond reach)",
    )
    add("--clip", type=float, default=1e-5, help="PPO clip range of the ratio")
    add(
        "--old_log_prob",
        choices=("update", "rollout"),
        default="update",
        help="where the ratio's denominator comes from: the update's own "
        "pass (the ratio is 1: one update an epoch is exactly on-policy), or the rollout as in the release, where rounding gets clipped",
    )
    add(
        "--log_prob",
        choices=("release", "gaussian"),
        default="release",
        help="-mean d^2, or Eq. 13's -sum d^2 / (2 std^2)",
    )
    add(
        "--advantage_std",
        choices=("batch", "group"),
        default="batch",
        help="of each reward over the whole batch, and once more of their sum; "
        "or of each reward over each group and no more (paper)",
    )
    add("--advantage_clip", type=float, default=5.0, help="advantages are clipped to +- this")
    args = parse(parser)
    check_levels(args)
    return args


# ------------------------------------------------------------------------------------------------------- 1. the mathematics
def advantages(scores, weights, group_size, std="batch", clip=5.0):
    """Group-relative advantages (Eq. 14): scores [R,B] of all pictures, groups consecutive -> [B].

    Each reward: minus its group's mean, over the standard deviation of the batch (release) or of the
    group (paper); weighted sum; standardised once more over the batch (release only); clipped. A
    reward that does not vary gives 0.
    """
    grouped = scores.view(len(scores), -1, group_size)
    # The first picture's score goes first: where all score the same the rest is exactly 0.
    centred = grouped - grouped[..., :1]
    centred = centred - centred.mean(2, keepdim=True)
    if std == "group":
        spread = grouped.std(2, keepdim=True)
    else:
        spread = scores.std(1).view(-1, 1, 1)
    weights = torch.as_tensor(weights, dtype=scores.dtype, device=scores.device).view(-1, 1, 1)
    total = (weights * centred / (spread + 1e-4)).sum(0).flatten()
    if std == "batch":
        total = total / (total.std() + 1e-4)  # its mean is 0 already
    return total.clamp(-clip, clip)


def policy_loss(log_p, old_log_p, advantage, clip):
    """PPO's clipped surrogate (Eq. 14), all [B] -> [B].

    With the policy that drew the samples the ratio is 1 and the gradient -advantage * grad log_p.
    """
    ratio = torch.exp(log_p - old_log_p)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def average_decay(decay, updates):
    """Decay of the generator's average after so many optimiser updates.

    The release averages once for each of an epoch's 16 batches, all with the same weights, so that
    one call here is 16 there: .9^16 = .185. Its warm-up is min(decay, (1 + updates) / (10 + updates)).
    """
    return min(decay, (1 + updates) / (10 + updates)) ** 16


def shared_noise(shape, prompts, device, *key):
    """Noise [B,C,H,W] that is the same for all pictures of a prompt, on any rank (Eq. 16).

    It is seeded by key = (seed, epoch, step) and prompt.
    """
    if not prompts:  # a rank without pictures
        return torch.empty(0, *shape, device=device)
    noise_of = {}
    for prompt in dict.fromkeys(prompts):
        rng = generator(device, *key, prompt)
        noise_of[prompt] = torch.randn(shape, generator=rng, device=device)
    return torch.stack([noise_of[prompt] for prompt in prompts])


STUDENT = ["cold_generator", "generator"]  # stage 1's adapter and the one that learns, stacked


# -------------------------------------------------------------------------------------------------
# Algorithm 1, lines of stage 2
def main():
    args = arguments()
    weights = checked(parse_weights, args.rewards)
    K, M = args.num_steps, args.subset
    if not 1 <= M <= K - 1:
        die(f"--subset must lie in 1..{K - 1} (the stochastic steps of {K}), got {M}")
    if args.eta == 0 and args.policy_weight:
        die("--eta 0 leaves no stochastic step for SubGRPO: give --eta > 0, or --policy_weight 0")
    device, rank, world = setup(args)
    rows = checked(load_prompts, args.prompts)
    pipe = load_pipeline(args, device)
    rewards = load_rewards(args, weights, device, rows)
    held_out, eval_rows = [], []
    if args.eval_rewards:
        eval_rows = rows_for_evaluation(args, rows)
        held_out = load_rewards(args, args.eval_rewards, device, eval_rows)
    if not any(reward.differentiable for reward in rewards):
        args.det_weight = 0.0  # nothing to differentiate: SubGRPO alone (App. L)

    # Stage 1's adapters are frozen and the new ones stacked on them; the teacher is the plain base.
    transformer = pipe.transformer
    encode = text_encoder(pipe, args, [row["prompt"] for row in [*rows, *eval_rows]])
    dtype = getattr(torch, args.adapter_dtype)
    for name in ("generator", "fake"):
        add_adapter(transformer, name, args, args.lora_init_std, dtype)
    load_stage_1(transformer, args)
    student_params, fake_params = train_only(transformer, "generator", "fake")
    fused = device.type == "cuda"
    student_opt = torch.optim.AdamW(
        student_params, lr=args.lr, weight_decay=args.weight_decay, fused=fused
    )
    fake_opt = torch.optim.AdamW(fake_params, lr=args.fake_lr, weight_decay=0, fused=fused)
    ema = [p.detach().clone() for p in student_params]

    # All that a checkpoint has to hold, since random numbers are functions of (seed, epoch).
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
    levels = sigmas(K, args.shift)
    empty_text = encode([""])
    n_pictures = args.prompts_per_epoch * args.group_size
    my_rows = shard(n_pictures, rank, world)  # of all pictures, those of this GPU
    n_mine = my_rows.stop - my_rows.start
    # fake's loss evaluates three times its pictures with gradient (once with --gamma 0), and the
    # decoder's activations are large: the micro-batches of all other passes are twice as large.
    small = [slice(i, i + args.micro_batch) for i in range(0, n_mine, args.micro_batch)]
    large = [slice(i, i + 2 * args.micro_batch) for i in range(0, n_mine, 2 * args.micro_batch)]
    if rank == 0:
        print(
            f"RTDMD: {args.epochs} epochs of {args.prompts_per_epoch} prompts x {args.group_size} "
            f"pictures on {world} x {device.type}; rewards {', '.join(map(described, rewards))}",
            flush=True,
        )

    # The three roles: velocity functions of one transformer.
    def student(text):
        return play(transformer, STUDENT, text)

    def fake(text):
        return play(transformer, ["cold_fake", "fake"], text)

    def teacher(text):
        return play(transformer, [], text, empty_text, args.cfg)

    # The work on one micro-batch: functions of tensors alone, which a GPU records once and replays.
    # Losses are divided by all pictures, so that micro-batches and GPUs simply add up.
    def student_pass(x, s, *text):
        return student(text)(x, s)

    def fake_pass(x_s, s, t, noise, steps_back, noise1, noise2, s_after, *text):
        s_after = s_after if args.consistency_times == "steps" else None
        losses, _, _ = fake_score_loss(
            fake(text), x_s, s, t, noise, steps_back, noise1, noise2,
            args.gamma, args.eta, args.renoise_std, s_after,
        )  # fmt: skip
        loss = losses.sum() / n_pictures
        loss.backward()
        return loss.detach()

    def anchor_pass(x_s, s, t, noise, noise_back, *text):
        """AC-DMD -> its gradient with respect to x_s, its loss"""
        x_s = x_s.detach().requires_grad_()
        losses = generator_loss(
            x_s, s, t, noise, noise_back, teacher(text), fake(text),
            args.eta, args.renoise_std, args.dm_gradient,
        )  # fmt: skip
        loss = losses.sum() / n_pictures
        return torch.autograd.grad(loss, x_s)[0], loss.detach()

    def step_pass(x, s, t, noise, gradient, *text):
        """One step of the student; gradient is that of the loss with respect to its result."""
        x_t, _, _ = cps_step(x, student(text)(x, s), s, t, args.eta, noise)
        x_t.backward(gradient)
        return x_t.detach()

    def log_prob_of(x_next, mean, std):
        return log_prob(x_next, mean, std if args.log_prob == "gaussian" else None)

    def policy_pass(x, s, t, x_next, old_log_p, advantage, n_kept, *text):
        """SubGRPO of one step -> loss, how many ratios lie outside of the clip, the largest drift"""
        v = student(text)(x, s)
        _, mean, std = cps_step(x, v, s, t, args.eta, x_next)  # x_next as a noise that is not used
        log_p = log_prob_of(x_next, mean, std)
        drift = (torch.exp(log_p - old_log_p) - 1).detach().abs()
        if args.old_log_prob == "update":
            old_log_p = log_p.detach()
        loss = policy_loss(log_p, old_log_p, advantage, args.clip).sum() / n_kept
        # the sum over S; with --subset_factor 1 times Eq. 17's (K-1)/M
        factor = (K - 1) / M if args.subset_factor else 1
        (args.policy_weight * factor * loss).backward()
        return loss.detach(), (drift > args.clip).sum(), drift.max()

    student_pass, fake_pass, anchor_pass, step_pass, policy_pass = graphed(
        args.graphs, device, student_pass, fake_pass, anchor_pass, step_pass, policy_pass
    )
    silent = None if rank == 0 else True
    bar = tqdm(
        range(args.start, args.epochs), initial=args.start, total=args.epochs, disable=silent
    )
    log = Log(args)
    lap = no_laps
    if args.bench:
        from report import stopwatch

        lap = stopwatch(args, transformer, n_pictures, 3, evaluated)
    skipped = {"generator": 0, "fake": 0}  # updates in a row that were not finite

    for epoch in bar:
        # ---- draw: prompts, the subset S of steps to reinforce (Eq. 16), and all noise
        draw = StepRandom(args.seed, epoch, n_pictures, my_rows, pipe.latent_shape, device)
        S = sorted(draw.scalars.sample(range(K - 1), M))
        # the step after which teacher and fake are compared (Eq. 9)
        last = draw.scalars.randint(1, K) if args.dm_steps == "drawn" else K
        n_prompts = args.prompts_per_epoch
        places = data_order(len(rows), epoch * n_prompts, n_prompts, args.seed)
        mine = [rows[place] for place in places for _ in range(args.group_size)][my_rows]
        prompts = [row["prompt"] for row in mine]
        metadata = [row["metadata"] for row in mine]
        large_texts = [encode(prompts[b]) for b in large]
        small_texts = []
        for text in large_texts:
            small_texts += zip(*(tensor.split(args.micro_batch) for tensor in text))
        x_start = draw.normal()
        noise = []
        for k in range(K - 1):
            if k in S or not args.shared_noise:
                noise.append(draw.normal())
            else:  # steps outside of S do not blur the comparison within a prompt's group
                key = (args.seed, epoch, k)
                noise.append(shared_noise(pipe.latent_shape, prompts, device, *key))
        noise.append(torch.zeros_like(x_start))  # the last step is deterministic
        level = [x_start.new_full((n_mine,), s) for s in levels]
        sums = Sums(device, "loss_fake", "loss_policy", "loss_det", "loss_dm", "drift_clipped")
        squares = Sums(device, "slope_det", "slope_dm")
        lap("text")

        # ---- every few epochs the average moves towards the weights, before this epoch's update
        if (epoch + 1) % args.ema_every == 0:
            keep = average_decay(args.ema, epoch)
            torch._foreach_lerp_(ema, [p.detach() for p in student_params], 1 - keep)

        # ---- roll out all K steps, without gradient (Eq. 8)
        path = [x_start] + [torch.empty_like(x_start) for _ in range(K)]
        old_log_p = torch.zeros(K, n_mine, device=device)
        with torch.no_grad():
            for b, text in zip(large, large_texts):
                for k in range(K):
                    x = path[k][b]
                    v = student_pass(x, level[k][b], *text)
                    x_next, mean, std = cps_step(
                        x, v, levels[k], levels[k + 1], args.eta, noise[k][b]
                    )
                    path[k + 1][b] = x_next
                    if k in S:
                        old_log_p[k][b] = log_prob_of(x_next, mean, std)
        lap("rollout")

        # ---- fake follows the student: one update on the finished pictures, s = 0 (Eq. 10-12)
        t = renoise_time(levels[last], draw.uniform())
        t_noise = draw.normal()
        steps_back = (1 + (200 * draw.uniform()).floor()) / 1000  # U{1..200} / 1000
        noise1, noise2 = draw.normal(), draw.normal()
        for b, text in zip(small, small_texts):
            loss = fake_pass(
                path[last][b], level[last][b], t[b], t_noise[b], steps_back[b],
                noise1[b], noise2[b], level[min(last + 1, K)][b], *text,
            )  # fmt: skip
            sums.add(loss_fake=loss)
        grad_fake = update(fake_params, fake_opt, args, skipped, "fake", sums["loss_fake"])
        lap("fake")

        # ---- score the pictures; differentiable rewards give a gradient with respect to x_0 (Eq. 15)
        # gradients {k: of the loss with respect to the state after step k}: rewards at K, AC-DMD at last
        gradients = {}
        if args.det_weight:
            gradients[K] = torch.zeros_like(x_start)
        if args.dm_weight:
            gradients[last] = torch.zeros_like(x_start)
        scores = torch.zeros(len(rewards), n_pictures, device=device)  # a rank fills in its own
        my_scores = scores[:, my_rows]
        move(rewards, device if args.offload_rewards else None)
        for b in small:
            with torch.set_grad_enabled(bool(args.det_weight)):
                x_0 = path[K][b].detach().requires_grad_(bool(args.det_weight))
                pictures = decode(pipe, x_0)
                lap("decode")
                each = score_all(rewards, pictures, prompts[b], metadata[b])
                my_scores[:, b] = torch.stack(each).detach()
                lap("reward")
                if args.det_weight:
                    pairs = zip(rewards, each)
                    total = sum(r.weight * score for r, score in pairs if r.differentiable)
                    loss = torch.relu(args.margin - total).sum() / n_pictures
                    (gradient,) = torch.autograd.grad(args.det_weight * loss, x_0)
                    gradients[K][b] = gradient
                    sums.add(loss_det=loss.detach())
                    squares.add(slope_det=gradient.square().sum())
                    lap("decode, reward: backward")
        move(rewards, "cpu" if args.offload_rewards else None)

        # ---- AC-DMD, the anchor to the teacher (Eq. 9); both gradients through the student's step,
        # whose input is a constant: what it owes to the student is SubGRPO's part (App. G.2)
        t = renoise_time(levels[last], draw.uniform())
        t_noise, noise_back = draw.normal(), draw.normal()
        for b, text in zip(large, large_texts):
            if args.dm_weight:
                gradient, loss = anchor_pass(
                    path[last][b], level[last][b], t[b], t_noise[b], noise_back[b], *text
                )
                gradient = args.dm_weight * gradient
                gradients[last][b] += gradient
                sums.add(loss_dm=loss)
                squares.add(slope_dm=gradient.square().sum())
                lap("teacher and fake")
            for k, gradient in gradients.items():
                step_pass(
                    path[k - 1][b], level[k - 1][b], level[k][b], noise[k - 1][b],
                    gradient[b], *text,
                )  # fmt: skip
            lap("last step")

        # ---- SubGRPO on the steps in S (Eq. 17); pictures with advantage 0 are not counted
        all_reduce(scores)
        reward_weights = [reward.weight for reward in rewards]
        advantage = advantages(
            scores, reward_weights, args.group_size, args.advantage_std, args.advantage_clip
        )
        n_kept = (advantage != 0).sum().clamp(min=1)
        my_advantage = advantage[my_rows]
        largest_drift = torch.zeros((), device=device)
        if args.policy_weight:
            for b, text in zip(large, large_texts):
                for k in S:
                    loss, outside, drift = policy_pass(
                        path[k][b], level[k][b], level[k + 1][b], path[k + 1][b],
                        old_log_p[k][b], my_advantage[b], n_kept, *text,
                    )  # fmt: skip
                    sums.add(loss_policy=loss, drift_clipped=outside / n_pictures / M)
                    largest_drift = torch.maximum(largest_drift, drift)
        loss = sums["loss_policy"] + sums["loss_det"] + sums["loss_dm"]
        grad_student = update(student_params, student_opt, args, skipped, "generator", loss)
        lap("policy")
        if epoch + 1 < max(args.ema_every, 2):
            # Nothing but the start is averaged yet: a run that ends here saves its weights, not zeros.
            torch._foreach_copy_(ema, [p.detach() for p in student_params])

        # ---- log, look, save
        numbers = {"step": epoch, "S": S}
        for reward, score in zip(rewards, scores):
            numbers[f"reward_{reward.name}"] = score.mean().item()
        numbers.update(sums.over_ranks())
        # norms of the weighted terms' gradients at the pictures' latents: which of the two leads
        numbers.update(squares.over_ranks(torch.sqrt))
        numbers["drift_max"] = all_reduce(largest_drift, dist.ReduceOp.MAX).item()
        if held_out and (epoch == 0 or (epoch + 1) % args.eval_every == 0):
            name = f"eval_{epoch + 1}"
            numbers.update(evaluate(pipe, STUDENT, encode, eval_rows, held_out, args, name))
        numbers["latent_std"] = spread_in_groups(path[K], args.group_size, n_pictures, my_rows)
        flat = (advantage.view(-1, args.group_size) == 0).all(1)  # all pictures of a prompt alike
        numbers["flat_groups"] = flat.float().mean().item()
        numbers["ema_drift"] = distance(student_params, ema)
        log(bar, n_pictures, **numbers, grad_fake=grad_fake, grad_generator=grad_student)
        lap("step")
        if args.sample_every and (epoch + 1) % args.sample_every == 0:
            preview(pipe, STUDENT, encode, rows, args, f"epoch_{epoch + 1}")
        save_or_stop(args, state, epoch + 1, args.epochs)

    if rank == 0:
        print(
            f"done: {args.out_dir}/generator_ema.pt, to be stacked on "
            f"{args.cold_start}/generator_ema.pt (sample.py does)",
            flush=True,
        )
    if world > 1:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------
# Rewards: loading them, scoring with them, and held-out ones, to see the trained ones being hacked
def load_rewards(args, weights, device, rows):
    """The rewards named in `weights`, loaded; dies where one cannot be, or cannot score these rows."""
    home = torch.device("cpu") if args.offload_rewards else device
    dtype = getattr(torch, args.reward_dtype)
    loaded = checked(build, weights, home, args.reward_path, dtype, args.reward_batch)
    prompts = [row["prompt"] for row in rows]
    metadata = [row["metadata"] for row in rows]
    for reward in loaded:
        checked(reward.check, prompts, metadata)
    return [guarded(reward) for reward in loaded]


def described(reward):
    how = ", by back-propagation too" if reward.differentiable else ""
    return f"{reward.name} ({reward.weight:g}{how})"


def score_all(rewards, pictures, prompts, metadata):
    """-> [scores [B] of each reward], in at least float32.

    A picture that is not finite scores nan, so that `update` skips the epoch.
    """
    fine = pictures.isfinite().flatten(1).all(1)
    pictures = pictures.nan_to_num(0)
    constant = (
        pictures.detach()
    )  # one tensor for all: rewards that share a detector look at it once
    scores = []
    for reward in rewards:
        score = reward(pictures if reward.differentiable else constant, prompts, metadata)
        scores.append(at_least_float32(score).where(fine, math.nan))
    return scores


def load_stage_1(transformer, args):
    """Stage 1's generator and fake score under the names cold_generator and cold_fake.

    They have the modules, rank and alpha of their files; the new adapters those of the flags.
    """
    generator_file = find_weights(args.cold_start, "cold_start")
    load_adapter(transformer, "cold_generator", generator_file)
    fake_file = find_weights(args.cold_start, "cold_start", "fake", must=False, quiet=True)
    if fake_file:
        load_adapter(transformer, "cold_fake", fake_file)
    elif is_rank_0():
        print(
            f"{args.cold_start} has no fake.pt or fake_score_net.pt: the fake score starts from the "
            "teacher and needs some epochs to catch up",
            flush=True,
        )


def spread_in_groups(latents, group_size, n_pictures, my_rows):
    """latent_std: how much the pictures of a prompt differ; it falls where they collapse.

    latents [B,C,h,w] of this rank's rows -> mean over prompts and elements, of all ranks.
    """
    device = latents.device
    group = torch.arange(n_pictures, device=device)[my_rows] // group_size
    shape = (2, n_pictures // group_size, *latents.shape[1:])
    moments = torch.stack([latents, latents.square()])
    sums = torch.zeros(shape, device=device).index_add_(1, group, moments)
    mean, square = all_reduce(sums) / group_size
    return (square - mean**2).clamp(min=0).sqrt().mean().item()


def rows_for_evaluation(args, rows):
    """The prompts of --eval_prompts, or some that are spread over the training prompts."""
    rows = checked(load_prompts, args.eval_prompts) if args.eval_prompts else rows
    count = min(args.eval_images, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


@torch.no_grad()
def evaluate(pipe, adapters, encode, rows, rewards, args, name):
    """Mean held-out rewards of one picture a row, always from the same seeds.

    -> {"eval_<reward>": mean}; rank 0's pictures go to samples/<name>.png. Each rank draws its
    share; the numbers do not depend on how many there are.
    """
    device = pipe.transformer.device
    levels = sigmas(args.num_steps, args.shift)
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    mine = range(len(rows))[shard(len(rows), rank, world)]
    sums = torch.zeros(len(rewards), device=device)
    pictures = []
    move(rewards, device if args.offload_rewards else None)
    for i in range(0, len(mine), args.micro_batch):
        places = mine[i : i + args.micro_batch]
        prompts = [rows[place]["prompt"] for place in places]
        metadata = [rows[place]["metadata"] for place in places]
        noise = []
        for k in range(args.num_steps + 1):
            of_each = []
            for place in places:
                rng = generator(device, "eval", args.seed, place, k)
                of_each.append(torch.randn(pipe.latent_shape, generator=rng, device=device))
            noise.append(torch.stack(of_each))
        student = play(pipe.transformer, adapters, encode(prompts))
        path = rollout(student, noise[0], levels, args.num_steps, args.eta, noise[1:])
        pictures.append(decode(pipe, path[-1]))
        sums += torch.stack([r(pictures[-1], prompts, metadata).sum() for r in rewards])
    move(rewards, "cpu" if args.offload_rewards else None)
    if rank == 0 and pictures:
        save_grid(torch.cat(pictures)[:64], f"{args.out_dir}/samples/{name}.png")
    means = (all_reduce(sums) / len(rows)).tolist()
    return {f"eval_{reward.name}": mean for reward, mean in zip(rewards, means)}


if __name__ == "__main__":
    main()
