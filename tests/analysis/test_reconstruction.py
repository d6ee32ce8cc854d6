"""The controls of a reconstruction: means and interpolation against their definitions."""

import pytest
import torch

from vit_bridge.analysis.reconstruction import fill_by_interpolation, fill_with_mean
from vit_bridge.errors import InputError


def some_hidden(B=2, H=12, W=16, share=0.6):
    hidden = torch.rand(B, H // 4, W // 4, generator=torch.Generator().manual_seed(0)) < share
    hidden[:, 0, 0] = False
    return hidden.repeat_interleave(4, 1).repeat_interleave(4, 2)


def test_mean_is_the_mean_of_the_visible_pixels_of_each_image_and_channel():
    images, hidden = torch.randn(2, 3, 12, 16).double(), some_hidden()
    filled = fill_with_mean(images, hidden)
    for i in range(2):
        for c in range(3):
            assert torch.equal(filled[i, c][~hidden[i]], images[i, c][~hidden[i]])
            torch.testing.assert_close(filled[i, c][hidden[i]],
                                       images[i, c][~hidden[i]].mean().expand(int(hidden[i].sum())))


def test_interpolation_is_the_mean_of_the_neighbours_and_keeps_visible_pixels():
    images, hidden = torch.randn(2, 3, 12, 16).double(), some_hidden()
    filled = fill_by_interpolation(images, hidden, tolerance=1e-12)
    inside = hidden[:, None].expand_as(images)
    assert torch.equal(filled[~inside], images[~inside])
    for b, c, y, x in inside.nonzero().tolist():
        near = [filled[b, c, v, u] for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
                if 0 <= v < 12 and 0 <= u < 16]
        assert abs(filled[b, c, y, x] - sum(near) / len(near)) < 1e-9


def test_interpolation_reproduces_a_linear_ramp():
    rows, columns = torch.arange(12.0).double()[:, None], torch.arange(16.0).double()
    ramp = (0.3 * rows - 0.2 * columns)[None, None].repeat(1, 3, 1, 1)
    hidden = torch.zeros(1, 12, 16, dtype=torch.bool)
    hidden[:, 2:10, 3:13] = True  # away from the border, where a ramp is no mean of its neighbours
    torch.testing.assert_close(fill_by_interpolation(ramp, hidden, tolerance=1e-12), ramp, rtol=0, atol=1e-9)


@pytest.mark.parametrize("fill", [fill_with_mean, fill_by_interpolation])
def test_nothing_hidden_changes_nothing_and_all_hidden_is_refused(fill):
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(fill(images, torch.zeros(1, 8, 8, dtype=torch.bool)), images)
    with pytest.raises(InputError, match="all pixels of an image are hidden"):
        fill(images, torch.ones(1, 8, 8, dtype=torch.bool))
    with pytest.raises(InputError, match=r"hidden is torch.float32 \(1, 8, 8\); expected torch.bool \(1, 8, 8\)"):
        fill(images, torch.zeros(1, 8, 8))
