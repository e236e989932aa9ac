"""A run saved to a file, or to a folder that all ranks write, to go on with it later."""
