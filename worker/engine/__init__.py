"""The engine: many jobs on one model, in batches that form as they wait."""
