"""Damaged files and other files: each is refused in one line, executes nothing and changes no model."""

import argparse
import ast
import io
import os
import pickle
import re
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vit_bridge.preprocessing import Preprocessing
from vit_bridge.weights import files
from vit_bridge.weights.checkpoints import describe_checkpoint, load, load_checkpoint, save_model
from vit_model import InputError, VisionTransformer

ROOT = Path(__file__).parents[2]
MODULES = sorted([*ROOT.glob("*.py"), *(ROOT / "vit_bridge").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
VIT = dict(n_classes=3, img_size=(10, 15), patch_size=5, embed_dim=12, depth=2, n_heads=3)
SQUARE = {**VIT, "img_size": 15}


def randomised(arguments, seed=5):
    """Return a model in eval mode whose state dict is random."""
    torch.manual_seed(seed)
    model = VisionTransformer(**arguments).eval()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) * 7)
    return model


def one_line_with(text):
    return rf"\A[^\n]*{re.escape(str(text))}[^\n]*\Z"


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_bits(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


# ---- Files that are not checkpoints of ours


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def torch_bytes(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the bytes of a complete checkpoint of a small model."""
    path = tmp_path_factory.mktemp("whole") / "m.pt"
    save_model(randomised(VIT), path, Preprocessing((10, 15), [0.5], [0.25], class_names=["a", "b", "c"]))
    return path.read_bytes()


def refuse(path, contents=None):
    """Check that all ways of loading refuse the file in one line with its path and change nothing."""
    if contents is not None:
        path.write_bytes(contents)
    model = randomised(VIT)
    before = bits(model)
    for read in (load, lambda path: load_checkpoint(model, path)):
        with pytest.raises(InputError, match=one_line_with(path)):
            read(path)
    assert same_bits(model, before)


def test_load_refuses_a_missing_file_and_a_folder(tmp_path):
    refuse(tmp_path / "none.pt")
    refuse(tmp_path)


@pytest.mark.parametrize("contents", [
    b"", b"\x80", b"accuracy 0.93\n", b"{}", bytes(1000), "Größe\n".encode("latin-1"), b"PK\x03\x04",
    b"\x80\x02}q\x00.", b"a0", b"0", b"\x80\x02R", b"\x8e", b"\x89PNG\r\n\x1a\n" + bytes(64),
    torch_bytes([1, 2]), torch_bytes("text"), torch_bytes({}),
    torch_bytes(nn.Linear(2, 3).state_dict()),
    torch_bytes({"format": "vit-bridge 0"}), torch_bytes({"format": "vit-bridge 1"}), pickle.dumps([1, 2], 2)],
    ids=lambda contents: f"{len(contents)} bytes")
def test_load_refuses_files_of_another_kind(contents, tmp_path):
    refuse(tmp_path / "m.pt", contents)


def test_load_refuses_random_bytes(tmp_path):
    generator = torch.Generator().manual_seed(7)
    for n in range(71):
        contents = bytes(torch.randint(256, (n,), generator=generator).tolist())
        refuse(tmp_path / "m.pt", contents if n % 2 else b"\x80\x02" + contents)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_load_refuses_a_truncated_checkpoint(share, whole, tmp_path):
    refuse(tmp_path / "m.pt", whole[:int(share * len(whole))])


def test_load_accepts_or_cleanly_refuses_a_damaged_byte(whole, tmp_path):
    start, generator = whole.index(b"data.pkl"), torch.Generator().manual_seed(7)
    for place in (start + torch.randint(2500, (61,), generator=generator)).tolist():
        (tmp_path / "m.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 7]) + whole[place + 1:])
        for read in (load, lambda path: load_checkpoint(VisionTransformer(**VIT), path)):
            try:
                read(tmp_path / "m.pt")
            except InputError as error:
                assert "\n" not in str(error) or "weights_only=False" in str(error)  # noqa: PT017


@pytest.mark.parametrize("wrap", [
    lambda trap: pickle.dumps(trap, 2), torch_bytes,
    lambda trap: torch_bytes({"format": "vit-bridge 1", "x": trap}),
    lambda trap: torch_bytes(trap, _use_new_zipfile_serialization=False)],
    ids=["pickle", "torch.save", "checkpoint", "torch.save as of old"])
def test_load_does_not_execute_code_in_a_file(wrap, tmp_path):
    trap = tmp_path / "sprung"
    refuse(tmp_path / "m.pt", wrap(Trap(trap)))
    assert not trap.exists()
    with suppress(RuntimeError):  # for the bare pickle, after the trap
        torch.load(tmp_path / "m.pt", weights_only=False)
    assert trap.exists()  # so the trap was live


@dataclass
class Settings:
    """A class of a training script, an instance of which its author stored in a file."""
    lr: float


OBJECTS = {"path": Path("runs"), "defaultdict": defaultdict(list, loss=[1.0]), "settings": Settings(0.1),
           "generator": np.random.default_rng(3), "array of objects": np.array([{1: 2}, "x"], dtype=object)}


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("around", [lambda s, x: {"model": s, "x": x}, lambda s, x: {**s, "x": x},
                                    lambda s, x: {"epoch": 3, "state_dict": s, "x": x}],
                         ids=["model", "among the tensors", "state_dict"])
def test_load_prints_three_lines_that_save_the_weights_beside_an_object(name, around, tmp_path):
    """The lines run as they are, and the file that they write can be loaded."""
    state, path = bits(randomised(SQUARE)), tmp_path / "m.pt"
    torch.save(around(state, OBJECTS[name]), path)
    with pytest.raises(InputError) as caught:
        load(path)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{path} holds Python objects (")
    assert len(lines) == 3
    exec("\n".join(line.strip() for line in lines), {})
    model = VisionTransformer(**SQUARE)
    load_checkpoint(model, tmp_path / "m-weights.pt")
    assert same_bits(model, state)


def test_load_prints_three_lines_for_a_whole_pickled_model(tmp_path):
    model = randomised(SQUARE)
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"holds Python objects \(vit_model\.VisionTransformer\)") as caught:
        load(tmp_path / "m.pt")
    exec("\n".join(line.strip() for line in str(caught.value).splitlines()[1:]), {})
    other = VisionTransformer(**SQUARE)
    load_checkpoint(other, tmp_path / "m-weights.pt")
    assert same_bits(other, bits(model))


NUMBERS = dict(float64=np.float64(0.93), float32=np.float32(0.93), int64=np.int64(7), bool=np.bool_(True),
               dtype=np.dtype("float32"), array=np.arange(3.0), text=np.array(["cat", "dog"]),
               date=np.datetime64("2026-01-01"), random_state=np.random.get_state())


@pytest.mark.parametrize("options", [{}, dict(_use_new_zipfile_serialization=False)], ids=["zip", "as of old"])
@pytest.mark.parametrize("name", NUMBERS)
def test_load_takes_numpys_numbers_beside_the_weights(name, options, tmp_path):
    model = randomised(SQUARE)
    torch.save({"model": bits(model), "best_acc": NUMBERS[name]}, tmp_path / "m.pt", **options)
    assert same_bits(load(tmp_path / "m.pt", n_heads=3), bits(model))
    np.testing.assert_equal(files.read_file(tmp_path / "m.pt")["best_acc"], NUMBERS[name])


def test_load_takes_numpys_numbers_under_their_names_of_version_1(tmp_path):
    model = randomised(SQUARE)
    torch.save({"model": bits(model), "best_acc": np.float64(0.93)}, tmp_path / "m.pt",
               _use_new_zipfile_serialization=False)
    content = (tmp_path / "m.pt").read_bytes()
    assert b"numpy._core.multiarray" in content
    (tmp_path / "m.pt").write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert files.read_file(tmp_path / "m.pt")["best_acc"] == 0.93


def test_load_takes_no_objects_in_numpys_arrays(tmp_path):
    trap = np.empty(1, dtype=object)
    trap[0] = Trap(tmp_path / "sprung")
    refuse(tmp_path / "m.pt", torch_bytes({"model": bits(randomised(VIT)), "x": trap}))
    assert not (tmp_path / "sprung").exists()


def test_load_does_not_advise_to_open_a_file_whose_data_hide_a_call(tmp_path):
    for data in (np.empty(1, dtype=object), Path("runs")):
        torch.save({"model": bits(randomised(VIT)), "x": data, "y": Trap(tmp_path / "sprung")}, tmp_path / "m.pt")
        with pytest.raises(InputError, match=r"\A[^\n]*get the weights from another source\Z"):
            load(tmp_path / "m.pt")


def test_weights_only_scan_sees_the_modules_that_load():
    """A scan of the wrong folder would find nothing and pass."""
    assert any("torch.load(" in path.read_text(encoding="utf-8") for path in MODULES)
    assert {"train_vit", "checkpoints", "results"} <= {path.stem for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_load_is_always_called_with_weights_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("torch", "pickle"):
            assert not {name.name for name in node.names} & {"load", "loads", "Unpickler"}
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
            assert ast.unparse(node.func) == "torch.load"
            assert {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only") == "True"


def changed(whole, **changes):
    """Return the checkpoint with entries changed; `...` removes an entry."""
    entries = {**torch.load(io.BytesIO(whole), weights_only=True), **changes}
    return torch_bytes({key: value for key, value in entries.items() if value is not ...})


@pytest.mark.parametrize("form", [..., "vit-bridge 2", ["vit-bridge 1"]], ids=str)
def test_load_refuses_another_format_that_load_checkpoint_takes(form, whole, tmp_path):
    (tmp_path / "m.pt").write_bytes(changed(whole, format=form))
    with pytest.raises(InputError, match=one_line_with(tmp_path / "m.pt")):
        load(tmp_path / "m.pt")
    model = VisionTransformer(**VIT)
    assert load_checkpoint(model, tmp_path / "m.pt").notes[0] == "the weights are under state_dict"
    assert same_bits(model, bits(randomised(VIT)))


@pytest.mark.parametrize("key", ["model_class", "config", "state_dict", "img_size", "class_names", "mean", "std"])
def test_load_refuses_a_missing_entry(key, whole, tmp_path):
    refuse(tmp_path / "m.pt", changed(whole, **{key: ...}))


@pytest.mark.parametrize("change", [
    dict(model_class="VisionTransformer2"), dict(model_class="nn.Linear"),
    dict(model_class=["VisionTransformer"]), dict(model_class=None),
    dict(config=None), dict(config=[1]), dict(config=dict(VIT, heads=3)), dict(config=dict(VIT, embed_dim=-12)),
    dict(config=dict(VIT, patch_size=(5, 5, 5))), dict(config=dict(VIT, depth=7)), dict(config={5: 5}),
    dict(state_dict=None), dict(state_dict=[1]), dict(state_dict={}), dict(state_dict={5: 5})], ids=str)
def test_load_refuses_an_impossible_entry(change, whole, tmp_path):
    refuse(tmp_path / "m.pt", changed(whole, **change))


@pytest.mark.parametrize("change", [
    {"blocks.7.extra": torch.zeros(2)}, {5: torch.zeros(2)}, {"head.bias": torch.zeros(5)}, {"head.bias": 3},
    {"cls_token": [1.0] * 12}, {"norm.weight": None}, {"norm.weight": torch.zeros(1)}], ids=str)
def test_load_refuses_weights_that_do_not_fit(change, whole, tmp_path):
    state = torch.load(io.BytesIO(whole), weights_only=True)["state_dict"]
    refuse(tmp_path / "m.pt", changed(whole, state_dict={**state, **change}))


def test_load_refuses_a_missing_tensor(whole, tmp_path):
    state = torch.load(io.BytesIO(whole), weights_only=True)["state_dict"]
    del state["blocks.1.norm2.bias"]
    refuse(tmp_path / "m.pt", changed(whole, state_dict=state))


# ---- Damaged checkpoints of any kind


def renamed(state):
    """Return the same weights under the names of transformers."""
    names = [("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("cls_token", "embeddings.cls_token"),
             ("pos_embed", "embeddings.position_embeddings"), ("norm1", "layernorm_before"),
             ("norm2", "layernorm_after"), ("attn.proj", "attention.o_proj"), ("blocks.", "layers.")]
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^norm\.", "layernorm.", re.sub(r"^head\.", "classifier.", name))
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        parts = zip("qkv", tensor.chunk(3), strict=True) if ".qkv." in name else [("", tensor)]
        renamed |= {name.replace("attn.qkv", f"attention.{part}_proj"): value.clone() for part, value in parts}
    return renamed


def google(state):
    """Return the weights under Google's names, with only dense kernels transposed."""
    arrays = {"cls": state["cls_token"], "Transformer/posembed_input/pos_embedding": state["pos_embed"],
              "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0), "head/bias": state["head.bias"],
              "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": state["blocks.0.mlp.fc1.weight"].T,
              "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel": torch.ones(3, 4, 12)}
    return {name: array.numpy() for name, array in arrays.items()}


def cut(contents, share):
    return contents[:int(share * len(contents))]


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def torch_file(change):
    """Write a changed state dict."""
    return lambda path, state: torch.save(change(state), path)


def written_then_cut(write, share):
    def damage(path, state):
        write(path, state)
        path.write_bytes(cut(path.read_bytes(), share))
    return damage


def bad_header(path, state):
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:8] + b"[" + path.read_bytes()[9:])


def holding_itself(*names):
    entries = {}
    entries |= {name: entries for name in names}
    return entries


def with_npz(name, array):
    return lambda path, state: np.savez(path, **{**google(state), name: array})


INFINITE = torch.full((12,), torch.inf)
OUT = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel"
QKV, FC2, K_PROJ = "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "layers.1.attention.k_proj.weight"
DAMAGES = {
    "missing.pt": lambda path, state: None,
    "folder": lambda path, state: path.mkdir(),
    "empty.pt": lambda path, state: path.touch(),
    "text.pt": lambda path, state: path.write_text("accuracy 0.93\n"),
    "text.safetensors": lambda path, state: path.write_text("accuracy 0.93\n"),
    "random.pt": lambda path, state: path.write_bytes(torch.randint(256, (5000,), dtype=torch.uint8).numpy().tobytes()),
    **{f"zip cut at {share}.pt": written_then_cut(lambda path, state: torch.save(state, path), share)
       for share in (0.01, 0.3, 0.7, 0.99)},
    "pickle.pt": lambda path, state: path.write_bytes(pickle.dumps(Trap(path.parent / "sprung"), 2)),
    "code among the tensors.pt": lambda path, state: torch.save({**state, "x": Trap(path.parent / "sprung")}, path),
    "code in a wrapper.pt": lambda path, state: torch.save({"model": state, "x": Trap(path.parent / "sprung")}, path),
    "wrong shape.pt": torch_file(lambda s: {**s, "norm.weight": torch.zeros(13)}),
    "missing key.pt": torch_file(without("blocks.1.norm2.bias")),
    "extra key.pt": torch_file(lambda s: {**s, "blocks.1.extra": torch.zeros(5)}),
    "extra block.pt": torch_file(lambda s: {**s, "blocks.7.norm1.weight": torch.zeros(12)}),
    "transposed.pt": torch_file(lambda s: {**s, FC2: s[FC2].T.contiguous()}),
    "transposed patches.pt": torch_file(lambda s: {**s, "patch_embed.proj.weight": torch.ones(12, 5, 5, 3)}),
    "flat patches.pt": torch_file(lambda s: {**s, "patch_embed.proj.weight": torch.ones(12, 75)}),
    "flat qkv.pt": torch_file(lambda s: {**s, QKV: s[QKV].flatten()}),
    "number as a weight.pt": torch_file(lambda s: {**s, QKV: torch.tensor(5.0)}),
    "NaN.pt": torch_file(lambda s: {**s, "norm.bias": torch.tensor([1.0] * 11 + [torch.nan])}),
    "infinite.pt": torch_file(lambda s: {**s, "norm.bias": INFINITE}),
    "infinite half.pt": torch_file(lambda s: {**s, "norm.bias": INFINITE.half()}),
    "quantised.pt": torch_file(lambda s: {**s, QKV: s[QKV].to(torch.int8)}),
    "quantised positions.pt": torch_file(lambda s: {**s, "pos_embed": s["pos_embed"].to(torch.uint8)}),
    "quantised by torch.pt": torch_file(
        lambda s: {**s, QKV: torch.quantize_per_tensor(s[QKV], 0.1, 0, torch.qint8)}),
    "complex.pt": torch_file(lambda s: {**s, QKV: s[QKV].to(torch.complex64)}),
    "sparse.pt": torch_file(lambda s: {**s, QKV: s[QKV].to_sparse()}),
    "no data.pt": torch_file(lambda s: {**s, QKV: s[QKV].to("meta")}),
    "number among the tensors.pt": torch_file(lambda s: {**s, "epoch": 7}),
    "None among the tensors.pt": torch_file(lambda s: {**s, "norm.bias": None}),
    "number as a name.pt": torch_file(lambda s: {**s, 5: torch.zeros(5)}),
    "name of two lines.pt": torch_file(lambda s: {**s, "norm.\nbias": torch.zeros(5)}),
    "list.pt": torch_file(lambda s: list(s.values())), "tensor.pt": torch_file(lambda s: s[QKV]),
    "no tensors.pt": torch_file(lambda s: {"epoch": 7, "args": argparse.Namespace(lr=0.1)}),
    "empty dict.pt": torch_file(lambda s: {}), "empty model.pt": torch_file(lambda s: {"model": {}, **s}),
    "holding itself.pt": torch_file(lambda s: holding_itself("model")),
    "holding itself in many ways.pt": torch_file(lambda s: holding_itself(*files.WRAPPERS)),
    "head without weight.pt": torch_file(without("head.weight")),
    "bias of another head.pt": torch_file(lambda s: {**s, "head.bias": torch.zeros(5)}),
    "transposed head.pt": torch_file(lambda s: {**s, "head.weight": s["head.weight"].T.contiguous()}),
    "number as a head.pt": torch_file(lambda s: {**s, "head.weight": torch.tensor(5.0)}),
    "positions of no square.pt": torch_file(lambda s: {**s, "pos_embed": torch.ones(1, 8, 12)}),
    "flat positions.pt": torch_file(lambda s: {**s, "pos_embed": torch.ones(10, 12)}),
    "number as positions.pt": torch_file(lambda s: {**s, "pos_embed": torch.tensor(5.0)}),
    "two sets of positions.pt": torch_file(lambda s: {**s, "pos_embed": torch.ones(2, 10, 12)}),
    "flat registers.pt": torch_file(lambda s: {**s, "reg_token": torch.ones(12)}),
    "narrow registers.pt": torch_file(
        lambda s: {**s, "reg_token": torch.ones(1, 2, 5), "pos_embed": torch.ones(1, 12, 12)}),
    "narrow cls.pt": torch_file(lambda s: {**s, "cls_token": torch.ones(1, 1, 5)}),
    "two names.pt": torch_file(lambda s: {**renamed(s), "vit.embeddings.cls_token": s["cls_token"]}),
    "no queries.pt": torch_file(lambda s: without(K_PROJ.replace("k_", "q_"))(renamed(s))),
    "no keys.pt": torch_file(lambda s: without(K_PROJ)(renamed(s))),
    "other keys.pt": torch_file(lambda s: {**renamed(s), K_PROJ: torch.ones(24, 12)}),
    "cut.safetensors": written_then_cut(lambda path, state: save_file(state, path), 0.7),
    "bad header.safetensors": bad_header,
    "cut.npz": written_then_cut(lambda path, state: np.savez(path, **google(state)), 0.7),
    "no numbers.npz": with_npz("head/bias", np.array(["a", "b", "c"])),
    "code.npz": lambda path, state: np.savez(path, x=np.array([Trap(path.parent / "sprung")], dtype=object)),
    "flat out.npz": with_npz(OUT, np.ones(12, np.float32)), "number as out.npz": with_npz(OUT, np.float32(5)),
    "number as a kernel.npz": with_npz("embedding/kernel", np.float32(5)),
    "missing arrays.npz": with_npz("head/bias", np.ones(3, np.float32))}


def test_load_checkpoint_takes_the_undamaged_files(tmp_path):
    state = bits(randomised(SQUARE))
    for change in (dict, renamed):
        torch.save(change(state), tmp_path / "m.pt")
        model = VisionTransformer(**SQUARE)
        load_checkpoint(model, tmp_path / "m.pt")
        assert same_bits(model, state)
        describe_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize(("name", "options"), [
    *((name, {}) for name in DAMAGES),
    *((name, dict(n_registers=2)) for name in DAMAGES if re.search("cls|pos|reg", name)),
    *((name, dict(n_classes=0)) for name in DAMAGES if "head" in name)], ids=str)
@pytest.mark.filterwarnings("ignore")  # torch has deprecated its own quantised tensors
def test_load_checkpoint_refuses_a_damaged_file(name, options, tmp_path):
    path, n_registers = tmp_path / name, options.get("n_registers", 0)
    state = bits(randomised({**SQUARE, "n_registers": n_registers}))
    DAMAGES[name](path, state)
    model = randomised({**SQUARE, **options}, seed=7)
    before = bits(model)
    loads = [lambda path: load_checkpoint(model, path), describe_checkpoint]
    for read in loads[:1] if name == "transposed patches.pt" else loads:  # which fit 5 channels
        with pytest.raises(InputError, match=one_line_with(path)):
            read(path)
    assert same_bits(model, before)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("name", "reason"), [
    ("no keys.pt", "queries, keys and values do not fit together"), ("two names.pt", "map to the same tensor"),
    ("other keys.pt", "queries, keys and values do not fit together"), ("no data.pt", "sparse tensor or without data"),
    ("sparse.pt", "sparse tensor or without data"), ("quantised.pt", "quantised"), ("NaN.pt", "not finite"),
    ("infinite half.pt", "not finite"), ("head without weight.pt", "bias of its head"),
    ("transposed head.pt", "bias of its head"), ("None among the tensors.pt", "'norm.bias', a NoneType"),
    ("empty model.pt", "'model', a dict"), ("missing key.pt", "lacks blocks.1.norm2.bias"),
    ("extra key.pt", "has blocks.1.extra"), ("transposed.pt", "(48, 12) in the file, but (12, 48) in the model"),
    ("positions of no square.pt", "has 8 positions"),
    ("code among the tensors.pt", "holds Python objects (posix.mkdir)"), ("list.pt", "holds a list")])
@pytest.mark.filterwarnings("ignore")
def test_load_checkpoint_names_what_is_wrong(name, reason, tmp_path):
    DAMAGES[name](tmp_path / name, bits(randomised(SQUARE)))
    with pytest.raises(InputError, match=one_line_with(reason)):
        load_checkpoint(VisionTransformer(**SQUARE), tmp_path / name)


@pytest.mark.parametrize("cls", [torch.ones(1, 1, 5), torch.ones(1, 1, 1), torch.ones(12), torch.tensor(5.0),
                                 torch.ones(1, 1, 12, dtype=torch.int8)], ids=lambda cls: f"{cls.dtype} {[*cls.shape]}")
def test_load_checkpoint_refuses_a_damaged_token_before_adding_positions(cls, tmp_path):
    options = dict(n_registers=2, layer_scale=0.5)
    state = bits(randomised({**SQUARE, **options}))
    state |= dict(register_tokens=state.pop("reg_token"), mask_token=torch.zeros(1, 12), cls_token=cls,
                  pos_embed=torch.ones(1, 10, 12))
    torch.save(state, tmp_path / "m.pt")
    model = randomised({**SQUARE, **options}, seed=7)
    before = bits(model)
    with pytest.raises(InputError, match=one_line_with(tmp_path / "m.pt")):
        load_checkpoint(model, tmp_path / "m.pt")
    assert same_bits(model, before)
