"""`python -m dcgen_convert.cli` is the command dcgen-convert."""

from dcgen_convert.cli.app import main

if __name__ == "__main__":
    main()
