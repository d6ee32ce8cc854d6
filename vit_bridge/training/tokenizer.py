"""A tokenizer of patches for BEiT: k-means of their pixels, or of a teacher's features (PatchTokenizer).

The paper takes the tokens of DALL-E's image tokenizer (Bao et al. 2022, Sec. 2.1), a network with 8,192 tokens. Here a
patch gets the nearest of K centres instead. Centres of pixels are fitted in seconds. Centres of a teacher's features
follow the idea of BEiT v2 (Peng et al. 2022): tokens that know what a patch shows, and not only its colours.

Shapes:  B images, C channels, P side of a patch, N patches of an image, K tokens, F numbers that describe a patch,
         n patches of all images.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vit_bridge.analysis.capture import watch_layer
from vit_bridge.errors import InputError, check_int, pair
from vit_bridge.models.adapters import adapt, preprocessing_of
from vit_bridge.runtime import device_of, unwrapped
from vit_bridge.training.objectives import Reprepared
from vit_model import check_images, grid_of


class PatchTokenizer(nn.Module):
    """Give each patch of an image one of K tokens: images (B, C, height, width) -> int64 (B, N).

    Nothing in it is trained by gradients. Its state_dict holds everything that fit() found.

    Parameters
    ----------
    n_tokens : int
        K.
    patch_size : int or (int, int)
        Side, or (height, width), of a patch in pixels, the same as the model's.
    in_channels : int, optional
        C.
    features : TeacherFeatures, optional
        What describes a patch, (B, C, height, width) -> (B, N, F). By default it is its pixels, with F = C P P.

    Attributes
    ----------
    centres : Tensor, shape (K, F)
        A patch gets the token of the nearest centre.
    pictures : Tensor, shape (K, C, P, P)
        What each token looks like: the mean pixels of its patches, normalised as the images of fit() were.

    Raises
    ------
    InputError
        If a value is out of range, or if the images do not fit.

    References
    ----------
    Peng et al. 2022, "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers".

    Examples
    --------
    >>> tokenizer = PatchTokenizer(n_tokens=256, patch_size=4).fit(torch.randn(20, 3, 32, 32))
    >>> tokenizer(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 64])
    """

    def __init__(self, n_tokens, patch_size, in_channels=3, features=None):
        super().__init__()
        check_int("n_tokens", n_tokens, 2)
        self.n_tokens, self.patch_size, self.in_channels = n_tokens, pair(patch_size, "patch_size"), in_channels
        self.features = features
        size, device = (in_channels, *self.patch_size), None if features is None else device_of(features)
        width = self.describe(torch.zeros(1, *size, device=device)).shape[2]
        self.register_buffer("centres", torch.zeros(n_tokens, width, device=device))
        self.register_buffer("pictures", torch.zeros(n_tokens, *size, device=device))

    @torch.no_grad()
    def fit(self, images, seed=0, n_rounds=25):
        """Find the centres for the patches of images, and return the tokenizer.

        Parameters
        ----------
        images : Tensor, shape (B, C, height, width)
            Images as the model will see them. A few thousand are enough.
        seed, n_rounds : int, optional
            As in k_means.

        Raises
        ------
        InputError
            If the images have fewer than K patches.
        """
        parts = [part.to(self.centres.device) for part in images.split(128)]
        points = torch.cat([self.describe(part).flatten(0, 1) for part in parts])  # (n, F)
        self.centres.copy_(k_means(points, self.n_tokens, seed, n_rounds))
        pixels = torch.cat([self.pixels(part).flatten(0, 1) for part in parts])  # (n, C P P)
        means, _ = means_by_token(pixels, nearest_centres(points, self.centres)[0], self.n_tokens)
        self.pictures.copy_(means.view(self.pictures.shape))
        return self

    @torch.no_grad()
    def forward(self, images):
        """Return the token of each patch, row by row."""
        points = self.describe(images)  # (B, N, F)
        return nearest_centres(points.flatten(0, 1), self.centres)[0].view(points.shape[:2])

    def describe(self, images):
        """Return what describes each patch, (B, N, F)."""
        check_images(images, self.in_channels)
        grid_of(tuple(images.shape[2:]), self.patch_size)  # refuses images that the patches do not divide
        return self.pixels(images) if self.features is None else self.features(images, self.patch_size)

    def pixels(self, images):
        """Return the pixels of each patch, (B, N, C P P), in the order C, P, P."""
        return F.unfold(images.float(), self.patch_size, stride=self.patch_size).transpose(1, 2)

    def perplexity(self, ids):
        """Return how many tokens are in use: e to the power of the entropy of the tokens' shares in `ids`.

        It is K if all tokens are equally frequent, and 1 if there is only one.
        """
        shares = torch.bincount(ids.flatten(), minlength=self.n_tokens).double() / ids.numel()  # (K)
        return torch.special.entr(shares).sum().exp().item()


class TeacherFeatures(nn.Module):
    """Describe the patches of images by a frozen teacher: its last layer's output, with unit length.

    Parameters
    ----------
    teacher : Module
        A trained model that adapt() knows: a ViT, a ConvNet of this library, or a Swin Transformer.
    preprocessing : Preprocessing
        How the images are prepared. The teacher sees them stretched to its own size and normalised as in its training.

    Raises
    ------
    InputError
        If the teacher is unknown, or if its images have different channels.
    """

    def __init__(self, teacher, preprocessing):
        super().__init__()
        adapt(teacher)  # refuses unknown classes
        self.prepare = Reprepared(preprocessing, preprocessing_of(teacher)).to(device_of(teacher))
        self.teacher = unwrapped(teacher).requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images, patch_size):
        """Return the features of each patch, (B, N, F); the teacher's map is resampled to the grid of patches."""
        grid, adapter = grid_of(tuple(images.shape[2:]), patch_size), adapt(self.teacher)
        images, depth = self.prepare(images), len(adapter.layers) - 1
        without_graph = torch.no_grad()(self.teacher.forward)  # watch_layer enables gradients
        _, output, _ = watch_layer(self.teacher, adapter.layers[depth], images, without_graph)
        features = adapter.as_map(output, images, depth).float()  # (B, F, rows, columns)
        if features.shape[2:] != grid:
            features = F.interpolate(features, grid, mode="bilinear", antialias=True)
        return F.normalize(features.flatten(2).transpose(1, 2), dim=2)  # (B, N, F)


# ---- k-means ----------------------------------------------------------------------------------------------


@torch.no_grad()
def k_means(points, n_centres, seed=0, n_rounds=25):
    """Return n_centres centres of points, (K, F), which make the squared distances to the nearest centre small.

    The start is that of k-means++: each centre is a point, drawn in proportion to its squared distance from the nearest
    centre so far. A round (Lloyd's) moves each centre to the mean of its nearest points. A centre without any moves to
    a point that is far from its own centre, so that no token is lost.

    Parameters
    ----------
    points : Tensor, shape (n, F)
    n_centres : int
        K.
    seed : int, optional
        Determines the start.
    n_rounds : int, optional
        Most rounds; fewer if a round changes nothing.

    Raises
    ------
    InputError
        If there are fewer points than centres.

    References
    ----------
    Arthur and Vassilvitskii 2007, "k-means++: The Advantages of Careful Seeding"; Lloyd 1982.
    """
    if len(points) < n_centres:
        raise InputError(f"{len(points)} patches are too few for {n_centres} tokens; pass more images, or choose fewer "
                         f"tokens")
    draws = torch.rand(n_centres, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
    place, distances = int(draws[0] * len(points)), torch.full((len(points),), torch.inf, device=points.device)
    centres = points[place:place + 1]  # (1, F)
    for draw in draws[1:]:
        latest = torch.cdist(points, centres[-1:], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]  # (n), exact
        distances = distances.minimum(latest.square())  # (n)
        sums = distances.double().cumsum(dim=0)  # (n)
        place = torch.searchsorted(sums, draw * sums[-1:], right=True).clamp(max=len(points) - 1)  # (1)
        centres = torch.cat([centres, points[place]])
    for _ in range(n_rounds):
        ids, distances = nearest_centres(points, centres)
        means, counts = means_by_token(points, ids, n_centres)
        lost = counts == 0  # (K)
        means[lost] = points[distances.topk(int(lost.sum())).indices]
        if torch.equal(means, centres):
            break
        centres = means
    return centres


def nearest_centres(points, centres):
    """Return the nearest centre of each point and the squared distance to it: int64 (n), (n)."""
    ids, distances = [], []
    for part in points.split(16_384):  # (m, F); the products need m x K numbers
        scores = part @ centres.T - centres.square().sum(dim=1) / 2  # (m, K): (|x|^2 - |x - c|^2) / 2
        best = scores.max(dim=1)
        ids.append(best.indices)
        distances.append(part.square().sum(dim=1) - 2 * best.values)
    return torch.cat(ids), torch.cat(distances)


def means_by_token(values, ids, n_tokens):
    """Return the mean of the values (n, F) with each id, and their number: (K, F), (K); the mean of none is 0."""
    counts = torch.bincount(ids, minlength=n_tokens)  # (K)
    sums = values.new_zeros(n_tokens, values.shape[1]).index_add_(0, ids, values)  # (K, F)
    return sums / counts.clamp(min=1)[:, None], counts
