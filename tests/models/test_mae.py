"""MaskedAutoencoder against transformers on shared random weights, and against the definition in the paper.

Shapes:  B images, N patches, n visible patches, D width of a token, F numbers in a patch.
"""

import ast
import copy
import math
import pickle
import random
from pathlib import Path

import pytest
import torch
import transformers
from parity_checks import gradients, randomised, relative_difference, renamed
from torch import nn

from vit_bridge.analysis.capture import attention_maps
from vit_bridge.models import MaskedAutoencoder, VisionTransformer, build_model
from vit_bridge.models import create_mae_base as mae_base
from vit_bridge.models import create_mae_huge as mae_huge
from vit_bridge.models import create_mae_large as mae_large
from vit_bridge.models import create_mae_nano as mae_nano
from vit_bridge.models import mae as module
from vit_bridge.models.mae import patchify, random_masking, unmask, unpatchify
from vit_bridge.models.registry import MODELS
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.training.optimizers import hidden_matrices, layer_lr_scales, parameter_groups
from vit_bridge.weights.heads import fit_head
from vit_model import InputError, freeze_backbone, resize_positions

SMALL = dict(img_size=(12, 20), patch_size=4, embed_dim=12, depth=3, n_heads=3, decoder_dim=8, decoder_depth=2,
             decoder_heads=2)
SQUARES = [(2, 8), (8, 2), (1, 9), (4, 9), (3, 12), (12, 3)]  # grids with a square number of patches


def small(seed=0, **options):
    return randomised(MaskedAutoencoder(**{**SMALL, **options}), seed)


def images_for(model, n=3):
    return torch.randn(n, model.config.in_channels, *model.patch_embed.img_size).double()


def noise_for(model, n=3):
    return torch.rand(n, model.patch_embed.n_patches)


def draw_config(seed, square=False, grid=None):
    """The arguments of a small model, drawn from the seed. square: True for square patches and images, "patches"."""
    chance = random.Random(seed)
    n_heads, decoder_heads = chance.randint(1, 4), chance.randint(1, 3)
    patch, grid = (chance.randint(1, 5), chance.randint(1, 5)), grid or (chance.randint(1, 6), chance.randint(2, 6))
    patch = (patch[0],) * 2 if square else patch
    grid = (grid[1],) * 2 if square is True else grid
    ratio = chance.choice([0.3, 0.5, 0.75, 0.9])
    if int(grid[0] * grid[1] * (1 - ratio)) == 0:
        ratio = 0.5
    return dict(patch_size=patch, img_size=(patch[0] * grid[0], patch[1] * grid[1]), n_heads=n_heads,
                in_channels=chance.randint(2, 4), depth=chance.randint(1, 3),
                embed_dim=4 * n_heads * chance.randint(1, 3), mlp_ratio=chance.choice([1.5, 4.0]),
                norm_eps=chance.choice([1e-12, 1e-6, 1e-5]), mask_ratio=ratio,
                decoder_heads=decoder_heads, decoder_dim=4 * decoder_heads * chance.randint(1, 3),
                decoder_depth=chance.randint(1, 3), norm_pix_loss=bool(seed % 2))


def gradient_difference(found, wanted):
    """The largest difference of any gradient, relative to the norm of all: a key's bias has a gradient of zero."""
    assert found.keys() == wanted.keys()
    whole = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    assert whole > 0
    return max(((found[name] - gradient).norm() / whole).item() for name, gradient in wanted.items())


# ---- Against transformers

TRANSFORMERS_NAMES = [
    (r"^(cls_token)$", r"vit.embeddings.\1"), (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."), (r"^norm\.", "vit.layernorm."),
    (r"^blocks\.", "vit.layers."), (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(mask_token|decoder_pos_embed|decoder_embed|decoder_norm|decoder_pred)", r"decoder.\1"),
    (r"attn\.qkv\.", "attention.{qkv}_proj."), (r"attn\.proj\.", "attention.o_proj."),
    (r"norm1\.", "layernorm_before."), (r"norm2\.", "layernorm_after.")]


def transformers_model(c):
    side = c.patch_size if isinstance(c.patch_size, int) else c.patch_size[0]
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
        hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.n_heads,
        intermediate_size=int(c.embed_dim * c.mlp_ratio), layer_norm_eps=c.norm_eps, image_size=c.img_size,
        patch_size=side, num_channels=c.in_channels, decoder_hidden_size=c.decoder_dim,
        decoder_num_hidden_layers=c.decoder_depth, decoder_num_attention_heads=c.decoder_heads,
        decoder_intermediate_size=int(c.decoder_dim * c.mlp_ratio), mask_ratio=c.mask_ratio,
        norm_pix_loss=c.norm_pix_loss))


def draw_pair(seed, **how):
    ours = randomised(MaskedAutoencoder(**draw_config(seed, **how)), seed)
    theirs = transformers_model(ours.config).double().eval()
    theirs.load_state_dict(renamed(ours.state_dict(), TRANSFORMERS_NAMES), strict=True)
    return ours, theirs, images_for(ours), noise_for(ours)


@pytest.mark.parametrize("seed", range(10))
def test_mae_equals_transformers(seed):
    ours, theirs, images, noise = draw_pair(seed, square=True)
    loss, prediction, mask = ours(images, noise)
    wanted = theirs(images, noise=noise)
    assert torch.equal(mask, wanted.mask)
    assert torch.equal(random_masking(torch.zeros(*noise.shape, 1), ours.config.mask_ratio, noise)[2],
                       wanted.ids_restore)
    assert relative_difference(prediction, wanted.logits) <= 1e-12
    assert relative_difference(loss, wanted.loss) <= 1e-12
    loss.backward()
    wanted.loss.backward()
    theirs_by_name = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert gradient_difference(renamed(gradients(ours), TRANSFORMERS_NAMES), theirs_by_name) <= 1e-12


@pytest.mark.parametrize("grid", SQUARES)
def test_mae_equals_transformers_on_rectangles(grid):
    """Their loss needs square images, and their model a square number of patches."""
    ours, theirs, images, noise = draw_pair(sum(grid), square="patches", grid=grid)
    _, prediction, mask = ours(images, noise)
    seen = theirs.vit(images, noise=noise)
    assert torch.equal(mask, seen.mask)
    assert relative_difference(prediction, theirs.decoder(seen.last_hidden_state, seen.ids_restore).logits) <= 1e-12


@pytest.mark.parametrize(("create", "n_parameters"), [(mae_base, 111_655_680), (mae_large, 329_239_296),
                                                      (mae_huge, 656_613_964)])
def test_mae_has_the_parameters_of_transformers(create, n_parameters):
    with torch.device("meta"):
        ours = create()
        theirs = transformers_model(ours.config)
    assert sum(p.numel() for p in ours.parameters()) == n_parameters
    shapes, wanted = ({name: value.shape for name, value in state.items()} for state in (
        renamed(ours.state_dict(), TRANSFORMERS_NAMES), theirs.state_dict()))
    assert shapes == wanted


def test_mae_has_the_official_names():
    names = {name.split(".")[0] for name in mae_nano().state_dict()}
    assert names == {"cls_token", "pos_embed", "patch_embed", "blocks", "norm", "decoder_embed", "mask_token",
                     "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred"}


# ---- Against the definition, written from the paper: one image and one token at a time where it can be


def normal(x, weights, name, eps):
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def dense(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def encoder_block(x, weights, name, n_heads, eps):
    """A block of the ViT on the tokens of one image (N, D)."""
    D = x.shape[1]
    q, k, v = dense(normal(x, weights, f"{name}.norm1", eps), weights, f"{name}.attn.qkv").split(D, dim=1)
    heads = []
    for part in range(n_heads):
        own = slice(part * D // n_heads, (part + 1) * D // n_heads)
        scores = (q[:, own] @ k[:, own].T / math.sqrt(D // n_heads)).exp()
        heads.append(scores / scores.sum(dim=1, keepdim=True) @ v[:, own])
    x = x + dense(torch.cat(heads, dim=1), weights, f"{name}.attn.proj")
    hidden = dense(normal(x, weights, f"{name}.norm2", eps), weights, f"{name}.mlp.fc1")
    return x + dense(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, weights, f"{name}.mlp.fc2")


def definition(weights, c, images, noise):
    """He et al. 2022, Sec. 3: the loss, the prediction (B, N, F) and the hidden patches, a set for each image."""
    (height, width), (p, q) = c.img_size, c.patch_size
    grid = [(top, left) for top in range(0, height, p) for left in range(0, width, q)]
    n = int(len(grid) * (1 - c.mask_ratio))
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    predictions, errors, sets = [], [], []
    for image, numbers in zip(images, noise.tolist(), strict=True):
        patches = [image[:, top:top + p, left:left + q] for top, left in grid]
        visible = sorted(range(len(grid)), key=numbers.__getitem__)[:n]
        x = [weights["cls_token"][0, 0] + weights["pos_embed"][0, 0]]
        x += [kernel @ patches[i].flatten() + weights["patch_embed.proj.bias"] + weights["pos_embed"][0, 1 + i]
              for i in visible]
        x = torch.stack(x)
        for i in range(c.depth):
            x = encoder_block(x, weights, f"blocks.{i}", c.n_heads, c.norm_eps)
        x = dense(normal(x, weights, "norm", c.norm_eps), weights, "decoder_embed")
        tokens = [x[0]] + [x[1 + visible.index(i)] if i in visible else weights["mask_token"][0, 0]
                           for i in range(len(grid))]
        x = torch.stack(tokens) + weights["decoder_pos_embed"][0]
        for i in range(c.decoder_depth):
            x = encoder_block(x, weights, f"decoder_blocks.{i}", c.decoder_heads, c.norm_eps)
        prediction = dense(normal(x, weights, "decoder_norm", c.norm_eps), weights, "decoder_pred")[1:]
        sets.append(set(range(len(grid))) - set(visible))
        for i in sets[-1]:
            pixels = torch.stack([patches[i][:, row, column] for row in range(p) for column in range(q)]).flatten()
            if c.norm_pix_loss:
                centred = pixels - pixels.mean()
                pixels = centred / (centred.square().sum() / (len(pixels) - 1) + 1e-6).sqrt()
            errors.append((prediction[i] - pixels).square().mean())
        predictions.append(prediction)
    return sum(errors) / len(errors), torch.stack(predictions), sets


@pytest.mark.parametrize("seed", range(12))
def test_mae_equals_its_definition(seed):
    model = randomised(MaskedAutoencoder(**draw_config(seed)), seed)
    images, noise = images_for(model).requires_grad_(), noise_for(model)
    loss, prediction, mask = model(images, noise)
    loss.backward()
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    pixels = images.detach().clone().requires_grad_()
    wanted, wanted_prediction, hidden = definition(weights, model.config, pixels, noise)
    wanted.backward()
    assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == hidden
    assert relative_difference(prediction, wanted_prediction) <= 1e-12
    assert relative_difference(loss, wanted) <= 1e-12
    by_name = {name: weights[name].grad for name, _ in model.named_parameters()}
    assert gradient_difference(gradients(model) | {"images": images.grad}, by_name | {"images": pixels.grad}) <= 1e-12


@pytest.mark.parametrize(("rows", "columns", "width"), [(3, 3, 8), (2, 5, 12), (7, 1, 4)])
def test_positions_are_those_of_the_paper(rows, columns, width):
    model = MaskedAutoencoder(**{**SMALL, "img_size": (4 * rows, 4 * columns), "embed_dim": 3 * width,
                                 "decoder_dim": width, "mask_ratio": 0.5})
    for positions, D in ((model.pos_embed, 3 * width), (model.decoder_pos_embed, width)):
        waves = [[[wave(place / 10000 ** (4 * i / D)) for place in (column, row) for wave in (math.sin, math.cos)
                   for i in range(D // 4)] for column in range(columns)] for row in range(rows)]
        expected = torch.cat([torch.zeros(1, 1, D), torch.tensor(waves).view(1, rows * columns, D)], dim=1)
        torch.testing.assert_close(positions, expected, rtol=0, atol=1e-6)


# ---- Patches and masks


@pytest.mark.parametrize("seed", range(6))
def test_patchify_orders_rows_columns_channels_and_unpatchify_undoes_it(seed):
    chance = random.Random(seed)
    p, q, h, w, C = (chance.randint(1, 5) for _ in range(5))
    images = torch.randn(2, C, h * p, w * q)
    patches = patchify(images, (p, q))
    assert patches.shape == (2, h * w, p * q * C)
    for row, column, i, j, channel in ((r, c, i, j, k) for r in range(h) for c in range(w) for i in range(p)
                                       for j in range(q) for k in range(C)):
        assert torch.equal(patches[:, row * w + column, (i * q + j) * C + channel],
                           images[:, channel, row * p + i, column * q + j])
    assert torch.equal(unpatchify(patches, (p, q), (h * p, w * q)), images)


@pytest.mark.parametrize("seed", range(6))
def test_unmask_puts_what_random_masking_kept_back_in_its_place(seed):
    torch.manual_seed(seed)
    N, ratio = random.Random(seed).randint(4, 40), random.Random(seed).choice([0.3, 0.5, 0.7])
    x, noise, token = torch.randn(3, N, 5), torch.rand(3, N), torch.randn(1, 1, 5)
    visible, mask, ids_restore = random_masking(x, ratio, noise)
    n = int(N * (1 - ratio))
    assert visible.shape == (3, n, 5)
    assert mask.sum(dim=1).tolist() == [N - n] * 3
    assert torch.equal(mask > 0, noise > noise.sort(dim=1).values[:, n - 1:n])  # the n smallest stay visible
    assert torch.equal(visible, torch.stack([x[i, noise[i].argsort()[:n]] for i in range(3)]))
    assert torch.equal(unmask(visible, token, ids_restore), torch.where(mask[:, :, None] > 0, token, x))


def test_whole_numbers_hide_the_same_patches_as_noise_in_their_order():
    model = small()
    images, noise = images_for(model), noise_for(model)
    ranks = noise.argsort(dim=1).argsort(dim=1)
    for found, wanted in zip(model(images, ranks), model(images, noise), strict=True):
        assert torch.equal(found, wanted)


def test_masks_come_from_torchs_generator_or_from_the_noise():
    model = small()
    images, noise = images_for(model), noise_for(model)

    def mask(seed, *noise):
        torch.manual_seed(seed)
        return model(images, *noise)[2]

    assert torch.equal(mask(0), mask(0))
    assert not torch.equal(mask(0), mask(1))
    assert torch.equal(mask(0, noise), mask(1, noise))
    assert len({tuple(row) for row in mask(0).tolist()}) > 1  # every image has its own


# ---- By itself


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("n_registers", [0, 2])
def test_encoder_sees_visible_patches_only_and_loss_hidden_ones_only(norm_pix_loss, n_registers):
    model, seen, kept = small(norm_pix_loss=norm_pix_loss, n_registers=n_registers), [], []
    images, noise = images_for(model), noise_for(model)
    hooks = [model.blocks[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape)),
             model.decoder_blocks[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape)),
             model.decoder_pred.register_forward_hook(lambda layer, inputs, output: kept.append(output))]
    loss, prediction, mask = model(images, noise)
    for hook in hooks:
        hook.remove()
    gradient = torch.autograd.grad(loss, kept[0])[0][:, 1 + n_registers:]
    assert seen == [(3, 1 + n_registers + 3, 12), (3, 1 + n_registers + 15, 8)]
    assert torch.equal(gradient.abs().sum(dim=2) > 0, mask > 0)
    patches = patchify(images, (4, 4))
    other = torch.where(mask[:, :, None] > 0, torch.randn_like(patches), patches)
    changed = model(unpatchify(other, (4, 4), (12, 20)), noise)
    assert torch.equal(changed[1], prediction)
    assert changed[0] != loss


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruction_leaves_visible_patches_and_undoes_the_normalisation(norm_pix_loss):
    model = small(norm_pix_loss=norm_pix_loss)
    images, noise = 3 + 2 * images_for(model), noise_for(model)
    painted, mask = model.reconstruct(images, noise)
    _, prediction, wanted_mask = model(images, noise)
    assert torch.equal(mask, wanted_mask)
    assert not painted.requires_grad
    for b in range(3):
        for i, (row, column) in enumerate((row, column) for row in range(3) for column in range(5)):
            box = slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
            own, found = images[b, :, *box], painted[b, :, *box]
            expected = prediction[b, i].view(4, 4, 3).permute(2, 0, 1)
            if norm_pix_loss:
                expected = expected * (own.var() + 1e-6).sqrt() + own.mean()
            torch.testing.assert_close(found, expected if mask[b, i] else own, rtol=1e-12, atol=1e-12)
            assert mask[b, i] or torch.equal(found, own)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_paints_the_image_and_has_no_loss(norm_pix_loss, monkeypatch):
    model = small(norm_pix_loss=norm_pix_loss)
    images = images_for(model)
    patches = patchify(images, (4, 4))
    mean, std = model.target_scale(patches)
    monkeypatch.setattr(model, "decode", lambda x, ids_restore, grid_size: (patches - mean) / std)
    assert model(images)[0] == 0
    torch.testing.assert_close(model.reconstruct(images)[0], images, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, dict(pool="mean", n_registers=2), dict(position="learned", qk_norm=True)])
def test_mae_features_are_those_of_its_encoder(options):
    model = small(**options)
    model.preprocessing = Preprocessing((12, 20))
    vit, images = model.encoder(), images_for(model)
    assert type(vit) is VisionTransformer
    assert (vit.preprocessing, vit.training) == (model.preprocessing, False)
    tokens = model.forward_features(images)
    assert tokens.shape == (3, model.n_prefix_tokens + 15, 12)
    assert torch.equal(tokens, vit.forward_features(images))
    torch.testing.assert_close(model.forward_head(tokens), vit(images), rtol=1e-12, atol=1e-12)
    assert len(attention_maps(vit, images)) == 3
    fit_head(vit, 5)
    assert freeze_backbone(vit)(images).shape == (3, 5)
    vit.cls_token.data.zero_()
    assert model.cls_token.all()  # the encoder is a copy


def test_mae_copies_and_rebuilds_give_the_same_loss():
    model = small(n_registers=1, layer_scale=0.5, qk_norm=True, norm_pix_loss=False, mask_ratio=0.5)
    again = MaskedAutoencoder(**vars(model.config)).double().eval()
    again.load_state_dict(model.state_dict())
    images, noise = images_for(model), noise_for(model)
    for twin in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config == model.config
        for found, wanted in zip(twin(images, noise), model(images, noise), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("position", ["learned", "sincos", "none"])
def test_mae_resized_has_the_positions_of_its_new_grid(position):
    model = small(position=position)
    flexible = copy.deepcopy(model)
    flexible.any_size = True
    resize_positions(model, (20, 12))  # as many patches, in another grid
    images, noise = images_for(model), noise_for(model)
    assert images.shape[2:] == (20, 12)
    for found, wanted in zip(flexible(images, noise), model(images, noise), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    again = MaskedAutoencoder(**vars(model.config)).double().eval()
    assert torch.equal(again.decoder_pos_embed, model.decoder_pos_embed)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images, noise)[1], model(images, noise)[1])
    assert model.reconstruct(images, noise)[0].shape == images.shape


def test_mae_in_bfloat16_counts_its_mask_exactly():
    torch.manual_seed(0)
    model, images = mae_nano(), torch.randn(91, 3, 32, 32)  # 91 x 48 needs nine bits
    noise = torch.rand(91, 64)
    loss, _, mask = model(images, noise)
    with torch.autocast("cpu", torch.bfloat16):
        low, rough, same_mask = model(images, noise)
    assert torch.equal(mask, same_mask)
    assert (low.dtype, mask.dtype, rough.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    torch.testing.assert_close(low, loss, rtol=1e-2, atol=0)
    wide = model.bfloat16()(images.bfloat16(), noise)
    assert wide[2].sum().item() == 91 * 48


def test_optimisers_treat_the_decoder_as_the_protocol_says():
    model = mae_nano()
    by_muon = {name for name, p in model.named_parameters() if p in hidden_matrices(model)}
    assert {name for name in by_muon if name.startswith("decoder")} == {
        "decoder_embed.weight", *(f"decoder_blocks.{i}.{part}.weight" for i in range(2)
                                  for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))}
    assert "decoder_pred.weight" not in by_muon
    decayed = {p for group in parameter_groups(model, 0.1) if group["weight_decay"] for p in group["params"]}
    assert {model.decoder_pred.weight, model.decoder_embed.weight} <= decayed
    assert not {model.mask_token, model.cls_token, model.decoder_pred.bias} & decayed
    scales = layer_lr_scales(model, 0.5)
    assert {scale for name, scale in scales.items() if name.startswith("decoder")} == {1.0}
    assert scales["blocks.3.mlp.fc1.weight"] == 0.5


@pytest.mark.parametrize("name", ["mae_nano", "mae_base", "mae_large"])
def test_mae_variants_are_those_of_the_vit(name):
    model, vit = MODELS[name], MODELS[name.replace("mae", "vit")]
    assert model.model_class is MaskedAutoencoder
    assert model.scaled == vit.scaled
    changed = {field for field, value in vit.arguments.items() if model.arguments[field] != value}
    assert changed == {"n_classes", "position"}


def test_mae_is_built_by_name_for_another_size():
    model = build_model("mae_nano", img_size=(64, 96), decoder_depth=1)
    assert (model.patch_embed.grid_size, len(model.decoder_blocks)) == ((8, 12), 1)
    huge = build_model("mae_huge", img_size=112, embed_dim=48, depth=1, decoder_depth=1)
    assert huge.patch_embed.patch_size == (14, 14)  # as in ViT-H/14, whatever the size


def test_mae_starts_as_in_the_papers_code():
    torch.manual_seed(0)
    model = mae_base(img_size=32, depth=1, decoder_depth=1)
    for name, layer in model.named_modules():
        if "decoder" in name and isinstance(layer, nn.Linear):
            assert layer.weight.abs().max().item() == pytest.approx((6 / sum(layer.weight.shape)) ** 0.5, rel=1e-2)
            assert not layer.bias.any()
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(("options", "words"), [
    (dict(decoder_dim=10), "decoder_dim 10 is not divisible by decoder_heads 2 and by 4"),
    (dict(decoder_heads=3), "decoder_dim 8 is not divisible by decoder_heads 3 and by 4"),
    (dict(decoder_depth=0), "decoder_depth 0 is out of range"), (dict(decoder_heads=1.5), "decoder_heads 1.5 is out"),
    (dict(mask_ratio=1.0), "mask_ratio 1.0 is out of range"), (dict(mask_ratio="most"), "mask_ratio 'most' is out of"),
    (dict(norm_pix_loss="yes"), "norm_pix_loss 'yes' is unknown"), (dict(n_classes=10), "n_classes 10 does not fit a"),
    (dict(fc_norm=True, pool="mean"), "fc_norm True does not fit a MaskedAutoencoder")])
def test_mae_refuses_bad_arguments_in_one_line(options, words):
    with pytest.raises(InputError, match=rf"\A{words}[^\n]*\Z"):
        MaskedAutoencoder(**{**SMALL, **options})


@pytest.mark.parametrize(("options", "images", "noise", "words"), [
    (dict(mask_ratio=0.95), (2, 3, 12, 20), None, "mask_ratio 0.95 leaves 0 of 15 patches visible"),
    (dict(mask_ratio=0), (2, 3, 12, 20), None, "mask_ratio 0 leaves 15 of 15 patches visible"),
    ({}, (2, 3, 12, 20), (2, 14), r"noise of shape \(2, 14\) does not fit 2 images of 15 patches"),
    ({}, (2, 3, 12, 20), (1, 15), r"noise of shape \(1, 15\) does not fit 2 images of 15 patches"),
    ({}, (2, 3, 20, 12), None, "got images of 20x12 pixels"), ({}, (2, 1, 12, 20), None, "got images of shape"),
    ({}, (3, 12, 20), None, "got images of shape")])
def test_mae_refuses_bad_images_and_noise_in_one_line(options, images, noise, words):
    model = MaskedAutoencoder(**{**SMALL, **options})
    with pytest.raises(InputError, match=rf"\A{words}[^\n]*\Z"):
        model(torch.randn(images), None if noise is None else torch.rand(noise))


def test_a_mask_ratio_of_0_is_refused_and_not_replaced_by_the_default():
    model = small()
    for mask in (model, model.reconstruct):
        with pytest.raises(InputError, match=r"\Amask_ratio 0 leaves 15 of 15 patches visible[^\n]*\Z"):
            mask(images_for(model), mask_ratio=0)
    assert model(images_for(model), mask_ratio=0.5)[2].sum() == 3 * 8


def test_create_mae_refuses_unknown_arguments_in_one_line():
    with pytest.raises(InputError, match=r"\Aargument 'decoder_dpeth' is unknown[^\n]*\Z"):
        mae_nano(decoder_dpeth=2)
    with pytest.raises(InputError, match=r"\An_classes 10 does not fit a MaskedAutoencoder[^\n]*\Z"):
        mae_nano(n_classes=10)


def test_mae_uses_no_library_underneath():
    """The model's own code imports torch and this project alone."""
    roots = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            roots |= {(getattr(node, "module", None) or node.names[0].name).split(".")[0]}
    assert roots <= {"dataclasses", "torch", "vit_bridge", "vit_model"}
