"""Where tables are kept: one a device and settings in the user's cache; a run records its own copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from star.measure.process import table_in_process
from star.measure.settings import MeasureSettings
from star.profile.table import ProfileDamaged, ProfileTable, read_table

__all__ = ["agrees", "cached_path", "find_or_measure"]

Measure = Callable[..., ProfileTable]


def find_or_measure(
    settings: MeasureSettings,
    classes: Collection[int],
    *,
    tell: Callable[[str], None] = lambda text: None,
    measure: Measure | None = None,
    anew: bool = False,
) -> ProfileTable:
    """The table for resolved settings from the user's cache, or a new one, which is kept there.

    A kept table that is damaged, unsteady, or has too few classes, is measured again. A new one that is
    unsteady is given and not kept, so that the next search measures it again.

    Args:
        settings: resolved.
        classes: LIV classes that are needed.
        tell: is told what is being measured.
        measure: `star.measure.process.table_in_process`, unless a test puts something else here.
        anew: measure in any case.

    Raises:
        MeasurementError: it can not be measured.
    """
    path = cached_path(settings)
    if not anew and path.exists():
        try:
            kept = read_table(path).require_classes(classes)
            doubts = kept.doubts()
            if not doubts:
                return kept
            tell(f"again, since the kept profile table is unsteady: {doubts[0]}")
        except ValueError as error:
            tell(f"again, since the {error}")
    table = (measure or table_in_process)(settings, classes=classes, tell=tell)
    if table.doubts():
        return table
    path.parent.mkdir(parents=True, exist_ok=True)
    table.write(path)
    return table


def cached_path(settings: MeasureSettings) -> Path:
    """Where the table of this device and these resolved settings is kept. Imports torch."""
    import torch

    from star.data.cache import default_cache_directory
    from star.measure.device import device_name

    facts = {
        "settings": _timed(settings).to_json(),
        "device": device_name(torch.device(settings.device)),
        "versions": {name: metadata.version(name) for name in ("torch", "star-kernels")},
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return default_cache_directory() / "profiles" / f"{key}.json"


def agrees(table: ProfileTable, settings: MeasureSettings) -> MeasureSettings:
    """The settings with everything that they leave open as the table has it.

    Raises:
        ProfileDamaged: they ask for something else than the table holds.
    """
    theirs = table.settings
    for name in ("head_dim", "vocab_size", "threads"):
        if getattr(settings, name) is None:
            settings = replace(settings, **{name: getattr(theirs, name)})
    for name in ("dtype", "device"):
        if getattr(settings, name) == "auto":
            settings = replace(settings, **{name: getattr(theirs, name)})
    if settings.device == "cuda":  # as MeasureSettings.resolved has it
        settings = replace(settings, device="cuda:0")
    if not settings.contexts:
        settings = replace(settings, contexts=theirs.contexts)
    for name in ("width", "head_dim", "vocab_size", "dtype", "device", "threads", "contexts", "chunk"):
        asked, held = getattr(settings, name), getattr(theirs, name)
        if asked != held:
            raise ProfileDamaged(
                f"profile table was measured with {name} {_plain(held)}, not {_plain(asked)}"
            )
    return replace(theirs, every=settings.every)


def _timed(settings: MeasureSettings) -> MeasureSettings:
    """What the table depends on: all but how many candidates are measured whole."""
    return replace(settings, every=MeasureSettings.every)


def _plain(value: object) -> str:
    return ", ".join(str(item) for item in value) if isinstance(value, tuple) else str(value)
