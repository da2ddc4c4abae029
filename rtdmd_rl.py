"""Stage 2: RTDMD reinforces the 4-step generator (Sec. 3.2, App. G, H, I).

Minimising the KL to the teacher tilted by exp(reward) (Eq. 6, 7) splits into terms, each of which is
a few lines below:

    SubGRPO             on the stochastic steps: advantages times log-probabilities, on a random subset
                        of the steps (Eq. 14, 16, 17)
    back-propagation    through the deterministic last step, for the differentiable rewards (Eq. 15)
    AC-DMD              stage 1's distribution-matching term, imported from cold_start.py, as the anchor
                        to the teacher (Eq. 9)

What GRPO usually has and is not here: no reference model and no KL penalty (AC-DMD is the anchor), and
one update an epoch, so that every update is exactly on-policy. One epoch = roll out, score, one step
of fake, one step of the generator.

Read from top to bottom: flags, mathematics, loop (Algorithm 1, second half).

    torchrun --nproc_per_node=8 rtdmd_rl.py     # SD3.5-M, on stage 1's result in out/cold_start
    python rtdmd_rl.py --preset tiny            # the laptop model
"""

import math
import os
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

import cold_start
import cps
import variants
from checkpoint import Run, files_of, find_weights, take_settings
from cold_start import HERE, fake_score_loss, generator_loss, renoise_time, steps_back
from common import (
    Log,
    Parser,
    StepRandom,
    Sums,
    all_reduce,
    checked,
    data_order,
    die,
    distance,
    is_rank_0,
    micro_batch,
    note,
    parse,
    resolution,
    say,
    seeded_rng,
    setup,
    shard,
    share,
    sides,
    update,
)
from cps import at_least_float32, cps_step, log_prob, rollout
from hub import DEFAULT_PLACES
from model import graphed, load_base, preview
from pictures import decode_each, save_grid
from prompts import load_prompts
from rewards import brought, build_for, parse_weights, paths_of
from text import note_prompts

PRESETS = {  # defaults that differ; everything else is the same for every model
    "sd35m": dict(pretrained="stabilityai/stable-diffusion-3.5-medium"),
    "sd3m": dict(
        pretrained="stabilityai/stable-diffusion-3-medium-diffusers",
        resolution=1024,
        cfg=7.0,
        prompts_per_epoch=32,
        group_size=16,
    ),
    "flux1": dict(
        pretrained="black-forest-labs/FLUX.1-dev",
        cfg=3.5,
        gamma=0.0,
        prompts_per_epoch=64,
        fake_lr=1e-6,
    ),
    "klein4b": dict(
        pretrained="black-forest-labs/FLUX.2-klein-base-4B",
        generator_pretrained="black-forest-labs/FLUX.2-klein-4B",
        cfg=4.0,
        prompts_per_epoch=64,
        fake_lr=1e-6,
    ),
    "klein9b": dict(
        pretrained="black-forest-labs/FLUX.2-klein-base-9B",
        generator_pretrained="black-forest-labs/FLUX.2-klein-9B",
        cfg=4.0,
        gamma=0.0,
        prompts_per_epoch=64,
        fake_lr=1e-6,
    ),
    "tiny": dict(
        pretrained=os.path.join(HERE, "assets/tiny"),
        prompts=os.path.join(HERE, "assets/tiny/prompts_train.jsonl"),
        device="auto",
        resolution=32,
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
# --paper: its letter, where the authors' release differs from it (docs/paper_vs_release.md).
PAPER = dict(
    cold_start.PAPER,
    variant=cold_start.PAPER["variant"] + ",gaussian_log_prob,group_std,subset_factor,drawn_step",
    det_weight=1.0,
    dm_weight=1.0,
    margin=100.0,  # beyond reach
)
LORA_INIT_STD = 1.0  # of a fresh adapter's A, as in the release; stage 1's is peft's own, 1/rank
WEIGHT_DECAY = 1e-4  # of the generator's adapter
ADVANTAGE_CLIP = 5.0
RATIO_CLIP = 1e-5  # PPO's clip range
EVAL_IMAGES = 64  # held-out rewards: of so many prompts, a picture each
EVAL_BATCH = 4  # of them at once


def arguments():
    parser = Parser("Stage 2: RTDMD, reinforcement of the 4-step generator.")
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="sd35m", help="set of default flags")
    add("--paper", action="store_true", help="the paper's letter, in place of the authors' release")
    add("--variant", default="", metavar="NAME,...", help="other functions, see variants.py")
    # where to start, base model and prompts; stage 1's settings are the defaults of its own
    add(
        "--cold_start",
        default=DEFAULT_PLACES["cold_start"],
        help="stage 1's out_dir, an export, a release's checkpoint-N, an adapter file, a hub repository",
    )
    add("--pretrained", help="diffusers directory or hub id of the base model")
    add("--generator_pretrained", default="", metavar="DIR", help="the generator's own base model")
    add("--prompts", default="", help="file: a prompt a line, JSON lines or a JSON list")
    add("--resolution", type=resolution, default=512, help="side, or height x width as 768x512")
    add("--cfg", type=float, default=4.5, help="guidance scale of the teacher")
    # the adapters
    add("--lora_rank", type=int, default=32, help="rank of the new adapters")
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
        "--subset",
        type=int,
        default=2,
        help="M of the K-1 stochastic steps are reinforced (Eq. 16)",
    )
    add("--policy_weight", type=float, default=1.0, help="weight of SubGRPO; 0 leaves it out")
    add(
        "--det_weight", type=float, default=1e-4, help="weight of back-propagation; 0 leaves it out"
    )
    add(
        "--dm_weight",
        type=float,
        default=1e-3,
        help="weight of AC-DMD; without it rewards are hacked",
    )
    add("--margin", type=float, default=3.0, help="back-propagation stops at this weighted reward")
    # rewards
    add(
        "--rewards",
        default="clipscore:1,pickscore:1,hpsv2:1,geneval_soft:1",
        help="name:weight,... (see rewards.py)",
    )
    add("--reward_path", action="append", default=[], metavar="NAME=PATH", help="a reward's model")
    add(
        "--reward_dtype", choices=("float32", "bfloat16"), default="float32", help="of their models"
    )
    add("--eval_rewards", default="", help="name,...: held-out rewards, that show hacking")
    add("--eval_every", type=int, default=50, help="score them every so many epochs")
    add("--eval_prompts", default="", help="file with their prompts; default: some of --prompts")
    # optimisation
    add("--epochs", type=int, default=1000, help="one update of the generator and of fake each")
    add(
        "--prompts_per_epoch", type=int, default=48, help="prompts an epoch, over all GPUs together"
    )
    add("--group_size", type=int, default=24, help="pictures of each prompt, on any GPUs")
    add(
        "--micro_batch",
        type=int,
        default=0,
        help="pictures a GPU decodes, and fake learns from, at once; other passes take twice as many; "
        "0: as many as it holds",
    )
    add("--lr", type=float, default=3e-6, help="learning rate of the generator")
    add("--fake_lr", type=float, default=3e-5, help="learning rate of the fake score")
    add(
        "--ema",
        type=float,
        default=0.9,
        help="decay of the average; .9 means .9^16 an update, as in the release",
    )
    add("--ema_every", type=int, default=8, help="update the average every so many epochs")
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
    add("--out_dir", default="out/rtdmd", help="a run that is in there goes on")
    add("--sample_every", type=int, default=25, help="save a picture grid every so many epochs")
    add("--save_every", type=int, default=500, help="save a checkpoint every so many epochs")
    add("--keep_every", type=int, default=0, help="keep generator_ema_N.pt every so many epochs")
    add("--wandb", default="", metavar="PROJECT", help="log to Weights & Biases, too")
    args = parse(parser, PRESETS, PAPER)
    take_settings(args, find_weights(args.cold_start, "cold_start", quiet=True))
    stochastic = args.num_steps - 1  # the last step is deterministic
    if not args.policy_weight:
        args.subset = min(args.subset, stochastic)
    elif args.eta == 0:
        die("--eta 0 leaves no stochastic step for SubGRPO: give --eta > 0, or --policy_weight 0")
    elif stochastic == 0:
        die("--num_steps 1 leaves no stochastic step for SubGRPO: give more, or --policy_weight 0")
    elif not 1 <= args.subset <= stochastic:
        die(
            f"--subset must lie in 1..{stochastic} (the stochastic steps of {args.num_steps}), "
            f"got {args.subset}"
        )
    if ":" in args.eval_rewards:
        die(
            f"--eval_rewards {args.eval_rewards}: names alone, since held-out scores are not summed"
        )
    return args


# -------------------------------------------------------------------------------------------------
# The mathematics
def advantages(scores, weights, group_size):
    """Group-relative advantages (Eq. 14): scores [R,B] of all pictures, groups consecutive -> [B].

    Subtract each group's mean, combine the rewards (`weighed_sum`), clip. A reward that does not vary
    gives 0.
    """
    grouped = scores.view(len(scores), -1, group_size)
    # Less the first picture's score before the mean: where all score the same, exactly 0 is left.
    centred = grouped - grouped[..., :1]
    centred = centred - centred.mean(2, keepdim=True)
    weights = torch.as_tensor(weights, dtype=scores.dtype, device=scores.device).view(-1, 1, 1)
    return weighed_sum(centred, scores, weights).clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)


def weighed_sum(centred, scores, weights):
    """Each reward over its deviation in the batch, summed, standardised once more -> [B].

    centred [R,groups,group_size]: scores less their group's mean; weights [R,1,1].
    """
    spread = scores.std(1).view(-1, 1, 1)
    total = (weights * centred / (spread + 1e-4)).sum(0).flatten()
    return total / (total.std() + 1e-4)  # its mean is 0 already


def policy_loss(log_p, old_log_p, advantage):
    """PPO's clipped surrogate (Eq. 14), all [B] -> [B].

    With the policy that drew the samples the ratio is 1 and the gradient -advantage * grad log_p;
    so it is by default, see `old_log_prob`, and nothing is clipped.
    """
    ratio = torch.exp(log_p - old_log_p)
    clipped = ratio.clamp(1 - RATIO_CLIP, 1 + RATIO_CLIP)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def old_log_prob(log_p, log_p_of_rollout):
    """The denominator of the ratio: the update's own, since one update an epoch is on-policy."""
    return log_p.detach()


def subset_weight(K, M):
    """Weight of the sum over the M steps in S (Eq. 17): the release has the plain sum."""
    return 1.0


def anchor_step(draw, K):
    """The step after which teacher and fake are compared: the last, on finished pictures."""
    return K


def shared_noise(draw, prompts, *key):
    """Noise [B,C,H,W] that is the same for all pictures of a prompt, on any rank (Eq. 16).

    It is seeded by key = (seed, epoch, step) and prompt.
    """
    if not prompts:  # a rank without pictures
        return torch.empty(0, *draw.shape, device=draw.device)
    noise_of = {}
    for prompt in dict.fromkeys(prompts):
        rng = seeded_rng(draw.device, *key, prompt)
        noise_of[prompt] = torch.randn(draw.shape, generator=rng, device=draw.device)
    return torch.stack([noise_of[prompt] for prompt in prompts])


def step_noise(draw, K, S, prompts, *key):
    """Noise of all K steps (Eq. 16): in S each picture has its own, outside of S each prompt."""
    noise = []
    for k in range(K - 1):
        if k in S:
            noise.append(draw.normal())
        else:
            noise.append(shared_noise(draw, prompts, *key, k))
    none = torch.zeros(len(prompts), *draw.shape, device=draw.device)
    return [*noise, none]  # the last step is deterministic


def rows_of(tensors, b):
    """The rows of a micro-batch, of each tensor."""
    return [tensor[b] for tensor in tensors]


def average_decay(decay, updates):
    """Decay of the generator's average after so many optimiser updates.

    The release averages once for each of an epoch's 16 batches, all with the same weights, so that
    one call here is 16 there: .9^16 = .185. Its warm-up is min(decay, (1 + updates) / (10 + updates)).
    """
    return min(decay, (1 + updates) / (10 + updates)) ** 16


STUDENT = ["cold_generator", "generator"]  # stage 1's adapter and the one that learns, stacked


# -------------------------------------------------------------------------------------------------
# Algorithm 1, lines of stage 2
def main():
    args = arguments()
    variants.swap(args.variant, 2, vars(cps), vars(cold_start), globals())
    weights = checked(parse_weights, args.rewards)
    device, rank, world = setup(args)
    rows = checked(load_prompts, args.prompts)
    eval_rows = rows_for_evaluation(args, rows) if args.eval_rewards else []

    rewards = load_rewards(args, weights, device, rows)
    held_out = load_rewards(args, args.eval_rewards, device, eval_rows) if eval_rows else []

    # Stage 1's adapters are frozen and the new ones stacked on them; the teacher is the plain base.
    base = load_base(args, device, [row["prompt"] for row in [*rows, *eval_rows]])
    for name in ("generator", "fake"):
        base.add_adapter(name, args.lora_rank, args.lora_alpha, args.seed, LORA_INIT_STD)
    load_stage_1(base, args.cold_start)
    student_params, fake_params = base.train_only("generator", "fake")  # all weights in one tensor
    fused = device.type == "cuda"
    student_opt = torch.optim.AdamW(
        [student_params], lr=args.lr, weight_decay=WEIGHT_DECAY, fused=fused
    )
    fake_opt = torch.optim.AdamW([fake_params], lr=args.fake_lr, weight_decay=0, fused=fused)
    ema = student_params.detach().clone()

    # All that a checkpoint has to hold, since random numbers are functions of (seed, epoch).
    state = {
        "generator": student_params,
        "fake": fake_params,
        "ema": ema,
        "G_opt": student_opt,
        "F_opt": fake_opt,
        "shapes": {key: p.shape for key, p in base.adapter("fake").items()},
    }
    trained_on = files_of(paths_of(weights, args.reward_path))
    run = Run(args, state, rows, base.transformers(), trained_on)
    note_prompts(base, rows)

    K, M = args.num_steps, args.subset
    levels = base.levels(K)  # 1, .9, .75, .5, 0
    differentiable = [reward for reward in rewards if reward.differentiable]
    others = [reward for reward in rewards if not reward.differentiable]
    rewards = [*differentiable, *others]  # the order of their scores
    # Nothing to differentiate: SubGRPO alone (App. L).
    det_weight = args.det_weight if differentiable else 0.0
    # A tensor, made here and not in the loop: a copy to a GPU waits for all that it has to do.
    reward_weights = torch.tensor([reward.weight for reward in rewards], device=device)
    # The pictures of an epoch, over all GPUs together, of which this one has its rows.
    n_pictures = args.prompts_per_epoch * args.group_size
    my_rows = shard(n_pictures, rank, world)
    n_mine = my_rows.stop - my_rows.start
    level = [torch.full((n_mine,), s, device=device) for s in levels]  # one a picture
    if rank == 0:
        of_rewards = ", ".join(described(reward, det_weight) for reward in rewards)
        say(
            f"RTDMD: {args.epochs} epochs of {args.prompts_per_epoch} prompts x {args.group_size} "
            f"pictures on {world} x {device.type}; rewards {of_rewards}"
        )

    # The three roles: velocity functions of one transformer.
    def student(text):
        return base.velocity(STUDENT, text)

    def fake(text):
        return base.velocity(["cold_fake", "fake"], text)

    def teacher(text):
        return base.velocity([], text, args.cfg)

    # The work on one micro-batch: functions of tensors alone, which a GPU records once and replays.
    # Losses are divided by all pictures (the policy's by those whose advantage is not 0), so that
    # micro-batches and GPUs simply add up.
    def student_pass(x, s, *text):
        return student(text)(x, s)

    def fake_pass(x_s, s, s_next, t, noise, back, noise1, noise2, some, *text):
        weights = (args.gamma, args.eta, some, args.consistency_share)
        losses, _, _ = fake_score_loss(
            fake(text), x_s, s, s_next, t, noise, back, noise1, noise2, *weights
        )
        loss = losses.sum() / n_pictures
        loss.backward()
        return loss.detach()

    def anchor_pass(x_s, s, t, noise, noise_back, *text):
        """AC-DMD -> its weighted gradient with respect to x_s, its loss"""
        x_s = x_s.detach().requires_grad_()
        losses = generator_loss(x_s, s, t, noise, noise_back, teacher(text), fake(text), args.eta)
        loss = losses.sum() / n_pictures
        return args.dm_weight * torch.autograd.grad(loss, x_s)[0], loss.detach()

    def step_pass(x, s, t, noise, gradient, *text):
        """One step of the student; gradient: of the loss, at its result (a recorded pass returns one)."""
        x_t, _, _ = cps_step(x, student(text)(x, s), s, t, args.eta, noise)
        x_t.backward(gradient)
        return x_t.detach()

    def policy_pass(x, s, t, x_next, log_p_of_rollout, advantage, n_kept, *text):
        """SubGRPO of one step -> loss, how many ratios lie outside of the clip, the largest drift"""
        v = student(text)(x, s)
        _, mean, std = cps_step(x, v, s, t, args.eta, x_next)  # any noise: mean and std alone
        log_p = log_prob(x_next, mean, std)
        drift = (torch.exp(log_p - log_p_of_rollout) - 1).detach().abs()
        losses = policy_loss(log_p, old_log_prob(log_p, log_p_of_rollout), advantage)
        loss = losses.sum() / n_kept
        (args.policy_weight * subset_weight(K, M) * loss).backward()
        return loss.detach(), (drift > RATIO_CLIP).sum(), drift.max()

    def score_pass(latents, *readings):
        """Decode -> pictures, scores [D,B] of the differentiable rewards, their loss, its gradient.

        readings: what each of these rewards has read. The gradient is at the latents; it and the loss
        are 0 where nothing asks for them.
        """
        with torch.set_grad_enabled(bool(det_weight)):
            x = latents.detach().requires_grad_(bool(det_weight))
            pictures = base.decode(x)
            looks = [partial(r.look, text=text) for r, text in zip(differentiable, readings)]
            each = score_all(pictures, looks)
        pictures, scores = pictures.detach(), each.detach()
        if not det_weight:
            return pictures, scores, scores.new_zeros(()), torch.zeros_like(latents)
        total = sum(r.weight * score for r, score in zip(differentiable, each))
        # below the margin the gradient is -reward's, above it nothing (Eq. 15; the release's)
        loss = torch.relu(args.margin - total).sum() / n_pictures
        (gradient,) = torch.autograd.grad(det_weight * loss, x)
        return pictures, scores, loss.detach(), gradient

    def readings_of(prompts, metadata):
        """What each differentiable reward reads there."""
        return [reward.read(prompts, metadata).to(device) for reward in differentiable]

    def looks_of_others(prompts, metadata):
        """The rewards without gradient, for these prompts, as functions of pictures (never recorded)"""
        return [partial(reward, prompts=prompts, metadata=metadata) for reward in others]

    # How many pictures fit is tried with what needs the most memory.
    def trial_prompts(n):
        return [rows[0]["prompt"]] * n, [rows[0]["metadata"]] * n

    def trial_inputs(n):
        x = torch.zeros(n, *base.latent_shape, device=device)
        half = torch.full((n,), 0.5, device=device)
        prompts, _ = trial_prompts(n)
        return x, half, base.encode(prompts)

    def try_score_pass(n):
        x = torch.zeros(n, *base.latent_shape, device=device)
        score_pass(x, *readings_of(*trial_prompts(n)))

    # fake's loss evaluates three times its pictures with gradient (once with --gamma 0), and the
    # decoder's activations are large: the micro-batches of all other passes are twice as large. Of
    # those the student's with gradient are the largest: policy_pass, and step_pass is like it.
    def largest_recorded(n):
        x, half, text = trial_inputs(n)
        some = torch.arange(n, device=device)
        fake_pass(x, half, half, half + 0.1, x, half / 10, x, x, some, *text)
        x, half, text = trial_inputs(min(2 * n, n_mine))
        policy_pass(x, half, half - 0.1, x, half, half, half.sum(), *text)
        if not args.low_memory:
            try_score_pass(n)

    def not_recorded(n):
        pictures = torch.zeros(n, 3, *sides(args.resolution), device=device)
        looks = looks_of_others(*trial_prompts(n))
        with brought(rewards, device, args.low_memory):
            score_all(pictures, looks)
            if args.low_memory:
                try_score_pass(n)

    # Compiled and recorded, the passes were seen to take .86 to .89 of that memory. It is more than in
    # stage 1: graphs of many kinds share their memory less well.
    at_once = micro_batch(args, n_mine, device, largest_recorded, compiled=0.9, rest=not_recorded)
    student_params.grad.zero_()
    fake_params.grad.zero_()
    small = [slice(i, i + at_once) for i in range(0, n_mine, at_once)]
    large = [slice(i, i + 2 * at_once) for i in range(0, n_mine, 2 * at_once)]
    passes = (student_pass, fake_pass, anchor_pass, step_pass, policy_pass, score_pass)
    student_pass, fake_pass, anchor_pass, step_pass, policy_pass, recorded = graphed(
        args.graphs, device, *passes
    )
    if not args.low_memory:  # there the rewards' models move, which a recording would not notice
        score_pass = recorded

    @torch.no_grad()
    def roll_out(x_start, level, noise, texts):
        """All K steps -> path, from noise path[0] to pictures path[K]; each step's log-probability."""
        path = [x_start] + [torch.empty_like(x_start) for _ in range(K)]
        log_p = torch.zeros(K, n_mine, device=device)
        for b, text in zip(large, texts):
            for k in range(K):
                v = student_pass(path[k][b], level[k][b], *text)
                step = (path[k][b], v, levels[k], levels[k + 1], args.eta, noise[k][b])
                x_next, mean, std = cps_step(*step)
                path[k + 1][b] = x_next
                if k < K - 1:
                    log_p[k][b] = log_prob(x_next, mean, std)
        return path, log_p

    def score(latents, prompts, metadata, sums, squares):
        """Rewards of the pictures -> [R, n_pictures] of all ranks, and their gradient at the latents."""
        scores = torch.zeros(len(rewards), n_pictures, device=device)  # a rank fills in its own
        my_scores = scores[:, my_rows]
        gradient = torch.zeros_like(latents)
        with brought(rewards, device, args.low_memory):
            for b in small:
                readings = readings_of(prompts[b], metadata[b])
                pictures, with_gradient, loss, slope = score_pass(latents[b], *readings)
                without = score_all(pictures, looks_of_others(prompts[b], metadata[b]))
                my_scores[:, b] = torch.cat([with_gradient, without])
                gradient[b] = slope
                sums.add(loss_det=loss)
                squares.add(slope_det=slope.square().sum())
        return all_reduce(scores), gradient

    def my_prompts(epoch):
        """-> (prompts, metadata) of this rank's pictures, each prompt group_size times in a row"""
        n_prompts = args.prompts_per_epoch
        places = data_order(len(rows), epoch * n_prompts, n_prompts, args.seed)
        mine = [rows[place] for place in places for _ in range(args.group_size)][my_rows]
        return [row["prompt"] for row in mine], [row["metadata"] for row in mine]

    def text_of(prompts):
        """Their text, for the large micro-batches and for the small ones."""
        large_texts = [base.encode(prompts[b]) for b in large]
        small_texts = []
        for text in large_texts:
            small_texts += zip(*(tensor.split(at_once) for tensor in text))
        return large_texts, small_texts

    silent = None if rank == 0 else True  # None: no bar where there is no terminal
    bar = tqdm(range(run.start, args.epochs), initial=run.start, total=args.epochs, disable=silent)
    log = Log(args, run.start, device)
    skipped = {"generator": 0, "fake": 0}  # updates in a row that were not finite
    noted = set()  # rewards whose scores were not finite

    for epoch in bar:
        log.begin()

        # ---- draw: prompts, the subset S of steps to reinforce (Eq. 16), and all noise
        draw = StepRandom(args.seed, epoch, n_pictures, my_rows, base.latent_shape, device)
        # k in S is the step from path[k] to path[k + 1]; the paper counts from 1
        S = sorted(draw.scalars.sample(range(K - 1), M))
        last = anchor_step(draw, K)
        # Here, and not where fake needs it: it is copied to the GPU, which has nothing to do yet.
        some = draw.some(args.consistency_share, small)
        prompts, metadata = my_prompts(epoch)
        large_texts, small_texts = text_of(prompts)
        x_start = draw.normal()
        noise = step_noise(draw, K, S, prompts, args.seed, epoch)
        sums = Sums(device, "loss_fake", "loss_policy", "loss_det", "loss_dm", "drift_clipped")
        squares = Sums(device, "slope_det", "slope_dm")  # of gradients at the pictures: which leads
        log.lap("text")

        # ---- every few epochs the average moves towards the weights, before this epoch's update
        if (epoch + 1) % args.ema_every == 0:
            ema.lerp_(student_params.detach(), 1 - average_decay(args.ema, epoch))

        # ---- roll out all K steps, without gradient (Eq. 8)
        path, log_p = roll_out(x_start, level, noise, large_texts)
        log.lap("rollout")

        # ---- score the pictures; differentiable rewards give a gradient at their latents (Eq. 15).
        # Before anything has to wait for the GPU: prompts are read while it still draws
        scores, reward_gradient = score(path[K], prompts, metadata, sums, squares)
        # {end: gradient at path[end]}
        gradients = {K: reward_gradient} if det_weight else {}
        log.lap("rewards")

        # ---- fake follows the student: one update, on the finished pictures by default (Eq. 10-12)
        here, below = level[last], level[min(last + 1, K)]
        t = renoise_time(levels[last], draw.uniform())
        t_noise, back = draw.normal(), steps_back(draw.uniform())
        inputs = (path[last], here, below, t, t_noise, back, draw.normal(), draw.normal())
        for b, chosen, text in zip(small, some, small_texts):
            sums.add(loss_fake=fake_pass(*rows_of(inputs, b), chosen, *text))
        grad_fake = update(fake_params, fake_opt, skipped, "fake", sums["loss_fake"])
        log.lap("fake")

        # ---- AC-DMD, the anchor to the teacher: one more gradient (Eq. 9)
        if args.dm_weight:
            gradients.setdefault(last, torch.zeros_like(x_start))
            t = renoise_time(levels[last], draw.uniform())
            inputs = (path[last], here, t, draw.normal(), draw.normal())
            for b, text in zip(large, large_texts):
                gradient, loss = anchor_pass(*rows_of(inputs, b), *text)
                gradients[last][b] += gradient
                sums.add(loss_dm=loss)
                squares.add(slope_dm=gradient.square().sum())
            log.lap("anchor")

        # ---- both gradients through the student's step. Its input is detached: how the student came
        # there is credited by SubGRPO (App. G.2)
        for b, text in zip(large, large_texts):
            for end, gradient in gradients.items():
                start = end - 1
                inputs = (path[start], level[start], level[end], noise[start], gradient)
                step_pass(*rows_of(inputs, b), *text)
        log.lap("last_step")

        # ---- SubGRPO on the steps in S (Eq. 17); pictures with advantage 0 are not counted
        advantage = advantages(scores, reward_weights, args.group_size)
        n_kept = (advantage != 0).sum().clamp(min=1)
        my_advantage = advantage[my_rows]
        largest_drift = torch.zeros((), device=device)
        for b, text in zip(large, large_texts):
            for k in S if args.policy_weight else ():
                step = (path[k], level[k], level[k + 1], path[k + 1])
                inputs = rows_of((*step, log_p[k], my_advantage), b)
                loss, outside, drift = policy_pass(*inputs, n_kept, *text)
                sums.add(loss_policy=loss, drift_clipped=outside / n_pictures / M)
                largest_drift = torch.maximum(largest_drift, drift)
        # Without their weights, which have acted in the passes: for `update` to see a nan in any.
        loss = sums["loss_policy"] + sums["loss_det"] + sums["loss_dm"]
        grad_student = update(student_params, student_opt, skipped, "generator", loss)
        log.lap("policy")
        if epoch + 1 < max(args.ema_every, 2):
            # Nothing but the start, which changes no picture, is averaged yet: a run that ends here
            # saves its weights.
            ema.copy_(student_params.detach())

        # ---- log, look, save
        numbers = {
            f"reward_{reward.name}": each.mean().item() for reward, each in zip(rewards, scores)
        }
        note_not_finite(numbers, noted)
        numbers.update(sums.over_ranks(), **squares.over_ranks(torch.sqrt))
        numbers["drift_max"] = all_reduce(largest_drift, dist.ReduceOp.MAX).item()
        if held_out and (epoch == 0 or (epoch + 1) % args.eval_every == 0):
            numbers.update(evaluate(base, eval_rows, held_out, args, f"eval_{epoch + 1}"))
        numbers["latent_std"] = spread_in_groups(path[K], args.group_size, n_pictures, my_rows)
        numbers["flat_groups"] = share_of_flat_groups(advantage, args.group_size)
        numbers.update(ema_drift=distance(student_params, ema), grad_fake=grad_fake)
        log(bar, n_pictures, step=epoch, S=S, **numbers, grad_generator=grad_student)
        if args.sample_every and (epoch + 1) % args.sample_every == 0:
            log.show(preview(base, STUDENT, rows, args, f"epoch_{epoch + 1}"), epoch)
        run.save_or_stop(epoch + 1, args.epochs)

    if rank == 0:
        say(
            f"done: {args.out_dir}/generator_ema.pt, to be stacked on "
            f"{args.cold_start}/generator_ema.pt (sample.py does)"
        )
    if world > 1:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------
# Rewards: loading them, scoring with them, and held-out ones, to see the trained ones being hacked
def load_rewards(args, weights, device, rows):
    """The rewards named in `weights`, loaded; dies where one cannot be, or cannot score these rows.

    With --low_memory they wait in the CPU's memory while they do not score.
    """
    home = torch.device("cpu") if args.low_memory else device
    dtype = getattr(torch, args.reward_dtype)
    return checked(build_for, rows, weights, home, args.reward_path, dtype)


def described(reward, det_weight):
    how = ", by back-propagation too" if reward.differentiable and det_weight else ""
    return f"{reward.name} ({reward.weight:g}{how})"


def score_all(pictures, looks):
    """Pictures [B,3,H,W], seen by each of R functions of them -> scores [R,B] in at least float32.

    A picture that is not finite scores nan, so that `update` skips the epoch.
    """
    fine = pictures.isfinite().flatten(1).all(1)
    # One tensor for all: a detector that several rewards share looks at it once.
    pictures = pictures.nan_to_num(0)
    scores = [at_least_float32(look(pictures)).where(fine, math.nan) for look in looks]
    if not scores:
        return torch.zeros(0, len(pictures), device=pictures.device)
    return torch.stack(scores)


def note_not_finite(numbers, noted):
    """Say once of each reward that its scores are not finite: such an epoch leaves the generator as it is.

    numbers: {"reward_<name>": mean}; noted: names that have been said, which grows.
    """
    for name, mean in numbers.items():
        if not math.isfinite(mean) and name not in noted:
            noted.add(name)
            note(f"{name} is {mean}: an epoch with such a score leaves the generator as it is")


def load_stage_1(base, cold_start):
    """Stage 1's generator and fake score under the names cold_generator and cold_fake.

    They have the modules, rank and alpha of their files; the new adapters those of the flags.
    """
    base.load_adapter("cold_generator", find_weights(cold_start, "cold_start"))
    fake_file = find_weights(cold_start, "cold_start", "fake", must=False, quiet=True)
    if fake_file:
        base.load_adapter("cold_fake", fake_file)
    elif is_rank_0():
        say(
            f"{cold_start} has no fake.pt or fake_score_net.pt: the fake score starts from the "
            "teacher and needs some epochs to catch up"
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


def share_of_flat_groups(advantage, group_size):
    """flat_groups: the share of prompts whose pictures all score the same; they teach nothing."""
    return (advantage.view(-1, group_size) == 0).all(1).float().mean().item()


def rows_for_evaluation(args, rows):
    """The prompts of --eval_prompts, or some that are spread over the training prompts."""
    rows = checked(load_prompts, args.eval_prompts) if args.eval_prompts else rows
    count = min(EVAL_IMAGES, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


@torch.no_grad()
def evaluate(base, rows, rewards, args, name):
    """Mean held-out rewards of one picture a row, always from the same seeds.

    -> {"eval_<reward>": mean}; rank 0's pictures go to samples/<name>.png. Each rank draws its
    share; the numbers do not depend on how many there are.
    """
    device = base.device
    levels = base.levels(args.num_steps)
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    mine = range(len(rows))[shard(len(rows), rank, world)]
    sums = torch.zeros(len(rewards), device=device)
    pictures = []
    with brought(rewards, device, args.low_memory):
        for i in range(0, len(mine), EVAL_BATCH):
            places = mine[i : i + EVAL_BATCH]
            prompts = [rows[place]["prompt"] for place in places]
            metadata = [rows[place]["metadata"] for place in places]
            noise = []
            for k in range(args.num_steps + 1):
                of_each = []
                for place in places:
                    rng = seeded_rng(device, "eval", args.seed, place, k)
                    of_each.append(torch.randn(base.latent_shape, generator=rng, device=device))
                noise.append(torch.stack(of_each))
            student = base.velocity(STUDENT, base.encode(prompts))
            path = rollout(student, noise[0], levels, args.num_steps, args.eta, noise[1:])
            pictures.append(decode_each(base, path[-1]))
            sums += torch.stack([r(pictures[-1], prompts, metadata).sum() for r in rewards])
    if rank == 0 and pictures:
        save_grid(torch.cat(pictures)[:64], f"{args.out_dir}/samples/{name}.png")
    means = (all_reduce(sums) / len(rows)).tolist()
    return {f"eval_{reward.name}": mean for reward, mean in zip(rewards, means)}


if __name__ == "__main__":
    main()
