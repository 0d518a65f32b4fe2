"""A method's stages in order, and what a trained checkpoint is used for."""
