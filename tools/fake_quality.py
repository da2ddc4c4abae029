"""How well a fake score knows the pictures of one frozen generator: an experiment of tools/ablations.

    python -m tools.fake_quality --cold_start RUN --updates 1000 --decay --out_dir REFERENCE
    python -m tools.fake_quality --cold_start RUN --updates 100 --gamma .01 --reference REFERENCE --out_dir OUT

The fake score is trained on samples of RUN's generator, which does not move. Without --reference its
weights are saved (fake.pt); with it they are compared with those of a long training, on new samples:
numbers.json holds the relative rms difference of the two velocities, in %, for each noise level s. And
how far a gradient lies from the mean of many batches, in % of that mean (gradient noise): a
--consistency_share below 1 adds to it.
"""

import json
import math
import random

import torch

from cold_start import PRESETS, fake_score_loss, renoise_time, steps_back
from common import Parser, as_bytes, parse, seeded_rng, setup, share, spread, write_atomically
from cps import renoise, rollout
from model import graphed
from prompts import load_prompts
from tools.tiny_scores import generator_of, load_tiny

K = 4
ETA = 0.9
RANK = 32
ALPHA = 64
TEST_BATCHES = 4
N_INPUTS = 9  # of a pass, before the text
NOISE_BATCHES = 100


def arguments():
    parser = Parser("Train the fake score on a frozen generator, and measure how far it got.")
    add = parser.add_argument
    add("--cold_start", required=True, help="the tiny run whose generator it is")
    add("--out_dir", required=True, help="where fake.pt or numbers.json goes")
    add("--reference", default="", help="out_dir of the long training to compare with")
    add("--gamma", type=float, default=0.0, help="weight of the consistency loss")
    add("--consistency_share", type=share, default=1.0, help="as for cold_start.py")
    add("--updates", type=int, default=100, help="optimiser steps; 0: the teacher, where it starts")
    add("--decay", action="store_true", help="let the learning rate decay to 0")
    add("--batch_size", type=int, default=128, help="pictures a step")
    add("--stream", default="", help="name of the random numbers that it is trained with")
    add("--seed", type=int, default=0, help="one seed, one result")
    add("--device", default="auto", help="cuda, cpu, mps, or auto: the best there is")
    parser.set_defaults(preset="tiny")
    return parse(parser)


class Samples:
    """A batch of the frozen generator's path, and what a loss needs besides; a function of its key."""

    def __init__(self, base, frozen, rows, n, k, *key):
        self.shape = (n, *base.latent_shape)
        self.device = base.device
        self.rng = seeded_rng(base.device, *key)
        places = [random.Random(f"{key}/{i}").randrange(len(rows)) for i in range(n)]
        self.text = base.encode([rows[place]["prompt"] for place in places])
        start = self.normal()
        noise = [self.normal() for _ in range(K)]
        v = base.velocity(frozen, self.text)
        with torch.no_grad():
            self.path = rollout(v, start, base.levels(K), k, ETA, noise)
        self.u = self.uniform()
        self.back = steps_back(self.uniform())

    def normal(self):
        return torch.randn(self.shape, generator=self.rng, device=self.device)

    def uniform(self):
        return torch.rand(self.shape[0], generator=self.rng, device=self.device)


def train(base, frozen, rows, args):
    """Train the adapter "fake" on the samples of the adapters `frozen`."""
    levels = base.levels(K)
    (weights,) = base.train_only("fake")
    optimizer = torch.optim.AdamW([weights], lr=args.fake_lr, weight_decay=0)

    def rate(step):
        if not args.decay:
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * step / args.updates)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    (fake_pass,) = graphed(True, base.device, pass_of(base, args))
    for step in range(args.updates):
        key = ("train", args.stream, args.seed, step)
        fake_pass(*inputs_of(base, frozen, rows, levels, args, *key))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)  # a recorded pass adds to this very tensor
    return weights


def pass_of(base, args):
    """-> the function that adds the gradient of the fake score's loss on one batch"""

    def fake_pass(*inputs):
        (*tensors, some), text = inputs[:N_INPUTS], inputs[N_INPUTS:]
        fake = base.velocity(["fake"], text)
        weights = (args.gamma, ETA, some, args.consistency_share)
        loss, _, _ = fake_score_loss(fake, *tensors, *weights)
        loss.mean().backward()
        return loss.detach().mean()

    return fake_pass


def inputs_of(base, frozen, rows, levels, args, *key):
    """The inputs of a pass on samples of the frozen generator, a function of the key."""
    scalars = random.Random(repr(key))
    k = scalars.randint(1, K)
    drawn = Samples(base, frozen, rows, args.batch_size, k, *key)
    level = levels[k]
    s = torch.full_like(drawn.u, level)
    s_next = torch.full_like(drawn.u, levels[min(k + 1, K)])
    t = renoise_time(level, drawn.u)
    noise = drawn.normal()
    some = spread(range(args.batch_size), args.consistency_share, scalars.random())
    some = torch.tensor(some, dtype=torch.long, device=base.device)  # also where there is none
    noises = (drawn.normal(), drawn.normal())
    return (drawn.path[k], s, s_next, t, noise, drawn.back, *noises, some, *drawn.text)


def gradient_noise(base, frozen, rows, weights, args):
    """{"gradient noise": rms distance of a batch's gradient from the mean of all, in % of that mean}"""
    levels = base.levels(K)
    fake_pass = pass_of(base, args)
    total = torch.zeros_like(weights)
    squares = 0.0
    for i in range(NOISE_BATCHES):
        weights.grad.zero_()
        fake_pass(*inputs_of(base, frozen, rows, levels, args, "noise", i))
        total += weights.grad
        squares += weights.grad.square().sum().item()
    mean = (total / NOISE_BATCHES).square().sum().item()
    variance = squares / NOISE_BATCHES - mean
    return {"gradient noise": 100 * math.sqrt(variance / mean)}


@torch.no_grad()
def difference(base, frozen, rows, batch_size):
    """{noise level s: relative rms difference of "fake" and "reference" in %}, on new samples."""
    levels = base.levels(K)
    error = torch.zeros(K + 1)
    size = torch.zeros(K + 1)
    for i in range(TEST_BATCHES):
        drawn = Samples(base, frozen, rows, batch_size, K, "test", i)
        fake = base.velocity(["fake"], drawn.text)
        reference = base.velocity(["reference"], drawn.text)
        for k in range(1, K + 1):
            s = levels[k]
            t = renoise_time(s, drawn.u)
            x_t = renoise(drawn.path[k], s, t, drawn.normal())
            exact = reference(x_t, t)
            off = fake(x_t, t) - exact
            error[k] += off.square().mean().item()
            size[k] += exact.square().mean().item()
    relative = {}
    for k in range(1, K + 1):
        relative[f"s = {levels[k]:g}"] = 100 * math.sqrt(error[k] / size[k])
    return relative


def main():
    args = arguments()
    args.fake_lr = PRESETS["tiny"]["fake_lr"]
    device, _, _ = setup(args, training=False)
    base, _ = load_tiny(PRESETS["tiny"]["pretrained"], device)
    rows = load_prompts(PRESETS["tiny"]["prompts"])
    frozen = generator_of(base, args.cold_start)
    base.add_adapter("fake", RANK, ALPHA, args.seed)
    weights = train(base, frozen, rows, args)
    if args.reference:
        noise = gradient_noise(base, frozen, rows, weights, args)
        base.load_adapter("reference", f"{args.reference}/fake.pt", ALPHA)
        numbers = difference(base, frozen, rows, args.batch_size)
        numbers.update(noise)
        content = json.dumps(numbers, indent=1).encode()
        write_atomically({f"{args.out_dir}/numbers.json": content})
    else:
        matrices = base.adapter("fake").items()
        on_cpu = {key: p.detach().cpu().clone() for key, p in matrices}
        write_atomically({f"{args.out_dir}/fake.pt": as_bytes(torch.save, on_cpu)})


if __name__ == "__main__":
    main()
