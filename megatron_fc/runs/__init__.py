"""Runs on disk and on the terminal: progress, metrics, summary, curves, status."""
