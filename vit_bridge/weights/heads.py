"""The head of a trained model for the classes of another set of images.

Shapes:  D features that the head reads, K classes.
"""

from collections import Counter
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
            return new, f"head: new, because the trained one is for {K} classes{listed(theirs)}, not for {n_classes}" \
                        f"{listed(names)}"
        if names is None:
            return list(range(K)), f"head: kept, its {K} rows as they are"
        return list(range(K)), f"head: kept, its {K} rows; nothing names their classes, so their order is assumed to " \
                               f"be that of the images{listed(names)}; class_names= or --class-names can say otherwise"
    return match_names(theirs, names)


def match_names(theirs, names):
    """(the row of a head whose classes are called `theirs` for each of these names, None for a new one; what is said).

    Names are compared as text. One that stands more than once on a side tells no rows apart, so those are new, unless
    both sides are the same.
    """
    K, (old, wanted) = len(theirs), ([str(name) for name in side] for side in (theirs, names))
    if old == wanted:
        return list(range(K)), f"head: kept, its {K} classes are those of the images"
    place, times = {name: row for row, name in enumerate(old)}, Counter(old) | Counter(wanted)
    rows = [place.get(name) if times[name] == 1 else None for name in wanted]
    kept = {row for row in rows if row is not None}
    added = [name for name, row in zip(wanted, rows, strict=True) if row is None]
    dropped = [name for row, name in enumerate(old) if row not in kept]
    twice = list(dict.fromkeys(name for name in added if name in place))
    unclear = f"; the rows of a name that occurs more than once are not known{listed(twice)}" if twice else ""
    if not kept:
        return rows, f"head: new, because none of its {K} classes{listed(theirs)} is among the {len(names)} of the " \
                     f"images{listed(names)}{unclear}"
    line = f"head: kept, {'all' if not dropped else f'{len(kept)} of'} {K} rows, matched by the names of the classes"
    line += f"; {len(added)} new{listed(added)}" if added else ""
    return rows, line + (f"; dropped{listed(dropped)}" if dropped else "") + unclear


def listed(names):
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
