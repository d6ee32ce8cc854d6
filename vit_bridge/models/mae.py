"""MAE, a ViT that learns without labels: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners".

Most patches are hidden at random. The encoder, a ViT, sees only the visible ones, and a small decoder predicts the
pixels of the hidden ones. MaskedPixels (training/objectives.py) minimises the loss. Parameters have the names of the
paper's code, so state dicts can be exchanged.

Shapes:  B images, C channels, height and width of an image, P sides of a patch, N patches, n visible patches, T prefix
         tokens (CLS, registers), D width of a token in the encoder (embed_dim), d width in the decoder (decoder_dim).
"""

from dataclasses import dataclass

import torch
from torch import nn

from vit_bridge.errors import InputError, check_choice, check_int
from vit_bridge.models.protocol import copy_part, create_variant, refuse_fields
from vit_model import TransformerBlock, VisionTransformer, ViTConfig, check_rate, grid_of, sincos_positions


class MaskedAutoencoder(VisionTransformer):
    """A ViT that hides patches and a decoder that predicts their pixels.

    It has no head. model.encoder() is the plain ViT, for views, linear probes and fine-tuning.

    Parameters
    ----------
    *args, **options
        The fields of MAEConfig, in order: those of ViTConfig, then those of the decoder.

    Raises
    ------
    InputError
        If an argument is out of range, or if the images do not fit the model.

    References
    ----------
    He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"; github.com/facebookresearch/mae.

    Examples
    --------
    >>> model = MaskedAutoencoder(img_size=32, patch_size=4, embed_dim=96, depth=4, n_heads=3, decoder_dim=64,
    ...                           decoder_depth=2, decoder_heads=2)
    >>> loss, prediction, mask = model(torch.randn(2, 3, 32, 32))
    >>> loss.shape, prediction.shape, mask.sum(dim=1)
    (torch.Size([]), torch.Size([2, 64, 48]), tensor([48., 48.]))
    """

    masks = True
    no_muon = ("decoder_pred.weight",)  # the decoder's output layer

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        c, embed, T = self.config, self.patch_embed, self.n_prefix_tokens
        self.decoder_embed = nn.Linear(c.embed_dim, c.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_dim))
        self.register_buffer("decoder_pos_embed", sincos_positions(embed.grid_size, c.decoder_dim, T))
        self.decoder_blocks = nn.ModuleList(
            TransformerBlock(c.decoder_dim, c.decoder_heads, c.mlp_ratio, norm_eps=c.norm_eps)
            for _ in range(c.decoder_depth))
        self.decoder_norm = nn.LayerNorm(c.decoder_dim, eps=c.norm_eps)
        self.decoder_pred = nn.Linear(c.decoder_dim, embed.proj.weight[0].numel())
        nn.init.normal_(self.mask_token, std=0.02)
        for module in (self.decoder_embed, *self.decoder_blocks.modules(), self.decoder_pred):
            if isinstance(module, nn.Linear):  # as in the paper's code
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images, noise=None, mask_ratio=None):
        """Hide patches, predict their pixels, and compare.

        Parameters
        ----------
        images : Tensor, shape (B, C, height, width)
            Normalised images.
        noise : Tensor, shape (B, N), optional
            The n patches with the smallest values stay visible. None draws it from torch's generator, in eval mode too.
        mask_ratio : float, optional
            Share of the patches to hide. By default that of the configuration.

        Returns
        -------
        loss : Tensor, scalar
            Mean squared error of the hidden patches.
        prediction : Tensor, shape (B, N, P P C)
            The predicted pixels of every patch, in the order of `patchify`; with norm_pix_loss, normalised ones. The
            loss does not depend on the predictions at visible patches, so these are of no use.
        mask : Tensor, shape (B, N)
            1 where a patch is hidden, 0 where it is visible.
        """
        T, patch_size = self.n_prefix_tokens, self.patch_embed.patch_size
        x = self.dropout(self.add_prefix(self.patch_embed(images), images.shape[2:]))  # (B, T + N, D)
        mask_ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
        visible, mask, ids_restore = random_masking(x[:, T:], mask_ratio, noise)
        x = self.encode(torch.cat([x[:, :T], visible], dim=1))  # (B, T + n, D)
        prediction = self.decode(x, ids_restore, grid_of(tuple(images.shape[2:]), patch_size))  # (B, N, P P C)
        patches = patchify(images, patch_size)  # (B, N, P P C)
        mean, std = self.target_scale(patches)
        errors = (prediction - (patches - mean) / std).square().mean(dim=2)  # (B, N)
        return (errors * mask).sum() / mask.sum(), prediction, mask

    def decode(self, x, ids_restore, grid_size):
        """Return the prediction (B, N, P P C) for the encoder's tokens (B, T + n, D)."""
        x, T = self.decoder_embed(x), self.n_prefix_tokens  # (B, T + n, d)
        x = torch.cat([x[:, :T], unmask(x[:, T:], self.mask_token, ids_restore)], dim=1)  # (B, T + N, d)
        x = x + self.decoder_positions(grid_size)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, T:]

    def target_scale(self, patches):
        """Return (mean, std), each (B, N, 1), with which the targets are normalised; (0, 1) for plain pixels."""
        if not self.config.norm_pix_loss:
            return 0.0, 1.0
        return patches.mean(dim=2, keepdim=True), (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()

    @torch.no_grad()
    def reconstruct(self, images, noise=None, mask_ratio=None):
        """Return the images with their hidden patches painted by the model, and the mask.

        A model with norm_pix_loss predicts neither the brightness nor the contrast of a patch. The painted patches
        therefore have the mean and the standard deviation of the hidden patches, which the model has not seen, so the
        picture looks better than the model alone could paint it. With norm_pix_loss=False the model paints alone.

        Parameters
        ----------
        images, noise, mask_ratio
            As in forward.

        Returns
        -------
        painted : Tensor, shape (B, C, height, width)
            Normalised images, in which the visible patches are unchanged.
        mask : Tensor, shape (B, N)
            1 where a patch is painted.
        """
        _, prediction, mask = self(images, noise, mask_ratio)
        patches = patchify(images, self.patch_embed.patch_size)  # (B, N, P P C)
        mean, std = self.target_scale(patches)
        painted = torch.where(mask[:, :, None] > 0, (prediction * std + mean).to(patches), patches)
        return unpatchify(painted, self.patch_embed.patch_size, images.shape[2:]), mask

    def encoder(self):
        """Return a copy of the encoder, a VisionTransformer without a head; fit_head(model, classes) adds one."""
        return copy_part(self, VisionTransformer, self.state_dict())

    def decoder_positions(self, grid_size):
        """Return the decoder's positions for a grid, (1, T + N, d)."""
        if grid_size == self.patch_embed.grid_size:
            return self.decoder_pos_embed
        return sincos_positions(grid_size, self.config.decoder_dim, self.n_prefix_tokens).to(self.decoder_pos_embed)

    def fit_positions(self, grid_size):
        """Fit the positions of encoder and decoder to a different grid in place."""
        super().fit_positions(grid_size)
        self.decoder_pos_embed = self.decoder_positions(grid_size)


# ---- Patches and masks ------------------------------------------------------------------------------------


def patchify(images, patch_size):
    """Cut images into patches, row by row: (B, C, height, width) -> (B, N, P P C).

    In a patch the pixels come row by row, and the C channels of a pixel stand next to each other.
    patch_size: (height, width) of a patch.
    """
    h, w = grid_of(tuple(images.shape[2:]), patch_size)
    x = images.unflatten(3, (w, -1)).unflatten(2, (h, -1))  # (B, C, h, p, w, q)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, h w, p q C)


def unpatchify(patches, patch_size, size):
    """Put patches together, the inverse of patchify: (B, N, P P C) -> (B, C, height, width).

    patch_size: (height, width) of a patch; size: (height, width) of the images.
    """
    x = patches.unflatten(2, (*patch_size, -1)).unflatten(1, grid_of(tuple(size), patch_size))  # (B, h, w, p, q, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, h p, w q)


def random_masking(x, mask_ratio, noise=None):
    """Hide tokens at random, the same number in every image.

    Parameters
    ----------
    x : Tensor, shape (B, N, D)
    mask_ratio : float
        Share of the tokens to hide.
    noise : Tensor, shape (B, N), optional
        The tokens with the smallest values stay visible. None draws it from torch's generator.

    Returns
    -------
    visible : Tensor, shape (B, n, D)
        In the order of their noise; n = N (1 - mask_ratio), rounded down.
    mask : Tensor, shape (B, N)
        1 where a token is hidden, 0 where it is visible.
    ids_restore : Tensor of int64, shape (B, N)
        The rank of each token's noise. `unmask` uses it.

    Raises
    ------
    InputError
        If nothing or everything would be hidden, or if the noise has a different shape.
    """
    N = x.shape[1]
    n = int(N * (1 - mask_ratio))
    if not 0 < n < N:
        raise InputError(f"mask_ratio {mask_ratio} leaves {n} of {N} patches visible; choose a ratio that hides some "
                         f"and leaves some, such as 0.5, or smaller patches")
    if noise is None:
        noise = torch.rand(x.shape[:2], device=x.device)
    if noise.shape != x.shape[:2]:
        raise InputError(f"noise of shape {tuple(noise.shape)} does not fit {len(x)} images of {N} patches; expected "
                         f"({len(x)}, {N}), one number for each patch")
    ids_shuffle = noise.argsort(dim=1, stable=True)  # (B, N), visible tokens first
    ids_restore = ids_shuffle.argsort(dim=1)  # (B, N)
    visible = x.take_along_dim(ids_shuffle[:, :n, None], dim=1)  # (B, n, D)
    return visible, (ids_restore >= n).float(), ids_restore


def unmask(visible, mask_token, ids_restore):
    """Put visible tokens back in their places, and mask tokens everywhere else: the inverse of random_masking.

    visible: (B, n, d); mask_token: (1, 1, d); ids_restore: (B, N). Returns (B, N, d).
    """
    B, N = ids_restore.shape
    hidden = mask_token.expand(B, N - visible.shape[1], -1)  # (B, N - n, d)
    return torch.cat([visible, hidden], dim=1).take_along_dim(ids_restore[:, :, None], dim=1)


# ---- Configuration and variants ---------------------------------------------------------------------------


@dataclass(frozen=True)
class MAEConfig(ViTConfig):
    """Everything needed to rebuild a model: MaskedAutoencoder(**vars(config)).

    It has the fields of ViTConfig, for the encoder, with fixed positions by default and without classes, and these:

    Parameters
    ----------
    mask_ratio : float
        Share of the patches that are hidden, between 0 and 1.
    decoder_dim, decoder_depth, decoder_heads : int
        d, and the blocks and heads of the decoder. Its blocks have the encoder's mlp_ratio and norm_eps, and neither
        dropout nor drop_path, layer_scale and qk_norm. Its positions are fixed (sincos_positions).
    norm_pix_loss : bool
        Whether to predict the pixels of each patch minus their mean, divided by their standard deviation. The paper
        reports better features with it (Table 1d); False predicts plain pixels.

    Raises
    ------
    InputError
        If a value is out of range.
    """

    n_classes: int = 0
    position: str = "sincos"
    mask_ratio: float = 0.75
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    norm_pix_loss: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("decoder_dim", "decoder_depth", "decoder_heads"):
            check_int(name, getattr(self, name), 1)
        check_choice("norm_pix_loss", self.norm_pix_loss, (True, False))
        check_rate("mask_ratio", self.mask_ratio)
        refuse_fields(self, ("n_classes", "fc_norm"), "a MaskedAutoencoder, which has no head; leave it out, or use a "
                      "VisionTransformer")
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            raise InputError(f"decoder_dim {self.decoder_dim} is not divisible by decoder_heads {self.decoder_heads} "
                             f"and by 4, which fixed positions need; choose a multiple of both")


MaskedAutoencoder.config_class = MAEConfig

# Base, Large and Huge have the decoder of the paper. Nano and Tiny are our own, for a laptop.
MAE_VARIANTS = {
    "mae_nano": MAEConfig(img_size=32, patch_size=4, embed_dim=96, depth=4, n_heads=3, decoder_dim=64, decoder_depth=2,
                          decoder_heads=2),
    "mae_tiny": MAEConfig(embed_dim=192, depth=12, n_heads=3, decoder_dim=128, decoder_depth=2, decoder_heads=4),
    "mae_base": MAEConfig(embed_dim=768, depth=12, n_heads=12),
    "mae_large": MAEConfig(embed_dim=1024, depth=24, n_heads=16),
    "mae_huge": MAEConfig(patch_size=14, embed_dim=1280, depth=32, n_heads=16),
}


def create_mae_nano(n_classes=0, **overrides):
    """Build MAE-nano/4 for 32 x 32 images: ViT-nano, and a decoder of 2 blocks with d = 64."""
    return create_variant(MaskedAutoencoder, MAE_VARIANTS["mae_nano"], n_classes, overrides)


def create_mae_tiny(n_classes=0, **overrides):
    """Build MAE-Ti/16 for 224 x 224 images: ViT-Ti/16, and a decoder of 2 blocks with d = 128."""
    return create_variant(MaskedAutoencoder, MAE_VARIANTS["mae_tiny"], n_classes, overrides)


def create_mae_base(n_classes=0, **overrides):
    """Build MAE-B/16 for 224 x 224 images: ViT-B/16, and a decoder of 8 blocks with d = 512."""
    return create_variant(MaskedAutoencoder, MAE_VARIANTS["mae_base"], n_classes, overrides)


def create_mae_large(n_classes=0, **overrides):
    """Build MAE-L/16 for 224 x 224 images: ViT-L/16, and a decoder of 8 blocks with d = 512."""
    return create_variant(MaskedAutoencoder, MAE_VARIANTS["mae_large"], n_classes, overrides)


def create_mae_huge(n_classes=0, **overrides):
    """Build MAE-H/14 for 224 x 224 images: ViT-H/14, and a decoder of 8 blocks with d = 512."""
    return create_variant(MaskedAutoencoder, MAE_VARIANTS["mae_huge"], n_classes, overrides)
