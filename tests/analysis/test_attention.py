"""Attention maps and how far they look, against the weights and by hand."""

import math

import numpy as np
import pytest
import torch
from measured_models import GRID, PATCH, N, convnet, images_for, vit
from torch import nn

from vit_bridge.analysis.attention import (
    attention_distance,
    attention_rows,
    cls_attention_grid,
    in_parts,
    mean_distances,
    patches_of,
    position_similarity,
    select_attention,
    uniform_attention_distance,
)
from vit_bridge.analysis.capture import attention_maps
from vit_bridge.models.adapters import adapt
from vit_model import InputError


def test_attention_maps_are_uniform_for_zero_queries():
    model = vit()
    for block in model.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
    maps = attention_maps(model, images_for(model))
    assert maps.shape == (3, 3, 2, N, N)
    assert torch.equal(maps, torch.full_like(maps, 1 / N))


def test_attention_maps_match_the_weights_by_hand():
    model = vit().train()
    images = images_for(model)
    maps = attention_maps(model, images)
    model.eval()
    with torch.no_grad():
        x = torch.cat([model.cls_token.expand(3, -1, -1), model.patch_embed(images)], dim=1) + model.pos_embed
        for block, layer in zip(model.blocks, maps, strict=True):
            y = block.norm1(x)
            for head in range(2):
                rows = slice(11 * head, 11 * head + 11)
                q = y @ block.attn.qkv.weight[:22][rows].T + block.attn.qkv.bias[:22][rows]
                k = y @ block.attn.qkv.weight[22:44][rows].T + block.attn.qkv.bias[22:44][rows]
                by_hand = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(11), dim=-1)
                torch.testing.assert_close(layer[:, head], by_hand)
            x = block(x)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(3, 3, 2, N))


def test_select_attention_picks_layer_and_head():
    maps = torch.rand(5, 3, 2, N, N)
    assert torch.equal(select_attention(maps, 1, 1), maps[1, :, 1])
    assert torch.equal(select_attention(maps, -5, -2), maps[0, :, 0])
    torch.testing.assert_close(select_attention(maps), maps[4].mean(dim=1))


@pytest.mark.parametrize(("layer", "head", "text"), [(5, 0, "layer_idx 5 .* 0 to 4"), (-6, 0, "layer_idx -6"),
                                                     (0, 2, "head_idx 2 .* 0 to 1"), (0.5, 0, "layer_idx 0.5")])
def test_select_attention_refuses_indices_out_of_range(layer, head, text):
    with pytest.raises(InputError, match=text):
        select_attention(torch.rand(5, 3, 2, N, N), layer, head)


def test_cls_attention_grid_is_the_first_row_without_cls():
    maps = torch.arange(2 * N * N, dtype=torch.float32).reshape(2, N, N)
    grid = cls_attention_grid(maps, GRID)
    assert torch.equal(grid[1], torch.tensor([[50.0, 51, 52], [53, 54, 55]]))
    with pytest.raises(InputError, match=r"7 tokens .* 3x3"):
        cls_attention_grid(maps, (3, 3))


def test_position_similarity_is_the_cosine_between_positions():
    model = vit()
    similarity = position_similarity(model)
    assert similarity.shape == (*GRID, *GRID)
    a, b = model.pos_embed[0, 1 + 3], model.pos_embed[0, 1 + 2]
    assert similarity[1, 0, 0, 2].item() == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=1e-6)
    for model in (vit(position="none"), convnet()):
        with pytest.raises(InputError, match="no position embeddings"):
            position_similarity(model)


def test_attention_maps_refuse_a_convnet():
    with pytest.raises(InputError, match="ConvNet has no attention"):
        attention_maps(convnet(), torch.zeros(1, 3, 29, 29))


def test_cls_attention_grid_averages_patches_for_mean_pooling():
    maps = torch.rand(5, 2 + 6, 2 + 6).softmax(dim=-1)
    grid = cls_attention_grid(maps, (2, 3), 2, "mean")
    for i in range(5):
        expected = torch.stack([maps[i, patch, 2:] for patch in range(2, 8)]).mean(dim=0).view(2, 3)
        torch.testing.assert_close(grid[i], expected)
    uniform = cls_attention_grid(torch.full((8, 8), 1 / 8), (2, 3), 2, "mean")
    torch.testing.assert_close(uniform, torch.full((2, 3), 1 / 8))


# ---- How far attention looks ------------------------------------------------------------------------------


def test_attention_distance_of_uniform_attention_is_its_closed_form():
    for grid, patch, expected in (((14, 14), 16, 116.49), ((8, 8), 4, 16.55)):
        n = grid[0] * grid[1]
        assert uniform_attention_distance(grid, patch) == pytest.approx(expected, abs=5e-3)
        maps = torch.full((2, 3, 5, n + 1, n + 1), 1 / (n + 1))
        uniform = uniform_attention_distance(grid, patch)
        assert attention_distance(maps, grid, patch).flatten().tolist() == pytest.approx([uniform] * 10)
        counted = attention_distance(maps, grid, patch, renormalise=False)
        assert counted.flatten().tolist() == pytest.approx([uniform * n / (n + 1)] * 10)


def test_attention_distance_is_that_of_the_patches_looked_at():
    """Each patch of 2 x 3 looks at its right neighbour, or stays where there is none; a quarter goes to CLS."""
    maps = torch.zeros(1, 1, 1, 7, 7)
    for patch in range(6):
        maps[0, 0, 0, 1 + patch, 1 + (patch if patch % 3 == 2 else patch + 1)] = 0.75
    maps[..., 0] += 0.25
    maps[0, 0, 0, 0, 0] = 100  # what CLS looks at does not matter
    assert attention_distance(maps, GRID, PATCH).item() == pytest.approx(5 * 4 / 6)
    assert attention_distance(maps, GRID, PATCH, renormalise=False).item() == pytest.approx(0.75 * 5 * 4 / 6)


def test_attention_distance_matches_a_plain_numpy_program():
    """Again, in numpy, patch by patch."""
    model = vit(n_registers=2)
    maps = attention_maps(model, images_for(model))
    ours = attention_distance(maps, GRID, PATCH, model.n_prefix_tokens).numpy()
    A, (rows, columns), (height, width) = maps.double().numpy(), GRID, PATCH
    places = [(row * height, column * width) for row in range(rows) for column in range(columns)]
    expected = np.zeros(A.shape[:1] + A.shape[2:3])
    for layer in range(A.shape[0]):
        for head in range(A.shape[2]):
            total = 0.0
            for image in range(A.shape[1]):
                for i, (y, x) in enumerate(places):
                    weights = A[layer, image, head, 3 + i, 3:]
                    weights = weights / weights.sum()
                    total += sum(w * np.hypot(y - v, x - u) for w, (v, u) in zip(weights, places, strict=True))
            expected[layer, head] = total / (A.shape[1] * len(places))
    assert np.abs(ours - expected).max() < 1e-9


def test_attention_distance_refuses_maps_that_do_not_fit():
    with pytest.raises(InputError, match="maps over 7 tokens do not fit"):
        attention_distance(torch.ones(1, 1, 1, 7, 7), GRID, PATCH, 2)


@pytest.mark.parametrize("options", [{}, dict(pool="mean"), dict(n_registers=2)])
def test_attention_rows_are_those_of_the_whole_maps(options, monkeypatch):
    model = vit(**options)
    images, first = images_for(model), 1 + options.get("n_registers", 0)
    maps = attention_maps(model, images)  # (L, B, H, N, N)
    monkeypatch.setattr("vit_bridge.analysis.attention.PART", 2 * maps.shape[-1]**2)  # two images at a time
    assert [len(part) for part in in_parts(adapt(model), images)] == [2, 1]
    rows = attention_rows(model, images)
    expected = maps[..., first:, :].mean(dim=3) if options.get("pool") else maps[..., 0, :]
    torch.testing.assert_close(rows, expected)
    grid = patches_of(rows, GRID, first)
    torch.testing.assert_close(grid, cls_attention_grid(maps, GRID, first, options.get("pool", "cls")))
    torch.testing.assert_close(attention_rows(model, images, (1, -1)), maps[..., first + 2 * GRID[1] - 1, :])
    for renormalise in (True, False):
        layout = GRID, PATCH, first, renormalise
        torch.testing.assert_close(mean_distances(model, images, renormalise), attention_distance(maps, *layout))


@pytest.mark.parametrize(("patch", "words"), [
    ((2, 0), "patch 2 is out of range"), ((0, 1, 2), "is not a position"),
    (3, r"patch 3 is not a position; expected \(row, column\), such as \(0, 2\)")])
def test_attention_rows_refuses_a_patch_that_is_not_there(patch, words):
    with pytest.raises(InputError, match=words):
        attention_rows(vit(), images_for(vit()), patch)
