"""Data: from a folder of images, a known data set or drawn shapes to batches that a model can train on.

    get_data_loaders   (train loader, validation loader); get_test_loader   the test images, kept apart
    open_image         one image file as an upright RGB picture; eval_transform   that picture as a tensor
    make_shapes        the built-in set: ten drawn shapes whose texture and colour tell nothing of the shape

Letters:  B images in a batch, C channels (always 3), H, W height and width, S side of a square image,
          N images in a set.

Sets of small images (CIFAR, MNIST, shapes, folders at 64 px or less) are kept in memory as one uint8 tensor
and augmented a batch at a time: MemoryLoader. Folders of photographs are read file by file by worker
processes: PhotoLoader. Both give normalised float32 images (B, 3, S, S) and int64 labels (B,).

Everything random is a function of a seed: the validation cut of `seed`, the order and the augmentation of
(seed, epoch). The drawn images alone do not depend on it.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from vit_model import InputError

DEFAULT_DATA_DIR = "./data"
SMALL_SIDE = 64  # pixels: images up to this side are seen whole, and kept in memory
MEMORY_LIMIT = 2 * 1024**3  # bytes: a folder that decodes to more is read file by file
VALIDATION_FOLDERS = ("val", "valid", "validation")

# Mean and standard deviation of each channel (red, green, blue), of values in 0..1.
NORMALISATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307, 0.1307, 0.1307), (0.3081, 0.3081, 0.3081)),
    "fashion-mnist": ((0.2860, 0.2860, 0.2860), (0.3530, 0.3530, 0.3530)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}

# Where torchvision's sets lie in data_dir, and their side in pixels.
TORCHVISION_SETS = {
    "cifar10": (torchvision.datasets.CIFAR10, "cifar-10-batches-py", 32),
    "cifar100": (torchvision.datasets.CIFAR100, "cifar-100-python", 32),
    "fashion-mnist": (torchvision.datasets.FashionMNIST, "FashionMNIST/raw", 28),
    "mnist": (torchvision.datasets.MNIST, "MNIST/raw", 28),
}
DATASETS = ("auto", "folder", "shapes", *TORCHVISION_SETS)


@dataclass(frozen=True)
class SetFacts:
    """What a loader tells about its set. mean and std, three floats each, are the normalisation it applies."""

    dataset_name: str
    class_names: list
    img_size: int
    mean: tuple
    std: tuple


# ---------------------------------------------------------------------------------------------------------
# The loaders
# ---------------------------------------------------------------------------------------------------------


def get_data_loaders(
    data_dir=DEFAULT_DATA_DIR,
    batch_size=128,
    img_size=224,
    dataset="auto",
    val_fraction=0.1,
    *,
    seed=0,
    workers=None,
    n_images=None,
):
    """(train loader, validation loader). The validation images are never the test images.

    data_dir      folder of the data. As a folder of images it holds train/<class>/*.jpg with val/ (or valid/,
                  validation/) and test/ beside train/ where there are such, or simply <class>/*.jpg.
    batch_size    images in a batch. A last training batch of one image is left out (BatchNorm cannot train on
                  one image); every other batch is kept.
    img_size      side S in pixels, or None for the set's own: 32 for CIFAR and shapes, 28 for the MNIST kinds;
                  for a folder the largest side among 64 of its images if that is 64 or less, else 224.
    dataset       "auto" takes what lies in data_dir: a set in torchvision's layout, else class folders; and
                  shapes, saying so, where data_dir is the default and does not exist. Or one of DATASETS.
    val_fraction  the share of each class cut from the training images for validation, where there is no val/.
    seed          of the validation cut, the order and the augmentation; a whole number from 0.
    workers       processes that read photographs; None: one a core, 8 at most, none for under 256 images.
    n_images      shapes only: training and validation images together; None: 20,000 at 32 px, fewer at larger.

    Both loaders have class_names, img_size, mean, std, n_images, dataset_name, len() in batches, set_epoch(epoch)
    and to(device). Raises InputError for arguments and data that cannot work.
    """
    check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images)
    name = choose_set(data_dir, dataset, n_images)
    if dataset == "auto" and name == "shapes":
        print(
            f"No folder {data_dir}: using the built-in drawn shapes. Give data_dir (one folder of images a class) "
            f"or dataset ({', '.join(TORCHVISION_SETS)}) for other data."
        )
    if name == "folder":
        facts, train_files, train_labels = read_training_folder(data_dir, img_size)
        val_dir = first_folder(data_dir, VALIDATION_FOLDERS)
        if val_dir:
            val_files, val_labels = list_images(val_dir, facts.class_names)
        else:
            train, val = stratified_cut(torch.tensor(train_labels), val_fraction, seed)
            val_files, val_labels = [train_files[i] for i in val], [train_labels[i] for i in val]
            train_files, train_labels = [train_files[i] for i in train], [train_labels[i] for i in train]
        return (
            folder_loader(train_files, train_labels, facts, batch_size, seed, True, workers),
            folder_loader(val_files, val_labels, facts, batch_size, seed, False, workers),
        )
    images, labels, facts = read_memory_set(name, data_dir, img_size, n_images, training=True)
    train, val = stratified_cut(labels, val_fraction, seed)
    return (
        MemoryLoader(images[train], labels[train], facts, batch_size, seed, training=True),
        MemoryLoader(images[val], labels[val], facts, batch_size, seed, training=False),
    )


def get_test_loader(
    data_dir=DEFAULT_DATA_DIR,
    batch_size=128,
    img_size=224,
    dataset="auto",
    val_fraction=0.1,
    *,
    seed=0,
    workers=None,
    n_images=None,
):
    """The loader of the test images, or None where the set has none (a folder without test/).

    Takes the arguments of get_data_loaders, so that one set of them serves both; val_fraction and seed change
    nothing here. Shapes: a fifth as many test images as training and validation images, none of them shared.
    """
    check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images)
    name = choose_set(data_dir, dataset, n_images)
    if name == "folder":
        test_dir = first_folder(data_dir, ("test",))
        if test_dir is None:
            return None
        facts, _, _ = read_training_folder(data_dir, img_size)
        test_files, test_labels = list_images(test_dir, facts.class_names)
        return folder_loader(test_files, test_labels, facts, batch_size, seed, False, workers)
    images, labels, facts = read_memory_set(name, data_dir, img_size, n_images, training=False)
    return MemoryLoader(images, labels, facts, batch_size, seed, training=False)


class Loader:
    """What MemoryLoader and PhotoLoader share: the facts of the set, the epochs and the order of the images."""

    def __init__(self, labels, facts, batch_size, seed, training):
        self.dataset_name, self.class_names, self.img_size = facts.dataset_name, facts.class_names, facts.img_size
        self.mean, self.std = facts.mean, facts.std
        self.labels, self.n_images = labels, len(labels)
        self.batch_size, self.seed, self.training = batch_size, seed, training
        self.epoch, self.passes = None, 0

    def set_epoch(self, epoch):
        """Fixes the epoch, and so the order and augmentation, of the passes to come.

        Without it the first pass is epoch 0, the second epoch 1 and so on.
        """
        self.epoch = epoch

    def begin_pass(self):
        """The epoch of the pass that begins."""
        epoch = self.passes if self.epoch is None else self.epoch
        self.passes += 1
        return epoch

    def batches(self, epoch):
        """A list of index tensors (B,): shuffled by (seed, epoch) in training, else in the set's order."""
        order = torch.arange(self.n_images)
        if self.training:
            order = torch.randperm(self.n_images, generator=generator_of(self.seed, epoch, 0))
        return list(order.split(self.batch_size))[: len(self)]

    def __len__(self):
        """Batches in a pass. A last training batch of one image is left out, unless every batch is one image."""
        n_batches = -(-self.n_images // self.batch_size)
        single = self.training and n_batches > 1 and self.batch_size > 1 and self.n_images % self.batch_size == 1
        return n_batches - single


class MemoryLoader(Loader):
    """Batches of a set held in memory as images, uint8 (N, 3, H, W), and labels, int64 (N,).

    Training: shuffled, randomly shifted by up to an eighth of the side (the border mirrored), and mirrored left
    to right with probability 1/2 (not for mnist: a mirrored digit is no digit). Images of another side than
    img_size are resized a batch at a time.
    """

    def __init__(self, images, labels, facts, batch_size, seed=0, training=False):
        super().__init__(labels, facts, batch_size, seed, training)
        self.images = images
        self.flips = facts.dataset_name != "mnist"

    def to(self, device):
        """Moves the images and labels to the device, where batches are then made. Returns the loader."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def __iter__(self):
        epoch, device = self.begin_pass(), self.images.device
        top, left, flip = self.draw_augmentation(epoch)
        for index in self.batches(epoch):
            images = self.images[index.to(device)]  # (B, 3, H, W)
            if self.training:
                images = crop_and_flip(images, top[index].to(device), left[index].to(device), flip[index].to(device))
            yield self.finish(images), self.labels[index.to(device)]

    def draw_augmentation(self, epoch):
        """For each image the shift down and right in pixels, and whether it is mirrored: three tensors (N,)."""
        generator, pad = generator_of(self.seed, epoch, 1), self.images.shape[-1] // 8
        top = torch.randint(-pad, pad + 1, (self.n_images,), generator=generator)
        left = torch.randint(-pad, pad + 1, (self.n_images,), generator=generator)
        flip = torch.rand(self.n_images, generator=generator) < (0.5 if self.flips else 0.0)
        return top, left, flip

    def finish(self, images):
        """uint8 (B, 3, H, W) to normalised float32 (B, 3, S, S)."""
        images = images.float()
        if images.shape[-1] != self.img_size:
            size = (self.img_size, self.img_size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)  # (B, 3, S, S)
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1) * 255
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1) * 255
        return images.sub_(mean).div_(std)


def crop_and_flip(images, top, left, flip):
    """Each image of (B, 3, H, W) seen through a window moved `top` rows down and `left` columns right, (B,) each.

    Pixels beyond the border are mirrored in it, as by padding with mode "reflect". Then the images for which
    flip (B,) is true are mirrored left to right. The same shape comes back.
    """
    B, C, H, W = images.shape
    rows = mirrored(torch.arange(H, device=images.device) + top[:, None], H)  # (B, H)
    columns = mirrored(torch.arange(W, device=images.device) + left[:, None], W)  # (B, W)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    pixels = (rows[:, :, None] * W + columns[:, None, :]).view(B, 1, H * W)  # (B, 1, H * W)
    pixels = pixels.expand(B, C, H * W)
    return images.reshape(B, C, H * W).gather(2, pixels).view(B, C, H, W)


def mirrored(positions, length):
    """Positions from -length + 1 to 2 * length - 2, those outside 0..length - 1 mirrored at the ends."""
    positions = positions.abs()
    return torch.minimum(positions, 2 * (length - 1) - positions)


class PhotoLoader(Loader):
    """Batches of a set read file by file: files, a list of paths, and labels, int64 (N,).

    The augmentation of a photograph is a function of (seed, epoch, index), whatever the number of workers.
    """

    def __init__(self, files, labels, facts, batch_size, seed=0, training=False, workers=0):
        super().__init__(labels, facts, batch_size, seed, training)
        self.keys = EpochKeys([], 0)
        self.device = torch.device("cpu")
        self.loader = DataLoader(
            PhotoDataset(files, labels.tolist(), facts, seed, training),
            batch_sampler=self.keys,
            num_workers=workers,
            collate_fn=collate_photos,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def to(self, device):
        """Batches will be moved to the device as they come. Returns the loader."""
        self.device = torch.device(device)
        return self

    def __iter__(self):
        epoch = self.begin_pass()
        self.keys.batches, self.keys.epoch = self.batches(epoch), epoch
        for batch in self.loader:
            if isinstance(batch, InputError):
                raise batch
            images, labels = batch
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class EpochKeys:
    """The batch sampler of a PhotoLoader: lists of (epoch, index), so that workers know the epoch."""

    def __init__(self, batches, epoch):
        self.batches, self.epoch = batches, epoch

    def __iter__(self):
        for batch in self.batches:
            yield [(self.epoch, index) for index in batch.tolist()]

    def __len__(self):
        return len(self.batches)


class PhotoDataset(Dataset):
    """Image files as (normalised image (3, S, S), label), by (epoch, index).

    A file that cannot be read gives its InputError as a value: raised in a worker process it would arrive
    wrapped in a traceback.
    """

    def __init__(self, files, labels, facts, seed, training):
        self.files, self.labels, self.seed = files, labels, seed
        make = train_transform if training else eval_transform
        self.transform = make(facts.img_size, facts.mean, facts.std)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
        epoch, index = key
        try:
            image = open_image(self.files[index])
        except InputError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            return self.transform(image), self.labels[index]


def collate_photos(samples):
    """A list of samples as (images (B, 3, S, S), labels (B,)), or the first InputError among them."""
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)  # (B, 3, S, S), (B,)


# ---------------------------------------------------------------------------------------------------------
# One image
# ---------------------------------------------------------------------------------------------------------


def open_image(path):
    """The image file as an upright PIL image in RGB, 8 bits a channel, transparent parts on white.

    Raises InputError, naming the file, where there is none or it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise InputError(f"there is no image file {str(path)!r}: check the path") from None
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, ValueError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"image file {str(path)!r} cannot be read ({reason}): replace it by a sound image or remove it"
        ) from None


def to_rgb(image):
    """A loaded PIL image of any mode as an RGB one."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, 0..65535
        grey = np.asarray(image, dtype=np.float64).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def train_transform(img_size, mean, std):
    """The training augmentation of photographs: PIL image -> normalised float32 tensor (3, S, S)."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(img_size),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4),
            v2.AutoAugment(),
            *tensor_steps(mean, std),
        ]
    )


def eval_transform(img_size, mean, std):
    """What a model is shown outside training: PIL RGB image -> normalised float32 tensor (3, S, S).

    It gives what the validation and test loaders give for the same image.
    """
    return v2.Compose([FitSquare(img_size), *tensor_steps(mean, std)])


def tensor_steps(mean, std):
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


class FitSquare:
    """PIL image -> PIL image of S x S: the shorter side resized, then the centre cut out.

    Of a photograph the outer eighth is cut away (224 of 256), as is usual for ImageNet. Small images, and any
    image at a small img_size, are seen whole, and an image of S x S stays as it is.
    """

    def __init__(self, img_size):
        self.img_size = img_size

    def __call__(self, image):
        if image.size == (self.img_size, self.img_size):
            return image
        seen_whole = min(self.img_size, *image.size) <= SMALL_SIDE
        side = self.img_size if seen_whole else round(self.img_size * 256 / 224)
        image = v2.functional.resize(image, [side])
        return v2.functional.center_crop(image, [self.img_size])


# ---------------------------------------------------------------------------------------------------------
# Reading a set
# ---------------------------------------------------------------------------------------------------------


def choose_set(data_dir, dataset, n_images):
    """The name of the set that `dataset` means in data_dir: one of DATASETS other than "auto"."""
    if dataset not in DATASETS:
        raise InputError(f"dataset {dataset!r} is not known: use one of {', '.join(DATASETS)}")
    name = find_set(data_dir) if dataset == "auto" else dataset
    if n_images is not None and name != "shapes":
        raise InputError(f"n_images={n_images} is for dataset 'shapes', but the set is {name!r}: leave it out")
    return name


def find_set(data_dir):
    root = Path(data_dir).expanduser()
    for name, (_, layout, _) in TORCHVISION_SETS.items():
        if (root / layout).is_dir():
            return name
    return "shapes" if Path(data_dir) == Path(DEFAULT_DATA_DIR) and not root.exists() else "folder"


def read_memory_set(name, data_dir, img_size, n_images, training):
    """Images uint8 (N, 3, H, W), labels int64 (N,) and the facts of shapes or one of torchvision's sets."""
    if name == "shapes":
        side = img_size or 32
        n_training = n_images or default_n_shapes(side)
        drawn = make_shapes(n_training, side) if training else make_shapes(n_training // 5, side, start=TEST_START)
        return drawn.images, drawn.labels, SetFacts(name, list(SHAPES), side, *NORMALISATION[name])
    images, labels, class_names = read_torchvision_set(name, data_dir, training)
    return images, labels, SetFacts(name, class_names, img_size or images.shape[-1], *NORMALISATION[name])


def default_n_shapes(side):
    """20,000 images up to 32 px; at larger sides fewer, 1,100 at 224, for they take longer to draw and train."""
    return int(max(500, min(20_000, round(200 * (32 / side) ** 1.5) * 100)))


def read_torchvision_set(name, data_dir, training):
    """(images uint8 (N, 3, H, W), labels int64 (N,), class names); downloaded to data_dir if it is not there."""
    maker, layout, _ = TORCHVISION_SETS[name]
    root = Path(data_dir).expanduser()
    made_by_download = [folder for folder in (root / layout, (root / layout).parent, root) if not folder.exists()]
    try:
        data = maker(root, train=training, download=True)
    except Exception as error:  # no network, a broken archive, no right to write
        for folder in made_by_download:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        reason = " ".join(str(error).split())[:200]
        files = ", ".join(expected_files(maker))
        raise InputError(
            f"data set {name!r} cannot be read from {str(root)!r} nor downloaded ({reason}): put the files {files} "
            f"into {str(root / layout)!r}, or use dataset='shapes', which needs no files"
        ) from None
    images = torch.as_tensor(data.data)  # (N, H, W) grey or (N, H, W, 3)
    images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous(), torch.as_tensor(data.targets), list(data.classes)  # (N, 3, H, W), (N,)


def expected_files(maker):
    """The names of the files that make up one of torchvision's sets."""
    if hasattr(maker, "resources"):
        return [name.removesuffix(".gz") for name, _ in maker.resources]
    return [name for name, _ in maker.train_list + maker.test_list] + [maker.meta["filename"]]


def read_training_folder(data_dir, img_size):
    """(facts, files, labels) of the training images: train/, or data_dir itself where there is no train/."""
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise InputError(f"there is no data folder {str(data_dir)!r}: give a folder with one folder of images a class")
    train_dir = first_folder(root, ("train",))
    if train_dir is None:
        other = first_folder(root, (*VALIDATION_FOLDERS, "test"))
        if other:
            raise InputError(f"{str(data_dir)!r} has {other.name}/ but no train/: put the training images in train/")
        train_dir = root
    class_names = folders_in(train_dir)
    if len(class_names) < 2:
        raise InputError(
            f"{str(train_dir)!r} has {len(class_names)} class folders ({', '.join(class_names) or 'none'}), at least "
            f"2 were expected: put the images of each class into a folder of its own in {str(train_dir)!r}"
        )
    files, labels = list_images(train_dir, class_names)
    for label in set(range(len(class_names))) - set(labels):
        raise InputError(
            f"class folder {str(train_dir / class_names[label])!r} has no images ({', '.join(IMG_EXTENSIONS)}): "
            f"add images or remove it"
        )
    side = img_size or own_side(files)
    return SetFacts("folder", class_names, side, *NORMALISATION["folder"]), files, labels


def first_folder(root, names):
    """The first of the named folders that exists in root, or None."""
    folders = [Path(root).expanduser() / name for name in names]
    return next((folder for folder in folders if folder.is_dir()), None)


def folders_in(folder):
    return sorted(entry.name for entry in Path(folder).iterdir() if entry.is_dir() and entry.name[0] != ".")


def list_images(folder, class_names):
    """(files, labels) of the images in folder/<class>/ at any depth. Hidden files and folders are ignored.

    Raises InputError for a folder that is not one of the classes, and where there are no images at all.
    """
    for extra in set(folders_in(folder)) - set(class_names):
        raise InputError(
            f"{str(folder)!r} has a class folder {extra!r} that the training images lack: rename or remove it "
            f"(the classes: {', '.join(class_names)})"
        )
    files, labels = [], []
    for label, class_name in enumerate(class_names):
        for parent, subfolders, names in os.walk(Path(folder) / class_name, followlinks=True):
            subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
            found = [name for name in sorted(names) if name[0] != "." and name.lower().endswith(IMG_EXTENSIONS)]
            files += [os.path.join(parent, name) for name in found]
            labels += [label] * len(found)
    if not files:
        raise InputError(f"{str(folder)!r} has no images ({', '.join(IMG_EXTENSIONS)}) in its class folders: add some")
    return files, labels


def own_side(files):
    """The img_size of a folder: the largest side among 64 of its images if that is small, else 224."""
    largest = 0
    for file in files[:: -(-len(files) // 64)]:
        try:
            with Image.open(file) as image:
                largest = max(largest, *image.size)
        except Exception:
            open_image(file)  # raises the InputError that names the file
    return largest if largest <= SMALL_SIDE else 224


def folder_loader(files, labels, facts, batch_size, seed, training, workers):
    """A MemoryLoader where the decoded images are small and fit in memory, else a PhotoLoader."""
    n_bytes = len(files) * 3 * facts.img_size**2
    if facts.img_size <= SMALL_SIDE and n_bytes <= MEMORY_LIMIT:
        images = decode_images(files, facts.img_size)
        return MemoryLoader(images, torch.tensor(labels), facts, batch_size, seed, training)
    if workers is None:
        workers = min(8, available_cores()) if len(files) >= 256 else 0
    return PhotoLoader(files, torch.tensor(labels), facts, batch_size, seed, training, workers)


def available_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_images(files, img_size):
    """The image files as one uint8 tensor (N, 3, S, S), decoded by one thread a core."""
    images = torch.empty(len(files), 3, img_size, img_size, dtype=torch.uint8)
    fit = FitSquare(img_size)
    starts = range(0, len(files), 256)
    bar = tqdm(total=len(files), desc="reading images", unit="image", disable=True if len(files) < 2000 else None)
    with ThreadPoolExecutor(available_cores()) as pool, bar:
        parts = [files[start : start + 256] for start in starts]
        for start, decoded in zip(starts, pool.map(decode_part, parts, [fit] * len(parts)), strict=True):
            images[start : start + len(decoded)] = decoded
            bar.update(len(decoded))
    return images


def decode_part(files, fit):
    return torch.stack([pil_to_tensor(fit(open_image(file))) for file in files])  # (n, 3, S, S)


def stratified_cut(labels, val_fraction, seed):
    """Two index tensors, (training, validation), in ascending order, that share out labels (N,) class by class.

    Of every class the share val_fraction is drawn for validation by (seed, class), at least one image and not
    all of them; the single image of a class of one goes to training.
    """
    in_validation = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]  # (images of the class,)
        n_validation = int(len(members) * val_fraction + 0.5)
        n_validation = min(max(n_validation, 1), len(members) - 1)
        drawn = torch.randperm(len(members), generator=generator_of(seed, label))[:n_validation]
        in_validation[members[drawn]] = True
    return (~in_validation).nonzero()[:, 0], in_validation.nonzero()[:, 0]


# ---------------------------------------------------------------------------------------------------------
# Drawn shapes
# ---------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "ring", "triangle", "square", "star", "cross", "heart", "crescent", "tee", "dumbbell")
TEXTURES = ("plain", "stripes", "checks", "dots", "rings")
BACKGROUNDS = ("plain", "gradient", "stripes", "checks", "dots")
COLOURS = {  # red, green, blue in 0..1
    "red": (1.0, 0.1, 0.1),
    "orange": (1.0, 0.6, 0.0),
    "yellow": (0.9, 0.9, 0.0),
    "green": (0.1, 0.8, 0.1),
    "cyan": (0.0, 0.8, 0.9),
    "blue": (0.1, 0.2, 1.0),
    "purple": (0.6, 0.0, 0.9),
    "pink": (1.0, 0.2, 0.7),
}
TEST_START = 1_000_000_000  # the loaders' test images are numbered from here, their training images from 0
N_BLOBS = 4  # small discs strewn over the background


@dataclass(frozen=True)
class DrawnShapes:
    """images uint8 (N, 3, S, S); labels, textures, colours int64 (N,): places in SHAPES, TEXTURES and COLOURS."""

    images: torch.Tensor
    labels: torch.Tensor
    textures: torch.Tensor
    colours: torch.Tensor


def make_shapes(n_images, img_size=32, seed=0, start=0, *, shape=None, texture=None, colour=None):
    """Drawn shapes number start .. start + n_images - 1 of the endless set that `seed` names.

    Each image has one shape of SHAPES at a random place, size and rotation, filled with a texture of TEXTURES in
    two tones of a colour of COLOURS, on a patterned background with blobs, under noise. The shape of image i is
    i modulo ten; texture and colour are drawn without regard to it. shape, texture and colour each override
    that by a name, a number or N numbers (sequence or tensor); all else in the image stays as it was.

    Image i depends on (seed, i, img_size) alone, not on n_images or start. The pixels are computed with the
    operations that IEEE 754 rounds in one way only, so that they come out the same on any machine.

    Returns DrawnShapes. Raises InputError for names and numbers that cannot be.
    """
    check_whole("n_images", n_images, 0)
    check_whole("img_size", img_size, 8)
    check_whole("seed", seed, 0)
    check_whole("start", start, 0)
    index = np.arange(start, start + n_images, dtype=np.uint64)
    chance = uniform_numbers(seed, index, np.arange(64))  # (N, 64)
    labels = choose_factor("shape", shape, SHAPES, torch.arange(start, start + n_images) % len(SHAPES))
    textures = choose_factor("texture", texture, TEXTURES, (chance[:, 0] * len(TEXTURES)).long())
    colours = choose_factor("colour", colour, tuple(COLOURS), (chance[:, 1] * len(COLOURS)).long())
    images = torch.empty(n_images, 3, img_size, img_size, dtype=torch.uint8)
    step = max(1, 2**18 // img_size**2)  # images at a time: few enough that the work stays in the caches
    for first in range(0, n_images, step):
        part = slice(first, first + step)
        drawn = draw_chunk(chance[part], labels[part], textures[part], colours[part], img_size)  # (n, 3, S, S)
        drawn += chance[part, 2, None, None, None] * 0.3 * pixel_noise(seed, index[part], img_size)
        images[part] = (drawn.clamp(0, 1) * 255 + 0.5).to(torch.uint8)
    return DrawnShapes(images, labels, textures, colours)


def choose_factor(name, wanted, names, drawn):
    """int64 (N,): the factor's numbers as drawn (N,), or as the caller wants them."""
    if wanted is None:
        return drawn
    if isinstance(wanted, str):
        wanted = names.index(wanted) if wanted in names else -1
    numbers = torch.as_tensor(wanted)
    fits = numbers.shape in ((), drawn.shape) and not numbers.is_floating_point()
    if not fits or (numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(names)):
        raise InputError(
            f"{name}={wanted!r}: expected one of {', '.join(names)}, its number from 0, or {len(drawn)} such numbers"
        )
    return numbers.long().expand(drawn.shape).clone()  # (N,)


def draw_chunk(chance, labels, textures, colours, S):
    """The images without their noise: float32 (n, 3, S, S), about 0..1. chance is (n, 64), uniform in 0..1."""
    take = iter(chance[:, 3:].T)  # one column (n,) at a time
    pixels = (torch.arange(S) + 0.5) / S
    x, y = pixels.view(1, 1, S), pixels.view(1, S, 1)

    # The shape, in coordinates in which it has radius 1 about the origin.
    radius = next(take) * 0.18 + 0.22
    centre_x, centre_y = (next(take) * (1 - 2 * radius) + radius for _ in range(2))
    u, v = turned(x - column(centre_x), y - column(centre_y), next(take), radius)  # (n, S, S) each
    outside = by_kind(SHAPE_FUNCTIONS, labels, u, v)  # (n, S, S), in radii
    cover = (0.5 - outside * column(radius * S)).clamp(0, 1)

    # Its filling.
    period = next(take) * 0.06 + 0.12
    p, q = turned(x - column(next(take)), y - column(next(take)), next(take), period)  # in periods
    from_centre = (u.square() + v.square()).sqrt() * column(radius / period)
    sharpness = column(period * S)
    filling = by_kind(TEXTURE_FUNCTIONS, textures, p, q, from_centre, sharpness)  # (n, S, S)

    # The background.
    background = (next(take) * len(BACKGROUNDS)).long()
    period = next(take) * 0.2 + 0.15
    p, q = turned(x - column(next(take)), y - column(next(take)), next(take), period)
    ground = by_kind(BACKGROUND_FUNCTIONS, background, p, q, column(period), column(period * S))  # (n, S, S)

    # Tones: shape and background lie on either side of mid-grey, which of them above is drawn.
    palette = torch.tensor(list(COLOURS.values()))  # (8, 3)
    above = (next(take) < 0.5).float() * 2 - 1
    hue = palette[colours]  # (n, 3)
    tones = [tone(hue, above * (next(take) * 0.15 + 0.30)), tone(hue, above * (next(take) * 0.15 + 0.05))]
    for _ in range(2):
        other = palette[(next(take) * len(COLOURS)).long()]
        tones.append(tone(other, -above * (next(take) * 0.30 + 0.10)))

    image = mixed(tones[2], tones[3], ground)  # (n, 3, S, S)
    for _ in range(N_BLOBS):
        blob_x, blob_y, size = next(take), next(take), next(take) * 0.05 + 0.04
        distance = ((x - column(blob_x)).square() + (y - column(blob_y)).square()).sqrt()
        blob = ((column(size) - distance) * S + 0.5).clamp(0, 1)[:, None]  # (n, 1, S, S)
        other = palette[(next(take) * len(COLOURS)).long()]
        image = image + (tone(other, next(take) - 0.5) - image) * blob
    return image + (mixed(tones[0], tones[1], filling) - image) * cover[:, None]


def column(values):
    """(n,) as (n, 1, 1)."""
    return values[:, None, None]


def turned(x, y, turn, unit):
    """Offsets x (n, 1, S) and y (n, S, 1) turned by the share `turn` (n,) of a circle, in `unit`s (n,)."""
    angle = turn.double().numpy() * (2 * np.pi)
    # Rounded to 20 bits, for the last bit of a cosine differs from machine to machine.
    cos, sin = (column(torch.from_numpy(np.rint(f(angle) * 2**20) / 2**20).float() / unit) for f in (np.cos, np.sin))
    return cos * x + sin * y, cos * y - sin * x  # (n, S, S) each


def tone(hue, level):
    """The colour hue (n, 3) at a level (n,) of -0.5 (dark) to 0.5 (bright): (n, 3, 1, 1)."""
    chroma = hue - (hue[:, :1] + hue[:, 1:2] + hue[:, 2:]) / 3
    return (0.5 + level[:, None] + 0.25 * chroma)[:, :, None, None]


def mixed(first, second, share):
    """From the first tone (n, 3, 1, 1) where share (n, S, S) is 0 to the second where it is 1."""
    return first + (second - first) * share[:, None]  # (n, 3, S, S)


def by_kind(functions, kinds, *arguments):
    """functions[kinds[i]] of the i-th part of every argument: (n, S, S)."""
    result = torch.empty_like(arguments[0])
    for kind, function in enumerate(functions):
        members = (kinds == kind).nonzero()[:, 0]
        result[members] = function(*(argument[members] for argument in arguments))
    return result


# Each shape as a function of its coordinates that is below 0 inside, above 0 outside and, near the edge, about the
# distance from it. All are mirror images of themselves, so that a flipped image keeps its label.


def circle(u, v):
    return (u.square() + v.square()).sqrt() - 0.85


def ring(u, v):
    return ((u.square() + v.square()).sqrt() - 0.74).abs() - 0.22


def triangle(u, v):
    return torch.maximum(u.abs() * 0.8660254 + v * 0.5, -v) - 0.5


def square(u, v):
    return box(u, v, 0.72, 0.72)


def star(u, v):
    u = u.abs()
    for normal_u, normal_v in ((0.8090170, -0.5877853), (-0.8090170, -0.5877853)):  # fold the five points into one
        fold = (u * normal_u + v * normal_v).clamp(min=0) * 2
        u, v = u - fold * normal_u, v - fold * normal_v
    return u.abs() * 0.9510565 * 0.9 + (v - 1) * 0.3


def cross(u, v):
    return torch.minimum(box(u, v, 0.95, 0.27), box(u, v, 0.27, 0.95))


def heart(u, v):
    u = u.abs()
    diamond = (u + v.abs()) * 0.7071068 - 0.5
    lobe = ((u - 0.3535534).square() + (v - 0.3535534).square()).sqrt() - 0.5
    return torch.minimum(diamond, lobe)


def crescent(u, v):
    disc = (u.square() + v.square()).sqrt() - 0.95
    bite = ((u - 0.5).square() + v.square()).sqrt() - 0.75
    return torch.maximum(disc, -bite)


def tee(u, v):
    return torch.minimum(box(u, v - 0.6, 0.8, 0.25), box(u, v, 0.25, 0.85))


def dumbbell(u, v):
    end = ((u.abs() - 0.6).square() + v.square()).sqrt() - 0.38
    return torch.minimum(end, box(u, v, 0.6, 0.14))


def box(u, v, half_width, half_height):
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


# Each pattern as a share in 0..1, of coordinates p and q in periods. `sharpness`, the period in pixels, gives edges
# about a pixel wide.


def wave(p):
    """1 at whole p, 0 halfway between, straight lines from one to the other."""
    return ((p - p.floor()) * 2 - 1).abs()


def plain(p, q, other, sharpness):
    return torch.zeros_like(p)


def stripes(p, q, other, sharpness):
    return ((wave(p) - 0.5) * sharpness * 0.5 + 0.5).clamp(0, 1)


def checks(p, q, other, sharpness):
    return ((wave(p) - 0.5) * (wave(q) - 0.5) * sharpness + 0.5).clamp(0, 1)


def dots(p, q, other, sharpness):
    distance = ((p - p.floor() - 0.5).square() + (q - q.floor() - 0.5).square()).sqrt()
    return ((0.33 - distance) * sharpness + 0.5).clamp(0, 1)


def rings(p, q, from_centre, sharpness):
    return stripes(from_centre, q, from_centre, sharpness)


def gradient(p, q, period, sharpness):
    return (p * period * 0.7 + 0.5).clamp(0, 1)


SHAPE_FUNCTIONS = (circle, ring, triangle, square, star, cross, heart, crescent, tee, dumbbell)
TEXTURE_FUNCTIONS = (plain, stripes, checks, dots, rings)
BACKGROUND_FUNCTIONS = (plain, gradient, stripes, checks, dots)


def hashed(seed, index, places):
    """uint64 (n, places): for each image number (n,) and place (k,) 64 bits as if drawn by chance (splitmix64)."""
    image = scrambled(scrambled(np.full(1, seed, np.uint64)) + index)  # (n,)
    return scrambled(image[:, None] + (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def scrambled(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform_numbers(seed, index, places):
    """float32 (n, places), uniform in [0, 1)."""
    bits = hashed(seed, index, places) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32)) / 2**24


def pixel_noise(seed, index, S):
    """float32 (n, 3, S, S), uniform in [-0.5, 0.5): 21 of a pixel's 64 bits for each channel."""
    bits = hashed(seed, index, np.arange(64, 64 + S * S)).reshape(-1, 1, S, S)
    shifts = np.array([0, 21, 42], np.uint64).reshape(3, 1, 1)
    channels = (bits >> shifts) & np.uint64(2**21 - 1)  # (n, 3, S, S)
    return torch.from_numpy(channels.astype(np.float32)) / 2**21 - 0.5


# ---------------------------------------------------------------------------------------------------------
# Seeds and checks
# ---------------------------------------------------------------------------------------------------------


def mix_seed(*numbers):
    """One 64-bit seed out of several whole numbers from 0, unlike for unlike numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def generator_of(*numbers):
    return torch.Generator().manual_seed(mix_seed(*numbers))


def check_arguments(batch_size, img_size, val_fraction, seed, workers, n_images):
    check_whole("batch_size", batch_size, 1)
    check_whole("seed", seed, 0)
    if img_size is not None:
        check_whole("img_size", img_size, 8)
    if workers is not None:
        check_whole("workers", workers, 0)
    if n_images is not None:
        check_whole("n_images", n_images, 20)
    if isinstance(val_fraction, bool) or not isinstance(val_fraction, int | float) or not 0 < val_fraction < 1:
        raise InputError(f"val_fraction={val_fraction!r}: a share between 0 and 1 was expected, such as 0.1")


def check_whole(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={value!r}: a whole number from {least} was expected")
