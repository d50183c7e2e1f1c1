"""`--proxy NAME=VALUE`: settings of a training that have no option of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from star.commands.errors import BadInput
from star.proxy import ProxySettings

_KINDS = {"int": (int, "an integer"), "float": (float, "a number"), "str": (str, "a word")}


def proxy_settings(given: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None and what "name=value" texts say, as fields of `ProxySettings`.

    Raises:
        BadInput: no such setting, a value of another kind, or a setting that is given twice.
    """
    fields = {field.name: str(field.type) for field in dataclasses.fields(ProxySettings)}
    settings = {name: value for name, value in options.items() if value is not None}
    for text in given:
        name, sign, value = (part.strip() for part in text.partition("="))
        name = name.replace("-", "_")
        if not sign or name not in fields:
            raise BadInput(f"--proxy is {text!r}, takes NAME=VALUE with one of {', '.join(fields)}")
        if name in settings:
            raise BadInput(f"--proxy {name} is given twice")
        make, takes = _KINDS[fields[name].partition(" ")[0]]
        try:
            settings[name] = make(value)
        except ValueError:
            raise BadInput(f"--proxy {name} is {value!r}, takes {takes}") from None
    return settings
