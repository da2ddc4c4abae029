"""What touches the transformer: loading, its roles, velocity, recorded passes.

One frozen transformer plays every role. Which one is said at the call, by the list of adapters that
add to it: `play(transformer, ["generator"], text)` is the student, `play(transformer, [], text,
negative, cfg)` the teacher with guidance.
"""

import gc
import os
import re
import sys
import time
import warnings

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from checkpoint import SETTINGS_NAME
from common import die, first_line, is_rank_0, note, seeded_rng, sides
from cps import at_least_float32, rollout, sigmas
from hub import files_on_hub, in_words, is_hub_id
from lora import adapter, add_adapter, load_adapter, set_adapters, train_only
from pictures import decode, quicken, save_grid
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

# ---- the base model ------------------------------------------------------------------------------
MOST_TEXT_TOKENS = 128  # of T5, the release's limit; a base whose tokenizer allows fewer has fewer


def text_tokens(tokenizer):
    """How many T5 tokens of a prompt are read; tokenizer: T5's, None where the base has none."""
    if tokenizer is None:
        return MOST_TEXT_TOKENS
    return min(MOST_TEXT_TOKENS, tokenizer.model_max_length)


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
        self.text_tokens = text_tokens(self.pipe.tokenizer_3)
        self.encode = TextEncoder(self.fresh_text, device)
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

    @torch.no_grad()
    def fresh_text(self, prompts):
        """Fresh from the text encoders -> (prompt_embeds [B,L,D], pooled [B,P])"""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            device=self.pipe.vae.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
        )
        return embeds, pooled

    def readers(self):
        """[(tokenizer, how many of its tokens are read, whose they are)] of those that the base has"""
        pipe = self.pipe
        found = [(pipe.tokenizer, pipe.tokenizer_max_length, "CLIP")]
        if pipe.tokenizer_3:
            found.append((pipe.tokenizer_3, self.text_tokens, "T5"))
        return found

    def cache_texts(self, prompts, path):
        """Encode all prompts now, into a file (TextTable), and free the text encoders.

        Most of them is T5-XXL's 9 GB; the transformer comes to the device in their place. Dies where
        there is no room for it.
        """
        pipe = self.pipe
        self.encode = TextTable(self.fresh_text, pipe.vae.device, prompts, path)
        self.empty_text = None
        pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None
        gc.collect()
        torch.cuda.empty_cache()
        try:
            pipe.transformer.to(pipe.vae.device)
        except torch.cuda.OutOfMemoryError as e:
            die(
                f"--pretrained {self.pretrained}: no room for its transformer ({first_line(e)})",
                local=True,
            )

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
