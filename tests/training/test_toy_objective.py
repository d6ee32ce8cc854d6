"""An objective other than classification, defined only in this file: it trains, resumes and is saved.

Shapes:  B images in a batch.
"""

import csv

import pytest
import torch
from torch import nn
from toy_training import Call, copy_of, same, through_a_file, toy_batches, train_quietly, without_times

from train_vit import Stopped, Trainer
from vit_bridge.models.convnet import ConvNet
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.training.objectives import Classification, Objective
from vit_bridge.training.run_folder import Saver
from vit_bridge.weights.checkpoints import read_checkpoint


class MeanColour(Objective):
    """The mean colour of each image, by mean squared error."""
    columns = {"train_loss": ".4f", "val_loss": ".4f", "val_furthest": ".2f"}  # noqa: RUF012
    criterion = "val_furthest"

    def forward(self, model, batch, metrics=None):
        colours = batch[0].mean(dim=(2, 3))  # (B, 3)
        errors = (model(batch[0]) - colours).square()  # (B, 3)
        if metrics is not None:
            metrics.update(len(colours), loss=errors.mean(), furthest=errors.amax(dim=1).sqrt().mean())
        return errors.mean()


def toy_net():
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 11), nn.GELU(), nn.Dropout(0.1), nn.Linear(11, 3))


def trainer_of(seed, **settings):
    torch.manual_seed(seed)
    return Trainer(toy_net(), "cpu", MeanColour(), amp="off", **settings)


def images(n_batches, batch_size=7):
    """Return batches of images without labels."""
    return [(images,) for images, _ in toy_batches(n_batches, batch_size)]


def test_custom_objective_learns_and_has_its_own_history():
    trainer = trainer_of(0)
    history = train_quietly(trainer, images(4), images(2), n_epochs=12)
    assert tuple(history) == ("train_loss", "val_loss", "val_furthest", "lr", "seconds", "images_per_second")
    assert history["train_loss"][-1] < 0.2 * history["train_loss"][0]
    score, (shown,) = trainer.evaluate(images(1)), images(1)[0]
    errors = (trainer.model.eval()(shown) - shown.mean(dim=(2, 3))).square()
    assert score == pytest.approx(dict(loss=errors.mean().item(), furthest=errors.amax(dim=1).sqrt().mean().item()))


@pytest.mark.parametrize("settings", [{}, dict(grad_accum_steps=2, ema_decay=0.9)])
def test_custom_objective_resumes_from_anywhere_as_if_never_cut(settings):
    whole = trainer_of(0, **settings)
    calls = Call()
    history = train_quietly(whole, images(2), images(2), n_steps=5, on_batch=calls)
    for n in range(calls.count):
        cut = trainer_of(0, **settings)
        with pytest.raises(Stopped) as stop:
            train_quietly(cut, images(2), images(2), n_steps=5, on_batch=Call(n))
        saved = through_a_file(stop.value.state.state_dict())
        again = trainer_of(99, **settings)
        found = train_quietly(again, images(2), images(2), n_steps=5, resume=saved)
        assert same(copy_of(again.model), copy_of(whole.model)), n
        assert without_times(found) == without_times(history), n


def test_custom_objective_sets_the_best_epoch_and_table_columns(tmp_path, capsys):
    torch.manual_seed(0)
    model = ConvNet(8, 3, 3, (4,), (1,), 1)
    trainer = Trainer(model, "cpu", MeanColour(), amp="off")
    saver = Saver(tmp_path, model, Preprocessing(8, (0.5,) * 3, (0.5,) * 3),
                  dict(options={}, n_steps=15, validation_files=None), trainer.objective)
    history = trainer.train(images(5), images(2), n_epochs=3, learning_rate=1e-2, callbacks=[saver], progress=False)
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", *history]
    assert [float(row["val_furthest"]) for row in rows] == history["val_furthest"]
    best = min(history["val_furthest"])
    entries = read_checkpoint(tmp_path / "best.pt")
    assert (history["val_furthest"][entries["epoch"] - 1], entries["val_furthest"]) == (best, best)
    last = f"val loss {history['val_loss'][-1]:.4f} furthest {history['val_furthest'][-1]:.2f}"
    assert last in capsys.readouterr().out


def test_best_epoch_takes_no_nan():
    objective = Classification()
    assert objective.best_epoch(dict(val_acc=[0.5, 0.7, float("nan"), 0.6])) == 2
    assert objective.best_epoch(dict(val_acc=[float("nan")] * 3)) == 3
    assert objective.best_epoch(dict(val_acc=[])) == 0
