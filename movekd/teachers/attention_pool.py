"""Read attention-pooling heads, which replace [CLS] in SigLIP and other models without that token.

The head attends to all patches with one learned query, its probe, and returns one embedding. Input:
the head, and the network's output tokens. Output: the head's embedding, and the probe's attention
to every patch. ``teachers.teacher`` uses it for ``cls_source: attention_pool``.

Legend: B batch, N patches, H heads, K width of a head, C width.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from movekd.teachers.attention import class_path

_TRANSFORMERS = {
    "transformers.models.siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead",
}
_TIMM = "timm.layers.attention_pool.AttentionPoolLatent"


def find_pool(module: nn.Module) -> nn.Module | None:
    """Return the attention-pooling head of a network if its class is known, else None.

    The head must have one probe, which sees only the patches.
    """
    for inner in module.modules():
        if class_path(inner) in _TRANSFORMERS:
            return inner
        if class_path(inner) == _TIMM:
            head: Any = inner
            return inner if head.latent_len == 1 and head.pool == "token" else None
    return None


def pool(head: nn.Module, patches_BNC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the head's embedding (B, C) and its probe's attention_BHN, float32.

    Args:
        head: what ``find_pool`` returned.
        patches_BNC: the network's output, after its final norm if it has one.

    A row of the attention is a softmax over the patches and sums to 1.
    """
    query_1C, keys_BNC, num_heads = _query_and_keys(head, patches_BNC)
    batch, num_patches, _ = keys_BNC.shape
    query_H1K = query_1C.view(num_heads, 1, -1)
    keys_BHNK = keys_BNC.view(batch, num_patches, num_heads, -1).transpose(1, 2)
    if class_path(head) == _TIMM:
        module: Any = head
        query_H1K, keys_BHNK = module.q_norm(query_H1K), module.k_norm(keys_BHNK)
    scale = query_H1K.shape[-1] ** -0.5
    logits_BHN = (query_H1K * scale @ keys_BHNK.transpose(-2, -1))[:, :, 0]
    embedding_BC: Tensor = head(patches_BNC)
    return embedding_BC, logits_BHN.float().softmax(dim=-1)


def _query_and_keys(head: Any, patches_BNC: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the projected probe (1, C), all keys (B, N, C), and the number of heads."""
    if class_path(head) == _TIMM:
        if head.pos_embed is not None:
            patches_BNC = patches_BNC + head.pos_embed.to(patches_BNC.dtype)
        weight_k, bias_k = head.kv.weight.chunk(2)[0], head.kv.bias
        bias_k = None if bias_k is None else bias_k.chunk(2)[0]
        keys_BNC = functional.linear(patches_BNC, weight_k, bias_k)
        return head.q(head.latent[0]), keys_BNC, head.num_heads
    attention = head.attention  # nn.MultiheadAttention stacks the three projections
    weight_q, weight_k, _ = attention.in_proj_weight.chunk(3)
    bias_q, bias_k, _ = attention.in_proj_bias.chunk(3)
    query_1C = functional.linear(head.probe[0], weight_q, bias_q)
    return query_1C, functional.linear(patches_BNC, weight_k, bias_k), attention.num_heads
