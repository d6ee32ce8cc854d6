"""Models of other libraries: what their adapters say against what the libraries themselves compute, every view on every
one of them, and what is refused, in which words."""

import warnings
from functools import partial

import pytest
import timm
import torch
import torchvision
import transformers
from other_models import (
    CLASSES,
    DEPTH,
    HEADLESS,
    HEADS,
    PATCH,
    POOLED,
    SIDE,
    SINGLE,
    WITH_HEAD,
    D,
    DinoVisionTransformer,
    of_transformers,
    randomised,
    some_images,
    timm_vit,
    torchvision_vit,
    transformers_beit,
)
from PIL import Image
from timm.models.beit import Block as BeitBlock
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import nn

import visualizations as v
from vit_bridge.analysis.capture import capture
from vit_bridge.analysis.explanations import explain, relevance_gained, rollout
from vit_bridge.analysis.selfcheck import selfcheck
from vit_bridge.analysis.similarity import layer_similarity
from vit_bridge.data.images import prepare_image
from vit_bridge.errors import Assumption
from vit_bridge.models.adapters import adapt, reading_weights
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.plots.look import draw_look, look
from vit_bridge.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from vit_bridge.runtime import unwrapped
from vit_bridge.weights.checkpoints import load
from vit_model import InputError, VisionTransformer

MODELS = WITH_HEAD | HEADLESS
every_model = pytest.mark.parametrize("name", MODELS)


def built(name):
    return randomised(MODELS[name][0]())


# ---- Against the libraries themselves ---------------------------------------------------------------------


def own_maps(model, images):
    """The maps of each block by the library's own explicit attention, (B, H, N, N) each."""
    if isinstance(model, transformers.PreTrainedModel):
        model.set_attn_implementation("eager")
        return model(images, output_attentions=True).attentions
    maps, blocks = [], [part for part in model.modules()
                        if hasattr(part, "self_attention") or isinstance(part, Block | BeitBlock)]
    for block in blocks:
        if hasattr(block, "attn"):
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
        else:
            block.self_attention.register_forward_pre_hook(lambda attention, args: maps.append(
                nn.MultiheadAttention.forward(attention, *args, average_attn_weights=False)[1]))
    model(images)
    return maps


def own_output(model, images):
    output = model(images)
    return output if isinstance(output, torch.Tensor) else output[next(iter(output))]


@every_model
@torch.no_grad()
def test_captured_maps_and_outputs_are_those_of_the_library(name):
    model, images, (_, pool, prefix) = built(name), some_images(), MODELS[name]
    seen, expected = capture(model, images), own_output(model, images)
    adapter, n = seen.adapter, len(prefix) + 9
    assert (adapter.pool, adapter.prefix, adapter.n_prefix, seen.grid) == (pool, prefix, len(prefix), (3, 3))
    assert adapter.n_classes == (CLASSES if name in WITH_HEAD else None)
    assert [tuple(one.shape) for one in (*seen.maps, *seen.tokens)] == [(2, HEADS, n, n)] * DEPTH + [(2, n, D)] * (
        DEPTH + 1)
    torch.testing.assert_close(seen.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.read(seen.tokens[-1]), expected, rtol=1e-4, atol=1e-4)
    if adapter.positions is not None:
        assert adapter.positions.shape == (9, D)
    for found, own in zip(seen.maps, own_maps(model, images), strict=True):
        torch.testing.assert_close(found, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if "Model" in name or "For" in name])
def test_captured_tokens_are_the_hidden_states_of_transformers(name):
    model, images = built(name), some_images()
    for found, own in zip(capture(model, images).tokens, model(images, output_hidden_states=True).hidden_states,
                          strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("block", [Block, ResPostBlock, ParallelScalingBlock])
def test_capture_of_timm_is_the_same_with_and_without_fused_attention(fused, block):
    model, images = randomised(timm_vit(block_fn=block)), some_images()
    expected = capture(model, images)
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    for one, other in zip(capture(model, images).maps, expected.maps, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Dinov2WithRegistersForImageClassification", "DeiTForImageClassificationWithTeacher",
                                  "timm, mean", "ViTModel", "the hub's DINOv2"])
def test_selfcheck_holds_in_half_precision(name, precision):
    assert not [check for check in selfcheck(built(name).to(precision), some_images()) if check.holds is False]


@pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2ForImageClassification", "Dinov2WithRegistersModel",
                                  "timm, DINOv2 with registers", "BeitForImageClassification", "BeitModel",
                                  "BeitForImageClassification, CLS and positions"])
def test_dinov2_and_beit_of_transformers_take_any_size(name):
    model, images = built(name), some_images(1, (2 * PATCH, 4 * PATCH))
    seen = capture(model, images)
    assert seen.grid == (2, 4)
    torch.testing.assert_close(seen.logits, own_output(model, images), rtol=1e-4, atol=1e-4)
    assert explain(model, images, "attention").saliency.shape == (1, 2, 4)


@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel", "ViTMSNModel", "IJepaModel", "torchvision, no head", "timm",
                                  "timm, BEiT"])
def test_other_models_take_their_own_size_alone(name):
    with pytest.raises(InputError, match=r"\Agot images of shape \(1, 3, 10, 20\), expected \(B, 3, 15, 15\); "):
        capture(built(name), some_images(1, (10, 20)))


@pytest.mark.parametrize("name", ["Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification",
                                  "DeiTForImageClassificationWithTeacher", "DeiTForImageClassification"])
def test_views_of_the_head_weigh_the_rows_that_it_reads(name):
    model, images, (_, _, prefix) = built(name), some_images(), MODELS[name]
    first, n = len(prefix), len(prefix) + 9
    rows = torch.zeros(n, dtype=torch.float64)  # DINOv2's head: CLS half, all patches together half
    rows[0] = 1 if name == "DeiTForImageClassification" else 0.5
    if "Dinov2" in name:
        rows[first:] = 0.5 / 9
    elif "Teacher" in name:
        rows[1] = 0.5
    torch.testing.assert_close(reading_weights(adapt(model).pool, first, n), rows)
    found = {method: explain(model, images, method, 2).saliency for method in ("attention", "rollout", "relevance")}
    model.set_attn_implementation("eager")
    output = model(images, output_attentions=True)
    maps = torch.stack(output.attentions)
    gradients = torch.stack(torch.autograd.grad(output.logits[:, 2].sum(), output.attentions))
    for method, matrix in dict(attention=maps[-1].mean(dim=1), rollout=rollout(maps),
                               relevance=relevance_gained(maps, gradients)).items():
        expected = torch.einsum("t,btn->bn", rows.float(), matrix)[:, first:].reshape(2, 3, 3)
        torch.testing.assert_close(found[method], expected.detach(), rtol=1e-3, atol=1e-6)


# ---- Every view on every model ----------------------------------------------------------------------------


def drawn_by(method, **options):
    return lambda model, images: getattr(v.AttentionVisualizer(model, "cpu"), method)(images[:1], **options)


def checked(model, images):
    assert not [check for check in v.AttentionVisualizer(model, "cpu").selfcheck(images) if check.holds is False]


# What a view needs: nothing but attention, a row of tokens that is read, a head, or a head and such a row.
NOTHING, ROW, HEAD, BOTH = "nothing", "row", "head", "head and row"
VIEWS = {
    **{name: (NOTHING, drawn_by(name)) for name in ("attention_maps", "attention_distance", "visualize_token_norms",
                                                    "visualize_attention_distance")},
    **{name: (ROW, drawn_by(name)) for name in ("visualize_attention", "visualize_all_layers", "rollout",
                                                "visualize_rollout")},
    "visualize_all_heads": (ROW, drawn_by("visualize_all_heads", layers=[-1])),
    **{name: (HEAD, drawn_by(name)) for name in ("grad_cam", "visualize_grad_cam", "visualize_logit_lens")},
    **{name: (BOTH, drawn_by(name)) for name in ("relevance", "visualize_relevance")},
    "visualize_explanations": (HEAD, drawn_by("visualize_explanations", n_steps=1, n_draws=1)),
    "visualize_attention of a patch": (NOTHING, drawn_by("visualize_attention", patch=(0, 1))),
    "visualize_all_heads of a patch": (NOTHING, drawn_by("visualize_all_heads", layers=[0], patch=(2, -1))),
    "explore": (ROW, drawn_by("explore", save_path=None)),
    "visualize_attention_grid": (ROW, v.visualize_attention_grid),
    "visualize_features": (NOTHING, v.visualize_features),
    "visualize_positions": (NOTHING, lambda model, images: v.visualize_positions(model)),
    "visualize_bias_tables": (NOTHING, lambda model, images: v.visualize_bias_tables(model)),
    "look": (ROW, lambda model, images: draw_look(look(model, images[0]), "it")),
    "layer_similarity": (NOTHING, lambda model, images: layer_similarity(model, model, some_images(5))),
    "visualize_patch_filters": (NOTHING, lambda model, images: v.visualize_patch_filters(model, 4)),
    "compare_receptive_fields": (NOTHING, lambda model, images: v.compare_receptive_fields(
        None, {"it": model}, images)),
    "selfcheck": (NOTHING, checked),
}
NO_HEAD = ("this {name} has no head, so there is no class to explain; use a model with a head, or the views "
           "'attention' or 'rollout'")
NO_ANSWER = "this {name} has no head, so hiding patches cannot change a prediction; use a model with a head"
NO_ROW = ("the head reads {pool}, so no row of an attention map belongs to it; use visualize_attention or "
          "visualize_all_heads with patch=(row, column)")
NO_POSITIONS = ("a {name} has no position embeddings, but a bias for each offset between two tokens; use "
                "visualize_bias_tables")
NO_TABLES = "this {name} has no relative position bias; use a Swin Transformer with relative_bias=True, or a BEiT"

def expected_of(name, view, needs):
    """"ok", or the words in which a view is refused."""
    words, pool = {"name": type(MODELS[name][0]()).__name__, "pool": MODELS[name][1]}, MODELS[name][1]
    if view == "visualize_positions" and "Beit" in words["name"] and "positions" not in name:
        return NO_POSITIONS.format(**words)
    if view == "visualize_bias_tables" and "Beit" not in words["name"]:
        return NO_TABLES.format(**words)
    if name in HEADLESS and needs in (HEAD, BOTH):
        return (NO_ANSWER if view == "visualize_explanations" else NO_HEAD).format(**words)
    return NO_ROW.format(**words) if pool in (POOLED, SINGLE) and needs in (ROW, BOTH) else "ok"


@every_model
def test_every_view_is_drawn_or_refused_with_the_reason(name):
    model, images, found, expected = built(name), some_images(), {}, {}
    for view, (needs, draw) in VIEWS.items():
        expected[view] = expected_of(name, view, needs)
        try:
            draw(model, images)
            found[view] = "ok"
        except InputError as error:
            found[view] = str(error)
    assert found == expected


def test_views_say_what_is_read_where_the_head_reads_two_things():
    views = v.AttentionVisualizer(built("Dinov2ForImageClassification"), "cpu")
    assert views.who_looks() == "Where CLS and the mean of the patches look, on average"
    assert v.AttentionVisualizer(built("ViTModel"), "cpu").who_looks() == "Where CLS looks"


# ---- What is refused --------------------------------------------------------------------------------------


class Shifted(timm.models.VisionTransformer):
    """A head that its adapter does not know of."""

    def forward(self, x):
        return super().forward(x) + 1


class KernelOfItsOwn(nn.Module):
    """Attention that no function of torch's for attention takes part in, as that of xFormers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, **options):
        q, k, v = self.inner.qkv(x).unflatten(2, (3, self.inner.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.einsum("bhid,bhjd->bhij", q * self.inner.scale, k).exp()
        return self.inner.proj((weights / weights.sum(dim=-1, keepdim=True) @ v).transpose(1, 2).flatten(2))


def with_kernel():
    model = timm_vit()
    for block in model.blocks:
        block.attn = KernelOfItsOwn(block.attn)
    return model


REFUSED = {
    "two maps a head": (partial(timm_vit, attn_layer="diff", num_heads=2), "uses DiffAttention, the difference"),
    "two attentions a block": (partial(timm_vit, block_fn=ParallelThingsBlock), "6 attention maps over .* expected 3"),
    "logits of each token": (partial(timm_vit, global_pool=""), r"computes logits for each token \(global_po"),
    "stem of a CNN": (partial(timm.create_model, "vit_tiny_r_s16_p8_224", img_size=64), "does not make its tokens by"),
    "another head": (lambda: Shifted(SIDE, PATCH, num_classes=CLASSES, embed_dim=D, depth=DEPTH, num_heads=HEADS),
                     r"does not read its last tokens as a timm ViT with this head does \(la"),
    "another kernel": (with_kernel, "this VisionTransformer computed no attention map that could be captured"),
    "pixels as output": (partial(of_transformers, "ViTForMaskedImageModeling", encoder_stride=PATCH),
                         r"is not supported; pass the ViTModel inside it, its module 'vit'\Z"),
    "a BEiT of 2 x 5 patches": (partial(transformers_beit, image_size=(10, 25)),
                                "form no square, and transformers then"),
    "patches hidden at random": (partial(of_transformers, "ViTMAEModel"), "class ViTMAEModel is not supported; exp"),
    "maps as output": (partial(of_transformers, "Dinov2Backbone"), r"try load\(\)\Z"),
    "a tuple as output": (partial(of_transformers, "ViTModel", return_dict=False), "this ViTModel returns a tuple"),
    "a part of another module": (lambda: nn.Sequential(torchvision_vit(), nn.Linear(CLASSES, 2)),
                                 r"not supported; pass the VisionTransformer inside it, its module '0'\Z"),
    "ours in another module": (lambda: nn.ModuleDict({"vit": HybridCNNViT(embed_dim=32, depth=1, img_size=32)}),
                               "pass the HybridCNNViT inside it, its module 'vit'"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_models_that_are_not_known_are_refused_in_one_line(why):
    build, words = REFUSED[why]
    model = randomised(build())
    size = 64 if why == "stem of a CNN" else SIDE
    with pytest.raises(InputError, match=r"\A[^\n]*\Z") as error:
        capture(model, some_images(1, (size, size)))
    assert error.match(words)


# ---- What their images must be ----------------------------------------------------------------------------


def image_facts(model):
    """(mean, std, interpolation, what is assumed) when an image is prepared."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Assumption)
        prepare_image(Image.new("RGB", (20, 30)), model)
    shown = adapt(model).preprocessing
    return shown.mean, shown.std, shown.interpolation, [str(warning.message) for warning in caught]


HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(("build", "numbers", "interpolation", "assumed"), [
    (MODELS["ViTModel"][0], HALF, "bilinear", "assuming mean 0.5 and std 0.5 (as in Google's"),
    (MODELS["ViTForImageClassification"][0], HALF, "bilinear", "assuming mean 0.5 and std 0.5 (as in Google's"),
    (MODELS["DeiTModel"][0], IMAGENET, "bicubic", None), (MODELS["Dinov2Model"][0], IMAGENET, "bicubic", None),
    (MODELS["ViTMSNModel"][0], IMAGENET, "bilinear", None), (torchvision_vit, IMAGENET, "bilinear", None),
    (MODELS["IJepaModel"][0], IMAGENET, "bilinear", "ImageNet's, as in I-JEPA's training"),
    (DinoVisionTransformer, IMAGENET, "bicubic", None),
    (transformers_beit, HALF, "bicubic", "assuming mean 0.5 and std 0.5 (as in BEiT's"),
    (partial(timm.create_model, "beit_base_patch16_224", img_size=32, depth=1), HALF, "bicubic", None),
    (timm_vit, IMAGENET, "bilinear", "assuming mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225) (Image"),
    (partial(timm.create_model, "vit_tiny_patch16_224", img_size=32), HALF, "bicubic", None),
    (partial(timm.create_model, "deit_tiny_distilled_patch16_224", img_size=32), IMAGENET, "bicubic", None),
])
def test_images_are_normalised_as_the_library_records_or_as_is_assumed(build, numbers, interpolation, assumed):
    model = build()
    *found, said = image_facts(model)
    assert tuple(found) == (*numbers, interpolation)
    assert [assumed in line for line in said] == [True] * (assumed is not None)
    model.preprocessing = Preprocessing(adapt(model).img_size, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert image_facts(model) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", [])


# ---- The hub's DINOv2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_registers", [0, 2])
@pytest.mark.parametrize("n_chunks", [0, 1, 3])
def test_state_dict_of_the_hubs_dinov2_opens_as_our_model(n_registers, n_chunks, tmp_path):
    theirs, images = randomised(DinoVisionTransformer(n_registers, n_chunks)), some_images()
    torch.save(theirs.state_dict(), tmp_path / "dinov2.pth")
    ours = load(tmp_path / "dinov2.pth", n_heads=HEADS)
    assert type(ours) is VisionTransformer
    assert (adapt(ours).prefix, adapt(theirs).prefix) == (("CLS",) + ("register",) * n_registers,) * 2
    seen, expected = capture(ours, images), capture(theirs, images)
    for found, own in zip([*seen.maps, *seen.tokens, seen.logits], [*expected.maps, *expected.tokens, expected.logits],
                          strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


def test_wrapped_models_of_other_libraries_are_known():
    model = built("Dinov2Model")
    assert unwrapped(nn.DataParallel(model)) is model
    assert adapt(nn.DataParallel(model)).n_prefix == 1


def test_adapt_knows_models_made_from_a_class_that_it_knows():
    class Own(torchvision.models.VisionTransformer):
        pass

    model = randomised(Own(SIDE, PATCH, DEPTH, HEADS, D, 3 * D, num_classes=CLASSES))
    assert capture(model, some_images()).adapter.library == "torchvision"
