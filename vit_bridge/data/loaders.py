"""Data loaders: from an image folder, a known data set or the drawn shapes to training batches.

    get_data_loaders, get_test_loader   training and validation images; separate test images
    get_evaluation_loader               images to evaluate a trained model on, labelled by its class names
    get_unlabelled_loaders              images to pre-train on: folders of any depth, labels ignored
    as_loader                           a torch DataLoader or a list of batches, wrapped for the Trainer

Small images stay in memory as one uint8 tensor and are augmented a batch at a time (MemoryLoader); worker processes
read photographs from their files (PhotoLoader). Both yield normalised float32 images and int64 labels.

Shapes:  B images in a batch, N images in a data set, n some of them, C channels, H, W height and width (h, w before
         resizing).
"""

import itertools
import math
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing import parent_process
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from torchvision.transforms.v2.functional import center_crop

from vit_bridge.data.augmentation import Augmentation, EpochAugmentation, generator_of, mix_seed, train_transform
from vit_bridge.data.datasets import (
    DEFAULT_DATA_DIR,
    MEMORY_LIMIT,
    TORCHVISION_SETS,
    FolderSet,
    check_arguments,
    choose_set,
    dataset_info,
    decode_images,
    own_side,
    read_memory_set,
    read_training_folder,
    stratified_cut,
    unlabelled_files,
)
from vit_bridge.data.images import open_image, remark_on
from vit_bridge.errors import Assumption, InputError, assume, check_choice, check_int
from vit_bridge.preprocessing import SMALL_SIDE, covering_size, eval_transform
from vit_bridge.weights.heads import first_difference, listed

# ---- By name or folder ------------------------------------------------------------------------------------


def get_data_loaders(data_dir=DEFAULT_DATA_DIR, batch_size=128, img_size=224, dataset="auto", val_fraction=0.1,
                     *, seed=0, workers=None, n_images=None, preprocessing=None, skip_corrupt=False,
                     augmentation=None, in_channels=None):
    """Return the training loader and the validation loader; neither holds test images.

    Parameters
    ----------
    data_dir : path
        Folder of the data. An image folder holds train/<class>/*.jpg, with val/ (or valid/, validation/) and test/
        next to train/ if you have them, or simply <class>/*.jpg.
    batch_size : int
        Images per batch. A last training batch of a single image, too few for BatchNorm, is dropped.
    img_size : int or (int, int), optional
        Side, or (height, width), in pixels; images are resized to cover it and centre-cropped. None uses the data set's
        own: 32 for CIFAR and shapes, 28 for MNIST and Fashion-MNIST. For a folder it is the largest side of up to 64
        images, rounded up to a multiple of 4, or 224 if that side is above 64.
    dataset : str
        A name in DATASETS. "auto" uses what is in data_dir, or the drawn shapes if the default data_dir does not
        exist.
    val_fraction : float
        Fraction of each class that is split off for validation if there is no val/.
    seed : int
        Seed of the validation split, the order and the augmentation, from 0. The drawn shapes do not depend on it.
    workers : int, optional
        Processes that read photographs. None means one per core, at most 8, and none for fewer than 256 images.
    n_images : int, optional
        Shapes only: number of training and validation images together. None means 20,000 at 32 pixels and 1,100 at 224.
    preprocessing : Preprocessing, optional
        Use its mean, std and interpolation, such as a pretrained model's, instead of the data set's own.
    skip_corrupt : bool
        True skips image files that cannot be read and lists them in loader.skipped: small images from the start,
        photographs when they are read. False raises InputError for them.
    augmentation : Augmentation, optional
        Augmentation of training images in memory. Photographs always use `train_transform`.
    in_channels : int, optional
        1 for grey, 3 for colour, 4 for colour and transparency (folders only); images are converted. None means the
        channels of the preprocessing, or 3.

    Returns
    -------
    train_loader, val_loader : DatasetLoader

    Raises
    ------
    InputError
        If an argument is out of range, or if the data cannot be used.
    """
    check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images, in_channels)
    name = choose_set(data_dir, dataset, n_images)
    if name == "shapes" and dataset == "auto":
        _tell_shapes(data_dir, "a folder that contains a folder of images for each class")
    if name != "folder":
        images, labels, info = read_memory_set(name, data_dir, img_size, n_images, preprocessing, True, in_channels)
        train, val = stratified_cut(labels, val_fraction, seed)
        return (MemoryLoader(images[train], labels[train], info, batch_size, seed, True, augmentation=augmentation),
                MemoryLoader(images[val], labels[val], info, batch_size, seed))
    folder = FolderSet(data_dir).tell()
    info, files, labels = read_training_folder(folder, img_size, preprocessing, skip_corrupt, in_channels)
    if "test" in folder.folders:
        folder.images("test", info.class_names)  # report errors in it before the training
    if "val" in folder.folders:
        train_set, val_set = (files, labels), folder.images("val", info.class_names)
    else:
        cut = stratified_cut(labels, val_fraction, seed)
        train_set, val_set = (([files[i] for i in part], labels[part]) for part in cut)
    return (_folder_loader(*train_set, info, batch_size, seed, workers, skip_corrupt, True, augmentation),
            _folder_loader(*val_set, info, batch_size, seed, workers, skip_corrupt))


def get_unlabelled_loaders(data_dir=DEFAULT_DATA_DIR, batch_size=128, img_size=224, dataset="auto", val_fraction=0.1,
                           *, seed=0, workers=None, n_images=None, preprocessing=None, skip_corrupt=False,
                           augmentation=None, in_channels=None):
    """Return the training loader and the validation loader of images without labels; every label is 0.

    The arguments are those of `get_data_loaders`, but a folder may hold its images at any depth, such as all of them
    directly, or in one folder for each class. If it has train/, only train/ and val/ are used, and never test/. The
    loaders have no class_names.

    Returns
    -------
    train_loader, val_loader : DatasetLoader

    Raises
    ------
    InputError
        As in `get_data_loaders`, and if the folder has fewer than 2 images.
    """
    check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images, in_channels)
    name = choose_set(data_dir, dataset, n_images)
    if name == "shapes" and dataset == "auto":
        _tell_shapes(data_dir, "a folder of images")
    if name != "folder":
        images, _, info = read_memory_set(name, data_dir, img_size, n_images, preprocessing, True, in_channels)
        info = replace(info, preprocessing=replace(info.preprocessing, class_names=None))
        train, val = stratified_cut(torch.zeros(len(images), dtype=torch.long), val_fraction, seed)
        return (MemoryLoader(images[train], torch.zeros_like(train), info, batch_size, seed, True,
                             augmentation=augmentation),
                MemoryLoader(images[val], torch.zeros_like(val), info, batch_size, seed))
    train_files, val_files = unlabelled_files(data_dir)
    if not val_files:
        train, val = stratified_cut(torch.zeros(len(train_files), dtype=torch.long), val_fraction, seed)
        train_files, val_files = [train_files[i] for i in train], [train_files[i] for i in val]
    info = dataset_info(name, None, img_size or own_side(train_files, skip_corrupt), preprocessing, in_channels)
    return tuple(_folder_loader(files, torch.zeros(len(files), dtype=torch.long), info, batch_size, seed, workers,
                                skip_corrupt, training, augmentation)
                 for files, training in ((train_files, True), (val_files, False)))


def _tell_shapes(data_dir, needed):
    """Print that the drawn shapes are used because the default folder does not exist."""
    print(f"There is no {data_dir}: using the built-in drawn shapes. For other data, set data_dir ({needed}) or "
          f"dataset ({', '.join(TORCHVISION_SETS)}).")


def get_test_loader(data_dir=DEFAULT_DATA_DIR, batch_size=128, img_size=224, dataset="auto", val_fraction=0.1,
                    *, seed=0, workers=None, n_images=None, preprocessing=None, skip_corrupt=False,
                    in_channels=None):
    """Return the loader of the test images, or None for a folder without test/.

    The arguments are the same as for `get_data_loaders`; val_fraction has no effect. The drawn shapes have one test
    image for every five training and validation images, and no image is in both sets.
    """
    check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images, in_channels)
    class_names = None
    if choose_set(data_dir, dataset, n_images) == "folder":
        folder = FolderSet(data_dir)
        info, _, _ = read_training_folder(folder, img_size, preprocessing, skip_corrupt, in_channels)
        if "test" not in folder.folders:
            return None
        class_names, img_size = info.class_names, info.img_size
    return get_evaluation_loader(data_dir, class_names, batch_size, img_size, dataset, seed=seed, workers=workers,
                                 n_images=n_images, preprocessing=preprocessing, skip_corrupt=skip_corrupt,
                                 in_channels=in_channels)


def get_evaluation_loader(data_dir, class_names, batch_size=128, img_size=None, dataset="auto", *, held_out=False,
                          val_fraction=0.1, seed=0, workers=None, n_images=None, preprocessing=None,
                          skip_corrupt=False, in_channels=None):
    """Return the loader of the images to evaluate a trained model on.

    Parameters
    ----------
    data_dir, batch_size, dataset, seed, workers, n_images, preprocessing, skip_corrupt, in_channels
        As in `get_data_loaders`.
    class_names : list of str
        The model's class names, in the order of its outputs; labels are indices into it. A folder may lack some of
        these classes. For a known data set, they must be its classes, or None.
    img_size : int or (int, int), optional
        As in `get_data_loaders`; for a folder, None looks at the images to be evaluated.
    held_out : bool
        Whether the model was trained by `get_data_loaders` on this folder, with the same val_fraction and seed. It
        matters only if the folder has neither test/ nor val/: True then evaluates only the images split off for
        validation.
    val_fraction : float
        As in training; used with held_out.

    Returns
    -------
    DatasetLoader
        Its attribute `split` records which images it has: "test" (a known data set's test images, or test/), "val"
        (val/, valid/ or validation/), "held out" (the images split off for validation) or "all".

    Raises
    ------
    InputError
        If a class is not one of the model's classes, and as in `get_data_loaders`.
    """
    check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images, in_channels)
    name, split = choose_set(data_dir, dataset, n_images), "test"
    if name != "folder":
        images, labels, info = read_memory_set(name, data_dir, img_size, n_images, preprocessing, False, in_channels)
        if class_names is not None and list(class_names) != info.class_names:
            if name == "shapes" and dataset == "auto":
                raise InputError(f"there is no folder {str(data_dir)!r}; set --data-dir (in Python data_dir) to a "
                                 f"folder with images of the model's classes")
            raise InputError(f"the classes of data set {name!r} differ from the model's, "
                             f"{first_difference(info.class_names, class_names)}; evaluate the model on images of its "
                             f"own classes")
        loader = MemoryLoader(images, labels, info, batch_size, seed)
    else:
        if not class_names:
            raise InputError(f"class_names {class_names} cannot label the images of a folder; pass the model's class "
                             f"names in the order of its outputs (--class-names)")
        folder = FolderSet(data_dir).tell()
        part = next(part for part in ("test", "val", "train") if part in folder.folders)
        _check_labelled(folder, part, class_names)
        files, labels = folder.images(part, class_names)
        split = "all" if part == "train" else part
        if split == "all" and held_out:
            split, (_, cut) = "held out", stratified_cut(labels, val_fraction, seed)
            files, labels = [files[i] for i in cut], labels[cut]
        img_size = img_size or own_side(files, skip_corrupt)
        info = dataset_info(name, class_names, img_size, preprocessing, in_channels)
        loader = _folder_loader(files, labels, info, batch_size, seed, workers, skip_corrupt)
    loader.split = split
    return loader


def _check_labelled(folder, part, class_names):
    """Raise InputError if a part has images but no class folders, or a class that the model does not have."""
    found, where = folder.class_names(part), folder.folders[part]
    if not found and folder.loose[part]:
        advice = f"did you mean its parent, {str(where.parent)!r}?" if where.resolve().name in class_names else \
            "for images without known classes, use predict"
        needed = [f"{where / str(name)}/" for name in class_names[:2]] + ["..."] * (len(class_names) > 2)
        raise InputError(f"{str(where)!r} has images but no class folders; evaluate needs {', '.join(needed)}; "
                         f"{advice}")
    if unknown := [name for name in found if name not in class_names]:
        raise InputError(f"the model does not have the class {unknown[0]!r}, a folder in {str(where)!r}; its "
                         f"{len(class_names)} classes are {listed(class_names)[2:-1]}; rename or remove the folder")


# ---- What a loader is -------------------------------------------------------------------------------------


@runtime_checkable
class Loader(Protocol):
    """The protocol of the Trainer's loaders; `as_loader` makes one of a list or a torch DataLoader.

    A batch is a tuple of tensors with the same first dimension, such as images (B, C, H, W) and labels (B,).

    Attributes
    ----------
    batch_size : int or None
        Images in a full batch, or None if unknown.
    """

    batch_size: int | None

    def __len__(self):
        """Return the number of batches in an epoch."""

    def __iter__(self):
        """Yield the batches of an epoch, from the position that was set, or from the first."""

    def set_position(self, epoch, batch=0):
        """Set the epoch of the following passes, and the batch at which only the next pass starts."""

    def set_shard(self, rank, world_size):
        """Yield only images rank, rank + world_size, ... of every batch, for one of several processes.

        A shard may be empty; its tensors then have a first dimension of 0.
        """

    def to(self, device):
        """Put the following batches on this device, and return the loader."""


def as_loader(batches, check=None):
    """Return a `Loader` unchanged, and wrap anything else in a `BatchLoader`.

    Raises
    ------
    InputError
        If `batches` does not yield batches.
    """
    return batches if isinstance(batches, Loader) else BatchLoader(batches, check)


def length_of(loader):
    """Return len(loader), or None if it has no length."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def n_batches(loader, instead):
    """Return len(loader).

    Raises
    ------
    InputError
        If the loader is empty or has no length; the message then states what to pass instead.
    """
    length = length_of(loader)
    if length is None:
        raise InputError(f"the loader has no length, like a stream or a generator; pass {instead}")
    if not length:
        raise InputError("the loader has 0 batches, and at least one is needed; check the data")
    return length


class BatchLoader:
    """A list of batches, a torch DataLoader or another iterable, as a `Loader`.

    Parameters
    ----------
    batches : iterable
        A batch may be a tuple or list of tensors, arrays or numbers, a dict with one of IMAGE_KEYS and, unless the
        objective needs no labels, one of LABEL_KEYS, or a single tensor.
    check : callable, optional
        Called with each batch, a tuple of tensors, before it moves to a device. It returns the batch to use, or raises
        InputError.

    Notes
    -----
    A pass that starts in the middle of an epoch computes the batches before that point and discards them. set_epoch()
    is called if the DataLoader or its sampler has it. With a DistributedSampler, which has sharded the data already,
    batches are passed on unchanged.
    """

    def __init__(self, batches, check=None):
        if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
            raise InputError(f"got a {type(batches).__name__}, a data set that returns one image at a time; pass "
                             f"batches, such as torch.utils.data.DataLoader(dataset, batch_size=128, shuffle=True)")
        if not isinstance(batches, Iterable):
            raise InputError(f"got a {type(batches).__name__} as a loader; pass a torch DataLoader or a list of "
                             f"batches (images, labels)")
        self.batches, self.batch_size, self.check = batches, getattr(batches, "batch_size", None), check
        self.sampler = getattr(batches, "sampler", None)
        self.first_batch, self.shard, self.device = 0, slice(None), None

    def __len__(self):
        return len(self.batches)

    def set_position(self, epoch, batch=0):
        for part in (self.batches, self.sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
                break
        self.first_batch = batch

    def set_shard(self, rank, world_size):
        if not isinstance(self.sampler, DistributedSampler):
            self.shard = slice(rank, None, world_size)

    def to(self, device):
        self.device = device
        return self

    def __iter__(self):
        first, self.first_batch = self.first_batch, 0
        source, batch = iter(self.batches), None
        for batch in itertools.islice(source, first, None):
            tensors = as_tensors(batch)
            if self.check is not None:
                tensors = self.check(tensors)
            yield tuple(tensor[self.shard].to(self.device, non_blocking=True) for tensor in tensors)
        if batch is None and source is self.batches:
            raise InputError(f"the loader is a {type(source).__name__}, which yields its batches only once, and none "
                             f"are left; pass a list or a DataLoader")


IMAGE_KEYS, LABEL_KEYS = ("pixel_values", "images", "image"), ("labels", "label")


def as_tensors(batch):
    """Return a batch of any kind that `BatchLoader` accepts as a tuple of tensors.

    Raises
    ------
    InputError
        If the tensors do not have the same first dimension.
    """
    if isinstance(batch, Mapping):
        batch = _entries_of(batch)
    parts = [batch] if isinstance(batch, torch.Tensor | np.ndarray) else batch
    if not isinstance(parts, tuple | list) or not parts:
        raise InputError(f"a batch is {_kind_of(batch)}; expected (images, labels), tensors of shape (B, C, H, W) and "
                         f"(B,)")
    tensors = tuple(part if isinstance(part, torch.Tensor) else _as_tensor(part) for part in parts)
    lengths = [tuple(tensor.shape[:1]) for tensor in tensors]
    if set(lengths) != {lengths[0]} or not lengths[0]:
        raise InputError(f"a batch holds tensors of shape {' and '.join(str(tuple(one.shape)) for one in tensors)}; "
                         f"expected as many labels as images, (B, C, H, W) and (B,)")
    return tensors


def _entries_of(batch):
    """Return [images, labels] of a batch that is a dict, or [images] if it has no labels."""
    found = [[key for key in keys if key in batch] for keys in (IMAGE_KEYS, LABEL_KEYS)]
    if len(found[0]) != 1 or len(found[1]) > 1:
        raise InputError(f"a batch is a dict with {', '.join(map(repr, batch)) or 'no entries'}; expected one of "
                         f"{', '.join(map(repr, IMAGE_KEYS))} and one of {', '.join(map(repr, LABEL_KEYS))}, or a "
                         f"tuple (images, labels)")
    keys = [*found[0], *found[1]]
    if others := [key for key in batch if key not in keys]:
        labels = f"{keys[1]!r} the labels" if found[1] else "nothing the labels"
        assume(f"in each batch, {keys[0]!r} holds the images and {labels}; not used: {', '.join(map(repr, others))}")
    return [batch[key] for key in keys]


def _as_tensor(part):
    """Return an array, or a list of numbers, as a tensor."""
    try:
        return torch.as_tensor(np.asarray(part) if isinstance(part, list | tuple) else part)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"a batch holds {_kind_of(part)}; expected (images, labels), tensors of shape (B, C, H, W) "
                         f"and (B,), with labels as integers from 0") from None


def _kind_of(part):
    inside = f" of {type(part[0]).__name__}" if isinstance(part, list | tuple) and part else ""
    return f"a {type(part).__name__}{inside}"


# ---- Loaders of sets --------------------------------------------------------------------------------------


class DatasetLoader:
    """The base class of MemoryLoader and PhotoLoader: order, position and shard.

    Attributes
    ----------
    info : DatasetInfo
        Name, class names and preprocessing of the data set.
    labels : Tensor of int64, shape (N,)
        The labels.
    files : list of str or None
        Paths of the images, if they come from files.
    skipped : dict
        {path: reason} of the skipped files.
    split : str or None
        Which images these are; set by `get_evaluation_loader`.
    """

    def __init__(self, labels, info, batch_size, seed, training, files=None, skipped=None):
        self.info, self.dataset_name, self.preprocessing = info, info.dataset_name, info.preprocessing
        self.class_names, self.img_size, self.size = info.class_names, info.img_size, info.preprocessing.size
        self.labels, self.n_images = labels, len(labels)
        self.files, self.skipped, self.split = files, dict(skipped or {}), None
        self.batch_size, self.seed, self.training = batch_size, seed, training
        self.epoch, self.n_passes = None, 0
        self.first_batch, self.rank, self.world_size = 0, 0, 1

    @property
    def class_counts(self):
        """Number of images of each class, a list in the order of class_names."""
        return self.labels.bincount(minlength=len(self.class_names)).tolist()

    def set_epoch(self, epoch):
        """Set the epoch of the following passes; without it they are epochs 0, 1, 2 and so on."""
        self.epoch, self.first_batch = epoch, 0

    def set_position(self, epoch, batch=0):
        """Set the epoch, as `set_epoch` does, and start only the next pass at a batch.

        The batches before it are not computed.

        Raises
        ------
        InputError
            For a batch greater than len(loader).
        """
        check_int("epoch", epoch, 0)
        check_int("batch", batch, 0)
        if batch > len(self):
            raise InputError(f"batch {batch} is out of range: expected 0 to {len(self)}, because a pass has "
                             f"{len(self)} batches; use the same batch size and images as the interrupted run")
        self.epoch, self.first_batch = epoch, batch

    def set_shard(self, rank, world_size):
        """Yield only images rank, rank + world_size, ... of every batch, for one of several processes.

        All shards together hold the batches of a single process. A shard may be empty: images (0, C, H, W), labels
        (0,).

        Raises
        ------
        InputError
            If rank is not below world_size.
        """
        check_int("world_size", world_size, 1)
        check_choice("rank", rank, range(world_size))
        self.rank, self.world_size = rank, world_size

    def set_augmentation(self, augmentation):
        """Set the augmentation of images in memory; photographs keep `train_transform`."""

    def subset(self, n_images):
        """Return up to n_images indices (n,) in ascending order, drawn by the seed; None means all."""
        if n_images is None or n_images >= self.n_images:
            return torch.arange(self.n_images, device=self.labels.device)
        drawn = torch.randperm(self.n_images, generator=generator_of(self.seed, 3))[:n_images]
        return drawn.sort().values.to(self.labels.device)

    def epoch_batches(self):
        """Start a pass: return (epoch, batches), where a batch holds the indices (B,) of its images."""
        epoch = self.n_passes if self.epoch is None else self.epoch
        self.n_passes += 1
        first, self.first_batch = self.first_batch, 0
        shuffled = torch.randperm(self.n_images, generator=generator_of(self.seed, epoch, 0))
        order = shuffled if self.training else torch.arange(self.n_images)
        batches = order.to(self.labels.device).split(self.batch_size)[first : len(self)]
        return epoch, [batch[self.rank :: self.world_size] for batch in batches]

    def __len__(self):
        """Return the number of batches in a pass; a last training batch of one image is dropped if there are others."""
        n_batches, rest = -(-self.n_images // self.batch_size), self.n_images % self.batch_size
        return n_batches - 1 if self.training and rest == 1 and n_batches > 1 else n_batches


class MemoryLoader(DatasetLoader):
    """Batches of images in memory, resized to img_size.

    Parameters
    ----------
    images : Tensor of uint8, shape (N, C, h, w)
        The images.
    labels : Tensor of int64, shape (N,)
        The labels.
    info : DatasetInfo
        Name, class names and preprocessing.
    batch_size, seed : int
        Images per batch; seed of the order and the augmentation.
    training : bool
        Shuffle and augment the images.
    files, skipped : list, dict, optional
        As in `DatasetLoader`.
    augmentation : Augmentation, optional
        The augmentation in training. MNIST is never mirrored, because mirroring changes a digit.
    """

    def __init__(self, images, labels, info, batch_size, seed=0, training=False, files=None, skipped=None,
                 augmentation=None):
        super().__init__(labels, info, batch_size, seed, training, files, skipped)
        self.images = images
        self.set_augmentation(augmentation or Augmentation())
        self.normalisation = torch.tensor([self.preprocessing.mean, self.preprocessing.std]).view(2, -1, 1, 1) * 255

    def set_augmentation(self, augmentation):
        """Set the augmentation of the following passes."""
        mirrors = self.dataset_name != "mnist"
        self.augmentation = augmentation if mirrors else replace(augmentation, flip="none")

    def to(self, device):
        """Move the data to a device, where the batches are then made, and return the loader."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.normalisation = self.normalisation.to(device)
        return self

    def without_augmentation(self, n_images=None):
        """Return a new loader of all images, or of n_images drawn from them, in order and not augmented.

        It yields full batches, whatever the shard and the position of this loader.
        """
        indices = self.subset(n_images)
        files = self.files and [self.files[i] for i in indices.tolist()]
        images = self.images if len(indices) == self.n_images else self.images[indices]  # no copy of all images
        return MemoryLoader(images, self.labels[indices], self.info, self.batch_size, self.seed, files=files,
                            skipped=self.skipped).to(self.images.device)

    def __iter__(self):
        epoch, batches = self.epoch_batches()
        N, _, h, w = self.images.shape
        drawn = None
        if self.training:
            drawn = EpochAugmentation(self.augmentation, N, h, w, self.seed, epoch, self.images.device)
        for indices in batches:
            images = self.images[indices]  # (B, C, h, w)
            if drawn is None:
                images = self.normalised(images)
            else:
                images = drawn.hide(self.normalised(drawn.move(images, indices)), indices)
            yield images, self.labels[indices]

    def normalised(self, images):
        """Resize and normalise uint8 images (B, C, h, w): float32 (B, C, H, W)."""
        images = images.float()
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, covering_size(images.shape[2:], self.size),
                                   mode=self.preprocessing.interpolation, antialias=True)
            images = center_crop(images, self.size)
            if self.preprocessing.interpolation == "bicubic":
                images.clamp_(0, 255)  # bicubic interpolation overshoots near edges
        mean, std = self.normalisation
        return images.sub_(mean).div_(std)  # (B, C, H, W)


class PhotoLoader(DatasetLoader):
    """Batches of images that are read from their files.

    The augmentation of a photograph depends only on (seed, epoch, its index), whatever the number of workers.

    Parameters
    ----------
    files : list of str
        Paths of the images.
    labels : Tensor of int64, shape (N,)
        The labels.
    info : DatasetInfo
        Name, class names and preprocessing.
    batch_size, seed : int
        Images per batch; seed of the order and the augmentation.
    training : bool
        Shuffle and augment the images.
    workers : int
        Number of worker processes; 0 reads in this process.
    skip_corrupt : bool
        Skip files that cannot be read and list them in `skipped`; n_images and len() still count them.
    """

    def __init__(self, files, labels, info, batch_size, seed=0, training=False, workers=0, skip_corrupt=False):
        super().__init__(labels, info, batch_size, seed, training, files)
        self.workers, self.skip_corrupt = workers, skip_corrupt
        self.keys, self.device = [], torch.device("cpu")  # keys: the batches of a pass, see PhotoDataset
        self.loader = DataLoader(
            PhotoDataset(files, labels.tolist(), info, training), batch_sampler=self.keys, num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=partial(_collate_photos, shape=(info.preprocessing.n_channels, *self.size)),
            worker_init_fn=_leave_to_main, pin_memory=torch.cuda.is_available())

    def to(self, device):
        """Move the following batches to a device, and return the loader."""
        self.device = torch.device(device)
        return self

    def without_augmentation(self, n_images=None):
        """Return a loader as MemoryLoader.without_augmentation does; it reads the files again."""
        indices = self.subset(n_images)
        return PhotoLoader([self.files[i] for i in indices.tolist()], self.labels[indices], self.info,
                           self.batch_size, self.seed, workers=self.workers,
                           skip_corrupt=self.skip_corrupt).to(self.device)

    def __iter__(self):
        epoch, batches = self.epoch_batches()
        self.keys[:] = [[(self.seed, epoch, index) for index in batch.tolist()] for batch in batches]
        for images, labels, errors in self.loader:
            if errors and not self.skip_corrupt:
                raise errors[0].in_a_set()
            self.skipped.update((error.path, error.reason) for error in errors)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


# ---- Reading photographs in worker processes --------------------------------------------------------------


class PhotoDataset(Dataset):
    """Image files as (normalised image (C, H, W), label), indexed by (seed, epoch, index).

    A file that cannot be read yields its InputError as a value, because an error raised in a worker process would
    arrive wrapped in a traceback.
    """

    def __init__(self, files, labels, info, training):
        self.files, self.labels, self.n_channels = files, labels, info.preprocessing.n_channels
        make_transform = train_transform if training else eval_transform
        self.transform = make_transform(info.preprocessing)

    def __getitem__(self, key):
        index = key[-1]
        try:
            image = open_image(self.files[index], self.n_channels)
        except InputError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(*key))
            return self.transform(image), self.labels[index]


def _collate_photos(samples, shape):
    """Return (images (B, C, H, W), labels (B,), the list of InputErrors among the samples).

    shape is (C, H, W), for batches in which nothing could be read (B = 0).
    """
    errors = [sample for sample in samples if isinstance(sample, InputError)]
    whole = [sample for sample in samples if not isinstance(sample, InputError)]
    labels = torch.tensor([label for _, label in whole], dtype=torch.int64)  # (B,)
    if not whole:
        return torch.empty(0, *shape), labels, errors
    return torch.stack([image for image, _ in whole]), labels, errors  # (B, C, H, W)


def _leave_to_main(worker):
    """Prepare a worker process: leave warnings and signals to the main process.

    The main process warns once (`remark_on`), and after Ctrl-C or SIGTERM it still needs the worker to finish its step.
    """
    warnings.simplefilter("ignore", Assumption)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux; elsewhere SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_for_main, daemon=True).start()


def _end_for_main():
    """End this process on SIGTERM from the main process; ignore one from anywhere else."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent_process().pid:
        pass
    os._exit(0)


def _folder_loader(files, labels, info, batch_size, seed, workers, skip_corrupt, training=False, augmentation=None):
    """Return a MemoryLoader if the images are small and fit in memory, and a PhotoLoader otherwise."""
    remark_on(files)
    shown = info.preprocessing
    if max(shown.size) <= SMALL_SIDE and len(files) * shown.n_channels * math.prod(shown.size) <= MEMORY_LIMIT:
        images, skipped = decode_images(files, shown, skip_corrupt)
        kept = [i for i, file in enumerate(files) if file not in skipped]
        lost = sorted({*labels.tolist()} - {*labels[kept].tolist()}) if training else []
        if lost:
            raise InputError(f"none of the images of class {info.class_names[lost[0]]!r} can be read, such as "
                             f"{next(iter(skipped))!r}; replace them, or remove the class")
        return MemoryLoader(images, labels[kept], info, batch_size, seed, training, [files[i] for i in kept], skipped,
                            augmentation)
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if len(files) >= 256 else 0
    return PhotoLoader(files, labels, info, batch_size, seed, training, workers, skip_corrupt)
