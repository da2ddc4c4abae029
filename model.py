"""What touches the transformer: loading, adapters and their roles, velocity, text, decoding, CUDA graphs."""
import functools
import gc
import hashlib
import os
import sys
import warnings

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging as diffusers_logging, make_image_grid
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from checkpoint import read_adapter, settled_alpha
from common import all_reduce, as_bytes, die, generator, note, write_atomically
from cps import at_least_float32, rollout, sigmas

warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters on one base is what we want

TARGETS = ["attn." + name for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]


def check_levels(args):
    """Die where the sampling grid leaves no room between its first step and pure noise."""
    if sigmas(args.num_steps, args.shift)[1] > 0.96:
        die(
            f"--num_steps {args.num_steps} with --shift {args.shift:g}: the first step ends above noise level .96, "
            "which leaves no room to re-noise"
        )


def load_pipeline(args, device):
    """The diffusers pipeline, frozen; bf16 on a GPU, float32 elsewhere."""
    for logging in (transformers_logging, diffusers_logging):  # diffusers would print what the tokenizers cut off, prompt by prompt
        logging.set_verbosity_error(), logging.disable_progress_bar()
    from diffusers import StableDiffusion3Pipeline
    try:
        index = StableDiffusion3Pipeline.load_config(args.pretrained)  # some come without T5, which has to be said
        none = {name: None for name in ("text_encoder_3", "tokenizer_3") if not (index.get(name) or [None])[0]}
        pipe = StableDiffusion3Pipeline.from_pretrained(args.pretrained, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, **none)
        for module in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
            if module is not None:
                later = module is pipe.transformer and getattr(args, "cache_text", False)  # when `text_encoder` has made room for it
                module.requires_grad_(False).eval().to("cpu" if later else device)
    except Exception as e:  # a directory can be wrong in a dozen ways
        die(f"--pretrained {args.pretrained} cannot be loaded; it must be a pipeline directory or a hub id ({str(e).splitlines()[0][:200]})",
            local=isinstance(e, torch.cuda.OutOfMemoryError))
    unit, most = pipe.vae_scale_factor * pipe.transformer.config.patch_size, pipe.transformer.config.pos_embed_max_size
    if args.resolution % unit or args.resolution > unit * most:
        die(f"--resolution {args.resolution} must be divisible by {unit} and at most {unit * most} for this model's VAE and patches")
    if args.compile or args.compile is None and device.type == "cuda":
        # Block by block: one graph serves all blocks of a kind. A role, a batch size, with or without gradient: a graph each, compiled when
        # first met, and never a slower one for "any size" in their place.
        torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = 1000  # since torch 2.7 also "recompile_limit"
        for module in (*pipe.transformer.transformer_blocks, pipe.vae.decoder):
            module.compile(dynamic=False)
        pipe.vae.to(memory_format=torch.channels_last)
    pipe.low_memory, pipe.transformer.lora_layers = getattr(args, "low_memory", False), []
    pipe.latent_shape = (pipe.transformer.config.in_channels, *[args.resolution // pipe.vae_scale_factor] * 2)
    if getattr(args, "gradient_checkpointing", False):
        def checkpoint(block, *inputs):  # recompute with the adapter of the forward pass, whichever is active by then
            adapters = pipe.transformer.lora_layers[0]._active_adapter
            run = lambda *inputs: (set_adapters(pipe.transformer, adapters), block(*inputs))[1]
            return torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
        pipe.transformer.enable_gradient_checkpointing(checkpoint)
    return pipe


def add_adapter(transformer, name, args, init_std=None, dtype=torch.float32):
    """Put a fresh LoRA under `name`; it changes nothing yet, since its B is 0.

    init_std: A ~ N(0, init_std^2); None leaves peft's own gaussian, N(0, 1/rank^2). It matters: B
    moves by lr an update whatever its gradient, so that the weights move by lr times A.
    """
    from peft import LoraConfig
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{args.seed}/{name}".encode()).digest()[:4], "big"))  # the same on all ranks
    transformer.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, init_lora_weights="gaussian", target_modules=TARGETS), name)
    adopt_layers(transformer)
    for key, p in adapter(transformer, name).items():
        p.data = p.data.to(dtype)
        if init_std is not None and ".lora_A." in key:
            p.data *= init_std * args.lora_rank


def load_adapter(transformer, name, path, given_alpha=None, assumed_alpha=64.0):
    """Put the adapter in a file under `name`, in float32: with the file's own modules and ranks, TARGETS or not.

    given_alpha: the user's own word, which wins; assumed_alpha: what is taken where nothing beside the file
    says it. Dies with one line if a single module has no place in this transformer; says in one line which
    of the modules that our stages train the file leaves out.
    """
    from peft import LoraConfig

    file = read_adapter(path)
    check_places(transformer, file)
    alpha = settled_alpha(file, given_alpha, assumed_alpha)
    usual = file.usual_rank
    usual_alpha = alpha.of("", usual)
    alphas = {module: alpha.of(module, rank) for module, rank in file.ranks.items()}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual_alpha,
        rank_pattern={module: rank for module, rank in file.ranks.items() if rank != usual},
        alpha_pattern={module: value for module, value in alphas.items() if value != usual_alpha},
        target_modules=list(file.weights),
    )
    transformer.add_adapter(config, name)
    adopt_layers(transformer)
    for module, (A, B) in file.weights.items():
        layer = transformer.get_submodule(module)
        for matrix, values in ((layer.lora_A[name].weight, A), (layer.lora_B[name].weight, B)):
            matrix.data = at_least_float32(values).to(matrix.device, copy=True)


def check_places(transformer, file):
    """Die unless every module of an AdapterFile is a matrix of this transformer, of the same shape. A note where it leaves some out."""
    matrices = {}  # {name: [out, in]}; a matrix that has an adapter already keeps its own name
    for module_name, module in transformer.named_modules():
        matrix = getattr(module, "base_layer", module)
        if isinstance(matrix, torch.nn.Linear) and ".lora_" not in module_name:
            matrices[module_name] = list(matrix.weight.shape)
    lost = [module for module in file.weights if module not in matrices]
    if lost:
        die(f"{file.path}: {len(lost)} of its {len(file.weights)} modules are not in this model, first: {lost[0]}. Is it of another model?")
    for module, (A, B) in file.weights.items():
        if [B.shape[0], A.shape[1]] != matrices[module]:
            die(f"{file.path}: {module} is {B.shape[0]} x {A.shape[1]} there and {matrices[module][0]} x {matrices[module][1]} in this model. "
                "Is it of another model?")
    usual = [module for module in matrices if module.endswith(tuple("." + target for target in TARGETS))]
    missing = [module for module in usual if module not in file.weights]
    if missing:
        note(f"{file.path} adapts {len(file.weights)} modules and leaves {len(missing)} of the usual {len(usual)} as they are, first: {missing[0]}")


def adopt_layers(transformer):
    """Give every adapted matrix our forward, and the transformer a list of them."""
    from peft.tuners.lora import LoraLayer

    transformer.lora_layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    for layer in transformer.lora_layers:
        layer.__class__ = lora_linear()


@functools.cache
def lora_linear():
    """peft's class of an adapted matrix, W x + sum of scaling B A x over the active adapters, with one pair of small products for all of them
    in place of one each: stage 2's stacked adapters cost no more than one. (A class, not a function for each layer: the compiler's graph of
    a block serves all blocks like it.) Called under `play`'s autocast; peft's flags for disabled and merged adapters are not looked at."""
    from peft.tuners.lora import Linear

    class LoraLinear(Linear):
        fixed = {}  # {adapters: their pair}, where it no longer changes (sample.py)

        def present(self, names):
            """Those of the adapters that this matrix has: files may adapt other matrices than our flags do."""
            return [name for name in names if name in self.lora_A]

        def pair(self, names):
            names = self.present(names)
            return (torch.cat([self.lora_A[name].weight for name in names]),
                    torch.cat([self.scaling[name] * self.lora_B[name].weight for name in names], 1))

        def forward(self, x):
            y, names = self.base_layer(x), self._active_adapter
            if not self.present(names):
                return y
            A, B = self.fixed.get(tuple(names)) or self.pair(names)
            A, B = A.to(x.dtype), B.to(x.dtype)  # bf16 adapters in a float32 model; autocast rounds as before
            return y + torch.nn.functional.linear(torch.nn.functional.linear(x, A), B)
    return LoraLinear


def train_only(transformer, *names):
    """Freeze everything but these adapters -> one list of parameters for each, with a .grad of zeros that stays where it is."""
    transformer.requires_grad_(False)
    lists = [[p.requires_grad_(True) for p in adapter(transformer, name).values()] for name in names]
    for p in sum(lists, []):
        p.grad = torch.zeros_like(p)
    return lists


def adapter(transformer, name):
    """{key in the published format: parameter} of one adapter, e.g. transformer_blocks.0.attn.to_q.lora_A.default.weight"""
    mark = f".{name}.weight"
    return {k[:-len(mark)] + ".default.weight": p for k, p in transformer.named_parameters() if k.endswith(mark) and ".lora_" in k}


def set_adapters(transformer, adapters):
    """Which LoRAs add to the base from now on. Unlike peft's set_adapter it leaves requires_grad alone: flipping that between
    forward and backward makes the gradient zero without any error."""
    for layer in transformer.lora_layers:
        layer._active_adapter = adapters


evaluated = [0]  # forwards of the transformer so far, in pictures; with gradient they count twice, for the backward pass. For --bench


def play(transformer, adapters, text, negative=None, cfg=1.0):
    """The velocity function of the transformer in one role: v(x [B,C,H,W], sigma float or [B]) -> float32 like x.

    text, negative: (prompt_embeds [B or 1,L,D], pooled [B or 1,P]); with negative, classifier-free guidance in one call.
    """
    def velocity(x, sigma):
        set_adapters(transformer, adapters)
        n = len(x)
        embeds, pooled = (e if len(e) == n else e.repeat(n // len(e), *[1] * (e.dim() - 1)) for e in text)
        timestep = 1000 * at_least_float32(sigma).expand(n) if torch.is_tensor(sigma) else torch.full((n,), 1000 * sigma, device=x.device)
        if negative is not None:
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
            embeds, pooled = (torch.cat([e.expand(n, *e.shape[1:]), p]) for e, p in zip(negative, (embeds, pooled)))
        evaluated[0] += len(x) * (2 if torch.is_grad_enabled() else 1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            v = transformer(hidden_states=x.to(embeds.dtype), encoder_hidden_states=embeds, pooled_projections=pooled,
                            timestep=timestep, return_dict=False)[0]
        v = at_least_float32(v)
        if negative is not None:
            without, with_text = v.chunk(2)
            v = without + cfg * (with_text - without)
        return v
    return velocity


def graphed(on, device, *functions):
    """On a GPU, functions of tensors -> the same as CUDA graphs: one launch in place of thousands, so that the GPU does not wait for Python.
    Elsewhere the functions themselves. They give back a tensor or a tuple of tensors.

    For each set of shapes the first call is a plain one (it compiles), the second is recorded, all others are replayed. So whatever the
    function reads besides its inputs, weights and .grad, must stay where it is, and its Python is not run again.
    """
    if not on or device.type != "cuda":
        return functions
    pool = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time, and results are copied before the next one runs

    def graph_of(function):
        graphs = {}

        def call(*inputs):
            key = tuple((x.shape, x.dtype) for x in inputs)
            if key not in graphs:
                graphs[key] = None
                return function(*inputs)
            if graphs[key] is None:
                static, graph, before = [x.clone() for x in inputs], torch.cuda.CUDAGraph(), evaluated[0]
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL's thread may go on
                    output = function(*static)
                graphs[key], evaluated[0] = (graph, static, output, evaluated[0] - before), before
            graph, static, output, count = graphs[key]
            torch._foreach_copy_(static, inputs)
            graph.replay()
            evaluated[0] += count
            return output.clone() if torch.is_tensor(output) else tuple(o.clone() for o in output)
        return call
    return [graph_of(function) for function in functions]


def text_encoder(pipe, args, prompts=()):
    """-> encode(prompts) -> (prompt_embeds [B,L,D], pooled [B,P]), each prompt encoded once; of the last 256 the result is kept.

    With --cache_text all `prompts` are encoded now, into a file in out_dir that the processes of a machine share (1.7 MB a prompt for
    SD3.5-M), and the encoders, most of which is T5-XXL's 9 GB, are freed.
    """
    cache, device = {}, pipe.vae.device

    @torch.no_grad()
    def fresh(prompts):
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=False,
                                                  max_sequence_length=args.max_sequence_length)
        return embeds, pooled

    def encode(prompts):
        new = [p for p in dict.fromkeys(prompts) if p not in cache]
        n = 32 if device.type == "cuda" else 1  # one by one, a prompt's embedding does not depend on its company: a resumed run is exact
        for i in range(0, len(new), n):
            cache.update(zip(new[i:i + n], zip(*fresh(new[i:i + n]))))
        embeds, pooled = (torch.stack(e) for e in zip(*(cache[p] for p in prompts)))
        for p in list(cache)[:max(0, len(cache) - 256)]:
            del cache[p]
        return embeds, pooled
    if not getattr(args, "cache_text", False):
        return encode

    rows, (embeds, pooled) = {p: i for i, p in enumerate(dict.fromkeys([*prompts, ""]))}, fresh([""])
    size, path = embeds.numel() + pooled.numel(), f"{args.out_dir}/text.bin"
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "rb") as f:  # all of it now: a memory map over a full disk ends in a bus error
            os.posix_fallocate(f.fileno(), 0, len(rows) * size * embeds.element_size())
    except OSError as e:
        die(f"--cache_text needs {len(rows) * size * embeds.element_size() / 1e9:.1f} GB in {args.out_dir} ({e.strerror})")
    table = torch.from_file(path, shared=True, size=len(rows) * size, dtype=embeds.dtype).view(len(rows), size)
    local, of = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    todo = list(rows)[local::of]
    for i in tqdm(range(0, len(todo), 32), desc="text", disable=None if local == 0 else True):
        embeds, pooled = fresh(todo[i:i + 32])
        table[[rows[p] for p in todo[i:i + 32]]] = torch.cat([embeds.flatten(1), pooled], 1).cpu()
    all_reduce(torch.zeros(1, device=device)).item()  # wait, on the host too, for the others' shares
    shape, split = embeds.shape[1:], embeds[0].numel()
    pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None
    gc.collect(), torch.cuda.empty_cache()
    try:
        pipe.transformer.to(device)
    except torch.cuda.OutOfMemoryError as e:
        die(f"--pretrained {args.pretrained}: no room for its transformer ({str(e).splitlines()[0][:200]})", local=True)

    def look_up(prompts):
        found = table[[rows[p] for p in prompts]].to(device)
        return found[:, :split].unflatten(1, shape), found[:, split:]
    return look_up


def note_prompts(pipe, rows, args):
    """Say how many prompts are longer than what the text encoders read, and how many are repeated; rank 0 only."""
    if os.environ.get("RANK", "0") != "0":
        return
    prompts, most = [row["prompt"] for row in rows], (pipe.tokenizer_max_length, args.max_sequence_length)
    over = [[len(ids) > limit for ids in tokenizer(prompts).input_ids] for tokenizer, limit in zip((pipe.tokenizer, pipe.tokenizer_3), most)
            if tokenizer and prompts]
    long, repeated = sum(map(any, zip(*over))), len(prompts) - len(set(prompts))
    for count, what in (long, f"longer than CLIP's {most[0]} or T5's {most[1]} tokens: the rest is not read"), (repeated, "repeated: each counts"):
        if count:
            print(f"note: {count} of {len(prompts)} prompts are {what}", file=sys.stderr, flush=True)


def decode(pipe, latents):
    """Latents [B,C,h,w] -> pictures [B,3,H,W] in [0,1], float32, differentiable."""
    config = pipe.vae.config
    latents = (latents / config.scaling_factor + config.shift_factor).to(pipe.vae.dtype)
    if pipe.low_memory:  # one by one, and again in the backward pass: the activations of one picture at a time
        run = lambda z: pipe.vae.decode(z).sample
        pictures = torch.cat([torch.utils.checkpoint.checkpoint(run, z, use_reentrant=False, preserve_rng_state=False) for z in latents.split(1)])
    else:
        pictures = pipe.vae.decode(latents).sample
    return (at_least_float32(pictures) / 2 + .5).clamp(0, 1)


def save_grid(pictures, path, columns=8):
    """[B,3,H,W] in [0,1] -> one PNG; small pictures are magnified to 64 pixels."""
    images = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pictures.detach().float()))
    columns, size = min(columns, len(images)), images[0].size
    images += [Image.new("RGB", size, "white")] * (-len(images) % columns)
    grid = make_image_grid(images, len(images) // columns, columns, resize=max(64, size[0]))
    write_atomically({path: as_bytes(grid.save, format="png")})


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # not worth compiling for eight pictures
def preview(pipe, adapters, encode, rows, args, name):
    """Eight fixed prompts and seeds through the generator as it is now -> out_dir/samples/name.png; rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        device, levels = pipe.transformer.device, sigmas(args.num_steps, args.shift)
        g, text = generator(device, "preview", args.seed), encode([rows[i * len(rows) // 8]["prompt"] for i in range(8)])
        noise = [torch.randn(8, *pipe.latent_shape, generator=g, device=device) for _ in levels]
        x = rollout(play(pipe.transformer, adapters, text), noise[0], levels, args.num_steps, args.eta, noise[1:])[-1]
        save_grid(decode(pipe, x), f"{args.out_dir}/samples/{name}.png")
