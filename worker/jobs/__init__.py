"""One job from its payload to its result."""
