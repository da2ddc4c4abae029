"""Where the paper's letter, or an ablation, differs from the release's recipe.

A variant is a function with the arguments of the one that it replaces, and mostly its name. `--variant
NAME,...` puts it in that one's place when a stage starts (`swap`); --paper chooses those that the paper
prints. The stage files themselves know the default alone. The names are in VARIANTS, at the end.
"""

import torch

from common import die
from cps import at_least_float32, per_sample, renoise


# ---- both stages ---------------------------------------------------------------------------------
def sub_interval(s, t):
    """App. B's printed kernel x_s -> x_t: std (t-s)/(1-s).

    It gives the wrong marginal and a biased fake score. The fake score's target is then Eq. 2 of this
    kernel's score.
    """
    return (1 - t) / (1 - s), (t - s) / (1 - s)


def consistency_path(fake, x_s, s, s_next, x_t, v_t, t, back):
    """The consistency between the generator's own levels (Sec. 3.1): t' = t_k and t'' = t_{k+1}.

    Read as from the generator's own state x_{t_k} to its next level, 0 where that state is a picture.
    """
    t_k = torch.zeros_like(t) + s
    t_next = torch.zeros_like(t) + s_next
    return x_s, fake(x_s, t_k), t_k, t_next


def generator_loss(x_s, s, t, noise, noise_back, teacher, fake, eta):
    """The gradient of the KL divergence itself (Eq. 9) -> [B].

    (score_fake - score_teacher)(x_t) dx_t/dx_s, which adds up over the elements, as log pi does.
    """
    with torch.no_grad():
        x_t = renoise(x_s, s, t, noise)
        v_teacher = teacher(x_t, t)
        v_fake = fake(x_t, t)
        a = per_sample((1 - t) / (1 - s), x_t)
        t = per_sample(t, x_t)
        # score = -(x + (1-t) v) / t, Eq. 2
        difference = a * (1 - t) / t * (v_teacher - v_fake)
        target = x_s - difference
    return 0.5 * (x_s - target).square().flatten(1).sum(1)


# ---- stage 1 -------------------------------------------------------------------------------------
def step_weight(s):
    """1 / (1-s)^2, which makes the four steps' gradients alike in size; the paper has no such weight.

    A step to level s moves x_s by only 1-s of what it changes of x0, and that factor enters twice.
    """
    return 1 / (1 - s) ** 2


def executed_levels(levels, k):
    """DMD2: the last executed step goes to level 0, whichever it is (give --gamma 0, too)."""
    return [*levels[:k], 0.0]


# ---- stage 2 -------------------------------------------------------------------------------------
def log_prob(x_next, mean, std):
    """The Gaussian's log-density up to a constant (Eq. 13): -||x_next - mean||^2 / (2 std^2) -> [B]."""
    square = (at_least_float32(x_next) - at_least_float32(mean)).square()
    variance = torch.as_tensor(std) ** 2
    return -(square / (2 * variance)).flatten(1).sum(1)


def weighed_sum(centred, scores, weights):
    """Each reward over its own group's standard deviation, and no more (Eq. 14) -> [B]."""
    spread = scores.view(centred.shape).std(2, keepdim=True)
    return (weights * centred / (spread + 1e-4)).sum(0).flatten()


def subset_weight(K, M):
    """(K-1)/M times the sum over the subset: in expectation the sum over all K-1 steps (Eq. 17)."""
    return (K - 1) / M


def anchor_step(draw, K):
    """One step drawn for each epoch, as in stage 1: the paper's Eq. 9 is an expectation over steps."""
    return draw.scalars.randint(1, K)


def old_log_prob(log_p, log_p_of_rollout):
    """The rollout's, as in the release's code, where rounding gets clipped."""
    return log_p_of_rollout


def shared_noise(draw, prompts, *key):
    """Not shared: every picture has its own."""
    return draw.normal()


# ---- choosing ------------------------------------------------------------------------------------
VARIANTS = {  # name: (what it replaces, by what, the stages that have it)
    "printed_std": ("sub_interval", sub_interval, (1, 2)),
    "step_consistency": ("consistency_path", consistency_path, (1, 2)),
    "score_gradient": ("generator_loss", generator_loss, (1, 2)),
    "step_weight": ("step_weight", step_weight, (1,)),
    "dmd2": ("executed_levels", executed_levels, (1,)),
    "gaussian_log_prob": ("log_prob", log_prob, (2,)),
    "group_std": ("weighed_sum", weighed_sum, (2,)),
    "subset_factor": ("subset_weight", subset_weight, (2,)),
    "drawn_step": ("anchor_step", anchor_step, (2,)),
    "rollout_log_prob": ("old_log_prob", old_log_prob, (2,)),
    "free_noise": ("shared_noise", shared_noise, (2,)),
}


def swap(names, stage, *namespaces):
    """Put the named variants in the place of what they replace.

    names: separated by commas. namespaces: of the modules that call these functions by name. Dies at
    a name that is unknown, of the other stage, or without effect.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if {"step_weight", "score_gradient"} <= set(chosen):
        die("--variant: step_weight has no effect on score_gradient, leave one of them out")
    known = [name for name, (_, _, stages) in VARIANTS.items() if stage in stages]
    chosen_for = {}  # {what is replaced: the variant that does}
    for name in chosen:
        if name not in known:
            die(f"--variant {name}: stage {stage} knows {', '.join(known)}")
        replaced, function, _ = VARIANTS[name]
        if chosen_for.setdefault(replaced, name) != name:
            die(
                f"--variant: {chosen_for[replaced]} and {name} both replace {replaced}, leave one out"
            )
        if replaced == "sigmas":
            die(f"--variant {name}: sample.py needs the same levels, change cps.sigmas itself")
        places = [space for space in namespaces if replaced in space]
        if not places:
            die(f"--variant {name}: stage {stage} calls no function {replaced} by name")
        for place in places:
            place[replaced] = function
