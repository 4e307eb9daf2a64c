"""Do the closed forms hold? Theorems 1 and 3 against gradient descent on real images."""
