"""DeQA-Score: LLaMA-2 with its own keys, values and norms for the tokens of an image.

DeQA-Score (You et al. 2025, https://arxiv.org/abs/2501.11561) on mPLUG-Owl2 (Ye et al. 2023,
https://arxiv.org/abs/2311.04257, section 3.3). The published code needs transformers 4.36.1; these
modules need torch alone and give the same logits from the same weights. They are named as in the
published weights and can be trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.heads.deqa.config import DeqaConfig, read_config
from rewards.heads.deqa.vision import VisionModel, VisualAbstractor, merge_heads, split_heads
from rewards.pretrained.locate import Weights
from rewards.pretrained.tensors import load_strictly


class Deqa(nn.Module):
    """Logits of the five levels of quality for an image.

    Args:
        config: Sizes, prompt and levels.
    """

    def __init__(self, config: DeqaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Read the quality of images.

        Args:
            pixels: Images ``[N, 3, S, S]``, padded to a square, resized and normalised.

        Returns:
            Logits ``[N, 5]`` of excellent, good, fair, poor and bad as the next word.
        """
        rows = self.lm_head.weight[list(self.config.level_ids)]  # [5, D]
        return F.linear(self.model(pixels), rows)

    def next_word(self, pixels: Tensor) -> Tensor:
        """Do as calling the model does, with the logits of the whole vocabulary, ``[N, V]``."""
        logits: Tensor = self.lm_head(self.model(pixels))
        return logits


def load(weights: Weights) -> Deqa:
    """Build the model that a folder holds, with the tensors of its files and in their dtype.

    The modules start on the meta device and take the tensors over, so 16 GB of weights need 16 GB.

    Raises:
        RewardError: If ``config.json`` describes no DeQA model, or a tensor is missing, unknown or
            of another shape.
    """
    config = read_config(weights.folder / "config.json")
    with torch.device("meta"):
        model = Deqa(config)
    # Older files carry the rotary frequencies, which follow from the sizes.
    load_strictly(model, weights, ignore=("rotary_emb.inv_freq",))
    return model.eval()


class _Body(nn.Module):
    def __init__(self, config: DeqaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = _RmsNorm(config)
        self.vision_model = VisionModel(config.vision)
        self.visual_abstractor = VisualAbstractor(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the state ``[N, D]`` from which the word after the prompt is read."""
        tokens = torch.cat(
            [
                self._words(self.config.before, pixels),
                self.visual_abstractor(self.vision_model(pixels)),
                self._words(self.config.after, pixels),
            ],
            dim=1,
        )  # [N, T, D]
        cos, sin = self._rotation(tokens)
        for layer in self.layers:
            tokens = layer(tokens, cos, sin)
        last: Tensor = self.norm(tokens[:, -1])
        return last

    def _words(self, ids: tuple[int, ...], pixels: Tensor) -> Tensor:
        words = self.embed_tokens(torch.tensor(ids, dtype=torch.long, device=pixels.device))
        return words.expand(len(pixels), -1, -1)

    def _rotation(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        # Computed anew for every batch, which costs nothing: a buffer would have to be kept out of
        # the state dict and out of the conversion to half precision.
        width = self.config.hidden_size // self.config.num_attention_heads
        places = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        powers = torch.arange(0, width, 2, device=tokens.device, dtype=torch.float32) / width
        angles = places[:, None] * self.config.rope_theta**-powers  # [T, D / H / 2]
        return angles.cos().to(tokens.dtype), angles.sin().to(tokens.dtype)


class _Layer(nn.Module):
    def __init__(self, config: DeqaConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)
        self.input_layernorm = _Multiway(lambda: _RmsNorm(config), config.image_tokens)
        self.post_attention_layernorm = _Multiway(lambda: _RmsNorm(config), config.image_tokens)

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens = tokens + self.self_attn(self.input_layernorm(tokens), cos, sin)
        return tokens + self.mlp(self.post_attention_layernorm(tokens))


class _Attention(nn.Module):
    def __init__(self, config: DeqaConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = _Multiway(lambda: nn.Linear(width, width, bias=False), config.image_tokens)
        self.v_proj = _Multiway(lambda: nn.Linear(width, width, bias=False), config.image_tokens)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query = _rotate(split_heads(self.q_proj(tokens), self.heads), cos, sin)
        key = _rotate(split_heads(self.k_proj(tokens), self.heads), cos, sin)
        value = split_heads(self.v_proj(tokens), self.heads)
        read = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [N, H, T, D/H]
        out: Tensor = self.o_proj(merge_heads(read))
        return out


class _Mlp(nn.Module):
    def __init__(self, config: DeqaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(tokens)) * self.up_proj(tokens))
        return out


class _Multiway(nn.Module):
    """One module for the words (0) and another for the image (1), at fixed positions."""

    def __init__(self, make: Callable[[], nn.Module], image_tokens: slice) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])
        self.image_tokens = image_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        before = tokens[:, : self.image_tokens.start]
        image = tokens[:, self.image_tokens]
        after = tokens[:, self.image_tokens.stop :]
        words, sight = self.multiway
        return torch.cat([words(before), sight(image), words(after)], dim=1)


class _RmsNorm(nn.Module):
    def __init__(self, config: DeqaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, tokens: Tensor) -> Tensor:
        exact = tokens.float()  # squares of half-precision activations overflow
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(tokens.dtype)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)  # each [N, H, T, D / H / 2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
