"""Does the closed form predict what a trained masked autoencoder learns?"""
