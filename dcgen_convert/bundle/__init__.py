"""The bundle: a folder that stock diffusers loads with one line. Layouts, autoencoder adapter, manifest, card,
verify, sample, push.
"""
