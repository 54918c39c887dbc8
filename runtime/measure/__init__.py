"""Accuracy, speed, importance matrices and feature drift of loaded models."""
