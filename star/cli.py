"""The entry point of the command `star`; the commands themselves are in `star.commands`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped with Ctrl-C."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(
            f"star: the package {error.name} is missing: the command needs the extra 'search' "
            "(pip install 'star-kernels[search]')"
        )
    from star.commands import app

    app(prog_name="star")


if __name__ == "__main__":
    main()
