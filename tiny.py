"""A world in which right and wrong can be decided exactly: small pictures, their captions, a checker.

  1. the world    pictures of circles, squares and triangles with captions in GenEval's six categories
  2. the checker  finds the objects of a picture and compares them with the caption: a tiny GenEval

tools/make_tiny.py trains the models of this world, those in assets/tiny. The programs take them as they
take SD3.5-M, by --pretrained, and know nothing of circles.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

SIZE = 32  # pixels a side
SHAPES = ["circle", "square", "triangle"]
COLORS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.15, 0.66, 0.25),
    "blue": (0.18, 0.33, 0.88),
    "yellow": (0.96, 0.82, 0.18),
}
COLOR_NAMES = list(COLORS)
BACKGROUND = 0.92
NUMBERS = {2: "two", 3: "three", 4: "four"}
MOST_OBJECTS = 4
RELATIONS = ["left of", "right of", "above", "below"]
# GenEval's own names
CATEGORIES = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]


# ---- 1. the world --------------------------------------------------------------------------------
def captions(split="all"):
    """The world's captions as GenEval's metadata.

    -> [{"prompt", "tag", "include": [{"class", "count", "color"?, "position"?}]}]

    split: every stage trains on "train"; "test" is what the scoreboard draws: the captions held out of
    every stage (2 of 12 colours, and 12 of 72 colour bindings whose mirror image is trained on: "a
    blue square and a red circle" is new, the scene is not), and for categories too small to hold any
    out, all of them.
    """
    rows, held_out = all_captions()
    if split == "all":
        return rows
    new = [row for row in rows if row["prompt"] in held_out]
    if split == "train":
        return [row for row in rows if row not in new]
    tags = {row["tag"] for row in new}
    return [row for row in rows if row in new or row["tag"] not in tags]


def all_captions():
    """-> (captions, the prompts among them that no stage trains on)"""
    rows = []
    held_out = set()

    def add(tag, prompt, *include):
        rows.append({"prompt": prompt, "tag": tag, "include": list(include)})

    for shape in SHAPES:
        add("single_object", f"a {shape}", one(shape))
    for first, second in itertools.permutations(SHAPES, 2):
        add("two_object", f"a {first} and a {second}", one(first), one(second))
    for number, word in NUMBERS.items():
        for shape in SHAPES:
            add("counting", f"{word} {shape}s", {"class": shape, "count": number})
    for i, (shape, color) in enumerate(itertools.product(SHAPES, COLORS)):
        prompt = f"a {color} {shape}"
        add("colors", prompt, one(shape, color=color))
        if i % 6 == 5:
            held_out.add(prompt)
    for first, second in itertools.permutations(SHAPES, 2):
        for relation in RELATIONS:
            placed = one(first, position=[relation, 1])
            add("position", f"a {first} {relation} a {second}", placed, one(second))
    for i, (first, second) in enumerate(bindings()):
        prompt = f"a {first['color']} {first['class']} and a {second['color']} {second['class']}"
        mirrored = f"a {second['color']} {second['class']} and a {first['color']} {first['class']}"
        add("color_attr", prompt, first, second)
        add("color_attr", mirrored, second, first)
        if i % 6 == 1:
            held_out.add(prompt)
        if i % 6 == 4:
            held_out.add(mirrored)
    return rows, held_out


def one(shape, **more):
    """An entry of a caption's "include": one object of a shape."""
    return {"class": shape, "count": 1, **more}


def bindings():
    """All pairs of different shapes in different colours, as entries of "include"."""
    for shape, other_shape in itertools.combinations(SHAPES, 2):
        for color, other_color in itertools.permutations(COLORS, 2):
            yield one(shape, color=color), one(other_shape, color=other_color)


def objects_of(caption):
    """The objects that a caption asks for: an entry of its "include" for each of them."""
    return [entry for entry in caption["include"] for _ in range(entry["count"])]


def scenes(rows, index):
    """Random scenes for the captions rows[index], [B] -> shape, color, x, y, radius, each [B,4].

    shape and color are numbers, -1 where there is no object; the rest is in pixels. What a caption
    leaves open is uniform.
    """
    n_pictures = len(index)
    device = index.device

    def table(number):
        """number(object) of each caption's objects -> [B,4], -1 where there is none."""
        padded = []
        for row in rows:
            numbers = [number(thing) for thing in objects_of(row)]
            absent = MOST_OBJECTS - len(numbers)
            padded.append(numbers + [-1] * absent)
        return torch.tensor(padded, device=device)[index]

    def random_offset():
        uniform = torch.rand(n_pictures, MOST_OBJECTS, device=device)
        return (uniform * 2 - 1) * 0.7

    shape = table(lambda thing: SHAPES.index(thing["class"]))
    named = table(color_of)
    any_color = torch.randint(len(COLORS), (n_pictures, MOST_OBJECTS), device=device)
    color = torch.where(named >= 0, named, any_color)
    color = torch.where(shape >= 0, color, -1)

    # Four different cells of a 3x3 layout; two that fit where the caption places its first object.
    order = torch.rand(n_pictures, 9, device=device).argsort(1)
    cell = order[:, :MOST_OBJECTS]
    relations = [relation_of(row) for row in rows]
    relation = torch.tensor(relations, device=device)[index]
    fitting = cells_of_relations().to(device)
    choice = torch.randint(fitting.shape[1], (n_pictures,), device=device)
    placed = fitting[relation.clamp(min=0), choice]
    asked = (relation >= 0)[:, None]
    cell[:, :2] = torch.where(asked, placed, cell[:, :2])

    x = (cell % 3 + 0.5) * SIZE / 3 + random_offset()
    y = (cell // 3 + 0.5) * SIZE / 3 + random_offset()
    radius = 3.2 + 0.8 * torch.rand(n_pictures, MOST_OBJECTS, device=device)
    return shape, color, x, y, radius


def color_of(entry):
    """The number of the colour that an entry names, -1 if it names none."""
    return COLOR_NAMES.index(entry["color"]) if "color" in entry else -1


def relation_of(caption):
    """The number of the relation that a caption asks for, -1 if it asks for none."""
    for entry in caption["include"]:
        if "position" in entry:
            return RELATIONS.index(entry["position"][0])
    return -1


def cells_of_relations():
    """Pairs of cells of the 3x3 layout in which two objects stand in each relation -> [4,27,2]"""
    left = []
    for row, other_row in itertools.product(range(3), repeat=2):
        for column, other_column in itertools.combinations(range(3), 2):
            left.append((3 * row + column, 3 * other_row + other_column))
    left = torch.tensor(left)
    above = left % 3 * 3 + left // 3  # rows and columns change places
    return torch.stack([left, left.flip(1), above, above.flip(1)])


def coverage(shape, x, y, radius):
    """How much of each pixel a shape covers. All [...] -> [...,32,32] in [0,1].

    Its edge is anti-aliased over one pixel. (x, y) is the centre of the triangle's bounding box.
    """
    pixel = torch.arange(SIZE, device=x.device) + 0.5
    dx = pixel - x[..., None, None]
    dy = pixel[:, None] - y[..., None, None]
    shape = shape[..., None, None]
    radius = radius[..., None, None]

    circle = (dx * dx + dy * dy).sqrt() - radius
    square = torch.maximum(dx.abs(), dy.abs()) - 0.88 * radius
    inner = 0.62 * radius  # the radius of the circle inside the triangle
    below = dy - inner / 2  # below that circle's centre
    slope = dx.abs() * (3**0.5 / 2) - below / 2 - inner
    triangle = torch.maximum(below - inner, slope)
    distance = torch.where(shape == 1, square, triangle)
    distance = torch.where(shape == 0, circle, distance)
    return (0.5 - distance).clamp(0, 1)


def render(shape, color, x, y, radius):
    """The pictures of scenes, all [B,4] -> [B,3,32,32] in [0,1]"""
    there = (shape >= 0)[..., None, None]
    opacity = coverage(shape, x, y, radius) * there
    paint = palette(x.device)[color.clamp(min=0)][..., None, None]
    size = (len(x), 3, SIZE, SIZE)
    images = torch.full(size, BACKGROUND, device=x.device)
    for i in range(shape.shape[1]):
        cover = opacity[:, i, None]
        images = images * (1 - cover) + paint[:, i] * cover
    return images


def palette(device):
    """The colours [4,3] in [0,1]"""
    return torch.tensor(list(COLORS.values()), device=device)


# ---- 2. the checker ------------------------------------------------------------------------------
DEBRIS = 3  # pixels; a spot of fewer is noise
SMALLEST = 12  # pixels; a blob of fewer is no shape
MIN_DISTANCE = 3  # pixels; objects in neighbouring cells are more than 9 apart


class Found(NamedTuple):
    """An object of a picture. shape is None where it is none of ours; iou: how well it fits."""

    shape: str | None
    color: str
    x: float
    y: float
    iou: float


def detect(images, min_iou=0.7):
    """Find the objects of pictures [B,3,32,32] in [0,1] -> a list of Found for each.

    The shape is None for a blob whose soft intersection over union with all shapes is below min_iou,
    and for debris.
    """
    opacity = opacity_by_color(images.float())
    blobs = connected(opacity > 0.5)
    area = areas(blobs)
    picture, color, blob = (area >= DEBRIS).nonzero(as_tuple=True)
    own = (blobs[picture, color] == blob[:, None, None]).float()
    with_rim = F.max_pool2d(own[:, None], 3, 1, 1)[:, 0]  # where it is anti-aliased
    soft = opacity[picture, color] * with_rim
    shape, x, y, size, iou = best_fit(soft)
    found = [[] for _ in images]
    columns = (picture, color, shape, x, y, size, iou)
    for row in zip(*(column.tolist() for column in columns)):
        i, color_number, shape_number, *centroid, n_pixels, fit = row
        good = fit >= min_iou and n_pixels >= SMALLEST
        name = SHAPES[shape_number] if good else None
        thing = Found(name, COLOR_NAMES[color_number], *centroid, fit)
        found[i].append(thing)
    return found


def opacity_by_color(images):
    """How much of each pixel is of each colour. [B,3,H,W] -> [B,4,H,W] in [0,1]

    A pixel has one colour, by the direction from the background, which at an anti-aliased edge is
    that of the inside.
    """
    axis = palette(images.device) - BACKGROUND
    difference = images - BACKGROUND
    along = torch.einsum("bchw,kc->bkhw", difference, axis)
    along = along / axis.square().sum(1)[:, None, None]
    length = difference.norm(dim=1, keepdim=True).clamp(min=1e-6)
    cosine = along * axis.norm(dim=1)[:, None, None] / length
    nearest = F.one_hot(cosine.argmax(1), len(COLORS))
    return along.clamp(0, 1) * nearest.permute(0, 3, 1, 2)


def connected(mask):
    """Connected components of a mask [B,C,32,32]: a number at each pixel, the same in all of one, or 0.

    The largest number floods its four neighbours until nothing changes.
    """
    numbers = torch.arange(1, SIZE * SIZE + 1, device=mask.device, dtype=torch.float32)
    label = numbers.view(1, 1, SIZE, SIZE) * mask
    while True:
        vertical = F.max_pool2d(label, (3, 1), 1, (1, 0))
        horizontal = F.max_pool2d(label, (1, 3), 1, (0, 1))
        grown = torch.maximum(vertical, horizontal) * mask
        if torch.equal(grown, label):
            return label
        label = grown


def areas(label):
    """How many pixels have each number. [B,C,32,32] -> [B,C,1025]; of 0, which is no component, 0."""
    n_pictures, channels = label.shape[:2]
    area = torch.zeros(n_pictures, channels, SIZE * SIZE + 1, device=label.device)
    pixels = (label > 0).flatten(2).float()
    area.scatter_add_(2, label.flatten(2).long(), pixels)
    area[..., 0] = 0
    return area


def best_fit(soft):
    """The shape that fits a blob [N,32,32] best, of the same area and centroid.

    -> shape, x, y, size, iou, each [N]; (x, y) is the centroid, size the area, both in pixels.
    """
    size = soft.sum((1, 2))
    pixel = torch.arange(SIZE, device=soft.device) + 0.5
    x = (soft.sum(1) * pixel).sum(1) / size
    y = (soft.sum(2) * pixel).sum(1) / size
    of_circle = (size / math.pi).sqrt()
    of_square = size.sqrt() / 1.76
    of_triangle = (size / (3**1.5 * 0.62**2)).sqrt()
    radius = torch.stack([of_circle, of_square, of_triangle], 1)
    middle = y - 0.62 * of_triangle / 2  # of the triangle's bounding box
    shapes = torch.arange(len(SHAPES), device=soft.device)
    shapes = shapes.expand(len(soft), -1)
    centre_x = x[:, None].expand(-1, len(SHAPES))
    centre_y = torch.stack([y, y, middle], 1)
    template = coverage(shapes, centre_x, centre_y, radius)
    both = torch.minimum(template, soft[:, None]).sum((2, 3))
    either = torch.maximum(template, soft[:, None]).sum((2, 3))
    iou, shape = (both / either).max(1)
    return shape, x, y, size, iou


def well_formed(metadata):
    """Is this metadata that `check` can decide? Anything may be asked about."""
    try:
        include = metadata["include"]
        return all(is_entry(entry, len(include)) for entry in include)
    except (TypeError, KeyError, IndexError, AttributeError):
        return False


def is_entry(entry, n_entries):
    """Is this an entry of "include", of which there are n_entries?"""
    if entry["class"] not in SHAPES or not 1 <= entry["count"] <= MOST_OBJECTS:
        return False
    if entry.get("color", "red") not in COLORS:
        return False
    if "position" not in entry:
        return True
    place = entry["position"]
    return place[0] in RELATIONS and 0 <= place[1] < n_entries


def check(found, metadata):
    """Do the objects that `detect` found satisfy the caption exactly? -> bool

    Nothing is missing, nothing is too much, colours and places are right.
    """
    wanted = objects_of(metadata)
    strange = any(thing.shape is None for thing in found)
    if strange or len(found) != len(wanted):
        return False
    matched = []
    for entry in wanted:
        left = [thing for thing in found if thing not in matched]
        fitting = [thing for thing in left if fits(thing, entry)]
        if not fitting:
            return False
        # Shapes in one caption differ, or are alike and without colours: any match will do.
        matched.append(fitting[0])
    return all(
        in_place(thing, entry["position"], matched)
        for thing, entry in zip(matched, wanted)
        if "position" in entry
    )


def fits(thing, entry):
    """Has this object the shape of the entry, and the colour if it names one?"""
    color = entry.get("color", thing.color)
    return (thing.shape, thing.color) == (entry["class"], color)


def in_place(thing, place, matched):
    """Is this object where it should be? place: [relation, number of the other object in matched]"""
    relation, number = place[:2]
    other = matched[number]
    dx = thing.x - other.x
    dy = thing.y - other.y
    distance = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return distance[relation] >= MIN_DISTANCE
