"""`star export`: what is written, that it computes the same, that it appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from recorded_runs import evaluation, record, small_settings
from stand_in import CONFIG, SETTINGS
from typer.testing import CliRunner

from star import Genome, ModelConfig, build_model, training_directory, weights
from star.commands import app
from star.data import open_corpus
from star.data.tokenization import ByteTokenizer
from star.search.directory import RunDirectory
from star.search.settings import DataSettings
from star.trained import open_trained

GENOME = "13211-13211-72212-72212-51111-91111"
BPE = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "padding": {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    },
    "truncation": {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="star")


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


def refused(*arguments: object, code: int = 2) -> str:
    """The one line on stderr of a command that fails and prints nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    done(
        "export",
        "--genome",
        GENOME,
        "--width",
        "32",
        "--head-dim",
        "8",
        "--seed",
        "3",
        "--to",
        tmp_path / "x",
    )
    return tmp_path / "x"


@pytest.fixture
def run_with_weights(tmp_path: Path) -> Path:
    """A run whose best candidate has its weights."""
    settings = small_settings()
    members = [Genome.parse("71111-91111"), Genome.parse("11111-91111")]
    rows = [
        evaluation(0, members[0], None, origin="reference:LFM2"),
        evaluation(1, members[1], 0, objectives={"quality": 2.5, "size": 4096}),
    ]
    directory = record(tmp_path / "run", rows, settings=settings)
    model = build_model(members[1], settings.model, seed=7)
    weights.save_weights(model, RunDirectory(directory).weights_of(1), {"genome": str(members[1])})
    return directory


class TestFromAGenome:
    def test_holds_the_model(self, exported: Path) -> None:
        model = build_model(Genome.parse(GENOME), ModelConfig(width=32, head_dim=8), seed=3)
        stored = safetensors.torch.load_file(exported / "model.safetensors")
        assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in model.parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(stored[f"model.{name}"], parameter), name
        config = json.loads((exported / "config.json").read_text())
        assert config["model_type"] == "star"
        assert config["genome"] == GENOME
        assert config["eos_token_id"] == 255

    def test_card_says_what_it_is(self, exported: Path) -> None:
        card = (exported / "README.md").read_text()
        assert GENOME in card
        assert "has not been trained" in card
        assert "B of LIV 3" in card
        assert "weights of the featurizer of LIV 1" in card
        assert (exported / "backbone.svg").read_text().startswith("<?xml")

    def test_loads_in_transformers_without_remote_code(self, exported: Path) -> None:
        pytest.importorskip("transformers", reason="needs the extra hf (transformers)")
        from transformers import AutoModelForCausalLM

        import star.hf  # noqa: F401

        model = build_model(Genome.parse(GENOME), ModelConfig(width=32, head_dim=8), seed=3).eval()
        ids = torch.arange(20)[None]
        with torch.no_grad():
            loaded = AutoModelForCausalLM.from_pretrained(exported)
            assert torch.equal(loaded(ids).logits, model(ids))
        assert loaded.generation_config.eos_token_id == 255

    def test_without_a_tokenizer_where_tokens_are_no_bytes(self, tmp_path: Path) -> None:
        done("export", "--genome", "91111", "--width", "16", "--vocab-size", "99", "--to", tmp_path / "x")
        assert not (tmp_path / "x" / "tokenizer.json").exists()
        assert "no tokenizer.json" in refused("generate", tmp_path / "x", "a")

    def test_baselines(self, tmp_path: Path) -> None:
        out = done(
            "export", "--genome", "lfm2", "--depth", "4", "--width", "16", "--to", tmp_path / "x", "--json"
        )
        assert json.loads(out)["genome"].startswith("71111-91111")

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--to", "x"), "takes a run directory or --genome"),
            (("missing", "--to", "x"), "run directory missing does not exist"),
            ((".", "--genome", "91111", "--to", "x"), "one of them"),
            ((".", "--width", "16", "--to", "x"), "--width is for --genome"),
            ((".", "--to", "x"), "holds no search"),
            (("--genome", "91111", "--id", "3", "--to", "x"), "--id is for a run"),
            (("--genome", "nothing", "--to", "x"), "takes a genome or one of"),
            (("--genome", "11211-21211", "--to", "x"), "gene 2"),
            (("--genome", "91111", "--width", "30", "--to", "x"), "width is 30"),
            (
                (
                    "--genome",
                    "91111",
                ),
                "--to",
            ),
        ],
    )
    def test_refuses(
        self, arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert says in refused("export", *arguments)
        assert not (tmp_path / "x").exists()


class TestFromARun:
    def test_the_best_candidate(self, run_with_weights: Path, tmp_path: Path) -> None:
        value = json.loads(done("export", run_with_weights, "--to", tmp_path / "x", "--json"))
        assert value["genome"] == "11111-91111"
        assert value["tokenizer"] is True
        card = (tmp_path / "x" / "README.md").read_text()
        assert "2.5000" in card
        assert "LFM2" in card
        assert "learning rate" in card
        assert "ab" * 32 in card

    def test_a_wrong_id(self, run_with_weights: Path, tmp_path: Path) -> None:
        assert "no candidate 9" in refused("export", run_with_weights, "--id", "9", "--to", tmp_path / "x")

    def test_weights_of_another_genome(self, run_with_weights: Path, tmp_path: Path) -> None:
        path = RunDirectory(run_with_weights).weights_of(1)
        other = build_model(Genome.parse("11111-91111"), small_settings().model, seed=7)
        weights.save_weights(other, path, {"genome": "91111"})
        assert "weights of another genome" in refused("export", run_with_weights, "--to", tmp_path / "x")

    @pytest.mark.parametrize("damage", ["truncated", "pickle", "shape", "missing"])
    def test_damaged_weights(self, run_with_weights: Path, tmp_path: Path, damage: str) -> None:
        path = RunDirectory(run_with_weights).weights_of(1)

        class Hostile:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "executed"),)

        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-64])
        elif damage == "pickle":
            path.write_bytes(pickle.dumps(Hostile()))
        else:
            tensors, about = weights.read_tensors(path)
            tensors.pop("norm.weight")
            if damage == "shape":
                tensors["norm.weight"] = torch.zeros(3)
            weights.write_tensors(tensors, path, about)
        assert "weights" in refused("export", run_with_weights, "--to", tmp_path / "x")
        assert not (tmp_path / "executed").exists()
        assert not (tmp_path / "x").exists()

    def test_a_symbolic_link(self, run_with_weights: Path, tmp_path: Path) -> None:
        path = RunDirectory(run_with_weights).weights_of(1)
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        assert "symbolic link" in refused("export", run_with_weights, "--to", tmp_path / "x")


def test_from_a_training(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"line {line} of a text" for line in range(1000)))
    corpus = open_corpus(tmp_path / "text.txt", cache_directory=tmp_path / "cache")
    data = DataSettings(source=(str(tmp_path / "text.txt"),))
    genome = Genome.parse("71111-91111")
    outcome = training_directory.train(tmp_path / "trained", genome, CONFIG, SETTINGS, corpus, data)
    assert outcome.ok
    done("export", tmp_path / "trained", "--to", tmp_path / "x")
    card = (tmp_path / "x" / "README.md").read_text()
    assert corpus.content_hash in card
    assert f"{outcome.quality:.4f}" in card
    written = json.loads(done("generate", tmp_path / "x", "line", "--tokens", "9", "--json"))["text"]
    assert (
        written
        == json.loads(done("generate", tmp_path / "trained", "line", "--tokens", "9", "--json"))["text"]
    )
    assert "holds a single model" in refused(
        "export", tmp_path / "trained", "--id", "0", "--to", tmp_path / "y"
    )


class TestDirectory:
    def test_is_not_replaced_unasked(self, exported: Path) -> None:
        before = (exported / "config.json").read_bytes()
        command = ("export", "--genome", "91111", "--width", "16", "--to", exported)
        assert "is there already; --force replaces" in refused(*command)
        assert (exported / "config.json").read_bytes() == before
        done(*command, "--force")
        assert json.loads((exported / "config.json").read_text())["genome"] == "91111"
        assert [path.name for path in exported.parent.iterdir()] == ["x"]

    def test_never_replaces_what_is_no_export(self, tmp_path: Path) -> None:
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "a.txt").write_text("mine")
        command = ("export", "--genome", "91111", "--width", "16", "--force", "--to")
        assert "is no export" in refused(*command, tmp_path / "notes")
        assert "no directory" in refused(*command, tmp_path / "notes" / "a.txt")
        (tmp_path / "link").symlink_to(tmp_path / "notes")
        assert "is no export" in refused(*command, tmp_path / "link")
        assert (tmp_path / "notes" / "a.txt").read_text() == "mine"

    def test_takes_an_empty_one(self, tmp_path: Path) -> None:
        (tmp_path / "x").mkdir()
        done("export", "--genome", "91111", "--width", "16", "--to", tmp_path / "x")
        assert (tmp_path / "x" / "config.json").is_file()

    def test_a_full_disk_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

        monkeypatch.setattr(os, "fsync", full)
        line = refused("export", "--genome", "91111", "--width", "16", "--to", tmp_path / "x", code=1)
        assert "No space left on device" in line
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda value: value.update(model_type="llama"), "'llama'; star takes 'star'"),
            (lambda value: value.update(genome="99999"), "gene 1"),
            (lambda value: value.pop("genome"), "genome is missing"),
            (lambda value: value.update(width="wide"), "width is 'wide'"),
            (lambda value: value.update(dtype="int8"), "dtype is 'int8'"),
            (lambda value: value.update(genome="91111"), "is missing"),
            (lambda value: value.update(vocab_size=300), "has shape (256, 32), the model's has (300, 32)"),
            (lambda value: value.update(vocab_size=200), "the tokenizer has 256|has shape"),
        ],
    )
    def test_a_wrong_configuration(self, exported: Path, change: Callable[[Any], Any], says: str) -> None:
        path = exported / "config.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
        line = refused("generate", exported, "a")
        assert any(part in line for part in says.split("|"))

    def test_sizes_beyond_the_weights_take_no_memory(self, exported: Path) -> None:
        path = exported / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "width": 1 << 20}))
        assert "is of a model of at least" in refused("generate", exported, "a")

    def test_a_copy_of_the_weights_is_not_read(self, exported: Path) -> None:
        before = open_trained(exported, None, print).model.state_dict()
        (exported / "model_backup.safetensors").write_bytes(b"anything")
        after = open_trained(exported, None, print).model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_damaged_files(self, exported: Path, tmp_path: Path) -> None:
        path = exported / "model.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-10])
        assert "not a sound safetensors file" in refused("generate", exported, "a")
        path.unlink()
        (exported / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(S'executed'\ntR.")
        assert "pytorch_model.bin is a pickle" in refused("generate", exported, "a")
        path.write_bytes(whole)
        (exported / "tokenizer.json").write_text("{")
        assert "tokenizer" in refused("generate", exported, "a")
        (exported / "config.json").write_text("[")
        assert "is not JSON" in refused("generate", exported, "a")
        (exported / "config.json").write_bytes(b" " * (2 << 20))
        assert "is larger" in refused("generate", exported, "a")


class TestTokenizer:
    TEXTS = (
        "def f(x):\n\treturn x",
        "naïve – 漢字 \U0001f600",
        "<|endoftext|> as text",
        " a  b ",
        "\x00\x01\x7f",
        "",
    )

    def test_bytes_have_the_corpus_ids(self, exported: Path) -> None:
        """In a process without `star`, so that nothing but transformers reads the files."""
        pytest.importorskip("transformers", reason="needs the extra hf (transformers)")
        program = (
            "import json, sys; from transformers import AutoTokenizer\n"
            "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
            "texts = json.loads(sys.argv[2]); ids = [tokenizer(text)['input_ids'] for text in texts]\n"
            "batch = tokenizer(['a', 'bcd'], padding=True)\n"
            "print(json.dumps({'ids': ids, 'texts': tokenizer.batch_decode(ids), 'batch': dict(batch),\n"
            "    'end': tokenizer.eos_token_id, 'star': 'star' in sys.modules}))"
        )
        line = [sys.executable, "-c", program, str(exported), json.dumps(self.TEXTS)]
        result = subprocess.run(line, capture_output=True, text=True, check=True)
        found = json.loads(result.stdout.splitlines()[-1])
        assert found["ids"] == [[*text.encode()] for text in self.TEXTS]
        assert found["texts"] == [*self.TEXTS]
        assert found["batch"] == {
            "input_ids": [[255, 255, 97], [98, 99, 100]],
            "attention_mask": [[0, 0, 1], [1] * 3],
        }
        assert found["end"] == ByteTokenizer.separator
        assert found["star"] is False

    @pytest.mark.parametrize("special", [None, "<|endoftext|>", "</s>"])
    def test_a_file_has_the_corpus_ids(self, tmp_path: Path, special: str | None) -> None:
        transformers = pytest.importorskip("transformers", reason="needs the extra hf (transformers)")
        from star.data.tokenization import open_tokenizer
        from star.export.tokenizer import tokenizer_files

        pieces = ["a", "b", "Ġ", "ab", "Ġab"]
        file = {**BPE, "model": {"type": "BPE", "vocab": {}, "merges": ["a b", "Ġ ab"]}}
        if special:
            pieces.insert(2, special)
            file["added_tokens"] = [
                {"id": 2, "content": special, "single_word": False, "lstrip": False, "rstrip": False}
                | {"normalized": False, "special": True}
            ]
            file["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": special, "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {special: {"id": special, "ids": [2], "tokens": [special]}},
            }
        file["model"] = {**file["model"], "vocab": {piece: id for id, piece in enumerate(pieces)}}
        (tmp_path / "own.json").write_text(json.dumps(file))
        tokenizer = open_tokenizer(tmp_path / "own.json")
        for name, content in tokenizer_files(tokenizer).items():
            (tmp_path / name).write_bytes(content)
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
        text = "ab ab abba ab ba"
        assert loaded(text)["input_ids"] == tokenizer.encode_sections([text.encode()])[0].tolist()
        assert loaded.eos_token_id == tokenizer.separator == (2 if special else 5)
        assert len(loaded) == tokenizer.vocab_size
        assert np.max(loaded(text)["input_ids"]) < tokenizer.vocab_size
