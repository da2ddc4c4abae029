"""Algorithm 1 once more, as slowly and plainly as it can be written, against the programs.

Both training loops are recomputed here from the paper's equations: in float64, all pictures at
once, one process, no micro-batches, no recorded graphs. There is no adapter machinery either. An
adapter is a pair of matrices (A, B). A role of the transformer is the base with
W + alpha / rank B A in the place of each adapted W. PyTorch differentiates the whole loss at once;
Adam is six lines.

Then the real programs run, from the same random numbers and the same start. Every adapter, moment,
average and logged number that they leave in ckpt.pt, generator_ema.pt, fake.pt and log.jsonl has
to agree. An error that is the same in every run of a program is noticed here, and nowhere else.

Read `stage_1` and `stage_2` beside Algorithm 1 (App. I). Numbers in brackets are the paper's
equations.
"""

import hashlib
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from torch.func import functional_call

import cold_start
import common
import lora
import model
import rewards
import rtdmd_rl
from backbones import StableDiffusion3

TINY = Path(__file__).resolve().parent.parent / "assets/tiny"
LATENT = (4, 16, 16)
RANK = 4
ALPHA = 6
K = 4
# t_0 ... t_K: 1, .75, .5, .25, 0 under the time shift 3t / (1 + 2t)
LEVELS = [1.0, 0.9, 0.75, 0.5, 0.0]
ETA = 0.9
MAX_GRAD_NORM = 1.0
TOLERANCE = 1e-9  # relative; both sides compute in float64, and agree to 4e-14


# -------------------------------------------------------------------------------------------------
# Random numbers: the contract of both programs. Everything random in a step is a function of
# (seed, step); it is drawn for the whole batch, one normal after the other from one generator.


def seeded(*key):
    digest = hashlib.sha256(repr(key).encode()).digest()
    seed = int.from_bytes(digest[:7], "big")
    return torch.Generator().manual_seed(seed)


class Draw:
    def __init__(self, seed, step, n_pictures):
        self.generator = seeded(seed, step)
        self.scalars = random.Random(f"{seed}/{step}")
        self.n_pictures = n_pictures

    def normal(self):
        return torch.randn(self.n_pictures, *LATENT, generator=self.generator)

    def uniform(self):
        return torch.rand(self.n_pictures, generator=self.generator)


def prompts_in_order(prompts, first, count, seed):
    """Passes over all prompts, each shuffled anew; step n continues where step n - 1 stopped."""
    order = []
    passes = 0
    while len(order) < first + count:
        shuffler = random.Random(f"{seed}/pass/{passes}")
        order += shuffler.sample(range(len(prompts)), len(prompts))
        passes += 1
    return [prompts[place] for place in order[first : first + count]]


def noise_of_prompts(prompts, seed, epoch, k):
    """The noise that all pictures of a prompt get on step k -> [B,C,H,W]"""
    noises = []
    for prompt in prompts:
        noises.append(torch.randn(LATENT, generator=seeded(seed, epoch, k, prompt)))
    return torch.stack(noises)


# -------------------------------------------------------------------------------------------------
# The models


class Models:
    """The frozen pipeline, and the velocity of its transformer under any set of adapters."""

    def __init__(self):
        self.pipe = double_pipeline()
        self.empty_text = self.encode([""])

    @torch.no_grad()
    def encode(self, prompts):
        """-> (prompt_embeds [B,L,D], pooled [B,P])"""
        embeds = []
        pooled = []
        for prompt in prompts:
            encoded = self.pipe.encode_prompt(
                prompt,
                None,
                None,
                do_classifier_free_guidance=False,
                max_sequence_length=8,
            )
            embeds.append(encoded[0])
            pooled.append(encoded[2])
        return torch.cat(embeds), torch.cat(pooled)

    def velocity(self, adapters, x, t, text):
        """The base plus each adapter's update alpha / rank B A, at noise level t (float or [B])."""
        weights = {}
        for adapter in adapters:
            for key in adapter:
                if ".lora_A." not in key:
                    continue
                name = key.split(".lora_A.")[0] + ".weight"
                before = weights.get(name, self.pipe.transformer.get_parameter(name))
                A = adapter[key]
                B = adapter[key.replace("lora_A", "lora_B")]
                weights[name] = before + ALPHA / RANK * B @ A
        embeds, pooled = text
        inputs = dict(
            hidden_states=x,
            encoder_hidden_states=embeds.expand(len(x), -1, -1),
            pooled_projections=pooled.expand(len(x), -1),
            timestep=1000 * t * torch.ones(len(x)),
            return_dict=False,
        )
        outputs = functional_call(self.pipe.transformer, weights, (), inputs)
        return outputs[0]

    def guided_velocity(self, x, t, text, cfg):
        """The teacher: the plain base with classifier-free guidance against the empty prompt."""
        with_text = self.velocity([], x, t, text)
        without = self.velocity([], x, t, self.empty_text)
        return without + cfg * (with_text - without)

    def decode(self, latents):
        """-> pictures [B,3,H,W] in [0,1]"""
        config = self.pipe.vae.config
        unscaled = latents / config.scaling_factor + config.shift_factor
        pictures = self.pipe.vae.decode(unscaled).sample  # in [-1,1]
        return (pictures / 2 + 0.5).clamp(0, 1)


def double_pipeline():
    """assets/tiny in float64, with a latent shift that is not nearly 0."""
    pipe = StableDiffusion3Pipeline.from_pretrained(TINY, dtype=torch.float32)
    for block in pipe.transformer.transformer_blocks:
        for attention in (block.attn, block.attn2):
            if attention is not None:
                use_exact_norms(attention)
    encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    for module in (pipe.transformer, pipe.vae, *encoders):
        module.double()
        module.requires_grad_(False)
        module.eval()
    pipe.vae.register_to_config(shift_factor=0.3)
    return pipe


def use_exact_norms(attention):
    """diffusers' RMS norm rounds to float32; torch's, with the same weights, does not."""
    for name, norm in attention.named_children():
        if isinstance(norm, DiffusersRMSNorm):
            exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.eps)
            exact.weight.data = norm.weight.data.clone()
            setattr(attention, name, exact)


class AdamW:
    """The gradient is clipped to MAX_GRAD_NORM first, all parameters together."""

    def __init__(self, parameters, lr, weight_decay=0.0):
        self.parameters = parameters
        self.lr = lr
        self.weight_decay = weight_decay
        self.first = {key: torch.zeros_like(p) for key, p in parameters.items()}
        self.second = {key: torch.zeros_like(p) for key, p in parameters.items()}
        self.updates = 0

    def update(self, loss):
        """Moves the parameters down the gradient of loss -> the gradient's norm."""
        gradients = self.gradients(loss)
        squares = [gradient.square().sum() for gradient in gradients.values()]
        norm = torch.stack(squares).sum().sqrt().item()
        scale = min(1, MAX_GRAD_NORM / (norm + 1e-6))
        self.updates += 1
        for key, gradient in gradients.items():
            g = scale * gradient
            m = self.first[key]
            v = self.second[key]
            p = self.parameters[key].detach()
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            p.mul_(1 - self.lr * self.weight_decay)
            m_hat = m / (1 - 0.9**self.updates)
            v_hat = v / (1 - 0.999**self.updates)
            p.sub_(self.lr * m_hat / (v_hat.sqrt() + 1e-8))
        return norm

    def gradients(self, loss):
        """-> {key: gradient}, 0 for a parameter that the loss does not depend on"""
        parameters = list(self.parameters.values())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = {}
        for (key, p), gradient in zip(self.parameters.items(), found):
            gradients[key] = torch.zeros_like(p) if gradient is None else gradient
        return gradients


# -------------------------------------------------------------------------------------------------
# The equations. A velocity function is v(x, t). Losses are one number a picture, [B].


def column(t):
    """A level as it broadcasts over pictures: a float stays, [B] becomes [B,1,1,1]."""
    if torch.is_tensor(t):
        return t.view(-1, 1, 1, 1)
    return t


def cps(x, v, s, t, noise):
    """A coefficients-preserving step from level s to t (Eq. 19-21) -> (x_t, its mean)"""
    s = column(s)
    t = column(t)
    x0 = x - s * v
    eps = x + (1 - s) * v
    mean = (1 - t) * x0 + t * math.cos(ETA * math.pi / 2) * eps
    std = t * math.sin(ETA * math.pi / 2)
    return mean + std * noise, mean


@torch.no_grad()
def rollout(student, x, k, step_noise):
    """The first k steps from noise x (Eq. 8) -> path, where path[i] is at level t_i"""
    path = [x]
    for i in range(k):
        v = student(path[i], LEVELS[i])
        x_next, _ = cps(path[i], v, LEVELS[i], LEVELS[i + 1], step_noise[i])
        path.append(x_next)
    return path


def renoised(x_s, s, t, noise):
    """x_s at level s, moved up to level t (App. B) -> (x_t, std of the noise added)"""
    t = column(t)
    a = (1 - t) / (1 - s)
    sig = (t**2 - a**2 * s**2).sqrt()
    return a * x_s + sig * noise, sig


def renoise_time(s, u):
    """t ~ U[s + .01, 1], clamped to [.02, .98]; u uniform in [0,1]"""
    lowest = s + 0.01
    return (lowest + u * (1 - lowest)).clamp(0.02, 0.98)


def steps_back(u):
    """How many thousandths below t the consistency looks: U{1..200}; u uniform in [0,1)"""
    return 1 + (200 * u).floor()


def ambient_loss(v, x_s, s, t, sig, noise):
    """Ambient denoising score matching (Eq. 10); v: the fake score's velocity at level t"""
    t = column(t)
    of_noise = (t + (1 - t) * s**2 / (1 - s) ** 2) / sig
    v_target = -x_s / (1 - s) + of_noise * noise  # Eq. 2 with the conditional score -noise / sig
    weight = (1 / sig**2).clamp(0, 10)
    return (weight * (sig * v - sig * v_target) ** 2).mean((1, 2, 3))


def consistency_loss(fake, x_t, v, t, thousandths, noise1, noise2):
    """Consistency between level t and one below it (Eq. 11, 22); v: the velocity fake(x_t, t)"""

    def x0_of(x, t):
        return x - column(t) * fake(x, t)

    t_below = (t - thousandths / 1000).clamp(min=0)
    anchor = x0_of(x_t, t)
    x1, _ = cps(x_t, v.detach(), t, t_below, noise1)
    x2, _ = cps(x_t, v.detach(), t, t_below, noise2)
    drift1 = x0_of(x1, t_below) - anchor
    drift2 = x0_of(x2, t_below) - anchor
    return (drift1 * drift2).mean((1, 2, 3))


def fake_losses(fake, x_s, s, t, thousandths, noise, noise1, noise2):
    """Both terms of Eq. 12 -> (ambient, consistency). fake(x, t): a velocity"""
    x_t, sig = renoised(x_s, s, t, noise)
    v = fake(x_t, t)
    ambient = ambient_loss(v, x_s, s, t, sig, noise)
    consistency = consistency_loss(fake, x_t, v, t, thousandths, noise1, noise2)
    return ambient, consistency


def distribution_matching(x_s, s, t, noise, noise_back, teacher, fake):
    """The distribution-matching term (Eq. 9), where y_real is the teacher's.

    Its gradient with respect to x_s is (y_fake - y_real) / mean |x_s - y_real| / elements.
    """
    with torch.no_grad():
        x_t, _ = renoised(x_s, s, t, noise)
        y_real, _ = cps(x_t, teacher(x_t, t), t, s, noise_back)
        y_fake, _ = cps(x_t, fake(x_t, t), t, s, noise_back)
        size = (x_s - y_real).abs().mean((1, 2, 3), keepdim=True)
        g = (y_fake - y_real) / size
    target = (x_s - g).detach()
    return 0.5 * ((x_s - target) ** 2).mean((1, 2, 3))


def group_advantages(scores, weights, group_size, clip):
    """How much better than its group each picture is (Eq. 14), from scores {reward: [I]} -> [I]

    Each reward is relative to the group's mean, and scaled by the whole batch's deviation.
    """
    total = 0
    for name, score in scores.items():
        group_mean = score.view(-1, group_size).mean(1).repeat_interleave(group_size)
        total = total + weights[name] * (score - group_mean) / (score.std() + 1e-4)
    total = (total - total.mean()) / (total.std() + 1e-4)
    return total.clamp(-clip, clip)


def in_flat_group(advantage, group_size):
    """-> [I], True where a picture's whole group has the advantage 0, but for rounding"""
    grouped = advantage.view(-1, group_size)
    flat = (grouped.abs() < 1e-12).all(1)
    return flat.repeat_interleave(group_size)


# -------------------------------------------------------------------------------------------------
# Algorithm 1, stage 1


def stage_1(models, generator, fake, prompts, flags):
    """Trains the adapters `generator` and `fake`, {key: tensor}, in place.

    -> what there is to compare.
    """
    generator_adam = AdamW(generator, flags.lr)
    fake_adam = AdamW(fake, flags.fake_lr)
    average = {key: p.detach().clone() for key, p in generator.items()}
    n_pictures = flags.batch_size
    log = []
    for step in range(flags.steps):
        draw = Draw(flags.seed, step, n_pictures)
        pictured = prompts_in_order(prompts, step * n_pictures, n_pictures, flags.seed)
        texts = models.encode(pictured)

        def student(x, t):
            return models.velocity([generator], x, t, texts)

        def fake_score(x, t):
            return models.velocity([fake], x, t, texts)

        def teacher(x, t):
            return models.guided_velocity(x, t, texts, flags.cfg)

        # draw a picture, up to a random step k (Eq. 8)
        k = draw.scalars.randint(1, K)
        s = LEVELS[k]
        s_before = LEVELS[k - 1]
        x = draw.normal()
        step_noise = [draw.normal() for _ in range(k)]
        path = rollout(student, x, k, step_noise)

        # the fake score follows the generator (Eq. 10-12)
        t = renoise_time(s, draw.uniform())
        noise = draw.normal()
        thousandths = steps_back(draw.uniform())
        noise1 = draw.normal()
        noise2 = draw.normal()
        ambient, consistency = fake_losses(
            fake_score, path[k], s, t, thousandths, noise, noise1, noise2
        )
        loss_fake = (ambient + flags.gamma * consistency).mean()
        line = dict(
            step=step,
            k=k,
            loss_fake=loss_fake.item(),
            loss_ambient=ambient.mean().item(),
            loss_consistency=consistency.mean().item(),
            grad_fake=fake_adam.update(loss_fake),
        )

        # now and then the generator follows the teacher, through its last step alone (Eq. 9)
        if (step + 1) % flags.generator_every == 0:
            t = renoise_time(s, draw.uniform())
            noise = draw.normal()
            noise_back = draw.normal()
            x_before = path[k - 1]
            v = student(x_before, s_before)
            x_s, _ = cps(x_before, v, s_before, s, step_noise[k - 1])
            losses = distribution_matching(x_s, s, t, noise, noise_back, teacher, fake_score)
            loss_generator = losses.mean()
            line["loss_generator"] = loss_generator.item()
            line["grad_generator"] = generator_adam.update(loss_generator)

        # the average moves every step, whether the generator did or not
        for key, p in generator.items():
            average[key] = flags.ema * average[key] + (1 - flags.ema) * p.detach()
        line["ema_drift"] = drift(generator, average)
        log.append(line)
    return dict(log=log, average=average, generator_adam=generator_adam, fake_adam=fake_adam)


def drift(adapter, average):
    """How far the weights have run from their average, |p - average| / |average|, all together."""
    distance = 0
    size = 0
    for key, p in adapter.items():
        distance = distance + (p.detach() - average[key]).square().sum()
        size = size + average[key].square().sum()
    return (distance / size).sqrt().item()


# -------------------------------------------------------------------------------------------------
# Algorithm 1, stage 2


def stage_2(models, cold_generator, cold_fake, generator, fake, prompts, scorers, flags):
    """Trains `generator` and `fake`, stacked on stage 1's frozen ones.

    scorers: {name: (weight, differentiable, function)} of the rewards.
    """
    generator_adam = AdamW(generator, flags.lr, weight_decay=0.1)
    fake_adam = AdamW(fake, flags.fake_lr)
    average = {key: p.detach().clone() for key, p in generator.items()}
    weights = {name: weight for name, (weight, _, _) in scorers.items()}
    n_prompts = flags.prompts_per_epoch
    n_pictures = n_prompts * flags.group_size
    log = []
    beyond_margin = []
    clipped = []
    for epoch in range(flags.epochs):
        draw = Draw(flags.seed, epoch, n_pictures)
        each = prompts_in_order(prompts, epoch * n_prompts, n_prompts, flags.seed)
        pictured = [prompt for prompt in each for _ in range(flags.group_size)]
        texts = models.encode(pictured)

        def student(x, t):
            return models.velocity([cold_generator, generator], x, t, texts)

        def fake_score(x, t):
            return models.velocity([cold_fake, fake], x, t, texts)

        def teacher(x, t):
            return models.guided_velocity(x, t, texts, flags.cfg)

        # the steps to reinforce (Eq. 16): they explore, each picture with its own noise; on the
        # other stochastic steps all pictures of a prompt get the same noise
        S = sorted(draw.scalars.sample(range(K - 1), flags.subset))
        x = draw.normal()
        step_noise = []
        for k in range(K - 1):
            if k in S:
                step_noise.append(draw.normal())
            else:
                step_noise.append(noise_of_prompts(pictured, flags.seed, epoch, k))
        no_noise = torch.zeros(n_pictures, *LATENT)
        step_noise.append(no_noise)

        # the average moves every few epochs, before the generator does
        if (epoch + 1) % flags.ema_every == 0:
            keep = visible_decay(flags.ema, epoch)
            for key, p in generator.items():
                average[key] = keep * average[key] + (1 - keep) * p.detach()

        # draw the pictures: all K steps
        path = rollout(student, x, K, step_noise)
        with torch.no_grad():
            pictures = models.decode(path[K])

        # the fake score follows, one update on the finished pictures (Eq. 10-12 at s = 0)
        t = renoise_time(0.0, draw.uniform())
        noise = draw.normal()
        thousandths = steps_back(draw.uniform())
        noise1 = draw.normal()
        noise2 = draw.normal()
        ambient, consistency = fake_losses(
            fake_score, path[K], 0.0, t, thousandths, noise, noise1, noise2
        )
        loss_fake = (ambient + flags.gamma * consistency).mean()
        grad_fake = fake_adam.update(loss_fake)

        # rewards, and how much better than the others of its prompt each picture is (Eq. 14)
        scores = {name: score(pictures, pictured) for name, (_, _, score) in scorers.items()}
        advantage = group_advantages(scores, weights, flags.group_size, clip=1.5)
        flat = in_flat_group(advantage, flags.group_size)
        advantage = advantage.where(~flat, 0)
        counted = (advantage != 0).sum()  # pictures whose advantage is 0 are dropped

        # SubGRPO, summed over the steps in S (Eq. 13, 17); one update an epoch: the ratio is 1
        loss_policy = 0
        for k in S:
            v = student(path[k], LEVELS[k])
            _, mean = cps(path[k], v, LEVELS[k], LEVELS[k + 1], 0)
            log_p = -((path[k + 1] - mean) ** 2).mean((1, 2, 3))
            ratio = (log_p - log_p.detach()).exp()
            loss_policy = loss_policy - (advantage * ratio).sum() / counted

        # the last step is deterministic: the rewards' gradient goes through it (Eq. 15); its input
        # is a constant (App. G.2)
        v = student(path[K - 1], LEVELS[K - 1])
        x_0, _ = cps(path[K - 1], v, LEVELS[K - 1], 0.0, 0)
        picture = models.decode(x_0)
        total = 0
        for weight, differentiable, score in scorers.values():
            if differentiable:
                total = total + weight * score(picture, pictured)
        loss_det = (flags.margin - total).clamp(min=0).mean()

        # AC-DMD on the picture that this step makes (Eq. 9 at s = 0)
        t = renoise_time(0.0, draw.uniform())
        noise = draw.normal()
        noise_back = draw.normal()
        losses = distribution_matching(x_0, 0.0, t, noise, noise_back, teacher, fake_score)
        loss_dm = losses.mean()

        def slope(loss):
            """The norm of its gradient at the pictures."""
            (gradient,) = torch.autograd.grad(loss, x_0, retain_graph=True)
            return gradient.norm().item()

        slope_det = slope(flags.det_weight * loss_det)
        slope_dm = slope(flags.dm_weight * loss_dm)

        # all together (Eq. 18)
        loss = (
            flags.policy_weight * loss_policy
            + flags.det_weight * loss_det
            + flags.dm_weight * loss_dm
        )
        grad_generator = generator_adam.update(loss)

        # until it has seen more than the start, the average is the weights
        if epoch + 1 < max(flags.ema_every, 2):
            average = {key: p.detach().clone() for key, p in generator.items()}

        line = dict(
            step=epoch,
            S=S,
            loss_fake=loss_fake.item(),
            loss_policy=loss_policy.item(),
            loss_det=loss_det.item(),
            loss_dm=loss_dm.item(),
            grad_fake=grad_fake,
            grad_generator=grad_generator,
            slope_det=slope_det,
            slope_dm=slope_dm,
            flat_groups=flat.double().mean().item(),
            latent_std=group_std(path[K], flags.group_size),
            drift_max=0.0,
            drift_clipped=0.0,
            ema_drift=drift(generator, average),
        )
        for name, score in scores.items():
            line[f"reward_{name}"] = score.mean().item()
        log.append(line)
        beyond_margin.append((total > flags.margin).double().mean().item())
        clipped.append((advantage.abs() == 1.5).double().mean().item())
    return dict(
        log=log,
        average=average,
        generator_adam=generator_adam,
        fake_adam=fake_adam,
        beyond_margin=beyond_margin,
        clipped=clipped,
    )


def visible_decay(decay, updates):
    """In the place of rtdmd_rl.average_decay, which in the first epochs keeps next to nothing.

    That function has a test of its own (test_training.py).
    """
    return decay * (1 + updates) / (3 + updates)


def group_std(latents, group_size):
    """Standard deviation within a prompt's pictures, mean over prompts and elements."""
    groups = latents.view(-1, group_size, *LATENT)
    return groups.std(1, correction=0).mean().item()


# -------------------------------------------------------------------------------------------------
# The programs, from the same start


def a_start(transformer, name, seed):
    """An adapter in the midst of its training: neither A nor B is 0, so that no gradient is."""
    generator = torch.Generator().manual_seed(seed)
    start = {}
    for key, p in lora.adapter(transformer, name).items():
        start[key] = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return start


def run(program, flags, out_dir, monkeypatch, constants=None):
    """Runs a program's main() in float64 -> (its adapters at the start, its checkpoint, its log)

    constants {(module, name): value}: what is no flag, and is not to be hidden behind its usual
    value.
    """
    starts = {}
    real_add_adapter = lora.add_adapter

    def add_adapter(transformer, name, *rest):
        real_add_adapter(transformer, name, *rest)
        starts[name] = a_start(transformer, name, seed=len(starts))
        for key, p in lora.adapter(transformer, name).items():
            p.data = starts[name][key].clone()

    def load_pipeline(pretrained, device):
        pipe = double_pipeline()
        pipe.transformer.lora_layers = []
        return StableDiffusion3, pipe

    words = ["--preset", "tiny", "--device", "cpu", "--sample_every", 0, "--out_dir", out_dir]
    for name, value in vars(flags).items():
        words += [f"--{name}", value]
    with monkeypatch.context() as patch:
        patch.setattr(model, "add_adapter", add_adapter)
        patch.setattr(model, "load_pipeline", load_pipeline)
        for (module, constant), value in (constants or {}).items():
            patch.setattr(module, constant, value)
        patch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, words)])
        program.main()
    checkpoint = read(out_dir / "ckpt.pt")
    lines = (out_dir / "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    return starts, checkpoint, log


def read(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def trained(start):
    return {key: p.clone().requires_grad_() for key, p in start.items()}


def frozen(adapter):
    return {key: p.detach() for key, p in adapter.items()}


@pytest.fixture(scope="module")
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def models(float64):
    return Models()


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a circle\na red square\ntwo triangles\na blue circle and a red square\n")
    return path


@pytest.fixture(scope="module")
def monkey():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def first(models, prompt_file, tmp_path_factory, monkey):
    """Six steps of stage 1, by the program and by the oracle.

    With this seed k takes all four values.
    """
    flags = SimpleNamespace(
        steps=6,
        generator_every=2,
        batch_size=3,
        micro_batch=2,
        lr=1e-3,
        fake_lr=2e-3,
        ema=0.8,
        cfg=3.0,
        gamma=0.5,
        seed=39,
        lora_rank=RANK,
        lora_alpha=ALPHA,
        prompts=prompt_file,
    )
    out_dir = tmp_path_factory.mktemp("first") / "out"
    starts, checkpoint, log = run(cold_start, flags, out_dir, monkey)
    adapters = {name: trained(start) for name, start in starts.items()}
    prompts = prompt_file.read_text().splitlines()
    oracle = stage_1(models, adapters["generator"], adapters["fake"], prompts, flags)
    return SimpleNamespace(
        out_dir=out_dir, checkpoint=checkpoint, log=log, oracle=oracle, **adapters
    )


def brightness(pictures, prompts):
    """A differentiable reward; all pictures of one prompt score alike under both rewards."""
    score = 4 * pictures.square().mean((1, 2, 3))
    flat = torch.tensor([prompt == "two triangles" for prompt in prompts])
    return score.where(~flat, 2.5)


def redness(pictures, prompts):
    """A reward without a gradient."""
    red = pictures.detach()[:, 0].mean((1, 2))
    blue = pictures.detach()[:, 2].mean((1, 2))
    score = red - blue
    flat = torch.tensor([prompt == "two triangles" for prompt in prompts])
    return score.where(~flat, 0.0)


SCORERS = {  # (weight, differentiable, function)
    "brightness": (0.7, True, brightness),
    "redness": (2.0, False, redness),
}


def as_loader(score, differentiable):
    """A reward's function in the form in which rewards.py has it."""
    known = []  # prompts; what is read of one is its place

    def read(prompts, metadata):
        known.extend(prompts)
        return torch.arange(len(known) - len(prompts), len(known))

    def look(images, places):
        return score(images, [known[place] for place in places])

    def reward(images, prompts, metadata):
        return score(images, prompts)

    def load(path, device, dtype, clip_l):
        return rewards.in_two_parts(look, [], read) if differentiable else reward

    return load


@pytest.fixture(scope="module")
def second(models, first, prompt_file, tmp_path_factory, monkey):
    """Four epochs of stage 2 on what stage 1 left.

    Every term is on; one group of pictures is all alike.
    """
    for name, (_, differentiable, score) in SCORERS.items():
        monkey.setitem(
            rewards.REWARDS, name, (as_loader(score, differentiable), differentiable, "")
        )
    flags = SimpleNamespace(
        epochs=4,
        prompts_per_epoch=3,
        group_size=3,
        micro_batch=2,
        lr=1e-3,
        fake_lr=2e-3,
        ema=0.95,
        ema_every=2,
        subset=2,
        policy_weight=0.8,
        det_weight=0.3,
        dm_weight=0.6,
        margin=2.33,
        cfg=3.0,
        gamma=0.5,
        seed=7,
        lora_rank=RANK,
        lora_alpha=ALPHA,
        prompts=prompt_file,
        rewards=",".join(f"{name}:{weight}" for name, (weight, _, _) in SCORERS.items()),
        cold_start=first.out_dir,
    )
    out_dir = tmp_path_factory.mktemp("second") / "out"
    monkey.setattr(rtdmd_rl, "average_decay", visible_decay)
    constants = {(rtdmd_rl, "WEIGHT_DECAY"): 0.1, (rtdmd_rl, "ADVANTAGE_CLIP"): 1.5}
    starts, checkpoint, log = run(rtdmd_rl, flags, out_dir, monkey, constants)
    adapters = {name: trained(starts[name]) for name in ("generator", "fake")}
    oracle = stage_2(
        models,
        cold_generator=frozen(first.oracle["average"]),
        cold_fake=frozen(first.fake),
        generator=adapters["generator"],
        fake=adapters["fake"],
        prompts=prompt_file.read_text().splitlines(),
        scorers=SCORERS,
        flags=flags,
    )
    return SimpleNamespace(
        out_dir=out_dir, checkpoint=checkpoint, log=log, oracle=oracle, flags=flags, **adapters
    )


# -------------------------------------------------------------------------------------------------
# Comparisons


def compare(found, expected, what):
    """Each tensor to TOLERANCE of its own size.

    found: tensors in the order of expected's keys, a list or one flat one.
    """
    if torch.is_tensor(found):
        parts = found.split([wanted.numel() for wanted in expected.values()])
        found = [part.view_as(wanted) for part, wanted in zip(parts, expected.values())]
    assert len(found) == len(expected)
    for (key, wanted), tensor in zip(expected.items(), found):
        wanted = wanted.detach()
        size = wanted.norm().clamp(min=1e-12)
        error = (tensor - wanted).norm() / size
        assert error < TOLERANCE, f"{what} {key}: relative error {error:.1e}"


def moments(checkpoint, optimiser, name):
    (state,) = checkpoint[optimiser]["state"].values()
    return state[name]


STAGES = ["first", "second"]


@pytest.fixture(params=STAGES, ids=["stage 1", "stage 2"])
def stage(request):
    return request.getfixturevalue(request.param)


def test_the_fake_scores_gradient(stage):
    """Adam's first moment is the clipped gradients' average: after these steps it agrees."""
    found = moments(stage.checkpoint, "F_opt", "exp_avg")
    compare(found, stage.oracle["fake_adam"].first, "moment")


def test_the_generators_gradient(stage):
    found = moments(stage.checkpoint, "G_opt", "exp_avg")
    compare(found, stage.oracle["generator_adam"].first, "moment")


def test_the_squared_gradients(stage):
    of_fake = moments(stage.checkpoint, "F_opt", "exp_avg_sq")
    compare(of_fake, stage.oracle["fake_adam"].second, "moment")
    of_generator = moments(stage.checkpoint, "G_opt", "exp_avg_sq")
    compare(of_generator, stage.oracle["generator_adam"].second, "moment")


def test_the_fake_scores_adapter(stage):
    compare(stage.checkpoint["fake"], stage.fake, "adapter")


def test_the_generators_adapter(stage):
    compare(stage.checkpoint["generator"], stage.generator, "adapter")


def test_the_average(stage):
    compare(stage.checkpoint["ema"], stage.oracle["average"], "average")


def test_files_hold_what_their_names_say(stage):
    average = read(stage.out_dir / "generator_ema.pt")
    expected = stage.oracle["average"]
    compare([average[key] for key in expected], expected, "generator_ema.pt")
    fake = read(stage.out_dir / "fake.pt")
    compare([fake[key] for key in stage.fake], stage.fake, "fake.pt")


def test_the_log(stage):
    times = {"seconds", "images_per_s", "skipped"}
    for line, expected in zip(stage.log, stage.oracle["log"], strict=True):
        parts = {name for name in line if name.startswith("s_")}
        assert set(line) - times - parts == set(expected)
        for name, wanted in expected.items():
            # loss_policy sums advantages that cancel: what is left is rounding
            assert line[name] == pytest.approx(wanted, rel=1e-7, abs=1e-9), (line["step"], name)


def test_the_two_stages_exercise_what_they_are_meant_to(first, second):
    """Else an agreement would say nothing of it."""
    assert {line["k"] for line in first.log} == {1, 2, 3, 4}
    assert len({tuple(line["S"]) for line in second.log}) > 1
    assert any(line["flat_groups"] > 0 for line in second.log)
    assert second.log[-1]["ema_drift"] > 1e-3  # the average has been an average of two things
    assert any(0 < share < 1 for share in second.oracle["beyond_margin"])
    assert any(0 < share < 1 for share in second.oracle["clipped"])
    for line in second.oracle["log"]:
        assert min(line["slope_det"], line["slope_dm"], line["grad_generator"]) > 1e-6


# -------------------------------------------------------------------------------------------------
# The terms of Eq. 18 add up, with the release's weights


@pytest.fixture(scope="module")
def gradient_with(second, tmp_path_factory, monkey):
    """-> a function from the three terms' weights to the generator's first gradient, flat"""

    def gradient(policy_weight, dm_weight, det_weight):
        flags = SimpleNamespace(**vars(second.flags))
        flags.epochs = 1
        flags.policy_weight = policy_weight
        flags.dm_weight = dm_weight
        flags.det_weight = det_weight
        out_dir = tmp_path_factory.mktemp("weights") / "out"
        not_clipped = {(common, "MAX_GRAD_NORM"): 1e9}
        _, checkpoint, _ = run(rtdmd_rl, flags, out_dir, monkey, not_clipped)
        first_moments = moments(checkpoint, "G_opt", "exp_avg")
        return 10 * torch.cat([moment.flatten() for moment in first_moments])

    return gradient


def test_the_three_terms_add_up_with_the_releases_weights(gradient_with):
    """The policy's terms, summed over S, against 1e-3 AC-DMD and 1e-4 back-propagation."""
    together = gradient_with(1.0, 1e-3, 1e-4)
    policy = gradient_with(1.0, 0.0, 0.0)
    dm = gradient_with(0.0, 1.0, 0.0)
    det = gradient_with(0.0, 0.0, 1.0)
    assert min(policy.norm(), dm.norm(), det.norm()) > 1e-3
    error = together - (policy + 1e-3 * dm + 1e-4 * det)
    assert error.norm() < 1e-9 * together.norm()
    assert error.norm() < 1e-6 * (1e-4 * det).norm()  # so that the smallest term is seen, too


def test_these_weights_are_the_defaults(monkeypatch):
    cold_start_of_nobody = Path(__file__).parent / "nothing.pt"

    def find_weights(*_, **__):
        return str(cold_start_of_nobody)

    monkeypatch.setattr(rtdmd_rl, "find_weights", find_weights)
    monkeypatch.setattr(sys, "argv", ["rtdmd_rl.py"])
    args = rtdmd_rl.arguments()
    assert (args.policy_weight, args.dm_weight, args.det_weight) == (1.0, 1e-3, 1e-4)
