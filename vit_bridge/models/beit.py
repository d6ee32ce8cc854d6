"""BEiT, a ViT that learns to name hidden patches: Bao et al. 2022, "BEiT: BERT Pre-Training of Image Transformers".

A tokenizer gives each patch of an image one of K tokens (training/tokenizer.py). In pre-training, about 40% of the
patches are hidden, and the model predicts their tokens from the visible patches (Sec. 2.3). Labels are not needed.

    maximise  sum over hidden patches i of log p(z_i | visible patches)                                 Eq. 1

    BEiT               classification, by the mean of the patches
    MaskedTokenModel   pre-training
    block_mask         which patches are hidden, Algorithm 1

There are no absolute positions. Instead, each block learns a bias for each offset between two patches, as Swin does
(models/relative.py). Parameters have the names of timm and of the paper's code, with two exceptions: `gamma_1` is
`ls1.gamma`, and `q_bias` and `v_bias` are parts of `qkv.bias`.

Shapes:  B images, C channels, N patches, h, w height and width of the grid of patches, D width of a token, K tokens of
         the tokenizer.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from vit_bridge.errors import InputError, check_choice, check_int
from vit_bridge.models.protocol import copy_part, create_variant, refuse_fields
from vit_bridge.models.relative import BiasTable, RelativeAttention, resize_table
from vit_model import VisionTransformer, ViTConfig


class BEiT(VisionTransformer):
    """A ViT with relative positions: images (B, C, height, width) -> logits (B, n_classes).

    The paper's attention has no bias for the keys. Here the keys have one, as in every ViT, but it has no effect: it
    adds the same number to all scores of a query, and the softmax removes it. New weights are those of
    vit_model.initialise.

    Parameters
    ----------
    *args, **options
        The fields of BEiTConfig, in order: those of ViTConfig, then shared_bias.

    Raises
    ------
    InputError
        If an argument is out of range, or if the images do not fit the model.

    Examples
    --------
    >>> model = BEiT(img_size=32, patch_size=4, n_classes=10, embed_dim=96, depth=4, n_heads=3)
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def new_block(self, drop_path):
        """Return a block whose attention knows the offset between two patches."""
        block, c = super().new_block(drop_path), self.config
        block.attn = RelativeAttention(c.embed_dim, c.n_heads, self.patch_embed.grid_size, c.dropout,
                                       n_prefix_tokens=self.n_prefix_tokens, shared=self.rel_pos_bias)
        return block

    def add_positions(self, position):
        """Set `pos_embed`, and `rel_pos_bias`: the table of all blocks, or None if each has its own."""
        super().add_positions(position)
        c, grid_size = self.config, self.patch_embed.grid_size
        self.rel_pos_bias = BiasTable(grid_size, c.n_heads, self.n_prefix_tokens) if c.shared_bias else None

    def fit_positions(self, grid_size):
        """Fit the positions to a different grid in place: resample the tables."""
        super().fit_positions(grid_size)
        if self.rel_pos_bias is not None:
            resize_table(self.rel_pos_bias, self.patch_embed.grid_size, grid_size)
        for block in self.blocks:
            block.attn.fit_grid(grid_size)

    @property
    def no_weight_decay(self):
        """The tables, as in the paper's code."""
        return tuple(name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table"))

    @VisionTransformer.any_size.setter
    def any_size(self, value):
        """Stay False: the tables fit one grid of patches. resize_positions changes it."""
        if value:
            raise InputError("any_size True does not fit a BEiT, whose tables of relative positions fit one grid of "
                             "patches; change the model's size with resize_positions(model, img_size)")


@dataclass(frozen=True)
class BEiTConfig(ViTConfig):
    """Everything needed to rebuild a model: BEiT(**vars(config)).

    Parameters
    ----------
    img_size, ..., fc_norm
        As in ViTConfig. By default there are no absolute positions, the head reads the normalised mean of the patches,
        and layer_scale is that of the paper's BEiT-B. qk_norm is not available.
    shared_bias : bool
        Whether all blocks share one table of biases, as in pre-training. Otherwise each block has its own, as in
        fine-tuning.
    """

    pool: str = "mean"
    position: str = "none"
    layer_scale: float | None = 0.1
    fc_norm: bool = True
    shared_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_choice("shared_bias", self.shared_bias, (False, True))
        refuse_fields(self, ("qk_norm",), "a BEiT, whose attention has no such norms; leave it out")


BEiT.config_class = BEiTConfig


class MaskedTokenModel(BEiT):
    """A BEiT that predicts the tokens of hidden patches: images, mask (B, N) -> logits (B, N, K).

    Its features for other tasks are those of a ViT without a head: forward_features, or forward_head, the mean of the
    patches.

    Parameters
    ----------
    *args, **options
        The fields of MaskedTokenConfig, in order: those of BEiTConfig, then n_tokens.

    Raises
    ------
    InputError
        If an argument is out of range, or if the images or the mask do not fit the model.

    Examples
    --------
    >>> model = MaskedTokenModel(img_size=32, patch_size=4, embed_dim=96, depth=4, n_heads=3, n_tokens=256)
    >>> mask = block_mask((8, 8), n_hidden=26).flatten().expand(2, -1)
    >>> model(torch.randn(2, 3, 32, 32), mask).shape
    torch.Size([2, 64, 256])
    """

    no_muon = ("lm_head.weight",)  # the output layer

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        D, self.n_tokens = self.config.embed_dim, self.config.n_tokens
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.lm_head = nn.Linear(D, self.n_tokens)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.lm_head.weight)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, images, mask=None):
        """Return the logits of every patch; only those of hidden patches say what the model has learned.

        mask: bool (B, N), True for the patches to hide. None hides none.
        """
        patches = self.patch_embed(images)  # (B, N, D)
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != patches.shape[:2]:
                raise InputError(f"the mask is {mask.dtype} of {tuple(mask.shape)}; expected torch.bool of "
                                 f"{tuple(patches.shape[:2])}, True for each patch to hide")
            patches = torch.where(mask[:, :, None], self.mask_token.to(patches.dtype), patches)
        x = self.encode(self.dropout(self.add_prefix(patches, images.shape[2:])))  # (B, N + prefix tokens, D)
        return self.lm_head(x[:, self.n_prefix_tokens:])  # (B, N, K)

    def encoder(self):
        """Return a copy of the encoder, a BEiT without a head in which each block has its own table.

        As in the paper, it starts from the shared table (Sec. 2.6). Its last norm, which stood before the mean, comes
        after it: fc_norm. fit_head(model, classes) adds a head.
        """
        tensors = self.state_dict()
        if self.config.shared_bias:
            tensors = copy_shared_table(tensors, self.config.depth)
        tensors |= {f"fc_norm.{name}": tensor for name, tensor in self.norm.state_dict().items()}
        return copy_part(self, BEiT, tensors, fc_norm=True, shared_bias=False)


@dataclass(frozen=True)
class MaskedTokenConfig(BEiTConfig):
    """Everything needed to rebuild a model: MaskedTokenModel(**vars(config)).

    Parameters
    ----------
    img_size, ..., shared_bias
        As in BEiTConfig. By default there is no head for classes, the last norm comes before the mean, and all blocks
        share one table.
    n_tokens : int
        K, the number of the tokenizer's tokens.
    """

    n_classes: int = 0
    fc_norm: bool = False
    shared_bias: bool = True
    n_tokens: int = 8192

    def __post_init__(self):
        super().__post_init__()
        check_int("n_tokens", self.n_tokens, 2)
        refuse_fields(self, ("n_classes", "fc_norm"), "a MaskedTokenModel, which predicts the tokens of patches; leave "
                      "it out, or use a BEiT")


MaskedTokenModel.config_class = MaskedTokenConfig


def copy_shared_table(tensors, depth):
    """Return the tensors of a pre-trained model with its shared table copied to each of `depth` blocks.

    Fine-tuning starts from these (Sec. 2.6). tensors: {name: tensor}.
    """
    name = "relative_position_bias_table"
    table, rest = tensors[f"rel_pos_bias.{name}"], {key: one for key, one in tensors.items() if "rel_pos" not in key}
    return rest | {f"blocks.{i}.attn.{name}": table for i in range(depth)}


# ---- Which patches are hidden -----------------------------------------------------------------------------


def block_mask(grid_size, n_hidden, generator=None):
    """Hide blocks of neighbouring patches until n_hidden are hidden: bool (h, w), True where hidden (Algorithm 1).

    A block has at least 16 of 14 x 14 patches, or as large a part of other grids, and at most as many as are still to
    be hidden. Its height divided by its width lies between 0.3 and 1 / 0.3. As in the paper's code, the logarithm of
    this ratio is uniform. The paper hides the whole of the last block, so its count varies. Here only as many of its
    patches are hidden as are missing.

    Parameters
    ----------
    grid_size : (int, int)
        (h, w).
    n_hidden : int
        From 1 to h w - 1. The paper hides 40% of the patches.
    generator : torch.Generator, optional
        A generator on the CPU, which determines the mask.

    Raises
    ------
    InputError
        If n_hidden is out of range.
    """
    (h, w), n_patches = grid_size, grid_size[0] * grid_size[1]
    check_int("n_hidden", n_hidden, 1)
    if n_hidden >= n_patches:
        raise InputError(f"n_hidden {n_hidden} of {n_patches} patches leaves none visible; hide fewer, or use "
                         f"smaller patches")
    hidden, least = set(), 16 * n_patches / 196  # places in the grid, counted row by row
    while missing := n_hidden - len(hidden):
        draws = torch.rand(4, dtype=torch.float64, generator=generator).tolist()
        area, ratio = least + draws[0] * max(0, missing - least), 0.3 ** (2 * draws[1] - 1)
        rows, columns = (min(side, max(1, round(length))) for side, length in (
            (h, math.sqrt(area * ratio)), (w, math.sqrt(area / ratio))))
        top, left = int(draws[2] * (h - rows + 1)), int(draws[3] * (w - columns + 1))
        block = [row * w + column for row in range(top, top + rows) for column in range(left, left + columns)]
        hidden.update([place for place in block if place not in hidden][:missing])
    mask = torch.zeros(n_patches, dtype=torch.bool)
    mask[sorted(hidden)] = True
    return mask.view(h, w)


# ---- Variants ---------------------------------------------------------------------------------------------

# Base and Large come from Sec. 3.1 and App. A of the paper. Nano is our own, for 32-pixel images on a laptop.
BEIT_VARIANTS = {
    "beit_nano": BEiTConfig(img_size=32, patch_size=4, embed_dim=96, depth=4, n_heads=3),
    "beit_base": BEiTConfig(),
    "beit_large": BEiTConfig(embed_dim=1024, depth=24, n_heads=16, layer_scale=1e-5),
}


# For pre-training with a tokenizer of our own; the paper's has 8,192 tokens.
MASKED_TOKEN_VARIANTS = {
    "beit_nano_pretraining": MaskedTokenConfig(img_size=32, patch_size=4, embed_dim=96, depth=4, n_heads=3,
                                               n_tokens=256),
    "beit_tiny_pretraining": MaskedTokenConfig(embed_dim=192, depth=12, n_heads=3, n_tokens=1024),
    "beit_base_pretraining": MaskedTokenConfig(),
}


def create_beit_nano(n_classes=1000, **overrides):
    """Build BEiT-nano/4 for 32 x 32 images: 64 patches, D = 96, 4 blocks of 3 heads. It is our own."""
    return create_variant(BEiT, BEIT_VARIANTS["beit_nano"], n_classes, overrides)


def create_beit_base(n_classes=1000, **overrides):
    """Build BEiT-B/16 for 224 x 224 images: 86,540,200 parameters with 1,000 classes, 9,216 of them key biases."""
    return create_variant(BEiT, BEIT_VARIANTS["beit_base"], n_classes, overrides)


def create_beit_large(n_classes=1000, **overrides):
    """Build BEiT-L/16 for 224 x 224 images: 304,455,144 parameters with 1,000 classes, 24,576 of them key biases."""
    return create_variant(BEiT, BEIT_VARIANTS["beit_large"], n_classes, overrides)
