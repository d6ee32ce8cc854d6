"""Find the image files in a folder, each of them once, and report what is ignored.

Links to files, folders and class folders are followed, except links to something already in the data set: a folder
above the link, a folder or an image of the set, or the target of another link.
"""

import os
import re
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from vit_bridge.errors import InputError, assume

# Formats that Pillow registers but that are not plain images: scientific data, vector graphics and documents, video.
NO_PICTURES = ("BUFR", "FITS", "GRIB", "HDF5", "EPS", "WMF", "MPEG", "PDF")
CAMERA_FORMATS = (".heic", ".heif", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".raf")  # Pillow alone reads none of them
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
N_NAMED = 3  # refused paths that are named; the others are counted
SOME_FORMATS = "JPEG, PNG, WebP, TIFF, ..."  # for messages; image_endings() returns all of them


def image_formats():
    """Return the names of the image formats that the installed Pillow can open."""
    Image.init()
    return [name for name in Image.ID if name not in NO_PICTURES]


def image_endings():
    """Return the file extensions of images, such as ".jpg", sorted and in lower case."""
    formats = {*image_formats(), "MPO"}  # a JPEG file that holds several images
    return tuple(sorted(ending for ending, name in Image.registered_extensions().items() if name in formats))


@dataclass
class Found:
    """The contents of a folder and its subfolders, without hidden files.

    Attributes
    ----------
    files : list of str
        Image files, sorted; the files of a folder come before those of its subfolders.
    links : list of str
        Links that were followed.
    refused : list of (str, str)
        Path and reason for each file, folder or link that was not used.
    left_out : Counter
        Number of other files for each file extension; "" counts the files without one.
    """

    files: list = field(default_factory=list)
    links: list = field(default_factory=list)
    refused: list = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)

    def tell(self, folder, loose=0):
        """Warn about what was ignored, in a few lines; `loose` counts images outside the class folders."""
        for path, reason in self.refused[:N_NAMED]:
            assume(f"{path!r} is ignored: {reason}")
        if more := [re.sub(r"'.*?'|\".*?\"", "...", reason) for _, reason in self.refused[N_NAMED:]]:  # without paths
            reasons = "; ".join(f"{n:,} because "
                                f"{reason.replace('it is', 'each is', 1)}" for reason, n in Counter(more).most_common())
            assume(f"{_are(len(more), 'more path', folder)} ignored: {reasons}")
        if self.left_out:
            advice = to_convert(self.left_out)
            assume(f"{_are(self.left_out.total(), 'file', folder)} ignored (not in an image format that Pillow can "
                   f"read here): {by_ending(self.left_out)}{advice and f'; {advice}'}")
        if loose:
            assume(f"{_are(loose, 'image', folder)} ignored (outside the class folders)")


def _are(n, what, folder):
    return f"{n:,} {what}{'s' * (n > 1)} in {str(folder)!r} {'are' if n > 1 else 'is'}"


def by_ending(counts, n_shown=12):
    """Format counts by file extension as '30 .txt, 5 .heic', the n_shown most frequent first."""
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{n:,} {ending or 'without an extension'}" for ending, n in frequent[:n_shown]]
    rest = frequent[n_shown:]
    more = [f"{sum(n for _, n in rest):,} with {len(rest)} other extensions"] * bool(rest)
    return ", ".join([*words, *more])


def to_convert(endings):
    """Return advice on photographs that Pillow cannot read, or "" if none of the file extensions is such a format."""
    found = [ending for ending in CAMERA_FORMATS if ending in endings]
    return f"convert {' and '.join(found)} files to JPEG first" if found else ""


def find_images(folder):
    """Return the contents of a folder as `Found`."""
    return ImageFinder([folder]).find(folder)


def files_at(path):
    """Return the image files in a folder and its subfolders, without hidden files.

    Any other path, or a folder without images, is returned as the only entry.
    """
    if not os.path.isdir(path):
        return [path]
    found = find_images(path)
    found.tell(path)
    return found.files or [path]


def check_not_empty(file):
    """Raise InputError if the path, as returned by `files_at`, is a folder without images."""
    if os.path.isdir(file):
        left_out = find_images(file).left_out
        held, advice = by_ending(left_out, 4), to_convert(left_out)
        raise InputError(f"folder {file!r} has no image files ({SOME_FORMATS}){held and f', only {held}'}; "
                         f"{advice or 'use a folder with images, or the images themselves'}")


class ImageFinder:
    """A search for the images of several folders that form one data set, which finds each file once.

    A folder or file that can be reached in two ways is used the first time it is found and refused after that.
    """

    def __init__(self, folders=()):
        self.endings = image_endings()
        self.own, self.above = set(), set()  # real paths of the folders, and of their parent folders
        self.in_set = {}  # real path of a folder -> whether it belongs to the set without following a link
        self.reached = {}  # real path of a link's target -> the path under which it was found
        for folder in folders:
            self.add(folder)

    def add(self, folder):
        """Add a folder to the data set."""
        real = Path(os.path.realpath(folder))
        self.own.add(str(real))
        self.above.update(map(str, real.parents))
        self.in_set.clear()

    def find(self, folder):
        """Return the contents of one of the data set's folders as `Found`.

        Raises
        ------
        InputError
            If a folder cannot be listed.
        """
        found = Found()
        self._walk(str(folder), os.path.realpath(folder), False, found)
        return found

    def refusal(self, target, is_folder, holder):
        """Return why a link is not followed, or None if it is.

        `target` is the link's real path; `holder` is the real path of the folder that contains the link.
        """
        if is_folder and (target in self.above or Path(holder).is_relative_to(target)):
            return f"it is a link to {target!r}, a folder that contains it or another part of the data set"
        parent, name = os.path.split(target)
        listed = name[:1] != "." and name.lower().endswith(self.endings) and self._is_in_set(parent)
        if self._is_in_set(target) if is_folder else listed:
            return f"it is a link to {target!r}, which is already in the data set"
        if target in self.reached:
            return f"it is a link to {target!r}, which is already used as {self.reached[target]!r}"
        return None

    def _is_in_set(self, folder):
        if folder not in self.in_set:
            parent, name = os.path.split(folder)
            self.in_set[folder] = folder in self.own or (
                name != "" and name[0] != "." and name not in SYSTEM_FOLDERS and self._is_in_set(parent))
        return self.in_set[folder]

    def _walk(self, path, real, linked, found):
        """Add the contents of a folder to `found`.

        `real` is its path without links; `linked` is True if a link led to it.
        """
        folders = []
        for entry in list_folder(path):
            shown, is_link = os.path.join(path, entry.name), entry.is_symlink()
            target = os.path.realpath(shown) if is_link else os.path.join(real, entry.name)
            kind = _kind(target) if is_link else "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
            named = entry.name.lower().endswith(self.endings)
            reason = None
            if entry.name in SYSTEM_FOLDERS and kind == "folder":
                reason = "it is a folder of the operating system"
            elif kind == "nothing":  # an image with a dead link is reported when it is read
                reason = None if named else f"it is a dead link to {target!r}"
            elif kind == "other" and named:
                reason = "it is neither a file nor a folder"
            elif is_link and (named or kind == "folder"):
                reason = self.refusal(target, kind == "folder", real)
            elif linked and target in self.reached:
                reason = f"it is already used as {self.reached[target]!r}"
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
    """Return what a real path is: "file", "folder", "nothing", or "other" (such as a pipe)."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "nothing"
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def list_folder(folder):
    """Return the entries of a folder that are not hidden, sorted by name.

    Raises
    ------
    InputError
        If the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"folder {str(folder)!r} cannot be listed ({error.strerror}); make it readable, or remove "
                         f"it") from None

