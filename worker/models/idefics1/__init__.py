"""IDEFICS-1: prompts, image encoder, and a text decoder with a slot for each row."""
