"""What one does with a trained model: ask it, score it, hand it on.

    predict(model, "cat.jpg")                   the likeliest classes of an image, or of several
    score(model, loader)                        accuracy, confusion and the worst mistakes on a set
    export_onnx(model, "model.onnx")            a file for other programs, checked against the model

    python train_vit.py evaluate --checkpoint runs/first/best.pt --data-dir photos
    python train_vit.py predict --checkpoint runs/first/best.pt cat.jpg more_photos
    python train_vit.py export --checkpoint runs/first/best.pt

The checkpoint tells the classes, the image size, the normalisation and the interpolation.

Letters:  B images in a batch, K classes, n mistakes, H, W height and width.
"""

import copy
import csv
import hashlib
import itertools
import json
import logging
import operator
import os
import sys
import textwrap
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import font_manager
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from checkpoints import first_line, load_model, one_side, own, read_checkpoint, write_whole
from command_line import OneLineParser, new_output_dir, percent, unless_empty, whole, write_json
from measurements import (
    balanced_accuracy,
    choose_device,
    choose_precision,
    class_probabilities,
    class_recalls,
    confusion_matrix,
    evaluating,
    wilson_interval,
)
from pictures import prepare_image
from visualizations import plot_confusion, plot_images, save_figure
from vit_data import DATASETS, DEFAULT_DATA_DIR, get_evaluation_loader
from vit_model import InputError, check_whole, pair

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
        both = torch.stack([self.model(images), self.model(images.flip(3))])  # (2, B, K)
        return both.softmax(dim=2).mean(dim=0).log()  # (B, K)


def predict(model, images, top=5):
    """The likeliest classes, best first: at most `top` pairs (class name, probability), the probability in 0..1.

    images: one image of any kind that visualizations takes (a path, a PIL image, an array, a tensor (3, H, W)), which
    gives one list; or several, as a list, a tuple or a batch (B, 3, H, W), which give a list of such lists, also where
    there is only one. A model without class_names calls its classes "0", "1", ...

    The model is left as it was, on its device. Raises InputError for an image that cannot be used and for a model
    without a head.
    """
    check_whole("top", top, 1)
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
    """predict for a list of the model's inputs, each (1, 3, H, W)."""
    check_head(model)
    probabilities = class_probabilities(model, torch.cat(inputs)).float().cpu()  # (B, K)
    check_finite(probabilities)
    names = names_of(model, probabilities.shape[1])
    values, labels = probabilities.sort(dim=1, descending=True, stable=True)  # (B, K) each
    return [[(names[label], value) for label, value in zip(*line, strict=True)]
            for line in zip(labels[:, :top].tolist(), values[:, :top].tolist(), strict=True)]


def names_of(model, n_classes):
    """The model's class names, or "0", "1", ... where it has none that fit."""
    names = getattr(model, "class_names", None) or ()
    return list(names) if len(names) == n_classes else [str(label) for label in range(n_classes)]


def check_head(model):
    if isinstance(getattr(model, "head", None), nn.Identity):
        raise InputError(f"this {type(model).__name__} has no head, it gives features and no classes; build it with "
                         f"n_classes and train it")


def check_finite(outputs):
    if not outputs.isfinite().all():
        raise InputError("the model's outputs are not finite; expected numbers, check its weights, or use amp 'off'")


# ---- Scores -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistakes:
    """The worst mistakes, the largest probability of a wrong answer first.

    images                (n, 3, H, W), normalised as the loader gave them
    labels, predictions   (n) int64, the true classes and those answered
    label_probabilities, probabilities   (n), in 0..1, given to the true class and to the one answered
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
    """What one pass over a set tells of a model; shares are in 0..1.

    confusion            (K, K) int64, rows true, columns predicted
    n, correct           images, and how many were right
    accuracy, interval   correct / n, and its 95% Wilson interval (low, high)
    balanced_accuracy    the mean of the recalls of the classes that have images
    top5                 share whose class is among the five likeliest; None for up to five classes
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

    loader    gives (images (B, 3, H, W), labels (B)), also empty batches; where it has class_names they must be the
              model's. A list of batches will do
    device    as in choose_device: the model is moved there and stays there
    amp       "auto", "off", "bf16" or "fp16", as choose_precision has it
    n_worst   mistakes to keep at most

    Raises InputError for a loader without images or of other classes, and for outputs that are not finite.
    """
    check_whole("n_worst", n_worst, 0)
    check_head(model)
    device = choose_device(device)
    dtype = choose_precision(amp, device)
    confusion, top5_hits, n, worst, names = 0, 0, 0, None, None
    with evaluating(model.to(device)), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for images, labels in tqdm(loader, unit="batch", leave=False, disable=None):
            if not len(images):
                continue
            logits, labels = model(images.to(device)).float().cpu(), labels.cpu()  # (B, K), (B)
            check_finite(logits)
            names = names if n else shared_names(model, loader, logits.shape[1])
            confusion = confusion + confusion_matrix(labels, logits.argmax(dim=1), logits.shape[1])  # (K, K)
            best = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
            top5_hits += (best == labels[:, None]).sum().item()
            worst = worst_of(worst, mistakes_of(images, labels, logits, n), n_worst)
            n += len(images)
    if not n:
        raise InputError("the loader gave 0 images; expected at least one, check the data")
    K, correct = len(confusion), confusion.trace().item()
    return Score(confusion, n, correct, correct / n, wilson_interval(correct, n), balanced_accuracy(confusion),
                 top5_hits / n if K > 5 else None, names, with_files(worst, loader, n))


def mistakes_of(images, labels, logits, n_before):
    """A batch's mistakes: (their places in the pass, images, labels, predictions, probabilities of the label and of
    the prediction)."""
    probabilities = logits.softmax(dim=1)  # (B, K)
    predictions = logits.argmax(dim=1)  # (B)
    wrong = (predictions != labels).nonzero()[:, 0]  # (n)
    labels, predictions, probabilities = labels[wrong], predictions[wrong], probabilities[wrong]
    of_label, of_prediction = (probabilities.gather(1, classes[:, None])[:, 0] for classes in (labels, predictions))
    return n_before + wrong, images[wrong.to(images.device)].cpu(), labels, predictions, of_label, of_prediction


def worst_of(worst, mistakes, n_worst):
    """The worst of those kept so far (None at first) and those of another batch, in the same fields."""
    fields = mistakes if worst is None else [torch.cat(both) for both in zip(worst, mistakes, strict=True)]
    order = fields[-1].sort(descending=True, stable=True).indices[:n_worst]
    return [field[order] for field in fields]


def with_files(worst, loader, n):
    """Mistakes, with the files of their places where the loader tells the files of a pass of n images."""
    places, *fields = worst
    skipped = set(map(str, getattr(loader, "skipped", None) or ()))
    files = [file for file in getattr(loader, "files", None) or () if str(file) not in skipped]
    known = len(files) == n and not getattr(loader, "training", False)
    return Mistakes(*fields, [str(files[place]) if known else None for place in places.tolist()])


def shared_names(model, loader, n_classes):
    """K class names. Raises InputError where those of model and loader are not the same."""
    theirs = getattr(loader, "class_names", None)
    ours = getattr(model, "class_names", None) or theirs
    if theirs and (list(theirs) != list(ours) or len(theirs) != n_classes):
        raise InputError(f"the loader has the classes {', '.join(map(str, theirs))}, the model {n_classes} outputs "
                         f"for {', '.join(map(str, ours))}; score it on images labelled by its own classes")
    return list(theirs) if theirs else names_of(model, n_classes)


# ---- Export -----------------------------------------------------------------------------------------------


def export_onnx(model, path):
    """Writes a model as one .onnx file, weights inside, for batches of any size, and checks it against the model.

    The file has the input "images", normalised, (B, 3, H, W), and the output "logits", (B, K); its metadata hold, as
    JSON, what the model knows of class_names, mean, std, img_size and interpolation. The file appears whole or not
    at all. The model is left as it was.

    Returns the largest difference between the logits of the file (by onnxruntime where it is installed, else by onnx's
    reference evaluator) and the model's, on random images, as a share of the largest logit. Raises InputError where
    that is not below TOLERANCE, where the packages onnx and onnxscript are missing, for a model of 2 GB or more, and
    where the file cannot be written.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("an export needs the packages onnx and onnxscript; python -m pip install onnx "
                         "onnxscript") from None
    if not Path(path).parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {Path(path).parent}; choose one that exists")
    n_bytes = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    if n_bytes >= PROTOBUF_LIMIT:
        raise InputError(f"the model has {n_bytes / 1e9:.1f} GB of weights; expected less than 2, the most that one "
                         f".onnx file holds")
    twin = copy.deepcopy(model).cpu().float().eval()
    shape = (twin.config.in_channels, *pair(twin.config.img_size))
    proto = to_onnx(twin, torch.zeros(2, *shape))
    for key, value in metadata_of(model).items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    content = proto.SerializeToString()
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))  # (3, C, H, W)
    difference = largest_difference(content, twin, images)
    write_whole(path, operator.methodcaller("write", content))
    return difference


def to_onnx(model, images):
    """The ModelProto of a model on the CPU, in eval mode, traced with a batch of images."""
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        with silence(), torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=shapes)
            proto = torch.onnx.export(program, (images,), dynamo=True, verbose=False, input_names=["images"],
                                      output_names=["logits"], dynamic_shapes=shapes).model_proto
    except Exception as error:  # torch's exporter raises errors of its own and any of Python's
        raise InputError(f"this {type(model).__name__} cannot be exported ({first_line(error)}); expected a model "
                         f"that torch.export can trace, remove what was changed in it") from error
    for node in proto.graph.node:
        del node.metadata_props[:]  # where in this machine's files it came from
    return proto


@contextmanager
def silence():
    """Inside, neither warnings nor log messages are shown."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def metadata_of(model):
    """What somebody needs to feed the model and to read its answer, as plain values; without what is not known."""
    facts = {name: own(None, model, name) for name in ("class_names", "mean", "std")}
    facts |= dict(img_size=model.config.img_size, interpolation=getattr(model, "interpolation", None))
    return {name: value for name, value in facts.items() if value is not None}


def largest_difference(content, model, images):
    """How far the file's logits are from the model's, as a share of the largest. Raises InputError for TOLERANCE or
    more."""
    try:
        theirs = run_onnx(content, images)  # (B, K)
    except Exception as error:  # whatever an evaluator raises for a graph that it cannot run
        raise InputError(f"the exported file does not run ({first_line(error)}), so it was not kept; try other "
                         f"versions of onnx and onnxscript") from error
    with torch.no_grad():
        ours = model(images)  # (B, K)
    check_finite(ours)
    largest = max(ours.abs().max().item(), torch.finfo(ours.dtype).tiny)
    difference = (theirs - ours).abs().max().item() / largest if theirs.shape == ours.shape else float("inf")
    if not difference < TOLERANCE:
        raise InputError(f"the exported file's logits are {difference:.1e} of the largest from the model's, expected "
                         f"less than {TOLERANCE}, so it was not kept; try other versions of onnx and onnxscript")
    return difference


def run_onnx(content, images):
    """The logits (B, K) of a file's content for images, by onnxruntime where it is installed, else by onnx itself."""
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        from onnx.reference import ReferenceEvaluator
        session = ReferenceEvaluator(content)
    else:
        session = InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


# ---- python train_vit.py evaluate -------------------------------------------------------------------------

# What the parts of a set are worth as a test, by Loader.split.
SPLITS = {
    "test": "test images",
    "val": "validation images, as there are no test images: a training on this folder chose its best epoch on them",
    "held out": "validation images, held out of the training; its best epoch was chosen on them",
    "all": "images, all of the folder: a test only if the model was trained on none of them",
}


def evaluate_command(argv=None):
    parser = OneLineParser(prog="train_vit.py evaluate", description="Scores a checkpoint on a set: accuracy, "
                           "confusion matrix and the worst mistakes, printed and kept in a folder. Taken are the test "
                           "images, where there are none the validation images, else all; but of the folder that the "
                           "checkpoint was trained on only those held out.")
    add_checkpoint(parser)
    parser.add_argument("--data-dir", default=DEFAULT_DATA_DIR, help="as for the training: a folder with a folder for "
                        "each class, or a known set (default: %(default)s, without which shapes are drawn)")
    parser.add_argument("--dataset", default="auto", help=f"{', '.join(DATASETS)} (default: %(default)s)")
    parser.add_argument("--batch-size", type=whole(1), default=64, help="(default: %(default)s)")
    add_device(parser)
    parser.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
                        help="mixed precision (default: %(default)s)")
    parser.add_argument("--workers", type=whole(0), help="processes that read photographs (default: one for each core, "
                                                         "at most 8)")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave out image files that cannot be read")
    parser.add_argument("--output-dir", help="a new folder for the results (default: runs/evaluation-<data>-<n>)")
    evaluate(parser.parse_args(argv))


def evaluate(options):
    """The evaluation of a checkpoint, from the images to result.json. Returns what is in result.json."""
    device = choose_device(options.device)
    model = load_model(options.checkpoint)
    check_head(model)
    loader = evaluation_loader(model, options)
    with unless_empty(new_output_dir(options.output_dir, "evaluation", loader.dataset_name)) as folder:
        found = score(model, loader, device, options.amp)
    print(describe(found, loader))
    heading = f"accuracy {percent(found.correct, found.n)}\n{found.n:,} images"
    names = list(map(drawable, found.class_names))
    save_figure(plot_confusion(found.confusion, names, title=heading), folder / "confusion.png")
    write_rows(folder / "confusion.csv", ["true \\ predicted", *found.class_names],
               ([name, *counts] for name, counts in zip(found.class_names, found.confusion.tolist(), strict=True)))
    write_mistakes(found, loader, folder)
    result = dict(checkpoint=options.checkpoint, data_dir=options.data_dir, dataset=loader.dataset_name,
                  split=loader.split, n=found.n, correct=found.correct, accuracy=found.accuracy,
                  interval=found.interval, balanced_accuracy=found.balanced_accuracy, top5=found.top5,
                  classes=[dict(name=name, n=n, correct=correct) for name, n, correct in per_class(found)],
                  skipped=loader.skipped, device=str(device), torch=torch.__version__,
                  precision=str(choose_precision(options.amp, device) or torch.float32))
    write_json(result, folder / "result.json")
    print(f"{folder}/ has {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return result


def evaluation_loader(model, options):
    """The images to score a model on, shown to it as those of its training."""
    img_size = one_side(pair(model.img_size))
    if not isinstance(img_size, int):
        raise InputError(f"the model takes images of {img_size[0]}x{img_size[1]} pixels; expected a square, as the "
                         f"loaders give; use inference.score with batches of your own")
    shown = dict(workers=options.workers, mean=model.mean, std=model.std, interpolation=model.interpolation,
                 skip_corrupt=options.skip_corrupt)
    images = (options.data_dir, model.class_names, options.batch_size, img_size, options.dataset)
    cut, known = training_cut(options.checkpoint, options.data_dir)
    loader = get_evaluation_loader(*images, **shown, **cut)
    if loader.split == "held out" and known not in (None, fingerprint(loader)):
        print("The images of the folder have changed since the training: which were held out of it cannot be told.")
        loader = get_evaluation_loader(*images, **shown)
    return loader


def training_cut(checkpoint, data_dir):
    """(arguments of get_evaluation_loader, fingerprint of the images held out), if the checkpoint tells that it was
    trained on a part of this folder; else nothing."""
    entries = read_checkpoint(checkpoint)
    training = entries.get("options") or {}
    folders = [Path(folder).expanduser().resolve() for folder in (data_dir, training.get("data_dir", data_dir))]
    if "data_dir" not in training or folders[0] != folders[1]:
        return {}, None
    cut = {name: training[name] for name in ("val_fraction", "seed") if name in training}
    return dict(cut, held_out=True), entries.get("validation_files")


def fingerprint(loader):
    """Of the names of a loader's files, with those left out: a sum that is the same for the same ones. None for sets
    that are not files."""
    if loader.files is None:
        return None
    names = sorted({*map(str, loader.files), *map(str, loader.skipped)})
    ends = "\n".join("/".join(Path(name).parts[-2:]) for name in names)
    return hashlib.sha256(ends.encode(errors="surrogateescape")).hexdigest()


def describe(found, loader):
    """A Score in lines of text."""
    n_seen = (found.confusion.sum(dim=1) > 0).sum().item()
    lines = [f"{loader.dataset_name}: {found.n:,} {SPLITS.get(loader.split, 'images')}"]
    if loader.skipped:
        lines.append(f"left out: {len(loader.skipped)} image files that cannot be read")
    lines += [f"accuracy           {percent(found.correct, found.n)}, {found.correct:,} right; 95% Wilson interval",
              f"balanced accuracy  {found.balanced_accuracy:.1%}, the mean of the recalls of {n_seen} classes"]
    if n_seen < len(found.class_names):
        lines[-1] += f"; the other {len(found.class_names) - n_seen} have no images here"
    if found.top5 is not None:
        lines.append(f"top-5 accuracy     {found.top5:.1%}")
    places, heading = range(len(found.class_names)), "recall of each class:"
    if n_seen > 20:
        places = class_recalls(found.confusion).argsort(stable=True)[:20].tolist()  # those without images are last
        heading = "recall of the 20 classes with the lowest:"
    classes = per_class(found)
    shown = [classes[place] for place in places if classes[place][1]]
    width = max(len(name) for name, _, _ in shown)
    return "\n".join([*lines, heading, *(f"  {name:{width}}  {correct / n:6.1%}  {correct:,} of {n:,}"
                                         for name, n, correct in shown)])


def per_class(found):
    """(name, images, how many of them were right) for each class of a Score."""
    return list(zip(found.class_names, found.confusion.sum(dim=1).tolist(), found.confusion.diagonal().tolist(),
                    strict=True))


def write_rows(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_mistakes(found, loader, folder):
    """mistakes.csv and, where there are any, mistakes.png."""
    worst, names = found.mistakes, found.class_names
    true, predicted = ([names[label] for label in labels.tolist()] for labels in (worst.labels, worst.predictions))
    probabilities = worst.probabilities.tolist()
    write_rows(folder / "mistakes.csv", ["file", "true", "predicted", "probability"],
               zip([file or "" for file in worst.files], true, predicted, probabilities, strict=True))
    if probabilities:
        titles = list(map(mistake_title, true, predicted, probabilities))
        heading = f"{len(titles)} of {found.n - found.correct:,} mistakes,\nthe most confident first\n(true: predicted)"
        save_figure(plot_images(worst.images, titles, columns=6, title=heading, mean=loader.mean, std=loader.std),
                    folder / "mistakes.png")


def mistake_title(true, predicted, probability):
    """'true: predicted 98%' in lines that fit above a small picture."""
    true, predicted = (textwrap.fill(drawable(name), 14, max_lines=2, placeholder="…") for name in (true, predicted))
    return f"{true}:\n{predicted}\n{probability:.0%}"


def drawable(name):
    """A name with what the font of the figures has no sign for written as U+9CE5, say."""
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return "".join(sign if font.get_char_index(ord(sign)) else f"U+{ord(sign):04X}" for sign in name)


# ---- python train_vit.py predict --------------------------------------------------------------------------


def predict_command(argv=None):
    parser = OneLineParser(prog="train_vit.py predict", description="The likeliest classes of image files, a line "
                           "each. Files that cannot be read are named on stderr; the others are answered, and the "
                           "exit code is 2.")
    add_checkpoint(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file, or a folder: all image files in "
                        "it, at any depth, but hidden ones")
    parser.add_argument("--top", type=whole(1), default=3, help="classes to name at most (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help='print a JSON list of {"file", "predictions": [{"class", '
                        '"probability"}]} or {"file", "error"}')
    add_device(parser)
    options = parser.parse_args(argv)
    model = load_model(options.checkpoint).to(choose_device(options.device))
    check_head(model)
    files = [file for path in options.images for file in files_at(path)]
    width, entries, n_failed = min(80, max(map(len, files))), [], 0
    for entry in answers_for(model, files, options.top):
        if "error" in entry:
            n_failed += 1
            print(f"{parser.prog}: {entry['error']}", file=sys.stderr)
        elif not options.json:
            print(f"{entry['file']:{width}}  {in_words(entry['predictions'])}")
        if options.json:
            entries.append(entry)
    if options.json:
        print(json.dumps(entries, indent=2))
    if n_failed:
        sys.exit(2)


def files_at(path):
    """The image files of a folder, at any depth, sorted, without hidden ones; what is none, or has none, itself."""
    files = []
    for parent, subfolders, names in os.walk(path, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        files += [os.path.join(parent, name) for name in sorted(names)
                  if name[0] != "." and name.lower().endswith(IMG_EXTENSIONS)]
    return files or [path]


def answers_for(model, files, top):
    """Yields {"file", "predictions"} or {"file", "error"} for each of the files, which are read a batch at a time."""
    for batch in batches_of(files):
        inputs, entries = [], []
        for file in batch:
            entries.append(dict(file=file))
            try:
                inputs.append(read_input(file, model))
            except InputError as error:
                entries[-1]["error"] = str(error)
        answers = iter(ranked(model, inputs, top) if inputs else ())
        for entry in entries:
            if "error" not in entry:
                entry["predictions"] = [{"class": name, "probability": share} for name, share in next(answers)]
            yield entry


def read_input(file, model):
    """A file as the model's input, (1, 3, H, W)."""
    if os.path.isdir(file):
        raise InputError(f"folder {file!r} has no image files ({', '.join(IMG_EXTENSIONS)}); give another, or files")
    return prepare_image(file, model)[0]


def in_words(predictions):
    return ", ".join(f"{entry['class']} {entry['probability']:.1%}" for entry in predictions)


# ---- python train_vit.py export ---------------------------------------------------------------------------


def export_command(argv=None):
    parser = OneLineParser(prog="train_vit.py export", description="Writes a checkpoint as one ONNX file, checked "
                           "against the model, for programs without PyTorch. Needs the packages onnx and onnxscript.")
    add_checkpoint(parser)
    parser.add_argument("--output", metavar="FILE", help="(default: the checkpoint's name with .onnx)")
    options = parser.parse_args(argv)
    path = Path(options.output or Path(options.checkpoint).with_suffix(".onnx"))
    if path.exists():
        raise InputError(f"{path} exists already; choose another name with --output, or remove it")
    model = load_model(options.checkpoint)
    difference = export_onnx(model, path)
    height, width = pair(model.config.img_size)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; images (batch, {model.config.in_channels}, {height}, {width}) "
          f"to logits (batch, {model.config.n_classes}); largest difference from the model {difference:.1e} of the "
          f"largest logit")


# ---- What the commands share ------------------------------------------------------------------------------


def add_checkpoint(parser):
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="as a training wrote it: best.pt; it "
                        "tells the classes, the image size and the normalisation")


def add_device(parser):
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
