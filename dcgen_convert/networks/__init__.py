"""diffusers' networks: transformers, autoencoders and stock pipelines, loaded and checked."""
