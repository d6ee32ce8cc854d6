"""From a folder of images, a known data set or drawn shapes to batches that a model can train on.

    get_data_loaders, get_test_loader   training and validation images; the test images, kept apart
    get_evaluation_loader               images to score a trained model on, labelled by its own class names

Sets of small images are one uint8 tensor in memory, augmented a batch at a time (MemoryLoader); worker processes read
photographs file by file (PhotoLoader). Both give normalised float32 images (B, C, H, W) and int64 labels (B).

Shapes:  B images in a batch, N images in a set, n some of them, C channels, H, W height and width (h, w before images
         are resized).
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
)
from vit_bridge.data.images import open_image, remark_on
from vit_bridge.errors import Assumption, InputError, assume, check_choice, check_int
from vit_bridge.preprocessing import SMALL_SIDE, covering_size, eval_transform

# ---- By name or folder ------------------------------------------------------------------------------------


def get_data_loaders(data_dir=DEFAULT_DATA_DIR, batch_size=128, img_size=224, dataset="auto", val_fraction=0.1,
                     *, seed=0, workers=None, n_images=None, preprocessing=None, skip_corrupt=False,
                     augmentation=None, in_channels=None):
    """(training loader, validation loader). The validation images are never the test images.

    data_dir      the folder of the data. A folder of images holds train/<class>/*.jpg, with val/ (or valid/,
                  validation/) and test/ beside train/ where there are such; or simply <class>/*.jpg.
    batch_size    images in a batch. A last training batch of one image, too few for BatchNorm, is left out.
    img_size      side or (height, width) in pixels, or None for the set's own: 32 for CIFAR and shapes, 28 for the
                  MNIST kinds; for a folder the largest side of up to 64 images if at most 64, rounded up to a multiple
                  of 4, else 224. Images are resized until they cover it, and the middle is cut out.
    dataset       a name in DATASETS; "auto": what lies in data_dir, and shapes where the default one does not exist.
    val_fraction  the fraction of each class split off the training images for validation, if there is no val/.
    seed          of the validation split, the order and the augmentation; a whole number from 0. The drawn shapes do
                  not depend on it.
    workers       processes that read photographs; None: one a core, 8 at most, none for under 256 images.
    n_images      shapes only: training and validation images together; None: 20,000 at 32 pixels, 1,100 at 224.
    preprocessing whose mean, std and interpolation the images get, such as a pretrained model's; None: the set's own.
    skip_corrupt  True: leaves out image files that cannot be read, and lists them in loader.skipped (small images
                  from the start, photographs when they are read). False: such a file raises InputError.
    augmentation  of training images in memory; None: Augmentation(). Photographs have train_transform's.
    in_channels   1 for grey images, 3 for colour, 4 for colour and transparency (folders only); None: those of the
                  preprocessing, or 3. Images that have others are converted.

    Both are a DatasetLoader. Raises InputError for arguments and data that cannot work.
    """
    check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images, in_channels)
    name = choose_set(data_dir, dataset, n_images)
    if name == "shapes" and dataset == "auto":
        print(f"There is no {data_dir}: using the built-in drawn shapes. For other data give data_dir (a folder "
              f"with a folder of images for each class) or dataset ({', '.join(TORCHVISION_SETS)}).")
    if name != "folder":
        images, labels, info = read_memory_set(name, data_dir, img_size, n_images, preprocessing, True, in_channels)
        train, val = stratified_cut(labels, val_fraction, seed)
        return (MemoryLoader(images[train], labels[train], info, batch_size, seed, True, augmentation=augmentation),
                MemoryLoader(images[val], labels[val], info, batch_size, seed))
    folder = FolderSet(data_dir).tell()
    info, files, labels = read_training_folder(folder, img_size, preprocessing, skip_corrupt, in_channels)
    if "test" in folder.folders:
        folder.images("test", info.class_names)  # what is wrong with it is better known before the training
    if "val" in folder.folders:
        train_set, val_set = (files, labels), folder.images("val", info.class_names)
    else:
        cut = stratified_cut(labels, val_fraction, seed)
        train_set, val_set = (([files[i] for i in part], labels[part]) for part in cut)
    return (_folder_loader(*train_set, info, batch_size, seed, workers, skip_corrupt, True, augmentation),
            _folder_loader(*val_set, info, batch_size, seed, workers, skip_corrupt))


def get_test_loader(data_dir=DEFAULT_DATA_DIR, batch_size=128, img_size=224, dataset="auto", val_fraction=0.1,
                    *, seed=0, workers=None, n_images=None, preprocessing=None, skip_corrupt=False,
                    in_channels=None):
    """The loader of the test images, or None for a folder without test/. The arguments are those of get_data_loaders;
    val_fraction and seed change nothing. Of shapes there are a fifth as many, none of them among the others."""
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
    """The loader of the images on which a trained model is scored; the labels count in the model's class_names.

    class_names   the model's, in the order of its outputs; of a known set they must be the set's own, as None is. A
                  folder may lack some of the classes.
    held_out      says that the model was trained by get_data_loaders on the other images of this folder, with the same
                  val_fraction and seed. It matters only where there are no images kept apart from training.

    The other arguments are those of get_data_loaders; img_size None is the side of the images that are scored. The
    loader's split says which they are: "test" (a known set's test images, or those in test/), else "val" (in val/,
    valid/ or validation/), else of the images in train/ or in the class folders of data_dir those that
    get_data_loaders cut off for validation, "held out", or without held_out "all". Raises InputError for a class that
    the model does not know, and as get_data_loaders does."""
    check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images, in_channels)
    name, split = choose_set(data_dir, dataset, n_images), "test"
    if name != "folder":
        images, labels, info = read_memory_set(name, data_dir, img_size, n_images, preprocessing, False, in_channels)
        if class_names is not None and list(class_names) != info.class_names:
            raise InputError(f"data set {name!r} has the classes {', '.join(info.class_names)}, but the model knows "
                             f"{', '.join(class_names)}: score it on images of its own classes")
        loader = MemoryLoader(images, labels, info, batch_size, seed)
    else:
        if not class_names:
            raise InputError(f"class_names {class_names} cannot label a folder: expected those of the model, in the "
                             f"order of its outputs; give them (--class-names)")
        folder = FolderSet(data_dir).tell()
        part = next(part for part in ("test", "val", "train") if part in folder.folders)
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


# ---- What a loader is -------------------------------------------------------------------------------------


@runtime_checkable
class Loader(Protocol):
    """What the Trainer needs from whatever gives it batches. as_loader() makes one of a list or a torch DataLoader.

    A batch is a tuple of tensors, such as images (B, C, H, W) and labels (B), with one entry an image in each.
    batch_size: images in a full batch, or None where that is not known.
    """
    batch_size: int | None

    def __len__(self):
        """Batches in an epoch."""

    def __iter__(self):
        """The batches of an epoch, from the position that was set; without one, from the first batch."""

    def set_position(self, epoch, batch=0):
        """Fixes the epoch of the passes to come. The next pass, and only that one, begins at this batch of it."""

    def set_shard(self, rank, world_size):
        """Gives only images rank, rank + world_size, ... of every batch, for one of several processes. A shard may be
        empty: its tensors then have the first dimension 0."""

    def to(self, device):
        """Puts the batches to come on this device. Returns the loader."""


def as_loader(batches, check=None):
    """A Loader as it is; anything else that gives batches, wrapped in a BatchLoader. Raises InputError for what gives
    none."""
    return batches if isinstance(batches, Loader) else BatchLoader(batches, check)


def length_of(loader):
    """len(loader), or None where it has none."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def n_batches(loader, instead):
    """len(loader). Raises InputError for one without batches, and for one without a length, which says what to give
    instead."""
    length = length_of(loader)
    if length is None:
        raise InputError(f"the loader has no length, as that of a stream or a generator; give {instead}")
    if not length:
        raise InputError("the loader has 0 batches; expected at least one, check the data")
    return length


class BatchLoader:
    """A list of batches, a torch DataLoader, or any iterable, as a Loader.

    check  called with each batch, a tuple of tensors, before it is moved to a device: gives the batch as it is to be
           used, or raises InputError; None: it is used as it is

    A batch may be a tuple or list of tensors, arrays or numbers, a dict (IMAGE_KEYS and LABEL_KEYS), or one tensor. A
    pass that begins in the middle of an epoch makes the batches before that point and drops them. set_epoch() is called
    where the DataLoader or its sampler has one. A DistributedSampler has sharded the set already, so its batches are
    given as they come.
    """

    def __init__(self, batches, check=None):
        if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
            raise InputError(f"got a {type(batches).__name__}, a data set that gives one image at a time; expected "
                             f"batches: torch.utils.data.DataLoader(dataset, batch_size=128, shuffle=True)")
        if not isinstance(batches, Iterable):
            raise InputError(f"got a {type(batches).__name__} as a loader; expected a torch DataLoader, or a list of "
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
            raise InputError(f"the loader is a {type(source).__name__}, which gives its batches only once, and there "
                             f"are no more; give a list or a DataLoader, which can be gone through again")


IMAGE_KEYS, LABEL_KEYS = ("pixel_values", "images", "image"), ("labels", "label")


def as_tensors(batch):
    """A batch of any kind that BatchLoader takes as a tuple of tensors. Raises InputError unless each has one entry an
    image."""
    if isinstance(batch, Mapping):
        batch = _entries_of(batch)
    parts = [batch] if isinstance(batch, torch.Tensor | np.ndarray) else batch
    if not isinstance(parts, tuple | list) or not parts:
        raise InputError(f"a batch is {_kind_of(batch)}; expected (images, labels), tensors of (B, C, H, W) and (B)")
    tensors = tuple(part if isinstance(part, torch.Tensor) else _as_tensor(part) for part in parts)
    lengths = [tuple(tensor.shape[:1]) for tensor in tensors]
    if set(lengths) != {lengths[0]} or not lengths[0]:
        raise InputError(f"a batch holds tensors of {' and '.join(str(tuple(one.shape)) for one in tensors)}; expected "
                         f"as many labels as images, (B, C, H, W) and (B)")
    return tensors


def _entries_of(batch):
    """(images, labels) of a batch that is a dict."""
    found = [[key for key in keys if key in batch] for keys in (IMAGE_KEYS, LABEL_KEYS)]
    if [len(keys) for keys in found] != [1, 1]:
        raise InputError(f"a batch is a dict with {', '.join(map(repr, batch)) or 'no entry'}; expected one of "
                         f"{', '.join(map(repr, IMAGE_KEYS))} and one of {', '.join(map(repr, LABEL_KEYS))}, or a "
                         f"tuple (images, labels)")
    keys = [key for key, in found]
    if others := [key for key in batch if key not in keys]:
        assume(f"of each batch {keys[0]!r} are the images and {keys[1]!r} the labels; {', '.join(map(repr, others))} "
               f"is not used")
    return [batch[key] for key in keys]


def _as_tensor(part):
    """An array, or a list of numbers, as a tensor."""
    try:
        return torch.as_tensor(np.asarray(part) if isinstance(part, list | tuple) else part)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"a batch holds {_kind_of(part)}; expected (images, labels), tensors of (B, C, H, W) and (B), "
                         f"labels as numbers from 0") from None


def _kind_of(part):
    inside = f" of {type(part[0]).__name__}" if isinstance(part, list | tuple) and part else ""
    return f"a {type(part).__name__}{inside}"


# ---- Loaders of sets --------------------------------------------------------------------------------------


class DatasetLoader:
    """What MemoryLoader and PhotoLoader share: the DatasetInfo, the order of the images, position and shard. files:
    their paths, or None; skipped: {path: reason} of those left out; split: "test", for instance."""

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
        """How many images there are of each class, a list in the order of class_names."""
        return self.labels.bincount(minlength=len(self.class_names)).tolist()

    def set_epoch(self, epoch):
        """Fixes the epoch of the passes to come. As long as it is not called, they are epochs 0, 1, 2 and so on."""
        self.epoch, self.first_batch = epoch, 0

    def set_position(self, epoch, batch=0):
        """Fixes the epoch as set_epoch does, and lets the next pass, and only that, begin at a batch of it: those
        before are not computed. Raises InputError for a batch past len(loader), where nothing more comes."""
        check_int("epoch", epoch, 0)
        check_int("batch", batch, 0)
        if batch > len(self):
            raise InputError(f"batch {batch} is out of range: expected 0 to {len(self)}, as a pass has {len(self)} "
                             f"batches; give the batch size and the images of the run that was interrupted")
        self.epoch, self.first_batch = epoch, batch

    def set_shard(self, rank, world_size):
        """For one of several processes: gives only images rank, rank + world_size, ... of every batch. All shards
        together are the batches of one process. One may be empty: images (0, C, H, W), labels (0,). Raises InputError
        for a rank that is not below world_size."""
        check_int("world_size", world_size, 1)
        check_choice("rank", rank, range(world_size))
        self.rank, self.world_size = rank, world_size

    def set_augmentation(self, augmentation):
        """Has images in memory varied in this way in the passes to come; photographs keep train_transform."""

    def subset(self, n_images):
        """Indices into the set, (n,), at most n_images of them, drawn by the seed, in ascending order; None: all."""
        if n_images is None or n_images >= self.n_images:
            return torch.arange(self.n_images, device=self.labels.device)
        drawn = torch.randperm(self.n_images, generator=generator_of(self.seed, 3))[:n_images]
        return drawn.sort().values.to(self.labels.device)

    def epoch_batches(self):
        """(epoch, batches) of the pass that begins; a batch holds the indices (B,) of its images in the set."""
        epoch = self.n_passes if self.epoch is None else self.epoch
        self.n_passes += 1
        first, self.first_batch = self.first_batch, 0
        shuffled = torch.randperm(self.n_images, generator=generator_of(self.seed, epoch, 0))
        order = shuffled if self.training else torch.arange(self.n_images)
        batches = order.to(self.labels.device).split(self.batch_size)[first : len(self)]
        return epoch, [batch[self.rank :: self.world_size] for batch in batches]

    def __len__(self):
        """Batches in a pass. A last training batch of one image is left out, unless all batches are of one."""
        n_batches, rest = -(-self.n_images // self.batch_size), self.n_images % self.batch_size
        return n_batches - 1 if self.training and rest == 1 and n_batches > 1 else n_batches


class MemoryLoader(DatasetLoader):
    """Batches of a set in memory: images, uint8 (N, C, h, w), and labels, int64 (N,), resized to img_size. In training
    they are shuffled and varied as `augmentation` says, but never mirrored for mnist: a mirrored digit is no digit."""

    def __init__(self, images, labels, info, batch_size, seed=0, training=False, files=None, skipped=None,
                 augmentation=None):
        super().__init__(labels, info, batch_size, seed, training, files, skipped)
        self.images = images
        self.set_augmentation(augmentation or Augmentation())
        self.normalisation = torch.tensor([self.preprocessing.mean, self.preprocessing.std]).view(2, -1, 1, 1) * 255

    def set_augmentation(self, augmentation):
        """Has the passes to come varied in this way."""
        mirrors = self.dataset_name != "mnist"
        self.augmentation = augmentation if mirrors else replace(augmentation, flip="none")

    def to(self, device):
        """Moves the set to the device, where the batches are then made. Returns the loader."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.normalisation = self.normalisation.to(device)
        return self

    def without_augmentation(self, n_images=None):
        """A new loader of the same images, or of n_images drawn from them, each once, in the order of the set and not
        augmented. It gives whole batches, whatever the shard and the position of this one."""
        places = self.subset(n_images)
        files = self.files and [self.files[place] for place in places.tolist()]
        images = self.images if len(places) == self.n_images else self.images[places]  # no copy of a whole set
        return MemoryLoader(images, self.labels[places], self.info, self.batch_size, self.seed, files=files,
                            skipped=self.skipped).to(self.images.device)

    def __iter__(self):
        epoch, batches = self.epoch_batches()
        N, _, h, w = self.images.shape
        draws = None
        if self.training:
            draws = EpochAugmentation(self.augmentation, N, h, w, self.seed, epoch, self.images.device)
        for places in batches:
            images = self.images[places]  # (B, C, h, w)
            if draws is None:
                images = self.normalised(images)
            else:
                images = draws.hide(self.normalised(draws.move(images, places)), places)
            yield images, self.labels[places]

    def normalised(self, images):
        """uint8 (B, C, h, w) to float32 (B, C, H, W)."""
        images = images.float()
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, covering_size(images.shape[2:], self.size),
                                   mode=self.preprocessing.interpolation, antialias=True)
            images = center_crop(images, self.size)
            if self.preprocessing.interpolation == "bicubic":
                images.clamp_(0, 255)  # beside an edge it goes beyond what pixels can be
        mean, std = self.normalisation
        return images.sub_(mean).div_(std)  # (B, C, H, W)


class PhotoLoader(DatasetLoader):
    """Batches of images read file by file: files, a list of paths, and labels, int64 (N,). The augmentation of a
    photograph is a function of (seed, epoch, its index in the set), whatever the workers. With skip_corrupt, files that
    cannot be read are left out of their batch and listed in `skipped`; n_images and the length still count them."""

    def __init__(self, files, labels, info, batch_size, seed=0, training=False, workers=0, skip_corrupt=False):
        super().__init__(labels, info, batch_size, seed, training, files)
        self.workers, self.skip_corrupt = workers, skip_corrupt
        self.keys, self.device = [], torch.device("cpu")  # keys: the batches of a pass, as lists of (epoch, index)
        self.loader = DataLoader(
            PhotoDataset(files, labels.tolist(), info, seed, training), batch_sampler=self.keys, num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=partial(_collate_photos, shape=(info.preprocessing.n_channels, *self.size)),
            worker_init_fn=_leave_to_main, pin_memory=torch.cuda.is_available())

    def to(self, device):
        """Has batches moved to the device as they come. Returns the loader."""
        self.device = torch.device(device)
        return self

    def without_augmentation(self, n_images=None):
        """As MemoryLoader.without_augmentation; it reads the files anew."""
        places = self.subset(n_images)
        return PhotoLoader([self.files[place] for place in places.tolist()], self.labels[places], self.info,
                           self.batch_size, self.seed, workers=self.workers,
                           skip_corrupt=self.skip_corrupt).to(self.device)

    def __iter__(self):
        epoch, batches = self.epoch_batches()
        self.keys[:] = [[(epoch, index) for index in batch.tolist()] for batch in batches]
        for images, labels, errors in self.loader:
            if errors and not self.skip_corrupt:
                raise errors[0].in_a_set()
            self.skipped.update((error.path, error.reason) for error in errors)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


# ---- Reading photographs in worker processes --------------------------------------------------------------


class PhotoDataset(Dataset):
    """Image files as (normalised image (C, H, W), label), by keys (epoch, index in the set). A file that cannot be
    read gives its InputError as a value: raised in a worker process it would come out wrapped in a traceback."""

    def __init__(self, files, labels, info, seed, training):
        self.files, self.labels, self.seed, self.n_channels = files, labels, seed, info.preprocessing.n_channels
        make_transform = train_transform if training else eval_transform
        self.transform = make_transform(info.preprocessing)

    def __getitem__(self, key):
        epoch, index = key
        try:
            image = open_image(self.files[index], self.n_channels)
        except InputError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            return self.transform(image), self.labels[index]


def _collate_photos(samples, shape):
    """Samples of this shape, (C, H, W), as (images (B, C, H, W), labels (B,), the InputErrors among them, a list); B
    may be 0."""
    errors = [sample for sample in samples if isinstance(sample, InputError)]
    whole = [sample for sample in samples if not isinstance(sample, InputError)]
    labels = torch.tensor([label for _, label in whole], dtype=torch.int64)  # (B,)
    if not whole:
        return torch.empty(0, *shape), labels, errors
    return torch.stack([image for image, _ in whole]), labels, errors  # (B, C, H, W)


def _leave_to_main(worker):
    """For a worker process: the main one says what is assumed, once (remark_on); and after a Ctrl-C or a SIGTERM to all
    it still needs the worker for its step."""
    warnings.simplefilter("ignore", Assumption)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux; elsewhere a SIGTERM ends it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_for_main, daemon=True).start()


def _end_for_main():
    """Ends this process when the main one says so; a SIGTERM from anywhere else is for the main one to handle."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent_process().pid:
        pass
    os._exit(0)


def _folder_loader(files, labels, info, batch_size, seed, workers, skip_corrupt, training=False, augmentation=None):
    """A MemoryLoader where the images are small and fit in memory, else a PhotoLoader."""
    remark_on(files)
    shown = info.preprocessing
    if max(shown.size) <= SMALL_SIDE and len(files) * shown.n_channels * math.prod(shown.size) <= MEMORY_LIMIT:
        images, skipped = decode_images(files, shown, skip_corrupt)
        kept = [i for i, file in enumerate(files) if file not in skipped]
        lost = sorted({*labels.tolist()} - {*labels[kept].tolist()}) if training else []
        if lost:
            raise InputError(f"none of the images of class {info.class_names[lost[0]]!r} can be read, such as "
                             f"{next(iter(skipped))!r}: replace them, or remove the class")
        return MemoryLoader(images, labels[kept], info, batch_size, seed, training, [files[i] for i in kept], skipped,
                            augmentation)
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if len(files) >= 256 else 0
    return PhotoLoader(files, labels, info, batch_size, seed, training, workers, skip_corrupt)
