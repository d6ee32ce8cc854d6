"""Which files of a folder are images: each of them once, whatever links there are, and what is left out is said.

A link is followed, whether to a file, a folder or a class folder, unless it leads to what is there already: a folder
above it, a folder or an image of the set itself, or one that another link has led to. Those are refused.
"""

import os
import re
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from vit_bridge.errors import InputError, assume

# What Pillow registers, but which is no picture by itself: measurements, pages that need another program, films.
NO_PICTURES = ("BUFR", "FITS", "GRIB", "HDF5", "EPS", "WMF", "MPEG", "PDF")
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
N_TOLD = 3  # refused paths that are named; the others are counted


def image_formats():
    """The formats of images that this Pillow opens."""
    Image.init()
    return [name for name in Image.ID if name not in NO_PICTURES]


def image_endings():
    """The endings of image files, such as ".jpg", in lower case, sorted."""
    formats = {*image_formats(), "MPO"}  # a JPEG file with more images behind it
    return tuple(sorted(ending for ending, name in Image.registered_extensions().items() if name in formats))


@dataclass
class Found:
    """What lies in a folder, at any depth, but for what is hidden.

    files     paths of the images, the files of a folder before its subfolders, each sorted
    links     paths of the links that were followed
    refused   (path, reason) of the folders and links that were not
    left_out  how many files there are of each other ending; "" for files without one
    """
    files: list = field(default_factory=list)
    links: list = field(default_factory=list)
    refused: list = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)

    def tell(self, folder, loose=0):
        """Says what was not taken, in a few lines. loose: images that are in no class folder."""
        for path, reason in self.refused[:N_TOLD]:
            assume(f"{path!r} is left out: {reason}")
        if more := [re.sub(r"'.*?'|\".*?\"", "...", reason) for _, reason in self.refused[N_TOLD:]]:  # without paths
            reasons = "; ".join(f"{n:,} as {reason}" for reason, n in Counter(more).most_common())
            assume(f"{_are(len(more), 'more path', folder)} left out: {reasons}")
        if self.left_out:
            assume(f"{_are(self.left_out.total(), 'file', folder)} left out, in no format of images that Pillow opens "
                   f"here: {by_ending(self.left_out)}")
        if loose:
            assume(f"{_are(loose, 'image', folder)} left out, in no class folder")


def _are(n, what, folder):
    return f"{n:,} {what}{'s' * (n > 1)} in {str(folder)!r} {'are' if n > 1 else 'is'}"


def by_ending(counts):
    """'30 .txt, 5 .heic' of counts by ending, the 12 most frequent."""
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{n:,} {ending or 'without an ending'}" for ending, n in frequent[:12]]
    rest = frequent[12:]
    more = [f"{sum(n for _, n in rest):,} of {len(rest)} other endings"] * bool(rest)
    return ", ".join([*words, *more])


def find_images(folder):
    """What lies in a folder, as Found."""
    return ImageFinder([folder]).find(folder)


def files_at(path):
    """The image files of a folder, at any depth, without hidden ones; another path, or a folder without images,
    itself."""
    if not os.path.isdir(path):
        return [path]
    found = find_images(path)
    found.tell(path)
    return found.files or [path]


def check_not_empty(file):
    """Raises InputError for a folder that files_at gave, as there are no images in it."""
    if os.path.isdir(file):
        raise InputError(f"folder {file!r} has no image files ({', '.join(image_endings())}); give another, or files")


class ImageFinder:
    """Finds the images of several folders that belong together, each file once. A folder that is found by another name
    later, or from another of the folders, is refused there."""

    def __init__(self, folders=()):
        self.endings = image_endings()
        self.own, self.above = set(), set()  # real paths: of the folders, and of those that hold them
        self.in_set = {}  # real path of a folder: whether it is one of the set's, or found in one without a link
        self.reached = {}  # real path of what a link has led to: the path by which it was found
        for folder in folders:
            self.add(folder)

    def add(self, folder):
        """Makes a folder one of the set's."""
        real = Path(os.path.realpath(folder))
        self.own.add(str(real))
        self.above.update(map(str, real.parents))
        self.in_set.clear()

    def find(self, folder):
        """What lies in one of the set's folders, as Found. Raises InputError for a folder that cannot be listed."""
        found = Found()
        self._walk(str(folder), os.path.realpath(folder), False, found)
        return found

    def refusal(self, target, is_folder, holder):
        """Why a link to target, a real path, is not followed; None: it is. holder: the real folder of the link."""
        if is_folder and (target in self.above or Path(holder).is_relative_to(target)):
            return f"a link to {target!r}, a folder above it or above others of the set"
        parent, name = os.path.split(target)
        listed = name[:1] != "." and name.lower().endswith(self.endings) and self._is_in_set(parent)
        if self._is_in_set(target) if is_folder else listed:
            return f"a link to {target!r}, which is in the set itself"
        if target in self.reached:
            return f"a link to {target!r}, which is there already as {self.reached[target]!r}"
        return None

    def _is_in_set(self, folder):
        if folder not in self.in_set:
            parent, name = os.path.split(folder)
            self.in_set[folder] = folder in self.own or (
                name != "" and name[0] != "." and name not in SYSTEM_FOLDERS and self._is_in_set(parent))
        return self.in_set[folder]

    def _walk(self, path, real, linked, found):
        """Adds to found what lies in a folder. real: its path without links; linked: a link has led to it."""
        folders = []
        for entry in list_folder(path):
            shown, is_link = os.path.join(path, entry.name), entry.is_symlink()
            target = os.path.realpath(shown) if is_link else os.path.join(real, entry.name)
            kind = _kind(target) if is_link else "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
            named = entry.name.lower().endswith(self.endings)
            reason = None
            if entry.name in SYSTEM_FOLDERS and kind == "folder":
                reason = "a folder of the operating system"
            elif kind == "nothing":  # an image is named where the file is read
                reason = None if named else f"a dead link to {target!r}"
            elif kind == "other" and named:
                reason = "neither a file nor a folder"
            elif is_link and (named or kind == "folder"):
                reason = self.refusal(target, kind == "folder", real)
            elif linked and target in self.reached:
                reason = f"there already as {self.reached[target]!r}"
            if reason:
                found.refused.append((shown, reason))
            elif kind == "folder":
                folders.append((shown, target, is_link))
            elif named:
                found.files.append(shown)
            else:
                found.left_out[os.path.splitext(entry.name)[1].lower()] += 1
                continue
            if not reason and (is_link or linked):
                self.reached[target] = shown
            if not reason and is_link and kind != "nothing":
                found.links.append(shown)
        for shown, target, is_link in folders:
            self._walk(shown, target, linked or is_link, found)


def _kind(path):
    """What a real path is: "file", "folder", "nothing" or, as a pipe, "other"."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "nothing"
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def list_folder(folder):
    """The entries of a folder that are not hidden, sorted by name. Raises InputError if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"folder {str(folder)!r} cannot be listed ({error.strerror}): make it readable, or remove "
                         f"it") from None

