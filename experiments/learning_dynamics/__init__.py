"""When does an autoencoder learn which principal direction, and does eigenvalue or frequency decide?"""
