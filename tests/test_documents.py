"""The documents are held to what they show: Python blocks run, commands start."""

import argparse
import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import cnn_vs_vit
import train_vit
from vit_bridge.cli import OneLineParser
from vit_bridge.data.loaders import get_data_loaders
from vit_model import VisionTransformer, create_vit_base, create_vit_nano, create_vit_tiny

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BRIEF = ROOT.parent / "shared" / "brief.md"


def blocks(path, language):
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [pytest.param(block, id=f"{path.stem}-{i}") for i, block in enumerate(found)]


@pytest.fixture
def short_runs(tmp_path, monkeypatch):
    """Long runs cut short: 40 drawn images, two of them a batch, one step of training; files go to tmp_path."""
    monkeypatch.chdir(tmp_path)
    train = train_vit.Trainer.train
    monkeypatch.setattr(train_vit.Trainer, "train", functools.partialmethod(train, n_steps=1))

    def few_images(*args, **kwargs):
        return get_data_loaders(*args, **{**kwargs, "n_images": 40, "batch_size": 2})

    monkeypatch.setattr(train_vit, "get_data_loaders", few_images)


def preamble():
    """What the brief's blocks use and leave undefined."""
    model, batch = create_vit_tiny(n_classes=10), (torch.randn(2, 3, 224, 224), torch.tensor([1, 7]))
    return dict(
        torch=torch, nn=nn, model=model, image=batch[0][:1], transformer_output=torch.randn(2, 197, 192),
        classifier=nn.Linear(192, 10), train_loader=[batch], criterion=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(model.parameters()), create_vit_base=create_vit_base,
        VisionTransformer=VisionTransformer,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the brief uses torch.cuda.amp, which torch has renamed
@pytest.mark.parametrize("block", blocks(BRIEF, "python"))
def test_brief_block_runs(block, short_runs):
    if not torch.cuda.is_available():
        block = block.replace("'cuda'", "'cpu'")
    exec(compile(block, "brief.md", "exec"), preamble())


def test_brief_is_found_with_its_python_blocks():
    if not BRIEF.exists():
        pytest.skip("the brief lies outside the repository and is not here")
    assert len(blocks(BRIEF, "python")) >= 17


@pytest.mark.slow
def test_readme_blocks_run_in_order(short_runs):
    names = {}
    found = blocks(README, "python")
    assert len(found) >= 8
    for block in found:
        exec(compile(block.values[0], f"README.md, {block.id}", "exec"), names)


SCRIPTS = ("train_vit.py", "cnn_vs_vit.py", "examples.py")


@pytest.mark.slow
def test_train_vit_dry_run_writes_nothing(tmp_path):
    """The other two do so in tests of their own."""
    done = subprocess.run([sys.executable, ROOT / "train_vit.py", "--dry-run"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "dry run" in done.stdout.lower()
    assert not list(tmp_path.iterdir())


class Understood(Exception):
    """A command's words were parsed."""


def test_readme_commands_have_arguments_the_scripts_know(monkeypatch):
    commands = [line for block in blocks(README, "bash") for line in block.values[0].splitlines()
                if line.startswith(("python ", "torchrun ")) and ".py" in line]
    assert {script for script in SCRIPTS for line in commands if script in line} == set(SCRIPTS)

    def parse_alone(self, argv=None, namespace=None):
        argparse.ArgumentParser.parse_args(self, argv, namespace)
        raise Understood

    for line in commands:
        words = shlex.split(line.split("#")[0])
        if "cnn_vs_vit.py" in words:
            cnn_vs_vit.make_parser().parse_args(words[words.index("cnn_vs_vit.py") + 1:])
        if "train_vit.py" not in words:
            continue
        words = words[words.index("train_vit.py") + 1:]
        if words and words[0] in train_vit.COMMANDS:
            with monkeypatch.context() as patch:
                patch.setattr(OneLineParser, "parse_args", parse_alone, raising=False)
                with pytest.raises(Understood):
                    train_vit.COMMANDS[words[0]](words[1:])
        else:
            train_vit.parse(words)


def test_readme_links_point_to_existing_files():
    text = README.read_text(encoding="utf-8")
    assert "@@" not in text
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_readme_python_lines_fit_110_columns():
    for block in blocks(README, "python"):
        assert max(map(len, block.values[0].splitlines())) <= 110


def test_create_vit_nano_has_the_readme_parameter_count():
    assert sum(p.numel() for p in create_vit_nano(n_classes=10).parameters()) == 459_562
