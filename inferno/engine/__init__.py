"""One loaded version of a model: collate, forward and split, and the memory and cores it uses."""
