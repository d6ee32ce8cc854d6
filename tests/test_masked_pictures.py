"""Pictures of models that hide patches: their numbers, the command that draws them, and what they refuse."""

import re

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

import visualizations
from vit_bridge.analysis.reconstruction import reconstruction_errors, reconstructions
from vit_bridge.cli import script
from vit_bridge.data.images import sample_photographs
from vit_bridge.models import MaskedAutoencoder, MaskedTokenModel, VisionTransformer
from vit_bridge.models.beit import block_mask
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.training.tokenizer import PatchTokenizer
from vit_bridge.weights.checkpoints import save_model
from vit_model import InputError

VIT = dict(img_size=(24, 32), patch_size=4, embed_dim=12, depth=1, n_heads=3)
DECODER = dict(decoder_dim=8, decoder_depth=1, decoder_heads=2)


def mae(n_channels=3, **options):
    """A model with random weights, which predicts more than zeros."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(**VIT | DECODER | dict(in_channels=n_channels) | options)
    model.preprocessing = Preprocessing((24, 32), (0.4,) * n_channels, (0.25,) * n_channels)
    return model


def images_of(n=2, n_channels=3):
    return torch.randn(n, n_channels, 24, 32, generator=torch.Generator().manual_seed(1))


def titles_of(figure):
    return [axes.get_title() for axes in figure.axes]


def numbers_in(titles):
    """{name: numbers} of titles such as "the model: 0.0123", one for each row."""
    found = {}
    for name, number in (title.split(": ") for title in titles if re.search(r": \d\.\d{4}$", title)):
        found.setdefault(name.removeprefix("the "), []).append(float(number))
    return found


# ---- Reconstructions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_channels", [1, 3, 4])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstructions_change_only_hidden_pixels_and_errors_are_theirs(n_channels, norm_pix_loss):
    model, images = mae(n_channels, norm_pix_loss=norm_pix_loss).train(), images_of(3, n_channels)
    found = reconstructions(model, images, 0.6, seed=4)
    assert model.training
    assert found.hidden.sum(dim=(1, 2)).tolist() == [(48 - int(48 * 0.4)) * 16] * 3
    assert list(found.filled) == ["model", "interpolation", "mean colour"] + ["borrowed mean"] * norm_pix_loss
    errors = reconstruction_errors(model, images, 0.6, seed=4)
    for name, filled in found.filled.items():
        assert torch.equal(filled[~found.hidden[:, None].expand_as(images)],
                           images[~found.hidden[:, None].expand_as(images)])
        wrong = [(0.25 * (filled[i, :, y, x] - images[i, :, y, x])).square().mean().item()
                 for i, y, x in found.hidden.nonzero().tolist()]
        assert errors[name] == pytest.approx(np.mean(wrong), rel=1e-4)
    again = reconstructions(model, images[1:2], 0.6, seed=4)
    assert torch.equal(again.hidden[0], found.hidden[0])  # the first image has the first mask
    assert not torch.equal(found.hidden[1], found.hidden[0])


def test_a_borrowed_mean_is_that_of_the_true_patch():
    model, images = mae(), images_of()
    found = reconstructions(model, images, 0.5)
    for i, y, x in found.hidden.nonzero().tolist()[::37]:
        patch = images[i, :, y // 4 * 4:y // 4 * 4 + 4, x // 4 * 4:x // 4 * 4 + 4]
        assert found.filled["borrowed mean"][i, :, y, x].tolist() == pytest.approx([patch.mean().item()] * 3, abs=1e-5)


def test_weights_in_bfloat16_hide_the_same_patches():
    found = [reconstructions(mae().to(dtype), images_of(), 0.5).hidden for dtype in (torch.float32, torch.bfloat16)]
    assert torch.equal(*found)


@pytest.mark.parametrize("ratio", [0, 0.0, 1, 1.0, -0.5, 2])
def test_a_ratio_that_hides_nothing_or_everything_is_refused(ratio):
    for call in (lambda: reconstructions(mae(), images_of(), ratio),
                 lambda: visualizations.visualize_reconstruction(mae(), images_of(), mask_ratios=[ratio])):
        with pytest.raises(InputError, match=rf"\Amask_ratio {re.escape(repr(ratio))} must lie between 0 [^\n]*\Z"):
            call()


# ---- The figure of reconstructions ------------------------------------------------------------------------


def test_figure_shows_a_row_for_each_image_and_ratio_with_the_errors_of_the_same_masks():
    model, images = mae(), images_of(2)
    figure = visualizations.visualize_reconstruction(model, images, mask_ratios=(0.5, 0.75), seed=3)
    titles = titles_of(figure)
    assert len(titles) == 2 * 2 * 6
    assert [title for title in titles if title.startswith("visible")] == ["visible: 50%", "visible: 25%"] * 2
    shown = numbers_in(titles)
    for place, ratio in enumerate((0.5, 0.75)):
        for name, error in reconstruction_errors(model, images, ratio, 3).items():
            assert np.mean(shown[name][place::2]) == pytest.approx(error, abs=1e-4)
    assert "pixels from 0 to 1" in figure.get_suptitle()
    assert "borrow the mean and the contrast" in figure.get_supxlabel()
    plt.close(figure)


def test_figure_of_plain_pixels_borrows_nothing_and_takes_a_wrapped_model():
    model = mae(norm_pix_loss=False)
    figure = visualizations.visualize_reconstruction(torch.nn.DataParallel(model), images_of(1))
    assert len(figure.axes) == 5
    assert figure.get_supxlabel() == ""
    assert "visible: 25%" in titles_of(figure)
    plt.close(figure)


def test_hidden_patches_stand_out_in_a_grey_image_and_without_preprocessing():
    model = mae(1)
    model.preprocessing = None
    figure = visualizations.visualize_reconstruction(model, images_of(1, 1))
    pictures = {axes.get_title().split(":")[0]: axes.get_images()[0].get_array() for axes in figure.axes}
    coloured = np.ptp(pictures["visible"], axis=2) > 0.1
    assert coloured.sum() == 36 * 16
    assert np.ptp(pictures["the model"], axis=2).max() < 1e-6
    assert "normalised pixels" in figure.get_suptitle()
    plt.close(figure)


# ---- The figure of tokens ---------------------------------------------------------------------------------


def tokens_of(n_channels=3):
    torch.manual_seed(0)
    images = images_of(4, n_channels)
    model = MaskedTokenModel(**VIT, in_channels=n_channels, n_tokens=5)
    model.preprocessing = Preprocessing((24, 32), (0.4,) * n_channels, (0.25,) * n_channels)
    return model, PatchTokenizer(5, 4, n_channels).fit(images), images[:2]


@pytest.mark.parametrize("n_channels", [1, 3])
def test_figure_of_tokens_counts_the_right_ones_and_draws_them(n_channels):
    model, tokenizer, images = tokens_of(n_channels)
    figure = visualizations.visualize_tokens(model, tokenizer, images, ratio=0.5, seed=2)
    assert len(figure.axes) == 2 * 4
    generator = torch.Generator().manual_seed(2)
    mask = torch.stack([block_mask((6, 8), 24, generator).flatten() for _ in images])
    with torch.no_grad():
        right = (model.eval()(images, mask).argmax(dim=2) == tokenizer(images))[mask].view(2, -1).float().mean(dim=1)
    assert [float(title.split()[1].rstrip("%")) for title in titles_of(figure) if title.startswith("predicted")] == \
        pytest.approx((100 * right).tolist(), abs=0.5)
    drawn = figure.axes[2].get_images()[0].get_array()  # all tokens of the first image
    patch = tokenizer.pictures[tokenizer(images)[0, 9]] * 0.25 + 0.4  # at row 1, column 1 of 8
    assert np.allclose(drawn[4:8, 4:8], patch.clamp(0, 1).permute(1, 2, 0).expand(4, 4, 3), atol=1e-5)
    plt.close(figure)


@pytest.mark.parametrize(("change", "words"), [
    (dict(ratio=0), "ratio 0 must lie between 0"), (dict(ratio=1.0), "ratio 1.0 must lie between 0"),
    (dict(tokenizer=PatchTokenizer(6, 4)), "a MaskedTokenModel that predicts 5 tokens does not fit a tokenizer of 6"),
    (dict(model=mae()), "a MaskedAutoencoder that predicts 0 tokens does not fit")])
def test_figure_of_tokens_refuses_what_does_not_fit_in_one_line(change, words):
    model, tokenizer, images = tokens_of()
    with pytest.raises(InputError, match=rf"\A{re.escape(words)}[^\n]*\Z"):
        visualizations.visualize_tokens(**dict(model=model, tokenizer=tokenizer, images=images) | change)


# ---- python visualizations.py reconstruct -----------------------------------------------------------------


def run(capsys, *words):
    """Exit code, and what was printed and said as errors."""
    code = 0
    try:
        script(lambda: visualizations.main(["reconstruct", *map(str, words)]))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_command_draws_photographs_and_prints_the_errors_of_the_figure(tmp_path, capsys):
    photos, model = sample_photographs()[:2], mae()
    save_model(model, tmp_path / "best.pt")
    code, out, _ = run(capsys, *photos, "--checkpoint", tmp_path / "best.pt", "--output", tmp_path / "r.png",
                       "--mask-ratios", 0.5, 0.9, "--seed", 6)
    assert code == 0
    inputs = visualizations.prepare_images(photos, model)
    assert inputs.shape == (2, 3, 24, 32)
    for line, ratio in zip(out.splitlines(), (0.5, 0.9), strict=False):
        assert line == f"{ratio:.0%} hidden, mean squared error of hidden pixels from 0 to 1: " + "; ".join(
            f"{name} {error:.4f}" for name, error in reconstruction_errors(model, inputs, ratio, 6).items())
    assert out.splitlines()[2:] == [f"Written: {tmp_path / 'r.png'}"]
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.width > 1500


@pytest.mark.parametrize(("words", "expected"), [
    (["--mask-ratios", "1.5"], "argument --mask-ratios: 1.5 is out of range"),
    (["--mask-ratios", "0.5", "0"], "mask_ratio 0.0 must lie between 0 (hide no patch) and 1 (hide all patches)"),
    (["--mask-ratios", "0.99"], "mask_ratio 0.99 leaves 0 of 48 patches visible"),
    (["--output", "absent/r.png"], "cannot save the figure as 'absent/r.png'"),
    (["--checkpoint", "vit.pt"], "a VisionTransformer reconstructs nothing, because it has no decoder"),
    (["--checkpoint", "beit.pt"], "a MaskedTokenModel reconstructs nothing, because it has no decoder"),
    (["--checkpoint", "absent.pt"], "there is no file absent.pt"), (["absent.jpg"], "absent.jpg")])
def test_command_refuses_in_one_line(words, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(mae(), "best.pt")
    save_model(tokens_of()[0], "beit.pt")
    save_model(VisionTransformer(**VIT, n_classes=2), "vit.pt", Preprocessing((24, 32)))
    code, _, error = run(capsys, sample_photographs()[0], "--checkpoint", "best.pt", *words)
    assert code == 2
    assert expected in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))
