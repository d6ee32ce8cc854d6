"""Audit a folder of images before training on it: what it contains, and what would make a score wrong.

    print(audit_folder("photos"))
"""

import hashlib
import itertools
import os
from collections import Counter, defaultdict
from dataclasses import dataclass

from vit_bridge.data.datasets import FolderSet, stratified_cut
from vit_bridge.data.files import by_ending

TAIL = 16_384  # bytes at the end of a file: different files of the same size nearly always differ there
N_NAMED = 8  # maximum number of class names in one line


@dataclass
class Audit:
    """The findings of `audit_folder`; `str()` formats them as a report.

    Attributes
    ----------
    root : str
        The folder.
    endings : Counter
        Number of image files for each file extension, damaged ones included, because none is decoded.
    class_names : list of str
        Class names, in the order of the model's outputs.
    counts : dict
        Image files per class, as a list, for each of the parts "train", "val" and "test" that exists.
    links : list of str
        Links that were followed.
    refused : list of (str, str)
        Path and reason for each link or folder that was not followed.
    left_out : Counter
        Number of files that are not images, for each file extension.
    loose : int
        Number of images outside the class folders.
    unused : list of str
        Names of the folders other than train, val and test.
    empty : list of str
        Image files of zero bytes.
    two_classes, two_parts : list of list of str
        Paths with identical bytes in several classes, or in several parts; the first two paths of a list differ in
        class or part. Images split off for validation count as the part "val".
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
            f"{self.root}: {self.endings.total():,} image files ({by_ending(self.endings)})",
            f"  classes, in the order of the model's outputs (alphabetical): {self._classes()}",
            *(f"  {part}: {sum(counts):,} image files" + self._missing(counts) for part, counts in self.counts.items()),
            self._line(self.links, "links followed"), self._line([path for path, _ in self.refused], "links and "
                                                                                                     "folders not "
                                                                                                     "followed"),
            self.left_out and f"  other files, ignored: {by_ending(self.left_out)}",
            self.loose and f"  images outside the class folders, ignored: {self.loose:,}",
            self._line(self.unused, "folders ignored, because they are not train, val or test"),
            self._line(self.empty, "empty files"),
            self._pairs(self.two_classes, "two classes, so at least one label is wrong"),
            self._pairs(self.two_parts, "two of train, val and test, so the score will be too high")]))

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
        return groups and f"  the same image in {words}: {len(groups):,} (such as {' = '.join(groups[0][:2])})"


def audit_folder(data_dir, val_fraction=0.1, seed=0):
    """Audit a folder of images.

    Only names, sizes and, for files of equal size, bytes are compared; no image is decoded.

    Parameters
    ----------
    data_dir : path
        Folder with class folders, or with train/, val/ and test/ that contain class folders.
    val_fraction, seed : float, int
        The validation split, as in `get_data_loaders`; used only if there is no val/.

    Returns
    -------
    Audit

    Raises
    ------
    InputError
        If the folder cannot be used; see `FolderSet`.
    """
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
    two_classes = [_apart(group, lambda path: places[path][1]) for group in two_classes]
    two_parts = [_apart(sorted(group, key=lambda path: places[path][0] != "train"), lambda path: places[path][0])
                 for group in two_parts]
    endings = Counter(os.path.splitext(path)[1].lower() for path in places)
    return Audit(str(data_dir), endings, class_names, counts, everything.links, everything.refused, everything.left_out,
                 sum(folder.loose.values()), folder.unused, empty, two_classes, two_parts)


def _apart(group, key):
    """Move a path whose key differs from the first path's to the second position."""
    other = next(path for path in group if key(path) != key(group[0]))
    return [group[0], other, *(path for path in group[1:] if path != other)]


def same_files(paths):
    """Return (groups of paths with identical bytes, paths of empty files).

    Files that cannot be read are in no group.
    """
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
    """Return the lists of two or more paths with the same key; paths with the key None are omitted."""
    groups = defaultdict(list)
    for path in paths:
        groups[key(path)].append(path)
    return [group for value, group in groups.items() if value is not None and len(group) > 1]


def _tail(path):
    """Return a checksum of the last bytes of a file, or None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            return hashlib.sha256(file.read()).digest()
    except OSError:
        return None


def _digest(path):
    """Return a checksum of a whole file, or None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None
