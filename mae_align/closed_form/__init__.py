"""Moments and a corruption become curves, encoders and verdicts: docs/theory.md, sections 2 to 8 and 11."""
