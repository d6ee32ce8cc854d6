import pytest
import torch

from vit_bridge.data.shapes import (
    CUES,
    KINDS,
    MARKS,
    SHAPES,
    TEXTURES,
    M,
    make_corners,
    make_cues,
    make_mark,
    make_shapes,
)
from vit_model import InputError


def found_marks(image):
    """Return places and kinds of the marks in an image (3, S, S), row by row, found by searching everywhere."""
    windows = image[0].float().div(255).unfold(0, M, 1).unfold(1, M, 1)  # (S - M + 1, S - M + 1, M, M)
    found = sorted((tuple(place), kind) for kind, mark in enumerate(MARKS)
                   for place in (windows == mark).all(dim=(2, 3)).nonzero().tolist())
    return [place for place, _ in found], [kind for _, kind in found]


@pytest.mark.parametrize("distance", [None, 8, 17, 31])
def test_make_corners_draws_squares_whose_label_is_their_arrangement(distance):
    drawn = make_corners(101, 37, seed=3, start=5, distance=distance)
    assert drawn.images.shape == (101, 3, 37, 37)
    assert drawn.labels.tolist() == [(5 + i) % 2 for i in range(101)]
    for image, label, side in zip(drawn.images, drawn.labels.tolist(), drawn.distances.tolist(), strict=True):
        places, kinds = found_marks(image)
        (top, left), side = places[0], int(side)
        assert places == [(top, left), (top, left + side), (top + side, left), (top + side, left + side)]
        assert kinds[0] != kinds[3]
        assert (kinds[0] == kinds[1]) == bool(label)
        assert (kinds[0] == kinds[2]) != bool(label)
    assert set(drawn.distances.tolist()) == ({distance} if distance else set(range(8, 32)))


def test_make_corners_sums_over_marks_tell_nothing_of_the_label():
    """Both classes have the same marks in every image, and the same kinds at every corner, equally often."""
    drawn = make_corners(2000, 32)
    kinds = torch.tensor([found_marks(image)[1] for image in drawn.images])  # (2000, 4)
    assert (kinds.sum(dim=1) == 2).all()
    for label in (0, 1):
        assert kinds[drawn.labels == label].float().mean(dim=0).tolist() == pytest.approx([0.5] * 4, abs=0.05)


def test_make_mark_draws_one_mark_of_the_labels_kind():
    drawn = make_mark(301, 23)
    assert drawn.class_names == KINDS
    assert [found_marks(image)[1] for image in drawn.images] == [[label] for label in drawn.labels.tolist()]


def test_make_corners_images_depend_on_their_number_alone():
    assert torch.equal(make_corners(3, 32, start=2).images, make_corners(5, 32).images[2:])
    assert torch.equal(make_mark(3, 32, start=2).images, make_mark(5, 32).images[2:])
    assert not torch.equal(make_corners(5, 32, seed=1).images, make_corners(5, 32).images)


def test_make_cues_makes_cues_agree_or_conflict():
    images, outlines, textures = make_cues(23, 16, seed=1, start=3)
    assert torch.equal(outlines, textures)
    names = list(CUES)
    expected = make_shapes(23, 16, 1, 3, shape=torch.tensor([SHAPES.index(names[i]) for i in outlines]),
                           texture=torch.tensor([TEXTURES.index(CUES[names[i]]) for i in textures]))
    assert torch.equal(images, expected.images)
    other, same, _ = make_cues(5, 16, pairing=2)
    assert torch.equal(same, torch.arange(5))
    moved = make_shapes(5, 16, shape=torch.tensor([SHAPES.index(name) for name in CUES]), texture=torch.tensor(
        [TEXTURES.index(name) for name in ("checks", "dots", "rings", "plain", "stripes")]))
    assert torch.equal(other, moved.images)
    _, outlines, textures = make_cues(40, 16, agree=False)
    pairs = list(zip(outlines.tolist(), textures.tolist(), strict=True))
    assert sorted(set(pairs)) == [(i, j) for i in range(5) for j in range(5) if i != j]
    assert all(pairs.count(pair) == 2 for pair in pairs)


@pytest.mark.parametrize(("settings", "words"), [(dict(distance=7), "distance 7"), (dict(distance=43), "8 to 42"),
                                                 (dict(distance=9.5), "whole number"),
                                                 (dict(img_size=15), "img_size 15"), (dict(n_images=-1), "n_images")])
def test_make_corners_refuses_bad_settings(settings, words):
    with pytest.raises(InputError, match=words):
        make_corners(**dict(n_images=2) | settings)
