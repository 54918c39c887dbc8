"""Adapters for other libraries; each file imports one of them."""
