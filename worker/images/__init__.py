"""A job's pictures: where they come from, how they are decoded, and which are kept."""
