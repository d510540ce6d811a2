"""What the user holds: folders, hub repositories and files, read from their headers."""
