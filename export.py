"""sample.py --export DIR, --export_merged DIR: a trained generator in the formats that diffusers loads, with a model card.

DIR/pytorch_lora_weights.safetensors       both stages as ONE LoRA: pipe.load_lora_weights(DIR)
DIR/cold_start.safetensors, rtdmd.safetensors     each as its own, to be loaded under two names and activated together
DIR/cold_start/generator_ema.pt, rtdmd/...        the published layout, each with an adapter_config.json that says its alpha. DIR, or a
                                                  hub repository with its content, is what --cold_start and --rtdmd take
DIR/cps.py, README.md                      the sampler, and how to use all this

DIR2/  a pipeline directory: the base with both stages added to the weights of its transformer, cps.py, README.md
"""

import json
import os
import shutil

import torch

from checkpoint import CONFIG_NAME, FREE, find_weights, read, read_adapter
from cold_start import HERE
from common import die
from cps import sigmas

STAGES = {
    "cold_generator": "cold_start",
    "generator": "rtdmd",
}  # adapter, as sample.load_generator names it: stage


def check_exports(args):
    """The paths of --export and --export_merged; dies if they cannot be meant. With nothing to draw, args.out_dir becomes where the first one goes."""
    paths = [path for path in (args.export, args.export_merged) if path is not None]
    if paths and (args.teacher or args.bench or not (args.cold_start or args.rtdmd)):
        die(
            "--export and --export_merged write --cold_start and --rtdmd, of which one must be there; they go with neither --teacher nor --bench"
        )
    for path in paths:
        if not path or os.path.lexists(path) or os.path.lexists(path.rstrip("/") + ".tmp"):
            die(
                f"cannot export to {path!r}: {'it, or its .tmp, is there already' if path else 'no name'}; name a new directory"
            )
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        die("--export and --export_merged need two directories")
    if paths and not (
        args.prompts or args.prompt
    ):  # no pictures: what must be there and writable is the place of the first
        args.out_dir = os.path.dirname(os.path.abspath(paths[0]))
    return paths


def concatenated(transformer, names):
    """Several adapters as one -> {"<module>.lora_A.weight": [R,in], "<module>.lora_B.weight": [out,R]}.

    The A are stacked; the B, times alpha / rank, put side by side, so that B A is the sum of the updates. A loader has to take
    alpha = rank, which all do with a file that names no alpha. R is the same for all modules, since some loaders know one rank a
    file: where a module has fewer adapters or smaller ones, zeros fill up.
    """
    parts = {}
    for module, layer in transformer.named_modules():
        present = [name for name in names if name in getattr(layer, "lora_A", {})]
        if present:
            A = torch.cat([layer.lora_A[name].weight.detach() for name in present])
            B = torch.cat(
                [layer.scaling[name] * layer.lora_B[name].weight.detach() for name in present], 1
            )
            parts[module] = A.cpu(), B.cpu()
    rank = max(len(A) for A, _ in parts.values())
    tensors = {}
    for module, (A, B) in parts.items():
        missing = rank - len(A)
        tensors[f"{module}.lora_A.weight"] = torch.nn.functional.pad(
            A, (0, 0, 0, missing)
        ).contiguous()
        tensors[f"{module}.lora_B.weight"] = torch.nn.functional.pad(B, (0, missing)).contiguous()
    return tensors


def save_for_diffusers(pipe, folder, names, file_name=None):
    """Adapters as one LoRA file that `load_lora_weights` reads. Its metadata says alpha = rank: alpha is in B."""
    tensors = concatenated(pipe.transformer, names)
    modules = [
        key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")
    ]
    rank = len(tensors[modules[0] + ".lora_A.weight"])
    config = {"r": rank, "lora_alpha": rank, "target_modules": modules}
    pipe.save_lora_weights(
        folder, tensors, weight_name=file_name, transformer_lora_adapter_metadata=config
    )


def save_published(transformer, name, source, folder):
    """The published layout: generator_ema.pt with the numbers of its source, and peft's adapter_config.json, which says the alpha."""
    os.makedirs(folder)
    file = read_adapter(source)
    tensors = file.published()
    if source.endswith(".pt") and list(read(source, "adapter")) == list(tensors):
        shutil.copy(source, f"{folder}/generator_ema.pt")
    else:
        torch.save(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            f"{folder}/generator_ema.pt",
        )
    drawn_with = transformer.peft_config[name]
    config = {
        "peft_type": "LORA",
        "r": drawn_with.r,
        "lora_alpha": drawn_with.lora_alpha,
        "rank_pattern": drawn_with.rank_pattern,
        "alpha_pattern": drawn_with.alpha_pattern,
        "target_modules": list(file.weights),
    }
    with open(f"{folder}/{CONFIG_NAME}", "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)


def export(pipe, adapters, args, rows, results):
    """Write what --export and --export_merged ask for, each under a temporary name that is renamed when all is there. Comes last in a
    program: merging changes the transformer. Dies with one line if a disk is full or a path cannot be written; nothing is left then."""

    def lora(folder):
        save_for_diffusers(
            pipe, folder, adapters
        )  # under the name that load_lora_weights(folder) looks for
        for name in adapters:
            stage = STAGES[name]
            save_for_diffusers(pipe, folder, [name], f"{stage}.safetensors")
            source = find_weights(getattr(args, stage), stage, quiet=True)
            save_published(pipe.transformer, name, source, f"{folder}/{stage}")

    def merged(folder):
        pipe.transformer.float().fuse_lora(
            adapter_names=adapters
        )  # in bf16 the small updates of stage 2 would be rounded away
        pipe.transformer.unload_lora()  # what is left has the sums in its weights
        pipe.save_pretrained(folder)

    for path, write in ((args.export, lora), (args.export_merged, merged)):
        if path:
            folder, card = (
                path.rstrip("/") + ".tmp",
                model_card(
                    args, [STAGES[name] for name in adapters], write is merged, rows, results
                ),
            )
            try:
                os.makedirs(folder)
                write(folder)
                shutil.copy(f"{HERE}/cps.py", folder)
                with open(f"{folder}/README.md", "w", encoding="utf-8") as f:
                    f.write(card)
                os.rename(folder, path)
            except Exception as e:  # safetensors has an error of its own for a full disk
                die(
                    f"cannot export to {path} ({(str(e) or repr(e)).splitlines()[0][:200]})",
                    status=1,
                )
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            print(f"{path}: {', '.join(sorted(os.listdir(path)))}", flush=True)


def folder_of(where, stage):
    """The folder of the weights that `where` means."""
    return os.path.dirname(find_weights(where, stage, quiet=True))


def made_with(where):
    """What ckpt.pt beside the weights says of how they were trained, as a line of markdown."""
    path = os.path.join(where, "ckpt.pt")
    saved = read(path, "checkpoint") if os.path.exists(path) else {}
    flags = saved.get("flags") if isinstance(saved, dict) else None
    if not isinstance(flags, dict):
        return "its flags are not known"
    data = (
        os.path.basename(flags.get("prompts") or "")
        or "made on the spot in GenEval's six categories"
    )
    said = " ".join(
        f"--{k}{'' if v is True else f' {v}'}"
        for k, v in flags.items()
        if isinstance(v, (int, float, str))
        and v is not False
        and v != ""
        and k not in FREE - {"steps", "epochs"}
        and " " not in k
    )
    return f"prompts {data}; `{said}`"


def model_card(args, stages, merged, rows, results):
    """README.md of an exported directory -> str. The tests run its python snippets."""
    names, mean = json.dumps(stages), lambda x: f"{sum(x) / len(x):.4f}"
    scores = [
        f"| {who} | {name} | {mean(each)} |"
        for who, result in results.items()
        for name, each in result.items()
        if each
    ]
    return "\n".join(
        [
            "---",
            "license: other",
            f"base_model: {args.pretrained}",
            "library_name: diffusers",
            "pipeline_tag: text-to-image",
            f"tags: [{'' if merged else 'lora, '}rtdmd, few-step]",
            "---",
            f"# Pictures in {args.steps} steps, without guidance",
            "",
            f"The generator of [RTDMD](https://arxiv.org/abs/2605.26108) ({' and '.join(stages)}), "
            f"{'merged into the transformer of' if merged else 'as LoRA for'} `{args.pretrained}`.",
            "",
            "```python",
            "import torch",
            "from diffusers import StableDiffusion3Pipeline",
            "from cps import CPSScheduler  # cps.py lies in this directory",
            "",
            f'pipe = StableDiffusion3Pipeline.from_pretrained("{"DIR" if merged else args.pretrained}", dtype=torch.bfloat16).to("cuda")',
            *(
                []
                if merged
                else [f'pipe.load_lora_weights("DIR")  # {" and ".join(stages)} in one file']
            ),
            f"pipe.scheduler = CPSScheduler.from_config(pipe.scheduler.config, shift={args.shift:g}, eta={args.eta:g})",
            f'image = pipe("a photo of a cat", num_inference_steps={args.steps}, guidance_scale=1.0, height={args.resolution}, width={args.resolution},',
            f"             max_sequence_length={args.max_sequence_length}).images[0]",
            "```",
            "",
            f"DIR is this directory or repository. The scheduler brings the right noise levels, {', '.join(f'{s:.3g}' for s in sigmas(args.steps, args.shift))}; "
            f"with the one that the base comes with, `num_inference_steps={args.steps}` uses others, and no noise.",
            "",
            *(
                []
                if merged or len(stages) < 2
                else [
                    "The two stages are stacked. As two adapters, in place of the line with `load_lora_weights`:",
                    "",
                    "```python",
                    *(
                        f'pipe.load_lora_weights("DIR", weight_name="{stage}.safetensors", adapter_name="{stage}")'
                        for stage in stages
                    ),
                    f"pipe.set_adapters({names})  # both; the second in the first one's place would lose stage 1",
                    "```",
                    "",
                ]
            ),
            "## How it was made",
            "",
            *(
                f"- {stage}: {made_with(folder_of(getattr(args, stage), stage))}"
                for stage in stages
            ),
            "",
            *(
                [
                    "## Scores",
                    "",
                    f"Means over {len(rows)} pictures.",
                    "",
                    "| | reward | mean |",
                    "|---|---|---|",
                    *scores,
                    "",
                ]
                if scores
                else []
            ),
            "## Licence",
            "",
            f"These weights derive from `{args.pretrained}` and fall under its licence (Stable Diffusion 3 and 3.5: the Stability AI Community "
            "License). `cps.py` is under Apache-2.0. Reward models and prompts have licences of their own.",
            "",
        ]
    )
