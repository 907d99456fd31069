"""Reads an engine directory and decodes with it."""
