"""What do masks change while a masked autoencoder learns, and what did the closed form say?"""
