"""Attention of Stable Diffusion 3 with q, k and v in one product, where the blocks are compiled.

The three have the same input. Joined, it is read once in place of three times, and few tokens fill a
GPU better: a picture that is drawn alone gains most. In training their adapters are a part of the same
product. docs/performance.md has what that is worth.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0

from lora import Adapted, LoraLinear


def join_projections(transformer):
    """Let every attention of Stable Diffusion 3 compute q, k and v together; others stay as they are.

    To be called where the weights will stay: each becomes a part of a larger one in memory. Moved or
    cast later, the larger one would stay behind, and be used.
    """
    for layer in transformer.modules():
        if isinstance(getattr(layer, "processor", None), JointAttnProcessor2_0):
            layer.set_processor(JointAttention(layer))


def joined_in(transformer):
    """All that has been joined there."""
    found = []
    for layer in transformer.modules():
        processor = getattr(layer, "processor", None)
        if isinstance(processor, JointAttention):
            found += [processor.picture, processor.text]
    return [joined for joined in found if joined is not None]


class JointAttention:
    """A processor of diffusers' Attention: over a picture's tokens and, if there are any, a text's."""

    def __init__(self, layer):
        self.picture = Joined(layer, ("to_q", "to_k", "to_v"))
        self.text = None
        if layer.add_q_proj is not None:
            self.text = Joined(layer, ("add_q_proj", "add_k_proj", "add_v_proj"))

    def __call__(self, layer, hidden_states, encoder_hidden_states=None, attention_mask=None):
        """hidden_states [B,N,D] of a picture, encoder_hidden_states [B,L,D] of a text -> the same.

        There never is a mask: Stable Diffusion 3 attends to the padding of its texts, too.
        """
        q, k, v = by_heads(self.picture(hidden_states), layer.heads)
        if layer.norm_q is not None:
            q = layer.norm_q(q)
            k = layer.norm_k(k)
        if encoder_hidden_states is None:
            seen = attend(q, k, v)
            return project_out(layer, seen)

        text_q, text_k, text_v = by_heads(self.text(encoder_hidden_states), layer.heads)
        if layer.norm_added_q is not None:
            text_q = layer.norm_added_q(text_q)
            text_k = layer.norm_added_k(text_k)
        q = torch.cat([q, text_q], 2)
        k = torch.cat([k, text_k], 2)
        v = torch.cat([v, text_v], 2)
        seen = attend(q, k, v)
        picture, text = seen.tensor_split([hidden_states.shape[1]], 1)
        if not layer.context_pre_only:  # the last block drops its text
            text = layer.to_add_out(text)
        return project_out(layer, picture), text


def by_heads(tensors, heads):
    """[B,N,D] each -> [B,heads,N,D / heads] each"""
    return [tensor.unflatten(2, (heads, -1)).transpose(1, 2) for tensor in tensors]


def attend(q, k, v):
    """[B,heads,N,d] each -> [B,N,heads d]"""
    seen = F.scaled_dot_product_attention(q, k, v)
    return seen.transpose(1, 2).flatten(2)


def project_out(layer, x):
    project, _ = layer.to_out  # and a dropout of nothing
    return project(x)


class Joined(Adapted):
    """Adapted matrices of one input as one: W x + B A x with their W, and their A, below one another.

    owner, names: the module whose matrices they are; adapters may be put on them later. Their weights
    move into one tensor, of which each keeps its rows.
    """

    def __init__(self, owner, names):
        self.owner = owner
        self.names = names
        layers = self.layers()
        self.weight = torch.cat([layer.weight for layer in layers]).detach()
        self.bias = torch.cat([layer.bias for layer in layers]).detach()
        self.sizes = [len(layer.weight) for layer in layers]
        for layer, rows in zip(layers, self.weight.split(self.sizes)):
            layer.weight.data = rows

    def layers(self):
        return [getattr(self.owner, name) for name in self.names]

    def adapted(self):
        return [layer for layer in self.layers() if isinstance(layer, LoraLinear)]

    def active(self):
        layers = self.adapted()
        if not layers:
            return []
        return layers[0].active()  # the same for all

    def present(self, names):
        """Those of the adapters that any of the matrices has."""
        layers = self.adapted()
        return [name for name in names if any(layer.present([name]) for layer in layers)]

    def pair(self, names):
        """The A of all matrices below one another, and their B along a diagonal."""
        pairs = [pair_of(layer, names) for layer in self.layers()]
        every_A, every_B = zip(*pairs)
        return torch.cat(every_A), torch.block_diag(*every_B)

    def __call__(self, x):
        """x [...,D] -> what each matrix and its active adapters give."""
        # All in one dtype: autocast would see to it here, but not in InOneProduct's backward pass.
        x = x.to(self.weight.dtype)
        pair = self.active_pair(x.dtype)
        # Where sample.py draws one picture, W is larger than W x, and not worth a copy.
        drawing = bool(self.fixed)
        if pair is None or drawing:
            y = self.plus_adapters(F.linear(x, self.weight, self.bias), x)
        else:
            A, B = pair
            y = InOneProduct.apply(x, F.linear(x, A), self.weight, B, self.bias)
        return y.split(self.sizes, -1)


class InOneProduct(torch.autograd.Function):
    """W x + B low + bias as [W, B] [x, low] + bias: what W gives is not read and written once more.

    x [...,in], low [...,r], W [out,in], B [out,r], bias [out] -> [...,out], all of one dtype.

    W and bias are frozen. The backward pass is written out since autograd would work out a gradient
    of all of [W, B].
    """

    @staticmethod
    def forward(ctx, x, low, W, B, bias):
        ctx.save_for_backward(low, W, B)
        inputs = torch.cat([x, low], -1)
        matrix = torch.cat([W, B], 1)
        return F.linear(inputs, matrix, bias)

    @staticmethod
    def backward(ctx, gradient):
        low, W, B = ctx.saved_tensors
        matrix = torch.cat([W, B], 1)
        of_inputs = gradient @ matrix
        of_x, of_low = of_inputs.tensor_split([W.shape[1]], -1)
        rows = gradient.flatten(0, -2)
        of_B = rows.t() @ low.flatten(0, -2)
        return of_x, of_low, None, of_B, None


def pair_of(layer, names):
    """The A [r,in] and B [out,r] of a matrix's adapters; r is 0 where it has none of them."""
    if isinstance(layer, LoraLinear) and layer.present(names):
        return layer.pair(names)
    n_out, n_in = layer.weight.shape
    device = layer.weight.device
    return torch.empty(0, n_in, device=device), torch.empty(n_out, 0, device=device)
