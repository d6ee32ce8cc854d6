"""Attention within windows: the maps, rows, groups and distances of Swins of four libraries, by brute force."""

import math

import pytest
import torch
import torchvision
from other_models import BUILDERS, SWINS, shared, swin_images
from torch import nn

from vit_bridge.analysis.attention import (
    attention_rows,
    bias_by_offset,
    block_names,
    mean_distances,
    rows_by_block,
    token_similarity,
    uniform_distances,
    window_groups,
)
from vit_bridge.analysis.capture import attention_maps, capture
from vit_bridge.analysis.windows import capture_windows, window_distances, window_rows
from vit_bridge.models.adapters import adapt
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.deit import DistilledViT
from vit_bridge.models.relative import relative_position_index
from vit_bridge.models.swin import SwinTransformer
from vit_model import InputError, VisionTransformer


def whole_maps_by_hand(block, attention, x):
    """Softmax over the whole map (h, w), with the bias of each offset inside a window and -inf outside it."""
    h, w = x.shape[1:3]
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    shift, window = block.shift, block.window
    # In the coordinates of the unrolled map, borders of windows lie at shift + a multiple of the window.
    cells = torch.stack([(rows - shift[0]).div(window[0], rounding_mode="floor"),
                         (columns - shift[1]).div(window[1], rounding_mode="floor")], dim=2).flatten(0, 1)  # (N, 2)
    together = (cells[:, None] == cells).all(dim=2)  # (N, N)
    offsets = [(one.flatten()[:, None] - one.flatten() + side - 1).clamp(0, 2 * side - 2)
               for one, side in zip((rows, columns), window, strict=True)]
    table = attention.relative_position_bias_table
    bias = table[offsets[0] * (2 * window[1] - 1) + offsets[1]].permute(2, 0, 1)  # (H, N, N)
    q, k, _ = attention.qkv(x.flatten(1, 2)).unflatten(2, (3, attention.n_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + bias
    return scores.masked_fill(~together, -math.inf).softmax(dim=3)  # (B, H, N, N)


def test_whole_maps_are_a_softmax_over_the_map_with_bias_and_mask():
    model, images = SWINS["ours"]().double(), swin_images("ours").double()
    inputs = []
    hooks = [block.norm1.register_forward_hook(lambda module, args, output: inputs.append(output))
             for stage in model.stages for block in stage.blocks]
    with torch.no_grad():
        kept, logits = capture_windows(model, images)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(logits, model(images))
        shifted = 0
        for one, block, x in zip(kept, adapt(model).blocks, inputs, strict=False):
            expected = whole_maps_by_hand(one, block.attn, x)
            torch.testing.assert_close(one.whole(), expected)
            shifted += any(one.shift)
    assert shifted


@pytest.mark.parametrize("name", SWINS)
def test_rows_groups_and_distances_follow_from_the_whole_maps(name):
    model, images = SWINS[name](), swin_images(name)
    kept, logits = capture_windows(model, images)
    with torch.no_grad():
        output = model(images)
    torch.testing.assert_close(logits, getattr(output, "logits", output), rtol=1e-4, atol=1e-5)
    adapter, patch = adapt(model), (3, 10)
    rows = window_rows(model, images, patch)
    by_block = rows_by_block(model, images, patch)
    distances = window_distances(model, images)
    torch.testing.assert_close(mean_distances(model, images), distances, equal_nan=True)
    assert len(kept) == len(rows) == len(distances) == len(block_names(adapter)) == 6
    assert any(any(one.shift) for one in kept)
    for one, row, same, found in zip(kept, rows, by_block, distances, strict=True):
        whole, (h, w) = one.whole(), one.size
        token = (patch[0] >> one.stage) * w + (patch[1] >> one.stage)
        torch.testing.assert_close(row.flatten(2), whole[:, :, token])
        torch.testing.assert_close(row.flatten(2), same.weights)
        assert (same.grid, same.token_size) == ((h, w), (4 << one.stage, 4 << one.stage))
        groups = window_groups(one).flatten()
        assert torch.equal(groups[:, None] == groups, whole[0].amax(dim=0) > 1e-30)  # masks of -100 leave 1e-44
        centres = torch.cartesian_prod(torch.arange(h), torch.arange(w)).double() * (4 << one.stage)  # (N, 2)
        apart = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
        expected = ((whole.double() * apart).sum(dim=3) / whole.double().sum(dim=3)).mean(dim=(0, 2))  # (H)
        torch.testing.assert_close(found[:len(expected)], expected)
        assert found[len(expected):].isnan().all()
    assert [len(one.isnan().nonzero()) for one in distances] == [3, 3, 2, 2, 0, 0]  # of 1, 2 and 4 heads


@pytest.mark.parametrize("size", [(60, 44), (52, 76)])
def test_padding_has_the_rest_of_the_weight(size):
    model = SWINS["torchvision"]()
    images = torch.randn(1, 3, *size)
    kept, _ = capture_windows(model, images)
    sums = [one.whole().sum(dim=3) for one in kept]
    assert min(one.min().item() for one in sums) < 0.9
    for one, total in zip(kept, sums, strict=True):
        inside = one.places < one.size[0] * one.size[1]  # (W, M)
        within = (one.maps * inside[:, None, None]).sum(dim=4)  # (B, W, H, M)
        torch.testing.assert_close(total.sum(), (within * inside[:, None]).sum())


@pytest.mark.parametrize("library", ["ours", "torchvision"])
def test_distances_leave_out_windows_of_padding_alone(library):
    """6 x 6 tokens in windows of 4, shifted by 2: two padded rows form a group of their own in the shifted windows."""
    torch.manual_seed(0)
    if library == "ours":
        model = SwinTransformer(img_size=24, patch_size=4, embed_dim=8, depths=(2,), n_heads=(2,), window_size=4)
    else:
        model = torchvision.models.SwinTransformer([4, 4], 8, [2], [2], [4, 4])
    kept, _ = capture_windows(model.eval(), torch.randn(2, 3, 24, 24))
    assert any((one.places == 36).any() and any(one.shift) for one in kept)
    centres = 4 * torch.cartesian_prod(torch.arange(6), torch.arange(6)).double()
    apart = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    for one in kept:
        whole = one.whole().double()
        expected = ((whole * apart).sum(dim=3) / whole.sum(dim=3)).mean(dim=2)  # (B, H)
        torch.testing.assert_close(one.distances(), expected)


def test_images_that_are_too_small_for_a_swin_of_transformers_are_refused_in_one_line():
    """Its windows shrink with the map, but its tables do not."""
    model = SWINS["transformers"]()  # three stages, patches of 4, windows of 7
    capture_windows(model, torch.randn(1, 3, 112, 112))
    with pytest.raises(InputError, match=r"\Agot images of 96x112 pixels[^\n]*6 tokens[^\n]*need 7; use [^\n]*\Z"):
        capture_windows(model, torch.randn(1, 3, 96, 112))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_windows_of_a_quantised_swin_are_its_own_within_the_rounding_of_its_activations():
    """Activations are rounded to 8 bits by their range in the batch, so a single image gives slightly other logits."""
    model = torch.ao.quantization.quantize_dynamic(SWINS["ours"](), {nn.Linear})
    assert window_distances(model, swin_images("ours", 3))[:, 0].isfinite().all()


def test_timm_rolls_its_map_before_it_pads_it():
    """The windows of 7 do not divide the 11 tokens of 44 pixels."""
    model = SWINS["timm"](side=44)
    images, captured = torch.randn(1, 3, 44, 44), []
    block = adapt(model).blocks[1]
    hook = block.attn.register_forward_pre_hook(lambda module, args, kwargs: captured.append((args, kwargs)),
                                                with_kwargs=True)
    kept, _ = capture_windows(model, images)
    hook.remove()
    one = kept[1]
    assert one.shift == (3, 3)
    assert not one.pads_first
    own = torch.arange(1, 122.0).view(1, 11, 11, 1).roll((-3, -3), (1, 2))  # timm's own order: roll, then pad
    own = nn.functional.pad(own, (0, 0, 0, 3, 0, 3)).view(2, 7, 2, 7).transpose(1, 2).reshape(4, 49)
    assert torch.equal(one.places, torch.where(own == 0, 122, own).long() - 1)
    x = captured[0][0][0]  # (W, M, D): the windows that timm attends within
    assert (x[own == 0] == 0).all()
    assert (x[own > 0] != 0).any(dim=1).all()


@pytest.mark.parametrize("name", SWINS)
def test_tables_by_offset_are_the_bias_between_two_tokens(name):
    """Entry (dy, dx) from the centre is the bias of a key dy rows below and dx columns to the right of the query."""
    model = SWINS[name]()
    table, window = adapt(model).tables[1]
    images = bias_by_offset(table, window)  # (H, 13, 13)
    bias = table[relative_position_index(window)].permute(2, 0, 1)  # (H, M, M), queries in rows
    for query, key in (((0, 0), (6, 1)), ((5, 2), (3, 6)), ((4, 4), (4, 4))):
        i, j = (row * window[1] + column for row, column in (query, key))
        shown = images[:, 6 + key[0] - query[0], 6 + key[1] - query[1]]
        torch.testing.assert_close(shown, bias[:, i, j])


@pytest.mark.parametrize("name", [name for name in BUILDERS if "BEiT" in name])
def test_tables_of_a_beit_by_offset_are_the_bias_of_its_scores(name, tmp_path):
    for model in shared(name, tmp_path)[:2]:
        (table, grid), *others = adapt(model).tables
        images = torch.randn(1, 3, *adapt(model).img_size).double()
        biases = capture(model, images, keep=lambda i, attended: attended.bias).maps  # L x (1, H, N, N)
        assert len(others) == (0 if "shared" in name else len(biases) - 1)
        shown, bias = bias_by_offset(table, grid), biases[0].float().view(-1, *[1 + grid[0] * grid[1]] * 2)[:, 1:, 1:]
        bias = bias.unflatten(2, grid).unflatten(1, grid)  # (H, rows, columns, rows, columns)
        for (i, j), (k, m) in (((0, 0), (1, 2)), ((1, 1), (0, 0)), ((1, 2), (1, 1))):
            torch.testing.assert_close(shown[:, grid[0] - 1 + k - i, grid[1] - 1 + m - j], bias[:, i, j, k, m])


def test_uniform_attention_has_the_distance_that_is_drawn():
    model, images = SWINS["ours"](), swin_images("ours")
    with torch.no_grad():
        for block in adapt(model).blocks:
            block.attn.qkv.weight.zero_()
            block.attn.relative_position_bias_table.zero_()
    found, uniform = window_distances(model, images), uniform_distances(model, images)
    for i in (0, 2, 3, 4, 5):  # block 1 is shifted
        assert found[i].nanmean().item() == pytest.approx(uniform[i])
    assert found[1].nanmean() < uniform[1]


def test_rows_by_block_of_a_vit_are_its_attention_rows():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=12, patch_size=4, n_classes=5, embed_dim=12, depth=2, n_heads=3, n_registers=1)
    images = torch.randn(2, 3, 12, 12)
    for patch in (None, (1, -1)):
        for one, row in zip(rows_by_block(model, images, patch), attention_rows(model, images, patch), strict=True):
            torch.testing.assert_close(one.weights, row)
            assert (one.grid, one.token_size) == ((3, 3), (4, 4))
    assert block_names(adapt(model)) == ["block 1", "block 2"]


def test_views_without_a_map_refuse_a_swin_in_one_line():
    model, images = SWINS["ours"](), swin_images("ours")
    for view in (attention_rows, attention_maps, capture, rows_by_block):
        with pytest.raises(InputError, match=r"\Aa SwinTransformer attends within windows[^\n]*Grad-CAM\Z"):
            view(model, images)
    for other in (VisionTransformer(img_size=8, patch_size=4, embed_dim=4, depth=1, n_heads=1), ConvNet(img_size=8)):
        with pytest.raises(InputError, match=r"\A[^\n]*does not attend within windows; use a Swin Transformer\Z"):
            capture_windows(other, images)
    for patch, words in (((14, 0), "patch 14 is out of range"), (3, r"patch 3 is not a position")):
        with pytest.raises(InputError, match=words):
            window_rows(model, images, patch)


# ---- The two tokens of a DeiT


def test_token_similarity_is_the_cosine_of_the_two_tokens():
    torch.manual_seed(0)
    model = DistilledViT(img_size=12, patch_size=4, n_classes=5, embed_dim=12, depth=3, n_heads=2)
    nn.init.normal_(model.dist_token)
    images = torch.randn(3, 3, 12, 12)
    features, attention = token_similarity(model, images)
    seen = capture(model, images)
    assert features.shape == (4,)
    assert attention.shape == (3,)
    for value, tokens in zip(features, seen.tokens, strict=True):
        a, b = tokens[:, 0].double(), tokens[:, 1].double()
        expected = ((a * b).sum(dim=1) / a.norm(dim=1) / b.norm(dim=1)).mean()
        torch.testing.assert_close(value, expected)
    for value, maps in zip(attention, seen.maps, strict=True):
        a, b = maps[:, :, 0].double(), maps[:, :, 1].double()
        torch.testing.assert_close(value, ((a * b).sum(dim=2) / a.norm(dim=2) / b.norm(dim=2)).mean())
    with torch.no_grad():
        model.dist_token.copy_(model.cls_token)
        model.pos_embed[:, 1] = model.pos_embed[:, 0]
    for values in token_similarity(model, images):
        torch.testing.assert_close(values, torch.ones_like(values))


def test_token_similarity_refuses_a_vit_without_the_token():
    with pytest.raises(InputError, match=r"\Athis VisionTransformer has no distillation token; use [^\n]*\Z"):
        token_similarity(VisionTransformer(img_size=8, patch_size=4, embed_dim=4, depth=1, n_heads=1),
                         torch.randn(1, 3, 8, 8))
    with pytest.raises(InputError, match="this SwinTransformer has no distillation token"):
        token_similarity(SwinTransformer(img_size=8, embed_dim=4, depths=(1,), n_heads=(1,)), torch.randn(1, 3, 8, 8))
