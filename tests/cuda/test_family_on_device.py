"""DeiT, Swin, ConvNeXt, MAE, BEiT and distillation on the device, in float32, beside the CPU's in float64."""

import copy
import math

import pytest
import torch
from device_checks import SHIPPED, loss_and_gradient, shipped

from vit_bridge.analysis.attention import mean_distances
from vit_bridge.analysis.windows import capture_windows
from vit_bridge.models.registry import build_model
from vit_bridge.training.objectives import Classification, Distillation, MaskedTokens
from vit_bridge.training.tokenizer import PatchTokenizer

pytestmark = pytest.mark.cuda
FAMILY = ("deit_nano", "swin_nano", "convnext_nano", "beit_nano")


def pair_of(name, device, **options):
    """(exact, model, images): a random model in float64 on the CPU, and in float32 on the device."""
    torch.manual_seed(0)
    model = build_model(name, **options or dict(n_classes=7)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:  # biases start at 0, and ConvNeXt's layer scale at 1e-6
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    images = torch.randn(4, 3, 32, 32)
    return copy.deepcopy(model).double(), model.to(device), images


def relative_error(found, exact):
    return ((found.detach().cpu().double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("name", "size"), [*((name, (32, 32)) for name in FAMILY), ("swin_nano", (36, 28)),
                                            ("convnext_nano", (36, 28))])
def test_logits_and_gradients_on_the_device_match_the_cpu(device, name, size):
    exact, model, _ = pair_of(name, device)
    images = torch.randn(4, 3, *size)
    found, right = model(images.to(device)), exact(images.double())
    assert relative_error(found, right) < 1e-5
    found.square().mean().backward()
    right.square().mean().backward()
    for (label, one), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert relative_error(one.grad, other.grad) < 1e-4, label


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_mae_on_the_device_matches_the_cpu(device, norm_pix_loss):
    exact, model, images = pair_of("mae_nano", device, norm_pix_loss=norm_pix_loss)
    noise = torch.rand(len(images), 64)
    found, right = model(images.to(device), noise.to(device)), exact(images.double(), noise.double())
    assert torch.equal(found[2].cpu(), right[2].float())
    assert relative_error(found[1], right[1]) < 1e-5
    assert_equal_losses_and_gradients(model, exact, found[0], right[0])


def test_masked_tokens_on_the_device_match_the_cpu(device):
    exact, model, images = pair_of("beit_nano_pretraining", device, n_tokens=32)
    tokenizer = PatchTokenizer(32, model.patch_embed.patch_size).fit(images)
    losses = []
    for one, place in ((model, device), (exact, torch.device("cpu"))):
        objective = MaskedTokens(copy.deepcopy(tokenizer)).to(place).eval()
        objective.check_model(one)
        losses.append(objective(one, (images.to(place, next(one.parameters()).dtype),)))
    assert_equal_losses_and_gradients(model, exact, *losses)


def assert_equal_losses_and_gradients(model, exact, loss, right):
    assert math.isclose(loss.item(), right.item(), rel_tol=1e-5)
    loss.backward()
    right.backward()
    for (label, one), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        if one.grad is not None:
            assert relative_error(one.grad, other.grad) < 1e-4, label


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("name", FAMILY)
def test_mixed_precision_matches_the_loss_of_float32(device, name, amp):
    model, images = pair_of(name, device)[1:]
    model.head.weight.data.mul_(0.1)  # smaller gradients: the scaler's first factor must not overflow fp16
    labels = torch.arange(4)
    loss, gradient = loss_and_gradient(model, images, labels, device, amp)
    true_loss, true_gradient = loss_and_gradient(model, images, labels, device, "off")
    assert math.isclose(loss, true_loss, rel_tol=0.02)
    assert (gradient - true_gradient).norm() < 0.1 * true_gradient.norm()


def test_windows_of_swin_on_the_device_match_the_cpu(device):
    exact, model, images = pair_of("swin_nano", device)
    blocks, exact_blocks = capture_windows(model, images.to(device))[0], capture_windows(exact, images.double())[0]
    for found, right in zip(blocks, exact_blocks, strict=True):
        assert relative_error(found.whole(), right.whole()) < 1e-5
    found, right = mean_distances(model, images.to(device)), mean_distances(exact, images.double())
    assert relative_error(found.nan_to_num(), right.nan_to_num()) < 1e-5  # NaN where a block has fewer heads


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("teacher", SHIPPED)
def test_distillation_on_the_device_matches_the_cpu(device, kind, teacher):
    model, images, labels = shipped(teacher)
    torch.manual_seed(0)
    student = build_model("deit_nano", n_classes=len(model.preprocessing.class_names)).train()
    losses, alone = [], Classification()
    alone.check_model(student)
    for place, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        pupil = copy.deepcopy(student).to(place, dtype)
        objective = Distillation(copy.deepcopy(model), model.preprocessing, kind).to(place)
        objective.check_model(pupil)
        losses.append(objective.train()(pupil, (images.to(place, dtype), labels.to(place))).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(alone(pupil, (images.double(), labels)).item(), rel=1e-3)
