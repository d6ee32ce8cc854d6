"""DistilledViT against timm and transformers on shared random weights, and against its definition."""

import ast
import copy
import pickle
import random
import re
from pathlib import Path

import pytest
import timm
import torch
import transformers
from parity_checks import differences, randomised, relative_difference, renamed
from torch import nn

from vit_bridge.inference import TOLERANCE, export_onnx
from vit_bridge.models import DistilledViT, VisionTransformer
from vit_bridge.models import create_deit_base as deit_base
from vit_bridge.models import create_deit_small as deit_small
from vit_bridge.models import create_deit_tiny as deit_tiny
from vit_bridge.models import deit as module
from vit_model import InputError, attend, freeze_backbone, resize_positions, sincos_positions

SMALL = dict(img_size=(12, 20), patch_size=4, n_classes=5, embed_dim=12, depth=3, n_heads=3)


def small(seed=0, **options):
    return randomised(DistilledViT(**{**SMALL, **options}), seed)


def images_for(model, n=2):
    return torch.randn(n, model.config.in_channels, *model.patch_embed.img_size).double()


def draw_config(seed, square=False):
    """The arguments of a small DistilledViT, drawn from the seed."""
    chance = random.Random(seed)
    n_heads, patch = chance.randint(1, 4), (chance.choice([2, 3, 5]), chance.choice([2, 4]))
    sides = chance.randint(1, 5), chance.randint(1, 5)
    patch, sides = ((patch[0],) * 2, (sides[0],) * 2) if square else (patch, sides)
    return dict(patch_size=patch, img_size=tuple(p * n for p, n in zip(patch, sides, strict=True)), n_heads=n_heads,
                in_channels=chance.randint(1, 4), n_classes=chance.randint(2, 9), depth=chance.randint(1, 4),
                embed_dim=n_heads * chance.randint(2, 9), mlp_ratio=chance.choice([1.5, 4.0]),
                norm_eps=chance.choice([1e-12, 1e-6, 1e-5]))


# ---- Against the libraries


def timm_model(c):
    model = timm.models.deit.VisionTransformerDistilled(
        img_size=c.img_size, patch_size=c.patch_size, in_chans=c.in_channels, num_classes=c.n_classes,
        embed_dim=c.embed_dim, depth=c.depth, num_heads=c.n_heads, mlp_ratio=c.mlp_ratio,
        norm_layer=lambda width, **options: nn.LayerNorm(width, eps=c.norm_eps))
    model.set_distilled_training(True)  # otherwise it returns the mean in training too
    return model


def transformers_model(c):
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(
        hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.n_heads, image_size=c.img_size,
        intermediate_size=int(c.embed_dim * c.mlp_ratio), patch_size=c.patch_size, num_channels=c.in_channels,
        num_labels=c.n_classes, layer_norm_eps=c.norm_eps))


TRANSFORMERS_NAMES = [
    (r"^(cls_token)$", r"deit.embeddings.\1"), (r"^dist_token$", "deit.embeddings.distillation_token"),
    (r"^pos_embed$", "deit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "deit.embeddings.patch_embeddings.projection."), (r"^norm\.", "deit.layernorm."),
    (r"^head\.", "cls_classifier."), (r"^head_dist\.", "distillation_classifier."), (r"^blocks\.", "deit.layers."),
    (r"attn\.qkv\.", "attention.{qkv}_proj."), (r"attn\.proj\.", "attention.o_proj."),
    (r"norm1\.", "layernorm_before."), (r"norm2\.", "layernorm_after.")]
LIBRARIES = {"timm": (timm_model, []), "transformers": (transformers_model, TRANSFORMERS_NAMES)}


def draw_pair(library, seed):
    make, pairs = LIBRARIES[library]
    ours = randomised(DistilledViT(**draw_config(seed)), seed)
    theirs = make(ours.config).double().eval()
    theirs.load_state_dict(renamed(ours.state_dict(), pairs), strict=True)
    return ours, theirs, images_for(ours, 3)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("library", LIBRARIES)
def test_deit_logits_and_gradients_equal_those_of_each_library(library, seed):
    ours, theirs, images = draw_pair(library, seed)
    logits, gradient = differences(ours, theirs, images, LIBRARIES[library][1])
    assert logits <= 1e-12
    assert gradient <= 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_deit_returns_the_pair_of_logits_in_training_as_timm_does(seed):
    ours, theirs, images = draw_pair("timm", seed)
    pair = ours.train()(images)
    assert isinstance(pair, tuple)
    assert [logits.shape for logits in pair] == [(3, ours.config.n_classes)] * 2
    logits, gradient = differences(ours, theirs.train(), images, [])
    assert logits <= 1e-12
    assert gradient <= 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_deit_pair_in_training_equals_both_heads_of_transformers(seed):
    ours, theirs, images = draw_pair("transformers", seed)
    output = theirs(images)
    for mine, other in zip(ours.train()(images), (output.cls_logits, output.distillation_logits), strict=True):
        assert relative_difference(mine, other) <= 1e-12


@pytest.mark.parametrize(("create", "name", "n_parameters"), [
    (deit_tiny, "deit_tiny_distilled_patch16_224", 5_910_800),
    (deit_small, "deit_small_distilled_patch16_224", 22_436_432),
    (deit_base, "deit_base_distilled_patch16_224", 87_338_192)])
def test_deit_has_the_parameters_of_timms(create, name, n_parameters):
    with torch.device("meta"):
        ours, theirs = create(), timm.create_model(name)
    assert sum(p.numel() for p in ours.parameters()) == n_parameters
    shapes, wanted = ({key: p.shape for key, p in model.named_parameters()} for model in (ours, theirs))
    assert shapes == wanted


def test_deit_uses_no_library_underneath():
    """The model's own code imports torch and this project alone."""
    roots = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            roots |= {(getattr(node, "module", None) or node.names[0].name).split(".")[0]}
    assert roots <= {"dataclasses", "torch", "vit_bridge", "vit_model"}


# ---- By itself


def test_deit_without_distillation_is_the_plain_vit():
    plain = deit_tiny(n_classes=4, distilled=False, img_size=32, depth=1)
    assert type(plain) is VisionTransformer
    assert type(deit_tiny(n_classes=4, img_size=32, depth=1)) is DistilledViT
    with pytest.raises(InputError, match=r"\Adistilled 'hard' is unknown[^\n]*\Z"):
        deit_tiny(distilled="hard")
    with pytest.raises(InputError, match=r"\Aargument 'depht' is unknown[^\n]*\Z"):
        deit_tiny(depht=1)


def test_deit_predicts_the_mean_of_its_heads():
    model = small()
    images = images_for(model)
    with torch.no_grad():
        pair, features = model.train()(images), model.forward_features(images)
        tokens = model.eval().forward_features(images)
        torch.testing.assert_close(model(images), (pair[0] + pair[1]) / 2, rtol=1e-12, atol=1e-12)
        assert torch.equal(tokens, features)
        torch.testing.assert_close(pair[0], model.head(tokens[:, 0]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pair[1], model.head_dist(tokens[:, 1]), rtol=1e-12, atol=1e-12)
        assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, :2].mean(dim=1))


@pytest.mark.parametrize("n_registers", [0, 2])
def test_deit_computes_only_the_tokens_that_its_heads_read(n_registers):
    model = small(n_registers=n_registers)
    images, seen = images_for(model), []
    with torch.no_grad():
        whole, maps = model.forward_features(images, return_attention=True)
        short, last = model.forward_features(images, return_attention=True, n_query_tokens=2)
        logits = model(images)
        assert whole.shape == (2, 2 + n_registers + 15, 12)
        torch.testing.assert_close(short, whole[:, :2], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(last[-1], maps[-1][:, :, :2], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits, model.forward_head(whole), rtol=1e-12, atol=1e-12)
        hook = model.norm.register_forward_hook(lambda layer, inputs, output: seen.append(output.shape[1]))
        model(images)
        hook.remove()
    assert seen == [2]


@pytest.mark.parametrize("n_registers", [0, 3])
@pytest.mark.parametrize("position", ["learned", "sincos", "none"])
def test_deit_tokens_come_in_the_order_cls_dist_registers_patches(position, n_registers):
    model = small(n_registers=n_registers, position=position)
    patches = model.patch_embed(images_for(model, 1))
    prefix = [model.cls_token, model.dist_token]
    if n_registers:
        positions = model.pos_embed if position != "none" else torch.zeros(1, 15, 12)
        expected = torch.cat([*prefix, model.reg_token, patches + positions], dim=1)
    else:
        positions = model.pos_embed if position != "none" else torch.zeros(1, 17, 12)
        expected = torch.cat([*prefix, patches], dim=1) + positions
    assert model.n_prefix_tokens == 2 + n_registers
    torch.testing.assert_close(model.add_prefix(patches, (12, 20)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [dict(position="sincos"), dict(init="mimetic")])
@pytest.mark.parametrize("n_registers", [0, 1])
def test_deit_starts_with_positions_of_patches_after_those_of_cls_and_dist(options, n_registers):
    model, n_prefix = DistilledViT(**SMALL, n_registers=n_registers, **options), 0 if n_registers else 2
    assert torch.equal(model.pos_embed, sincos_positions((3, 5), 12, n_prefix))
    assert not model.pos_embed[:, :n_prefix].any()
    assert torch.equal(model.pos_embed[:, n_prefix:], sincos_positions((3, 5), 12, 0))


@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_deit_resized_keeps_the_positions_of_cls_and_dist(position):
    model = small(position=position)
    kept, flexible = model.pos_embed[:, :2].clone(), copy.deepcopy(model)
    flexible.any_size = True
    resize_positions(model, (20, 24))
    assert model.pos_embed.shape == (1, 2 + 5 * 6, 12)
    assert torch.equal(model.pos_embed[:, :2], kept)
    images = images_for(model)
    assert images.shape[2:] == (20, 24)
    with torch.no_grad():
        torch.testing.assert_close(flexible(images), model(images), rtol=1e-12, atol=1e-12)
        assert flexible.config.img_size == (12, 20)


@pytest.mark.parametrize("seed", range(4))
def test_deit_resized_equals_timms(seed):
    ours, theirs, _ = draw_pair("timm", seed)
    size = tuple(side * 3 for side in ours.patch_embed.patch_size)
    resize_positions(ours, size)
    theirs.set_input_size(size)
    images = images_for(ours)
    with torch.no_grad():  # positions are resampled in float32
        assert relative_difference(ours(images), theirs(images)) <= 1e-6


def test_deit_copies_and_rebuilds_give_the_same_logits():
    model = small(n_registers=1, layer_scale=0.5, qk_norm=True)
    again = DistilledViT(**vars(model.config)).double().eval()
    again.load_state_dict(model.state_dict())
    images = images_for(model)
    for twin in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config == model.config
        assert torch.equal(twin(images), model(images))


def test_deit_without_classes_gives_its_pooled_features():
    model = small(n_classes=0)
    images = images_for(model)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model(images), features, rtol=1e-12, atol=1e-12)
    assert features.shape == (2, model.n_features)


def test_deit_frozen_trains_both_heads():
    trained = {name for name, p in freeze_backbone(small()).named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_deit_as_onnx_computes_the_mean_of_its_heads(tmp_path):
    pytest.importorskip("onnxscript")
    assert export_onnx(small().train(), tmp_path / "deit.onnx") < TOLERANCE


def test_deit_refuses_the_mean_of_the_patches():
    with pytest.raises(InputError, match=r"\A[^\n]*pool 'mean' does not fit a DistilledViT[^\n]*\Z"):
        DistilledViT(**SMALL, pool="mean")
    with pytest.raises(InputError, match=re.escape("embed_dim 13 is not divisible by n_heads 3")):
        DistilledViT(**{**SMALL, "embed_dim": 13})


# ---- What the family shares: encode and attend


@pytest.mark.parametrize("return_attention", [False, True])
def test_encode_applies_the_blocks_and_the_norm_to_given_tokens(return_attention):
    model, x = small(), torch.randn(2, 9, 12).double()
    expected = x
    for block in model.blocks:
        expected = block(expected)
    found = model.encode(x, return_attention)
    found, maps = found if return_attention else (found, [])
    torch.testing.assert_close(found, model.norm(expected), rtol=1e-12, atol=1e-12)
    assert [each.shape for each in maps] == [(2, 3, 9, 9)] * 3 * return_attention


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (3, 4, 5), (2, 3, 4, 5), (2, 1, 1, 5)])
@pytest.mark.parametrize("return_attention", [False, True])
def test_attend_adds_a_bias_to_the_scores(shape, return_attention):
    torch.manual_seed(sum(shape))
    q, (k, v), bias = torch.randn(2, 3, 4, 6).double(), torch.randn(2, 2, 3, 5, 6).double(), torch.randn(shape).double()
    bias[..., 1] = -torch.inf
    scores = torch.einsum("bhnk,bhmk->bhnm", q, k) / 6**0.5 + bias
    weights = scores.exp() / scores.exp().sum(dim=3, keepdim=True)
    heads, attention = attend(q, k, v, return_attention, bias)
    torch.testing.assert_close(heads, torch.einsum("bhnm,bhmk->bhnk", weights, v), rtol=1e-12, atol=1e-12)
    if return_attention:
        torch.testing.assert_close(attention, weights, rtol=1e-12, atol=1e-12)
        assert not attention[..., 1].any()
    else:
        assert attention is None
