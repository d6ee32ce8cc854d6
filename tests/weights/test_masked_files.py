"""Files of MAE and BEiT: each library's own model, with random weights, opens and gives the same numbers.

The papers' code is not a package, so its files are written here, with its names, from the weights of a library's model.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers
from parity_checks import randomised, relative_difference, renamed
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.models.beit import Beit, checkpoint_filter_fn

from vit_bridge.errors import Assumption
from vit_bridge.models import BEiT, MaskedAutoencoder, MaskedTokenModel
from vit_bridge.models.beit import block_mask
from vit_bridge.preprocessing import IMAGENET_MEAN
from vit_bridge.weights.checkpoints import describe_checkpoint, load, load_checkpoint, save_model
from vit_bridge.weights.formats import PRETRAINING_PARTS
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
    return Sample(path, names, ours, mae_numbers(theirs, ours),
                  guessed={} if old_names else dict(n_heads=HEADS, decoder_heads=2, norm_pix_loss=ours.config.norm_pix_loss))


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


@dataclass(frozen=True)
class Source:
    """What a format is checked against, and a function that writes its file, as a Sample."""
    against: str
    write: Callable


def case(against, write, *positional, **options):
    return Source(against, lambda folder: write(folder, *positional, **options))


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
