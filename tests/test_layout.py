import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["vit_model", "cnn_model", "checkpoint_formats", "checkpoints", "model_zoo", "drawn_shapes", "drawn_tasks",
         "augmentation", "vit_data", "recording", "measurements", "representations", "perturbations", "explanations",
         "command_line", "charts", "pictures", "explorer_page", "explorer", "attention_views", "visualizations",
         "inference", "optimizers", "trainer", "transfer", "recipes", "run_folder", "train_vit", "experiments",
         "learning", "report", "cnn_vs_vit", "exercises", "quiz", "lesson", "examples"]
# A module may import those before it.
OTHERS = {"torch", "torchvision", "numpy", "matplotlib", "tqdm", "PIL"}
OPTIONAL = {"checkpoints": {"safetensors"}, "inference": {"onnx", "onnxscript", "onnxruntime"}}  # imported where used
ENTRIES = {*(f"{module}.py" for module in ORDER), "tests", "benchmarks", "README.md", "lesson.ipynb",
           "requirements.txt", "requirements-dev.txt", "LICENSE", "pyproject.toml", ".gitignore", ".ci"}


def source_of(module):
    return (ROOT / f"{module}.py").read_text(encoding="utf-8")


def imports_of(module):
    """Every package or module that it imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source_of(module))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}.py line {node.lineno}: a relative import in a flat project"
            found.add(node.module.split(".")[0])
    return found


def test_the_top_level_holds_what_it_should_and_nothing_else():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split("/")[0] for line in listing.stdout.splitlines()} == ENTRIES


def test_the_modules_are_those_of_the_order():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ORDER)


def test_what_is_installed_is_every_module_but_the_examples():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(settings["tool"]["setuptools"]["py-modules"]) == set(ORDER) - {"examples"}


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_modules_before_it(module):
    assert imports_of(module) & set(ORDER) <= set(ORDER[:ORDER.index(module)])


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_no_other_package(module):
    allowed = {"torch"} if module == "vit_model" else OTHERS
    assert imports_of(module) - set(ORDER) - sys.stdlib_module_names <= allowed | OPTIONAL.get(module, set())


@pytest.mark.parametrize("module", ORDER)
def test_no_module_is_longer_than_700_lines(module):
    assert len(source_of(module).splitlines()) <= 700


@pytest.mark.parametrize("module", ORDER)
def test_every_module_has_its_tests(module):
    assert (ROOT / "tests" / f"test_{module}.py").is_file()


def is_guard(statement):
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("module", ORDER)
def test_importing_a_module_only_defines(module):
    docstring, *statements = ast.parse(source_of(module)).body
    assert isinstance(docstring, ast.Expr)
    for statement in statements:
        assert is_guard(statement) or isinstance(
            statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
        ), f"{module}.py line {statement.lineno}: {ast.unparse(statement)[:60]}"
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            names = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for name in map(ast.unparse, names):
                assert name.isupper() or name == "__all__", f"{module}.py line {statement.lineno}: {name}"


@pytest.mark.parametrize("module", ORDER)
def test_a_module_with_shape_comments_explains_their_letters(module):
    source = source_of(module)
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring
    if module in ("vit_model", "cnn_model") or re.search(r"# .*\(B, ", source):
        assert re.search(r"^Letters: ", docstring, re.MULTILINE)
