"""Text: what the encoders make of prompts, kept in memory or in a table on disk.

A text is a tuple of tensors with one row a prompt; only the base model looks into it. encode below is
the base's function (prompts -> text, fresh from its encoders).
"""

import math
import os

import torch
from tqdm import tqdm

from common import all_reduce, die, is_first_here, is_rank_0, note, reserve, say

KEPT_BYTES = 2**29  # of the last prompts' texts, on the device: 300 prompts of SD3.5-M
TEXT_BATCH = 32  # prompts encoded at once on a GPU


class TextEncoder:
    """prompts -> text, with the texts of the last prompts kept on the device, KEPT_BYTES of them."""

    def __init__(self, encode, device):
        self.encode = encode
        # On a CPU one by one: a prompt's encoding does not depend on its company, to the last bit,
        # and so a resumed run is exact.
        self.at_once = TEXT_BATCH if device.type == "cuda" else 1
        self.cache = {}

    def __call__(self, prompts):
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.cache]
        for i in range(0, len(new), self.at_once):
            batch = new[i : i + self.at_once]
            self.cache.update(zip(batch, zip(*self.encode(batch))))
        found = [self.cache[prompt] for prompt in prompts]
        self.forget()
        return tuple(torch.stack(rows) for rows in zip(*found))

    def forget(self):
        """Drop the oldest texts that are too many."""
        sizes = {}
        for prompt, text in self.cache.items():
            sizes[prompt] = sum(row.nbytes for row in text)
        too_many = sum(sizes.values()) - KEPT_BYTES
        for prompt, size in sizes.items():
            if too_many <= 0:
                break
            del self.cache[prompt]
            too_many -= size


class WholeBatches:
    """prompts -> text, of all of them in one pass, repeated ones too; the last text is kept.

    So a prompt's text depends, to the last bit, on itself and on how many there are, and not on which
    ones the others are.
    """

    def __init__(self, encode):
        self.encode = encode
        self.prompts = None
        self.text = None

    def __call__(self, prompts):
        if prompts != self.prompts:
            self.text = self.encode(prompts)
            self.prompts = list(prompts)
        return self.text


class TextTable:
    """prompts -> text, from a table on disk, which the processes of a machine share.

    It takes 1.7 MB a prompt for SD3.5-M, and says how much that is. Dies where the disk has no room.
    """

    def __init__(self, encode, device, prompts, path):
        self.device = device
        self.rows = {}
        for prompt in [*prompts, ""]:
            self.rows.setdefault(prompt, len(self.rows))
        text = encode([""])
        self.shapes = [tensor.shape[1:] for tensor in text]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        width = sum(self.sizes)
        size = len(self.rows) * width
        n_bytes = size * text[0].element_size()
        if is_rank_0():
            say(f"{len(self.rows)} texts take {n_bytes / 1e9:.2f} GB: {path}")
        try:
            if is_first_here():  # all of it: a memory map over a full disk ends in a bus error
                reserve(path, n_bytes)
        except OSError as e:
            die(f"--cache_text needs {n_bytes / 1e9:.1f} GB for {path} ({e.strerror})")
        all_reduce(torch.zeros(1, device=device)).item()  # nobody writes before it is there
        table = torch.from_file(path, shared=True, size=size, dtype=text[0].dtype)
        self.table = table.view(len(self.rows), width)
        self.fill(encode)

    def fill(self, encode):
        """Encode this process's share of the prompts, then wait for those of the others."""
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        todo = list(self.rows)[local_rank::processes]
        silent = None if local_rank == 0 else True
        for i in tqdm(range(0, len(todo), TEXT_BATCH), desc="text", disable=silent):
            batch = todo[i : i + TEXT_BATCH]
            places = [self.rows[prompt] for prompt in batch]
            parts = [tensor.flatten(1) for tensor in encode(batch)]
            self.table[places] = torch.cat(parts, 1).cpu()
        all_reduce(torch.zeros(1, device=self.device)).item()  # .item(): the host waits, too

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
        parts = found.split(self.sizes, 1)
        return tuple(part.unflatten(1, shape) for part, shape in zip(parts, self.shapes))


def note_prompts(base, rows):
    """Say how many prompts are longer than what the text encoders read, and how many are repeated.

    On rank 0 only.
    """
    if not is_rank_0() or not rows:
        return
    prompts = [row["prompt"] for row in rows]
    readers = base.backbone.readers()
    too_long = [False] * len(prompts)
    for tokenizer, limit, _ in readers:
        for i, ids in enumerate(tokenizer(prompts).input_ids):
            too_long[i] |= len(ids) > limit
    if any(too_long):
        limits = " or ".join(f"{whose}'s {limit}" for _, limit, whose in readers)
        note(
            f"{sum(too_long)} of {len(prompts)} prompts are longer than {limits} tokens: "
            "the rest is not read"
        )
    repeated_prompts = len(prompts) - len(set(prompts))
    if repeated_prompts:
        note(f"{repeated_prompts} of {len(prompts)} prompts are repeated: each counts")
