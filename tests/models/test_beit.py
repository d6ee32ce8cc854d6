"""BEiT and MaskedTokenModel against timm and transformers on shared random weights, and against their definitions."""

import ast
import copy
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
import transformers
from parity_checks import gradients, randomised, relative_difference, renamed
from timm.models.beit import Beit
from timm.models.beit import beit_base_patch16_224 as timm_base
from timm.models.beit import beit_large_patch16_224 as timm_large
from torch import nn

from vit_bridge.inference import TOLERANCE, export_onnx
from vit_bridge.models import BEiT, MaskedTokenModel, create_beit_base, create_beit_large, create_beit_nano
from vit_bridge.models import beit as module
from vit_bridge.models.adapters import adapt
from vit_bridge.models.beit import block_mask, copy_shared_table
from vit_bridge.models.protocol import ask, layer_groups
from vit_bridge.models.registry import build_model, model_classes
from vit_bridge.models.relative import relative_position_index, resample_bias_table
from vit_bridge.training.optimizers import hidden_matrices, parameter_groups
from vit_model import InputError, VisionTransformer, freeze_backbone, resize_positions

SMALL = dict(img_size=(12, 20), patch_size=4, embed_dim=12, depth=3, n_heads=3)
CLASSES, TOKENS = dict(n_classes=5), dict(n_tokens=7)
TABLE = "relative_position_bias_table"


def small(seed=0, **options):
    return randomised(BEiT(**{**SMALL, **CLASSES, **options}), seed)


def small_masked(seed=0, **options):
    return randomised(MaskedTokenModel(**{**SMALL, **TOKENS, **options}), seed)


def images_for(model, n=2):
    return torch.randn(n, model.config.in_channels, *model.patch_embed.img_size).double()


def mask_for(model, images):
    grid = model.patch_embed.grid_size
    return torch.stack([block_mask(grid, 1 + i % (grid[0] * grid[1] - 1)).flatten() for i in range(2, 2 + len(images))])


def draw_config(seed, size=None, square_patch=False):
    """The arguments of a small BEiT, drawn from the seed; size: (height, width) of the images, in pixels."""
    chance = random.Random(seed)
    n_heads = chance.randint(1, 4)
    patch = (4, 4) if size else (chance.choice([2, 3, 5]), chance.choice([2, 4]))
    patch = (patch[0], patch[0]) if square_patch else patch
    grid = (chance.randint(2, 5), chance.randint(2, 5))
    grid = (grid[0], grid[0]) if square_patch else grid
    return dict(img_size=size or tuple(p * n for p, n in zip(patch, grid, strict=True)), patch_size=patch,
                in_channels=chance.randint(1, 4), embed_dim=n_heads * chance.randint(2, 9), n_heads=n_heads,
                depth=chance.randint(1, 4), mlp_ratio=chance.choice([1.5, 4.0]),
                layer_scale=chance.choice([None, 0.1]), norm_eps=chance.choice([1e-12, 1e-6, 1e-5]))


# ---- Against the libraries


def timm_model(c):
    return Beit(img_size=c.img_size, patch_size=c.patch_size, in_chans=c.in_channels, num_classes=c.n_classes,
                embed_dim=c.embed_dim, depth=c.depth, num_heads=c.n_heads, mlp_ratio=c.mlp_ratio,
                init_values=c.layer_scale, use_abs_pos_emb=False, use_rel_pos_bias=not c.shared_bias,
                use_shared_rel_pos_bias=c.shared_bias, global_pool="avg" if c.pool == "mean" else "token",
                use_fc_norm=c.fc_norm, norm_layer=lambda width, **options: nn.LayerNorm(width, eps=c.norm_eps))


def transformers_config(c, **options):
    return transformers.BeitConfig(
        hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.n_heads, image_size=c.img_size,
        intermediate_size=int(c.embed_dim * c.mlp_ratio), patch_size=c.patch_size[0], num_channels=c.in_channels,
        layer_norm_eps=c.norm_eps, use_relative_position_bias=not c.shared_bias, drop_path_rate=0.0,
        use_shared_relative_position_bias=c.shared_bias, layer_scale_init_value=c.layer_scale or 0.0, **options)


def transformers_classifier(c):
    return transformers.BeitForImageClassification(transformers_config(c, num_labels=c.n_classes))


def transformers_masked(c):
    return transformers.BeitForMaskedImageModeling(transformers_config(
        c, vocab_size=c.n_tokens, use_mask_token=True))


TIMM_NAMES = [(r"ls(\d)\.gamma", r"gamma_\1"), (r"attn\.qkv\.bias", "attn.{qkv}_bias")]
TRANSFORMERS_NAMES = [
    (r"^(cls_token|mask_token)$", r"beit.embeddings.\1"), (r"^head\.", "classifier."),
    (r"^patch_embed\.proj\.", "beit.embeddings.patch_embeddings.projection."), (r"^norm\.", "layernorm."),
    (r"^fc_norm\.", "beit.pooler.layernorm."), (r"^rel_pos_bias\.", "beit.shared_position_bias."),
    (rf"attn\.({TABLE})", r"relative_position_bias.\1"), (r"^blocks\.", "beit.layers."),
    (r"attn\.qkv\.", "attention.{qkv}_proj."), (r"attn\.proj\.", "attention.o_proj."),
    (r"norm1\.", "layernorm_before."), (r"norm2\.", "layernorm_after."), (r"ls(\d)\.gamma", r"lambda_\1")]


def without_key_biases(entries):
    return {name: one for name, one in entries.items() if not name.endswith((".k_bias", ".k_proj.bias"))}


def check(ours, make, pairs, *inputs, hidden=None):
    """Logits and gradients are those of the library's model with our weights; the key biases alone are left out."""
    theirs = make(ours.config).double().eval()
    theirs.load_state_dict(without_key_biases(renamed(ours.state_dict(), pairs)), strict=True)
    found = []
    for model in (ours, theirs):
        model.zero_grad()
        logits = model(*inputs)
        logits = getattr(logits, "logits", logits)
        found.append(logits if hidden is None else logits[hidden])
        torch.cos(found[-1]).sum().backward()
    assert relative_difference(*found) <= 1e-12
    mine, wanted = renamed(gradients(ours), pairs), gradients(theirs)
    whole = torch.cat([gradient.flatten() for gradient in wanted.values() if gradient is not None]).norm()
    assert whole > 0
    keys = mine.keys() - without_key_biases(mine).keys()
    assert len(keys) == ours.config.depth
    assert max(mine[name].norm() for name in keys) <= 1e-12 * whole
    assert mine.keys() - keys == wanted.keys()
    tables = [name for name in wanted if name.endswith(TABLE)]
    assert len(tables) == (1 if ours.config.shared_bias else ours.config.depth)
    assert all(wanted[name].any() for name in tables)
    differences = [((mine[name] - gradient).norm() / whole).item() for name, gradient in wanted.items()]
    assert max(differences) <= 1e-12


@pytest.mark.parametrize("size", [None, (24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("shared_bias", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_beit_logits_and_gradients_equal_timms(seed, shared_bias, size):
    pool = dict(pool="cls", fc_norm=False) if seed == 3 else {}
    ours = randomised(BEiT(**draw_config(seed, size), n_classes=2 + seed, shared_bias=shared_bias, **pool), seed)
    check(ours, timm_model, TIMM_NAMES, images_for(ours, 3))


# transformers swaps height and width of the table where they differ, so it agrees for square grids only. It rounds its
# softmax to float32 with attention maps, but not in its fused attention.
@pytest.mark.parametrize("shared_bias", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_beit_logits_and_gradients_equal_those_of_transformers(seed, shared_bias):
    ours = randomised(BEiT(**draw_config(seed, square_patch=True), n_classes=2 + seed, shared_bias=shared_bias), seed)
    check(ours, transformers_classifier, TRANSFORMERS_NAMES, images_for(ours, 3))


@pytest.mark.parametrize("shared_bias", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_masked_token_logits_and_gradients_equal_those_of_transformers_where_hidden(seed, shared_bias):
    ours = randomised(MaskedTokenModel(**draw_config(seed, square_patch=True), n_tokens=3 + seed,
                                       shared_bias=shared_bias), seed)
    images = images_for(ours, 3)
    mask = mask_for(ours, images)
    check(ours, transformers_masked, TRANSFORMERS_NAMES, images, mask, hidden=mask)


@pytest.mark.parametrize(("create", "theirs", "n_parameters"), [
    (create_beit_base, timm_base, 86_540_200), (create_beit_large, timm_large, 304_455_144)])
def test_beit_has_the_parameters_of_timms_and_key_biases(create, theirs, n_parameters):
    with torch.device("meta"):
        ours, theirs = create(), theirs()
    assert sum(p.numel() for p in ours.parameters()) == n_parameters
    shapes = {name: p.shape for name, p in without_key_biases(renamed(ours.state_dict(), TIMM_NAMES)).items()}
    assert shapes == {name: p.shape for name, p in theirs.state_dict().items()}
    assert n_parameters - sum(p.numel() for p in theirs.parameters()) == ours.config.depth * ours.config.embed_dim
    assert ours.config.layer_scale == theirs.blocks[0].init_values
    assert ours.config.norm_eps == theirs.fc_norm.eps


def test_beit_uses_no_library_underneath():
    """The model's own code imports torch and this project alone."""
    roots = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            roots |= {(getattr(node, "module", None) or node.names[0].name).split(".")[0]}
    assert roots <= {"dataclasses", "math", "re", "torch", "vit_bridge", "vit_model"}


# ---- Relative positions


@pytest.mark.parametrize("grid", [(3, 5), (2, 2), (1, 4)])
@pytest.mark.parametrize("p", [1, 3])
def test_relative_position_index_gives_prefix_tokens_the_last_three_rows(grid, p):
    index, n_offsets = relative_position_index(grid, p), (2 * grid[0] - 1) * (2 * grid[1] - 1)
    assert torch.equal(index[p:, p:], relative_position_index(grid))
    assert (index[:p, p:] == n_offsets).all()
    assert (index[p:, :p] == n_offsets + 1).all()
    assert (index[:p, :p] == n_offsets + 2).all()


@pytest.mark.parametrize("n_registers", [0, 2])
@pytest.mark.parametrize("shared_bias", [False, True])
def test_beit_scores_have_the_bias_of_the_table(shared_bias, n_registers):
    model = small(shared_bias=shared_bias, n_registers=n_registers)
    images = images_for(model)
    with torch.no_grad():
        tokens, maps = model.forward_features(images, return_attention=True)
        torch.testing.assert_close(model(images), model.forward_head(tokens), rtol=1e-12, atol=1e-12)
    owner = model.rel_pos_bias if shared_bias else model.blocks[0].attn
    index = relative_position_index((3, 5), 1 + n_registers)
    bias = torch.stack([owner.relative_position_bias_table[:, head][index] for head in range(3)])
    x = model.blocks[0].norm1(model.add_prefix(model.patch_embed(images), images.shape[2:]))
    q, k, _ = model.blocks[0].attn.qkv(x).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(maps[0], (q @ k.transpose(2, 3) / 2 + bias).softmax(dim=3), rtol=1e-12, atol=1e-12)
    for block in model.blocks:
        assert (model.rel_pos_bias is None) == (block.attn.relative_position_bias_table is not None)
        assert torch.equal(block.attn.bias(2), block.attn.bias()[:, :2])


def test_beit_with_copies_of_the_shared_table_computes_the_same():
    shared, own = small(shared_bias=True), small(seed=1)
    own.load_state_dict(copy_shared_table(shared.state_dict(), 3))
    images = images_for(own)
    assert torch.equal(own(images), shared(images))
    assert [name for name, _ in shared.named_parameters() if name.endswith(TABLE)] == [f"rel_pos_bias.{TABLE}"]
    assert [name for name, _ in own.named_parameters() if name.endswith(TABLE)] == [
        f"blocks.{i}.attn.{TABLE}" for i in range(3)]


def test_beit_without_tables_is_a_vit_without_positions():
    model = small()
    for block in model.blocks:
        nn.init.zeros_(block.attn.relative_position_bias_table)
    config = {name: value for name, value in vars(model.config).items() if name != "shared_bias"}
    plain = VisionTransformer(**config).double().eval()
    plain.load_state_dict({name: one for name, one in model.state_dict().items() if not name.endswith(TABLE)})
    images = images_for(model)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared_bias", [False, True])
def test_beit_resized_keeps_the_rows_of_cls_and_resamples_the_others(shared_bias):
    model = small(shared_bias=shared_bias)
    before = copy.deepcopy(model)
    resize_positions(model, (20, 24))
    assert model(images_for(model)).shape == (2, 5)
    owners, old = ([one.rel_pos_bias] if shared_bias else [block.attn for block in one.blocks]
                   for one in (model, before))
    for owner, was in zip(owners, old, strict=True):
        table, expected = getattr(owner, TABLE), resample_bias_table(getattr(was, TABLE)[:-3], (3, 5), (5, 6))
        assert torch.equal(table, torch.cat([expected, getattr(was, TABLE)[-3:]]))
        assert table.shape == (9 * 11 + 3, 3)
        assert table.requires_grad
    again = BEiT(**vars(model.config)).double().eval()
    again.load_state_dict(model.state_dict())
    images = images_for(again)
    assert torch.equal(again(images), model(images))
    images, same = images_for(before), resize_positions(copy.deepcopy(before), (12, 20))
    assert torch.equal(same(images), before(images))


def test_beit_refuses_images_of_another_size():
    model = small()
    with pytest.raises(InputError, match=r"\Aany_size True does not fit a BEiT[^\n]*resize_positions[^\n]*\Z"):
        model.any_size = True
    model.any_size = False
    assert model.any_size is ask(model, "any_size") is adapt(model).any_size is False
    with pytest.raises(InputError, match=r"\Agot images of 20x24 pixels, expected 12x20[^\n]*\Z"):
        model(torch.zeros(1, 3, 20, 24).double())


# ---- The models by themselves


def test_masked_token_model_sees_nothing_of_hidden_patches():
    model = small_masked()
    images = images_for(model)
    mask = torch.zeros(2, 15, dtype=torch.bool)
    mask[0, [0, 6]] = mask[1, 14] = True
    changed = images.clone()
    changed[0, :, :4, :4] += 1  # patch 0
    changed[0, :, 4:8, 4:8] -= 2  # patch 6
    changed[1, :, 8:, 16:] *= 3  # patch 14
    assert torch.equal(model(images, mask), model(changed, mask))
    assert not torch.allclose(model(images), model(changed))
    assert model(images, mask).shape == (2, 15, 7)
    assert torch.equal(model(images), model(images, torch.zeros_like(mask)))


def test_masked_token_model_can_tell_hidden_patches_apart():
    """By their relative positions: without these, all hidden patches would get the same logits."""
    model = small_masked()
    images = images_for(model)
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[:, 0] = False
    logits = model(images, mask)[:, 1:]
    assert (logits[:, :1] - logits[:, 1:]).abs().amax(dim=2).min() > 1e-6


def test_masked_token_model_has_the_features_of_a_vit_without_a_head():
    model = small_masked()
    images = images_for(model)
    tokens = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(tokens), tokens[:, 1:].mean(dim=1), rtol=1e-12, atol=1e-12)
    assert (ask(model, "n_tokens"), ask(small(), "n_tokens")) == (7, 0)


@pytest.mark.parametrize("make", [small, small_masked])
@pytest.mark.parametrize("shared_bias", [False, True])
def test_beit_copies_and_rebuilds_give_the_same_logits(make, shared_bias):
    model = make(shared_bias=shared_bias, n_registers=1)
    again = type(model)(**vars(model.config)).double().eval()
    again.load_state_dict(model.state_dict())
    images = images_for(model)
    for twin in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config == model.config
        assert torch.equal(twin(images), model(images))
        if shared_bias:
            assert {id(block.attn.shared[0]) for block in twin.blocks} == {id(twin.rel_pos_bias)}
            assert twin.rel_pos_bias is not model.rel_pos_bias


def test_beit_groups_of_optimisers_and_of_layers():
    for model, head, n_tables in ((small(), "head", 3), (small_masked(), "lm_head", 1)):
        decayed = {id(p) for group in parameter_groups(model, 0.1) if group["weight_decay"] for p in group["params"]}
        named = {name for name, p in model.named_parameters() if id(p) in decayed}
        assert named == {name for name, p in model.named_parameters() if p.ndim > 1 and name.endswith(".weight")}
        assert len(model.no_weight_decay) == n_tables
        muon = {name for name, p in model.named_parameters() if p in hidden_matrices(model)}
        assert muon == named - {"patch_embed.proj.weight", f"{head}.weight"}
        assert layer_groups(model)[f"{head}.weight"] == 4
        assert layer_groups(model)["blocks.1.attn.qkv.weight"] == 2
    assert {name for name, p in freeze_backbone(small()).named_parameters() if p.requires_grad} == {
        "head.weight", "head.bias"}
    groups = layer_groups(small())
    assert [groups[f"blocks.{i}.attn.{TABLE}"] for i in range(3)] == [1, 2, 3]
    assert groups["fc_norm.weight"] == 4
    assert layer_groups(small_masked())[f"rel_pos_bias.{TABLE}"] == 0


def test_beit_starts_as_a_vit_does():
    """Attention is initialised with the rest, in the order of a ViT."""
    for init in ("xavier", "mimetic"):
        torch.manual_seed(0)
        weight = BEiT(**{**SMALL, "embed_dim": 48}, init=init).blocks[1].attn.qkv.weight
        bound = (6 / 96)**0.5  # Xavier's, for each of q, k and v
        if init == "xavier":
            assert weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        else:
            assert weight.abs().max() > bound
    model = create_beit_nano(10)
    assert not model.blocks[0].attn.qkv.bias.any()
    assert getattr(model.blocks[0].attn, TABLE).std().item() == pytest.approx(0.02, rel=0.1)
    assert model.pos_embed is None
    masked = MaskedTokenModel(**{**SMALL, "embed_dim": 120})
    assert masked.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert masked.config.n_tokens == 8192


def test_beit_is_in_the_registry():
    assert type(build_model("beit_nano", n_classes=3)) is BEiT
    assert build_model("beit_nano", img_size=96).config.patch_size == 8
    assert model_classes()["MaskedTokenModel"] is MaskedTokenModel
    assert create_beit_nano(3, depth=2, shared_bias=True).config.shared_bias
    with pytest.raises(InputError, match=r"\Aargument 'n_token' is unknown; [^\n]*\Z"):
        create_beit_nano(n_token=3)


@pytest.mark.parametrize(("options", "value"), [
    (dict(qk_norm=True), "qk_norm True does not fit a BEiT"), (dict(shared_bias="yes"), "shared_bias 'yes' is unknown"),
    (dict(embed_dim=13), "embed_dim 13 is not divisible"), (dict(pool="cls"), "but pool is 'cls'"),
    (dict(img_size=13), "img_size 13x13 is not divisible")])
def test_beit_refuses_bad_arguments_in_one_line(options, value):
    with pytest.raises(InputError, match=rf"\A[^\n]*{re.escape(value)}[^\n]*\Z"):
        small(**options)


@pytest.mark.parametrize(("options", "value"), [
    (dict(n_classes=3), "n_classes 3 does not fit a MaskedTokenModel"),
    (dict(n_tokens=1), "n_tokens 1 is out of range"),
    (dict(fc_norm=True), "fc_norm True does not fit a MaskedTokenModel")])
def test_masked_token_model_refuses_bad_arguments_in_one_line(options, value):
    with pytest.raises(InputError, match=rf"\A[^\n]*{re.escape(value)}[^\n]*\Z"):
        small_masked(**options)


@pytest.mark.parametrize("mask", [torch.zeros(2, 15), torch.zeros(2, 16, dtype=torch.bool),
                                  torch.zeros(1, 15, dtype=torch.bool), torch.zeros(2, 3, 5, dtype=torch.bool)])
def test_masked_token_model_refuses_other_masks_in_one_line(mask):
    model = small_masked()
    with pytest.raises(InputError, match=r"\Athe mask is [^\n]*expected torch\.bool of \(2, 15\)[^\n]*\Z"):
        model(images_for(model), mask)


@pytest.mark.parametrize("shared_bias", [False, True])
def test_beit_as_onnx_computes_what_the_model_does(shared_bias, tmp_path):
    pytest.importorskip("onnxscript")
    assert export_onnx(small(shared_bias=shared_bias), tmp_path / "beit.onnx") < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("shared_bias", [False, True])
def test_compiled_beit_is_one_graph_and_computes_the_same(shared_bias):
    model = small(shared_bias=shared_bias).float()
    images = images_for(model).float()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)


# ---- Which patches are hidden


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (3, 5), (1, 7), (2, 1), (20, 10)])
def test_block_mask_hides_exactly_as_many_and_follows_its_generator(grid):
    n = grid[0] * grid[1]
    for n_hidden in {1, max(1, round(0.4 * n)), n - 1}:
        mask, again, other = (block_mask(grid, n_hidden, torch.Generator().manual_seed(seed)) for seed in (n, n, n + 1))
        assert (mask.dtype, mask.shape, mask.sum().item()) == (torch.bool, grid, n_hidden)
        assert torch.equal(mask, again)
        assert n < 64 or n_hidden == n - 1 or not torch.equal(mask, other)
    torch.manual_seed(5)
    first = block_mask(grid, 1)
    torch.manual_seed(5)
    assert torch.equal(block_mask(grid, 1), first)


def test_block_masks_are_blocks_and_cover_the_grid_evenly():
    """Neighbours of hidden patches are hidden far more often than 40% of the time; even corners are hidden at times."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([block_mask((14, 14), 78, generator) for _ in range(400)]).float()
    pairs = (masks[:, 1:] * masks[:, :-1]).sum() / masks[:, 1:].sum()
    assert pairs > 0.75
    often = masks.mean(dim=0)
    assert often.min() > 0.01
    torch.testing.assert_close(often, often.flip(0), rtol=0, atol=0.12)
    torch.testing.assert_close(often, often.T, rtol=0, atol=0.12)


def test_first_blocks_have_about_16_patches_of_14_by_14_and_are_not_too_narrow():
    """Sides of 16 patches whose ratio lies between 0.3 and 1 / 0.3 are 2.2 to 7.3 long, so 12 are always one block."""
    sides = set()
    for seed in range(300):
        mask = block_mask((14, 14), 12, torch.Generator().manual_seed(seed))
        height, width = (int(mask.any(dim=dim).sum()) for dim in (1, 0))
        assert 2 <= height <= 6
        assert 2 <= width <= 7
        assert height * width - width < 12 <= height * width  # all but a part of the last row
        sides.add(width)
    assert sides == {2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize(("n_hidden", "value"), [(0, "n_hidden 0"), (15, "n_hidden 15 of 15"), (1.5, "n_hidden 1.5")])
def test_block_mask_refuses_numbers_out_of_range(n_hidden, value):
    with pytest.raises(InputError, match=rf"\A{re.escape(value)}[^\n]*\Z"):
        block_mask((3, 5), n_hidden)
