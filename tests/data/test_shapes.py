import pytest
import torch

from vit_bridge.data.shapes import COLOURS, EDGES, SHAPES, TEST_START, TEXTURES, make_shapes
from vit_model import InputError


def test_make_shapes_images_depend_on_their_number_alone():
    whole = make_shapes(700, 32)
    for start, n in ((0, 1), (3, 300), (511, 2), (699, 1)):
        part = make_shapes(n, 32, start=start)
        for name in ("images", "labels", "textures", "colours"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[start : start + n])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(make_shapes(700, 32).images, whole.images)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(make_shapes(700, 32, seed=1).textures, whole.textures)
    assert make_shapes(0).images.shape == (0, 3, 32, 32)


def test_make_shapes_images_match_the_pinned_ones():
    blocks = make_shapes(10, 32, seed=7).images.float().unfold(2, 8, 8).unfold(3, 8, 8).mean((1, 4, 5))  # (10, 4, 4)
    pinned = [
        [54, 123, 202, 71], [88, 151, 92, 104], [177, 136, 67, 176], [78, 201, 156, 68], [182, 106, 95, 181],
        [88, 174, 178, 88], [62, 187, 162, 62], [67, 208, 145, 66], [88, 87, 168, 88], [84, 128, 86, 86],
    ]
    assert (blocks.flatten(1)[:, [0, 5, 10, 15]] - torch.tensor(pinned)).abs().max() <= 1


def test_make_shapes_shows_the_same_scene_when_larger():
    small, large = make_shapes(20, 32).images.float(), make_shapes(20, 96).images.float()
    shrunk = torch.nn.functional.avg_pool2d(large, 3)
    assert (shrunk - small).abs().mean() < 12  # noise, and what a coarse grid does to edges and textures


def test_make_shapes_draws_shape_texture_and_colour_independently():
    drawn = make_shapes(20_000, 8)
    n = {"labels": len(SHAPES), "textures": len(TEXTURES), "colours": len(COLOURS)}
    assert drawn.labels.bincount().tolist() == [2000] * 10
    for first, second in (("labels", "textures"), ("labels", "colours"), ("textures", "colours")):
        table = torch.zeros(n[first], n[second])
        table.index_put_((getattr(drawn, first), getattr(drawn, second)), torch.ones(20_000), accumulate=True)
        expected = 20_000 / table.numel()
        chi_squared = ((table - expected).square() / expected).sum()
        freedom = table.numel() - 1
        assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5, (first, second)


def test_make_shapes_takes_chosen_factors_and_keeps_the_rest():
    drawn = make_shapes(60, 32)
    assert torch.equal(make_shapes(60, shape=drawn.labels, texture=drawn.textures.tolist()).images, drawn.images)
    stars = make_shapes(60, shape="star", texture=TEXTURES.index("dots"))
    assert set(stars.labels.tolist()) == {SHAPES.index("star")}
    assert set(stars.textures.tolist()) == {TEXTURES.index("dots")}
    assert torch.equal(stars.colours, drawn.colours)
    repainted = make_shapes(60, texture=(drawn.textures + 1) % len(TEXTURES))
    changed = (repainted.images != drawn.images).any(1).float().mean((1, 2))
    assert (changed < 0.6).all()  # only inside the shape
    assert (changed > 0).float().mean() > 0.9
    red = make_shapes(200, 32, colour="red", shape="circle", texture="plain").images.float()
    blue = make_shapes(200, 32, colour="blue", shape="circle", texture="plain").images.float()
    assert (red - blue)[:, 0].mean() > 5 > -5 > (red - blue)[:, 2].mean()


def test_shapes_differ_and_are_their_own_mirror_images():
    axis = torch.linspace(-1.1, 1.1, 221)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    inside = {name: edge(u, v) < 0 for name, edge in EDGES.items()}
    for name, mask in inside.items():
        assert 0.05 < mask.float().mean() < 0.7, name
        assert not (mask & (u.square() + v.square() > 1.02)).any(), name
        assert (mask != mask.flip(1)).float().mean() < 0.01 or (mask != mask.flip(0)).float().mean() < 0.01, name
    for name, mask in inside.items():  # share of pixels at each distance from the centre: turning keeps it
        for other, other_mask in inside.items():
            if name < other:
                rings = ((u.square() + v.square()).sqrt() * 10).long()
                parts = (mask.float(), other_mask.float(), torch.ones(221, 221))
                one, two, all_of = (torch.zeros(20).index_add_(0, rings.flatten(), part.flatten()) for part in parts)
                assert ((one - two) / all_of.clamp(min=1)).abs().max() > 0.15, (name, other)


def test_make_shapes_teaches_a_linear_classifier_little():
    train, test = make_shapes(4000, 16), make_shapes(1000, 16, start=TEST_START)
    mean = train.images.float().mean(0).flatten()
    x, y = ((drawn.images.float().flatten(1) - mean) / 255 for drawn in (train, test))
    targets = torch.nn.functional.one_hot(train.labels, 10).float()
    weights = torch.linalg.solve(x.T @ x + 300 * torch.eye(x.shape[1]), x.T @ (targets - 0.1))
    assert ((y @ weights).argmax(1) == test.labels).float().mean() < 0.30


@pytest.mark.parametrize("wrong", [{"shape": "blob"}, {"texture": 5}, {"colour": -1}, {"shape": [0, 1]}, {"shape": 1.5},
                                   {"shape": ["star"] * 3}, {"n_images": -1}, {"img_size": 4}, {"seed": 0.5}])
def test_make_shapes_refuses_bad_arguments(wrong):
    with pytest.raises(InputError) as caught:
        make_shapes(**{"n_images": 3, **wrong})
    message = str(caught.value)
    assert "\n" not in message
    assert next(iter(wrong)) in message
    assert repr(next(iter(wrong.values()))) in message
