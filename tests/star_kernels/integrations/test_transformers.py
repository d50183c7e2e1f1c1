"""Models of transformers with and without star_kernels: the same logits, gradients and generated tokens."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.hybrid_models import MODELS, HybridModel
from star_kernels.integrations import functions, patching
from star_kernels.integrations import transformers as integration

pytest.importorskip("transformers")

TOLERANCE = 1e-4
LENGTH = 21
ORIGINAL_CALLS: Counter[str] = Counter()


def _counted(name: str, function: Any) -> Any:
    @functools.wraps(function)
    def counted(*arguments: Any, **options: Any) -> Any:
        ORIGINAL_CALLS[name] += 1
        return function(*arguments, **options)

    return counted


@pytest.fixture(scope="module", autouse=True)
def _torch_forms() -> Iterator[None]:
    """transformers' own PyTorch forms in every model, counted, also where fla or mamba_ssm are installed."""
    patch = patching.Patch()
    for model in MODELS:
        try:
            module = importlib.import_module(f"transformers.models.{model.module}.modeling_{model.module}")
        except ModuleNotFoundError:
            continue
        for name in functions.ADAPTERS:
            if hasattr(module, name):
                patch.replace(module, name, _counted(name, inspect.unwrap(getattr(module, name))))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _disabled() -> Iterator[None]:
    ORIGINAL_CALLS.clear()
    yield
    integration.disable()


def _tokens(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Random tokens and the mask of a batch whose second sequence is padded on the left."""
    ids = torch.randint(1, 61, (batch, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:, :5] = 0
    return ids, mask


def _gradients(model: torch.nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False)[0]
    logits.float().log_softmax(-1)[..., 3].mean().backward()
    model.eval()
    named = model.named_parameters()
    return logits.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@torch.no_grad()
def _greedy(model: Any, ids: Tensor, mask: Tensor, tokens: int = 7) -> Tensor:
    """The continuation; without a head, the index of the largest output is the next token."""
    if hasattr(model, "generate"):
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
    past, new = None, ids
    for _ in range(tokens):
        result = model(input_ids=new, attention_mask=mask, past_key_values=past, use_cache=True)
        past, new = result.past_key_values, result[0][:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
    return ids


def _everything(model: torch.nn.Module) -> dict[str, Any]:
    ids, mask = _tokens()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False)[0]
        masked = model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    trained, gradients = _gradients(model, ids)
    tokens = _greedy(model, ids, mask)
    return {"logits": logits, "masked": masked, "trained": trained, "gradients": gradients, "tokens": tokens}


def _build(model: HybridModel) -> torch.nn.Module:
    try:
        return model.build()
    except ModuleNotFoundError as error:
        pytest.skip(f"this transformers has no {model}: {error}")


@pytest.mark.parametrize("tiny", MODELS, ids=str)
def test_equals_the_unpatched_model(tiny: HybridModel) -> None:
    model = _build(tiny)
    layers = [layer for layer in model.modules() if type(layer).__name__ == tiny.layer]
    assert layers, f"the configuration has no {tiny.layer}"
    before = _everything(model)
    expected_calls = Counter(ORIGINAL_CALLS)
    ORIGINAL_CALLS.clear()
    with integration.enable() as coverage:  # after the model was made
        assert f"{tiny.module}.{tiny.layer}" in coverage.covered
        after = _everything(model)
    assert not ORIGINAL_CALLS, "calls that our operators did not take"
    assert expected_calls or tiny.module == "recurrent_gemma"
    for name in ("logits", "masked", "trained"):
        # At padding itself some classes answer NaN, with us as without.
        torch.testing.assert_close(
            after[name], before[name], atol=TOLERANCE, rtol=TOLERANCE, equal_nan=name == "masked"
        )
    assert after["gradients"].keys() == before["gradients"].keys()
    for name, gradient in before["gradients"].items():
        scale = float(gradient.abs().max())
        error = float((after["gradients"][name] - gradient).abs().max())
        assert error <= TOLERANCE * max(scale, 1e-4), name
    assert torch.equal(after["tokens"], before["tokens"])


def test_every_covered_layer_is_tested() -> None:
    with integration.enable() as coverage:
        assert set(coverage.covered) <= {f"{model.module}.{model.layer}" for model in MODELS}


@pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3_5", "lfm2"])
def test_compiles_in_one_graph(name: str) -> None:
    layer = next(m for m in _build(_by_name(name)).modules() if type(m).__name__ == _by_name(name).layer)
    x = torch.randn(2, LENGTH, 32)
    with integration.enable():
        expected = layer(x)
        result = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(result, expected)
    torch._dynamo.reset()


def _by_name(name: str) -> HybridModel:
    return next(model for model in MODELS if model.module == name)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3_5", "olmo_hybrid", "zamba2", "lfm2"])
def test_bfloat16_loses_no_more_than_the_original(name: str) -> None:
    model: Any = _build(_by_name(name))
    ids, mask = _tokens()
    with torch.no_grad():
        exact = model(input_ids=ids, use_cache=False)[0]
        model.to(torch.bfloat16)
        before = model(input_ids=ids, use_cache=False)[0]
        with integration.enable():
            after = model(input_ids=ids, use_cache=False)[0]
            assert _greedy(model, ids, mask).shape == (2, LENGTH + 7)
    assert after.dtype == before.dtype
    assert float((after.float() - exact).norm()) < 1.5 * float((before.float() - exact).norm())


@pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3_5"])
def test_float64_is_left_to_the_original(name: str) -> None:
    model: Any = _build(_by_name(name)).double()
    ids, _ = _tokens()
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False)[0]
        with integration.enable():
            assert torch.equal(model(input_ids=ids, use_cache=False)[0], before)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3_next"])
def test_a_cache_of_one_continues_in_the_other(name: str, ours_first: bool) -> None:
    model: Any = _build(_by_name(name))
    ids, _ = _tokens()
    argument = "cache_params" if name.startswith("mamba") else "past_key_values"
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False)[0]
        cache = None
        for part, ours in (
            (ids[:, :-2], ours_first),
            (ids[:, -2:-1], not ours_first),
            (ids[:, -1:], ours_first),
        ):
            with integration.enable() if ours else contextlib.nullcontext():
                result = model(input_ids=part, use_cache=True, **{argument: cache})
            cache = result[argument]
    torch.testing.assert_close(result[0][:, -1], whole[:, -1], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_beams_reorder_the_states(name: str) -> None:
    model: Any = _build(_by_name(name))
    ids, mask = _tokens()
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "num_beams": 3}
    before = model.generate(**options, do_sample=False)
    with integration.enable():
        assert torch.equal(model.generate(**options, do_sample=False), before)


def test_a_model_made_afterwards() -> None:
    ids, _ = _tokens()
    with torch.no_grad():
        before = _build(_by_name("mamba"))(input_ids=ids)[0]
        with integration.enable():
            after = _build(_by_name("mamba"))(input_ids=ids)[0]
    torch.testing.assert_close(after, before, atol=TOLERANCE, rtol=TOLERANCE)


def _globals() -> dict[str, Any]:
    found = {}
    for model in MODELS:
        module = sys.modules.get(f"transformers.models.{model.module}.modeling_{model.module}")
        if module is not None:
            found.update({f"{model}.{name}": value for name, value in vars(module).items()})
            layer = getattr(module, model.layer)
            found.update({f"{model}.{model.layer}.{name}": value for name, value in vars(layer).items()})
    return found


def test_disable_restores_the_very_objects() -> None:
    before = _globals()
    integration.enable()
    during = _globals()
    integration.disable()
    after = _globals()
    assert sum(during[name] is not before[name] for name in before) > 60
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before if not name.endswith("__"))
    integration.disable()  # once more does nothing


def test_enabling_twice_replaces_once() -> None:
    before = _globals()
    with integration.enable() as coverage:
        during = _globals()
        with integration.enable() as again:
            assert again is coverage
        assert all(value is during[name] for name, value in _globals().items() if not name.endswith("__"))
        integration.enable()
        assert all(value is during[name] for name, value in _globals().items() if not name.endswith("__"))
    after = _globals()
    assert all(after[name] is before[name] for name in before if not name.endswith("__"))


def test_the_context_ends_after_an_error() -> None:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    before = module.mamba_selective_scan
    with contextlib.suppress(ZeroDivisionError), integration.enable():
        assert module.mamba_selective_scan is not before
        raise ZeroDivisionError
    assert module.mamba_selective_scan is before


def test_what_someone_else_has_replaced_since_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    integration.enable()

    def theirs() -> None: ...

    before = vars(module)["causal_conv1d_fn"].__wrapped__
    module.causal_conv1d_fn = theirs
    with pytest.warns(UserWarning, match="modeling_mamba.causal_conv1d_fn"):
        integration.disable()
    assert module.causal_conv1d_fn is theirs
    module.causal_conv1d_fn = before


def test_verbose_lists_what_is_covered(capsys: pytest.CaptureFixture[str]) -> None:
    enabled = integration.enable(verbose=True)
    printed = capsys.readouterr().out
    assert "mamba.MambaMixer: causal_conv1d_fn, causal_conv1d_update" in printed
    assert "recurrent_gemma.RecurrentGemmaRglru: _rnn_scan" in printed
    assert str(len(enabled.coverage.covered)) in repr(enabled)


def test_another_signature_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")

    def mamba_selective_scan(hidden_states: Tensor, other: Tensor) -> None: ...

    monkeypatch.setattr(module, "mamba_selective_scan", mamba_selective_scan)
    with integration.enable() as coverage:
        assert module.mamba_selective_scan is mamba_selective_scan
        assert "takes (hidden_states, other), not (" in coverage.left["mamba.mamba_selective_scan"]
        assert "left as it was" in str(coverage)
        assert "mamba_selective_scan" not in coverage.covered["mamba.MambaMixer"]


CONVOLUTION = {"hidden_states": torch.randn(2, 6, 9), "weight": torch.randn(6, 4)}
ATTENTION = {
    "query": torch.randn(1, 9, 2, 4),
    "key": torch.randn(1, 9, 2, 4),
    "value": torch.randn(1, 9, 2, 4),
    "g": -torch.rand(1, 9, 2),
    "beta": torch.rand(1, 9, 2),
}
LINEAR = {
    "hidden_states": torch.randn(1, 9, 4, 8),
    "dt": torch.rand(1, 9, 4),
    "A": -torch.rand(4),
    "B": torch.randn(1, 9, 2, 3),
    "C": torch.randn(1, 9, 2, 3),
    "chunk_size": 4,
}


@pytest.mark.parametrize(
    ("adapter", "arguments", "options"),
    [
        (functions.causal_conv1d_fn, CONVOLUTION, {"activation": "gelu"}),
        (functions.causal_conv1d_fn, CONVOLUTION, {"seq_idx": torch.zeros(2, 9, dtype=torch.int32)}),
        (functions.causal_conv1d_fn, CONVOLUTION, {"initial_states": torch.zeros(2, 6, 3)}),
        (functions.chunk_delta_rule, ATTENTION, {"cu_seqlens": torch.tensor([0, 4, 9])}),
        (functions.recurrent_delta_rule, ATTENTION, {"scale": 1.0}),
        (functions.chunk_delta_rule, ATTENTION, {"use_gate_in_kernel": True}),
        (functions.mamba2_chunk_scan, LINEAR, {"seq_idx": torch.zeros(1, 9, dtype=torch.int32)}),
        (functions.mamba2_chunk_scan, LINEAR, {"z": torch.zeros(1, 9, 4, 8)}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value),
)
def test_what_is_not_covered_goes_to_the_original(adapter: Any, arguments: Any, options: Any) -> None:
    seen = []

    def original(*given: Any, **named: Any) -> str:
        seen.append((given, named))
        return "original"

    assert functions.adapted(original, adapter)(**arguments, **options) == "original"
    assert seen == [((), {**arguments, **options})]
    assert adapter(**arguments, seq_idx=None, use_cache=True) is not NotImplemented


def test_limits_of_step_sizes_are_kept() -> None:
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    for limit in ((0.0, float("inf")), (0.3, 0.6)):
        for softplus in (False, True):
            options = {"dt_limit": limit, "dt_softplus": softplus, "return_final_states": True}
            expected = inspect.unwrap(module.mamba2_chunk_scan)(**LINEAR, **options)
            for ours, theirs in zip(functions.mamba2_chunk_scan(**LINEAR, **options), expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spare", [0, 1, 3])
def test_convolution_state_moves_on_as_the_original_does(spare: int) -> None:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    state = torch.randn(2, 6, 3 + spare)
    theirs, ours = state.clone(), state.clone()
    x, weight, bias = torch.randn(2, 6, 1), torch.randn(6, 4), torch.randn(6)
    expected = inspect.unwrap(module.causal_conv1d_update)(x, theirs, weight, bias, "silu")
    with torch.no_grad():
        y = functions.causal_conv1d_update(x, ours, weight, bias, "silu")
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours, theirs)


def test_decoding_step_of_a_convolution_compiles() -> None:
    state, x, weight = torch.randn(2, 6, 4), torch.randn(2, 6, 1), torch.randn(6, 4)
    expected_state = state.clone()

    @torch.no_grad()
    def step(x: Tensor, state: Tensor) -> Any:
        return functions.causal_conv1d_update(x, state, weight, None, "silu")

    expected = step(x, expected_state)
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(x, state)
    torch.testing.assert_close(y, expected)
    assert torch.equal(state, expected_state)
    torch._dynamo.reset()


def test_without_transformers_one_sentence_says_so() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "import star_kernels.integrations.transformers as t\n"
        "try: t.enable()\n"
        "except ImportError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    sentence = "needs the package transformers: pip install 'star-kernels[hf]'"
    assert result.stdout.strip() == f"star_kernels.integrations.transformers {sentence}"


def test_star_kernels_does_not_import_transformers() -> None:
    program = (
        "import sys, star_kernels, star_kernels.layers, star_kernels.integrations.transformers\n"
        "print('transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
