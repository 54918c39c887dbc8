"""The small trained LLaVA that comes with the package: its drawn world, its training, its checkpoint."""
