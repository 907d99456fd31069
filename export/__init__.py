"""The way from a checkpoint to an engine directory."""
