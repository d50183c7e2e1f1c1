"""The model card: what the model is, what it reached, how it came to be, how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from star import cost
from star.report.numbers import title, value
from star.sharing import LivPlan, resolve

if TYPE_CHECKING:
    from star.model import StarModel
    from star.trained import Facts

__all__ = ["PICTURE", "card"]

PICTURE = "backbone.svg"
_CACHE_LENGTH = 4096


def card(model: StarModel, facts: Facts, *, architecture: str, has_tokenizer: bool, remark: str = "") -> str:
    """README.md of an export.

    Args:
        model: what is exported.
        facts: how it came to be.
        architecture: the class that loads it, "StarForCausalLM" or one of transformers.
        has_tokenizer: whether tokenizer files are there.
        remark: what else a user of this class must know.
    """
    sections = [
        _front_matter(architecture),
        f"# {model.genome.depth} LIVs, width {model.config.width}\n\n{facts.origin}",
        _loading(architecture, has_tokenizer),
        remark,
        _architecture(model),
        _reached(facts),
        _training(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(architecture: str) -> str:
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            f"tags: [star, architecture-search, {architecture}]",
            "---",
        ]
    )


def _loading(architecture: str, has_tokenizer: bool) -> str:
    if architecture == "StarForCausalLM":
        needs = "Needs `pip install 'star-kernels[hf]'`; no remote code is run."
        importing = (
            "import star.hf  # makes the Auto classes know it\nfrom transformers import AutoModelForCausalLM"
        )
    else:
        needs = f"A plain `{architecture}` of transformers; nothing else is needed."
        importing = "from transformers import AutoModelForCausalLM"
    lines = [f"{importing}{', AutoTokenizer' if has_tokenizer else ''}", ""]
    lines.append('model = AutoModelForCausalLM.from_pretrained("this directory")')
    if has_tokenizer:
        lines += [
            'tokenizer = AutoTokenizer.from_pretrained("this directory")',
            'prompts = tokenizer(["Once upon a time", "The"], padding=True, return_tensors="pt")',
            "print(tokenizer.batch_decode(model.generate(**prompts, max_new_tokens=50)))",
        ]
    code = "\n".join(lines)
    return f"{needs}\n\n```python\n{code}\n```"


def _architecture(model: StarModel) -> str:
    genome, config = model.genome, model.config
    cache = cost.cache_bytes(genome, config, length=_CACHE_LENGTH, dtype=torch.bfloat16)
    numbers = [
        ("parameters", f"{cost.parameters(genome, config):,} (without embeddings, norms and biases)"),
        ("parameters in all", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("cache", f"{cache:,} bytes ({_CACHE_LENGTH:,} tokens, bfloat16)"),
        *((name.replace("_", " "), f"{number:g}") for name, number in config.to_json().items()),
    ]
    livs = [
        (str(plan.index + 1), plan.entry.name, plan.entry.summary, _shared(plan)) for plan in resolve(genome)
    ]
    return "\n\n".join(
        [
            "## Architecture",
            f"Genome: `{genome}`",
            f"![the backbone: one line a LIV, sharing as arcs]({PICTURE})",
            _table(("", ""), numbers),
            _table(("LIV", "class", "what it is", "what it shares"), livs),
        ]
    )


def _shared(plan: LivPlan) -> str:
    parts = []
    if plan.featurizer_owner != plan.index:
        parts.append(f"weights of the featurizer of LIV {plan.featurizer_owner + 1}")
    if plan.source is not None:
        parts.append(f"{', '.join(plan.shared)} of LIV {plan.source + 1}")
    return "; ".join(parts)


def _reached(facts: Facts) -> str:
    if not facts.objectives:
        return ""
    names = list(facts.objectives)
    rows = [("this model", *(value(name, facts.objectives[name]) for name in names))]
    rows += [
        (_plain(reference), *(value(name, measured.get(name)) for name in names))
        for reference, measured in facts.references.items()
    ]
    parts = ["## What it reached", _table(("", *(title(name) for name in names)), rows)]
    if facts.references:
        parts.append("The other rows are reference layouts under the same training.")
    return "\n\n".join(parts)


def _training(facts: Facts) -> str:
    if not facts.settings and not facts.corpus:
        return ""
    rows = [
        *((f"text: {name.replace('_', ' ')}", _plain(item)) for name, item in facts.corpus.items()),
        *((name.replace("_", " "), _plain(item)) for name, item in facts.settings.items()),
        *((f"version of {name}", _plain(item)) for name, item in facts.versions.items()),
    ]
    return f"## How it was trained\n\n{_table(('', ''), rows)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(item: Any) -> str:
    """One cell of a table; names may hold anything."""
    text = "–" if item is None else item if isinstance(item, str) else f"{item}"
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line
    )
