"""Pictures: from latents to pixels, and from there to PNG files and back.

The decoder's layers are diffusers' own. Where they are compiled, `quicken` first gives three kinds of
them a forward that computes the same in an order that suits a GPU.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.upsampling import Upsample2D
from diffusers.utils import make_image_grid
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.utils.checkpoint import checkpoint

from common import as_bytes, write_atomically
from cps import at_least_float32


# ---- latents to pixels ---------------------------------------------------------------------------
def decode(vae, latents, one_by_one=False):
    """Latents as the VAE takes them -> pictures [B,3,H,W] in [0,1], float32, differentiable."""
    latents = latents.to(vae.dtype)

    def run(z):
        return vae.decode(z).sample

    if one_by_one:
        # One by one, and again in the backward pass: the activations of one picture at a time.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        each = [checkpoint(run, z, **options) for z in latents.split(1)]
        pictures = torch.cat(each)
    else:
        pictures = run(latents)
    return (at_least_float32(pictures) / 2 + 0.5).clamp(0, 1)


def decode_each(base, latents):
    """base.decode, picture by picture: for a look, in the little memory that training leaves."""
    each = [base.decode(one) for one in latents.split(1)]
    return torch.cat(each)


# A value that comes from more tensors or operations than these is written down by the compiler, and read
# where it is used. Its own bounds, 4 and 30 (torch 2.13), make it write a norm's result in float32 and
# read it twice in the backward pass. Below ours it is computed again each time.
COMPILER = {"realize_reads_threshold": 7, "realize_opcount_threshold": 200}


def compile_decoder(vae):
    """Compile the decoder, in the order that suits a GPU."""
    quicken(vae)
    vae.decoder.compile(dynamic=False, options=COMPILER)


def quicken(vae):
    """Put the decoder into the layout in which convolutions are fast, channels last, and keep it there.

    Its parts then are, for the compiler, plain sums over rows of channels. docs/performance.md has what
    each of the three is worth.
    """
    vae.to(memory_format=torch.channels_last)
    for module in vae.decoder.modules():
        if type(module) is torch.nn.GroupNorm:
            module.__class__ = ChannelsLastNorm
        elif type(module) is Upsample2D:
            module.__class__ = Doubled
    for attention in vae.decoder.mid_block.attentions:
        if attention is not None:
            attention.set_processor(PlainAttention())


def by_rows(x):
    """[B,C,H,W] -> [B,H W,C], which is how it lies in memory, channels last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_picture(rows, shape):
    """[B,H W,C] -> [B,C,H,W] of this shape"""
    return rows.unflatten(1, shape[2:]).permute(0, 3, 1, 2)


class ChannelsLastNorm(torch.nn.GroupNorm):
    """GroupNorm by way of each channel's mean and variance: reading x once, in the order it lies in.

    A group's variance is the mean of its channels' variances plus the variance of their means.
    """

    def forward(self, x):
        rows = at_least_float32(by_rows(x))
        variance, mean = torch.var_mean(rows, 1, correction=0)  # of each channel [B,C]
        groups = (self.num_groups, -1)
        within = variance.unflatten(1, groups).mean(2, keepdim=True)
        means = mean.unflatten(1, groups)
        between, group_mean = torch.var_mean(means, 2, correction=0, keepdim=True)
        rate = torch.rsqrt(within + between + self.eps)
        scale = rate * self.weight.view(groups)
        shift = self.bias.view(groups) - group_mean * scale
        scale = scale.flatten(1).unsqueeze(1)  # [B,1,C]
        shift = shift.flatten(1).unsqueeze(1)
        normed = rows * scale + shift
        return as_picture(normed.to(x.dtype), x.shape)


class Doubled(Upsample2D):
    """Nearest-neighbour upsampling by 2 as a view, whose backward pass is a sum and no scattering."""

    def forward(self, x, output_size=None):
        n, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1)
        rows = rows.view(n, height, 1, width, 1, channels)
        rows = rows.expand(-1, -1, 2, -1, 2, -1)
        rows = rows.reshape(n, 2 * height, 2 * width, channels)
        return self.conv(rows.permute(0, 3, 1, 2))


class PlainAttention:
    """The decoder's one attention layer written out: PyTorch has no fast kernel for its wide head.

    A processor of diffusers' Attention, which gives it x [B,C,H,W] and nothing else here.
    """

    def __call__(self, layer, x, encoder_hidden_states=None, attention_mask=None, temb=None):
        rows = by_rows(layer.group_norm(x))
        query = layer.to_q(rows)
        key = layer.to_k(rows)
        value = layer.to_v(rows)
        scale = query.shape[2] ** -0.5
        likeness = torch.bmm(scale * query, key.transpose(1, 2))
        share = torch.softmax(at_least_float32(likeness), 2)
        seen = torch.bmm(share.to(value.dtype), value)
        project, _ = layer.to_out  # and a dropout of nothing
        return x + as_picture(project(seen), x.shape)


# ---- files ---------------------------------------------------------------------------------------
def save_grid(pictures, path, columns=8):
    """[B,3,H,W] in [0,1] -> one PNG; small pictures are magnified to 64 pixels."""
    arrays = VaeImageProcessor.pt_to_numpy(pictures.detach().float())
    images = VaeImageProcessor.numpy_to_pil(arrays)
    columns = min(columns, len(images))
    width, height = images[0].size
    white = Image.new("RGB", (width, height), "white")
    images += [white] * (-len(images) % columns)
    wide = max(64, width)
    high = round(height * wide / width)
    images = [image.resize((wide, high)) for image in images]
    rows = len(images) // columns
    grid = make_image_grid(images, rows, columns)
    write_atomically({path: as_bytes(grid.save, format="png")})


def to_bytes(pictures):
    """Pictures in [0,1] -> the nearest of 256 values, 0 to 255, on the CPU."""
    return (pictures * 255).round().byte().cpu()


def as_saved(pictures):
    """Pictures in [0,1] -> on the CPU and to the last bit what `read_picture` makes of their files.

    A GPU would divide by 255 with another last bit.
    """
    return to_bytes(pictures).contiguous() / 255


def save_pictures(pictures, paths, texts):
    """Pictures [B,3,H,W] in [0,1] -> a PNG each of its size, with its text {name: value} in it.

    A CPU core packs one more slowly than a GPU draws it. So they are packed side by side.
    """
    with ThreadPoolExecutor() as threads:
        contents = threads.map(as_png, pictures, texts)
        write_atomically(dict(zip(paths, contents)))


def as_png(picture, text):
    """The bytes of one picture [3,H,W] in [0,1] as a PNG with this text."""
    pixels = to_bytes(picture).permute(1, 2, 0).numpy()
    chunks = PngInfo()
    for name, value in text.items():
        chunks.add_text(name, str(value))
    return as_bytes(Image.fromarray(pixels).save, format="png", pnginfo=chunks)


def read_picture(path):
    """A PNG -> (picture [3,H,W] in [0,1], its text {name: str}); raises OSError or ValueError."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
            text = getattr(image, "text", {})
            picture = torch.from_numpy(pixels).permute(2, 0, 1) / 255
            return picture, dict(text)
    except SyntaxError as e:  # Pillow's word for a damaged one
        raise ValueError(str(e)) from None
