"""Objectives: what a training minimises, and the metrics that it keeps.

    loss = objective(model, batch, metrics)

An objective also names the columns of the history, and the one that says which epoch is best. Classification is the
first; a new one is a subclass of Objective, such as the one in tests/training/test_toy_objective.py.

Shapes:  B images in a batch, C classes; images (B, C, H, W) have C channels, H, W height and width.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from vit_bridge.errors import InputError, assume
from vit_bridge.models.adapters import check_has_head

# ---- What every objective has -----------------------------------------------------------------------------


class Metrics:
    """Sums over images, kept on the device so that adding to them does not wait for it.

    n       images counted
    sums    {name: the sum of a value over these images}, tensors of any shape

    With skip_nonfinite a value that is not finite counts as 0: a gradient scaler leaves out such a training step.
    """

    def __init__(self, device, skip_nonfinite=False):
        self.device, self.skip_nonfinite = device, skip_nonfinite
        self.n, self.sums = 0, {}

    def update(self, n, **means):
        """Adds n images. means: the mean of each value over them, scalar tensors."""
        for name, mean in means.items():
            mean = mean.detach().float()
            self.add(name, (mean.nan_to_num(0.0, 0.0, 0.0) if self.skip_nonfinite else mean) * n)
        self.n += n

    def add(self, name, total):
        """Adds a tensor to a sum."""
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def compute(self):
        """{name: mean over the images counted}, as floats. The Trainer reads "loss"."""
        return {name: total.item() / self.n for name, total in self.sums.items()}

    def merge(self):
        """The metrics of all processes together, on each of them."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, self.state_dict())
        names = {name for state in states for name in state}
        merged = type(self)(self.device, self.skip_nonfinite)
        merged.load_state_dict({name: sum(state[name] for state in states if name in state) for name in names})
        return merged

    def state_dict(self):
        """Plain numbers, and tensors on the CPU."""
        return dict(n=self.n, **{name: total.cpu() if total.ndim else total.item()
                                 for name, total in self.sums.items()})

    def load_state_dict(self, entries):
        self.n = entries["n"]
        self.sums = {name: torch.as_tensor(value).to(self.device, copy=True) for name, value in entries.items()
                     if name != "n" and value is not None}


class Objective(nn.Module):
    """What a training minimises: subclasses define forward(), the columns and the criterion.

    columns    {name: format}: the columns of the history, each "train_" or "val_" and the name of a value that the
               metrics compute
    criterion  the column by which the best epoch is chosen
    maximise   whether the best is the largest value; else the smallest
    mixing     what combines the images of a batch, (images, labels) -> (images, soft targets), or None

    The Trainer moves an objective to the model's device. It neither trains nor saves the objective's own parameters.
    What a user's loader gives goes through check() before it is moved to the device.
    """
    columns = {"train_loss": ".3f", "val_loss": ".3f"}  # noqa: RUF012 - a subclass has its own
    criterion, maximise, mixing = "val_loss", False, None
    looked = ()  # at the range of pixels: of a first batch in training (True), and in evaluation (False)

    def forward(self, model, batch, metrics=None):
        """The loss, a scalar: the mean over the images of the batch, so that parts of a batch add up to the whole.

        model    gives its output in float32
        batch    what the loader gives, on the model's device: images (B, C, H, W) first
        metrics  from new_metrics(), updated unless None

        self.training is True in a training step and False in an evaluation.
        """
        raise NotImplementedError

    def check(self, batch):
        """A batch, a tuple of tensors of as many entries, as forward() is to get it. Raises InputError for images that
        are no finite floating-point numbers, and for channels that come last; an Assumption says where those of a first
        batch are not normalised."""
        check_pixels(batch[0])
        if self.training not in self.looked and batch[0].numel():
            self.looked = (*self.looked, self.training)
            low, high = (bound.item() for bound in batch[0].aminmax())
            if low >= 0 and high > 50:
                assume(f"images hold values from {low:.3g} to {high:.3g}; expected normalised ones, of mean 0 and "
                       f"standard deviation 1: Preprocessing.normalise makes them of uint8 images, or (images / 255 - "
                       f"mean) / std")
        return batch

    def check_model(self, model):
        """Raises InputError for a model that gives nothing to minimise."""

    def new_metrics(self, device, skip_nonfinite=False):
        return Metrics(device, skip_nonfinite)

    def best_epoch(self, history):
        """The best epoch, counted from 1: the last among equals, as the learning rate has fallen further; NaN is worse
        than any value. 0: none."""
        signed = [-math.inf if math.isnan(value) else value if self.maximise else -value
                  for value in history[self.criterion]]
        return max(range(len(signed)), key=lambda i: (signed[i], i), default=-1) + 1

    def describe(self, values):
        """{column: value} in words: "train loss 1.889 acc 30.5%   val loss 1.613 acc 43.9%"."""
        parts = {}
        for column, spec in self.columns.items():
            part, _, name = column.partition("_")
            if column in values:
                parts.setdefault(part, [part]).append(f"{name.replace('_', ' ')} {values[column]:{spec}}")
        return "   ".join(" ".join(words) for words in parts.values())


def check_pixels(images):
    """Raises InputError unless images are finite floating-point numbers, channels first. Those that lie on another
    device than the CPU are not searched for NaN, as that would wait for the device."""
    shape = tuple(images.shape)
    if not images.is_floating_point():
        raise InputError(f"the images of a batch are {_type_name(images)} of {shape}; expected floating-point numbers, "
                         f"normalised: images.float() / 255, then (images - mean) / std, or Preprocessing.normalise")
    if images.ndim == 4 and shape[3] in (1, 3, 4) and min(shape[1:3]) > 4:
        raise InputError(f"the images of a batch have the shape {shape}, channels last; expected (B, C, H, W): "
                         f"images.permute(0, 3, 1, 2)")
    if images.device.type == "cpu" and not images.sum().isfinite():  # one sum is faster than a look at every number
        bad = (~images.isfinite()).flatten(1).any(dim=1).nonzero()[:, 0].tolist()  # none where only the sum overflows
        if bad:
            raise InputError(f"{len(bad)} of the {len(images)} images of a batch hold NaN or infinity, the first at "
                             f"index {bad[0]}; look at how they are read and normalised")


def _type_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


# ---- Classification ---------------------------------------------------------------------------------------


class Classification(Objective):
    """A class for each image: logits (B, C) against labels (B), or soft targets (B, C).

    label_smoothing, class_weights   as CrossEntropy has them; with class weights the best epoch is that of the best
                                     balanced accuracy
    mixing    such as Mixing, applied to training batches; the accuracy is then of the class with the larger share
    loss_fn   (logits, labels) -> a scalar, the mean over the images; takes the place of CrossEntropy. It gets labels of
              floating-point numbers as they are, of any shape; accuracies are NaN where they are no shares (B, C)
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
        self.n_classes = None  # of the model's logits, once they were seen
        self.suspect = False  # whether the last batch that was checked has a label beyond them

    def forward(self, model, batch, metrics=None):
        images, labels = batch
        labels = self.targets(labels)  # (B), or (B, C)
        if self.mixing is not None and self.training:
            images, labels = self.mixing(images, labels)
        logits = model(images)  # (B, C)
        check_logits(logits, len(images))
        if self.own_loss and labels.is_floating_point():
            if self.n_classes != logits.shape[1] and not are_shares(labels, logits):
                assume(f"labels of {_type_name(labels)} {tuple(labels.shape)} are no classes, so accuracies are NaN")
            self.n_classes = logits.shape[1]
        elif labels.device.type == "cpu" or self.suspect or self.n_classes != logits.shape[1]:  # a look waits for a GPU
            self.n_classes = logits.shape[1]
            check_range(labels, self.n_classes)
        loss = self.loss_fn(logits, labels)
        if metrics is not None:
            metrics.update(loss, logits, labels)
        return loss

    def check(self, batch):
        """(images, labels): labels int64 (B), or soft targets (B, C). Raises InputError for what is neither, and for
        labels out of range."""
        if len(batch) != 2:
            shapes = ", ".join(str(tuple(one.shape)) for one in batch)
            raise InputError(f"a batch has {len(batch)} {'entry' if len(batch) == 1 else 'entries'}, {shapes}; "
                             f"expected 2, images (B, C, H, W) and labels (B), or an objective of your own")
        images, labels = super().check(batch)[0], self.targets(batch[1])
        if not len(labels) or (self.own_loss and labels.is_floating_point()) or (
                labels.device.type != "cpu" and self.n_classes is not None):
            return images, labels
        if labels.ndim == 2:
            sums = labels.sum(dim=1)  # (B)
            if not ((labels >= 0).all() and (sums - 1).abs().max() < 1e-2):
                raise InputError(f"labels of {_type_name(batch[1])} {tuple(batch[1].shape)} have rows that sum to "
                                 f"{sums.min():.3g} to {sums.max():.3g}; expected one class number an image, int64 "
                                 f"(B), or rows of shares that sum to one. For several classes an image give loss_fn="
                                 f"nn.BCEWithLogitsLoss()")
        check_range(labels)
        self.suspect = labels.ndim == 1 and self.n_classes is not None and bool(labels.max() >= self.n_classes)
        return images, labels

    def targets(self, labels):
        """What the loss gets: class_labels, or for a loss_fn of the user's own any floating-point numbers."""
        return labels if self.own_loss and labels.is_floating_point() else class_labels(labels)

    def check_model(self, model):
        check_has_head(model)

    def new_metrics(self, device, skip_nonfinite=False):
        return ClassificationMetrics(device, skip_nonfinite)


def class_labels(labels):
    """Labels as int64 (B), from any whole numbers (B) or (B, 1), or as soft targets (B, C), floating-point, from those
    or from whole numbers, such as one-hot rows. Raises InputError for other shapes and for fractions (B)."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        return labels if labels.is_floating_point() else labels.float()  # (B, C)
    if labels.is_floating_point() or labels.is_complex() or labels.ndim not in (1, 2):
        advice = "labels.long() gives int64, and loss_fn=nn.MSELoss() learns numbers as they are"
        if labels.ndim not in (1, 2):
            advice = "give one number or one row an image, or an objective of your own"
        raise InputError(f"labels are {_type_name(labels)} of {tuple(labels.shape)}; expected class numbers from 0, "
                         f"int64 (B), or soft targets (B, C); {advice}")
    return labels.reshape(-1).long()  # (B)


def are_shares(labels, logits):
    """Whether floating-point labels have a number for each of several classes, (B, C)."""
    return labels.shape == logits.shape and logits.shape[1] > 1


def check_range(labels, n_classes=None):
    """Raises InputError for labels (B) out of range, and for soft targets (B, C) of another number of classes; with
    n_classes None for labels below 0 alone."""
    if labels.ndim == 2:
        if n_classes not in (None, labels.shape[1]):
            raise InputError(f"soft targets of {tuple(labels.shape)} are for {labels.shape[1]} classes, the model's "
                             f"logits for {n_classes}; build the model with n_classes={labels.shape[1]}")
        return
    low, high = labels.min().item(), labels.max().item()
    if low < 0:
        raise InputError(f"label {low} is out of range; labels begin at 0"
                         + ("" if n_classes is None else f", and end at {n_classes - 1} for this model")
                         + "; leave out images without a class")
    if n_classes is not None and high >= n_classes:
        first = "subtract 1" if (low, high) == (1, n_classes) else "leave out images without a class"
        raise InputError(f"label {high} is out of range for a model with {n_classes} classes; labels begin at 0, and "
                         f"end at {n_classes - 1}: {first}, or build the model with n_classes={high + 1} or more")


def check_logits(logits, n_images):
    """Raises InputError unless logits are (B, C)."""
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
    raise InputError(f"the model gives {found} for {n_images} images; expected logits (B, C), one tensor, or an output "
                     f"with .logits: wrap the model in a module that gives them, or give an objective of your own")


class CrossEntropy(nn.Module):
    """Cross-entropy of logits (B, C) and labels (B), or soft targets (B, C): the mean over the images, each weighted
    by its class.

    class_weights: C numbers, or None for 1. torch's own divides by the sum of a batch's weights, and weighs what label
    smoothing adds by all classes; this divides by the number of images, so that parts of a batch add up to the whole,
    and weighs all of an image's loss by its own class.
    """

    def __init__(self, label_smoothing=0.0, class_weights=None):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", None if class_weights is None else torch.as_tensor(class_weights).float())

    def forward(self, logits, labels):
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)  # (B)
        if self.class_weights is not None:
            losses = losses * (labels @ self.class_weights if labels.ndim == 2 else self.class_weights[labels])
        return losses.mean()


def balancing_weights(class_counts):
    """Weights by which all classes count alike: N / (C n_c), 0 for a class without images; their mean over the N
    images is 1 where every class has some."""
    total, n_classes = sum(class_counts), len(class_counts)
    return [total / (n_classes * n) if n else 0.0 for n in class_counts]


class ClassificationMetrics(Metrics):
    """The loss, and in sums["classes"], (2, C), the images and the hits of each class."""

    def update(self, loss, logits, labels):
        """loss: the mean over the images; labels (B), or soft targets (B, C), of which the largest counts. Other
        floating-point labels are no classes, and there are no hits to count."""
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
        """loss, acc, balanced_acc, correct and n. Accuracies are from 0 to 1; the balanced one is the mean of those of
        the classes that have images. Where labels were no classes accuracies are NaN, and correct is 0."""
        if "classes" not in self.sums:
            return dict(super().compute(), acc=math.nan, balanced_acc=math.nan, correct=0, n=self.n)
        n, hits = self.sums["classes"].cpu().double()  # (C), (C)
        correct = int(hits.sum())
        return dict(loss=self.sums["loss"].item() / self.n, acc=correct / self.n,
                    balanced_acc=(hits[n > 0] / n[n > 0]).mean().item(), correct=correct, n=self.n)
