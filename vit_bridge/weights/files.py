"""Read files of weights without executing any code in them, and find the state dict inside.

    entries = read_file(path)                              the contents of a file as a dict
    state, around, taken = unwrap(entries, path, is_model) the state dict in it, and where it was found

Files of torch.save are loaded with weights_only=True, numpy files with allow_pickle=False.
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

SCALES = "int8_scales"  # the entry with the scales of int8 weights

# ---- A file -----------------------------------------------------------------------------------------------


def read_file(path):
    """Read a file of weights as a dict, without executing any code in it.

    Raises
    ------
    InputError
        If there is no such file, or if it cannot be read safely.
    """
    try:
        if not Path(path).is_file():
            raise InputError(f"{path} is a folder; use a checkpoint file in it" if Path(path).is_dir() else
                             f"there is no file {path}; expected the path of a checkpoint")
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
    except Exception as error:  # damaged files make torch's unpickler raise almost anything
        found = re.search(r"[Uu]nsupported (?:global|GLOBAL|class)[^\n]*?([\w.]+) (?:was not an allowed|whose module)|"
                          r"Can only (?:build|create) [^\n]* but got <class '(\w+\.[\w.]+)'>", str(error))
        if found:
            raise InputError(_about_objects(path, _worst_global(path, found[1] or found[2]))) from error
        raise InputError(f"{path} is not a checkpoint, or is damaged ({first_line(error)}); use the best.pt of a run, "
                         f"or a file written by torch.save, safetensors or numpy") from error
    if not isinstance(entries, dict):
        raise InputError(f"{path} holds a {type(entries).__name__}; expected a dict of tensors, as state_dict() "
                         f"returns")
    if SCALES in entries:
        entries = dict(entries, state_dict=from_int8(entries.get("state_dict"), entries[SCALES], path))
    return entries


def to_int8(state):
    """Quantise a state dict to int8, a quarter of the size of float32.

    Each matrix or kernel becomes integers from -127 to 127 with one float32 scale per output, (rows, 1, ...), so that
    row * scale is close to the original. Vectors, tensors with a single row (such as positions) and tensors with NaN or
    infinity stay as they are.

    Returns
    -------
    state, scales : dict
        The quantised state dict, and {name: scale}.
    """
    packed, scales = dict(state), {}
    for name, weight in state.items():
        if weight.is_floating_point() and weight.ndim > 1 and len(weight) > 1 and weight.isfinite().all():
            largest = weight.float().abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)  # (rows, 1, ...)
            scales[name] = largest.clamp(min=1e-30) / 127
            packed[name] = (weight / scales[name]).round().to(torch.int8)
    return packed, scales


def from_int8(state, scales, path):
    """Return the float32 state dict that `to_int8` quantised.

    Raises
    ------
    InputError
        If weights and scales do not fit together.
    """
    try:
        return dict(state, **{name: state[name].float() * scale for name, scale in scales.items()})
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged: its weights and their {SCALES} do not fit together "
                         f"({first_line(error)}); save or download it again") from error


def _harmless():
    """Return the classes that a file may contain besides tensors, because they hold only numbers and text.

    These are parsed arguments and numpy's scalars, dtypes and arrays, under their names in numpy 1 and 2.
    """
    functions = dict(scalar=np.float64(0).__reduce__()[0], _reconstruct=np.empty(0).__reduce__()[0])
    named = [(function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")
             for name, function in functions.items()]
    kinds = {type(np.dtype(letter)) for letter in "?bBhHiIlLqQefdgFDGSUMm"}
    return [argparse.Namespace, np.dtype, np.ndarray, *kinds, *named]


# A pickle that names an object of these modules calls code that can do anything; other objects are treated as data.
CALLS = ("os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "importlib", "runpy", "builtins", "operator",
         "functools", "webbrowser", "pty", "ctypes", "pickle", "marshal", "code", "types")
DATA_OF_BUILTINS = ("set", "frozenset", "slice", "range", "complex", "bytearray", "list", "dict", "tuple", "object")


def _is_call(name):
    module = name.rpartition(".")[0]
    return not module or (module.split(".")[0] in CALLS and name not in map("builtins.{}".format, DATA_OF_BUILTINS))


def _worst_global(path, name):
    """Return the name of a dangerous call in a file of pickled objects, or `name` if there is none."""
    with suppress(Exception):  # files of old torch versions cannot be searched; damaged ones may raise anything
        return next(filter(_is_call, torch.serialization.get_unsafe_globals_in_checkpoint(path)), name)
    return name


def _about_objects(path, name):
    """Explain why a file of pickled objects is not loaded and, if they are only data, how to save just its weights."""
    text = f"{path} holds Python objects ({name}), which are not loaded because unpickling can run code"
    if _is_call(name):
        return f"{text}; get the weights from another source"
    target = str(Path(path).with_name(f"{Path(path).stem}-weights.pt"))
    return "\n".join([
        f"{text}; if you wrote the file or trust its author, save only its weights, in Python:",
        f"    import torch; entries = torch.load({str(path)!r}, map_location='cpu', weights_only=False)",
        f"    model = next((entries[name] for name in {(*WRAPPERS[:7], 'net')} if name in entries), entries) if "
        f"isinstance(entries, dict) else entries",
        f"    torch.save({{name: tensor for name, tensor in getattr(model, 'state_dict', lambda: model)().items() if "
        f"isinstance(tensor, torch.Tensor)}}, {target!r})"])


def _read_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError(f"{path} needs the package safetensors; install it with python -m pip install "
                         f"safetensors") from error
    return load_file(path)


def _read_shards(path):
    """Read the tensors of the files that a transformers index lists, which are in the same folder."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    files = entries.get("weight_map") if isinstance(entries, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) and Path(file).name == file
                                              for file in files.values()):
        raise InputError(f"{path} is not an index of weights; expected a weight_map from tensors to files in its "
                         f"folder")
    parts = {file: read_file(path.with_name(file)) for file in sorted(set(files.values()))}
    missing = [name for name, file in files.items() if name not in parts[file]]
    if missing:
        raise InputError(f"{path} lists {missing[0]}, which is not in {files[missing[0]]}; download the files again")
    return {name: parts[file][name] for name, file in files.items()}


# ---- The state dict inside --------------------------------------------------------------------------------

# Names under which training scripts store a state dict, in order of preference: averaged weights come first.
WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "module", "teacher",
            "target")
MOST_WRAPPERS = 4  # the search grows exponentially if a file contains itself


def unwrap(entries, path, is_model):
    """Find the state dict in the entries of a file.

    Parameters
    ----------
    entries : dict
        What `read_file` returned.
    path : path
        The file, for messages.
    is_model : callable
        Takes a list of tensor names and returns whether they belong to a model. It is used to find a state dict under a
        name that is not in WRAPPERS.

    Returns
    -------
    state : dict
        The state dict.
    around : list of str
        Keys that lead to it.
    taken : str
        Which of several models was used, or "".

    Raises
    ------
    InputError
        If there is no state dict, or more than one and none is preferred.
    """
    found = _state_dicts(entries, is_model)
    around = _way_to_tensors(entries)
    if around is None:
        around = _way_by_contents(found, path)
    if around is None:
        raise InputError(f"{path} holds no tensors under {', '.join(map(repr, list(entries)[:5])) or 'any name'}; "
                         f"expected a state dict, or one under a name such as {WRAPPERS[3]!r} or {WRAPPERS[5]!r}")
    taken = ""
    if around and len({*found, around[0]}) > 1:
        listed = " and ".join(map(repr, dict.fromkeys([*found, around[0]])))
        taken = f"of the models under {listed}, {around[0]!r} was used"
    models = {name: entries[name] for name in found}
    for name in around:
        entries = entries[name]
    if taken and TAKEN_FIRST.search(around[0]):
        check_average(around[0], models | {around[0]: entries}, path)
    for name, value in entries.items():
        if not (isinstance(name, str) and name.isprintable() and isinstance(value, torch.Tensor)):
            raise InputError(f"{path} holds {name!r}, a {type(value).__name__}, among its tensors; expected a state "
                             f"dict that holds only tensors")
        if value.layout != torch.strided or value.is_meta:
            raise InputError(f"{path} holds {name!r} as a sparse tensor or without data; expected dense tensors")
    return entries, around, taken


def _way_to_tensors(entries, depth=0):
    """Return the preferred path of WRAPPERS keys that leads to tensors, or None if there is none."""
    for name in WRAPPERS if depth < MOST_WRAPPERS else ():
        inner = entries.get(name)
        if isinstance(inner, dict) and (rest := _way_to_tensors(inner, depth + 1)) is not None:
            return [name, *rest]
    return [] if any(isinstance(value, torch.Tensor) for value in entries.values()) else None


def _state_dicts(entries, is_model):
    """Return the names of the entries that hold the tensors of a model."""
    return [name for name, inner in entries.items() if isinstance(name, str) and isinstance(inner, dict)
            and any(isinstance(value, torch.Tensor) for value in inner.values())
            and is_model([key for key in inner if isinstance(key, str)])]


def _way_by_contents(found, path):
    """Return [the name to use], or None if there are no names."""
    if len(found) > 1:
        found = [name for name in found if TAKEN_FIRST.search(name)] or found
    if len(found) > 1:
        raise InputError(f"{path} holds {len(found)} models, under {' and '.join(map(repr, found))}; save only the "
                         f"state_dict of the model that you want")
    return found or None


# Names under which training scripts store class names, and the dicts in which they store them.
CLASS_NAME_KEYS = ("class_names", "classes", "class_to_idx", "idx_to_class", "id2label", "label_names", "labels")
SETTINGS_KEYS = ("hyper_parameters", "hparams", "meta", "args", "config")


def class_names_in(entries, n_classes):
    """Find class names that a training script stored alongside the weights.

    Returns (key, n_classes names in the order of the outputs), or ("", None) if none fit.
    """
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


def pixel_settings_in(entries):
    """Return the settings of MAE that its training script stored alongside the weights: norm_pix_loss, mask_ratio."""
    stored = entries.get("args")
    stored = vars(stored) if isinstance(stored, argparse.Namespace) else stored if isinstance(stored, dict) else {}
    kinds = dict(norm_pix_loss=bool, mask_ratio=float)
    return {name: stored[name] for name, kind in kinds.items() if isinstance(stored.get(name), kind)}
