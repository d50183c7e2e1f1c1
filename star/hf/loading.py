"""Loading that checks: exactly the model's tensors, from safetensors, on one device, nothing unpickled."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors

__all__ = ["load"]


def load(
    from_pretrained: Callable[..., Any], source: str | Path | None, *arguments: Any, **options: Any
) -> Any:
    """`from_pretrained` of transformers, whose reports of what is wrong become errors of one line.

    Raises:
        ValueError: no sound export, or an option that would read anything but safetensors.
        OSError: files that are not there.
    """
    if options.get("use_safetensors") is False:
        raise ValueError(
            "from_pretrained: use_safetensors is False, but nothing is unpickled here; it takes True"
        )
    if options.get("state_dict") is not None:
        raise ValueError("from_pretrained: state_dict is given; load it with model.load_state_dict instead")
    wants_report = options.pop("output_loading_info", False)
    may_differ = options.get("ignore_mismatched_sizes", False)
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        _require_safetensors(Path(source, options.get("subfolder") or ""))
    settings = {**options, "use_safetensors": True, "ignore_mismatched_sizes": True}
    try:
        with _report_unsaid(unless=may_differ):
            model, report = from_pretrained(source, *arguments, output_loading_info=True, **settings)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{source}: not a sound safetensors file: {error}") from error
    mismatched = [] if may_differ else report["mismatched_keys"]
    problems = [
        *(f"tensor {name!r} is missing" for name in sorted(report["missing_keys"])),
        *(f"tensor {name!r} is not in the model" for name in sorted(report["unexpected_keys"])),
        *(
            f"tensor {name!r} has shape {tuple(got)}, the model's has {tuple(takes)}"
            for name, got, takes in sorted(mismatched)
        ),
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ValueError(f"{source}: {problems[0]}{more}")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        raise ValueError(
            f"from_pretrained: device_map spreads the model over {len(devices)} devices; it takes one device"
        )
    return (model, report) if wants_report else model


@contextlib.contextmanager
def _report_unsaid(*, unless: bool) -> Iterator[None]:
    """Without transformers' page of what did not fit, which becomes an error of one line."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return unless or "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _require_safetensors(directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    instead = f" ({pickles[0]} is a pickle, which may run anything, and is not read)" if pickles else ""
    raise ValueError(f"{directory} has no model.safetensors{instead}")
