"""What is in an adapter file: python -m tools.inspect_adapter WHERE

WHERE is whatever --cold_start and --rtdmd take: a file, a run, an export, a release's checkpoint-N,
a hub repository. It needs neither a base model nor a GPU. For every adapter file found it prints
what the file holds and whether that is what the authors' published files are expected to hold.

(Not called inspect.py: run as a script, it would stand in for Python's own module of that name.)
"""

import argparse
import os
import re
from collections import Counter

import torch

from checkpoint import (
    FAKE_NAMES,
    GENERATOR_NAMES,
    checkpoint_folders,
    download,
    few_of,
    read_adapter,
    what_was_sought,
)
from common import die
from hub import is_hub_id

STAGES = ("cold_start", "rtdmd")
# The published files: 24 blocks with 8 projections each, less the last block's to_add_out. B is as
# far as bfloat16 training carries it: steps below half a bf16 step are lost.
PUBLISHED_MODULES = 191
PUBLISHED_RANK = 32
PUBLISHED_DTYPE = "bfloat16"
PUBLISHED_LARGEST_B = {"cold_start": 0.01, "rtdmd": 0.001}


def main():
    parser = argparse.ArgumentParser(
        description="Say what is in adapter files; needs no base model."
    )
    parser.error = die
    parser.add_argument(
        "where", help="a file, a directory or a hub repository, as for --cold_start"
    )
    where = parser.parse_args().where
    paths = adapter_files(where)
    for path in paths:
        print(report(path))


def adapter_files(where):
    """Paths of all adapter files that `where` means; dies with one line where there are none."""
    if os.path.isfile(where):
        return [where]
    place = where
    if not os.path.exists(where) and is_hub_id(where):
        place = download(where, STAGES)
    names = [name.format(stage=stage) for stage in STAGES for name in GENERATOR_NAMES]
    names += [*FAKE_NAMES, "pytorch_lora_weights.safetensors"]
    paths = []
    for folder in (place, *(os.path.join(place, stage) for stage in STAGES)):
        for inside in (folder, *checkpoint_folders(folder)):
            for name in dict.fromkeys(names):
                path = os.path.join(inside, name)
                if os.path.isfile(path):
                    paths.append(path)
    if not paths:
        there = "no such file or directory"
        if os.path.isdir(where):
            there = "holds " + few_of(sorted(os.listdir(where)))
        die(f"{where}: {there}; {what_was_sought('cold_start')}")
    return paths


def stage_of(path):
    """Which stage a file is of, as far as its path says so, else None."""
    parts = re.split(r"[/.]", os.path.abspath(path))
    found = [stage for stage in STAGES if stage in parts]
    return found[0] if len(found) == 1 else None


def measured(file):
    """What there is to know of an AdapterFile -> dict."""
    A = torch.cat([A.float().flatten() for A, _ in file.weights.values()])
    dtypes = {matrix.dtype for pair in file.weights.values() for matrix in pair}
    return {
        "modules": len(file.weights),
        "ranks": Counter(file.ranks.values()),
        "families": sorted({family(module) for module in file.weights}),
        "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in dtypes),
        "std_A": A.std().item(),
        "largest_B": max(B.float().abs().max().item() for _, B in file.weights.values()),
    }


def family(module):
    """The part of a block that a module is of: attn, attn2, ff, ... (else its whole name)."""
    parts = module.split(".")
    return parts[2] if parts[0] == "transformer_blocks" and len(parts) > 3 else module


def report(path):
    """One file's lines."""
    file = read_adapter(path)
    found = measured(file)
    stage = stage_of(path)
    ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in sorted(found["ranks"].items()))
    if len(found["ranks"]) == 1:
        ranks = str(file.usual_rank)
    dtypes = ", ".join(found["dtypes"])
    alpha = "not said by the file or beside it"
    if file.alpha is not None:
        alpha = f"{file.alpha}, says {file.alpha.source}"
    lines = [
        path,
        line("modules", tensors(found["modules"]), *modules_verdict(found)),
        line("adapted parts", ", ".join(found["families"]), *families_verdict(found)),
        line("rank", ranks, set(found["ranks"]) == {PUBLISHED_RANK}, str(PUBLISHED_RANK)),
        line("dtype", dtypes, found["dtypes"] == [PUBLISHED_DTYPE], PUBLISHED_DTYPE),
        line("std of A", f"{found['std_A']:.4g}", *std_verdict(found, file.usual_rank, stage)),
        line("largest |B|", f"{found['largest_B']:.3g}", *largest_verdict(found, stage)),
        f"    {'alpha':14}{alpha}",
    ]
    return "\n".join(lines)


def line(name, value, agrees, expected):
    """One number beside what the published files are expected to have."""
    verdict = "as expected of the published files" if agrees else f"published files: {expected}"
    return f"    {name:14}{value:28}  {verdict}"


def tensors(modules):
    """A number of modules, and of the two matrices each has."""
    return f"{modules} ({2 * modules} tensors)"


def modules_verdict(found):
    return found["modules"] == PUBLISHED_MODULES, tensors(PUBLISHED_MODULES)


def families_verdict(found):
    return found["families"] == ["attn"], "attn alone, no attn2"


def std_verdict(found, rank, stage):
    """A hardly moves from its start: N(0, 1/rank^2) in stage 1, N(0, 1) in stage 2; None: either."""
    start_of = {"cold_start": 1 / rank, "rtdmd": 1.0}
    starts = [start_of[stage]] if stage else list(start_of.values())
    agrees = any(0.8 < found["std_A"] / start < 1.25 for start in starts)
    names = " or ".join(f"{start:.3g}" for start in starts)
    return agrees, f"about {names}" + (f" ({stage})" if stage else "")


def largest_verdict(found, stage):
    """Within a factor of 3 of what bf16 training reaches in this stage; None: in either."""
    expected = [PUBLISHED_LARGEST_B[stage]] if stage else list(PUBLISHED_LARGEST_B.values())
    agrees = any(1 / 3 < found["largest_B"] / size < 3 for size in expected)
    sizes = " or ".join(f"{size:g}" for size in expected)
    return agrees, f"about {sizes}" + (f" ({stage})" if stage else "")


if __name__ == "__main__":
    main()
