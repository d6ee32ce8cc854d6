"""Fine-tuning: learning rates by layer, features computed once, and a linear classifier on the pixels."""

import math

import pytest
import torch
from torch import nn

from vit_bridge.analysis.metrics import wilson_interval
from vit_bridge.data.datasets import DatasetInfo
from vit_bridge.data.loaders import MemoryLoader
from vit_bridge.models.beit import MaskedTokenModel
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.convnext import ConvNeXt
from vit_bridge.models.deit import DistilledViT
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.models.mae import MaskedAutoencoder
from vit_bridge.models.swin import SwinTransformer
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.training.linear_probe import (
    RIDGES,
    FeatureLoader,
    Heads,
    _head_inputs,
    _pixel_features,
    feature_loaders,
    linear_classifier,
)
from vit_bridge.training.optimizers import hidden_matrices, layer_lr_scales
from vit_model import InputError, VisionTransformer, freeze_backbone

VIT = dict(img_size=8, patch_size=4, embed_dim=12, depth=2, n_heads=3, n_classes=2)
MODELS = {
    "cls": lambda: VisionTransformer(**VIT),
    "mean": lambda: VisionTransformer(**VIT, pool="mean", n_registers=2, dropout=0.5),
    "hybrid": lambda: HybridCNNViT(**VIT),
    "convnet": lambda: ConvNet(8, 3, 2, (4, 6), (1, 1), 1),
}


def images_loader(n=11, batch_size=4, training=True):
    """Return a loader of n noisy images of 8 pixels in two classes."""
    generator = torch.Generator().manual_seed(1)
    facts = DatasetInfo("noise", Preprocessing(8, (0.5,) * 3, (0.25,) * 3, class_names=["even", "odd"]))
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return MemoryLoader(images, torch.arange(n) % 2, facts, batch_size, seed=7, training=training)


# ---- Layer-wise decay


def test_layer_lr_scales_of_a_vit_match_hand_values():
    """With two blocks the head has 1, the blocks 1/2 and 1/4, and everything before them 1/8."""
    factors = layer_lr_scales(VisionTransformer(**VIT, n_registers=1), 0.5)
    expected = {"cls_token": 0.125, "reg_token": 0.125, "pos_embed": 0.125, "patch_embed.proj.weight": 0.125,
                "patch_embed.proj.bias": 0.125, "norm.weight": 1, "norm.bias": 1, "head.weight": 1, "head.bias": 1}
    for name, factor in factors.items():
        block = {"blocks.0.": 0.25, "blocks.1.": 0.5}.get(name[:9])
        assert factor == (expected[name] if block is None else block), name
    assert expected.keys() < factors.keys()


def test_layer_lr_scales_count_a_hybrid_stem_as_one_layer():
    factors = layer_lr_scales(HybridCNNViT(**VIT), 0.5)
    assert {factor for name, factor in factors.items() if name.startswith("patch_embed.")} == {0.125}
    assert (factors["blocks.1.attn.qkv.weight"], factors["head.bias"]) == (0.5, 1)


def test_layer_lr_scales_of_a_convnet_go_by_stage():
    factors = layer_lr_scales(MODELS["convnet"](), 0.1)
    by_layer = {}
    for name, factor in factors.items():
        by_layer.setdefault(".".join(name.split(".")[:2]) if name.startswith("stages") else name.split(".")[0],
                            set()).add(round(factor, 12))
    assert by_layer == {"stem": {0.001}, "stages.0": {0.01}, "stages.1": {0.1}, "head": {1}}


def test_layer_lr_scales_of_a_distilled_vit_treat_both_tokens_and_heads_alike():
    factors = layer_lr_scales(DistilledViT(**VIT), 0.5)
    assert factors["dist_token"] == factors["cls_token"] == factors["pos_embed"] == 0.125
    assert factors["head_dist.weight"] == factors["head_dist.bias"] == factors["head.weight"] == 1
    assert (factors["blocks.0.attn.qkv.weight"], factors["blocks.1.attn.qkv.weight"]) == (0.25, 0.5)


@pytest.mark.parametrize(("model", "first"), [
    (SwinTransformer(8, 1, 3, 2, 6, (2, 1), (1, 2), 3), ("patch_embed", "patch_norm")),
    (ConvNeXt(8, 3, 2, (5, 7), (1, 1), 1), ("stem",))], ids=["swin", "convnext"])
def test_layer_lr_scales_of_swin_and_convnext_go_by_stage(model, first):
    factors = layer_lr_scales(model, 0.5)
    for name, factor in factors.items():
        stage = {"stages.0": 0.25, "stages.1": 0.5}.get(".".join(name.split(".")[:2]))
        assert factor == (stage or (0.125 if name.split(".")[0] in first else 1)), name
    assert {0.125, 0.25, 0.5, 1} == set(factors.values())


def test_layer_lr_scales_put_the_mask_token_where_it_enters():
    """MAE's stands before the decoder, after all blocks; BEiT's stands in place of patches, before them."""
    vit = {**VIT, "n_classes": 0}
    mae = layer_lr_scales(MaskedAutoencoder(**vit, decoder_dim=8, decoder_depth=1, decoder_heads=2), 0.5)
    late = {name for name in mae if name.startswith(("mask_token", "decoder_", "norm."))}
    assert {name for name, factor in mae.items() if factor == 1} == late
    assert mae["cls_token"] == mae["patch_embed.proj.weight"] == 0.125
    beit = layer_lr_scales(MaskedTokenModel(**vit, n_tokens=5), 0.5)
    assert beit["mask_token"] == beit["cls_token"] == 0.125
    assert beit["lm_head.weight"] == beit["norm.weight"] == 1


@pytest.mark.parametrize("name", MODELS)
def test_layer_lr_scales_are_1_for_every_parameter_without_decay(name):
    model = MODELS[name]()
    factors = layer_lr_scales(model, 1.0)
    assert list(factors) == [name for name, _ in model.named_parameters()]
    assert set(factors.values()) == {1.0}


def test_layer_lr_scales_count_beyond_ten_blocks():
    factors = layer_lr_scales(VisionTransformer(**{**VIT, "depth": 12}), 0.9)
    assert factors["blocks.11.norm1.weight"] == pytest.approx(0.9)
    assert factors["blocks.2.norm1.weight"] == pytest.approx(0.9**10)


def test_layer_lr_scales_refuse_a_model_without_layers():
    with pytest.raises(InputError, match=r"\Aa Linear does not name its layers[^\n]*leave out layer decay[^\n]*\Z"):
        layer_lr_scales(nn.Linear(2, 2), 0.5)


# ---- Features


@pytest.mark.parametrize("name", MODELS)
def test_head_inputs_are_what_the_head_reads(name):
    model, loader = MODELS[name]().train(), images_loader(training=False)
    features, labels = _head_inputs(model, loader, torch.device("cpu"))
    assert model.training
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model.forward_head(model.forward_features(images), pre_logits=True)
                              for images, _ in loader])
    torch.testing.assert_close(features[:, 0], expected)
    assert features.shape[1] == 1
    assert torch.equal(labels, torch.arange(11) % 2)
    assert not features.requires_grad


def test_head_inputs_leaves_no_hook_even_after_an_error():
    model, loader = MODELS["cls"](), images_loader()
    _head_inputs(model, loader, torch.device("cpu"))
    assert not model.head._forward_pre_hooks
    with pytest.raises(InputError):
        _head_inputs(model, BadLoader(), torch.device("cpu"))
    assert not model.head._forward_pre_hooks


def test_heads_of_a_distilled_vit_read_its_two_tokens():
    torch.manual_seed(0)
    model, loader = DistilledViT(**VIT), images_loader(training=False)
    features, _ = _head_inputs(model, loader, torch.device("cpu"))
    assert features.shape == (11, 2, 12)
    images, heads = torch.cat([images for images, _ in loader]), Heads(model)
    for training in (True, False):
        model.train(training)
        heads.train(training)
        torch.testing.assert_close(heads(features), model(images))  # two logits in training, their mean otherwise
    assert hidden_matrices(heads) == {}
    assert {name for name, _ in heads.named_parameters()} == {
        name for name, p in freeze_backbone(model).named_parameters() if p.requires_grad}


class BadLoader:
    """A loader of images with five channels."""

    def to(self, device):
        return self

    def __len__(self):
        return 1

    def __iter__(self):
        yield torch.zeros(1, 5, 8, 8), torch.zeros(1)


def test_feature_loader_follows_order_positions_and_shards():
    """The features are the indices of the images, so they show which images a pass yields."""
    source = images_loader()
    places = FeatureLoader(torch.arange(11.0)[:, None], source.labels, source)
    assert (len(places), places.n_images, places.class_counts) == (len(source), 11, [6, 5])
    for epoch in (0, 1):
        places.set_epoch(epoch)
        order = torch.cat([features[:, 0] for features, _ in places]).long()
        source.set_epoch(epoch)
        assert torch.equal(source.labels[order], torch.cat([labels for _, labels in source]))
        assert sorted(order.tolist()) == list(range(11))
        assert order.tolist() == torch.cat([batch for batch in source.epoch_batches()[1]]).tolist()
    whole = list(places)
    places.set_position(1, 2)
    rest = list(places)
    assert len(rest) == 1
    assert all(torch.equal(one, other) for one, other in zip(rest[0], whole[2], strict=True))
    places.set_epoch(1)
    shares = []
    for rank in (0, 1):
        places.set_shard(rank, 2)
        shares.append([features[:, 0] for features, _ in places])
    for batch, first, second in zip(whole, *shares, strict=True):
        assert torch.equal(batch[0][0::2, 0], first)
        assert torch.equal(batch[0][1::2, 0], second)


def test_feature_loaders_compute_every_image_once_and_never_augment(monkeypatch):
    model, seen = freeze_backbone(MODELS["cls"]()), []
    forward = VisionTransformer.forward_features

    def counted(self, images, *args, **kwargs):
        seen.append(len(images))
        return forward(self, images, *args, **kwargs)

    monkeypatch.setattr(VisionTransformer, "forward_features", counted)
    loaders = images_loader(), images_loader(5, training=False)
    loaders[0].set_shard(1, 2)
    train, val = feature_loaders(model, loaders, torch.device("cpu"))
    assert sum(seen) == 11 + 5
    assert (train.training, val.training, len(train.features), len(val.features)) == (True, False, 11, 5)
    for loader in (train, val):
        for _ in range(2):
            list(loader)
    assert sum(seen) == 11 + 5
    with torch.no_grad():
        expected = model.forward_head(forward(model, next(iter(loaders[1].without_augmentation()))[0]), pre_logits=True)
    torch.testing.assert_close(val.features[:4, 0], expected)
    assert model.head.in_features == 12


def test_feature_loaders_report_unreadable_images():
    class Skipping(MemoryLoader):
        def without_augmentation(self):
            plain = super().without_augmentation()
            plain.skipped["bad.jpg"] = "truncated"
            return plain

    loader = images_loader()
    loader.__class__ = Skipping
    feature_loaders(MODELS["cls"](), (loader,), torch.device("cpu"))
    assert loader.skipped == {"bad.jpg": "truncated"}


# ---- A linear model of the pixels


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
    result = linear_classifier(toy_loader(997, 0, True), toy_loader(211, 1, True), test)
    assert result == dict(val_acc=1.0, test_acc=1.0, test_correct=101, test_n=101, ridge=result["ridge"])
    assert result["ridge"] in RIDGES
    assert test.passes == 1


def test_linear_classifier_is_ridge_regression():
    train, val = toy_loader(97, 0, False), toy_loader(211, 1, False)
    x, y = torch.cat([images for images, _ in train]), torch.cat([labels for _, labels in train])
    x = torch.cat([x.flatten(1), torch.ones(97, 1)], dim=1).double()
    accuracies = {}
    for ridge in RIDGES:
        penalty = ridge * (x[:, :-1] ** 2).sum() / 105 * torch.eye(106).double()
        penalty[-1, -1] = 0
        weight = torch.linalg.solve(x.T @ x + penalty, x.T @ nn.functional.one_hot(y, 3).double())
        scores = [torch.cat([images.flatten(1), torch.ones(len(images), 1)], dim=1).double() @ weight
                  for images, _ in val]
        labels = torch.cat([labels for _, labels in val])
        accuracies[ridge] = (torch.cat(scores).argmax(dim=1) == labels).double().mean().item()
    result = linear_classifier(train, val)
    assert result["val_acc"] == pytest.approx(max(accuracies.values()))
    assert accuracies[result["ridge"]] == max(accuracies.values())
    assert result["test_acc"] is None


def test_linear_classifier_takes_the_strongest_ridge_among_equals():
    train, val = toy_loader(997, 0, True), toy_loader(211, 1, True)  # every penalty classifies all of them correctly
    assert linear_classifier(train, val)["ridge"] == max(RIDGES)


def test_linear_classifier_on_noise_is_at_chance():
    test = toy_loader(2003, 2, False)
    result = linear_classifier(toy_loader(997, 0, False), toy_loader(211, 1, False), test)
    low, high = wilson_interval(result["test_correct"], 2003, z=4)
    assert low < 1 / 3 < high


def test_linear_classifier_reads_at_most_max_images():
    train, val = toy_loader(200, 0, True), toy_loader(211, 1, True)
    for images, _ in list(train)[2:]:
        images[:] = math.nan
    train[1][0][50:] = math.nan
    assert linear_classifier(train, val, max_images=64 + 50)["val_acc"] == 1


def test_linear_classifier_of_images_that_tell_nothing():
    train, val = toy_loader(97, 0, False), toy_loader(53, 1, False)
    for images, _ in train:
        images.zero_()
    labels = torch.cat([labels for _, labels in train])
    expected = torch.cat([labels for _, labels in val]) == labels.bincount().argmax()
    assert linear_classifier(train, val)["val_acc"] == pytest.approx(expected.double().mean().item())


def test_linear_classifier_pools_to_32():
    assert _pixel_features(torch.zeros(2, 3, 64, 96)).shape == (2, 3 * 32 * 32 + 1)
    assert _pixel_features(torch.zeros(2, 3, 7, 96)).shape == (2, 3 * 7 * 32 + 1)
    images = torch.randn(1, 1, 64, 32)
    assert _pixel_features(images)[0, 0] == pytest.approx(images[0, 0, :2, 0].mean().item())


def test_linear_classifier_without_images():
    val = toy_loader(10, 1, True)
    for train, other in ((ToyLoader(), val), (val, ToyLoader())):
        with pytest.raises(InputError, match="yielded 0 images"):
            linear_classifier(train, other)
