"""The Python API: one function per verb (`calls`), what they take (`settings`), what they return (`results`).

`dcgen_convert` itself passes the public names on. The command line calls the same functions.
"""
