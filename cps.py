"""The mathematics of the sampler: rectified flow, CPS steps, the sub-interval kernel and its target.

Notation, as in the paper (Sec. 2): x_t = (1-t) x0 + t eps, t in [0,1], t = 1 is noise, velocity
v = eps - x0, and the model is given the timestep 1000 t. diffusers calls t "sigma", and so do we.
From a velocity: x0 = x_t - t v, eps = x_t + (1-t) v.

Everything here is done in float32 (float64 stays float64), whatever dtype the model's output has. Any
sigma may be a float or a [B] tensor, one value a sample. Read from top to bottom: the mathematics,
then the same as a diffusers scheduler. No model in sight.
"""

import math

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,  # noqa: F401, diffusers looks for it here, see CPSScheduler
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.functional import pixel_unshuffle


def sigmas(num_steps=4, shift=3.0):
    """Noise levels t_0..t_K of a K-step sampler: an even grid from 1, SD3's time shift, and 0.

    The shift t -> 3t/(1+2t) is applied ONCE: sigmas() is [1.0, 0.9, 0.75, 0.5, 0.0]. (A scheduler
    that is given these as `sigmas=` shifts them again, and diffusers' own grid for 4 steps is [1,
    .858, .602, .009]: sampling or training at such times is the common bug of few-step SD3 code.)
    Raises ValueError if num_steps < 1 or shift <= 0.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"sigmas needs num_steps >= 1 and shift > 0, got {num_steps} and {shift}")
    levels = []
    for k in range(num_steps):
        t = 1 - k / num_steps
        levels.append(shifted(t, shift))
    return [*levels, 0.0]


def shifted(t, shift):
    """A time of an even grid, moved towards the noise by the time shift."""
    return shift * t / (1 + (shift - 1) * t)


def at_least_float32(x):
    """bf16 and fp16 tensors become float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_sample(sigma, x):
    """A float or [B] tensor -> a tensor that broadcasts over x [B,...], of x's dtype and device."""
    if not torch.is_tensor(sigma):
        # made where it is needed: a copy from the host would stall a GPU
        return torch.full((), sigma, dtype=x.dtype, device=x.device)
    sigma = sigma.to(x.device, x.dtype)
    if sigma.dim() == 0:
        return sigma
    return sigma.view(-1, *[1] * (x.dim() - 1))


def cps_step(x, v, sigma, sigma_next, eta, noise=None):
    """One coefficients-preserving step from noise level sigma to t = sigma_next (Eq. 19-21, App. C).

        mean = (1-t) x0 + t cos(eta pi/2) eps,    std = t sin(eta pi/2),    x_next = mean + std noise

    -> (x_next, mean, std). x, v [B,...]; noise like x (drawn here if None); eta in [0,1]: 0 is an
    Euler step, 1 the consistency-model sampler, the paper uses 0.9. Signal and noise coefficients stay
    on schedule for every eta: cos^2 + sin^2 = 1, so Var(x_next | x0) = t^2. At sigma_next = 0 the step
    is deterministic: std = 0 and x_next = mean = x0. std broadcasts over x. Raises ValueError if eta
    is not in [0,1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    x = at_least_float32(x)
    v = at_least_float32(v)
    s = per_sample(sigma, x)
    t = per_sample(sigma_next, x)
    x0 = x - s * v
    eps = x + (1 - s) * v
    mean = (1 - t) * x0 + t * math.cos(eta * math.pi / 2) * eps
    std = t * math.sin(eta * math.pi / 2)
    noise = torch.randn_like(x) if noise is None else at_least_float32(noise)
    return mean + std * noise, mean, std


def renoise(x_s, sigma_s, sigma_t, noise):
    """From x_s at noise level s up to t > s inside the sub-interval [s, 1] (Eq. 10); shapes [B,...].

        x_t = a x_s + sig n,    a = (1-t)/(1-s),    sig^2 = t^2 - a^2 s^2

    so that x_t has the marginal of level t whenever x_s has that of level s. (With App. B's printed
    sig = (t-s)/(1-s) it has not: see the variant printed_std, and the test of the Gaussian world.)
    s = 0 gives (1-t) x0 + t n: ordinary re-noising, ordinary DMD2.
    """
    x_s = at_least_float32(x_s)
    s = per_sample(sigma_s, x_s)
    t = per_sample(sigma_t, x_s)
    a, sig = sub_interval(s, t)
    return a * x_s + sig * at_least_float32(noise)


def sub_interval(s, t):
    """Coefficients (a, sig) of the kernel x_s -> x_t.

    sig^2 = (t - a s)(t + a s), where t - a s = (t-s)/(1-s): no cancellation.
    """
    a = (1 - t) / (1 - s)
    return a, ((t - s) / (1 - s) * (t + a * s)).clamp(min=0).sqrt()


def ambient_target(x_s, sigma_s, sigma_t, noise):
    """The velocity target of ambient denoising score matching -> (v_target like x_s, sig).

    sig broadcasts over x_s. The conditional score of the kernel above is -n/sig. Put into
    v(x,t) = -x/(1-t) - t/(1-t) score (Eq. 2) it reads

        v* = -x_s/(1-s) + (t - sig^2)/((1-t) sig) n

    and E[v* | x_t] is the student's velocity at t (Prop. D.1). s = 0 gives n - x0. It grows like 1/sig
    as t -> s, which is why the loss multiplies it by sig; it is finite for every t > s. With the exact
    sig, (t - sig^2)/(1-t) = t + (1-t) s^2/(1-s)^2.
    """
    x_s = at_least_float32(x_s)
    s = per_sample(sigma_s, x_s)
    t = per_sample(sigma_t, x_s)
    _, sig = sub_interval(s, t)
    sig = sig.clamp(min=torch.finfo(x_s.dtype).tiny ** 0.25)
    of_noise = (t - sig**2) / (1 - t) / sig
    return -x_s / (1 - s) + of_noise * at_least_float32(noise), sig


def log_prob(x_next, mean, std):
    """Log-density of x_next under a CPS step, as the release has it: [B,...] -> [B].

    -mean (x_next - mean)^2: averaged over the elements, and without the Gaussian's 1/(2 std^2) of
    Eq. 13, for which std would be needed (the variant gaussian_log_prob).
    """
    square = (at_least_float32(x_next) - at_least_float32(mean)).square()
    return -square.flatten(1).mean(1)


def rollout(velocity, x, levels, k, eta, noises):
    """The first k CPS steps from noise x (Eq. 8) -> path; path[0] is x, path[i] is at level levels[i].

    velocity(x [B,...], sigma float) -> like x. noises: one tensor like x for each step. Gradients
    follow torch's grad mode.
    """
    path = [x]
    for s, t, noise in zip(levels[:k], levels[1:], noises):
        x, _, _ = cps_step(path[-1], velocity(path[-1], s), s, t, eta, noise)
        path.append(x)
    return path


default_sigmas = sigmas  # below, the name is an argument of diffusers' interface


class CPSScheduler(FlowMatchEulerDiscreteScheduler):
    """The sampler for any diffusers flow-matching pipeline.

        pipe.scheduler = CPSScheduler.from_config(pipe.scheduler.config, eta=0.9)

    or, while loading,

        scheduler = CPSScheduler.from_pretrained(DIR, subfolder="scheduler", eta=0.9)
        pipe = DiffusionPipeline.from_pretrained(DIR, scheduler=scheduler)

    Pipelines do not hand their generator to `step`. Put it (one, or a list with one an image) into
    `scheduler.generator` to get the same images as sample.py's own loop; else the noise comes from
    torch's global generator. FLUX's pipelines step on tokens [B,T,C'], whose shape does not say how
    the picture lies. `scheduler.latent_shape`, (C, h, w) of a picture's latents, does: the noise is
    drawn like them, which is our loop's order, and packed into tokens. Left at None it is drawn in the
    tokens' order: of the same seeds other images than ours.

    `sigmas=` are taken as they are, but for those that come with `mu`, as FLUX's pipelines give them:
    these are an even grid, shifted here by mu where it is the picture's size that counts
    (`use_dynamic_shifting`), else by the config's own shift. A pipeline saved with this scheduler
    loads where cps is imported.
    """

    # Where one of these is on in a model's config, its grid is another one: a ValueError.
    NOT_OURS = (
        "shift_terminal",
        "invert_sigmas",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
    )

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 3.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int | None = 256,
        max_image_seq_len: int | None = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        eta: float = 0.9,
    ):
        for name in self.NOT_OURS:
            if self.config[name]:
                raise ValueError(f"CPSScheduler has no {name}, which this model's scheduler has")
        given = {name: value for name, value in self.config.items() if name[0] != "_"}
        del given["eta"]
        super().__init__(**given)
        self.generator = None
        self.latent_shape = None

    @classmethod
    def _get_compatibles(cls):
        """Of diffusers' mixin, which knows diffusers' own classes alone."""
        return [cls]

    def set_timesteps(
        self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None
    ):
        """Noise levels: `sigmas` as given (ending in 0 or not), or `timesteps`, 1000 times as large.

        Else ours for num_inference_steps. They are shifted by mu if the config says so: then that is
        the one shift. sigmas that come with a mu which the config has no use for are shifted as it
        says. Raises ValueError where the arguments contradict each other, where levels do not fall
        from at most 1.
        """
        if sigmas is not None and timesteps is not None:
            raise ValueError("give sigmas or timesteps, not both")
        dynamic = mu is not None and self.config.use_dynamic_shifting
        if timesteps is not None:
            sigmas = [t / self.config.num_train_timesteps for t in timesteps]
        elif sigmas is None:
            if num_inference_steps is None:
                raise ValueError("give num_inference_steps, sigmas or timesteps")
            sigmas = default_sigmas(num_inference_steps, 1 if dynamic else self.config.shift)
        elif mu is not None and not dynamic:
            # FLUX's pipelines always give an even grid, and mu whether the model is shifted by it or not
            sigmas = [shifted(sigma, self.config.shift) for sigma in sigmas]
        levels = [float(sigma) for sigma in sigmas if sigma > 0]
        if num_inference_steps not in (None, len(levels)):
            raise ValueError(f"{num_inference_steps} steps, but {len(levels)} levels above 0")
        falls = all(above > below for above, below in zip(levels, levels[1:]))
        if not levels or levels[0] > 1 or not falls:
            raise ValueError(f"noise levels must fall from at most 1, got {levels}")
        if dynamic:
            levels = [self.time_shift(mu, 1.0, sigma) for sigma in levels]
        self.num_inference_steps = len(levels)
        self.sigmas = torch.tensor([*levels, 0.0])
        timesteps = [sigma * self.config.num_train_timesteps for sigma in levels]
        self.timesteps = torch.tensor(timesteps, device=device)
        self._step_index = self._begin_index = None

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **unused):
        """One CPS step; arithmetic in float32, result in model_output's dtype.

        Raises ValueError where the sample is not tokens of latents of `latent_shape`.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        here = self.sigmas[self.step_index].item()
        there = self.sigmas[self.step_index + 1].item()
        noise = torch.zeros_like(sample)
        if there > 0 and self.config.eta > 0:
            noise = self.noise_like(sample, generator or self.generator)
        x, _, _ = cps_step(sample, model_output, here, there, self.config.eta, noise)
        x = x.to(model_output.dtype)
        self._step_index += 1
        if not return_dict:
            return (x,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x)

    def noise_like(self, sample, generator):
        """Float32 noise of the sample's shape; drawn in the order of the latents where that is known."""
        if self.latent_shape is None:
            return randn_tensor(sample.shape, generator, sample.device, torch.float32)
        shape = (len(sample), *self.latent_shape)
        noise = randn_tensor(shape, generator, sample.device, torch.float32)
        return as_tokens(noise, sample.shape)


def as_tokens(latents, shape):
    """[B,C,h,w] -> [B,T,C'] of this shape: a token's channels are a square of h w / T places.

    Raises ValueError where that is not the shape of such tokens.
    """
    count, channels, height, width = latents.shape
    side = max(1, math.isqrt(height * width // shape[1]))
    tokens = (count, height * width // side**2, channels * side**2)
    if height % side or width % side or tuple(shape) != tokens:
        raise ValueError(
            f"latents of shape {channels} x {height} x {width} are no tokens {list(shape[1:])}: "
            "latent_shape is (C, h, w) of a picture of the pipeline's size"
        )
    return pixel_unshuffle(latents, side).flatten(2).transpose(1, 2)
