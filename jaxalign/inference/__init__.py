"""What a checkpoint is used for: files in, files out."""
