"""The Vision Transformer of Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021).

Read the first 150 lines beside the paper:

    paper                                             here
    Sec. 3.1  x_p E, patches to tokens                line 34, PatchEmbedding
    App. A    Eq. 5 to 8, multi-head attention        line 51, MultiHeadAttention
    Sec. 3.1  MLP: two layers with a GELU             line 75, MLP
    Sec. 3.1  Eq. 2 and 3, the encoder block          line 89, TransformerBlock
    Sec. 3.1  Eq. 1 and 4, the whole model            line 111, VisionTransformer
    Sec. 3.2  another resolution                      resize_positions, below
    Table 1   the variants                            VARIANTS, below

Shapes:  B images, C channels, P patch side, N tokens, D width (embed_dim), H heads,
         K = D / H width of a head, L blocks (depth), n the first of the N tokens, where only they are computed.

Parameters carry timm's names (blocks.0.attn.qkv.weight, ...), so state dicts pass both ways.
Dropout follows App. B.1 of the paper: after every dense layer but q, k, v, and after the positions are
added; never on the attention weights.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """The input cannot work. The message is one line: the value, what was expected, what to do."""


class PatchEmbedding(nn.Module):
    """(B, C, height, width) -> (B, N, D), one token a patch, row by row: N = (height / P) * (width / P)."""

    def __init__(self, img_size=224, patch_size=16, in_channels=3, embed_dim=768):
        super().__init__()
        self.img_size, self.patch_size, self.in_channels = pair(img_size), pair(patch_size, "patch_size"), in_channels
        self.grid_size, self.any_size = grid_of(self.img_size, self.patch_size), False
        self.n_patches = self.grid_size[0] * self.grid_size[1]
        # Cutting into patches and multiplying each by one matrix E is a convolution whose stride is its kernel.
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, images):
        check_images(images, self.in_channels, None if self.any_size else self.img_size)
        x = self.proj(images)  # (B, D, height / P, width / P)
        return x.flatten(2).transpose(1, 2)  # (B, N, D)


class MultiHeadAttention(nn.Module):
    """(B, N, D) -> (B, N, D): every token looks at every token, in H heads side by side."""

    def __init__(self, embed_dim, n_heads, dropout=0.0, qk_norm=False, norm_eps=1e-6):
        super().__init__()
        self.n_heads, K = n_heads, head_width(embed_dim, n_heads)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.q_norm = nn.LayerNorm(K, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(K, eps=norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, return_attention=False, n_query_tokens=None):
        """With return_attention=True also the maps A, (B, H, N, N): rows are queries and sum to one. With
        n_query_tokens=n only the first n tokens are queries: (B, n, D), (B, H, n, N)."""
        qkv = self.qkv(x).unflatten(2, (3, self.n_heads, -1))  # (B, N, 3, H, K)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, K)                             Eq. 5
        q, k = self.q_norm(q[:, :, :n_query_tokens]), self.k_norm(k)  # (B, H, n, K), (B, H, N, K)
        heads, attention = attend(q, k, v, return_attention)  # (B, H, n, K), (B, H, n, N)   Eq. 6, 7
        x = heads.transpose(1, 2).flatten(2)  # (B, n, D), the heads side by side
        x = self.dropout(self.proj(x))  #                                                    Eq. 8
        return (x, attention) if return_attention else x


class MLP(nn.Module):
    """(B, N, D) -> (B, N, D): each token by itself, through a wider layer."""

    def __init__(self, embed_dim, hidden_dim, dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = self.dropout(F.gelu(self.fc1(x)))  # (B, N, hidden_dim)
        return self.dropout(self.fc2(x))  # (B, N, D)


class TransformerBlock(nn.Module):
    """(B, N, D) -> (B, N, D): attention mixes the tokens, the MLP each token's channels, both as residuals."""

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
        mixed = self.attn(self.norm1(x), return_attention, n_query_tokens)  # (B, n, D)
        mixed, attention = mixed if return_attention else (mixed, None)
        x = x[:, :n_query_tokens] + self.drop_path(self.ls1(mixed))  # (B, n, D)             Eq. 2
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))  #                         Eq. 3
        return (x, attention) if return_attention else x


class VisionTransformer(nn.Module):
    """(B, C, height, width) -> (B, n_classes) logits. The arguments are the fields of ViTConfig, in its order."""

    preprocessing = None  # what its images must be, once it is trained: vit_bridge.preprocessing.Preprocessing

    def __init__(self, *args, **options):
        super().__init__()
        self.config = c = ViTConfig(*args, **options)
        self.n_prefix_tokens = 1 + c.n_registers
        self.patch_embed = PatchEmbedding(c.img_size, c.patch_size, c.in_channels, c.embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, c.n_registers, c.embed_dim)) if c.n_registers else None
        self.add_positions(c.position)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(c.embed_dim, c.n_heads, c.mlp_ratio, c.dropout, rate, c.layer_scale, c.qk_norm, c.norm_eps)
            for rate in drop_path_rates(c.drop_path, c.depth))
        self.norm = nn.Identity() if c.fc_norm else nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.fc_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps) if c.fc_norm else nn.Identity()
        self.head = nn.Linear(c.embed_dim, c.n_classes) if c.n_classes else nn.Identity()
        initialise(self)

    def forward(self, images):
        # If the head reads only CLS, the last block only has to compute CLS.
        only_cls = self.config.pool == "cls" and not is_hooked(self.blocks[-1])
        tokens = self.forward_features(images, n_query_tokens=1 if only_cls else None)
        return self.forward_head(tokens)  # (B, n_classes)

    def forward_features(self, images, return_attention=False, n_query_tokens=None):
        """Tokens after the last norm, but before fc_norm, (B, N, D): CLS, registers, patches; on request also L maps
        (B, H, N, N). With n_query_tokens=n the last block computes only the first n tokens: (B, n, D)."""
        x = self.dropout(self.add_prefix(self.patch_embed(images), images.shape[2:]))  # (B, N, D)  Eq. 1
        maps = []
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, return_attention, n_query_tokens if i == len(self.blocks) else None)
            if return_attention:
                x, attention = x
                maps.append(attention)
        x = self.norm(x)  # its first token is y                                             Eq. 4
        return (x, maps) if return_attention else x

    def forward_head(self, x, pre_logits=False):
        """Tokens (B, N, D) -> logits (B, n_classes), or with pre_logits=True what the head reads, (B, D)."""
        x = x[:, 0] if self.config.pool == "cls" else x[:, self.n_prefix_tokens:].mean(dim=1)  # (B, D)
        x = self.fc_norm(x)
        return x if pre_logits else self.head(x)  # (B, n_classes)

    def add_prefix(self, patches, size):
        """CLS and the registers before the patches of images of this size, and the positions added: (B, n_patches, D)
        -> (B, N, D)."""
        pos_embed = self.positions_at(size)
        cls = self.cls_token.expand(patches.shape[0], -1, -1)  # (B, 1, D)
        if self.reg_token is None:
            x = torch.cat([cls, patches], dim=1)  # (B, N, D)
            return x if pos_embed is None else x + pos_embed
        registers = self.reg_token.expand(patches.shape[0], -1, -1)  # (B, n_registers, D)
        patches = patches if pos_embed is None else patches + pos_embed
        return torch.cat([cls, registers, patches], dim=1)  # (B, N, D)

    def positions_at(self, size):
        """The positions for images of this size: the model's own, or where any_size lets others in, resampled."""
        embed = self.patch_embed
        if self.pos_embed is None or tuple(size) == embed.img_size:
            return self.pos_embed
        return fitted_positions(self, grid_of(tuple(size), embed.patch_size))

    def add_positions(self, position):
        """Sets `pos_embed`: a parameter, a fixed buffer, or None.

        It is (1, 1 + n_patches, D), CLS first; with registers (1, n_patches, D), for the patches alone, as in timm:
        a CLS token needs no position beside its own learned vector, and DINOv2's is added to it when loaded.
        """
        D, n_positions = self.cls_token.shape[-1], self.patch_embed.n_patches + (self.reg_token is None)
        if position == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, n_positions, D))
        elif position == "sincos":
            self.register_buffer("pos_embed", sincos_positions(self.patch_embed.grid_size, D)[:, -n_positions:])
        else:
            self.pos_embed = None

    # ---- What training and figures ask of any model (vit_bridge/models/protocol.py has the defaults) ----

    attends = True  # its layers are attention blocks

    @property
    def n_features(self):
        """D, what the head reads."""
        return self.config.embed_dim

    def layers(self):
        """What makes the tokens, then the blocks."""
        return [self.patch_embed, *self.blocks]

    def whitening_layer(self):
        """(the first convolution, whether it holds each whitening filter and its negative)."""
        return self.patch_embed.proj, False

    @property
    def any_size(self):
        """Whether it takes images of every size that its patch divides; positions are resampled as they come (where
        resize_positions moves the model itself). False at first."""
        return self.patch_embed.any_size

    @any_size.setter
    def any_size(self, value):
        self.patch_embed.any_size = value


# ---- What the equations above use -------------------------------------------------------------------------


def head_width(embed_dim, n_heads):
    """K, the width of one head. Raises InputError where the heads do not divide the width."""
    if n_heads < 1 or embed_dim % n_heads:
        raise InputError(f"embed_dim {embed_dim} is not divisible by n_heads {n_heads}; choose n_heads among its "
                         f"divisors")
    return embed_dim // n_heads


# Where the explicit softmax is faster than torch's fused attention: {(device, type): tokens, at most, without and with
# gradients}. Measured with ViT-Tiny/16 on 2 cores with AVX512-BF16, fused over explicit seconds: without gradients 0.98
# at 577 tokens and 0.83 at 1,025; with them 1.55, 1.39, and 1.33 at 1,601, where the maps would fill the memory.
MATH_ATTENTION_MAX_TOKENS = {("cpu", torch.bfloat16): (512, 1024)}


def attend(q, k, v, return_attention=False):
    """softmax(q k^T / sqrt(K)) v, and the softmax where asked for, else None (Eq. 6 and 7).

    q: (B, H, n, K); k, v: (B, H, N, K). Without maps torch's fused kernel does the same sums and never holds the
    (n, N) matrix; up to MATH_ATTENTION_MAX_TOKENS tokens it is slower, and not taken.
    """
    most = MATH_ATTENTION_MAX_TOKENS.get((q.device.type, q.dtype), (0, 0))[q.requires_grad]
    if not return_attention and k.shape[2] > most:
        return F.scaled_dot_product_attention(q, k, v), None  # (B, H, n, K)
    q = q / math.sqrt(q.shape[-1])  # fewer numbers than the products have
    attention = (q @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, H, n, N)
    return attention @ v, attention if return_attention else None  # (B, H, n, K), (B, H, n, N)


def is_hooked(module):
    """Whether a module, or one inside it, has a hook, which should see every token."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
               for m in module.modules())


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch, small at first (Touvron et al. 2021, "Going deeper
    with Image Transformers", Eq. 3)."""

    def __init__(self, embed_dim, start):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), float(start)))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training a residual branch is dropped for a whole image with probability `rate`
    and scaled by 1 / (1 - rate) where it is kept, so its mean stays. (Huang et al. 2016.)"""

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
    """From 0 at the first block in equal steps to `last` at the last one (Huang et al. 2016, Sec. 3)."""
    return [last * block / max(depth - 1, 1) for block in range(depth)]


def sincos_positions(grid_size, embed_dim):
    """Fixed two-dimensional positions, (1, 1 + rows * columns, D), zero for CLS, as in MAE (He et al. 2022).

    The first half of the channels encodes the column, the second the row, each as sines, then cosines, of
    D / 4 frequencies from 1 down to nearly 1 / 10000 radians a patch.
    """
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid_size), indexing="ij")
    frequencies = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))  # (D / 4)
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]  # 2 x (N - 1, D / 4)
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)  # (N - 1, D)
    return F.pad(patches, (0, 0, 1, 0)).float().unsqueeze(0)  # (1, N, D)


def pair(size, name="img_size"):
    """A side, or (height, width), as (height, width). Raises InputError for anything else, naming it."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2:
        raise InputError(f"{name} {size!r} has {len(sides)} sides; expected a side or (height, width)")
    for side in sides:
        check_int(name, side, 1)
    return sides


def grid_of(img_size, patch_size):
    """Patches along (height, width). Raises InputError where the patch does not divide the image."""
    for side, patch in zip(img_size, patch_size, strict=True):
        if side % patch:
            near = max(patch, round(side / patch) * patch)
            raise InputError(f"img_size {img_size[0]}x{img_size[1]} is not divisible by patch_size "
                             f"{patch_size[0]}x{patch_size[1]}; the nearest side that is: {near}")
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]


def check_images(images, in_channels, img_size=None):
    """Raises InputError unless images are (B, in_channels, *img_size); img_size=None allows any size."""
    if images.ndim != 4 or images.shape[1] != in_channels:
        raise InputError(f"got images of shape {tuple(images.shape)}, expected (B, {in_channels}, height, width); "
                         f"convert them, or build the model with that in_channels")
    if img_size and tuple(images.shape[2:]) != img_size:
        raise InputError(f"got images of {images.shape[2]}x{images.shape[3]} pixels, expected "
                         f"{img_size[0]}x{img_size[1]}; resize them, or move the model with resize_positions")


def initialise(model):
    """The initialisation of the paper's released code (google-research/vision_transformer).

    Dense layers: Xavier-uniform weights (q, k and v each as a layer of its own) and zero biases; the patch
    projection: LeCun-normal; positions: normal, std 0.02; CLS: zero. Two departures: the biases of the MLP start
    there at normal, std 1e-6; and the head at zero, which makes a fresh model's logits 0, so here it is Xavier-uniform
    like the rest.
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
    """Gives attention the shape that it has after long training, and positions their waves, before any training.

    In trained ViTs the product W_q^T W_k of a head is near a multiple of the identity, and W_proj W_v near a negative
    one. Here they begin as 0.7 Z + 0.7 I, as near as a head of K channels can come, and 0.4 Z - 0.4 I, with Z normal
    of variance 1 / D; learned positions begin as sincos_positions. Tokens then look at first at those that resemble
    them in content or in place. (Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers", Sec. 4.)
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
        n_positions = model.pos_embed.shape[1]
        model.pos_embed.copy_(sincos_positions(model.patch_embed.grid_size, D)[:, -n_positions:])


# ---- Configuration and variants ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ViTConfig:
    """All that is needed to build the model again: VisionTransformer(**vars(config)).

    img_size, patch_size  a side or (height, width), in pixels
    n_classes             0: no head, the model gives the pooled features (B, D)
    embed_dim             D                              (Table 1: "Hidden size D")
    depth, n_heads        L blocks of H heads            (Table 1)
    mlp_ratio             width of the MLP over D        (Table 1: 4 throughout)
    dropout               rate, in [0, 1)
    pool                  what the head reads: "cls", the CLS token (the paper), or "mean", the mean over the
                          patch tokens (App. D.3). CLS stays in the sequence either way, as in timm
    drop_path             stochastic depth of the last block, in [0, 1)
    position              "learned" (the paper), "sincos" (fixed) or "none" (patch order is then invisible)
    n_registers           learned tokens after CLS that no head reads and that belong to no patch (Darcet et
                          al. 2024, "Vision Transformers Need Registers")
    layer_scale           None, or the value from which each channel's factor on a residual branch starts to be
                          learned (CaiT, DeiT-III, DINOv2: 1e-5)
    qk_norm               a LayerNorm over each head's queries and keys (Dehghani et al. 2023, Sec. 2)
    norm_eps              added to the variance in every LayerNorm: 1e-6 in the released code, timm and torchvision,
                          1e-12 in transformers' ViT
    init                  "xavier" (the paper's code, see initialise) or "mimetic" (see mimic_trained_attention): where
                          training starts; loaded weights replace it
    fc_norm               the last norm comes after the mean over the patches instead of before it, as in MAE's
                          fine-tuned models and timm's with global_pool="avg"; needs pool="mean"

    Raises InputError for a value out of range.
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
            raise InputError(f"fc_norm=True normalises the mean over the patches, and pool is {self.pool!r}; build the "
                             f"model with pool='mean'")
        check_choice("position", self.position, ("learned", "sincos", "none"))
        check_choice("init", self.init, ("xavier", "mimetic"))
        waves = self.position == "sincos" or (self.position, self.init) == ("learned", "mimetic")
        if waves and self.embed_dim % 4:
            cause = "position='sincos'" if self.position == "sincos" else "init='mimetic'"
            raise InputError(f"embed_dim {self.embed_dim} is not divisible by 4, which {cause} needs")


def check_int(name, value, least):
    """Raises InputError unless value is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} {value!r} is out of range; expected a whole number of at least {least}")


def check_rate(name, value):
    """Raises InputError unless value is a number of [0, 1)."""
    if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise InputError(f"{name} {value!r} is out of range; expected 0 <= {name} < 1")


def check_positive(name, value):
    """Raises InputError unless value is a positive, finite number."""
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{name} {value!r} is out of range; expected a positive number such as 1e-6")


def check_choice(name, value, choices):
    """Raises InputError unless value is one of the choices."""
    if value not in choices:
        raise InputError(f"{name} {value!r} is unknown; choose one of: {', '.join(map(str, choices))}")


VisionTransformer.config_class = ViTConfig

# Tiny is DeiT's (Touvron et al. 2021, Table 1), Small too; Base and Large are Table 1 of the paper; nano is
# ours, for images of 32 pixels on a laptop.
VARIANTS = {
    "vit_nano": ViTConfig(img_size=32, patch_size=4, embed_dim=96, depth=4, n_heads=3),
    "vit_tiny": ViTConfig(embed_dim=192, depth=12, n_heads=3),
    "vit_small": ViTConfig(embed_dim=384, depth=12, n_heads=6),
    "vit_base": ViTConfig(embed_dim=768, depth=12, n_heads=12),
    "vit_large": ViTConfig(embed_dim=1024, depth=24, n_heads=16),
}


def create_vit(variant, n_classes=1000, **overrides):
    """A VisionTransformer of the table; any field of ViTConfig may be overridden.

    Raises InputError for an unknown variant or field.
    """
    check_choice("variant", variant, tuple(VARIANTS))
    for name in overrides:
        check_choice("argument", name, tuple(ViTConfig.__dataclass_fields__))
    return VisionTransformer(**vars(replace(VARIANTS[variant], n_classes=n_classes, **overrides)))


def create_vit_nano(n_classes=1000, **overrides):
    """For 32 x 32 images: 64 patches of 4 x 4, D 96, 4 blocks of 3 heads."""
    return create_vit("vit_nano", n_classes, **overrides)


def create_vit_tiny(n_classes=1000, **overrides):
    """ViT-Ti/16 at 224 x 224: 5,717,416 parameters with 1000 classes."""
    return create_vit("vit_tiny", n_classes, **overrides)


def create_vit_small(n_classes=1000, **overrides):
    """ViT-S/16 at 224 x 224: 22,050,664 parameters with 1000 classes."""
    return create_vit("vit_small", n_classes, **overrides)


def create_vit_base(n_classes=1000, **overrides):
    """ViT-B/16 at 224 x 224: 86,567,656 parameters with 1000 classes."""
    return create_vit("vit_base", n_classes, **overrides)


def create_vit_large(n_classes=1000, **overrides):
    """ViT-L/16 at 224 x 224: 304,326,632 parameters with 1000 classes."""
    return create_vit("vit_large", n_classes, **overrides)


# ---- Moving a model to other work -------------------------------------------------------------------------


def resample_positions(positions, old, new):
    """(1, n + old patches, D) -> (1, n + new patches, D), from one grid (rows, columns) to another: bicubic with
    antialiasing, as in timm. The first n, CLS or none, stay as they are."""
    if old == new:
        return positions
    prefix, patches = positions.split([positions.shape[1] - old[0] * old[1], old[0] * old[1]], dim=1)
    patches = patches.reshape(1, *old, -1).permute(0, 3, 1, 2).float()  # (1, D, rows, columns)
    if patches.device.type == "mps":
        patches = patches.cpu()  # before torch 2.15 Apple GPUs have no gradient of what follows
    patches = F.interpolate(patches, size=new, mode="bicubic", antialias=True)  # (1, D, new rows, new columns)
    patches = patches.flatten(2).transpose(1, 2).to(positions)  # (1, new patches, D)
    return torch.cat([prefix, patches], dim=1)


def fitted_positions(model, grid_size):
    """A model's positions for another grid: learned ones resampled, fixed ones computed anew."""
    if model.config.position == "learned":
        return resample_positions(model.pos_embed, model.patch_embed.grid_size, grid_size)
    n_positions = grid_size[0] * grid_size[1] + (model.reg_token is None)
    return sincos_positions(grid_size, model.config.embed_dim)[:, -n_positions:].to(model.pos_embed)


@torch.no_grad()
def resize_positions(model, img_size):
    """Moves a model, in place, to another resolution (Sec. 3.2): the patch stays, so the grid of positions grows.

    Learned positions are resampled over the grid, fixed ones computed anew; CLS keeps its own. The parameter is
    replaced, so make the optimiser afterwards. Returns the model.
    """
    img_size, embed = pair(img_size), model.patch_embed
    new = grid_of(img_size, embed.patch_size)
    if model.config.position == "learned":
        model.pos_embed = nn.Parameter(fitted_positions(model, new), model.pos_embed.requires_grad)
    elif model.config.position == "sincos":
        model.pos_embed = fitted_positions(model, new)
    embed.img_size, embed.grid_size, embed.n_patches = img_size, new, new[0] * new[1]
    model.config = replace(model.config, img_size=img_size)
    if model.preprocessing is not None:
        model.preprocessing = replace(model.preprocessing, img_size=img_size)
    return model


def freeze_backbone(model):
    """Leaves exactly the head trainable and returns the model.

    Freezing `patch_embed` and `blocks` alone, as is often shown, leaves the CLS token, the positions and the
    last norm training.
    """
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model
