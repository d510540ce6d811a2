"""Captioned pictures and their latents."""
