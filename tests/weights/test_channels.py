"""Weights for colour images in a model with other channels."""

import pytest
import timm
import torch
from timm.models import adapt_input_conv

from vit_bridge.errors import Assumption
from vit_bridge.models.convnet import ConvNet
from vit_bridge.models.hybrid import HybridCNNViT
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.weights.checkpoints import adapt_input_channels, describe_checkpoint, load, load_checkpoint, save_model
from vit_model import InputError, VisionTransformer

SHOWN = Preprocessing(8, (0.1, 0.2, 0.6), (0.2, 0.3, 0.4), class_names=["a", "b", "c"])
MODELS = {"ViT": (VisionTransformer, dict(img_size=8, patch_size=4, embed_dim=12, depth=1, n_heads=3, n_classes=3)),
          "hybrid": (HybridCNNViT, dict(img_size=8, patch_size=4, embed_dim=12, depth=1, n_heads=3, n_classes=3)),
          "ConvNet": (ConvNet, dict(img_size=8, widths=(3, 5), depths=(1, 1), stem_stride=1, n_classes=3))}


@pytest.mark.parametrize("n_channels", [1, 2, 3, 5, 6, 7])
def test_adapt_input_channels_equals_timms(n_channels):
    torch.manual_seed(3)
    weight = torch.randn(5, 3, 2, 2)
    torch.testing.assert_close(adapt_input_channels(weight, n_channels), adapt_input_conv(n_channels, weight))


def test_adapt_input_channels_does_not_look_at_transparency():
    weight = torch.randn(5, 3, 2, 2)
    assert torch.equal(adapt_input_channels(weight, 4), torch.cat([weight, torch.zeros(5, 1, 2, 2)], dim=1))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_load_sees_a_grey_image_as_the_same_in_every_colour(name, tmp_path):
    model_class, arguments = MODELS[name]
    torch.manual_seed(3)
    model = model_class(**arguments).eval()
    save_model(model, tmp_path / "m.pt", SHOWN)
    with pytest.warns(Assumption, match=r"channels: the weights for 3 channels were adapted to 1 \(summed\)"):
        grey = load(tmp_path / "m.pt", in_channels=1)
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(grey(images), model(images.expand(-1, 3, -1, -1)))
    assert grey.config.in_channels == 1
    [mean], [std] = grey.preprocessing.mean, grey.preprocessing.std
    assert (mean, std) == (pytest.approx(0.3), pytest.approx(0.3))
    assert grey.preprocessing.class_names == ["a", "b", "c"]
    other = model_class(**arguments, in_channels=1).eval()
    with pytest.warns(Assumption, match="adapted to 1"):
        report = load_checkpoint(other, tmp_path / "m.pt")
    assert any("adapted to 1" in note for note in report.notes)
    torch.testing.assert_close(other(images), grey(images))


@pytest.mark.parametrize("name", MODELS)
def test_load_repeats_the_colours_for_more_channels(name, tmp_path):
    model_class, arguments = MODELS[name]
    save_model(model_class(**arguments), tmp_path / "m.pt", SHOWN)
    with pytest.warns(Assumption, match=r"adapted to 5 \(repeated in turn, times 3/5\)"):
        model = load(tmp_path / "m.pt", in_channels=5)
    assert model.preprocessing.mean == (0.1, 0.2, 0.6, 0.1, 0.2)
    assert model.preprocessing.std == (0.2, 0.3, 0.4, 0.2, 0.3)
    assert model(torch.zeros(1, 5, 8, 8)).shape == (1, 3)
    save_model(model, tmp_path / "five.pt")
    assert load(tmp_path / "five.pt").config == model.config


def test_load_gives_a_grey_file_of_timm_a_grey_normalisation(tmp_path):
    theirs = timm.models.VisionTransformer(img_size=8, patch_size=4, in_chans=1, embed_dim=64, depth=1, num_heads=1,
                                           num_classes=3).eval()
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    with pytest.warns(Assumption):
        model = load(tmp_path / "m.pth")
    assert (model.config.in_channels, len(model.preprocessing.mean), len(model.preprocessing.std)) == (1, 1, 1)
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model(images), theirs(images))
    assert describe_checkpoint(tmp_path / "m.pth").preprocessing == model.preprocessing


def test_load_refuses_another_first_layer_that_depends_on_the_channels(tmp_path):
    save_model(ConvNet(img_size=16, widths=(3, 5), depths=(1, 1), stem_stride=1, n_classes=3, block="pooled"),
               tmp_path / "m.pt", SHOWN)
    with pytest.raises(InputError, match=r"\A[^\n]*m\.pt is for a different architecture: stem\.0\.weight[^\n]*\Z"):
        load(tmp_path / "m.pt", in_channels=1)
