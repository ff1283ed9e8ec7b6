"""What a checkpoint needs to answer."""
