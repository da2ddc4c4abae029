"""What makes training fast changes no result.

Micro-batches, shares, roll-outs used again, the decoder's order of sums.
"""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.models.activations import GELU
from torch.nn.attention import SDPBackend, sdpa_kernel

import cold_start
import common
import cps
import lora
import rtdmd_rl
import sample
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
    on_a_gpu,
    randomise,
    same_files,
    small_transformer,
    tiny_base,
    watch_text,
)
from model import BaseModel, GeluInProduct, fuse_gelu
from pictures import COMPILER, as_saved, quicken, read_picture, save_pictures

GIB = 2**30
THREE_PROMPTS = ["a red circle", "two squares", "a blue triangle"]


def normals(count, n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 4, 16, 16, generator=rng) for _ in range(count)]


def std_of_share(probability, draws):
    """The standard deviation of how often an event of this probability is seen in so many draws."""
    return (probability * (1 - probability) / draws) ** 0.5


# ---- the decoder ---------------------------------------------------------------------------------
def test_a_quickened_decoder_gives_the_same_pictures_and_gradients():
    """Both decoders compute in float64.

    The channels' means lie far apart within a group, and the pictures are not square.
    """
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
    )
    vae = vae.double().eval()
    for parameter in vae.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    quick = copy.deepcopy(vae)
    quicken(quick)
    changed = [type(module).__name__ for module in quick.decoder.modules()]
    assert "GroupNorm" not in changed
    assert "Upsample2D" not in changed

    def picture_and_gradient(model):
        rng = torch.Generator().manual_seed(1)
        z = torch.randn(2, 16, 6, 8, generator=rng).double()
        z.requires_grad_()
        picture = model.decode(z).sample
        (gradient,) = torch.autograd.grad(picture.square().sum(), z)
        return picture, gradient

    plain, plain_gradient = picture_and_gradient(vae)
    fast, fast_gradient = picture_and_gradient(quick)
    assert (plain - fast).abs().max() < 1e-10 * plain.std()
    assert (plain_gradient - fast_gradient).abs().max() < 1e-10 * plain_gradient.std()


def test_the_compiler_gets_the_quickened_decoder_and_bounds_that_it_knows(monkeypatch):
    """It would refuse others, but on a GPU and in the middle of a run."""
    asked = {}

    def noted(self, **options):
        asked[type(self).__name__] = options

    monkeypatch.setattr(torch.nn.Module, "compile", noted)
    base = tiny_base(compile=True)
    norms = [type(module).__name__ for module in base.pipe.vae.decoder.modules()]
    assert "ChannelsLastNorm" in norms
    assert asked["Decoder"] == {"dynamic": False, "options": COMPILER}
    for name, bound in COMPILER.items():
        default = getattr(torch._inductor.config, name)
        assert default is None or bound > default


# ---- pictures' files -----------------------------------------------------------------------------
def test_pictures_that_are_saved_together_have_each_its_own_file_and_text(tmp_path):
    pictures = torch.rand(9, 3, 64, 48).mul(255).round() / 255
    paths = [f"{tmp_path}/{i}.png" for i in range(7)]  # the last two fill a recorded pass
    texts = [{"prompt": f"number {i}"} for i in range(7)]
    save_pictures(pictures, paths, texts)
    for picture, path, expected in zip(pictures, paths, texts):
        found, its_text = read_picture(path)
        assert torch.equal(found, picture)
        assert its_text == expected
    assert len(list(tmp_path.iterdir())) == 7


def files_give_back(pictures, folder):
    """Whether files of these pictures give back what `as_saved` says, which is on the CPU."""
    saved = as_saved(pictures)
    path = f"{folder}/0.png"
    save_pictures(saved, [path], [{}])
    found, _ = read_picture(path)
    return torch.equal(found, saved[0])


def all_values(device):
    """A picture [1,3,1,1531] with the 256 values that a PNG has, and five between each two."""
    values = torch.linspace(0, 1, 6 * 255 + 1, device=device)
    return values.expand(1, 3, 1, -1)


def test_a_picture_is_to_the_last_bit_what_its_file_gives_back(tmp_path):
    assert files_give_back(all_values("cpu"), tmp_path)


def test_a_picture_is_rounded_to_the_nearest_value_of_a_file():
    pictures = all_values("cpu")
    assert (as_saved(pictures) - pictures).abs().max() < 0.5 / 255 + 1e-6


@on_a_gpu
def test_on_a_gpu_a_picture_is_to_the_last_bit_what_its_file_gives_back(tmp_path):
    """There a division by 255 has another last bit."""
    assert files_give_back(all_values("cuda"), tmp_path)


# ---- GELU within a product -----------------------------------------------------------------------
def plain_and_fused(device="cpu", dtype=torch.float32):
    """-> (diffusers' W x + bias with GELU, its fused copy, an x [2,7,32] for both)"""
    torch.manual_seed(0)
    plain = GELU(32, 64, approximate="tanh").to(device, dtype)
    fused = copy.deepcopy(plain)
    fuse_gelu(torch.nn.Sequential(fused))
    assert type(fused) is GeluInProduct
    x = 3 * torch.randn(2, 7, 32, device=device)
    return plain, fused, x


@torch.no_grad()
def test_gelu_within_the_product_is_that_after_it():
    """On a CPU PyTorch has the exact GELU there, from which the one by tanh differs by up to .0005."""
    plain, fused, x = plain_and_fused()
    assert (fused(x) - F.gelu(plain.proj(x))).abs().max() < 1e-5
    assert (fused(x) - plain(x)).abs().max() < 0.0005


@on_a_gpu
@torch.no_grad()
def test_on_a_gpu_gelu_within_the_product_is_the_one_by_tanh():
    plain, fused, x = plain_and_fused("cuda")
    assert (fused(x) - plain(x)).abs().max() < 0.0001


@torch.no_grad()
def test_gelu_within_the_product_is_in_the_weights_dtype():
    """On a GPU the norm before it gives float32, and the base is in bf16."""
    plain, fused, x = plain_and_fused(dtype=torch.bfloat16)
    expected = plain(x.bfloat16())
    found = fused(x)
    assert found.dtype == expected.dtype
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_with_a_gradient_gelu_comes_after_the_product():
    plain, fused, x = plain_and_fused()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    (found,) = torch.autograd.grad(fused(x).square().sum(), x)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_an_adapter_before_gelu_adds_to_the_product(monkeypatch):
    """Our stages adapt attention alone, but a user's file may have adapters here."""
    transformer = small_transformer(2)
    fuse_gelu(transformer)
    monkeypatch.setattr(lora, "TARGETS", ["ff.net.0.proj"])
    lora.add_adapter(transformer, "one", 4, 64, seed=0)
    randomise(lora.adapter(transformer, "one"), torch.Generator().manual_seed(0))
    part = transformer.transformer_blocks[0].ff.net[0]
    x = torch.randn(2, 7, 32)
    lora.set_adapters(transformer, ["one"])
    expected = F.gelu(part.proj(x), approximate="tanh")
    assert torch.equal(part(x), expected)
    lora.set_adapters(transformer, [])
    assert (part(x) - expected).abs().max() > 0.1


def test_every_gelu_by_tanh_of_a_transformer_is_fused_and_no_other():
    """Those of the picture and of the text, which the last block drops."""
    transformer = small_transformer(3)
    exact = transformer.transformer_blocks[0].ff.net[0]
    exact.approximate = "none"
    fuse_gelu(transformer)
    kinds = Counter(type(module) for module in transformer.modules())
    assert kinds[GeluInProduct] == 3 + 2 - 1
    assert type(exact) is GELU


@pytest.mark.parametrize("compile", [False, True])
def test_gelu_is_fused_where_the_base_is_compiled_alone(compile, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    kinds = Counter(type(module) for module in tiny_base(compile=compile).transformer.modules())
    assert (kinds[GeluInProduct] > 0) == compile
    assert (kinds[GELU] > 0) != compile


# ---- the weights in one tensor -------------------------------------------------------------------
def test_matrices_and_gradients_are_views_of_the_flat_ones():
    base = tiny_base()
    for name in ("generator", "fake"):
        base.add_adapter(name, 4, 8, 0)
    before = flat(base.adapter("fake"))
    _, weights = base.train_only("generator", "fake")
    assert torch.equal(weights.detach(), before)
    circle = base.encode(["a red circle"])
    (x,) = normals(1, 1)
    v = base.velocity(["fake"], circle)(x, 0.5)
    v.square().sum().backward()
    gradients = [matrix.grad for matrix in base.adapter("fake").values()]
    assert torch.equal(weights.grad, flat(gradients))
    assert weights.grad.any()
    weights.data += 1
    assert torch.equal(flat(base.adapter("fake")), before + 1)


# ---- micro-batches -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "n, most, size",
    [
        (9, 20, 9),
        (9, 9, 9),
        (9, 5, 3),
        (9, 8, 5),
        (9, 2, 2),
        (13, 6, 5),
        (16, 9, 8),
        (72, 10, 9),
        (7, 3, 3),
        (7, 1, 1),
    ],
)
def test_micro_batches_are_even_where_a_divisor_is_near(n, most, size):
    assert even_part(n, most) == size


class Gpu:
    """A machine is played: free GiB of a GPU, and what its functions took at their peak."""

    def __init__(self, free, monkeypatch):
        self.free = free
        self.most = 70  # loading the model
        weights = 5 * GIB
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: weights)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: weights + self.most * GIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GIB, 80 * GIB))

    def reset(self):
        self.most = 0

    def take(self, gib):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        if gib > self.free:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.most = max(self.most, gib)


def machine_flags(micro_batch=0, compile=0, graphs=0, low_memory=False):
    return SimpleNamespace(
        micro_batch=micro_batch, compile=compile, graphs=graphs, low_memory=low_memory
    )


@pytest.mark.parametrize(
    "free, flags, pictures, gib",
    [
        (20, dict(compile=1, graphs=1), 7, 18.8),  # .8 (1 + 2.5 n) + .5 + .5 n, at most 19
        (20, dict(graphs=1), 5, 16.5),  # 1 + 2.5 n + .5 + .5 n
        (20, dict(compile=1), 9, 18.8),  # .8 (1 + 2.5 n)
        (20, dict(), 7, 18.5),  # 1 + 2.5 n
        (20, dict(compile=1, graphs=1, low_memory=True), 5, 16.5),  # 1 + 2.5 n + .5 + .5 n
        (3000, dict(), 997, 2493.5),  # all there are
        (5, dict(), 1, 3.5),  # two find no room
    ],
)
def test_a_gpu_takes_as_many_as_it_holds(free, flags, pictures, gib, monkeypatch, capsys):
    """Passes need 1 GiB and 2.5 more a picture, and the rest .5 and .5; .95 of what is free is used."""
    gpu = Gpu(free, monkeypatch)

    def passes(n):
        gpu.take(1 + 2.5 * n)

    def others(n):
        gpu.take(0.5 + 0.5 * n)

    torch.backends.cuda.enable_cudnn_sdp(True)
    chosen = micro_batch(machine_flags(**flags), 997, torch.device("cuda"), passes, 0.8, others)
    assert chosen == pictures
    assert torch.backends.cuda.cudnn_sdp_enabled()
    said = f"micro-batches of {pictures} pictures: about {gib} of the {free}.0 GiB that are free"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("graphs", [0, 1])
@pytest.mark.parametrize("a_picture, amount", [(11, "about 1"), (21, "more than all of")])
def test_a_gpu_takes_one_picture_where_the_others_find_no_room(
    a_picture, amount, graphs, monkeypatch, capsys
):
    """For two, or not even for one: the larger of both counts, with and without graphs."""
    gpu = Gpu(20, monkeypatch)

    def passes(n):
        gpu.take(n)

    def others(n):
        gpu.take(a_picture * n)

    flags = machine_flags(graphs=graphs)
    assert micro_batch(flags, 997, torch.device("cuda"), passes, 0.8, others) == 1
    assert f"micro-batches of 1 pictures: {amount}" in capsys.readouterr().out


def test_passes_are_tried_as_they_are_not_compiled(monkeypatch):
    """Compiling takes minutes, for a number of pictures that may be another than the chosen one."""
    gpu = Gpu(20, monkeypatch)
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def compiled(x):
        return x + 1

    def passes(n):
        gpu.take(n)
        compiled(torch.zeros(n))

    micro_batch(machine_flags(compile=1), 4, torch.device("cuda"), passes, 1)
    assert compiled_graphs == []
    compiled(torch.zeros(2))
    assert len(compiled_graphs) == 1


def attention_gradient(n, contiguous):
    """d(attention)/d(q) [n,2,64,128] in bf16 on the GPU.

    The output's gradient has one of two layouts.
    """
    rng = torch.Generator("cuda").manual_seed(0)
    shape = (n, 64, 2, 128)
    leaves = [torch.randn(shape, generator=rng, device="cuda").bfloat16() for _ in range(4)]
    q, k, v, gradient = (leaf.transpose(1, 2) for leaf in leaves)
    q.requires_grad_()
    if contiguous:
        gradient = gradient.contiguous()
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    (gradient_of_q,) = torch.autograd.grad(output, q, gradient)
    return gradient_of_q.float()


@on_a_gpu
def test_on_a_gpu_the_tried_passes_leave_no_plan_of_cudnns_to_the_compiled_ones():
    """PyTorch finds such plans without the layout of the output's gradient.

    It reads another layout wrongly.
    """

    def passes(n):
        attention_gradient(n, contiguous=True)

    micro_batch(machine_flags(), 4, torch.device("cuda"), passes, 1)
    with sdpa_kernel(SDPBackend.MATH):
        truth = attention_gradient(2, contiguous=False)
    found = attention_gradient(2, contiguous=False)
    assert (found - truth).norm() < 0.02 * truth.norm()


def test_what_is_asked_for_is_taken_and_no_pass_is_tried():
    def never(n):
        raise AssertionError

    gpu = torch.device("cuda")
    assert micro_batch(machine_flags(5), 12, gpu, never, 1) == 5
    assert micro_batch(machine_flags(), 12, CPU, never, 1) == common.ON_A_CPU
    assert micro_batch(machine_flags(), 2, CPU, never, 1) == 2
    assert micro_batch(machine_flags(), 1, gpu, never, 1) == 1
    assert micro_batch(machine_flags(), 0, gpu, never, 1) == 1  # a process without pictures


@pytest.mark.parametrize(
    "program, flags", [(cold_start, COLD), (rtdmd_rl, RL), (rtdmd_rl, [*RL, "--low_memory"])]
)
def test_trying_how_many_fit_leaves_no_gradient(program, flags, run, tmp_path, monkeypatch):
    """On a machine that would try them, the first update is that of one that does not.

    What is tried is what needs most: the fake score's three evaluations with gradient; in stage 1 the
    generator's pass, in stage 2 one of the student with twice the pictures, and decoding. With
    --low_memory the latter is not recorded.
    """
    seen = []
    of_each = []
    real_forward = SD3Transformer2DModel.forward
    real_decode = BaseModel.decode

    def forward(self, hidden_states, *inputs, **more):
        seen.append((len(hidden_states), torch.is_grad_enabled()))
        return real_forward(self, hidden_states, *inputs, **more)

    def decode(self, latents):
        seen.append(("decoded", len(latents), latents.requires_grad))
        return real_decode(self, latents)

    def tries(args, n_mine, device, recorded, compiled, **rest):
        assert compiled == {cold_start: 0.8, rtdmd_rl: 0.9}[program]
        with monkeypatch.context() as noting:
            noting.setattr(SD3Transformer2DModel, "forward", forward)
            noting.setattr(BaseModel, "decode", decode)
            for function in (recorded, *rest.values()):
                function(2)
                of_each.append(Counter(seen))
                seen.clear()
        return args.micro_batch

    fake_score = [(2, True), (4, True)]  # the last two evaluations in one batch
    if program is rtdmd_rl:
        low_memory = "--low_memory" in flags
        flags = [*flags, "--cold_start", run.cold]
        student, decoded = [(4, True)], [("decoded", 2, True)]
        if low_memory:
            wanted = [[*fake_score, *student], decoded]
        else:
            wanted = [[*fake_score, *student, *decoded], []]
    else:
        student, guided_teacher, fake = (2, True), (4, False), (2, False)
        wanted = [[*fake_score, student, guided_teacher, fake]]
    good(here(program, *flags, "--out_dir", tmp_path / "tried", micro_batch=tries))
    assert of_each == [Counter(passes) for passes in wanted]
    good(here(program, *flags, "--out_dir", tmp_path / "plain"))
    assert same_files(tmp_path / "tried", tmp_path / "plain")


# ---- consistency on a share of the pictures ------------------------------------------------------
def drawn(step, n, rows=None, seed=0):
    """The random numbers of a step with n pictures, of which `rows` are this process's."""
    return StepRandom(seed, step, n, rows or slice(0, n), (4, 2, 2), CPU)


def test_every_picture_is_in_the_share_as_often():
    counts = Counter()
    steps = 3000
    for step in range(steps):
        (places,) = drawn(step, 8).some(0.3, [slice(0, 8)])
        counts.update(places.tolist())
        assert len(places) in (2, 3)  # .3 x 8 = 2.4
    for place in range(8):
        assert abs(counts[place] / steps - 0.3) < 4 * std_of_share(0.3, steps)


def test_a_third_of_nine_is_three_and_all_is_all():
    halves = [slice(0, 5), slice(5, 10)]
    for step in range(200):
        (places,) = drawn(step, 9).some(1 / 3, [slice(0, 9)])
        assert len(places) == 3
        of_first, of_second = drawn(step, 9).some(1.0, halves)
        assert of_first.tolist() == [0, 1, 2, 3, 4]
        assert of_second.tolist() == [0, 1, 2, 3]


def test_the_share_is_the_same_on_any_number_of_ranks():
    for step in range(50):
        (whole,) = drawn(step, 10).some(0.4, [slice(0, 10)])
        found = []
        for rank in range(3):
            rows = shard(10, rank, 3)
            n_mine = rows.stop - rows.start
            for part in (slice(0, 2), slice(2, 4)):
                if part.start >= n_mine:
                    continue
                (places,) = drawn(step, 10, rows).some(0.4, [part])
                for place in places:
                    found.append(rows.start + part.start + int(place))
        assert found == whole.tolist()


def test_the_mean_over_all_shares_is_the_whole_gradient():
    """A third each, which together are everything: the mean of the three estimates is exact."""
    base = tiny_base()
    base.add_adapter("fake", 8, 16, 0)
    for matrix in base.adapter("fake").values():
        rng = torch.Generator().manual_seed(3)
        matrix.data += 0.05 * torch.randn(matrix.shape, generator=rng)
    (weights,) = base.train_only("fake")
    prompts = base.encode(THREE_PROMPTS)
    x_s, noise, noise1, noise2 = normals(4, 3)
    s = torch.full((3,), 0.5)
    t = torch.tensor([0.6, 0.8, 0.95])
    back = torch.tensor([0.02, 0.1, 0.2])

    def gradient_and_consistency(*share):
        losses, _, consistency = cold_start.fake_score_loss(
            base.velocity(["fake"], prompts),
            x_s,
            s,
            s - 0.5,
            t,
            noise,
            back,
            noise1,
            noise2,
            5.0,
            0.9,
            *share,
        )
        weights.grad.zero_()
        losses.sum().backward()
        return weights.grad.clone(), consistency.sum().detach()

    whole, total = gradient_and_consistency()
    gradients = []
    consistencies = []
    for place in (0, 1, 2):
        gradient, consistency = gradient_and_consistency(torch.tensor([place]), 1 / 3)
        gradients.append(gradient)
        consistencies.append(consistency)
    mean = torch.stack(gradients).mean(0)
    assert (mean - whole).norm() < 1e-5 * whole.norm()
    assert torch.stack(consistencies).mean() == pytest.approx(total.item(), rel=1e-5)
    assert (gradients[0] - whole).norm() > 1e-3 * whole.norm()
    all_of_them, _ = gradient_and_consistency(torch.arange(3), 1.0)
    assert torch.equal(all_of_them, whole)
    none = torch.tensor([], dtype=torch.long)
    ambient_alone, _ = gradient_and_consistency(none, 1 / 3)
    assert (ambient_alone - whole).norm() > 1e-3 * whole.norm()


def test_some_rows_of_the_text_belong_to_some_pictures():
    base = tiny_base()
    v = base.velocity([], base.encode(THREE_PROMPTS))
    (x,) = normals(1, 3)
    sigma = torch.tensor([0.3, 0.5, 0.9])
    rows = torch.tensor([2, 0])
    of_rows = v(x[rows], sigma[rows], rows)
    of_all = v(x, sigma)
    assert torch.allclose(of_rows, of_all[rows], atol=1e-5)


# ---- roll-outs used again ------------------------------------------------------------------------
def rollout_args(seed, generator_every):
    return SimpleNamespace(seed=seed, generator_every=generator_every, num_steps=4)


def blocks(args, steps):
    """{first step of a roll-out: [(step, k)]}"""
    found = {}
    for step in range(steps):
        first, k = cold_start.state_of_a_rollout(step, args)
        found.setdefault(first, []).append((step, k))
    return found


def test_a_rollout_serves_different_states_until_the_generator_changes():
    found = blocks(rollout_args(seed=1, generator_every=10), 400)
    last_states = set()
    assert list(found)[:4] == [0, 4, 8, 10]
    for first, uses in found.items():
        steps, states = zip(*uses)
        assert steps == tuple(range(first, first + len(steps)))
        assert first // 10 == steps[-1] // 10  # the generator changes after steps 9, 19, ...
        assert len(set(states)) == len(states)
        last_states.add(states[-1])
    assert last_states == {1, 2, 3, 4}


def test_every_state_is_as_likely_at_every_step():
    seeds = 4000
    for step in (0, 3, 9):
        counts = Counter()
        for seed in range(seeds):
            args = rollout_args(seed, generator_every=10)
            _, k = cold_start.state_of_a_rollout(step, args)
            counts[k] += 1
        for k in (1, 2, 3, 4):
            assert abs(counts[k] / seeds - 0.25) < 4 * std_of_share(0.25, seeds)


REUSE = [*BASE, "--batch_size", 3, "--micro_batch", 2, "--generator_every", 6, "--reuse_rollouts"]


def test_what_is_used_again_is_the_state_that_a_rollout_of_that_step_gives(tmp_path):
    """x_s, its level and its prompts, at each of six steps.

    These have two roll-outs. The generator stays 0.
    """
    paths = []
    seen = []
    real_rollout = cps.rollout
    real_loss = cold_start.fake_score_loss

    def rollout(*inputs):
        path = real_rollout(*inputs)
        paths.append(path)
        return path

    def loss(fake, x_s, s, *rest):
        seen.append((x_s.clone(), s[0].item()))
        return real_loss(fake, x_s, s, *rest)

    flags = [*REUSE, "--steps", 6, "--out_dir", tmp_path]
    good(here(cold_start, *flags, rollout=rollout, fake_score_loss=loss, preview=None))
    assert len(paths) == 4  # two roll-outs of two micro-batches each
    levels = cps.sigmas(4, 3.0)
    for step, line in enumerate(log_of(tmp_path)):
        k = line["k"]
        paths_of_step = paths[:2] if step < 4 else paths[2:]
        for b in (0, 1):
            x_s, level = seen[2 * step + b]
            assert level == pytest.approx(levels[k])
            assert torch.equal(x_s, paths_of_step[b][k])


def test_a_run_that_stops_amid_a_rollout_goes_on_to_the_same_bytes(tmp_path):
    flags = [*REUSE, "--steps", 8, "--save_every", 2, "--consistency_share", "1/3"]
    good(here(cold_start, *flags, "--out_dir", tmp_path / "whole"))
    real = cold_start.fake_score_loss
    for stop in (2, 6, 7):
        out = tmp_path / f"cut{stop}"
        calls = []

        def stopped(*inputs):
            calls.append(inputs)
            if len(calls) > 2 * stop:  # two micro-batches a step
                raise KeyboardInterrupt
            return real(*inputs)

        with pytest.raises(KeyboardInterrupt):
            here(cold_start, *flags, "--out_dir", out, fake_score_loss=stopped)
        saved = load(out / "ckpt.pt")
        assert saved["step"] == stop - stop % 2
        good(here(cold_start, *flags, "--out_dir", out))
        assert same_files(tmp_path / "whole", out)


def test_both_shortcuts_change_the_run_and_are_off_by_default(run, tmp_path):
    stage_1 = flags_of(cold_start)
    stage_2 = flags_of(rtdmd_rl, "--cold_start", str(run.cold))
    assert stage_1["consistency_share"] == 1
    assert stage_2["consistency_share"] == 1
    assert not stage_1["reuse_rollouts"]
    shortcuts = {
        "share": ["--consistency_share", "1/3"],
        "reuse": ["--reuse_rollouts"],
    }
    for name, flags in shortcuts.items():
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


# ---- start-up ------------------------------------------------------------------------------------
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
        args = rollout_args(seed, generator_every=4)
        order = []
        for step in range(4):
            _, k = cold_start.state_of_a_rollout(step, args)
            order.append(k)
        orders.add(tuple(order))
    assert len(orders) == 24


# ---- texts ---------------------------------------------------------------------------------------
def test_the_last_texts_are_kept_by_their_size(monkeypatch):
    """A prompt is 4 numbers and 2, which is 24 bytes; 60 bytes hold two."""
    read = []

    def encode(prompts):
        read.extend(prompts)
        ids = torch.tensor([float(prompt) for prompt in prompts])
        embeds = ids.view(-1, 1, 1).expand(-1, 2, 2)
        pooled = -ids.view(-1, 1).expand(-1, 2)
        return embeds, pooled

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


def test_a_batch_of_drawing_is_read_in_one_pass_unless_it_was_the_last_one():
    read = []

    def encode(prompts):
        read.append(list(prompts))
        return (torch.tensor([float(prompt) for prompt in prompts]),)

    encoder = text.WholeBatches(encode)
    prompts = ["1", "2", "1"]
    (first,) = encoder(prompts)
    (again,) = encoder(list(prompts))
    assert again is first
    prompts[0] = "3"  # the caller's own list
    (other,) = encoder(prompts)
    assert other.tolist() == [3, 2, 1]
    assert read == [["1", "2", "1"], ["3", "2", "1"]]


def test_sample_reads_each_batch_in_one_pass(tmp_path, monkeypatch):
    """So a prompt's text does not depend on which others there are."""
    read = watch_text(monkeypatch)
    (tmp_path / "prompts.txt").write_text("a\nb\na\nc\nc\n")
    flags = ["--preset", "tiny", "--device", "cpu", "--batch_size", 3, "--out_dir", tmp_path]
    good(here(sample, "--prompts", tmp_path / "prompts.txt", *flags))
    assert read == [["a", "b", "a"], ["c", "c"]]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_table_holds_texts_of_any_number_of_tensors(parts, tmp_path, capsys):
    """Pooled text is not a matter of course: some models have none."""
    shapes = [(3, 2), (5,), (1, 1, 2)][:parts]

    def encode(prompts):
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        tensors = []
        for i, shape in enumerate(shapes):
            size = (len(prompts), *shape)
            ones = [1] * len(shape)
            tensors.append(i + lengths.view(-1, *ones).expand(size))
        return tuple(tensors)

    prompts = ["a", "bb", "a", "dddd"]
    table = text.TextTable(encode, CPU, prompts, str(tmp_path / "text.bin"))
    assert "4 texts take 0.00 GB" in capsys.readouterr().out  # three and the empty one
    asked = ["dddd", "", "a"]
    for found, expected in zip(table(asked), encode(asked), strict=True):
        assert torch.equal(found, expected)
