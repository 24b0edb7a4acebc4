"""The process itself: cores, the interpreter's lock, its end."""
