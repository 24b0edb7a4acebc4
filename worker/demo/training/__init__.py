"""Trains the bundled model: art, tokenizer, both stages, checkpoint, pictures and figures. Not needed to serve it."""
