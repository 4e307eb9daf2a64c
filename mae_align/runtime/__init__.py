"""Where and how things run: errors, checks, memory, devices, processes, files, the executor. It knows no images.

There is no mathematics here; what precision a solve needs is argued in docs/theory.md, section 9.
"""
