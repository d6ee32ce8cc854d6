"""Changed images: each change against its definition, and models whose predictions are known."""

import pytest
import torch
from torch import nn

from vit_bridge.analysis import perturbations as p
from vit_bridge.data.augmentation import crop_and_flip
from vit_bridge.preprocessing import Preprocessing
from vit_model import InputError, VisionTransformer


class Brightest(nn.Module):
    """Answers with the column of the brightest pixel."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return images.sum(dim=1).amax(dim=1)  # (B, width)


class Constant(Brightest):
    def forward(self, images):
        return torch.ones(len(images), 1) * torch.tensor([0.0, 1.0])


def dots(*places, size=(9, 11)):
    """Make an image for each position, black except for that pixel."""
    images = torch.zeros(len(places), 3, *size)
    for image, (row, column) in zip(images, places, strict=True):
        image[:, row, column] = 1
    return images


def test_shift_consistency_drops_when_answers_move_with_the_image():
    stays = p.shift_consistency(Brightest(), dots((4, 5), (3, 6), (5, 4)), reach=2)
    expected = torch.zeros(5, 5).double()
    expected[:, 2] = 1  # moved up and down alone
    assert torch.equal(stays, expected)
    assert p.mean_consistency(stays) == pytest.approx(4 / 24)


def test_shift_consistency_maps_rows_down_and_columns_right():
    images = dots((4, 5))
    seen = []

    class Watching(Constant):
        def forward(self, images):
            seen.append(images.clone())
            return super().forward(images)

    stays = p.shift_consistency(Watching(), images, reach=1)
    assert torch.equal(stays, torch.ones(3, 3).double())
    offsets = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if r or c]
    for image, (row, column) in zip(seen[1:], offsets, strict=True):
        assert torch.equal(image, dots((4 + row, 5 + column)))


@pytest.mark.parametrize("reach", [0, 9])
def test_shift_consistency_refuses_an_impossible_reach(reach):
    with pytest.raises(InputError, match=f"reach {reach}"):
        p.shift_consistency(Constant(), dots((4, 5)), reach)


def test_to_patches_is_undone_by_from_patches():
    images = torch.randn(2, 3, 6, 20)
    patches, grid = p.to_patches(images, (3, 5))
    assert (patches.shape, grid) == ((2, 8, 3, 3, 5), (2, 4))
    assert torch.equal(patches[1, 6], images[1, :, 3:6, 10:15])
    assert torch.equal(p.from_patches(patches, grid), images)


def numbered(n_images, grid=(4, 5), patch=(2, 3)):
    """Images whose patches are of one number each, its place: (n, 3, 8, 15)."""
    places = torch.arange(grid[0] * grid[1]).view(1, -1, 1, 1, 1).expand(n_images, -1, 3, *patch)
    return p.from_patches(places.float(), grid)


@pytest.mark.parametrize(("share", "taking_part"), [(0, 0), (0.25, 5), (0.5, 10), (1, 20)])
def test_shuffle_patches_moves_the_given_share_and_loses_none(share, taking_part):
    images = numbered(200)
    patches, _ = p.to_patches(p.shuffle_patches(images, (2, 3), share), (2, 3))
    assert (patches == patches[..., :1, :1]).all()  # each is still one patch
    order = patches[:, :, 0, 0, 0]  # (200, 20)
    assert torch.equal(order.sort(dim=1).values, torch.arange(20.0).expand(200, 20))
    moved = (order != torch.arange(20.0)).sum(dim=1)
    assert moved.max() <= taking_part
    assert (order != torch.arange(20.0)).any(dim=0).all() or not taking_part  # each image has its own places
    assert moved.float().mean() == pytest.approx(max(0, taking_part - 1), abs=0.3)  # one stays where it was, on average


def test_shuffle_patches_with_an_offset_cuts_every_patch():
    images = numbered(5)
    moved = p.shuffle_patches(images, (2, 3), 1, offset=1)
    patches, _ = p.to_patches(moved, (2, 3))
    assert ((patches != patches[..., :1, :1]).flatten(2).any(dim=2)).float().mean() > 0.9
    before, after = (p.to_patches(one.roll((-1, -1), dims=(2, 3)), (2, 3))[0].flatten(2) for one in (images, moved))
    for one, other in zip(before, after, strict=True):
        assert sorted(map(tuple, one.tolist())) == sorted(map(tuple, other.tolist()))


def test_shuffle_patches_is_repeatable_and_differs_by_image():
    images = numbered(7)
    first, again, other = (p.shuffle_patches(images, (2, 3), 1, seed) for seed in (3, 3, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 7


@pytest.mark.parametrize(("fill", "values"), [("mean", (0, 0, 0)), ("black", (-2, -1, -3))])
def test_occlude_hides_the_given_share(fill, values):
    images = numbered(100) + 1
    preprocessing = Preprocessing((8, 15), (0.5, 0.25, 0.75), (0.25, 0.25, 0.25))
    hidden = p.occlude(images, (2, 3), 0.35, fill, preprocessing=preprocessing)
    patches, _ = p.to_patches(hidden, (2, 3))
    away = (patches == torch.tensor(values).view(3, 1, 1)).all(dim=(2, 3, 4))  # (100, 20)
    assert (away.sum(dim=1) == 7).all()
    assert torch.equal(patches[~away], p.to_patches(images, (2, 3))[0][~away])
    assert ((away.float().mean(dim=0) - 0.35).abs() < 0.2).all()


def test_perturbations_refuse_bad_arguments():
    images = numbered(2)
    for refused, words in ((lambda: p.occlude(images, (2, 3), 1.5), "share 1.5"),
                           (lambda: p.occlude(images, (2, 3), 0.5, "white"), "fill 'white'"),
                           (lambda: p.occlude(images, (2, 3), 0.5, "black"), "pass the preprocessing of a loader"),
                           (lambda: p.shuffle_patches(images, 4), "not divisible by patch_size")):
        with pytest.raises(InputError, match=words):
            refused()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_shuffle_patches_does_not_affect_a_vit_without_positions(pool):
    torch.manual_seed(0)
    options = dict(img_size=(14, 15), patch_size=(7, 5), n_classes=5, embed_dim=22, depth=2, n_heads=2, pool=pool)
    images = torch.randn(13, 3, 14, 15)
    shuffled = p.shuffle_patches(images, (7, 5))
    assert not torch.equal(images, shuffled)
    without, learned = VisionTransformer(**options, position="none"), VisionTransformer(**options)
    nn.init.normal_(learned.pos_embed)
    assert torch.allclose(without(images), without(shuffled), atol=1e-5)
    assert not torch.allclose(learned(images), learned(shuffled), atol=1e-2)


def test_accuracy_curve_counts_right_answers():
    images, labels = dots((4, 5), (3, 6), (5, 4), (5, 4)), torch.tensor([5, 6, 4, 0])
    change = lambda images, share: crop_and_flip(images, *(torch.full((4,), n) for n in (0, int(-share))),  # noqa: E731
                                                 torch.zeros(4, dtype=torch.bool))
    assert p.accuracy_curve(Brightest(), images, labels, change, (0, 1)) == [3, 0]


def test_cue_choices_counts_outline_texture_and_neither():
    choices = p.cue_choices(torch.tensor([0, 1, 1, 2, 4]), torch.tensor([0, 1, 0, 2, 1]), torch.tensor([1, 2, 1, 3, 0]))
    assert choices == dict(outline=3, texture=1, neither=1)
    assert p.shape_bias(choices) == 0.75
    assert p.shape_bias(dict(outline=0, texture=0, neither=5)) != p.shape_bias(dict(outline=0, texture=0, neither=5))
    with pytest.raises(InputError, match="agree in 1 images"):
        p.cue_choices(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0, 2]))
