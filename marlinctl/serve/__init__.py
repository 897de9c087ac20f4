"""Native folders in programs that serve models."""
