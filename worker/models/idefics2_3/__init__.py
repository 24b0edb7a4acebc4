"""Idefics2 and Idefics3, including the first SmolVLM: a picture's features stand among the prompt's own tokens."""
