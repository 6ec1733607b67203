"""The model card of exported weights: how to load them, how they were trained, what they score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from moa_diffusion import __version__, assembly
from moa_diffusion.config import Config
from moa_diffusion.evaluation.candidates import Candidate
from moa_diffusion.evaluation.texts import TextSettings
from moa_diffusion.policies.adapters import Adapter
from moa_diffusion.report.markdown import markdown
from moa_diffusion.report.summary import Summary, drawn, summarise
from moa_diffusion.report.table import Table
from moa_diffusion.statistics.bootstrap import LEVEL

LISTED = 20  # prompts in the card
STABILITY_AI = "stable-diffusion-3"  # in the names of models that have its licence
SETTINGS = (  # of the configuration, that the card names; all of them are in config.yaml
    *("policy.lora.rank", "policy.lora.alpha", "policy.dtype", "optimizer.lr", "ema.decay"),
    *("trainer.groups", "trainer.group_size", "trainer.updates"),
    *("loss.kind", "loss.clip_range", "loss.kl_weight", "seed"),
)
OF_IMAGES = ("resolution", "steps", "guidance", "sampler", "noise_level", "window")
OF_TEXTS = ("max_new_tokens", "temperature")
COMFYUI = (
    "ComfyUI loads the same file (Load LoRA): it knows diffusers' names of the layers of Stable "
    "Diffusion 3. The scale is in the weights, so its strength is 1. Programs that want the names "
    "of kohya-ss, with queries, keys and values in one layer, do not read it."
)
STABILITY = (
    "Stable Diffusion 3 and 3.5 are under the Stability AI Community License, which holds for "
    "what is derived from them too."
)


def model_card(
    settings: Config,
    each: Mapping[str, Config],
    members: Sequence[Candidate],
    shares: Sequence[float],
    adapter: Adapter,
    table: Table | None,
    *,
    noun: str,
    name: str,
    shown: str | None,
    gallery: Mapping[str, str],
) -> str:
    """Return the card in Markdown, with the metadata that model hubs read in front.

    Args:
        settings: The settings that all members share.
        each: The configuration of every run by name.
        members: The checkpoints, one per run.
        shares: The weight of each member.
        adapter: The LoRA weights that are exported.
        table: The base model and this one, if they were evaluated.
        noun: What the model draws, in the plural.
        name: The model's name.
        shown: The file beside the card with samples of both, if they were evaluated.
        gallery: Files of the model's images beside the card, by prompt.
    """
    base = settings.policy.path
    head, usage = _of_texts(settings, name) if noun == "completions" else _of_images(settings, name)
    if not Path(assembly.model_path(settings)).is_dir():
        head["base_model"] = base
    if STABILITY_AI in base:
        head |= {"license": "other", "license_name": "stabilityai-ai-community"}
        head["license_link"] = "https://stability.ai/license"
    if gallery:
        head["widget"] = [{"text": text, "output": {"url": url}} for text, url in gallery.items()]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"LoRA weights (rank {adapter.rank}) for the base model `{Path(base).name}`, trained with "
        "moa-diffusion on several rewards at once.",
        *(["<Gallery />"] if gallery else []),
        f"```python\n{usage}\n```",
        *([COMFYUI] if noun != "completions" else []),
        "## Training",
        _training(each, members, shares),
        _settings(each, images=noun != "completions"),
        "## Scores",
        *(
            _scores(table, summarise(table), shown)
            if table is not None and shown is not None
            else ["Not evaluated."]
        ),
        "## Licence",
        "An adapter is made for one base model and is of use only with it: the licence of the base "
        f"model holds for it, and for its {noun} as far as it says so. The rewards above may be "
        "models with terms of their own on what is trained with them; look them up before you "
        "publish or sell." + (f" {STABILITY}" if STABILITY_AI in base else ""),
    ]
    return "\n\n".join(parts) + "\n"


def _of_images(settings: Config, name: str) -> tuple[dict[str, object], str]:
    """Return metadata, and the code that draws as the evaluation does."""
    side, section = settings.deployed_resolution, settings.evaluation
    head: dict[str, object] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "text-to-image", "stable-diffusion-3", "reinforcement-learning"],
    }
    return head, (
        "from diffusers import StableDiffusion3Pipeline\n\n"
        "pipeline = StableDiffusion3Pipeline.from_pretrained("
        f'"{_public_name(settings.policy.path)}")\n'
        f'pipeline.load_lora_weights("{name}")\n'
        f"image = pipeline(\n    prompt, num_inference_steps={section.steps}, "
        f"guidance_scale={section.guidance:g},\n    height={side}, width={side},\n    "
        f"max_sequence_length={settings.policy.max_sequence_length},\n).images[0]"
    )


def _of_texts(settings: Config, name: str) -> tuple[dict[str, object], str]:
    """Return metadata, and the code that writes as the evaluation does."""
    base = _public_name(settings.policy.path)
    generation = TextSettings.of(settings, assembly.model_path(settings), torch.device("cpu"))
    head: dict[str, object] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "text-generation", "reinforcement-learning"],
    }
    tokens = (
        'tokenizer.apply_chat_template(\n    [{"role": "user", "content": prompt}], '
        'add_generation_prompt=True,\n    return_tensors="pt", return_dict=True,\n)'
        if generation.chat
        else 'tokenizer(prompt, return_tensors="pt")'
    )
    choice = (
        f"do_sample=True, temperature={generation.temperature:g}, top_k=0, top_p=1.0"
        if generation.temperature > 0
        else "do_sample=False"
    )
    return head, (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(\n    AutoModelForCausalLM.from_pretrained("{base}"), '
        f'"{name}"\n)\n'
        f"inputs = {tokens}\n"
        "found = model.generate(\n"
        f"    **inputs, max_new_tokens={generation.max_new_tokens}, {choice},\n)\n"
        'text = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], '
        "skip_special_tokens=True)"
    )


def _training(
    each: Mapping[str, Config], members: Sequence[Candidate], shares: Sequence[float]
) -> str:
    rows = [["run", "weight", "rollouts", "weights", "method", "rewards"]]
    for member, share in zip(members, shares, strict=True):
        settings = each[member.series]
        rewards = [
            f"{name} x {weight:g}" if (weight := float(options.get("weight", 1))) != 1 else name
            for name, options in settings.rewards.items()
        ]
        rows.append(
            [
                member.series,
                f"{share:g}",
                str(member.step),
                "averaged" if member.ema else "last",
                settings.objectives.method,
                ", ".join(rewards),
            ]
        )
    return markdown(rows)


def _settings(each: Mapping[str, Config], *, images: bool) -> str:
    """Return the main settings of each run, and the versions that wrote this."""
    section, names = ("sampling", OF_IMAGES) if images else ("generation", OF_TEXTS)
    values = {
        run: assembly.flat(one) | {"policy.lora.alpha": one.policy.lora.numerator}
        for run, one in each.items()
    }
    keys = [*SETTINGS, *(f"{section}.{name}" for name in names)]
    rows = [["setting", *values], *([key, *(str(v[key]) for v in values.values())] for key in keys)]
    libraries = ("torch", "diffusers" if images else "transformers", "peft")
    versions = [f"moa-diffusion {__version__}", *(f"{name} {version(name)}" for name in libraries)]
    files = "`config.yaml` has" if len(each) == 1 else "`config-RUN.yaml` have"
    return f"{markdown(rows)}\n\n{files} all of them. Exported with {', '.join(versions)}."


def _scores(table: Table, summary: Summary, shown: str) -> list[str]:
    base, model = summary.models
    rows = [["reward", "unit", "base model", "this model", "gain", "improved prompts"]]
    for name in table.rewards:
        one = model.rewards[name]
        rows.append(
            [
                name,
                table.units[name] or "-",
                base.rewards[name].mean.text(".4g"),
                one.mean.text(".4g"),
                one.gain.text("+.4g"),
                "-" if math.isnan(one.improved) else f"{one.improved:.0%}",
            ]
        )
    scorers = [["reward", "version", "scored by"]]
    for name, scorer in table.scorers.items():
        facts = ", ".join(f"{key} {value}" for key, value in scorer["provenance"].items())
        scorers.append([name, scorer["version"], facts or "no weights"])
    listed = [f"- {prompt}" for prompt in table.prompts[:LISTED]]
    if len(table.prompts) > LISTED:
        listed.append(f"- and {len(table.prompts) - LISTED} more")
    return [
        f"{len(table.prompts)} prompts x {len(table.seeds)} seeds; {drawn(table)}; in brackets "
        f"{LEVEL:.0%} bootstrap intervals over prompts.",
        markdown(rows),
        f"{'!' if table.texts is None else ''}"
        f"[The same prompts and seed, base model and this one]({shown})",
        markdown(scorers),
        "The prompts:",
        "\n".join(listed),
    ]


def _public_name(base: str) -> str:
    """Return the name of a base model that a reader knows it by.

    It is not a path on the machine that trained the LoRA.
    """
    return "path/to/the/base/model" if base == "tiny" or Path(base).is_dir() else base
