"""A trained generator in the formats that diffusers loads, with a model card.

    python -m tools.export DIR             # LoRA files of out/cold_start and out/rtdmd
    python -m tools.export --merged DIR    # a whole pipeline, both added to the base's weights

DIR/pytorch_lora_weights.safetensors            both stages as ONE LoRA: pipe.load_lora_weights(DIR)
DIR/cold_start.safetensors, rtdmd.safetensors   each as its own, to be loaded under two names
DIR/cold_start/, rtdmd/                         the published layout: generator_ema.pt and peft's
                                                adapter_config.json, which says its alpha
DIR/settings.json                               what it draws with: sample.py, tools.evaluate and
                                                stage 2 take it from there
DIR/cps.py, README.md                           the sampler, and how to use all this

DIR, or a hub repository with its content, is what --cold_start and --rtdmd take. No path of this
machine is written into it: a base model that is a directory is left out, unless --base_model names it.
"""

import contextlib
import json
import os
import shlex
import shutil

import torch
import torch.nn.functional as F

from checkpoint import (
    CONFIG_NAME,
    FREE,
    SETTINGS_NAME,
    read,
    read_adapter,
    settings_of,
)
from common import (
    Parser,
    chosen_device,
    die,
    end_on_signals,
    first_line,
    note,
    parse,
    resolution,
    sides,
)
from hub import DEFAULT_PLACES, is_hub_id
from sample import ADAPTERS, PRESETS, generator_files, load_base, load_generator, settled
from tools.evaluate import mean_and_error, with_error

LOCAL = ("command", "started_from")  # of a run's settings: they may hold paths of this machine
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def arguments():
    parser = Parser("Write a trained generator in the formats that diffusers loads.")
    add = parser.add_argument
    add("out_dir", metavar="DIR", help="a new directory")
    add("--merged", action="store_true", help="a whole pipeline in place of LoRA files")
    add("--preset", choices=list(PRESETS), default="sd35m", help="set of default flags")
    add("--pretrained", help="diffusers directory or hub id of the base model")
    add("--generator_pretrained", default="", metavar="DIR", help="the generator's own base model")
    places = "a run's out_dir, an export, a file or a hub repository"
    for stage, number in (("cold_start", 1), ("rtdmd", 2)):
        text = f"weights of stage {number}: {places}; '' leaves them out"
        add(f"--{stage}", default=DEFAULT_PLACES[stage], help=text)
    add("--lora_alpha", type=float, help="alpha of the adapters, whatever their files say")
    add("--base_model", default="", metavar="ID", help="what the card calls the base model")
    add("--scores", default="", metavar="FILE", help="scores.jsonl of tools.evaluate, for the card")
    add("--steps", type=int, default=4, help="sampling steps, for card and settings")
    add("--eta", type=float, default=0.9, help="new noise of a step, for card and settings")
    add("--resolution", type=resolution, default=512, help="side, or height x width as 768x512")
    add("--device", default="auto", help="cuda, cpu, mps, or auto: the best there is")
    parser.set_defaults(teacher=False, like="", compile=0)
    args = parse(parser, PRESETS)
    if not (args.cold_start or args.rtdmd):
        die("nothing to export: --cold_start or --rtdmd must name weights")
    if args.base_model and not is_hub_id(args.base_model):
        die(f"--base_model {args.base_model} must be a hub id, owner/name")
    return args


# ---- weights -------------------------------------------------------------------------------------
def concatenated(transformer, names):
    """Several adapters as one -> {"<module>.lora_A.weight": [R,in], "<module>.lora_B.weight": [out,R]}.

    The A are stacked; the B, times alpha / rank, put side by side, so that B A is the sum of the
    updates. A loader has to take alpha = rank, which all do with a file that names no alpha. R is the
    same for all modules, since some loaders know one rank a file: where a module has fewer adapters
    or smaller ones, zeros fill up.
    """
    pairs = {}
    for module, layer in transformer.named_modules():
        if any(name in getattr(layer, "lora_A", {}) for name in names):
            pairs[module] = [matrix.detach().cpu() for matrix in layer.pair(names)]
    rank = max(len(A) for A, _ in pairs.values())
    tensors = {}
    for module, (A, B) in pairs.items():
        missing = rank - len(A)
        tensors[f"{module}.lora_A.weight"] = F.pad(A, (0, 0, 0, missing)).contiguous()
        tensors[f"{module}.lora_B.weight"] = F.pad(B, (0, missing)).contiguous()
    return tensors


def save_for_diffusers(pipe, folder, names, file_name=None):
    """Adapters as one LoRA file that `load_lora_weights` reads.

    Its metadata says alpha = rank: alpha is in B. file_name: None is the one that
    load_lora_weights(folder) looks for.
    """
    tensors = concatenated(pipe.transformer, names)
    ending = ".lora_A.weight"
    modules = [key.removesuffix(ending) for key in tensors if key.endswith(ending)]
    rank = len(tensors[modules[0] + ending])
    config = {"r": rank, "lora_alpha": rank, "target_modules": modules}
    pipe.save_lora_weights(
        folder, tensors, weight_name=file_name, transformer_lora_adapter_metadata=config
    )


def save_published(transformer, name, source, folder):
    """The published layout: generator_ema.pt with the numbers of its source, and its alpha."""
    os.makedirs(folder)
    target = os.path.join(folder, "generator_ema.pt")
    file = read_adapter(source)
    tensors = file.published()
    if source.endswith(".pt") and list(read(source, "adapter")) == list(tensors):
        shutil.copy(source, target)
    else:
        torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}, target)
    loaded = transformer.peft_config[name]
    config = {
        "peft_type": "LORA",
        "r": loaded.r,
        "lora_alpha": loaded.lora_alpha,
        "rank_pattern": loaded.rank_pattern,
        "alpha_pattern": loaded.alpha_pattern,
        "target_modules": list(file.weights),
    }
    write_json(os.path.join(folder, CONFIG_NAME), config)


def write_json(path, content):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def write_lora(base, files, args, folder):
    """All that is listed above under DIR, but for its card and cps.py."""
    transformer = base.transformer
    save_for_diffusers(base.pipe, folder, list(files))
    for adapter, source in files.items():
        stage = ADAPTERS[adapter]
        save_for_diffusers(base.pipe, folder, [adapter], f"{stage}.safetensors")
        save_published(transformer, adapter, source, os.path.join(folder, stage))
        loaded = transformer.peft_config[adapter]
        settings = {
            **{name: value for name, value in settings_of(source).items() if name not in LOCAL},
            **sampling_settings(args),
            "lora_rank": loaded.r,
            "lora_alpha": loaded.lora_alpha,
        }
        write_json(os.path.join(folder, stage, SETTINGS_NAME), settings)


def write_merged(base, files, folder):
    """A pipeline directory with the adapters added to the transformer, which is float32 after that.

    In bf16 the small updates of stage 2 would be rounded away. Changes the base.
    """
    base.transformer.float().fuse_lora(adapter_names=list(files))
    base.transformer.unload_lora()  # what is left has the sums in its weights
    base.pipe.save_pretrained(folder)
    forget_paths(folder)


def forget_paths(folder):
    """Take the directories of this machine out of the configurations that diffusers has written."""
    key = "_name_or_path"
    for place, _, names in os.walk(folder):
        for name in names:
            if name not in ("config.json", "model_index.json"):
                continue
            path = os.path.join(place, name)
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
            if key in config and os.path.exists(config[key]):
                del config[key]
                write_json(path, config)


def sampling_settings(args):
    """What is drawn with, as in a run's settings.json; a base model that is a path is left out."""
    has_own = bool(args.generator_pretrained)
    return {
        "pretrained": hub_name(args.pretrained) if has_own else public_name(args),
        "generator_pretrained": public_name(args) if has_own else "",
        "resolution": args.resolution,
        "num_steps": args.steps,
        "eta": args.eta,
        "cfg": args.teacher_cfg,
    }


def public_name(args):
    """The base model's name for others, or None where it is a directory of this machine."""
    return args.base_model or hub_name(place_of_base(args))


def place_of_base(args):
    """Where the base model is that the adapters belong to."""
    return args.generator_pretrained or args.pretrained


def hub_name(place):
    """A place if it is a hub id, None if it is a directory of this machine."""
    return place if is_hub_id(place) and not os.path.exists(place) else None


# ---- the model card ------------------------------------------------------------------------------
def model_card(base, files, args):
    """README.md of an exported directory -> str. The tests run its python snippets."""
    stages = [ADAPTERS[adapter] for adapter in files]
    parts = [
        front_matter(base, args),
        introduction(stages, args),
        usage(base, stages, args),
    ]
    if len(stages) == 2 and not args.merged:
        parts.append(two_adapters(stages))
    parts.append(origin(files))
    if args.scores:
        parts.append(score_table(args.scores))
    parts.append(licence(base, args))
    return "\n".join(parts)


def front_matter(base, args):
    name = public_name(args)
    known = dict(base.backbone.licence(name))
    if name:
        known["base_model"] = name
    known["library_name"] = "diffusers"
    known["pipeline_tag"] = "text-to-image"
    known["tags"] = "[rtdmd, few-step]" if args.merged else "[lora, rtdmd, few-step]"
    lines = [f"{key}: {value}" for key, value in known.items()]
    return "\n".join(["---", *lines, "---"])


def introduction(stages, args):
    what = "merged into the transformer of" if args.merged else "as LoRA for"
    paper = "[RTDMD](https://arxiv.org/abs/2605.26108)"
    return f"""# Pictures in {args.steps} steps, without guidance

The generator of {paper} ({" and ".join(stages)}), {what} {base_in_words(args)}.
"""


def base_in_words(args):
    name = public_name(args)
    return f"`{name}`" if name else "the base model that it was trained on"


def usage(base, stages, args):
    """Code that draws a picture, as it can be pasted."""
    place = "DIR" if args.merged else public_name(args) or "BASE"
    pipeline = base.backbone.pipeline
    absent = [part for part in base.backbone.optional if getattr(base.pipe, part) is None]
    without = "".join(f"    {part}=None,\n" for part in absent)
    lora = ""
    if not args.merged:
        lora = f'pipe.load_lora_weights("DIR")  # {" and ".join(stages)} in one file\n'
    tokens = ""
    also = ""
    if base.backbone.scheduler_steps_on_tokens:
        shape = f"pipe.scheduler.latent_shape = {base.latent_shape}"
        tokens = f"{shape}  # (C, h, w) for this height and width\n"
        also = "\n`latent_shape` is needed for the picture that our own loop draws from a seed."
    levels = ", ".join(f"{sigma:.3g}" for sigma in base.sigmas(args.steps))
    # a pipeline that asks for an even grid gets ours from any scheduler
    own_levels = "the same" if "sigmas" in base.backbone.timesteps(args.steps) else "others"
    height, width = sides(args.resolution)
    base_place = ""
    if place == "BASE":
        base_place = " BASE is the base model's directory or repository."
    return f"""```python
import torch
from diffusers import {pipeline}
from cps import CPSScheduler  # cps.py lies in this directory

pipe = {pipeline}.from_pretrained(
    "{place}",
{without}    torch_dtype=torch.bfloat16,  # `dtype` from diffusers 1.0 on
).to("cuda")
{lora}pipe.scheduler = CPSScheduler.from_config(pipe.scheduler.config, eta={args.eta:g})
pipe.scheduler.generator = torch.Generator().manual_seed(0)  # of the noise of the steps
{tokens}image = pipe(
    "a photo of a cat",
    num_inference_steps={args.steps},
    guidance_scale=1.0,
    height={height},
    width={width},
    max_sequence_length={base.text_tokens},
    generator=pipe.scheduler.generator,  # of the noise that it starts from
).images[0]
```

DIR is this directory or repository.{base_place} Run it where `cps.py` is, or copy that file to where you work.
That no keys belong to the text encoders, where diffusers warns of it, means nothing here. The scheduler brings the right noise levels, {levels};
with the one that the base comes with, `num_inference_steps={args.steps}` uses {own_levels}, and no noise.
Both generators are needed for a picture that comes again: pipelines do not hand theirs to the scheduler.{also}
"""


def two_adapters(stages):
    """The same two stages, loaded apart."""
    lines = []
    for stage in stages:
        lines.append(
            f'pipe.load_lora_weights("DIR", weight_name="{stage}.safetensors", adapter_name="{stage}")'
        )
    code = "\n".join(lines)
    return f"""The two stages are stacked. As two adapters, in place of the line with `load_lora_weights`:

```python
{code}
pipe.set_adapters({json.dumps(stages)})  # both; the second in the first one's place would lose stage 1
```
"""


def origin(files):
    lines = [f"- {ADAPTERS[adapter]}: {made_with(path)}" for adapter, path in files.items()]
    return "\n".join(["## How it was made", "", *lines, ""])


def made_with(path):
    """How these weights were trained, as ckpt.pt or settings.json beside them say it: a line of markdown."""
    checkpoint_path = os.path.join(os.path.dirname(path), "ckpt.pt")
    flags = None
    if os.path.exists(checkpoint_path):
        saved = read(checkpoint_path, "checkpoint")
        flags = saved.get("flags") if isinstance(saved, dict) else None
    if not isinstance(flags, dict):
        return made_with_settings(path)
    prompts = os.path.basename(flags.get("prompts") or "")
    said = []
    for name, value in flags.items():
        of_the_run = name not in FREE - {"steps", "epochs"} and " " not in name
        if of_the_run and not is_left_out(value):
            said.append(f"--{name}" if value is True else f"--{name} {value}")
    flags_said = " ".join(said)
    return f"prompts {prompts or 'made on the spot in GenEval form'}; `{flags_said}`"


def made_with_settings(path):
    settings = settings_of(path)
    said = []
    for name in ("lora_rank", "lora_alpha", "num_steps", "eta", "cfg", "variant", "seed"):
        if not is_left_out(settings.get(name)):
            said.append(f"--{name} {settings[name]}")
    if not said:
        return "its flags are not known"
    return f"`{' '.join(said)}`; its other flags are not known"


def is_left_out(value):
    """Whether a flag's value has nothing to say to others: not set, not one word, or a path."""
    if isinstance(value, str):
        return value == "" or " " in value or os.sep in value
    return value is False or not isinstance(value, (int, float))


def read_scores(path):
    """Lines of a scores.jsonl; dies where it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if line.strip()]
        missing = [line for line in lines if "prompt" not in line]
    except (OSError, ValueError, TypeError) as e:
        die(f"--scores {path} cannot be read: {getattr(e, 'strerror', None) or e}")
    if missing or not lines:
        die(f"--scores {path} is no scores.jsonl of tools.evaluate")
    return lines


def score_table(path):
    """The means of a scores.jsonl, with standard errors, as a table."""
    lines = read_scores(path)
    prompts = [line["prompt"] for line in lines]
    about = ("image", "prompt", "tag", "seed", "drawn_by")
    table = []
    for name, first in lines[0].items():
        if isinstance(first, dict):  # the other one's, by its name
            for reward in first:
                scores = [line[name][reward] for line in lines]
                table.append((name, reward, scores))
        elif name not in about:
            drawn_by = lines[0].get("drawn_by", "student")
            table.append((drawn_by, name, [line[name] for line in lines]))
    rows = []
    for who, reward, scores in table:
        rows.append(f"| {who} | {reward} | {with_error(*mean_and_error(scores, prompts))} |")
    return "\n".join(
        [
            "## Scores",
            "",
            f"Means over {len(lines)} pictures, with standard errors.",
            "",
            "| | reward | mean |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def licence(base, args):
    known = base.backbone.licence(public_name(args))
    name = known.get("license_name", known["license"])
    called = "" if name == "other" else f", `{name}`"
    return f"""## Licence

These weights derive from {base_in_words(args)} and fall under its licence{called}.
`cps.py` is under Apache-2.0. Reward models and prompts have licences of their own.
"""


# ---- nothing half-written ------------------------------------------------------------------------
@contextlib.contextmanager
def new_folder(path):
    """A folder under a temporary name, which becomes `path` when all is in it.

    Dies with one line where it cannot be made or filled; nothing is left then.
    """
    folder = path.rstrip("/") + ".tmp"
    if not path or os.path.lexists(path) or os.path.lexists(folder):
        reason = "it, or its .tmp, is there already" if path else "no name"
        die(f"cannot export to {path!r}: {reason}; name a new directory")
    try:
        os.makedirs(folder)
    except OSError as e:
        die(f"cannot write to {path}: {e.strerror}")
    try:
        yield folder
        os.rename(folder, path)
    except Exception as e:  # safetensors has an error of its own for a full disk
        die(f"cannot export to {path} ({first_line(e)})", status=1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def export(base, files, args, folder):
    """Fill the folder with the adapters that the base carries. Merging changes the base."""
    card = model_card(base, files, args)
    if args.merged:
        write_merged(base, files, folder)
    else:
        write_lora(base, files, args, folder)
    write_json(os.path.join(folder, SETTINGS_NAME), sampling_settings(args))
    shutil.copy(os.path.join(ROOT, "cps.py"), folder)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(card)


def main():
    args = arguments()
    device = chosen_device(args, 0)
    end_on_signals("stopped by a signal; nothing is exported")
    if args.scores:
        read_scores(args.scores)
    with new_folder(args.out_dir) as folder:
        files = generator_files(args)
        args = settled(args, files)
        base = load_base(args, device)
        load_generator(base, files, args.lora_alpha)
        export(base, files, args, folder)
    end_on_signals("stopped by a signal; the export is there")
    if not public_name(args):
        note(
            f"the base model {place_of_base(args)} is a directory of this machine, so the export does not "
            "name it: --base_model ID does"
        )
    print(f"{args.out_dir}: {', '.join(sorted(os.listdir(args.out_dir)))}")
    print(f"to publish it: hf upload OWNER/NAME {shlex.quote(args.out_dir)}", flush=True)


if __name__ == "__main__":
    main()
