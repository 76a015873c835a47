"""The frozen aligned model's numbers: what is read of it, where they are stored, and where a run takes them from."""
