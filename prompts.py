"""Prompts: files of them, and prompts in GenEval's form for training without a download."""

import json
import random

from common import note

COCO_CLASSES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra,
giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush"""
COCO = COCO_CLASSES.replace("\n", " ").split(", ")
CATEGORIES = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
NUMBERS = "zero one two three four five six seven eight nine ten".split()
RELATIONS = ["left of", "right of", "above", "below"]
PLURALS = {
    "person": "people",
    "sheep": "sheep",
    "skis": "skis",
    "knife": "knives",
    "scissors": "scissors",
    "computer mouse": "computer mice",
}


# ---- made up -------------------------------------------------------------------------------------
def geneval_prompts(count=20000, seed=0):
    """`count` prompts in GenEval's six categories over the 80 classes of COCO.

    -> [{"prompt", "metadata"}], metadata as GenEval writes it.
    """
    rng = random.Random(f"geneval/{seed}")
    rows = []
    for i in range(count):
        tag = CATEGORIES[i % 6]
        first, second = rng.sample(COCO, 2)
        color, other_color = rng.sample(COLORS, 2)
        exclude = {}
        if tag == "single_object":
            text = with_article(first)
            include = [one(first)]
        elif tag == "two_object":
            text = f"{with_article(first)} and {with_article(second)}"
            include = [one(first), one(second)]
        elif tag == "counting":
            n = rng.randint(2, 4)
            text = f"{NUMBERS[n]} {plural(first)}"
            include = [one(first, count=n)]
            exclude = {"exclude": [one(first, count=n + 1)]}
        elif tag == "colors":
            text = f"{with_article(color)} {first}"
            include = [one(first, color=color)]
        elif tag == "position":
            relation = rng.choice(RELATIONS)
            text = f"{with_article(first)} {relation} {with_article(second)}"
            include = [one(second), one(first, position=[relation, 0])]
        else:
            text = f"{with_article(color)} {first} and {with_article(other_color)} {second}"
            include = [one(first, color=color), one(second, color=other_color)]
        prompt = f"a photo of {text}"
        metadata = {"tag": tag, "include": include, **exclude, "prompt": prompt}
        rows.append({"prompt": prompt, "metadata": metadata})
    return rows


def with_article(words):
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(words):
    ending = "es" if words[-1] in "sh" else "s"
    return PLURALS.get(words, words + ending)


def one(name, **more):
    """An entry of GenEval's "include": one object of a class, unless `more` says otherwise."""
    return {"class": name, "count": 1, **more}


def note_templates(rows, args):
    """Say so where stage 1 has nothing but the built-in prompts to learn from; rank 0 only.

    The generator learns to draw what it is asked for in training, and those ask for objects of 80
    kinds and nothing else.
    """
    if not args.prompts:
        note(
            f"no --prompts, so the generator learns from {len(rows)} built-in ones in GenEval's form "
            f'("{rows[0]["prompt"]}"): good for a try and for GenEval; to draw anything else, give '
            '--prompts FILE as under "The real recipe" in the README'
        )


# ---- files ---------------------------------------------------------------------------------------
def load_prompts(path, metadata=""):
    """-> list of {"prompt": str, "metadata": dict}

    path: a prompt a line; or a line of JSON each, with "prompt" and whatever a reward needs; or one
    JSON list of texts or of such objects. The content decides, and a name that ends in .jsonl. ""
    gives geneval_prompts(). metadata: a second such file, in which to look the prompts up. Raises
    ValueError, one line that names file and line.
    """
    if metadata:
        return looked_up(load_prompts(path), metadata)
    if not path:
        return geneval_prompts()
    if path.endswith(TABLES):
        raise ValueError(f"--prompts {path}: a table is not read; save its prompts, one a line")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read --prompts {path}: {reason}") from None
    whole = None if path.endswith(".jsonl") else from_json(text)
    first_line = text.strip().split("\n")[0]
    if path.endswith(".json") and whole is None and not isinstance(from_json(first_line), dict):
        raise ValueError(f"--prompts {path}: is no JSON; a prompt a line goes into a .txt")
    if isinstance(whole, (list, dict)):
        entries = whole if isinstance(whole, list) else [whole]
        numbered = list(enumerate(entries, 1))
        unit = "entry"
    else:
        lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
        lines = [(number, line) for number, line in lines if line]
        as_json = path.endswith(".jsonl") or (lines and isinstance(from_json(lines[0][1]), dict))
        parse = from_json if as_json else not_json
        numbered = [(number, parse(line)) for number, line in lines]
        unit = "line"
    rows = [row_of(entry, unit, number, path) for number, entry in numbered]
    if not rows:
        raise ValueError(f"--prompts {path} is empty: it needs a prompt a line")
    return rows


TABLES = (".csv", ".tsv", ".parquet", ".xlsx", ".arrow")


def from_json(text):
    """What a text says in JSON; None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the second: very many brackets
        return None


def not_json(line):
    """A line of plain text, and None where it is a JSON object or list among such lines."""
    return None if isinstance(from_json(line), (dict, list)) else line


def row_of(entry, unit, number, path):
    """A text, or an object with one under "prompt" -> {"prompt", "metadata"}; ValueError for others."""
    content = {"prompt": entry} if isinstance(entry, str) else entry
    prompt = content.get("prompt") if isinstance(content, dict) else None
    try:
        fine = isinstance(prompt, str) and prompt.strip() and prompt.encode()
    except UnicodeEncodeError:  # half a surrogate pair is no text
        fine = False
    if not fine:
        raise ValueError(
            f'--prompts {path}, {unit} {number}: needs a text, or a JSON object with a non-empty text under "prompt", and all '
            "of a file alike"
        )
    # the number of its line or entry, so that a reward that does not like it can say which
    return {"prompt": prompt, "metadata": {**content, unit: number}}


def looked_up(rows, path):
    """The rows of the file at `path` that have these rows' prompts; ValueError where one is missing."""
    known = {row["prompt"]: row for row in load_prompts(path)}

    def wrong(prompt, _):
        return None if prompt in known else f"not in --metadata {path}"

    prompts = [row["prompt"] for row in rows]
    each(prompts, [row["metadata"] for row in rows], wrong)
    return [known[prompt] for prompt in prompts]


def each(prompts, metadata, wrong):
    """ValueError for the first prompt of which wrong(prompt, metadata) has something to say.

    It names the line of the file.
    """
    for i, (prompt, row) in enumerate(zip(prompts, metadata), 1):
        reason = wrong(prompt, row)
        if reason:
            unit = next((unit for unit in ("line", "entry") if unit in row), None)
            place = f"{unit} {row[unit]}" if unit else f"prompt {i}"
            raise ValueError(f"{place} ({prompt[:60]!r}): {reason}")
