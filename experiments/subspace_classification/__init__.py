"""Which images are easier to classify: those of the top principal subspace or of the bottom one?"""
