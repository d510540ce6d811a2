"""Alignment of the new embedder and head with the frozen blocks."""
