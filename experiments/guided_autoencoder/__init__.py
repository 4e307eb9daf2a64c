"""Is reconstruction ill-posed for perception: the same reconstruction error, very different accuracy?"""
