"""README and docs are held to what they show: Python blocks run, commands run, links resolve."""

import argparse
import functools
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_runs import make_folder
from torch import nn

import cnn_vs_vit
import examples
import train_vit
import visualizations
from vit_bridge.data.images import sample_photographs
from vit_bridge.data.loaders import get_data_loaders
from vit_bridge.weights import pretrained
from vit_model import VisionTransformer, create_vit_base, create_vit_tiny

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BRIEF = ROOT.parent / "shared" / "brief.md"
DOORS = {f"{door.__name__}.py": door for door in (train_vit, cnn_vs_vit, visualizations, examples)}


def blocks(path, language):
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands_of(page):
    """The commands of a page: the lines of its bash blocks, and inline code that begins with python or torchrun."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:python|torchrun) [^`]+)`", prose)
    lines += [" ".join(line.split()) for line in inline if "..." not in line]
    return [part.strip() for line in lines for part in line.split("#")[0].split("&&") if part.strip()]


FIRST_PAGE = {line: page for page in reversed(PAGES) for line in commands_of(page)}  # of each command
COMMANDS = [pytest.param(line, id=f"{page.stem}: {line}") for line, page in FIRST_PAGE.items()]


def fake_download(url, path):
    """Write random weights of the model that an address belongs to, under our names."""
    entry = next(entry for entry in pretrained.PUBLIC.values() if entry.url == url)
    torch.save(entry.model_class(**entry.arguments).state_dict(), path)


@pytest.fixture(scope="session")
def furnished(tmp_path_factory):
    """A folder with the files that the pages name: photographs, and finished runs on them, with and without labels."""
    folder = tmp_path_factory.mktemp("furnished")
    make_folder(folder / "photos", 40, classes=("cat", "dog"), n=6)
    shutil.copytree(folder / "photos" / "cat", folder / "more_photos")
    shutil.copytree(folder / "photos", folder / "labelled")
    for part in ("train", "test"):
        shutil.copytree(folder / "photos", folder / "CIFAR" / part)
    for photo, name in zip(sample_photographs(), ("new.jpg", "photo.jpg", "more.jpg"), strict=False):
        shutil.copy(photo, folder / name)
    train_vit.main(["--data-dir", str(folder / "photos"), "--img-size", "32", "--steps", "2", "--device", "cpu",
                    "--output-dir", str(folder / "runs" / "mine")])
    train_vit.main(["--pretrain", "mae", "--data-dir", str(folder / "photos"), "--img-size", "32", "--steps", "2",
                    "--device", "cpu", "--output-dir", str(folder / "runs" / "mae")])
    return folder


@pytest.fixture
def place(furnished, tmp_path, monkeypatch):
    """The folder in which a page's blocks and commands run. Long runs are cut short: 40 drawn images, two of them a
    batch, one step of training."""
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(pretrained, "download", fake_download)
    monkeypatch.setattr(pretrained, "_check_sum", lambda path, checksum: None)
    return tmp_path


@pytest.fixture
def short_runs(place, monkeypatch):
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
@pytest.mark.parametrize("block", [pytest.param(block, id=str(i)) for i, block in enumerate(blocks(BRIEF, "python"))])
def test_brief_block_runs(block, short_runs):
    if not torch.cuda.is_available():
        block = block.replace("'cuda'", "'cpu'")
    exec(compile(block, "brief.md", "exec"), preamble())


def test_brief_is_found_with_its_python_blocks():
    if not BRIEF.exists():
        pytest.skip("the brief lies outside the repository and is not here")
    assert len(blocks(BRIEF, "python")) >= 17


@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES if blocks(page, "python")])
def test_blocks_of_a_page_run_in_order(page, short_runs):
    names = {"__name__": "page"}
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {i}", "exec"), names)


# What is not run here, and why.
NOT_RUN = {
    "python -m pip ": "installs packages; .ci/run does",
    "pip ": "installs packages",
    "python -m pytest": "runs this test; .ci/run does",
    "PARITY_CASES=": "runs tests; .ci/run does with fewer cases",
    "ruff ": "the linter; .ci/run does",
    "jupyter ": "opens a browser; tests/lessons executes the notebook",
    "git ": "needs a network",
    "cd ": "is part of a clone",
}


class Understood(Exception):
    """A command's words were parsed."""


def parse_alone(self, argv=None, namespace=None):
    PARSE(self, argv, namespace)
    raise Understood


PARSE = argparse.ArgumentParser.parse_args


def run(line, monkeypatch):
    """Run a command of a page in this process: short ones as they stand, trainings with --dry-run; of benchmarks, the
    words are parsed."""
    words = shlex.split(line)
    words = words[2 if words[0] == "torchrun" else 1:]
    script, *words = words
    if script.startswith("benchmarks/"):
        assert (ROOT / script).exists()
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
        monkeypatch.setattr(sys, "argv", [script, *words])
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        with pytest.raises(Understood):
            importlib.import_module(Path(script).stem).main()
        return
    trains = script == "cnn_vs_vit.py" or (script == "train_vit.py" and not {*words[:1]} & {*train_vit.COMMANDS})
    if script == "train_vit.py" and "--resume" in words:
        words += ["--device", "cpu"]
    elif (trains or words == []) and not {"--dry-run", "--help"} & {*words}:
        words.append("--dry-run")
        if "--output-dir" in words:  # a new one
            shutil.rmtree(words[words.index("--output-dir") + 1], ignore_errors=True)
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            DOORS[script].main(words)
    else:
        DOORS[script].main(words)


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_command_of_a_page_runs(line, place, monkeypatch):
    if not line.startswith(tuple(NOT_RUN)):
        for given, there in (("NAME", "mine"), ("FOLDER", "photos"), ("DIR", "photos")):
            line = line.replace(given, there)
        run(line, monkeypatch)


def test_pages_show_every_door():
    lines = [line for page in PAGES for line in commands_of(page)]
    assert all(any(door in line for line in lines) for door in DOORS)


@pytest.mark.slow
def test_train_vit_dry_run_writes_nothing(tmp_path):
    """The other two do so in tests of their own."""
    done = subprocess.run([sys.executable, ROOT / "train_vit.py", "--dry-run"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "dry run" in done.stdout.lower()
    assert not list(tmp_path.iterdir())


def anchors_of(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


LINKING = [*PAGES, ROOT / "benchmarks" / "RESULTS.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in LINKING if page.exists()])
def test_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    assert "@@" not in text
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path), target


def test_python_lines_of_pages_fit_110_columns():
    for page in PAGES:
        for block in blocks(page, "python"):
            assert max(map(len, block.splitlines())) <= 110
