import pytest
import torch

from vit_bridge.data.shapes import (
    CUES,
    KINDS,
    MARKS,
    SHAPES,
    TEXTURES,
    M,
    make_cues,
    make_mark,
    make_marks,
    make_shapes,
)
from vit_model import InputError


def marks_in(image):
    """Return the kinds of the marks in an image (3, S, S), found by searching everywhere."""
    windows = image[0].float().div(255).unfold(0, M, 1).unfold(1, M, 1)  # (S - M + 1, S - M + 1, M, M)
    return [kind for kind, mark in enumerate(MARKS) for _ in range(int((windows == mark).all(dim=(2, 3)).sum()))]


@pytest.mark.parametrize("distance", [None, 8, 17.5, 31])
def test_make_marks_draws_two_marks_and_labels_compare_them(distance):
    drawn = make_marks(101, 37, seed=3, start=5, distance=distance)
    assert drawn.images.shape == (101, 3, 37, 37)
    assert drawn.labels.tolist() == [(5 + i) % 2 for i in range(101)]
    for image, label in zip(drawn.images, drawn.labels, strict=True):
        kinds = marks_in(image)
        assert len(kinds) == 2
        assert (kinds[0] == kinds[1]) == bool(label)
    if distance is not None:
        assert ((drawn.distances - distance).abs() <= 2**0.5).all()  # both middles are rounded
    else:
        assert drawn.distances.min() < 11
        assert drawn.distances.max() > 28


def test_make_marks_single_marks_tell_nothing_of_the_label():
    drawn = make_marks(2000, 32)
    kinds = torch.tensor([marks_in(image) for image in drawn.images])  # (2000, 2)
    for label in (0, 1):
        assert kinds[drawn.labels == label].float().mean() == pytest.approx(0.5, abs=0.05)


def test_make_mark_draws_one_mark_of_the_labels_kind():
    drawn = make_mark(301, 23)
    assert drawn.class_names == KINDS
    assert all(marks_in(image) == [label] for image, label in zip(drawn.images, drawn.labels.tolist(), strict=True))


def test_make_marks_images_depend_on_their_number_alone():
    assert torch.equal(make_marks(3, 32, start=2).images, make_marks(5, 32).images[2:])
    assert torch.equal(make_mark(3, 32, start=2).images, make_mark(5, 32).images[2:])
    assert not torch.equal(make_marks(5, 32, seed=1).images, make_marks(5, 32).images)


def test_make_cues_makes_cues_agree_or_conflict():
    images, outlines, textures = make_cues(23, 16, seed=1, start=3)
    assert torch.equal(outlines, textures)
    names = list(CUES)
    expected = make_shapes(23, 16, 1, 3, shape=torch.tensor([SHAPES.index(names[i]) for i in outlines]),
                           texture=torch.tensor([TEXTURES.index(CUES[names[i]]) for i in textures]))
    assert torch.equal(images, expected.images)
    _, outlines, textures = make_cues(40, 16, agree=False)
    pairs = list(zip(outlines.tolist(), textures.tolist(), strict=True))
    assert sorted(set(pairs)) == [(i, j) for i in range(5) for j in range(5) if i != j]
    assert all(pairs.count(pair) == 2 for pair in pairs)


@pytest.mark.parametrize(("settings", "words"), [(dict(distance=7), "distance 7"), (dict(distance=27), "8 to 26"),
                                                 (dict(img_size=15), "img_size 15"), (dict(n_images=-1), "n_images")])
def test_make_marks_refuses_bad_settings(settings, words):
    with pytest.raises(InputError, match=words):
        make_marks(**dict(n_images=2) | settings)
