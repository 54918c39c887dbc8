"""`python -m pocketllava`: the command line."""

from pocketllava.cli import main

if __name__ == "__main__":
    main()
