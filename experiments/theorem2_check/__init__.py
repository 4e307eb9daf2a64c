"""Do nonlinear encoders learn the principal subspace? Theorem 2 against trained networks."""
