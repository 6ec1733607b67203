"""Small vision-language models with random weights, in folders as the hub has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from rewards import RewardBatch

QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The turns of the user; how the model's own turn begins is put behind.
QWEN_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
QWEN_ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def trained_tokenizer(special: Iterable[str], texts: Sequence[str]) -> Tokenizer:
    """A byte-level tokenizer to which each of the texts is few tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(texts) * 9, trainer)
    return tokenizer


def qwen_processor(texts: Sequence[str], template: str) -> Qwen3VLProcessor:
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 1024}
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=trained_tokenizer(QWEN_TOKENS, texts),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
        ),
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=template,
    )


def qwen_ids(processor: Any) -> dict[str, int]:
    """What the config of a Qwen model calls its special tokens."""
    token = processor.tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }


def qwen3_vl() -> tuple[Any, Any]:
    """Qwen3-VL: positions in three dimensions, features of several layers, tied embeddings."""
    processor = qwen_processor(["Yes", "No"], QWEN_TURNS + QWEN_ANSWER)
    config = Qwen3VLConfig(
        text_config={
            **_DECODER,
            "vocab_size": len(processor.tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.3,
        },
        **qwen_ids(processor),
        tie_word_embeddings=True,
    )
    return processor, Qwen3VLForConditionalGeneration(config)


def llava() -> tuple[Any, Any]:
    """LLaVA 1.5: the template writes the token that the tokenizer puts first as well."""
    tokenizer = trained_tokenizer(["<s>", "</s>", "<image>", "<pad>"], ["Yes", "No"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        ),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "<s>{% for message in messages %}{{ message.role | upper }}: "
            "{% for part in message.content %}{% if part.type == 'image' %}<image>\n"
            "{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}"
            "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
        ),
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION, projection_dim=16),
        text_config=LlamaConfig(**_DECODER, vocab_size=len(processor.tokenizer)),
        image_token_id=2,
        vision_feature_layer=-2,
    )
    return processor, LlavaForConditionalGeneration(config)


def idefics3() -> tuple[Any, Any]:
    """Idefics3, as SmolVLM: images in parts, a list of them per text, a space before the answer."""
    parts = [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)]
    tokens = ["<|im_start|>", "<end_of_utterance>", "<pad>", "<image>", "<global-img>"]
    tokenizer = trained_tokenizer([*tokens, "<fake_token_around_image>", *parts], [" Yes", " No"])
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<|im_start|>",
            eos_token="<end_of_utterance>",
            pad_token="<pad>",
        ),
        image_seq_len=4,
        chat_template=(
            "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:"
            "{% for part in message.content %}{% if part.type == 'image' %}<image>"
            "{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
            "{% if add_generation_prompt %}Assistant:{% endif %}"
        ),
    )
    config = Idefics3Config(
        vision_config=_VISION,
        text_config=LlamaConfig(**_DECODER, vocab_size=len(processor.tokenizer), pad_token_id=2),
        scale_factor=2,
        image_token_id=3,
        pad_token_id=2,
    )
    return processor, Idefics3ForConditionalGeneration(config)


MODELS = {"qwen3_vl": qwen3_vl, "llava": llava, "idefics3": idefics3}


def save(folder: Path, name: str) -> Path:
    """Writes a model and its processor, the same ones every time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        processor, model = MODELS[name]()
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def change(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Adds tensors to a model folder, or takes them out (None)."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    kept = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, file, metadata={"format": "pt"})


def random_images(height: int, width: int, count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, size=(count, 5, 5, 3), dtype=np.uint8)
    return [Image.fromarray(array).resize((width, height)) for array in rough]


def batch(images: Sequence[Image.Image], prompts: Sequence[str] = ()) -> RewardBatch:
    arrays = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    pixels = arrays.permute(0, 3, 1, 2).float() / 255
    return RewardBatch(
        prompts=list(prompts) or ["a fish"] * len(images), images=pixels.contiguous()
    )
