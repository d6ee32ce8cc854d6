"""The progress bar of a training: the loss so far every ten steps, and nothing if the bar is hidden."""

import pytest
from toy_training import toy_batches, toy_trainer, train_quietly

import train_vit


class Bar:
    """A stand-in for tqdm that records its updates."""

    def __init__(self, total, initial, disable, **settings):
        self.total, self.disable, self.updates, self.texts = total, disable, initial, []
        Bar.last = self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self):
        self.updates += 1

    def set_postfix_str(self, text, refresh):
        self.texts.append((self.updates, text))


@pytest.mark.parametrize("progress", [True, False])
def test_bar_tells_the_loss_every_ten_steps_if_it_is_shown(progress, monkeypatch):
    monkeypatch.setattr(train_vit, "tqdm", Bar)
    history = train_quietly(toy_trainer(), toy_batches(10), n_steps=25, progress=progress)
    assert (Bar.last.total, Bar.last.updates, Bar.last.disable) == (25, 25, not progress)
    assert [step for step, _ in Bar.last.texts] == ([10, 20] if progress else [])
    for epoch, (_, text) in enumerate(Bar.last.texts):
        assert text.startswith(f"epoch {epoch + 1}, ")
        assert f"{history['train_loss'][epoch]:.3f}" in text
        assert text.endswith(" images/s")
