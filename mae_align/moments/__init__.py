"""Images become second moments, or samples where they are fewer than the pixels: docs/theory.md, sections 1 and 11."""
