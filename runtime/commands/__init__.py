"""The commands, one a file. They and cli.py are the only places that print."""
