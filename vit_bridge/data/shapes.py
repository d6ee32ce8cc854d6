"""The built-in set, drawn: ten shapes, of which texture and colour say nothing; and tasks of marks and cues.

    make_shapes                         images of an endless set, with their shapes, textures and colours as numbers
    make_marks, make_mark, make_cues    two marks to compare, one mark, outlines and textures at odds

An image is a function of a seed, its number and S alone. Every S shows the same scene, as pixels are computed from
their distances to the edges of shapes and patterns.

Shapes:  N images in a set, n some of them, S side of a square image in pixels, M side of a mark in pixels, m marks
         in an image, k places.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vit_bridge.errors import InputError, check_int

COLOURS = {  # red, green, blue from 0 to 1
    "red": (1.0, 0.1, 0.1), "orange": (1.0, 0.6, 0.0), "yellow": (0.9, 0.9, 0.0), "green": (0.1, 0.8, 0.1),
    "cyan": (0.0, 0.8, 0.9), "blue": (0.1, 0.2, 1.0), "purple": (0.6, 0.0, 0.9), "pink": (1.0, 0.2, 0.7),
}
# Each shape as a function of coordinates (n, S, S) in which it has radius 1: below 0 inside, above 0 outside, near the
# edge about the distance from it. All are their own mirror images, so that mirroring in training keeps the label.
EDGES = {
    "circle": lambda u, v: length(u, v) - 0.85,
    "ring": lambda u, v: (length(u, v) - 0.74).abs() - 0.22,
    "triangle": lambda u, v: torch.maximum(u.abs() * 0.8660254 + v * 0.5, -v) - 0.5,
    "square": lambda u, v: _box(u, v, 0.72, 0.72),
    "star": lambda u, v: _star(u.abs(), v),
    "cross": lambda u, v: torch.minimum(_box(u, v, 0.95, 0.27), _box(u, v, 0.27, 0.95)),
    "heart": lambda u, v: torch.minimum(length(u.abs() - 0.354, v - 0.354), (u.abs() + v.abs()) * 0.7071) - 0.5,
    "crescent": lambda u, v: torch.maximum(length(u, v) - 0.95, 0.75 - length(u - 0.5, v)),
    "tee": lambda u, v: torch.minimum(_box(u, v - 0.48, 0.69, 0.22), _box(u, v + 0.12, 0.22, 0.82)),
    "dumbbell": lambda u, v: torch.minimum(length(u.abs() - 0.6, v) - 0.38, _box(u, v, 0.6, 0.14)),
}
# Each pattern as a function of coordinates p, q in periods (r: of the rings, the gradient): below 0 the first tone,
# above 0 the second, near an edge about the distance from it.
PATTERNS = {
    "plain": lambda p, q, r: torch.full_like(p, -1),
    "stripes": lambda p, q, r: _wave(p) * 0.5,
    "checks": lambda p, q, r: _wave(p) * _wave(q),
    "dots": lambda p, q, r: 0.33 - length(p - p.floor() - 0.5, q - q.floor() - 0.5),
    "rings": lambda p, q, r: _wave(r) * 0.5,
}
SHAPES, TEXTURES = tuple(EDGES), tuple(PATTERNS)
TEST_START = 1_000_000_000  # the loaders' test images are numbered from here, their other images from 0
NOISE = 0.1  # the largest span of a pixel's noise, where 1 is from black to white


@dataclass(frozen=True)
class DrawnShapes:
    """images uint8 (N, 3, S, S); labels, textures, colours int64 (N,): indices into SHAPES, TEXTURES, COLOURS."""
    images: torch.Tensor
    labels: torch.Tensor
    textures: torch.Tensor
    colours: torch.Tensor


def make_shapes(n_images, img_size=32, seed=0, start=0, *, shape=None, texture=None, colour=None):
    """Drawn shapes number start to start + n_images - 1 of the endless set that `seed` names.

    Each has one of SHAPES at a random place and size, turned by up to 45 degrees either way, filled with one of
    TEXTURES in two tones of one of COLOURS, on a patterned background, under noise. The shape of image i is i modulo
    ten; texture and colour are drawn without regard to it. shape, texture and colour override that: a name, a number,
    or N numbers in a sequence or tensor. All else in the images stays as it was.

    Image i depends on (seed, i, img_size) alone, not on n_images or start. Its pixels are computed by operations that
    IEEE 754 rounds in one way only, so they should be the same on every machine.

    Returns DrawnShapes. Raises InputError for names and numbers that cannot be.
    """
    for name, value in (("n_images", n_images), ("seed", seed), ("start", start)):
        check_int(name, value, 0)
    check_int("img_size", img_size, 8)
    index = np.arange(start, start + n_images, dtype=np.uint64)
    chance = torch.from_numpy((random_bits(seed, index, np.arange(64)) >> np.uint64(40)).astype(np.float32)) / 2**24
    labels = _choose_factor("shape", shape, SHAPES, torch.arange(start, start + n_images) % len(SHAPES))
    textures = _choose_factor("texture", texture, TEXTURES, (chance[:, 0] * len(TEXTURES)).long())
    colours = _choose_factor("colour", colour, tuple(COLOURS), (chance[:, 1] * len(COLOURS)).long())
    images = torch.empty(n_images, 3, img_size, img_size, dtype=torch.uint8)
    step = max(1, 2**18 // img_size**2)  # images at a time: few enough to stay in the processor's caches
    for first in range(0, n_images, step):
        part = slice(first, first + step)
        drawn = draw(chance[part], labels[part], textures[part], colours[part], img_size)  # (n, 3, S, S)
        drawn += chance[part, 2, None, None, None] * NOISE * pixel_noise(seed, index[part], img_size)
        images[part] = (drawn.clamp(0, 1) * 255 + 0.5).to(torch.uint8)
    return DrawnShapes(images, labels, textures, colours)


def _choose_factor(name, wanted, names, drawn):
    """A factor's numbers, int64 (N,): those drawn (N,), or those that the caller wants."""
    if wanted is None:
        return drawn
    try:
        numbers = torch.as_tensor(names.index(wanted) if isinstance(wanted, str) else wanted).expand(drawn.shape)
        fits = numbers.dtype == torch.int64 and not ((numbers < 0) | (numbers >= len(names))).any()
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise InputError(f"{name} {wanted!r} cannot be: expected one of {', '.join(names)}, or a number from 0 to "
                         f"{len(names) - 1}, or {len(drawn)} such numbers")
    return numbers.clone()


def draw(chance, labels, textures, colours, S):
    """The images before their noise: float32 (n, 3, S, S), about 0 to 1. chance (n, 64) is uniform from 0 to 1."""
    take = iter(chance[:, 3:].T)  # one column (n,) at a time
    pixels = (torch.arange(S) + 0.5) / S
    x, y = pixels.view(1, 1, S), pixels.view(1, S, 1)

    # The shape, in coordinates in which it has radius 1.
    radius = next(take) * 0.10 + 0.32
    centre_x, centre_y = (next(take) * (1 - 2 * radius) + radius for _ in range(2))
    u, v = turned(x - maps(centre_x), y - maps(centre_y), next(take) / 4 - 0.125, radius)  # (n, S, S) each
    cover = _one_pixel_wide(-_by_kind(EDGES, labels, u, v), radius * S)  # (n, S, S)

    # The texture it is filled with, in periods.
    period = next(take) * 0.06 + 0.12
    p, q = turned(x - maps(next(take)), y - maps(next(take)), next(take), period)  # (n, S, S) each
    r = length(u, v) * maps(radius / period)
    filling = _one_pixel_wide(_by_kind(PATTERNS, textures, p, q, r), period * S)  # (n, S, S)

    # The background: a pattern other than rings, or in their place a gradient from side to side.
    kind = (next(take) * len(PATTERNS)).long()
    period = next(take) * 0.2 + 0.15
    p, q = turned(x - maps(next(take)), y - maps(next(take)), next(take), period)  # (n, S, S) each
    ground = _one_pixel_wide(_by_kind(PATTERNS, kind, p, q, p), period * S)
    gradient = (p * maps(period) * 0.7 + 0.5).clamp(0, 1)
    ground = torch.where(maps(kind == TEXTURES.index("rings")), gradient, ground)  # (n, S, S)

    # Two tones each for shape and background, on either side of mid-grey.
    palette = torch.tensor(list(COLOURS.values()))  # (8, 3)
    side = (next(take) < 0.5).float() * 2 - 1
    own = palette[colours]  # (n, 3)
    bold, soft = _tone(own, side * (next(take) * 0.10 + 0.35)), _tone(own, side * (next(take) * 0.10 + 0.15))
    other = palette[(next(take) * len(palette)).long()]  # (n, 3)
    near, far = (_tone(other, -side * (next(take) * 0.15 + 0.15)) for _ in range(2))
    return mixed(mixed(near, far, ground), mixed(bold, soft, filling), cover)  # (n, 3, S, S)


def maps(values):
    """(n,) as (n, 1, 1), to go with maps (n, S, S)."""
    return values[:, None, None]


def length(u, v):
    return (u.square() + v.square()).sqrt()


def _box(u, v, half_width, half_height):
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


def _star(u, v):
    for across in (0.809017, -0.809017):  # mirror four of the five points on to the one at v = 1
        beyond = (u * across - v * 0.5877853).clamp(min=0) * 2
        u, v = u - beyond * across, v + beyond * 0.5877853
    return u.abs() * 0.95 + (v - 1) * 0.31


def _wave(p):
    """0.5 at whole p, -0.5 halfway between, and straight lines from one to the other."""
    return ((p - p.floor()) * 2 - 1).abs() - 0.5


def _one_pixel_wide(inside, pixels):
    """Distances (n, S, S) in units of `pixels` (n,), as coverage: 0 below 0, 1 above, a ramp of one pixel between."""
    return (inside * maps(pixels) + 0.5).clamp(0, 1)


def turned(x, y, turn, unit):
    """Offsets x (n, 1, S), y (n, S, 1) turned by `turn` (n,) of a circle, in units of `unit` (n,): (n, S, S) each."""
    angle = turn.double().numpy() * (2 * np.pi)
    # Rounded to 20 bits: the last bit of a cosine differs between machines.
    rounded = torch.from_numpy(np.rint(np.stack([np.cos(angle), np.sin(angle)]) * 2**20) / 2**20).float()  # (2, n)
    cos, sin = (rounded / unit)[:, :, None, None]
    return cos * x + sin * y, cos * y - sin * x


def _tone(colour, level):
    """The colour (n, 3) at a level (n,) from -0.5, dark, to 0.5, bright: (n, 3, 1, 1)."""
    chroma = colour - (colour[:, :1] + colour[:, 1:2] + colour[:, 2:]) / 3
    return (0.5 + level[:, None] + 0.25 * chroma)[:, :, None, None]


def mixed(first, second, share):
    """From the first image or tone, where share (n, S, S) is 0, to the second, where it is 1: (n, 3, S, S)."""
    return first + (second - first) * share[:, None]


def _by_kind(functions, kinds, *arguments):
    """The kinds[i]-th function of the i-th part of each argument, put together again: (n, S, S)."""
    result = torch.empty_like(arguments[0])
    for kind, function in enumerate(functions.values()):
        members = (kinds == kind).nonzero()[:, 0]
        result[members] = function(*(argument[members] for argument in arguments))
    return result


def random_bits(seed, index, places):
    """uint64 (n, k): 64 bits for each image number `index` (n,) and each of `places` (k,), by splitmix64."""
    image = _scrambled(_scrambled(np.full(1, seed, np.uint64)) + index)  # (n,)
    steps = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # (k,)
    return _scrambled(image[:, None] + steps)


def _scrambled(bits):
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def pixel_noise(seed, index, S):
    """float32 (n, 3, S, S), uniform from -0.5 to below 0.5: 21 of a pixel's 64 bits for each channel."""
    bits = random_bits(seed, index, np.arange(64, 64 + S * S)).reshape(-1, 1, S, S)
    channels = (bits >> np.array([0, 21, 42], np.uint64).reshape(3, 1, 1)) & np.uint64(2**21 - 1)  # (n, 3, S, S)
    return torch.from_numpy(channels.astype(np.float32)) / 2**21 - 0.5


# ---- Marks and cues ---------------------------------------------------------------------------------------


M = 5
MARKS = torch.tensor([[[1.0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
                      [[1.0, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1]]])
KINDS = ("lying", "standing")  # of MARKS: three bars each, which stay what they are when mirrored
ANSWERS = ("different", "same")
CUES = {"circle": "plain", "cross": "stripes", "star": "checks", "heart": "dots", "square": "rings"}
MARK_NOISE = 0.5  # the span of a pixel's noise, where 1 is from black to white


@dataclass(frozen=True)
class Drawn:
    """images uint8 (N, 3, S, S); labels int64 (N,), indices into class_names; distances between the marks in pixels,
    (N,) float64, or None."""
    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]
    distances: torch.Tensor | None = None


def make_marks(n_images, img_size=32, seed=0, start=0, distance=None):
    """Two marks of two KINDS each; the label says whether they are of the same kind, 0 or 1, by turns.

    distance: in pixels between their middles, from 8 to S - 6, up to the rounding to whole pixels; None: drawn evenly
    from all of these. Each kind is equally frequent, and so is each place: a single mark says nothing, and a
    network that only adds up what it sees at each place cannot tell two of one kind from one of each.

    Raises InputError for numbers that cannot be.
    """
    longest = _check_marks(n_images, img_size, seed, start)
    if distance is not None and not 8 <= distance <= longest:
        raise InputError(f"distance {distance} is out of range for two marks in {img_size} pixels; "
                         f"expected 8 to {longest}")
    index, chance = _chances(n_images, seed, start)
    labels = torch.arange(start, start + n_images) % 2
    kinds = (chance[:, 0] < 0.5).long()  # (N)
    kinds = torch.stack([kinds, kinds ^ (1 - labels)], dim=1)  # (N, 2)
    length = 8 + chance[:, 1] * (longest - 8) if distance is None else torch.full((n_images,), float(distance))
    angle = chance[:, 2] * 2 * torch.pi
    between = torch.stack([angle.sin(), angle.cos()], dim=1) * length[:, None]  # (N, 2): rows, columns
    free = img_size - M - 1 - between.abs()  # (N, 2), of the middle of both
    middle = between.abs() / 2 + M / 2 + chance[:, 3:5] * free.clamp(min=0)  # (N, 2)
    places = torch.stack([middle - between / 2, middle + between / 2], dim=1)  # (N, 2, 2): mark, axis
    corners = (places - M / 2).round().long().clamp(0, img_size - M)  # (N, 2, 2)
    images = _on_noise(corners, kinds, seed, index, img_size)
    distances = (corners[:, 0] - corners[:, 1]).double().norm(dim=1)  # (N)
    return Drawn(images, labels, ANSWERS, distances)


def make_mark(n_images, img_size=32, seed=0, start=0):
    """One mark at a random place, of the KINDS by turns, which is the label: M x M pixels decide it."""
    _check_marks(n_images, img_size, seed, start)
    index, chance = _chances(n_images, seed, start)
    labels = torch.arange(start, start + n_images) % 2
    corners = (chance[:, None, 3:5] * (img_size - M + 1)).long()  # (N, 1, 2)
    return Drawn(_on_noise(corners, labels[:, None], seed, index, img_size), labels, KINDS)


def make_cues(n_images, img_size=32, seed=0, start=0, agree=True):
    """Shapes and textures of CUES, a class each. agree=True: both name the class, by turns. agree=False: all pairs of
    an outline and the texture of another class by turns.

    Returns (images uint8 (N, 3, S, S), outlines (N,), textures (N,)), numbers of classes from 0.
    """
    outlines = torch.arange(start, start + n_images) % len(CUES)
    textures = outlines
    if not agree:
        steps = torch.arange(start, start + n_images) // len(CUES) % (len(CUES) - 1) + 1
        textures = (outlines + steps) % len(CUES)
    shape_numbers = torch.tensor([SHAPES.index(name) for name in CUES])
    texture_numbers = torch.tensor([TEXTURES.index(name) for name in CUES.values()])
    drawn = make_shapes(n_images, img_size, seed, start, shape=shape_numbers[outlines],
                        texture=texture_numbers[textures])
    return drawn.images, outlines, textures


def _check_marks(n_images, img_size, seed, start):
    """The longest distance between two marks. Raises InputError for numbers that cannot be."""
    for name, value in (("n_images", n_images), ("seed", seed), ("start", start)):
        check_int(name, value, 0)
    check_int("img_size", img_size, 16)
    return img_size - M - 1


def _chances(n_images, seed, start):
    """The numbers of the images, uint64 (N,), and 5 for each, uniform from 0 to 1: float64 (N, 5)."""
    index = np.arange(start, start + n_images, dtype=np.uint64)
    return index, torch.from_numpy((random_bits(seed, index, np.arange(5)) >> np.uint64(11)).astype(np.float64)) / 2**53


def _on_noise(corners, kinds, seed, index, S):
    """Marks by their upper left corners (N, m, 2) and kinds (N, m) on grey noise: uint8 (N, 3, S, S)."""
    grey = 0.5 + MARK_NOISE * pixel_noise(seed, index, S)[:, :1]  # (N, 1, S, S)
    inside = torch.arange(M)
    for mark in range(corners.shape[1]):
        rows, columns = (corners[:, mark, axis, None] + inside for axis in (0, 1))  # 2 x (N, M)
        grey[torch.arange(len(grey))[:, None, None], 0, rows[:, :, None], columns[:, None, :]] = MARKS[kinds[:, mark]]
    return (grey.clamp(0, 1) * 255 + 0.5).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
