"""Idefics2, Idefics3 and SmolVLM: a picture's features take the place of image tokens in the prompt."""
