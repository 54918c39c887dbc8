"""A plan becomes verified files in their place."""
