"""The study on a decoder: SmolLM2-135M writes the equation of a word problem and is scored by its value."""
