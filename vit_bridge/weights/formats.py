"""How other libraries and papers name the weights of a ViT, a ResNet or a ConvNeXt, and those names in ours.

    weights = translate(state, path, around)     a state dict in our names, and what was dropped on the way

FORMATS holds what is known, REFUSED what is known and cannot be held. The tests build each library's own model at
random, save it in its own format and compare features; for the formats that no package writes (Google's npz,
DeiT-III, DINO and DINOv2, MAE) the layout is that of their published code, and benchmarks/RESULTS.md says what was
checked against what.

Shapes:  D width, H heads, K = D / H width of a head, P patch side, C channels.
"""

import re
from dataclasses import dataclass, field

import torch

from vit_bridge.errors import InputError


@dataclass(frozen=True)
class Format:
    """A way of naming the weights of a model.

    marks    patterns: a file is of this format where each of them is found in some name
    names    (pattern, our name), the first that matches the whole name; a name that none matches stays
    drops    (pattern, reason): what the model has no use for
    note     what the names do not show; the report of every such file says it
    holds    the class of ours that it is
    """
    name: str
    marks: tuple
    names: tuple = ()
    drops: tuple = ()
    norm_eps: float | None = 1e-6  # what the format's library adds to variances; None: as the model has it
    pos_cls: bool | None = None  # whether positions begin with that of CLS; None: seen from their number
    note: str = ""
    holds: str = "VisionTransformer"


# What wrappers and pre-training leave in a file.
AVERAGED = (r"n_averaged", "a counter of averaged steps")
PRE_LOGITS = (r"(heads\.)?pre_logits[./].*", "a layer between the features and the head of its pre-training")
MASK = (r"(.*\.)?mask_token", "stands for hidden patches in pre-training")
BLOCK = r"(?:vit|deit|dinov2|dinov2_with_registers)?\.?(?:encoder\.)?layers?\.(\d+)\."
ROOT = r"(?:vit|deit|dinov2|dinov2_with_registers)?\.?"
TRANSFORMERS_NAMES = (
    (ROOT + r"embeddings\.cls_token", "cls_token"),
    (ROOT + r"embeddings\.register_tokens", "reg_token"),
    (ROOT + r"embeddings\.position_embeddings", "pos_embed"),
    (ROOT + r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (BLOCK + r"(?:layernorm_before|norm1)\.(\w+)", r"blocks.\1.norm1.\2"),
    (BLOCK + r"(?:layernorm_after|norm2)\.(\w+)", r"blocks.\1.norm2.\2"),
    (BLOCK + r"attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (BLOCK + r"attention\.(?:output\.dense|o_proj)\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (BLOCK + r"(?:output\.dense|mlp\.fc2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (ROOT + r"layernorm\.(\w+)", r"norm.\1"),
    (r"classifier\.(\w+)", r"head.\1"),
)
TRANSFORMERS_DROPS = ((ROOT + r"pooler\..*", "a dense layer that the head for classes does not read"), MASK,
                      (r"decoder\..*", "MAE's decoder, for pre-training"))
TV_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
NPZ_BLOCK = r"Transformer/encoderblock_(\d+)/"
NPZ_KIND = {"kernel": "weight", "scale": "weight", "bias": "bias"}

# Blocks of CNNs, by (stage, block, ...) or (stage, ...); torchvision counts a ResNet's stages from 1, and a ConvNeXt's
# together with what stands before them.
RESNET = r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\."
RESNET_HEAD = ((r"(?:fc|linear|classifier\.1)\.(\w+)", r"head.\1"),)
CONVNEXT = r"(?:convnext\.)?"
CONVNEXT_STAGE = CONVNEXT + r"encoder\.stages\.(\d+)\."
CNN_FORMATS = (
    Format("torchvision's ResNet", (r"^conv1\.weight$", r"^layer1\.0\.conv2\.weight$"), (
        (r"conv1\.(\w+)", r"stem.0.\1"),
        (r"bn1\.(\w+)", r"stem.1.\1"),
        *((rf"layer{i + 1}\.(\d+)\.downsample\.(.*)", rf"stages.{i}.\1.shortcut.\2") for i in range(4)),
        *((rf"layer{i + 1}\.(.*)", rf"stages.{i}.\1") for i in range(4)),
        *RESNET_HEAD), (AVERAGED,), norm_eps=None, holds="ConvNet", note="timm's resnetaa and resnetblur have these "
           "names too, and what they smooth leaves no trace in them: do not load one"),
    Format("transformers ResNet", (r"embedder\.embedder\.convolution\.weight$", RESNET), (
        (r"(?:resnet\.)?embedder\.embedder\.convolution\.(\w+)", r"stem.0.\1"),
        (r"(?:resnet\.)?embedder\.embedder\.normalization\.(\w+)", r"stem.1.\1"),
        (RESNET + r"shortcut\.convolution\.(\w+)", r"stages.\1.\2.shortcut.0.\3"),
        (RESNET + r"shortcut\.normalization\.(\w+)", r"stages.\1.\2.shortcut.1.\3"),
        *((RESNET + rf"layer\.{i}\.{kind}\.(\w+)", rf"stages.\1.\2.{ours}{i + 1}.\3")
          for i in range(3) for kind, ours in (("convolution", "conv"), ("normalization", "bn"))),
        *RESNET_HEAD), (AVERAGED,), norm_eps=None, holds="ConvNet"),
    Format("our names of a ConvNet", (r"^stem\.0\.weight$", r"^stages\.0\.0\.conv2\.weight$"), (), (AVERAGED,),
           norm_eps=None, holds="ConvNet"),
    Format("torchvision's ConvNeXt", (r"^features\.0\.0\.weight$", r"^features\.1\.0\.block\.0\.weight$"), (
        (r"features\.0\.(.*)", r"stem.\1"),
        *((rf"features\.{2 * i + 1}\.(\d+)\.{theirs}(.*)", rf"stages.{i}.blocks.\1.{ours}\2") for i in range(4)
          for theirs, ours in ((r"block\.0\.", "conv_dw."), (r"block\.2\.", "norm."), (r"block\.3\.", "mlp.fc1."),
                               (r"block\.5\.", "mlp.fc2."), ("layer_scale", "ls.gamma"))),
        *((rf"features\.{2 * i}\.(.*)", rf"stages.{i}.downsample.\1") for i in range(1, 4)),
        (r"classifier\.0\.(\w+)", r"norm.\1"),
        (r"classifier\.2\.(\w+)", r"head.\1")), (AVERAGED,), holds="ConvNeXt"),
    Format("timm's names of a ConvNeXt", (r"^stem\.0\.weight$", r"^stages\.0\.blocks\.0\.conv_dw\.weight$"), (
        (r"(stages\.\d+\.blocks\.\d+)\.gamma", r"\1.ls.gamma"),
        (r"head\.norm\.(\w+)", r"norm.\1"),
        (r"head\.fc\.(\w+)", r"head.\1")), (AVERAGED,), holds="ConvNeXt"),
    Format("facebookresearch's ConvNeXt", (r"^downsample_layers\.0\.0\.weight$", r"^stages\.0\.0\.dwconv\.weight$"), (
        (r"downsample_layers\.0\.(.*)", r"stem.\1"),
        (r"downsample_layers\.(\d+)\.(.*)", r"stages.\1.downsample.\2"),
        (r"stages\.(\d+)\.(\d+)\.dwconv\.(\w+)", r"stages.\1.blocks.\2.conv_dw.\3"),
        (r"stages\.(\d+)\.(\d+)\.pwconv(\d)\.(\w+)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
        (r"stages\.(\d+)\.(\d+)\.gamma", r"stages.\1.blocks.\2.ls.gamma"),
        (r"stages\.(\d+)\.(\d+)\.(.*)", r"stages.\1.blocks.\2.\3")), (AVERAGED,), holds="ConvNeXt"),
    Format("transformers ConvNext", (r"embeddings\.patch_embeddings\.weight$", r"layers\.0\.dwconv\.weight$"), (
        (CONVNEXT + r"embeddings\.patch_embeddings\.(\w+)", r"stem.0.\1"),
        (CONVNEXT + r"embeddings\.layernorm\.(\w+)", r"stem.1.\1"),
        (CONVNEXT_STAGE + r"downsampling_layer\.(.*)", r"stages.\1.downsample.\2"),
        (CONVNEXT_STAGE + r"layers\.(\d+)\.dwconv\.(\w+)", r"stages.\1.blocks.\2.conv_dw.\3"),
        (CONVNEXT_STAGE + r"layers\.(\d+)\.layernorm\.(\w+)", r"stages.\1.blocks.\2.norm.\3"),
        (CONVNEXT_STAGE + r"layers\.(\d+)\.pwconv(\d)\.(\w+)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
        (CONVNEXT_STAGE + r"layers\.(\d+)\.layer_scale_parameter", r"stages.\1.blocks.\2.ls.gamma"),
        (CONVNEXT + r"layernorm\.(\w+)", r"norm.\1"),
        (r"classifier\.(\w+)", r"head.\1")), (AVERAGED,), holds="ConvNeXt",
           note="its code adds 1e-12 to the variance in the last norm; here it is 1e-6, as in the paper's code"),
)
FORMATS = (
    Format("torchvision", (r"^conv_proj\.weight$", r"^class_token$"), (
        (r"class_token", "cls_token"),
        (r"encoder\.pos_embedding", "pos_embed"),
        (r"conv_proj\.(\w+)", r"patch_embed.proj.\1"),
        (TV_BLOCK + r"ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
        (TV_BLOCK + r"self_attention\.in_proj_(\w+)", r"blocks.\1.attn.qkv.\2"),
        (TV_BLOCK + r"self_attention\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
        (TV_BLOCK + r"mlp\.(?:0|linear_1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (TV_BLOCK + r"mlp\.(?:3|linear_2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
        (r"encoder\.ln\.(\w+)", r"norm.\1"),
        (r"heads\.head\.(\w+)", r"head.\1")), (PRE_LOGITS, AVERAGED), pos_cls=True),
    Format("transformers Dinov2", (r"embeddings\.patch_embeddings\.projection\.weight$", r"layer_scale1\.lambda1$"),
           TRANSFORMERS_NAMES, (*TRANSFORMERS_DROPS, AVERAGED), pos_cls=True),
    Format("transformers ViT", (r"embeddings\.patch_embeddings\.projection\.weight$",),
           TRANSFORMERS_NAMES, (*TRANSFORMERS_DROPS, AVERAGED), norm_eps=1e-12, pos_cls=True),
    Format("Google's npz", (r"^embedding/kernel$", NPZ_BLOCK), (
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
           note="its code takes flax's GELU, an approximation by tanh; here it is the exact one, as in timm"),
    Format("MAE with its decoder", (r"^decoder_embed\.weight$", r"^patch_embed\.proj\.weight$"), (),
           (MASK, (r"decoder_.*", "MAE's decoder, for pre-training"), AVERAGED), pos_cls=True),
    Format("DeiT-III", (r"^blocks\.0\.gamma_1$",), ((r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),),
           (AVERAGED,), pos_cls=False, note="RoPE-ViT has the names of DeiT-III too, and its rotation leaves no trace "
           "in them: do not load one"),
    Format("DINOv2", (r"^mask_token$", r"^blocks\.0\.ls1\.gamma$"), ((r"register_tokens", "reg_token"),),
           (MASK, AVERAGED), pos_cls=True),
    Format("DINO in training", (r"^backbone\.patch_embed\.proj\.weight$",), (
        (r"backbone\.register_tokens", "reg_token"), (r"backbone\.(.*)", r"\1")),
           ((r"(backbone\.)?mask_token", MASK[1]),
            (r"(head|dino_head|ibot_head)\.(mlp|last_layer)\b.*", "DINO's projection head, for pre-training")),
           pos_cls=True),
    Format("timm's names (timm, DeiT, DINO, MAE's encoder)", (r"^patch_embed\.proj\.weight$", r"^blocks\.0\.attn\.qkv"),
           (), (MASK, PRE_LOGITS, AVERAGED)),
    *CNN_FORMATS,
)
# What is known and cannot be held: a pattern found in some name, and why.
SWIN = "a Swin Transformer or a relative of it, whose windows and stages VisionTransformer does not have"
REFUSED = (
    (r"dist_token|distillation_token|^head_dist\.", "a distilled DeiT, whose second class token VisionTransformer "
     "does not have; take the DeiT without distillation"),
    (r"(^|\.)layers\.\d+\.blocks\.\d+\.|^swin|^stages\.\d+\.blocks\.\d+\.attn|"
     r"^features\.\d+\.\d+\.attn\.relative_position", SWIN),
    (r"^conv1\.\d+\.weight|(^|\.)attnpool\.", "a ResNet with several convolutions before its stages (ResNet-C, "
     "ResNet-D, CLIP's), where ConvNet has one"),
    (r"^layer\d\.\d+\.conv\d\.(conv|paths|attn|fc\d)", "a ResNet with blocks of several paths (SK, ResNeSt), which "
     "ConvNet does not have"),
    (r"^layer\d\.\d+\.(se|se_module|attn|eca)\.", "a ResNet whose blocks weigh their channels (SE, ECA), as ConvNet's "
     "do not"),
    (r"^stem\.conv\d?\.weight$|^root\.conv", "a ResNet V2 (BiT) or another CNN, whose stem and blocks ConvNet does not "
     "have"),
    (r"\.grn\.", "a ConvNeXt V2, whose response normalisation (GRN) ConvNeXt does not have"),
    (r"relative_position_bias|attn\.q_bias$|^beit\.", "a BEiT or EVA, whose relative positions or biases "
     "VisionTransformer does not have"),
    (r"visual\.class_embedding|vision_model\.embeddings|^norm_pre\.", "a CLIP or SigLIP, which normalises before its "
     "first block or pools by attention, or a ConvNeXt that normalises before it pools, as the models here do not"),
    (r"mlp\.(w12|weights_in|gate_proj)\.", "a ViT with gated MLPs (DINOv2 giant), which VisionTransformer does not "
     "have"),
    (r"(^|\.)(rope|rotary)", "a ViT with rotary positions, which VisionTransformer does not have"),
    (r"^fc_norm\.", "a ViT that normalises its features after the mean over tokens (fc_norm); VisionTransformer "
     "normalises before, which is another function"),
    (r"Transformer/encoderblock/|MAPHead", "a big_vision file with stacked blocks or a pooling head, which "
     "VisionTransformer does not have"),
)


@dataclass
class Weights:
    """A file in our names: tensors; which name of the file each comes from; what was dropped, and why."""
    path: str
    format: Format
    around: list
    tensors: dict = field(default_factory=dict)
    sources: dict = field(default_factory=dict)
    dropped: dict = field(default_factory=dict)
    n_heads: int | None = None  # where the file records it
    model: object = None  # built from the file, where save_model wrote it


def recognise(names, path):
    """The Format of a file with these names. Raises InputError where it is known but cannot be held, or unknown."""
    for pattern, reason in REFUSED:
        if any(re.search(pattern, name) for name in names):
            raise InputError(f"{path} is {reason}")
    if "blocks.0.gamma_1" in names and "pos_embed" not in names:
        raise InputError(f"{path} has DeiT-III's names and no positions, so it is a RoPE-ViT, whose rotation "
                         f"VisionTransformer does not have")
    for known in FORMATS:
        if all(any(re.search(mark, name) for name in names) for mark in known.marks):
            return known
    raise InputError(f"{path} holds {len(names)} tensors such as {next(iter(names), 'none')}, of no format that is "
                     f"known; expected one of: {', '.join(known.name for known in FORMATS)}")


def translate(state, path, around):
    """A state dict of any of the FORMATS as Weights, in float32 or wider. Raises InputError where a tensor cannot be
    placed."""
    names = {re.sub(r"^(opt/target|params)/", "", name): name for name in state}
    if len(names) < len(state):
        twice = next(name for name in state if name not in names.values())
        raise InputError(f"{path} is damaged: it holds {twice} twice, with what is before its name and without")
    state = {name: state[source] for name, source in names.items()}
    weights = Weights(str(path), recognise(state, path), around)
    for name, tensor in state.items():
        reason = next((reason for pattern, reason in weights.format.drops if re.fullmatch(pattern, name)), None)
        if reason:
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
        if re.search(r"\.ls\.gamma$|\.mlp\.fc\d\.weight$", ours):  # (C, 1, 1), and convolutions of 1 x 1
            tensor = tensor.flatten(ours.count("weight")) if tensor.shape[-2:] == (1, 1) else tensor
        if ours in weights.tensors:
            raise InputError(f"{path} is damaged: {name} and {weights.sources[ours][0]} are the same tensor of a ViT")
        weights.tensors[ours], weights.sources[ours] = tensor, [name]
    _join_qkv(weights)
    if "cls_token" in weights.tensors and "blocks.0.attn.q_norm.weight" in weights.tensors:  # as wide as a head
        weights.n_heads = weights.tensors["cls_token"].shape[-1] // len(weights.tensors["blocks.0.attn.q_norm.weight"])
    for name, tensor in weights.tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{path} is damaged: {weights.sources[name][0]} holds values that are not finite")
    return weights


def _from_flax(name, array):
    """A tensor of Google's npz under our name and in torch's layout (out before in).

    Kernels there: dense (in, out); convolution (P, P, C, D); queries, keys, values (D, H, K), with biases (H, K);
    the projection of the heads (H, K, D).
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
    """Queries, keys and values that come apart, as one tensor: q, then k, then v, as ours has them."""
    for name in [name for name in weights.tensors if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        missing = [part for part in parts if part not in weights.tensors]
        if missing or len({weights.tensors[part].shape for part in parts}) > 1:
            raise InputError(f"{weights.path} is damaged: queries, keys and values do not belong together at "
                             f"{weights.sources[name][0]}")
        joined = name.replace(".attn.q.", ".attn.qkv.")
        weights.sources[joined] = [weights.sources.pop(part)[0] for part in parts]
        weights.tensors[joined] = torch.cat([weights.tensors.pop(part) for part in parts])
