"""One command for a new machine: are the kernels right there, and how fast are they?"""
