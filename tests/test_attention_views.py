"""Views of one model: labelled panels that show the stated numbers, without side effects."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from figure_checks import (
    GRID,
    PATCH,
    SIZE,
    assert_no_text_clipped,
    convnet,
    data_of,
    maps_of,
    pixels,
    share_with_contrast,
    square_vit,
    texts,
    vit,
)
from matplotlib.figure import Figure
from matplotlib.text import Text
from other_models import (
    HF,
    SWINS,
    WITH_HEAD,
    randomised,
    shared,
    swin_images,
    timm_vit,
    torchvision_vit,
    transformers_vit,
)
from other_models import SIDE as SIDE_OF_OTHERS
from PIL import Image

import visualizations as v
from vit_bridge.analysis.attention import (
    attention_distance,
    bias_by_offset,
    rows_by_block,
    token_similarity,
    uniform_attention_distance,
)
from vit_bridge.analysis.capture import attention_maps
from vit_bridge.analysis.explanations import area_under, compare_explanations, explain
from vit_bridge.data.images import prepare_image
from vit_bridge.data.shapes import TEST_START, make_shapes
from vit_bridge.models.adapters import adapt
from vit_bridge.models.deit import DistilledViT
from vit_bridge.models.swin import SwinTransformer
from vit_bridge.plots.charts import percent
from vit_bridge.preprocessing import Whole
from vit_bridge.system import ROOT
from vit_bridge.weights.checkpoints import load
from vit_model import InputError, VisionTransformer

REAL = ROOT.parent / "shared" / "weights" / "dinov2_vits14_focus.safetensors"


def test_visualize_attention_draws_the_map_and_prediction(tmp_path):
    model, image = square_vit().train(), pixels(12, 12)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "attention_map.png"
    figure = v.AttentionVisualizer(model, device="cpu").visualize_attention(
        image=image, layer_idx=-1, head_idx=None, save_path=path)
    assert isinstance(figure, Figure)
    assert Image.open(path).size == tuple(150 * figure.get_size_inches())
    assert "block 3 of 3, mean of 2 heads" in texts(figure)
    assert "attention weight of a patch" in texts(figure)
    images, picture = prepare_image(image, model)
    maps = attention_maps(model, images)  # (3, 1, 2, 10, 10)
    expected = maps[2, 0].mean(dim=0)[0, 1:].reshape(3, 3).numpy()
    shown, grid, _, smooth = data_of(figure)[:4]
    np.testing.assert_allclose(shown, picture, atol=1e-6)
    np.testing.assert_allclose(grid, expected, rtol=1e-6)
    np.testing.assert_allclose(smooth, expected, rtol=1e-6)
    row, top = maps[2, 0].mean(dim=0)[0], sorted(expected.flat)[-2]  # the 99th percentile of nine
    assert f"all patches {row[1:].sum():.1%}, CLS {row[0]:.1%}" in texts(figure)
    assert f"colours end at {percent(top)}; largest {percent(expected.max())}" in texts(figure)
    for axes in figure.axes[1:3]:
        assert axes.images[-1].get_clim() == (0, pytest.approx(top))
    assert "larger values all have the top colour" in " ".join(texts(figure).split())
    model.eval()
    with torch.no_grad():
        probability, label = model(images).softmax(dim=1)[0].max(dim=0)
    assert f"predicted: {model.preprocessing.class_names[label]} ({probability:.0%})" in texts(figure)
    model.train()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_visualize_attention_keeps_the_mode():
    model = vit().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    figure = v.AttentionVisualizer(model, device="cpu").visualize_attention(torch.randn(1, 3, *SIZE), 1, -1)
    assert [module.training for module in model.modules()] == modes
    assert "block 2 of 3, head 2 of 2" in texts(figure)
    assert "predicted: class " in texts(figure)  # it has no names
    assert data_of(figure)[1].shape == GRID


def test_visualize_all_heads_says_each_panels_scale_and_shares():
    model, image = vit(n_registers=2), pixels()
    figure = v.AttentionVisualizer(model, device="cpu").visualize_all_heads(image)
    grids = [drawn for panel in figure.axes for drawn in panel.images if drawn.get_array().shape == GRID]
    maps = attention_maps(model, prepare_image(image, model)[0])[:, 0, :, 0].reshape(6, 9)  # (L H, N)
    assert len(grids) == 6
    for drawn, row in zip(grids, maps, strict=True):
        np.testing.assert_allclose(drawn.get_array(), row[3:].view(GRID), rtol=1e-6)
        top, largest = row[3:].sort().values[-2:].tolist()  # of six patches
        assert drawn.get_clim() == (0, pytest.approx(top))
        assert drawn.axes.get_xlabel().split("\n") == [f"to {percent(top)}", f"max {percent(largest)}",
                                                       f"CLS {row[0]:.0%}", f"reg. {row[1:3].sum():.0%}"]
    for word in ("in all 3 blocks", "block 1", "block 3", "head 1", "head 2", "Attention to each patch",
                 "The last 2 lines below a panel are the attention to CLS and to the registers."):
        assert word in " ".join(texts(figure).split())
    some = v.AttentionVisualizer(model, device="cpu").visualize_all_heads(image, layers=[-1])
    assert "in 1 of 3 blocks" in texts(some)
    assert "block 3" in texts(some)
    assert "block 1" not in texts(some)


def test_visualize_attention_grid_draws_several_images():
    model = square_vit()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(4))
    figure = v.visualize_attention_grid(model, images)
    shown = data_of(figure)
    expected = attention_maps(model, images).mean(dim=2)[:, :, 0, 1:].reshape(3, 2, 3, 3)  # (L, B, rows, columns)
    for row in range(2):
        np.testing.assert_allclose(shown[4 * row], prepare_image(images[row], model)[1], atol=1e-6)
        for layer in range(3):
            np.testing.assert_allclose(shown[4 * row + 1 + layer], expected[layer, row], rtol=1e-5)
    assert "block 3" in texts(figure)
    probabilities, classes = model(images).softmax(dim=1).max(dim=1)
    assert f"{probabilities[0]:.0%}" != f"{probabilities[1]:.0%}"
    for row in range(2):
        label = " ".join(figure.axes[4 * row].get_ylabel().split())
        assert label == f"predicted: {model.preprocessing.class_names[classes[row]]} ({probabilities[row]:.0%})"
    with pytest.raises(InputError, match="no attention"):
        v.visualize_attention_grid(convnet(), images)
    headless = vit(n_classes=0)
    assert "predicted" not in texts(v.visualize_attention_grid(headless, torch.randn(2, 3, *SIZE)))


def test_attention_visualizer_refuses_bad_models_and_indices():
    with pytest.raises(InputError, match="ConvNet has no attention"):
        v.AttentionVisualizer(convnet())
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="'cuda' is not available"):
            v.AttentionVisualizer(vit(), device="cuda")
    visualizer = v.AttentionVisualizer(vit(), device="cpu")
    with pytest.raises(InputError, match="layer_idx 3"):
        visualizer.visualize_attention(pixels(), layer_idx=3)
    with pytest.raises(InputError, match="head_idx 2"):
        visualizer.visualize_attention(pixels(), head_idx=2)
    with pytest.raises(InputError, match="layer 7"):
        visualizer.visualize_all_heads(pixels(), layers=[7])


def test_visualize_attention_grid_averages_patches_for_mean_pooling():
    model = VisionTransformer(img_size=12, patch_size=4, embed_dim=12, depth=2, n_heads=3, n_classes=5, pool="mean")
    images = torch.randn(1, 3, 12, 12)
    figure = v.visualize_attention_grid(model, images)
    assert "Where patches look, on average" in texts(figure)
    expected = attention_maps(model, images).mean(dim=2)[:, 0, 1:, 1:].mean(dim=1).reshape(2, 3, 3)
    for layer in range(2):
        np.testing.assert_allclose(data_of(figure)[1 + layer], expected[layer], rtol=1e-5)


# ---- From any patch, over all layers


def test_visualize_attention_can_start_from_a_patch():
    model, image = vit(n_registers=2), pixels()
    views = v.AttentionVisualizer(model, device="cpu")
    maps = views.attention_maps(image)
    assert maps.shape == (3, 2, 9, 9)
    shown = data_of(views.visualize_attention(image, 1, 0, patch=(1, 2)))[1]
    np.testing.assert_allclose(shown, maps[1, 0, 3 + 5, 3:].view(GRID), atol=1e-7)
    figure = views.visualize_attention(image, 1, 0, patch=(-1, 0))
    assert "Where the framed patch (-1, 0) looks" in texts(figure)
    frame = figure.axes[0].patches[0].get_bbox().bounds
    assert frame == (-0.5, 6.5, 5, 7)  # x, y, width, height: the second row of two, the first column of three
    with pytest.raises(InputError, match=r"patch 2 is out of range; expected 0 to 1"):
        views.visualize_attention(image, patch=(2, 0))


def test_visualize_all_layers_draws_the_image_and_each_layer():
    model, image = vit(), pixels()
    figure = v.AttentionVisualizer(model, device="cpu").visualize_all_layers(image)
    images, picture = prepare_image(image, model)
    maps = attention_maps(model, images)[:, 0].mean(dim=1)[:, 0, 1:]
    first, *others = data_of(figure)
    np.testing.assert_allclose(first, picture, atol=1e-6)
    for shown, expected in zip(others, maps, strict=True):
        np.testing.assert_allclose(shown, expected.view(GRID), atol=1e-7)
    assert [axes.get_title() for axes in figure.axes[:4]] == ["image", "block 1", "block 2", "block 3"]


# ---- Colour scales


def figures_with_maps(model, images):
    """Every figure with maps of a model, by its name; some need a head."""
    views = v.AttentionVisualizer(model, device="cpu")
    names = ["attention", "all_heads", "all_layers", "rollout", "token_norms"]
    names += ["relevance", "grad_cam"] if views.adapter.has_head else []
    figures = {name: [getattr(views, f"visualize_{name}")(image) for image in images] for name in names}
    return figures | {"attention_grid": [v.visualize_attention_grid(model, images)],
                      "positions": [v.visualize_positions(model)]}


def even_vit(**options):
    """Make a ViT that attends to every token equally, up to rounding."""
    model = vit(n_heads=4, embed_dim=24, **options)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(1e-2)
            block.attn.qkv.bias.zero_()
    return model


@pytest.mark.parametrize("name", ["vit_nano_shapes", "hybrid_shapes"])
def test_panels_have_contrast(name):
    images = list(make_shapes(2, 32, start=TEST_START).images)
    shares = {view: share_with_contrast(*own) for view, own in figures_with_maps(load(name), images).items()}
    sparse = dict(all_heads=0.6, grad_cam=0.5)  # some look at less than a tenth of the patches
    for view, share in shares.items():
        assert share >= sparse.get(view, 0.85), (view, share)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the weights of a real ViT are not here")
def test_panels_of_a_real_vit_have_contrast():
    photo = ROOT / "vit_bridge" / "data" / "samples" / "coffee.jpg"
    shares = {view: share_with_contrast(*own) for view, own in figures_with_maps(load(REAL), [photo]).items()}
    assert min(shares.values()) >= 0.95, shares


def test_uniform_attention_looks_uniform():
    views, image = v.AttentionVisualizer(even_vit(), device="cpu"), pixels()
    figures = [views.visualize_attention(image), views.visualize_all_heads(image), views.visualize_all_layers(image),
               views.visualize_rollout(image), v.visualize_attention_grid(even_vit(), [image])]
    for figure in figures:
        assert maps_of(figure)
        assert share_with_contrast(figure) == 0
        assert all(np.ptp(shown) < 1e-2 for shown in maps_of(figure))


def test_an_image_looks_the_same_beside_any_other():
    model = square_vit()
    one, other = pixels(12, 12), 255 - pixels(12, 12)
    alone, beside = (maps_of(v.visualize_attention_grid(model, images)) for images in ([one], [other, one, one]))
    for first, second, third in zip(alone, beside[3:6], beside[6:], strict=True):
        np.testing.assert_allclose(first, second, atol=1e-6)
        np.testing.assert_array_equal(second, third)


def test_one_sink_does_not_darken_the_other_panels():
    model = vit(img_size=(140, 100), patch_size=(7, 5))  # 400 patches
    figure = v.AttentionVisualizer(model, device="cpu").visualize_all_heads(pixels(140, 100))
    tops = [image.get_clim()[1] for axes in figure.axes for image in axes.images if image.get_array().ndim == 2]
    assert len(set(tops)) == len(tops) == 6


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "heads"), [(24, 16), (40, 24)])
def test_deep_models_fit_a_page(depth, heads):
    model = vit(img_size=16, patch_size=4, embed_dim=4 * heads, depth=depth, n_heads=heads)
    views, image = v.AttentionVisualizer(model, device="cpu"), pixels(16, 16)
    figures = [views.visualize_all_heads(image), views.visualize_all_layers(image), views.visualize_token_norms(image),
               views.visualize_logit_lens(image), views.visualize_attention_distance([image])]
    assert f"in 6 of {depth} blocks" in texts(figures[0])
    assert f"block {depth}" in texts(figures[1])
    assert f"6 of {depth} blocks" in " ".join(texts(figures[2]).split())
    for figure in figures:
        assert figure.get_figwidth() <= 21
        assert figure.get_figheight() <= 12
        assert_no_text_clipped(figure)


# ---- Whole photographs


@pytest.mark.slow
@pytest.mark.parametrize(("size", "grid"), [((40, 80), (4, 8)), ((90, 40), (9, 4))])
def test_every_figure_shows_a_photograph_whole(size, grid):
    model = vit(img_size=24, patch_size=4)
    model.any_size = True
    views = v.AttentionVisualizer(model, "cpu", Whole())
    photo = pixels(*size)
    figures = [views.visualize_attention(photo, patch=(-1, 0)), views.visualize_all_heads(photo),
               views.visualize_all_layers(photo), views.visualize_rollout(photo), views.visualize_relevance(photo),
               views.visualize_grad_cam(photo), views.visualize_token_norms(photo),
               views.visualize_explanations(photo, n_steps=1, n_draws=1), views.visualize_logit_lens(photo)]
    for figure in figures:
        maps = maps_of(figure)
        assert {shown.shape for shown in maps} <= {grid}
        assert maps or figure is figures[-1]
        assert_no_text_clipped(figure)


def test_photographs_of_several_proportions_stand_side_by_side():
    model = vit(img_size=24, patch_size=4)
    model.any_size = True
    photos, grids = [pixels(40, 80), pixels(90, 40), pixels(40, 80)], [(4, 8), (9, 4), (4, 8)]
    figure = v.visualize_attention_grid(model, photos, whole=Whole())
    assert [shown.shape for shown in maps_of(figure)] == [grid for grid in grids for _ in range(3)]
    features = v.visualize_features(model, photos, whole=Whole())
    shapes = [shown.shape[:2] for shown in data_of(features)]
    assert shapes[3:] == grids * 3
    np.testing.assert_array_equal(data_of(features)[3], data_of(features)[5])
    views = v.AttentionVisualizer(model, "cpu", Whole())
    drawn = views.visualize_attention_distance(photos).axes[0].lines[-2].get_ydata()
    each = [views.attention_distance([photo]).mean(dim=1).numpy() for photo in photos]
    np.testing.assert_allclose(drawn, np.mean(each, axis=0), rtol=1e-5)
    with pytest.raises(InputError, match="any_size"):
        v.visualize_features(vit(), photos, whole=Whole())


# ---- Where the answer comes from


@pytest.mark.parametrize(("method", "options"), [("rollout", dict(discard_ratio=0.4)), ("grad_cam", dict(layer_idx=0)),
                                                 ("grad_cam", dict(target=2)), ("relevance", dict(target=2))])
def test_attention_visualizer_passes_options_to_the_method(method, options):
    model, image = square_vit(), pixels(12, 12)
    views, images = v.AttentionVisualizer(model, device="cpu"), prepare_image(image, model)[0]
    expected = explain(model, images, method, **options).saliency[0]
    assert not torch.equal(expected, explain(model, images, method).saliency[0])
    torch.testing.assert_close(getattr(views, method)(image, **options), expected)
    np.testing.assert_allclose(data_of(getattr(views, f"visualize_{method}")(image, **options))[1], expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["relevance", "grad_cam", "explanations"])
def test_attention_visualizer_names_predicted_and_explained_class(method):
    model, image = square_vit(), pixels(12, 12)
    probabilities, names = model(prepare_image(image, model)[0]).softmax(dim=1)[0], model.preprocessing.class_names
    label = probabilities.argmax().item()
    other = (label + 1) % 5
    words = texts(getattr(v.AttentionVisualizer(model, device="cpu"), f"visualize_{method}")(image, target=other))
    assert f"predicted: {names[label]} ({probabilities[label]:.0%})" in words
    assert f"class explained: {names[other]} (probability {probabilities[other]:.0%})" in words


@pytest.mark.parametrize("method", ["rollout", "relevance", "grad_cam"])
def test_attention_visualizer_draws_the_numbers_it_returns(method):
    model, image = square_vit(), pixels(12, 12)
    views = v.AttentionVisualizer(model, device="cpu")
    figure, numbers = getattr(views, f"visualize_{method}")(image), getattr(views, method)(image)
    np.testing.assert_allclose(data_of(figure)[1], numbers, atol=1e-7)
    probability, label = model(prepare_image(image, model)[0]).softmax(dim=1)[0].max(dim=0)
    assert f"predicted: {model.preprocessing.class_names[label]} ({probability:.0%})" in texts(figure)
    if method != "rollout":
        other = (label.item() + 1) % 5
        name = model.preprocessing.class_names[label]
        assert f"class explained: {name} (probability {probability:.0%})" in texts(figure)
        figure = getattr(views, f"visualize_{method}")(image, target=other)
        assert f"class explained: {model.preprocessing.class_names[other]}" in texts(figure)
        assert not np.array_equal(data_of(figure)[1], numbers)


def test_visualize_explanations_draws_all_methods_side_by_side():
    model, image = square_vit(), pixels(12, 12)
    figure = v.AttentionVisualizer(model, device="cpu").visualize_explanations(image, n_steps=4)
    words = texts(figure)
    for title in (*v.TITLES.values(), "random order: area 0.", "Spearman", "class explained:", ", the predicted class"):
        assert title in words
    assert "predicted:" not in words  # once is enough
    found = compare_explanations(model, prepare_image(image, model)[0], n_steps=4)
    for shown, saliency in zip(data_of(figure)[1:5], found.saliencies.values(), strict=True):
        np.testing.assert_allclose(shown, saliency[0] / saliency[0].sum(), rtol=1e-5)
    agreement = next(axes for axes in figure.axes if axes.get_title().startswith("agreement"))
    np.testing.assert_allclose(agreement.images[0].get_array(), found.correlations)
    assert [text.get_text() for text in agreement.texts] == [f"{value:.2f}" for value in found.correlations.flatten()]
    assert len({text.get_text() for text in agreement.texts}) > 2


def test_visualize_explanations_curves_match_the_comparison():
    model, image = square_vit(), pixels(12, 12)
    figure = v.AttentionVisualizer(model, device="cpu").visualize_explanations(image, n_steps=4, n_draws=5)
    found = compare_explanations(model, prepare_image(image, model)[0], n_steps=4, n_draws=5)
    hiding, showing = (next(axes for axes in figure.axes if axes.get_title().startswith(word))
                       for word in ("hiding", "showing"))
    for axes, what in ((hiding, "deletion"), (showing, "insertion")):
        curves, draws = getattr(found, what), found.draws[what][:, :, 0]  # (R, S + 1)
        assert len(axes.lines) == len(curves) == 5
        for line, (name, values) in zip(axes.lines, curves.items(), strict=True):
            np.testing.assert_allclose(line.get_ydata(), 100 * values[:, 0], rtol=1e-5)
            assert line.get_label().startswith(f"{v.TITLES.get(name, name)}: area {area_under(values)[0]:.2f}")
        reach = 2 * draws.std(dim=0)
        band = axes.collections[0].get_paths()[0].vertices
        for end in (draws.mean(dim=0) - reach, draws.mean(dim=0) + reach):
            for share, value in zip((0, 25, 50, 75, 100), end, strict=True):
                assert min(np.abs(band - [share, 100 * value.item()]).sum(axis=1)) < 1e-3
        assert (f"± {2 * area_under(draws.T).std():.2f}\n(5 draws, ± 2 standard deviations)"
                in axes.lines[-1].get_label())


def test_visualize_explanations_draws_no_band_for_one_draw():
    views = v.AttentionVisualizer(square_vit(), device="cpu")
    figure = views.visualize_explanations(pixels(12, 12), n_steps=2, n_draws=1)
    assert not any(axes.collections for axes in figure.axes if axes.get_title().startswith(("hiding", "showing")))
    assert "±" not in texts(figure)


@pytest.mark.parametrize(("build", "others"), [
    (square_vit, ["CLS"]), (lambda: vit(n_registers=2), ["CLS", "registers"]),
    (lambda: vit(n_registers=1), ["CLS", "register"]), (lambda: timm_vit(), ["CLS"]),
    (lambda: timm_vit(class_token=False, reg_tokens=1, global_pool="avg"), ["register"]),
    (lambda: timm_vit(class_token=False, reg_tokens=2, global_pool="avg"), ["registers"]),
    (torchvision_vit, ["CLS"]), (transformers_vit, ["CLS"]),
    (lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**HF)), ["CLS", "distillation token"]),
])
def test_visualize_attention_says_where_remaining_weight_goes(build, others):
    views, image = v.AttentionVisualizer(build().eval(), device="cpu"), pixels(15, 15)
    title = views.visualize_attention(image, patch=(0, 1)).axes[1].get_title()
    said = [words.rsplit(" ", 1) for words in title.split("all patches ")[1].split(", ")[1:]]
    assert [name for name, _ in said] == others
    n_prefix = views.adapter.n_prefix
    row = views.attention_maps(image)[-1].mean(dim=0)[n_prefix + 1]
    assert sum(float(share.rstrip("%")) for _, share in said) == pytest.approx(
        100 * row[:n_prefix].sum().item(), abs=0.11)


def test_attention_visualizer_follows_a_changed_head():
    model = square_vit()
    views = v.AttentionVisualizer(model, device="cpu")
    assert views.adapter.class_names[0] == "ant"
    model.head = torch.nn.Linear(22, 3)
    model.preprocessing = replace(model.preprocessing, class_names=["oak", "ash", "elm"])
    with torch.no_grad():
        model.head.bias[1] = 100
    assert "predicted: ash (100%)" in texts(views.visualize_attention(pixels(12, 12)))
    assert views.adapter.n_classes == 3


def test_visualize_logit_lens_refuses_too_many_lines():
    views = v.AttentionVisualizer(vit(n_classes=9), device="cpu")
    assert len(views.visualize_logit_lens(pixels(), 6).axes[1].lines) == 6
    with pytest.raises(InputError, match=r"\An_classes 8 is out of range; expected 1 to 6[^\n]*\Z"):
        views.visualize_logit_lens(pixels(), 8)


def test_visualize_logit_lens_ends_in_the_prediction():
    model, image = square_vit(), pixels(12, 12)
    figure = v.AttentionVisualizer(model, device="cpu").visualize_logit_lens(image, 3)
    lines = figure.axes[1].lines
    probabilities = model(prepare_image(image, model)[0]).softmax(dim=1)[0].detach()
    first = lines[0].get_ydata()
    assert len(first) == 4
    assert first[-1] == pytest.approx(100 * probabilities.max().item(), abs=1e-3)
    assert lines[0].get_label() == model.preprocessing.class_names[probabilities.argmax()]


@pytest.mark.slow
def test_attention_visualizer_writes_names_literally():
    model = square_vit()
    names = ["$\\x$", "_a", "US$ or $", "$x^2$", "_"]
    model.preprocessing = replace(model.preprocessing, class_names=names)
    views, image = v.AttentionVisualizer(model, device="cpu"), pixels(12, 12)
    lens = views.visualize_logit_lens(image)
    assert {text.get_text() for text in lens.axes[1].get_legend().get_texts()} == set(names)
    figures = [lens, views.visualize_attention(image), views.visualize_relevance(image, 0),
               views.visualize_explanations(image, 0, n_steps=1, n_draws=1), views.visualize_token_norms(image),
               v.visualize_attention_grid(model, [image])]
    for figure in figures:
        figure.canvas.draw()  # as maths $\\x$ would be an error
        written = [text for text in figure.findobj(Text) if "$" in text.get_text() or "predicted" in text.get_text()]
        assert written
        assert not any(text.get_parse_math() for text in written)


def test_visualize_all_heads_accepts_numpy_layers():
    views = v.AttentionVisualizer(vit(), device="cpu")
    for layers, shown in ((np.int64(1), [1]), (np.array([0, 2]), [0, 2]), (torch.tensor([0, -1]), [0, 2]),
                          ((1, 2), [1, 2]), (0, [0])):
        figure = views.visualize_all_heads(pixels(), layers)
        assert [axes.get_ylabel() for axes in figure.axes if "block" in axes.get_ylabel()] == [
            f"block {layer + 1}" for layer in shown]
    for layers in (1.5, [0.5], "last"):
        with pytest.raises(InputError, match=r"\Alayer (1\.5|0\.5|last) is out of range; expected 0 to 2, [^\n]*\Z"):
            views.visualize_all_heads(pixels(), layers)


@pytest.mark.parametrize(("options", "title"), [
    ({}, "attention of the last block"), (dict(layer_idx=0), "attention of block 1 of 3"),
    (dict(layer_idx=-1, head_idx=1), "attention of block 3 of 3\nhead 2"),
    (dict(head_idx=-1), "attention of block 3 of 3\nhead 1 from the end")])
def test_draw_explanation_titles_attention_by_layer_and_head(options, title):
    figure = v.AttentionVisualizer(vit(), device="cpu").draw_explanation(pixels(), "attention", **options)
    assert figure.axes[1].get_title().startswith(f"{title}\ncolours end at ")
    assert figure.axes[1].get_title().endswith("%, the rest CLS")


# ---- Over images


def test_visualize_attention_distance_draws_heads_and_uniform_line():
    model = vit()
    views = v.AttentionVisualizer(model, device="cpu")
    images = torch.randn(4, 3, *SIZE)
    figure, numbers = views.visualize_attention_distance(images), views.attention_distance(images)
    assert numbers.shape == (3, 2)
    torch.testing.assert_close(numbers, attention_distance(attention_maps(model, images), GRID, PATCH))
    *heads, mean, uniform = figure.axes[0].lines
    np.testing.assert_allclose(np.stack([line.get_ydata() for line in heads], axis=1), numbers)
    np.testing.assert_allclose(mean.get_ydata(), numbers.mean(dim=1))
    assert list(mean.get_xdata()) == list(figure.axes[0].get_xticks()) == [1, 2, 3]
    assert figure.axes[0].get_xlabel() == "block"
    line = uniform_attention_distance(GRID, PATCH)
    assert list(uniform.get_ydata()) == [line, line]
    assert uniform.get_label() == f"uniform attention: {line:.1f}"


def test_visualize_token_norms_frames_register_artefacts():
    model = vit()
    with torch.no_grad():
        model.pos_embed[0, 1 + 4] = 30  # the fifth patch
    figure = v.AttentionVisualizer(model, device="cpu").visualize_token_norms(pixels())
    assert "after all 3 blocks; outliers framed: 3" in " ".join(texts(figure).split())
    assert [axes.patches[0].get_bbox().bounds for axes in figure.axes[1:4]] == [(4.5, 6.5, 5, 7)] * 3


@pytest.mark.slow
@pytest.mark.parametrize("model", [square_vit, lambda: vit(depth=2, n_heads=1, pool="mean")], ids=["wide", "narrow"])
def test_attention_visualizer_clips_no_text(model):
    model, image = model(), pixels(12, 12)
    images = torch.randn(2, 3, *prepare_image(image, model)[0].shape[2:])
    views = v.AttentionVisualizer(model, device="cpu")
    for figure in (views.visualize_all_layers(image), views.visualize_relevance(image),
                   views.visualize_explanations(image, n_steps=2), views.visualize_logit_lens(image),
                   views.visualize_attention_distance(images), views.visualize_token_norms(image),
                   views.visualize_attention(image), views.visualize_all_heads(image),
                   v.visualize_attention_grid(model, images)):
        assert_no_text_clipped(figure)


@pytest.mark.parametrize("name", ["timm", "timm, registers", "torchvision", "transformers"])
def test_attention_visualizer_accepts_models_of_other_libraries(name, tmp_path):
    theirs, ours, _ = shared(name, tmp_path)
    ours.preprocessing = adapt(theirs).preprocessing
    image = pixels(15, 15)
    first, second = (v.AttentionVisualizer(model.float(), device="cpu") for model in (theirs, ours))
    for method in ("attention_maps", "rollout", "relevance", "grad_cam"):
        torch.testing.assert_close(getattr(first, method)(image), getattr(second, method)(image), rtol=1e-4, atol=1e-5)
    assert isinstance(first.visualize_explanations(image, n_steps=2), Figure)
    assert isinstance(v.visualize_attention_grid(theirs, torch.randn(2, 3, 15, 15)), Figure)


def test_visualize_rollout_says_it_ignores_the_class():
    figure = v.AttentionVisualizer(square_vit(), device="cpu").visualize_rollout(pixels(12, 12))
    assert "this map is the same for every class" in texts(figure)
    assert "class explained" not in texts(figure)


def test_visualize_explanations_lists_refused_methods():
    model = vit(depth=1)
    figure = v.AttentionVisualizer(model, device="cpu").visualize_explanations(pixels(), n_steps=2)
    assert "left out: Grad-CAM after the only block is blank" in " ".join(texts(figure).split())
    assert_no_text_clipped(figure)


@pytest.mark.parametrize("patch", [17, (1, 2, 3), "a"])
def test_visualize_attention_refuses_a_bad_patch(patch):
    with pytest.raises(InputError, match="is not a position; expected"):
        v.AttentionVisualizer(vit(), device="cpu").visualize_attention(pixels(), patch=patch)


def test_attention_visualizer_accepts_numpy_indices_and_one_layer():
    views, image = v.AttentionVisualizer(vit(), device="cpu"), pixels()
    assert "block 2 of 3" in texts(views.visualize_attention(image, np.int64(1)))
    assert len(data_of(views.visualize_all_heads(image, layers=1))) == 3


def test_attention_visualizer_draws_half_precision_models():
    views = v.AttentionVisualizer(vit().bfloat16(), device="cpu")
    assert isinstance(views.visualize_explanations(pixels(), n_steps=2), Figure)
    assert isinstance(views.visualize_token_norms(pixels()), Figure)
    assert isinstance(views.visualize_logit_lens(pixels()), Figure)


def test_attention_visualizer_accepts_lists_of_images(tmp_path):
    model, images = square_vit(), [pixels(12, 12), pixels(40, 30)]
    Image.fromarray(images[1]).save(tmp_path / "photo.png")
    views = v.AttentionVisualizer(model, device="cpu")
    batch = torch.cat([prepare_image(image, model)[0] for image in images])
    for given in (images, [images[0], tmp_path / "photo.png"], batch):
        torch.testing.assert_close(views.attention_distance(given), views.attention_distance(batch))
    assert isinstance(views.visualize_attention_distance(images), Figure)
    assert isinstance(v.visualize_attention_grid(model, images), Figure)
    assert "Grad-CAM after block 2 of 3" in texts(views.visualize_grad_cam(images[0]))
    with pytest.raises(InputError, match="there is no image"):
        views.attention_distance([])


def test_visualize_all_heads_counts_omitted_blocks():
    figure = v.AttentionVisualizer(vit(depth=8), device="cpu").visualize_all_heads(pixels())
    assert "in 6 of 8 blocks" in texts(figure)


# ---- Swin Transformers


@pytest.mark.parametrize("name", SWINS)
def test_views_of_a_swin_draw_the_rows_of_a_patch(name):
    model, images, patch = SWINS[name](), swin_images(name, 1), (3, -4)
    views = v.AttentionVisualizer(model, device="cpu")
    blocks = rows_by_block(model, images, patch)
    figure = views.visualize_attention(images, 3, 1, patch=patch)
    assert "Where the framed patch (3, -4) looks: stage 2, block 2, head 2 of 2" in texts(figure)
    expected = blocks[3].weights[0, 1].view(blocks[3].grid)
    np.testing.assert_allclose(data_of(figure)[1], expected, atol=1e-7)
    column = images.shape[3] // 4 - 4
    frames = [axes.patches[0].get_bbox().bounds for axes in figure.axes[:2]]
    assert frames == [(4 * column - 0.5, 12 - 0.5, 4, 4), (8 * (column // 2) - 0.5, 8 - 0.5, 8, 8)]
    figure = views.visualize_all_layers(images, patch=patch)
    names = [f"stage {stage}, block {block}" for stage in (1, 2, 3) for block in (1, 2)]
    assert [axes.get_title() for axes in figure.axes[1:7]] == names
    for shown, one in zip(data_of(figure)[1:], blocks, strict=False):
        np.testing.assert_allclose(shown, one.weights[0].mean(dim=0).view(one.grid), atol=1e-7)
    assert_no_text_clipped(figure)
    figure = views.visualize_all_heads(images, layers=[0, 5], patch=patch)
    assert len(maps_of(figure)) == 1 + 4
    assert "stage 3\nblock 2" in texts(figure)


@pytest.mark.parametrize("name", SWINS)
def test_windows_and_tables_are_drawn(name):
    model, images = SWINS[name](), swin_images(name, 1)
    figure = v.visualize_windows(model, images)
    titles = [axes.get_title() for axes in figure.axes]
    side = images.shape[2] // 4
    assert titles[0] == (f"stage 1, block 1: {side} × {side} tokens\nwindows of 7 × 7 tokens = 28 × 28 pixels\n"
                         "not shifted")
    assert titles[3].startswith("stage 1, block 2")
    assert titles[3].endswith("shifted by 3 tokens = 12 pixels")
    assert "one window holds the whole map" in titles[5]
    assert "Hatched" in texts(figure)
    borders = {round(float(x) + 0.5) for line in figure.axes[3].collections[0].get_segments() for x, _ in line}
    assert {12, 40} <= borders  # 3 tokens, and a window later
    assert_no_text_clipped(figure)
    figure = v.visualize_bias_tables(model, layers=[1, 2])
    shown, (table, window) = data_of(figure), adapt(model).tables[1]
    np.testing.assert_allclose(shown[0], bias_by_offset(table, window)[0])
    low, top = figure.axes[0].images[0].get_clim()
    assert -low == top == pytest.approx(table.abs().max().item())
    assert "down: positive" in texts(figure)
    assert_no_text_clipped(figure)


@pytest.mark.parametrize("name", ["timm, BEiT, mean", "timm, BEiT, mean, shared table, 2 x 5 patches"])
def test_tables_of_a_beit_are_drawn_a_row_for_each(name, tmp_path):
    figure = v.visualize_bias_tables(shared(name, tmp_path)[0])
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels == (["all blocks"] if "shared" in name else ["block 1", "block 2", "block 3"])
    assert ("in all 3 blocks" in texts(figure)) != ("shared" in name)
    assert_no_text_clipped(figure)


def test_views_of_a_swin_without_a_patch_are_refused_in_one_line():
    views, image = v.AttentionVisualizer(SWINS["ours"](), device="cpu"), pixels(56, 56)
    for view in (views.visualize_attention, views.visualize_all_heads, views.visualize_all_layers, views.rollout,
                 views.relevance, views.attention_maps, views.visualize_logit_lens, views.visualize_token_norms):
        with pytest.raises(InputError, match=r"\Aa SwinTransformer attends within windows[^\n]*use [^\n]*\Z"):
            view(image)
    with pytest.raises(InputError, match=r"\A[^\n]*a bias for each offset[^\n]*use visualize_bias_tables\Z"):
        v.visualize_positions(views.model)
    for draw in (v.visualize_windows, v.visualize_distillation):
        with pytest.raises(InputError, match=r"\A[^\n]*; use [^\n]*\Z"):
            draw(square_vit(), pixels(12, 12))
    for model in (square_vit(), SwinTransformer(img_size=8, embed_dim=4, depths=(1,), n_heads=(1,),
                                                relative_bias=False)):
        with pytest.raises(InputError, match=r"\Athis [^\n]* has no relative position bias; use [^\n]*\Z"):
            v.visualize_bias_tables(model)


@pytest.mark.parametrize("name", ["torchvision", "transformers"])
def test_a_swin_of_another_library_is_resized_as_in_its_weights(name):
    assert adapt(SWINS[name]()).preprocessing.interpolation == "bicubic"


def test_a_swin_has_distances_and_grad_cam():
    model = SWINS["ours"]()
    views = v.AttentionVisualizer(model, device="cpu")
    photo = pixels(56, 56)
    axes = views.visualize_attention_distance([photo]).axes[0]
    distances = views.attention_distance([photo]).numpy()
    np.testing.assert_allclose(axes.lines[-2].get_ydata(), np.nanmean(distances, axis=1))
    assert [label.get_text() for label in axes.get_xticklabels()][2] == "stage 2\nblock 1"
    figure = views.visualize_grad_cam(photo, layer_idx=2)
    assert "Grad-CAM after stage 2 of 3" in texts(figure)
    assert data_of(figure)[1].shape == (7, 7)
    figure = views.visualize_explanations(photo, n_steps=1, n_draws=1)
    assert texts(figure).count("attends within windows") == 1
    assert "only one method applies" in texts(figure)


def test_tokens_over_the_edge_lie_where_they_are():
    """A grid of 7 tokens has 4 of twice the size in the next stage, and the last reaches over the picture."""
    model = SwinTransformer(img_size=28, patch_size=4, n_classes=5, embed_dim=4, depths=(1, 1), n_heads=(1, 1)).eval()
    figure = v.AttentionVisualizer(model, device="cpu").visualize_attention(pixels(28, 28), patch=(6, 6))
    drawn = figure.axes[1].images[0]
    assert drawn.get_array().shape == (4, 4)
    assert tuple(drawn.get_extent()) == (-0.5, 31.5, 31.5, -0.5)
    assert figure.axes[1].get_xlim() == (-0.5, 27.5)


# ---- The two tokens of a DeiT


@pytest.mark.parametrize("build", [
    lambda: DistilledViT(img_size=SIDE_OF_OTHERS, patch_size=5, n_classes=5, embed_dim=28, depth=3, n_heads=7),
    WITH_HEAD["timm, distilled"][0], WITH_HEAD["DeiTForImageClassificationWithTeacher"][0]])
def test_visualize_distillation_draws_both_tokens(build):
    torch.manual_seed(0)
    model, image = randomised(build()), pixels(15, 15)
    figure = v.visualize_distillation(model, image)
    images = prepare_image(image, model)[0]
    maps = attention_maps(model, images)[:, 0].mean(dim=1)  # (L, N, N)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 2]
    for i, drawn in enumerate(shown[:6]):
        np.testing.assert_allclose(drawn, maps[i % 3, i // 3, 2:].view(3, 3), atol=1e-6)
    features, attention = token_similarity(model, images)
    curve = next(axes for axes in figure.axes if axes.get_ylabel() == "cosine similarity")
    np.testing.assert_allclose(curve.lines[0].get_ydata(), features)
    np.testing.assert_allclose(curve.lines[1].get_ydata(), attention)
    assert_no_text_clipped(figure)


def test_colours_of_a_large_swin_end_among_the_weights_of_the_window():
    """A window of 4 x 4 among 40 x 40 tokens is 1% of the map: its 99th percentile over all tokens would be 0."""
    model = SwinTransformer(80, 2, 3, 2, 6, (2,), (1,), 4).eval()
    row = rows_by_block(model, torch.randn(1, 3, 80, 80), (20, 20))[0].weights[0, 0].numpy()  # (1600,)
    assert (row > 0).sum() == 16
    assert np.quantile(row, 0.99, method="lower") == 0
    assert v.top_weight(row.reshape(40, 40)) == np.sort(row)[-2]
    assert v.top_weight(np.zeros((2, 2))) > 0
