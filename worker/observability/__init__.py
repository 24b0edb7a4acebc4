"""What a worker tells of itself: its log."""
