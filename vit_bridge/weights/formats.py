"""How other libraries and papers name the weights of a ViT and its relatives or a CNN, and our names for them.

    weights = translate(state, path, around)     a state dict under our names, and what was dropped

FORMATS lists the known formats, and REFUSED those that are known but cannot be loaded. The tests compare features with
the libraries' own models; benchmarks/RESULTS.md lists what each format was checked against.

Shapes:  D width, H heads, K = D / H width of a head, P patch side, C channels.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

import torch

from vit_bridge.errors import InputError
from vit_bridge.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from vit_bridge.weights.recorded import Recorded


@dataclass(frozen=True)
class Format:
    """A way of naming the weights of a model.

    Attributes
    ----------
    name : str
        The format, for messages.
    root : str
        Pattern for the whole name of the first layer's weight. Anything before it is a prefix.
    marks : tuple of str
        Further patterns. A file has this format only if each pattern matches some name, without the prefix.
    names : tuple of (str, str)
        Pattern and our name; the first pattern that matches the whole name counts. Other names stay as they are.
    drops : tuple of (str, str)
        Pattern and reason for tensors that the model does not use.
    norm_eps : float or None
        The ε that the format's library adds to variances; None to keep the model's own.
    pos_cls : bool or None
        Whether the positions start with one for CLS; None to infer it from their number.
    library : str
        The library whose config.json describes it: "timm", "transformers" or "".
    fixes : tuple of str
        Fields of the configuration that are the same in all models of this format, so they are not assumed.
    mean, std, interpolation : tuple, tuple, str
        Preprocessing of the library's models.
    note : str
        What the names do not show. The load report includes it; `load` warns about it unless there is a config.json.
    holds : str
        Name of our class for it.
    """

    name: str
    root: str
    marks: tuple = ()
    names: tuple = ()
    drops: tuple = ()
    norm_eps: float | None = 1e-6
    pos_cls: bool | None = None
    library: str = ""
    fixes: tuple = ()
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    interpolation: str = "bilinear"
    note: str = ""
    holds: str = "VisionTransformer"


# Tensors that wrappers and pretraining leave in a file.
AVERAGED = (r"(.*\.)?n_averaged", "the step counter of an averaged model")
BESIDE = (r"(\w+_)?(criterion|loss(es)?|loss_f\w*|metrics?|acc|accuracy|auroc|f1|confmat|precision|recall)(_\w+)?\..*",
          "part of a loss or a metric, not of the model")
PRE_LOGITS = (r"(heads\.)?pre_logits[./].*", "a layer before the head, from pretraining")
MASK = (r"(.*\.)?mask_token", "the token for masked patches in pretraining")
INDEX = (r".*\.relative_position_index", "the row of the table for two positions, which the model computes")
ROOT = r"(?:vit|deit|dinov2|dinov2_with_registers|beit)?\.?"
BLOCK = ROOT + r"(?:encoder\.)?layers?\.(\d+)\."


def _names_of_blocks(block, ours):
    """Return transformers' names of a block's layers, and ours; `block` is the pattern of the part with its number."""
    return (
        (block + r"(?:layernorm_before|norm1)\.(\w+)", ours + r".\1.norm1.\2"),
        (block + r"(?:layernorm_after|norm2)\.(\w+)", ours + r".\1.norm2.\2"),
        (block + r"attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.(\w+)", ours + r".\1.attn.\2.\3"),
        (block + r"attention\.(?:output\.dense|o_proj)\.(\w+)", ours + r".\1.attn.proj.\2"),
        (block + r"(?:intermediate\.dense|mlp\.fc1)\.(\w+)", ours + r".\1.mlp.fc1.\2"),
        (block + r"(?:output\.dense|mlp\.fc2)\.(\w+)", ours + r".\1.mlp.fc2.\2"))


TRANSFORMERS_NAMES = (
    (ROOT + r"embeddings\.cls_token", "cls_token"),
    (ROOT + r"embeddings\.(?:register_tokens|distillation_token)", "reg_token"),
    (ROOT + r"embeddings\.position_embeddings", "pos_embed"),
    (ROOT + r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    *_names_of_blocks(BLOCK, "blocks"),
    (BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (ROOT + r"layernorm\.(\w+)", r"norm.\1"),
    (r"classifier\.(\w+)", r"head.\1"),
)
TRANSFORMERS_DROPS = ((ROOT + r"pooler\..*", "a dense layer that the classification head does not use"), MASK,
                      (r"decoder\..*", "the decoder of masked images, used in pretraining"))
TRANSFORMERS_ROOT = ROOT + r"embeddings\.patch_embeddings\.projection\.weight"
TIMM_ROOT = r"patch_embed\.proj\.weight"
TV_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
NPZ_BLOCK = r"Transformer/encoderblock_(\d+)/"
NPZ_KIND = {"kernel": "weight", "scale": "weight", "bias": "bias"}

# Names of a distilled DeiT, which has a second token and a second head.
DISTILLED_NAMES = (
    (ROOT + r"embeddings\.distillation_token", "dist_token"),
    (r"cls_classifier\.(\w+)", r"head.\1"),
    (r"distillation_classifier\.(\w+)", r"head_dist.\1"),
    *TRANSFORMERS_NAMES,
)

# Names of MAE's decoder, which has blocks of its own. The files of transformers 5 have decoder_encoder.layer.
DECODER = r"decoder\.decoder_(?:layers|encoder\.layer)\.(\d+)\."
MAE_NAMES = (
    *_names_of_blocks(DECODER, "decoder_blocks"),
    (r"decoder\.(mask_token|decoder_(?:embed|pos_embed|norm|pred).*)", r"\1"),
    *TRANSFORMERS_NAMES,
)

# Names of BEiT, whose queries and values have a bias and whose keys have none. The names of the paper's code and timm's
# are the same.
TABLE = "relative_position_bias_table"
BEIT_TABLE = rf"^(rel_pos_bias|blocks\.0\.attn)\.{TABLE}$"
BEIT_NAMES = ((r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),
              (r"blocks\.(\d+)\.attn\.(q|v)_bias", r"blocks.\1.attn.\2.bias"))
HF_BEIT_TABLE = rf"^{ROOT}(encoder\.|layers?\.|shared_).*{TABLE}$"
HF_BEIT_NAMES = (
    (ROOT + r"embeddings\.mask_token", "mask_token"),
    (ROOT + rf"(?:encoder\.relative_position_bias|shared_position_bias)\.({TABLE})", r"rel_pos_bias.\1"),
    (BLOCK + rf"(?:attention\.attention\.)?relative_position_bias\.({TABLE})", r"blocks.\1.attn.\2"),
    (BLOCK + r"lambda_([12])", r"blocks.\1.ls\2.gamma"),
    (ROOT + r"pooler\.layernorm\.(\w+)", r"fc_norm.\1"),
    (r"lm_head\.(\w+)", r"lm_head.\1"),
    *TRANSFORMERS_NAMES,
)
CLS_LAYERS = (r"cls_pt_.*", "the layers that train CLS, used in pretraining")  # of BEiT v2
BEIT_IMAGES = dict(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", note="BEiT v2 and BEiT trained on "
                   "ImageNet-1k alone expect ImageNet's mean and std, and the names do not show which model this is")
MASKED_LM = r"^lm_head\.weight$"
BEITS = "BEiT", "MaskedTokenModel"
BEIT_FORMATS = (
    Format("transformers BEiT for masked images", TRANSFORMERS_ROOT, (HF_BEIT_TABLE, MASKED_LM), HF_BEIT_NAMES,
           (INDEX, AVERAGED), norm_eps=1e-12, library="transformers", fixes=("pool",), holds="MaskedTokenModel",
           **BEIT_IMAGES),
    Format("transformers BEiT", TRANSFORMERS_ROOT, (HF_BEIT_TABLE,), HF_BEIT_NAMES, (INDEX, MASK, AVERAGED),
           norm_eps=1e-12, library="transformers", fixes=("pool",), holds="BEiT", **BEIT_IMAGES),
    Format("microsoft's BEiT for masked images", TIMM_ROOT, (BEIT_TABLE, MASKED_LM), BEIT_NAMES,
           (INDEX, CLS_LAYERS, AVERAGED), fixes=("pool",), holds="MaskedTokenModel", **BEIT_IMAGES),
    Format("microsoft's and timm's names of a BEiT", TIMM_ROOT, (BEIT_TABLE,), BEIT_NAMES,
           (INDEX, MASK, CLS_LAYERS, AVERAGED), library="timm", holds="BEiT", **BEIT_IMAGES),
)

# Names of Swin's blocks, with groups (stage, block, ...). Our stages begin with their merging, as in timm; elsewhere it
# stands at the end of the stage before.
STAGES = range(8)
SWIN_DROPS = (INDEX, (r".*\.attn_mask", "the mask of the shifted windows, which the model computes"), MASK, AVERAGED)
SWIN_IMAGES = dict(norm_eps=1e-5, interpolation="bicubic", holds="SwinTransformer")
SWIN_BLOCK = r"^layers\.0\.blocks\.0\.attn\.qkv\.weight$"
SWIN_NAMES = ((r"patch_embed\.norm\.(\w+)", r"patch_norm.\1"), (r"layers\.(.*)", r"stages.\1"))
SWIN = r"(?:swin\.)?"
HF_SWIN_BLOCK = SWIN + r"encoder\.layers\.(\d+)\.blocks\.(\d+)\."
OUR_SWIN = "our names of a SwinTransformer"
SWIN_FORMATS = (
    Format("torchvision's Swin", r"features\.0\.0\.weight", (r"^features\.1\.0\.attn\.qkv\.weight$",), (
        (r"features\.0\.0\.(\w+)", r"patch_embed.proj.\1"),
        (r"features\.0\.2\.(\w+)", r"patch_norm.\1"),
        *((rf"features\.{2 * i + 1}\.(\d+)\.{theirs}(.*)", rf"stages.{i}.blocks.\1.{ours}\2") for i in STAGES
          for theirs, ours in ((r"mlp\.0\.", "mlp.fc1."), (r"mlp\.3\.", "mlp.fc2."), ("", ""))),
        *((rf"features\.{2 * i}\.(.*)", rf"stages.{i}.downsample.\1") for i in STAGES)), SWIN_DROPS, **SWIN_IMAGES),
    Format("transformers Swin", SWIN + r"embeddings\.patch_embeddings\.projection\.weight", (HF_SWIN_BLOCK,), (
        (SWIN + r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
        (SWIN + r"embeddings\.norm\.(\w+)", r"patch_norm.\1"),
        (HF_SWIN_BLOCK + r"layernorm_before\.(\w+)", r"stages.\1.blocks.\2.norm1.\3"),
        (HF_SWIN_BLOCK + r"layernorm_after\.(\w+)", r"stages.\1.blocks.\2.norm2.\3"),
        (HF_SWIN_BLOCK + r"attention\.(?:self\.)?(q|k|v)(?:uery|ey|alue|_proj)\.(\w+)",
         r"stages.\1.blocks.\2.attn.\3.\4"),
        (HF_SWIN_BLOCK + r"attention\.(?:self|relative_position_bias)\.(relative_position_bias_table)",
         r"stages.\1.blocks.\2.attn.\3"),
        (HF_SWIN_BLOCK + r"attention\.(?:output\.dense|o_proj)\.(\w+)", r"stages.\1.blocks.\2.attn.proj.\3"),
        (HF_SWIN_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.(\w+)", r"stages.\1.blocks.\2.mlp.fc1.\3"),
        (HF_SWIN_BLOCK + r"(?:output\.dense|mlp\.fc2)\.(\w+)", r"stages.\1.blocks.\2.mlp.fc2.\3"),
        *((SWIN + rf"encoder\.layers\.{i}\.downsample\.(.*)", rf"stages.{i + 1}.downsample.\1") for i in STAGES),
        (SWIN + r"layernorm\.(\w+)", r"norm.\1"),
        (r"classifier\.(\w+)", r"head.\1")), (*SWIN_DROPS, (r"decoder\..*", "the decoder of masked images, used in "
                                              "pretraining")), library="transformers", **SWIN_IMAGES),
    Format("microsoft's Swin", TIMM_ROOT, (SWIN_BLOCK, r"^layers\.0\.downsample\."), (
        *((rf"layers\.{i}\.downsample\.(.*)", rf"stages.{i + 1}.downsample.\1") for i in STAGES),
        *SWIN_NAMES), SWIN_DROPS, **SWIN_IMAGES),
    Format("timm's Swin", TIMM_ROOT, (SWIN_BLOCK,), (*SWIN_NAMES, (r"head\.fc\.(\w+)", r"head.\1")), SWIN_DROPS,
           library="timm", **SWIN_IMAGES),
    Format(OUR_SWIN, TIMM_ROOT, (r"^stages\.0\.blocks\.0\.attn\.qkv\.weight$", r"^patch_norm\.weight$"), (), SWIN_DROPS,
           **SWIN_IMAGES),
)

# Names of CNN blocks, with groups (stage, block, ...) or (stage, ...). torchvision counts a ResNet's stages from 1, and
# a ConvNeXt's stages together with the stem and the downsampling layers.
RESNET = r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\."
RESNET_HEAD = ((r"(?:fc|linear|classifier\.1)\.(\w+)", r"head.\1"),)
CONVNEXT = r"(?:convnext\.)?"
CONVNEXT_STAGE = CONVNEXT + r"encoder\.stages\.(\d+)\."
CNN_FORMATS = (
    Format("torchvision's ResNet", r"conv1\.weight", (r"^layer1\.0\.conv2\.weight$",), (
        (r"conv1\.(\w+)", r"stem.0.\1"),
        (r"bn1\.(\w+)", r"stem.1.\1"),
        *((rf"layer{i + 1}\.(\d+)\.downsample\.(.*)", rf"stages.{i}.\1.shortcut.\2") for i in range(4)),
        *((rf"layer{i + 1}\.(.*)", rf"stages.{i}.\1") for i in range(4)),
        *RESNET_HEAD), (AVERAGED,), norm_eps=None, library="timm", holds="ConvNet", note="timm's resnetaa and "
           "resnetblur have the same names, which do not show that they blur their maps; do not load them"),
    Format("transformers ResNet", r"(?:resnet\.)?embedder\.embedder\.convolution\.weight", (RESNET,), (
        (r"(?:resnet\.)?embedder\.embedder\.convolution\.(\w+)", r"stem.0.\1"),
        (r"(?:resnet\.)?embedder\.embedder\.normalization\.(\w+)", r"stem.1.\1"),
        (RESNET + r"shortcut\.convolution\.(\w+)", r"stages.\1.\2.shortcut.0.\3"),
        (RESNET + r"shortcut\.normalization\.(\w+)", r"stages.\1.\2.shortcut.1.\3"),
        *((RESNET + rf"layer\.{i}\.{kind}\.(\w+)", rf"stages.\1.\2.{ours}{i + 1}.\3")
          for i in range(3) for kind, ours in (("convolution", "conv"), ("normalization", "bn"))),
        *RESNET_HEAD), (AVERAGED,), norm_eps=None, library="transformers", holds="ConvNet", note="models "
           "with downsample_in_first_stage or downsample_in_bottleneck in their config.json have strides in other "
           "layers, which the names do not show; do not load them"),
    Format("our names of a ConvNet", r"stem\.0\.weight", (r"^stages\.0\.0\.conv2\.weight$",), (), (AVERAGED,),
           norm_eps=None, holds="ConvNet"),
    Format("torchvision's ConvNeXt", r"features\.0\.0\.weight", (r"^features\.1\.0\.block\.0\.weight$",), (
        (r"features\.0\.(.*)", r"stem.\1"),
        *((rf"features\.{2 * i + 1}\.(\d+)\.{theirs}(.*)", rf"stages.{i}.blocks.\1.{ours}\2") for i in range(4)
          for theirs, ours in ((r"block\.0\.", "conv_dw."), (r"block\.2\.", "norm."), (r"block\.3\.", "mlp.fc1."),
                               (r"block\.5\.", "mlp.fc2."), ("layer_scale", "ls.gamma"))),
        *((rf"features\.{2 * i}\.(.*)", rf"stages.{i}.downsample.\1") for i in range(1, 4)),
        (r"classifier\.0\.(\w+)", r"norm.\1"),
        (r"classifier\.2\.(\w+)", r"head.\1")), (AVERAGED,), holds="ConvNeXt"),
    Format("timm's names of a ConvNeXt", r"stem\.0\.weight", (r"^stages\.0\.blocks\.0\.conv_dw\.weight$",), (
        (r"(stages\.\d+\.blocks\.\d+)\.gamma", r"\1.ls.gamma"),
        (r"head\.norm\.(\w+)", r"norm.\1"),
        (r"head\.fc\.(\w+)", r"head.\1")), (AVERAGED,), library="timm", holds="ConvNeXt"),
    Format("facebookresearch's ConvNeXt", r"downsample_layers\.0\.0\.weight", (r"^stages\.0\.0\.dwconv\.weight$",), (
        (r"downsample_layers\.0\.(.*)", r"stem.\1"),
        (r"downsample_layers\.(\d+)\.(.*)", r"stages.\1.downsample.\2"),
        (r"stages\.(\d+)\.(\d+)\.dwconv\.(\w+)", r"stages.\1.blocks.\2.conv_dw.\3"),
        (r"stages\.(\d+)\.(\d+)\.pwconv(\d)\.(\w+)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
        (r"stages\.(\d+)\.(\d+)\.gamma", r"stages.\1.blocks.\2.ls.gamma"),
        (r"stages\.(\d+)\.(\d+)\.(.*)", r"stages.\1.blocks.\2.\3")), (AVERAGED,), holds="ConvNeXt"),
    Format("transformers ConvNext", CONVNEXT + r"embeddings\.patch_embeddings\.weight", (CONVNEXT_STAGE,), (
        (CONVNEXT + r"embeddings\.patch_embeddings\.(\w+)", r"stem.0.\1"),
        (CONVNEXT + r"embeddings\.layernorm\.(\w+)", r"stem.1.\1"),
        (CONVNEXT_STAGE + r"downsampling_layer\.(.*)", r"stages.\1.downsample.\2"),
        (CONVNEXT_STAGE + r"layers\.(\d+)\.dwconv\.(\w+)", r"stages.\1.blocks.\2.conv_dw.\3"),
        (CONVNEXT_STAGE + r"layers\.(\d+)\.layernorm\.(\w+)", r"stages.\1.blocks.\2.norm.\3"),
        (CONVNEXT_STAGE + r"layers\.(\d+)\.pwconv(\d)\.(\w+)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
        (CONVNEXT_STAGE + r"layers\.(\d+)\.layer_scale_parameter", r"stages.\1.blocks.\2.ls.gamma"),
        (CONVNEXT + r"layernorm\.(\w+)", r"norm.\1"),
        (r"classifier\.(\w+)", r"head.\1")), (AVERAGED,), library="transformers", holds="ConvNeXt",
           note="transformers adds 1e-12 to the variance in the last norm; here it is 1e-6, as in the paper's code"),
)
FORMATS = (
    *SWIN_FORMATS,
    *BEIT_FORMATS,
    Format("torchvision", r"conv_proj\.weight", (r"^class_token$",), (
        (r"class_token", "cls_token"),
        (r"encoder\.pos_embedding", "pos_embed"),
        (r"conv_proj\.(\w+)", r"patch_embed.proj.\1"),
        (TV_BLOCK + r"ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
        (TV_BLOCK + r"self_attention\.in_proj_(\w+)", r"blocks.\1.attn.qkv.\2"),
        (TV_BLOCK + r"self_attention\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
        (TV_BLOCK + r"mlp\.(?:0|linear_1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (TV_BLOCK + r"mlp\.(?:3|linear_2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
        (r"encoder\.ln\.(\w+)", r"norm.\1"),
        (r"heads\.head\.(\w+)", r"head.\1")), (PRE_LOGITS, AVERAGED), pos_cls=True,
           fixes=("pool", "norm_eps")),
    Format("transformers Dinov2", TRANSFORMERS_ROOT, (r"layer_scale1\.lambda1$",), TRANSFORMERS_NAMES,
           (*TRANSFORMERS_DROPS, AVERAGED), pos_cls=True, library="transformers", fixes=("pool",),
           interpolation="bicubic"),
    Format("transformers DeiT, distilled", TRANSFORMERS_ROOT, (r"^(cls|distillation)_classifier\.",), DISTILLED_NAMES,
           (*TRANSFORMERS_DROPS, AVERAGED), norm_eps=1e-12, pos_cls=True, library="transformers", fixes=("pool",),
           interpolation="bicubic", holds="DistilledViT"),
    Format("transformers DeiT", TRANSFORMERS_ROOT, (r"embeddings\.distillation_token$",), TRANSFORMERS_NAMES,
           (*TRANSFORMERS_DROPS, AVERAGED), norm_eps=1e-12, library="transformers", fixes=("pool",),
           interpolation="bicubic", note="its distillation token, which no head reads, becomes a register here"),
    Format("transformers MAE with its decoder", TRANSFORMERS_ROOT, (r"^decoder\.decoder_embed\.weight$",), MAE_NAMES,
           (AVERAGED,), norm_eps=1e-12, pos_cls=True, library="transformers", fixes=("pool",), interpolation="bicubic",
           holds="MaskedAutoencoder"),
    Format("transformers ViT", TRANSFORMERS_ROOT, (), TRANSFORMERS_NAMES, (*TRANSFORMERS_DROPS, AVERAGED),
           norm_eps=1e-12, pos_cls=True, library="transformers", fixes=("pool",), mean=(0.5,) * 3, std=(0.5,) * 3),
    Format("Google's npz", r"embedding/kernel", (NPZ_BLOCK,), (
        (r"cls", "cls_token"),
        (r"Transformer/posembed_input/pos_embedding", "pos_embed"),
        (r"embedding/(\w+)", r"patch_embed.proj.\1"),
        (NPZ_BLOCK + r"LayerNorm_0/(\w+)", r"blocks.\1.norm1.\2"),
        (NPZ_BLOCK + r"MultiHeadDotProductAttention_1/(q|k|v)(?:uery|ey|alue)/(\w+)", r"blocks.\1.attn.\2.\3"),
        (NPZ_BLOCK + r"MultiHeadDotProductAttention_1/out/(\w+)", r"blocks.\1.attn.proj.\2"),
        (NPZ_BLOCK + r"LayerNorm_2/(\w+)", r"blocks.\1.norm2.\2"),
        (NPZ_BLOCK + r"MlpBlock_3/Dense_0/(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (NPZ_BLOCK + r"MlpBlock_3/Dense_1/(\w+)", r"blocks.\1.mlp.fc2.\2"),
        (r"Transformer/encoder_norm/(\w+)", r"norm.\1"),
        (r"head/(\w+)", r"head.\1")), (PRE_LOGITS,), pos_cls=True,
           fixes=("pool", "norm_eps"), mean=(0.5,) * 3, std=(0.5,) * 3,
           note="its code uses flax's GELU, a tanh approximation; here the exact GELU is used, as in timm"),
    Format("MAE with its decoder", TIMM_ROOT, (r"^decoder_embed\.weight$",), (), (AVERAGED,), pos_cls=True,
           fixes=("pool",), interpolation="bicubic", holds="MaskedAutoencoder"),
    Format("DeiT-III", TIMM_ROOT, (r"^blocks\.0\.gamma_1$",),
           ((r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),), (AVERAGED,), pos_cls=False, library="timm",
           note="a RoPE-ViT can have DeiT-III's names, which do not show its rotation; do not load one"),
    Format("DINOv2", TIMM_ROOT, (r"^mask_token$", r"^blocks\.0\.(0\.)?ls1\.gamma$"), (
        (r"register_tokens", "reg_token"),
        (r"blocks\.\d+\.(\d+)\.(.*)", r"blocks.\1.\2")),  # stored in chunks during training: (chunk, block)
           (MASK, AVERAGED), pos_cls=True, library="timm", interpolation="bicubic"),
    Format("DINO in training", rf"backbone\.{TIMM_ROOT}", (r"^(head|dino_head|ibot_head)\.(mlp|last_layer)\b",), (
        (r"backbone\.register_tokens", "reg_token"), (r"backbone\.(.*)", r"\1")),
           ((r"(backbone\.)?mask_token", MASK[1]),
            (r"(head|dino_head|ibot_head)\.(mlp|last_layer)\b.*", "DINO's projection head, used in pretraining")),
           pos_cls=True),
    Format("timm's names of a distilled DeiT", TIMM_ROOT, (r"^dist_token$",), (), (AVERAGED,), library="timm",
           fixes=("pool", "norm_eps"), interpolation="bicubic", holds="DistilledViT"),
    Format("timm's names (timm, DeiT, DINO, MAE's encoder)", TIMM_ROOT, (r"^blocks\.0\.attn\.qkv",), (),
           (MASK, PRE_LOGITS, AVERAGED), library="timm"),
    *CNN_FORMATS,
)


@dataclass(frozen=True)
class Pretraining:
    """What a model has only for pretraining.

    Attributes
    ----------
    inner : str
        Name of the class without these parts.
    parts : str
        Pattern for our names of their tensors.
    reason : str
        Why they are dropped.
    lacks : str
        What a file without them lacks.
    """

    inner: str
    parts: str
    reason: str
    lacks: str


# The classes that pretraining uses, by name. A model of the inner class takes its tensors from their files.
PRETRAINING_PARTS = dict(
    MaskedAutoencoder=Pretraining("VisionTransformer", r"mask_token|decoder_.*", "MAE's decoder, used in pretraining",
                                  "no decoder, so it reconstructs nothing"),
    MaskedTokenModel=Pretraining("BEiT", r"mask_token|lm_head\..*", "the prediction of hidden tokens, used in "
                                 "pretraining", "no lm_head, so it predicts no tokens of patches"))
# Known architectures that cannot be loaded: a pattern found in some name, and the reason.
REFUSED = (
    (r"\.(attn|self|attention)\.(logit_scale|cpb_mlp|meta_mlp|continuous_position_bias)",
     "a Swin Transformer V2, with scaled cosine attention and a continuous position bias, which SwinTransformer does "
     "not have"),
    (r"\.spatial_mlp\.", "a SwinMLP, which mixes the tokens of a window without attention; SwinTransformer attends"),
    (r"^absolute_pos_embed$|^swin\.embeddings\.position_embeddings$",
     "a Swin Transformer with absolute positions, which SwinTransformer does not have"),
    (r"^conv1\.\d+\.weight|(^|\.)attnpool\.",
     "a ResNet with several convolutions before its stages (ResNet-C, ResNet-D, CLIP's); ConvNet has one"),
    (r"^layer\d\.\d+\.conv\d\.(conv|paths|attn|fc\d)",
     "a ResNet with blocks of several paths (SK, ResNeSt), which ConvNet does not have"),
    (r"^layer\d\.\d+\.(se|se_module|attn|eca)\.",
     "a ResNet whose blocks weight their channels (SE, ECA); ConvNet's do not"),
    (r"^stem\.conv\d?\.weight$|^root\.conv",
     "a ResNet V2 (BiT) or another CNN, whose stem and blocks ConvNet does not have"),
    (r"\.grn\.", "a ConvNeXt V2, whose response normalisation (GRN) ConvNeXt does not have"),
    (r"visual\.class_embedding|vision_model\.embeddings|^norm_pre\.",
     "a CLIP or SigLIP, which normalises before its first block or pools by attention, or a ConvNeXt that normalises "
     "before it pools; the models here do not"),
    (r"mlp\.(w12|weights_in|gate_proj)\.",
     "a ViT with gated MLPs (DINOv2 giant), which VisionTransformer does not have"),
    (r"(^|\.)(rope|rotary)", "a ViT with rotary positions, which VisionTransformer does not have"),
    (r"Transformer/encoderblock/|MAPHead",
     "a big_vision file with stacked blocks or a pooling head, which VisionTransformer does not have"),
)


@dataclass
class Weights:
    """A file of weights under our names.

    Attributes
    ----------
    path, format : str, Format
        The file, and the format of its tensor names.
    around : list of str
        Keys and prefixes under which the weights are stored.
    tensors : dict
        The tensors, by our names.
    sources : dict
        For each of our names, the names in the file that it comes from.
    dropped : dict
        Names in the file that the model does not use, each with the reason.
    choices : list of str
        Descriptions of decisions that could be wrong.
    n_heads : int or None
        Number of heads, if the file or its config.json records it.
    recorded : Recorded
        What the JSON files in the same folder record.
    model : Module or None
        The model, if save_model wrote the file.
    """

    path: str
    format: Format
    around: list
    tensors: dict = field(default_factory=dict)
    sources: dict = field(default_factory=dict)
    dropped: dict = field(default_factory=dict)
    choices: list = field(default_factory=list)
    n_heads: int | None = None
    recorded: Recorded = field(default_factory=Recorded)
    model: object = None


# Prefixes that wrappers put before every name; and names of the preferred of two models, usually averaged weights.
WRAPPED = re.compile(r"^((module|_orig_mod|model)\.)*(opt/target/|params/)?")
TAKEN_FIRST = re.compile(r"(^|[._])(ema|averaged?|swa|teacher|target)([._]|$)")


def recognise(names, path):
    """Return {prefix: Format} for the models among these tensor names.

    Raises
    ------
    InputError
        If there are none.
    """
    found = {}
    for name in names:
        for known in FORMATS:
            at_root = re.search(rf"(?:^|[./])({known.root})$", name)
            inner = under(name[:at_root.start(1)], names) if at_root else ()
            if inner and all(any(re.search(mark, one) for one in inner) for mark in known.marks):
                found[_whole_prefix(name, at_root[1], inner, known)] = known
                break
    if not found:
        _refuse_known([WRAPPED.sub("", name) for name in names], path)
        raise InputError(f"{path} holds {len(names)} tensors such as {next(iter(names), 'none')}, which match no known "
                         f"format; expected a ViT, DeiT, MAE, BEiT, Swin, ResNet or ConvNeXt with the tensor names of "
                         f"torchvision, timm, transformers, facebookresearch, microsoft or Google's npz files")
    return found


def _whole_prefix(name, root, inner, known):
    """Return the prefix of a model, given the name of its first layer's weight.

    `root` is that name without the prefix. transformers' own prefix ("vit.") counts as part of the names, provided
    that all tensors outside it also have names of the format.
    """
    own, place = re.match(ROOT, root)[0], len(name) - len(root)
    if known.library == "transformers" and any(not one.startswith(own) and not any(
            re.fullmatch(pattern, one) for pattern, _ in (*known.names, *known.drops, BESIDE)) for one in inner):
        place += len(own)
    return name[:place]


def under(prefix, names):
    """Return the names that begin with a prefix, without it."""
    return [name[len(prefix):] for name in names if name.startswith(prefix)]


def parent_of(prefix):
    """Return a prefix without its last part: "model." for "model.vit."."""
    return re.sub(r"[^./]*[./]$", "", prefix)


def chosen_prefix(found, state, path):
    """Return (the prefix of the model to use, a description of the choice or "").

    Raises
    ------
    InputError
        If there are several models and none is preferred.
    """
    first = next(iter(found))
    if len(found) == 1:
        return first, ""
    parts = [{name: state[prefix + name] for name in under(prefix, state)} for prefix in found]
    if all(part.keys() == parts[0].keys() and all(torch.equal(part[name], parts[0][name]) for name in part)
           for part in parts[1:]):  # one module under two names
        return min(found, key=len), ""
    best = [prefix for prefix in found if TAKEN_FIRST.search(prefix)]
    listed = " and ".join(repr(prefix) for prefix in found)
    if len(best) != 1:
        raise InputError(f"{path} holds {len(found)} models, under {listed}; save only the state_dict of the model "
                         f"that you want")
    check_average(best[0], dict(zip(found, parts, strict=True)), path)
    return best[0], f"of the models under {listed}, {best[0]!r} was used, usually the averaged weights"


def check_average(name, models, path):
    """Raise InputError if a model cannot be an average of another, because their shapes differ.

    `models` is {name: state dict}.
    """
    shapes = {key: Counter(tuple(value.shape) for value in model.values() if isinstance(value, torch.Tensor)
                           and value.ndim) for key, model in models.items()}
    for other in shapes:
        if not shapes[name] <= shapes[other]:
            raise InputError(f"{path} holds models of different shapes, under {other!r} and {name!r}; save only the "
                             f"state_dict of the model that you want")


def _refuse_known(names, path):
    """Raise InputError for the names of an architecture that is known but cannot be loaded."""
    for pattern, reason in REFUSED:
        if any(re.search(pattern, name) for name in names):
            raise InputError(f"{path} is {reason}")
    if {"beit.layernorm.weight", "layernorm.weight", "lm_head.weight"} <= {*names}:
        raise InputError(f"{path} is a BEiT for masked images with use_mean_pooling=false, which has two norms before "
                         f"its lm_head, beit.layernorm and layernorm; MaskedTokenModel has one, so use a model with "
                         f"use_mean_pooling=true")
    if any(re.search(r"attn\.q_bias$|^beit\.|lambda_1$", name) for name in names) and not any(
            name.endswith(TABLE) for name in names):
        raise InputError(f"{path} is a BEiT or EVA without tables of relative positions, which BEiT needs here")
    if "blocks.0.gamma_1" in names and "pos_embed" not in names and not any(name.endswith(TABLE) for name in names):
        raise InputError(f"{path} has DeiT-III's names but no positions, so it is a RoPE-ViT, whose rotation "
                         f"VisionTransformer does not have")


def translate(state, path, around):
    """Translate a state dict in any of the FORMATS to our names, in float32 or higher precision.

    The model may be stored under one prefix; everything outside it is dropped.

    Parameters
    ----------
    state : dict
        The state dict.
    path : path
        The file, for messages.
    around : list of str
        Keys under which the state dict was found.

    Returns
    -------
    Weights

    Raises
    ------
    InputError
        If there is no model, if there are several and none is preferred, or if a tensor does not fit.
    """
    found = recognise(state, path)
    prefix, choice = chosen_prefix(found, state, path)
    for start in (parent_of(prefix), prefix):
        _refuse_known(under(start, state), path)
    weights = Weights(str(path), found[prefix], [*around, *re.findall(r"[^./]*[./]", prefix)],
                      choices=[choice] * bool(choice))
    whole, state = state, {name: state[prefix + name] for name in under(prefix, state)}
    drop_outside(weights, prefix, whole)
    for name, tensor in state.items():
        drops = (*weights.format.drops, BESIDE)
        if reason := next((reason for pattern, reason in drops if re.fullmatch(pattern, name)), None):
            weights.dropped[name] = reason
            continue
        if tensor.is_floating_point() and tensor.element_size() < 4:
            tensor = tensor.float()
        ours = next((re.sub(pattern, new, name) for pattern, new in weights.format.names
                     if re.fullmatch(pattern, name)), name)
        if weights.format.name == "Google's npz":
            if re.search(r"\.attn\.q\.kernel$", ours) and tensor.ndim == 3:
                weights.n_heads = tensor.shape[1]
            ours, tensor = _from_flax(ours, tensor)
        if re.search(r"\.ls\.gamma$|\.mlp\.fc\d\.weight$", ours):  # (C, 1, 1), and 1 x 1 convolutions
            tensor = tensor.flatten(ours.count("weight")) if tensor.shape[-2:] == (1, 1) else tensor
        if ours in weights.tensors:
            raise InputError(f"{path} is damaged: {name} and {weights.sources[ours][0]} map to the same tensor "
                             f"of the model")
        weights.tensors[ours], weights.sources[ours] = tensor, [name]
    _join_qkv(weights)
    _take_head(weights, parent_of(prefix), parent_of(prefix) in found, whole)
    weights.choices += [text] if (text := beside(weights.dropped)) else []
    if "cls_token" in weights.tensors and "blocks.0.attn.q_norm.weight" in weights.tensors:
        # q_norm has the width of one head
        weights.n_heads = weights.tensors["cls_token"].shape[-1] // len(weights.tensors["blocks.0.attn.q_norm.weight"])
    if weights.format.holds in BEITS:  # a table has one column for each head
        weights.n_heads = next(tensor.shape[1] for name, tensor in weights.tensors.items() if name.endswith(TABLE))
    for name, tensor in weights.tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{path} is damaged: {weights.sources[name][0]} holds values that are not finite")
    return weights


def drop_outside(weights, prefix, state):
    """Mark the tensors of a state dict that are outside the model's prefix as dropped."""
    for name in state:
        if not name.startswith(prefix):
            counter = re.fullmatch(AVERAGED[0], name)
            weights.dropped[name] = AVERAGED[1] if counter else f"{OUTSIDE}, which is under {prefix!r}"


def beside(dropped):
    """Describe the dropped tensors that are outside the model, heads first; "" if there are none."""
    names = [name for name, reason in dropped.items() if reason == BESIDE[1] or reason.startswith(OUTSIDE)]
    heads = [name for name in names if re.search(rf"(^|[._/]){HEAD}", name)]
    parts = [f"dropped {what}: {found[0]}{f' and {len(found) - 1} more' if found[1:] else ''}" for what, found in (
        ("from a head", heads), (OUTSIDE, [name for name in names if name not in heads])) if found]
    return "; ".join(parts)


OUTSIDE = "outside the model"  # how the reason for dropping its tensors begins
HEAD = r"(heads?|classifier|fc|linear|linear_head)\."


def _take_head(weights, parent, is_anothers, state):
    """Use a single linear layer under a different name as the model's head.

    The layer may be inside a Sequential, for example after dropout, or outside the model, in a module that holds a
    backbone and a head. A head outside the model is preferred to the model's own.

    `parent` is the prefix of a head outside the model; is_anothers is True if another model is stored there.
    """
    tensors = weights.tensors
    inside = {name: weights.sources[name][0] for name in tensors if re.match(HEAD, name)}
    outside = {name[len(parent):]: name for name, reason in weights.dropped.items() if reason.startswith(OUTSIDE)
               and not is_anothers and name.startswith(parent) and re.match(HEAD, name[len(parent):])}
    for found, held in ((inside, dict(tensors)), (outside, {name: state[outside[name]] for name in outside})):
        groups = [[name for name in found if name.split(".")[0] == root] for root in {n.split(".")[0] for n in found}]
        layers = [layer for layer in map(_only_layer, groups) if layer
                  and held[f"{layer}.weight"].shape[1:] == (_n_features(tensors),)]
        if len(layers) != 1 or (found is inside and layers == ["head"]):
            if found and found is outside and "head.weight" in tensors:
                raise InputError(f"{weights.path} has two heads, {next(iter(found.values()))} outside the model, which "
                                 f"is not a linear layer on its features, and {weights.sources['head.weight'][0]} "
                                 f"inside it; save only the state_dict of the model")
            continue
        own = [name for name in ("head.weight", "head.bias") if found is outside and name in tensors]
        for name in own:
            del tensors[name]
            weights.dropped[weights.sources.pop(name)[0]] = "the model's own head, replaced by the one outside it"
        for kind in ("weight", "bias"):
            name = f"{layers[0]}.{kind}"
            if name in found:
                for place in (tensors, weights.sources):
                    place.pop(name, None)
                weights.dropped.pop(found[name], None)
                tensors[f"head.{kind}"], weights.sources[f"head.{kind}"] = held[name].float(), [found[name]]
        if found is outside:
            weights.choices.append(f"{parent}{layers[0]}, outside the model, was used as its head"
                                   f"{', and its own was dropped' if own else ''}")


def _only_layer(names):
    """Return the layer that these weight and bias tensors belong to, or None if there are other tensors."""
    layers = {name.rpartition(".")[0] for name in names}
    kinds = {name.rpartition(".")[2] for name in names}
    return layers.pop() if len(layers) == 1 and {"weight"} <= kinds <= {"weight", "bias"} else None


def _n_features(tensors):
    """Return the number of features: the width of a ViT, or the channels of a CNN's last stage."""
    if "cls_token" in tensors:
        return tensors["cls_token"].shape[-1]
    blocks = [(*(int(n or 0) for n in place.groups()), len(tensors[name])) for name in tensors
              if (place := re.fullmatch(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.(?:bn|norm)(\d?)\.weight", name))]
    return max(blocks)[-1] if blocks else None


def _from_flax(name, array):
    """Return a tensor of Google's npz under our name and in torch's layout (out before in).

    Flax has dense kernels as (in, out), convolutions as (P, P, C, D), queries, keys and values as (D, H, K) with biases
    (H, K), and the projection after the heads as (H, K, D).
    """
    stem, _, kind = name.rpartition(".")
    if kind not in NPZ_KIND:
        return name, array
    if kind == "kernel":
        if array.ndim == 4:
            array = array.permute(3, 2, 0, 1)  # (D, C, P, P)
        elif stem.endswith("attn.proj"):
            array = array.flatten(0, 1).T  # (D, H * K)
        elif array.ndim == 3:
            array = array.flatten(1).T  # (H * K, D)
        else:
            array = array.T  # (out, in)
    elif array.ndim == 2:
        array = array.flatten()  # (H * K)
    return f"{stem}.{NPZ_KIND[kind]}", array.contiguous()


def _join_qkv(weights):
    """Join separate queries, keys and values into one tensor, in the order q, k, v.

    BEiT's keys have no bias, which is equivalent to a bias of zeros.
    """
    for name in [name for name in weights.tensors if name.endswith(".attn.q.bias") and weights.format.holds in BEITS]:
        keys = name.replace(".attn.q.", ".attn.k.")
        weights.sources.setdefault(keys, [])
        weights.tensors.setdefault(keys, torch.zeros_like(weights.tensors[name]))
    for name in [name for name in weights.tensors if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        missing = [part for part in parts if part not in weights.tensors]
        if missing or len({(weights.tensors[part].shape, weights.tensors[part].dtype) for part in parts}) > 1:
            raise InputError(f"{weights.path} is damaged: queries, keys and values do not fit together at "
                             f"{weights.sources[name][0]}")
        joined = name.replace(".attn.q.", ".attn.qkv.")
        weights.sources[joined] = [source for part in parts for source in weights.sources.pop(part)]
        weights.tensors[joined] = torch.cat([weights.tensors.pop(part) for part in parts])
