"""Schedules, parameter groups, Muon and the average of weights, each against its formula."""

import copy
import math

import pytest
import torch
from torch import nn
from toy_training import Calls

from train_vit import Trainer
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.convnext import ConvNeXt
from vit_bridge.models.deit import DistilledViT
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.models.protocol import layer_groups
from vit_bridge.models.swin import SwinTransformer
from vit_bridge.training.optimizers import (
    MUON_LR_SCALE,
    Muon,
    hidden_matrices,
    learning_rate_at,
    make_optimizer,
    orthogonal,
    parameter_groups,
    update_average,
)
from vit_model import InputError, VisionTransformer

TINY = dict(img_size=8, patch_size=4, embed_dim=12, depth=1, n_heads=3, n_classes=3)


def test_learning_rate_at_warms_up_then_follows_a_cosine():
    rates = [learning_rate_at(step, 12, 4, 8.0) for step in range(12)]
    assert rates[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rates[8] == pytest.approx(4.0)  # halfway between 4 and 12
    assert rates[11] == pytest.approx(4.0 * (1 + math.cos(math.pi * 7 / 8)))



def test_parameter_groups_decay_only_weight_matrices():
    model = VisionTransformer(**TINY)
    decayed, plain = (group["params"] for group in parameter_groups(model, 0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed} == {
        "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "head.weight"}
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} < {names[id(p)] for p in plain}
    assert len(decayed) + len(plain) == len(names)


def test_fc_norm_belongs_to_the_head_and_does_not_decay():
    model = VisionTransformer(**TINY, pool="mean", fc_norm=True)
    names = {id(p): name for name, p in model.named_parameters()}
    plain = {names[id(p)] for p in parameter_groups(model, 0.3)[1]["params"]}
    assert {"fc_norm.weight", "fc_norm.bias"} < plain
    groups = layer_groups(model)
    assert groups["fc_norm.weight"] == groups["fc_norm.bias"] == groups["head.weight"] == len(model.layers())


def swin():
    return SwinTransformer(8, 1, 3, 3, 6, (2, 1), (1, 2), 3)


def decayed_names(model):
    """Return the names of the parameters that decay."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p] for group in parameter_groups(model, 0.3) if group["weight_decay"] for p in group["params"]}


def test_parameter_groups_of_the_family_decay_only_weight_matrices():
    assert decayed_names(DistilledViT(**TINY)) == decayed_names(VisionTransformer(**TINY)) | {"head_dist.weight"}
    model = swin()
    layers = {"patch_embed.proj", "stages.1.downsample.reduction", "head"} | {
        f"stages.{i}.blocks.{j}.{name}" for i, j in ((0, 0), (0, 1), (1, 0))
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert decayed_names(model) == {f"{name}.weight" for name in layers}
    tables = [name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert len(tables) == 3
    assert tuple(tables) == model.no_weight_decay
    model = ConvNeXt(8, 3, 3, (5, 7), (1, 1), 1)
    assert decayed_names(model) == {name for name, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("build", [lambda: DistilledViT(**TINY), swin, lambda: ConvNeXt(8, 3, 3, (5, 7), (1, 1), 1)],
                         ids=["deit", "swin", "convnext"])
def test_hidden_matrices_of_the_family_leave_out_heads_tables_and_depthwise_kernels(build):
    model = build()
    first = next(name for name, p in model.named_parameters() if p.ndim in (2, 4))
    left_out = {f"{name}.weight" for name in model.head_names} | {first} | {
        name for name in decayed_names(model) if "conv_dw" in name}
    assert names_of(model, hidden_matrices(model)) == decayed_names(model) - left_out


def test_parameter_groups_refuse_a_frozen_model():
    with pytest.raises(InputError, match="no trainable parameter"):
        parameter_groups(VisionTransformer(**TINY).requires_grad_(False), 0.0)



class Numbers(nn.Module):
    """A module with a weight, a buffer of floats and a buffer of whole numbers."""

    def __init__(self, weight, buffer, count):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))
        self.register_buffer("mean", torch.tensor([buffer]))
        self.register_buffer("count", torch.tensor(count))


@pytest.mark.parametrize(("step", "decay", "kept"), [(0, 0.9, 0.1), (5, 0.9, 0.4), (90, 0.9, 0.9), (5, 0.3, 0.3)])
def test_update_average_decays_less_in_the_first_steps(step, decay, kept):
    average, model = Numbers(10.0, -3.0, 2), Numbers(20.0, 7.0, 5)
    update_average(average, model, step, decay)
    assert average.weight.item() == pytest.approx(20 - 10 * kept)
    assert average.mean.item() == pytest.approx(7 - 10 * kept)
    assert average.count.item() == 5
    assert (model.weight.item(), model.mean.item(), model.count.item()) == (20, 7, 5)



def test_parameter_groups_carry_their_lr_scale():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.GELU(), nn.Linear(5, 3))
    groups = parameter_groups(model, 0.3, {"1.weight": 0.5, "3.bias": 0.25})
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["weight_decay"], group["lr_scale"]) for group in groups for p in group["params"]}
    assert found == {"1.weight": (0.3, 0.5), "1.bias": (0.0, 1.0), "3.weight": (0.3, 1.0), "3.bias": (0.0, 0.25)}


def test_learning_rate_at_falls_linearly_when_asked():
    assert [learning_rate_at(step, 12, 4, 8.0, "linear") for step in range(12)] == [2, 4, 6, 8, 8, 7, 6, 5, 4, 3, 2, 1]


# ---- Muon -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 7, 11), (3, 11, 7), (1, 5, 5)])
def test_orthogonal_keeps_directions_with_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrices = 1e3 * torch.randn(shape, dtype=torch.float64)
    made = orthogonal(matrices)
    assert made.shape == matrices.shape
    for before, after in zip(matrices, made, strict=True):
        U, _, V = torch.linalg.svd(before, full_matrices=False)
        inner = U.T @ after @ V.T  # diagonal if the singular vectors are the same
        torch.testing.assert_close(inner, inner.diagonal().diag(), atol=1e-9, rtol=0)
        assert inner.diagonal().min() > 0.6
        assert inner.diagonal().max() < 1.3


def test_orthogonal_leaves_zeros_alone():
    assert torch.equal(orthogonal(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("shape", [(13, 7), (7, 13)])
def test_muon_step_matches_torch_up_to_bfloat16(shape):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    settings = dict(lr=0.03, momentum=0.9, weight_decay=0.2)
    optimizers = (Muon([ours], **settings),
                  torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        gradient, before = torch.randn(shape), ours.detach().clone()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        step = (ours - before).abs().mean().item()
        torch.testing.assert_close(ours, theirs, atol=0.1 * step, rtol=0)
    assert step > 1e-3


def test_muon_treats_splits_and_kernels_as_matrices():
    torch.manual_seed(0)
    weight, gradient = torch.randn(15, 4, 3, 3), torch.randn(15, 4, 3, 3)
    kernel = nn.Parameter(weight.clone())
    thirds = [nn.Parameter(part.flatten(1).clone()) for part in weight.chunk(3)]
    kernel.grad = gradient
    for third, part in zip(thirds, gradient.chunk(3), strict=True):
        third.grad = part.flatten(1).clone()
    Muon([dict(params=[kernel], n_splits=3)], lr=0.1).step()
    Muon(thirds, lr=0.1).step()
    torch.testing.assert_close(kernel.flatten(1), torch.cat(thirds))
    assert not torch.allclose(kernel, weight)


def names_of(model, parameters):
    names = {p: name for name, p in model.named_parameters()}
    return {names[p] for p in parameters}


def test_hidden_matrices_are_neither_the_first_nor_the_last():
    model = VisionTransformer(**TINY)
    hidden = hidden_matrices(model)
    assert names_of(model, hidden) == {f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1",
                                                                              "mlp.fc2")}
    assert hidden[model.blocks[0].attn.qkv.weight] == 3
    assert hidden[model.blocks[0].mlp.fc1.weight] == 1
    conv = ConvNet(8, 3, 3, (5, 7), (1, 1), 1)
    assert {name.rpartition(".")[0] for name in names_of(conv, hidden_matrices(conv))} == {
        "stages.0.0.conv1", "stages.0.0.conv2", "stages.1.0.conv1", "stages.1.0.conv2", "stages.1.0.shortcut.0"}
    hybrid = HybridCNNViT(3, 12, 1, 3, 8, 4)
    assert names_of(hybrid, hidden_matrices(hybrid)) - names_of(hybrid, hybrid.blocks.parameters()) == {
        "patch_embed.proj.3.weight"}


def test_make_optimizer_assigns_every_parameter_once():
    model = VisionTransformer(**TINY)
    optimizer = make_optimizer("muon", model, 0.3, {"blocks.0.attn.proj.weight": 0.5})
    found = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(set(found)) == len(list(model.parameters()))
    muon = {name: (group["lr_scale"], group["weight_decay"], group["n_splits"])
            for group in optimizer.optimizers[0].param_groups for name in names_of(model, group["params"])}
    assert muon == {"blocks.0.attn.qkv.weight": (MUON_LR_SCALE, 0.3, 3), "blocks.0.attn.proj.weight":
                    (0.5 * MUON_LR_SCALE, 0.3, 1), "blocks.0.mlp.fc1.weight": (MUON_LR_SCALE, 0.3, 1),
                    "blocks.0.mlp.fc2.weight": (MUON_LR_SCALE, 0.3, 1)}


def test_make_optimizer_gives_a_lone_head_to_adamw():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    assert [type(each) for each in make_optimizer("muon", model, 0.0).optimizers] == [torch.optim.AdamW]


def test_make_optimizer_refuses_an_unknown_name():
    with pytest.raises(InputError, match="optimizer 'sgd' is unknown; choose one of: adamw, muon"):
        make_optimizer("sgd", VisionTransformer(**TINY), 0.0)


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(7, 3, 8, 8, generator=generator), torch.randint(3, (7,), generator=generator))
            for _ in range(5)]


def test_muon_run_resumes_as_if_never_cut():
    ends = []
    for cut in (False, True):
        torch.manual_seed(1)
        trainer, states = Trainer(VisionTransformer(**TINY), "cpu"), []
        run = dict(n_steps=9, optimizer="muon", schedule="linear", seed=0, progress=False)
        if cut:
            keep = Calls(on_epoch=lambda state, states=states: states.append(state.state_dict()))
            trainer.train(batches(), callbacks=[keep], **run)
            trainer = Trainer(VisionTransformer(**TINY), "cpu")
            run["resume"] = copy.deepcopy(states[0])
        trainer.train(batches(), **run)
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
