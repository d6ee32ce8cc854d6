"""Values that a file does not record: read from files in its folder, given, or assumed with a warning."""

import json
import re
import shutil
import sys
import warnings

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.models import save_for_hf

import train_vit
import visualizations
from vit_bridge.cli import script
from vit_bridge.errors import Assumption
from vit_bridge.models.adapters import adapt
from vit_bridge.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from vit_bridge.weights.checkpoints import describe_checkpoint, load, load_checkpoint, save_model
from vit_model import InputError, VisionTransformer, resample_positions

NAMES = ["owl", "fox", "hare"]
HF = dict(image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
          id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
TIMM = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=4, num_classes=3)
OURS = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, n_heads=4, n_classes=3)


def randomised(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def said(run, *arguments, **options):
    """Return (the result, the warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(*arguments, **options)
    assert {warning.category for warning in caught} <= {Assumption}
    assert not [warning for warning in caught if "\n" in str(warning.message)]
    return result, [str(warning.message) for warning in caught]


def images_of(size=(16, 16), n_channels=3):
    return torch.randn(3, n_channels, *size, generator=torch.Generator().manual_seed(7))


def edited(path, **changes):
    """Change entries of a JSON file; `...` removes an entry."""
    entries = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in entries.items() if value is not ...}))


# ---- Folders of transformers


def of_vit(folder, **settings):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**{**HF, **settings}, intermediate_size=36))
    randomised(model).save_pretrained(folder)
    return model


@pytest.mark.parametrize("what", ["folder", "file", "copy as of torch.save"])
def test_load_reads_transformers_config_where_it_lies(what, tmp_path):
    theirs = of_vit(tmp_path, layer_norm_eps=1e-3)
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], resample=3,
                                   size=dict(height=16, width=16)).save_pretrained(tmp_path)
    path = tmp_path if what == "folder" else tmp_path / "model.safetensors"
    if what.startswith("copy"):
        path = tmp_path / "copy.pth"
        torch.save(theirs.state_dict(), path)
    model, assumed = said(load, path)
    assert len(assumed) == 1
    assert assumed[0].endswith("stretches images to 16x16 pixels; here, images keep their proportions and are "
                               "centre-cropped")
    assert (model.config.n_heads, model.config.norm_eps, model.config.pool) == (4, 1e-3, "cls")
    torch.testing.assert_close(model(images_of()), theirs(images_of()).logits)
    assert model.preprocessing == Preprocessing(16, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bicubic", NAMES)
    described = describe_checkpoint(path)
    assert (described.config, described.preprocessing) == (model.config, model.preprocessing)
    assert (described.report.heads, described.report.assumed) == ("", ())
    assert "3 classes: owl, fox, hare" in str(described)


def test_load_opens_a_folder_of_shards(tmp_path):
    theirs = of_vit(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 1
    model = said(load, tmp_path / "shards")[0]
    torch.testing.assert_close(model(images_of()), theirs(images_of()).logits)
    files[0].unlink()
    with pytest.raises(InputError, match=rf"\Athere is no file {re.escape(str(files[0]))}[^\n]*\Z"):
        load(tmp_path / "shards")


@pytest.mark.parametrize("map_", [{}, {"a": "../a.safetensors"}, {"a": 3}, []], ids=str)
def test_load_refuses_an_index_that_is_none(map_, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map_}))
    with pytest.raises(InputError, match=r"\A[^\n]*model\.safetensors\.index\.json[^\n]*\Z"):
        load(tmp_path)


def test_load_opens_a_folder_of_dinov2_and_says_that_its_head_is_dropped(tmp_path):
    config = transformers.Dinov2Config(**HF, mlp_ratio=2)
    theirs = randomised(transformers.Dinov2ForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    model, assumed = said(load, tmp_path)
    assert (model.config.n_heads, model.config.n_classes) == (4, 0)
    tokens = theirs.dinov2(images_of()).last_hidden_state
    torch.testing.assert_close(model.forward_features(images_of()), tokens)
    assert model.preprocessing == Preprocessing(16, IMAGENET_MEAN, IMAGENET_STD, "bicubic")
    assert len(assumed) == 1
    assert "head: the file's head was dropped, because it reads 48 features, but the model has 24" in assumed[0]
    assert "ImageNet's mean and std" in assumed[0]


def test_load_opens_a_folder_of_deit(tmp_path):
    theirs = randomised(transformers.DeiTForImageClassification(transformers.DeiTConfig(**HF, intermediate_size=36)))
    theirs.save_pretrained(tmp_path)
    model, assumed = said(load, tmp_path)
    torch.testing.assert_close(model(images_of()), theirs(images_of()).logits)
    assert model.preprocessing == Preprocessing(16, IMAGENET_MEAN, IMAGENET_STD, "bicubic", NAMES)
    assert assumed == [f"{tmp_path / 'model.safetensors'}: not recorded, so assumed: ImageNet's mean and std, bicubic "
                       f"resizing; to change this, use a preprocessor_config.json in the same folder"]


def test_load_takes_a_rectangle_from_the_config(tmp_path):
    theirs = of_vit(tmp_path, image_size=(8, 24))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        model = said(load, path)[0]
        assert model.config.img_size == model.preprocessing.img_size == (8, 24)
        torch.testing.assert_close(model(images_of((8, 24))), theirs(images_of((8, 24))).logits)


def test_load_takes_no_stand_ins_for_names_of_classes(tmp_path):
    of_vit(tmp_path, id2label={i: f"LABEL_{i}" for i in range(3)})
    assert said(load, tmp_path)[0].preprocessing.class_names is None


@pytest.mark.parametrize(("options", "mean", "std"), [
    (dict(do_rescale=False), 0.1 / 255, 0.2 / 255), (dict(rescale_factor=1 / 127.5), 0.05, 0.1),
    (dict(do_normalize=False), 0.0, 1.0)], ids=str)
def test_load_translates_what_an_image_processor_does(options, mean, std, tmp_path):
    """The processor's own result on a uint8 image is the same as ours."""
    of_vit(tmp_path)
    processor = transformers.ViTImageProcessor(image_mean=[0.1] * 3, image_std=[0.2] * 3,
                                               size=dict(height=16, width=16), **options)
    processor.save_pretrained(tmp_path)
    shown = said(load, tmp_path)[0].preprocessing
    np.testing.assert_allclose([shown.mean, shown.std], [[mean] * 3, [std] * 3], rtol=1e-6)
    picture = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    theirs = processor(picture, return_tensors="pt").pixel_values
    torch.testing.assert_close(shown.normalise(picture), theirs, rtol=1e-4, atol=1e-4)


# ---- Folders of timm


@pytest.mark.parametrize(("pool", "settings"), [
    ("token", dict(img_size=32)), ("avg", dict(img_size=32)), ("token", dict(img_size=(16, 48))),
    ("avg", dict(img_size=32, reg_tokens=2))], ids=str)
def test_load_reads_timms_folder(pool, settings, tmp_path):
    theirs = randomised(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3, global_pool=pool, **settings))
    save_for_hf(theirs, tmp_path, model_config=dict(label_names=NAMES), model_args=dict(
        **settings, depth=1, num_classes=3, global_pool=pool))
    model, assumed = said(load, tmp_path)
    assert assumed == []
    assert (model.config.n_heads, model.config.pool) == (3, dict(token="cls", avg="mean")[pool])
    images = images_of(model.patch_embed.img_size)
    torch.testing.assert_close(model(images), theirs(images))
    assert model.preprocessing == Preprocessing(model.config.img_size, (0.5,) * 3, (0.5,) * 3, "bicubic", NAMES)


def test_load_tells_heads_by_model_args_before_the_name(tmp_path):
    settings = dict(img_size=32, embed_dim=96, num_heads=12, depth=1, num_classes=3)
    theirs = randomised(timm.create_model("vit_base_patch16_224", **settings))
    save_for_hf(theirs, tmp_path, model_args=settings)
    model, assumed = said(load, tmp_path)
    assert (model.config.n_heads, assumed) == (12, [])
    torch.testing.assert_close(model(images_of((32, 32))), theirs(images_of((32, 32))))


# ---- Configurations that are another's, or wrong


@pytest.mark.parametrize("content", [
    '{"options": {}, "n_steps": 3, "n_images": 5, "class_names": ["a"], "model": "vit_nano"}', "[1, 2]", "{}", '"vit"'])
def test_load_does_not_misread_another_config(content, tmp_path):
    torch.save(VisionTransformer(**OURS).state_dict(), tmp_path / "m.pth")
    without, assumed = said(load, tmp_path / "m.pth")
    (tmp_path / "config.json").write_text(content)
    model, again = said(load, tmp_path / "m.pth")
    assert (model.config, again) == (without.config, assumed)


@pytest.mark.parametrize("content", [
    '{"name": "app", "architecture": "x86"}', '{"model_type": 7, "num_attention_heads": 8}', '{"num_heads": 8}'])
def test_load_says_that_a_config_of_no_known_kind_is_not_taken(content, tmp_path):
    torch.save(VisionTransformer(**OURS).state_dict(), tmp_path / "m.pth")
    without, (assumed,) = said(load, tmp_path / "m.pth")
    (tmp_path / "config.json").write_text(content)
    model, again = said(load, tmp_path / "m.pth")
    assert model.config == without.config
    assert again == [f"{assumed}; config.json in the same folder is ignored: it has neither a model_type, as in "
                     f"transformers, nor an architecture, as in timm"]


def test_load_says_that_a_config_is_damaged_or_of_another_library(tmp_path):
    torch.save(VisionTransformer(**OURS).state_dict(), tmp_path / "m.pth")
    (tmp_path / "config.json").write_text('{"model_type": "vit", ')
    assert "config.json in the same folder is ignored: it cannot be read" in said(load, tmp_path / "m.pth")[1][0]
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="vit", num_attention_heads=12)))
    model, assumed = said(load, tmp_path / "m.pth")
    assert model.config.n_heads == 1
    assert "config.json in the same folder is ignored: it is from transformers" in assumed[0]


def test_load_keeps_to_our_files_own_word(tmp_path):
    model = randomised(VisionTransformer(**OURS))
    save_model(model, tmp_path / "best.pt", Preprocessing(16, class_names=NAMES))
    (tmp_path / "config.json").write_text(json.dumps(dict(architecture="vit_base_patch16_224", num_classes=5)))
    loaded, assumed = said(load, tmp_path / "best.pt")
    assert (loaded.config, assumed) == (model.config, [])
    with pytest.raises(InputError, match=r"is the folder of a run; use [^\n]*best\.pt\Z"):
        load(tmp_path)


@pytest.mark.parametrize(("changes", "words"), [
    (dict(num_attention_heads=5), "the 5 heads"), (dict(num_attention_heads="four"), "num_attention_heads='four'"),
    (dict(hidden_size=48), "embed_dim=48"), (dict(num_hidden_layers=3), "depth=3"),
    (dict(patch_size=8), "patch_size=8"), (dict(image_size=32), "img_size=32"), (dict(num_channels=1), "in_channels=1"),
    (dict(intermediate_size=40), "mlp_ratio"), (dict(id2label={"0": "a", "1": "b"}), "n_classes=2"),
    (dict(hidden_act="gelu_new"), "specifies 'gelu_new', but VisionTransformer uses 'gelu'"),
    (dict(model_type="swin"), "'swin'")], ids=str)
def test_load_refuses_a_config_that_contradicts_the_tensors(changes, words, tmp_path):
    of_vit(tmp_path)
    edited(tmp_path / "config.json", **changes)
    for run in (load, describe_checkpoint):
        with pytest.raises(InputError, match=rf"\A[^\n]*{re.escape(words)}[^\n]*\Z") as caught:
            run(tmp_path / "model.safetensors")
        assert "config.json" in str(caught.value)


@pytest.mark.parametrize(("changes", "words"), [
    (dict(global_pool="map"), "global_pool='map'"), (dict(global_pool="avg"), None),
    (dict(global_pool="avg", model_args=dict(global_pool="token")), "'token' in its model_args"),
    (dict(num_classes=7), "n_classes=7"), (dict(label_names=["a"]), "lists 1 class names"),
    (dict(architecture="vit_base_patch16_224"), "embed_dim=768"),
    (dict(architecture="vit_tiny_patch16_quickgelu_224"), "exact GELU")], ids=str)
def test_load_refuses_timms_config_where_it_is_wrong(changes, words, tmp_path):
    settings = dict(img_size=32, depth=1, num_classes=3)
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **settings), tmp_path, model_args=settings)
    edited(tmp_path / "config.json", **changes)
    if words is None:  # a mean without fc_norm has the same tensors
        edited(tmp_path / "config.json", model_args=settings)
        assert load(tmp_path).config.pool == "mean"
        return
    with pytest.raises(InputError, match=rf"\A[^\n]*{re.escape(words)}[^\n]*\Z"):
        load(tmp_path)


def bare_timm(folder, architecture="vit_tiny_patch16_224", **entries):
    """Write a timm ViT of width 192 with a config.json of these entries."""
    theirs = randomised(timm.models.VisionTransformer(**{**TIMM, "embed_dim": 192, "num_heads": 3, "reg_tokens": 2}))
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    entries = dict(architecture=architecture, num_classes=3, global_pool="token") | entries
    (folder / "config.json").write_text(json.dumps(entries))
    return theirs


@pytest.mark.parametrize(("arguments", "words"), [
    (dict(pool_include_prefix=True, reg_tokens=2), "pool_include_prefix=True, but VisionTransformer has False"),
    (dict(norm_layer="rmsnorm"), "norm_layer='rmsnorm', but VisionTransformer has 'layernorm'"),
    (dict(norm_eps=1e-5), "norm_eps=1e-05"), (dict(class_token=False), "class_token=False"),
    (dict(output_stride=8), "output_stride=8, but VisionTransformer has 32"),
    (dict(aa_layer="blurpool"), "aa_layer='blurpool', but VisionTransformer has none"),
    (dict(global_pool="avg"), "global_pool='token', but 'avg' in its model_args")], ids=str)
def test_load_refuses_arguments_of_timm_that_it_does_not_hold(arguments, words, tmp_path):
    bare_timm(tmp_path, model_args=dict(img_size=16, patch_size=4) | arguments)
    for run in (load, describe_checkpoint):
        with pytest.raises(InputError, match=rf"\A[^\n]*config\.json specifies {re.escape(words)}[^\n]*\Z"):
            run(tmp_path)


def test_load_says_which_arguments_of_timm_were_not_taken(tmp_path):
    theirs = bare_timm(tmp_path, model_args=dict(img_size=16, patch_size=4, norm_layer="LayerNorm", drop_rate=0.1,
                                                 pool_include_prefix=False, some_new_thing=[3]))
    model, assumed = said(load, tmp_path)
    assert "config.json in the same folder specifies some_new_thing=[3] in its model_args" in assumed[0]
    assert not [name for name in ("norm_layer", "norm_eps", "drop_rate", "prefix") if name in assumed[0]]
    torch.testing.assert_close(model(images_of()), theirs(images_of()))


@pytest.mark.parametrize(("architecture", "known"), [
    ("vit_tiny_patch16_224", True), ("my_vit", False), ("beit3_tiny", False), ("vit_tiny_patch16_clip_224", False)])
def test_an_architecture_tells_the_norms_only_where_it_is_known(architecture, known, tmp_path):
    bare_timm(tmp_path, architecture)
    assert ("norm_eps=1e-06" in str(said(load, tmp_path)[1])) != known


def test_load_checkpoint_holds_a_model_to_the_config(tmp_path):
    theirs = of_vit(tmp_path)
    right = dict(OURS, mlp_ratio=1.5, norm_eps=1e-12)
    model = VisionTransformer(**right)
    _, assumed = said(load_checkpoint, model, tmp_path)
    assert assumed == []
    torch.testing.assert_close(model.eval()(images_of()), theirs(images_of()).logits)
    for wrong, words in ((dict(n_heads=3), "n_heads is 4 in the file, but 3 in the model"),
                         (dict(pool="mean"), "its head expects pool='cls', but the model has pool='mean'")):
        with pytest.raises(InputError, match=words):
            load_checkpoint(VisionTransformer(**right | wrong), tmp_path)
    _, assumed = said(load_checkpoint, VisionTransformer(**right | dict(norm_eps=1e-6)), tmp_path)
    assert "norm_eps=1e-12 to match" in assumed[0]


# ---- What is assumed, and given


def test_load_says_what_a_bare_file_leaves_open_in_one_line(tmp_path):
    torch.save(timm.models.VisionTransformer(**{**TIMM, "embed_dim": 192, "num_heads": 12}).state_dict(),
               tmp_path / "twelve.pth")
    model, assumed = said(load, tmp_path / "twelve.pth")
    assert model.config.n_heads == 3
    assert assumed == [
        f"{tmp_path / 'twelve.pth'}: not recorded, so assumed: n_heads=3 (64 channels each), pool='cls', "
        f"norm_eps=1e-06, img_size=16 (a square of 4x4 patches), ImageNet's mean and std, bilinear resizing; to "
        f"change this, use load's n_heads=, pool=, norm_eps=, img_size= or --n-heads or a config.json in the same "
        f"folder"]
    described = str(describe_checkpoint(tmp_path / "twelve.pth"))
    for words in ("3 is a guess", "pool='cls'", "norm_eps=1e-06", "a square of 4x4 patches", "ImageNet's mean and std"):
        assert words in described
    given = dict(n_heads=12, pool="mean", norm_eps=1e-5)
    model, assumed = said(load, tmp_path / "twelve.pth", **given)
    assert {name: getattr(model.config, name) for name in given} == given
    assert not [name for name in ("heads", "pool", "assumed: norm_eps") if name in assumed[0]]
    assert describe_checkpoint(tmp_path / "twelve.pth", **given).config == model.config


def test_n_heads_makes_a_bare_file_compute_what_it_did(tmp_path):
    theirs = randomised(timm.models.VisionTransformer(**TIMM))
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    torch.testing.assert_close(load(tmp_path / "m.pth", n_heads=4)(images_of()), theirs(images_of()))
    assert not torch.allclose(load(tmp_path / "m.pth")(images_of()), theirs(images_of()))
    with pytest.raises(InputError, match=r"\Athe width 24 of [^\n]* is not divisible by the 5 heads[^\n]*\Z"):
        load(tmp_path / "m.pth", n_heads=5)


def test_n_heads_cannot_overrule_what_is_recorded(tmp_path):
    of_vit(tmp_path)
    assert load(tmp_path, n_heads=4).config.n_heads == 4
    for run in (load, describe_checkpoint):
        with pytest.raises(InputError, match=r"\An_heads=6 does not match [^\n]*, which has 4[^\n]*\Z"):
            run(tmp_path, n_heads=6)


def test_load_checkpoint_says_that_heads_are_not_known(tmp_path):
    torch.save(VisionTransformer(**OURS).state_dict(), tmp_path / "m.pth")
    _, assumed = said(load_checkpoint, VisionTransformer(**OURS), tmp_path / "m.pth")
    assert assumed == [f"{tmp_path / 'm.pth'}: heads: the file does not record their number; the model's 4 are "
                       f"correct only if the weights were trained with 4"]


def test_load_says_that_our_own_file_has_no_normalisation(tmp_path):
    save_model(VisionTransformer(**OURS), tmp_path / "m.pt")
    model, assumed = said(load, tmp_path / "m.pt")
    assert (model.preprocessing, len(assumed)) == (None, 1)
    assert "ImageNet's mean and std" in assumed[0]
    assert "to change this, use save_model(model, path, preprocessing)" in assumed[0]


@pytest.mark.parametrize(("n_channels", "words"), [
    (3, "assumed: ImageNet's mean and std"), (1, "assumed: mean 0 and std 1"), (4, "assumed: mean 0 and std 1")])
def test_load_says_the_normalisation_that_is_used(n_channels, words, tmp_path):
    save_model(VisionTransformer(**OURS, in_channels=n_channels), tmp_path / "m.pt")
    model, assumed = said(load, tmp_path / "m.pt")
    assert words in assumed[0]
    assert (adapt(model).preprocessing.mean == IMAGENET_MEAN) == (n_channels == 3)
    for wanted in {1, 3} - {n_channels}:  # what is assumed of the file's own channels
        for n_classes in (None, 3):
            other, again = said(load, tmp_path / "m.pt", in_channels=wanted, n_classes=n_classes)
            assert words in again[0]
            assert adapt(other).preprocessing == adapt(model).preprocessing.with_channels(wanted)


def test_load_normalises_by_format(tmp_path):
    """A file on its own: transformers' ViT is normalised by 0.5, as adapt does in memory."""
    theirs = of_vit(tmp_path / "folder")
    path = shutil.copy(tmp_path / "folder" / "model.safetensors", tmp_path)
    model, assumed = said(load, path)
    shown = adapt(theirs).preprocessing
    assert (model.preprocessing.mean, model.preprocessing.std) == (shown.mean, shown.std) == ((0.5,) * 3, (0.5,) * 3)
    assert "mean and std 0.5" in assumed[0]
    assert "pool" not in assumed[0]


def test_load_takes_the_given_size_as_the_grid_of_a_rectangle(tmp_path):
    theirs = randomised(timm.models.VisionTransformer(**{**TIMM, "img_size": (8, 24)}))
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"\A[^\n]*13 positions[^\n]*load\(\.\.\., img_size=\(height, width\)[^\n]*\Z"):
        load(tmp_path / "m.pth")
    for size in ((8, 24), [8, 24]):
        model, assumed = said(load, tmp_path / "m.pth", img_size=size, n_heads=4)
        assert model.config.img_size == model.preprocessing.img_size == (8, 24)
        assert "square" not in assumed[0]
        torch.testing.assert_close(model(images_of((8, 24))), theirs(images_of((8, 24))))
    with pytest.raises(InputError, match="13 positions, which do not fit the grid 4x4"):
        load(tmp_path / "m.pth", img_size=16)


@pytest.mark.parametrize("size", [(24, 40), (16, 32), (16, 64)])
def test_load_takes_the_given_size_where_the_positions_make_a_square_too(size, tmp_path):
    """3 x 5 patches with CLS have as many positions as 4 x 4 without; 2 x 8 as many as 4 x 4."""
    theirs = randomised(timm.models.VisionTransformer(**{**TIMM, "img_size": size, "patch_size": 8}))
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    model, assumed = said(load, tmp_path / "m.pth", img_size=size, n_heads=4)
    torch.testing.assert_close(model(images_of(size)), theirs(images_of(size)))
    assert "the first is used" in assumed[0]
    assert "img_size=" not in assumed[0]
    assert "img_size= or" in said(load, tmp_path / "m.pth")[1][0]


def test_load_resamples_a_square_to_a_given_size(tmp_path):
    theirs = timm.models.VisionTransformer(**TIMM)
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    model, assumed = said(load, tmp_path / "m.pth", img_size=24)
    square, grid = theirs.pos_embed.detach(), model.patch_embed.grid_size
    assert torch.equal(model.pos_embed, resample_positions(square, (4, 4), grid))
    assert "img_size=16 (a square of 4x4 patches)" in assumed[0]


# ---- Every command says it


def run_command(main, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["command.py"])
    code = 0
    try:
        script(lambda: main([*map(str, arguments)]))
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Write a file of timm and an image."""
    folder = tmp_path_factory.mktemp("bare")
    torch.save(timm.models.VisionTransformer(**TIMM).state_dict(), folder / "m.pth")
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    return folder / "m.pth", folder / "a.png"


COMMANDS = {
    "predict": (train_vit.main, lambda file, picture: ["predict", "--checkpoint", file, picture]),
    "evaluate": (train_vit.main, lambda file, picture: ["evaluate", "--checkpoint", file, "--dataset", "nowhere"]),
    "export": (train_vit.main, lambda file, picture: ["export", "--checkpoint", file, "--output", file / "x"]),
    "train": (train_vit.main, lambda file, picture: ["--pretrained", file, "--dataset", "nowhere"]),
    "look": (visualizations.main, lambda file, picture: [picture, "--pretrained", file, "--output-dir",
                                                         file.parent / "look"]),
    "selfcheck": (visualizations.main, lambda file, picture: ["selfcheck", "--pretrained", file, picture]),
    "explore": (visualizations.main, lambda file, picture: ["explore", "--pretrained", file, "--output",
                                                            file.parent / "x.html", picture]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_assumes_of_a_file(name, bare, monkeypatch, capsys):
    main, words = COMMANDS[name]
    _, _, err = run_command(main, monkeypatch, capsys, *words(*bare))
    assert err.count("not recorded, so assumed: n_heads=1 (24 channels each)") == 1
    _, _, err = run_command(main, monkeypatch, capsys, *words(*bare), "--n-heads", 4)
    assert "assumed: pool='cls'" in err
    assert "n_heads" not in err


def test_inspect_takes_n_heads(bare, monkeypatch, capsys):
    assert "n_heads=4" in run_command(train_vit.main, monkeypatch, capsys, "inspect", bare[0], "--n-heads", 4)[1]
    code, _, err = run_command(train_vit.main, monkeypatch, capsys, "--n-heads", 4)
    assert (code, err.count("\n")) == (2, 1)
    assert "--n-heads 4 is for the file of --pretrained" in err
