"""The release's recipe where it shows in numbers.

The start of the adapters, their average, bf16.
"""

import shutil
import sys

import pytest
import torch
from diffusers import SD3Transformer2DModel

import cold_start
import common
import rtdmd_rl
from helpers import load, tiny_base
from lora import adapter, add_adapter

SMALL = ["--preset", "tiny", "--device", "cpu", "--sample_every", 0, "--micro_batch", 4]
COLD = [*SMALL, "--steps", 2, "--batch_size", 4, "--generator_every", 1]
RL = [*SMALL, "--prompts_per_epoch", 2, "--group_size", 2]


def run(program, out_dir, *flags):
    """A program's main() in this process -> its out_dir"""
    words = [f"{program.__name__}.py", *flags, "--out_dir", out_dir]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in words])
        program.main()
    return out_dir


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    return run(cold_start, tmp_path_factory.mktemp("cold") / "out", *COLD)


# ---- the start of a fresh adapter ----------------------------------------------------------------
def std_of_A(weights):
    matrices = [matrix.flatten() for key, matrix in weights.items() if ".lora_A." in key]
    return torch.cat(matrices).std().item()


def test_the_saved_files_of_stage_2_have_A_of_standard_deviation_1(cold, tmp_path):
    out_dir = run(rtdmd_rl, tmp_path / "out", *RL, "--cold_start", cold, "--epochs", 1)
    for name in ("generator_ema.pt", "fake.pt"):
        assert 0.98 < std_of_A(load(out_dir / name)) < 1.02


def test_the_saved_files_of_stage_1_have_A_of_standard_deviation_1_over_rank(cold):
    for name in ("generator_ema.pt", "fake.pt"):
        assert 0.98 < 32 * std_of_A(load(cold / name)) < 1.02


def small_transformer():
    return SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=2,
        out_channels=2,
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=64,
        pooled_projection_dim=8,
        pos_embed_max_size=4,
    )


def first_named(weights, name):
    """The first matrix whose key contains this name."""
    return next(matrix for key, matrix in weights.items() if name in key)


def test_under_adam_the_weights_move_in_proportion_to_the_start_of_A():
    """B moves by lr an update whatever its gradient's size, so dW = alpha / rank B A grows like A.

    The loss is linear in dW, <C, B A>: the two starts see the same gradient of the weights.
    """
    moved = {}
    for std in (1 / 32, 1.0):
        transformer = small_transformer()
        add_adapter(transformer, "fresh", 8, 16, 0, std)
        weights = adapter(transformer, "fresh")
        A = first_named(weights, "to_q.lora_A")
        B = first_named(weights, "to_q.lora_B")
        A.requires_grad_(False)
        B.requires_grad_(True)
        rng = torch.Generator().manual_seed(0)
        C = torch.randn(B.shape[0], A.shape[1], generator=rng)
        optimizer = torch.optim.AdamW([B], lr=3e-6, weight_decay=0)
        for _ in range(100):
            optimizer.zero_grad()
            loss = (C * (B @ A)).sum()
            loss.backward()
            optimizer.step()
        moved[std] = (2 * B @ A).norm().item()
    assert moved[1.0] == pytest.approx(32 * moved[1 / 32], rel=1e-3)


def test_the_new_adapters_alpha_is_not_stage_1s(cold, tmp_path):
    """Files that do not say their alpha, as the published ones, have 64.

    That holds whatever alpha the new adapters have.
    """
    for name in ("generator_ema.pt", "fake.pt"):
        shutil.copy(cold / name, tmp_path)
    base = tiny_base()
    rtdmd_rl.load_stage_1(base, str(tmp_path))
    for name in ("cold_generator", "cold_fake"):
        assert base.transformer.peft_config[name].lora_alpha == 64


# ---- constants that no flag changes --------------------------------------------------------------
def test_the_optimisers_have_the_releases_weight_decay(cold, tmp_path):
    """It is 1e-4 for stage 2's generator and 0 for all others.

    Gradients are clipped to norm 1.
    """
    rl = run(rtdmd_rl, tmp_path / "out", *RL, "--cold_start", cold, "--epochs", 1)
    found = []
    for out_dir in (cold, rl):
        checkpoint = load(out_dir / "ckpt.pt")
        for optimizer in ("G_opt", "F_opt"):
            (group,) = checkpoint[optimizer]["param_groups"]
            found.append(group["weight_decay"])
    assert found == [0, 0, 1e-4, 0]
    assert common.MAX_GRAD_NORM == 1


# ---- stage 2's average ---------------------------------------------------------------------------
def test_the_average_lags_by_its_closed_form_behind_a_linear_drift():
    """Weights that move by 1 an epoch.

    Every 8 epochs, before the epoch's update, the average keeps d = .9^16 of itself. Behind the
    weights that it sees it lags by L = d (L + 8), i.e. 8 d / (1 - d). Behind the weights after the
    update it lags by one more.
    """
    weights = 0.0
    average = 0.0
    for epoch in range(1000):
        if (epoch + 1) % 8 == 0:
            decay = rtdmd_rl.average_decay(0.9, epoch)
            average = decay * average + (1 - decay) * weights
        weights += 1
    lag = weights - average
    d = 0.9**16
    assert lag == pytest.approx(8 * d / (1 - d) + 1, rel=1e-6)
    assert lag == pytest.approx(2.8, abs=0.05)


@pytest.mark.parametrize(
    "updates, of_one_call",
    [
        (0, 1 / 10),
        (8, 9 / 18),
        (80, 81 / 90),
        (81, 0.9),
    ],
)
def test_the_averages_decay_warms_up_with_the_optimisers_updates(updates, of_one_call):
    assert rtdmd_rl.average_decay(0.9, updates) == pytest.approx(of_one_call**16)


@pytest.mark.parametrize(
    "ema_every, epochs",
    [
        (1, 1),
        (1, 2),
        (8, 1),
        (8, 7),
        (8, 8),
    ],
)
def test_no_run_is_so_short_that_zeros_are_saved(cold, tmp_path, ema_every, epochs):
    flags = ["--cold_start", cold, "--epochs", epochs, "--ema_every", ema_every]
    out_dir = run(rtdmd_rl, tmp_path / "out", *RL, *flags)
    saved = load(out_dir / "generator_ema.pt")
    assert max(matrix.abs().max() for key, matrix in saved.items() if ".lora_B." in key) > 0


def test_a_run_too_short_for_its_average_saves_its_weights(cold, tmp_path):
    flags = ["--cold_start", cold, "--epochs", 3, "--ema_every", 8]
    out_dir = run(rtdmd_rl, tmp_path / "out", *RL, *flags)
    saved = load(out_dir / "generator_ema.pt").values()
    weights = load(out_dir / "ckpt.pt")["generator"]
    assert all(torch.equal(a, b) for a, b in zip(saved, weights, strict=True))


# ---- why adapters are float32, and not bf16 as in the release ------------------------------------
@pytest.mark.parametrize("stage", ["cold", "rl"])
def test_adapters_average_and_moments_are_all_float32(cold, tmp_path, stage):
    out_dir = cold
    if stage == "rl":
        out_dir = run(rtdmd_rl, tmp_path / "out", *RL, "--cold_start", cold, "--epochs", 1)
    checkpoint = load(out_dir / "ckpt.pt")
    tensors = [*checkpoint["generator"], *checkpoint["fake"], *checkpoint["ema"]]
    for optimizer in ("G_opt", "F_opt"):
        for state in checkpoint[optimizer]["state"].values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
    saved = load(out_dir / "generator_ema.pt").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert {tensor.dtype for tensor in saved} == {torch.float32}


def test_a_bfloat16_weight_stops_where_an_update_is_half_of_its_step():
    """At lr 3e-6 B climbs to 2^-10 = .00098 and no further.

    Above it a step of bf16 is 2^-17 = 7.6e-6, and an update of less than half of that is rounded
    away. float32 climbs on.
    """
    reached = {}
    for dtype in (torch.bfloat16, torch.float32):
        B = torch.zeros(1, dtype=dtype, requires_grad=True)
        B.grad = torch.ones_like(B)
        optimizer = torch.optim.AdamW([B], lr=3e-6, weight_decay=0)
        for _ in range(1000):
            optimizer.step()
        reached[dtype] = -B.item()
    assert reached[torch.bfloat16] == 2**-10
    assert reached[torch.float32] == pytest.approx(3e-3, rel=1e-3)
