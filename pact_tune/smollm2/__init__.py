"""A real aligned model on a laptop: SmolLM2-135M-Instruct (Apache-2.0), aligned here."""
