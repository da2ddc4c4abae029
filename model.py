"""What touches the transformer: loading, adapters and their roles, velocity, text, decoding.

One frozen transformer plays every role. Which one is said at the call, by the list of adapters that
add to it: `play(transformer, ["generator"], text)` is the student, `play(transformer, [], text,
negative, cfg)` the teacher with guidance.
"""

import gc
import hashlib
import os
import warnings

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging as diffusers_logging
from diffusers.utils import make_image_grid
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from checkpoint import read_adapter, settled_alpha
from common import all_reduce, as_bytes, die, generator, is_rank_0, note, write_atomically
from cps import at_least_float32, rollout, sigmas

# Several adapters on one base is what we want.
warnings.filterwarnings("ignore", message="Already found a `peft_config`")

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


# ---- loading -------------------------------------------------------------------------------------
def check_levels(args):
    """Die where the sampling grid leaves no room between its first step and pure noise."""
    if sigmas(args.num_steps, args.shift)[1] > 0.96:
        die(
            f"--num_steps {args.num_steps} with --shift {args.shift:g}: the first step ends above "
            "noise level .96, which leaves no room to re-noise"
        )


def load_pipeline(args, device):
    """The diffusers pipeline, frozen; bf16 on a GPU, float32 elsewhere.

    With --cache_text the transformer stays on the CPU until `text_encoder` has made room for it.
    Dies with one line where the directory or the repository is none, or --resolution does not fit.
    """
    for logging in (transformers_logging, diffusers_logging):
        logging.set_verbosity_error()  # else what the tokenizers cut off is printed, prompt by prompt
        logging.disable_progress_bar()
    from diffusers import StableDiffusion3Pipeline

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        index = StableDiffusion3Pipeline.load_config(args.pretrained)
        absent = {}
        for name in ("text_encoder_3", "tokenizer_3"):  # some come without T5, which has to be said
            if not (index.get(name) or [None])[0]:
                absent[name] = None
        pipe = StableDiffusion3Pipeline.from_pretrained(args.pretrained, dtype=dtype, **absent)
        encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
        for module in (pipe.transformer, pipe.vae, *encoders):
            if module is not None:
                waits = module is pipe.transformer and getattr(args, "cache_text", False)
                module.requires_grad_(False).eval().to("cpu" if waits else device)
    except Exception as e:  # a directory can be wrong in a dozen ways
        reason = str(e).splitlines()[0][:200]
        die(
            f"--pretrained {args.pretrained} cannot be loaded; it must be a pipeline directory or "
            f"a hub id ({reason})",
            local=isinstance(e, torch.cuda.OutOfMemoryError),
        )
    unit = pipe.vae_scale_factor * pipe.transformer.config.patch_size
    most = unit * pipe.transformer.config.pos_embed_max_size
    if args.resolution % unit or args.resolution > most:
        die(
            f"--resolution {args.resolution} must be divisible by {unit} and at most {most} for "
            "this model's VAE and patches"
        )
    if args.compile or (args.compile is None and device.type == "cuda"):
        compile_blocks(pipe)
    if getattr(args, "gradient_checkpointing", False):
        checkpoint_activations(pipe.transformer)
    side = args.resolution // pipe.vae_scale_factor
    pipe.latent_shape = (pipe.transformer.config.in_channels, side, side)
    pipe.low_memory = getattr(args, "low_memory", False)
    pipe.transformer.lora_layers = []
    return pipe


def compile_blocks(pipe):
    """Compile block by block: one graph serves all blocks of a kind.

    A role, a batch size, with or without gradient: a graph each, compiled when first met, and never
    a slower one for "any size" in their place.
    """
    config = torch._dynamo.config
    config.cache_size_limit = 1000  # since torch 2.7 also "recompile_limit"
    config.accumulated_cache_size_limit = 1000
    for module in (*pipe.transformer.transformer_blocks, pipe.vae.decoder):
        module.compile(dynamic=False)
    pipe.vae.to(memory_format=torch.channels_last)


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
def add_adapter(transformer, name, args, init_std=None, dtype=torch.float32):
    """Put a fresh LoRA under `name`; it changes nothing yet, since its B is 0.

    init_std: A ~ N(0, init_std^2); None leaves peft's own gaussian, N(0, 1/rank^2). It matters: B
    moves by lr an update whatever its gradient, so that the weights move by lr times A.
    """
    digest = hashlib.sha256(f"{args.seed}/{name}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:4], "big"))  # the same on all ranks
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=TARGETS,
    )
    transformer.add_adapter(config, name)
    adopt_layers(transformer)
    for key, p in adapter(transformer, name).items():
        p.data = p.data.to(dtype)
        if init_std is not None and ".lora_A." in key:
            p.data *= init_std * args.lora_rank


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
    """Freeze everything but these adapters -> a list of parameters for each.

    Each has a .grad of zeros that stays where it is: a recorded pass adds to that very tensor.
    """
    transformer.requires_grad_(False)
    lists = []
    for name in names:
        parameters = list(adapter(transformer, name).values())
        for p in parameters:
            p.requires_grad_(True)
            p.grad = torch.zeros_like(p)
        lists.append(parameters)
    return lists


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
# Forwards of the transformer so far, in pictures, for --bench. With gradient they count twice, for
# the backward pass.
evaluated = [0]


def play(transformer, adapters, text, negative=None, cfg=1.0):
    """The velocity function of the transformer in one role: v(x [B,C,H,W], sigma float or [B]).

    It returns float32 like x (float64 stays float64). text, negative: (prompt_embeds [B or 1,L,D],
    pooled [B or 1,P]). With negative there is classifier-free guidance, both halves in one pass.
    """

    def velocity(x, sigma):
        set_adapters(transformer, adapters)
        n = len(x)
        embeds, pooled = (repeated(tensor, n) for tensor in text)
        if torch.is_tensor(sigma):
            timestep = 1000 * at_least_float32(sigma).expand(n)
        else:
            timestep = torch.full((n,), 1000 * sigma, device=x.device)
        if negative is not None:
            x = torch.cat([x, x])
            timestep = torch.cat([timestep, timestep])
            embeds = torch.cat([repeated(negative[0], n), embeds])
            pooled = torch.cat([repeated(negative[1], n), pooled])
        evaluated[0] += len(x) * (2 if torch.is_grad_enabled() else 1)
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
            return self.function(*inputs)
        if self.graphs[key] is None:
            self.graphs[key] = self.record(inputs)
        graph, static, output, count = self.graphs[key]
        torch._foreach_copy_(static, inputs)
        graph.replay()
        evaluated[0] += count
        if torch.is_tensor(output):
            return output.clone()
        return tuple(tensor.clone() for tensor in output)

    def record(self, inputs):
        """-> (graph, its input tensors, its output, how many forwards it counts for)"""
        static = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        before = evaluated[0]
        # thread_local: NCCL's thread may go on
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = self.function(*static)
        count = evaluated[0] - before
        evaluated[0] = before
        return graph, static, output, count


# ---- text ----------------------------------------------------------------------------------------
KEPT_PROMPTS = 256  # of the last so many prompts the encoding is kept
TEXT_BATCH = 32  # prompts encoded at once on a GPU


def text_encoder(pipe, args, prompts=()):
    """-> a function encode(prompts) -> (prompt_embeds [B,L,D], pooled [B,P]).

    Each prompt is encoded once. With --cache_text all `prompts` are encoded now, into a file, and
    the text encoders are freed.
    """
    if getattr(args, "cache_text", False):
        return TextTable(pipe, args, prompts)
    return TextEncoder(pipe, args.max_sequence_length)


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
        self.cache = {}

    def __call__(self, prompts):
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.cache]
        # On a CPU one by one: a prompt's encoding does not depend on its company, to the last bit,
        # and so a resumed run is exact.
        n = TEXT_BATCH if self.pipe.vae.device.type == "cuda" else 1
        for i in range(0, len(new), n):
            batch = new[i : i + n]
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

    def __init__(self, pipe, args, prompts):
        self.device = pipe.vae.device
        self.rows = {}
        for prompt in [*prompts, ""]:
            self.rows.setdefault(prompt, len(self.rows))
        embeds, pooled = encoded(pipe, [""], args.max_sequence_length)
        self.shape = embeds.shape[1:]
        self.split = embeds[0].numel()
        width = embeds.numel() + pooled.numel()
        path = f"{args.out_dir}/text.bin"
        n_bytes = len(self.rows) * width * embeds.element_size()
        try:
            # all of it now: a memory map over a full disk ends in a bus error
            with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "rb") as file:
                os.posix_fallocate(file.fileno(), 0, n_bytes)
        except OSError as e:
            die(f"--cache_text needs {n_bytes / 1e9:.1f} GB in {args.out_dir} ({e.strerror})")
        size = len(self.rows) * width
        table = torch.from_file(path, shared=True, size=size, dtype=embeds.dtype)
        self.table = table.view(len(self.rows), width)
        self.fill(pipe, args.max_sequence_length)
        self.make_room(pipe, args.pretrained)

    def fill(self, pipe, max_sequence_length):
        """Encode this process's share of the prompts, then wait for those of the others."""
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        todo = list(self.rows)[local_rank::processes]
        silent = None if local_rank == 0 else True
        for i in tqdm(range(0, len(todo), TEXT_BATCH), desc="text", disable=silent):
            batch = todo[i : i + TEXT_BATCH]
            embeds, pooled = encoded(pipe, batch, max_sequence_length)
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
            reason = str(e).splitlines()[0][:200]
            die(f"--pretrained {pretrained}: no room for its transformer ({reason})", local=True)

    def __call__(self, prompts):
        found = self.table[[self.rows[prompt] for prompt in prompts]].to(self.device)
        return found[:, : self.split].unflatten(1, self.shape), found[:, self.split :]


def note_prompts(pipe, rows, args):
    """Say how many prompts are longer than what the text encoders read, and how many are repeated.

    On rank 0 only.
    """
    if not is_rank_0() or not rows:
        return
    prompts = [row["prompt"] for row in rows]
    limits = (
        (pipe.tokenizer, pipe.tokenizer_max_length),
        (pipe.tokenizer_3, args.max_sequence_length),
    )
    too_long = [False] * len(prompts)
    for tokenizer, limit in limits:
        if tokenizer:
            for i, ids in enumerate(tokenizer(prompts).input_ids):
                too_long[i] |= len(ids) > limit
    if any(too_long):
        note(
            f"{sum(too_long)} of {len(prompts)} prompts are longer than CLIP's "
            f"{pipe.tokenizer_max_length} or T5's {args.max_sequence_length} tokens: "
            "the rest is not read"
        )
    repeated_prompts = len(prompts) - len(set(prompts))
    if repeated_prompts:
        note(f"{repeated_prompts} of {len(prompts)} prompts are repeated: each counts")


# ---- pictures ------------------------------------------------------------------------------------
def decode(pipe, latents):
    """Latents [B,C,h,w] -> pictures [B,3,H,W] in [0,1], float32, differentiable."""
    config = pipe.vae.config
    latents = (latents / config.scaling_factor + config.shift_factor).to(pipe.vae.dtype)

    def run(z):
        return pipe.vae.decode(z).sample

    if pipe.low_memory:
        # One by one, and again in the backward pass: the activations of one picture at a time.
        pictures = [
            torch.utils.checkpoint.checkpoint(run, z, use_reentrant=False, preserve_rng_state=False)
            for z in latents.split(1)
        ]
        pictures = torch.cat(pictures)
    else:
        pictures = run(latents)
    return (at_least_float32(pictures) / 2 + 0.5).clamp(0, 1)


def save_grid(pictures, path, columns=8):
    """[B,3,H,W] in [0,1] -> one PNG; small pictures are magnified to 64 pixels."""
    arrays = VaeImageProcessor.pt_to_numpy(pictures.detach().float())
    images = VaeImageProcessor.numpy_to_pil(arrays)
    columns = min(columns, len(images))
    size = images[0].size
    images += [Image.new("RGB", size, "white")] * (-len(images) % columns)
    rows = len(images) // columns
    grid = make_image_grid(images, rows, columns, resize=max(64, size[0]))
    write_atomically({path: as_bytes(grid.save, format="png")})


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # not worth compiling for eight pictures
def preview(pipe, adapters, encode, rows, args, name):
    """Eight fixed prompts and seeds through the generator as it is now; rank 0 only.

    They go to out_dir/samples/name.png.
    """
    if not is_rank_0():
        return
    device = pipe.transformer.device
    levels = sigmas(args.num_steps, args.shift)
    rng = generator(device, "preview", args.seed)
    text = encode([rows[i * len(rows) // 8]["prompt"] for i in range(8)])
    noise = [torch.randn(8, *pipe.latent_shape, generator=rng, device=device) for _ in levels]
    student = play(pipe.transformer, adapters, text)
    path = rollout(student, noise[0], levels, args.num_steps, args.eta, noise[1:])
    save_grid(decode(pipe, path[-1]), f"{args.out_dir}/samples/{name}.png")
