"""Drawn sets whose answer hangs on one thing: on two far-apart marks, on one small mark, on outline or texture.

    make_marks   two marks in a noisy image, the same or different: only who sees both can tell
    make_mark    one small mark anywhere: its kind is the class, wherever it lies
    make_cues    outline and texture that agree, as both name the class, or are at odds

As in drawn_shapes an image is a function of a seed, its number and S alone.

Letters:  N images in a set, S side of a square image in pixels, M side of a mark.
"""

from dataclasses import dataclass

import numpy as np
import torch

from drawn_shapes import SHAPES, TEXTURES, make_shapes, pixel_noise, random_bits
from vit_model import InputError, check_whole

M = 5
MARKS = torch.tensor([[[1.0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
                      [[1.0, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1]]])
KINDS = ("lying", "standing")  # of MARKS: three bars each, which stay what they are when mirrored
ANSWERS = ("different", "same")
CUES = {"circle": "plain", "cross": "stripes", "star": "checks", "heart": "dots", "square": "rings"}
NOISE = 0.5  # the span of a pixel's noise, where 1 is from black to white


@dataclass(frozen=True)
class Drawn:
    """images uint8 (N, 3, S, S); labels int64 (N,), places in class_names; distances between the marks in pixels (N,),
    float64, or None."""
    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]
    distances: torch.Tensor | None = None


def make_marks(n_images, img_size=32, seed=0, start=0, distance=None):
    """Two marks of two KINDS each; the label says whether they are of the same kind, 0 or 1, by turns.

    distance: in pixels between their middles, from 8 to S - 6, up to the rounding to whole pixels; None: drawn evenly
    from all of these. Each kind is as frequent alone, and so are both places: no mark by itself tells anything, and a
    network that only adds up what it sees at each place cannot tell two of one kind from one of each.

    Raises InputError for numbers that cannot be.
    """
    longest = check_marks(n_images, img_size, seed, start)
    if distance is not None and not 8 <= distance <= longest:
        raise InputError(f"distance {distance} has no place for two marks in {img_size} pixels; expected 8 to "
                         f"{longest}")
    index, chance = chances(n_images, seed, start)
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
    images = on_noise(corners, kinds, seed, index, img_size)
    distances = (corners[:, 0] - corners[:, 1]).double().norm(dim=1)  # (N)
    return Drawn(images, labels, ANSWERS, distances)


def make_mark(n_images, img_size=32, seed=0, start=0):
    """One mark at a random place, of the KINDS by turns, which is the label: all that tells is in M x M pixels."""
    check_marks(n_images, img_size, seed, start)
    index, chance = chances(n_images, seed, start)
    labels = torch.arange(start, start + n_images) % 2
    corners = (chance[:, None, 3:5] * (img_size - M + 1)).long()  # (N, 1, 2)
    return Drawn(on_noise(corners, labels[:, None], seed, index, img_size), labels, KINDS)


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


def check_marks(n_images, img_size, seed, start):
    """The longest distance between two marks. Raises InputError for numbers that cannot be."""
    for name, value in (("n_images", n_images), ("seed", seed), ("start", start)):
        check_whole(name, value, 0)
    check_whole("img_size", img_size, 16)
    return img_size - M - 1


def chances(n_images, seed, start):
    """The numbers of the images, uint64 (N,), and 5 for each, uniform from 0 to 1: float64 (N, 5)."""
    index = np.arange(start, start + n_images, dtype=np.uint64)
    return index, torch.from_numpy((random_bits(seed, index, np.arange(5)) >> np.uint64(11)).astype(np.float64)) / 2**53


def on_noise(corners, kinds, seed, index, S):
    """Marks by their upper left corners (N, m, 2) and kinds (N, m) on grey noise: uint8 (N, 3, S, S)."""
    grey = 0.5 + NOISE * pixel_noise(seed, index, S)[:, :1]  # (N, 1, S, S)
    inside = torch.arange(M)
    for mark in range(corners.shape[1]):
        rows, columns = (corners[:, mark, axis, None] + inside for axis in (0, 1))  # 2 x (N, M)
        grey[torch.arange(len(grey))[:, None, None], 0, rows[:, :, None], columns[:, None, :]] = MARKS[kinds[:, mark]]
    return (grey.clamp(0, 1) * 255 + 0.5).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
