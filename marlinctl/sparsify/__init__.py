"""2:4 pruning: which two weights of each aligned four along K are kept, and their values."""
