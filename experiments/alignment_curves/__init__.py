"""How far do an image set's principal components serve its labels? Alignment over k, and what lowers it."""
