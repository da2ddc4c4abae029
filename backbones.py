"""The base models: what differs between them, each written as what it changes in the one before.

    StableDiffusion3    Stable Diffusion 3 and 3.5: guidance by a second pass with an empty prompt
    Flux1               FLUX.1: the transformer takes tokens, 2 x 2 places of the latents each; the
                        time shift grows with the picture; guidance is an input, one pass
    Klein               FLUX.2-klein: the latents are a place a token, and whitened; a language model
                        reads the prompt, four rotary axes; guidance as in Stable Diffusion 3

The mathematics knows none of this. It sees latents x [B,C,h,w], as diffusers' pipelines draw their
noise, so that a seed means the same there; times in [0,1] with 1 = noise, and the velocity eps - x0.
A text is a tuple of tensors that only its own backbone looks into.
"""

import math

import numpy as np
import torch
from transformers.utils import logging

# Before diffusers' pipelines are imported: transformers would speak of torchvision.
logging.set_verbosity_error()

from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from common import die, sides


def own_licence(name, repository):
    """A licence that the hub has no word for, as the front matter of a model card says it."""
    link = f"https://huggingface.co/{repository}/blob/main/LICENSE.md"
    return {"license": "other", "license_name": name, "license_link": link}


class StableDiffusion3:
    """A diffusers pipeline, and how its parts are called.

    pipe: StableDiffusion3Pipeline. resolution: a value of --resolution; dies where it does not fit.
    """

    pipeline = "StableDiffusion3Pipeline"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional = ("text_encoder_3", "tokenizer_3")  # some come without T5, which has to be said
    most_text_tokens = 128  # of T5, the release's limit; where its tokenizer allows fewer, fewer
    highest_first_level = 0.96  # a first step that ends above leaves no room to re-noise
    scheduler_steps_on_tokens = False  # and not on latents, in diffusers' pipeline
    cudnn_attention = True  # the fastest on an H100, but see NOT_CUDNN in common.py
    # front matter of a model card, by the base's hub id; None: of a base that is not among them
    licences = {
        None: own_licence("stabilityai-ai-community", "stabilityai/stable-diffusion-3.5-medium")
    }

    def __init__(self, pipe, resolution):
        self.pipe = pipe
        self.text_tokens = self.most_text_tokens
        if self.reader() is not None:
            self.text_tokens = min(self.text_tokens, self.reader().model_max_length)
        height, width = sides(resolution)
        unit, most = self.unit()
        if height % unit or width % unit or (most and max(height, width) > most):
            limit = f" and at most {most}" if most else ""
            die(
                f"--resolution {resolution} must be divisible by {unit}{limit} for this model's VAE "
                "and patches"
            )
        self.tokens = (height // unit) * (width // unit)  # of the picture
        self.latent_shape = self.shape_of_latents(height, width)

    @classmethod
    def absent(cls, index):
        """{name: None} for the optional parts that a pipeline's model_index.json does not name."""
        missing = {}
        for name in cls.optional:
            if not (index.get(name) or [None])[0]:
                missing[name] = None
        return missing

    # ---- shapes and levels
    def unit(self):
        """Pixels of a token's side, and the most pixels of a picture's (None: any)"""
        config = self.pipe.transformer.config
        unit = self.pipe.vae_scale_factor * config.patch_size
        return unit, unit * config.pos_embed_max_size

    def shape_of_latents(self, height, width):
        """(C, h, w)"""
        factor = self.pipe.vae_scale_factor
        return self.pipe.transformer.config.in_channels, height // factor, width // factor

    def shift(self, num_steps):
        """Time shift of the sampling grid, the model's own."""
        return self.pipe.scheduler.config.shift

    def timesteps(self, num_steps):
        """What the pipeline asks its scheduler for, as keywords of set_timesteps."""
        return {"num_inference_steps": num_steps}

    # ---- text
    def reader(self):
        """The tokenizer whose limit is ours; None where the base has none."""
        return self.pipe.tokenizer_3

    def readers(self):
        """[(tokenizer, how many of its tokens are read, whose they are)]"""
        found = [(self.pipe.tokenizer, self.pipe.tokenizer_max_length, "CLIP")]
        if self.reader() is not None:
            found.append((self.reader(), self.text_tokens, "T5"))
        return found

    @torch.no_grad()
    def text(self, prompts):
        """Fresh from the encoders -> (prompt_embeds [B,L,D], pooled [B,P])"""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            device=self.pipe.vae.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
        )
        return embeds, pooled

    def text_shapes(self):
        """What `text` gives for one prompt, without its batch: shapes (L, D) and (P,)"""
        config = self.pipe.transformer.config
        length = self.pipe.tokenizer_max_length + self.text_tokens  # CLIP's tokens, then T5's
        return (length, config.joint_attention_dim), (config.pooled_projection_dim,)

    # ---- velocity
    def guided_by_input(self):
        """Whether guidance is a number that the transformer is given, and no second pass."""
        return False

    def run(self, x, timestep, guidance, embeds, pooled):
        """x [B,C,h,w] in the text's dtype, timestep [B] in [0,1000] float32 -> velocity like x"""
        return self.pipe.transformer(
            hidden_states=x,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=timestep,
            return_dict=False,
        )[0]

    # ---- pictures
    def to_vae(self, latents):
        """Latents as the VAE's decoder takes them."""
        config = self.pipe.vae.config
        return latents / config.scaling_factor + config.shift_factor

    # ---- model card
    def licence(self, name):
        """{key: value} of the front matter. name: the base model's on the hub, None where it has none."""
        return self.licences.get(name, self.licences[None])


class Flux1(StableDiffusion3):
    """pipe: FluxPipeline."""

    pipeline = "FluxPipeline"
    encoders = ("text_encoder", "text_encoder_2")
    optional = ()
    most_text_tokens = 512
    scheduler_steps_on_tokens = True
    # Both kinds of blocks attend to q, k and v of one layout, and get gradients of two.
    cudnn_attention = False
    patch = 2  # places of the latents along a token's side
    licences = {
        None: {"license": "other"},
        "black-forest-labs/FLUX.1-dev": own_licence(
            "flux-1-dev-non-commercial-license", "black-forest-labs/FLUX.1-dev"
        ),
        "black-forest-labs/FLUX.1-schnell": {"license": "apache-2.0"},
    }

    def unit(self):
        return 2 * self.pipe.vae_scale_factor, None  # klein's VAE makes such squares, too

    def shape_of_latents(self, height, width):
        unit, _ = self.unit()
        side = unit // self.patch  # of a place, in pixels
        channels = self.pipe.transformer.config.in_channels // self.patch**2
        return channels, height // side, width // side

    def shift(self, num_steps):
        config = self.pipe.scheduler.config
        if not config.use_dynamic_shifting:
            return config.shift
        return math.exp(self.mu(num_steps))

    def mu(self, num_steps):
        """The logarithm of the time shift: linear in the number of the picture's tokens."""
        config = self.pipe.scheduler.config
        ends = (config.base_image_seq_len, config.max_image_seq_len)
        return calculate_shift(self.tokens, *ends, config.base_shift, config.max_shift)

    def timesteps(self, num_steps):
        asked = {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps)}
        if self.pipe.scheduler.config.use_dynamic_shifting:
            asked["mu"] = self.mu(num_steps)
        return asked

    def reader(self):
        return self.pipe.tokenizer_2

    def readers(self):
        return [(self.reader(), self.text_tokens, "T5")]  # CLIP's is pooled alone

    @torch.no_grad()
    def text(self, prompts):
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            device=self.pipe.vae.device,
            max_sequence_length=self.text_tokens,
        )
        return embeds, pooled

    def text_shapes(self):
        (_, width), pooled = super().text_shapes()
        return (self.text_tokens, width), pooled

    def guided_by_input(self):
        return bool(self.pipe.transformer.config.guidance_embeds)

    def places(self, device, height, width, length):
        """Rotary places of the picture's tokens, (0, row, column), and of the text's, (0, 0, 0)."""
        return places(device, 1, height, width), torch.zeros(length, 3, device=device)

    def run(self, x, timestep, guidance, embeds, *pooled):
        tokens = pixel_unshuffle(x, self.patch)  # [B,C',rows,columns], in the order of diffusers
        size = tokens.shape[2:]
        picture, text = self.places(x.device, *size, embeds.shape[1])
        more = {}
        if pooled:
            more["pooled_projections"] = pooled[0]
        if self.guided_by_input():
            more["guidance"] = torch.full_like(timestep, guidance)
        velocity = self.pipe.transformer(
            hidden_states=tokens.flatten(2).transpose(1, 2),
            encoder_hidden_states=embeds,
            timestep=timestep.to(x.dtype) / 1000,  # rounded as in diffusers' pipelines
            img_ids=picture,
            txt_ids=text,
            return_dict=False,
            **more,
        )[0]
        return pixel_shuffle(velocity.transpose(1, 2).unflatten(2, size), self.patch)


class Klein(Flux1):
    """pipe: Flux2KleinPipeline."""

    pipeline = "Flux2KleinPipeline"
    encoders = ("text_encoder",)
    cudnn_attention = True  # here the two kinds of blocks differ in the layout of v, too
    patch = 1  # the latents lie on the tokens' grid already
    licences = {
        None: {"license": "other"},
        "black-forest-labs/FLUX.2-klein-4B": {"license": "apache-2.0"},
        "black-forest-labs/FLUX.2-klein-base-4B": {"license": "apache-2.0"},
        "black-forest-labs/FLUX.2-klein-9B": own_licence(
            "flux-non-commercial-license", "black-forest-labs/FLUX.2-klein-9B"
        ),
        "black-forest-labs/FLUX.2-klein-base-9B": own_licence(
            "flux-non-commercial-license", "black-forest-labs/FLUX.2-klein-base-9B"
        ),
    }
    highest_first_level = 0.97  # at 1024 px four steps begin with one to .967

    def mu(self, num_steps):
        return compute_empirical_mu(self.tokens, num_steps)

    def reader(self):
        return self.pipe.tokenizer

    def readers(self):
        return [(self.reader(), self.text_tokens - 12, "Qwen")]  # the rest is its chat template

    @torch.no_grad()
    def text(self, prompts):
        """(prompt_embeds [B,L,D],)"""
        whole = self.pipe.text_encoder
        self.pipe.text_encoder = whole.model  # without the logits of every token
        try:
            embeds, _ = self.pipe.encode_prompt(
                prompts, device=self.pipe.vae.device, max_sequence_length=self.text_tokens
            )
        finally:
            self.pipe.text_encoder = whole
        return (embeds,)

    def text_shapes(self):
        return ((self.text_tokens, self.pipe.transformer.config.joint_attention_dim),)

    def places(self, device, height, width, length):
        """(0, row, column, 0) and (0, 0, 0, number)"""
        return places(device, 1, height, width, 1), places(device, 1, 1, 1, length)

    def to_vae(self, latents):
        norm = self.pipe.vae.bn
        mean = norm.running_mean.float().view(1, -1, 1, 1)
        variance = norm.running_var.float().view(1, -1, 1, 1)
        deviation = (variance + self.pipe.vae.config.batch_norm_eps).sqrt()
        return pixel_shuffle(latents * deviation + mean, 2)


def places(device, *sizes):
    """All places of a grid of these sizes, the last axis fastest -> [number of places, axes]"""
    axes = [torch.arange(size, device=device) for size in sizes]
    return torch.cartesian_prod(*axes)


BACKBONES = {family.pipeline: family for family in (StableDiffusion3, Flux1, Klein)}
