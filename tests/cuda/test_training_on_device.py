"""Training on the device: mixed precision, resuming, the compiler, a process group."""

import math

import pytest
import torch
import torch.distributed as dist
from device_checks import (
    SHIPPED,
    assert_near_float32,
    cut_and_resumed,
    gathered,
    shipped,
    toy_vit,
    train_through_ddp,
    train_toy,
)
from toy_training import copy_of, same

import vit_model

pytestmark = pytest.mark.cuda
SLACK = {"convnet_shapes": 3}


# ---- Mixed precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns_what_float32_learns(device, amp):
    plain, _ = train_toy(toy_vit(), device)
    history, trainer = train_toy(toy_vit(), device, amp)
    assert history["val_acc"][-1] > 0.95
    assert history["train_loss"][-1] == pytest.approx(plain["train_loss"][-1], rel=0.1)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "amp"), [
    *[(name, "bf16") for name in SHIPPED], ("vit_nano_shapes", "fp16"),
    *[pytest.param(name, "fp16", marks=pytest.mark.slow) for name in SHIPPED[1:]]])  # CPUs convolve slowly in fp16
def test_mixed_precision_matches_loss_and_gradient_of_float32(device, name, amp):
    assert_near_float32(*shipped(name), device, amp, SLACK.get(name, 1))


def test_scaler_skips_an_overflowing_step_and_training_continues(device):
    states = []
    model = toy_vit()
    with torch.no_grad():
        model.head.weight.mul_(100)  # its gradients, scaled by 65536, are too large for fp16
    history, _ = train_toy(model, device, "fp16", on_epoch=states.append)
    assert states[-1].scaler.get_scale() < 65536
    assert all(math.isfinite(loss) for loss in history["val_loss"])


# ---- A planted fault --------------------------------------------------------------------------------------


def attend_unscaled(q, k, v, return_attention=False, bias=None):
    """In bf16 the scores are not divided by sqrt(K)."""
    q = q * math.sqrt(q.shape[-1]) if q.dtype == torch.bfloat16 else q
    return RIGHT_ATTEND(q, k, v, return_attention)


def attend_with_sums_in_bf16(q, k, v, return_attention=False, bias=None):
    """In bf16 the softmax adds up its terms one by one in bf16, and what is small against the sum is lost."""
    if q.dtype != torch.bfloat16:
        return RIGHT_ATTEND(q, k, v, return_attention)
    terms = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).exp().to(torch.bfloat16)  # (B, H, n, N)
    total = torch.zeros_like(terms[..., :1])
    for term in terms.split(1, dim=-1):
        total = total + term
    return terms / total @ v, None


RIGHT_ATTEND = vit_model.attend


@pytest.mark.parametrize("fault", [attend_unscaled, attend_with_sums_in_bf16])
def test_assert_near_float32_catches_a_planted_bf16_fault(device, monkeypatch, fault):
    model, images, labels = shipped("vit_nano_shapes")
    monkeypatch.setattr(vit_model, "attend", fault)
    with pytest.raises(AssertionError, match=r"(gradient|loss) is"):
        assert_near_float32(model, images, labels, device, "bf16")


# ---- Resuming, compiling, a process group -----------------------------------------------------------------


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("cut_at", [3, 4])  # inside an epoch, and between two
def test_resume_on_the_device_is_exact_to_the_bit(device, deterministic, amp, cut_at):
    whole, resumed = cut_and_resumed(lambda: toy_vit(dropout=0.2, drop_path=0.2), device, amp, cut_at, n_steps=10)
    assert same(whole[0], resumed[0])
    assert same(whole[1], resumed[1])
    assert whole[2] == resumed[2]


@pytest.mark.slow
def test_compiled_training_matches_eager_training(device):
    plain, _ = train_toy(toy_vit(), device, n_steps=8, learning_rate=1e-3)
    compiled, _ = train_toy(toy_vit(), device, n_steps=8, learning_rate=1e-3, compiled=True)
    for column in ("train_loss", "val_loss"):
        assert compiled[column] == pytest.approx(plain[column], abs=1e-4)


@pytest.fixture
def process_group(device, tmp_path):
    """A group of this process alone: nccl for tensors on CUDA beside gloo, else gloo."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_process_group_of_one_trains_as_one_alone(device, deterministic, request):
    plain, trainer = train_toy(toy_vit(), device)
    request.getfixturevalue("process_group")
    history, weights = train_through_ddp(toy_vit(), device)
    assert same(weights, copy_of(trainer.model))
    assert history["train_loss"] == plain["train_loss"]
    assert gathered({"step": 3}, [5, 0.25]) == ({"step": 3}, [5.0, 0.25])
