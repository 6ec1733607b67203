"""The language policy on tiny random models: exact sampling, log-probs of transformers, peft."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from sections import lm_policy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moa_diffusion.config.schema import LossConfig
from moa_diffusion.distributed import LocalComm
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.policies import lora
from moa_diffusion.policies.causal_lm import CausalLMPolicy
from moa_diffusion.policies.forward import MergedForward
from moa_diffusion.policies.language_model import check_fit, load_model
from moa_diffusion.training.ema import EMA
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.training.gradients import ObjectiveGradients
from moa_diffusion.training.loss import Clip, surrogate_coefficients
from moa_diffusion.training.stepper import Stepper
from moa_diffusion.training.steps import RolloutSteps
from moa_diffusion.training.update import NoProbe, PlainUpdate
from moa_diffusion.types import ConfigError, Request, Rollout, concatenate

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by the old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


CPU = torch.device("cpu")


T = 8


# What another order of sums (padding, batch, kernels) may change: some 30 products follow each
# other in these models, each a sum of about 20 terms, and their errors add up to about 32 times
# float32's eps of logits, which are up to about 10.
ROUNDING = 32 * 10 * torch.finfo(torch.float32).eps


LETTERS = "abcdefghijklmnopqrstuvwxyz .,:|<>/"


SPECIAL = ["<pad>", "<s>", "</s>", "<end>"]


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}<assistant>"


PROMPTS = ["tell me.", "a", "to the baker, about the bread: ", "why"]


FAMILIES = ["llama", "gpt2", "qwen3"]


def tokenizer(*, pad: bool = True, eos: bool = True, chat: bool = False, side: str = "left") -> Any:
    """One token a letter; the beginning-of-text token comes by itself."""
    words = {text: i for i, text in enumerate([*SPECIAL, *LETTERS])}
    raw = Tokenizer(models.WordLevel(words, unk_token="."))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        additional_special_tokens=["<end>"],
        padding_side=side,
        **({"pad_token": "<pad>"} if pad else {}),
        **({"eos_token": "</s>"} if eos else {}),
    )
    made.chat_template = CHAT if chat else None
    return made


def model(family: str) -> Any:
    """Weights large enough for a text to have likely and unlikely tokens."""
    torch.manual_seed(0)
    shape = {"vocab_size": len(LETTERS) + len(SPECIAL), "eos_token_id": 2, "bos_token_id": 1}
    wide = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, **wide)).eval()
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, **wide, head_dim=8)).eval()
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.4}
    made = GPT2LMHeadModel(GPT2Config(**shape, **small))  # dropout 0.1, Conv1D
    return made.eval()


def policy_on(family: str = "llama", *, size: float = 0.1, **options: Any) -> CausalLMPolicy:
    """A policy whose adapter is not at its initial value, unless ``size`` is 0."""
    settings = {"max_new_tokens": T, "lora_rank": 3, "lora_alpha": 5} | options
    words = settings.pop("tokenizer", None) or tokenizer(chat=family == "qwen3")
    base = settings.pop("model", None) or model(family).train()
    policy = lm_policy(base, words, **settings)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=source))
    return policy


def requests(count: int) -> list[Request]:
    return [
        Request(prompt=PROMPTS[i % 4], group=i % 4, sibling=i // 4, seed=100 + i)
        for i in range(count)
    ]


def by_transformers(network: Any, policy: CausalLMPolicy, rollout: Any) -> torch.Tensor:
    """Log-probs ``[n, T]`` of one text at a time, without padding and with all logits."""
    rows = torch.zeros(len(rollout), T)
    for i, request in enumerate(rollout.requests):
        prompt = policy.dialogue.prompt(request.prompt)
        response = rollout.trace["response"][i][rollout.mask[i]]
        ids = torch.tensor([[*prompt, *response.tolist()]])
        logits = network(ids).logits[0, len(prompt) - 1 : -1] / policy.generation.temperature
        rows[i, : len(response)] = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
    return rows


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize(("family", "batch"), [("llama", 1), ("gpt2", 3), ("qwen3", 3)])
def test_a_sample_depends_on_its_own_seed_alone(family: str, batch: int) -> None:
    policy = policy_on(family, temperature=1.3)
    together = policy.sample(requests(8), step=0)
    assert len(set(together.texts)) > 4
    assert 0 < together.mask.sum() < together.mask.numel(), "texts of several lengths"
    parts = [
        policy.sample(requests(8)[start : start + batch], step=5) for start in range(0, 8, batch)
    ]
    apart = concatenate(parts)
    assert apart.texts == together.texts
    assert torch.equal(apart.trace["response"], together.trace["response"])
    assert torch.equal(apart.mask, together.mask)
    assert apart.log_probs.shape == together.log_probs.shape == (8, T)
    torch.testing.assert_close(apart.log_probs, together.log_probs, atol=ROUNDING, rtol=0)


def test_first_tokens_are_drawn_from_the_model() -> None:
    policy = policy_on(max_new_tokens=1, temperature=1.5)
    asked = [Request(prompt="why", seed=seed) for seed in range(4000)]
    rollout = policy.sample(asked, step=0)
    ids = torch.tensor([policy.dialogue.prompt("why")])
    with torch.no_grad():
        p = (policy.model(ids).logits[0, -1] / 1.5).softmax(0)
    share = torch.bincount(rollout.trace["response"][:, 0], minlength=len(p)) / 4000
    # Four standard errors, and for the rarest tokens, whose counts are no normal's, four in 4000.
    assert ((share - p).abs() <= 4 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()
    torch.testing.assert_close(
        rollout.log_probs[:, 0], p.log()[rollout.trace["response"][:, 0]], atol=ROUNDING, rtol=0
    )


def test_a_text_ends_with_its_first_stop_and_holds_no_special_token() -> None:
    base = model("llama")
    base.generation_config.eos_token_id = [2, 3]  # </s> and <end>
    policy = policy_on(model=base, temperature=1.5, max_new_tokens=T)
    rollout = policy.sample(requests(64), step=0)
    stops = torch.isin(rollout.trace["response"], torch.tensor([2, 3]))
    lengths = rollout.mask.sum(1)
    assert torch.equal(rollout.mask, torch.arange(T) < lengths[:, None])
    ends = set()
    for i, length in enumerate(lengths.tolist()):
        assert not stops[i, : length - 1].any()
        assert length == T or stops[i, length - 1]
        ends.add(int(rollout.trace["response"][i, length - 1]))
        inner = rollout.trace["response"][i, :length].tolist()
        letters = [LETTERS[token - 4] for token in inner if token >= 4]
        assert rollout.texts[i] == "".join(letters)
    assert {2, 3} <= ends
    assert (lengths == T).any(), "some are cut off by the limit"


def test_settings_of_the_models_own_generation_give_way() -> None:
    plain, base = policy_on(), model("llama")
    base.generation_config.update(
        top_k=1, do_sample=True, repetition_penalty=9.0, min_new_tokens=5, suppress_tokens=[7, 8, 9]
    )
    other = policy_on(model=base)
    assert other.sample(requests(8), step=0).texts == plain.sample(requests(8), step=0).texts


def test_statistics_are_those_of_the_tokens_there_are() -> None:
    rollout = policy_on().sample(requests(8), step=0)
    for i, (length, entropy) in enumerate(zip(*rollout.statistics.values(), strict=True)):
        own = rollout.log_probs[i][rollout.mask[i]]
        assert length == len(own)
        # Sums of 8 terms up to 7 in float32: up to 2e-6 of each partial sum, over 8.
        assert entropy == pytest.approx(float(-own.mean()), abs=1e-5)
    assert list(rollout.statistics) == ["length", "entropy"]


def test_generate_takes_the_likeliest_tokens_or_draws() -> None:
    policy = policy_on()
    greedy = policy.generate(requests(4)).outputs
    assert greedy == policy.generate([Request(prompt=p, seed=9) for p in PROMPTS]).outputs
    for text, prompt in zip(greedy, PROMPTS, strict=True):
        ids = policy.dialogue.prompt(prompt)
        found: list[int] = []
        while len(found) < T and 2 not in found:
            with torch.no_grad():
                found.append(int(policy.model(torch.tensor([ids + found])).logits[0, -1].argmax()))
        row = policy.dialogue.pad([found], T, left=False)
        assert (text,) == policy.dialogue.texts([prompt], *row)
    warm = policy_on(temperature=0.3, eval_temperature=1.0)
    drawn = warm.generate(requests(4)).outputs
    assert drawn == policy_on(temperature=1.0).sample(requests(4), step=0).texts
    assert drawn == tuple(warm.generate([request]).outputs[0] for request in requests(4))


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [True, False])
def test_log_probs_are_those_of_transformers(family: str, side: str, pad: bool) -> None:
    words = tokenizer(side=side, pad=pad, chat=family == "qwen3")
    policy = policy_on(family, tokenizer=words, temperature=0.8, eval_temperature=0.8)
    rollout = policy.sample(requests(6), step=0)
    assert rollout.log_probs.shape == (6, T)
    assert rollout.log_probs.dtype == torch.float32
    assert not rollout.log_probs[~rollout.mask].any()
    with torch.no_grad():
        expected = by_transformers(policy.model, policy, rollout)
    torch.testing.assert_close(rollout.log_probs, expected, atol=ROUNDING, rtol=0)
    part = rollout.select(torch.tensor([2, 1]))
    new, kl, *_ = policy.log_probs(part, slice(0, T))
    assert kl is None
    torch.testing.assert_close(new.detach(), expected[[2, 1]], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_ratio_is_one_and_gradients_are_those_of_transformers(
    family: str, checkpointing: bool
) -> None:
    policy = policy_on(family, gradient_checkpointing=checkpointing)
    rollout = policy.sample(requests(4), step=0)
    new = policy.log_probs(rollout, slice(0, T)).log_probs
    assert torch.equal(new.detach(), rollout.log_probs)
    weights = torch.randn(4, T, generator=torch.Generator().manual_seed(3)) * rollout.mask
    parameters = list(policy.trainable().values())
    found = torch.autograd.grad((weights * new).sum(), parameters)
    plain = by_transformers(policy.model, policy, rollout)
    expected = torch.autograd.grad((weights * plain).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max())  # small elements are differences of large terms
        torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING * scale)
    assert all(gradient.any() for gradient in found)


def test_checkpointing_keeps_the_inputs_of_layers_alone() -> None:
    kept = []
    for checkpointing in (False, True):
        policy = policy_on(gradient_checkpointing=checkpointing)
        rollout, sizes = policy.sample(requests(4), step=0), []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        )
        with hooks:
            policy.log_probs(rollout, slice(0, T))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_slices_of_the_decisions_are_parts_of_the_whole() -> None:
    policy = policy_on()
    assert policy.step_chunks(T) == [slice(0, T)]
    rollout = policy.sample(requests(4), step=0)
    whole, kls, *_ = policy.log_probs(rollout, slice(0, T), with_kl=True)
    part, kl, *_ = policy.log_probs(rollout, slice(2, 5), with_kl=True)
    assert torch.equal(part, whole[:, 2:5])
    assert torch.equal(kl, kls[:, 2:5])


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_is_k3_against_the_model_without_its_adapter(family: str) -> None:
    fresh = policy_on(family, size=0)
    rollout = fresh.sample(requests(4), step=0)
    assert not fresh.log_probs(rollout, slice(0, T), with_kl=True).kl.any()
    policy = policy_on(family)
    rollout = policy.sample(requests(4), step=0)
    new, kl, *_ = policy.log_probs(rollout, slice(0, T), with_kl=True)
    with torch.no_grad():
        ref = by_transformers(model(family), policy, rollout)
    gap = ref - new.detach()
    # A gap that is off by ROUNDING moves it by exp(gap) - 1 times that: 1e-3 of it and 1e-5, unless
    # the gap is far beyond the 1.5 of these models. Of its gradient as much again.
    torch.testing.assert_close(kl.detach(), gap.exp() - gap - 1, rtol=1e-3, atol=1e-5)
    assert (kl[rollout.mask] > 0).all()
    assert not kl[~rollout.mask].any()
    expected = torch.autograd.grad(
        (-(gap.exp() - 1) * new).sum(), list(policy.trainable().values())
    )
    kl = policy.log_probs(rollout, slice(0, T), with_kl=True).kl
    found = torch.autograd.grad(kl.sum(), list(policy.trainable().values()))
    for one, other in zip(found, expected, strict=True):
        # Gradients of up to 7, each a sum of some 30 terms: 8e-6 apart.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    with policy.reference():
        assert (
            policy.generate(requests(4)).outputs
            == policy_on(family, size=0).generate(requests(4)).outputs
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_hidden_states_that_predict_each_token(family: str) -> None:
    policy = policy_on(family, features=True)
    rollout = policy.sample(requests(4), step=0)
    features = rollout.trace["features"]
    assert features.shape == (4, T, 16)
    assert features.dtype == torch.float32
    assert not features[~rollout.mask].any()
    logits = policy.model.get_output_embeddings()(features)
    again = logits.log_softmax(-1).gather(2, rollout.trace["response"][..., None])[..., 0]
    expected = rollout.log_probs[rollout.mask]
    torch.testing.assert_close(again[rollout.mask], expected, atol=ROUNDING, rtol=0)
    assert "features" not in policy_on(family).sample(requests(1), step=0).trace


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_keeps_adapter_and_log_probs_in_float32(family: str, dtype: str) -> None:
    kind = getattr(torch, dtype)
    policy = policy_on(family, model=model(family).to(kind), features=True)
    rollout = policy.sample(requests(4), step=0)
    assert policy.model.dtype == kind
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    assert rollout.log_probs.dtype == rollout.trace["features"].dtype == torch.float32
    new, kl, *_ = policy.log_probs(rollout, slice(0, T), with_kl=True)
    assert new.dtype == kl.dtype == torch.float32
    assert torch.equal(new.detach(), rollout.log_probs)
    full = policy_on(family).log_probs(rollout, slice(0, T)).log_probs
    rounding = (new - full).abs().max()
    assert 0 < rounding < 0.2  # 0.11 in bfloat16, 0.011 in float16
    for rows in ([1, 3], [2], [1]):  # narrower than the whole, or as wide
        part = rollout.select(torch.tensor(rows))
        again = policy.log_probs(part, slice(0, T)).log_probs
        # Either is off by the rounding to half precision, and kernels of other shapes may round
        # in another order.
        assert (again - part.log_probs).abs().max() < 2 * rounding
    new.sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.trainable().values())


def test_given_responses_are_forced() -> None:
    policy = policy_on()
    texts = ("yes", "", "no.")
    passes: list[int] = []
    policy.model.register_forward_hook(lambda *_: passes.append(1))
    tokens = policy.tokens_of(texts)
    assert passes == []  # and no memory of the device
    assert tokens == [[*map(token_of, text), 2] for text in texts]
    asked = [request.prompt for request in requests(3)]
    found = policy.log_probs_of(asked, tokens)
    assert passes == [1]
    response, mask = policy.dialogue.pad(tokens, T, left=False)
    assert mask.sum(1).tolist() == [4, 1, 4]
    assert policy.dialogue.texts(asked, response, mask) == texts
    rollout = Rollout(
        requests=tuple(requests(3)),
        log_probs=torch.zeros(mask.shape),
        mask=mask,
        trace={"response": response},
        texts=texts,
    )
    with torch.no_grad():
        expected = by_transformers(policy.model, policy, rollout).sum(1)
    torch.testing.assert_close(found.detach(), expected, atol=T * ROUNDING, rtol=0)
    found.sum().backward()
    assert all(p.grad is not None for p in policy.trainable().values())
    with pytest.raises(ValueError, match=r"at most 8 tokens.*Found 9 in 'too long'"):
        policy.tokens_of(["short", "too long"])


def token_of(letter: str) -> int:
    return LETTERS.index(letter) + len(SPECIAL)


# ---------------------------------------------------------------- prompts


def test_a_prompt_goes_through_the_chat_template() -> None:
    def spelled(policy: CausalLMPolicy) -> str:
        return "".join(policy.dialogue.tokenizer.convert_ids_to_tokens(policy.dialogue.prompt("a")))

    chatty = tokenizer(chat=True)
    assert spelled(policy_on(tokenizer=chatty)) == "<user>a<end><assistant>"
    assert spelled(policy_on(tokenizer=chatty, chat=True)) == "<user>a<end><assistant>"
    assert spelled(policy_on(tokenizer=chatty, chat=False)) == "<s>a"
    assert spelled(policy_on(tokenizer=tokenizer())) == "<s>a"
    with pytest.raises(ConfigError, match=r"generation\.chat.*no chat template"):
        policy_on(tokenizer=tokenizer(), chat=True)


def test_a_prompt_starts_the_text_and_does_not_end_it() -> None:
    ending, bare = tokenizer(), tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    assert policy_on(tokenizer=ending).dialogue.prompt("a") == [1, token_of("a")]
    assert policy_on(tokenizer=bare).dialogue.prompt("") == [1]
    bare.bos_token = None
    with pytest.raises(ConfigError, match="the prompt '' has no token"):
        policy_on(tokenizer=bare).prepare([""])


def test_a_prompt_too_long_is_refused_with_both_numbers() -> None:
    policy = policy_on(max_prompt_tokens=9)
    policy.prepare(["a" * 8])
    with pytest.raises(ConfigError, match=r"at most 9 tokens.*Found 10 in 'aaaaaaaaa'"):
        policy.prepare(["a", "a" * 9])
    context = policy_on()  # 64 less 8 for the response
    context.prepare(["a" * 55])
    with pytest.raises(ConfigError, match=r"at most 56 tokens.*Found 57"):
        context.prepare(["a" * 56])


def test_the_longest_prompt_and_response_fill_the_context() -> None:
    policy = policy_on("gpt2")  # learned positions: one more would be an error
    rollout = policy.sample([Request(prompt="a" * 55, seed=i) for i in range(8)], step=0)
    assert rollout.mask.all(1).any()


# ---------------------------------------------------------------- the adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_adapter_is_one_of_plain_peft(family: str, tmp_path: Path) -> None:
    model(family).save_pretrained(tmp_path / "base")
    base, _ = load_with(tmp_path / "base", family)
    policy = policy_on(family, model=base)
    folder = tmp_path / "adapter"
    folder.mkdir()
    policy.save(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 5
    rollout = policy.sample(requests(4), step=0)
    plain = PeftModel.from_pretrained(model(family), folder).eval()
    with torch.no_grad():
        found = by_transformers(plain, policy, rollout)
        bare = by_transformers(model(family), policy, rollout)
    torch.testing.assert_close(found, rollout.log_probs, atol=ROUNDING, rtol=0)
    # By 2 and more.
    assert (found - bare).abs().max() > 0.1, "the adapter should change the log-probs"
    auto = AutoPeftModelForCausalLM.from_pretrained(folder).eval()  # by the base's name in it
    with torch.no_grad():
        # The same operations on the same numbers.
        torch.testing.assert_close(by_transformers(auto, policy, rollout), found)


def load_with(folder: Path, family: str) -> tuple[Any, Any]:
    tokenizer(chat=family == "qwen3").save_pretrained(folder)
    return load_model(str(folder))


def test_the_adapter_sits_on_the_projections_and_depends_on_the_seed_alone() -> None:
    def suffixes(family: str) -> set[str]:
        return {n.split(".lora_")[0].split(".")[-1] for n in policy_on(family).trainable()}

    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert suffixes("llama") == suffixes("qwen3") == attention | mlp
    assert suffixes("gpt2") == {"c_attn", "c_proj", "c_fc"}
    adapted = policy_on("llama")._adapted
    merged = [isinstance(lora.own_forward(layer), MergedForward) for layer in adapted]
    assert all(merged)
    few = policy_on(target_modules=["q_proj"])
    assert all(".q_proj." in name for name in few.trainable())
    with pytest.raises(ValueError, match="ends in 'to_q'"):
        policy_on(target_modules=["to_q"])

    base, state = model("llama"), torch.get_rng_state()
    first = policy_on(model=base, size=0).trainable()
    assert torch.equal(torch.get_rng_state(), state)
    second = policy_on(size=0).trainable()
    other = lm_policy(model("llama"), tokenizer(), seed=1, lora_rank=3, max_new_tokens=T)
    other = other.trainable()
    assert first.keys() == second.keys() == other.keys()
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name])
        assert torch.equal(parameter, other[name]) == (".lora_B." in name)
    assert {p.requires_grad for n, p in base.named_parameters() if "lora_" not in n} == {False}


def coefficients_of(kind: str, rollout: Rollout) -> tuple[torch.Tensor, int]:
    """Coefficients ``[3, n, T]`` of a kind, and the backward passes that they should take."""
    n, generator = len(rollout), torch.Generator().manual_seed(2)
    advantages = torch.randn(3, n, generator=generator)
    moved = rollout.log_probs + 0.3 * torch.randn(n, T, generator=generator)
    if kind == "random":
        return torch.randn(3, n, T, generator=generator) * rollout.mask, 3
    new, passes = (moved, 3) if kind == "clipped" else (rollout.log_probs, 1)
    found = surrogate_coefficients(new, rollout.log_probs, advantages, Clip(0.2))
    return found * rollout.mask, passes


@pytest.mark.parametrize("kind", ["fresh", "clipped", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_objectives_are_those_of_separate_passes(family: str, kind: str) -> None:
    """Also where the tokens of a text differ in what is clipped."""
    policy = policy_on(family)
    rollout = policy.sample(requests(3), step=0)
    coefficients, most = coefficients_of(kind, rollout)
    parameters = policy.trainable()
    rows = ObjectiveGradients(parameters, policy.tapped(), 3, whole=policy.row_per_sample)
    log_probs = policy.log_probs(rollout, slice(0, T)).log_probs
    passes: list[int] = []
    log_probs.register_hook(lambda gradient: passes.append(1))
    rows.backward(log_probs, coefficients)
    separate = 3 if family == "gpt2" else 0  # passes for the layers that cannot be tapped
    assert len(passes) <= most + separate
    for k in range(3):
        loss = (coefficients[k] * policy.log_probs(rollout, slice(0, T)).log_probs).sum()
        expected = torch.autograd.grad(loss, list(parameters.values()))
        for (name, found), gradient in zip(rows.rows.items(), expected, strict=True):
            # Sums of some hundred products of float32 in another order: up to 1.0e-6.
            assert (found[k] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_response_may_not_spell_what_ends_it() -> None:
    policy = policy_on()
    end = policy.dialogue.tokenizer.eos_token
    with pytest.raises(ValueError, match="A response should not spell"):
        policy.tokens_of([f"a{end}b"])


# ---------------------------------------------------------------- training


def steps_of(policy: CausalLMPolicy, *, kl_weight: float = 0.0) -> RolloutSteps:
    return RolloutSteps(
        policy=policy,
        stepper=Stepper(
            policy=policy,
            optimizer=torch.optim.AdamW(policy.trainable().values(), lr=0.02),
            lr=lambda count: 0.02,
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            ema=EMA(policy.trainable(), decay=0.9, every=1),
            max_grad_norm=1.0,
            max_skipped=3,
        ),
        geometry=Geometry.solve(
            groups=4,
            group_size=8,
            updates=2,
            world_size=1,
            max_sample_batch=32,
            max_micro_batch=8,
        ),
        settings=LossConfig(clip_range=0.2, kl_weight=kl_weight, ratio_tolerance=1e-4),
        progress=Progress(LocalComm(), bars=False),
        seed=0,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_that_is_rewarded_becomes_more_frequent(family: str) -> None:
    policy = policy_on(family, size=0, lora_rank=4, lora_alpha=8)
    policy.prepare(PROMPTS)
    steps, counts = steps_of(policy, kl_weight=0.01), []
    update = PlainUpdate(steps, NoProbe())
    for step in range(6):
        steps.progress.completed = step
        requests = [
            Request(prompt=PROMPTS[i % 4], group=i % 4, sibling=i // 4, seed=1000 * step + i)
            for i in range(32)
        ]
        rollout = policy.sample(requests, step=step)
        steps.check_ratio(rollout)
        reward = torch.tensor([text.count("e") for text in rollout.texts]).float()
        counts.append(float(reward.mean()))
        spread = reward.view(8, 4)  # siblings by prompts
        advantage = (spread - spread.mean(0)) / (spread.std(0) + 0.1)
        metrics = update.descend(rollout, advantage.flatten())
        assert metrics["policy/skipped_updates"] == 0
    assert counts[-1] > counts[0] + 1.0


# ---------------------------------------------------------------- loading, and what is refused


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_is_loaded_as_it_was_saved(tmp_path: Path, family: str, dtype: str) -> None:
    original = model(family)
    original.save_pretrained(tmp_path)
    loaded, words = load_with(tmp_path, family) if dtype == "float32" else (None, None)
    if loaded is None:
        tokenizer().save_pretrained(tmp_path)
        loaded, words = load_model(str(tmp_path), dtype=dtype)
    assert loaded.dtype == getattr(torch, dtype)
    assert words("why").input_ids == tokenizer()("why").input_ids
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(loaded.dtype))
    check_fit(str(tmp_path), max_new_tokens=T, prompts=PROMPTS)


def test_what_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.path: should be a folder"):
        load_model(str(tmp_path))
    tokenizer().save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 38}
    bert = BertConfig(**sizes, intermediate_size=8)
    BertForSequenceClassification(bert).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Found BertForSequenceClassification in"):
        load_model(str(tmp_path))
    BloomForCausalLM(
        BloomConfig(hidden_size=8, n_layer=1, n_head=1, vocab_size=38)
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="BloomForCausalLM lacks position_ids"):
        load_model(str(tmp_path))
    headless = LlamaModel(model("llama").config)
    headless.config.architectures = None
    headless.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"lack 1 tensors, first lm_head\.weight"):
        load_model(str(tmp_path))
    model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"weights in .* are missing or damaged"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"policy\.path: should be a folder"):
        load_model(str(tmp_path))


def test_a_tokenizer_that_does_not_serve_is_refused(tmp_path: Path) -> None:
    model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"the tokenizer in .* is missing or damaged"):
        load_model(str(tmp_path))
    with pytest.raises(ConfigError, match="Name one as `eos_token`"):
        policy_on(tokenizer=tokenizer(eos=False))
    words = tokenizer()
    words.add_tokens(["extra"])
    with pytest.raises(ConfigError, match=r"each of the tokenizer's 39 tokens\. Found 38"):
        policy_on(tokenizer=words)


def test_settings_are_checked_before_weights_are_read(tmp_path: Path) -> None:
    model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tokenizer().save_pretrained(tmp_path)
    folder = str(tmp_path)
    check_fit(folder, max_new_tokens=T, target_modules=["q_proj"], prompts=PROMPTS)
    with pytest.raises(ConfigError, match=r"context of 64 tokens\. Found 64"):
        check_fit(folder, max_new_tokens=64)
    with pytest.raises(ConfigError, match=r"from 1 to 56: .*Found 57"):
        check_fit(folder, max_new_tokens=T, max_prompt_tokens=57)
    with pytest.raises(ConfigError, match=r"generation\.chat"):
        check_fit(folder, max_new_tokens=T, chat=True)
    with pytest.raises(ConfigError, match="at most 3 tokens"):
        check_fit(folder, max_new_tokens=T, max_prompt_tokens=3, prompts=PROMPTS)
    with pytest.raises(ValueError, match="ends in 'to_q'"):
        check_fit(folder, max_new_tokens=T, target_modules=["to_q"])


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("max_new_tokens", 0, r"(?s)max_new_tokens.*greater than or equal to 1 .*=0,"),
        ("temperature", 0.0, r"(?s)temperature.*greater than 0 .*=0\.0,"),
        ("temperature", math.nan, r"(?s)temperature.*a finite number .*=nan,"),
        ("eval_temperature", -1.0, r"(?s)eval_temperature.*greater than or equal to 0 .*=-1\.0,"),
    ],
)
def test_numbers_out_of_range_are_refused(option: str, value: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        policy_on(**{option: value})
