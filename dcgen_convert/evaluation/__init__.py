"""What a conversion reached: picture grids, metrics and the HTML report of a run."""
