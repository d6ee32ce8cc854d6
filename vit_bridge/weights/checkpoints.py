"""Checkpoints: save and load models of this library, and load the weights of other libraries and papers.

    model = load(name_or_path)                  a trained model, by name or from a file of any known format
    print(load_checkpoint(model, path))         loads such a file into a model
    save_model(model, path)                     saves a model of this library
    print(describe_checkpoint(path))            describes a file and how it would load

No code in the files is executed.

Shapes:  B images, D width.
"""

import math
import re
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from pathlib import Path

import torch
from torch import nn

from vit_bridge.errors import InputError, assume, first_line, join_words
from vit_bridge.models.adapters import images_of_ours
from vit_bridge.models.beit import copy_shared_table
from vit_bridge.models.protocol import ask, check_arguments, class_name, is_ours
from vit_bridge.models.registry import model_classes
from vit_bridge.models.relative import resample_bias_table
from vit_bridge.preprocessing import IMAGENET_MEAN, Preprocessing, one_side
from vit_bridge.runtime import device_of, is_quantised, unwrapped
from vit_bridge.system import write_whole
from vit_bridge.weights.files import SCALES, class_names_in, pixel_settings_in, read_file, to_int8, unwrap
from vit_bridge.weights.formats import (
    BEITS,
    FORMATS,
    PRETRAINING_PARTS,
    TABLE,
    Format,
    Weights,
    beside,
    chosen_prefix,
    drop_outside,
    recognise,
    translate,
    under,
)
from vit_bridge.weights.heads import first_difference, fit_head, listed, match_names
from vit_bridge.weights.pretrained import OURS, OURS_FOLDER, PRETRAINED, PUBLIC, fetch
from vit_bridge.weights.recorded import VITS, Recorded, file_in, read_recorded
from vit_bridge.weights.staged import STAGED_CONFIGS, not_in_tensors
from vit_model import closest_names, grid_of, pair, resample_positions, sincos_positions

WITHOUT_SHAPE = ("n_heads", "pool", "position", "norm_eps", "decoder_heads", "norm_pix_loss", "stem_stride", "stem",
                 "block", "shift")  # not in shapes
FREE = ("img_size", "in_channels", "window_size", "dropout", "drop_path", "mask_ratio")  # may differ from training
OF_MAE = ("decoder_heads", "norm_pix_loss")  # of WITHOUT_SHAPE, in a MaskedAutoencoder
CHECKPOINT_FORMAT = "vit-bridge 1"
MEND = "correct it, or move the weights to a separate folder"


# ---- Ours -------------------------------------------------------------------------------------------------


def save_model(model, path, preprocessing=None, dtype=None, state_dict=None, **more):
    """Save a model of this library as a checkpoint of plain tensors, numbers and text.

    The file holds no pickled code, and it is written completely or not at all.

    Parameters
    ----------
    model : Module
        A model whose class is in models.registry.MODELS.
    path : path
        The file to write.
    preprocessing : Preprocessing, optional
        How its input images must be preprocessed; model.preprocessing by default.
    dtype : torch.dtype, optional
        torch.float16 halves the file size and torch.int8 quarters it (`files.to_int8`). `load` always returns float32.
    state_dict : dict, optional
        Weights to save instead of the current ones, such as averaged weights.
    **more
        Additional entries, stored unchanged, such as a trainer's state or an accuracy.

    Raises
    ------
    InputError
        If the file cannot be written, or the model cannot be saved.
    """
    model = unwrapped(model)
    if model_classes().get(class_name(model)) is not type(model):
        raise InputError(f"a {type(model).__module__}.{class_name(model)} cannot be saved as a checkpoint; expected "
                         f"one of this library's classes (not a subclass): {', '.join(model_classes())}")
    _check_plain_weights(model)
    heads = {name: getattr(model, name) for name in ask(model, "head_names")}
    for head in heads.values():
        if not isinstance(head, (nn.Linear, nn.Identity)):
            raise InputError(f"a head of class {type(head).__name__} cannot be saved; expected a single nn.Linear")
    sizes = {name: getattr(head, "out_features", 0) for name, head in heads.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"the heads of this {class_name(model)} have different numbers of classes: "
                         f"{join_words(f'{name} {n}' for name, n in sizes.items())}; give all heads the same classes")
    config = replace(model.config, n_classes=max(sizes.values()))
    shown = model.preprocessing if preprocessing is None else preprocessing
    names = shown and shown.class_names
    if names and config.n_classes and len(names) != config.n_classes:
        raise InputError(f"{len(names)} class_names do not fit a head of {config.n_classes} classes; set "
                         f"one name per class in model.preprocessing")
    state = {key: value.detach().cpu() for key, value in _plain_names(state_dict or model.state_dict()).items()}
    for name, head in heads.items():
        if f"{name}.weight" in state and head.bias is None:  # a bias of zeros is equivalent
            state[f"{name}.bias"] = torch.zeros_like(state[f"{name}.weight"][:, 0])
    for name in ("class_names", "mean", "std", "interpolation"):
        if name in more:
            raise InputError(f"save_model got {name}={more[name]!r}; pass it in preprocessing=Preprocessing(...)")
    facts = {name: getattr(shown, name, None) for name in ("class_names", "mean", "std", "interpolation")}
    facts |= {name: list(facts[name]) for name in ("mean", "std") if facts[name] is not None}
    if dtype == torch.int8:
        state, more[SCALES] = to_int8(state)
    elif dtype is not None:
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    entries = dict(format=CHECKPOINT_FORMAT, model_class=class_name(model), config=vars(config), state_dict=state,
                   img_size=config.img_size, **facts, **more)
    write_whole(path, lambda file: torch.save(entries, file))


def _plain_names(state):
    """Remove the prefixes that torch.compile adds to the names in a state dict."""
    return {key.replace("_orig_mod.", ""): value for key, value in state.items()}


def _check_plain_weights(model):
    """Raise InputError if the model is on the meta device or is quantised."""
    device_of(model)  # raises InputError on the device "meta"
    if is_quantised(model):
        raise InputError(f"this {class_name(model)} is quantised, but a checkpoint holds floating-point weights; save "
                         f"the original model, and quantise it after load()")


def read_checkpoint(path):
    """Return the entries of a checkpoint as save_model wrote them, without executing any code in the file.

    Raises
    ------
    InputError
        If there is no file, or if save_model did not write it.
    """
    entries = read_file(path)
    if entries.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"{path} is not a checkpoint of this project; expected a file that train_vit.py or save_model "
                         f"wrote. To identify it, run `python train_vit.py inspect {path}`")
    return entries


def load(name_or_path, n_classes=None, class_names=None, **overrides):
    """Load a trained model, in eval mode, on the CPU and in float32, with its preprocessing.

    A public model is downloaded once, to torch.hub's folder of checkpoints.

    Parameters
    ----------
    name_or_path : str or path
        A pretrained model's name (`describe_pretrained` lists them); a checkpoint of this library, or of a ViT, DeiT,
        MAE, BEiT, Swin, ResNet or ConvNeXt in any of the FORMATS; or a folder that transformers' save_pretrained or
        timm's save_for_hf wrote. Files of pretraining with all their parts give a MaskedAutoencoder or a
        MaskedTokenModel, and MAE's encoder alone gives a VisionTransformer.
    n_classes : int, optional
        None keeps the checkpoint's head; a model without a head returns features (B, D). If a number is passed, a head
        with that many rows is kept, and any other head is replaced by one of zeros. An Assumption reports which, unless
        the head is kept and its classes have names.
    class_names : list of str, optional
        Names of the checkpoint's classes in the order of its outputs, if the file does not record them.
    **overrides
        img_size and a Swin's window_size (both resample the positions), in_channels (`adapt_input_channels`), dropout
        and drop_path; pool, for a public model without its own head; and fields that the file does not record, such as
        n_heads, pool or norm_eps. Any other field must match the weights.

    Returns
    -------
    Module
        The model. Its preprocessing is None if a checkpoint of this library records none.

    Raises
    ------
    InputError
        If a name or field is unknown, if a file cannot be downloaded or read, if weights and configuration do not
        match, or if classes are passed for a model that learned without labels. After a failed download, the message
        states the URL and where to save the file.

    Notes
    -----
    Values that neither the file nor a config.json or preprocessor_config.json in the same folder records are assumed,
    and one Assumption per file lists them (vit_bridge.errors).
    """
    name, weights = str(name_or_path), None
    overrides = {argument: tuple(value) if isinstance(value, list) else value for argument, value in overrides.items()}
    if name in PUBLIC:
        path, entry = fetch(name), PUBLIC[name]
        config = entry.model_class.config_class(**entry.arguments)
        grid = grid_of(pair(config.img_size), pair(config.patch_size)) if "patch_size" in entry.arguments else None
        found = Inferred(entry.model_class, config, entry.preprocessing, grid)
    else:
        path = OURS_FOLDER / f"{name}.pt" if name in OURS else _existing_file(name)
        weights = _read_weights(path)
        found = _inferred(weights, overrides)
        if weights.model is not None and n_classes is None and class_names is None and not overrides:
            _say(path, found.assumed, (), ours=True)
            return weights.model
    check_arguments(found.model_class, overrides)
    config = vars(found.config)
    own_head = n_classes is None or n_classes == config["n_classes"]
    pool = ["pool"] * (name in PUBLIC and "pool" in config and not (own_head and config["n_classes"]))
    free = [*(argument for argument in FREE if argument in config), *found.unrecorded, *pool]
    for argument, value in overrides.items():
        if argument not in free and value != config[argument]:
            raise InputError(f"{argument}={value!r} does not match {name}, which has {config[argument]!r}; with these "
                             f"weights you can change only {', '.join(free)} and n_classes")
    model = found.model_class(**config | overrides)
    if ask(model, "encoder") and not (n_classes is None and class_names is None):
        classes = f"n_classes={n_classes}" if class_names is None else f"class_names={listed(list(class_names))[1:]}"
        raise InputError(f"{classes} does not fit {name}, a whole {class_name(model)}, which learned without labels "
                         f"and has no head; use encoder = load({name!r}).encoder() and fit_head(encoder, classes), or "
                         f"train it with `python train_vit.py --pretrained {name}`")
    try:
        state, report = _fitted(weights or _read_weights(path), model, found.grid)
    except InputError as error:
        if name not in PUBLIC:
            raise
        raise InputError(f"{error}; if the download is incomplete, delete the file to download it "
                         f"again") from error
    model.load_state_dict(state)
    shown, n_channels = found.preprocessing, model.config.in_channels
    if shown is None and n_channels != found.config.in_channels:  # the assumed values are for the file's channels
        shown = images_of_ours(weights.model)
    if shown is not None:
        model.preprocessing = replace(shown, img_size=model.config.img_size)
        if n_channels != found.config.in_channels:
            model.preprocessing = model.preprocessing.with_channels(n_channels)
    if class_names is not None:
        shown = model.preprocessing = _with_names(images_of_ours(model), class_names, config["n_classes"], path)
    unsettled = _unsettled(weights) if weights else []  # a public model is fully described by its name
    _say(path, found.assumed, [*report.choices, *unsettled], ours=weights is not None and weights.model is not None)
    if n_classes is not None:
        line = fit_head(model, n_classes)
        if not (own_head and model.preprocessing.class_names):
            assume(f"{path}: {line}")
        if shown is None:
            model.preprocessing = None
    return model.eval()


def _with_names(preprocessing, class_names, n_classes, path):
    """Return a Preprocessing with these class names.

    Raises
    ------
    InputError
        If the file records different names, or if the number of names is not n_classes.
    """
    class_names, recorded = list(class_names), preprocessing.class_names
    if recorded is not None and list(recorded) != class_names:
        raise InputError(f"class_names differ from the names in {path}, {first_difference(class_names, recorded)}; "
                         f"omit class_names")
    if len(class_names) != n_classes:
        raise InputError(f"class_names has {len(class_names)} names{listed(class_names)}, but the head of {path} has "
                         f"{n_classes} outputs; pass one name per output, in order")
    return replace(preprocessing, class_names=class_names)


def _say(path, assumed, choices, ours=False):
    """Warn once per file about values that are not recorded, and about what was chosen or dropped."""
    parts = list(choices)
    if assumed:
        fields = [f"{name}=" for name, words in assumed.items() if words.startswith(f"{name}=")]
        ways = [f"load's {', '.join(fields)}"] * bool(fields) + ["--n-heads"] * ("n_heads" in assumed)
        ways.append(f"a {'config.json' if fields else 'preprocessor_config.json'} in the same folder")
        if ours:
            ways = ["save_model(model, path, preprocessing)"]
        parts.insert(0, f"not recorded, so assumed: {', '.join(assumed.values())}; to change this, use "
                        f"{' or '.join(ways)}")
    if parts:
        assume(f"{path}: {'; '.join(parts)}")


def _unsettled(weights):
    """Return [a note on what tensor names do not show], or [] if the format has none or there is a config.json."""
    return [weights.format.note] if weights.format.note and not weights.recorded.source else []


def _existing_file(name):
    """Return the path of a checkpoint; raise InputError, with the closest pretrained name, if there is none."""
    if Path(name).is_dir():
        return file_in(name)
    if not Path(name).is_file():
        close = closest_names(name, PRETRAINED)
        close = [known for known in close if name.lower() in known] or close[:1]
        what = f"there is no file {name}" if Path(name).suffix else f"there is no pretrained model or file {name!r}"
        advice = (f"did you mean {' or '.join(map(repr, close))}? `python train_vit.py inspect` lists all names"
                  if close else "use the path of a checkpoint, or a name that `python train_vit.py inspect` lists")
        raise InputError(f"{what}; {advice}")
    return name


def _model_of(entries, path):
    """Build the model that read_checkpoint's entries describe.

    Raises
    ------
    InputError
        If weights and configuration do not fit.
    """
    try:
        model = model_classes()[entries["model_class"]](**entries["config"])
        model.load_state_dict(entries["state_dict"])
        facts = {name: entries[name] for name in ("class_names", "mean", "std")}
        facts["interpolation"] = entries.get("interpolation")  # absent from older files
        if any(value is not None for value in facts.values()):
            known = {name: value for name, value in facts.items() if value is not None}
            if "mean" not in known and model.config.in_channels != 3:  # there is no standard mean and std for them
                known |= dict(mean=(0.0,) * model.config.in_channels, std=(1.0,) * model.config.in_channels)
            model.preprocessing = Preprocessing(entries["img_size"], **known)
    except Exception as error:
        raise InputError(f"{path} is damaged: its weights and its configuration do not match "
                         f"({first_line(error)})") from error
    return model.eval()


# ---- Into a model -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """A report of what load_checkpoint did with each tensor of a file; `str()` summarises it.

    Attributes
    ----------
    path, format : str
        The file, and the format of its tensor names.
    used : tuple of str
        Names in the file that were loaded.
    dropped : dict
        Names in the file that the model does not use, each with the reason.
    notes : tuple of str
        Differences between the file and the model, and what was done about them.
    heads : str
        A warning about the number of heads, if the file does not record it.
    choices : tuple of str
        The notes that also raise a warning.
    assumed : tuple of str
        Values that were assumed because the file does not record them, except the number of heads.
    """

    path: str
    format: str
    used: tuple
    dropped: dict
    notes: tuple
    heads: str = ""
    choices: tuple = ()
    assumed: tuple = ()

    def __str__(self):
        by_reason = {}
        for name, reason in self.dropped.items():
            by_reason.setdefault(reason, []).append(name)
        lines = [f"{self.path}: {self.format}; {len(self.used)} tensors loaded, {len(self.dropped)} dropped"]
        for reason, names in by_reason.items():
            lines.append(f"  dropped: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} ({reason})")
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  heads: {self.heads}"] if self.heads else []
        return "\n".join([*lines, *([f"  assumed: {', '.join(self.assumed)}"] if self.assumed else [])])


def load_checkpoint(model, path, grid_size=None):
    """Load weights into a model, from a save_model file, any of the FORMATS or the model's own state dict.

    Loading is strict: every tensor of the file is either used or dropped for a reason that the report states, and all
    shapes must match. Three things may differ. If the number of classes differs, the model keeps its own head. If the
    resolution or the windows differ, the positions are resampled. If the number of channels differs, the first
    convolution is adapted (`adapt_input_channels`). If the number of classes is the same and both the file and
    model.preprocessing have class names, the rows of the head are matched by name. Several heads are treated alike. A
    VisionTransformer takes the encoder of a MaskedAutoencoder's file, and a BEiT the blocks of a MaskedTokenModel's,
    whose shared table is copied to each block if the model has no shared one. For a wrapped model (torch.compile,
    DataParallel, AveragedModel), the weights go into the model inside.

    Parameters
    ----------
    model : Module
        A model of this library; it is changed in place.
    path : path
        The file, or a folder that transformers or timm wrote.
    grid_size : (int, int), optional
        Rows and columns of patches in training, if the file's number of positions fits several grids.

    Returns
    -------
    LoadReport

    Raises
    ------
    InputError
        If a tensor is missing, unexpected or has the wrong shape, or if the file cannot be read. The model is then
        unchanged.

    Notes
    -----
    Tensor shapes do not show the number of heads. Checkpoints of this library, Google's files and a config.json record
    it; for other files, an Assumption warns that the model's number may be wrong.
    """
    model = unwrapped(model)
    if not is_ours(model):
        raise InputError(f"a {class_name(model)} cannot be filled from a checkpoint; expected one of "
                         f"{', '.join(model_classes())}")
    _check_plain_weights(model)
    weights = _read_weights(path, model)
    state, report = _fitted(weights, model, grid_size)
    fixed = "pool" in weights.format.fixes and "fc_norm.weight" not in weights.tensors
    pool = weights.recorded.config.get("pool", "cls" if fixed else None)
    if pool and "head.weight" in weights.tensors and model.config.pool != pool:
        raise InputError(f"{path} is for a different architecture: its head expects pool={pool!r}, but the model has "
                         f"pool={model.config.pool!r}")
    model.load_state_dict({key: state[key.replace("_orig_mod.", "")] for key in model.state_dict()})
    _say(path, {}, [*([f"heads: {report.heads}"] if report.heads else []), *report.choices, *_unsettled(weights)])
    return report


def _read_weights(path, model=None):
    """Read a file, or the file in a folder, as Weights; the tensor names of `model` are also recognised."""
    path = file_in(path) if Path(path).is_dir() else path
    entries = read_file(path)
    if entries.get("format") == CHECKPOINT_FORMAT:
        other = _model_of(entries, path)
        if model is not None:
            _check_same_kind(other, model, path)
        weights = _own_names("ours", path, [], other.state_dict())
        _drop_pretraining(weights, class_name(other), model)
        weights.model = other
        if other.preprocessing is not None:
            weights.recorded = Recorded(images=dict(class_names=other.preprocessing.class_names))
        return weights
    own = None if model is None or model.config_class in [model_classes()[name].config_class for name in VITS] else \
        _plain_names(model.state_dict())
    held = model is None or any(known.holds == class_name(model) for known in FORMATS)
    state, around, taken = unwrap(entries, path, lambda names: bool(_models_among(names, own)
                                                                    or (held and _models_among(names, None))))
    found = {} if own is None else _models_among(state, own)
    if found or (own is not None and not held):
        prefix, choice = chosen_prefix(found, state, path) if found else ("", "")
        if {*under(prefix, state)} - {"n_averaged"} != own.keys():
            raise InputError(f"{path} is for a different architecture: its tensors, such as {next(iter(state))}, do "
                             f"not belong to a {class_name(model)}; build the model that the file was saved from")
        around = [*around, *re.findall(r"[^./]*[./]", prefix)]
        weights = _own_names(f"state dict of a {class_name(model)}", path, around,
                             {name: state[prefix + name] for name in under(prefix, state)})
        drop_outside(weights, prefix, state)
        weights.choices += [text for text in (taken, choice, beside(weights.dropped)) if text]
        return weights
    try:
        weights = translate(state, path, around)
    except InputError:
        raise
    except Exception as error:  # tensors with an unexpected number of dimensions
        raise InputError(f"{path} is damaged or in an unknown format ({first_line(error)})") from error
    kind = weights.format.holds
    if model is not None:
        _check_parts(kind, model, path)
        if kind not in _classes(model) and not _inside(kind, model):
            raise InputError(f"{path} is for a different architecture: it is a {kind} ({weights.format.name}), but the "
                             f"model is a {class_name(model)}; use load(path), which builds the matching model")
    _drop_pretraining(weights, kind, model)
    weights.recorded = recorded = read_recorded(path, weights.format.library, kind)
    if kind == "MaskedAutoencoder":
        recorded.config.update(pixel_settings_in(entries) | recorded.config)
    heads = recorded.config.get("n_heads", weights.n_heads)
    if weights.n_heads not in (None, heads):
        raise InputError(f"{recorded.source} specifies {heads} heads, but the tensors of {path} have "
                         f"{weights.n_heads}; {MEND}")
    weights.n_heads = heads
    weights.choices += [*([taken] if taken else []), *recorded.notes]
    head = weights.tensors.get("head.weight")
    if "class_names" not in recorded.images and head is not None and head.ndim == 2:
        key, names = class_names_in(entries, len(head))
        if names:
            recorded.images["class_names"] = names
            weights.choices.append(f"class names: taken from {key!r} in the file")
    return weights


def _models_among(names, own):
    """Return {prefix: ...} for the models found in names, with the tensor names `own` or, if None, of any format."""
    if own is None:
        try:
            return recognise(names, "")
        except InputError:
            return {}
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in names if name.endswith(first)]
    return {prefix: None for prefix in prefixes if own.keys() <= {*under(prefix, names)}}


def _own_names(kind, path, around, state):
    """Return Weights under the model's own tensor names."""
    tensors = {name: tensor for name, tensor in state.items() if name != "n_averaged"}
    dropped = {name: "the step counter of an averaged model" for name in state.keys() - tensors.keys()}
    return Weights(str(path), Format(kind, "", norm_eps=None), around, tensors, {name: [name] for name in tensors},
                   dropped)


def _classes(model):
    """Return the names of a model's class and its base classes."""
    return [cls.__name__ for cls in type(model).__mro__]


def _inside(kind, model):
    """Return the Pretraining of a file's class if the model is what remains without those parts, or None."""
    known = PRETRAINING_PARTS.get(kind)
    return known if known and model is not None and kind not in _classes(model) and known.inner in _classes(model) \
        else None


def _check_parts(kind, model, path):
    """Raise InputError if a model has parts of pretraining that a file of this class lacks."""
    own = next((name for name in _classes(model) if name in PRETRAINING_PARTS), None)
    if own and kind == PRETRAINING_PARTS[own].inner:
        raise InputError(f"{path} has {PRETRAINING_PARTS[own].lacks}; use load(path), which builds the {kind} that it "
                         f"holds")


def _drop_pretraining(weights, kind, model):
    """Drop the parts of pretraining that the model does not have, and put the last norm where the model has it."""
    known = _inside(kind, model)
    for name in [name for name in weights.tensors if known and re.fullmatch(known.parts, name)]:
        weights.dropped |= dict.fromkeys(weights.sources.pop(name), known.reason)
        del weights.tensors[name]
    if known and known.inner == "BEiT" and model.config.fc_norm:  # as in MaskedTokenModel.encoder
        for name in [name for name in weights.tensors if name.startswith("norm.")]:
            for place in (weights.tensors, weights.sources):
                place[f"fc_{name}"] = place.pop(name)
        weights.choices.append("norm: the file's last norm stands before the mean, the model's after it")


def _check_same_kind(other, model, path):
    """Raise InputError if a model differs from the file's model in a way that tensor shapes do not show."""
    _check_parts(class_name(other), model, path)
    part = _inside(class_name(other), model)
    if model.config_class is not other.config_class and part is None:
        raise InputError(f"{path} holds a {type(other).__name__}, but the model is a {class_name(model)}; use "
                         f"load(path), which builds the matching model")
    for name in ("n_heads", "norm_eps") if part else WITHOUT_SHAPE:
        theirs, ours = getattr(other.config, name, None), getattr(model.config, name, None)
        if theirs != ours:
            raise InputError(f"{path} is for a different architecture: {name} is {theirs} in the file, but {ours} in "
                             f"the model; use load(path), which builds the matching model")


def _fitted(weights, model, grid_size=None, advise=True):
    """Return (state dict for the model, LoadReport).

    If `advise` is set, an error mentions the command that inspects the file.

    Raises
    ------
    InputError
        If the weights do not fit.
    """
    try:
        return fit(weights, model, grid_size)
    except InputError as error:
        hint = f"; to identify the file, run `python train_vit.py inspect {weights.path}`"
        raise InputError(f"{error}{hint if advise and '; ' not in str(error) else ''}") from error
    except Exception as error:  # tensors with an unexpected number of dimensions
        raise InputError(f"{weights.path} is damaged: its tensors do not fit together ({first_line(error)})") from error


def fit(weights, model, grid_size):
    """Implement `_fitted` for tensors with the expected numbers of dimensions."""
    expected, notes = _plain_names(model.state_dict()), [weights.format.note] if weights.format.note else []
    choices, recorded = list(weights.choices), weights.recorded.config
    if weights.around:
        notes.append(f"the weights are under {' / '.join(weights.around)}")
    if weights.n_heads not in (None, getattr(model.config, "n_heads", None)):
        raise InputError(f"{weights.path} is for a different architecture: n_heads is {weights.n_heads} in the file, "
                         f"but {model.config.n_heads} in the model")
    eps = recorded.get("norm_eps", weights.format.norm_eps)
    if eps not in (None, getattr(model.config, "norm_eps", None)):
        choices.append(f"norms: the file's library uses norm_eps={eps} by default, but the model has "
                       f"{model.config.norm_eps}; build it with norm_eps={eps} to match")
    of_mae = {name: vars(model.config)[name] for name in OF_MAE if name in vars(model.config)}
    for name, ours in of_mae.items():
        if recorded.get(name, ours) != ours:
            raise InputError(f"{weights.path} is for a different architecture: {name} is {recorded[name]} in the file, "
                             f"but {ours} in the model; build it with {name}={recorded[name]}")
    choices += _match_head(weights, model, expected)
    choices += _match_channels(weights, model)
    notes += _fit_positions(weights, model, grid_size) + _share_table(weights, expected)
    notes += _fit_tables(weights, model, grid_size)
    choices += [note for note in notes
                if any(mark in note for mark in (": resampled", "transformers swaps", "grid_size="))]
    notes += [choice for choice in choices if choice not in notes]
    tensors = weights.tensors
    headless = not _heads_in(tensors, model)  # the model then keeps its own heads
    missing = [name for name in expected if name not in tensors and not (headless and _of_heads([name], model))
               and not name.endswith(".num_batches_tracked")]  # unused, and missing in old files
    extra = [name for name in tensors if name not in expected]
    for wrong, where in ((extra, "the file has {}, which the model does not have"), (missing, "the file lacks {}")):
        if wrong:
            name = weights.sources[wrong[0]][0] if wrong is extra else wrong[0]
            more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
            raise InputError(f"{weights.path} is for a different architecture: {where.format(name + more)}"
                             f"{_advice(wrong[0], weights)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise InputError(f"{weights.path} is for a different architecture: {weights.sources[name][0]} has shape "
                             f"{tuple(tensor.shape)} in the file, but {tuple(expected[name].shape)} in the "
                             f"model{_advice(name, weights)}")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise InputError(f"{weights.path} is damaged or quantised: {weights.sources[name][0]} is {tensor.dtype}, "
                             f"expected {expected[name].dtype}")
    state = {**expected, **{name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}}
    used = tuple(dict.fromkeys(name for ours in tensors for name in weights.sources[ours]))
    heads = ""
    if weights.model is None and weights.n_heads is None and ask(model, "attends"):
        heads = (f"the file does not record their number; the model's {model.config.n_heads} are correct only if the "
                 f"weights were trained with {model.config.n_heads}")
    unknown = [f"{name}={ours}" for name, ours in of_mae.items() if weights.model is None and name not in recorded]
    if unknown:
        heads += f"{'; ' * bool(heads)}nothing in the file shows whether {' and '.join(unknown)} fits"
    return state, LoadReport(weights.path, weights.format.name, used, weights.dropped, tuple(notes), heads,
                             tuple(choices))


def _advice(name, weights):
    """Return "; " and how to build a model that fits this tensor, or "" if the tensor does not show it."""
    there = name in weights.tensors
    if re.search(r"\.ls[12]\.", name):
        return f"; build the model with layer_scale={1e-5 if there else None}"
    if re.search(r"attn\.[qk]_norm\.", name):
        return f"; build the model with qk_norm={there}"
    if name.startswith("fc_norm."):
        return "; build the model with pool='mean', fc_norm=True" if there else "; build the model with fc_norm=False"
    if name == "reg_token":
        return f"; build the model with n_registers={weights.tensors[name].shape[1] if there else 0}"
    if re.match(rf"stages\..*{TABLE}", name):
        return f"; build the model with relative_bias={there}"
    if re.match(rf"blocks\..*{TABLE}", name) and there:
        return "; build the model with shared_bias=False"
    return ""


def adapt_input_channels(weight, n_channels):
    """Adapt the kernel of a first convolution to images with a different number of channels.

    Parameters
    ----------
    weight : Tensor, shape (D, C, h, w)
        The kernel.
    n_channels : int
        Channels of the new images.

    Returns
    -------
    Tensor, shape (D, n_channels, h, w)
        For one channel, the sum over the colours: a grey image then gives the same output as its RGB version if all
        channels share one mean and std, and nearly the same with ImageNet's. From 3 to 4 channels, the alpha channel
        gets zeros. Otherwise, the channels are repeated in turn and scaled by C / n_channels, as in timm, which
        preserves the magnitude of the sum.
    """
    C = weight.shape[1]
    if n_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    if (C, n_channels) == (3, 4):
        return torch.cat([weight, torch.zeros_like(weight[:, :1])], dim=1)
    return weight[:, [i % C for i in range(n_channels)]] * (C / n_channels)


def _match_channels(weights, model):
    """Adapt the first convolution to the model's channels, and return notes."""
    layer = next((layer for layer in model.layers()[0].modules() if isinstance(layer, nn.Conv2d)), None)
    name = next((name for name, parameter in model.named_parameters() if layer and parameter is layer.weight), None)
    theirs = weights.tensors.get(name)
    if theirs is None or theirs.ndim != 4 or theirs.shape[1] == layer.weight.shape[1] or (
            theirs.shape[:1] + theirs.shape[2:] != layer.weight.shape[:1] + layer.weight.shape[2:]):
        return []
    n_channels = layer.weight.shape[1]
    weights.tensors[name] = adapt_input_channels(theirs, n_channels)
    how = f"repeated in turn, times {theirs.shape[1]}/{n_channels}"
    if n_channels == 1:
        how = "summed"
    elif (theirs.shape[1], n_channels) == (3, 4):
        how = "zeros for the transparency"
    return [f"channels: the weights for {theirs.shape[1]} channels were adapted to {n_channels} ({how})"]


def _of_heads(names, model):
    """Return the names that belong to the model's heads."""
    return [name for name in names if name.split(".")[0] in ask(model, "head_names")]


def _heads_in(tensors, model):
    """Return the names of the weights and biases of the model's heads that are among the tensors."""
    names = [f"{head}.{kind}" for head in ask(model, "head_names") for kind in ("weight", "bias")]
    return [name for name in names if name in tensors]


def _match_head(weights, model, expected):
    """Match the file's heads to the model's, and return notes; heads that do not fit are all dropped."""
    found = list(dict.fromkeys(name.split(".")[0] for name in _heads_in(weights.tensors, model)))
    if not found:
        has_head = _of_heads(expected, model)
        return ["head: the file has none, so the model keeps its own, which is untrained"] if has_head else []
    ways = [_matched_head(weights, model, expected, head) for head in found]
    reason, (_, rows, line) = next((way[0] for way in ways if way[0]), ""), ways[0]
    if reason:
        as_wide = all(weights.tensors[f"{head}.weight"].shape[1] == model.n_features for head in found)
        for name in _heads_in(weights.tensors, model):
            weights.dropped[weights.sources.pop(name)[0]] = reason
            del weights.tensors[name]
        if _heads_in(expected, model):
            return [f"head: the model keeps its own, which is untrained, because the file's head {reason}"]
        return [] if as_wide else [f"head: the file's head was dropped, because it {reason}"]
    for name in _heads_in(weights.tensors, model) if rows else ():
        tensor = weights.tensors[name]
        weights.tensors[name] = expected[name].detach().to(tensor, copy=True)
        for i, row in enumerate(rows):
            if row is not None:
                weights.tensors[name][i] = tensor[row]
    return [line] if rows else []


def _matched_head(weights, model, expected, head):
    """Compare one head with the model's; return (why it does not fit or "", its row for each class or None, a note).

    The rows and the note are None if the head fits as it is.
    """
    names = [f"{head}.weight", f"{head}.bias"]
    theirs = {name: weights.tensors[name] for name in names if name in weights.tensors}
    wanted = expected.get(f"{head}.weight")
    weight, bias = theirs.get(f"{head}.weight"), theirs.get(f"{head}.bias")
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(f"{weights.sources[name][0]} {tuple(tensor.shape)}" for name, tensor in theirs.items())
        raise InputError(f"{weights.path} is damaged: the weight and bias of its head do not fit together ({shapes})")
    if bias is None and f"{head}.bias" in expected:  # equivalent to a bias of zeros
        weights.tensors[f"{head}.bias"] = theirs[f"{head}.bias"] = torch.zeros(len(weight))
        weights.sources[f"{head}.bias"] = weights.sources[f"{head}.weight"]
    if wanted is None and weight.shape[1] != model.n_features:
        return f"reads {weight.shape[1]} features, but the model has {model.n_features}", None, None
    if wanted is None:
        return "the model has no head, or one that is not an nn.Linear", None, None
    if any("pre_logits" in name for name in weights.dropped):
        return "reads the output of a layer that was dropped", None, None
    if weight.shape[1] != wanted.shape[1]:
        return f"reads {weight.shape[1]} features, but the model's head reads {wanted.shape[1]}", None, None
    if len(weight) != len(wanted):
        return f"has {len(weight)} classes, but the model's head has {len(wanted)}", None, None
    if theirs.keys() != {name for name in expected if name.startswith(f"{head}.")}:
        return "has a bias, but the model's head has none", None, None
    names, own = weights.recorded.images.get("class_names"), model.preprocessing and model.preprocessing.class_names
    if not names or not own or not len(names) == len(own) == len(weight):
        return "", None, None
    rows, line = match_names(names, own)
    if rows == list(range(len(weight))):
        return "", None, None
    if any(row is not None for row in rows):
        return "", rows, line
    return f"is for different classes from the model's, {first_difference(names, own)}", None, None


def _fit_positions(weights, model, grid_size):
    """Fit the positions to the model's grid and its CLS token, and return notes."""
    theirs, grid = weights.tensors.get("pos_embed"), getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or theirs is None:
        return []
    if model.pos_embed is None:
        raise InputError(f"{weights.path} is for a different architecture: it has positions, but the model was built "
                         f"with position='none'; build it with position='learned'")
    D = model.config.embed_dim
    if theirs.ndim != 3 or theirs.shape[0] != 1 or theirs.shape[2] != D:
        raise InputError(f"{weights.path} is for a different architecture: {weights.sources['pos_embed'][0]} is "
                         f"{tuple(theirs.shape)} in the file, but {tuple(model.pos_embed.shape)} in the model")
    old, n_prefix, notes = _read_grid(weights, grid, grid_size)
    n_own, wanted = model.n_cls_tokens, model.n_prefix_positions
    n_cls = min(n_prefix, n_own)  # positions of the file that belong to CLS tokens of the model
    if n_prefix > n_own:
        _add_to_token(weights, "reg_token", theirs[:, n_own:n_prefix])
        notes.append("positions: the registers' positions were added to the register tokens")
    if n_cls > wanted:
        _add_to_token(weights, "cls_token", theirs[:, :1])
        notes.append("positions: the position of CLS was added to the CLS token, because a model with registers has "
                     "no position for it")
    if n_cls < wanted:
        notes.append(f"positions: the file has none for {'a second token' if n_cls else 'CLS'}, so zeros are used")
    first = torch.cat([theirs[:, :n_cls], theirs.new_zeros(1, n_own - n_cls, D)], dim=1)  # (1, CLS tokens, D)
    theirs = torch.cat([first[:, :wanted], theirs[:, n_prefix:]], dim=1)  # (1, wanted + patches, D)
    if "decoder_pos_embed" in weights.tensors:  # a buffer of our MaskedAutoencoder
        _check_sincos(weights, "decoder_pos_embed", weights.tensors["decoder_pos_embed"], old, model.n_prefix_tokens,
                      "which the decoder adds to its tokens")
        weights.tensors["decoder_pos_embed"] = model.decoder_pos_embed
    if model.config.position == "sincos":
        _check_sincos(weights, "pos_embed", theirs, old, wanted, "but the model was built with position='sincos'; "
                                                                 "build it with position='learned'")
        theirs = model.pos_embed  # the same sines and cosines, on the model's grid
    elif old != grid:
        theirs = resample_positions(theirs, old, grid)
        notes.append(f"positions: resampled from a grid of {old[0]}x{old[1]} to {grid[0]}x{grid[1]} patches")
    weights.tensors["pos_embed"] = theirs
    return notes


def _check_sincos(weights, name, positions, grid, n_prefix, need):
    """Raise InputError unless positions are the fixed ones of this grid; `need` says why they have to be."""
    fixed = sincos_positions(grid, positions.shape[-1], n_prefix)
    if positions.shape != fixed.shape or not torch.allclose(positions.float(), fixed, atol=1e-3):
        raise InputError(f"{weights.path} is for a different architecture: {weights.sources[name][0]} does not hold "
                         f"the fixed sines and cosines of {grid[0]}x{grid[1]} patches, {need}")


def _share_table(weights, expected):
    """Copy a table that all blocks share to each block if the model has no shared one, and return notes."""
    shared, own = f"rel_pos_bias.{TABLE}", f"blocks.{{}}.attn.{TABLE}"
    depth = len([name for name in expected if re.fullmatch(own.format(r"\d+"), name)])
    if shared not in weights.tensors or not depth:
        return []
    weights.tensors, source = copy_shared_table(weights.tensors, depth), weights.sources.pop(shared)
    weights.sources |= {own.format(i): source for i in range(depth)}
    return [f"positions: the table of relative positions, which the file's blocks share, was copied to each of the "
            f"{depth} blocks"]


def _fit_tables(weights, model, grid_size=None):
    """Fit the tables of relative positions to the model's windows, or a BEiT's grid of patches, and return notes."""
    changes, notes = {}, []
    for place, module in model.named_modules():
        name, own = f"{place.replace('_orig_mod.', '')}.{TABLE}", getattr(module, TABLE, None)
        theirs = weights.tensors.get(name)
        if own is None or theirs is None or theirs.ndim != 2:
            continue
        new = _grid_at(model, place)
        n_last = len(own) - n_offsets(new)  # a BEiT's table ends with 3 rows for CLS
        n = len(theirs) - n_last
        if weights.model is not None:
            grids = [_grid_at(weights.model, name.rpartition(".")[0])]
        else:
            square = ((math.isqrt(max(n, 0)) + 1) // 2,) * 2
            grids = [tuple(grid_size)] if grid_size and n_last else [new, square]
        fits = [grid for grid in dict.fromkeys(grids) if n_offsets(grid) == n]
        if not fits:
            what, how = ("grid", "image size, or pass grid_size=") if n_last else ("window", "image size and "
                                                                                   "window_size")
            raise InputError(f"{weights.path} is for a different architecture: {weights.sources[name][0]} has {n} "
                             f"offsets, which belong to no square {what}, and the model's {what}s of {new[0]}x{new[1]} "
                             f"have {n_offsets(new)}; build the model with the {how} of the training")
        old = fits[0]
        weights.tensors[name] = resample_bias_table(theirs, old, new)
        changes |= {(old, new): None} if old != new else {}
        if n_last and fits[1:]:
            notes.append(f"positions: {n} offsets fit {old[0]}x{old[1]} or {fits[1][0]}x{fits[1][1]} patches; the "
                         f"first is used; to choose another, pass grid_size= to load_checkpoint")
        if n_last and old[0] != old[1] and weights.format.library == "transformers":
            notes.append("positions: transformers swaps height and width of the tables if the grid is not square, so "
                         "its own logits differ")
    what = "tokens" if ask(model, "windowed") else "patches"
    return [*(f"bias tables: resampled from {'windows' if what == 'tokens' else 'grids'} of {old[0]}x{old[1]} to "
              f"{new[0]}x{new[1]} {what}" for old, new in changes), *dict.fromkeys(notes)]


def n_offsets(grid):
    """Return the number of offsets between two positions of a grid (rows, columns)."""
    return math.prod(2 * side - 1 for side in grid)


def _grid_at(model, place):
    """Return the grid of the table at this place in a model; a table that all blocks share has the model's grid."""
    return getattr(model.get_submodule(place), "grid_size", None) or model.patch_embed.grid_size


def _add_to_token(weights, name, positions):
    """Add positions to the token that they belong to; raise InputError if it is missing."""
    token = weights.tensors.get(name)
    if token is None or token.shape != positions.shape or not token.is_floating_point():
        raise InputError(f"{weights.path} is damaged: it has {positions.shape[1]} positions for {name}, which is "
                         f"{'missing' if token is None else (*token.shape, token.dtype)}")
    weights.tensors[name] = token + positions


def _read_grid(weights, grid=None, given=None):
    """Find the grid of the positions in a file; return ((rows, columns), number of prefix positions, notes).

    A save_model file records it. For other files, it is the grid `given`, or the first that fits the number of
    positions: the model's grid, then a square.

    Raises
    ------
    InputError
        If no grid fits.
    """
    M = weights.tensors["pos_embed"].shape[1]
    if weights.model is not None:
        rows, columns = weights.model.patch_embed.grid_size
        return (rows, columns), M - rows * columns, []
    registers = weights.tensors.get("reg_token")
    n_registers = 0 if registers is None or registers.ndim != 3 else registers.shape[1]
    n_cls = 1 + ("dist_token" in weights.tensors)
    prefixes = {True: [n_cls], False: [0], None: [n_cls + n_registers, 0]}[weights.format.pos_cls]
    if n_registers and weights.format.holds == "MaskedAutoencoder":  # ours: the paper's has no registers
        prefixes = [0]
    grids = [tuple(given)] if given else [grid] if grid else []
    ways = [(known, n) for known in grids for n in prefixes if known[0] * known[1] == M - n]
    if not given:
        sides = [(math.isqrt(max(M - n, 0)), n) for n in prefixes]
        ways += [((side, side), n) for side, n in sides if side and side * side == M - n]
    ways = list(dict.fromkeys(ways))
    if not ways:
        tried = [f"the grid {rows}x{columns}" for rows, columns in grids] + ["a square grid"] * (not given)
        wanted = " or ".join(tried)
        raise InputError(f"{weights.path} has {M} positions, which do not fit {wanted} with "
                         f"{' or '.join(map(str, prefixes))} prefix token{'s' * (prefixes != [1])}; set the "
                         f"image size used in training with load(..., img_size=(height, width)) or --img-size HEIGHT "
                         f"WIDTH, or the grid with load_checkpoint(..., grid_size=(rows, columns))")
    texts = [f"{rows}x{columns} patches and {n} prefix token{'s' * (n != 1)}" for (rows, columns), n in ways]
    notes = [f"positions: {M} fit {' or '.join(texts)}; the first is used; to choose another, pass "
             f"grid_size= to load_checkpoint"] if ways[1:] else []
    return *ways[0], notes


# ---- What a file is ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """A description of a checkpoint; `str()` formats it in a few lines.

    Attributes
    ----------
    report : LoadReport
        Report of loading the file into a matching model.
    model_class : str
        Class of that model.
    config : dataclass
        Configuration of that model.
    n_parameters : int
        Number of parameters.
    preprocessing : Preprocessing or None
        How its input images must be preprocessed; None if a checkpoint of this library does not record it.
    """

    report: LoadReport
    model_class: str
    config: object
    n_parameters: int
    preprocessing: Preprocessing | None = None

    def __str__(self):
        usual = {f.name: f.default for f in fields(self.config)}  # HybridCNNViT overrides some defaults
        arguments = signature(model_classes()[self.model_class]).parameters
        usual |= {name: argument.default for name, argument in arguments.items() if name in usual}
        settings = {name: value for name, value in vars(self.config).items() if value != usual[name]}
        lines, shown = [str(self.report)], self.preprocessing
        if shown is not None:
            mean, std = (", ".join(f"{number:.4g}" for number in numbers) for numbers in (shown.mean, shown.std))
            lines.append(f"  images: {'x'.join(map(str, shown.size))} pixels, {shown.interpolation}, mean {mean}, std "
                         f"{std}{_in_short(shown.class_names)}")
        return "\n".join([*lines, f"  {self.n_parameters:,} parameters. Load it with", "",
                          f"    model = {self.model_class}({', '.join(f'{k}={v!r}' for k, v in settings.items())})",
                          f"    load_checkpoint(model, {self.report.path!r})"])


def _in_short(names):
    """Format class names in a few words."""
    if not names:
        return "; no class names"
    return f"; {len(names)} classes: {', '.join(map(str, names[:5]))}{', ...' if names[5:] else ''}"


def describe_checkpoint(path, **given):
    """Describe a file and how it would load, without loading it into a model.

    Only the contents of the file take up memory: for files of other libraries, the model is built on the meta device.

    Parameters
    ----------
    path : path
        The file, or a folder that transformers or timm wrote.
    **given
        Values that the file does not record, as for `load`, such as n_heads.

    Returns
    -------
    Description

    Raises
    ------
    InputError
        If the file cannot be loaded; the message states why.
    """
    weights = _read_weights(path)
    found, model = _inferred(weights, given), weights.model
    for argument, value in given.items():
        if argument not in found.unrecorded and value != getattr(found.config, argument):
            raise InputError(f"{argument}={value!r} does not match {path}, which has "
                             f"{getattr(found.config, argument)!r}; omit it")
    if model is None:
        with torch.device("meta"):
            model = found.model_class(**vars(found.config))
    _, report = _fitted(weights, model, found.grid, advise=False)
    n_parameters = sum(p.numel() for p in model.parameters())
    assumed = {name: words for name, words in found.assumed.items() if name != "n_heads"}
    guess = f"the file does not record their number; {found.config.n_heads} is a guess (" \
            f"{found.config.embed_dim // found.config.n_heads} channels each), and any divisor of " \
            f"{found.config.embed_dim} loads; set it with n_heads= or --n-heads" if "n_heads" in found.assumed else ""
    report = replace(report, heads=guess, assumed=tuple(assumed.values()))
    return Description(report, class_name(model), model.config, n_parameters, found.preprocessing)


@dataclass(frozen=True)
class Inferred:
    """The model inferred from a file.

    Attributes
    ----------
    model_class : type
        Its class.
    config : dataclass
        Its configuration.
    preprocessing : Preprocessing or None
        How its input images must be preprocessed; None if a checkpoint of this library does not record it.
    grid : (int, int) or None
        Rows and columns of patches in the file; None for the model's own grid.
    assumed : dict
        Values that were assumed: {field of the configuration, or "images": a description of the value}.
    unrecorded : tuple of str
        Fields that the file does not record, so the caller may choose them.
    """

    model_class: type
    config: object
    preprocessing: Preprocessing | None
    grid: tuple | None = None
    assumed: dict = field(default_factory=dict)
    unrecorded: tuple = ()


def _inferred(weights, given):
    """Infer the model that a file fits.

    `given` is {field of the configuration: the caller's value}, used for fields that the file does not record.

    Raises
    ------
    InputError
        If no model fits.
    """
    if weights.model is not None:
        shown, assumed = weights.model.preprocessing, {}
        if shown is None:
            used = images_of_ours(weights.model)
            numbers = "ImageNet's mean and std" if used.mean == IMAGENET_MEAN else f"mean {used.mean[0]:g} and std " \
                                                                                   f"{used.std[0]:g}"
            assumed["images"] = f"{numbers}, {used.interpolation} resizing"
        return Inferred(type(weights.model), weights.model.config, shown, assumed=assumed)
    try:
        return (infer_staged if weights.format.holds in STAGED_CONFIGS else infer_vit)(weights, given)
    except InputError:
        raise
    except (ArithmeticError, ValueError, IndexError, TypeError, StopIteration) as error:
        raise InputError(f"{weights.path} ({weights.format.name}) has tensor shapes that match no model "
                         f"({first_line(error)})") from error


def infer_vit(weights, given):
    """Infer a VisionTransformer, or one of the classes that extend it, from its weights."""
    tensors, recorded, model_class = weights.tensors, weights.recorded.config, model_classes()[weights.format.holds]
    needed = ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    heads = [f"{head}.weight" for head in model_class.head_names]  # all of them, or none
    needed += tuple(heads) if any(name in tensors for name in heads) else ()
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise InputError(f"{weights.path} ({weights.format.name}) is not a complete ViT: {', '.join(missing)} missing")
    D, C, *patch = tensors["patch_embed.proj.weight"].shape
    blocks = {int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name)}
    if blocks != set(range(len(blocks))):
        raise InputError(f"{weights.path} ({weights.format.name}) is not a complete ViT: it has {len(blocks)} blocks, "
                         f"numbered up to {max(blocks)}")
    hidden, head = len(tensors["blocks.0.mlp.fc1.weight"]), tensors.get("head.weight")
    ratio = next(r for r in (hidden / D, math.nextafter(hidden / D, math.inf)) if int(D * r) == hidden)
    shown = dict(embed_dim=D, depth=len(blocks), patch_size=one_side(tuple(patch)), in_channels=C, mlp_ratio=ratio)
    if head is not None and head.ndim == 2 and head.shape[1] == D:
        shown["n_classes"] = len(head)
    if "fc_norm.weight" in tensors:
        shown["pool"] = "mean"
    shown |= _shown_in_pretraining(weights)
    for name, value in shown.items():
        theirs = recorded.get(name, value)
        if int(theirs * D) != hidden if name == "mlp_ratio" else theirs != value:
            raise InputError(f"{weights.recorded.source} specifies {name}={theirs!r}, but the tensors of "
                             f"{weights.path} have {value!r}; {MEND}")
    grid, assumed = _infer_grid(weights, patch, given)
    n_heads = _likely_heads(D)
    pool = "mean" if weights.format.holds == "MaskedTokenModel" else "cls"  # of features; nothing else reads it
    guesses = dict(n_heads=(n_heads, f"n_heads={n_heads} ({D // n_heads} channels each)"), pool=(pool, f"{pool=}"),
                   norm_eps=(weights.format.norm_eps, f"norm_eps={weights.format.norm_eps}"))
    if weights.format.holds == "MaskedAutoencoder":
        guesses |= _guesses_for_mae(weights, shown["decoder_dim"])
    known = {name: guesses[name][0] for name in weights.format.fixes} | recorded | shown
    known |= dict(n_heads=weights.n_heads) if weights.n_heads else {}
    if pool == "mean":
        known["pool"] = pool  # transformers' config.json has another one for its classifiers
    unrecorded = [name for name in guesses if name not in known]
    settings = {name: known.get(name, given.get(name, guess)) for name, (guess, _) in guesses.items()}
    assumed = {name: guesses[name][1] for name in unrecorded if name not in given} | assumed
    img_size = one_side(tuple(n * side for n, side in zip(grid, patch, strict=True)))
    position = "sincos" if "decoder_pos_embed" in tensors else "learned" if "pos_embed" in tensors else "none"
    config = model_class.config_class(
        **{"n_classes": 0, **shown, **settings}, img_size=img_size, position=position,
        n_registers=tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in tensors else None, qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        fc_norm="fc_norm.weight" in tensors)
    if D % config.n_heads:
        where = f" specified in {weights.recorded.source}" if "n_heads" in recorded else ""
        raise InputError(f"the width {D} of {weights.path} is not divisible by the {config.n_heads} heads{where}; "
                         f"expected a divisor of {D}")
    preprocessing, words = _infer_preprocessing(weights, img_size, config)
    assumed |= dict(images=words) if words else {}
    return Inferred(model_class, config, preprocessing, grid, assumed, tuple(unrecorded))


def _shown_in_pretraining(weights):
    """Return the fields of MAEConfig, BEiTConfig or MaskedTokenConfig that the tensors show, besides the encoder's."""
    tensors, shown = weights.tensors, {}
    if weights.format.holds == "MaskedAutoencoder":
        blocks = {name.split(".")[1] for name in tensors if name.startswith("decoder_blocks.")}
        shown = dict(decoder_dim=len(tensors["decoder_embed.weight"]), decoder_depth=len(blocks))
    if weights.format.holds in BEITS:
        shown["shared_bias"] = f"rel_pos_bias.{TABLE}" in tensors
    if weights.format.holds == "MaskedTokenModel":
        shown["n_tokens"] = len(tensors["lm_head.weight"])
    return shown


def _guesses_for_mae(weights, decoder_dim):
    """Return {field that the tensors of an MAE do not show: (assumed value, its description)}.

    The paper's decoder has 32 channels in each head. Of the authors' files, only those called mae_visualize predict
    plain pixels.
    """
    n_heads, plain = _likely_heads(decoder_dim, 32), "visualize" in Path(weights.path).name
    why = "the authors' mae_visualize files have False, their others True"
    return dict(decoder_heads=(n_heads, f"decoder_heads={n_heads} ({decoder_dim // n_heads} channels each)"),
                mask_ratio=(0.75, "mask_ratio=0.75"), norm_pix_loss=(not plain, f"norm_pix_loss={not plain} ({why})"))


def infer_staged(weights, given):
    """Infer a ConvNet, ConvNeXt or SwinTransformer from its weights, which do not show the image size."""
    config, recorded, assumed = STAGED_CONFIGS[weights.format.holds](weights), weights.recorded.config, {}
    for name in ("in_channels", *["n_classes"] * (config.n_classes > 0)):
        if recorded.get(name, getattr(config, name)) != getattr(config, name):
            raise InputError(f"{weights.recorded.source} specifies {name}={recorded[name]!r}, but the tensors of "
                             f"{weights.path} have {getattr(config, name)!r}; {MEND}")
    if "img_size" in recorded:
        config = replace(config, img_size=recorded["img_size"])
    elif "img_size" not in given:
        assumed["img_size"] = f"img_size={config.img_size}"
    unrecorded = not_in_tensors(weights, config)
    config = replace(config, **{name: given[name] for name in unrecorded if name in given})
    assumed |= {name: words for name, words in unrecorded.items() if name not in given}
    preprocessing, words = _infer_preprocessing(weights, config.img_size, config)
    assumed |= dict(images=words) if words else {}
    model_class = model_classes()[weights.format.holds]
    return Inferred(model_class, config, preprocessing, None, assumed, tuple(unrecorded))


def _infer_grid(weights, patch, given):
    """Return ((rows, columns) of the patches, {"img_size": words} if they were assumed to form a square)."""
    recorded = weights.recorded.config.get("img_size")
    if weights.format.holds in BEITS and "pos_embed" not in weights.tensors:
        return _infer_grid_of_tables(weights, patch, given)
    if "pos_embed" not in weights.tensors:
        size = recorded or given.get("img_size")
        return (grid_of(pair(size), tuple(patch)), {}) if size else ((1, 1), {})
    if recorded:
        try:
            return _read_grid(weights, given=grid_of(pair(recorded), tuple(patch)))[0], {}
        except InputError as error:
            M = weights.tensors["pos_embed"].shape[1]
            raise InputError(f"{weights.recorded.source} specifies img_size={recorded!r}, but {weights.path} has {M} "
                             f"positions for {patch[0]}x{patch[1]} patches; {MEND}") from error
    size = given.get("img_size")
    wished = grid_of(pair(size), tuple(patch)) if size else None
    grid, _, notes = _read_grid(weights, wished)
    weights.choices += notes
    side = one_side(tuple(n * side for n, side in zip(grid, patch, strict=True)))
    return grid, {} if grid == wished else dict(img_size=f"img_size={side} (a square of {grid[0]}x{grid[1]} patches)")


def _infer_grid_of_tables(weights, patch, given):
    """Return the same as _infer_grid for a BEiT, whose tables of relative positions show the grid."""
    recorded = weights.recorded.config.get("img_size")
    sizes = [recorded] if recorded else [given["img_size"]] if "img_size" in given else []
    name, n = next((name, len(tensor) - 3) for name, tensor in weights.tensors.items() if name.endswith(TABLE))
    square = ((math.isqrt(max(n, 0)) + 1) // 2,) * 2
    known = [grid_of(pair(size), tuple(patch)) for size in sizes]
    grid = next((grid for grid in [*known, *[square] * (not recorded)] if n_offsets(grid) == n), None)
    if grid is None and recorded:
        raise InputError(f"{weights.recorded.source} specifies img_size={recorded!r}, but {weights.path} has {n} "
                         f"offsets of {patch[0]}x{patch[1]} patches; {MEND}")
    if grid is None:
        raise InputError(f"{weights.path} has {n} offsets in {weights.sources[name][0]}, which fit no square grid; set "
                         f"the image size used in training with load(..., img_size=(height, width)) or --img-size "
                         f"HEIGHT WIDTH, or the grid with load_checkpoint(..., grid_size=(rows, columns))")
    side = one_side(tuple(count * length for count, length in zip(grid, patch, strict=True)))
    return grid, {} if grid in known else dict(img_size=f"img_size={side} (a square of {grid[0]}x{grid[1]} patches)")


def _infer_preprocessing(weights, img_size, config):
    """Return (the Preprocessing of a file, a description of what was assumed, or "")."""
    images, known = weights.recorded.images, weights.format
    names = images.get("class_names")
    if names and config.n_classes and len(names) != config.n_classes:
        raise InputError(f"{weights.recorded.source} lists {len(names)} class names, but the head of {weights.path} "
                         f"has {config.n_classes} classes; {MEND}")
    facts = {name: images.get(name, getattr(known, name)) for name in ("mean", "std", "interpolation")}
    shown = Preprocessing(img_size, **facts, class_names=names if config.n_classes else None)
    missing = [name for name in facts if name not in images]
    words = ["ImageNet's mean and std" if known.mean == IMAGENET_MEAN else f"mean and std {known.mean[0]} as in its "
             f"library"] * ("mean" in missing or "std" in missing)
    words += [f"{known.interpolation} resizing"] * ("interpolation" in missing)
    return shown.with_channels(config.in_channels), ", ".join(words)


def _likely_heads(D, width=64):
    """Guess the heads of a ViT of width D: 64 channels each, but 16 heads for Huge (ViT paper, Table 1)."""
    if (D, width) == (1280, 64):
        return 16
    return next(n for n in range(max(1, D // width), 0, -1) if D % n == 0)
