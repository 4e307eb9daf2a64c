"""Ensembles of networks trained over a mesh: steps, batches, loop, checkpoints, logs. See docs/theory.md, section 3."""
