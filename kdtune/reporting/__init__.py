"""Runs and evaluations as one HTML page that loads nothing. No torch is imported, so that it is made at once."""
