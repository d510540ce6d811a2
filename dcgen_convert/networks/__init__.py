"""The networks of diffusers: transformers, autoencoders and stock pipelines are loaded and checked here."""
