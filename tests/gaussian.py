"""The Gaussian world, in which everything in the paper is computable: data are N(MEAN, COV) in two dimensions, shaped
[B,1,1,2] so that the functions under test run unchanged, and the generator's velocities are linear in x, so every
marginal is Gaussian and its velocity is known.

`exact_normals` are a few dozen points with EXACTLY the mean and covariance of independent normals: what is quadratic in
them has its exact expectation as the mean over the points. Most tests therefore need no Monte Carlo and hold to 1e-9;
where sampling is needed, the tolerance is 5 standard errors.
"""

import math

import torch

from cps import rollout, sigmas

# ------------------------------------------------------------------------------------------------------- the Gaussian world
D, K, LEVELS, ETAS = 2, 4, sigmas(), (0, 0.5, 0.9, 1)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def full(value, like):
    return torch.full((len(like),), value, dtype=torch.float64)


def close(a, b, tolerance=1e-9):
    return torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def linear(field):
    """(A, b) -> the velocity A x + b."""
    return lambda x, t=None: x @ field[0].mT + field[1]


def pack(field):
    return torch.cat([part.flatten() for part in field])


EYE, MEAN, COV = torch.eye(D).double(), f64(0.8, -0.5), f64([0.6, 0.25], [0.25, 0.3])

DATA = (
    0.0,
    MEAN,
    COV,
)  # a "world" (s, mean, covariance): what x_s at noise level s is distributed like


def exact_normals(n):
    """n tensors [2nD,1,1,D], jointly the points +-sqrt(nD) e_i of nD dimensions: mean 0, covariance exactly I."""
    z = (n * D) ** 0.5 * torch.cat([torch.eye(n * D), -torch.eye(n * D)]).double()
    return list(z.view(-1, n, 1, 1, D).unbind(1))


def normals(n, B, seed=0):
    return list(
        torch.randn(
            n, B, 1, 1, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ).unbind(0)
    )


def moments(x):
    centred = (x - x.mean(0)).flatten(1)
    return x.mean(0).flatten(), centred.T @ centred / len(x)


def marginal(world, t):
    """Mean and covariance at level t >= s (float or [B]): (1-t)/(1-s) x_s, plus noise until its total is t^2."""
    s, mean, cov = world
    t = t.view(-1, 1, 1, 1) if torch.is_tensor(t) else t
    a = (1 - t) / (1 - s)
    return a * mean, a**2 * cov + (t**2 - a**2 * s**2) * EYE


def exact_field(world, t):
    """(A, b) of the exact velocity A x + b at t: the score -P (x - mean) of the marginal, through Eq. 2."""
    t = t.clamp(max=1 - 1e-7) if torch.is_tensor(t) else min(t, 1 - 1e-7)
    mean, cov = marginal(world, t)
    P, t = torch.linalg.inv(cov), t.view(-1, 1, 1, 1) if torch.is_tensor(t) else t
    return (t * P - EYE) / (1 - t), -t / (1 - t) * (mean @ P)


def velocity(world):
    return lambda x, t: linear(exact_field(world, t))(x)


def unpack(theta):
    """[6] parameters -> (A, b); or [B,6], a copy for each sample, so that .grad holds per-sample gradients."""
    A, b = theta[..., : D * D].unflatten(-1, (D, D)), theta[..., D * D :]
    return (A[:, None], b[:, None, None]) if theta.dim() == 2 else (A, b)


def rms_error(field, world, t):
    """Relative root-mean-square error of a linear field as the world's velocity at t."""
    (mean, cov), exact = marginal(world, t), exact_field(world, t)

    def square(A, b):
        return ((A @ cov * A).sum() + (A @ mean + b).square().sum()).item()

    return math.sqrt(square(field[0] - exact[0], field[1] - exact[1]) / square(*exact))


# The generator has the data's velocity plus an error at every level, so that student and teacher differ.
STUDENT = {
    s: tuple(
        p + q for p, q in zip(exact_field(DATA, s), (f64([0.15, -0.1], [0.2, 0.1]), f64(0.2, 0.1)))
    )
    for s in LEVELS[:-1]
}

ZERO = torch.zeros(6).double()


def generator_with(theta, fields=STUDENT):
    """v_G(x, s): the fields above plus theta, which all steps share as they share a network's weights."""
    A, b = unpack(theta)
    return lambda x, s: linear((fields[s][0] + A, fields[s][1] + b))(x)


def student_at(k, eta, extra):
    """-> the student's exact path [x_0, ..., x_k], its world at s = t_k, and `extra` more exact normals."""
    z = exact_normals(k + 1 + extra)
    path = rollout(generator_with(ZERO), z[0], LEVELS, k, eta, z[1 : k + 1])
    return path, (LEVELS[k], *moments(path[k])), z[k + 1 :]
