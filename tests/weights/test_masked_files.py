"""Files of MAE and BEiT: each library's own model, with random weights, opens and gives the same numbers.

The papers' code is not a package, so its files are written here, with its names, from the weights of a library's model.
"""

import argparse
import json
import re
import warnings
from dataclasses import dataclass

import pytest
import torch
import transformers
from parity_checks import case, randomised, relative_difference, renamed
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.models.beit import Beit

from vit_bridge.errors import Assumption
from vit_bridge.models import BEiT, DistilledViT, MaskedAutoencoder, MaskedTokenModel
from vit_bridge.models.beit import block_mask
from vit_bridge.preprocessing import IMAGENET_MEAN
from vit_bridge.weights.checkpoints import _fit_positions, describe_checkpoint, load, load_checkpoint, save_model
from vit_bridge.weights.formats import Format, Weights
from vit_model import InputError, VisionTransformer, resize_positions

PATCH, D, DEPTH, HEADS, CLASSES, TOKENS = 4, 12, 2, 3, 5, 7
TABLE = "relative_position_bias_table"
VIT = dict(img_size=12, patch_size=PATCH, embed_dim=D, depth=DEPTH, n_heads=HEADS)
MAE = dict(**VIT, decoder_dim=8, decoder_depth=1, decoder_heads=2, norm_pix_loss=False)
WIDE = dict(img_size=(8, 20))


def one_line_with(text):
    return rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z"


def images_for(model, n=3):
    torch.manual_seed(7)
    return torch.randn(n, 3, *model.patch_embed.img_size).double()


def noise_for(model, n=3):
    torch.manual_seed(8)
    return torch.rand(n, model.patch_embed.n_patches)


def mask_for(model, n=3):
    generator = torch.Generator().manual_seed(9)
    return torch.stack([block_mask(model.patch_embed.grid_size, 4, generator).flatten() for _ in range(n)])


# ---- The names of other libraries, from ours

TIMM_NAMES = [(r"ls(\d)\.gamma", r"gamma_\1"), (r"attn\.qkv\.bias", "attn.{qkv}_bias")]
HF_BLOCKS = [(r"attn\.qkv\.", "attention.{qkv}_proj."), (r"attn\.proj\.", "attention.o_proj."),
             (r"norm1\.", "layernorm_before."), (r"norm2\.", "layernorm_after.")]
HF_MAE_NAMES = [
    (r"^(cls_token)$", r"vit.embeddings.\1"), (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."), (r"^norm\.", "vit.layernorm."),
    (r"^blocks\.", "vit.layers."), (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(mask_token|decoder_pos_embed|decoder_embed|decoder_norm|decoder_pred)", r"decoder.\1"), *HF_BLOCKS]
HF_BEIT_NAMES = [
    (r"^(cls_token|mask_token)$", r"beit.embeddings.\1"), (r"^head\.", "classifier."),
    (r"^patch_embed\.proj\.", "beit.embeddings.patch_embeddings.projection."), (r"^norm\.", "layernorm."),
    (r"^fc_norm\.", "beit.pooler.layernorm."), (r"^rel_pos_bias\.", "beit.shared_position_bias."),
    (rf"attn\.({TABLE})", r"relative_position_bias.\1"), (r"^blocks\.", "beit.layers."), *HF_BLOCKS,
    (r"ls(\d)\.gamma", r"lambda_\1")]


def without_key_biases(state):
    return {name: tensor for name, tensor in state.items() if not name.endswith((".k_bias", ".k_proj.bias"))}


# ---- The formats: each writes a file of its kind into a folder


@dataclass
class Sample:
    """A file, our model for it without its weights, what it must give, and the tensors that have no place in it."""
    path: object
    names: list
    model: object
    wanted: list
    dropped: list = ()
    guessed: dict = None  # what `load` has to be told


def outputs_of(model):
    """The numbers to compare: loss, prediction and mask; logits of all patches, some hidden; features and logits."""
    images = images_for(model)
    if isinstance(model, MaskedAutoencoder):
        return list(model(images, noise_for(model)))
    if isinstance(model, MaskedTokenModel):
        return [model(images, mask_for(model))]
    features = model.forward_features(images)
    return [features, model.forward_head(features)]


def transformers_mae(c):
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
        hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.n_heads,
        intermediate_size=int(c.embed_dim * c.mlp_ratio), layer_norm_eps=c.norm_eps, image_size=c.img_size,
        patch_size=c.patch_size, decoder_hidden_size=c.decoder_dim, decoder_num_hidden_layers=c.decoder_depth,
        decoder_num_attention_heads=c.decoder_heads, decoder_intermediate_size=int(c.decoder_dim * c.mlp_ratio),
        mask_ratio=c.mask_ratio, norm_pix_loss=c.norm_pix_loss)).double().eval()
    return model


def mae_numbers(theirs, ours):
    found = theirs(images_for(ours), noise=noise_for(ours))
    return [found.loss, found.logits, found.mask]


def from_mae(folder, around=None, name="mae_visualize_vit_base.pth", **options):
    """The paper's code: its names are ours, and its positions are parameters."""
    ours = float32_numbers(randomised(MaskedAutoencoder(**{**MAE, **options}), 1))
    theirs = transformers_mae(ours.config)
    theirs.load_state_dict(renamed(ours.state_dict(), HF_MAE_NAMES), strict=True)
    torch.save({"model": ours.state_dict(), **(around or {})}, folder / name)
    return Sample(folder / name, list(ours.state_dict()), MaskedAutoencoder(**{**MAE, **options}),
                  mae_numbers(theirs, ours), guessed=dict(n_heads=HEADS, decoder_heads=2))


def from_transformers_mae(folder, old_names, version_4=False, **options):
    ours = MaskedAutoencoder(**{**MAE, "norm_eps": 1e-12, **options})
    theirs = float32_numbers(randomised(transformers_mae(ours.config), 2))
    theirs.vit.embeddings.position_embeddings.data.copy_(ours.pos_embed)
    theirs.decoder.decoder_pos_embed.data.copy_(ours.decoder_pos_embed)
    path, names = write_transformers(folder, theirs, old_names)
    if version_4:
        state = {name.replace("decoder_encoder.layer", "decoder_layers"): one for name, one in load_file(path).items()}
        assert state.keys() != set(names)
        save_file(state, path)
        names = list(state)
    guessed = {} if old_names else dict(n_heads=HEADS, decoder_heads=2, norm_pix_loss=ours.config.norm_pix_loss,
                                        mask_ratio=ours.config.mask_ratio)
    return Sample(path, names, ours, mae_numbers(theirs, ours), guessed=guessed)


def write_transformers(folder, model, old_names):
    """Write a model of transformers under the names of save_pretrained or of its memory; return the path, the names."""
    if old_names:
        model.save_pretrained(folder)
        path = folder / "model.safetensors"
        names = list(load_file(path))
        assert any("encoder.layer.0.attention.attention.query" in name for name in names)
    else:
        path, names = folder / "m.pt", list(model.state_dict())
        torch.save(model.state_dict(), path)
        assert any("layers.0.attention.q_proj" in name for name in names)
    return path, names


def float32_numbers(model):
    """Round every parameter to float32, which any file holds exactly."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.float())
    return model


def index_of(model):
    return torch.zeros(model.patch_embed.n_patches + 1, model.patch_embed.n_patches + 1, dtype=torch.long)


def from_timm_beit(folder, microsoft=False, **options):
    """timm's Beit; with microsoft, the index that the paper's code stores, and the mask token of pre-training."""
    settings = dict(img_size=12, num_classes=CLASSES, init_values=0.1, use_rel_pos_bias=True, global_pool="avg",
                    use_fc_norm=True, shared=False) | options
    shared = settings.pop("shared")
    theirs = float32_numbers(randomised(Beit(patch_size=PATCH, embed_dim=D, depth=DEPTH, num_heads=HEADS,
                                             use_abs_pos_emb=False, use_shared_rel_pos_bias=shared,
                                             **settings | dict(use_rel_pos_bias=not shared)), 3))
    ours = BEiT(**{**VIT, "img_size": settings["img_size"]}, n_classes=settings["num_classes"], shared_bias=shared,
                layer_scale=settings["init_values"], fc_norm=settings["use_fc_norm"],
                pool="mean" if settings["global_pool"] == "avg" else "cls")
    state, dropped = theirs.state_dict(), []
    if microsoft:
        extra = {"blocks.1.attn.relative_position_index": index_of(ours), "mask_token": torch.randn(1, 1, D)}
        state, dropped = state | extra, list(extra)
    torch.save({"model": state} if microsoft else state, folder / "m.pth")
    features = theirs.forward_features(images_for(ours))
    return Sample(folder / "m.pth", list(state), ours, [features, theirs.forward_head(features)], dropped, {})


def transformers_beit_config(c, **options):
    return transformers.BeitConfig(
        hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.n_heads, image_size=c.img_size,
        intermediate_size=int(c.embed_dim * c.mlp_ratio), patch_size=c.patch_size, layer_norm_eps=c.norm_eps,
        use_relative_position_bias=not c.shared_bias, use_shared_relative_position_bias=c.shared_bias,
        layer_scale_init_value=c.layer_scale or 0.0, num_labels=c.n_classes, **options)


def from_transformers_beit(folder, kind, old_names, **options):
    n_classes = CLASSES if kind == "BeitForImageClassification" else 0
    ours = BEiT(**{**VIT, "n_classes": n_classes, "norm_eps": 1e-12, **options})
    theirs = float32_numbers(randomised(getattr(transformers, kind)(transformers_beit_config(
        ours.config, use_mean_pooling=ours.config.pool == "mean", use_mask_token=True)), 4))
    path, names = write_transformers(folder, theirs, old_names)
    base = theirs.base_model(images_for(ours))
    head = getattr(theirs, "classifier", torch.nn.Identity())
    return Sample(path, names, ours, [base.last_hidden_state, head(base.pooler_output)],
                  [name for name in names if "mask_token" in name], {})


def from_transformers_masked(folder, old_names, **options):
    ours = MaskedTokenModel(**{**VIT, "n_tokens": TOKENS, "norm_eps": 1e-12, **options})
    theirs = float32_numbers(randomised(transformers.BeitForMaskedImageModeling(transformers_beit_config(
        ours.config, vocab_size=TOKENS, use_mask_token=True)), 5))
    path, names = write_transformers(folder, theirs, old_names)
    return Sample(path, names, ours, [theirs(images_for(ours), bool_masked_pos=mask_for(ours)).logits], guessed={})


def from_microsoft_masked(folder, v2=False, **options):
    """The paper's code in pre-training: timm's names, lm_head, the shared table with its index; v2's layers for CLS."""
    arguments = {**VIT, "n_tokens": TOKENS, **options}
    ours = float32_numbers(randomised(MaskedTokenModel(**arguments), 6))
    theirs = transformers.BeitForMaskedImageModeling(transformers_beit_config(
        ours.config, vocab_size=TOKENS, use_mask_token=True)).double().eval()
    theirs.load_state_dict(without_key_biases(renamed(ours.state_dict(), HF_BEIT_NAMES)), strict=True)
    extra = {"rel_pos_bias.relative_position_index": index_of(ours)}
    if v2:
        extra |= {"cls_pt_layers.0.norm1.weight": torch.randn(D), "cls_pt_norm.weight": torch.randn(D)}
    state = without_key_biases(renamed(ours.state_dict(), TIMM_NAMES)) | extra
    torch.save({"module" if v2 else "model": state}, folder / "m.pth")
    return Sample(folder / "m.pth", list(state), MaskedTokenModel(**arguments),
                  [theirs(images_for(ours), bool_masked_pos=mask_for(ours)).logits], list(extra), {})


def from_ours(folder, build):
    ours = float32_numbers(randomised(build(), 7))
    torch.save(ours.state_dict(), folder / "m.pth")
    return Sample(folder / "m.pth", list(ours.state_dict()), build(), outputs_of(ours), guessed={})


def both(label, against, write, *positional, **options):
    return {f"{label}, {which} names": case(against, write, *positional, which == "old", **options)
            for which in ("old", "new")}


TOKEN_POOL = dict(global_pool="token", use_fc_norm=False)
SOURCES = {
    "MAE, visualize": case("transformers ViTMAEForPreTraining", from_mae),
    "MAE, normalised pixels": case("transformers ViTMAEForPreTraining", from_mae, norm_pix_loss=True,
                                   name="mae_pretrain_vit_base_full.pth"),
    "MAE, in training": case("transformers ViTMAEForPreTraining", from_mae, name="checkpoint-799.pth",
                             around=dict(epoch=799, args=argparse.Namespace(norm_pix_loss=True, mask_ratio=0.6)),
                             norm_pix_loss=True, mask_ratio=0.6),
    **both("transformers MAE with decoder", "transformers ViTMAEForPreTraining", from_transformers_mae),
    **both("transformers MAE with decoder, normalised pixels", "transformers ViTMAEForPreTraining",
           from_transformers_mae, norm_pix_loss=True, mask_ratio=0.6),
    "transformers MAE with decoder, names of version 4": case(
        "transformers ViTMAEForPreTraining", from_transformers_mae, True, version_4=True),
    "timm's BEiT": case("timm", from_timm_beit),
    "timm's BEiT, 2 x 5 patches": case("timm", from_timm_beit, **WIDE),
    "timm's BEiT, shared table": case("timm", from_timm_beit, shared=True),
    "timm's BEiT, no head": case("timm", from_timm_beit, num_classes=0),
    "timm's BEiT, CLS": case("timm", from_timm_beit, **TOKEN_POOL),
    "timm's BEiT, no layer scale": case("timm", from_timm_beit, init_values=None),
    "microsoft's BEiT": case("timm", from_timm_beit, microsoft=True),
    "microsoft's BEiT for masked images": case("transformers BeitForMaskedImageModeling", from_microsoft_masked),
    "microsoft's BEiT v2 for masked images": case("transformers BeitForMaskedImageModeling", from_microsoft_masked,
                                                  v2=True, layer_scale=1e-5),
    **{f"{label}{what}": source for kind, name in (
        ("transformers BEiT with head", "BeitForImageClassification"), ("transformers BEiT", "BeitModel"))
       for what, options in (("", {}), (", shared table", dict(shared_bias=True)),
                             (", CLS", dict(pool="cls", fc_norm=False)))
       for label, source in both(kind, f"transformers {name}", from_transformers_beit, name, **options).items()},
    **both("transformers BEiT for masked images", "transformers BeitForMaskedImageModeling", from_transformers_masked),
    **both("transformers BEiT for masked images, tables of blocks", "transformers BeitForMaskedImageModeling",
           from_transformers_masked, shared_bias=False),
    "our names of a MaskedAutoencoder": case("ours", from_ours, lambda: MaskedAutoencoder(**MAE)),
    "our names of a BEiT": case("ours", from_ours, lambda: BEiT(**VIT, n_classes=CLASSES)),
    "our names of a MaskedTokenModel": case("ours", from_ours, lambda: MaskedTokenModel(**VIT, n_tokens=TOKENS)),
}


@torch.no_grad()
def difference(name, folder):
    """Return (largest relative difference of the numbers, LoadReport, Sample) of a source."""
    sample = SOURCES[name].write(folder)
    report = load_checkpoint(sample.model.double().eval(), sample.path)
    return largest(outputs_of(sample.model), sample.wanted), report, sample


def largest(found, wanted):
    """The largest relative difference; masks must be equal."""
    assert [one.shape for one in found] == [one.shape for one in wanted]
    return max(relative_difference(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


# ---- The tests


@torch.no_grad()
@pytest.mark.parametrize("name", SOURCES)
def test_masked_files_open_strictly_and_give_the_numbers_of_their_library(name, tmp_path):
    far, report, sample = difference(name, tmp_path)
    assert far <= 1e-12
    assert sorted([*report.used, *report.dropped]) == sorted(sample.names)
    assert sorted(report.dropped) == sorted(sample.dropped)
    assert not [note for note in report.notes if "norms" in note or "head" in note]
    guessed = dict(sample.guessed)
    if "2 x 5" in name:
        with pytest.raises(InputError, match=one_line_with("27 offsets")):
            load(sample.path)
        guessed |= WIDE
    if "our names" in name:  # the number of heads, for a model without a table
        guessed |= dict(n_heads=HEADS, decoder_heads=2, norm_pix_loss=False) if "Auto" in name else {}
    if name == "timm's BEiT, CLS" or "our names" in name:
        assert load(sample.path, **guessed).config.pool == sample.model.config.pool
    model = load(sample.path, **guessed).double()
    assert type(model) is type(sample.model)
    wanted = vars(sample.model.config) | dict(layer_scale=model.config.layer_scale)  # a learned one has no start
    assert vars(model.config) == wanted
    assert largest(outputs_of(model), sample.wanted) <= 1e-12
    save_model(model.float(), tmp_path / "ours.pt")
    again = load(tmp_path / "ours.pt")
    assert again.config == model.config
    found = describe_checkpoint(sample.path, **guessed)
    assert (found.model_class, found.config) == (type(model).__name__, model.config)
    assert f"    model = {type(model).__name__}(" in str(found)


# ---- MAE: what lies in a file, and what it is opened as


def unchanged(model, path, text):
    """Check that loading is refused in one line and leaves the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=one_line_with(text)) as caught:
        load_checkpoint(model, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["MAE, visualize", "transformers MAE with decoder, old names", "ours"])
def test_a_vit_takes_the_encoder_and_says_that_the_decoder_was_dropped(name, tmp_path):
    if name == "ours":
        theirs = randomised(MaskedAutoencoder(**MAE), 1).float()
        save_model(theirs, tmp_path / "m.pt")
        path, eps = tmp_path / "m.pt", 1e-6
    else:
        sample = SOURCES[name].write(tmp_path)
        theirs, path, eps = sample.model, sample.path, sample.model.config.norm_eps
        load_checkpoint(theirs, path)
    theirs.eval()
    for position in ("learned", "sincos"):
        model = VisionTransformer(**VIT, n_classes=0, position=position, norm_eps=eps).eval()
        report = load_checkpoint(model, path)
        images = images_for(model).float()
        torch.testing.assert_close(model(images), theirs.encoder().eval()(images), rtol=0, atol=1e-6)
        decoder = [one for one in report.dropped if "decoder" in one or "mask_token" in one]
        assert {report.dropped[one] for one in decoder} == {"MAE's decoder, used in pretraining"}
        n = 24 if "transformers" in name else 20  # there, queries, keys and values have tensors of their own
        assert len(decoder) == len(report.dropped) == n
        assert re.search(rf"dropped: \S+ and {n - 1} more \(MAE's decoder, used in pretraining\)", str(report))


@pytest.mark.parametrize("kind", ["encoder", "fine-tuned", "ours"])
def test_a_masked_autoencoder_refuses_a_file_without_a_decoder(kind, tmp_path):
    vit = VisionTransformer(**VIT, n_classes=CLASSES * (kind == "fine-tuned"), position="sincos")
    path = tmp_path / "m.pth"
    if kind == "ours":
        save_model(vit, path)
    else:
        torch.save({"model": vit.state_dict()}, path)
        assert type(load(path)) is VisionTransformer
    unchanged(MaskedAutoencoder(**MAE), path, "has no decoder, so it reconstructs nothing; use load(path), which "
                                              "builds the VisionTransformer")


@pytest.mark.parametrize("name", ["pos_embed", "decoder_pos_embed"])
def test_a_masked_autoencoder_refuses_positions_that_are_not_the_fixed_ones(name, tmp_path):
    state = MaskedAutoencoder(**MAE).state_dict()
    for far, fits in ((1e-5, True), (0.01, False)):
        torch.save({"model": {**state, name: state[name] + far}}, tmp_path / "m.pth")
        model = MaskedAutoencoder(**MAE)
        if fits:
            load_checkpoint(model, tmp_path / "m.pth")
            assert torch.equal(model.state_dict()[name], state[name])
        else:
            unchanged(model, tmp_path / "m.pth", f"{name} does not hold the fixed sines and cosines of 3x3 patches")


@torch.no_grad()
def test_a_masked_autoencoder_of_another_size_computes_its_positions_again(tmp_path):
    state = randomised(MaskedAutoencoder(**MAE), 1).state_dict()
    torch.save({"model": state}, tmp_path / "m.pth")
    model = MaskedAutoencoder(**MAE | WIDE)
    load_checkpoint(model, tmp_path / "m.pth")
    wanted = resize_positions(MaskedAutoencoder(**MAE), (8, 20))
    for name in ("pos_embed", "decoder_pos_embed"):
        assert torch.equal(model.state_dict()[name], wanted.state_dict()[name])


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
def test_a_masked_autoencoder_with_registers_keeps_them(whole, tmp_path):
    build = dict(**MAE, n_registers=2)
    theirs, model = randomised(MaskedAutoencoder(**build), 1).float(), MaskedAutoencoder(**build)
    if whole:
        save_model(theirs, tmp_path / "m.pth")
    else:
        torch.save(theirs.state_dict(), tmp_path / "m.pth")
    assert not load_checkpoint(model, tmp_path / "m.pth").dropped
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert load(tmp_path / "m.pth").config.n_registers == 2


@pytest.mark.parametrize(("name", "around", "normalised", "said"), [
    ("mae_visualize_vit_large_ganloss.pth", {}, False, True), ("mae_pretrain_vit_base_full.pth", {}, True, True),
    ("checkpoint-1.pth", dict(args=argparse.Namespace(norm_pix_loss=False, mask_ratio=0.5)), False, False),
    ("mae_visualize.pth", dict(args=dict(norm_pix_loss=True, mask_ratio=0.5)), True, False)])
def test_load_says_which_pixels_it_assumes_a_file_to_predict(name, around, normalised, said, tmp_path):
    torch.save({"model": MaskedAutoencoder(**MAE).state_dict(), **around}, tmp_path / name)
    with pytest.warns(Assumption) as caught:
        model = load(tmp_path / name)
    assert (model.config.norm_pix_loss, model.config.mask_ratio) == (normalised, 0.5 if around else 0.75)
    text = str(caught[0].message)
    assert (f"norm_pix_loss={normalised} (the authors' mae_visualize files have False, their others True)" in
            text) == said
    assert ("mask_ratio=0.75" in text) == said
    assert "decoder_heads=1 (8 channels each)" in text
    assert "norm_pix_loss=" in str(describe_checkpoint(tmp_path / name)) or not said
    report = load_checkpoint(MaskedAutoencoder(**MAE | dict(norm_pix_loss=normalised)), tmp_path / name)
    assert "decoder_heads=2" in report.heads
    assert (f"norm_pix_loss={normalised}" in report.heads) == said


def test_load_checkpoint_refuses_another_decoder_than_the_config_records(tmp_path):
    SOURCES["transformers MAE with decoder, old names"].write(tmp_path)
    for field, theirs, ours in (("decoder_heads", 2, 4), ("norm_pix_loss", False, True)):
        model = MaskedAutoencoder(**MAE | {field: ours, "norm_eps": 1e-12})
        unchanged(model, tmp_path / "model.safetensors", f"{field} is {theirs} in the file, but {ours} in the model")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_hidden_size": 16}))
    with pytest.raises(InputError, match=one_line_with("specifies decoder_dim=16, but the tensors")):
        load(tmp_path)


# ---- BEiT: tables, tokens and images


@torch.no_grad()
@pytest.mark.parametrize("kind", ["microsoft", "transformers", "ours"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_beit_takes_the_blocks_of_pretraining_and_copies_their_shared_table(kind, shared, tmp_path):
    name = "microsoft's BEiT v2 for masked images" if kind == "microsoft" else "transformers BEiT for masked images, " \
                                                                                "old names"
    if kind == "ours":
        theirs, path = randomised(MaskedTokenModel(**VIT, n_tokens=TOKENS), 1).float(), tmp_path / "m.pt"
        save_model(theirs, path)
    else:
        sample = SOURCES[name].write(tmp_path)
        theirs, path = sample.model, sample.path
        load_checkpoint(theirs, path)
    model = BEiT(**VIT, n_classes=CLASSES, shared_bias=shared, fc_norm=False, norm_eps=theirs.config.norm_eps).eval()
    report = load_checkpoint(model, path)
    images = images_for(model).float()
    tokens = theirs.eval().forward_features(images)
    torch.testing.assert_close(model.forward_features(images), tokens, rtol=0, atol=1e-5)
    assert ("the table of relative positions, which the file's blocks share, was copied to each of the 2 blocks" in
            str(report)) == (not shared)
    assert "the prediction of hidden tokens, used in pretraining" in str(report)
    if not shared:
        usual = BEiT(**VIT, n_classes=0, norm_eps=theirs.config.norm_eps)
        assert "norm: the file's last norm stands before the mean, the model's after it" in str(load_checkpoint(
            usual, path))
        wanted = theirs.encoder().state_dict()
        assert usual.state_dict().keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in usual.state_dict().items())
    assert "head: the file has none, so the model keeps its own, which is untrained" in str(report)


@pytest.mark.parametrize("kind", ["timm", "ours"])
def test_a_masked_token_model_refuses_a_file_of_a_classifier(kind, tmp_path):
    path = SOURCES["timm's BEiT"].write(tmp_path).path
    if kind == "ours":
        save_model(BEiT(**VIT, n_classes=CLASSES), path)
    unchanged(MaskedTokenModel(**VIT, n_tokens=TOKENS), path, "has no lm_head, so it predicts no tokens of patches")


@pytest.mark.parametrize("build", [
    lambda: VisionTransformer(**VIT), lambda: MaskedAutoencoder(**MAE)])
def test_other_models_refuse_a_beit_and_name_it(build, tmp_path):
    unchanged(build(), SOURCES["timm's BEiT"].write(tmp_path).path, "it is a BEiT (microsoft's and timm's names")


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm's BEiT", "timm's BEiT, shared table"])
def test_tables_of_another_grid_are_resampled_and_the_last_three_rows_stay(name, tmp_path):
    sample = SOURCES[name].write(tmp_path)
    model = BEiT(**vars(sample.model.config) | WIDE)
    report = load_checkpoint(model, sample.path)
    assert "bias tables: resampled from grids of 3x3 to 2x5 patches" in str(report)
    load_checkpoint(sample.model, sample.path)
    wanted = resize_positions(sample.model, (8, 20)).state_dict()
    tables = [key for key in wanted if key.endswith(TABLE)]
    assert len(tables) == (1 if "shared" in name else DEPTH)
    for key in tables:
        assert torch.equal(model.state_dict()[key], wanted[key])
        assert torch.equal(model.state_dict()[key][-3:], torch.load(sample.path)[key][-3:].float())
        assert len(wanted[key]) == 3 * 9 + 3
    assert load(sample.path, img_size=(8, 20)).config.img_size == (8, 20)


@torch.no_grad()
def test_offsets_that_fit_two_grids_are_read_as_told(tmp_path):
    build = dict(**VIT | dict(img_size=(4, 20)), n_classes=0)  # 1 x 5 patches have 9 offsets, as 2 x 2 patches have
    torch.save(randomised(BEiT(**build), 1).float().state_dict(), tmp_path / "m.pth")
    table = f"blocks.0.attn.{TABLE}"
    report = load_checkpoint(BEiT(**build), tmp_path / "m.pth")
    assert "positions: 9 offsets fit 1x5 or 2x2 patches; the first is used" in str(report)
    model, other = BEiT(**build), BEiT(**build)
    assert "2x2 to 1x5" in str(load_checkpoint(model, tmp_path / "m.pth", grid_size=(2, 2)))
    load_checkpoint(other, tmp_path / "m.pth", grid_size=(1, 5))
    assert not torch.equal(model.state_dict()[table], other.state_dict()[table])
    assert load(tmp_path / "m.pth").config.img_size == 8
    assert load(tmp_path / "m.pth", img_size=(4, 20)).state_dict()[table].equal(other.state_dict()[table])


def test_files_of_transformers_on_grids_that_are_not_square_are_noted(tmp_path):
    c = BEiT(**VIT | WIDE, n_classes=CLASSES, norm_eps=1e-12).config
    model = transformers.BeitForImageClassification(transformers_beit_config(c))
    model.save_pretrained(tmp_path)
    with pytest.warns(Assumption, match="transformers swaps height and width of the tables if the grid is not square"):
        assert load(tmp_path).config == BEiT(**vars(c) | dict(layer_scale=1e-5)).config
    (tmp_path / "square").mkdir()
    sample = SOURCES["transformers BEiT with head, old names"].write(tmp_path / "square")
    assert "swaps" not in str(load_checkpoint(sample.model, sample.path))


def test_load_says_that_names_do_not_show_which_beit_it_is(tmp_path):
    sample = SOURCES["timm's BEiT"].write(tmp_path)
    with pytest.warns(Assumption, match=r"mean and std 0\.5 as in its library, bicubic resizing.* expect ImageNet's"):
        model = load(sample.path)
    assert model.preprocessing.mean == (0.5,) * 3
    theirs = Beit(img_size=12, patch_size=PATCH, embed_dim=D, depth=DEPTH, num_heads=HEADS, num_classes=CLASSES,
                  use_abs_pos_emb=False, use_rel_pos_bias=True)
    theirs.pretrained_cfg = dict(architecture="beitv2_base_patch16_224", input_size=(3, 12, 12), num_classes=CLASSES,
                                 mean=IMAGENET_MEAN, std=(0.2,) * 3, interpolation="bicubic", global_pool="avg")
    save_for_hf(theirs, tmp_path / "hub", model_config=theirs.pretrained_cfg, model_args=dict(
        img_size=12, patch_size=PATCH, embed_dim=D, depth=DEPTH, num_heads=HEADS, use_abs_pos_emb=False,
        use_rel_pos_bias=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Assumption)
        model = load(tmp_path / "hub")
    assert (type(model), model.preprocessing.mean, model.preprocessing.std) == (BEiT, IMAGENET_MEAN, (0.2,) * 3)


def test_a_table_in_each_block_needs_a_model_without_a_shared_one(tmp_path):
    path = SOURCES["timm's BEiT"].write(tmp_path).path
    unchanged(BEiT(**VIT, n_classes=CLASSES, shared_bias=True), path, "build the model with shared_bias=False")


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_an_mae_of_grey_images_predicts_the_mean_of_the_colours(norm_pix_loss, tmp_path):
    colour = randomised(MaskedAutoencoder(**MAE | dict(norm_pix_loss=norm_pix_loss)), 3).float().eval()
    save_model(colour, tmp_path / "m.pt")
    with pytest.warns(Assumption, match=r"the weights for 3 channels were adapted to 1 \(summed\)"):
        grey = load(tmp_path / "m.pt", in_channels=1)
    images, noise = torch.randn(2, 1, 12, 12), torch.rand(2, 9)
    wanted = colour(images.expand(-1, 3, -1, -1), noise)[1].unflatten(2, (16, 3)).mean(dim=3)
    torch.testing.assert_close(grey(images, noise)[1], wanted, rtol=1e-4, atol=1e-4)
    with pytest.warns(Assumption, match="adapted to 5"):
        assert load(tmp_path / "m.pt", in_channels=5)(torch.randn(2, 5, 12, 12), noise)[1].shape == (2, 9, 80)


@pytest.mark.parametrize("old_names", [True, False])
def test_a_masked_beit_with_two_norms_is_refused_with_this_reason(old_names, tmp_path):
    config = MaskedTokenModel(**VIT, n_tokens=TOKENS).config
    theirs = transformers.BeitForMaskedImageModeling(transformers_beit_config(
        config, vocab_size=TOKENS, use_mask_token=True, use_mean_pooling=False))
    path, _ = write_transformers(tmp_path, theirs, old_names)
    reason = f"{path} is a BEiT for masked images with use_mean_pooling=false, which has two norms before its lm_head"
    with pytest.raises(InputError, match=one_line_with(reason)):
        load(path)
    unchanged(MaskedTokenModel(**VIT, n_tokens=TOKENS), path, reason)


@pytest.mark.parametrize("part", [r"attn\.v_bias", r"blocks\.1\.attn\.q_bias"])
def test_a_beit_without_one_of_its_biases_is_damaged(part, tmp_path):
    path = SOURCES["timm's BEiT"].write(tmp_path).path
    state = {name: tensor for name, tensor in torch.load(path).items() if not re.search(part, name)}
    torch.save(state, path)
    unchanged(BEiT(**VIT, n_classes=CLASSES), path, path)


# ---- A position for CLS alone, and two tokens


def test_a_distilled_vit_refuses_a_file_with_one_token(tmp_path):
    torch.save(VisionTransformer(**VIT, n_classes=CLASSES).state_dict(), tmp_path / "m.pth")
    unchanged(DistilledViT(**VIT, n_classes=CLASSES), tmp_path / "m.pth", "dist_token")


def test_positions_of_one_token_leave_zeros_for_a_second_and_no_patch_twice():
    positions = torch.randn(1, 10, D)
    weights = Weights("m.pth", Format("test", "", pos_cls=True), [], {"pos_embed": positions},
                      {"pos_embed": ["pos_embed"]})
    notes = _fit_positions(weights, DistilledViT(**VIT, n_classes=0), None)
    wanted = torch.cat([positions[:, :1], torch.zeros(1, 1, D), positions[:, 1:]], dim=1)
    assert torch.equal(weights.tensors["pos_embed"], wanted)
    assert notes == ["positions: the file has none for a second token, so zeros are used"]
