"""Objectives, which training minimises, and the metrics that they collect.

Classification is the objective that train_vit.py uses, and Distillation the one with --teacher. MaskedPixels and
MaskedTokens need no labels. New objectives are subclasses of Objective; for a small example see
tests/training/test_toy_objective.py.

    loss = objective(model, batch, metrics)

Shapes:  B images in a batch, C classes; images (B, C, H, W) have C channels, H, W height and width.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from vit_bridge.analysis.cost import count_parameters
from vit_bridge.data.loaders import LABEL_KEYS
from vit_bridge.errors import InputError, assume, check_choice
from vit_bridge.models.adapters import check_has_head, preprocessing_of
from vit_bridge.models.beit import block_mask
from vit_bridge.models.mae import random_masking
from vit_bridge.models.protocol import ask, class_name
from vit_bridge.preprocessing import describe_size
from vit_bridge.runtime import at_least_float32, device_of, dtype_of, logits_of, unwrapped
from vit_bridge.weights.heads import listed, match_names
from vit_model import grid_of

# ---- Metrics and the interface of objectives --------------------------------------------------------------


class Metrics:
    """Sums over images, kept on the device so that adding to them does not make the CPU wait for it.

    With skip_nonfinite, a value that is not finite counts as 0, because a gradient scaler skips that training step.

    Attributes
    ----------
    n : int
        Images counted.
    sums : dict
        {name: sum of a value over these images}, tensors of any shape.
    """

    def __init__(self, device, skip_nonfinite=False):
        self.device, self.skip_nonfinite = device, skip_nonfinite
        self.n, self.sums = 0, {}

    def update(self, n, **means):
        """Add n images; `means` are scalar tensors, each the mean of a value over these images."""
        for name, mean in means.items():
            mean = mean.detach().float()
            self.add(name, (mean.nan_to_num(0.0, 0.0, 0.0) if self.skip_nonfinite else mean) * n)
        self.n += n

    def add(self, name, total):
        """Add a tensor to the sum of this name."""
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def compute(self):
        """Return {name: mean over the images counted} as floats; the Trainer reads "loss"."""
        return {name: total.item() / self.n for name, total in self.sums.items()}

    def merge(self):
        """Return the metrics summed over all processes, on each of them."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, self.state_dict())
        names = {name for state in states for name in state}
        merged = type(self)(self.device, self.skip_nonfinite)
        merged.load_state_dict({name: sum(state[name] for state in states if name in state) for name in names})
        return merged

    def state_dict(self):
        """Return plain numbers, and tensors on the CPU."""
        return dict(n=self.n, **{name: total.cpu() if total.ndim else total.item()
                                 for name, total in self.sums.items()})

    def load_state_dict(self, entries):
        """Restore what state_dict() returned."""
        self.n = entries["n"]
        self.sums = {name: torch.as_tensor(value).to(self.device, copy=True) for name, value in entries.items()
                     if name != "n" and value is not None}


class Objective(nn.Module):
    """The quantity that training minimises: a subclass defines forward(), the columns and the criterion.

    The Trainer moves an objective to the model's device. It neither trains nor saves the objective's own parameters.

    Attributes
    ----------
    columns : dict
        {name: format} of the history's columns. A name is "train_" or "val_" followed by the name of a metric.
    criterion : str
        The column that chooses the best epoch.
    maximise : bool
        Whether the largest value of the criterion is the best; otherwise the smallest is.
    mixing : callable, optional
        Combines the images of a batch: (images, labels) -> (images, soft targets).
    dtype : torch.dtype or None
        Mixed precision of the training, set by the Trainer, for models that belong to the objective.
    """

    columns = {"train_loss": ".3f", "val_loss": ".3f"}  # noqa: RUF012 - subclasses replace it
    criterion, maximise, mixing, dtype = "val_loss", False, None, None
    looked = ()  # modes whose first batch had its pixel range checked: True for training, False for evaluation

    def forward(self, model, batch, metrics=None):
        """Return the loss, a scalar: the mean over the images, so that parts of a batch add up to the whole.

        self.training is True in a training step and False in an evaluation.

        Parameters
        ----------
        model : callable
            The model, with outputs in float32.
        batch : tuple of Tensor
            What the loader yields, on the model's device; images (B, C, H, W) come first.
        metrics : Metrics, optional
            Updated with the batch.
        """
        raise NotImplementedError

    def check(self, batch):
        """Check a batch before it moves to the device, and return it as forward() expects it.

        Warns with an Assumption if the images of the first batch do not look normalised.

        Raises
        ------
        InputError
            If the images are not finite floating-point numbers, or have their channels last.
        """
        check_pixels(batch[0])
        if self.training not in self.looked and batch[0].numel():
            self.looked = (*self.looked, self.training)
            low, high = (bound.item() for bound in batch[0].aminmax())
            if low >= 0 and high > 50:
                assume(f"images hold values from {low:.3g} to {high:.3g}; expected normalised images, with mean 0 and "
                       f"standard deviation 1: use Preprocessing.normalise, or (images / 255 - mean) / std")
        return batch

    def check_model(self, model):
        """Raise InputError if the objective cannot be used with the model."""

    def new_metrics(self, device, skip_nonfinite=False):
        """Return empty Metrics."""
        return Metrics(device, skip_nonfinite)

    def best_epoch(self, history):
        """Return the best epoch, counted from 1, or 0 if there is none.

        On a tie the last epoch wins, because its learning rate is lower. NaN is worse than any value.
        """
        signed = [-math.inf if math.isnan(value) else value if self.maximise else -value
                  for value in history[self.criterion]]
        return max(range(len(signed)), key=lambda i: (signed[i], i), default=-1) + 1

    def describe(self, values):
        """Return {column: value} as text: "train loss 1.889 acc 30.5%   val loss 1.613 acc 43.9%"."""
        parts = {}
        for column, spec in self.columns.items():
            part, _, name = column.partition("_")
            if column in values:
                parts.setdefault(part, [part]).append(f"{name.replace('_', ' ')} {values[column]:{spec}}")
        return "   ".join(" ".join(words) for words in parts.values())


class InPrecision:
    """A model that computes in mixed precision and returns float32 logits, as an objective calls it.

    The model runs under autocast to `dtype` (None: no autocast), on inputs converted to `input_dtype`, the type of its
    weights.
    """

    def __init__(self, model, device, dtype, input_dtype):
        self.model, self.device_type, self.dtype, self.input_dtype = model, device.type, dtype, input_dtype

    def __call__(self, *inputs):
        inputs = [one.to(self.input_dtype) if one.is_floating_point() else one for one in inputs]
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            output = logits_of(self.model(*inputs))
        if isinstance(output, tuple):
            return tuple(at_least_float32(one) if isinstance(one, torch.Tensor) else one for one in output)
        return output.float() if isinstance(output, torch.Tensor) else output


def check_pixels(images):
    """Raise InputError unless images are finite floating-point numbers with channels first.

    Only images on the CPU are checked for NaN: on a GPU the check would make the CPU wait.
    """
    shape = tuple(images.shape)
    if not images.is_floating_point():
        raise InputError(f"the images of a batch are {_type_name(images)} of {shape}; expected normalised "
                         f"floating-point numbers: images.float() / 255, then (images - mean) / std, or "
                         f"Preprocessing.normalise")
    if images.ndim == 4 and shape[3] in (1, 3, 4) and min(shape[1:3]) > 4:
        raise InputError(f"the images of a batch have the shape {shape}, with channels last; expected (B, C, H, W): "
                         f"use images.permute(0, 3, 1, 2)")
    if images.device.type == "cpu" and not images.sum().isfinite():  # one sum is faster than testing every number
        bad = (~images.isfinite()).flatten(1).any(dim=1).nonzero()[:, 0].tolist()  # empty if only the sum overflows
        if bad:
            raise InputError(f"{len(bad)} of the {len(images)} images of a batch hold NaN or infinity, the first at "
                             f"index {bad[0]}; check how they are read and normalised")


def _type_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


# ---- Classification ---------------------------------------------------------------------------------------


class Classification(Objective):
    """One class per image: logits (B, C) against labels (B) or soft targets (B, C).

    Parameters
    ----------
    label_smoothing : float
        Fraction of the target that is spread evenly over all classes. See CrossEntropy.
    class_weights : sequence of C floats, optional
        See CrossEntropy. With class weights the best epoch is the one with the best balanced accuracy.
    mixing : callable, optional
        Such as data.augmentation.Mixing, applied to training batches. The class with the larger share then counts as
        the true class.
    loss_fn : callable, optional
        (logits, labels) -> a scalar, the mean over the images; replaces CrossEntropy. It receives floating-point labels
        unchanged, of any shape. Accuracies are NaN if such labels do not have one number per class, (B, C).

    Raises
    ------
    InputError
        While training: for logits or labels of the wrong shape, and labels out of range.
    """

    columns = {"train_loss": ".3f", "train_acc": ".1%",  # noqa: RUF012
               "val_loss": ".3f", "val_acc": ".1%", "val_balanced_acc": ".1%"}
    maximise = True

    def __init__(self, label_smoothing=0.1, class_weights=None, mixing=None, loss_fn=None):
        super().__init__()
        self.loss_fn = loss_fn or CrossEntropy(label_smoothing, class_weights)
        self.own_loss = not isinstance(self.loss_fn, CrossEntropy)
        self.mixing = mixing
        self.criterion = "val_acc" if class_weights is None else "val_balanced_acc"
        self.n_heads = 1  # of the model, set by check_model
        self.n_classes = None  # of the model's logits, set after the first batch
        self.suspect = False  # whether the last checked batch has a label of n_classes or more

    def forward(self, model, batch, metrics=None):
        """Return the mean loss of a batch (images, labels)."""
        images, labels = batch
        labels = self.targets(labels)  # (B), or (B, C)
        if self.mixing is not None and self.training:
            images, labels = self.mixing(images, labels)
        heads = model(images)  # (B, C); in training, one for each head
        heads = heads if self.n_heads > 1 and isinstance(heads, tuple) else (heads,)
        for logits in heads:
            check_logits(logits, len(images))
        logits = sum(heads) / len(heads)  # (B, C)
        if self.own_loss and labels.is_floating_point():
            if self.n_classes != logits.shape[1] and not are_shares(labels, logits):
                assume(f"labels of {_type_name(labels)} {tuple(labels.shape)} are not classes, so accuracies are NaN")
            self.n_classes = logits.shape[1]
        elif labels.device.type == "cpu" or self.suspect or self.n_classes != logits.shape[1]:  # a GPU would wait
            self.n_classes = logits.shape[1]
            check_range(labels, self.n_classes)
        loss = self.loss(heads, images, labels)
        if metrics is not None:
            metrics.update(loss, logits, labels)
        return loss

    def loss(self, heads, images, labels):
        """Return the loss, a scalar: the mean over the heads, a tuple of logits (B, C)."""
        return sum(self.loss_fn(logits, labels) for logits in heads) / len(heads)

    def check(self, batch):
        """Return (images, labels), with labels int64 (B) or soft targets (B, C).

        Raises
        ------
        InputError
            If the batch has a different form, or a label is out of range.
        """
        if len(batch) != 2:
            shapes = ", ".join(str(tuple(one.shape)) for one in batch)
            raise InputError(f"a batch has {len(batch)} {'entry' if len(batch) == 1 else 'entries'}, {shapes}; "
                             f"expected 2, images (B, C, H, W) and labels (B), in a dict under "
                             f"{' or '.join(map(repr, LABEL_KEYS))}; for other batches write an Objective")
        images, labels = super().check(batch)[0], self.targets(batch[1])
        if not len(labels) or (self.own_loss and labels.is_floating_point()) or (
                labels.device.type != "cpu" and self.n_classes is not None):
            return images, labels
        if labels.ndim == 2:
            sums = labels.sum(dim=1)  # (B)
            if not ((labels >= 0).all() and (sums - 1).abs().max() < 1e-2):
                raise InputError(f"labels of {_type_name(batch[1])} {tuple(batch[1].shape)} have rows that sum to "
                                 f"{sums.min():.3g} to {sums.max():.3g}; expected one class number per image, "
                                 f"int64 (B), or rows that sum to 1. For several classes per image use "
                                 f"loss_fn=nn.BCEWithLogitsLoss()")
        check_range(labels)
        self.suspect = labels.ndim == 1 and self.n_classes is not None and bool(labels.max() >= self.n_classes)
        return images, labels

    def targets(self, labels):
        """Return the labels for the loss: class_labels, or floating-point labels unchanged for a loss_fn."""
        return labels if self.own_loss and labels.is_floating_point() else class_labels(labels)

    def check_model(self, model):
        """Raise InputError if the model has no head."""
        check_has_head(model)
        self.n_heads = len(ask(unwrapped(model), "head_names"))

    def new_metrics(self, device, skip_nonfinite=False):
        """Return empty ClassificationMetrics."""
        return ClassificationMetrics(device, skip_nonfinite)


def class_labels(labels):
    """Return labels as int64 (B), or soft targets (B, C) as floating-point numbers.

    Accepts whole numbers (B) or (B, 1), soft targets (B, C), and one-hot rows (B, C) of any type.

    Raises
    ------
    InputError
        For other shapes, and for floating-point labels (B).
    """
    if labels.ndim == 2 and labels.shape[1] > 1:
        return labels if labels.is_floating_point() else labels.float()  # (B, C)
    if labels.is_floating_point() or labels.is_complex() or labels.ndim not in (1, 2):
        advice = "use labels.long() for classes, or loss_fn=nn.MSELoss() to predict numbers"
        if labels.ndim not in (1, 2):
            advice = "pass one number or one row per image, or write an Objective"
        raise InputError(f"labels are {_type_name(labels)} of {tuple(labels.shape)}; expected class numbers from 0, "
                         f"int64 (B), or soft targets (B, C): {advice}")
    return labels.reshape(-1).long()  # (B)


def are_shares(labels, logits):
    """Return whether floating-point labels hold one number per class, (B, C), for two classes or more."""
    return labels.shape == logits.shape and logits.shape[1] > 1


def check_range(labels, n_classes=None):
    """Raise InputError for labels (B) out of range, or soft targets (B, C) with a different C.

    Without n_classes, only negative labels are refused.
    """
    if labels.ndim == 2:
        if n_classes not in (None, labels.shape[1]):
            raise InputError(f"soft targets of shape {tuple(labels.shape)} are for {labels.shape[1]} classes, but the "
                             f"model has {n_classes}; build the model with n_classes={labels.shape[1]}")
        return
    low, high = labels.min().item(), labels.max().item()
    if low < 0:
        raise InputError(f"label {low} is out of range; labels begin at 0"
                         + ("" if n_classes is None else f" and end at {n_classes - 1} for this model")
                         + "; leave out images without a class")
    if n_classes is not None and high >= n_classes:
        first = "subtract 1" if (low, high) == (1, n_classes) else "leave out images without a class"
        raise InputError(f"label {high} is out of range for a model with {n_classes} classes; labels begin at 0 "
                         f"and end at {n_classes - 1}: {first}, or build the model with n_classes={high + 1} or more")


def check_logits(logits, n_images, who="model"):
    """Raise InputError unless the logits of the model, or of the teacher, are one tensor (B, C)."""
    if isinstance(logits, torch.Tensor) and logits.ndim == 2 and len(logits) == n_images:
        return
    if isinstance(logits, torch.Tensor):
        found = f"a tensor of {tuple(logits.shape)}"
    elif isinstance(logits, tuple | list):
        found = f"a {type(logits).__name__} of {len(logits)}"
    elif isinstance(logits, dict):
        found = f"a dict with {', '.join(map(repr, logits))}"
    else:
        found = f"a {type(logits).__name__}"
    raise InputError(f"the {who} returns {found} for {n_images} images; expected one tensor of logits (B, C), or an "
                     f"output with .logits: wrap the {who} in a module that returns them, or write an Objective")


class CrossEntropy(nn.Module):
    """Cross-entropy of logits (B, C) and labels (B) or soft targets (B, C), averaged over the images.

    Parameters
    ----------
    label_smoothing : float
        Fraction of the target that is spread evenly over all C classes, from 0 to 1.
    class_weights : sequence of C floats, optional
        Factor on the loss of an image, by its class. None: 1 for all.

    Notes
    -----
    torch.nn.CrossEntropyLoss divides by the sum of the weights in a batch, and applies the weights of all classes to
    the smoothed part of the target. This class divides by the number of images, so that parts of a batch add up to the
    whole, and multiplies the whole loss of an image by the weight of its own class.
    """

    def __init__(self, label_smoothing=0.0, class_weights=None):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", None if class_weights is None else torch.as_tensor(class_weights).float())

    def forward(self, logits, labels):
        """Return the mean loss, a scalar."""
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)  # (B)
        if self.class_weights is not None:
            losses = losses * (labels @ self.class_weights if labels.ndim == 2 else self.class_weights[labels])
        return losses.mean()


def balancing_weights(class_counts):
    """Return class weights N / (C n_c), which make every class contribute equally to the loss.

    A class without images has weight 0. If every class has images, the mean weight over the N images is 1.
    """
    total, n_classes = sum(class_counts), len(class_counts)
    return [total / (n_classes * n) if n else 0.0 for n in class_counts]


class ClassificationMetrics(Metrics):
    """Metrics of the loss and, in sums["classes"] (2, C), of images and correct predictions per class."""

    def update(self, loss, logits, labels):
        """Add a batch: its mean loss, its logits (B, C), and its labels (B) or soft targets (B, C).

        The largest soft target of an image is its class. Other floating-point labels only add to the loss.
        """
        if labels.is_floating_point() and not are_shares(labels, logits):
            super().update(len(labels), loss=loss)
            return
        labels = labels.argmax(dim=1) if labels.ndim == 2 else labels
        hits = (logits.detach().argmax(dim=1) == labels).float()  # (B)
        classes = torch.zeros(2, logits.shape[1], device=logits.device)  # (2, C)
        classes[0].index_add_(0, labels, torch.ones_like(hits))
        classes[1].index_add_(0, labels, hits)
        self.add("classes", classes)
        super().update(len(labels), loss=loss)

    def compute(self):
        """Return dict(loss, acc, balanced_acc, correct, n), with accuracies from 0 to 1.

        balanced_acc is the mean of the accuracies of the classes that have images. If the labels are not classes, both
        accuracies are NaN and `correct` is 0.
        """
        if "classes" not in self.sums:
            return dict(super().compute(), acc=math.nan, balanced_acc=math.nan, correct=0, n=self.n)
        n, hits = self.sums["classes"].cpu().double()  # (C), (C)
        correct = int(hits.sum())
        return dict(loss=self.sums["loss"].item() / self.n, acc=correct / self.n,
                    balanced_acc=(hits[n > 0] / n[n > 0]).mean().item(), correct=correct, n=self.n)


# ---- Distillation -----------------------------------------------------------------------------------------

DISTILLATIONS = {"hard": dict(weight=0.5, temperature=1.0), "soft": dict(weight=0.1, temperature=3.0)}  # the paper's
DEFAULT_DISTILLATION = "hard"


class Distillation(Classification):
    """Learn from the labels and from a teacher: (1 - weight) label loss + weight * distillation_loss.

    A model with two heads, such as DistilledViT, learns the labels with the first and the teacher with the second. A
    model with one head learns both with it. The teacher sees the same augmented images as the model, stretched to its
    own size and normalised as in its own training. Evaluations do not use it: their loss is the label loss, which
    cannot be compared with the training loss.

    Parameters
    ----------
    teacher : Module
        A trained classifier: a model of this library, of timm, torchvision or transformers, or any other that has a
        `preprocessing`. It is frozen and stays in eval mode. It computes in the precision of the training.
    preprocessing : Preprocessing
        How the images of the training are prepared. If both sides have class names, the teacher's classes are matched
        by name, and its other classes are left out.
    kind : {"hard", "soft"}, optional
        Whether to learn the class that the teacher predicts, or its probabilities; see distillation_loss.
    weight : float, optional
        Share of the teacher in the loss, from 0 to 1. By default as in the paper: 0.5 for "hard", 0.1 for "soft".
    temperature : float, optional
        For "soft"; by default 3, as in the paper.
    **classification
        As for Classification. Label smoothing and class weights apply to the label loss only.

    Raises
    ------
    InputError
        If a value is out of range, if the teacher has no head, if nothing records how its images are prepared, if they
        have different channels, or if it does not know all classes.

    References
    ----------
    Touvron et al. 2021, "Training data-efficient image transformers", Eq. 2 and 3.
    """

    def __init__(self, teacher, preprocessing, kind=DEFAULT_DISTILLATION, weight=None, temperature=None,
                 **classification):
        super().__init__(**classification)
        check_choice("distillation", kind, tuple(DISTILLATIONS))
        if kind == "hard" and temperature is not None:
            raise InputError(f"temperature {temperature!r} has no effect on hard distillation; leave it out, or use "
                             f"kind='soft'")
        self.kind, default = kind, DISTILLATIONS[kind]
        self.weight = default["weight"] if weight is None else weight
        self.temperature = default["temperature"] if temperature is None else temperature
        if not 0 <= self.weight <= 1:
            raise InputError(f"weight {weight!r} must lie between 0 (learn from the labels only) and 1 (learn from the "
                             f"teacher only)")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature {temperature!r} must be a positive number such as 3")
        check_has_head(teacher)
        self.theirs = preprocessing_of(teacher)
        self.prepare = Reprepared(preprocessing, self.theirs)
        self.teacher = unwrapped(teacher).requires_grad_(False).eval()
        self.register_buffer("order", None)
        self.to(device_of(self.teacher))
        size = preprocessing.n_channels, *preprocessing.size
        self.n_theirs = self.teach(self.prepare.scale.new_zeros(1, *size)).shape[1]
        self.order = matched_classes(self.theirs.class_names, self.n_theirs, preprocessing.class_names)

    def train(self, mode=True):
        """Set the mode, but leave the teacher in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def loss(self, heads, images, labels):
        """Return the loss, a scalar; `heads` are one or two logits (B, C)."""
        if not self.training:
            return super().loss(heads, images, labels)
        theirs = self.teach(images)  # (B, C)
        if theirs.shape != heads[-1].shape:
            raise InputError(f"the teacher has {theirs.shape[1]} classes, but the model has {heads[-1].shape[1]}; "
                             f"choose a teacher for the same classes, or name the classes of both in their "
                             f"preprocessing")
        taught = distillation_loss(heads[-1], theirs, self.kind, self.temperature)
        return (1 - self.weight) * self.loss_fn(heads[0], labels) + self.weight * taught

    @torch.no_grad()
    def teach(self, images):
        """Return the teacher's logits (B, C) for images of the training, with the classes in their order."""
        forward = InPrecision(self.teacher, images.device, self.dtype, dtype_of(self.teacher))
        logits = forward(self.prepare(images))  # (B, the teacher's classes)
        check_logits(logits, len(images), "teacher")
        return logits if self.order is None else logits[:, self.order]

    def describe_teacher(self):
        """Return in one line who teaches and how, and which of its classes."""
        n = self.n_theirs if self.order is None else len(self.order)
        return (f"{class_name(self.teacher)} with {count_parameters(self.teacher):,} parameters for images of "
                f"{describe_size(self.theirs.img_size)} pixels; {self.kind} distillation, weight {self.weight:g}"
                + (f", temperature {self.temperature:g}" if self.kind == "soft" else "")
                + (f"; its {n:,} classes, " if n == self.n_theirs else f"; {n:,} of its {self.n_theirs:,} classes, ")
                + ("assumed to be in the order of the images' classes" if self.order is None else "matched by name"))


class Reprepared(nn.Module):
    """Images of a training as a teacher expects them: stretched to its size, and normalised as in its own training.

    own, theirs: Preprocessing of the training's images and of the teacher's. Raises InputError if they have different
    channels.
    """

    def __init__(self, own, theirs):
        super().__init__()
        if own.n_channels != theirs.n_channels:
            raise InputError(f"the teacher's images have {theirs.n_channels} channels, but those of the training "
                             f"have {own.n_channels}; choose a teacher for the same kind of images")
        self.size, self.interpolation = theirs.size, theirs.interpolation
        mean, std, their_mean, their_std = (torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1) for numbers in (
            own.mean, own.std, theirs.mean, theirs.std))
        # from the one normalisation to the other: (std x + mean - their_mean) / their_std
        self.register_buffer("scale", (std / their_std).float())  # (C, 1, 1)
        self.register_buffer("shift", ((mean - their_mean) / their_std).float())  # (C, 1, 1)

    def forward(self, images):
        """Return the images for the teacher."""
        if images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode=self.interpolation, antialias=True)
        return images * self.scale + self.shift


def distillation_loss(logits, teacher_logits, kind=DEFAULT_DISTILLATION, temperature=1.0):
    """Return the loss of logits (B, C) against a teacher's, a scalar: the mean over the images.

    "hard": the cross-entropy with the classes that the teacher predicts. "soft": T^2 KL(teacher || model), where the
    logits of both are divided by the temperature T; the factor keeps the gradient's size (Hinton et al. 2015). (DeiT's
    code divides by B C instead of B, so its soft loss is C times smaller.)
    """
    if kind == "hard":
        return F.cross_entropy(logits, teacher_logits.argmax(dim=1))
    ours, theirs = (F.log_softmax(one / temperature, dim=1) for one in (logits, teacher_logits))  # (B, C)
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def matched_classes(theirs, n_theirs, ours):
    """Return the place among a teacher's logits of each class, int64 (C), or None if there are no names to match.

    Parameters
    ----------
    theirs, ours : list of str or None
        Class names of the teacher and of the images.
    n_theirs : int
        Number of the teacher's logits.

    Raises
    ------
    InputError
        If the teacher does not know a class, or if names or logits are missing.
    """
    if theirs and len(theirs) != n_theirs:
        raise InputError(f"the teacher's preprocessing names {len(theirs)} classes{listed(theirs)}, but it has "
                         f"{n_theirs} logits; set one name for each in teacher.preprocessing")
    if not theirs or not ours:
        if ours and len(ours) != n_theirs:
            raise InputError(f"the teacher has {n_theirs} classes without names, but the images have {len(ours)}"
                             f"{listed(ours)}; choose a teacher for the same classes, or name its classes in "
                             f"teacher.preprocessing")
        assume("the classes of the teacher or of the images have no names, so they are assumed to be in the same order")
        return None
    places, _ = match_names(theirs, ours)
    missing = [name for name, place in zip(ours, places, strict=True) if place is None]
    if missing:
        raise InputError(f"the teacher does not know {len(missing)} of the {len(ours)} classes{listed(missing)}; it "
                         f"knows {len(theirs)}{listed(theirs)}: fine-tune it on these images first, with --pretrained")
    return torch.tensor(places)


# ---- Without labels ---------------------------------------------------------------------------------------


class MaskedPixels(Objective):
    """Predict the pixels of hidden patches: the loss of a MaskedAutoencoder. Labels are ignored.

    In training, each step draws the masks from torch's generator. In an evaluation, the i-th image always gets the i-th
    mask of a fixed sequence, whatever the batch size, so that the losses of different epochs and models can be
    compared. Each process counts its own images.

    References
    ----------
    He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners".
    """

    patch_size = None  # of the model, set by check_model

    def forward(self, model, batch, metrics=None):
        """Return the mean loss of a batch whose first entry is the images."""
        images = batch[0]
        noise = () if self.training else (self.noise(images, 0 if metrics is None else metrics.n),)
        loss, _, _ = model(images, *noise)
        if metrics is not None:
            metrics.update(len(images), loss=loss)
        return loss

    def noise(self, images, first):
        """Return the fixed noise (B, patches) of images whose place in the evaluation is `first`, first + 1, ...

        It holds whole numbers, which do not change in a model with weights in bfloat16.
        """
        n_patches = math.prod(grid_of(tuple(images.shape[2:]), self.patch_size))
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(images))]
        noise = torch.stack([torch.randperm(n_patches, generator=generator) for generator in generators])
        return noise.to(images.device)

    def check_model(self, model):
        """Raise InputError if the model does not hide patches, or has too few to hide some and leave some."""
        model = unwrapped(model)
        if not ask(model, "masks"):
            raise InputError(f"a {class_name(model)} hides no patches; for MaskedPixels expected a MaskedAutoencoder, "
                             f"such as build_model('mae_nano')")
        self.patch_size, n_patches = model.patch_embed.patch_size, model.patch_embed.n_patches
        random_masking(torch.zeros(1, n_patches, 1), model.config.mask_ratio, torch.zeros(1, n_patches))


class MaskedTokens(Objective):
    """Name the tokens of hidden patches: the mean cross-entropy over these patches (Bao et al. 2022, Eq. 1).

    Labels, if a batch has any, are not used. Every evaluation hides the same patches of the same images.

    Parameters
    ----------
    tokenizer : vit_bridge.training.tokenizer.PatchTokenizer
        A fitted tokenizer. It is neither trained nor saved by the Trainer.
    ratio : float, optional
        Share of the patches to hide, between 0 and 1.

    Raises
    ------
    InputError
        If the ratio is out of range, the tokenizer is not fitted, or the model predicts other tokens.
    """

    columns = {"train_loss": ".3f", "train_token_acc": ".1%",  # noqa: RUF012
               "val_loss": ".3f", "val_token_acc": ".1%", "val_commonest": ".1%"}

    def __init__(self, tokenizer, ratio=0.4):
        super().__init__()
        if not 0 < ratio < 1:
            raise InputError(f"ratio {ratio!r} must lie between 0 (hide no patch) and 1 (hide all patches)")
        if not tokenizer.centres.any():
            raise InputError("all centres of the tokenizer are 0; fit it first: tokenizer.fit(images)")
        self.tokenizer, self.ratio = tokenizer, ratio

    def forward(self, model, batch, metrics=None):
        """Return the mean loss of a batch whose first entry is the images."""
        images = batch[0]
        ids = self.tokenizer(images)  # (B, N)
        mask = self.hide(images, 0 if metrics is None else metrics.n)  # (B, N), on the CPU
        hidden = mask.flatten().nonzero()[:, 0].to(images.device)  # (B hidden patches); a mask on a GPU would wait
        logits = model(images, mask.to(images.device))  # (B, N, K)
        if logits.shape != (*ids.shape, self.tokenizer.n_tokens):
            raise InputError(f"the model returns logits of {tuple(logits.shape)}; expected "
                             f"{(*ids.shape, self.tokenizer.n_tokens)}, one row for each patch of the tokenizer: give "
                             f"both the same patch_size")
        logits, ids = logits.flatten(0, 1)[hidden], ids.flatten()[hidden]
        loss = F.cross_entropy(logits, ids)
        if metrics is not None:
            metrics.update(len(images), loss, logits, ids)
        return loss

    def hide(self, images, n_before):
        """Return which patches are hidden, bool (B, N), equally many in each image.

        In training they are drawn from torch's generator. In an evaluation, the number of an image in it determines
        its mask; n_before images come before these.
        """
        grid = grid_of(tuple(images.shape[2:]), self.tokenizer.patch_size)
        generators = [None if self.training else torch.Generator().manual_seed(n_before + i)
                      for i in range(len(images))]
        return torch.stack([self.mask(grid, generator).flatten() for generator in generators])

    def mask(self, grid, generator=None):
        """Return which patches of one image are hidden, bool (rows, columns)."""
        return block_mask(grid, max(1, round(self.ratio * grid[0] * grid[1])), generator)

    def check_model(self, model):
        """Raise InputError unless the model predicts the tokenizer's tokens and has patches to hide and to leave."""
        model, wanted = unwrapped(model), self.tokenizer.n_tokens
        if ask(model, "n_tokens") != wanted:
            raise InputError(f"a {class_name(model)} that predicts {ask(model, 'n_tokens')} tokens does not fit a "
                             f"tokenizer of {wanted}; use MaskedTokenModel(..., n_tokens={wanted})")
        self.mask(model.patch_embed.grid_size, torch.Generator())

    def new_metrics(self, device, skip_nonfinite=False):
        """Return empty TokenMetrics."""
        return TokenMetrics(device, skip_nonfinite)


class TokenMetrics(Metrics):
    """Metrics of hidden patches: the loss, the accuracy, and in sums["tokens"] (K) how often each token occurs."""

    def update(self, n, loss, logits, ids):
        """Add n images: their mean loss, and the logits (m, K) and the tokens (m) of their hidden patches."""
        counts = torch.zeros(logits.shape[1], device=ids.device)
        self.add("tokens", counts.index_add_(0, ids, torch.ones_like(ids, dtype=counts.dtype)))  # (K)
        super().update(n, loss=loss, token_acc=(logits.argmax(dim=1) == ids).float().mean())

    def compute(self):
        """Return dict(loss, token_acc, commonest).

        commonest is the share of the most frequent token, the accuracy of a model that always predicts it.
        """
        tokens = self.sums["tokens"]
        return dict(loss=self.sums["loss"].item() / self.n, token_acc=self.sums["token_acc"].item() / self.n,
                    commonest=(tokens.max() / tokens.sum()).item())
