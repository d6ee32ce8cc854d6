"""Find, read and split data sets: image folders, torchvision's data sets and the drawn shapes.

    FolderSet            a folder of images, with its classes and its parts (train, val, test)
    read_memory_set      a torchvision data set or the drawn shapes, as tensors
    stratified_cut       a split into training and validation images, class by class

Shapes:  N images in a data set, n some of them, C channels, H, W height and width.
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from tqdm import tqdm

from vit_bridge.data.augmentation import generator_of
from vit_bridge.data.files import (
    SOME_FORMATS,
    SYSTEM_FOLDERS,
    Found,
    ImageFinder,
    by_ending,
    image_endings,
    list_folder,
    to_convert,
)
from vit_bridge.data.images import FILE_CHANNELS, grey, open_header, open_or_skip
from vit_bridge.data.shapes import SHAPES, TEST_START, make_shapes
from vit_bridge.errors import InputError, assume, check_choice, check_int, join_words
from vit_bridge.preprocessing import NORMALISATION, SMALL_SIDE, FitSize, Preprocessing
from vit_bridge.weights.heads import listed
from vit_model import pair

DEFAULT_DATA_DIR = "./data"
MEMORY_LIMIT = 2 * 1024**3  # bytes: a folder that decodes to more is read file by file
VALIDATION_FOLDERS = ("val", "valid", "validation")
PART_FOLDERS = ("train", *VALIDATION_FOLDERS, "test")
OTHER_PARTS = {*PART_FOLDERS, "training", "dev", "eval", "testing"}  # not class names, in either case
WITHOUT_LABELS = "to learn without labels, use train_vit.py --pretrain mae"
# For each data set: torchvision's class, its folder in data_dir, and its files.
IDX_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
TORCHVISION_SETS = {
    "cifar10": (torchvision.datasets.CIFAR10, "cifar-10-batches-py", "data_batch_1 to 5, test_batch, batches.meta"),
    "cifar100": (torchvision.datasets.CIFAR100, "cifar-100-python", "train, test, meta"),
    "fashion-mnist": (torchvision.datasets.FashionMNIST, "FashionMNIST/raw", IDX_FILES),
    "mnist": (torchvision.datasets.MNIST, "MNIST/raw", IDX_FILES),
}
DATASETS = ("auto", "folder", "shapes", *TORCHVISION_SETS)


@dataclass(frozen=True)
class DatasetInfo:
    """The name of a data set and its `Preprocessing`, which a model trained on it adopts."""

    dataset_name: str
    preprocessing: Preprocessing

    @property
    def class_names(self):
        return self.preprocessing.class_names

    @property
    def img_size(self):
        return self.preprocessing.img_size


def dataset_info(name, class_names, img_size, preprocessing=None, in_channels=None):
    """Return the DatasetInfo of a data set.

    mean, std and interpolation come from `preprocessing`, or from the data set if it is None. in_channels None means
    the channels of `preprocessing`, or 3.
    """
    if preprocessing is None:
        preprocessing = Preprocessing(img_size, *NORMALISATION[name]).with_channels(in_channels or 3)
    if in_channels not in (None, preprocessing.n_channels):
        raise InputError(f"in_channels {in_channels} does not match preprocessing, whose mean {preprocessing.mean} has "
                         f"{preprocessing.n_channels} numbers; pass a mean and std with one number per channel")
    shown, possible = ("photographs", FILE_CHANNELS) if name == "folder" else (f"images of {name!r}", (1, 3))
    if preprocessing.n_channels not in possible:
        raise InputError(f"in_channels {preprocessing.n_channels} is out of range; {shown} have "
                         f"{', '.join(map(str, possible[:-1]))} or {possible[-1]} channels. For other channels, pass "
                         f"your own batches to the Trainer")
    return DatasetInfo(name, replace(preprocessing, img_size=img_size, class_names=class_names))


# ---- Reading a set ----------------------------------------------------------------------------------------


def choose_set(data_dir, dataset, n_images):
    """Return the data set in data_dir: `dataset`, with "auto" replaced by what is found there."""
    check_choice("dataset", dataset, DATASETS)
    root, name = Path(data_dir).expanduser(), dataset
    if dataset == "auto":
        found = [known for known, (_, layout, _) in TORCHVISION_SETS.items() if (root / layout).is_dir()]
        nothing_given = Path(data_dir) == Path(DEFAULT_DATA_DIR) and not root.exists()
        name = found[0] if found else "shapes" if nothing_given else "folder"
    if n_images is not None and name != "shapes":
        raise InputError(f"n_images {n_images} applies only to the data set 'shapes', but this is {name!r}; omit "
                         f"it")
    return name


def read_memory_set(name, data_dir, img_size, n_images, preprocessing, training, in_channels=None):
    """Read the drawn shapes or one of torchvision's data sets.

    Returns images uint8 (N, C, h, w), labels int64 (N,) and the DatasetInfo.
    """
    if name == "shapes":
        S = max(pair(img_size or 32))
        n_images = n_images or max(500, min(20_000, round(200 * (32 / S) ** 1.5) * 100))  # fewer if large
        drawn = make_shapes(n_images, S) if training else make_shapes(n_images // 5, S, start=TEST_START)
        images, labels, class_names = drawn.images, drawn.labels, SHAPES
    else:
        images, labels, class_names = read_torchvision_set(name, data_dir, training)
    info = dataset_info(name, class_names, img_size or images.shape[-1], preprocessing, in_channels)
    return images if info.preprocessing.n_channels == 3 else grey(images), labels, info


def read_torchvision_set(name, data_dir, training):
    """Return (images uint8 (N, 3, H, W), labels int64 (N,), class names); download them if needed."""
    maker, layout, files = TORCHVISION_SETS[name]
    root = Path(data_dir).expanduser()
    absent = [folder for folder in (root / layout, (root / layout).parent, root) if not folder.exists()]
    try:
        data = maker(root, train=training, download=True)
    except Exception as error:  # no network, a damaged file, no permission to write
        for folder in (folder for folder in absent if folder.is_dir() and not any(folder.iterdir())):
            folder.rmdir()
        raise InputError(f"data set {name!r} is not in {str(root)!r} and cannot be downloaded "
                         f"({' '.join(str(error).split())[:200]}); put its files ({files}) into "
                         f"{str(root / layout)!r}, or use the built-in dataset 'shapes'") from None
    images = torch.as_tensor(data.data)  # (N, H, W) in grey or (N, H, W, 3)
    images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous(), torch.as_tensor(data.targets), list(data.classes)  # (N, 3, H, W), (N,)


def read_training_folder(folder, img_size, preprocessing, skip_corrupt, in_channels=None):
    """Return (DatasetInfo, files, labels (N,)) of the training images of a FolderSet."""
    parts = folder.folders
    if "train" not in parts:
        raise InputError(f"{str(folder.root)!r} has {next(iter(parts.values())).name}/ but no train/; put the training "
                         f"images into train/")
    class_names = folder.class_names("train")
    if class_names and {name.lower() for name in class_names} <= OTHER_PARTS:
        raise InputError(f"{str(parts['train'])!r} has the folders {', '.join(class_names)}, which look like parts of "
                         f"a data set, not classes; rename them to train, val and test")
    if not class_names and folder.loose["train"] and (parent := _parent_set(folder.root)):
        raise InputError(f"{str(folder.root)!r} has images but no class folders; {WITHOUT_LABELS}; or did you mean its "
                         f"parent, {parent!r}?")
    if len(class_names) < 2:
        advice = f"; {WITHOUT_LABELS}" if folder.loose["train"] else ""
        raise InputError(f"{str(parts['train'])!r} has {len(class_names)} class "
                         f"folder{'s' * (len(class_names) != 1)}{listed(class_names)}, and at least 2 are needed; put "
                         f"the images of each class into a separate folder{advice}")
    files, labels = folder.images("train", class_names)
    empty = [name for label, name in enumerate(class_names) if not (labels == label).any()]
    if empty:
        left_out = folder.classes["train"][empty[0]].left_out
        held, advice = by_ending(left_out, 4), to_convert(left_out) or "add some, or remove the folder"
        raise InputError(f"class folder {str(parts['train'] / empty[0])!r} has no images "
                         f"({SOME_FORMATS}){held and f', only {held}'}; {advice}")
    img_size = img_size or own_side(files, skip_corrupt)
    return dataset_info("folder", class_names, img_size, preprocessing, in_channels), files, labels


def unlabelled_files(data_dir):
    """Return (training images, validation images or []) of a folder, whatever folders they are in.

    With train/, they are those of train/ and val/. Without it, they are all images outside val/ and test/. Warns about
    folders and images that are not used.

    Raises
    ------
    InputError
        If the folder does not exist, or if there are fewer than 2 training images.
    """
    root = existing_folder(data_dir, "a folder of images")
    train, val, test = (first_folder(root, names) for names in (("train",), VALIDATION_FOLDERS, ("test",)))
    finder = ImageFinder([train or root, *([val] if val else [])])
    found = [finder.find(folder) if folder else Found() for folder in (train or root, val)]
    if not train:
        apart = tuple(f"{folder}{os.sep}" for folder in (val, test) if folder)
        found[0].files = [file for file in found[0].files if not file.startswith(apart)]
    _tell_unused(root, train, val, test)
    for each, folder in zip(found, (train or root, val), strict=True):
        each.tell(folder)
    if len(found[0].files) < 2:
        n = len(found[0].files)
        raise InputError(f"{str(train or root)!r} has {n} image{'s' * (n != 1)} ({SOME_FORMATS}); at least 2 are "
                         f"needed, one of them for validation")
    return found[0].files, found[1].files


def _tell_unused(root, train, val, test):
    """Warn about folders and images of root that learning without labels does not use."""
    used = {folder.name for folder in (train, val) if folder}
    others = [entry for entry in list_folder(root) if entry.name not in {*used, *SYSTEM_FOLDERS}] if train else []
    unused = [f"{entry.name}/" for entry in others if os.path.isdir(entry.path)]
    n_images = sum(entry.name.lower().endswith(image_endings()) for entry in others if entry.is_file())
    if not train and test:
        unused = [f"{test.name}/"]
    if unused or n_images:
        unused += [f"{n_images:,} image{'s' * (n_images != 1)} outside train/"] * bool(n_images)
        assume(f"not used in {str(root)!r}: {join_words(unused)}; learning without labels uses "
               f"{'train/ and val/ alone' if train else 'all images outside test/'}")


def _parent_set(folder):
    """Return the parent of a folder if it holds two or more folders with images, otherwise None."""
    endings = image_endings()
    parent = folder.parent if folder.name not in ("", "..") else folder.resolve().parent
    with suppress(InputError):
        inside = [entry.path for entry in list_folder(parent) if os.path.isdir(entry.path)]
        if sum(any(entry.name.lower().endswith(endings) for entry in list_folder(path)) for path in inside) > 1:
            return str(parent)
    return None


class FolderSet:
    """A folder of images, listed as a whole so that no link puts an image into two classes or parts.

    Parameters
    ----------
    data_dir : path
        A folder with train/ (and val/, valid/ or validation/, and test/), or with class folders directly.

    Attributes
    ----------
    folders : dict
        Folder of each part that exists: "train", "val" and "test". Without parts, "train" is data_dir itself.
    classes : dict
        {part: {class name: Found}}, sorted by class name.
    refused : list of (str, str)
        Path and reason for each class folder that was not used.
    loose : dict
        Number of images outside the class folders, for each part.
    others : Counter
        Number of other files outside the class folders, for each file extension.
    unused : list of str
        Names of the folders that are not parts.

    Raises
    ------
    InputError
        If the folder does not exist or cannot be listed, if a part is a dead link, or if two parts are the same folder
        or one lies inside the other.
    """

    def __init__(self, data_dir):
        self.root = existing_folder(data_dir)
        dead = [name for name in PART_FOLDERS if os.path.islink(self.root / name) and not (self.root / name).exists()]
        if dead:
            raise InputError(f"{str(self.root / dead[0])!r} is a dead link to {os.readlink(self.root / dead[0])!r}; "
                             f"repair or remove it")
        parts = dict(train=first_folder(self.root, ("train",)), val=first_folder(self.root, VALIDATION_FOLDERS),
                     test=first_folder(self.root, ("test",)))
        self.folders = {part: folder for part, folder in parts.items() if folder} or dict(train=self.root)
        self._check_apart()
        used = {folder.name for folder in self.folders.values()}
        self.unused = [] if self.folders.get("train") == self.root else [
            entry.name for entry in list_folder(self.root) if os.path.isdir(entry.path) and entry.name not in used]
        self.refused, self.loose, self.others = [], {}, Counter()
        finder, chosen = ImageFinder(), self._class_folders()
        for entries in chosen.values():
            for entry in entries:
                if not entry.is_symlink():
                    finder.add(entry.path)
        for part, entries in chosen.items():
            for entry in [entry for entry in entries if entry.is_symlink()]:
                target, holder = os.path.realpath(entry.path), os.path.realpath(self.folders[part])
                if reason := finder.refusal(target, True, holder):
                    self.refused.append((entry.path, reason))
                    entries.remove(entry)
                else:
                    finder.add(entry.path)
        self.classes = {part: {entry.name: finder.find(entry.path) for entry in entries}
                        for part, entries in chosen.items()}

    def _check_apart(self):
        """Raise InputError if one part lies inside another."""
        real = {part: Path(os.path.realpath(folder)) for part, folder in self.folders.items()}
        for part, inner in real.items():
            for other, outer in real.items():
                if part != other and inner.is_relative_to(outer):
                    raise InputError(f"{str(self.folders[part])!r} and {str(self.folders[other])!r} lead to the same "
                                     f"images ({str(inner)!r}); use separate folders for them, or remove the link")

    def _class_folders(self):
        """Return {part: the entries that may be class folders}, and count the loose images."""
        chosen, endings = {}, image_endings()
        for part, folder in self.folders.items():
            entries = list_folder(folder)
            files = [entry.name.lower() for entry in entries if entry.is_file()]
            self.loose[part] = sum(name.endswith(endings) for name in files)
            self.others.update(os.path.splitext(name)[1] for name in files if not name.endswith(endings))
            chosen[part] = [entry for entry in entries if os.path.isdir(entry.path)]
            self.refused += [(entry.path, f"it is a dead link to {os.readlink(entry.path)!r}") for entry in entries
                             if entry.is_symlink() and not os.path.exists(entry.path)]
            for entry in [entry for entry in chosen[part] if entry.name in SYSTEM_FOLDERS]:
                self.refused.append((entry.path, "it is a folder of the operating system"))
                chosen[part].remove(entry)
        return chosen

    def class_names(self, part):
        """Return the class names of a part, in alphabetical order."""
        return list(self.classes[part])

    def images(self, part, class_names):
        """Return (files, labels (N,)) of a part.

        Raises
        ------
        InputError
            If a folder is not one of class_names, or if there are no images.
        """
        extra = sorted(set(self.classes[part]) - set(class_names))
        if extra:
            raise InputError(f"{str(self.folders[part])!r} has a class folder {extra[0]!r}, which is not one of the "
                             f"known classes{listed(class_names)}; rename or remove it")
        files, labels = [], []
        for label, class_name in enumerate(class_names):
            own = self.classes[part].get(class_name, Found()).files
            files += own
            labels += [label] * len(own)
        if not files:
            raise InputError(f"{str(self.folders[part])!r} has no images ({SOME_FORMATS}) in the folders of its "
                             f"classes{listed(class_names)}; add some, or remove it")
        return files, torch.tensor(labels)

    def everything(self):
        """Return the contents of all class folders together, and the files next to them that are not images."""
        own = [os.path.join(self.folders[part], name) for part, classes in self.classes.items() for name in classes]
        found = Found(refused=list(self.refused), links=[path for path in own if os.path.islink(path)],
                      left_out=Counter(self.others))
        for each in (each for classes in self.classes.values() for each in classes.values()):
            found.files += each.files
            found.links += each.links
            found.refused += each.refused
            found.left_out.update(each.left_out)
        return found

    def tell(self):
        """Warn about what is ignored, and return self."""
        self.everything().tell(self.root, sum(self.loose.values()))
        return self


def existing_folder(data_dir, needed="a folder that contains a folder of images for each class"):
    """Return data_dir as a Path; raise InputError, which says what is needed, if it is not a folder."""
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise InputError(f"there is no data folder {str(data_dir)!r}; use {needed}")
    return root


def first_folder(root, names):
    """Return the first of the named folders that exists in root, or None."""
    folders = [Path(root).expanduser() / name for name in names]
    return next((folder for folder in folders if folder.is_dir()), None)


def own_side(files, skip_corrupt):
    """Return the img_size for a folder of images.

    It is the largest side among up to 64 of the images, rounded up to a multiple of 4, or 224 if that side is above
    SMALL_SIDE.
    """
    largest, skipped = 0, {}
    for file in files[:: -(-len(files) // 64)]:
        try:
            with open_header(file) as image:
                largest = max(largest, *image.size)
        except Exception:
            open_or_skip(file, skip_corrupt, skipped)
    _check_any_read(largest, skipped)
    return -(-largest // 4) * 4 if largest <= SMALL_SIDE else 224


def decode_images(files, preprocessing, skip_corrupt):
    """Read image files with several threads.

    Returns (images uint8 (n, C, H, W), {path: reason} of the files that could not be read).

    Raises
    ------
    InputError
        If a file cannot be read or, with skip_corrupt, if none can be read.
    """
    C, size = preprocessing.n_channels, preprocessing.size
    images, n_read, all_skipped = torch.empty(len(files), C, *size, dtype=torch.uint8), 0, {}
    parts = [files[start : start + 256] for start in range(0, len(files), 256)]
    quiet = True if len(files) < 2000 else None  # None: a progress bar on a terminal only
    with ThreadPoolExecutor() as pool, tqdm(total=len(files), unit="image", disable=quiet) as bar:
        fit = FitSize(size, preprocessing.interpolation)
        read = partial(_decode_part, n_channels=C, fit=fit, skip_corrupt=skip_corrupt)
        for decoded, skipped in pool.map(read, parts):
            images[n_read : n_read + len(decoded)] = decoded
            n_read += len(decoded)
            all_skipped |= skipped
            bar.update(len(decoded) + len(skipped))
    _check_any_read(n_read, all_skipped)
    return images[:n_read], all_skipped  # (n, C, H, W)


def _decode_part(files, n_channels, fit, skip_corrupt):
    """Implement `decode_images` for some of the files."""
    arrays, skipped = [], {}
    for file in files:
        image = open_or_skip(file, skip_corrupt, skipped, n_channels)
        if image is not None:
            arrays.append(np.asarray(fit(image)))
    images = np.array(arrays, dtype=np.uint8).reshape(-1, *fit.size, n_channels)  # (n, H, W, C)
    return torch.from_numpy(images).permute(0, 3, 1, 2), skipped  # (n, C, H, W)


def _check_any_read(read, skipped):
    if not read:
        path, reason = next(iter(skipped.items()))
        raise InputError(f"none of the {len(skipped)} image files can be read (the first: {path!r}, {reason}); use "
                         f"undamaged images with 8 or 16 bits per channel in a format that Pillow reads")


def stratified_cut(labels, val_fraction, seed):
    """Split the indices of labels (N,) class by class into training and validation.

    The fraction val_fraction of each class, drawn from (seed, class), goes to validation: at least one image, and never
    all of them. A class with a single image keeps it for training.

    Returns
    -------
    train, val : Tensor of int64
        Indices in ascending order.

    Raises
    ------
    InputError
        If no class has two images.
    """
    to_validation = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]  # (images of the class,)
        n_val = min(max(int(len(members) * val_fraction + 0.5), 1), len(members) - 1)
        drawn = torch.randperm(len(members), generator=generator_of(seed, label))[:n_val]  # (n_val,)
        to_validation[members[drawn]] = True
    if not to_validation.any():
        raise InputError("no class has 2 images, so none can be kept for validation; add images, or a val/ folder")
    return (~to_validation).nonzero()[:, 0], to_validation.nonzero()[:, 0]


def check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images, in_channels=None):
    """Raise InputError if an argument of the loaders is out of range."""
    for side in pair(img_size) if img_size is not None else ():
        check_int("img_size", side, 8)
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("workers", workers, 0),
                               ("n_images", n_images, 20), ("in_channels", in_channels, 1)):
        if value is not None or name in ("batch_size", "seed"):
            check_int(name, value, least)
    if isinstance(val_fraction, bool) or not isinstance(val_fraction, int | float) or not 0 < val_fraction < 1:
        raise InputError(f"val_fraction {val_fraction!r} is out of range; use a fraction between 0 and 1, such as 0.1")
