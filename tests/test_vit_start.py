"""The initialisation of a ViT, and images of any size."""

import copy

import pytest
import torch

from vit_model import InputError, VisionTransformer, resize_positions, sincos_positions

# ---- Mimetic initialisation -------------------------------------------------------------------------------


def products(model):
    """Yield (W_q^T W_k of every head (H, D, D), W_proj W_v (D, D)) of each block."""
    H = model.config.n_heads
    for block in model.blocks:
        w_q, w_k, w_v = block.attn.qkv.weight.unflatten(0, (3, H, -1))  # 3 x (H, K, D)
        yield w_q.transpose(1, 2) @ w_k, block.attn.proj.weight @ w_v.flatten(0, 1)


def test_mimetic_init_gives_the_products_of_the_paper():
    torch.manual_seed(0)
    D = 192
    model = VisionTransformer(32, 8, 3, 5, embed_dim=D, depth=2, n_heads=1, init="mimetic")
    for qk, vo in products(model):
        for product, identity, noise in ((qk[0], 0.7, 0.7), (vo, -0.4, 0.4)):
            assert product.diagonal().mean().item() == pytest.approx(identity, abs=0.02)
            rest = product - identity * torch.eye(D)
            assert rest.std().item() == pytest.approx(noise / D**0.5, rel=0.05)
            assert abs(rest.mean().item()) < 1e-3
    assert torch.equal(model.pos_embed, sincos_positions((4, 4), D))


def test_mimetic_init_heads_are_low_rank_with_balanced_factors():
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 3, 5, embed_dim=48, depth=1, n_heads=3, init="mimetic")
    (qk, _), = products(model)
    for product in qk:
        assert torch.linalg.matrix_rank(product) == 16
        trace = product.diagonal().sum().item()
        assert trace > 0.4 * 16  # 16 of the 48 directions hold a part of the identity
    w_q, w_k, _ = model.blocks[0].attn.qkv.weight.unflatten(0, (3, 3, 16))
    torch.testing.assert_close(w_q.norm(dim=2), w_k.norm(dim=2))  # the factors share the singular values evenly


def test_mimetic_init_makes_tokens_attend_to_themselves():
    """The control is the usual initialisation, which attends to all tokens nearly equally."""
    looks = {}
    for init in ("xavier", "mimetic"):
        torch.manual_seed(0)
        model = VisionTransformer(32, 4, 3, 5, embed_dim=64, depth=1, n_heads=2, init=init)
        _, (attention,) = model.forward_features(torch.randn(3, 3, 32, 32), return_attention=True)  # (3, 2, 65, 65)
        looks[init] = attention.diagonal(dim1=2, dim2=3).mean().item() * 65
    assert looks["xavier"] < 2 < 4 < looks["mimetic"]


def test_mimetic_init_takes_registers_and_other_positions():
    model = VisionTransformer(16, 8, 3, 5, embed_dim=12, depth=1, n_heads=2, init="mimetic", n_registers=3)
    assert torch.equal(model.pos_embed, sincos_positions((2, 2), 12)[:, 1:])
    assert VisionTransformer(16, 8, 3, 5, embed_dim=14, depth=1, n_heads=2, init="mimetic", position="none"
                             ).pos_embed is None
    with pytest.raises(InputError, match="embed_dim 14 is not divisible by 4, which init='mimetic' needs"):
        VisionTransformer(16, 8, 3, 5, embed_dim=14, depth=1, n_heads=2, init="mimetic")


# ---- Images of any size -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(position="sincos"), dict(position="none"), dict(n_registers=2)])
def test_any_size_computes_what_a_resized_model_does(options):
    torch.manual_seed(0)
    model = VisionTransformer((12, 20), 4, 3, 5, 12, 2, 3, **options).eval()
    moved = resize_positions(copy.deepcopy(model), (8, 28))
    images = torch.randn(2, 3, 8, 28)
    with pytest.raises(InputError, match="expected 12x20"):
        model(images)
    assert model.any_size is False
    model.any_size = True
    torch.testing.assert_close(model(images), moved(images))
    own = torch.randn(2, 3, 12, 20)
    kept = model(own)
    model.any_size = False
    assert torch.equal(model(own), kept)


def test_any_size_refuses_images_the_patch_does_not_divide():
    model = VisionTransformer(12, 4, 3, 5, 12, 1, 3)
    model.any_size = True
    with pytest.raises(InputError, match="img_size 10x12 is not divisible by patch_size 4x4"):
        model(torch.randn(1, 3, 10, 12))
