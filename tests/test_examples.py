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


def test_examples_lists_fourteen_demos(capsys):
    examples.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(examples.DEMOS) == 14
    assert len({line.split(maxsplit=1)[1] for line in lines}) == 14


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
    (tmp_path / "last.py").write_text(solution("windows"))
    examples.main(["exercise", "windows", "--file", "last.py"])
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
