"""The eye of DeQA-Score: a vision transformer and an abstractor that sums it up in a few tokens.

mPLUG-Owl2 (Ye et al. 2023, https://arxiv.org/abs/2311.04257, section 3.2). Modules are named as in
the published weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.heads.deqa.config import AbstractorSizes, DeqaConfig, VisionSizes


class VisionModel(nn.Module):
    """Pre-norm ViT with a class token; every token is kept.

    Args:
        sizes: Sizes of the model.
    """

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.embeddings = _Embeddings(sizes)
        self.encoder = _Encoder(_VisionLayer(sizes) for _ in range(sizes.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels ``[N, 3, S, S]`` as tokens ``[N, 1 + grid^2, D]``."""
        tokens: Tensor = self.post_layernorm(self.encoder(self.embeddings(pixels)))
        return tokens


class VisualAbstractor(nn.Module):
    """Learned queries that read the image tokens through layers of cross-attention.

    Args:
        config: Sizes of the whole model.
    """

    def __init__(self, config: DeqaConfig) -> None:
        super().__init__()
        sizes = config.abstractor
        self.query_embeds = nn.Parameter(
            0.02 * torch.randn(1, sizes.num_learnable_queries, sizes.hidden_size)
        )
        self.encoder = _Encoder(
            _AbstractorLayer(sizes, config.grid) for _ in range(sizes.num_hidden_layers)
        )
        self.visual_fc = nn.Linear(sizes.hidden_size, config.hidden_size)
        self.vit_eos = nn.Parameter(0.02 * torch.randn(1, 1, config.hidden_size))

    def forward(self, image: Tensor) -> Tensor:
        """Sum up image tokens ``[N, T, D]`` in Q queries and an end token, ``[N, Q + 1, L]``."""
        size = image.shape[0]
        queries = self.encoder(self.query_embeds.expand(size, -1, -1), image)  # [N, Q, D]
        return torch.cat([self.visual_fc(queries), self.vit_eos.expand(size, -1, -1)], dim=1)


class _Encoder(nn.Module):
    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens: Tensor, *context: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens, *context)
        return tokens


class _Embeddings(nn.Module):
    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        width, patch = sizes.hidden_size, sizes.patch_size
        tokens = 1 + (sizes.image_size // patch) ** 2
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position_embedding = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.pre_layernorm = nn.LayerNorm(width, eps=sizes.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # [N, grid^2, D]
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        normalised: Tensor = self.pre_layernorm(tokens + self.position_embedding)
        return normalised


class _VisionLayer(nn.Module):
    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.self_attn = _VisionAttention(sizes)
        self.input_layernorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)
        self.mlp = _VisionMlp(sizes)
        self.post_attention_layernorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.self_attn(self.input_layernorm(tokens))
        return tokens + self.mlp(self.post_attention_layernorm(tokens))


class _VisionAttention(nn.Module):
    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.heads = sizes.num_attention_heads
        self.query_key_value = nn.Linear(sizes.hidden_size, 3 * sizes.hidden_size)
        self.dense = nn.Linear(sizes.hidden_size, sizes.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.query_key_value(tokens).unflatten(2, (self.heads, 3, -1))  # [N, T, H, 3, D/H]
        query, key, value = mixed.permute(3, 0, 2, 1, 4)  # each [N, H, T, D/H]
        read = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.dense(merge_heads(read))
        return out


class _VisionMlp(nn.Module):
    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.hidden_size, sizes.intermediate_size)
        self.fc2 = nn.Linear(sizes.intermediate_size, sizes.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        inner = self.fc1(tokens)
        out: Tensor = self.fc2(inner * torch.sigmoid(1.702 * inner))  # QuickGELU
        return out


class _AbstractorLayer(nn.Module):
    def __init__(self, sizes: AbstractorSizes, grid: int) -> None:
        super().__init__()
        self.crossattention = _CrossAttentionBlock(sizes, grid)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        out: Tensor = self.crossattention(queries, image)
        return out


class _CrossAttentionBlock(nn.Module):
    def __init__(self, sizes: AbstractorSizes, grid: int) -> None:
        super().__init__()
        self.attention = _CrossAttention(sizes, grid)
        self.output = _CrossOutput(sizes)
        self.norm1 = nn.LayerNorm(sizes.hidden_size)
        self.normk = nn.LayerNorm(sizes.hidden_size)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        queries = self.norm1(queries)  # the residual starts from the normalised queries
        out: Tensor = self.output(self.attention(queries, self.normk(image)), queries)
        return out


class _CrossAttention(nn.Module):
    q_pos_embed: Tensor
    k_pos_embed: Tensor

    def __init__(self, sizes: AbstractorSizes, grid: int) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.heads = sizes.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        places = torch.arange(sizes.num_learnable_queries, dtype=torch.float32)
        self.register_buffer("q_pos_embed", _sin_cos(width, places))  # [Q, D]
        self.register_buffer("k_pos_embed", _grid_sin_cos(width, grid))  # [T, D]

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        seen = torch.cat([queries, image], dim=1)  # [N, Q + T, D]
        places = torch.cat([self.q_pos_embed, self.k_pos_embed])
        query = split_heads(self.query(queries + self.q_pos_embed), self.heads)
        key = split_heads(self.key(seen + places), self.heads)
        value = split_heads(self.value(seen), self.heads)
        return merge_heads(F.scaled_dot_product_attention(query, key, value))


class _CrossOutput(nn.Module):
    def __init__(self, sizes: AbstractorSizes) -> None:
        super().__init__()
        self.out_proj = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.norm2 = nn.LayerNorm(sizes.hidden_size)
        self.mlp = _AbstractorMlp(sizes)

    def forward(self, read: Tensor, queries: Tensor) -> Tensor:
        queries = queries + self.out_proj(read)
        return queries + self.mlp(self.norm2(queries))


class _AbstractorMlp(nn.Module):
    def __init__(self, sizes: AbstractorSizes) -> None:
        super().__init__()
        self.w1 = nn.Linear(sizes.hidden_size, sizes.intermediate_size)
        self.w2 = nn.Linear(sizes.intermediate_size, sizes.hidden_size)
        self.w3 = nn.Linear(sizes.hidden_size, sizes.intermediate_size)
        self.ffn_ln = nn.LayerNorm(sizes.intermediate_size, eps=sizes.layer_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.w2(self.ffn_ln(F.silu(self.w1(tokens)) * self.w3(tokens)))
        return out


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """Turn ``[N, T, H * D]`` into ``[N, H, T, D]``."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(tokens: Tensor) -> Tensor:
    """Turn ``[N, H, T, D]`` into ``[N, T, H * D]``."""
    return tokens.transpose(1, 2).flatten(2)


def _sin_cos(width: int, places: Tensor) -> Tensor:
    rates = 10000.0 ** -(torch.arange(width // 2) / (width / 2))
    angles = places[:, None] * rates  # [T, D/2]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _grid_sin_cos(width: int, grid: int) -> Tensor:
    # As the published buffers: row by row, the column in the first half of the channels, the row
    # in the second; the class token, which has no place, gets zeros.
    line = torch.arange(grid, dtype=torch.float32)
    columns, rows = line.repeat(grid), line.repeat_interleave(grid)  # [grid^2]
    places = torch.cat([_sin_cos(width // 2, columns), _sin_cos(width // 2, rows)], dim=1)
    return torch.cat([torch.zeros(1, width), places])
