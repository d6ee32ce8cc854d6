"""Checkpoints: ours, and those of the libraries and papers that people take weights from.

    model = load(name_or_path)                  a trained model, by name or from a file of any known format
    print(load_checkpoint(model, path))         fills a model from such a file
    save_model(model, path)                     writes a model of this library
    print(describe_checkpoint(path))            what a file is, and how it would load

Nothing in a file is executed: torch.load with weights_only=True, numpy without pickle, safetensors.

Shapes:  B images, D width.
"""

import argparse
import math
import re
import zipfile
from dataclasses import dataclass, fields, replace
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vit_bridge.errors import InputError, check_choice, first_line, pair
from vit_bridge.models.protocol import ask, class_name, is_ours
from vit_bridge.models.registry import check_arguments, model_classes
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.runtime import device_of, is_quantised, unwrapped
from vit_bridge.system import write_whole
from vit_bridge.weights.formats import Format, Weights, translate
from vit_bridge.weights.pretrained import OURS, OURS_FOLDER, PRETRAINED, PUBLIC, fetch
from vit_model import VisionTransformer, ViTConfig, resample_positions, sincos_positions

WITHOUT_SHAPE = ("n_heads", "pool", "position", "norm_eps", "stem_stride", "stem", "block")  # no tensor shows these
FREE = ("img_size", "dropout", "drop_path")  # what may differ from the configuration that weights were trained in
CHECKPOINT_FORMAT = "vit-bridge 1"


# ---- Ours -------------------------------------------------------------------------------------------------


def save_model(model, path, preprocessing=None, dtype=None, state_dict=None, **more):
    """Writes a model of this library as a checkpoint: plain tensors, numbers and text, without pickled code.

    preprocessing  what its images must be; None: model.preprocessing
    dtype          e.g. torch.float16 to halve the file; load gives float32 again
    state_dict     other weights of this model, such as their average; None: those it has now
    more           further entries, kept as they are (a trainer's state, an accuracy)

    The file appears whole or not at all. Raises InputError where it cannot be written, and for a model that is not in
    models.registry.MODELS.
    """
    model = unwrapped(model)
    if model_classes().get(class_name(model)) is not type(model):
        raise InputError(f"a {type(model).__module__}.{class_name(model)} cannot be saved as a checkpoint; expected "
                         f"one of this library's {', '.join(model_classes())} itself")
    _check_plain_weights(model)
    if not isinstance(model.head, (nn.Linear, nn.Identity)):
        raise InputError(f"a head of class {type(model.head).__name__} cannot be saved; expected one nn.Linear")
    config = replace(model.config, n_classes=getattr(model.head, "out_features", 0))
    shown = model.preprocessing if preprocessing is None else preprocessing
    names = shown and shown.class_names
    if names and config.n_classes and len(names) != config.n_classes:
        raise InputError(f"{len(names)} class_names do not fit a head of {config.n_classes} classes; set "
                         f"model.preprocessing to one with the names of these classes")
    state = {key.replace("_orig_mod.", ""):  # a part of the model may be compiled
             value.detach().cpu().to(dtype) if dtype and value.is_floating_point() else value.detach().cpu()
             for key, value in (state_dict or model.state_dict()).items()}
    for name in ("class_names", "mean", "std", "interpolation"):
        if name in more:
            raise InputError(f"save_model got {name} {more[name]!r}; expected it in preprocessing=Preprocessing(...)")
    facts = {name: getattr(shown, name, None) for name in ("class_names", "mean", "std", "interpolation")}
    facts |= {name: list(facts[name]) for name in ("mean", "std") if facts[name] is not None}
    entries = dict(format=CHECKPOINT_FORMAT, model_class=class_name(model), config=vars(config), state_dict=state,
                   img_size=config.img_size, **facts, **more)
    write_whole(path, lambda file: torch.save(entries, file))


def _check_plain_weights(model):
    """Raises InputError for a model whose weights are not there, or are not floating-point numbers."""
    device_of(model)  # which refuses one on the device "meta"
    if is_quantised(model):
        raise InputError(f"this {class_name(model)} is quantised, and a checkpoint holds floating-point weights; take "
                         f"the model that it was made from, and quantise after load()")


def read_checkpoint(path):
    """The entries of a checkpoint, as save_model wrote them. Nothing in the file is executed.

    Raises InputError where there is no file, or save_model did not write it.
    """
    entries = read_file(path)
    if entries.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"{path} is not a checkpoint of this project; expected a file that train_vit.py or "
                         f"save_model wrote. `python train_vit.py inspect {path}` says what it is")
    return entries


def load(name_or_path, n_classes=None, **overrides):
    """A trained model, in eval mode, on the CPU, in float32, with its preprocessing (None where its file has none).

    name_or_path  a name that describe_pretrained() lists, or the path of a checkpoint: ours, or one of a ViT in any
                  format that load_checkpoint knows (whose mean and std are taken to be ImageNet's)
    n_classes     None: the head of the checkpoint, or none where it has none (the model then gives features, (B, D));
                  a number: a new head, untrained, unless it is the checkpoint's own number
    overrides     img_size (resamples the positions), dropout, drop_path; pool of a public one without its own head.
                  Any other field belongs to the weights, and is refused if it is not theirs

    A public file is fetched once, with torch.hub, into its usual folder of checkpoints. Raises InputError for an
    unknown name or field; where a file cannot be fetched (with its address, and where to put it by hand) or read; and
    where weights and configuration do not fit.
    """
    name, weights = str(name_or_path), None
    if name in PUBLIC:
        path, entry = fetch(name), PUBLIC[name]
        model_class, config, preprocessing = VisionTransformer, entry.arguments, entry.preprocessing
    else:
        path = OURS_FOLDER / f"{name}.pt" if name in OURS else _existing_file(name)
        weights = _read_weights(path)
        if weights.model is not None and n_classes is None and not overrides:
            return weights.model
        config, _ = (weights.model.config, "") if weights.model is not None else _inferred(weights)
        model_class = VisionTransformer if weights.model is None else type(weights.model)
        preprocessing = Preprocessing(config.img_size) if weights.model is None else weights.model.preprocessing
        config = vars(config)
    check_arguments(model_class, overrides)
    wanted = config["n_classes"] if n_classes is None else n_classes
    free = (*FREE, "pool") if name in PUBLIC and not (wanted and wanted == config["n_classes"]) else FREE
    for argument, value in overrides.items():
        if argument not in free and value != config[argument]:
            raise InputError(f"{argument} {value!r} is not that of {name}, {config[argument]!r}; the weights allow "
                             f"another {', '.join(free)} or n_classes")
    model = model_class(**{**config, "n_classes": wanted, **overrides})
    grid = None
    if "patch_size" in config:
        grid = tuple(size // side for size, side in zip(pair(config["img_size"]), pair(config["patch_size"]),
                                                        strict=True))
    try:
        state, _ = _fitted(weights or _read_weights(path), model, grid)
    except InputError as error:
        if name not in PUBLIC:
            raise
        raise InputError(f"{error}; where the file came incomplete, delete it and it is fetched again") from error
    model.load_state_dict(state)
    if preprocessing is not None:
        names = preprocessing.class_names if wanted == config["n_classes"] else None
        model.preprocessing = replace(preprocessing, img_size=model.config.img_size, class_names=names)
    return model.eval()


def _existing_file(name):
    """The path of a checkpoint. Raises InputError, with the names that there are, where there is no such file."""
    if Path(name).is_dir():
        raise InputError(f"{name} is a folder; expected the path of a checkpoint in it, such as "
                         f"{Path(name) / 'best.pt'}, or one of {', '.join(PRETRAINED)}")
    if not Path(name).is_file() and Path(name).suffix:
        raise InputError(f"there is no file {name}; expected the path of a checkpoint, or one of "
                         f"{', '.join(PRETRAINED)}")
    if not Path(name).is_file():
        check_choice("model", name, PRETRAINED)
    return name


def _model_of(entries, path):
    """The model that read_checkpoint's entries describe. Raises InputError where weights and configuration do not
    fit."""
    try:
        model = model_classes()[entries["model_class"]](**entries["config"])
        model.load_state_dict(entries["state_dict"])
        facts = {name: entries[name] for name in ("class_names", "mean", "std")}
        facts["interpolation"] = entries.get("interpolation")  # older files do not say
        if any(value is not None for value in facts.values()):
            known = {name: value for name, value in facts.items() if value is not None}
            if "mean" not in known and model.config.in_channels != 3:  # nothing is known of such channels
                known |= dict(mean=(0.0,) * model.config.in_channels, std=(1.0,) * model.config.in_channels)
            model.preprocessing = Preprocessing(entries["img_size"], **known)
    except Exception as error:
        raise InputError(f"{path} is damaged: its weights and its configuration do not fit "
                         f"({first_line(error)})") from error
    return model.eval()


# ---- Reading a file of any kind ---------------------------------------------------------------------------


def read_file(path):
    """What a file holds, as a dict. Nothing in it is executed. Raises InputError where that cannot be."""
    try:
        if not Path(path).is_file():
            found = "a folder is at" if Path(path).is_dir() else "no file"
            raise InputError(f"{found} {path}; expected a checkpoint file")
        if str(path).endswith(".safetensors"):
            return _read_safetensors(path)
        if zipfile.is_zipfile(path) and any(name.endswith(".npy") for name in zipfile.ZipFile(path).namelist()):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        # Training scripts keep their parsed arguments beside the weights: text and numbers, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            entries = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # random bytes make torch's unpickler fail with nearly every kind
        found = re.search(r"[Uu]nsupported (?:global|GLOBAL|class)[^\n]*?([\w.]+) (?:was not an allowed|whose module)",
                          str(error))
        if found:
            raise InputError(f"{path} holds Python objects ({found[1]}), which are not loaded, as unpickling them can "
                             f"run code; save the model's state_dict alone") from error
        raise InputError(f"{path} is no checkpoint, or a damaged one ({first_line(error)}); expected a file that "
                         f"torch.save, safetensors or numpy wrote") from error
    if not isinstance(entries, dict):
        raise InputError(f"{path} holds a {type(entries).__name__}; expected a dict of tensors, as state_dict() gives")
    return entries


def _read_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError(f"{path} needs the package safetensors to be read; python -m pip install "
                         f"safetensors") from error
    return load_file(path)


# What training scripts put around a state dict, best first: of two, the average of the weights is the one to use.
WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "module", "teacher",
            "target")
PREFIXES = ("module.", "_orig_mod.", "model.")
MOST_WRAPPERS = 4  # ways grow with its power: a file may hold itself under every name


def _unwrap(entries, path):
    """(the state dict inside, names of what was around it). Raises InputError where there is none."""
    around = _way_to_tensors(entries)
    if around is None:
        raise InputError(f"{path} holds no tensors under {', '.join(map(repr, list(entries)[:5])) or 'any name'}; "
                         f"expected a state dict, or one under {', '.join(WRAPPERS)}")
    for name in around:
        entries = entries[name]
    for name, value in entries.items():
        if not (isinstance(name, str) and name.isprintable() and isinstance(value, torch.Tensor)):
            raise InputError(f"{path} holds {name!r}, a {type(value).__name__}, among its tensors; expected a state "
                             f"dict of tensors alone")
        if value.layout != torch.strided or value.is_meta:
            raise InputError(f"{path} holds {name!r} without plain numbers; expected dense tensors")
    while prefix := _common_prefix([name for name in entries if name != "n_averaged"]):
        entries, around = {name.removeprefix(prefix): value for name, value in entries.items()}, [*around, prefix]
    return entries, around


def _way_to_tensors(entries, depth=0):
    """Names of the WRAPPERS to go through, best first; None where they lead to no tensors."""
    for name in WRAPPERS if depth < MOST_WRAPPERS else ():
        inner = entries.get(name)
        if isinstance(inner, dict) and (rest := _way_to_tensors(inner, depth + 1)) is not None:
            return [name, *rest]
    return [] if any(isinstance(value, torch.Tensor) for value in entries.values()) else None


def _common_prefix(names):
    """The one of PREFIXES with which all names begin, else None."""
    return next((prefix for prefix in PREFIXES if names and all(name.startswith(prefix) for name in names)), None)


# ---- Into a model -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What load_checkpoint did with each tensor of a file; as text, in a few lines.

    path, format    the file, and how it names its weights
    used            names in the file that were loaded
    dropped         {name in the file: why the model does not use it}
    notes           what differs between the file and the model, and what was done about it
    heads           a warning about the number of heads, where the file does not record it
    """
    path: str
    format: str
    used: tuple
    dropped: dict
    notes: tuple
    heads: str = ""

    def __str__(self):
        by_reason = {}
        for name, reason in self.dropped.items():
            by_reason.setdefault(reason, []).append(name)
        lines = [f"{self.path}: {self.format}; {len(self.used)} tensors loaded, {len(self.dropped)} dropped"]
        for reason, names in by_reason.items():
            lines.append(f"  dropped: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} ({reason})")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join([*lines, *([f"  heads: {self.heads}"] if self.heads else [])])


def load_checkpoint(model, path, grid_size=None):
    """Fills a model from a file of any kind in FORMATS, one of save_model, or its own state dict.

    Loading is strict: each tensor of the file is used, or dropped for a reason that the report gives, and each shape is
    compared. Two things may differ: with another number of classes the model keeps its own head, and at another
    resolution the positions are resampled.

    grid_size: (rows, columns) of the patches that the file was trained on, for the rare one whose number of positions
    can be read in two ways; what was taken is then said.

    Returns a LoadReport. Raises InputError, with the model unchanged, where a tensor is missing, left over or of
    another shape, and for a file that cannot be read. A file that does not record how many heads it was trained with
    (only Google's and ours do) fits any number: take the one of its paper. A compiled or wrapped model
    (torch.compile, DataParallel, AveragedModel) is filled inside.
    """
    model = unwrapped(model)
    if not is_ours(model):
        raise InputError(f"a {class_name(model)} cannot be filled from a checkpoint; expected one of "
                         f"{', '.join(model_classes())}")
    _check_plain_weights(model)
    weights = _read_weights(path, model)
    state, report = _fitted(weights, model, grid_size)
    model.load_state_dict(state)
    return report


def _read_weights(path, model=None):
    """A file as Weights; model: one whose own names are known too."""
    entries = read_file(path)
    if entries.get("format") == CHECKPOINT_FORMAT:
        other = _model_of(entries, path)
        if model is not None:
            _check_same_kind(other, model, path)
        weights = _own_names("ours", path, [], other.state_dict())
        weights.model = other
        return weights
    state, around = _unwrap(entries, path)
    if model is not None and model.config_class is not VisionTransformer.config_class:
        if state.keys() - {"n_averaged"} != model.state_dict().keys():
            raise InputError(f"{path} is for another architecture: its tensors, such as {next(iter(state))}, are not "
                             f"those of a {class_name(model)}; build the model that it was saved from")
        return _own_names(f"state dict of a {class_name(model)}", path, around, state)
    try:
        return translate(state, path, around)
    except InputError:
        raise
    except Exception as error:  # tensors of a rank that no ViT has
        raise InputError(f"{path} is damaged, or of no format that is known ({first_line(error)})") from error


def _own_names(kind, path, around, state):
    """Weights whose names are the model's own."""
    tensors = {name: tensor for name, tensor in state.items() if name != "n_averaged"}
    dropped = {name: "a counter of averaged steps" for name in state.keys() - tensors.keys()}
    return Weights(str(path), Format(kind, (), norm_eps=None), around, tensors, {name: [name] for name in tensors},
                   dropped)


def _check_same_kind(other, model, path):
    """Raises InputError where a model differs from the file's in what leaves no trace in shapes."""
    if model.config_class is not other.config_class:
        raise InputError(f"{path} holds a {type(other).__name__}, the model is a {class_name(model)}; build that "
                         f"one, or take load(path), which builds what the file holds")
    for name in WITHOUT_SHAPE:
        theirs, ours = getattr(other.config, name, None), getattr(model.config, name, None)
        if theirs != ours:
            raise InputError(f"{path} is for another architecture: {name} is {theirs} there, {ours} in the model; "
                             f"take load(path), which builds what the file holds")


def _fitted(weights, model, grid_size=None, advise=True):
    """(state dict for the model, LoadReport). Raises InputError where the weights do not fit.

    advise: whether an error points to what the command line can say of the file.
    """
    try:
        return fit(weights, model, grid_size)
    except InputError as error:
        hint = f"; `python train_vit.py inspect {weights.path}` says what it was saved from"
        raise InputError(f"{error}{hint if advise and '; ' not in str(error) else ''}") from error
    except Exception as error:  # tensors of a rank that no ViT has
        raise InputError(f"{weights.path} is damaged: its tensors do not belong together "
                         f"({first_line(error)})") from error


def fit(weights, model, grid_size):
    """_fitted, for tensors of the ranks that a ViT has."""
    expected, notes = model.state_dict(), [weights.format.note] if weights.format.note else []
    if weights.around:
        notes.append(f"the weights lie under {' / '.join(weights.around)}")
    if weights.n_heads not in (None, getattr(model.config, "n_heads", None)):
        raise InputError(f"{weights.path} is for another architecture: n_heads is {weights.n_heads} there, "
                         f"{model.config.n_heads} in the model")
    if weights.format.norm_eps not in (None, getattr(model.config, "norm_eps", None)):
        notes.append(f"norms: the file's library adds {weights.format.norm_eps} to the variance unless told otherwise, "
                     f"the model {model.config.norm_eps}; norm_eps={weights.format.norm_eps} makes them equal")
    notes += _match_head(weights, expected)
    notes += _fit_positions(weights, model, grid_size)
    tensors = weights.tensors
    missing = [name for name in expected if name not in tensors and not name.startswith("head.")]
    extra = [name for name in tensors if name not in expected]
    for wrong, where in ((extra, "the file has {} and the model does not"), (missing, "the file lacks {}")):
        if wrong:
            name = weights.sources[wrong[0]][0] if wrong is extra else wrong[0]
            more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
            raise InputError(f"{weights.path} is for another architecture: {where.format(name + more)}"
                             f"{_advice(wrong[0], weights)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise InputError(f"{weights.path} is for another architecture: {weights.sources[name][0]} is "
                             f"{tuple(tensor.shape)} there, {tuple(expected[name].shape)} in the model"
                             f"{_advice(name, weights)}")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise InputError(f"{weights.path} is damaged or quantised: {weights.sources[name][0]} is {tensor.dtype}, "
                             f"expected {expected[name].dtype}")
    state = {**expected, **{name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}}
    used = tuple(name for ours in tensors for name in weights.sources[ours])
    heads = ""
    if weights.model is None and weights.n_heads is None and ask(model, "attends"):
        heads = (f"the file does not say how many; the model's {model.config.n_heads} are right only if it was trained "
                 f"with as many")
    return state, LoadReport(weights.path, weights.format.name, used, weights.dropped, tuple(notes), heads)


def _advice(name, weights):
    """How to build the model that a tensor fits, if the tensor shows it; begins with a semicolon."""
    there = name in weights.tensors
    if re.search(r"\.ls[12]\.", name):
        return f"; build the model with layer_scale={1e-5 if there else None}"
    if re.search(r"attn\.[qk]_norm\.", name):
        return f"; build the model with qk_norm={there}"
    if name == "reg_token":
        return f"; build the model with n_registers={weights.tensors[name].shape[1] if there else 0}"
    return ""


def _match_head(weights, expected):
    """Notes on the head. One that does not fit the model's is dropped, and the model keeps its own."""
    theirs = {name: weights.tensors[name] for name in ("head.weight", "head.bias") if name in weights.tensors}
    wanted = expected.get("head.weight")
    if not theirs:
        has_head = any(name.startswith("head.") for name in expected)
        return ["head: the file has none; the model keeps its own, untrained"] if has_head else []
    weight, bias = theirs.get("head.weight"), theirs.get("head.bias")
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(f"{weights.sources[name][0]} {tuple(tensor.shape)}" for name, tensor in theirs.items())
        raise InputError(f"{weights.path} is damaged: weights and biases of its head do not belong together ({shapes})")
    if wanted is None:
        reason = "the model has no head, or not one nn.Linear"
    elif any("pre_logits" in name for name in weights.dropped):
        reason = "reads the layer before it, which was dropped"
    elif weight.shape[1] != wanted.shape[1]:
        reason = f"reads {weight.shape[1]} features, the model's head {wanted.shape[1]}"
    elif len(weight) != len(wanted):
        reason = f"for {len(weight)} classes, the model's head for {len(wanted)}"
    elif theirs.keys() != {name for name in expected if name.startswith("head.")}:
        reason = "with a bias where the model's head has none, or the other way round"
    else:
        return []
    for name in theirs:
        weights.dropped[weights.sources.pop(name)[0]] = reason
        del weights.tensors[name]
    if wanted is None:
        return []
    return [f"head: the model keeps its own, untrained; that of the file: {reason}"]


def _fit_positions(weights, model, grid_size):
    """Notes on the positions, which are brought to the model's grid, with or without CLS as it has them."""
    theirs, grid = weights.tensors.get("pos_embed"), getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or theirs is None:
        return []
    if model.pos_embed is None:
        raise InputError(f"{weights.path} is for another architecture: it has positions, the model was built with "
                         f"position='none'; build it with position='learned'")
    D = model.config.embed_dim
    if theirs.ndim != 3 or theirs.shape[0] != 1 or theirs.shape[2] != D:
        raise InputError(f"{weights.path} is for another architecture: {weights.sources['pos_embed'][0]} is "
                         f"{tuple(theirs.shape)} there, {tuple(model.pos_embed.shape)} in the model")
    old, n_prefix, notes = _read_grid(weights, grid, grid_size)
    n_cls, wanted = min(n_prefix, 1), int(model.reg_token is None)
    if n_prefix > 1:
        _add_to_token(weights, "reg_token", theirs[:, 1:n_prefix])
        notes.append("positions: those of the registers were added to the registers")
    if n_cls > wanted:
        _add_to_token(weights, "cls_token", theirs[:, :1])
        notes.append("positions: that of CLS was added to the CLS token, as a model with registers has none for it")
    if n_cls < wanted:
        notes.append("positions: the file has none for CLS; it gets zeros")
    first = theirs[:, :1] if n_cls else torch.zeros_like(theirs[:, :1])  # (1, 1, D)
    theirs = torch.cat([first[:, :wanted], theirs[:, n_prefix:]], dim=1)  # (1, wanted + patches, D)
    if model.config.position == "sincos":
        if not torch.allclose(theirs.float(), sincos_positions(old, D)[:, 1 - wanted:], atol=1e-3):
            raise InputError(f"{weights.path} is for another architecture: its positions are learned, the model was "
                             f"built with position='sincos'; build it with position='learned'")
        theirs = model.pos_embed  # the same waves, on the model's grid
    elif old != grid:
        theirs = resample_positions(theirs, old, grid)
        notes.append(f"positions: resampled from a grid of {old[0]}x{old[1]} to {grid[0]}x{grid[1]} patches")
    weights.tensors["pos_embed"] = theirs
    return notes


def _add_to_token(weights, name, positions):
    """Adds positions to the token that they belong to, once for all. Raises InputError where it is not there."""
    token = weights.tensors.get(name)
    if token is None or token.shape != positions.shape or not token.is_floating_point():
        raise InputError(f"{weights.path} is damaged: it has {positions.shape[1]} positions for a {name} of "
                         f"{None if token is None else (*token.shape, token.dtype)}")
    weights.tensors[name] = token + positions


def _read_grid(weights, grid=None, given=None):
    """((rows, columns), positions before them, notes): how the positions of a file are to be read.

    A file of save_model records it. Otherwise these are tried in order: the given grid; that of the model, if their
    number fits; a square. Raises InputError if none fits.
    """
    M = weights.tensors["pos_embed"].shape[1]
    if weights.model is not None:
        rows, columns = weights.model.patch_embed.grid_size
        return (rows, columns), M - rows * columns, []
    registers = weights.tensors.get("reg_token")
    n_registers = 0 if registers is None or registers.ndim != 3 else registers.shape[1]
    prefixes = {True: [1], False: [0], None: [1 + n_registers, 0] if n_registers else [1, 0]}[weights.format.pos_cls]
    grids = [tuple(given)] if given else [grid] if grid else []
    ways = [(known, n) for known in grids for n in prefixes if known[0] * known[1] == M - n]
    if not given:
        sides = [(math.isqrt(max(M - n, 0)), n) for n in prefixes]
        ways += [((side, side), n) for side, n in sides if side and side * side == M - n]
    ways = list(dict.fromkeys(ways))
    if not ways:
        wanted = f"the grid {given[0]}x{given[1]}" if given else "a square grid"
        raise InputError(f"{weights.path} has {M} positions, not {wanted} with {' or '.join(map(str, prefixes))} "
                         f"before it; give grid_size=(rows, columns) of the patches that it was trained on")
    texts = [f"{rows}x{columns} patches with {n} before them" for (rows, columns), n in ways]
    notes = [f"positions: {M} can be {' or '.join(texts)}; taken as the first, grid_size would say"] if ways[1:] else []
    return *ways[0], notes


# ---- What a file is ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """What a checkpoint is: the format, the configuration of the model that it fits, and the report of loading it
    into such a model."""
    report: LoadReport
    model_class: str
    config: object
    n_parameters: int

    def __str__(self):
        usual = {f.name: f.default for f in fields(self.config)}  # a HybridCNNViT has some defaults of its own
        arguments = signature(model_classes()[self.model_class]).parameters
        usual |= {name: argument.default for name, argument in arguments.items() if name in usual}
        settings = {name: value for name, value in vars(self.config).items() if value != usual[name]}
        lines = [str(self.report)]
        return "\n".join([*lines, f"  {self.n_parameters:,} parameters. It loads with", "",
                          f"    model = {self.model_class}({', '.join(f'{k}={v!r}' for k, v in settings.items())})",
                          f"    load_checkpoint(model, {self.report.path!r})"])


def describe_checkpoint(path):
    """What a file is, and how it would load, as a Description. Raises InputError where it would not, with the reason.

    The model of a file that is not ours is built on the device "meta", so that nothing but the file takes memory.
    """
    weights = _read_weights(path)
    model, heads = weights.model, ""
    if model is None:
        config, heads = _inferred(weights)
        with torch.device("meta"):
            model = VisionTransformer(**vars(config))
    _, report = _fitted(weights, model, advise=False)
    n_parameters = sum(p.numel() for p in model.parameters())
    return Description(replace(report, heads=heads), class_name(model), model.config, n_parameters)


def _inferred(weights):
    """infer_config, with one line for tensors of a rank that no ViT has."""
    try:
        return infer_config(weights)
    except InputError:
        raise
    except (ValueError, IndexError, TypeError, StopIteration) as error:
        raise InputError(f"{weights.path} ({weights.format.name}) has tensors of shapes that no ViT has "
                         f"({first_line(error)})") from error


def infer_config(weights):
    """(ViTConfig of the model that a file fits, where its number of heads comes from)."""
    tensors = weights.tensors
    needed = ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise InputError(f"{weights.path} ({weights.format.name}) is no whole ViT: it lacks {', '.join(missing)}")
    D, C, *patch = tensors["patch_embed.proj.weight"].shape
    blocks = {int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name)}
    depth = len(blocks)
    if blocks != set(range(depth)):
        raise InputError(f"{weights.path} ({weights.format.name}) is no whole ViT: it has {depth} blocks, numbered up "
                         f"to {max(blocks)}")
    n_registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    grid = (1, 1)
    if "pos_embed" in tensors:
        grid, _, _ = _read_grid(weights)
    n_heads = weights.n_heads or _likely_heads(D)
    hidden = len(tensors["blocks.0.mlp.fc1.weight"])
    ratio = next(r for r in (hidden / D, math.nextafter(hidden / D, math.inf)) if int(D * r) == hidden)
    n_classes = 0
    head = tensors.get("head.weight")
    if head is not None and head.ndim == 2 and head.shape[1] == D:
        n_classes = len(head)
    img_size = tuple(n * side for n, side in zip(grid, patch, strict=True))
    config = ViTConfig(
        one_side(img_size), one_side(tuple(patch)), C, n_classes, D, depth, n_heads, ratio,
        position="learned" if "pos_embed" in tensors else "none", n_registers=n_registers,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in tensors else None, qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        norm_eps=weights.format.norm_eps)
    guess = (f"the file does not say how many; {n_heads} is a guess ({D // n_heads} channels each), and any number "
             f"that divides {D} loads")
    return config, "" if weights.n_heads else guess


def one_side(sides):
    """(height, width), as one number where they are equal."""
    return sides[0] if sides[0] == sides[1] else sides


def _likely_heads(D):
    """Heads of a ViT of this width: of 64 channels, as in Table 1 of the ViT paper, but for Huge (16 of 80)."""
    if D == 1280:
        return 16
    return next(n for n in range(max(1, D // 64), 0, -1) if D % n == 0)
