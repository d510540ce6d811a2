"""SVDQuant post-training quantisation (arXiv 2411.05007) to the 4-bit formats that nunchaku's kernels read.

`quantize.quantize` turns a diffusers transformer folder into a quantised one, `runtime.load_dequantised` and
`runtime.emulate` read it back without a GPU. Importing this package imports no torch; `settings` imports none either.
"""
