"""Each method against its closed form, a hand-computed value or a finite difference, and against other libraries."""

import math
from itertools import accumulate

import numpy as np
import pytest
import torch
import torchvision
import transformers
from other_models import BUILDERS, shared
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.profiler import ProfilerActivity, profile

from vit_bridge.analysis import explanations as e
from vit_bridge.analysis.attention import mean_distances
from vit_bridge.analysis.capture import capture
from vit_bridge.analysis.receptive_field import receptive_field
from vit_bridge.analysis.selfcheck import Nudge, selfcheck
from vit_bridge.data.images import prepare_image, sample_photographs
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.preprocessing import Preprocessing, Whole
from vit_bridge.weights.checkpoints import load
from vit_model import InputError, VisionTransformer

SIZE, PATCH, GRID, N, L, H = (14, 15), (7, 5), (2, 3), 7, 3, 2


def vit(**options):
    settings = dict(img_size=SIZE, patch_size=PATCH, n_classes=5, embed_dim=22, depth=L, n_heads=H)
    model = VisionTransformer(**{**settings, **options}).double().eval()
    torch.manual_seed(13)  # after the model: how many numbers its initialisation draws depends on torch's version
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def images_of(n=3, size=SIZE):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1)).double()


def random_maps(seed=0, shape=(L, 2, H, N, N)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double().softmax(dim=-1)


# ---- Rollout


@pytest.mark.parametrize(("depth", "n"), [(1, 5), (3, 7), (12, 197)])
def test_rollout_of_uniform_attention_is_its_closed_form(depth, n):
    expected = 2.0**-depth * np.eye(n) + (1 - 2.0**-depth) * np.full((n, n), 1 / n)
    found = e.rollout(torch.full((depth, 2, 3, n, n), 1 / n).double())
    np.testing.assert_allclose(found, np.stack([expected] * 2), atol=1e-14)


def test_rollout_goes_from_the_last_block_to_the_first():
    maps = random_maps()
    half = [(maps[i].mean(dim=1).numpy() + np.eye(N)) / 2 for i in range(L)]
    np.testing.assert_allclose(e.rollout(maps), half[2] @ half[1] @ half[0], atol=1e-14)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9])
def test_rollout_rows_sum_to_one(ratio):
    sums = e.rollout(random_maps(), ratio).sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones(2, N).double(), rtol=0, atol=1e-14)


def test_rollout_discards_the_smallest_weights():
    maps = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.15, 0.05, 0.8]]).double()[None, None, None]
    kept = np.array([[1.6, 0.3, 0], [0, 1.5, 0.3], [0, 0, 1.8]])  # 4 of 9 are dropped: 0.05, 0.1, 0.15, 0.2
    np.testing.assert_allclose(e.rollout(maps, 0.45)[0], kept / kept.sum(axis=1, keepdims=True), atol=1e-14)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, math.nan])
def test_rollout_refuses_a_ratio_out_of_range(ratio):
    with pytest.raises(InputError, match="discard_ratio"):
        e.rollout(random_maps(), ratio)


# ---- Relevance


def test_relevance_matches_its_definition():
    maps, gradients = random_maps(), random_maps(1) - random_maps(2)
    for image in range(2):
        expected = np.eye(N)
        for block in range(L):
            speaking = np.mean([np.maximum(maps[block, image, h].numpy() * gradients[block, image, h].numpy(), 0)
                                for h in range(H)], axis=0)
            expected = expected + speaking @ expected
        np.testing.assert_allclose(e.relevance(maps, gradients)[image], expected, atol=1e-14)


def test_relevance_heads_do_not_cancel_each_other():
    maps = torch.full((1, 1, 2, 2, 2), 0.5).double()
    gradients = torch.stack([torch.ones(2, 2), -torch.ones(2, 2)])[None, None].double()
    np.testing.assert_allclose(e.relevance(maps, gradients)[0], [[1.25, 0.25], [0.25, 1.25]])


def test_relevance_pairs_each_gradient_with_its_map():
    model, images = vit(), images_of()
    found = e.explain(model, images, "relevance", target=3)
    seen = capture(model, images)
    speaking = []
    for block in range(L):  # the gradient by differences, one weight at a time, of the first image
        A, gradient = seen.maps[block][:1], torch.zeros(H, N, N).double()
        for place in np.ndindex(H, N, N):
            step = torch.zeros_like(A)
            step[0][place] = 1e-6
            ends = [capture(model, images[:1], change=Nudge(block, sign * step)).logits[0, 3] for sign in (1, -1)]
            gradient[place] = (ends[0] - ends[1]) / 2e-6
        speaking.append((A[0] * gradient).clamp(min=0).mean(dim=0))
    related = torch.eye(N).double()
    for block in speaking:
        related = related + block @ related
    torch.testing.assert_close(found.saliency[0], related[0, 1:].view(GRID), rtol=1e-6, atol=1e-9)


# ---- Grad-CAM


def test_token_cam_matches_a_hand_value():
    features = torch.tensor([[[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]]])
    gradients = torch.tensor([[[1.0, 0.0], [2.0, -3.0], [3.0, 0.0]]])  # means 2 and -1
    assert e.token_cam(features, gradients).tolist() == [[0.0, 7.0, 0.0]]


@pytest.mark.parametrize(("options", "layer"), [({}, L - 2), (dict(pool="mean"), L - 1), (dict(n_registers=2), L - 2)])
def test_grad_cam_uses_the_last_block_the_head_sees(options, layer):
    model, images = vit(**options), images_of()
    found = e.explain(model, images, "grad_cam").saliency
    assert found.shape == (3, *GRID)
    assert found.sum() > 0
    assert torch.equal(found, e.explain(model, images, "grad_cam", layer_idx=layer).saliency)
    assert torch.equal(found, e.explain(model, images, "grad_cam", layer_idx=layer - L).saliency)


def test_grad_cam_says_why_the_last_block_is_blank():
    with pytest.raises(InputError, match=r"\AGrad-CAM after the last block is blank: the head reads only CLS,[^\n]*\Z"):
        e.explain(vit(), images_of(), "grad_cam", layer_idx=-1)


def test_grad_cam_matches_finite_differences_of_the_tokens():
    model, images = vit(), images_of(1)
    found = e.explain(model, images, "grad_cam", target=2, layer_idx=0).saliency[0].flatten()
    tokens = capture(model, images).tokens[1]

    def logit(x):
        for block in model.blocks[1:]:
            x = block(x)
        return model.forward_head(model.norm(x))[0, 2]

    gradient = torch.zeros(N - 1, 22).double()
    for place in np.ndindex(N - 1, 22):
        step = torch.zeros_like(tokens)
        step[0, place[0] + 1, place[1]] = 1e-6
        with torch.no_grad():
            gradient[place] = (logit(tokens + step) - logit(tokens - step)) / 2e-6
    expected = (tokens[0, 1:] * gradient.mean(dim=0)).sum(dim=1).clamp(min=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_grad_cam_of_a_convnet_weighs_its_last_features():
    torch.manual_seed(0)
    model = ConvNet(img_size=29, n_classes=5, widths=(3, 5, 7), depths=(1, 2, 1), stem_stride=1).double().eval()
    images = images_of(2, (29, 29))
    last = e.explain(model, images, "grad_cam", target=1).saliency
    features = model.forward_features(images)
    weights = model.head.weight[1] / features[0, 0].numel()  # the head reads the mean over the places
    torch.testing.assert_close(last, (features * weights[:, None, None]).sum(dim=1).clamp(min=0).detach())
    for method in ("attention", "rollout", "relevance"):
        with pytest.raises(InputError, match="ConvNet has no attention maps"):
            e.explain(model, images, method)
    comparison = e.compare_explanations(model, images, n_steps=2)
    assert set(comparison.saliencies) == {"grad_cam"}
    assert set(comparison.refused) == {"attention", "rollout", "relevance"}


# ---- All methods


@pytest.mark.parametrize("method", e.METHODS)
@pytest.mark.parametrize("name", [name for name in BUILDERS if "eager" not in name])
def test_explain_treats_other_libraries_as_ours(name, method, tmp_path):
    theirs, ours, images = shared(name, tmp_path)
    found, expected = (e.explain(model, images, method, target=4) for model in (theirs, ours))
    torch.testing.assert_close(found.saliency, expected.saliency, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=0, atol=1e-12)
    torch.testing.assert_close(e.logit_lens(theirs, images), e.logit_lens(ours, images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", e.METHODS)
@pytest.mark.parametrize("options", [{}, dict(pool="mean"), dict(n_registers=3), dict(position="none")])
def test_explain_maps_the_patches_and_keeps_the_model(options, method):
    model, images = vit(**options).train(), images_of()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    found = e.explain(model, images, method)
    assert found.saliency.shape == (3, *GRID)
    assert (found.saliency >= 0).all()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.eval()
    torch.testing.assert_close(found.probabilities, model(images).softmax(dim=1).max(dim=1).values, rtol=0, atol=1e-9)
    assert torch.equal(found.targets, model(images).argmax(dim=1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("build", ["ours", "timm", "torchvision", "transformers", "convnet"])
def test_explain_works_with_gradients_switched_off(build, mode, tmp_path):
    torch.manual_seed(0)
    model = ConvNet(img_size=15, n_classes=5, widths=(3, 5), depths=(1, 1), stem_stride=1).double() \
        if build == "convnet" else vit() if build == "ours" else shared(build, tmp_path)[0]
    size, methods = (SIZE if build == "ours" else (15, 15)), (["grad_cam"] if build == "convnet" else e.METHODS)
    expected = {method: e.explain(model, images_of(size=size), method, target=3) for method in methods}
    with mode():
        images = images_of(size=size)
        for method in methods:
            found = e.explain(model, images, method, target=torch.tensor([3, 3, 3]))
            torch.testing.assert_close(found.saliency, expected[method].saliency, equal_nan=True)
            torch.testing.assert_close(found.probabilities, expected[method].probabilities)
        compared = e.compare_explanations(model, images, n_steps=2, n_draws=2)
        assert set(compared.saliencies) == set(methods)
        if build != "convnet":
            assert all(check.holds is not False for check in selfcheck(model, images))


@pytest.mark.parametrize("build", ["ours", "timm", "torchvision", "transformers", "convnet"])
def test_explain_refuses_images_that_do_not_fit(build, tmp_path):
    model = ConvNet(img_size=15, n_classes=5, widths=(3, 5), depths=(1, 1), stem_stride=1) if build == "convnet" \
        else vit() if build == "ours" else shared(build, tmp_path)[0]
    size = SIZE if build == "ours" else (15, 15)
    bad = [torch.zeros(2, 1, *size), torch.zeros(3, *size)]
    if build != "convnet":  # which takes every size
        bad += [torch.zeros(1, 3, 48, 48), torch.zeros(1, 3, *size, dtype=torch.uint8), [torch.zeros(3, *size)]]
    for images in bad:
        for ask in (lambda x: e.explain(model, x, "grad_cam"), lambda x: e.compare_explanations(model, x)):
            with pytest.raises(InputError, match=r"\Agot images [^\n]*expected[^\n]*\Z"):
                ask(images)


def test_explain_keeps_images_apart():
    model, images = vit(), images_of()
    for method in e.METHODS:
        together = e.explain(model, images, method, target=[1, 0, 4]).saliency
        for i, target in enumerate((1, 0, 4)):
            if together[i].isnan().all():
                with pytest.raises(InputError, match="Grad-CAM is blank"):
                    e.explain(model, images[i:i + 1], method, target=target)
                continue
            alone = e.explain(model, images[i:i + 1], method, target=target).saliency[0]
            torch.testing.assert_close(together[i], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("target", [-1, 5, 1.5, [0, 1, 7]])
def test_explain_refuses_an_unknown_class(target):
    with pytest.raises(InputError, match="expected a class from 0 to 4"):
        e.explain(vit(), images_of(), target=target)


def test_explain_refuses_class_methods_without_a_head():
    model = vit(n_classes=0)
    for method in ("relevance", "grad_cam"):
        with pytest.raises(InputError, match="has no head, so there is no class to explain"):
            e.explain(model, images_of(), method)
    with pytest.raises(InputError, match="has no head"):
        e.logit_lens(model, images_of())
    assert e.explain(model, images_of(), "rollout").saliency.shape == (3, *GRID)


# ---- Tokens


def test_logit_lens_applies_the_head_to_each_block():
    model, images = vit(), images_of()
    found = e.logit_lens(model, images)
    assert found.shape == (L + 1, 3, 5)
    torch.testing.assert_close(found[-1], model(images).softmax(dim=1), rtol=0, atol=1e-12)
    first = model.forward_head(model.norm(capture(model, images).tokens[0])).softmax(dim=1)
    torch.testing.assert_close(found[0], first, rtol=0, atol=1e-12)


def test_token_norms_cover_patches_and_mark_long_ones():
    model = vit(img_size=(49, 40), n_registers=2)  # 7 x 8 patches
    seen = capture(model, images_of(size=(49, 40)), keep=None)
    seen.tokens[1][0, 3 + 12] = 100 / math.sqrt(22)  # row 1, column 4
    seen.tokens[1][:, 0] = 1e6  # CLS is no patch
    norms, artefacts = e.token_norms(seen)
    assert norms.shape == artefacts.shape == (L, 3, 7, 8)
    assert norms[0, 0, 1, 4].item() == pytest.approx(100)
    assert artefacts[0, 0].nonzero().tolist() == [[1, 4]]


def bump(rows=37, columns=37, seed=0, spread=0.12):
    """Norms whose logarithms are normal, (rows, columns)."""
    return (spread * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))).exp() * 40


def at_random(share, shape, seed=1):
    """Return a mask of a random share of all positions."""
    places = torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(seed))
    return (places < round(share * shape.numel())).view(shape)


@pytest.mark.parametrize(("share", "times"), [(0.01, 5), (0.01, 3), (0.1, 3), (1 / 1369, 5)])
def test_norm_artefacts_are_exactly_the_planted_ones(share, times):
    norms = bump()
    planted = at_random(share, norms.shape)
    norms[planted] *= times * bump(seed=3)[planted] / 40
    found = e.norm_artefacts(norms)
    assert torch.equal(found.mask, planted)
    assert found.share == pytest.approx(planted.double().mean().item())
    assert norms[~planted].max() < found.threshold < norms[planted].min()
    assert found.ratio == pytest.approx((norms.max() / norms.median()).item())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["normal", "narrow", "gamma", "exponential", "heavy tails", "to the left", "even",
                                  "small", "smooth"])
def test_norm_artefacts_are_none_where_the_norms_have_one_peak(kind, seed):
    even = torch.rand(37, 37, 2, generator=torch.Generator().manual_seed(seed)).double()
    gaussian = bump(seed=seed).log() - math.log(40)
    norms = {"normal": bump(seed=seed), "narrow": bump(seed=seed, spread=1e-4), "gamma": -even.log().sum(dim=2),
             "exponential": 1 - even[..., 0].log(), "heavy tails": (gaussian / even[..., 0]).clamp(-9, 9).exp(),
             "to the left": 60 + 6 * even[..., 0].log(), "even": 40 + 20 * even[..., 0],
             "small": bump(14, 14, seed), "smooth": torch.nn.functional.interpolate(
                 bump(4, 5, seed)[None, None], size=(37, 30), mode="bilinear")[0, 0]}[kind]
    found = e.norm_artefacts(norms)
    assert (found.share, found.threshold, int(found.mask.sum())) == (0, None, 0)
    assert found.ratio == pytest.approx((norms.max() / norms.median()).item())


@pytest.mark.parametrize("shape", [(8, 8), (6, 9), (4, 4)])
def test_norm_artefacts_are_not_what_chance_makes_of_a_few_tokens(shape):
    generator = torch.Generator().manual_seed(0)
    draws = [40 * (0.15 * torch.randn(shape, generator=generator)).exp() for _ in range(60)]
    draws += [40 + 6 * torch.randn(shape, generator=generator) for _ in range(60)]
    assert sum(e.norm_artefacts(norms).share > 0 for norms in draws) <= 1
    one_more = draws[0].index_put((torch.tensor(2), torch.tensor(3)), draws[0].median() * 5)
    assert e.norm_artefacts(one_more).mask.nonzero().tolist() == [[2, 3]]


def test_norm_artefacts_are_none_of_a_shipped_model_on_the_cat():
    model = load("vit_nano_cifar10")
    model.any_size = True
    images, _ = prepare_image(sample_photographs()[1], model, Whole())  # 6 x 9 patches
    assert not e.token_norms(capture(model, images, keep=None))[1].any()


def test_norm_artefacts_are_no_content():
    """A second kind of norm that lies together in the picture: a half, a square, a ring, a line, most of the places."""
    rows, columns = torch.meshgrid(torch.arange(37), torch.arange(37), indexing="ij")
    distance = ((rows - 18)**2 + (columns - 18)**2).sqrt()
    for content in (columns > 18, (rows > 25) & (columns < 14), (distance - 12).abs() < 1.2, columns == rows,
                    ~at_random(0.1, rows.shape), (rows < 9) & at_random(0.9, rows.shape)):
        norms = bump()
        norms[content] *= 3
        assert norms[content].min() > norms[~content].max()
        assert e.norm_artefacts(norms).share == 0


def test_norm_artefacts_of_norms_that_do_not_differ():
    for norms in (torch.ones(4, 5), torch.zeros(4, 5), torch.ones(1, 1)):
        assert e.norm_artefacts(norms).share == 0
    assert e.norm_artefacts(torch.ones(4, 5)).ratio == 1


def test_feature_colours_are_the_main_directions_over_all_images():
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(4, 5, 6, 3, generator=generator).double()**2 * torch.tensor([9.0, 3.0, 1.0])
    directions, _ = torch.linalg.qr(torch.randn(11, 3, generator=generator).double())
    colours = e.feature_colours(parts @ directions.T + 7)
    assert colours.shape == (4, 5, 6, 3)
    assert (colours.min(), colours.max()) == (0, 1)
    for i in range(3):
        r = np.corrcoef(colours[..., i].flatten(), parts[..., i].flatten())[0, 1]
        assert r > 0.95


def test_feature_colours_clip_two_percent_at_each_end():
    line = torch.arange(101.0).view(1, 1, 101, 1).pow(1.01)  # skewed a little, so that its sign is known
    colours = e.feature_colours(line)[0, 0, :, 0]  # (101)
    assert (colours < 1e-6).sum() == (colours > 1 - 1e-6).sum() == 3
    assert (colours[3:98].diff() > 0).all()


def test_feature_colours_work_for_two_patches():
    colours = e.feature_colours(torch.tensor([[[[1.0, 2.0, 5.0, 0.0], [3.0, 2.0, 1.0, 0.0]]]]))
    assert colours.shape == (1, 1, 2, 3)
    assert colours[0, 0, :, 0].sort().values.tolist() == pytest.approx([0, 1])
    assert colours[..., 2].flatten().tolist() == [0.5, 0.5]
    assert e.feature_colours(torch.ones(1, 1, 1, 4)).shape == (1, 1, 1, 3)


def test_patch_filters_are_the_principal_components():
    model = vit()
    filters, shares = e.patch_filters(model, 4)
    weight = model.patch_embed.proj.weight.detach().flatten(1).numpy()
    values, vectors = np.linalg.eigh(weight.T @ weight)
    assert filters.shape == (4, 3, 7, 5)
    np.testing.assert_allclose(shares, values[::-1][:4] / values.sum(), atol=1e-12)
    for i in range(4):
        assert abs(float(filters[i].flatten().numpy() @ vectors[:, -1 - i])) == pytest.approx(1, abs=1e-9)


# ---- Deletion and insertion


class Counting(nn.Module):
    """Its logit for class 1 is the sum of an image's first channel, for class 0 zero."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        total = images[:, 0].sum(dim=(1, 2)) * self.scale
        return torch.stack([torch.zeros_like(total), total], dim=1)


def test_deletion_insertion_matches_curves_by_hand():
    images = torch.zeros(1, 3, 4, 6)  # 2 x 3 patches of 2 x 2
    images[:, :, :2, :2], images[:, :, 2:, 4:] = 1.0, 0.5  # 4 in patch 0, 2 in patch 5
    saliency = torch.tensor([[[9.0, 1.0, 2.0], [3.0, 4.0, 8.0]]])
    deletion, insertion = e.deletion_insertion(Counting(), images, saliency, torch.tensor([1]), n_steps=3)
    torch.testing.assert_close(deletion[:, 0], torch.tensor([6, 0, 0, 0]).float().sigmoid())
    left = e.blurred(images)[0, 0]  # (4, 6)
    shown = [left.sum(), 6 + left.sum() - left[:2, :2].sum() - left[2:, 4:].sum(), 6 + left[:2, 2:].sum(), 6]
    torch.testing.assert_close(insertion[:, 0], torch.tensor(shown).sigmoid())
    deletion, _ = e.deletion_insertion(Counting(), images, -saliency, torch.tensor([1]), n_steps=3)
    torch.testing.assert_close(deletion[:, 0], torch.tensor([6, 6, 6, 0]).float().sigmoid())


def test_random_orders_are_uniform_and_break_ties():
    images = images_of(300).float()
    orders = e._random_orders(images, 6, 3)
    assert (orders.sort(dim=1).values == torch.arange(6)).all()
    for place in range(6):  # each patch stands at each place in one of six images, give or take 5 standard deviations
        counts = orders[:, place].bincount(minlength=6)
        assert (counts - 50).abs().max() < 5 * math.sqrt(300 * 5 / 36)
    assert torch.equal(e._random_orders(images[7:9], 6, 3), orders[7:9])  # whatever the batch
    assert not torch.equal(e._random_orders(images, 6, 4), orders)
    saliency = torch.tensor([[0.0, 7, 0, 8, 0, 7]]).expand(300, 6)
    ranks = e._ranks_of(saliency, orders)
    assert (ranks[:, 3] == 0).all()
    assert (ranks[:, [1, 5]].sort(dim=1).values == torch.tensor([1, 2])).all()
    before = orders.argsort(dim=1)  # the place of each patch in the random order
    assert torch.equal(ranks[:, 1] < ranks[:, 5], before[:, 1] < before[:, 5])
    assert torch.equal(ranks[:, 0] < ranks[:, 4], before[:, 0] < before[:, 4])


def test_deletion_insertion_of_even_heat_equals_random_order():
    images = torch.zeros(500, 3, 4, 6)  # 2 x 3 patches of 2 x 2, the first of which decides
    images[:, :, :2, :2] = 1.0
    images[:, 1, 3, 5] = torch.arange(500)  # which tells the images apart, and which the model does not see
    deletion, insertion = e.deletion_insertion(Counting(), images, torch.ones(500, 2, 3), torch.ones(500).long(), 6)
    seen, unseen = torch.tensor(4.0).sigmoid().item(), 0.5
    for step in range(7):  # after so many patches the first is hidden in step / 6 of the images
        mean = unseen * step / 6 + seen * (6 - step) / 6
        margin = 4 * (seen - unseen) * math.sqrt(step * (6 - step) / 36 / 500)
        assert deletion[step].mean().item() == pytest.approx(mean, abs=margin + 1e-6)
    rest = e.blurred(images)[0, 0]  # what is seen of the first patch before it is shown
    low, high = rest.sum().sigmoid().item(), (4 + rest[:, 2:].sum() + rest[2:, :2].sum()).sigmoid().item()
    assert insertion[0].mean().item() == pytest.approx(low, abs=1e-6)
    assert insertion[6].mean().item() == pytest.approx(seen, abs=1e-6)
    shown = insertion[1] > insertion[0].mean()  # where the first patch was shown first
    assert shown.double().mean().item() == pytest.approx(1 / 6, abs=4 * math.sqrt(5 / 36 / 500))
    assert insertion[1][shown].mean().item() == pytest.approx(high, abs=1e-6)


def test_deletion_insertion_gives_no_curve_without_a_map():
    images, saliency = torch.randn(3, 3, 4, 6), torch.rand(3, 2, 3)
    saliency[1] = torch.nan
    for curve, expected in zip(e.deletion_insertion(Counting(), images, saliency, torch.ones(3).long(), 4),
                               e.deletion_insertion(Counting(), images[::2], saliency[::2], torch.ones(2).long(), 4),
                               strict=True):
        assert curve[:, 1].isnan().all()
        torch.testing.assert_close(curve[:, ::2], expected)


def test_insertion_starts_from_a_blurred_image():
    """One bright pixel becomes RISE's Gaussian: 11 x 11 pixels, standard deviation 5, sum one."""
    images = torch.zeros(2, 3, 31, 41)
    images[1, 2, 15, 20] = 1
    found = e.blurred(images)
    assert found.shape == images.shape
    assert not found[0].any()
    assert not found[1, :2].any()
    far = torch.arange(-5, 6)
    expected = torch.exp(-(far[:, None]**2 + far**2) / 50)
    torch.testing.assert_close(found[1, 2, 10:21, 15:26], expected / expected.sum())
    assert found[1, 2].sum().item() == pytest.approx(1)
    torch.testing.assert_close(e.blurred(torch.ones(1, 1, 9, 13)), torch.ones(1, 1, 9, 13))  # its edges are no edges
    larger = torch.zeros(1, 1, 448, 500)
    larger[0, 0, 224, 250] = 1
    assert e.blurred(larger)[0, 0].nonzero().amin(dim=0).tolist() == [214, 240]  # 10 pixels, of twice the size


def test_area_under_is_made_of_trapezoids():
    curves = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.5, 1.0]])
    assert e.area_under(curves).tolist() == [0.625, 0.25]
    assert e.area_under(torch.full((17, 3), 0.4)).tolist() == pytest.approx([0.4] * 3)


def test_mean_and_error_leave_out_what_is_missing():
    mean, error = e.mean_and_error(torch.tensor([1.0, torch.nan, 2.0, 6.0]))
    assert (mean, error) == pytest.approx((3.0, math.sqrt(7 / 3)))
    mean, error = e.mean_and_error(torch.tensor([2.0, torch.nan]))
    assert mean == 2
    assert math.isnan(error)


def test_comparison_pairs_each_image_with_its_own_random_orders():
    found = e.compare_explanations(vit(), images_of()[[1, 0, 2]], [3, 1, 2], n_steps=4, n_draws=3)
    for what in ("deletion", "insertion"):
        for name in e.METHODS:
            for image in range(3):
                method = e.area_under(getattr(found, what)[name][:, image])
                orders = [e.area_under(draw[:, image]) for draw in found.draws[what]]
                torch.testing.assert_close(found.differences[what][name][image], method - sum(orders) / 3,
                                           equal_nan=True)
            assert found.leads[what][name] == e.mean_and_error(found.differences[what][name])
    assert found.differences["deletion"]["grad_cam"].isnan().tolist() == [False, True, False]
    assert not math.isnan(found.leads["deletion"]["grad_cam"][1])


def test_compare_explanations_has_one_bar_for_all_passes(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.n = options, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, n):
            self.n += n

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    e.compare_explanations(vit(), images_of(), n_steps=2, n_draws=3)
    e.deletion_insertion(vit(), images_of(), torch.rand(3, *GRID), torch.tensor([1, 2, 3]), n_steps=2)
    assert [(bar.n, bar.options["total"]) for bar in bars] == [(2 * 3 * 3 * 7,) * 2, (2 * 3 * 3,) * 2]
    assert all((bar.options["delay"], bar.options["disable"]) == (5, None) for bar in bars)


def test_rank_correlation_needs_no_pairs_of_places():
    values = torch.rand(1, 300_000, generator=torch.Generator().manual_seed(0)).round(decimals=4)  # with ties
    assert e.rank_correlation(values, values**3).item() == pytest.approx(1)
    assert e.rank_correlation(values, -values).item() == pytest.approx(-1)
    values = torch.cat([values[:, :9], values[:, 9:18]])
    values[1, 4] = torch.nan
    assert e.rank_correlation(values, values).isnan().tolist() == [False, True]


def test_rank_correlation_is_spearmans():
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 1.0, 4.0, 1.0, 5.0]])
    b = torch.tensor([[5.0, 6.0, 7.0, 8.0, 7.0], [9.0, 2.0, 6.0, 5.0, 3.0]])
    # Ranks 1 2 3 4 5 and 1 2 3.5 5 3.5; 3 1.5 4 1.5 5 and 5 1 4 3 2.
    assert e.rank_correlation(a, b).tolist() == pytest.approx([8 / math.sqrt(95), 2 / math.sqrt(95)])
    assert e.rank_correlation(a[:1], torch.ones(1, 5)).isnan().all()


def test_compare_explanations_includes_random_order():
    model, images = vit(), images_of()
    found = e.compare_explanations(model, images, n_steps=6)
    assert set(found.deletion) == set(found.insertion) == {*e.METHODS, "random order"}
    torch.testing.assert_close(found.correlations.diagonal(), torch.ones(4).double())
    probabilities = model(images).softmax(dim=1).max(dim=1).values.detach()
    empty = model(torch.zeros_like(images)).softmax(dim=1).gather(1, found.targets[:, None])[:, 0].detach()
    vague = model(e.blurred(images)).softmax(dim=1).gather(1, found.targets[:, None])[:, 0].detach()
    for name in found.deletion:
        torch.testing.assert_close(found.deletion[name][[0, -1]], torch.stack([probabilities, empty]))
        torch.testing.assert_close(found.insertion[name][[0, -1]], torch.stack([vague, probabilities]))
    assert not torch.equal(found.deletion["rollout"], found.deletion["random order"])


def test_compare_explanations_takes_sixteen_steps_and_eight_draws_by_default():
    found = e.compare_explanations(vit(), images_of()[:1], methods=["rollout"])
    assert found.deletion["rollout"].shape == (16 + 1, 1)
    assert found.draws["deletion"].shape == (8, 16 + 1, 1)


def test_compare_explanations_averages_several_random_draws():
    model, images = vit(), images_of()
    found = e.compare_explanations(model, images, methods=["rollout"], n_steps=5, seed=2, n_draws=3)
    for what, curves in (("deletion", found.deletion), ("insertion", found.insertion)):
        draws = found.draws[what]
        assert draws.shape == (3, 6, 3)
        torch.testing.assert_close(draws.mean(dim=0), curves["random order"], rtol=0, atol=0)
        assert not torch.equal(draws[0], draws[1])
    single = e.deletion_insertion(model, images, torch.ones(3, *GRID), found.targets, 5, seed=4)
    for what, one in zip(("deletion", "insertion"), single, strict=True):
        torch.testing.assert_close(found.draws[what][1], one)
    alone = e.compare_explanations(model, images[1:2], methods=["rollout"], n_steps=5, seed=2, n_draws=3)
    torch.testing.assert_close(alone.draws["deletion"][:, :, 0], found.draws["deletion"][:, :, 1])
    with pytest.raises(InputError, match="n_draws 0 is out of range"):
        e.compare_explanations(model, images, n_draws=0)


def test_compare_explanations_skips_images_with_blank_grad_cam():
    model, images, targets = vit(), images_of(), [3, 1, 2]  # of images 1, 0 and 2: alone, that of 0 is refused
    images = images[[1, 0, 2]]
    found = e.compare_explanations(model, images, targets, n_steps=4, n_draws=2)
    assert found.saliencies["grad_cam"].flatten(1).isnan().all(dim=1).tolist() == [False, True, False]
    assert found.blank == {"grad_cam": 1}
    assert found.deletion["grad_cam"].isnan().any(dim=0).tolist() == [False, True, False]
    assert found.insertion["grad_cam"].isnan().all(dim=0).tolist() == [False, True, False]
    assert not found.deletion["rollout"].isnan().any()
    others = e.compare_explanations(model, images[::2], targets[::2], n_steps=4, n_draws=2)
    torch.testing.assert_close(found.deletion["grad_cam"].nanmean(dim=1), others.deletion["grad_cam"].mean(dim=1))
    last = list(found.saliencies).index("grad_cam")
    torch.testing.assert_close(found.correlations[last, 1], others.correlations[last, 1])
    assert others.blank == {}


def test_compare_explanations_refuses_when_no_method_works():
    with pytest.raises(InputError, match="none of attention works on this model"):
        e.compare_explanations(ConvNet(img_size=29, n_classes=5), images_of(1, (29, 29)).float(), methods=["attention"])


# ---- The closed forms on a model


@pytest.mark.parametrize("name", BUILDERS)
def test_selfcheck_holds_for_every_library(name, tmp_path):
    theirs, _, images = shared(name, tmp_path)
    checks = selfcheck(theirs.float(), images.float())
    assert len(checks) == 12
    assert all(check.holds is not False for check in checks), checks
    assert [check.holds for check in checks].count(None) == ("mean" in name)


def test_selfcheck_reports_a_model_that_gives_nan():
    model = vit()
    torch.nn.init.constant_(model.head.bias, torch.nan)
    check, = selfcheck(model, images_of())
    assert (check.name, check.holds) == ("logits and attention maps are finite", False)
    for see in (e.explain, e.compare_explanations, e.logit_lens):
        with pytest.raises(InputError, match=r"\Athis VisionTransformer returns NaN or infinity [^\n]*\Z"):
            see(model, images_of())


def test_selfcheck_sees_broken_formulas(monkeypatch):
    def failed():
        return {check.name.split(" ")[0] for check in selfcheck(vit(), images_of()) if check.holds is False}

    assert failed() == set()
    whole = e.rollout
    monkeypatch.setattr("vit_bridge.analysis.selfcheck.rollout", lambda maps, ratio=0.0: whole(maps) * 1.01)
    assert failed() == {"rollout"}
    monkeypatch.setattr("vit_bridge.analysis.selfcheck.rollout", whole)
    of_torch = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda out, of, **options: of_torch(out, of, **options)[
        ::-1 if isinstance(of, list) else 1])  # of the maps of all blocks
    assert failed() >= {"gradients", "relevance"}  # vit-explain's mistake


# ---- Names, heads, options


def test_explain_accepts_class_names():
    model, images = vit(), images_of()
    model.preprocessing = Preprocessing(model.config.img_size, class_names=["ant", "bee", "cat", "dog", "elk"])
    for target in ("dog", ["dog", 3, "dog"], torch.tensor([3, 3, 3]), np.int64(3)):
        found = e.explain(model, images, "relevance", target=target)
        assert found.targets.tolist() == [3, 3, 3]
    with pytest.raises(InputError, match=r"'owl' is out of range; .*a class from 0 to 4, or a name such as 'ant'"):
        e.explain(model, images, target="owl")
    with pytest.raises(InputError, match="2 targets were passed for 3 images"):
        e.explain(model, images, target=[1, 2])


def test_explain_refuses_unknown_methods_and_options():
    with pytest.raises(InputError, match="method 'gradcam' is unknown"):
        e.compare_explanations(vit(), images_of(), methods=["rollout", "gradcam"])
    with pytest.raises(InputError, match="option of rollout 'layer_idx' is unknown"):
        e.explain(vit(), images_of(), "rollout", layer_idx=1)
    with pytest.raises(InputError, match="target 99 is out of range"):
        e.compare_explanations(vit(), images_of(), target=99)


@pytest.mark.parametrize(("images", "words"), [
    ("x.jpg", "got images as a str; expected a tensor"), (np.zeros((29, 29, 3)), "got images as a ndarray"),
    (torch.zeros(1, 3, 29, 29, dtype=torch.uint8), "got images of torch.uint8"),
    (torch.zeros(0, 3, 29, 29), "which contains no image"), (torch.zeros(1, 1, 29, 29), "expected"),
    (torch.zeros(3, 29, 29), "expected")])
def test_explain_refuses_bad_images_for_a_convnet(images, words):
    model = ConvNet(img_size=29, n_classes=5, widths=(3, 5), depths=(1, 1))
    for see in (lambda: e.explain(model, images, "grad_cam"), lambda: receptive_field(model, images)):
        with pytest.raises(InputError, match=rf"\A[^\n]*{words}[^\n]*\Z"):
            see()


def test_compare_explanations_refuses_no_images_or_methods():
    for see in (e.compare_explanations, selfcheck, e.logit_lens):
        with pytest.raises(InputError, match=r"\A[^\n]*\(0, 3, 14, 15\), which contains no image[^\n]*\Z"):
            see(vit(), images_of()[:0])
    with pytest.raises(InputError, match=r"\Amethods \(\) is empty; expected at least one of attention, rollout, "):
        e.compare_explanations(vit(), images_of(), methods=())


@pytest.mark.parametrize("ratio", ["0.5", None, math.nan, 1, -0.1])
def test_explain_refuses_a_bad_discard_ratio(ratio):
    with pytest.raises(InputError, match=rf"\Adiscard_ratio {ratio!r} is out of range; expected 0 <= ratio < 1\Z"):
        e.explain(vit(), images_of(), "rollout", discard_ratio=ratio)
    e.explain(vit(), images_of(), "rollout", discard_ratio=np.float32(0.5))


def test_explain_without_a_head_gives_no_class():
    found = e.explain(vit(n_classes=0), images_of(), "attention")
    assert (found.targets, found.probabilities) == (None, None)
    with pytest.raises(InputError, match="hiding patches cannot change a prediction"):
        e.compare_explanations(vit(n_classes=0), images_of())
    with pytest.raises(InputError, match="has no head"):
        e.explain(ConvNet(img_size=29, n_classes=0, widths=(3, 5), depths=(1, 1)), images_of(1, (29, 29)).float(),
                  "grad_cam")


def test_grad_cam_says_so_when_it_is_blank():
    model, images = vit(), images_of(1)
    with torch.no_grad():
        model.head.weight[3] = 0  # class 3 hangs on nothing
    with pytest.raises(InputError, match="Grad-CAM is blank: the weighted channels"):
        e.explain(model, images, "grad_cam", target=3)
    assert set(e.compare_explanations(model, images, target=3, n_steps=2).refused) == {"grad_cam"}
    with pytest.raises(InputError, match="after the only block is blank"):
        e.explain(vit(depth=1), images, "grad_cam")


def distilled(library, depth=3):
    """Make a DeiT with one head on CLS, one on the distillation token, and random weights."""
    if library == "timm":
        model = VisionTransformerDistilled(img_size=8, patch_size=4, embed_dim=12, depth=depth, num_heads=3,
                                           num_classes=3)
    else:
        config = transformers.DeiTConfig(image_size=8, patch_size=4, num_labels=3, hidden_size=12, intermediate_size=24,
                                         num_attention_heads=3, num_hidden_layers=depth)
        model = transformers.DeiTForImageClassificationWithTeacher(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_explain_takes_the_mean_of_both_tokens_of_a_distilled_head(library):
    model, images = distilled(library), images_of(3, (8, 8)).float()
    seen = capture(model, images, gradients=True)
    gradients = torch.autograd.grad(seen.logits.max(dim=1).values.sum(), seen.maps)
    maps = torch.stack(seen.maps).detach()
    for method, matrix in (("attention", maps[-1].mean(dim=1)), ("rollout", e.rollout(maps)),
                           ("relevance", e.relevance_gained(maps, torch.stack(gradients)))):
        expected = (matrix[:, 0, 2:] + matrix[:, 1, 2:]).unflatten(1, (2, 2)) / 2
        torch.testing.assert_close(e.explain(model, images, method).saliency, expected)
    torch.testing.assert_close(e.logit_lens(model, images)[-1], seen.logits.detach().softmax(dim=1))
    assert all(check.holds is not False for check in selfcheck(model))


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_grad_cam_of_a_distilled_head_is_taken_where_the_patches_still_count(library):
    model, images = distilled(library), images_of(3, (8, 8)).float()
    saliency = e.explain(model, images, "grad_cam").saliency
    assert torch.equal(saliency, e.explain(model, images, "grad_cam", layer_idx=1).saliency)
    assert (saliency > 0).flatten(1).any(dim=1).all()
    with pytest.raises(InputError, match="after the last block is blank: the head reads only CLS and the distillation "
                                         "token, so the patch tokens there have no effect; choose a layer_idx from 0 "
                                         "to 1"):
        e.explain(model, images, "grad_cam", layer_idx=-1)
    with pytest.raises(InputError, match="after the only block is blank: the head reads only CLS and the"):
        e.explain(distilled(library, depth=1), images, "grad_cam")


def test_relevance_gained_keeps_small_values():
    maps, gradients = torch.rand(3, 1, 2, 5, 5), 1e-6 * torch.rand(3, 1, 2, 5, 5)
    exact = e.relevance(maps.double(), gradients.double()) - torch.eye(5).double()
    torch.testing.assert_close(e.relevance_gained(maps, gradients).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_rollout_is_carried_as_the_formula_says(ratio):
    model, images = vit(n_registers=2), images_of()
    whole = e.rollout(torch.stack(capture(model, images).maps), ratio)  # (B, N, N)
    found = e.explain(model, images, "rollout", discard_ratio=ratio).saliency
    torch.testing.assert_close(found, whole[:, 0, 3:].unflatten(1, GRID), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("build", [
    vit, lambda: vit(n_registers=3), lambda: vit(pool="mean", fc_norm=True), lambda: vit(qk_norm=True),
    lambda: vit().to(torch.bfloat16), lambda: vit().to(torch.float16)])
def test_relevance_is_the_row_of_the_whole_matrix(build):
    model, images = build(), images_of()
    seen = capture(model, images, gradients=True)
    gradients = torch.autograd.grad(seen.logits[:, 3].sum(), seen.maps)
    whole = e.relevance_gained([maps.detach() for maps in seen.maps], gradients)  # (B, N, N)
    first = seen.adapter.n_prefix
    row = whole[:, first:].mean(dim=1) if seen.adapter.pool == "mean" else whole[:, 0]
    found = e.explain(model, images, "relevance", target=3).saliency
    near = dict(rtol=1e-9, atol=1e-12) if seen.logits.dtype == torch.float64 else dict(rtol=0.05, atol=1e-4)
    torch.testing.assert_close(found, row[:, first:].unflatten(1, GRID).to(found.dtype), **near)


def test_relevance_with_mean_pooling_leaves_out_the_identity():
    model, images = vit(pool="mean"), images_of(1)
    seen = capture(model, images, gradients=True)
    target = seen.logits.argmax(dim=1)
    gradients = torch.autograd.grad(seen.logits[0, target], seen.maps)
    related = e.relevance(torch.stack(seen.maps), torch.stack(gradients))[0, 1:, 1:] - torch.eye(6)
    saliency = e.explain(model, images).saliency[0].flatten()
    torch.testing.assert_close(saliency, related.mean(dim=0), rtol=1e-9, atol=1e-12)


def test_explain_works_on_a_hybrid():
    torch.manual_seed(0)
    model = HybridCNNViT(n_classes=5, embed_dim=22, depth=2, n_heads=2, img_size=(12, 20), patch_size=4).eval()
    images = images_of(2, (12, 20)).float()
    for method in ("attention", "rollout", "relevance"):
        assert e.explain(model, images, method).saliency.shape == (2, 3, 5)
    assert all(check.holds is not False for check in selfcheck(model, images))


def test_selfcheck_needs_nothing_but_a_model():
    assert [check.holds for check in selfcheck(vit().float())] == [True] * 12
    model = vit().float()
    model.blocks[0].register_forward_hook(lambda module, args, output: None)  # somebody's own
    assert all(check.holds for check in selfcheck(model))
    fresh = torchvision.models.VisionTransformer(15, 5, 2, 2, 8, 16, num_classes=3)  # its head is zero
    checks = selfcheck(fresh)
    assert [check.name.split(" ")[0] for check in checks if check.holds is None] == ["relevance", "Grad-CAM", "patch"]
    assert all(check.holds is not False for check in checks)
    for dtype in (torch.bfloat16, torch.float16):
        checks = selfcheck(vit().to(dtype))
        assert all(check.holds is not False for check in checks), checks
    headless = selfcheck(vit(n_classes=0))
    assert [check.holds for check in headless] == [True] * 7 + [None]


def test_selfcheck_holds_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checks = selfcheck(vit().float())
        assert torch.is_autocast_enabled("cpu")
    assert [check.holds for check in checks] == [True] * 12, checks


@pytest.mark.parametrize(("broken", "replacement", "names"), [
    ("speaking", lambda maps, gradient: torch.ones_like(maps[:, 0]), {"relevance"}),
    ("speaking", lambda maps, gradient: (maps * gradient).mean(dim=1).clamp(min=0), {"relevance"}),
    ("reading_weights", lambda pool, first, n: torch.eye(n)[1], {"relevance"}),
    ("token_cam", lambda features, gradients: torch.ones_like(features[:, :, 0]), {"Grad-CAM"}),
    ("token_cam", lambda features, gradients: (features * gradients).sum(dim=2).clamp(min=0), {"Grad-CAM"}),
    ("patches_of", lambda row, grid, first: row[..., first - 1:-1].unflatten(-1, grid), {"attention", "relevance"}),
])
def test_selfcheck_sees_a_broken_method(broken, replacement, names, monkeypatch):
    monkeypatch.setattr(e, broken, replacement)
    checks = selfcheck(vit(), images_of())
    assert {check.name.split(" ")[0] for check in checks if check.holds is False} == names


def test_selfcheck_sees_misplaced_tokens(monkeypatch):
    model = vit(n_registers=2, pool="mean")
    whole = model.patch_embed.forward
    monkeypatch.setattr(model.patch_embed, "forward", lambda images: whole(images).flip(1))
    wrong = [check for check in selfcheck(model, images_of()) if check.holds is False]
    assert [check.found for check in wrong] == ["for two corners: tokens [[6], [5]], expected [[5], [6]]"]


# ---- Memory


def most_held(function):
    """Return the most bytes that are allocated while a function runs."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    records = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    records.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in records), default=0)


@pytest.mark.parametrize("see", [
    *(pytest.param(lambda model, images, method=method: e.explain(model, images, method), id=method)
      for method in e.METHODS),
    pytest.param(lambda model, images: mean_distances(model, images), id="distance")])
def test_memory_is_that_of_one_block_whatever_the_depth(see):
    def held(depth):
        torch.manual_seed(0)
        model = VisionTransformer(img_size=48, patch_size=4, n_classes=5, embed_dim=8, depth=depth, n_heads=2).eval()
        return most_held(lambda: see(model, images_of(1, (48, 48)).float()))

    maps = 2 * 145**2 * 4  # bytes of the maps of one block
    assert held(10) - held(2) < maps  # and not eight times as much: tokens are small
    assert held(2) < 8 * maps
