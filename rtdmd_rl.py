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
import random

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import DEFAULT_PLACES
from checkpoint import find_weights, load_checkpoint, save_or_stop
from cold_start import HERE, PAPER as PAPER_COLD, fake_score_loss, generator_loss, renoise_time
from common import Log, all_reduce, checked, data_order, die, distance, generator, make_parser, parse, setup, shard, update
from cps import at_least_float32, cps_step, log_prob, rollout, sigmas
from model import (adapter, add_adapter, check_levels, decode, evaluated, graphed, load_adapter, load_pipeline, note_prompts, play, preview, save_grid,
                   text_encoder, train_only)
from prompts import load_prompts
from rewards import build, guarded, move, parse_weights

PRESETS = {
    "sd35m": dict(pretrained="stabilityai/stable-diffusion-3.5-medium", sample_every=25),
    "sd3m": dict(pretrained="stabilityai/stable-diffusion-3-medium-diffusers", resolution=1024, cfg=7.0, prompts_per_epoch=32, group_size=16,
                 micro_batch=2, sample_every=25),  # micro_batch: half of SD3.5-M's, since a picture has four times the tokens
    "tiny": dict(pretrained=os.path.join(HERE, "assets/tiny"), prompts=os.path.join(HERE, "assets/tiny/prompts_train.jsonl"), device="auto",
                 resolution=32, max_sequence_length=8, cfg=2.0, epochs=340, prompts_per_epoch=8, group_size=8, micro_batch=64, lr=1.6e-5,
                 fake_lr=3.2e-5, ema=.998, ema_every=1, rewards="clipscore:1,checker:1", reward_path=[f"clipscore={HERE}/assets/tiny/clip"],
                 det_weight=.2, dm_weight=.2, sample_every=85, save_every=85, compile=0),
}
PAPER = dict(PAPER_COLD, log_prob="gaussian", advantage_std="group", subset_factor=1, det_weight=1.0, dm_weight=1.0, margin=100.0, dm_steps="drawn")


def arguments():
    parser, add = make_parser("Stage 2: RTDMD, reinforcement of the 4-step generator.", PRESETS, "out/rtdmd", PAPER)
    add("--cold_start", default=DEFAULT_PLACES["cold_start"], help="stage 1's out_dir, an export, a release's checkpoint-N, an adapter file, a hub repository")
    add("--epochs", type=int, default=1000, help="epochs; one update of G and of F each")
    add("--prompts_per_epoch", type=int, default=48, help="prompts an epoch over all GPUs together")
    add("--group_size", type=int, default=24, help="pictures of each prompt; they may lie on any GPUs")
    add("--micro_batch", type=int, default=4, help="pictures a GPU decodes, and F learns from, at once; in the other passes twice as many")
    add("--lr", type=float, default=3e-6, help="learning rate of the generator")
    add("--weight_decay", type=float, default=1e-4, help="AdamW's weight decay of the generator's adapter")
    add("--fake_lr", type=float, default=3e-5, help="learning rate of the fake score")
    add("--lora_init_std", type=float, default=1.0, help="std of a fresh adapter's A; stage 1's is 1/rank")
    add("--ema", type=float, default=.9, help="decay of the generator's average, applied 16 times; see `average_decay`")
    add("--ema_every", type=int, default=8, help="update the average every so many epochs")
    add("--rewards", default="clipscore:1,pickscore:1,hpsv2:1,geneval_soft:1", help="name:weight,... (see rewards.py)")
    add("--reward_path", action="append", default=[], metavar="NAME=PATH", help="local directory or file of a reward's model")
    add("--reward_dtype", choices=("float32", "bfloat16"), default="float32", help="precision of the reward models; scores are float32")
    add("--reward_batch", type=int, default=0, help="pictures a reward model looks at at once, with gradient then computed twice; 0: micro_batch")
    add("--offload_rewards", action="store_true", help="keep the reward models in the CPU's memory while they do not score")
    add("--eval_rewards", default="", help="name,...: held-out rewards that nothing is trained on, so that hacking the others is seen")
    add("--eval_every", type=int, default=50, help="score them every so many epochs (and after the first), on fixed prompts and seeds")
    add("--eval_prompts", default="", help="file with their prompts, as --prompts; default: spread over the training prompts")
    add("--eval_images", type=int, default=64, help="how many of those prompts, a picture each")
    add("--subset", type=int, default=2, help="M: how many of the K-1 stochastic steps are reinforced an epoch (Eq. 16); K-1 is GRPO")
    add("--shared_noise", type=int, choices=(0, 1), default=1, help="1: steps outside the subset share their noise within a prompt's group")
    add("--subset_factor", type=int, choices=(0, 1), default=0, help="0: sum over the M steps of S (release); "
        "1: (K-1)/M times that sum (Eq. 17), in expectation the sum over all K-1 steps")
    add("--policy_weight", type=float, default=1.0, help="weight of SubGRPO; 0 leaves it out")
    add("--det_weight", type=float, default=1e-4, help="weight of back-propagation through the last step; 0 leaves it out")
    add("--dm_weight", type=float, default=1e-3, help="weight of AC-DMD; 0 leaves it out (watch the reward being hacked)")
    add("--dm_steps", choices=("last", "drawn"), default="last", help="where AC-DMD and F work: on the last step's pictures, or, the paper's Eq. 9 being "
        "an expectation over all steps, at one step drawn for each epoch, as in stage 1")
    add("--margin", type=float, default=3.0, help="back-propagation stops where the weighted rewards exceed this (--paper: beyond reach)")
    add("--clip", type=float, default=1e-5, help="PPO clip range of the ratio")
    add("--old_log_prob", choices=("update", "rollout"), default="update", help="where the ratio's denominator comes from: the update's own "
        "pass (the ratio is 1: one update an epoch is exactly on-policy), or the rollout as in the release, where rounding gets clipped")
    add("--log_prob", choices=("release", "gaussian"), default="release", help="-mean d^2, or Eq. 13's -sum d^2 / (2 std^2)")
    add("--advantage_std", choices=("batch", "group"), default="batch", help="of each reward over the whole batch, and once more of their sum; "
        "or of each reward over each group and no more (paper)")
    add("--advantage_clip", type=float, default=5.0, help="advantages are clipped to +- this")
    args = parse(parser)
    check_levels(args)
    return args


# ------------------------------------------------------------------------------------------------------- 1. the mathematics
def advantages(scores, weights, group_size, std="batch", clip=5.0):
    """Group-relative advantages (Eq. 14): scores [R,I] of I pictures, groups consecutive -> [I].

    Each reward: minus its group's mean, over the standard deviation of the batch (release) or of the group (paper); weighted sum;
    standardised once more over the batch (release only); clipped. A reward that does not vary gives 0.
    """
    grouped = scores.view(len(scores), -1, group_size)
    centred = grouped - grouped[..., :1]  # first, so that a group whose pictures all score the same gives exactly 0
    centred = centred - centred.mean(2, keepdim=True)
    spread = grouped.std(2, keepdim=True) if std == "group" else scores.std(1).view(-1, 1, 1)
    total = (torch.as_tensor(weights, dtype=scores.dtype, device=scores.device).view(-1, 1, 1) * centred / (spread + 1e-4)).sum(0).flatten()
    return (total if std == "group" else total / (total.std() + 1e-4)).clamp(-clip, clip)  # its mean is 0 already


def policy_loss(log_p, old_log_p, advantage, clip):
    """PPO's clipped surrogate (Eq. 14), all [B] -> [B]. With the policy that drew the samples the ratio is 1 and the gradient is
    -advantage * grad log_p."""
    ratio = torch.exp(log_p - old_log_p)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def average_decay(decay, updates):
    """Decay of the generator's average after so many optimiser updates.

    The release averages once for each of an epoch's 16 batches, all with the same weights, so that
    one call here is 16 there: .9^16 = .185. Its warm-up is min(decay, (1 + updates) / (10 + updates)).
    """
    return min(decay, (1 + updates) / (10 + updates)) ** 16


def shared_noise(shape, prompts, device, *key):
    """Noise [B,C,H,W] that is the same for all pictures of a prompt, on any rank (Eq. 16): seeded by key = (seed, epoch, step) and prompt."""
    each = {p: torch.randn(shape, generator=generator(device, *key, p), device=device) for p in dict.fromkeys(prompts)}
    return torch.stack([each[p] for p in prompts]) if prompts else torch.empty(0, *shape, device=device)  # a rank without pictures


# ------------------------------------------------------------------------------------------ 2. Algorithm 1, lines of stage 2
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
    home = torch.device("cpu") if args.offload_rewards else device
    loaded = lambda what: [guarded(r) for r in checked(build, what, home, args.reward_path, getattr(torch, args.reward_dtype), args.reward_batch)]
    rewards, held_out, eval_rows = loaded(weights), loaded(args.eval_rewards) if args.eval_rewards else [], []
    if held_out:
        eval_rows = checked(load_prompts, args.eval_prompts) if args.eval_prompts else rows
        count = min(args.eval_images, len(eval_rows))
        eval_rows = [eval_rows[i * len(eval_rows) // count] for i in range(count)]
    for reward, its in [(r, rows) for r in rewards] + [(r, eval_rows) for r in held_out]:
        checked(reward.check, [row["prompt"] for row in its], [row["metadata"] for row in its])
    args.det_weight *= any(r.differentiable for r in rewards)  # nothing to differentiate: SubGRPO alone (App. L)
    transformer, encode, shape = pipe.transformer, text_encoder(pipe, args, [row["prompt"] for row in [*rows, *eval_rows]]), pipe.latent_shape
    # Stage 1's adapters are frozen and the new ones stacked on them; the teacher is still the plain base.
    roles = {"generator": ["cold_generator", "generator"], "fake": ["cold_fake", "fake"], "teacher": []}
    # They have the modules, rank and alpha of their files; the new ones those of the flags.
    for name in ("generator", "fake"):
        add_adapter(transformer, name, args, args.lora_init_std, getattr(torch, args.adapter_dtype))
    generator_file = find_weights(args.cold_start, "cold_start")
    load_adapter(transformer, "cold_generator", generator_file, assumed_alpha=args.lora_alpha)
    fake_file = find_weights(args.cold_start, "cold_start", "fake", must=False, quiet=True)
    if fake_file:
        load_adapter(transformer, "cold_fake", fake_file, assumed_alpha=args.lora_alpha)
    elif rank == 0:
        print(f"{args.cold_start} has no fake.pt or fake_score_net.pt: the fake score starts from the teacher and needs some epochs to catch up", flush=True)
    G_params, F_params = train_only(transformer, "generator", "fake")
    G_opt = torch.optim.AdamW(G_params, lr=args.lr, betas=(.9, .999), weight_decay=args.weight_decay, fused=device.type == "cuda")
    F_opt = torch.optim.AdamW(F_params, lr=args.fake_lr, betas=(.9, .999), weight_decay=0, fused=device.type == "cuda")
    ema = [p.detach().clone() for p in G_params]
    state = {"generator": G_params, "fake": F_params, "ema": ema, "G_opt": G_opt, "F_opt": F_opt, "keys": list(adapter(transformer, "fake"))}
    args.start = load_checkpoint(args, state, rows, transformer)
    note_prompts(pipe, rows, args)
    levels, negative = sigmas(K, args.shift), encode([""])
    I = args.prompts_per_epoch * args.group_size
    mine = shard(I, rank, world)
    if rank == 0:
        print(f"RTDMD: {args.epochs} epochs of {args.prompts_per_epoch} prompts x {args.group_size} pictures on {world} x {device.type}; rewards "
              + ", ".join(f"{r.name} ({r.weight:g}{', by back-propagation too' if r.differentiable else ''})" for r in rewards), flush=True)

    # What an epoch asks of the transformer, for one micro-batch: functions of tensors alone, which `graphed` records on a GPU. All but the
    # first add to the .grad of their adapter.
    level = lambda k, b: torch.full((len(range(*b.indices(mine.stop - mine.start))),), levels[k], device=device)
    std_or_none = lambda std: std if args.log_prob == "gaussian" else None

    def velocity(x, s, *text):
        return play(transformer, roles["generator"], text)(x, s)

    def fake_pass(x_s, s, t, noise, back, noise1, noise2, after, *text):  # as in stage 1
        loss = fake_score_loss(play(transformer, roles["fake"], text), x_s, s, t, noise, back, noise1, noise2, args.gamma, args.eta,
                               args.renoise_std, after if args.consistency_times == "steps" else None)[0].sum() / I
        loss.backward()
        return loss.detach()

    def anchor(x_s, s, t, noise, back_noise, *text):  # AC-DMD -> its gradient with respect to x_s, its loss
        teacher, F = play(transformer, roles["teacher"], text, negative, args.cfg), play(transformer, roles["fake"], text)
        x_s = x_s.detach().requires_grad_()
        loss = generator_loss(x_s, s, t, noise, back_noise, teacher, F, args.eta, args.renoise_std, args.dm_gradient).sum() / I
        return torch.autograd.grad(loss, x_s)[0], loss.detach()

    def follow(x, s, t, noise, slope, *text):  # one step of G with gradient; slope is that of the loss with respect to its result
        x_t = cps_step(x, play(transformer, roles["generator"], text)(x, s), s, t, args.eta, noise)[0]
        x_t.backward(slope)
        return x_t.detach()

    def policy_pass(x, s, t, x_t, old_log_p, advantage, kept, *text):  # SubGRPO of one step (Eq. 17)
        _, mean, std = cps_step(x, play(transformer, roles["generator"], text)(x, s), s, t, args.eta, x_t)  # x_t in place of a noise: not used
        log_p = log_prob(x_t, mean, std_or_none(std))
        drift = (torch.exp(log_p - old_log_p) - 1).detach().abs()
        old = log_p.detach() if args.old_log_prob == "update" else old_log_p
        loss = policy_loss(log_p, old, advantage, args.clip).sum() / kept
        (args.policy_weight * ((K - 1) / M if args.subset_factor else 1) * loss).backward()  # the sum over S (release); Eq. 17's factor
        return loss.detach(), (drift > args.clip).sum(), drift.max()
    velocity, fake_pass, anchor, follow, policy_pass = graphed(args.graphs, device, velocity, fake_pass, anchor, follow, policy_pass)

    bar, log = tqdm(range(args.start, args.epochs), initial=args.start, total=args.epochs, disable=None if rank == 0 else True), Log(args)
    part = lambda name: None
    if args.bench:
        from report import stopwatch
        part = stopwatch(args, transformer, I, 3, evaluated)
    skipped = {"generator": 0, "fake": 0}  # updates in a row that were not finite
    for epoch in bar:
        # As in stage 1, every random number comes from (seed, epoch) and is drawn for all pictures: the number of GPUs does not matter.
        rng, g = random.Random(f"{args.seed}/{epoch}"), generator(device, args.seed, epoch)
        S = sorted(rng.sample(range(K - 1), M))  # Eq. 16: the steps to reinforce, the same for all pictures of the epoch
        last = rng.randint(1, K) if args.dm_steps == "drawn" else K  # Eq. 9: the step after which teacher and fake score are compared
        s = levels[last]
        normal = lambda: torch.randn(I, *shape, generator=g, device=device)[mine]
        uniform = lambda: torch.rand(I, generator=g, device=device)[mine]
        chosen = [rows[i] for i in data_order(len(rows), epoch * args.prompts_per_epoch, args.prompts_per_epoch, args.seed)]
        chosen = [row for row in chosen for _ in range(args.group_size)][mine]
        prompts, metadata = [row["prompt"] for row in chosen], [row["metadata"] for row in chosen]
        x_K = normal()
        # steps in S explore with independent noise; the others share theirs within a group, so that they do not blur the comparison
        noise = [normal() if k in S or not args.shared_noise else shared_noise(shape, prompts, device, args.seed, epoch, k) for k in range(K - 1)]
        noise.append(torch.zeros_like(x_K))  # the last step is deterministic
        # F's loss evaluates three times its pictures with gradient (once with --gamma 0), and the decoder's activations are large: the
        # micro-batches of all other passes are twice as large as theirs.
        small, large = ([slice(i, i + n) for i in range(0, len(prompts), n)] for n in (args.micro_batch, 2 * args.micro_batch))
        large_texts = [encode(prompts[b]) for b in large]
        small_texts = [each for text in large_texts for each in zip(*(e.split(args.micro_batch) for e in text))]
        part("text")

        # ---- every few epochs the average moves towards the weights, before this epoch's update of them
        if (epoch + 1) % args.ema_every == 0:
            torch._foreach_lerp_(ema, [p.detach() for p in G_params], 1 - average_decay(args.ema, epoch))

        # ---- roll out all K steps
        path, old_log_p = [x_K] + [torch.empty_like(x_K) for _ in range(K)], torch.zeros(K, len(prompts), device=device)
        with torch.no_grad():
            for b, text in zip(large, large_texts):
                for k in range(K):
                    v = velocity(path[k][b], level(k, b), *text)
                    path[k + 1][b], mean, std = cps_step(path[k][b], v, levels[k], levels[k + 1], args.eta, noise[k][b])
                    if k in S:
                        old_log_p[k][b] = log_prob(path[k + 1][b], mean, std_or_none(std))
        part("rollout")

        # ---- one step of the fake score, on the finished pictures (s = 0) unless --dm_steps drawn
        sums, most = torch.zeros(7, device=device), torch.zeros((), device=device)
        u, n, back, n1, n2 = uniform(), normal(), uniform(), normal(), normal()
        for b, text in zip(small, small_texts):
            steps_back = (1 + (200 * back[b]).floor()) / 1000
            sums[0] += fake_pass(path[last][b], level(last, b), renoise_time(s, u[b]), n[b], steps_back, n1[b], n2[b], level(min(last + 1, K), b), *text)
        F_norm = update(F_params, F_opt, args, skipped, "fake", sums[0])
        part("fake")

        # ---- the generator's gradient, first part: decode and score the pictures, back-propagate to them, and from there through the last
        #      step. Its input is a constant: what it owes to G is SubGRPO's part (App. G.2).
        u, n, back_noise = uniform(), normal(), normal()
        scores = torch.zeros(len(rewards), I, device=device)  # of all pictures; each rank fills in its own
        # {k: gradient of the loss with respect to the state after step k}: of the reward at k = K, of AC-DMD at k = last
        slopes = {k: torch.zeros_like(x_K) for k, weight in ((K, args.det_weight), (last, args.dm_weight)) if weight}
        move(rewards, device if args.offload_rewards else None)
        for b in small:
            with torch.set_grad_enabled(bool(args.det_weight)):
                x_0 = path[K][b].detach().requires_grad_(bool(args.det_weight))
                pictures = decode(pipe, x_0)
                part("decode")
                fine, pictures = pictures.isfinite().flatten(1).all(1), pictures.nan_to_num(0)  # else: scores nan, and `update` skips this epoch
                each = [r(pictures if r.differentiable else pictures.detach(), prompts[b], metadata[b]) for r in rewards]
                each = [at_least_float32(score).where(fine, math.nan) for score in each]
                part("reward")
                scores[:, mine][:, b] = torch.stack(each).detach()
                if args.det_weight:  # Eq. 15
                    total = sum(r.weight * score for r, score in zip(rewards, each) if r.differentiable)
                    det = torch.relu(args.margin - total).sum() / I
                    slopes[K][b], = torch.autograd.grad(args.det_weight * det, x_0)
                    sums[2] += det.detach()
                    sums[5] += slopes[K][b].square().sum()
                    part("decode, reward: backward")
        move(rewards, "cpu" if args.offload_rewards else None)
        for b, text in zip(large, large_texts):
            if args.dm_weight:  # Eq. 9, with the teacher's guidance
                slope, dm = anchor(path[last][b], level(last, b), renoise_time(s, u[b]), n[b], back_noise[b], *text)
                slopes[last][b] += args.dm_weight * slope
                sums[3] += dm
                sums[6] += (args.dm_weight * slope).square().sum()
                part("teacher and fake")
            for k, slope in slopes.items():
                follow(path[k - 1][b], level(k - 1, b), level(k, b), noise[k - 1][b], slope[b], *text)
            part("last step")

        # ---- second part: SubGRPO on the steps in S (Eq. 17); pictures with advantage 0 add nothing and are not counted
        scores = all_reduce(scores)
        advantage_all = advantages(scores, [r.weight for r in rewards], args.group_size, args.advantage_std, args.advantage_clip)
        advantage, kept = advantage_all[mine], (advantage_all != 0).sum().clamp(min=1)
        for b, text in zip(large, large_texts):
            for k in S if args.policy_weight else ():
                loss, outside, drift = policy_pass(path[k][b], level(k, b), level(k + 1, b), path[k + 1][b], old_log_p[k][b], advantage[b], kept, *text)
                sums[1] += loss
                sums[4] += outside / I / M
                most = torch.maximum(most, drift)
        G_norm = update(G_params, G_opt, args, skipped, "generator", sums[1:4].sum())
        part("policy")
        if epoch + 1 < args.ema_every:  # not averaged yet: a shorter run saves its weights, not where they started
            torch._foreach_copy_(ema, [p.detach() for p in G_params])
        seen = evaluate(pipe, roles["generator"], encode, eval_rows, held_out, args, f"eval_{epoch + 1}") if held_out and (
            epoch == 0 or (epoch + 1) % args.eval_every == 0) else {}
        # slope_*: norms of the weighted terms' gradients with respect to the pictures' latents, to see which of the two leads
        names = ("loss_fake", "loss_policy", "loss_det", "loss_dm", "drift_clipped", "slope_det", "slope_dm")
        totals = [*(totals := all_reduce(sums))[:5].tolist(), *totals[5:].sqrt().tolist()]
        # signs of a collapse: how much the pictures of a prompt differ (latent_std), prompts whose pictures all score the same (flat_groups)
        group = torch.arange(I, device=device)[mine] // args.group_size
        moments = torch.zeros(2, args.prompts_per_epoch, *shape, device=device).index_add_(1, group, torch.stack([path[K], path[K].square()]))
        mean, square = all_reduce(moments) / args.group_size
        log(bar, I, step=epoch, S=S, **{f"reward_{r.name}": scores[i].mean().item() for i, r in enumerate(rewards)},
            **dict(zip(names, totals)), drift_max=all_reduce(most, dist.ReduceOp.MAX).item(), **seen,
            latent_std=(square - mean ** 2).clamp(min=0).sqrt().mean().item(),
            flat_groups=(advantage_all.view(-1, args.group_size) == 0).all(1).float().mean().item(),
            ema_drift=distance(G_params, ema), grad_fake=F_norm, grad_generator=G_norm)
        part("step")
        if args.sample_every and (epoch + 1) % args.sample_every == 0:
            preview(pipe, roles["generator"], encode, rows, args, f"epoch_{epoch + 1}")
        save_or_stop(args, state, epoch + 1, args.epochs)
    if rank == 0:
        print(f"done: {args.out_dir}/generator_ema.pt, to be stacked on {args.cold_start}/generator_ema.pt (sample.py does)", flush=True)
    if world > 1:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------- 3. held-out rewards, to see the trained ones being hacked
@torch.no_grad()
def evaluate(pipe, adapters, encode, rows, rewards, args, name):
    """Mean held-out rewards of one picture a row, always from the same seeds -> {"eval_<reward>": mean}; rank 0's pictures to samples/<name>.png.
    Each rank draws its share; the numbers do not depend on how many there are."""
    device, levels, sums, pictures = pipe.transformer.device, sigmas(args.num_steps, args.shift), torch.zeros(len(rewards), device=pipe.transformer.device), []
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    move(rewards, device if args.offload_rewards else None)
    mine = range(len(rows))[shard(len(rows), rank, world)]
    for places in (mine[i:i + args.micro_batch] for i in range(0, len(mine), args.micro_batch)):
        prompts, metadata = [rows[i]["prompt"] for i in places], [rows[i]["metadata"] for i in places]
        noise = [torch.stack([torch.randn(pipe.latent_shape, generator=generator(device, "eval", args.seed, i, k), device=device)
                              for i in places]) for k in range(args.num_steps + 1)]
        x = rollout(play(pipe.transformer, adapters, encode(prompts)), noise[0], levels, args.num_steps, args.eta, noise[1:])[-1]
        pictures.append(decode(pipe, x))
        sums += torch.stack([r(pictures[-1], prompts, metadata).sum() for r in rewards])
    move(rewards, "cpu" if args.offload_rewards else None)
    if rank == 0 and pictures:
        save_grid(torch.cat(pictures)[:64], f"{args.out_dir}/samples/{name}.png")
    return {f"eval_{r.name}": mean for r, mean in zip(rewards, (all_reduce(sums) / len(rows)).tolist())}


if __name__ == "__main__":
    main()
