"""The Vision Transformer (ViT) of Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021).

Read this file alongside the paper. The model comes first, down to "Parts of the model"; its configuration and its
variants follow.

    Paper                In words                                   Code
    Sec. 3.1, Eq. 1      an image becomes a sequence of tokens      PatchEmbedding, VisionTransformer.add_prefix
    App. A, Eq. 5 to 8   multi-head self-attention                  MultiHeadAttention, attend
    Sec. 3.1             the MLP: two layers with a GELU            MLP
    Sec. 3.1, Eq. 2, 3   an encoder block                           TransformerBlock
    Sec. 3.1, Eq. 1, 4   the whole model                            VisionTransformer
    Sec. 3.2             fine-tuning at a different resolution      resize_positions
    Table 1              ViT-Base and ViT-Large                     VARIANTS

Parameters have timm's names (blocks.0.attn.qkv.weight, ...), so state dicts can be exchanged with timm. Dropout follows
App. B.1: after the positions are added and after every dense layer except q, k and v, but never on the attention
weights.

Shapes:  B images, C channels, P patch side, N tokens (CLS, registers and patches; the paper's N counts patches only),
         D width of a token (embed_dim), H heads, K = D / H width of a head, L blocks (depth),
         n tokens that are computed: all N, or only the first few in the last block.
"""

import math
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """Bad input. The message is one line: the value, what was expected, and what to do."""


class PatchEmbedding(nn.Module):
    """The first layer: cut the image into patches and project each one to a token.

    (B, C, height, width) -> (B, n_patches, D), row by row, with n_patches = (height / P) * (width / P).

    Parameters
    ----------
    img_size, patch_size : int or (int, int), optional
        Side, or (height, width), in pixels. The image size must be divisible by the patch size.
    in_channels, embed_dim : int, optional
        C and D.
    """

    def __init__(self, img_size=224, patch_size=16, in_channels=3, embed_dim=768):
        super().__init__()
        self.img_size, self.patch_size, self.in_channels = pair(img_size), pair(patch_size, "patch_size"), in_channels
        self.grid_size, self.any_size = grid_of(self.img_size, self.patch_size), False
        self.n_patches = self.grid_size[0] * self.grid_size[1]
        # Multiplying every flattened patch by one matrix E is a convolution whose stride equals its kernel size.
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, images):
        """Return the patch tokens of images (B, C, height, width)."""
        check_images(images, self.in_channels, None if self.any_size else self.img_size)
        x = self.proj(images)  # (B, D, height / P, width / P)
        return x.flatten(2).transpose(1, 2)  # (B, n_patches, D)


class MultiHeadAttention(nn.Module):
    """Self-attention in H parallel heads: every token gathers information from every token.

    (B, N, D) -> (B, n, D). All N tokens are keys and values. With n_query_tokens=n, only the first n are queries, and
    only these are computed; by default, all are.

    Parameters
    ----------
    embed_dim, n_heads : int
        D and H. D must be divisible by H.
    dropout : float, optional
        Dropout rate after the output projection.
    qk_norm : bool, optional
        Whether to normalise the queries and the keys of each head (see ViTConfig).
    norm_eps : float, optional
        Added to the variance in these norms.
    """

    def __init__(self, embed_dim, n_heads, dropout=0.0, qk_norm=False, norm_eps=1e-6):
        super().__init__()
        self.n_heads, K = n_heads, head_width(embed_dim, n_heads)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.q_norm = nn.LayerNorm(K, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(K, eps=norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, return_attention=False, n_query_tokens=None):
        """Return tokens (B, n, D), and with return_attention the maps A (B, H, n, N), whose rows sum to one."""
        qkv = self.qkv(x).unflatten(2, (3, self.n_heads, -1))  # (B, N, 3, H, K)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, K)                             Eq. 5
        q, k = self.q_norm(q[:, :, :n_query_tokens]), self.k_norm(k)  # (B, H, n, K), (B, H, N, K)
        bias = self.bias(n_query_tokens)
        heads, attention = attend(q, k, v, return_attention, bias)  # (B, H, n, K), (B, H, n, N)  Eq. 6, 7
        x = heads.transpose(1, 2).flatten(2)  # (B, n, D), the heads concatenated
        x = self.dropout(self.proj(x))  #                                                    Eq. 8
        return (x, attention) if return_attention else x

    def bias(self, n_query_tokens=None):
        """Return what is added to the scores of the first n queries, (H, n, N), or None, as in a ViT."""
        return None


class MLP(nn.Module):
    """Two dense layers with a GELU between them, applied to each token on its own: (B, N, D) -> (B, N, D).

    Parameters
    ----------
    embed_dim, hidden_dim : int
        D, and the width between the two layers.
    dropout : float, optional
        Dropout rate after each layer.
    """

    def __init__(self, embed_dim, hidden_dim, dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """Return the transformed tokens."""
        x = self.dropout(F.gelu(self.fc1(x)))  # (B, N, hidden_dim)
        return self.dropout(self.fc2(x))  # (B, N, D)


class TransformerBlock(nn.Module):
    """One encoder block: attention mixes the tokens, then the MLP mixes the channels within each token.

    (B, N, D) -> (B, n, D). Both are residual branches: apply LayerNorm and the layer, then add the input.

    Parameters
    ----------
    embed_dim, n_heads : int
        D and H.
    mlp_ratio, dropout, layer_scale, qk_norm, norm_eps : optional
        As in ViTConfig.
    drop_path : float, optional
        Probability of dropping each branch in training (see DropPath).
    """

    def __init__(self, embed_dim, n_heads, mlp_ratio=4.0, dropout=0.0, drop_path=0.0, layer_scale=None,
                 qk_norm=False, norm_eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.attn = MultiHeadAttention(embed_dim, n_heads, dropout, qk_norm, norm_eps)
        self.ls1 = LayerScale(embed_dim, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.mlp = MLP(embed_dim, int(embed_dim * mlp_ratio), dropout)
        self.ls2 = LayerScale(embed_dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x, return_attention=False, n_query_tokens=None):
        """Return tokens (B, n, D), and with return_attention the maps (B, H, n, N)."""
        mixed = self.attn(self.norm1(x), return_attention, n_query_tokens)  # (B, n, D)
        mixed, attention = mixed if return_attention else (mixed, None)
        x = x[:, :n_query_tokens] + self.drop_path(self.ls1(mixed))  # (B, n, D)             Eq. 2
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))  #                         Eq. 3
        return (x, attention) if return_attention else x


class VisionTransformer(nn.Module):
    """The whole model: images (B, C, height, width) -> logits (B, n_classes).

    Parameters
    ----------
    *args, **options
        The fields of ViTConfig, in order.

    Raises
    ------
    InputError
        If an argument is out of range, or if the images do not fit the model.

    Examples
    --------
    >>> model = VisionTransformer(img_size=32, patch_size=4, n_classes=10, embed_dim=96, depth=4, n_heads=3)
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    preprocessing = None  # how to prepare its images (vit_bridge.preprocessing); training and loading set it

    def __init__(self, *args, **options):
        super().__init__()
        self.config = c = self.config_class(*args, **options)
        self.n_prefix_tokens = self.n_cls_tokens + c.n_registers
        self.patch_embed = PatchEmbedding(c.img_size, c.patch_size, c.in_channels, c.embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, c.n_registers, c.embed_dim)) if c.n_registers else None
        self.add_positions(c.position)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(self.new_block(rate) for rate in drop_path_rates(c.drop_path, c.depth))
        self.norm = nn.Identity() if c.fc_norm else nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.fc_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps) if c.fc_norm else nn.Identity()
        self.head = nn.Linear(c.embed_dim, c.n_classes) if c.n_classes else nn.Identity()
        initialise(self)

    def forward(self, images):
        """Return the logits of normalised images."""
        # If the head reads only CLS, the last block only has to compute CLS.
        only_cls = self.config.pool == "cls" and not is_hooked(self.blocks[-1])
        tokens = self.forward_features(images, n_query_tokens=self.n_cls_tokens if only_cls else None)
        return self.forward_head(tokens)  # (B, n_classes)

    def forward_features(self, images, return_attention=False, n_query_tokens=None):
        """Return the tokens after the last norm, before fc_norm, in the order CLS, registers, patches.

        Parameters
        ----------
        images : Tensor, shape (B, C, height, width)
            Normalised images.
        return_attention : bool, optional
            Whether to return the attention maps as well.
        n_query_tokens : int, optional
            Compute only the first n tokens in the last block.

        Returns
        -------
        tokens : Tensor, shape (B, n, D)
        maps : list of L tensors, shape (B, H, N, N)
            Only with return_attention=True. The last map is (B, H, n, N).
        """
        x = self.dropout(self.add_prefix(self.patch_embed(images), images.shape[2:]))  # (B, N, D)  Eq. 1
        return self.encode(x, return_attention, n_query_tokens)

    def encode(self, x, return_attention=False, n_query_tokens=None):
        """Apply the blocks and the last norm to tokens (B, N, D); the rest is as in forward_features."""
        maps = []
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, return_attention, n_query_tokens if i == len(self.blocks) else None)
            if return_attention:
                x, attention = x
                maps.append(attention)
        x = self.norm(x)  # the first token, CLS, is y                                       Eq. 4
        return (x, maps) if return_attention else x

    def forward_head(self, x, pre_logits=False):
        """Return the logits (B, n_classes) for tokens (B, N, D), or with pre_logits=True the head's input."""
        x = x[:, 0] if self.config.pool == "cls" else x[:, self.n_prefix_tokens:].mean(dim=1)  # (B, D)
        x = self.fc_norm(x)
        return x if pre_logits else self.head(x)  # (B, n_classes)

    def add_prefix(self, patches, size):
        """Prepend CLS and the registers, and add the positions: (B, n_patches, D) -> (B, N, D).

        size: (height, width) of the images, in pixels.
        """
        pos_embed = self.positions_at(size)
        cls = self.cls_tokens().expand(patches.shape[0], -1, -1)  # (B, 1, D)
        if self.reg_token is None:
            x = torch.cat([cls, patches], dim=1)  # (B, N, D)
            return x if pos_embed is None else x + pos_embed
        registers = self.reg_token.expand(patches.shape[0], -1, -1)  # (B, n_registers, D)
        patches = patches if pos_embed is None else patches + pos_embed
        return torch.cat([cls, registers, patches], dim=1)  # (B, N, D)

    def cls_tokens(self):
        """Return the tokens that the heads read, (1, n_cls_tokens, D): CLS, and in a subclass further ones."""
        return self.cls_token

    def positions_at(self, size):
        """Return the positions for images of this size, fitted to their grid if any_size is set."""
        embed = self.patch_embed
        if self.pos_embed is None or tuple(size) == embed.img_size:
            return self.pos_embed
        return fitted_positions(self, grid_of(tuple(size), embed.patch_size))

    def add_positions(self, position):
        """Set `pos_embed`: a parameter, a fixed buffer, or None.

        Its shape is (1, 1 + n_patches, D), with CLS first. With registers it is (1, n_patches, D), for the patches
        only, as in timm's DINOv2 models with registers. No information is lost: the position of CLS can be added to
        `cls_token` once, as is done when DINOv2's own files are loaded.
        """
        D, grid_size, n_prefix = self.cls_token.shape[-1], self.patch_embed.grid_size, self.n_prefix_positions
        if position == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, n_prefix + self.patch_embed.n_patches, D))
        elif position == "sincos":
            self.register_buffer("pos_embed", sincos_positions(grid_size, D, n_prefix))
        else:
            self.pos_embed = None

    def new_block(self, drop_path):
        """Return a new block with this drop rate; a subclass can change its parts before they are initialised."""
        c = self.config
        return TransformerBlock(c.embed_dim, c.n_heads, c.mlp_ratio, c.dropout, drop_path, c.layer_scale, c.qk_norm,
                                c.norm_eps)

    def fit_positions(self, grid_size):
        """Fit the positions to a different grid in place: resample learned ones, compute fixed ones again."""
        if self.config.position == "learned":
            self.pos_embed = nn.Parameter(fitted_positions(self, grid_size), self.pos_embed.requires_grad)
        elif self.config.position == "sincos":
            self.pos_embed = fitted_positions(self, grid_size)

    # ---- What training and figures need from every model (vit_bridge/models/protocol.py explains) ----

    attends = True  # its layers are attention blocks
    n_cls_tokens = 1  # CLS
    head_names = ("head",)

    @property
    def n_prefix_positions(self):
        """How many positions come before those of the patches: one for each CLS token, or 0 if there are registers."""
        return self.n_cls_tokens if self.reg_token is None else 0

    @property
    def n_features(self):
        """D, the width of the head's input."""
        return self.config.embed_dim

    def layers(self):
        """Return the patch embedding and the blocks, in order."""
        return [self.patch_embed, *self.blocks]

    def whitening_layer(self):
        """Return the layer to whiten, and whether it holds each filter together with its negative."""
        return self.patch_embed.proj, False

    @property
    def any_size(self):
        """Whether the model accepts any image size that is a multiple of the patch size; False by default.

        If so, each forward pass fits the positions to the images. resize_positions changes the model itself instead.
        """
        return self.patch_embed.any_size

    @any_size.setter
    def any_size(self, value):
        self.patch_embed.any_size = value


# ---- Parts of the model -----------------------------------------------------------------------------------


def head_width(embed_dim, n_heads):
    """Return K, the width of one head. Raises InputError if D is not divisible by the number of heads."""
    if n_heads < 1 or embed_dim % n_heads:
        raise InputError(f"embed_dim {embed_dim} is not divisible by n_heads {n_heads}; choose n_heads among its "
                         f"divisors")
    return embed_dim // n_heads


# {(device, dtype): the longest sequences, without and with gradients, for which attend uses the explicit softmax}.
# They follow from the time of torch's fused kernel divided by the time of the softmax, measured with ViT-Tiny/16 on
# 2 cores with AVX512-BF16. Without gradients this ratio is 0.98 at 577 tokens and 0.83 at 1,025. With gradients it is
# 1.55 at 577, 1.39 at 1,025 and 1.33 at 1,601, but at that length the maps would fill the memory.
MATH_ATTENTION_MAX_TOKENS = {("cpu", torch.bfloat16): (512, 1024)}


def attend(q, k, v, return_attention=False, bias=None):
    """Return softmax(q k^T / sqrt(K) + bias) v, and with return_attention the softmax itself (Eq. 6 and 7).

    Parameters
    ----------
    q : Tensor, shape (B, H, n, K)
    k, v : Tensor, shape (B, H, N, K)
    return_attention : bool, optional
        Whether to return the maps.
    bias : Tensor, broadcastable to (B, H, n, N), optional
        Added to the scores. A ViT has none; models/relative.py learns one for each offset between two positions.

    Returns
    -------
    heads : Tensor, shape (B, H, n, K)
    attention : Tensor, shape (B, H, n, N), or None

    Notes
    -----
    If the maps are not needed, torch's fused kernel computes the same result without storing an n x N matrix.
    MATH_ATTENTION_MAX_TOKENS lists the cases in which this kernel is slower.
    """
    most = MATH_ATTENTION_MAX_TOKENS.get((q.device.type, q.dtype), (0, 0))[int(q.requires_grad)]
    if not return_attention and k.shape[2] > most:
        return F.scaled_dot_product_attention(q, k, v, bias), None  # (B, H, n, K)
    q = q / math.sqrt(q.shape[-1])  # scaling q costs less than scaling the n x N products
    scores = q @ k.transpose(-2, -1)  # (B, H, n, N)
    attention = (scores if bias is None else scores + bias).softmax(dim=-1)  # (B, H, n, N)
    return attention @ v, attention if return_attention else None  # (B, H, n, K), (B, H, n, N)


def is_hooked(module):
    """Return whether a module or any of its submodules has a hook, which should see every token."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
               for m in module.modules())


class LayerScale(nn.Module):
    """A learned factor, small at first, for each channel of a residual branch: (..., D) -> (..., D).

    Touvron et al. 2021, "Going deeper with Image Transformers" (CaiT), Eq. 3.
    """

    def __init__(self, embed_dim, start):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), float(start)))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, each image skips a residual branch with probability `rate`.

    Branches that are kept are multiplied by 1 / (1 - rate), so the expected value stays the same.
    Huang et al. 2016, "Deep Networks with Stochastic Depth".
    """

    def __init__(self, rate=0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep)  # (B, 1, 1)
        return x * mask / keep


def drop_path_rates(last, depth):
    """Return the drop rate of each block, from 0 in the first block to `last` in the last, in equal steps.

    Starting at 0 is timm's variant. In Huang et al. 2016 the first block already has the rate last / depth.
    """
    return [last * block / max(depth - 1, 1) for block in range(depth)]


def sincos_positions(grid_size, embed_dim, n_prefix=1):
    """Return fixed two-dimensional positions (1, n_prefix + rows * columns, D), as in MAE (He et al. 2022).

    The positions of the prefix, by default CLS, are zero. The first half of the channels encodes the column and the
    second half the row. Each half holds D / 4 sines, then D / 4 cosines, with frequencies from 1 down to almost
    1 / 10000 radians per patch.
    """
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid_size), indexing="ij")
    frequencies = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))  # (D / 4)
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]  # 2 x (N - 1, D / 4)
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)  # (N - 1, D)
    return F.pad(patches, (0, 0, n_prefix, 0)).float().unsqueeze(0)  # (1, n_prefix + rows * columns, D)


def pair(size, name="img_size"):
    """Return a side, or (height, width), as (height, width). Raises InputError for anything else."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2:
        raise InputError(f"{name} {size!r} has {len(sides)} numbers; pass one side, or (height, width)")
    for side in sides:
        check_int(name, side, 1)
    return sides


def grid_of(img_size, patch_size):
    """Return the number of patches along (height, width). Raises InputError unless both are whole numbers."""
    for side, patch in zip(img_size, patch_size, strict=True):
        if side % patch:
            near = max(patch, round(side / patch) * patch)
            raise InputError(f"img_size {img_size[0]}x{img_size[1]} is not divisible by patch_size "
                             f"{patch_size[0]}x{patch_size[1]}; the nearest side that fits is {near}")
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]


def check_images(images, in_channels, img_size=None):
    """Raise InputError unless images are (B, in_channels, *img_size); img_size=None allows any size."""
    if images.ndim != 4 or images.shape[1] != in_channels:
        raise InputError(f"got images of shape {tuple(images.shape)}, expected (B, {in_channels}, height, width); "
                         f"convert the images, or build the model with their in_channels")
    if img_size and tuple(images.shape[2:]) != img_size:
        raise InputError(f"got images of {images.shape[2]}x{images.shape[3]} pixels, expected "
                         f"{img_size[0]}x{img_size[1]}; resize the images, or the model with resize_positions")


def initialise(model):
    """Initialise a model as the paper's released code does (google-research/vision_transformer).

    - Dense layers have Xavier-uniform weights and zero biases; q, k and v count as three layers.
    - The patch projection is LeCun-normal, with zero biases.
    - Positions are normal with std 0.02; CLS is zero.

    Two things differ. In the released code the biases of the MLP are normal with std 1e-6, and the head is zero. A zero
    head makes every logit of a new model 0, so here the head is Xavier-uniform like the other dense layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for weight in module.weight.chunk(3) if name.endswith("qkv") else [module.weight]:
                nn.init.xavier_uniform_(weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, PatchEmbedding):
            fan_in = module.proj.weight[0].numel()
            nn.init.trunc_normal_(module.proj.weight, std=fan_in**-0.5)
            nn.init.zeros_(module.proj.bias)
    if model.config.position == "learned":
        nn.init.normal_(model.pos_embed, std=0.02)
    if model.reg_token is not None:
        nn.init.normal_(model.reg_token, std=1e-6)
    if model.config.init == "mimetic":
        mimic_trained_attention(model)


@torch.no_grad()
def mimic_trained_attention(model):
    """Initialise attention weights with the structure that they have in trained ViTs.

    In trained ViTs, W_q^T W_k of a head is close to a multiple of the identity I, and W_proj W_v to a negative
    multiple. Here the first starts as 0.7 Z + 0.7 I (reduced to rank K, the highest rank that a head can have) and the
    second as 0.4 Z - 0.4 I, where Z is normal with variance 1 / D. Learned positions start as sincos_positions. At
    first, each token therefore attends to tokens with similar content and nearby positions.

    Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers", Sec. 4.
    """
    D, H = model.config.embed_dim, model.config.n_heads
    K, identity = D // H, torch.eye(D)
    for block in model.blocks:
        w_q, w_k, w_v = block.attn.qkv.weight.unflatten(0, (3, H, K))  # 3 x (H, K, D), parts of the weight
        U, S, V = torch.linalg.svd(0.7 * torch.randn(H, D, D) / math.sqrt(D) + 0.7 * identity)  # (H, D, D), (H, D)
        root = S[:, :K, None].sqrt()  # (H, K, 1)
        w_q.copy_(root * U.transpose(1, 2)[:, :K])
        w_k.copy_(root * V[:, :K])
        U, S, V = torch.linalg.svd(0.4 * torch.randn(D, D) / math.sqrt(D) - 0.4 * identity)  # (D, D), (D)
        w_v.copy_((S.sqrt()[:, None] * V).unflatten(0, (H, K)))
        block.attn.proj.weight.copy_(U * S.sqrt())
    if model.config.position == "learned":
        model.pos_embed.copy_(sincos_positions(model.patch_embed.grid_size, D, model.n_prefix_positions))


# ---- Configuration and variants ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ViTConfig:
    """Everything needed to rebuild a model: VisionTransformer(**vars(config)).

    Parameters
    ----------
    img_size, patch_size : int or (int, int)
        Side, or (height, width), in pixels.
    in_channels : int
        C, the channels of an image.
    n_classes : int
        Number of logits. With 0 the model has no head and returns the pooled features (B, D).
    embed_dim : int
        D, the "hidden size" of Table 1.
    depth, n_heads : int
        L blocks of H heads each (Table 1).
    mlp_ratio : float
        Hidden width of the MLP, divided by D. It is 4 throughout Table 1.
    dropout : float
        Dropout rate, in [0, 1).
    pool : {"cls", "mean"}
        What the head reads: the CLS token, as in the paper, or the mean of the patch tokens (App. D.3). The sequence
        contains CLS in both cases, as in timm.
    drop_path : float
        Stochastic depth: the drop rate of the last block, in [0, 1). Earlier blocks have lower rates (drop_path_rates).
    position : {"learned", "sincos", "none"}
        Learned positions, as in the paper; fixed positions (sincos_positions); or none, so that the order of the
        patches has no effect on the logits.
    n_registers : int
        Number of extra learned tokens after CLS. They belong to no patch, and no head reads them (Darcet et al. 2024,
        "Vision Transformers Need Registers").
    layer_scale : float or None
        Initial value of a learned factor on each channel of a residual branch. None omits the factors. CaiT
        chooses 0.1, 1e-5 or 1e-6 by depth; DeiT-III uses 1e-4 and DINOv2 1e-5.
    qk_norm : bool
        Whether each head applies a LayerNorm to its queries and its keys (Dehghani et al. 2023, Sec. 2).
    norm_eps : float
        Added to the variance in every LayerNorm: 1e-6 in the released code, timm and torchvision, 1e-12 in the ViT of
        transformers.
    init : {"xavier", "mimetic"}
        Initial weights: as in the released code (initialise), or with mimic_trained_attention on top.
    fc_norm : bool
        Whether the last norm comes after the mean over the patches instead of before it, as in MAE's fine-tuned models
        and in timm models with global_pool="avg". Needs pool="mean".

    Raises
    ------
    InputError
        If a value is out of range.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    in_channels: int = 3
    n_classes: int = 1000
    embed_dim: int = 768
    depth: int = 12
    n_heads: int = 12
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    pool: str = "cls"
    drop_path: float = 0.0
    position: str = "learned"
    n_registers: int = 0
    layer_scale: float | None = None
    qk_norm: bool = False
    norm_eps: float = 1e-6
    init: str = "xavier"
    fc_norm: bool = False

    def __post_init__(self):
        for name, least in dict(in_channels=1, n_classes=0, embed_dim=1, depth=1, n_heads=1,
                                 n_registers=0).items():
            check_int(name, getattr(self, name), least)
        for name in ("dropout", "drop_path"):
            check_rate(name, getattr(self, name))
        if not 1 <= self.embed_dim * self.mlp_ratio < math.inf:
            raise InputError(f"mlp_ratio {self.mlp_ratio} leaves no hidden unit; expected a positive number such as 4")
        check_positive("norm_eps", self.norm_eps)
        if self.layer_scale is not None:
            check_positive("layer_scale", self.layer_scale)
        for name in ("qk_norm", "fc_norm"):
            check_choice(name, getattr(self, name), (False, True))
        check_choice("pool", self.pool, ("cls", "mean"))
        if self.fc_norm and self.pool != "mean":
            raise InputError(f"fc_norm=True normalises the mean of the patch tokens, but pool is {self.pool!r}; build "
                             f"the model with pool='mean'")
        check_choice("position", self.position, ("learned", "sincos", "none"))
        check_choice("init", self.init, ("xavier", "mimetic"))
        waves = self.position == "sincos" or (self.position, self.init) == ("learned", "mimetic")
        if waves and self.embed_dim % 4:
            cause = "position='sincos'" if self.position == "sincos" else "init='mimetic'"
            raise InputError(f"embed_dim {self.embed_dim} is not divisible by 4, which {cause} needs; choose a "
                             f"multiple of 4")


def check_int(name, value, least):
    """Raise InputError unless value is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} {value!r} is out of range; expected a whole number of at least {least}")


def check_rate(name, value):
    """Raise InputError unless value is a number in [0, 1)."""
    if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise InputError(f"{name} {value!r} is out of range; expected 0 <= {name} < 1")


def check_positive(name, value):
    """Raise InputError unless value is a positive, finite number."""
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{name} {value!r} is out of range; expected a positive number such as 1e-6")


def check_choice(name, value, choices, listed_by=None):
    """Raise InputError unless value is one of the choices.

    The message lists up to eight choices. If there are more, it names the closest ones and
    `listed_by`, the command that lists all.
    """
    if value in choices:
        return
    words = list(map(str, choices))
    if len(words) <= 8:
        raise InputError(f"{name} {value!r} is unknown; choose one of: {', '.join(words)}")
    closest = closest_names(str(value), words, cutoff=0.0)
    rest = f"; list all {len(words)} with {listed_by}" if listed_by else f" (of {len(words)})"
    raise InputError(f"{name} {value!r} is unknown; the closest choices are {', '.join(closest)}{rest}")


def closest_names(name, choices, n=3, cutoff=0.6):
    """Return up to n choices close to a name: first those that begin with it, then those that contain it."""
    held = [choice for choice in choices if name and name.lower() in choice.lower()]
    held.sort(key=lambda choice: not choice.lower().startswith(name.lower()))
    return list(dict.fromkeys([*held, *get_close_matches(name, choices, n, cutoff)]))[:n]


VisionTransformer.config_class = ViTConfig

# Base and Large come from Table 1 of the paper. Tiny and Small come from DeiT (Touvron et al. 2021, "Training
# data-efficient image transformers", Table 1). Nano is our own, for 32-pixel images on a laptop.
VARIANTS = {
    "vit_nano": ViTConfig(img_size=32, patch_size=4, embed_dim=96, depth=4, n_heads=3),
    "vit_tiny": ViTConfig(embed_dim=192, depth=12, n_heads=3),
    "vit_small": ViTConfig(embed_dim=384, depth=12, n_heads=6),
    "vit_base": ViTConfig(embed_dim=768, depth=12, n_heads=12),
    "vit_large": ViTConfig(embed_dim=1024, depth=24, n_heads=16),
}


def create_vit(variant, n_classes=1000, **overrides):
    """Build a VisionTransformer from VARIANTS.

    Parameters
    ----------
    variant : str
        A name in VARIANTS, such as "vit_base".
    n_classes : int, optional
        Number of logits.
    **overrides
        Any other fields of ViTConfig, such as img_size=384.

    Returns
    -------
    VisionTransformer
        A model with new weights, in training mode.

    Raises
    ------
    InputError
        If the variant or a field is unknown, or if a value is out of range.

    Examples
    --------
    >>> create_vit("vit_nano", n_classes=10)(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    check_choice("variant", variant, tuple(VARIANTS))
    for name in overrides:
        check_choice("argument", name, tuple(ViTConfig.__dataclass_fields__), "help(ViTConfig)")
    return VisionTransformer(**vars(replace(VARIANTS[variant], n_classes=n_classes, **overrides)))


# Shortcuts for create_vit, with the same arguments.


def create_vit_nano(n_classes=1000, **overrides):
    """Build ViT-nano/4 for 32 x 32 images: 64 patches, D = 96, 4 blocks of 3 heads."""
    return create_vit("vit_nano", n_classes, **overrides)


def create_vit_tiny(n_classes=1000, **overrides):
    """Build ViT-Ti/16 for 224 x 224 images: 5,717,416 parameters with 1,000 classes."""
    return create_vit("vit_tiny", n_classes, **overrides)


def create_vit_small(n_classes=1000, **overrides):
    """Build ViT-S/16 for 224 x 224 images: 22,050,664 parameters with 1,000 classes."""
    return create_vit("vit_small", n_classes, **overrides)


def create_vit_base(n_classes=1000, **overrides):
    """Build ViT-B/16 for 224 x 224 images: 86,567,656 parameters with 1,000 classes."""
    return create_vit("vit_base", n_classes, **overrides)


def create_vit_large(n_classes=1000, **overrides):
    """Build ViT-L/16 for 224 x 224 images: 304,326,632 parameters with 1,000 classes.

    Table 1 of the paper lists 307M for ViT-Large and does not define what is counted.
    """
    return create_vit("vit_large", n_classes, **overrides)


# ---- Adapting a model to a new task -----------------------------------------------------------------------


def resample_positions(positions, old, new):
    """Resample positions from one grid of patches to another: (1, n + old, D) -> (1, n + new, D).

    Interpolates bicubically with antialiasing, as timm does. The first n positions (CLS, or none) stay unchanged.
    old, new: (rows, columns) of the grids.
    """
    if old == new:
        return positions
    prefix, patches = positions.split([positions.shape[1] - old[0] * old[1], old[0] * old[1]], dim=1)
    patches = patches.reshape(1, *old, -1).permute(0, 3, 1, 2).float()  # (1, D, rows, columns)
    if patches.device.type == "mps":
        patches = patches.cpu()  # not every version of torch has this interpolation's gradient on Apple GPUs
    patches = F.interpolate(patches, size=new, mode="bicubic", antialias=True)  # (1, D, new rows, new columns)
    patches = patches.flatten(2).transpose(1, 2).to(positions)  # (1, new patches, D)
    return torch.cat([prefix, patches], dim=1)


def fitted_positions(model, grid_size):
    """Return a model's positions for a different grid: resample learned ones, compute fixed ones again."""
    if model.config.position == "learned":
        return resample_positions(model.pos_embed, model.patch_embed.grid_size, grid_size)
    return sincos_positions(grid_size, model.config.embed_dim, model.n_prefix_positions).to(model.pos_embed)


@torch.no_grad()
def resize_positions(model, img_size):
    """Change a model in place so that it accepts images of a different resolution (Sec. 3.2).

    The patch size stays the same, so the number of patches changes. Learned positions are resampled to the new grid,
    fixed ones are computed again, and the position of CLS is kept. `model.pos_embed` becomes a new parameter, so create
    the optimiser afterwards.

    Parameters
    ----------
    model : VisionTransformer
    img_size : int or (int, int)
        New side, or (height, width), in pixels.

    Returns
    -------
    VisionTransformer
        The same model.

    Raises
    ------
    InputError
        If the new size is not divisible by the patch size.
    """
    img_size, embed = pair(img_size), model.patch_embed
    new = grid_of(img_size, embed.patch_size)
    model.fit_positions(new)
    embed.img_size, embed.grid_size, embed.n_patches = img_size, new, new[0] * new[1]
    model.config = replace(model.config, img_size=img_size)
    if model.preprocessing is not None:
        model.preprocessing = replace(model.preprocessing, img_size=img_size)
    return model


def freeze_backbone(model):
    """Freeze everything except the head, or the heads of a model with several, and return the model.

    Freezing only `patch_embed` and `blocks` would leave the CLS token, the positions and the last norm trainable.
    """
    model.requires_grad_(False)
    for name in model.head_names:
        model.get_submodule(name).requires_grad_(True)
    return model
