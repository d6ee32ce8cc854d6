import copy
import math
import operator
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import nn

import vit_model
from vit_model import (
    MLP,
    VARIANTS,
    DropPath,
    InputError,
    MultiHeadAttention,
    PatchEmbedding,
    TransformerBlock,
    VisionTransformer,
    create_vit,
    drop_path_rates,
    freeze_backbone,
    resize_positions,
    sincos_positions,
)

MODEL_PART = Path(vit_model.__file__).read_text(encoding="utf-8").split("# ---- Parts of the model ----")[0]
PATCHED = dict(img_size=(15, 14), patch_size=(5, 2), in_channels=2)  # 3 x 7 patches
SMALL = dict(**PATCHED, n_classes=11, embed_dim=12, depth=2, n_heads=3, mlp_ratio=2.0)


def small_vit(**overrides):
    """A small model in which every parameter is random, so that no zero hides anything."""
    torch.manual_seed(5)
    model = VisionTransformer(**{**SMALL, **overrides})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def images_for(model, batch=3):
    return torch.randn(batch, model.config.in_channels, *model.patch_embed.img_size, dtype=model.cls_token.dtype)


def one_line_with(text):
    return rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z"


# ---- The file itself


def test_vit_model_docstring_names_code_that_exists():
    table = vit_model.__doc__.split("Code\n")[1].split("\n\n")[0].splitlines()
    named = [name for line in table for name in line.rsplit("  ", 1)[1].split(", ")]
    assert [name for name in named if name[:1].isupper() and "." not in name] == [
        "PatchEmbedding", "MultiHeadAttention", "MLP", "TransformerBlock", "VisionTransformer", "VARIANTS"]
    for name in named:
        operator.attrgetter(name.strip())(vit_model)


def test_vit_model_cites_every_equation_where_it_happens():
    comments = re.findall(r"# .*\bEq\. ([\d, ]+)$", MODEL_PART, re.MULTILINE)
    assert sorted(int(number) for numbers in comments for number in numbers.split(",")) == list(range(1, 9))


def test_vit_model_begins_with_only_the_model():
    assert re.findall(r"^class (\w+)", MODEL_PART, re.MULTILINE) == [
        "InputError", "PatchEmbedding", "MultiHeadAttention", "MLP", "TransformerBlock", "VisionTransformer"]
    assert "\ndef " not in MODEL_PART


# ---- The norm after the mean


@torch.no_grad()
def test_fc_norm_normalises_the_mean_over_patches():
    torch.manual_seed(3)
    model = small_vit(pool="mean", fc_norm=True).double().eval()
    for parameter in model.parameters():
        parameter.normal_()
    images = torch.randn(2, model.config.in_channels, *model.patch_embed.img_size).double()
    tokens = model.forward_features(images)
    assert torch.equal(tokens, model.norm(tokens))
    mean = tokens[:, 1:].mean(dim=1)  # (B, D)
    unit = (mean - mean.mean(dim=1, keepdim=True)) / (mean.var(dim=1, correction=0, keepdim=True) + 1e-6).sqrt()
    features = unit * model.fc_norm.weight + model.fc_norm.bias
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), features)
    torch.testing.assert_close(model(images), features @ model.head.weight.T + model.head.bias)


def test_fc_norm_needs_the_mean():
    with pytest.raises(InputError, match=r"\Afc_norm=True [^\n]*pool is 'cls'; build the model with pool='mean'\Z"):
        small_vit(fc_norm=True)


# ---- Sizes


@pytest.mark.parametrize(("name", "count"), [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656),
                                             ("large", 304_326_632)])
def test_create_vit_has_the_parameter_counts_of_the_papers(name, count):
    with torch.device("meta"):
        model = getattr(vit_model, f"create_vit_{name}")()
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_create_vit_nano_has_64_patches_of_4_pixels():
    model = vit_model.create_vit_nano(n_classes=7)
    assert (model.patch_embed.grid_size, model.patch_embed.n_patches, len(model.blocks)) == ((8, 8), 64, 4)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_create_vit_passes_overrides_to_config_and_model():
    model = create_vit("vit_nano", 5, depth=3, pool="mean", img_size=(8, 12))
    assert (model.config.depth, model.config.pool, model.config.img_size) == (3, "mean", (8, 12))
    assert (len(model.blocks), model.patch_embed.grid_size, model.head.out_features) == (3, (2, 3), 5)


# ---- Against timm

TIMM_CASES = [
    SMALL,
    {**SMALL, "pool": "mean"},
    {**SMALL, "position": "none"},
    {**SMALL, "pool": "mean", "position": "none", "depth": 1},
    {**SMALL, "position": "sincos"},
    {**SMALL, "img_size": 21, "patch_size": 7, "n_heads": 1},
    {**SMALL, "embed_dim": 35, "n_heads": 7, "mlp_ratio": 1.5, "depth": 3},
    {**SMALL, "n_classes": 0, "n_heads": 12},
]


def timm_model(config):
    return timm.models.VisionTransformer(
        img_size=config.img_size, patch_size=config.patch_size, in_chans=config.in_channels,
        num_classes=config.n_classes, embed_dim=config.embed_dim, depth=config.depth, num_heads=config.n_heads,
        mlp_ratio=config.mlp_ratio, global_pool={"cls": "token", "mean": "avg"}[config.pool], fc_norm=False,
        pos_embed="none" if config.position == "none" else "learn")


@pytest.mark.parametrize("case", TIMM_CASES)
def test_vit_exchanges_state_dict_with_timm_and_logits_agree(case):
    ours, back = small_vit(**case), VisionTransformer(**case)
    theirs = timm_model(ours.config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    back.load_state_dict(theirs.state_dict(), strict=True)
    images = images_for(ours)
    for output in (lambda model: model(images), lambda model: model.forward_features(images)):
        torch.testing.assert_close(output(ours), output(theirs), rtol=1e-5, atol=1e-5)
    assert torch.equal(back(images), ours(images))


@pytest.mark.parametrize("case", TIMM_CASES)
def test_vit_gradients_agree_with_timm(case):
    ours = small_vit(**case).double()
    theirs = timm_model(ours.config).double()
    theirs.load_state_dict(ours.state_dict())
    images = images_for(ours)
    gradients = []
    for model in (ours, theirs):
        features = model(images)
        (features * torch.linspace(-1, 1, features.numel()).double().reshape(features.shape)).sum().backward()
        named = dict(model.named_parameters())
        gradients.append(torch.cat([named[name].grad.flatten() for name, _ in ours.named_parameters()]))
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() <= 1e-9 * gradients[1].norm()


# ---- PatchEmbedding


def test_patch_embedding_is_unfold_and_one_matrix():
    embed = PatchEmbedding((6, 10), (3, 2), in_channels=5, embed_dim=7)
    images = torch.randn(2, 5, 6, 10)
    patches = F.unfold(images, (3, 2), stride=(3, 2)).transpose(1, 2)
    by_hand = patches @ embed.proj.weight.flatten(1).T + embed.proj.bias
    assert embed(images).shape == (2, 10, 7)
    torch.testing.assert_close(embed(images), by_hand)


def test_patch_embedding_orders_patches_row_by_row():
    embed = PatchEmbedding((4, 9), (2, 3), in_channels=1, embed_dim=1)
    nn.init.constant_(embed.proj.weight, 1 / 6)
    nn.init.zeros_(embed.proj.bias)
    numbers = torch.arange(6.0).reshape(2, 3).repeat_interleave(2, 0).repeat_interleave(3, 1)
    torch.testing.assert_close(embed(numbers.reshape(1, 1, 4, 9)).flatten(), torch.arange(6.0))


# ---- Attention


def test_attention_fused_and_explicit_agree_in_output_and_gradients():
    model = small_vit().double()
    images = images_for(model)
    fused = model.forward_features(images)
    explicit, maps = model.forward_features(images, return_attention=True)
    torch.testing.assert_close(fused, explicit)
    assert [m.shape for m in maps] == [(3, 3, 22, 22)] * 2
    gradients = [torch.autograd.grad(x.pow(3).sum(), [p for p in model.parameters() if p is not model.head.weight
                                                      and p is not model.head.bias]) for x in (fused, explicit)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_attend_uses_explicit_softmax_for_short_bf16_sequences_on_a_cpu(monkeypatch):
    fused = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: fused.append(1) or kernel(*args))
    monkeypatch.setattr(vit_model, "MATH_ATTENTION_MAX_TOKENS", {("cpu", torch.bfloat16): (6, 7)})
    used = []
    for n_tokens, dtype, trains in ((7, torch.bfloat16, True), (8, torch.bfloat16, True), (7, torch.float32, True),
                                    (6, torch.bfloat16, False), (7, torch.bfloat16, False)):
        q = torch.randn(2, 3, n_tokens, 5, dtype=dtype, requires_grad=trains)
        fused.clear()
        heads, maps = vit_model.attend(q, q, q)
        assert maps is None
        torch.testing.assert_close(heads, kernel(q, q, q), rtol=0.05, atol=0.05)
        used.append(len(fused))
    assert used == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 5, 7), (1, 5, 7), (2, 1, 1, 7)])
def test_attend_adds_a_bias_to_the_scores(shape):
    """Fused and explicit, with the bias's gradient; -inf hides a key."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = ((q @ k.transpose(2, 3)) / 2 + bias).softmax(-1)
    wanted = torch.autograd.grad((expected @ v).pow(3).sum(), (q, k, v, bias))
    for maps_too in (False, True):
        heads, maps = vit_model.attend(q, k, v, maps_too, bias)
        torch.testing.assert_close(heads, expected @ v, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(heads.pow(3).sum(), (q, k, v, bias))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(maps, expected)
    hidden = torch.zeros(5, 7, dtype=torch.float64).masked_fill(torch.arange(7) == 3, -torch.inf)
    assert not vit_model.attend(q, k, v, True, hidden)[1][..., 3].any()
    torch.testing.assert_close(vit_model.attend(q, k, v, False, hidden)[0], vit_model.attend(q, k, v, True, hidden)[0])


class Offset(MultiHeadAttention):
    """Attention with a bias of its own, as models/relative.py has it."""

    def bias(self, n_query_tokens=None):
        return torch.arange(22.0, dtype=torch.float64).expand(3, 22, 22)[:, :n_query_tokens]


def test_attention_uses_the_bias_of_its_subclass():
    model = small_vit().double()
    images = images_for(model)
    plain = model(images)
    for block in model.blocks:
        block.attn.__class__ = Offset
    assert not torch.allclose(model(images), plain)
    fused, (explicit, maps) = model.forward_features(images), model.forward_features(images, return_attention=True)
    torch.testing.assert_close(fused, explicit)
    torch.testing.assert_close(model.forward_features(images, n_query_tokens=2), fused[:, :2])
    x = model.blocks[0].norm1(model.add_prefix(model.patch_embed(images), images.shape[2:]))
    q, k, _ = model.blocks[0].attn.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(maps[0], (q @ k.transpose(2, 3) / 2 + torch.arange(22.0)).softmax(-1))


@pytest.mark.parametrize("training", [True, False])
def test_attention_rows_sum_to_one_despite_dropout(training):
    attention = MultiHeadAttention(15, 5, dropout=0.5).train(training)
    _, maps = attention(torch.randn(2, 7, 15), return_attention=True)
    assert maps.shape == (2, 5, 7, 7)
    assert maps.min() > 0
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 5, 7))


def test_attention_without_queries_and_keys_averages_the_values():
    attention = MultiHeadAttention(15, 5)
    nn.init.zeros_(attention.qkv.weight[:30])
    nn.init.zeros_(attention.qkv.bias)
    x = torch.randn(2, 7, 15)
    mixed, maps = attention(x, return_attention=True)
    torch.testing.assert_close(maps, torch.full((2, 5, 7, 7), 1 / 7))
    values = x.mean(dim=1) @ attention.qkv.weight[30:].T
    torch.testing.assert_close(mixed, attention.proj(values).unsqueeze(1).expand_as(mixed))


def test_attention_of_two_tokens_matches_hand_computation():
    attention = MultiHeadAttention(4, 1)
    attention.qkv.weight.data = torch.eye(4).repeat(3, 1)
    attention.proj.weight.data = torch.eye(4)
    nn.init.zeros_(attention.qkv.bias)
    nn.init.zeros_(attention.proj.bias)
    a = 2 * math.log(3)  # scores a / sqrt(4) = log 3 and 0, so the weights are 3/4 and 1/4
    x = torch.tensor([[[math.sqrt(a), 0, 0, 0], [0, math.sqrt(a), 0, 0]]])
    mixed, maps = attention(x, return_attention=True)
    torch.testing.assert_close(maps[0, 0], torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    torch.testing.assert_close(mixed, maps[0] @ x)


def test_attention_heads_read_their_own_queries_and_keys():
    attention = MultiHeadAttention(6, 3)
    x = torch.randn(1, 5, 6)
    _, before = attention(x, return_attention=True)
    with torch.no_grad():
        attention.qkv.weight[2:4] += 1  # queries of the second head
        attention.qkv.weight[6 + 4:6 + 6] += 1  # keys of the third
    _, after = attention(x, return_attention=True)
    assert [torch.equal(before[:, h], after[:, h]) for h in range(3)] == [True, False, False]


# ---- What the head reads


@pytest.mark.parametrize(("pool", "read", "unread"), [("cls", slice(0, 1), slice(1, None)),
                                                      ("mean", slice(1, None), slice(0, 1))])
def test_forward_head_reads_only_the_pooled_tokens(pool, read, unread):
    model, outputs = small_vit(pool=pool), []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    logits = model.forward_head(model.forward_features(images_for(model)))
    gradient, = torch.autograd.grad(logits[:, 3].sum(), outputs)
    assert (gradient[:, unread] == 0).all()
    assert (gradient[:, read].norm(dim=-1) > 0).all()


def test_vit_forward_is_the_head_of_the_features():
    model = small_vit()
    images = images_for(model)
    features = model.forward_features(images)
    assert features.shape == (3, 22, 12)
    torch.testing.assert_close(model(images), model.forward_head(features))
    torch.testing.assert_close(model(images), model.head(model.forward_head(features, pre_logits=True)))


def test_encode_is_what_follows_the_embedding():
    """Any number of tokens passes through the blocks and the last norm."""
    model = small_vit().double()
    images = images_for(model)
    tokens = model.add_prefix(model.patch_embed(images), images.shape[2:])
    torch.testing.assert_close(model.encode(tokens), model.forward_features(images), rtol=0, atol=0)
    encoded, maps = model.encode(tokens[:, :9], return_attention=True, n_query_tokens=4)
    assert encoded.shape == (3, 4, 12)
    assert [one.shape for one in maps] == [(3, 3, 9, 9), (3, 3, 4, 9)]
    expected = tokens[:, :9]
    for block in model.blocks:
        expected = block(expected)
    torch.testing.assert_close(encoded, model.norm(expected)[:, :4])


@pytest.mark.parametrize("n", [1, 2, 22])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_last_block_computes_only_the_query_tokens(n, qk_norm):
    model, shapes = small_vit(qk_norm=qk_norm).double(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[1]))
    images = images_for(model)
    first = model.forward_features(images, n_query_tokens=n)
    assert shapes == [22, n]
    torch.testing.assert_close(first, model.forward_features(images)[:, :n], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("pool", "n"), [("cls", 1), ("mean", 22)])
def test_last_block_computes_only_what_the_head_reads(pool, n, monkeypatch):
    model, shapes = small_vit(pool=pool), []
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: shapes.append(x.shape[1]) or forward(self, x))
    model(images_for(model))
    assert shapes == [22, n]


@pytest.mark.parametrize("where", ["", "attn.qkv", "mlp", "norm2", "attn.proj"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                                  "register_full_backward_pre_hook"])
def test_last_block_hook_sees_every_token(where, kind):
    model, shapes = small_vit(), []
    images = images_for(model)
    alone = model(images)
    hooked = model.blocks[-1].get_submodule(where)

    def note(module, *tensors):
        shapes.append(tensors[-1][0].shape[-2] if isinstance(tensors[-1], tuple) else tensors[-1].shape[-2])

    handle = getattr(hooked, kind)(note)
    logits = model(images)
    logits.sum().backward()
    handle.remove()
    assert shapes == [22]
    torch.testing.assert_close(logits, alone)


class Halved(nn.Linear):
    """A layer that replaces another, as adapters and quantisation do."""

    def forward(self, x):
        return super().forward(x) / 2


def test_attention_calls_a_replaced_layer():
    model = small_vit().double()
    layer, images = model.blocks[-1].attn.qkv, images_for(model)
    halved = Halved(12, 36).double()
    halved.load_state_dict(layer.state_dict())
    model.blocks[-1].attn.qkv = halved
    torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images)))


@pytest.mark.parametrize(("pool", "expected"), [("cls", 0.0), ("mean", 3.5)])
def test_forward_head_pools_cls_or_mean_of_patch_tokens(pool, expected):
    tokens = torch.arange(7.0).reshape(1, 7, 1).expand(2, 7, 12)
    features = small_vit(pool=pool).forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(features, torch.full((2, 12), expected))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_vit_without_classes_gives_its_pooled_features(pool):
    model = small_vit(n_classes=0, pool=pool)
    images = images_for(model)
    assert model(images).shape == (3, 12)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model(images), pooled)


# ---- Positions


@pytest.mark.parametrize(("position", "same"), [("none", True), ("learned", False), ("sincos", False)])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_vit_ignores_patch_order_only_without_positions(position, same, pool):
    model = small_vit(position=position, pool=pool).double()
    images = images_for(model)
    moved = images.roll((5, 4), dims=(2, 3))  # by one patch down and two to the right
    assert torch.allclose(model(images), model(moved), rtol=1e-9, atol=1e-9) is same


def test_sincos_positions_match_hand_computation():
    positions = sincos_positions((2, 3), 8)  # frequencies 1 and 1 / 100
    assert positions.shape == (1, 7, 8)
    assert positions.dtype == torch.float32
    assert (positions[0, 0] == 0).all()  # CLS
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 2)):
        by_hand = [wave(place * f) for place in (column, row) for wave in (math.sin, math.cos) for f in (1, 0.01)]
        torch.testing.assert_close(positions[0, 1 + 3 * row + column], torch.tensor(by_hand))


def test_sincos_positions_frequencies_fall_to_nearly_1_in_10000():
    sines = sincos_positions((1, 2), 4 * 17)[0, 2, :17].double()
    torch.testing.assert_close(sines.asin(), 10000.0 ** -(torch.arange(17).double() / 17), rtol=1e-4, atol=0)


def test_sincos_positions_are_fixed_and_draw_no_random_number():
    before = torch.get_rng_state()
    assert torch.equal(sincos_positions((2, 5), 12), sincos_positions((2, 5), 12))
    assert torch.equal(before, torch.get_rng_state())
    model = VisionTransformer(**SMALL, position="sincos")
    assert "pos_embed" not in dict(model.named_parameters())
    assert torch.equal(model.state_dict()["pos_embed"], sincos_positions((3, 7), 12))


def test_vit_without_positions_stores_none():
    model = VisionTransformer(**SMALL, position="none")
    assert model.pos_embed is None
    assert "pos_embed" not in model.state_dict()


# ---- Initialisation


@pytest.mark.parametrize(("name", "rows", "fan_out"), [
    ("blocks.0.attn.qkv", slice(0, 97), 97), ("blocks.0.attn.qkv", slice(97, 194), 97),
    ("blocks.0.attn.qkv", slice(194, 291), 97), ("blocks.1.attn.proj", slice(None), 97),
    ("blocks.0.mlp.fc1", slice(None), 291), ("head", slice(None), 53)])
def test_vit_dense_layers_start_xavier_uniform_with_qkv_apart(name, rows, fan_out):
    torch.manual_seed(0)
    layer = VisionTransformer(4, 2, 3, 53, 97, 2, 1, mlp_ratio=3).get_submodule(name)
    weight, bound = layer.weight[rows], math.sqrt(6 / (97 + fan_out))
    assert weight.shape == (fan_out, 97)
    assert 0.995 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert abs(weight.mean()) < 5 * bound / math.sqrt(3 * weight.numel())
    assert (layer.bias == 0).all()


def test_vit_starts_with_lecun_patches_small_positions_zero_cls():
    torch.manual_seed(0)
    model = VisionTransformer((22, 26), 2, 5, 3, 101, 1, 1)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(1 / math.sqrt(20), rel=0.05)
    assert model.patch_embed.proj.weight.abs().max() > 3 / math.sqrt(20)  # normal, not uniform
    assert (model.patch_embed.proj.bias == 0).all()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.pos_embed.abs().max() > 3 * 0.02
    assert (model.cls_token == 0).all()
    assert (model.norm.weight == 1).all()


def test_vit_gives_nonzero_logits_when_fresh():
    assert VisionTransformer(**SMALL)(torch.ones(1, 2, 15, 14)).abs().min() > 0


# ---- Dropout


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    dropped = DropPath(0.3)(torch.ones(10007, 2, 3))
    per_image = dropped[:, 0, 0]
    assert torch.equal(dropped, per_image.reshape(-1, 1, 1).expand_as(dropped))
    torch.testing.assert_close(per_image.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert dropped.mean().item() == pytest.approx(1, abs=5 * math.sqrt(0.3 / 0.7 / 10007))


@pytest.mark.parametrize(("rate", "training"), [(0.9, False), (0.0, True)])
def test_drop_path_without_training_or_rate_is_the_identity(rate, training):
    x = torch.randn(5, 3)
    assert DropPath(rate).train(training)(x) is x


@pytest.mark.parametrize(("last", "depth", "rates"), [(0.3, 4, [0, 0.1, 0.2, 0.3]), (0.3, 1, [0]),
                                                      (0.0, 3, [0, 0, 0])])
def test_drop_path_rates_rise_evenly_to_the_last_block(last, depth, rates):
    assert drop_path_rates(last, depth) == pytest.approx(rates)
    model = small_vit(depth=depth, drop_path=last)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx(rates)


def test_transformer_block_with_dropped_branches_is_the_identity():
    block = TransformerBlock(6, 3, drop_path=1 - 1e-12)
    x = torch.randn(2, 5, 6)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("option", ["dropout", "drop_path"])
def test_dropout_is_active_only_in_training(option):
    model = small_vit(**{option: 0.5})
    images, plain = images_for(model, batch=7), small_vit()
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))
    assert torch.equal(model(images), plain(images))


def test_dropout_follows_positions_and_dense_layers_except_qkv():
    model, followed = small_vit(dropout=0.5, depth=1), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Dropout):
            module.register_forward_hook(lambda module, inputs, output, name=name: followed.append(name))
    model(images_for(model))
    assert [name.removeprefix("blocks.0.") for name in followed] == [
        "dropout", "attn.qkv", "attn.proj", "attn.dropout", "mlp.fc1", "mlp.dropout", "mlp.fc2", "mlp.dropout",
        "head"]
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.5}


def test_mlp_works_on_each_token_by_itself():
    mlp = MLP(5, 13)
    x = torch.randn(2, 7, 5)
    by_hand = F.gelu(x[1, 3] @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x)[1, 3], by_hand)


# ---- A model as an object


@pytest.mark.parametrize("return_attention", [False, True])
def test_vit_forward_stores_nothing_on_any_module(return_attention):
    model = small_vit(dropout=0.1, drop_path=0.1)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    model.forward_features(images_for(model), return_attention)
    model(images_for(model))
    after = {name: vars(module) for name, module in model.named_modules()}
    assert {name: v.keys() for name, v in before.items()} == {name: v.keys() for name, v in after.items()}
    assert all(after[name][key] is value for name, values in before.items() for key, value in values.items())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("position", ["learned", "sincos", "none"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_vit_copies_and_pickles_give_the_same_logits(clone, position):
    model = small_vit(position=position)
    images, twin = images_for(model), clone(model)
    assert torch.equal(twin(images), model(images))
    assert twin.config == model.config
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("overrides", [{}, dict(position="sincos", pool="mean", dropout=0.3, drop_path=0.2),
                                       dict(n_classes=0, img_size=20, patch_size=5, position="none")])
def test_vit_config_rebuilds_the_model(overrides):
    model = small_vit(**overrides).eval()
    again = VisionTransformer(**vars(model.config)).eval()
    again.load_state_dict(model.state_dict())
    images = images_for(model)
    assert again.config == model.config
    assert torch.equal(again(images), model(images))


# ---- Another resolution


def test_resize_positions_matches_timm():
    model = small_vit()
    theirs = resample_abs_pos_embed(model.pos_embed.detach(), new_size=[11, 5], old_size=[3, 7])
    assert resize_positions(model, (55, 10)) is model
    torch.testing.assert_close(model.pos_embed.detach(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", ["learned", "sincos", "none"])
def test_resize_positions_moves_the_model_to_the_new_size(position):
    model = resize_positions(small_vit(position=position), (10, 26))
    assert model.config.img_size == model.patch_embed.img_size == (10, 26)
    assert (model.patch_embed.grid_size, model.patch_embed.n_patches) == ((2, 13), 26)
    assert model.forward_features(images_for(model)).shape == (3, 27, 12)
    again = VisionTransformer(**vars(model.config))
    again.load_state_dict(model.state_dict())
    images = images_for(model)
    assert torch.equal(again(images), model(images))


def test_resize_positions_to_the_same_size_changes_nothing():
    model = small_vit()
    before = model.pos_embed.detach().clone()
    torch.testing.assert_close(resize_positions(model, (15, 14)).pos_embed.detach(), before, rtol=0, atol=1e-6)


def test_resize_positions_keeps_cls_and_constants_and_recomputes_sincos():
    model = small_vit()
    nn.init.constant_(model.pos_embed, 0.7)
    nn.init.constant_(model.pos_embed[:, :1], -3.0)
    resized = resize_positions(model, (35, 22)).pos_embed
    assert (resized[:, 0] == -3).all()
    torch.testing.assert_close(resized[:, 1:], torch.full((1, 77, 12), 0.7))
    assert torch.equal(resize_positions(small_vit(position="sincos"), 20).pos_embed, sincos_positions((4, 10), 12))


@pytest.mark.parametrize("trainable", [True, False])
def test_resize_positions_keeps_requires_grad(trainable):
    model = small_vit()
    model.pos_embed.requires_grad_(trainable)
    positions = resize_positions(model, 20).pos_embed
    assert isinstance(positions, nn.Parameter)
    assert positions.is_leaf
    assert positions.requires_grad is trainable


# ---- Freezing


def trainable_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_freeze_backbone_leaves_exactly_the_head():
    model = small_vit()
    model.head = nn.Linear(model.head.in_features, 7)
    assert freeze_backbone(model) is model
    assert trainable_names(model) == {"head.weight", "head.bias"}


def test_freeze_backbone_leaves_exactly_the_heads_that_the_model_names():
    class TwoHeads(VisionTransformer):
        head_names = ("head", "second")

    model = TwoHeads(**SMALL)
    model.second = nn.Linear(12, 11)
    assert trainable_names(freeze_backbone(model)) == {"head.weight", "head.bias", "second.weight", "second.bias"}


def test_vit_with_frozen_blocks_trains_more_than_the_head():
    model = small_vit()
    for part in (model.patch_embed, model.blocks):
        for parameter in part.parameters():
            parameter.requires_grad = False
    assert trainable_names(model) == {"head.weight", "head.bias", "cls_token", "pos_embed", "norm.weight",
                                      "norm.bias"}


# ---- Bad input


@pytest.mark.parametrize(("overrides", "value"), [
    (dict(img_size=225, patch_size=16), "225x225"), (dict(img_size=(15, 16), patch_size=(5, 3)), "15x16"),
    (dict(img_size=0, patch_size=4), "img_size 0"), (dict(img_size=8, patch_size=0), "patch_size 0"),
    (dict(patch_size=16), "16x16"), (dict(embed_dim=13), "13"),
    (dict(n_heads=5), "n_heads 5"), (dict(n_heads=0), "n_heads 0"),
    (dict(pool="max"), "'max'"), (dict(position="rotary"), "'rotary'"), (dict(in_channels=0), "in_channels 0"),
    (dict(n_classes=-1), "n_classes -1"), (dict(n_classes=2.5), "2.5"), (dict(n_classes=True), "True"),
    (dict(depth=0), "depth 0"), (dict(depth="3"), "'3'"), (dict(embed_dim=0), "embed_dim 0"),
    (dict(embed_dim=6, n_heads=3, position="sincos"), "embed_dim 6"),
    (dict(mlp_ratio=0), "mlp_ratio 0"), (dict(mlp_ratio=math.nan), "nan"), (dict(mlp_ratio=math.inf), "inf"),
    *[({name: rate}, f"{name} {rate}") for name in ("dropout", "drop_path") for rate in (-0.1, 1.0, 7, math.nan)]])
def test_vit_refuses_bad_arguments_naming_the_value(overrides, value):
    with pytest.raises(InputError, match=one_line_with(value)):
        VisionTransformer(**{**SMALL, **overrides})


def test_patch_embedding_names_the_nearest_size_that_fits():
    with pytest.raises(InputError, match=one_line_with("the nearest side that fits is 224")):
        PatchEmbedding(225, 16)


@pytest.mark.parametrize(("shape", "value"), [((3, 2, 15, 15), "15x15"), ((3, 3, 15, 14), "(3, 3, 15, 14)"),
                                              ((2, 15, 14), "(2, 15, 14)"), ((3, 2, 14, 15), "14x15")])
def test_vit_refuses_images_that_do_not_fit(shape, value):
    with pytest.raises(InputError, match=one_line_with(value)):
        small_vit()(torch.zeros(shape))


@pytest.mark.parametrize(("call", "value"), [
    (lambda: create_vit("vit_huge"), "'vit_huge'"), (lambda: create_vit("vit_tiny", widht=3), "'widht'"),
    (lambda: MultiHeadAttention(7, 3), "embed_dim 7"), (lambda: MultiHeadAttention(7, 0), "n_heads 0"),
    (lambda: resize_positions(small_vit(), (15, 15)), "15x15")])
def test_vit_model_calls_refuse_bad_arguments_naming_the_value(call, value):
    with pytest.raises(InputError, match=one_line_with(value)):
        call()


def test_resize_positions_when_refused_leaves_the_model_alone():
    model = small_vit()
    with pytest.raises(InputError):
        resize_positions(model, 16)
    assert model.config.img_size == model.patch_embed.img_size == (15, 14)
    assert model(images_for(model)).shape == (3, 11)


def test_create_vit_lists_known_variants_for_an_unknown_one():
    with pytest.raises(ValueError, match=", ".join(VARIANTS)):
        create_vit("tiny")


def test_unknown_choice_among_many_names_the_closest_and_where_all_are():
    names = [f"model_{letter}" for letter in "abcdefghi"]
    with pytest.raises(InputError, match=r"\Amodel 'modle_c' is unknown; the closest choices are model_c, [^\n]*; "
                                         r"list all 9 with help\(it\)\Z"):
        vit_model.check_choice("model", "modle_c", names, "help(it)")
    with pytest.raises(InputError, match=r"the closest choices are model_\w, model_\w, model_\w \(of 9\)\Z"):
        vit_model.check_choice("model", 7, names)
    with pytest.raises(InputError, match=r"argument 'widht' [^\n]*; list all 18 with help\(ViTConfig\)\Z"):
        create_vit("vit_tiny", widht=3)
