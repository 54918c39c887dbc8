"""Which tensor, which type, which keys: what will be written, known before anything is."""
