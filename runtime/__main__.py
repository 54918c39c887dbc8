"""`python -m pocketllava` and the script: the command line, or the name of the missing extra."""

from __future__ import annotations

import sys

EXTRA = ("click", "prompt_toolkit", "tqdm")  # pyproject.toml's extra "cli"


def main() -> None:
    """Run the command line."""
    try:
        from pocketllava.cli import main as run

        run()
    except KeyboardInterrupt:  # while it was being imported
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.exit(
            f'error: the command line needs {error.name}; install it with pip install "pocketllava[cli]"'
        )


if __name__ == "__main__":
    main()
