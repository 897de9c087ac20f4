"""Which weights survive, in the 2:4 pattern: two of each four neighbours along K."""
