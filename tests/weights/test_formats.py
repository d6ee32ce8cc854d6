"""Each format against its own library: the features of the library's model, with random weights."""

import argparse
import re
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from parity_checks import case
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn

from vit_bridge.errors import Assumption
from vit_bridge.models.deit import DistilledViT
from vit_bridge.weights.checkpoints import describe_checkpoint, load, load_checkpoint
from vit_model import InputError, VisionTransformer, resample_positions

D, HEADS, PATCH, SIDE, CLASSES, DEPTH, RATIO = 28, 7, 5, 15, 11, 2, 3  # K = 4, hidden 84, a grid of 3 x 3
OURS = dict(img_size=SIDE, patch_size=PATCH, n_classes=CLASSES, embed_dim=D, depth=DEPTH, n_heads=HEADS,
            mlp_ratio=RATIO)
TIMM = dict(img_size=SIDE, patch_size=PATCH, num_classes=CLASSES, embed_dim=D, depth=DEPTH, num_heads=HEADS,
            mlp_ratio=RATIO)
HF = dict(image_size=SIDE, patch_size=PATCH, num_labels=CLASSES, hidden_size=D, num_hidden_layers=DEPTH,
          num_attention_heads=HEADS)
HF_VIT = {**HF, "intermediate_size": D * RATIO}
HF_DINO = {**HF, "mlp_ratio": RATIO, "layerscale_value": 0.5}


def one_line_with(text):
    return rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z"


def randomised(model, seed=5):
    """Return the model in float64 with random parameters, as zeros could hide errors."""
    torch.manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4)  # numbers of float32, which any file holds exactly
    return model


def images_of(side=SIDE):
    torch.manual_seed(7)
    return torch.randn(3, 3, *((side, side) if isinstance(side, int) else side), dtype=torch.float64)


def timm_vit(**options):
    return randomised(timm.models.VisionTransformer(**{**TIMM, **options}))


@dataclass
class Sample:
    """A file, the output of its source for images_of(img_size), and the arguments of our model.

    names      those of the tensors in the file, without what lies around them
    logits     None where the source's head is none that ours could hold
    dropped    how many tensors have no place in ours
    holds      our class
    """
    path: object
    names: list
    tokens: torch.Tensor
    logits: torch.Tensor | None = None
    arguments: dict = None
    dropped: int = 0
    holds: type = VisionTransformer


# ---- The formats: each writes a file of its kind into a folder


def from_timm(folder, head=True, state_dict=None, around=dict, arguments=None, dropped=0, holds=VisionTransformer,
              **options):
    """Write a file of a timm model, as a Sample; `state_dict` converts its weights, `around` wraps them."""
    build = timm.models.deit.VisionTransformerDistilled if holds is DistilledViT else timm.models.VisionTransformer
    model = randomised(build(**{**TIMM, **options}))
    state = (state_dict or dict)(model.state_dict())
    torch.save(around(state), folder / "m.pth")
    images = images_of(options.get("img_size", SIDE))
    tokens = model.forward_features(images)
    return Sample(folder / "m.pth", list(state), tokens, model.forward_head(tokens) if head else None,
                  {**OURS, **(arguments or {})}, dropped, holds)


def deit3(state):
    return {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): tensor for name, tensor in state.items()}


def dinov2(state):
    """Return a state dict as in DINOv2's code: with positions for CLS, registers and a mask token."""
    cls = torch.randn(1, 1, D).double()
    native = {**state, "mask_token": torch.randn(1, D).double()}
    if "reg_token" in state:
        native |= dict(register_tokens=native.pop("reg_token"), cls_token=state["cls_token"] - cls,
                       pos_embed=torch.cat([cls, state["pos_embed"]], dim=1))
    return native


def in_chunks(state):
    """Return a state dict with DINOv2's blocks in two chunks, as in its training."""
    return {re.sub(r"blocks\.(\d+)\.", lambda block: f"blocks.{2 * int(block[1]) // DEPTH}.{block[1]}.", name): tensor
            for name, tensor in state.items()}


def dino_in_training(state):
    """Return a state dict as in DINO's main_dino.py: backbone and head in one wrapper."""
    return {**{f"backbone.{name}": tensor for name, tensor in state.items()},
            "head.mlp.0.weight": torch.randn(13, D), "head.last_layer.weight_v": torch.randn(17, 13)}


def student_and_teacher(state):
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    return dict(student=student, teacher={f"module.{name}": tensor for name, tensor in state.items()}, epoch=100,
                args=argparse.Namespace(arch="vit_small", momentum_teacher=0.996))


def from_torchvision(folder, legacy=False, pre_logits=False):
    model = randomised(torchvision.models.VisionTransformer(
        SIDE, PATCH, DEPTH, HEADS, D, RATIO * D, num_classes=CLASSES, representation_size=D if pre_logits else None))
    state = {re.sub(r"mlp\.([03])\.", lambda m: f"mlp.linear_{int(m[1]) // 3 + 1}.", name) if legacy else name: tensor
             for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "m.pth")
    x = model._process_input(images_of())
    tokens = model.encoder(torch.cat([model.class_token.expand(len(x), -1, -1), x], dim=1))
    logits, dropped = (None, 4) if pre_logits else (model(images_of()), 0)
    return Sample(folder / "m.pth", list(state), tokens, logits, OURS, dropped)


def from_transformers(folder, model, old_names, arguments, dropped=0, encoder=None, has_head=False,
                      holds=VisionTransformer, **inputs):
    """Write a transformers model, as a Sample, under the names of save_pretrained or of its memory."""
    model = randomised(model)
    if old_names:
        model.save_pretrained(folder)
        path, names = folder / "model.safetensors", list(load_file(folder / "model.safetensors"))
        assert any("encoder.layer.0." in name for name in names)
    else:
        path, names = folder / "m.pt", list(model.state_dict())
        torch.save(model.state_dict(), path)
    tokens = getattr(model, encoder or "base_model")(images_of(), **inputs).last_hidden_state
    logits = model(images_of()).logits if has_head else None
    return Sample(path, names, tokens, logits, {**OURS, "n_classes": CLASSES if has_head else 0, **arguments}, dropped,
                  holds)


def from_mae(folder, old_names):
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**HF_VIT, mask_ratio=0.0))
    in_order = torch.arange(9.0).expand(3, -1)
    return from_transformers(folder, model, old_names, dict(norm_eps=1e-12), noise=in_order)


def flax(model):
    """Return Google's npz in float32: kernels (in, out), (P, P, C, D), (D, H, K) and (H, K, D)."""
    def dense(layer):
        return {"kernel": layer.weight.T, "bias": layer.bias}

    def norm(layer):
        return {"scale": layer.weight, "bias": layer.bias}

    groups = {"embedding": {"kernel": model.patch_embed.proj.weight.permute(2, 3, 1, 0),
                            "bias": model.patch_embed.proj.bias},
              "Transformer/posembed_input": {"pos_embedding": model.pos_embed},
              "Transformer/encoder_norm": norm(model.norm), "head": dense(model.head)}
    for i, block in enumerate(model.blocks):
        name = f"Transformer/encoderblock_{i}"
        groups |= {f"{name}/LayerNorm_0": norm(block.norm1), f"{name}/LayerNorm_2": norm(block.norm2),
                   f"{name}/MlpBlock_3/Dense_0": dense(block.mlp.fc1),
                   f"{name}/MlpBlock_3/Dense_1": dense(block.mlp.fc2)}
        attention = f"{name}/MultiHeadDotProductAttention_1"
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            groups[f"{attention}/{part}"] = {"kernel": weight.T.reshape(D, HEADS, -1), "bias": bias.reshape(HEADS, -1)}
        groups[f"{attention}/out"] = {"kernel": block.attn.proj.weight.T.reshape(HEADS, -1, D),
                                      "bias": block.attn.proj.bias}
    arrays = {f"{group}/{name}": tensor for group, entries in groups.items() for name, tensor in entries.items()}
    return {name: tensor.detach().float().numpy() for name, tensor in {"cls": model.cls_token, **arrays}.items()}


def from_google(folder, prefix="", pre_logits=False):
    """Write random arrays in Google's layout, as a Sample; timm's own reader gives the expected output."""
    arrays = flax(timm_vit())
    arrays |= {"pre_logits/kernel": arrays["head/kernel"], "pre_logits/bias": arrays["head/bias"]} if pre_logits else {}
    np.savez(folder / "m.npz", **{f"{prefix}{name}": array for name, array in arrays.items()})
    np.savez(folder / "plain.npz", **arrays)  # under params/ timm expects a big_vision file
    reader = timm.models.VisionTransformer(**TIMM).double().eval()
    reader.load_pretrained(str(folder / "plain.npz"))
    tokens = reader.forward_features(images_of())
    logits, dropped = (None, 4) if pre_logits else (reader.forward_head(tokens), 0)
    return Sample(folder / "m.npz", list(arrays), tokens, logits, OURS, dropped)


def hf(name, config, old_names, arguments, **options):
    return case(f"transformers {name}", lambda folder: from_transformers(
        folder, getattr(transformers, name)(config()), old_names, arguments, **options))


def with_both_names(label, name, config, arguments, **options):
    return {f"{label}, {which} names": hf(name, config, which == "old", arguments, **options)
            for which in ("old", "new")}


EPS = dict(norm_eps=1e-12)
SOURCES = {
    "timm": case("timm", from_timm),
    "timm, 2 x 5 patches": case("timm", from_timm, img_size=(10, 25), arguments=dict(img_size=(10, 25))),
    "timm, registers": case("timm", from_timm, reg_tokens=2, no_embed_class=True, arguments=dict(n_registers=2)),
    "timm, registers with positions": case("timm", from_timm, reg_tokens=2, arguments=dict(n_registers=2)),
    "timm, no position for CLS": case("timm", from_timm, no_embed_class=True),
    "timm, layer scale": case("timm", from_timm, init_values=0.1, arguments=dict(layer_scale=0.5)),
    "timm, qk_norm": case("timm", from_timm, qk_norm=True, arguments=dict(qk_norm=True)),
    "timm, mean": case("timm", from_timm, global_pool="avg", fc_norm=False, arguments=dict(pool="mean")),
    "timm, fc_norm": case("timm", from_timm, global_pool="avg", arguments=dict(pool="mean", fc_norm=True)),
    "timm, no head": case("timm", from_timm, num_classes=0, head=False, arguments=dict(n_classes=0)),
    "timm, average of weights": case(
        "timm", from_timm, around=lambda s: {"state_dict": {k: 0 * v for k, v in s.items()}, "state_dict_ema": s}),
    "DeiT": case("timm", from_timm, around=lambda s: {"model": s}),
    "DeiT, distilled": case("timm", from_timm, holds=DistilledViT, around=lambda s: {"model": s}),
    "DeiT, distilled, 2 x 5 patches": case("timm", from_timm, holds=DistilledViT, img_size=(10, 25),
                                           arguments=dict(img_size=(10, 25))),
    "DeiT, distilled, no heads": case("timm", from_timm, holds=DistilledViT, num_classes=0, head=False,
                                      arguments=dict(n_classes=0)),
    "DeiT-III": case("timm", from_timm, no_embed_class=True, init_values=0.1, state_dict=deit3,
                     around=lambda s: {"model": s}, arguments=dict(layer_scale=0.5)),
    "DINO": case("timm", from_timm, num_classes=0, head=False, arguments=dict(n_classes=0)),
    "DINO in training": case("timm", from_timm, num_classes=0, head=False, state_dict=dino_in_training,
                             around=student_and_teacher, arguments=dict(n_classes=0), dropped=2),
    "DINOv2": case("timm", from_timm, num_classes=0, head=False, init_values=0.1, state_dict=dinov2,
                   arguments=dict(n_classes=0, layer_scale=0.5), dropped=1),
    "DINOv2, registers": case(
        "timm", from_timm, num_classes=0, head=False, init_values=0.1, reg_tokens=2, no_embed_class=True,
        state_dict=dinov2, arguments=dict(n_classes=0, layer_scale=0.5, n_registers=2), dropped=1),
    "DINOv2, in chunks": case("timm", from_timm, num_classes=0, head=False, init_values=0.1, dropped=1,
                              state_dict=lambda s: in_chunks(dinov2(s)), arguments=dict(n_classes=0, layer_scale=0.5)),
    "DINOv2 in training, in chunks": case(
        "timm", from_timm, num_classes=0, head=False, init_values=0.1, reg_tokens=2, no_embed_class=True,
        state_dict=lambda s: in_chunks(dinov2(s)),
        around=lambda s: {"teacher": {f"backbone.{name}": tensor for name, tensor in s.items()}},
        arguments=dict(n_classes=0, layer_scale=0.5, n_registers=2), dropped=1),
    "MAE": case("timm", from_timm, num_classes=0, head=False, around=lambda s: {"model": s},
                arguments=dict(n_classes=0)),
    "torchvision": case("torchvision", from_torchvision),
    "torchvision, legacy names": case("torchvision", from_torchvision, legacy=True),
    "torchvision, pre_logits": case("torchvision", from_torchvision, pre_logits=True),
    **with_both_names("transformers ViT with head", "ViTForImageClassification",
                      lambda: transformers.ViTConfig(**HF_VIT), EPS, has_head=True),
    **with_both_names("transformers ViT", "ViTModel", lambda: transformers.ViTConfig(**HF_VIT), EPS, dropped=2),
    **with_both_names("transformers DeiT with head", "DeiTForImageClassification",
                      lambda: transformers.DeiTConfig(**HF_VIT), dict(n_registers=1, **EPS), has_head=True),
    **with_both_names("transformers DeiT with two heads", "DeiTForImageClassificationWithTeacher",
                      lambda: transformers.DeiTConfig(**HF_VIT), EPS, has_head=True, holds=DistilledViT),
    **with_both_names("transformers DeiT", "DeiTModel", lambda: transformers.DeiTConfig(**HF_VIT),
                      dict(n_registers=1, **EPS), dropped=2),
    **with_both_names("transformers Dinov2", "Dinov2Model", lambda: transformers.Dinov2Config(**HF_DINO),
                      dict(layer_scale=0.5), dropped=1),
    **with_both_names("transformers Dinov2 with head", "Dinov2ForImageClassification",
                      lambda: transformers.Dinov2Config(**HF_DINO), dict(layer_scale=0.5), dropped=3),
    **with_both_names("transformers Dinov2 with registers", "Dinov2WithRegistersModel",
                      lambda: transformers.Dinov2WithRegistersConfig(**HF_DINO, num_register_tokens=2),
                      dict(layer_scale=0.5, n_registers=2), dropped=1),
    "transformers MAE, old names": case("transformers ViTMAEModel", from_mae, True),
    "transformers MAE, new names": case("transformers ViTMAEModel", from_mae, False),
    "Google's npz": case("timm's reader", from_google),
    "Google's npz, opt/target": case("timm's reader", from_google, prefix="opt/target/"),
    "Google's npz, params": case("timm's reader", from_google, prefix="params/"),
    "Google's npz, pre_logits": case("timm's reader", from_google, pre_logits=True),
}


@torch.no_grad()
def difference(name, folder):
    """Return (largest relative difference of tokens and logits, LoadReport, Sample) of a source."""
    sample = SOURCES[name].write(folder)
    model = sample.holds(**sample.arguments).double().eval()
    report = load_checkpoint(model, sample.path)
    images = images_of(sample.arguments["img_size"])
    tokens = model.forward_features(images)
    pairs = [(tokens, sample.tokens), *([(model(images), sample.logits)] if sample.logits is not None else [])]
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
    return max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs), report, sample


# ---- The tests


@pytest.fixture(scope="module", params=SOURCES)
def loaded(request, tmp_path_factory):
    return request.param, *difference(request.param, tmp_path_factory.mktemp("source"))


def test_load_checkpoint_reproduces_the_sources_features_and_logits(loaded):
    _, largest, report, sample = loaded
    assert largest < 1e-12
    assert sorted([*report.used, *report.dropped]) == sorted(sample.names)
    assert len(report.dropped) == sample.dropped
    assert not [note for note in report.notes if "norms" in note]


def test_describe_checkpoint_finds_the_architecture_of_the_source(loaded):
    name, _, _, sample = loaded
    wanted = sample.holds(**sample.arguments).config
    if "2 x 5 patches" in name:
        with pytest.raises(InputError, match=one_line_with(f"{10 + sample.holds.n_cls_tokens} positions")):
            describe_checkpoint(sample.path)
        return
    found = describe_checkpoint(sample.path)
    assert found.model_class == sample.holds.__name__
    for option in ("n_classes", "embed_dim", "depth", "mlp_ratio", "n_registers", "norm_eps", "qk_norm", "position",
                   "fc_norm"):
        assert getattr(found.config, option) == getattr(wanted, option), option
    assert (found.config.img_size, found.config.patch_size) == (SIDE, PATCH)
    assert (found.config.layer_scale is None) == (wanted.layer_scale is None)
    assert sorted([*found.report.used, *found.report.dropped]) == sorted(sample.names)
    if "npz" in name or "qk_norm" in name or "old names" in name:  # which save_pretrained wrote with a config.json
        assert (found.config.n_heads, found.report.heads) == (HEADS, "")
    else:
        assert "the file does not record their number" in found.report.heads


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), [
    ("DeiT-III", dict(no_embed_class=True, init_values=0.1)), ("DINOv2", dict(num_classes=0, init_values=0.1)),
    ("DINOv2, registers", dict(num_classes=0, init_values=0.1, reg_tokens=2, no_embed_class=True))])
def test_load_checkpoint_agrees_with_timms_own_conversion(name, options, tmp_path):
    sample = SOURCES[name].write(tmp_path)
    theirs = timm.models.VisionTransformer(**{**TIMM, **options}).double().eval()
    state = torch.load(sample.path, weights_only=True)
    theirs.load_state_dict(checkpoint_filter_fn(state, theirs, adapt_layer_scale=True), strict=True)
    ours = VisionTransformer(**sample.arguments).double().eval()
    load_checkpoint(ours, sample.path)
    tokens = theirs.forward_features(images_of())
    assert (ours.forward_features(images_of()) - tokens).abs().max() < 1e-12 * tokens.abs().max()


@pytest.mark.parametrize("name", ["transformers ViT, old names", "timm", "torchvision", "Google's npz"])
def test_load_checkpoint_notes_another_norm_eps(name, tmp_path):
    sample = SOURCES[name].write(tmp_path)
    eps = sample.arguments.get("norm_eps", 1e-6)
    report = load_checkpoint(VisionTransformer(**{**sample.arguments, "norm_eps": 1e-5}), sample.path)
    assert f"norm_eps={eps} to match" in str(report)


@pytest.mark.parametrize("which", ["old", "new"])
def test_load_checkpoint_skips_a_head_of_cls_and_mean(which, tmp_path):
    sample = SOURCES[f"transformers Dinov2 with head, {which} names"].write(tmp_path)
    model = VisionTransformer(**{**sample.arguments, "n_classes": CLASSES})
    head = model.head.weight.clone()
    report = load_checkpoint(model, sample.path)
    assert torch.equal(model.head.weight, head)
    assert ("head: the model keeps its own, which is untrained, because the file's head reads 56 features, but the "
            "model's head reads 28") in report.notes


# Where a number of positions could be read in two ways, the format tells: of 4 x 4 patches and CLS, never 17 x 1.
@pytest.mark.parametrize(("name", "config", "grid"), [
    ("Dinov2WithRegistersModel", dict(num_register_tokens=4), (3, 4)), ("Dinov2Model", {}, (17, 1)),
    ("ViTModel", {}, (17, 1)), ("torchvision", {}, (17, 1)), ("Google's npz", {}, (17, 1)),
    ("DINO in training", {}, (17, 1)), ("DINO in training", dict(reg_tokens=4), (3, 4))])
def test_load_checkpoint_reads_positions_by_format_not_model_grid(name, config, grid, tmp_path):
    side, options = 4 * PATCH, dict(n_classes=0)
    if name == "torchvision":
        model = randomised(torchvision.models.VisionTransformer(side, PATCH, DEPTH, HEADS, D, RATIO * D))
        state, positions = model.state_dict(), model.encoder.pos_embedding
    elif name in ("Google's npz", "DINO in training"):
        model = timm_vit(img_size=side, num_classes=0 if name == "DINO in training" else CLASSES)
        state, positions = dino_in_training(model.state_dict()), model.pos_embed
        if config:
            state["backbone.register_tokens"] = torch.randn(1, 4, D)
            options["n_registers"] = 4
    else:
        model_class = getattr(transformers, name)
        base = HF_DINO if "Dino" in name else HF_VIT
        model = randomised(model_class(model_class.config_class(**{**base, "image_size": side}, **config)))
        state, positions = model.state_dict(), model.embeddings.position_embeddings
        options |= dict(n_registers=config.get("num_register_tokens", 0))
        options |= dict(layer_scale=0.5) if "Dino" in name else {}
    if name == "Google's npz":
        np.savez(tmp_path / "m.npz", **flax(model))
    else:
        torch.save(state, tmp_path / "m.npz")
    ours = VisionTransformer(**{**OURS, "img_size": tuple(n * PATCH for n in grid), **options}).double()
    load_checkpoint(ours, tmp_path / "m.npz")
    moved = resample_positions(positions, (4, 4), grid)
    assert torch.equal(ours.pos_embed, moved[:, 1:] if options.get("n_registers") else moved)


# ---- Google's arrays by arithmetic: what flax does with them, beside our layers


@torch.no_grad()
def test_load_checkpoint_transposes_googles_arrays_correctly(tmp_path):
    arrays = flax(timm_vit())
    np.savez(tmp_path / "m.npz", **arrays)
    model = VisionTransformer(**OURS).double().eval()
    load_checkpoint(model, tmp_path / "m.npz")
    w = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
    x, block, name = torch.randn(2, 10, D).double(), model.blocks[1], "Transformer/encoderblock_1"

    def close(mine, theirs):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)

    patches = images_of().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, C, rows, columns, P, P)
    embedded = torch.einsum("bcijpq,pqcd->bijd", patches, w["embedding/kernel"]) + w["embedding/bias"]
    close(model.patch_embed(images_of()), embedded.flatten(1, 2))
    attention = f"{name}/MultiHeadDotProductAttention_1"
    parts = block.attn.qkv(x).reshape(2, 10, 3, HEADS, D // HEADS).unbind(2)
    for part, mine in zip(("query", "key", "value"), parts, strict=True):
        kernel, bias = w[f"{attention}/{part}/kernel"], w[f"{attention}/{part}/bias"]
        close(mine, torch.einsum("bnd,dhk->bnhk", x, kernel) + bias)
    heads = torch.randn(2, 10, HEADS, D // HEADS).double()
    close(block.attn.proj(heads.flatten(2)),
          torch.einsum("bnhk,hkd->bnd", heads, w[f"{attention}/out/kernel"]) + w[f"{attention}/out/bias"])
    close(block.mlp.fc1(x), x @ w[f"{name}/MlpBlock_3/Dense_0/kernel"] + w[f"{name}/MlpBlock_3/Dense_0/bias"])
    hidden = torch.randn(2, 10, RATIO * D).double()
    close(block.mlp.fc2(hidden),
          hidden @ w[f"{name}/MlpBlock_3/Dense_1/kernel"] + w[f"{name}/MlpBlock_3/Dense_1/bias"])
    close(model.head(x), x @ w["head/kernel"] + w["head/bias"])
    for norm, place in ((block.norm1, f"{name}/LayerNorm_0"), (block.norm2, f"{name}/LayerNorm_2"),
                        (model.norm, "Transformer/encoder_norm")):
        centred = x - x.mean(dim=-1, keepdim=True)
        unit = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        close(norm(x), unit * w[f"{place}/scale"] + w[f"{place}/bias"])
    assert torch.equal(model.cls_token, w["cls"])
    assert torch.equal(model.pos_embed, w["Transformer/posembed_input/pos_embedding"])


def refuse(path, text, **options):
    """Check that loading is refused in one line with the file and the text, and changes nothing."""
    model = VisionTransformer(**{**OURS, **options})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for read in (lambda path: load_checkpoint(model, path), describe_checkpoint):
        with pytest.raises(InputError, match=one_line_with(path)) as caught:
            read(path)
        assert text in str(caught.value)
        if options:
            break
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch16_224"])
def test_load_opens_timms_mean_pooled_models(name, tmp_path):
    theirs = randomised(timm.create_model(name, img_size=32, depth=2, num_classes=CLASSES, global_pool="avg"))
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    ours = load(tmp_path / "m.pth").double()
    assert (ours.config.pool, ours.config.fc_norm, type(ours.norm)) == ("mean", True, torch.nn.Identity)
    logits = theirs(images_of(32))
    assert (ours(images_of(32)) - logits).abs().max() < 1e-12 * logits.abs().max()


@torch.no_grad()
def test_load_opens_maes_fine_tuned_models(tmp_path):
    """MAE's models_vit.py with global_pool=True: no norm, mean over the patches, fc_norm, head."""
    inner = timm_vit(embed_dim=64, num_heads=1)
    norm = randomised(torch.nn.LayerNorm(64, eps=1e-6), seed=9)
    state = {name: tensor for name, tensor in inner.state_dict().items() if not name.startswith("norm.")}
    torch.save({"model": {**state, "fc_norm.weight": norm.weight, "fc_norm.bias": norm.bias}, "epoch": 99,
                "args": argparse.Namespace(global_pool=True)}, tmp_path / "m.pth")
    inner.norm = torch.nn.Identity()
    logits = inner.head(norm(inner.forward_features(images_of())[:, 1:].mean(dim=1)))
    ours = load(tmp_path / "m.pth").double()
    assert (ours(images_of()) - logits).abs().max() < 1e-12 * logits.abs().max()


def test_load_checkpoint_says_how_to_build_for_fc_norm(tmp_path):
    torch.save(timm_vit(global_pool="avg").state_dict(), tmp_path / "m.pth")
    refuse(tmp_path / "m.pth", "build the model with pool='mean', fc_norm=True", pool="mean")


def test_load_normalises_googles_images_by_a_half(tmp_path):
    np.savez(tmp_path / "m.npz", **flax(timm_vit()))
    with pytest.warns(Assumption, match=r"\(a square of 3x3 patches\), mean and std 0\.5 as in its library, bil"):
        model = load(tmp_path / "m.npz")
    assert (model.config.n_heads, model.preprocessing.mean, model.preprocessing.std) == (HEADS, (0.5,) * 3, (0.5,) * 3)


def test_load_checkpoint_refuses_other_heads_than_googles_arrays(tmp_path):
    np.savez(tmp_path / "m.npz", **flax(timm_vit()))
    refuse(tmp_path / "m.npz", "n_heads is 7 in the file, but 4 in the model", n_heads=4)


def test_load_checkpoint_refuses_a_google_array_named_twice(tmp_path):
    arrays = flax(timm_vit())
    np.savez(tmp_path / "m.npz", **arrays, **{"params/cls": arrays["cls"] + 1})
    refuse(tmp_path / "m.npz", "cls")


def test_load_checkpoint_accepts_maes_fixed_positions(tmp_path):
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**HF_VIT))
    for thing in (*model.modules(), *model.parameters()):  # else they count as initialised, and stay zero
        thing._is_hf_initialized = False
    model.embeddings.initialize_weights()
    assert model.embeddings.position_embeddings.any()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    ours = VisionTransformer(**OURS, position="sincos", norm_eps=1e-12)
    load_checkpoint(ours, tmp_path / "m.pt")
    torch.testing.assert_close(ours.pos_embed, model.embeddings.position_embeddings)


# ---- What is known and cannot be held


def names_of(*names):
    """Return a state dict in which only the names matter."""
    return {name: torch.zeros(2) for name in names}


def timm_state(build, **options):
    return lambda: build(**{**TIMM, **options}).state_dict()


def resnet():
    with torch.device("meta"):
        names = torchvision.models.resnet18().state_dict()
    return names_of(*names)


TIMM_NAMES = ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
REFUSALS = {
    "timm BEiT without tables": (timm_state(timm.models.beit.Beit, init_values=0.1), "BEiT or EVA without tables"),
    "transformers BEiT without tables": (
        lambda: transformers.BeitModel(transformers.BeitConfig(**HF_VIT)).state_dict(), "BEiT or EVA without tables"),
    "transformers BEiT without tables, with head": (
        lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**HF_VIT)).state_dict(),
        "BEiT or EVA without tables"),
    "ResNet": (resnet, "torchvision's ResNet"),
    "OpenAI's CLIP": (lambda: names_of("visual.class_embedding", "visual.conv1.weight"), "CLIP"),
    "transformers CLIP": (
        lambda: names_of("vision_model.embeddings.class_embedding", "text_model.embeddings.position_ids"), "CLIP"),
    "gated MLP, DINOv2 giant": (lambda: names_of(*TIMM_NAMES, "mask_token", "blocks.0.mlp.w12.weight"), "gated"),
    "gated MLP, transformers": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF_DINO, use_swiglu_ffn=True)).state_dict(),
        "gated"),
    "gated MLP, transformers as of old": (
        lambda: names_of("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.mlp.weights_in.weight"),
        "gated"),
    "rotary": (lambda: names_of(*TIMM_NAMES, "rope.freqs"), "rotary"),
    "rotary in blocks": (lambda: names_of(*TIMM_NAMES, "blocks.0.attn.rotary_emb.inv_freq"), "rotary"),
    "big_vision": (
        lambda: names_of("params/embedding/kernel", "params/Transformer/encoderblock/LayerNorm_0/bias"), "big_vision"),
    "big_vision, pooling head": (
        lambda: names_of("embedding/kernel", "Transformer/encoderblock_0/LayerNorm_0/bias", "MAPHead_0/probe"),
        "big_vision"),
    "timm CLIP": (timm_state(timm.models.VisionTransformer, pre_norm=True), "CLIP"),
    "RoPE-ViT": (lambda: names_of(*TIMM_NAMES, "blocks.0.gamma_1"), "RoPE-ViT"),
    "torchvision, convolutional stem": (lambda: names_of("class_token", "conv_proj.conv_last.weight"), "known format"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_load_checkpoint_refuses_foreign_architectures_with_the_reason(name, tmp_path):
    build, reason = REFUSALS[name]
    state = build()
    assert state
    torch.save(state, tmp_path / "m.pt")
    refuse(tmp_path / "m.pt", reason)
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "m.pt")
    refuse(tmp_path / "m.pt", reason)


def test_load_checkpoint_refuses_a_saved_beit_of_transformers_without_tables(tmp_path):
    transformers.BeitModel(transformers.BeitConfig(**HF_VIT)).save_pretrained(tmp_path)
    refuse(tmp_path / "model.safetensors", "BEiT or EVA without tables")


def test_load_checkpoint_refuses_dinov2_giant_under_its_old_names(tmp_path):
    config = transformers.Dinov2Config(**HF_DINO, use_swiglu_ffn=True)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    refuse(tmp_path / "model.safetensors", "gated")


def test_load_checkpoint_notes_deit3_may_be_rope_vit(tmp_path):
    for name in ("DeiT-III", "DeiT"):
        (tmp_path / name).mkdir()
        sample = SOURCES[name].write(tmp_path / name)
        report = load_checkpoint(VisionTransformer(**sample.arguments), sample.path)
        assert ("RoPE-ViT" in str(report)) == (name == "DeiT-III")
