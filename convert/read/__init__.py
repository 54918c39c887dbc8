"""Files of a checkpoint become canonical tensors, configuration, vocabulary and template."""
