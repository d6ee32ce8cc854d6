import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from vit_bridge.data.augmentation import (
    Augmentation,
    EpochAugmentation,
    Mixing,
    _hide_square,
    crop_and_flip,
    train_transform,
)
from vit_bridge.data.datasets import DatasetInfo
from vit_bridge.data.loaders import MemoryLoader
from vit_bridge.preprocessing import Preprocessing
from vit_model import InputError


def test_crop_and_flip_matches_one_image_at_a_time():
    images = torch.randint(0, 256, (81 * 2, 3, 10, 10), dtype=torch.uint8)
    top, left, flip = (grid.flatten() for grid in torch.meshgrid(
        torch.arange(-4, 5), torch.arange(-4, 5), torch.tensor([0, 1]), indexing="ij"))
    flip = flip.bool()
    changed = crop_and_flip(images, top, left, flip)
    for i in range(len(images)):
        padded = torch.from_numpy(np.pad(images[i].numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect"))
        window = padded[:, 4 + top[i] : 14 + top[i], 4 + left[i] : 14 + left[i]]
        assert torch.equal(changed[i], window.flip(2) if flip[i] else window)


def test_train_transform_crops_flips_jitters_and_autoaugments():
    steps = train_transform(Preprocessing(64, (0.5,) * 3, (0.5,) * 3)).transforms
    assert [type(step).__name__ for step in steps[:4]] == ["RandomResizedCrop", "RandomHorizontalFlip", "ColorJitter",
                                                           "AutoAugment"]


def draws(augmentation, n=1000, height=12, width=10, seed=3, epoch=0):
    return EpochAugmentation(augmentation, n, height, width, seed, epoch)


def test_epoch_augmentation_depends_on_seed_and_epoch():
    kinds = [draws(Augmentation(), seed=seed, epoch=epoch) for seed, epoch in ((3, 0), (3, 0), (3, 1), (4, 0))]
    assert torch.equal(kinds[0].top, kinds[1].top)
    assert torch.equal(kinds[0].centre, kinds[1].centre)
    for other in kinds[2:]:
        for name in ("top", "left", "flip", "centre"):
            assert not torch.equal(getattr(kinds[0], name), getattr(other, name)), name


def test_epoch_augmentation_shift_is_a_share_of_each_side():
    drawn = draws(Augmentation(shift=0.25), height=12, width=8)
    assert drawn.top.unique().tolist() == list(range(-3, 4))
    assert drawn.left.unique().tolist() == list(range(-2, 3))
    assert not draws(Augmentation(shift=0)).top.any()


def test_epoch_augmentation_alternating_flip_shows_both_sides():
    flips = [draws(Augmentation(flip="alternating"), epoch=epoch).flip for epoch in range(4)]
    assert torch.equal(flips[0], ~flips[1])
    assert torch.equal(flips[0], flips[2])
    assert torch.equal(flips[1], flips[3])
    assert 0.45 < flips[0].float().mean() < 0.55
    assert not draws(Augmentation(flip="none")).flip.any()


def test_hide_square_matches_one_image_at_a_time():
    n, height, width, side = 300, 12, 12, 5
    centre = torch.rand(2, n, generator=torch.Generator().manual_seed(0))
    images = _hide_square(torch.ones(n, 3, height, width), centre, side / 12)
    sizes = set()
    for image, (row, column) in zip(images, centre.T.tolist(), strict=True):
        expected = torch.ones(3, height, width)
        top, left = int(row * height) - side // 2, int(column * width) - side // 2
        expected[:, max(0, top) : top + side, max(0, left) : left + side] = 0
        assert torch.equal(image, expected)
        sizes.add(int((expected[0] == 0).sum()))
    assert max(sizes) == side**2
    assert min(sizes) == 3 * 3


def test_hide_square_hides_a_share_of_each_side():
    images = _hide_square(torch.ones(1, 1, 8, 16), torch.full((2, 1), 0.5), 0.5)
    assert torch.equal((images[0, 0] == 0).nonzero().amin(0), torch.tensor([2, 4]))
    assert int((images == 0).sum()) == 4 * 8


def test_memory_loader_cutout_fills_with_the_mean():
    facts = DatasetInfo("folder", Preprocessing(16, (0.2,) * 3, (0.5,) * 3, class_names=["a"]))
    white = torch.full((50, 3, 16, 16), 255, dtype=torch.uint8)
    loader = MemoryLoader(white, torch.zeros(50), facts, 50, 0, True, augmentation=Augmentation(cutout=0.5))
    images, _ = next(iter(loader))
    assert images.unique().tolist() == pytest.approx([0.0, 1.6])
    assert (images[:, 0] == 0).sum((1, 2)).min() >= 16
    assert (images[:, 0] == 0).sum((1, 2)).max() == 64
    plain, _ = next(iter(MemoryLoader(white, torch.zeros(50), facts, 50, augmentation=Augmentation(cutout=0.5))))
    assert (plain != 0).all()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_mixes_images_and_labels_alike(kind):
    torch.manual_seed(2)
    labels = torch.arange(7) % 5
    images = labels.float().view(7, 1, 1, 1).expand(7, 3, 8, 8).clone()  # an image is as bright as its label
    mixed, answers = Mixing(kind, 5, alpha=1.0)(images, labels)  # (7, 3, 8, 8), (7, 5)
    torch.testing.assert_close(answers.sum(1), torch.ones(7))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), answers @ torch.arange(5.0))
    assert (answers > 0).sum(1).max() == 2
    if kind == "cutmix":
        assert torch.equal(mixed, mixed.round())  # every pixel is of one image


def test_mixing_uses_the_usual_alphas():
    assert isinstance(Mixing("mixup", 3).transform, v2.MixUp)
    assert Mixing("mixup", 3).transform.alpha == 0.2
    assert isinstance(Mixing("cutmix", 3).transform, v2.CutMix)
    assert Mixing("cutmix", 3).transform.alpha == 1.0


@pytest.mark.parametrize("arguments", [dict(shift=0.6), dict(shift=-0.1), dict(flip="often"), dict(cutout=3.0),
                                       dict(cutout="half")])
def test_augmentation_names_a_wrong_value(arguments):
    (name, value), = arguments.items()
    with pytest.raises(InputError, match=f"{name} {value!r}"):
        Augmentation(**arguments)


def test_mixing_names_a_wrong_kind():
    with pytest.raises(InputError, match="mixing 'none' is unknown; choose one of: mixup, cutmix"):
        Mixing("none", 3)
