"""What you do with a trained model: predict, score, export.

    predict(model, "cat.jpg")                   the likeliest classes of an image, or of several
    score(model, loader)                        accuracy, confusion matrix and the worst mistakes on a set
    export_onnx(model, "model.onnx")            an ONNX file, checked against the model

On the command line: python train_vit.py predict, evaluate and export.

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
from vit_model import pair

BATCH_SIZE = 64  # images that predict reads and feeds at a time
TOLERANCE = 1e-4  # of the largest logit: how far an exported file may be from its model
PROTOBUF_LIMIT = 2**31 - 1  # bytes of a file that onnx can write as one


# ---- Predictions ------------------------------------------------------------------------------------------


class Mirrored(nn.Module):
    """A model that also looks at each image mirrored left to right: the log of the mean of both probabilities."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        both = torch.stack([logits_of(self.model(one)) for one in (images, images.flip(3))])  # (2, B, K)
        return both.softmax(dim=2).mean(dim=0).log()  # (B, K)


def predict(model, images, top=5):
    """The likeliest classes, best first: at most `top` pairs (class name, probability), the probability in 0..1.

    images: one image of any kind in data/images.py (a path, a PIL image, an array, a tensor (3, H, W)), which gives one
    list; or several, as a list, a tuple or a batch (B, 3, H, W), which give a list of such lists, also where
    there is only one. A model without class_names calls its classes "0", "1", ...

    The model is left as it was, on its device. Raises InputError for an image that cannot be used and for a model
    without a head.
    """
    check_int("top", top, 1)
    several = isinstance(images, (list, tuple)) or (isinstance(images, torch.Tensor) and images.ndim == 4)
    answers = []
    for batch in batches_of(images if several else [images]):
        answers += ranked(model, [prepare_image(image, model)[0] for image in batch], top)
    return answers if several else answers[0]


def batches_of(items):
    """The items in lists of BATCH_SIZE, the last one shorter; taken as they are needed."""
    items = iter(items)
    while batch := list(itertools.islice(items, BATCH_SIZE)):
        yield batch


def ranked(model, inputs, top):
    """What predict() gives for a list of inputs, each (1, 3, H, W)."""
    check_has_head(model)
    sizes = sorted({f"{one.shape[2]}x{one.shape[3]}" for one in inputs})
    if len(sizes) > 1:
        raise InputError(f"got images of {' and '.join(sizes)} pixels, expected one size; give those of one size "
                         f"together")
    probabilities = class_probabilities(model, torch.cat(inputs)).float().cpu()  # (B, K)
    _check_finite_outputs(probabilities)
    names = _names_or_numbers(adapt(model).class_names, probabilities.shape[1])
    values, labels = probabilities.sort(dim=1, descending=True, stable=True)  # (B, K) each
    return [[(names[label], value) for label, value in zip(*line, strict=True)]
            for line in zip(labels[:, :top].tolist(), values[:, :top].tolist(), strict=True)]


def _names_or_numbers(names, n_classes):
    """The class names, or "0", "1", ... where there are none that fit."""
    return list(names) if names and len(names) == n_classes else [str(label) for label in range(n_classes)]


def _check_finite_outputs(outputs):
    if not outputs.isfinite().all():
        raise InputError("the model's outputs are not finite; expected numbers, check its weights, or use amp 'off'")


# ---- Scores -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistakes:
    """The worst mistakes, those with the most confident wrong prediction first.

    images                (n, 3, H, W), normalised as the loader gave them
    labels, predictions   (n) int64, the true and the predicted classes
    label_probabilities, probabilities   (n), in 0..1, of the true and of the predicted class
    files                 n paths, None where the loader does not know them
    """
    images: torch.Tensor
    labels: torch.Tensor
    predictions: torch.Tensor
    label_probabilities: torch.Tensor
    probabilities: torch.Tensor
    files: list


@dataclass(frozen=True)
class Score:
    """What one pass over a set says about a model; fractions are in 0..1.

    confusion            (K, K) int64, rows true, columns predicted
    n, correct           images, and how many predictions were correct
    accuracy, interval   correct / n, and its 95% Wilson interval (low, high)
    balanced_accuracy    the mean of the recalls of the classes that have images
    top5                 fraction whose class is among the five likeliest; None for up to five classes
    class_names          K names
    mistakes             the worst ones, as Mistakes
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
    """One pass over a loader, in eval mode, as a Score.

    loader    what a Trainer takes: gives (images (B, 3, H, W), labels (B)), also empty batches; where it has
              class_names they must be the model's. A list of batches will do
    device    as in choose_device: the model is moved there and stays there
    amp       "auto", "off", "bf16" or "fp16", as choose_precision has it
    n_worst   mistakes to keep at most

    Raises InputError for a loader without images or of other classes, and for outputs that are not finite.
    """
    check_int("n_worst", n_worst, 0)
    check_has_head(model)
    model = unwrapped(model)
    device_of(model)  # which refuses one on the device "meta"
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
        raise InputError("the loader gave 0 images; expected at least one, check the data")
    K, correct = len(confusion), confusion.trace().item()
    return Score(confusion, n, correct, correct / n, wilson_interval(correct, n), balanced_accuracy(confusion),
                 top5_hits / n if K > 5 else None, names, _with_files(worst, loader, n))


def _mistakes_of(images, labels, logits, n_before):
    """A batch's mistakes: (their indices in the pass, images, labels, predictions, probabilities of the label and of
    the prediction)."""
    probabilities = logits.softmax(dim=1)  # (B, K)
    predictions = logits.argmax(dim=1)  # (B)
    wrong = (predictions != labels).nonzero()[:, 0]  # (n)
    labels, predictions, probabilities = labels[wrong], predictions[wrong], probabilities[wrong]
    of_label, of_prediction = (probabilities.gather(1, classes[:, None])[:, 0] for classes in (labels, predictions))
    return n_before + wrong, images[wrong.to(images.device)].cpu(), labels, predictions, of_label, of_prediction


def _worst_of(worst, mistakes, n_worst):
    """The worst of those kept so far (None at first) and those of another batch, in the same fields."""
    fields = mistakes if worst is None else [torch.cat(both) for both in zip(worst, mistakes, strict=True)]
    order = fields[-1].sort(descending=True, stable=True).indices[:n_worst]
    return [field[order] for field in fields]


def _with_files(worst, loader, n):
    """Mistakes, with their files where the loader knows those of a pass of n images."""
    places, *fields = worst
    skipped = set(map(str, getattr(loader, "skipped", None) or ()))
    files = [file for file in getattr(loader, "files", None) or () if str(file) not in skipped]
    known = len(files) == n and not getattr(loader, "training", False)
    return Mistakes(*fields, [str(files[place]) if known else None for place in places.tolist()])


def _shared_names(model, loader, n_classes):
    """K class names. Raises InputError where those of model and loader are not the same."""
    theirs = getattr(loader, "class_names", None)
    shown = getattr(model, "preprocessing", None)
    ours = (shown and shown.class_names) or theirs
    if theirs and (list(theirs) != list(ours) or len(theirs) != n_classes):
        raise InputError(f"the loader has the classes {', '.join(map(str, theirs))}, the model {n_classes} outputs "
                         f"for {', '.join(map(str, ours))}; score it on images labelled by its own classes")
    return list(theirs) if theirs else _names_or_numbers(ours, n_classes)


# ---- Export -----------------------------------------------------------------------------------------------


def export_onnx(model, path):
    """Writes a model as one .onnx file, weights inside, for batches of any size, and checks it against the model.

    The file has the input "images", normalised, (B, 3, H, W), and the output "logits", (B, K); its metadata hold, as
    JSON, what the model knows of class_names, mean, std, img_size and interpolation. The file appears whole or not
    at all. The model is left as it was.

    Returns the largest difference between the logits of the file (by onnxruntime where it is installed, else by onnx's
    reference evaluator) and the model's, on random images, relative to the largest logit. Raises InputError where
    that is not below TOLERANCE, where the packages onnx and onnxscript are missing, for a model of 2 GB or more, and
    where the file cannot be written.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("an export needs the packages onnx and onnxscript; python -m pip install onnx "
                         "onnxscript") from None
    model = unwrapped(model)
    device_of(model)  # which refuses one on the device "meta"
    if is_quantised(model):
        raise InputError(f"this {class_name(model)} is quantised, and is not exported: give the model that it was made "
                         f"from, and quantise the file, with onnxruntime.quantization for instance")
    if not Path(path).parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {Path(path).parent}; choose one that exists")
    n_bytes = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    if n_bytes >= PROTOBUF_LIMIT:
        raise InputError(f"the model has {n_bytes / 1e9:.1f} GB of weights; expected less than 2, the most that one "
                         f".onnx file holds")
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
    """The ModelProto of a model on the CPU, in eval mode, traced with a batch of images."""
    shapes = ({0: torch.export.Dim("batch", max=2**31)},)  # torch 2.7 wants an upper bound
    try:
        with _silence(), torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=shapes)
            proto = torch.onnx.export(program, (images,), dynamo=True, verbose=False, input_names=["images"],
                                      output_names=["logits"], dynamic_shapes=shapes).model_proto
    except Exception as error:  # torch's exporter raises errors of its own and any of Python's
        raise InputError(f"this {class_name(model)} cannot be exported ({first_line(error)}); expected a model "
                         f"that torch.export can trace, remove what was changed in it") from error
    for node in proto.graph.node:
        del node.metadata_props[:]  # where in this machine's files it came from
    return proto


@contextmanager
def _silence():
    """Inside, neither warnings nor log messages are shown."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _metadata_of(model):
    """What one needs to feed the model and to read its logits, as plain values; without what is not known."""
    shown = model.preprocessing
    facts = dict(vars(shown) if shown else {}, img_size=model.config.img_size)
    return {name: value for name, value in facts.items() if value is not None}


def _largest_difference(content, model, images):
    """How far the file's logits are from the model's, relative to the largest. Raises InputError for TOLERANCE or
    more."""
    try:
        theirs = _run_onnx(content, images)  # (B, K)
    except Exception as error:  # whatever an evaluator raises for a graph that it cannot run
        raise InputError(f"the exported file does not run ({first_line(error)}), so it was not kept; try other "
                         f"versions of onnx and onnxscript") from error
    with torch.no_grad():
        ours = model(images)  # (B, K)
    _check_finite_outputs(ours)
    largest = max(ours.abs().max().item(), torch.finfo(ours.dtype).tiny)
    difference = (theirs - ours).abs().max().item() / largest if theirs.shape == ours.shape else float("inf")
    if not difference < TOLERANCE:
        raise InputError(f"the exported file's logits are {difference:.1e} of the largest from the model's, expected "
                         f"less than {TOLERANCE}, so it was not kept; try other versions of onnx and onnxscript")
    return difference


def _run_onnx(content, images):
    """The logits (B, K) of a file's content for images, by onnxruntime where it is installed, else by onnx itself."""
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        from onnx.reference import ReferenceEvaluator
        session = ReferenceEvaluator(content)
    else:
        session = InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
