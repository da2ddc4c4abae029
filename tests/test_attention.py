"""q, k and v in one product (attention.py): the same numbers, for any adapters."""

from types import SimpleNamespace

import pytest
import torch

import lora
import sample
from attention import JointAttention, join_projections
from helpers import backbone_of, randomise, small_transformer, tiny_base
from model import play


@pytest.fixture
def transformer():
    return four_blocks()


def four_blocks():
    """The first two have a second attention and the last drops its text; every norm is another one."""
    torch.manual_seed(0)
    transformer = small_transformer(4, (0, 1))
    for name, p in transformer.named_parameters():
        if ".norm_" in name:
            torch.nn.init.normal_(p)
    return transformer


def with_adapters(transformer, targets_of_one=lora.TARGETS, targets_of_two=lora.TARGETS):
    """Adapters "one" and "two" of different rank on these matrices -> the weights of "two", trained."""
    rng = torch.Generator().manual_seed(0)
    for name, rank, targets in (("one", 4, targets_of_one), ("two", 8, targets_of_two)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lora, "TARGETS", targets)
            lora.add_adapter(transformer, name, rank, 64, seed=0)
        randomise(lora.adapter(transformer, name), rng)
    transformer.requires_grad_(False)
    return lora.trainable(lora.adapter(transformer, "two"))


def velocity_and_gradient(transformer, active, weights):
    rng = torch.Generator().manual_seed(1)
    text = (torch.randn(2, 7, 32, generator=rng), torch.randn(2, 32, generator=rng))
    x = torch.randn(2, 4, 16, 16, generator=rng)
    weights.grad.zero_()
    v = play(backbone_of(transformer), active, text)(x, 0.6)
    if "two" in active:
        v.square().sum().backward()
    return v.detach(), weights.grad.clone()


def assert_alike(found, expected):
    """Two pairs of velocity and gradient, to rounding."""
    for one, other in zip(found, expected):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("active", [[], ["one"], ["one", "two"]])
@pytest.mark.parametrize(
    "one, two",
    [
        (lora.TARGETS, lora.TARGETS),
        (["attn.to_q"], ["attn.to_k", "attn.add_v_proj"]),
        (["attn.to_out.0"], ["attn.to_out.0"]),
    ],
)
def test_joined_they_give_the_same_velocity_and_gradient(transformer, one, two, active):
    """Whatever matrices have adapters: all, others of an attention's three, or none of them."""
    weights = with_adapters(transformer, one, two)
    apart = velocity_and_gradient(transformer, active, weights)
    join_projections(transformer)
    assert_alike(velocity_and_gradient(transformer, active, weights), apart)
    _, gradient = apart
    assert (gradient.norm() > 1) == ("two" in active)


def test_in_bf16_under_autocast_they_give_the_same_but_for_rounding(transformer):
    """As on a GPU, where the base is in bf16, and its norms and the adapters are in float32."""
    weights = with_adapters(transformer)
    lora.set_adapters(transformer, ["one", "two"])
    attention = transformer.transformer_blocks[0].attn
    x = torch.randn(2, 7, attention.to_q.in_features, generator=torch.Generator().manual_seed(1))

    def outputs_and_gradients(project, in_bf16):
        given = x.clone().requires_grad_()
        weights.grad.zero_()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            outputs = torch.cat(project(given), -1)
        outputs.float().square().sum().backward()
        return outputs.detach(), given.grad, weights.grad.clone()

    def apart(x):
        return [attention.to_q(x), attention.to_k(x), attention.to_v(x)]

    expected = outputs_and_gradients(apart, in_bf16=False)
    for matrix in (attention.to_q, attention.to_k, attention.to_v):
        matrix.base_layer.bfloat16()
    join_projections(transformer)
    found = outputs_and_gradients(attention.processor.picture, in_bf16=True)
    for one, other in zip(found, expected):
        assert (one - other).norm() < 0.02 * other.norm()


def test_stable_diffusion_3_medium_has_no_norms_of_q_and_k():
    transformer = small_transformer(2, qk_norm=None)
    weights = with_adapters(transformer)
    apart = velocity_and_gradient(transformer, ["one", "two"], weights)
    join_projections(transformer)
    assert_alike(velocity_and_gradient(transformer, ["one", "two"], weights), apart)


def test_adapters_may_come_after_the_joining(transformer):
    """So the programs do: the base is loaded first."""
    join_projections(transformer)
    weights = with_adapters(transformer)
    joined_first = velocity_and_gradient(transformer, ["two"], weights)
    plain = four_blocks()
    weights = with_adapters(plain)
    assert_alike(joined_first, velocity_and_gradient(plain, ["two"], weights))


def test_the_joined_weights_are_held_once_and_stay_what_they_were(transformer):
    before = {name: p.clone() for name, p in transformer.named_parameters()}
    join_projections(transformer)
    after = dict(transformer.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    attention = transformer.transformer_blocks[0].attn
    storages = {
        getattr(attention, name).weight.untyped_storage().data_ptr()
        for name in ("to_q", "to_k", "to_v")
    }
    assert storages == {attention.processor.picture.weight.untyped_storage().data_ptr()}


def test_for_drawing_their_adapters_are_put_together_once(transformer):
    """As those of single matrices are: what is done to the adapters later changes nothing."""
    join_projections(transformer)
    weights = with_adapters(transformer)
    active = ["one", "two"]
    before, _ = velocity_and_gradient(transformer, active, weights)
    base = SimpleNamespace(backbone_of=lambda adapters: backbone_of(transformer))
    sample.fix_adapters(base, active)
    with torch.no_grad():
        weights.mul_(2)
    after, _ = velocity_and_gradient(transformer, active, weights)
    assert (after - before).abs().max() < 1e-6 * before.abs().max()
    of_one, _ = velocity_and_gradient(transformer, ["one"], weights)
    assert (of_one - before).abs().max() > 0.01 * before.abs().max()


def test_every_attention_of_stable_diffusion_3_is_joined_and_no_other(transformer, places):
    """Both of a block that has two. FLUX has processors of its own."""
    join_projections(transformer)
    processors = transformer.attn_processors.values()
    assert len(processors) == 4 + 2
    assert all(isinstance(processor, JointAttention) for processor in processors)
    other = tiny_base(places["flux1"]).transformer
    join_projections(other)
    assert not any(isinstance(p, JointAttention) for p in other.attn_processors.values())


def joined(base):
    """Whether all of its attentions are."""
    processors = base.transformer.attn_processors.values()
    return all(isinstance(processor, JointAttention) for processor in processors)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("cache_text", [False, True])
def test_the_base_is_joined_where_it_is_compiled_alone(compile, cache_text, tmp_path, monkeypatch):
    """And once it is on the device. (The compiler itself is left out: joining is what is looked at.)"""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    base = tiny_base(compile=compile, cache_text=cache_text)
    if cache_text:
        assert not joined(base)  # it is on the CPU
        base.cache_texts(["a red circle"], str(tmp_path / "text.bin"))
    assert joined(base) == compile
