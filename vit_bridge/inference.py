"""Use a trained model: predict the classes of images, score a model on a data set, export it to ONNX.

    predict(model, "cat.jpg")            the most probable classes of one image, or of several
    score(model, loader)                 accuracy, confusion matrix and worst mistakes on a data set
    export_onnx(model, "model.onnx")     an ONNX file, checked against the model

The commands: python train_vit.py predict, evaluate and export.

Shapes:  B images in a batch, C channels, K classes, n mistakes, H, W height and width.
"""

import copy
import itertools
import json
import logging
import operator
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from vit_bridge.analysis.metrics import balanced_accuracy, confusion_matrix, wilson_interval
from vit_bridge.data.images import prepare_image
from vit_bridge.data.loaders import as_loader
from vit_bridge.errors import InputError, check_int, first_line
from vit_bridge.models.adapters import adapt, check_has_head
from vit_bridge.models.protocol import class_name
from vit_bridge.runtime import (
    choose_device,
    choose_precision,
    class_probabilities,
    device_of,
    evaluating,
    is_quantised,
    logits_of,
    to_model,
    unwrapped,
)
from vit_bridge.system import write_whole
from vit_bridge.training.objectives import Classification, check_logits, check_range
from vit_bridge.weights.heads import first_difference
from vit_model import pair

BATCH_SIZE = 64  # images that predict holds in memory at a time
TOLERANCE = 1e-4  # largest allowed difference of an exported file's logits, relative to the largest logit
PROTOBUF_LIMIT = 2**31 - 1  # bytes, the limit of one .onnx file


# ---- Predictions ------------------------------------------------------------------------------------------


class Mirrored(nn.Module):
    """A model that averages the class probabilities of each image and of its left-right mirror image.

    It returns the log of the mean probabilities.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        """Return the log-probabilities (B, K) of images (B, C, H, W)."""
        both = torch.stack([logits_of(self.model(one)) for one in (images, images.flip(3))])  # (2, B, K)
        return both.softmax(dim=2).mean(dim=0).log()  # (B, K)


def predict(model, images, top=5):
    """Return the most probable classes of one image or of several.

    The model keeps its device and its training mode.

    Parameters
    ----------
    model : nn.Module
        A model with a head.
    images : image, list, tuple or Tensor
        One image, or several as a list, a tuple or a batch (B, 3, H, W). An image is a path, a PIL image, an array or a
        tensor (3, H, W), as vit_bridge/data/images.py describes.
    top : int, optional
        Number of classes to return.

    Returns
    -------
    list
        Pairs (class name, probability from 0 to 1), most probable first; for several images a list of such lists. The
        classes of a model without class names are called "0", "1", ...

    Raises
    ------
    InputError
        If an image cannot be used, or if the model has no head.
    """
    check_int("top", top, 1)
    several = isinstance(images, (list, tuple)) or (isinstance(images, torch.Tensor) and images.ndim == 4)
    results = []
    for batch in batches_of(images if several else [images]):
        results += ranked(model, [prepare_image(image, model)[0] for image in batch], top)
    return results if several else results[0]


def batches_of(items):
    """Yield the items in lists of BATCH_SIZE; the last list may be shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, BATCH_SIZE)):
        yield batch


def ranked(model, inputs, top):
    """Return what predict returns for a list of inputs, each (1, 3, H, W)."""
    check_has_head(model)
    sizes = sorted({f"{one.shape[2]}x{one.shape[3]}" for one in inputs})
    if len(sizes) > 1:
        raise InputError(f"got images of {' and '.join(sizes)} pixels, expected one size; pass images of different "
                         f"sizes in separate calls")
    probabilities = class_probabilities(model, torch.cat(inputs)).float().cpu()  # (B, K)
    _check_finite_outputs(probabilities)
    names = _names_or_numbers(adapt(model).class_names, probabilities.shape[1])
    values, labels = probabilities.sort(dim=1, descending=True, stable=True)  # (B, K) each
    return [[(names[label], value) for label, value in zip(*line, strict=True)]
            for line in zip(labels[:, :top].tolist(), values[:, :top].tolist(), strict=True)]


def _names_or_numbers(names, n_classes):
    """Return the class names, or "0", "1", ... if there are none or their number is wrong."""
    return list(names) if names and len(names) == n_classes else [str(label) for label in range(n_classes)]


def _check_finite_outputs(outputs):
    if not outputs.isfinite().all():
        raise InputError("the model's outputs are not finite (NaN or infinity); check its weights, or use amp 'off'")


# ---- Scores -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistakes:
    """The worst mistakes of a model, with the most confident wrong prediction first.

    Attributes
    ----------
    images : Tensor, shape (n, 3, H, W)
        Normalised, as the loader yields them.
    labels, predictions : Tensor of int64, shape (n,)
        True and predicted classes.
    label_probabilities, probabilities : Tensor, shape (n,)
        Probabilities of the true and of the predicted class, from 0 to 1.
    files : list of n str or None
        Paths; None if the loader does not list them.
    """

    images: torch.Tensor
    labels: torch.Tensor
    predictions: torch.Tensor
    label_probabilities: torch.Tensor
    probabilities: torch.Tensor
    files: list


@dataclass(frozen=True)
class Score:
    """The result of evaluating a model on a data set. Fractions are from 0 to 1.

    Attributes
    ----------
    confusion : Tensor of int64, shape (K, K)
        Number of images by true class (rows) and predicted class (columns).
    n, correct : int
        Number of images, and of correct predictions.
    accuracy : float
        correct / n.
    interval : (float, float)
        95% Wilson interval of the accuracy.
    balanced_accuracy : float
        Mean recall of the classes that have images.
    top5 : float or None
        Fraction of images whose class is among the five most probable. None for five classes or fewer.
    class_names : list of K
    mistakes : Mistakes
    """

    confusion: torch.Tensor
    n: int
    correct: int
    accuracy: float
    interval: tuple
    balanced_accuracy: float
    top5: float | None
    class_names: list
    mistakes: Mistakes


@torch.no_grad()
def score(model, loader, device="auto", amp="off", n_worst=24):
    """Evaluate a model in eval mode on one pass over a loader.

    Parameters
    ----------
    model : nn.Module
        A model with a head. It is moved to `device` and stays there.
    loader : iterable
        Anything a Trainer accepts, such as a list of batches (images (B, 3, H, W), labels (B)). Batches may be empty.
    device : str, optional
        As in choose_device.
    amp : {"auto", "off", "bf16", "fp16"}, optional
        As in choose_precision.
    n_worst : int, optional
        Maximum number of mistakes to keep.

    Returns
    -------
    Score

    Raises
    ------
    InputError
        If the loader has no images or its classes differ from the model's, or if the outputs are not finite.
    """
    check_int("n_worst", n_worst, 0)
    check_has_head(model)
    model = unwrapped(model)
    device_of(model)  # raises for a model without weights
    device = choose_device(device)
    dtype = None if is_quantised(model) else choose_precision(amp, device)
    objective, confusion, top5_hits, n, worst, names = Classification(), 0, 0, 0, None, None
    with evaluating(model.to(device)), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for images, labels in tqdm(as_loader(loader, objective.check), unit="batch", leave=False, disable=None):
            if not len(images):
                continue
            logits, labels = logits_of(model(to_model(images, model))), labels.cpu()  # (B, K), (B) or (B, K)
            check_logits(logits, len(images))
            logits, labels = logits.float().cpu(), labels.argmax(dim=1) if labels.ndim == 2 else labels
            _check_finite_outputs(logits)
            check_range(labels, logits.shape[1])
            names = names if n else _shared_names(model, loader, logits.shape[1])
            confusion = confusion + confusion_matrix(labels, logits.argmax(dim=1), logits.shape[1])  # (K, K)
            best = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
            top5_hits += (best == labels[:, None]).sum().item()
            worst = _worst_of(worst, _mistakes_of(images, labels, logits, n), n_worst)
            n += len(images)
    if not n:
        raise InputError("the loader yielded 0 images; expected at least one, so check the data")
    K, correct = len(confusion), confusion.trace().item()
    return Score(confusion, n, correct, correct / n, wilson_interval(correct, n), balanced_accuracy(confusion),
                 top5_hits / n if K > 5 else None, names, _with_files(worst, loader, n))


def _mistakes_of(images, labels, logits, n_before):
    """Return the mistakes of a batch as a tuple of tensors, one entry per mistake.

    They are: index within the pass, image, label, prediction, probability of the label and of the prediction.
    """
    probabilities = logits.softmax(dim=1)  # (B, K)
    predictions = logits.argmax(dim=1)  # (B)
    wrong = (predictions != labels).nonzero()[:, 0]  # (n)
    labels, predictions, probabilities = labels[wrong], predictions[wrong], probabilities[wrong]
    of_label, of_prediction = (probabilities.gather(1, classes[:, None])[:, 0] for classes in (labels, predictions))
    return n_before + wrong, images[wrong.to(images.device)].cpu(), labels, predictions, of_label, of_prediction


def _worst_of(worst, mistakes, n_worst):
    """Return the n_worst most confident of the mistakes kept so far (None at first) and of a new batch."""
    fields = mistakes if worst is None else [torch.cat(both) for both in zip(worst, mistakes, strict=True)]
    order = fields[-1].sort(descending=True, stable=True).indices[:n_worst]
    return [field[order] for field in fields]


def _with_files(worst, loader, n):
    """Return the Mistakes, with their files if the loader lists the files of a pass of n images."""
    places, *fields = worst
    skipped = set(map(str, getattr(loader, "skipped", None) or ()))
    files = [file for file in getattr(loader, "files", None) or () if str(file) not in skipped]
    known = len(files) == n and not getattr(loader, "training", False)
    return Mistakes(*fields, [str(files[place]) if known else None for place in places.tolist()])


def _shared_names(model, loader, n_classes):
    """Return K class names; raise InputError if the model's and the loader's names differ."""
    theirs = getattr(loader, "class_names", None)
    shown = getattr(model, "preprocessing", None)
    ours = (shown and shown.class_names) or theirs
    if theirs and list(theirs) != list(ours):
        raise InputError(f"the classes of the loader differ from the model's, {first_difference(theirs, ours)}; score "
                         f"the model on images labelled with its own classes")
    if theirs and len(theirs) != n_classes:
        raise InputError(f"the loader has {len(theirs)} classes, but the model has {n_classes} outputs; score the "
                         f"model on images labelled with its own classes")
    return list(theirs) if theirs else _names_or_numbers(ours, n_classes)


# ---- Export -----------------------------------------------------------------------------------------------


def export_onnx(model, path):
    """Export a model as one .onnx file, check it against the model, and return the largest difference.

    The file holds the weights and accepts batches of any size. Its input "images" is normalised, (B, 3, H, W); its
    output "logits" is (B, K). Its metadata hold, as JSON, class_names, mean, std, img_size and interpolation, unless
    the model lacks them. The model is not changed.

    Parameters
    ----------
    model : nn.Module
        A model of vit_bridge.models.
    path : path-like
        The file to write. It is written completely or not at all.

    Returns
    -------
    float
        Largest difference between the logits of the file and of the model on random images, relative to the largest
        logit. The file is run by onnxruntime if it is installed, otherwise by onnx's reference evaluator.

    Raises
    ------
    InputError
        If the difference is TOLERANCE or more, the packages onnx and onnxscript are missing, the model has no head, has
        2 GB of weights or more or cannot be traced, or the file cannot be written.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("an export needs the packages onnx and onnxscript; install them with python -m pip "
                         "install onnx onnxscript") from None
    model = unwrapped(model)
    check_has_head(model)
    device_of(model)  # raises for a model without weights
    if is_quantised(model):
        raise InputError(f"this {class_name(model)} is quantised and cannot be exported; export the model before it "
                         f"is quantised, then quantise the file, for example with onnxruntime.quantization")
    if not Path(path).parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {Path(path).parent}; choose a folder that exists")
    n_bytes = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    if n_bytes >= PROTOBUF_LIMIT:
        raise InputError(f"the model has {n_bytes / 1e9:.1f} GB of weights; expected less than 2, the limit of one "
                         f".onnx file")
    twin = copy.deepcopy(model).cpu().float().eval()
    shape = (twin.config.in_channels, *pair(twin.config.img_size))
    proto = _to_onnx(twin, torch.zeros(2, *shape))
    for key, value in _metadata_of(model).items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    content = proto.SerializeToString()
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))  # (3, C, H, W)
    difference = _largest_difference(content, twin, images)
    write_whole(path, operator.methodcaller("write", content))
    return difference


def _to_onnx(model, images):
    """Return the ModelProto of a model on the CPU in eval mode, traced with a batch of images."""
    shapes = ({0: torch.export.Dim("batch", max=2**31)},)  # torch 2.7 needs an upper bound
    try:
        with _silence(), torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=shapes)
            proto = torch.onnx.export(program, (images,), dynamo=True, verbose=False, input_names=["images"],
                                      output_names=["logits"], dynamic_shapes=shapes).model_proto
    except Exception as error:  # torch's exporter raises errors of many types
        raise InputError(f"this {class_name(model)} cannot be exported ({first_line(error)}); expected a model "
                         f"that torch.export can trace; undo your changes to it") from error
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces with paths of this machine
    return proto


@contextmanager
def _silence():
    """Hide warnings and log messages inside."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _metadata_of(model):
    """Return what a user of the file needs to prepare images and read the logits, as plain values."""
    shown = model.preprocessing
    facts = dict(vars(shown) if shown else {}, img_size=model.config.img_size)
    return {name: value for name, value in facts.items() if value is not None}


def _largest_difference(content, model, images):
    """Return how far the file's logits are from the model's, relative to the largest logit.

    Raises InputError if the file does not run, or if the difference is TOLERANCE or more.
    """
    try:
        theirs = _run_onnx(content, images)  # (B, K)
    except Exception as error:  # evaluators raise errors of many types
        raise InputError(f"the exported file does not run ({first_line(error)}), so it was not kept; try other "
                         f"versions of onnx and onnxscript") from error
    with torch.no_grad():
        ours = model(images)  # (B, K)
    _check_finite_outputs(ours)
    largest = max(ours.abs().max().item(), torch.finfo(ours.dtype).tiny)
    difference = (theirs - ours).abs().max().item() / largest if theirs.shape == ours.shape else float("inf")
    if not difference < TOLERANCE:
        raise InputError(f"the exported file's logits differ from the model's by {difference:.1e} of the largest, "
                         f"expected less than {TOLERANCE}, so it was not kept; try other versions of onnx and "
                         f"onnxscript")
    return difference


def _run_onnx(content, images):
    """Return the logits (B, K) of an ONNX file's content, by onnxruntime if installed, otherwise by onnx."""
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        from onnx.reference import ReferenceEvaluator
        session = ReferenceEvaluator(content)
    else:
        session = InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
