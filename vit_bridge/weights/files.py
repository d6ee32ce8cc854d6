"""Files of any kind as dicts, without executing anything in them: torch.load with weights_only=True, numpy without
pickle, safetensors; and the state dict inside.

    entries = read_file(path)                              what a file holds
    state, around = unwrap(entries, path, is_model)        the state dict in it, and what was around that
"""

import argparse
import json
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from vit_bridge.errors import InputError, first_line
from vit_bridge.weights.formats import TAKEN_FIRST, check_average

SCALES = "int8_scales"  # the entry of a checkpoint whose weights are whole numbers

# ---- A file -----------------------------------------------------------------------------------------------


def read_file(path):
    """What a file holds, as a dict. Nothing in it is executed. Raises InputError where that cannot be."""
    try:
        if not Path(path).is_file():
            found = "a folder is at" if Path(path).is_dir() else "no file"
            raise InputError(f"{found} {path}; expected a checkpoint file")
        if str(path).endswith(".index.json"):
            return _read_shards(Path(path))
        if str(path).endswith(".safetensors"):
            return _read_safetensors(path)
        if zipfile.is_zipfile(path) and any(name.endswith(".npy") for name in zipfile.ZipFile(path).namelist()):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        with torch.serialization.safe_globals(_harmless()):
            entries = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # random bytes make torch's unpickler fail with nearly every kind
        found = re.search(r"[Uu]nsupported (?:global|GLOBAL|class)[^\n]*?([\w.]+) (?:was not an allowed|whose module)|"
                          r"Can only (?:build|create) [^\n]* but got <class '(\w+\.[\w.]+)'>", str(error))
        if found:
            raise InputError(_about_objects(path, _worst_global(path, found[1] or found[2]))) from error
        raise InputError(f"{path} is no checkpoint, or a damaged one ({first_line(error)}); expected a file that "
                         f"torch.save, safetensors or numpy wrote") from error
    if not isinstance(entries, dict):
        raise InputError(f"{path} holds a {type(entries).__name__}; expected a dict of tensors, as state_dict() gives")
    if SCALES in entries:
        entries = dict(entries, state_dict=from_int8(entries.get("state_dict"), entries[SCALES], path))
    return entries


def to_int8(state):
    """(state dict, scales): each weight of a layer as int8 from -127 to 127, a quarter of its size, and a scale for
    each of its outputs, (rows, 1, ...) float32, so that row * scale is the nearest to what it was. Vectors stay as they
    are, and so does what has one row, such as positions, or holds NaN."""
    packed, scales = dict(state), {}
    for name, weight in state.items():
        if weight.is_floating_point() and weight.ndim > 1 and len(weight) > 1 and weight.isfinite().all():
            largest = weight.float().abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)  # (rows, 1, ...)
            scales[name] = largest.clamp(min=1e-30) / 127
            packed[name] = (weight / scales[name]).round().to(torch.int8)
    return packed, scales


def from_int8(state, scales, path):
    """The state dict of float32 that to_int8 packed. Raises InputError where weights and scales do not fit."""
    try:
        return dict(state, **{name: state[name].float() * scale for name, scale in scales.items()})
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged: its weights and their {SCALES} do not fit ({first_line(error)}); write "
                         f"or fetch it again") from error


def _harmless():
    """What training scripts keep beside the weights, numbers and text without code: parsed arguments, and the scalars,
    types and arrays of numpy, under the names of its versions 1 and 2."""
    functions = dict(scalar=np.float64(0).__reduce__()[0], _reconstruct=np.empty(0).__reduce__()[0])
    named = [(function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")
             for name, function in functions.items()]
    kinds = {type(np.dtype(letter)) for letter in "?bBhHiIlLqQefdgFDGSUMm"}
    return [argparse.Namespace, np.dtype, np.ndarray, *kinds, *named]


# Of these an object in a file is a call that could do anything; other objects are at least meant as data.
CALLS = ("os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "importlib", "runpy", "builtins", "operator",
         "functools", "webbrowser", "pty", "ctypes", "pickle", "marshal", "code", "types")
DATA_OF_BUILTINS = ("set", "frozenset", "slice", "range", "complex", "bytearray", "list", "dict", "tuple", "object")


def _is_call(name):
    module = name.rpartition(".")[0]
    return not module or (module.split(".")[0] in CALLS and name not in map("builtins.{}".format, DATA_OF_BUILTINS))


def _worst_global(path, name):
    """A call that a file of pickled objects makes, or where none is found the name at which loading stopped."""
    with suppress(Exception):  # files of old versions of torch cannot be searched, and damaged ones fail in any way
        return next(filter(_is_call, torch.serialization.get_unsafe_globals_in_checkpoint(path)), name)
    return name


def _about_objects(path, name):
    """Why a file of pickled objects is not opened; and, unless they are calls, how its owner saves its weights."""
    text = f"{path} holds Python objects ({name}), which are not loaded, as unpickling them can run code"
    if _is_call(name):
        return f"{text}; take the weights from another source"
    target = str(Path(path).with_name(f"{Path(path).stem}-weights.pt"))
    return "\n".join([
        f"{text}; if you wrote it or trust who did, save its weights alone, in Python:",
        f"    import torch; entries = torch.load({str(path)!r}, map_location='cpu', weights_only=False)",
        f"    model = next((entries[name] for name in {(*WRAPPERS[:7], 'net')} if name in entries), entries) if "
        f"isinstance(entries, dict) else entries",
        f"    torch.save({{name: tensor for name, tensor in getattr(model, 'state_dict', lambda: model)().items() if "
        f"isinstance(tensor, torch.Tensor)}}, {target!r})"])


def _read_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError(f"{path} needs the package safetensors to be read; python -m pip install "
                         f"safetensors") from error
    return load_file(path)


def _read_shards(path):
    """The tensors of the files that a transformers index names, which lie beside it."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    files = entries.get("weight_map") if isinstance(entries, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) and Path(file).name == file
                                              for file in files.values()):
        raise InputError(f"{path} is no index of weights; expected a weight_map from tensors to files beside it")
    parts = {file: read_file(path.with_name(file)) for file in sorted(set(files.values()))}
    missing = [name for name, file in files.items() if name not in parts[file]]
    if missing:
        raise InputError(f"{path} names {missing[0]}, which {files[missing[0]]} does not hold; fetch the files again")
    return {name: parts[file][name] for name, file in files.items()}


# ---- The state dict inside --------------------------------------------------------------------------------

# What training scripts put around a state dict, best first: of two, the average of the weights is the one to use.
WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "module", "teacher",
            "target")
MOST_WRAPPERS = 4  # ways grow with its power: a file may hold itself under every name


def unwrap(entries, path, is_model):
    """(the state dict inside, names of what was around it, which of several was taken in words or "").

    is_model: a function of the names of tensors that says whether a model is among them, for a file with a state dict
    under another name than the WRAPPERS. Raises InputError where there is none, and where there are several.
    """
    found = _state_dicts(entries, is_model)
    around = _way_to_tensors(entries)
    if around is None:
        around = _way_by_contents(found, path)
    if around is None:
        raise InputError(f"{path} holds no tensors under {', '.join(map(repr, list(entries)[:5])) or 'any name'}; "
                         f"expected a state dict, or one under {', '.join(WRAPPERS)}")
    taken = ""
    if around and len({*found, around[0]}) > 1:
        listed = " and ".join(map(repr, dict.fromkeys([*found, around[0]])))
        taken = f"of the models under {listed} that of {around[0]!r} was taken"
    models = {name: entries[name] for name in found}
    for name in around:
        entries = entries[name]
    if taken and TAKEN_FIRST.search(around[0]):
        check_average(around[0], models | {around[0]: entries}, path)
    for name, value in entries.items():
        if not (isinstance(name, str) and name.isprintable() and isinstance(value, torch.Tensor)):
            raise InputError(f"{path} holds {name!r}, a {type(value).__name__}, among its tensors; expected a state "
                             f"dict of tensors alone")
        if value.layout != torch.strided or value.is_meta:
            raise InputError(f"{path} holds {name!r} without plain numbers; expected dense tensors")
    return entries, around, taken


def _way_to_tensors(entries, depth=0):
    """Names of the WRAPPERS to go through, best first; None where they lead to no tensors."""
    for name in WRAPPERS if depth < MOST_WRAPPERS else ():
        inner = entries.get(name)
        if isinstance(inner, dict) and (rest := _way_to_tensors(inner, depth + 1)) is not None:
            return [name, *rest]
    return [] if any(isinstance(value, torch.Tensor) for value in entries.values()) else None


def _state_dicts(entries, is_model):
    """Names of the entries that hold the tensors of a model."""
    return [name for name, inner in entries.items() if isinstance(name, str) and isinstance(inner, dict)
            and any(isinstance(value, torch.Tensor) for value in inner.values())
            and is_model([key for key in inner if isinstance(key, str)])]


def _way_by_contents(found, path):
    """[the one of these names to take]; None where there is none."""
    if len(found) > 1:
        found = [name for name in found if TAKEN_FIRST.search(name)] or found
    if len(found) > 1:
        raise InputError(f"{path} holds {len(found)} models, under {' and '.join(map(repr, found))}; expected one, "
                         f"save the state_dict of the one that you want alone")
    return found or None


# Under which names training scripts keep the names of the classes, and in what they keep them.
CLASS_NAME_KEYS = ("class_names", "classes", "class_to_idx", "idx_to_class", "id2label", "label_names", "labels")
SETTINGS_KEYS = ("hyper_parameters", "hparams", "meta", "args", "config")


def class_names_in(entries, n_classes):
    """(key, names of n_classes in the order of the outputs) beside the weights in a file; ("", None) where there are
    none that fit."""
    for place in (entries, *(entries.get(key) for key in SETTINGS_KEYS)):
        place = vars(place) if isinstance(place, argparse.Namespace) else place
        for key in CLASS_NAME_KEYS if isinstance(place, dict) else ():
            names = place.get(key)
            if isinstance(names, dict):  # {name: index} or {index: name}
                by_index = {index: name for name, index in names.items()} if key == "class_to_idx" else names
                names = [by_index.get(i, by_index.get(str(i))) for i in range(len(by_index))]
            if isinstance(names, list | tuple) and len(names) == n_classes == len(set(names)) and all(
                    isinstance(name, str) for name in names):
                return key, list(names)
    return "", None
