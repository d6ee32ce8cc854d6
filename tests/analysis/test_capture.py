"""Captured passes: our own maps, those of other libraries on shared weights, and no side effects."""

import copy
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from other_models import BUILDERS, CLASSES, DEPTH, HF, shared, timm_vit, torchvision_vit, transformers_vit
from torch import nn

from vit_bridge.analysis import capture as r
from vit_bridge.models.adapters import adapt
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.preprocessing import Preprocessing
from vit_model import InputError, VisionTransformer

SIZE, PATCH, GRID, N = (14, 15), (7, 5), (2, 3), 7  # no swapped axis stays unseen


def vit(**options):
    torch.manual_seed(0)
    settings = dict(img_size=SIZE, patch_size=PATCH, n_classes=5, embed_dim=22, depth=3, n_heads=2, dropout=0.5)
    return VisionTransformer(**{**settings, **options})


def images_of(n=3, size=SIZE):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1))


# ---- Our own


@pytest.mark.parametrize("options", [{}, dict(pool="mean"), dict(n_registers=2), dict(position="none"),
                                     dict(qk_norm=True), dict(pool="mean", fc_norm=True)])
def test_capture_gives_the_models_own_maps(options):
    model = vit(**options).eval()
    seen = r.capture(model, images_of())
    tokens, maps = model.forward_features(images_of(), return_attention=True)
    assert torch.equal(torch.stack(maps), torch.stack(seen.maps))
    torch.testing.assert_close(model.norm(seen.tokens[-1]), tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(seen.logits, model(images_of()), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.adapter.read(seen.tokens[-1]), seen.logits, rtol=0, atol=1e-5)
    assert (len(seen.tokens), seen.grid, seen.adapter.n_prefix) == (4, GRID, 1 + options.get("n_registers", 0))


def test_capture_gives_the_tokens_between_blocks():
    model = vit().eval()
    seen = r.capture(model, images_of())
    for i, block in enumerate(model.blocks):
        torch.testing.assert_close(block(seen.tokens[i]), seen.tokens[i + 1], rtol=0, atol=1e-6)


def test_capture_works_on_a_hybrid():
    model = HybridCNNViT(n_classes=5, embed_dim=22, depth=2, n_heads=2, img_size=(12, 20), patch_size=4)
    assert r.capture(model, images_of(2, (12, 20))).grid == (3, 5)


def test_capture_map_gradients_match_finite_differences():
    model, images = vit().double(), images_of().double()
    seen = r.capture(model, images, gradients=True)
    gradients = torch.autograd.grad(seen.logits[:, 2].sum(), seen.maps)
    for place, gradient in enumerate(gradients):
        step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(place)).double()
        ends = [r.capture(model, images, change=lambda i, A, s=s, place=place, step=step: A + s * 1e-5 * step * (
            i == place)).logits[:, 2].sum() for s in (1, -1)]
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, (gradient * step).sum(), rtol=1e-6, atol=1e-8)


def test_capture_gives_map_gradients_for_frozen_weights():
    model = vit().requires_grad_(False)
    seen = r.capture(model, images_of(), gradients=True)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(seen.logits.sum(), seen.maps))
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- Other libraries


@pytest.mark.parametrize("name", BUILDERS)
def test_capture_of_other_libraries_matches_ours(name, tmp_path):
    theirs, ours, images = shared(name, tmp_path)
    seen, expected = r.capture(theirs, images), r.capture(ours, images)
    assert len(seen.maps) == len(expected.maps) == DEPTH
    for a, b in zip([*seen.maps, *seen.tokens, seen.logits], [*expected.maps, *expected.tokens, expected.logits],
                    strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5 if "eager" in name else 1e-10)
    for found, wanted in zip(seen.maps, expected.maps, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5 if "eager" in name else 1e-12)
        torch.testing.assert_close(found.sum(dim=-1), torch.ones_like(found[..., 0]))
    assert [table.shape for table, _ in seen.adapter.tables] == [table.shape for table, _ in expected.adapter.tables]
    assert (seen.grid, seen.adapter.n_prefix, seen.adapter.pool, seen.adapter.patch_size) == (
        expected.grid, expected.adapter.n_prefix, expected.adapter.pool, expected.adapter.patch_size)
    torch.testing.assert_close(seen.adapter.positions, expected.adapter.positions, rtol=0, atol=1e-12)
    tokens = expected.tokens[1]
    torch.testing.assert_close(seen.adapter.read(tokens), expected.adapter.read(tokens), rtol=0, atol=1e-10)


def test_capture_sees_two_prefix_tokens_in_deit():
    torch.manual_seed(0)
    model = transformers.DeiTForImageClassification(transformers.DeiTConfig(**HF)).eval()
    seen = r.capture(model, images_of(2, (15, 15)))
    assert (seen.adapter.n_prefix, len(seen.maps), tuple(seen.maps[0].shape)) == (2, DEPTH, (2, 7, 11, 11))
    torch.testing.assert_close(seen.adapter.read(seen.tokens[-1]), seen.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("build", [vit, torchvision_vit, timm_vit])
def test_capture_leaves_the_model_as_it_was(build):
    model = build().train()
    model.requires_grad_(True)
    weights, state = copy.deepcopy(model.state_dict()), set(vars(model))
    images = images_of(2, SIZE if build is vit else (15, 15))
    r.capture(model, images, gradients=True)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert set(vars(model)) == state
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class Failing(nn.Module):
    def forward(self, x):
        raise ZeroDivisionError


def test_capture_removes_hooks_and_recorder_after_an_error():
    model = vit()
    model.norm = Failing()
    with pytest.raises(ZeroDivisionError):
        r.capture(model, images_of())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()


# ---- What is refused


def test_capture_refuses_a_convnet():
    with pytest.raises(InputError, match=r"\Aa ConvNet has no attention maps; use a ViT[^\n]*\Z"):
        r.capture(ConvNet(img_size=29, n_classes=5), images_of(1, (29, 29)))


class Sharp(nn.Module):
    """Attention that hides its softmax: maps of another temperature are seen than those that count."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, **options):
        q, k, v = self.inner.qkv(x).unflatten(2, (3, self.inner.num_heads, -1)).permute(2, 0, 3, 1, 4)
        (q @ k.transpose(2, 3)).softmax(dim=-1)
        if len(torch.overrides._get_current_function_mode_stack()):
            return self.inner.proj(v.transpose(1, 2).flatten(2))
        return self.inner(x)


def test_capture_refuses_maps_the_model_does_not_use():
    torch.manual_seed(0)
    model = timm_vit().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    for block in model.blocks:
        block.attn = Sharp(block.attn)
    with pytest.raises(InputError, match="returns different logits from an ordinary forward pass"):
        r.capture(model, images_of(1, (15, 15)))


@pytest.mark.parametrize(("size", "apart", "right"), [(1000, 0.09, True), (1000, 0.11, False), (0.1, 0.9e-4, True),
                                                      (0.1, 1.1e-4, False)])
def test_capture_allows_rounding_by_the_size_of_the_logits(size, apart, right):
    """A ten-thousandth of the largest logit, of 1 for smaller ones."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 15 * 15, 2, dtype=torch.float64))
    nn.init.zeros_(model[1].weight)
    model[1].bias = nn.Parameter(torch.tensor([size, -size / 2]).double())
    seen = model[1].bias.detach()[None] + torch.tensor([0.0, apart])
    if right:
        r.check_same_logits(model, images_of(1, (15, 15)).double(), seen)
    else:
        with pytest.raises(InputError, match="returns different logits"):
            r.check_same_logits(model, images_of(1, (15, 15)).double(), seen)


def test_capture_refuses_too_few_maps():
    model = timm_vit()
    model.blocks[1] = nn.Identity()
    with pytest.raises(InputError, match=r"computed 2 attention maps over .*; expected 3"):
        r.capture(model, images_of(1, (15, 15)))


@pytest.mark.parametrize("more", [dict(is_causal=True), dict(enable_gqa=True)])
def test_attention_capture_refuses_other_kinds_of_attention(more):
    q = torch.randn(1, 2, 3, 4)
    with r.AttentionCapture(), pytest.raises(InputError, match="a ViT has no"):
        F.scaled_dot_product_attention(q, q, q, **more)


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True]] * 3), torch.tensor([[0.5, -1.0, 2.0]] * 3)])
def test_attention_capture_matches_torchs_attention(mask):
    q, k, v = torch.randn(3, 1, 2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    with r.AttentionCapture() as recorder:
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert recorder.kept[0].shape == (1, 2, 3, 3)


def test_attention_capture_ignores_other_softmaxes():
    with r.AttentionCapture() as recorder:
        torch.randn(2, CLASSES).softmax(dim=-1)
        torch.randn(2, 3, 4, 5).softmax(dim=-1)
    assert recorder.kept == []


# ---- Heads, names, precisions, sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_attention_maps_work_in_other_precisions(dtype):
    expected = r.attention_maps(vit().double(), images_of())
    found = r.attention_maps(vit().to(dtype), images_of())
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02)
    r.capture(timm_vit().to(dtype), images_of(1, (15, 15)))  # its answers are the same to its own rounding


def test_adapt_reads_the_current_head():
    model = vit(n_classes=0)
    assert (adapt(model).has_head, adapt(model).n_classes) == (False, None)
    model.head = nn.Linear(22, 4)
    assert (adapt(model).has_head, adapt(model).n_classes) == (True, 4)
    model.preprocessing = Preprocessing(SIZE, class_names=["a", "b", "c"])
    assert adapt(model).class_names is None  # they are of another head
    model.preprocessing = Preprocessing(SIZE, class_names=["a", "b", "c", "d"])
    assert adapt(model).class_names == ["a", "b", "c", "d"]
    other = torchvision_vit()
    other.heads = nn.Identity()
    assert not adapt(other).has_head
    third = transformers.ViTForImageClassification(transformers.ViTConfig(**HF))
    assert adapt(third).class_names[2] == "LABEL_2"


def test_adapt_orders_class_names_by_number(tmp_path):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**HF | dict(num_labels=12)))
    names = [f"name {i}" for i in range(12)]
    model.config.id2label = {str(i): name for i, name in enumerate(names)}  # as transformers' own example has it
    model.save_pretrained(tmp_path)  # whose file is sorted by words: 0, 1, 10, 11, 2
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert list(loaded.config.id2label.values()) != names
    assert adapt(loaded).class_names == adapt(model).class_names == names
    loaded.config.id2label = {i + 1: name for i, name in enumerate(names)}
    assert adapt(loaded).class_names is None


def test_adapt_sees_two_tokens_in_a_distilled_model():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32)
    assert adapt(model).pool == "CLS and the distillation token"
    assert r.capture(model, images_of(1, (32, 32))).maps[0].shape == (1, 3, 6, 6)


def test_capture_handles_no_class_token_and_late_norm():
    model = timm_vit(class_token=False, global_pool="avg", fc_norm=True).eval()
    seen = r.capture(model, images_of(2, (15, 15)))
    assert (seen.adapter.n_prefix, seen.adapter.pool) == (0, "mean")
    torch.testing.assert_close(seen.adapter.read(seen.tokens[-1]), seen.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("build", [lambda: timm_vit(dynamic_img_size=True), lambda: vit(img_size=15, patch_size=5)])
def test_capture_takes_another_size_where_allowed(build):
    model = build()
    if isinstance(model, VisionTransformer):
        model.any_size = True
    assert r.capture(model, images_of(1, (10, 20))).grid == (2, 4)


@pytest.mark.parametrize("build", [vit, lambda: timm_vit(img_size=(14, 15), patch_size=(7, 5))])
@pytest.mark.parametrize(("images", "words"), [
    (torch.zeros(3, 14, 15), "expected"), (torch.zeros(1, 3, 28, 15), r"(expected 14x15|expected \(B, 3, 14, 15\))"),
    (torch.zeros(1, 1, 14, 15), "expected"), ([torch.zeros(3, 14, 15)], "as a list"),
    (torch.zeros(0, 3, 14, 15), r"\(0, 3, 14, 15\), which contains no image"),
    (torch.zeros(1, 3, 14, 15, dtype=torch.uint8), "got images of torch.uint8")])
def test_capture_refuses_images_that_do_not_fit(build, images, words):
    with pytest.raises(InputError, match=rf"\A[^\n]*{words}[^\n]*\Z"):
        r.capture(build(), images, gradients=True)


def test_capture_errors_suit_the_models_library():
    with pytest.raises(InputError, match="resize_positions"):
        r.capture(vit(), images_of(1, (28, 15)))
    for build in (timm_vit, torchvision_vit, transformers_vit):
        for images in (images_of(1, (20, 15)), images_of(1, (15, 15))[:, :1], images_of(1, (15, 15))[0]):
            with pytest.raises(InputError, match=r"expected \(B, 3, 15, 15\); convert or resize them\Z"):
                r.capture(build(), images)
    with pytest.raises(InputError, match=r"\Aimg_size 12x20 is not divisible by patch_size 5x5[^\n]*\Z"):
        r.capture(timm_vit(dynamic_img_size=True), images_of(1, (12, 20)))


def test_capture_refuses_gradients_under_checkpointing():
    model = timm_vit().eval()
    model.set_grad_checkpointing(True)
    for track_finite in (lambda: r.capture(model, images_of(1, (15, 15)), gradients=True),
                  lambda: r.watch_layer(model, model.blocks[1], images_of(1, (15, 15)))):
        with pytest.raises(InputError, match=r"\A[^\n]*call model.set_grad_checkpointing\(False\) first\Z"):
            track_finite()
    assert len(r.capture(model, images_of(1, (15, 15))).maps) == DEPTH
    theirs = transformers_vit()
    theirs.gradient_checkpointing_enable()  # which takes effect in training alone
    seen = r.capture(theirs.train(), images_of(1, (15, 15)), gradients=True)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(seen.logits.sum(), seen.maps))


@pytest.mark.parametrize("build", [lambda: vit(img_size=15, patch_size=5), timm_vit, transformers_vit])
def test_capture_refuses_nan_and_infinity(build):
    model = build()
    list(model.parameters())[-1].data[0] = torch.nan  # the bias of the head
    with pytest.raises(r.NoNumbers, match=r"\Athis \w+ returns NaN or infinity for these images; [^\n]*\Z"):
        r.capture(model, images_of(1, (15, 15)))
    headless = vit(n_classes=0)
    headless.norm = nn.Identity()  # so that nothing but a map is wrong
    with pytest.raises(r.NoNumbers):
        r.capture(headless, images_of(), change=lambda block, attention: attention.fill_(torch.inf))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_capture_gives_gradients_even_under_no_grad(mode):
    model, plain = vit(), r.capture(vit(), images_of(), gradients=True)
    expected = torch.autograd.grad(plain.logits.square().sum(), plain.maps)
    with mode():
        images = images_of()  # in inference mode a tensor that autograd does not take
        seen = r.capture(model, images, gradients=True)
        pixels, output, logits = r.watch_layer(model, model.blocks[1], images)
        assert not r.capture(model, images).logits.requires_grad
        with r.differentiable():
            found = torch.autograd.grad(seen.logits.square().sum(), seen.maps)
            assert torch.autograd.grad(logits.sum(), (pixels, output))[0].abs().sum() > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_capture_gives_inference_mode_models_maps_without_gradients():
    with torch.inference_mode():
        model = vit()
    images = images_of()
    assert len(r.capture(model, images).maps) == DEPTH
    for track_finite in (lambda: r.capture(model, images, gradients=True),
                  lambda: r.watch_layer(model, model.blocks[1], images)):
        with pytest.raises(InputError, match=r"\A[^\n]*created inside torch.inference_mode[^\n]*load it outside\Z"):
            track_finite()


def test_capture_refuses_a_timm_hybrid():
    model = timm_vit()
    model.patch_embed.proj = nn.Identity()
    with pytest.raises(InputError, match="does not make its tokens by one projection"):
        r.capture(model, images_of(1, (15, 15)))


class Explicit(nn.Module):
    """Attention as timm and transformers write it without torch's fused function: scaled before or after, a bias."""

    def __init__(self, after, bias):
        super().__init__()
        self.after, self.bias = after, bias

    def forward(self, q, k, v):
        scores = (q @ k.transpose(-2, -1)) * 0.3 if self.after else (q * 0.3) @ k.transpose(-2, -1)
        if self.bias is not None:
            scores = scores + self.bias
        return scores.softmax(dim=-1) @ v


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", ["no bias", "bias", "mask", "bias and mask"])
def test_attended_has_the_queries_and_keys_of_explicit_attention(after, kind):
    generator = torch.Generator().manual_seed(0)
    q, k, v = 4 * torch.randn(3, 2, 3, 5, 4, generator=generator).double()
    bias = torch.randn(3, 5, 5, generator=generator).double() * ("bias" in kind) if kind != "no bias" else None
    if "mask" in kind:
        bias[1, :, 3] = -torch.inf
    with r.AttentionCapture(keep=lambda block, attended: attended) as recorder:
        Explicit(after, bias)(q, k, v)
    attended = recorder.kept[0]
    scores = attended.query @ attended.key.transpose(-2, -1)
    scores = scores if attended.bias is None else scores + attended.bias
    torch.testing.assert_close(scores.softmax(dim=-1), attended.maps, rtol=0, atol=1e-12)
    assert recorder.product is None  # which would hold a map of its own until the next block
    assert (attended.bias is None) == (kind == "no bias")
    if kind == "bias":
        assert attended.bias.std() < 1.1 * bias.std()  # it holds nothing of the scores themselves
    if kind == "mask":
        assert attended.bias[attended.bias.isfinite()].abs().max() < 1e-12


def test_keep_reduces_each_block_and_none_computes_no_map():
    model, images = vit(), images_of(2)
    whole = r.capture(model, images)
    rows = r.capture(model, images, keep=lambda block, attended: attended.maps[:, :, 0])
    for row, one in zip(rows.maps, whole.maps, strict=True):
        assert torch.equal(row, one[:, :, 0])
    tokens = r.capture(model, images, keep=None)
    assert tokens.maps == []
    for one, other in zip(tokens.tokens, whole.tokens, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_keep_holds_the_maps_of_one_block_at_a_time():
    alive, sizes = [], []

    def keep(block, attended):
        assert not any(ref() is not None for ref in alive)
        alive.append(weakref.ref(attended.maps))
        return attended.maps[:, :, 0]

    for row in r.capture(vit(), images_of(2), keep=keep).maps:
        sizes.append(row.untyped_storage().nbytes())
    assert sizes == [4 * 2 * 2 * N] * 3  # the rows alone, not the maps of which they were a part


# ---- Backward, block by block


def answer(logits):
    return logits[:, 2].sum() + logits.square().sum()


MODELS = {
    "registers": lambda: vit(n_registers=2), "mean": lambda: vit(pool="mean"), "qk_norm": lambda: vit(qk_norm=True),
    "fc_norm": lambda: vit(pool="mean", fc_norm=True), "frozen": lambda: vit().requires_grad_(False),
    "hybrid": lambda: HybridCNNViT(n_classes=5, embed_dim=22, depth=2, n_heads=2, img_size=(12, 20), patch_size=4),
    "timm, checkpointing": timm_vit, "timm, layer scale": lambda: timm_vit(init_values=0.3),
    "timm, mean of all": lambda: timm_vit(global_pool="avg", pool_include_prefix=True),
    "timm, distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2),
    "torchvision": torchvision_vit, "transformers, eager": lambda: transformers_vit("eager"),
    "transformers, DeiT": lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**HF)),
}  # all the ways in which blocks are called and heads read


@pytest.mark.parametrize("name", MODELS)
def test_backward_by_blocks_is_the_whole_backward_pass(name):
    model, generator = MODELS[name](), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    modes = [module.training for module in model.modules()]
    images = images_of(2, tuple(adapt(model).img_size))
    whole = r.capture(model, images, gradients=True)
    if "checkpointing" in name:
        model.set_grad_checkpointing(True)  # which nothing whole could be asked of
    tokens = torch.autograd.grad(answer(whole.logits), whole.tokens, retain_graph=True)
    to_maps = torch.autograd.grad(answer(whole.logits), whole.maps)
    with torch.inference_mode():  # whatever the caller has switched off
        seen = r.capture(model, images, keep=None)
        steps = list(r.backward_by_blocks(model, seen, answer, keep=lambda maps, gradient: (maps, gradient)))
        plain = list(r.backward_by_blocks(model, seen, answer))
    assert [step.place for step in steps] == list(range(len(whole.maps), -1, -1))
    assert (steps[0].kept, plain[-1].kept) == (None, None)
    for step, other in zip(steps, plain, strict=True):
        for found in (step, other):
            torch.testing.assert_close(found.gradient, tokens[step.place], rtol=1e-3, atol=1e-5)
    for step in steps[1:]:
        torch.testing.assert_close(step.kept[0], whole.maps[step.place].detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(step.kept[1], to_maps[step.place], rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Silent(nn.Module):
    """A stand-in for attention that attends to nothing."""

    def forward(self, x, **options):
        return x


class Demanding(nn.Module):
    """A block of transformers that cannot be called without what else it is given."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, attention_mask, **options):
        return self.inner(x, attention_mask, **options)


def test_backward_by_blocks_gives_each_block_all_that_it_was_given():
    model = transformers_vit()
    expected = list(r.backward_by_blocks(model, r.capture(model, images_of(2, (15, 15)), keep=None), answer))
    model.vit.layers[1] = Demanding(model.vit.layers[1])
    found = list(r.backward_by_blocks(model, r.capture(model, images_of(2, (15, 15)), keep=None), answer))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.gradient, other.gradient)


class Unrepeatable(nn.Module):
    """A block that gives something else when it is computed again."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.passes = inner, 0

    def forward(self, x):
        self.passes += 1
        return self.inner(x) * (1 + 0.1 * self.passes)


def test_backward_by_blocks_refuses_what_does_not_come_out_again():
    def steps(model, **changed):
        seen = r.capture(model, images_of(2, (15, 15)), keep=None)
        for name, value in changed.items():
            setattr(seen, name, value)
        return list(r.backward_by_blocks(model, seen, answer, keep=lambda maps, gradient: None))

    model = timm_vit()
    assert len(steps(model)) == DEPTH + 1
    with pytest.raises(InputError, match=r"\Awhat the head reads from the last tokens of this [^\n]* differs[^\n]*\Z"):
        steps(model, logits=torch.ones(2, CLASSES))
    model.blocks[1] = Unrepeatable(model.blocks[1])
    with pytest.raises(InputError, match=r"\Ablock 2, computed alone, of this VisionTransformer differs from [^\n]*\Z"):
        steps(model)
    model = timm_vit()
    model.blocks[2].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))  # somebody's own, between blocks
    with pytest.raises(InputError, match=r"\Athe input of block 3 of this [^\n]* differs from the whole pass[^\n]*\Z"):
        steps(model)
    model = timm_vit()
    model.blocks[1].attn = Silent()
    with pytest.raises(InputError, match=r"\Athis VisionTransformer computed no attention map[^\n]*\Z"):
        steps(model)
    with torch.inference_mode():
        frozen = timm_vit()
    with pytest.raises(InputError, match=r"created inside torch\.inference_mode"):
        steps(frozen)
