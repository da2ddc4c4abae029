"""The Gaussian world, in which everything in the paper is computable.

Data are N(MEAN, COV) in two dimensions, shaped [B,1,1,2] so that the functions under test run
unchanged. The generator's velocities are linear in x, so every marginal is Gaussian and its
velocity is known.

`exact_normals` are a few dozen points with EXACTLY the mean and covariance of independent normals:
what is quadratic in them has its exact expectation as the mean over the points. Most tests
therefore need no Monte Carlo and hold to 1e-9; where sampling is needed, the tolerance is 5
standard errors.

A "field" is the pair (A, b) of a linear velocity A x + b. A "world" is the triple (s, mean,
covariance): what x_s at noise level s is distributed like.
"""

import math

import torch

from cps import rollout, sigmas

# ---- tensors -------------------------------------------------------------------------------------
D = 2  # dimensions
K = 4  # steps of the generator
LEVELS = sigmas()  # 1, .9, .75, .5, 0
ETAS = (0, 0.5, 0.9, 1)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def full(value, like):
    """The value, once for each sample of `like` -> [B]."""
    return torch.full((len(like),), value, dtype=torch.float64)


def close(a, b, tolerance=1e-9):
    return torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def over_samples(t):
    """A level as it broadcasts over [B,1,1,D]: a float stays, [B] becomes [B,1,1,1]."""
    if torch.is_tensor(t):
        return t.view(-1, 1, 1, 1)
    return t


# ---- linear velocities ---------------------------------------------------------------------------
def linear(field):
    """(A, b) -> the velocity A x + b."""
    A, b = field

    def v(x, t=None):
        return x @ A.mT + b

    return v


def pack(field):
    """(A, b) -> [6] parameters."""
    return torch.cat([part.flatten() for part in field])


def unpack(theta):
    """[6] parameters -> (A, b).

    Or [B,6], a copy for each sample, so that .grad holds per-sample gradients.
    """
    A = theta[..., : D * D].unflatten(-1, (D, D))
    b = theta[..., D * D :]
    if theta.dim() == 2:
        return A[:, None], b[:, None, None]
    return A, b


ZERO = torch.zeros(6).double()


# ---- normal samples ------------------------------------------------------------------------------
def exact_normals(n):
    """n tensors [2nD,1,1,D], jointly the points +-sqrt(nD) e_i of nD dimensions.

    Their mean is 0, their covariance exactly I.
    """
    axes = torch.eye(n * D)
    points = torch.cat([axes, -axes])
    z = (n * D) ** 0.5 * points.double()
    return list(z.view(-1, n, 1, 1, D).unbind(1))


def normals(n, B, seed=0):
    """n tensors [B,1,1,D] of random normals."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(n, B, 1, 1, D, generator=rng, dtype=torch.float64)
    return list(z.unbind(0))


def moments(x):
    """Mean and covariance of samples."""
    mean = x.mean(0)
    centred = (x - mean).flatten(1)
    return mean.flatten(), centred.T @ centred / len(x)


# ---- the data, and what is known of a world ------------------------------------------------------
EYE = torch.eye(D).double()
MEAN = f64(0.8, -0.5)
COV = f64([0.6, 0.25], [0.25, 0.3])

DATA = (0.0, MEAN, COV)  # the world of the data


def marginal(world, t):
    """Mean and covariance at level t >= s (float or [B]).

    They are those of (1-t)/(1-s) x_s, plus noise until its total is t^2.
    """
    s, mean, cov = world
    t = over_samples(t)
    a = (1 - t) / (1 - s)
    sig_squared = t**2 - a**2 * s**2
    return a * mean, a**2 * cov + sig_squared * EYE


def exact_field(world, t):
    """(A, b) of the exact velocity A x + b at t.

    It is the score -P (x - mean) of the marginal, P the inverse of its covariance, through Eq. 2.
    """
    highest = 1 - 1e-7
    t = t.clamp(max=highest) if torch.is_tensor(t) else min(t, highest)
    mean, cov = marginal(world, t)
    P = torch.linalg.inv(cov)
    t = over_samples(t)
    A = (t * P - EYE) / (1 - t)
    b = -t / (1 - t) * (mean @ P)
    return A, b


def velocity(world):
    """The world's exact velocity v(x, t)."""

    def v(x, t):
        return linear(exact_field(world, t))(x)

    return v


def rms_error(field, world, t):
    """Relative root-mean-square error of a linear field as the world's velocity at t."""
    mean, cov = marginal(world, t)
    A, b = field
    exact_A, exact_b = exact_field(world, t)

    def mean_square(A, b):
        """E|A x + b|^2"""
        of_spread = (A @ cov * A).sum()
        of_mean = (A @ mean + b).square().sum()
        return (of_spread + of_mean).item()

    error = mean_square(A - exact_A, b - exact_b)
    return math.sqrt(error / mean_square(exact_A, exact_b))


# ---- the student ---------------------------------------------------------------------------------
def student_field(s):
    """The data's velocity plus an error, so that student and teacher differ at every level."""
    A, b = exact_field(DATA, s)
    error_of_A = f64([0.15, -0.1], [0.2, 0.1])
    error_of_b = f64(0.2, 0.1)
    return A + error_of_A, b + error_of_b


STUDENT = {s: student_field(s) for s in LEVELS[:-1]}


def generator_with(theta, fields=STUDENT):
    """v_G(x, s): the fields above plus theta.

    All steps share theta, as they share a network's weights.
    """
    more_A, more_b = unpack(theta)

    def v_G(x, s):
        A, b = fields[s]
        return linear((A + more_A, b + more_b))(x)

    return v_G


def student_at(k, eta, extra):
    """The student after k steps -> (path, world, more).

    path: its exact samples [x_0, ..., x_k]. world: what they are distributed like at s = t_k. more:
    `extra` exact normals besides those that the steps used.
    """
    z = exact_normals(k + 1 + extra)
    noises = z[1 : k + 1]
    path = rollout(generator_with(ZERO), z[0], LEVELS, k, eta, noises)
    world = (LEVELS[k], *moments(path[k]))
    return path, world, z[k + 1 :]
