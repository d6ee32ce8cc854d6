"""Data: from a folder of images, a known data set or drawn shapes to batches that a model can train on.

    get_data_loaders   the training and the validation loader; get_test_loader   the test images, kept apart
    get_evaluation_loader   images to score a trained model on, labelled by its own class names
    open_image         an image file as an upright RGB picture; eval_transform   that picture as a tensor
    make_shapes        the built-in set, which drawn_shapes holds

What happens to the pixels of an image is in augmentation, and eval_transform handed on from there.

Letters:  B images in a batch, N images in a set, n some of them, C channels (always 3), H, W height and width,
          S side of a square image in pixels.

Sets of small images (CIFAR, MNIST, shapes, folders at 64 pixels or less) are kept in memory as one uint8 tensor and
augmented a batch at a time: MemoryLoader. Folders of photographs are read file by file by worker processes:
PhotoLoader. Both give normalised float32 images (B, 3, S, S) and int64 labels (B).

All chance comes from seeds: the validation cut from `seed`, order and augmentation from (seed, epoch). The drawn
images of the loaders do not depend on `seed`: they are the same in every run.
"""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from augmentation import (
    INTERPOLATIONS,
    SMALL_SIDE,
    Augmentation,
    Draws,
    FitSquare,
    eval_transform,
    generator_of,
    mix_seed,
    train_transform,
)
from drawn_shapes import SHAPES, TEST_START, TEXTURES, make_shapes  # noqa: F401 - TEXTURES is handed on
from vit_model import InputError, check_choice, check_whole

DEFAULT_DATA_DIR = "./data"
MEMORY_LIMIT = 2 * 1024**3  # bytes: small images that decode to more are read file by file
VALIDATION_FOLDERS = ("val", "valid", "validation")

# Mean and standard deviation of each channel (red, green, blue), of values from 0 to 1.
NORMALISATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,) * 3, (0.3081,) * 3),
    "fashion-mnist": ((0.2860,) * 3, (0.3530,) * 3),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
    "shapes": ((0.5,) * 3, (0.25,) * 3),
}

# torchvision's class for each known set, the folder in data_dir where it lies, and its files.
IDX_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
TORCHVISION_SETS = {
    "cifar10": (torchvision.datasets.CIFAR10, "cifar-10-batches-py", "data_batch_1 to 5, test_batch, batches.meta"),
    "cifar100": (torchvision.datasets.CIFAR100, "cifar-100-python", "train, test, meta"),
    "fashion-mnist": (torchvision.datasets.FashionMNIST, "FashionMNIST/raw", IDX_FILES),
    "mnist": (torchvision.datasets.MNIST, "MNIST/raw", IDX_FILES),
}
DATASETS = ("auto", "folder", "shapes", *TORCHVISION_SETS)


@dataclass(frozen=True)
class SetFacts:
    """What a loader tells of its set; mean and std, three numbers each, are the normalisation it applies, and
    interpolation, one of INTERPOLATIONS, is how it resizes."""
    dataset_name: str
    class_names: list
    img_size: int
    mean: tuple
    std: tuple
    interpolation: str = "bilinear"


# ---- The loaders ------------------------------------------------------------------------------------------


def get_data_loaders(data_dir=DEFAULT_DATA_DIR, batch_size=128, img_size=224, dataset="auto", val_fraction=0.1,
                     *, seed=0, workers=None, n_images=None, mean=None, std=None, interpolation=None,
                     skip_corrupt=False, augmentation=None):
    """(training loader, validation loader). The validation images are never the test images.

    data_dir      the folder of the data. A folder of images holds train/<class>/*.jpg, with val/ (or valid/,
                  validation/) and test/ beside train/ where there are such; or simply <class>/*.jpg.
    batch_size    images in a batch. A last training batch of one image, too few for BatchNorm, is left out.
    img_size      side S in pixels, or None for the set's own: 32 for CIFAR and shapes, 28 for the MNIST kinds; for a
                  folder the largest side of up to 64 images if at most 64, rounded up to a multiple of 4, else 224.
    dataset       a name in DATASETS; "auto": what lies in data_dir, and shapes where the default one does not exist.
    val_fraction  the share of each class cut from the training images for validation, if there is no val/.
    seed          of the validation cut, the order and the augmentation; a whole number from 0.
    workers       processes that read photographs; None: one a core, 8 at most, none for under 256 images.
    n_images      shapes only: training and validation images together; None: 20,000 at 32 pixels, 1,100 at 224.
    mean, std     the normalisation, three numbers each, of values from 0 to 1: those of a pretrained model, say. None:
                  the set's own, in NORMALISATION.
    interpolation "bilinear" or "bicubic": how images are resized; None: bilinear.
    skip_corrupt  whether an image file that cannot be read is left out, as loader.skipped tells (in memory from the
                  start, of photographs when it is met), or is an InputError.

    augmentation  of training images in memory; None: Augmentation(). Photographs have train_transform's.

    Both loaders have what Loader has, and to(device). Raises InputError for arguments and data that cannot work.
    """
    check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images)
    wanted = wanted_facts(mean, std, interpolation)
    name = choose_set(data_dir, dataset, n_images)
    if name == "shapes" and dataset == "auto":
        print(f"There is no {data_dir}: using the built-in drawn shapes. For other data give data_dir (a folder "
              f"with a folder of images for each class) or dataset ({', '.join(TORCHVISION_SETS)}).")
    if name != "folder":
        images, labels, facts = read_memory_set(name, data_dir, img_size, n_images, wanted, training=True)
        train, val = stratified_cut(labels, val_fraction, seed)
        return (MemoryLoader(images[train], labels[train], facts, batch_size, seed, True, augmentation=augmentation),
                MemoryLoader(images[val], labels[val], facts, batch_size, seed))
    facts, files, labels = read_training_folder(data_dir, img_size, wanted, skip_corrupt)
    val_dir, test_dir = first_folder(data_dir, VALIDATION_FOLDERS), first_folder(data_dir, ("test",))
    if test_dir:
        list_images(test_dir, facts.class_names)  # what is wrong with it is better known before the training
    if val_dir:
        train_set, val_set = (files, labels), list_images(val_dir, facts.class_names)
    else:
        cut = stratified_cut(labels, val_fraction, seed)
        train_set, val_set = (([files[i] for i in part], labels[part]) for part in cut)
    return (folder_loader(*train_set, facts, batch_size, seed, workers, skip_corrupt, True, augmentation),
            folder_loader(*val_set, facts, batch_size, seed, workers, skip_corrupt))


def get_test_loader(data_dir=DEFAULT_DATA_DIR, batch_size=128, img_size=224, dataset="auto", val_fraction=0.1,
                    *, seed=0, workers=None, n_images=None, mean=None, std=None, interpolation=None,
                    skip_corrupt=False):
    """The loader of the test images, or None for a folder without test/. The arguments are those of get_data_loaders;
    val_fraction and seed change nothing. Of shapes there are a fifth as many, none of them among the others."""
    check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images)
    wanted, class_names = wanted_facts(mean, std, interpolation), None
    if choose_set(data_dir, dataset, n_images) == "folder":
        facts, _, _ = read_training_folder(data_dir, img_size, wanted, skip_corrupt)
        if first_folder(data_dir, ("test",)) is None:
            return None
        class_names, img_size = facts.class_names, facts.img_size
    return get_evaluation_loader(data_dir, class_names, batch_size, img_size, dataset, seed=seed, workers=workers,
                                 n_images=n_images, skip_corrupt=skip_corrupt, **wanted)


def get_evaluation_loader(data_dir, class_names, batch_size=128, img_size=None, dataset="auto", *, held_out=False,
                          val_fraction=0.1, seed=0, workers=None, n_images=None, mean=None, std=None,
                          interpolation=None, skip_corrupt=False):
    """The loader of the images on which a trained model is scored; the labels count in the model's class_names.

    class_names   the model's, in the order of its outputs; of a known set they must be the set's own, as None is. A
                  folder may lack some of the classes.
    held_out      says that the model was trained by get_data_loaders on the other images of this folder, with the same
                  val_fraction and seed. It matters only where there are no images kept apart from training.

    The other arguments are those of get_data_loaders; img_size None is the side of the images that are scored. The
    loader's split tells which they are: "test" (a known set's test images, or those in test/), else "val" (in val/,
    valid/ or validation/), else of the images in train/ or in the class folders of data_dir those that
    get_data_loaders cut off for validation, "held out", or without held_out "all". Raises InputError for a class that
    the model does not know, and as get_data_loaders does."""
    check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images)
    wanted = wanted_facts(mean, std, interpolation)
    name, split = choose_set(data_dir, dataset, n_images), "test"
    if name != "folder":
        images, labels, facts = read_memory_set(name, data_dir, img_size, n_images, wanted, training=False)
        if class_names is not None and list(class_names) != facts.class_names:
            raise InputError(f"data set {name!r} has the classes {', '.join(facts.class_names)}, but the model knows "
                             f"{', '.join(class_names)}: score it on images of its own classes")
        loader = MemoryLoader(images, labels, facts, batch_size, seed)
    else:
        if not class_names:
            raise InputError(f"class_names {class_names} cannot label a folder: expected those of the model; give them")
        root = existing_folder(data_dir)
        parts = dict(test=first_folder(root, ("test",)), val=first_folder(root, VALIDATION_FOLDERS),
                     all=first_folder(root, ("train",)) or root)
        split = next(part for part, folder in parts.items() if folder)
        files, labels = list_images(parts[split], class_names)
        if split == "all" and held_out:
            split, (_, cut) = "held out", stratified_cut(labels, val_fraction, seed)
            files, labels = [files[i] for i in cut], labels[cut]
        facts = SetFacts(name, list(class_names), img_size or own_side(files, skip_corrupt), *NORMALISATION[name])
        loader = folder_loader(files, labels, replace(facts, **wanted), batch_size, seed, workers, skip_corrupt)
    loader.split = split
    return loader


class Loader:
    """What MemoryLoader and PhotoLoader share: the facts of the set, the order of the images and what part of them a
    pass gives. files: their paths, or None; skipped: {path: reason} of those left out; split: "test", for instance."""

    def __init__(self, labels, facts, batch_size, seed, training, files=None, skipped=None):
        self.facts, self.dataset_name, self.class_names = facts, facts.dataset_name, facts.class_names
        self.img_size, self.interpolation = facts.img_size, facts.interpolation
        self.mean, self.std = facts.mean, facts.std
        self.labels, self.n_images = labels, len(labels)
        self.files, self.skipped, self.split = files, dict(skipped or {}), None
        self.batch_size, self.seed, self.training = batch_size, seed, training
        self.epoch, self.n_passes = None, 0
        self.first_batch, self.rank, self.n_ranks = 0, 0, 1

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
        check_whole("epoch", epoch, 0)
        check_whole("batch", batch, 0)
        if batch > len(self):
            raise InputError(f"batch {batch} is out of range: expected 0 to {len(self)}, as a pass has {len(self)} "
                             f"batches; give the batch size and the images of the run that was interrupted")
        self.epoch, self.first_batch = epoch, batch

    def set_share(self, rank, n_ranks):
        """For one of several processes: gives of every batch only the images at its places rank, rank + n_ranks and so
        on. All shares together are the batches of one process. One may be empty: images (0, 3, S, S), labels (0,).
        Raises InputError for a rank that is not below n_ranks."""
        check_whole("n_ranks", n_ranks, 1)
        check_choice("rank", rank, range(n_ranks))
        self.rank, self.n_ranks = rank, n_ranks

    def use(self, augmentation):
        """Has images in memory varied in this way in the passes to come; photographs keep train_transform."""

    def some_places(self, n_images):
        """At most so many places of the set (n), drawn by the seed, in order; None: all."""
        if n_images is None or n_images >= self.n_images:
            return torch.arange(self.n_images, device=self.labels.device)
        drawn = torch.randperm(self.n_images, generator=generator_of(self.seed, 3))[:n_images]
        return drawn.sort().values.to(self.labels.device)

    def begin_pass(self):
        """(epoch, batches) of the pass that begins; a batch holds the places (B,) in the set of the images to give."""
        epoch = self.n_passes if self.epoch is None else self.epoch
        self.n_passes += 1
        first, self.first_batch = self.first_batch, 0
        shuffled = torch.randperm(self.n_images, generator=generator_of(self.seed, epoch, 0))
        order = shuffled if self.training else torch.arange(self.n_images)
        batches = order.to(self.labels.device).split(self.batch_size)[first : len(self)]
        return epoch, [batch[self.rank :: self.n_ranks] for batch in batches]

    def __len__(self):
        """Batches in a pass. A last training batch of one image is left out, unless all batches are of one."""
        n_batches, rest = -(-self.n_images // self.batch_size), self.n_images % self.batch_size
        return n_batches - 1 if self.training and rest == 1 and n_batches > 1 else n_batches


class MemoryLoader(Loader):
    """Batches of a set in memory: images, uint8 (N, 3, H, W), and labels, int64 (N,), resized to img_size. In training
    they are shuffled and varied as `augmentation` says, but never mirrored for mnist: a mirrored digit is no digit."""

    def __init__(self, images, labels, facts, batch_size, seed=0, training=False, files=None, skipped=None,
                 augmentation=None):
        super().__init__(labels, facts, batch_size, seed, training, files, skipped)
        self.images = images
        self.use(augmentation or Augmentation())
        self.normalisation = torch.tensor([self.mean, self.std]).view(2, 3, 1, 1) * 255

    def use(self, augmentation):
        """Has the passes to come varied in this way."""
        mirrors = self.dataset_name != "mnist"
        self.augmentation = augmentation if mirrors else replace(augmentation, flip="none")

    def to(self, device):
        """Moves the set to the device, where the batches are then made. Returns the loader."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.normalisation = self.normalisation.to(device)
        return self

    def plain(self, n_images=None):
        """A new loader of the same images, or of so many drawn from them, each once, in the order of the set and not
        augmented. It gives whole batches, whatever the share and the position of this one."""
        places = self.some_places(n_images)
        files = self.files and [self.files[place] for place in places.tolist()]
        images = self.images if len(places) == self.n_images else self.images[places]  # no copy of a whole set
        return MemoryLoader(images, self.labels[places], self.facts, self.batch_size, self.seed, files=files,
                            skipped=self.skipped).to(self.images.device)

    def __iter__(self):
        epoch, batches = self.begin_pass()
        N, _, H, W = self.images.shape
        draws = Draws(self.augmentation, N, H, W, self.seed, epoch, self.images.device) if self.training else None
        for places in batches:
            images = self.images[places]  # (B, 3, H, W)
            if draws is None:
                images = self.normalised(images)
            else:
                images = draws.hide(self.normalised(draws.move(images, places)), places)
            yield images, self.labels[places]

    def normalised(self, images):
        """uint8 (B, 3, H, W) to float32 (B, 3, S, S)."""
        images = images.float()
        if images.shape[-1] != self.img_size:
            images = F.interpolate(images, (self.img_size,) * 2, mode=self.interpolation, antialias=True)
            if self.interpolation == "bicubic":
                images.clamp_(0, 255)  # beside an edge it goes beyond what pixels can be
        mean, std = self.normalisation
        return images.sub_(mean).div_(std)  # (B, 3, S, S)


class PhotoLoader(Loader):
    """Batches of images read file by file: files, a list of paths, and labels, int64 (N,). The augmentation of a
    photograph is a function of (seed, epoch, its place in the set), whatever the workers. With skip_corrupt files that
    cannot be read are left out of their batch and told in skipped; n_images and the length still count them."""

    def __init__(self, files, labels, facts, batch_size, seed=0, training=False, workers=0, skip_corrupt=False):
        super().__init__(labels, facts, batch_size, seed, training, files)
        self.workers, self.skip_corrupt = workers, skip_corrupt
        self.keys, self.device = [], torch.device("cpu")  # keys: the batches of a pass, as lists of (epoch, place)
        self.loader = DataLoader(
            PhotoDataset(files, labels.tolist(), facts, seed, training), batch_sampler=self.keys, num_workers=workers,
            persistent_workers=workers > 0, collate_fn=partial(collate_photos, img_size=self.img_size),
            worker_init_fn=leave_signals_to_main, pin_memory=torch.cuda.is_available())

    def to(self, device):
        """Has batches moved to the device as they come. Returns the loader."""
        self.device = torch.device(device)
        return self

    def plain(self, n_images=None):
        """As MemoryLoader.plain; it reads the files anew."""
        places = self.some_places(n_images)
        return PhotoLoader([self.files[place] for place in places.tolist()], self.labels[places], self.facts,
                           self.batch_size, self.seed, workers=self.workers,
                           skip_corrupt=self.skip_corrupt).to(self.device)

    def __iter__(self):
        epoch, batches = self.begin_pass()
        self.keys[:] = [[(epoch, index) for index in batch.tolist()] for batch in batches]
        for images, labels, errors in self.loader:
            if errors and not self.skip_corrupt:
                raise errors[0].in_a_set()
            self.skipped.update((error.path, error.reason) for error in errors)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class PhotoDataset(Dataset):
    """Image files as (normalised image (3, S, S), label), by keys (epoch, place in the set). A file that cannot be read
    gives its InputError as a value: raised in a worker process it would come out wrapped in a traceback."""

    def __init__(self, files, labels, facts, seed, training):
        self.files, self.labels, self.seed = files, labels, seed
        make_transform = train_transform if training else eval_transform
        self.transform = make_transform(facts.img_size, facts.mean, facts.std, facts.interpolation)

    def __getitem__(self, key):
        epoch, index = key
        try:
            image = open_image(self.files[index])
        except InputError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            return self.transform(image), self.labels[index]


def collate_photos(samples, img_size):
    """Samples as (images (B, 3, S, S), labels (B,), the InputErrors among them, a list); B may be 0."""
    errors = [sample for sample in samples if isinstance(sample, InputError)]
    whole = [sample for sample in samples if not isinstance(sample, InputError)]
    labels = torch.tensor([label for _, label in whole], dtype=torch.int64)  # (B,)
    if not whole:
        return torch.empty(0, 3, img_size, img_size), labels, errors
    return torch.stack([image for image, _ in whole]), labels, errors  # (B, 3, S, S)


def leave_signals_to_main(worker):
    """For a worker process: after a Ctrl-C or a SIGTERM to all, the main process still needs it for its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux; elsewhere a SIGTERM ends it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=end_for_main, daemon=True).start()


def end_for_main():
    """Ends this process when the main one says so; a SIGTERM from anywhere else is for the main one to answer."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent_process().pid:
        pass
    os._exit(0)


# ---- One image --------------------------------------------------------------------------------------------


class UnreadableImage(InputError):
    """An image file that cannot be read, and why. All it holds is in args, so that it passes between processes."""

    def __init__(self, path, reason, advice="replace or remove it"):
        super().__init__(path, reason, advice)
        self.path, self.reason = path, reason

    def __str__(self):
        path, reason, advice = self.args
        return (f"image file {path!r} cannot be read ({reason}): expected a whole image in a format that Pillow knows; "
                f"{advice}")

    def in_a_set(self):
        """The same with the advice for one image of many."""
        return UnreadableImage(self.path, self.reason, "replace or remove it, or go on without it: --skip-corrupt (in "
                                                       "Python skip_corrupt=True)")


def open_image(path):
    """An image file as an upright PIL image in RGB, 8 bits a channel, what is transparent on white. Raises InputError,
    naming the file, where there is none or it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise InputError(f"there is no image file {str(path)!r}: give the path of one") from None
    except IsADirectoryError:
        raise InputError(f"{str(path)!r} is a folder: give the path of an image file in it") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UnreadableImage(str(path), " ".join(str(error).split()) or type(error).__name__) from None


def open_or_skip(path, skip_corrupt, skipped):
    """open_image for one of many files. With skip_corrupt one that cannot be read is None, and its reason goes into
    the dict skipped."""
    try:
        return open_image(path)
    except UnreadableImage as error:
        if not skip_corrupt:
            raise error.in_a_set() from None
        skipped[path] = error.reason


def to_rgb(image):
    """A PIL image of any mode as an RGB one: 16 bits of grey scaled to 8, what is transparent on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        grey = (np.asarray(image, dtype=np.float64).clip(0, 65535) / 257).round()
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # for which there is no direct way
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# ---- Reading a set ----------------------------------------------------------------------------------------


def choose_set(data_dir, dataset, n_images):
    """The set that `dataset` means in data_dir: a name in DATASETS other than "auto"."""
    check_choice("dataset", dataset, DATASETS)
    root, name = Path(data_dir).expanduser(), dataset
    if dataset == "auto":
        found = [known for known, (_, layout, _) in TORCHVISION_SETS.items() if (root / layout).is_dir()]
        nothing_given = Path(data_dir) == Path(DEFAULT_DATA_DIR) and not root.exists()
        name = found[0] if found else "shapes" if nothing_given else "folder"
    if n_images is not None and name != "shapes":
        raise InputError(f"n_images {n_images} is for the data set 'shapes', and this is {name!r}: leave it out")
    return name


def read_memory_set(name, data_dir, img_size, n_images, wanted, training):
    """Images uint8 (N, 3, H, W), labels int64 (N,) and the facts of shapes or one of torchvision's sets, the wanted
    ones in the place of its own."""
    if name == "shapes":
        S = img_size or 32
        n_images = n_images or max(500, min(20_000, round(200 * (32 / S) ** 1.5) * 100))  # large ones take longer
        drawn = make_shapes(n_images, S) if training else make_shapes(n_images // 5, S, start=TEST_START)
        return drawn.images, drawn.labels, replace(SetFacts(name, list(SHAPES), S, *NORMALISATION[name]), **wanted)
    images, labels, class_names = read_torchvision_set(name, data_dir, training)
    facts = SetFacts(name, class_names, img_size or images.shape[-1], *NORMALISATION[name])
    return images, labels, replace(facts, **wanted)


def read_torchvision_set(name, data_dir, training):
    """(images uint8 (N, 3, H, W), labels int64 (N,), class names), downloaded to data_dir where needed."""
    maker, layout, files = TORCHVISION_SETS[name]
    root = Path(data_dir).expanduser()
    absent = [folder for folder in (root / layout, (root / layout).parent, root) if not folder.exists()]
    try:
        data = maker(root, train=training, download=True)
    except Exception as error:  # no network, a broken file, no right to write
        for folder in (folder for folder in absent if folder.is_dir() and not any(folder.iterdir())):
            folder.rmdir()
        raise InputError(f"data set {name!r} is neither in {str(root)!r} nor can it be downloaded "
                         f"({' '.join(str(error).split())[:200]}): put its files ({files}) into "
                         f"{str(root / layout)!r}, or choose dataset 'shapes', which needs none") from None
    images = torch.as_tensor(data.data)  # (N, H, W) in grey or (N, H, W, 3)
    images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous(), torch.as_tensor(data.targets), list(data.classes)  # (N, 3, H, W), (N,)


def read_training_folder(data_dir, img_size, wanted, skip_corrupt):
    """(facts, files, labels (N,)) of the images in train/, or in data_dir itself where there is no train/; the wanted
    facts in the place of the set's own."""
    root = existing_folder(data_dir)
    train_dir, other = first_folder(root, ("train",)) or root, first_folder(root, (*VALIDATION_FOLDERS, "test"))
    if other and train_dir == root:
        raise InputError(f"{str(root)!r} has {other.name}/ but no train/: put the training images into train/")
    class_names = folders_in(train_dir)
    if len(class_names) < 2:
        raise InputError(f"{str(train_dir)!r} has {len(class_names)} class folders {class_names}, expected 2 or more: "
                         f"put the images of each class into a folder of its own")
    files, labels = list_images(train_dir, class_names)
    empty = [name for label, name in enumerate(class_names) if not (labels == label).any()]
    if empty:
        raise InputError(f"class folder {str(train_dir / empty[0])!r} has no images ({', '.join(IMG_EXTENSIONS)}): "
                         f"add some or remove it")
    facts = SetFacts("folder", class_names, img_size or own_side(files, skip_corrupt), *NORMALISATION["folder"])
    return replace(facts, **wanted), files, labels


def existing_folder(data_dir):
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise InputError(f"there is no data folder {str(data_dir)!r}: give one with a folder of images for each class")
    return root


def first_folder(root, names):
    """The first of the named folders that exists in root, or None."""
    folders = [Path(root).expanduser() / name for name in names]
    return next((folder for folder in folders if folder.is_dir()), None)


def folders_in(folder):
    return sorted(entry.name for entry in Path(folder).iterdir() if entry.is_dir() and entry.name[0] != ".")


def list_images(folder, class_names):
    """(files, labels (N,)) of the images in folder/<class>/, at any depth; hidden files and folders are ignored. Raises
    InputError for a folder that is none of the classes, and where there is no image at all."""
    extra = sorted(set(folders_in(folder)) - set(class_names))
    if extra:
        raise InputError(f"{str(folder)!r} has a class folder {extra[0]!r}, and the classes known are "
                         f"{', '.join(class_names)}: rename or remove it")
    files, labels = [], []
    for label, class_name in enumerate(class_names):
        for parent, subfolders, names in os.walk(Path(folder) / class_name, followlinks=True):
            subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
            images = sorted(name for name in names if name[0] != "." and name.lower().endswith(IMG_EXTENSIONS))
            files += [os.path.join(parent, name) for name in images]
            labels += [label] * len(images)
    if not files:
        raise InputError(f"{str(folder)!r} has no images ({', '.join(IMG_EXTENSIONS)}) in folders of the classes "
                         f"{', '.join(class_names)}: add some or remove it")
    return files, torch.tensor(labels)


def own_side(files, skip_corrupt):
    """The img_size of a folder: the largest side among 64 of its images if that is small, else 224."""
    largest, skipped = 0, {}
    for file in files[:: -(-len(files) // 64)]:
        try:
            with Image.open(file) as image:
                largest = max(largest, *image.size)
        except Exception:
            open_or_skip(file, skip_corrupt, skipped)
    check_any_read(largest, skipped)
    return -(-largest // 4) * 4 if largest <= SMALL_SIDE else 224


def folder_loader(files, labels, facts, batch_size, seed, workers, skip_corrupt, training=False, augmentation=None):
    """A MemoryLoader where the images are small and fit in memory, else a PhotoLoader."""
    if facts.img_size <= SMALL_SIDE and len(files) * 3 * facts.img_size**2 <= MEMORY_LIMIT:
        images, skipped = decode_images(files, facts.img_size, facts.interpolation, skip_corrupt)
        kept = [i for i, file in enumerate(files) if file not in skipped]
        return MemoryLoader(images, labels[kept], facts, batch_size, seed, training, [files[i] for i in kept], skipped,
                            augmentation)
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if len(files) >= 256 else 0
    return PhotoLoader(files, labels, facts, batch_size, seed, training, workers, skip_corrupt)


def decode_images(files, S, interpolation, skip_corrupt):
    """The image files as one uint8 tensor (n, 3, S, S), read by several threads, and {path: reason} of those left out
    because they cannot be read. Raises InputError for the first of them without skip_corrupt, or if none is left."""
    images, n_read, all_skipped = torch.empty(len(files), 3, S, S, dtype=torch.uint8), 0, {}
    parts = [files[start : start + 256] for start in range(0, len(files), 256)]
    quiet = True if len(files) < 2000 else None  # None: a bar where there is a terminal
    with ThreadPoolExecutor() as pool, tqdm(total=len(files), unit="image", disable=quiet) as bar:
        read = partial(decode_part, fit=FitSquare(S, interpolation), skip_corrupt=skip_corrupt)
        for decoded, skipped in pool.map(read, parts):
            images[n_read : n_read + len(decoded)] = decoded
            n_read += len(decoded)
            all_skipped |= skipped
            bar.update(len(decoded) + len(skipped))
    check_any_read(n_read, all_skipped)
    return images[:n_read], all_skipped  # (n, 3, S, S)


def decode_part(files, fit, skip_corrupt):
    """What decode_images gives, of some of the files."""
    pictures, skipped = [], {}
    for file in files:
        picture = open_or_skip(file, skip_corrupt, skipped)
        if picture is not None:
            pictures.append(np.asarray(fit(picture)))
    images = np.array(pictures, dtype=np.uint8).reshape(-1, fit.img_size, fit.img_size, 3)  # (n, S, S, 3)
    return torch.from_numpy(images).permute(0, 3, 1, 2), skipped  # (n, 3, S, S)


def check_any_read(read, skipped):
    if not read:
        path, reason = next(iter(skipped.items()))
        raise InputError(f"none of {len(skipped)} image files can be read (the first: {path!r}, {reason}): expected "
                         f"whole images in a format that Pillow knows; replace them")


def stratified_cut(labels, val_fraction, seed):
    """Cuts the places of labels (N,) class by class in two, (training, validation), each in ascending order. Of each
    class the share val_fraction is drawn for validation by (seed, class): at least one image, and not all. The image of
    a class with only one goes to training. Raises InputError if all classes are of that kind."""
    to_validation = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]  # (images of the class,)
        n_val = min(max(int(len(members) * val_fraction + 0.5), 1), len(members) - 1)
        drawn = torch.randperm(len(members), generator=generator_of(seed, label))[:n_val]  # (n_val,)
        to_validation[members[drawn]] = True
    if not to_validation.any():
        raise InputError("no class has 2 images, so none can be kept for validation: add images, or a folder val/")
    return (~to_validation).nonzero()[:, 0], to_validation.nonzero()[:, 0]


def check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images):
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("img_size", img_size, 8),
                               ("workers", workers, 0), ("n_images", n_images, 20)):
        if value is not None or name in ("batch_size", "seed"):
            check_whole(name, value, least)
    if isinstance(val_fraction, bool) or not isinstance(val_fraction, int | float) or not 0 < val_fraction < 1:
        raise InputError(f"val_fraction {val_fraction!r} is out of range: expected a share between 0 and 1, as 0.1")


def wanted_facts(mean, std, interpolation):
    """The fields of SetFacts that the caller wants otherwise than the set has them, after a look at each."""
    if (mean is None) != (std is None):
        name, absent, value = ("mean", "std", mean) if std is None else ("std", "mean", std)
        raise InputError(f"{name} {in_one_line(value)} has no {absent} beside it: expected both or neither; give "
                         f"{absent} too, as a model or a loader carries it")
    wanted = {}
    if mean is not None:
        wanted = dict(mean=three_numbers("mean", mean), std=three_numbers("std", std))
    if interpolation is not None:
        check_choice("interpolation", interpolation, INTERPOLATIONS)
        wanted["interpolation"] = interpolation
    return wanted


def three_numbers(name, values):
    """A mean or a std as a tuple of three floats."""
    return channel_numbers(name, values, 3, "give the model's own, or leave out mean and std")


def channel_numbers(name, values, n_channels, advice):
    """A mean or a std, in any kind of sequence, as a tuple of floats, one a channel. Raises InputError, with the
    advice, for another number of them, and for what is not finite or no std."""
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64)
        sound = numbers.isfinite() & (numbers > 0) if name == "std" else numbers.isfinite()
        fits = numbers.shape == (n_channels,) and bool(sound.all())
    except (TypeError, ValueError, RuntimeError, OverflowError):
        fits = False
    if not fits:
        count = "three finite numbers" if n_channels == 3 else f"finite numbers, {n_channels} of them"
        raise InputError(f"{name} {in_one_line(values)} is out of range: expected {count}"
                         f"{' above 0' if name == 'std' else ''}, one a channel; {advice}")
    return tuple(numbers.tolist())


def in_one_line(value):
    return " ".join(repr(value).split())[:200]
