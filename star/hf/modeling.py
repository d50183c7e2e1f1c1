"""The model that a genome describes, as one of transformers: it loads, generates, trains, saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from star.decoding import require_cuda
from star.hf import loading
from star.hf.cache import StarCache
from star.hf.configuration import StarConfig
from star.hf.padding import first_tokens, shifted
from star.model import build_model
from star_kernels import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["StarForCausalLM"]

_IGNORED = -100


class StarForCausalLM(PreTrainedModel, GenerationMixin):
    """A found model for transformers.

    Args:
        config: genome and sizes. The weights are drawn as `star.build_model` draws them.

    State dict: `model.*`, as `star.model.StarModel`; a shared featurizer appears once, and the embedding is
    the head. Loading requires exactly these tensors, in safetensors files.
    """

    config_class = StarConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _input_embed_layer = "embedding"
    supports_gradient_checkpointing = True
    _is_stateful = True  # states can not go back, which assisted generation asks for
    _no_split_modules = ["StarModel"]  # noqa: RUF012  (transformers declares a plain list)
    gradient_checkpointing = False

    def __init__(self, config: StarConfig) -> None:
        super().__init__(config)
        self.model = build_model(config.parsed_genome, config.model_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The layers drew their weights when they were made; only an embedding of another size is new."""
        if isinstance(module, nn.Embedding) and module is not self.model.embedding:
            module.weight.normal_(0.0, module.embedding_dim**-0.5)

    # ---- loading ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """The model of an export directory or a repository; see transformers for the arguments.

        Raises:
            ValueError: files that are no sound export: no safetensors, tensors that are missing, too many, or
                of other shapes; or an argument that would load anything else. One line; nothing is unpickled.
            OSError: files that are not there.
        """
        return loading.load(super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)

    # ---- forward ---------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StarCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss where labels are given.

        Args:
            input_ids: (B, L) tokens.
            attention_mask: (B, tokens read + L), nonzero at tokens; padding in front of a row's tokens or
                behind them, with a cache in front only. Padding changes nothing.
            past_key_values: from an earlier call; the tokens then follow those it has read. No gradients are
                recorded with a cache.
            labels: (B, L), -100 where nothing is to be predicted; position t is predicted from those before.
            use_cache: make a cache and return it. None: only with `past_key_values`.
            logits_to_keep: logits of the last this many tokens only, or at these places; 0: of all.
            return_dict: False gives a tuple.
            kwargs: `num_items_in_batch` divides the summed loss instead of the number of labels (Trainer).

        Returns:
            loss (), logits (B, L, V), past_key_values. While training with labels, logits are None: they are
            never made (`linear_cross_entropy`).

        Raises:
            ValueError: a mask or tokens of another shape, padding between tokens, an unknown argument.
        """
        items = kwargs.pop("num_items_in_batch", None)
        if strange := [name for name, value in kwargs.items() if value is not None and value is not False]:
            raise ValueError(
                f"StarForCausalLM: unknown argument {strange[0]!r}; it takes input_ids, attention_mask, "
                "past_key_values, labels, use_cache, logits_to_keep and return_dict"
            )
        if past_key_values is not None and not isinstance(past_key_values, StarCache):
            raise ValueError(
                f"past_key_values is {type(past_key_values).__name__}; StarForCausalLM takes a StarCache"
            )
        memory = past_key_values
        if memory is None and use_cache and labels is None:
            memory = StarCache()
        if memory is None:
            hidden = self._hidden(input_ids, attention_mask)
        else:
            hidden = memory.read(self.model, input_ids, attention_mask)
        loss = None if labels is None else self._loss(hidden, labels, items)
        logits = None
        if labels is None or not self.training:
            kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = F.linear(hidden[:, kept], self.model.head_weight)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=memory)
        return output.to_tuple() if return_dict is False else output

    def _hidden(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states (B, L, D); those of the padding are of no meaning."""
        starts = first_tokens(mask, ids.shape)
        checkpoint = self._checkpoint() if self.gradient_checkpointing and self.training else None
        if starts is None:
            return self.model.hidden(ids, checkpoint=checkpoint)
        hidden = self.model.hidden(shifted(ids, starts), checkpoint=checkpoint)
        return shifted(hidden, ids.shape[1] - starts)

    def _checkpoint(self) -> Callable[..., Any]:
        # Features that LIVs lend each other go through in dicts, of which the reentrant form knows nothing.
        def run(function: Callable[..., Any], *arguments: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=False)

        return run

    def _loss(self, hidden: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """Mean nats over the labels, or their sum divided by `items`."""
        targets = labels[:, 1:].to(hidden.device).flatten()
        mean = linear_cross_entropy(
            hidden[:, :-1].flatten(0, 1), self.model.head_weight, targets, ignore_index=_IGNORED
        )
        if items is None:
            return mean
        count = (targets != _IGNORED).sum()
        total = torch.where(count > 0, mean * count, torch.zeros_like(mean))  # the mean of none is NaN
        return total / torch.as_tensor(items, device=mean.device)

    # ---- generation ------------------------------------------------------------------------------------

    def generate(self, *arguments: Any, cuda_graph: bool = False, **options: Any) -> Any:
        """Token ids (or an output object); arguments as in transformers.

        cuda_graph: replay one captured CUDA graph for every token after the prompt (`star.decoding`); for
            every way of generating.

        Raises:
            ValueError: no graph can be captured; or an argument that transformers refuses.
        """
        if cuda_graph:
            require_cuda(self.device)
            if options.get("use_cache") is False or options.get("past_key_values") is not None:
                raise ValueError("generate: cuda_graph takes neither use_cache=False nor past_key_values")
            options["past_key_values"] = StarCache(cuda_graph=True)
        return super().generate(*arguments, **options)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: StarCache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache has not read, with what else `forward` takes."""
        if next_sequence_length is None and (places := kwargs.get("cache_position")) is not None:
            next_sequence_length = min(len(places), input_ids.shape[1])  # how transformers 5.0 says it
        if next_sequence_length is not None:
            input_ids = input_ids[:, input_ids.shape[1] - next_sequence_length :]
        inputs = {name: kwargs[name] for name in ("use_cache", "logits_to_keep") if name in kwargs}
        return inputs | {
            "input_ids": input_ids.to(self.device),  # as transformers does: prompts may be on the CPU
            "past_key_values": past_key_values,
            "attention_mask": None if attention_mask is None else attention_mask.to(self.device),
        }

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """A `StarCache` with room for the whole generation, where `generate` was given none."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"generate: cache_implementation is {generation_config.cache_implementation!r}; "
                "a StarForCausalLM takes none, since it has its own cache"
            )
        given = model_kwargs.get("past_key_values")
        if isinstance(given, StarCache) and generation_config.use_cache is False:
            # transformers would give the cache all tokens again with every new one.
            raise ValueError(
                "generate: use_cache is False beside a cache or cuda_graph; it takes one of them"
            )
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = StarCache(max_cache_length)
        elif isinstance(given, StarCache) and given.memory is None:
            given.room = max(given.room, max_cache_length)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head, (V, D): the embedding's."""
        return cast(Tensor, self.model.head_weight)
