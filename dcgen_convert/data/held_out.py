"""How many rows are held out: of a data set that is there, and of one that is only planned."""


def held_out_rows(rows: int) -> int:
    """A twentieth of ``rows``, 1 to 512: no training sees them."""
    return min(max(1, rows // 20), 512)
