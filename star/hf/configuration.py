"""The configuration of an exported model: a genome and the sizes that it leaves open, as config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from star.config import ModelConfig
from star.genome import Genome

__all__ = ["StarConfig"]

_SIZES = tuple(dataclasses.fields(ModelConfig))


class StarConfig(PretrainedConfig):
    """What decides a `StarForCausalLM`.

    Args:
        genome: text of a valid genome.
        use_cache: whether `generate` keeps a cache.
        bos_token_id, eos_token_id, pad_token_id: of the tokenizer; None where there is none.
        kwargs: the fields of `star.ModelConfig` (`width` must be given) and those of transformers'
            configurations.

    Raises:
        ValueError: no such genome, or a size that no model can have; one line that names it.
    """

    model_type = "star"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers declares a plain list)
    attribute_map = {"hidden_size": "width", "num_attention_heads": "heads"}  # noqa: RUF012

    def __init__(
        self,
        genome: str = "",
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        for field in _SIZES:
            default = None if field.default is dataclasses.MISSING else field.default
            setattr(self, field.name, kwargs.pop(field.name, default))
        self.genome = genome
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        if kwargs.setdefault("tie_word_embeddings", True) is not True:
            raise ValueError(
                "StarConfig: tie_word_embeddings is false; it takes true, since the embedding is the head"
            )
        if genome:  # transformers makes configurations without arguments to know their defaults
            _ = self.parsed_genome, self.model_config
        super().__init__(**kwargs)

    @classmethod
    def of(cls, genome: Genome, config: ModelConfig, **kwargs: Any) -> StarConfig:
        """The configuration of `star.build_model(genome, config)`."""
        return cls(genome=str(genome), **config.to_json(), **kwargs)

    @property
    def parsed_genome(self) -> Genome:
        """The genome, valid."""
        if not isinstance(self.genome, str) or not self.genome:
            raise ValueError(f"StarConfig: genome is {self.genome!r}; it takes a genome's text")
        return Genome.parse(self.genome).require_valid()

    @property
    def model_config(self) -> ModelConfig:
        """The sizes, as `star.build_model` takes them."""
        return ModelConfig(**{field.name: getattr(self, field.name) for field in _SIZES})

    @property
    def heads(self) -> int:
        """Attention heads: width over head_dim."""
        return self.model_config.heads

    @property
    def num_hidden_layers(self) -> int:
        """LIVs of the backbone."""
        return self.parsed_genome.depth
