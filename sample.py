"""Draw pictures: 4 CPS steps, no guidance, stage 1's and stage 2's adapters stacked on the base.

    python sample.py "a red circle above a blue square" --preset tiny
    python sample.py "a photo of two cats" --num_images 8                  # out/cold_start and out/rtdmd on SD3.5-M
    python sample.py "..." --cold_start Harahan/SD35M-RTDMD --rtdmd Harahan/SD35M-RTDMD       # the published weights
    python sample.py --prompts FILE --rewards clipscore,geneval --compare  # evaluate beside the teacher: scores.jsonl, means, categories
    python sample.py "..." --teacher                                       # the base, 50 steps with guidance, as diffusers draws it
    python sample.py --export DIR --export_merged DIR2                     # for diffusers: LoRA files, a whole pipeline

`noise_of` and `integrate` are the whole sampler. Each picture has its own seed (seed + its index), so that it does not depend on the batch size.
"""

import argparse
import os
import sys
import time

import torch
from diffusers.utils.torch_utils import randn_tensor

from checkpoint import DEFAULT_PLACES, find_weights
from common import checked, die, parse, setup
from cps import rollout, sigmas
from export import STAGES, check_exports, export
from model import (
    decode,
    graphed,
    load_adapter,
    load_pipeline,
    note_prompts,
    play,
    save_grid,
    text_encoder,
)
from prompts import load_prompts
from rewards import build, guarded
from rtdmd_rl import PRESETS


@torch.no_grad()
def draw(v, seeds, shape, levels, eta, device):
    """The sampler: one latent a seed -> [B,C,h,w] float32. v is a velocity function, levels as from cps.sigmas."""
    return integrate(v, noise_of(seeds, shape, levels, eta, device), levels, eta)


def noise_of(seeds, shape, levels, eta, device):
    """Starting noise and that of the stochastic steps, picture i's from seeds[i] alone -> [K,B,C,h,w] (eta 0: [1,B,C,h,w])."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    normal = lambda: randn_tensor((len(seeds), *shape), generator=generators, dtype=torch.float32)
    return torch.stack([normal() for _ in range(len(levels) - 1 if eta > 0 else 1)]).to(device)


def integrate(v, noise, levels, eta):
    """From noise[0] along all steps of `rollout` (Eq. 8, 19-21) to the latents; steps that noise has nothing for add none."""
    steps = len(levels) - 1
    return rollout(
        v, noise[0], levels, steps, eta, [*noise[1:], *[torch.zeros_like(noise[0])] * steps]
    )[-1]


def load_generator(pipe, args):
    """Stack the adapters of --cold_start and --rtdmd on the base -> their names, for `play`. Never the second INTO the first."""
    names = []
    for name, stage in STAGES.items():
        if getattr(args, stage):
            path = find_weights(getattr(args, stage), stage)
            load_adapter(pipe.transformer, name, path, given_alpha=args.lora_alpha)
            names.append(name)
    pipe.transformer.requires_grad_(False)
    return names


def teacher_levels(pipe, steps, shift=None):
    """Noise levels of a teacher's picture: those that a StableDiffusion3Pipeline draws with -> a list of steps + 1 floats, the last one 0.

    What the student is compared with is what a user's pipeline makes of the base, so the levels are those of the scheduler that the
    base comes with, and not `cps.sigmas`: diffusers shifts the end of its grid twice, so that 50 steps end in .121, .067, .009, 0
    and not in .161, .111, .058, 0. `shift` replaces the scheduler's own. The pipeline's scheduler itself is left as it is.
    """
    changes = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


# What each of the two is drawn with unless the flags say otherwise; a preset may have another cfg. The teacher's shift is its scheduler's.
USUAL = {
    "student": dict(steps=4, eta=0.9, cfg=1.0, shift=3.0),
    "teacher": dict(steps=50, eta=0.0, cfg=4.5),
}


def arguments():
    parser = argparse.ArgumentParser(
        description="Draw pictures with the 4-step generator, or with its teacher.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error, add = die, parser.add_argument
    add("prompt", nargs="?", default="", help="what to draw")
    add("--preset", choices=list(PRESETS), default="sd35m", help="set of default flags")
    add("--pretrained", help="diffusers directory or hub id of the base model")
    add(
        "--cold_start",
        default=DEFAULT_PLACES["cold_start"],
        help="stage 1's out_dir, an export, a release's checkpoint-N, an adapter file, a hub "
        "repository; '' to leave it out",
    )
    add(
        "--rtdmd",
        default=DEFAULT_PLACES["rtdmd"],
        help="stage 2's, in the same way; '' to draw with stage 1 alone",
    )
    add(
        "--teacher",
        action="store_true",
        help="draw with the base alone: many steps, guidance, no adapters",
    )
    add(
        "--compare",
        action="store_true",
        help="draw with both, from the same seeds, and score them side by side; the teacher's go to out_dir/teacher",
    )
    add(
        "--prompts",
        default="",
        help='file with a prompt a line, or jsonl with "prompt" and metadata for rewards; -: stdin, each line as it comes',
    )
    add(
        "--metadata",
        default="",
        help="jsonl in which to look up the metadata of --prompts, if those are not jsonl themselves",
    )
    add("--num_images", type=int, default=1, help="pictures of each prompt")
    add("--batch_size", type=int, default=8, help="pictures at once; does not change them")
    add("--seed", type=int, default=0, help="picture i is drawn from seed + i")
    add("--steps", type=int, help="sampling steps (default: 4, teacher 50)")
    add(
        "--eta",
        type=float,
        help="stochasticity of the CPS steps in [0, 1] (default: 0.9, teacher 0: Euler)",
    )
    add(
        "--shift",
        type=float,
        help="SD3 time shift of the sampling grid (default: 3, teacher: the base's own)",
    )
    add("--cfg", type=float, help="guidance scale (default: 1, none; teacher: the preset's)")
    add(
        "--lora_alpha",
        type=float,
        help="alpha of the adapters, whatever their files' surroundings say (default: what they say, else 64)",
    )
    add("--resolution", type=int, default=512, help="height and width in pixels")
    add("--max_sequence_length", type=int, default=128, help="T5 tokens of a prompt")
    add(
        "--rewards",
        default="",
        help="name,name,...: score the pictures, print means, write scores.jsonl",
    )
    add(
        "--reward_path",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="local directory or file of a reward's model",
    )
    add(
        "--reward_dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision of the reward models; scores are float32",
    )
    add(
        "--reward_batch",
        type=int,
        default=0,
        help="pictures a reward model looks at at once; 0: the batch",
    )
    add("--device", default="cuda", help="cuda, cpu, mps, or auto: the best there is")
    add(
        "--compile",
        type=int,
        choices=(0, 1),
        default=0,
        help="compile blocks and decoder, and capture sampling in one CUDA graph: minutes once, then fast",
    )
    add(
        "--bench",
        type=int,
        default=0,
        help="time so many batches of the prompt, print one JSON line, and stop",
    )
    add(
        "--export",
        metavar="DIR",
        help="write both stages as LoRA files for diffusers, with a model card, into a new directory; needs no prompt",
    )
    add(
        "--export_merged",
        metavar="DIR",
        help="write a whole diffusers pipeline with the LoRAs merged into its transformer (float32)",
    )
    add(
        "--out_dir",
        default="out/samples",
        help="where grid.png, the single pictures and scores.jsonl go",
    )
    preset = PRESETS.get(parser.parse_known_args()[0].preset, {})
    known = {action.dest for action in parser._actions} - {
        "steps",
        "batch_size",
        "prompts",
        "cfg",
        "rewards",
        "compile",
    }
    parser.preset = {k: v for k, v in preset.items() if k in known}
    args = parse(parser)
    USUAL["teacher"]["cfg"] = preset.get("cfg", 4.5)
    USUAL["teacher"]["shift"] = (
        args.shift
    )  # a shift belongs to the base: with --compare the one that is given is the teacher's, too
    for name, value in USUAL["teacher" if args.teacher else "student"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.compare and (args.teacher or args.bench or args.prompts == "-"):
        die("--compare draws with both: it goes with neither --teacher, --bench nor --prompts -")
    if not args.prompts:
        args.prompts, args.metadata = args.metadata, ""
    args.prompt = args.prompt if args.prompt.strip() else ""
    if not (check_exports(args) or args.prompts or args.prompt):
        die("nothing to draw: give a prompt, or --prompts FILE")
    if args.prompt.encode("utf-8", "ignore").decode() != args.prompt:
        die("the prompt is not UTF-8 text")
    return args


def batches(args, rows):
    """Chunks of batch_size rows; with --prompts - the rows of a line of stdin as soon as it is there, while the model stays warm."""
    lines = (
        [rows]
        if args.prompts != "-"
        else (
            [{"prompt": line.strip(), "metadata": {}}] * args.num_images
            for line in sys.stdin
            if line.strip()
        )
    )
    for new in lines:
        rows += new if new is not rows else []
        yield from (new[i : i + args.batch_size] for i in range(0, len(new), args.batch_size))


def main():
    args = arguments()
    rows = (
        []
        if args.prompts == "-"
        else checked(load_prompts, args.prompts, args.metadata)
        if args.prompts
        else [{"prompt": args.prompt, "metadata": {}}]
        if args.prompt
        else []
    )
    rows = [row for row in rows for _ in range(args.num_images)]
    args.batch_size = min(args.batch_size, len(rows) or args.num_images)
    device, *_ = setup(args, training=False)
    pipe = load_pipeline(args, device)
    rewards = (
        [
            guarded(reward)
            for reward in checked(
                build,
                args.rewards,
                device,
                args.reward_path,
                getattr(torch, args.reward_dtype),
                args.reward_batch,
            )
        ]
        if args.rewards
        else []
    )
    for reward in rewards:
        checked(reward.check, [row["prompt"] for row in rows], [row["metadata"] for row in rows])
    adapters, encode, results = (
        [] if args.teacher else load_generator(pipe, args),
        text_encoder(pipe, args),
        {},
    )
    note_prompts(pipe, rows[:: args.num_images], args)  # each once, however many pictures it gets
    runs = {"teacher" if args.teacher else "student": args}
    if args.compare:
        runs["teacher"] = argparse.Namespace(
            **{
                **vars(args),
                **USUAL["teacher"],
                "teacher": True,
                "out_dir": f"{args.out_dir}/teacher",
            }
        )
    for who, its in runs.items() if args.prompts or args.prompt else ():
        results[who] = draw_all(
            its, pipe, encode, [] if who == "teacher" else adapters, rows, rewards, device
        )
    if rewards and results and not args.bench:
        from report import write_scores

        write_scores(rows, args.seed, results, f"{args.out_dir}/scores.jsonl")
    export(pipe, adapters, args, rows, results)


def draw_all(args, pipe, encode, adapters, rows, rewards, device):
    """Draw every row, save the pictures, score them -> {reward: [score of each row]}. With --prompts -, rows fills up on the way."""
    if args.teacher:
        levels = checked(teacher_levels, pipe, args.steps, args.shift)
    else:
        levels = sigmas(args.steps, args.shift)
    negative = encode([""]) if args.cfg != 1 else None
    os.makedirs(args.out_dir, exist_ok=True)
    for layer in (
        layer for layer in pipe.transformer.lora_layers if layer.present(adapters)
    ):  # put together and rounded once, not in every pass
        layer.fixed = {
            tuple(adapters): [m.to(pipe.transformer.dtype) for m in layer.pair(adapters)]
        }

    @torch.no_grad()
    def render(noise, embeds, pooled):
        v = play(pipe.transformer, adapters, (embeds, pooled), negative, args.cfg)
        return decode(pipe, integrate(v, noise, levels, args.eta))

    recorded = (
        args.compile and device.type == "cuda"
    )  # a compiled graph knows one batch size: the last batch is filled up
    (render,) = graphed(recorded, device, render)
    scores, pictures, i, start = {r.name: [] for r in rewards}, [], 0, time.time()
    for batch in batches(args, rows):
        prompts, inputs_of = (
            [row["prompt"] for row in batch],
            lambda prompts: (
                noise_of(
                    range(args.seed + i, args.seed + i + len(prompts)),
                    pipe.latent_shape,
                    levels,
                    args.eta,
                    device,
                ),
                *encode(prompts),
            ),
        )
        if args.bench:
            from report import bench

            return bench(args, inputs_of, render, prompts, device)
        images = render(
            *inputs_of(prompts + prompts[-1:] * (recorded and args.batch_size - len(prompts)))
        )[: len(batch)]
        for reward in rewards:
            with torch.no_grad():
                scores[reward.name] += reward(
                    images, prompts, [row["metadata"] for row in batch]
                ).tolist()
        for j, image in enumerate(images):
            save_grid(image[None], os.path.join(args.out_dir, f"{i + j:05d}.png"))
        pictures += list(images[: max(0, 64 - len(pictures))].cpu())
        if args.prompts == "-":
            print(
                f"{args.out_dir}/{i:05d}.png  {time.time() - start:.3f} s  {prompts[0]}", flush=True
            )
        i += len(batch)
    if not rows:
        die("no prompt came in on stdin")
    save_grid(
        torch.stack(pictures),
        os.path.join(args.out_dir, "grid.png"),
        columns=min(8, max(4, args.num_images)),
    )
    print(f"{len(rows)} pictures in {time.time() - start:.1f} s -> {args.out_dir}/grid.png")
    return scores


if __name__ == "__main__":
    main()
