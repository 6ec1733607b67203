"""The SD3 policy on the shipped pipeline: on-policy ratio, windows, KL, plain diffusers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from sections import sd3_policy

from moa_diffusion import tiny
from moa_diffusion.policies import lora
from moa_diffusion.policies.samplers import generators
from moa_diffusion.policies.sd3 import SD3Policy, load_pipeline
from moa_diffusion.types import ConfigError, Request, concatenate

PROMPTS = ['a red sign that says "GO"', "a blue circle on a white background"]
CPU = torch.device("cpu")
SMALL = {"resolution": 32, "steps": 4, "max_sequence_length": 16, "lora_rank": 4}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline(str(tiny.PIPELINE_PATH))


@pytest.fixture
def make(pipeline: Any) -> Any:
    def build(prompts: list[str] = PROMPTS, **options: Any) -> SD3Policy:
        policy = sd3_policy(copy.deepcopy(pipeline), seed=0, **(SMALL | options))
        policy.prepare(prompts)
        return policy

    return build


def requests(count: int) -> list[Request]:
    return [
        Request(prompt=PROMPTS[i % 2], group=i % 2, sibling=i // 2, seed=100 + i)
        for i in range(count)
    ]


def disturb(policy: SD3Policy, size: float = 0.02) -> None:
    """Move every adapter tensor away from its initial value."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=source))


def assert_log_probs_close(policy: SD3Policy, found: Any, expected: Any, steps: range) -> None:
    """Log-probs ``[n, t]`` of the same steps, up to the rounding of the velocity.

    Kernels of another batch, instruction set or number of threads sum in another order. One pass of
    the transformer rounds its output by some multiples of float32's eps; 32, since errors of about
    30 products that follow each other, each a sum of up to 512 terms, add up as a random walk does.
    Guidance makes up to ``2 guidance - 1`` of it (``v = (1 - g) v_0 + g v_1``), and the log-prob
    ``-z^2 / 2`` changes by ``|z| |step.v| / std`` times that: 75 in the last step of CPS, whose
    std is 0.008. Dimensions are averaged, ``|z|`` is about 1, and so are velocities. What the
    log-prob rounds by itself comes on top.
    """
    eps = torch.finfo(torch.float32).eps
    gain = 2 * policy.sampling.guidance - 1
    for column, index in enumerate(steps):
        step = policy._decisions.stochastic[index : index + 1]
        allowed = 32 * eps * (gain * abs(step.v) / step.std + 1)
        difference = (found[:, column] - expected[:, column]).abs().max()
        assert difference <= allowed, (index, float(difference), allowed)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("sampler", ["flow_sde", "cps"])
@pytest.mark.parametrize("step_batch", [1, 2, 3])
def test_log_probs_are_those_of_sampling(
    make: Any, guidance: float, sampler: str, step_batch: int
) -> None:
    policy = make(guidance=guidance, sampler=sampler, step_batch=step_batch)
    disturb(policy)
    rollout = policy.sample(requests(4), step=0)
    assert rollout.log_probs.shape == (4, 3)
    for part, rows in ((rollout, slice(0, 4)), (rollout.select(torch.tensor([2, 1])), [2, 1])):
        chunks = policy.step_chunks(3)
        new = torch.cat([policy.log_probs(part, steps)[0] for steps in chunks], dim=1)
        assert_log_probs_close(policy, new.detach(), rollout.log_probs[rows], range(3))


def test_cps_trains_every_step(make: Any) -> None:
    """By the density the last step's gradient is 39 times that of any other; see samplers.py."""
    policy = make(sampler="cps", noise_level=0.8, steps=10, guidance=1.0)
    rollout = policy.sample(requests(4), step=0)
    parameters = [p for name, p in policy.trainable().items() if ".lora_B." in name]
    norms = []
    for i in range(9):
        log_probs = policy.log_probs(rollout, slice(i, i + 1)).log_probs
        found = torch.autograd.grad(
            (log_probs * torch.tensor([[1], [-1], [1], [-1]])).sum(), parameters
        )
        norms.append(float(torch.cat([part.flatten() for part in found]).norm()))
    # .26 .46 .62 .78 .95 1 .87 .67 .03 of the largest.
    assert max(norms) / sorted(norms)[-2] < 1.2
    assert max(norms[:-1]) / min(norms[:-1]) < 6


def test_a_sample_depends_on_its_own_seed_alone(make: Any) -> None:
    policy = make()
    together = policy.sample(requests(4), step=0)
    alone = policy.sample(requests(4)[2:3], step=0)
    # Pixels in [0, 1]. Three passes and the decoder, of some 30 products each, differ by rounding
    # in another order; a tenth of the smallest difference that 8 bits keep is 4e-4.
    torch.testing.assert_close(alone.images, together.images[2:3], atol=1e-4, rtol=0)
    steps = policy.trained_steps(0)
    assert_log_probs_close(policy, alone.log_probs, together.log_probs[2:3], steps)


def test_window_lies_where_the_mode_says(make: Any) -> None:
    full = make(steps=10)
    assert full.trained_steps(3) == range(9)
    random = make(steps=10, window=2)
    drawn = [random.trained_steps(step) for step in range(50)]
    assert make(steps=10, window=2).trained_steps(31) == drawn[31]  # whatever was asked before
    assert {len(window) for window in drawn} == {2}
    assert {window[0] for window in drawn} == set(range(8))
    slide = make(steps=10, window=2, window_mode="slide", window_stay=3)
    assert [slide.trained_steps(step)[0] for step in (0, 2, 3, 23, 24)] == [0, 0, 1, 7, 0]
    assert make(steps=10, window=3, window_mode="first").trained_steps(7) == range(3)


def test_window_in_the_middle_is_on_policy(make: Any) -> None:
    policy = make(steps=8, window=2)
    step = next(step for step in range(50) if policy.trained_steps(step)[0] == 4)
    rollout = policy.sample(requests(2), step=step)
    new = policy.log_probs(rollout, slice(0, 2)).log_probs
    assert_log_probs_close(policy, new.detach(), rollout.log_probs, policy.trained_steps(step))


@pytest.mark.parametrize("kind", ["gaussian", "dt_free", "velocity"])
def test_kl_is_zero_at_first_and_grows(make: Any, kind: str) -> None:
    policy = make(kl=kind)
    rollout = policy.sample(requests(2), step=0)
    kl = policy.log_probs(rollout, slice(0, 3), with_kl=True).kl
    assert kl.shape == (2, 3)
    assert torch.equal(kl, torch.zeros(2, 3))
    disturb(policy)
    kl = policy.log_probs(rollout, slice(0, 3), with_kl=True).kl
    assert (kl > 0).all()
    assert kl.requires_grad
    assert all(p.requires_grad for p in policy.trainable().values())


def test_gaussian_kl_is_that_of_the_two_means(make: Any) -> None:
    policy = make(steps=4)
    disturb(policy)
    rollout = policy.sample(requests(2), step=0)
    kl = policy.log_probs(rollout, slice(1, 2), with_kl=True).kl
    x = rollout.trace["latents"][:, 1]
    embeds = policy._embeds(
        [request.prompt for request in rollout.requests], policy.sampling.guidance
    )
    s, s_next = policy._schedule.sigmas[1], policy._schedule.sigmas[2]
    with torch.no_grad():
        v = policy._velocity(x, torch.full((2,), s), embeds, policy.sampling.guidance)
        with lora.disabled(policy._velocity.adapted):
            v_ref = policy._velocity(x, torch.full((2,), s), embeds, policy.sampling.guidance)
    g2 = policy.sampling.noise_level**2 * s / (1 - s)
    factor = (1 + g2 * (1 - s) / (2 * s)) * (s_next - s)
    std = (g2 * (s - s_next)) ** 0.5
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(factor * v, std), normal(factor * v_ref, std))
    # The same passes in the same batch; of the formula, some ten operations in float32, 2e-7.
    torch.testing.assert_close(kl[:, 0].detach(), exact.flatten(1).mean(1), rtol=1e-5, atol=0)


def test_generate_draws_what_plain_diffusers_draws(make: Any, pipeline: Any) -> None:
    policy = make(eval_steps=6, eval_guidance=4.5)
    asked = requests(2)
    expected = pipeline(
        [request.prompt for request in asked],
        num_inference_steps=6,
        guidance_scale=4.5,
        height=32,
        width=32,
        max_sequence_length=16,
        generator=generators([request.seed for request in asked]),
        output_type="pt",
    ).images
    # The same passes in the same batch: the update of the latents alone is written otherwise, and
    # six of them and the decoder made 2.7e-6 of that. The bound is that of images above.
    torch.testing.assert_close(policy.generate(asked).outputs, expected, atol=1e-4, rtol=0)


def test_decoder_is_channels_last_and_decodes_as_a_plain_one(make: Any, pipeline: Any) -> None:
    policy = make()
    latents = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    found, plain = policy._decode(latents), pipeline.vae
    scaled = latents / plain.config.scaling_factor + plain.config.shift_factor
    with torch.no_grad():
        raw = plain.decode(scaled, return_dict=False)[0]
    assert plain.decoder.conv_in.weight.is_contiguous()
    last = torch.channels_last
    assert policy.vae.decoder.conv_in.weight.is_contiguous(memory_format=last)
    assert policy.vae.decode(scaled).sample.is_contiguous(memory_format=last)
    # Sums in another order: pixels in [-1, 1] were 1e-5 apart. The bound is that of images above.
    torch.testing.assert_close(found, (raw / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("metadata", [True, False])
def test_saved_adapter_draws_the_same_in_plain_diffusers(
    make: Any, pipeline: Any, tmp_path: Any, metadata: bool
) -> None:
    policy = make(lora_rank=4, lora_alpha=8, eval_steps=6, eval_guidance=1.0)
    disturb(policy, 0.1)
    policy.save(tmp_path)
    if not metadata:  # a loader that knows nothing of it
        from safetensors.torch import load_file, save_file

        file = tmp_path / "pytorch_lora_weights.safetensors"
        save_file(load_file(file), file, metadata={"format": "pt"})
    plain = copy.deepcopy(pipeline)
    plain.load_lora_weights(tmp_path)
    asked = requests(2)
    call = {
        "prompt": [request.prompt for request in asked],
        "num_inference_steps": 6,
        "guidance_scale": 1.0,
        "height": 32,
        "width": 32,
        "max_sequence_length": 16,
        "output_type": "pt",
    }
    drawn = plain(**call, generator=generators([request.seed for request in asked])).images
    base = pipeline(**call, generator=generators([request.seed for request in asked])).images
    mine = policy.generate(asked).outputs
    # By 0.8.
    assert (base - mine).abs().max() > 0.05, "the adapter should change the image"
    # Pixels in [0, 1]: peft adds B A x where the policy has B A in the weight, rounded otherwise
    # (1.7e-6 apart); a tenth of what an image of 8 bits could show is 4e-4.
    assert (drawn - mine).abs().max() < 1e-4


def test_checkpointing_changes_memory_not_gradients(make: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = make(gradient_checkpointing=checkpointing)
        disturb(policy)
        rollout = policy.sample(requests(2), step=0)
        policy.log_probs(rollout, slice(0, 1)).log_probs.sum().backward()
        gradients.append([p.grad for p in policy.trainable().values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        # The same kernels run again on the same numbers; threads may add up in another order.
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-6)


def test_half_precision_keeps_adapter_latents_and_log_probs_in_float32(pipeline: Any) -> None:
    half = load_pipeline(str(tiny.PIPELINE_PATH), dtype="bfloat16")
    policy = sd3_policy(half, seed=0, **SMALL)
    policy.prepare(PROMPTS)
    rollout = policy.sample(requests(2), step=0)
    assert policy.transformer.dtype == torch.bfloat16
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    assert rollout.log_probs.dtype == rollout.trace["latents"].dtype == torch.float32
    chunks = policy.step_chunks(3)
    new = torch.cat(
        [policy.log_probs(rollout, steps, with_kl=True).log_probs for steps in chunks], dim=1
    )
    assert new.dtype == torch.float32
    # Passes of the batch that sampling had; of another they may differ by bfloat16's eps, 0.008.
    assert torch.equal(new, rollout.log_probs)
    new.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.trainable().values())


def test_adapter_sits_on_the_eight_attention_projections(make: Any) -> None:
    policy = make()
    suffixes = {name.split(".lora_")[0].split(".", 2)[2] for name in policy.trainable()}
    assert suffixes == set(lora.ATTENTION)
    few = make(target_modules=["attn.to_q"])
    assert all("attn.to_q" in name for name in few.trainable())
    with pytest.raises(ValueError, match=r"ends in 'attn\.to_x'"):
        make(target_modules=["attn.to_x"])


def test_initial_adapter_depends_on_the_seed_alone(pipeline: Any) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = sd3_policy(copy.deepcopy(pipeline), seed=0, **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    second = sd3_policy(copy.deepcopy(pipeline), seed=0, **SMALL)
    other = sd3_policy(copy.deepcopy(pipeline), seed=1, **SMALL)
    name = next(name for name in first.trainable() if ".lora_A." in name)
    assert torch.equal(first.trainable()[name], second.trainable()[name])
    assert not torch.equal(first.trainable()[name], other.trainable()[name])


def test_encoders_leave_after_prepare_and_the_disk_cache_replaces_them(
    make: Any, pipeline: Any, tmp_path: Any
) -> None:
    policy = make(embeds_dir=str(tmp_path))
    assert not policy.encode.encoders_loaded
    with pytest.raises(RuntimeError, match="announced"):
        policy.encode(["a green star on a black background"])
    second = sd3_policy(copy.deepcopy(pipeline), seed=0, embeds_dir=str(tmp_path), **SMALL)
    second.encode._pipeline.text_encoder_3 = None  # would fail if anything were encoded again
    second.encode._pipeline.text_encoder_2 = None
    second.encode._pipeline.text_encoder = None
    for one, other in zip(policy.encode(PROMPTS), second.encode(PROMPTS), strict=True):
        assert torch.equal(one, other)


def test_encoders_stay_when_the_embeddings_do_not_fit(pipeline: Any) -> None:
    policy = sd3_policy(copy.deepcopy(pipeline), seed=0, embeds_memory_gb=1e-5, **SMALL)
    policy.prepare(PROMPTS)
    assert policy.encode.encoders_loaded
    assert policy.encode(["a green star on a black background"])[0].shape[0] == 1


@pytest.mark.parametrize("resolution", [60, 8, 4096])
def test_resolution_that_does_not_fit_is_refused(make: Any, resolution: int) -> None:
    with pytest.raises(ConfigError, match=f"multiple of 16.*Found {resolution}"):
        make(resolution=resolution)


def test_a_path_without_an_sd3_pipeline_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"policy\.path"):
        load_pipeline(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ConfigError, match="Found 'FluxPipeline'"):
        load_pipeline(str(tmp_path))


def test_siblings_may_share_their_start(make: Any) -> None:
    policy = make(window=1, window_mode="first", steps=4)
    apart = requests(2)
    shared = [Request(prompt=PROMPTS[0], sibling=i, seed=100 + i, start_seed=9) for i in range(2)]
    first = [policy.sample(asked, step=0).trace["latents"] for asked in (apart, shared)]
    assert not torch.equal(first[0][0, 0], first[0][1, 0])
    assert torch.equal(first[1][0, 0], first[1][1, 0])
    assert not torch.equal(first[1][0, 1], first[1][1, 1]), "the step's noise is each one's own"


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_siblings_of_one_start_are_drawn_once_until_the_window(make: Any, guidance: float) -> None:
    policy = make(steps=8, window=2, guidance=guidance)
    disturb(policy)
    step = next(step for step in range(50) if policy.trained_steps(step)[0] == 4)
    starts = [9, 9, None, 9, 7, None, 9]  # the last prompt differs, and so do samples without one
    asked = [
        Request(prompt=PROMPTS[i == 6], sibling=i, seed=100 + i, start_seed=start)
        for i, start in enumerate(starts)
    ]
    rows: list[int] = []
    handle = policy.transformer.register_forward_pre_hook(
        lambda module, arguments, options: rows.append(len(options["hidden_states"])),
        with_kwargs=True,
    )
    together = policy.sample(asked, step=step)
    assert rows == [count * policy.row_copies for count in [5] * 4 + [7] * 4]
    handle.remove()

    latents = together.trace["latents"]
    for sibling in (1, 3):
        assert torch.equal(latents[0, 0], latents[sibling, 0])
        assert not torch.equal(latents[0, 1], latents[sibling, 1])
    assert len({latents[i, 0].sum().item() for i in (0, 2, 4, 5, 6)}) == 5
    new = policy.log_probs(together, slice(0, 2)).log_probs
    steps = policy.trained_steps(step)
    assert_log_probs_close(policy, new.detach(), together.log_probs, steps)
    alone = concatenate([policy.sample([one], step=step) for one in asked])
    assert_log_probs_close(policy, together.log_probs, alone.log_probs, steps)
    # Bounds as of `test_a_sample_depends_on_its_own_seed_alone`, with guidance's gain.
    allowed = 1e-4 * (2 * guidance - 1)
    torch.testing.assert_close(together.images, alone.images, atol=allowed, rtol=0)


@pytest.mark.parametrize("clip", ["divergence", "normalized"])
def test_what_a_clip_sees_is_how_far_the_velocity_has_moved(make: Any, clip: str) -> None:
    """Nothing at first; then by hand, from velocities before and after."""
    policy = make(guidance=1.0, loss_clip=clip, step_batch=3)
    disturb(policy)
    rollout = policy.sample(requests(2), step=0)
    before = policy.log_probs(rollout, slice(0, 3))
    # 32 roundings of the velocity, as in `assert_log_probs_close`, over the std of 0.2 and more.
    assert before.moved.abs().max() < (2e-5 if clip == "normalized" else 1e-8)

    watched, calls = policy._velocity, []
    policy._decisions._velocity = lambda *given: calls.append(watched(*given)) or calls[-1]
    policy.log_probs(rollout, slice(0, 3))
    disturb(policy)
    found = policy.log_probs(rollout, slice(0, 3)).moved
    old, new = (part.detach().view(2, 3, *part.shape[1:]) for part in calls)
    assert not found.requires_grad
    for i in range(3):
        step = policy._decisions.stochastic[i : i + 1]
        moved = step.v * (new[:, i] - old[:, i])
        if clip == "divergence":
            expected = (moved / step.std).square().flatten(1).mean(1) / 2
        else:
            expected = (moved * rollout.trace["noise"][:, i] / step.v.abs()).flatten(1).mean(1)
        # The old mean is what is left of the latents without their noise: eps of 3 in 0.2.
        torch.testing.assert_close(found[:, i], expected, rtol=1e-4, atol=1e-6)


def test_steps_are_weighed_by_their_noise(make: Any) -> None:
    """Gradients of a step are those of a plain one, times its noise over the mean of all."""
    found = {}
    for kind in ("plain", "noise"):
        policy = make(guidance=1.0, loss_steps=kind)
        disturb(policy)
        rollout = policy.sample(requests(2), step=0)
        log_probs = policy.log_probs(rollout, slice(0, 3)).log_probs
        assert_log_probs_close(policy, log_probs.detach(), rollout.log_probs, range(3))
        found[kind] = log_probs.detach()
    std = policy._decisions.stochastic.std.flatten()
    torch.testing.assert_close(found["noise"], found["plain"] * std / std.mean())


def test_the_norm_is_that_of_the_velocity_over_the_references(make: Any) -> None:
    policy = make(guidance=1.0, step_batch=2)
    rollout = policy.sample(requests(2), step=0)
    terms = policy.log_probs(rollout, slice(0, 2), with_kl=True)
    assert torch.equal(terms.norm, torch.ones(2, 2))  # the adapter begins with nothing
    disturb(policy)
    terms = policy.log_probs(rollout, slice(0, 2), with_kl=True)
    gradients = torch.autograd.grad(terms.norm.sum(), list(policy.trainable().values()))
    assert any(part.abs().max() > 0 for part in gradients)


def test_the_norm_of_a_rollout_is_of_all_its_steps(make: Any) -> None:
    """Also those before a late window, which siblings of one start share."""
    policy = make(guidance=1.0, window=1, window_mode="slide", window_stay=1, shared_start=True)
    asked = [replace(one, start_seed=one.group) for one in requests(4)]
    watched, norms = policy._velocity, []

    def velocity(x: Any, *given: Any) -> Any:
        v = watched(x, *given)
        norms.append(v.square().flatten(1).mean(1).sqrt())
        return v

    policy._decisions._velocity = velocity
    found = policy.sample(asked, step=2).statistics["velocity_norm"]
    assert [len(step) for step in norms] == [2, 2, 4, 4]  # two starts, then all
    steps = [step[[0, 1, 0, 1]] if len(step) == 2 else step for step in norms]
    assert torch.equal(found, torch.stack(steps).mean(0))


def test_evaluations_may_draw_another_size(make: Any) -> None:
    """The same images as a policy that also trains on that size; rollouts keep theirs."""
    other = make(eval_resolution=64, eval_steps=2, eval_guidance=1.0)
    assert other.sample(requests(1), step=0).images.shape == (1, 3, 32, 32)
    whole = make(resolution=64, eval_steps=2, eval_guidance=1.0)
    assert torch.equal(other.generate(requests(1)).outputs, whole.generate(requests(1)).outputs)
    with pytest.raises(ConfigError, match=r"^evaluation\.resolution: should be a multiple of 16"):
        make(eval_resolution=40)


def test_even_steps_are_on_policy_and_of_one_size(make: Any) -> None:
    """Gradients of plain steps differ 20-fold on this schedule; those of even ones do not."""
    ends = []
    for even in (False, True):
        policy = make(steps=10, guidance=1.0, loss_steps="equal" if even else "plain")
        disturb(policy)
        rollout = policy.sample(requests(4), step=0)
        norms = []
        for step in policy.step_chunks(9):
            log_probs = policy.log_probs(rollout, step).log_probs
            assert_log_probs_close(
                policy, log_probs.detach(), rollout.log_probs[:, step], range(9)[step]
            )
            weights = list(policy.trainable().values())
            parts = torch.autograd.grad(log_probs[:, 0].sum(), weights, materialize_grads=True)
            norms.append(float(torch.cat([part.flatten() for part in parts]).norm()))
        ends.append(max(norms) / min(norms))
    assert ends[1] < 0.5 * ends[0]
