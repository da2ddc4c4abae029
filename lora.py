"""The adapters: LoRAs on the frozen transformer, by name, and which of them add to it."""

import hashlib
import re

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer

from checkpoint import joined, read_adapter, settled_alpha
from common import die, note
from cps import at_least_float32

# The release's targets. SD3.5's second attention, attn2, is not among them.
TARGETS = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
]
# And those of FLUX.2's single blocks, where attention and feed-forward part share their matrices.
FUSED = re.compile(r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)")


def fused_targets(transformer):
    """The names of a transformer's FUSED matrices; none but FLUX.2 has them."""
    found = []
    for name, module in transformer.named_modules():
        if FUSED.fullmatch(name) and isinstance(module, (torch.nn.Linear, LoraLayer)):
            found.append(name)
    return found


def add_adapter(transformer, name, rank, alpha, seed, init_std=None):
    """Put a fresh LoRA under `name`; it changes nothing yet, since its B is 0.

    init_std: A ~ N(0, init_std^2); None leaves peft's own gaussian, N(0, 1/rank^2). It matters: B
    moves by lr an update whatever its gradient, so that the weights move by lr times A.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:4], "big"))  # the same on all ranks
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights="gaussian",
        target_modules=[*TARGETS, *fused_targets(transformer)],
    )
    transformer.add_adapter(config, name)
    adopt_layers(transformer)
    for key, p in adapter(transformer, name).items():
        p.data = p.data.float()  # the base may be bf16, in which small updates would be lost
        if init_std is not None and ".lora_A." in key:
            p.data *= init_std * rank


def load_adapter(transformer, name, path, given_alpha=None, assumed_alpha=64.0):
    """Put the adapter in a file under `name`, in at least float32, with the file's modules and ranks.

    given_alpha: the user's own word, which wins; assumed_alpha: what is taken where nothing beside
    the file says it. Dies with one line if a single module has no place in this transformer; says in
    one line which of the modules that our stages train the file leaves out.
    """
    file = read_adapter(path)
    check_places(transformer, file)
    alpha = settled_alpha(file, given_alpha, assumed_alpha)
    usual_rank = file.usual_rank
    usual_alpha = alpha.of("", usual_rank)
    other_ranks, other_alphas = {}, {}
    for module, rank in file.ranks.items():
        if rank != usual_rank:
            other_ranks[module] = rank
        if alpha.of(module, rank) != usual_alpha:
            other_alphas[module] = alpha.of(module, rank)
    config = LoraConfig(
        r=usual_rank,
        lora_alpha=usual_alpha,
        rank_pattern=other_ranks,
        alpha_pattern=other_alphas,
        target_modules=list(file.weights),
    )
    transformer.add_adapter(config, name)
    adopt_layers(transformer)
    for module, (A, B) in file.weights.items():
        layer = transformer.get_submodule(module)
        for matrix, values in ((layer.lora_A[name].weight, A), (layer.lora_B[name].weight, B)):
            matrix.data = at_least_float32(values).to(matrix.device, copy=True)


def check_places(transformer, file):
    """Die unless every module of an AdapterFile is a matrix of this transformer, of the same shape.

    A note where the file leaves out some of TARGETS.
    """
    shapes = {}  # {name: [out, in]}; a matrix that has an adapter already keeps its own name
    for name, module in transformer.named_modules():
        matrix = getattr(module, "base_layer", module)
        if isinstance(matrix, torch.nn.Linear) and ".lora_" not in name:
            shapes[name] = list(matrix.weight.shape)
    count = len(file.weights)
    lost = [module for module in file.weights if module not in shapes]
    if lost:
        die(
            f"{file.path}: {len(lost)} of its {count} modules are not in this model, first: "
            f"{lost[0]}. Is it of another model?"
        )
    for module, (A, B) in file.weights.items():
        there, here = f"{B.shape[0]} x {A.shape[1]}", "{} x {}".format(*shapes[module])
        if there != here:
            die(
                f"{file.path}: {module} is {there} there and {here} in this model. "
                "Is it of another model?"
            )
    endings = tuple(f".{target}" for target in TARGETS)
    usual = [name for name in shapes if name.endswith(endings) or FUSED.fullmatch(name)]
    missing = [name for name in usual if name not in file.weights]
    if missing:
        note(
            f"{file.path} adapts {count} modules and leaves {len(missing)} of the usual "
            f"{len(usual)} as they are, first: {missing[0]}"
        )


def adopt_layers(transformer):
    """Give every adapted matrix our forward, and the transformer a list of them."""
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    transformer.lora_layers = layers
    for layer in layers:
        layer.__class__ = LoraLinear


class Adapted:
    """A product of frozen matrices that adapters add to. One pair of small products serves all of them.

    Stage 2's stacked adapters then cost no more than one. A class of it has `active()`, the names of
    those that add just now; `present(names)`, those of them that it has; and their `pair(names)`.
    """

    fixed = {}  # {adapters: their pair}, where it no longer changes (sample.py)

    def plus_adapters(self, y, x):
        """y + B A x with the pair of what is active."""
        pair = self.active_pair(x.dtype)
        if pair is None:
            return y
        A, B = pair
        return y + F.linear(F.linear(x, A), B)

    def active_pair(self, dtype):
        """The A and B of what is active, or None."""
        names = self.active()
        if not self.present(names):
            return None
        A, B = self.fixed.get(tuple(names)) or self.pair(names)
        return A.to(dtype), B.to(dtype)  # bf16 adapters in a float32 model


class LoraLinear(Adapted, PeftLinear):
    """peft's adapted matrix, W x + sum of scaling B A x over the active adapters, in fewer products.

    (A class, not a function for each layer: the compiler's graph of a block serves all blocks like
    it.) Called under `play`'s autocast. peft's flags for disabled and merged adapters are not looked
    at.
    """

    def active(self):
        return self._active_adapter

    def present(self, names):
        """Those of the adapters that this matrix has: a file may adapt others than our flags do."""
        return [name for name in names if name in self.lora_A]

    def pair(self, names):
        """The A of all active adapters stacked, and their scaled B side by side."""
        names = self.present(names)
        A = torch.cat([self.lora_A[name].weight for name in names])
        B = torch.cat([self.scaling[name] * self.lora_B[name].weight for name in names], 1)
        return A, B

    def forward(self, x):
        return self.plus_adapters(self.base_layer(x), x)


def trainable(matrices):
    """Let the matrices of an adapter, as from `adapter`, be trained -> one flat parameter of all.

    The matrices become views of it, and their gradients views of its .grad. So the optimiser, the
    average and the sum over ranks are one operation each, not one a matrix. The gradient is 0 and stays
    where it is: a recorded pass adds to that very tensor.
    """
    flat = torch.nn.Parameter(joined([p.detach() for p in matrices.values()]))
    flat.grad = torch.zeros_like(flat)
    sizes = [p.numel() for p in matrices.values()]
    places = zip(matrices.values(), flat.detach().split(sizes), flat.grad.split(sizes))
    for p, values, gradient in places:
        p.data = values.view_as(p)
        p.requires_grad_(True)
        p.grad = gradient.view_as(p)
    return flat


def adapter(transformer, name):
    """{key in the published format: parameter} of one adapter.

    A key is for example transformer_blocks.0.attn.to_q.lora_A.default.weight.
    """
    ending = f".{name}.weight"
    found = {}
    for key, p in transformer.named_parameters():
        if key.endswith(ending) and ".lora_" in key:
            found[key.removesuffix(ending) + ".default.weight"] = p
    return found


def set_adapters(transformer, adapters):
    """Which LoRAs add to the base from now on.

    Unlike peft's set_adapter it leaves requires_grad alone: flipping that between forward and
    backward makes the gradient zero without any error.
    """
    for layer in transformer.lora_layers:
        layer._active_adapter = adapters
