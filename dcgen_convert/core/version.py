"""The version of this program. Nothing is imported here, so that every room can name it."""

__version__ = "0.2.0"
