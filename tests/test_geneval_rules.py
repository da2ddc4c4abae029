"""GenEval: detections, colours, and its rules decided by hand."""

import itertools
import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import transformers

import rewards
import tiny
from gaussian import close
from helpers import TINY, want
from prompts import geneval_prompts, load_prompts
from small_rewards import one_reward, rand, shake

TINY_CLIP = f"clipscore={TINY}/clip"


# ---- what is in a picture ------------------------------------------------------------------------
def tiny_detector(seed=0):
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            image_size=32,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        num_labels=80,
    )
    torch.manual_seed(seed)
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A tiny Mask2Former's directory.

    Its last layer makes it sure of itself, so that there is something to detect.
    """
    pytest.importorskip("scipy")
    model = shake(tiny_detector())
    folder = tmp_path_factory.mktemp("detector")
    model.class_predictor.weight.data *= 60
    model.save_pretrained(folder)
    return folder


def bilinear(pictures, size):
    return F.interpolate(pictures, size, mode="bilinear")


def size_of_input(height, width):
    """The size at which the detector looks: the shorter side at 800."""
    scale = 800 / min(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


@torch.no_grad()
def detections_by_hand(model, image):
    """transformers' own post-processing, written out -> {(class, box): confidence}"""
    size = image.shape[-2:]
    height, width = size_of_input(*size)
    below = -height % 32
    right = -width % 32
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = (bilinear(image[None], (height, width)) - mean) / std
    out = model(pixel_values=F.pad(pixels, (0, right, 0, below)))
    probability = out.class_queries_logits[0].softmax(-1)[:, :-1]
    padded_masks = bilinear(out.masks_queries_logits, (height + below, width + right))
    masks = bilinear(padded_masks[..., :height, :width], size)[0]
    found = {}
    for query, label in (probability > 0.3).nonzero().tolist():
        inside = masks[query] > 0
        if not inside.any():
            continue
        ys, xs = inside.numpy().nonzero()
        corner = (xs.min(), ys.min())
        opposite = (xs.max() + 1, ys.max() + 1)
        confidence = probability[query, label] * masks[query].sigmoid()[inside].mean()
        found[rewards.COCO[label], corner + opposite] = float(confidence)
    return found


def test_detections_are_those_of_mask2formers_instance_segmentation(detector):
    """Class and mask probabilities, boxes and masks are transformers' own, at two sizes."""
    reward = one_reward("geneval", f"geneval={detector}", TINY_CLIP)
    model = reward.models[0]
    number = 0
    for height, width in ((32, 32), (27, 40)):
        _, input_width = size_of_input(height, width)
        assert input_width % 32 or (height, width) == (32, 32)  # the second is padded
        image = rand(3, height, width, seed=height)
        with torch.no_grad():
            (found,) = rewards.detect(model, image[None])
        confidences = {(name, box): confidence for name, confidence, box, _ in found}
        assert confidences == pytest.approx(detections_by_hand(model, image), rel=1e-4)
        assert all(mask.shape == (height, width) for *_, mask in found)
        assert all(mask.any() for *_, mask in found)
        number += len(found)
    assert number >= 4
    one_dog = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    scores = reward(rand(2, 3, 32, 32), ["a", "b"], [one_dog] * 2)
    assert scores.shape == (2,)
    assert set(scores.tolist()) <= {0.0, 1.0}


# ---- GenEval's rules, decided by hand ------------------------------------------------------------
def at(x, y, name="cat", p=0.95, color="red", size=20):
    """A detection `size` pixels wide and high, centred on (x, y).

    p is its confidence; its colour is what the classifier would answer.
    """
    half = size / 2
    box = (x - half, y - half, x + half, y + half)
    return name, p, box, color


def meta(tag, *include, **more):
    return {"tag": tag, "include": list(include), **more}


def counted(n, name="cat"):
    return meta("counting", want(name, n), exclude=[want(name, n + 1)])


def placed(relation):
    return meta("position", want("dog"), want("cat", position=[relation, 0]))


def row_of(n, name="cat", p=0.95):
    """n detections beside each other."""
    return [at(30 * i, 50, name, p) for i in range(n)]


def red_cat(p=0.95):
    return at(9, 9, p=p)


def blue_cat(p=0.95):
    return at(50, 9, p=p, color="blue")


dog = at(50, 50, "dog")
red_dog = at(50, 9, "dog")
blue_dog = at(50, 9, "dog", color="blue")
car = at(1, 1, "car")

A_CAT = meta("single_object", want())
CAT_AND_DOG = meta("two_object", want(), want("dog"))
CAT_AND_DOG_NO_CAR = meta("two_object", want(), want("dog"), exclude=[want("car")])
SIXTEEN_NO_MORE = meta("counting", want(count=16), exclude=[want(count=17)])
TWO_CATS_NO_DOG = meta("counting", want(count=2), exclude=[want("dog")])
A_RED_CAT = meta("colors", want(color="red"))
TWO_RED_CATS = meta("colors", want(count=2, color="red"))
RED_CAT_BLUE_DOG = meta("color_attr", want(color="red"), want("dog", color="blue"))

overlapping = [at(50, 50), at(51, 50)]
sure_on_the_left = [dog, at(20, 50, p=0.9), at(80, 50, p=0.8)]
sure_on_the_right = [dog, at(20, 50, p=0.8), at(80, 50, p=0.9)]

RULES = [  # what is seen, what is asked for, does GenEval call it right
    # Single object: any number of them will do, from confidence .3 (exclusive).
    ([], A_CAT, False),
    (row_of(1), A_CAT, True),
    (row_of(3), A_CAT, True),
    ([dog], A_CAT, False),
    (row_of(1, p=0.31), A_CAT, True),
    (row_of(1, p=0.3), A_CAT, False),
    (row_of(2) + [dog], A_CAT, True),
    # Two objects: both, whatever else.
    (row_of(1) + [dog], CAT_AND_DOG, True),
    (row_of(2), CAT_AND_DOG, False),
    ([dog], CAT_AND_DOG, False),
    (row_of(1) + [at(9, 9, "dog", 0.2)], CAT_AND_DOG, False),
    (row_of(2) + [dog, dog, car], CAT_AND_DOG, True),
    (row_of(1) + [dog], CAT_AND_DOG_NO_CAR, True),
    (row_of(1) + [dog, car], CAT_AND_DOG_NO_CAR, False),
    # Counting: exactly as many, from confidence .9 (exclusive).
    (row_of(1), counted(2), False),
    (row_of(2), counted(2), True),
    (row_of(3), counted(2), False),
    (row_of(4), counted(4), True),
    (row_of(2) + row_of(1, p=0.9), counted(2), True),
    (row_of(1) + row_of(1, p=0.9), counted(2), False),
    (row_of(2, p=0.91), counted(2), True),
    (row_of(2) + row_of(5, p=0.5), counted(2), True),
    (row_of(2) + row_of(9, "dog"), counted(2), True),
    # Boxes that coincide count twice: no suppression.
    ([at(50, 50), at(50, 50)], counted(2), True),
    (overlapping + [at(80, 50)], counted(2), False),
    # No more than 16 are looked at.
    (row_of(20), meta("counting", want(count=16)), True),
    (row_of(20), SIXTEEN_NO_MORE, True),
    (row_of(20), meta("counting", want(count=17)), False),
    (row_of(2), TWO_CATS_NO_DOG, True),
    # Colours: the most confident one is asked.
    ([at(9, 9, color="blue")], A_RED_CAT, False),
    ([red_cat()], A_RED_CAT, True),
    ([red_cat(p=0.9), blue_cat(p=0.8)], A_RED_CAT, True),
    ([red_cat(p=0.8), blue_cat(p=0.9)], A_RED_CAT, False),
    ([dog], A_RED_CAT, False),
    ([red_cat(p=0.31)], A_RED_CAT, True),
    # A tie between colours goes to the classifier's first answer.
    ([red_cat(), blue_cat()], TWO_RED_CATS, False),
    ([red_cat(), at(50, 9)], TWO_RED_CATS, True),
    # Position: of the centres, beyond a tenth of the summed sizes, in the direction that has more
    # than half of the way.
    ([dog, at(20, 50)], placed("left of"), True),
    ([dog, at(80, 50)], placed("left of"), False),
    ([dog, at(80, 50)], placed("right of"), True),
    ([dog, at(50, 20)], placed("above"), True),
    ([dog, at(50, 80)], placed("above"), False),
    ([dog, at(50, 80)], placed("below"), True),
    # 4 is a tenth of 20 + 20: not beyond it.
    ([dog, at(46, 50)], placed("left of"), False),
    # .1 of 4.1 remains, less than half.
    ([dog, at(45.9, 50)], placed("left of"), False),
    # 3.9 / 7.9 < .5
    ([dog, at(42.1, 50)], placed("left of"), False),
    # 4.1 / 8.1 > .5: boxes that overlap can still be left of each other.
    ([dog, at(41.9, 50)], placed("left of"), True),
    # Diagonally: (30 - 4) / 42.4 = .61 both ways.
    ([dog, at(20, 20)], placed("left of"), True),
    ([dog, at(20, 20)], placed("above"), True),
    # (20 - 4) / 28.3 = .57
    ([dog, at(30, 30)], placed("above"), True),
    # (14 - 4) / 19.8 = .505
    ([dog, at(36, 36)], placed("above"), True),
    # (13 - 4) / 18.4 = .49: further than the threshold both ways, and neither.
    ([dog, at(37, 37)], placed("above"), False),
    # (30, 20): 26 / 36 and 16 / 36
    ([dog, at(20, 70)], placed("left of"), True),
    ([dog, at(20, 70)], placed("below"), False),
    ([dog, at(50, 50)], placed("above"), False),
    ([at(20, 50)], placed("left of"), False),
    ([dog], placed("left of"), False),
    (sure_on_the_left, placed("left of"), True),
    (sure_on_the_right, placed("left of"), False),
    # (40 - 8) / 40
    ([dog, at(10, 50, size=60)], placed("left of"), True),
    # (20 - 12) / 20 = .4
    ([dog, at(30, 50, size=100)], placed("left of"), False),
    # Two objects with colours.
    ([red_cat(), blue_dog], RED_CAT_BLUE_DOG, True),
    ([at(9, 9, color="blue"), red_dog], RED_CAT_BLUE_DOG, False),
    ([red_cat(), red_dog], RED_CAT_BLUE_DOG, False),
    ([red_cat()], RED_CAT_BLUE_DOG, False),
    ([red_cat(), blue_dog, at(80, 9, color="blue", p=0.5)], RED_CAT_BLUE_DOG, True),
]


def known_colours(name, objects):
    """The answers of a classifier that makes no mistake: `at` writes them down."""
    return [color for _, _, _, color in objects]


@pytest.mark.parametrize("found, metadata, right", RULES)
def test_genevals_rules(found, metadata, right):
    """Confidence decides, not order; where confidences are equal, order may."""
    different = {confidence for _, confidence, _, _ in found}
    orders = [found]
    if len(different) == len(found):
        orders.append(found[::-1])
    for order in orders:
        assert rewards.geneval_verdict(order, metadata, known_colours) is right
    assert rewards.geneval_wrong("", metadata) is None


def test_the_table_covers_all_six_categories_and_both_verdicts_of_each():
    assert len(RULES) >= 40
    covered = {(metadata["tag"], right) for _, metadata, right in RULES}
    assert Counter(covered) == Counter(itertools.product(tiny.CATEGORIES, (True, False)))


# ---- colours -------------------------------------------------------------------------------------
def classifier_by_hand(vit, name):
    """CLIP's feature of each colour of a class: three sentences, averaged. -> [colours,D]"""
    features = []
    for color in rewards.COLORS:
        sentences = [
            f"a photo of a {color} {name}",
            f"a photo of a {color}-colored {name}",
            f"a photo of a {color} object",
        ]
        mean = vit.text_features(sentences).mean(0)
        features.append(F.normalize(mean, dim=0))
    return torch.stack(features)


def test_colours_are_the_zero_shot_answer_on_the_cut_out_object(detector, monkeypatch):
    """CLIP sees a crop, the object on grey.

    The answer is the colour whose three sentences, averaged, are closest.
    """
    image = torch.tensor([0.9, 0.1, 0.2])[:, None, None].repeat(1, 40, 40)
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[10:30, 5:25] = True
    mask[10:20, 5:15] = False
    grey = torch.tensor(153 / 255)
    crop = torch.where(mask, image, grey)[None, :, 10:30, 5:25]
    reward = one_reward("geneval", f"geneval={detector}", TINY_CLIP)
    vit = rewards.clip(f"{TINY}/clip", "cpu", torch.float32)
    vision_model = vit.model.vision_model
    forward = vision_model.forward
    seen = []

    def watched_forward(pixel_values):
        seen.append(pixel_values)
        return forward(pixel_values=pixel_values)

    monkeypatch.setattr(vision_model, "forward", watched_forward)
    for name in ("dog", "cat"):
        found = [(name, 0.9, (5, 10, 25, 30), mask)]
        monkeypatch.setattr(rewards, "detect", lambda detector, images: [found])
        colours = []
        for color in rewards.COLORS:
            metadata = meta("colors", want(name, color=color))
            if reward(image[None], [""], [metadata]).item():
                colours.append(color)
        likeness = classifier_by_hand(vit, name) @ vit.image_features(crop)[0]
        assert colours == [rewards.COLORS[likeness.argmax()]]
        close(seen[0], rewards.clip_pixels(crop, 32), 1e-6)


# ---- metadata ------------------------------------------------------------------------------------
MALFORMED = [  # metadata, a part of the message
    ({}, "no GenEval metadata"),
    ({"include": []}, "no GenEval metadata"),
    ({"include": "cat"}, "no GenEval"),
    ({"include": [want("unicorn")]}, "80"),
    ({"include": [want(count=0)]}, "count"),
    ({"include": [want(count="2")]}, "count"),
    ({"include": ["cat"]}, "class"),
    ({"include": [want(count=True)]}, "count"),
    ({"include": [want(color="beige")]}, "'beige'"),
    ({"include": [want(position=["left of", 0])]}, "position"),
    ({"include": [want(count=1.5)]}, "count"),
    ({"include": [want("dog"), want(position=["near", 0])]}, "'near'"),
    ({"include": [want("dog"), want(position=["above", 1])]}, "position"),
    ({"include": [want("dog"), want(position="above")]}, "position"),
    ({"include": [want()], "exclude": [{"class": "cat"}]}, "exclude"),
    ({"include": [want()], "exclude": 5}, "exclude"),
]


def check_rows(reward, rows):
    prompts = [row["prompt"] for row in rows]
    metadata = [row["metadata"] for row in rows]
    reward.check(prompts, metadata)


def test_metadata_in_genevals_format_is_taken_whole_and_malformed_metadata_is_named_with_its_line(
    detector, tmp_path
):
    reward = one_reward("geneval", f"geneval={detector}", TINY_CLIP)
    file = tmp_path / "metadata.jsonl"
    lines = [json.dumps(row["metadata"]) + "\n" for row in geneval_prompts(600)]
    file.write_text("".join(lines))
    rows = load_prompts(str(file))
    check_rows(reward, rows)
    good_row = rows[0]["metadata"]
    for metadata, message in MALFORMED:
        wrong_row = {"prompt": "a photo", **metadata}
        file.write_text(f"{json.dumps(good_row)}\n\n{json.dumps(wrong_row)}\n")
        rows = load_prompts(str(file))
        with pytest.raises(ValueError, match=r"^line 3 \('a photo'\): .*" + message):
            check_rows(reward, rows)
