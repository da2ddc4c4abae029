"""What touches the transformer: loading, adapters and their roles, velocity, text, decoding.

One frozen transformer plays every role. Which one is said at the call, by the list of adapters that
add to it: `play(transformer, ["generator"], text)` is the student, `play(transformer, [], text,
negative, cfg)` the teacher with guidance.
"""

import gc
import hashlib
import os
import re
import sys
import time
import warnings

import torch
import torch.nn.functional as F
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import logging as hub_logging
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from checkpoint import SETTINGS_NAME, read_adapter, settled_alpha
from common import (
    all_reduce,
    die,
    first_line,
    is_first_here,
    is_rank_0,
    note,
    reserve,
    seeded_rng,
    sides,
)
from cps import at_least_float32, rollout, sigmas
from hub import files_on_hub, in_words, is_hub_id
from pictures import decode, quicken, save_grid

# Before anything is loaded, the models of rewards too: else there are progress bars, and what the
# tokenizers cut off is printed, prompt by prompt.
hub_logging.set_verbosity_error()
for logging in (transformers_logging, diffusers_logging):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
# Several adapters on one base is what we want; of the others nothing is for a user of ours to do.
for beginning in ("Already found a `peft_config`", "The `local_dir_use_symlinks`"):
    warnings.filterwarnings("ignore", message=beginning)

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


# ---- the base model ------------------------------------------------------------------------------
MOST_TEXT_TOKENS = 128  # of T5, the release's limit; a base whose tokenizer allows fewer has fewer


class StableDiffusion3:
    """A base model as the programs see it: levels, text, velocity, pictures, adapters.

    Another kind of base is another class with these methods and attributes: the stages know no more.

        latent_shape    (C, h, w) of a picture's latents
        shift           time shift of the sampling grid, the base's own
        levels(K)       noise levels of K sampling steps
        encode          prompts -> text, a tuple of tensors with one row a prompt
        velocity        adapters, text -> v(x, sigma): one role of the transformer
        decode          latents -> pictures

    compile: compile the blocks and the decoder. cache_text: the transformer stays on the CPU until
    `cache_texts` has made room for it. low_memory: activations are computed again in the backward
    pass, and pictures decoded one by one. Dies with one line where the directory or the repository is
    no such pipeline, or the resolution does not fit.
    """

    def __init__(
        self, pretrained, device, resolution, compile=False, cache_text=False, low_memory=False
    ):
        self.pretrained = pretrained
        self.device = device
        self.low_memory = low_memory
        self.pipe = load_pipeline(pretrained, device, transformer_waits=cache_text)
        self.transformer = self.pipe.transformer
        self.latent_shape = latent_shape(self.pipe, resolution)
        self.shift = self.pipe.scheduler.config.shift
        self.encode = TextEncoder(self.pipe, text_tokens(self.pipe.tokenizer_3))
        self.empty_text = None  # of classifier-free guidance, encoded when first needed
        if compile:
            compile_blocks(self.pipe)
        if low_memory:
            checkpoint_activations(self.transformer)

    def levels(self, num_steps):
        """Noise levels of `num_steps` sampling steps; dies where the first leaves no room above it."""
        levels = sigmas(num_steps, self.shift)
        if levels[1] > 0.96:
            die(
                f"--num_steps {num_steps} with this model's time shift {self.shift:g}: the first step "
                "ends above noise level .96, which leaves no room to re-noise"
            )
        return levels

    def cache_texts(self, prompts, path):
        """Encode all prompts now, into a file, and free the text encoders; see TextTable."""
        n_tokens = self.encode.max_sequence_length
        self.encode = TextTable(self.pipe, n_tokens, prompts, path, self.pretrained)
        self.empty_text = None

    def velocity(self, adapters, text, cfg=1.0):
        """The velocity function of the transformer with these adapters; with guidance if cfg is not 1."""
        if cfg == 1:
            return play(self.transformer, adapters, text)
        if self.empty_text is None:
            self.empty_text = self.encode([""])
        return play(self.transformer, adapters, text, self.empty_text, cfg)

    def decode(self, latents):
        """Latents [B,C,h,w] -> pictures [B,3,H,W] in [0,1], float32, differentiable."""
        return decode(self.pipe, latents, one_by_one=self.low_memory)

    def add_adapter(self, name, rank, alpha, seed, init_std=None):
        add_adapter(self.transformer, name, rank, alpha, seed, init_std)

    def load_adapter(self, name, path, given_alpha=None):
        load_adapter(self.transformer, name, path, given_alpha)

    def adapter(self, name):
        return adapter(self.transformer, name)

    def train_only(self, *names):
        return train_only(self.transformer, *names)


def load_base(args, device, prompts):
    """The base model as the flags of a stage ask for it, its text encoders freed with --cache_text."""
    if os.path.exists(os.path.join(args.pretrained, SETTINGS_NAME)):
        note(
            f"--pretrained {args.pretrained} is a few-step generator, says its {SETTINGS_NAME}; as the "
            f"teacher it is guided with --cfg {args.cfg:g}"
        )
    base = StableDiffusion3(
        args.pretrained,
        device,
        args.resolution,
        compile=bool(args.compile) and device.type == "cuda",
        cache_text=args.cache_text,
        low_memory=args.low_memory,
    )
    if args.cache_text:
        base.cache_texts(prompts, f"{args.out_dir}/text.bin")
    return base


def load_pipeline(pretrained, device, transformer_waits=False):
    """The diffusers pipeline, frozen; bf16 on a GPU, float32 elsewhere.

    transformer_waits: it stays on the CPU. Dies with one line where the directory or the repository
    is none.
    """
    from diffusers import StableDiffusion3Pipeline

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    here = os.path.isdir(pretrained)
    if not here and not is_hub_id(pretrained):
        die(f"--pretrained {pretrained}: no such directory, nor a hub id (owner/name)")
    try:
        names = files_under(pretrained) if here else files_on_hub(pretrained)
        if names is None:
            names = files_in_cache(pretrained)
        index = StableDiffusion3Pipeline.load_config(pretrained)
        absent = {}
        for name in ("text_encoder_3", "tokenizer_3"):  # some come without T5, which has to be said
            if not (index.get(name) or [None])[0]:
                absent[name] = None
        pipe = StableDiffusion3Pipeline.from_pretrained(
            pretrained, dtype=dtype, variant=variant_of(names), **absent
        )
        encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
        for module in (pipe.transformer, pipe.vae, *encoders):
            if module is not None:
                waits = module is pipe.transformer and transformer_waits
                module.requires_grad_(False).eval().to("cpu" if waits else device)
    except Exception as e:  # a directory can be wrong in a dozen ways
        die(
            f"--pretrained {pretrained}, which must be a pipeline of Stable Diffusion 3, cannot be "
            f"loaded: {in_words(e, pretrained)}",
            local=isinstance(e, torch.cuda.OutOfMemoryError),
        )
    pipe.transformer.lora_layers = []  # kept by adopt_layers, for set_adapters
    return pipe


def files_under(folder):
    """The names of all files in a directory, as a hub repository would list them."""
    found = []
    for place, _, names in os.walk(folder):
        found += [os.path.relpath(os.path.join(place, name), folder) for name in names]
    return found


def files_in_cache(repository):
    """The names of a repository's files that the hub's cache has, or None where it has none."""
    index = try_to_load_from_cache(repository, "model_index.json")
    return files_under(os.path.dirname(index)) if isinstance(index, str) else None


def variant_of(names):
    """ "fp16" for a base whose transformer is there in that variant alone, else None.

    names: of its files, as from `files_under`; None where they are not known.
    """
    weights = [
        name for name in names or () if re.match(r"transformer[/\\].*\.(safetensors|bin)", name)
    ]
    if weights and all(re.search(r"\.fp16[.-]", name) for name in weights):
        return "fp16"
    return None


def latent_shape(pipe, resolution):
    """(C, h, w) of a picture's latents; dies where one of its sides does not fit the model."""
    unit = pipe.vae_scale_factor * pipe.transformer.config.patch_size
    most = unit * pipe.transformer.config.pos_embed_max_size
    height, width = sides(resolution)
    if height % unit or width % unit or max(height, width) > most:
        die(
            f"--resolution {resolution} must be divisible by {unit} and at most {most} for "
            "this model's VAE and patches"
        )
    channels = pipe.transformer.config.in_channels
    return channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor


def text_tokens(tokenizer):
    """How many T5 tokens of a prompt are read; tokenizer: T5's, None where the base has none."""
    if tokenizer is None:
        return MOST_TEXT_TOKENS
    return min(MOST_TEXT_TOKENS, tokenizer.model_max_length)


def compile_blocks(pipe):
    """Compile block by block: one graph serves all blocks of a kind.

    A role, a batch size, with or without gradient: a graph each, compiled when first met, and never
    a slower one for "any size" in their place.
    """
    config = torch._dynamo.config
    config.cache_size_limit = 1000  # since torch 2.7 also "recompile_limit"
    config.accumulated_cache_size_limit = 1000
    quicken(pipe.vae)
    for module in (*pipe.transformer.transformer_blocks, pipe.vae.decoder):
        module.compile(dynamic=False)


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


# ---- adapters ------------------------------------------------------------------------------------
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
        target_modules=TARGETS,
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
    usual = [name for name in shapes if name.endswith(endings)]
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


class LoraLinear(PeftLinear):
    """peft's adapted matrix, W x + sum of scaling B A x over the active adapters, in fewer products.

    One pair of small products serves all of them: stage 2's stacked adapters cost no more than one.
    (A class, not a function for each layer: the compiler's graph of a block serves all blocks like
    it.) Called under `play`'s autocast. peft's flags for disabled and merged adapters are not looked
    at.
    """

    fixed = {}  # {adapters: their pair}, where it no longer changes (sample.py)

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
        y = self.base_layer(x)
        names = self._active_adapter
        if not self.present(names):
            return y
        A, B = self.fixed.get(tuple(names)) or self.pair(names)
        A, B = A.to(x.dtype), B.to(x.dtype)  # bf16 adapters in a float32 model
        return y + F.linear(F.linear(x, A), B)


def train_only(transformer, *names):
    """Freeze everything but these adapters -> one flat parameter for each, all its matrices in a row.

    The matrices are views of it, and their gradients views of its .grad. So the optimiser, the average
    and the sum over ranks are one operation each, not one a matrix. The gradient is 0 and stays where
    it is: a recorded pass adds to that very tensor.
    """
    transformer.requires_grad_(False)
    trained = []
    for name in names:
        matrices = list(adapter(transformer, name).values())
        flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in matrices]))
        flat.grad = torch.zeros_like(flat)
        sizes = [p.numel() for p in matrices]
        places = zip(matrices, flat.detach().split(sizes), flat.grad.split(sizes))
        for p, values, gradient in places:
            p.data = values.view_as(p)
            p.requires_grad_(True)
            p.grad = gradient.view_as(p)
        trained.append(flat)
    return trained


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


# ---- velocity ------------------------------------------------------------------------------------
def play(transformer, adapters, text, negative=None, cfg=1.0):
    """The velocity function of the transformer in one role: v(x [B,C,H,W], sigma float or [B]).

    It returns float32 like x (float64 stays float64). text, negative: (prompt_embeds [B or 1,L,D],
    pooled [B or 1,P]). With negative there is classifier-free guidance, both halves in one pass.
    v(x, sigma, rows): with those rows of the text alone.
    """

    def velocity(x, sigma, rows=None):
        set_adapters(transformer, adapters)
        n = len(x)
        own_text = text if rows is None else [tensor[rows] for tensor in text]
        embeds, pooled = (repeated(tensor, n) for tensor in own_text)
        if torch.is_tensor(sigma):
            timestep = 1000 * at_least_float32(sigma).expand(n)
        else:
            timestep = torch.full((n,), 1000 * sigma, device=x.device)
        if negative is not None:
            x = torch.cat([x, x])
            timestep = torch.cat([timestep, timestep])
            embeds = torch.cat([repeated(negative[0], n), embeds])
            pooled = torch.cat([repeated(negative[1], n), pooled])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            v = transformer(
                hidden_states=x.to(embeds.dtype),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=timestep,
                return_dict=False,
            )[0]
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
    plain one (it compiles), the second is recorded, all others are replayed. So whatever a function
    reads besides its inputs, weights and .grad, must stay where it is, and its Python is not run
    again.
    """
    if not on or device.type != "cuda":
        return functions
    # One pool for all: they never run at the same time, and results are copied before the next runs.
    pool = torch.cuda.graph_pool_handle()
    return [Recorded(function, pool) for function in functions]


class Recorded:
    """A function of tensors with a CUDA graph for each set of shapes that it has met twice."""

    def __init__(self, function, pool):
        self.function = function
        self.pool = pool
        self.graphs = {}

    def __call__(self, *inputs):
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self.graphs:
            self.graphs[key] = None
            start = time.perf_counter()
            output = self.function(*inputs)
            self.tell(len(inputs[0]), time.perf_counter() - start)
            return output
        if self.graphs[key] is None:
            self.graphs[key] = self.record(inputs)
        graph, static, output = self.graphs[key]
        torch._foreach_copy_(static, inputs)
        graph.replay()
        if torch.is_tensor(output):
            return output.clone()
        return tuple(tensor.clone() for tensor in output)

    def tell(self, count, seconds):
        """Say that a pass was compiled: the first steps of a run take minutes."""
        if seconds > 2 and is_rank_0():
            name = self.function.__name__
            tqdm.write(f"compiled: {name} of {count} pictures, {seconds:.0f} s", file=sys.stderr)

    def record(self, inputs):
        """-> (graph, its input tensors, its output)"""
        static = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's thread may go on
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = self.function(*static)
        return graph, static, output


# ---- text ----------------------------------------------------------------------------------------
KEPT_PROMPTS = 256  # of the last so many prompts the encoding is kept
TEXT_BATCH = 32  # prompts encoded at once on a GPU


@torch.no_grad()
def encoded(pipe, prompts, max_sequence_length):
    """Fresh from the text encoders -> (prompt_embeds [B,L,D], pooled [B,P])"""
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts,
        None,
        None,
        device=pipe.vae.device,
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
    )
    return embeds, pooled


class TextEncoder:
    """encode(prompts), with the encodings of the last KEPT_PROMPTS kept on the device."""

    def __init__(self, pipe, max_sequence_length):
        self.pipe = pipe
        self.max_sequence_length = max_sequence_length
        # On a CPU one by one: a prompt's encoding does not depend on its company, to the last bit,
        # and so a resumed run is exact.
        self.at_once = TEXT_BATCH if pipe.vae.device.type == "cuda" else 1
        self.cache = {}

    def __call__(self, prompts):
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.cache]
        for i in range(0, len(new), self.at_once):
            batch = new[i : i + self.at_once]
            embeds, pooled = encoded(self.pipe, batch, self.max_sequence_length)
            self.cache.update(zip(batch, zip(embeds, pooled)))
        found = [self.cache[prompt] for prompt in prompts]
        for prompt in list(self.cache)[: max(0, len(self.cache) - KEPT_PROMPTS)]:
            del self.cache[prompt]
        embeds, pooled = zip(*found)
        return torch.stack(embeds), torch.stack(pooled)


class TextTable:
    """encode(prompts) from a table on disk, which the processes of a machine share.

    It takes 1.7 MB a prompt for SD3.5-M. The encoders, most of which is T5-XXL's 9 GB, are freed, and
    the transformer comes to the device in their place. Dies where the disk or the GPU has no room.
    """

    def __init__(self, pipe, max_sequence_length, prompts, path, pretrained):
        self.device = pipe.vae.device
        self.max_sequence_length = max_sequence_length
        self.rows = {}
        for prompt in [*prompts, ""]:
            self.rows.setdefault(prompt, len(self.rows))
        embeds, pooled = encoded(pipe, [""], max_sequence_length)
        self.shape = embeds.shape[1:]
        self.split = embeds[0].numel()
        width = embeds.numel() + pooled.numel()
        n_bytes = len(self.rows) * width * embeds.element_size()
        try:
            if is_first_here():  # all of it: a memory map over a full disk ends in a bus error
                reserve(path, n_bytes)
        except OSError as e:
            die(f"--cache_text needs {n_bytes / 1e9:.1f} GB for {path} ({e.strerror})")
        all_reduce(torch.zeros(1, device=self.device)).item()  # nobody writes before it is there
        size = len(self.rows) * width
        table = torch.from_file(path, shared=True, size=size, dtype=embeds.dtype)
        self.table = table.view(len(self.rows), width)
        self.fill(pipe)
        self.make_room(pipe, pretrained)

    def fill(self, pipe):
        """Encode this process's share of the prompts, then wait for those of the others."""
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        todo = list(self.rows)[local_rank::processes]
        silent = None if local_rank == 0 else True
        for i in tqdm(range(0, len(todo), TEXT_BATCH), desc="text", disable=silent):
            batch = todo[i : i + TEXT_BATCH]
            embeds, pooled = encoded(pipe, batch, self.max_sequence_length)
            places = [self.rows[prompt] for prompt in batch]
            self.table[places] = torch.cat([embeds.flatten(1), pooled], 1).cpu()
        all_reduce(torch.zeros(1, device=self.device)).item()  # .item(): the host waits, too

    def make_room(self, pipe, pretrained):
        """Free the text encoders and bring the transformer to the device."""
        pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None
        gc.collect()
        torch.cuda.empty_cache()
        try:
            pipe.transformer.to(self.device)
        except torch.cuda.OutOfMemoryError as e:
            die(
                f"--pretrained {pretrained}: no room for its transformer ({first_line(e)})",
                local=True,
            )

    def __call__(self, prompts):
        places = torch.tensor([self.rows[prompt] for prompt in prompts])
        # Pinned: the copy to a GPU then neither waits for it nor goes through another buffer.
        found = torch.empty(
            (len(places), self.table.shape[1]),
            dtype=self.table.dtype,
            pin_memory=self.device.type == "cuda",
        )
        torch.index_select(self.table, 0, places, out=found)
        found = found.to(self.device, non_blocking=True)
        return found[:, : self.split].unflatten(1, self.shape), found[:, self.split :]


def note_prompts(base, rows):
    """Say how many prompts are longer than what the text encoders read, and how many are repeated.

    On rank 0 only.
    """
    if not is_rank_0() or not rows:
        return
    prompts = [row["prompt"] for row in rows]
    pipe = base.pipe
    t5_tokens = base.encode.max_sequence_length
    limits = ((pipe.tokenizer, pipe.tokenizer_max_length), (pipe.tokenizer_3, t5_tokens))
    too_long = [False] * len(prompts)
    for tokenizer, limit in limits:
        if tokenizer:
            for i, ids in enumerate(tokenizer(prompts).input_ids):
                too_long[i] |= len(ids) > limit
    if any(too_long):
        note(
            f"{sum(too_long)} of {len(prompts)} prompts are longer than CLIP's "
            f"{pipe.tokenizer_max_length} or T5's {t5_tokens} tokens: "
            "the rest is not read"
        )
    repeated_prompts = len(prompts) - len(set(prompts))
    if repeated_prompts:
        note(f"{repeated_prompts} of {len(prompts)} prompts are repeated: each counts")


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
    save_grid(base.decode(path[-1]), picture)
    return picture
