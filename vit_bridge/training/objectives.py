"""What a training minimises, and what it measures on the way.

Shapes:  B images in a batch, C classes, R processes."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class CrossEntropy(nn.Module):
    """Cross-entropy of logits (B, C) and labels (B), or shares of the classes (B, C): the mean over the images, each
    weighted by its class.

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


class ClassificationMetrics:
    """Sums of losses and hits, kept on the device so that counting does not wait for it.

    classes (2, C): images and hits of each class.
    """

    def __init__(self, device):
        self.loss, self.n, self.classes = torch.zeros((), device=device), 0, None

    def add(self, loss, logits, labels):
        """loss: the mean over the images; labels (B), or the shares of the classes (B, C), of which the largest."""
        labels = labels.argmax(dim=1) if labels.ndim == 2 else labels
        if self.classes is None:
            self.classes = torch.zeros(2, logits.shape[1], device=logits.device)  # (2, C)
        hits = (logits.detach().argmax(dim=1) == labels).float()  # (b)
        self.classes[0].index_add_(0, labels, torch.ones_like(hits))
        self.classes[1].index_add_(0, labels, hits)
        self.loss += loss.detach() * len(labels)
        self.n += len(labels)

    @property
    def correct(self):
        return 0 if self.classes is None else int(self.classes[1].sum())

    @property
    def balanced(self):
        n, hits = self.classes.cpu().double()  # (C), (C)
        return (hits[n > 0] / n[n > 0]).mean().item()

    def all_gather_object(self, trainer):
        """The tally of all processes together."""
        if trainer.world_size == 1:
            return self
        tallies, total = [None] * trainer.world_size, ClassificationMetrics(trainer.device)
        dist.all_gather_object(tallies, self.state_dict())
        for entries in tallies:
            total.loss, total.n = total.loss + entries["loss"], total.n + entries["n"]
            if entries["classes"] is not None:
                classes = entries["classes"].to(trainer.device)
                total.classes = classes if total.classes is None else total.classes + classes
        return total

    def summary(self, seconds):
        return dict(loss=f"{self.loss.item() / max(1, self.n):.3f}", acc=f"{self.correct / max(1, self.n):.1%}",
                    images_per_s=f"{self.n / seconds:.0f}")

    def state_dict(self):
        """Plain numbers and a tensor on the CPU."""
        return dict(loss=self.loss.item(), n=self.n, classes=None if self.classes is None else self.classes.cpu())

    def load_state_dict(self, entries):
        device = self.loss.device
        self.loss, self.n = torch.tensor(entries["loss"], device=device), entries["n"]
        self.classes = None if entries["classes"] is None else entries["classes"].to(device)
