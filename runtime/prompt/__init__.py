"""Messages become runs of token ids and image spans. Never sees pixels."""
