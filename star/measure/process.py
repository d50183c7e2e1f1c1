"""Measurements in a process of their own: its memory is the model's alone, and its crash an error here.

    python -m star.measure.process < job.json

reads {"job": "whole" or "table", ...} and prints the answer as its last line, what it is doing on stderr.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Collection
from typing import Any

from star.config import ModelConfig
from star.genome import Genome
from star.measure.errors import MeasurementError, OtherDevice
from star.measure.settings import MeasureSettings
from star.profile.table import ProfileTable

__all__ = ["measure_in_process", "table_in_process"]

_TOLD = "measuring: "  # begins a line of stderr that is for people


def measure_in_process(genome: Genome, table: ProfileTable) -> dict[str, float]:
    """What `star.measure.whole.measure_genome` gives, from a new process, on the device of the table and with
    its settings.

    Raises:
        OtherDevice: it is not in this machine.
        MeasurementError: the model could not be measured; one line says why.
    """
    # Only here, so that a search without a device does without torch in its own process.
    import torch

    from star.measure.device import device_name

    settings = table.settings
    try:
        here = device_name(torch.device(settings.device))
    except (RuntimeError, AssertionError):  # how torch says that there is no such GPU
        here = f"no {settings.device}"
    if here != table.device_name:
        raise OtherDevice(f"the table is of {table.device_name}, and this machine has {here}")
    config = settings.config().to_json()
    job = {"job": "whole", "genome": str(genome), "config": config, "settings": settings.to_json()}
    answer = _carry_out(job, lambda line: None)
    return {str(name): float(value) for name, value in answer.items()}


def table_in_process(
    settings: MeasureSettings, *, classes: Collection[int] | None = None, tell: Callable[[str], None]
) -> ProfileTable:
    """What `star.profile.livs.measure_table` gives, from a new process.

    Raises:
        MeasurementError: it could not be measured; one line says why.
    """
    chosen = None if classes is None else sorted(classes)
    answer = _carry_out({"job": "table", "settings": settings.to_json(), "classes": chosen}, tell)
    return ProfileTable.from_json(answer)


def _carry_out(job: dict[str, Any], tell: Callable[[str], None]) -> Any:
    process = subprocess.Popen(
        [sys.executable, "-m", "star.measure.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[str] = []
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    stderr = process.stderr

    def listen() -> None:
        for line in stderr:
            lines.append(line.rstrip())
            if line.startswith(_TOLD):
                tell(line[len(_TOLD) :].strip())

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        output = process.stdout.read()
        process.wait()
        listener.join()
    except BaseException:
        process.kill()
        process.wait()
        raise
    answer = output.splitlines()[-1:] or [""]
    if process.returncode == 0 and answer[0].startswith("{"):
        result = json.loads(answer[0])
        if "error" in result:
            raise MeasurementError(result["error"])
        return result["value"]
    ended = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
    said = [line for line in lines if line and not line.startswith(_TOLD)]
    raise MeasurementError(f"the measuring process ended with {ended}{': ' + said[-1] if said else ''}")


def _answer(job: dict[str, Any]) -> Any:
    settings = MeasureSettings.from_json(job["settings"])
    if job["job"] == "whole":
        from star.measure.whole import measure_genome

        return measure_genome(Genome.parse(job["genome"]), ModelConfig.from_json(job["config"]), settings)
    from star.profile.livs import measure_table

    def tell(text: str) -> None:
        print(f"{_TOLD}{text}", file=sys.stderr, flush=True)

    return measure_table(settings, classes=job["classes"], tell=tell).to_json()


def main() -> None:
    try:
        result = {"value": _answer(json.load(sys.stdin))}
    except MeasurementError as error:
        result = {"error": str(error)}
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    main()
