"""How commands end: one line on stderr and an exit code that programs can tell apart."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

__all__ = ["BadInput", "CommandError", "Failed", "StarGroup", "Stopped", "complain", "one_line", "reported"]

_LONGEST_LINE = 1000


class CommandError(Exception):
    """Ends the command with `exit_code` and the message as one line."""

    exit_code = 1


class Failed(CommandError):
    """What was asked for is sound, and went wrong: exit code 1."""


class BadInput(CommandError):
    """What was asked for can not be done: exit code 2."""

    exit_code = 2


class Stopped(CommandError):
    """Ctrl-C: exit code 130."""

    exit_code = 130


@contextmanager
def reported(*, started: bool = False) -> Iterator[None]:
    """The package's own errors as command errors.

    started: the work had begun when the error came, so an error of the run is no longer one of the input.
    """
    # Without torch, numpy and pymoo: these modules hold plain values.
    from star.search.errors import DiskFull, RunDamaged, RunError, SearchInterrupted

    try:
        yield
    except SearchInterrupted as error:
        raise Stopped(str(error)) from error
    except DiskFull as error:
        raise Failed(str(error)) from error
    except RunDamaged as error:
        raise BadInput(str(error)) from error
    except RunError as error:
        raise (Failed if started else BadInput)(str(error)) from error
    except ValueError as error:  # genomes, texts, settings: one line that names what is wrong
        raise BadInput(str(error)) from error
    except OSError as error:
        raise Failed(_system_error(error)) from error
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("star", "star_kernels"):
            raise
        raise Failed(
            f"the package {error.name} is missing (pip install 'star-kernels[search]' brings what star needs)"
        ) from error


class StarGroup(TyperGroup):
    """The group of all commands, where every way to end becomes a line and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        def run() -> Any:
            return super(StarGroup, self).main(
                args, prog_name, complete_var, False, windows_expand_args, **extra
            )

        if not standalone_mode:
            return run()
        try:
            code = run()
        except CommandError as error:
            complain(str(error), error.exit_code)
        except typer.Abort:
            complain("stopped", 130)
        except Exception as error:
            # Wrong options and arguments: typer's own exceptions, which older versions take from click.
            if not (hasattr(error, "format_message") and hasattr(error, "exit_code")):
                raise
            context = getattr(error, "ctx", None)
            message = error.format_message()
            if not message:  # "no arguments": the help has been printed
                sys.exit(error.exit_code)
            path = context.command_path if context is not None else "star"
            complain(f"{one_line(message).rstrip('.')} (see {path} --help)", error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped("stopped") from None


def complain(message: str, exit_code: int) -> NoReturn:
    """Print one line on stderr and end the process."""
    print(f"star: {one_line(message)}", file=sys.stderr)
    sys.exit(exit_code)


def one_line(text: str) -> str:
    """Text from anywhere as one printable line; file names and reasons may hold control characters."""
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)[
        :_LONGEST_LINE
    ]


def _system_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
