"""`python -m pocketllava` and the script: the command line, or the name of the missing extra."""

from __future__ import annotations

import os
import signal
import sys

EXTRA = ("click", "prompt_toolkit", "tqdm")  # pyproject.toml's extra "cli"
INTERRUPTED = 130  # a shell's code for Ctrl-C


def main() -> None:
    """Run the command line."""
    usual = signal.getsignal(signal.SIGINT)
    # A KeyboardInterrupt amid imports may be lost, or print a traceback.
    if usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        from pocketllava.cli import main as run

        signal.signal(signal.SIGINT, usual)
        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.exit(
            f'error: the command line needs {error.name}; install it with pip install "pocketllava[cli]"'
        )


if __name__ == "__main__":
    main()
