"""The house: who may import whom, what runs at import, and that the paths anchored at the root find something."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOORS = ("vit_model", "visualizations", "train_vit", "cnn_vs_vit", "examples")
# Rooms from the ground up; a room imports from those before it and from itself.
ROOMS = (("vit_model",), ("errors", "system"), ("preprocessing", "runtime"), ("models",), ("weights",), ("data",),
         ("analysis",), ("training",), ("inference",), ("plots", "cli"), ("visualizations",), ("train_vit",),
         ("compare", "lessons"), ("cnn_vs_vit",), ("examples",))
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
PACKAGES = {"torch", "torchvision", "numpy", "matplotlib", "tqdm", "PIL"}
OPTIONAL = {"safetensors", "onnx", "onnxscript", "onnxruntime"}  # imported where they are used
FILES = sorted([*(ROOT / f"{door}.py" for door in DOORS), *(ROOT / "vit_bridge").rglob("*.py")])
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def room_of(module):
    """The room of a dotted module of ours; None for other packages."""
    first, *rest = module.split(".")
    return (rest[0] if rest else "models") if first == "vit_bridge" else first if first in DOORS else None


def own_room(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "vit_bridge" and len(parts) > 1 else parts[0]


def imports_of(path):
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} line {node.lineno}: a relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_run_downwards(path):
    if path.name == "__init__.py" and path.parent.name != "models":
        assert not path.read_text(encoding="utf-8").strip(), "only models/__init__.py names anything"
        return
    for module in imports_of(path):
        room = room_of(module)
        if room is not None:
            assert FLOOR[room] <= FLOOR[own_room(path)], f"{path.name} imports {module}, which stands above it"
            assert room not in DOORS or room != own_room(path)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_use_only_runtime_packages(path):
    roots = {module.split(".")[0] for module in imports_of(path) if room_of(module) is None}
    allowed = {"torch"} if path.stem == "vit_model" else PACKAGES | OPTIONAL
    assert roots - sys.stdlib_module_names <= allowed
    if path.stem != "__init__" and FLOOR[own_room(path)] < FLOOR["plots"]:
        assert "matplotlib" not in roots, "rooms below plots draw nothing"


def test_package_has_few_modules():
    """50; the family: relative, deit, swin, mae, beit, windows, reconstruction, tokenizer; ladder, trained, which."""
    assert len([path for path in FILES if path.stem != "__init__" and path.stem not in DOORS]) <= 61


def is_guard(statement):
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_modules_only_define_at_import(path):
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    body = ast.parse(path.read_text(encoding="utf-8")).body
    docstring = body and isinstance(body[0], ast.Expr)
    for statement in body[1 if docstring else 0:]:
        assert is_guard(statement) or isinstance(statement, allowed), f"{path.name} line {statement.lineno}"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_vit", "visualizations"])
def test_script_run_as_main_is_not_imported_again(script):
    """Run as __main__ it would be there twice, with classes that are not each other's."""
    code = f"import runpy, sys; sys.argv = ['{script}.py', '--help']\ntry:\n    runpy.run_path('{script}.py', " \
           f"run_name='__main__')\nexcept SystemExit:\n    pass\nassert '{script}' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=100)


def test_vit_model_works_alone(tmp_path):
    (tmp_path / "vit_model.py").write_text((ROOT / "vit_model.py").read_text(encoding="utf-8"), encoding="utf-8")
    code = "import sys, torch, vit_model\nmodel = vit_model.create_vit_nano(n_classes=10)\n" \
           "assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)\nassert 'vit_bridge' not in sys.modules"
    subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"],
                   cwd=tmp_path, check=True, capture_output=True, timeout=100)


def questions_of_class(path):
    """Where a file asks which model it has, or what a loader can do: (line, code)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        code = ast.unparse(node) if isinstance(node, ast.Call | ast.Attribute) else ""
        asks = code.startswith(("isinstance(model,", "hasattr(model,", "hasattr(loader,"))
        if asks or code == "type(model).__name__":
            yield node.lineno, code


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_code_asks_the_protocol_and_no_class(path):
    """Adapters know other libraries' models, and protocol.class_name names a class in messages."""
    if path.parent.name != "models" or path.stem not in ("adapters", "protocol"):
        assert not list(questions_of_class(path))


def test_questions_of_class_are_seen(tmp_path):
    path = tmp_path / "asks.py"
    path.write_text("a = isinstance(model, VisionTransformer)\nb = type(model).__name__\nc = hasattr(loader, 'to')\n")
    assert [line for line, _ in questions_of_class(path)] == [1, 2, 3]


@pytest.mark.slow
def test_wheel_holds_the_doors_and_the_package_with_its_data(tmp_path):
    pytest.importorskip("setuptools", "77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", *(f"{door}.py" for door in DOORS)):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "vit_bridge", source / "vit_bridge", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path,
                    source], check=True, capture_output=True, timeout=200)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name for name in names if "/" not in name}
    assert tops == {f"{door}.py" for door in DOORS if door != "examples"}
    for kind, wanted in (("data/samples/*.jpg", 4), ("weights/shipped/*.pt", 3), ("plots/*.html", 1)):
        shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "vit_bridge").glob(kind)}
        assert len(shipped) >= wanted
        assert shipped <= set(names)
    assert {str(path.relative_to(ROOT)) for path in FILES if path.parent != ROOT} <= set(names)
