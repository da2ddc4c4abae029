"""Prompts: files of them, and prompts in GenEval's form for training without a download."""
import json
import os
import random
import sys

COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking meter,
bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis,
snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table,
toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n", " ").split(", ")


COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]


NUMBERS = "zero one two three four five six seven eight nine ten".split()


RELATIONS = ["left of", "right of", "above", "below"]


PLURALS = {"person": "people", "sheep": "sheep", "skis": "skis", "knife": "knives", "scissors": "scissors", "computer mouse": "computer mice"}


def geneval_prompts(count=20000, seed=0):
    """`count` prompts in GenEval's six categories over the 80 COCO classes -> [{"prompt", "metadata"}], metadata as GenEval writes it."""
    rng, rows = random.Random(f"geneval/{seed}"), []
    a = lambda words: f"a{'n' if words[0] in 'aeiou' else ''} {words}"
    plural = lambda words: PLURALS.get(words, words + ("es" if words[-1] in "sh" else "s"))
    one = lambda name, **more: {"class": name, "count": 1, **more}
    for i in range(count):
        tag = ("single_object", "two_object", "counting", "colors", "position", "color_attr")[i % 6]
        (x, y), (c, d) = rng.sample(COCO, 2), rng.sample(COLORS, 2)
        n = rng.randint(2, 4) if tag == "counting" else 0
        relation = rng.choice(RELATIONS) if tag == "position" else ""
        text, include = {
            "single_object": (a(x), [one(x)]),
            "two_object": (f"{a(x)} and {a(y)}", [one(x), one(y)]),
            "counting": (f"{NUMBERS[n]} {plural(x)}", [one(x, count=n)]),
            "colors": (f"{a(c)} {x}", [one(x, color=c)]),
            "position": (f"{a(x)} {relation} {a(y)}", [one(y), one(x, position=[relation, 0])]),
            "color_attr": (f"{a(c)} {x} and {a(d)} {y}", [one(x, color=c), one(y, color=d)])}[tag]
        exclude = {"exclude": [one(x, count=n + 1)]} if n else {}
        prompt = f"a photo of {text}"
        rows.append({"prompt": prompt, "metadata": {"tag": tag, "include": include, **exclude, "prompt": prompt}})
    return rows


def load_prompts(path, metadata=""):
    """-> list of {"prompt": str, "metadata": dict}. path: a prompt a line, or .jsonl with "prompt" and whatever a reward needs;
    "" gives geneval_prompts(). metadata: a second such .jsonl, in which to look the prompts up. ValueError, one line, names file and line."""
    if metadata:
        rows, known = load_prompts(path), {row["prompt"]: row for row in load_prompts(metadata)}
        prompts = [row["prompt"] for row in rows]
        each(prompts, [row["metadata"] for row in rows], lambda prompt, _: None if prompt in known else f"not in --metadata {metadata}")
        return [known[prompt] for prompt in prompts]
    if not path:
        return geneval_prompts()
    try:
        with open(path, encoding="utf-8-sig") as f:
            lines = [(i, line.strip()) for i, line in enumerate(f, 1) if line.strip()]
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read --prompts {path}: {getattr(e, 'strerror', None) or 'it is not UTF-8 text'}") from None
    if not lines:
        raise ValueError(f"--prompts {path} is empty: it needs a prompt a line")
    rows = []
    for i, line in lines:
        try:
            row = json.loads(line) if path.endswith(".jsonl") else {"prompt": line}
            fine = row["prompt"].strip() and row["prompt"].encode()  # half a surrogate pair is no text
        except Exception:  # not JSON, not an object, no text under "prompt"
            fine = False
        if not fine:
            raise ValueError(f"--prompts {path}, line {i}: needs a JSON object with a non-empty text under \"prompt\"")
        rows.append({"prompt": row["prompt"], "metadata": {**row, "line": i}})  # "line", so that a reward that does not like it can say which
    return rows


def each(prompts, metadata, wrong):
    """ValueError for the first prompt of which wrong(prompt, metadata) has something to say; it names the line of the file."""
    for i, (prompt, row) in enumerate(zip(prompts, metadata), 1):
        reason = wrong(prompt, row)
        if reason:
            raise ValueError(f"{'line' if 'line' in row else 'prompt'} {row.get('line', i)} ({prompt[:60]!r}): {reason}")


def note_templates(rows, args):
    """Say so where stage 1 has nothing but the built-in prompts to learn from; rank 0 only.

    The generator learns to draw what it was asked for in training, and those ask for objects of 80 kinds and nothing else.
    """
    if args.prompts or os.environ.get("RANK", "0") != "0":
        return
    print(f"note: no --prompts, so the generator learns from {len(rows)} built-in ones in GenEval's form (\"{rows[0]['prompt']}\"): "
          "good for a try and for GenEval; to draw anything else, give --prompts FILE as under \"The real recipe\" in the README",
          file=sys.stderr, flush=True)
