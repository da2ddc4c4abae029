"""What makes training fast changes no result: micro-batches, shares, roll-outs used again, the decoder's order of sums."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel

import cold_start
import common
import cps
import rtdmd_rl
import text
from common import StepRandom, even_part, micro_batch, shard
from helpers import (
    BASE,
    COLD,
    CPU,
    RL,
    flags_of,
    flat,
    good,
    here,
    load,
    log_of,
    same_files,
    tiny_base,
)
from pictures import quicken


def normals(count, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 4, 16, 16, generator=g) for _ in range(count)]


# ---- the decoder
def test_a_quickened_decoder_gives_the_same_pictures_and_gradients():
    """float64; channels' means far apart within a group, and pictures that are not square."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
    )
    vae = vae.double().eval()
    for p in vae.parameters():
        p.data += 0.05 * torch.randn_like(p)
    quick = copy.deepcopy(vae)
    quicken(quick)
    changed = [type(module).__name__ for module in quick.decoder.modules()]
    assert "GroupNorm" not in changed
    assert "Upsample2D" not in changed
    found = []
    for model in (vae, quick):
        z = torch.randn(2, 16, 6, 8, generator=torch.Generator().manual_seed(1)).double()
        z.requires_grad_()
        picture = model.decode(z).sample
        (gradient,) = torch.autograd.grad(picture.square().sum(), z)
        found.append((picture, gradient))
    (plain, plain_gradient), (fast, fast_gradient) = found
    assert (plain - fast).abs().max() < 1e-10 * plain.std()
    assert (plain_gradient - fast_gradient).abs().max() < 1e-10 * plain_gradient.std()


# ---- the weights in one tensor
def test_matrices_and_gradients_are_views_of_the_flat_ones():
    base = tiny_base()
    for name in ("generator", "fake"):
        base.add_adapter(name, 4, 8, 0)
    before = flat(base.adapter("fake"))
    _, weights = base.train_only("generator", "fake")
    assert torch.equal(weights.detach(), before)
    circle = base.encode(["a red circle"])
    (x,) = normals(1, 1)
    base.velocity(["fake"], circle)(x, 0.5).square().sum().backward()
    gradients = [p.grad for p in base.adapter("fake").values()]
    assert torch.equal(weights.grad, flat(gradients))
    assert weights.grad.any()
    weights.data += 1
    assert torch.equal(flat(base.adapter("fake")), before + 1)


# ---- micro-batches
@pytest.mark.parametrize(
    "n, most, size",
    [(9, 20, 9), (9, 9, 9), (9, 5, 3), (9, 8, 8), (16, 9, 8), (72, 10, 9), (7, 3, 3), (7, 1, 1)],
)
def test_micro_batches_are_even_where_a_divisor_is_near(n, most, size):
    assert even_part(n, most) == size


@pytest.mark.parametrize("gib, expected", [(80, 12), (48, 12), (24, 6), (8, 1)])
def test_a_gpu_takes_as_many_as_it_holds(gib, expected, monkeypatch, capsys):
    """A machine is played on which a pass takes 1 GiB and 2.5 more a picture: .9 of what is free is used."""
    peak = SimpleNamespace(bytes=0)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak.bytes)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gib * 2**30 * 3 // 4, gib * 2**30))

    torch.backends.cuda.enable_cudnn_sdp(True)

    def passes(n):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        peak.bytes = (5 + 1) * 2**30 + n * 5 * 2**29

    assert micro_batch(0, 12, torch.device("cuda"), passes) == expected
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert f"micro-batches of {expected} pictures: each takes 2.5 GiB" in capsys.readouterr().out
    assert 1 + 2.5 * expected <= max(0.9 * gib * 3 / 4, 3.5)


def attention_gradient(n, contiguous):
    """d(attention)/d(q) [n,2,64,128] in bf16 on the GPU, for an output's gradient of one of two layouts."""
    g = torch.Generator("cuda").manual_seed(0)
    shape = (n, 64, 2, 128)
    leaves = [torch.randn(shape, generator=g, device="cuda").bfloat16() for _ in range(4)]
    q, k, v, gradient = (leaf.transpose(1, 2) for leaf in leaves)
    q.requires_grad_()
    if contiguous:
        gradient = gradient.contiguous()
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return torch.autograd.grad(output, q, gradient)[0].float()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN's attention")
def test_on_a_gpu_the_tried_passes_leave_no_plan_of_cudnns_to_the_compiled_ones():
    """PyTorch finds such plans without the layout of the output's gradient, and reads another wrongly."""
    micro_batch(0, 4, torch.device("cuda"), lambda n: attention_gradient(n, contiguous=True))
    with sdpa_kernel(SDPBackend.MATH):
        truth = attention_gradient(2, contiguous=False)
    assert (attention_gradient(2, contiguous=False) - truth).norm() < 0.02 * truth.norm()


def test_what_is_asked_for_is_taken_and_no_pass_is_tried():
    def never(n):
        raise AssertionError

    assert micro_batch(5, 12, torch.device("cuda"), never) == 5
    assert micro_batch(0, 12, CPU, never) == common.ON_A_CPU
    assert micro_batch(0, 2, CPU, never) == 2
    assert micro_batch(0, 0, torch.device("cuda"), never) == 1  # a process without pictures


@pytest.mark.parametrize("program, flags", [(cold_start, COLD), (rtdmd_rl, RL)])
def test_trying_how_many_fit_leaves_no_gradient(program, flags, run, tmp_path):
    """On a machine that would try them, the first update is that of one that does not."""

    def tries(asked, n_mine, device, passes):
        passes(2)
        return asked

    flags = [*flags, "--cold_start", run.cold] if program is rtdmd_rl else flags
    good(here(program, *flags, "--out_dir", tmp_path / "tried", micro_batch=tries))
    good(here(program, *flags, "--out_dir", tmp_path / "plain"))
    assert same_files(tmp_path / "tried", tmp_path / "plain")


# ---- consistency on a share of the pictures
def drawn(step, n, rows=None, seed=0):
    return StepRandom(seed, step, n, rows or slice(0, n), (4, 2, 2), CPU)


def test_every_picture_is_in_the_share_as_often():
    counts = Counter()
    steps = 3000
    for step in range(steps):
        (places,) = drawn(step, 8).some(0.3, [slice(0, 8)])
        counts.update(places.tolist())
        assert len(places) in (2, 3)  # .3 x 8 = 2.4
    for place in range(8):
        assert abs(counts[place] / steps - 0.3) < 4 * (0.3 * 0.7 / steps) ** 0.5


def test_a_third_of_nine_is_three_and_all_is_all():
    for step in range(200):
        (places,) = drawn(step, 9).some(1 / 3, [slice(0, 9)])
        assert len(places) == 3
        halves = drawn(step, 9).some(1.0, [slice(0, 5), slice(5, 10)])
        assert [places.tolist() for places in halves] == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]


def test_the_share_is_the_same_on_any_number_of_ranks():
    for step in range(50):
        (whole,) = drawn(step, 10).some(0.4, [slice(0, 10)])
        found = []
        for rank in range(3):
            rows = shard(10, rank, 3)
            n_mine = rows.stop - rows.start
            for b in (slice(0, 2), slice(2, 4)):
                (places,) = drawn(step, 10, rows).some(0.4, [b]) if b.start < n_mine else ([],)
                found += [rows.start + b.start + int(place) for place in places]
        assert found == whole.tolist()


def test_the_mean_over_all_shares_is_the_whole_gradient():
    """A third each, which together are everything: the mean of the three estimates is exact."""
    base = tiny_base()
    base.add_adapter("fake", 8, 16, 0)
    for p in base.adapter("fake").values():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    (weights,) = base.train_only("fake")
    prompts = base.encode(["a red circle", "two squares", "a blue triangle"])
    x_s, noise, noise1, noise2 = normals(4, 3)
    s, t = torch.full((3,), 0.5), torch.tensor([0.6, 0.8, 0.95])
    back = torch.tensor([0.02, 0.1, 0.2])
    inputs = (x_s, s, s - 0.5, t, noise, back, noise1, noise2, 5.0, 0.9)

    def gradient(*share):
        losses, _, consistency = cold_start.fake_score_loss(
            base.velocity(["fake"], prompts), *inputs, *share
        )
        weights.grad.zero_()
        losses.sum().backward()
        return weights.grad.clone(), consistency.sum().detach()

    whole, total = gradient()
    some = [gradient(torch.tensor([place]), 1 / 3) for place in (0, 1, 2)]
    mean = torch.stack([g for g, _ in some]).mean(0)
    assert (mean - whole).norm() < 1e-5 * whole.norm()
    assert torch.stack([c for _, c in some]).mean() == pytest.approx(total.item(), rel=1e-5)
    assert (some[0][0] - whole).norm() > 1e-3 * whole.norm()
    all_of_them, _ = gradient(torch.arange(3), 1.0)
    assert torch.equal(all_of_them, whole)
    ambient_alone, _ = gradient(torch.tensor([], dtype=torch.long), 1 / 3)
    assert (ambient_alone - whole).norm() > 1e-3 * whole.norm()


def test_some_rows_of_the_text_belong_to_some_pictures():
    base = tiny_base()
    v = base.velocity([], base.encode(["a red circle", "two squares", "a blue triangle"]))
    (x,) = normals(1, 3)
    sigma = torch.tensor([0.3, 0.5, 0.9])
    rows = torch.tensor([2, 0])
    assert torch.allclose(v(x[rows], sigma[rows], rows), v(x, sigma)[rows], atol=1e-5)


# ---- roll-outs used again
def blocks(args, steps):
    """{first step of a roll-out: [(step, k)]}"""
    found = {}
    for step in range(steps):
        first, k = cold_start.state_of_a_rollout(step, args)
        found.setdefault(first, []).append((step, k))
    return found


def test_a_rollout_serves_different_states_until_the_generator_changes():
    args = SimpleNamespace(seed=1, generator_every=10, num_steps=4)
    found = blocks(args, 400)
    assert list(found)[:4] == [0, 4, 8, 10]
    for first, uses in found.items():
        steps, states = zip(*uses)
        assert steps == tuple(range(first, first + len(steps)))
        assert first // 10 == steps[-1] // 10  # the generator changes after steps 9, 19, ...
        assert len(set(states)) == len(states)
    counts = Counter(k for uses in found.values() for _, k in uses[-1:])
    assert set(counts) == {1, 2, 3, 4}


def test_every_state_is_as_likely_at_every_step():
    for step in (0, 3, 9):
        counts = Counter()
        for seed in range(4000):
            args = SimpleNamespace(seed=seed, generator_every=10, num_steps=4)
            counts[cold_start.state_of_a_rollout(step, args)[1]] += 1
        for k in (1, 2, 3, 4):
            assert abs(counts[k] / 4000 - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


REUSE = [*BASE, "--batch_size", 3, "--micro_batch", 2, "--generator_every", 6, "--reuse_rollouts"]


def test_what_is_used_again_is_the_state_that_a_rollout_of_that_step_gives(tmp_path):
    """x_s, its level and its prompts, at each of six steps: two roll-outs. The generator stays 0."""
    paths, seen = [], []
    real_rollout, real_loss = cps.rollout, cold_start.fake_score_loss

    def rollout(*inputs):
        paths.append(real_rollout(*inputs))
        return paths[-1]

    def loss(fake, x_s, s, *rest):
        seen.append((x_s.clone(), s[0].item()))
        return real_loss(fake, x_s, s, *rest)

    flags = [*REUSE, "--steps", 6, "--out_dir", tmp_path]
    good(here(cold_start, *flags, rollout=rollout, fake_score_loss=loss, preview=None))
    assert len(paths) == 4  # two roll-outs of two micro-batches each
    levels = cps.sigmas(4, 3.0)
    for step, line in enumerate(log_of(tmp_path)):
        k = line["k"]
        for b in (0, 1):
            x_s, level = seen[2 * step + b]
            assert level == pytest.approx(levels[k])
            assert torch.equal(x_s, paths[2 * (step >= 4) + b][k])


def test_a_run_that_stops_amid_a_rollout_goes_on_to_the_same_bytes(tmp_path):
    flags = [*REUSE, "--steps", 8, "--save_every", 2, "--consistency_share", "1/3"]
    good(here(cold_start, *flags, "--out_dir", tmp_path / "whole"))
    for stop in (2, 6, 7):
        out = tmp_path / f"cut{stop}"
        calls = []
        real = cold_start.fake_score_loss

        def stopped(*inputs):
            calls.append(inputs)
            if len(calls) > 2 * stop:  # two micro-batches a step
                raise KeyboardInterrupt
            return real(*inputs)

        with pytest.raises(KeyboardInterrupt):
            here(cold_start, *flags, "--out_dir", out, fake_score_loss=stopped)
        assert load(out / "ckpt.pt")["step"] == stop - stop % 2
        good(here(cold_start, *flags, "--out_dir", out))
        assert same_files(tmp_path / "whole", out)


def test_both_shortcuts_change_the_run_and_are_off_by_default(run, tmp_path):
    assert flags_of(cold_start)["consistency_share"] == 1
    assert flags_of(rtdmd_rl, "--cold_start", str(run.cold))["consistency_share"] == 1
    assert not flags_of(cold_start)["reuse_rollouts"]
    for name, flags in (("share", ["--consistency_share", "1/3"]), ("reuse", ["--reuse_rollouts"])):
        good(here(cold_start, *COLD, *flags, "--out_dir", tmp_path / name))
        assert not same_files(run.cold, tmp_path / name)
    flags = [*RL, "--cold_start", run.cold, "--consistency_share", 0.5]
    good(here(rtdmd_rl, *flags, "--out_dir", tmp_path / "rl"))
    assert not same_files(run.rl, tmp_path / "rl")


@pytest.mark.parametrize("words", ["0", "1.1", "1/0", "nan", "half", "-1/3", "1/3/3"])
def test_a_share_that_is_none_is_refused(words):
    status, _, err = here(cold_start, f"--consistency_share={words}")
    assert status == 2
    assert "is no share like .25 or 1/4" in err


def test_dmd2_and_used_rollouts_exclude_each_other():
    status, _, err = here(cold_start, "--reuse_rollouts", "--variant", "dmd2", "--gamma", 0)
    assert status == 2
    assert "dmd2" in err


# ---- start-up
def test_compiled_code_is_kept_where_it_survives(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    common.keep_compiled_code()
    assert f"will be in {tmp_path}/compiled" in capsys.readouterr().out
    assert common.os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "code").touch()
    common.keep_compiled_code()
    assert f"compiled code is in {tmp_path};" in capsys.readouterr().out


def test_the_order_of_a_rollouts_states_is_random():
    orders = set()
    for seed in range(200):
        args = SimpleNamespace(seed=seed, generator_every=4, num_steps=4)
        orders.add(tuple(cold_start.state_of_a_rollout(step, args)[1] for step in range(4)))
    assert len(orders) == 24


# ---- texts
def test_the_last_texts_are_kept_by_their_size(monkeypatch):
    """A prompt is 4 numbers and 2: 24 bytes; 60 bytes hold two."""
    read = []

    def encode(prompts):
        read.extend(prompts)
        ids = torch.tensor([float(prompt) for prompt in prompts])
        return ids.view(-1, 1, 1).expand(-1, 2, 2), -ids.view(-1, 1).expand(-1, 2)

    monkeypatch.setattr(text, "KEPT_BYTES", 60)
    encoder = text.TextEncoder(encode, CPU)
    embeds, pooled = encoder(["1", "2", "1"])
    assert embeds[:, 0, 0].tolist() == [1, 2, 1]
    assert pooled[:, 1].tolist() == [-1, -2, -1]
    assert list(encoder.cache) == ["1", "2"]
    encoder(["3", "2"])
    assert list(encoder.cache) == ["2", "3"]
    many, _ = encoder(["4", "5", "6", "7"])  # more at once than are kept
    assert many[:, 1, 1].tolist() == [4, 5, 6, 7]
    assert list(encoder.cache) == ["6", "7"]
    assert read == ["1", "2", "3", "4", "5", "6", "7"]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_table_holds_texts_of_any_number_of_tensors(parts, tmp_path, capsys):
    """Pooled text is not a matter of course: some models have none."""

    def encode(prompts):
        ids = torch.tensor([float(len(prompt)) for prompt in prompts])
        shapes = [(3, 2), (5,), (1, 1, 2)][:parts]
        sizes = [(len(prompts), *shape) for shape in shapes]
        return tuple(
            i + ids.view(-1, *[1] * (len(size) - 1)).expand(size) for i, size in enumerate(sizes)
        )

    prompts = ["a", "bb", "a", "dddd"]
    table = text.TextTable(encode, CPU, prompts, str(tmp_path / "text.bin"))
    assert "4 texts take 0.00 GB" in capsys.readouterr().out  # three and the empty one
    for found, expected in zip(table(["dddd", "", "a"]), encode(["dddd", "", "a"]), strict=True):
        assert torch.equal(found, expected)
