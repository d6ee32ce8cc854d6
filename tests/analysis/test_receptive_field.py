"""Receptive fields against closed forms, windows counted by hand, and finite differences."""

import math

import numpy as np
import pytest
import torch
from measured_models import GRID, PATCH, SIZE, convnet, hybrid, images_for, vit
from other_models import BUILDERS, shared
from torch import nn

from vit_bridge.analysis.receptive_field import (
    channel_weights,
    radius_holding,
    receptive_field,
    theoretical_receptive_field,
    unit_centre,
)
from vit_bridge.models.adapters import adapt
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.convnext import ConvNeXt
from vit_bridge.models.swin import SwinTransformer
from vit_model import InputError


def test_receptive_field_grows_from_one_patch_to_everything():
    model = vit()
    images = images_for(model)
    field = receptive_field(model, images, 0)
    assert field.shape == SIZE
    inside = torch.zeros(SIZE, dtype=torch.bool)
    inside[7:14, 5:10] = True  # the patch at (1, 1) of 2 x 3
    assert torch.equal(field > 0, inside)
    kernel = model.patch_embed.proj.weight  # (D, C, *PATCH)
    by_hand = torch.einsum("d,dchw->chw", channel_weights(kernel[:, 0, 0, 0]), kernel).abs().mean(dim=0).double()
    torch.testing.assert_close(field[7:14, 5:10], by_hand / by_hand.sum(), rtol=1e-5, atol=1e-9)
    assert unit_centre(model, SIZE, 0) == (10.0, 7.0)
    for depth in (1, None):
        field = receptive_field(model, images, depth)
        assert (field > 0).all()
        assert field.sum().item() == pytest.approx(1, abs=1e-12)
    assert theoretical_receptive_field(model, 0) == PATCH
    assert theoretical_receptive_field(model) == SIZE


def test_receptive_field_without_attention_stays_one_patch():
    model = vit()
    for block in model.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    for depth in range(4):
        rows, columns = receptive_field(model, images_for(model), depth).nonzero().T
        assert (rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()) == (7, 13, 5, 9)


def test_unit_centre_counts_the_units_of_a_pooled_convnet():
    """Maps of 31, 15, 7 and 3 units, of which the ones at 15, 7, 3 and 1 are taken."""
    model = ConvNet(32, 3, 5, (5, 7, 11), (1, 1, 1), 1, "pooled")
    assert [unit_centre(model, (32, 32), depth) for depth in range(4)] == [(15.5,) * 2, (15,) * 2, (14,) * 2,
                                                                           (12,) * 2]


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
def test_receptive_field_of_a_convnet_fits_its_window(stem_stride):
    size = {1: (73, 61), 2: (73, 61), 4: (257, 139)}[stem_stride]
    model = convnet(stem_stride=stem_stride, img_size=size)
    images = images_for(model, 2)
    for depth in range(4):
        field = receptive_field(model, images, depth)
        assert field.sum().item() == pytest.approx(1, abs=1e-12)
        centre, window = unit_centre(model, size, depth), theoretical_receptive_field(model, depth)
        for axis, places in enumerate(field.nonzero().T):
            first, last = centre[axis] - (window[axis] - 1) / 2, centre[axis] + (window[axis] - 1) / 2
            # Nothing outside the window. Where no ReLU is dead on the way, all of it: so the centre is right.
            assert places.min().item() >= max(0, first)
            assert places.max().item() <= min(size[axis] - 1, last)
            if depth == 0:
                assert (places.min().item(), places.max().item()) == (first, last)


def test_theoretical_receptive_field_matches_windows_by_hand():
    # Stem 3 x 3: 3. Stage 1, two 3 x 3 at stride 1: 3 + 2 + 2 = 7. Stage 2, stride 2 in its first convolution:
    # 7 + 2 + 4 = 13, second block + 4 + 4 = 21. Stage 3: 21 + 4 + 8 = 33.
    assert [theoretical_receptive_field(convnet(), i) for i in range(4)] == [(3, 3), (7, 7), (21, 21), (33, 33)]
    # ResNet-18: 435 is the number of Araujo et al. 2019, Table 1.
    resnet = convnet(widths=(2, 2, 2, 2), depths=(2, 2, 2, 2), stem_stride=4)
    assert theoretical_receptive_field(resnet) == (435, 435)
    assert theoretical_receptive_field(hybrid(), 0) == (7, 7)
    assert theoretical_receptive_field(hybrid(), 1) == (12, 20)


def test_receptive_field_of_a_hybrid_stem_is_local():
    model = hybrid()
    rows, columns = receptive_field(model, images_for(model), 0).nonzero().T
    row, column = unit_centre(model, (12, 20), 0)
    assert (row, column) == (4.0, 8.0)
    assert (rows.min().item(), rows.max().item()) == (1, 7)
    assert (columns.min().item(), columns.max().item()) == (5, 11)


@pytest.mark.parametrize("depth", [-1, 4, 1.0, "last"])
def test_receptive_field_refuses_a_depth_out_of_range(depth):
    model = vit()
    with pytest.raises(InputError, match="has depths 0 to 3"):
        receptive_field(model, images_for(model), depth)


def test_receptive_field_refuses_zero_gradients():
    model = vit()
    nn.init.zeros_(model.patch_embed.proj.weight)
    with pytest.raises(InputError, match="zero at every pixel"):
        receptive_field(model, images_for(model), 0)


@pytest.mark.parametrize("name", [name for name in BUILDERS if "eager" not in name])
def test_receptive_field_of_other_libraries_matches_ours(name, tmp_path):
    theirs, ours, images = shared(name, tmp_path)
    for depth in (0, 1, None):
        field = receptive_field(theirs, images, depth)
        torch.testing.assert_close(field, receptive_field(ours, images, depth), rtol=1e-8, atol=1e-12)
        assert unit_centre(theirs, images.shape[2:], depth) == unit_centre(ours, images.shape[2:], depth)
        assert theoretical_receptive_field(theirs, depth) == theoretical_receptive_field(ours, depth)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(receptive_field(theirs, images), field)
    with pytest.raises(InputError, match=r"\Agot images of shape[^\n]*\Z"):
        receptive_field(theirs, images[:, :1])


def test_receptive_field_centres_on_the_given_images():
    model = vit()
    model.any_size = True
    images = torch.randn(2, 3, 28, 10, generator=torch.Generator().manual_seed(1))  # 4 x 2 patches
    rows, columns = receptive_field(model, images, 0).nonzero().T
    assert (rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()) == (14, 20, 5, 9)
    nn.init.zeros_(model.blocks[0].attn.proj.weight)  # so that a token sees its own patch after the block too
    rows, columns = receptive_field(model, images, 1).nonzero().T
    assert (rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()) == (14, 20, 5, 9)
    assert unit_centre(model, (28, 10), 1) == (17.0, 7.0)


def test_adapt_refuses_an_unknown_model():
    with pytest.raises(InputError, match=r"class Linear is not supported; expected a model of vit_bridge\.models"):
        adapt(nn.Linear(3, 7))


def test_radius_holding_finds_the_radius_of_a_share():
    field = torch.zeros(11, 13, dtype=torch.float64)
    field[5, 6], field[5, 9], field[1, 9], field[5, 0] = 0.5, 0.3, 0.15, 0.05
    for share, radius in ((0.5, 0), (0.51, 3), (0.8, 3), (0.9, 5), (0.96, 6), (1.0, 6)):
        assert radius_holding(field, share) == pytest.approx(radius)
    assert radius_holding(field, 0.5, centre=(5, 9)) == pytest.approx(3)
    assert radius_holding(7 * field, 0.9) == pytest.approx(5)
    even = torch.full((401, 401), 1 / 401**2)
    assert radius_holding(even, 0.5) == pytest.approx(401 * math.sqrt(0.5 / math.pi), abs=1)
    for share in (0, 1.01):
        with pytest.raises(InputError, match="share"):
            radius_holding(field, share)


def test_receptive_field_matches_finite_differences():
    """Again, in numpy: each pixel is moved a little both ways, and the unit in the centre read off."""
    for model, depth in ((vit(dropout=0.0), 1), (convnet(img_size=9, widths=(3, 5), depths=(1, 1)), 2)):
        model = model.double().eval()
        images = images_for(model, 2).double()
        height, width = images.shape[2:]

        def unit(pixels, model=model, depth=depth):
            outputs = []
            hook = adapt(model).layers[depth].register_forward_hook(lambda module, args, output: outputs.append(output))
            with torch.no_grad():
                model.forward_features(torch.from_numpy(pixels)[None])
            hook.remove()
            features = outputs[0][0].numpy()
            if features.ndim == 2:  # tokens (1 + rows * columns, D)
                rows, columns = GRID
                features = features[1 + rows // 2 * columns + columns // 2]  # (D)
            else:
                features = features[:, features.shape[1] // 2, features.shape[2] // 2]  # (D)
            return features @ channel_weights(torch.from_numpy(features)).numpy()

        field = np.zeros((height, width))
        for image in images.numpy():
            for place in np.ndindex(*image.shape):
                step = np.zeros_like(image)
                step[place] = 1e-5
                field[place[1:]] += abs(unit(image + step) - unit(image - step)) / 2e-5
        expected = field / field.sum()
        ours = receptive_field(model, images, depth).numpy()
        assert np.abs(ours - expected).max() < 1e-6


def test_receptive_field_is_measured_after_a_new_layer_norm():
    """The plain sum of its channels is constant: the gradient would be zero, or rounding noise."""
    for model in (ConvNeXt(img_size=16, n_classes=2, widths=(6, 12), depths=(1, 1), stem_stride=4),
                  SwinTransformer(16, 4, 3, 2, 6, (1, 1), (1, 2), 2)):
        field = receptive_field(model.eval(), torch.randn(2, 3, 16, 16), 0)
        if adapt(model).windowed:  # its norm comes after the projection
            assert (field > 0).sum() == 16
        else:
            unit = field.unflatten(0, (4, 4)).unflatten(2, (4, 4)).sum(dim=(1, 3))  # of 4 x 4 patches
            assert unit[2, 2].item() == pytest.approx(1, abs=1e-9)
            assert field[8:12, 8:12].min() > 0
