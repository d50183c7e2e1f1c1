"""Genomes that are a Llama or an LFM2 in disguise: the same logits from transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers", reason="needs the extra hf (transformers)")

from star import Genome, ModelConfig, build_model  # noqa: E402
from star.commands import app  # noqa: E402
from star.export.native import as_native  # noqa: E402
from star.export.write import export  # noqa: E402
from star.trained import Facts, Trained  # noqa: E402

SIZES = ModelConfig(width=64, head_dim=16, vocab_size=100)
LLAMAS = {
    "multi-head": "11111-91111-11111-91111",
    "grouped": "31111-91111-31111-91111",
    "heads of different repeats": "11111-91111-31111-91111-41111-91111",
    "shared weights": "11211-92211-11211-92211",
}
LFM2S = {
    "with attention": "71111-91111-31111-91111-71111-91111-41111-91111",
    "shared weights": "71211-92211-71211-92211-33211-91111-33211-91111",
}


def exported(genome: str, directory: Path, **changes: Any) -> tuple[Any, Any, str]:
    """The model, what transformers loads of its native export, and that class."""
    model = build_model(Genome.parse(genome), ModelConfig(**{**SIZES.to_json(), **changes}), seed=0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("output.weight"):
                parameter.mul_(3)
            elif name.startswith("norm"):
                parameter.mul_(torch.linspace(0.5, 2, len(parameter)))
    architecture = export(Trained("a model", model, None, Facts("Made for a test.")), directory, native=True)
    return model, transformers.AutoModelForCausalLM.from_pretrained(directory), architecture


@pytest.mark.parametrize(
    ("genome", "architecture"),
    [
        *((genome, "LlamaForCausalLM") for genome in LLAMAS.values()),
        *((genome, "Lfm2ForCausalLM") for genome in LFM2S.values()),
    ],
    ids=[*(f"Llama, {name}" for name in LLAMAS), *(f"LFM2, {name}" for name in LFM2S)],
)
def test_gives_the_same_logits(genome: str, architecture: str, tmp_path: Path) -> None:
    model, native, made = exported(genome, tmp_path / "x", rope_theta=5000.0)
    assert made == architecture == type(native).__name__
    ids = torch.randint(0, 100, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(ids), native(ids).logits
    assert expected.std() > 0.25
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    own = model.generate(ids[:, :9], 12, temperature=0)
    assert (
        native.generate(ids[:, :9], max_new_tokens=12, do_sample=False, pad_token_id=0).tolist()
        == own.tolist()
    )


def test_an_lfm2_in_bfloat16_is_as_near_as_the_model_itself(tmp_path: Path) -> None:
    model, _, _ = exported(LFM2S["with attention"], tmp_path / "x")
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.bfloat16)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        exact, rounded = model(ids), native(ids).logits.float()
        own = model.to(torch.bfloat16)(ids).float()
    assert (rounded - exact).norm() < 2 * (own - exact).norm()


@pytest.mark.parametrize(
    ("genome", "says"),
    [
        ("51111-91111", r"LIV 1 \(Rec-1\) is in a mixer's place"),
        ("21111-91111", r"LIV 1 \(SA-2\)"),
        ("10.1.1.1.1-91111", r"LIV 1 \(SA-1-Diff\)"),
        ("16.1.1.1.1-91111", r"LIV 1 \(GConv-1-Diff\)"),
        ("11111-91111-91111-91111", r"LIV 3 \(GMemless\) is in a mixer's place"),
        ("11111-11111", r"LIV 2 \(SA-1\) is in a gated unit's place"),
        ("11111-91111-11111", "has 3 LIVs"),
        ("71111-91111-71111-91111", "no LIV is attention"),
        ("11112-91111-11112-91111", "LIV 3 .* reuses key of LIV 1"),
    ],
)
def test_says_why_a_genome_is_neither(genome: str, says: str) -> None:
    model = build_model(Genome.parse(genome), SIZES, device="meta")
    with pytest.raises(ValueError, match=says):
        as_native(model)


def test_the_command(tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="star")

    given = ("--width", "64", "--to", tmp_path / "x", "--native", "--json")
    result = run("export", "--genome", "lfm2", "--depth", "8", *given)
    assert json.loads(result.stdout)["architecture"] == "Lfm2ForCausalLM"
    assert "float16 can not" in (tmp_path / "x" / "README.md").read_text()
    refused = run("export", "--genome", "striped_mamba", "--depth", "4", *given[:-1], "--force")
    assert refused.exit_code == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "star: --native: LIV 1 (Rec-1)" in refused.stderr
    assert "'lfm2'; star takes 'star'" in run("generate", tmp_path / "x", "a").stderr
