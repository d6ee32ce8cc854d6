"""Models by name, and from files.

    model = build_model("hybrid", n_classes=10)          a new one
    model = create_pretrained("vit_nano_shapes")         one that we trained
    model = load_model("runs/first/best.pt")             one that you trained

A loaded model is in eval mode and carries class_names, img_size, mean and std, as the loaders of vit_data do:
all that is needed to feed it an image and to read its answer.
"""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cnn_model import ConvNet, ConvNetConfig, HybridCNNViT
from vit_model import VARIANTS, InputError, VisionTransformer, ViTConfig, check_choice, pair

CONFIGS = {VisionTransformer: ViTConfig, HybridCNNViT: ViTConfig, ConvNet: ConvNetConfig}
CLASSES = {model_class.__name__: model_class for model_class in CONFIGS}

# vit_nano, hybrid and convnet are within 10% of each other in parameters, with 10 classes and 32 x 32 images:
# 459,562, 497,818 and 481,170.
MODELS = {
    **{name: (VisionTransformer, vars(config)) for name, config in VARIANTS.items()},
    "hybrid": (HybridCNNViT, dict(img_size=32, patch_size=4, embed_dim=96, depth=4, n_heads=3)),
    "hybrid_small": (HybridCNNViT, dict(img_size=224, patch_size=16, embed_dim=384, depth=6, n_heads=6)),
    "convnet": (ConvNet, dict(img_size=32, widths=(40, 80, 160), depths=(1, 1, 1), stem_stride=1)),
    "resnet18": (ConvNet, dict(img_size=224, widths=(64, 128, 256, 512), depths=(2, 2, 2, 2), stem_stride=4)),
}

# Trained by us on the built-in shapes; the commands and accuracies are in benchmarks/RESULTS.md.
PRETRAINED = ("vit_nano_shapes", "hybrid_shapes", "convnet_shapes")
PRETRAINED_FOLDER = Path(__file__).parent / "benchmarks" / "weights"

CHECKPOINT_FORMAT = "vit-bridge 1"


def build_model(name, **arguments):
    """A new model of the table MODELS; the arguments override its own.

    With an img_size and no patch_size (or stem_stride) the patch is fitted to the image: 4 pixels up to 64,
    8 up to 128, 16 above; for a ConvNet the stride of the stem, 1, 2 and 4.

    Raises InputError for an unknown name or argument, and as the model's class does.
    """
    check_choice("model", name, tuple(MODELS))
    model_class, defaults = MODELS[name]
    for argument in arguments:
        check_choice("argument", argument, tuple(CONFIGS[model_class].__dataclass_fields__))
    fitted = {}
    if "img_size" in arguments:
        side = max(pair(arguments["img_size"]))
        scale = 1 if side <= 64 else 2 if side <= 128 else 4
        fitted = dict(stem_stride=scale) if model_class is ConvNet else dict(patch_size=4 * scale)
    return model_class(**{**defaults, **fitted, **arguments})


def create_pretrained(name):
    """A model that we trained, ready to use: see the table PRETRAINED.

    Raises InputError for an unknown name, or where the file is not beside this module (weights are part of the
    checkout, so install with `pip install -e .`).
    """
    check_choice("model", name, PRETRAINED)
    return load_model(PRETRAINED_FOLDER / f"{name}.pt")


# ---- Checkpoints ------------------------------------------------------------------------------------------


def save_model(model, path, class_names=None, mean=None, std=None, dtype=None, **more):
    """Writes a model of ours as a checkpoint: plain tensors, numbers and text, which need no unpickling.

    class_names, mean, std   as a loader of vit_data carries them; those of the model itself where not given
    dtype                    e.g. torch.float16 to halve the file; load_model gives float32 again
    more                     further entries, kept as they are (a trainer's state, an accuracy)

    The file appears whole or not at all. Raises InputError where it cannot be written, and for a model of another
    class than those of this project.
    """
    if type(model) not in CONFIGS:
        raise InputError(f"a {type(model).__name__} cannot be saved as a checkpoint; expected one of "
                         f"{', '.join(CLASSES)} itself, not compiled or wrapped")
    if not isinstance(model.head, (nn.Linear, nn.Identity)):
        raise InputError(f"a head of class {type(model.head).__name__} cannot be saved; expected one nn.Linear")
    config = replace(model.config, n_classes=getattr(model.head, "out_features", 0))
    names = own(class_names, model, "class_names")
    if names and config.n_classes and len(names) != config.n_classes:
        raise InputError(f"{len(names)} class_names do not fit a head of {config.n_classes} classes; give class_names")
    state = {key: value.detach().cpu().to(dtype) if dtype and value.is_floating_point() else value.detach().cpu()
             for key, value in model.state_dict().items()}
    entries = dict(format=CHECKPOINT_FORMAT, model_class=type(model).__name__, config=vars(config),
                   state_dict=state, img_size=config.img_size,
                   class_names=names, mean=own(mean, model, "mean"), std=own(std, model, "std"), **more)
    part = Path(f"{path}.part")
    try:
        torch.save(entries, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write {path} ({first_line(error)}); choose a folder that exists, is writable and "
                         f"has room") from error
    finally:
        with suppress(OSError):  # there is none where all went well
            part.unlink()


def own(value, model, name):
    """value, or the model's own where there is none, as a list of plain values (None where neither is known)."""
    value = getattr(model, name, None) if value is None else value
    return None if value is None else [x.item() if hasattr(x, "item") else x for x in value]


def read_checkpoint(path):
    """The entries of a checkpoint of ours, as save_model wrote them. Nothing in the file is executed.

    Raises InputError where there is no file, or it is not a checkpoint, or not one of ours.
    """
    if not Path(path).is_file():
        raise InputError(f"no file {path}; expected a checkpoint that train_vit.py or save_model wrote")
    try:
        entries = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # random bytes make torch's unpickler fail with nearly every kind
        raise InputError(f"{path} is no checkpoint, or a damaged one ({first_line(error)}); expected a file that "
                         f"train_vit.py or save_model wrote") from error
    if not isinstance(entries, dict) or entries.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"{path} is not a checkpoint of this project; expected a file that train_vit.py or "
                         f"save_model wrote")
    return entries


def first_line(error):
    """Type and first sentence of an error, for quoting inside a line of ours."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}".rstrip(": ")


def load_model(path):
    """The model of a checkpoint, in eval mode, on the CPU, in float32, with class_names, img_size, mean, std.

    Raises InputError as read_checkpoint does, and where weights and configuration do not fit.
    """
    entries = read_checkpoint(path)
    try:
        model = CLASSES[entries["model_class"]](**entries["config"])
        model.load_state_dict(entries["state_dict"])
        for name in ("class_names", "img_size", "mean", "std"):
            setattr(model, name, entries[name])
    except Exception as error:
        raise InputError(f"{path} is damaged: its weights and its configuration do not fit "
                         f"({first_line(error)})") from error
    return model.eval()


def load_checkpoint(model, path):
    """Loads the weights of a checkpoint into a model of the same architecture and class count; returns the model.

    Raises InputError, with the model unchanged, where they differ.
    """
    other = load_model(path)
    if type(other) is not type(model):
        raise InputError(f"{path} holds a {type(other).__name__}, the model is a {type(model).__name__}; build that "
                         f"one, or take load_model(path), which builds what the file holds")
    for name in ("n_heads", "pool", "position", "stem_stride"):  # these leave no trace in the shapes
        theirs, ours = getattr(other.config, name, None), getattr(model.config, name, None)
        if theirs != ours:
            raise InputError(f"{path} is for another architecture: {name} is {theirs} there, {ours} in the model; "
                             f"take load_model(path), which builds what the file holds")
    theirs, ours = other.state_dict(), model.state_dict()
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())
        raise InputError(f"{path} is for another architecture: {len(odd)} tensors stand in only one of the two, "
                         f"such as {odd[0]}; take load_model(path), which builds what the file holds")
    for key, value in ours.items():
        if value.shape != theirs[key].shape:
            what = "another class count" if key.startswith("head.") else "another architecture"
            raise InputError(f"{path} is for {what}: {key} is {tuple(theirs[key].shape)} there, "
                             f"{tuple(value.shape)} in the model; take load_model(path), which builds what the "
                             f"file holds")
    model.load_state_dict(theirs)
    return model
