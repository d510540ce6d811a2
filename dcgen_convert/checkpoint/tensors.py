"""Hashes of single tensors: of their bytes alone, whatever file and shard they lie in."""

from __future__ import annotations

import hashlib

from dcgen_convert.checkpoint.headers import Entry

CHUNK = 1 << 22  # bytes


def tensor_sha256(entry: Entry) -> str:
    """Hex SHA-256 of the bytes that a header entry points to."""
    digest, left = hashlib.sha256(), entry.end - entry.start
    with open(entry.file, "rb") as reader:
        reader.seek(entry.start)
        while left and (chunk := reader.read(min(CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
