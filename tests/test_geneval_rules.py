"""GenEval: detections, colours, and its rules decided by hand."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
import transformers

import rewards
import tiny
from gaussian import close
from helpers import TINY, want
from prompts import geneval_prompts, load_prompts
from small_rewards import one_reward, rand, shake


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
    """A tiny Mask2Former's directory; its last layer makes it sure of itself, so that there is something to detect."""
    pytest.importorskip("scipy")
    model, folder = shake(tiny_detector()), tmp_path_factory.mktemp("detector")
    model.class_predictor.weight.data *= 60
    model.save_pretrained(folder)
    return folder


def test_detections_are_those_of_mask2formers_instance_segmentation(detector):
    """Class and mask probabilities, boxes and masks against transformers' own post-processing, at two sizes."""
    reward = one_reward("geneval", f"geneval={detector}", f"clipscore={TINY}/clip")
    model, count = reward.models[0], 0
    for height, width in ((32, 32), (27, 40)):
        image = rand(3, height, width, seed=height)
        with torch.no_grad():
            (found,) = rewards.detect(model, image[None])
            scale = 800 / min(height, width)
            new = (int(height * scale + 0.5), int(width * scale + 0.5))
            pixels = torch.nn.functional.interpolate(image[None], new, mode="bilinear")
            pixels = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
                [0.229, 0.224, 0.225]
            ).view(3, 1, 1)
            assert new[1] % 32 or (height, width) == (32, 32)  # the second is padded
            out = model(
                pixel_values=torch.nn.functional.pad(pixels, (0, -new[1] % 32, 0, -new[0] % 32))
            )
        probability, logits = (
            out.class_queries_logits[0].softmax(-1)[:, :-1],
            out.masks_queries_logits,
        )
        full_size = torch.nn.functional.interpolate(
            logits, [n + -n % 32 for n in new], mode="bilinear"
        )[..., : new[0], : new[1]]
        masks = torch.nn.functional.interpolate(full_size, (height, width), mode="bilinear")[0]
        expected = {}
        for q, c in (probability > 0.3).nonzero().tolist():
            if (masks[q] > 0).any():
                ys, xs = np.nonzero((masks[q] > 0).numpy())
                mean = masks[q].sigmoid()[masks[q] > 0].mean()
                expected[rewards.COCO[c], (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)] = float(
                    probability[q, c] * mean
                )
        assert {(name, box): p for name, p, box, _ in found} == pytest.approx(expected, rel=1e-4)
        assert all(mask.shape == (height, width) and mask.any() for *_, mask in found)
        count += len(found)
    assert count >= 4
    scores = reward(
        rand(2, 3, 32, 32),
        ["a", "b"],
        [{"tag": "single_object", "include": [{"class": "dog", "count": 1}]}] * 2,
    )
    assert scores.shape == (2,) and set(scores.tolist()) <= {0.0, 1.0}


# ------------------------------------------------------------------------------------------- GenEval's rules, decided by hand
def at(x, y, name="cat", p=0.95, color="red", size=20):
    """A detection `size` pixels wide and high, centred on (x, y); its colour is what the classifier would answer."""
    return name, p, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), color


def meta(tag, *include, **more):
    return {"tag": tag, "include": list(include), **more}


def counted(n, name="cat"):
    return meta("counting", want(name, n), exclude=[want(name, n + 1)])


def placed(relation):
    return meta("position", want("dog"), want("cat", position=[relation, 0]))


def row_of(n, name="cat", p=0.95):
    return [at(30 * i, 50, name, p) for i in range(n)]


dog = at(50, 50, "dog")

RULES = [  # what is seen, what is asked for, does GenEval call it right
    # single object: any number of them will do, from confidence .3 (exclusive)
    ([], meta("single_object", want()), False),
    (row_of(1), meta("single_object", want()), True),
    (row_of(3), meta("single_object", want()), True),
    ([dog], meta("single_object", want()), False),
    (row_of(1, p=0.31), meta("single_object", want()), True),
    (row_of(1, p=0.3), meta("single_object", want()), False),
    (row_of(2) + [dog], meta("single_object", want()), True),
    # two objects: both, whatever else
    (row_of(1) + [dog], meta("two_object", want(), want("dog")), True),
    (row_of(2), meta("two_object", want(), want("dog")), False),
    ([dog], meta("two_object", want(), want("dog")), False),
    (row_of(1) + [at(9, 9, "dog", 0.2)], meta("two_object", want(), want("dog")), False),
    (row_of(2) + [dog, dog, at(1, 1, "car")], meta("two_object", want(), want("dog")), True),
    (row_of(1) + [dog], meta("two_object", want(), want("dog"), exclude=[want("car")]), True),
    (
        row_of(1) + [dog, at(1, 1, "car")],
        meta("two_object", want(), want("dog"), exclude=[want("car")]),
        False,
    ),
    # counting: exactly as many, from confidence .9 (exclusive)
    (row_of(1), counted(2), False),
    (row_of(2), counted(2), True),
    (row_of(3), counted(2), False),
    (row_of(4), counted(4), True),
    (row_of(2) + row_of(1, p=0.9), counted(2), True),
    (row_of(1) + row_of(1, p=0.9), counted(2), False),
    (row_of(2, p=0.91), counted(2), True),
    (row_of(2) + row_of(5, p=0.5), counted(2), True),
    (row_of(2) + row_of(9, "dog"), counted(2), True),
    ([at(50, 50), at(50, 50)], counted(2), True),  # boxes that coincide count twice: no suppression
    ([at(50, 50), at(51, 50), at(80, 50)], counted(2), False),
    (row_of(20), meta("counting", want(count=16)), True),
    (
        row_of(20),
        meta("counting", want(count=16), exclude=[want(count=17)]),
        True,
    ),  # no more than 16 are looked at
    (row_of(20), meta("counting", want(count=17)), False),
    (row_of(2), meta("counting", want(count=2), exclude=[want("dog")]), True),
    # colours: the most confident one is asked; a tie between colours goes to the classifier's first answer
    ([at(9, 9, color="blue")], meta("colors", want(color="red")), False),
    ([at(9, 9)], meta("colors", want(color="red")), True),
    ([at(9, 9, p=0.9), at(50, 9, p=0.8, color="blue")], meta("colors", want(color="red")), True),
    ([at(9, 9, p=0.8), at(50, 9, p=0.9, color="blue")], meta("colors", want(color="red")), False),
    ([dog], meta("colors", want(color="red")), False),
    ([at(9, 9, p=0.31)], meta("colors", want(color="red")), True),
    ([at(9, 9), at(50, 9, color="blue")], meta("colors", want(count=2, color="red")), False),
    ([at(9, 9), at(50, 9)], meta("colors", want(count=2, color="red")), True),
    # position: of the centres, beyond a tenth of the summed sizes, in the direction that has more than half of the way
    ([dog, at(20, 50)], placed("left of"), True),
    ([dog, at(80, 50)], placed("left of"), False),
    ([dog, at(80, 50)], placed("right of"), True),
    ([dog, at(50, 20)], placed("above"), True),
    ([dog, at(50, 80)], placed("above"), False),
    ([dog, at(50, 80)], placed("below"), True),
    ([dog, at(46, 50)], placed("left of"), False),  # 4 is a tenth of 20 + 20: not beyond it
    ([dog, at(45.9, 50)], placed("left of"), False),  # .1 of 4.1 remains, less than half
    ([dog, at(42.1, 50)], placed("left of"), False),  # 3.9 / 7.9 < .5
    (
        [dog, at(41.9, 50)],
        placed("left of"),
        True,
    ),  # 4.1 / 8.1 > .5: boxes that overlap can still be left of each other
    ([dog, at(20, 20)], placed("left of"), True),
    ([dog, at(20, 20)], placed("above"), True),  # diagonally: (30 - 4) / 42.4 = .61 both ways
    ([dog, at(30, 30)], placed("above"), True),  # (20 - 4) / 28.3 = .57
    ([dog, at(36, 36)], placed("above"), True),  # (14 - 4) / 19.8 = .505
    (
        [dog, at(37, 37)],
        placed("above"),
        False,
    ),  # (13 - 4) / 18.4 = .49: further than the threshold both ways, and neither
    ([dog, at(20, 70)], placed("left of"), True),
    ([dog, at(20, 70)], placed("below"), False),  # (30, 20): 26 / 36 and 16 / 36
    ([dog, at(50, 50)], placed("above"), False),
    ([at(20, 50)], placed("left of"), False),
    ([dog], placed("left of"), False),
    ([dog, at(20, 50, p=0.9), at(80, 50, p=0.8)], placed("left of"), True),
    ([dog, at(20, 50, p=0.8), at(80, 50, p=0.9)], placed("left of"), False),
    ([dog, at(10, 50, size=60)], placed("left of"), True),  # (40 - 8) / 40
    ([dog, at(30, 50, size=100)], placed("left of"), False),  # (20 - 12) / 20 = .4
    # two objects with colours
    (
        [at(9, 9), at(50, 9, "dog", color="blue")],
        meta("color_attr", want(color="red"), want("dog", color="blue")),
        True,
    ),
    (
        [at(9, 9, color="blue"), at(50, 9, "dog", color="red")],
        meta("color_attr", want(color="red"), want("dog", color="blue")),
        False,
    ),
    (
        [at(9, 9), at(50, 9, "dog")],
        meta("color_attr", want(color="red"), want("dog", color="blue")),
        False,
    ),
    ([at(9, 9)], meta("color_attr", want(color="red"), want("dog", color="blue")), False),
    (
        [at(9, 9), at(50, 9, "dog", color="blue"), at(80, 9, color="blue", p=0.5)],
        meta("color_attr", want(color="red"), want("dog", color="blue")),
        True,
    ),
]


@pytest.mark.parametrize("found, metadata, right", RULES)
def test_genevals_rules(found, metadata, right):
    for order in (found, found[::-1]):  # confidence decides, not order
        if len({o[1] for o in found}) == len(found) or order is found:
            assert (
                rewards.geneval_verdict(
                    order, metadata, lambda name, objects: [o[3] for o in objects]
                )
                is right
            )
    assert rewards.geneval_wrong("", metadata) is None


def test_the_table_covers_all_six_categories_and_both_verdicts_of_each():
    assert len(RULES) >= 40 and Counter({(m["tag"], right) for _, m, right in RULES}) == Counter(
        itertools.product(tiny.CATEGORIES, (True, False))
    )


def test_colours_are_the_zero_shot_answer_on_the_cut_out_object(detector, monkeypatch):
    """The crop that CLIP sees is the object on grey, and the answer is the colour whose three sentences, averaged, are closest."""
    image = torch.stack([torch.full((40, 40), c) for c in (0.9, 0.1, 0.2)])
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[10:30, 5:25] = True
    mask[10:20, 5:15] = False
    reward = one_reward("geneval", f"geneval={detector}", f"clipscore={TINY}/clip")
    vit = rewards.clip(f"{TINY}/clip", "cpu", torch.float32)
    model = vit.model
    seen, real = [], model.vision_model.forward
    monkeypatch.setattr(
        model.vision_model,
        "forward",
        lambda pixel_values: seen.append(pixel_values) or real(pixel_values=pixel_values),
    )
    for name in ("dog", "cat"):
        found = [(name, 0.9, (5, 10, 25, 30), mask)]
        monkeypatch.setattr(rewards, "detect", lambda detector, images: [found])
        colours = [
            c
            for c in rewards.COLORS
            if reward(image[None], [""], [meta("colors", want(name, color=c))]).item()
        ]
        by_hand = [
            torch.nn.functional.normalize(
                vit.text_features(
                    [
                        f"a photo of a {c} {name}",
                        f"a photo of a {c}-colored {name}",
                        f"a photo of a {c} object",
                    ]
                ).mean(0),
                dim=0,
            )
            for c in rewards.COLORS
        ]
        crop = torch.where(mask, image, torch.tensor(153 / 255))[None, :, 10:30, 5:25]
        assert colours == [
            rewards.COLORS[(torch.stack(by_hand) @ vit.image_features(crop)[0]).argmax()]
        ]
        close(seen[0], rewards.clip_pixels(crop, 32), 1e-6)


def test_metadata_in_genevals_format_is_taken_whole_and_malformed_metadata_is_named_with_its_line(
    detector, tmp_path
):
    reward = one_reward("geneval", f"geneval={detector}", f"clipscore={TINY}/clip")
    rows = geneval_prompts(600)
    file = tmp_path / "metadata.jsonl"
    file.write_text("".join(json.dumps(row["metadata"]) + "\n" for row in rows))
    rows = load_prompts(str(file))
    reward.check([r["prompt"] for r in rows], [r["metadata"] for r in rows])
    good_row, wrong = (
        rows[0]["metadata"],
        [
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
        ],
    )
    for metadata, message in wrong:
        file.write_text(
            f"{json.dumps(good_row)}\n\n{json.dumps({'prompt': 'a photo', **metadata})}\n"
        )
        rows = load_prompts(str(file))
        with pytest.raises(ValueError, match=r"^line 3 \('a photo'\): .*" + message):
            reward.check([r["prompt"] for r in rows], [r["metadata"] for r in rows])
