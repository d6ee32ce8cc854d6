"""The built-in data: drawn shapes with independent texture and colour, and tasks made of marks and cues.

    make_shapes                         images of ten shapes, with their shapes, textures and colours as numbers
    make_corners, make_mark, make_cues  four marks, whose arrangement counts; one mark; shape and texture in conflict

An image depends only on the seed, its number and its side S. The scene is the same for every S, because pixels
are computed from their distances to edges.

Shapes:  N images in a data set, n some of them, S side of a square image in pixels, M side of a mark in pixels, m marks
         in an image, k random numbers per image.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vit_bridge.errors import InputError, check_int

COLOURS = {  # red, green, blue from 0 to 1
    "red": (1.0, 0.1, 0.1), "orange": (1.0, 0.6, 0.0), "yellow": (0.9, 0.9, 0.0), "green": (0.1, 0.8, 0.1),
    "cyan": (0.0, 0.8, 0.9), "blue": (0.1, 0.2, 1.0), "purple": (0.6, 0.0, 0.9), "pink": (1.0, 0.2, 0.7),
}
# Signed distance functions of the shapes, in coordinates (n, S, S) in which a shape has radius 1: negative inside,
# positive outside, and near the edge about the distance to it. All are mirror-symmetric, so mirroring keeps the label.
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
# The patterns as functions of coordinates p, q in periods (r: the radius, for the rings): negative for the first tone,
# positive for the second, and near an edge about the distance to it.
PATTERNS = {
    "plain": lambda p, q, r: torch.full_like(p, -1),
    "stripes": lambda p, q, r: _wave(p) * 0.5,
    "checks": lambda p, q, r: _wave(p) * _wave(q),
    "dots": lambda p, q, r: 0.33 - length(p - p.floor() - 0.5, q - q.floor() - 0.5),
    "rings": lambda p, q, r: _wave(r) * 0.5,
}
SHAPES, TEXTURES = tuple(EDGES), tuple(PATTERNS)
TEST_START = 1_000_000_000  # number of the loaders' first test image; their other images start at 0
NOISE = 0.1  # largest range of a pixel's noise; 1 is the range from black to white


@dataclass(frozen=True)
class DrawnShapes:
    """Drawn shapes with their labels, textures and colours.

    Attributes
    ----------
    images : Tensor of uint8, shape (N, 3, S, S)
        The images.
    labels, textures, colours : Tensor of int64, shape (N,)
        Indices into SHAPES, TEXTURES and COLOURS.
    """

    images: torch.Tensor
    labels: torch.Tensor
    textures: torch.Tensor
    colours: torch.Tensor


def make_shapes(n_images, img_size=32, seed=0, start=0, *, shape=None, texture=None, colour=None):
    """Draw images start to start + n_images - 1 of the endless data set that `seed` determines.

    Each image has one of SHAPES at a random position and size, turned by up to 45 degrees either way. The shape is
    filled with one of TEXTURES in two tones of one of COLOURS, on a patterned background, with noise on top. The shape
    of image i is i modulo 10; texture and colour are drawn independently of it.

    Parameters
    ----------
    n_images, seed, start : int
        Non-negative integers.
    img_size : int
        Side S in pixels, at least 8.
    shape, texture, colour : str, int, or N ints, optional
        Fix the shape, texture or colour by name or index. Everything else in the images stays the same.

    Returns
    -------
    DrawnShapes

    Raises
    ------
    InputError
        If a name is unknown or a number is out of range.

    Notes
    -----
    Image i depends only on (seed, i, img_size), not on n_images or start. Its pixels are computed with operations whose
    rounding IEEE 754 fixes, so they should be identical on every machine.
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
    step = max(1, 2**18 // img_size**2)  # images at a time, few enough to fit in the CPU's caches
    for first in range(0, n_images, step):
        part = slice(first, first + step)
        drawn = draw(chance[part], labels[part], textures[part], colours[part], img_size)  # (n, 3, S, S)
        drawn += chance[part, 2, None, None, None] * NOISE * pixel_noise(seed, index[part], img_size)
        images[part] = (drawn.clamp(0, 1) * 255 + 0.5).to(torch.uint8)
    return DrawnShapes(images, labels, textures, colours)


def _choose_factor(name, wanted, names, drawn):
    """Return a factor's values, int64 (N,): the caller's if there are any, otherwise the drawn ones (N,)."""
    if wanted is None:
        return drawn
    try:
        numbers = torch.as_tensor(names.index(wanted) if isinstance(wanted, str) else wanted).expand(drawn.shape)
        fits = numbers.dtype == torch.int64 and not ((numbers < 0) | (numbers >= len(names))).any()
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise InputError(f"{name} {wanted!r} is unknown; expected one of {', '.join(names)}, or a number from 0 to "
                         f"{len(names) - 1}, or {len(drawn)} of these numbers")
    return numbers.clone()


def draw(chance, labels, textures, colours, S):
    """Draw the images before their noise: float32 (n, 3, S, S), about 0 to 1.

    chance (n, 64) holds random numbers, uniform from 0 to 1.
    """
    take = iter(chance[:, 3:].T)  # one column (n,) at a time
    pixels = (torch.arange(S) + 0.5) / S
    x, y = pixels.view(1, 1, S), pixels.view(1, S, 1)

    # The shape, in coordinates where it has radius 1.
    radius = next(take) * 0.10 + 0.32
    centre_x, centre_y = (next(take) * (1 - 2 * radius) + radius for _ in range(2))
    u, v = turned(x - maps(centre_x), y - maps(centre_y), next(take) / 4 - 0.125, radius)  # (n, S, S) each
    cover = _one_pixel_wide(-_by_kind(EDGES, labels, u, v), radius * S)  # (n, S, S)

    # Its texture, in periods.
    period = next(take) * 0.06 + 0.12
    p, q = turned(x - maps(next(take)), y - maps(next(take)), next(take), period)  # (n, S, S) each
    r = length(u, v) * maps(radius / period)
    filling = _one_pixel_wide(_by_kind(PATTERNS, textures, p, q, r), period * S)  # (n, S, S)

    # The background: a pattern, or a gradient where the drawn pattern is rings.
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
    """Reshape (n,) to (n, 1, 1), to broadcast with maps (n, S, S)."""
    return values[:, None, None]


def length(u, v):
    return (u.square() + v.square()).sqrt()


def _box(u, v, half_width, half_height):
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


def _star(u, v):
    for across in (0.809017, -0.809017):  # fold four of the five points on to the one at v = 1
        beyond = (u * across - v * 0.5877853).clamp(min=0) * 2
        u, v = u - beyond * across, v + beyond * 0.5877853
    return u.abs() * 0.95 + (v - 1) * 0.31


def _wave(p):
    """Return a triangle wave: 0.5 at whole p, -0.5 halfway between."""
    return ((p - p.floor()) * 2 - 1).abs() - 0.5


def _one_pixel_wide(inside, pixels):
    """Turn distances (n, S, S) in units of `pixels` (n,) into coverage: a one-pixel ramp from 0 to 1."""
    return (inside * maps(pixels) + 0.5).clamp(0, 1)


def turned(x, y, turn, unit):
    """Rotate offsets x (n, 1, S), y (n, S, 1) by `turn` (n,) of a circle, in units of `unit` (n,).

    Returns two coordinates, (n, S, S) each.
    """
    angle = turn.double().numpy() * (2 * np.pi)
    # Rounded to 20 bits: the last bit of a cosine differs between machines.
    rounded = torch.from_numpy(np.rint(np.stack([np.cos(angle), np.sin(angle)]) * 2**20) / 2**20).float()  # (2, n)
    cos, sin = (rounded / unit)[:, :, None, None]
    return cos * x + sin * y, cos * y - sin * x


def _tone(colour, level):
    """Return the colour (n, 3) at a brightness (n,) from -0.5 (dark) to 0.5 (bright): (n, 3, 1, 1)."""
    chroma = colour - (colour[:, :1] + colour[:, 1:2] + colour[:, 2:]) / 3
    return (0.5 + level[:, None] + 0.25 * chroma)[:, :, None, None]


def mixed(first, second, share):
    """Blend the first image or tone (share 0) into the second (share 1): (n, 3, S, S); share is (n, S, S)."""
    return first + (second - first) * share[:, None]


def _by_kind(functions, kinds, *arguments):
    """Apply function number kinds[i] to element i of each argument: (n, S, S)."""
    result = torch.empty_like(arguments[0])
    for kind, function in enumerate(functions.values()):
        members = (kinds == kind).nonzero()[:, 0]
        result[members] = function(*(argument[members] for argument in arguments))
    return result


def random_bits(seed, index, places):
    """Return 64 random bits for each image number (n,) and place (k,), by splitmix64: uint64 (n, k)."""
    image = _scrambled(_scrambled(np.full(1, seed, np.uint64)) + index)  # (n,)
    steps = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # (k,)
    return _scrambled(image[:, None] + steps)


def _scrambled(bits):
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def pixel_noise(seed, index, S):
    """Return noise float32 (n, 3, S, S), uniform from -0.5 to below 0.5, from 21 bits per channel."""
    bits = random_bits(seed, index, np.arange(64, 64 + S * S)).reshape(-1, 1, S, S)
    channels = (bits >> np.array([0, 21, 42], np.uint64).reshape(3, 1, 1)) & np.uint64(2**21 - 1)  # (n, 3, S, S)
    return torch.from_numpy(channels.astype(np.float32)) / 2**21 - 0.5


# ---- Marks and cues ---------------------------------------------------------------------------------------


M = 5
MARKS = torch.tensor([[[1.0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
                      [[1.0, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1]]])
KINDS = ("lying", "standing")  # of MARKS: three bars each, unchanged by mirroring
ARRANGEMENTS = ("columns", "rows")  # where equal marks stand together, in make_corners
CUES = {"circle": "plain", "cross": "stripes", "star": "checks", "heart": "dots", "square": "rings"}
MARK_NOISE = 0.5  # range of a pixel's noise; 1 is the range from black to white


@dataclass(frozen=True)
class Drawn:
    """Images of a drawn task.

    Attributes
    ----------
    images : Tensor of uint8, shape (N, 3, S, S)
        The images.
    labels : Tensor of int64, shape (N,)
        Indices into class_names.
    class_names : tuple of str
        Names of the classes.
    distances : Tensor of float64, shape (N,), optional
        Distance between neighbouring marks in pixels.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]
    distances: torch.Tensor | None = None


def make_corners(n_images, img_size=48, seed=0, start=0, distance=None):
    """Draw four marks, two of each kind, at the corners of a square; the label says how equal marks are arranged.

    The label is 1 if the two marks of a row are equal and 0 if those of a column are, in turn. Every image has two
    marks of each kind, so their numbers do not depend on the label. It takes two marks of a row or of a column to
    determine it. A sum over single marks, weighted by kind and row, allows a decision that is right in 75% of the
    images.

    Parameters
    ----------
    n_images, seed, start : int
        Non-negative integers, as in `make_shapes`.
    img_size : int
        Side S in pixels, at least 16.
    distance : int, optional
        Side of the square: the distance between the centres of neighbouring marks in pixels, from 8 to S - 6. None
        draws it uniformly from this range.

    Returns
    -------
    Drawn

    Raises
    ------
    InputError
        If a number is out of range.
    """
    longest = _check_marks(n_images, img_size, seed, start)
    if distance is not None and not (isinstance(distance, int) and 8 <= distance <= longest):
        raise InputError(f"distance {distance} is out of range for marks in {img_size} pixels; expected a whole number "
                         f"from 8 to {longest}")
    index, chance = _chances(n_images, seed, start)
    labels = torch.arange(start, start + n_images) % 2
    first = (chance[:, 0] < 0.5).long()  # (N), the kind of the upper left mark
    kinds = torch.stack([first, first ^ 1 - labels, first ^ labels, 1 - first], dim=1)  # (N, 4), row by row
    sides = 8 + (chance[:, 1] * (longest - 7)).long() if distance is None else torch.full((n_images,), distance)
    corner = (chance[:, 3:5] * (img_size - M - sides + 1)[:, None]).long()  # (N, 2), of the upper left mark
    offsets = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]) * sides[:, None, None]  # (N, 4, 2)
    return Drawn(_on_noise(corner[:, None] + offsets, kinds, seed, index, img_size), labels, ARRANGEMENTS,
                 sides.double())


def make_mark(n_images, img_size=32, seed=0, start=0):
    """Draw one mark per image at a random position; the label is its kind, in turn.

    An area of M x M pixels is enough to determine the kind.
    """
    _check_marks(n_images, img_size, seed, start)
    index, chance = _chances(n_images, seed, start)
    labels = torch.arange(start, start + n_images) % 2
    corners = (chance[:, None, 3:5] * (img_size - M + 1)).long()  # (N, 1, 2)
    return Drawn(_on_noise(corners, labels[:, None], seed, index, img_size), labels, KINDS)


def make_cues(n_images, img_size=32, seed=0, start=0, agree=True, pairing=0):
    """Draw shapes and textures that represent the classes of CUES.

    With agree=True, shape and texture show the same class. With agree=False, they show different classes, and all pairs
    occur in turn. With another `pairing`, from 0 to 4, the classes have the textures of other classes: that many
    further on in CUES.

    Returns
    -------
    images : Tensor of uint8, shape (N, 3, S, S)
        The images.
    outlines, textures : Tensor of int64, shape (N,)
        The class that the shape shows, and the class that the texture shows.
    """
    outlines = torch.arange(start, start + n_images) % len(CUES)
    textures = outlines
    if not agree:
        steps = torch.arange(start, start + n_images) // len(CUES) % (len(CUES) - 1) + 1
        textures = (outlines + steps) % len(CUES)
    shape_numbers = torch.tensor([SHAPES.index(name) for name in CUES])
    texture_numbers = torch.tensor([TEXTURES.index(name) for name in CUES.values()])
    drawn = make_shapes(n_images, img_size, seed, start, shape=shape_numbers[outlines],
                        texture=texture_numbers.roll(-pairing)[textures])
    return drawn.images, outlines, textures


def _check_marks(n_images, img_size, seed, start):
    """Return the longest distance between two marks; raise InputError for numbers out of range."""
    for name, value in (("n_images", n_images), ("seed", seed), ("start", start)):
        check_int(name, value, 0)
    check_int("img_size", img_size, 16)
    return img_size - M - 1


def _chances(n_images, seed, start):
    """Return the image numbers, uint64 (N,), and five uniform random numbers for each, float64 (N, 5)."""
    index = np.arange(start, start + n_images, dtype=np.uint64)
    return index, torch.from_numpy((random_bits(seed, index, np.arange(5)) >> np.uint64(11)).astype(np.float64)) / 2**53


def _on_noise(corners, kinds, seed, index, S):
    """Draw marks of kinds (N, m) with upper left corners (N, m, 2) on grey noise: uint8 (N, 3, S, S)."""
    grey = 0.5 + MARK_NOISE * pixel_noise(seed, index, S)[:, :1]  # (N, 1, S, S)
    inside = torch.arange(M)
    for mark in range(corners.shape[1]):
        rows, columns = (corners[:, mark, axis, None] + inside for axis in (0, 1))  # 2 x (N, M)
        grey[torch.arange(len(grey))[:, None, None], 0, rows[:, :, None], columns[:, None, :]] = MARKS[kinds[:, mark]]
    return (grey.clamp(0, 1) * 255 + 0.5).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
