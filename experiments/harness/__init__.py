"""What the experiments share: command line, settings, data, run folders, training, probes, tables and figures."""
