"""Recipes: schema, layering of settings, what SOURCE is, and the rules on picture sizes."""
