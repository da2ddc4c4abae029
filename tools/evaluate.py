"""Draw prompts and score the pictures: scores.jsonl, means with standard errors, GenEval's categories.

    python -m tools.evaluate --prompts FILE --rewards clipscore,geneval              # the student
    python -m tools.evaluate --prompts FILE --rewards clipscore,geneval --compare    # beside the teacher
    python -m tools.evaluate --prompts FILE --rewards clipscore --teacher            # the teacher alone
    torchrun --nproc_per_node=8 -m tools.evaluate --prompts FILE --rewards clipscore  # on 8 GPUs

What is drawn, and with what, is said as for sample.py. Called again, it draws what is missing: a
picture that is there, with the same text in its PNG, is read. Scores do not depend on the number of
processes. Rewards may need metadata: either --prompts is a .jsonl that has it, or --metadata names one
in which the prompts are looked up. `tools.export --scores out/evaluation/scores.jsonl` puts the means
into a model card.
"""

import json
import math
import os

import torch
import torch.distributed as dist

from common import (
    checked,
    die,
    end_on_signals,
    gather,
    make_out_dir,
    meet,
    note,
    parse,
    say,
    setup,
    write_atomically,
)
from rewards import build_for
from sample import (
    PRESETS,
    as_teacher,
    check_prompt,
    draw_all,
    flags,
    generator_files,
    load_base,
    load_generator,
    next_number,
    origin_of,
    rows_to_draw,
    save_first,
    settled,
)
from text import note_prompts

BY_CATEGORY = ("geneval", "geneval_soft")  # rewards whose means are given by category, too
FIRST_COLUMN = 28  # "geneval_soft single_object" is the longest
COLUMN = 22


def arguments():
    parser = flags("Score the pictures of the 4-step generator, of its teacher, or of both.")
    parser.set_defaults(out_dir="out/evaluation")
    add = parser.add_argument
    add("--rewards", required=True, metavar="NAME,...", help="what scores the pictures")
    add("--compare", action="store_true", help="the teacher from the same seeds, too")
    add("--metadata", default="", help="jsonl in which the metadata of --prompts are looked up")
    text = "local directory or file of a reward's model"
    add("--reward_path", action="append", default=[], metavar="NAME=PATH", help=text)
    text = "precision of the reward models; scores are float32"
    add("--reward_dtype", choices=("float32", "bfloat16"), default="float32", help=text)
    args = parse(parser, PRESETS)
    if args.compare and args.teacher:
        die("--compare draws with student and teacher: it does not go with --teacher")
    if ":" in args.rewards:
        die(f"--rewards {args.rewards}: names alone, since scores are not summed here")
    if args.metadata and not args.prompts:  # then it is the list of prompts as well
        args.prompts = args.metadata
        args.metadata = ""
    check_prompt(args)
    return args


def load_rewards(args, rows, device):
    """The rewards of --rewards; dies where one is not there or does not like the prompts."""
    dtype = getattr(torch, args.reward_dtype)
    return checked(build_for, rows, args.rewards, device, args.reward_path, dtype)


def scores_of(base, adapters, rows, args, origin, rewards, share):
    """Draw all rows into args.out_dir -> {reward: [score of each row]}, on every process.

    What is scored is what the files hold, so that pictures of an earlier call count the same.
    share: (rank, processes).
    """
    mine = {}  # {place of a batch: {reward: its scores}}

    @torch.no_grad()
    def score(pictures, first, batch):
        prompts = [row["prompt"] for row in batch]
        metadata = [row["metadata"] for row in batch]
        mine[first] = {}
        for reward in rewards:
            mine[first][reward.name] = reward(pictures, prompts, metadata).tolist()

    draw_all(base, adapters, rows, args, origin, share=share, look=score)
    batches = {first: scores for found in gather(mine) for first, scores in found.items()}
    scores = {reward.name: [] for reward in rewards}
    for first in sorted(batches):
        for name in scores:
            scores[name] += batches[first][name]
    if share[0] == 0:
        save_first(args, 0, len(rows))
    return scores


# ---- what comes out ------------------------------------------------------------------------------
def mean_and_error(scores, prompts):
    """Mean of the scores and its standard error, nan where there is but one.

    Pictures of one prompt are not independent: if there are several prompts, their means are the
    samples.
    """
    of_prompt = {}
    for score, prompt in zip(scores, prompts, strict=True):
        of_prompt.setdefault(prompt, []).append(score)
    samples = scores
    if len(of_prompt) > 1:
        samples = [sum(group) / len(group) for group in of_prompt.values()]
    samples = torch.tensor(samples, dtype=torch.float64)
    mean = samples.mean().item()
    if len(samples) == 1:
        return mean, math.nan
    return mean, samples.std().item() / math.sqrt(len(samples))


def with_error(mean, error):
    """'0.5000 +- 0.1000', or the mean alone where its error is not known."""
    return f"{mean:.4f}" if math.isnan(error) else f"{mean:.4f} +- {error:.4f}"


def write_scores(rows, seed, results, path):
    """A line of JSON a picture.

    results: {who drew: {reward: [score of each row]}}. Those of the first stand in the line itself, of
    a second one under its name.
    """
    drawn_by, *others = results
    lines = []
    for i, row in enumerate(rows):
        line = {"image": f"{i:05d}.png", "prompt": row["prompt"]}
        if row["metadata"].get("tag"):
            line["tag"] = row["metadata"]["tag"]
        line["seed"] = seed + i
        line["drawn_by"] = drawn_by
        line.update({reward: scores[i] for reward, scores in results[drawn_by].items()})
        for who in others:
            line[who] = {reward: scores[i] for reward, scores in results[who].items()}
        lines.append(json.dumps(line) + "\n")
    write_atomically({path: "".join(lines).encode()})


def print_means(rows, results):
    """A line a reward, a column for each who drew and, of two, one for their difference."""
    prompts = [row["prompt"] for row in rows]
    tags = [row["metadata"].get("tag") for row in rows]
    titles = list(results)
    if len(titles) == 2:
        titles.append(" - ".join(titles))
        print_line("", titles)
    for name in next(iter(results.values())):
        columns = [scores[name] for scores in results.values()]
        if len(columns) == 2:
            columns.append([ours - theirs for ours, theirs in zip(*columns, strict=True)])
        print_line(name, [with_error(*mean_and_error(column, prompts)) for column in columns])
        if name in BY_CATEGORY and None not in tags:
            print_categories(name, columns, prompts, tags)


def print_categories(name, columns, prompts, tags):
    """A line a category and their mean, which is what GenEval calls its score."""
    categories = sorted(set(tags))
    means = [[] for _ in columns]
    for category in categories:
        here = [i for i, tag in enumerate(tags) if tag == category]
        cells = []
        for column, its_means in zip(columns, means, strict=True):
            scores = [column[i] for i in here]
            mean, error = mean_and_error(scores, [prompts[i] for i in here])
            its_means.append(mean)
            cells.append(with_error(mean, error))
        print_line(f"{name} {category}", cells)
    cells = [f"{sum(its_means) / len(categories):.4f}" for its_means in means]
    print_line(f"{name}, categories", cells)


def print_line(first, cells):
    columns = "".join(f"{cell:{COLUMN}s}" for cell in cells)
    say(f"{first:{FIRST_COLUMN}s}{columns}".rstrip())


def main():
    args = arguments()
    rows = rows_to_draw(args, args.metadata)
    device, rank, world = setup(args, training=False)
    end_on_signals("stopped by a signal; the same command draws and scores what is missing")
    meet("gloo")  # scores are gathered, and nothing else
    files = generator_files(args)
    args = settled(args, files)
    rewards = load_rewards(args, rows, device)
    base = load_base(args, device, has_teacher=args.compare)
    if args.teacher:
        files = {}
    share = (rank, world)
    origin = origin_of(base, files, args)
    if args.compare:
        teacher = as_teacher(args)
        teacher.out_dir = os.path.join(args.out_dir, "teacher")
        make_out_dir(teacher.out_dir, "", rank)
        teacher_origin = origin_of(base, {}, teacher)
    adapters = load_generator(base, files, args.lora_alpha)
    note_prompts(base, rows[:: args.num_images])  # each once, however many pictures it gets
    who = "teacher" if args.teacher else "student"
    results = {who: scores_of(base, adapters, rows, args, origin, rewards, share)}
    if args.compare:
        results["teacher"] = scores_of(base, [], rows, teacher, teacher_origin, rewards, share)
    if rank == 0:
        others = next_number(args.out_dir) - len(rows)
        if others > 0:
            note(f"{args.out_dir} holds {others} pictures of an earlier call, which are not scored")
        write_scores(rows, args.seed, results, os.path.join(args.out_dir, "scores.jsonl"))
        print_means(rows, results)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
