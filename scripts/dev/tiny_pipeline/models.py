"""The untrained parts besides the autoencoder: transformer, text encoders, scheduler.

The architecture is that of Stable Diffusion 3.5 medium (query and key normalisation, dual attention
in the first layers), with a width of 128 in place of 1536.
"""

from typing import TYPE_CHECKING

import torch

from tiny_pipeline.tokenizers import MAX_LENGTH

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

WIDTH = 128  # the width of the transformer and of the T5 encoder
CLIP_WIDTH = 64  # each CLIP encoder's; two of them side by side are as wide as T5
# Between neighbours in the position table; with the usual 1 they look too much alike.
SPACING = 1.5


def new_transformer() -> "SD3Transformer2DModel":
    """Return an untrained transformer over 4 x 4 patches of 8 x 8 latents.

    It has 4 layers and 2.6 M parameters.

    Modulations and output start at zero, so that every block starts as the identity. The position
    table is a buffer in SD3 and is kept with the weights; here it holds wider spaced sinusoids.
    """
    from diffusers import SD3Transformer2DModel
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * CLIP_WIDTH,
        out_channels=16,
        pos_embed_max_size=4,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    table = get_2d_sincos_pos_embed(
        WIDTH, 4, base_size=4, interpolation_scale=1 / SPACING, output_type="pt"
    )
    transformer.pos_embed.pos_embed.copy_(table.float().unsqueeze(0))
    for name, parameter in transformer.named_parameters():
        if ".norm1.linear." in name or ".norm1_context.linear." in name or "norm_out" in name:
            torch.nn.init.zeros_(parameter)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def new_clip(tokenizer: "CLIPTokenizer") -> "CLIPTextModelWithProjection":
    """Return an untrained CLIP text encoder of 2 layers. SD3 reads its last layer but one."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=4 * CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=CLIP_WIDTH,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_t5(vocabulary: int) -> "T5EncoderModel":
    """Return an untrained T5 encoder of 2 layers that reads from left to right.

    The relative position biases of everything to the right are so low that softmax gives it exactly
    zero weight, and so zero gradient: they stay. Otherwise every token would depend on the padding
    behind it.
    """
    from transformers import T5Config, T5EncoderModel

    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    attention = t5.encoder.block[0].layer[0].SelfAttention  # the other layers share its biases
    biases = attention.relative_attention_bias.weight  # [32 distances, heads]
    with torch.no_grad():
        biases[biases.shape[0] // 2 :] = -1e4  # upper half: keys to the right of the query
    return t5


def new_scheduler() -> "FlowMatchEulerDiscreteScheduler":
    """Return the sampler of Stable Diffusion 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
