"""benchmarks/mutants.py: the changes that a source allows, drawn by seed, one at a time."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "benchmarks" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("source", "breaks"), [
    ("a <= b", ["a < b"]),
    ("(a) not in (b)", ["(a) in (b)"]),
    ("a < b < c", ["a <= b < c", "a < b <= c"]),
    ("(a + b) * c", ["(a - b) * c", "(a + b) / c"]),
    ("a ** b", []),
    ("x = not (a or b) and c", ["x = (a or b) and c", "x = not (a and b) and c", "x = not (a or b) or c"]),
    ("x = max(a)", ["x = min(a)"]),
    ("é = 0; f(é, 0.5)", ["é = 1; f(é, 0.5)", "é = 0; f(é, 1.0)", "é = 0; pass"]),
    ("def f(a: int = 1, *, b=True, c=None):\n    \"\"\"1 < 2\"\"\"\n    x = f\"{1 < 2}\"", [
        "def f(a: int = 2, *, b=True, c=None):\n    \"\"\"1 < 2\"\"\"\n    x = f\"{1 < 2}\"",
        "def f(a: int = 1, *, b=False, c=None):\n    \"\"\"1 < 2\"\"\"\n    x = f\"{1 < 2}\""]),
    ("a.b = c", ["pass"]), ("a = c", []), ("a += c", ["pass"]), ("raise A(\n1 < 2)", ["pass"])])
def test_places_are_all_single_changes(source, breaks, mutants):
    made = [mutants.broken(source, *change) for _, *change in mutants.Places(source).found]
    assert sorted(made) == sorted(breaks)


def test_places_of_named_classes_are_inside_them(mutants):
    source = "class A:\n    a = 1\n\nclass B:\n    b = 2\n"
    ((kind, *change),) = mutants.Places(source, ["B"]).found
    assert (kind, mutants.broken(source, *change)) == ("constant", source.replace("2", "3"))


def test_mutants_are_drawn_by_seed_from_all_rooms_and_still_parse(mutants):
    places = mutants.all_places(ROOT)
    assert {file.split("/")[1] if "/" in file else file for own in places.values() for file, *_ in own} == {
        *mutants.ROOMS, "train_vit.py"}
    drawn = mutants.draw_breaks(places, 30, 0)
    assert drawn == mutants.draw_breaks(places, 30, 0) != mutants.draw_breaks(places, 30, 1)
    assert len({tuple(own[1:]) for own in drawn}) == 30
    assert len({kind for kind, *_ in drawn}) == 8
    for _, file, *change in drawn:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert ast.dump(ast.parse(mutants.broken(source, *change))) != ast.dump(ast.parse(source))


def test_measure_changes_tests_and_restores_the_file(mutants, tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 1\ny = 2\nz = 3\n")
    seen = []
    monkeypatch.setattr(mutants, "who_sees", lambda file, root: seen.append(
        (root / file).read_text()) or ("test_x" if "x = 2" in seen[-1] else None))
    monkeypatch.setattr(mutants, "EQUIVALENT", {("a.py", "z = 4"): "z is read by nobody"})
    breaks = [("constant", "a.py", start, start + 1, text) for start, text in ((4, "2"), (10, "3"), (16, "4"))]
    rows = mutants.measure(tmp_path, breaks, lambda line: None)
    assert seen == ["x = 2\ny = 2\nz = 3\n", "x = 1\ny = 3\nz = 3\n", "x = 1\ny = 2\nz = 4\n"]
    assert [(row["line"], row["outcome"], row["by"]) for row in rows] == [
        (1, "killed", "test_x"), (2, "survived", None), (3, "equivalent", "z is read by nobody")]
    assert rows[0]["diff"] == ["-x = 1", "+x = 2"]
    assert (tmp_path / "a.py").read_text() == "x = 1\ny = 2\nz = 3\n"


def test_stages_begin_with_the_modules_own_tests(mutants):
    own, naming, everything, slow = mutants.stages_of("vit_bridge/weights/formats.py", ROOT)
    assert own == ["tests/weights/test_formats.py"]
    assert "tests/weights/test_checkpoints.py" in naming
    assert everything == ["tests"]
    assert slow == ["-m", "slow", *own, *naming]
    assert mutants.stages_of("train_vit.py", ROOT)[0] == ["tests/training/test_trainer.py",
                                                          "tests/training/test_trainer_resume.py"]
