"""dcgen-convert: move a trained latent diffusion transformer into a deep-compression autoencoder's latent space
(DC-Gen).

The package does no work at import: `dcgen_convert.cli` is the command line, `dcgen_convert.conversion` the main path.
"""

__version__ = "0.2.0"
