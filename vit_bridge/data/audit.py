"""A look at a folder of images before a training: what is in it, and what would make its score untrue.

    print(audit_folder("photos"))
"""

import hashlib
import itertools
import os
from collections import Counter, defaultdict
from dataclasses import dataclass

from vit_bridge.data.datasets import FolderSet, stratified_cut
from vit_bridge.data.files import by_ending

TAIL = 16_384  # bytes at the end of a file: where files of one size differ, they nearly always differ there
N_NAMED = 8  # classes that are named; the others are counted


@dataclass
class Audit:
    """What audit_folder finds.

    root           the folder
    endings        how many images there are of each ending
    class_names    in the order of the model's outputs
    counts         {part: images of each class}, of the parts "train", "val" and "test"
    links          paths of the links that are followed
    refused        (path, reason) of the links and folders that are not
    left_out       how many files there are of each other ending
    loose          how many images are in no class folder
    unused         names of the folders beside the parts
    empty          paths of the files without content
    two_classes    lists of paths that hold the same bytes, under several classes
    two_parts      lists of paths that hold the same bytes, under several parts, the cut for validation included
    """
    root: str
    endings: Counter
    class_names: list
    counts: dict
    links: list
    refused: list
    left_out: Counter
    loose: int
    unused: list
    empty: list
    two_classes: list
    two_parts: list

    def __str__(self):
        return "\n".join(filter(None, [
            f"{self.root}: {self.endings.total():,} images, {by_ending(self.endings)}",
            f"  classes, in the order of the outputs (alphabetical): {self._classes()}",
            *(f"  {part}: {sum(counts):,} images" + self._missing(counts) for part, counts in self.counts.items()),
            self._line(self.links, "links followed"), self._line([path for path, _ in self.refused], "not followed"),
            self.left_out and f"  left out: {by_ending(self.left_out)}",
            self.loose and f"  left out: {self.loose:,} images in no class folder",
            self._line(self.unused, "folders not used, as they are neither train, val nor test"),
            self._line(self.empty, "files without content"),
            self._pairs(self.two_classes, "two classes: at most one of the labels is right"),
            self._pairs(self.two_parts, "two of train, val and test: the score is too high")]))

    def _classes(self):
        counts = self.counts.get("train") or next(iter(self.counts.values()))
        named = [f"{name} ({n:,})" for name, n in zip(self.class_names, counts, strict=True)]
        more = len(named) - N_NAMED
        if more <= 1:
            return ", ".join(named)
        return f"{', '.join(named[:N_NAMED - 1])}, ... {named[-1]}; {len(named)} in all"

    def _missing(self, counts):
        none = [name for name, n in zip(self.class_names, counts, strict=True) if not n]
        return f", none of {', '.join(none[:N_NAMED])}{', ...' * (len(none) > N_NAMED)}" if none else ""

    def _line(self, items, words):
        return items and f"  {words}: {len(items):,} ({items[0]}{', ...' * (len(items) > 1)})"

    def _pairs(self, groups, words):
        return groups and f"  the same picture in {words}: {len(groups):,} (such as {' = '.join(groups[0][:2])})"


def audit_folder(data_dir, val_fraction=0.1, seed=0):
    """The Audit of a folder of images, as get_data_loaders would split it by val_fraction and seed. It looks at names,
    sizes and, among files of one size, at bytes, and decodes nothing. Raises InputError as FolderSet does."""
    folder = FolderSet(data_dir)
    everything = folder.everything()
    class_names = sorted({name for classes in folder.classes.values() for name in classes})
    places = {}  # path: (part, class)
    for part, classes in folder.classes.items():
        for name, found in classes.items():
            places |= dict.fromkeys(found.files, (part, name))
    counts = {part: [len(classes[name].files) if name in classes else 0 for name in class_names]
              for part, classes in folder.classes.items()}
    if "val" not in folder.folders and "train" in folder.folders and max(counts["train"], default=0) > 1:
        files, labels = folder.images("train", class_names)
        for i in stratified_cut(labels, val_fraction, seed)[1].tolist():
            places[files[i]] = ("val", places[files[i]][1])
    same, empty = same_files(list(places))
    spread = [[len({places[path][i] for path in group}) > 1 for group in same] for i in (1, 0)]
    two_classes, two_parts = (list(itertools.compress(same, several)) for several in spread)
    two_parts = [sorted(group, key=lambda path: places[path][0] != "train") for group in two_parts]
    endings = Counter(os.path.splitext(path)[1].lower() for path in places)
    return Audit(str(data_dir), endings, class_names, counts, everything.links, everything.refused, everything.left_out,
                 sum(folder.loose.values()), folder.unused, empty, two_classes, two_parts)


def same_files(paths):
    """(lists of the paths whose files hold the same bytes, paths of files without content). A file that cannot be read
    is like no other."""
    sizes = {}
    for path in paths:
        try:
            sizes[path] = os.stat(path).st_size
        except OSError:
            continue
    empty = [path for path, size in sizes.items() if not size]
    groups = _grouped((path for path, size in sizes.items() if size), sizes.get)
    for key in (_tail, _digest):
        groups = [alike for group in groups for alike in _grouped(group, key)]
    return groups, empty


def _grouped(paths, key):
    """Lists of two or more paths with the same key; those whose key is None are in none."""
    groups = defaultdict(list)
    for path in paths:
        groups[key(path)].append(path)
    return [group for value, group in groups.items() if value is not None and len(group) > 1]


def _tail(path):
    """The last bytes of a file; None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            return hashlib.sha256(file.read()).digest()
    except OSError:
        return None


def _digest(path):
    """A checksum of a file; None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None
