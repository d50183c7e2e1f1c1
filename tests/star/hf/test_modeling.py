"""Found models in transformers: padding is never seen, caches grow and reorder, training and saving work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs the extra hf (transformers)")

from star import Genome, ModelConfig, build_model, pools  # noqa: E402
from star.hf import StarCache, StarConfig, StarForCausalLM  # noqa: E402

SIZES = ModelConfig(width=32, head_dim=8, vocab_size=48)
EVERY_CLASS = "-".join(f"{entry.id}.1.1.1.1" for entry in pools.all_classes())
# Keys, products and states of several LIVs shared, weights shared twice.
SHARING = "11214-92123-11214-73232-73232-84146-84146-55252-55252-92123"
PADDING = (0, 4, 9)
LENGTH = 10


def model_of(genome: str, **changes: Any) -> StarForCausalLM:
    torch.manual_seed(0)
    model = StarForCausalLM(StarConfig.of(Genome.parse(genome), SIZES, pad_token_id=0, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("output.weight"):  # as far from the embedding as after a training
                parameter.mul_(4)
    return model.eval()


def padded() -> tuple[Tensor, Tensor]:
    """Tokens (3, LENGTH) with padding of another token in front, and their mask."""
    ids = torch.randint(
        1, SIZES.vocab_size, (len(PADDING), LENGTH), generator=torch.Generator().manual_seed(0)
    )
    mask = torch.ones_like(ids)
    for row, count in enumerate(PADDING):
        ids[row, :count] = 7
        mask[row, :count] = 0
    return ids, mask


def generated(model: StarForCausalLM, ids: Tensor, tokens: int = 8, **options: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=tokens, **{"do_sample": False, **options})


@pytest.mark.parametrize("entry", pools.all_classes(), ids=lambda entry: entry.name)
def test_padding_changes_nothing(entry: pools.LivClass) -> None:
    model = model_of(f"{entry.id}.1.1.1.1-91111-{entry.id}.1.1.1.1")
    ids, mask = padded()
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        cache = StarCache()
        prefilled = model(ids, attention_mask=mask, past_key_values=cache).logits
        new = torch.randint(
            1, SIZES.vocab_size, (len(PADDING), 3), generator=torch.Generator().manual_seed(1)
        )
        first = model(new[:, :1], past_key_values=cache).logits
        rest = model(new[:, 1:], past_key_values=cache).logits
        for row, count in enumerate(PADDING):
            alone = model(torch.cat([ids[row, count:], new[row]])[None]).logits[0]
            torch.testing.assert_close(plain[row, count:], alone[: LENGTH - count])
            torch.testing.assert_close(prefilled[row, count:], alone[: LENGTH - count])
            torch.testing.assert_close(torch.cat([first[row], rest[row]]), alone[LENGTH - count :])


@pytest.mark.parametrize("genome", [EVERY_CLASS, SHARING], ids=["every class", "sharing"])
class TestGenerate:
    @pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
    def test_padded_rows_are_as_alone(self, genome: str, beams: int) -> None:
        model = model_of(genome)
        ids, mask = padded()
        together = generated(model, ids, attention_mask=mask, num_beams=beams)
        for row, count in enumerate(PADDING):
            alone = generated(model, ids[row : row + 1, count:], num_beams=beams)
            assert together[row, count:].tolist() == alone[0].tolist()

    def test_greedy_is_the_models_own(self, genome: str) -> None:
        model = model_of(genome)
        ids = padded()[0]
        assert generated(model, ids).tolist() == model.model.generate(ids, 8, temperature=0).tolist()

    @pytest.mark.parametrize(
        "options", [{"num_beams": 4}, {"do_sample": True, "top_k": 9, "num_return_sequences": 2}]
    )
    def test_the_cache_changes_nothing(self, genome: str, options: dict[str, Any]) -> None:
        model = model_of(genome)
        ids = padded()[0]
        results = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            results.append(generated(model, ids, use_cache=use_cache, **options))
        assert results[0].tolist() == results[1].tolist()
        if "do_sample" in options:
            torch.manual_seed(4)
            assert generated(model, ids, **options).tolist() != results[0].tolist()


def test_a_layer_that_knows_one_place_for_all_rows_takes_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("81111")
    ids, mask = padded()
    monkeypatch.setattr(type(model.model.layers[0]), "decodes_by_row", False)
    with pytest.raises(ValueError, match=r"LIV 1 \(GConv-2\) decodes all rows at one place"):
        model(ids, attention_mask=mask, use_cache=True)
    assert generated(model, ids).shape == (3, LENGTH + 8)


class TestCache:
    def test_grows_beyond_what_was_asked_for(self) -> None:
        model = model_of(EVERY_CLASS)
        ids = torch.randint(1, SIZES.vocab_size, (2, 80), generator=torch.Generator().manual_seed(0))
        cache = StarCache(3)
        with torch.no_grad():
            parts = [
                model(part, past_key_values=cache).logits for part in ids.split([5, 1, 60, 1, 13], dim=1)
            ]
            torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits)
        assert cache.get_seq_length() == 80
        assert cache.batch_size == 2

    def test_selects_and_repeats_rows(self) -> None:
        model = model_of(SHARING)
        ids, mask = padded()
        new = ids[:, -1:]
        with torch.no_grad():
            cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
            cache.batch_select_indices(torch.tensor([2, 0]))
            cache.batch_repeat_interleave(2)
            again = model(new[[2, 2, 0, 0]], past_key_values=cache).logits
            cache.reset()
            assert cache.get_seq_length() == 0
            for row, found in ((2, again[0]), (2, again[1]), (0, again[2]), (0, again[3])):
                alone = model(torch.cat([ids[row, PADDING[row] :], new[row]])[None]).logits[0, -1:]
                torch.testing.assert_close(found, alone)

    def test_a_second_turn_goes_on(self) -> None:
        model = model_of(EVERY_CLASS)
        ids, mask = padded()
        more = ids[:, -3:]
        cache = StarCache()
        first = generated(model, ids, attention_mask=mask, past_key_values=cache)
        turn = torch.cat([first, more], dim=1)
        whole = torch.cat([mask, mask.new_ones(len(ids), turn.shape[1] - LENGTH)], dim=1)
        again = generated(model, turn, attention_mask=whole, past_key_values=cache)
        assert again.tolist() == generated(model, turn, attention_mask=whole).tolist()

    @pytest.mark.parametrize(
        ("mask", "says"),
        [
            ([[1, 0, 1]], "padding between tokens"),
            ([[0, 0, 0]], "row without a token"),
            ([[1, 1]], "has shape (1, 2); it takes (1, 3)"),
            ([[1, 1, 0]], "ends with padding"),
        ],
    )
    def test_refuses_other_padding(self, mask: list[list[int]], says: str) -> None:
        model = model_of("11111")
        with pytest.raises(ValueError, match=says.replace("(", r"\(").replace(")", r"\)")):
            model(torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor(mask), use_cache=True)

    def test_refuses_what_it_can_not_do(self) -> None:
        model = model_of("51111")
        ids = padded()[0]
        cache = StarCache()
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="holds 3"):
            model(ids[:2], past_key_values=cache)
        with pytest.raises(ValueError, match="can not forget 2 tokens"):
            cache.crop(2)
        off = transformers.GenerationConfig(use_cache=False, max_new_tokens=2)
        with pytest.raises(ValueError, match="use_cache is False beside a cache"):
            generated(model, ids, generation_config=off, past_key_values=StarCache())
        with pytest.raises(ValueError, match="takes a StarCache"):
            model(ids, past_key_values=transformers.DynamicCache())
        with pytest.raises(ValueError, match="cache_implementation is 'static'"):
            generated(model, ids, cache_implementation="static")
        with pytest.raises(ValueError, match="unknown argument 'inputs_embed'"):
            model(ids, inputs_embed=ids)


def test_the_wrapper_draws_the_weights_of_build_model() -> None:
    torch.manual_seed(5)
    wrapped = StarForCausalLM(StarConfig.of(Genome.parse(SHARING), SIZES))
    plain = build_model(Genome.parse(SHARING), SIZES, seed=5)
    for (name, mine), theirs in zip(wrapped.model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert wrapped.num_parameters() == sum(parameter.numel() for parameter in plain.parameters())


class TestTraining:
    def test_a_batch_without_labels_adds_nothing_to_a_sum(self) -> None:
        model = model_of("71111")
        ids, _ = padded()
        loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=5).loss
        loss.backward()
        assert loss.item() == 0.0
        assert not any(p.grad is not None and p.grad.any() for p in model.parameters())

    def test_the_loss_is_the_next_tokens(self) -> None:
        model = model_of("71111-91111")
        ids, mask = padded()
        labels = ids.masked_fill(mask == 0, -100)
        output = model(ids, attention_mask=mask, labels=labels)
        expected = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        torch.testing.assert_close(output.loss, expected)
        count = int((labels[:, 1:] != -100).sum())
        scaled = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=2 * count).loss
        torch.testing.assert_close(scaled, expected / 2)
        model.train()
        assert model(ids, labels=labels).logits is None

    def test_checkpointing_gives_the_same_gradients(self) -> None:
        model = model_of(SHARING).train()
        ids = padded()[0]

        def gradients() -> list[Tensor]:
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

        plain = gradients()
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
        assert model.gradient_checkpointing
        for mine, theirs in zip(gradients(), plain, strict=True):
            torch.testing.assert_close(mine, theirs)

    def test_trains_with_the_trainer(self, tmp_path: Path) -> None:
        pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
        model = model_of("71111-91111-11111-91111")
        rows = torch.randint(
            1, SIZES.vocab_size, (8, 12), generator=torch.Generator().manual_seed(0)
        ).tolist()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            use_cpu=True,
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before - 0.5
        trainer.save_model(str(tmp_path / "trained"))
        again = StarForCausalLM.from_pretrained(tmp_path / "trained")
        ids = torch.tensor(rows)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model.eval()(ids).logits)

    def test_embeddings_of_another_size(self, tmp_path: Path) -> None:
        model = model_of("71111-91111")
        ids = padded()[0]
        with torch.no_grad():
            before = model(ids).logits
            model.resize_token_embeddings(60, mean_resizing=False)
            after = model(ids).logits
            model.save_pretrained(tmp_path)
            assert torch.equal(StarForCausalLM.from_pretrained(tmp_path)(ids).logits, after)
        assert model.config.vocab_size == 60
        assert torch.equal(after[..., : SIZES.vocab_size], before)
        model.train()(ids, labels=ids).loss.backward()
        assert model.get_input_embeddings().weight.grad is not None
