"""VisionTransformer against the three libraries that people know it from, on shared random weights.

The models are drawn at random: PARITY_CASES=500 python -m pytest tests/test_parity.py tries more of them.
"""

import os
import random

import pytest
import timm
import torch
import torchvision
import transformers
from timm.layers import resample_abs_pos_embed
from torch import nn

from vit_model import VisionTransformer, resize_positions

N_CASES = int(os.environ.get("PARITY_CASES", "24"))


def draw_config(seed, **fixed):
    """The arguments of a small VisionTransformer, every option drawn from the seed."""
    chance = random.Random(seed)
    n_heads, side = chance.randint(1, 5), chance.choice([2, 3, 5, 7])
    config = dict(
        patch_size=(side, chance.choice([side, 4])), in_channels=chance.randint(1, 4), n_classes=chance.randint(1, 13),
        embed_dim=n_heads * chance.randint(1, 11), depth=chance.randint(1, 4), n_heads=n_heads,
        mlp_ratio=chance.choice([1.0, 1.7, 4.0]), pool=chance.choice(["cls", "mean"]),
        position=chance.choice(["learned", "learned", "none"]), n_registers=chance.choice([0, 0, 1, 3]),
        layer_scale=chance.choice([None, 1e-5, 0.3]), qk_norm=chance.choice([False, True]),
        norm_eps=chance.choice([1e-6, 1e-5]))
    config["img_size"] = tuple(patch * chance.randint(1, 6) for patch in config["patch_size"])
    config |= fixed
    return {**config, "fc_norm": config["pool"] == "mean" and chance.choice([False, True])}


def random_vit(seed, **config):
    """In float64, every parameter random, so that no zero hides anything."""
    torch.manual_seed(seed)
    model = VisionTransformer(**config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


# ---- The same model in each library, and our weights (or gradients) under its names


def timm_model(c):
    return timm.models.VisionTransformer(
        img_size=c.img_size, patch_size=c.patch_size, in_chans=c.in_channels, num_classes=c.n_classes,
        embed_dim=c.embed_dim, depth=c.depth, num_heads=c.n_heads, mlp_ratio=c.mlp_ratio, fc_norm=c.fc_norm,
        global_pool={"cls": "token", "mean": "avg"}[c.pool], pos_embed="none" if c.position == "none" else "learn",
        reg_tokens=c.n_registers, no_embed_class=c.n_registers > 0, init_values=c.layer_scale, qk_norm=c.qk_norm,
        norm_layer=lambda width, **options: nn.LayerNorm(width, eps=c.norm_eps))


def under_timm_names(w):
    return dict(w)


def torchvision_model(c):
    return torchvision.models.VisionTransformer(
        c.img_size, c.patch_size, c.depth, c.n_heads, c.embed_dim, int(c.embed_dim * c.mlp_ratio),
        num_classes=c.n_classes, norm_layer=lambda width: nn.LayerNorm(width, eps=c.norm_eps))


def under_torchvision_names(w):
    names = [("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"), ("patch_embed.proj", "conv_proj"),
             ("attn.qkv.", "self_attention.in_proj_"), ("attn.proj", "self_attention.out_proj"), ("norm1", "ln_1"),
             ("norm2", "ln_2"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3"), ("head.", "heads.head."),
             ("blocks.", "encoder.layers.encoder_layer_")]
    return {renamed(key, names, last_norm="encoder.ln."): tensor for key, tensor in w.items()}


def transformers_model(c):
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.n_heads, image_size=c.img_size,
        intermediate_size=int(c.embed_dim * c.mlp_ratio), patch_size=c.patch_size, num_channels=c.in_channels,
        num_labels=c.n_classes, layer_norm_eps=c.norm_eps))


def under_transformers_names(w):
    names = [("cls_token", "vit.embeddings.cls_token"), ("pos_embed", "vit.embeddings.position_embeddings"),
             ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"), ("attn.proj", "attention.o_proj"),
             ("norm1", "layernorm_before"), ("norm2", "layernorm_after"), ("head.", "classifier."),
             ("blocks.", "vit.layers.")]
    state = {}
    for key, tensor in w.items():
        parts = [("qkv", tensor)] if ".qkv." not in key else zip("qkv", tensor.chunk(3), strict=True)
        for part, value in parts:
            name = renamed(key, names, last_norm="vit.layernorm.")
            state[name.replace("attn.qkv", f"attention.{part}_proj")] = value
    return state


def renamed(key, names, last_norm):
    for ours, theirs in names:
        key = key.replace(ours, theirs)
    return last_norm + key.removeprefix("norm.") if key.startswith("norm.") else key


# What the other two cannot build is left out: they are square, read CLS and have learned positions; torchvision
# takes colour images alone.
PLAIN = dict(pool="cls", position="learned", n_registers=0, layer_scale=None, qk_norm=False)
LIBRARIES = {"timm": (timm_model, under_timm_names, {}),
             "torchvision": (torchvision_model, under_torchvision_names, dict(PLAIN, in_channels=3)),
             "transformers": (transformers_model, under_transformers_names, PLAIN)}


def draw_pair(library, seed, **more):
    """Ours, theirs with the same weights, loaded strictly, and images: all in float64."""
    make, under_their_names, fixed = LIBRARIES[library]
    config = draw_config(seed, **fixed, **more)
    if fixed:
        side, n = config["patch_size"][0], config["img_size"][0] // config["patch_size"][0]
        config |= dict(patch_size=side, img_size=side * n)
    ours = random_vit(seed, **config).eval()
    theirs = make(ours.config).double().eval()
    theirs.load_state_dict(under_their_names(ours.state_dict()), strict=True)
    return ours, theirs, torch.randn(3, ours.config.in_channels, *ours.patch_embed.img_size).double()


def logits_of(model, images):
    output = model(images)
    return output if isinstance(output, torch.Tensor) else output.logits


# ---- The tests


@pytest.mark.parametrize("seed", range(N_CASES))
@pytest.mark.parametrize("library", LIBRARIES)
def test_vit_logits_equal_those_of_each_library(library, seed):
    ours, theirs, images = draw_pair(library, seed)
    with torch.no_grad():
        mine, others = logits_of(ours, images), logits_of(theirs, images)
        assert (mine - others).norm() <= 1e-12 * others.norm()
        mine, others = logits_of(ours.float(), images.float()), logits_of(theirs.float(), images.float())
        assert (mine - others).norm() <= 1e-5 * others.norm()


@pytest.mark.parametrize("seed", range(N_CASES))
@pytest.mark.parametrize("library", LIBRARIES)
def test_vit_gradients_equal_those_of_each_library(library, seed):
    ours, theirs, images = draw_pair(library, seed)
    for model in (ours, theirs):
        torch.cos(logits_of(model, images)).sum().backward()
    mine = LIBRARIES[library][1]({name: parameter.grad for name, parameter in ours.named_parameters()})
    others = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert mine.keys() == others.keys()
    whole = torch.cat([gradient.flatten() for gradient in others.values()]).norm()
    assert whole > 0
    for name, gradient in others.items():
        assert (mine[name] - gradient).norm() <= 1e-9 * whole, name


@pytest.mark.parametrize("seed", range(N_CASES))
def test_vit_tokens_and_head_equal_those_of_timm(seed):
    ours, theirs, images = draw_pair("timm", seed)
    with torch.no_grad():
        tokens = ours.forward_features(images)
        torch.testing.assert_close(tokens, theirs.forward_features(images), rtol=1e-10, atol=1e-10)
        for options in ({}, {"pre_logits": True}):
            torch.testing.assert_close(ours.forward_head(tokens, **options), theirs.forward_head(tokens, **options),
                                       rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(N_CASES))
def test_vit_loads_a_timm_state_dict_strictly(seed):
    ours, theirs, images = draw_pair("timm", seed)
    torch.manual_seed(seed + 1)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(N_CASES))
def test_resize_positions_resamples_as_timm_does(seed):
    ours, theirs, _ = draw_pair("timm", seed, position="learned")
    chance = random.Random(seed + 1)
    old, grid = ours.patch_embed.grid_size, (chance.randint(1, 9), chance.randint(1, 9))
    n_prefix = 0 if ours.config.n_registers else 1
    expected = resample_abs_pos_embed(ours.pos_embed.detach(), new_size=grid, old_size=old,
                                      num_prefix_tokens=n_prefix)
    size = tuple(n * side for n, side in zip(grid, ours.patch_embed.patch_size, strict=True))
    resize_positions(ours, size)
    assert torch.equal(ours.pos_embed, expected)
    theirs.set_input_size(size)
    images = torch.randn(2, ours.config.in_channels, *size).double()
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-6, atol=1e-6)
