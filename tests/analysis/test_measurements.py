"""Measurements against closed forms and hand computations."""

import math

import numpy as np
import pytest
import torch
from other_models import BUILDERS, shared
from torch import nn

import vit_model
from vit_bridge import runtime as runtime_module
from vit_bridge.analysis import attention as attention_module
from vit_bridge.analysis import capture as capture_module
from vit_bridge.analysis import cost as cost_module
from vit_bridge.analysis import metrics as metrics_module
from vit_bridge.analysis import receptive_field as m
from vit_bridge.models import adapters as adapters_module
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.training import linear_probe as linear_probe_module
from vit_model import InputError, VisionTransformer, allow_any_size

# 2 x 3 patches of 7 x 5 pixels, so that no swapped axis stays unseen.
SIZE, PATCH, GRID, N = (14, 15), (7, 5), (2, 3), 7


def vit(**options):
    torch.manual_seed(0)
    settings = dict(img_size=SIZE, patch_size=PATCH, n_classes=5, embed_dim=22, depth=3, n_heads=2, dropout=0.5)
    return VisionTransformer(**{**settings, **options})


def convnet(**options):
    torch.manual_seed(0)
    settings = dict(img_size=29, n_classes=5, widths=(3, 5, 7), depths=(1, 2, 1), stem_stride=1)
    return ConvNet(**{**settings, **options})


def hybrid():
    torch.manual_seed(0)
    return HybridCNNViT(n_classes=5, embed_dim=22, depth=2, n_heads=2, img_size=(12, 20), patch_size=4)


def images_for(model, n=3):
    size = vit_model.pair(model.config.img_size)
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1))


def state_of(model):
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return modes, hooks, grads, weights


def assert_same_state(before, after):
    assert before[:2] == after[:2]
    for old, new in zip(before[2], after[2], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    for name, old in before[3].items():
        assert torch.equal(old, after[3][name]), name


# ---- Attention


def test_zero_queries_attend_uniformly():
    model = vit()
    for block in model.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
    maps = capture_module.attention_maps(model, images_for(model))
    assert maps.shape == (3, 3, 2, N, N)
    assert torch.equal(maps, torch.full_like(maps, 1 / N))


def test_maps_are_those_of_the_weights():
    model = vit().train()
    images = images_for(model)
    maps = capture_module.attention_maps(model, images)
    model.eval()
    with torch.no_grad():
        x = torch.cat([model.cls_token.expand(3, -1, -1), model.patch_embed(images)], dim=1) + model.pos_embed
        for block, layer in zip(model.blocks, maps, strict=True):
            y = block.norm1(x)
            for head in range(2):
                rows = slice(11 * head, 11 * head + 11)
                q = y @ block.attn.qkv.weight[:22][rows].T + block.attn.qkv.bias[:22][rows]
                k = y @ block.attn.qkv.weight[22:44][rows].T + block.attn.qkv.bias[22:44][rows]
                by_hand = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(11), dim=-1)
                torch.testing.assert_close(layer[:, head], by_hand)
            x = block(x)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(3, 3, 2, N))


def test_select_attention():
    maps = torch.rand(5, 3, 2, N, N)
    assert torch.equal(attention_module.select_attention(maps, 1, 1), maps[1, :, 1])
    assert torch.equal(attention_module.select_attention(maps, -5, -2), maps[0, :, 0])
    torch.testing.assert_close(attention_module.select_attention(maps), maps[4].mean(dim=1))


@pytest.mark.parametrize(("layer", "head", "text"), [(5, 0, "layer_idx 5 .* 0 to 4"), (-6, 0, "layer_idx -6"),
                                                     (0, 2, "head_idx 2 .* 0 to 1"), (0.5, 0, "layer_idx 0.5")])
def test_select_attention_out_of_range(layer, head, text):
    with pytest.raises(InputError, match=text):
        attention_module.select_attention(torch.rand(5, 3, 2, N, N), layer, head)


def test_cls_grid_is_the_first_row_without_cls():
    maps = torch.arange(2 * N * N, dtype=torch.float32).reshape(2, N, N)
    grid = attention_module.cls_attention_grid(maps, GRID)
    assert torch.equal(grid[1], torch.tensor([[50.0, 51, 52], [53, 54, 55]]))
    with pytest.raises(InputError, match=r"7 tokens .* 3x3"):
        attention_module.cls_attention_grid(maps, (3, 3))


def test_position_similarity():
    model = vit()
    similarity = attention_module.position_similarity(model)
    assert similarity.shape == (*GRID, *GRID)
    a, b = model.pos_embed[0, 1 + 3], model.pos_embed[0, 1 + 2]
    assert similarity[1, 0, 0, 2].item() == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=1e-6)
    for model in (vit(position="none"), convnet()):
        with pytest.raises(InputError, match="no position embeddings"):
            attention_module.position_similarity(model)


def test_a_convnet_has_no_maps():
    with pytest.raises(InputError, match="ConvNet has no attention"):
        capture_module.attention_maps(convnet(), torch.zeros(1, 3, 29, 29))


def test_class_probabilities():
    model = vit().train()
    images = images_for(model)
    torch.testing.assert_close(runtime_module.class_probabilities(model, images), model.eval()(images).softmax(dim=-1))


# ---- How far attention looks


def test_attention_distance_of_uniform_attention_is_its_closed_form():
    for grid, patch, expected in (((14, 14), 16, 116.49), ((8, 8), 4, 16.55)):
        n = grid[0] * grid[1]
        assert attention_module.uniform_attention_distance(grid, patch) == pytest.approx(expected, abs=5e-3)
        maps = torch.full((2, 3, 5, n + 1, n + 1), 1 / (n + 1))
        uniform = attention_module.uniform_attention_distance(grid, patch)
        assert attention_module.attention_distance(maps, grid, patch).flatten().tolist() == pytest.approx([uniform] * 10)
        counted = attention_module.attention_distance(maps, grid, patch, renormalise=False)
        assert counted.flatten().tolist() == pytest.approx([uniform * n / (n + 1)] * 10)


def test_attention_distance_is_that_of_the_patches_looked_at():
    """Each patch of 2 x 3 looks at its right neighbour, or stays where there is none; a quarter goes to CLS."""
    maps = torch.zeros(1, 1, 1, 7, 7)
    for patch in range(6):
        maps[0, 0, 0, 1 + patch, 1 + (patch if patch % 3 == 2 else patch + 1)] = 0.75
    maps[..., 0] += 0.25
    maps[0, 0, 0, 0, 0] = 100  # what CLS looks at does not matter
    assert attention_module.attention_distance(maps, GRID, PATCH).item() == pytest.approx(5 * 4 / 6)
    assert attention_module.attention_distance(maps, GRID, PATCH, renormalise=False).item() == pytest.approx(0.75 * 5 * 4 / 6)


def test_attention_distance_by_a_plain_program():
    """Again, in numpy, patch by patch."""
    model = vit(n_registers=2)
    maps = capture_module.attention_maps(model, images_for(model))
    ours = attention_module.attention_distance(maps, GRID, PATCH, model.n_prefix_tokens).numpy()
    A, (rows, columns), (height, width) = maps.double().numpy(), GRID, PATCH
    places = [(row * height, column * width) for row in range(rows) for column in range(columns)]
    expected = np.zeros(A.shape[:1] + A.shape[2:3])
    for layer in range(A.shape[0]):
        for head in range(A.shape[2]):
            total = 0.0
            for image in range(A.shape[1]):
                for i, (y, x) in enumerate(places):
                    weights = A[layer, image, head, 3 + i, 3:]
                    weights = weights / weights.sum()
                    total += sum(w * np.hypot(y - v, x - u) for w, (v, u) in zip(weights, places, strict=True))
            expected[layer, head] = total / (A.shape[1] * len(places))
    assert np.abs(ours - expected).max() < 1e-9


def test_attention_distance_of_maps_that_do_not_fit():
    with pytest.raises(InputError, match="maps over 7 tokens do not fit"):
        attention_module.attention_distance(torch.ones(1, 1, 1, 7, 7), GRID, PATCH, 2)


# ---- Receptive fields


def test_a_vit_sees_one_patch_and_then_everything():
    model = vit()
    images = images_for(model)
    field = m.receptive_field(model, images, 0)
    assert field.shape == SIZE
    inside = torch.zeros(SIZE, dtype=torch.bool)
    inside[7:14, 5:10] = True  # the patch at (1, 1) of 2 x 3
    assert torch.equal(field > 0, inside)
    by_hand = model.patch_embed.proj.weight.sum(dim=0).abs().mean(dim=0).double()
    torch.testing.assert_close(field[7:14, 5:10], by_hand / by_hand.sum(), rtol=1e-5, atol=1e-9)
    assert m.unit_centre(model, SIZE, 0) == (10.0, 7.0)
    for depth in (1, None):
        field = m.receptive_field(model, images, depth)
        assert (field > 0).all()
        assert field.sum().item() == pytest.approx(1, abs=1e-12)
    assert m.theoretical_receptive_field(model, 0) == PATCH
    assert m.theoretical_receptive_field(model) == SIZE


def test_without_attention_a_token_sees_its_patch_at_every_depth():
    model = vit()
    for block in model.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    for depth in range(4):
        rows, columns = m.receptive_field(model, images_for(model), depth).nonzero().T
        assert (rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()) == (7, 13, 5, 9)


def test_the_centre_of_a_pooled_convnet_counts_the_units_that_are_there():
    """Maps of 31, 15, 7 and 3 units, of which the ones at 15, 7, 3 and 1 are taken."""
    model = ConvNet(32, 3, 5, (5, 7, 11), (1, 1, 1), 1, "pooled")
    assert [m.unit_centre(model, (32, 32), depth) for depth in range(4)] == [(15.5,) * 2, (15,) * 2, (14,) * 2,
                                                                           (12,) * 2]


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
def test_a_convnet_sees_its_window(stem_stride):
    size = {1: (73, 61), 2: (73, 61), 4: (257, 139)}[stem_stride]
    model = convnet(stem_stride=stem_stride, img_size=size)
    images = images_for(model, 2)
    for depth in range(4):
        field = m.receptive_field(model, images, depth)
        assert field.sum().item() == pytest.approx(1, abs=1e-12)
        centre, window = m.unit_centre(model, size, depth), m.theoretical_receptive_field(model, depth)
        for axis, places in enumerate(field.nonzero().T):
            first, last = centre[axis] - (window[axis] - 1) / 2, centre[axis] + (window[axis] - 1) / 2
            # Nothing outside the window. Where no ReLU is dead on the way, all of it: so the centre is right.
            assert places.min().item() >= max(0, first)
            assert places.max().item() <= min(size[axis] - 1, last)
            if depth == 0:
                assert (places.min().item(), places.max().item()) == (first, last)


def test_theoretical_window_by_hand():
    # Stem 3 x 3: 3. Stage 1, two 3 x 3 at stride 1: 3 + 2 + 2 = 7. Stage 2, stride 2 in its first convolution:
    # 7 + 2 + 4 = 13, second block + 4 + 4 = 21. Stage 3: 21 + 4 + 8 = 33.
    assert [m.theoretical_receptive_field(convnet(), i) for i in range(4)] == [(3, 3), (7, 7), (21, 21), (33, 33)]
    # ResNet-18: 435 is the number of Araujo et al. 2019, Table 1.
    resnet = convnet(widths=(2, 2, 2, 2), depths=(2, 2, 2, 2), stem_stride=4)
    assert m.theoretical_receptive_field(resnet) == (435, 435)
    assert m.theoretical_receptive_field(hybrid(), 0) == (7, 7)
    assert m.theoretical_receptive_field(hybrid(), 1) == (12, 20)


def test_hybrid_stem_is_local():
    model = hybrid()
    rows, columns = m.receptive_field(model, images_for(model), 0).nonzero().T
    row, column = m.unit_centre(model, (12, 20), 0)
    assert (row, column) == (4.0, 8.0)
    assert (rows.min().item(), rows.max().item()) == (1, 7)
    assert (columns.min().item(), columns.max().item()) == (5, 11)


@pytest.mark.parametrize("depth", [-1, 4, 1.0, "last"])
def test_depth_out_of_range(depth):
    model = vit()
    with pytest.raises(InputError, match="has depths 0 to 3"):
        m.receptive_field(model, images_for(model), depth)


def test_no_gradient_is_an_error():
    model = vit()
    nn.init.zeros_(model.patch_embed.proj.weight)
    with pytest.raises(InputError, match="zero at every pixel"):
        m.receptive_field(model, images_for(model), 0)


@pytest.mark.parametrize("name", [name for name in BUILDERS if "eager" not in name])
def test_a_vit_of_another_library_sees_what_ours_sees(name, tmp_path):
    theirs, ours, images = shared(name, tmp_path)
    for depth in (0, 1, None):
        field = m.receptive_field(theirs, images, depth)
        torch.testing.assert_close(field, m.receptive_field(ours, images, depth), rtol=1e-8, atol=1e-12)
        assert m.unit_centre(theirs, images.shape[2:], depth) == m.unit_centre(ours, images.shape[2:], depth)
        assert m.theoretical_receptive_field(theirs, depth) == m.theoretical_receptive_field(ours, depth)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(m.receptive_field(theirs, images), field)
    with pytest.raises(InputError, match=r"\Agot images of shape[^\n]*\Z"):
        m.receptive_field(theirs, images[:, :1])


def test_the_unit_is_in_the_middle_of_the_images_that_are_given():
    model = allow_any_size(vit())
    images = torch.randn(2, 3, 28, 10, generator=torch.Generator().manual_seed(1))  # 4 x 2 patches
    rows, columns = m.receptive_field(model, images, 0).nonzero().T
    assert (rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()) == (14, 20, 5, 9)
    nn.init.zeros_(model.blocks[0].attn.proj.weight)  # so that a token sees its own patch after the block too
    rows, columns = m.receptive_field(model, images, 1).nonzero().T
    assert (rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()) == (14, 20, 5, 9)
    assert m.unit_centre(model, (28, 10), 1) == (17.0, 7.0)


def test_other_models_have_no_known_layers():
    with pytest.raises(InputError, match="Linear has no known layers"):
        adapters_module.layers_of(nn.Linear(3, 7))


def test_radius_holding():
    field = torch.zeros(11, 13, dtype=torch.float64)
    field[5, 6], field[5, 9], field[1, 9], field[5, 0] = 0.5, 0.3, 0.15, 0.05
    for share, radius in ((0.5, 0), (0.51, 3), (0.8, 3), (0.9, 5), (0.96, 6), (1.0, 6)):
        assert m.radius_holding(field, share) == pytest.approx(radius)
    assert m.radius_holding(field, 0.5, centre=(5, 9)) == pytest.approx(3)
    assert m.radius_holding(7 * field, 0.9) == pytest.approx(5)
    even = torch.full((401, 401), 1 / 401**2)
    assert m.radius_holding(even, 0.5) == pytest.approx(401 * math.sqrt(0.5 / math.pi), abs=1)
    for share in (0, 1.01):
        with pytest.raises(InputError, match="share"):
            m.radius_holding(field, share)


def test_receptive_field_by_finite_differences():
    """Again, in numpy: each pixel is moved a little both ways, and the unit in the centre read off."""
    for model, depth in ((vit(dropout=0.0), 1), (convnet(img_size=9, widths=(3, 5), depths=(1, 1)), 2)):
        model = model.double().eval()
        images = images_for(model, 2).double()
        height, width = images.shape[2:]

        def unit(pixels, model=model, depth=depth):
            outputs = []
            hook = adapters_module.layers_of(model)[depth].register_forward_hook(lambda module, args, output: outputs.append(output))
            with torch.no_grad():
                model.forward_features(torch.from_numpy(pixels)[None])
            hook.remove()
            features = outputs[0][0].numpy()
            if features.ndim == 2:  # tokens (1 + rows * columns, D)
                rows, columns = GRID
                return features[1 + rows // 2 * columns + columns // 2].sum()
            return features[:, features.shape[1] // 2, features.shape[2] // 2].sum()

        field = np.zeros((height, width))
        for image in images.numpy():
            for place in np.ndindex(*image.shape):
                step = np.zeros_like(image)
                step[place] = 1e-5
                field[place[1:]] += abs(unit(image + step) - unit(image - step)) / 2e-5
        expected = field / field.sum()
        ours = m.receptive_field(model, images, depth).numpy()
        assert np.abs(ours - expected).max() < 1e-6


# ---- Nothing is changed


def measure_everything(model, images):
    m.receptive_field(model, images, 1)
    runtime_module.class_probabilities(model, images)
    cost_module.count_flops(model)
    cost_module.throughput(model, batch_size=2, seconds=0, train=True)
    cost_module.peak_memory(model, images, train=True)
    if isinstance(model, VisionTransformer):
        capture_module.attention_maps(model, images)


@pytest.mark.parametrize("make", [vit, convnet, hybrid])
def test_measuring_changes_nothing(make):
    model = make().train()
    model.head.eval()  # a mode of its own
    images = images_for(model)
    model(images).sum().backward()
    before, copied, random_state = state_of(model), images.clone(), torch.get_rng_state()
    measure_everything(model, images)
    assert_same_state(before, state_of(model))
    assert torch.equal(images, copied)
    assert not images.requires_grad
    if make is convnet:  # without dropout in a training pass nothing is drawn
        assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("measure", [capture_module.attention_maps, m.receptive_field, runtime_module.class_probabilities, cost_module.peak_memory,
                                     lambda model, images: cost_module.count_flops(model, (14, 20))])
def test_an_error_changes_nothing(measure):
    model = vit().train()
    before = state_of(model)
    with pytest.raises(InputError):
        measure(model, torch.zeros(2, 3, 14, 20))
    assert_same_state(before, state_of(model))


def test_measurements_repeat():
    model = vit().train()
    images = images_for(model)
    assert torch.equal(capture_module.attention_maps(model, images), capture_module.attention_maps(model, images))
    assert torch.equal(m.receptive_field(model, images), m.receptive_field(model, images))


# ---- Costs


def test_count_parameters():
    model = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 5))
    assert cost_module.count_parameters(model) == 28 + 40
    model[0].requires_grad_(False)
    assert cost_module.count_parameters(model, trainable_only=True) == 40


def test_flops_of_a_vit():
    D, hidden, patches = 22, 88, 6
    embed = 2 * patches * (7 * 5 * 3) * D
    block = 2 * N * D * 3 * D + 2 * 2 * N * N * D + 2 * N * D * D + 2 * 2 * N * D * hidden
    assert cost_module.count_flops(vit()) == embed + 3 * block + 2 * D * 5


def test_flops_of_a_convnet():
    model = convnet(depths=(1, 1, 1))
    H, W = 17, 13
    hand = 2 * 9 * 3 * 3 * H * W + 2 * 2 * 9 * 3 * 3 * H * W  # stem, stage 1
    hand += 2 * (9 * 3 * 5 + 9 * 5 * 5 + 3 * 5) * 9 * 7  # stage 2 with its 1 x 1 shortcut
    hand += 2 * (9 * 5 * 7 + 9 * 7 * 7 + 5 * 7) * 5 * 4
    assert cost_module.count_flops(model, (H, W)) == hand + 2 * 7 * 5


def test_flops_of_a_published_model():
    # DeiT-Ti: 1.3 G multiply-adds at 224 pixels (Touvron et al. 2021, released code: 1.258 G with attention)
    tiny = VisionTransformer(embed_dim=192, depth=12, n_heads=3)
    assert cost_module.count_flops(tiny) / 2 == pytest.approx(1.26e9, rel=0.01)


def test_throughput_is_images_over_the_median_time(monkeypatch):
    ticks = iter([0, 1, 10, 12, 20, 27])  # passes of 1, 2 and 7 s
    monkeypatch.setattr(cost_module.time, "perf_counter", lambda: next(ticks))
    assert cost_module.throughput(vit(), batch_size=11, seconds=0) == 11 / 2
    with pytest.raises(InputError, match="batch_size 0"):
        cost_module.throughput(vit(), batch_size=0)


def test_peak_memory_by_hand():
    assert cost_module.peak_memory(nn.Linear(3, 7), torch.zeros(5, 3)) == 4 * 5 * 7
    # The second layer's input is alive while its output is made; the first layer's is the images.
    two = nn.Sequential(nn.Linear(3, 1000), nn.Linear(1000, 7))
    assert cost_module.peak_memory(two, torch.zeros(5, 3)) == 4 * 5 * (1000 + 7)


def test_training_holds_activations_and_gradients():
    model = vit()
    images = images_for(model, 11)
    weights = 4 * cost_module.count_parameters(model)
    assert cost_module.peak_memory(model, images, train=True) > cost_module.peak_memory(model, images) + weights


def test_fitted_exponent():
    assert cost_module.fitted_exponent([2, 3, 7], [5 * n**1.5 for n in (2, 3, 7)]) == pytest.approx(1.5)
    for sizes, values in (([2], [3]), ([2, 3], [1]), ([2, 0], [1, 1]), ([2, 3], [1, -1])):
        with pytest.raises(InputError, match="no exponent follows"):
            cost_module.fitted_exponent(sizes, values)


# ---- Which classes are taken for which


def test_confusion_by_hand():
    labels, predictions = torch.tensor([0, 0, 0, 2, 2, 0]), torch.tensor([0, 1, 0, 2, 0, 1])
    confusion = metrics_module.confusion_matrix(labels, predictions, 4)
    assert confusion.tolist() == [[2, 2, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert confusion.dtype == torch.int64
    assert metrics_module.class_recalls(confusion).nan_to_num(-1).tolist() == [0.5, -1, 0.5, -1]
    assert metrics_module.confusion_matrix(labels[:0], labels[:0], 2).tolist() == [[0, 0], [0, 0]]


def test_balanced_accuracy_by_hand():
    assert metrics_module.balanced_accuracy(torch.tensor([[90, 10], [4, 1]])) == pytest.approx((0.9 + 0.2) / 2)
    assert metrics_module.balanced_accuracy(torch.tensor([[3, 1, 0], [0, 0, 0], [1, 1, 0]])) == pytest.approx(0.75 / 2)
    with pytest.raises(InputError, match="0 images"):
        metrics_module.balanced_accuracy(torch.zeros(3, 3, dtype=torch.int64))


@pytest.mark.parametrize(("labels", "predictions", "text"), [
    ([0, 3], [0, 1], "labels from 0 to 3 are out of range; expected 0 to 2"),
    ([0, -1], [0, 1], "labels from -1 to 0"),
    ([0, 1], [0, 3], "predictions from 0 to 3"),
    ([0, 1], [0], "no pairs"),
])
def test_confusion_of_impossible_classes(labels, predictions, text):
    with pytest.raises(InputError, match=text):
        metrics_module.confusion_matrix(torch.tensor(labels), torch.tensor(predictions), 3)


# ---- Accuracies


def test_wilson_interval():
    assert metrics_module.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    low, high = metrics_module.wilson_interval(0, 20)
    assert low == 0
    assert high == pytest.approx(1.96**2 / (20 + 1.96**2))
    assert metrics_module.wilson_interval(20, 20)[1] == pytest.approx(1)
    low, high = metrics_module.wilson_interval(37, 101, z=1.3)
    for edge in (low, high):  # the edges p solve |share - p| = z sqrt(p (1 - p) / n)
        assert abs(37 / 101 - edge) == pytest.approx(1.3 * math.sqrt(edge * (1 - edge) / 101))
    for correct, n in ((-1, 10), (11, 10), (0, 0)):
        with pytest.raises(InputError, match=f"{correct} correct of {n}"):
            metrics_module.wilson_interval(correct, n)


class ToyLoader(list):
    class_names = ("a", "b", "c")
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def toy_loader(n, seed, separable, side=(7, 5), batch_size=64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    images = torch.randn(n, 3, *side, generator=generator)
    if separable:
        images[torch.arange(n), labels, 0, 0] += 20
    return ToyLoader(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def test_linear_classifier_separates():
    test = toy_loader(101, 2, True)
    result = linear_probe_module.linear_classifier(toy_loader(997, 0, True), toy_loader(211, 1, True), test)
    assert result == dict(val_acc=1.0, test_acc=1.0, test_correct=101, test_n=101, ridge=result["ridge"])
    assert result["ridge"] in linear_probe_module.RIDGES
    assert test.passes == 1


def test_linear_classifier_is_ridge_regression():
    train, val = toy_loader(97, 0, False), toy_loader(211, 1, False)
    x, y = torch.cat([images for images, _ in train]), torch.cat([labels for _, labels in train])
    x = torch.cat([x.flatten(1), torch.ones(97, 1)], dim=1).double()
    accuracies = {}
    for ridge in linear_probe_module.RIDGES:
        penalty = ridge * (x[:, :-1] ** 2).sum() / 105 * torch.eye(106).double()
        penalty[-1, -1] = 0
        weight = torch.linalg.solve(x.T @ x + penalty, x.T @ nn.functional.one_hot(y, 3).double())
        answers = [torch.cat([images.flatten(1), torch.ones(len(images), 1)], dim=1).double() @ weight
                   for images, _ in val]
        labels = torch.cat([labels for _, labels in val])
        accuracies[ridge] = (torch.cat(answers).argmax(dim=1) == labels).double().mean().item()
    result = linear_probe_module.linear_classifier(train, val)
    assert result["val_acc"] == pytest.approx(max(accuracies.values()))
    assert accuracies[result["ridge"]] == max(accuracies.values())
    assert result["test_acc"] is None


def test_linear_classifier_on_noise_is_at_chance():
    test = toy_loader(2003, 2, False)
    result = linear_probe_module.linear_classifier(toy_loader(997, 0, False), toy_loader(211, 1, False), test)
    low, high = metrics_module.wilson_interval(result["test_correct"], 2003, z=4)
    assert low < 1 / 3 < high


def test_linear_classifier_reads_at_most_max_images():
    train, val = toy_loader(200, 0, True), toy_loader(211, 1, True)
    for images, _ in list(train)[2:]:
        images[:] = math.nan
    train[1][0][50:] = math.nan
    assert linear_probe_module.linear_classifier(train, val, max_images=64 + 50)["val_acc"] == 1


def test_linear_classifier_of_images_that_tell_nothing():
    train, val = toy_loader(97, 0, False), toy_loader(53, 1, False)
    for images, _ in train:
        images.zero_()
    labels = torch.cat([labels for _, labels in train])
    expected = torch.cat([labels for _, labels in val]) == labels.bincount().argmax()
    assert linear_probe_module.linear_classifier(train, val)["val_acc"] == pytest.approx(expected.double().mean().item())


def test_linear_classifier_pools_to_32():
    assert linear_probe_module.pixel_features(torch.zeros(2, 3, 64, 96)).shape == (2, 3 * 32 * 32 + 1)
    assert linear_probe_module.pixel_features(torch.zeros(2, 3, 7, 96)).shape == (2, 3 * 7 * 32 + 1)
    images = torch.randn(1, 1, 64, 32)
    assert linear_probe_module.pixel_features(images)[0, 0] == pytest.approx(images[0, 0, :2, 0].mean().item())


def test_linear_classifier_without_images():
    val = toy_loader(10, 1, True)
    for train, other in ((ToyLoader(), val), (val, ToyLoader())):
        with pytest.raises(InputError, match="gave 0 images"):
            linear_probe_module.linear_classifier(train, other)


# ---- Devices


def test_choose_device():
    assert runtime_module.choose_device("cpu") == torch.device("cpu")
    assert runtime_module.choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="'gpu' is unknown"):
        runtime_module.choose_device("gpu")
    with pytest.raises(InputError, match="'cuda:99' is not there"):
        runtime_module.choose_device("cuda:99")
    if not torch.backends.mps.is_available():
        with pytest.raises(InputError, match="'mps' is not there"):
            runtime_module.choose_device("mps")


def test_the_grid_of_a_model_that_reads_the_mean_is_that_of_its_patches():
    maps = torch.rand(5, 2 + 6, 2 + 6).softmax(dim=-1)
    grid = attention_module.cls_attention_grid(maps, (2, 3), 2, "mean")
    for i in range(5):
        expected = torch.stack([maps[i, patch, 2:] for patch in range(2, 8)]).mean(dim=0).view(2, 3)
        torch.testing.assert_close(grid[i], expected)
    uniform = attention_module.cls_attention_grid(torch.full((8, 8), 1 / 8), (2, 3), 2, "mean")
    torch.testing.assert_close(uniform, torch.full((2, 3), 1 / 8))
