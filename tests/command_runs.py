"""Runs of train_vit.py in this process, on a folder of small photographs, and cuts in the middle of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_vit
from train_vit import parse
from vit_bridge.cli import script
from vit_bridge.runtime import processes

ROOT = Path(__file__).parent.parent


def run(words, capsys):
    """Exit code, and what was printed as errors, of train_vit.py with these words."""
    with pytest.raises(SystemExit) as stop:
        script(lambda: train_vit.main(list(map(str, words))))
    return stop.value.code, capsys.readouterr().err


def make_folder(root, side, parts=("",), classes=("red", "blue"), n=12):
    """Two classes of twelve JPEG images each, red and blue, in every part; or other classes."""
    generator = np.random.default_rng(0)
    for part in parts:
        for channel, name in zip((0, 2) * len(classes), classes, strict=False):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = generator.integers(0, 60, (side, side, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


def train(folder, *words):
    train_vit.main([*map(str, words), "--device", "cpu", "--amp", "off", "--output-dir", str(folder)])


def prepared(*words):
    """The Run of these words, before its first step."""
    options = parse([*map(str, words), "--device", "cpu", "--steps", "1"])
    del options.given
    with processes(options.device) as device:
        return train_vit.prepare(options, device)


def tensors_in(entries, path=""):
    """The tensors in nested dicts and lists, by their place."""
    if isinstance(entries, torch.Tensor):
        return {path: entries}
    items = entries.items() if isinstance(entries, dict) else enumerate(entries) if isinstance(entries, list) else ()
    return {place: tensor for key, value in items for place, tensor in tensors_in(value, f"{path}/{key}").items()}


def at_step(monkeypatch, number, act):
    """Has act() called in the middle of the training step of this number, once."""
    step, done = train_vit.Trainer.step, []

    def acting(self, batch, n_all, state):
        if state.step == number and not done:
            done.append(True)
            act()
        step(self, batch, n_all, state)

    monkeypatch.setattr(train_vit.Trainer, "step", acting)


class PowerCut(BaseException):
    """Ends the process, as it were: nothing catches it."""


def cut():
    raise PowerCut
