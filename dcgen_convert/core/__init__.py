"""What every room uses: errors, files, the console with its progress, the journal of a run."""
