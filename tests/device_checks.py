"""Trainings and images for the tests of a device in tests/cuda: what they call of the Trainer stands here.

Shapes:  B images in a batch.
"""

import copy
import math

import torch
import torch.distributed as dist
from torch import nn
from toy_training import copy_of, through_a_file, toy_batches, train_quietly, without_times

from train_vit import Stopped, Trainer
from vit_bridge.data.shapes import TEST_START, make_shapes
from vit_bridge.weights.checkpoints import load
from vit_model import VisionTransformer

SHIPPED = ("vit_nano_shapes", "hybrid_shapes", "convnet_shapes")
# Relative to float32, of one batch's mean loss and of its gradient. On a CPU bf16 is 0.1% off in the loss, and 3% in
# the gradient (ConvNet: 10%, as its gradients nearly cancel); fp16 a tenth of that.
TOLERANCES = {"bf16": dict(loss=3e-3, gradient=0.05), "fp16": dict(loss=3e-4, gradient=0.01)}


def toy_vit(**options):
    """For the images of toy_batches, (B, 3, 8, 8)."""
    torch.manual_seed(0)
    return VisionTransformer(**dict(img_size=8, patch_size=4, embed_dim=48, depth=2, n_heads=3, n_classes=3) | options)


def shipped(name):
    """A trained model, and 64 test images (B, 3, 32, 32) with their labels, normalised as it wants them."""
    model, drawn = load(name), make_shapes(64, 32, start=TEST_START)
    return model, model.preprocessing.normalise(drawn.images), drawn.labels


def train_toy(model, device, amp="off", n_steps=40, compiled=False, **settings):
    """(history, Trainer) of a training on toy_batches."""
    trainer = Trainer(model, str(device), amp=amp, compile=compiled)
    return train_quietly(trainer, toy_batches(4, 32), toy_batches(2, 9), n_steps=n_steps, **settings), trainer


def loss_and_gradient(model, images, labels, device, amp):
    """The mean loss of a batch, and its gradient as one float64 vector on the CPU; the model is left as it was."""
    trainer = Trainer(copy.deepcopy(model), str(device), amp=amp, clip_norm=math.inf)
    history = train_quietly(trainer, [(images, labels)], n_steps=1, learning_rate=1e-12, weight_decay=0.0)
    gradients = [parameter.grad.flatten().double().cpu() for parameter in trainer.model.parameters()]
    return history["train_loss"][0], torch.cat(gradients)


def assert_near_float32(model, images, labels, device, amp, slack=1):
    """Loss and gradient in mixed precision are those of float32, within slack times TOLERANCES."""
    loss, gradient = loss_and_gradient(model, images, labels, device, amp)
    true_loss, true_gradient = loss_and_gradient(model, images, labels, device, "off")
    errors = dict(loss=abs(loss - true_loss) / true_loss,
                  gradient=((gradient - true_gradient).norm() / true_gradient.norm()).item())
    for name, error in errors.items():
        assert error < slack * TOLERANCES[amp][name], f"{amp}: the {name} is {error:.2%} off float32"


def cut_and_resumed(build, device, amp, cut_at, n_steps):
    """(whole, resumed): weights, average and history of a training in one go, and of one stopped before its step
    cut_at, kept in a file and gone on with by a model of other weights."""
    whole = result_of(*train_toy(build(), device, amp, n_steps, ema_decay=0.9))
    try:
        train_toy(build(), device, amp, n_steps, ema_decay=0.9, on_batch=lambda state: state.step == cut_at)
        raise AssertionError("the training did not stop")
    except Stopped as stop:
        saved = through_a_file(stop.state.state_dict())
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    return whole, result_of(*train_toy(other, device, amp, n_steps, ema_decay=0.9, resume=saved))


def result_of(history, trainer):
    return copy_of(trainer.model), copy_of(trainer.average), without_times(history)


def train_through_ddp(model, device):
    """train_toy, the gradients gone through DistributedDataParallel: with one process the Trainer itself uses none."""
    model = nn.parallel.DistributedDataParallel(model.to(device),
                                                device_ids=[device] if device.type == "cuda" else None)
    history, _ = train_toy(model, device)
    return history, copy_of(model.module)


def gathered(value, numbers):
    """(value, numbers) after the three collective calls that the Trainer and its metrics make."""
    box, values, sums = [value], [None], torch.tensor(numbers, dtype=torch.float64)
    dist.broadcast_object_list(box, 0)
    dist.all_gather_object(values, box[0])
    dist.all_reduce(sums)
    return values[0], sums.tolist()
