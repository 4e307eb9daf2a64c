"""Where and how things run: errors, checks, memory, devices, processes, files, the executor. It knows no images."""
