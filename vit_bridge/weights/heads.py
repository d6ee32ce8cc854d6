"""The head of a trained model for the classes of another set of images.

Shapes:  D features that the head reads, K classes.
"""

from dataclasses import replace

import torch
from torch import nn

from vit_bridge.models.adapters import adapt

MOST_NAMES = 5  # of classes, in one line


def fit_head(model, classes):
    """Gives a model, in place, a head for these classes. Returns one line, "head: kept ..." or "head: new, because ..."

    classes   the names, in the order of the outputs; or their number, 0 for no head

    Where both sides have names the trained rows are matched by name, whatever their order; new classes get rows of
    zeros. Without names a head of as many rows is kept as it is. Any other head is one of zeros, as in section 3.2 of
    the ViT paper.
    """
    names, n_classes = (None, classes) if isinstance(classes, int) else (list(classes), len(classes))
    shown, old = adapt(model).preprocessing, model.head
    theirs = shown.class_names if isinstance(old, nn.Linear) and len(shown.class_names or ()) == old.out_features \
        else None
    rows, line = _matched_rows(old, theirs, names, n_classes)
    if rows != list(range(getattr(old, "out_features", 0))) or not isinstance(old, nn.Linear):
        model.head = _head_of_rows(old, rows, model.n_features, model)
    model.config = replace(model.config, n_classes=n_classes)
    model.preprocessing = replace(shown, class_names=theirs if names is None and len(theirs or ()) == n_classes
                                  else names)
    return line


def _matched_rows(head, theirs, names, n_classes):
    """(the row of the head for each class, None for a new one; what is said of it)."""
    new, K = [None] * n_classes, getattr(head, "out_features", 0)
    if not n_classes:
        return new, f"head: none, as n_classes is 0; that of {K} classes was dropped" if K else "head: none"
    if isinstance(head, nn.Identity):
        return new, "head: new, because the weights have none"
    if not isinstance(head, nn.Linear):
        return new, f"head: new, because a {type(head).__name__} is not one linear layer"
    if not theirs or names is None:
        if n_classes != K:
            return new, f"head: new, because the trained one is for {K} classes{_listed(theirs)}, not for {n_classes}" \
                        f"{_listed(names)}"
        if names is None:
            return list(range(K)), f"head: kept, its {K} rows as they are"
        return list(range(K)), f"head: kept, its {K} rows; nothing names their classes, so their order is assumed to " \
                               f"be that of the images{_listed(names)}"
    rows = [theirs.index(name) if name in theirs else None for name in names]
    kept = [name for name, row in zip(names, rows, strict=True) if row is not None]
    added, dropped = [name for name in names if name not in kept], [name for name in theirs if name not in kept]
    if not kept:
        return new, f"head: new, because none of its {K} classes{_listed(theirs)} is among the {n_classes} of the " \
                    f"images{_listed(names)}"
    line = f"head: kept, {'all' if not dropped else f'{len(kept)} of'} {K} rows, matched by the names of the classes"
    if rows == list(range(K)):
        line = f"head: kept, its {K} classes are those of the images"
    line += f"; {len(added)} new{_listed(added)}" if added else ""
    return rows, line + (f"; dropped{_listed(dropped)}" if dropped else "")


def _listed(names):
    """' (fox, hare, ...)', or '' where there are no names."""
    if not names:
        return ""
    return f" ({', '.join(map(str, names[:MOST_NAMES]))}{', ...' if names[MOST_NAMES:] else ''})"


@torch.no_grad()
def _head_of_rows(old, rows, n_features, model):
    """A linear layer of these rows of an old one, zeros for None; no layer where there are no rows."""
    if not rows:
        return nn.Identity()
    like = next(model.parameters())
    head = nn.Linear(n_features, len(rows), bias=getattr(old, "bias", True) is not None).to(like)
    for name, tensor in head.named_parameters():
        tensor.zero_()
        for row, source in enumerate(rows):
            if source is not None:
                tensor[row] = getattr(old, name)[source]
    return head
