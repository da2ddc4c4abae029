"""What touches the transformer: loading, its roles, velocity, recorded passes.

One frozen transformer plays every role. Which one is said at the call, by the list of adapters that
add to it: `play(backbone, ["generator"], text)` is the student, `play(backbone, [], text,
negative, cfg)` the teacher with guidance. With --generator_pretrained the student has a transformer of
its own.
"""

import gc
import os
import sys
import time
import warnings

import diffusers
import torch
from diffusers.models.activations import GELU
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from attention import join_projections
from backbones import BACKBONES
from checkpoint import SETTINGS_NAME
from common import die, first_line, is_rank_0, note, seeded_rng
from cps import at_least_float32, rollout, sigmas
from hub import files_at, in_words, is_hub_id, variant_of
from lora import adapter, add_adapter, load_adapter, set_adapters, trainable
from pictures import compile_decoder, decode, decode_each, save_grid
from text import TextEncoder, TextTable

# Before anything is loaded, the models of rewards too: else there are progress bars, and what the
# tokenizers cut off is printed, prompt by prompt.
hub_logging.set_verbosity_error()
for logging in (transformers_logging, diffusers_logging):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
# Several adapters on one base is what we want; of the others nothing is for a user of ours to do.
for beginning in ("Already found a `peft_config`", "The `local_dir_use_symlinks`"):
    warnings.filterwarnings("ignore", message=beginning)


# The student's adapters, by name: stage 1's, and stage 2's stacked on that of stage 1.
STUDENTS = ("generator", "cold_generator")


# ---- the base model ------------------------------------------------------------------------------
class BaseModel:
    """A base model as the programs see it: levels, text, velocity, pictures, adapters.

    What differs between base models is in backbones.py; the stages know no more than this:

        latent_shape    (C, h, w) of a picture's latents
        sigmas(K)       noise levels of K sampling steps, by the base's own time shift
        levels(K)       the same, for training: there has to be room above the first step
        encode          prompts -> text, a tuple of tensors with one row a prompt
        velocity        adapters, text -> v(x, sigma): one role of the transformer
        decode          latents -> pictures

    compile: compile the blocks and the decoder. cache_text: the transformer stays on the CPU until
    `cache_texts` has made room for it. low_memory: activations are computed again in the backward
    pass, and pictures decoded one by one. generator_pretrained: another pipeline, whose transformer
    plays the student; has_teacher: False leaves the teacher's transformer out then, for who draws with
    the student alone. Dies with one line where a directory or a repository is no such pipeline, or the
    resolution does not fit.
    """

    def __init__(
        self,
        pretrained,
        device,
        resolution,
        compile=False,
        cache_text=False,
        low_memory=False,
        generator_pretrained="",
        has_teacher=True,
    ):
        self.pretrained = pretrained
        self.device = device
        self.low_memory = low_memory
        has_own = bool(generator_pretrained)
        left_out = {"transformer": None} if has_own and not has_teacher else {}
        family, teachers = load_pipeline(pretrained, device, **left_out)
        students = teachers
        if has_own:
            students = load_generators_own(generator_pretrained, device, teachers)
        self.pipe = students if left_out else teachers
        self.backbone = family(self.pipe, resolution)
        self.generator = self.backbone  # what plays the student: the same, or of a base of its own
        if students is not self.pipe:
            self.generator = family(students, resolution)
        self.transformer = self.pipe.transformer
        self.latent_shape = self.backbone.latent_shape
        self.text_tokens = self.backbone.text_tokens
        self.encode = TextEncoder(self.backbone.text, device)
        self.empty_text = None  # of classifier-free guidance, encoded when first needed
        self.compile = compile
        if compile:
            compile_decoder(self.pipe.vae)
        if not cache_text:
            self.settle()

    def settle(self):
        """The transformers come to the device, where they are compiled if that is asked for.

        Dies where there is no room for them.
        """
        for transformer in self.transformers():
            try:
                transformer.to(self.device)
            except torch.cuda.OutOfMemoryError as e:
                reason = f"no room for the frozen transformers ({first_line(e)})"
                die(f"--pretrained {self.pretrained}: {reason}", local=True)
            if self.compile:
                join_projections(transformer)
                fuse_gelu(transformer)
                compile_blocks(transformer)
            if self.low_memory:
                checkpoint_activations(transformer)

    def transformers(self):
        """The frozen ones: one for all roles, or one more that is the generator's own."""
        if self.generator is self.backbone:
            return [self.transformer]
        return [self.transformer, self.generator.pipe.transformer]

    def backbone_of(self, adapters):
        """Where these adapters add: the generator's to the transformer that plays the student."""
        if any(name in STUDENTS for name in adapters):
            return self.generator
        return self.backbone

    def transformer_of(self, name):
        return self.backbone_of([name]).pipe.transformer

    def sigmas(self, num_steps):
        return sigmas(num_steps, self.backbone.shift(num_steps))

    def levels(self, num_steps):
        """Noise levels of `num_steps` sampling steps; dies where the first leaves no room above it."""
        levels = self.sigmas(num_steps)
        highest = self.backbone.highest_first_level
        if levels[1] > highest:
            shift = self.backbone.shift(num_steps)
            die(
                f"--num_steps {num_steps} with this model's time shift {shift:g}: the first step ends "
                f"above noise level {highest:g}, which leaves no room to re-noise"
            )
        return levels

    def cache_texts(self, prompts, path):
        """Encode all prompts now, into a file (TextTable), and free the text encoders.

        The transformers come to the device in their place.
        """
        self.encode = TextTable(self.backbone.text, self.device, prompts, path)
        self.empty_text = None
        for name in self.backbone.encoders:
            setattr(self.pipe, name, None)
            setattr(self.generator.pipe, name, None)
        gc.collect()
        torch.cuda.empty_cache()
        self.settle()

    def velocity(self, adapters, text, cfg=1.0):
        """The velocity function of the transformer with these adapters; with guidance if cfg is not 1."""
        backbone = self.backbone_of(adapters)
        if cfg == 1 or backbone.guided_by_input():
            return play(backbone, adapters, text, None, cfg)
        if self.empty_text is None:
            self.empty_text = self.encode([""])
        return play(backbone, adapters, text, self.empty_text, cfg)

    def decode(self, latents):
        """Latents [B,C,h,w] -> pictures [B,3,H,W] in [0,1], float32, differentiable."""
        return decode(self.pipe.vae, self.backbone.to_vae(latents), one_by_one=self.low_memory)

    def add_adapter(self, name, rank, alpha, seed, init_std=None):
        add_adapter(self.transformer_of(name), name, rank, alpha, seed, init_std)

    def load_adapter(self, name, path, given_alpha=None):
        load_adapter(self.transformer_of(name), name, path, given_alpha)

    def adapter(self, name):
        return adapter(self.transformer_of(name), name)

    def train_only(self, *names):
        """Freeze everything but these adapters -> the weights of each, as one flat parameter."""
        for transformer in self.transformers():
            transformer.requires_grad_(False)
        return [trainable(self.adapter(name)) for name in names]


def load_base(args, device, prompts):
    """The base model as the flags of a stage ask for it, its text encoders freed with --cache_text."""
    if os.path.exists(os.path.join(args.pretrained, SETTINGS_NAME)):
        note(
            f"--pretrained {args.pretrained} is a few-step generator, says its {SETTINGS_NAME}; as the "
            f"teacher it is guided with --cfg {args.cfg:g}"
        )
    base = BaseModel(
        args.pretrained,
        device,
        args.resolution,
        compile=bool(args.compile) and device.type == "cuda",
        cache_text=args.cache_text,
        low_memory=args.low_memory,
        generator_pretrained=args.generator_pretrained,
    )
    if args.cache_text:
        base.cache_texts(prompts, f"{args.out_dir}/text.bin")
    return base


def load_generators_own(pretrained, device, teachers):
    """The pipeline whose transformer plays the student; all its other parts are the teacher's.

    Dies with one line where it is none of the same kind.
    """
    flag = "--generator_pretrained"
    shared = {name: part for name, part in teachers.components.items() if name != "transformer"}
    kind = type(teachers).__name__
    _, pipe = load_pipeline(pretrained, device, flag, kind, **shared)
    own, other = pipe.transformer, teachers.transformer
    if other is not None and shapes(own) != shapes(other):
        die(f"{flag} {pretrained}: its transformer has other shapes than that of --pretrained")
    return pipe


def shapes(module):
    return {name: p.shape for name, p in module.named_parameters()}


def load_pipeline(pretrained, device, flag="--pretrained", kind=None, **parts):
    """-> (its class in backbones.py, the diffusers pipeline), frozen; bf16 on a GPU, float32 elsewhere.

    Its transformer stays on the CPU, for `BaseModel.settle`. flag: which one names the pipeline. kind:
    the class that it must be of. parts: those that are not loaded, since they are there, or None. Dies
    with one line where the directory or the repository is none.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if not os.path.isdir(pretrained) and not is_hub_id(pretrained):
        die(f"{flag} {pretrained}: no such directory, nor a hub id (owner/name)")
    try:
        names = files_at(pretrained)
        index = diffusers.DiffusionPipeline.load_config(pretrained)
        name = index.get("_class_name")
        if isinstance(name, list):  # a file of the repository's own and a class in it
            raise ValueError(f"it wants to run custom code, {'.'.join(name)}")
        if name not in BACKBONES:
            raise ValueError(f"it is a {name}")
        if kind and name != kind:
            raise ValueError(f"it is a {name}, and --pretrained is a {kind}")
        family = BACKBONES[name]
        torch.backends.cuda.enable_cudnn_sdp(family.cudnn_attention)  # in all of this process
        pipe = getattr(diffusers, name).from_pretrained(
            pretrained, dtype=dtype, variant=variant_of(names), **{**family.absent(index), **parts}
        )
        encoders = [getattr(pipe, name) for name in family.encoders]
        for module in (pipe.vae, *encoders):
            if module is not None:
                module.requires_grad_(False).eval().to(device)
    except Exception as e:  # a directory can be wrong in a dozen ways
        die(
            f"{flag} {pretrained}, which must be a pipeline of Stable Diffusion 3, FLUX.1 or "
            f"FLUX.2-klein ({', '.join(BACKBONES)}), cannot be loaded: {in_words(e, pretrained)}",
            local=isinstance(e, torch.cuda.OutOfMemoryError),
        )
    if pipe.transformer is not None:
        pipe.transformer.requires_grad_(False).eval()
        pipe.transformer.lora_layers = []  # kept by adopt_layers, for set_adapters
    return family, pipe


def fuse_gelu(transformer):
    """Put every GELU by tanh that has a product of its own into it: SD3's, and FLUX.1's double blocks'.

    FLUX.1's other blocks and FLUX.2 have their feed-forward parts in other forms, which stay.
    """
    for module in transformer.modules():
        if type(module) is GELU and module.approximate == "tanh":
            module.__class__ = GeluInProduct


class GeluInProduct(GELU):
    """diffusers' GELU(W x + bias), for a GPU: GELU is applied before W x is written to memory.

    Only where no gradient is asked for: the backward pass would need W x itself.
    """

    def forward(self, x):
        # A user's file may have an adapter here, which adds before GELU. Our stages adapt attention alone.
        adapted = type(self.proj) is not torch.nn.Linear
        if torch.is_grad_enabled() or adapted:
            return super().forward(x)
        W = self.proj.weight
        # After a norm x is float32, and autocast on a GPU does not cast for this function.
        rows = x.flatten(0, -2).to(W.dtype)
        # On a GPU this is the GELU by tanh. (On a CPU PyTorch takes the exact one, by erf.)
        y = torch._addmm_activation(self.proj.bias, rows, W.t(), use_gelu=True)
        return y.unflatten(0, x.shape[:-1])


def compile_blocks(transformer):
    """Compile block by block: one graph serves all blocks of a kind.

    A role, a batch size, with or without gradient: a graph each, compiled when first met, and never
    a slower one for "any size" in their place.
    """
    config = torch._dynamo.config
    config.cache_size_limit = 1000  # since torch 2.7 also "recompile_limit"
    config.accumulated_cache_size_limit = 1000
    blocks = [*transformer.transformer_blocks]
    blocks += getattr(transformer, "single_transformer_blocks", [])  # FLUX has both kinds
    for block in blocks:
        block.compile(dynamic=False)


def checkpoint_activations(transformer):
    """Gradient checkpointing that recomputes with the adapters of the forward pass.

    By the time of the backward pass another role may be active: torch's and diffusers' own would
    recompute with that one, and the gradient would be wrong without any error.
    """

    def checkpoint(block, *inputs):
        adapters = transformer.lora_layers[0]._active_adapter

        def run(*inputs):
            set_adapters(transformer, adapters)
            return block(*inputs)

        return torch.utils.checkpoint.checkpoint(
            run, *inputs, use_reentrant=False, preserve_rng_state=False
        )

    transformer.enable_gradient_checkpointing(checkpoint)


# ---- velocity ------------------------------------------------------------------------------------
def play(backbone, adapters, text, negative=None, cfg=1.0):
    """The velocity function of the transformer in one role: v(x [B,C,H,W], sigma float or [B]).

    It returns float32 like x (float64 stays float64). text, negative: tuples of tensors with B
    rows, or 1. With negative there is classifier-free guidance, both halves in one pass.
    v(x, sigma, rows): with those rows of the text alone.
    """

    def velocity(x, sigma, rows=None):
        set_adapters(backbone.pipe.transformer, adapters)
        n = len(x)
        own_text = text if rows is None else [tensor[rows] for tensor in text]
        parts = [repeated(tensor, n) for tensor in own_text]
        if torch.is_tensor(sigma):
            timestep = 1000 * at_least_float32(sigma).expand(n)
        else:
            timestep = torch.full((n,), 1000 * sigma, device=x.device)
        if negative is not None:
            x = torch.cat([x, x])
            timestep = torch.cat([timestep, timestep])
            without = [repeated(tensor, n) for tensor in negative]
            parts = [torch.cat(both) for both in zip(without, parts)]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            v = backbone.run(x.to(parts[0].dtype), timestep, cfg, *parts)
        v = at_least_float32(v)
        if negative is not None:
            without, with_text = v.chunk(2)
            v = without + cfg * (with_text - without)
        return v

    return velocity


def repeated(tensor, n):
    """[B or 1, ...] -> [n, ...]"""
    if len(tensor) == n:
        return tensor
    return tensor.repeat(n // len(tensor), *[1] * (tensor.dim() - 1))


def graphed(on, device, *functions):
    """On a GPU, functions of tensors -> the same as CUDA graphs; elsewhere the functions themselves.

    A graph is one launch in place of thousands, so that the GPU does not wait for Python. The
    functions give back a tensor or a tuple of tensors. For each set of shapes the first call is a
    plain one (it compiles) and lets all graphs go. A later one is recorded where there is no graph,
    and else replayed: its Python is not run. So whatever a function reads besides its inputs, weights
    and .grad, must stay where it is.
    """
    if not on or device.type != "cuda":
        return functions
    recordings = Recordings()
    return [Recorded(function, recordings) for function in functions]


class Recordings:
    """The CUDA graphs of several functions, and the memory that they share.

    They never run at the same time, and results are copied before the next one runs.
    """

    def __init__(self):
        self.known = set()  # (function, shapes) that have been met
        self.graphs = {}
        self.let_go()

    def let_go(self):
        """Forget all graphs, so that their memory is free; each is recorded again when next met."""
        if self.graphs:
            torch.cuda.synchronize()  # one of them may be at work
        self.graphs = {}
        self.pool = torch.cuda.graph_pool_handle()  # the old one ends with its last graph


class Recorded:
    """A function of tensors with a CUDA graph for each set of shapes that is not new to it."""

    def __init__(self, function, recordings):
        self.function = function
        self.recordings = recordings

    def __call__(self, *inputs):
        key = (self.function, *((x.shape, x.dtype) for x in inputs))
        if key not in self.recordings.known:
            self.recordings.known.add(key)
            self.recordings.let_go()  # a plain pass finds no room beside what graphs keep
            start = time.perf_counter()
            output = self.function(*inputs)
            self.tell(len(inputs[0]), time.perf_counter() - start)
            return output
        graphs = self.recordings.graphs
        if key not in graphs:
            graphs[key] = self.record(inputs)
        graph, static, output = graphs[key]
        torch._foreach_copy_(static, inputs)
        graph.replay()
        if torch.is_tensor(output):
            return output.clone()
        return tuple(tensor.clone() for tensor in output)

    def tell(self, count, seconds):
        """Say how long a first pass took: where it is compiled, the first steps take minutes."""
        if seconds > 2 and is_rank_0():
            name = self.function.__name__
            tqdm.write(f"first {name} of {count} pictures: {seconds:.0f} s", file=sys.stderr)

    def record(self, inputs):
        """-> (graph, its input tensors, its output)"""
        static = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        why = None
        try:
            # thread_local: NCCL's thread may go on
            with torch.cuda.graph(graph, self.recordings.pool, capture_error_mode="thread_local"):
                try:
                    output = self.function(*static)
                except BaseException as e:
                    why = e
                    raise
        except BaseException as e:
            # A recording whose function has failed may fail, too, as it ends, and hide why.
            raise (why or e) from None
        return graph, static, output


# ---- a look at the generator ---------------------------------------------------------------------
@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # not worth compiling for eight pictures
def preview(base, adapters, rows, args, name):
    """Eight fixed prompts and seeds through the generator as it is now; rank 0 only.

    They go to out_dir/samples/name.png, whose path is returned.
    """
    if not is_rank_0():
        return None
    levels = base.levels(args.num_steps)
    rng = seeded_rng(base.device, "preview", args.seed)
    text = base.encode([rows[i * len(rows) // 8]["prompt"] for i in range(8)])
    shape = (8, *base.latent_shape)
    noise = [torch.randn(shape, generator=rng, device=base.device) for _ in levels]
    student = base.velocity(adapters, text)
    path = rollout(student, noise[0], levels, args.num_steps, args.eta, noise[1:])
    picture = f"{args.out_dir}/samples/{name}.png"
    save_grid(decode_each(base, path[-1]), picture)
    return picture
