"""GenEval's two rewards, and how they are told.

`geneval` is 1 or 0 by its rules, `geneval_soft` the partial credit that stage 2 trains on.

Every case of the table below was decided by hand from the rules, before the code was asked. The
soft score is the mean over the parts of all "include" entries, and its arithmetic stands beside
each case, one summand a part.
"""

import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import rewards
import rtdmd_rl
from tools import evaluate

CLIP = f"clipscore={Path(__file__).resolve().parent.parent}/assets/tiny/clip"


# ---- what is seen, what is asked for
def at(x, y, name="cat", p=0.95, color="red", size=20):
    """A detection `size` pixels wide and high, centred on (x, y).

    Its colour is what the classifier would answer.
    """
    return name, p, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), color


def row(n, name="cat", y=50, **more):
    """n of them side by side from x = 0, well apart."""
    return [at(30 * i, y, name, **more) for i in range(n)]


def want(name="cat", count=1, **more):
    return {"class": name, "count": count, **more}


def metadata(tag, *include, exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


def counted(n):
    """GenEval's own form of a counting prompt: n, and not n + 1."""
    return metadata("counting", want(count=n), exclude=[want(count=n + 1)])


def placed(cats=1, dogs=1):
    """So many cats left of so many dogs. Three parts: the dogs' number, the cats' number, the place."""
    return metadata("position", want("dog", dogs), want("cat", cats, position=["left of", 0]))


def read_colours(name, objects):
    return [thing[3] for thing in objects]


one_cat = metadata("single_object", want())
cat_and_dog = metadata("two_object", want(), want("dog"))
red_cat = metadata("colors", want(color="red"))
cats_in_red = {n: metadata("colors", want(count=n, color="red")) for n in (2, 3)}
red_cat_blue_dog = metadata("color_attr", want(color="red"), want("dog", color="blue"))
blue = {"color": "blue"}
dog = at(200, 50, "dog")
blue_dog = at(200, 50, "dog", color="blue")
dogs_far_right = [at(200, 50, "dog"), at(230, 50, "dog")]

CASES = [  # what is seen, what is asked for, the soft score, GenEval's verdict
    # ---- single object. The verdict forgives any number of them, the soft form counts exactly
    (row(1), one_cat, "1", True),
    ([], one_cat, "0", False),
    (row(2), one_cat, "0", True),  # 1 - |1 - 2| / 1
    (row(3), one_cat, "-1", True),  # 1 - |1 - 3| / 1
    (row(20), one_cat, "-14", True),  # 16 are looked at: 1 - 15 / 1
    ([dog], one_cat, "0", False),
    (row(1) + row(5, "dog"), one_cat, "1", True),  # what nobody asked for does not count
    (row(1, p=0.3), one_cat, "0", False),  # the threshold itself is not above it
    (row(1, p=0.31), one_cat, "1", True),
    (row(1) + row(1, p=0.3), one_cat, "1", True),
    (row(1) + row(1, p=0.31), one_cat, "0", True),
    # ---- two objects: a part each
    (row(1) + [dog], cat_and_dog, "1", True),
    (row(1), cat_and_dog, "1/2", False),  # (1 + 0) / 2
    ([], cat_and_dog, "0", False),
    (row(2) + [dog], cat_and_dog, "1/2", True),  # (0 + 1) / 2
    (row(3), cat_and_dog, "-1/2", False),  # (-1 + 0) / 2
    (row(3) + row(4, "dog"), cat_and_dog, "-3/2", True),  # (-1 + -2) / 2
    (
        row(1) + [dog, at(9, 9, "car")],
        metadata("two_object", want(), want("dog"), exclude=[want("car")]),
        "1",
        False,
    ),
    # ---- counting: the higher threshold. "exclude" only repeats what the exact count says already
    (row(4), counted(4), "1", True),
    (row(3), counted(4), "3/4", False),
    (row(5), counted(4), "3/4", False),  # one too many costs as much as one too few
    ([], counted(2), "0", False),
    (row(5), counted(2), "-1/2", False),  # 1 - 3 / 2
    (row(20), counted(3), "-10/3", False),  # 16 are looked at: 1 - 13 / 3
    (row(20), metadata("counting", want(count=17)), "16/17", False),
    (row(2) + row(1, p=0.9), counted(2), "1", True),
    (row(1) + row(1, p=0.9), counted(2), "1/2", False),
    (row(1) + row(1, p=0.91), counted(2), "1", True),
    (row(2) + row(5, p=0.5), counted(2), "1", True),
    ([at(50, 50), at(50, 50)], counted(2), "1", True),  # boxes that coincide count twice
    (
        row(3),
        metadata("counting", want(count=2)),
        "1/2",
        True,
    ),  # without "exclude" the verdict forgives the third
    # ---- colours: number, then colour, which is 0 where the number is wrong
    (row(1), red_cat, "1", True),
    (row(1, **blue), red_cat, "1/2", False),  # (1 + 0) / 2
    ([], red_cat, "0", False),  # (0 + 0) / 2
    (row(2), red_cat, "0", True),  # (0 + 0) / 2: both are red, but which one is meant?
    (row(3), red_cat, "-1/2", True),  # (-1 + 0) / 2
    ([at(0, 0, p=0.9), at(50, 0, p=0.8, **blue)], red_cat, "0", True),
    ([at(0, 0, p=0.8), at(50, 0, p=0.9, **blue)], red_cat, "0", False),
    ([at(0, 0), at(50, 0, **blue)], cats_in_red[2], "3/4", False),  # (1 + 1/2) / 2
    (row(2, **blue), cats_in_red[2], "1/2", False),  # (1 + 0) / 2
    (row(2), cats_in_red[3], "1/3", False),  # (2/3 + 0) / 2
    (
        [at(0, 0), at(50, 0, **blue), at(99, 0, **blue)],
        cats_in_red[3],
        "2/3",
        False,
    ),  # (1 + 1/3) / 2
    # ---- two objects with colours: four parts
    (row(1) + [blue_dog], red_cat_blue_dog, "1", True),
    (
        row(1, **blue) + [dog],
        red_cat_blue_dog,
        "1/2",
        False,
    ),  # (1 + 0 + 1 + 0) / 4: the colours are swapped
    (row(1) + [dog], red_cat_blue_dog, "3/4", False),  # (1 + 1 + 1 + 0) / 4
    (row(1), red_cat_blue_dog, "1/2", False),  # (1 + 1 + 0 + 0) / 4
    (row(2) + [blue_dog], red_cat_blue_dog, "1/2", True),  # (0 + 0 + 1 + 1) / 4
    (row(3) + row(3, "dog", **blue), red_cat_blue_dog, "-1/2", True),  # (-1 + 0 - 1 + 0) / 4
    ([], red_cat_blue_dog, "0", False),
    # ---- position: the target's number, the object's number, the place
    (row(1) + [dog], placed(), "1", True),
    ([at(300, 50), dog], placed(), "2/3", False),  # (1 + 1 + 0) / 3: on the wrong side
    (
        [at(196, 50), dog],
        placed(),
        "2/3",
        False,
    ),  # too near: 4 pixels are a tenth of 20 + 20, and no more
    (row(1), placed(), "1/3", False),  # (0 + 1 + 0) / 3: nothing to be left of
    ([dog], placed(), "1/3", False),  # (1 + 0 + 0) / 3
    ([], placed(), "0", False),
    (
        row(1) + dogs_far_right,
        placed(),
        "1/3",
        True,
    ),  # (0 + 1 + 0) / 3: a miscounted target is none
    (row(2) + [dog], placed(), "1/3", True),  # (1 + 0 + 0) / 3
    (row(3) + [dog], placed(), "0", True),  # (1 - 1 + 0) / 3
    (row(2) + [dog], placed(cats=2), "1", True),
    (
        [at(0, 50), at(300, 50), dog],
        placed(cats=2),
        "2/3",
        False,
    ),  # one of two pairs: one 0, not a 0 and a 1
    (row(1) + dogs_far_right, placed(dogs=2), "1", True),
    (
        [at(215, 50, size=5), *dogs_far_right],
        placed(dogs=2),
        "2/3",
        False,
    ),  # left of one of two dogs
    (
        [at(300, 50), at(330, 50), *dogs_far_right],
        placed(2, 2),
        "2/3",
        False,
    ),  # four wrong pairs: one 0, not four
    # ---- a target must hold in all it was asked for, its colour and its own place too
    (
        row(1) + [blue_dog],
        metadata("position", want("dog", color="red"), want(position=["left of", 0])),
        "1/2",
        False,
    ),
    (
        row(1, **blue) + [dog],
        metadata("position", want("dog"), want(color="red", position=["left of", 0])),
        "3/4",
        False,
    ),
    (
        [
            dog,
            at(300, 50),
            at(100, 50, "car"),
        ],  # the car is left of the cat, but the cat is not left of the dog
        metadata(
            "position",
            want("dog"),
            want(position=["left of", 0]),
            want("car", position=["left of", 1]),
        ),
        "3/5",  # (1 + 1 + 0 + 1 + 0) / 5
        False,
    ),
    (
        [
            dog,
            at(100, 50, **blue),
            at(0, 50, "car"),
        ],  # all in their places, but the cat in the middle is not red
        metadata(
            "position",
            want("dog"),
            want(color="red", position=["left of", 0]),
            want("car", position=["left of", 1]),
        ),
        "2/3",  # (1 + 1 + 0 + 1 + 1 + 0) / 6
        False,
    ),
]


@pytest.mark.parametrize("found, asked, credit, verdict", CASES)
def test_the_table_decided_by_hand(found, asked, credit, verdict):
    assert rewards.geneval_credit(found, asked, read_colours) == pytest.approx(
        float(Fraction(credit)), abs=1e-12
    )
    assert rewards.geneval_verdict(found, asked, read_colours) is verdict
    assert rewards.geneval_wrong("", asked) is None


def test_the_table_covers_the_six_categories_and_every_way_in_which_the_two_rewards_disagree():
    tags = Counter(asked["tag"] for _, asked, _, _ in CASES)
    assert (
        set(tags) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
        and min(tags.values()) >= 4
    )
    for tag in tags:
        ends = {
            (Fraction(credit) == 1, verdict)
            for _, asked, credit, verdict in CASES
            if asked["tag"] == tag
        }
        assert {(True, True), (False, False)} <= ends
    right_but_too_many = [
        credit for _, _, credit, verdict in CASES if verdict and Fraction(credit) < 0
    ]
    assert len(right_but_too_many) >= 5


@pytest.mark.parametrize("found, asked, credit, verdict", CASES)
def test_the_order_of_the_detections_does_not_matter(found, asked, credit, verdict):
    assert rewards.geneval_credit(found[::-1], asked, read_colours) == rewards.geneval_credit(
        found, asked, read_colours
    )


def test_where_the_numbers_are_right_full_credit_is_the_verdict():
    """Numbers aside, the two rules ask for the same.

    On random scenes the soft form is 1 exactly where the verdict is.
    """
    rng = random.Random(0)
    seen = Counter()
    for _ in range(3000):
        cats, dogs = rng.choice([1, 1, 2]), rng.choice([1, 1, 2])
        more = rng.choice(
            [
                {},
                {"color": "red"},
                {"position": ["left of", 0]},
                {"color": "red", "position": ["left of", 0]},
            ]
        )
        asked = metadata(
            "position", want("dog", dogs, **rng.choice([{}, blue])), want("cat", cats, **more)
        )
        found = [
            at(
                rng.uniform(0, 99) + 80 * (name == "dog"),
                rng.uniform(0, 40),
                name,
                color=rng.choice(["red", "blue"]),
            )
            for name in ["cat"] * cats + ["dog"] * dogs
        ]
        credit = rewards.geneval_credit(found, asked, read_colours)
        verdict = rewards.geneval_verdict(found, asked, read_colours)
        assert (credit == 1) is verdict and 0 < credit <= 1
        seen[verdict] += 1
    assert min(seen[True], seen[False]) > 300


def test_colours_are_asked_only_where_the_number_is_right():
    """The classifier is the expensive part, and has no say about a wrong number."""

    def fails(name, objects):
        raise AssertionError("asked for colours")

    assert rewards.geneval_credit(row(2), red_cat, fails) == 0


# ---- as rewards
@pytest.fixture
def detector(monkeypatch, tmp_path):
    """A detector that is loaded from tmp_path and sees what .sees says.

    -> its loads, its looks, --reward_path for it
    """
    stub = SimpleNamespace(loads=[], looks=0, sees=[], path=f"geneval={tmp_path}")
    real_load = rewards.load

    def load(model_class, path, *more, **options):
        if model_class is not transformers.Mask2FormerForUniversalSegmentation:
            return real_load(model_class, path, *more, **options)
        stub.loads.append(path)
        model = torch.nn.Linear(1, 1)
        model.config = SimpleNamespace(num_labels=80)
        return model

    def detect(model, images):
        stub.looks += 1
        return [stub.sees] * len(images)

    monkeypatch.setattr(rewards, "load", load)
    monkeypatch.setattr(rewards, "detect", detect)
    return stub


def pictures(n=2):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_both_share_one_detector_one_clip_and_one_look_at_the_same_pictures(detector):
    strict, soft = rewards.build("geneval:1,geneval_soft:2", "cpu", [detector.path, CLIP])
    assert (strict.name, soft.name, soft.weight) == ("geneval", "geneval_soft", 2)
    assert len(detector.loads) == 1
    assert [id(m) for m in strict.models] == [id(m) for m in soft.models]
    assert soft.models[1] is rewards.clip(CLIP.partition("=")[2], "cpu", torch.float32).model
    (held_out,) = rewards.build("geneval", "cpu", [detector.path, CLIP])  # as --eval_rewards does
    assert held_out.models[0] is soft.models[0] and len(detector.loads) == 1

    images = pictures()
    prompts = ["", ""]
    rows = [one_cat] * 2
    detector.sees = row(2)
    assert strict(images, prompts, rows).tolist() == [1, 1]
    assert soft(images, prompts, rows).tolist() == [0, 0]
    assert detector.looks == 1
    detector.sees = row(3)
    images *= 0.5  # other pictures in the same tensor are looked at again
    assert soft(images, prompts, rows).tolist() == [-1, -1]
    assert detector.looks == 2
    assert soft(pictures(), prompts, rows).tolist() == [-1, -1]
    assert detector.looks == 3


def test_the_path_of_geneval_serves_geneval_soft_unless_it_has_its_own(detector, tmp_path):
    rewards.build("geneval_soft", "cpu", [detector.path, CLIP])
    (tmp_path / "own").mkdir()
    rewards.build("geneval_soft", "cpu", [detector.path, CLIP, f"geneval_soft={tmp_path}/own"])
    assert detector.loads == [str(tmp_path), f"{tmp_path}/own"]
    with pytest.raises(ValueError, match="reward geneval_soft: .*no such file"):
        rewards.build("geneval_soft", "cpu", [f"geneval={tmp_path}/none", CLIP])


def test_scores_are_float32_one_a_picture_and_carry_no_gradient(detector):
    (soft,) = rewards.build("geneval_soft", "cpu", [detector.path, CLIP], batch=2)
    detector.sees = row(3)
    images = pictures(5).requires_grad_()
    scores = soft(images, [""] * 5, [one_cat, cat_and_dog, counted(2), one_cat, counted(4)])
    assert scores.dtype == torch.float32 and scores.shape == (5,) and not scores.requires_grad
    assert scores.tolist() == [-1, -0.5, 0.5, -1, 0.75]
    assert not soft.differentiable and rewards.REWARDS["geneval_soft"][1] is False


def test_prompts_without_metadata_are_refused_with_their_line_and_what_to_do(detector):
    (soft,) = rewards.build("geneval_soft", "cpu", [detector.path, CLIP])
    with pytest.raises(
        ValueError,
        match=r"^line 7 \('a cat'\): no GenEval metadata.*leave geneval and geneval_soft out",
    ):
        soft.check(["a cat"], [{"line": 7}])
    with pytest.raises(ValueError, match="position"):
        soft.check(["a cat"], [metadata("position", want(position=["left of", 0]))])


def test_stage_2_trains_on_the_soft_form_by_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["rtdmd_rl.py"])
    monkeypatch.setattr(rtdmd_rl, "find_weights", lambda *_, **__: "")  # no stage 1 is there
    weights = rewards.parse_weights(rtdmd_rl.arguments().rewards)
    assert weights == {"clipscore": 1, "pickscore": 1, "hpsv2": 1, "geneval_soft": 1}


def test_scores_of_both_are_printed_by_category(capsys):
    tags = ["single_object", "counting", "counting", "single_object"]
    rows = [{"prompt": f"a photo {i}", "metadata": {"tag": tag}} for i, tag in enumerate(tags)]
    student = {
        "geneval": [1.0, 0, 0, 1],
        "geneval_soft": [-14.0, 0.5, -0.25, 1],
        "clipscore": [0.25] * 4,
    }
    teacher = {name: [0.0] * 4 for name in student}
    evaluate.print_means(rows, {"student": student, "teacher": teacher})
    lines = capsys.readouterr().out.splitlines()
    numbers = {}
    for line in lines[1:]:
        name, value = re.match(r"(\S.*?) +(-?\d\.\d{4})", line).groups()
        numbers[name] = float(value)
    assert numbers == {
        "geneval": 0.5,
        "geneval counting": 0,
        "geneval single_object": 1,
        "geneval, categories": 0.5,
        "geneval_soft": -3.1875,
        "geneval_soft counting": 0.125,
        "geneval_soft single_object": -6.5,
        "geneval_soft, categories": -3.1875,
        "clipscore": 0.25,
    }
    starts = {re.search(r"(?<= )(-?\d|student)", line).start() for line in lines}
    assert len(starts) == 1, "the columns do not line up"
