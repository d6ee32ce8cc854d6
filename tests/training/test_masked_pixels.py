"""MaskedPixels: masks that are fixed in evaluations, labels that are ignored, and trainings that resume exactly."""

import copy
import re

import pytest
import torch
from toy_training import Call, copy_of, memory_loader, same, through_a_file, toy_batches, train_quietly, without_times

from train_vit import Stopped, Trainer
from vit_bridge.models import MaskedAutoencoder, VisionTransformer
from vit_bridge.models.mae import patchify
from vit_bridge.training.objectives import InPrecision, MaskedPixels
from vit_model import InputError

TINY = dict(img_size=8, patch_size=2, embed_dim=12, depth=1, n_heads=3, decoder_dim=8, decoder_depth=1, decoder_heads=2)


def trainer_of(seed, model_options=None, **settings):
    torch.manual_seed(seed)
    return Trainer(MaskedAutoencoder(**TINY | (model_options or {})), "cpu", MaskedPixels(), amp="off", **settings)


def batches_of(images, size):
    return [(part,) for part in images.split(size)]


def all_images(n_batches=4):
    return torch.cat([images for images, _ in toy_batches(n_batches)])


def seen_masks(trainer, batches):
    """The masks of an evaluation, one row for each image."""
    masks, model = [], trainer.model
    hook = model.register_forward_hook(lambda layer, inputs, output: masks.append(output[2]))
    trainer.evaluate(batches)
    hook.remove()
    return torch.cat(masks)


def test_training_lowers_both_losses_and_keeps_them_in_the_history():
    trainer = trainer_of(0)
    history = train_quietly(trainer, batches_of(all_images(), 7), batches_of(all_images(2), 7), n_epochs=25)
    assert tuple(history) == ("train_loss", "val_loss", "lr", "seconds", "images_per_second")
    assert history["train_loss"][-1] < history["train_loss"][0]
    assert history["val_loss"][-1] < 0.9 * history["val_loss"][0]
    assert trainer.objective.best_epoch(history) == 1 + min(range(25), key=history["val_loss"].__getitem__)


def test_plain_pixels_are_learned_far_better_than_their_mean():
    """The images have one colour each, but for noise of 0.1, so what is visible tells what is hidden."""
    images = all_images(8)
    trainer = trainer_of(0, dict(norm_pix_loss=False))
    history = train_quietly(trainer, batches_of(images, 7), batches_of(images, 7), n_epochs=8, learning_rate=2e-2)
    assert history["val_loss"][-1] < 0.3 * images.var(dim=(0, 2, 3)).mean()


def test_validation_loss_is_the_mean_error_of_the_hidden_patches():
    trainer, images = trainer_of(0), all_images()
    model, n = trainer.model.eval(), len(images)
    objective = trainer.objective.eval()
    noise = objective.noise(images, 0)
    with torch.no_grad():
        _, prediction, mask = model(images, noise)
    patches = patchify(images, (2, 2))
    wanted = (patches - patches.mean(dim=2, keepdim=True)) / (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()
    errors = (prediction - wanted).square().mean(dim=2)
    assert mask.sum() == n * 12
    assert trainer.evaluate(batches_of(images, 5)) == pytest.approx(dict(loss=errors[mask > 0].mean().item()), rel=1e-5)


def test_every_evaluation_uses_the_same_masks_whatever_the_batch_size():
    trainer, images = trainer_of(0), all_images()
    masks = seen_masks(trainer, batches_of(images, 7))
    assert len({tuple(row) for row in masks.tolist()}) > 20  # every image has its own
    for size in (1, 3, 28):
        torch.manual_seed(size)
        before = torch.get_rng_state()
        assert torch.equal(seen_masks(trainer, batches_of(images, size)), masks)
        assert torch.equal(torch.get_rng_state(), before)
    other = trainer_of(1, dict(depth=2))
    assert torch.equal(seen_masks(other, batches_of(images, 4)), masks)


def test_trainings_draw_a_new_mask_in_every_step():
    masks, trainer = [], trainer_of(0)
    trainer.model.register_forward_hook(lambda layer, inputs, output: masks.append(output[2]))
    train_quietly(trainer, batches_of(all_images(1), 7), n_steps=5)
    assert len({tuple(row) for mask in masks for row in mask.tolist()}) > 30
    again, found = trainer_of(0), []
    again.model.register_forward_hook(lambda layer, inputs, output: found.append(output[2]))
    train_quietly(again, batches_of(all_images(1), 7), n_steps=5)
    assert torch.equal(torch.stack(found), torch.stack(masks))


def test_parts_of_a_batch_hide_what_the_whole_batch_hides():
    """On the CPU; elsewhere they do not, and Trainer.batch_split_warning says so."""
    found = {}
    for n in (1, 3):
        trainer, masks = trainer_of(0, grad_accum_steps=n), []
        trainer.model.register_forward_hook(lambda layer, inputs, output, masks=masks: masks.append(output[2]))
        history = train_quietly(trainer, batches_of(all_images(2), 7), n_epochs=2)
        found[n] = torch.cat(masks), history["train_loss"]
    assert torch.equal(found[1][0], found[3][0])
    assert found[1][1] == pytest.approx(found[3][1], rel=1e-4)


def test_labels_are_ignored_in_every_form():
    plain = [images for images, _ in toy_batches()]
    forms = [[(images,) for images in plain], plain, toy_batches(),
             [dict(pixel_values=images, labels=torch.zeros(7)) for images in plain],
             [dict(image=images) for images in plain],
             [(images, torch.full((7, 2), -1.0)) for images in plain],
             [(images, torch.arange(7), torch.arange(7)) for images in plain]]
    histories = [without_times(train_quietly(trainer_of(0), batches, batches, n_epochs=2)) for batches in forms]
    assert all(history == histories[0] for history in histories)


def test_images_in_memory_are_learned_with_the_loaders_labels():
    history = train_quietly(trainer_of(0), memory_loader(20, 6, True), memory_loader(9, 6), n_epochs=2)
    assert len(history["val_loss"]) == 2


@pytest.mark.parametrize("settings", [{}, dict(grad_accum_steps=2, ema_decay=0.9, optimizer="muon")])
def test_masked_pixels_resume_from_anywhere_as_if_never_cut(settings):
    images, val = batches_of(all_images(2), 7), batches_of(all_images(1), 4)
    whole = trainer_of(0, **settings)
    calls = Call()
    history = train_quietly(whole, images, val, n_steps=3, on_batch=calls)
    for n in range(calls.count):
        cut = trainer_of(0, **settings)
        with pytest.raises(Stopped) as stop:
            train_quietly(cut, images, val, n_steps=3, on_batch=Call(n))
        saved = through_a_file(stop.value.state.state_dict())
        again = trainer_of(99, **settings)
        found = train_quietly(again, images, val, n_steps=3, resume=saved)
        assert same(copy_of(again.model), copy_of(whole.model)), n
        assert without_times(found) == without_times(history), n


def test_masked_pixels_train_at_growing_sizes():
    trainer = trainer_of(0)
    trainer.model.any_size = True
    history = train_quietly(trainer, batches_of(all_images(), 7), n_epochs=3, progressive_resize=(0.5, 0.5))
    assert all(loss > 0 for loss in history["train_loss"])


def test_weights_in_bfloat16_do_not_change_the_masks():
    trainer, images = trainer_of(0, dict(patch_size=1)), torch.randn(100, 3, 8, 8)
    model, objective = trainer.model.bfloat16(), trainer.objective.eval()
    forward = InPrecision(model, torch.device("cpu"), None, torch.bfloat16)
    noise = objective.noise(images, 0)
    assert torch.equal(forward(images, noise)[2], copy.deepcopy(model).float()(images, noise)[2])


def test_masked_pixels_refuse_other_models_and_bad_images_in_one_line():
    vit = VisionTransformer(img_size=8, patch_size=2, embed_dim=12, depth=1, n_heads=3, n_classes=3)
    for model in (vit, torch.nn.Linear(2, 2)):
        words = f"a {type(model).__name__} hides no patches; for MaskedPixels expected a MaskedAutoencoder"
        with pytest.raises(InputError, match=rf"\A{re.escape(words)}[^\n]*\Z"):
            Trainer(model, "cpu", MaskedPixels())
    for images, words in ((torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "the images of a batch are uint8"),
                          (torch.randn(2, 8, 8, 3), "the images of a batch have the shape (2, 8, 8, 3)"),
                          (torch.randn(2, 3, 8, 10), "got images of 8x10 pixels, expected 8x8")):
        with pytest.raises(InputError, match=rf"\A{re.escape(words)}[^\n]*\Z"):
            train_quietly(trainer_of(0), [(images, torch.zeros(2))], n_steps=1)
        with pytest.raises(InputError, match=rf"\A{re.escape(words)}[^\n]*\Z"):
            trainer_of(0).evaluate([images])
