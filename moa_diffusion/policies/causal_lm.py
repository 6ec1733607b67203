"""Any causal language model of transformers with LoRA as a policy.

A decision is one token of the response. Text is drawn by ``generate`` with a key-value cache; its
log-probabilities come from one pass over prompt and response together, the pass that training
makes, so that the first ratio is 1 whatever the cache rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moa_diffusion.config.schema import GenerationConfig, PolicyConfig
from moa_diffusion.data.seeds import derive_seed
from moa_diffusion.policies import lora
from moa_diffusion.policies.base import Terms
from moa_diffusion.policies.chat import Dialogue
from moa_diffusion.policies.copies import AdapterCopy
from moa_diffusion.policies.gumbel import GumbelNoise
from moa_diffusion.policies.language_model import (
    check_forward,
    check_vocabulary,
    checkpoint_layers,
    prompt_limit,
    stop_tokens,
)
from moa_diffusion.policies.token_log_probs import token_log_probs
from moa_diffusion.types import Generated, Request, Rollout


class CausalLMPolicy:
    """A ``...ForCausalLM`` of transformers that carries a LoRA adapter.

    A rollout has ``T = max_new_tokens`` decisions; its mask is true up to and including the token
    that ends the response. Prompts are found again by their text; the trace holds
    ``response [n, T]`` int64, ``widths [n, 2]`` (columns of prompts and of responses in the pass
    that gave the log-probs), and ``features [n, T, d]`` if asked for. The statistics are
    ``length``, tokens with the end, and ``entropy``, the mean of ``-log p`` over them in nats.

    Args:
        model: Taken over: it gets the adapter, and its generation settings (penalties, top-k)
            give way, as with them samples would not be the policy's. Dropout stays off. Frozen
            weights and the forward pass keep its dtype; adapter and log-probs are float32.
        tokenizer: The model's tokenizer.
        settings: The section ``policy``, of which the adapter and the checkpointing are taken.
        generation: The section ``generation``: limits, temperatures and the chat template.
        device: Where the model lives.
        seed: Decides the adapter's initial values.
        features: Whether rollouts hold the last hidden state that predicts each token, float32,
            for value heads.

    Raises:
        ConfigError: If model, tokenizer and limits do not fit together.
        ValueError: If a parameter is out of range, or names no layer.
    """

    row_per_sample, row_copies, lockstep = True, 1, False
    copies: Mapping[str, AdapterCopy] = MappingProxyType({})
    dimensions = 1

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        settings: PolicyConfig,
        generation: GenerationConfig,
        device: torch.device,
        seed: int,
        features: bool = False,
    ) -> None:
        from transformers import GenerationConfig as ModelGeneration

        check_forward(type(model))
        check_vocabulary(model, tokenizer)
        self.device, self.dtype = device, model.dtype
        self.generation, self.features = generation, features
        self.max_new_tokens = generation.max_new_tokens
        self.dialogue = Dialogue(
            tokenizer,
            chat=generation.chat,
            max_prompt_tokens=prompt_limit(
                model.config,
                max_new_tokens=generation.max_new_tokens,
                max_prompt_tokens=generation.max_prompt_tokens,
            ),
            max_new_tokens=generation.max_new_tokens,
            stops=stop_tokens(model.generation_config),
        )
        self.model: Any = model.to(device).eval()
        self.model.generation_config = ModelGeneration(
            do_sample=False,
            max_new_tokens=generation.max_new_tokens,
            eos_token_id=self.dialogue.stops,
            pad_token_id=self.dialogue.filler,
        )
        lora.attach(
            self.model,
            rank=settings.lora.rank,
            alpha=settings.lora.numerator,
            target_modules=settings.lora.target_modules or lora.projections(model),
            seed=derive_seed(seed, "lora"),
            task="CAUSAL_LM",
        )
        if settings.gradient_checkpointing:
            checkpoint_layers(self.model)
        self._trainable = lora.parameters(self.model)
        self._adapted = lora.layers(self.model)

    # ------------------------------------------------------------------ the Policy protocol

    def prepare(self, prompts: Sequence[str]) -> None:
        """Tokenise the prompts.

        Raises:
            ConfigError: Naming the first that is too long.
        """
        for prompt in prompts:
            self.dialogue.prompt(prompt)

    def expect(self, prompts: Sequence[str]) -> None:
        """Do nothing: prompts are tokenised where they are drawn."""

    @torch.no_grad()
    def sample(self, requests: Sequence[Request], *, step: int) -> Rollout:
        """Draw texts at the temperature of rollouts, with the log-probability of each token."""
        response, mask = self._draw(requests, self.generation.temperature)
        return self._rollout(requests, self._texts(requests, response, mask), response, mask)

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Return given responses as token ids, each tokenised alone, with its end; no forward pass.

        Raises:
            ValueError: Naming the first that is too long, or that spells its end.
        """
        return [self.dialogue.response(text) for text in texts]

    def log_probs_of(self, prompts: Sequence[str], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Return log-probabilities ``[n]`` float32 of whole given responses, with gradient.

        Args:
            prompts: The N prompts.
            tokens: The N responses as token ids, as ``tokens_of`` gives them.
        """
        requests = [Request(prompt=prompt) for prompt in prompts]
        response, mask = self.dialogue.pad(tokens, self.max_new_tokens, left=False)
        p, t = self._widths(requests, mask)
        response, mask = response.to(self.device), mask.to(self.device)
        return self._score(requests, response, mask, p, t).sum(1)

    def trained_steps(self, step: int) -> range:
        """Return the places of all tokens that a response may have."""
        return range(self.max_new_tokens)

    def log_probs(self, rollout: Rollout, steps: slice, *, with_kl: bool = False) -> Terms:
        """Do as the protocol says; the KL is Schulman's k3: ``exp(d) - 1 - d``, d = ref - new."""
        response, mask = rollout.trace["response"], rollout.mask
        p, t = self._columns(rollout)
        new = self._score(rollout.requests, response, mask, p, t)[:, steps]
        if not with_kl:
            return Terms(new)
        with torch.no_grad(), self.reference():
            reference = self._score(rollout.requests, response, mask, p, t)[:, steps]
        gap = reference - new
        return Terms(new, torch.expm1(gap) - gap)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> Generated:
        """Draw texts at the temperature of evaluations; 0 takes the likeliest token."""
        drawn = self._draw(requests, self.generation.eval_temperature)
        return Generated(outputs=self._texts(requests, *drawn))

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Return A and B of every LoRA layer."""
        return self._trainable

    def reference(self) -> AbstractContextManager[None]:
        """Switch the LoRA layers off within the block."""
        return lora.disabled(self._adapted)

    def tapped(self) -> Sequence[Any]:
        """Return the LoRA layers that can be tapped."""
        return lora.tapped(self._adapted)

    def row_tokens(self, rollout: Rollout) -> int | None:
        """Return the tokens of prompt and response that the model is given."""
        p, t = self._columns(rollout)
        return p + t - 1

    def step_chunks(self, decisions: int) -> list[slice]:
        """Return one slice of all tokens, which share a forward pass."""
        return [slice(0, decisions)]  # the tokens of a text share their forward pass

    def save(self, folder: Path) -> None:
        """Write the adapter as peft loads it."""
        lora.save_peft(self.model, folder)

    # ------------------------------------------------------------------ inner workings

    def _rollout(
        self, requests: Sequence[Request], texts: tuple[str, ...], response: Tensor, mask: Tensor
    ) -> Rollout:
        p, t = self._widths(requests, mask)
        trace = {"response": response, "widths": torch.tensor([[p, t]] * len(requests))}
        states: list[Tensor] = []  # what the head is given: [n, t, d]
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        try:
            log_probs = self._score(requests, response, mask, p, t)
        finally:
            hook.remove()
        if self.features:
            known = torch.where(mask[:, :t, None], states[0].float(), 0.0)
            trace["features"] = functional.pad(known, (0, 0, 0, self.max_new_tokens - t))
        length = mask.sum(1).float()
        return Rollout(
            requests=tuple(requests),
            log_probs=log_probs,
            mask=mask,
            trace=trace,
            texts=texts,
            statistics={"length": length.cpu(), "entropy": (-log_probs.sum(1) / length).cpu()},
        )

    def _texts(self, requests: Sequence[Request], ids: Tensor, mask: Tensor) -> tuple[str, ...]:
        return self.dialogue.texts([request.prompt for request in requests], ids, mask)

    def _draw(self, requests: Sequence[Request], temperature: float) -> tuple[Tensor, Tensor]:
        """Draw responses ``[n, T]`` and their mask; the likeliest tokens at temperature 0."""
        from transformers import LogitsProcessorList

        prompts, known = self._prompts(requests, self._longest(requests))
        processors = LogitsProcessorList()
        if temperature > 0:
            seeds = [request.seed for request in requests]
            processors.append(GumbelNoise(seeds, temperature=temperature, device=self.device))
        with self._autocast():
            drawn = self.model.generate(
                input_ids=prompts, attention_mask=known.long(), logits_processor=processors
            )[:, prompts.shape[1] :]  # [n, t], t the longest response
        ended = torch.isin(drawn, torch.tensor(self.dialogue.stops, device=self.device)).long()
        mask = ended.cumsum(1) - ended == 0  # no end before
        short = (0, self.max_new_tokens - drawn.shape[1])
        response = torch.where(mask, drawn, self.dialogue.filler)
        return (
            functional.pad(response, short, value=self.dialogue.filler),
            functional.pad(mask, short, value=False),
        )

    def _score(
        self, requests: Sequence[Request], response: Tensor, mask: Tensor, p: int, t: int
    ) -> Tensor:
        """Return log-probs ``[n, T]`` float32 of the responses; 0 where there is no decision.

        Args:
            requests: The n requests, of which only the prompts count.
            response: Token ids ``[n, T]`` of the responses.
            mask: Which tokens are decisions, ``[n, T]`` bool.
            p: Number of columns of the prompts, no less than the longest prompt has.
            t: Number of columns of the responses, likewise.
        """
        prompts, known = self._prompts(requests, p)
        mask, response = mask[:, :t], response[:, :t]
        attention = torch.cat([known, mask[:, :-1]], dim=1)  # [n, p + t - 1]
        with self._autocast():
            logits = self.model(
                input_ids=torch.cat([prompts, response[:, :-1]], dim=1),
                attention_mask=attention.long(),
                position_ids=(attention.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=torch.arange(p - 1, p - 1 + t, device=self.device),
                use_cache=False,
            ).logits  # [n, t, V]
        log_probs = token_log_probs(logits, response, self.generation.temperature)
        return functional.pad(torch.where(mask, log_probs, 0.0), (0, self.max_new_tokens - t))

    def _longest(self, requests: Sequence[Request]) -> int:
        return max(len(self.dialogue.prompt(request.prompt)) for request in requests)

    def _widths(self, requests: Sequence[Request], mask: Tensor) -> tuple[int, int]:
        return self._longest(requests), int(mask.sum(1).max())

    def _columns(self, rollout: Rollout) -> tuple[int, int]:
        """Return the columns of prompts and of responses in the pass that training makes."""
        if self.dtype != torch.float32:  # its rounding depends on the widths: 0.02 in bfloat16
            p, t = rollout.trace["widths"].amax(0).tolist()
            return p, t
        # Lengths are on the CPU: looking at the mask would wait for the device.
        return self._longest(rollout.requests), int(rollout.statistics["length"].max())

    def _prompts(self, requests: Sequence[Request], width: int) -> tuple[Tensor, Tensor]:
        """Return ids ``[n, width]`` and mask of the prompts, which all end in the last column."""
        rows = [self.dialogue.prompt(request.prompt) for request in requests]
        ids, known = self.dialogue.pad(rows, width, left=True)
        return ids.to(self.device), known.to(self.device)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)
