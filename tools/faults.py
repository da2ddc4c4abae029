"""Small faults of the kind that a careless refactoring makes. tools/mutants.py plants them.

A fault replaces `old` by `new`. `old` has to occur exactly `count` times in the programs, or the
runner refuses to start: a list that no longer fits the code must not pass for one that is caught.
Keep `old` short, so that moving or re-formatting code leaves it whole. `equivalent` says why no
test can notice a fault: it changes nothing that anybody can see.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """One change of the programs' text."""

    name: str
    old: str
    new: str
    file: str = ""  # where to look; "": in all programs, so that code may move to another file
    count: int = 1  # how often `old` occurs there
    which: int = 0  # which of those is replaced
    equivalent: str = ""
    first: tuple = ()  # arguments of pytest: tests that are likely to notice, run before others


ONE = "cold_start.py"
TWO = "rtdmd_rl.py"
SAMPLE = "sample.py"
EVALUATE = "tools/evaluate.py"
EXPORT = "tools/export.py"
SCORES = "tools/tiny_scores.py"
RANDOM = "tools/random_models.py"

# The faults that passed all tests before there was an oracle, each by itself.
KNOWN = [
    Fault(
        "play: a tensor sigma is not multiplied by 1000",
        "1000 * at_least_float32(sigma)",
        "at_least_float32(sigma)",
    ),
    Fault(
        "play: guidance with + cfg (with - without)",
        "v = without + cfg * (with_text - without)",
        "v = with_text + cfg * (with_text - without)",
    ),
    Fault(
        "play: positive text first in the guided batch",
        "zip(without, parts)",
        "zip(parts, without)",
    ),
    Fault(
        "stage 1: the teacher is played by the generator's adapter",
        "return base.velocity([], text, args.cfg)",
        'return base.velocity(["generator"], text, args.cfg)',
        ONE,
    ),
    Fault(
        "stage 1: the fake score of the generator's update is played by the plain base",
        "teacher(text), fake(text),",
        "teacher(text), play(transformer, [], text),",
        ONE,
    ),
    Fault(
        "stage 1: the generator's loss is not divided by the batch",
        "(loss / n_pictures).backward()",
        "loss.backward()",
    ),
    Fault(
        "stage 1: consecutive steps overlap in the data order",
        "first * n_pictures, n_pictures, args.seed)",
        "first, n_pictures, args.seed)",
    ),
    Fault(
        "stage 1: the consistency looks back by up to 2",
        "(1 + (200 * u).floor()) / 1000",
        "(1 + (200 * u).floor()) / 100",
        ONE,
    ),
    Fault(
        "stage 2: the consistency looks back by up to 2",
        "steps_back(draw.uniform())",
        "10 * steps_back(draw.uniform())",
        TWO,
    ),
    Fault(
        "stage 1: the average moves only when the generator was updated",
        "        ema.lerp_(",
        '        if "grad_generator" in norms:\n            ema.lerp_(',
        ONE,
    ),
    Fault(
        "stage 2: the average moves only when the generator was updated",
        "        if (epoch + 1) % args.ema_every == 0:",
        '        if (epoch + 1) % args.ema_every == 0 and skipped["generator"] == 0:',
    ),
    Fault("stage 2: the fake score without stage 1's adapter", '["cold_fake", "fake"]', '["fake"]'),
    Fault(
        "stage 2: the anchor's fake score is played by the generator",
        "teacher(text), fake(text),",
        "teacher(text), student(text),",
        TWO,
    ),
    Fault(
        "stage 2: the sign of the back-propagated reward",
        "torch.relu(args.margin - total)",
        "torch.relu(args.margin + total)",
    ),
    Fault(
        "stage 2: no stop at the margin",
        "torch.relu(args.margin - total)",
        "(args.margin - total)",
    ),
    Fault(
        "stage 2: reward weights are ignored in back-propagation",
        "total = sum(r.weight * score for",
        "total = sum(score for",
    ),
    Fault(
        "stage 2: reward weights are ignored in SubGRPO",
        "torch.tensor([reward.weight for",
        "torch.tensor([1.0 for",
    ),
    Fault(
        "stage 2: det_weight is not applied",
        "torch.autograd.grad(det_weight * loss, x)",
        "torch.autograd.grad(loss, x)",
    ),
    Fault(
        "stage 2: dm_weight is not applied",
        "args.dm_weight * torch.autograd.grad",
        "1.0 * torch.autograd.grad",
    ),
    Fault(
        "stage 2: the two gradients at the last step are averaged, not added",
        "gradients[last][b] += gradient",
        "gradients[last][b] = (gradients[last][b] + gradient) / 2",
    ),
    Fault(
        "stage 2: the policy's loss is divided by all pictures",
        "(advantage != 0).sum().clamp(min=1)",
        "(advantage == advantage).sum()",
    ),
    Fault(
        "stage 2: policy_weight is dropped", "(args.policy_weight * subset_weight", "(subset_weight"
    ),
    Fault(
        "files: generator_ema.pt holds the raw generator",
        'dict(zip(keys, content["ema"]))',
        'dict(zip(keys, content["generator"]))',
    ),
    Fault(
        "decode: (z + shift) / scale",
        "latents / config.scaling_factor + config.shift_factor",
        "(latents + config.shift_factor) / config.scaling_factor",
    ),
    Fault(
        "--cache_text: a repeated prompt is an IndexError",
        "self.rows.setdefault(prompt, len(self.rows))",
        'self.rows[prompt] = [*prompts, ""].index(prompt)',
    ),
    Fault(
        "sample: the base's shift is ignored when the student draws",
        "return base.sigmas(args.steps)",
        "return sigmas(args.steps)",
        SAMPLE,
    ),
    Fault(
        "rewards: PickScore / 100",
        "logit_scale.exp().item() / 26",
        "logit_scale.exp().item() / 100",
    ),
]

SAMPLER = [
    Fault("sigmas: the shift's denominator", "(1 + (shift - 1) * t)", "(1 + shift * t)"),
    Fault("sigmas: K + 1 in place of K", "t = 1 - k / num_steps", "t = 1 - k / (num_steps + 1)"),
    Fault("sigmas: no final 0", "return [*levels, 0.0]", "return levels"),
    Fault(
        "sigmas: the shift is applied twice",
        "shift * t / (1 + (shift - 1) * t)",
        "shift * shift * t / (1 + (shift * shift - 1) * t)",
    ),
    Fault(
        "cps: arithmetic in the model's dtype",
        "x.to(torch.promote_types(x.dtype, torch.float32))",
        "x",
        "cps.py",
    ),
    Fault("cps_step: sign of x0", "x0 = x - s * v", "x0 = x + s * v"),
    Fault("cps_step: eps from s in place of 1 - s", "x + (1 - s) * v", "x + s * v"),
    Fault("cps_step: the old level's signal", "mean = (1 - t) * x0", "mean = (1 - s) * x0"),
    Fault("cps_step: the old level's noise", "std = t * math.sin(", "std = s * math.sin("),
    Fault(
        "cps_step: sine and cosine swapped",
        "mean = (1 - t) * x0 + t * math.cos(",
        "mean = (1 - t) * x0 + t * math.sin(",
    ),
    Fault(
        "cps_step: angle eta pi",
        "std = t * math.sin(eta * math.pi / 2)",
        "std = t * math.sin(eta * math.pi)",
    ),
    Fault(
        "cps_step: draws its own noise",
        "noise = torch.randn_like(x) if noise is None else at_least_float32(noise)",
        "noise = torch.randn_like(x)",
    ),
    Fault(
        "cps_step: the mean is the result", "return mean + std * noise, mean", "return mean, mean"
    ),
    Fault("renoise: the state is not scaled", "return a * x_s + sig *", "return x_s + sig *"),
    Fault("sub_interval: a upside down", "a = (1 - t) / (1 - s)", "a = (1 - s) / (1 - t)"),
    Fault(
        "sub_interval: sign under the root",
        "(t - s) / (1 - s) * (t + a * s)",
        "(t - s) / (1 - s) * (t - a * s)",
    ),
    Fault("sub_interval: no root", ".clamp(min=0).sqrt()", ".clamp(min=0)", "cps.py"),
    Fault("ambient_target: sign of the state", "return -x_s / (1 - s) +", "return x_s / (1 - s) +"),
    Fault("ambient_target: sig in place of its square", "(t - sig**2)", "(t - sig)"),
    Fault("ambient_target: not divided by sig", "/ (1 - t) / sig\n", "/ (1 - t)\n"),
    Fault(
        "log_prob: the release's form sums",
        "-square.flatten(1).mean(1)",
        "-square.flatten(1).sum(1)",
    ),
    Fault(
        "log_prob: the release's form has no minus",
        "return -square.flatten",
        "return square.flatten",
    ),
    Fault(
        "log_prob: 1 / std^2 in the Gaussian", "(square / (2 * variance))", "(square / variance)"
    ),
    Fault(
        "log_prob: the Gaussian is averaged",
        "(2 * variance)).flatten(1).sum(1)",
        "(2 * variance)).flatten(1).mean(1)",
    ),
    Fault("CPSScheduler: its generator is ignored", "generator or self.generator", "generator"),
    Fault("CPSScheduler: the step index stands", "self._step_index += 1", "self._step_index += 0"),
    Fault(
        "CPSScheduler: its own grid whatever sigmas it is given",
        "if sigmas is None:",
        "if True:",
        "cps.py",
    ),
]

LOSSES = [
    Fault(
        "rollout: levels swapped",
        "velocity(path[-1], s), s, t, eta",
        "velocity(path[-1], s), t, s, eta",
    ),
    Fault(
        "rollout: the velocity of the first state",
        "velocity(path[-1], s), s, t, eta",
        "velocity(path[0], s), s, t, eta",
    ),
    Fault(
        "rollout: the velocity at the next level",
        "velocity(path[-1], s), s, t, eta",
        "velocity(path[-1], t), s, t, eta",
    ),
    Fault(
        "rollout: one step too few",
        "zip(levels[:k], levels[1:], noises)",
        "zip(levels[: k - 1], levels[1:], noises)",
    ),
    Fault(
        "renoise_time: from s, not s + .01", "(s + 0.01 + (1 - s - 0.01) * u)", "(s + (1 - s) * u)"
    ),
    Fault("renoise_time: over all of [0, 1]", "(s + 0.01 + (1 - s - 0.01) * u)", "(u + 0 * s)"),
    Fault("renoise_time: no upper bound", ".clamp(0.02, 0.98)", ".clamp(0.02, 1.0)"),
    Fault(
        "fake score: the weight's bound is 1",
        "(1 / sig**2).clamp(0, 10)",
        "(1 / sig**2).clamp(0, 1)",
    ),
    Fault(
        "fake score: the weight is 1 / sig", "(1 / sig**2).clamp(0, 10)", "(1 / sig).clamp(0, 10)"
    ),
    Fault(
        "fake score: not multiplied by sig",
        "(sig * v_fake - sig * v_target)",
        "(v_fake - v_target)",
    ),
    Fault(
        "fake score: the target is x_s's",
        "v_t = fake(x_t, t)\n    ambient",
        "v_t = fake(x_s, t)\n    ambient",
    ),
    Fault(
        "consistency: looks up in place of down",
        "(t - back).clamp(min=0)",
        "(t + back).clamp(max=1)",
    ),
    Fault(
        "consistency: a gradient through the transitions",
        "v_t.detach(), t, t_below, eta, noise1)\n    x2, _, _ = cps_step(x_t, v_t.detach(),",
        "v_t, t, t_below, eta, noise1)\n    x2, _, _ = cps_step(x_t, v_t,",
    ),
    Fault("consistency: one noise for both", "t_below, eta, noise2)", "t_below, eta, noise1)"),
    Fault(
        "consistency: the anchor is detached",
        "x0 = x_t - per_sample(t, x_t) * v_t",
        "x0 = (x_t - per_sample(t, x_t) * v_t).detach()",
    ),
    Fault("consistency: the square of one violation", "(drift1 * drift2)", "(drift1 * drift1)"),
    Fault(
        "consistency: h at the upper level",
        "(x1 - per_sample(t_below, x1) * v1)",
        "(x1 - per_sample(t, x1) * v1)",
    ),
    Fault(
        "consistency: v at the upper level", "torch.cat([t_below, t_below])", "torch.cat([t, t])"
    ),
    Fault(
        "consistency: eta is 0", "    x1, _, _ = cps_step(", "    eta = 0\n    x1, _, _ = cps_step("
    ),
    Fault(
        "fake score: gamma is dropped", "ambient + gamma * consistency,", "ambient + consistency,"
    ),
    Fault(
        "fake score: mean over the batch",
        "** 2).flatten(1).mean(1)",
        "** 2).flatten(1).mean().expand(len(v_fake))",
        ONE,
    ),
    Fault("generator: the sign", "(y_fake - y_teacher) / size)", "(y_teacher - y_fake) / size)"),
    Fault(
        "generator: scaled by the fake's distance",
        "(x_s - y_teacher).abs()",
        "(x_s - y_fake).abs()",
    ),
    Fault(
        "generator: one scale for the whole batch",
        "(x_s - y_teacher).abs().flatten(1).mean(1).view(-1, 1, 1, 1)",
        "(x_s - y_teacher).abs().mean()",
    ),
    Fault("generator: not scaled", "(y_fake - y_teacher) / size)", "(y_fake - y_teacher))"),
    Fault(
        "generator: its own noise for each transition",
        "fake(x_t, t), t, s, eta, noise_back)",
        "fake(x_t, t), t, s, eta, None)",
    ),
    Fault(
        "generator: the transition ends at 0",
        "        y_teacher, _, _ =",
        "        s = 0 * s\n        y_teacher, _, _ =",
    ),
    Fault(
        "generator: the factor one half",
        "0.5 * step_weight(s) * (x_s",
        "step_weight(s) * (x_s",
    ),
    Fault("generator: step_weight is left out", "0.5 * step_weight(s) * (x_s", "0.5 * (x_s"),
    Fault(
        "variants: step_weight's factor once",
        "return 1 / (1 - s) ** 2",
        "return 1 / (1 - s)",
        "variants.py",
    ),
    Fault(
        "sample: another stage 1 under stage 2",
        "        check_pair(*files.values())",
        "        pass",
    ),
    Fault(
        "anneal: rates fall from the first step",
        "min(1.0, (args.steps - step) / (args.anneal * args.steps))",
        "(args.steps - step) / args.steps",
    ),
    Fault(
        "anneal: the fake score's rate stays",
        "((student_opt, args.lr), (fake_opt, args.fake_lr))",
        "((student_opt, args.lr),)",
    ),
    Fault(
        "anneal: another length goes on",
        'FREE - {"steps"} if flags.get("anneal") else FREE',
        "FREE",
    ),
    Fault(
        "keep_every: the kept file is the raw generator",
        'files[f"generator_ema_{step}.pt"] = files["generator_ema.pt"]',
        'files[f"generator_ema_{step}.pt"] = dict(zip(keys, content["generator"]))',
    ),
    Fault(
        "keep_every: a kept generator with the last fake score",
        "kept = KEPT_GENERATOR.fullmatch(os.path.basename(path))",
        "kept = None",
    ),
    Fault(
        "generator: gradient through the target",
        "    with torch.no_grad():\n        x_t = renoise(x_s",
        "    with torch.enable_grad():\n        x_t = renoise(x_s",
        ONE,
    ),
    Fault(
        "generator: summed over the elements",
        "(x_s - target).square().flatten(1).mean(1)",
        "(x_s - target).square().flatten(1).sum(1)",
    ),
]

STAGE_1 = [
    Fault(
        "stage 1: the generator learns at the fake's rate",
        "(student_opt, args.lr)",
        "(student_opt, args.fake_lr)",
        ONE,
    ),
    Fault(
        "stage 1: the fake learns at the generator's rate",
        "(fake_opt, args.fake_lr)",
        "(fake_opt, args.lr)",
        ONE,
    ),
    Fault(
        "stage 1: weight decay", "lr=args.lr, weight_decay=0", "lr=args.lr, weight_decay=0.01", ONE
    ),
    Fault(
        "stage 1: Adam's second beta",
        "[fake_params], lr=args.fake_lr,",
        "[fake_params], lr=args.fake_lr, betas=(0.9, 0.99),",
        ONE,
    ),
    Fault("stage 1: the average's weights swapped", "1 - args.ema)\n", "args.ema)\n", ONE),
    Fault(
        "stage 1: the generator is updated one step early",
        "if (step + 1) % args.generator_every",
        "if step % args.generator_every",
    ),
    Fault(
        "stage 1: the last step is never drawn",
        "randint(1, args.num_steps)",
        "randint(1, args.num_steps - 1)",
    ),
    Fault(
        "stage 1: k is the same in every step",
        'random.Random(f"{seed}/{step}")',
        'random.Random(f"{seed}")',
    ),
    Fault(
        "stage 1: the same noise in every step",
        "seeded_rng(device, seed, step)",
        "seeded_rng(device, seed)",
    ),
    Fault(
        "stage 1: the seed does not reach the noise",
        "seeded_rng(device, seed, step)",
        "seeded_rng(device, step)",
    ),
    Fault(
        "stage 1: the seed does not reach the step's numbers",
        "StepRandom(args.seed, step,",
        "StepRandom(0, step,",
    ),
    Fault(
        "stage 1: every step draws the first one's numbers",
        "StepRandom(args.seed, step,",
        "StepRandom(args.seed, 0,",
    ),
    Fault(
        "stage 1: the seed does not reach the data order",
        "first * n_pictures, n_pictures, args.seed)",
        "first * n_pictures, n_pictures, 0)",
    ),
    Fault(
        "stage 1: the steps share one noise",
        "step_noise = [its.normal() for _ in range(depth)]",
        "step_noise = [its.normal()] * depth",
    ),
    Fault(
        "stage 1: the steps' noise is the starting noise",
        "[noise[b] for noise in step_noise]",
        "[path[0][b] for noise in step_noise]",
    ),
    Fault(
        "stage 1: the generator's pass starts from the first state",
        "x_before, x_s = path[k - 1 : k + 1]",
        "x_before, x_s = path[0], path[k]",
    ),
    Fault(
        "stage 1: the generator's pass has the end's level", "(n_mine,), s_before)", "(n_mine,), s)"
    ),
    Fault(
        "stage 1: the generator's pass has the first step's noise",
        "step_noise[k - 1][b]",
        "step_noise[0][b]",
    ),
    Fault(
        "stage 1: the generator's re-noise time is the fake's",
        "t = renoise_time(s, draw.uniform())",
        "draw.uniform()",
        count=2,
        which=1,
    ),
    Fault(
        "stage 1: the generator's re-noising is the fake's",
        "            noise, noise_back =",
        "            _, noise_back =",
    ),
    Fault(
        "stage 1: the way back has the noise of the way up",
        "noise[b], noise_back[b], *text",
        "noise[b], noise[b], *text",
        ONE,
    ),
    Fault(
        "stage 1: texts belong to other pictures",
        "for b, chosen, text in zip(micro_batches, some, texts):",
        "for b, chosen, text in zip(micro_batches, some, texts[::-1]):",
    ),
    Fault(
        "stage 1: texts of the rollout belong to other pictures",
        "for b, text in zip(micro_batches, texts):",
        "for b, text in zip(micro_batches, texts[::-1]):",
        count=2,
    ),
    Fault(
        "stage 1: texts of the generator's pass belong to other pictures",
        "for b, text in zip(micro_batches, texts):",
        "for b, text in zip(micro_batches, texts[::-1]):",
        count=2,
        which=1,
    ),
    Fault(
        "stage 1: the fake's loss is not divided by the batch",
        "(losses[0].sum() / n_pictures).backward()",
        "losses[0].sum().backward()",
    ),
    Fault(
        "stage 1: the fake's loss is a mean over the micro-batch",
        "(losses[0].sum() / n_pictures).backward()",
        "losses[0].mean().backward()",
    ),
    Fault(
        "stage 1: the fake learns from the ambient part alone",
        "(losses[0].sum() / n_pictures).backward()",
        "(losses[1].sum() / n_pictures).backward()",
    ),
    Fault(
        "stage 1: the generator plays the fake in the fake's update",
        "fake(text), x_s, s, s_next, t, noise, back",
        "student(text), x_s, s, s_next, t, noise, back",
        ONE,
    ),
    Fault(
        "stage 1: no guidance",
        "return base.velocity([], text, args.cfg)",
        "return base.velocity([], text)",
        ONE,
    ),
    Fault(
        "stage 1: the teacher is guided away from the first prompt",
        'self.empty_text = self.encode([""])',
        'self.empty_text = self.encode(["a circle"])',
        "model.py",
    ),
    Fault(
        "stage 1: the generator's step is an Euler step",
        "s_before, s, args.eta, step_noise)",
        "s_before, s, 0, step_noise)",
    ),
    Fault(
        "stage 1: the other adapter's optimiser steps",
        "student_params, student_opt, skipped",
        "student_params, fake_opt, skipped",
        ONE,
    ),
    Fault(
        "stage 1: logged losses are sums",
        "sums.over_ranks(lambda total: total / n_pictures)",
        "sums.over_ranks()",
    ),
    Fault(
        "stage 1: shift is ignored in training",
        "return sigmas(num_steps, self.backbone.shift(num_steps))",
        "return sigmas(num_steps)",
        "model.py",
    ),
    Fault(
        "stage 1: the fake is scored at the wrong level",
        "x_s[b], levels_here[b]",
        "x_s[b], levels_before[b]",
    ),
    Fault(
        "stage 1: both transitions' noises alike",
        "noise1[b], noise2[b], chosen",
        "noise1[b], noise1[b], chosen",
    ),
    Fault("stage 1: --dmd2 keeps the level", "return [*levels[:k], 0.0]", "return levels[: k + 1]"),
]

STAGE_2_MATHEMATICS = [
    Fault(
        "advantages: minus the batch's mean",
        "centred - centred.mean(2, keepdim=True)",
        "grouped - grouped.mean()",
        TWO,
    ),
    Fault(
        "advantages: batch and group swapped",
        "spread = scores.std(1).view(-1, 1, 1)",
        "spread = scores.view(centred.shape).std(2, keepdim=True)",
        TWO,
    ),
    Fault(
        "advantages: a flat group's rounding is left", "grouped - grouped[..., :1]", "grouped", TWO
    ),
    Fault("advantages: one spread for all rewards", "scores.std(1).view(-1, 1, 1)", "scores.std()"),
    Fault("advantages: not standardised again", "total / (total.std() + 1e-4)", "total"),
    Fault(
        "advantages: the bad ones are cut off",
        ".clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)",
        ".clamp(0, ADVANTAGE_CLIP)",
        TWO,
    ),
    Fault(
        "advantages: no clip", ".clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)", ".clamp(-1e9, 1e9)", TWO
    ),
    Fault(
        "advantages: divided by the group's size",
        "(spread + 1e-4)).sum(0)",
        "(spread + 1e-4)).mean(0)",
        TWO,
    ),
    Fault("policy: the sign", "return -torch.minimum(ratio", "return torch.minimum(ratio"),
    Fault(
        "policy: the ratio upside down",
        "torch.exp(log_p - old_log_p)\n",
        "torch.exp(old_log_p - log_p)\n",
    ),
    Fault(
        "policy: the greater of the two",
        "return -torch.minimum(ratio",
        "return -torch.maximum(ratio",
    ),
    Fault(
        "policy: the clip is one-sided",
        "ratio.clamp(1 - RATIO_CLIP, 1 + RATIO_CLIP)",
        "ratio.clamp(max=1 + RATIO_CLIP)",
    ),
    Fault(
        "shared noise: the same for all prompts",
        "seeded_rng(draw.device, *key, prompt)",
        "seeded_rng(draw.device, *key)",
    ),
]

STAGE_2 = [
    Fault(
        "stage 2: shift is ignored in training",
        "levels = base.levels(K)",
        "levels = cps.sigmas(K)",
        TWO,
    ),
    Fault(
        "stage 2: shift is ignored in held-out pictures",
        "levels = base.levels(args.num_steps)",
        "levels = cps.sigmas(args.num_steps)",
        TWO,
    ),
    Fault(
        "stage 2: the seed does not reach the noise",
        "StepRandom(args.seed, epoch,",
        "StepRandom(0, epoch,",
    ),
    Fault(
        "stage 2: the seed does not reach the shared noise",
        "step_noise(draw, K, S, prompts, args.seed, epoch)",
        "step_noise(draw, K, S, prompts, 0, epoch)",
    ),
    Fault(
        "stage 2: S holds the deterministic step",
        "sample(range(K - 1), M)",
        "sample(range(1, K), M)",
    ),
    Fault(
        "stage 2: S is the same in every epoch",
        "draw.scalars.sample(",
        'type(draw.scalars)(f"{args.seed}").sample(',
    ),
    Fault(
        "stage 2: noise is shared on the steps in S",
        "if k in S:\n            noise",
        "if k not in S:\n            noise",
    ),
    Fault(
        "stage 2: noise is never shared",
        "if k in S:\n            noise",
        "if True:\n            noise",
    ),
    Fault(
        "stage 2: shared noise is the same in every epoch",
        "step_noise(draw, K, S, prompts, args.seed, epoch)",
        "step_noise(draw, K, S, prompts, args.seed)",
    ),
    Fault(
        "stage 2: shared noise is the same in every step",
        "shared_noise(draw, prompts, *key, k)",
        "shared_noise(draw, prompts, *key)",
    ),
    Fault(
        "stage 2: the starting noise is shared",
        "x_start = draw.normal()",
        'x_start = shared_noise(pipe.latent_shape, prompts, device, args.seed, epoch, "start")',
        TWO,
    ),
    Fault(
        "stage 2: the same noise in every epoch",
        "StepRandom(args.seed, epoch,",
        "StepRandom(args.seed, 0,",
    ),
    Fault(
        "stage 2: groups are not consecutive",
        "for place in places for _ in range(args.group_size)]",
        "for _ in range(args.group_size) for place in places]",
    ),
    Fault(
        "stage 2: epochs overlap in the data order",
        "epoch * n_prompts, n_prompts",
        "epoch, n_prompts",
    ),
    Fault(
        "stage 2: the rollout is Euler's",
        "levels[k + 1], args.eta, noise[k][b]",
        "levels[k + 1], 0, noise[k][b]",
    ),
    Fault(
        "stage 2: the rollout has the first step's noise",
        "levels[k + 1], args.eta, noise[k][b]",
        "levels[k + 1], args.eta, noise[0][b]",
    ),
    Fault(
        "stage 2: the rollout is the plain base's",
        "student_pass(path[k][b], level[k][b], *text)",
        "base.velocity([], text)(path[k][b], level[k][b])",
    ),
    Fault(
        "stage 2: the fake learns from the last noisy state",
        "inputs = (path[last], here, below",
        "inputs = (path[last - 1], here, below",
    ),
    Fault(
        "stage 2: the fake's loss is not divided by the pictures",
        "losses.sum() / n_pictures",
        "losses.sum()",
        count=2,
    ),
    Fault(
        "stage 2: the fake's loss is a mean over the micro-batch",
        "losses.sum() / n_pictures",
        "losses.mean()",
        count=2,
    ),
    Fault(
        "stage 2: the generator plays the fake in the fake's update",
        "fake(text), x_s, s, s_next, t, noise, back",
        "student(text), x_s, s, s_next, t, noise, back",
        TWO,
    ),
    Fault(
        "stage 2: both transitions' noises alike",
        "inputs = (path[last], here, below, t, t_noise, back, draw.normal(), draw.normal())",
        "inputs = (path[last], here, below, t, t_noise, back, *[draw.normal()] * 2)",
    ),
    Fault(
        "stage 2: the anchor has the fake's times and noises",
        "inputs = (path[last], here, t, draw.normal(), draw.normal())",
        "inputs = (path[last], here, t, t_noise, draw.normal())",
    ),
    Fault(
        "stage 2: the anchor is guided by nothing",
        "return base.velocity([], text, args.cfg)",
        "return base.velocity([], text)",
        TWO,
    ),
    Fault(
        "stage 2: the anchor's teacher is the generator",
        "return base.velocity([], text, args.cfg)",
        "return base.velocity(STUDENT, text, args.cfg)",
        TWO,
    ),
    Fault(
        "stage 2: the teacher has stage 1's adapter",
        "return base.velocity([], text, args.cfg)",
        'return base.velocity(["cold_generator"], text, args.cfg)',
        TWO,
    ),
    Fault(
        "stage 2: the anchor's sign",
        "gradients[last][b] += gradient",
        "gradients[last][b] -= gradient",
    ),
    Fault(
        "stage 2: the anchor replaces the reward's gradient",
        "gradients[last][b] += gradient",
        "gradients[last][b] = gradient",
    ),
    Fault(
        "stage 2: the anchor is not divided by the pictures",
        "losses.sum() / n_pictures",
        "losses.sum()",
        count=2,
        which=1,
    ),
    Fault(
        "stage 2: det is a mean over the micro-batch",
        "torch.relu(args.margin - total).sum() / n_pictures",
        "torch.relu(args.margin - total).mean()",
    ),
    Fault(
        "stage 2: pictures are scored with the first texts",
        "readings_of(prompts[b], metadata[b])",
        "readings_of(prompts[: len(latents[b])], metadata[b])",
    ),
    Fault(
        "stage 2: rewards with gradient read the first metadata",
        "readings_of(prompts[b], metadata[b])",
        "readings_of(prompts[b], metadata[: len(latents[b])])",
    ),
    Fault(
        "stage 2: rewards without gradient read the first prompts",
        "looks_of_others(prompts[b], metadata[b])",
        "looks_of_others(prompts[: len(pictures)], metadata[b])",
    ),
    Fault(
        "stage 2: rewards without gradient read the first metadata",
        "looks_of_others(prompts[b], metadata[b])",
        "looks_of_others(prompts[b], metadata[: len(pictures)])",
    ),
    Fault(
        "stage 2: scores stand in the order of the flag",
        "rewards = [*differentiable, *others]",
        "pass",
    ),
    Fault(
        "stage 2: with --low_memory scoring is recorded",
        "if not args.low_memory:  # there",
        "if True:  # there",
    ),
    Fault(
        "stage 2: scoring is not recorded",
        "if not args.low_memory:  # there",
        "if False:  # there",
    ),
    Fault(
        "stage 2: the last step starts one state early",
        "(path[start], level[start], level[end]",
        "(path[start - 1], level[start], level[end]",
    ),
    Fault(
        "stage 2: the last step at the wrong level",
        "(path[start], level[start], level[end]",
        "(path[start], level[start - 1], level[end]",
    ),
    Fault(
        "stage 2: the last step is the base's own",
        "cps_step(x, student(text)(x, s), s, t, args.eta",
        "cps_step(x, play(transformer, STUDENT[:1], text)(x, s), s, t, args.eta",
        TWO,
    ),
    Fault(
        "stage 2: the policy at the next level",
        "(path[k], level[k], level[k + 1], path[k + 1]",
        "(path[k], level[k + 1], level[k + 1], path[k + 1]",
    ),
    Fault(
        "stage 2: the policy's step is judged by its start",
        "(path[k], level[k], level[k + 1], path[k + 1]",
        "(path[k], level[k], level[k + 1], path[k]",
    ),
    Fault("stage 2: the policy is the fake's", "v = student(text)(x, s)", "v = fake(text)(x, s)"),
    Fault(
        "stage 2: the policy is stage 1's alone",
        "v = student(text)(x, s)",
        "v = play(transformer, STUDENT[:1], text)(x, s)",
    ),
    Fault(
        "stage 2: pictures without advantage divide by 0",
        "(advantage != 0).sum().clamp(min=1)",
        "(advantage != 0).sum()",
    ),
    Fault(
        "stage 2: advantages of other pictures",
        "my_advantage = advantage[my_rows]",
        "my_advantage = advantage.flip(0)[my_rows]",
    ),
    Fault(
        "stage 2: only the first step of S is reinforced",
        "for k in S if args.policy_weight",
        "for k in S[:1] if args.policy_weight",
    ),
    Fault(
        "stage 2: the policy is averaged over S", "    return 1.0\n", "    return 1.0 / M\n", TWO
    ),
    Fault(
        "stage 2: the factor of Eq. 17 without M",
        "return (K - 1) / M",
        "return K - 1",
        "variants.py",
    ),
    Fault(
        "stage 2: the factor of Eq. 17 is always there",
        "    return 1.0\n",
        "    return (K - 1) / M\n",
        TWO,
    ),
    Fault(
        "stage 2: the ratio's denominator is always the rollout's",
        "return log_p.detach()",
        "return log_p_of_rollout",
        TWO,
    ),
    Fault(
        "stage 2: the fake decays, too",
        "lr=args.fake_lr, weight_decay=0",
        "lr=args.fake_lr, weight_decay=args.weight_decay",
        TWO,
    ),
    Fault("stage 2: the generator does not decay", "weight_decay=WEIGHT_DECAY", "weight_decay=0"),
    Fault(
        "stage 2: the generator learns at the fake's rate",
        "[student_params], lr=args.lr, weight_decay=WEIGHT_DECAY",
        "[student_params], lr=args.fake_lr, weight_decay=WEIGHT_DECAY",
        TWO,
    ),
    Fault(
        "stage 2: the other adapter's optimiser steps",
        "student_params, student_opt, skipped",
        "student_params, fake_opt, skipped",
        TWO,
    ),
    Fault(
        "stage 2: the average's weights swapped",
        "1 - average_decay(args.ema, epoch))",
        "average_decay(args.ema, epoch))",
    ),
    Fault(
        "stage 2: the average is called for once, not 16 times",
        "(10 + updates)) ** 16",
        "(10 + updates))",
    ),
    Fault(
        "stage 2: the average's warm-up counts from 1",
        "average_decay(args.ema, epoch)",
        "average_decay(args.ema, epoch + 1)",
    ),
    Fault(
        "stage 2: the average moves every epoch",
        "if (epoch + 1) % args.ema_every == 0:",
        "if True:",
    ),
    Fault(
        "stage 2: a short run saves where it started",
        "if epoch + 1 < max(args.ema_every, 2):",
        "if False:",
    ),
    Fault(
        "stage 2: a run of one epoch saves where it started",
        "if epoch + 1 < max(args.ema_every, 2):",
        "if epoch + 1 < args.ema_every:",
    ),
    Fault(
        "stage 2: fresh adapters start with stage 1's A",
        "LORA_INIT_STD = 1.0",
        "LORA_INIT_STD = None",
    ),
    Fault(
        "stage 2: the average has no warm-up",
        "1 - average_decay(args.ema, epoch))",
        "1 - args.ema**16)",
    ),
    Fault(
        "stage 2: stage 1's generator is its fake score",
        'find_weights(cold_start, "cold_start"))',
        'find_weights(cold_start, "cold_start", "fake"))',
    ),
    Fault(
        "stage 2: stage 1's adapters are swapped",
        '"cold_fake", fake_file)',
        '"cold_fake", generator_file)',
    ),
    Fault(
        "stage 2: stage 1's alpha is that of the new adapters",
        '"cold_generator", find_weights(cold_start, "cold_start"))',
        '"cold_generator", find_weights(cold_start, "cold_start"), 8.0)',
    ),
    Fault(
        "stage 2: stage 1's fake score is left out", "    if fake_file:", "    if not fake_file:"
    ),
    Fault(
        "stage 2: stage 1's adapters are trained",
        'train_only("generator", "fake")',
        'train_only("cold_generator", "cold_fake")',
        TWO,
    ),
    Fault(
        "stage 2: the stack's order",
        'STUDENT = ["cold_generator", "generator"]',
        'STUDENT = ["generator", "cold_generator"]',
        equivalent="the adapters are added: their order is rounding",
    ),
    Fault(
        "stage 2: noise at the last step",
        "none = torch.zeros(len(prompts)",
        "none = torch.ones(len(prompts)",
        equivalent="the step to level 0 multiplies its noise by 0",
    ),
    Fault(
        "stage 2: every reward is logged as the first",
        "each.mean().item()",
        "scores[0].mean().item()",
    ),
    Fault("stage 2: latent_std without the mean", "(square - mean**2)", "square"),
    Fault(
        "stage 2: decoded pictures of the state before",
        "score(path[K], prompts",
        "score(path[K - 1], prompts",
    ),
    Fault(
        "held-out rewards: one seed for all pictures",
        'seeded_rng(device, "eval", args.seed, place, k)',
        'seeded_rng(device, "eval", args.seed, k)',
    ),
    Fault(
        "held-out rewards: a sum in place of a mean",
        "(all_reduce(sums) / len(rows))",
        "all_reduce(sums)",
    ),
]

MODEL = [
    Fault(
        "play: a float sigma is not multiplied by 1000",
        "torch.full((n,), 1000 * sigma",
        "torch.full((n,), sigma",
    ),
    Fault(
        "play: the adapters are set when the function is made",
        "    def velocity(x, sigma, rows=None):\n        set_adapters(backbone.pipe.transformer, adapters)\n",
        "    set_adapters(backbone.pipe.transformer, adapters)\n\n    def velocity(x, sigma, rows=None):\n",
    ),
    Fault(
        "play: each text is repeated in place",
        "tensor.repeat(n // len(tensor), *[1] * (tensor.dim() - 1))",
        "tensor.repeat_interleave(n // len(tensor), 0)",
    ),
    Fault(
        "play: halves swapped", "without, with_text = v.chunk(2)", "with_text, without = v.chunk(2)"
    ),
    Fault("play: guidance of 1 more", "v = without + cfg * (", "v = without + (1 + cfg) * ("),
    Fault(
        "add_adapter: all adapters start alike",
        'f"{seed}/{name}".encode()',
        'f"{seed}".encode()',
        "lora.py",
    ),
    Fault(
        "add_adapter: another start for A", 'init_lora_weights="gaussian"', "init_lora_weights=True"
    ),
    Fault("add_adapter: alpha is the rank", "lora_alpha=alpha,", "lora_alpha=rank,", "lora.py"),
    Fault(
        "adapters: alpha / rank is dropped",
        "self.scaling[name] * self.lora_B[name].weight",
        "self.lora_B[name].weight",
    ),
    Fault(
        "adapters: only the last of a stack counts",
        "return self._active_adapter",
        "return self._active_adapter[-1:]",
    ),
    Fault(
        "adapters: only the first of a stack counts",
        "return self._active_adapter",
        "return self._active_adapter[:1]",
    ),
    Fault("adapters: subtracted", "return y + F.linear(", "return y - F.linear("),
    Fault(
        "train_only: swapped",
        "(self.adapter(name)) for name in names]",
        "(self.adapter(name)) for name in names[::-1]]",
    ),
    Fault(
        "train_only: a gradient that is not 0",
        "flat.grad = torch.zeros_like(flat)",
        "flat.grad = torch.ones_like(flat)",
    ),
    Fault(
        "adapter keys: B before A",
        'if key.endswith(ending) and ".lora_" in key:',
        'if key.endswith(ending) and ".lora_A" in key:',
    ),
    Fault(
        "update: gradients are scaled up, too",
        "min(1, MAX_GRAD_NORM / (norm + 1e-6))",
        "MAX_GRAD_NORM / (norm + 1e-6)",
    ),
    Fault("update: no clipping", "min(1, MAX_GRAD_NORM / (norm + 1e-6))", "1"),
    Fault("update: gradients are kept", "    weights.grad.zero_()\n", ""),
    Fault(
        "update: a loss that is not finite is no reason to skip",
        "math.isfinite(norm) and math.isfinite(loss)",
        "math.isfinite(norm)",
    ),
    Fault(
        "update: skipped updates are not reset",
        "skipped[name] = 0 if finite else",
        "skipped[name] = skipped[name] if finite else",
    ),
    Fault(
        "distance: over the weights in place of the average",
        "/ ema.norm()).item()",
        "/ weights.norm()).item()",
    ),
    Fault("generator: the key's end is ignored", "repr(key).encode()", "repr(key[:2]).encode()"),
    Fault("data order: every pass is alike", 'f"{seed}/pass/{i // length}"', 'f"{seed}/pass"'),
    Fault(
        "shard: the last row is dropped",
        "(rank + 1) * n // world)",
        "(rank + 1) * (n - 1) // world)",
    ),
    Fault(
        "text: pooled vectors of the prompt before",
        "found = [self.cache[prompt] for prompt in prompts]",
        "found = [self.cache[prompt] for prompt in prompts[::-1]]",
    ),
    Fault(
        "text: T5's length is ignored",
        "max_sequence_length=self.text_tokens,",
        "max_sequence_length=256,",
        count=2,
    ),
    Fault(
        "--cache_text: pooled and sequence overlap",
        "for tensor in encode(batch)]",
        "for tensor in encode(batch)][::-1]",
    ),
    Fault(
        "decode: times the scale",
        "latents / config.scaling_factor",
        "latents * config.scaling_factor",
    ),
    Fault(
        "decode: pictures in [-1, 1]",
        "(at_least_float32(pictures) / 2 + 0.5)",
        "at_least_float32(pictures)",
    ),
    Fault("decode: not cut to [0, 1]", "/ 2 + 0.5).clamp(0, 1)", "/ 2 + 0.5)"),
    Fault(
        "checkpointing: whichever adapter is active",
        "            set_adapters(transformer, adapters)\n",
        "",
    ),
    Fault(
        "preview: the teacher's pictures",
        "student = base.velocity(adapters, text)",
        "student = base.velocity([], text)",
        "model.py",
    ),
]

FILES = [
    Fault("stage 1: saving is part of the next step", "        log.begin()\n", "", ONE),
    Fault("stage 2: saving is part of the next step", "        log.begin()\n", "", TWO),
    Fault("checkpoint: directories in it", "entry.external_attr & DIRECTORY", "False"),
    Fault(
        "adapter files: B stays at 0",
        "(layer.lora_A[name].weight, A), (layer.lora_B[name].weight, B)",
        "(layer.lora_A[name].weight, A), (layer.lora_B[name].weight, B * 0)",
    ),
    Fault(
        "adapter files: the file's dtype is kept",
        "at_least_float32(values).to(matrix.device, copy=True)",
        "values.to(matrix.device, copy=True)",
    ),
    Fault(
        "adapter files: a file's own alpha wins over the user's",
        "    if given is not None:\n        chosen",
        "    if given is not None and known is None:\n        chosen",
    ),
    Fault(
        "adapter files: modules with another alpha are forgotten",
        "alpha_pattern=other_alphas",
        "alpha_pattern={}",
    ),
    Fault(
        "adapter files: alpha of diffusers' format is assumed",
        "    if in_diffusers_format:\n        return",
        "    if False:\n        return",
    ),
    Fault(
        "adapter files: rslora divides by the rank",
        "return alpha * math.sqrt(rank) if self.rslora else alpha",
        "return alpha",
    ),
    Fault(
        "adapter files: adapter_config.json is not read",
        "if os.path.exists(config_path):",
        "if False:",
    ),
    Fault(
        "adapter files: the pattern matches parts of names",
        're.fullmatch(rf"(.*\\.)?({pattern})", module)',
        "re.search(pattern, module)",
    ),
    Fault("adapter files: module. is kept", 'PREFIXES = ("module.", ', "PREFIXES = ("),
    Fault(
        "adapter files: one prefix at most is cut off",
        "                name = name[len(prefix) :]\n                cut = True",
        "                name = name[len(prefix) :]",
    ),
    Fault(
        "adapter files: A without B is passed over",
        "            if module not in lacks:",
        "            if False:",
    ),
    Fault(
        "adapter files: the later of two adapters counts",
        "        if module in sides[side]:",
        "        if False:",
    ),
    Fault(
        "find_weights: the raw generator before the average",
        "GENERATOR_NAMES = (\n",
        'GENERATOR_NAMES = (\n    "generator.pt",\n',
    ),
    Fault(
        "find_weights: checkpoints by their names",
        'names.sort(key=lambda name: int(name.rpartition("-")[2]))',
        "names.sort()",
    ),
    Fault(
        "find_weights: the fake score of another folder",
        "path = first_file(os.path.dirname(path), names)",
        "path = first_file(where, names)",
    ),
    Fault(
        "download: without the settings",
        "BESIDE = (CONFIG_NAME, SETTINGS_NAME)",
        "BESIDE = (CONFIG_NAME,)",
    ),
    Fault(
        "find_weights: a default place is looked up on the hub",
        "and where not in DEFAULT_PLACES.values()",
        "",
    ),
    Fault(
        "files: fake.pt holds the generator",
        'dict(zip(keys, content["fake"]))',
        'dict(zip(keys, content["generator"]))',
    ),
    Fault(
        "files: the checkpoint's step is one too high",
        '"step": step, "flags"',
        '"step": step + 1, "flags"',
    ),
    Fault("files: nothing is saved at the end", "or step == last or kept", "or kept"),
    Fault(
        "files: the checkpoint before is not kept",
        'path[:-3] + ".prev.pt")',
        'path[:-3] + ".old.pt")',
    ),
    Fault("files: checksums are not verified", "if archive.testzip():", "if False:"),
    Fault(
        "files: pickled code is run",
        'map_location="cpu", weights_only=True)\n',
        'map_location="cpu", weights_only=False)\n',
        count=2,
    ),
    Fault(
        "resume: the fake's optimiser starts anew",
        "thing.load_state_dict(saved[name])",
        'name == "F_opt" or thing.load_state_dict(saved[name])',
    ),
    Fault(
        "resume: the average starts anew",
        "thing.data.copy_(joined(saved[name]))",
        'name == "ema" or thing.data.copy_(joined(saved[name]))',
    ),
    Fault(
        "resume: the generator is its average",
        "thing.data.copy_(joined(saved[name]))",
        'thing.data.copy_(joined(saved["ema" if name == "generator" else name]))',
    ),
    Fault(
        "resume: with another seed", '    "out_dir", "device",', '    "seed", "out_dir", "device",'
    ),
    Fault(
        "resume: with another learning rate",
        '    "out_dir", "device",',
        '    "lr", "out_dir", "device",',
    ),
    Fault("resume: one line of the log is doubled", '["step"] < start)', '["step"] <= start)'),
    Fault("resume: prompts may differ", "hashed(rows)", "hashed([])"),
    Fault(
        "adapter files: the first tensor is not copied",
        "in file.weights.items():\n        layer",
        "in list(file.weights.items())[1:]:\n        layer",
    ),
    Fault("adapter files: keys too many are ignored", "    if lost:\n", "    if False:\n"),
    Fault("adapter files: shapes may differ", "if there != here:", "if False:"),
    Fault(
        "adapter files: numbers that are not finite are loaded",
        "if not (A.float().isfinite().all() and B.float().isfinite().all()):",
        "if False:",
    ),
    Fault(
        "adapter files: another alpha is taken",
        'return Alpha(float(saved["flags"]["lora_alpha"]), checkpoint_path)',
        "return None",
    ),
    Fault(
        "find_weights: the hub's subfolder is left out",
        'folders = ["", f"{stage}/"]',
        'folders = [""]',
    ),
    Fault(
        "find_weights: a run killed while renaming is taken",
        "if fake_waits and not generator_waits:",
        "if False:",
    ),
    Fault("find_weights: what is missing is no error", "elif must:", "elif False:"),
]

DRAWING = [
    Fault(
        "sample: one seed for all pictures",
        "manual_seed(seed) for seed in seeds]",
        "manual_seed(seeds[0]) for seed in seeds]",
    ),
    Fault(
        "sample: the teacher draws noise for every step",
        "len(levels) - 1 if eta > 0 else 1)",
        "len(levels) - 1)",
        equivalent="the first noise is the same, and Euler steps multiply the others by 0",
    ),
    Fault(
        "sample: the first step's noise is the starting noise",
        "eta, [*later, *",
        "eta, [start, *later, *",
        SAMPLE,
    ),
    Fault("sample: the picture is the last noisy state", "* steps])[-1]", "* steps])[-2]", SAMPLE),
    Fault(
        "sample: stage 2 replaces stage 1",
        "    return list(files)\n",
        "    return list(files)[-1:]\n",
        SAMPLE,
    ),
    Fault(
        "sample: the fake score draws",
        "find_weights(where, stage, must",
        'find_weights(where, stage, "fake", must',
        SAMPLE,
    ),
    Fault(
        "sample: the user's alpha is ignored",
        "base.load_adapter(adapter, path, lora_alpha)",
        "base.load_adapter(adapter, path)",
        SAMPLE,
    ),
    Fault(
        "sample: the rank is not read from the file", "rank_pattern=other_ranks", "rank_pattern={}"
    ),
    Fault(
        "sample: guidance is left out",
        "text, args.cfg)\n        return",
        "text)\n        return",
        SAMPLE,
    ),
    Fault(
        "sample: every batch has the first one's seeds",
        "levels, prompts, args.seed + first, args)",
        "levels, prompts, args.seed, args)",
        SAMPLE,
    ),
    Fault(
        "evaluate: pictures are scored with other prompts",
        "reward(pictures, prompts, metadata)",
        "reward(pictures, prompts[::-1], metadata)",
        EVALUATE,
    ),
    Fault(
        "evaluate: pictures are scored with other metadata",
        '[row["metadata"] for row in batch]',
        '[row["metadata"] for row in rows[: len(batch)]]',
        EVALUATE,
    ),
    Fault(
        "evaluate: pictures of one prompt count as independent",
        "    if len(of_prompt) > 1:",
        "    if False:",
        EVALUATE,
    ),
    Fault(
        "sample: files are numbered anew in every batch",
        "picture_path(args, first_number + first + i)",
        "picture_path(args, first_number + i)",
        SAMPLE,
    ),
    Fault(
        "evaluate: --compare's teacher has the student's adapters",
        "base, [], rows, teacher, teacher_origin",
        "base, adapters, rows, teacher, teacher_origin",
        EVALUATE,
    ),
    Fault(
        "sample: --teacher has the student's adapters",
        "    if args.teacher:\n        files = {}\n    origin",
        "    origin",
        SAMPLE,
    ),
    Fault("sample: the teacher takes 28 steps", '"steps": 50', '"steps": 28', SAMPLE),
    Fault("sample: the teacher's steps are stochastic", '"eta": 0.0', '"eta": 0.9', SAMPLE),
    Fault(
        "sample: the student's steps are Euler's",
        'add("--eta", type=float, default=0.9',
        'add("--eta", type=float, default=0.0',
        SAMPLE,
    ),
    Fault(
        "sample: the preset's guidance is ignored",
        '"cfg": args.teacher_cfg',
        '"cfg": 4.5',
        SAMPLE,
    ),
    Fault(
        "sample: the student is drawn with the guidance that its teacher had",
        '"cfg": "teacher_cfg"}',
        "}",
        SAMPLE,
    ),
    Fault(
        "sample: a run's number of steps is ignored",
        '{"num_steps": "steps", ',
        "{",
        SAMPLE,
    ),
    Fault(
        "sample: only the first adapter is put together",
        "product.pair(adapters)]",
        "product.pair(adapters[:1])]",
    ),
    Fault(
        "sample: the pictures of a prompt are apart",
        "[row for row in rows for _ in range(args.num_images)]",
        "[row for _ in range(args.num_images) for row in rows]",
    ),
    Fault(
        "sample: the teacher has the student's levels",
        "    if args.teacher:\n        return checked",
        "    if False:\n        return checked",
        SAMPLE,
    ),
    Fault(
        "sample: the teacher's scheduler has another shift",
        "from_config(base.pipe.scheduler.config)",
        "from_config(base.pipe.scheduler.config, shift=3.0)",
        SAMPLE,
    ),
    Fault(
        "tiny_scores: the judge sees other captions",
        "scores += clip(batch, prompts, None)",
        "scores += clip(batch, prompts[::-1], None)",
        SCORES,
    ),
    Fault(
        "tiny_scores: every batch has the first one's seeds",
        "range(first_seed + first, first_seed + first + len(prompts))",
        "range(first_seed, first_seed + len(prompts))",
        SCORES,
    ),
    Fault(
        "export: alpha / rank is left out",
        "[matrix.detach().cpu() for matrix in layer.pair(names)]",
        "[torch.cat([x[n].weight.data for n in layer.present(names)], d) for d, x in enumerate((layer.lora_A, layer.lora_B))]",
        EXPORT,
    ),
    Fault(
        "export: only the second stage is in the joint file",
        "save_for_diffusers(base.pipe, folder, list(files))",
        "save_for_diffusers(base.pipe, folder, list(files)[-1:])",
        EXPORT,
    ),
    Fault(
        "export: merging is done in the base's precision",
        ".float().fuse_lora",
        ".fuse_lora",
        EXPORT,
    ),
    Fault(
        "export: the base's directory is published",
        "return place if is_hub_id(place) and not os.path.exists(place) else None",
        "return place",
        EXPORT,
    ),
    Fault(
        "export: the settings are those of the flags' defaults",
        "        args = settled(args, files)\n",
        "",
        EXPORT,
    ),
    Fault(
        "export: a failed one stays",
        "        shutil.rmtree(folder, ignore_errors=True)",
        "        pass",
        EXPORT,
    ),
]

REWARDS = [
    Fault(
        "rewards: CLIPScore is not divided by 100",
        "logit_scale.exp().item() / 100",
        "logit_scale.exp().item()",
    ),
    Fault("rewards: HPS v2 crops", "1, padded_pixels)", "1, clip_pixels)"),
    Fault(
        "rewards: mean and standard deviation swapped",
        "def normalise(images, mean=CLIP_MEAN, std=CLIP_STD)",
        "def normalise(images, mean=CLIP_STD, std=CLIP_MEAN)",
    ),
    Fault("rewards: no anti-aliasing", "antialias=True", "antialias=False"),
    Fault(
        "rewards: width is resized as height", "resizing(width, size[1]", "resizing(height, size[1]"
    ),
    Fault(
        "rewards: the crop is at the corner",
        "top = (images.shape[-2] - size) // 2\n    left = (images.shape[-1] - size) // 2\n",
        "top = 0\n    left = 0\n",
    ),
    Fault(
        "rewards: the longer side is cut to size",
        "shorter = min(height, width)",
        "shorter = max(height, width)",
    ),
    Fault(
        "rewards: picture features have length 2",
        "        if with_graph:\n            self.last.forget()",
        "        features = 2 * features\n        if with_graph:\n            self.last.forget()",
    ),
    Fault(
        "rewards: text features are not normalised",
        "return F.normalize(features, dim=-1)[0]",
        "return features[0]",
    ),
    Fault(
        "rewards: features of pictures that have changed",
        "self.key == (images._version, how)",
        "self.key[1] == how",
    ),
    Fault(
        "rewards: features of other pixels",
        "self.key == (images._version, how)",
        "self.key[0] == images._version",
    ),
    Fault("rewards: ImageReward is not standardised", "/ 1.0333394966054072", "/ 1"),
    Fault(
        "rewards: ImageReward reads the padding",
        "mask.masked_fill(is_token == 0, torch.finfo(text.dtype).min)",
        "mask",
    ),
    Fault(
        "rewards: CLIP waits for the values of a mask",
        "text_model(input_ids=ids)",
        "text_model(input_ids=ids, attention_mask=torch.ones_like(ids))",
    ),
    Fault(
        "rewards: prompts are padded where the tokenizer says",
        '            padding_side="right",\n            truncation=True,\n            max_length=self',
        "            truncation=True,\n            max_length=self",
    ),
    Fault(
        "rewards: no room for a model is a wrong directory",
        "except torch.cuda.OutOfMemoryError as e:\n            remedy",
        "except ZeroDivisionError as e:\n            remedy",
    ),
    Fault(
        "rewards: no room is a failure of the reward",
        "except torch.cuda.OutOfMemoryError:\n        raise  # fewer",
        "except ZeroDivisionError:\n        raise  # fewer",
    ),
    Fault(
        "rewards: nothing is said of the recording that failed",
        "if recording:  # not",
        "if False:  # not",
    ),
    Fault(
        "rewards: GenEval counts with .3",
        '0.9 if metadata.get("tag") == "counting" else 0.3',
        "0.3",
    ),
    Fault(
        "rewards: GenEval asks for one object too few",
        'good = len(these) == want["count"]',
        'good = len(these) >= want["count"] - 1',
    ),
    Fault(
        "rewards: GenEval ignores what must not be there",
        '>= out["count"] for out in',
        ">= 99 for out in",
    ),
    Fault(
        "rewards: GenEval's left is right",
        "(x < -0.5, x > 0.5, y < -0.5, y > 0.5)",
        "(x > 0.5, x < -0.5, y < -0.5, y > 0.5)",
    ),
    Fault(
        "rewards: GenEval's above is below",
        "(x < -0.5, x > 0.5, y < -0.5, y > 0.5)",
        "(x < -0.5, x > 0.5, y > 0.5, y < -0.5)",
    ),
    Fault(
        "rewards: GenEval looks at the relation from the other side",
        "geneval_relations(a[2], b[2])",
        "geneval_relations(b[2], a[2])",
    ),
    Fault(
        "rewards: one right colour is enough",
        '.count(want["color"]) == want["count"]',
        '.count(want["color"]) > 0',
    ),
    Fault(
        "rewards: the least confident objects are asked",
        "key=lambda thing: -thing[1]",
        "key=lambda thing: thing[1]",
    ),
    Fault("rewards: ocr's edit distance starts at 0", "        row = [i]\n", "        row = [0]\n"),
    Fault(
        "rewards: geneval2 takes the arithmetic mean",
        "torch.stack(right).clamp(min=1e-12).log().mean().exp()",
        "torch.stack(right).mean()",
    ),
    Fault("rewards: a name alone weighs 0", "float(weight or 1)", "float(weight or 0)"),
    Fault(
        "rewards: a batch's parts have the first prompts",
        "(images[rows], prompts[rows], metadata[rows])",
        "(images[rows], prompts[:batch], metadata[rows])",
    ),
    Fault(
        "rewards: the checker takes the first caption",
        'row if "include" in row else known.get(prompt)',
        "next(iter(known.values()))",
    ),
    Fault(
        "rewards: the checker claims a gradient",
        '"checker": (checker, False, "")',
        '"checker": (checker, True, "")',
    ),
    Fault(
        "rewards: CLIPScore claims no gradient",
        '"clipscore": (clipscore, True, CLIP_L)',
        '"clipscore": (clipscore, False, CLIP_L)',
    ),
    Fault("rewards: --reward_path is ignored", "hub if given is None else given", "hub"),
    Fault(
        "rewards: geneval_soft counts up to what is asked",
        "1 - abs(asked - len(these)) / asked]",
        "1 - max(0, asked - len(these)) / asked]",
    ),
    Fault(
        "rewards: geneval_soft is bounded below",
        "1 - abs(asked - len(these)) / asked]",
        "max(0, 1 - abs(asked - len(these)) / asked)]",
    ),
    Fault(
        "rewards: geneval_soft asks for colours where the number is wrong",
        '(want["color"]) if counted else 0',
        '(want["color"])',
    ),
    Fault(
        "rewards: geneval_soft asks for places where the number is wrong",
        "float(counted and geneval_placed(",
        "float(geneval_placed(",
    ),
    Fault("rewards: geneval_soft is a sum", "return sum(parts) / len(parts)", "return sum(parts)"),
    Fault(
        "rewards: geneval_soft is a mean over entries",
        "parts += of_this",
        "parts.append(sum(of_this) / len(of_this))",
    ),
    Fault(
        "rewards: geneval_soft takes a wrong target", "these if min(of_this) == 1 else []", "these"
    ),
    Fault(
        "rewards: geneval_soft is GenEval's verdict",
        "of_this = [1 - abs(asked - len(these)) / asked]",
        "of_this = [float(counted)]",
    ),
    Fault(
        "rewards: every weight is 1",
        "rewards.append(ready(score, name, weight,",
        "rewards.append(ready(score, name, 1.0,",
    ),
    Fault(
        "prompts: the relation is turned round",
        "[one(second), one(first, position=",
        "[one(first), one(second, position=",
    ),
    Fault(
        "prompts: colours swapped",
        "[one(first, color=color), one(second, color=other_color)]",
        "[one(first, color=other_color), one(second, color=color)]",
    ),
    Fault(
        "prompts: metadata is that of the line",
        "return [known[prompt] for prompt in prompts]",
        "return list(known.values())[:len(prompts)]",
    ),
]


def group(faults, *first):
    """These faults, with the tests that are likely to notice any of them."""
    return [fault._replace(first=first) for fault in faults]


def of_names(*words):
    """The tests whose names, or whose files' names, contain one of these words."""
    return ("tests", "-k", " or ".join(words))


# What came with variants.py, settings.json and the base model's class.
HOUSE = [
    Fault(
        "variants: nothing is put in the place of the default",
        "place[replaced] = function",
        "pass",
        "variants.py",
    ),
    Fault(
        "variants: the second of two for one function is taken",
        "if chosen_for.setdefault(replaced, name) != name:",
        "if False:",
        "variants.py",
        first=("tests/test_variants.py",),
    ),
    Fault(
        "variants: a name of the other stage is taken", "if stage in stages]", "]", "variants.py"
    ),
    Fault(
        "score_gradient: no slope of the re-noising",
        "difference = a * (1 - t) / t * (v_teacher - v_fake)",
        "difference = (1 - t) / t * (v_teacher - v_fake)",
        "variants.py",
    ),
    Fault(
        "step_consistency: from the re-noised state",
        "return x_s, fake(x_s, t_k), t_k, t_next",
        "return x_t, v_t, t, t_next",
        "variants.py",
    ),
    Fault(
        "gaussian_log_prob: no variance",
        "variance = torch.as_tensor(std) ** 2",
        "variance = 0.5 + 0 * torch.as_tensor(std)",
        "variants.py",
    ),
    Fault(
        "group_std: over the batch",
        "spread = scores.view(centred.shape).std(2, keepdim=True)",
        "spread = scores.std(1).view(-1, 1, 1)",
        "variants.py",
    ),
    Fault(
        "drawn_step: always the last",
        "return draw.scalars.randint(1, K)",
        "return K",
        "variants.py",
    ),
    Fault(
        "free_noise: the same for all",
        "return draw.normal()",
        "return draw.normal()[:1].expand(len(prompts), *draw.shape)",
        "variants.py",
    ),
    Fault(
        "printed_std: the exact one",
        "return (1 - t) / (1 - s), (t - s) / (1 - s)",
        "return (1 - t) / (1 - s), (t**2 - ((1 - t) / (1 - s) * s) ** 2) ** 0.5",
        "variants.py",
    ),
    Fault(
        "settings: not written",
        "            write_settings(args, hashed(identity), origin)\n",
        "            pass\n",
        "checkpoint.py",
    ),
    Fault(
        "settings: a flag on the command line loses",
        "if attribute not in flags_given():",
        "if True:",
        "checkpoint.py",
    ),
    Fault(
        "settings: stage 2 does not look at them",
        '    take_settings(args, find_weights(args.cold_start, "cold_start", quiet=True))\n',
        "",
        TWO,
    ),
    Fault(
        "settings: alpha is not taken", 'if "lora_alpha" in settings:', "if False:", "checkpoint.py"
    ),
    Fault(
        "log: a lap goes to the next part",
        "            before = moment\n",
        "            pass\n",
        "common.py",
    ),
    Fault(
        "levels: a first step above .96 is taken",
        "if levels[1] > highest:",
        "if levels[1] > 2:",
        "model.py",
    ),
    Fault("base: guidance is ignored", "if cfg == 1 or", "if True or", "model.py"),
    Fault(
        "stage 1: a step too many is executed",
        "return levels[: k + 1]",
        "return levels[: k + 2]",
        ONE,
    ),
    Fault(
        "fake score: the consistency starts at t''",
        "return x_t, v_t, t, (t - back).clamp(min=0)",
        "return x_t, v_t, (t - back).clamp(min=0), (t - back).clamp(min=0)",
        ONE,
    ),
]

BASES = [
    Fault(
        "flux: time is not rounded, nor small",
        "timestep.to(x.dtype) / 1000",
        "timestep.to(x.dtype)",
    ),
    Fault(
        "flux: guidance is 1", "torch.full_like(timestep, guidance)", "torch.ones_like(timestep)"
    ),
    Fault(
        "flux: rows and columns swapped",
        "places(device, 1, height, width), torch",
        "places(device, 1, width, height).flip(1)[:, [2, 0, 1]], torch",
    ),
    Fault(
        "flux: a token's channels in another order",
        "pixel_unshuffle(x, self.patch)",
        "pixel_unshuffle(x, self.patch).flip(1)",
    ),
    Fault(
        "flux: the velocity's channels in another order",
        "pixel_shuffle(velocity.transpose(1, 2).unflatten(2, size), self.patch)",
        "pixel_shuffle(velocity.transpose(1, 2).unflatten(2, size).flip(1), self.patch)",
    ),
    Fault(
        "flux: noise of the steps in the tokens' order",
        "if self.latent_shape is None:",
        "if True:",
        "cps.py",
    ),
    Fault(
        "flux: an even grid is not shifted",
        "elif mu is not None and not dynamic:",
        "elif False:",
        "cps.py",
    ),
    Fault(
        "flux: tokens of an odd height",
        "if height % side or width % side or tuple(shape)",
        "if width % side or tuple(shape)",
        "cps.py",
    ),
    Fault("flux: tokens of any shape", " or tuple(shape) != tokens:", ":", "cps.py"),
    Fault(
        "flux: a card without the latents' shape",
        "if base.backbone.scheduler_steps_on_tokens:",
        "if False:",
        EXPORT,
    ),
    Fault(
        "flux: a card that says the levels are others",
        '"sigmas" in base.backbone.timesteps(args.steps)',
        "False",
        EXPORT,
    ),
    Fault(
        "flux: every base has the family's licence",
        "self.licences.get(name, self.licences[None])",
        "self.licences[None]",
    ),
    Fault("flux: the scheduler's fixed shift", "if not config.use_dynamic_shifting:", "if True:"),
    Fault("flux: guided twice", "or backbone.guided_by_input()", "or False"),
    Fault("klein: tokens of 2 x 2 places", "patch = 1", "patch = 2", "backbones.py"),
    Fault("klein: mean of the latents", "latents * deviation + mean", "latents * deviation"),
    Fault(
        "klein: shift of 50 steps",
        "compute_empirical_mu(self.tokens, num_steps)",
        "compute_empirical_mu(self.tokens, 50)",
    ),
    Fault(
        "klein: text has no places",
        "places(device, 1, 1, 1, length)",
        "0 * places(device, 1, 1, 1, length)",
    ),
    Fault("klein: fused matrices are left out", "(to_qkv_mlp_proj|to_out)", "(to_nothing)"),
    Fault("klein: the language model stays cut", "self.pipe.text_encoder = whole\n", "pass\n"),
    Fault(
        "own base: the student stands on the teacher's",
        "if any(name in STUDENTS for name in adapters):",
        "if False:",
    ),
    Fault(
        "own base: all roles stand on the generator's",
        "if any(name in STUDENTS for name in adapters):",
        "if True:",
    ),
    Fault("own base: stage 1's student is left", '"generator", "cold_generator")', '"generator",)'),
    Fault("own base: not part of a run's content", "in transformers:", "in transformers[:1]:"),
    Fault(
        "own base: stage 2 does not take it from stage 1",
        '    "generator_pretrained": (str,),\n',
        "",
        "checkpoint.py",
    ),
    Fault(
        "own base: pictures are drawn on the teacher's",
        'generator_pretrained="" if args.teacher else args.generator_pretrained',
        'generator_pretrained=""',
        SAMPLE,
    ),
    Fault(
        "own base: the teacher is drawn on the generator's",
        'generator_pretrained="" if args.teacher else args.generator_pretrained',
        "generator_pretrained=args.generator_pretrained",
        SAMPLE,
    ),
    Fault(
        "own base: --compare's teacher is drawn on the generator's",
        "has_teacher=args.compare",
        "has_teacher=False",
        EVALUATE,
    ),
    Fault(
        "own base: of another class",
        "if kind and name != kind:",
        "if False:",
    ),
    Fault(
        "own base: of other shapes",
        "shapes(own) != shapes(other)",
        "False",
    ),
    Fault(
        "own base: its own VAE and scheduler",
        'if name != "transformer"}',
        'if name == "x"}',
    ),
    Fault(
        "own base: an older run has the preset's",
        'settings.get("generator_pretrained", "")',
        'settings.get("generator_pretrained")',
    ),
    Fault(
        "own base: a preset's stays in force for merged adapters",
        'args.generator_pretrained = ""  # a preset',
        "pass  # a preset",
    ),
    Fault(
        "own base: the export names it as the teacher",
        "hub_name(args.pretrained) if has_own else public_name(args)",
        "public_name(args)",
        EXPORT,
    ),
    Fault(
        "own base: the export forgets it",
        'public_name(args) if has_own else ""',
        '""',
        EXPORT,
    ),
]

SPEED = [
    Fault(
        "text: the newest are forgotten",
        "in sizes.items():",
        "in reversed(sizes.items()):",
        "text.py",
    ),
    Fault("text: all but the last are forgotten", "too_many -= size", "pass", "text.py"),
    Fault(
        "text: drawing gets the first batch's for all",
        "if prompts != self.prompts:",
        "if self.prompts is None:",
        "text.py",
    ),
    Fault(
        "text: drawing keeps the caller's list",
        "self.prompts = list(prompts)",
        "self.prompts = prompts",
        "text.py",
    ),
    Fault(
        "text: drawing reads prompt by prompt",
        "base.encode = WholeBatches(base.backbone.text)",
        "pass",
        SAMPLE,
    ),
    Fault(
        "quicken: a group's channels have one mean",
        "within + between + self.eps",
        "within + self.eps",
    ),
    Fault("quicken: a group's bias is shifted", "- group_mean * scale", "+ group_mean * scale"),
    Fault("quicken: attention without its scale", "torch.bmm(scale * query,", "torch.bmm(query,"),
    Fault("quicken: the norms stay", "is torch.nn.GroupNorm", "is torch.nn.LayerNorm"),
    Fault("quicken: the compiler's own bounds", ", options=COMPILER", ""),
    Fault("quicken: the decoder is compiled as it is", "    quicken(vae)\n    vae", "    vae"),
    Fault("joined: q and k change places", '"to_q", "to_k", "to_v"', '"to_k", "to_q", "to_v"'),
    Fault("joined: adapters add nothing", "return layers[0].active()", "return []"),
    Fault("joined: B learns nothing", "of_low, None, of_B, None", "of_low, None, None, None"),
    Fault("joined: A learns nothing", "return of_x, of_low,", "return of_x, None,"),
    Fault("joined: the backward pass in what autocast left", "x = x.to(self.weight.dtype)", "pass"),
    Fault("joined: norms are a must", "if layer.norm_q is not None:", "if True:"),
    Fault("joined: the text's norms are a must", "if layer.norm_added_q is not None:", "if True:"),
    Fault("joined: all must have the adapter", "if any(layer.present", "if all(layer.present"),
    Fault("joined: not put together once", ", *joined_in(transformer)]", "]", "sample.py"),
    Fault("joined: the text has the picture's norm", "norm_added_q(text_q)", "norm_q(text_q)"),
    Fault(
        "joined: the picture's q has the norm of k", "q = layer.norm_q(q)", "q = layer.norm_k(q)"
    ),
    Fault("joined: the text's keys come first", "torch.cat([k, text_k]", "torch.cat([text_k, k]"),
    Fault("joined: the text is cut off too early", "[hidden_states.shape[1]], 1", "[1], 1"),
    Fault("joined: the weights are held twice", "layer.weight.data = rows", "pass"),
    Fault("joined: while the weights are on the CPU", "if not cache_text:\n", "if True:\n"),
    Fault("joined: though nothing is compiled", "if self.compile:\n", "if True:\n"),
    Fault("pictures: rounded down", "(pictures * 255).round()", "(pictures * 255)"),
    Fault(
        "pictures: what is not finite becomes black",
        "if not pictures.isfinite().all():",
        "if False:",
        SAMPLE,
    ),
    Fault(
        "pictures: all have the first one's text",
        "threads.map(as_png, pictures, texts)",
        "threads.map(as_png, pictures, texts[:1] * len(texts))",
    ),
    Fault("gelu: ReLU in its place", "use_gelu=True", "use_gelu=False"),
    Fault("gelu: x stays in float32", "x.flatten(0, -2).to(W.dtype)", "x.flatten(0, -2)"),
    Fault("gelu: with a gradient, too", "if torch.is_grad_enabled() or adapted", "if adapted"),
    Fault("gelu: an adapter is passed by", " or adapted", ""),
    Fault("gelu: the exact one, too", ' and module.approximate == "tanh"', ""),
    Fault("gelu: never fused", "                fuse_gelu(transformer)\n", ""),
    Fault("share: no weight", "there / share)", "there)", ONE),
    Fault(
        "share: other pictures' noise",
        "noise1[some], noise2[some]",
        "noise1[: len(some)], noise2[some]",
    ),
    Fault(
        "share: other pictures' text",
        "tensor[rows] for tensor in text",
        "tensor[: len(rows)] for tensor in text",
    ),
    Fault("share: always the same places", "start = self.scalars.random()", "start = 0.5"),
    Fault(
        "share: each rank counts for itself",
        "range(offset + b.start, min(offset + b.stop,",
        "range(b.start, min(b.stop,",
    ),
    Fault(
        "reuse: beyond an update of the generator", "step % args.generator_every\n", "step\n", ONE
    ),
    Fault("reuse: always the same order", "/rollout/{step - place}", "/rollout", ONE),
    Fault(
        "reuse: goes on with another roll-out", "else drawn_in(first)", "else drawn_in(step)", ONE
    ),
    Fault(
        "reuse: goes on with other prompts",
        "first * n_pictures, n_pictures",
        "step * n_pictures, n_pictures",
        ONE,
    ),
    Fault("micro-batch: all that is free", "ROOM_USED * free", "free"),
    Fault("micro-batch: what does not grow is forgotten", "return at_1 + (n", "return 0 + (n"),
    Fault(
        "micro-batch: graphs keep no memory",
        "kept + more if args.graphs else max(kept, more)",
        "max(kept, more)",
    ),
    Fault("micro-batch: room for the passes alone", "max(kept, more)", "kept"),
    Fault("micro-batch: compiled passes take as much", "kept *= compiled", "pass"),
    Fault(
        "micro-batch: checkpointed passes shrink, too",
        "args.compile and not args.low_memory",
        "args.compile",
    ),
    Fault("micro-batch: infinity is a number", "if at_2 == math.inf:", "if False:"),
    Fault(
        "micro-batch: passes are tried as compiled",
        'torch.compiler.set_stance("force_eager"), sdpa',
        "sdpa",
    ),
    Fault("micro-batch: the student's pass is tried with n pictures", "min(2 * n, n_mine)", "n"),
    Fault("preview: all at once", "for one in latents.split(1)", "for one in [latents]"),
    Fault("graphs: no pool is shared", "(graph, self.recordings.pool", "(graph, None"),
    Fault("graphs: why a recording failed is hidden", "raise (why or e) from None", "raise e"),
    Fault("micro-batch: where there is no room nothing is needed", "most = math.inf", "most = 0"),
    Fault(
        "graphs: they stay beside a first call",
        "            self.recordings.let_go()  # a plain pass finds no room beside what graphs keep\n",
        "",
    ),
    Fault("train_only: gradients of their own", "gradient.view_as(p)", "torch.zeros_like(p)"),
]

# What measures the base models: their text's shapes, operations of a forward, models of true size.
TRUE_SIZES = [
    Fault(
        "text: SD3's is T5's alone",
        "length = self.pipe.tokenizer_max_length + self.text_tokens",
        "length = self.text_tokens",
        "backbones.py",
    ),
    Fault(
        "text: FLUX.1's has CLIP's tokens, too",
        "return (self.text_tokens, width), pooled",
        "return super().text_shapes()",
        "backbones.py",
    ),
    Fault(
        "base: a part that is null is loaded",
        "if not (index.get(name) or [None])[0]:",
        "if name not in index:",
        "backbones.py",
    ),
    Fault(
        "operations: of one resolution",
        "return family(pipe, resolution)",
        "return family(pipe, 64)",
        "tools/bench.py",
    ),
    Fault(
        "operations: guidance by input is a second pass",
        "forwards_of(settings, steps, backbone.guided_by_input())",
        "forwards_of(settings, steps)",
        "tools/bench.py",
    ),
    Fault(
        "random: klein 9B is klein 4B",
        "klein(out_dir, device, KLEIN9B, QWEN3_8B)",
        "klein(out_dir, device, KLEIN4B, QWEN3_4B)",
        RANDOM,
    ),
    Fault(
        "random: FLUX.1 has SD3's scale", "scaling_factor=0.3611", "scaling_factor=1.5305", RANDOM
    ),
    Fault(
        "random: files of float32",
        "torch.set_default_dtype(torch.bfloat16)",
        "torch.set_default_dtype(torch.float32)",
        RANDOM,
    ),
    Fault("random: rotary axes in another order", "(16, 56, 56)", "(56, 16, 56)", RANDOM),
]

FAULTS = [
    *KNOWN,
    *group(SPEED, "tests/test_speed.py", "tests/test_model.py"),
    *group(
        BASES,
        "tests/test_backbones.py",
        "tests/test_sampler.py",
        "tests/test_generator_base.py",
        "tests/test_export.py",
    ),
    *HOUSE,
    *group(
        SAMPLER,
        *of_names(
            "time_shift",
            "cps_step",
            "last_step",
            "arithmetic",
            "renoising",
            "target",
            "log_prob",
            "scheduler",
        ),
    ),
    *LOSSES,
    *STAGE_1,
    *group(STAGE_2_MATHEMATICS, *of_names("advantage", "policy_gradient", "shared_noise")),
    *STAGE_2,
    *MODEL,
    *group(
        FILES,
        *of_names(
            "test_loading",
            "test_wiring",
            "checkpoint",
            "resume",
            "whole",
            "stacked",
            "three_commands",
            "bad_input",
        ),
    ),
    *group(
        DRAWING,
        *of_names(
            "test_teacher_grid",
            "test_wiring",
            "test_evaluate",
            "export",
            "scheduler",
            "three_commands",
            "scoreboard",
        ),
    ),
    *group(
        REWARDS,
        *of_names(
            "test_wiring",
            "test_geneval",
            "clip",
            "score",
            "genevals",
            "gradient_of",
            "checker",
            "prompts",
            "hps",
            "image",
            "ocr",
        ),
    ),
    *group(
        TRUE_SIZES,
        *of_names("random_models", "operations", "without_t5", "shapes_of_a_text"),
    ),
    # ---- troubles that users have reported
    Fault(
        "hub: asked again for every file", "        constants.HF_HUB_OFFLINE = True\n", "", "hub.py"
    ),
    Fault(
        "hub: a gated repository is a missing one",
        "among(errors.GatedRepoError)",
        "False",
        "hub.py",
    ),
    Fault("hub: no limit to its patience", "timeout=PATIENCE", "timeout=60", "hub.py"),
    Fault(
        "hub: the outermost error decides",
        "chain = list(causes(error))",
        "chain = [error]",
        "hub.py",
    ),
    Fault("base: fp16 weights beside others", "and all(", "and any(", "hub.py"),
    Fault("prompts: a list is a line", "isinstance(whole, (list, dict))", "False", "prompts.py"),
    Fault(
        "prompts: JSON among plain lines is drawn",
        "None if isinstance(from_json(line), (dict, list)) else line",
        "line",
        "prompts.py",
    ),
    Fault("ocr: '90s opens a quotation", r"(?!\d0s\b)", "", "rewards.py"),
    Fault(
        "die: the first process of all speaks alone",
        "if local or is_first_here():",
        "if local or is_rank_0():",
        "common.py",
    ),
    Fault("signals: nohup's is taken, too", "if not by_nohup:", "if True:", "common.py"),
    Fault(
        "signals: what other code makes of one is told as bad input",
        'if stop["ending"]:',
        "if False:",
    ),
    Fault(
        "files: a directory in a file's place is a traceback",
        "if os.path.isdir(name):\n                die",
        "if False:\n                die",
        "common.py",
    ),
    Fault(
        "signals: nothing listens before the first step",
        '        end_on_signals("stopped by a signal before the first step: nothing is lost")\n',
        "",
        "common.py",
    ),
    Fault(
        "--resolution: height and width swapped",
        "return int(height), int(width or height)",
        "return int(width or height), int(height)",
        "common.py",
    ),
    Fault("grid: a picture is made square", "round(height * wide / width)", "wide", "pictures.py"),
    Fault(
        "start_from: the average is not taken",
        'for name in ("generator", "fake", "ema"):',
        'for name in ("generator", "fake"):',
        "checkpoint.py",
    ),
    Fault(
        "start_from: another alpha is taken",
        '("lora_rank", "lora_alpha", "pretrained',
        '("lora_rank", "pretrained',
        "checkpoint.py",
    ),
    Fault(
        "start_from: run_id is that without it",
        "            if origin:\n                identity",
        "            if False:\n                identity",
        "checkpoint.py",
    ),
    Fault(
        "like: as many at once as now", "[args.prompt] * args.batch_size", "[args.prompt]", SAMPLE
    ),
    Fault(
        "like: other weights are taken", "and text.get(name) != str(value):", "and False:", SAMPLE
    ),
    Fault(
        "like: another sampler is taken",
        'if text.get("sampler", origin["sampler"]) != origin["sampler"]:',
        "if False:",
        SAMPLE,
        first=("tests/test_troubles.py", "-k", "like"),
    ),
    Fault(
        "evaluate: another sampler's pictures are taken",
        "content_of_sampler(levels_of(base, args), float(args.eta))",
        '""',
        SAMPLE,
        first=("tests/test_troubles.py", "-k", "like or evaluation"),
    ),
    Fault(
        "checkpoint: the files of held-out rewards decide",
        "files_of(paths_of(weights, args.reward_path))",
        "files_of(args.reward_path)",
        TWO,
        first=("tests/test_checkpoints.py", "-k", "reward"),
    ),
    Fault(
        "rewards: a look may change the pictures",
        "if images._version != before:",
        "if False:",
        first=("tests/test_failures.py",),
    ),
    Fault(
        "rewards: a look may give no gradient",
        "if torch.is_grad_enabled() and images.requires_grad and not scores.requires_grad:",
        "if False:",
        first=("tests/test_failures.py",),
    ),
    Fault(
        "stage 2: nothing is said of scores that are not finite",
        "if not math.isfinite(mean) and name not in noted:",
        "if False:",
        TWO,
        first=("tests/test_failures.py",),
    ),
    Fault("pictures: a call begins at 0 again", "max(numbers, default=-1) + 1", "0", SAMPLE),
    Fault(
        "evaluate: what is there is drawn again",
        "read_all(paths, texts) if look is not None else None",
        "None",
        SAMPLE,
    ),
    Fault(
        "evaluate: another seed's picture is taken",
        "if its_text != {name: str(value) for name, value in text.items()}:",
        "if its_text is None:",
        SAMPLE,
    ),
    Fault(
        "evaluate: what is scored is not what is saved",
        "return as_saved(pictures)",
        "return pictures.cpu()",
        SAMPLE,
    ),
    Fault(
        "scheduler: timesteps are ignored",
        "if timesteps is not None:\n            sigmas",
        "if False:\n            sigmas",
        "cps.py",
    ),
    Fault(
        "wandb: a run that goes on is a new one",
        "if start == 0 or not os.path.exists(path):",
        "if True:",
        "common.py",
    ),
    Fault(
        "a GPU: FLUX.1's blocks share a plan of cuDNN's attention",
        "cudnn_attention = False",
        "cudnn_attention = True",
        "backbones.py",
        first=("tests/test_backbones.py", "-k", "cudnn"),
    ),
    Fault(
        "a GPU: no base does without cuDNN's attention",
        "enable_cudnn_sdp(family.cudnn_attention)",
        "enable_cudnn_sdp(True)",
        "model.py",
        first=("tests/test_backbones.py", "-k", "cudnn"),
    ),
    Fault(
        "a GPU: the trial of micro-batches leaves cuDNN's plans",
        'set_stance("force_eager"), sdpa_kernel(NOT_CUDNN):',
        'set_stance("force_eager"):',
        "common.py",
        first=("tests/test_speed.py", "-k", "a_gpu_takes"),
    ),
]
