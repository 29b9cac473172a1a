"""Compute the [CLS] row of one block's attention without the T x T map.

Input: the attention module of a transformer block; a pre-hook sees its input while the model runs
its fused kernel. Output: attention of the [CLS] query to every patch. ``teachers.teacher`` uses it;
the row weights the tokens of the distillation loss.

The hook computes one query and all keys again with the module's own projections. This costs about a
sixth of the block's attention and almost no memory.

Legend: B batch, T tokens, P prefix tokens ([CLS], then registers), N = T - P patches, H heads,
K width of a head, C width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from movekd.errors import ConfigError

_KNOWN = {
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.models.eva.EvaAttention",
    "timm.models.vision_transformer.Attention",
    "transformers.models.clip.modeling_clip.CLIPAttention",
    "transformers.models.deit.modeling_deit.DeiTAttention",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Attention",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
    ".Dinov2WithRegistersAttention",
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention",
    "transformers.models.vit.modeling_vit.ViTAttention",
    "transformers.models.vit_msn.modeling_vit_msn.ViTMSNAttention",
}
"""Classes that compute softmax(q k^T), with or without a rotary embedding.

Other classes may have terms that this file would silently miss: BEiT adds a relative position bias
to the logits.
"""


Rope = Tensor | tuple[Tensor, Tensor]
"""Argument of a block that holds a rotary embedding: timm's (N, 2 K), or cos and sin."""


def class_path(module: nn.Module) -> str:
    """Return the full name of a module's class, ``package.module.Class``."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def find_attention(block: nn.Module) -> nn.Module:
    """Return the attention module inside a transformer block.

    Raises:
        ConfigError: the block has none of a known class.
    """
    for module in block.modules():
        if class_path(module) in _KNOWN:
            return module
    known = ", ".join(sorted({name.rsplit(".", 1)[1] for name in _KNOWN}))
    raise ConfigError(
        f"cls_attention cannot be read from blocks of type {type(block).__name__}; known attention "
        f"classes: {known}. Set cls_attention: false."
    )


def watch_cls_attention(
    attention: nn.Module, num_prefix: int, keep: Callable[[Tensor], None]
) -> RemovableHandle:
    """Call ``keep`` with the [CLS] row at every forward pass; the handle removes the hook.

    Args:
        attention: what ``find_attention`` returned.
        num_prefix: P, the tokens before the patches; the [CLS] token is the first.
        keep: called with cls_attention_BHN, float32. Rows are a softmax over all T tokens with
            the P prefix columns dropped, so they sum to less than 1.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # CLIP passes hidden_states by keyword, DINOv2 and timm by position.
        hidden_BTC = args[0] if args else kwargs["hidden_states"]
        rope = kwargs.get("rope", kwargs.get("position_embeddings"))
        keep(cls_attention_row(module, hidden_BTC, num_prefix, rope))

    return attention.register_forward_pre_hook(hook, with_kwargs=True)


def cls_attention_row(
    attention: nn.Module, hidden_BTC: Tensor, num_prefix: int, rope: Rope | None = None
) -> Tensor:
    """Return cls_attention_BHN, float32, for the input that ``attention`` is about to see.

    Args:
        attention: what ``find_attention`` returned.
        hidden_BTC: its input, after the block's first norm.
        num_prefix: P, the tokens before the patches.
        rope: the rotary embedding of the patches, as the block gets it.
    """
    module: Any = attention
    num_heads = int(getattr(module, "num_heads", 0) or module.num_attention_heads)
    query_B1C, keys_BTC = _query_and_keys(module, hidden_BTC)
    batch, num_tokens, _ = keys_BTC.shape
    query_BH1K = query_B1C.view(batch, 1, num_heads, -1).transpose(1, 2)
    keys_BHTK = keys_BTC.view(batch, num_tokens, num_heads, -1).transpose(1, 2)
    if hasattr(module, "q_norm"):
        query_BH1K, keys_BHTK = module.q_norm(query_BH1K), module.k_norm(keys_BHTK)
    if rope is not None:
        keys_BHTK = _rotate(keys_BHTK, rope, num_prefix, bool(getattr(module, "rotate_half", 0)))
    logits_BHT = (query_BH1K * query_BH1K.shape[-1] ** -0.5 @ keys_BHTK.transpose(-2, -1))[:, :, 0]
    row_BHT: Tensor = logits_BHT.float().softmax(dim=-1)
    return row_BHT[..., num_prefix:]


def _query_and_keys(module: Any, hidden_BTC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the projected [CLS] query (B, 1, C) and all keys (B, T, C)."""
    cls_B1C = hidden_BTC[:, :1]
    if getattr(module, "qkv", None) is None:
        return module.q_proj(cls_B1C), module.k_proj(hidden_BTC)
    weight_q, weight_k, _ = module.qkv.weight.chunk(3)
    bias = module.qkv.bias
    if bias is None and getattr(module, "q_bias", None) is not None:
        bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))  # EVA has three biases
    bias_q, bias_k, _ = (None, None, None) if bias is None else bias.chunk(3)
    return (
        functional.linear(cls_B1C, weight_q, bias_q),
        functional.linear(hidden_BTC, weight_k, bias_k),
    )


def _rotate(keys_BHTK: Tensor, rope: Rope, num_prefix: int, is_half: bool) -> Tensor:
    """Rotate the patches' keys as the library does; prefix tokens, [CLS] included, stay."""
    patches_BHNK = keys_BHTK[:, :, num_prefix:]
    if isinstance(rope, tuple):  # transformers rotates channel j with j + K/2
        cos_NK, sin_NK = rope
        first, second = patches_BHNK.chunk(2, dim=-1)
        rotated_BHNK = patches_BHNK * cos_NK + torch.cat((-second, first), dim=-1) * sin_NK
    else:
        from timm.layers import apply_rot_embed_cat

        rotated_BHNK = apply_rot_embed_cat(patches_BHNK, rope, half=is_half)
    return torch.cat((keys_BHTK[:, :, :num_prefix], rotated_BHNK.type_as(keys_BHTK)), dim=2)
