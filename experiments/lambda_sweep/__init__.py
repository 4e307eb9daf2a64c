"""How much of the task does a little reconstruction error buy?"""
