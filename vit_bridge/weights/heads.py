"""Fit the heads of a trained model to the classes of a new data set.

    line = fit_head(model, class_names)

Shapes:  D features that the head reads, K classes.
"""

from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from vit_bridge.errors import join_words
from vit_bridge.models.adapters import adapt
from vit_bridge.models.protocol import ask

MOST_NAMES = 5  # maximum number of class names in one line


def fit_head(model, classes):
    """Fit the head of a model to these classes, in place. Several heads are all fitted in the same way.

    If both sides have class names, trained rows are matched by name, in any order, and new classes get rows of zeros.
    Without names, a head with the right number of rows is kept. Otherwise the head is new and filled with zeros, as in
    Section 3.2 of the ViT paper.

    Parameters
    ----------
    model : Module
        A model of this library.
    classes : list of str or int
        Class names in the order of the outputs; or their number, 0 for no head.

    Returns
    -------
    str
        One line that reports what was done, such as "head: kept ..." or "head: new, because ...".
    """
    names, n_classes = (None, classes) if isinstance(classes, int) else (list(classes), len(classes))
    shown = adapt(model).preprocessing
    for head in ask(model, "head_names"):
        old = getattr(model, head)
        theirs = shown.class_names if isinstance(old, nn.Linear) and len(shown.class_names or ()) == old.out_features \
            else None
        rows, line = _matched_rows(old, theirs, names, n_classes)
        if rows != list(range(getattr(old, "out_features", 0))) or not isinstance(old, nn.Linear):
            setattr(model, head, _head_of_rows(old, rows, model.n_features, model))
    model.config = replace(model.config, n_classes=n_classes)
    model.preprocessing = replace(shown, class_names=theirs if names is None and len(theirs or ()) == n_classes
                                  else names)
    return line


def _matched_rows(head, theirs, names, n_classes):
    """Return (the row of the head for each class, or None for a new class; one line that reports it)."""
    new, K = [None] * n_classes, getattr(head, "out_features", 0)
    if not n_classes:
        return new, f"head: none, because n_classes is 0; the head with {K} classes was dropped" if K else "head: none"
    if isinstance(head, nn.Identity):
        return new, "head: new, because the weights have none"
    if not isinstance(head, nn.Linear):
        return new, f"head: new, because a {type(head).__name__} is not a single linear layer"
    if not theirs or names is None:
        if n_classes != K:
            return new, (f"head: new, because the trained one has {K} classes{listed(theirs)}, not {n_classes}"
                         f"{listed(names)}")
        if names is None:
            return list(range(K)), f"head: kept, with its {K} rows unchanged"
        return list(range(K)), (
            f"head: kept, with its {K} rows; their classes have no names, so they are assumed to be in the order of "
            f"the images' classes{listed(names)}; if not, set class_names= or --class-names")
    return match_names(theirs, names)


def match_names(theirs, names):
    """Match the rows of a head to class names, compared as text.

    A name that occurs more than once on one side does not identify a row, so its rows are new, unless both sides are
    identical.

    Parameters
    ----------
    theirs, names : list
        The classes of the head's rows, and the new classes.

    Returns
    -------
    rows : list of int or None
        The row for each of `names`; None for a new class.
    line : str
        What was done.
    """
    K, (old, wanted) = len(theirs), ([str(name) for name in side] for side in (theirs, names))
    if old == wanted:
        return list(range(K)), f"head: kept, because its {K} classes are those of the images"
    place, times = {name: row for row, name in enumerate(old)}, Counter(old) | Counter(wanted)
    rows = [place.get(name) if times[name] == 1 else None for name in wanted]
    kept = {row for row in rows if row is not None}
    added = [name for name, row in zip(wanted, rows, strict=True) if row is None]
    dropped = [name for row, name in enumerate(old) if row not in kept]
    twice = list(dict.fromkeys(name for name in added if name in place))
    unclear = f"; names that occur more than once could not be matched{listed(twice)}" if twice else ""
    if not kept:
        return rows, (f"head: new, because none of its {K} classes{listed(theirs)} is among the {len(names)} classes "
                      f"of the images{listed(names)}{unclear}")
    line = f"head: starts from the trained rows for {_in_words([old[row] for row in rows if row is not None])}"
    line += f"; {len(added)} new{listed(added)}" if added else ""
    return rows, line + (f"; {len(dropped)} of {K} dropped{listed(dropped)}" if dropped else "") + unclear


def _in_words(names):
    """Format names as 'fox, hare and owl', and more than MOST_NAMES as '9 classes (fox, hare, ...)'."""
    if len(names) > MOST_NAMES:
        return f"{len(names)} classes{listed(names)}"
    return join_words(names)


def listed(names):
    """Format names as ' (fox, hare, ...)', or '' if there are none."""
    if not names:
        return ""
    return f" ({', '.join(map(str, names[:MOST_NAMES]))}{', ...' if names[MOST_NAMES:] else ''})"


def first_difference(names, expected):
    """Describe where two lists of class names first differ, for a message that continues "they differ ..."."""
    n = next((i for i, (one, other) in enumerate(zip(names, expected, strict=False)) if one != other),
             min(len(names), len(expected)))
    found, wanted = (repr(side[n]) if n < len(side) else "no name" for side in (names, expected))
    return f"first at position {n + 1}: {found} instead of {wanted} ({len(names)} names, and {len(expected)})"


@torch.no_grad()
def _head_of_rows(old, rows, n_features, model):
    """Return a linear layer with these rows of the old one (zeros for None), or nn.Identity if there are no rows."""
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
