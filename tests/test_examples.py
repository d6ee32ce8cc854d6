import inspect
import re
import shlex
import subprocess
import sys

import pytest
import torch
from command_runs import ROOT

import examples
from vit_bridge.cli import script
from vit_bridge.lessons.exercises import EXERCISES, solution
from vit_model import InputError, VisionTransformer

QUICK = [name for name in examples.DEMOS if name not in examples.TRAINS]


def test_examples_lists_sixteen_demos(capsys):
    examples.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(examples.DEMOS) == 16
    assert len({line.split(maxsplit=1)[1] for line in lines}) == 16


@pytest.mark.slow
def test_examples_dry_run_prints_and_draws_each_demo(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "examples.py", "--dry-run"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    *shown, last = re.split(r"^Figure: .*\n", done.stdout, flags=re.MULTILINE)
    assert "Dry run" in last
    assert [text.split(":")[0].strip() for text in shown] == QUICK
    for name, text in zip(QUICK, shown, strict=True):
        assert "Look at:" in text, name
        assert any(character.isdigit() for character in text), name
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 5_000


def test_vit_by_hand_matches_the_model_in_60_lines():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=(6, 10), patch_size=(2, 2), n_classes=5, embed_dim=12, depth=2, n_heads=3).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    images = torch.randn(3, 3, 6, 10)
    by_hand = examples.vit_by_hand(images, model.state_dict(), patch_size=2, depth=2, n_heads=3)
    torch.testing.assert_close(by_hand, model(images), rtol=1e-5, atol=1e-5)
    assert len(inspect.getsource(examples.vit_by_hand).splitlines()) <= 60


def test_windows_by_hand_match_the_module(capsys):
    torch.manual_seed(0)
    maps = examples.windows().axes[1].images[0].get_array()  # (64, 64)
    printed = capsys.readouterr().out
    assert float(re.search(r"By hand and in the module: the largest difference is (\S+)\.\n", printed)[1]) < 1e-6
    costs = [tuple(map(int, numbers)) for numbers in re.findall(r"pixels: (\d+) GFLOPs .* tokens, (\d+)", printed)]
    assert costs[1][0] == 4 * costs[0][0]
    assert costs[1][1] > 8 * costs[0][1]
    assert ((maps > 0).sum(axis=1) == 16).all()
    assert abs(maps.sum(axis=1) - 1).max() < 1e-5


def test_shift_counts_the_tokens_that_windows_connect(capsys):
    examples.shift()
    printed = capsys.readouterr().out
    assert re.findall(r"blocks: (\d+) of 256 tokens, (\d+) rows and (\d+) columns", printed) == [
        (str(side**2), str(side), str(side)) for side in (4, 4, 8, 16)]
    assert (printed.count("#"), printed.count("o #")) == (63, 1)


def test_losses_of_a_teacher_by_hand_match_the_module(capsys):
    torch.manual_seed(0)
    examples.teacher()
    printed = capsys.readouterr().out
    found = re.findall(r"(hard|soft) loss by hand [\d.]+; the module differs by (\S+)\n", printed)
    assert [kind for kind, _ in found] == ["hard", "soft"]
    assert all(float(difference) < 1e-5 for _, difference in found)


def test_reconstruction_measures_a_model_that_does_not_see_what_is_hidden(capsys):
    torch.manual_seed(0)
    figure = examples.reconstruction()
    printed = capsys.readouterr().out
    assert "Of 64 patches, the encoder sees 16, chosen at random." in printed
    assert float(re.search(r"the difference of the losses is (\S+)\.\n", printed)[1]) < 1e-6
    assert "the prediction changes by 0.0e+00: the model does not see them." in printed
    found = re.findall(r"(\d+)% hidden: model ([\d.]+), interpolation ([\d.]+), mean colour ([\d.]+)\n", printed)
    assert [int(share) for share, *_ in found] == [25, 50, 75, 90]
    errors = [list(map(float, row)) for _, *row in found]
    assert errors[2][0] < errors[2][2]  # with as many hidden as in its training, it is better than a single colour
    shares = [re.search(r"visible: ([\d.]+)%", axes.get_title())[1] for axes in figure.axes[1::5]]
    assert shares == ["50", "25", "9.4"]


def test_tokenizer_keeps_more_with_more_tokens_and_blocks_are_hard_to_copy(capsys):
    torch.manual_seed(0)
    figure = examples.tokenizer()
    printed = capsys.readouterr().out
    found = re.findall(r"(\d+) tokens: perplexity (\S+); .* for (\d+)% .* pictures (\S+)\n", printed)
    n_tokens, perplexities, shares, errors = (list(map(float, column)) for column in zip(*found, strict=True))
    assert n_tokens == [4, 16, 64, 256]
    assert all(perplexity < n for n, perplexity in zip(n_tokens, perplexities, strict=True))
    assert perplexities == sorted(perplexities)
    assert shares == sorted(shares, reverse=True)
    assert errors == sorted(errors, reverse=True)
    same = re.search(r"(\S+) of 3,136 patches have the same nearest centre", printed)[1].replace(",", "")
    assert int(same) >= 3_130  # rounding may decide between centres that are equally near
    blocks, random = map(int, re.search(r"in (\d+)% of the cases if blocks.*\nand in (\d+)%", printed).groups())
    assert blocks + 5 < random
    redrawn, hidden = (figure.axes[i].images[0].get_array() for i in (4, 8))
    assert redrawn.shape == hidden.shape == (224, 224, 3)
    grey = (abs(hidden - 0.5) < 1e-6).all(axis=2).reshape(28, 8, 28, 8)
    assert grey.all(axis=(1, 3)).sum() == 314


@pytest.mark.parametrize(("words", "expected"), [
    (["--only", "swin"], "--only swin is unknown; --list names all demos"),
    (["--only", "head"], "--only head is unknown; did you mean heads? --list names all demos"),
    (["--output-dir", "file/figures"], "cannot create --output-dir")])
def test_examples_reports_bad_options_in_one_line(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        script(lambda: examples.main(words))
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert expected in error


# ---- Quiz and exercises


def test_exercise_is_written_then_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    examples.main(["exercise", "attention"])
    printed = capsys.readouterr().out
    assert printed.startswith("Exercise attention (medium). Scaled dot-product attention")
    assert "fill it in, then run the same command again. Add --hint for a hint." in printed
    with pytest.raises(SystemExit) as stop:
        examples.main(["exercise", "attention"])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "not filled in yet" in printed
    assert "--hint for a hint, or --solution for our solution. To start again, delete attention_exercise.py." in printed
    path = tmp_path / "attention_exercise.py"
    path.write_text(path.read_text().replace('raise NotImplementedError("fill this in")',
                                             "return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v"))
    examples.main(["exercise", "attention"])
    printed = capsys.readouterr().out
    assert "right: the values and gradients agree" in printed
    assert printed.endswith("\nNext: python examples.py exercise patch_embedding\n")
    (tmp_path / "last.py").write_text(solution("masking"))
    examples.main(["exercise", "masking", "--file", "last.py"])
    assert capsys.readouterr().out.endswith("\nThis was the last exercise.\n")


def test_exercise_shows_its_hint_and_solution_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, exercise in EXERCISES.items():
        examples.main(["exercise", name, "--hint"])
        assert " ".join(capsys.readouterr().out.split()) == f"Hint: {exercise.hint}"
        examples.main(["exercise", name, "--solution"])
        assert capsys.readouterr().out == solution(name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        examples.main(["exercise", "block", "--hint", "--solution"])
    assert stop.value.code == 2


def test_exercise_in_another_file_gives_its_own_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my work").mkdir()
    examples.main(["exercise", "block", "--file", "my work/mine.py"])
    first = (tmp_path / "my work" / "mine.py").read_text().splitlines()[0]
    command = shlex.split(first.split("then: ")[1])
    assert command == ["python", "examples.py", "exercise", "block", "--file", "my work/mine.py"]
    with pytest.raises(SystemExit):
        examples.main(command[2:])
    assert "not filled in yet" in capsys.readouterr().out
    examples.main(["exercise", "block", "--file", "./block_exercise.py"])
    assert (tmp_path / "block_exercise.py").read_text().splitlines()[0].endswith("examples.py exercise block")


def test_exercise_refuses_a_file_that_is_not_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"foo\.txt is not a Python file; choose a name that ends in \.py"):
        examples.main(["exercise", "block", "--file", "foo.txt"])
    assert not list(tmp_path.iterdir())


def test_quiz_is_asked_and_takes_no_options(monkeypatch, capsys):
    monkeypatch.setattr(examples, "ask", lambda: print("asked"))
    examples.main(["quiz"])
    assert capsys.readouterr().out == "asked\n"
    with pytest.raises(SystemExit) as stop:
        examples.main(["quiz", "--loud"])
    assert stop.value.code == 2
